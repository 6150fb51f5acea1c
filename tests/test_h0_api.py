"""What the door promises beyond euclidean points: metrics, other distances, gains of the tree, gradients, inputs."""

from __future__ import annotations

import importlib.util
import math
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from obce import backends, reference
from obce.h0 import H0, h0, h0_distances, h0_line, r_f
from ripser import ripser
from scipy.cluster.hierarchy import fcluster, is_valid_linkage, linkage
from scipy.spatial.distance import pdist, squareform

INF, NAN = math.inf, math.nan
built = importlib.util.find_spec("obce._cpu") is not None
needs_cpu = pytest.mark.skipif(not built, reason="obce._cpu is not built on this machine")
BACKENDS = [pytest.param("cpu", marks=needs_cpu), "reference"]
METRICS: list[tuple[str, float | None]] = [
    ("euclidean", None),
    ("sqeuclidean", None),
    ("cosine", None),
    ("correlation", None),
    ("manhattan", None),
    ("cityblock", None),
    ("chebyshev", None),
    ("minkowski", 1),
    ("minkowski", 1.5),
    ("minkowski", 2),
    ("minkowski", 3),
    ("minkowski", 40.5),
    ("minkowski", INF),
]


def same(a: H0, b: H0) -> None:
    """The same bits; NaN equals NaN."""
    assert a.deaths.dtype == b.deaths.dtype
    np.testing.assert_array_equal(a.deaths, b.deaths)
    assert (a.edges is None) == (b.edges is None)
    if a.edges is not None:
        np.testing.assert_array_equal(a.edges, b.edges)


# Metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "p"), METRICS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_metric_is_scipys(metric: str, p: float | None, backend: str) -> None:
    g = np.random.default_rng(1)
    for n, d in ((2, 2), (40, 2), (90, 7), (70, 33)):
        cloud = g.standard_normal((n, d))
        with_p = {"p": p} if p is not None and math.isfinite(p) else {}
        theirs = "chebyshev" if p == INF else {"manhattan": "cityblock"}.get(metric, metric)
        expected = pdist(cloud, theirs, **with_p)
        deaths = h0(cloud, metric=metric, p=p, backend=backend).deaths[0]
        # scipy's cosine distance is 1 - u.v, off by the rounding of numbers near 1
        atol = 1e-15 if metric in ("cosine", "correlation") else 0
        np.testing.assert_allclose(deaths, linkage(expected, "single")[:, 2], rtol=1e-12, atol=atol)


KINDS: dict[str, Any] = {
    "gauss": lambda g, n, d: g.standard_normal((n, d)),
    "grid": lambda g, n, d: g.integers(1, 4, (n, d)) + np.arange(d) % 2,
    "tiny": lambda g, n, d: 1e-30 * g.standard_normal((n, d)),
    "huge": lambda g, n, d: 1e30 * g.standard_normal((n, d)),
    "offset": lambda g, n, d: 1e6 + g.standard_normal((n, d)),
}


@needs_cpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_metrics_equal_the_oracle(monkeypatch: pytest.MonkeyPatch, kind: str, dtype: type) -> None:
    g = np.random.default_rng(2)
    for n, d in ((1, 2), (2, 3), (3, 2), (17, 1), (33, 3), (66, 4), (130, 9)):
        points = np.stack([KINDS[kind](g, n, d) for _ in range(2)]).astype(dtype)
        lengths = g.integers(1, n + 1, 2)
        for metric, p in METRICS:
            if metric == "correlation" and (d < 3 or kind == "grid"):  # constant rows
                continue
            oracle = h0(points, metric=metric, p=p, edges=True, lengths=lengths, backend="reference")
            for level in ("portable", ""):
                monkeypatch.setenv("OBCE_SIMD", level)
                for threads in (1, 3):
                    ours = h0(points, metric=metric, p=p, edges=True, lengths=lengths, backend="cpu", threads=threads)
                    same(ours, oracle)
                deaths = h0(points, metric=metric, p=p, lengths=lengths, backend="cpu").deaths
                np.testing.assert_array_equal(deaths, oracle.deaths)


def test_names_of_one_metric_give_one_answer() -> None:
    cloud = np.random.default_rng(3).standard_normal((50, 4))

    def by(metric: str, p: float | None = None) -> H0:
        return h0(cloud, metric=metric, p=p, edges=True)

    same(by("cityblock"), by("manhattan"))
    same(by("minkowski", 1), by("manhattan"))
    same(by("minkowski", 2), by("euclidean"))
    same(by("minkowski", INF), by("chebyshev"))
    squared, plain = by("sqeuclidean"), by("euclidean")
    assert (squared.edges == plain.edges).all()
    assert (np.sqrt(squared.deaths) == plain.deaths).all()
    same(h0(cloud, metric="sqeuclidean", edges=True, algorithm="boruvka"), squared)


@pytest.mark.parametrize(("metric", "p"), METRICS)
def test_a_batch_by_any_metric_is_its_clouds(metric: str, p: float | None) -> None:
    points = np.random.default_rng(15).standard_normal((4, 25, 5)).astype(np.float32)
    lengths = [25, 1, 2, 13]
    for layout in (points, np.asfortranarray(points), points[:, :, ::-1].copy()[:, :, ::-1]):
        together = h0(layout, metric=metric, p=p, edges=True, lengths=lengths)
        for i, m in enumerate(lengths):
            alone = h0(points[i, :m], metric=metric, p=p, edges=True)
            np.testing.assert_array_equal(together.deaths[i, : m - 1], alone.deaths[0])
            np.testing.assert_array_equal(together.edges[i, : m - 1], alone.edges[0])
            assert np.isnan(together.deaths[i, m - 1 :]).all()


def test_on_a_line_all_lengths_are_one() -> None:
    values = np.random.default_rng(4).standard_normal((2, 30))
    plain = h0_line(values, edges=True)
    for metric, p in (("manhattan", None), ("chebyshev", None), ("minkowski", 3)):
        same(h0(values[:, :, None], metric=metric, p=p, edges=True), plain)
    for edges in (True, False):
        squared = h0(values[:, :, None], metric="sqeuclidean", edges=edges)
        assert (squared.deaths == plain.deaths * plain.deaths).all()
        assert edges is False or (squared.edges == plain.edges).all()
    signs = h0([[2.0], [-1.0], [5.0]], metric="cosine", edges=True)
    assert signs.deaths.tolist() == [[0.0, 2.0]] and signs.edges.tolist() == [[[0, 2], [0, 1]]]


def test_minkowski_neither_overflows_nor_underflows() -> None:
    for scale in (1e-150, 1.0, 1e150):
        triangle = scale * np.array([[0.0, 0.0], [3.0, 3.0], [3.0, 0.0]])
        np.testing.assert_allclose(h0(triangle, metric="minkowski", p=1000).deaths, [[3 * scale] * 2], rtol=1e-14)


def test_directions_ignore_length_and_correlation_ignores_offset() -> None:
    g = np.random.default_rng(5)
    cloud = g.standard_normal((40, 6))
    longer = np.ldexp(cloud, g.integers(-300, 300, 40)[:, None])  # exact
    for metric in ("cosine", "correlation"):
        same(h0(longer, metric=metric, edges=True), h0(cloud, metric=metric, edges=True))
    eighths = g.integers(-40, 40, (40, 8)) / 8
    moved = eighths + g.integers(-9, 9, (40, 1))
    # eighths, and their mean over 8: nothing is rounded before the division by the length
    same(h0(moved, metric="correlation", edges=True), h0(eighths, metric="correlation", edges=True))


def test_rows_without_direction_are_named() -> None:
    points = np.random.default_rng(6).standard_normal((2, 5, 3))
    points[1, 3] = 0
    with pytest.raises(ValueError, match=r"points: cloud 1, point 3 is zero, which has no direction.*'cosine'"):
        h0(points, metric="cosine")
    points[1, 3] = 0.1
    with pytest.raises(ValueError, match=r"points: cloud 1, point 3 is constant.*'correlation'"):
        h0(points, metric="correlation")
    assert np.isfinite(h0(points, metric="correlation", lengths=[5, 3]).deaths[1, :2]).all()
    unchecked = h0(points, metric="correlation", check=False)
    assert np.isnan(unchecked.deaths[1]).all() and np.isfinite(unchecked.deaths[0]).all()


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 20), st.integers(2, 4)), elements=st.integers(-40, 40)),
    st.integers(-100, 100),
    st.randoms(use_true_random=False),
)
def test_laws_of_the_other_metrics(cloud: np.ndarray, power: int, random: Any) -> None:
    order = list(range(len(cloud)))
    random.shuffle(order)
    for metric, p in (("sqeuclidean", None), ("manhattan", None), ("chebyshev", None), ("minkowski", 3)):
        base = h0(cloud, metric=metric, p=p, edges=True)
        assert (h0(cloud[order], metric=metric, p=p).deaths == base.deaths).all()
        # float64: the range of float32 is too small for 2^200
        wide = h0(np.ldexp(cloud.astype(np.float64), power), metric=metric, p=p, edges=True)
        unscaled = h0(cloud.astype(np.float64), metric=metric, p=p, edges=True)
        factor = 2 * power if metric == "sqeuclidean" else power
        assert (wide.deaths == np.ldexp(unscaled.deaths, factor)).all() and (wide.edges == unscaled.edges).all()
        if metric != "sqeuclidean":  # the maximum of all coordinate spans is no larger than any path
            span = float((cloud.max(0) - cloud.min(0)).max())
            assert base.deaths.sum() >= span * (1 - 1e-5)


# Distances --------------------------------------------------------------------------------------------------------


def tied_matrix(g: np.random.Generator, n: int, holes: float, dtype: type = np.float64) -> np.ndarray:
    upper = np.triu(g.integers(0, 6, (n, n)), 1).astype(dtype)
    upper[np.triu(g.random((n, n)) < holes, 1)] = INF
    return upper + upper.T


def as_sparse(matrix: np.ndarray, which: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    stored = np.isfinite(matrix)
    np.fill_diagonal(stored, False)
    if which != "both":
        stored &= (np.triu if which == "upper" else np.tril)(np.ones_like(stored))
    rows, cols = np.nonzero(stored)
    return matrix[rows, cols], rows, cols


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_condensed_and_sparse_are_the_square_matrix(backend: str, dtype: type) -> None:
    g = np.random.default_rng(7)
    for n in (1, 2, 3, 17, 64, 65, 130):
        for holes in (0.0, 0.6, 0.98, 1.0):
            matrix = tied_matrix(g, n, holes, dtype)
            square = h0_distances(matrix, edges=True, backend="reference")
            condensed = matrix[np.triu_indices(n, 1)]
            for algorithm in ("auto", "prim"):
                same(h0_distances(condensed, edges=True, backend=backend, algorithm=algorithm), square)
            np.testing.assert_array_equal(h0_distances(condensed, backend=backend).deaths, square.deaths)
            for which in ("both", "upper", "lower"):
                weights, rows, cols = as_sparse(matrix, which)
                coo = sp.coo_array((weights, (rows, cols)), shape=(n, n))
                for given_sparse in (coo, sp.csr_array(coo), sp.csc_matrix(coo)):
                    result = h0_distances(given_sparse, edges=True, backend=backend)
                    same(result, square)
                    assert result.algorithm == "kruskal"
            same(h0_distances(coo, edges=True, backend=backend, algorithm="kruskal", max_edge=2), limit(square, 2))


def limit(result: H0, r: float) -> H0:
    beyond = result.deaths > r
    edges = np.where(beyond[:, :, None], -1, result.edges)
    return H0(np.where(beyond, np.inf, result.deaths).astype(result.deaths.dtype), edges, result.lengths, "", "")


def test_condensed_is_pdist() -> None:
    cloud = np.random.default_rng(8).standard_normal((60, 3))
    distances = pdist(cloud)
    same(h0_distances(distances, edges=True), h0_distances(squareform(distances), edges=True))
    np.testing.assert_allclose(h0_distances(distances).deaths[0], linkage(distances, "single")[:, 2], rtol=0)
    assert h0_distances([]).deaths.shape == (1, 0)
    assert h0_distances([2.0]).deaths.tolist() == [[2.0]]


def test_sparse_entries_mean_what_they_say() -> None:
    #   0 -0- 1 -2- 2   3: the stored 0 is an edge, what is not stored is none.
    stored = sp.coo_array(([0.0, 2.0, INF], ([0, 2, 3], [1, 1, 0])), shape=(4, 4))
    result = h0_distances(stored, edges=True)
    assert result.deaths.tolist() == [[0.0, 2.0, INF]]
    assert result.edges.tolist() == [[[0, 1], [1, 2], [-1, -1]]]
    twice = sp.coo_array(([1.0, 2.0], ([0, 0], [1, 1])), shape=(2, 2))
    assert h0_distances(twice).deaths.tolist() == [[3.0]]  # scipy's rule: repeated entries are summed
    rowwise = sp.csr_array((np.array([1.0, 2.0]), np.array([1, 1]), np.array([0, 2, 2])), shape=(2, 2))
    assert h0_distances(rowwise).deaths.tolist() == [[3.0]]
    assert rowwise.nnz == 2  # the caller's matrix is untouched
    mixed = sp.coo_array(([1.0, 1.0, 5.0], ([0, 1, 2], [1, 0, 0])), shape=(3, 3))
    assert h0_distances(mixed, edges=True).edges.tolist() == [[[0, 1], [0, 2]]]
    assert h0_distances(sp.csr_array((3, 3))).deaths.tolist() == [[INF, INF]]
    assert h0_distances(sp.csr_array(np.array([[0, 3], [3, 0]]))).deaths.dtype == np.float64
    uneven = sp.csr_array(np.array([[0, 3.0], [2.0, 0]]))
    assert h0_distances(uneven, check=False).deaths.tolist() == [[2.0]]
    negative_zero = sp.coo_array(([-0.0], ([0], [1])), shape=(2, 2))
    assert not np.signbit(h0_distances(negative_zero).deaths[0, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_by_thresh_is_ripsers(backend: str) -> None:
    g = np.random.default_rng(9)
    for _ in range(5):
        distances = squareform(pdist(g.standard_normal((50, 3)))).astype(np.float32)
        thresh = 0.7
        theirs = np.sort(ripser(distances, maxdim=0, thresh=thresh, distance_matrix=True)["dgms"][0][:, 1])
        sparse = sp.csr_array(np.where(distances <= thresh, distances, 0))
        np.testing.assert_array_equal(
            theirs, np.sort(ripser(sparse, maxdim=0, distance_matrix=True)["dgms"][0][:, 1]).astype(theirs.dtype)
        )
        for given_distances in (distances, sparse):
            ours = h0_distances(given_distances, max_edge=thresh, backend=backend).diagrams()[0]
            np.testing.assert_array_equal(ours[:, 1], theirs)


def test_thresh_itself_is_kept_as_ripser_keeps_it() -> None:
    distances = tied_matrix(np.random.default_rng(14), 30, 0.9, np.float32) + 1 - np.eye(30, dtype=np.float32)
    theirs = np.sort(
        ripser(np.where(np.isinf(distances), 99, distances), thresh=2, maxdim=0, distance_matrix=True)["dgms"][0][:, 1]
    )
    assert (theirs == 2).any()
    np.testing.assert_array_equal(h0_distances(distances, max_edge=2).diagrams()[0][:, 1], theirs)


@pytest.mark.parametrize(
    ("matrix", "error", "sentence"),
    [
        (np.zeros(4), ValueError, r"matrix has shape \[4\].*condensed.*and 4 is no such number"),
        ([1.0, -2.0, 3.0], ValueError, r"matrix 0 has -2.0 at \[0, 2\] \(entry 1\), expected distances >= 0"),
        ([1.0, 2.0, NAN], ValueError, r"matrix 0 has nan at \[1, 2\] \(entry 2\), expected a distance or inf"),
        (np.zeros((1, 2, 3, 3)), ValueError, r"matrix has shape \[1, 2, 3, 3\]"),
        (5.0, ValueError, r"matrix has shape \[\]"),
        (sp.csr_array(np.ones((2, 3))), ValueError, r"matrix has shape \[2, 3\], expected \[n, n\]"),
        (sp.csr_array((0, 0)), ValueError, "matrix has clouds of 0 points"),
        (sp.csr_array(np.eye(3)), ValueError, r"matrix 0 has 1.0 at \[0, 0\], expected 0 on the diagonal"),
        (sp.csr_array([[0, -1.0], [0, 0]]), ValueError, r"matrix 0 has -1.0 at \[0, 1\], expected distances >= 0"),
        (sp.csr_array([[0, NAN], [0, 0]]), ValueError, r"matrix 0 has nan at \[0, 1\], expected a distance"),
        (
            sp.csr_array([[0, 0, 3.0], [1, 0, 0], [2.0, 0, 0]]),
            ValueError,
            r"matrix 0 is not symmetric: 3.0 at \[0, 2\] but 2.0 at \[2, 0\]; store one triangle only",
        ),
        (sp.csr_array([[0, 1j], [0, 0]]), TypeError, "matrix has dtype complex128"),
        (sp.csr_array([[0, 3.0], [3.0, 0]]).tobsr((2, 2)), TypeError, "sparse in the form bsr, .* expected csr, csc"),
        (sp.csr_array([[0, 3.0], [3.0, 0]]).todia(), TypeError, "sparse in the form dia, .* expected csr, csc"),
        (np.ma.array([1.0, 2, 3], mask=[0, 0, 1]), TypeError, "matrix is a masked array, expected a plain one; pad"),
        ([np.ma.array([1.0, 2], mask=[0, 1])] * 2, TypeError, "matrix is a masked array, expected a plain one; pad"),
        (np.array([1, None, 2], object), TypeError, "matrix has dtype object"),
    ],
)
def test_distances_that_are_refused(matrix: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        h0_distances(matrix)


def test_keywords_of_distances() -> None:
    graph = sp.csr_array((3, 3))
    for matrix in (graph, np.zeros(3)):
        with pytest.raises(ValueError, match="lengths is given with one condensed or sparse matrix, expected None"):
            h0_distances(matrix, lengths=[2])
    with pytest.raises(ValueError, match="algorithm is 'prim', and a sparse matrix is done by 'kruskal'"):
        h0_distances(graph, algorithm="prim")
    with pytest.raises(ValueError, match="algorithm is 'boruvka', which needs points"):
        h0_distances(np.zeros(3), algorithm="boruvka")
    with pytest.raises(ValueError, match="algorithm is 'kruskal', which needs a sparse matrix"):
        h0_distances(np.zeros((3, 3)), algorithm="kruskal")
    with pytest.raises(TypeError, match="points is a sparse matrix, expected a dense array"):
        h0(graph)
    with pytest.raises((ValueError, RuntimeError), match="backend names 'triton', which cannot"):
        h0_distances(graph, backend="triton")


# Gains of the tree ------------------------------------------------------------------------------------------------


def test_labels_are_scipys_flat_clusters() -> None:
    g = np.random.default_rng(10)
    clouds = g.standard_normal((3, 40, 2))
    result = h0(clouds, edges=True)
    for r in (0.0, 0.1, 0.3, 0.6, 5.0):
        labels = result.labels(r)
        assert labels.dtype == np.int64 and (labels.max(1) + 1 == result.betti(r)).all()
        for i, cloud in enumerate(clouds):
            theirs = fcluster(linkage(cloud, "single"), r, "distance")
            # renumbered by first member
            first = {}
            expected = [first.setdefault(label, len(first)) for label in theirs]
            assert labels[i].tolist() == expected
            assert result.labels(r, i).tolist() == expected


def test_labels_of_ragged_and_broken_clouds() -> None:
    points = np.array([[[0.0, 0], [9, 9], [0, 1], [9, 8]], [[5, 5], [5, 6], [NAN, 0], [0, 0]], [[1, 1]] * 4])
    result = h0(points, lengths=[4, 2, 1], edges=True)
    assert result.labels(2).tolist() == [[0, 1, 0, 1], [0, 0, -1, -1], [0, -1, -1, -1]]
    assert result.labels(0.5, 1).tolist() == [0, 1]
    assert result.labels(0.5, -1).tolist() == [0]
    broken = h0(points, lengths=[4, 3, 1], edges=True, check=False)
    assert broken.labels(2).tolist()[1] == [-1] * 4
    assert broken.betti(2).tolist() == [2, -1, 1] and broken.betti_curve([2, 9]).tolist()[1] == [-1, -1]
    with pytest.raises(ValueError, match="cloud 1 is not finite; give finite points"):
        broken.linkage(1)
    with pytest.raises(ValueError, match="cloud 0 has an edge whose length overflows float64; scale the points down"):
        h0_line([-1.7e308, 1.7e308], edges=True).linkage(0)
    assert h0(np.zeros((0, 3, 2)), edges=True).labels(1).shape == (0, 3)
    capped = h0_line([0.0, 1.0, 5.0, 7.0], edges=True, max_edge=2.0)
    assert capped.labels(INF).tolist() == [[0, 0, 1, 1]]
    assert capped.betti(INF).tolist() == [2] and capped.betti_curve([INF, 0]).tolist() == [[2, 4]]


def test_merges_of_the_engine_are_the_oracles(monkeypatch: pytest.MonkeyPatch) -> None:
    g = np.random.default_rng(29)
    for n in (1, 2, 3, 50, 700):
        cloud = g.integers(0, 9, (n, 2)).astype(float)
        result = h0(cloud, edges=True)
        edges = result.edges[0][g.random(n - 1) < 0.9]
        fast = backends.merges(edges, n)
        for ours, expected in zip(fast, reference.forest_merges(edges, n), strict=True):
            assert ours.dtype == np.int64 and ours.tolist() == expected.tolist()
        z = result.linkage(0) if n > 1 else np.empty((0, 4))
        with monkeypatch.context() as patch:
            patch.setattr(backends.CpuBackend, "why_not", lambda self: "it is missing")
            assert n == 1 or (z == result.linkage(0)).all()
        if n > 1:
            assert is_valid_linkage(z)
    with pytest.raises(ValueError, match="edges has ends from 0 to 5, expected points 0 to 4"):
        backends.merges(np.array([[0, 5]]), 5)


def test_merge_tree_by_hand() -> None:
    #   3 at 0, 0 at 1, 2 at 5, 1 at 7: {0,3} at 1, {1,2} at 2, all at 4
    tree = h0_line([1.0, 7.0, 5.0, 0.0], edges=True).merge_tree(0)
    assert tree.elder.tolist() == [0, 1, 0]
    assert tree.younger.tolist() == [3, 2, 1]
    assert tree.deaths.tolist() == [1.0, 2.0, 4.0]
    assert tree.sizes.tolist() == [2, 2, 4] and len(tree) == 3
    capped = h0_line([1.0, 7.0, 5.0, 0.0], edges=True, max_edge=2).merge_tree(0)
    assert capped.younger.tolist() == [3, 2] and capped.sizes.tolist() == [2, 2]


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 25), st.integers(1, 3)), elements=st.integers(-6, 6)))
def test_tree_laws(cloud: np.ndarray) -> None:
    result = h0(cloud, edges=True)
    tree = result.merge_tree(0)
    assert sorted([0, *tree.younger.tolist()]) == list(range(len(cloud)))
    assert (tree.elder < tree.younger).all()
    assert (np.diff(tree.deaths) >= 0).all() and (tree.deaths == result.deaths[0]).all()
    assert len(cloud) == 1 or tree.sizes[-1] == len(cloud)
    scales = [-1.0, 0.0, 1.0, 1.5, 2.0, 100.0]
    curve = result.betti_curve(scales)
    for k, r in enumerate(scales):
        assert curve[0, k] == result.betti(r)[0] == result.labels(r).max() + 1
        # a component is named by its smallest member
        alive = set(range(len(cloud))) - set(tree.younger[tree.deaths <= r].tolist())
        assert len(alive) == curve[0, k]
        assert {int(np.flatnonzero(result.labels(r)[0] == c)[0]) for c in range(curve[0, k])} == alive


def test_gains_come_back_as_torch() -> None:
    result = h0_line(torch.tensor([0.0, 1.0, 5.0]), edges=True)
    assert isinstance(result.labels(1.0), torch.Tensor) and result.labels(1.0).tolist() == [[0, 0, 1]]
    assert result.labels(1.0, 0).tolist() == [0, 0, 1]
    assert isinstance(result.betti_curve(torch.tensor([0.0, 1.0])), torch.Tensor)
    assert isinstance(result.merge_tree(0).deaths, np.ndarray)


def test_gains_that_are_refused() -> None:
    bare = h0_line([0.0, 1.0])
    for call in (lambda: bare.labels(1.0), lambda: bare.labels(1.0, 0), lambda: bare.merge_tree(0)):
        with pytest.raises(ValueError, match="edges is None and this needs them; call again with edges=True"):
            call()
    full = h0_line([0.0, 1.0], edges=True)
    for call in (lambda: full.labels(1.0, 1), lambda: full.merge_tree(-2)):
        with pytest.raises(IndexError, match="expected a cloud from 0 to 0"):
            call()
    with pytest.raises(ValueError, match="r is NaN"):
        full.labels(NAN)
    for scales in (1.0, [[1.0]], [NAN]):
        with pytest.raises(ValueError, match="scales has shape"):
            full.betti_curve(scales)
    with pytest.raises(TypeError, match=r"scales is \['a'\], expected \[s\], a row of numbers"):
        full.betti_curve(["a"])
    for call in (full.labels, full.betti):
        for r in ("1", None, True, [1.0, 2.0]):
            with pytest.raises(TypeError, match=r"r is .*, expected a number, an edge length"):
                call(r)
    for call in (full.merge_tree, full.linkage, lambda i: full.labels(1.0, i)):
        with pytest.raises(TypeError, match=r"i is 0\.5, expected a whole number, the index of a cloud"):
            call(0.5)
    assert full.betti(torch.tensor(1.0)).tolist() == full.betti(np.float32(1.0)).tolist() == [1]


# Gradients --------------------------------------------------------------------------------------------------------


def spread(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize(("metric", "p"), METRICS)
@pytest.mark.parametrize("shape", [(7, 3), (2, 6, 4)])
def test_gradcheck_of_points(metric: str, p: float | None, shape: tuple[int, ...]) -> None:
    lengths = [5, 6] if len(shape) == 3 else None
    kept = slice(None) if lengths is None else 0

    def deaths(x: torch.Tensor) -> Any:
        value: Any = h0(x, metric=metric, p=p, lengths=lengths).deaths[kept]
        return value[..., :4]

    assert torch.autograd.gradcheck(deaths, spread(*shape))


def test_gradcheck_of_lines_and_matrices() -> None:
    line = spread(3, 8)
    for call in (lambda x: h0_line(x).deaths, lambda x: h0_line(x, edges=True).deaths, r_f, lambda x: h0_line(x).r_f):
        assert torch.autograd.gradcheck(call, line)
    assert torch.autograd.gradcheck(lambda x: h0(x, metric="sqeuclidean").deaths, spread(6, 1))
    entries = spread(2, 6, 6).detach().square().requires_grad_()

    def of_square(m: torch.Tensor) -> Any:
        upper = m.triu(1)
        return h0_distances(upper + upper.mT).deaths

    assert torch.autograd.gradcheck(of_square, entries)
    assert torch.autograd.gradcheck(lambda m: h0_distances(m).deaths, spread(15).detach().square().requires_grad_())


def test_gradient_is_the_unit_vector_of_the_edge() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]], requires_grad=True)
    result = h0(x)
    assert result.edges is None and result.deaths.tolist() == [[0.0, 5.0]]
    result.deaths.sum().backward()
    # the edge of length 5 ends at point 1, the smaller of the two copies; the one of length 0 pulls nobody
    assert torch.allclose(x.grad, torch.tensor([[-0.6, -0.8], [0.6, 0.8], [0.0, 0.0]]))
    line = torch.tensor([2.0, 0.0, 7.0], requires_grad=True)
    r_f(line).sum().backward()
    assert line.grad.tolist() == [-1.0, 0.0, 1.0]


def test_square_matrix_splits_its_gradient_and_condensed_does_not() -> None:
    m = torch.tensor([[0.0, 1, 5], [1, 0, 2], [5, 2, 0]], requires_grad=True)
    h0_distances(m).deaths.sum().backward()
    assert m.grad.tolist() == [[0, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0]]
    c = torch.tensor([1.0, 5.0, 2.0], requires_grad=True)
    h0_distances(c).deaths.sum().backward()
    assert c.grad.tolist() == [1, 0, 1]


def test_gradient_has_the_values_and_edges_of_none() -> None:
    x = torch.randn(3, 20, 2, generator=torch.Generator().manual_seed(1))
    plain = h0(x, edges=True, max_edge=0.5, lengths=[20, 5, 1])
    grown = h0(x.clone().requires_grad_(), edges=True, max_edge=0.5, lengths=[20, 5, 1])
    same(plain, H0(grown.deaths.detach(), grown.edges, grown.lengths, "", ""))
    assert not plain.deaths.requires_grad and grown.deaths.requires_grad
    assert grown.diagrams()[0].shape == (20, 2) and grown.betti(0.1).tolist() == plain.betti(0.1).tolist()
    assert grown.betti_curve([0.1]).tolist() == plain.betti_curve([0.1]).tolist()
    with torch.no_grad():
        assert not h0(x.clone().requires_grad_()).deaths.requires_grad


def test_absent_merges_and_padding_pull_nobody() -> None:
    x = torch.tensor([[[0.0, 1.0], [0.0, 2.0], [9.0, 9.0], [NAN, NAN]]], requires_grad=True)
    for metric, p in METRICS:
        if metric == "correlation":
            continue
        limit_length = 2.0 if metric not in ("cosine",) else 0.01
        result = h0(x, metric=metric, p=p, lengths=[3], max_edge=limit_length)
        assert torch.isinf(result.deaths[0, 1])
        (grad,) = torch.autograd.grad(result.deaths[torch.isfinite(result.deaths)].sum(), x)
        assert torch.isfinite(grad).all() and (grad[0, 2:] == 0).all()
    line = torch.tensor([[0.0, 1.0, 9.0, NAN]], requires_grad=True)
    (grad,) = torch.autograd.grad(r_f(line, lengths=[3]).sum(), line)
    assert grad.tolist() == [[0.0, -1.0, 1.0, 0.0]]
    assert torch.autograd.grad(r_f(line, lengths=[3], max_edge=2).sum(), line)[0].abs().sum() == 0


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "manhattan", "chebyshev", "cosine"])
def test_an_infinite_slope_at_a_death_of_zero_pulls_nobody(metric: str) -> None:
    """As that of a power below 1: equal points stay where they are."""
    points = torch.tensor([[1.0, 0], [1, 0], [3, 4]], requires_grad=True)
    h0(points, metric=metric).total_persistence(0.5).sum().backward()  # type: ignore[no-untyped-call]
    assert points.grad is not None and points.grad.isfinite().all() and points.grad[2].any()
    line = torch.tensor([1.0, 1, 3], requires_grad=True)
    h0_line(line).deaths.sqrt().sum().backward()
    assert line.grad is not None and line.grad.isfinite().all() and line.grad[2] > 0


def test_entropy_of_deaths_whose_sum_overflows() -> None:
    big = h0_line(np.array([0, 3e38, -3e38], np.float32)).entropy()
    assert big.tolist() == [pytest.approx(np.log(2))]
    for deaths in (h0_line([1.0, 1.0, 1.0]).entropy(), h0_line([1.0]).entropy(), h0_line(torch.ones(2)).entropy()):
        assert deaths.tolist() == [0] and not np.signbit(np.asarray(deaths)).any()


@pytest.mark.parametrize("threads", [1, 2])
def test_subnormals_count_whatever_the_caller_has_set(threads: int) -> None:
    rng = np.random.default_rng(5)
    line = (rng.standard_normal((4, 300)) * 1e-39).astype(np.float32)
    cloud = np.concatenate([np.ones((1, 3)), rng.standard_normal((60, 3)) * 1e-21]).astype(np.float32)
    tiny = cloud[1:] * np.float32(1e-20)

    def found() -> list[Any]:
        results = [h0_line(line, threads=threads)] + [
            h0(points, edges=True, algorithm=algorithm, threads=threads)
            for points in (cloud, tiny)
            for algorithm in ("prim", "kdtree", "boruvka")
        ]
        # as bytes: numpy's own conversions would flush
        return [part.tobytes() for result in results for part in (result.deaths, result.edges) if part is not None]

    expected = found()
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals to zero")
    try:
        assert found() == expected
        assert float(torch.tensor(1e-39) * 2) == 0, "the caller's mode is as it was"
    finally:
        torch.set_flush_denormal(False)
    assert h0_line(line).r_f.all()


def test_gradient_of_half_precision_and_of_summaries() -> None:
    half = torch.tensor([[0.0, 0.0], [3.0, 4.0], [9.0, 12.0]], dtype=torch.bfloat16, requires_grad=True)
    result = h0(half)
    assert result.deaths.dtype == torch.float32
    (result.total_persistence() + result.entropy() + result.r_f).sum().backward()
    assert half.grad.dtype == torch.bfloat16 and torch.isfinite(half.grad).all()


@pytest.mark.parametrize(("metric", "p"), [*METRICS, ("minkowski", 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_gradient_knows_no_scale(metric: str, p: float | None, dtype: torch.dtype) -> None:
    cloud = np.random.default_rng(16).standard_normal((12, 4))

    def gradient(power: int) -> np.ndarray:
        scaled = np.ldexp(cloud, power).astype(str(dtype).removeprefix("torch."))
        x = torch.as_tensor(scaled).requires_grad_()
        h0(x, metric=metric, p=p).deaths.sum().backward()
        return np.asarray(x.grad, np.float64)

    powers = (-90, 90) if dtype == torch.float32 else (-700, 700)
    if metric == "sqeuclidean":  # a squared length beyond the range has no gradient
        powers = (-40, 40)
    base = gradient(0)
    assert np.isfinite(base).all() and (base != 0).any()
    # lengths grow with the cloud, squares with the square, and directions not at all
    grows = {"sqeuclidean": 1, "cosine": -1, "correlation": -1}.get(metric, 0)
    for power in powers:
        assert (gradient(power) == np.ldexp(base, grows * power)).all()


def test_gradient_of_minkowski_tends_to_chebyshevs() -> None:
    cloud = spread(10, 3)
    gradients = []
    for metric, p in (("minkowski", 1e5), ("chebyshev", None)):
        gradients.append(torch.autograd.grad(h0(cloud, metric=metric, p=p).deaths.sum(), cloud)[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)
    equal = torch.ones(3, 2, requires_grad=True)
    h0(equal, metric="minkowski", p=3).deaths.sum().backward()
    assert (equal.grad == 0).all()


def test_lengths_beyond_the_range_pull_nobody() -> None:
    x = torch.tensor([[-1.5e308, 0.0], [1.5e308, 0.0]], dtype=torch.float64, requires_grad=True)
    for metric in ("euclidean", "sqeuclidean", "manhattan", "chebyshev"):
        result = h0(x, metric=metric)
        assert torch.isinf(result.deaths).all()
        assert (torch.autograd.grad(result.deaths.sum(), x)[0] == 0).all()


def test_second_derivative_is_refused() -> None:
    x = spread(5, 2)
    (grad,) = torch.autograd.grad(h0(x).deaths.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="expected first derivatives alone"):
        grad.sum().backward()
    # with a constant in front, too: it would be a silent 0
    for call in (torch.autograd.functional.hessian, lambda f, at: torch.autograd.functional.jvp(f, at, at)):
        with pytest.raises(RuntimeError, match="expected first derivatives alone"):
            call(lambda cloud: h0(cloud).deaths.sum(), x.detach())


def test_gradients_come_in_batches() -> None:
    square = squareform(pdist(spread(5, 2).detach()))
    for call, at in (
        (h0, spread(5, 2)),
        (h0_line, spread(5)),
        (h0_distances, spread(6).square()),
        (h0_distances, torch.as_tensor(square)),
    ):
        one, batched = (
            torch.autograd.functional.jacobian(lambda x: call(x).deaths, at.detach(), vectorize=way)  # noqa: B023
            for way in (False, True)
        )
        assert torch.equal(one, batched)


def test_transforms_that_do_not_reach_the_engine_are_refused() -> None:
    x = spread(5, 2).detach()
    for call in (lambda points: h0(points).r_f.sum(), lambda points: r_f(points.T).sum()):
        with pytest.raises(TypeError, match=r"transforms of torch\.func"):
            torch.func.grad(call)(x)
        with pytest.raises(TypeError, match=r"transforms of torch\.func"):
            torch.func.vmap(call)(x[None])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(TypeError, match="points carries a tangent"):
            h0(dual)
        assert torch.equal(h0(dual.detach()).deaths, h0(x).deaths)


def test_results_lie_beside_the_input_whatever_the_default_device() -> None:
    x = spread(5, 2).detach()
    expected = h0(x, edges=True)
    with torch.device("meta"):
        result = h0(x, edges=True)
    assert torch.equal(result.deaths, expected.deaths) and torch.equal(result.edges, expected.edges)


def test_topological_loss_pushes_two_clusters_apart() -> None:
    generator = torch.Generator().manual_seed(2)
    offset = torch.tensor([2.0, 0.0])
    x = torch.cat([torch.randn(15, 2, generator=generator), torch.randn(15, 2, generator=generator) + offset])
    x.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        deaths = h0(x).deaths[0]
        loss = (deaths[-1] - 5).square() + deaths[:-1].square().sum()
        loss.backward()
        optimizer.step()
    result = h0(x.detach(), edges=True)
    assert abs(float(result.r_f[0]) - 5) < 0.1
    assert float(result.deaths[0, -2]) < 0.2
    assert int(result.betti(1.0)[0]) == 2


# Inputs -----------------------------------------------------------------------------------------------------------


class OnlyDlpack:
    """Speaks DLPack and nothing else."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __dlpack__(self, **options: Any) -> Any:
        return self._inner.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._inner.__dlpack_device__()


class OnlyArray:
    """Speaks numpy's __array__ and nothing else."""

    def __init__(self, inner: np.ndarray) -> None:
        self._inner = inner

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._inner if dtype is None else self._inner.astype(dtype)


def test_anything_with_dlpack_or_array() -> None:
    cloud = np.random.default_rng(11).standard_normal((30, 3))
    expected = h0(cloud, edges=True)
    for given_points in (OnlyDlpack(cloud), OnlyArray(cloud), cloud.tolist(), OnlyDlpack(torch.as_tensor(cloud))):
        result = h0(given_points, edges=True)
        same(result, expected)
        assert isinstance(result.deaths, np.ndarray)
    assert r_f(OnlyDlpack(cloud)).tolist() == r_f(cloud).tolist()
    assert h0_line(OnlyDlpack(cloud)).deaths.tolist() == h0_line(cloud).deaths.tolist()
    distances = squareform(pdist(cloud))
    same(h0_distances(OnlyDlpack(distances), edges=True), h0_distances(distances, edges=True))
    half = torch.as_tensor(cloud).bfloat16()  # numpy has no such type
    opened = h0(OnlyDlpack(half))
    assert isinstance(opened.deaths, torch.Tensor) and torch.equal(opened.deaths, h0(half).deaths)


def views(base: np.ndarray) -> dict[str, np.ndarray]:
    """The same [6, 40] numbers, laid out in other ways."""
    wide = np.zeros((12, 120), base.dtype)
    wide[::2, ::3] = base
    unaligned = np.zeros(base.nbytes + 1, np.uint8)[1:].view(base.dtype).reshape(base.shape)
    unaligned[...] = base
    return {
        "fortran": np.asfortranarray(base),
        "strided": wide[::2, ::3],
        "reversed rows": base[::-1].copy()[::-1],
        "reversed values": base[:, ::-1].copy()[:, ::-1],
        "reversed both, transposed": base.T[::-1, ::-1].copy()[::-1, ::-1].T,
        "big endian": base.astype(base.dtype.newbyteorder(">")),
        "unaligned": unaligned,
        "read only": np.broadcast_to(base, base.shape),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_every_layout_is_read_alike(backend: str, dtype: type) -> None:
    base = np.random.default_rng(12).standard_normal((6, 40)).astype(dtype)
    lengths = [40, 1, 2, 39, 17, 5]
    for name, view in views(base).items():
        assert (view == base).all(), name
        for given_lengths in (None, lengths):
            np.testing.assert_array_equal(
                r_f(view, backend=backend, lengths=given_lengths),
                r_f(base, backend=backend, lengths=given_lengths),
                err_msg=name,
            )
            for edges in (False, True):
                same(
                    h0_line(view, backend=backend, lengths=given_lengths, edges=edges),
                    h0_line(base, backend=backend, lengths=given_lengths, edges=edges),
                )
        same(h0(view, edges=True, backend=backend), h0(base, edges=True, backend=backend))
    same(h0_line(np.broadcast_to(base[0], (3, 40)), edges=True), h0_line(base[[0, 0, 0]], edges=True))


@needs_cpu
@pytest.mark.parametrize("threads", [1, 3])
def test_sample_major_batches_of_every_width(threads: int) -> None:
    g = np.random.default_rng(13)
    for dtype in (np.float32, np.float64):
        for B, n in ((1, 9), (15, 1), (16, 64), (17, 65), (50, 1000), (33, 1024)):
            samples = g.standard_normal((n, B)).astype(dtype)
            rows = np.ascontiguousarray(samples.T)
            assert (r_f(samples.T, threads=threads) == r_f(rows)).all()
            assert (h0_line(samples.T, threads=threads).deaths == h0_line(rows).deaths).all()
            samples[n // 2, B // 2] = NAN
            assert np.isnan(r_f(samples.T, check=False, threads=threads)).tolist() == [
                b == B // 2 and n > 1 for b in range(B)
            ]


@needs_cpu
def test_views_are_not_copied() -> None:
    import tracemalloc

    samples = np.zeros((1000, 2000), np.float32)
    tracemalloc.start()
    try:
        r_f(samples.T, check=False)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_tensors_that_numpy_knows_by_other_names() -> None:
    assert h0_line(torch.tensor([1, 2, 5], dtype=torch.uint64)).deaths.tolist() == [[1, 3]]
    with pytest.raises(ValueError, match=r"holds the integer \d+, expected magnitudes up to 2\^53"):
        h0_line(torch.tensor([1, 2**63 - 1], dtype=torch.int64).to(torch.uint64))
    negative = torch.tensor([1j, 3j]).conj().imag
    assert negative.is_neg()
    assert h0_line(negative).deaths.tolist() == [[2]]


def test_integers_that_float64_cannot_hold() -> None:
    for values in (np.array([0, 2**53 + 1]), np.array([2**64 - 1, 0], np.uint64), torch.tensor([0, -(2**53) - 1])):
        with pytest.raises(ValueError, match=r"values holds the integer .*, expected magnitudes up to 2\^53"):
            r_f(values)
    with pytest.raises(TypeError, match="values has dtype object"):
        r_f([0, 2**70])
    assert r_f(np.array([0, 2**53])).tolist() == [2.0**53]


LONG: dict[str, Callable[[Callable[[float], object]], object]] = {
    "prim": lambda p: h0(_zeros(50_000, 64), algorithm="prim", threads=1, progress=p),
    "minkowski": lambda p: h0(_zeros(50_000, 8), metric="minkowski", p=3, threads=1, progress=p),
    "boruvka": lambda p: h0(_noise(50_000, 64), algorithm="boruvka", threads=2, progress=p),
    "kdtree": lambda p: h0(_noise(200_000, 12), algorithm="kdtree", threads=2, progress=p),
    "batch": lambda p: h0(np.broadcast_to(_noise(2000, 64), (300, 2000, 64)), algorithm="prim", threads=2, progress=p),
    "matrix": lambda p: h0_distances(np.zeros((2000, 400, 400), np.float32), check=False, threads=1, progress=p),
}


def _zeros(n: int, d: int) -> np.ndarray:
    return np.zeros((n, d), np.float32)


def _noise(n: int, d: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, d), np.float32)


@needs_cpu
@pytest.mark.parametrize("case", LONG)
def test_a_long_call_hears_an_interrupt(case: str) -> None:
    told = []

    def interrupt(share: float) -> None:
        told.append(share)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        LONG[case](interrupt)
    assert len(told) == 1 and 0 <= told[0] < 1


@needs_cpu
def test_progress_rises_and_what_it_raises_ends_the_call() -> None:
    told: list[float] = []
    h0(_noise(12_000, 32), algorithm="prim", threads=1, progress=told.append)
    assert len(told) >= 2 and told == sorted(told) and told[-1] == 1
    quick: list[float] = []
    h0_line([1.0, 2.0], progress=quick.append)
    assert quick == [1]

    def fail(share: float) -> None:
        raise ValueError(f"no more at {share < 1}")

    with pytest.raises(ValueError, match="no more at True"):
        LONG["prim"](fail)
    with pytest.raises(TypeError, match="progress is 5, expected a function"):
        h0_line([1.0], progress=5)  # type: ignore[arg-type]


def test_truth_values_are_zeros_and_ones() -> None:
    points = np.random.default_rng(5).random((2, 30, 6)) < 0.4
    expected = h0(points.astype(np.float64), edges=True)
    for form in (points, torch.as_tensor(points), points.tolist()):
        found = h0(form, edges=True)
        assert np.array_equal(np.asarray(found.deaths), expected.deaths)
        assert np.asarray(found.deaths).dtype == np.float64
        assert np.array_equal(np.asarray(found.edges), expected.edges)
    assert r_f(points[0, :, :1].T) == 1
