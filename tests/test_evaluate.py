from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from obce.corpus import Batch, TokenBatches, tokenize
from obce.evaluate import Latency, count_parameters, embed, fidelity, flops, latency, weight_bytes
from obce.plan import FLOPS_LENGTH, plan
from obce.prune import prune
from obce.scoring import score
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def with_head(kind: type[PreTrainedModel], body: BertModel) -> Any:
    return kind(body.config).train(False)


def batches(texts: Sequence[str], tokenizer: Any, size: int = 32) -> TokenBatches:
    return tokenize(texts, tokenizer, max_length=64, batch_size=size)


def one_by_one(texts: Sequence[str], tokenizer: Any) -> list[Batch]:
    """Every text alone and unpadded, last text first."""
    batches = []
    for position in range(len(texts) - 1, -1, -1):
        inputs = dict(tokenizer(texts[position], return_tensors="pt"))
        batches.append(Batch(np.array([position]), inputs))
    return batches


# Counting


def test_parameters_of_a_bare_encoder_by_hand(tiny_bert: BertModel) -> None:
    hidden, inner, layers, vocabulary, positions = 32, 64, 3, 256, 64
    layer = 4 * (hidden * hidden + hidden) + 2 * hidden * inner + inner + hidden + 2 * 2 * hidden
    embeddings = (vocabulary + positions + 2) * hidden + 2 * hidden
    pooler = hidden * hidden + hidden
    assert count_parameters(tiny_bert) == (embeddings + layers * layer + pooler, layers * layer)


def test_tied_embeddings_count_once(tiny_bert: BertModel) -> None:
    model = with_head(BertForMaskedLM, tiny_bert)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    total, encoder = count_parameters(model)
    bare_total, bare_encoder = count_parameters(tiny_bert)
    # no pooler in a masked language model; its head has a transform, a LayerNorm and one bias a word
    assert total == bare_total - (32 * 32 + 32) + (32 * 32 + 32) + 2 * 32 + 256
    assert encoder == bare_encoder
    assert weight_bytes(model) == 4 * total


def test_bytes_follow_the_dtype_and_match_the_file(tiny_bert: BertModel, tmp_path: Any) -> None:
    from safetensors import safe_open

    total, _ = count_parameters(tiny_bert)
    assert weight_bytes(tiny_bert) == 4 * total
    tiny_bert.encoder.half()
    _, encoder = count_parameters(tiny_bert)
    assert weight_bytes(tiny_bert) == 4 * (total - encoder) + 2 * encoder
    tiny_bert.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118  (no mapping)
    assert stored == weight_bytes(tiny_bert)


def test_a_model_without_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^model is a Linear of the family None"):
        count_parameters(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


# FLOPs


def analytic_flops(length: int, *, hidden: int = 32, inner: int = 64, layers: int = 3) -> int:
    linears = 2 * length * (4 * hidden * hidden + 2 * hidden * inner)
    attention = 2 * length * length * hidden + 2 * length * length * hidden
    return layers * (linears + attention) + 2 * hidden * hidden


@pytest.mark.parametrize(("length", "batch"), [(1, 1), (16, 1), (64, 1), (17, 3)])
def test_flops_equal_the_formula(tiny_bert: BertModel, length: int, batch: int) -> None:
    assert flops(tiny_bert, length=length, batch=batch) == batch * analytic_flops(length)


def test_flops_count_the_base_model_alone(tiny_bert: BertModel) -> None:
    classifier = with_head(BertForSequenceClassification, tiny_bert)
    assert flops(classifier, length=16) == analytic_flops(16)
    pooler = 2 * 32 * 32
    assert flops(with_head(BertForMaskedLM, tiny_bert), length=16) == analytic_flops(16) - pooler


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_flops_leave_attention_and_training_flags_alone(tiny_bert: BertModel, attention: str) -> None:
    model = with_head(BertForSequenceClassification, tiny_bert)
    model.set_attn_implementation(attention)
    model.train()
    model.bert.embeddings.eval()
    flags = [module.training for module in model.modules()]
    assert flops(model, length=16) == analytic_flops(16)
    assert model.config._attn_implementation == attention
    assert [module.training for module in model.modules()] == flags


def test_flops_restore_attention_after_an_error(tiny_bert: BertModel) -> None:
    tiny_bert.set_attn_implementation("sdpa")

    def fail(*_: Any) -> None:
        raise RuntimeError("broken layer")

    tiny_bert.encoder.layer[1].register_forward_pre_hook(fail)
    tiny_bert.train()
    with pytest.raises(RuntimeError, match="broken layer"):
        flops(tiny_bert, length=4)
    assert tiny_bert.config._attn_implementation == "sdpa"
    assert tiny_bert.training


def test_flops_refuse_a_model_that_cannot_run_eagerly(tiny_bert: BertModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_bert.set_attn_implementation("sdpa")
    monkeypatch.setattr(tiny_bert, "set_attn_implementation", lambda _: None)
    with pytest.raises(ValueError, match=r"^model: BertModel stays with attention 'sdpa', expected 'eager'"):
        flops(tiny_bert, length=4)


def test_flops_refuse_lengths_without_positions(tiny_bert: BertModel) -> None:
    for length in (0, 65):
        with pytest.raises(ValueError, match=rf"^length: found {length}, expected 1 to 64 tokens"):
            flops(tiny_bert, length=length)
    with pytest.raises(ValueError, match=r"^batch: found 0, expected at least 1"):
        flops(tiny_bert, length=4, batch=0)


# Sentence vectors


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_vectors_do_not_depend_on_batching(
    tiny_bert: BertModel, tiny_tokenizer: Any, texts: list[str], pooling: str
) -> None:
    some = texts[:24]
    alone = embed(tiny_bert, one_by_one(some, tiny_tokenizer), pooling=pooling)
    assert alone.shape == (24, 32)
    assert alone.dtype == np.float32
    for batch_size in (5, 64):
        together = embed(tiny_bert, batches(some, tiny_tokenizer, batch_size), pooling=pooling)
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6 * np.abs(alone).max())


def test_vectors_are_the_mean_over_real_tokens_or_the_first_or_the_last(
    tiny_bert: BertModel, tiny_tokenizer: Any, texts: list[str]
) -> None:
    found = list(batches(texts[:9], tiny_tokenizer, 4))
    mean, cls, last = (embed(tiny_bert, found, pooling=pooling) for pooling in ("mean", "cls", "last"))
    for position, text in enumerate(texts[:9]):
        with torch.no_grad():
            hidden = tiny_bert(**tiny_tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy()
        np.testing.assert_allclose(mean[position], hidden.mean(axis=0), atol=2e-6)
        np.testing.assert_allclose(cls[position], hidden[0], atol=2e-6)
        np.testing.assert_allclose(last[position], hidden[-1], atol=2e-6)


def test_vectors_of_a_model_with_a_head_are_those_of_its_body(
    tiny_bert: BertModel, tiny_tokenizer: Any, texts: list[str]
) -> None:
    model = with_head(BertForSequenceClassification, tiny_bert)
    found = batches(texts[:8], tiny_tokenizer)
    np.testing.assert_array_equal(embed(model, found), embed(model.bert, found))


def test_embedding_switches_dropout_off_and_the_flag_back_on(
    tiny_bert: BertModel, tiny_tokenizer: Any, texts: list[str]
) -> None:
    found = batches(texts[:8], tiny_tokenizer)
    expected = embed(tiny_bert, found)
    tiny_bert.train()
    tiny_bert.embeddings.eval()
    flags = [module.training for module in tiny_bert.modules()]
    np.testing.assert_array_equal(embed(tiny_bert, found), expected)
    assert [module.training for module in tiny_bert.modules()] == flags
    with pytest.raises(ValueError, match="batches: found no batch"):
        embed(tiny_bert, [])
    assert [module.training for module in tiny_bert.modules()] == flags


def test_embedding_refuses_what_would_give_wrong_rows(
    tiny_bert: BertModel, tiny_tokenizer: Any, texts: list[str]
) -> None:
    found = list(batches(texts[:8], tiny_tokenizer, 4))
    with pytest.raises(ValueError, match=r"^pooling: found 'max', expected one of mean, cls"):
        embed(tiny_bert, found, pooling="max")
    with pytest.raises(ValueError, match=r"^batches: found indices from 0 to 7 for 12 texts, expected each of 0 to 11"):
        embed(tiny_bert, [*found, found[0]])
    with torch.no_grad():
        tiny_bert.embeddings.LayerNorm.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"^model: the vector of text 0 is not finite \(8 of 8 texts\)"):
        embed(tiny_bert, found)


# Fidelity


def test_fidelity_is_the_mean_cosine() -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(50, 7))
    assert fidelity(rows, rows * rng.uniform(0.1, 9, (50, 1))) == pytest.approx(1, abs=1e-12)
    assert fidelity(rows, -rows) == pytest.approx(-1, abs=1e-12)
    assert fidelity(np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[0.0, 2.0], [1.0, 0.0]])) == pytest.approx(
        (0 + np.sqrt(0.5)) / 2
    )


def test_fidelity_survives_extreme_magnitudes() -> None:
    rows = np.array([[3.0, 4.0], [1.0, 0.0]], dtype=np.float64)
    assert fidelity(rows * 1e-300, rows * 1e300) == pytest.approx(1, abs=1e-12)


def test_fidelity_refuses_what_has_no_cosine() -> None:
    rows = np.ones((3, 4), dtype=np.float32)
    for other in (np.ones((3, 5)), np.ones((2, 4)), np.ones(4)):
        with pytest.raises(ValueError, match=r"^other: found shape \(.*beside a reference of shape \(3, 4\)"):
            fidelity(rows, other)
    for empty in (np.ones((0, 4)), np.ones(4)):
        with pytest.raises(ValueError, match=r"with at least one row"):
            fidelity(empty, empty)
    for value in (0.0, np.nan, np.inf):
        damaged = rows.copy()
        damaged[1] = value
        with pytest.raises(ValueError, match=r"^other: row 1 is zero or not finite \(1 of 3 rows\)"):
            fidelity(rows, damaged)
        with pytest.raises(ValueError, match=r"^reference: row 1 is zero or not finite"):
            fidelity(damaged, rows)


# Latency


class Clock:
    """A clock that only forward passes move on: `cost` seconds for a call of a module."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def perf_counter(self) -> float:
        return self.now


class Slow(torch.nn.Module):
    def __init__(self, name: str, cost: float, clock: Clock) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.name, self.cost, self.clock = name, cost, clock

    def forward(self, **inputs: torch.Tensor) -> None:
        assert torch.is_inference_mode_enabled()
        assert not self.training
        assert inputs.keys() == {"input_ids"}
        self.clock.calls.append(self.name)
        # every call takes longer than the one before: a machine that slows down
        self.clock.now += self.cost * (1 + 0.01 * len(self.clock.calls))


def batches_of(n: int) -> list[Batch]:
    return [Batch(np.array([i]), {"input_ids": torch.zeros(1, 2, dtype=torch.long)}) for i in range(n)]


def test_models_take_turns_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("obce.evaluate.time.perf_counter", clock.perf_counter)
    models = {"dense": Slow("d", 2.0, clock), "small": Slow("s", 1.0, clock)}
    found = latency(models, iter(batches_of(2)), repeats=3)
    # two batches a pass; warm-up, then three rounds that start with another model each
    assert "".join(clock.calls) == "ddss" + "ddss" + "ssdd" + "ddss"
    assert list(found) == ["dense", "small"]
    assert found["small"].seconds == pytest.approx((1.07 + 1.08, 1.09 + 1.10, 1.15 + 1.16))
    assert found["dense"].seconds == found["small"].reference
    assert found["dense"].ratio == 1
    assert found["small"].ratio == pytest.approx(0.5, abs=0.02)
    assert all(model.training for model in models.values())


def test_latency_summary() -> None:
    one = Latency((3.0, 1.0, 2.0), (6.0, 4.0, 2.0))
    assert (one.median, one.minimum, one.maximum, one.ratio) == (2.0, 1.0, 3.0, 0.5)


def test_latency_of_real_models_leaves_them_alone(tiny_bert: BertModel, tiny_tokenizer: Any, texts: list[str]) -> None:
    classifier = with_head(BertForSequenceClassification, tiny_bert).train()
    calls: list[int] = []
    classifier.bert.encoder.register_forward_hook(lambda *_: calls.append(1))
    found = latency({"bare": tiny_bert, "head": classifier}, batches(texts[:8], tiny_tokenizer), repeats=2)
    assert len(calls) == 3
    assert len(classifier.bert.encoder._forward_hooks) == 1
    assert classifier.training
    assert not tiny_bert.training
    for measured in found.values():
        assert len(measured.seconds) == 2
        assert 0 < measured.minimum <= measured.median <= measured.maximum


def test_latency_refuses_what_cannot_be_compared() -> None:
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"^models: found none"):
        latency({}, batches_of(1))
    with pytest.raises(ValueError, match=r"^batches: found no batch"):
        latency({"a": model}, [])
    with pytest.raises(ValueError, match=r"^repeats: found 0, expected at least 1"):
        latency({"a": model}, batches_of(1), repeats=0)
    with pytest.raises(ValueError, match=r"^models: found a on cpu, b on meta, expected one device"):
        latency({"a": model, "b": torch.nn.Linear(1, 1, device="meta")}, batches_of(1))


# A plan's prediction is checked against what is measured on the model that follows from it


def test_a_plan_predicts_what_is_measured(tiny_bert: BertModel, tiny_tokenizer: Any, texts: list[str]) -> None:
    config = tiny_bert.config
    config.max_position_embeddings = FLOPS_LENGTH
    dense = BertModel(config).train(False)
    scores = score(dense, tiny_tokenizer, texts[:60], max_length=64)
    chosen = plan(scores, dense, preset="obce-2023")
    small = prune(dense, chosen, repair="none")
    for model, size in ((dense, chosen.before), (small, chosen.after)):
        total, encoder = count_parameters(model)
        assert (total, encoder, flops(model), weight_bytes(model)) == tuple(size)
    assert chosen.after.flops < chosen.before.flops
