"""Pictures of a run: what was scored, what a plan keeps, what it costs; one column (3.5 inches) wide.

Every function takes values and returns a matplotlib Figure of its own: no pyplot state, no setting of the caller is
read or changed, and equal input gives equal bytes. Colours are Okabe and Ito's, told apart by the colour-blind;
markers, line styles and hatches repeat each difference. matplotlib is optional (`pip install 'obce[bench]'`) and
imported on use.
"""

from __future__ import annotations

import io
import math
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from obce.files import whole
from obce.scores import CLS_SCORES, Scores, place_of_reading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray

    from obce.plan import Plan

LEVELS = (0.3, 0.5, 0.7)
"""Removal levels that `distribution` draws: those of OBCE 2023 (`obce.plan.PRESETS`)."""

BARS = 60
"""Bars of a barcode that are drawn, the longest ones."""

LEAVES = 30
"""Leaves of a merge tree that are drawn; the merges below them are contracted."""

_WIDTH = 3.5  # inches: one column
_DPI = 300
_BINS = 48
_LABEL = 24  # characters of a leaf's label
_LINE = 64  # characters of a title's line
_PANEL = 60  # characters over a panel
_CUT = 0.7  # of the last merge: where a merge tree is coloured, scipy's default too

_BLACK, _ORANGE, _SKY, _GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
_BLUE, _VERMILION, _PURPLE = "#0072B2", "#D55E00", "#CC79A7"
_GREY, _PALE = "#777777", "#dddddd"  # beside the palette: what stands back

_STYLE: dict[str, Any] = {
    "font.size": 7,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same on every machine
    "axes.labelsize": 7,
    "axes.titlesize": 6.5,
    "axes.titlepad": 3.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
    "text.parse_math": False,  # a dollar sign in a text is no formula
    "svg.fonttype": "none",
    "svg.hashsalt": "obce",  # equal input, equal bytes
}
_GRID: dict[str, Any] = {"linewidth": 0.3, "color": _PALE}

_Look: TypeAlias = tuple[str, str, str]  # colour, marker, line style

_KIND_LOOKS: dict[str, _Look] = {
    "query": (_BLUE, "o", "-"),
    "key": (_SKY, "s", "--"),
    "value": (_GREEN, "^", "-."),
    "attention_output": (_PURPLE, "D", ":"),
    "intermediate": (_VERMILION, "v", "-"),
    "output": (_ORANGE, "P", "--"),
}
_SCORE_LOOKS: dict[str, _Look] = {
    "effect": (_VERMILION, "o", "-"),
    "effect_abs": (_ORANGE, "d", "-"),
    "spread": (_PURPLE, "v", "-"),
    "rf": (_BLUE, "^", "-"),
    "rf_bagged": (_BLUE, "<", "--"),
    "std": (_SKY, "P", ":"),
    "range": (_SKY, "h", "--"),
    "mean": (_GREEN, "1", "--"),
    "mean_abs": (_GREEN, "2", "-"),
    "magnitude": (_GREEN, "D", ":"),
    "taylor": (_BLACK, "s", "--"),
    "random": (_GREY, "X", ":"),
}
# Scores of others, in the order of their names.
_OTHER_LOOKS: tuple[_Look, ...] = (
    (_GREEN, ">", "-."),
    (_PURPLE, "p", "-."),
    (_BLACK, "*", "-."),
    (_ORANGE, "H", "--"),
    (_BLUE, "8", "-."),
    (_VERMILION, "4", ":"),
)
_CLUSTERS = (_BLUE, _VERMILION, _GREEN, _PURPLE, _ORANGE, _SKY)

# What a score is, and its unit; {at} is the token that it was read at.
_SCORE_WORDS: dict[str, tuple[str, str]] = {
    "effect": ("effect", "units of what is read"),
    "effect_abs": ("mean absolute effect", "units of what is read"),
    "spread": ("spread", "activation units times weights"),
    "rf": ("r_f at {at}, an edge length", "activation units"),
    "rf_bagged": ("bagged r_f at {at}, an edge length", "activation units"),
    "std": ("standard deviation at {at}", "activation units"),
    "range": ("range at {at}", "activation units"),
    "mean": ("mean at {at}", "activation units"),
    "mean_abs": ("mean absolute value at {at}", "activation units"),
    "magnitude": ("magnitude", "L2 norm of weights"),
    "taylor": ("mean absolute effect on the loss", "units of the loss"),
    "random": ("random score", "uniform in [0, 1)"),
}

_PARTS = {"encoder": "the encoder's parameters", "total": "all parameters"}
_METRICS = {"matthews_correlation": "Matthews correlation", "pearson": "Pearson", "spearman": "Spearman", "f1": "F1"}
_ROW = ("task", "seed", "score", "keep", "repair", "tuned", "headline", "kept_share")


# ---- what all pictures share --------------------------------------------------------------------------------------


def _needed() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "pictures need the package matplotlib, which is not installed; install it with `pip install 'obce[bench]'`."
        ) from error


@contextmanager
def _styled() -> Iterator[None]:
    """Our settings over matplotlib's own defaults, whatever the caller has set; the caller's come back afterwards."""
    _needed()
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        settings: Any = mpl.rcParams  # newer stubs know each name, older ones any
        settings.update(_STYLE)
        yield


def _new(height: float) -> Figure:
    """An empty figure one column wide; `height` in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _laid_out(figure: Figure) -> Figure:
    """Makes the places of everything final: matplotlib would find slightly others each time it draws."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _plain(text: object) -> str:
    """Text from outside on one line, without what an SVG must not hold."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _short(text: object, length: int) -> str:
    line = _plain(text)
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def _named(name: str | None) -> str:
    """What the picture is of, as one line of its title."""
    return "" if name is None else _short(name, _LINE - 20)


def _title(figure: Figure, *lines: str) -> None:
    """Small lines over the picture; empty ones are left out, and none is ever read as a formula."""
    parts = [part for line in lines if line for part in textwrap.wrap(line, _LINE)[:3]]
    if parts:
        figure.suptitle("\n".join(parts), x=0.012, ha="left", fontsize=7)


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str], ncols: int) -> None:
    figure.legend(
        handles, labels, loc="outside lower center", ncols=ncols, handlelength=2.4, columnspacing=1.4, borderaxespad=0.3
    )


def _number(value: float, _: object = None) -> str:
    return f"{value:.4g}"


def _percent(value: float, _: object = None) -> str:
    return f"{100 * value:.3g}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what if number != 1 else what.removesuffix('s')}"


def _log_axis(axis: Axis, low: float, high: float) -> None:
    """Ticks of a logarithmic axis that a reader can take in: whole powers, or 1, 2, 5 where there are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0) if decades < 1.6 else (1.0,), numticks=7))
    axis.set_major_formatter(FuncFormatter(_number))
    axis.set_minor_locator(NullLocator())


def _text_count(scores: Scores) -> str:
    texts = scores.meta.get("n_texts")
    return "" if texts is None else _count(int(texts), "texts")


def _score_words(scores: Scores, score: str) -> tuple[str, str]:
    """What a score is, and its unit."""
    at = place_of_reading(scores)
    words, unit = _SCORE_WORDS.get(score, (score, "its own unit"))
    return words.format(at=at), unit


def _site(kind: str) -> str:
    return kind.replace("_", " ")


def _checked(scores: Scores, score: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """[N] values of a score, and [N] whether it ranks the neuron."""
    if not len(scores):
        raise ValueError("scores holds no neurons, expected at least one site; score a model first.")
    column, ranked = scores.column(score), scores.ranked(score)
    if not ranked.any():
        raise ValueError(
            f"score is {score!r}, which is undefined or constant for all {len(scores):,} neurons, expected one that "
            "ranks some; name another."
        )
    return column, ranked


def _spans_decades(values: NDArray[np.float64]) -> bool:
    """Whether a logarithmic axis shows the values better: over a factor of 10 and more, and more evenly."""
    if (values < 0).any():
        return False
    positive = values[values > 0]
    if not positive.size:
        return False
    low, middle, high = (float(q) for q in np.quantile(positive, (0.05, 0.5, 0.95)))
    if high < 10 * low:
        return False
    plain = (middle - low) / (high - low)
    logarithmic = math.log(middle / low) / math.log(high / low)
    return abs(logarithmic - 0.5) < abs(plain - 0.5)


def _of_kind(scores: Scores, kind: str) -> NDArray[np.bool_]:
    """[N] whether a neuron belongs to a site of this kind."""
    found = np.zeros(len(scores), bool)
    for site in scores.sites():
        if site[1] == kind:
            found[scores.rows(*site)] = True
    return found


# ---- scores -------------------------------------------------------------------------------------------------------


def distribution(scores: Scores, score: str = "rf", *, name: str | None = None) -> Figure:
    """Histogram of a score for each kind of site over all layers, with the levels 30, 50 and 70 % drawn in.

    Neurons that the score does not rank (constant or undefined) are counted over each panel; so are zeros where the
    axis is logarithmic. The levels are quantiles over all layers; a plan cuts inside each site.

    Args:
        scores: Scores of a model.
        score: Name of the score.
        name: What the picture is of, for its title.

    Returns:
        Figure with one panel a kind of site: the share of its ranked neurons in each bin against the score.

    Raises:
        ValueError: There are no neurons, no such score, or none that it ranks.
        ImportError: matplotlib is not installed.
    """
    column, ranked = _checked(scores, score)
    values = {kind: column[_of_kind(scores, kind) & ranked] for kind in scores.kinds()}
    logarithmic = _spans_decades(column[ranked]) and all(
        np.quantile(some, LEVELS[0]) > 0 for some in values.values() if some.size
    )
    low, high = _limits(column[ranked], logarithmic)
    edges = np.geomspace(low, high, _BINS + 1) if logarithmic else np.linspace(low, high, _BINS + 1)
    edges[0], edges[-1] = low, high  # geomspace rounds

    with _styled():
        from matplotlib.lines import Line2D
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        figure = _new(0.95 + 0.55 * len(values))
        panels: list[Axes] = list(figure.subplots(len(values), 1, sharex=True, squeeze=False)[:, 0])
        styles: tuple[Any, ...] = ("-", "--", ":")
        for axes, (kind, some) in zip(panels, values.items(), strict=True):
            colour = _KIND_LOOKS[kind][0]
            axes.set_title(_panel_words(scores, score, kind, some, low, high), loc="left")
            axes.yaxis.set_major_locator(MaxNLocator(2))
            axes.yaxis.set_major_formatter(FuncFormatter(_percent))
            if not some.size:
                axes.set_yticks([])
                continue
            shares = np.histogram(some, edges)[0] / some.size
            axes.stairs(shares, edges, fill=True, facecolor=colour, alpha=0.35)
            axes.stairs(shares, edges, color=colour, linewidth=0.9)
            for quantile, style in zip(np.quantile(some, LEVELS), styles, strict=True):
                axes.axvline(float(quantile), ymax=0.96, color=_BLACK, linestyle=style, linewidth=0.9)
            axes.set_ylim(0, 1.05 * float(shares.max()) or 1.0)
        last = panels[-1]
        if logarithmic:
            last.set_xscale("log")
            _log_axis(last.xaxis, low, high)
        words, unit = _score_words(scores, score)
        last.set_xlabel(f"{words} ({unit}{', log scale' if logarithmic else ''})")
        figure.supylabel("share of neurons in each bin, %", fontsize=7)
        texts = _text_count(scores)
        _title(figure, ", ".join(part for part in (_named(name), texts) if part))
        _legend(
            figure,
            [Line2D([], [], color=_BLACK, linestyle=style, linewidth=0.9) for style in styles],
            [f"{level:.0%} lie below".replace("%", " %") for level in LEVELS],
            3,
        )
        return _laid_out(figure)


def _limits(values: NDArray[np.float64], logarithmic: bool) -> tuple[float, float]:
    """Ends of the axis: all values but zeros on a logarithmic one, and but a few that would squeeze the rest."""
    if logarithmic:
        values = values[values > 0]
    low, high = float(values.min()), float(values.max())
    if low == high:
        return (low / 2, high * 2) if logarithmic else (low - 0.5, high + 0.5)
    inner = [float(q) for q in np.quantile(values, (0.002, 0.998))]
    if not logarithmic and inner[0] < inner[1] and high - low > 3 * (inner[1] - inner[0]):
        return inner[0], inner[1]
    return low, high


def _panel_words(scores: Scores, score: str, kind: str, some: NDArray[np.float64], low: float, high: float) -> str:
    """Neurons of a kind, and how many of them are not drawn, and why."""
    here = _of_kind(scores, kind)
    neurons = int(here.sum())
    constant = int((here & scores.constant).sum()) if score in CLS_SCORES else 0
    outside = int(((some < low) | (some > high)).sum())
    why = [
        f"{number:,} {what}"
        for number, what in (
            (constant, "constant"),
            (neurons - some.size - constant, "undefined"),
            (outside, "at 0" if low > 0 and outside == int((some == 0).sum()) else "outside"),
        )
        if number
    ]
    words = f"{_site(kind)}: {_count(neurons, 'neurons')}" + (f" (not drawn: {', '.join(why)})" if why else "")
    if len(words) <= _PANEL:
        return words
    left_out = neurons - some.size + outside
    return f"{_site(kind)}: {_count(neurons, 'neurons')} (not drawn: {left_out:,}, of them {constant:,} constant)"


def medians(scores: Scores, score: str = "rf", *, name: str | None = None) -> Figure:
    """Median of a score by layer, one line a kind of site, with the interquartile range as bars.

    A site that the score ranks no neuron of has no point; it is named over the picture.

    Args:
        scores: Scores of a model.
        score: Name of the score.
        name: What the picture is of, for its title.

    Returns:
        Figure with one panel; the kinds stand side by side inside each layer.

    Raises:
        ValueError: There are no neurons, no such score, or none that it ranks.
        ImportError: matplotlib is not installed.
    """
    column, ranked = _checked(scores, score)
    layers, kinds = scores.layers(), scores.kinds()
    quartiles = np.full((3, len(kinds), len(layers)), np.nan)
    for layer, kind in scores.sites():
        rows = scores.rows(layer, kind)
        some = column[rows][ranked[rows]]
        if some.size:
            quartiles[:, kinds.index(kind), layers.index(layer)] = np.quantile(some, (0.25, 0.5, 0.75))
    # the same numbers as scores.medians, to the bit
    exact = scores.medians(score)
    for layer, kind in scores.sites():
        quartiles[1, kinds.index(kind), layers.index(layer)] = exact[layer, kind]
    defined = quartiles[np.isfinite(quartiles)]
    logarithmic = _spans_decades(column[ranked]) and bool((defined > 0).all())

    with _styled():
        from matplotlib.ticker import FuncFormatter

        figure = _new(2.9)
        axes = figure.subplots()
        handles = []
        for number, kind in enumerate(kinds):
            low, middle, high = quartiles[:, number]
            colour, marker, style = _KIND_LOOKS[kind]
            # side by side inside a layer: bars of six kinds on one line would hide each other
            at = np.arange(len(layers)) + 0.13 * (number - (len(kinds) - 1) / 2)
            drawn: Any = axes.errorbar(
                at,
                middle,
                yerr=[np.maximum(middle - low, 0), np.maximum(high - middle, 0)],
                color=colour,
                marker=marker,
                linestyle=style,
                markersize=3 if len(layers) <= 12 else 2.2,
                linewidth=1.0,
                elinewidth=0.7,
            )
            drawn[2][0].set_alpha(0.55)  # the bars stand behind the medians
            drawn[2][0].set_zorder(1)
            handles.append(drawn[0])
        if logarithmic:
            axes.set_yscale("log")
            _log_axis(axes.yaxis, float(defined.min()), float(defined.max()))
        else:
            axes.yaxis.set_major_formatter(FuncFormatter(_number))
        step = math.ceil(len(layers) / 12)
        axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axes.set_xlim(-0.6, len(layers) - 0.4)
        axes.set_xlabel("layer")
        words, unit = _score_words(scores, score)
        scale = ", log scale" if logarithmic else ""
        axes.set_ylabel(f"median {words}\n({unit}{scale})")
        axes.grid(axis="y", which="major", **_GRID)
        axes.set_axisbelow(True)
        texts = _text_count(scores)
        _title(
            figure,
            ", ".join(part for part in (_named(name), texts, "bars: middle half of the neurons") if part),
            _blank_words(scores, exact),
        )
        _legend(figure, handles, [_site(kind) for kind in kinds], 3)
        return _laid_out(figure)


def _blank_words(scores: Scores, found: Mapping[tuple[int, str], float]) -> str:
    """Names the sites without a point."""
    blank: dict[int, list[str]] = {}
    for layer, kind in scores.sites():
        if math.isnan(found[layer, kind]):
            blank.setdefault(layer, []).append(_site(kind))
    if len(blank) > 2:
        return f"no point: {sum(map(len, blank.values()))} sites without a neuron that the score ranks"
    named = "; ".join(f"{', '.join(kinds)} of layer {layer}" for layer, kinds in blank.items())
    return f"no point (constant or undefined): {named}" if named else ""


# ---- clouds -------------------------------------------------------------------------------------------------------


def barcode(deaths: ArrayLike, *, name: str | None = None, unit: str = "activation units") -> Figure:
    """Barcode of one cloud: a bar from 0 to each death, and the bar that never ends as an arrow.

    Of more than `BARS` bars the longest are drawn, and the axis says of how many. The dotted line is r_f, the largest
    death.

    Args:
        deaths: [n - 1] deaths of a cloud of n points, edge lengths in any order, such as `h0(points).deaths[0]`. +inf
            is one more bar that never ends.
        name: What the cloud is of, for the title.
        unit: Unit of the coordinates.

    Returns:
        Figure with one panel, the longest bar at the top.

    Raises:
        ValueError: `deaths` is empty, no row of numbers, or holds NaN or a negative number.
        ImportError: matplotlib is not installed.
    """
    every = _numbers(deaths, "deaths", "[n - 1], a row of edge lengths")
    if every.ndim != 1 or not every.size:
        raise ValueError(
            f"deaths has the shape {every.shape}, expected [n - 1], the deaths of one cloud of two points or more; "
            "take one row of H0.deaths."
        )
    if np.isnan(every).any() or (every < 0).any():
        raise ValueError(
            "deaths holds NaN or a negative number, expected edge lengths; cut off the padding beyond lengths - 1."
        )
    total = every.size + 1
    finite = np.sort(every[np.isfinite(every)])
    endless = total - finite.size
    arrows = min(endless, BARS)
    bars = finite[max(finite.size - (BARS - arrows), 0) :]
    longest = float(finite[-1]) if finite.size and finite[-1] > 0 else 0.0
    end = 1.1 * longest if longest else 1.0

    with _styled():
        from matplotlib.lines import Line2D
        from matplotlib.ticker import NullLocator

        figure = _new(2.6)
        axes = figure.subplots()
        shown = bars.size + arrows
        width = min(2.5, 110 / shown)
        axes.hlines(np.arange(bars.size), 0.0, bars, color=_BLUE, linewidth=width)
        for number in range(bars.size, shown):
            axes.plot(
                [0.0, end],
                [number, number],
                color=_VERMILION,
                linewidth=width,
                marker=">",
                markersize=max(width + 1.5, 3.5),
                markevery=[1],
                solid_capstyle="butt",
                clip_on=False,
            )
        axes.set_xlim(0, end)
        axes.set_ylim(-1, shown)
        axes.yaxis.set_major_locator(NullLocator())
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"scale, an edge length ({_plain(unit)})")
        axes.set_ylabel(f"the {shown:,} longest of {total:,} bars" if shown < total else f"all {total:,} bars")
        handles: list[Any] = [Line2D([], [], color=_BLUE, linewidth=2)] if bars.size else []
        labels = ["merges"] if bars.size else []
        handles.append(Line2D([], [], color=_VERMILION, linewidth=2, marker=">", markersize=4, markevery=[1]))
        handles[-1].set_data([0, 1], [0, 0])
        labels.append("never merges" if endless == 1 else f"never merge ({endless:,})")
        if longest and endless == 1:
            axes.axvline(longest, color=_BLACK, linestyle=":", linewidth=0.9)
            handles.append(Line2D([], [], color=_BLACK, linestyle=":", linewidth=0.9))
            labels.append(f"r_f = {_number(longest)}")
        zeros = int((finite == 0).sum())
        _title(
            figure,
            ", ".join(part for part in (_named(name), _count(total, "points")) if part)
            + (f", {_count(zeros, 'bars')} of length 0" if zeros else ""),
        )
        _legend(figure, handles, labels, 3)
        return _laid_out(figure)


def merge_tree(
    linkage: ArrayLike, labels: Sequence[str] | None = None, *, name: str | None = None, unit: str = "activation units"
) -> Figure:
    """Single-linkage tree of one cloud, leaves at the left.

    Of more than `LEAVES` points the last merges are drawn: what had merged before is one leaf with its number of points
    in brackets, and a grey bar up to its own last merge. Colours are the clusters at 70 % of the last merge (dotted).

    Args:
        linkage: [n - 1, 4], as `H0.linkage` and scipy give it.
        labels: n names of the points; default: their numbers.
        name: What the cloud is of, for the title.
        unit: Unit of the coordinates.

    Returns:
        Figure with one panel.

    Raises:
        ValueError: `linkage` is not scipy's, has merges out of order, or `labels` are not n.
        ImportError: matplotlib is not installed.
    """
    from scipy.cluster.hierarchy import dendrogram, fcluster

    Z = _numbers(linkage, "linkage", "[n - 1, 4], numbers")
    if Z.ndim != 2 or Z.shape[1:] != (4,) or not len(Z):
        raise ValueError(
            f"linkage has the shape {Z.shape}, expected [n - 1, 4] of a cloud of two points or more; give what "
            "H0.linkage returns."
        )
    if not _is_hierarchy(Z):
        raise ValueError(
            "linkage is not a hierarchy with finite ascending distances, expected scipy's form; give what H0.linkage "
            "returns."
        )
    n = len(Z) + 1
    if labels is not None and (isinstance(labels, str) or len(labels) != n):
        raise ValueError(f"labels has {len(labels)} entries, expected {n}, one a point; give a list, or leave it out.")
    highest = float(Z[-1, 2])
    cut = _CUT * highest
    clusters = fcluster(Z, cut, "distance")
    first = np.arange(2 * n - 1)
    for step, left in enumerate(Z[:, 0].astype(int)):
        first[n + step] = first[left]
    joined = [int(cluster) for cluster in np.unique(clusters) if np.count_nonzero(clusters == cluster) > 1]

    def colour(node: int) -> str:
        if Z[node - n, 2] > cut:
            return _BLACK
        return _CLUSTERS[joined.index(int(clusters[first[node]])) % len(_CLUSTERS)]

    made = dendrogram(Z, p=LEAVES, truncate_mode="lastp" if n > LEAVES else None, no_plot=True, link_color_func=colour)
    leaves: list[int] = made["leaves"]
    heights = [float(Z[leaf - n, 2]) if leaf >= n else 0.0 for leaf in leaves]

    def end(place: float, at: float) -> float:
        # scipy draws a contracted cluster as if all of its points had merged at 0
        return heights[round((place - 5) / 10)] if at == 0 and place % 10 == 5 else at

    with _styled():
        from matplotlib.collections import LineCollection
        from matplotlib.lines import Line2D

        figure = _new(0.9 + 0.115 * max(len(leaves), 6))
        axes = figure.subplots()
        links = [
            [(end(y, x), y) if corner in (0, 3) else (x, y) for corner, (y, x) in enumerate(zip(ys, xs, strict=True))]
            for ys, xs in zip(made["icoord"], made["dcoord"], strict=True)
        ]
        contracted = [place for place, leaf in enumerate(leaves) if leaf >= n]
        places = 5.0 + 10.0 * np.arange(len(leaves))
        axes.hlines(places[contracted], 0.0, [heights[place] for place in contracted], color="#bbbbbb", linewidth=3.5)
        axes.add_collection(LineCollection(links, colors=made["color_list"], linewidths=1.0))
        axes.axvline(cut, color=_BLACK, linestyle=":", linewidth=0.9)
        axes.set_xlim(0, 1.05 * highest if highest else 1.0)
        axes.set_ylim(10 * len(leaves), 0)
        words = [
            f"({int(Z[leaf - n, 3]):,})" if leaf >= n else str(leaf) if labels is None else _short(labels[leaf], _LABEL)
            for leaf in leaves
        ]
        axes.set_yticks(places, words)
        for text in axes.get_yticklabels():
            text.set_fontsize(6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        between = "\n" if max(map(len, words)) > 8 else " "  # long labels leave little room beside them
        axes.set_xlabel(f"scale, an edge length{between}({_plain(unit)})")
        axes.set_ylabel("points (in brackets: how many)" if contracted else "points")
        drawn = f"the last {len(leaves) - 1} of {len(Z):,} merges" if contracted else _count(len(Z), "merges")
        _title(figure, ", ".join(part for part in (_named(name), _count(n, "points"), drawn) if part))
        handles = [Line2D([], [], color=_BLACK, linestyle=":", linewidth=0.9)]
        notes = ["70 % of the last merge: clusters below share a colour"]
        if contracted:
            handles.append(Line2D([], [], color="#bbbbbb", linewidth=3.5))
            notes.append("merges inside a leaf, not drawn one by one")
        _legend(figure, handles, notes, 1)
        return _laid_out(figure)


def _is_hierarchy(Z: NDArray[np.float64]) -> bool:
    """Whether [n - 1, 4] is scipy's form; scipy's own check passes some for which its fcluster writes beyond arrays."""
    n = len(Z) + 1
    joined, distances = Z[:, :2], Z[:, 2]
    if not np.isfinite(Z).all() or (joined != np.floor(joined)).any() or np.unique(joined).size != joined.size:
        return False
    if (joined < 0).any() or (joined >= n + np.arange(n - 1)[:, None]).any():
        return False
    if distances[0] < 0 or (np.diff(distances) < 0).any():
        return False
    sizes = np.ones(2 * n - 1)
    for step, (one, other) in enumerate(joined.astype(int)):
        sizes[n + step] = sizes[one] + sizes[other]
    return bool((sizes[n:] == Z[:, 3]).all())


def _numbers(values: ArrayLike, name: str, expected: str) -> NDArray[np.float64]:
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} is not made of numbers of one shape ({_plain(error)}), expected {expected}."
        ) from None


# ---- plans and comparisons ----------------------------------------------------------------------------------------


def keep_map(scores: Scores, plan: Plan, *, name: str | None = None) -> Figure:
    """Share of the neurons that a plan keeps, layers by kinds of site, as colour and as a number.

    "all" marks a site that the plan leaves whole; a dropped layer is hatched.

    Args:
        scores: Scores of the model.
        plan: A plan made of them.
        name: What the picture is of, for its title.

    Returns:
        Figure with one image [layers, kinds] of shares from 0 to 1.

    Raises:
        ValueError: There are no neurons, or the plan belongs to another model.
        ImportError: matplotlib is not installed.
    """
    shares = _kept_shares(scores, plan)
    layers, kinds = scores.layers(), scores.kinds()
    with _styled():
        from matplotlib.patches import Rectangle
        from matplotlib.ticker import FuncFormatter

        figure = _new(1.35 + 0.185 * len(layers))
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        for row, layer in enumerate(layers):
            if layer in plan.layers_dropped:
                axes.add_patch(
                    Rectangle(
                        (-0.5, row - 0.5), len(kinds), 1, facecolor="white", edgecolor=_GREY, hatch="/////", linewidth=0
                    )
                )
                blank = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
                axes.text(
                    (len(kinds) - 1) / 2, row, "layer dropped", ha="center", va="center", bbox=blank, fontsize=6.5
                )
                continue
            for place, kind in enumerate(kinds):
                share = float(shares[row, place])
                if math.isnan(share):
                    continue
                whole = f"{layer}.{kind}" not in plan.kept
                axes.text(
                    place,
                    row,
                    "all" if whole else f"{100 * share:.0f}",
                    ha="center",
                    va="center",
                    color="white" if share < 0.45 else "black",
                    fontsize=6.5,
                )
        words = {"attention_output": "attention\noutput", "intermediate": "inter-\nmediate"}
        axes.set_xticks(range(len(kinds)), [words.get(kind, kind) for kind in kinds])
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axes.tick_params(length=0)
        # white lines between the cells
        axes.set_xticks(np.arange(len(kinds) - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(len(layers) - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
        axes.tick_params(which="minor", length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("layer")
        axes.set_xlabel("site")
        bar = figure.colorbar(image, ax=axes, orientation="horizontal", aspect=40, pad=0.02)
        bar.ax.xaxis.set_major_formatter(FuncFormatter(_percent))
        bar.set_label("share of the site's neurons kept, %; all: left whole", fontsize=7)
        outline: Any = bar.outline
        outline.set_visible(False)
        kept = f"{100 * plan.kept_share:.1f} % of {_PARTS[plan.of]}"
        _title(figure, _named(name), f"plan by {_plain(plan.score)}: keeps {kept}")
        return _laid_out(figure)


def _kept_shares(scores: Scores, plan: Plan) -> NDArray[np.float64]:
    """[layers, kinds] share of each site's neurons that stay; NaN where there is no such site."""
    if not len(scores):
        raise ValueError("scores holds no neurons, expected at least one site; score a model first.")
    expected = scores.meta.get("model_hash")
    if plan.model_hash != expected:
        raise ValueError(
            f"plan is for the model {plan.model_hash}, expected one for the scored model {expected}; make the plan "
            "from these scores."
        )
    layers, kinds = scores.layers(), scores.kinds()
    widths = {f"{layer}.{kind}": int(np.diff(_bounds(scores, layer, kind))[0]) for layer, kind in scores.sites()}
    for site, kept in plan.kept.items():
        if site not in widths or (kept and not 0 <= min(kept) <= max(kept) < widths[site]):
            raise ValueError(
                f"plan keeps neurons of the site {site!r} that were not scored, expected only scored ones; make the "
                "plan from these scores."
            )
    shares = np.full((len(layers), len(kinds)), np.nan)
    for layer, kind in scores.sites():
        width = widths[f"{layer}.{kind}"]
        shares[layers.index(layer), kinds.index(kind)] = len(plan.indices(f"{layer}.{kind}", width)) / width
    return shares


def _bounds(scores: Scores, layer: int, kind: str) -> tuple[int, int]:
    rows = scores.rows(layer, kind)
    return rows.start, rows.stop


def tradeoff(
    rows: Sequence[Mapping[str, Any]],
    *,
    repair: str = "least_squares",
    tuned: bool = False,
    shares: str | None = None,
    ridge: float | None = None,
    of: Literal["encoder", "total"] | None = None,
    name: str | None = None,
) -> Figure:
    """Quality against the share of parameters kept, one line a score, one panel a task.

    A point is the mean over the seeds there are, the band their least and greatest; the dense model is a line across.
    Rows of one repair, of one way to share the loss, and either as cut or trained again: others are left out.

    Args:
        rows: Rows of `obce.compare`.
        repair: What replaced the neurons.
        tuned: Models that were trained again, instead of as cut.
        shares: `"uniform"`, `"estimated"` or `"measured"`; None where such rows know one only.
        ridge: Of least squares; None where such rows know one only.
        of: What the share is of; None where the rows know one only.
        name: What the picture is of, for its title.

    Returns:
        Figure with one panel a task, in order of appearance.

    Raises:
        ValueError: There are no such rows, a row lacks a field or is there twice, or `shares`, `ridge` or `of` is
            needed.
        ImportError: matplotlib is not installed.
    """
    picked, shares, of = _picked(rows, repair, tuned, shares, ridge, of)
    tasks = list(dict.fromkeys(str(row["task"]) for row in picked))
    lines: dict[tuple[str, str], dict[float, list[Mapping[str, Any]]]] = {}
    for row in picked:
        if row["score"] is not None:
            by_keep = lines.setdefault((str(row["task"]), str(row["score"])), {})
            by_keep.setdefault(float(row["keep"]), []).append(row)
    tasks = [task for task in tasks if any(one == task for one, _ in lines)]
    found = {score for _, score in lines}
    known = [score for score in _SCORE_LOOKS if score in found]
    others = sorted(found - set(known))
    looks = _SCORE_LOOKS | {score: _OTHER_LOOKS[i % len(_OTHER_LOOKS)] for i, score in enumerate(others)}

    with _styled():
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        across = min(len(tasks), 2)
        down = math.ceil(len(tasks) / across)
        legend = math.ceil((len(found) + 1) / 3)
        figure = _new((2.3 if across == 1 else 1.55 * down) + 0.45 + 0.14 * legend)
        panels: list[Axes] = list(figure.subplots(down, across, squeeze=False).flat)
        handles: dict[str, Any] = {}
        for axes in panels[len(tasks) :]:
            axes.remove()
        for number, (axes, task) in enumerate(zip(panels, tasks, strict=False)):
            dense = [float(row["headline"]) for row in picked if row["score"] is None and row["task"] == task]
            if dense:
                line = axes.axhline(fmean(dense), color=_GREY, linewidth=1.0, linestyle=(0, (6, 2)), zorder=1)
                axes.axhspan(min(dense), max(dense), color=_GREY, alpha=0.15, linewidth=0, zorder=0)
                handles.setdefault("dense", line)
            for score in (*known, *others):
                if (task, score) in lines:
                    drawn = _draw_line(axes, lines[task, score], looks[score])
                    handles.setdefault("r_f" if score == "rf" else score, drawn)
            axes.set_title(_plain(task), loc="left")
            axes.set_ylabel(_metric([row for row in picked if row["task"] == task]))
            if number + across >= len(tasks):  # the lowest of its column
                axes.set_xlabel(textwrap.fill(f"share of {_PARTS[of]} kept, %", 60 if across == 1 else 24))
            _widen(axes, [float(row["kept_share"]) for row in picked if row["task"] == task and row["score"]])
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter(FuncFormatter(_percent))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_formatter(FuncFormatter(_number))
            axes.margins(y=0.06)
            axes.grid(which="major", **_GRID)
            axes.set_axisbelow(True)
        counts = {len(some) for line in lines.values() for some in line.values()}
        seeds = f"{min(counts)} to {max(counts)} seeds" if len(counts) > 1 else _count(max(counts), "seeds")
        band = ": mean; band: least to greatest" if max(counts) > 1 else ""
        _title(
            figure,
            _named(name),
            f"{'trained again' if tuned else 'as cut'}, {shares} shares, repair {_site(repair)}",
            f"{seeds} a point{band}",
        )
        _legend(figure, list(handles.values()), list(handles), 3)
        return _laid_out(figure)


def _widen(axes: Axes, shares: Sequence[float]) -> None:
    """Limits of the shares; at least a tenth wide, so that budgets that were meant to be one do not look far apart."""
    low, high = min(shares), max(shares)
    margin = max(0.05 - (high - low) / 2, 0.06 * (high - low))
    axes.set_xlim(low - margin, high + margin)


def _draw_line(axes: Axes, by_keep: Mapping[float, Sequence[Mapping[str, Any]]], look: _Look) -> Any:
    colour, marker, style = look
    points = [by_keep[keep] for keep in sorted(by_keep)]
    x = [fmean(float(row["kept_share"]) for row in some) for some in points]
    headlines = [[float(row["headline"]) for row in some] for some in points]
    low, high = [min(some) for some in headlines], [max(some) for some in headlines]
    if len(points) > 1:
        axes.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
    else:
        axes.vlines(x, low, high, color=colour, linewidth=0.8)
    return axes.plot(
        x,
        [fmean(some) for some in headlines],
        color=colour,
        marker=marker,
        linestyle=style,
        markersize=3.5,
        linewidth=1.0,
    )[0]


def _metric(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a task's headline is: its one metric, or a mean of several."""
    metrics = rows[0].get("metrics") or {}
    words = [str(metric).rsplit(maxsplit=1)[-1] for metric in metrics]
    names = list(dict.fromkeys(_METRICS.get(word, _site(word)) for word in words))
    if not names:
        return "headline (1 is best)"
    headline = names[0] if len(names) == 1 else f"mean of {' and '.join(names)}"
    return textwrap.fill(f"{headline} (1 is best)", 22)


def _picked(
    rows: Sequence[Mapping[str, Any]],
    repair: str,
    tuned: bool,
    shares: str | None,
    ridge: float | None,
    of: Literal["encoder", "total"] | None,
) -> tuple[list[Mapping[str, Any]], str, Literal["encoder", "total"]]:
    """The dense rows and the ones that were asked for, without undefined headlines; their shares, and of what."""
    if not len(rows):
        raise ValueError("rows is empty, expected rows of obce.compare; compare scores first.")
    for position, row in enumerate(rows):
        lacking = [field for field in _ROW if field not in row]
        if lacking:
            raise ValueError(
                f"rows: row {position} lacks {', '.join(lacking)}, expected {', '.join(_ROW)}; give rows of "
                "obce.compare."
            )
    cut = [
        row
        for row in rows
        if row["score"] is not None
        and row["repair"] == repair
        and bool(row["tuned"]) == tuned
        and shares in (None, row.get("shares") or "uniform")
        and ridge in (None, row.get("ridge"))
        and math.isfinite(float(row["headline"]))
    ]
    if not cut:
        have = sorted(
            {
                f"{row['repair']}, {row.get('shares') or 'uniform'}, {'tuned' if row['tuned'] else 'as cut'}"
                for row in rows
                if row["score"] is not None
            }
        )
        raise ValueError(
            f"rows holds no cut model with repair {repair!r}, shares {shares!r}, ridge {ridge} and tuned {tuned}, but "
            f"only ({'; '.join(have) or 'dense ones'}): ask for one of these."
        )
    ways = sorted({str(row.get("shares") or "uniform") for row in cut})
    if len(ways) > 1:
        raise ValueError(f"shares is None, but rows know {', '.join(map(repr, ways))}: give one of these.")
    ridges = sorted({row["ridge"] for row in cut if row.get("ridge") is not None})
    if len(ridges) > 1:
        raise ValueError(f"ridge is None, but rows know {', '.join(f'{one:g}' for one in ridges)}: give one of these.")
    parts = {str(row.get("of") or "encoder") for row in cut}
    if of is None and len(parts) > 1:
        raise ValueError("of is None, but rows keep shares of the encoder and of the total: give 'encoder' or 'total'.")
    chosen: Literal["encoder", "total"] = of if of is not None else "total" if parts == {"total"} else "encoder"
    cut = [row for row in cut if (row.get("of") or "encoder") == chosen]
    if not cut:
        raise ValueError(f"of is {of!r}, but rows keep shares of {parts.pop()!r} alone: give that, or leave it out.")
    dense = [row for row in rows if row["score"] is None and math.isfinite(float(row["headline"]))]
    keys = [(row["task"], row["seed"], row["score"], row["keep"]) for row in (*dense, *cut)]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(
            f"rows holds the {twice[2] or 'dense'} model of {twice[0]}, seed {twice[1]}, twice, expected once; leave "
            "one out."
        )
    return [*dense, *cut], ways[0], chosen


KINDS: dict[str, Callable[..., Figure]] = {
    "distribution": distribution,
    "medians": medians,
    "barcode": barcode,
    "merge-tree": merge_tree,
    "map": keep_map,
    "tradeoff": tradeoff,
}
"""Kind of picture -> what draws it."""


# ---- files --------------------------------------------------------------------------------------------------------


def save(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Writes a picture as PNG (300 dots an inch) and SVG, without a date, and closes it.

    Args:
        figure: The picture.
        folder: Where; made if it is not there.
        name: File name without its ending.

    Returns:
        Paths of the two files; each appears under its name only when it is whole.

    Raises:
        ValueError: `name` is no file name.
        ImportError: matplotlib is not installed.
        OSError: The system refused to write.
    """
    if name in {"", ".."} or Path(name).name != name:
        raise ValueError(f"name is {name!r}, expected a file name without folder and ending; give the folder apart.")
    folder = Path(folder)
    facts: tuple[tuple[str, dict[str, Any]], ...] = (
        ("png", {"Software": None}),
        ("svg", {"Date": None, "Creator": None}),
    )
    contents = {}
    with _styled():
        for ending, metadata in facts:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending, dpi=_DPI, metadata=metadata)
            contents[folder / f"{name}.{ending}"] = buffer.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in contents.items():
        with whole(path) as partial:
            partial.write_bytes(content)
    _close(figure)
    return list(contents)


def _close(figure: Figure) -> None:
    """Frees what was drawn; a figure that pyplot made for the caller is taken from its list, too."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        pyplot.close(figure)
    figure.clear()
