"""Encoders and decoders whose layers have unequal widths, and their families' heads on them.

Parameter names are those of transformers' own classes; layers are numbered as they stand here. What differs from them:
query and key of a head may be narrower than its value, the intermediate layer has its own width in every layer,
a layer may have fewer heads or none, some rows of the Linears that write the residual stream may be constants, and
attention keeps the scale of the dense model, 1 / sqrt(dense head size), because the removed coordinates count as
zeros of the dense product.

Each class is its family's, built with no layers, that then gets narrow ones: the dense matrices are never allocated.
This file is copied into checkpoints: it imports nothing of obce but its configuration.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import initialization
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.bert.modeling_bert import (
    BertAttention,
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
    BertOutput,
    BertSelfOutput,
    eager_attention_forward,
)
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    DebertaV2Attention,
    DebertaV2ForMaskedLM,
    DebertaV2ForMultipleChoice,
    DebertaV2ForQuestionAnswering,
    DebertaV2ForSequenceClassification,
    DebertaV2ForTokenClassification,
    DebertaV2Intermediate,
    DebertaV2Layer,
    DebertaV2Model,
    DebertaV2Output,
    DebertaV2SelfOutput,
    DisentangledSelfAttention,
)
from transformers.models.distilbert.modeling_distilbert import (
    FFN,
    DistilBertForMaskedLM,
    DistilBertForMultipleChoice,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
    TransformerBlock,
)
from transformers.models.electra.modeling_electra import (
    ElectraForMaskedLM,
    ElectraForMultipleChoice,
    ElectraForPreTraining,
    ElectraForQuestionAnswering,
    ElectraForSequenceClassification,
    ElectraForTokenClassification,
    ElectraModel,
)
from transformers.models.gpt2.modeling_gpt2 import (
    GPT2MLP,
    GPT2Block,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward as gpt2_eager_attention
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)
from transformers.models.llama.modeling_llama import eager_attention_forward as llama_eager_attention
from transformers.models.modernbert.modeling_modernbert import (
    ModernBertEncoderLayer,
    ModernBertForMaskedLM,
    ModernBertForMultipleChoice,
    ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    ModernBertMLP,
    ModernBertModel,
    rotate_half,
)
from transformers.models.modernbert.modeling_modernbert import eager_attention_forward as modernbert_eager_attention
from transformers.models.mpnet.modeling_mpnet import (
    MPNetAttention,
    MPNetForMaskedLM,
    MPNetForMultipleChoice,
    MPNetForQuestionAnswering,
    MPNetForSequenceClassification,
    MPNetForTokenClassification,
    MPNetIntermediate,
    MPNetLayer,
    MPNetModel,
    MPNetOutput,
)
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2ForCausalLM,
    Qwen2ForQuestionAnswering,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
    Qwen2MLP,
    Qwen2Model,
    Qwen2RMSNorm,
)
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3ForQuestionAnswering,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3MLP,
    Qwen3Model,
    Qwen3RMSNorm,
)
from transformers.models.roberta.modeling_roberta import (
    RobertaForMaskedLM,
    RobertaForMultipleChoice,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
)
from transformers.models.vit.modeling_vit import (
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTLayer,
    ViTMLP,
    ViTModel,
)
from transformers.models.vit.modeling_vit import eager_attention_forward as vit_eager_attention
from transformers.models.xlm_roberta.modeling_xlm_roberta import (
    XLMRobertaForMaskedLM,
    XLMRobertaForMultipleChoice,
    XLMRobertaForQuestionAnswering,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
    XLMRobertaModel,
)
from transformers.pytorch_utils import Conv1D

from .checkpoint_obce import check_checkpoint
from .configuration_obce import (
    LayerWidths,
    NarrowConfig,
    ObceBertConfig,
    ObceDebertaV2Config,
    ObceDistilBertConfig,
    ObceElectraConfig,
    ObceGPT2Config,
    ObceLlamaConfig,
    ObceModernBertConfig,
    ObceMPNetConfig,
    ObceQwen2Config,
    ObceQwen3Config,
    ObceRobertaConfig,
    ObceViTConfig,
    ObceXLMRobertaConfig,
)

# Heads of transformers that have the body made by the class of the config.
_BY_CONFIG = (GenericForQuestionAnswering, GenericForSequenceClassification, GenericForTokenClassification)

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


def _linear(in_features: int, out_features: int) -> nn.Module:
    return nn.Linear(in_features, out_features)


def _conv1d(in_features: int, out_features: int) -> nn.Module:
    return Conv1D(out_features, in_features)


def _writer(in_features: int, hidden: int, kept: int, plain: Callable[[int, int], nn.Module] = _linear) -> nn.Module:
    """A Linear that writes the residual stream, of the family's own kind (`plain`) where none of its rows went."""
    whole = in_features and kept == hidden
    return plain(in_features, hidden) if whole else ObceRows(in_features, hidden, kept)


class NarrowAttention(nn.Module):
    """Self-attention with one head size for query and key and another for value; each family names its Linears.

    Without heads it has no Linears for query, key and value, and attends to nothing.

    Args:
        config: The model's own config, not a copy: `set_attn_implementation` changes it in place.
        widths: Of the layer.
        names: Names of the Linears for query, key and value, or none, where a subclass has another way.
        dropout: Of attention weights.
        layer: Number of the layer.
        bias: Whether these Linears have biases.

    Attributes:
        dropout_name: Name of the Dropout whose share attention weights lose; None where the family has none as a
            module.
        causal: Whether a token looks at itself and those before it alone.
        eager: Attention without a kernel.
    """

    dropout_name: str | None = "dropout"
    causal = False
    eager: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = staticmethod(eager_attention_forward)

    def __init__(
        self,
        config: NarrowConfig,
        widths: LayerWidths,
        names: tuple[str, ...],
        dropout: float,
        layer: int,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.config: Any = config
        self.num_attention_heads = widths.heads
        size = getattr(self.config, "head_dim", None)
        size = self.config.hidden_size // self.config.num_attention_heads if size is None else size
        self.scaling = size**-0.5
        self.names = names
        if widths.heads:
            for name, width in zip(names, (widths.query_key, widths.query_key, widths.value), strict=bool(names)):
                self.add_module(name, nn.Linear(self.config.hidden_size, width, bias=bias))
        self.attention_dropout = dropout
        if self.dropout_name is not None:
            self.add_module(self.dropout_name, nn.Dropout(dropout))
        self.is_causal = self.causal
        self.layer_idx = layer

    def heads(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Query, key and value [B, heads, T, head size] of hidden states [B, T, hidden]."""
        split = (*hidden.shape[:-1], self.num_attention_heads, -1)
        return [self.get_submodule(name)(hidden).view(split).transpose(1, 2) for name in self.names]

    def context(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        turn: Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]] | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Context [B, T, value width] and, with the eager implementation, attention weights [B, heads, T, T].

        `turn` makes query and key of what they were, by their positions; `cache` has those of the tokens before.
        """
        shape = hidden.shape[:-1]
        if not self.num_attention_heads:
            eager = self.config._attn_implementation == "eager"
            none = hidden.new_zeros(shape[0], 0, shape[1], shape[1]) if eager else None
            if cache is not None:  # it counts tokens by what a layer hands to it
                nothing = hidden.new_zeros(shape[0], 1, shape[1], 1)
                cache.update(nothing, nothing, self.layer_idx)
            return hidden.new_zeros(*shape, 0), none
        query, key, value = self.heads(hidden)
        if turn is not None:
            query, key = turn(query, key)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self.eager
        )
        share = self.attention_dropout if self.dropout_name is None else self.get_submodule(self.dropout_name).p
        context, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=share if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return context.reshape(*shape, -1).contiguous(), weights


# ---- BERT, RoBERTa, XLM-RoBERTa, ELECTRA: one shape of layer ---------------------------------------------------------


class ObceBertSelfAttention(NarrowAttention):
    """Self-attention of BERT's shape, without the projection back to the residual stream."""

    def __init__(self, config: NarrowConfig, widths: LayerWidths, layer: int) -> None:
        dropout: float = config.attention_probs_dropout_prob
        super().__init__(config, widths, ("query", "key", "value"), dropout, layer)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: None = None,
        encoder_hidden_states: None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends; `past_key_values` and `encoder_hidden_states` are always None in an encoder."""
        return self.context(hidden_states, attention_mask, **kwargs)


class ObceBertSelfOutput(BertSelfOutput):
    """Projection of a narrow context back to the residual stream."""

    def __init__(self, config: Any, widths: LayerWidths) -> None:
        nn.Module.__init__(self)
        self.dense = _writer(widths.value, config.hidden_size, widths.attention_output)  # type: ignore[assignment]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)


class ObceBertAttention(BertAttention):
    """Attention block of one layer."""

    def __init__(self, config: Any, widths: LayerWidths, layer: int) -> None:
        nn.Module.__init__(self)
        self.is_cross_attention = False
        self.self = ObceBertSelfAttention(config, widths, layer)  # type: ignore[assignment]
        self.output = ObceBertSelfOutput(config, widths)


class ObceBertOutput(BertOutput):
    """Projection of a narrow intermediate layer back to the residual stream."""

    def __init__(self, config: Any, widths: LayerWidths) -> None:
        nn.Module.__init__(self)
        self.dense = _writer(widths.intermediate, config.hidden_size, widths.output)  # type: ignore[assignment]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)


class ObceBertLayer(BertLayer):
    """One encoder layer of its own widths."""

    def __init__(self, config: Any, widths: LayerWidths, layer: int) -> None:
        nn.Module.__init__(self)
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.seq_len_dim = 1
        self.is_decoder = False
        self.add_cross_attention = False
        self.attention = ObceBertAttention(config, widths, layer)
        self.intermediate = BertIntermediate(_with_inner(config, widths))
        self.output = ObceBertOutput(config, widths)


def _with_inner(config: Any, widths: LayerWidths) -> Any:
    """The config with a layer's own intermediate size."""
    narrow = copy.copy(config)
    setattr(narrow, config.inner_size, widths.intermediate)
    return narrow


# ---- DistilBERT ------------------------------------------------------------------------------------------------------


class ObceDistilBertSelfAttention(NarrowAttention):
    """Self-attention of DistilBERT's shape, with the projection back to the residual stream."""

    def __init__(self, config: Any, widths: LayerWidths, layer: int) -> None:
        super().__init__(config, widths, ("q_lin", "k_lin", "v_lin"), config.attention_dropout, layer)
        self.out_lin = _writer(widths.value, config.dim, widths.attention_output)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends and projects: [B, T, hidden] -> [B, T, hidden]."""
        context, weights = self.context(hidden_states, attention_mask, **kwargs)
        return self.out_lin(context), weights


class ObceDistilBertLayer(TransformerBlock):
    """One encoder layer of its own widths."""

    def __init__(self, config: Any, widths: LayerWidths, layer: int) -> None:
        nn.Module.__init__(self)
        self.attention = ObceDistilBertSelfAttention(config, widths, layer)  # type: ignore[assignment]
        self.sa_layer_norm = nn.LayerNorm(config.dim, eps=1e-12)
        self.ffn = FFN(_with_inner(config, widths))
        self.ffn.lin2 = _writer(widths.intermediate, config.dim, widths.output)  # type: ignore[assignment]
        self.output_layer_norm = nn.LayerNorm(config.dim, eps=1e-12)


# ---- MPNet -----------------------------------------------------------------------------------------------------------


class ObceMPNetSelfAttention(NarrowAttention):
    """Self-attention of MPNet's shape: a bias for each head and distance, one for all layers."""

    dropout: nn.Module

    def __init__(self, config: Any, widths: LayerWidths, layer: int) -> None:
        if widths.heads != config.num_attention_heads:
            raise ValueError(
                f"per_layer_config: kept_heads of layer {layer} is {widths.heads}, expected "
                f"{config.num_attention_heads}: all layers of an MPNet share the position biases of its heads."
            )
        super().__init__(config, widths, ("q", "k", "v"), config.attention_probs_dropout_prob, layer)
        self.o = _writer(widths.value, config.hidden_size, widths.attention_output)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...]:
        """[B, T, hidden] with biases [1, heads, T, T] -> ([B, T, hidden],), with weights [B, heads, T, T] if asked."""
        query, key, value = self.heads(hidden_states)
        scores = torch.matmul(query, key.transpose(-1, -2)) * self.scaling
        if position_bias is not None:
            scores = scores + position_bias
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = self.dropout(nn.functional.softmax(scores, dim=-1))
        context = torch.matmul(weights, value).transpose(1, 2).flatten(2)
        return (self.o(context), weights) if output_attentions else (self.o(context),)


class ObceMPNetLayer(MPNetLayer):
    """One encoder layer of its own widths."""

    def __init__(self, config: Any, widths: LayerWidths, layer: int) -> None:
        nn.Module.__init__(self)
        self.attention = ObceMPNetAttention(config, widths, layer)
        self.intermediate = MPNetIntermediate(_with_inner(config, widths))
        self.output = ObceMPNetOutput(config, widths)


class ObceMPNetAttention(MPNetAttention):
    """Attention block of one layer."""

    def __init__(self, config: Any, widths: LayerWidths, layer: int) -> None:
        nn.Module.__init__(self)
        self.attn = ObceMPNetSelfAttention(config, widths, layer)  # type: ignore[assignment]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)


class ObceMPNetOutput(MPNetOutput):
    """Projection of a narrow intermediate layer back to the residual stream."""

    def __init__(self, config: Any, widths: LayerWidths) -> None:
        nn.Module.__init__(self)
        self.dense = _writer(widths.intermediate, config.hidden_size, widths.output)  # type: ignore[assignment]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)


# ---- ModernBERT ------------------------------------------------------------------------------------------------------


class ObceModernBertAttention(NarrowAttention):
    """Self-attention of ModernBERT's shape: one Linear for query, key and value, and positions that turn the first two.

    Attributes:
        pairs: int64 [heads, pairs], which of the dense head's rotary pairs are left, ascending; None where all are.
            They are part of the state, as the config states only how many.
    """

    pairs: torch.Tensor | None
    out_drop: nn.Module
    dropout_name = "out_drop"
    eager = staticmethod(modernbert_eager_attention)

    def __init__(self, config: Any, widths: LayerWidths, layer: int) -> None:
        super().__init__(config, widths, (), config.attention_dropout, layer)
        self.sizes = (widths.query_key, widths.query_key, widths.value)
        dense, left = config.hidden_size // config.num_attention_heads // 2, 0
        if widths.heads:
            self.Wqkv = nn.Linear(config.hidden_size, sum(self.sizes), bias=config.attention_bias)
            left = widths.query_key // widths.heads // 2
        self.register_buffer("pairs", torch.arange(left).repeat(widths.heads, 1) if 0 < left < dense else None)
        self.Wo = _writer(widths.value, config.hidden_size, widths.attention_output)

    def heads(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Query, key and value [B, heads, T, head size] of hidden states [B, T, hidden], not turned yet."""
        split = (*hidden.shape[:-1], self.num_attention_heads, -1)
        return [part.view(split).transpose(1, 2) for part in self.Wqkv(hidden).split(self.sizes, dim=-1)]

    def turned(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> list[torch.Tensor]:
        """Query and key turned by the angles [1 or B, T, dense head size] of the pairs that are left."""
        own = []
        for table in (cos, sin):
            if self.pairs is None:
                own.append(table.unsqueeze(1))
                continue
            picked = table[..., self.pairs].transpose(1, 2)  # [1 or B, heads, T, pairs]; the second half is the first
            own.append(torch.cat((picked, picked), dim=-1))
        # in float32, as transformers turns them
        return [(x.float() * own[0] + rotate_half(x.float()) * own[1]).to(x.dtype) for x in (query, key)]

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends and projects: [B, T, hidden] -> [B, T, hidden]."""
        turn = functools.partial(self.turned, cos=position_embeddings[0], sin=position_embeddings[1])
        context, weights = self.context(hidden_states, attention_mask, turn, **kwargs)
        return self.out_drop(self.Wo(context)), weights


class ObceModernBertMLP(ModernBertMLP):
    """Gated intermediate layer of its own width, with the projection back to the residual stream."""

    def __init__(self, config: Any, widths: LayerWidths) -> None:
        super().__init__(_with_inner(config, widths))
        self.Wo = _writer(widths.intermediate, config.hidden_size, widths.output)  # type: ignore[assignment]


class ObceModernBertLayer(ModernBertEncoderLayer):
    """One encoder layer of its own widths; it looks at what the config's `layer_types` says."""

    def __init__(self, config: Any, widths: LayerWidths, layer: int) -> None:
        nn.Module.__init__(self)

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)

        self.config = config
        self.layer_idx = layer
        self.attn_norm = norm() if layer or config.first_norm else nn.Identity()  # type: ignore[assignment]
        self.attn = ObceModernBertAttention(config, widths, layer)  # type: ignore[assignment]
        self.mlp_norm = norm()
        self.mlp = ObceModernBertMLP(config, widths)
        self.attention_type = config.layer_types[layer]


# ---- GPT-2 -----------------------------------------------------------------------------------------------------------


class ObceGPT2Attention(NarrowAttention):
    """Self-attention of GPT-2's shape: one Conv1D for query, key and value, and the projection back to the stream."""

    dropout_name = "attn_dropout"
    causal = True
    eager = staticmethod(gpt2_eager_attention)

    def __init__(self, config: Any, widths: LayerWidths, layer: int) -> None:
        super().__init__(config, widths, (), config.attn_pdrop, layer)
        self.sizes = (widths.query_key, widths.query_key, widths.value)
        self.scaling = self.scaling if config.scale_attn_weights else 1.0
        if widths.heads:
            self.c_attn = Conv1D(sum(self.sizes), config.hidden_size)
        self.c_proj = _writer(widths.value, config.hidden_size, widths.attention_output, _conv1d)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def heads(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Query, key and value [B, heads, T, head size] of hidden states [B, T, hidden]."""
        split = (*hidden.shape[:-1], self.num_attention_heads, -1)
        return [part.view(split).transpose(1, 2) for part in self.c_attn(hidden).split(self.sizes, dim=-1)]

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Any = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends and projects: [B, T, hidden] -> [B, T, hidden]. The cache has two names, by transformers' version."""
        kept = past_key_values if cache is None else cache
        context, weights = self.context(hidden_states, attention_mask, cache=kept, **kwargs)
        return self.resid_dropout(self.c_proj(context)), weights


class ObceGPT2Block(GPT2Block):
    """One layer of its own widths."""

    def __init__(self, config: Any, widths: LayerWidths, layer: int) -> None:
        nn.Module.__init__(self)
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = ObceGPT2Attention(config, widths, layer)  # type: ignore[assignment]
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(widths.intermediate, config)
        self.mlp.c_proj = _writer(widths.intermediate, config.hidden_size, widths.output, _conv1d)  # type: ignore[assignment]


# ---- Llama, Qwen2, Qwen3 ---------------------------------------------------------------------------------------------


class ObceLlamaAttention(NarrowAttention):
    """Self-attention of Llama's shape: query and key whole, value narrower, a head of both for several of query."""

    dropout_name = None
    causal = True
    eager = staticmethod(llama_eager_attention)

    def __init__(self, config: Any, widths: LayerWidths, layer: int) -> None:
        super().__init__(config, widths, (), config.attention_dropout, layer)
        hidden, bias = config.hidden_size, self.biased(config)
        self.shared_heads = config.num_key_value_heads
        self.num_key_value_groups = config.num_attention_heads // self.shared_heads
        self.q_proj = nn.Linear(hidden, widths.query_key, bias=bias)
        self.k_proj = nn.Linear(hidden, widths.query_key // self.num_key_value_groups, bias=bias)
        self.v_proj = nn.Linear(hidden, widths.value, bias=bias)
        self.o_proj = _writer(widths.value * self.num_key_value_groups, hidden, widths.attention_output)

    @staticmethod
    def biased(config: Any) -> bool:
        """Whether query, key and value have biases."""
        return bool(config.attention_bias)

    def heads(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Query [B, heads, T, head size], key and value [B, shared heads, T, head size] of hidden states."""
        batch = hidden.shape[:-1]
        query = self.q_proj(hidden).view(*batch, self.num_attention_heads, -1)
        key, value = (one(hidden).view(*batch, self.shared_heads, -1) for one in (self.k_proj, self.v_proj))
        return [one.transpose(1, 2) for one in (*self.normed(query, key), value)]

    def normed(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and key [B, T, heads, head size] as positions turn them."""
        return query, key

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends and projects: [B, T, hidden] -> [B, T, hidden]. The cache has two names, by transformers' version."""
        kept = past_key_values if cache is None else cache
        turn = functools.partial(apply_rotary_pos_emb, cos=position_embeddings[0], sin=position_embeddings[1])
        context, weights = self.context(hidden_states, attention_mask, turn, cache=kept, **kwargs)
        return self.o_proj(context), weights


class ObceQwen2Attention(ObceLlamaAttention):
    """As Llama's, with biases of query, key and value."""

    @staticmethod
    def biased(config: Any) -> bool:
        """Whether query, key and value have biases."""
        return True


class ObceQwen3Attention(ObceLlamaAttention):
    """As Llama's, with a norm of each head's query and key."""

    def __init__(self, config: Any, widths: LayerWidths, layer: int) -> None:
        super().__init__(config, widths, layer)
        size = widths.query_key // widths.heads
        self.q_norm, self.k_norm = (Qwen3RMSNorm(size, eps=config.rms_norm_eps) for _ in range(2))

    def normed(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and key [B, T, heads, head size] as positions turn them."""
        return self.q_norm(query), self.k_norm(key)


class _NarrowDecoderLayer(nn.Module):
    """What layers of Llama's shape share; stands before the family's class among the bases.

    Attributes:
        parts: Classes of attention, of the gated part and of the norms.
    """

    parts: tuple[type[ObceLlamaAttention], type[Any], type[Any]]
    self_attn: Any

    def __init__(self, config: Any, widths: LayerWidths, layer: int) -> None:
        nn.Module.__init__(self)
        attention, mlp, norm = self.parts
        self.hidden_size = config.hidden_size
        self.self_attn = attention(config, widths, layer)
        self.mlp = mlp(_with_inner(config, widths))
        self.mlp.down_proj = _writer(widths.intermediate, config.hidden_size, widths.output)
        self.input_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)


class ObceLlamaLayer(_NarrowDecoderLayer, LlamaDecoderLayer):
    """One layer of its own widths."""

    parts = ObceLlamaAttention, LlamaMLP, LlamaRMSNorm


class ObceQwen2Layer(_NarrowDecoderLayer, Qwen2DecoderLayer):
    """One layer of its own widths."""

    parts = ObceQwen2Attention, Qwen2MLP, Qwen2RMSNorm


class ObceQwen3Layer(_NarrowDecoderLayer, Qwen3DecoderLayer):
    """One layer of its own widths."""

    parts = ObceQwen3Attention, Qwen3MLP, Qwen3RMSNorm


# ---- ViT -------------------------------------------------------------------------------------------------------------


class ObceViTAttention(NarrowAttention):
    """Self-attention of ViT's shape, with the projection back to the residual stream."""

    dropout_name = None
    eager = staticmethod(vit_eager_attention)

    def __init__(self, config: Any, widths: LayerWidths, layer: int) -> None:
        names = ("q_proj", "k_proj", "v_proj")
        super().__init__(config, widths, names, config.attention_probs_dropout_prob, layer, bias=config.qkv_bias)
        self.o_proj = _writer(widths.value, config.hidden_size, widths.attention_output)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends and projects: [B, T, hidden] -> [B, T, hidden]."""
        context, weights = self.context(hidden_states, attention_mask, **kwargs)
        return self.o_proj(context), weights


class ObceViTLayer(ViTLayer):
    """One encoder layer of its own widths."""

    def __init__(self, config: Any, widths: LayerWidths, layer: int) -> None:
        nn.Module.__init__(self)
        self.attention = ObceViTAttention(config, widths, layer)  # type: ignore[assignment]
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ViTMLP(_with_inner(config, widths))
        self.mlp.fc2 = _writer(widths.intermediate, config.hidden_size, widths.output)  # type: ignore[assignment]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)


# ---- DeBERTa-v2 and -v3 ----------------------------------------------------------------------------------------------


class ScaledLinear(nn.Linear):
    """A Linear whose outputs are multiplied by a number."""

    def __init__(self, in_features: int, out_features: int, factor: float) -> None:
        super().__init__(in_features, out_features)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        return super().forward(x) * self.factor


class ObceDebertaV2SelfAttention(DisentangledSelfAttention):
    """Self-attention whose query and key also meet embeddings of distances.

    DeBERTa divides by a number that follows from the query's own head size; its query makes up for that.
    """

    def __init__(self, config: Any, widths: LayerWidths) -> None:
        nn.Module.__init__(self)
        hidden, heads = config.hidden_size, widths.heads
        self.num_attention_heads = heads
        if heads:
            size, dense = widths.query_key // heads, hidden // config.num_attention_heads
            self.query_proj = ScaledLinear(hidden, widths.query_key, (size / dense) ** 0.5)
            self.key_proj = nn.Linear(hidden, widths.query_key)
            self.value_proj = nn.Linear(hidden, widths.value)
        self.share_att_key = config.share_att_key
        self.pos_att_type = config.pos_att_type or []
        self.relative_attention = config.relative_attention
        if self.relative_attention:
            self.position_buckets = config.position_buckets
            self.max_relative_positions = config.max_relative_positions
            if self.max_relative_positions < 1:
                self.max_relative_positions = config.max_position_embeddings
            self.pos_ebd_size = self.position_buckets if self.position_buckets > 0 else self.max_relative_positions
            self.pos_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        output_attentions: bool = False,
        query_states: torch.Tensor | None = None,
        relative_pos: torch.Tensor | None = None,
        rel_embeddings: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Context [B, T, value width] and, if asked, attention weights [B, heads, T, T]."""
        if self.num_attention_heads:
            found: tuple[torch.Tensor, torch.Tensor | None] = super().forward(
                hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
            )
            return found
        batch, length = hidden_states.shape[:2]
        weights = hidden_states.new_zeros(batch, 0, length, length) if output_attentions else None
        return hidden_states.new_zeros(batch, length, 0), weights


class ObceDebertaV2SelfOutput(DebertaV2SelfOutput):
    """Projection of a narrow context back to the residual stream."""

    def __init__(self, config: Any, widths: LayerWidths) -> None:
        nn.Module.__init__(self)
        self.dense = _writer(widths.value, config.hidden_size, widths.attention_output)  # type: ignore[assignment]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)


class ObceDebertaV2Attention(DebertaV2Attention):
    """Attention block of one layer."""

    def __init__(self, config: Any, widths: LayerWidths) -> None:
        nn.Module.__init__(self)
        self.self = ObceDebertaV2SelfAttention(config, widths)
        self.output = ObceDebertaV2SelfOutput(config, widths)
        self.config = config


class ObceDebertaV2Output(DebertaV2Output):
    """Projection of a narrow intermediate layer back to the residual stream."""

    def __init__(self, config: Any, widths: LayerWidths) -> None:
        nn.Module.__init__(self)
        self.dense = _writer(widths.intermediate, config.hidden_size, widths.output)  # type: ignore[assignment]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.config = config


class ObceDebertaV2Layer(DebertaV2Layer):
    """One encoder layer of its own widths."""

    def __init__(self, config: Any, widths: LayerWidths, layer: int) -> None:
        nn.Module.__init__(self)
        self.attention = ObceDebertaV2Attention(config, widths)
        self.intermediate = DebertaV2Intermediate(_with_inner(config, widths))
        self.output = ObceDebertaV2Output(config, widths)


# ---- models ----------------------------------------------------------------------------------------------------------


def parts_of(model: nn.Module) -> dict[str, bool]:
    """What a model of any family was made with or without, beside its config, as arguments of its class.

    A head makes its encoder by itself; of a model with one, this is nothing.
    """
    found = {}
    if getattr(model, "pooler", model) is None:
        found["add_pooling_layer"] = False
    if getattr(getattr(model, "embeddings", None), "mask_token", None) is not None:
        found["use_mask_token"] = True
    return found


class CheckedModel(PreTrainedModel):
    """A model whose files are looked at before they are loaded."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, files_checked: bool = False, **kwargs: Any
    ) -> Any:
        """As in transformers, and the loaded model gives the very bits that the saved one gave.

        A directory's files are checked first, and weights that only unpickling opens are refused. Weights mapped from a
        file start at any byte, and matrix products round differently on data that is not aligned; those are moved to
        memory aligned as torch allocates it. `files_checked` says that the caller has looked at the files already.

        Raises:
            ValueError: A file is damaged, pickled, or not what `obce.json` lists; see `check_checkpoint`.
        """
        source = pretrained_model_name_or_path
        if not files_checked and source is not None and Path(source).is_dir():
            check_checkpoint(Path(source) / kwargs.get("subfolder", ""))
        kwargs.setdefault("use_safetensors", True)
        loaded = super().from_pretrained(source, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
                parameter.data = parameter.data.clone()
        return loaded


class NarrowModel(CheckedModel):
    """What pruned models of all families share; stands before the family's class among the bases.

    Attention runs as `eager` or, where the family has it, `sdpa`. Flash and flex kernels are refused by transformers
    with a sentence: they want equal head sizes of query and value, or sizes that few plans give.

    Attributes:
        narrow_layer: Class of a layer, made of config, widths and number.
        drawn_by_depth: Whether the family draws new weights by the number of layers.
    """

    narrow_layer: type[nn.Module]
    drawn_by_depth = False
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        layers = config.num_hidden_layers
        config.num_hidden_layers = 0
        try:
            # without layers no weight can be drawn by their number: all are drawn at the end
            with initialization.no_init_weights() if self.drawn_by_depth else nullcontext():
                super().__init__(_dense_config(config) if isinstance(self, _BY_CONFIG) else config, *args, **kwargs)
        finally:
            config.num_hidden_layers = layers
        self.config = config
        body = self.base_model
        if body is self:
            stack: Any = next(module for module in self.modules() if isinstance(module, nn.ModuleList))
            stack.extend(self.narrow_layer(config, widths, i) for i, widths in enumerate(config.layer_widths()))
        else:
            setattr(self, self.base_model_prefix, _BODIES[type(body)](config, **parts_of(body)))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ObceRows):
            initialization.zeros_(module.bias)
            if module.weight is not None and module.kept is not None:
                initialization.normal_(module.weight, std=self.config.initializer_range)
                initialization.copy_(module.kept, torch.arange(len(module.kept)))


def _dense_config(config: Any) -> Any:
    """The config as its family's own, by which transformers knows the class of the body."""
    family = next(one for one in type(config).__mro__ if one.__module__.startswith("transformers.models."))
    dense = copy.copy(config)
    object.__setattr__(dense, "__class__", family)
    dense.__dict__.pop("auto_map", None)
    return dense


class ObceBertPreTrainedModel(NarrowModel):
    """Settings shared by `ObceBertModel` and its heads."""

    config_class = ObceBertConfig
    narrow_layer = ObceBertLayer
    _no_split_modules = ["BertEmbeddings", "ObceBertLayer"]  # noqa: RUF012  (transformers' own form)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": ObceBertLayer,
        "attentions": ObceBertSelfAttention,
    }


class ObceBertModel(ObceBertPreTrainedModel, BertModel):
    """`BertModel` with layers of unequal widths."""


class ObceBertForPreTraining(ObceBertPreTrainedModel, BertForPreTraining):
    """`BertForPreTraining` on `ObceBertModel`."""


class ObceBertForMaskedLM(ObceBertPreTrainedModel, BertForMaskedLM):
    """`BertForMaskedLM` on `ObceBertModel`."""


class ObceBertForNextSentencePrediction(ObceBertPreTrainedModel, BertForNextSentencePrediction):
    """`BertForNextSentencePrediction` on `ObceBertModel`."""


class ObceBertForSequenceClassification(ObceBertPreTrainedModel, BertForSequenceClassification):
    """`BertForSequenceClassification` on `ObceBertModel`."""


class ObceBertForMultipleChoice(ObceBertPreTrainedModel, BertForMultipleChoice):
    """`BertForMultipleChoice` on `ObceBertModel`."""


class ObceBertForTokenClassification(ObceBertPreTrainedModel, BertForTokenClassification):
    """`BertForTokenClassification` on `ObceBertModel`."""


class ObceBertForQuestionAnswering(ObceBertPreTrainedModel, BertForQuestionAnswering):
    """`BertForQuestionAnswering` on `ObceBertModel`."""


class ObceRobertaPreTrainedModel(NarrowModel):
    """Settings shared by `ObceRobertaModel` and its heads."""

    config_class = ObceRobertaConfig
    narrow_layer = ObceBertLayer
    _no_split_modules = ["RobertaEmbeddings", "ObceBertLayer"]  # noqa: RUF012  (transformers' own form)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": ObceBertLayer,
        "attentions": ObceBertSelfAttention,
    }


class ObceRobertaModel(ObceRobertaPreTrainedModel, RobertaModel):
    """`RobertaModel` with layers of unequal widths."""


class ObceRobertaForMaskedLM(ObceRobertaPreTrainedModel, RobertaForMaskedLM):
    """`RobertaForMaskedLM` on `ObceRobertaModel`."""


class ObceRobertaForSequenceClassification(ObceRobertaPreTrainedModel, RobertaForSequenceClassification):
    """`RobertaForSequenceClassification` on `ObceRobertaModel`."""


class ObceRobertaForMultipleChoice(ObceRobertaPreTrainedModel, RobertaForMultipleChoice):
    """`RobertaForMultipleChoice` on `ObceRobertaModel`."""


class ObceRobertaForTokenClassification(ObceRobertaPreTrainedModel, RobertaForTokenClassification):
    """`RobertaForTokenClassification` on `ObceRobertaModel`."""


class ObceRobertaForQuestionAnswering(ObceRobertaPreTrainedModel, RobertaForQuestionAnswering):
    """`RobertaForQuestionAnswering` on `ObceRobertaModel`."""


class ObceXLMRobertaPreTrainedModel(NarrowModel):
    """Settings shared by `ObceXLMRobertaModel` and its heads."""

    config_class = ObceXLMRobertaConfig
    narrow_layer = ObceBertLayer
    _no_split_modules = ["XLMRobertaEmbeddings", "ObceBertLayer"]  # noqa: RUF012  (transformers' own form)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": ObceBertLayer,
        "attentions": ObceBertSelfAttention,
    }


class ObceXLMRobertaModel(ObceXLMRobertaPreTrainedModel, XLMRobertaModel):
    """`XLMRobertaModel` with layers of unequal widths."""


class ObceXLMRobertaForMaskedLM(ObceXLMRobertaPreTrainedModel, XLMRobertaForMaskedLM):
    """`XLMRobertaForMaskedLM` on `ObceXLMRobertaModel`."""


class ObceXLMRobertaForSequenceClassification(ObceXLMRobertaPreTrainedModel, XLMRobertaForSequenceClassification):
    """`XLMRobertaForSequenceClassification` on `ObceXLMRobertaModel`."""


class ObceXLMRobertaForMultipleChoice(ObceXLMRobertaPreTrainedModel, XLMRobertaForMultipleChoice):
    """`XLMRobertaForMultipleChoice` on `ObceXLMRobertaModel`."""


class ObceXLMRobertaForTokenClassification(ObceXLMRobertaPreTrainedModel, XLMRobertaForTokenClassification):
    """`XLMRobertaForTokenClassification` on `ObceXLMRobertaModel`."""


class ObceXLMRobertaForQuestionAnswering(ObceXLMRobertaPreTrainedModel, XLMRobertaForQuestionAnswering):
    """`XLMRobertaForQuestionAnswering` on `ObceXLMRobertaModel`."""


class ObceElectraPreTrainedModel(NarrowModel):
    """Settings shared by `ObceElectraModel` and its heads."""

    config_class = ObceElectraConfig
    narrow_layer = ObceBertLayer
    _no_split_modules = ["ElectraEmbeddings", "ObceBertLayer"]  # noqa: RUF012  (transformers' own form)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": ObceBertLayer,
        "attentions": ObceBertSelfAttention,
    }


class ObceElectraModel(ObceElectraPreTrainedModel, ElectraModel):
    """`ElectraModel` with layers of unequal widths."""


class ObceElectraForPreTraining(ObceElectraPreTrainedModel, ElectraForPreTraining):
    """`ElectraForPreTraining` on `ObceElectraModel`."""


class ObceElectraForMaskedLM(ObceElectraPreTrainedModel, ElectraForMaskedLM):
    """`ElectraForMaskedLM` on `ObceElectraModel`."""


class ObceElectraForSequenceClassification(ObceElectraPreTrainedModel, ElectraForSequenceClassification):
    """`ElectraForSequenceClassification` on `ObceElectraModel`."""


class ObceElectraForMultipleChoice(ObceElectraPreTrainedModel, ElectraForMultipleChoice):
    """`ElectraForMultipleChoice` on `ObceElectraModel`."""


class ObceElectraForTokenClassification(ObceElectraPreTrainedModel, ElectraForTokenClassification):
    """`ElectraForTokenClassification` on `ObceElectraModel`."""


class ObceElectraForQuestionAnswering(ObceElectraPreTrainedModel, ElectraForQuestionAnswering):
    """`ElectraForQuestionAnswering` on `ObceElectraModel`."""


class ObceDebertaV2PreTrainedModel(NarrowModel):
    """Settings shared by `ObceDebertaV2Model` and its heads."""

    config_class = ObceDebertaV2Config
    narrow_layer = ObceDebertaV2Layer
    _supports_sdpa = False
    _no_split_modules = ["DebertaV2Embeddings", "ObceDebertaV2Layer"]  # noqa: RUF012  (transformers' own form)


class ObceDebertaV2Model(ObceDebertaV2PreTrainedModel, DebertaV2Model):
    """`DebertaV2Model` with layers of unequal widths."""


class ObceDebertaV2ForMaskedLM(ObceDebertaV2PreTrainedModel, DebertaV2ForMaskedLM):
    """`DebertaV2ForMaskedLM` on `ObceDebertaV2Model`."""


class ObceDebertaV2ForSequenceClassification(ObceDebertaV2PreTrainedModel, DebertaV2ForSequenceClassification):
    """`DebertaV2ForSequenceClassification` on `ObceDebertaV2Model`."""


class ObceDebertaV2ForMultipleChoice(ObceDebertaV2PreTrainedModel, DebertaV2ForMultipleChoice):
    """`DebertaV2ForMultipleChoice` on `ObceDebertaV2Model`."""


class ObceDebertaV2ForTokenClassification(ObceDebertaV2PreTrainedModel, DebertaV2ForTokenClassification):
    """`DebertaV2ForTokenClassification` on `ObceDebertaV2Model`."""


class ObceDebertaV2ForQuestionAnswering(ObceDebertaV2PreTrainedModel, DebertaV2ForQuestionAnswering):
    """`DebertaV2ForQuestionAnswering` on `ObceDebertaV2Model`."""


class ObceDistilBertPreTrainedModel(NarrowModel):
    """Settings shared by `ObceDistilBertModel` and its heads."""

    config_class = ObceDistilBertConfig
    narrow_layer = ObceDistilBertLayer
    _no_split_modules = ["Embeddings", "ObceDistilBertLayer"]  # noqa: RUF012  (transformers' own form)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": ObceDistilBertLayer,
        "attentions": ObceDistilBertSelfAttention,
    }


class ObceDistilBertModel(ObceDistilBertPreTrainedModel, DistilBertModel):
    """`DistilBertModel` with layers of unequal widths."""


class ObceDistilBertForMaskedLM(ObceDistilBertPreTrainedModel, DistilBertForMaskedLM):
    """`DistilBertForMaskedLM` on `ObceDistilBertModel`."""


class ObceDistilBertForSequenceClassification(ObceDistilBertPreTrainedModel, DistilBertForSequenceClassification):
    """`DistilBertForSequenceClassification` on `ObceDistilBertModel`."""


class ObceDistilBertForMultipleChoice(ObceDistilBertPreTrainedModel, DistilBertForMultipleChoice):
    """`DistilBertForMultipleChoice` on `ObceDistilBertModel`."""


class ObceDistilBertForTokenClassification(ObceDistilBertPreTrainedModel, DistilBertForTokenClassification):
    """`DistilBertForTokenClassification` on `ObceDistilBertModel`."""


class ObceDistilBertForQuestionAnswering(ObceDistilBertPreTrainedModel, DistilBertForQuestionAnswering):
    """`DistilBertForQuestionAnswering` on `ObceDistilBertModel`."""


class ObceModernBertPreTrainedModel(NarrowModel):
    """Settings shared by `ObceModernBertModel` and its heads."""

    config_class = ObceModernBertConfig
    narrow_layer = ObceModernBertLayer
    drawn_by_depth = True
    _no_split_modules = ["ModernBertEmbeddings", "ObceModernBertLayer"]  # noqa: RUF012  (transformers' own form)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": ObceModernBertLayer,
        "attentions": ObceModernBertAttention,
    }


class ObceModernBertModel(ObceModernBertPreTrainedModel, ModernBertModel):
    """`ModernBertModel` with layers of unequal widths."""


class ObceModernBertForMaskedLM(ObceModernBertPreTrainedModel, ModernBertForMaskedLM):
    """`ModernBertForMaskedLM` on `ObceModernBertModel`."""


class ObceModernBertForSequenceClassification(ObceModernBertPreTrainedModel, ModernBertForSequenceClassification):
    """`ModernBertForSequenceClassification` on `ObceModernBertModel`."""


class ObceModernBertForMultipleChoice(ObceModernBertPreTrainedModel, ModernBertForMultipleChoice):
    """`ModernBertForMultipleChoice` on `ObceModernBertModel`."""


class ObceModernBertForTokenClassification(ObceModernBertPreTrainedModel, ModernBertForTokenClassification):
    """`ModernBertForTokenClassification` on `ObceModernBertModel`."""


class ObceModernBertForQuestionAnswering(ObceModernBertPreTrainedModel, ModernBertForQuestionAnswering):
    """`ModernBertForQuestionAnswering` on `ObceModernBertModel`."""


class ObceMPNetPreTrainedModel(NarrowModel):
    """Settings shared by `ObceMPNetModel` and its heads."""

    config_class = ObceMPNetConfig
    narrow_layer = ObceMPNetLayer
    _supports_sdpa = False
    _no_split_modules = ["MPNetEmbeddings", "ObceMPNetLayer"]  # noqa: RUF012  (transformers' own form)


class ObceMPNetModel(ObceMPNetPreTrainedModel, MPNetModel):
    """`MPNetModel` with layers of unequal widths."""


class ObceMPNetForMaskedLM(ObceMPNetPreTrainedModel, MPNetForMaskedLM):
    """`MPNetForMaskedLM` on `ObceMPNetModel`."""


class ObceMPNetForSequenceClassification(ObceMPNetPreTrainedModel, MPNetForSequenceClassification):
    """`MPNetForSequenceClassification` on `ObceMPNetModel`."""


class ObceMPNetForMultipleChoice(ObceMPNetPreTrainedModel, MPNetForMultipleChoice):
    """`MPNetForMultipleChoice` on `ObceMPNetModel`."""


class ObceMPNetForTokenClassification(ObceMPNetPreTrainedModel, MPNetForTokenClassification):
    """`MPNetForTokenClassification` on `ObceMPNetModel`."""


class ObceMPNetForQuestionAnswering(ObceMPNetPreTrainedModel, MPNetForQuestionAnswering):
    """`MPNetForQuestionAnswering` on `ObceMPNetModel`."""


class ObceGPT2PreTrainedModel(NarrowModel):
    """Settings shared by `ObceGPT2Model` and its heads."""

    config_class = ObceGPT2Config
    narrow_layer = ObceGPT2Block
    _no_split_modules = ["ObceGPT2Block"]  # noqa: RUF012  (transformers' own form)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": ObceGPT2Block,
        "attentions": ObceGPT2Attention,
    }


class ObceGPT2Model(ObceGPT2PreTrainedModel, GPT2Model):
    """`GPT2Model` with layers of unequal widths."""


class ObceGPT2LMHeadModel(ObceGPT2PreTrainedModel, GPT2LMHeadModel):
    """`GPT2LMHeadModel` on `ObceGPT2Model`."""


class ObceGPT2ForSequenceClassification(ObceGPT2PreTrainedModel, GPT2ForSequenceClassification):
    """`GPT2ForSequenceClassification` on `ObceGPT2Model`."""


class ObceGPT2ForTokenClassification(ObceGPT2PreTrainedModel, GPT2ForTokenClassification):
    """`GPT2ForTokenClassification` on `ObceGPT2Model`."""


class ObceGPT2ForQuestionAnswering(ObceGPT2PreTrainedModel, GPT2ForQuestionAnswering):
    """`GPT2ForQuestionAnswering` on `ObceGPT2Model`."""


class ObceLlamaPreTrainedModel(NarrowModel):
    """Settings shared by `ObceLlamaModel` and its heads."""

    config_class = ObceLlamaConfig
    narrow_layer = ObceLlamaLayer
    _no_split_modules = ["ObceLlamaLayer"]  # noqa: RUF012  (transformers' own form)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": ObceLlamaLayer,
        "attentions": ObceLlamaAttention,
    }


class ObceLlamaModel(ObceLlamaPreTrainedModel, LlamaModel):
    """`LlamaModel` with layers of unequal widths."""


class ObceLlamaForCausalLM(ObceLlamaPreTrainedModel, LlamaForCausalLM):
    """`LlamaForCausalLM` on `ObceLlamaModel`."""


class ObceLlamaForSequenceClassification(ObceLlamaPreTrainedModel, LlamaForSequenceClassification):
    """`LlamaForSequenceClassification` on `ObceLlamaModel`."""


class ObceLlamaForTokenClassification(ObceLlamaPreTrainedModel, LlamaForTokenClassification):
    """`LlamaForTokenClassification` on `ObceLlamaModel`."""


class ObceLlamaForQuestionAnswering(ObceLlamaPreTrainedModel, LlamaForQuestionAnswering):
    """`LlamaForQuestionAnswering` on `ObceLlamaModel`."""


class ObceQwen2PreTrainedModel(NarrowModel):
    """Settings shared by `ObceQwen2Model` and its heads."""

    config_class = ObceQwen2Config
    narrow_layer = ObceQwen2Layer
    _no_split_modules = ["ObceQwen2Layer"]  # noqa: RUF012  (transformers' own form)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": ObceQwen2Layer,
        "attentions": ObceQwen2Attention,
    }


class ObceQwen2Model(ObceQwen2PreTrainedModel, Qwen2Model):
    """`Qwen2Model` with layers of unequal widths."""


class ObceQwen2ForCausalLM(ObceQwen2PreTrainedModel, Qwen2ForCausalLM):
    """`Qwen2ForCausalLM` on `ObceQwen2Model`."""


class ObceQwen2ForSequenceClassification(ObceQwen2PreTrainedModel, Qwen2ForSequenceClassification):
    """`Qwen2ForSequenceClassification` on `ObceQwen2Model`."""


class ObceQwen2ForTokenClassification(ObceQwen2PreTrainedModel, Qwen2ForTokenClassification):
    """`Qwen2ForTokenClassification` on `ObceQwen2Model`."""


class ObceQwen2ForQuestionAnswering(ObceQwen2PreTrainedModel, Qwen2ForQuestionAnswering):
    """`Qwen2ForQuestionAnswering` on `ObceQwen2Model`."""


class ObceQwen3PreTrainedModel(NarrowModel):
    """Settings shared by `ObceQwen3Model` and its heads."""

    config_class = ObceQwen3Config
    narrow_layer = ObceQwen3Layer
    _no_split_modules = ["ObceQwen3Layer"]  # noqa: RUF012  (transformers' own form)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": ObceQwen3Layer,
        "attentions": ObceQwen3Attention,
    }


class ObceQwen3Model(ObceQwen3PreTrainedModel, Qwen3Model):
    """`Qwen3Model` with layers of unequal widths."""


class ObceQwen3ForCausalLM(ObceQwen3PreTrainedModel, Qwen3ForCausalLM):
    """`Qwen3ForCausalLM` on `ObceQwen3Model`."""


class ObceQwen3ForSequenceClassification(ObceQwen3PreTrainedModel, Qwen3ForSequenceClassification):
    """`Qwen3ForSequenceClassification` on `ObceQwen3Model`."""


class ObceQwen3ForTokenClassification(ObceQwen3PreTrainedModel, Qwen3ForTokenClassification):
    """`Qwen3ForTokenClassification` on `ObceQwen3Model`."""


class ObceQwen3ForQuestionAnswering(ObceQwen3PreTrainedModel, Qwen3ForQuestionAnswering):
    """`Qwen3ForQuestionAnswering` on `ObceQwen3Model`."""


class ObceViTPreTrainedModel(NarrowModel):
    """Settings shared by `ObceViTModel` and its heads."""

    config_class = ObceViTConfig
    narrow_layer = ObceViTLayer
    _no_split_modules = ["ViTEmbeddings", "ObceViTLayer"]  # noqa: RUF012  (transformers' own form)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": ObceViTLayer,
        "attentions": ObceViTAttention,
    }


class ObceViTModel(ObceViTPreTrainedModel, ViTModel):
    """`ViTModel` with layers of unequal widths."""


class ObceViTForImageClassification(ObceViTPreTrainedModel, ViTForImageClassification):
    """`ViTForImageClassification` on `ObceViTModel`."""


class ObceViTForMaskedImageModeling(ObceViTPreTrainedModel, ViTForMaskedImageModeling):
    """`ViTForMaskedImageModeling` on `ObceViTModel`."""


_BODIES: dict[type[Any], type[NarrowModel]] = {
    BertModel: ObceBertModel,
    RobertaModel: ObceRobertaModel,
    XLMRobertaModel: ObceXLMRobertaModel,
    ElectraModel: ObceElectraModel,
    DebertaV2Model: ObceDebertaV2Model,
    DistilBertModel: ObceDistilBertModel,
    MPNetModel: ObceMPNetModel,
    ModernBertModel: ObceModernBertModel,
    GPT2Model: ObceGPT2Model,
    LlamaModel: ObceLlamaModel,
    Qwen2Model: ObceQwen2Model,
    Qwen3Model: ObceQwen3Model,
    ViTModel: ObceViTModel,
}

__all__ = [
    "CheckedModel",
    "NarrowAttention",
    "NarrowModel",
    "ObceBertForMaskedLM",
    "ObceBertForMultipleChoice",
    "ObceBertForNextSentencePrediction",
    "ObceBertForPreTraining",
    "ObceBertForQuestionAnswering",
    "ObceBertForSequenceClassification",
    "ObceBertForTokenClassification",
    "ObceBertModel",
    "ObceBertPreTrainedModel",
    "ObceDebertaV2ForMaskedLM",
    "ObceDebertaV2ForMultipleChoice",
    "ObceDebertaV2ForQuestionAnswering",
    "ObceDebertaV2ForSequenceClassification",
    "ObceDebertaV2ForTokenClassification",
    "ObceDebertaV2Model",
    "ObceDebertaV2PreTrainedModel",
    "ObceDistilBertForMaskedLM",
    "ObceDistilBertForMultipleChoice",
    "ObceDistilBertForQuestionAnswering",
    "ObceDistilBertForSequenceClassification",
    "ObceDistilBertForTokenClassification",
    "ObceDistilBertModel",
    "ObceDistilBertPreTrainedModel",
    "ObceElectraForMaskedLM",
    "ObceElectraForMultipleChoice",
    "ObceElectraForPreTraining",
    "ObceElectraForQuestionAnswering",
    "ObceElectraForSequenceClassification",
    "ObceElectraForTokenClassification",
    "ObceElectraModel",
    "ObceElectraPreTrainedModel",
    "ObceGPT2ForQuestionAnswering",
    "ObceGPT2ForSequenceClassification",
    "ObceGPT2ForTokenClassification",
    "ObceGPT2LMHeadModel",
    "ObceGPT2Model",
    "ObceGPT2PreTrainedModel",
    "ObceLlamaForCausalLM",
    "ObceLlamaForQuestionAnswering",
    "ObceLlamaForSequenceClassification",
    "ObceLlamaForTokenClassification",
    "ObceLlamaModel",
    "ObceLlamaPreTrainedModel",
    "ObceMPNetForMaskedLM",
    "ObceMPNetForMultipleChoice",
    "ObceMPNetForQuestionAnswering",
    "ObceMPNetForSequenceClassification",
    "ObceMPNetForTokenClassification",
    "ObceMPNetModel",
    "ObceMPNetPreTrainedModel",
    "ObceModernBertForMaskedLM",
    "ObceModernBertForMultipleChoice",
    "ObceModernBertForQuestionAnswering",
    "ObceModernBertForSequenceClassification",
    "ObceModernBertForTokenClassification",
    "ObceModernBertModel",
    "ObceModernBertPreTrainedModel",
    "ObceQwen2ForCausalLM",
    "ObceQwen2ForQuestionAnswering",
    "ObceQwen2ForSequenceClassification",
    "ObceQwen2ForTokenClassification",
    "ObceQwen2Model",
    "ObceQwen2PreTrainedModel",
    "ObceQwen3ForCausalLM",
    "ObceQwen3ForQuestionAnswering",
    "ObceQwen3ForSequenceClassification",
    "ObceQwen3ForTokenClassification",
    "ObceQwen3Model",
    "ObceQwen3PreTrainedModel",
    "ObceRobertaForMaskedLM",
    "ObceRobertaForMultipleChoice",
    "ObceRobertaForQuestionAnswering",
    "ObceRobertaForSequenceClassification",
    "ObceRobertaForTokenClassification",
    "ObceRobertaModel",
    "ObceRobertaPreTrainedModel",
    "ObceRows",
    "ObceViTForImageClassification",
    "ObceViTForMaskedImageModeling",
    "ObceViTModel",
    "ObceViTPreTrainedModel",
    "ObceXLMRobertaForMaskedLM",
    "ObceXLMRobertaForMultipleChoice",
    "ObceXLMRobertaForQuestionAnswering",
    "ObceXLMRobertaForSequenceClassification",
    "ObceXLMRobertaForTokenClassification",
    "ObceXLMRobertaModel",
    "ObceXLMRobertaPreTrainedModel",
    "parts_of",
]
