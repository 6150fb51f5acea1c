"""One number per neuron: r_f of its [CLS] outputs, beside the plain statistics it has to beat.

r_f (OBCE, arXiv 2312.10702) is the scale at which the Vietoris-Rips complex of a neuron's point cloud has become
connected, as an edge length. A neuron's outputs at [CLS] are scalars, so r_f is the largest gap between
neighbours in sorted order. Every statistic is computed on all texts and again on two disjoint halves of them:
the halves tell how far a ranking can be trusted.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from obce import __version__
from obce.capture import LayerActivations, Memory, Progress, capture
from obce.corpus import Corpus, read_corpus, tokenize
from obce.h0 import r_f
from obce.sites import SITE_KINDS, Site, architecture, base_model, find_sites, model_hash

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCORE_NAMES = ("rf", "std", "range", "mean", "mean_abs", "random")
DEFAULT_MAX_LENGTH = 128
_MEASURED = ("rf", "std", "range", "mean", "mean_abs")

# A constant output still varies by rounding where the batch's shape changes the order in which its K fp32 products
# are summed: by about eps sqrt(K), 2e-6 for K = 1,024, relative to the neuron's own magnitude or, for a neuron near
# zero, to what is typical of its site (the median: single outlier dimensions reach 1,000 times that). On MiniLM
# no neuron but those of layer-0 query/key/value varies by less than 1e-3 of that scale.
CONSTANT_TOLERANCE = 2e-5

# Rows of float64 working copies held at once: keeps the statistics' memory far below the activations'.
_CHUNK_VALUES = 4_000_000


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
        columns: Score name -> [N] float64, in the units of the activations. `rf`, `std` (population), `range`,
            `mean`, `mean_abs` and `random` (uniform in [0, 1), seeded); the measured ones again as `<name>_a`
            and `<name>_b` on two disjoint halves of the texts; `token_mean`, the mean over all tokens of what
            the site's reader takes in (NaN where nothing is read through a Linear).
        meta: What was scored, as JSON-able facts: model, hashes, counts, seed, versions.
    """

    layer: NDArray[np.int16]
    site: NDArray[np.int8]
    index: NDArray[np.int32]
    constant: NDArray[np.bool_]
    columns: dict[str, NDArray[np.float64]]
    meta: dict[str, Any]

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

    def column(self, score: str) -> NDArray[np.float64]:
        """[N] values of a score.

        Raises:
            ValueError: No such score; names those there are.
        """
        if score not in SCORE_NAMES or score not in self.columns:
            known = ", ".join(name for name in SCORE_NAMES if name in self.columns)
            raise ValueError(f"score is {score!r}, but these scores hold {known}: name one of them")
        return self.columns[score]

    def medians(self, score: str = "rf") -> dict[tuple[int, str], float]:
        """Median of a score over the neurons of each site that are not constant; NaN where all are."""
        column = self.column(score)
        found = {}
        for site in self.sites():
            rows = self.rows(*site)
            values = column[rows][~self.constant[rows]]
            found[site] = float(np.median(values)) if values.size else float("nan")
        return found

    def stability(self, score: str) -> Stability:
        """Agreement of two disjoint halves of the texts on the ranking inside each site.

        NaN and empty for a score that is not measured on texts (`random`).
        """
        self.column(score)
        if f"{score}_a" not in self.columns:
            return Stability(float("nan"), float("nan"), {})
        a, b = self.columns[f"{score}_a"], self.columns[f"{score}_b"]
        totals: dict[str, list[tuple[float, float, int]]] = {}
        for layer, kind in self.sites():
            rows = self.rows(layer, kind)
            ranked = ~self.constant[rows]
            if np.count_nonzero(ranked) < 4:
                continue
            x, y = a[rows][ranked], b[rows][ranked]
            totals.setdefault(kind, []).append((_spearman(x, y), _overlap(x, y), len(x)))
        by_kind = {kind: _weighted(found) for kind, found in totals.items()}
        spearman, overlap = _weighted([entry for found in totals.values() for entry in found])
        return Stability(spearman, overlap, by_kind)


def _spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
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


def statistics(values: NDArray[np.float32], *, threads: int | None = None) -> dict[str, NDArray[np.float64]]:
    """r_f and plain statistics of scalar clouds.

    Args:
        values: float32 [B, n], one cloud of scalars a row.
        threads: Threads for r_f; default as `obce.r_f`.

    Returns:
        `rf`, `std` (population), `range`, `mean`, `mean_abs`: float64 [B], accumulated in float64.
    """
    n_rows, n = values.shape
    found = {name: np.empty(n_rows, np.float64) for name in _MEASURED}
    found["rf"][:] = r_f(values, threads=threads, check=False)
    for start in range(0, n_rows, max(1, _CHUNK_VALUES // max(1, n))):
        rows = slice(start, start + max(1, _CHUNK_VALUES // max(1, n)))
        chunk = values[rows]
        mean = chunk.mean(axis=1, dtype=np.float64)
        found["mean"][rows] = mean
        found["std"][rows] = np.sqrt(np.square(chunk - mean[:, None]).mean(axis=1))
        found["range"][rows] = chunk.max(axis=1).astype(np.float64) - chunk.min(axis=1)
        found["mean_abs"][rows] = np.abs(chunk).mean(axis=1, dtype=np.float64)
    return found


def rounding_scale(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """[width] magnitude that a neuron's rounding noise is relative to, from its site's outputs [width, n]."""
    own = np.maximum(values.max(axis=1), -values.min(axis=1)).astype(np.float64)
    scale: NDArray[np.float64] = np.maximum(own, np.median(own))
    return scale


def score_layer(
    activations: LayerActivations,
    halves: tuple[NDArray[np.int64], NDArray[np.int64]],
    *,
    threads: int | None = None,
) -> dict[str, dict[str, NDArray[Any]]]:
    """Site kind -> column name -> [width], for one layer: the part of scoring that needs no model.

    Args:
        activations: One layer's outputs, float32 [width, n_texts] a site.
        halves: Two disjoint index arrays over the texts.
        threads: Threads for r_f.
    """
    found: dict[str, dict[str, NDArray[Any]]] = {}
    for kind, values in activations.outputs.items():
        columns: dict[str, NDArray[Any]] = dict(statistics(values, threads=threads))
        constant = columns["range"] <= CONSTANT_TOLERANCE * rounding_scale(values)
        for suffix, half in zip("ab", halves, strict=True):
            part = np.take(values, half, axis=1)
            columns.update({f"{n}_{suffix}": c for n, c in statistics(part, threads=threads).items()})
        for name in ("rf", "std", "range"):
            for column in (name, f"{name}_a", f"{name}_b"):
                columns[column][constant] = np.nan
        columns["constant"] = constant
        columns["token_mean"] = activations.token_means.get(kind, np.full(len(values), np.nan))
        found[kind] = columns
    return found


def usable_max_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> int:
    """Tokens a text is cut to: as asked, else `DEFAULT_MAX_LENGTH` or the most that model and tokenizer take.

    Raises:
        ValueError: More was asked than the model has positions.
    """
    positions = int(base_model(model).config.max_position_embeddings)
    if max_length is None:
        return min(DEFAULT_MAX_LENGTH, positions, int(tokenizer.model_max_length))
    if max_length > positions:
        raise ValueError(f"max_length is {max_length}, but the model has {positions} positions: ask for at most that")
    return max_length


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Corpus | str | Iterable[str],
    *,
    seed: int = 0,
    max_length: int | None = None,
    batch_size: int = 32,
    memory: Memory = "model",
    threads: int | None = None,
    progress: Progress | None = None,
    on_layer: Callable[[int, Sequence[Site]], None] | None = None,
) -> Scores:
    """Scores every neuron of a BERT on its [CLS] outputs over a corpus.

    Args:
        model: A `BertModel` or `BertFor...`; never changed. Scored in eval mode, without autocast.
        tokenizer: The model's tokenizer.
        texts: A `Corpus`, or anything `obce.read_corpus` takes.
        seed: Decides the `random` score and the two halves of the texts.
        max_length: Tokens a text is cut to (default: 128, or the most the model takes); `meta["truncated"]` says how
            many texts were.
        batch_size: Texts in a batch of similar lengths.
        memory: See `obce.capture.capture`.
        threads: Threads of the persistence engine; default from `OMP_NUM_THREADS`, else all.
        progress: Called with (texts done, texts in all) during the forward passes.
        on_layer: Called after each layer's scores are computed.

    Returns:
        Scores with one row a neuron.

    Raises:
        ValueError: The architecture is not supported, the corpus has fewer than four distinct texts, or an
            output is not finite; one sentence each.

    Source: OBCE, arXiv 2312.10702 (r_f of the 0-dimensional Vietoris-Rips persistence of [CLS] outputs).
    """
    sites = find_sites(model)
    corpus = texts if isinstance(texts, Corpus) else read_corpus(texts)
    length = usable_max_length(model, tokenizer, max_length)
    batches = tokenize(corpus, tokenizer, max_length=length, batch_size=batch_size)
    halves = corpus.halves(seed)
    parts: list[dict[str, NDArray[Any]]] = []
    for activations in capture(model, batches, sites, memory=memory, progress=progress):
        here = [site for site in sites if site.layer == activations.layer]
        by_kind = score_layer(activations, halves, threads=threads)
        parts.extend(by_kind[site.kind] for site in here)
        if on_layer is not None:
            on_layer(activations.layer, here)

    widths = [site.width for site in sites]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    constant = columns.pop("constant")
    columns["random"] = np.random.default_rng(seed).random(len(constant))
    return Scores(
        layer=np.repeat(np.array([site.layer for site in sites], np.int16), widths),
        site=np.repeat(np.array([SITE_KINDS.index(site.kind) for site in sites], np.int8), widths),
        index=np.concatenate([np.arange(width, dtype=np.int32) for width in widths]),
        constant=constant,
        columns=columns,
        meta={
            "model_name": str(model.config.name_or_path or type(model).__name__),
            "model_hash": model_hash(model),
            "architecture": architecture(model),
            "corpus_source": corpus.source,
            "corpus_hash": corpus.hash,
            "n_texts": len(corpus),
            "dropped_empty": corpus.dropped_empty,
            "dropped_duplicate": corpus.dropped_duplicate,
            "n_tokens": batches.n_tokens,
            "truncated": batches.truncated,
            "max_length": batches.max_length,
            "batch_size": batch_size,
            "position": "cls",
            "seed": seed,
            "versions": {
                "obce": __version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("numpy", "torch", "transformers")},
                "platform": sys.platform,
            },
        },
    )
