"""Every backend, algorithm, SIMD level and thread count gives the oracle's bits."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from obce import backends, reference
from obce.h0 import h0, h0_distances, h0_line, r_f

built = importlib.util.find_spec("obce._cpu") is not None
needs_cpu = pytest.mark.skipif(not built, reason="obce._cpu is not built on this machine")


def _levels() -> list[str]:
    if not built:
        return []
    from obce import _cpu

    return _cpu.simd_levels()


LEVELS = [
    pytest.param(
        level,
        marks=pytest.mark.skipif(level not in _levels(), reason=f"this processor or build has no {level}"),
    )
    for level in ("portable", "avx2", "avx512")
]

Maker = Callable[[np.random.Generator, int, int], np.ndarray]
CASES: dict[str, Maker] = {
    "gauss": lambda g, n, d: g.standard_normal((n, d)),
    "grid": lambda g, n, d: g.integers(0, 4, (n, d)).astype(float),
    "duplicates": lambda g, n, d: g.standard_normal((max(1, n // 3), d))[g.integers(0, max(1, n // 3), n)],
    "one point": lambda g, n, d: np.full((n, d), 1.5),
    "offset": lambda g, n, d: 1e6 + g.standard_normal((n, d)),
    "tiny": lambda g, n, d: 1e-25 * g.standard_normal((n, d)),
    "huge": lambda g, n, d: 1e25 * g.standard_normal((n, d)),
    "subnormal": lambda g, n, d: np.ldexp(g.integers(-9, 9, (n, d)).astype(float), -147),
    "spread": lambda g, n, d: np.exp(12 * g.standard_normal((n, d))),
    "collinear": lambda g, n, d: g.integers(-40, 40, (n, 1)) * np.arange(1.0, d + 1),
    "rank 2": lambda g, n, d: g.standard_normal((n, 2)) @ g.standard_normal((2, d)),
    "clusters": lambda g, n, d: (
        50 * g.integers(0, 2, (n, d)) + np.exp(3 * g.standard_normal((n, 1))) * g.standard_normal((n, d))
    ),
    "squares underflow": lambda g, n, d: np.where(np.arange(n)[:, None] == n // 2, 1.0, 1e-26 * g.random((n, d))),
    "signed zeros": lambda g, n, d: np.where(g.random((n, d)) < 0.5, -0.0, 0.0),
}
# n around the widths of vectors and blocks, d around the specialised ones.
SHAPES = [
    (1, 1),
    (2, 3),
    (3, 2),
    (7, 1),
    (8, 5),
    (31, 1),
    (33, 2),
    (64, 3),
    (65, 4),
    (129, 1),
    (130, 9),
    (200, 17),
]


def same(a: np.ndarray, b: np.ndarray) -> None:
    """Bitwise equal; NaN equals NaN. Reports the first difference."""
    assert a.shape == b.shape and a.dtype == b.dtype
    differs = ~((a == b) | ((a != a) & (b != b)))
    assert not differs.any(), f"first difference at {np.argwhere(differs)[0]}: {a[differs][0]} against {b[differs][0]}"
    if a.dtype.kind == "f":
        assert not np.signbit(a[a == 0]).any(), "a death is -0"


@needs_cpu
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_cpu_equals_the_oracle(monkeypatch: pytest.MonkeyPatch, level: str, dtype: type, case: str) -> None:
    monkeypatch.setenv("OBCE_SIMD", level)
    g = np.random.default_rng(7)
    for n, d in SHAPES:
        batch = np.stack([CASES[case](g, n, d).astype(dtype) for _ in range(2)])
        oracle = h0(batch, edges=True, backend="reference")
        assert oracle.algorithm == "kruskal"
        for algorithm in ("auto", "prim", "boruvka", "kdtree"):
            for threads in (1, 3):
                result = h0(batch, edges=True, backend="cpu", algorithm=algorithm, threads=threads)
                same(result.deaths, oracle.deaths)
                same(result.edges, oracle.edges)
            same(h0(batch, backend="cpu", algorithm=algorithm).deaths, oracle.deaths)
        if d == 1:
            same(r_f(batch[:, :, 0], backend="cpu"), oracle.r_f)
            same(h0_line(batch[:, :, 0], backend="cpu", algorithm="sort").deaths, oracle.deaths)
            same(h0_line(batch[:, :, 0], backend="reference", algorithm="sort").deaths, oracle.deaths)
            same(r_f(batch[:, :, 0], backend="reference"), oracle.r_f)


@needs_cpu
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_cpu_matrices_equal_the_oracle(monkeypatch: pytest.MonkeyPatch, level: str, dtype: type) -> None:
    monkeypatch.setenv("OBCE_SIMD", level)
    g = np.random.default_rng(5)
    for n in (1, 2, 3, 17, 63, 64, 65, 120):
        for holes in (0.0, 0.5, 0.97, 1.0):
            upper = np.triu(g.integers(0, 6, (3, n, n)), 1).astype(dtype)
            upper[np.triu(g.random((3, n, n)) < holes, 1)] = np.inf
            matrices = upper + upper.transpose(0, 2, 1)
            oracle = h0_distances(matrices, edges=True, backend="reference")
            assert holes < 1 or n == 1 or np.isinf(oracle.deaths).all()
            for threads in (1, 2):
                result = h0_distances(matrices, edges=True, backend="cpu", threads=threads)
                same(result.deaths, oracle.deaths)
                same(result.edges, oracle.edges)
            lengths = g.integers(1, n + 1, 3)
            oracle = h0_distances(matrices, edges=True, backend="reference", lengths=lengths)
            result = h0_distances(matrices, edges=True, backend="cpu", lengths=lengths)
            same(result.deaths, oracle.deaths)
            same(result.edges, oracle.edges)


@needs_cpu
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_rival_gaps_of_nearly_one_size(monkeypatch: pytest.MonkeyPatch, level: str, dtype: type) -> None:
    """1 to 12 gaps that differ by less than a bucket, inside and across groups of 64 buckets, decided exactly."""
    monkeypatch.setenv("OBCE_SIMD", level)
    g = np.random.default_rng(13)
    for n in (63, 64, 65, 96, 200, 1000, 3001):
        rows = []
        for rivals in range(1, 13):
            for size in (0.5, 4, 8, 9, 10, 11, 12, 20, 63, 64, 65, 130):
                step = 1 + 0.2 * g.random(n - 1)
                at = g.choice(n - 1, rivals, replace=False)
                step[at] = size * (1 + 0.05 * g.random(rivals)) + 1
                rows.append(g.permutation(np.cumsum(np.concatenate([[g.normal()], step]))))
        batch = np.array(rows).astype(dtype)
        expected = np.diff(np.sort(batch, axis=1), axis=1).max(axis=1)
        same(r_f(batch, backend="cpu"), expected)
        same(r_f(-batch, backend="cpu"), expected)


@needs_cpu
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_largest_gap_of_long_lines(dtype: type) -> None:
    """Around the lengths where bucket numbers need more than float32, and where marks are given up."""
    g = np.random.default_rng(17)
    for n in (2**15 - 1, 2**15 + 1, 2**18, 2**18 + 1):
        batch = np.stack([g.normal(size=n), g.random(n), g.standard_cauchy(n), np.round(g.normal(size=n), 3)])
        batch = batch.astype(dtype)
        same(r_f(batch, backend="cpu"), np.diff(np.sort(batch, axis=1), axis=1).max(axis=1))


@needs_cpu
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_largest_gap_equals_a_sort(monkeypatch: pytest.MonkeyPatch, level: str, dtype: type) -> None:
    monkeypatch.setenv("OBCE_SIMD", level)
    g = np.random.default_rng(11)
    top = np.finfo(dtype).max
    rows = 200
    for n in (2, 3, 5, 9, 31, 32, 33, 127, 128, 500, 1024, 1100):
        kinds = [
            g.standard_normal((rows, n)),
            np.exp(6 * g.standard_normal((rows, n))),
            g.integers(0, 17, (rows, n)),
            np.linspace(-5, 5, n)[None] + np.zeros((rows, 1)),  # equal gaps: the tightest case of the proof
            # nearly equal gaps with one largest: lost if a bucket were wider than the mean gap
            np.linspace(-5, 5, n)[None] + 0.1 / n * g.uniform(-1, 1, (rows, n)),
            np.where(np.arange(n) % 2, 1e-4, 1.0) * g.standard_normal((rows, n)) + 100 * (np.arange(n) % 2),
            np.finfo(dtype).smallest_subnormal * g.integers(0, 50, (rows, n)),  # the scale overflows
            top * g.uniform(-1, 1, (rows, n)),  # the range overflows
        ]
        for kind in kinds:
            values = kind.astype(dtype)
            with np.errstate(over="ignore"):
                gaps = np.diff(np.sort(values + 0, axis=1), axis=1)
            same(r_f(values, backend="cpu"), gaps.max(1))
            same(h0_line(values, backend="cpu").deaths, np.sort(gaps, axis=1))


@needs_cpu
def test_largest_gap_of_rows_beyond_the_float_limit() -> None:
    g = np.random.default_rng(2)
    for n in (32768, 32769, 120000):  # above 2^15 the buckets of float32 rows are computed in float64
        values = np.stack([np.linspace(0, 1, n), g.standard_normal(n)]).astype(np.float32)
        same(r_f(values, backend="cpu"), np.diff(np.sort(values), axis=1).max(1))


@needs_cpu
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_lines_side_by_side_equal_sorted_lines(monkeypatch: pytest.MonkeyPatch, level: str, dtype: type) -> None:
    monkeypatch.setenv("OBCE_SIMD", level)
    g = np.random.default_rng(23)
    largest = np.finfo(dtype).max
    sizes = [2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 200, 383, 384, 511, 513, 1000, 1025, 4100]
    for n in [*sizes, 65536, 65537]:
        rows = 19 if n < 2000 else 17  # no whole number of vectors
        values = g.standard_normal((rows, n)).astype(dtype)
        values[1] = np.round(values[1])
        values[2] = 0.0
        values[2, ::2] = -0.0
        values[3] = np.sort(values[3])[::-1]
        values[4, 0], values[4, -1] = largest, -largest
        values[5, n // 2] = np.nan
        values[6, -1] = np.inf
        with np.errstate(over="ignore", invalid="ignore"):
            gaps = np.sort(np.diff(np.sort(values + 0, axis=1), axis=1), axis=1)
        gaps[5:7] = np.nan
        for threads in (1, 3):
            for given in (values, np.asfortranarray(values), values[:7]):
                same(h0_line(given, check=False, threads=threads, backend="cpu").deaths, gaps[: len(given)])
                same(r_f(given, check=False, threads=threads, backend="cpu"), gaps[: len(given), -1])


def _heaps(g: np.random.Generator, n: int, d: int, heaps: int, spread: float) -> np.ndarray:
    return g.standard_normal((heaps, d))[g.integers(0, heaps, n)] + spread * g.standard_normal((n, d))


# Clouds that the lists of nearest neighbours do not connect, so that passes for whole components follow.
LISTLESS: dict[str, Maker] = {
    "heaps": lambda g, n, d: _heaps(g, n, d, 12, 0.1),
    "heaps in float's slack": lambda g, n, d: _heaps(g, n, d, 3, 1e-5),  # tiles packed around their own centres
    "heaps that touch": lambda g, n, d: _heaps(g, n, d, 40, 0.4),
    "one large heap": lambda g, n, d: (
        _heaps(g, n, d, 1, 1.0) + 9 * (g.random((n, 1)) < 0.05) * g.integers(0, 3, (n, 1))
    ),
    "small heaps": lambda g, n, d: np.repeat(g.standard_normal((n // 10 + 1, d)), 10, 0)[:n] + _heaps(g, n, d, 1, 1e-3),
    "equal pairs at weight 0": lambda g, n, d: np.where(
        np.arange(n)[:, None] == 0, 1.0, 1e-200 * g.integers(0, 2, (n, d)).astype(float)
    ),
}


@needs_cpu
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", [*CASES, *LISTLESS])
def test_boruvka_is_prim_on_larger_clouds(monkeypatch: pytest.MonkeyPatch, level: str, dtype: type, case: str) -> None:
    monkeypatch.setenv("OBCE_SIMD", level)
    g = np.random.default_rng(13)
    # One tile and one point more, tiles of 64 (many coordinates) and 256, a last panel of one point.
    shapes = [(257, 3), (600, 24), (193, 600)]
    if level != "portable":  # whose fma is a library call on this build
        shapes += [(2065, 16), (1024, 2), (1500, 50)]
    for n, d in shapes:
        cloud = {**CASES, **LISTLESS}[case](g, n, d).astype(dtype)
        prim = h0(cloud, edges=True, backend="cpu", algorithm="prim")
        for threads in (1, 3):
            result = h0(cloud, edges=True, backend="cpu", algorithm="boruvka", threads=threads)
            assert result.algorithm == "boruvka"
            same(result.deaths, prim.deaths)
            same(result.edges, prim.edges)


@needs_cpu
def test_boruvka_without_a_bound() -> None:
    # So many coordinates that no bound on the rounding of a product is kept: every pair is weighed.
    cloud = np.random.default_rng(5).standard_normal((12, (1 << 20) + 8)).astype(np.float32)
    prim = h0(cloud, edges=True, backend="cpu", algorithm="prim")
    result = h0(cloud, edges=True, backend="cpu", algorithm="boruvka")
    same(result.deaths, prim.deaths)
    same(result.edges, prim.edges)


@needs_cpu
def test_boruvka_of_a_million_points_that_repeat() -> None:
    g = np.random.default_rng(6)
    few = g.standard_normal((30, 4)).astype(np.float32)
    which = g.integers(0, 30, 1_000_000)
    result = h0(few[which], edges=True, backend="cpu", algorithm="boruvka")
    first = np.array([np.flatnonzero(which == k)[0] for k in range(30)])
    order = np.argsort(first)
    tree = h0(few[order], edges=True, backend="reference")
    assert (result.deaths[0, : len(which) - 30] == 0).all()
    same(result.deaths[0, len(which) - 30 :], tree.deaths[0])
    same(result.edges[0, len(which) - 30 :], first[order][tree.edges[0]])


@needs_cpu
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_kdtree_is_prim_on_larger_clouds(monkeypatch: pytest.MonkeyPatch, level: str, dtype: type, case: str) -> None:
    monkeypatch.setenv("OBCE_SIMD", level)
    g = np.random.default_rng(13)
    # A last leaf of one point and a full one, and every d the search is compiled for.
    shapes = [(1, 2), (2, 16), (3, 1), (1009, 1), (1024, 3), (1025, 4), (300, 16)]
    if level != "portable":  # whose fma is a library call on this build
        shapes += [(5000, 2), (4097, 3), (1500, 6), (1500, 11)]
    for n, d in shapes:
        cloud = CASES[case](g, n, d).astype(dtype)
        prim = h0(cloud, edges=True, backend="cpu", algorithm="prim")
        for threads in (1, 3):
            result = h0(cloud, edges=True, backend="cpu", algorithm="kdtree", threads=threads)
            assert result.algorithm == "kdtree"
            same(result.deaths, prim.deaths)
            same(result.edges, prim.edges)
        same(h0(cloud, backend="cpu", algorithm="kdtree").deaths, prim.deaths)


@needs_cpu
@pytest.mark.parametrize("heaps", [1, 2, 5])
def test_kdtree_of_heaps_of_equal_points(heaps: int) -> None:
    # Prim would need minutes for so many points, but the tree is known: every point hangs on the first of its heap,
    # and the heaps, on a line one apart, on their neighbours.
    n = 100_000
    g = np.random.default_rng(17)
    heap = g.integers(0, heaps, n)
    first = np.array([np.flatnonzero(heap == h)[0] for h in range(heaps)])
    others = np.setdiff1d(np.arange(n), first)
    hanging = np.stack([first[heap[others]], others], 1)
    hanging = hanging[np.lexsort((hanging[:, 1], hanging[:, 0]))]
    bridges = np.sort(np.stack([first[1:], first[:-1]], 1), 1)
    bridges = bridges[np.lexsort((bridges[:, 1], bridges[:, 0]))]
    cloud = np.zeros((n, 3), np.float32)
    cloud[:, 1] = heap
    for threads in (1, 3):
        result = h0(cloud, edges=True, algorithm="kdtree", threads=threads)
        same(result.edges[0], np.concatenate([hanging, bridges]))
        assert result.deaths[0].tolist() == [0.0] * len(hanging) + [1.0] * len(bridges)


@needs_cpu
def test_automatic_choice_follows_the_cost_model(monkeypatch: pytest.MonkeyPatch) -> None:
    points = backends.CpuBackend.TREE_POINTS
    g = np.random.default_rng(19)
    for d in (2, 5):
        for n, expected in ((points[d][0] - 1, "prim"), (points[d][0], "kdtree")):
            assert h0(g.random((n, d), np.float32), backend="cpu").algorithm == expected
    for dtype, n, expected in (
        (np.float32, 3500, "prim"),
        (np.float32, 3600, "boruvka"),
        (np.float64, 860, "prim"),
        (np.float64, 870, "boruvka"),
    ):
        assert h0(g.random((n, 128), dtype), backend="cpu").algorithm == expected
    monkeypatch.setattr(backends.CpuBackend, "LIST_FACTOR", (100, 100))
    monkeypatch.setattr(backends.CpuBackend, "LIST_LEAST", (100, 400))
    assert h0(g.random((300, 8), np.float32), backend="cpu").algorithm == "boruvka"
    assert h0(g.random((300, 8)), backend="cpu").algorithm == "prim"
    assert h0(g.random((300, 7), np.float32), backend="cpu").algorithm == "prim"
    assert h0(g.random((points[2][0], 2), np.float32), backend="cpu").algorithm == "kdtree"
    assert h0(g.random((300, 1)), edges=True, backend="cpu", algorithm="boruvka").algorithm == "kdtree"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_unchecked_clouds_that_are_not_finite_answer_nan(backend: str) -> None:
    if backends.BACKENDS[backend].why_not():
        pytest.skip("obce._cpu is not built on this machine")
    points = np.random.default_rng(0).standard_normal((5, 6, 2))
    points[1, 3, 1] = np.nan
    points[3, 5, 0] = -np.inf
    lengths = [6, 6, 1, 6, 4]
    for d in (1, 2):
        for algorithm in ("auto", "prim", *(["kdtree"] if backend == "cpu" else [])):
            some = points[:, :, 2 - d :] if d == 1 else points
            result = h0(some, edges=True, check=False, backend=backend, lengths=lengths, algorithm=algorithm)
            broken = [not np.isfinite(some[i, : lengths[i]]).all() for i in range(5)]
            for i in range(5):
                assert np.isnan(result.deaths[i]).all() == (broken[i] or lengths[i] == 1)
                assert (result.edges[i] == -1).all() == (broken[i] or lengths[i] == 1)
    line = np.array([[0.0, np.nan, 1.0], [0.0, np.inf, 1.0], [0.0, 1.0, 3.0], [-np.inf, np.inf, np.nan]])
    same(r_f(line, check=False, backend=backend), np.array([np.nan, np.nan, 2.0, np.nan]))
    assert np.isnan(h0_line(line, check=False, backend=backend).deaths).all(1).tolist() == [
        True,
        True,
        False,
        True,
    ]
    broken_matrix = np.array([[0.0, np.nan, 1.0], [np.nan, 0.0, np.nan], [1.0, np.nan, 0.0]])
    result = h0_distances(broken_matrix, check=False, edges=True, backend=backend)
    same(result.deaths, np.array([[1.0, np.inf]]))
    same(result.edges, np.array([[[0, 2], [-1, -1]]]))


def test_torch_sort_path_equals_numpys() -> None:
    import torch

    g = np.random.default_rng(4)
    values = g.integers(0, 30, (20, 40)).astype(np.float32) / 7
    values[3, 5] = np.nan
    values[4, 5] = np.inf
    lengths = g.integers(1, 41, 20)
    lengths[3:5] = 40
    for given_lengths in (None, lengths):
        on_torch = None if given_lengths is None else torch.as_tensor(given_lengths)
        tensor = torch.as_tensor(values)
        same(
            reference.torch_lines_deaths(tensor, on_torch).numpy(),
            reference.lines_deaths(values, given_lengths),
        )
        same(reference.torch_lines_r_f(tensor, on_torch).numpy(), reference.lines_r_f(values, given_lengths))


def test_named_backend_runs_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [0.0, 1.0, 3.0]
    assert h0_line(values, backend="reference").backend == "reference"
    with pytest.raises(ValueError, match="backend is 'gpu', expected one of cuda, triton, cpu, reference"):
        h0_line(values, backend="gpu")
    monkeypatch.setenv("OBCE_BACKEND", "reference")
    assert h0_line(values).backend == "reference"
    monkeypatch.setenv("OBCE_BACKEND", "gpu")
    with pytest.raises(ValueError, match="the environment variable OBCE_BACKEND is 'gpu'"):
        h0_line(values)
    monkeypatch.delenv("OBCE_BACKEND")
    monkeypatch.setattr(backends.CpuBackend, "why_not", lambda self: "it is missing")
    with pytest.raises(RuntimeError, match="backend names 'cpu', which cannot run here: it is missing"):
        h0_line(values, backend="cpu")


@pytest.mark.parametrize("algorithm", ["boruvka", "kdtree"])
def test_named_backend_that_lacks_the_algorithm_raises(algorithm: str) -> None:
    with pytest.raises(ValueError, match="backend names 'reference', which cannot do this"):
        h0([[0.0, 1.0]], backend="reference", algorithm=algorithm)


def test_automatic_choice_is_logged_once_with_the_refusals(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("OBCE_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_told", set())
    monkeypatch.setattr(backends.CpuBackend, "why_not", lambda self: "it is missing")
    with caplog.at_level(logging.INFO, "obce"):
        for _ in range(3):
            assert h0([[0.0, 1.0], [2.0, 3.0]]).backend == "reference"
    assert [r.getMessage() for r in caplog.records] == [
        "cloud data on cpu: backend reference (cpu refused: it is missing)"
    ]
    assert caplog.records[0].levelno == logging.WARNING


def test_table_names_every_backend_with_a_reason() -> None:
    rows = backends.backend_table()
    assert [row.name for row in rows] == list(backends.BACKENDS)
    for row in rows:
        assert row.reason
        assert row.usable == (backends.BACKENDS[row.name].why_not() is None)
    assert rows[-1].name == "reference" and rows[-1].usable


def test_threads_default_follows_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert backends.default_threads() == 3
    for unusable in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", unusable)
        assert backends.default_threads() >= 1


def test_numpy_path_needs_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from obce.h0 import h0, r_f\n"
        "assert r_f([[0., 1., 3.]]).tolist() == [2.0]\n"
        "assert h0([[0., 0.], [3., 4.]], edges=True).linkage(0).tolist() == [[0, 1, 5, 2]]\n"
    )
    path = [p for p in sys.path if p]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


MEMORY = """
import sys
import numpy as np
from obce.h0 import h0

def high_water():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) << 10

g = np.random.default_rng(0)
n, d, algorithm = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
cloud = g.standard_normal((50 if algorithm == "boruvka" else n, d), np.float32)
if algorithm == "boruvka":
    cloud = cloud[g.integers(0, 50, n)]
h0(cloud[:300], algorithm=algorithm)
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
before = high_water()
h0(cloud, algorithm=algorithm, check=False, threads=1)
print(high_water() - before, cloud.nbytes + 64 * n + 64_000_000)
"""


@needs_cpu
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux counts it")
@pytest.mark.skipif(
    "tsan" in os.environ.get("LD_PRELOAD", ""), reason="TSan keeps notes of every byte, several times as many"
)
@pytest.mark.parametrize(
    ("n", "d", "algorithm"), [(1_500_000, 2, "kdtree"), (1_500_000, 4, "boruvka"), (9000, 200, "prim")]
)
def test_memory_is_a_copy_of_the_input_and_little_more(n: int, d: int, algorithm: str) -> None:
    # Repeated points keep Boruvka short; they do not spare it its arrays.
    done = subprocess.run(
        [sys.executable, "-P", "-c", MEMORY, str(n), str(d), algorithm], capture_output=True, text=True, check=True
    )
    used, allowed = map(int, done.stdout.split())
    assert used < allowed
