"""What scoring keeps where the model is: on an accelerator, from the hooks to the columns.

The counterparts of obce/sketch.py for values that lie on a device. Nothing here waits for the device but `Fetch.wait`
and what says so. Cells are those of `obce.sketch.GapCells`, bit for bit. A shard's sums are taken in float64 (where the
host adds every term without rounding), and shards' sums are added without rounding, so that the order and the place of
shards still leave no trace. By Triton (kernels/neurons.py) where it is there, else by torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from obce.corpus import GROUP
from obce.h0 import r_f
from obce.sketch import CELLS, GapCells, Gaps, Moments, Sketch, TokenMoments, add_exactly

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESIDENT = {"cuda"}
"""Types of device on which a scoring stays; on others it takes the way of the host. Tests add the CPU."""

_NO_LEVEL = -(2**31)
_NO_LOW, _NO_HIGH = 2**63 - 1, -(2**63)
_LEAST_LEVEL = -149
_NO_TEXT = 2**31 - 1
_LARGE = 1 << 25  # bytes for which pinning memory takes longer than it saves
_CHUNK = 1 << 24  # numbers that torch works on at a time where Triton is not there


def resident(device: torch.device) -> bool:
    """Whether scoring stays on this device."""
    return device.type in RESIDENT


@functools.cache
def _kernels() -> Any | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("obce.kernels.neurons")


def _kernels_for(tensor: torch.Tensor) -> Any | None:
    return _kernels() if tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1" else None


def upload(array: NDArray[Any] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """The array on the device, in the order of its stream: the host does not wait."""
    tensor = torch.as_tensor(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Fetch:
    """Copies to the host that are under way."""

    def __init__(self) -> None:
        self._parts: list[torch.Tensor] = []
        self._done: Any = None

    def ask(self, *tensors: torch.Tensor) -> None:
        """Begins to copy; `wait` gives the copies in this order."""
        for tensor in tensors:
            held = tensor.detach()
            if held.is_cuda:
                held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                held.copy_(tensor, non_blocking=True)
                self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._done.record(torch.cuda.current_stream(tensor.device))
            self._parts.append(held)

    def wait(self) -> list[NDArray[Any]]:
        """All copies, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        parts, self._parts, self._done = self._parts, [], None
        return [part.cpu().numpy() for part in parts]


def to_host(array: NDArray[Any] | torch.Tensor) -> NDArray[Any]:
    """The array on the host; waits for it."""
    if isinstance(array, np.ndarray):
        return array
    if array.nbytes >= _LARGE:
        return array.detach().cpu().numpy()
    fetch = Fetch()
    fetch.ask(array)
    return fetch.wait()[0]


# ---- one pass over values [n, N]


@dataclass
class ColumnSums:
    """Sums over the texts of values [n, N], on their device.

    Attributes:
        positive, negative, squares: float64 [N], as in `Moments`; `squares` is not finite where a value is not.
        least, greatest: float32 [N].
        bad: int32 [N], the first text whose value is not finite, 2^31 - 1 where there is none.
    """

    positive: torch.Tensor
    negative: torch.Tensor
    squares: torch.Tensor
    least: torch.Tensor
    greatest: torch.Tensor
    bad: torch.Tensor


def column_sums(values: torch.Tensor) -> ColumnSums:
    """Sums of float32 [n, N], n at least 1."""
    if kernels := _kernels_for(values):
        return ColumnSums(*kernels.column_sums(values))
    wide = values.to(torch.float64)
    at = torch.arange(len(values), dtype=torch.int32, device=values.device)[:, None]
    return ColumnSums(
        wide.clamp(min=0).sum(0),
        (-wide).clamp(min=0).sum(0),
        wide.square().sum(0),
        *values.aminmax(dim=0),
        torch.where(values.isfinite(), _NO_TEXT, at).amin(0),
    )


def bags(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """float64 [N]: sum over bags of r_f of values[bag].

    Args:
        values: float32 [n, N].
        rows: int64 [bags, size], rows of values.
    """
    if kernels := _kernels_for(values):
        found: torch.Tensor = kernels.bags(values, rows)
        return found
    total = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
    step = max(1, _CHUNK // (rows.shape[1] * values.shape[1]))
    for some in torch.split(rows, step):
        lines = values[some].permute(2, 0, 1).reshape(-1, rows.shape[1])  # [N * bags, size]
        total += torch.as_tensor(r_f(lines, check=False)).reshape(-1, len(some)).to(torch.float64).sum(1)
    return total


def take_rows(tokens: torch.Tensor, starts: torch.Tensor | None, out: torch.Tensor) -> None:
    """Writes the first token of each text of [b, T, width], or of a pack [1, T, width], to float32 [b, width].

    Args:
        tokens: What a module gives, any floating dtype.
        starts: int64 [b], where the texts of a pack begin; None for a batch.
        out: Rows of a buffer.
    """
    kernels = _kernels_for(tokens)
    if kernels is not None and tokens.stride(2) == 1:
        kernels.take_rows(tokens, starts, out)
        return
    out.copy_(tokens[:, 0] if starts is None else tokens[0].index_select(0, starts))


class TokenSlots:
    """Sums over the tokens of some texts, on a device, for N neurons; added up by `total`.

    Sums are taken in float32 over a few numbers at a time and in float64 beyond, see `kernels/neurons.py`.
    """

    def __init__(self, neurons: int, device: torch.device) -> None:
        kernels = _kernels_for(torch.empty(0, device=device))
        slots = 1 if kernels is None else kernels.SPLITS
        self.count = 0
        self._sums = torch.zeros((2, slots, neurons), dtype=torch.float64, device=device)
        self._least = torch.full((slots, neurons), torch.inf, device=device)
        self._greatest = torch.full((slots, neurons), -torch.inf, device=device)

    def add(self, tokens: torch.Tensor, lengths: torch.Tensor, columns: slice) -> None:
        """Adds the first lengths[b] (int32) tokens of each text of [b, T, width] to the neurons `columns`."""
        tokens = tokens.detach()
        slots = [part[:, columns] for part in (*self._sums, self._least, self._greatest)]
        kernels = _kernels_for(tokens)
        if kernels is not None and tokens.stride(2) == 1:
            kernels.add_tokens(tokens, lengths, tuple(slots))
            return
        tokens = tokens.to(torch.float32)
        real = (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None])[..., None]
        wide = torch.where(real, tokens, 0).to(torch.float64)
        slots[0][0] += wide.sum((0, 1))
        slots[1][0] += wide.square().sum((0, 1))
        torch.minimum(slots[2][0], torch.where(real, tokens, torch.inf).amin((0, 1)), out=slots[2][0])
        torch.maximum(slots[3][0], torch.where(real, tokens, -torch.inf).amax((0, 1)), out=slots[3][0])

    def total(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """sums, squares (float64 [N]), least, greatest (float32 [N])."""
        return self._sums[0].sum(0), self._sums[1].sum(0), self._least.amin(0), self._greatest.amax(0)


# ---- cells


def _grid(least: torch.Tensor, greatest: torch.Tensor, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Level (int32) and base (int64) as `obce.sketch` has them; of neurons without values (NaN) the empty ones."""
    low, high = least.double(), greatest.double()
    some = low.isfinite() & high.isfinite()
    low, high = torch.where(some, low, 0.0), torch.where(some, high, 0.0)
    largest = torch.maximum(low.abs(), high.abs())
    level = torch.where(largest > 0, (torch.frexp(largest)[1] - 24).clamp(min=_LEAST_LEVEL), _LEAST_LEVEL)
    finer = torch.frexp(high - low)[1] - cells.bit_length() - 1
    level = torch.where(high > low, torch.maximum(level, finer), level)
    # a span of 2^e takes at most cells + 1 of the cells of 2^(e - bits), so three steps from 2^(e - bits - 2) suffice
    for _ in range(4):
        wide = _cell_of(high, level) - _cell_of(low, level) >= cells
        level = level + wide.to(level.dtype)
    base = _cell_of(low, level)
    return torch.where(some, level, _NO_LEVEL).to(torch.int32), torch.where(some, base, 0)


def _cell_of(values: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    return (values.double() * _scale(level)).floor().to(torch.int64)


def _scale(level: torch.Tensor) -> torch.Tensor:
    """float64 2^-level, exact."""
    # levels of values lie between -149 and 128, so this is the bit pattern of a normal number
    return ((1023 - level.to(torch.int64).clamp(min=-1000)) << 52).view(torch.float64)


@dataclass
class DeviceCells:
    """`GapCells` on a device, with the extremes of every neuron beside them (NaN without values)."""

    level: torch.Tensor
    base: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    least: torch.Tensor
    greatest: torch.Tensor

    @classmethod
    def empty(cls, neurons: int, device: torch.device, cells: int = CELLS) -> Self:
        """State before the first value."""
        extremes = torch.full((2, neurons), torch.nan, device=device)
        return cls(
            torch.full((neurons,), _NO_LEVEL, dtype=torch.int32, device=device),
            torch.zeros(neurons, dtype=torch.int64, device=device),
            torch.full((neurons, cells), _NO_LOW, dtype=torch.int64, device=device),
            torch.full((neurons, cells), _NO_HIGH, dtype=torch.int64, device=device),
            extremes[0],
            extremes[1],
        )

    @classmethod
    def from_host(cls, cells: GapCells, device: torch.device) -> Self:
        """The same cells on a device."""
        found = cls(
            *(upload(array, device) for array in (cells.level, cells.base, cells.low, cells.high)),
            *torch.full((2, len(cells)), torch.nan, device=device),
        )
        found.least, found.greatest = found._gaps()[3:]
        return found

    def host(self) -> GapCells:
        """The same cells on the host; waits for them."""
        return GapCells(*(to_host(array) for array in (self.level, self.base, self.low, self.high)))

    def __len__(self) -> int:
        return len(self.level)

    def rows(self, rows: slice) -> Self:
        """The cells of some neurons, as a view."""
        return type(self)(*(array[rows] for array in self._arrays()))

    def _arrays(self) -> tuple[torch.Tensor, ...]:
        return self.level, self.base, self.low, self.high, self.least, self.greatest

    def fill(self, values: torch.Tensor, ids: torch.Tensor, least: torch.Tensor, greatest: torch.Tensor) -> None:
        """Takes in the first values; cells must be empty.

        Args:
            values: float32 [n, N], n at least 1.
            ids: int64 [n], number of each text, below 2^32.
            least, greatest: float32 [N], extremes of the values.
        """
        level, base = _grid(least, greatest, self.low.shape[1])
        self.level.copy_(level)
        self.base.copy_(base)
        self.least.copy_(least)
        self.greatest.copy_(greatest)
        cells = self.low.shape[1]
        if (kernels := _kernels_for(values)) and not cells & (cells - 1):
            kernels.fill_cells(values, ids, _scale(level), base, self.low, self.high)
            return
        step = max(1, _CHUNK // values.shape[1])
        for some, texts in zip(torch.split(values, step), torch.split(ids, step), strict=True):
            places = (_cell_of(some, level) - base).clamp(0, cells - 1).t()
            bits = (some + 0.0).view(torch.int32)  # -0 becomes +0
            keys = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) << 32).t()
            self.low.scatter_reduce_(1, places, keys | texts, "amin")
            self.high.scatter_reduce_(1, places, keys | (texts ^ 0xFFFFFFFF), "amax")

    def merge(self, other: Self) -> None:
        """Takes in the cells of other texts, which are left as they were."""
        least, greatest = self.least.fmin(other.least), self.greatest.fmax(other.greatest)
        merged = type(self).empty(len(self), self.low.device, self.low.shape[1])
        level, base = _grid(least, greatest, self.low.shape[1])
        merged.level.copy_(level)
        merged.base.copy_(base)
        for part in (self, other):
            part._move_to(merged)
        self.level, self.base, self.low, self.high = merged.level, merged.base, merged.low, merged.high
        self.least, self.greatest = least, greatest

    def _move_to(self, coarser: Self) -> None:
        cells = self.low.shape[1]
        shift = (coarser.level.to(torch.int64) - self.level).clamp(0, 63)
        if (kernels := _kernels_for(self.low)) and not cells & (cells - 1):
            kernels.move_cells(self.low, self.high, self.base, shift, coarser.base, coarser.low, coarser.high)
            return
        step = max(1, _CHUNK // cells)
        for at in range(0, len(self), step):
            here = slice(at, at + step)
            numbers = self.base[here, None] + torch.arange(cells, device=self.low.device)
            places = ((numbers >> shift[here, None]) - coarser.base[here, None]).clamp(0, cells - 1)
            # an empty cell holds what no minimum or maximum takes
            coarser.low[here].scatter_reduce_(1, places, self.low[here], "amin")
            coarser.high[here].scatter_reduce_(1, places, self.high[here], "amax")

    def copy(self) -> Self:
        """Cells of their own; `merge` makes new ones, so they need not be copied for that."""
        return type(self)(*self._arrays())

    def _gaps(self) -> tuple[torch.Tensor, ...]:
        cells = self.low.shape[1]
        if (kernels := _kernels_for(self.low)) and not cells & (cells - 1):
            found: tuple[torch.Tensor, ...] = kernels.gaps(self.low, self.high)
            return found
        step = max(1, _CHUNK // cells)
        parts = [
            _plain_gaps(low, high)
            for low, high in zip(torch.split(self.low, step), torch.split(self.high, step), strict=True)
        ]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def ask_gaps(self, fetch: Fetch) -> None:
        """Begins to fetch what `gaps_of` takes: 5 arrays."""
        fetch.ask(*self._gaps())

    def certified(self) -> torch.Tensor:
        """[N] whether the largest gap is known exactly."""
        low, high = self._gaps()[:2]
        return low == high


def gaps_of(parts: Sequence[NDArray[Any]]) -> Gaps:
    """The gaps that `DeviceCells.ask_gaps` asked for."""
    low, high, texts, least, greatest = parts
    return Gaps(low, high, texts, least, greatest)


def _value_of(keys: torch.Tensor) -> torch.Tensor:
    order = (keys >> 32).to(torch.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _plain_gaps(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, ...]:
    there = low != _NO_LOW
    before = torch.full_like(high, _NO_HIGH)
    # keys ascend with the cells, so the running maximum is that of the last cell that holds a value
    before[:, 1:] = high[:, :-1].cummax(1).values
    step = torch.where(there & (before != _NO_HIGH), _value_of(low) - _value_of(before), 0)
    gap = step.amax(1)
    at = (step == gap[:, None]).to(torch.int8).argmax(1)  # the first of equal ones
    most = torch.maximum(gap, torch.where(there, _value_of(high) - _value_of(low), 0).amax(1))
    first, last = low.amin(1), high.amax(1)
    lower = torch.where(gap > 0, ~before.gather(1, at[:, None])[:, 0], first) & 0xFFFFFFFF
    upper = torch.where(gap > 0, low.gather(1, at[:, None])[:, 0], first) & 0xFFFFFFFF
    texts = torch.stack([lower, upper, first & 0xFFFFFFFF, ~last & 0xFFFFFFFF], 1)
    some = there.any(1)
    floats = (torch.where(some, each, torch.nan) for each in (gap, most, _value_of(first), _value_of(last)))
    gap, most, least, greatest = floats
    return gap, most, torch.where(some[:, None], texts, -1), least, greatest


def gap_ends(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64 [N, 2]: the texts below and above the largest gap of float32 [n, N], n at least 2; ties as in the cells."""
    by_text = ids.argsort()
    some = values[by_text]
    ordered, order = some.sort(dim=0, stable=True)
    step = ordered.diff(dim=0)
    at = (step == step.amax(0)).to(torch.int8).argmax(0)  # the first
    picked = by_text[torch.stack([order.gather(0, (at + k)[None])[0] for k in (0, 1)], 1)]
    return ids[picked]


# ---- all of it


@dataclass
class ShardSums:
    """Sums of a shard on the host, float64 and float32 [N]: what a `DeviceSketch` adds without rounding.

    Attributes:
        texts: Number of texts.
        parts: `positive`, `negative`, `squares` and `group_gaps` of `Moments`.
        tokens: Number of tokens; 0 where they were not summed.
        token_parts: `sums`, `squares`, `least` and `greatest` of `TokenMoments`, or nothing.
    """

    texts: int
    parts: Sequence[NDArray[Any]]
    tokens: int = 0
    token_parts: Sequence[NDArray[Any]] = ()


def add_sums(moments: Moments, tokens: TokenMoments, some: Sequence[ShardSums], threads: int | None = None) -> None:
    """Adds the sums of shards to a state, as the doubles that they are."""
    for one in some:
        moments.count += one.texts
        moments.groups += one.texts // GROUP
        tokens.count += one.tokens
    into = moments.positive, moments.negative, moments.squares, moments.group_gaps
    for k, sums in enumerate(into if some else ()):
        add_exactly(sums, np.stack([one.parts[k] for one in some], axis=1), threads)
    some = [one for one in some if one.tokens]
    for k, sums in enumerate((tokens.sums, tokens.squares) if some else ()):
        add_exactly(sums, np.stack([one.token_parts[k] for one in some], axis=1), threads)
    for one in some:
        np.minimum(tokens.least, one.token_parts[2], out=tokens.least)
        np.maximum(tokens.greatest, one.token_parts[3], out=tokens.greatest)


_PENDING = 16  # shards' sums that wait to be added in one go


class DeviceSketch:
    """A `Sketch` whose cells lie on a device; its sums, 30 times smaller, are on the host.

    A shard's sums wait in a list, since adding them touches 400 bytes a neuron however few they are.
    """

    def __init__(self, cells: DeviceCells, sums: Sequence[ShardSums], added: Sketch | None = None) -> None:
        self.cells = cells
        self._pending = list(sums)
        self._added = added  # without cells

    @classmethod
    def from_host(cls, sketch: Sketch, device: torch.device) -> Self:
        """The same sketch on a device."""
        bare = Sketch(GapCells.empty(0), sketch.moments, sketch.tokens)
        return cls(DeviceCells.from_host(sketch.cells, device), [], bare)

    def host(self) -> Sketch:
        """The same sketch on the host; waits for it."""
        return Sketch(self.cells.host(), *self.sums())

    def sums(self, threads: int | None = None) -> tuple[Moments, TokenMoments]:
        """Moments at [CLS] and over tokens (no copy)."""
        if self._added is None:
            neurons = len(self.cells)
            self._added = Sketch(GapCells.empty(0), Moments.empty(neurons), TokenMoments.empty(neurons))
        if self._pending:
            add_sums(self._added.moments, self._added.tokens, self._pending, threads)
            self._pending = []
        return self._added.moments, self._added.tokens

    def __len__(self) -> int:
        return len(self.cells)

    def merge(self, other: DeviceSketch) -> None:
        """Takes in the sketch of other texts; `other` is left as it was."""
        self.cells.merge(other.cells)
        self._pending += other._pending
        if other._added is not None:
            moments, tokens = self.sums()
            moments.merge(other._added.moments)
            tokens.merge(other._added.tokens)
        if len(self._pending) >= _PENDING:
            self.sums()


def groups_of(n: int, device: torch.device, places: torch.Tensor | None = None) -> torch.Tensor:
    """int64 [n // 20, 20]: rows of the texts of each whole group, text i lying in row places[i] (default: i)."""
    texts = n // GROUP * GROUP
    rows = torch.arange(texts, device=device) if places is None else places[:texts]
    return rows.view(-1, GROUP)
