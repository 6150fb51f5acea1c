"""Measure a model: parameters, bytes, FLOPs, sentence vectors, latency.

Everything here is measured on the model that is handed over, nothing is predicted; `obce.plan` predicts, and
these numbers are what a prediction is checked against. No function leaves a trace on the model: the training
flags and the attention implementation are put back, also after an error.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from obce.capture import eval_mode, read_texts
from obce.corpus import Batch
from obce.plan import FLOPS_LENGTH
from obce.sites import (
    SITE_KINDS,
    base_model,
    encoder_of,
    layers_of,
    layout_of,
    matrix,
    picture_shape,
    usable_positions,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

POOLINGS = ("mean", "cls", "last")


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds that one model took for one pass over the batches, round by round.

    Attributes:
        seconds: wall-clock seconds of each timed pass.
        reference: seconds of the first model's pass in the same rounds.
    """

    seconds: tuple[float, ...]
    reference: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds of a pass."""
        return median(self.seconds)

    @property
    def minimum(self) -> float:
        """Seconds of the fastest pass."""
        return min(self.seconds)

    @property
    def maximum(self) -> float:
        """Seconds of the slowest pass."""
        return max(self.seconds)

    @property
    def ratio(self) -> float:
        """Seconds over the first model's in the same round, median over rounds; below 1 is faster."""
        return median(own / first for own, first in zip(self.seconds, self.reference, strict=True))


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Count the distinct parameters of a model and of its encoder.

    A parameter that stands in two places (tied input and output embeddings) counts once.

    Args:
        model: an encoder with or without a head.

    Returns:
        `(total, encoder)`: all parameters, pooler and heads included, and those of the module that holds the layers.

    Raises:
        ValueError: the model is of a family that obce does not know.
    """
    # parameters() yields each parameter object once, which is what makes tied weights count once
    return _numel(model), _numel(encoder_of(model))


def site_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of the Linears of each kind of site, over all layers.

    Args:
        model: an encoder or a model pruned by obce, with or without a head.

    Returns:
        Kind in `obce.sites.SITE_KINDS` -> parameters, 0 where nothing of the kind is left.
    """
    found = dict.fromkeys(SITE_KINDS, 0)
    layout = layout_of(model)
    for layer in layers_of(model):
        modules: dict[str, Any] = dict(layer.named_modules())
        for name in dict.fromkeys(name for kind in SITE_KINDS for name in layout.linears(kind)):
            kinds = [kind for kind in SITE_KINDS if name in layout.linears(kind)]
            if name not in modules:
                continue
            whole = _numel(modules[name])
            if len(kinds) == 1:
                found[kinds[0]] += whole
                continue
            # of one Linear for several kinds: what a reader takes in is as wide as its kind, the others are alike
            rows = len(matrix(modules[name]))
            read = {kind: _inputs(modules[reader]) for kind in kinds if (reader := layout.reader(kind))}
            for kind in kinds:
                width = read.get(kind, (rows - sum(read.values())) // max(1, len(kinds) - len(read)))
                found[kind] += whole // rows * width
    return found


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the distinct parameters in their own dtypes: what the data part of a safetensors file holds.

    Args:
        model: any module.

    Returns:
        Bytes; the header of the file and non-persistent buffers are not in it.
    """
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def flops(model: PreTrainedModel, *, length: int | None = None, batch: int = 1) -> int:
    """Floating-point operations of one forward pass of the base model, measured with torch's FLOP counter.

    Counted are matrix products, two operations for a multiply-add: for a sequence of T tokens each Linear
    applied to every token counts `2 * T * rows * columns`, the pooler, which is applied to [CLS] alone,
    `2 * rows * columns`, and each layer's attention `2 * T * T * qk_width + 2 * T * T * v_width`
    (scores, then weighted sum, over all heads together), all of it times `batch`; of pictures also the product that
    makes tokens of their patches. Biases, softmax, LayerNorm,
    activation functions, embedding look-ups, the angles of rotary positions and a task's head are not counted. The
    model runs without padding and with eager attention, because the fused kernels hide their two products from the
    counter on some devices. `Plan.before.flops` and `Plan.after.flops` predict this number.

    Args:
        model: an encoder of transformers with or without a head.
        length: tokens of each sequence (default: `obce.plan.FLOPS_LENGTH`, or those of a picture).
        batch: number of sequences.

    Returns:
        The number of operations, an exact integer.

    Raises:
        ValueError: `length` or `batch` is below 1, `length` is above the model's positions, or the model
            cannot run with eager attention.
    """
    body = base_model(model)
    positions, pictures = usable_positions(model), layout_of(model).pictures
    length = (positions if pictures else FLOPS_LENGTH) if length is None else length
    if not (positions if pictures else 1) <= length <= positions:
        raise ValueError(
            f"length: found {length}, expected 1 to {positions} tokens; choose a length that the model's position "
            "embeddings cover."
        )
    if batch < 1:
        raise ValueError(f"batch: found {batch}, expected at least 1; pass the number of sequences to count.")
    inputs = _zeros(body, batch, length)
    with (
        eval_mode(body),
        _eager_attention(body),
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
    ):
        body(**inputs)
    # angles, which some versions of transformers make by a product
    angles = (sum(one.values()) for name, one in counter.get_flop_counts().items() if name.endswith(".rotary_emb"))
    return int(counter.get_total_flops()) - int(sum(angles))


def _zeros(body: PreTrainedModel, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Inputs of a model that say nothing."""
    device = _device(body)
    if layout_of(body).pictures:
        return {"pixel_values": torch.zeros(batch, *picture_shape(body), device=device)}
    ids = torch.zeros(batch, length, dtype=torch.long, device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def embed(model: PreTrainedModel, batches: Iterable[Batch], *, pooling: str = "mean") -> NDArray[np.float32]:
    """Sentence vectors from the last hidden state of the base model; heads and pooler output are not used.

    Args:
        model: an encoder with or without a head.
        batches: token batches, for instance from `obce.corpus.tokenize`; their indices cover 0 to n_texts - 1
            once each.
        pooling: "mean" over the real tokens (attention mask 1), "cls" for the first token, or "last" for the last.

    Returns:
        float32 `[n_texts, hidden]`, row i for text i, whatever the order of the batches.

    Raises:
        ValueError: unknown pooling, no texts, indices that are not 0 to n_texts - 1 once each, or a vector
            that is not finite.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: found {pooling!r}, expected one of {', '.join(POOLINGS)}; choose one of them.")
    body = base_model(model)
    device = _device(model)
    positions: list[NDArray[np.int64]] = []
    vectors: list[NDArray[np.float32]] = []
    with eval_mode(model), torch.no_grad():
        for batch in batches:
            inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
            hidden = body(**inputs).last_hidden_state.float()  # [b, T, hidden]
            pooled = read_texts(hidden, torch.from_numpy(batch.lengths).to(device), pooling)
            positions.append(np.asarray(batch.indices, dtype=np.int64))
            vectors.append(pooled.cpu().numpy())
    if not positions:
        raise ValueError("batches: found no batch, expected at least one; pass a corpus that is not empty.")
    order = np.concatenate(positions)
    rows = np.concatenate(vectors)
    if not np.array_equal(np.sort(order), np.arange(len(rows))):
        raise ValueError(
            f"batches: found indices from {order.min()} to {order.max()} for {len(rows)} texts, expected "
            f"each of 0 to {len(rows) - 1} once; pass the batches of one whole corpus."
        )
    result = np.empty_like(rows)
    result[order] = rows
    unusable = np.flatnonzero(~np.isfinite(result).all(axis=1))
    if len(unusable):
        raise ValueError(
            f"model: the vector of text {unusable[0]} is not finite ({len(unusable)} of {len(rows)} texts), "
            "expected finite numbers; check the model's weights and dtype."
        )
    return result


def fidelity(reference: NDArray[Any], other: NDArray[Any]) -> float:
    """Mean cosine between the rows of two sets of sentence vectors, computed in float64.

    It says how far one model's vectors still point where the other's do. It is not a task score.

    Args:
        reference: `[n_texts, hidden]`, usually of the dense model.
        other: `[n_texts, hidden]`, the same texts in the same order.

    Returns:
        A number from -1 to 1; 1 when every pair of rows has the same direction.

    Raises:
        ValueError: shapes differ or are not `[n_texts, hidden]` with at least one row, or a row is zero or
            not finite.
    """
    first, second = np.asarray(reference, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 2 or not len(first):
        raise ValueError(
            f"other: found shape {second.shape} beside a reference of shape {first.shape}, expected the same "
            "[n_texts, hidden] with at least one row; embed the same texts with both models."
        )
    directions = []
    for name, rows in (("reference", first), ("other", second)):
        # scaled first, so that very large or very small numbers neither overflow nor vanish when squared
        scale = np.abs(rows).max(axis=1, initial=0.0)
        unusable = np.flatnonzero(~(np.isfinite(scale) & (scale > 0)))
        if len(unusable):
            raise ValueError(
                f"{name}: row {unusable[0]} is zero or not finite ({len(unusable)} of {len(rows)} rows), "
                "expected rows with a direction; a cosine is not defined for it, so drop that text from both."
            )
        scaled = rows / scale[:, None]
        directions.append(scaled / np.linalg.norm(scaled, axis=1, keepdims=True))
    cosines = np.einsum("nd,nd->n", directions[0], directions[1])
    return float(np.clip(cosines.mean(), -1.0, 1.0))


def latency(models: Mapping[str, torch.nn.Module], batches: Iterable[Batch], *, repeats: int = 5) -> dict[str, Latency]:
    """Time forward passes of several models against each other in one run.

    The models take turns, one pass over all batches each, and every round starts with another model, so that
    a machine that slows down or warms up does so for all of them. One untimed pass of each comes first.
    Tokenising and copying to the device happen before the clock starts. On CUDA the device is synchronised at
    both ends.

    Args:
        models: models by name, all on one device; the first is the reference of `Latency.ratio`.
        batches: token batches; all of them are held on the models' device.
        repeats: timed passes of each model.

    Returns:
        One `Latency` a model, in the order of `models`.

    Raises:
        ValueError: no models, no batches, `repeats` below 1, or models on different devices.
    """
    if not models:
        raise ValueError("models: found none, expected at least one named model; pass a mapping of name to model.")
    if repeats < 1:
        raise ValueError(f"repeats: found {repeats}, expected at least 1; pass the number of timed passes.")
    devices = {name: _device(model) for name, model in models.items()}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"models: found {found}, expected one device; move all models to the same device.")
    device = next(iter(devices.values()))
    inputs = [{name: tensor.to(device) for name, tensor in batch.inputs.items()} for batch in batches]
    if not inputs:
        raise ValueError("batches: found no batch, expected at least one; pass a corpus that is not empty.")

    names = list(models)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with eval_mode(*models.values()), torch.inference_mode():
        for name in names:
            _timed_pass(models[name], inputs, device)
        for turn in range(repeats):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                seconds[name].append(_timed_pass(models[name], inputs, device))
    first = tuple(seconds[names[0]])
    return {name: Latency(tuple(seconds[name]), first) for name in names}


def _timed_pass(model: torch.nn.Module, inputs: list[dict[str, torch.Tensor]], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for batch in inputs:
        model(**batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _inputs(linear: torch.nn.Module) -> int:
    """Inputs of a Linear; of one that has none left 0."""
    return 0 if linear.weight is None else int(matrix(linear).shape[1])


def _numel(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    try:
        if before != "eager":
            model.set_attn_implementation("eager")
        # transformers only warns when a model cannot change it, and the count would be wrong in silence
        found = model.config._attn_implementation
        if found != "eager":
            raise ValueError(
                f"model: {type(model).__name__} stays with attention {found!r}, expected 'eager', in which "
                "every matrix product is counted; load it with attn_implementation='eager'."
            )
        yield
    finally:
        if before != "eager":
            model.set_attn_implementation(before)
