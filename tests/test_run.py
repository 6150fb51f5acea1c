from __future__ import annotations

import errno
import importlib
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from obce.corpus import read_corpus
from obce.effects import reading_of
from obce.files import locked, whole
from obce.plan import plan
from obce.run import Run, load_model, load_tokenizer, read_kept, read_plan, read_scores, write_scores
from obce.scores import Scores
from obce.scoring import score
from obce.sensitivity import How

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
        ({"effect_texts": 20}, "number of texts in the effect clouds"),
        ({"read": "mean"}, "place that effects are measured at"),
    ],
)
def test_a_run_of_something_else_is_refused(
    change: dict[str, Any],
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
    settings = {key: value for key, value in change.items() if key not in ("texts", "model")}
    with pytest.raises(ValueError, match=f"holds scores of another {word} .*choose another --out"):
        Run(scored).score(model, corpus, **settings)


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
    with whole(target) as path:
        begin(path)
        raise Stopped


def test_nothing_half_written_takes_the_name(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(Stopped):
        stopped_write(target, lambda path: path.write_text("ne"))
    assert target.read_text() == "old"
    with whole(target) as path:
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
    with whole(target) as path:
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


@pytest.fixture(scope="module")
def from_file(tmp_path_factory: pytest.TempPathFactory, tiny_bert_dir: Path, texts: list[str]) -> Path:
    """A run that was scored on 60 texts of a file and planned."""
    folder = tmp_path_factory.mktemp("from-file")
    (folder / "texts.csv").write_text("id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(texts)))
    run = Run(folder / "run")
    run.score(str(tiny_bert_dir), read_corpus(folder / "texts.csv", column="text", limit=60), cloud_texts=0)
    run.make_plan(plan(run.scores(), keep=0.6, of="encoder"))
    return folder


def moved(from_file: Path, tmp_path: Path) -> tuple[Run, Path]:
    """A copy of the run, which reads a file of its own."""
    run = Run(shutil.copytree(from_file / "run", tmp_path / "run"))
    file = Path(shutil.copy(from_file / "texts.csv", tmp_path))
    run._save(reading={**run.state["reading"], "source": str(file)})
    return Run(run.path), file


def test_steps_find_the_model_from_another_folder_and_where_it_was_moved_to(
    tmp_path: Path, tiny_bert_dir: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_bert_dir, tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    run, corpus = Run(tmp_path / "run"), read_corpus(texts[:60])
    run.score("bert", corpus, cloud_texts=0, effect_texts=0)
    run.make_plan(plan(run.scores(), keep=0.9, of="encoder", score="rf"))
    monkeypatch.chdir(tmp_path.parent)
    run.prune(repair="mean")
    (tmp_path / "bert").rename(tmp_path / "moved")
    assert run.score(str(tmp_path / "moved"), corpus, cloud_texts=0, effect_texts=0)[1], "scored again"
    Run(run.path).prune(repair="mean")


def test_what_sites_can_spare_is_found_once(from_file: Path, texts: list[str], tmp_path: Path) -> None:
    run, file = moved(from_file, tmp_path)
    assert run.sensitivity(score="effect", store=False).how == "estimated"
    assert not run.sensitivity_path.exists()
    curves = run.sensitivity(score="effect")
    kept = run.sensitivity_path.read_text()
    seen: list[Any] = []
    assert run.sensitivity(score="effect", progress=lambda *at: seen.append(at)) == curves
    assert not seen, "the file's"
    other = run.sensitivity(score="std", progress=lambda *at: seen.append(at))
    assert seen and other != curves
    run.sensitivity_path.write_text(kept.replace('"curves"', '"curve"'))
    with pytest.raises(ValueError, match=r"sensitivity.json' holds no curves \(KeyError\), expected shares and losses"):
        run.sensitivity(score="effect")
    file.write_text("text\n" + "\n".join(f"other {word}" for word in "abcdefgh"))
    with pytest.raises(ValueError, match="name others with --corpus, or take --shares uniform"):
        run.sensitivity(score="std")


@pytest.mark.parametrize("how", ["estimated", "measured"])
def test_what_was_found_of_layers_is_not_looked_for_again(
    how: How, from_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = moved(from_file, tmp_path)
    module = importlib.import_module("obce.sensitivity")
    monkeypatch.setattr(module, "_HELD_BYTES", 1)  # a backward pass for each layer
    cut: list[int] = []
    cuts = module.single_cuts
    monkeypatch.setattr(module, "single_cuts", lambda *given, **named: (cut.append(given[2]), cuts(*given, **named))[1])
    expected = run.sensitivity(how=how, score="effect", store=False)
    layers = max(cut) + 1
    assert {layer: cut.count(layer) for layer in range(layers)} == dict.fromkeys(range(layers), 3)
    assert not run.sensitivity_path.exists()

    def stop(done: float, of: float) -> None:
        if done == layers - 1 + (how == "estimated") / 2:  # the last layer's moments
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.sensitivity(how=how, score="effect", progress=stop)
    cut.clear()
    assert run.sensitivity(how=how, score="effect") == expected
    assert set(cut) == {layers - 1}
    cut.clear()
    assert run.sensitivity(how=how, score="effect") == expected
    assert not cut, "the file's, which is complete"
    kept = json.loads(run.sensitivity_path.read_text())
    kept["asked"].pop("ridge", None)  # as before there was the name
    run.sensitivity_path.write_text(json.dumps(kept))
    assert run.sensitivity(how=how, score="effect") == expected
    others = set(range(layers)) if how == "measured" else set()
    assert set(cut) == others, "measured ones in the file are of repairs with another ridge"


def test_least_squares_reads_the_corpus_again(
    from_file: Path, tiny_bert_dir: Path, texts: list[str], tmp_path: Path
) -> None:
    from obce.prune import prune

    run, _ = moved(from_file, tmp_path)
    assert run.corpus().texts == tuple(texts[:60])
    seen: list[tuple[float, float]] = []
    small = run.prune(progress=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    model, tokenizer = load_model(tiny_bert_dir), load_tokenizer(tiny_bert_dir)
    by_hand = prune(model, run.plan(), texts=texts[:60], tokenizer=tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), by_hand.parameters(), strict=True))
    config = json.loads((run.model_path / "config.json").read_text())
    assert config["obce"]["repair"] == "least_squares"
    assert config["obce"]["least_squares"]["texts"] == 60
    assert json.loads((run.path / "run.json").read_text())["prune"]["repair"] == "least_squares"
    # other texts than those that were scored
    other = run.prune(corpus=read_corpus(texts[100:140]))
    assert other.config.obce["least_squares"]["texts"] == 40
    assert not torch.equal(other.encoder.layer[0].output.dense.weight, small.encoder.layer[0].output.dense.weight)


def test_a_corpus_that_is_not_what_was_scored(from_file: Path, tmp_path: Path, texts: list[str]) -> None:
    run, file = moved(from_file, tmp_path)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:30], '29,"Another text."\n', *lines[31:]]))
    with pytest.raises(ValueError, match=r"texts of '.*texts\.csv' are not those that run directory '.*--repair mean"):
        run.prune()
    file.unlink()
    with pytest.raises(ValueError, match="there is no file"):
        run.prune()
    assert not run.model_path.exists()
    # neither other texts nor another repair needs the file
    run.prune(repair="mean")
    run.prune(corpus=read_corpus(texts[:40]))
    # lines beyond the limit were never read
    file.write_text("".join([*lines[:70], '70,"Another text."\n']))
    assert len(run.corpus()) == 60


def test_what_another_process_stored_stays(from_file: Path, tmp_path: Path) -> None:
    run, _ = moved(from_file, tmp_path)
    late = Run(run.path)
    run.prune(repair="mean")
    late.make_plan(run.plan())
    assert Run(run.path).state == late.state
    assert late.state["prune"]["repair"] == "mean"


def test_a_file_system_without_locks_keeps_nobody_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=OSError(number, "flock")))
        with locked(tmp_path):
            pass
    monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=OSError(errno.EIO, "flock")))
    with pytest.raises(OSError, match="flock"), locked(tmp_path):
        pass


def test_shards_of_another_process_are_left_alone(
    scored: Path, tiny_bert_dir: Path, texts: list[str], tmp_path: Path
) -> None:
    run = Run(shutil.copytree(scored, tmp_path / "run"))
    shards = run.path / "shards"
    shards.mkdir()

    def reused() -> bool:
        return Run(run.path).score(str(tiny_bert_dir), read_corpus(texts))[1]

    with run._locked():
        assert reused()
    assert shards.exists(), "they are those of a process that runs"
    run._save(scoring={})
    assert reused()
    assert shards.exists(), "the command that was stopped goes on from them"
    del run.state["scoring"]
    run._save()
    assert reused()
    assert not shards.exists(), "of a process that was killed in its last moment"


def test_a_corpus_in_memory_cannot_be_read_again(scored: Path, tmp_path: Path) -> None:
    run = Run(shutil.copytree(scored, tmp_path / "run"))
    run.make_plan(plan(run.scores(), keep=0.6, of="encoder"))
    shutil.rmtree(run.model_path, ignore_errors=True)
    for call in (run.prune, run.corpus):
        with pytest.raises(
            ValueError, match="was not scored on a file or dataset: name the texts with --corpus, or use"
        ):
            call()
    assert not run.model_path.exists()


@pytest.mark.parametrize(
    ("pooling", "read"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
        ([], "cls"),
        (None, "cls"),
    ],
)
def test_where_vectors_are_read(
    pooling: Any, read: str, tmp_path: Path, tiny_bert_dir: Path, texts: list[str], make_bert: Callable[..., BertModel]
) -> None:
    from transformers import BertForSequenceClassification

    source = shutil.copytree(tiny_bert_dir, tmp_path / "model")
    if pooling is not None:
        (source / "1_Pooling").mkdir()
        (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    assert reading_of(load_model(source)) == read
    settings: dict[str, Any] = {"effect_texts": 2, "cloud_texts": 0}
    corpus = read_corpus(texts[:4])
    scores, _ = Run(tmp_path / "run").score(str(source), corpus, **settings)
    assert scores.meta["read"] == read
    # what the caller names goes first, and a head is read as a head
    scores, _ = Run(tmp_path / "named").score(str(source), corpus, read="tokens", **settings)
    assert scores.meta["read"] == "tokens"
    BertForSequenceClassification(make_bert().config).save_pretrained(source)
    scores, _ = Run(tmp_path / "head").score(str(source), corpus, **settings)
    assert scores.meta["read"] == "head"


def test_pooling_that_is_no_json(tmp_path: Path, make_bert: Callable[..., BertModel]) -> None:
    model = make_bert()
    model.config.name_or_path = str(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"pooling '.*config\.json' is not readable JSON"):
        reading_of(model)


def test_results_stay_in_the_report(scored: Path, tmp_path: Path) -> None:
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
    dtype: torch.dtype,
    tmp_path: Path,
    tiny_bert: BertModel,
    tiny_tokenizer: Any,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from obce.evaluate import weight_bytes

    tiny_bert.to(dtype).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    run = Run(tmp_path / "run")
    scores, _ = run.score(str(tmp_path / "model"), read_corpus(texts), keep_sketch=True)
    assert scores.constant.sum() == 3 * 32
    assert read_kept(run.sketch_path).meta["architecture"] == scores.meta["architecture"]
    monkeypatch.setattr("obce.run.sensitivity", lambda model, *given, **named: model.dtype)
    assert run.sensitivity(score="effect", corpus=read_corpus(texts), store=False) == torch.float32
    run.make_plan(plan(scores, keep=0.6, of="encoder"))
    small = run.prune(repair="mean")
    assert small.dtype == dtype
    assert weight_bytes(small) == run.plan().after.bytes
