"""Texts through an encoder one after another, without padding: [1, T] in the place of [b, T].

A Linear, a LayerNorm and an activation function see no texts, only tokens. Positions are given, and attention is told
where each text begins, by kernels that torch uses for nested tensors. They are no public face of torch, so before the
first use they are tried against plain attention on this device; where they refuse or differ, texts are padded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from obce.corpus import Batch, Pack, TokenBatches
from obce.device import upload

if TYPE_CHECKING:
    from numpy.typing import NDArray

PACKED_BATCHES = 4
"""A pack has as many tokens as so many full batches have places: there is no padding, and fewer passes to launch."""

_BATCH_TOKENS = 4096  # where batches are of so many texts
_NAME = "obce_packed"
_bounds: list[tuple[torch.Tensor, NDArray[np.int64]]] = []  # starts and end of the pack under way, lengths of its texts


def packs(body: nn.Module, batches: TokenBatches) -> Iterator[Pack] | None:
    """The texts in packs, or None where this model cannot take them."""
    config: Any = body.config
    # the families whose positions count from 0 and whose attention goes through transformers' interface
    if config.model_type not in ("bert",) or getattr(config, "is_decoder", False):
        return None
    if getattr(config, "position_embedding_type", "absolute") not in (None, "absolute"):
        return None
    if config._attn_implementation != "sdpa":
        return None
    weight = next(body.parameters())
    if not _works(weight.device, weight.dtype, config.hidden_size // config.num_attention_heads):
        return None
    return batches.packs(PACKED_BATCHES * (batches.batch_tokens or _BATCH_TOKENS))


@contextmanager
def packing(body: nn.Module, texts: Batch | Pack) -> Iterator[None]:
    """Inside the `with`, the model takes these texts if they are a pack; of a batch it knows by itself."""
    if not isinstance(texts, Pack):
        yield
        return
    lengths = texts.lengths
    config: Any = body.config
    before = config._attn_implementation
    device = next(body.parameters()).device
    _bounds.append((upload(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), device), lengths))
    try:
        config._attn_implementation = _register()
        yield
    finally:
        config._attn_implementation = before
        _bounds.pop()


@functools.cache
def _register() -> str:
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attention)
    return _NAME


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    del module, attention_mask
    starts, lengths = _bounds[-1]
    return _attend(query, key, value, starts, lengths, scaling), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    lengths: NDArray[np.int64],
    scaling: float | None,
) -> torch.Tensor:
    """[1, T, heads, d] from [1, heads, T, d] each: a token attends to those of its text alone."""
    if not query.is_cuda:
        return _one_by_one(query, key, value, lengths, scaling)
    longest = int(lengths.max())
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    if query.dtype in (torch.float16, torch.bfloat16):
        flat: tuple[Any, ...] = query[0], key[0], value[0], starts, starts, longest, longest, 0.0, False, False
        found: torch.Tensor = torch.ops.aten._flash_attention_forward(*flat, scale=scaling)[0]
        return found[None]
    parts: tuple[Any, ...] = query, key, value, None, starts, starts, longest, longest, 0.0, 0
    wide: torch.Tensor = torch.ops.aten._efficient_attention_forward(*parts, scale=scaling)[0]
    return wide


def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: NDArray[np.int64], scaling: float | None
) -> torch.Tensor:
    parts = (torch.split(part, lengths.tolist(), 2) for part in (query, key, value))
    each = [scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(each, 2).transpose(1, 2)


@functools.cache
def _works(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether the kernels are there and right for heads of this size."""
    if device.type != "cuda":
        return True
    lengths = np.array([70, 1, 13, 5, 128], np.int64)
    generator = torch.Generator(device).manual_seed(0)
    shape = (3, 1, int(lengths.sum()), 2 * size)
    drawn = torch.randn(shape, device=device, generator=generator).to(dtype)
    query, key, value = (part.view(1, -1, 2, size).transpose(1, 2) for part in drawn)
    starts = upload(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), device)
    try:
        found = _attend(query, key, value, starts, lengths, size**-0.5)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    right = _one_by_one(query, key, value, lengths, size**-0.5)
    return bool((found.float() - right.float()).abs().max() < (2e-2 if dtype != torch.float32 else 1e-4))
