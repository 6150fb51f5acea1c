"""Nearest foreign neighbours of clouds with many coordinates: tensor cores rule out, fma chains decide.

A matrix product of rounded copies gives every distance of a cloud up to a proven error, in a small part of the
instructions that differences take. It only names candidates; their weights are the chains of pairwise.py, so edges
are those of every other backend, bit for bit. Two passes, each fused with its product; no n x n array:

    nearest_bounds   a row's likely nearest foreign point, and a lower bound on the distance to every other one
    list_within      the pairs (row, point) whose lower bound does not exceed a reach, appended to a bounded list

Per cloud, x_i being its scaled points: c any fixed point (near the middle), 2^e the spread, y_i = (x_i - c) 2^-e, so
that |y_ik| <= 1 up to rounding. The pass sees h_i, y_i rounded to an operand format: float16, or float32 with 10 bits
kept (tf32). D_ij = |y_i - y_j|, H_ij = |h_i - h_j|, n_i = |h_i|^2.

Proof that no neighbour is lost.

(1) Copies. r_i >= |y_i - h_i| + 2^-50 is computed from both, in float64, and rounded up: whatever the format did is
    in r_i. The rounding of x - c is relative 2^-53 a coordinate and in r_i too. So |D_ij - H_ij| <= r_i + r_j, with
    2^-49 to spare.
(2) Product. h is exactly representable, so the device multiplies exact values. Tensor cores add with truncation, in
    an order and with alignment that are not documented (Fasi, Higham, Mikaitis, Pranesh, Numerical behavior of NVIDIA
    tensor cores, 2021: products exact, subnormal operands kept, terms cut at the last place of the largest term).
    Let products be added in any order, in steps of four or more, and each product, the sum so far and the result of a
    step be cut at 2^-23 of the largest magnitude met: off by less than 2 (d + 4) 2^-23 S, S = sum |h_ik h_jk|.
    This is the one assumption about the device, made four times wider, which allows two bits less:
    |p_ij - h_i.h_j| <= (d + 4) 2^-20 S, and S <= |h_i| |h_j| <= (n_i + n_j) / 2. `product_error` measures it.
(3) s_ij = n_j - 2 p_ij, |s_ij| <= 2.1 (n_i + n_j). Norms rounded to float32, the difference, and the sums with n_i and
    the error itself lose less than 2^-20 (n_i + n_j) together. nearest_bounds puts the column into the 6 low bits of
    s_ij, a change below 2^-17 |s_ij| < 2^-15.9 (n_i + n_j). With gamma = (d + 4) 2^-20 + 2^-15 therefore
    |s_ij + n_i - H_ij^2| <= gamma (n_i + n_j). Of each column block the largest n_j and r_j are used; points are
    sorted by norm so that this costs little and an outlier spoils one block.
(4) Lower bound: D_ij >= sqrt(s_ij + n_i - gamma (n_i + n_j)) - r_i - r_j, the root taken times 1 - 2^-18 for the
    approximate square root and the subtraction. Reach: D_ij <= R implies H_ij <= t := R + r_i + r_j, hence
    s_ij <= t^2 (1 + 2^-20) - n_i + gamma (n_i + n_j).
    Results and operands below 2^-126 may be flushed: absolute errors of at most d 2^-125 in squares, d < 2^20.
    Since |sqrt(q + a) - sqrt(q)| <= sqrt(a), the 2^-49 spared in (1) cover them.
(5) Weights. w_ij is a chain of d fma on rounded differences, u = 2^-24 (float32) or 2^-53: subtraction is exact up to
    one factor 1 + u even when tiny, a result below the normal range is off by half the least subnormal t. With
    Z_ij = D_ij 2^e, Z^2 (1 - (d + 2) u) - d t <= w <= Z^2 (1 + (d + 3) u) + d t for d u < 2^-4. The conversions below
    use (d + 8) in place of d + 2 and d: six spare u for their own float64 and final roundings.
    Nothing overflows: |y| <= 1 makes squares at most 4 d, and scaled weights fit their type.

Hence a point whose weight is at most that of a known foreign point is never ruled out. A bound can only be loose:
a cloud of tight clusters lists its clusters, equal points list each other.

Axes: B clouds, n points, d coordinates, padded with zeros to DP.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from obce.kernels.pairwise import RowTiles, nearest_foreign, pair_weights, row_tiles
from obce.kernels.scaling import times_power

BM, BN = 128, 64  # rows of a tile, columns of a block: a column of it is a number of 6 bits
FAR = 1e30  # in the place of s_ij where j is not foreign, and as a bound that rules nothing in
MAX_COORDINATES = 1 << 16  # (d + 8) u and (d + 4) 2^-20 are small up to here
CAPACITY = 1 << 22  # pairs of a list at least
_SAMPLE = 65
_log = logging.getLogger("obce")
_CHUNK = 1 << 24  # coordinates prepared at a time


@triton.jit
def _product(
    p_hat, x_row, o_row, m_row, i_col, m_col, DP: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """[BM, BN] inner products; x_row is the whole row tile where DP == BK."""
    o_col = i_col.to(tl.int64) * DP
    product = tl.zeros((BM, BN), tl.float32)
    for k_start in range(0, DP, BK):
        o_k = k_start + tl.arange(0, BK)
        # [BN, BK], [BM, BK]
        x_col = tl.load(p_hat + o_col[:, None] + o_k[None, :], mask=m_col[:, None], other=0.0)
        x = x_row if DP == BK else tl.load(p_hat + o_row[:, None] + o_k[None, :], mask=m_row[:, None], other=0.0)
        product = tl.dot(x, tl.trans(x_col), product, input_precision="tf32")
    return product


@triton.jit
def nearest_bounds_kernel(
    p_hat,
    p_norm,
    p_residual,
    p_block_norm,
    p_block_residual,
    p_component,
    p_lengths,
    p_rows,
    p_tile_cloud,
    p_tile_first,
    p_tile_end,
    p_best,
    p_column,
    p_low,
    p_other,
    n,
    n_rows,
    n_blocks,
    gamma,
    DP: tl.constexpr,
    BK: tl.constexpr,
    NB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    FAR: tl.constexpr,
):
    """One tile of rows against NB column blocks, positions being sorted points.

    Per split and row [splits, n_rows]: best, the least s (packed); column, its position; low, the lower bound of the
    distance to it; other, a lower bound of the distances to all other foreign columns of the split.
    """
    i_tile = tl.program_id(0)
    i_split = tl.program_id(1)
    i_cloud = tl.load(p_tile_cloud + i_tile)
    length = tl.load(p_lengths + i_cloud)
    base = i_cloud * n
    p_hat += base * DP
    p_norm += base
    p_residual += base
    p_component += base
    p_block_norm += i_cloud * n_blocks
    p_block_residual += i_cloud * n_blocks
    i_slot = tl.load(p_tile_first + i_tile) + tl.arange(0, BM)
    m_row = i_slot < tl.load(p_tile_end + i_tile)
    i_row = tl.load(p_rows + i_slot, mask=m_row, other=0) - base
    i_row = tl.where(m_row, i_row, 0)
    o_row = i_row * DP
    own = tl.load(p_component + i_row)
    norm = tl.load(p_norm + i_row)
    residual = tl.load(p_residual + i_row)
    x_row = tl.zeros((BM, BK), p_hat.dtype.element_ty)
    if DP == BK:
        x_row = tl.load(p_hat + o_row[:, None] + tl.arange(0, BK)[None, :], mask=m_row[:, None], other=0.0)
    i_lane = tl.arange(0, BN)
    # [BM]
    best = tl.full((BM,), FAR, tl.float32)
    low = tl.full((BM,), FAR, tl.float32)
    other = tl.full((BM,), FAR, tl.float32)
    column = tl.zeros((BM,), tl.int32)
    for i_step in range(NB):
        i_block = i_split * NB + i_step
        i_col = i_block * BN + i_lane
        m_col = i_col < length
        product = _product(p_hat, x_row, o_row, m_row, i_col, m_col, DP, BK, BM, BN)
        norm_col = tl.load(p_norm + i_col, mask=m_col, other=FAR)
        component = tl.load(p_component + i_col, mask=m_col, other=-1)
        m_block = i_block < n_blocks
        error = gamma * (norm + tl.load(p_block_norm + i_block, mask=m_block, other=0.0))
        slack = residual + tl.load(p_block_residual + i_block, mask=m_block, other=0.0)
        # [BM, BN]
        s = tl.where(own[:, None] != component[None, :], norm_col[None, :] - 2.0 * product, FAR)
        packed = (s.to(tl.int32, bitcast=True) & -BN) | i_lane[None, :]
        s = packed.to(tl.float32, bitcast=True)
        first = tl.min(s, axis=1)
        second = tl.min(tl.where(s == first[:, None], FAR, s), axis=1)
        low_first = tl.sqrt(tl.maximum(first + norm - error, 0.0)) * (1 - 2.0**-18) - slack
        low_second = tl.sqrt(tl.maximum(second + norm - error, 0.0)) * (1 - 2.0**-18) - slack
        better = first < best
        other = tl.minimum(other, tl.where(better, tl.minimum(low, low_second), low_first))
        low = tl.where(better, low_first, low)
        lane = first.to(tl.int32, bitcast=True) & (BN - 1)
        column = tl.where(better, i_block * BN + lane, column)
        best = tl.where(better, first, best)
    o_out = i_split.to(tl.int64) * n_rows + i_slot
    tl.store(p_best + o_out, best, mask=m_row)
    tl.store(p_column + o_out, column, mask=m_row)
    tl.store(p_low + o_out, low, mask=m_row)
    tl.store(p_other + o_out, other, mask=m_row)


@triton.jit
def list_within_kernel(
    p_hat,
    p_norm,
    p_residual,
    p_block_norm,
    p_block_residual,
    p_component,
    p_lengths,
    p_rows,
    p_reach,
    p_tile_cloud,
    p_tile_first,
    p_tile_end,
    p_total,
    p_count,
    p_list_slot,
    p_list_column,
    n,
    n_blocks,
    capacity,
    gamma,
    DP: tl.constexpr,
    BK: tl.constexpr,
    NB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    FAR: tl.constexpr,
):
    """One tile of rows against NB column blocks: appends (slot of the row, column) of every pair that may be in reach.

    p_total [1] int64 and p_count [n_rows] int32 count all of them; the list [capacity] holds those that fit.
    """
    i_tile = tl.program_id(0)
    i_split = tl.program_id(1)
    i_cloud = tl.load(p_tile_cloud + i_tile)
    length = tl.load(p_lengths + i_cloud)
    base = i_cloud * n
    p_hat += base * DP
    p_norm += base
    p_residual += base
    p_component += base
    p_block_norm += i_cloud * n_blocks
    p_block_residual += i_cloud * n_blocks
    i_slot = tl.load(p_tile_first + i_tile) + tl.arange(0, BM)
    m_row = i_slot < tl.load(p_tile_end + i_tile)
    i_row = tl.load(p_rows + i_slot, mask=m_row, other=0) - base
    i_row = tl.where(m_row, i_row, 0)
    o_row = i_row * DP
    own = tl.load(p_component + i_row)
    norm = tl.load(p_norm + i_row)
    reach = tl.load(p_reach + i_slot, mask=m_row, other=0.0) + tl.load(p_residual + i_row)
    x_row = tl.zeros((BM, BK), p_hat.dtype.element_ty)
    if DP == BK:
        x_row = tl.load(p_hat + o_row[:, None] + tl.arange(0, BK)[None, :], mask=m_row[:, None], other=0.0)
    i_lane = tl.arange(0, BN)
    for i_step in range(NB):
        i_block = i_split * NB + i_step
        i_col = i_block * BN + i_lane
        m_col = i_col < length
        product = _product(p_hat, x_row, o_row, m_row, i_col, m_col, DP, BK, BM, BN)
        norm_col = tl.load(p_norm + i_col, mask=m_col, other=FAR)
        component = tl.load(p_component + i_col, mask=m_col, other=-1)
        m_block = i_block < n_blocks
        error = gamma * (norm + tl.load(p_block_norm + i_block, mask=m_block, other=0.0))
        far = reach + tl.load(p_block_residual + i_block, mask=m_block, other=0.0)
        limit = tl.where(m_row, far * far * (1 + 2.0**-20) - norm + error, -FAR)
        # [BM, BN]; a column beyond the cloud has s = FAR, which no limit reaches
        s = norm_col[None, :] - 2.0 * product
        near = (s <= limit[:, None]) & (own[:, None] != component[None, :])
        # Over both axes at once: Triton 3.6 fails for capability 10.0 on a minimum of row minima as the condition.
        if tl.max(near.to(tl.int32)) > 0:
            count = tl.sum(near.to(tl.int32), axis=1)
            lane = tl.where(near, i_lane[None, :], BN)
            at = tl.min(lane, axis=1)
            m_any = count > 0
            tl.atomic_add(p_count + i_slot, count, mask=m_any)
            place = tl.atomic_add(p_total + tl.zeros((BM,), tl.int32), count.to(tl.int64), mask=m_any)
            # Columns of a row ascend; rows whose part begins beyond the list are counted only.
            at = tl.where(place < capacity, at, BN)
            while tl.min(at, axis=0) < BN:
                m_put = (at < BN) & (place < capacity)
                tl.store(p_list_slot + place, i_slot.to(tl.int32), mask=m_put)
                tl.store(p_list_column + place, i_block * BN + at, mask=m_put)
                place += 1
                lane = tl.where(lane > at[:, None], lane, BN)
                at = tl.min(lane, axis=1)


@triton.jit
def product_kernel(
    p_hat, p_product, n, DP: tl.constexpr, BK: tl.constexpr, NB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """product [n, n] of one cloud hat [n, DP] by itself, as the passes compute it; for `product_error`."""
    i_row = tl.program_id(0) * BM + tl.arange(0, BM)
    m_row = i_row < n
    o_row = i_row.to(tl.int64) * DP
    x_row = tl.zeros((BM, BK), p_hat.dtype.element_ty)
    if DP == BK:
        x_row = tl.load(p_hat + o_row[:, None] + tl.arange(0, BK)[None, :], mask=m_row[:, None], other=0.0)
    for i_block in range(NB):
        i_col = i_block * BN + tl.arange(0, BN)
        m_col = i_col < n
        product = _product(p_hat, x_row, o_row, m_row, i_col, m_col, DP, BK, BM, BN)
        o_out = i_row.to(tl.int64)[:, None] * n + i_col[None, :]
        tl.store(p_product + o_out, product, mask=m_row[:, None] & m_col[None, :])


def product_error(hat: torch.Tensor) -> float:
    """How much of the error that (2) allows to products this device makes: above 1 the proof does not hold on it.

    Args:
        hat: [n, DP] float16, or float32 that `rounded_to_tf32` keeps; DP as `product_shape` pads it, n at most 4096.

    Returns:
        The largest error over all pairs, as a share of (DP + 4) 2^-20 sum |h_ik h_jk|.
    """
    n, DP = hat.shape
    shape = product_shape(DP, hat.element_size())
    if shape.DP != DP or n > 4096:
        raise ValueError(f"hat is {n} x {DP}, expected at most 4096 rows of {shape.DP}.")
    product = torch.empty((n, n), dtype=torch.float32, device=hat.device)
    product_kernel[(triton.cdiv(n, BM),)](
        hat,
        product,
        n,
        DP=DP,
        BK=shape.BK,
        NB=triton.cdiv(n, BN),
        BM=BM,
        BN=BN,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    exact = hat.to(torch.float64)  # products of 22 bits: sums in float64 are off by 2^-53 a term at most
    allowed = (DP + 4) * 2.0**-20 * (exact.abs() @ exact.abs().T) + 2.0**-100
    return ((product.to(torch.float64) - exact @ exact.T).abs() / allowed).max().item()


@functools.cache
def product_holds(device: torch.device) -> bool:
    """Whether products on this device err by less than half of what (2) allows; asked once a device.

    Without it the filter's bound is no bound, and nearest points are searched by differences instead.
    """
    g = torch.Generator().manual_seed(5)
    worst = 0.0
    for d in (64, 1024):
        flat, normal = torch.rand(150, d, generator=g), torch.randn(150, d, generator=g)
        spread = normal * torch.exp2(torch.randint(-12, 1, (150, d), generator=g).float())
        for points in (flat, normal, spread.sort(1).values):
            x = points.to(device)
            worst = max(worst, product_error(x.to(torch.float16)), product_error(rounded_to_tf32(x)))
    if worst >= 0.5:
        _log.warning(
            "products on %s err by %.2g of what the filter's proof allows: it is not used there", device, worst
        )
    return worst < 0.5


def gamma(d: int) -> float:
    """Error of s_ij + n_i relative to n_i + n_j (module docstring, 3)."""
    return (d + 4) * 2.0**-20 + 2.0**-15


def rounded_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 to the nearest value with 10 bits after the leading one, ties to even.

    Args:
        x: float32, any shape, finite.

    Returns:
        float32; below the normal range the same 13 low bits are cut.
    """
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@dataclass(frozen=True)
class _Shape:
    """How the product is cut: DP padded coordinates, BK of them a step."""

    DP: int
    BK: int
    num_warps: int
    num_stages: int


def product_shape(d: int, itemsize: int) -> _Shape:
    """Tiles for d coordinates of 2 or 4 bytes; rows are kept whole while they fit, and nothing spills on any target."""
    if d * itemsize <= 256:
        DP = max(16, triton.next_power_of_2(d))
        return _Shape(DP, DP, 8, 2)
    BK = 32
    return _Shape(triton.cdiv(d, BK) * BK, BK, 8, 4 if itemsize == 2 else 3)


class Filter:
    """Rounded, centred copies of clouds, and the two passes over them.

    Attributes:
        order: [B, n] int64, points by ascending norm, padding last: position -> point.
        place: [B, n] int64, its inverse.
        hat: [B, n, DP] float16 or float32, the copies h by position.
        norm, residual: [B, n] float32, n_i and r_i by position; 0 for padding.
        block_norm, block_residual: [B, blocks] float32, their largest in each column block.
        exponent: [B] int64, e.
        gamma: of (3).
    """

    def __init__(self, x: torch.Tensor, lengths: torch.Tensor) -> None:
        """Prepare clouds.

        Args:
            x: [B, n, d] contiguous, float32 or float64, scaled, finite, 0 beyond lengths; 2 <= d <= MAX_COORDINATES.
            lengths: [B] int32, at least 1.
        """
        self.x = x
        self.lengths = lengths
        self.B, self.n, self.d = x.shape
        self.gamma = gamma(self.d)
        self.capacity = max(CAPACITY, 2 * self.B * self.n)
        B, n, d = x.shape
        flat = x.view(B * n, d)
        step = max(1, _CHUNK // d)
        # The median of some points in each coordinate: a few far outliers do not move it, as they would the mean.
        some = torch.arange(min(n, _SAMPLE), device=x.device)
        some = torch.div(some * lengths[:, None].to(torch.int64), len(some), rounding_mode="floor")
        center = x.gather(1, some[:, :, None].expand(B, -1, d)).sort(1).values[:, some.shape[1] // 2].to(torch.float64)
        point = torch.arange(n, device=x.device)
        inside = (point < lengths[:, None]).view(-1)

        norm = torch.empty(B * n, dtype=torch.float64, device=x.device)
        largest = torch.empty_like(norm)
        for first in range(0, B * n, step):
            y = self._centred(flat, torch.arange(first, min(first + step, B * n), device=x.device), center)
            norm[first : first + step] = (y * y).sum(1)
            largest[first : first + step] = y.abs().amax(1)
        zero = torch.zeros((), dtype=torch.float64, device=x.device)
        spread = torch.where(inside, largest, zero).view(B, n).amax(1)
        # Below 2^-500 (float64 with some other, constant coordinate) squares vanish whatever the scale.
        exponent = torch.frexp(spread)[1].to(torch.int64).clamp(min=-500)
        self.exponent = torch.where(spread > 0, exponent, 0)
        self.order = torch.argsort(torch.where(inside, norm, torch.inf).view(B, n), dim=1)
        self.place = torch.empty_like(self.order).scatter_(1, self.order, point.expand(B, n))

        base = (torch.arange(B, device=x.device) * n)[:, None]
        source = (self.order + base).view(-1)
        self._copy(flat, source, inside, center, step, torch.float16)
        # float16 keeps as many bits as tf32, but of numbers above 2^-14 only.
        fine = self.residual <= 2.0**-10 * self.norm.sqrt() + 2.0**-48
        if fine.to(torch.float32).mean().item() < 0.95:
            self._copy(flat, source, inside, center, step, torch.float32)
        pad = triton.cdiv(n, BN) * BN - n
        self.block_norm, self.block_residual = (
            torch.nn.functional.pad(part, (0, pad)).view(B, -1, BN).amax(2) for part in (self.norm, self.residual)
        )

    def _centred(self, flat: torch.Tensor, rows: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
        """[len(rows), d] float64: x - c."""
        return flat[rows].to(torch.float64) - center[torch.div(rows, self.n, rounding_mode="floor")]

    def _copy(
        self,
        flat: torch.Tensor,
        source: torch.Tensor,
        inside: torch.Tensor,
        center: torch.Tensor,
        step: int,
        dtype: torch.dtype,
    ) -> None:
        """Fill hat, norm and residual, position by position; source [B n] is the point at each."""
        B, n, d = self.x.shape
        self.shape = product_shape(d, dtype.itemsize)
        self.hat = torch.zeros((B, n, self.shape.DP), dtype=dtype, device=flat.device)
        self.norm = torch.empty((B, n), dtype=torch.float32, device=flat.device)
        self.residual = torch.empty_like(self.norm)
        hat, norm, residual = self.hat.view(B * n, -1), self.norm.view(-1), self.residual.view(-1)
        for first in range(0, B * n, step):
            part = slice(first, first + step)
            rows = source[part]
            exponent = self.exponent[torch.div(rows, n, rounding_mode="floor")]
            y = times_power(self._centred(flat, rows, center), -exponent[:, None])
            y = torch.where(inside[part, None], y, 0.0)  # padding is last in source and in inside alike
            copy = y.to(torch.float16) if dtype == torch.float16 else rounded_to_tf32(y.to(torch.float32))
            hat[part, :d] = copy
            exact = copy.to(torch.float64)
            norm[part] = (exact * exact).sum(1).to(torch.float32)
            off = ((y - exact) ** 2).sum(1).sqrt() + 2.0**-52 * (y * y).sum(1).sqrt()
            residual[part] = (off * (1 + 2.0**-20) + 2.0**-49).to(torch.float32)

    def _steps(self, tiles: RowTiles) -> tuple[int, int, int]:
        """(blocks, NB, splits): NB a power of two, splits * NB little more than blocks where splits allow."""
        blocks = self.block_norm.shape[1]
        NB = triton.next_power_of_2(triton.cdiv(blocks, tiles.splits(blocks)))
        while NB > 1 and triton.cdiv(blocks, NB) < 16 and NB * triton.cdiv(blocks, NB) > 1.07 * blocks:
            NB //= 2
        return blocks, NB, triton.cdiv(blocks, NB)

    def _by_position(self, rows: torch.Tensor, component: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows as cloud * n + position, components [B, n] by position)."""
        base = torch.div(rows, self.n, rounding_mode="floor") * self.n
        return base + self.place.view(-1)[rows], component.gather(1, self.order).contiguous()

    def nearest(self, rows: torch.Tensor, component: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A near foreign point of each row, and what all others weigh at least.

        Args:
            rows: [M] int64 points cloud * n + point inside their clouds, clouds ascending, each with a foreign point.
            component: [B, n] int32 labels.

        Returns:
            (weight [M] in the dtype of x, index [M] int32 of a foreign point, and below [M]: every other foreign point
            has at least this weight). Where weight < below the point is the nearest.
        """
        tiles = row_tiles(rows, self.B, self.n, BM)
        blocks, NB, splits = self._steps(tiles)
        position, component = self._by_position(rows, component)
        M = len(rows)
        best, low, other = (torch.empty((splits, M), dtype=torch.float32, device=rows.device) for _ in range(3))
        column = torch.empty((splits, M), dtype=torch.int32, device=rows.device)
        nearest_bounds_kernel[(len(tiles.cloud), splits)](
            self.hat,
            self.norm,
            self.residual,
            self.block_norm,
            self.block_residual,
            component,
            self.lengths,
            position,
            tiles.cloud,
            tiles.first,
            tiles.end,
            best,
            column,
            low,
            other,
            self.n,
            M,
            blocks,
            self.gamma,
            DP=self.shape.DP,
            BK=self.shape.BK,
            NB=NB,
            BM=BM,
            BN=BN,
            FAR=FAR,
            num_warps=self.shape.num_warps,
            num_stages=self.shape.num_stages,
        )
        won = best.argmin(0, keepdim=True)
        distance = torch.minimum(other.amin(0), low.scatter(0, won, FAR).amin(0)).clamp_(min=0)
        cloud = torch.div(rows, self.n, rounding_mode="floor")
        index = self.order[cloud, column.gather(0, won)[0].to(torch.int64)]
        weight = pair_weights(self.x, rows, cloud * self.n + index)
        return weight, index.to(torch.int32), self._weight_of(distance, cloud)

    def within(
        self, rows: torch.Tensor, component: torch.Tensor, cap: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest foreign point of each row, where its weight is at most cap.

        Args:
            rows: [M] int64 points cloud * n + point inside their clouds, clouds ascending.
            component: [B, n] int32 labels.
            cap: [M] in the dtype of x, finite.

        Returns:
            (weight [M], index [M] int32): the least (weight, index) if its weight is at most cap, else any foreign
            point that weighs more, or (+inf, n).
        """
        return self._within(rows, component, cap, True)

    def _within(
        self, rows: torch.Tensor, component: torch.Tensor, cap: torch.Tensor, again: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        M = len(rows)
        weight = torch.full((M,), torch.inf, dtype=self.x.dtype, device=rows.device)
        index = torch.full((M,), self.n, dtype=torch.int32, device=rows.device)
        if M == 0:
            return weight, index
        total, count, slot, column = self._list(rows, component, cap)
        if total <= self.capacity:
            slot, column = slot[:total].to(torch.int64), column[:total].to(torch.int64)
            row = rows[slot]
            cloud = torch.div(row, self.n, rounding_mode="floor")
            other = self.order[cloud, column]
            found = pair_weights(self.x, row, cloud * self.n + other)
            weight.scatter_reduce_(0, slot, found, "amin")
            least = found == weight[slot]
            index.scatter_reduce_(0, slot[least], other[least].to(torch.int32), "amin")
            return weight, index
        # Rows with many candidates are cheaper by the direct kernel; the others are listed in parts that fit.
        length = self.lengths[torch.div(rows, self.n, rounding_mode="floor")]
        dense = (count * 16 > length) | (count > self.capacity // 2)
        if not again:
            dense = torch.ones_like(dense)
        part = torch.nonzero(dense)[:, 0]
        weight[part], index[part] = nearest_foreign(self.x, component, self.lengths, rows[part])
        rest = torch.nonzero(~dense)[:, 0]
        group = torch.div(torch.cumsum(count[rest], 0), max(1, self.capacity // 2), rounding_mode="floor")
        for which in torch.unique(group).tolist():
            part = rest[group == which]
            weight[part], index[part] = self._within(rows[part], component, cap[part], False)
        return weight, index

    def _list(
        self, rows: torch.Tensor, component: torch.Tensor, cap: torch.Tensor
    ) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(pairs, pairs of each row [M], slot and column [capacity] of those that fit)."""
        tiles = row_tiles(rows, self.B, self.n, BM)
        blocks, NB, splits = self._steps(tiles)
        position, component = self._by_position(rows, component)
        reach = self._distance_of(cap, torch.div(rows, self.n, rounding_mode="floor"))
        total = torch.zeros(1, dtype=torch.int64, device=rows.device)
        count = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)
        slot, column = (torch.empty(self.capacity, dtype=torch.int32, device=rows.device) for _ in range(2))
        list_within_kernel[(len(tiles.cloud), splits)](
            self.hat,
            self.norm,
            self.residual,
            self.block_norm,
            self.block_residual,
            component,
            self.lengths,
            position,
            reach,
            tiles.cloud,
            tiles.first,
            tiles.end,
            total,
            count,
            slot,
            column,
            self.n,
            blocks,
            self.capacity,
            self.gamma,
            DP=self.shape.DP,
            BK=self.shape.BK,
            NB=NB,
            BM=BM,
            BN=BN,
            FAR=FAR,
            num_warps=self.shape.num_warps,
            num_stages=self.shape.num_stages,
        )
        return int(total), count.to(torch.int64), slot, column

    def _slack(self) -> tuple[float, float]:
        """((d + 8) u, (d + 8) least subnormals) of (5)."""
        info = torch.finfo(self.x.dtype)
        return (self.d + 8) * info.eps / 2, (self.d + 8) * info.tiny * info.eps

    def _weight_of(self, distance: torch.Tensor, cloud: torch.Tensor) -> torch.Tensor:
        """No point at least this far [M] float32 from a point of these clouds weighs less."""
        relative, absolute = self._slack()
        square = distance.to(torch.float64) ** 2 * (1 - relative)
        return (times_power(square, 2 * self.exponent[cloud]) - absolute).clamp_(min=0).to(self.x.dtype)

    def _distance_of(self, weight: torch.Tensor, cloud: torch.Tensor) -> torch.Tensor:
        """No point that weighs at most this [M] is farther; float32, at most 2^20, beyond any distance."""
        relative, absolute = self._slack()
        root = ((weight.to(torch.float64) + absolute) * (1 + 2 * relative)).sqrt() * (1 + 2.0**-50)
        return (times_power(root, -self.exponent[cloud]) * (1 + 2.0**-20)).clamp_(max=2.0**20).to(torch.float32)
