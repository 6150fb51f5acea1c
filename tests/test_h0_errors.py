"""Bad input is refused before any kernel starts, in one sentence that names what was found."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from obce.h0 import h0, h0_distances, h0_line, r_f

NAN, INF = math.nan, math.inf
built = importlib.util.find_spec("obce._cpu") is not None
needs_cpu = pytest.mark.skipif(not built, reason="obce._cpu is not built on this machine")


@pytest.mark.parametrize(
    ("points", "error", "sentence"),
    [
        (np.zeros(4), ValueError, r"points has shape \[4\].*coordinate axis d is missing.*obce.h0_line"),
        (
            np.zeros((1, 2, 3, 4)),
            ValueError,
            r"points has shape \[1, 2, 3, 4\], expected \[n, d\] \(one cloud\)",
        ),
        (3.0, ValueError, r"points has shape \[\], expected"),
        (np.zeros((0, 3)), ValueError, "points has clouds of 0 points, expected at least 1"),
        (np.zeros((2, 0, 3)), ValueError, "points has clouds of 0 points"),
        (np.zeros((5, 0)), ValueError, "points with 0 coordinates"),
        (np.array([["a", "b"]]), TypeError, "points has dtype <U1, expected float16"),
        (np.array([[1j, 2]]), TypeError, "points has dtype complex128"),
        (np.array([[None, 1]]), TypeError, "points has dtype object"),
        (np.zeros((2, 2), "M8[s]"), TypeError, "points has dtype datetime64"),
        ([[1.0, 2.0], [3.0]], ValueError, "points is a ragged sequence.*pass their sizes as lengths"),
        (None, TypeError, "points has dtype object"),
        ([[0.0, 1.0], [NAN, 0.0]], ValueError, "points: cloud 0, point 1 holds nan"),
        (
            np.where(np.arange(24).reshape(2, 4, 3) == 20, INF, 0),
            ValueError,
            "points: cloud 1, point 2 holds inf",
        ),
        (np.full((3, 2), -INF, np.float32), ValueError, "points: cloud 0, point 0 holds -inf"),
    ],
)
def test_points(points: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        h0(points)


@pytest.mark.parametrize("call", [h0_line, r_f])
@pytest.mark.parametrize(
    ("values", "error", "sentence"),
    [
        (np.zeros((2, 3, 1)), ValueError, r"values has shape \[2, 3, 1\], expected \[n\].*obce.h0"),
        (np.zeros((3, 0)), ValueError, "values has clouds of 0 points"),
        ([], ValueError, "values has clouds of 0 points"),
        ([[0.0, 1.0], [NAN, 0.0]], ValueError, "values: cloud 1, point 0 holds nan"),
        (["x"], TypeError, "values has dtype <U1"),
    ],
)
def test_values(call: Any, values: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call(values)


@pytest.mark.parametrize(
    ("matrix", "error", "sentence"),
    [
        (np.zeros((2, 3)), ValueError, r"matrix has shape \[2, 3\], expected \[n, n\]"),
        (np.zeros(4), ValueError, r"matrix has shape \[4\]"),
        (np.zeros((0, 0)), ValueError, "matrix has clouds of 0 points"),
        (
            [[0.0, 1.0], [2.0, 0.0]],
            ValueError,
            r"matrix 0 is not symmetric: 1.0 at \[0, 1\] but 2.0 at \[1, 0\]",
        ),
        ([[0.0, INF], [2.0, 0.0]], ValueError, "matrix 0 is not symmetric: inf"),
        ([[0.0, -1.0], [-1.0, 0.0]], ValueError, r"matrix 0 has -1.0 at \[0, 1\], expected distances >= 0"),
        ([[0.0, NAN], [NAN, 0.0]], ValueError, r"matrix 0 has nan at \[0, 1\], expected a distance or inf"),
        ([[0.0, 1.0], [1.0, 0.5]], ValueError, r"matrix 0 has 0.5 at \[1, 1\], expected 0 on the diagonal"),
        ([[NAN, 1.0], [1.0, 0.0]], ValueError, r"matrix 0 has nan at \[0, 0\], expected 0 on the diagonal"),
        ([[[0.0, 1], [1, 0]], [[0.0, 1], [3, 0]]], ValueError, "matrix 1 is not symmetric"),
    ],
)
def test_matrix(matrix: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        h0_distances(matrix)


@pytest.mark.parametrize(
    ("lengths", "error", "sentence"),
    [
        ([3], ValueError, r"lengths has shape \[1\], expected \[2\]"),
        ([[3, 3]], ValueError, r"lengths has shape \[1, 2\], expected \[2\]"),
        ([3, 0], ValueError, r"lengths\[1\] is 0, expected 1 to 4"),
        ([5, 3], ValueError, r"lengths\[0\] is 5, expected 1 to 4"),
        ([-1, 3], ValueError, r"lengths\[0\] is -1"),
        ([1.5, 2.0], TypeError, "lengths has dtype float64, expected integers"),
        (["a", "b"], TypeError, "lengths has dtype <U1"),
    ],
)
def test_lengths(lengths: Any, error: type[Exception], sentence: str) -> None:
    for call, data in (
        (h0, np.zeros((2, 4, 3))),
        (h0_line, np.zeros((2, 4))),
        (h0_distances, np.zeros((2, 4, 4))),
    ):
        with pytest.raises(error, match=sentence):
            call(data, lengths=lengths)


@pytest.mark.parametrize(
    ("keywords", "error", "sentence"),
    [
        (
            {"metric": "hamming"},
            ValueError,
            "metric is 'hamming', expected one of euclidean, sqeuclidean, cosine, correlation, manhattan, chebyshev, "
            "minkowski.*obce.h0_distances",
        ),
        ({"metric": "precomputed"}, ValueError, "metric is 'precomputed'.*pass a matrix to obce.h0_distances"),
        ({"metric": "minkowski"}, ValueError, "p is None, expected a number >= 1"),
        ({"metric": "minkowski", "p": 0.5}, ValueError, "p is 0.5, expected a number >= 1"),
        ({"metric": "minkowski", "p": NAN}, ValueError, "p is nan, expected a number >= 1"),
        ({"metric": "minkowski", "p": "3"}, TypeError, "p is '3', expected a number >= 1"),
        ({"metric": "minkowski", "p": True}, TypeError, "p is True, expected a number >= 1"),
        ({"p": 2}, ValueError, "p is 2 with metric 'euclidean', expected None"),
        ({"metric": "cosine"}, ValueError, "points: cloud 0, point 0 is zero.*metric 'cosine' needs one"),
        ({"metric": "correlation"}, ValueError, "points: cloud 0, point 0 is constant"),
        (
            {"algorithm": "dijkstra"},
            ValueError,
            "algorithm is 'dijkstra', expected one of auto, sort, prim, boruvka",
        ),
        ({"algorithm": "kruskal"}, ValueError, "algorithm is 'kruskal', which needs a sparse matrix"),
        ({"algorithm": "boruvka", "metric": "manhattan"}, ValueError, "manhattan by prim only"),
        ({"algorithm": "sort"}, ValueError, "algorithm is 'sort', which needs points with 1 coordinate"),
        ({"backend": "tpu"}, ValueError, "backend is 'tpu', expected one of"),
        ({"max_edge": -1.0}, ValueError, "max_edge is -1.0, expected a length >= 0"),
        ({"max_edge": NAN}, ValueError, "max_edge is nan"),
        ({"max_edge": "1"}, TypeError, "max_edge is '1', expected a length >= 0 or None"),
        ({"threads": 0}, ValueError, "threads is 0, expected at least 1"),
        ({"threads": 1.5}, TypeError, "threads is 1.5, expected a whole number"),
        ({"threads": True}, TypeError, "threads is True"),
    ],
)
def test_keywords(keywords: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        h0(np.zeros((3, 2)), **keywords)


def test_sort_finds_no_edges() -> None:
    with pytest.raises(ValueError, match="algorithm is 'sort', which finds lengths but not the edges"):
        h0_line([0.0, 1.0], algorithm="sort", edges=True)


@pytest.mark.parametrize("algorithm", ["boruvka", "kdtree"])
def test_algorithm_needs_points(algorithm: str) -> None:
    with pytest.raises(ValueError, match=f"algorithm is '{algorithm}', which needs points"):
        h0_distances(np.zeros((2, 2)), algorithm=algorithm)


def test_padding_is_not_looked_at() -> None:
    points = np.array([[[0.0], [1.0], [NAN]], [[0.0], [1.0], [3.0]]])
    assert h0(points, lengths=[2, 3]).r_f.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="cloud 0, point 2 holds nan"):
        h0(points, lengths=[3, 3])
    matrix = np.array([[0.0, 1.0, -7.0], [1.0, 0.0, NAN], [5.0, 1.0, 4.0]])
    assert h0_distances(matrix, lengths=[2]).r_f.tolist() == [1.0]


def test_finite_values_whose_sum_overflows_are_accepted() -> None:
    big = np.array([3e38, 2e38, 3e38, 1e38], np.float32)
    assert r_f(big).tolist() == [np.float32(3e38) - np.float32(2e38)]
    assert np.isfinite(h0(np.stack([big, big], 1)).deaths[0, :2]).all()


def test_results_refuse_what_they_cannot_give() -> None:
    result = h0_line([0.0, 1.0])
    with pytest.raises(ValueError, match="call again with edges=True"):
        result.linkage(0)
    with pytest.raises(IndexError, match="i is 1, expected a cloud from 0 to 0"):
        h0_line([0.0, 1.0], edges=True).linkage(1)
    with pytest.raises(ValueError, match="p is 0, expected a positive number"):
        result.total_persistence(0)
    with pytest.raises(ValueError, match="r is NaN"):
        result.betti(NAN)


def test_torch_tensors_are_refused_alike() -> None:
    import torch

    with pytest.raises(TypeError, match=r"points has dtype torch\.complex64"):
        h0(torch.zeros(2, 2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"values has dtype torch\.complex64"):
        r_f(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"points is a torch\.sparse_coo tensor, expected a dense one"):
        h0(torch.zeros(2, 2).to_sparse())
    with pytest.raises(ValueError, match="values: cloud 0, point 1 holds inf"):
        r_f(torch.tensor([0.0, INF], dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"points has shape \[3\]"):
        h0(torch.zeros(3))


@pytest.mark.parametrize("wish", ["sse9", "AVX2"])
def test_unknown_simd_level(monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    pytest.importorskip("obce._cpu", reason="obce._cpu is not built on this machine")
    monkeypatch.setenv("OBCE_SIMD", wish)
    with pytest.raises(ValueError, match=f"OBCE_SIMD is '{wish}', expected portable, avx2 or avx512"):
        r_f([0.0, 1.0], backend="cpu")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [np.nan, INF, -INF])
def test_r_f_names_what_is_not_finite(bad: float, backend: str) -> None:
    """Found from the answer, not by a scan: every place, one lone value and padding included."""
    for n in (1, 2, 3, 64, 200):
        for point in {0, n // 2, n - 1}:
            values = np.arange(3 * n, dtype=np.float32).reshape(3, n)
            values[1, point] = bad
            with pytest.raises(ValueError, match=f"values: cloud 1, point {point} holds {bad}"):
                r_f(values, backend=backend)
            if point:
                assert np.isfinite(r_f(values, backend=backend, lengths=[n, point, n])).all()


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_cpu), "reference"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_one_wrong_entry_anywhere_in_a_matrix_is_named(backend: str, dtype: type) -> None:
    g = np.random.default_rng(3)
    for n in (2, 3, 5, 64, 65, 130):
        half = np.triu(g.random((4, n, n)), 1).astype(dtype)
        good = half + half.transpose(0, 2, 1)
        h0_distances(good, backend=backend)
        for _ in range(12):
            m = good.copy()
            b = int(g.integers(0, 4))
            i, j = (int(k) for k in g.choice(n, 2, replace=False))
            wrong, what = [(5.0, "is not symmetric"), (-1.0, "distances >= 0"), (np.nan, "a distance or inf")][
                int(g.integers(0, 3))
            ]
            m[b, i, j] = wrong
            if wrong != 5.0:
                m[b, j, i] = wrong
            with pytest.raises(ValueError, match=f"matrix {b} .*{what}") as error:
                h0_distances(m, backend=backend, threads=3)
            assert f"[{min(i, j)}, {max(i, j)}]" in str(error.value)
            h0_distances(m, backend=backend, lengths=[min(i, j) + 1 if q == b else n for q in range(4)])
            m = good.copy()
            m[b, i, i] = 0.5
            with pytest.raises(ValueError, match=rf"matrix {b} has 0.5 at \[{i}, {i}\]"):
                h0_distances(m, backend=backend)


@pytest.mark.parametrize("column", [-1, 2, 2**31 - 1])
@pytest.mark.parametrize("check", [True, False])
def test_sparse_matrices_with_broken_indices(column: int, check: bool) -> None:
    """scipy's constructors let them pass, and its conversions would follow them out of their arrays."""
    parts = (np.ones(2), np.array([1, column]), np.array([0, 1, 2]))
    coo = sp.coo_array((np.ones(2), ([0, 1], [1, 0])), shape=(2, 2))
    coo.coords = (coo.coords[0], np.array([1, column]))
    for matrix in (sp.csr_array(parts, shape=(2, 2)), sp.csc_array(parts, shape=(2, 2)), coo):
        with pytest.raises(ValueError, match=f"matrix is a broken {matrix.format} matrix .*, expected valid indices"):
            h0_distances(matrix, check=check)
    falling = sp.csr_array((np.ones(2), np.array([1, 0]), np.array([0, 1, 2])), shape=(2, 2))
    falling.indptr = np.array([0, 5, 2])
    with pytest.raises(ValueError, match="matrix is a broken csr matrix"):
        h0_distances(falling)
