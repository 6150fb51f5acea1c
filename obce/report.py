"""Turn scores, a plan and results into tables for the terminal and one HTML page that needs no network.

Nothing is computed on a model here and no model is loaded: what is shown was measured before. The page is
one file without scripts, fonts or images from elsewhere; its figures are SVG written into the page. Names of
models and corpora come from outside, so every value passes through the template engine's escaping.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich import box
from rich.table import Table
from rich.text import Text

from obce.clouds import CLOUD_KINDS, CLOUD_SCORES
from obce.plan import FLOPS_LENGTH, default_units
from obce.scores import place_of_reading

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from obce.clouds import Clouds
    from obce.pages import Explained
    from obce.plan import Plan
    from obce.scores import Scores, Stability

STABLE_SPEARMAN = 0.8
"""Below this split-half rank correlation a ranking is called unstable."""

RESULT_KEYS = (
    "name",
    "score",
    "repair",
    "seed",
    "parameters",
    "encoder",
    "bytes",
    "latency_ratio",
    "fidelity",
)
"""Keys of a result row; every one must be there, `None` stands for "does not apply"."""

_NOTHING = "–"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_BINS = 44


def summary_tables(scores: Scores, plan: Plan | None = None) -> list[Table]:
    """Tables that sum up a scoring run, for `rich.print`.

    In this order: neurons and constant ones per kind of site; median r_f per layer and site; split-half
    stability of each score; with a plan also the kept share per layer and site, and the sizes before and
    after.

    Args:
        scores: the scores of one model.
        plan: a plan made for that model.

    Returns:
        Three tables, five with a plan. Values that do not exist are shown as "–".

    Raises:
        ValueError: there are no scores, or the plan belongs to another model.
    """
    _check(scores, plan)
    tables = [_terminal_counts(scores), _terminal_medians(scores), _terminal_stability(scores)]
    if plan is not None:
        tables += [_terminal_kept(scores, plan), _terminal_sizes(plan)]
    return tables


def render_html(
    scores: Scores,
    plan: Plan | None = None,
    results: Iterable[Mapping[str, Any]] | None = None,
    *,
    title: str,
    explained: Explained | None = None,
    repair: str | None = None,
    compared: Sequence[Mapping[str, Any]] = (),
) -> str:
    """One self-contained HTML page: what was scored, how far to trust it, what a plan keeps, what came out.

    The page depends on its arguments alone (no clock, no random number), so equal input gives equal bytes.

    Args:
        scores: the scores of one model.
        plan: a plan made for that model.
        results: measured models as mappings with `RESULT_KEYS`; the dense one has the score `None`.
        title: heading and window title of the page; any text, it is escaped.
        explained: neurons one by one, from `obce.pages.explained`; the page then has a script.
        repair: what replaced removed neurons in the run's pruned model, None without one.
        compared: rows of `obce.compare.compare` that lie in the run.

    Returns:
        The page as text, to be written as UTF-8.

    Raises:
        ValueError: there are no scores, the plan belongs to another model, or a result row lacks a key.
    """
    _check(scores, plan)
    rows = _checked_results(results)
    axis = _axis(_defined(scores, slice(None)))
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=PackageLoader("obce"),
    )
    environment.filters.update(
        number=_number, correlation=_correlation, percent=_percent, kind=_kind_label, warn=_unstable
    )
    stability = {name: scores.stability(name) for name in _halved(scores)}
    return environment.get_template("report.html.j2").render(
        title=title,
        facts=_facts(scores),
        kinds=scores.kinds(),
        layers=scores.layers(),
        position=place_of_reading(scores),
        n_neurons=_count(len(scores)),
        n_constant=_count(int(scores.constant.sum())),
        n_texts=_count(scores.meta.get("n_texts")),
        pictures=bool(scores.meta.get("pictures")),
        counts=_counts(scores),
        medians=_median_cells(scores),
        stability=stability,
        stable_spearman=STABLE_SPEARMAN,
        strips=_strips(scores, axis),
        panels=_panels(scores, axis),
        clouds=[] if scores.clouds is None else _cloud_rows(scores.clouds),
        heads=None if scores.clouds is None else _head_map(scores, plan),
        cloud_texts=None if scores.clouds is None else _count(scores.clouds.n),
        plan=None if plan is None else _plan_view(scores, plan) | _measured(plan, rows, compared, repair),
        repair=repair,
        results=rows,
        result_rows=[_result_view(row) for row in rows],
        result_groups=_result_groups(rows),
        explained=explained,
    )


# Checks


def _check(scores: Scores, plan: Plan | None) -> None:
    if not len(scores):
        raise ValueError("scores: found no neurons, expected at least one site; score a model first.")
    if plan is None:
        return
    found, expected = plan.model_hash, scores.meta.get("model_hash")
    if found != expected:
        raise ValueError(
            f"plan: found a plan for the model {found}, expected one for the scored model {expected}; make "
            "the plan from these scores."
        )
    known = {f"{layer}.{kind}" for layer in scores.layers() for kind in scores.kinds()}
    unknown = [site for site in plan.kept if site not in known]
    if unknown:
        raise ValueError(
            f"plan: found the site {unknown[0]!r}, expected only sites that were scored; make the plan from "
            "these scores."
        )


def _checked_results(results: Iterable[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
    rows = list(results or ())
    for position, row in enumerate(rows):
        missing = [key for key in RESULT_KEYS if key not in row]
        if missing:
            raise ValueError(
                f"results: row {position} lacks {', '.join(missing)}, expected {', '.join(RESULT_KEYS)}; "
                "use None for what does not apply."
            )
    # stable: the dense model first, the others in the order in which they were given
    return sorted(rows, key=lambda row: row["score"] is not None)


# Numbers and words


def _number(value: Any, digits: int = 3) -> str:
    """`digits` significant digits; "–" for what is missing or not finite; powers of ten only far from 1."""
    if value is None or not math.isfinite(value):
        return _NOTHING
    if value == 0:
        return "0"
    # rounded first: 0.9996 must be placed as 1.00, not as 0.9996
    mantissa, _, tail = f"{value:.{digits - 1}e}".partition("e")
    exponent = int(tail)
    if not -4 <= exponent <= 5:
        return f"{mantissa}×10{_superscript(exponent)}"
    return f"{float(f'{mantissa}e{exponent}'):,.{max(digits - 1 - exponent, 0)}f}"


def _fixed(value: Any, decimals: int) -> str:
    if value is None or not math.isfinite(value):
        return _NOTHING
    text = f"{value:.{decimals}f}"
    return (text.lstrip("-") if float(text) == 0 else text).replace("-", "−")


def _correlation(value: float) -> str:
    """Two decimals, which is all that a split-half correlation tells."""
    return _fixed(value, 2)


def _percent(share: Any) -> str:
    if share is None or not math.isfinite(share):
        return _NOTHING
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _count(value: Any) -> str:
    return _NOTHING if value is None else f"{value:,}"


def _scaled(value: Any, unit: str) -> str:
    if value is None:
        return _NOTHING
    for power, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{_number(value / power)}\N{NO-BREAK SPACE}{prefix}{unit}"
    return f"{value:,}\N{NO-BREAK SPACE}{unit}".rstrip()


def _superscript(exponent: int) -> str:
    return str(exponent).translate(_SUPERSCRIPTS)


def _kind_label(kind: str) -> str:
    return kind.replace("_", " ")


def _unstable(spearman: float) -> bool:
    # a correlation that could not be computed is no evidence of stability
    return not spearman >= STABLE_SPEARMAN


# What the scores say


def _defined(scores: Scores, rows: slice) -> NDArray[np.float64]:
    """r_f of the neurons in `rows` for which it is defined."""
    values = np.asarray(scores.columns["rf"][rows], dtype=np.float64)
    return values[~scores.constant[rows] & np.isfinite(values)]


def _halved(scores: Scores) -> list[str]:
    """Names of the scores that were also computed on two halves of the texts."""
    return [name for name in scores.names() if {f"{name}_a", f"{name}_b"} <= scores.columns.keys()]


def _counts(scores: Scores) -> list[dict[str, Any]]:
    """Neurons and constant neurons per kind of site, and the layers in which a whole site is constant."""
    rows = []
    for kind in scores.kinds():
        sites = [(layer, scores.constant[scores.rows(layer, kind)]) for layer in scores.layers()]
        rows.append(
            {
                "kind": kind,
                "neurons": sum(len(constant) for _, constant in sites),
                "constant": sum(int(constant.sum()) for _, constant in sites),
                "layers": [layer for layer, constant in sites if len(constant) and constant.all()],
            }
        )
    return rows


def _median_cells(scores: Scores) -> list[dict[str, Any]]:
    medians = scores.medians("rf")
    logs = {site: math.log10(value) for site, value in medians.items() if value > 0}
    low, high = min(logs.values(), default=0.0), max(logs.values(), default=0.0)
    return [
        {
            "layer": layer,
            "cells": [
                {
                    "value": medians[layer, kind],
                    "heat": round((logs[layer, kind] - low) / (high - low), 2)
                    if (layer, kind) in logs and high > low
                    else 0,
                }
                for kind in scores.kinds()
            ],
        }
        for layer in scores.layers()
    ]


def _facts(scores: Scores) -> list[tuple[str, str, bool]]:
    """What was scored: `(term, text, is it a hash)`."""
    meta = scores.meta
    architecture = meta.get("architecture") or {}
    versions = meta.get("versions") or {}
    return [
        ("Model", str(meta.get("model_name", _NOTHING)), False),
        (
            "Architecture",
            ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in architecture.items()) or _NOTHING,
            False,
        ),
        (
            "Pictures" if meta.get("pictures") else "Texts",
            f"{_count(meta.get('n_texts'))} from {meta.get('corpus_source', _NOTHING)}; left out: "
            f"{_count(meta.get('dropped_empty'))} empty, {_count(meta.get('dropped_duplicate'))} duplicate",
            False,
        ),
        (
            "Tokens",
            _count(meta.get("n_tokens"))
            if meta.get("pictures")
            else f"{_count(meta.get('n_tokens'))}; {_count(meta.get('truncated'))} texts cut at "
            f"{_count(meta.get('max_length'))} tokens",
            False,
        ),
        ("Position", place_of_reading(scores), False),
        ("Seed", str(meta.get("seed", _NOTHING)), False),
        ("Versions", ", ".join(f"{key} {value}" for key, value in versions.items()) or _NOTHING, False),
        ("Model hash", str(meta.get("model_hash", _NOTHING)), True),
        ("Corpus hash", str(meta.get("corpus_hash", _NOTHING)), True),
    ]


# Geometry of the figures, in SVG user units


@dataclass(frozen=True, slots=True)
class _Axis:
    """A logarithmic axis that all figures of r_f share, so that positions can be compared between them."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def share(self, value: float) -> float:
        """Place of a value between `low` (0) and `high` (1); values outside are drawn at the end."""
        clipped = min(max(value, self.low), self.high)
        return math.log(clipped / self.low) / math.log(self.high / self.low)

    def at(self, value: float, start: float, stop: float) -> float:
        return round(start + (stop - start) * self.share(value), 1)

    def marks(self, start: float, stop: float) -> list[tuple[float, str]]:
        return [(self.at(value, start, stop), label) for value, label in self.ticks]


def _axis(values: NDArray[np.float64]) -> _Axis | None:
    positive = values[values > 0]
    if not len(positive):
        return None
    # one neuron in a thousand may lie beyond each end: a few odd ones must not squeeze everything else
    below, above = (float(value) for value in np.quantile(positive, (0.001, 0.999)))
    low, high = _round_125(below, -1), _round_125(above, 1)
    if not high > low:
        low, high = low / 10, high * 10
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = last - first
    steps = (1, 2, 5) if decades <= 1 else (1,)
    every = 1 if decades <= 6 else math.ceil(decades / 6)
    inside = [
        (exponent, step)
        for exponent in range(first, last + 1, every)
        for step in steps
        if low * (1 - 1e-9) <= step * 10.0**exponent <= high * (1 + 1e-9)
    ]
    as_powers = any(not -3 <= exponent <= 3 for exponent, _ in inside)
    return _Axis(low, high, tuple((step * 10.0**exp, _tick_label(step, exp, as_powers)) for exp, step in inside))


def _round_125(value: float, direction: int) -> float:
    """The nearest 1, 2 or 5 times a power of ten at or above `value` (direction 1), at or below it (-1)."""
    exponent = math.floor(math.log10(value))
    candidates = [step * 10.0**power for power in (exponent - 1, exponent, exponent + 1) for step in (1, 2, 5)]
    if direction > 0:
        return min(c for c in candidates if c >= value * (1 - 1e-12))
    return max(c for c in candidates if c <= value * (1 + 1e-12))


def _tick_label(step: int, exponent: int, as_power: bool) -> str:
    if exponent == 0 or not as_power:
        return f"{step * 10.0**exponent:.{max(-exponent, 0)}f}"
    return f"{step}×10{_superscript(exponent)}" if step > 1 else f"10{_superscript(exponent)}"


_STRIP = {"width": 360, "left": 30, "right": 346, "top": 6, "row": 16}


def _strips(scores: Scores, axis: _Axis | None) -> dict[str, Any]:
    """For each kind of site one line a layer: 5th to 95th percentile, 30th to 70th, median."""
    left, right, top, row = _STRIP["left"], _STRIP["right"], _STRIP["top"], _STRIP["row"]
    figures = []
    for kind in scores.kinds():
        lines = []
        for number, layer in enumerate(scores.layers()):
            values = _defined(scores, scores.rows(layer, kind))
            line: dict[str, Any] = {"layer": layer, "y": top + row * number + row / 2, "x": None}
            if len(values) and axis is not None:
                quantiles = np.quantile(values, (0.05, 0.3, 0.5, 0.7, 0.95))
                line["x"] = [axis.at(float(value), left, right) for value in quantiles]
                line["median"] = float(quantiles[2])
            lines.append(line)
        figures.append({"kind": kind, "lines": lines})
    bottom = top + row * len(scores.layers()) + 4
    return {
        **_STRIP,
        "bottom": bottom,
        "height": bottom + 36,
        "ticks": [] if axis is None else axis.marks(left, right),
        "figures": figures,
    }


_LEVEL_WIDTH = 10  # of a level's number, in SVG user units
_PANEL = {"width": 176, "height": 116, "left": 6, "right": 170, "top": 26, "bottom": 96}


def _panels(scores: Scores, axis: _Axis | None) -> dict[str, Any]:
    """A histogram of r_f for each layer and kind of site."""
    left, right = _PANEL["left"], _PANEL["right"]
    rows = []
    for layer in scores.layers():
        panels = []
        for kind in scores.kinds():
            where = scores.rows(layer, kind)
            values = _defined(scores, where)
            panel: dict[str, Any] = {
                "kind": kind,
                "neurons": where.stop - where.start,
                "constant": int(scores.constant[where].sum()),
                "quantiles": None,
            }
            if len(values) and axis is not None:
                quantiles = [float(value) for value in np.quantile(values, (0.3, 0.5, 0.7))]
                panel["quantiles"] = quantiles
                panel["x"] = [axis.at(value, left, right) for value in quantiles]
                panel["outline"] = _outline(values, axis)
                # what stands too near another is not written
                panel["levels"] = [
                    (level, x)
                    for level, x in zip((30, 50, 70), panel["x"], strict=True)
                    if level != 50 or min(x - panel["x"][0], panel["x"][2] - x) >= _LEVEL_WIDTH
                ]
                if panel["x"][2] - panel["x"][0] < _LEVEL_WIDTH:
                    panel["levels"] = []
            panels.append(panel)
        rows.append({"layer": layer, "panels": panels})
    return {**_PANEL, "ticks": [] if axis is None else axis.marks(left, right), "rows": rows}


def _outline(values: NDArray[np.float64], axis: _Axis) -> str:
    """SVG path of a histogram over the logarithm of the values, as high as the panel at its fullest bin."""
    left, right, top, bottom = (_PANEL[name] for name in ("left", "right", "top", "bottom"))
    edges = np.linspace(math.log(axis.low), math.log(axis.high), _BINS + 1)
    logs = np.clip(np.log(np.maximum(values, axis.low)), edges[0], edges[-1])
    counts = np.histogram(logs, bins=edges)[0]
    filled = np.flatnonzero(counts)
    width = (right - left) / _BINS
    steps = [f"M{left + width * filled[0]:.1f} {bottom}"]
    for number in range(filled[0], filled[-1] + 1):
        height = (bottom - top) * counts[number] / counts.max()
        steps.append(f"V{bottom - height:.1f}H{left + width * (number + 1):.1f}")
    return "".join([*steps, f"V{bottom}Z"])


# Plan and results


def _kept_shares(scores: Scores, plan: Plan, layer: int) -> list[dict[str, Any]]:
    cells = []
    for kind in scores.kinds():
        where = scores.rows(layer, kind)
        width = where.stop - where.start
        kept = len(plan.indices(f"{layer}.{kind}", width))
        share = kept / width if width else math.nan
        cells.append({"kept": kept, "width": width, "whole": kept == width, "share": share})
    return cells


def _sizes(plan: Plan) -> list[dict[str, Any]]:
    rows = []
    what = "picture" if "patch_numbers" in plan.architecture else f"text of {FLOPS_LENGTH} tokens"
    for label, name in (
        ("Parameters, all", "parameters"),
        ("Parameters, encoder", "encoder"),
        (f"FLOPs, one {what}", "flops"),
        ("Weights", "bytes"),
    ):
        before, after = getattr(plan.before, name), getattr(plan.after, name)
        rows.append(
            {
                "label": label,
                "before": _size_text(name, before),
                "after": _size_text(name, after),
                "share": after / before if before else math.nan,
            }
        )
    return rows


def _size_text(name: str, value: Any) -> str:
    if name == "bytes":
        return _scaled(value, "B")
    return _scaled(value, "") if name == "flops" else _count(value)


def _plan_words(plan: Plan) -> str:
    levels = f"levels of {plan.preset}" if plan.preset is not None else "the same share of every layer"
    if plan.shares in ("estimated", "measured"):
        levels = f"of each site what it can spare, as {plan.shares}"
    if plan.units != default_units(plan.architecture):
        levels += f" of {', '.join(plan.units)}"
    if plan.layers_dropped:
        levels += f", without layers {', '.join(map(str, plan.layers_dropped))}"
    if plan.keep is None:
        return levels
    part = "all parameters" if plan.of == "total" else "the encoder's parameters"
    scaled = ", scaled to" if plan.preset is not None else ", to"
    return f"{levels}{scaled} keep {_percent(plan.keep)} of {part}"


def _plan_view(scores: Scores, plan: Plan) -> dict[str, Any]:
    stability: Stability | None = scores.stability(plan.score) if plan.score in _halved(scores) else None
    return {
        "score": plan.score,
        "budget": _plan_words(plan),
        "seed": plan.seed,
        "spared": plan.shares in ("estimated", "measured"),
        "other_corpus": plan.corpus_hash != scores.meta.get("corpus_hash"),
        "stability": stability,
        "rows": [
            {
                "layer": layer,
                "removed": plan.levels.get(str(layer)),
                "cells": _kept_shares(scores, plan, layer),
            }
            for layer in scores.layers()
        ],
        "sizes": _sizes(plan),
    }


def _measured(
    plan: Plan, results: Sequence[Mapping[str, Any]], compared: Sequence[Mapping[str, Any]], repair: str | None
) -> dict[str, Any]:
    """Quality and latency of the dense model and of the one that the plan cuts, where the run holds them."""
    rows: list[dict[str, str]] = []
    mine = [
        row
        for row in results
        if row["score"] == plan.score and row["repair"] == repair and row["parameters"] == plan.after.parameters
    ]
    if mine:
        rows.append({"label": "Fidelity", "dense": _fixed(1.0, 4), "pruned": _fixed(mine[0]["fidelity"], 4)})
    ratios = [row["latency_ratio"] for row in mine if row["latency_ratio"] is not None]
    for task in dict.fromkeys(row["task"] for row in compared):
        here = [row for row in compared if row["task"] == task]
        dense = [row for row in here if not row["score"]]
        cut = [
            row
            for row in here
            if all(row[name] == getattr(plan, name) for name in ("score", "of", "keep", "shares"))
            and row["repair"] == repair
        ]
        cut = [row for row in cut if row["ridge"] == cut[-1]["ridge"]]  # of several, what was asked last
        for tuned, words in ((False, "as cut"), (True, "trained again")):
            found = [row for row in cut if row["tuned"] == tuned]
            if dense and found:
                rows.append(
                    {
                        "label": f"{task}, {words} (mean of {len(found)})",
                        "dense": _fixed(_mean(dense, "headline"), 4),
                        "pruned": _fixed(_mean(found, "headline"), 4),
                    }
                )
                ratios.append(_mean(found, "seconds") / _mean(dense, "seconds"))
    unmeasured = not rows or not ratios
    if not rows:
        rows.append({"label": "Quality", "dense": "not measured", "pruned": "not measured"})
    latency = _fixed(ratios[0], 2) if ratios else "not measured"
    rows.append({"label": "Latency", "dense": _fixed(1.0, 2) if ratios else latency, "pruned": latency})
    return {"measured": rows, "unmeasured": unmeasured}


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def _result_view(row: Mapping[str, Any]) -> dict[str, str]:
    def word(key: str) -> str:
        return _NOTHING if row[key] is None else str(row[key])

    return {
        **{key: word(key) for key in ("name", "score", "repair", "seed")},
        **{key: _count(row[key]) for key in ("parameters", "encoder")},
        "bytes": _scaled(row["bytes"], "B"),
        "latency_ratio": _fixed(row["latency_ratio"], 2),
        "fidelity": _fixed(row["fidelity"], 4),
    }


_DOTS = {"width": 360, "left": 10, "right": 346, "top": 4, "row": 34}


def _result_groups(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Fidelity of the pruned models as dots, one line a score and repair, so that seeds show their spread."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["score"] is not None and row["fidelity"] is not None and math.isfinite(row["fidelity"]):
            groups.setdefault((str(row["score"]), str(row["repair"])), []).append(float(row["fidelity"]))
    if not groups:
        return None
    left, right, top, row_height = _DOTS["left"], _DOTS["right"], _DOTS["top"], _DOTS["row"]
    lowest = min(min(values) for values in groups.values())
    # the finest round step that leaves at most six intervals between the lowest dot and 1
    parts = next((n for n in (1000, 500, 200, 100, 50, 20, 10, 5, 2) if (1 - lowest) * n <= 6), 1)
    intervals = max(math.ceil((1 - lowest) * parts), 1)
    low = 1 - intervals / parts
    ticks = [1 - step / parts for step in range(intervals, -1, -1)]
    decimals = len(str(parts)) - 1 if str(parts).startswith("1") else len(str(parts))

    def at(value: float) -> float:
        return round(left + (right - left) * (value - low) / (1 - low), 1)

    lines = [
        {
            "label": f"{score}, repair {repair}",
            "y": top + row_height * number + 24,
            "dots": [at(value) for value in values],
            "n": len(values),
            "mean": _fixed(sum(values) / len(values), 4),
            "low": _fixed(min(values), 4),
            "high": _fixed(max(values), 4),
        }
        for number, ((score, repair), values) in enumerate(groups.items())
    ]
    bottom = top + row_height * len(lines) + 4
    return {
        **_DOTS,
        "bottom": bottom,
        "height": bottom + 36,
        "ticks": [(at(tick), _fixed(tick, decimals)) for tick in ticks],
        "lines": lines,
    }


# Terminal


def plain_table(title: str) -> Table:
    """An empty table as all of obce's look: few lines, because eight columns of numbers must fit 80 characters."""
    return Table(
        title=Text(title, style="bold"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def _grid(title: str, scores: Scores, *before: str) -> Table:
    table = plain_table(title)
    for name in ("layer", *before):
        table.add_column(name, justify="right")
    for kind in scores.kinds():
        table.add_column(_kind_label(kind), justify="right")
    return table


def _terminal_counts(scores: Scores) -> Table:
    table = plain_table(f"Neurons at {place_of_reading(scores)}")
    table.add_column("site")
    table.add_column("neurons", justify="right")
    table.add_column("constant", justify="right")
    table.add_column("constant in all of layer", justify="right")
    for row in _counts(scores):
        layers = ", ".join(str(layer) for layer in row["layers"]) or _NOTHING
        table.add_row(_kind_label(row["kind"]), _count(row["neurons"]), _count(row["constant"]), layers)
    table.add_section()
    table.add_row("all", _count(len(scores)), _count(int(scores.constant.sum())), "")
    table.caption = Text("Constant: the output does not vary over the texts; its scores are undefined, never ranked.")
    return table


def _terminal_medians(scores: Scores) -> Table:
    table = _grid("Median r_f (edge length, activation units)", scores)
    medians = scores.medians("rf")
    for layer in scores.layers():
        cells = (medians[layer, kind] for kind in scores.kinds())
        table.add_row(str(layer), *("constant" if math.isnan(value) else _number(value) for value in cells))
    return table


def _terminal_stability(scores: Scores) -> Table:
    table = plain_table("Stability: two disjoint halves of the texts")
    table.add_column("score")
    table.add_column("Spearman", justify="right")
    table.add_column("overlap of the lower halves", justify="right")
    unstable = []
    for name in _halved(scores):
        stability = scores.stability(name)
        table.add_row(Text(name), _correlation(stability.spearman), _percent(stability.overlap))
        if _unstable(stability.spearman):
            unstable.append(name)
    table.caption = Text("Chance: Spearman 0, overlap 50 %.")
    if unstable:
        table.caption.append(
            f"\nWarning: with other texts of the same kind the ranking by {', '.join(unstable)} would be "
            f"largely another one (Spearman below {STABLE_SPEARMAN}).",
            style="bold yellow",
        )
    return table


def cloud_table(clouds: Clouds) -> Table:
    """Table for a terminal: persistence of the heads' and layers' clouds, by kind, and how far it can be trusted."""
    table = plain_table(f"Heads and layers as clouds of {clouds.n:,} texts: median, and Spearman of two halves")
    table.add_column("cloud")
    table.add_column("d", justify="right")
    for name in ("r_f", "total persistence", "entropy"):
        table.add_column(name, justify="right")
        table.add_column("stable", justify="right")
    for row in _cloud_rows(clouds):
        cells = [text for pair in zip(row["medians"], row["stability"], strict=True) for text in pair]
        table.add_row(row["kind"], row["d"], *cells)
    return table


def _cloud_rows(clouds: Clouds) -> list[dict[str, Any]]:
    """A row a kind of cloud: medians over all that vary and stability of each score, and total persistence by layer."""
    stable = {name: clouds.stability(name) for name in CLOUD_SCORES}
    found = []
    for code, kind in enumerate(CLOUD_KINDS):
        of_kind = (clouds.kind == code) & ~clouds.constant
        if not of_kind.any():
            continue
        total = clouds.columns["total_persistence"]
        by_layer = [total[of_kind & (clouds.layer == layer)] for layer in np.unique(clouds.layer)]
        found.append(
            {
                "kind": kind,
                "d": _count(int(clouds.d[of_kind][0])),
                "medians": [_number(float(np.median(clouds.columns[name][of_kind]))) for name in CLOUD_SCORES],
                "stability": [_correlation(stable[name][kind]) for name in CLOUD_SCORES],
                "layers": [_number(float(np.median(some))) if some.size else _NOTHING for some in by_layer],
            }
        )
    return found


def _head_map(scores: Scores, plan: Plan | None) -> dict[str, Any] | None:
    """Rank of every head by the total persistence of its context cloud, 1 for the highest; layers x heads."""
    clouds = scores.clouds
    if clouds is None:
        return None
    rows = np.flatnonzero((clouds.kind == CLOUD_KINDS.index("context")) & ~clouds.constant)
    if not rows.size:
        return None
    total = clouds.columns["total_persistence"][rows]
    ranks = {
        (int(clouds.layer[row]), int(clouds.head[row])): place
        for place, row in enumerate(rows[np.argsort(-total, kind="stable")].tolist(), start=1)
    }
    values = {
        (int(clouds.layer[row]), int(clouds.head[row])): float(value) for row, value in zip(rows, total, strict=True)
    }
    heads = range(1 + max(head for _, head in ranks))
    return {
        "heads": list(heads),
        "of": len(ranks),
        "layers": [
            {
                "layer": layer,
                "cells": [
                    {
                        "rank": ranks.get((layer, head)),
                        "value": _number(values.get((layer, head))),
                        "heat": round(1 - (ranks[layer, head] - 1) / len(ranks), 2) if (layer, head) in ranks else 0,
                        "gone": plan is not None and _head_is_gone(scores, plan, layer, head),
                    }
                    for head in heads
                ],
            }
            for layer in scores.layers()
        ],
    }


def _head_is_gone(scores: Scores, plan: Plan, layer: int, head: int) -> bool:
    rows = scores.rows(layer, "value")
    width, facts = rows.stop - rows.start, scores.meta["architecture"]
    groups = int(facts.get("groups", 1))
    size, head = width * groups // int(facts["num_attention_heads"]), head // groups
    return not any(head * size <= index < (head + 1) * size for index in plan.indices(f"{layer}.value", width))


def _terminal_kept(scores: Scores, plan: Plan) -> Table:
    table = _grid("Kept share per layer and site", scores, "removed")
    for layer in scores.layers():
        cells = _kept_shares(scores, plan, layer)
        table.add_row(
            str(layer),
            _percent(plan.levels.get(str(layer))),
            *("all" if cell["whole"] else _percent(cell["share"]) for cell in cells),
        )
    table.caption = Text(f"Plan: {plan.score}, {_plan_words(plan)}.")
    return table


def _terminal_sizes(plan: Plan) -> Table:
    table = plain_table("Size before and after")
    table.add_column("")
    for name in ("before", "after", "kept"):
        table.add_column(name, justify="right")
    for row in _sizes(plan):
        table.add_row(row["label"], row["before"], row["after"], _percent(row["share"]))
    return table
