"""The command line: what it prints, its exit codes, one sentence for every wrong use."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import typer
from obce.cli import _emit, _guarded, _per_second, app
from typer.testing import CliRunner

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import BertModel

runner = CliRunner()


def obce(*arguments: object) -> Any:
    return runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "texts.txt"
    path.write_text("\n".join(texts) + "\n\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, tiny_bert_dir: Path, corpus: Path) -> Path:
    path = tmp_path_factory.mktemp("cli") / "run"
    found = obce("score", tiny_bert_dir, corpus, "--out", path)
    assert found.exit_code == 0, found.output
    assert "neurons" in found.stdout.lower()
    return path


def refused(found: Any, *words: str, code: int = 2) -> None:
    assert found.exit_code == code, found.output
    lines = [line for line in found.stderr.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1, found.stderr
    assert "Traceback" not in found.output
    for word in words:
        assert word in lines[0]


def test_rates_below_one_are_not_shown_as_none() -> None:
    assert [_per_second(rate) for rate in (0.21, 1234.5)] == ["0.21/s", "1,234/s"]


def test_every_step_by_itself(scored: Path, tmp_path: Path) -> None:
    found = obce("plan", scored, "--keep", 0.6, "--of", "encoder", "--preset", "obce-2023", "--dry-run")
    assert found.exit_code == 0, found.output
    assert "nothing written" in found.stdout
    assert not (scored / "plan.json").exists()
    found = obce("plan", scored, "--keep", 0.6, "--of", "encoder", "--json")
    facts = json.loads(found.stdout)
    assert facts["kept_share"] == pytest.approx(0.6, abs=0.003)
    dry = obce("prune", scored, "--dry-run", "--json")
    assert json.loads(dry.stdout)["after"] == facts["after"]
    assert not (scored / "model").exists()
    found = obce("prune", scored, "--repair", "none")
    assert found.exit_code == 0, found.output
    found = obce("report", scored, "--json")
    page = Path(json.loads(found.stdout)["report"])
    assert page.read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    again = obce("report", scored)
    assert "Spearman" in again.stdout
    assert "report.html" in again.stdout


def test_run_does_all_and_is_reused(tiny_bert_dir: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = ("run", tiny_bert_dir, corpus, "--out", tmp_path / "run", "--keep", 0.7, "--json")
    first = json.loads(obce(*arguments).stdout)
    assert not first["reused"]
    assert first["neurons"] == 672
    assert first["constant"] == 96
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        ".lock", "run.json", "scores.parquet", "sensitivity.json", "plan.json", "model", "report.html",
    }  # fmt: skip
    assert first["shares"] == "estimated"
    assert json.loads(obce(*arguments).stdout)["reused"]
    for shares in ("measured", "uniform"):
        asked = (*arguments, "--of", "encoder", "--shares", shares)
        assert json.loads(obce(*asked).stdout)["reused"]
        assert json.loads((tmp_path / "run" / "plan.json").read_text())["shares"] == shares
    assert json.loads((tmp_path / "run" / "sensitivity.json").read_text())["asked"]["how"] == "measured"


def test_dry_run_writes_nothing(tiny_bert_dir: Path, corpus: Path, tmp_path: Path) -> None:
    for command in ("score", "run"):
        found = obce(command, tiny_bert_dir, corpus, "--out", tmp_path / "run", "--dry-run")
        assert found.exit_code == 0, found.output
        assert "would score 672 neurons on 200 texts" in found.stdout
        assert ("plan.json, model/, report.html" in found.stdout) == (command == "run")
    assert not (tmp_path / "run").exists()


def test_names_are_printed_as_they_are(tiny_bert_dir: Path, corpus: Path, tmp_path: Path) -> None:
    for name in ("run[bold]", "run[/b]", "run:smile:"):
        asked = ("score", tiny_bert_dir, corpus, "--limit", 20, "--out", tmp_path / name)
        for more in ((), ("--dry-run",)):
            found = obce(*asked, *more)
            assert found.exit_code == 0, found.output
            assert name in found.stdout


def test_what_is_no_number_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    _emit(True, {"rows": [{"kl": float("nan"), "of": (float("inf"), 1.5, 2, "x")}], "path": Path("x")})
    assert capsys.readouterr().out == '{"rows": [{"kl": null, "of": [null, 1.5, 2, "x"]}], "path": "x"}\n'


def test_doctor_names_every_backend_with_its_reason() -> None:
    found = obce("doctor", "--json")
    facts = json.loads(found.stdout)
    assert facts["backends"]["cpu"]["usable"]
    assert facts["backends"]["reference"]["usable"]
    assert all(row["why"] for row in facts["backends"].values())
    assert facts["versions"]["torch"]
    assert "backend" in obce("doctor").stdout


def test_what_was_cut_learns_from_texts(scored: Path, corpus: Path, tiny_bert_dir: Path, tmp_path: Path) -> None:
    run, how = tmp_path / "run", ("--learning-rate", 3e-3, "--epochs", 2, "--batch-size", 16)
    shutil.copytree(scored, run)
    obce("plan", run, "--keep", 0.5, "--of", "encoder")
    obce("prune", run, "--repair", "none")
    dry = json.loads(obce("distill", run, "--out", tmp_path / "x", *how, "--dry-run", "--json").stdout)
    assert (dry["texts"], dry["steps"], dry["held_out"]) == (180, 24, 20)
    assert not (tmp_path / "x").exists()
    found = obce("distill", run, "--out", tmp_path / "out", *how, "--json")
    assert found.exit_code == 0, found.output
    facts = json.loads(found.stdout)
    assert facts["fidelity_before"] < facts["fidelity"] <= 1
    assert facts["losses"][-1] < facts["losses"][0]
    bare = obce("distill", run / "model", corpus, "--teacher", tiny_bert_dir, "--out", tmp_path / "bare", *how)
    assert bare.exit_code == 0, bare.output
    assert f"{facts['fidelity_before']:.4f} before, {facts['fidelity']:.4f} now" in bare.stdout
    exported = obce("export", tmp_path / "out" / "model", "--to", "remote-code", "--out", tmp_path / "exported")
    assert exported.exit_code == 0, exported.output
    refused(obce("distill", run / "model", "--out", tmp_path / "y"), "is no run directory", "--teacher")
    refused(obce("distill", run, "--out", tmp_path / "out", "--max-steps", 1), "with epochs 2, not 3, expected")


def test_version_and_help() -> None:
    import obce as package

    assert obce("--version").stdout.strip() == f"obce {package.__version__}"
    commands = (
        "run",
        "score",
        "merge",
        "plan",
        "prune",
        "distill",
        "finetune",
        "eval",
        "compare",
        "explain",
        "layernorm",
        "report",
        "doctor",
    )
    for command in (*commands, "bench", "demo"):
        found = obce(command, "--help")
        assert found.exit_code == 0
        assert "Usage" in found.stdout


CORPORA = {
    "missing": (None, "there is no file"),
    "empty": (b"", "text"),
    "one sentence": (b"Only this.\n", "distinct"),
    "all equal": (b"Same.\n" * 50, "distinct"),
    "binary": (bytes(range(256)) * 10, "binary"),
}


@pytest.mark.parametrize("kind", CORPORA)
def test_a_bad_corpus(kind: str, tiny_bert_dir: Path, tmp_path: Path) -> None:
    data, word = CORPORA[kind]
    path = tmp_path / "corpus.txt"
    if data is not None:
        path.write_bytes(data)
    refused(obce("score", tiny_bert_dir, path, "--out", tmp_path / "run"), word)
    assert not (tmp_path / "run").exists()


def test_a_wrong_model_directory(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    refused(obce("score", tmp_path / "model", corpus, "--out", tmp_path / "run"), "config.json")
    refused(obce("score", tmp_path / "nothing", corpus, "--out", tmp_path / "run"), "neither a directory")
    refused(obce("score", corpus, corpus, "--out", tmp_path / "run"), "is a file")


def test_an_unknown_architecture(corpus: Path, tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    GPTNeoXModel(GPTNeoXConfig(**sizes, vocab_size=50)).save_pretrained(tmp_path / "gpt")
    refused(obce("score", tmp_path / "gpt", corpus, "--out", tmp_path / "run"), "'gpt_neox'", "bert", "gpt2")


def test_nan_weights(corpus: Path, tmp_path: Path, make_bert: Callable[..., BertModel], tiny_tokenizer: Any) -> None:
    model = make_bert()
    model.encoder.layer[0].output.dense.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    refused(obce("score", tmp_path / "model", corpus, "--out", tmp_path / "run"), "0.output.3", "finite")


def test_plan_of_another_model(
    scored: Path,
    tmp_path: Path,
    make_bert: Callable[..., BertModel],
    tiny_tokenizer: Any,
    tiny_bert_dir: Path,
    corpus: Path,
) -> None:
    make_bert(seed=9).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    assert obce("score", tmp_path / "model", corpus, "--out", tmp_path / "run").exit_code == 0
    assert obce("plan", tmp_path / "run", "--keep", 0.6).exit_code == 0
    refused(obce("prune", scored, "--plan", tmp_path / "run" / "plan.json"), "model")
    refused(obce("prune", tmp_path / "run", "--model", tiny_bert_dir), "model")


@pytest.mark.parametrize("keep", ["0", "1.2", "-1", "nan"])
def test_keep_outside_its_range(keep: str, scored: Path) -> None:
    refused(obce("plan", scored, f"--keep={keep}"), "keep is")


def test_run_refuses_before_it_scores(tiny_bert_dir: Path, corpus: Path, tmp_path: Path) -> None:
    for option, word in (("--keep=2", "keep is 2"), ("--preset=x", "preset is 'x'"), ("--score=x", "score is 'x'")):
        refused(obce("run", tiny_bert_dir, corpus, "--out", tmp_path / "run", option), word)
    refused(obce("run", tiny_bert_dir, corpus, "--out", tmp_path / "run", "--shares", "measured"), "give --keep")
    assert not (tmp_path / "run").exists()


def test_run_directory_of_another_corpus(scored: Path, tiny_bert_dir: Path, tmp_path: Path, texts: list[str]) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n".join(texts[:50]), encoding="utf-8")
    refused(obce("score", tiny_bert_dir, other, "--out", scored), "another corpus", "choose another --out")


def test_steps_out_of_order(tmp_path: Path, tiny_bert_dir: Path, corpus: Path) -> None:
    refused(obce("plan", tmp_path, "--keep", 0.5), "obce score")
    assert obce("score", tiny_bert_dir, corpus, "--out", tmp_path / "run").exit_code == 0
    refused(obce("prune", tmp_path / "run"), "obce plan")


def failing(error: BaseException) -> Callable[..., None]:
    def report_command(**_: Any) -> None:
        raise error

    return report_command


def test_a_machine_without_memory_is_no_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError) as allocator:
        torch.empty(1 << 50, dtype=torch.uint8)
    full = RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), full, allocator.value):
        with pytest.raises(typer.Exit) as left:
            _guarded(failing(error))()
        assert left.value.exit_code == 1
        assert "out of memory (" in capsys.readouterr().err
    with pytest.raises(typer.Exit) as left:
        _guarded(failing(RuntimeError("no")))()
    assert left.value.exit_code == 2


def test_an_interruption_promises_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    stopped = failing(KeyboardInterrupt())
    for name, dry_run, kept in (("score", False, True), ("score", True, False), ("report", False, False)):
        stopped.__name__ = f"{name}_command"
        with pytest.raises(typer.Exit) as left:
            _guarded(stopped)(dry_run=dry_run)
        assert left.value.exit_code == 130
        assert ("finished steps are kept" in capsys.readouterr().err) is kept


def test_usage_errors_are_short() -> None:
    for arguments in (
        ("score",),
        ("plan", "x", "--keep", "much"),
        ("prune", "x", "--repair", "magic"),
        ("score", "x", "y", "--out", "z", "--threads", "0"),
        ("nonsense",),
    ):
        found = obce(*arguments)
        assert found.exit_code == 2
        assert "Traceback" not in found.output
        assert "Error" in found.stderr


# ---- in a process of its own ----------------------------------------------------------------------------------------


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "obce", *map(str, arguments)]


def test_output_that_cannot_be_written(tiny_bert_dir: Path, corpus: Path, scored: Path) -> None:
    # a directory that nobody, not even root, may write to
    refused(obce("score", tiny_bert_dir, corpus, "--out", "/proc/obce-run"), "cannot read or write", code=1)


def test_a_full_disk_leaves_nothing_half_written(tiny_bert_dir: Path, corpus: Path, tmp_path: Path) -> None:
    """The kernel refuses every file above 8 KB: the scores cannot be stored whole."""
    import resource

    out = tmp_path / "run"
    found = subprocess.run(
        command("score", tiny_bert_dir, corpus, "--out", out),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert found.returncode == 1, found.stderr
    assert "cannot read or write" in found.stderr
    assert "Traceback" not in found.stderr
    assert {path.name for path in out.rglob("*")} <= {".lock", "run.json", "shards"}


def test_ctrl_c_stops_cleanly(tiny_bert_dir: Path, wikipedia: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        command("score", tiny_bert_dir, wikipedia, "--batch-tokens", 40, "--out", out),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    # the run directory appears when everything is loaded and the forward passes begin
    while not out.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert not (out / "scores.parquet").exists()
    again = obce("score", tiny_bert_dir, wikipedia, "--limit", 50, "--out", out, "--json")
    assert again.exit_code == 0, again.output


def test_explain(scored: Path, tmp_path: Path, texts: list[str]) -> None:
    held_out = tmp_path / "other.txt"
    held_out.write_text("\n".join(f"{text} again" for text in texts[:80]), encoding="utf-8")
    asked = ("explain", scored, "--neuron", "1.intermediate.3", "-n", "0.value.1")
    found = obce(*asked, "--held-out", held_out)
    assert found.exit_code == 0, found.output
    for words in (
        "1.intermediate.3: ",
        "Largest gap: ",
        "Found on the 200 scored texts",
        "Texts at both ends",
    ):
        assert words in found.stdout
    assert "0.value.1: constant at [CLS]: no split" in found.stdout
    facts = json.loads(obce(*asked, "--json").stdout)["neurons"]
    assert [one["name"] for one in facts] == ["1.intermediate.3", "0.value.1"]
    refused(obce("explain", scored, "--neuron", "9.intermediate.3"), "9.intermediate")
    refused(obce("explain", scored, "--neuron", "x"), "'x' is not a neuron's name")
    refused(obce("explain", scored, "--layer", 9), "layer is 9")
    refused(obce("explain", scored, "--search", "unheard"), "words is 'unheard'")


def test_explain_writes_pages(scored: Path, tmp_path: Path, texts: list[str]) -> None:
    run = shutil.copytree(scored, tmp_path / "run")
    found = obce("explain", run, "--layer", 1, "--top", 2, "--json")
    assert found.exit_code == 0, found.output
    facts = json.loads(found.stdout)
    assert len(facts["pages"]) == 12
    page = Path(facts["report"]).read_text(encoding="utf-8")
    assert all(f'"name":"{name}"' in page for name in facts["pages"])
    assert texts[0].split()[0] in page
    by_words = json.loads(obce("explain", run, "--search", "river", "--json").stdout)["pages"]
    assert by_words
    bare = obce("explain", run, "--layer", 1, "--no-texts")
    assert bare.exit_code == 0, bare.output
    page = (run / "report.html").read_text(encoding="utf-8")
    assert not [text for text in texts if text in page], "no text of the corpus is left"
    assert "(text withheld)" in page
    shown = obce("explain", run, "-n", "1.intermediate.3", "--no-texts").stdout
    assert not [text for text in texts if text[:40] in shown]


def test_report_keeps_the_pages_until_they_are_of_something_else(scored: Path, tmp_path: Path) -> None:
    run = shutil.copytree(scored, tmp_path / "run")
    assert obce("plan", run, "--keep", 0.7, "--of", "encoder").exit_code == 0
    assert obce("prune", run).exit_code == 0
    assert obce("explain", run, "--layer", 1, "--top", 2).exit_code == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    shown = '"name":"1.intermediate.'
    assert shown in page and 'id="removal"' in page
    found = obce("report", run, "--json")
    assert json.loads(found.stdout)["explained"] is True, found.output
    assert (run / "report.html").read_text(encoding="utf-8") == page
    assert obce("plan", run, "--keep", 0.6, "--of", "encoder").exit_code == 0
    found = obce("report", run)
    assert "the pages of `obce explain` are left out" in " ".join(found.output.split())
    assert shown not in (run / "report.html").read_text(encoding="utf-8")
    kept = json.loads((run / "explained.json").read_text(encoding="utf-8"))
    kept["pages"]["truncated"] += "0"
    (run / "explained.json").write_text(json.dumps(kept), encoding="utf-8")
    refused(obce("report", run), "explained.json' is not as it was written")
    (run / "explained.json").write_text("[", encoding="utf-8")
    refused(obce("report", run), "explained.json")


def test_plot(scored: Path, tiny_bert_dir: Path, corpus: Path, tmp_path: Path) -> None:
    assert obce("plan", scored, "--keep", 0.7).exit_code == 0
    for kind, more in (("distribution", ("--score", "effect")), ("medians", ()), ("map", ())):
        found = obce("plot", scored, "--kind", kind, "--out", tmp_path, "--json", *more)
        assert found.exit_code == 0, found.output
        for path in json.loads(found.stdout)["pictures"]:
            assert Path(path).stat().st_size > 1000
    refused(obce("plot", scored, "--kind", "barcode", "--cloud", "1.query.2"), "--keep-sketch")
    refused(obce("plot", scored, "--kind", "merge-tree"), "--cloud is missing")
    refused(obce("plot", scored, scored, "--kind", "map"), "found 2 runs")
    kept = tmp_path / "kept"
    assert obce("score", tiny_bert_dir, corpus, "--limit", 40, "--keep-sketch", "--out", kept).exit_code == 0
    for kind, cloud in (("barcode", "1.query.2"), ("merge-tree", "2.hidden")):
        found = obce("plot", kept, "--kind", kind, "--cloud", cloud, "--json")
        assert found.exit_code == 0, found.output
        assert (kept / "pictures" / f"{kind}-{cloud}.svg").is_file()
    for cloud in ("1.query", "1.query.4", "9.hidden", "1.hidden.0", "x"):
        refused(obce("plot", kept, "--kind", "barcode", "--cloud", cloud), f"cloud is '{cloud}'")


def test_demo(tiny_bert_dir: Path, corpus: Path, tmp_path: Path) -> None:
    found = obce("demo", "--model", tiny_bert_dir, "--corpus", corpus, "--out", tmp_path / "demo", "--json")
    assert found.exit_code == 0, found.output
    results = json.loads(found.stdout)["results"]
    names = [row["name"] for row in results]
    assert names[0] == "dense"
    assert {"effect, none", "effect, least_squares", "rf, none", "std, least_squares", "random #2, none"} <= set(names)
    assert len({row["encoder"] for row in results[1:]}) == 1, "the same widths for every row"
    assert results[0]["fidelity"] == pytest.approx(1)
    again = obce("prune", tmp_path / "demo", "--repair", "least_squares")
    assert again.exit_code == 0, again.output


def test_the_least_texts_of_a_demo(tiny_bert_dir: Path, texts: list[str], tmp_path: Path) -> None:
    for n in (24, 25):
        (tmp_path / f"{n}.txt").write_text("\n".join(texts[:n]), encoding="utf-8")
    asked = ("demo", "--model", tiny_bert_dir, "--out", tmp_path / "demo", "--corpus")
    refused(obce(*asked, tmp_path / "24.txt"), "corpus has 24 distinct texts, but the demo needs at least 25")
    found = obce(*asked, tmp_path / "25.txt")
    assert found.exit_code == 0, found.output


def test_progress_for_machines(
    tiny_bert_dir: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("obce.cli._PLAIN_SECONDS", 0.0)
    arguments = ("score", tiny_bert_dir, corpus, "--batch-tokens", 200, "--shard-texts", 60)
    found = obce(*arguments, "--json", "--out", tmp_path / "a")
    assert found.exit_code == 0, found.output
    lines = [json.loads(line) for line in found.stderr.splitlines()]
    assert len(lines) > 5
    for line in lines:
        assert line["step"] == "scoring"
        assert (line["of"], line["resumed"]) == (200, 0)
        assert line["texts_per_s"] > 0
        assert line["tokens_per_s"] > line["texts_per_s"]
        assert line["seconds_left"] >= 0
        assert line["resident_mb"] is None or line["resident_mb"] > 50
    assert [line["texts"] for line in lines] == sorted(line["texts"] for line in lines)
    facts = json.loads(found.stdout)
    assert facts["certified"] == 1
    measured = {"effect", "effect_abs", "spread", "rf", "rf_bagged", "std", "range", "mean", "mean_abs"}
    assert set(facts["stability"]) == measured
    plain = obce(*arguments, "--out", tmp_path / "b")
    assert re.search(r"scoring: \d+/200 texts, [\d,]+ texts/s, [\d,]+ tokens/s.*, \d+ s left", plain.stderr)
    assert "total persistence" in plain.stdout


def test_strict_and_sketch(tiny_bert_dir: Path, texts: list[str], tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("\n".join(texts).encode() + "\nd\u00e9j\u00e0 vu\n".encode("latin-1"))
    refused(obce("score", tiny_bert_dir, file, "--strict", "--out", tmp_path / "run"), "is not UTF-8", "0xe9")
    found = obce("score", tiny_bert_dir, file, "--sketch", "--out", tmp_path / "run", "--json")
    assert found.exit_code == 0, found.output
    facts = json.loads(found.stdout)
    assert facts["replaced"] == 1
    assert 0.95 < facts["certified"] <= 1


def test_merge(tiny_bert_dir: Path, texts: list[str], tmp_path: Path) -> None:
    for name, part in (("a", texts[:100]), ("b", texts[100:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(part), encoding="utf-8")
        found = obce("score", tiny_bert_dir, tmp_path / f"{name}.txt", "--keep-sketch", "--out", tmp_path / name)
        assert found.exit_code == 0, found.output
    found = obce("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "all", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["n_texts"] == 200
    plan = ("plan", tmp_path / "all", "--keep", 0.5, "--of", "encoder", "--score", "rf_bagged", "--dry-run")
    refused(obce(*plan), "was not scored on a file or dataset: name the texts with --corpus, or take --shares uniform")
    for more in (("--shares", "uniform"), ("--corpus", tmp_path / "a.txt")):
        planned = obce(*plan, *more)
        assert planned.exit_code == 0, planned.output
    assert not (tmp_path / "all" / "sensitivity.json").exists()
    refused(obce("merge", tmp_path / "a", "--out", tmp_path / "more"), "holds 1 scorings, expected at least 2")
    refused(obce("merge", tmp_path / "a", tmp_path / "a", "--out", tmp_path / "more"), "100 texts are in more than one")
    refused(obce("merge", tmp_path / "a", tmp_path / "none", "--out", tmp_path / "more"), "has no run.json")
