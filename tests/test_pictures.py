from __future__ import annotations

import dataclasses
import sys
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from obce.h0 import h0
from obce.plan import plan
from obce.scores import SCORE_NAMES, Scores
from obce.sites import SITE_KINDS

mpl = pytest.importorskip("matplotlib", reason="matplotlib draws; requirements/dev.txt has it, so CI runs these")

from obce.pictures import (  # noqa: E402  (needs matplotlib)
    BARS,
    KINDS,
    LEAVES,
    LEVELS,
    barcode,
    distribution,
    keep_map,
    medians,
    merge_tree,
    save,
    tradeoff,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from matplotlib.figure import Figure


def make_scores(layers: int = 3, hidden: int = 32, inner: int = 64, seed: int = 0, **columns: Any) -> Scores:
    """Log-normal scores of a small BERT; query, key and value of layer 0 constant."""
    rng = np.random.default_rng(seed)
    sites = [(layer, k, inner if kind == "intermediate" else hidden) for layer in range(layers) for k, kind in _KINDS]
    layer, site = (np.concatenate([np.full(s[2], s[i]) for s in sites]) for i in (0, 1))
    constant = (layer == 0) & (site < 3)
    drawn = {name: rng.lognormal(size=len(layer)) for name in SCORE_NAMES}
    for name in ("rf", "std", "range"):
        drawn[name][constant] = np.nan
    encoder = layers * (4 * hidden * (hidden + 1) + 4 * hidden + 2 * hidden * inner + inner + hidden)
    facts = {
        "hidden_size": hidden,
        "num_attention_heads": 4,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "parameters": encoder + 1000,
        "encoder_parameters": encoder,
        "weight_bytes": 4 * (encoder + 1000),
        "encoder_element_bytes": 4,
        "pooler": False,
    }
    return Scores(
        layer.astype(np.int16),
        site.astype(np.int8),
        np.concatenate([np.arange(s[2], dtype=np.int32) for s in sites]),
        constant,
        drawn | columns,
        {"model_hash": "m", "corpus_hash": "c", "seed": seed, "n_texts": 1000, "architecture": facts},
    )


_KINDS = tuple(enumerate(SITE_KINDS))


def make_rows(tasks: tuple[str, ...] = ("SST-2",), seeds: int = 3) -> list[dict[str, Any]]:
    """Rows of a comparison: two scores at three budgets, the dense model; the headline tells where it belongs."""
    found: list[dict[str, Any]] = []
    for t, task in enumerate(tasks):
        for seed in range(seeds):
            base = {"task": task, "seed": seed, "metrics": {"accuracy": 0.0}, "shares": "uniform"}
            dense = {"score": None, "keep": None, "of": None, "repair": None, "shares": None}
            found.append(base | dense | {"tuned": True, "headline": 0.9 + 0.01 * seed, "kept_share": 1.0})
            for s, score in enumerate(("effect", "rf")):
                for keep in (0.3, 0.5, 0.7):
                    facts = {"score": score, "keep": keep, "of": "encoder", "repair": "least_squares", "tuned": False}
                    value = keep - 0.1 * s + 0.01 * seed - 0.05 * t
                    found.append(base | facts | {"headline": value, "kept_share": keep - 0.001 * seed})
                    found.append(found[-1] | {"tuned": True, "headline": value + 0.1})
    return found


def cloud(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3))


def pictures(scores: Scores) -> dict[str, Callable[[], Figure]]:
    answer = h0(cloud(80), edges=True)
    return {
        "distribution": lambda: distribution(scores, name="model"),
        "medians": lambda: medians(scores, name="model"),
        "barcode": lambda: barcode(answer.deaths[0], name="layer 1, head 2, query"),
        "merge-tree": lambda: merge_tree(answer.linkage(0), name="layer 1, head 2, query"),
        "map": lambda: keep_map(scores, plan(scores, keep=0.6, of="encoder", drop_layers=1), name="model"),
        "tradeoff": lambda: tradeoff(make_rows(("SST-2", "CoLA", "RTE")), name="comparison"),
    }


@pytest.fixture(scope="module")
def scores() -> Scores:
    return make_scores()


def texts_of(figure: Figure) -> list[Any]:
    """Texts that are drawn: not empty, visible, and no tick's beyond its axis."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:
                    hidden |= {tick.label1, tick.label2}
    return [t for t in figure.findobj(Text) if t.get_text() and t.get_visible() and t not in hidden and _shown(t)]


def _shown(text: Any) -> bool:
    extent = text.get_window_extent()
    return bool(extent.width and extent.height)


def check_page(figure: Figure) -> None:
    """One column wide, everything on the page, no text over another one, none too small to read."""
    texts = texts_of(figure)
    width, height = figure.get_size_inches()
    assert width == 3.5
    box = figure.get_tightbbox()
    assert box.x0 >= -0.01 and box.y0 >= -0.01 and box.x1 <= width + 0.01 and box.y1 <= height + 0.01
    assert len(texts) >= 5
    assert min(text.get_fontsize() for text in texts) >= 6
    extents = [(text.get_text(), text.get_window_extent()) for text in texts]
    for (one, a), (other, b) in combinations(extents, 2):
        across, down = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 0.5 or down <= 0.5, f"{one!r} lies over {other!r}"


def words_of(figure: Figure) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text) if text.get_visible())


# ---- every kind ---------------------------------------------------------------------------------------------------


def test_every_kind_is_listed(scores: Scores) -> None:
    assert set(KINDS) == set(pictures(scores))


@pytest.mark.parametrize("kind", KINDS)
def test_same_input_same_bytes_on_one_page_and_nothing_left_behind(kind: str, scores: Scores, tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    outside = dict(mpl.rcParams)
    with mpl.rc_context({"axes.facecolor": "black", "font.size": 20, "text.parse_math": True}):
        before = dict(mpl.rcParams)
        one = save(pictures(scores)[kind](), tmp_path / "a", kind)
        assert dict(mpl.rcParams) == before
    figure = pictures(scores)[kind]()
    assert figure.get_facecolor() == (1, 1, 1, 1)
    check_page(figure)
    two = save(figure, tmp_path / "b", kind)  # a figure that was drawn before gives the same file
    assert [path.name for path in one] == [f"{kind}.png", f"{kind}.svg"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [f"{kind}.png", f"{kind}.svg"]
    for a, b in zip(one, two, strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert b"<dc:date>" not in one[1].read_bytes() and b"Software" not in one[0].read_bytes()[:400]
    assert plt.get_fignums() == []
    assert dict(mpl.rcParams) == outside


def test_another_input_gives_other_bytes(tmp_path: Path) -> None:
    one, two = (save(medians(make_scores(seed=seed)), tmp_path, f"medians-{seed}") for seed in (0, 1))
    assert one[0].read_bytes() != two[0].read_bytes() and one[1].read_bytes() != two[1].read_bytes()


def test_pyplot_is_never_imported(scores: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib.pyplot", "matplotlib.pylab", "pylab"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    for kind, draw in pictures(scores).items():
        figure = draw()
        if kind == "barcode":
            save(figure, tmp_path, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_matplotlib_is_one_sentence(
    kind: str, scores: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = barcode([1.0])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    says = r"^pictures need the package matplotlib, which is not installed; .*`pip install 'obce\[bench\]'`\.$"
    with pytest.raises(ImportError, match=says):
        pictures(scores)[kind]()
    with pytest.raises(ImportError, match=says):
        save(figure, tmp_path, "any")


def test_saving_takes_a_figure_off_pyplots_list(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    figure = plt.figure()
    assert plt.fignum_exists(figure.number)
    save(figure, tmp_path, "mine")
    assert plt.get_fignums() == []


@pytest.mark.parametrize("name", ["", "a/b", ".."])
def test_a_name_with_a_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name is .* expected a file name"):
        save(barcode([1.0]), tmp_path / "none", name)
    assert not (tmp_path / "none").exists()


def test_text_from_outside_is_no_formula_and_no_markup(tmp_path: Path) -> None:
    from xml.etree import ElementTree as ET

    name = "from $5 to $_{6 <b>&\n\x00 end"
    figure = barcode([1.0, 2.0], name=name, unit="\\frac$")
    assert "from $5 to $_{6 <b>& end, 3 points" in words_of(figure)
    _, svg = save(figure, tmp_path, "odd")
    read = "".join(ET.fromstring(svg.read_bytes()).itertext())  # noqa: S314  (our own file)
    assert "from $5 to $_{6 <b>& end, 3 points" in read


def test_long_names_stay_on_the_page(scores: Scores) -> None:
    check_page(medians(scores, name="a very long name of a model " * 9))
    check_page(distribution(scores, name="model/" * 60))


# ---- distribution -------------------------------------------------------------------------------------------------


def outline(axes: Any) -> tuple[np.ndarray, np.ndarray]:
    """Shares and edges of a panel's histogram."""
    data = next(patch for patch in axes.patches if not patch.get_fill()).get_data()
    return data.values, data.edges


def test_distribution_draws_shares_and_levels(scores: Scores) -> None:
    figure = distribution(scores, "rf")
    assert len(figure.axes) == 6
    for axes, kind in zip(figure.axes, scores.kinds(), strict=True):
        rows = np.concatenate([np.arange(len(scores))[scores.rows(layer, kind)] for layer in scores.layers()])
        values = scores.columns["rf"][rows]
        values = values[np.isfinite(values)]
        shares, edges = outline(axes)
        assert shares == pytest.approx(np.histogram(values, edges)[0] / len(values), abs=0)
        assert shares.sum() == pytest.approx(1)
        assert [line.get_xdata()[0] for line in axes.lines] == np.quantile(values, LEVELS).tolist()
        assert len({line.get_linestyle() for line in axes.lines}) == 3
        constant = 32 if kind in ("query", "key", "value") else 0
        assert axes.get_title(
            "left"
        ) == f"{kind.replace('_', ' ')}: {192 if kind == 'intermediate' else 96} neurons" + (
            f" (not drawn: {constant} constant)" if constant else ""
        )
    last = figure.axes[-1]
    assert last.get_xscale() == "log"
    assert last.get_xlabel() == "r_f at [CLS], an edge length (activation units, log scale)"
    words = words_of(figure)
    assert "share of neurons in each bin, %" in words and "1,000 texts" in words
    assert all(f"{level} % lie below" in words for level in (30, 50, 70))


def test_distribution_is_linear_where_decades_are_not_spanned() -> None:
    n = len(make_scores())
    even = make_scores(random=np.random.default_rng(0).random(n))
    assert distribution(even, "random").axes[-1].get_xscale() == "linear"
    signed = make_scores(mean=np.random.default_rng(0).normal(size=n))
    figure = distribution(signed, "mean")
    assert figure.axes[-1].get_xscale() == "linear"
    assert figure.axes[-1].get_xlabel() == "mean at [CLS] (activation units)"


def test_distribution_counts_what_it_leaves_out() -> None:
    scores = make_scores()
    effect = scores.columns["effect"]
    site = scores.rows(1, "value")
    effect[site][:3] = np.nan
    effect[scores.rows(1, "output")][:2] = 0.0
    figure = distribution(scores, "effect")
    titles = {axes.get_title("left") for axes in figure.axes}
    assert "value: 96 neurons (not drawn: 3 undefined)" in titles
    assert "output: 96 neurons (not drawn: 2 at 0)" in titles
    # constant neurons are ranked by a score that is not one of [CLS]
    assert "query: 96 neurons" in titles

    mean = np.random.default_rng(0).normal(size=len(scores))
    mean[scores.rows(2, "key")][0] = 1e6
    rows = scores.rows(2, "key")
    figure = distribution(make_scores(mean=mean), "mean")
    axes = figure.axes[1]
    assert "1 outside" in axes.get_title("left") and "32 constant" in axes.get_title("left")
    assert axes.get_xlim()[1] < 100 < mean[rows].max()
    check_page(figure)


def test_distribution_of_a_site_that_is_all_constant_or_all_equal() -> None:
    scores = make_scores(rf=np.full(len(make_scores()), 2.0))
    constant = scores.constant | (scores.site == 5)
    figure = distribution(dataclasses.replace(scores, constant=constant), "rf")
    assert figure.axes[5].get_title("left") == "output: 96 neurons (not drawn: 96 constant)"
    assert not figure.axes[5].patches and figure.axes[0].patches
    assert outline(figure.axes[0])[0].sum() == 1
    check_page(figure)


# ---- medians ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["rf", "effect"])
def test_medians_are_the_medians(scores: Scores, score: str) -> None:
    figure = medians(scores, score)
    (axes,) = figure.axes
    expected = scores.medians(score)
    column, ranked = scores.column(score), scores.ranked(score)
    lines = axes.containers
    assert len(lines) == 6
    for container, kind in zip(lines, scores.kinds(), strict=True):
        drawn = container[0].get_ydata()
        assert np.array_equal(drawn, [expected[layer, kind] for layer in scores.layers()], equal_nan=True)
        for layer, at, bar in zip(
            scores.layers(), container[0].get_xdata(), container[2][0].get_segments(), strict=True
        ):
            assert abs(at - layer) < 0.4
            some = column[scores.rows(layer, kind)][ranked[scores.rows(layer, kind)]]
            if some.size:
                assert [y for _, y in bar] == pytest.approx(np.quantile(some, (0.25, 0.75)))
    assert len({(c[0].get_color(), c[0].get_marker(), c[0].get_linestyle()) for c in lines}) == 6
    assert len({c[0].get_marker() for c in lines}) == 6
    words = words_of(figure)
    assert axes.get_xlabel() == "layer"
    assert ("activation units" if score == "rf" else "units of what is read") in axes.get_ylabel()
    assert ("no point (constant or undefined): query, key, value of layer 0" in words) == (score == "rf")


def test_medians_of_a_deep_model_and_of_a_median_of_zero() -> None:
    deep = make_scores(layers=24)
    figure = medians(deep)
    assert [len(c[0].get_ydata()) for c in figure.axes[0].containers] == [24] * 6
    check_page(figure)
    scores = make_scores()
    scores.columns["effect"][scores.rows(1, "value")] = 0.0
    figure = medians(scores, "effect")
    assert figure.axes[0].get_yscale() == "linear"
    assert figure.axes[0].containers[2][0].get_ydata()[1] == 0.0
    assert medians(make_scores(), "effect").axes[0].get_yscale() == "log"


@pytest.mark.parametrize("draw", [distribution, medians])
def test_scores_that_cannot_be_drawn_are_refused(draw: Callable[..., Figure], scores: Scores) -> None:
    with pytest.raises(ValueError, match=r"score is 'nope', but these scores hold effect"):
        draw(scores, "nope")
    nothing = dataclasses.replace(scores, constant=np.ones(len(scores), bool))
    with pytest.raises(ValueError, match=r"score is 'rf', which is undefined or constant for all 672 neurons"):
        draw(nothing, "rf")
    empty = Scores(*(np.empty(0, kind) for kind in (np.int16, np.int8, np.int32, bool)), {}, {})
    with pytest.raises(ValueError, match=r"scores holds no neurons"):
        draw(empty)


def test_a_score_of_ones_own_is_named() -> None:
    scores = make_scores()
    own = scores.with_column("my_score", np.arange(len(scores), dtype=float))
    assert medians(own, "my_score").axes[0].get_ylabel() == "median my_score\n(its own unit)"


# ---- barcode ------------------------------------------------------------------------------------------------------


def bars_of(figure: Figure) -> list[list[list[float]]]:
    return [segment.tolist() for segment in figure.axes[0].collections[0].get_segments()]


def test_barcode_draws_every_death_and_the_bar_that_never_ends() -> None:
    deaths = h0(cloud(20)).deaths[0]
    figure = barcode(deaths[::-1], name="cloud", unit="metres")
    axes = figure.axes[0]
    bars = bars_of(figure)
    assert [bar[1][0] for bar in bars] == np.sort(deaths).tolist()
    assert {bar[0][0] for bar in bars} == {0.0}
    endless, r_f = axes.lines
    assert endless.get_xdata()[0] == 0 and endless.get_xdata()[1] > deaths.max() and endless.get_marker() == ">"
    assert endless.get_ydata()[0] > bars[-1][0][1] > bars[0][0][1]
    assert r_f.get_xdata()[0] == deaths.max()
    words = words_of(figure)
    assert "scale, an edge length (metres)" in words and "all 20 bars" in words and "cloud, 20 points" in words
    assert f"r_f = {deaths.max():.4g}" in words


def test_barcode_thins_to_the_longest_and_says_so() -> None:
    deaths = np.random.default_rng(0).random(1999)
    figure = barcode(deaths)
    assert [bar[1][0] for bar in bars_of(figure)] == np.sort(deaths)[-(BARS - 1) :].tolist()
    assert figure.axes[0].get_ylabel() == f"the {BARS} longest of 2,000 bars"


def test_barcode_of_a_cloud_in_parts() -> None:
    figure = barcode([0.0, 1.0, np.inf, np.inf])
    assert [bar[1][0] for bar in bars_of(figure)] == [0.0, 1.0]
    assert len(figure.axes[0].lines) == 3  # and no r_f
    words = words_of(figure)
    assert "never merge (3)" in words and "r_f" not in words and "1 bar of length 0" in words
    check_page(figure)
    for deaths in ([np.inf], np.zeros(100), [1e-30]):
        check_page(barcode(deaths))


@pytest.mark.parametrize(
    ("deaths", "says"),
    [
        ([], r"deaths has the shape \(0,\), expected \[n - 1\]"),
        ([[1.0, 2.0]], r"deaths has the shape \(1, 2\)"),
        (1.0, r"deaths has the shape \(\)"),
        ([1.0, np.nan], "deaths holds NaN or a negative number"),
        ([-1.0], "deaths holds NaN or a negative number"),
        (["long"], "deaths is not made of numbers"),
        ([[1.0], [1.0, 2.0]], "deaths is not made of numbers"),
    ],
)
def test_deaths_that_are_none_are_refused(deaths: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        barcode(deaths)
    assert "\n" not in str(caught.value)


# ---- merge tree ---------------------------------------------------------------------------------------------------


def links_of(figure: Figure) -> Any:
    from matplotlib.collections import LineCollection

    return [c for c in figure.axes[0].collections if isinstance(c, LineCollection)][-1]


def test_merge_tree_draws_every_merge_at_its_height() -> None:
    linkage = h0(cloud(12), edges=True).linkage(0)
    names = [f"text {i}" for i in range(12)]
    figure = merge_tree(linkage, names, unit="metres")
    links = links_of(figure).get_segments()
    assert sorted(link[1][0] for link in links) == sorted(linkage[:, 2].tolist())
    assert all(link[1][0] == link[2][0] for link in links)
    assert sum(link[corner][0] == 0 for link in links for corner in (0, 3)) == 12
    axes = figure.axes[0]
    assert sorted(text.get_text() for text in axes.get_yticklabels()) == sorted(names)
    assert "scale, an edge length" in axes.get_xlabel() and "(metres)" in axes.get_xlabel()
    assert "12 points, 11 merges" in words_of(figure)
    check_page(merge_tree(linkage, ["a name that is much too long to be shown whole"] * 12))


def test_merge_tree_of_two_clusters_colours_both() -> None:
    points = np.concatenate([cloud(8), cloud(9, 1) + 50])
    figure = merge_tree(h0(points, edges=True).linkage(0))
    collection = links_of(figure)
    colours = {tuple(colour) for colour in collection.get_colors()}
    assert len(colours) == 3
    black = [i for i, colour in enumerate(collection.get_colors()) if tuple(colour) == (0, 0, 0, 1)]
    heights = [link[1][0] for link in collection.get_segments()]
    assert black == [int(np.argmax(heights))]
    # one side of the last merge has one colour alone
    sides = {}
    for link, colour in zip(collection.get_segments(), collection.get_colors(), strict=True):
        sides.setdefault(tuple(colour), []).append(link[1][1])
    below = [ys for colour, ys in sides.items() if colour != (0, 0, 0, 1)]
    assert max(below[0]) < min(below[1]) or max(below[1]) < min(below[0])


def test_merge_tree_of_many_points_is_contracted_and_says_so() -> None:
    points = np.concatenate([cloud(150), cloud(150, 1) + 3])
    linkage = h0(points, edges=True).linkage(0)
    figure = merge_tree(linkage)
    links = links_of(figure).get_segments()
    assert sorted(link[1][0] for link in links) == sorted(linkage[-(LEAVES - 1) :, 2].tolist())
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(labels) == LEAVES
    sizes = [int(label[1:-1]) if label.startswith("(") else 1 for label in labels]
    assert sum(sizes) == 300 and max(sizes) > 1
    # a contracted leaf starts at its own last merge, not at 0
    grey = figure.axes[0].collections[0].get_segments()
    assert len(grey) == sum(size > 1 for size in sizes)
    starts = sorted(link[corner][0] for link in links for corner in (0, 3))
    inner = {bar[1][0] for bar in grey}
    assert inner <= set(linkage[: -LEAVES + 1, 2].tolist()) and inner <= set(starts)
    assert starts.count(0.0) == sum(size == 1 for size in sizes)
    words = words_of(figure)
    assert f"300 points, the last {LEAVES - 1} of 299 merges" in words and "in brackets: how many" in words
    check_page(figure)


def test_merge_tree_of_two_points_of_equal_ones_and_of_a_long_chain() -> None:
    assert "2 points, 1 merge" in words_of(merge_tree([[0, 1, 1.5, 2]]))
    check_page(merge_tree(h0(np.zeros((5, 2)), edges=True).linkage(0)))
    # every merge adds one point: scipy would walk such a tree by recursion
    chain = h0(np.cumsum(np.arange(1.0, 3000.0))[:, None], edges=True).linkage(0)
    figure = merge_tree(chain)
    assert len(links_of(figure).get_segments()) == LEAVES - 1


@pytest.mark.parametrize(
    ("linkage", "says"),
    [
        (np.zeros((0, 4)), r"linkage has the shape \(0, 4\)"),
        ([[0, 1, 1.0]], r"linkage has the shape \(1, 3\)"),
        ([[0, 1, np.inf, 2]], "linkage is not a hierarchy"),
        ([[0, 5, 1.0, 2]], "linkage is not a hierarchy"),
        ([[0, 0, 1.0, 2]], "linkage is not a hierarchy"),
        ([[-1, 0, 1.0, 2]], "linkage is not a hierarchy"),
        ([[0.5, 1, 1.0, 2]], "linkage is not a hierarchy"),
        ([[0, 1, -1.0, 2]], "linkage is not a hierarchy"),
        ([[0, 1, 1.0, 3]], "linkage is not a hierarchy"),
        ([[0, 1, 2.0, 2], [2, 3, 1.0, 3]], "linkage is not a hierarchy"),
        ("tree", "linkage is not made of numbers"),
    ],
)
def test_a_linkage_that_is_none_is_refused(linkage: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        merge_tree(linkage)


@pytest.mark.parametrize("labels", [["a"], ["a", "b", "c"], "ab"])
def test_labels_that_do_not_fit_are_refused(labels: Any) -> None:
    with pytest.raises(ValueError, match=r"labels has \d entries, expected 2"):
        merge_tree([[0, 1, 1.0, 2]], labels)


# ---- map ----------------------------------------------------------------------------------------------------------


def test_keep_map_shows_what_is_kept(scores: Scores) -> None:
    made = plan(scores, keep=0.5, of="encoder", drop_layers=1)
    figure = keep_map(scores, made)
    axes = figure.axes[0]
    shares = axes.images[0].get_array()
    assert shares.shape == (3, 6)
    (gone,) = made.layers_dropped
    cells = {(t.get_position()): t.get_text() for t in axes.texts}
    for layer, kind in scores.sites():
        at = (SITE_KINDS.index(kind), layer)
        width = scores.rows(layer, kind).stop - scores.rows(layer, kind).start
        kept = made.kept.get(f"{layer}.{kind}")
        expected = 0.0 if layer == gone else 1.0 if kept is None else len(kept) / width
        assert shares[layer, at[0]] == expected
        if layer != gone:
            assert cells[at] == ("all" if kept is None else f"{100 * expected:.0f}")
    assert cells[2.5, gone] == "layer dropped"
    assert [patch.get_hatch() for patch in axes.patches] == ["/////"]
    assert axes.get_xlabel() == "site" and axes.get_ylabel() == "layer"
    assert figure.axes[1].get_xlabel() == "share of the site's neurons kept, %; all: left whole"
    assert f"keeps {100 * made.kept_share:.1f} % of the encoder's parameters" in words_of(figure)
    assert 0 < shares[(gone + 1) % 3, 0] < 1


def test_keep_map_of_heads_and_of_a_deep_model() -> None:
    deep = make_scores(layers=24)
    made = plan(deep, keep=0.7, of="encoder", units=("heads",), floor=0)
    figure = keep_map(deep, made)
    shares = figure.axes[0].images[0].get_array()
    assert shares[:, 0].tolist() == [len(made.kept.get(f"{layer}.query", range(32))) / 32 for layer in range(24)]
    assert (shares[:, 0] == shares[:, 2]).all() and shares[:, 0].min() < 1
    check_page(figure)


def test_a_plan_of_another_model_is_refused(scores: Scores) -> None:
    made = plan(scores, keep=0.5, of="encoder")
    with pytest.raises(ValueError, match=r"plan is for the model other, expected one for the scored model m; make"):
        keep_map(scores, dataclasses.replace(made, model_hash="other"))
    for kept in ({"7.query": (0,)}, {"0.query": (32,)}, {"0.query": (-1, 3)}):
        with pytest.raises(ValueError, match=rf"plan keeps neurons of the site '{next(iter(kept))}' that were not"):
            keep_map(scores, dataclasses.replace(made, kept=kept))
    empty = Scores(*(np.empty(0, kind) for kind in (np.int16, np.int8, np.int32, bool)), {}, {"model_hash": "m"})
    with pytest.raises(ValueError, match="scores holds no neurons"):
        keep_map(empty, made)


# ---- tradeoff -----------------------------------------------------------------------------------------------------


def test_tradeoff_draws_means_bands_and_the_dense_model() -> None:
    figure = tradeoff(make_rows(("SST-2", "CoLA")))
    assert [axes.get_title("left") for axes in figure.axes] == ["SST-2", "CoLA"]
    for t, axes in enumerate(figure.axes):
        dense, effect, rf = axes.lines
        assert dense.get_ydata() == pytest.approx([0.91, 0.91])
        for s, line in enumerate((effect, rf)):
            assert line.get_xdata() == pytest.approx(np.array([0.3, 0.5, 0.7]) - 0.001)
            assert line.get_ydata() == pytest.approx(np.array([0.3, 0.5, 0.7]) - 0.1 * s + 0.01 - 0.05 * t)
            band = axes.collections[s].get_paths()[0].vertices
            assert band[:, 1].min() == pytest.approx(0.3 - 0.1 * s - 0.05 * t)
            assert band[:, 1].max() == pytest.approx(0.72 - 0.1 * s - 0.05 * t)
        assert effect.get_color() != rf.get_color() and effect.get_marker() != rf.get_marker()
        assert axes.get_ylabel() == "accuracy (1 is best)"
        assert axes.get_xlabel().replace("\n", " ") == "share of the encoder's parameters kept, %"
    words = words_of(figure)
    assert "as cut, uniform shares, repair least squares" in words
    assert "3 seeds a point: mean; band: least to greatest" in words
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "effect", "r_f"]


def test_tradeoff_draws_what_was_asked_for() -> None:
    rows = make_rows(seeds=1)
    assert tradeoff(rows, tuned=True).axes[0].lines[1].get_ydata() == pytest.approx([0.4, 0.6, 0.8])
    other = [row | {"repair": "none", "headline": 0.2} for row in rows if row["score"]]
    both = rows + other
    assert tradeoff(both).axes[0].lines[1].get_ydata() == pytest.approx([0.3, 0.5, 0.7])
    assert tradeoff(both, repair="none").axes[0].lines[1].get_ydata() == pytest.approx([0.2] * 3)
    shared = [row | {"shares": "estimated", "headline": 0.6} for row in rows if row["score"]]
    figure = tradeoff([rows[0], *shared])
    assert figure.axes[0].lines[1].get_ydata() == pytest.approx([0.6] * 3), "there are no others"
    assert "as cut, estimated shares" in words_of(figure)
    assert tradeoff(rows + shared, shares="uniform").axes[0].lines[1].get_ydata() == pytest.approx([0.3, 0.5, 0.7])
    ridges = [row | {"ridge": ridge, "headline": ridge} for row in rows if row["score"] for ridge in (0.1, 0.3)]
    assert tradeoff(ridges, ridge=0.3).axes[0].lines[0].get_ydata() == pytest.approx([0.3] * 3)
    with pytest.raises(ValueError, match=r"ridge is None, but rows know 0\.1, 0\.3: give one of these"):
        tradeoff(ridges)
    total = rows + [row | {"of": "total", "headline": 0.1} for row in rows if row["score"]]
    figure = tradeoff(total, of="total")
    assert figure.axes[0].lines[1].get_ydata() == pytest.approx([0.1] * 3)
    assert figure.axes[0].get_xlabel() == "share of all parameters kept, %"
    assert tradeoff([row for row in rows if row["score"]]).axes[0].lines[0].get_ydata() == pytest.approx(
        [0.3, 0.5, 0.7]
    )


def test_tradeoff_of_points_alone_and_of_undefined_headlines() -> None:
    rows = [row for row in make_rows() if row["keep"] in (None, 0.5)]
    figure = tradeoff(rows)
    low, high = figure.axes[0].get_xlim()
    assert high - low == pytest.approx(0.1, abs=0.02)
    assert figure.axes[0].collections[0].get_segments()[0][:, 1] == pytest.approx([0.5, 0.52])
    check_page(figure)
    lost = [row | {"headline": np.nan} if row["score"] == "rf" or row["seed"] == 0 else row for row in make_rows()]
    figure = tradeoff(lost)
    dense, effect = figure.axes[0].lines
    assert effect.get_ydata() == pytest.approx(np.array([0.3, 0.5, 0.7]) + 0.015)
    assert dense.get_ydata() == pytest.approx([0.915, 0.915])
    assert "2 seeds a point" in words_of(figure)


def test_tradeoff_of_many_scores_and_tasks_is_legible() -> None:
    base = make_rows(("SST-2", "CoLA", "STS-B", "MNLI"), seeds=1)
    metrics = {
        "CoLA": {"matthews_correlation": 0.0},
        "STS-B": {"pearson": 0.0, "spearman": 0.0},
        "MNLI": {"matched accuracy": 0.0, "mismatched accuracy": 0.0},
    }
    base = [row | {"metrics": metrics.get(row["task"], row["metrics"])} for row in base if row["score"] != "rf"]
    others = ["tp_magnitude", "tp_taylor", "mine"]
    rows = base + [row | {"score": score} for row in base if row["score"] for score in (*SCORE_NAMES[1:], *others)]
    figure = tradeoff(rows)
    lines = figure.axes[0].lines[1:]
    assert len(lines) == len(SCORE_NAMES) + 3
    assert len({line.get_marker() for line in lines}) == len(lines)
    labels = [axes.get_ylabel().replace("\n", " ") for axes in figure.axes]
    assert labels == [
        "accuracy (1 is best)",
        "Matthews correlation (1 is best)",
        "mean of Pearson and Spearman (1 is best)",
        "accuracy (1 is best)",
    ]
    check_page(figure)


def test_rows_that_cannot_be_drawn_are_refused() -> None:
    rows = make_rows(seeds=1)
    with pytest.raises(ValueError, match="rows is empty"):
        tradeoff([])
    with pytest.raises(ValueError, match="rows: row 0 lacks headline, expected task, seed"):
        tradeoff([{name: value for name, value in rows[0].items() if name != "headline"}])
    with pytest.raises(ValueError, match=r"repair 'mean', .* but only \(least_squares, uniform, as cut; least_squares"):
        tradeoff(rows, repair="mean")
    with pytest.raises(ValueError, match=r"but only \(dense ones\)"):
        tradeoff(rows[:1])
    with pytest.raises(ValueError, match="of is None, but rows keep shares of the encoder and of the total"):
        tradeoff(rows + [row | {"of": "total"} for row in rows if row["score"]])
    with pytest.raises(ValueError, match="shares is None, but rows know 'estimated', 'uniform': give one of these"):
        tradeoff(rows + [row | {"shares": "estimated"} for row in rows if row["score"]])
    with pytest.raises(ValueError, match="of is 'total', but rows keep shares of 'encoder' alone"):
        tradeoff(rows, of="total")
    with pytest.raises(ValueError, match="rows holds the effect model of SST-2, seed 0, twice"):
        tradeoff([*rows, rows[1]])


def test_a_head_of_a_run_can_be_drawn() -> None:
    """What the command line does with kept vectors: one head's part of a layer's, and its persistence."""
    vectors = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    answer = h0(np.ascontiguousarray(vectors[:, 4:8]), edges=True)
    longest = max(bar[1][0] for bar in bars_of(barcode(answer.deaths[0])))
    top = max(link[1][0] for link in links_of(merge_tree(answer.linkage(0))).get_segments())
    assert longest == pytest.approx(float(answer.r_f[0])) and top == pytest.approx(longest)
