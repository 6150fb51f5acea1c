"""Sites of a model, its fingerprint and its facts; what is refused, and in which words."""

from __future__ import annotations

import copy
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from obce.sites import SITE_KINDS, architecture, base_model, find_sites, model_hash
from torch import nn

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import BertModel

HEADS = [
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
]


def with_head(body: BertModel, name: str) -> Any:
    """A model with a random head on a copy of the body."""
    model = getattr(transformers, name)(copy.deepcopy(body.config)).eval()
    model.bert.load_state_dict(body.state_dict(), strict=model.bert.pooler is not None)
    return model


def test_every_layer_has_its_six_sites_in_order(tiny_bert: BertModel) -> None:
    sites = find_sites(tiny_bert)
    assert [(s.layer, s.kind) for s in sites] == [(layer, kind) for layer in range(3) for kind in SITE_KINDS]
    for site in sites:
        assert site.name == f"{site.layer}.{site.kind}"
        writer = tiny_bert.get_submodule(site.writer)
        assert isinstance(writer, nn.Linear)
        assert writer.out_features == site.width
        assert f"encoder.layer.{site.layer}." in site.writer
        assert site.heads == (4 if site.kind in ("query", "key", "value") else 1)
        if site.kind in ("value", "intermediate"):
            assert site.reader is not None
            reader = tiny_bert.get_submodule(site.reader)
            assert isinstance(reader, nn.Linear)
            assert reader.in_features == site.width
        else:
            assert site.reader is None


def test_the_reader_takes_in_what_the_writer_gives(tiny_bert: BertModel) -> None:
    """Marking one neuron in the writer changes just that column of the reader's input."""
    for site in find_sites(tiny_bert):
        if site.reader is None:
            continue
        seen: list[torch.Tensor] = []
        reader = tiny_bert.get_submodule(site.reader)
        handle = reader.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
        ids = torch.tensor([[2, 9, 17, 3]])
        try:
            with torch.no_grad():
                tiny_bert(ids)
                tiny_bert.get_submodule(site.writer).bias[5] += 1.0
                tiny_bert(ids)
        finally:
            handle.remove()
        changed = (seen[0] != seen[1]).any(dim=(0, 1)).nonzero().flatten().tolist()
        assert changed == [5]


@pytest.mark.parametrize("head", HEADS)
def test_a_head_changes_neither_sites_nor_hash(tiny_bert: BertModel, head: str) -> None:
    model = with_head(tiny_bert, head)
    assert base_model(model) is model.bert
    assert base_model(tiny_bert) is tiny_bert
    assert find_sites(model) == find_sites(tiny_bert)
    assert model_hash(model) == model_hash(tiny_bert)


def test_hash_sees_every_weight_of_the_body_and_nothing_else(tiny_bert: BertModel) -> None:
    first = model_hash(tiny_bert)
    assert re.fullmatch("[0-9a-f]{64}", first)
    for name, parameter in tiny_bert.named_parameters():
        flat = parameter.data.view(-1)
        old = flat[-1].item()
        flat[-1] = old + 1e-3
        assert (model_hash(tiny_bert) == first) == name.startswith("pooler."), name
        flat[-1] = old
    assert model_hash(tiny_bert) == first


def test_hash_depends_on_values_not_on_layout_or_file(
    tiny_bert: BertModel, tiny_bert_dir: Path, tmp_path: Path
) -> None:
    first = model_hash(tiny_bert)
    weight = tiny_bert.encoder.layer[1].intermediate.dense.weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    assert model_hash(tiny_bert) == first
    assert model_hash(transformers.BertModel.from_pretrained(tiny_bert_dir)) == first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_hash_of_other_dtypes(tiny_bert: BertModel, dtype: torch.dtype) -> None:
    first = model_hash(tiny_bert)
    other = copy.deepcopy(tiny_bert).to(dtype)
    assert model_hash(other) == model_hash(copy.deepcopy(other)) != first
    if dtype != torch.float64:
        assert model_hash(copy.deepcopy(other).float()) == model_hash(other)


def test_hash_tells_bytes_of_unlike_shape_apart(tiny_bert: BertModel) -> None:
    first = model_hash(tiny_bert)
    weight = tiny_bert.encoder.layer[0].attention.self.query.weight
    weight.data = weight.data.reshape(16, 64)
    assert model_hash(tiny_bert) != first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_hash_does_not_depend_on_the_device(tiny_bert: BertModel) -> None:
    assert model_hash(copy.deepcopy(tiny_bert).to("cuda")) == model_hash(tiny_bert)


def test_architecture_is_plain_facts(tiny_bert: BertModel) -> None:
    model = with_head(tiny_bert, "BertForSequenceClassification")
    facts = architecture(model)
    assert json.loads(json.dumps(facts)) == facts
    assert facts == {
        "model_type": "bert",
        "class": "BertForSequenceClassification",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "embedding_size": 0,
        "distances": 0,
        "distance_products": 0,
        "intermediate_size": 64,
        "vocab_size": tiny_bert.config.vocab_size,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "dtype": "float32",
        "pooler": True,
        "parameters": sum(p.numel() for p in model.parameters()),
        "encoder_parameters": 3 * (4 * (32 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 4 * 32),
        "weight_bytes": sum(4 * p.numel() for p in model.parameters()),
        "encoder_element_bytes": 4,
    }


class TestRefusals:
    def test_other_families(self) -> None:
        config = transformers.AlbertConfig(vocab_size=50, embedding_size=8, hidden_size=16, num_attention_heads=2)
        with pytest.raises(ValueError, match=r"AlbertModel of the family 'albert' \(its layers are one .*'bert'"):
            find_sites(transformers.AlbertModel(config))
        with pytest.raises(ValueError, match=r"XLMModel of the family 'xlm', expected an encoder of .*'roberta'"):
            find_sites(transformers.XLMModel(transformers.XLMConfig(n_layers=1, emb_dim=16, n_heads=2, vocab_size=50)))

    def test_what_is_no_transformers_model(self) -> None:
        with pytest.raises(ValueError, match="Linear of the family None"):
            find_sites(nn.Linear(2, 2))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"without modules 'embeddings' and 'encoder'"):
            model_hash(nn.Linear(2, 2))  # type: ignore[arg-type]

    @pytest.mark.parametrize("settings", [{"is_decoder": True}, {"is_decoder": True, "add_cross_attention": True}])
    def test_decoders(self, tiny_bert: BertModel, settings: dict[str, bool]) -> None:
        config = transformers.BertConfig(**{**tiny_bert.config.to_dict(), **settings})
        with pytest.raises(ValueError, match="BertModel set up as a decoder"):
            find_sites(transformers.BertModel(config))

    def test_pruned_models(self) -> None:
        from obce.configuration_obce import ObceBertConfig
        from obce.modeling_obce import ObceBertModel

        config = ObceBertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        with pytest.raises(ValueError, match="ObceBertModel, which obce has already pruned"):
            find_sites(ObceBertModel(config))

    def test_wrapped_linears(self, tiny_bert: BertModel) -> None:
        attention = tiny_bert.encoder.layer[2].attention.self
        attention.key = nn.Sequential(attention.key)
        with pytest.raises(ValueError, match=r"BertModel: encoder.layer.2.attention.self.key is a Sequential"):
            find_sites(tiny_bert)

    def test_linears_without_bias(self, tiny_bert: BertModel) -> None:
        tiny_bert.encoder.layer[0].output.dense = nn.Linear(64, 32, bias=False)
        with pytest.raises(ValueError, match=r"encoder.layer.0.output.dense is a Linear, expected .* with a bias"):
            find_sites(tiny_bert)

    def test_widths_that_the_config_does_not_state(self, tiny_bert: BertModel) -> None:
        tiny_bert.encoder.layer[1].intermediate.dense = nn.Linear(32, 60)
        with pytest.raises(ValueError, match=r"intermediate.dense has .* shape \(60, 32\), expected .* \(64, 32\)"):
            find_sites(tiny_bert)

    def test_packed_integers(self, tiny_bert: BertModel) -> None:
        dense = tiny_bert.encoder.layer[1].intermediate.dense
        dense.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.uint8), requires_grad=False)
        with pytest.raises(ValueError, match="uint8 weight"):
            find_sites(tiny_bert)

    def test_a_model_without_layers(self, tiny_bert: BertModel) -> None:
        tiny_bert.encoder.layer = nn.ModuleList()
        with pytest.raises(ValueError, match="BertModel with 0 stacks of layers"):
            find_sites(tiny_bert)

    def test_weights_that_are_not_in_memory(self, tiny_bert: BertModel) -> None:
        with pytest.raises(ValueError, match=r"no data for 'embeddings.LayerNorm.bias'"):
            model_hash(tiny_bert.to("meta"))
