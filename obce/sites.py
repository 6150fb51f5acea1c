"""Where the neurons of a model are: its Linears, who writes a neuron and who reads it.

A model is resolved by its structure (a stack of layers that each hold the six Linears below, of the widths
that its config states), not by module names counted from its root, so `BertModel` and every `BertFor*` give
the same sites. Only encoders of the family `bert` are known.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SITE_KINDS = ("query", "key", "value", "attention_output", "intermediate", "output")

SUPPORTED_FAMILIES = ("bert",)

DEFAULT_MAX_LENGTH = 128
"""Tokens a text is cut to when none are named."""

WRITERS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}
"""The Linear of each kind, relative to its layer."""

# Query and key are read by the attention product; attention_output and output write the residual stream.
_READERS = {"value": "attention.output.dense", "intermediate": "output.dense"}
_PER_HEAD = ("query", "key", "value")


@dataclass(frozen=True, slots=True)
class Site:
    """One kind of neuron in one layer.

    Attributes:
        layer: Layer number, from 0.
        kind: One of `SITE_KINDS`.
        writer: Name of the Linear whose rows are the neurons, relative to the base model.
        reader: Name of the Linear whose columns consume them, relative to the base model; None for query and
            key (read by the attention product) and for attention_output and output (they write the residual
            stream).
        width: Number of neurons.
        heads: Number of heads the width is split into, in order; 1 for kinds that have none.
    """

    layer: int
    kind: str
    writer: str
    reader: str | None
    width: int
    heads: int

    @property
    def name(self) -> str:
        """`"5.intermediate"`; neuron 830 of it is `"5.intermediate.830"`."""
        return f"{self.layer}.{self.kind}"


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The encoder inside a model with a head; a bare encoder is its own."""
    inner = getattr(model, getattr(model, "base_model_prefix", "") or "base_model", model)
    return inner if isinstance(inner, nn.Module) else model  # type: ignore[return-value]


def find_sites(model: PreTrainedModel) -> list[Site]:
    """All sites of a BERT encoder, layer by layer, each in the order of `SITE_KINDS`.

    Args:
        model: `BertModel` or any `BertFor*`.

    Raises:
        ValueError: The model is of another family, a decoder, already pruned by obce, or its Linears are not
            the plain ones that its config describes (adapters, quantized weights, other widths).
    """
    _refuse_unknown_family(model)
    base = base_model(model)
    stack = _layer_stack(base, type(model).__name__)
    config = base.config
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    widths = dict.fromkeys(SITE_KINDS, hidden) | {"intermediate": inner}
    inputs = dict.fromkeys(SITE_KINDS, hidden) | {"output": inner}
    sites = []
    for layer in range(len(base.get_submodule(stack))):  # type: ignore[arg-type]
        prefix = f"{stack}.{layer}."
        for kind in SITE_KINDS:
            writer = prefix + WRITERS[kind]
            _check_linear(base.get_submodule(writer), f"{type(model).__name__}: {writer}", inputs[kind], widths[kind])
            reader = prefix + _READERS[kind] if kind in _READERS else None
            sites.append(Site(layer, kind, writer, reader, widths[kind], heads if kind in _PER_HEAD else 1))
    return sites


def usable_max_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> int:
    """Tokens a text is cut to: as asked, else `DEFAULT_MAX_LENGTH` or the most that model and tokenizer take.

    Raises:
        ValueError: More was asked than the model has positions.
    """
    positions = int(base_model(model).config.max_position_embeddings)
    if max_length is None:
        return min(DEFAULT_MAX_LENGTH, positions, int(tokenizer.model_max_length))
    if max_length > positions:
        raise ValueError(f"max_length is {max_length}, but the model has {positions} positions: ask for at most that")
    return max_length


def model_hash(model: PreTrainedModel) -> str:
    """Fingerprint of the weights that a score depends on: embeddings and encoder, without pooler and heads.

    Name (relative to the base model), shape and values of every parameter, in the order of the names, so
    `BertModel` and a `BertFor*` with the same body agree, wherever the weights lie. Half precision counts as the
    float32 numbers it stands for: a checkpoint scored in float32 is the one that is pruned in half. Read one
    tensor at a time; a float32 model on the CPU is not copied.

    Returns:
        64 hexadecimal digits (BLAKE2b).

    Raises:
        ValueError: The model has no embeddings and encoder, or some of its weights are not in memory.
    """
    digest = hashlib.blake2b(digest_size=32)
    parameters = sorted(_body_parameters(model))
    if not parameters:
        raise ValueError(
            f"model is a {type(model).__name__} without modules 'embeddings' and 'encoder', expected a BERT encoder."
        )
    for name, parameter in parameters:
        if parameter.is_meta:
            raise ValueError(
                f"model holds no data for '{name}' (meta device), expected all weights in memory; "
                "load the model without offloading."
            )
        wide = torch.promote_types(parameter.dtype, torch.float32)
        digest.update(f"{name}\0{wide}\0{tuple(parameter.shape)}\0".encode())
        digest.update(parameter.detach().to("cpu", wide).contiguous().reshape(-1).numpy().data)
    return digest.hexdigest()


def architecture(model: PreTrainedModel) -> dict[str, int | str]:
    """Facts of a model that a person, a file or a plan needs to know it by; plain JSON values.

    Returns:
        `model_type`, `class`, `dtype` (of the encoder), the sizes that its config states, `pooler` (whether
        there is one), `parameters` (distinct ones, heads included), `encoder_parameters`, `weight_bytes` (of
        the distinct parameters) and `encoder_element_bytes` (of one encoder weight).
    """
    base = base_model(model)
    config = base.config
    encoder = base.get_submodule("encoder")
    weight = next(encoder.parameters())
    facts: dict[str, int | str] = {"model_type": str(config.model_type), "class": type(model).__name__}
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "type_vocab_size",
    ):
        facts[name] = int(getattr(config, name))
    facts["hidden_act"] = str(config.hidden_act)
    facts["dtype"] = str(weight.dtype).removeprefix("torch.")
    facts["pooler"] = getattr(base, "pooler", None) is not None
    # parameters() yields a tied parameter once
    facts["parameters"] = sum(p.numel() for p in model.parameters())
    facts["encoder_parameters"] = sum(p.numel() for p in encoder.parameters())
    facts["weight_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    facts["encoder_element_bytes"] = weight.element_size()
    return facts


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Holds back transformers' loading report and bars: what matters in them is raised as an error instead."""
    from transformers import utils

    logging: Any = utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _body_parameters(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in base_model(model).named_parameters():
        if name.startswith(("embeddings.", "encoder.")):
            yield name, parameter


def _refuse_unknown_family(model: PreTrainedModel) -> None:
    cls = type(model).__name__
    known = ", ".join(f"'{family}'" for family in SUPPORTED_FAMILIES)
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family == "obce_bert":
        raise ValueError(
            f"model is a {cls}, which obce has already pruned, expected a dense model: scoring and pruning a "
            "pruned model again is not supported yet; start from the dense checkpoint."
        )
    if family not in SUPPORTED_FAMILIES:
        raise ValueError(
            f"model is a {cls} of the family {family!r}, expected an encoder of a supported family "
            f"({known}), for example BertModel or BertForSequenceClassification."
        )
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(
            f"model is a {cls} set up as a decoder (config.is_decoder or config.add_cross_attention), "
            "expected an encoder; load it with is_decoder=False and add_cross_attention=False."
        )


def _layer_stack(base: PreTrainedModel, cls: str) -> str:
    """Name of the one ModuleList whose every member holds the six Linears of a BERT layer."""
    found: list[str] = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0 and all(map(_holds_writers, module))
    ]
    if len(found) != 1:
        raise ValueError(
            f"model is a {cls} with {len(found)} stacks of layers that hold {', '.join(WRITERS.values())}, "
            "expected exactly one."
        )
    return found[0]


def _holds_writers(layer: nn.Module) -> bool:
    names = {name for name, _ in layer.named_modules()}
    return names.issuperset(WRITERS.values())


def _check_linear(module: nn.Module, where: str, inputs: int, width: int) -> None:
    if not isinstance(module, nn.Linear) or module.bias is None:
        raise ValueError(
            f"model {where} is a {type(module).__name__}, expected a torch.nn.Linear with a bias; merge or "
            "remove adapters first."
        )
    # A quantized Linear is a subclass that keeps packed integers of another shape.
    if tuple(module.weight.shape) != (width, inputs) or not module.weight.is_floating_point():
        raise ValueError(
            f"model {where} has a {str(module.weight.dtype).removeprefix('torch.')} weight of shape "
            f"{tuple(module.weight.shape)}, expected floating point of shape {(width, inputs)} as its config "
            "states; load the dense, unquantized checkpoint."
        )
