from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from obce.capture import capture
from obce.clouds import CLOUD_KINDS, CLOUD_SCORES, Clouds, cloud_scores
from obce.corpus import Corpus, read_corpus, tokenize
from obce.effects import bagged_rf, effect_clouds
from obce.explain import examine
from obce.h0 import h0
from obce.run import Run, _Files, merge_runs, read_kept
from obce.scores import Scores, rank_correlation
from obce.scoring import Kept, MemoryStore, ShardProgress, merge, score
from obce.sites import find_sites

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import BertModel

SHARDS = {"shard_texts": 20}


def same_bits(a: Scores, b: Scores) -> None:
    assert list(a.columns) == list(b.columns)
    for name, column in a.columns.items():
        np.testing.assert_array_equal(column, b.columns[name], err_msg=name)
    assert sorted(a.texts) == sorted(b.texts)
    for name, ids in a.texts.items():
        np.testing.assert_array_equal(ids, b.texts[name], err_msg=name)
    assert (a.constant == b.constant).all()
    assert (a.clouds is None) == (b.clouds is None)
    if a.clouds is not None and b.clouds is not None:
        assert a.clouds.to_dict() == b.clouds.to_dict()


@pytest.fixture(scope="module")
def model(make_bert: Callable[..., BertModel]) -> BertModel:
    return make_bert()


@pytest.fixture(scope="module")
def exact(model: BertModel, tiny_tokenizer: Any, texts: list[str]) -> Scores:
    return score(model, tiny_tokenizer, texts, exact=True, **SHARDS)


@pytest.fixture(scope="module")
def sketched(model: BertModel, tiny_tokenizer: Any, texts: list[str]) -> Scores:
    return score(model, tiny_tokenizer, texts, exact=False, **SHARDS)


def test_shards_cover_the_corpus_half_by_half(texts: list[str]) -> None:
    for n, size in ((200, 20), (57, 40), (4, 20), (41, 1000)):
        corpus = read_corpus(texts[:n])
        shards = corpus.shards(3, size)
        halves = corpus.halves(3)
        for half in (0, 1):
            mine = [shard for shard in shards if shard.half == half]
            assert np.array_equal(np.sort(np.concatenate([shard.texts for shard in mine])), halves[half])
            assert all(len(shard.texts) % 20 == 0 for shard in mine[:-1])
            assert all(0 < len(shard.texts) <= size for shard in mine)
        assert [shard.number for shard in shards] == list(range(len(shards)))
        # the content decides, not the order of the source
        turned = Corpus(corpus.texts[::-1], "turned", 0, 0)
        for a, b in zip(shards, turned.shards(3, size), strict=True):
            assert [corpus.texts[i] for i in a.texts] == [turned.texts[i] for i in b.texts]
    with pytest.raises(ValueError, match="size is 30, expected a positive multiple of 20"):
        read_corpus(texts).shards(0, 30)


def test_a_sketch_says_what_every_value_says(exact: Scores, sketched: Scores) -> None:
    assert "rf_high" not in exact.columns
    assert exact.certified() == 1
    live = ~exact.constant
    known = live & (sketched.columns["rf"] == sketched.columns["rf_high"])
    assert known.sum() == pytest.approx(sketched.certified() * live.sum())
    assert sketched.certified() > 0.95
    assert (sketched.columns["rf"][live] <= exact.columns["rf"][live]).all()
    assert (sketched.columns["rf_high"][live] >= exact.columns["rf"][live]).all()
    assert (sketched.columns["rf"][known] == exact.columns["rf"][known]).all()
    for name, column in exact.columns.items():
        if name.removesuffix("_a").removesuffix("_b") != "rf":
            np.testing.assert_array_equal(sketched.columns[name], column, err_msg=name)
    for name, ids in exact.texts.items():
        assert (sketched.texts[name][known] == ids[known]).mean() > 0.99, name
        if name in ("least", "greatest"):
            assert (sketched.texts[name] == ids).all()


def test_the_order_of_the_texts_leaves_no_trace(
    exact: Scores, model: BertModel, tiny_tokenizer: Any, texts: list[str]
) -> None:
    turned = score(model, tiny_tokenizer, texts[::-1], exact=True, **SHARDS)
    ids = {name: np.where(ids < 0, -1, len(texts) - 1 - ids) for name, ids in turned.texts.items()}
    turned = replace(turned, texts=ids)
    same_bits(turned, exact)


def test_texts_at_the_gap_and_at_the_extremes(model: BertModel, tiny_tokenizer: Any, texts: list[str]) -> None:
    store = MemoryStore()
    found = score(model, tiny_tokenizer, texts, exact=True, store=store, **SHARDS)
    order = np.concatenate([shard.texts for shard in read_corpus(texts).shards(0, 20)])
    rows = [np.concatenate([store.read(name, f"values.{k}") for k in range(3)], axis=1) for name in store.names()]
    values = np.empty((200, len(found)), np.float32)
    values[order] = np.concatenate(rows)
    for neuron in np.flatnonzero(~found.constant):
        column = values[:, neuron]
        below, above, least, greatest = (
            found.texts[n][neuron] for n in ("gap_below", "gap_above", "least", "greatest")
        )
        assert column[above] - column[below] == found.columns["rf"][neuron]
        assert not ((column > column[below]) & (column < column[above])).any()
        assert column[least] == column.min()
        assert column[greatest] == column.max()


@pytest.mark.parametrize("exact_kept", [True, False])
def test_a_scoring_that_was_stopped_goes_on(
    exact_kept: bool,
    model: BertModel,
    tiny_tokenizer: Any,
    texts: list[str],
    exact: Scores,
    sketched: Scores,
    tmp_path: Path,
) -> None:
    store = _Files(tmp_path / "shards")

    class Stopped(Exception):  # noqa: N818  (a kill, not an error)
        pass

    stops = 0
    seen: list[ShardProgress] = []

    def stop_now_and_then(at: ShardProgress) -> None:
        seen.append(at)
        if at.texts - at.resumed > 55:
            raise Stopped

    while True:
        try:
            found = score(
                model, tiny_tokenizer, texts, exact=exact_kept, store=store, progress=stop_now_and_then, **SHARDS
            )
            break
        except Stopped:
            stops += 1
    assert stops == 4
    assert [at.resumed for at in seen] == sorted(at.resumed for at in seen)
    assert seen[-1].resumed == 160
    assert {at.of for at in seen} == {200}
    same_bits(found, exact if exact_kept else sketched)


def test_a_crash_between_writing_a_sum_and_removing_its_parts(
    model: BertModel, tiny_tokenizer: Any, texts: list[str], sketched: Scores, tmp_path: Path
) -> None:
    store = _Files(tmp_path)
    removed: list[tuple[str, bytes]] = []

    class Leaving(_Files):
        def remove(self, name: str) -> None:
            removed.append((name, self._path(name).read_bytes()))
            super().remove(name)

    score(model, tiny_tokenizer, texts, exact=False, store=Leaving(tmp_path), **SHARDS)
    assert removed
    for name, data in removed[-3:]:
        store._path(name).write_bytes(data)
    found = score(model, tiny_tokenizer, texts, exact=False, store=store, **SHARDS)
    same_bits(found, sketched)
    assert len(store.names()) == 2


def test_layer_memory_gives_the_same_bits(
    exact: Scores, sketched: Scores, model: BertModel, tiny_tokenizer: Any, texts: list[str]
) -> None:
    for kept, expected in ((True, exact), (False, sketched)):
        same_bits(score(model, tiny_tokenizer, texts, exact=kept, memory="layer", **SHARDS), expected)


def test_at_cls_alone(exact: Scores, model: BertModel, tiny_tokenizer: Any, texts: list[str]) -> None:
    found = score(model, tiny_tokenizer, texts, tokens=False, **SHARDS)
    assert not [name for name in found.columns if name.startswith("token_")]
    for name, column in found.columns.items():
        np.testing.assert_allclose(column, exact.columns[name], atol=1e-5, err_msg=name)


def test_bagged_rf_is_the_mean_over_groups(
    exact: Scores, model: BertModel, tiny_tokenizer: Any, texts: list[str]
) -> None:
    corpus = read_corpus(texts[:73])
    store = MemoryStore()
    found = score(model, tiny_tokenizer, corpus, store=store, shard_texts=1000)
    a, b = (np.concatenate([store.read(name, f"values.{k}") for k in range(3)], axis=1) for name in store.names())
    assert (len(a), len(b)) == (37, 36)
    live = ~found.constant
    gaps = [np.diff(np.sort(part[:20], axis=0), axis=0).max(axis=0).astype(np.float64) for part in (a, b)]
    for name, expected in (("_a", gaps[0]), ("_b", gaps[1]), ("", (gaps[0] + gaps[1]) / 2)):
        np.testing.assert_array_equal(found.columns["rf_bagged" + name][live], expected[live])
    few = score(model, tiny_tokenizer, texts[:39])
    assert "rf_bagged" not in few.columns
    with pytest.raises(
        ValueError, match="score is 'rf_bagged', but these scores hold effect, effect_abs, spread, rf, std"
    ):
        few.column("rf_bagged")
    assert exact.stability("rf_bagged").spearman > exact.stability("rf").spearman


MEASURED = ("effect", "effect_abs", "spread")


def test_effects_are_those_of_some_texts_of_each_half(
    exact: Scores, model: BertModel, tiny_tokenizer: Any, texts: list[str]
) -> None:
    """The columns from `obce.effects` alone, one text a batch."""
    corpus = read_corpus(texts)
    found = score(model, tiny_tokenizer, corpus, effect_texts=91, read="mean", seed=2)
    assert (found.meta["effect_texts"], found.meta["read"]) == (91, "mean")
    assert (exact.meta["effect_texts"], exact.meta["read"]) == (200, "cls")
    order = corpus.order(2)
    chosen = np.concatenate([order[:46], order[100:145]])
    means = {f"{k}.{kind}": found.columns["token_mean"][found.rows(k, kind)] for k, kind in found.sites()}
    batches = tokenize(corpus.entries(chosen), tiny_tokenizer, max_length=64, batch_size=1)
    clouds = effect_clouds(model, batches, find_sites(model), means, read="mean", seed=2)
    cloud = np.concatenate(list(clouds.values()))
    for suffix, part in (("", cloud), ("_a", cloud[:, :46]), ("_b", cloud[:, 46:])):
        expected = np.abs(part).mean(1, dtype=np.float64)
        np.testing.assert_allclose(found.columns["effect_abs" + suffix], expected, rtol=1e-3, atol=1e-6)
        bags = bagged_rf(np.ascontiguousarray(part), seed=2)
        np.testing.assert_allclose(found.columns["effect" + suffix], bags, rtol=1e-3, atol=1e-5)


def test_new_scores_have_stability_and_rank_every_neuron(exact: Scores) -> None:
    for name in MEASURED:
        assert np.isfinite(exact.columns[name]).all(), name
        stability = exact.stability(name)
        assert 0.3 < stability.spearman <= 1, name
        assert set(stability.by_kind) == set(exact.kinds())
    assert exact.stability("effect").spearman > exact.stability("rf").spearman
    assert np.isnan(exact.stability("magnitude").spearman)
    assert np.isfinite(exact.columns["magnitude"]).all()
    assert "magnitude_a" not in exact.columns
    # the spread of a half is made of that half's deviations
    rows = exact.rows(1, "intermediate")
    weights = exact.columns["spread"][rows] / exact.columns["token_std"][rows]
    for suffix in ("_a", "_b"):
        expected = exact.columns["token_std" + suffix][rows] * weights
        np.testing.assert_allclose(exact.columns["spread" + suffix][rows], expected, rtol=1e-12)


def test_taylor_needs_labels(make_bert: Callable[..., BertModel], tiny_tokenizer: Any, texts: list[str]) -> None:
    from transformers import BertForSequenceClassification

    torch.manual_seed(1)
    classifier = BertForSequenceClassification(make_bert(num_labels=3).config).eval()
    with torch.no_grad():
        classifier.bert.load_state_dict(make_bert().state_dict())
    corpus = read_corpus(texts[:60])
    labels = np.random.default_rng(0).integers(0, 3, 60)
    found = score(classifier, tiny_tokenizer, corpus, labels=labels.tolist(), effect_texts=50, cloud_texts=0)
    assert found.meta["read"] == "head"
    assert {"taylor", "taylor_a", "taylor_b"} <= set(found.columns)
    assert found.stability("taylor").spearman > 0.3
    # the labels go with the texts, whatever their order
    turned = score(
        classifier, tiny_tokenizer, read_corpus(texts[:60][::-1]), labels=labels[::-1], effect_texts=50, cloud_texts=0
    )
    np.testing.assert_allclose(turned.columns["taylor"], found.columns["taylor"], rtol=1e-3, atol=1e-7)
    other = score(classifier, tiny_tokenizer, corpus, labels=labels[::-1], effect_texts=50, cloud_texts=0)
    assert np.abs(other.columns["taylor"] / found.columns["taylor"] - 1).max() > 0.1
    np.testing.assert_array_equal(other.columns["effect"], found.columns["effect"])
    assert "taylor" not in score(classifier, tiny_tokenizer, corpus).columns
    for bad, sentence in (
        (labels[:50], r"labels have the shape \(50,\), expected \(60,\): one a text of the corpus, in its order"),
        (labels + 1, "expected numbers of classes from 0 to 2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            score(classifier, tiny_tokenizer, corpus, labels=bad)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"effect_texts": 1}, "effect_texts is 1, expected 0, or at least 2: some of each half"),
        ({"effect_texts": -2}, "effect_texts is -2, expected 0, or at least 2"),
        (
            {"read": "pooled"},
            "read is 'pooled', expected 'auto' or one of 'head', 'cls', 'last', 'mean', 'tokens', 'logits'",
        ),
        ({"read": "head"}, "read is 'head', but a BertModel has no classifier: read 'cls', 'last', 'mean' or 'tokens'"),
        ({"read": "logits"}, "read is 'logits', but a BertModel has no classifier"),
        ({"labels": [0] * 200}, "labels are given, but a BertModel takes none of a text: load the model with the head"),
        ({"labels": [0] * 200, "effect_texts": 0}, "labels are given for the score taylor, which needs tokens=True"),
        ({"labels": [0] * 200, "tokens": False}, "labels are given for the score taylor, which needs tokens=True"),
        ({"threads": 0}, "threads is 0, expected at least 1"),
    ],
)
def test_effects_that_cannot_be_are_refused_before_a_forward_pass(
    asked: dict[str, Any], sentence: str, model: BertModel, tiny_tokenizer: Any, texts: list[str]
) -> None:
    seen: list[ShardProgress] = []
    with pytest.raises(ValueError, match=sentence):
        score(model, tiny_tokenizer, texts, progress=seen.append, **asked)
    assert not seen


def test_a_token_without_an_embedding_is_refused(
    make_bert: Callable[..., BertModel], tiny_tokenizer: Any, texts: list[str]
) -> None:
    small = make_bert(vocab_size=20)  # an index out of range would end a process on CUDA
    with pytest.raises(ValueError, match=r"tokenizer gives token \d+, but the model has embeddings for 20 tokens"):
        score(small, tiny_tokenizer, texts, cloud_texts=0)


def test_without_effects(exact: Scores, model: BertModel, tiny_tokenizer: Any, texts: list[str]) -> None:
    none = score(model, tiny_tokenizer, texts, effect_texts=0, **SHARDS)
    assert not [name for name in none.columns if name.startswith(("effect", "taylor"))]
    assert not {"read", "effect_texts"} & set(none.meta)
    for name, column in none.columns.items():
        np.testing.assert_array_equal(column, exact.columns[name], err_msg=name)
    bare = score(model, tiny_tokenizer, texts, tokens=False, **SHARDS)
    assert not {"effect", "effect_abs", "spread", "spread_a"} & set(bare.columns)
    np.testing.assert_array_equal(bare.columns["magnitude"], exact.columns["magnitude"])
    # fewer texts than a bag of 20 in a half, or in both
    for count, names in ((40, {"effect", "effect_a", "effect_b"}), (39, {"effect"}), (21, {"effect"}), (19, set())):
        few = score(model, tiny_tokenizer, texts, effect_texts=count, cloud_texts=0)
        assert {name for name in few.columns if name in ("effect", "effect_a", "effect_b")} == names, count
        assert {"effect_abs", "effect_abs_a", "effect_abs_b"} <= set(few.columns)


def test_effects_do_not_depend_on_the_batch(
    exact: Scores, model: BertModel, tiny_tokenizer: Any, texts: list[str]
) -> None:
    seen: list[tuple[float, float]] = []
    other = score(
        model,
        tiny_tokenizer,
        texts,
        exact=True,
        batch_tokens=100,
        effect_progress=lambda *at: seen.append(at),
        **SHARDS,
    )
    assert seen[-1] == (200, 200)
    assert len(seen) > 20
    for name in ("effect_abs", "spread", "effect_abs_a", "spread_b"):
        np.testing.assert_allclose(other.columns[name], exact.columns[name], rtol=1e-4, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(other.columns["effect"], exact.columns["effect"], rtol=1e-3, atol=1e-6)


def test_scoring_leaves_the_model_as_it_was(
    make_bert: Callable[..., BertModel], tiny_tokenizer: Any, texts: list[str]
) -> None:
    model = make_bert().train()
    model.encoder.layer[1].eval()
    model.encoder.layer[0].output.dense.bias.requires_grad_(False)
    flags = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score(model, tiny_tokenizer, texts[:50], **SHARDS)
    assert [module.training for module in model.modules()] == flags
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "encoder.layer.0.output.dense.bias"
    ]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_clouds_of_heads_and_layers(model: BertModel, tiny_tokenizer: Any, texts: list[str]) -> None:
    corpus = read_corpus(texts)
    found = score(model, tiny_tokenizer, corpus, cloud_texts=61, **SHARDS).clouds
    assert found is not None
    assert (found.n, len(found)) == (61, 3 * (4 * 4 + 1))
    chosen = np.concatenate([corpus.order()[:31], corpus.order()[100:130]])
    batches = tokenize([corpus.texts[i] for i in chosen], tiny_tokenizer, max_length=64)
    by_hand = {}
    for layer in capture(model, batches, find_sites(model), chosen=np.ones(61, bool)):
        for kind, vectors in layer.clouds.items():
            by_hand[layer.layer, kind] = vectors
    for i in range(len(found)):
        kind, head = CLOUD_KINDS[found.kind[i]], int(found.head[i])
        vectors = by_hand[int(found.layer[i]), kind]
        points = vectors if kind == "hidden" else vectors[:, 8 * head : 8 * head + 8]
        assert found.d[i] == points.shape[1]
        if found.constant[i]:
            assert (found.layer[i], kind in ("query", "key", "value")) == (0, True)
            continue
        for suffix, part in (("", points), ("_a", points[:31]), ("_b", points[31:])):
            deaths = h0(np.ascontiguousarray(part)).deaths.astype(np.float64)
            shares = deaths / deaths.sum()
            assert found.columns["rf" + suffix][i] == pytest.approx(deaths.max(), rel=1e-4)
            assert found.columns["total_persistence" + suffix][i] == pytest.approx(deaths.sum(), rel=1e-4)
            assert found.columns["entropy" + suffix][i] == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-4)
    assert set(found.stability("rf")) == set(CLOUD_KINDS)
    assert score(model, tiny_tokenizer, texts, cloud_texts=0).clouds is None
    with pytest.raises(ValueError, match="cloud_texts is -1, expected 0 or more"):
        score(model, tiny_tokenizer, texts, cloud_texts=-1)
    with pytest.raises(ValueError, match="score is 'x', expected one of rf, total_persistence, entropy"):
        found.stability("x")


def test_stability_of_clouds_is_the_rank_correlation() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    scale = rng.exponential(size=6).repeat(4)
    vectors = {(0, "value"): tuple(rng.standard_normal((40, 24)).astype(np.float32) * scale for _ in range(2))}
    found = cloud_scores(vectors, 6)  # type: ignore[arg-type]
    assert isinstance(found, Clouds)
    for name in CLOUD_SCORES:
        expected = spearmanr(found.columns[f"{name}_a"], found.columns[f"{name}_b"]).statistic
        assert found.stability(name)["value"] == pytest.approx(expected)
        assert np.isnan(found.stability(name)["query"])
    assert found.stability("total_persistence")["value"] > 0.9


def kept_of(model: BertModel, tokenizer: Any, texts: list[str], **settings: Any) -> Kept:
    found: list[Kept] = []
    score(model, tokenizer, texts, on_kept=found.append, **SHARDS, **settings)
    return found[0]


@pytest.mark.parametrize("exact_kept", [True, False])
def test_merged_scorings_are_one_scoring_of_all_texts(
    exact_kept: bool, model: BertModel, tiny_tokenizer: Any, texts: list[str]
) -> None:
    parts = [texts[:80], texts[80:120], texts[120:]]
    kept = [kept_of(model, tiny_tokenizer, part, exact=exact_kept) for part in parts]
    found = merge(kept)
    assert found.meta["n_texts"] == 200
    # the same values in one sketch
    values = []
    for part in parts:
        store = MemoryStore()
        score(model, tiny_tokenizer, part, exact=True, store=store, **SHARDS)
        order = np.concatenate([shard.texts for shard in read_corpus(part).shards(0, 20)])
        rows = [np.concatenate([store.read(name, f"values.{k}") for k in range(3)], axis=1) for name in store.names()]
        mine = np.empty((len(part), len(found)), np.float32)
        mine[order] = np.concatenate(rows)
        values.append(mine)
    whole = np.concatenate(values)
    live = ~found.constant
    gaps = np.diff(np.sort(whole, axis=0), axis=0).max(axis=0)
    assert (found.columns["rf"][live] <= gaps[live]).all()
    assert (found.columns["rf_high"][live] >= gaps[live]).all()
    assert found.certified() > 0.95
    assert (found.texts["gap_below"][~live] == -1).all()
    below, above = found.texts["gap_below"], found.texts["gap_above"]
    neurons = np.arange(len(found))
    assert (whole[above, neurons] - whole[below, neurons] == found.columns["rf"])[live].all()
    np.testing.assert_allclose(found.columns["std"][live], whole.std(axis=0, dtype=np.float64)[live], rtol=1e-12)
    assert found.clouds is not None
    assert found.clouds.n == 200
    other = merge(kept[::-1])
    for name in found.columns:
        np.testing.assert_array_equal(other.columns[name], found.columns[name], err_msg=name)
    assert other.meta["corpus_hash"] == found.meta["corpus_hash"]
    with pytest.raises(ValueError, match="scores are of several scorings that were joined: explain one of these"):
        examine(found, model, tiny_tokenizer, texts)
    with pytest.raises(ValueError, match="threads is 0, expected at least 1"):
        merge(kept, threads=0)


def test_merged_scorings_have_effects_and_weights(model: BertModel, tiny_tokenizer: Any, texts: list[str]) -> None:
    parts = [texts[:120], texts[120:]]
    kept = [kept_of(model, tiny_tokenizer, part) for part in parts]
    found, whole = merge(kept), score(model, tiny_tokenizer, texts, **SHARDS)
    assert set(found.columns) == set(whole.columns) | {"rf_high"}
    np.testing.assert_array_equal(found.columns["magnitude"], whole.columns["magnitude"])
    np.testing.assert_allclose(found.columns["spread"], whole.columns["spread"], rtol=1e-9)
    for suffix in ("_a", "_b"):  # other halves
        np.testing.assert_allclose(found.columns["spread" + suffix], whole.columns["spread"], rtol=0.5)
    for name in ("effect", "effect_abs", "effect_a", "effect_abs_b"):
        mean = sum(len(part) * one.columns[name] for part, one in zip(parts, kept, strict=True)) / 200
        np.testing.assert_allclose(found.columns[name], mean, rtol=1e-12)
    assert rank_correlation(found.columns["effect_abs"], whole.columns["effect_abs"]) > 0.95  # other directions
    assert found.meta["effect_texts"] == 200
    # of a scoring that has none, none; not of different readings
    bare = kept_of(model, tiny_tokenizer, parts[1], effect_texts=0)
    mean_read = kept_of(model, tiny_tokenizer, parts[1], read="mean")
    for other in (bare, mean_read):
        joined = merge([kept[0], other])
        assert not [name for name in joined.columns if name.startswith("effect")]
        assert not {"effect_texts", "read"} & joined.meta.keys()
        np.testing.assert_array_equal(joined.columns["spread"], found.columns["spread"])


def test_scorings_that_do_not_belong_together(
    model: BertModel, make_bert: Callable[..., BertModel], tiny_tokenizer: Any, texts: list[str]
) -> None:
    first = kept_of(model, tiny_tokenizer, texts[:60])
    with pytest.raises(ValueError, match="kept holds 1 scorings, expected at least 2"):
        merge([first])
    with pytest.raises(ValueError, match="12 texts are in more than one of the scorings, expected disjoint corpora"):
        merge([first, kept_of(model, tiny_tokenizer, texts[48:100])])
    with pytest.raises(ValueError, match=r"kept\[1\] was scored with another model_hash"):
        merge([first, kept_of(make_bert(seed=3), tiny_tokenizer, texts[60:100])])
    with pytest.raises(ValueError, match=r"kept\[1\] was scored with another max_length \(16, kept\[0\] has 64\)"):
        merge([first, kept_of(model, tiny_tokenizer, texts[60:100], max_length=16)])


def test_merged_runs(tiny_bert_dir: Path, texts: list[str], tmp_path: Path) -> None:
    runs = []
    for i, part in enumerate((texts[:100], texts[100:])):
        runs.append(Run(tmp_path / str(i)))
        runs[-1].score(str(tiny_bert_dir), read_corpus(part), keep_sketch=True, read="mean", **SHARDS)
    out, late = (Run(tmp_path / "all") for _ in range(2))
    found = merge_runs(runs, out)
    assert {name: Run(out.path).state["score"][name] for name in ("read", "position")} == {
        "read": "mean",
        "position": "cls",
    }
    same_bits(found, merge([read_kept(run.sketch_path) for run in runs]))
    same_bits(out.scores(), found)
    for again in (out, late):
        with pytest.raises(ValueError, match="holds a run already: choose another --out"):
            merge_runs(runs, again)
    bare = Run(tmp_path / "bare")
    bare.score(str(tiny_bert_dir), read_corpus(texts[:50]))
    with pytest.raises(ValueError, match=r"has no sketch\.safetensors: score it with --keep-sketch"):
        merge_runs([runs[0], bare], Run(tmp_path / "more"))
    runs[0].sketch_path.write_bytes(b"half")
    with pytest.raises(ValueError, match="is missing or damaged"):
        merge_runs(runs, Run(tmp_path / "more"))


def test_other_precisions_say_how_well_they_agree(model: BertModel, tiny_tokenizer: Any, texts: list[str]) -> None:
    found = score(model, tiny_tokenizer, texts, precision="bfloat16", **SHARDS)
    agreement = found.meta["precision_agreement"]
    assert set(agreement) == {"rf", "rf_bagged", "std"}
    assert 0.5 < agreement["rf"] < 1
    assert agreement["std"] > 0.95
    same = score(model, tiny_tokenizer, texts, precision="tf32", **SHARDS)
    assert same.meta["precision_agreement"]["std"] == pytest.approx(1)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# A process of a distributed scoring, as torchrun starts it.
ONE_RANK = """
import json, sys
import numpy as np, torch
from obce import scoring
from obce.corpus import read_corpus
from obce.run import Run
from obce.world import joined

arguments = json.loads(sys.argv[1])
torch.set_num_threads(1)

batches = []  # of effects, that this rank took
given = scoring.effect_clouds

def noting(model, mine, *rest, **settings):
    texts = [batch.indices.tolist() for batch in mine]
    whole = [batch.indices.tolist() for batch in mine.share(0, 1)]
    batches.extend(map(whole.index, texts))
    return given(model, mine, *rest, **settings)

scoring.effect_clouds = noting
with joined() as world:
    folder = arguments["out"] + "/" + (str(world.rank) if arguments["apart"] else "run")
    scores, _ = Run(folder).score(
        arguments["model"], read_corpus(arguments["texts"]), exact=arguments["exact"], threads=1, shard_texts=20,
        batch_tokens=256,
    )
    assert world.size == 2
    assert len(batches) > 2, batches
    assert {number % 2 for number in batches} == {world.rank}
    np.save(f"{arguments['out']}/rf-{world.rank}.npy", scores.columns["rf"])
"""


def run_ranks(arguments: dict[str, Any]) -> None:
    port = free_port()
    ranks = []
    for rank in range(2):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
        }  # fmt: skip
        command = [sys.executable, "-P", "-c", ONE_RANK, json.dumps(arguments)]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors


@pytest.mark.parametrize("exact_kept", [True, False])
@pytest.mark.parametrize("apart", [False, True], ids=["one directory", "a directory each"])
def test_two_processes_find_the_bits_of_one(
    exact_kept: bool, apart: bool, tiny_bert_dir: Path, texts: list[str], tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = Run(tmp_path / "alone")
        alone.score(str(tiny_bert_dir), read_corpus(texts), exact=exact_kept, threads=1, batch_tokens=256, **SHARDS)
    finally:
        torch.set_num_threads(threads)
    arguments = {
        "model": str(tiny_bert_dir),
        "texts": texts,
        "exact": exact_kept,
        "apart": apart,
        "out": str(tmp_path),
    }
    run_ranks(arguments)
    together = Run(tmp_path / ("0" if apart else "run"))
    same_bits(together.scores(), alone.scores())
    for rank in range(2):
        np.testing.assert_array_equal(np.load(tmp_path / f"rf-{rank}.npy"), alone.scores().columns["rf"])
    assert not (together.path / "shards").exists()
