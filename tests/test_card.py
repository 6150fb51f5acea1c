"""The model card: what stands in it is what the run knows, and the hub's own library reads it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from huggingface_hub import ModelCard
from obce.card import Origin, front_matter, name_of, render_card
from obce.corpus import read_corpus
from obce.export import WAYS, to_dense
from obce.plan import plan
from obce.report import RESULT_KEYS
from obce.run import Run, load_model
from obce.sites import architecture

if TYPE_CHECKING:
    from pathlib import Path

FRONT = """---
license: other
license_name: open-by-some
license_link: https://example.org/licence
language:
- en
- de
pipeline_tag: sentence-similarity
datasets:
- what-the-dense-model-was-trained-on
---
# The dense model
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_bert_dir: Path, texts: list[str]) -> Run:
    folder = tmp_path_factory.mktemp("card")
    base = folder / "some-bert"
    base.mkdir()
    for file in tiny_bert_dir.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "README.md").write_text(FRONT)
    run = Run(folder / "run")
    scores, _ = run.score(str(base), read_corpus(texts[:80]), cloud_texts=0)
    run.make_plan(plan(scores, keep=0.6, of="encoder", drop_layers=1))
    run.prune(repair="mean")
    return run


def table(card: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def test_the_card_of_a_run(run: Run) -> None:
    card = ModelCard.load(run.model_path / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "other"
    assert (data["license_name"], data["license_link"]) == ("open-by-some", "https://example.org/licence")
    assert (data["language"], data["pipeline_tag"]) == (["en", "de"], "sentence-similarity")
    assert data["tags"] == ["obce", "pruned"]
    assert data["library_name"] == "transformers"
    assert "datasets" not in data
    # a directory is no model of the hub, and its place is nobody's business
    assert "base_model" not in data
    assert str(run.path.parent) not in str(card)
    found, scores, chosen = table(card.text), run.scores(), run.plan()
    small = load_model(run.model_path, pruned=True)
    facts = architecture(small)
    assert found["parameters"] == [f"{chosen.before.parameters:,}", f"{facts['parameters']:,}"]
    assert found["of these in the encoder"] == [f"{chosen.before.encoder:,}", f"{facts['encoder_parameters']:,}"]
    assert found["bytes of weights"] == [f"{chosen.before.bytes:,}", f"{facts['weight_bytes']:,}"]
    assert found["FLOPs of a text of 128 tokens"] == [f"{chosen.before.flops:,}", f"{chosen.after.flops:,}"]
    assert found["dense model"] == ["`some-bert`"]
    assert found["hash of its weights (BLAKE2b)"] == [f"`{chosen.model_hash}`"]
    assert found["hash of the texts that were scored"] == [f"`{scores.meta['corpus_hash']}`"]
    assert (found["texts"], found["score"], found["repair"]) == (["80"], ["effect"], ["mean"])
    rank = scores.stability("effect").spearman
    assert found["rank correlation of the score on two halves of the texts"] == [f"{rank:.2f}"]
    assert found["kept, as asked"] == ["0.6 of the encoder's parameters"]
    assert found["whole layers removed"] == [str(chosen.layers_dropped[0])]
    assert "transformers" in found["versions when scored"][0]
    for layer, widths in enumerate(small.config.layer_widths()):  # type: ignore[operator, union-attr]
        assert found[str(layer)][:2] == [str(widths.query_key), str(widths.value)]
    assert "Not measured." in card.text
    assert "[open-by-some](https://example.org/licence), as the dense model says" in card.text
    assert 'AutoModel.from_pretrained("DIRECTORY")' in card.text


def test_the_quality_table(run: Run, tmp_path: Path) -> None:
    rows = [
        dict(zip(RESULT_KEYS, ("dense", None, None, None, 22713216, 10, 90, 1.0, None), strict=True)),
        dict(zip(RESULT_KEYS, ("by effect", "effect", "mean", 0, 17016874, 10, 68, 0.56, 0.8234), strict=True)),
    ]
    run.add_results(rows)
    try:
        run.export("remote-code", tmp_path / "out")
    finally:
        run.results_path.unlink()
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    assert "| by effect | effect | mean | 17,016,874 | 0.560 | 0.823 |" in text
    assert "| dense |  |  | 22,713,216 | 1.000 |  |" in text
    assert "Not measured." not in text


@pytest.mark.parametrize("way", ["", *WAYS])
def test_every_way_says_how_to_load_it(run: Run, way: str) -> None:
    small = load_model(run.model_path, pruned=True)
    model = to_dense(small) if way == "dense" else small
    card = ModelCard(render_card(model, Origin("some-org/some-bert", "some-org/some-bert"), way))
    assert card.data.to_dict()["base_model"] == "some-org/some-bert"
    code = card.text.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    # once for each reader: transformers asks on the terminal, and waits, where one of them does not say it
    own_code = way in ("remote-code", "sentence-transformers")
    assert code.count("trust_remote_code=True") == own_code * (code.count(".from_pretrained(") or 1)
    assert ("import obce" in code) == (way == "")
    assert ("as large and as" in card.text) == (way == "dense")
    assert (way in card.data.tags) == (way in ("onnx", "sentence-transformers"))
    assert "do not state one" in card.text


@pytest.mark.parametrize(
    "name", ["x\n---\nlicense: mit", "a | b", "`code`", "<script>alert(1)</script>", "[x](http://y)"]
)
def test_names_cannot_write_the_card(run: Run, name: str) -> None:
    small = load_model(run.model_path, pruned=True)
    rows = [dict.fromkeys(RESULT_KEYS) | {"name": name}]
    chosen = replace(run.plan(), units=(name,), shares=name)
    stated = {"license": name, "license_name": name, "license_link": "javascript:alert(1)"}
    text = render_card(small, Origin(name, name, stated, chosen, None, rows, name))
    card = ModelCard(text)
    assert card.data.to_dict()["license"] == name
    assert "<script>" not in card.text
    assert "](javascript" not in card.text
    assert "](http://y" not in card.text
    lengths = {line.count("|") for line in card.text.splitlines() if line.startswith("| ") and "`" not in line}
    assert lengths <= {3, 4, 7, 8}


def test_notes_of_a_config_may_be_anything(run: Run) -> None:
    small: Any = load_model(run.model_path, pruned=True)
    for notes in (None, {}, {"keep": "x", "least_squares": 7, "layers_dropped": "ab", "size": [1], "score": None}):
        small.config.obce = notes
        assert ModelCard(render_card(small, Origin("x"))).data.tags == ["obce", "pruned"]


def test_front_matter(tmp_path: Path) -> None:
    assert front_matter(str(tmp_path)) == {}
    assert front_matter("no-org/no-model") == {}
    assert front_matter("not a name at all //") == {}
    for text, found in (
        (FRONT, yaml.safe_load(FRONT.split("---")[1])),
        ("# No head\n", {}),
        ("---\n- a\n- list\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\nlicense: !!python/object/apply:os.system ['false']\n---\n", {}),
    ):
        (tmp_path / "README.md").write_text(text)
        assert front_matter(str(tmp_path)) == found
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert front_matter(str(tmp_path)) == {}


def test_names(tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert name_of(str(tmp_path / "run")) == "run"
    assert name_of(str(tmp_path / "run" / "model")) == "run/model"
    assert name_of("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
