from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from obce.clouds import cloud_scores
from obce.plan import Plan, Size
from obce.report import RESULT_KEYS, cloud_table, render_html, summary_tables
from obce.scores import Scores
from obce.sites import SITE_KINDS
from rich.console import Console

HOSTILE = "<script>alert('x')</script>"
VOID = {"meta", "br", "path", "circle", "rect"}


def make_scores(layers: int = 2, hidden: int = 40, intermediate: int = 80, **meta: Any) -> Scores:
    """r_f on which halves disagree, std on which they agree; layer-0 query, key and value are constant."""
    rng = np.random.default_rng(7)
    widths = [intermediate if kind == "intermediate" else hidden for _ in range(layers) for kind in SITE_KINDS]
    sites = [(layer, kind) for layer in range(layers) for kind in range(len(SITE_KINDS))]
    n = sum(widths)
    layer = np.repeat([site[0] for site in sites], widths).astype(np.int16)
    kind = np.repeat([site[1] for site in sites], widths).astype(np.int8)
    constant = (layer == 0) & (kind < 3)
    scale = 10.0 ** (layer - 3.0) * np.exp(rng.normal(0, 0.3, n))
    columns = {"random": rng.random(n), "mean": rng.normal(0, 1, n), "token_mean": np.full(n, np.nan)}
    for suffix in ("", "_a", "_b"):
        columns["rf" + suffix] = np.where(constant, np.nan, scale * np.exp(rng.gumbel(0, 0.8, n)))
        columns["std" + suffix] = np.where(constant, np.nan, scale * np.exp(rng.normal(0, 0.02, n)))
    facts: dict[str, Any] = {
        "model_name": "tiny",
        "model_hash": "ab" * 16,
        "architecture": {"model_type": "bert", "hidden_size": hidden},
        "corpus_source": "sentences.txt",
        "corpus_hash": "cd" * 16,
        "n_texts": 1234,
        "n_tokens": 5678,
        "truncated": 2,
        "max_length": 64,
        "dropped_empty": 1,
        "dropped_duplicate": 3,
        "position": "cls",
        "seed": 0,
        "versions": {"torch": "2"},
    }
    return Scores(
        layer=layer,
        site=kind,
        index=np.concatenate([np.arange(width, dtype=np.int32) for width in widths]),
        constant=constant,
        columns=columns,
        meta=facts | meta,
    )


def make_plan(**changes: Any) -> Plan:
    plan = Plan(
        model_hash="ab" * 16,
        architecture={},
        corpus_hash="cd" * 16,
        score="rf",
        preset="obce-2023",
        keep=None,
        of="encoder",
        seed=0,
        floor=0.0,
        levels={"0": 0.3, "1": 0.7},
        kept={"0.intermediate": tuple(range(56)), "1.query": tuple(range(12)), "1.key": tuple(range(12))},
        before=Size(1_234_567, 1_000_000, 2_500_000_000, 4_938_268),
        after=Size(734_567, 500_000, 1_250_000_000, 2_938_268),
    )
    return replace(plan, **changes)


def row(**values: Any) -> dict[str, Any]:
    dense = {"name": "dense", "score": None, "repair": None, "seed": None, "parameters": 1_234_567}
    return dense | {"encoder": 1, "bytes": 4_938_268, "latency_ratio": 1.0, "fidelity": 1.0} | values


class Page(HTMLParser):
    """What the tests ask of the page, gathered in one pass; refuses markup that is not well nested."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.tables: list[dict[str, int]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append({"caption": 0, "th": 0, "scope": 0})
        elif "table" in self.open and tag in {"caption", "th"}:
            self.tables[-1][tag] += 1
            self.tables[-1]["scope"] += tag == "th" and dict(attrs).get("scope") in {"col", "row", "colgroup"}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def terminal(scores: Scores, plan: Plan | None = None) -> str:
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as shown:
        console.print(*summary_tables(scores, plan), sep="\n")
    return shown.get()


@pytest.fixture(scope="module")
def scores() -> Scores:
    return make_scores()


@pytest.fixture(scope="module")
def html(scores: Scores) -> str:
    return render_html(scores, make_plan(), [row(name="pruned", score="rf", repair="mean"), row()], title="A run")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_page_loads_nothing_and_runs_nothing(html: str, page: Page) -> None:
    assert not page.all("script")
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "img", "image", "use", "base", "form"}
        assert not attributes.keys() & {"src", "srcset", "data", "xlink:href", "background"}
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in html
    assert "@import" not in html
    assert "://" not in html
    policy = next(meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_headings_descend_one_step_at_a_time(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_tables_have_captions_and_every_header_a_scope(page: Page) -> None:
    # stability, medians, counts, kept shares, sizes, dense and pruned, results
    assert len(page.tables) == 7
    for table in page.tables:
        assert table["caption"] == 1
        assert table["th"] == table["scope"] > 0


def test_links_and_labels_point_to_something_unique(page: Page) -> None:
    ids = [str(attributes["id"]) for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        assert (attributes.get("href") or "#trust")[1:] in ids
        for label in (attributes.get("aria-labelledby") or "trust").split():
            assert label in ids


def test_figures_are_labelled_or_hidden(page: Page) -> None:
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") == "true" or (
            svg["role"] == "img" and len(str(svg["aria-labelledby"]).split()) == 2
        )


def test_every_site_of_every_layer_has_its_panel(scores: Scores, page: Page) -> None:
    drawn = [svg["data-site"] for svg in page.all("svg") if "data-site" in svg]
    assert drawn == [f"{layer}.{kind}" for layer, kind in scores.sites()]


@pytest.mark.parametrize(("layer", "kind"), [(0, "output"), (1, "query"), (1, "intermediate")])
def test_panel_states_median_and_percentiles(scores: Scores, html: str, layer: int, kind: str) -> None:
    rows = scores.rows(layer, kind)
    p30, p50, p70 = np.quantile(scores.columns["rf"][rows], (0.3, 0.5, 0.7))
    described = re.search(rf'data-site="{layer}\.{kind}">.*?<desc[^>]*>(.*?)</desc>', html, re.DOTALL)
    assert described is not None
    found = [float(value) for value in re.findall(r"(\d+\.\d+)(?=[,.])", described[1])]
    assert found == pytest.approx([p30, p50, p70], rel=6e-3)


def test_histogram_is_high_where_the_neurons_are(scores: Scores, html: str) -> None:
    described = re.search(r'data-site="1\.output">.*?class="area" d="(.*?)Z"', html, re.DOTALL)
    median = re.search(r'data-site="1\.output">.*?class="median" d="M([\d.]+) ', html, re.DOTALL)
    assert described is not None
    assert median is not None
    steps = [(float(y), float(x)) for y, x in re.findall(r"V([\d.]+)H([\d.]+)", described[1])]
    bars = [96 - y for y, _ in steps]
    # the whole height is used by the fullest bin, and the median splits the area
    assert max(bars) == 70
    left = sum(bar for bar, (_, x) in zip(bars, steps, strict=True) if x <= float(median[1]))
    assert 0.3 < left / sum(bars) < 0.7


def test_medians_stand_in_the_table(scores: Scores, html: str) -> None:
    table = html[html.index('aria-label="Table: median') : html.index('aria-label="Table: neurons')]
    found = [float(value) for value in re.findall(r'style="--h:[\d.]+">([\d.]+)</td>', table)]
    expected = [value for value in scores.medians("rf").values() if not math.isnan(value)]
    assert found == pytest.approx(expected, rel=6e-3)
    assert table.count(">constant</td>") == 3


def test_constant_sites_are_called_undefined(scores: Scores, page: Page) -> None:
    assert page.text.count("All 40 neurons are constant at [CLS]: r_f is undefined.") == 3
    # one line in each of three strips, one box in each of three panels
    assert len(re.findall(r"constant at \[CLS\]: ?undefined", page.text)) == 6
    other = Page(render_html(make_scores(position="mean"), title="t")).text
    assert "All 40 neurons are constant at the mean over tokens: r_f is undefined." in other


def test_stability_and_warning_are_those_of_the_scores(scores: Scores, page: Page) -> None:
    unstable, stable = scores.stability("rf"), scores.stability("std")
    assert unstable.spearman < 0.8 < stable.spearman
    assert "Caution: this ranking by rf is not stable." in page.text
    assert f"Spearman correlation of {unstable.spearman:.2f}".replace("-", "−") in page.text
    assert f"overlap by {100 * unstable.overlap:.1f}" in page.text
    assert "Caution. The ranking behind this plan" in page.text


def test_stable_scores_are_not_warned_about(scores: Scores) -> None:
    columns = dict(scores.columns)
    columns["rf_a"], columns["rf_b"] = columns["std_a"], columns["std_b"]
    steady = replace(scores, columns=columns)
    text = Page(render_html(steady, make_plan(), title="t")).text
    assert "Caution" not in text
    assert "agree on the ranking by rf with a Spearman correlation of 0.9" in text
    assert "Warning" not in terminal(steady)


def test_missing_halves_are_not_taken_for_stability(scores: Scores) -> None:
    bare = replace(scores, columns={name: scores.columns[name] for name in ("rf", "std")})
    text = Page(render_html(bare, title="t")).text
    assert "nothing is known about how far to trust the ranking" in text


@pytest.mark.parametrize("where", ["title", "model_name", "corpus_source", "versions", "architecture"])
def test_names_from_outside_stay_text(where: str) -> None:
    meta: dict[str, Any] = {}
    if where in {"versions", "architecture"}:
        meta = {where: {HOSTILE: HOSTILE}}
    elif where != "title":
        meta = {where: HOSTILE}
    html = render_html(make_scores(**meta), title=HOSTILE if where == "title" else "t")
    assert "<script" not in html
    assert HOSTILE in Page(html).text


def test_names_in_plan_and_results_stay_text(scores: Scores) -> None:
    results = [row(), row(name=HOSTILE, score=HOSTILE, repair=HOSTILE, seed=HOSTILE)]
    html = render_html(scores, make_plan(score=HOSTILE, preset=HOSTILE), results, title="t")
    assert "<script" not in html
    # plan: score, preset; results: four cells, twice in the figure's label and twice in its description
    assert Page(html).text.count(HOSTILE) == 10


def test_plan_shows_kept_shares_and_sizes(page: Page) -> None:
    text = page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert "70.0 %56 of 80" in text
    assert "30.0 %12 of 40" in text
    assert "all40 of 40" in text
    assert "1,234,567734,56759.5 %" in text
    assert "2.50 G1.25 G50.0 %" in text
    assert "4.94 MB2.94 MB59.5 %" in text
    assert "levels of obce-2023" in text
    assert "another corpus" not in text


def test_plan_from_another_corpus_is_noted(scores: Scores) -> None:
    html = render_html(scores, make_plan(corpus_hash="00", preset=None, keep=0.465), title="t")
    assert "made from scores on another corpus" in Page(html).text
    assert "keep 46.5" in html


def test_dense_model_comes_first_and_seeds_share_a_line(scores: Scores) -> None:
    seeds = [row(name=f"random {i}", score="random", repair="none", seed=i, fidelity=0.8 + i / 100) for i in range(3)]
    html = render_html(scores, None, [*seeds, row(latency_ratio=math.nan)], title="t")
    names = re.findall(r'<th scope="row">(dense|random \d)</th>', html)
    assert names == ["dense", "random 0", "random 1", "random 2"]
    assert "random, repair none: 3 models, mean 0.8100, from 0.8000 to 0.8200." in html
    assert "<td>–</td><td>1.0000</td>" in html


@pytest.mark.parametrize(
    ("fidelities", "labels"),
    [
        ([0.71, 0.93], ["0.70", "0.75", "0.80", "0.85", "0.90", "0.95", "1.00"]),
        ([0.9962], ["0.996", "0.997", "0.998", "0.999", "1.000"]),
        ([1.0], ["0.999", "1.000"]),
        ([-0.4], ["−0.5", "0.0", "0.5", "1.0"]),
    ],
)
def test_fidelity_axis_has_round_ticks(scores: Scores, fidelities: list[float], labels: list[str]) -> None:
    html = render_html(scores, None, [row(score="rf", fidelity=value) for value in fidelities], title="t")
    figure = html[html.index('id="dots-d"') : html.index("fidelity (mean cosine")]
    assert re.findall(r'class="tick"[^>]*>([^<]+)<', figure) == labels
    places = [float(x) for x in re.findall(r'class="tick" x="([\d.]+)"', figure)]
    assert (places[0], places[len(labels) - 1]) == (10, 346)


def test_rendering_is_deterministic(scores: Scores, html: str) -> None:
    again = render_html(
        make_scores(), make_plan(), [row(name="pruned", score="rf", repair="mean"), row()], title="A run"
    )
    assert again == html


def test_page_of_the_largest_model_stays_small() -> None:
    assert len(render_html(make_scores(24, 1024, 4096), title="t").encode()) < 1_000_000


def test_all_constant_scores_still_render(scores: Scores) -> None:
    nothing = np.full(len(scores), np.nan)
    flat = replace(
        scores, constant=np.ones(len(scores), bool), columns={"rf": nothing, "rf_a": nothing, "rf_b": nothing}
    )
    assert Page(render_html(flat, title="t")).text.count("are constant at [CLS]: r_f is undefined.") == 12
    assert "constant" in terminal(flat)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0012345, "0.00123"),
        (0.09996, "0.100"),
        (1.0, "1.00"),
        (12345.6, "12,300"),
        (999.6, "1,000"),
        (1.2345e-7, "1.23×10⁻⁷"),
        (-4.5678e9, "-4.57×10⁹"),
        (0.0, "0"),
        (math.nan, "–"),
        (math.inf, "–"),
    ],
)
def test_numbers_have_three_significant_digits(scores: Scores, value: float, text: str) -> None:
    from obce.report import _number

    assert _number(value) == text


def test_terminal_tables_fit_eighty_columns(scores: Scores) -> None:
    assert [len(summary_tables(scores)), len(summary_tables(scores, make_plan()))] == [3, 5]
    shown = terminal(scores, make_plan())
    assert "…" not in shown
    assert max(len(line) for line in shown.splitlines()) <= 80
    for heading in ("attention output", "intermediate", "removed", "Spearman", "before"):
        assert heading in shown


def test_terminal_tables_state_the_facts(scores: Scores) -> None:
    lines = [line.split() for line in terminal(scores, make_plan()).splitlines()]
    assert ["query", "80", "40", "0"] in lines
    assert ["all", "560", "120"] in lines
    medians = scores.medians("rf")
    found = next(line for line in lines if line[:1] == ["1"])
    assert [float(value) for value in found[1:]] == pytest.approx([medians[1, kind] for kind in SITE_KINDS], rel=6e-3)
    assert ["0", "constant", "constant", "constant"] in [line[:4] for line in lines]
    stability = scores.stability("rf")
    spearman = f"{stability.spearman:.2f}".replace("-", "−")
    assert ["rf", spearman, f"{100 * stability.overlap:.1f}", "%"] in lines
    flat = " ".join(word for line in lines for word in line)
    assert "Warning: with other texts of the same kind the ranking by rf would be largely another one" in flat
    assert "Parameters, all 1,234,567 734,567 59.5 %" in flat


def test_markup_in_a_plan_is_not_interpreted_by_the_terminal(scores: Scores) -> None:
    assert "Plan: [bold]x[/bold], levels of [red]y." in terminal(
        scores, make_plan(score="[bold]x[/bold]", preset="[red]y")
    )


@pytest.mark.parametrize("call", [summary_tables, lambda *args: render_html(*args, title="t")])
def test_refusals_name_what_was_found(scores: Scores, call: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^plan: found a plan for the model ffff, expected one for the scored model abab"
    ):
        call(scores, make_plan(model_hash="ffff"))
    with pytest.raises(ValueError, match=r"^plan: found the site '9.query', expected only sites that were scored"):
        call(scores, make_plan(kept={"9.query": (0,)}))
    nothing = slice(0, 0)
    empty = Scores(scores.layer[nothing], scores.site[nothing], scores.index[nothing], scores.constant[nothing], {}, {})
    with pytest.raises(ValueError, match=r"^scores: found no neurons, expected at least one site"):
        call(empty, None)


def test_a_result_row_without_a_key_is_refused(scores: Scores) -> None:
    broken = row()
    del broken["seed"], broken["fidelity"]
    with pytest.raises(ValueError, match=r"^results: row 1 lacks seed, fidelity, expected name, score, repair"):
        render_html(scores, None, [row(), broken], title="t")
    assert set(row()) == set(RESULT_KEYS)


def test_heads_and_layers_as_clouds() -> None:
    rng = np.random.default_rng(0)
    vectors: dict[tuple[int, str], Any] = {}
    for layer in range(2):
        for kind, width in (("query", 8), ("value", 8), ("context", 8), ("hidden", 12)):
            halves = [rng.standard_normal((20, width)).astype(np.float32) * (layer + 1) for _ in "ab"]
            if layer == 0 and kind == "query":
                halves = [np.ones((20, width), np.float32)] * 2
            vectors[layer, kind] = tuple(halves)
    clouds = cloud_scores(vectors, 4)
    scores = replace(make_scores(), clouds=clouds)
    page = render_html(scores, title="x")
    assert 'id="clouds"' in page
    assert "Here they are over 40 texts." in page
    assert 'id="clouds"' not in render_html(make_scores(), title="x")
    contexts = (clouds.kind == 3) & ~clouds.constant
    order = np.argsort(-clouds.columns["total_persistence"][contexts], kind="stable")
    best = np.flatnonzero(contexts)[order[0]]
    (table,) = re.findall(r"Heads ranked by.*?</table>", page, re.DOTALL)
    lines = re.findall(r'<tr><th scope="row">(\d+)</th>(.*?)</tr>', table, re.DOTALL)
    cells = {int(layer): re.findall(r"<td[^>]*>(\d+|constant)", line) for layer, line in lines}
    assert cells[int(clouds.layer[best])][int(clouds.head[best])] == "1"
    ranked = sorted(int(cell) for line in cells.values() for cell in line if cell != "constant")
    assert ranked == list(range(1, contexts.sum() + 1))
    total = clouds.columns["total_persistence"]
    shown = f"{np.median(total[(clouds.layer == 1) & (clouds.kind == 2)]):#.3g}"
    assert shown in page
    console = Console(file=io.StringIO(), width=160)
    console.print(cloud_table(clouds))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [line for line in text.splitlines() if line.strip().startswith(("query", "value", "hidden"))]
    assert [line.split()[1] for line in lines] == ["2", "2", "12"]
    for score in ("rf", "total_persistence", "entropy"):
        expected = f"{clouds.stability(score)['value']:.2f}".replace("-", "\u2212")
        assert expected in lines[1]


def compared(**values: Any) -> dict[str, Any]:
    row = {"task": "SST-2", "score": "rf", "repair": "mean", "keep": 0.5, "of": "encoder", "tuned": False}
    row |= {"shares": "uniform", "ridge": 0.1}
    return row | {"headline": 0.8, "seconds": 1.5} | values


def test_dense_beside_pruned_where_it_was_measured(scores: Scores) -> None:
    made = make_plan(preset=None, keep=0.5)

    def shown(
        results: list[dict[str, Any]], more: list[dict[str, Any]], repair: str | None = "mean"
    ) -> list[list[str]]:
        html = render_html(scores, made, results, title="t", repair=repair, compared=more)
        (table,) = re.findall(r"Table: dense and pruned model.*?</table>", html, re.DOTALL)
        assert ("obce eval MODEL RUN/model" in table) == ("not measured" in table)
        return [
            re.findall(r">([^<]+)</t[hd]>", line)
            for line in re.findall(r"<tr>(.*?)</tr>", table[table.index("<tbody>") :])
        ]

    nothing = ["not measured"] * 2
    assert shown([], []) == [["Quality", *nothing], ["Latency", *nothing]]
    mine = row(name="a", score="rf", repair="mean", parameters=734_567, fidelity=0.912, latency_ratio=0.61)
    assert shown([row(), mine], []) == [["Fidelity", "1.0000", "0.9120"], ["Latency", "1.00", "0.61"]]
    for other in ({"parameters": 700_000}, {"score": "std"}, {"repair": "none"}):
        assert shown([row(), mine | other], []) == [["Quality", *nothing], ["Latency", *nothing]]
    dense = [compared(score=None, repair=None, keep=None, headline=value, seconds=3.0) for value in (0.9, 0.92)]
    rows = [compared(), compared(headline=0.7), compared(tuned=True, headline=0.85)]
    rows.insert(0, compared(headline=0.1, ridge=0.001))  # of a comparison before the last
    rows += [compared(score="std"), compared(shares="measured"), compared(keep=0.6), compared(repair="none")]
    assert shown([], [*dense, *rows]) == [
        ["SST-2, as cut (mean of 2)", "0.9100", "0.7500"],
        ["SST-2, trained again (mean of 1)", "0.9100", "0.8500"],
        ["Latency", "1.00", "0.50"],
    ]
    assert shown([mine], [], None) == [["Quality", *nothing], ["Latency", *nothing]]


def test_levels_are_drawn_where_there_is_room(scores: Scores) -> None:
    html = render_html(scores, title="t")
    panel = html[html.index('data-site="1.output"') :]
    panel = panel[: panel.index("</svg>")]
    drawn = {int(level): float(x) for x, level in re.findall(r'class="level" x="([\d.]+)"[^>]*>(\d+)<', panel)}
    quantile = re.search(r'class="quantile" d="M([\d.]+) [^M]*M([\d.]+) ', panel)
    assert quantile is not None
    assert {30, 70} <= drawn.keys() <= {30, 50, 70}
    assert (drawn[30], drawn[70]) == (float(quantile[1]), float(quantile[2]))
    flat = replace(scores, columns={**scores.columns, "rf": np.where(scores.constant, np.nan, 1.0)})
    assert 'class="level"' not in render_html(flat, title="t")
