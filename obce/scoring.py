"""Scoring: every neuron of a model over a corpus, in shards that can be resumed, shared and joined.

Texts are scored in shards (`Corpus.shards`): a shard's activations depend on nothing but its own texts, and what is
kept of a shard merges without rounding (`obce.sketch`). So the order of shards, the process that scored one, and
a crash between two of them leave no trace in the bits.
"""

from __future__ import annotations

import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch

from obce import __version__
from obce.capture import Memory, Precision, Resident, capture, capture_resident, cloud_widths
from obce.clouds import CLOUD_KINDS, cloud_scores
from obce.corpus import GROUP, Corpus, Shard, TokenBatches, corpus_of, joined_hash, tokenize
from obce.device import (
    ColumnSums,
    DeviceCells,
    DeviceSketch,
    Fetch,
    ShardSums,
    add_sums,
    bags,
    column_sums,
    gap_ends,
    gaps_of,
    groups_of,
    resident,
    to_host,
    upload,
)
from obce.effects import (
    PARTNER,
    READS,
    as_wide,
    bag_rows,
    bagged_rf,
    check_gradients,
    checked_labels,
    effect_clouds,
    gradient_tokens,
    head_linear,
    reading_of,
    resident_effects,
    weight_scores_each,
)
from obce.h0 import checked_threads, r_f
from obce.scores import TEXT_COLUMNS, Scores, rank_correlation
from obce.sites import (
    SITE_KINDS,
    Site,
    architecture,
    base_model,
    find_sites,
    layout_of,
    model_hash_later,
    position_of,
    usable_max_length,
    vocabulary_of,
)
from obce.sketch import GapCells, Gaps, Moments, Sketch, TokenMoments
from obce.world import World

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_UNDEFINED_WHEN_CONSTANT = ("rf", "rf_bagged", "std", "range")

SHARD_TEXTS = 1000
CLOUD_TEXTS = 500
EFFECT_TEXTS = 400
EXACT_BYTES = 2 << 30
"""Every value is kept, and r_f exact for every neuron, while all of them take at most so many bytes."""

STORE_SECONDS = 20.0
"""Sketches on a device are stored so often and at the end: a gigabyte takes longer to write than its texts to score."""

# Places a forward pass, padding included: enough for the products to run at full speed.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
_AGREEMENT_TEXTS = 200

# A constant output still varies by rounding where the batch's shape changes the order in which its K fp32 products
# are summed: by about eps sqrt(K), 2e-6 for K = 1,024, relative to the neuron's own magnitude or, for a neuron near
# zero, to what is typical of its site (the median: single outlier dimensions reach 1,000 times that). On MiniLM
# no neuron but those of layer-0 query/key/value varies by less than 1e-3 of that scale.
CONSTANT_TOLERANCE = 2e-5


def _spread(least: NDArray[np.float32], greatest: NDArray[np.float32]) -> NDArray[np.float64]:
    return greatest.astype(np.float64) - least


def rounding_scale(least: NDArray[np.float32], greatest: NDArray[np.float32]) -> NDArray[np.float64]:
    """[width] magnitude that a neuron's rounding noise is relative to, from the extremes of its site's outputs."""
    own = np.maximum(greatest, -least).astype(np.float64)
    scale: NDArray[np.float64] = np.maximum(own, np.median(own))
    return scale


# ---- from what was kept to columns ---------------------------------------------------------------------------------


def site_columns(
    halves: tuple[Sketch, Sketch],
    values: NDArray[np.float32] | None = None,
    *,
    texts: NDArray[np.int64] | None = None,
    threads: int | None = None,
) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.int64]], NDArray[np.bool_]]:
    """Columns of one site from the sketches of two disjoint halves of the texts.

    Args:
        halves: Sketches of the site's neurons.
        values: float32 [width, n], every value, those of the first half first. Then r_f is exact for every neuron.
        texts: int64 [n], the text of each column of `values`.
        threads: Default as `obce.h0`.

    Returns:
        Score columns as in `Scores.columns` (NaN where a neuron is constant), text columns, and [width] which
        neurons are constant.
    """
    a, b = halves
    both_cells, both = a.cells.copy(), a.moments.copy()
    both_cells.merge(b.cells, threads)
    both.merge(b.moments)
    middle = int(a.moments.count[0])
    gaps = [cells.gaps(threads) for cells in (both_cells, a.cells, b.cells)]
    if values is not None:
        for some, part in zip(gaps, (slice(None), slice(None, middle), slice(middle, None)), strict=True):
            _settle_gaps(some, values[:, part], None if texts is None else texts[part], threads)
    tokens = a.tokens.copy()
    tokens.merge(b.tokens)
    return _columns(gaps, [both, a.moments, b.moments], [tokens, a.tokens, b.tokens], [slice(None)], values is not None)


_PARTS = ("", "_a", "_b")  # all texts, and each half


def _columns(
    gaps: Sequence[Gaps],
    moments: Sequence[Moments],
    tokens: Sequence[TokenMoments],
    sites: Sequence[slice],
    exact: bool,
) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.int64]], NDArray[np.bool_]]:
    """Columns from what is known of all texts and of each half.

    Args:
        gaps, moments, tokens: Of all texts, of the first half, of the second; N neurons.
        sites: The neurons of each site.
        exact: Whether r_f is exact for every neuron.

    Returns:
        As `site_columns`.
    """
    columns: dict[str, NDArray[np.float64]] = {}
    for suffix, some, sums in zip(_PARTS, gaps, moments, strict=True):
        columns["rf" + suffix] = some.low.astype(np.float64)
        columns["rf_bagged" + suffix] = sums.rf_bagged()
        columns["std" + suffix] = sums.std()
        columns["range" + suffix] = _spread(some.least, some.greatest)
        columns["mean" + suffix] = sums.mean()
        columns["mean_abs" + suffix] = sums.mean_abs()
    found = gaps[0]
    constant = np.zeros(len(found.low), bool)
    for here in sites:
        scale = rounding_scale(found.least[here], found.greatest[here])
        constant[here] = columns["range"][here] <= CONSTANT_TOLERANCE * scale
    if not exact:
        columns["rf_high"] = found.high.astype(np.float64)
    for name, column in columns.items():
        if name.removesuffix("_a").removesuffix("_b") in (*_UNDEFINED_WHEN_CONSTANT, "rf_high"):
            column[constant] = np.nan
    every = tokens[0]
    if every.count.any():
        columns["token_mean"], columns["token_std"] = every.mean(), every.std()
        for suffix, half in zip(_PARTS[1:], tokens[1:], strict=True):
            columns["token_std" + suffix] = half.std()
        columns["token_min"], columns["token_max"] = (e.astype(np.float64) for e in (every.least, every.greatest))
    found.texts[constant] = -1
    return columns, dict(zip(TEXT_COLUMNS, np.ascontiguousarray(found.texts.T), strict=True)), constant


def _settle_gaps(gaps: Gaps, values: NDArray[np.float32], texts: NDArray[np.int64] | None, threads: int | None) -> None:
    """Makes the gaps that the cells leave open exact, in place, from every value [width, n]."""
    rows = np.flatnonzero(~gaps.certified)
    if not rows.size:
        return
    some = np.ascontiguousarray(values[rows])
    gaps.low[rows] = gaps.high[rows] = r_f(some, threads=threads, check=False)
    if texts is None:
        return
    # of equal values the smaller text comes first, as in the cells
    by_text = np.argsort(texts, kind="stable")
    order = by_text[np.argsort(some[:, by_text], axis=1, kind="stable")]
    at = np.diff(np.take_along_axis(some, order, axis=1), axis=1).argmax(axis=1)
    picked = np.arange(len(rows))
    gaps.texts[rows, 0] = texts[order[picked, at]]
    gaps.texts[rows, 1] = texts[order[picked, at + 1]]


# ---- shards --------------------------------------------------------------------------------------------------------


class Store(Protocol):
    """Where finished work is kept: named pieces, each a dictionary of arrays and a dictionary of facts.

    A piece is there whole or not at all.
    """

    def names(self) -> list[str]:
        """Names of the pieces."""

    def save(self, name: str, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> None:
        """Keeps a piece, in the place of one of that name."""

    def facts(self, name: str) -> dict[str, Any]:
        """Facts of a piece."""

    def read(self, name: str, array: str) -> NDArray[Any]:
        """One array of a piece."""

    def remove(self, name: str) -> None:
        """Forgets a piece."""


_SKETCH = "sketch"  # in the place of a sketch's arrays


class MemoryStore:
    """Pieces in this process's memory, or its device's: as much of a crash as it survives."""

    def __init__(self) -> None:
        self._pieces: dict[str, tuple[dict[str, NDArray[Any]], dict[str, Any]]] = {}

    def names(self) -> list[str]:
        """Names of the pieces."""
        return sorted(self._pieces)

    def save(self, name: str, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> None:
        """Keeps a piece."""
        self._pieces[name] = dict(arrays), dict(facts)

    def sketch(self, name: str) -> DeviceSketch | None:
        """The sketch of a piece, where it lies on a device."""
        found = self._pieces[name][0].get(_SKETCH)
        return found if isinstance(found, DeviceSketch) else None

    def lying(self, name: str, array: str) -> NDArray[Any] | torch.Tensor:
        """One array of a piece, where it lies."""
        found: NDArray[Any] | torch.Tensor = self._pieces[name][0][array]
        return found

    def facts(self, name: str) -> dict[str, Any]:
        """Facts of a piece."""
        return self._pieces[name][1]

    def read(self, name: str, array: str) -> NDArray[Any]:
        """One array of a piece."""
        return to_host(self._pieces[name][0][array])

    def remove(self, name: str) -> None:
        """Forgets a piece."""
        del self._pieces[name]


@dataclass(frozen=True)
class ShardProgress:
    """How far a scoring is.

    Attributes:
        texts: Texts that have passed, in all layers; a layer counts as its share of a text.
        of: Texts to pass, on this rank; those of finished shards count as passed.
        tokens: Tokens that this call has passed, without padding.
        seconds: Since the first shard of this call began.
        resumed: Texts that an earlier call had finished.
    """

    texts: float
    of: int
    tokens: float
    seconds: float
    resumed: int


class _Work:
    """Shards of one scoring, done and to do, in a store and over the ranks of a world."""

    def __init__(
        self,
        shards: list[Shard],
        neurons: int,
        exact: bool,
        store: Store,
        world: World,
        device: torch.device | None = None,
    ) -> None:
        self.device = device  # where what is kept stays, if not on the host
        self.waiting: dict[int, list[tuple[Shard, dict[str, Any], dict[str, Any]]]] = {0: [], 1: []}
        self.stored = time.monotonic()
        self.shards = shards
        self.neurons = neurons
        self.exact = exact
        self.store = store
        self.world = world
        mine = {name: self._covered(name) for name in store.names()}
        # a piece that another one contains was about to be removed when the process ended
        spare = [n for n, s in mine.items() if any(s < other or (s == other and n > m) for m, other in mine.items())]
        for name in spare:
            del mine[name]
        everyone = world.tell(mine)
        for name in spare:  # not before the other ranks have read it
            store.remove(name)
        # ranks that share a folder see the same pieces: the first owns them
        self.owner: dict[int, int] = {}
        self.piece: dict[int, str] = {}
        for rank, pieces in enumerate(everyone):
            for name in sorted(pieces):
                if not any(number in self.owner for number in pieces[name]):
                    for number in pieces[name]:
                        self.owner[number], self.piece[number] = rank, name
        left = [shard for shard in shards if shard.number not in self.owner]
        self.resumed = sum(len(shard.texts) for shard in shards) - sum(len(shard.texts) for shard in left)
        self.todo = left[world.rank :: world.size]
        for i, shard in enumerate(left):
            self.owner[shard.number] = i % world.size
        self.sketches = {half: self._gathered(half) for half in (0, 1)} if not exact else {}

    def _covered(self, name: str) -> frozenset[int]:
        return frozenset(self.store.facts(name)["shards"])

    def mine(self, half: int | None = None) -> list[Shard]:
        """Finished shards that this rank has, ascending."""
        return [
            s
            for s in self.shards
            if s.number in self.piece and self.owner[s.number] == self.world.rank and half in (None, s.half)
        ]

    def _gathered(self, half: int) -> AnySketch | None:
        """This rank's pieces of a half as one sketch."""
        whole: Any = None
        for name in sorted({self.piece[s.number] for s in self.mine(half)}):
            part = _read_sketch(self.store, name, self.device)
            if whole is None:
                whole = part
            else:
                whole.merge(part)
        return cast("AnySketch | None", whole)

    def finish(self, shard: Shard, arrays: dict[str, Any], facts: dict[str, Any], sketch: AnySketch | None) -> None:
        """Keeps a shard; a sketch that lies on a device may wait for `flush` before it is stored."""
        if not isinstance(self.store, MemoryStore):
            arrays = {name: to_host(array) for name, array in arrays.items()}
        if sketch is None:
            name = f"{shard.number:06d}"
            self.store.save(name, arrays, {**facts, "shards": [shard.number]})
            self.piece[shard.number] = name
            return
        whole: Any = self.sketches[shard.half]
        if whole is None:
            self.sketches[shard.half] = sketch
        else:
            whole.merge(sketch)
        self.waiting[shard.half].append((shard, arrays, facts))
        costly = self.device is not None and not isinstance(self.store, MemoryStore)
        if not costly or time.monotonic() - self.stored >= STORE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Stores what waits for it."""
        for half, waiting in self.waiting.items():
            if waiting:
                self._store_half(half, waiting)
                waiting.clear()
        self.stored = time.monotonic()

    def _store_half(self, half: int, waiting: list[tuple[Shard, dict[str, Any], dict[str, Any]]]) -> None:
        older = sorted({self.piece[s.number] for s in self.mine(half)})
        covered = sorted([s.number for s in self.mine(half)] + [shard.number for shard, _, _ in waiting])
        total = {
            key: sum(facts[key] for _, _, facts in waiting) + sum(self.store.facts(name)[key] for name in older)
            for key in ("n_texts", "n_tokens", "truncated")
        }
        clouds = {key: self.read(name, key) for name in older for key in self.store.facts(name)["clouds"]}
        for _, arrays, _ in waiting:
            clouds |= arrays
        whole: Any = self.sketches[half]
        state: dict[str, Any]
        if isinstance(whole, DeviceSketch):
            state = {_SKETCH: whole} if isinstance(self.store, MemoryStore) else whole.host().arrays()
        else:
            state = whole.arrays()
        name = f"{'ab'[half]}-{covered[0]:06d}-{len(covered):06d}"
        self.store.save(name, {**state, **clouds}, {**total, "shards": covered, "clouds": sorted(clouds)})
        for old in older:
            self.store.remove(old)
        for number in covered:
            self.piece[number] = name

    def read(self, name: str, array: str) -> Any:
        """One array of a piece, on the device if it lies there."""
        return self.store.lying(name, array) if isinstance(self.store, MemoryStore) else self.store.read(name, array)

    def total(self, fact: str) -> int:
        """Sum of a fact over all shards of all ranks."""
        names = {self.piece[s.number] for s in self.mine()}
        return sum(self.world.tell(sum(self.store.facts(name)[fact] for name in names)))


AnySketch = Sketch | DeviceSketch


def _read_sketch(store: Store, name: str, device: torch.device | None) -> AnySketch:
    found = store.sketch(name) if isinstance(store, MemoryStore) else None
    if found is None:
        arrays = Sketch.empty(0).arrays()
        sketch = Sketch.from_arrays({key: store.read(name, key) for key in arrays})
        return sketch if device is None else DeviceSketch.from_host(sketch, device)
    return found.host() if device is None else found


def _columns_first(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 [n, width] of any stride as contiguous [width, n]."""
    return torch.from_numpy(rows).t().contiguous().numpy()


def _chosen(corpus_shards: list[Shard], cloud_texts: int) -> dict[int, int]:
    """Shard number -> how many of its first texts are points of the clouds: the first texts of each half."""
    left = {0: (cloud_texts + 1) // 2, 1: cloud_texts // 2}
    found = {}
    for shard in corpus_shards:
        found[shard.number] = min(left[shard.half], len(shard.texts))
        left[shard.half] -= found[shard.number]
    return found


@dataclass(frozen=True)
class _Job:
    """What is the same for every shard."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    sites: list[Site]
    max_length: int
    batch_tokens: int
    memory: Memory
    tokens: bool
    precision: Precision
    threads: int | None
    position: str

    @property
    def _alone(self) -> dict[str, Any]:
        """How outputs are captured with nothing beside them."""
        return {"memory": "layer", "tokens": False, "position": self.position}

    @property
    def device(self) -> torch.device | None:
        """Where scoring stays, if not on the host."""
        device = next(base_model(self.model).parameters()).device
        return device if resident(device) else None

    @property
    def rows(self) -> dict[int, slice]:
        """Layer -> its neurons."""
        found: dict[int, slice] = {}
        for site, end in zip(self.sites, accumulate(site.width for site in self.sites), strict=True):
            start = found[site.layer].start if site.layer in found else end - site.width
            found[site.layer] = slice(start, end)
        return found

    def batches(self, texts: NDArray[np.int64]) -> TokenBatches:
        return tokenize(
            self.corpus.entries(texts),
            self.tokenizer,
            max_length=self.max_length,
            batch_tokens=self.batch_tokens,
            vocabulary=vocabulary_of(self.model),
        )

    def shard(
        self, shard: Shard, batches: TokenBatches, chosen: int, exact: bool, progress: Callable[[float, float], None]
    ) -> ShardDone:
        """Arrays, facts and (unless every value is kept) the sketch of a shard."""
        marked = np.arange(len(shard.texts)) < chosen
        rows = self.rows
        neurons = sum(site.width for site in self.sites)
        sketch = None if exact else Sketch.empty(neurons)
        token_moments = TokenMoments.empty(neurons) if sketch is None else sketch.tokens
        arrays: dict[str, NDArray[Any]] = {}
        clouds: list[str] = []
        for layer in capture(
            self.model,
            batches,
            self.sites,
            memory=self.memory,
            tokens=self.tokens,
            chosen=marked,
            precision=self.precision,
            position=self.position,
            progress=_noting_tokens(batches, progress),
        ):
            start = rows[layer.layer].start
            for kind, columns in layer.columns.items():
                here = slice(start + columns.start, start + columns.stop)
                if kind in layer.tokens:
                    token_moments.rows(here).update(layer.tokens[kind])
                if sketch is not None:
                    values = _columns_first(layer.values[:, columns])
                    sketch.rows(here).update(values, shard.texts, self.threads)
            if exact:
                arrays[f"values.{layer.layer}"] = layer.values
            for kind, vectors in layer.clouds.items():
                name = f"clouds.{shard.number}.{layer.layer}.{kind}"
                clouds.append(name)
                arrays[name] = vectors
        if exact and self.tokens:
            arrays |= {f"tokens.{name}": array for name, array in token_moments.arrays().items()}
        counts = {"n_texts": len(shard.texts), "n_tokens": batches.n_tokens, "truncated": batches.truncated}
        return arrays, {**counts, "clouds": clouds}, sketch

    def resident_shard(
        self, shard: Shard, batches: TokenBatches, chosen: int, exact: bool, progress: Callable[[float, float], None]
    ) -> Callable[[], ShardDone]:
        """Begins a shard on a device; the call waits for it and gives what `shard` gives, with arrays on the device."""
        device = self.device
        if device is None:
            raise RuntimeError("the model is not where scoring stays")
        n, neurons = len(shard.texts), sum(site.width for site in self.sites)
        cells = None if exact else DeviceCells.empty(neurons, device)
        # whatever many bytes are kept, they are kept on the host
        stays = 4 * neurons * len(self.corpus) <= EXACT_BYTES
        arrays: dict[str, Any] = {}
        clouds: list[str] = []
        parts: list[tuple[Resident, Fetch]] = []
        for taken in capture_resident(
            self.model,
            batches,
            self.sites,
            memory=self.memory,
            tokens=self.tokens,
            chosen=np.arange(n) < chosen,
            precision=self.precision,
            position=self.position,
            progress=_noting_tokens(batches, progress),
        ):
            fetch, sums = Fetch(), column_sums(taken.values)
            start = self.rows[next(iter(taken.rows))].start
            fetch.ask(sums.bad, *(taken.tokens.total() if taken.tokens is not None else ()))
            if cells is not None:
                here = slice(start, start + taken.values.shape[1])
                ids = upload(shard.texts[taken.texts].astype(np.int64), device)
                cells.rows(here).fill(taken.values, ids, sums.least, sums.greatest)
                fetch.ask(*_moment_parts(taken.values, sums, taken.places))
            else:
                for layer, columns in taken.rows.items():
                    values = taken.values[:, columns].index_select(0, taken.places)
                    arrays[f"values.{layer}"] = values if stays else to_host(values)
            for (layer, kind), vectors in taken.clouds.items():
                name = f"clouds.{shard.number}.{layer}.{kind}"
                clouds.append(name)
                arrays[name] = vectors
            # what its checks need is small; the values are free for the next shard when the device is done with them
            parts.append((replace(taken, values=torch.empty(0), tokens=None, clouds={}), fetch))
        counts = {"n_texts": n, "n_tokens": batches.n_tokens, "truncated": batches.truncated}

        def done() -> ShardDone:
            found: list[list[NDArray[Any]]] = []
            for taken, fetch in parts:
                bad, *rest = fetch.wait()
                taken.check_values(self.sites, bad)
                if self.tokens:
                    taken.check_tokens(self.sites, rest[0], rest[1])
                found.append(rest)
            joined = [np.concatenate(each) for each in zip(*found, strict=True)]
            token_parts, moment_parts = (joined[:4], joined[4:]) if self.tokens else ([], joined)
            sums = ShardSums(n, moment_parts, batches.n_tokens if self.tokens else 0, token_parts)
            if cells is not None:
                return arrays, {**counts, "clouds": clouds}, DeviceSketch(cells, [sums])
            if self.tokens:
                state = TokenMoments.empty(neurons)
                add_sums(Moments.empty(0), state, [replace(sums, parts=[np.empty(0)] * 4)], self.threads)
                arrays.update({f"tokens.{name}": array for name, array in state.arrays().items()})
            return arrays, {**counts, "clouds": clouds}, None

        return done

    def agreement(self, seed: int) -> dict[str, float]:
        """Rank correlation of scores in this precision with those in float32, on the first texts of the order."""
        texts = self.corpus.order(seed)[:_AGREEMENT_TEXTS]
        found: dict[str, list[tuple[float, int]]] = {}
        batches = self.batches(texts)
        if self.device is not None:
            return self._resident_agreement(batches)
        exact, asked = (
            capture(self.model, batches, self.sites, precision=precision, **self._alone)
            for precision in ("float32", self.precision)
        )
        for one, other in zip(exact, asked, strict=True):
            for kind in one.columns:
                values = np.ascontiguousarray(one.outputs[kind])
                least, greatest = values.min(axis=1), values.max(axis=1)
                live = _spread(least, greatest) > CONSTANT_TOLERANCE * rounding_scale(least, greatest)
                if not live.any():
                    continue
                pair = [
                    _plain_scores(np.ascontiguousarray(layer.outputs[kind][live]), self.threads)
                    for layer in (one, other)
                ]
                for name in pair[0]:
                    rho = rank_correlation(pair[0][name], pair[1][name])
                    if np.isfinite(rho):
                        found.setdefault(name, []).append((rho, len(pair[0][name])))
        means = {}
        for name, pairs in found.items():
            rhos, weights = np.array(pairs).T
            means[name] = float(np.average(rhos, weights=weights))
        return means

    def _resident_agreement(self, batches: TokenBatches) -> dict[str, float]:
        found: list[dict[str, torch.Tensor]] = []
        precisions: tuple[Precision, ...] = ("float32", self.precision)
        for precision in precisions:
            taken = capture_resident(self.model, batches, self.sites, precision=precision, **self._alone)
            layers = [_resident_scores(layer) for layer in taken]
            found.append({name: torch.cat([layer[name] for layer in layers]) for name in layers[0]})
        pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for width in {site.width for site in self.sites}:
            rows = [here for here, site in _site_rows(self.sites) if site.width == width]
            one, other = (
                {name: torch.stack([column[here] for here in rows]) for name, column in columns.items()}
                for columns in found
            )
            least, greatest = one.pop("least"), one.pop("greatest")
            own = torch.maximum(greatest, -least).double()
            middle = own.sort(1).values[:, [(width - 1) // 2, width // 2]].mean(1, keepdim=True)
            live = greatest.double() - least > CONSTANT_TOLERANCE * torch.maximum(own, middle)
            for name in one:
                pairs.setdefault(name, []).append((_rank_correlations(one[name], other[name], live), live.sum(1)))
        means = {}
        for name, parts in pairs.items():
            rhos, weights = (np.concatenate([to_host(part[k]) for part in parts]) for k in (0, 1))
            some = np.isfinite(rhos) & (weights > 0)
            if some.any():
                means[name] = float(np.average(rhos[some], weights=weights[some]))
        return means


ShardDone = tuple[dict[str, Any], dict[str, Any], AnySketch | None]


def _noting_tokens(batches: TokenBatches, progress: Callable[[float, float], None]) -> Callable[[float, float], None]:
    """Progress in texts as progress in (texts, tokens)."""
    passed = batches.tokens_of_first()
    return lambda done, _of: progress(done, float(np.interp(done, np.arange(len(passed)), passed)))


def _moment_parts(
    values: torch.Tensor, sums: ColumnSums, places: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """float64 [N] each, as in `ShardSums.parts`, of values [n, N] whose text i lies in row places[i] (default: i)."""
    groups = groups_of(len(values), values.device, places)
    gaps = bags(values, groups) if len(groups) else torch.zeros_like(sums.squares)
    return sums.positive, sums.negative, sums.squares, gaps


def _resident_scores(taken: Resident) -> dict[str, torch.Tensor]:
    """[neurons] r_f, standard deviation, bagged r_f where there is a group, and extremes."""
    values, n = taken.values, len(taken.values)
    sums = column_sums(values)
    mean = (sums.positive - sums.negative) / n
    found = {
        "rf": torch.as_tensor(r_f(values.t(), check=False)).double(),
        "std": (sums.squares / n - mean.square()).clamp(min=0).sqrt(),
        "least": sums.least,
        "greatest": sums.greatest,
    }
    if n >= GROUP:
        found["rf_bagged"] = bags(values, groups_of(n, values.device, taken.places)) / (n // GROUP)
    return found


def _rank_correlations(x: torch.Tensor, y: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """[sites] Spearman's over the live ones of [sites, width]; NaN where one side does not vary."""
    ranks = []
    for values in (x, y):
        # the others come last, and so change no rank
        some = torch.where(live, values, torch.inf).contiguous()
        ordered = some.sort(1).values
        both = torch.searchsorted(ordered, some) + torch.searchsorted(ordered, some, right=True)
        ranks.append(torch.where(live, both.double(), 0))
    weights = live.double()
    count = weights.sum(1, keepdim=True)
    a, b = ((rank - rank.sum(1, keepdim=True) / count) * weights for rank in ranks)
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()


def _plain_scores(values: NDArray[np.float32], threads: int | None) -> dict[str, NDArray[np.float64]]:
    moments = Moments.empty(len(values))
    moments.update(values, threads)
    found = {"rf": r_f(values, threads=threads, check=False).astype(np.float64), "std": moments.std()}
    if moments.groups.any():
        found["rf_bagged"] = moments.rf_bagged()
    return found


# ---- the whole of it -----------------------------------------------------------------------------------------------


@dataclass
class Kept:
    """What is left of a scoring when its texts are gone: enough to score again, and to join with others.

    Attributes:
        halves: Sketches of all neurons on the two disjoint halves of the texts; texts are positions in the corpus.
        vectors: (layer, kind) -> vectors of some texts of each half, for the clouds of heads and layers.
        digests: uint64 [n], one a text in the order of the corpus, to see whether two corpora share one.
        columns: float64 [neurons] each: `magnitude` and `reading` (what a neuron's `spread` is, were every standard
            deviation 1), and the columns of its effects, where they were made.
        meta: As in `Scores`; with `sites` as (layer, kind, width) triples, and `heads`.
    """

    halves: tuple[Sketch, Sketch]
    vectors: dict[tuple[int, str], tuple[NDArray[np.float32], NDArray[np.float32]]]
    digests: NDArray[np.uint64]
    columns: dict[str, NDArray[np.float64]]
    meta: dict[str, Any]


def _reduce_sketch(sketch: Sketch, world: World) -> None:
    """Makes every rank's sketch that of all texts: minimum, maximum and sum."""
    if world.size == 1:
        return
    gaps = sketch.cells.gaps()
    least = np.where(np.isnan(gaps.least), np.float32(np.inf), gaps.least)
    greatest = np.where(np.isnan(gaps.greatest), np.float32(-np.inf), gaps.greatest)
    world.reduce(least, "min")
    world.reduce(greatest, "max")
    nowhere = np.isinf(least)
    sketch.cells.regrid(np.where(nowhere, np.float32(np.nan), least), np.where(nowhere, np.float32(np.nan), greatest))
    world.reduce(sketch.cells.low, "min")
    world.reduce(sketch.cells.high, "max")
    for state in (sketch.moments, sketch.tokens):
        _reduce_state(state, world)


def _reduce_state(state: Moments | TokenMoments, world: World) -> None:
    if world.size == 1:
        return
    for name, array in state.arrays().items():
        world.reduce(array, state.MERGES[name])
    state.settle()


class _Table:
    """Columns of all neurons, filled site by site."""

    def __init__(self, neurons: int) -> None:
        self.neurons = neurons
        self.columns: dict[str, NDArray[np.float64]] = {}
        self.texts: dict[str, NDArray[np.int64]] = {}
        self.constant = np.zeros(neurons, bool)

    def put(
        self,
        rows: slice,
        found: tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.int64]], NDArray[np.bool_]],
    ) -> None:
        columns, texts, self.constant[rows] = found
        for name, column in columns.items():
            self.columns.setdefault(name, np.full(self.neurons, np.nan))[rows] = column
        for name, ids in texts.items():
            self.texts.setdefault(name, np.full(self.neurons, -1, np.int64))[rows] = ids

    def scores(self, sites: Sequence[tuple[int, str, int]], seed: int, meta: dict[str, Any]) -> Scores:
        bagged = [name for name in self.columns if name.startswith("rf_bagged")]
        defined = ~self.constant
        if any(np.isnan(self.columns[name][defined]).any() for name in bagged):
            for name in bagged:  # a half of fewer than 20 texts
                del self.columns[name]
        self.columns["random"] = np.random.default_rng(seed).random(self.neurons)
        widths = [width for _, _, width in sites]
        return Scores(
            layer=np.repeat(np.array([layer for layer, _, _ in sites], np.int16), widths),
            site=np.repeat(np.array([SITE_KINDS.index(kind) for _, kind, _ in sites], np.int8), widths),
            index=np.concatenate([np.arange(width, dtype=np.int32) for width in widths]),
            constant=self.constant,
            columns=self.columns,
            meta=meta,
            texts=self.texts,
        )


def _bring_clouds(work: _Work, job: _Job, chosen: Mapping[int, int]) -> dict[tuple[int, str], tuple[Any, Any]]:
    """Vectors of the chosen texts of each half, on rank 0; on the device where they lie there."""
    found: dict[tuple[int, str], tuple[list[Any], list[Any]]] = {}
    widths = cloud_widths(job.model)
    known = {site.kind for site in job.sites} | {"hidden"}
    kinds = [kind for kind in CLOUD_KINDS if {"context": "value"}.get(kind, kind) in known]
    for shard in work.shards:
        if not chosen[shard.number]:
            continue
        for layer in job.rows:
            for kind in kinds:
                owner = work.owner[shard.number]
                name = f"clouds.{shard.number}.{layer}.{kind}"
                mine = work.read(work.piece[shard.number], name) if owner == work.world.rank else None
                if owner != 0 and mine is not None:
                    mine = to_host(mine)
                part = work.world.bring(mine, owner, (chosen[shard.number], widths[kind]), np.float32)
                found.setdefault((layer, kind), ([], []))[shard.half].append(part)
    if work.world.rank != 0:
        return {}
    return {at: (_joined(a), _joined(b)) for at, (a, b) in found.items()}


def _joined(parts: Sequence[NDArray[Any] | torch.Tensor]) -> NDArray[Any] | torch.Tensor:
    """Parts one below the other: a tensor if one of them is."""
    tensor = next((part for part in parts if isinstance(part, torch.Tensor)), None)
    if tensor is None:
        return np.concatenate(parts)
    return torch.cat([part if isinstance(part, torch.Tensor) else upload(part, tensor.device) for part in parts])


def _finish(work: _Work, job: _Job, halves_wanted: bool) -> tuple[_Table, tuple[Sketch, Sketch] | None]:
    """The table on rank 0 (empty elsewhere), and the sketches of the halves if they were asked for or there."""
    world = work.world
    table = _Table(work.neurons)
    if work.device is not None and not work.exact:
        return table, _finish_resident(table, work, job, halves_wanted)
    if not work.exact:
        a, b = (cast("Sketch | None", work.sketches[half]) or Sketch.empty(work.neurons) for half in (0, 1))
        for sketch in (a, b):
            _reduce_sketch(sketch, world)
        if world.rank == 0:
            for rows, _ in _site_rows(job.sites):
                table.put(rows, site_columns((a.rows(rows), b.rows(rows)), threads=job.threads))
        return table, (a, b)

    tokens = []
    for half in (0, 1):
        state = TokenMoments.empty(work.neurons)
        for shard in work.mine(half) if job.tokens else ():
            arrays = {name: work.store.read(work.piece[shard.number], f"tokens.{name}") for name in state.arrays()}
            state.merge(TokenMoments(**arrays))
        _reduce_state(state, world)
        tokens.append(state)
    kept = (Sketch.empty(work.neurons), Sketch.empty(work.neurons)) if halves_wanted and world.rank == 0 else None
    order = np.concatenate([shard.texts for shard in work.shards])
    middle = sum(len(shard.texts) for shard in work.shards if shard.half == 0)
    for layer, rows in job.rows.items():
        width = rows.stop - rows.start
        parts = []
        for shard in work.shards:
            owner = work.owner[shard.number]
            mine = None
            if owner == world.rank:
                mine = work.read(work.piece[shard.number], f"values.{layer}")
                mine = mine if owner == 0 else to_host(mine)
            parts.append(world.bring(mine, owner, (len(shard.texts), width), np.float32))
        if world.rank != 0:
            continue
        values = _joined([part for part in parts if part is not None])
        del parts
        if work.device is not None:
            on_device = torch.as_tensor(values).to(work.device)
            sketch_of = _put_resident(table, job, layer, on_device, middle, order, tokens)
            if kept is not None:
                for half in (0, 1):
                    kept[half].rows(rows).merge(sketch_of(half))
            continue
        values = to_host(values)
        for here, site in _site_rows(job.sites):
            if site.layer != layer:
                continue
            columns = slice(here.start - rows.start, here.stop - rows.start)
            block = _columns_first(values[:, columns])
            halves = []
            for half, part in enumerate((slice(None, middle), slice(middle, None))):
                sketch = Sketch(GapCells.empty(site.width), Moments.empty(site.width), tokens[half].rows(here))
                sketch.update(np.ascontiguousarray(block[:, part]), order[part], job.threads)
                if kept is not None:
                    kept[half].rows(here).merge(sketch)
                halves.append(sketch)
            table.put(here, site_columns((halves[0], halves[1]), block, texts=order, threads=job.threads))
    return table, kept


def _gathered_columns(
    cells: Sequence[DeviceCells],
    sums: Sequence[tuple[Moments, TokenMoments]],
    fetch: Fetch,
    sites: Sequence[slice],
    settle: Callable[[Sequence[Gaps]], None] | None = None,
) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.int64]], NDArray[np.bool_]]:
    """Columns of neurons whose cells lie on a device.

    Args:
        cells: Of each half; on their way, `fetch` brings the gaps of both together and of each.
        sums: Of each half.
        fetch: What `_ask_gaps` gave.
        sites: The neurons of each site.
        settle: Makes gaps exact, in place.
    """
    (a, a_tokens), (b, b_tokens) = sums
    # digits may be added without passing on the carries, which `mean` and `std` do
    both = Moments(**{name: array + b.arrays()[name] for name, array in a.arrays().items()})
    tokens = a_tokens
    if a_tokens.count.any() or b_tokens.count.any():
        joined = {
            name: {"sum": np.add, "min": np.minimum, "max": np.maximum}[TokenMoments.MERGES[name]](
                array, b_tokens.arrays()[name]
            )
            for name, array in a_tokens.arrays().items()
        }
        tokens = TokenMoments(**joined)
    parts = fetch.wait()
    gaps = [gaps_of(parts[at : at + 5]) for at in (0, 5, 10)]
    if settle is not None:
        settle(gaps)
    return _columns(gaps, [both, a, b], [tokens, a_tokens, b_tokens], sites, settle is not None)


def _ask_gaps(cells: Sequence[DeviceCells]) -> Fetch:
    """Begins to fetch the gaps of two halves together and of each."""
    both = cells[0].copy()
    both.merge(cells[1])
    fetch = Fetch()
    for some in (both, *cells):
        some.ask_gaps(fetch)
    return fetch


def _finish_resident(table: _Table, work: _Work, job: _Job, halves_wanted: bool) -> tuple[Sketch, Sketch] | None:
    """Fills the table on rank 0 from sketches on the device; the sketches of the halves if they were asked for."""
    world, device = work.world, cast("torch.device", work.device)
    halves: list[DeviceSketch] = []
    for half in (0, 1):
        whole = cast("DeviceSketch | None", work.sketches[half])
        if whole is None:
            whole = DeviceSketch(DeviceCells.empty(work.neurons, device), [])
        if world.size > 1:
            on_host = whole.host()
            _reduce_sketch(on_host, world)
            whole = DeviceSketch.from_host(on_host, device)
        halves.append(whole)
    if world.rank == 0:
        cells = [half.cells for half in halves]
        fetch = _ask_gaps(cells)
        sums = [half.sums(job.threads) for half in halves]
        sites = [here for here, _ in _site_rows(job.sites)]
        table.put(slice(0, work.neurons), _gathered_columns(cells, sums, fetch, sites))
    return (halves[0].host(), halves[1].host()) if halves_wanted else None


def _put_resident(
    table: _Table,
    job: _Job,
    layer: int,
    values: torch.Tensor,
    middle: int,
    order: NDArray[np.int64],
    tokens: Sequence[TokenMoments],
) -> Callable[[int], Sketch]:
    """Fills the table for a layer from every value [n, neurons] on the device; gives the sketches of the halves."""
    rows = job.rows[layer]
    halves = values[:middle], values[middle:]
    ids = upload(order.astype(np.int64), values.device)
    parts, cells = [], []
    for some, texts in zip(halves, (ids[:middle], ids[middle:]), strict=True):
        sums = column_sums(some)
        one = DeviceCells.empty(values.shape[1], values.device)
        one.fill(some, texts, sums.least, sums.greatest)
        cells.append(one)
        fetch = Fetch()
        fetch.ask(*_moment_parts(some, sums))
        parts.append(fetch)
    fetch = _ask_gaps(cells)
    exact = Fetch()
    exact.ask(*(torch.as_tensor(r_f(some.t(), check=False)) for some in (values, *halves)))
    moments = []
    for half, brought in enumerate(parts):
        state = Moments.empty(values.shape[1])
        add_sums(state, TokenMoments.empty(0), [ShardSums(len(halves[half]), brought.wait())], job.threads)
        moments.append((state, tokens[half].rows(rows)))

    def settle(gaps: Sequence[Gaps]) -> None:
        for some, found in zip(gaps, exact.wait(), strict=True):
            loose = np.flatnonzero(~some.certified)
            some.low[loose] = some.high[loose] = found[loose]
            if some is gaps[0] and loose.size:
                picked = values.index_select(1, upload(loose, values.device))
                some.texts[loose, :2] = to_host(gap_ends(picked, ids))

    here = [
        slice(at.start - rows.start, at.stop - rows.start) for at, site in _site_rows(job.sites) if site.layer == layer
    ]
    table.put(rows, _gathered_columns(cells, moments, fetch, here, settle))
    return lambda half: Sketch(cells[half].host(), *moments[half])


def _site_rows(sites: Sequence[Site]) -> Iterator[tuple[slice, Site]]:
    end = 0
    for site in sites:
        yield slice(end, end + site.width), site
        end += site.width


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Corpus | str | Iterable[str],
    *,
    seed: int = 0,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    shard_texts: int = SHARD_TEXTS,
    memory: Memory = "model",
    exact: bool | None = None,
    tokens: bool = True,
    cloud_texts: int = CLOUD_TEXTS,
    effect_texts: int = EFFECT_TEXTS,
    read: str = "auto",
    labels: ArrayLike | None = None,
    precision: Precision = "float32",
    position: str = "auto",
    threads: int | None = None,
    store: Store | None = None,
    progress: Callable[[ShardProgress], None] | None = None,
    effect_progress: Callable[[float, float], None] | None = None,
    on_kept: Callable[[Kept], None] | None = None,
) -> Scores:
    """Scores every neuron of a model over a corpus: its outputs at [CLS], its effect on what is read, its weights.

    Under `torch.distributed` (a process group that is initialised) the ranks share the shards, and every rank gets
    the scores; they have the bits that one process finds with as many threads a process.

    Args:
        model: An encoder or decoder with any head or none; never changed. Scored in eval mode, without the caller's
            autocast.
        tokenizer: The model's tokenizer; of a model that reads pictures its image processor.
        texts: A `Corpus`, or anything `obce.read_corpus` takes; for a model that reads pictures, `obce.read_pictures`.
        seed: Decides the `random` score, the two halves of the texts, and their shards.
        max_length: Tokens a text is cut to (default: 128, or the most the model takes); `meta["truncated"]` says how
            many texts were.
        batch_tokens: Places a forward pass, padding included (default: 2,048 on the CPU, 16,384 on CUDA). Texts of a
            pass have similar lengths. A BERT on CUDA takes texts without padding, up to four times as many places.
        shard_texts: Most texts a shard, a multiple of 20. A shard is what a crash can cost; on CUDA, two
            of them and what was sketched since a sketch was last stored (`STORE_SECONDS`).
        memory: Activations of a shard held at once, see `obce.capture.capture`.
        exact: Keep every value (4 bytes x neurons x texts in the store), so that r_f is exact for every neuron; or
            keep a sketch of 10 KB a neuron, however many the texts, in which r_f is exact or lies in an interval.
            Default: every value while they take at most 2 GiB.
        tokens: Sum up what every neuron does over all tokens, for `token_mean` and its like; without them the last
            layer is computed at [CLS] alone.
        cloud_texts: Texts whose vectors are points of the heads' and layers' clouds; 0 for no clouds.
        effect_texts: Texts that effect clouds are made of, by a forward and a backward pass: half of them from each
            half of the texts; 0 for no `effect`, `effect_abs` and `taylor`. Needs `tokens`.
        read: What effects are measured at, see `obce.effects.effect_clouds`; give `"mean"` for an encoder that is used
            with mean pooling.
        labels: [n_texts], in the order of a `Corpus`: adds `taylor`, from the loss of the model's head.
        precision: Of products of matrices, see `obce.capture.capture`; other than `"float32"`,
            `meta["precision_agreement"]` says how well scores rank as in float32. Effects are always float32.
        position: The token of a text at which outputs are read: `"cls"`, its first; `"last"`, its last; `"mean"`, the
            mean over all of its tokens. `"auto"`: [CLS], of a decoder the last.
        threads: Threads of the persistence engine; default from `OMP_NUM_THREADS`, else all.
        store: Where finished shards are kept, and found by a later call with the same arguments (default: memory).
        progress: Called during the forward passes.
        effect_progress: Called with (texts done, texts in all) while effects are measured.
        on_kept: Called on rank 0 with what `merge` takes.

    Returns:
        Scores with one row a neuron.

    Raises:
        ValueError: The architecture is not supported, the corpus has fewer than four distinct texts, an argument is
            out of range, or an output is not finite; one sentence each.

    Source: OBCE, arXiv 2312.10702 (r_f of the 0-dimensional Vietoris-Rips persistence of [CLS] outputs).
    """
    threads = checked_threads(threads)
    sites = find_sites(model)
    corpus = corpus_of(texts, pictures=layout_of(model).pictures)
    device = next(base_model(model).parameters()).device.type
    batch_tokens = default_batch_tokens(device) if batch_tokens is None else batch_tokens
    if cloud_texts < 0:
        raise ValueError(f"cloud_texts is {cloud_texts}, expected 0 or more.")
    given = _checked_effects(model, corpus, effect_texts, read, labels, tokens)
    job = _Job(
        model,
        tokenizer,
        corpus,
        sites,
        usable_max_length(model, tokenizer, max_length),
        batch_tokens,
        memory,
        tokens,
        precision,
        threads,
        position_of(model, position),
    )
    neurons = sum(site.width for site in sites)
    shards = corpus.shards(seed, shard_texts)
    exact = kept_exactly(neurons, len(corpus)) if exact is None else exact
    chosen = _chosen(shards, min(cloud_texts, len(corpus)))
    if not min(sum(chosen[s.number] for s in shards if s.half == half) for half in (0, 1)) >= 2:
        chosen = dict.fromkeys(chosen, 0)
    world = World()
    work = _Work(shards, neurons, exact, MemoryStore() if store is None else store, world, job.device)
    hashed = model_hash_later(model) if world.rank == 0 else str

    _pass_shards(work, job, chosen, progress)
    n_tokens, truncated = work.total("n_tokens"), work.total("truncated")
    agreement = job.agreement(seed) if precision != "float32" else None
    table, halves = _finish(work, job, on_kept is not None)
    vectors = _bring_clouds(work, job, chosen)
    effects: dict[str, NDArray[np.float64]] = {}
    if tokens and effect_texts:
        means = world.from_first(table.columns.get("token_mean"))
        effects = _effect_columns(job, world, means, effect_texts, read, given, seed, effect_progress)
    if world.rank != 0:
        return world.from_first(None)  # type: ignore[no-any-return]
    meta = {
        "model_name": str(model.config.name_or_path or type(model).__name__),
        "model_hash": hashed(),
        **_facts(job),
        "n_tokens": n_tokens,
        "truncated": truncated,
        "shard_texts": shard_texts,
        "exact": exact,
        "seed": seed,
    }
    if agreement is not None:
        meta["precision_agreement"] = agreement
    triples = [(site.layer, site.kind, site.width) for site in sites]
    scores = table.scores(triples, seed, meta)
    shared = max(site.groups for site in sites)
    if shared > 1:
        meta["groups"] = shared
    if vectors:
        scores = replace(scores, clouds=cloud_scores(vectors, meta["heads"], shared, threads=threads))
        if on_kept is not None:
            vectors = {at: (to_host(a), to_host(b)) for at, (a, b) in vectors.items()}
    columns = _weight_columns(job, scores)
    reading = columns.pop("reading")
    if effects:
        meta |= {"effect_texts": min(effect_texts, len(corpus)), "read": reading_of(model, read)}
    scores = replace(scores, columns={**scores.columns, **columns, **effects})
    if on_kept is not None and halves is not None:
        plain = {"magnitude": columns["magnitude"], "reading": reading, **effects}
        on_kept(Kept(halves, vectors, corpus.digests(), plain, {**meta, "sites": triples}))
    return world.from_first(scores)  # type: ignore[no-any-return]


def _pass_shards(
    work: _Work, job: _Job, chosen: Mapping[int, int], progress: Callable[[ShardProgress], None] | None
) -> None:
    """Takes every shard that is left to this rank through the model, and stores what is kept of it."""
    begun = time.monotonic()
    here = sum(len(shard.texts) for shard in work.todo)
    share = (len(job.corpus) - work.resumed) / here if here else 0.0  # what the other ranks do, too
    done_texts, done_tokens = 0, 0
    under_way: deque[tuple[Shard, Callable[[], ShardDone]]] = deque()
    for shard, tokenised in _ahead(work.todo, lambda shard: job.batches(shard.texts), job.device is not None):

        def note(
            passed: float, passed_tokens: float, before: int = done_texts, tokens_before: int = done_tokens
        ) -> None:
            if progress is not None:
                progress(
                    ShardProgress(
                        work.resumed + share * (before + passed),
                        len(job.corpus),
                        share * (tokens_before + passed_tokens),
                        time.monotonic() - begun,
                        work.resumed,
                    )
                )

        batches = tokenised()
        given_shard = shard, batches, chosen[shard.number], work.exact, note
        if job.device is None:
            work.finish(shard, *job.shard(*given_shard))
        else:
            # the device works on this shard while the host ends the last one and tokenises the next
            under_way.append((shard, job.resident_shard(*given_shard)))
            if len(under_way) > 1:
                ending, done = under_way.popleft()
                work.finish(ending, *done())
        done_texts += len(shard.texts)
        done_tokens += batches.n_tokens
    for ending, done in under_way:
        work.finish(ending, *done())
    work.flush()


def _facts(job: _Job) -> dict[str, Any]:
    """What scores say of the model, the texts and the versions they were made with."""
    corpus, layout = job.corpus, layout_of(job.model)
    return {
        "architecture": architecture(job.model),
        "corpus_source": corpus.source,
        "corpus_hash": corpus.hash,
        "n_texts": len(corpus),
        "dropped_empty": corpus.dropped_empty,
        "dropped_duplicate": corpus.dropped_duplicate,
        "replaced": corpus.replaced,
        "max_length": job.max_length,
        "batch_tokens": job.batch_tokens,
        "tokens": job.tokens,
        "precision": job.precision,
        "position": job.position,
        "heads": max(site.heads for site in job.sites),
        **({"pictures": True} if layout.pictures else {}),
        **({"site_map": dict(layout.site_map)} if layout.site_map is not None else {}),
        "versions": {
            "obce": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "torch", "transformers")},
            "platform": sys.platform,
        },
    }


def _ahead(
    shards: Sequence[Shard], prepare: Callable[[Shard], TokenBatches], beside: bool
) -> Iterator[tuple[Shard, Callable[[], TokenBatches]]]:
    """Each shard with a call for its batches; `beside`, a thread makes those of the next one meanwhile."""
    if not beside:
        for shard in shards:
            yield shard, partial(prepare, shard)
        return
    with ThreadPoolExecutor(1) as pool:
        coming: deque[Future[TokenBatches]] = deque(pool.submit(prepare, shard) for shard in shards[:1])
        for i, shard in enumerate(shards):
            coming.extend(pool.submit(prepare, later) for later in shards[i + 1 : i + 2])
            yield shard, coming.popleft().result


def _checked_effects(
    model: PreTrainedModel, corpus: Corpus, effect_texts: int, read: str, labels: ArrayLike | None, tokens: bool
) -> NDArray[Any] | None:
    """The labels as an array; refuses what no forward pass could make valid, before the first one."""
    if effect_texts != 0 and effect_texts < 2:
        raise ValueError(f"effect_texts is {effect_texts}, expected 0, or at least 2: some of each half.")
    if read != "auto" and read not in READS:
        raise ValueError(f"read is {read!r}, expected 'auto' or one of {', '.join(map(repr, READS))}.")
    if read in ("head", "logits") and head_linear(model) is None:
        raise ValueError(
            f"read is {read!r}, but a {type(model).__name__} has no classifier: read 'cls', 'last', 'mean' or 'tokens'."
        )
    if tokens and effect_texts:
        check_gradients(model)
    if labels is None:
        return None
    if not (tokens and effect_texts):
        raise ValueError("labels are given for the score taylor, which needs tokens=True and effect_texts above 0.")
    return checked_labels(model, labels, len(corpus))


def _effect_columns(
    job: _Job,
    world: World,
    token_mean: NDArray[np.float64],
    effect_texts: int,
    read: str,
    labels: NDArray[Any] | None,
    seed: int,
    progress: Callable[[float, float], None] | None,
) -> dict[str, NDArray[np.float64]]:
    """Columns of effects on rank 0, none elsewhere; every rank takes some of the batches."""
    order = job.corpus.order(seed)
    middle = (len(order) + 1) // 2
    first = order[:middle][: (effect_texts + 1) // 2]
    texts = np.concatenate([first, order[middle:][: effect_texts // 2]])
    rows = {site.name: here for here, site in _site_rows(job.sites)}
    means = {name: token_mean[here] for name, here in rows.items()}
    batches = tokenize(
        job.corpus.entries(texts),
        job.tokenizer,
        max_length=job.max_length,
        batch_tokens=gradient_tokens(job.model, job.max_length, job.batch_tokens),
        vocabulary=vocabulary_of(job.model),
    ).share(world.rank, world.size)
    parts = {"": slice(None), "_a": slice(None, len(first)), "_b": slice(len(first), None)}
    columns: dict[str, NDArray[np.float64]] = {}

    def put(name: str, here: slice, values: NDArray[np.float64]) -> None:
        columns.setdefault(name, np.full(len(token_mean), np.nan))[here] = values

    passes = 1 if labels is None else 2

    def note(at: int) -> Callable[[float, float], None] | None:
        if progress is None:
            return None
        return lambda done, total: progress(at * total + min(total, done * world.size), passes * total)

    given: list[tuple[str, dict[str, Any]]] = [("effect", {"read": read, "seed": seed, "progress": note(0)})]
    if labels is not None:
        given.append(("taylor", {"labels": labels[texts], "progress": note(1)}))
    if job.device is not None:
        for name, settings in given:
            found = resident_effects(job.model, batches, job.sites, means, **settings)
            if world.size > 1:
                on_host = to_host(found)
                world.reduce(on_host, "sum")  # the effects of another rank's texts are 0 here
                found = upload(on_host, found.device)
            for suffix, part in parts.items() if world.rank == 0 else ():
                for column, values in _resident_effect_scores(found[part], name, seed).items():
                    put(column + suffix, slice(None), values)
        return _whole_halves(columns)
    for name, settings in given:
        clouds = effect_clouds(job.model, batches, job.sites, means, **settings)
        for site, cloud in clouds.items():
            world.reduce(cloud, "sum")
            for suffix, part in parts.items() if world.rank == 0 else ():
                magnitude = np.abs(cloud[:, part]).mean(1, dtype=np.float64)
                if name == "effect":
                    put("effect" + suffix, rows[site], bagged_rf(cloud[:, part], seed=seed, threads=job.threads))
                    put("effect_abs" + suffix, rows[site], magnitude)
                else:
                    put("taylor" + suffix, rows[site], magnitude)
        del clouds
    return _whole_halves(columns)


def _resident_effect_scores(values: torch.Tensor, name: str, seed: int) -> dict[str, NDArray[np.float64]]:
    """Columns of effects [n, neurons] that lie on a device."""
    fetch = Fetch()
    fetch.ask(values.abs().mean(0, dtype=torch.float64))
    if name == "taylor":
        return {"taylor": fetch.wait()[0]}
    drawn = bag_rows(len(values), seed=seed)
    if drawn is None:
        return {"effect": np.full(values.shape[1], np.nan), "effect_abs": fetch.wait()[0]}
    fetch.ask(bags(values, upload(drawn, values.device)) / len(drawn))
    magnitude, gaps = fetch.wait()
    return {"effect": gaps, "effect_abs": magnitude}


def _whole_halves(columns: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """The columns without those of too few texts."""
    if not columns:
        return columns
    if np.isnan(columns["effect_b"]).any():  # a half of fewer texts than a bag; the first has no fewer
        for name in ("effect_a", "effect_b"):
            del columns[name]
    if np.isnan(columns["effect"]).any():
        del columns["effect"]
    return columns


def _weight_columns(job: _Job, scores: Scores) -> dict[str, NDArray[np.float64]]:
    """`magnitude`, `spread` with its halves, and `reading`, as in `Kept.columns`."""
    columns: dict[str, NDArray[np.float64]] = {}
    rows = {site.name: here for here, site in _site_rows(job.sites)}
    stds = {
        f"spread{suffix}": scores.columns[f"token_std{suffix}"]
        for suffix in _PARTS
        if f"token_std{suffix}" in scores.columns
    } | {"reading": np.ones(len(scores))}
    each = [{name: std[here] for name, here in rows.items()} for std in stds.values()]
    for column, of_sites in zip(stds, weight_scores_each(job.model, job.sites, each), strict=True):
        for site, found in of_sites.items():
            for name, values in (("magnitude", found["magnitude"]), (column, found["spread"])):
                columns.setdefault(name, np.full(len(scores), np.nan))[rows[site]] = values
    return columns


def default_batch_tokens(device: str) -> int:
    """Places a forward pass on that type of device."""
    return _BATCH_TOKENS.get(device, _BATCH_TOKENS["cpu"])


def kept_exactly(neurons: int, n_texts: int) -> bool:
    """Whether `score` keeps every value by itself."""
    return 4 * neurons * n_texts <= EXACT_BYTES


def merge(kept: Sequence[Kept], *, threads: int | None = None) -> Scores:
    """Joins scorings of one model on different texts, as if all texts had been scored in one.

    r_f of a neuron is exact or lies in an interval (`rf_high`), as in a sketch of all texts. Effects are means over the
    groups, or over the texts, of all scorings, each about its own means of the tokens; where one has none, or they read
    different things of the model, there are none.

    Args:
        kept: What `score` gave to `on_kept`, at least two. The first half of the joined texts are the first halves of
            each; texts are numbered on, in this order.
        threads: Default as `obce.h0`.

    Raises:
        ValueError: Two of them are of different models or settings, or share a text.
    """
    threads = checked_threads(threads)
    if len(kept) < 2:
        raise ValueError(f"kept holds {len(kept)} scorings, expected at least 2 to join.")
    first = kept[0].meta
    for i, other in enumerate(kept[1:], start=1):
        for fact in ("model_hash", "max_length", "tokens", "precision", "position", "sites", "site_map"):
            if other.meta.get(fact) != first.get(fact):
                raise ValueError(
                    f"kept[{i}] was scored with another {fact} ({_short(other.meta.get(fact))}, kept[0] has "
                    f"{_short(first.get(fact))}), expected the same; score it again."
                )
    digests = np.concatenate([one.digests for one in kept])
    shared = len(digests) - len(np.unique(digests))
    if shared:
        raise ValueError(f"kept: {shared} texts are in more than one of the scorings, expected disjoint corpora.")
    halves = []
    for half in (0, 1):
        whole, offset = kept[0].halves[half].copy(), len(kept[0].digests)
        for one in kept[1:]:
            part = one.halves[half].copy()
            part.cells.renumber(offset)
            whole.merge(part, threads)
            offset += len(one.digests)
        halves.append(whole)
    sites = [tuple(site) for site in first["sites"]]
    table = _Table(len(halves[0]))
    end = 0
    for _, _, width in sites:
        rows = slice(end, end + width)
        end += width
        table.put(rows, site_columns((halves[0].rows(rows), halves[1].rows(rows)), threads=threads))
    added = ("n_texts", "n_tokens", "truncated", "dropped_empty", "dropped_duplicate", "replaced")
    meta = {
        **{name: value for name, value in first.items() if name != "sites"},
        **{name: sum(one.meta[name] for one in kept) for name in added},
        "exact": False,
        "corpus_source": " + ".join(one.meta["corpus_source"] for one in kept),
        "corpus_hash": joined_hash(one.meta["corpus_hash"] for one in kept),
        "merged": [{name: one.meta[name] for name in ("corpus_source", "corpus_hash", "n_texts")} for one in kept],
    }
    effects = _joined_effects(kept)
    if effects:
        meta["effect_texts"] = sum(one.meta["effect_texts"] for one in kept)
    else:
        meta = {name: value for name, value in meta.items() if name not in ("effect_texts", "read")}
    table.columns |= effects | _joined_weights(first["sites"], kept[0], table.columns)
    scores = table.scores(sites, first["seed"], meta)
    if all(one.vectors for one in kept):
        vectors = {
            at: (
                np.concatenate([one.vectors[at][0] for one in kept]),
                np.concatenate([one.vectors[at][1] for one in kept]),
            )
            for at in kept[0].vectors
        }
        scores = replace(scores, clouds=cloud_scores(vectors, first["heads"], first.get("groups", 1), threads=threads))
    return scores


def _joined_effects(kept: Sequence[Kept]) -> dict[str, NDArray[np.float64]]:
    """Columns of effects that all have, as means over their texts in any order."""
    if len({one.meta.get("read") for one in kept}) > 1:
        return {}
    shared = set.intersection(*(set(one.columns) for one in kept)) - {"magnitude", "reading"}
    found = {}
    for name in sorted(shared):
        texts = [one.meta["effect_texts"] for one in kept]
        if name.endswith(("_a", "_b")):
            texts = [(n + 1) // 2 if name.endswith("_a") else n // 2 for n in texts]
        weighted = np.stack([n * one.columns[name] for n, one in zip(texts, kept, strict=True)])
        found[name] = np.sort(weighted, axis=0).sum(axis=0) / sum(texts)
    return found


def _joined_weights(
    sites: Sequence[tuple[int, str, int]], kept: Kept, columns: Mapping[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.float64]]:
    """`magnitude`, and `spread` of the joined standard deviations `token_std`."""
    if not {"magnitude", "reading"} <= kept.columns.keys():
        return {}
    ends = np.cumsum([width for _, _, width in sites])
    rows = {
        (layer, kind): slice(end - width, end) for (layer, kind, width), end in zip(sites, ends.tolist(), strict=True)
    }
    found = {"magnitude": kept.columns["magnitude"]}
    shared = int(kept.meta.get("groups", 1))  # query heads that have one of key
    for suffix in _PARTS:
        std = columns.get(f"token_std{suffix}")
        if std is None:
            continue
        factor = kept.columns["reading"].copy()
        for (layer, kind), here in rows.items():
            if kind in PARTNER:
                groups = 1 if kind == "query" else shared
                site = Site(layer, kind, "", None, here.stop - here.start, kept.meta["heads"] // groups, groups=groups)
                factor[here] = as_wide(std[rows[layer, PARTNER[kind]]], site)
        found[f"spread{suffix}"] = std * factor
    return found


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
