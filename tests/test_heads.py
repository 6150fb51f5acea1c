"""Heads and layers explained: the numbers of the table, trees without crossings, clusters that are there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import obce
import pytest
from obce.cli import app
from obce.clouds import CLOUD_KINDS, CLOUD_SCORES, place_of
from obce.corpus import Corpus, read_corpus
from obce.explain import examine, explain_head
from obce.heads import (
    LARGER,
    NEAREST,
    clusters_said,
    explain_clouds,
    last_merges,
    sample_clouds,
    scales_of,
    texts_of,
)
from obce.plan import plan
from obce.run import Run, read_kept
from obce.scoring import score
from scipy.cluster.hierarchy import cophenet, linkage
from scipy.spatial.distance import pdist, squareform
from typer.testing import CliRunner

if TYPE_CHECKING:
    from collections.abc import Callable

    from obce.heads import Tree
    from obce.scores import Scores
    from transformers import BertModel, PreTrainedTokenizerBase


@pytest.fixture(scope="module")
def model(make_bert: Callable[..., BertModel]) -> BertModel:
    return make_bert(seed=3).eval()


@pytest.fixture(scope="module")
def corpus(texts: list[str]) -> Corpus:
    return read_corpus(texts[:111])


@pytest.fixture(scope="module")
def scores(model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> Scores:
    return score(
        model, tiny_tokenizer, corpus, max_length=24, shard_texts=40, batch_tokens=300, cloud_texts=75, effect_texts=0
    )


def test_numbers_are_those_of_the_table(
    model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus, scores: Scores
) -> None:
    assert scores.clouds is not None
    names = scores.clouds.names()
    assert len(names) == 3 * (4 * 4 + 1)
    found = examine(scores, model, tiny_tokenizer, corpus, heads=names).heads
    for row, (name, one) in enumerate(zip(names, found, strict=True)):
        assert (one.name, one.n, one.d, one.constant) == (name, 75, scores.clouds.d[row], scores.clouds.constant[row])
        if one.constant:
            assert (one.tree, one.scales, one.last, one.standings) == (None, (), (), {})
            continue
        table = {score: float(scores.clouds.columns[score][row]) for score in CLOUD_SCORES}
        assert float(one.deaths[-1]) == table["rf"], "the points have the bits of the scoring"
        assert one.deaths.sum() == pytest.approx(table["total_persistence"], rel=1e-6)
        assert {score: at.value for score, at in one.standings.items()} == table
        same = (scores.clouds.kind == scores.clouds.kind[row]) & ~scores.clouds.constant
        totals = scores.clouds.columns["total_persistence"]
        assert one.standings["total_persistence"].rank == 1 + (totals[same] > totals[row]).sum()
        assert one.standings["total_persistence"].of == same.sum()
    constant = [one.name for one in found if one.constant]
    assert constant == [f"0.{kind}.{head}" for kind in ("query", "key", "value") for head in range(4)]


@pytest.mark.parametrize(("tokens", "cloud_texts"), [(False, 60), (True, 111), (True, 4)])
def test_as_the_scoring_passed_the_texts(
    model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus, tokens: bool, cloud_texts: int
) -> None:
    scores = score(model, tiny_tokenizer, corpus, max_length=24, tokens=tokens, cloud_texts=cloud_texts, effect_texts=0)
    assert scores.clouds is not None
    for name in ("1.query.3", "2.context.0", "2.hidden", "0.hidden"):
        layer, kind, head = place_of(name, [0, 1, 2], 4)
        found = explain_head(scores, name, model, tiny_tokenizer, corpus)
        assert found.n == cloud_texts
        assert float(found.deaths[-1]) == scores.clouds.columns["rf"][scores.clouds.row(layer, kind, head)]


def test_another_family(tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> None:
    import torch
    from transformers import DebertaV2Config, DebertaV2Model

    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=256,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.25,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
    )
    model = DebertaV2Model(config).eval()
    scores = score(model, tiny_tokenizer, corpus, max_length=24, effect_texts=0)
    assert scores.clouds is not None
    found = examine(scores, model, tiny_tokenizer, corpus, neurons=["1.key.5"], heads=["1.key.2", "1.context.2"])
    for one, kind in zip(found.heads, ("key", "context"), strict=True):
        assert float(one.deaths[-1]) == scores.clouds.columns["rf"][scores.clouds.row(1, kind, 2)]
    (neuron,) = found.neurons
    assert neuron.gap is not None
    assert np.float32(neuron.gap.width) == np.float32(scores["1.key.5"]["rf"])
    for text in (*neuron.low, *neuron.high):
        assert text.at_tokens[0] == text.value, "the query of a token, not of a distance"


def test_texts_are_those_of_the_points(
    model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus, scores: Scores
) -> None:
    """The vectors are read from a model without batches, text by text."""
    import torch

    found = explain_head(scores, "2.hidden", model, tiny_tokenizer, corpus)
    assert scores.clouds is not None
    numbers = texts_of(corpus, scores.clouds, 0)
    assert len(set(numbers.tolist())) == 75
    points = []
    with torch.no_grad():
        for number in numbers.tolist():
            inputs = tiny_tokenizer(corpus.texts[number], truncation=True, max_length=24, return_tensors="pt")
            points.append(model(**inputs).last_hidden_state[0, 0].double().numpy())
    place = {number: i for i, number in enumerate(numbers.tolist())}
    distances = squareform(pdist(np.array(points)))
    nearest = np.where(np.eye(75, dtype=bool), np.inf, distances).min(axis=1)
    for text in found.last:
        assert text.text == corpus.texts[text.number]
        assert text.at == pytest.approx(nearest[place[text.number]], rel=1e-3), "it joins where its nearest text is"
    merged = linkage(np.array(points), "single")
    for scale in found.scales:
        from scipy.cluster.hierarchy import fcluster

        sizes = np.bincount(fcluster(merged, scale.at, "distance"))[1:]
        assert sorted((size for size in sizes.tolist() if size > 1), reverse=True) == list(scale.sizes)
        assert (sizes == 1).sum() == scale.alone
        assert scale.below < scale.at < scale.above
        assert len(scale.clusters) == min(LARGER, len(scale.sizes))
        for cluster, size in zip(scale.clusters, scale.sizes, strict=False):
            assert cluster.size == size
            assert len(cluster.nearest) == min(size, NEAREST)
            assert [text.at for text in cluster.nearest] == sorted(text.at for text in cluster.nearest)


def planted(seed: int = 0) -> np.ndarray:
    """Three groups of 40, 25 and 10 points far apart, and five points far from all."""
    rng = np.random.default_rng(seed)
    groups = [rng.normal(0, 0.05, (n, 4)) + at for n, at in ((40, 0), (25, 10), (10, 20))]
    return np.concatenate([*groups, 100 * (2 + np.arange(5))[:, None] * np.ones((5, 4))]).astype(np.float32)


def test_planted_clusters_are_found() -> None:
    merged = obce.h0(planted()[None], edges=True).linkage(0)
    found = scales_of(merged)
    between = [(below, above) for below, above, _ in found if below < 1 < above]
    assert len(between) == 1, "the scale between the points of a group and the groups"
    assert "large relative gap" in next(why for below, above, why in found if below < 1 < above)
    assert found == sorted(found)
    assert scales_of(np.array([[0, 1, 1.0, 2], [2, 3, 1.0, 3]])) == [], "no scale divides what merges at once"


def leaves_under(tree: Tree) -> list[set[int]]:
    under = [{i} for i in range(len(tree.sizes))]
    for left, right, _ in tree.merges:
        under.append(under[left] | under[right])
    return under


@pytest.mark.parametrize("n", [2, 3, 20, 31, 32, 200])
def test_trees_have_no_crossing(n: int) -> None:
    points = np.random.default_rng(n).standard_normal((n, 5)).astype(np.float32)
    merged = obce.h0(points[None], edges=True).linkage(0)
    tree = last_merges(merged)
    assert len(tree.merges) == min(30, n - 1)
    assert len(tree.sizes) == len(tree.heights) == len(tree.merges) + 1
    assert sum(tree.sizes) == n
    under = leaves_under(tree)
    for leaves in under:
        assert leaves == set(range(min(leaves), max(leaves) + 1)), "leaves of a merge stand side by side"
    for left, right, _ in tree.merges:
        assert max(under[left]) + 1 == min(under[right])
    deaths = [death for _, _, death in tree.merges]
    assert deaths == merged[-len(deaths) :, 2].tolist()
    pairs = tree.heights, tree.sizes
    assert all(height <= deaths[0] and (height == 0) == (size == 1) for height, size in zip(*pairs, strict=True))
    if n <= 31:
        found = np.zeros((n, n))
        for left, right, death in tree.merges:
            for a in under[left]:
                for b in under[right]:
                    found[a, b] = found[b, a] = death
        assert sorted(squareform(found)) == pytest.approx(sorted(cophenet(linkage(points, "single"))), rel=1e-5)


def test_what_is_said_of_clusters(
    model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus, scores: Scores
) -> None:
    found = explain_head(scores, "1.context.2", model, tiny_tokenizer, corpus)
    scale = replace(found.scales[0], at=0.5, why="x", sizes=(20, 3, 3, 2), alone=47)
    assert clusters_said(scale) == "At 0.5 (x): clusters of 20, 2 of 3, 2 texts; 47 texts alone."
    assert clusters_said(replace(scale, sizes=(74,), alone=1)).endswith("a cluster of 74 texts; 1 text alone.")
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["scales"][0]["clusters"][0]["nearest"][0]["text"] in corpus.texts
    assert "1.context.2" in found._repr_html_() and "<script" not in found._repr_html_()


def test_fate_under_a_plan(
    model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus, scores: Scores
) -> None:
    made = plan(scores, keep=0.8, score="std", units=("heads",), head_score="total_persistence")
    names = [f"{layer}.{kind}.{head}" for layer in range(3) for kind in ("query", "context") for head in range(4)]
    found = examine(scores, model, tiny_tokenizer, corpus, heads=[*names, "1.hidden"], plan=made).heads
    for one in found[:-1]:
        layer, kind, head = one.name.split(".")
        kept = set(made.kept[f"{layer}.{'value' if kind == 'context' else kind}"])
        here = len(kept & set(range(8 * int(head), 8 * int(head) + 8)))
        assert one.kept == (here, 8)
        assert one.fate == ("kept" if here else "removed")
    assert {one.fate for one in found[:-1]} == {"kept", "removed"}
    assert (found[-1].kept, found[-1].fate) == (None, "kept")


def test_which_clouds_get_a_page(scores: Scores) -> None:
    assert scores.clouds is not None
    names = sample_clouds(scores, best=2)
    assert len(set(names)) == len(names) == 3 * 4 + 3 + 2 * 3
    total = scores.clouds.columns["total_persistence"]
    contexts = [name for name in scores.clouds.names() if ".context." in name]
    best = max(contexts, key=lambda name: total[scores.clouds.names().index(name)])  # type: ignore[union-attr]
    layer, _, head = best.split(".")
    assert f"{layer}.query.{head}" in names
    assert sample_clouds(replace(scores, clouds=None)) == []


@pytest.mark.parametrize(
    "name", ["", "1.query", "1.query.4", "1.hidden.0", "3.query.0", "1.output.0", "x", "1.query.-1", "١.query.0"]
)
def test_what_is_no_cloud(
    model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus, scores: Scores, name: str
) -> None:
    with pytest.raises(ValueError, match=r"cloud is .*, expected layer.kind.head"):
        explain_head(scores, name, model, tiny_tokenizer, corpus)


def test_a_family_may_have_clouds_of_layers_alone(
    model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus, scores: Scores
) -> None:
    assert scores.clouds is not None
    clouds = scores.clouds
    some = clouds.head < 0
    rows = {name: getattr(clouds, name)[some] for name in ("layer", "kind", "head", "d", "constant")}
    hidden = replace(clouds, **rows, columns={name: column[some] for name, column in clouds.columns.items()})
    with pytest.raises(ValueError, match=r"cloud is '0.query.1', expected .* a head below 0, or layer.hidden"):
        explain_head(replace(scores, clouds=hidden), "0.query.1", model, tiny_tokenizer, corpus)


def test_what_does_not_belong_together(
    model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus, scores: Scores, texts: list[str]
) -> None:
    with pytest.raises(ValueError, match="hold no clouds of heads: score again with cloud_texts above 0"):
        explain_head(replace(scores, clouds=None), "1.query.0", model, tiny_tokenizer, corpus)
    vectors = {(1, "query"): np.zeros((75, 32), np.float32)}
    with pytest.raises(ValueError, match="are not those that were scored"):
        explain_clouds(scores, ["1.query.0"], vectors, read_corpus(texts[:75]))
    with pytest.raises(ValueError, match=r"vectors of 1.query.0 have the shape \(74, 8\), expected \(75, 8\)"):
        explain_clouds(scores, ["1.query.0"], {(1, "query"): np.zeros((74, 32), np.float32)}, corpus)


def test_kept_vectors_say_the_same(tiny_bert_dir: Path, texts: list[str], tmp_path: Path) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("\n".join(texts), encoding="utf-8")
    run = Run(tmp_path / "run")
    run.score(str(tiny_bert_dir), read_corpus(source), keep_sketch=True, effect_texts=0)
    names = ["1.query.3", "2.hidden"]
    kept = run.explain(heads=names).heads
    for name, one in zip(names, kept, strict=True):
        assert np.array_equal(one.deaths, np.asarray(run.cloud(name).deaths[0]))
    vectors = read_kept(run.sketch_path).vectors
    assert {kind for _, kind in vectors} == set(CLOUD_KINDS)
    shutil.move(run.sketch_path, tmp_path / "away")
    again = run.explain(heads=names).heads
    assert [one.to_dict() for one in again] == [one.to_dict() for one in kept]


def test_on_the_command_line(tiny_bert_dir: Path, texts: list[str], tmp_path: Path) -> None:
    source, run = tmp_path / "texts.txt", tmp_path / "run"
    source.write_text("\n".join(texts), encoding="utf-8")
    Run(run).score(str(tiny_bert_dir), read_corpus(source), effect_texts=0)

    def asked(*more: str) -> Any:
        return CliRunner().invoke(app, ["explain", str(run), *more])

    found = asked("--head", "1.query.3", "--head", "2.hidden", "--neuron", "1.value.2")
    assert found.exit_code == 0, found.output
    for words in ("1.query.3: 200 texts as points of 8", "2.hidden: 200", "those nearest its centre", "1.value.2: "):
        assert words in found.stdout
    scores = Run(run).scores()
    assert scores.clouds is not None
    plain = json.loads(asked("--head", "1.query.3", "--json").stdout)["heads"]
    assert plain[0]["standings"]["rf"]["value"] == scores.clouds.columns["rf"][scores.clouds.row(1, "query", 3)]
    for private in (asked("--head", "1.query.3", "--no-texts"), asked("--head", "1.query.3", "--no-texts", "--json")):
        assert private.exit_code == 0, private.output
        assert not [text for text in texts if text[:40] in private.stdout]
    refused = asked("--head", "1.output.3")
    assert refused.exit_code == 2
    assert "cloud is '1.output.3', expected layer.kind.head" in refused.stderr
