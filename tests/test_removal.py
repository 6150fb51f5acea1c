"""What stands in for removed neurons, and the texts they set apart: read from weights and outputs, checked by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from obce.corpus import Corpus, read_corpus
from obce.explain import SEPARATED, examine
from obce.plan import plan
from obce.prune import prune
from obce.removal import Pruned
from obce.scoring import score
from obce.sites import find_sites
from obce.splits import balanced_gap, largest_gap, recurrence

if TYPE_CHECKING:
    from collections.abc import Callable

    from obce.plan import Plan
    from obce.scores import Scores
    from transformers import BertModel, PreTrainedTokenizerBase

TWIN, GONE = 11, 37


@pytest.fixture(scope="module")
def model(make_bert: Callable[..., BertModel]) -> BertModel:
    """Intermediate neurons 11 and 37, and value neurons 11 and 13, of layer 1 are twins."""
    model = make_bert(seed=6).eval()
    layer = model.encoder.layer[1]
    with torch.no_grad():
        for linear, twin, gone in ((layer.intermediate.dense, TWIN, GONE), (layer.attention.self.value, 11, 13)):
            linear.weight[gone] = linear.weight[twin]
            linear.bias[gone] = linear.bias[twin]
    return model


@pytest.fixture(scope="module")
def corpus(texts: list[str]) -> Corpus:
    return read_corpus(texts[:150])


@pytest.fixture(scope="module")
def scores(model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> Scores:
    return score(model, tiny_tokenizer, corpus, max_length=24, effect_texts=0)


def without(scores: Scores, **removed: tuple[int, ...]) -> Plan:
    """A plan that removes some neurons of layer 1 and keeps all others."""
    everything = plan(scores, keep=1.0, score="std")
    widths = {"intermediate": 64}
    kept = {
        f"1.{kind}": tuple(i for i in range(widths.get(kind, 32)) if i not in gone) for kind, gone in removed.items()
    }
    return replace(everything, kept=kept)


def cut(
    model: BertModel, tokenizer: Any, corpus: Corpus, made: Plan, repair: str, scores: Scores
) -> tuple[BertModel, Pruned]:
    given: dict[str, Any] = {"scores": scores} if repair == "mean" else {}
    if repair == "least_squares":
        given = {"texts": corpus, "tokenizer": tokenizer, "max_length": 24, "ridge": 1e-6}
    small: Any = prune(model, made, repair=repair, **given)
    return small, Pruned(model, small, made)


def test_a_twin_takes_over(
    model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus, scores: Scores
) -> None:
    made = without(scores, intermediate=(GONE,), value=(13, 3, 17, 25))
    _, pruned = cut(model, tiny_tokenizer, corpus, made, "least_squares", scores)
    names = [f"1.intermediate.{GONE}", "1.value.13", "1.intermediate.0"]
    gone, value, stays = examine(scores, model, tiny_tokenizer, corpus, neurons=names, plan=made, pruned=pruned).neurons
    assert (gone.fate, stays.fate, stays.replaced) == ("removed", "kept", None)
    for one, twin in ((gone, f"1.intermediate.{TWIN}"), (value, "1.value.11")):
        assert one.replaced is not None
        assert one.replaced.repair == "least_squares"
        first = one.replaced.carriers[0]
        assert first.name == twin
        assert first.share == pytest.approx(1, abs=0.1), "its column was added to that of its twin"
        assert first.correlation == pytest.approx(1, abs=1e-5)
        assert one.nearest == (twin, pytest.approx(1, abs=1e-5))
        shares = [abs(carrier.share) for carrier in one.replaced.carriers]
        assert shares == sorted(shares, reverse=True)


def test_shares_are_what_they_are_said_to_be(
    model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus, scores: Scores
) -> None:
    made = without(
        scores,
        intermediate=(3, GONE),
        query=(0, 9, 18, 30),
        key=(0, 9, 18, 30),
        output=(5,),
    )
    small, pruned = cut(model, tiny_tokenizer, corpus, made, "least_squares", scores)
    sites = {site.name: site for site in find_sites(model)}
    dense = model.encoder.layer[1]
    narrow = small.encoder.layer[1]
    rows = [i for i in range(32) if i != 5]
    kept = list(made.kept["1.intermediate"])
    change = (narrow.output.dense.weight - dense.output.dense.weight[rows][:, kept]).double()
    own = dense.output.dense.weight[rows, 3].double()
    found = pruned.replacement(sites["1.intermediate"], 3, np.linspace(0, 1, 64), 0.0)
    assert found is not None
    expected = {f"1.intermediate.{kept[i]}": float(change[:, i] @ own / (own @ own)) for i in range(len(kept))}
    best = sorted(expected, key=lambda name: -abs(expected[name]))[:5]
    assert [one.name for one in found.carriers] == best
    for one in found.carriers:
        assert one.share == pytest.approx(expected[one.name], rel=1e-4)
        assert one.correlation == pytest.approx(int(one.name.split(".")[2]) / 63)
    kept = list(made.kept["1.query"])
    change = (narrow.attention.self.query.weight - dense.attention.self.query.weight[kept]).double()
    own = dense.attention.self.query.weight[9].double()
    for kind in ("query", "key"):
        found = pruned.replacement(sites[f"1.{kind}"], 9, np.zeros(32), 0.0)
        assert found is not None
        assert "go in pairs" in found.words
        for one in found.carriers:
            at = kept.index(int(one.name.split(".")[2]))
            assert one.name.startswith(f"1.{kind}.")
            assert one.share == pytest.approx(float(change[at] @ own / (own @ own)), rel=1e-4)
        assert 8 <= int(found.carriers[0].name.split(".")[2]) < 16, "keys are predicted inside their head"
    found = pruned.replacement(sites["1.output"], 5, np.zeros(32), 0.0)
    assert found is not None
    assert found.constant == pytest.approx(float(narrow.output.dense.bias[5]))
    assert pruned.replacement(sites["1.output"], 6, np.zeros(32), 0.0) is None


def test_constants_and_nothing(
    model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus, scores: Scores
) -> None:
    made = without(scores, intermediate=(3,), output=(5,), query=(0, 8, 16, 24), key=(0, 8, 16, 24))
    sites = {site.name: site for site in find_sites(model)}
    mean = float(scores.columns["token_mean"][scores.rows(1, "intermediate").start + 3])
    for repair, constant, words in (("mean", mean, f"{mean:.4g}"), ("none", 0.0, "nothing replaces it")):
        small, pruned = cut(model, tiny_tokenizer, corpus, made, repair, scores)
        found = pruned.replacement(sites["1.intermediate"], 3, np.zeros(64), mean)
        assert found is not None
        assert (found.constant, found.carriers) == (constant, ())
        assert words in found.words
        of_stream = pruned.replacement(sites["1.output"], 5, np.zeros(32), 0.0)
        assert of_stream is not None
        assert of_stream.constant == float(small.encoder.layer[1].output.dense.bias[5])
        pair = pruned.replacement(sites["1.key"], 8, np.zeros(32), 0.0)
        assert pair is not None and "nothing replaces it" in pair.words


def test_a_dropped_layer(
    model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus, scores: Scores
) -> None:
    made = plan(scores, score="std", drop_layers=1)
    _, pruned = cut(model, tiny_tokenizer, corpus, made, "none", scores)
    sites = {site.name: site for site in find_sites(model)}
    name = f"{made.layers_dropped[0]}.value"
    found = pruned.replacement(sites[name], 0, np.zeros(32), 0.0)
    assert found is not None and f"whole layer {made.layers_dropped[0]} goes" in found.words


def test_another_models_weights_are_refused(
    model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus, scores: Scores
) -> None:
    made, other = without(scores, intermediate=(3,)), without(scores, intermediate=(4,))
    small, _ = cut(model, tiny_tokenizer, corpus, made, "none", scores)
    with pytest.raises(ValueError, match="is not what this plan cuts"):
        Pruned(model, small, other)
    with torch.no_grad():
        small.encoder.layer[0].intermediate.dense.weight[0, 0] += 1
    with pytest.raises(ValueError, match="is not what this plan cuts"):
        Pruned(model, small, made)


def test_texts_that_removed_neurons_set_apart(
    model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus, scores: Scores, texts: list[str]
) -> None:
    made = plan(scores, keep=0.7, score="std")
    found = examine(scores, model, tiny_tokenizer, corpus, plan=made, removal=True).removal
    assert found is not None
    names = [
        f"{layer}.{kind}.{i}"
        for layer, kind in scores.sites()
        for i in range(scores.rows(layer, kind).stop - scores.rows(layer, kind).start)
    ]
    every = examine(scores, model, tiny_tokenizer, corpus, neurons=names, plan=made).neurons
    for what in ("removed", "kept"):
        here = [one for one in every if one.fate == what]
        isolates = [one for one in here if one.gap and min(one.gap.n_below, one.gap.n_above) <= 1]
        recurs = [one for one in here if one.recurs is not None and one.recurs.recurs]
        counts = (len(here), sum(not one.constant for one in here), len(recurs), len(isolates))
        assert found.counts[what] == counts
    by_name = {one.name: one for one in every}
    listed = sorted(
        (one for one in every if one.fate == "removed" and one.gap and min(one.gap.n_below, one.gap.n_above) <= 1),
        key=lambda one: -one.gap.width / one.gap.std,  # type: ignore[union-attr]
    )
    assert [one.name for one in found.isolating] == [one.name for one in listed[:SEPARATED]]
    for one in found.isolating:
        gap = by_name[one.name].gap
        assert gap is not None
        extreme = by_name[one.name].high[0] if gap.high else by_name[one.name].low[0]
        assert one.texts[0] == (extreme.number, corpus.texts[extreme.number])
        assert one.small == min(gap.n_below, gap.n_above) == len(one.texts)
        assert one.gap == pytest.approx(gap.width / gap.std, rel=1e-5)
    for one in found.recurring:
        assert by_name[one.name].fate == "removed"
        assert one.verdict == by_name[one.name].verdict
    with pytest.raises(ValueError, match="plan is not given"):
        examine(scores, model, tiny_tokenizer, corpus, removal=True)


def test_a_planted_split_is_listed_and_has_a_page(
    make_bert: Callable[..., BertModel], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Layer 0, intermediate 5 says at [CLS] whether there is a digit; the plan removes it."""
    rng = np.random.default_rng(0)
    words = ["river", "music", "stone", "house", "church", "island", "village", "season", "player", "school"]
    corpus = read_corpus(
        [f"{' '.join(rng.choice(words, 7))} {rng.integers(1000) if i % 4 == 0 else ''} ." for i in range(400)]
    )
    model = make_bert(seed=4).eval()
    tokens = tiny_tokenizer.convert_ids_to_tokens(list(range(256)))
    digits = torch.tensor([int(any(letter.isdigit() for letter in token or "")) for token in tokens])
    seen: list[torch.Tensor] = []
    model.embeddings.word_embeddings.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))

    def plant(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        ids = seen[-1]
        output = output.clone()
        output[:, 0, 5] = digits[ids].amax(1).float() + 0.05 * torch.sin(ids.double().square().sum(1)).float()
        return output

    model.encoder.layer[0].intermediate.dense.register_forward_hook(plant)
    scores = score(model, tiny_tokenizer, corpus, max_length=40, cloud_texts=0, effect_texts=0)
    everything = plan(scores, keep=1.0, score="std")
    made = replace(everything, kept={"0.intermediate": tuple(i for i in range(64) if i != 5)})
    found = examine(scores, model, tiny_tokenizer, corpus, plan=made, removal=True)
    assert found.removal is not None
    (one,) = found.removal.recurring
    assert one.name == "0.intermediate.5"
    assert one.verdict.startswith("a split that recurs; the plainest fact: contains a digit")
    digit = [any(letter.isdigit() for letter in text) for text in corpus.texts]
    assert one.small == sum(digit)
    assert all(digit[number] for number, _ in one.texts) and len(one.texts) == 5
    (page,) = found.neurons
    assert page.name == "0.intermediate.5"
    assert page.high[0].tokens[0] == "[CLS]"
    assert page.high[0].at_tokens[0] == pytest.approx(page.high[0].value, abs=1e-6)


def test_screening_is_that_of_one_neuron_at_a_time() -> None:
    from obce.splits import screen

    rng = np.random.default_rng(1)
    values = np.concatenate(
        [
            rng.standard_normal((500, 40)),
            rng.standard_normal((500, 20)) + 6.0 * (rng.random((500, 20)) < 0.1),
            rng.integers(0, 5, (500, 10)),
        ],
        axis=1,
    ).astype(np.float32)
    fit = np.arange(500) % 2 == 0
    found = screen(values[fit], values[~fit])
    assert found is not None
    assert found.recurs[40:60].any() and not found.recurs[:40].all()
    for i in range(values.shape[1]):
        gap = balanced_gap(values[fit][:, i])
        assert gap is not None
        judged = recurrence(gap, values[~fit][:, i])
        assert (found.below[i], found.above[i], found.high[i]) == (gap.below, gap.above, gap.high)
        assert found.p[i] == pytest.approx(judged.p, rel=1e-9)
        assert found.recurs[i] == judged.recurs
    assert screen(values[:1], values) is None
    assert largest_gap(values[:, 0]).width > 0
