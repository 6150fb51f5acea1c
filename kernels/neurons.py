"""What scoring keeps of neurons, each kernel in one pass over the numbers where they lie.

Values are text-major, [n, N] with a stride between texts: a hook writes a batch's rows as they come, and neighbouring
threads read neighbouring neurons. Nothing is transposed, and nothing is as large as the values but the values.

* `column_sums_kernel`: sums of the positive and of the negative values and of squares, extremes, first bad text.
* `bags_kernel`: sum over groups of `SIZE` texts of each group's r_f, by "the next larger one of each value".
* `cells_kernel`, `move_cells_kernel`, `gaps_kernel`: the cells of `obce.sketch.GapCells` filled, put on another grid
  and read; bit for bit what obce/sketch.py states as plain code, since a cell is a function of the set of its values.
* `tokens_kernel`: sums, squares and extremes of activations [b, T, width] over real tokens.
* `rows_kernel`: the first token of each text, as float32, into a buffer.

Every sum is taken in an order that the shapes alone decide (no floating atomics), so equal calls give equal bits. The
atomics of the cells are minima and maxima of integers, which no order changes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SPLITS = 32  # parts of a batch's tokens that are summed side by side
NO_LOW, NO_HIGH = 2**63 - 1, -(2**63)

_NO_LOW, _NO_HIGH = tl.constexpr(NO_LOW), tl.constexpr(NO_HIGH)


@triton.jit
def column_sums_kernel(
    p_values,
    s_text,
    n,
    N,
    p_positive,
    p_negative,
    p_squares,
    p_least,
    p_greatest,
    p_bad,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """Sums in float64, of exact float64 terms; a value that is not finite shows in `squares` and, by text, in `bad`."""
    i_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = i_n < N
    # [BT, BN]
    positive = tl.zeros((BT, BN), tl.float64)
    negative = tl.zeros((BT, BN), tl.float64)
    squares = tl.zeros((BT, BN), tl.float64)
    least = tl.full((BT, BN), float("inf"), tl.float32)
    greatest = tl.full((BT, BN), float("-inf"), tl.float32)
    bad = tl.full((BT, BN), 2147483647, tl.int32)
    first = 0
    while first < n:
        i_t = first + tl.arange(0, BT)
        m = (i_t < n)[:, None] & m_n[None, :]
        x = tl.load(p_values + i_t.to(tl.int64)[:, None] * s_text + i_n[None, :], mask=m, other=0.0)
        wide = x.to(tl.float64)
        positive += tl.where(wide > 0, wide, 0.0)
        negative += tl.where(wide < 0, -wide, 0.0)
        squares += wide * wide
        least = tl.where(m & (x < least), x, least)
        greatest = tl.where(m & (x > greatest), x, greatest)
        finite = tl.abs(x) < float("inf")
        bad = tl.minimum(bad, tl.where(finite, 2147483647, i_t[:, None]))
        first += BT
    tl.store(p_positive + i_n, tl.sum(positive, 0), mask=m_n)
    tl.store(p_negative + i_n, tl.sum(negative, 0), mask=m_n)
    tl.store(p_squares + i_n, tl.sum(squares, 0), mask=m_n)
    tl.store(p_least + i_n, tl.min(least, 0), mask=m_n)
    tl.store(p_greatest + i_n, tl.max(greatest, 0), mask=m_n)
    tl.store(p_bad + i_n, tl.min(bad, 0), mask=m_n)


@triton.jit
def bags_kernel(p_values, s_text, N, p_rows, bags, p_sum, SIZE: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr):
    """rows [bags, SIZE] int64 -> sum [N] float64. A group's r_f is the largest of (next larger value - value)."""
    i_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = i_n < N
    i_s = tl.arange(0, BS)
    m_s = i_s < SIZE
    total = tl.zeros((BN,), tl.float64)
    bag = 0
    while bag < bags:
        rows = tl.load(p_rows + i_s, mask=m_s, other=0)
        # [BS, BN]
        m = m_s[:, None] & m_n[None, :]
        x = tl.load(p_values + rows[:, None] * s_text + i_n[None, :], mask=m, other=float("inf"))
        above = tl.full((BS, BN), float("inf"), tl.float32)
        for j in range(SIZE):
            row = tl.load(p_rows + j)
            y = tl.load(p_values + row * s_text + i_n, mask=m_n, other=float("inf"))
            above = tl.where((y[None, :] > x) & (y[None, :] < above), y[None, :], above)
        gap = tl.where(above < float("inf"), above - x, 0.0)
        total += tl.max(gap, 0).to(tl.float64)
        p_rows += SIZE
        bag += 1
    tl.store(p_sum + i_n, total, mask=m_n)


@triton.jit
def cells_kernel(
    p_values,
    s_text,
    n,
    N,
    p_ids,
    p_scale,
    p_base,
    p_low,
    p_high,
    CELLS: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """Puts values into cells [N, CELLS]: (value, text) packed into an integer that orders as they do.

    Few neurons and many texts a program, and many threads: the cells of all programs that run at a time fit the L2.
    """
    i_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = i_n < N
    scale = tl.load(p_scale + i_n, mask=m_n, other=0.0)
    base = tl.load(p_base + i_n, mask=m_n, other=0)
    o_row = i_n.to(tl.int64) * CELLS
    first = 0
    while first < n:
        i_t = first + tl.arange(0, BT)
        m_t = i_t < n
        m = m_t[:, None] & m_n[None, :]
        x = tl.load(p_values + i_t.to(tl.int64)[:, None] * s_text + i_n[None, :], mask=m, other=0.0)
        x = tl.where(x == 0, 0.0, x)  # -0 becomes +0
        place = tl.floor(x.to(tl.float64) * scale[None, :]).to(tl.int64) - base[None, :]
        place = tl.minimum(tl.maximum(place, 0), CELLS - 1)  # what is not finite is refused later
        bits = x.to(tl.int32, bitcast=True)
        key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32
        ids = tl.load(p_ids + i_t, mask=m_t, other=0)
        at = o_row[None, :] + place
        tl.atomic_min(p_low + at, key | ids[:, None], mask=m, sem="relaxed")
        tl.atomic_max(p_high + at, key | (ids ^ 0xFFFFFFFF)[:, None], mask=m, sem="relaxed")
        first += BT


@triton.jit
def move_cells_kernel(p_low, p_high, p_base, p_shift, p_new_base, p_to_low, p_to_high, CELLS: tl.constexpr):
    """One neuron's cells into those of a grid 2^shift as coarse, where they meet what is there."""
    i_n = tl.program_id(0).to(tl.int64)
    i_c = tl.arange(0, CELLS)
    o = i_n * CELLS
    low = tl.load(p_low + o + i_c)
    high = tl.load(p_high + o + i_c)
    there = low != _NO_LOW
    place = ((tl.load(p_base + i_n) + i_c) >> tl.load(p_shift + i_n)) - tl.load(p_new_base + i_n)
    place = tl.minimum(tl.maximum(place, 0), CELLS - 1)
    tl.atomic_min(p_to_low + o + place, low, mask=there, sem="relaxed")
    tl.atomic_max(p_to_high + o + place, high, mask=there, sem="relaxed")


@triton.jit
def _value_of(key):
    order = (key >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def gaps_kernel(p_low, p_high, p_gap, p_most, p_texts, p_least, p_greatest, CELLS: tl.constexpr):
    """One neuron: its largest gap between cells, the most a gap can be, texts [4], extremes: see `obce.sketch.Gaps`."""
    i_n = tl.program_id(0).to(tl.int64)
    i_c = tl.arange(0, CELLS)
    o = i_n * CELLS
    low = tl.load(p_low + o + i_c)
    high = tl.load(p_high + o + i_c)
    there = low != _NO_LOW
    # greatest value of the cells before: keys ascend with the cells, so the running maximum is the last one there
    before = tl.load(p_high + o + i_c - 1, mask=i_c > 0, other=_NO_HIGH)
    before = tl.associative_scan(before, 0, _later)
    step = tl.where(there & (before != _NO_HIGH), _value_of(low) - _value_of(before), 0.0)
    gap = tl.max(step, 0)
    most = tl.maximum(gap, tl.max(tl.where(there, _value_of(high) - _value_of(low), 0.0), 0))
    at = tl.min(tl.where(step == gap, i_c, CELLS), 0)
    first = tl.min(low, 0)
    last = tl.max(high, 0)
    lower = tl.max(tl.where(i_c == at, before, _NO_HIGH), 0) ^ 0xFFFFFFFF
    upper = tl.max(tl.where(i_c == at, low, _NO_HIGH), 0)
    lower = tl.where(gap > 0, lower, first) & 0xFFFFFFFF
    upper = tl.where(gap > 0, upper, first) & 0xFFFFFFFF
    some = first != _NO_LOW
    nan = float("nan")
    tl.store(p_gap + i_n, tl.where(some, gap, nan))
    tl.store(p_most + i_n, tl.where(some, most, nan))
    tl.store(p_least + i_n, tl.where(some, _value_of(first), nan))
    tl.store(p_greatest + i_n, tl.where(some, _value_of(last), nan))
    tl.store(p_texts + 4 * i_n, tl.where(some, lower, -1))
    tl.store(p_texts + 4 * i_n + 1, tl.where(some, upper, -1))
    tl.store(p_texts + 4 * i_n + 2, tl.where(some, first & 0xFFFFFFFF, -1))
    tl.store(p_texts + 4 * i_n + 3, tl.where(some, (last ^ 0xFFFFFFFF) & 0xFFFFFFFF, -1))


@triton.jit
def tokens_kernel(
    p_tokens,
    s_text,
    s_token,
    p_lengths,
    rows,
    T,
    width,
    each,
    p_sums,
    p_squares,
    p_least,
    p_greatest,
    s_slot,
    BT: tl.constexpr,
    BN: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Rows [split * each, (split + 1) * each) of [rows = b * T, width] into slot `split` of sums [SPLITS, N].

    A thread adds up at most each / BT numbers in float32, as differences from a pivot (the mean of the program's first
    rows), so rounding is relative to how far values lie from there, not to their mean: at most each / BT * 2^-24 of the
    sum of |x - pivot| and of (x - pivot)^2. The rest is float64.
    """
    i_w = tl.program_id(0) * BN + tl.arange(0, BN)
    i_split = tl.program_id(1)
    m_w = i_w < width
    start = i_split * each
    end = tl.minimum(start + each, rows)
    sums = tl.zeros((BT, BN), tl.float32)
    squares = tl.zeros((BT, BN), tl.float32)
    least = tl.full((BT, BN), float("inf"), tl.float32)
    greatest = tl.full((BT, BN), float("-inf"), tl.float32)
    counts = tl.zeros((BT,), tl.int32)
    # where `start` is in padding, the first rows of its text: every text has a token
    i_text = tl.minimum(start, rows - 1) // T
    i_r = tl.where(start - i_text * T < tl.load(p_lengths + i_text), start, i_text * T) + tl.arange(0, BT)
    i_text = i_r // T
    real = i_r < rows
    real = real & (i_r - i_text * T < tl.load(p_lengths + i_text, mask=real, other=0))
    at = i_text.to(tl.int64) * s_text + (i_r - i_text * T).to(tl.int64) * s_token
    x = tl.load(p_tokens + at[:, None] + i_w[None, :], mask=real[:, None] & m_w[None, :], other=0.0).to(tl.float32)
    pivot = tl.sum(x, 0) / tl.maximum(tl.sum(real.to(tl.int32), 0), 1).to(tl.float32)
    # several at a time, so that loads are under way while others are added up
    first = start
    while first < end:
        for _ in tl.static_range(UNROLL):
            i_r = first + tl.arange(0, BT)
            i_text = i_r // T
            i_token = i_r - i_text * T
            real = i_r < end
            real = real & (i_token < tl.load(p_lengths + i_text, mask=real, other=0))
            m = real[:, None] & m_w[None, :]
            at = i_text.to(tl.int64) * s_text + i_token.to(tl.int64) * s_token
            x = tl.load(p_tokens + at[:, None] + i_w[None, :], mask=m, other=0.0).to(tl.float32)
            away = tl.where(m, x - pivot[None, :], 0.0)
            counts += real.to(tl.int32)
            sums += away
            squares += away * away
            least = tl.where(m & (x < least), x, least)
            greatest = tl.where(m & (x > greatest), x, greatest)
            first += BT
    count = tl.sum(counts, 0)
    o = i_split.to(tl.int64) * s_slot + i_w
    wide = pivot.to(tl.float64)
    total = tl.sum(sums.to(tl.float64), 0)
    square = tl.sum(squares.to(tl.float64), 0) + 2 * wide * total + count * wide * wide
    tl.store(p_sums + o, tl.load(p_sums + o, mask=m_w, other=0.0) + total + count * wide, mask=m_w)
    tl.store(p_squares + o, tl.load(p_squares + o, mask=m_w, other=0.0) + square, mask=m_w)
    tl.store(p_least + o, tl.minimum(tl.load(p_least + o, mask=m_w, other=0.0), tl.min(least, 0)), mask=m_w)
    tl.store(p_greatest + o, tl.maximum(tl.load(p_greatest + o, mask=m_w, other=0.0), tl.max(greatest, 0)), mask=m_w)


@triton.jit
def rows_kernel(p_tokens, s_row, s_start, p_starts, N, p_out, s_out, BN: tl.constexpr, PACKED: tl.constexpr):
    """Row i of out [b, N] is the i-th text's first token as float32: at starts[i] of a pack, or i texts further."""
    i_b = tl.program_id(0).to(tl.int64)
    i_n = tl.program_id(1) * BN + tl.arange(0, BN)
    m_n = i_n < N
    at = tl.load(p_starts + i_b) * s_row if PACKED else i_b * s_start
    x = tl.load(p_tokens + at + i_n, mask=m_n, other=0.0)
    tl.store(p_out + i_b * s_out + i_n, x.to(tl.float32), mask=m_n)


def take_rows(tokens: torch.Tensor, starts: torch.Tensor | None, out: torch.Tensor) -> None:
    """The first token of each text of [b, T, N], or of a pack [1, T, N] with texts at `starts` (int64), to [b, N]."""
    b, N = out.shape
    BN = 1024
    with torch.cuda.device_of(tokens):
        rows_kernel[(b, triton.cdiv(N, BN))](
            tokens,
            tokens.stride(1),
            tokens.stride(0),
            starts,
            N,
            out,
            out.stride(0),
            BN=BN,
            PACKED=starts is not None,
        )


def column_sums(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """positive, negative, squares (float64), least, greatest (float32), first bad text (int32) of [n, N] float32."""
    n, N = values.shape
    sums = torch.empty((3, N), dtype=torch.float64, device=values.device)
    ends = torch.empty((2, N), dtype=torch.float32, device=values.device)
    bad = torch.empty(N, dtype=torch.int32, device=values.device)
    BN = 32
    with torch.cuda.device_of(values):
        column_sums_kernel[(triton.cdiv(N, BN),)](
            values, values.stride(0), n, N, sums[0], sums[1], sums[2], ends[0], ends[1], bad, BT=32, BN=BN
        )
    return sums[0], sums[1], sums[2], ends[0], ends[1], bad


def bags(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """float64 [N]: sum over bags of r_f of values[bag]; values float32 [n, N], rows int64 [bags, size], size >= 2."""
    N, (count, size) = values.shape[1], rows.shape
    total = torch.empty(N, dtype=torch.float64, device=values.device)
    BN = 64
    BS = triton.next_power_of_2(size)
    with torch.cuda.device_of(values):
        bags_kernel[(triton.cdiv(N, BN),)](values, values.stride(0), N, rows, count, total, SIZE=size, BS=BS, BN=BN)
    return total


def fill_cells(
    values: torch.Tensor,
    ids: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
) -> None:
    """Puts float32 [n, N] with the texts' numbers int64 [n] into low, high [N, cells]; cells are 1 / scale wide."""
    n, N = values.shape
    BN = 16
    cells = low.shape[1]
    with torch.cuda.device_of(values):
        cells_kernel[(triton.cdiv(N, BN),)](
            values, values.stride(0), n, N, ids, scale, base, low, high, CELLS=cells, BT=64, BN=BN, num_warps=8
        )


def move_cells(
    low: torch.Tensor,
    high: torch.Tensor,
    base: torch.Tensor,
    shift: torch.Tensor,
    new_base: torch.Tensor,
    to_low: torch.Tensor,
    to_high: torch.Tensor,
) -> None:
    """Cells [N, cells] into those of grids 2^shift as coarse; all int64."""
    N, cells = low.shape
    with torch.cuda.device_of(low):
        move_cells_kernel[(N,)](low, high, base, shift, new_base, to_low, to_high, CELLS=cells, num_warps=2)


def gaps(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """gap, most (float32 [N]), texts (int64 [N, 4]), least, greatest (float32 [N]) of cells [N, cells]."""
    N, cells = low.shape
    found = torch.empty((4, N), dtype=torch.float32, device=low.device)
    texts = torch.empty((N, 4), dtype=torch.int64, device=low.device)
    with torch.cuda.device_of(low):
        gaps_kernel[(N,)](low, high, found[0], found[1], texts, found[2], found[3], CELLS=cells, num_warps=2)
    return found[0], found[1], texts, found[2], found[3]


def add_tokens(tokens: torch.Tensor, lengths: torch.Tensor, slots: tuple[torch.Tensor, ...]) -> None:
    """Adds the first lengths[b] (int32) tokens of texts [b, T, width] to slots: sums, squares, least, greatest."""
    b, T, width = tokens.shape
    BT, BN = 16, 128
    each = triton.cdiv(triton.cdiv(b * T, SPLITS), BT) * BT
    with torch.cuda.device_of(tokens):
        tokens_kernel[(triton.cdiv(width, BN), SPLITS)](
            tokens,
            tokens.stride(0),
            tokens.stride(1),
            lengths,
            b * T,
            T,
            width,
            each,
            *slots,
            slots[0].stride(0),
            BT=BT,
            BN=BN,
            UNROLL=4,
            num_warps=8,
        )
