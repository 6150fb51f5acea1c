"""obce.ripser and obce.linkage beside what they stand in for, and the diagrams in the tools that take them."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import obce
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.cluster.hierarchy import cophenet, fcluster, is_valid_linkage
from scipy.cluster.hierarchy import linkage as scipys_linkage
from scipy.sparse import coo_array, csr_array
from scipy.spatial.distance import pdist, squareform

# Distances of these are the same float32 numbers however they are computed, ties and equal points included.
exact_clouds = hnp.arrays(np.float64, st.tuples(st.integers(1, 25), st.just(2)), elements=st.integers(0, 30))


def clouds() -> list[np.ndarray]:
    g = np.random.default_rng(0)
    return [g.standard_normal((n, d)) for n, d in ((2, 1), (30, 1), (40, 3), (100, 16), (7, 50))]


def theirs(X: Any, **keywords: Any) -> dict[str, Any]:
    ripser = pytest.importorskip("ripser", reason="ripser is not installed; make dev installs it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of square clouds and of more columns than rows
        found: dict[str, Any] = ripser.ripser(X, maxdim=0, **keywords)
    return found


# ripser ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(exact_clouds, st.sampled_from([np.inf, 0.5, 1.0, 5.0, 30.0]))
def test_ripser_where_float32_holds_every_distance(cloud: np.ndarray, thresh: float) -> None:
    expected = theirs(squareform(pdist(cloud)), distance_matrix=True, thresh=thresh)
    found = obce.ripser(cloud, maxdim=0, thresh=thresh)
    a, b = found["dgms"][0], expected["dgms"][0]
    assert a.dtype == b.dtype and len(found["dgms"]) == len(expected["dgms"]) == 1
    # ripser rounds lengths to float32, in which it also compares them with thresh.
    np.testing.assert_array_equal(a.astype(np.float32), b.astype(np.float32))
    assert found["cocycles"] == expected["cocycles"]
    assert found["idx_perm"].tolist() == expected["idx_perm"].tolist()
    assert found["r_cover"] == expected["r_cover"]


@pytest.mark.parametrize("seed", range(20))
def test_ripser_compares_lengths_and_thresh_as_float32(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cloud = rng.integers(0, 12, (25, 2)) * 0.1
    for thresh in (0.1, 0.2, 0.3, 0.1 * 3, np.float32(0.1)):
        found, expected = obce.ripser(cloud, thresh=thresh)["dgms"][0], theirs(cloud, thresh=thresh)["dgms"][0]
        assert np.isinf(found).sum() == np.isinf(expected).sum()
    assert np.isinf(obce.ripser(np.arange(10)[:, None] * 0.1, thresh=0.1)["dgms"][0]).sum() == 1
    for bits in (0, 1):  # half way to the next number, which an even one takes and an odd one does not
        thresh = 1 + bits * 2.0**-23
        pair = np.array([[0], [thresh + 2.0**-24]])
        found, expected = obce.ripser(pair, thresh=thresh)["dgms"][0], theirs(pair, thresh=thresh)["dgms"][0]
        assert np.isinf(found).sum() == np.isinf(expected).sum() == 1 + bits


@pytest.mark.parametrize("metric", ["euclidean", "l1", "l2", "manhattan", "cosine", "chebyshev", "minkowski"])
@pytest.mark.parametrize("i", range(5))
def test_ripser_of_any_cloud_to_the_rounding_of_float32(metric: str, i: int) -> None:
    cloud = clouds()[i]
    if metric == "cosine" and cloud.shape[1] == 1:
        cloud = np.hstack([cloud, np.ones_like(cloud)])  # on a line all directions but two are equal
    expected, found = theirs(cloud, metric=metric)["dgms"][0], obce.ripser(cloud, metric=metric)["dgms"][0]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    assert found[-1].tolist() == [0.0, np.inf] and len(found) == len(cloud)


def test_ripser_takes_matrices_as_ripser_does() -> None:
    matrix = squareform(pdist(np.random.default_rng(1).integers(0, 30, (40, 2))))
    near = np.where((matrix <= 6) & (matrix > 0), matrix, 0)
    i, j = np.nonzero(np.triu(near))
    for X, thresh in (
        (matrix, np.inf),
        (matrix, 4.0),
        (coo_array((near[i, j], (i, j)), shape=near.shape), np.inf),
        (csr_array(np.triu(near)), np.inf),
    ):
        a = obce.ripser(X, distance_matrix=True, thresh=thresh)["dgms"][0]
        b = theirs(X, distance_matrix=True, thresh=thresh)["dgms"][0]
        np.testing.assert_array_equal(a.astype(np.float32), b.astype(np.float32))
    assert len(obce.ripser(matrix, distance_matrix=True, backend="reference", threads=1)["dgms"][0]) <= 40


def test_ripser_takes_what_the_engine_takes() -> None:
    cloud = np.random.default_rng(2).standard_normal((20, 3))
    expected = obce.ripser(cloud)["dgms"][0]
    for X in (torch.as_tensor(cloud), torch.as_tensor(cloud).requires_grad_(), cloud.tolist(), cloud[None]):
        found = obce.ripser(X)["dgms"][0]
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, expected)
    assert obce.ripser(cloud.astype(np.float32))["dgms"][0].dtype == np.float64


@pytest.mark.parametrize(
    ("X", "keywords", "error", "sentence"),
    [
        (np.zeros((3, 2)), {"maxdim": 1}, ValueError, "maxdim is 1, expected 0; .*use ripser.py for others"),
        (np.zeros((3, 2)), {"n_perm": 2}, ValueError, "n_perm is 2, expected None or at least 3"),
        (np.zeros((3, 2)), {"metric": "jaccard"}, ValueError, "X: metric is 'jaccard', expected one of"),
        (np.zeros((3, 2)), {"thresh": -1.0}, ValueError, "X: max_edge is -1.0, expected a length >= 0"),
        (np.zeros((3, 2)), {"distance_matrix": True}, ValueError, r"X: matrix has shape \[3, 2\], expected"),
        (np.full((3, 2), np.nan), {}, ValueError, "X: points: cloud 0, point 0 holds nan"),
        (np.zeros((2, 3, 2)), {}, ValueError, "X has 2 clouds, expected one; pass a batch to obce.h0"),
        (np.array([["a"]]), {}, TypeError, "X: points has dtype <U1"),
    ],
)
def test_what_ripser_refuses(X: Any, keywords: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        obce.ripser(X, **keywords)


def test_what_only_all_distances_tell_is_left_out_aloud() -> None:
    found = obce.ripser(np.zeros((3, 2)), n_perm=3, coeff=3, do_cocycles=True)
    assert found["dgms"][0].tolist() == [[0.0, np.inf]]  # equal points: ripser leaves merges of length 0 out
    for key in ("num_edges", "dperm2all"):
        assert key not in found
        with pytest.raises(KeyError, match=f"{key} needs all n x n distances"):
            found[key]
    with pytest.raises(KeyError, match=r"^'else'$"):
        found["else"]


# linkage --------------------------------------------------------------------------------------------------------------


def alike(ours: np.ndarray, expected: np.ndarray) -> None:
    """The same tree, in which rows whose distances tie may stand in another order."""
    assert is_valid_linkage(ours) and ours.shape == expected.shape and ours.dtype == expected.dtype
    np.testing.assert_allclose(ours[:, 2], expected[:, 2], rtol=1e-13)
    np.testing.assert_allclose(cophenet(ours), cophenet(expected), rtol=1e-13)


@settings(max_examples=60, deadline=None)
@given(exact_clouds.filter(lambda cloud: len(cloud) > 1), st.sampled_from([0.5, 1.0, 2.0, 5.0]))
def test_linkage_is_scipys_ties_included(cloud: np.ndarray, r: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a cloud of two points can look like a matrix of distances
        expected, ours = scipys_linkage(cloud, "single"), obce.linkage(cloud)
    alike(ours, expected)
    a, b = fcluster(ours, r, "distance"), fcluster(expected, r, "distance")
    np.testing.assert_array_equal(a[:, None] == a, b[:, None] == b)
    condensed = pdist(cloud)
    alike(obce.linkage(condensed, "single"), scipys_linkage(condensed, "single"))
    np.testing.assert_array_equal(obce.linkage(condensed)[:, 2], scipys_linkage(condensed)[:, 2])


@pytest.mark.parametrize(
    "metric", ["euclidean", "sqeuclidean", "cityblock", "chebyshev", "cosine", "correlation", "minkowski"]
)
def test_linkage_without_ties_is_scipys_row_by_row(metric: str) -> None:
    for cloud in clouds()[2:]:
        for X in (cloud, cloud.astype(np.float32)):  # scipy computes float32 input in float64
            expected, ours = scipys_linkage(X, "single", metric), obce.linkage(X, "single", metric)
            np.testing.assert_array_equal(ours[:, [0, 1, 3]], expected[:, [0, 1, 3]])
            np.testing.assert_allclose(ours[:, 2], expected[:, 2], rtol=1e-9)


class OnlyDlpack:
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __dlpack__(self, **options: Any) -> Any:
        return self._inner.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._inner.__dlpack_device__()


def test_linkage_takes_what_the_engine_takes() -> None:
    cloud = np.random.default_rng(3).standard_normal((20, 3))
    expected = obce.linkage(cloud, backend="reference", threads=1)
    tensor = torch.as_tensor(cloud)
    for y in (tensor, tensor.clone().requires_grad_(), cloud.tolist(), OnlyDlpack(cloud), pdist(cloud)):
        np.testing.assert_allclose(obce.linkage(y), expected, rtol=1e-14)
    half = tensor.bfloat16()
    np.testing.assert_array_equal(obce.linkage(half), obce.linkage(half.double()))
    assert obce.linkage([[1], [3], [7]])[:, 2].tolist() == [2.0, 4.0]
    assert obce.linkage(np.zeros((1, 2))).shape == (0, 4)


@pytest.mark.parametrize(
    ("y", "keywords", "error", "sentence"),
    [
        (np.zeros((3, 2)), {"method": "ward"}, ValueError, "method is 'ward', expected 'single'; .*scipy.cluster"),
        (np.zeros((3, 2)), {"optimal_ordering": True}, ValueError, "optimal_ordering is True, expected False"),
        (np.zeros((3, 2)), {"metric": "jaccard"}, ValueError, "y: metric is 'jaccard', expected one of"),
        (np.zeros(4), {}, ValueError, r"y: matrix has shape \[4\], expected"),
        (np.zeros((2, 3, 2)), {}, ValueError, "y has 3 dimensions, expected"),
        (np.array([1.0, np.inf, 2.0]), {}, ValueError, "y holds inf at entry 1, expected finite distances"),
        (np.array([1.0, -1.0, 2.0]), {}, ValueError, "y: matrix 0 has -1.0 at"),
        (np.array([[0.0], [np.inf]]), {}, ValueError, "y: points: cloud 0, point 1 holds inf"),
    ],
)
def test_what_linkage_refuses(y: Any, keywords: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        obce.linkage(y, **keywords)


def test_a_matrix_taken_as_points_is_told() -> None:
    matrix = squareform(pdist(np.random.default_rng(4).standard_normal((6, 2))))
    with pytest.warns(UserWarning, match="X is square, symmetric .*taken as 6 points; .*distance_matrix=True") as told:
        obce.ripser(matrix)
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match=r"y is square, .*pass scipy.spatial.distance.squareform\(y\)") as told:
        obce.linkage(matrix)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        obce.linkage(matrix + np.triu(np.ones_like(matrix)))
        obce.ripser(matrix, distance_matrix=True)


def test_dropins_import_neither_torch_nor_what_they_replace() -> None:
    code = (
        "import sys, numpy as np, obce\n"
        "x = np.arange(6.0).reshape(3, 2)\n"
        "obce.linkage(x), obce.ripser(x)\n"
        "print([m for m in ('torch', 'ripser', 'scipy.cluster', 'sklearn', 'transformers') if m in sys.modules])\n"
    )
    paths = f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}\n"
    done = subprocess.run([sys.executable, "-c", paths + code], check=False, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


# tools that take diagrams ---------------------------------------------------------------------------------------------


def two_diagrams() -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng(5)
    first, second = obce.h0(g.standard_normal((2, 30, 2))).diagrams()
    return first, second


def test_persim_takes_the_diagrams() -> None:
    persim = pytest.importorskip("persim", reason="persim is not installed; it comes with ripser")
    first, second = two_diagrams()
    assert persim.bottleneck(first[:-1], first[:-1]) == 0
    assert 0 < persim.bottleneck(first[:-1], second[:-1]) <= np.abs(first[:-1] - second[:-1]).max()
    assert persim.wasserstein(first[:-1], second[:-1]) > 0
    plt = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed; make dev installs it")
    axes = plt.figure().add_subplot()
    persim.plot_diagrams([first], ax=axes)
    points = axes.collections[0].get_offsets()
    np.testing.assert_allclose(points[:-1, 1], first[:-1, 1])
    plt.close("all")


def test_gudhi_takes_the_diagrams() -> None:
    gudhi = pytest.importorskip("gudhi", reason="gudhi, parts of which are GPL, is not installed: pip install gudhi")
    representations = pytest.importorskip(
        "gudhi.representations", reason="gudhi, parts of which are GPL, is not installed: pip install gudhi"
    )
    first, second = two_diagrams()
    assert gudhi.bottleneck_distance(first, first, 0) == 0  # by default not 0 but the least positive number
    persim = pytest.importorskip("persim", reason="persim is not installed; it comes with ripser")
    distance = gudhi.bottleneck_distance(first[:-1], second[:-1], 0)
    assert distance == pytest.approx(persim.bottleneck(first[:-1], second[:-1]))

    pipeline = pytest.importorskip("sklearn.pipeline", reason="scikit-learn is not installed; make dev installs it")
    curves = pipeline.make_pipeline(
        obce.H0Transformer(),
        representations.DiagramSelector(use=True, point_type="finite"),
        representations.BettiCurve(predefined_grid=np.array([0.0, 0.25, 0.5])),
    )
    batch = np.random.default_rng(6).standard_normal((4, 25, 3))
    # Without the essential class, which the selector takes away, one component is not counted.
    np.testing.assert_array_equal(
        curves.fit_transform(batch) + 1, obce.h0(batch).betti_curve(np.array([0.0, 0.25, 0.5]))
    )
