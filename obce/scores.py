"""One number per neuron: r_f of its [CLS] outputs, beside the plain statistics it has to beat.

r_f (OBCE, arXiv 2312.10702) is the scale at which the Vietoris-Rips complex of a neuron's point cloud has become
connected, as an edge length. A neuron's outputs at [CLS] are scalars, so r_f is the largest gap between
neighbours in sorted order. Every statistic is computed on all texts and again on two disjoint halves of them:
the halves tell how far a ranking can be trusted. `obce.scoring` makes the table.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from obce.clouds import Clouds
from obce.sites import SITE_KINDS

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

SCORE_NAMES = (
    "effect",
    "effect_abs",
    "spread",
    "rf",
    "rf_bagged",
    "std",
    "range",
    "mean",
    "mean_abs",
    "magnitude",
    "taylor",
    "random",
)
CLS_SCORES = ("rf", "rf_bagged", "std", "range", "mean", "mean_abs")
"""Scores of the outputs at [CLS] alone: a neuron that is constant there is not ranked by them."""

_PLACES = {"cls": "[CLS]", "last": "the last token", "mean": "the mean over tokens"}


def place_of_reading(scores: Scores) -> str:
    """Where the outputs were read, in words that stand behind "at": `"[CLS]"`, `"the last token"`."""
    position = str(scores.meta.get("position", "cls"))
    return _PLACES.get(position.lower().strip("[]"), position)


# What a table of scores has beside them, and `text_...`.
_TABLE = ("layer", "site", "index", "constant")

TEXT_COLUMNS = ("gap_below", "gap_above", "least", "greatest")


@dataclass(frozen=True)
class Stability:
    """How well two disjoint halves of the texts agree on a score.

    Attributes:
        spearman: Rank correlation inside each site, averaged over sites with the number of neurons as weight.
        overlap: Share of the lower half of each site's ranking that both halves would remove; chance is 0.5.
        by_kind: Site kind -> (spearman, overlap), averaged over layers alike.
    """

    spearman: float
    overlap: float
    by_kind: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Scores:
    """Scores of every neuron of a model, one row a neuron, ordered by layer, site kind and index.

    Attributes:
        layer: [N] int16.
        site: [N] int8, position in `SITE_KINDS`.
        index: [N] int32, neuron's row in its site's Linear.
        constant: [N] bool, the output at [CLS] does not vary beyond rounding; `rf`, `std` and `range` are then
            undefined (NaN), and the neuron is never ranked.
        columns: Score name -> [N] float64. Of the outputs at [CLS], in the units of the activations: `rf`,
            `rf_bagged` (mean r_f of groups of 20 texts; from 40 texts on), `std` (population), `range`, `mean` and
            `mean_abs`. Of the effect cloud (`obce.effects`), in the units of what is read: `effect` (its bagged r_f)
            and `effect_abs` (its mean absolute value); `taylor`, the mean absolute effect on the loss, where labels
            were given. `spread` (standard deviation over all tokens times the norm of the weights that read the
            neuron), `magnitude` (norm of all weights that go with it) and `random` (uniform in [0, 1), seeded). The
            measured ones again as `<name>_a` and `<name>_b` on two disjoint halves of the texts; `token_mean`,
            `token_std`, `token_min` and `token_max` over all tokens of what the site's reader takes in, or of the
            Linear's output where none reads it, unless tokens were left out. `rf_high` where a sketch was kept instead
            of every value: r_f lies between `rf` and it, and is `rf` where both are equal. And those of `with_column`.
        meta: What was scored, as JSON-able facts: model, hashes, counts, seed, versions.
        texts: Name -> [N] int64 positions in the corpus: `gap_below` and `gap_above`, the two texts at the largest gap
            (of equal gaps, one), and `least` and `greatest`, those of the extremes; -1 where a neuron is constant.
        clouds: Persistence of the heads' and layers' clouds, or None.
    """

    layer: NDArray[np.int16]
    site: NDArray[np.int8]
    index: NDArray[np.int32]
    constant: NDArray[np.bool_]
    columns: dict[str, NDArray[np.float64]]
    meta: dict[str, Any]
    texts: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    clouds: Clouds | None = None

    def __post_init__(self) -> None:
        edges = np.flatnonzero((np.diff(self.layer) != 0) | (np.diff(self.site) != 0)) + 1
        bounds = [0, *edges.tolist(), len(self.layer)]
        rows = {(int(self.layer[a]), SITE_KINDS[int(self.site[a])]): slice(a, b) for a, b in pairwise(bounds) if b > a}
        object.__setattr__(self, "_rows", rows)

    def __len__(self) -> int:
        return len(self.layer)

    def __getitem__(self, neuron: str) -> dict[str, float | bool]:
        """All scores of one neuron by its name, such as `"5.intermediate.830"`."""
        layer, _, rest = neuron.partition(".")
        kind, _, index = rest.partition(".")
        if not (layer.isdigit() and index.isdigit()):
            raise KeyError(f"{neuron!r} is not a neuron's name: expected layer.site.index, as in '5.intermediate.830'")
        rows = self.rows(int(layer), kind)
        if int(index) >= rows.stop - rows.start:
            raise KeyError(f"site {layer}.{kind} has {rows.stop - rows.start} neurons, there is no {index}")
        row = rows.start + int(index)
        return {
            "constant": bool(self.constant[row]),
            **{name: float(column[row]) for name, column in self.columns.items()},
        }

    def rows(self, layer: int, kind: str) -> slice:
        """Rows of one site.

        Raises:
            KeyError: The scores hold no such site.
        """
        rows: dict[tuple[int, str], slice] = self._rows  # type: ignore[attr-defined]
        if (layer, kind) not in rows:
            raise KeyError(f"the scores hold no site {layer}.{kind}")
        return rows[layer, kind]

    def sites(self) -> list[tuple[int, str]]:
        """(layer, kind) of every site, in row order."""
        return list(self._rows)  # type: ignore[attr-defined]

    def layers(self) -> list[int]:
        """Layer numbers, ascending."""
        return sorted({layer for layer, _ in self.sites()})

    def kinds(self) -> list[str]:
        """Site kinds present, in the order of `SITE_KINDS`."""
        present = {kind for _, kind in self.sites()}
        return [kind for kind in SITE_KINDS if kind in present]

    def names(self) -> list[str]:
        """Names of the scores there are, those of `with_column` last."""
        return [name for name in (*SCORE_NAMES, *self.meta.get("own_scores", ())) if name in self.columns]

    def column(self, score: str) -> NDArray[np.float64]:
        """[N] values of a score.

        Raises:
            ValueError: No such score; names those there are.
        """
        if score not in self.names():
            raise ValueError(
                f"score is {score!r}, but these scores hold {', '.join(self.names())}: name one of them"
                + _missing_reason(score)
            )
        return self.columns[score]

    def ranked(self, score: str) -> NDArray[np.bool_]:
        """[N] whether a score ranks the neuron: it is defined, and not a score of [CLS] where the neuron is constant.

        Raises:
            ValueError: No such score.
        """
        defined: NDArray[np.bool_] = np.isfinite(self.column(score))
        return defined & ~self.constant if score in CLS_SCORES else defined

    def with_column(self, name: str, values: ArrayLike) -> Scores:
        """These scores and one of your own: `plan(scores.with_column("mine", values), score="mine")`.

        Args:
            name: An identifier that is no column yet.
            values: [N], high for what is to stay; NaN for neurons that are not to be ranked, and stay.

        Raises:
            ValueError: The name is taken or no identifier, or the values are not N numbers.
        """
        taken = name in self.columns or name in SCORE_NAMES or name in _TABLE or name.startswith("text_")
        if taken or not name.isidentifier():
            raise ValueError(f"name is {name!r}, expected an identifier that is no column of these scores.")
        column = np.asarray(values, dtype=np.float64)
        if column.shape != (len(self),) or np.isinf(column).any():
            raise ValueError(
                f"values has the shape {column.shape}{' and holds infinity' if np.isinf(column).any() else ''}, "
                f"expected {(len(self),)} numbers, one a neuron in the order of these scores."
            )
        meta = {**self.meta, "own_scores": [*self.meta.get("own_scores", ()), name]}
        return replace(self, columns={**self.columns, name: column.copy()}, meta=meta)

    def certified(self) -> float:
        """Share of the neurons that are not constant whose r_f is exact; below 1 only where a sketch was kept."""
        if "rf_high" not in self.columns or self.constant.all():
            return 1.0
        ranked = ~self.constant
        return float(np.mean(self.columns["rf"][ranked] == self.columns["rf_high"][ranked]))

    def medians(self, score: str = "rf") -> dict[tuple[int, str], float]:
        """Median of a score over the neurons of each site that it ranks; NaN where it ranks none."""
        column, ranked = self.column(score), self.ranked(score)
        found = {}
        for site in self.sites():
            rows = self.rows(*site)
            values = column[rows][ranked[rows]]
            found[site] = float(np.median(values)) if values.size else float("nan")
        return found

    def stability(self, score: str) -> Stability:
        """Agreement of two disjoint halves of the texts on the ranking inside each site.

        NaN and empty for a score that is not measured on texts (`random`, `magnitude`).
        """
        defined = self.ranked(score)
        if f"{score}_a" not in self.columns:
            return Stability(float("nan"), float("nan"), {})
        a, b = self.columns[f"{score}_a"], self.columns[f"{score}_b"]
        totals: dict[str, list[tuple[float, float, int]]] = {}
        for layer, kind in self.sites():
            rows = self.rows(layer, kind)
            ranked = defined[rows]
            if np.count_nonzero(ranked) < 4:
                continue
            x, y = a[rows][ranked], b[rows][ranked]
            totals.setdefault(kind, []).append((rank_correlation(x, y), _overlap(x, y), len(x)))
        by_kind = {kind: _weighted(found) for kind, found in totals.items()}
        spearman, overlap = _weighted([entry for found in totals.values() for entry in found])
        return Stability(spearman, overlap, by_kind)


def _missing_reason(score: str) -> str:
    if score == "taylor":
        return " (taylor needs labels when scoring)"
    if score in ("effect", "effect_abs"):
        least = 20 if score == "effect" else 2  # r_f is of groups of texts
        return (
            f" ({score} needs {least} texts: score as many or more, with sums over tokens and effect_texts of at least "
            f"{least})"
        )
    if score == "spread":
        return " (spread needs sums over tokens: score again with them)"
    return ""


def rank_correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Spearman's; NaN where one side does not vary."""
    from scipy.stats import rankdata

    rx, ry = rankdata(x), rankdata(y)
    if np.ptp(rx) == 0 or np.ptp(ry) == 0:
        return float("nan")
    return float(np.corrcoef(rx, ry)[0, 1])


def _overlap(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    half = len(x) // 2
    lower_x = set(np.argsort(x, kind="stable")[:half].tolist())
    lower_y = set(np.argsort(y, kind="stable")[:half].tolist())
    return len(lower_x & lower_y) / half


def _weighted(found: list[tuple[float, float, int]]) -> tuple[float, float]:
    if not found:
        return float("nan"), float("nan")
    spearman, overlap, weight = (np.array(column, dtype=np.float64) for column in zip(*found, strict=True))
    return float(np.average(spearman, weights=weight)), float(np.average(overlap, weights=weight))
