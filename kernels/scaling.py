"""Exact powers of two on a device, and the scaling of clouds by them (obce.reference.scaled)."""

from __future__ import annotations

import numpy as np
import torch
from obce.reference import SAFE_EXPONENTS


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
