"""Gradients of deaths through the edges behind them, for torch.

A death is the length of one edge, so its gradient reaches the two end points of that edge, or the entry of the matrix,
and nothing else: d|x_a - x_b| = (x_a - x_b) / |x_a - x_b|, and 0 for an edge of length 0 (a subgradient). The tree
is constant almost everywhere; where lengths tie, the gradient is that of the edge which the strict order chose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


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


class _Deaths(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, source: torch.Tensor, deaths: torch.Tensor, edges: torch.Tensor, metric: str, p: float
    ) -> torch.Tensor:
        ctx.save_for_backward(source, deaths, edges)
        ctx.metric, ctx.p = metric, p
        return deaths.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        source, deaths, edges = ctx.saved_tensors
        present = (edges[:, :, 0] >= 0) & torch.isfinite(deaths)
        grad = torch.where(present, grad, 0)
        a, b = edges.clamp(min=0).unbind(2)
        if ctx.metric == "precomputed":
            return _to_entries(source, grad, a, b), None, None, None, None
        cloud = torch.arange(len(source), device=source.device)[:, None]
        to_a, to_b = _pull(source[cloud, a], source[cloud, b], deaths, grad, ctx.metric, ctx.p)
        out = torch.zeros_like(source)
        out.index_put_((cloud.expand_as(a), a), to_a, accumulate=True)
        out.index_put_((cloud.expand_as(b), b), to_b, accumulate=True)
        return out, None, None, None, None


def _to_entries(entries: torch.Tensor, grad: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1 to a condensed entry; 1/2 to each of the two mirror entries of a square one."""
    out = torch.zeros_like(entries)
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
    if metric in ("euclidean", "sqeuclidean", "minkowski"):
        to_x = grad[:, :, None] * _slope(x - y, deaths, metric, p)
        to_y = -to_x
    else:
        with torch.enable_grad():
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            lengths = torch.where(grad != 0, _lengths(x, y, metric), 0)
        to_x, to_y = torch.autograd.grad(lengths, (x, y), grad)
    silent = (grad == 0)[:, :, None]  # no edge, or one of infinite length: 0 / 0 and 0 * inf are no gradient
    return torch.where(silent, 0, to_x), torch.where(silent, 0, to_y)


def _slope(difference: torch.Tensor, deaths: torch.Tensor, metric: str, p: float) -> torch.Tensor:
    """Derivative of a length by x from the differences x - y [B, n - 1, d]; 0 where x equals y."""
    if metric == "sqeuclidean":
        return 2 * difference
    if metric == "euclidean":
        return difference / torch.where(deaths > 0, deaths, 1)[:, :, None]
    # As the weight is computed: shares of the largest difference, whose powers neither overflow nor all vanish.
    top = difference.abs().amax(2, keepdim=True)
    share = difference.abs() / torch.where(top > 0, top, 1)
    total = torch.where(top > 0, share.pow(p).sum(2, keepdim=True), 1)
    slope: torch.Tensor = difference.sign() * share.pow(p - 1) * total.pow(1 / p - 1)
    return slope


def _tamed(v: torch.Tensor) -> torch.Tensor:
    """Each row over a power of two, its largest magnitude then in [1, 2): exact, and squares stay in the range."""
    top = v.detach().abs().amax(2, keepdim=True)
    return v / (top / (2 * torch.frexp(top).mantissa))


def _lengths(x: torch.Tensor, y: torch.Tensor, metric: str) -> torch.Tensor:
    lengths: torch.Tensor
    if metric == "manhattan":
        lengths = (x - y).abs().sum(2)
    elif metric == "chebyshev":
        lengths = (x - y).abs().amax(2)
    else:
        x, y = _tamed(x), _tamed(y)
        if metric == "correlation":
            x, y = x - x.mean(2, keepdim=True), y - y.mean(2, keepdim=True)
        x, y = (v / torch.linalg.vector_norm(v, dim=2, keepdim=True) for v in (x, y))
        lengths = (x - y).square().sum(2) / 2
    return lengths
