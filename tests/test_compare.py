"""Scores beside each other on a task: rows, resuming, the table of seeds, and the directory they lie in."""

from __future__ import annotations

import csv
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from obce.compare import COLUMNS, KEY, Way, _row, compare, key_of, row_of, summary
from obce.finetune import Settings, with_head
from obce.glue import TASKS, Examples, TaskData
from obce.run import CompareRun
from obce.scoring import score
from obce.sensitivity import sensitivity

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import BertModel, PreTrainedTokenizerBase

SETTINGS = Settings(max_steps=4, batch_size=8, max_length=32, learning_rate=1e-3)


@pytest.fixture(scope="module")
def data(texts: list[str]) -> TaskData:
    labels = np.array(["river" in text or "city" in text for text in texts], dtype=np.int64)
    return TaskData(
        TASKS["SST-2"], Examples(texts[:60], None, labels[:60]), {"dev": Examples(texts[60:90], None, labels[60:90])}
    )


@pytest.fixture(scope="module")
def encoder(make_bert: Callable[..., BertModel]) -> BertModel:
    return make_bert(seed=1)


def run(
    encoder: BertModel, tokenizer: PreTrainedTokenizerBase, data: TaskData, ways: list[Way], **changed: Any
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    settings = {"settings": SETTINGS, "seeds": (0,), "texts": 40, "effect_texts": 40, "on_row": rows.append} | changed
    compare(encoder, tokenizer, data, ways, **settings)
    return rows


def test_every_way_is_measured_and_tuned_alike(
    encoder: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, data: TaskData
) -> None:
    ways = [
        Way("effect", 0.6, tune=True),
        Way("taylor", 0.6, repair="none"),
        Way("rf", 0.6, of="total", repair="mean"),
        Way("effect", 0.6, shares="measured"),
    ]
    rows = run(encoder, tiny_tokenizer, data, ways)
    assert [(row["score"], row["tuned"]) for row in rows] == [
        (None, True),
        ("effect", False),
        ("effect", True),
        ("taylor", False),
        ("rf", False),
        ("effect", False),
    ]
    dense = rows[0]
    assert (dense["kl"], dense["kept_share"]) == (0.0, 1.0)
    for row in rows[1:]:
        assert set(row) == set(COLUMNS)
        assert row["kl"] > 0
        assert row["kept_share"] <= 0.6
        assert row["encoder"] < dense["encoder"]
    assert rows[2]["loss"] != rows[1]["loss"]
    assert rows[5]["loss"] != rows[1]["loss"], "measured shares are other widths"
    assert len({key_of(row) for row in rows}) == len(rows)


def test_what_is_done_is_not_done_again(
    encoder: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, data: TaskData, tmp_path: Path
) -> None:
    ways = [Way("std", 0.7), Way("random", 0.7, tune=True)]
    whole = run(encoder, tiny_tokenizer, data, ways, folder=tmp_path)
    directory = CompareRun(tmp_path)
    for row in whole[:2]:
        directory.add(row)
    again = CompareRun(tmp_path)
    said: list[str] = []
    run(encoder, tiny_tokenizer, data, ways, folder=tmp_path, done=again.keys(), on_row=again.add, tell=said.append)
    assert [key_of(row) for row in again.rows] == [key_of(row) for row in whole]
    for first, second in zip(whole, again.rows, strict=True):
        assert {**first, "seconds": 0} == {**second, "seconds": 0}, "the dense model was trained once, and kept"
    assert not any("std" in line for line in said)
    assert run(encoder, tiny_tokenizer, data, ways, done=CompareRun(tmp_path).keys()) == []


def test_anything_that_cuts_may_take_part(
    encoder: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, data: TaskData
) -> None:
    seen = []

    def whole(dense: Any, way: Way, corpus: Any, labels: Any) -> Any:
        seen.append((way, len(corpus), len(labels)))
        return dense

    rows = run(encoder, tiny_tokenizer, data, [Way("whole", 0.5)], others={"whole": whole})
    assert seen == [(Way("whole", 0.5), 40, 40)]
    assert (rows[1]["kl"], rows[1]["kept_share"]) == (0.0, 1.0)


def test_labels_are_those_of_the_models_outputs(
    encoder: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, data: TaskData, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[Any] = []
    monkeypatch.setattr(
        "obce.compare.score", lambda *given, **named: scored.append(named["labels"]) or score(*given, **named)
    )
    for names in (["negative", "positive"], ["positive", "negative"]):
        model = with_head(encoder, data.task, 0)
        model.config.id2label = dict(enumerate(names))
        run(model, tiny_tokenizer, data, [Way("taylor", 0.6, repair="none")])
    assert 0 < scored[0].sum() < 40
    np.testing.assert_array_equal(scored[0], 1 - scored[1])


def test_the_ridge_is_that_of_the_way(
    encoder: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, data: TaskData
) -> None:
    ways = [Way("std", 0.6, ridge=ridge) for ridge in (1e-3, 1e3)] + [Way("std", 0.6, repair="mean")]
    rows = run(encoder, tiny_tokenizer, data, ways)[1:]
    assert [row["ridge"] for row in rows] == [1e-3, 1e3, None]
    assert len({row["loss"] for row in rows}) == 3


def test_shares_are_measured_with_the_repair_that_follows(
    encoder: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, data: TaskData, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(
        "obce.compare.sensitivity",
        lambda *given, **named: found.append((named["how"], named["ridge"])) or sensitivity(*given, **named),
    )
    ways = [Way("effect", 0.6, shares="measured", ridge=ridge) for ridge in (1e-3, 10.0)]
    ways += [Way(name, 0.6, shares="estimated", ridge=ridge) for name, ridge in (("effect", 1e-3), ("std", 0.1))]
    run(encoder, tiny_tokenizer, data, [*ways, Way("std", 0.6)])
    assert found == [("measured", 1e-3), ("measured", 10.0), ("estimated", None)]


def test_tables_without_ridges_are_of_the_first_one() -> None:
    fields = {name: "" if value is None else str(value) for name, value in row(metrics="{}", kl=0.0).items()}
    del fields["ridge"]
    assert row_of(fields)["ridge"] is None
    assert row_of({**fields, "repair": "least_squares"})["ridge"] == 0.001
    assert row_of({**fields, "repair": "least_squares", "ridge": "0.1"})["ridge"] == 0.1


def test_whole_numbers_have_the_key_that_files_give_them(data: TaskData) -> None:
    assert _row(data, 0, Way("std", 1, ridge=1), False) == _row(data, 0, Way("std", 1.0, ridge=1.0), False)
    assert key_of(_row(data, 0, Way("std", 1, ridge=0), False))[3:8] == (
        *("1.0", "encoder", "least_squares", "uniform"),
        "0.0",
    )


def test_bad_requests(encoder: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, data: TaskData) -> None:
    with pytest.raises(ValueError, match=r"score is 'magic', expected one of effect, .*random"):
        run(encoder, tiny_tokenizer, data, [Way("magic", 0.5)])
    for name in ("repair", "of", "shares"):
        with pytest.raises(ValueError, match=f"{name} is 'magic', expected one of '"):
            Way("rf", 0.5, **{name: "magic"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep is 0"):
        Way("rf", 0.0)


def row(**changed: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {"task": "RTE", "seed": 0, "score": "rf", "keep": 0.5, "of": "encoder", "repair": "none"}
    plain |= {
        "shares": "uniform",
        "ridge": None,
        "tuned": False,
        "headline": 0.5,
        "loss": 1.0,
        "kl": float("nan"),
        "metrics": {"a": 1.0},
    }
    plain |= {"parameters": 3, "encoder": 2, "kept_share": 0.5, "flops": 7, "bytes": 12, "seconds": 1.5}
    return plain | changed


def test_seeds_become_one_row() -> None:
    rows = [row(seed=i, headline=0.5 + i / 10, kl=float(i)) for i in range(3)] + [row(repair="mean", kl=1.0)]
    first, second = summary(rows)
    assert first["headline"] == pytest.approx(0.6)
    assert (first["headline_min"], first["headline_max"]) == (0.5, 0.7)
    assert first["headline_sd"] == pytest.approx(0.1)
    assert (first["kl"], first["seeds"]) == (1.0, 3)
    assert (second["repair"], second["seeds"], second["headline_sd"]) == ("mean", 1, 0.0)


class TestDirectory:
    def test_rows_come_back_as_they_were(self, tmp_path: Path) -> None:
        run = CompareRun(tmp_path)
        rows = [row(kl=0.25), row(score=None, keep=None, of=None, repair=None, shares=None, tuned=True, kl=0.1)]
        for one in rows:
            run.add(one)
        assert CompareRun(tmp_path).rows == rows
        assert CompareRun(tmp_path).keys() == {key_of(one) for one in rows}
        with run.path.open(encoding="utf-8", newline="") as file:
            assert next(csv.reader(file)) == list(COLUMNS)
        assert len(key_of(rows[0])) == len(KEY)

    def test_one_process_adds_rows_and_keeps_those_of_others(self, tmp_path: Path) -> None:
        first, second = CompareRun(tmp_path), CompareRun(tmp_path)
        with first.locked():
            first.add(row())
            with pytest.raises(ValueError, match="is in use by another process: wait"), second.locked():
                pass
        with second.locked():
            second.add(row(seed=1))
        assert [one["seed"] for one in CompareRun(tmp_path).rows] == [0, 1]

    def test_another_comparison_is_refused(self, tmp_path: Path) -> None:
        CompareRun(tmp_path).ask({"task": "RTE"}, SETTINGS)
        CompareRun(tmp_path).ask({"task": "RTE"}, SETTINGS)
        with pytest.raises(ValueError, match=r"holds a comparison with another learning_rate \(0.001, now 0.1\)"):
            CompareRun(tmp_path).ask({"task": "RTE"}, dataclasses.replace(SETTINGS, learning_rate=0.1))

    @pytest.mark.parametrize(
        "text", ["task,seed\nRTE,0\n", ",".join(COLUMNS) + "\n" + "x," * (len(COLUMNS) - 1) + "x\n"]
    )
    def test_a_damaged_table_is_named(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "compare.csv").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"compare\.csv' is damaged"):
            CompareRun(tmp_path)

    def test_fields_that_are_no_row(self) -> None:
        with pytest.raises(KeyError):
            row_of({"task": "RTE"})
