"""BERT encoders whose layers have unequal widths, and BERT's heads on them.

Parameter names are those of transformers' BERT; layers are numbered as they stand here. What differs from it:
query and key of a head may be narrower than its value, the intermediate layer has its own width in every layer,
a layer may have fewer heads or none, some rows of the Linears that write the residual stream may be constants, and
attention keeps the scale of the dense model, 1 / sqrt(dense head size), because the removed coordinates count as
zeros of the dense product.

The classes build themselves instead of calling the constructors of BERT's classes, which would allocate the
dense matrices first. This file is copied into checkpoints: it imports nothing of obce but its configuration.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers import initialization
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertEmbeddings,
    BertEncoder,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertIntermediate,
    BertLayer,
    BertModel,
    BertOnlyMLMHead,
    BertOnlyNSPHead,
    BertOutput,
    BertPooler,
    BertPreTrainedModel,
    BertPreTrainingHeads,
    BertSelfOutput,
    eager_attention_forward,
)

from .configuration_obce import LayerWidths, ObceBertConfig

_ALIGNMENT = 64  # bytes, of torch's own allocations on the CPU


class ObceRows(nn.Module):
    """A Linear that computes some of its rows; each of the others gives its entry of the bias.

    Without input features (all heads are gone) it is the bias alone, and `weight` and `kept` are None.

    Attributes:
        weight: [kept, in_features].
        bias: [out_features], the constants of the other rows included.
        kept: int64 [kept], ascending row numbers; they are part of the state, as the config states only how many.
    """

    weight: nn.Parameter | None
    kept: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, kept: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.zeros(kept, in_features)) if in_features else None
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.register_buffer("kept", torch.arange(kept) if in_features else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        if self.weight is None or self.kept is None:
            return self.bias.expand(*x.shape[:-1], -1)
        rows = nn.functional.linear(x, self.weight, self.bias[self.kept])
        # the dtype of the rows, which autocast may have lowered
        return self.bias.to(rows.dtype).expand(*x.shape[:-1], -1).index_copy(-1, self.kept, rows)

    def extra_repr(self) -> str:
        """As a Linear's, with the number of rows that are computed."""
        kept = 0 if self.kept is None else len(self.kept)
        return f"in_features={self.in_features}, out_features={self.out_features}, kept={kept}"


def _writer(in_features: int, hidden: int, kept: int) -> nn.Module:
    whole = in_features and kept == hidden
    return nn.Linear(in_features, hidden) if whole else ObceRows(in_features, hidden, kept)


class ObceBertSelfAttention(nn.Module):
    """Self-attention with one head size for query and key and another for value.

    Takes hidden states [B, T, hidden] and returns the context [B, T, value width] and, with the eager
    implementation, the attention weights [B, heads, T, T]. Without heads it has no Linears and attends to nothing.
    """

    def __init__(self, config: ObceBertConfig, widths: LayerWidths, layer_idx: int) -> None:
        super().__init__()
        # The model's own config, not a copy: `set_attn_implementation` changes it in place.
        self.config = config
        self.num_attention_heads = widths.heads
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        if widths.heads:
            self.query_key_head_size = widths.query_key // widths.heads
            self.value_head_size = widths.value // widths.heads
            self.query = nn.Linear(config.hidden_size, widths.query_key)
            self.key = nn.Linear(config.hidden_size, widths.query_key)
            self.value = nn.Linear(config.hidden_size, widths.value)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.is_causal = False
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: None = None,
        encoder_hidden_states: None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends; `past_key_values` and `encoder_hidden_states` are always None in an encoder."""
        shape = hidden_states.shape[:-1]
        if not self.num_attention_heads:
            eager = self.config._attn_implementation == "eager"
            none = hidden_states.new_zeros(shape[0], 0, shape[1], shape[1]) if eager else None
            return hidden_states.new_zeros(*shape, 0), none
        # [B, heads, T, head size]
        query = self.query(hidden_states).view(*shape, -1, self.query_key_head_size).transpose(1, 2)
        key = self.key(hidden_states).view(*shape, -1, self.query_key_head_size).transpose(1, 2)
        value = self.value(hidden_states).view(*shape, -1, self.value_head_size).transpose(1, 2)
        attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        context, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return context.reshape(*shape, -1).contiguous(), weights


class ObceBertSelfOutput(BertSelfOutput):
    """Projection of a narrow context back to the residual stream."""

    def __init__(self, config: ObceBertConfig, widths: LayerWidths) -> None:
        nn.Module.__init__(self)
        self.dense = _writer(widths.value, config.hidden_size, widths.attention_output)  # type: ignore[assignment]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)


class ObceBertAttention(BertAttention):
    """Attention block of one layer."""

    def __init__(self, config: ObceBertConfig, widths: LayerWidths, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.is_cross_attention = False
        self.self = ObceBertSelfAttention(config, widths, layer_idx)  # type: ignore[assignment]
        self.output = ObceBertSelfOutput(config, widths)


class ObceBertOutput(BertOutput):
    """Projection of a narrow intermediate layer back to the residual stream."""

    def __init__(self, config: ObceBertConfig, widths: LayerWidths) -> None:
        nn.Module.__init__(self)
        self.dense = _writer(widths.intermediate, config.hidden_size, widths.output)  # type: ignore[assignment]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)


class ObceBertLayer(BertLayer):
    """One encoder layer of its own widths."""

    def __init__(self, config: ObceBertConfig, widths: LayerWidths, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.seq_len_dim = 1
        self.is_decoder = False
        self.add_cross_attention = False
        self.attention = ObceBertAttention(config, widths, layer_idx)
        narrow = copy.copy(config)
        narrow.intermediate_size = widths.intermediate
        self.intermediate = BertIntermediate(narrow)
        self.output = ObceBertOutput(config, widths)


class ObceBertEncoder(BertEncoder):
    """The stack of layers."""

    def __init__(self, config: ObceBertConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.layer = nn.ModuleList(
            ObceBertLayer(config, widths, layer) for layer, widths in enumerate(config.layer_widths())
        )


class ObceBertPreTrainedModel(BertPreTrainedModel):
    """Settings shared by `ObceBertModel` and its heads.

    Attention runs as `eager` or `sdpa`. The flash and flex kernels are refused by transformers with a
    sentence: they want equal head sizes of query and value, or sizes that few plans give.
    """

    config_class = ObceBertConfig
    config: ObceBertConfig
    base_model_prefix = "bert"
    _no_split_modules = ["BertEmbeddings", "ObceBertLayer"]  # noqa: RUF012  (transformers' own form)
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": ObceBertLayer,
        "attentions": ObceBertSelfAttention,
    }

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ObceRows):
            initialization.zeros_(module.bias)
            if module.weight is not None and module.kept is not None:
                initialization.normal_(module.weight, std=self.config.initializer_range)
                initialization.copy_(module.kept, torch.arange(len(module.kept)))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, and the loaded model gives the very bits that the saved one gave.

        Weights mapped from a file start at any byte, and matrix products round differently on data that is not
        aligned; those are moved to memory aligned as torch allocates it.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
                parameter.data = parameter.data.clone()
        return loaded


class ObceBertModel(ObceBertPreTrainedModel, BertModel):
    """`BertModel` with layers of unequal widths.

    Args:
        config: Widths and everything else.
        add_pooling_layer: Whether there is a pooler.
    """

    def __init__(self, config: ObceBertConfig, add_pooling_layer: bool = True) -> None:
        PreTrainedModel.__init__(self, config)
        self.gradient_checkpointing = False
        self.embeddings = BertEmbeddings(config)
        self.encoder = ObceBertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()


class ObceBertForPreTraining(ObceBertPreTrainedModel, BertForPreTraining):
    """`BertForPreTraining` on `ObceBertModel`."""

    def __init__(self, config: ObceBertConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.bert = ObceBertModel(config)
        self.cls = BertPreTrainingHeads(config)
        self.post_init()


class ObceBertForMaskedLM(ObceBertPreTrainedModel, BertForMaskedLM):
    """`BertForMaskedLM` on `ObceBertModel`; the decoder is tied to the word embeddings."""

    def __init__(self, config: ObceBertConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.bert = ObceBertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.post_init()


class ObceBertForNextSentencePrediction(ObceBertPreTrainedModel, BertForNextSentencePrediction):
    """`BertForNextSentencePrediction` on `ObceBertModel`."""

    def __init__(self, config: ObceBertConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.bert = ObceBertModel(config)
        self.cls = BertOnlyNSPHead(config)
        self.post_init()


class ObceBertForSequenceClassification(ObceBertPreTrainedModel, BertForSequenceClassification):
    """`BertForSequenceClassification` on `ObceBertModel`."""

    def __init__(self, config: ObceBertConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.bert = ObceBertModel(config)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, cast(int, config.num_labels))
        self.post_init()


class ObceBertForMultipleChoice(ObceBertPreTrainedModel, BertForMultipleChoice):
    """`BertForMultipleChoice` on `ObceBertModel`."""

    def __init__(self, config: ObceBertConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.bert = ObceBertModel(config)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()


class ObceBertForTokenClassification(ObceBertPreTrainedModel, BertForTokenClassification):
    """`BertForTokenClassification` on `ObceBertModel`."""

    def __init__(self, config: ObceBertConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.bert = ObceBertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, cast(int, config.num_labels))
        self.post_init()


class ObceBertForQuestionAnswering(ObceBertPreTrainedModel, BertForQuestionAnswering):
    """`BertForQuestionAnswering` on `ObceBertModel`."""

    def __init__(self, config: ObceBertConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.bert = ObceBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, cast(int, config.num_labels))
        self.post_init()


def _classifier_dropout(config: ObceBertConfig) -> float:
    dropout = config.classifier_dropout
    return config.hidden_dropout_prob if dropout is None else dropout


__all__ = [
    "ObceBertForMaskedLM",
    "ObceBertForMultipleChoice",
    "ObceBertForNextSentencePrediction",
    "ObceBertForPreTraining",
    "ObceBertForQuestionAnswering",
    "ObceBertForSequenceClassification",
    "ObceBertForTokenClassification",
    "ObceBertModel",
    "ObceBertPreTrainedModel",
]
