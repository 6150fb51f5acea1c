"""Fused squared distances and nearest foreign neighbour, and the weights of listed pairs.

For each point i of a cloud: min over j with component[j] != component[i] of (w(i, j), j), where

    w(i, j) = fma chain over k = 0..d-1 of (x_ik - x_jk)^2        d >= 2
    w(i, j) = |x_i - x_j|                                         d = 1

which are the weights of obce/reference.py, bit for bit: `tl.fma` rounds once, and coordinates are taken in order.
Among equal weights the smallest j is the least edge {i, j} in the order (weight, smaller end, larger end), see
csrc/ph0_core.h. This is one round of Boruvka (ArborX, Prokopenko et al., ICPP 2022, does it on a tree).

Shapes: X [B, n, d] contiguous, float32 or float64; component [B, n] int32; rows [M] int64, cloud * n + point,
ascending. A tile is up to BM successive entries of rows in one cloud (`RowTiles`); the columns of a cloud are cut into
`splits` equal parts so that few rows fill a device too: weight [splits, M] as X, index [splits, M] int32.
A row without a foreign point, and a row at or beyond its cloud's length, gets weight +inf and index n.
Memory: no n x n array; a program keeps BM x BN weights in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

PROGRAMS = 1024  # about as many as fill a large device; columns are split until there are so many


@triton.jit(do_not_specialize=["n", "width", "n_rows"])
def nearest_foreign_kernel(
    p_x,
    p_component,
    p_lengths,
    p_rows,
    p_tile_cloud,
    p_tile_first,
    p_tile_end,
    p_weight,
    p_index,
    n,
    d,
    width,
    n_rows,
    ONE_COORDINATE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One tile of rows against columns [split * width, (split + 1) * width); shapes in the module docstring."""
    i_tile = tl.program_id(0)
    i_split = tl.program_id(1)
    i_cloud = tl.load(p_tile_cloud + i_tile)
    length = tl.load(p_lengths + i_cloud)
    p_x += i_cloud * n * d
    p_component += i_cloud * n
    i_slot = tl.load(p_tile_first + i_tile) + tl.arange(0, BM)
    m_slot = i_slot < tl.load(p_tile_end + i_tile)
    i_row = (tl.load(p_rows + i_slot, mask=m_slot, other=0) - i_cloud * n).to(tl.int32)
    o_row = i_row.to(tl.int64) * d
    m_row = m_slot & (i_row < length)
    own = tl.load(p_component + i_row, mask=m_row, other=-1)
    # [BM]
    best = tl.full((BM,), float("inf"), p_x.dtype.element_ty)
    nearest = tl.zeros((BM,), tl.int32) + n
    i_start = i_split * width
    end = tl.minimum(i_start + width, length)
    while i_start < end:
        i_col = i_start + tl.arange(0, BN)
        o_col = i_col.to(tl.int64) * d
        m_col = i_col < end
        component = tl.load(p_component + i_col, mask=m_col, other=-1)
        # [BM, BN]
        w = tl.zeros((BM, BN), p_x.dtype.element_ty)
        if ONE_COORDINATE:
            x_row = tl.load(p_x + o_row, mask=m_row, other=0.0)
            x_col = tl.load(p_x + o_col, mask=m_col, other=0.0)
            w = tl.abs(x_row[:, None] - x_col[None, :])
        else:
            k = 0
            while k < d:
                x_row = tl.load(p_x + o_row + k, mask=m_row, other=0.0)
                x_col = tl.load(p_x + o_col + k, mask=m_col, other=0.0)
                diff = x_row[:, None] - x_col[None, :]
                w = tl.fma(diff, diff, w)
                k += 1
        foreign = (own[:, None] != component[None, :]) & m_col[None, :] & m_row[:, None]
        w = tl.where(foreign, w, float("inf"))
        low = tl.min(w, axis=1)
        # The smallest column of the least weight; a foreign weight may itself be +inf (d = 1, huge values).
        column = tl.where(foreign & (w == low[:, None]), i_col[None, :], n)
        at = tl.min(column, axis=1)
        # Columns ascend from block to block: an equal weight further on is a larger index and changes nothing.
        better = (low < best) | ((low == best) & (at < nearest))
        best = tl.where(better, low, best)
        nearest = tl.where(better, at, nearest)
        i_start += BN
    o_out = i_split.to(tl.int64) * n_rows + i_slot
    tl.store(p_weight + o_out, best, mask=m_slot)
    tl.store(p_index + o_out, nearest, mask=m_slot)


@triton.jit
def _halves(x, V: tl.constexpr):
    """The two halves, [P, V // 2] each or [P] each where V is 2, of x [P, V]."""
    if V == 2:
        low, high = tl.split(x)
    else:
        low, high = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, V // 2)), (0, 2, 1)))
    return low, high


@triton.jit
def _fma2(a, b, w):
    """w + the squares of a - b [P, 2], the first coordinate first."""
    a0, a1 = _halves(a, 2)
    b0, b1 = _halves(b, 2)
    diff = a0 - b0
    w = tl.fma(diff, diff, w)
    diff = a1 - b1
    return tl.fma(diff, diff, w)


@triton.jit
def _fma4(a, b, w):
    """As _fma2 for [P, 4]."""
    a0, a1 = _halves(a, 4)
    b0, b1 = _halves(b, 4)
    return _fma2(a1, b1, _fma2(a0, b0, w))


@triton.jit
def _fma8(a, b, w):
    """As _fma2 for [P, 8]."""
    a0, a1 = _halves(a, 8)
    b0, b1 = _halves(b, 8)
    return _fma4(a1, b1, _fma4(a0, b0, w))


@triton.jit
def chain(p_a, p_b, m_pair, d, P: tl.constexpr):
    """[P] weights of the pairs of rows at p_a and p_b; eight coordinates of a row are loaded at once."""
    w = tl.zeros((P,), p_a.dtype.element_ty)
    i_k = tl.arange(0, 8)[None, :]
    for k in range(0, d - 7, 8):
        o_k = k + i_k
        a = tl.load(p_a[:, None] + o_k, mask=m_pair[:, None], other=0.0)
        b = tl.load(p_b[:, None] + o_k, mask=m_pair[:, None], other=0.0)
        w = _fma8(a, b, w)
    k = d // 8 * 8
    while k < d:
        diff = tl.load(p_a + k, mask=m_pair, other=0.0) - tl.load(p_b + k, mask=m_pair, other=0.0)
        w = tl.fma(diff, diff, w)
        k += 1
    return w


@triton.jit(do_not_specialize=["n_pairs"])
def pair_weights_kernel(p_x, p_row, p_column, p_weight, n_pairs, d, BP: tl.constexpr):
    """weight[pair] = w(row, column), d >= 2; row and column [n_pairs] int64 are points of the flat X [B n, d]."""
    i_pair = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    m_pair = i_pair < n_pairs
    p_a = p_x + tl.load(p_row + i_pair, mask=m_pair, other=0) * d
    p_b = p_x + tl.load(p_column + i_pair, mask=m_pair, other=0) * d
    tl.store(p_weight + i_pair, chain(p_a, p_b, m_pair, d, BP), mask=m_pair)


@dataclass(frozen=True)
class RowTiles:
    """Tiles of a list of rows; none reaches over the end of a cloud.

    Attributes:
        cloud: [T] int64, the cloud of each tile.
        first: [T] int64, its first entry of the list.
        end: [T] int64, the end of its cloud's part of the list: a tile ends there or after BM entries.
    """

    cloud: torch.Tensor
    first: torch.Tensor
    end: torch.Tensor

    def splits(self, blocks: int) -> int:
        """Parts into which `blocks` column blocks are cut so that tiles times parts fill a device, at most 32."""
        return parts(len(self.cloud), blocks)


def parts(tiles: int, blocks: int) -> int:
    """As RowTiles.splits, of that many tiles."""
    return max(1, min(PROGRAMS // max(1, tiles), blocks, 32))


def row_tiles(rows: torch.Tensor, B: int, n: int, BM: int) -> RowTiles:
    """Tiles of BM rows.

    Args:
        rows: [M] int64, cloud * n + point, clouds ascending.
        B: number of clouds.
        n: points a cloud.
        BM: rows a tile.

    Returns:
        The tiles, clouds ascending.
    """
    if B == 1:  # nothing to count, and no wait for the device
        first = torch.arange(0, len(rows), BM, device=rows.device)
        return RowTiles(torch.zeros_like(first), first, torch.full_like(first, len(rows)))
    count = torch.bincount(torch.div(rows, n, rounding_mode="floor"), minlength=B)
    tiles = (count + (BM - 1)) // BM
    cloud = torch.repeat_interleave(torch.arange(B, device=rows.device), tiles)
    end = torch.cumsum(count, 0)
    before = torch.cumsum(tiles, 0) - tiles
    inside = torch.arange(len(cloud), device=rows.device) - before[cloud]
    return RowTiles(cloud, (end - count)[cloud] + inside * BM, end[cloud])


def direct_warps(itemsize: int) -> int:
    """Warps of a program of nearest_foreign_kernel: float64 weights of 64 x 64 pairs fill the registers of four."""
    return 8 if itemsize == 8 else 4


def nearest_foreign(
    x: torch.Tensor, component: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest point of another component for every point of every cloud, or for listed points.

    Args:
        x: [B, n, d] contiguous, float32 or float64, already scaled (obce.reference.scaled).
        component: [B, n] int32 labels; equal label, same component.
        lengths: [B] int32 points of each cloud.
        rows: [M] int64 points cloud * n + point, clouds ascending; None for all.

    Returns:
        (weight in the dtype of x, index int32), [B, n] or [M]; (+inf, n) where there is no foreign point.
    """
    B, n, d = x.shape
    shape = (B, n) if rows is None else rows.shape
    rows = torch.arange(B * n, device=x.device) if rows is None else rows
    M = len(rows)
    if M == 0:
        return x.new_empty(shape), torch.empty(shape, dtype=torch.int32, device=x.device)
    BM = BN = 64
    tiles = row_tiles(rows, B, n, BM)
    blocks = triton.cdiv(n, BN)
    width = triton.cdiv(blocks, tiles.splits(blocks)) * BN
    splits = triton.cdiv(n, width)
    weight = torch.empty((splits, M), dtype=x.dtype, device=x.device)
    index = torch.empty((splits, M), dtype=torch.int32, device=x.device)
    nearest_foreign_kernel[(len(tiles.cloud), splits)](
        x,
        component,
        lengths,
        rows,
        tiles.cloud,
        tiles.first,
        tiles.end,
        weight,
        index,
        n,
        d,
        width,
        M,
        ONE_COORDINATE=d == 1,
        BM=BM,
        BN=BN,
        num_warps=direct_warps(x.element_size()),
    )
    low = weight.amin(0)
    at = torch.where(weight == low, index, n).amin(0)
    return low.view(shape), at.view(shape)


def pair_weights(x: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Weights of listed pairs.

    Args:
        x: [B, n, d] contiguous, float32 or float64, already scaled; d >= 2.
        row: [P] int64 points cloud * n + point, one end of each pair.
        column: [P] int64, the other.

    Returns:
        [P] in the dtype of x.
    """
    weight = torch.empty(len(row), dtype=x.dtype, device=x.device)
    if len(row):
        BP = 128
        pair_weights_kernel[(triton.cdiv(len(row), BP),)](
            x, row, column, weight, len(row), x.shape[2], BP=BP, num_warps=4
        )
    return weight
