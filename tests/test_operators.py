"""Compiled and exported code that calls the engine: one graph, the values, edges and gradients of eager code."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import obce
import pytest
import torch
import torch._dynamo.testing
from obce import operators
from torch.library import opcheck

NAN = math.nan
METRICS: list[tuple[str, float | None]] = [
    ("euclidean", None),
    ("sqeuclidean", None),
    ("cosine", None),
    ("correlation", None),
    ("cityblock", None),
    ("chebyshev", None),
    ("minkowski", 3),
]

Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distances(points: torch.Tensor) -> torch.Tensor:
    return (points[:, :, None] - points[:, None]).abs().sum(-1)


def compiled(function: Function, dynamic: bool | None = None, backend: Any = "aot_eager") -> Function:
    compiled: Function = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    return compiled


def outcome(function: Function, inputs: tuple[torch.Tensor, ...], grow: bool) -> list[torch.Tensor]:
    """The outputs, and the gradients towards the inputs of a weighted sum of the first output."""
    leaves = [x.clone().requires_grad_(grow and x.is_floating_point()) for x in inputs]
    found = function(*leaves)
    found = list(found) if isinstance(found, tuple) else [found]
    if grow:
        finite = torch.where(found[0].isfinite(), found[0], 0)
        (finite * torch.arange(1, finite.numel() + 1).reshape(finite.shape)).sum().backward()
    return [x.detach() for x in found] + [x.grad for x in leaves if x.grad is not None]


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same dtype and bits; NaN equals NaN."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def agree(function: Function, *inputs: torch.Tensor, **how: Any) -> None:
    """Compiled code answers what eager code does, and has its gradient."""
    for grow in (False, True) if any(x.is_floating_point() for x in inputs) else (False,):
        expected = outcome(function, inputs, grow)
        found = outcome(compiled(function, **how), inputs, grow)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert equal(a, b)


# The operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grow", [False, True])
def test_opcheck(grow: bool) -> None:
    points = randn(3, 9, 4).requires_grad_(grow)
    values = randn(3, 9).requires_grad_(grow)
    matrix = distances(randn(3, 9, 2)).requires_grad_(grow)
    condensed = randn(15).abs().requires_grad_(grow)
    full = torch.tensor([9, 9, 9])  # opcheck takes NaN, the padding, for a difference
    rest = ("auto", None, True, None)
    for operator, arguments in (
        (operators.clouds_h0, (points, full, "euclidean", None, None, True, *rest)),
        (operators.clouds_h0, (points[0], None, "cosine", None, None, True, *rest)),
        (operators.clouds_h0, (points[:, :, :1], None, "minkowski", 3.0, 0.5, False, *rest)),
        (operators.lines_h0, (values, full, None, False, *rest)),
        (operators.lines_h0, (values[0], None, 0.5, True, "prim", "reference", False, 2)),
        (operators.lines_r_f, (values, full, None, None, True, None)),
        (operators.lines_r_f, (values[0], None, 0.5, None, True, 1)),
        (operators.distances_h0, (matrix, full, None, True, *rest)),
        (operators.distances_h0, (condensed, None, 0.5, True, *rest)),
    ):
        opcheck(operator, arguments)
    if not grow:
        result = obce.h0(points, edges=True)
        opcheck(operators.pull_back, (result.deaths, points, result.deaths, result.edges, "cosine", 0.0))
        opcheck(operators.clouds_h0, (points, None, "euclidean", None, None, False, *rest))
        opcheck(operators.distances_h0, (matrix, None, None, False, *rest))


def test_gradcheck_of_the_operators() -> None:
    line = randn(3, 8).double().requires_grad_()
    lengths = torch.tensor([8, 5, 1])
    rest = ("auto", None, True, None)
    for call in (
        lambda x: operators.lines_r_f(x, lengths, None, None, True, None),
        lambda x: operators.lines_h0(x, None, None, False, *rest)[0],
        lambda x: operators.lines_h0(x, None, None, True, *rest)[0],
    ):
        assert torch.autograd.gradcheck(call, line)
    points = randn(2, 6, 4).double().requires_grad_()
    for metric, p in METRICS:
        arguments = (None, metric, p, None, True, *rest)
        assert torch.autograd.gradcheck(lambda x, a=arguments: operators.clouds_h0(x, *a)[0], points)


def test_an_operator_says_that_its_gradient_needs_edges() -> None:
    for call in (
        lambda: operators.clouds_h0(
            randn(1, 3, 2).requires_grad_(), None, "euclidean", None, None, False, "auto", None, True, None
        ),
        lambda: operators.distances_h0(randn(3).abs().requires_grad_(), None, None, False, "auto", None, True, None),
    ):
        with pytest.raises(ValueError, match=r"edges is False and .* requires grad, expected True"):
            call()


def test_second_derivative_is_refused() -> None:
    x = randn(5, 2).requires_grad_()
    deaths, _ = operators.clouds_h0(x, None, "sqeuclidean", None, None, True, "auto", None, True, None)
    (grad,) = torch.autograd.grad(deaths.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="pull_back"):
        grad.sum().backward()


# The public functions, compiled ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "p"), METRICS)
def test_clouds(metric: str, p: float | None) -> None:
    dynamic = metric in ("cosine", "minkowski")

    def ragged(x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result: Any = obce.h0(x, metric=metric, p=p, lengths=lengths, edges=True)
        return result.deaths, result.edges, result.lengths

    agree(ragged, randn(4, 12, 5), torch.tensor([12, 1, 2, 7]), dynamic=dynamic)
    agree(lambda x: obce.h0(x, metric=metric, p=p).deaths, randn(12, 5), dynamic=dynamic)
    if metric != "correlation":  # one coordinate is its own mean
        agree(lambda x: obce.h0(x, metric=metric, p=p).deaths, randn(3, 12, 1), dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
def test_lines(dynamic: bool) -> None:
    values, lengths = randn(4, 30), torch.tensor([30, 1, 2, 17])
    agree(lambda x: obce.h0_line(x).deaths, values, dynamic=dynamic)
    agree(lambda x: obce.h0_line(x.T).deaths, values, dynamic=dynamic)
    agree(lambda x: obce.h0_line(x[0], edges=True, max_edge=0.3).deaths, values, dynamic=dynamic)
    agree(lambda x, n: obce.h0_line(x, lengths=n, edges=True).deaths, values, lengths, dynamic=dynamic)
    agree(lambda x: obce.h0_line(x, edges=True).edges, values.long(), dynamic=dynamic)
    agree(lambda x, n: obce.r_f(x, lengths=n, max_edge=1.0), values, lengths, dynamic=dynamic)
    agree(lambda x, n: obce.r_f(x, lengths=n), values, lengths.to(torch.uint8), dynamic=dynamic)
    agree(lambda x: obce.r_f(x.T), values, dynamic=dynamic)
    lone = values[:, :1].clone().requires_grad_()
    compiled(obce.r_f, dynamic)(lone).sum().backward()
    assert (lone.grad == 0).all()
    agree(obce.r_f, values.round(), dynamic=dynamic)  # ties, gaps of 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_distances(dynamic: bool) -> None:
    points, lengths = randn(3, 10, 2), torch.tensor([10, 1, 6])
    agree(lambda x: obce.h0_distances(distances(x)).deaths, points, dynamic=dynamic)
    agree(lambda x, n: obce.h0_distances(distances(x), lengths=n, edges=True).deaths, points, lengths, dynamic=dynamic)
    agree(lambda x: obce.h0_distances(distances(x)[0]).deaths, points, dynamic=dynamic)
    agree(lambda x: obce.h0_distances(x, edges=True).deaths, randn(15).abs(), dynamic=dynamic)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8])
def test_dtypes(dtype: torch.dtype) -> None:
    for data, call in (
        (randn(2, 9, 3), lambda x: obce.h0(x).deaths),
        (randn(2, 9), lambda x: obce.h0_line(x).deaths),
        (randn(2, 9), obce.r_f),
        (randn(10), lambda x: obce.h0_distances(x.abs() if x.is_floating_point() else x).deaths),
    ):
        agree(call, (10 * data).abs().to(dtype) if dtype == torch.uint8 else (10 * data).to(dtype).abs())
    half = dtype in (torch.float16, torch.bfloat16)
    found = compiled(lambda x: obce.h0(x).deaths)(randn(5, 2).to(dtype))
    assert found.dtype == (torch.float32 if half else torch.float64)


@pytest.mark.parametrize("dynamic", [False, True])
def test_summaries_are_traced(dynamic: bool) -> None:
    def summaries(x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = obce.h0(x, lengths=lengths, max_edge=2.5)
        total = result.total_persistence(1.5)
        return total + result.entropy() + result.r_f.nan_to_num(posinf=0), result.betti(0.5), result.entropy()

    agree(summaries, randn(4, 12, 3), torch.tensor([12, 1, 2, 7]), dynamic=dynamic)
    agree(summaries, randn(4, 1, 3), torch.tensor([1, 1, 1, 1]), dynamic=dynamic)


def test_inductor() -> None:
    """The default compiler, which needs one for C++ on this machine."""

    def loss(x: torch.Tensor) -> torch.Tensor:
        result = obce.h0(x, metric="cityblock")
        return result.deaths.square().sum() - 3 * result.r_f.sum() + obce.r_f(x[:, :, 0]).sum()

    x = randn(3, 12, 4)
    expected, found = outcome(loss, (x,), True), outcome(compiled(loss, backend="inductor"), (x,), True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    deaths = compiled(lambda x: obce.h0(x, edges=True).deaths, backend="inductor")(x)
    assert torch.equal(deaths, obce.h0(x).deaths)


def test_the_result_comes_out_of_compiled_code() -> None:
    x = randn(3, 12, 4)
    result: Any = compiled(lambda x: obce.h0(x, edges=True, algorithm="prim"))(x)
    expected: Any = obce.h0(x, edges=True)
    assert isinstance(result, obce.H0)
    assert torch.equal(result.deaths, expected.deaths) and torch.equal(result.edges, expected.edges)
    assert result.lengths.tolist() == [12, 12, 12] and result.labels(0.5).equal(expected.labels(0.5))
    assert (result.backend, result.algorithm) == ("auto", "prim")
    assert compiled(lambda x: obce.h0(x, backend="reference"))(x).backend == "reference"
    assert compiled(obce.h0)(x).edges is None


def test_lengths_of_every_kind() -> None:
    x = randn(3, 12, 2)
    expected = obce.h0(x, lengths=[3, 12, 1]).r_f
    for lengths in ([3, 12, 1], (3, 12, 1), np.array([3, 12, 1]), torch.tensor([3, 12, 1], dtype=torch.int32)):
        assert torch.equal(compiled(lambda x, n=lengths: obce.h0(x, lengths=n).r_f)(x), expected)
    assert compiled(lambda x: obce.h0(x, lengths=5).lengths)(x[:1]).tolist() == [5]


def test_one_program_serves_all_sizes() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = compiled(lambda x, n: (obce.h0(x, lengths=n, edges=True).r_f, obce.r_f(x[:, :, 0])), True, counter)
    for B, n, d in ((3, 9, 4), (5, 12, 2), (7, 30, 3)):
        x, lengths = randn(B, n, d), torch.arange(1, B + 1)
        found, largest = call(x, lengths)
        assert torch.equal(found, obce.h0(x, lengths=lengths).r_f) and torch.equal(largest, obce.r_f(x[:, :, 0]))
    assert counter.frame_count == 1


def test_scales_that_change() -> None:
    x = randn(3, 9, 4)
    call = compiled(lambda x, r: (obce.h0(x, max_edge=r).deaths, obce.h0(x).betti(r)), True)
    for r in (0.5, 1.25, 2.0):
        deaths, pieces = call(x, r)
        assert torch.equal(deaths, obce.h0(x, max_edge=r).deaths) and torch.equal(pieces, obce.h0(x).betti(r))


def test_export() -> None:
    class Largest(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = obce.h0(x).r_f
            return found

    for strict in (True, False):
        sizes = {"x": {0: torch.export.Dim("B", max=1000), 1: torch.export.Dim("n", min=3, max=1000)}}
        program = torch.export.export(Largest(), (randn(3, 9, 2),), dynamic_shapes=sizes, strict=strict).module()
        x = randn(5, 20, 2)
        assert torch.equal(program(x), obce.h0(x).r_f)


def test_a_topological_loss_trains_alike() -> None:
    def trained(step: Function) -> torch.Tensor:
        x = torch.nn.Parameter(randn(20, 2))
        optimizer = torch.optim.SGD([x], lr=0.05)
        for _ in range(20):
            optimizer.zero_grad()
            step(x).backward()
            optimizer.step()
        return x.detach()

    def loss(x: torch.Tensor) -> torch.Tensor:
        deaths: Any = obce.h0(x).deaths
        return (deaths[0, -1] - 5).square() + deaths[0, :-1].square().sum()

    assert torch.equal(trained(compiled(loss)), trained(loss))


# Refusals -------------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[Function, str]] = [
    (lambda x: obce.h0(x, metric="foo").deaths, "metric is 'foo', expected one of euclidean"),
    (lambda x: obce.h0(x, metric="minkowski").deaths, "p is None, expected a number >= 1"),
    (lambda x: obce.h0(x, max_edge=-1.0).deaths, "max_edge is -1.0, expected a length >= 0"),
    (lambda x: obce.h0(x, algorithm="sort").deaths, "algorithm is 'sort', which needs points with 1 coordinate"),
    (lambda x: obce.h0(x, threads=0).deaths, "threads is 0, expected at least 1"),
    (lambda x: obce.h0(x[0, 0]).deaths, r"points has shape \[3\], expected \[n, d\] or \[B, n, d\]"),
    (lambda x: obce.h0(x[:, :0]).deaths, "points has clouds of 0 points"),
    (lambda x: obce.h0(x[:, :, :0]).deaths, "points has points with 0 coordinates"),
    (lambda x: obce.h0(torch.complex(x, x)).deaths, "points has dtype torch.complex64, expected float16"),
    (lambda x: obce.h0(x, lengths=[1]).deaths, r"lengths has shape \[1\], expected \[2\], one number a cloud"),
    (lambda x: obce.h0(x, lengths=[1.0, 2.0]).deaths, "lengths has dtype float32, expected integers"),
    (lambda x: obce.h0_line(x).deaths, r"values has shape \[2, 5, 3\], expected \[n\]"),
    (obce.r_f, r"values has shape \[2, 5, 3\], expected \[n\]"),
    (lambda x: obce.h0_distances(x).deaths, r"matrix has shape \[2, 5, 3\], expected \[n, n\] or \[B, n, n\]"),
    (lambda x: obce.h0_distances(x[0, :4, 0]).deaths, "and 4 is no such number"),
    (lambda x: obce.h0_distances(x[0, 0], lengths=[2]).deaths, "lengths is given with one condensed"),
]


@pytest.mark.parametrize(("call", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_what_tracing_refuses(call: Function, sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):  # torch's own, around our sentence
        compiled(call)(randn(2, 5, 3))


def test_what_the_running_program_refuses() -> None:
    x = randn(2, 5, 3)
    x[1, 2, 0] = NAN
    with pytest.raises(ValueError, match="points: cloud 1, point 2 holds nan, expected finite numbers"):
        compiled(lambda x: obce.h0(x).deaths)(x)
    with pytest.raises(ValueError, match="values: cloud 1, point 2 holds nan"):
        compiled(lambda x: obce.r_f(x[:, :, 0]))(x)
    assert compiled(lambda x: obce.h0(x, check=False).deaths)(x).isnan().tolist() == [[False] * 4, [True] * 4]
    with pytest.raises(ValueError, match=r"lengths\[1\] is 7, expected 1 to 5"):
        compiled(lambda x: obce.h0(x, lengths=[5, 7]).deaths)(randn(2, 5, 3))
    with pytest.raises(ValueError, match=r"matrix 0 has .* at \[0, 0\], expected 0 on the diagonal"):
        compiled(lambda x: obce.h0_distances(x).deaths)(torch.ones(3, 3))
    with pytest.raises(ValueError, match="backend is 'none', expected one of"):
        compiled(lambda x: obce.h0(x, backend="none").deaths)(randn(2, 5, 3))


def test_progress_is_refused() -> None:
    with pytest.raises(ValueError, match="progress is given in compiled code, expected None"):
        torch.compile(lambda x: obce.h0(x, progress=print).deaths, backend="aot_eager")(randn(5, 2))


def test_torch_and_the_operators_load_when_they_are_needed() -> None:
    code = "import sys, obce; obce.h0([[0.0], [1.0]]); assert not {'torch', 'obce.operators'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import torch, obce, sys; obce.h0(torch.ones(2, 2)); assert 'obce.operators' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
