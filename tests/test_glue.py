"""GLUE: the files of every task, every refusal, metrics by hand, and scores whatever the order of a model's labels."""

from __future__ import annotations

import gzip
import math
import re
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from obce.corpus import CorpusNotFoundError
from obce.glue import (
    TASKS,
    Examples,
    TaskData,
    encode,
    evaluate,
    headline,
    kl_divergence,
    label_order,
    metrics,
    read_task,
    task,
)
from transformers import BertForSequenceClassification, BertModel

# A quote that is never closed, a second script, and a text that looks like a label.
FIRST = ['He said "no', "naïve 東京", "1"]
SECOND = ["It rained.", '"', "entailment"]

# The header and one row of each official file, {0} and {1} the texts and {2} the label.
FORMS: dict[str, tuple[str, str]] = {
    "CoLA": ("", "gj04\t{2}\t*\t{0}"),
    "SST-2": ("sentence\tlabel", "{0}\t{2}"),
    "MRPC": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{2}\t702876\t702977\t{0}\t{1}"),
    "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "7\t8\t9\t{0}\t{1}\t{2}"),
    "STS-B": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tMSRvid\t2012\t1\tnone\tnone\t{0}\t{1}\t{2}",
    ),
    "MNLI": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t2\tfiction\t( a )\t( b )\t(ROOT a)\t(ROOT b)\t{0}\t{1}\tneutral\t{2}",
    ),
    "QNLI": ("index\tquestion\tsentence\tlabel", "0\t{0}\t{1}\t{2}"),
    "RTE": ("index\tsentence1\tsentence2\tlabel", "0\t{0}\t{1}\t{2}"),
    "WNLI": ("index\tsentence1\tsentence2\tlabel", "0\t{0}\t{1}\t{2}"),
}
LABELS: dict[str, tuple[list[str], list[float]]] = {
    "STS-B": (["0.000", "5.000", "2.5"], [0.0, 5.0, 2.5]),
    "MNLI": (["contradiction", "entailment", "neutral"], [2, 0, 1]),
    "QNLI": (["not_entailment", "entailment", "entailment"], [1, 0, 0]),
    "RTE": (["entailment", "not_entailment", "entailment"], [0, 1, 0]),
}
BINARY: tuple[list[str], list[float]] = (["1", "0", "1"], [1, 0, 1])


def content(name: str, rows: list[tuple[str, str, str]]) -> bytes:
    header, row = FORMS[name]
    lines = [header] if header else []
    return ("\n".join([*lines, *(row.format(*fields) for fields in rows)]) + "\n").encode()


def rows_of(name: str) -> list[tuple[str, str, str]]:
    return list(zip(FIRST, SECOND, LABELS.get(name, BINARY)[0], strict=True))


def write(folder: Path, name: str) -> Path:
    """A folder in the form of GLUE's, the training file packed."""
    target = folder / name
    target.mkdir(parents=True)
    (target / "train.tsv.gz").write_bytes(gzip.compress(content(name, rows_of(name))))
    for _, stem in TASKS[name].dev:
        (target / f"{stem}.tsv").write_bytes(content(name, rows_of(name)[::-1]))
    return target


# Files


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("inner", [False, True])
def test_every_task_is_read_as_its_official_files_are(name: str, inner: bool, tmp_path: Path) -> None:
    folder = write(tmp_path, name)
    data = read_task(name.lower().replace("-", ""), folder if inner else tmp_path)
    assert data.task is TASKS[name]
    assert set(data.dev) == ({"matched", "mismatched"} if name == "MNLI" else {"dev"})
    paired = name not in {"CoLA", "SST-2"}
    right = LABELS.get(name, BINARY)[1]
    for examples, step in [(data.train, 1), *((split, -1) for split in data.dev.values())]:
        assert examples.texts == FIRST[::step]
        assert examples.pairs == (SECOND[::step] if paired else None)
        assert examples.labels.tolist() == right[::step]
        assert examples.labels.dtype == (np.float32 if name == "STS-B" else np.int64)


def test_a_byte_order_mark_and_carriage_returns_are_no_text(tmp_path: Path) -> None:
    folder = write(tmp_path, "MRPC")
    plain = read_task("MRPC", folder)
    (folder / "train.tsv.gz").unlink()
    (folder / "train.tsv").write_bytes(b"\xef\xbb\xbf" + content("MRPC", rows_of("MRPC")).replace(b"\n", b"\r\n"))
    assert read_task("MRPC", folder).train.pairs == plain.train.pairs
    assert read_task("MRPC", folder).train.labels.tolist() == plain.train.labels.tolist()


def test_without_a_training_file_there_are_no_training_rows(tmp_path: Path) -> None:
    (write(tmp_path, "QNLI") / "train.tsv.gz").unlink()
    data = read_task("QNLI", tmp_path, limit=2)
    assert len(data.train) == 0
    assert data.train.pairs == []
    assert len(data.dev["dev"]) == 3


def test_limit_samples_training_rows_by_seed_and_keeps_their_order(tmp_path: Path) -> None:
    folder = write(tmp_path, "STS-B")
    rows = [(f"a{i}", f"b{i}", str(i / 20)) for i in range(100)]
    (folder / "train.tsv.gz").write_bytes(gzip.compress(content("STS-B", rows)))
    first = read_task("STS-B", folder, limit=30).train
    numbers = [int(text[1:]) for text in first.texts]
    assert len(numbers) == 30
    assert numbers == sorted(set(numbers))
    assert numbers != list(range(30))
    assert first.pairs == [f"b{i}" for i in numbers]
    np.testing.assert_allclose(first.labels, np.array(numbers) / 20, rtol=1e-6)
    assert read_task("STS-B", folder, limit=30).train.texts == first.texts
    assert read_task("STS-B", folder, limit=30, seed=1).train.texts != first.texts
    assert len(read_task("STS-B", folder, limit=100).train) == 100
    assert len(read_task("STS-B", folder, limit=30).dev["dev"]) == 3


def test_broken_rows_of_qqp_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = write(tmp_path, "QQP")
    whole = content("QQP", rows_of("QQP"))
    (folder / "train.tsv.gz").write_bytes(gzip.compress(whole + b"7\t8\t9\ttorn\n apart\t0\n"))
    data = read_task("QQP", folder)
    assert len(data.train) == 3
    assert data.skipped == 2


def refusal(call: Callable[[], object]) -> str:
    """The error's one sentence."""
    with pytest.raises((ValueError, ImportError)) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("RTE", b"0\ta\tb\tmaybe", r"line 5 of .*train\.tsv has the label 'maybe', expected 'entailment', "),
        ("RTE", b"0\ta\tb", r"line 5 of .*train\.tsv has 3 fields, expected 4 separated by tabs"),
        ("CoLA", b"gj04\t-1\t\ta text", r"line 4 of .*has the label '-1', expected '0', '1'"),
        ("STS-B", b"0\t" * 7 + b"a\tb\thigh", r"line 5 of .*has the score 'high', expected a number from 0 to 5"),
        ("STS-B", b"0\t" * 7 + b"a\tb\t5.01", r"line 5 of .*has the score '5\.01', expected"),
        ("STS-B", b"0\t" * 7 + b"a\tb\tnan", r"line 5 of .*has the score 'nan', expected"),
        ("SST-2", b"caf\xe9\t1", r"line 5 of .*train\.tsv is not UTF-8 at byte 3"),
    ],
)
def test_a_bad_row_is_refused_with_file_and_line(name: str, line: bytes, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path, name)
    (folder / "train.tsv.gz").unlink()
    (folder / "train.tsv").write_bytes(content(name, rows_of(name)) + line + b"\n")
    assert re.search(message, refusal(lambda: read_task(name, folder)))


def test_bad_files_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "SST-2")
    dev = folder / "dev.tsv"
    dev.write_bytes(content("RTE", rows_of("RTE")))
    text = refusal(lambda: read_task("SST-2", folder))
    assert "has the columns 'index', 'sentence1', 'sentence2', 'label', expected 'sentence', 'label'" in text
    dev.write_text("sentence\tlabel\n", encoding="utf-8")
    assert "dev.tsv has no row" in refusal(lambda: read_task("SST-2", folder))
    dev.write_bytes(content("SST-2", rows_of("SST-2")))
    packed = (folder / "train.tsv.gz").read_bytes()
    for damaged in (packed[:-9], b"plain"):
        (folder / "train.tsv.gz").write_bytes(damaged)
        assert "train.tsv.gz is not whole gzip" in refusal(lambda: read_task("SST-2", folder))
    dev.unlink()
    with pytest.raises(CorpusNotFoundError, match=r"expected dev\.tsv or dev\.tsv\.gz there or in a folder 'SST-2'"):
        read_task("SST-2", tmp_path)
    with pytest.raises(CorpusNotFoundError, match=r"^source: there is no directory .*nowhere"):
        read_task("SST-2", tmp_path / "nowhere")


def test_mnli_needs_both_dev_sets(tmp_path: Path) -> None:
    (write(tmp_path, "MNLI") / "dev_mismatched.tsv").unlink()
    with pytest.raises(CorpusNotFoundError, match=r"expected dev_mismatched\.tsv or"):
        read_task("MNLI", tmp_path)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    assert refusal(lambda: read_task("SNLI", tmp_path)).startswith("task: found 'SNLI', expected one of CoLA, SST-2")
    assert refusal(lambda: read_task("RTE", tmp_path, limit=0)).startswith("limit: found 0, expected at least 1")


# Datasets


class FakeSplit:
    def __init__(self, columns: dict[str, list[Any]], names: list[str] | None) -> None:
        self.columns = columns
        self.column_names = list(columns)
        self.features = {"label": types.SimpleNamespace(names=names) if names else object()}

    def __getitem__(self, name: str) -> list[Any]:
        return self.columns[name]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], dict[str, FakeSplit]]:
    """What the stand-in for `datasets` gives for a name and a configuration."""
    held: dict[tuple[str, str], dict[str, FakeSplit]] = {}
    module = types.ModuleType("datasets")
    module.load_dataset = lambda name, configuration: held[name, configuration]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return held


def split(labels: list[Any], names: list[str] | None = None) -> FakeSplit:
    return FakeSplit({"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": labels, "idx": [0, 1]}, names)


def test_a_dataset_is_read_by_its_configuration(hub: dict[tuple[str, str], dict[str, FakeSplit]]) -> None:
    names = ["entailment", "neutral", "contradiction"]
    found = {
        "train": split([2, 0], names),
        "validation_matched": split([0, 1], names),
        "validation_mismatched": split([1, 1], names),
        "test_matched": split([-1, -1], names),
    }
    hub["nyu-mll/glue", "mnli"] = found
    for source in ("datasets", "nyu-mll/glue", "hf:nyu-mll/glue"):
        data = read_task("mnli", source)
        assert (data.train.texts, data.train.pairs, data.train.labels.tolist()) == (["a", "b"], ["c", "d"], [2, 0])
        assert {name: part.labels.tolist() for name, part in data.dev.items()} == {
            "matched": [0, 1],
            "mismatched": [1, 1],
        }
    found["train"] = split([-1, -1], names)
    text = refusal(lambda: read_task("mnli", "datasets"))
    assert "row 0 of nyu-mll/glue:mnli[train] has the label -1, expected 0 to 2" in text
    found["train"] = split([0, 1], names[::-1])
    assert "'contradiction', 'neutral', 'entailment', expected" in refusal(lambda: read_task("mnli", "datasets"))
    found["train"] = FakeSplit({"text": ["a"], "label": [0]}, None)
    assert "has the columns 'text', 'label', expected 'premise'" in refusal(lambda: read_task("mnli", "datasets"))
    del found["validation_matched"]
    assert "has the splits 'train', " in refusal(lambda: read_task("mnli", "datasets"))
    assert "glue:rte could not be read (KeyError: " in refusal(lambda: read_task("rte", "datasets"))


def test_scores_of_a_dataset_stay_numbers(hub: dict[tuple[str, str], dict[str, FakeSplit]]) -> None:
    part = FakeSplit({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [3.2, 5.0]}, None)
    hub["nyu-mll/glue", "stsb"] = {"train": part, "validation": part}
    labels = read_task("STS-B", "datasets").train.labels
    assert labels.dtype == np.float32
    np.testing.assert_array_equal(labels, np.array([3.2, 5.0], np.float32))


def test_without_datasets_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"^source: 'nyu-mll/glue' is no directory here, .* `pip install datasets`"):
        read_task("cola", "nyu-mll/glue")


# Metrics


def test_metrics_by_hand() -> None:
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
    right = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    guessed = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert metrics(TASKS["SST-2"], guessed, right) == {"accuracy": 0.7}
    found = metrics(TASKS["MRPC"], guessed, right)
    assert list(found) == ["accuracy", "f1"]
    assert found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    matthews = metrics(TASKS["CoLA"], guessed, right)["matthews_correlation"]
    assert matthews == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))
    scores = metrics(TASKS["STS-B"], [1.0, 2.0, 4.0], [1.0, 3.0, 2.0])
    assert scores["spearman"] == pytest.approx(0.5)
    assert scores["pearson"] == pytest.approx(1 / math.sqrt(14 / 3 * 2), rel=1e-6)


def test_the_same_answer_everywhere_scores_nothing() -> None:
    assert metrics(TASKS["STS-B"], [2.0, 2.0, 2.0], [0.0, 1.0, 5.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert metrics(TASKS["STS-B"], [2.0], [1.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert metrics(TASKS["CoLA"], [1, 1, 1], [1, 0, 1]) == {"matthews_correlation": 0.0}
    assert metrics(TASKS["QQP"], [0, 0, 0], [1, 0, 1]) == {"accuracy": pytest.approx(1 / 3), "f1": 0.0}
    assert metrics(TASKS["QQP"], [0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0}


def test_metrics_refuse_what_they_cannot_compare() -> None:
    assert "shape (2,) beside labels of shape (3,)" in refusal(lambda: metrics(TASKS["RTE"], [0, 1], [0, 1, 1]))
    assert "not finite" in refusal(lambda: metrics(TASKS["STS-B"], [0.0, math.nan], [0.0, 1.0]))


def test_headline_is_the_mean_of_a_tasks_numbers() -> None:
    assert headline(TASKS["MRPC"], {"dev": {"accuracy": 0.8, "f1": 0.9}}) == pytest.approx(0.85)
    assert headline(TASKS["CoLA"], {"dev": {"matthews_correlation": -0.25}}) == -0.25
    both = {"matched": {"accuracy": 0.8}, "mismatched": {"accuracy": 0.6}}
    assert headline(TASKS["MNLI"], both) == pytest.approx(0.7)
    assert "found no mismatched.accuracy" in refusal(lambda: headline(TASKS["MNLI"], {"matched": both["matched"]}))


def test_kl_divergence_by_hand() -> None:
    first = np.log([[0.5, 0.5], [0.9, 0.1]])
    second = np.log([[0.25, 0.75], [0.9, 0.1]]) + np.array([[3.0], [-100.0]])  # softmax does not see a shift
    by_hand = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert kl_divergence(first, second) == pytest.approx(by_hand, rel=1e-12)
    assert kl_divergence(second, first) != pytest.approx(by_hand, rel=0.01)
    assert kl_divergence(first, first) == 0.0
    assert kl_divergence([[1000.0, 0.0]], [[0.0, 0.0]]) == pytest.approx(math.log(2))
    assert "found shape (2, 1)" in refusal(lambda: kl_divergence(first, second[:, :1]))
    assert "not finite" in refusal(lambda: kl_divergence(first, second * math.inf))


# Models


def classifier(body: BertModel, name: str, seed: int = 1) -> Any:
    """A head for a task whose logits differ clearly from row to row."""
    config = body.config
    config.num_labels = TASKS[name].num_labels
    model = BertForSequenceClassification(config).eval()
    model.bert.load_state_dict(body.state_dict())
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(model.classifier.weight, std=0.5, generator=generator)
    return model


def rows(name: str, texts: list[str], n: int = 40) -> TaskData:
    found = TASKS[name]
    pairs = texts[n : 2 * n] if len(found.texts) == 2 else None
    generator = np.random.default_rng(0)
    labels = (
        generator.uniform(0, 5, n).astype(np.float32)
        if found.regression
        else generator.integers(found.num_labels, size=n)
    )
    examples = Examples(texts[:n], pairs, labels)
    return TaskData(found, examples, {name: examples for name, _ in found.dev})


def one_by_one(model: Any, examples: Examples, tokenizer: Any) -> np.ndarray:
    found = []
    for i, text in enumerate(examples.texts):
        pair = None if examples.pairs is None else examples.pairs[i]
        inputs = tokenizer(text, pair, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            found.append(model(**inputs).logits[0].numpy())
    return np.array(found)


@pytest.mark.parametrize("name", ["CoLA", "STS-B", "MNLI"])
def test_batches_give_the_logits_of_each_row_alone(
    name: str, tiny_bert: BertModel, tiny_tokenizer: Any, texts: list[str]
) -> None:
    model, data = classifier(tiny_bert, name), rows(name, texts)
    model.train()
    model.bert.encoder.eval()  # frozen inside a model in training: both flags must come back
    flags = [module.training for module in model.modules()]
    found = evaluate(model, tiny_tokenizer, data, max_length=64, batch_tokens=300)
    assert [module.training for module in model.modules()] == flags
    model.eval()
    right = data.train.labels
    for result in found.splits.values():
        alone = one_by_one(model, data.train, tiny_tokenizer)
        assert result.logits.dtype == np.float32
        np.testing.assert_allclose(result.logits, alone, atol=2e-5)
        outputs = torch.from_numpy(alone)
        if name == "STS-B":
            loss = torch.nn.functional.mse_loss(outputs[:, 0], torch.from_numpy(right))
            assert result.metrics == pytest.approx(metrics(TASKS[name], alone[:, 0], right), abs=1e-4)
        else:
            loss = torch.nn.functional.cross_entropy(outputs, torch.from_numpy(right))
            assert result.metrics == metrics(TASKS[name], alone.argmax(1), right)
        assert result.loss == pytest.approx(float(loss), abs=1e-4)
    assert set(found.splits) == {split for split, _ in TASKS[name].dev}
    assert found.headline == headline(TASKS[name], {split: r.metrics for split, r in found.splits.items()})


def test_a_pair_is_one_row_of_two_types(tiny_tokenizer: Any) -> None:
    examples = Examples(["the river", "a king " * 30], ["music", "the city " * 5], np.array([0, 1]))
    encoded = encode(examples, tiny_tokenizer, max_length=20)
    batch = encoded.batch([0, 1])
    mark = tiny_tokenizer.convert_ids_to_tokens(batch.inputs["input_ids"][0])
    assert mark[:6] == ["[CLS]", "the", "river", "[SEP]", "music", "[SEP]"]
    assert mark[6:] == ["[PAD]"] * 14
    assert batch.inputs["token_type_ids"][0].tolist() == [0] * 4 + [1] * 2 + [0] * 14
    assert batch.inputs["attention_mask"][0].tolist() == [1] * 6 + [0] * 14
    # the longer text loses its end until both are as long, then they take turns: 17 tokens are left for them
    assert batch.inputs["token_type_ids"][1].tolist() == [0] * 11 + [1] * 9


def test_batches_keep_to_their_places_and_bring_each_row_once(tiny_tokenizer: Any, texts: list[str]) -> None:
    encoded = encode(Examples(texts, None, np.zeros(len(texts))), tiny_tokenizer, max_length=64)
    batches = list(encoded.batches(200))
    assert sorted(np.concatenate([batch.indices for batch in batches])) == list(range(len(texts)))
    assert len(batches) > 5
    assert all(batch.inputs["input_ids"].numel() <= 200 for batch in batches)
    some = np.array([5, 3, 11])
    assert sorted(np.concatenate([b.indices for b in encoded.batches(200, some)])) == [3, 5, 11]
    assert "batch_tokens: found 0" in refusal(lambda: list(encoded.batches(0)))


def test_outputs_in_another_order_are_put_in_the_tasks(
    tiny_bert: BertModel, tiny_tokenizer: Any, texts: list[str]
) -> None:
    model, data = classifier(tiny_bert, "MNLI"), rows("MNLI", texts)
    plain = evaluate(model, tiny_tokenizer, data, max_length=64)
    # the very same outputs in a hub checkpoint's order: contradiction, neutral, entailment
    with torch.no_grad():
        for parameter in (model.classifier.weight, model.classifier.bias):
            parameter.copy_(parameter.flip(0))
    model.config.id2label = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}
    assert label_order(model, data.task).tolist() == [2, 1, 0]
    named = evaluate(model, tiny_tokenizer, data, max_length=64)
    for name, result in plain.splits.items():
        np.testing.assert_allclose(named.splits[name].logits, result.logits, atol=1e-6)
        assert named.splits[name].metrics == result.metrics
        assert np.ptp(result.logits) > 0.5  # outputs that differ, else every order is right
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert label_order(model, data.task).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "names", "order"),
    [
        ("SST-2", ["POSITIVE", "negative"], [1, 0]),
        ("SST-2", ["0", "1"], [0, 1]),
        ("CoLA", ["1", "0"], [1, 0]),
        ("RTE", ["not entailment", "entailment"], [1, 0]),
        ("WNLI", ["entailment", "not_entailment"], [1, 0]),
        ("STS-B", ["similarity"], [0]),
    ],
)
def test_label_names(name: str, names: list[str], order: list[int], tiny_bert: BertModel) -> None:
    model = classifier(tiny_bert, name)
    model.config.id2label = dict(enumerate(names))
    assert label_order(model, TASKS[name]).tolist() == order


def test_names_in_label2id_alone_count(tiny_bert: BertModel) -> None:
    model = classifier(tiny_bert, "RTE")
    model.config.label2id = {"not_entailment": 0, "entailment": 1}
    assert label_order(model, TASKS["RTE"]).tolist() == [1, 0]


def test_heads_that_do_not_fit_are_refused(tiny_bert: BertModel, tiny_tokenizer: Any, texts: list[str]) -> None:
    data = rows("RTE", texts)
    text = refusal(lambda: evaluate(tiny_bert, tiny_tokenizer, data, max_length=64))
    assert text.startswith("model: BertModel has no sequence classification head, expected one with 2 outputs for RTE")
    text = refusal(lambda: evaluate(classifier(tiny_bert, "MNLI"), tiny_tokenizer, data, max_length=64))
    assert "has 3 outputs, expected 2 for RTE" in text
    model = classifier(tiny_bert, "RTE")
    model.config.id2label = {0: "spam", 1: "ham"}
    assert "names the labels 'spam', 'ham', expected 'entailment', 'not_entailment'" in refusal(
        lambda: evaluate(model, tiny_tokenizer, data, max_length=64)
    )


def test_what_cannot_be_evaluated_is_refused(tiny_bert: BertModel, tiny_tokenizer: Any, texts: list[str]) -> None:
    model, data = classifier(tiny_bert, "RTE"), rows("RTE", texts)
    with pytest.raises(ValueError, match="max_length is 65, but the model has 64 positions"):
        evaluate(model, tiny_tokenizer, data, max_length=65)
    assert "max_length: found 4, expected 5 " in refusal(lambda: evaluate(model, tiny_tokenizer, data, max_length=4))
    none = TaskData(data.task, data.train, {"dev": Examples([], [], np.zeros(0, np.int64))})
    assert "examples: found no row" in refusal(lambda: evaluate(model, tiny_tokenizer, none, max_length=64))
    with torch.no_grad():
        model.classifier.bias[0] = math.nan
    text = refusal(lambda: evaluate(model, tiny_tokenizer, data, max_length=64))
    assert "the logits of row 0 of RTE's dev set are not finite (40 of 40 rows)" in text


def test_every_task_has_its_place_in_the_table() -> None:
    assert list(TASKS) == list(FORMS)
    assert [name for name, found in TASKS.items() if found.regression] == ["STS-B"]
    assert task(replace(TASKS["RTE"], name="mine")).name == "mine"
    assert all(task(f" {name.upper()}".strip()) is found for name, found in TASKS.items())
