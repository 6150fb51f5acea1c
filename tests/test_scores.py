from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from obce.capture import capture
from obce.corpus import read_corpus, tokenize
from obce.plan import plan
from obce.run import read_scores, write_scores
from obce.scores import CLS_SCORES, SCORE_NAMES, Scores
from obce.scoring import score
from obce.sites import SITE_KINDS, find_sites, model_hash
from scipy.stats import spearmanr

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import BertModel


@pytest.fixture(scope="module")
def model(make_bert: Callable[..., BertModel]) -> BertModel:
    return make_bert()


@pytest.fixture(scope="module")
def scores(model: BertModel, tiny_tokenizer: Any, texts: list[str]) -> Scores:
    return score(model, tiny_tokenizer, texts)


def test_one_row_a_neuron_in_order(scores: Scores, model: BertModel) -> None:
    sites = find_sites(model)
    assert len(scores) == sum(site.width for site in sites) == 3 * (5 * 32 + 64)
    at = 0
    for site in sites:
        rows = scores.rows(site.layer, site.kind)
        assert (rows.start, rows.stop) == (at, at + site.width)
        assert (scores.index[rows] == np.arange(site.width)).all()
        assert {SITE_KINDS[code] for code in scores.site[rows]} == {site.kind}
        at += site.width
    assert all(len(scores.columns[name]) == len(scores) for name in SCORE_NAMES if name != "taylor")


def test_columns_are_those_of_the_captured_values(
    scores: Scores, model: BertModel, texts: list[str], tiny_tokenizer: Any
) -> None:
    corpus = read_corpus(texts)
    halves = corpus.halves(0)
    for layer in capture(model, tokenize(corpus, tiny_tokenizer, max_length=64), find_sites(model)):
        for kind, values in layer.outputs.items():
            rows = scores.rows(layer.layer, kind)
            live = ~scores.constant[rows]
            for suffix, part in (("", values), ("_a", values[:, halves[0]]), ("_b", values[:, halves[1]])):
                exact = part[live].astype(np.float64)
                plain = {
                    "rf": np.diff(np.sort(exact, axis=1), axis=1).max(axis=1),
                    "std": exact.std(axis=1),
                    "range": np.ptp(exact, axis=1),
                    "mean": exact.mean(axis=1),
                    "mean_abs": np.abs(exact).mean(axis=1),
                }
                for name, expected in plain.items():
                    found = scores.columns[name + suffix][rows][live]
                    # batches of another shape round differently
                    np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name + suffix)
            sums = layer.tokens[kind]
            np.testing.assert_allclose(scores.columns["token_mean"][rows], sums.sums / sums.count, atol=1e-6)
            np.testing.assert_allclose(scores.columns["token_min"][rows], sums.least, atol=1e-5)
            np.testing.assert_allclose(scores.columns["token_max"][rows], sums.greatest, atol=1e-5)


def test_layer_0_query_key_value_are_constant_and_nothing_else(scores: Scores) -> None:
    for layer, kind in scores.sites():
        rows = scores.rows(layer, kind)
        expected = layer == 0 and kind in ("query", "key", "value")
        assert scores.constant[rows].all() == expected
        assert scores.constant[rows].any() == expected
        for name in ("rf", "std", "range", "rf_a", "std_b"):
            assert np.isnan(scores.columns[name][rows]).all() == expected
    assert not np.isnan(scores.columns["mean"]).any()


def test_a_dead_neuron_is_constant(tiny_bert: BertModel, tiny_tokenizer: Any, texts: list[str]) -> None:
    import torch

    model = tiny_bert
    with torch.no_grad():
        model.encoder.layer[2].intermediate.dense.weight[7] = 0
    found = score(model, tiny_tokenizer, texts)["2.intermediate.7"]
    assert found["constant"]
    assert np.isnan(found["rf"])


def test_layer_memory_gives_the_same_scores(
    scores: Scores, model: BertModel, tiny_tokenizer: Any, texts: list[str]
) -> None:
    layered = score(model, tiny_tokenizer, texts, memory="layer")
    for name, column in scores.columns.items():
        np.testing.assert_array_equal(layered.columns[name], column, err_msg=name)


def test_the_order_of_the_texts_does_not_matter_beyond_rounding(
    scores: Scores, model: BertModel, tiny_tokenizer: Any, texts: list[str]
) -> None:
    turned = score(model, tiny_tokenizer, texts[::-1])
    assert turned.meta["corpus_hash"] == scores.meta["corpus_hash"]
    for name in ("rf", "std", "rf_a", "std_b"):
        np.testing.assert_allclose(turned.columns[name], scores.columns[name], atol=1e-5)


def test_random_is_seeded(scores: Scores, model: BertModel, tiny_tokenizer: Any, texts: list[str]) -> None:
    again = score(model, tiny_tokenizer, texts, seed=0)
    other = score(model, tiny_tokenizer, texts, seed=1)
    assert (again.columns["random"] == scores.columns["random"]).all()
    assert (other.columns["random"] != scores.columns["random"]).all()


def test_meta_names_what_was_scored(scores: Scores, model: BertModel, texts: list[str]) -> None:
    assert scores.meta["model_hash"] == model_hash(model)
    assert scores.meta["corpus_hash"] == read_corpus(texts).hash
    assert scores.meta["n_texts"] == 200
    assert scores.meta["seed"] == 0
    assert {"obce", "torch", "transformers", "numpy", "python"} <= set(scores.meta["versions"])


def test_medians_leave_constant_neurons_out(scores: Scores) -> None:
    medians = scores.medians("rf")
    assert np.isnan(medians[0, "query"])
    rows = scores.rows(1, "output")
    assert medians[1, "output"] == np.median(scores.columns["rf"][rows])


def test_stability_is_the_rank_correlation_of_the_halves(scores: Scores) -> None:
    found = scores.stability("std")
    rows = scores.rows(2, "key")
    only = Scores(
        scores.layer[rows], scores.site[rows], scores.index[rows], scores.constant[rows],
        {name: column[rows] for name, column in scores.columns.items()}, scores.meta,
    )  # fmt: skip
    a, b = only.columns["std_a"], only.columns["std_b"]
    assert only.stability("std").spearman == pytest.approx(spearmanr(a, b).statistic)
    lower = set(np.argsort(a, kind="stable")[:16]) & set(np.argsort(b, kind="stable")[:16])
    assert only.stability("std").overlap == len(lower) / 16
    assert set(found.by_kind) == set(SITE_KINDS)
    assert 0.5 < found.spearman <= 1
    assert np.isnan(scores.stability("random").spearman)


def test_a_neuron_by_its_name(scores: Scores) -> None:
    rows = scores.rows(2, "intermediate")
    assert scores["2.intermediate.63"]["rf"] == scores.columns["rf"][rows.stop - 1]
    for wrong in ("2.intermediate.64", "9.query.0", "2.intermediate", "x"):
        with pytest.raises(KeyError):
            scores[wrong]


def test_unknown_score(scores: Scores) -> None:
    for name, sentence in (
        ("taylor", r"score is 'taylor', but these scores hold effect, effect_abs, spread, rf, .*taylor needs labels"),
        ("token_std", "score is 'token_std', but these scores hold effect, .*random: name one of them"),
        ("rf_a", "score is 'rf_a'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            scores.medians(name)


def test_names_are_those_of_the_scores_there_are(scores: Scores) -> None:
    assert scores.names() == [name for name in SCORE_NAMES if name != "taylor"]
    less = replace(scores, columns={name: column for name, column in scores.columns.items() if "effect" not in name})
    assert "effect" not in less.names()
    for name, least in (("effect", 20), ("effect_abs", 2)):
        needs = rf"\({name} needs {least} texts: score as many or more, .* effect_texts of at least {least}\)"
        with pytest.raises(ValueError, match=rf"score is '{name}', but .* {needs}"):
            less.column(name)
    less = replace(scores, columns={name: column for name, column in scores.columns.items() if name != "spread"})
    with pytest.raises(ValueError, match=r"\(spread needs sums over tokens: score again with them\)"):
        less.column("spread")


def test_only_scores_of_cls_leave_out_what_is_constant_there(scores: Scores) -> None:
    assert scores.constant.any()
    for name in scores.names():
        assert (scores.ranked(name) == (~scores.constant if name in CLS_SCORES else True)).all(), name
    # layer 0's keys are constant at [CLS], but not at other tokens: they do have an effect
    rows = scores.rows(0, "key")
    assert scores.constant[rows].all()
    assert (scores.columns["effect"][rows] > 0).all()
    with pytest.raises(ValueError, match="score is 'token_mean'"):
        scores.ranked("token_mean")


def test_a_score_of_ones_own(scores: Scores, tmp_path: Path) -> None:
    own = np.random.default_rng(3).random(len(scores))
    own[5] = np.nan
    more = scores.with_column("mine", own).with_column("yours", -own)
    own[0] = 7.0
    assert more.names() == [*scores.names(), "mine", "yours"]
    assert more.columns["mine"][0] != 7, "the table keeps its own numbers"
    assert "mine" not in scores.columns
    assert "own_scores" not in scores.meta
    assert np.flatnonzero(~more.ranked("mine")).tolist() == [5]
    assert np.isnan(more.stability("mine").spearman)
    write_scores(tmp_path / "scores.parquet", more)
    back = read_scores(tmp_path / "scores.parquet")
    assert back.names() == more.names()
    for name in ("mine", "yours"):
        np.testing.assert_array_equal(back.columns[name], more.columns[name])
    made = plan(more, keep=0.7, of="encoder", score="mine")
    assert plan(back, keep=0.7, of="encoder", score="mine") == made
    assert plan(scores, keep=0.7, of="encoder", score=lambda _scores: more.columns["mine"]).kept == made.kept
    kept = np.isin(np.arange(64), made.kept["1.intermediate"])
    values = more.columns["mine"][more.rows(1, "intermediate")]
    assert 0 < kept.sum() < 64
    assert values[kept].min() > values[~kept].max()
    # what is not ranked stays
    assert 5 in plan(more, keep=0.5, of="encoder", score="mine").kept["0.query"]


@pytest.mark.parametrize(
    "name",
    ["", "my score", "1st", "rf", "taylor", "rf_a", "token_mean", "layer", "site", "index", "constant", "text_a"],
)
def test_names_that_are_taken(name: str, scores: Scores) -> None:
    with pytest.raises(ValueError, match=f"name is '{name}', expected an identifier that is no column"):
        scores.with_column(name, np.zeros(len(scores)))


def test_columns_that_do_not_fit(scores: Scores) -> None:
    for values, shape in ((np.zeros(3), "(3,)"), (np.zeros((len(scores), 1)), "(672, 1)"), (1.0, "()")):
        with pytest.raises(ValueError, match=re.escape(f"values has the shape {shape}, expected (672,) numbers")):
            scores.with_column("mine", values)
    with pytest.raises(ValueError, match="and holds infinity"):
        scores.with_column("mine", np.full(len(scores), np.inf))


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [([], "text"), (["one sentence"], "distinct"), (["same"] * 10, "distinct"), (["", "  "], "text")],
    ids=["empty", "one", "all equal", "blank"],
)
def test_too_few_texts(texts: list[str], sentence: str, model: BertModel, tiny_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=sentence):
        score(model, tiny_tokenizer, texts)
