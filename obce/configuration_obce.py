"""Configuration of a BERT encoder whose layers have unequal widths.

This file is copied into checkpoints: it imports nothing of obce. Annotations are evaluated, not deferred by
`from __future__ import annotations`, because `@strict` checks values against them.
"""

from typing import Any, NamedTuple

from huggingface_hub.dataclasses import strict
from transformers.models.bert.configuration_bert import BertConfig


class LayerWidths(NamedTuple):
    """Neurons that one layer keeps.

    Attributes:
        query_key: Width of query, and of key; the same number in every head.
        value: Width of value; the same number in every head.
        intermediate: Width of intermediate.
    """

    query_key: int
    value: int
    intermediate: int


_KEYS = ("kept_query_key_size", "kept_value_size", "kept_intermediate_size")


@strict
class ObceBertConfig(BertConfig):
    """Configuration of `ObceBertModel` and its heads.

    A `BertConfig` whose `hidden_size`, `num_attention_heads` and `intermediate_size` are those of the dense
    model (attention keeps that model's scale), plus the widths of each layer. They stand in transformers'
    `per_layer_config` under keys of our own, because BERT's own keys do not say what is meant: reading
    `intermediate_size` there would hide the dense value, and `hidden_size / num_attention_heads` is no
    longer a head's size.

    Args:
        per_layer_config: Layer number -> `{"kept_query_key_size": int, "kept_value_size": int,
            "kept_intermediate_size": int}`, for every layer; None: all layers as wide as the dense model.
        obce: How the model was made (score, preset, repair, corpus, ...); for people and reports.
        **kwargs: As for `BertConfig`.

    Raises:
        ValueError: A width is out of range or not divisible by the number of heads, a layer's entry has
            missing or other keys, or the model is to be a decoder.
    """

    model_type = "obce_bert"

    obce: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.get("per_layer_config") is not None:
            _check_entries(kwargs["per_layer_config"], self.num_hidden_layers)
        super().__post_init__(**kwargs)
        self.layer_widths()

    def layer_widths(self) -> list[LayerWidths]:
        """Widths of every layer, checked."""
        if self.is_decoder or self.add_cross_attention:
            raise ValueError(
                "is_decoder or add_cross_attention is True, expected False: a pruned BERT is an encoder only."
            )
        heads, hidden = self.num_attention_heads, self.hidden_size
        if hidden % heads:
            raise ValueError(f"hidden_size is {hidden}, expected a multiple of num_attention_heads = {heads}.")
        dense = LayerWidths(hidden, hidden, self.intermediate_size)
        if not self.is_heterogeneous:
            return [dense] * self.num_hidden_layers
        found = []
        for layer, entry in enumerate(self.per_layer_config):
            kept: list[Any] = [getattr(entry, key, None) for key in _KEYS]
            for key, width, limit, unit in zip(_KEYS, kept, dense, (heads, heads, 1), strict=True):
                if type(width) is not int or not unit <= width <= limit or width % unit:
                    raise ValueError(
                        f"per_layer_config: {key} of layer {layer} is {width!r}, expected a multiple of "
                        f"{unit} from {unit} to {limit}."
                    )
            found.append(LayerWidths(*kept))
        return found


def _check_entries(entries: dict[int | str, dict[str, Any]], layers: int) -> None:
    # Keys are text in config.json, padded with zeros.
    if sorted(int(layer) for layer in entries) != list(range(layers)):
        raise ValueError(f"per_layer_config has the layers {list(entries)}, expected each of 0 to {layers - 1} once.")
    for layer, entry in entries.items():
        if set(entry) != set(_KEYS):
            raise ValueError(
                f"per_layer_config of layer {layer} has the keys {sorted(entry)}, expected {sorted(_KEYS)}."
            )


__all__ = ["LayerWidths", "ObceBertConfig"]
