"""Minimum spanning trees of a batch of clouds: Boruvka rounds over pairwise.nearest_foreign.

Each round every component takes its least outgoing edge in the order (weight, smaller end, larger end). The order
is strict, so the only cycles among the chosen edges are pairs of components that chose the same edge (two trees
that chose each other chose the least edge between them). The smaller label of such a pair stays a root, and its
copy of the edge is dropped. At most ceil(log2 n) rounds.

Everything but the distances is torch on [B n] arrays; components of different clouds never meet because labels are
global (cloud * n + point).
"""

from __future__ import annotations

import numpy as np
import torch
from obce.kernels.pairwise import nearest_foreign
from obce.reference import SAFE_EXPONENTS

_LARGEST = torch.iinfo(torch.int64).max


def _power(exponent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """2^exponent, put together from bits (pow and ldexp need not be exact on a device); exponent is normal."""
    if dtype == torch.float32:
        return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)
    return ((exponent + 1023) << 52).view(torch.float64)


def _times_power(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """x * 2^exponent in two factors: either alone is a normal number, and at most the second product rounds."""
    half = exponent >> 1
    return x * _power(half, x.dtype) * _power(exponent - half, x.dtype)


def _root(x: torch.Tensor) -> torch.Tensor:
    """Correctly rounded square root. CUDA's is; torch on the host may call a vector library whose root is not."""
    return torch.sqrt(x) if x.is_cuda else torch.as_tensor(np.sqrt(x.numpy()))


def _scaled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """obce.reference.scaled for every cloud of [B, n, d]: (scaled cloud, exponent [B])."""
    x = x + 0  # -0 -> +0
    exponent = torch.frexp(x.abs().amax((1, 2)))[1].to(torch.int64)
    if x.shape[2] == 1:
        return x, torch.zeros_like(exponent)
    low, high = SAFE_EXPONENTS[np.dtype(str(x.dtype).removeprefix("torch."))]
    exponent = torch.where((exponent < low) | (exponent > high), exponent, 0)
    return _times_power(x, -exponent[:, None, None]), exponent


def _flatten(parent: torch.Tensor) -> torch.Tensor:
    """Root of every node by pointer jumping; parent has no cycle but roots."""
    while True:
        above = parent[parent]
        if torch.equal(above, parent):
            return parent
        parent = above


def clouds_h0(points: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Deaths and edges of clouds, as obce.reference.clouds_h0.

    Args:
        points: [B, n, d], float32 or float64.
        lengths: [B] integers or None.

    Returns:
        (deaths [B, n - 1], edges [B, n - 1, 2] int64) on the device of points.
    """
    B, n, _ = points.shape
    device = points.device
    size = torch.full((B,), n, device=device) if lengths is None else lengths.to(torch.int64)
    deaths = torch.full((B, n - 1), torch.nan, dtype=points.dtype, device=device)
    edges = torch.full((B, n - 1, 2), -1, dtype=torch.int64, device=device)
    if B == 0 or n == 1:
        return deaths, edges
    column = torch.arange(n, device=device)
    inside = column < size[:, None]
    x = torch.where(inside[:, :, None], points, 0)
    finite = torch.isfinite(x).all(2).all(1)
    size = torch.where(finite, size, 1)  # a cloud that is not finite has no edges, and its deaths stay NaN
    x, exponent = _scaled(torch.where(finite[:, None, None], x, 0))
    x = x.contiguous()

    cloud = torch.arange(B, device=device)[:, None].expand(B, n).reshape(-1)  # [B n]
    point = column.expand(B, n).reshape(-1)
    label = cloud * n + point
    size32 = size.to(torch.int32)
    found = []
    missing = int((size - 1).sum())
    while missing:
        component = (label - cloud * n).to(torch.int32).view(B, n)
        weight, index = (part.view(-1) for part in nearest_foreign(x, component, size32))
        has = index < n
        least = torch.full_like(weight, torch.inf).scatter_reduce(0, label[has], weight[has], "amin")
        row = has & (weight == least[label])
        near = index.to(torch.int64)
        pair = torch.minimum(point, near) * n + torch.maximum(point, near)
        chosen = torch.full_like(label, _LARGEST).scatter_reduce(0, label[row], pair[row], "amin")
        root = torch.nonzero(chosen < _LARGEST)[:, 0]
        lo = torch.div(chosen[root], n, rounding_mode="floor")
        hi = chosen[root] - lo * n
        base = cloud[root] * n
        at_lo, at_hi = label[base + lo], label[base + hi]
        parent = torch.arange(B * n, device=device)
        parent[root] = torch.where(at_lo == root, at_hi, at_lo)
        stays = (parent[parent[root]] == root) & (root < parent[root])
        parent[root[stays]] = root[stays]
        joins = ~stays
        found.append((cloud[root][joins], least[root][joins], chosen[root][joins]))
        missing -= int(joins.sum())
        label = _flatten(parent)[label]

    if found:
        of, weight, pair = (torch.cat(part) for part in zip(*found, strict=True))
        order = torch.argsort(pair)
        for key in (weight, of):  # stable, so the keys sorted by before decide ties
            order = order[torch.argsort(key[order], stable=True)]
        of, weight, pair = of[order], weight[order], pair[order]
        first = torch.cumsum(size - 1, 0) - (size - 1)
        place = torch.arange(len(of), device=device) - first[of]
        length = weight if points.shape[2] == 1 else _root(weight)
        deaths[of, place] = _times_power(length, exponent[of])
        lo = torch.div(pair, n, rounding_mode="floor")
        edges[of, place] = torch.stack([lo, pair - lo * n], 1)
    return deaths, edges
