from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from obce.capture import capture, token_means
from obce.corpus import tokenize
from obce.sites import SITE_KINDS, find_sites

if TYPE_CHECKING:
    from obce.corpus import TokenBatches
    from transformers import BertModel


@pytest.fixture
def batches(texts: list[str], tiny_tokenizer: Any) -> TokenBatches:
    return tokenize(texts[:50], tiny_tokenizer, max_length=32, batch_size=8)


def linear_outputs(model: BertModel, texts: list[str], tokenizer: Any) -> dict[str, np.ndarray]:
    """Every Linear's output at [CLS] and each reader's input, one unpadded text at a time, by hand."""
    found: dict[str, list[np.ndarray]] = {}
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")
        with torch.no_grad():
            hidden = model.embeddings(input_ids=inputs["input_ids"], token_type_ids=inputs["token_type_ids"])
            for i, layer in enumerate(model.encoder.layer):
                attention = layer.attention.self
                q, k, v = attention.query(hidden), attention.key(hidden), attention.value(hidden)
                split = lambda x: x.view(1, -1, 4, 8).transpose(1, 2)  # noqa: E731
                weights = torch.softmax(split(q) @ split(k).transpose(2, 3) / 8**0.5, dim=-1)
                context = (weights @ split(v)).transpose(1, 2).reshape(1, -1, 32)
                dense = layer.attention.output.dense(context)
                after = layer.attention.output.LayerNorm(dense + hidden)
                inner = layer.intermediate.dense(after)
                active = torch.nn.functional.gelu(inner)
                out = layer.output.dense(active)
                for kind, value in zip(SITE_KINDS, (q, k, v, dense, inner, out), strict=True):
                    found.setdefault(f"{i}.{kind}", []).append(value[0, 0].numpy())
                found.setdefault(f"{i}.value read", []).append(context[0].double().numpy())
                found.setdefault(f"{i}.intermediate read", []).append(active[0].double().numpy())
                hidden = layer.output.LayerNorm(out + after)
    return {name: np.stack(rows, 1) if " " not in name else np.concatenate(rows) for name, rows in found.items()}


@pytest.mark.parametrize("memory", ["model", "layer"])
def test_every_site_equals_the_model_computed_by_hand(
    memory: Any, tiny_bert: BertModel, texts: list[str], tiny_tokenizer: Any, batches: TokenBatches
) -> None:
    sites = find_sites(tiny_bert)
    by_hand = linear_outputs(tiny_bert, texts[:50], tiny_tokenizer)
    layers = list(capture(tiny_bert, batches, sites, memory=memory))
    assert [layer.layer for layer in layers] == [0, 1, 2]
    for layer in layers:
        assert tuple(layer.outputs) == SITE_KINDS
        assert set(layer.token_means) == {"value", "intermediate"}
        for kind, values in layer.outputs.items():
            assert values.dtype == np.float32
            np.testing.assert_allclose(values, by_hand[f"{layer.layer}.{kind}"], rtol=0, atol=2e-5)
        for kind, mean in layer.token_means.items():
            expected = by_hand[f"{layer.layer}.{kind} read"].mean(axis=0)
            np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-5)


def test_layer_memory_gives_the_same_bits(tiny_bert: BertModel, batches: TokenBatches) -> None:
    sites = find_sites(tiny_bert)
    whole = list(capture(tiny_bert, batches, sites, memory="model"))
    layered = list(capture(tiny_bert, batches, sites, memory="layer"))
    for a, b in zip(whole, layered, strict=True):
        for kind in a.outputs:
            assert (a.outputs[kind] == b.outputs[kind]).all(), kind
        for kind in a.token_means:
            assert (a.token_means[kind] == b.token_means[kind]).all(), kind


def test_token_means_alone_equal_those_of_the_capture(tiny_bert: BertModel, batches: TokenBatches) -> None:
    sites = find_sites(tiny_bert)
    means = token_means(tiny_bert, batches, sites)
    assert sorted(means) == sorted(s.name for s in sites if s.reader is not None)
    for layer in capture(tiny_bert, batches, sites):
        for kind, mean in layer.token_means.items():
            np.testing.assert_array_equal(means[f"{layer.layer}.{kind}"], mean)


def count_hooks(model: BertModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("memory", ["model", "layer"])
def test_the_model_is_left_as_it_was(memory: Any, tiny_bert: BertModel, batches: TokenBatches) -> None:
    tiny_bert.train()
    tiny_bert.encoder.layer[1].eval()
    flags = [module.training for module in tiny_bert.modules()]
    weights = {name: tensor.clone() for name, tensor in tiny_bert.state_dict().items()}
    for _ in capture(tiny_bert, batches, find_sites(tiny_bert), memory=memory):
        assert torch.is_grad_enabled(), "a caller between two layers keeps its own gradient mode"
        break
    assert [module.training for module in tiny_bert.modules()] == flags
    assert count_hooks(tiny_bert) == 0
    assert all(torch.equal(weights[name], tensor) for name, tensor in tiny_bert.state_dict().items())


def test_dropout_is_off(tiny_bert: BertModel, batches: TokenBatches) -> None:
    sites = find_sites(tiny_bert)
    quiet = [layer.outputs for layer in capture(tiny_bert, batches, sites)]
    training = [layer.outputs for layer in capture(tiny_bert.train(), batches, sites)]
    for a, b in zip(quiet, training, strict=True):
        assert all((a[kind] == b[kind]).all() for kind in a)


@pytest.mark.parametrize("memory", ["model", "layer"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_output_names_site_and_neuron(
    bad: float, memory: Any, tiny_bert: BertModel, batches: TokenBatches
) -> None:
    with torch.no_grad():
        tiny_bert.encoder.layer[1].attention.self.key.weight[5, 0] = bad
    with pytest.raises(
        ValueError, match=r"neuron 1\.key\.5 on text \d+.*must be finite.*layer\.1\.attention\.self\.key"
    ):
        list(capture(tiny_bert, batches, find_sites(tiny_bert), memory=memory))
    assert count_hooks(tiny_bert) == 0


def test_a_text_seen_twice_is_an_error(tiny_bert: BertModel, batches: TokenBatches) -> None:
    class Doubled:
        n_texts = batches.n_texts

        def __iter__(self) -> Any:
            yield from batches
            yield next(iter(batches))

    with pytest.raises(RuntimeError, match=r"site 0\.query was seen 2 times"):
        list(capture(tiny_bert, Doubled(), find_sites(tiny_bert)))  # type: ignore[arg-type]


def test_a_text_never_seen_is_an_error(tiny_bert: BertModel, batches: TokenBatches) -> None:
    class Short:
        n_texts = batches.n_texts

        def __iter__(self) -> Any:
            yield from list(batches)[1:]

    for memory in ("model", "layer"):
        with pytest.raises(RuntimeError, match=r"was seen 0 times"):
            list(capture(tiny_bert, Short(), find_sites(tiny_bert), memory=memory))  # type: ignore[arg-type]


def test_progress_reaches_the_end_and_never_falls(tiny_bert: BertModel, batches: TokenBatches) -> None:
    for memory in ("model", "layer"):
        seen: list[tuple[float, float]] = []
        note = lambda done, total, seen=seen: seen.append((done, total))  # noqa: E731
        list(capture(tiny_bert, batches, find_sites(tiny_bert), memory=memory, progress=note))  # type: ignore[arg-type]
        done = [d for d, _ in seen]
        assert done == sorted(done)
        assert done[-1] == pytest.approx(50)
        assert {total for _, total in seen} == {50}


def test_unknown_memory(tiny_bert: BertModel, batches: TokenBatches) -> None:
    with pytest.raises(ValueError, match=re.escape("memory is 'disk', but must be 'model' or 'layer'")):
        list(capture(tiny_bert, batches, find_sites(tiny_bert), memory="disk"))  # type: ignore[arg-type]
