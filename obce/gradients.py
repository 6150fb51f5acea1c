"""Gradients of deaths through the edges behind them, for torch.

A death is the length of one edge, so its gradient reaches the two end points of that edge, or the entry of the matrix,
and nothing else: d|x_a - x_b| = (x_a - x_b) / |x_a - x_b|, and 0 for an edge of length 0 (a subgradient). The tree
is constant almost everywhere; where lengths tie, the gradient is that of the edge which the strict order chose.
"""

from __future__ import annotations

from typing import Any

import torch


def line_edges(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sorted neighbours in the order of their gaps: the ends behind the deaths of `values`, without a tree.

    Args:
        values: [B, n], finite up to `lengths`.
        lengths: [B] int64.

    Returns:
        [B, n - 1, 2] int64, smaller index first; -1 beyond a row's length. Equal gaps stand in the order of the values.
    """
    column = torch.arange(values.shape[1], device=values.device)
    inside = column < lengths[:, None]
    ordered, order = torch.where(inside, values, torch.inf).sort(dim=1, stable=True)
    real = column[1:] < lengths[:, None]
    rank = torch.where(real, ordered.diff(dim=1), torch.inf).sort(dim=1, stable=True).indices
    ends = torch.stack([order[:, :-1].gather(1, rank), order[:, 1:].gather(1, rank)], 2).sort(2).values
    return torch.where(real[:, :, None], ends, -1)


def attach(source: torch.Tensor, deaths: torch.Tensor, edges: torch.Tensor, metric: str, p: float) -> torch.Tensor:
    """The same deaths, with their gradient towards `source`.

    Args:
        source: points [B, n, d], or with metric "precomputed" entries [B, n, n] or [1, n (n - 1) / 2].
        deaths: [B, n - 1] as the engine gave them.
        edges: [B, n - 1, 2], the ends behind each death, -1 for none.
        metric: a metric of obce.h0, or "precomputed".
        p: exponent of minkowski.

    Returns:
        [B, n - 1]. Differentiable once: a second derivative raises.
    """
    result: torch.Tensor = _Deaths.apply(source, deaths, edges, metric, p)  # type: ignore[no-untyped-call]
    return result


def pull_back(
    grad: torch.Tensor, source: torch.Tensor, deaths: torch.Tensor, edges: torch.Tensor, metric: str, p: float
) -> torch.Tensor:
    """The gradient towards `source` from the one towards `deaths`, grad [B, n - 1]; the rest as in `attach`.

    `edges` and `deaths` may be a part of the n - 1 where `source` is points.

    Returns:
        Of the shape and dtype of `source`.
    """
    present = (edges[:, :, 0] >= 0) & torch.isfinite(deaths)
    grad = torch.where(present, grad, 0)
    a, b = edges.clamp(min=0).unbind(2)
    if metric == "precomputed":
        return _to_entries(source, grad, a, b)
    cloud = torch.arange(len(source), device=source.device)[:, None]
    to_a, to_b = _pull(source[cloud, a], source[cloud, b], deaths, grad, metric, p)
    out = grad.new_zeros(source.shape)  # made of grad, which may be a batch of torch's vmap
    out.index_put_((cloud.expand_as(a), a), to_a, accumulate=True)
    out.index_put_((cloud.expand_as(b), b), to_b, accumulate=True)
    return out


class _Deaths(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, source: torch.Tensor, deaths: torch.Tensor, edges: torch.Tensor, metric: str, p: float
    ) -> torch.Tensor:
        ctx.save_for_backward(source, deaths, edges)
        ctx.metric, ctx.p = metric, p
        return deaths.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        into: torch.Tensor = _PullBack.apply(grad, *ctx.saved_tensors, ctx.metric, ctx.p)  # type: ignore[no-untyped-call]
        return into, None, None, None, None


class _PullBack(torch.autograd.Function):
    """`pull_back` as a node of its own: the gradient depends on the source, also where `grad` is a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> torch.Tensor:
        return pull_back(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        raise RuntimeError("the gradient of deaths is differentiated, expected first derivatives alone; detach() it.")


def _to_entries(entries: torch.Tensor, grad: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1 to a condensed entry; 1/2 to each of the two mirror entries of a square one."""
    out = grad.new_zeros(entries.shape)
    if entries.ndim == 3:
        cloud = torch.arange(len(entries), device=entries.device)[:, None].expand_as(a)
        out.index_put_((cloud, a, b), grad / 2, accumulate=True)
        out.index_put_((cloud, b, a), grad / 2, accumulate=True)
        return out
    n = a.shape[1] + 1
    at = a * n - a * (a + 1) // 2 + b - a - 1
    if n > 1:
        out.scatter_add_(1, at.clamp(min=0), grad)  # a missing edge has a = b = 0 and no gradient
    return out


def _pull(
    x: torch.Tensor, y: torch.Tensor, deaths: torch.Tensor, grad: torch.Tensor, metric: str, p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients [B, n - 1, d] towards the ends x and y [B, n - 1, d] of each edge."""
    grad = grad[:, :, None]
    if metric in ("cosine", "correlation"):
        to_x, to_y = _turn(x, y, grad, metric == "correlation")
    else:
        to_x = _slope(x - y, deaths, grad, metric, p)
        to_y = -to_x
    # no edge, or one of infinite length: 0 / 0 and 0 * inf are no gradient; nor has one of length 0 a direction
    silent = (grad == 0) | (deaths == 0)[:, :, None]
    return torch.where(silent, 0, to_x), torch.where(silent, 0, to_y)


def _slope(difference: torch.Tensor, deaths: torch.Tensor, grad: torch.Tensor, metric: str, p: float) -> torch.Tensor:
    """Gradient towards x from the differences x - y [B, n - 1, d] and grad [B, n - 1, 1]; 0 where x equals y."""
    if metric == "sqeuclidean":
        return grad * (2 * difference)
    if metric == "euclidean":
        return grad * (difference / torch.where(deaths > 0, deaths, 1)[:, :, None])
    if metric == "manhattan":
        return grad * difference.sign()
    size = difference.abs()
    top = size.amax(2, keepdim=True)
    if metric == "chebyshev":  # coordinates that share the maximum share the gradient
        largest = size == top
        return grad * largest / largest.sum(2, keepdim=True) * difference.sign()
    # As the weight is computed: shares of the largest difference, whose powers neither overflow nor all vanish.
    share = size / torch.where(top > 0, top, 1)
    total = torch.where(top > 0, share.pow(p).sum(2, keepdim=True), 1)
    return grad * (difference.sign() * share.pow(p - 1) * total.pow(1 / p - 1))


def _turn(x: torch.Tensor, y: torch.Tensor, grad: torch.Tensor, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients towards x and y of half the squared distance of their directions u and v, 1 - u.v.

    d u / d x: what is left of a change after its part along u, over the length of x; less its mean where the rows
    were centred.
    """
    (u, x_norm, x_scale), (v, y_norm, y_scale) = _direction(x, centred), _direction(y, centred)
    pull = grad * (u - v)
    out = []
    for g, direction, norm, scale in ((pull, u, x_norm, x_scale), (-pull, v, y_norm, y_scale)):
        across = g / norm - direction * (g * (direction / norm)).sum(2, keepdim=True)
        if centred:
            across = across - across.mean(2, keepdim=True)
        out.append(across / scale)
    return out[0], out[1]


def _direction(v: torch.Tensor, centred: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of length 1, and the two divisors that made them: the length, of the row over a power of two.

    That power brings the largest magnitude into [1, 2): exact, and squares stay in the range.
    """
    top = v.abs().amax(2, keepdim=True)
    scale = top / (2 * torch.frexp(top).mantissa)
    v = v / scale
    if centred:
        v = v - v.mean(2, keepdim=True)
    norm = torch.linalg.vector_norm(v, dim=2, keepdim=True)
    return v / norm, norm, scale
