from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from obce.corpus import read_corpus
from obce.plan import plan
from obce.run import Run, _whole, load_model, load_tokenizer, read_plan, read_scores, write_scores
from obce.scores import Scores
from obce.scoring import score

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import BertModel


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, tiny_bert_dir: Path, texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    Run(path).score(str(tiny_bert_dir), read_corpus(texts))
    return path


def test_scores_survive_the_file(tmp_path: Path, tiny_bert: BertModel, tiny_tokenizer: Any, texts: list[str]) -> None:
    before = score(tiny_bert, tiny_tokenizer, texts)
    write_scores(tmp_path / "scores.parquet", before)
    after = read_scores(tmp_path / "scores.parquet")
    for name in ("layer", "site", "index", "constant"):
        assert (getattr(after, name) == getattr(before, name)).all()
        assert getattr(after, name).dtype == getattr(before, name).dtype
    assert list(after.columns) == list(before.columns)
    for name, column in before.columns.items():
        np.testing.assert_array_equal(after.columns[name], column)
    assert after.meta == json.loads(json.dumps(before.meta))
    assert sorted(after.texts) == sorted(before.texts)
    for name, ids in before.texts.items():
        np.testing.assert_array_equal(after.texts[name], ids)
    assert before.clouds is not None
    assert after.clouds is not None
    assert after.clouds.to_dict() == before.clouds.to_dict()


def test_the_parquet_file_speaks_for_itself(scored: Path) -> None:
    table = pq.read_table(scored / "scores.parquet")
    assert table.num_rows == 3 * (5 * 32 + 64)
    assert table.column("site").to_pylist()[:1] == ["query"]
    constant = np.array(table.column("constant").to_pylist())
    assert table.column("rf").null_count == constant.sum() == 3 * 32
    meta = json.loads(table.schema.metadata[b"obce"])
    assert {"model_hash", "corpus_hash", "seed", "versions"} <= set(meta)


def test_scoring_again_reuses(scored: Path, tiny_bert_dir: Path, texts: list[str]) -> None:
    stamp = (scored / "scores.parquet").stat().st_mtime_ns
    scores, reused = Run(scored).score(str(tiny_bert_dir), read_corpus(texts[::-1]))
    assert reused
    assert len(scores) == 672
    assert (scored / "scores.parquet").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"texts": 100}, "corpus"),
        ({"seed": 1}, "seed"),
        ({"max_length": 16}, "maximum length"),
        ({"model": 1}, "model"),
    ],
)
def test_a_run_of_something_else_is_refused(
    change: dict[str, int],
    word: str,
    scored: Path,
    tiny_bert_dir: Path,
    texts: list[str],
    make_bert: Callable[..., BertModel],
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> None:
    model = str(tiny_bert_dir)
    if "model" in change:
        make_bert(seed=5).save_pretrained(tmp_path)
        tiny_tokenizer.save_pretrained(tmp_path)
        model = str(tmp_path)
    corpus = read_corpus(texts[: change.get("texts", 200)])
    settings = {key: value for key, value in change.items() if key in ("seed", "max_length")}
    with pytest.raises(ValueError, match=f"holds scores of another {word} .*choose another --out"):
        Run(scored).score(model, corpus, **settings)  # type: ignore[arg-type]


def test_plan_prune_and_report_in_one_directory(scored: Path, tiny_bert_dir: Path) -> None:
    run = Run(scored)
    made = plan(run.scores(), keep=0.6, of="encoder", preset="obce-2023")
    run.make_plan(made)
    assert read_plan(run.plan_path) == made
    small = run.prune(repair="mean")
    assert sum(p.numel() for p in small.parameters()) == made.after.parameters
    page = run.report().read_text(encoding="utf-8")
    assert "<!doctype html>" in page.lower()
    assert {p.name for p in scored.iterdir()} == {
        ".lock",
        "run.json",
        "scores.parquet",
        "plan.json",
        "model",
        "report.html",
    }
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {p.name for p in run.model_path.iterdir()}
    assert not list(run.model_path.glob("*.bin"))
    # pruning again replaces the model as a whole
    run.prune(repair="none")
    assert json.loads((scored / "run.json").read_text())["prune"]["repair"] == "none"
    assert not list(scored.glob(".partial-*"))


def test_token_means_in_the_scores_are_those_of_the_texts(scored: Path, tiny_bert_dir: Path, texts: list[str]) -> None:
    from obce.prune import prune

    run = Run(scored)
    made = plan(run.scores(), keep=0.5, of="encoder")
    model, tokenizer = load_model(tiny_bert_dir), load_tokenizer(tiny_bert_dir)
    by_scores = prune(model, made, repair="mean", scores=run.scores())
    by_texts = prune(model, made, repair="mean", texts=texts, tokenizer=tokenizer)
    by_own = prune(model, made, repair="mean", texts=texts)
    assert all(torch.equal(a, b) for a, b in zip(by_own.parameters(), by_texts.parameters(), strict=True))
    for (name, a), (_, b) in zip(by_scores.named_parameters(), by_texts.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_damaged_scores_are_refused(cut: int, scored: Path, tmp_path: Path) -> None:
    data = (scored / "scores.parquet").read_bytes()
    (tmp_path / "scores.parquet").write_bytes(data[:cut])
    with pytest.raises(ValueError, match="damaged or not of obce"):
        read_scores(tmp_path / "scores.parquet")


def test_a_parquet_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    pq.write_table(pa.table({"layer": [1]}), tmp_path / "scores.parquet")
    with pytest.raises(ValueError, match="damaged or not of obce"):
        read_scores(tmp_path / "scores.parquet")


class Stopped(BaseException):
    """A kill in the middle of a write."""


def stopped_write(target: Path, begin: Callable[[Path], object]) -> None:
    with _whole(target) as path:
        begin(path)
        raise Stopped


def test_nothing_half_written_takes_the_name(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(Stopped):
        stopped_write(target, lambda path: path.write_text("ne"))
    assert target.read_text() == "old"
    with _whole(target) as path:
        path.write_text("new")
    assert target.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_nothing_half_written_takes_a_directorys_name(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(Stopped):
        stopped_write(target, lambda path: path.mkdir())
    assert [p.name for p in target.iterdir()] == ["a"]
    with _whole(target) as path:
        path.mkdir()
        (path / "b").write_text("new")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_leavings_of_a_killed_run_are_swept(tmp_path: Path, tiny_bert_dir: Path, texts: list[str]) -> None:
    left = tmp_path / ".partial-dead"
    left.mkdir(parents=True)
    (left / "scores.parquet").write_bytes(b"half")
    Run(tmp_path).score(str(tiny_bert_dir), read_corpus(texts))
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "run.json", "scores.parquet"}


def test_a_directory_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"holds files but no run\.json"):
        Run(tmp_path)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match="is a file, but must be a directory"):
        Run(file)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="was not written by obce"):
        Run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        Run(tmp_path)
    with pytest.raises(ValueError, match=r"has no run\.json"):
        Run.existing(tmp_path / "nowhere")


def test_the_head_of_the_checkpoint_is_kept(tmp_path: Path, make_bert: Callable[..., BertModel]) -> None:
    from transformers import BertForSequenceClassification

    BertForSequenceClassification(make_bert().config).save_pretrained(tmp_path)
    assert type(load_model(tmp_path)) is BertForSequenceClassification


def test_a_missing_pooler_is_left_out_not_invented(tmp_path: Path, make_bert: Callable[..., BertModel]) -> None:
    from safetensors.torch import load_file, save_file

    make_bert().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_model(tmp_path).pooler is None


def spoil(path: Path, how: str) -> None:
    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors"
    if how == "no config":
        (path / "config.json").unlink()
    elif how == "bad config":
        (path / "config.json").write_text("{")
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    elif how == "no weights":
        file.unlink()
    else:
        weights = load_file(file)
        name = "encoder.layer.1.output.dense.weight"
        if how == "lacking":
            del weights[name]
        else:
            weights[name] = weights[name][:, :7].contiguous()
        save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("no config", r"directory without config\.json"),
        ("bad config", r"config\.json that does not load"),
        ("truncated", "could not be loaded"),
        ("no weights", "could not be loaded"),
        ("lacking", "lacks 1 of its weights, among them 'encoder.layer.1.output.dense.weight'"),
        ("other shape", "could not be loaded|another shape"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    how: str, sentence: str, tmp_path: Path, make_bert: Callable[..., BertModel]
) -> None:
    make_bert().save_pretrained(tmp_path)
    spoil(tmp_path, how)
    with pytest.raises(ValueError, match=sentence) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=re.escape("model 'no/such-model' is neither a directory here nor")) as error:
        load_model("no/such-model")
    assert "\n" not in str(error.value)


def test_public_face() -> None:
    import obce

    for name in obce.__all__:
        assert getattr(obce, name) is not None
    # functions, although modules of the same names were imported by this test file
    assert callable(obce.h0)
    assert callable(obce.plan)
    assert callable(obce.prune)
    assert obce.Scores is Scores
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = obce.nonsense  # type: ignore[attr-defined]


def test_results_stay_in_the_report(scored: Path, tmp_path: Path) -> None:
    import shutil

    run = Run(shutil.copytree(scored, tmp_path / "run"))
    row = {"name": "dense", "score": None, "repair": None, "seed": None, "parameters": 1, "encoder": 1, "bytes": 1}
    run.add_results(
        [
            {**row, "latency_ratio": 1.0, "fidelity": 1.0},
            {**row, "name": "other", "score": "rf", "repair": "none", "latency_ratio": 0.5, "fidelity": 0.4321},
        ]
    )
    for _ in range(2):
        assert "0.432" in run.report().read_text(encoding="utf-8")
    run.results_path.write_text("{}")
    with pytest.raises(ValueError, match="holds no list of results"):
        run.report()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_checkpoint_is_scored_in_float32_and_pruned_as_it_is(
    dtype: torch.dtype, tmp_path: Path, tiny_bert: BertModel, tiny_tokenizer: Any, texts: list[str]
) -> None:
    from obce.evaluate import weight_bytes

    tiny_bert.to(dtype).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    run = Run(tmp_path / "run")
    scores, _ = run.score(str(tmp_path / "model"), read_corpus(texts))
    assert scores.constant.sum() == 3 * 32
    run.make_plan(plan(scores, keep=0.6, of="encoder"))
    small = run.prune(repair="mean")
    assert small.dtype == dtype
    assert weight_bytes(small) == run.plan().after.bytes
