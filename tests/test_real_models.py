"""The method on a trained encoder and real sentences, and the published sizes on BERT Base and Large."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from obce.capture import capture
from obce.corpus import Corpus, read_corpus, tokenize
from obce.evaluate import count_parameters, embed, fidelity, flops, weight_bytes
from obce.plan import plan
from obce.prune import masked, prune
from obce.run import load_model, load_tokenizer
from obce.scores import Scores
from obce.scoring import CONSTANT_TOLERANCE, MemoryStore, rounding_scale, score
from obce.sites import find_sites

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

pytestmark = pytest.mark.minilm


@pytest.fixture(scope="module")
def minilm(minilm_dir: Path) -> PreTrainedModel:
    return load_model(minilm_dir)


@pytest.fixture(scope="module")
def tokenizer(minilm_dir: Path) -> Any:
    return load_tokenizer(minilm_dir)


@pytest.fixture(scope="module")
def sentences(wikipedia: Path) -> Corpus:
    return read_corpus(wikipedia, limit=200)


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture(scope="module")
def scores(minilm: PreTrainedModel, tokenizer: Any, sentences: Corpus, store: MemoryStore) -> Scores:
    return score(minilm, tokenizer, sentences, store=store, read="mean")


def test_rf_of_500_neurons_is_what_ripser_finds(scores: Scores, store: MemoryStore) -> None:
    ripser = pytest.importorskip("ripser", reason="ripser is the peer; requirements/dev.txt has it").ripser
    chosen = np.random.default_rng(0).choice(np.flatnonzero(~scores.constant), 500, replace=False)
    values = np.concatenate(
        [
            np.concatenate([store.read(name, f"values.{layer}") for layer in scores.layers()], axis=1)
            for name in store.names()
        ]
    )
    assert values.shape == (200, len(scores))
    for row in chosen:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ripser warns that a cloud has more points than coordinates
            deaths = ripser(values[:, row, None], maxdim=0)["dgms"][0][:, 1]
        largest = deaths[np.isfinite(deaths)].max()
        assert scores.columns["rf"][row] == pytest.approx(largest, rel=1e-5)


def test_the_encoder_has_the_neurons_it_should(scores: Scores) -> None:
    assert len(scores) == 20_736
    assert scores.constant.sum() == 3 * 384
    first = (scores.layer == 0) & (scores.site < 3)
    assert (scores.constant == first).all()


def test_the_constant_neurons_stand_clearly_apart(minilm: PreTrainedModel, tokenizer: Any, sentences: Corpus) -> None:
    """The tolerance lies far from both sides: above rounding noise, below the least that varies."""
    noise, signal = 0.0, np.inf
    for layer in capture(minilm, tokenize(sentences, tokenizer), find_sites(minilm)):
        for kind, values in layer.outputs.items():
            relative = np.ptp(values, axis=1) / rounding_scale(values.min(axis=1), values.max(axis=1))
            if layer.layer == 0 and kind in ("query", "key", "value"):
                noise = max(noise, float(relative.max()))
            else:
                signal = min(signal, float(relative.min()))
    assert noise < CONSTANT_TOLERANCE / 8
    assert signal > CONSTANT_TOLERANCE * 8


def test_std_is_reproducible_and_rf_is_not(scores: Scores) -> None:
    assert scores.stability("std").spearman > 0.85
    assert scores.stability("rf").spearman < 0.5


@pytest.mark.parametrize("repair", ["none", "mean", "least_squares"])
def test_pruned_equals_masked_on_padded_batches(
    repair: str, minilm: PreTrainedModel, tokenizer: Any, sentences: Corpus, scores: Scores
) -> None:
    made = plan(scores, minilm, keep=0.465, of="encoder", preset="obce-2023")
    given = {"texts": sentences.texts[:60], "tokenizer": tokenizer} if repair == "least_squares" else {"scores": scores}
    small = prune(minilm, made, repair=repair, **given)
    assert count_parameters(small) == (made.after.parameters, made.after.encoder)
    assert weight_bytes(small) == made.after.bytes
    assert flops(small) == made.after.flops
    assert flops(minilm) == made.before.flops
    batch = tokenizer(list(sentences.texts[:24]), padding=True, truncation=True, max_length=128, return_tensors="pt")
    assert (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        with masked(minilm, made, repair=repair, **given):
            expected = minilm(**batch)
        found = small(**batch)
    real = batch["attention_mask"].bool()
    assert (found.last_hidden_state - expected.last_hidden_state)[real].abs().max() < 1e-5
    assert (found.pooler_output - expected.pooler_output).abs().max() < 1e-5


def test_a_light_cut_keeps_the_embeddings(
    minilm: PreTrainedModel, tokenizer: Any, wikipedia: Path, scores: Scores
) -> None:
    held_out = tokenize(read_corpus(wikipedia).texts[200:260], tokenizer)
    dense = embed(minilm, held_out)
    by_share = [
        fidelity(
            dense,
            embed(prune(minilm, plan(scores, keep=k, of="encoder"), repair="mean", scores=scores), held_out),
        )
        for k in (1.0, 0.95, 0.8)
    ]
    assert by_share[0] == pytest.approx(1)
    assert by_share[0] > by_share[1] > by_share[2] > 0.5


def test_effect_and_least_squares_keep_more_than_the_paper_s_way(
    minilm: PreTrainedModel, tokenizer: Any, wikipedia: Path, sentences: Corpus, scores: Scores
) -> None:
    """At one size, on sentences that took no part: the score and the repair each help."""
    held_out = tokenize(read_corpus(wikipedia).texts[200:300], tokenizer)
    dense = embed(minilm, held_out)
    found = {}
    for name in ("effect", "rf"):
        made = plan(scores, keep=0.7, of="encoder", score=name, keep_constant=True)
        for repair in ("least_squares", "none"):
            small = prune(minilm, made, repair=repair, texts=sentences, tokenizer=tokenizer)
            found[name, repair] = fidelity(dense, embed(small, held_out))
    assert found["effect", "least_squares"] > found["rf", "least_squares"] + 0.02
    assert found["effect", "least_squares"] > found["effect", "none"] + 0.05
    assert found["rf", "least_squares"] > found["rf", "none"] + 0.05


PUBLISHED = {
    "base": ({}, {"obce-2023": 0.5847, "pbce-2025": 0.47}),
    "large": (
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        {"obce-2023": 0.523, "pbce-2025": 0.42},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_on_the_real_configurations(size: str, tokenizer: Any, sentences: Corpus) -> None:
    """Random weights: sizes depend on the configuration alone."""
    from transformers import BertConfig, BertModel

    dimensions, shares = PUBLISHED[size]
    torch.manual_seed(0)
    model = BertModel(BertConfig(**dimensions)).eval()
    scores = score(model, tokenizer, list(sentences.texts[:8]), max_length=16, effect_texts=0)
    assert len(scores) == {"base": 82_944, "large": 221_184}[size]
    for preset, keep in shares.items():
        made = plan(scores, keep=keep, of="total", preset=preset, score="rf")
        small = prune(model, made, repair="mean", scores=scores)
        total, encoder = count_parameters(small)
        assert (total, encoder) == (made.after.parameters, made.after.encoder)
        assert abs(total / count_parameters(model)[0] - keep) < 1e-3


def test_a_new_process_gives_the_same_bits(
    minilm: PreTrainedModel, tokenizer: Any, sentences: Corpus, scores: Scores, tmp_path: Path
) -> None:
    made = plan(scores, keep=0.465, of="encoder", preset="obce-2023")
    small = prune(minilm, made, repair="mean", scores=scores)
    small.save_pretrained(tmp_path / "model")
    batch = dict(tokenizer(list(sentences.texts[:16]), padding=True, return_tensors="pt"))
    with torch.no_grad():
        expected = small(**batch).last_hidden_state
    torch.save(batch, tmp_path / "batch.pt")
    code = """
import sys, obce, torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1] + "/model")
with torch.no_grad():
    torch.save(model(**torch.load(sys.argv[1] + "/batch.pt")).last_hidden_state, sys.argv[1] + "/found.pt")
"""
    # products split among another number of threads may round differently
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment, timeout=120)
    assert torch.equal(torch.load(tmp_path / "found.pt"), expected)


def test_padding_is_what_the_documentation_says(tokenizer: Any, wikipedia: Path) -> None:
    """docs/scoring.md: 8 % on the sentences of examples/, in shards of 1,000 texts and batches of 2,048 tokens."""
    corpus = read_corpus(wikipedia)
    places = tokens = 0
    for shard in corpus.shards(1000):
        batches = tokenize([corpus.texts[i] for i in shard.texts], tokenizer, max_length=128, batch_tokens=2048)
        tokens += batches.n_tokens
        places += sum(batch.inputs["input_ids"].numel() for batch in batches)
    assert round(100 * (places / tokens - 1)) == 8
