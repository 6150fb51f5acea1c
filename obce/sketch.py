"""State of constant size a neuron that takes a stream of texts and merges in any order.

Every array here is a function of the multiset of values it has seen, whatever order, split or machine they came
by, and merges elementwise by minimum, maximum or sum. So the same texts give the same bits in one process, in ten,
or after a crash in the middle.

* `GapCells` holds the largest gap of a growing cloud of scalars in a fixed number of cells (`csrc/ph0_cpu_sketch.h`
  has the grid). The gap between neighbouring cells that hold values is known exactly, with the texts at its ends; a gap
  inside a cell is at most the span of its values. So r_f is **exact** whenever no cell spans more than the largest gap
  between cells, which holds at the latest when the gap is one cell wide; otherwise r_f lies between the two.
* `Moments` and `TokenMoments` hold sums without rounding, as integers in base 2^32: mean and variance are correctly
  rounded, also where the mean is a million times the standard deviation, and the order of additions cannot show.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np

from obce.backends import BACKENDS, default_threads
from obce.corpus import GROUP
from obce.h0 import r_f

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from numpy.typing import NDArray

CELLS = 256
"""Cells a neuron: 4 KB, and gaps of 1 part in 128 of the range are exact at the latest."""

Merge = Literal["min", "max", "sum"]

_WAYS: dict[Merge, Any] = {"min": np.minimum, "max": np.maximum, "sum": np.add}

_NO_LEVEL = np.int32(-(2**31))
_NO_LOW, _NO_HIGH = np.int64(2**63 - 1), np.int64(-(2**63))
_LEAST_LEVEL = -149
# Digit k of a sum counts 2^(32 (first + k) - 320): sums of float32 values are multiples of 2^-160 below 2^159,
# sums of their squares multiples of 2^-320 below 2^319.
_SUM_DIGITS, _SUM_FIRST = 10, 5
_SQUARE_DIGITS, _SQUARE_FIRST = 20, 0
_SUM_UNIT = 160  # a sum is its integer times 2^-160, a sum of squares its integer times 2^-320


def _compiled() -> Any | None:
    if BACKENDS["cpu"].why_not() is not None:
        return None
    from obce import _cpu

    return _cpu


@functools.cache
def _team() -> int:
    """Address of GOMP_parallel, on whose threads torch runs, once torch is imported; 0 where there is none."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError, TypeError):
        return 0


def _address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


@dataclass
class _State:
    """Arrays with one row a neuron, each with the way it merges."""

    MERGES: ClassVar[dict[str, Merge]] = {}

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Name -> array [neurons, ...], as kept (no copy)."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def rows(self, rows: slice) -> Self:
        """The state of some neurons that stand together, as a view: what is added to it is added here.

        Raises:
            ValueError: The slice has a step.
        """
        if rows.step not in (None, 1):
            raise ValueError(
                f"rows is {rows}, expected a slice without a step: a view has neurons that stand together."
            )
        return type(self)(**{name: array[rows] for name, array in self.arrays().items()})

    def copy(self) -> Self:
        """A state of its own."""
        return type(self)(**{name: array.copy() for name, array in self.arrays().items()})

    def merge(self, other: Self) -> None:
        """Takes in another state of as many neurons, which is left as it was."""
        _same_rows(self, other)
        theirs = other.arrays()
        for name, mine in self.arrays().items():
            _WAYS[self.MERGES[name]](mine, theirs[name], out=mine)
        self.settle()

    def settle(self) -> None:
        """Brings sums that were added digit by digit into their one form."""


def _same_rows(mine: _State, other: _State) -> None:
    if len(mine) != len(other):
        raise ValueError(f"other is a state of {len(other)} neurons, expected {len(mine)} as here.")


# ---- the largest gap


@dataclass
class Gaps:
    """The largest gap of each cloud, as far as the cells know it.

    Attributes:
        low: float32 [N], the largest gap between two cells: r_f is at least that. NaN without values.
        high: float32 [N], r_f is at most that; equal to `low` where r_f is known exactly.
        texts: int64 [N, 4], texts just below and just above that gap, and those of the least and of the
            greatest value; of equal values the smaller text. -1 without values.
        least, greatest: float32 [N].
    """

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    texts: NDArray[np.int64]
    least: NDArray[np.float32]
    greatest: NDArray[np.float32]

    @property
    def certified(self) -> NDArray[np.bool_]:
        """[N] whether `low` is r_f."""
        known: NDArray[np.bool_] = self.low == self.high
        return known


@dataclass
class GapCells(_State):
    """Cells of N growing clouds of scalars.

    Attributes:
        level: int32 [N], cells are 2^level wide; -2^31 without values.
        base: int64 [N], number of the first cell: it begins at base 2^level.
        low, high: int64 [N, cells], least and greatest value of each cell with its text, packed into one
            integer that orders as (value, text); extreme integers where the cell is empty.
    """

    level: NDArray[np.int32]
    base: NDArray[np.int64]
    low: NDArray[np.int64]
    high: NDArray[np.int64]

    @classmethod
    def empty(cls, neurons: int, cells: int = CELLS) -> Self:
        """State before the first value.

        Args:
            neurons: N.
            cells: Cells a neuron, 2 to 65,536; 16 bytes each.
        """
        if not 2 <= cells <= 1 << 16:
            raise ValueError(f"cells is {cells}, expected 2 to 65,536.")
        return cls(
            np.full(neurons, _NO_LEVEL, np.int32),
            np.zeros(neurons, np.int64),
            np.full((neurons, cells), _NO_LOW, np.int64),
            np.full((neurons, cells), _NO_HIGH, np.int64),
        )

    @property
    def cells(self) -> int:
        """Cells a neuron."""
        return int(self.low.shape[1])

    def _addresses(self) -> tuple[int, int, int, int]:
        return _address(self.level), _address(self.base), _address(self.low), _address(self.high)

    def update(self, values: NDArray[np.float32], texts: NDArray[np.integer[Any]], threads: int | None = None) -> None:
        """Takes in one value a neuron of some more texts.

        Args:
            values: float32 [N, m], finite.
            texts: [m] number of each text, 0 to 2^32 - 1.
            threads: Default as `obce.h0`.

        Raises:
            ValueError: A shape does not fit, a value is not finite, or a number is none of a text.
        """
        values = _values(values, len(self))
        numbers = np.asarray(texts)
        if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < 1 << 32:
            raise ValueError(f"texts go from {numbers.min()} to {numbers.max()}, expected numbers from 0 to 2^32 - 1.")
        ids = np.ascontiguousarray(numbers, dtype=np.uint32)
        if ids.shape != values.shape[1:]:
            raise ValueError(
                f"texts has shape {ids.shape}, expected {values.shape[1:]}: one number a column of values."
            )
        if not values.size:
            return
        engine = _compiled()
        if engine is None:
            least, greatest = values.min(axis=1), values.max(axis=1)
            fresh = GapCells.empty(len(self), self.cells)
            fresh.level[:], fresh.base[:] = _grid(least, greatest, self.cells)
            _insert(fresh, values, ids)
            self.merge(fresh)
            return
        engine.cells_update(
            _address(values),
            values.shape[1],
            values.shape[1],
            _address(ids),
            self._addresses(),
            len(self),
            self.cells,
            threads or default_threads(),
        )

    def merge(self, other: Self, threads: int | None = None) -> None:
        """Takes in the cells of other texts; `other` is left as it was.

        Raises:
            ValueError: It has another number of neurons or cells.
        """
        _same_rows(self, other)
        if self.cells != other.cells:
            raise ValueError(f"other has {other.cells} cells a neuron, expected {self.cells} as here.")
        engine = _compiled()
        if engine is None:
            mine, theirs = self.gaps(), other.gaps()
            levels = ((mine, self.level), (theirs, other.level))
            least = np.fmin(mine.least, theirs.least)
            greatest = np.fmax(mine.greatest, theirs.greatest)
            moved = other.copy()
            coarsest = np.maximum(*(np.where(np.isnan(gaps.low), _NO_LEVEL, level) for gaps, level in levels))
            place = _grid(least, greatest, self.cells, coarsest)
            for state in (self, moved):
                _regrid(state, *place)
            np.minimum(self.low, moved.low, out=self.low)
            np.maximum(self.high, moved.high, out=self.high)
            return
        engine.cells_merge(self._addresses(), other._addresses(), len(self), self.cells, threads or default_threads())

    def renumber(self, offset: int) -> None:
        """Adds an offset to the number of every text.

        Raises:
            ValueError: The offset, or a number that it leads to, is not from 0 to 2^32 - 1.
        """
        greatest = int((self.low[self.low != _NO_LOW] & 0xFFFFFFFF).max(initial=0))
        if not 0 <= offset < (1 << 32) - greatest:
            raise ValueError(f"offset is {offset} and the last text {greatest}, expected a sum of at most 2^32 - 1.")
        # the last 32 bits of `high` are the complement, which falls as the number grows
        self.low[self.low != _NO_LOW] += offset
        self.high[self.high != _NO_HIGH] -= offset

    def regrid(self, least: NDArray[np.float32], greatest: NDArray[np.float32]) -> None:
        """Puts every neuron on the grid of a range that contains its own; NaN leaves a neuron without values.

        States on the grid of the same range merge by elementwise minimum of `low` and maximum of `high`.

        Raises:
            ValueError: A neuron has values beyond its range, or stands on wider cells, which cannot be cut.
        """
        level, base = _grid(least, greatest, self.cells)
        own = self.gaps()
        fits = (least <= own.least) & (own.greatest <= greatest) & (self.level <= level) | np.isnan(own.low)
        if not fits.all():
            i = int(fits.argmin())
            raise ValueError(
                f"neuron {i} has values from {own.least[i]:g} to {own.greatest[i]:g} in cells of 2^{self.level[i]}; "
                f"its range is {least[i]:g} to {greatest[i]:g}, expected one that holds them in no finer cells."
            )
        engine = _compiled()
        if engine is None:
            _regrid(self, level, base)
            return
        engine.cells_regrid(
            self._addresses(), len(self), self.cells, _address(level), _address(base), default_threads()
        )

    def gaps(self, threads: int | None = None) -> Gaps:
        """The largest gap of every neuron and the texts around it."""
        engine = _compiled()
        if engine is None:
            return _gaps(self)
        n = len(self)
        low, high = np.empty((2, n), np.float32)
        texts, extremes = np.empty((n, 4), np.int64), np.empty((n, 2), np.float32)
        engine.cells_gaps(
            self._addresses(),
            n,
            self.cells,
            _address(low),
            _address(high),
            _address(texts),
            _address(extremes),
            threads or default_threads(),
        )
        return Gaps(low, high, texts, extremes[:, 0].copy(), extremes[:, 1].copy())


def _values(values: NDArray[np.float32], neurons: int) -> NDArray[np.float32]:
    values = np.asarray(values)
    if values.dtype != np.float32 or values.ndim != 2 or len(values) != neurons:
        raise ValueError(
            f"values is {values.dtype} of shape {values.shape}, expected float32 of shape ({neurons}, texts)."
        )
    values = np.ascontiguousarray(values)
    # one pass without a copy: a sum that is finite has finite terms, else look closer (it may overflow)
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = ~np.isfinite(values.sum(axis=1, dtype=np.float64))
    if suspicious.any():
        for row in np.flatnonzero(suspicious):
            column = np.flatnonzero(~np.isfinite(values[row]))
            if column.size:
                raise ValueError(
                    f"values holds {values[row, column[0]]} at neuron {row}, column {column[0]}, expected finite "
                    "numbers."
                )
    return values


# The rules of csrc/ph0_cpu_sketch.h as plain code: what answers where nothing was compiled, and what the compiled
# code is tested against.


def _ordered(values: NDArray[np.float32]) -> NDArray[np.int64]:
    bits = (values + np.float32(0)).view(np.int32)  # -0 becomes +0
    return (bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))).astype(np.int64)


def _value_of(keys: NDArray[np.int64]) -> NDArray[np.float32]:
    order = (keys >> 32).astype(np.int32)
    return (order ^ ((order >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)


def _cell_of(values: NDArray[Any], level: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.floor(np.ldexp(values.astype(np.float64), -level)).astype(np.int64)


def _grid(
    least: NDArray[np.float32], greatest: NDArray[np.float32], cells: int, start: Any = _NO_LEVEL
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Level and base of the finest grid of each range, from the level `start` on; no level where the range is NaN."""
    none = np.isnan(least)
    low, high = (np.where(none, 0, end).astype(np.float64) for end in (least, greatest))
    largest = np.maximum(np.abs(low), np.abs(high))
    # frexp's exponent is one more than the exponent of the leading bit
    level = np.where(largest > 0, np.maximum(np.frexp(largest)[1] - 24, _LEAST_LEVEL), _LEAST_LEVEL)
    level = np.where(high > low, np.maximum(level, np.frexp(high - low)[1] - cells.bit_length() - 1), level)
    level = np.maximum(level, start).astype(np.int32)
    while (wide := _cell_of(high, level) - _cell_of(low, level) >= cells).any():
        level[wide] += 1
    return np.where(none, _NO_LEVEL, level), np.where(none, 0, _cell_of(low, level))


def _insert(state: GapCells, values: NDArray[np.float32], ids: NDArray[np.uint32]) -> None:
    rows = np.arange(len(state))[:, None]
    places = _cell_of(values, state.level[:, None]) - state.base[:, None]
    order = _ordered(values) << 32
    np.minimum.at(state.low, (rows, places), order | ids.astype(np.int64))
    np.maximum.at(state.high, (rows, places), order | (~ids).astype(np.int64))


def _regrid(state: GapCells, level: NDArray[np.int32], base: NDArray[np.int64]) -> None:
    rows, cells = np.nonzero(state.low != _NO_LOW)
    low, high = state.low[rows, cells], state.high[rows, cells]
    coarser = np.minimum(level[rows].astype(np.int64) - state.level[rows], 63)
    places = ((state.base[rows] + cells) >> coarser) - base[rows]
    state.low[:], state.high[:] = _NO_LOW, _NO_HIGH
    np.minimum.at(state.low, (rows, places), low)
    np.maximum.at(state.high, (rows, places), high)
    state.level[:], state.base[:] = level, base


def _gaps(state: GapCells) -> Gaps:
    n = len(state)
    nan = np.full(n, np.nan, np.float32)
    found = Gaps(nan.copy(), nan.copy(), np.full((n, 4), -1, np.int64), nan.copy(), nan.copy())
    mask = np.int64(0xFFFFFFFF)
    for i in range(n):
        there = state.low[i] != _NO_LOW
        if not there.any():
            continue
        low, high = state.low[i][there], state.high[i][there]
        below, above = _value_of(high), _value_of(low)
        steps = above[1:] - below[:-1]
        gap = steps.max(initial=np.float32(0))
        ends = [low[0] & mask, low[0] & mask]
        if gap > 0:
            at = int(steps.argmax())
            ends = [~high[at] & mask, low[at + 1] & mask]
        found.low[i], found.high[i] = gap, max(gap, (below - above).max())
        found.texts[i] = [*ends, low[0] & mask, ~high[-1] & mask]
        found.least[i], found.greatest[i] = above[0], below[-1]
    return found


# ---- sums without rounding


def add_exactly(sums: NDArray[np.int64], values: NDArray[np.float64], threads: int | None = None) -> None:
    """Adds doubles [N, m] to sums [N, 10] (multiples of 2^-160) or [N, 20] (multiples of 2^-320)."""
    digits = sums.shape[1]
    first = _SUM_FIRST if digits == _SUM_DIGITS else _SQUARE_FIRST
    values = np.ascontiguousarray(values, dtype=np.float64)
    engine = _compiled()
    if engine is None:
        _add(sums, values, first)
        return
    engine.sums_add(
        _address(values),
        values.shape[1],
        len(values),
        _address(sums),
        digits,
        first,
        threads or default_threads(),
    )


def _add(sums: NDArray[np.int64], values: NDArray[np.float64], first: int) -> None:
    fraction, exponent = np.frexp(values)
    mantissa = np.abs(np.ldexp(fraction, 53)).astype(np.uint64)
    sign = np.sign(values).astype(np.int64)
    at = exponent.astype(np.int64) - 53 + 320 - 32 * first
    mantissa >>= np.clip(-at, 0, 63).astype(np.uint64)
    at = np.maximum(at, 0)
    shift = (at & 31).astype(np.uint64)
    low = mantissa << shift
    high = np.where(shift > 0, mantissa >> (np.uint64(64) - np.maximum(shift, np.uint64(1))), np.uint64(0))
    rows = np.arange(len(sums))[:, None]
    width = sums.shape[1]
    for k, part in enumerate((low & np.uint64(0xFFFFFFFF), low >> np.uint64(32), high)):
        np.add.at(sums, (rows, np.minimum((at >> 5) + k, width - 1)), sign * part.astype(np.int64))
    _carry(sums)


def _carry(sums: NDArray[np.int64]) -> None:
    for k in range(sums.shape[1] - 1):
        sums[:, k + 1] += sums[:, k] >> 32
        sums[:, k] &= 0xFFFFFFFF


def _integers(sums: NDArray[np.int64]) -> list[int]:
    """Each row of digits, carries passed on or not, as one integer."""
    sums = sums.copy()
    _carry(sums)
    digits = np.ascontiguousarray(sums[:, :-1].astype(np.uint32))
    width = 32 * digits.shape[1]
    return [
        int.from_bytes(row.tobytes(), "little") + (int(top) << width)
        for row, top in zip(digits, sums[:, -1], strict=True)
    ]


def _means(sums: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.float64]:
    engine = _compiled()
    if engine is not None:
        sums, count, out = np.ascontiguousarray(sums), np.ascontiguousarray(count), np.empty(len(sums))
        engine.sums_means(_address(sums), _address(count), len(sums), _address(out), default_threads())
        return out
    pairs = zip(_integers(sums), count.tolist(), strict=True)
    return np.array([total / (n << _SUM_UNIT) if n else math.nan for total, n in pairs], np.float64)


def _deviations(sums: NDArray[np.int64], squares: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.float64]:
    """Population standard deviations: root of (n S2 - S1^2) / n^2, exact up to the division and the root."""
    engine = _compiled()
    if engine is not None:
        sums, squares, count = (np.ascontiguousarray(array) for array in (sums, squares, count))
        out = np.empty(len(sums))
        addresses = (_address(array) for array in (sums, squares, count))
        engine.sums_deviations(*addresses, len(sums), _address(out), default_threads())
        return out
    found = []
    for total, square, n in zip(_integers(sums), _integers(squares), count.tolist(), strict=True):
        # below 0 only where the sums themselves were rounded before they were added
        spread = max(0, n * square - total * total)
        found.append(math.sqrt(spread / (n * n << 2 * _SUM_UNIT)) if n else math.nan)
    return np.array(found, np.float64)


@dataclass
class Moments(_State):
    """Sums over N growing clouds of scalars.

    Attributes:
        count: int64 [N], values.
        positive, negative: int64 [N, 10], digits of the sum of the values above 0, and of the magnitudes of
            those below.
        squares: int64 [N, 20], digits of the sum of squares.
        groups: int64 [N], whole groups of 20 texts.
        group_gaps: int64 [N, 10], digits of the sum of their r_f.
    """

    count: NDArray[np.int64]
    positive: NDArray[np.int64]
    negative: NDArray[np.int64]
    squares: NDArray[np.int64]
    groups: NDArray[np.int64]
    group_gaps: NDArray[np.int64]

    MERGES: ClassVar[dict[str, Merge]] = dict.fromkeys(
        ("count", "positive", "negative", "squares", "groups", "group_gaps"), "sum"
    )

    @classmethod
    def empty(cls, neurons: int) -> Self:
        """State before the first value."""
        count = np.zeros((2, neurons), np.int64)
        sums = np.zeros((3, neurons, _SUM_DIGITS), np.int64)
        return cls(count[0], sums[0], sums[1], np.zeros((neurons, _SQUARE_DIGITS), np.int64), count[1], sums[2])

    def settle(self) -> None:
        """Passes on the carries."""
        for sums in (self.positive, self.negative, self.squares, self.group_gaps):
            _carry(sums)

    def update(self, values: NDArray[np.float32], threads: int | None = None) -> None:
        """Takes in float32 [N, m]: the texts of each consecutive 20 columns are one group, a rest is in none.

        Raises:
            ValueError: The shape does not fit, or a value is not finite.
        """
        values = _values(values, len(self))
        n_rows, m = values.shape
        if not values.size:
            return
        threads = threads or default_threads()
        engine = _compiled()
        if engine is None:
            wide = values.astype(np.float64)
            add_exactly(self.positive, np.maximum(wide, 0))
            add_exactly(self.negative, np.maximum(-wide, 0))
            add_exactly(self.squares, np.square(wide))
        else:
            engine.sums_update(
                _address(values),
                m,
                m,
                n_rows,
                _address(self.positive),
                _address(self.negative),
                _address(self.squares),
                threads,
            )
        self.count += m
        if groups := m // GROUP:
            # no copy when nothing is left over
            grouped = values[:, : groups * GROUP].reshape(n_rows * groups, GROUP)
            gaps = r_f(grouped, threads=threads, check=False).reshape(n_rows, groups)
            add_exactly(self.group_gaps, gaps.astype(np.float64), threads)
            self.groups += groups

    def mean(self) -> NDArray[np.float64]:
        """[N] correctly rounded; NaN without values."""
        return _means(self.positive - self.negative, self.count)

    def mean_abs(self) -> NDArray[np.float64]:
        """[N] mean magnitude, correctly rounded; NaN without values."""
        return _means(self.positive + self.negative, self.count)

    def std(self) -> NDArray[np.float64]:
        """[N] population standard deviation, within an ulp; NaN without values."""
        return _deviations(self.positive - self.negative, self.squares, self.count)

    def rf_bagged(self) -> NDArray[np.float64]:
        """[N] mean r_f of the groups of 20 texts; NaN where there is none."""
        return _means(self.group_gaps, self.groups)


@dataclass
class TokenMoments(_State):
    """What N neurons did over all tokens of all texts.

    Attributes:
        count: int64 [N], tokens.
        sums: int64 [N, 10], digits of the sum; added in exactly as the doubles that `update` is given.
        squares: int64 [N, 20], digits of the sum of squares, likewise.
        least, greatest: float32 [N]; inf and -inf without tokens.
    """

    count: NDArray[np.int64]
    sums: NDArray[np.int64]
    squares: NDArray[np.int64]
    least: NDArray[np.float32]
    greatest: NDArray[np.float32]

    MERGES: ClassVar[dict[str, Merge]] = {
        "count": "sum",
        "sums": "sum",
        "squares": "sum",
        "least": "min",
        "greatest": "max",
    }

    @classmethod
    def empty(cls, neurons: int) -> Self:
        """State before the first token."""
        return cls(
            np.zeros(neurons, np.int64),
            np.zeros((neurons, _SUM_DIGITS), np.int64),
            np.zeros((neurons, _SQUARE_DIGITS), np.int64),
            np.full(neurons, np.inf, np.float32),
            np.full(neurons, -np.inf, np.float32),
        )

    def settle(self) -> None:
        """Passes on the carries."""
        _carry(self.sums)
        _carry(self.squares)

    def update(self, more: TokenSums) -> None:
        """Takes in the sums of some batches."""
        self.count += more.count
        add_exactly(self.sums, more.sums[:, None])
        add_exactly(self.squares, more.squares[:, None])
        np.minimum(self.least, more.least, out=self.least)
        np.maximum(self.greatest, more.greatest, out=self.greatest)

    def mean(self) -> NDArray[np.float64]:
        """[N] NaN without tokens."""
        return _means(self.sums, self.count)

    def std(self) -> NDArray[np.float64]:
        """[N] population standard deviation; NaN without tokens."""
        return _deviations(self.sums, self.squares, self.count)


class TokenSums:
    """Float64 sums over the tokens of some batches, before they are added exactly to a `TokenMoments`.

    Attributes:
        count: Tokens.
        sums, squares: float64 [width].
        least, greatest: float32 [width]; inf and -inf without tokens.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.sums = np.zeros(width)
        self.squares = np.zeros(width)
        self.least = np.full(width, np.inf, np.float32)
        self.greatest = np.full(width, -np.inf, np.float32)
        self._on_device: list[torch.Tensor] = []
        # found once: `add` is called for every site and batch, where microseconds count
        self._engine = _compiled()
        self._into = tuple(_address(array) for array in (self.sums, self.squares, self.least, self.greatest))
        self._threads = default_threads()

    def add(self, tokens: torch.Tensor, lengths: NDArray[np.int64], threads: int | None = None) -> None:
        """Adds the first `lengths[b]` tokens of each text.

        Args:
            tokens: [b, T, width], any floating dtype and device. What lies on an accelerator is summed there, in its
                stream, and fetched by `settle`.
            lengths: int64 [b].
            threads: Default as `obce.h0`.
        """
        import torch

        if tokens.dtype is not torch.float32:
            tokens = tokens.to(torch.float32)
        if tokens.device.type != "cpu":
            self.count += int(lengths.sum())
            places = torch.arange(tokens.shape[1], device=tokens.device)
            real = tokens.detach()[places < torch.from_numpy(lengths).to(tokens.device)[:, None]]
            wide = real.to(torch.float64)
            more = [wide.sum(0), wide.square().sum(0), real.amin(0), real.amax(0)]
            if self._on_device:
                sums, squares, least, greatest = self._on_device
                more = [sums + more[0], squares + more[1], least.minimum(more[2]), greatest.maximum(more[3])]
            self._on_device = more
            return
        text_stride, token_stride, stride = tokens.stride()
        if self._engine is None or stride != 1:
            self.count += int(lengths.sum())
            values = tokens.detach().numpy()
            some = values[np.arange(values.shape[1]) < lengths[:, None]]
            doubles = some.astype(np.float64)
            self.sums += doubles.sum(axis=0)
            self.squares += np.square(doubles).sum(axis=0)
            np.minimum(self.least, some.min(axis=0), out=self.least)
            np.maximum(self.greatest, some.max(axis=0), out=self.greatest)
            return
        self.count += self._engine.token_sums(
            tokens.data_ptr(),
            text_stride,
            token_stride,
            _address(lengths),
            len(lengths),
            len(self.sums),
            *self._into,
            threads or self._threads,
            _team(),
        )

    def take(
        self,
        count: int,
        sums: NDArray[np.float64],
        squares: NDArray[np.float64],
        least: NDArray[np.float32],
        greatest: NDArray[np.float32],
    ) -> None:
        """Adds sums of so many tokens, each [width]."""
        self.count += count
        self.sums += sums
        self.squares += squares
        np.minimum(self.least, least, out=self.least)
        np.maximum(self.greatest, greatest, out=self.greatest)

    def settle(self) -> TokenSums:
        """Fetches what was summed on an accelerator; the sums themselves."""
        if self._on_device:
            sums, squares, least, greatest = (part.cpu().numpy() for part in self._on_device)
            self._on_device = []
            self.sums += sums
            self.squares += squares
            np.minimum(self.least, least, out=self.least)
            np.maximum(self.greatest, greatest, out=self.greatest)
        return self


# ---- all of it


@dataclass
class Sketch:
    """All that is kept of some texts: cells, sums at [CLS] and sums over tokens of N neurons.

    `arrays` and `from_arrays` are its form on disk.
    """

    cells: GapCells
    moments: Moments
    tokens: TokenMoments

    @classmethod
    def empty(cls, neurons: int, cells: int = CELLS) -> Self:
        """State before the first text; about 5 KB a neuron with 256 cells."""
        return cls(GapCells.empty(neurons, cells), Moments.empty(neurons), TokenMoments.empty(neurons))

    def __len__(self) -> int:
        return len(self.cells)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Name -> array [neurons, ...], as kept (no copy)."""
        return {
            f"{part}.{name}": array
            for part in ("cells", "moments", "tokens")
            for name, array in getattr(self, part).arrays().items()
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """The sketch whose `arrays` these are.

        Raises:
            KeyError: One is missing.
        """

        def taken(part: str, kind: type[_State]) -> dict[str, NDArray[Any]]:
            return {each.name: arrays[f"{part}.{each.name}"] for each in fields(kind)}

        return cls(
            GapCells(**taken("cells", GapCells)),
            Moments(**taken("moments", Moments)),
            TokenMoments(**taken("tokens", TokenMoments)),
        )

    def rows(self, rows: slice) -> Self:
        """The sketch of some neurons, as a view."""
        return type(self)(self.cells.rows(rows), self.moments.rows(rows), self.tokens.rows(rows))

    def copy(self) -> Self:
        """A sketch of its own."""
        return type(self)(self.cells.copy(), self.moments.copy(), self.tokens.copy())

    def merge(self, other: Self, threads: int | None = None) -> None:
        """Takes in the sketch of other texts; `other` is left as it was.

        Raises:
            ValueError: It has another number of neurons or cells.
        """
        self.cells.merge(other.cells, threads)
        self.moments.merge(other.moments)
        self.tokens.merge(other.tokens)

    def update(self, values: NDArray[np.float32], texts: NDArray[np.integer[Any]], threads: int | None = None) -> None:
        """Takes in float32 [N, m], one value a neuron of each of m more texts with these numbers [m].

        Raises:
            ValueError: A shape does not fit, or a value is not finite.
        """
        self.cells.update(values, texts, threads)
        self.moments.update(values, threads)
