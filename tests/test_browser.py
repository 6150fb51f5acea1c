"""The report in a real browser: no error, no request, every neuron found in time, pages opened by link and by key."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from obce.corpus import Corpus
from obce.explain import explain_many, sample
from obce.pages import explained
from obce.plan import plan
from obce.report import render_html
from obce.scoring import score

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from transformers import BertModel, PreTrainedTokenizerBase

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")

HOSTILE = (
    "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> \u202ereversed"
)


@pytest.fixture(scope="module")
def report(
    make_bert: Callable[..., BertModel],
    tiny_tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A report on as many neurons as MiniLM has, on few and hostile texts."""
    model = make_bert(
        seed=1, num_hidden_layers=6, hidden_size=384, intermediate_size=1536, num_attention_heads=12
    ).eval()
    corpus = Corpus((HOSTILE, "<b>bold</b> & a river", *texts[:22]), "texts", 0, 0)
    scores = score(model, tiny_tokenizer, corpus, max_length=48, cloud_texts=0)
    assert len(scores) == 20_736
    made = plan(scores, keep=0.5, of="encoder", score="rf")
    found = list(explain_many(scores, sample(scores, 1), model, tiny_tokenizer, corpus, plan=made, tail=12))
    path = tmp_path_factory.mktemp("report") / "report.html"
    view = explained(scores, found, corpus, plan=made)
    path.write_text(render_html(scores, made, title="a report", explained=view), encoding="utf-8")
    np.save(path.with_suffix(".npy"), scores.column("rf"))
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives it; requirements/dev.txt has it")
    with sync_api.sync_playwright() as tool:
        # a browser does not sandbox itself as root, as which CI runs
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        found = tool.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    seen: list[str] = []
    page.on("console", lambda message: seen.append(message.text))
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.on("request", lambda request: request.url.startswith("file://") or seen.append(request.url))
    page.goto(report.as_uri())
    yield page
    assert seen == [], "no error, no word on the console, no request that leaves the file"
    assert page.title() == "a report", "no text was obeyed"
    context.close()


def first_rows(page: Any, n: int = 3) -> list[str]:
    rows = sorted(page.query_selector_all("#body .row"), key=lambda row: int(row.get_attribute("aria-rowindex")))
    return [row.query_selector("span:nth-child(2)").text_content() for row in rows[:n]]


def test_sorts_filters_and_finds_without_a_stall(page: Any, report: Path) -> None:
    assert page.inner_text("#count") == "20,736 of 20,736"
    for choice, value, count in (
        ("#by", "rf", "20,736"),
        ("#order", "1", "20,736"),
        ("#kind", "intermediate", "9,216"),
        ("#layer", "3", "1,536"),
        ("#which", "page", "1"),
        ("#which", "", "1,536"),
        ("#find", "3.intermediate.77", "1"),
        ("#find", "", "1,536"),
        ("#layer", "", "9,216"),
        ("#kind", "", "20,736"),
        ("#which", "constant", "1,152"),
        ("#which", "", "20,736"),
    ):
        took = page.evaluate(
            """([which, value]) => {
                const node = document.querySelector(which), start = performance.now();
                node.value = value;
                node.dispatchEvent(new Event(which === "#find" ? "input" : "change"));
                return performance.now() - start;
            }""",
            [choice, value],
        )
        assert took < 200, f"{choice} {value} took {took:.0f} ms"
        assert page.inner_text("#count").startswith(f"{count} of"), (choice, value)
    rf = np.load(report.with_suffix(".npy"))
    page.select_option("#order", "-1")
    values = page.eval_on_selector_all("#body .row", "rows => rows.map(row => row.textContent)")
    assert len(values) < 60, "only what is seen is drawn"
    best = int(np.nanargmax(rf))
    layer, rest = divmod(best, 3456)
    kinds = (
        ("query", 384),
        ("key", 384),
        ("value", 384),
        ("attention_output", 384),
        ("intermediate", 1536),
        ("output", 384),
    )
    ends = np.cumsum([width for _, width in kinds])
    at = int(np.searchsorted(ends, rest, side="right"))
    kind, width = kinds[at]
    assert first_rows(page, 1) == [f"{layer}.{kind}.{rest - (ends[at] - width)}"]


def test_keys_move_and_open(page: Any) -> None:
    page.select_option("#which", "page")
    page.focus("#grid")
    second = first_rows(page)[1]
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#body .row.active span:nth-child(2)") == second
    page.keyboard.press("Enter")
    assert page.inner_text("#neuron") == second
    assert page.url.endswith(f"#neuron={second}")
    page.keyboard.press("Tab")
    page.focus("#grid")
    page.keyboard.press("End")
    assert page.inner_text("#body .row.active") != ""
    page.go_back()


def test_links_open_a_neuron_with_and_without_a_page(page: Any, report: Path) -> None:
    page.goto(f"{report.as_uri()}#neuron=2.output.5")
    assert page.inner_text("#neuron") == "2.output.5"
    assert "No page was made for this neuron" in page.inner_text("#detail")
    page.select_option("#which", "page")
    name = first_rows(page, 1)[0]
    page.goto(f"{report.as_uri()}#neuron={name}")
    assert page.inner_text("#neuron") == name
    shown = page.inner_text("#detail")
    assert "Highest outputs" in shown
    assert "document.title" in "".join(shown.split()), "a hostile text is there to read"
    assert page.eval_on_selector_all("#detail img, #detail b, #detail script", "found => found.length") == 0
    page.goto(f"{report.as_uri()}#neuron=99.output.5")
    page.goto(f"{report.as_uri()}#nothing")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_has_no_sideways_scroll(browser: Any, report: Path, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.goto(report.as_uri())
    page.select_option("#which", "page")
    page.focus("#grid")
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) > 380) == (scheme == "light")
    context.close()
