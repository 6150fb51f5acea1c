"""Random tiny models and plans that tests and scripts share; imported by its name, as it lies beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from obce.plan import Plan, Size
from obce.sites import LAYOUTS, architecture, model_hash

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from obce.scores import Scores
    from transformers import PreTrainedModel

PREFIXES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "electra": "Electra",
    "deberta-v2": "DebertaV2",
    "distilbert": "DistilBert",
    "mpnet": "MPNet",
    "modernbert": "ModernBert",
    "gpt2": "GPT2",
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "vit": "ViT",
}
"""Family -> how the names of its classes begin."""

BERT_HEADS = {
    "AutoModel": "BertModel",
    "AutoModelForPreTraining": "BertForPreTraining",
    "AutoModelForMaskedLM": "BertForMaskedLM",
    "AutoModelForNextSentencePrediction": "BertForNextSentencePrediction",
    "AutoModelForSequenceClassification": "BertForSequenceClassification",
    "AutoModelForMultipleChoice": "BertForMultipleChoice",
    "AutoModelForTokenClassification": "BertForTokenClassification",
    "AutoModelForQuestionAnswering": "BertForQuestionAnswering",
}
"""Auto class -> the class of BERT that it gives."""

LAYERS, HEADS, HIDDEN, INNER = 2, 4, 32, 48

KEY_VALUE_HEADS = dict.fromkeys(PREFIXES, HEADS) | {"llama": 2, "qwen2": 2, "qwen3": 2}
"""Family -> heads of key and value; each is shared by the same number of query heads."""

HEAD_SIZE = dict.fromkeys(PREFIXES, HIDDEN // HEADS) | {"qwen3": 12}
"""Family -> size of a head, dense."""

DEPTH = dict.fromkeys(PREFIXES, LAYERS) | {"modernbert": 4}
"""Family -> layers; the first and the last of a ModernBERT look at all tokens, those between at their neighbours."""

_OF_FAMILY: dict[str, dict[str, Any]] = {
    "electra": {"embedding_size": 16},
    "modernbert": {
        "local_attention": 8,
        "global_attn_every_n_layers": 3,
        **dict.fromkeys(("bos_token_id", "cls_token_id"), 1),
        **dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
    },
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 12},
    "vit": {"image_size": 16, "patch_size": 8, "encoder_stride": 8},
    "deberta-v2": {
        "relative_attention": True,
        "share_att_key": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
    },
}


def class_name(family: str, head: str = "") -> str:
    """Name of transformers' class of a family with a head, or without one."""
    if (family, head) == ("gpt2", "CausalLM"):
        return "GPT2LMHeadModel"
    return f"{PREFIXES[family]}For{head}" if head else f"{PREFIXES[family]}Model"


def classifier_of(family: str) -> str:
    """The head that gives one answer about a whole text, or about a picture."""
    return "ImageClassification" if LAYOUTS[family].pictures else "SequenceClassification"


def make_pictures(n: int, seed: int = 0, size: int = 16) -> NDArray[np.uint8]:
    """uint8 [n, size, size, 3]: distinct pictures of two colours that flow into each other, under some noise."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (2, n, 1, 1, 3))
    across, down = rng.random((2, n, 1, 1, 1))
    place = np.arange(size) / size
    blend = (across * place[None, None, :, None] + down * place[None, :, None, None]) / 2
    drawn = colours[0] * blend + colours[1] * (1 - blend) + rng.normal(0, 12, (n, size, size, 3))
    return np.asarray(drawn.clip(0, 255), np.uint8)


def processed(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float32 [n, 3, size, size], as an image processor gives them."""
    return np.asarray(pictures.transpose(0, 3, 1, 2) / 127.5 - 1, np.float32)


_SITES_OF_BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}

SITE_MAPS: dict[str, dict[str, Any]] = {
    "camembert": {  # LayerNorms behind what writes the stream
        "model_type": "camembert",
        "stack": "encoder.layer",
        "sites": _SITES_OF_BERT,
        "norms": ["attention.output.LayerNorm", "output.LayerNorm"],
        "first_norm": "embeddings.LayerNorm",
    },
    "esm": {  # and before what reads it
        "model_type": "esm",
        "stack": "encoder.layer",
        "sites": _SITES_OF_BERT,
        "norms": ["attention.LayerNorm", "LayerNorm"],
        "pre_norm": True,
        "last_norm": "encoder.emb_layer_norm_after",
    },
    "nomic_bert": {  # gated in two Linears, without biases
        "model_type": "nomic_bert",
        "stack": "layers",
        "sites": {
            "query": "self_attn.q_proj",
            "key": "self_attn.k_proj",
            "value": "self_attn.v_proj",
            "attention_output": "self_attn.o_proj",
            "intermediate": ["mlp.gate_proj", "mlp.up_proj"],
            "output": "mlp.down_proj",
        },
    },
}
"""Family that obce does not know by itself -> a site map of it."""

_MAPPED_PREFIXES = {"camembert": "Camembert", "esm": "Esm", "nomic_bert": "NomicBert"}


def make_mapped(family: str, head: str = "", seed: int = 0, **config: Any) -> Any:
    """As `make_encoder`, of one of the families of `SITE_MAPS`."""
    given: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
        "max_position_embeddings": 70,
        "initializer_range": 0.25,
        "pad_token_id": 0,
    }
    if family == "esm":
        given |= {"position_embedding_type": "rotary", "mask_token_id": 4, "token_dropout": False}
    kind = _MAPPED_PREFIXES[family]
    torch.manual_seed(seed)
    name = f"{kind}For{head}" if head else f"{kind}Model"
    model = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**{**given, **config})).eval()
    shift_biases(model, seed)
    return model


def make_encoder(family: str, head: str = "", seed: int = 0, **config: Any) -> Any:
    """A random model whose activations are far from zero mean, so that repairs and biases matter.

    Args:
        family: One of `PREFIXES`.
        head: How the name of its class ends behind "For", or nothing.
        seed: Of its weights.
        **config: Other fields of its config.
    """
    given: dict[str, Any] = {"initializer_range": 0.25}
    if not LAYOUTS[family].pictures:
        given |= {"vocab_size": 256, "max_position_embeddings": 70, "pad_token_id": 0}
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": DEPTH[family], "num_attention_heads": HEADS}
    if family == "distilbert":
        sizes = {"dim": HIDDEN, "n_layers": DEPTH[family], "n_heads": HEADS}
    given |= {LAYOUTS[family].inner: INNER, **sizes, **_OF_FAMILY.get(family, {}), **config}
    torch.manual_seed(seed)
    made = getattr(transformers, f"{PREFIXES[family]}Config")(**given)
    model = getattr(transformers, class_name(family, head))(made).eval()
    shift_biases(model, seed)
    return model


@torch.no_grad()
def shift_biases(model: Any, seed: int) -> None:
    """Moves every bias away from zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def make_plan(
    model: PreTrainedModel, kept: Mapping[str, Sequence[int]], dropped: tuple[int, ...] = (), **fields: Any
) -> Plan:
    """A plan that keeps these neurons, whatever a score would say; its sizes mean nothing."""
    size = Size(parameters=100, encoder=50, flops=10, bytes=400)
    facts: dict[str, Any] = {
        "model_hash": model_hash(model),
        "architecture": architecture(model),
        "corpus_hash": "c0",
        "score": "rf",
        "preset": None,
        "keep": 0.5,
        "of": "encoder",
        "seed": 0,
        "floor": 0.0,
        "levels": {},
        "kept": {name: tuple(indices) for name, indices in kept.items()},
        "before": size,
        "after": size,
        "layers_dropped": dropped,
    }
    return Plan(**{**facts, **fields})


def equal_scores(a: Scores, b: Scores) -> None:
    """Bit for bit: columns, texts and clouds."""
    assert list(a.columns) == list(b.columns)
    for name, column in a.columns.items():
        np.testing.assert_array_equal(column, b.columns[name], err_msg=name)
    for name, ids in a.texts.items():
        np.testing.assert_array_equal(ids, b.texts[name], err_msg=name)
    assert a.clouds is not None
    assert b.clouds is not None
    for name, column in a.clouds.columns.items():
        np.testing.assert_array_equal(column, b.clouds.columns[name], err_msg=name)
