from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from obce.plan import PRESETS, Plan, plan
from obce.scores import SCORE_NAMES, Scores
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
    return np.array(made.kept.get(f"{layer}.{kind}", range(width)))


def check_shape(made: Plan, scores: Scores) -> None:
    """What every plan must satisfy, whatever it was asked."""
    facts = scores.meta["architecture"]
    hidden, heads, inner = facts["hidden_size"], facts["num_attention_heads"], facts["intermediate_size"]
    removed = 0
    for layer in scores.layers():
        query, key = (kept_of(made, layer, kind, hidden) for kind in ("query", "key"))
        value, middle = kept_of(made, layer, "value", hidden), kept_of(made, layer, "intermediate", inner)
        assert (query == key).all()
        for kept in (query, value):
            assert len(set(np.bincount(kept // (hidden // heads), minlength=heads))) == 1
        for kind, kept, width in (
            ("query", query, hidden),
            ("value", value, hidden),
            ("intermediate", middle, inner),
        ):
            assert (np.diff(kept) > 0).all()
            assert kept[0] >= 0
            assert kept[-1] < width
            assert len(kept) >= made.floor * width
            gone = np.setdiff1d(np.arange(width), kept)
            assert not scores.constant[scores.rows(layer, kind)][gone].any(), "a constant neuron is never ranked"
        removed += 2 * (hidden + 1) * (hidden - len(query))
        removed += (2 * hidden + 1) * (hidden - len(value) + inner - len(middle))
    assert not any(name.endswith(("attention_output", ".output")) for name in made.kept)
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


@settings(max_examples=60, deadline=None)
@given(
    where=st.floats(0.01, 1),
    of=st.sampled_from(["total", "encoder"]),
    preset=st.sampled_from([None, *PRESETS]),
    score=st.sampled_from(SCORE_NAMES),
)
def test_a_budget_is_met_to_one_neuron(where: float, of: Any, preset: str | None, score: str) -> None:
    scores = make_scores(**TINY)
    with pytest.raises(ValueError, match="still leaves") as error:
        plan(scores, keep=1e-6, of=of, floor=0)
    least = float(str(error.value).split("still leaves ")[1].split(":")[0])
    keep = least + where * (1 - least)
    made = plan(scores, keep=keep, of=of, preset=preset, score=score, floor=0)
    check_shape(made, scores)
    whole = made.before.parameters if of == "total" else made.before.encoder
    kept = made.after.parameters if of == "total" else made.after.encoder
    assert 0 <= keep * whole - kept < 2 * TINY["hidden"] + 2
    assert made.kept_share == kept / whole


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
    made = plan(scores, preset=preset)
    check_shape(made, scores)
    for place, layer in enumerate(order):
        level = PRESETS[preset][place // 2]
        assert made.levels[str(layer)] == level
        gone = 64 - len(kept_of(made, layer, "intermediate", 64))
        assert gone == int(level * 64)


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
    made = plan(make_scores(**TINY, rf=rf), preset="obce-2023")
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
    counts = [
        {name: len(kept) for name, kept in plan(tiny, keep=0.8, preset="obce-2023", score=score).kept.items()}
        for score in SCORE_NAMES
    ]
    assert all(count == counts[0] for count in counts)


def test_floor_stops_the_cut(tiny: Scores) -> None:
    with pytest.raises(ValueError, match=r"keep is 0\.1 of encoder, but removing everything above the floor of 0\.5"):
        plan(tiny, keep=0.1, of="encoder", floor=0.5)
    with pytest.raises(ValueError, match="still leaves") as error:
        plan(tiny, keep=0.01, of="encoder", floor=0.5)
    least = float(str(error.value).split("still leaves ")[1].split(":")[0])
    check_shape(plan(tiny, keep=least + 1e-3, of="encoder", floor=0.5), tiny)


def test_round_trip_through_json(tiny: Scores) -> None:
    made = plan(tiny, keep=0.7, preset="pbce-2025", score="std")
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "other"}, "not a plan of obce"),
        ({"format_version": 99}, "format version 99"),
        ({"kept": 5}, "damaged"),
        ({"before": {"parameters": 1}}, "damaged"),
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
        ({"keep": 0.5, "score": "taylor"}, "score is 'taylor'"),
        ({}, "keep and preset are both missing"),
    ],
)
def test_wrong_arguments(tiny: Scores, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        plan(tiny, **arguments)


@pytest.mark.parametrize("keep", ["0.5", True, None])
def test_keep_must_be_a_number(tiny: Scores, keep: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="keep"):
        plan(tiny, keep=keep)


def test_another_model_is_refused(tiny: Scores, make_bert: Callable[..., BertModel]) -> None:
    with pytest.raises(ValueError, match="the scores are of the model with hash m"):
        plan(tiny, make_bert(), keep=0.5)
