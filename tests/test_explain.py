"""Explanations of single neurons: the numbers of the table, the texts of the outputs, and the fate under a plan."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from obce.corpus import Corpus, read_corpus
from obce.explain import explain, explain_many
from obce.plan import plan
from obce.scoring import score

if TYPE_CHECKING:
    from collections.abc import Callable

    from obce.scores import Scores
    from transformers import BertModel, PreTrainedTokenizerBase

NEURON = "2.intermediate.7"


@pytest.fixture(scope="module")
def model(make_bert: Callable[..., BertModel]) -> BertModel:
    return make_bert(seed=2).eval()


@pytest.fixture(scope="module")
def corpus(texts: list[str]) -> Corpus:
    return read_corpus(texts[:120])


@pytest.fixture(scope="module")
def scores(model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> Scores:
    return score(model, tiny_tokenizer, corpus, max_length=24, shard_texts=40, batch_tokens=300, cloud_texts=0)


@pytest.fixture(scope="module")
def known(model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus, scores: Scores) -> dict[str, Any]:
    return {"scores": scores, "model": model, "tokenizer": tiny_tokenizer, "texts": corpus}


@pytest.mark.parametrize("neuron", [NEURON, "0.attention_output.3", "1.query.31", "2.output.0"])
def test_numbers_are_those_of_the_table(known: dict[str, Any], scores: Scores, neuron: str) -> None:
    found = explain(neuron=neuron, **known)
    row = scores[neuron]
    assert found.gap is not None
    assert np.float32(found.gap.width) == np.float32(row["rf"]), "the outputs have the bits of the scoring"
    assert found.gap.std == pytest.approx(row["std"], rel=1e-6)
    assert found.values.max() - found.values.min() == pytest.approx(row["range"], rel=1e-6)
    for name, at in found.standings.items():
        assert at.value == row[name]
    layer, kind, index = neuron.split(".")
    std = scores.columns["std"][scores.rows(int(layer), kind)]
    standing = found.standings["std"]
    assert standing.rank == 1 + (std > std[int(index)]).sum()
    assert standing.percentile == pytest.approx(100 * (std < std[int(index)]).mean())
    assert found.stability["std"] == scores.stability("std").by_kind[kind][0]


def test_texts_are_those_of_the_outputs(known: dict[str, Any], corpus: Corpus, scores: Scores) -> None:
    found = explain(neuron=NEURON, tail=4, **known)
    order = np.argsort(found.values, kind="stable")
    assert [one.number for one in found.low] == order[:4].tolist()
    assert [one.number for one in found.high] == order[::-1][:4].tolist()
    for one in (*found.low, *found.high, *found.edge):
        assert one.text == corpus.texts[one.number]
        assert one.value == found.values[one.number]
        assert one.tokens[0] == "[CLS]" and one.tokens[-1] == "[SEP]"
        assert len(one.tokens) == len(one.at_tokens) <= 24
        assert one.at_tokens[0] == pytest.approx(one.value, rel=1e-3, abs=1e-4), "[CLS] is the first token"
    assert found.gap is not None
    values = [one.value for one in found.edge]
    assert values == sorted(values)
    assert {found.gap.below, found.gap.above} <= set(values)
    at = {name: int(scores.texts[name][scores.rows(2, "intermediate").start + 7]) for name in ("least", "greatest")}
    assert (at["least"], at["greatest"]) == (found.low[0].number, found.high[0].number)


def test_a_split_is_judged_on_other_texts(known: dict[str, Any], texts: list[str]) -> None:
    halves = explain(neuron=NEURON, **known)
    assert (halves.fitted_on, halves.judged_on) == ("the 60 texts of the first half", "60 texts of the second half")
    other = explain(neuron=NEURON, held_out=texts[120:200], **known)
    assert (other.fitted_on, other.judged_on) == ("the 120 scored texts", "80 other texts")
    assert other.recurs is not None and other.recurs.n == 80
    assert other.balanced is not None and other.balanced.n_below + other.balanced.n_above == 120
    for found in (halves, other):
        assert found.recurs is not None
        assert (found.verdict == "no split that recurs") == (not found.recurs.recurs)


def test_a_planted_neuron_is_named_and_noise_is_not(
    make_bert: Callable[..., BertModel], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Layer 0, intermediate 5 says at [CLS] whether there is a digit; intermediate 6 says noise."""
    rng = np.random.default_rng(0)
    words = ["river", "music", "stone", "house", "church", "island", "village", "season", "player", "school"]
    corpus = read_corpus(
        [
            f"{' '.join(rng.choice(words, 6))} {rng.integers(1000) if i % 4 == 0 else ''} {i % 7 * 'the '}."
            for i in range(600)
        ]
    )
    held_out = read_corpus(
        [f"{' '.join(rng.choice(words, 7))} {rng.integers(1000) if i % 4 == 0 else ''} ." for i in range(400)]
    )
    model = make_bert(seed=4).eval()
    digits = torch.tensor([int(any(letter.isdigit() for letter in token or "")) for token in _tokens(tiny_tokenizer)])
    seen: list[torch.Tensor] = []
    model.embeddings.word_embeddings.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))

    def plant(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        ids = seen[-1]
        noise = torch.sin(ids.double().square().sum(1) * 12.9898).float()  # of the text alone
        output = output.clone()
        output[:, 0, 5] = digits[ids].amax(1).float() + 0.05 * noise
        output[:, 0, 6] = torch.erfinv(0.999 * noise.asin() * 2 / torch.pi)
        return output

    handle = model.encoder.layer[0].intermediate.dense.register_forward_hook(plant)
    scores = score(model, tiny_tokenizer, corpus, max_length=40, cloud_texts=0, effect_texts=0)
    handle.remove()
    model.encoder.layer[0].intermediate.dense.register_forward_hook(plant)
    planted, noise = explain_many(
        scores,
        ["0.intermediate.5", "0.intermediate.6"],
        model,
        tiny_tokenizer,
        corpus,
        held_out=held_out,
    )
    assert planted.reason is not None
    assert planted.reason.words == "contains a digit"
    assert min(planted.reason.precision, planted.reason.recall) > 0.95
    assert planted.verdict.startswith("a split that recurs; the plainest fact: contains a digit")
    assert noise.verdict == "no split that recurs"


def _tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return tokenizer.convert_ids_to_tokens(list(range(256)))


def test_fate_and_nearest_under_a_plan(known: dict[str, Any], scores: Scores) -> None:
    made = plan(scores, keep=0.6, of="encoder", score="std")
    kept = set(made.kept["2.intermediate"])
    gone = min(set(range(64)) - kept)
    found = {
        one.name: one for one in explain_many(neurons=[f"2.intermediate.{i}" for i in range(64)], plan=made, **known)
    }
    values = np.stack([found[f"2.intermediate.{i}"].values for i in range(64)]).astype(float)
    assert {int(name.split(".")[2]) for name, one in found.items() if one.fate == "kept"} == kept
    nearest = found[f"2.intermediate.{gone}"].nearest
    assert nearest is not None
    correlations = {i: np.corrcoef(values[gone], values[i])[0, 1] for i in kept}
    best = max(correlations, key=lambda i: abs(correlations[i]))
    assert nearest == (f"2.intermediate.{best}", pytest.approx(correlations[best], abs=1e-6))
    dropped = plan(scores, score="std", drop_layers=1)
    layer = dropped.layers_dropped[0]
    assert explain(neuron=f"{layer}.output.0", plan=dropped, **known).fate == "removed"


def test_a_constant_neuron_has_no_split(known: dict[str, Any]) -> None:
    found = explain(neuron="0.value.3", **known)
    assert found.constant
    assert (found.gap, found.balanced, found.reason, found.edge) == (None, None, None, ())
    assert found.verdict == "constant at [CLS]: no split"
    assert "rf" not in found.standings and "effect" in found.standings


def test_it_shows_itself_and_is_json(known: dict[str, Any]) -> None:
    found = explain(neuron=NEURON, **known)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["standings"]["rf"]["value"] == found.standings["rf"].value
    assert len(plain["values"]) == 120
    assert "<script" not in explain(neuron=NEURON, **known)._repr_html_()
    assert NEURON in found._repr_html_()


def test_without_sums_over_tokens(model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> None:
    """The scoring then computed the last layer at [CLS] alone, in other bits."""
    scores = score(model, tiny_tokenizer, corpus, max_length=24, tokens=False, cloud_texts=0)
    for neuron in ("1.intermediate.3", "2.output.1"):
        found = explain(scores, neuron, model, tiny_tokenizer, corpus)
        assert found.gap is not None
        assert np.float32(found.gap.width) == np.float32(scores[neuron]["rf"])


def test_what_does_not_belong_together(
    known: dict[str, Any], texts: list[str], make_bert: Callable[..., BertModel], scores: Scores
) -> None:
    with pytest.raises(KeyError, match=r"there is no 64"):
        explain(neuron="2.intermediate.64", **known)
    with pytest.raises(ValueError, match="texts of list in memory are not those that were scored"):
        explain(neuron=NEURON, **{**known, "texts": texts[:119]})
    with pytest.raises(ValueError, match="model is not the one that was scored"):
        explain(neuron=NEURON, **{**known, "model": make_bert(seed=9)})
    with pytest.raises(ValueError, match="tail is 0"):
        explain(neuron=NEURON, tail=0, **known)
