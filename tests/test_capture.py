from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from obce.capture import _cuda_products, capture
from obce.clouds import CLOUD_KINDS
from obce.corpus import tokenize
from obce.sites import SITE_KINDS, find_sites

if TYPE_CHECKING:
    from obce.corpus import TokenBatches
    from transformers import BertModel


@pytest.fixture
def batches(texts: list[str], tiny_tokenizer: Any) -> TokenBatches:
    return tokenize(texts[:50], tiny_tokenizer, max_length=32, batch_size=8)


def linear_outputs(model: BertModel, texts: list[str], tokenizer: Any) -> dict[str, np.ndarray]:
    """Every Linear's output at [CLS], and what each neuron does over all tokens, one unpadded text at a time."""
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
                for kind, tokens in zip(SITE_KINDS, (q, k, context, dense, active, out), strict=True):
                    found.setdefault(f"{i}.{kind} tokens", []).append(tokens[0].double().numpy())
                hidden = layer.output.LayerNorm(out + after)
                for kind, vector in (("context", context), ("hidden", hidden)):
                    found.setdefault(f"{i}.{kind}", []).append(vector[0, 0].numpy())
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
        assert tuple(layer.tokens) == SITE_KINDS
        for kind, values in layer.outputs.items():
            assert values.dtype == np.float32
            np.testing.assert_allclose(values, by_hand[f"{layer.layer}.{kind}"], rtol=0, atol=2e-5)
        for kind, sums in layer.tokens.items():
            tokens = by_hand[f"{layer.layer}.{kind} tokens"]
            assert sums.count == len(tokens)
            np.testing.assert_allclose(sums.sums / sums.count, tokens.mean(axis=0), rtol=0, atol=1e-5)
            np.testing.assert_allclose(sums.squares / sums.count, (tokens**2).mean(axis=0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(sums.least, tokens.min(axis=0), rtol=0, atol=2e-5)
            np.testing.assert_allclose(sums.greatest, tokens.max(axis=0), rtol=0, atol=2e-5)
        assert not layer.clouds


@pytest.mark.parametrize("memory", ["model", "layer"])
@pytest.mark.parametrize("tokens", [True, False])
def test_vectors_of_chosen_texts(
    tokens: bool, memory: Any, tiny_bert: BertModel, texts: list[str], tiny_tokenizer: Any, batches: TokenBatches
) -> None:
    chosen = np.zeros(50, bool)
    chosen[[3, 8, 40, 41]] = True
    by_hand = linear_outputs(tiny_bert, texts[:50], tiny_tokenizer)
    for layer in capture(tiny_bert, batches, find_sites(tiny_bert), memory=memory, chosen=chosen, tokens=tokens):
        assert set(layer.clouds) == set(CLOUD_KINDS)
        for kind, vectors in layer.clouds.items():
            expected = by_hand[f"{layer.layer}.{kind}"].T[chosen]
            np.testing.assert_allclose(vectors, expected, rtol=0, atol=2e-5, err_msg=kind)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("memory", ["model", "layer"])
def test_the_last_layer_at_cls_alone(
    memory: Any, attention: str, make_bert: Any, texts: list[str], tiny_tokenizer: Any, batches: TokenBatches
) -> None:
    model = make_bert(attn_implementation=attention)
    by_hand = linear_outputs(model, texts[:50], tiny_tokenizer)
    seen = []
    handle = model.encoder.layer[2].intermediate.register_forward_hook(lambda _m, _a, out: seen.append(out.shape[1]))
    layers = list(capture(model, batches, find_sites(model), memory=memory, tokens=False))
    handle.remove()
    assert set(seen) == {1}
    for layer in layers:
        assert not layer.tokens
        for kind, values in layer.outputs.items():
            np.testing.assert_allclose(values, by_hand[f"{layer.layer}.{kind}"], rtol=0, atol=2e-5)


def test_layer_memory_gives_the_same_bits(tiny_bert: BertModel, batches: TokenBatches) -> None:
    sites = find_sites(tiny_bert)
    whole = list(capture(tiny_bert, batches, sites, memory="model"))
    layered = list(capture(tiny_bert, batches, sites, memory="layer"))
    for a, b in zip(whole, layered, strict=True):
        for kind in a.outputs:
            assert (a.outputs[kind] == b.outputs[kind]).all(), kind
        for kind, sums in a.tokens.items():
            assert (sums.sums == b.tokens[kind].sums).all(), kind
            assert (sums.squares == b.tokens[kind].squares).all(), kind


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


def test_unknown_precision(tiny_bert: BertModel, batches: TokenBatches) -> None:
    with pytest.raises(ValueError, match=re.escape("precision is 'int8', but must be 'float32', 'tf32' or 'bfloat16'")):
        list(capture(tiny_bert, batches, find_sites(tiny_bert), precision="int8"))  # type: ignore[arg-type]


def test_unknown_memory(tiny_bert: BertModel, batches: TokenBatches) -> None:
    with pytest.raises(ValueError, match=re.escape("memory is 'disk', but must be 'model' or 'layer'")):
        list(capture(tiny_bert, batches, find_sites(tiny_bert), memory="disk"))  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9 has one name")
def test_a_caller_may_have_asked_for_tf32_by_either_name(tiny_bert: BertModel, batches: TokenBatches) -> None:
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    before, convolutions = matmul.fp32_precision, cudnn.conv.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="legacy and new APIs"):
            assert matmul.allow_tf32
        assert list(capture(tiny_bert, batches, find_sites(tiny_bert), precision="tf32"))
        for asked, expected in ((False, "ieee"), (True, "tf32")):
            with _cuda_products(asked):
                assert matmul.fp32_precision == cudnn.conv.fp32_precision == expected
            assert cudnn.conv.fp32_precision == convolutions
            assert cudnn.allow_tf32, "the older name may be read again"
            assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
