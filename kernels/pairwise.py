"""Fused squared distances and nearest foreign neighbour.

For each point i of a cloud: min over j with component[j] != component[i] of (w(i, j), j), where

    w(i, j) = fma chain over k = 0..d-1 of (x_ik - x_jk)^2        d >= 2
    w(i, j) = |x_i - x_j|                                         d = 1

which are the weights of obce/reference.py, bit for bit: `tl.fma` rounds once, and coordinates are taken in order.
Among equal weights the smallest j is the least edge {i, j} in the order (weight, smaller end, larger end), see
csrc/ph0_core.h. This is one round of Boruvka (ArborX, Prokopenko et al., ICPP 2022, does it on a tree).

Shapes: X [B, n, d] contiguous, float32 or float64; component [B, n] int32; weight [B, n] as X; index [B, n] int32.
A row without a foreign point, and a row at or beyond its cloud's length, gets weight +inf and index n.
Memory: no n x n array; a program keeps BM x BN weights in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def nearest_foreign_kernel(
    p_x,
    p_component,
    p_lengths,
    p_weight,
    p_index,
    n,
    d,
    ONE_COORDINATE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One block of BM rows of one cloud against all its points; shapes in the module docstring."""
    i_cloud = tl.program_id(1).to(tl.int64)
    length = tl.load(p_lengths + i_cloud)
    p_x += i_cloud * n * d
    p_component += i_cloud * n
    i_row = tl.program_id(0) * BM + tl.arange(0, BM)
    o_row = i_row.to(tl.int64) * d
    m_row = i_row < length
    own = tl.load(p_component + i_row, mask=m_row, other=-1)
    # [BM]
    best = tl.full((BM,), float("inf"), p_x.dtype.element_ty)
    nearest = tl.zeros((BM,), tl.int32) + n
    i_start = 0
    while i_start < length:
        i_col = i_start + tl.arange(0, BN)
        o_col = i_col.to(tl.int64) * d
        m_col = i_col < length
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
    m_out = i_row < n
    tl.store(p_weight + i_cloud * n + i_row, best, mask=m_out)
    tl.store(p_index + i_cloud * n + i_row, nearest, mask=m_out)


def nearest_foreign(
    x: torch.Tensor, component: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest point of another component for every point of every cloud.

    Args:
        x: [B, n, d] contiguous, float32 or float64, already scaled (obce.reference.scaled).
        component: [B, n] int32 labels; equal label, same component.
        lengths: [B] int32 points of each cloud.

    Returns:
        (weight [B, n] in the dtype of x, index [B, n] int32); (+inf, n) where there is no foreign point.
    """
    B, n, d = x.shape
    weight = torch.empty((B, n), dtype=x.dtype, device=x.device)
    index = torch.empty((B, n), dtype=torch.int32, device=x.device)
    BM = BN = 64
    nearest_foreign_kernel[(triton.cdiv(n, BM), B)](
        x, component, lengths, weight, index, n, d, ONE_COORDINATE=d == 1, BM=BM, BN=BN, num_warps=4
    )
    return weight, index
