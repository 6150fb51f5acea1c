"""The report in a real browser: no error, no request, every neuron found in time, pages opened by link and by key."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from obce.corpus import Corpus
from obce.explain import examine, sample
from obce.heads import sample_clouds
from obce.pages import explained
from obce.plan import plan
from obce.prune import prune
from obce.removal import Pruned
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
    scores = score(model, tiny_tokenizer, corpus, max_length=48)
    assert len(scores) == 20_736
    made = plan(scores, keep=0.5, of="encoder", score="rf")
    small = prune(model, made, repair="least_squares", texts=corpus, tokenizer=tiny_tokenizer, max_length=48)
    found = examine(
        scores,
        model,
        tiny_tokenizer,
        corpus,
        neurons=sample(scores, 2),
        heads=sample_clouds(scores),
        plan=made,
        pruned=Pruned(model, small, made),
        removal=True,
        tail=12,
    )
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
        ("#which", "page", "2"),
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
    assert first_rows(page, 1) == [name_of(int(np.nanargmax(rf)))]


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


def test_enter_in_the_search_field_stays_here(page: Any, report: Path) -> None:
    page.fill("#find", "3.intermediate.77")
    page.focus("#find")
    page.keyboard.press("Enter")
    assert page.url == report.as_uri()
    assert first_rows(page) == ["3.intermediate.77"]


@pytest.mark.parametrize("sign", ["-1", "1"])
def test_order_is_that_of_the_numbers(page: Any, report: Path, sign: str) -> None:
    rf = np.load(report.with_suffix(".npy"))
    page.select_option("#by", "rf")
    page.select_option("#order", sign)
    defined = np.flatnonzero(~np.isnan(rf))
    order = defined[np.argsort(rf[defined] * int(sign), kind="stable")]
    assert first_rows(page, 20) == [name_of(i) for i in order[:20].tolist()]
    page.focus("#grid")
    page.keyboard.press("End")
    last = page.inner_text("#body .row.active span:nth-child(2)")
    assert np.isnan(rf[row_of(last)]), "what has no value comes last either way"


KINDS = (
    ("query", 384),
    ("key", 384),
    ("value", 384),
    ("attention_output", 384),
    ("intermediate", 1536),
    ("output", 384),
)


def name_of(row: int) -> str:
    layer, rest = divmod(row, 3456)
    for kind, width in KINDS:
        if rest < width:
            return f"{layer}.{kind}.{rest}"
        rest -= width
    raise AssertionError(row)


def row_of(name: str) -> int:
    layer, kind, index = name.split(".")
    before = [width for _, width in KINDS[: [one for one, _ in KINDS].index(kind)]]
    return 3456 * int(layer) + sum(before) + int(index)


def test_heads_open_from_the_ranking_by_link_and_by_key(page: Any, report: Path) -> None:
    assert not page.is_visible("#cloud-page")
    page.click("a[href='#head=2.context.7']")
    assert page.inner_text("#cloud") == "2.context.7"
    assert page.evaluate("document.activeElement.id") == "cloud"
    shown = page.inner_text("#cloud-detail")
    for words in (
        "24 points, one a text, of 32 coordinates",
        "MERGE TREE",
        "BARCODE",
        "LAST TO JOIN",
        "THE PLAN: KEPT",
    ):
        assert words in shown.upper() or words in shown
    merges = page.eval_on_selector("#cloud-detail .tree .tail", "path => path.getAttribute('d').split('M').length - 1")
    assert merges == 23
    assert "document.title" in shown, "a hostile text is there to read"
    assert page.eval_on_selector_all("#cloud-detail img, #cloud-detail b, #cloud-detail script", "a => a.length") == 0
    page.click("#cloud-detail >> text=2.hidden")
    assert page.inner_text("#cloud") == "2.hidden: the output of layer 2"
    page.go_back()
    assert page.inner_text("#cloud") == "2.context.7"
    page.focus("#cloud-detail a")
    assert page.inner_text("#cloud-detail a:focus") == "2.query.7"
    page.keyboard.press("Enter")
    assert page.inner_text("#cloud") == "2.query.7"
    assert page.url.endswith("#head=2.query.7")


def test_every_head_opens_without_a_stall(page: Any, report: Path) -> None:
    for name in ("5.query.3", "0.hidden", "3.value.11", "0.key.0", "1.context.1"):
        page.goto(f"{report.as_uri()}#head={name}")
        assert page.inner_text("#cloud").startswith(name)
    shown = page.evaluate(
        """() => {
            const found = [];
            for (const link of document.querySelectorAll("a[href^='#head=']")) {
                const start = performance.now();
                link.click();
                found.push([link.hash, performance.now() - start]);
            }
            return found;
        }"""
    )
    assert len(shown) > 72
    assert max(took for _, took in shown) < 200
    page.goto(f"{report.as_uri()}#head=0.key.0")
    assert "do not differ beyond rounding" in page.inner_text("#cloud-detail")
    assert "obce explain RUN --head 0.key.0" in page.inner_text("#cloud-detail")
    page.goto(f"{report.as_uri()}#head=9.query.0")
    page.goto(f"{report.as_uri()}#head=1.hidden.0")
    assert page.inner_text("#cloud") == "0.key.0", "what is no head opens nothing"


def test_what_stands_in_for_a_removed_neuron(page: Any) -> None:
    names = page.eval_on_selector_all("#removal ~ .wide th a", "links => links.map(link => link.textContent)")
    assert names
    page.click(f"#removal ~ .wide th >> text={names[0]}")
    assert page.inner_text("#neuron") == names[0]
    page.select_option("#which", "page")
    pages = page.evaluate("JSON.parse(document.getElementById('data').textContent).pages")
    gone = next(one for one in pages if one["instead"] and one["instead"]["rows"])
    page.fill("#find", gone["name"])
    page.focus("#grid")
    page.keyboard.press("Enter")
    shown = page.inner_text("#detail")
    assert "What stands in for it" in shown
    other = gone["instead"]["rows"][0][0]
    page.click(f"#detail >> text={other}")
    assert page.inner_text("#neuron") == other


def test_a_neuron_leads_to_its_head(page: Any, report: Path) -> None:
    page.goto(f"{report.as_uri()}#neuron=3.value.100")
    page.click("#detail >> text=3.value.3")
    assert page.inner_text("#cloud") == "3.value.3"


def test_paper_has_no_empty_table(page: Any, report: Path) -> None:
    assert not page.is_visible(".paper")
    page.goto(f"{report.as_uri()}#head=2.context.7")
    page.emulate_media(media="print")
    assert page.is_visible(".paper") and not page.is_visible("#grid") and not page.is_visible("#tools")
    assert page.is_visible("#cloud-page") and not page.is_visible("#page")
    assert len(page.inner_text(".paper").splitlines()) > 25
    assert page.pdf(format="A4")[:5] == b"%PDF-"
    page.emulate_media(media="screen")


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
    page.goto(f"{report.as_uri()}#head=2.context.7")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) > 380) == (scheme == "light")
    context.close()
