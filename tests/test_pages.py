"""The report's pages of neurons: numbers of the table, hostile texts made harmless, texts withheld."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from obce.corpus import Corpus, read_corpus
from obce.explain import explain_many, sample, search
from obce.pages import WITHHELD, explained, harmless
from obce.plan import plan
from obce.report import render_html
from obce.scoring import score

if TYPE_CHECKING:
    from collections.abc import Callable

    from obce.explain import Explanation
    from obce.scores import Scores
    from transformers import BertModel, PreTrainedTokenizerBase

HOSTILE = [
    "</script><script>document.title='taken'</script> a river",
    "<!-- a river <script> & <img src=x onerror=alert(1)>",
    "the river \u202eturns its direction\u202c and \u2066hides\u2069 something",
    "control \x07\x1b[31m characters \x00 and a tab\there in the river",
    "emoji \U0001f30a\U0001f468\u200d\U0001f469\u200d\U0001f467 beside the river",
    "عربي beside a river",
    "a river " + "x" * 100_000,
    "{{ 7 * 7 }} {% raw %} a river",
]


@pytest.fixture(scope="module")
def corpus(texts: list[str]) -> Corpus:
    return read_corpus([*HOSTILE, *texts[:60]])


@pytest.fixture(scope="module")
def model(make_bert: Callable[..., BertModel]) -> BertModel:
    return make_bert(seed=5).eval()


@pytest.fixture(scope="module")
def scores(model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> Scores:
    return score(model, tiny_tokenizer, corpus, max_length=32, cloud_texts=0)


@pytest.fixture(scope="module")
def explanations(
    model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus, scores: Scores
) -> list[Explanation]:
    return list(
        explain_many(scores, sample(scores), model, tiny_tokenizer, corpus, plan=plan(scores, keep=0.6), tail=20)
    )


def data_of(page: str) -> Any:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def floats(coded: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(coded), "<f4")


@pytest.fixture(scope="module")
def page(scores: Scores, explanations: list[Explanation], corpus: Corpus) -> str:
    made = plan(scores, keep=0.6)
    return render_html(scores, made, title="a title", explained=explained(scores, explanations, corpus, plan=made))


def test_numbers_are_those_of_the_scores(page: str, scores: Scores, explanations: list[Explanation]) -> None:
    data = data_of(page)
    assert set(data["scores"]) == set(scores.names()) - {"mean"}
    for name in data["scores"]:
        expected = np.where(scores.ranked(name), scores.column(name), np.nan).astype(np.float32)
        assert np.array_equal(floats(data["columns"][name]), expected, equal_nan=True)
    assert [(s["layer"], s["kind"]) for s in data["sites"]] == scores.sites()
    assert data["sites"][-1]["start"] + data["sites"][-1]["width"] == len(scores)
    bits = np.unpackbits(np.frombuffer(base64.b64decode(data["constant"]), np.uint8))[: len(scores)]
    assert (bits == scores.constant).all()
    kept = np.unpackbits(np.frombuffer(base64.b64decode(data["kept"]), np.uint8))[: len(scores)]
    for name, indices in plan(scores, keep=0.6).kept.items():
        layer, kind = name.split(".")
        assert np.flatnonzero(kept[scores.rows(int(layer), kind)]).tolist() == list(indices)
    assert data["stability"]["std"]["value"] == round(scores.stability("std").by_kind["value"][0], 4)
    for one, shown in zip(explanations, data["pages"], strict=True):
        assert (shown["name"], shown["verdict"]) == (one.name, one.verdict)
        assert np.array_equal(floats(shown["values"]), one.values)
        if one.gap is not None:
            assert np.float32(shown["gap"]["above"] - shown["gap"]["below"]) == np.float32(scores[one.name]["rf"])
        assert [text["number"] for text in shown["high"]] == [text.number for text in one.high]


def test_every_site_has_pages(explanations: list[Explanation], scores: Scores) -> None:
    names = [one.name for one in explanations]
    assert len(set(names)) == len(names)
    for layer, kind in scores.sites():
        here = [name for name in names if name.startswith(f"{layer}.{kind}.")]
        assert len(here) == 3
        rows = scores.rows(layer, kind)
        if scores.ranked("rf")[rows].any():
            best = int(np.nanargmax(np.where(scores.ranked("rf")[rows], scores.column("rf")[rows], np.nan)))
            assert f"{layer}.{kind}.{best}" in here
    with pytest.raises(ValueError, match="per_site is 0"):
        sample(scores, 0)


def test_search_finds_neurons_by_their_texts(scores: Scores, corpus: Corpus) -> None:
    found = search(scores, corpus, "DOCUMENT.title")
    assert found
    for name in found:
        layer, kind, index = name.split(".")
        row = scores.rows(int(layer), kind).start + int(index)
        assert 0 in {int(numbers[row]) for numbers in scores.texts.values()}


def test_hostile_texts_are_shown_harmless(page: str) -> None:
    assert page.count("<script") == 2, "the data and our own"
    outside = re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.DOTALL)
    assert "<img" not in outside and "<!--" not in outside
    assert "&lt;img" in outside or "&lt;/script&gt;" in outside, "the list of odd texts has one of them, escaped"
    texts = {number: one["text"] for number, one in data_of(page)["texts"].items()}
    assert texts["0"] == HOSTILE[0], "nothing is lost of what a page may show"
    assert not any(re.search("[\x00-\x09\x0b-\x1f\u202a-\u202e\u2066-\u2069]", text) for text in texts.values())
    assert max(map(len, texts.values())) < 700
    assert "\u202e" not in page
    assert texts["7"] == HOSTILE[7], "a text is no template"


def test_harmless_by_hand() -> None:
    assert harmless("a\tb\x07\u202ec") == "a␣b⟨U+0007⟩⟨U+202E⟩c"
    assert harmless("line\nbreak <b>") == "line\nbreak <b>"
    assert harmless("x" * 1000, 10) == "xxxxxxxxxx … (1,000 letters)"
    assert harmless("é🌊ع") == "é🌊ع"


def test_the_policy_allows_our_script_alone(page: str) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in page
    assert "http://" not in script.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in script


def test_texts_that_isolate_neurons(page: str, scores: Scores, explanations: list[Explanation], corpus: Corpus) -> None:
    found = explained(scores, explanations, corpus).isolating
    for row in found[:3]:
        alone = 0
        for i in np.flatnonzero(~scores.constant):
            at = {name: int(numbers[i]) for name, numbers in scores.texts.items()}
            alone += at["gap_below"] == at["least"] == row["number"]
            alone += at["gap_above"] == at["greatest"] == row["number"]
        assert row["neurons"] == alone > 0
    assert [row["neurons"] for row in found] == sorted((row["neurons"] for row in found), reverse=True)


def test_texts_may_be_withheld(scores: Scores, explanations: list[Explanation], corpus: Corpus) -> None:
    view = explained(scores, explanations, corpus, texts=False)
    page = render_html(scores, title="private", explained=view)
    assert WITHHELD in page
    for text in corpus.texts:
        for piece in {text[:60], text[-60:]}:
            assert piece not in page
            assert json.dumps(piece)[1:-1] not in page
    assert "contains the token" not in page
    assert '"tokens"' not in page and '"at"' not in page


def test_without_a_plan_or_texts_at_the_gaps(scores: Scores, explanations: list[Explanation], corpus: Corpus) -> None:
    view = explained(replace(scores, texts={}), explanations[:1], corpus)
    assert view.isolating == []
    assert json.loads(view.data)["kept"] is None
