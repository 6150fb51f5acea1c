"""Encoders whose layers have unequal widths, and their families' heads on them.

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
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import initialization
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
from transformers.models.roberta.modeling_roberta import (
    RobertaForMaskedLM,
    RobertaForMultipleChoice,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
)
from transformers.models.xlm_roberta.modeling_xlm_roberta import (
    XLMRobertaForMaskedLM,
    XLMRobertaForMultipleChoice,
    XLMRobertaForQuestionAnswering,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
    XLMRobertaModel,
)

from .checkpoint_obce import check_checkpoint
from .configuration_obce import (
    LayerWidths,
    NarrowConfig,
    ObceBertConfig,
    ObceDebertaV2Config,
    ObceDistilBertConfig,
    ObceElectraConfig,
    ObceModernBertConfig,
    ObceMPNetConfig,
    ObceRobertaConfig,
    ObceXLMRobertaConfig,
)

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


class NarrowAttention(nn.Module):
    """Self-attention with one head size for query and key and another for value; each family names its Linears.

    Without heads it has no Linears for query, key and value, and attends to nothing.

    Args:
        config: The model's own config, not a copy: `set_attn_implementation` changes it in place.
        widths: Of the layer.
        names: Names of the Linears for query, key and value, or none, where a subclass has another way.
        dropout: Of attention weights.
        layer: Number of the layer.

    Attributes:
        dropout_name: Name of the Dropout whose share attention weights lose.
        eager: Attention without a kernel.
    """

    dropout_name = "dropout"
    eager: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = staticmethod(eager_attention_forward)

    def __init__(
        self, config: NarrowConfig, widths: LayerWidths, names: tuple[str, ...], dropout: float, layer: int
    ) -> None:
        super().__init__()
        self.config: Any = config
        self.num_attention_heads = widths.heads
        self.scaling = (self.config.hidden_size // self.config.num_attention_heads) ** -0.5
        self.names = names
        if widths.heads:
            for name, width in zip(names, (widths.query_key, widths.query_key, widths.value), strict=bool(names)):
                self.add_module(name, nn.Linear(self.config.hidden_size, width))
        self.add_module(self.dropout_name, nn.Dropout(dropout))
        self.is_causal = False
        self.layer_idx = layer

    def heads(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Query, key and value [B, heads, T, head size] of hidden states [B, T, hidden]."""
        split = (*hidden.shape[:-1], self.num_attention_heads, -1)
        return [self.get_submodule(name)(hidden).view(split).transpose(1, 2) for name in self.names]

    def context(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        turn: Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Context [B, T, value width] and, with the eager implementation, attention weights [B, heads, T, T].

        `turn` makes query and key of what they were, by their positions.
        """
        shape = hidden.shape[:-1]
        if not self.num_attention_heads:
            eager = self.config._attn_implementation == "eager"
            none = hidden.new_zeros(shape[0], 0, shape[1], shape[1]) if eager else None
            return hidden.new_zeros(*shape, 0), none
        query, key, value = self.heads(hidden)
        if turn is not None:
            query, key = turn(query, key)
        attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self.eager
        )
        context, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.get_submodule(self.dropout_name).p if self.training else 0.0,
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
    """What pruned encoders of all families share; stands before the family's class among the bases.

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
                super().__init__(config, *args, **kwargs)
        finally:
            config.num_hidden_layers = layers
        body = self.base_model
        if body is self:
            stack: Any = next(module for module in self.modules() if isinstance(module, nn.ModuleList))
            stack.extend(self.narrow_layer(config, widths, i) for i, widths in enumerate(config.layer_widths()))
        else:
            pooling = {"add_pooling_layer": False} if getattr(body, "pooler", self) is None else {}
            setattr(self, self.base_model_prefix, _BODIES[type(body)](config, **pooling))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ObceRows):
            initialization.zeros_(module.bias)
            if module.weight is not None and module.kept is not None:
                initialization.normal_(module.weight, std=self.config.initializer_range)
                initialization.copy_(module.kept, torch.arange(len(module.kept)))


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


_BODIES: dict[type[Any], type[NarrowModel]] = {
    BertModel: ObceBertModel,
    RobertaModel: ObceRobertaModel,
    XLMRobertaModel: ObceXLMRobertaModel,
    ElectraModel: ObceElectraModel,
    DebertaV2Model: ObceDebertaV2Model,
    DistilBertModel: ObceDistilBertModel,
    MPNetModel: ObceMPNetModel,
    ModernBertModel: ObceModernBertModel,
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
    "ObceRobertaForMaskedLM",
    "ObceRobertaForMultipleChoice",
    "ObceRobertaForQuestionAnswering",
    "ObceRobertaForSequenceClassification",
    "ObceRobertaForTokenClassification",
    "ObceRobertaModel",
    "ObceRobertaPreTrainedModel",
    "ObceRows",
    "ObceXLMRobertaForMaskedLM",
    "ObceXLMRobertaForMultipleChoice",
    "ObceXLMRobertaForQuestionAnswering",
    "ObceXLMRobertaForSequenceClassification",
    "ObceXLMRobertaForTokenClassification",
    "ObceXLMRobertaModel",
    "ObceXLMRobertaPreTrainedModel",
]
