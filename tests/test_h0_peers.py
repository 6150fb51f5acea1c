"""What ripser, gudhi and scipy answer in dimension 0, where it is ours and where it is not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from obce.h0 import h0, h0_distances
from scipy.cluster.hierarchy import cophenet, fcluster, is_valid_linkage, linkage
from scipy.sparse import coo_array
from scipy.spatial.distance import pdist, squareform

INF = math.inf

# Integers below 2^10 in two coordinates: squares and their sums are exact in float32, so peers that compute lengths in
# other ways round the same number once.
exact_clouds = hnp.arrays(np.float32, st.tuples(st.integers(2, 25), st.just(2)), elements=st.integers(0, 30))


def ripser_deaths(points: np.ndarray, **keywords: object) -> np.ndarray:
    ripser = pytest.importorskip("ripser", reason="ripser is not installed; make dev installs it")
    diagram = ripser.ripser(points, maxdim=0, **keywords)["dgms"][0]
    assert (diagram[:, 0] == 0).all()
    return np.sort(diagram[:, 1])


@settings(max_examples=60, deadline=None)
@given(exact_clouds)
def test_ripser_drops_what_we_keep_merges_of_length_0(cloud: np.ndarray) -> None:
    theirs = ripser_deaths(cloud)
    diagram = h0(cloud).diagrams()[0]
    ours = diagram[:, 1]
    assert diagram.shape == (len(cloud), 2) and (diagram[:, 0] == 0).all()
    np.testing.assert_array_equal(ours[ours > 0], theirs)
    assert (ours == 0).sum() == len(cloud) - len(np.unique(cloud, axis=0))


@settings(max_examples=60, deadline=None)
@given(exact_clouds, st.sampled_from([0.5, 1.0, 2.0, 3.0, 5.0, 30.0]))
def test_ripsers_thresh_is_max_edge(cloud: np.ndarray, thresh: float) -> None:
    ours = h0(cloud, max_edge=thresh)
    theirs = ripser_deaths(cloud, thresh=thresh)
    deaths = ours.diagrams()[0][:, 1]
    np.testing.assert_array_equal(deaths[deaths > 0], theirs)
    assert np.isinf(theirs).sum() == ours.betti(thresh)[0]  # one essential class a component


def test_the_essential_class_is_last_and_infinite_in_both() -> None:
    ripser = pytest.importorskip("ripser", reason="ripser is not installed; make dev installs it")
    cloud = np.array([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0]], np.float32)
    theirs = ripser.ripser(cloud, maxdim=0)["dgms"][0]
    ours = h0(cloud).diagrams()[0]
    np.testing.assert_array_equal(ours, theirs)
    assert ours[-1].tolist() == [0.0, INF]


def test_ripsers_sparse_matrices_are_ours() -> None:
    g = np.random.default_rng(0)
    full = squareform(pdist(g.integers(0, 30, (40, 2)))).astype(np.float32)
    i, j = np.nonzero(np.triu(full <= 6, 1) & (full > 0))
    sparse = coo_array((full[i, j], (i, j)), shape=full.shape)
    theirs = ripser_deaths(sparse.tocsr(), distance_matrix=True)
    ours = h0_distances(sparse).diagrams()[0][:, 1]
    np.testing.assert_array_equal(ours, theirs.astype(np.float32))


def gudhi_deaths(max_edge_length: float = INF, **what: object) -> np.ndarray:
    gudhi = pytest.importorskip("gudhi", reason="gudhi is not installed; pip install gudhi")
    tree = gudhi.RipsComplex(max_edge_length=max_edge_length, **what).create_simplex_tree(max_dimension=1)
    # -1: pairs of length 0 too. Without any edge dimension 0 is the highest, which gudhi answers only when asked.
    tree.compute_persistence(homology_coeff_field=2, min_persistence=-1.0, persistence_dim_max=True)
    intervals = tree.persistence_intervals_in_dimension(0)
    assert (intervals[:, 0] == 0).all()
    return np.sort(intervals[:, 1])


@settings(max_examples=40, deadline=None)
@given(exact_clouds)
def test_gudhis_rips_complex_has_our_diagram(cloud: np.ndarray) -> None:
    # float64, as gudhi: an edge is a diameter there too, not half of it
    np.testing.assert_array_equal(h0(cloud.astype(np.float64)).diagrams()[0][:, 1], gudhi_deaths(points=cloud))


@settings(max_examples=40, deadline=None)
@given(exact_clouds, st.sampled_from([0.0, 1.0, 2.0, 3.0, 5.0, 30.0]))
def test_gudhis_max_edge_length_is_max_edge(cloud: np.ndarray, limit: float) -> None:
    wide = cloud.astype(np.float64)
    np.testing.assert_array_equal(h0(wide, max_edge=limit).diagrams()[0][:, 1], gudhi_deaths(limit, points=wide))


def test_gudhi_drops_merges_of_length_0_unless_asked() -> None:
    gudhi = pytest.importorskip("gudhi", reason="gudhi is not installed; pip install gudhi")
    cloud = [[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]]
    tree = gudhi.RipsComplex(points=cloud).create_simplex_tree(max_dimension=1)
    tree.compute_persistence()
    assert np.sort(tree.persistence_intervals_in_dimension(0)[:, 1]).tolist() == [5.0, INF]
    assert h0(cloud).diagrams()[0][:, 1].tolist() == [0.0, 5.0, INF]


def test_gudhis_distance_matrix_is_ours() -> None:
    matrix = squareform(pdist(np.random.default_rng(1).standard_normal((30, 3))))
    np.testing.assert_array_equal(h0_distances(matrix).diagrams()[0][:, 1], gudhi_deaths(distance_matrix=matrix))


@settings(max_examples=60, deadline=None)
@given(exact_clouds, st.sampled_from([0.5, 1.0, 2.0, 5.0]))
def test_scipys_linkage_is_ours_up_to_the_order_of_ties(cloud: np.ndarray, r: float) -> None:
    wide = cloud.astype(np.float64)
    theirs, result = linkage(wide, "single"), h0(wide, edges=True)
    ours = result.linkage(0)
    assert is_valid_linkage(ours) and ours.shape == theirs.shape and ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours[:, 2], theirs[:, 2])
    # With ties other rows may merge first, but the distance at which two points meet is the same, and so are clusters.
    np.testing.assert_array_equal(cophenet(ours), cophenet(theirs))
    flat = fcluster(theirs, r, "distance")
    labels = result.labels(r)[0]
    np.testing.assert_array_equal(labels[:, None] == labels, flat[:, None] == flat)


def test_scipys_linkage_refuses_what_we_answer() -> None:
    """One point has no merge, which scipy calls an error, and an unconnected cloud has no scipy linkage at all."""
    with pytest.raises(ValueError, match="empty"):
        linkage(np.zeros((1, 2)), "single")
    assert h0(np.zeros((1, 2)), edges=True).linkage(0).shape == (0, 4)
    with pytest.raises(ValueError, match="not connected"):
        h0(np.eye(3), edges=True, max_edge=0.5).linkage(0)
