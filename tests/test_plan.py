from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from obce.clouds import CLOUD_KINDS, CLOUD_SCORES, Clouds
from obce.plan import DEFAULT_UNITS, PRESETS, UNITS, Plan, plan
from obce.scores import CLS_SCORES, SCORE_NAMES, Scores
from obce.sites import SITE_KINDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import BertModel

BASE = {"layers": 12, "hidden": 768, "heads": 12, "inner": 3072, "vocabulary": 30522}
LARGE = {"layers": 24, "hidden": 1024, "heads": 16, "inner": 4096, "vocabulary": 30522}
TINY = {"layers": 3, "hidden": 32, "heads": 4, "inner": 64, "vocabulary": 256}


def make_scores(
    layers: int, hidden: int, heads: int, inner: int, vocabulary: int, seed: int = 0, **columns: Any
) -> Scores:
    """Scores as a model of these dimensions would give them, layer-0 query/key/value constant."""
    rng = np.random.default_rng(seed)
    widths = {kind: inner if kind == "intermediate" else hidden for kind in SITE_KINDS}
    sizes = [(layer, kind, widths[kind]) for layer in range(layers) for kind in SITE_KINDS]
    total = sum(width for *_, width in sizes)
    layer = np.concatenate([np.full(width, i, np.int16) for i, _, width in sizes])
    site = np.concatenate([np.full(width, SITE_KINDS.index(kind), np.int8) for _, kind, width in sizes])
    constant = (layer == 0) & (site < 3)
    drawn = {name: rng.lognormal(size=total) for name in SCORE_NAMES}
    for name in ("rf", "std", "range"):
        drawn[name][constant] = np.nan
    drawn.update(columns)
    encoder = layers * (4 * hidden * (hidden + 1) + 4 * hidden + 2 * hidden * inner + inner + hidden)
    embeddings = (vocabulary + 512 + 2 + 2) * hidden
    parameters = encoder + embeddings + hidden * (hidden + 1)
    return Scores(
        layer=layer,
        site=site,
        index=np.concatenate([np.arange(width, dtype=np.int32) for *_, width in sizes]),
        constant=constant,
        columns=drawn,
        meta={
            "model_hash": "m",
            "corpus_hash": "c",
            "seed": seed,
            "architecture": {
                "hidden_size": hidden,
                "num_attention_heads": heads,
                "intermediate_size": inner,
                "num_hidden_layers": layers,
                "parameters": parameters,
                "encoder_parameters": encoder,
                "weight_bytes": 4 * parameters,
                "encoder_element_bytes": 4,
                "pooler": True,
            },
        },
    )


@pytest.fixture(scope="module")
def tiny() -> Scores:
    return make_scores(**TINY)


def kept_of(made: Plan, layer: int, kind: str, width: int) -> np.ndarray:
    return np.array(made.kept.get(f"{layer}.{kind}", range(width)), np.int64)


def with_clouds(scores: Scores, seed: int = 0) -> Scores:
    """The same with clouds of every head and layer; those of layer 0 but the context are constant, as in a BERT."""
    heads = scores.meta["architecture"]["num_attention_heads"]
    at = [
        (layer, code, head)
        for layer in scores.layers()
        for code, kind in enumerate(CLOUD_KINDS)
        for head in ([-1] if kind == "hidden" else range(heads))
    ]
    layer, kind, head = (np.array(column) for column in zip(*at, strict=True))
    constant = (layer == 0) & (kind < 3)
    rng = np.random.default_rng(seed)
    columns = {name: np.where(constant, np.nan, rng.lognormal(size=len(at))) for name in CLOUD_SCORES}
    d = np.full(len(at), 8, np.int32)
    clouds = Clouds(layer.astype(np.int16), kind.astype(np.int8), head.astype(np.int16), 40, d, constant, columns)
    return dataclasses.replace(scores, clouds=clouds)


def heads_kept(kept: np.ndarray, heads: int, hidden: int) -> np.ndarray:
    """Numbers of the heads that stay, each with as many neurons as the others."""
    counts = np.bincount(kept // (hidden // heads), minlength=heads)
    assert len(set(counts[counts > 0])) <= 1
    return np.flatnonzero(counts)


def check_shape(made: Plan, scores: Scores) -> None:
    """What every plan must satisfy, whatever it was asked."""
    facts = scores.meta["architecture"]
    hidden, heads, inner = facts["hidden_size"], facts["num_attention_heads"], facts["intermediate_size"]
    removed = 0
    for layer in scores.layers():
        if layer in made.layers_dropped:
            assert not any(name.startswith(f"{layer}.") for name in made.kept)
            removed += 4 * hidden * (hidden + 1) + 2 * hidden * inner + inner + hidden + 4 * hidden
            continue
        widths = {kind: inner if kind == "intermediate" else hidden for kind in SITE_KINDS}
        kept = {kind: kept_of(made, layer, kind, width) for kind, width in widths.items()}
        assert (kept["query"] == kept["key"]).all()
        stay = heads_kept(kept["query"], heads, hidden)
        assert (stay == heads_kept(kept["value"], heads, hidden)).all()
        if "heads" not in made.units:
            assert len(stay) == heads
        elif made.floor:
            assert len(stay) >= max(1, made.floor * heads)
        for kind, width in widths.items():
            indices = kept[kind]
            assert (np.diff(indices) > 0).all()
            assert set(indices) <= set(range(width))
            assert len(indices) >= made.floor * width
            assert len(indices) or ("heads" in made.units and kind in ("query", "key", "value"))
            gone = np.setdiff1d(np.arange(width), indices)
            if "heads" not in made.units:
                assert scores.ranked(made.score)[scores.rows(layer, kind)][gone].all(), "only what is ranked may go"
        q, _, v, a, i, o = (len(kept[kind]) for kind in SITE_KINDS)
        removed += (hidden + 1) * (2 * (hidden - q) + hidden - v + inner - i)
        removed += hidden * hidden - a * v + hidden * inner - o * i
    units = {kind: kind for kind in SITE_KINDS} | {"query": "query_key", "key": "query_key"}
    for name in made.kept:
        kind = name.split(".")[1]
        assert units[kind] in made.units or ("heads" in made.units and kind in ("query", "key", "value"))
    assert made.after.parameters == made.before.parameters - removed
    assert made.after.encoder == made.before.encoder - removed
    assert made.after.bytes == made.before.bytes - 4 * removed


@pytest.mark.parametrize(
    ("dimensions", "preset", "keep"),
    [
        (BASE, "obce-2023", 0.5847),
        (LARGE, "obce-2023", 0.523),
        (BASE, "pbce-2025", 0.47),
        (LARGE, "pbce-2025", 0.42),
    ],
    ids=["base-obce", "large-obce", "base-pbce", "large-pbce"],
)
def test_published_sizes_are_met(dimensions: dict[str, int], preset: str, keep: float) -> None:
    scores = make_scores(**dimensions)
    made = plan(scores, keep=keep, of="total", preset=preset)
    check_shape(made, scores)
    whole = made.before.parameters
    neuron = 2 * dimensions["hidden"] + 1
    assert 0 <= keep * whole - made.after.parameters < neuron + 1
    # the levels were scaled together: a third that should lose more loses more
    levels = [made.levels[str(layer)] for layer in scores.layers()]
    assert len(set(levels)) == 3


@settings(max_examples=80, deadline=None)
@given(
    where=st.floats(0.01, 1),
    of=st.sampled_from(["total", "encoder"]),
    preset=st.sampled_from([None, *PRESETS]),
    score=st.sampled_from(SCORE_NAMES),
    units=st.sampled_from(
        [
            DEFAULT_UNITS,
            ("intermediate", "heads"),
            ("output",),
            ("heads", "attention_output", "output"),
            ("query_key", "value", "intermediate", "attention_output", "output"),
        ]
    ),
    drop=st.integers(0, 2),
)
def test_a_budget_is_met_to_one_unit(
    where: float, of: Any, preset: str | None, score: str, units: tuple[str, ...], drop: int
) -> None:
    scores = make_scores(**TINY)
    asked: dict[str, Any] = {"of": of, "score": score, "floor": 0, "units": units, "drop_layers": drop}
    with pytest.raises(ValueError, match="still leaves") as error:
        plan(scores, keep=1e-6, **asked)
    least = float(str(error.value).split("still leaves ")[1].split(":")[0])
    keep = least + where * (1 - least)
    made = plan(scores, keep=keep, preset=preset, **asked)
    check_shape(made, scores)
    whole = made.before.parameters if of == "total" else made.before.encoder
    kept = made.after.parameters if of == "total" else made.after.encoder
    hidden = TINY["hidden"]
    unit = hidden // TINY["heads"] * (4 * hidden + 3) if "heads" in units else 2 * hidden + 2
    assert kept <= keep * whole
    assert keep * whole - kept < unit or (drop and not made.kept)
    assert made.kept_share == kept / whole
    assert len(made.layers_dropped) == drop


@pytest.mark.parametrize("preset", [None, "obce-2023"])
@pytest.mark.parametrize("keep", [0.3, 0.465, 0.8])
def test_widths_come_in_multiples(keep: float, preset: str | None) -> None:
    scores = make_scores(**BASE)
    free = plan(scores, keep=keep, of="encoder", preset=preset)
    made = plan(scores, keep=keep, of="encoder", preset=preset, multiple=8)
    for name, kept in made.kept.items():
        heads = 1 if name.endswith("intermediate") else BASE["heads"]
        size = BASE["inner"] if heads == 1 else BASE["hidden"]
        each = np.bincount(np.array(kept) // (size // heads), minlength=heads)
        assert (each == each[0]).all() and each[0] % 8 == 0, name
    # eight neurons of every head of a value or query/key site are the most that one step takes
    most = 8 * BASE["heads"] * 2 * (BASE["hidden"] + 1)
    assert 0 <= free.after.encoder - made.after.encoder <= most
    assert made.after.encoder <= keep * made.before.encoder
    assert plan(scores, keep=keep, of="encoder", preset=preset, multiple=1) == free


def test_levels_taken_as_they_are_leave_multiples_too(tiny: Scores) -> None:
    made, free = (plan(tiny, preset="obce-2023", multiple=multiple) for multiple in (4, 1))
    for name, kept in made.kept.items():
        assert len(kept) % 4 == 0 and len(kept) >= len(free.kept[name]), name


def test_whole_model_is_kept(tiny: Scores) -> None:
    made = plan(tiny, keep=1.0)
    assert made.kept == {}
    assert made.after == made.before


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_levels_follow_the_rank_of_the_layers_median(preset: str) -> None:
    scores = make_scores(**{**TINY, "layers": 6}, seed=3)
    order = [4, 0, 5, 2, 1, 3]  # layers from the least to the greatest median r_f
    for place, layer in enumerate(order):
        scores.columns["rf"][scores.layer == layer] *= 100.0**place
    made = plan(scores, preset=preset, score="rf")
    check_shape(made, scores)
    for place, layer in enumerate(order):
        level = PRESETS[preset][place // 2]
        assert made.levels[str(layer)] == level
        gone = 64 - len(kept_of(made, layer, "intermediate", 64))
        assert gone == int(level * 64)


def test_a_level_is_not_cut_short_by_binary_rounding() -> None:
    made = plan(make_scores(**{**TINY, "inner": 90}), preset="obce-2023", score="rf")
    gone = {level: 90 - len(kept_of(made, int(layer), "intermediate", 90)) for layer, level in made.levels.items()}
    assert gone[0.7] == 63, "0.7 * 90 < 63 in float64"


def test_lowest_scores_go_first_and_ties_by_index(tiny: Scores) -> None:
    column = np.tile([3.0, 1.0, 1.0, 2.0], len(tiny) // 4)
    scores = make_scores(**TINY, std=np.where(tiny.constant, np.nan, column))
    made = plan(scores, keep=0.9, of="encoder", score="std")
    gone = np.setdiff1d(np.arange(64), kept_of(made, 1, "intermediate", 64))
    lowest = np.flatnonzero(column[:64] == 1.0)
    assert 0 < len(gone) < 32
    assert (gone == lowest[: len(gone)]).all()


def test_query_and_key_count_alike_in_a_pair(tiny: Scores) -> None:
    rf = tiny.columns["rf"].copy()
    query, key = tiny.rows(1, "query"), tiny.rows(1, "key")
    ranks = np.arange(32.0)
    rf[query], rf[key] = (
        1000 * ranks,
        ranks[::-1] / 1000,
    )  # opposite orders: every pair ties, so index decides
    made = plan(make_scores(**TINY, rf=rf), preset="obce-2023", score="rf")
    kept = kept_of(made, 1, "query", 32).reshape(4, -1)
    assert (kept % 8 >= 8 - kept.shape[1]).all()


def test_random_can_be_drawn_anew(tiny: Scores) -> None:
    first = plan(tiny, keep=0.8, score="random")
    assert plan(tiny, keep=0.8, score="random").kept == first.kept
    other = plan(tiny, keep=0.8, score="random", seed=7)
    assert other.kept != first.kept
    assert other.seed == 7
    assert other.after == first.after, "controls at one budget have one size"


def test_all_scores_give_the_same_widths_at_one_budget(tiny: Scores) -> None:
    def made(score: str) -> Plan:
        return plan(tiny, keep=0.8, preset="obce-2023", score=score, keep_constant=True)

    counts = [{name: len(kept) for name, kept in made(score).kept.items()} for score in SCORE_NAMES]
    assert all(count == counts[0] for count in counts)


@pytest.mark.parametrize("score", SCORE_NAMES)
def test_scores_of_cls_alone_keep_what_is_constant_there(tiny: Scores, score: str) -> None:
    value = plan(tiny, keep=0.8, score=score).kept.get("0.value", ())
    assert (value == ()) == (score in CLS_SCORES)
    assert "0.value" not in plan(tiny, keep=0.8, score=score, keep_constant=True).kept


def test_a_score_of_ones_own(tiny: Scores) -> None:
    def late(scores: Scores) -> np.ndarray:
        return np.where(scores.layer == 0, np.nan, -scores.index.astype(float))

    made = plan(tiny, keep=0.8, score=late)
    check_shape(made, tiny.with_column("late", late(tiny)))
    assert made.score == "late"
    assert not any(name.startswith("0.") for name in made.kept), "NaN is never ranked"
    assert made.kept["1.intermediate"] == tuple(range(len(made.kept["1.intermediate"])))
    assert plan(tiny.with_column("late", late(tiny)), keep=0.8, score="late") == made


class TestSensitivity:
    def curves(self) -> dict[str, list[tuple[float, float]]]:
        return {f"{layer}.{unit}": [(0.0, 0.0), (0.5, 1.0), (1.0, 2.0)] for layer in range(3) for unit in DEFAULT_UNITS}

    def test_steps_are_taken_where_they_cost_least(self, tiny: Scores) -> None:
        curves = self.curves()
        curves["1.intermediate"] = [(0.0, 0.0), (0.5, 0.001), (1.0, 9.0)]
        made = plan(tiny, keep=0.97, of="encoder", sensitivity=curves)
        check_shape(made, tiny)
        assert set(made.kept) == {"1.intermediate"}
        assert made.shares == "measured"
        more = plan(tiny, keep=0.8, of="encoder", sensitivity=curves)
        assert len(more.kept["1.intermediate"]) == 32, "up to the cliff, then elsewhere"
        assert len(more.kept) > 1
        check_shape(more, tiny)

    def test_a_cliff_first_spreads_over_the_way_behind_it(self, tiny: Scores) -> None:
        """Steps come in order: the first 0.1 costs as much as all, so the whole way costs little a step."""
        curves = self.curves()
        curves["2.value"] = [(0.0, 0.0), (0.1, 0.2), (1.0, 0.2)]
        curves["1.value"] = [(0.0, 0.0), (0.1, 0.1), (1.0, 9.0)]
        made = plan(tiny, keep=0.95, of="encoder", sensitivity=curves)
        assert len(made.kept["2.value"]) < 32 - 8, "far beyond the cliff"
        assert "1.value" not in made.kept

    @settings(max_examples=40, deadline=None)
    @given(seed=st.integers(0, 10_000), keep=st.floats(0.3, 1.0))
    def test_any_curves_meet_the_budget(self, seed: int, keep: float) -> None:
        scores = make_scores(**TINY)
        rng = np.random.default_rng(seed)
        curves = {
            name: [(float(x), float(rng.normal())) for x in np.sort(rng.random(rng.integers(1, 5)))]
            for name in self.curves()
        }
        made = plan(scores, keep=keep, of="encoder", sensitivity=curves)
        check_shape(made, scores)
        assert 0 <= keep * made.before.encoder - made.after.encoder < 4 * (4 * 32 + 3)

    def test_bad_requests(self, tiny: Scores) -> None:
        curves = self.curves()
        with pytest.raises(ValueError, match="sensitivity is given"):
            plan(tiny, preset="obce-2023", sensitivity=curves)
        with pytest.raises(ValueError, match="sensitivity is given"):
            plan(tiny, keep=0.5, preset="obce-2023", sensitivity=curves)
        for point in ((0.5, math.nan), (1.5, 0.0), ("half", 0.0), (0.5,), None):
            wrong: Any = {**curves, "1.value": [(0.0, 0.0), point]}
            with pytest.raises(ValueError, match=r"sensitivity's 1\.value holds .*, expected a share in \[0, 1\]"):
                plan(tiny, keep=0.5, sensitivity=wrong)
        for shares in ((0.5, 0.5), (0.5, 0.25)):
            wrong = {**curves, "1.value": [(0.0, 0.0), *((share, 1.0) for share in shares)]}
            with pytest.raises(ValueError, match=rf"1\.value has {shares[1]} after 0\.5, expected ascending shares"):
                plan(tiny, keep=0.5, sensitivity=wrong)
        with pytest.raises(ValueError, match=r"sensitivity's 1\.value holds no share above 0"):
            plan(tiny, keep=0.5, sensitivity={**curves, "1.value": [(0.0, 0.0)]})
        del curves["1.value"]
        with pytest.raises(ValueError, match=r"sensitivity has no 1\.value"):
            plan(tiny, keep=0.5, sensitivity=curves)


def test_floor_stops_the_cut(tiny: Scores) -> None:
    with pytest.raises(ValueError, match=r"keep is 0\.1 of encoder, but removing everything above the floor of 0\.5"):
        plan(tiny, keep=0.1, of="encoder", floor=0.5)
    with pytest.raises(ValueError, match="still leaves") as error:
        plan(tiny, keep=0.01, of="encoder", floor=0.5)
    least = float(str(error.value).split("still leaves ")[1].split(":")[0])
    check_shape(plan(tiny, keep=least + 1e-3, of="encoder", floor=0.5), tiny)


class TestHeads:
    def test_those_with_the_lowest_ranks_go_first(self, tiny: Scores) -> None:
        """Query's scale would decide alone if values were added up."""
        rf = tiny.columns["rf"].copy()
        for layer in (1, 2):
            for kind, order in (("query", [0, 1, 2, 3]), ("key", [1, 3, 0, 2]), ("value", [2, 3, 0, 1])):
                scale = 1e3 if kind == "query" else 1.0
                rf[tiny.rows(layer, kind)] = scale * (np.repeat(order, 8) * 8 + np.tile(np.arange(8), 4))
        made = plan(make_scores(**TINY, rf=rf), preset="obce-2023", score="rf", units=["heads"])
        for layer in (1, 2):  # sums of ranks: 3, 7, 2, 6
            gone = sorted(set(range(4)) - set(heads_kept(kept_of(made, layer, "value", 32), 4, 32)))
            assert 0 < len(gone) < 4
            assert gone == sorted([2, 0, 3, 1][: len(gone)])
        assert not any(name.startswith("0.") for name in made.kept), "constant at [CLS], so never ranked"
        check_shape(made, tiny)

    @pytest.mark.parametrize("score", CLOUD_SCORES)
    def test_clouds_rank_them_too(self, tiny: Scores, score: str) -> None:
        scores = with_clouds(tiny)
        clouds = scores.clouds
        assert clouds is not None
        orders = {"query": [0, 1, 2, 3], "key": [7, 7, 7, 7], "value": [1, 2, 0, 3], "context": [2, 3, 0, 1]}
        for kind, order in orders.items():
            rows = clouds.kind == CLOUD_KINDS.index(kind)
            clouds.columns[score][rows] = np.where(clouds.constant[rows], np.nan, np.tile(order, 3))
        made = plan(scores, preset="obce-2023", units=["heads"], head_score=score)
        assert made.head_score == score
        for layer, order in enumerate(([2, 3, 0, 1], [2, 0, 1, 3], [2, 0, 1, 3])):  # layer 0 by context alone
            gone = sorted(set(range(4)) - set(heads_kept(kept_of(made, layer, "query", 32), 4, 32)))
            assert gone == sorted(order[: len(gone)])
        assert "0.query" in made.kept
        check_shape(made, scores)

    def test_without_a_floor_all_of_a_layer_may_go(self, tiny: Scores) -> None:
        for floor, least in ((0, 0), (1 / 16, 1), (0.5, 2)):
            with pytest.raises(ValueError, match="still leaves") as error:
                plan(tiny, keep=1e-6, of="encoder", score="rf", units=["heads"], floor=floor)
            share = float(str(error.value).split("still leaves ")[1].split(":")[0])
            made = plan(tiny, keep=share + 1e-3, of="encoder", score="rf", units=["heads"], floor=floor)
            assert [len(kept_of(made, layer, "value", 32)) for layer in range(3)] == [32, 8 * least, 8 * least]
            check_shape(made, tiny)

    def test_rows_that_read_no_head_stay(self, tiny: Scores) -> None:
        """Without heads a row of attention_output has no weight that could go."""
        asked: dict[str, Any] = {"of": "encoder", "units": ["heads", "attention_output"], "floor": 0, "score": "rf"}
        assert "1.attention_output" in plan(tiny, keep=0.8, **asked).kept
        made = plan(tiny, keep=0.635, **asked)
        assert made.kept["1.value"] == made.kept["2.value"] == ()
        assert set(made.kept) == {
            "0.attention_output",
            *(f"{i}.{kind}" for i in (1, 2) for kind in ("query", "key", "value")),
        }
        check_shape(made, tiny)


class TestLayers:
    def test_the_lowest_sums_go_first(self, tiny: Scores) -> None:
        std = np.where(tiny.constant, np.nan, 1.0)
        std[tiny.layer == 1] = 0.5  # 0.5 x 224; layer 0 has 128 neurons that vary, layer 2 has 224
        scores = make_scores(**TINY, std=std)
        assert plan(scores, score="std", drop_layers=1).layers_dropped == (1,)
        made = plan(scores, score="std", drop_layers=2)
        assert made.layers_dropped == (0, 1)
        assert made.kept == {}
        assert made.levels == {"0": 1.0, "1": 1.0, "2": 0.0}
        check_shape(made, scores)

    def test_what_is_left_of_the_budget_is_cut_from_the_others(self, tiny: Scores) -> None:
        made = plan(tiny, keep=0.5, of="encoder", preset="obce-2023", drop_layers=1)
        check_shape(made, tiny)
        assert made.kept
        assert plan(tiny, keep=0.5, of="encoder", units=(), drop_layers=2).kept == {}
        with pytest.raises(ValueError, match=r"keep is 0.5 of encoder, but .* still leaves 0.6667"):
            plan(tiny, keep=0.5, of="encoder", units=(), drop_layers=1)

    def test_one_stays(self, tiny: Scores) -> None:
        with pytest.raises(ValueError, match="drop_layers is 3, but the model has 3 layers and at least one must stay"):
            plan(tiny, keep=0.5, drop_layers=3)


@pytest.mark.parametrize(
    "asked", [{}, {"units": ["output", "heads"], "drop_layers": 1, "head_score": "rf"}], ids=["plain", "all"]
)
def test_round_trip_through_json(tiny: Scores, asked: dict[str, Any]) -> None:
    made = plan(with_clouds(tiny), keep=0.7, preset="pbce-2025", score="std", **asked)
    assert made.units == tuple(unit for unit in UNITS if unit in asked.get("units", DEFAULT_UNITS))
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "other"}, "not a plan of obce"),
        ({"format_version": 99}, "format version 99"),
        ({"kept": 5}, "damaged"),
        ({"before": {"parameters": 1}}, "damaged"),
        ({"layers_dropped": None}, "damaged"),
    ],
)
def test_a_damaged_plan_is_refused(tiny: Scores, change: dict[str, Any], sentence: str) -> None:
    plain = {**plan(tiny, keep=0.7).to_dict(), **change}
    with pytest.raises(ValueError, match=sentence):
        Plan.from_dict(plain)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"keep": 0}, r"keep is 0, but must lie in \(0, 1\]"),
        ({"keep": 1.5}, "keep is 1.5, but must lie between 0 and 1"),
        ({"keep": -0.1}, "keep is -0.1"),
        ({"keep": float("nan")}, "keep is nan"),
        ({"keep": 0.5, "floor": 2}, "floor is 2"),
        ({"keep": 0.5, "of": "layers"}, "of is 'layers', but must be 'total' or 'encoder'"),
        ({"keep": 0.5, "preset": "obce"}, "preset is 'obce', but must be one of obce-2023, pbce-2025"),
        ({"keep": 0.5, "score": "magic"}, "score is 'magic'"),
        ({}, "keep and preset are both missing"),
        ({"keep": 0.5, "units": "heads"}, "units is 'heads', but must be a list of distinct names of query_key, value"),
        ({"keep": 0.5, "units": ["neurons"]}, r"units is \['neurons'\], but must be a list"),
        ({"keep": 0.5, "units": ["output", "output"]}, "must be a list of distinct names"),
        ({"keep": 0.5, "units": []}, "units is empty: name what may be removed, or give drop_layers"),
        ({"keep": 0.5, "units": ["heads", "value"]}, "units is heads, value, but heads take query, key and value"),
        ({"keep": 0.5, "units": ["heads"], "head_score": "std"}, "head_score is 'std', but must be one of rf, total_p"),
        ({"keep": 0.5, "head_score": "rf"}, "head_score is 'rf', but units has no heads to rank"),
        ({"keep": 0.5, "units": ["heads"], "head_score": "rf"}, "head_score is 'rf', but the scores have no clouds"),
        ({"keep": 0.5, "drop_layers": -1}, "drop_layers is -1, but must be 0 or more"),
        ({"keep": 0.5, "multiple": 0}, "multiple is 0, but must be 1 or more"),
    ],
)
def test_wrong_arguments(tiny: Scores, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        plan(tiny, **arguments)


@pytest.mark.parametrize("keep", ["0.5", True, None])
def test_keep_must_be_a_number(tiny: Scores, keep: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="keep"):
        plan(tiny, keep=keep)


@pytest.mark.parametrize("count", [1.0, True, "1"])
@pytest.mark.parametrize("name", ["drop_layers", "multiple"])
def test_counts_must_be_integers(tiny: Scores, name: str, count: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} is"):
        plan(tiny, keep=0.5, **{name: count})


def test_another_model_is_refused(tiny: Scores, make_bert: Callable[..., BertModel]) -> None:
    with pytest.raises(ValueError, match="the scores are of the model with hash m"):
        plan(tiny, make_bert(), keep=0.5)
