"""Configurations of encoders and decoders whose layers have unequal widths.

This file is copied into checkpoints: it imports nothing of obce. Annotations are evaluated, not deferred by
`from __future__ import annotations`, because `@strict` checks values against them.
"""

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from huggingface_hub.dataclasses import strict
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.deberta_v2.configuration_deberta_v2 import DebertaV2Config
from transformers.models.distilbert.configuration_distilbert import DistilBertConfig
from transformers.models.electra.configuration_electra import ElectraConfig
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.modernbert.configuration_modernbert import ModernBertConfig
from transformers.models.mpnet.configuration_mpnet import MPNetConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.roberta.configuration_roberta import RobertaConfig
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.xlm_roberta.configuration_xlm_roberta import XLMRobertaConfig


class LayerWidths(NamedTuple):
    """Neurons that one layer keeps.

    Attributes:
        query_key: Width of query, and of key (less where query heads share one of key); the same number in every head
            that stays.
        value: Width of value; the same number in every head that stays.
        intermediate: Width of intermediate.
        heads: Heads that stay; with 0 of them query_key and value are 0 too.
        attention_output: Rows of attention_output that are computed; the others give a constant.
        output: Rows of output that are computed; the others give a constant.
    """

    query_key: int
    value: int
    intermediate: int
    heads: int
    attention_output: int
    output: int


_KEYS = (
    "kept_query_key_size",
    "kept_value_size",
    "kept_intermediate_size",
    "kept_heads",
    "kept_attention_output_size",
    "kept_output_size",
)


if TYPE_CHECKING:
    from transformers import PreTrainedConfig as _Base
else:
    _Base = object


class NarrowConfig(_Base):
    """What the configurations of pruned encoders share; a part of each, beside its family's configuration.

    `hidden_size`, `num_attention_heads` and the intermediate size are those of the dense model (attention keeps that
    model's scale), plus the widths of each layer. `num_hidden_layers` counts the layers that are left. The widths stand
    in transformers' `per_layer_config` under keys of our own, because a family's own keys do not say what is meant:
    reading `intermediate_size` there would hide the dense value, and `hidden_size / num_attention_heads` is no longer a
    head's size.

    Args:
        per_layer_config: Layer number, as this model counts -> the fields of `LayerWidths` by the keys
            `kept_query_key_size`, `kept_value_size`, `kept_intermediate_size`, `kept_heads`,
            `kept_attention_output_size` and `kept_output_size`, all of them for every layer; None: all layers as
            wide as the dense model.
        obce: How the model was made (score, preset, repair, corpus, ...); for people and reports.
        **kwargs: As for the family's configuration.

    Raises:
        ValueError: A width is out of range or not divisible by the layer's number of heads, a layer's entry has
            missing or other keys, or the model is to be a decoder.
    """

    inner_size: ClassVar[str] = "intermediate_size"
    """Field that holds the dense model's intermediate size."""

    query_key_unit: ClassVar[int] = 1
    """Neurons of query, and of key, that go together in a head."""

    whole_query_key: ClassVar[bool] = False
    """Whether heads stay with all of their query and key."""

    reads_forward: ClassVar[bool] = False
    """Whether the family is one of decoders; not called `decoder`, which transformers looks for in a config."""

    if TYPE_CHECKING:  # of the family
        num_hidden_layers: int
        num_attention_heads: int
        hidden_size: int
        is_heterogeneous: bool
        per_layer_config: Any

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.get("per_layer_config") is not None:
            _check_entries(kwargs["per_layer_config"], self.num_hidden_layers)
        super().__post_init__(**kwargs)
        self.layer_widths()

    @classmethod
    def of_layers(cls, settings: dict[str, Any], layers: list[int]) -> dict[str, Any]:
        """Settings of a dense model, as those of a model that has some of its layers alone."""
        return {**settings, cls.attribute_map.get("num_hidden_layers", "num_hidden_layers"): len(layers)}

    def stock(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings of this model, as those of a model of the family that has zeros for what went.

        Raises:
            ValueError: The family's own class cannot hold it.
        """
        return settings

    stock_family: ClassVar[str | None] = None
    """Family whose class of transformers holds what `stock` gives, where it is not the model's own."""

    def layer_widths(self) -> list[LayerWidths]:
        """Widths of every layer, checked."""
        if getattr(self, "is_decoder", False) or getattr(self, "add_cross_attention", False):
            only = "attends to one text" if self.reads_forward else "is an encoder only"
            raise ValueError(f"is_decoder or add_cross_attention is True, expected False: a pruned model {only}.")
        heads, hidden, inner = self.num_attention_heads, self.hidden_size, getattr(self, self.inner_size)
        stated = getattr(self, "head_dim", None)
        if stated is None and hidden % heads:
            raise ValueError(f"hidden_size is {hidden}, expected a multiple of num_attention_heads = {heads}.")
        head = hidden // heads if stated is None else stated
        shared = getattr(self, "num_key_value_heads", None) or heads
        if not 1 <= head <= hidden * heads or not 1 <= shared <= heads:
            raise ValueError(
                f"head_dim is {head} and num_key_value_heads is {shared}, expected a size above 0 and at most {heads} "
                "heads."
            )
        if heads % shared:
            raise ValueError(f"num_key_value_heads is {shared}, expected a divisor of num_attention_heads = {heads}.")
        dense = LayerWidths(heads * head, shared * head, inner, heads, hidden, hidden)
        if not self.is_heterogeneous:
            return [dense] * self.num_hidden_layers
        found = []
        for layer, entry in enumerate(self.per_layer_config):
            kept: list[Any] = [getattr(entry, key, None) for key in _KEYS]
            left = kept[_KEYS.index("kept_heads")]
            least_heads = heads if self.whole_query_key else 0
            _check_size(layer, "kept_heads", left, least_heads, heads)
            # (least, most, unit) of each key
            of_value = shared if self.whole_query_key else left
            in_heads = (of_value, of_value * head, max(1, of_value))
            unit = left * (head if self.whole_query_key else self.query_key_unit)
            pairs = (unit, left * head, max(1, unit))
            rows = (1, hidden, 1)
            ranges = (pairs, in_heads, (1, inner, 1), (least_heads, heads, 1), rows, rows)
            for key, size, (least, most, unit) in zip(_KEYS, kept, ranges, strict=True):
                _check_size(layer, key, size, least, most, unit)
            found.append(LayerWidths(*kept))
        return found


@strict
class ObceBertConfig(NarrowConfig, BertConfig):
    """Configuration of `ObceBertModel` and its heads: see `NarrowConfig`."""

    model_type = "obce_bert"

    obce: dict[str, Any] | None = None


@strict
class ObceDebertaV2Config(NarrowConfig, DebertaV2Config):
    """Configuration of `ObceDebertaV2Model` and its heads: see `NarrowConfig`."""

    model_type = "obce_deberta_v2"

    obce: dict[str, Any] | None = None


@strict
class ObceDistilBertConfig(NarrowConfig, DistilBertConfig):
    """Configuration of `ObceDistilBertModel` and its heads: see `NarrowConfig`."""

    model_type = "obce_distilbert"
    inner_size = "hidden_dim"

    obce: dict[str, Any] | None = None


@strict
class ObceElectraConfig(NarrowConfig, ElectraConfig):
    """Configuration of `ObceElectraModel` and its heads: see `NarrowConfig`."""

    model_type = "obce_electra"

    obce: dict[str, Any] | None = None


@strict
class ObceGPT2Config(NarrowConfig, GPT2Config):
    """Configuration of `ObceGPT2Model` and its heads: see `NarrowConfig`."""

    model_type = "obce_gpt2"
    inner_size = "n_inner"
    reads_forward = True

    obce: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """As of the base; the width that GPT-2 means by leaving it out is stated."""
        if self.n_inner is None:
            self.n_inner = 4 * self.n_embd
        super().__post_init__(**kwargs)


class _WholeHeadsConfig(NarrowConfig):
    """Of decoders of Llama's shape: query and key stay whole, and layers may be told one by one what they look at."""

    whole_query_key = True
    reads_forward = True

    @classmethod
    def of_layers(cls, settings: dict[str, Any], layers: list[int]) -> dict[str, Any]:
        """As of the base; what layers look at is stated one by one where the family does."""
        found = super().of_layers(settings, layers)
        kinds = settings.get("layer_types")
        return found if kinds is None else {**found, "layer_types": [kinds[layer] for layer in layers]}


@strict
class ObceLlamaConfig(_WholeHeadsConfig, LlamaConfig):
    """Configuration of `ObceLlamaModel` and its heads: see `NarrowConfig`."""

    model_type = "obce_llama"

    obce: dict[str, Any] | None = None

    def stock(self, settings: dict[str, Any]) -> dict[str, Any]:
        """As of the base; with biases, which the Linears that write the residual stream have here."""
        return {**settings, "attention_bias": True, "mlp_bias": True}


@strict
class ObceModernBertConfig(NarrowConfig, ModernBertConfig):
    """Configuration of `ObceModernBertModel` and its heads: see `NarrowConfig`.

    Args:
        first_norm: Whether the first layer has a LayerNorm before attention: the dense model's first layer, the one
            that has none, was dropped.
    """

    model_type = "obce_modernbert"
    query_key_unit = 2

    first_norm: bool = False
    obce: dict[str, Any] | None = None

    @classmethod
    def of_layers(cls, settings: dict[str, Any], layers: list[int]) -> dict[str, Any]:
        """As of the base; which layers look at all tokens is stated one by one."""
        kinds = [settings["layer_types"][layer] for layer in layers]
        return {**super().of_layers(settings, layers), "layer_types": kinds, "first_norm": layers[0] != 0}

    def standardize_rope_params(self) -> None:
        """As of transformers, with the angles of those kinds of layers alone that are left, as its 5.14 wants it."""
        every: Any = self.rope_parameters
        self.rope_parameters = {kind: every[kind] for kind in every if kind in (self.layer_types or [])}
        super().standardize_rope_params()

    def stock(self, settings: dict[str, Any]) -> dict[str, Any]:
        """As of the base; with biases, which the Linears that write the residual stream have here."""
        if self.first_norm:
            raise ValueError(
                "model is an ObceModernBert whose first layer was dropped: its first layer now has a LayerNorm before "
                "attention, and that of transformers' ModernBert has none, so it has no dense form; export it in "
                "another way, or keep layer 0."
            )
        return {name: value for name, value in settings.items() if name != "first_norm"} | {
            "attention_bias": True,
            "mlp_bias": True,
        }


@strict
class ObceMPNetConfig(NarrowConfig, MPNetConfig):
    """Configuration of `ObceMPNetModel` and its heads: see `NarrowConfig`."""

    model_type = "obce_mpnet"

    obce: dict[str, Any] | None = None


@strict
class ObceQwen2Config(_WholeHeadsConfig, Qwen2Config):
    """Configuration of `ObceQwen2Model` and its heads: see `NarrowConfig`."""

    model_type = "obce_qwen2"
    stock_family = "llama"

    obce: dict[str, Any] | None = None

    def stock(self, settings: dict[str, Any]) -> dict[str, Any]:
        """As a Llama, which is a Qwen2 whose every Linear may have a bias."""
        of_qwen2 = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
        plain = {name: value for name, value in settings.items() if name not in of_qwen2}
        return {**plain, "attention_bias": True, "mlp_bias": True}


@strict
class ObceQwen3Config(_WholeHeadsConfig, Qwen3Config):
    """Configuration of `ObceQwen3Model` and its heads: see `NarrowConfig`."""

    model_type = "obce_qwen3"

    obce: dict[str, Any] | None = None

    def stock(self, settings: dict[str, Any]) -> dict[str, Any]:
        """As of the base; with biases in attention, as far as the family has room for them."""
        return {**settings, "attention_bias": True}


@strict
class ObceRobertaConfig(NarrowConfig, RobertaConfig):
    """Configuration of `ObceRobertaModel` and its heads: see `NarrowConfig`."""

    model_type = "obce_roberta"

    obce: dict[str, Any] | None = None


@strict
class ObceViTConfig(NarrowConfig, ViTConfig):
    """Configuration of `ObceViTModel` and its heads: see `NarrowConfig`."""

    model_type = "obce_vit"

    obce: dict[str, Any] | None = None


@strict
class ObceXLMRobertaConfig(NarrowConfig, XLMRobertaConfig):
    """Configuration of `ObceXLMRobertaModel` and its heads: see `NarrowConfig`."""

    model_type = "obce_xlm_roberta"

    obce: dict[str, Any] | None = None


def _check_size(layer: int, key: str, size: Any, least: int, most: int, unit: int = 1) -> None:
    if type(size) is not int or not least <= size <= most or size % unit:
        raise ValueError(
            f"per_layer_config: {key} of layer {layer} is {size!r}, expected a multiple of {unit} from {least} "
            f"to {most}."
        )


def _check_entries(entries: dict[int | str, dict[str, Any]], layers: int) -> None:
    # Keys are text in config.json, padded with zeros.
    # counted first: a damaged number of layers may be anything
    if len(entries) != layers or sorted(int(layer) for layer in entries) != list(range(layers)):
        raise ValueError(f"per_layer_config has the layers {list(entries)}, expected each of 0 to {layers - 1} once.")
    for layer, entry in entries.items():
        if set(entry) != set(_KEYS):
            raise ValueError(
                f"per_layer_config of layer {layer} has the keys {sorted(entry)}, expected {sorted(_KEYS)}."
            )


__all__ = [
    "LayerWidths",
    "NarrowConfig",
    "ObceBertConfig",
    "ObceDebertaV2Config",
    "ObceDistilBertConfig",
    "ObceElectraConfig",
    "ObceGPT2Config",
    "ObceLlamaConfig",
    "ObceMPNetConfig",
    "ObceModernBertConfig",
    "ObceQwen2Config",
    "ObceQwen3Config",
    "ObceRobertaConfig",
    "ObceViTConfig",
    "ObceXLMRobertaConfig",
]
