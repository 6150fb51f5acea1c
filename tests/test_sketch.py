from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import obce.sketch
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from obce import sketch
from obce.corpus import GROUP
from obce.sketch import GapCells, Moments, Sketch, TokenMoments, TokenSums, _deviations, _means, add_exactly

KINDS = (
    "gaussian",
    "heavy tails",
    "ties",
    "constant",
    "growing range",
    "subnormal",
    "huge offset",
    "two clusters",
    "extremes",
    "signed zeros",
    "uniform",
    "powers of two",
)


def stream(kind: str, n: int, seed: int) -> np.ndarray:
    """float32 [n], in the order in which the values come."""
    rng = np.random.default_rng(seed)
    if kind == "heavy tails":
        values = rng.standard_cauchy(n) ** 3
    elif kind == "ties":
        values = rng.integers(-3, 4, n) * 0.25
    elif kind == "constant":
        values = np.full(n, rng.standard_normal())
    elif kind == "growing range":
        values = np.cumsum(rng.standard_normal(n)) * 1.5 ** np.minimum(np.arange(n), 180)
    elif kind == "subnormal":
        values = rng.integers(-40, 40, n) * 2.0**-149
    elif kind == "huge offset":
        values = 1e6 + rng.standard_normal(n)
    elif kind == "two clusters":
        values = rng.choice([-5.0, 7.0], n) + 0.01 * rng.standard_normal(n)
    elif kind == "extremes":
        values = rng.choice([-3.4e38, 3.4e38, 0.0, 1e-45, 1.0], n)
    elif kind == "signed zeros":
        values = rng.choice([-0.0, 0.0, 1e-45], n)
    elif kind == "uniform":
        values = rng.random(n)
    elif kind == "powers of two":
        values = rng.choice([-1.0, 1.0], n) * 2.0 ** rng.integers(-149, 127, n)
    else:
        values = rng.standard_normal(n)
    with np.errstate(over="ignore"):
        return np.nan_to_num(values.astype(np.float32), posinf=3.4e38, neginf=-3.4e38)


def streams(n: int, seed: int) -> np.ndarray:
    return np.stack([stream(kind, n, seed) for kind in KINDS])


def fed(values: np.ndarray, cells: int, cuts: list[int], order: np.ndarray | None = None) -> GapCells:
    """Cells after the columns came in the given order, in the given pieces, each merged from a state of its own."""
    columns = np.arange(values.shape[1]) if order is None else order
    state = GapCells.empty(len(values), cells)
    for piece in np.split(columns, cuts):
        part = GapCells.empty(len(values), cells)
        part.update(values[:, piece], piece)
        state.merge(part)
    return state


def same(a: Any, b: Any) -> bool:
    mine, theirs = a.arrays(), b.arrays()
    return all(np.array_equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same module without the compiled engine."""

    def off() -> None:
        monkeypatch.setattr(obce.sketch, "_compiled", lambda: None)

    return off


@pytest.mark.parametrize("cells", [2, 3, 16, 256])
def test_compiled_cells_are_those_of_the_plain_code(cells: int, plain: Any) -> None:
    found = []
    for run in range(2):
        if run:
            plain()
        for seed, n in enumerate((1, 2, 7, 400)):
            values = streams(n, seed)
            state = fed(values, cells, [n // 3, n // 2])
            gaps = state.gaps()
            found.append((state, gaps))
    for (mine, gaps), (theirs, other) in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
        assert same(mine, theirs)
        for name in ("low", "high", "texts", "least", "greatest"):
            np.testing.assert_array_equal(getattr(gaps, name), getattr(other, name))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 90), cells=st.sampled_from([2, 5, 32]), seed=st.integers(0, 1000), data=st.data())
def test_any_order_and_split_gives_the_same_bits(n: int, cells: int, seed: int, data: st.DataObject) -> None:
    values = streams(n, seed)
    whole = GapCells.empty(len(values), cells)
    whole.update(values, np.arange(n))
    order = np.array(data.draw(st.permutations(range(n))))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))
    assert same(fed(values, cells, cuts, order), whole)
    one_by_one = GapCells.empty(len(values), cells)
    for text in order:
        one_by_one.update(values[:, [text]], [text])
    assert same(one_by_one, whole)


def wrong_certificates(values: np.ndarray, cells: int) -> list[str]:
    """What a certificate says that the sort of everything does not."""
    n = values.shape[1]
    gaps = fed(values, cells, [n // 4, n // 2]).gaps()
    ordered = np.sort(values, axis=1)
    exact = np.diff(ordered, axis=1).max(axis=1, initial=0)
    rows = np.arange(len(values))
    flaws = []
    for claim, holds in {
        "low is at most r_f": gaps.low <= exact,
        "high is at least r_f": gaps.high >= exact,
        "the ends of the gap are so far apart": values[rows, gaps.texts[:, 1]] - values[rows, gaps.texts[:, 0]]
        == gaps.low,
        "the least text has the least value": values[rows, gaps.texts[:, 2]] == ordered[:, 0],
        "the greatest text has the greatest value": values[rows, gaps.texts[:, 3]] == ordered[:, -1],
        "extremes": (gaps.least == ordered[:, 0]) & (gaps.greatest == ordered[:, -1]),
        # a cell is at most 2 / (cells - 1) of the range wide, unless that is below the last bit of a value
        "exact from two cells on": gaps.certified
        | (exact.astype(float) <= 2 * (np.ptp(values.astype(float), axis=1) / (cells - 1)))
        | (exact <= np.spacing(np.abs(values).max(axis=1))),
    }.items():
        flaws += [f"{claim}: not in row {row}" for row in np.flatnonzero(~holds)]
    return flaws


@pytest.mark.parametrize("cells", [2, 8, 64, 256])
def test_certificates_hold(cells: int) -> None:
    for seed in range(60):
        assert not wrong_certificates(streams(1 + seed * 7, seed), cells), seed


def test_a_wrong_certificate_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    values = streams(300, 0)
    honest = GapCells.gaps

    def bold(state: GapCells, threads: int | None = None) -> Any:
        found = honest(state, threads)
        found.high = found.low
        return found

    monkeypatch.setattr(GapCells, "gaps", bold)
    assert wrong_certificates(values, 8)


def test_smaller_texts_win_ties() -> None:
    state = GapCells.empty(1)
    state.update(np.array([[2, 1, 5, 1, 2, 5]], np.float32), [9, 8, 7, 3, 4, 6])
    assert state.gaps().texts.tolist() == [[4, 6, 3, 6]]


def test_texts_are_numbered_on() -> None:
    values = streams(50, 3)
    a, b = GapCells.empty(len(values)), GapCells.empty(len(values))
    a.update(values, np.arange(50))
    b.update(values, np.arange(1000, 1050))
    a.renumber(1000)
    assert same(a, b)


def exact_moments(row: np.ndarray) -> tuple[Fraction, Fraction, Fraction]:
    values = [Fraction(float(value)) for value in row]
    mean = sum(values) / len(values)
    return mean, sum(map(abs, values)) / len(values), sum((v - mean) ** 2 for v in values) / len(values)


def test_moments_are_correctly_rounded() -> None:
    values = streams(333, 5)
    state = Moments.empty(len(values))
    state.update(values)
    for row, mean, mean_abs, std in zip(values, state.mean(), state.mean_abs(), state.std(), strict=True):
        expected = exact_moments(row)
        assert (mean, mean_abs) == (float(expected[0]), float(expected[1]))
        assert std == pytest.approx(float(expected[2]) ** 0.5, rel=1e-15)
    assert state.std()[KINDS.index("huge offset")] == pytest.approx(1, abs=0.1)


@settings(max_examples=40, deadline=None)
@given(groups=st.integers(1, 12), rest=st.integers(0, GROUP - 1), seed=st.integers(0, 1000), data=st.data())
def test_moments_do_not_depend_on_the_split(groups: int, rest: int, seed: int, data: st.DataObject) -> None:
    n = groups * GROUP + rest
    values = streams(n, seed)
    whole = Moments.empty(len(values))
    whole.update(values)
    cuts = sorted(data.draw(st.lists(st.integers(0, groups), max_size=4)))
    pieces = [piece for piece in np.split(np.arange(n), [cut * GROUP for cut in cuts]) if piece.size]
    merged = Moments.empty(len(values))
    for i in data.draw(st.permutations(range(len(pieces)))):
        part = Moments.empty(len(values))
        part.update(values[:, pieces[i]])
        merged.merge(part)
    assert same(merged, whole)
    gaps = np.diff(np.sort(values[:, : groups * GROUP].reshape(-1, GROUP), axis=1), axis=1).max(axis=1)
    expected = [sum(map(Fraction, row.tolist())) / groups for row in gaps.reshape(-1, groups)]
    assert whole.rf_bagged().tolist() == [float(value) for value in expected]


def test_compiled_sums_are_those_of_the_plain_code(plain: Any) -> None:
    values = streams(257, 9)
    doubles = np.random.default_rng(0).standard_normal((5, 40)) * 2.0 ** np.arange(-60, 60, 3)
    doubles = np.round(doubles * 2.0**100) * 2.0**-100
    results = []
    for run in range(2):
        if run:
            plain()
        state = Moments.empty(len(values))
        state.update(values)
        sums, squares = np.zeros((5, 10), np.int64), np.zeros((5, 20), np.int64)
        add_exactly(sums, doubles)
        add_exactly(squares, doubles)
        # many sums of every size over many counts, some with carries left, some below 0
        rng = np.random.default_rng(1)
        digits = rng.integers(-(2**40), 2**40, (3000, 20)) * (rng.random((3000, 20)) < 0.3)
        digits[:, 19] = rng.integers(0, 2**20, 3000)
        digits *= np.arange(20) >= rng.integers(0, 20, 3000)[:, None]
        tops = rng.integers(10, 20, 3000)
        digits[:1000] *= np.arange(20) < tops[:1000, None]
        count = np.concatenate([[0, 1, 2], 2 ** rng.integers(0, 40, 2997) + rng.integers(0, 9, 2997)])
        quotients = _means(digits[:, :10].copy(), count), _deviations(digits[:, :10] >> 30, np.abs(digits), count)
        results.append((state, sums, squares, state.mean(), state.std(), state.rf_bagged(), *quotients))
    assert same(results[0][0], results[1][0])
    for mine, theirs in zip(results[0][1:], results[1][1:], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert np.count_nonzero(results[0][6]) > 1000
    assert np.count_nonzero(results[0][7]) > 1000


@pytest.mark.parametrize("compiled", [True, False])
def test_tokens(compiled: bool, plain: Any) -> None:
    import torch

    if not compiled:
        plain()
    rng = np.random.default_rng(2)
    tokens = (1e3 + rng.standard_normal((6, 11, 300))).astype(np.float32)
    lengths = np.array([11, 10, 10, 4, 2, 1])
    tokens[4, 2:] = np.nan  # padding must not be read
    real = np.concatenate([text[:length] for text, length in zip(tokens, lengths, strict=True)])
    sums = TokenSums(300)
    for part in (slice(0, 2), slice(2, 6)):
        sums.add(torch.from_numpy(tokens[part]), lengths[part])
    strided = TokenSums(300)
    strided.add(torch.from_numpy(np.concatenate([tokens, tokens], axis=1))[:, :11], lengths)
    for found in (sums, strided):
        state = TokenMoments.empty(300)
        state.update(found)
        np.testing.assert_allclose(state.mean(), real.mean(axis=0, dtype=np.float64), rtol=1e-14)
        np.testing.assert_allclose(state.std(), real.std(axis=0, dtype=np.float64), rtol=1e-8)
        assert (state.least == real.min(axis=0)).all()
        assert (state.greatest == real.max(axis=0)).all()
        assert (state.count == 38).all()


@pytest.mark.parametrize("width", [1, 63, 200, 1100])
def test_sums_over_tokens_are_the_same_on_any_threads(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch's threads, on threads of their own, on one: which columns go together decides nothing."""
    import torch

    tokens = torch.randn(5, 60, width, generator=torch.Generator().manual_seed(width))
    lengths = np.array([60, 1, 17, 59, 33])
    found = []
    for team in (sketch._team(), 0):
        monkeypatch.setattr(sketch, "_team", lambda team=team: team)
        for threads in (1, 2, 3, 7):
            sums = TokenSums(width)
            sums.add(tokens, lengths, threads)
            found.append(np.concatenate([sums.sums, sums.squares, sums.least, sums.greatest]).tobytes())
    assert len(set(found)) == 1


def test_rows_are_views_and_arrays_come_back() -> None:
    values = streams(60, 1)
    whole, parts = Sketch.empty(len(values), 32), Sketch.empty(len(values), 32)
    whole.update(values, np.arange(60))
    for rows in (slice(0, 5), slice(5, None)):
        parts.rows(rows).update(values[rows], np.arange(60))
    assert all(np.array_equal(a, b) for a, b in zip(whole.arrays().values(), parts.arrays().values(), strict=True))
    again = Sketch.from_arrays(parts.copy().arrays())
    again.merge(Sketch.empty(len(values), 32))
    assert all(np.array_equal(a, b) for a, b in zip(whole.arrays().values(), again.arrays().values(), strict=True))


def test_states_on_one_grid_merge_elementwise() -> None:
    values = streams(90, 4)
    a, b = GapCells.empty(len(values), 16), GapCells.empty(len(values), 16)
    a.update(values[:, :40], np.arange(40))
    b.update(values[:, 40:], np.arange(40, 90))
    whole = a.copy()
    whole.merge(b)
    for state in (a, b):
        state.regrid(values.min(axis=1), values.max(axis=1))
    assert np.array_equal(np.minimum(a.low, b.low), whole.low)
    assert np.array_equal(np.maximum(a.high, b.high), whole.high)
    assert np.array_equal(a.level, whole.level)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_grid_that_is_wider_than_the_values(compiled: bool, plain: Any) -> None:
    """As a rank has before a reduction: neurons with no value in their first cells, or none at all."""
    if not compiled:
        plain()
    none, some = GapCells.empty(1, 16), GapCells.empty(1, 16)
    some.update(np.array([[0.5, 0.75]], np.float32), [7, 8])
    for state in (none, some):
        state.regrid(np.zeros(1, np.float32), np.ones(1, np.float32))
    assert np.isnan(none.gaps().low).all() and (none.gaps().texts == -1).all()
    for state, other in ((some.copy(), none), (none.copy(), some)):
        state.merge(other)
        gaps = state.gaps()
        assert (gaps.low, gaps.high, gaps.least, gaps.greatest) == (0.25, 0.25, 0.5, 0.75)
        assert gaps.texts.tolist() == [[7, 8, 7, 8]]
        state.update(np.array([[0.875]], np.float32), [9])
        assert state.gaps().texts.tolist() == [[7, 8, 7, 9]]
    nan = np.full(1, np.nan, np.float32)
    for least, greatest in ((np.float32([0.5]), np.float32([0.75])), (-np.float32([9]), np.float32([0.7])), (nan, nan)):
        with pytest.raises(ValueError, match=r"neuron 0 has values from 0.5 to 0.75 in cells of 2\^-3"):
            some.regrid(least, greatest)
    assert some.gaps().texts.tolist() == [[7, 8, 7, 8]]


def test_sums_keep_subnormals_on_any_threads() -> None:
    import torch

    tokens, lengths = torch.full((1, 30, 512), 1e-39), np.array([30])
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals to zero")
    try:
        for threads in (1, 2):
            sums = TokenSums(512)
            sums.add(tokens, lengths, threads)
            assert (sums.sums > 2.9e-38).all()
    finally:
        torch.set_flush_denormal(False)


def test_without_values() -> None:
    state = Sketch.empty(2)
    state.update(np.empty((2, 0), np.float32), [])
    gaps = state.cells.gaps()
    assert np.isnan(gaps.low).all()
    assert (gaps.texts == -1).all()
    assert np.isnan(state.moments.mean()).all()
    assert np.isnan(state.moments.rf_bagged()).all()
    assert np.isnan(state.tokens.std()).all()


def test_bad_input() -> None:
    state = GapCells.empty(3)
    with pytest.raises(
        ValueError, match=r"values is float64 of shape \(3, 2\), expected float32 of shape \(3, texts\)"
    ):
        state.update(np.zeros((3, 2)), [0, 1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"texts has shape \(1,\), expected \(2,\)"):
        state.update(np.zeros((3, 2), np.float32), [0])
    for bad in (np.nan, np.inf, -np.inf):
        values = np.zeros((3, 2), np.float32)
        values[1, 1] = bad
        with pytest.raises(ValueError, match="at neuron 1, column 1, expected finite numbers"):
            state.update(values, [0, 1])
        with pytest.raises(ValueError, match="at neuron 1, column 1, expected finite numbers"):
            Moments.empty(3).update(values)
    with pytest.raises(ValueError, match="other is a state of 2 neurons, expected 3 as here"):
        state.merge(GapCells.empty(2))
    with pytest.raises(ValueError, match="other has 16 cells a neuron, expected 256 as here"):
        state.merge(GapCells.empty(3, 16))
    with pytest.raises(ValueError, match="cells is 1, expected 2 to 65,536"):
        GapCells.empty(3, 1)
    with pytest.raises(ValueError, match="offset is -1 and the last text 0, expected a sum of at most"):
        state.renumber(-1)
    for numbers in ([-1, 0], [0, 2**32]):
        with pytest.raises(ValueError, match=r"texts go from .*, expected numbers from 0 to 2\^32 - 1"):
            state.update(np.zeros((3, 2), np.float32), np.array(numbers))
    state.update(np.zeros((3, 1), np.float32), [2**32 - 2])
    with pytest.raises(ValueError, match="offset is 5 and the last text 4294967294, expected a sum"):
        state.renumber(5)
    state.renumber(1)
    with pytest.raises(ValueError, match="expected a slice without a step"):
        state.rows(slice(0, 3, 2))


def test_the_long_check_runs(script: Any) -> None:
    found = script("verify_sketch").verify(300, seed=1)
    assert found["streams"] >= 300
    assert found["wrong"] == 0
    assert 0 < found["certified"] < found["streams"]
