"""Exact powers of two on a device, and the scaling of clouds by them (obce.reference.scaled)."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from obce.reference import SAFE_EXPONENTS

_BLOCK, _STEPS = 2048, 8


@triton.jit
def largest_kernel(p_x, p_bits, size, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """bits [B] = the largest of each cloud's magnitudes as bits; these are in the order of magnitudes, NaN the largest.

    x is [B, size], a program takes STEPS BLOCK values of a cloud.
    """
    i_cloud = tl.program_id(1).to(tl.int64)
    bits = p_bits.dtype.element_ty
    sign = tl.full((1,), 1, bits) << (p_bits.dtype.element_ty.primitive_bitwidth - 1)
    largest = tl.zeros((BLOCK,), bits)
    for step in range(STEPS):
        at = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(p_x + i_cloud * size + at, mask=at < size, other=0.0)
        largest = tl.maximum(largest, x.to(bits, bitcast=True) & ~sign)
    tl.atomic_max(p_bits + i_cloud, tl.max(largest, axis=0))


def spans(x: torch.Tensor) -> bool:
    """Whether all of x is finite and `scaled` would leave it as it is, -0 apart.

    Args:
        x: [B, n, d] contiguous, float32 or float64.
    """
    B, n, d = x.shape
    bits = torch.zeros(B, dtype=torch.int32 if x.dtype == torch.float32 else torch.int64, device=x.device)
    largest_kernel[(triton.cdiv(n * d, _BLOCK * _STEPS), B)](x, bits, n * d, BLOCK=_BLOCK, STEPS=_STEPS)
    largest = bits.view(x.dtype)
    low, high = SAFE_EXPONENTS[np.dtype(str(x.dtype).removeprefix("torch."))] if d > 1 else (-2000, 2000)
    exponent = torch.frexp(largest)[1]
    return bool((torch.isfinite(largest) & (low <= exponent) & (exponent <= high)).all())


def _power(exponent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """2^exponent, put together from bits (pow and ldexp need not be exact on a device); exponent is normal."""
    if dtype == torch.float32:
        return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)
    return ((exponent + 1023) << 52).view(torch.float64)


def times_power(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """x * 2^exponent in two factors: either alone is a normal number, and at most the second product rounds.

    Args:
        x: float32 or float64, any shape.
        exponent: int64, broadcast against x; half of it is an exponent of a normal number.

    Returns:
        The product, in the dtype of x.
    """
    half = exponent >> 1
    return x * _power(half, x.dtype) * _power(exponent - half, x.dtype)


def factors(exponent: torch.Tensor) -> torch.Tensor:
    """[B, 2] float64, the two factors with which `times_power` multiplies by 2^exponent [B]."""
    half = exponent >> 1
    return torch.stack([_power(half, torch.float64), _power(exponent - half, torch.float64)], 1)


def scaled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """obce.reference.scaled for every cloud of a batch.

    Args:
        x: [B, n, d], float32 or float64, finite.

    Returns:
        (scaled clouds [B, n, d], exponent [B] int64).
    """
    x = x + 0  # -0 -> +0
    exponent = torch.frexp(x.abs().amax((1, 2)))[1].to(torch.int64)
    if x.shape[2] == 1:
        return x, torch.zeros_like(exponent)
    low, high = SAFE_EXPONENTS[np.dtype(str(x.dtype).removeprefix("torch."))]
    exponent = torch.where((exponent < low) | (exponent > high), exponent, 0)
    return times_power(x, -exponent[:, None, None]), exponent
