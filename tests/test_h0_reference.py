"""The oracle against independent tools and hand-drawn diagrams, and the laws every backend inherits from it."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from obce import reference
from obce.h0 import H0, h0, h0_distances, h0_line, r_f
from ripser import ripser
from scipy.cluster.hierarchy import fcluster, is_valid_linkage, linkage
from scipy.spatial.distance import pdist, squareform


def random_cloud(seed: int, dtype: type = np.float64) -> np.ndarray:
    """n 2..300, d 1..64; every third cloud on an integer grid, every fifth with half its points doubled."""
    g = np.random.default_rng(seed)
    n, d = int(g.integers(2, 301)), int(g.integers(1, 65))
    cloud = g.integers(0, 5, (n, d)).astype(float) if seed % 3 == 0 else g.standard_normal((n, d))
    if seed % 5 == 0:
        cloud[: n // 2] = cloud[n - n // 2 :]
    return cloud.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_deaths_equal_scipy_single_linkage(dtype: type) -> None:
    for seed in range(100):
        cloud = random_cloud(seed, dtype)
        expected = linkage(cloud.astype(np.float64), "single")[:, 2]
        for algorithm in ("auto", "prim", "boruvka", "kdtree"):
            deaths = h0(cloud, algorithm=algorithm).deaths
            np.testing.assert_allclose(deaths[0], expected, rtol=1e-6, atol=0, err_msg=f"seed {seed} {algorithm}")


def test_r_f_equals_ripsers_largest_finite_death() -> None:
    for seed in range(40):
        cloud = random_cloud(seed, np.float32)[:60]
        finite = ripser(cloud, maxdim=0)["dgms"][0][:-1, 1]
        expected = finite.max() if finite.size else 0.0
        np.testing.assert_allclose(h0(cloud).r_f, [expected], rtol=1e-5)
        line = cloud[:, :1]
        finite = ripser(line, maxdim=0)["dgms"][0][:-1, 1]
        expected = finite.max() if finite.size else 0.0
        np.testing.assert_allclose(r_f(line[:, 0]), [expected], rtol=1e-5, atol=1e-7)


SQUARE = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])


def test_square_with_four_tied_sides() -> None:
    #   3 --- 2      All sides are 1: the order of ties takes {0,1}, {0,3}, {1,2} and never {2,3}.
    #   |     |
    #   0 --- 1
    result = h0(SQUARE, edges=True)
    assert result.edges.tolist() == [[[0, 1], [0, 3], [1, 2]]]
    assert result.deaths.tolist() == [[1.0, 1.0, 1.0]]
    assert result.diagrams()[0].tolist() == [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, math.inf]]


def test_two_pairs() -> None:
    #   0 - 1 . . . . 2 -- 3      gaps 1, 4, 2
    result = h0_line([0.0, 1.0, 5.0, 7.0], edges=True)
    assert result.deaths.tolist() == [[1.0, 2.0, 4.0]]
    assert result.edges.tolist() == [[[0, 1], [2, 3], [1, 2]]]
    assert result.r_f.tolist() == [4.0]
    assert [int(result.betti(r)[0]) for r in (0, 0.99, 1, 2, 3.99, 4)] == [4, 4, 3, 2, 2, 1]
    assert result.total_persistence().tolist() == [7.0]
    assert result.total_persistence(2).tolist() == [21.0]
    q = np.array([1, 2, 4]) / 7
    np.testing.assert_allclose(result.entropy(), [-(q * np.log(q)).sum()])


def test_duplicates_hang_on_their_smallest_copy() -> None:
    #   values 3 3 0 3 0: zero-length edges from point 0 to 1 and 3, from 2 to 4; then 0 to 2.
    result = h0_line([3.0, 3.0, 0.0, 3.0, 0.0], edges=True)
    assert result.edges.tolist() == [[[0, 1], [0, 3], [2, 4], [0, 2]]]
    assert result.deaths.tolist() == [[0.0, 0.0, 0.0, 3.0]]


def test_line_edge_that_joins_no_sorted_neighbours() -> None:
    # In float32 2^26 - 1 and 2^26 - 2 both round to 2^26: the two lengths tie, and the smaller index wins although
    # the other point lies between.
    values = np.array([1.0, 2.0**26, 2.0], np.float32)
    assert values[1] - values[0] == values[1] - values[2]
    assert h0_line(values, edges=True).edges.tolist() == [[[0, 2], [0, 1]]]
    assert h0_line(values, edges=True, backend="reference").edges.tolist() == [[[0, 2], [0, 1]]]


def test_matrix_without_some_edges() -> None:
    inf = math.inf
    matrix = np.array([[0, 1, inf, inf], [1, 0, inf, inf], [inf, inf, 0, 2], [inf, inf, 2, 0.0]])
    result = h0_distances(matrix, edges=True)
    assert result.deaths.tolist() == [[1.0, 2.0, inf]]
    assert result.edges.tolist() == [[[0, 1], [2, 3], [-1, -1]]]
    assert result.r_f.tolist() == [inf]
    assert result.betti(100.0).tolist() == [2]
    assert result.total_persistence().tolist() == [3.0]
    with pytest.raises(ValueError, match="cloud 0 is not connected"):
        result.linkage(0)


def test_max_edge_cuts_what_is_longer() -> None:
    result = h0_line([0.0, 1.0, 5.0, 7.0], edges=True, max_edge=2.0)
    assert result.deaths.tolist() == [[1.0, 2.0, math.inf]]
    assert result.edges.tolist() == [[[0, 1], [2, 3], [-1, -1]]]
    assert result.r_f.tolist() == [math.inf]
    assert r_f([0.0, 1.0, 5.0, 7.0], max_edge=4.0).tolist() == [4.0]
    assert r_f([0.0, 1.0, 5.0, 7.0], max_edge=3.9).tolist() == [math.inf]


def test_max_edge_is_not_rounded_to_float32() -> None:
    value = np.float32(0.1)  # a little above 0.1
    assert r_f(np.array([0, value]), max_edge=0.1).tolist() == [math.inf]
    assert r_f(np.array([0, value]), max_edge=float(value)).tolist() == [value]


@pytest.mark.parametrize("n", [1, 2])
def test_one_and_two_points(n: int) -> None:
    result = h0(np.arange(3.0 * n).reshape(n, 3), edges=True)
    length = math.sqrt(27.0)
    assert result.deaths.tolist() == [[length][: n - 1]]
    assert result.edges.tolist() == [[[0, 1]][: n - 1]]
    assert result.r_f.tolist() == [0.0 if n == 1 else length]
    assert result.diagrams()[0].shape == (n, 2)
    assert r_f(np.arange(float(n))).tolist() == [n - 1.0]
    assert result.betti(0.0).tolist() == [n]
    assert result.entropy().tolist() == [0.0]
    assert result.linkage(0).shape == (n - 1, 4)


def test_linkage_is_scipys() -> None:
    for seed in (1, 2, 4, 7):  # no exact ties
        cloud = random_cloud(seed)
        ours, theirs = h0(cloud, edges=True).linkage(0), linkage(cloud, "single")
        assert is_valid_linkage(ours)
        np.testing.assert_allclose(ours[:, 2], theirs[:, 2], rtol=1e-12)
        np.testing.assert_array_equal(ours[:, [0, 1, 3]], theirs[:, [0, 1, 3]])
        for k in (2, 5):
            assert (fcluster(ours, k, "maxclust") == fcluster(theirs, k, "maxclust")).all()


def test_matrix_and_points_agree() -> None:
    for seed in range(12):
        cloud = random_cloud(seed)[:80]
        np.testing.assert_allclose(h0_distances(squareform(pdist(cloud))).deaths, h0(cloud).deaths, rtol=1e-12, atol=0)


def test_ragged_batch_ignores_its_padding() -> None:
    g = np.random.default_rng(0)
    lengths = [7, 1, 20, 2]
    points = np.full((4, 20, 3), np.nan, np.float32)
    for i, m in enumerate(lengths):
        points[i, :m] = g.standard_normal((m, 3))
    result = h0(points, lengths=lengths, edges=True)
    assert result.lengths.tolist() == lengths
    for i, m in enumerate(lengths):
        alone = h0(points[i, :m], edges=True)
        assert (result.deaths[i, : m - 1] == alone.deaths[0]).all()
        assert (result.edges[i, : m - 1] == alone.edges[0]).all()
        assert np.isnan(result.deaths[i, m - 1 :]).all()
        assert (result.edges[i, m - 1 :] == -1).all()
        assert result.r_f[i] == alone.r_f[0]
        assert result.betti(1.0)[i] == alone.betti(1.0)[0]
        assert result.total_persistence()[i] == pytest.approx(alone.total_persistence()[0])
        assert result.diagrams()[i].shape == (m, 2)
        line = h0_line(points[:, :, 0], lengths=lengths)
        assert line.r_f[i] == r_f(points[:, :, 0], lengths=lengths)[i] == r_f(points[i, :m, 0])[0]


def test_empty_batch() -> None:
    result = h0(np.zeros((0, 5, 2)), edges=True)
    assert result.deaths.shape == (0, 4)
    assert result.edges.shape == (0, 4, 2)
    assert result.r_f.shape == (0,)
    assert result.diagrams() == []
    assert r_f(np.zeros((0, 5))).shape == (0,)
    assert h0_distances(np.zeros((0, 5, 5))).deaths.shape == (0, 4)


def test_dtypes_and_kinds_come_back() -> None:
    import torch

    rows = [[0, 1, 3], [2, 2, 9]]
    for given_dtype, back in (
        (np.float16, np.float32),
        (np.float32, np.float32),
        (np.float64, np.float64),
        (np.int8, np.float64),
        (np.uint32, np.float64),
        (">f4", np.float32),
    ):
        values = np.array(rows, given_dtype)
        assert r_f(values).dtype == back and r_f(values).tolist() == [2.0, 7.0]
        assert h0_line(values).deaths.dtype == back
    for torch_dtype, torch_back in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.float64),
    ):
        tensor = torch.tensor(rows, dtype=torch_dtype)
        result = h0_line(tensor, edges=True)
        for field in (
            result.deaths,
            result.edges,
            result.lengths,
            result.r_f,
            result.betti(1.0),
            r_f(tensor),
        ):
            assert isinstance(field, torch.Tensor)
        assert result.deaths.dtype == torch_back and result.edges.dtype == torch.int64
        assert r_f(tensor).tolist() == result.r_f.tolist() == [2.0, 7.0]
        assert result.total_persistence().tolist() == [3.0, 7.0]
        assert result.entropy()[1] == 0
        assert isinstance(result.diagrams()[0], np.ndarray)
    grown = torch.tensor(rows, dtype=torch.float32, requires_grad=True)
    assert r_f(grown).requires_grad and not r_f(grown.detach()).requires_grad
    assert r_f(rows).tolist() == [2.0, 7.0]  # nested sequences


def test_views_are_read_where_they_lie() -> None:
    wide = np.random.default_rng(3).standard_normal((40, 30)).astype(np.float32)
    expected = r_f(wide[:, 3:17].copy())
    assert (r_f(wide[:, 3:17]) == expected).all()  # rows apart
    assert (r_f(np.asfortranarray(wide[:, 3:17])) == expected).all()
    assert (r_f(wide[::-1, 3:17])[::-1] == expected).all()  # negative stride
    assert (r_f(wide[:, 3:17][:, ::-1]) == expected).all()
    cloud = wide[:, 3:17][::2]
    assert (h0(cloud).deaths == h0(cloud.copy()).deaths).all()


# Laws -----------------------------------------------------------------------------------------------------------


def clouds(min_n: int = 1) -> st.SearchStrategy[np.ndarray]:
    """Small clouds full of ties: coordinates are eighths, so sums and differences of two are exact."""
    shape = st.tuples(st.integers(min_n, 24), st.integers(1, 4))
    eighths = st.integers(-40, 40).map(lambda k: k / 8)
    return shape.flatmap(lambda s: hnp.arrays(np.float32, s, elements=eighths))


@settings(max_examples=100, deadline=None)
@given(clouds(), st.randoms(use_true_random=False))
def test_permutation_changes_no_death(cloud: np.ndarray, random) -> None:  # type: ignore[no-untyped-def]
    order = list(range(len(cloud)))
    random.shuffle(order)
    assert (h0(cloud[order]).deaths == h0(cloud).deaths).all()


@settings(max_examples=100, deadline=None)
@given(clouds(), st.integers(-64, 64), st.integers(-120, 120))
def test_exact_translation_and_power_of_two_scaling(cloud: np.ndarray, shift: int, power: int) -> None:
    base = h0(cloud, edges=True)
    moved = h0(cloud + np.float32(shift), edges=True)
    assert (moved.deaths == base.deaths).all() and (moved.edges == base.edges).all()
    scaled = h0(np.ldexp(cloud, power), edges=True)
    assert (scaled.edges == base.edges).all()
    assert (scaled.deaths == np.ldexp(base.deaths, power)).all()


@settings(max_examples=100, deadline=None)
@given(clouds(min_n=2))
def test_line_laws(cloud: np.ndarray) -> None:
    values = cloud[:, 0]
    result = h0_line(values)
    gaps = np.sort(np.diff(np.sort(values)))
    assert (result.deaths[0] == gaps).all()
    assert r_f(values)[0] == gaps[-1]
    assert result.total_persistence()[0] == values.max() - values.min()  # eighths: the sum is exact
    assert (h0(values[:, None], algorithm="prim").deaths == result.deaths).all()


@settings(max_examples=60, deadline=None)
@given(clouds(min_n=2))
def test_doubling_every_point_adds_zeros(cloud: np.ndarray) -> None:
    doubled = h0(np.concatenate([cloud, cloud])).deaths[0]
    assert (doubled[: len(cloud)] == 0).all()
    assert (doubled[len(cloud) :] == h0(cloud).deaths[0]).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(clouds(), min_size=1, max_size=4))
def test_a_batch_is_its_clouds(some: list[np.ndarray]) -> None:
    d = some[0].shape[1]
    some = [c for c in some if c.shape[1] == d]
    lengths = [len(c) for c in some]
    batch = np.zeros((len(some), max(lengths), d), np.float32)
    for i, cloud in enumerate(some):
        batch[i, : len(cloud)] = cloud
    together: H0 = h0(batch, lengths=lengths, edges=True)
    for i, cloud in enumerate(some):
        alone = h0(cloud, edges=True)
        m = len(cloud) - 1
        assert (together.deaths[i, :m] == alone.deaths[0]).all()
        assert (together.edges[i, :m] == alone.edges[0]).all()


@settings(max_examples=60, deadline=None)
@given(clouds(), st.data())
def test_one_more_copy_of_a_point_adds_one_zero(cloud: np.ndarray, data: st.DataObject) -> None:
    copied = data.draw(st.integers(0, len(cloud) - 1))
    at = data.draw(st.integers(0, len(cloud)))
    more = h0(np.insert(cloud, at, cloud[copied], axis=0)).deaths[0]
    assert more.tolist() == [0.0, *h0(cloud).deaths[0].tolist()]


@settings(max_examples=60, deadline=None)
@given(clouds(min_n=2), st.data())
def test_max_edge_takes_the_longer_deaths_and_nothing_else(cloud: np.ndarray, data: st.DataObject) -> None:
    whole = h0(cloud, edges=True)
    death = float(data.draw(st.sampled_from(whole.deaths[0].tolist())))
    limit = max(0.0, data.draw(st.sampled_from([death, np.nextafter(death, 0), np.nextafter(death, math.inf)])))
    cut = h0(cloud, edges=True, max_edge=limit)
    kept = whole.deaths[0] <= limit
    np.testing.assert_array_equal(cut.deaths[0], np.where(kept, whole.deaths[0], np.inf))
    np.testing.assert_array_equal(cut.edges[0], np.where(kept[:, None], whole.edges[0], -1))
    assert cut.r_f[0] == (whole.r_f[0] if kept.all() else math.inf)
    for r in (0.0, limit, math.inf):
        assert cut.betti(r)[0] == whole.betti(min(r, limit))[0]


@settings(max_examples=60, deadline=None)
@given(clouds(min_n=2), st.sampled_from(["sqeuclidean", "manhattan", "chebyshev"]))
def test_the_matrix_of_weights_has_the_tree_of_the_points(cloud: np.ndarray, metric: str) -> None:
    matrix = np.stack([reference.weights(cloud, i, metric) for i in range(len(cloud))])
    if cloud.shape[1] == 1 and metric == "sqeuclidean":  # on a line the weight is the length
        matrix = matrix * matrix
    weighted, points = h0_distances(matrix, edges=True), h0(cloud, metric=metric, edges=True)
    np.testing.assert_array_equal(weighted.deaths, points.deaths)
    np.testing.assert_array_equal(weighted.edges, points.edges)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(2, 6))
def test_permutation_carries_the_edges_where_nothing_ties(seed: int, n: int, d: int) -> None:
    g = np.random.default_rng(seed)
    cloud, order = g.standard_normal((n, d)), g.permutation(n)
    weights = np.concatenate([reference.weights(cloud, i)[i + 1 :] for i in range(n)])
    assert len(np.unique(weights)) == len(weights)
    moved = h0(cloud[order], edges=True).edges[0]
    np.testing.assert_array_equal(np.sort(order[moved], axis=1), h0(cloud, edges=True).edges[0])


# The emulated fma -------------------------------------------------------------------------------------------------


def exact_square_add(diff: float, acc: float, dtype: type) -> float:
    value = Fraction(diff) ** 2 + Fraction(acc)
    if dtype is np.float64:
        return float(value)
    # One rounding of a rational to float32: scale so that the ulp is 1, round half to even.
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(value)) - 23, -149)
    while Fraction(2) ** (exponent + 24) <= value:
        exponent += 1
    return math.ldexp(round(value / Fraction(2) ** exponent), exponent)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from([np.float32, np.float64]))
def test_emulated_fma_rounds_once(data: st.DataObject, dtype: type) -> None:
    width = 32 if dtype is np.float32 else 64
    top = 2.0**40 if width == 32 else 2.0**400
    diff = data.draw(st.floats(-top, top, width=width))
    acc = data.draw(st.floats(0, top * top, width=width))
    if data.draw(st.booleans()):  # near a tie: acc beside a multiple of the square
        acc = float(dtype(diff) * dtype(diff)) * 2.0 ** data.draw(st.integers(0, 30))
    got = reference._square_add(np.array([diff], dtype), np.array([acc], dtype))[0]
    assert got == exact_square_add(float(dtype(diff)), float(dtype(acc)), dtype)


def test_emulated_fma_against_double_rounding() -> None:
    # 1 + 2^-24 + 2^-60: rounding to float64 first drops 2^-60, and the tie then goes to even, down to 1.
    diff = np.array([2.0**-12], np.float32)  # square 2^-24
    low = np.array([1 + 2.0**-23], np.float32)
    assert reference._square_add(diff, low)[0] == np.float32(1 + 2.0**-22)  # a tie, to even
    diff = np.array([np.float32(2.0**-12) * (1 + np.float32(2.0**-23))], np.float32)
    assert reference._square_add(diff, np.array([1.0], np.float32))[0] == np.float32(1 + 2.0**-23)  # above a tie


def test_reference_prim_is_reference_kruskal(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(12):
        cloud = random_cloud(seed, np.float32)[None, :60]
        kruskal = reference.clouds_h0(cloud)
        monkeypatch.setattr(reference, "KRUSKAL_POINTS", 0)
        prim = reference.clouds_h0(cloud)
        monkeypatch.undo()
        assert (kruskal[0] == prim[0]).all() and (kruskal[1] == prim[1]).all()
