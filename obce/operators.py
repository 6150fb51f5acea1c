"""The engine as operators of torch, for code that torch.compile or torch.export traces.

`obce.h0`, `h0_line`, `h0_distances` and `r_f` call these while they are traced, so that a function with them is one
graph. An operator runs the eager function when the compiled program runs, and there is checked what depends on values;
names, dtypes and shapes are refused while tracing. Gradients are those of obce/gradients.py.

Shapes: B clouds, n points, d coordinates; `points` [n, d] or [B, n, d], `values` [n] or [B, n], `matrix` [n, n],
[B, n, n] or, condensed, [n (n - 1) / 2]. Outputs: deaths [B, n - 1], and edges [B, n - 1, 2] int64, or [B, 0, 2] when
they are not asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from obce import gradients

Lengths: TypeAlias = Sequence[int] | Any
Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]
Found: TypeAlias = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]

_H0_TAIL = "float? max_edge, bool edges, str algorithm, str? backend, bool check, int? threads) -> (Tensor, Tensor)"
_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)  # they wait for the device; torch has the tag from 2.8 on
_TAGS: dict[str, Any] = {} if _UNSAFE is None else {"tags": (_UNSAFE,)}


def _door() -> Any:
    """obce/h0.py, which stands above this module: its eager functions are what the operators run."""
    return importlib.import_module("obce.h0")


def _run(call: str, data: torch.Tensor, edges: bool, **options: Any) -> Pair:
    result = getattr(_door(), call)(data.detach(), edges=edges, **options)
    ends = result.edges if edges else torch.empty((len(result), 0, 2), dtype=torch.int64, device=data.device)
    return result.deaths.contiguous(), ends.contiguous()


# ---- what tracing sees: empty outputs, and the refusals that need no values ----------------------------------------


def _dtype(data: torch.Tensor, name: str) -> torch.dtype:
    """Of the deaths, as the eager function decides it."""
    if data.layout is not torch.strided:
        raise TypeError(f"{name} is a {data.layout} tensor, expected a dense one; call .to_dense() first.")
    if data.dtype in (torch.float16, torch.bfloat16, torch.float32):
        return torch.float32
    if data.dtype != torch.float64 and (data.is_floating_point() or data.is_complex()):
        raise TypeError(_door()._dtype_sentence(name, data.dtype))
    return torch.float64


def _fake(
    data: torch.Tensor,
    name: str,
    size: tuple[Any, Any],
    lengths: torch.Tensor | None,
    kind: str,
    max_edge: float | None,
    edges: bool,
    algorithm: str,
) -> Pair:
    door = _door()
    B, n = size
    deaths = data.new_empty((B, n - 1), dtype=_dtype(data, name))
    _check_lengths(lengths, B)
    door._take_max_edge(max_edge)
    door._take_algorithm(algorithm, kind, edges)
    return deaths, data.new_empty((B, n - 1 if edges else 0, 2), dtype=torch.int64)


def _check_lengths(lengths: torch.Tensor | None, B: Any) -> None:
    if lengths is None:
        return
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths has dtype {str(lengths.dtype).removeprefix('torch.')}, expected integers.")
    _door()._check_lengths_shape(lengths, B)


# ---- gradient --------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "obce::pull_back",
    mutates_args=(),
    schema="(Tensor grad, Tensor source, Tensor deaths, Tensor edges, str metric, float p) -> Tensor",
)
def pull_back(
    grad: torch.Tensor, source: torch.Tensor, deaths: torch.Tensor, edges: torch.Tensor, metric: str, p: float
) -> torch.Tensor:
    """`gradients.pull_back` as one node; it has no derivative of its own, so a second one raises."""
    return gradients.pull_back(grad, source, deaths, edges, metric, p)


@pull_back.register_fake
def _(
    grad: torch.Tensor, source: torch.Tensor, deaths: torch.Tensor, edges: torch.Tensor, metric: str, p: float
) -> torch.Tensor:
    del grad, deaths, edges, metric, p
    return torch.empty_like(source)


def _pull(ctx: Any, grad: torch.Tensor, source: torch.Tensor, deaths: torch.Tensor, edges: torch.Tensor) -> Any:
    """The gradient towards the data of an operator, from points [B, n, d] or entries made of them."""
    (data, *_) = ctx.saved_tensors
    out = pull_back(grad, source.to(deaths.dtype).contiguous(), deaths, edges, ctx.metric, ctx.p)
    return out.reshape(data.shape).to(data.dtype)


def _of_line(values: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths [B] on the device, and the sorted neighbours behind the deaths of values [B, n]."""
    B, n = values.shape
    counts = (
        torch.full((B,), n, device=values.device)
        if lengths is None
        else lengths.to(values.device, torch.int64).reshape(B)
    )
    return counts, gradients.line_edges(values, counts)


# ---- points ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "obce::clouds_h0",
    mutates_args=(),
    schema="(Tensor points, Tensor? lengths, str metric, float? p, " + _H0_TAIL,
    **_TAGS,
)
def clouds_h0(
    points: torch.Tensor,
    lengths: torch.Tensor | None,
    metric: str,
    p: float | None,
    max_edge: float | None,
    edges: bool,
    algorithm: str,
    backend: str | None,
    check: bool,
    threads: int | None,
) -> Pair:
    """`obce.h0`: its deaths and edges. For a gradient with d > 1, edges must be True."""
    options = {"max_edge": max_edge, "algorithm": algorithm, "backend": backend, "check": check, "threads": threads}
    return _run("h0", points, edges, lengths=lengths, metric=metric, p=p, **options)


@clouds_h0.register_fake
def _(
    points: torch.Tensor,
    lengths: torch.Tensor | None,
    metric: str,
    p: float | None,
    max_edge: float | None,
    edges: bool,
    algorithm: str,
    backend: str | None,
    check: bool,
    threads: int | None,
) -> Pair:
    del backend, check
    door = _door()
    door._take_metric(metric, p)
    door.checked_threads(threads)
    B, n, d = door._points_size(points)
    return _fake(points, "points", (B, n), lengths, "line" if d == 1 else "cloud", max_edge, edges, algorithm)


def _save_clouds(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    points, lengths, metric, p, _, edges, *_ = inputs
    if not edges and points.shape[-1] != 1:
        raise ValueError("edges is False and points requires grad, expected True: the gradient needs the edges.")
    ctx.metric, ctx.p = _door()._take_metric(metric, p)
    _save(ctx, points, lengths, edges, output)


def _save(ctx: Any, data: torch.Tensor, lengths: torch.Tensor | None, edges: bool, output: Pair) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.has_edges, ctx.has_lengths = edges, lengths is not None
    ctx.save_for_backward(data, *output, *([] if lengths is None else [lengths]))


def _clouds_backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    points, deaths, edges, *rest = ctx.saved_tensors
    source = points if points.ndim == 3 else points[None]
    if not ctx.has_edges:
        edges = _of_line(source[:, :, 0].to(deaths.dtype), *(rest or [None]))[1]
    return _pull(ctx, grad, source, deaths, edges), *[None] * 9


clouds_h0.register_autograd(_clouds_backward, setup_context=_save_clouds)


# ---- scalars ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "obce::lines_h0", mutates_args=(), schema="(Tensor values, Tensor? lengths, " + _H0_TAIL, **_TAGS
)
def lines_h0(
    values: torch.Tensor,
    lengths: torch.Tensor | None,
    max_edge: float | None,
    edges: bool,
    algorithm: str,
    backend: str | None,
    check: bool,
    threads: int | None,
) -> Pair:
    """`obce.h0_line`: its deaths and edges."""
    options = {"max_edge": max_edge, "algorithm": algorithm, "backend": backend, "check": check, "threads": threads}
    return _run("h0_line", values, edges, lengths=lengths, **options)


@lines_h0.register_fake
def _(
    values: torch.Tensor,
    lengths: torch.Tensor | None,
    max_edge: float | None,
    edges: bool,
    algorithm: str,
    backend: str | None,
    check: bool,
    threads: int | None,
) -> Pair:
    del backend, check
    door = _door()
    door.checked_threads(threads)
    return _fake(values, "values", door._values_size(values), lengths, "line", max_edge, edges, algorithm)


def _save_lines(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    values, lengths, _, edges, *_ = inputs
    ctx.metric, ctx.p = "euclidean", 0.0
    _save(ctx, values, lengths, edges, output)


def _lines_backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    values, deaths, edges, *rest = ctx.saved_tensors
    source = (values if values.ndim == 2 else values[None]).to(deaths.dtype)
    if not ctx.has_edges:
        edges = _of_line(source, *(rest or [None]))[1]
    return _pull(ctx, grad, source[:, :, None], deaths, edges), *[None] * 7


lines_h0.register_autograd(_lines_backward, setup_context=_save_lines)


@torch.library.custom_op(
    "obce::lines_r_f",
    mutates_args=(),
    schema="(Tensor values, Tensor? lengths, float? max_edge, str? backend, bool check, int? threads) -> Tensor",
    **_TAGS,
)
def lines_r_f(
    values: torch.Tensor,
    lengths: torch.Tensor | None,
    max_edge: float | None,
    backend: str | None,
    check: bool,
    threads: int | None,
) -> torch.Tensor:
    """`obce.r_f`: [B]."""
    options = {"max_edge": max_edge, "backend": backend, "check": check, "threads": threads}
    found: torch.Tensor = _door().r_f(values.detach(), lengths=lengths, **options)
    return found


@lines_r_f.register_fake
def _(
    values: torch.Tensor,
    lengths: torch.Tensor | None,
    max_edge: float | None,
    backend: str | None,
    check: bool,
    threads: int | None,
) -> torch.Tensor:
    del backend, check
    door = _door()
    door.checked_threads(threads)
    size = door._values_size(values)
    deaths, _ = _fake(values, "values", size, lengths, "line", max_edge, False, "auto")
    return deaths.new_empty((size[0],))


def _save_r_f(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    values, lengths, *_ = inputs
    ctx.metric, ctx.p = "euclidean", 0.0
    ctx.save_for_backward(values, output, *([] if lengths is None else [lengths]))


def _r_f_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    values, largest, *rest = ctx.saved_tensors
    if values.shape[-1] == 1:
        return torch.zeros_like(values), *[None] * 5
    source = (values if values.ndim == 2 else values[None]).to(largest.dtype)
    counts, edges = _of_line(source, *(rest or [None]))
    last = (counts - 2).clamp(min=0)[:, None, None].expand(-1, 1, 2)
    into = _pull(ctx, grad[:, None], source[:, :, None], largest[:, None], edges.gather(1, last))
    return into, *[None] * 5


lines_r_f.register_autograd(_r_f_backward, setup_context=_save_r_f)


# ---- distances -------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "obce::distances_h0", mutates_args=(), schema="(Tensor matrix, Tensor? lengths, " + _H0_TAIL, **_TAGS
)
def distances_h0(
    matrix: torch.Tensor,
    lengths: torch.Tensor | None,
    max_edge: float | None,
    edges: bool,
    algorithm: str,
    backend: str | None,
    check: bool,
    threads: int | None,
) -> Pair:
    """`obce.h0_distances`: its deaths and edges. For a gradient, edges must be True."""
    options = {"max_edge": max_edge, "algorithm": algorithm, "backend": backend, "check": check, "threads": threads}
    return _run("h0_distances", matrix, edges, lengths=lengths, **options)


@distances_h0.register_fake
def _(
    matrix: torch.Tensor,
    lengths: torch.Tensor | None,
    max_edge: float | None,
    edges: bool,
    algorithm: str,
    backend: str | None,
    check: bool,
    threads: int | None,
) -> Pair:
    del backend, check
    door = _door()
    door.checked_threads(threads)
    kind = "condensed" if matrix.ndim == 1 else "matrix"
    door._check_one_matrix_has_no_lengths(lengths, kind)
    return _fake(matrix, "matrix", door._matrix_size(matrix), lengths, kind, max_edge, edges, algorithm)


def _save_distances(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    matrix, lengths, _, edges, *_ = inputs
    if not edges:
        raise ValueError("edges is False and matrix requires grad, expected True: the gradient needs the edges.")
    ctx.metric, ctx.p = "precomputed", 0.0
    _save(ctx, matrix, lengths, edges, output)


def _distances_backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    matrix, deaths, edges, *_ = ctx.saved_tensors
    source = matrix if matrix.ndim == 3 else matrix[None]
    return _pull(ctx, grad, source, deaths, edges), *[None] * 7


distances_h0.register_autograd(_distances_backward, setup_context=_save_distances)


# ---- what the public functions become while they are traced ----------------------------------------------------------


def _as_tensor(lengths: Lengths) -> torch.Tensor | None:
    if lengths is None:
        return None
    counts = torch.as_tensor(lengths)
    return counts[None] if counts.ndim == 0 else counts


def _all_lengths(data: torch.Tensor, lengths: torch.Tensor | None, deaths: torch.Tensor) -> torch.Tensor:
    if lengths is not None:
        return lengths.to(data.device, torch.int64)
    return torch.full((deaths.shape[0],), deaths.shape[1] + 1, dtype=torch.int64, device=data.device)


def _grows(data: torch.Tensor) -> bool:
    return data.requires_grad and torch.is_grad_enabled()


def trace_h0(
    points: Any,
    lengths: Lengths,
    metric: str,
    p: float | None,
    max_edge: float | None,
    edges: bool,
    algorithm: str,
    backend: str | None,
    check: bool,
    threads: int | None,
) -> Found:
    """`obce.h0` as the operator: deaths, edges or None, lengths."""
    counts = _as_tensor(lengths)
    also = edges or (_grows(points) and points.ndim > 1 and points.shape[-1] != 1)
    deaths, ends = clouds_h0(points, counts, metric, p, max_edge, also, algorithm, backend, check, threads)
    return deaths, ends if edges else None, _all_lengths(points, counts, deaths)


def trace_h0_line(
    values: Any,
    lengths: Lengths,
    max_edge: float | None,
    edges: bool,
    algorithm: str,
    backend: str | None,
    check: bool,
    threads: int | None,
) -> Found:
    """`obce.h0_line` as the operator: deaths, edges or None, lengths."""
    counts = _as_tensor(lengths)
    deaths, ends = lines_h0(values, counts, max_edge, edges, algorithm, backend, check, threads)
    return deaths, ends if edges else None, _all_lengths(values, counts, deaths)


def trace_h0_distances(
    matrix: Any,
    lengths: Lengths,
    max_edge: float | None,
    edges: bool,
    algorithm: str,
    backend: str | None,
    check: bool,
    threads: int | None,
) -> Found:
    """`obce.h0_distances` as the operator: deaths, edges or None, lengths."""
    counts = _as_tensor(lengths)
    also = edges or _grows(matrix)
    deaths, ends = distances_h0(matrix, counts, max_edge, also, algorithm, backend, check, threads)
    return deaths, ends if edges else None, _all_lengths(matrix, counts, deaths)


def trace_r_f(
    values: Any,
    lengths: Lengths,
    max_edge: float | None,
    backend: str | None,
    check: bool,
    threads: int | None,
) -> torch.Tensor:
    """`obce.r_f` as the operator: [B]."""
    found: torch.Tensor = lines_r_f(values, _as_tensor(lengths), max_edge, backend, check, threads)
    return found
