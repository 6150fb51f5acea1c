"""Nearest foreign neighbours of clouds with many coordinates: tensor cores rule out, fma chains decide.

A matrix product of rounded copies gives every distance of a cloud up to a proven error, in a small part of the
instructions that differences take. It only names candidates; their weights are the chains of pairwise.py, so edges
are those of every other backend, bit for bit. Two passes, each fused with its product; no n x n array:

    nearest_units   the units (some columns each) likely to hold a row's nearest points, with lower bounds on their
                    distances, and one on the distance to every other point
    list_within     the pairs (row, point) whose lower bound does not exceed a reach, appended to a bounded list

After the first, `lists_kernel` weighs the points of those units and keeps the nearest of each row in their order.

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
(3) Units. t_j is n_j (1 - g) rounded, g = (d + 4) 2^-20 + 2^-14, and s_ij = t_j - 2 p_ij, |s_ij| <= 2.1 (n_i + n_j).
    A unit's value u is the least s_ij of its columns with a number in the 7 low bits, which moves it by less than
    2^-16 |u|. Where u < 0, |u| <= 1.3 n_i (2 a b - b^2 <= a^2); else u <= s_ij of each of its columns up to that
    move. So for each column |move| <= 2^-16 2.1 (n_i + n_j) < 2^-14.9 (n_i + n_j). Norms rounded to float32, t, the
    difference and the sum with t_i lose less than 2^-20 (n_i + n_j) together; with (2) and what g is larger than these,
    H_ij^2 >= u + t_i for every column of the unit. The pass compares values of units only, never of two error bounds:
    what holds of the least value left out holds of all that were left out.
(4) Lower bound: D_ij >= sqrt(u + t_i) - r_i - r_j, the root taken times 1 - 2^-18 for the approximate square root and
    the subtraction, r_j the largest of its column block, or of the blocks of one split where the column is not known.
    Points are sorted by norm, so that an outlier spoils one split, and the last block is a split of its own.
    Reach: D_ij <= R implies H_ij <= t := R + r_i + r_j, hence with gamma = (d + 4) 2^-20 + 2^-15
    n_j - 2 p_ij <= t^2 (1 + 2^-20) - n_i + gamma (n_i + n_j), n_j the largest of its block on the right.
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
from obce.kernels.pairwise import chain, nearest_foreign, pair_weights, parts, row_tiles
from obce.kernels.scaling import factors, times_power

BM, BN = 128, 64  # rows of a tile, columns of a block of list_within
FAR = 1e30  # in the place of s_ij where j is not foreign: nothing is as far
STEPS = 128  # column blocks of a split at most: a step is a number of 7 bits
UNITS = 16  # of a row that are looked at
KEPT = 16  # points of a row's list
PAIRS = 128  # weighed by a program of lists_kernel
_FEW = 8  # units of a row that a split hands on
_PAD = 256  # rows of copies are a multiple: every tile and block is a part of it
_GROUP = 32  # tiles of rows that meet the same columns at about the same time
_SLOTS = 1 << 27  # units that wait to be looked at
MAX_COORDINATES = 1 << 16  # (d + 8) u and (d + 4) 2^-20 are small up to here
CAPACITY = 1 << 22  # pairs of a list at least
_SAMPLE = 65
_log = logging.getLogger("obce")


@triton.jit
def _product(p_hat, x_row, o_row, i_col, dp, WHOLE: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN] inner products; x_row is the whole row tile with WHOLE. Copies are padded: nothing is masked."""
    o_col = i_col.to(tl.int64) * dp
    i_k = tl.arange(0, BK)
    # x_col is [BN, BK], x [BM, BK]
    if WHOLE:
        x_col = tl.load(p_hat + o_col[:, None] + i_k[None, :])
        product = tl.dot(x_row, tl.trans(x_col), input_precision="tf32")
    else:
        product = tl.zeros((BM, BN), tl.float32)
        for k in range(0, dp, BK):
            x = tl.load(p_hat + o_row[:, None] + (k + i_k)[None, :])
            x_col = tl.load(p_hat + o_col[:, None] + (k + i_k)[None, :])
            product = tl.dot(x, tl.trans(x_col), product, input_precision="tf32")
    return product


@triton.jit
def _row_tile(p_hat, o_row, WHOLE: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr):
    """[BM, BK] whole rows, or zeros without WHOLE."""
    x_row = tl.zeros((BM, BK), p_hat.dtype.element_ty)
    if WHOLE:
        x_row = tl.load(p_hat + o_row[:, None] + tl.arange(0, BK)[None, :])
    return x_row


@triton.jit(do_not_specialize=["first_tile", "n_tiles", "tiles_of_cloud", "n_slots", "n_blocks", "splits", "per_split"])
def nearest_units_kernel(
    p_hat,
    p_term,
    p_residual,
    p_block_residual,
    p_component,
    p_lengths,
    p_rows,
    p_tile_cloud,
    p_tile_first,
    p_tile_end,
    p_low,
    p_unit,
    p_other,
    stride,
    dp,
    first_tile,
    n_tiles,
    tiles_of_cloud,
    n_slots,
    n_blocks,
    splits,
    per_split,
    WHOLE: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    G: tl.constexpr,
    KS: tl.constexpr,
    GROUP: tl.constexpr,
    ALL: tl.constexpr,
    FAR: tl.constexpr,
):
    """One tile of rows against the column blocks of one split, positions being sorted points.

    With ALL the rows are all positions, and every other point counts (a row meets itself: lists_kernel drops it);
    else they are listed, and only points of other components count. A unit is G columns, 8 apart, of one block.
    A lane is a unit's place in its block: the least value of each lane is kept, and the least of all others.

    Per split and row: low [KS], lower bounds of the distance to the points of the KS nearest units that are least of
    their lanes; unit [KS], cloud-wide numbers, -1 for none; other, a lower bound of the distance to every point of the
    split in no unit of these. Low and unit are [splits, n_slots, KS], other [splits, n_slots].
    """
    L: tl.constexpr = BN // G
    pid = tl.program_id(0)
    group = pid // (GROUP * splits)
    tiles = tl.minimum(n_tiles - group * GROUP, GROUP)
    in_group = pid % (GROUP * splits)
    i_tile = group * GROUP + in_group % tiles
    i_split = in_group // tiles
    i_lane = tl.arange(0, BM)
    if ALL:
        i_cloud = ((first_tile + i_tile) // tiles_of_cloud).to(tl.int64)
        i_slot = (i_tile * BM + i_lane).to(tl.int64)
        i_row = ((first_tile + i_tile) % tiles_of_cloud * BM + i_lane).to(tl.int64)
        m_row = i_lane >= 0
    else:
        i_cloud = tl.load(p_tile_cloud + i_tile)
        i_slot = tl.load(p_tile_first + i_tile) + i_lane
        m_row = i_slot < tl.load(p_tile_end + i_tile)
        i_row = tl.where(m_row, tl.load(p_rows + i_slot, mask=m_row, other=0) - i_cloud * stride, 0)
    length = tl.load(p_lengths + i_cloud)
    base = i_cloud * stride
    p_hat += base * dp
    p_term += base
    p_residual += base
    p_component += base
    p_block_residual += i_cloud * n_blocks
    # The last split is the last block alone; none of the others has a block beyond the cloud.
    blocks = (length + BN - 1) // BN
    last = i_split == splits - 1
    end = tl.where(last, blocks, tl.minimum((i_split + 1) * per_split, blocks - 1))
    first = tl.where(last, blocks - 1, tl.minimum(i_split * per_split, end))
    if ALL:
        end = tl.where(tl.min(i_row, axis=0) < length, end, first)
    o_row = i_row * dp
    x_row = _row_tile(p_hat, o_row, WHOLE, BK, BM)
    if not ALL:
        own = tl.load(p_component + i_row)
    best = tl.full((BM, L), FAR, tl.float32)
    second = tl.full((BM, 8), FAR, tl.float32)
    for i_block in range(first, end):
        i_col = i_block * BN + tl.arange(0, BN)
        product = _product(p_hat, x_row, o_row, i_col, dp, WHOLE, BK, BM, BN)
        # [BM, BN]; beyond the cloud the term is FAR. Columns 8 apart lie in one thread of a tensor core's result.
        s = tl.load(p_term + i_col)[None, :] - 2.0 * product
        if not ALL:
            s = tl.where(own[:, None] != tl.load(p_component + i_col)[None, :], s, FAR)
        # [BM, L]
        s = tl.reshape(tl.min(tl.reshape(s, (BM, L // 8, G, 8)), axis=2), (BM, L))
        s = ((s.to(tl.int32, bitcast=True) & -128) | (i_block - first)).to(tl.float32, bitcast=True)
        worse = tl.maximum(best, s)
        second = tl.minimum(second, tl.min(tl.reshape(worse, (BM, L // 8, 8)), axis=1))
        best = tl.minimum(best, s)
    i_unit = tl.arange(0, L)[None, :]
    i_step = tl.arange(0, 128)
    slack_block = tl.load(p_block_residual + first + i_step, mask=first + i_step < end, other=0.0)
    # [BM]
    other = tl.min(second, axis=1)
    term = tl.load(p_term + i_row)
    residual = tl.load(p_residual + i_row)
    o_out = (i_split.to(tl.int64) * n_slots + i_slot) * KS
    for t in tl.static_range(KS):
        least = tl.min(best, axis=1)
        lane = tl.min(tl.where(best == least[:, None], i_unit, L), axis=1)
        best = tl.where(i_unit == lane[:, None], FAR, best)
        any_left = (least < FAR / 2) & m_row
        block = first + (least.to(tl.int32, bitcast=True) & 127)
        slack = residual + tl.load(p_block_residual + block, mask=any_left, other=0.0)
        tl.store(p_low + o_out + t, tl.sqrt(tl.maximum(least + term, 0.0)) * (1 - 2.0**-18) - slack, mask=m_row)
        tl.store(p_unit + o_out + t, tl.where(any_left, block * L + lane, -1), mask=m_row)
    other = tl.minimum(other, tl.min(best, axis=1))
    other = tl.sqrt(tl.maximum(other + term, 0.0)) * (1 - 2.0**-18) - residual - tl.max(slack_block, axis=0)
    tl.store(p_other + i_split.to(tl.int64) * n_slots + i_slot, other, mask=m_row)


@triton.jit(do_not_specialize=["n", "first_slot", "last_slot", "n_slots", "splits"])
def lists_kernel(
    p_x,
    p_order,
    p_component,
    p_lengths,
    p_rows,
    p_low,
    p_unit,
    p_other,
    p_power,
    p_list_weight,
    p_list_point,
    p_beyond,
    n,
    d,
    stride,
    first_slot,
    last_slot,
    n_slots,
    splits,
    BN: tl.constexpr,
    G: tl.constexpr,
    KS: tl.constexpr,
    K: tl.constexpr,
    KEPT: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    BR: tl.constexpr,
    ALL: tl.constexpr,
):
    """Weighs the points of the K nearest units of each row (slot) and keeps the KEPT least (weight, point) of them.

    list_weight and list_point are [B n, KEPT], +inf and -1 where there are fewer; beyond [B n]: every other point
    (with ALL; else of another component) weighs at least this. p_power
    [B, 2] float64: two factors of 2^2e. C >= splits KS and S >= splits are powers of two.
    """
    L: tl.constexpr = BN // G
    KG: tl.constexpr = K * G
    i_slot = first_slot + tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_row = i_slot < last_slot
    at = i_slot - first_slot
    position = i_slot
    if not ALL:
        position = tl.load(p_rows + i_slot, mask=m_row, other=0)
    cloud = position // stride
    place = position - cloud * stride
    length = tl.load(p_lengths + cloud, mask=m_row, other=0)
    m_row = m_row & (place < length)
    row = tl.load(p_order + cloud * n + place, mask=m_row, other=0)
    # [BR, C]
    i_c = tl.arange(0, C)[None, :]
    o_c = (i_c // KS).to(tl.int64) * n_slots * KS + i_c % KS
    m_c = m_row[:, None] & (i_c < splits * KS)
    low = tl.load(p_low + at[:, None] * KS + o_c, mask=m_c, other=float("inf"))
    unit = tl.load(p_unit + at[:, None] * KS + o_c, mask=m_c, other=-1)
    low = tl.where(unit < 0, float("inf"), low)
    i_s = tl.arange(0, S)[None, :]
    bound = tl.load(
        p_other + at[:, None] + i_s.to(tl.int64) * n_slots, mask=m_row[:, None] & (i_s < splits), other=float("inf")
    )
    bound = tl.min(bound, axis=1)
    # [BR, KG]
    i_k = tl.arange(0, KG)[None, :]
    low_of = tl.full((BR, KG), float("inf"), tl.float32)
    unit_of = tl.full((BR, KG), -1, tl.int32)
    for t in tl.static_range(K):
        least = tl.min(low, axis=1)
        which = tl.min(tl.where(low == least[:, None], i_c, C), axis=1)
        chosen = tl.max(tl.where(i_c == which[:, None], unit, -1), axis=1)
        low = tl.where(i_c == which[:, None], float("inf"), low)
        low_of = tl.where(i_k // G == t, least[:, None], low_of)
        unit_of = tl.where(i_k // G == t, chosen[:, None], unit_of)
    bound = tl.where(m_row, tl.minimum(bound, tl.min(low, axis=1)), 0.0)
    # What lies beyond the bound need not be weighed: it is among what is said to be beyond.
    lane = unit_of % L
    column = unit_of // L * BN + lane // 8 * (8 * G) + i_k % G * 8 + lane % 8
    m_pair = (unit_of >= 0) & (low_of <= bound[:, None]) & m_row[:, None]
    m_pair = m_pair & (column < length[:, None]) & (column != place[:, None])
    if not ALL:
        own = tl.load(p_component + position, mask=m_row, other=0)
        of = tl.load(p_component + (cloud * stride)[:, None] + column, mask=m_pair, other=0)
        m_pair = m_pair & (of != own[:, None])
    point = tl.load(p_order + (cloud * n)[:, None] + column, mask=m_pair, other=0)
    o_point = tl.reshape(((cloud * n)[:, None] + point) * d, (BR * KG,))
    o_row = tl.reshape(tl.broadcast_to(((cloud * n + row) * d)[:, None], (BR, KG)), (BR * KG,))
    weight = chain(p_x + o_row, p_x + o_point, tl.reshape(m_pair, (BR * KG,)), d, BR * KG)
    weight = tl.where(m_pair, tl.reshape(weight, (BR, KG)), float("inf"))
    point = point.to(tl.int32)
    distance = tl.maximum(bound, 0.0).to(tl.float64)
    wide = (d + 8).to(tl.float64)  # `Filter._slack`
    if p_x.dtype.element_ty == tl.float64:
        relative = wide * 2.0**-53
        absolute = wide * 2.0**-1074
    else:
        relative = wide * 2.0**-24
        absolute = wide * 2.0**-149
    square = distance * distance * (1.0 - relative)
    square = square * tl.load(p_power + 2 * cloud, mask=m_row, other=0.0)
    square = square * tl.load(p_power + 2 * cloud + 1, mask=m_row, other=0.0)
    beyond = tl.maximum(square - absolute, 0.0).to(weight.dtype)
    o_out = cloud * n + row
    for t in tl.static_range(KEPT):
        least = tl.min(weight, axis=1)
        m_least = (weight == least[:, None]) & (weight < float("inf"))
        chosen = tl.min(tl.where(m_least, point, n), axis=1)
        weight = tl.where(m_least & (point == chosen[:, None]), float("inf"), weight)
        tl.store(p_list_weight + o_out * KEPT + t, least, mask=m_row)
        tl.store(p_list_point + o_out * KEPT + t, tl.where(chosen < n, chosen, -1), mask=m_row)
    beyond = tl.minimum(beyond, tl.min(weight, axis=1))
    tl.store(p_beyond + o_out, beyond, mask=m_row)


@triton.jit(do_not_specialize=["n"])
def spread_kernel(p_x, p_center, p_lengths, p_norm, p_largest, n, d, BP: tl.constexpr, BD: tl.constexpr):
    """Of x_i - c, in float64: norm [B, n], the sum of squares, largest, of magnitudes; +inf and 0 beyond the cloud."""
    i_cloud = tl.program_id(1).to(tl.int64)
    length = tl.load(p_lengths + i_cloud)
    i_point = tl.program_id(0) * BP + tl.arange(0, BP)
    m_point = i_point < length
    o_point = (i_cloud * n + i_point) * d
    norm = tl.zeros((BP,), tl.float64)
    largest = tl.zeros((BP,), tl.float64)
    k = 0
    while k < d:
        o_k = tl.multiple_of(k + tl.arange(0, BD), BD)
        x = tl.load(p_x + o_point[:, None] + o_k[None, :], mask=m_point[:, None] & (o_k < d)[None, :], other=0.0)
        y = x.to(tl.float64) - tl.load(p_center + i_cloud * d + o_k, mask=o_k < d, other=0.0)[None, :]
        y = tl.where(m_point[:, None], y, 0.0)
        norm += tl.sum(y * y, axis=1)
        largest = tl.maximum(largest, tl.max(tl.abs(y), axis=1))
        k += BD
    tl.store(p_norm + i_cloud * n + i_point, tl.where(m_point, norm, float("inf")), mask=i_point < n)
    tl.store(p_largest + i_cloud * n + i_point, largest, mask=i_point < n)


@triton.jit(do_not_specialize=["n"])
def copies_kernel(
    p_x,
    p_center,
    p_lengths,
    p_order,
    p_power,
    p_hat,
    p_norm,
    p_residual,
    p_term,
    p_coarse,
    n,
    d,
    stride,
    dp,
    BP: tl.constexpr,
    BD: tl.constexpr,
    FAR: tl.constexpr,
):
    """hat, norm, residual and term by position, for stride positions; power [B, 2] float64: two factors of 2^-e.

    p_coarse [1] int32 counts the points that lost more than 2^-10 of themselves.
    """
    i_cloud = tl.program_id(1).to(tl.int64)
    length = tl.load(p_lengths + i_cloud)
    i_place = tl.program_id(0) * BP + tl.arange(0, BP)
    m_point = i_place < length
    point = tl.load(p_order + i_cloud * n + i_place, mask=m_point, other=0)
    o_point = (i_cloud * n + point) * d
    o_hat = (i_cloud * stride + i_place) * dp
    power_0 = tl.load(p_power + 2 * i_cloud)
    power_1 = tl.load(p_power + 2 * i_cloud + 1)
    norm = tl.zeros((BP,), tl.float64)
    off = tl.zeros((BP,), tl.float64)
    whole = tl.zeros((BP,), tl.float64)
    k = 0
    while k < dp:
        o_k = tl.multiple_of(k + tl.arange(0, BD), BD)
        m_k = m_point[:, None] & (o_k < d)[None, :]
        x = tl.load(p_x + o_point[:, None] + o_k[None, :], mask=m_k, other=0.0)
        y = x.to(tl.float64) - tl.load(p_center + i_cloud * d + o_k, mask=o_k < d, other=0.0)[None, :]
        y = tl.where(m_k, y * power_0 * power_1, 0.0)
        if p_hat.dtype.element_ty == tl.float16:
            hat = y.to(tl.float16)
        else:
            bits = y.to(tl.float32).to(tl.int32, bitcast=True)
            hat = ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).to(tl.float32, bitcast=True)
        tl.store(p_hat + o_hat[:, None] + o_k[None, :], hat, mask=(o_k < dp)[None, :] & (i_place < stride)[:, None])
        h = hat.to(tl.float64)
        norm += tl.sum(h * h, axis=1)
        off += tl.sum((y - h) * (y - h), axis=1)
        whole += tl.sum(y * y, axis=1)
        k += BD
    residual = ((tl.sqrt(off) + 2.0**-52 * tl.sqrt(whole)) * (1 + 2.0**-20) + 2.0**-49).to(tl.float32)
    residual = tl.where(m_point, residual, 0.0)
    o_out = i_cloud * stride + i_place
    m_out = i_place < stride
    tl.store(p_norm + o_out, norm.to(tl.float32), mask=m_out)
    tl.store(p_residual + o_out, residual, mask=m_out)
    tl.store(
        p_term + o_out,
        tl.where(m_point, (norm * (1.0 - ((d + 4).to(tl.float64) * 2.0**-20 + 2.0**-14))).to(tl.float32), FAR),
        mask=m_out,
    )
    # float16 keeps as many bits as tf32, but of numbers above 2^-14 only.
    coarse = m_point & (residual.to(tl.float64) > 2.0**-10 * tl.sqrt(norm) + 2.0**-48)
    tl.atomic_add(p_coarse, tl.sum(coarse.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["n_blocks", "per_split", "capacity"])
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
    stride,
    dp,
    n_blocks,
    per_split,
    capacity,
    gamma,
    WHOLE: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    FAR: tl.constexpr,
):
    """One tile of rows against a split's column blocks: appends (slot of the row, column) of what may be in reach.

    p_total [1] int64 and p_count [n_rows] int32 count all of them; the list [capacity] holds those that fit.
    """
    i_tile = tl.program_id(0)
    i_split = tl.program_id(1)
    i_cloud = tl.load(p_tile_cloud + i_tile)
    length = tl.load(p_lengths + i_cloud)
    base = i_cloud * stride
    p_hat += base * dp
    p_norm += base
    p_residual += base
    p_component += base
    p_block_norm += i_cloud * n_blocks
    p_block_residual += i_cloud * n_blocks
    i_slot = tl.load(p_tile_first + i_tile) + tl.arange(0, BM)
    m_row = i_slot < tl.load(p_tile_end + i_tile)
    i_row = tl.load(p_rows + i_slot, mask=m_row, other=0) - base
    i_row = tl.where(m_row, i_row, 0)
    o_row = i_row * dp
    own = tl.load(p_component + i_row)
    norm = tl.load(p_norm + i_row)
    reach = tl.load(p_reach + i_slot, mask=m_row, other=0.0) + tl.load(p_residual + i_row)
    x_row = _row_tile(p_hat, o_row, WHOLE, BK, BM)
    i_lane = tl.arange(0, BN)
    first = i_split * per_split
    for i_block in range(first, tl.minimum(first + per_split, (length + BN - 1) // BN)):
        i_col = i_block * BN + i_lane
        product = _product(p_hat, x_row, o_row, i_col, dp, WHOLE, BK, BM, BN)
        norm_col = tl.where(i_col < length, tl.load(p_norm + i_col), FAR)
        component = tl.load(p_component + i_col)
        error = gamma * (norm + tl.load(p_block_norm + i_block))
        far = reach + tl.load(p_block_residual + i_block)
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


@triton.jit(do_not_specialize=["n"])
def product_kernel(p_hat, p_product, n, dp, WHOLE: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """product [n, n] of one cloud hat [padded n, dp] by itself, as the passes compute it; for `product_error`."""
    i_row = tl.program_id(0) * BM + tl.arange(0, BM)
    o_row = i_row.to(tl.int64) * dp
    x_row = _row_tile(p_hat, o_row, WHOLE, BK, BM)
    for i_block in range((n + BN - 1) // BN):
        i_col = i_block * BN + tl.arange(0, BN)
        product = _product(p_hat, x_row, o_row, i_col, dp, WHOLE, BK, BM, BN)
        o_out = i_row.to(tl.int64)[:, None] * n + i_col[None, :]
        tl.store(p_product + o_out, product, mask=(i_row < n)[:, None] & (i_col < n)[None, :])


def product_error(hat: torch.Tensor) -> float:
    """How much of the error that (2) allows to products this device makes: above 1 the proof does not hold on it.

    Args:
        hat: [n, DP] float16, or float32 that `rounded_to_tf32` keeps; DP as `product_shape` pads it, n at most 4096.

    Returns:
        The largest error over all pairs and over the tiles of both passes, as a share of (DP + 4) 2^-20 sum
        |h_ik h_jk|.
    """
    n, DP = hat.shape
    shape = product_shape(DP, hat.element_size())
    if shape.DP != DP or n > 4096:
        raise ValueError(f"hat is {n} x {DP}, expected at most 4096 rows of {shape.DP}.")
    units = unit_shape(DP, hat.element_size(), _capability(hat.device))
    exact = hat.to(torch.float64)  # products of 22 bits: sums in float64 are off by 2^-53 a term at most
    allowed = (DP + 4) * 2.0**-20 * (exact.abs() @ exact.abs().T) + 2.0**-100
    hat = torch.nn.functional.pad(hat, (0, 0, 0, -n % _PAD))
    worst = 0.0
    for BK, m, columns, num_warps, num_stages in (
        (shape.BK, BM, BN, shape.num_warps, shape.num_stages),
        (units.BK, units.BM, units.BN, units.num_warps, units.num_stages),
    ):
        product = torch.empty((n, n), dtype=torch.float32, device=hat.device)
        product_kernel[(triton.cdiv(n, m),)](
            hat,
            product,
            n,
            DP,
            WHOLE=BK == DP,
            BK=BK,
            BM=m,
            BN=columns,
            num_warps=num_warps,
            num_stages=num_stages,
        )
        worst = max(worst, ((product.to(torch.float64) - exact @ exact.T).abs() / allowed).max().item())
    return worst


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
    """Error of n_i + n_j - 2 p_ij relative to n_i + n_j (module docstring, 4)."""
    return (d + 4) * 2.0**-20 + 2.0**-15


def unit_gamma(d: int) -> float:
    """g of (3)."""
    return (d + 4) * 2.0**-20 + 2.0**-14


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
    """How the product of list_within is cut: DP padded coordinates, BK of them a step."""

    DP: int
    BK: int
    num_warps: int
    num_stages: int


def product_shape(d: int, itemsize: int) -> _Shape:
    """Tiles for d coordinates of 2 or 4 bytes; rows are kept whole while they fit, and nothing spills on any target."""
    if d * itemsize <= 256:
        DP = max(16, triton.next_power_of_2(d))
        return _Shape(DP, DP, 8, 2)
    return _Shape(triton.cdiv(d, 64) * 64, 128 // itemsize, 8, 3)


@dataclass(frozen=True)
class UnitShape:
    """How nearest_units is cut: WHOLE rows of BK coordinates or BK a step, BM rows by BN columns, G columns a unit."""

    WHOLE: bool
    BK: int
    BM: int
    BN: int
    G: int
    num_warps: int
    num_stages: int
    registers: int | None

    def unit(self, every: bool) -> int:
        """Columns of a unit; more where rows are listed and tiles are large: comparing components takes registers."""
        return self.G if every or self.BN < 256 else max(self.G, 4)


def unit_shape(DP: int, itemsize: int, capability: int) -> UnitShape:
    """Tiles for DP padded coordinates of 2 or 4 bytes on a device of this capability (90 for 9.0).

    Two programs fit a Hopper processor where rows are whole: one computes products while the other compares.
    """
    whole = DP * itemsize <= 256
    if capability // 10 != 9:
        return UnitShape(whole, DP if whole else 32, 128, 64, 2, 8, 2 if whole or itemsize == 4 else 3, None)
    if whole:
        return UnitShape(True, DP, 128, 128, 4, 8, 2, 128 if itemsize == 2 else None)
    if itemsize == 2:
        return UnitShape(False, 64, 128, 256, 2, 8, 3, None)
    return UnitShape(False, 32, 128, 128, 2, 8, 2, None)


@functools.cache
def _capability(device: torch.device) -> int:
    """90 for 9.0; 0 on the host."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@dataclass(frozen=True)
class Lists:
    """What every row knows of the points near it; rows are cloud * n + point.

    Attributes:
        weight: [B n, KEPT] in the dtype of x, ascending, +inf where there are fewer.
        point: [B n, KEPT] int32 in the cloud, among equal weights ascending; -1 where there are fewer.
        beyond: [B n] in the dtype of x: every other point weighs at least this, or was not foreign when it was listed.
    """

    weight: torch.Tensor
    point: torch.Tensor
    beyond: torch.Tensor


def _points_tile(d: int) -> tuple[int, int]:
    """(points, coordinates at a time) of a program that prepares points of d coordinates."""
    BD = min(128, triton.next_power_of_2(d))
    return max(1, 2048 // BD), BD


class Filter:
    """Rounded, centred copies of clouds, and the two passes over them.

    Attributes:
        order: [B, n] int64, points by ascending norm, padding last: position -> point.
        stride: positions of a cloud, n rounded up.
        hat: [B, stride, DP] float16 or float32, the copies h by position; 0 beyond the cloud, as the next two.
        norm, residual: [B, stride] float32, n_i and r_i by position.
        term: [B, stride] float32, t_i by position; FAR beyond the cloud.
        block_norm, block_residual: [B, blocks] float32, their largest in each column block of list_within.
        unit_residual: [B, unit blocks] float32, as block_residual in those of nearest_units.
        exponent: [B] int64, e.
        gamma: of (4).
    """

    def __init__(self, x: torch.Tensor, lengths: torch.Tensor) -> None:
        """Prepare clouds.

        Args:
            x: [B, n, d] contiguous, float32 or float64, scaled, finite; 2 <= d <= MAX_COORDINATES.
            lengths: [B] int32, at least 1.
        """
        self.x = x
        self.lengths = lengths
        self.B, self.n, self.d = x.shape
        self.gamma = gamma(self.d)
        self.capacity = max(CAPACITY, 2 * self.B * self.n)
        B, n, d = x.shape
        self.stride = triton.cdiv(n, _PAD) * _PAD
        # The median of some points in each coordinate: a few far outliers do not move it, as they would the mean.
        some = torch.arange(min(n, _SAMPLE), device=x.device)
        some = torch.div(some * lengths[:, None].to(torch.int64), len(some), rounding_mode="floor")
        some = x.gather(1, some[:, :, None].expand(B, -1, d)).sort(1).values
        self.center = some[:, some.shape[1] // 2].to(torch.float64).contiguous()

        norm = torch.empty((B, n), dtype=torch.float64, device=x.device)
        largest = torch.empty_like(norm)
        BP, BD = _points_tile(d)
        spread_kernel[(triton.cdiv(n, BP), B)](x, self.center, lengths, norm, largest, n, d, BP=BP, BD=BD, num_warps=4)
        spread = largest.amax(1)
        # Below 2^-500 (float64 with some other, constant coordinate) squares vanish whatever the scale.
        exponent = torch.frexp(spread)[1].to(torch.int64).clamp(min=-500)
        self.exponent = torch.where(spread > 0, exponent, 0)
        self.order = torch.argsort(norm, dim=1)
        self._place: torch.Tensor | None = None
        if self._copy(torch.float16) >= 0.05 * B * n:
            self._copy(torch.float32)
        self.block_norm, self.block_residual = (
            part.view(B, -1, BN).amax(2)[:, : triton.cdiv(n, BN)].contiguous() for part in (self.norm, self.residual)
        )
        blocks = triton.cdiv(n, self.units.BN)
        self.unit_residual = self.residual.view(B, -1, self.units.BN).amax(2)[:, :blocks].contiguous()
        self.square = factors(2 * self.exponent)

    def _copy(self, dtype: torch.dtype) -> int:
        """Fill hat, norm, residual and term; the number of points that lost much."""
        B, n, d = self.x.shape
        device = self.x.device
        self.shape = product_shape(d, dtype.itemsize)
        self.units = unit_shape(self.shape.DP, dtype.itemsize, _capability(device))
        self.hat = torch.empty((B, self.stride, self.shape.DP), dtype=dtype, device=device)
        self.norm, self.residual, self.term = (
            torch.empty((B, self.stride), dtype=torch.float32, device=device) for _ in range(3)
        )
        coarse = torch.zeros(1, dtype=torch.int32, device=device)
        BP, BD = _points_tile(self.shape.DP)
        copies_kernel[(triton.cdiv(self.stride, BP), B)](
            self.x,
            self.center,
            self.lengths,
            self.order,
            factors(-self.exponent),
            self.hat,
            self.norm,
            self.residual,
            self.term,
            coarse,
            n,
            d,
            self.stride,
            self.shape.DP,
            BP=BP,
            BD=BD,
            FAR=FAR,
            num_warps=4,
        )
        return int(coarse)

    def empty_lists(self) -> Lists:
        """Lists for every row, those inside clouds to be filled."""
        rows = self.B * self.n
        return Lists(
            torch.empty((rows, KEPT), dtype=self.x.dtype, device=self.x.device),
            torch.full((rows, KEPT), -1, dtype=torch.int32, device=self.x.device),
            torch.empty(rows, dtype=self.x.dtype, device=self.x.device),
        )

    def list_all(self, lists: Lists) -> None:
        """Fill the lists of all rows with their nearest points, whatever their components."""
        tiles_of_cloud = self.stride // self.units.BM
        total = self.B * tiles_of_cloud
        step = max(_GROUP, _SLOTS // (self._splits(total)[1] * _FEW * self.units.BM))
        for first in range(0, total, step):
            self._units(lists, None, None, first, min(step, total - first))

    def list_foreign(self, lists: Lists, rows: torch.Tensor, component: torch.Tensor) -> None:
        """Fill the lists of some rows with their nearest foreign points.

        Args:
            lists: of all rows; those of others stay.
            rows: [M] int64 points cloud * n + point inside their clouds, clouds ascending.
            component: [B, n] int32 labels.
        """
        position, by_position = self._by_position(rows, component)
        most = _SLOTS // (self._splits(triton.cdiv(len(rows), self.units.BM))[1] * _FEW)
        for part in position.split(max(self.units.BM, most)):
            self._units(lists, part, by_position, 0, 0)

    def _splits(self, tiles: int) -> tuple[int, int, int]:
        """(blocks, splits, blocks of each split but the last, which is the last block)."""
        blocks = triton.cdiv(self.n, self.units.BN)
        inner = max(1, blocks - 1)
        per_split = triton.cdiv(inner, max(triton.cdiv(inner, STEPS), parts(tiles, inner)))
        return blocks, triton.cdiv(blocks - 1, per_split) + 1, per_split

    def _units(
        self, lists: Lists, rows: torch.Tensor | None, component: torch.Tensor | None, first_tile: int, tiles: int
    ) -> None:
        """Fill the lists of `tiles` tiles of all positions, or of listed positions [M] with components by position."""
        units, device = self.units, self.x.device
        everything = rows is None
        if rows is None or component is None:
            slots = tiles * units.BM
            rows = first = end = cloud = self.order  # not looked at
            component = self.lengths
        else:
            listed = row_tiles(rows, self.B, self.stride, units.BM)
            cloud, first, end = listed.cloud, listed.first, listed.end
            tiles, slots = len(cloud), len(rows)
        G = units.unit(everything)
        blocks, splits, per_split = self._splits(self.B * (self.stride // units.BM) if everything else tiles)
        low = torch.empty((splits, slots, _FEW), dtype=torch.float32, device=device)
        unit = torch.empty((splits, slots, _FEW), dtype=torch.int32, device=device)
        other = torch.empty((splits, slots), dtype=torch.float32, device=device)
        nearest_units_kernel[(tiles * splits,)](
            self.hat,
            self.term,
            self.residual,
            self.unit_residual,
            component,
            self.lengths,
            rows,
            cloud,
            first,
            end,
            low,
            unit,
            other,
            self.stride,
            self.shape.DP,
            first_tile,
            tiles,
            self.stride // units.BM,
            slots,
            blocks,
            splits,
            per_split,
            WHOLE=units.WHOLE,
            BK=units.BK,
            BM=units.BM,
            BN=units.BN,
            G=G,
            KS=_FEW,
            GROUP=_GROUP,
            ALL=everything,
            FAR=FAR,
            num_warps=units.num_warps,
            num_stages=units.num_stages,
            maxnreg=units.registers if everything else None,
        )
        first_slot = first_tile * units.BM
        BR = max(1, PAIRS // (UNITS * G))
        lists_kernel[(triton.cdiv(slots, BR),)](
            self.x,
            self.order,
            component,
            self.lengths,
            rows,
            low,
            unit,
            other,
            self.square,
            lists.weight,
            lists.point,
            lists.beyond,
            self.n,
            self.d,
            self.stride,
            first_slot,
            first_slot + slots,
            slots,
            splits,
            BN=units.BN,
            G=G,
            KS=_FEW,
            K=UNITS,
            KEPT=KEPT,
            C=triton.next_power_of_2(splits * _FEW),
            S=triton.next_power_of_2(splits),
            BR=BR,
            ALL=everything,
            num_warps=4,
        )

    def _by_position(self, rows: torch.Tensor, component: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows as cloud * stride + position, components [B, stride] by position)."""
        B, n = self.B, self.n
        if self._place is None:
            point = torch.arange(n, device=rows.device)
            self._place = torch.empty_like(self.order).scatter_(1, self.order, point.expand(B, n))
        cloud = torch.div(rows, n, rounding_mode="floor")
        by_position = torch.nn.functional.pad(component.gather(1, self.order), (0, self.stride - n), value=-1)
        return cloud * self.stride + self._place.view(-1)[rows], by_position

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
        position, component = self._by_position(rows, component)
        tiles = row_tiles(position, self.B, self.stride, BM)
        blocks = self.block_norm.shape[1]
        per_split = triton.cdiv(blocks, tiles.splits(blocks))
        reach = self._distance_of(cap, torch.div(rows, self.n, rounding_mode="floor"))
        total = torch.zeros(1, dtype=torch.int64, device=rows.device)
        count = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)
        slot, column = (torch.empty(self.capacity, dtype=torch.int32, device=rows.device) for _ in range(2))
        list_within_kernel[(len(tiles.cloud), triton.cdiv(blocks, per_split))](
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
            self.stride,
            self.shape.DP,
            blocks,
            per_split,
            self.capacity,
            self.gamma,
            WHOLE=self.shape.BK == self.shape.DP,
            BK=self.shape.BK,
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

    def _distance_of(self, weight: torch.Tensor, cloud: torch.Tensor) -> torch.Tensor:
        """No point that weighs at most this [M] is farther; float32, at most 2^20, beyond any distance."""
        relative, absolute = self._slack()
        root = ((weight.to(torch.float64) + absolute) * (1 + 2 * relative)).sqrt() * (1 + 2.0**-50)
        return (times_power(root, -self.exponent[cloud]) * (1 + 2.0**-20)).clamp_(max=2.0**20).to(torch.float32)
