"""The report's pages of neurons and heads: numbers of the table, hostile texts made harmless, texts withheld."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from markupsafe import escape
from obce.clouds import CLOUD_SCORES
from obce.corpus import Corpus, read_corpus
from obce.explain import Findings, examine, sample, search
from obce.heads import sample_clouds
from obce.pages import WITHHELD, explained, harmless
from obce.plan import plan
from obce.prune import prune
from obce.removal import Pruned
from obce.report import render_html
from obce.scoring import score
from obce.sites import SITE_KINDS

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
    return score(model, tiny_tokenizer, corpus, max_length=32)


@pytest.fixture(scope="module")
def found(model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, corpus: Corpus, scores: Scores) -> Findings:
    made = plan(scores, keep=0.6)
    small = prune(model, made, repair="least_squares", texts=corpus, tokenizer=tiny_tokenizer, max_length=32)
    return examine(
        scores,
        model,
        tiny_tokenizer,
        corpus,
        neurons=sample(scores),
        heads=sample_clouds(scores),
        plan=made,
        pruned=Pruned(model, small, made),
        removal=True,
        tail=20,
    )


@pytest.fixture(scope="module")
def explanations(found: Findings) -> list[Explanation]:
    return list(found.neurons)


def data_of(page: str) -> Any:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def floats(coded: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(coded), "<f4")


@pytest.fixture(scope="module")
def page(scores: Scores, found: Findings, corpus: Corpus) -> str:
    made = plan(scores, keep=0.6)
    return render_html(
        scores, made, title="a title", explained=explained(scores, found, corpus, plan=made), repair="least_squares"
    )


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
        assert len(set(sample(scores)) & set(here)) == 3
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
    found = explained(scores, Findings(tuple(explanations)), corpus).isolating
    for row in found[:3]:
        alone = 0
        for i in np.flatnonzero(~scores.constant):
            at = {name: int(numbers[i]) for name, numbers in scores.texts.items()}
            alone += at["gap_below"] == at["least"] == row["number"]
            alone += at["gap_above"] == at["greatest"] == row["number"]
        assert row["neurons"] == alone > 0
    assert [row["neurons"] for row in found] == sorted((row["neurons"] for row in found), reverse=True)


@pytest.mark.parametrize("pages", ["neurons and heads", "heads"])
def test_texts_may_be_withheld(scores: Scores, found: Findings, corpus: Corpus, pages: str) -> None:
    made = plan(scores, keep=0.6)
    found = found if "neurons" in pages else replace(found, neurons=())
    view = explained(scores, found, corpus, plan=made, texts=False)
    page = render_html(scores, made, title="private", explained=view, repair="least_squares")
    assert WITHHELD in page
    for part in ("What pruning removed", "Texts that were cut", "Texts that isolate", "cloud-page"):
        assert part in page
    for text in corpus.texts:
        for piece in {text[:60], text[-60:]}:
            assert piece not in page
            assert json.dumps(piece)[1:-1] not in page
    # no word of the corpus that is not a word of a report without one
    ours = set(words_of(render_html(replace(scores, clouds=None), title="private")))
    ours |= set(words_of("".join(path.read_text(encoding="utf-8") for path in TEMPLATES.iterdir())))
    data = data_of(page)
    outside = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    said = [text["text"] for text in data["texts"].values()]
    said += [line for one in (*data["pages"], *data["heads"]) for line in one["lines"]]
    said += [one["verdict"] for one in data["pages"]]
    leaked = (set(words_of(outside)) | set(words_of(" ".join(said)))) - ours
    theirs = {word for text in corpus.texts for word in words_of(text) if len(word) > 3}
    assert not leaked & theirs
    assert "contains the token" not in page
    plain = json.dumps(data)
    assert '"tokens"' not in plain and '"at": [' not in plain


TEMPLATES = Path(render_html.__code__.co_filename).parent / "templates"


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


def test_heads_have_the_numbers_of_the_table(page: str, scores: Scores, found: Findings, corpus: Corpus) -> None:
    data = data_of(page)
    clouds = scores.clouds
    assert clouds is not None
    assert data["clouds"]["names"] == clouds.names()
    for name in CLOUD_SCORES:
        expected = [None if np.isnan(value) else pytest.approx(value, rel=1e-6) for value in clouds.columns[name]]
        assert data["clouds"]["columns"][name] == expected
    assert [one["name"] for one in data["heads"]] == sample_clouds(scores) == [one.name for one in found.heads]
    drawn = 0
    for one, shown in zip(found.heads, data["heads"], strict=True):
        if one.constant:
            assert shown["tree"] is None
            continue
        row = clouds.names().index(one.name)
        assert max(death for _, _, death in shown["tree"]["merges"]) == clouds.columns["rf"][row]
        assert sum(shown["tree"]["sizes"]) == clouds.n
        for scale, expected in zip(shown["scales"], one.scales, strict=True):
            assert str(expected.alone) in scale["said"]
            for cluster, known in zip(scale["clusters"], expected.clusters, strict=True):
                assert [number for number, _ in cluster["texts"]] == [text.number for text in known.nearest]
                drawn += len(known.nearest)
                for number, _ in cluster["texts"]:
                    assert data["texts"][str(number)]["text"] == harmless(corpus.texts[number])
    assert drawn > 100
    ranked = re.findall(r'<a href="#head=(\d+\.context\.\d+)">(\d+)</a>', page)
    assert len(ranked) == 12
    total = clouds.columns["total_persistence"]
    by_rank = [name for name, _ in sorted(ranked, key=lambda one: int(one[1]))]
    values = [total[clouds.names().index(name)] for name in by_rank]
    assert values == sorted(values, reverse=True)


def test_what_pruning_removed(page: str, found: Findings, corpus: Corpus) -> None:
    went = found.removal
    assert went is not None and went.isolating
    section = page[page.index('id="removal"') : page.index('id="neurons"')]
    assert "What pruning removed" in section
    for one in (*went.recurring, *went.isolating):
        assert f'href="#neuron={one.name}"' in section
        assert f"{one.small:,} of {one.of:,}" in section
    assert "".join(str(escape(harmless(" ".join(corpus.texts[went.isolating[0].texts[0][0]].split()))))) in section
    assert "Readers repaired by least squares" in section
    for site, (before, after) in went.errors.items():
        assert re.search(rf"{site}</th><td>{100 * before:.1f}.%</td><td>{100 * after:.1f}.%</td>", section)
    assert len(went.errors) == 6
    removed = [one for one in found.neurons if one.replaced is not None]
    shown = {one["name"]: one["instead"] for one in data_of(page)["pages"]}
    assert removed
    for one in found.neurons:
        assert (shown[one.name] is None) == (one.replaced is None)
        if one.replaced is not None:
            assert shown[one.name]["words"] == one.replaced.words
            assert [row[0] for row in shown[one.name]["rows"]] == [carrier.name for carrier in one.replaced.carriers]


def test_a_model_of_another_plan_is_not_described(scores: Scores, found: Findings, corpus: Corpus) -> None:
    made = plan(scores, keep=0.6)
    assert found.removal is not None
    went = replace(found, removal=replace(found.removal, repair=None, errors={}))
    view = explained(scores, went, corpus, plan=made)
    page = render_html(scores, made, title="x", explained=view, repair="mean")
    assert "What the plan removes" in page and "is not what this plan cuts" in page
    assert "No model has been pruned yet" in render_html(scores, made, title="x", explained=view)
    for repair, words in (("mean", "bias holds the neuron"), ("none", "Nothing stands in the place")):
        went = replace(found, removal=replace(found.removal, repair=repair, errors={}))
        assert words in render_html(scores, made, title="x", explained=explained(scores, went, corpus, plan=made))


def test_texts_that_were_cut_are_listed(page: str, found: Findings, scores: Scores, corpus: Corpus) -> None:
    assert len(found.truncated) == scores.meta["truncated"] > 0
    table = page[page.index("Table: texts that were cut") :]
    numbers = [int(number) for number in re.findall(r"<tr><td>(\d+)</td>", table)]
    assert numbers == list(found.truncated[:25])
    assert 0 in numbers, "a hostile one"
    assert "&lt;" in table and "<img" not in table


def test_a_text_of_exactly_the_length_was_not_cut(model: BertModel, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    corpus = read_corpus([f"{'river ' * (n - 2)}{word}" for n in (6, 7, 8, 9) for word in ("war", "film", "of", "to")])
    scores = score(model, tiny_tokenizer, corpus, max_length=8, cloud_texts=0, effect_texts=0)
    found = examine(scores, model, tiny_tokenizer, corpus, neurons=["1.value.0"])
    cut = [i for i, text in enumerate(corpus.texts) if len(text.split()) > 6]
    assert list(found.truncated) == cut
    assert len(cut) == scores.meta["truncated"] == 8


def test_what_has_no_room_is_left_out_and_said(scores: Scores, found: Findings, corpus: Corpus) -> None:
    made = plan(scores, keep=0.6, score="std")
    whole = explained(scores, found, corpus, plan=made)
    assert whole.left_out == []
    for room in (200_000, 60_000, 1):
        view = explained(scores, found, corpus, plan=made, data_bytes=room)
        data = json.loads(view.data)
        assert len(view.data) < max(room, 30_000)
        assert "std" in view.scores, "the plan's own score stays"
        assert set(data["columns"]) == set(view.scores)
        out = len(found.neurons) - len(data["pages"]), len(found.heads) - len(data["heads"])
        said = " ".join(view.left_out)
        for what, many in zip(("neurons", "heads"), out, strict=True):
            assert (f"the pages of {many} more {what}" in said) == (many > 0)
        assert all(name in said for name in set(whole.scores) - set(view.scores))
        page = render_html(scores, made, title="x", explained=view)
        for line in view.left_out:
            assert str(escape(line)) in page
    assert min(out) > 0 and view.scores == ["std"]


def test_paper_has_the_highest_neurons(page: str, scores: Scores) -> None:
    table = page[page.index('class="paper"') : page.index("<noscript>")]
    names = re.findall(r'<th scope="row">([^<]+)</th>', table)
    best = np.argsort(-scores.column("effect"), kind="stable")[:25]
    kinds = np.array([f"{scores.layer[i]}.{SITE_KINDS[scores.site[i]]}.{scores.index[i]}" for i in best])
    assert names == kinds.tolist()


def test_without_a_plan_or_texts_at_the_gaps(scores: Scores, explanations: list[Explanation], corpus: Corpus) -> None:
    view = explained(replace(scores, texts={}), Findings(tuple(explanations[:1])), corpus)
    assert view.isolating == []
    assert json.loads(view.data)["kept"] is None
