"""The commands that train and measure, on a task of two hundred rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from obce.cli import app
from obce.finetune import with_head
from obce.glue import TASKS
from obce.run import CompareRun
from typer.testing import CliRunner

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import BertModel

runner = CliRunner()
TRAINING = ("--max-steps", "3", "--batch-size", "8", "--max-length", "32")


def obce(*arguments: object) -> Any:
    return runner.invoke(app, [str(a) for a in arguments])


def facts(*arguments: object) -> Any:
    found = obce(*arguments, "--json")
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("glue")
    (folder / "SST-2").mkdir()
    for name, part in (("train", texts[:80]), ("dev", texts[80:110])):
        rows = [f"{text}\t{int('river' in text or 'city' in text)}" for text in part]
        (folder / "SST-2" / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def task(glue: Path) -> tuple[str, ...]:
    return ("--task", "sst2", "--data", str(glue))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny_bert_dir: Path, task: tuple[str, ...]) -> Path:
    out = tmp_path_factory.mktemp("tuned")
    found = obce("finetune", tiny_bert_dir, *task, *TRAINING, "--out", out, "--seeds", 2)
    assert found.exit_code == 0, found.output
    assert "mean" in found.stdout, "two seeds have a mean"
    return out


def test_train_prune_train_again_and_measure(
    tuned: Path, glue: Path, task: tuple[str, ...], tmp_path: Path, tiny_bert_dir: Path
) -> None:
    dense, run = tuned / "seed-0" / "model", tmp_path / "run"
    results = json.loads((tuned / "results.json").read_text())
    assert [row["seed"] for row in results] == [0, 1]

    scored = facts("score", dense, glue, "--task", "SST-2", "--out", run, "--effect-texts", 60)
    assert "taylor" in scored["stability"], "a model with a head, on rows with labels"
    for bare in (("--cls-only",), ("--effect-texts", 0)):
        unlabelled = facts("score", dense, glue, "--task", "SST-2", "--limit", 40, "--out", tmp_path / bare[0], *bare)
        assert "taylor" not in unlabelled["stability"]
    made = facts("plan", run, "--keep", 0.6, "--of", "encoder", "--shares", "measured")
    assert made["shares"] == "measured"
    assert (run / "sensitivity.json").is_file()
    facts("prune", run)
    heads = facts("plan", run, "--keep", 0.8, "--unit", "heads", "--unit", "intermediate", "--head-score", "entropy")
    assert (heads["units"], heads["head_score"]) == (["heads", "intermediate"], "entropy")
    fewer = facts("plan", run, "--drop-layers", 1, "--dry-run")
    assert len(fewer["layers_dropped"]) == 1

    again = tmp_path / "again"
    facts("finetune", run / "model", *task, *TRAINING, "--out", again, "--teacher", dense, "--distill", 0.5)
    found = facts("eval", dense, run / "model", again / "seed-0" / "model", *task, "--max-length", 32)
    first, small, retrained = found["results"]
    assert first["headline"] == pytest.approx(results[0]["headline"])
    assert first["kl"]["dev"] == 0 < small["kl"]["dev"] != retrained["kl"]["dev"]
    assert small["encoder"] == retrained["encoder"] < first["encoder"]
    assert sum(small["sites"].values()) < sum(first["sites"].values())
    assert first["latency_ratio"] == 1
    shown = obce("eval", dense, run / "model", *task, "--max-length", 32, "--latency-rows", 0)
    assert shown.exit_code == 0, shown.output
    assert "Parameters of each kind of site" in shown.stdout


def test_each_model_is_measured_on_its_own_tokens(
    tuned: Path, task: tuple[str, ...], tmp_path: Path, make_bert: Callable[..., BertModel], tiny_tokenizer: Any
) -> None:
    """Beside a model of another vocabulary, whose tokens the first one's would be none of; no option is given."""
    from transformers import BertTokenizerFast

    letters = [word for word in tiny_tokenizer.get_vocab() if len(word.removeprefix("##")) == 1 or word[0] == "["]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", *sorted({*letters} - {"[PAD]"})]), encoding="utf-8")
    other = tmp_path / "other"
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), model_max_length=64).save_pretrained(other)
    with_head(make_bert(vocab_size=len(letters)), TASKS["SST-2"], 0).save_pretrained(other)
    asked = ("eval", tuned / "seed-0" / "model", other, tuned / "seed-1" / "model", *task)
    assert ["latency_ratio" in row for row in facts(*asked)["results"]] == [True, False, True]
    assert "Not timed: models that read the rows as other tokens than the first model does." in obce(*asked).stdout


def test_compare(tiny_bert_dir: Path, task: tuple[str, ...], tmp_path: Path) -> None:
    asked = ("compare", tiny_bert_dir, *task, *TRAINING, "--out", tmp_path, "--seeds", 1, "--texts", 60)
    found = facts(*asked, "--score", "effect", "--score", "random", "--keep", 0.7)
    assert [row["score"] for row in found["rows"]] == [None, "effect", "effect", "random", "random"]
    more = obce(*asked, "--score", "std", "--keep", 0.7, "--no-tune")
    assert more.exit_code == 0, more.output
    assert "least to greatest" in more.stdout and "least_squares, ridge 0.1" in more.stdout
    assert len((tmp_path / "compare.csv").read_text().splitlines()) == 7
    refused = obce(*asked, "--learning-rate", 0.1)
    assert refused.exit_code == 2
    assert "holds a comparison with another learning_rate" in refused.stderr
    with CompareRun(tmp_path).locked():
        refused = obce(*asked)
    assert refused.exit_code == 2
    assert "is in use by another process" in refused.stderr


def test_a_comparison_is_drawn_of_the_shares_it_has(tiny_bert_dir: Path, task: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; `make dev` installs it")
    asked = ("compare", tiny_bert_dir, *task, *TRAINING, "--out", tmp_path, "--seeds", 1, "--texts", 60, "--no-tune")
    one = (*asked, "--score", "std", "--keep", 0.7)
    assert [row["shares"] for row in facts(*one)["rows"]] == [None, "estimated"]
    drawn = facts("plot", tmp_path, "--kind", "tradeoff")
    assert [Path(path).is_file() for path in drawn["pictures"]] == [True, True]
    facts(*one, "--shares", "uniform")
    several = obce("plot", tmp_path, "--kind", "tradeoff")
    assert several.exit_code == 2
    assert "'estimated', 'uniform'" in several.stderr
    facts("plot", tmp_path, "--kind", "tradeoff", "--shares", "uniform", "--ridge", 0.1)
    assert "ridge 0.2" in obce("plot", tmp_path, "--kind", "tradeoff", "--ridge", 0.2).stderr


def test_layernorm(tuned: Path, tiny_bert_dir: Path, glue: Path, tmp_path: Path, texts: list[str]) -> None:
    corpus = tmp_path / "texts.txt"
    corpus.write_text("\n".join(texts[:40]), encoding="utf-8")
    rows = facts("layernorm", tiny_bert_dir, corpus)["rows"]
    assert (rows[0]["name"], rows[0]["fidelity"]) == ("none", 1.0)
    assert {row["mode"] for row in rows[1:]} == {"identity", "affine", "frozen"}
    shown = obce("layernorm", tuned / "seed-0" / "model", glue, "--task", "SST-2", "--max-length", 32, "--limit", 30)
    assert shown.exit_code == 0, shown.output
    assert "headline" in shown.stdout


def test_dry_run_counts_the_steps(tiny_bert_dir: Path, task: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = facts("finetune", tiny_bert_dir, *task, "--epochs", 2, "--batch-size", 16, "--out", out, "--dry-run")
    assert (found["rows"], found["steps"]) == (80, 10)
    assert not out.exists()


def test_wrong_use_is_one_sentence(tiny_bert_dir: Path, task: tuple[str, ...], glue: Path, tmp_path: Path) -> None:
    for arguments, word in (
        (("eval", tiny_bert_dir, *task), "head"),
        (("eval", tiny_bert_dir, "--task", "SNLI", "--data", glue), "SNLI"),
        (("finetune", tiny_bert_dir, "--task", "RTE", "--data", glue, "--out", tmp_path / "x"), "RTE"),
        (("finetune", tiny_bert_dir, *task, "--out", tmp_path / "x", "--distill", 0.5), "teacher"),
        (("compare", tiny_bert_dir, *task, "--out", tmp_path / "x", "--score", "magic"), "magic"),
        (("score", tiny_bert_dir, glue, "--task", "CoLA", "--out", tmp_path / "x"), "CoLA"),
    ):
        found = obce(*arguments)
        assert found.exit_code == 2, found.output
        lines = [line for line in found.stderr.splitlines() if not line.endswith(" ...")]
        assert len(lines) == 1, found.stderr
        assert word in lines[0]
        assert lines[0].startswith("obce: error: ")
