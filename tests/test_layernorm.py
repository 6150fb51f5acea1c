"""The LayerNorm study: every mode by hand, hooks that leave no trace, statistics of real tokens, and complete rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from obce import layernorm as module
from obce.corpus import Batch, TokenBatches, tokenize
from obce.evaluate import embed, fidelity
from obce.glue import TASKS, Examples, TaskData, evaluate, kl_divergence
from obce.layernorm import MODES, LayerNormEffect, layernorm_statistics, layernorms, study, without_layernorm
from obce.plan import plan
from obce.prune import prune
from obce.scoring import score
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = [
    "embeddings",
    "0.attention_output",
    "0.output",
    "1.attention_output",
    "1.output",
    "2.attention_output",
    "2.output",
]
PLACES = {
    "embeddings": ("embeddings", "LayerNorm"),
    "1.attention_output": ("encoder.layer.1.attention.output", "LayerNorm"),
    "2.output": ("encoder.layer.2.output", "LayerNorm"),
}


@pytest.fixture
def bert(tiny_bert: BertModel) -> BertModel:
    """The tiny BERT with gammas that are not all one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for norm in layernorms(tiny_bert).values():
            norm.weight.copy_(0.5 + torch.rand(norm.weight.shape, generator=generator))
    return tiny_bert


@pytest.fixture
def batches(texts: list[str], tiny_tokenizer: Any) -> TokenBatches:
    return tokenize(texts[:24], tiny_tokenizer, max_length=64, batch_size=8)


def last_hidden(model: PreTrainedModel, batches: Iterable[Batch]) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model(**next(iter(batches)).inputs).last_hidden_state
    return answer


def hooks(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def replaced(model: BertModel, name: str, other: Callable[[nn.LayerNorm], nn.Module]) -> BertModel:
    """A copy that holds another module in the place of a LayerNorm."""
    answer = copy.deepcopy(model)
    parent, attribute = PLACES[name]
    owner = answer.get_submodule(parent)
    setattr(owner, attribute, other(getattr(owner, attribute)))
    return answer


class Affine(nn.Module):
    def __init__(self, norm: nn.LayerNorm, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.norm, self.mean, self.std = norm, mean, std

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm.weight * (x - self.mean) / self.std + self.norm.bias


def message(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match=r"^[a-z_]+: ") as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


# Names


def test_names_stand_in_the_order_of_the_forward_pass(tiny_bert: BertModel) -> None:
    assert list(layernorms(tiny_bert)) == NAMES
    assert layernorms(tiny_bert)["1.attention_output"] is tiny_bert.encoder.layer[1].attention.output.LayerNorm
    assert layernorms(tiny_bert)["1.output"] is tiny_bert.encoder.layer[1].output.LayerNorm
    masked = BertForMaskedLM(tiny_bert.config)
    assert sum(isinstance(part, nn.LayerNorm) for part in masked.modules()) == len(NAMES) + 1  # one is the head's
    assert list(layernorms(masked).values()) == list(layernorms(masked.bert).values())


def test_another_family_is_refused() -> None:
    model = AlbertModel(AlbertConfig(vocab_size=32, embedding_size=8, hidden_size=8, num_attention_heads=2))
    for call in (
        lambda: layernorms(model),
        lambda: layernorm_statistics(model, []),
        lambda: without_layernorm(model, "embeddings", "identity").__enter__(),
        lambda: study(model, []),
    ):
        with pytest.raises(ValueError, match="model is a AlbertModel of the family 'albert'"):
            call()


def test_a_layer_without_its_layernorm_is_refused(tiny_bert: BertModel) -> None:
    tiny_bert.encoder.layer[1].output.LayerNorm = nn.Identity()
    assert "no LayerNorm at encoder.layer.1.output.LayerNorm" in message(lambda: layernorms(tiny_bert))


# One LayerNorm


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("identity", [3.0, -1.0, 0.5, 8.0]),
        ("affine", [2 * 3.0 + 1, -1.0, 0.5 * 0.5 - 1, -8.0 + 4]),
        ("frozen", [2 * 2.0 / 4 + 1, -2.0 / 4, 0.5 * -0.5 / 4 - 1, -7.0 / 4 + 4]),
    ],
)
def test_modes_by_hand(mode: str, expected: list[float], make_bert: Callable[..., BertModel]) -> None:
    model = make_bert(hidden_size=4, num_attention_heads=2)
    norm = model.encoder.layer[1].output.LayerNorm
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 1.0, 0.5, -1.0]))
        norm.bias.copy_(torch.tensor([1.0, 0.0, -1.0, 4.0]))
        x = torch.tensor([[[3.0, -1.0, 0.5, 8.0]]])
        with without_layernorm(model, "1.output", mode, {"1.output": (1.0, 4.0)}):
            assert norm(x).tolist() == [[expected]]
            other = model.encoder.layer[0].output.LayerNorm
            torch.testing.assert_close(other(x), nn.functional.layer_norm(x, (4,), other.weight, other.bias, other.eps))


@pytest.mark.parametrize("name", PLACES)
def test_the_model_runs_as_if_it_held_another_module(name: str, bert: BertModel, batches: TokenBatches) -> None:
    others: dict[str, Callable[[nn.LayerNorm], nn.Module]] = {
        "identity": lambda _: nn.Identity(),
        "affine": Affine,
        "frozen": lambda norm: Affine(norm, 0.3, 1.7),
    }
    dense = last_hidden(bert, batches)
    seen = []
    for mode, other in others.items():
        with torch.no_grad(), without_layernorm(bert, name, mode, {name: (0.3, 1.7)}):
            found = last_hidden(bert, batches)
        torch.testing.assert_close(found, last_hidden(replaced(bert, name, other), batches), rtol=1e-4, atol=1e-4)
        seen.append(found)
    assert all((found - dense).abs().max() > 0.05 for found in seen)


def test_half_precision_is_widened(make_bert: Callable[..., BertModel]) -> None:
    model = make_bert(hidden_size=4, num_attention_heads=2).half()
    norm = model.embeddings.LayerNorm
    x = torch.full((1, 1, 4), 60000.0, dtype=torch.float16)  # 70000 is more than float16 holds
    with torch.no_grad(), without_layernorm(model, ["embeddings"], "frozen", {"embeddings": (-10000.0, 7.0)}):
        found = norm(x)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), torch.full((1, 1, 4), 10000.0), rtol=1e-3, atol=1)


@pytest.mark.parametrize("fail", [False, True])
def test_hooks_are_gone_afterwards(fail: bool, bert: BertModel, batches: TokenBatches) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    bert.encoder.layer[0].output.LayerNorm.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    dense = last_hidden(bert, batches)

    def use() -> None:
        with without_layernorm(bert, NAMES, "identity"):
            assert hooks(bert) == 1 + len(NAMES)
            assert not torch.equal(last_hidden(bert, batches), dense)
            if fail:
                raise KeyError("stop")

    if fail:
        with pytest.raises(KeyError, match="stop"):
            use()
    else:
        use()
    assert hooks(bert) == 1
    assert torch.equal(last_hidden(bert, batches), dense)
    # the hook of another saw what the model went on with
    assert [torch.equal(taken, given) for taken, given in seen] == [False, True, False]


def test_what_without_layernorm_refuses(tiny_bert: BertModel) -> None:
    def enter(*args: Any) -> str:
        text = message(lambda: without_layernorm(tiny_bert, *args).__enter__())
        assert hooks(tiny_bert) == 0
        return text

    assert enter("3.output", "identity").startswith("which: found '3.output', expected names among embeddings, 0.att")
    assert enter(["0.output", "output"], "identity").startswith("which: found 'output'")
    assert enter("0.output", "zero").startswith("mode: found 'zero', expected one of identity, affine, frozen;")
    assert enter("0.output", "frozen").startswith("statistics: found None for 0.output")
    good = {"0.output": (0.0, 1.0)}
    assert enter(["0.output", "1.output"], "frozen", good).startswith("statistics: found None for 1.output")
    for bad in ((0.0, 0.0), (0.0, -1.0), (math.nan, 1.0), (0.0, math.inf)):
        assert enter("0.output", "frozen", {"0.output": bad}).startswith("statistics: found (")


# Statistics


def test_statistics_are_those_of_real_tokens(bert: BertModel, texts: list[str], tiny_tokenizer: Any) -> None:
    chosen = texts[:8]
    lengths = [len(tiny_tokenizer(text)["input_ids"]) for text in chosen]
    assert min(lengths) < max(lengths)  # there is padding
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
    handles = [
        norm.register_forward_pre_hook(lambda _m, args, name=name: inputs[name].append(args[0][0]))
        for name, norm in layernorms(bert).items()
    ]
    with torch.no_grad():
        for text in chosen:
            bert(**tiny_tokenizer(text, return_tensors="pt"))
    for handle in handles:
        handle.remove()
    bert.train()
    found = layernorm_statistics(bert, tokenize(chosen, tiny_tokenizer, max_length=64, batch_size=8))
    assert bert.training
    assert hooks(bert) == 0
    assert list(found) == NAMES
    for name, rows in inputs.items():
        tokens = torch.cat(rows).double().numpy()
        assert len(tokens) == sum(lengths)
        deviations = np.sqrt(tokens.var(axis=1) + bert.config.layer_norm_eps)
        np.testing.assert_allclose(found[name], (tokens.mean(axis=1).mean(), deviations.mean()), rtol=1e-4, atol=1e-6)


def test_frozen_is_layernorm_where_every_token_has_the_same_statistics(bert: BertModel, batches: TokenBatches) -> None:
    base = torch.linspace(1.0, 2.0, 32)
    embeddings = bert.embeddings
    embeddings.LayerNorm.eps = 0.25
    with torch.no_grad():
        embeddings.position_embeddings.weight.zero_()
        embeddings.token_type_embeddings.weight.zero_()
        generator = torch.Generator().manual_seed(0)
        for row in embeddings.word_embeddings.weight:
            row.copy_(base[torch.randperm(32, generator=generator)])
    statistics = layernorm_statistics(bert, batches)
    mean, variance = 1.5, float(base.double().var(correction=0))
    assert statistics["embeddings"] == pytest.approx((mean, math.sqrt(variance + 0.25)), rel=1e-6)
    dense = last_hidden(bert, batches)
    with without_layernorm(bert, "embeddings", "frozen", statistics):
        torch.testing.assert_close(last_hidden(bert, batches), dense, rtol=1e-4, atol=1e-4)
    with without_layernorm(bert, "0.output", "frozen", statistics):  # whose tokens differ
        assert (last_hidden(bert, batches) - dense).abs().max() > 0.05


def test_statistics_refuse_what_they_cannot_be_made_of(tiny_bert: BertModel, batches: TokenBatches) -> None:
    assert message(lambda: layernorm_statistics(tiny_bert, [])).startswith("batches: found no token")
    broken = copy.deepcopy(tiny_bert)
    broken.encoder.layer[1].output.forward = lambda _, attended: attended
    assert "LayerNorm 1.output met 0 tokens of" in message(lambda: layernorm_statistics(broken, batches))
    with torch.no_grad():
        tiny_bert.encoder.layer[0].output.dense.bias[3] = math.nan
    assert "LayerNorm 0.output takes in is not finite" in message(lambda: layernorm_statistics(tiny_bert, batches))
    assert hooks(tiny_bert) == hooks(broken) == 0


# The study


@pytest.mark.parametrize("read", ["mean", "cls"])
def test_rows_are_complete_and_measured_on_the_vectors(read: str, bert: BertModel, batches: TokenBatches) -> None:
    bert.train()
    bert.encoder.layer[0].eval()
    flags = [part.training for part in bert.modules()]
    before = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    told: list[tuple[int, int]] = []
    once = (batch for batch in list(batches))  # can be read one time only
    rows = study(bert, once, read=read, progress=lambda done, total: told.append((done, total)))
    assert [(row.name, row.mode) for row in rows] == [
        ("none", "none"),
        *((name, mode) for mode in MODES for name in [*NAMES, "all"]),
    ]
    assert told == [(done, 25) for done in range(1, 26)]
    assert rows[0] == LayerNormEffect("none", "none", 1.0, 0.0, None, None)
    assert [part.training for part in bert.modules()] == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in bert.state_dict().items())
    assert hooks(bert) == 0

    dense = embed(bert, batches, pooling=read)
    variance = np.square(dense - dense.mean(axis=0)).sum()
    statistics = layernorm_statistics(bert, batches)
    for row in rows[1:]:
        with without_layernorm(bert, NAMES if row.name == "all" else row.name, row.mode, statistics):
            vectors = embed(bert, batches, pooling=read)
        assert row.fidelity == pytest.approx(fidelity(dense, vectors), rel=1e-6)
        assert row.error == pytest.approx(np.square(vectors - dense).sum() / variance, rel=1e-4)
        assert row.error > 0
        assert row.headline is row.kl is None
        assert row.remark == ""


def test_modes_that_are_not_asked_for_do_not_run(bert: BertModel, batches: TokenBatches) -> None:
    rows = study(bert, batches, modes=["affine"])
    assert [row.mode for row in rows] == ["none"] + ["affine"] * (len(NAMES) + 1)
    assert study(bert, batches, modes="affine") == rows


def rows_of(texts: Sequence[str], labels: int) -> Examples:
    paired = [f"{text[::-1]}" for text in texts]
    return Examples(list(texts), paired, np.arange(len(texts)) % labels)


def test_a_task_is_measured_as_glue_measures_it(
    bert: BertModel, batches: TokenBatches, texts: list[str], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # outputs in another order than the task's labels, and dev splits of unequal size
    bert.config.num_labels = 3
    bert.config.id2label = {0: "contradiction", 1: "entailment", 2: "neutral"}
    model = BertForSequenceClassification(bert.config).eval()
    model.bert.load_state_dict(bert.state_dict())
    with torch.no_grad():
        model.classifier.weight.mul_(4)
    data = TaskData(
        TASKS["MNLI"], rows_of([], 3), {"matched": rows_of(texts[:9], 3), "mismatched": rows_of(texts[9:50], 3)}
    )
    encoded: list[int] = []
    encode = module.encode
    monkeypatch.setattr(
        module, "encode", lambda examples, *a, **k: encoded.append(len(examples)) or encode(examples, *a, **k)
    )
    rows = study(model, batches, modes=["identity"], data=data, tokenizer=tiny_tokenizer, max_length=40)
    assert encoded == [9, 41]
    dense = evaluate(model, tiny_tokenizer, data, max_length=40)
    assert (rows[0].headline, rows[0].kl) == (dense.headline, 0.0)
    for row in (rows[1], rows[4], rows[-1]):
        with without_layernorm(model, NAMES if row.name == "all" else row.name, "identity"):
            found = evaluate(model, tiny_tokenizer, data, max_length=40)
        assert row.headline == found.headline
        divergences = [kl_divergence(dense.splits[name].logits, found.splits[name].logits) for name in data.dev]
        assert row.kl == pytest.approx((9 * divergences[0] + 41 * divergences[1]) / 50, rel=1e-6)
        assert divergences[0] != pytest.approx(divergences[1], rel=1e-3)
        assert row.kl > 1e-4


def test_regression_has_no_kl(bert: BertModel, batches: TokenBatches, texts: list[str], tiny_tokenizer: Any) -> None:
    bert.config.num_labels = 1
    model = BertForSequenceClassification(bert.config).eval()
    examples = Examples(texts[:20], texts[20:40], np.linspace(0, 5, 20, dtype=np.float32))
    data = TaskData(TASKS["STS-B"], examples, {"dev": examples})
    rows = study(model, batches, modes=["frozen"], data=data, tokenizer=tiny_tokenizer, max_length=64)
    assert {row.kl for row in rows} == {None}
    assert rows[0].headline == evaluate(model, tiny_tokenizer, data, max_length=64).headline
    assert len({row.headline for row in rows}) > 4


def overflowing(bert: BertModel) -> BertModel:
    """Finite with its LayerNorms; without 0.output, layer 1 has scores that are not finite."""
    with torch.no_grad():
        bert.encoder.layer[0].output.dense.weight.mul_(1e15)
        for part in (bert.encoder.layer[1].attention.self.query, bert.encoder.layer[1].attention.self.key):
            part.weight.mul_(1e6)
    return bert


def test_an_overflow_is_nan_and_says_so(
    bert: BertModel, batches: TokenBatches, texts: list[str], tiny_tokenizer: Any
) -> None:
    bert.config.num_labels = 2
    model = BertForSequenceClassification(bert.config).eval()
    model.bert.load_state_dict(overflowing(bert).state_dict())
    examples = Examples(texts[:6], None, np.arange(6) % 2)
    data = TaskData(TASKS["SST-2"], examples, {"dev": examples})
    rows = study(model, batches, modes=["identity"], data=data, tokenizer=tiny_tokenizer, max_length=64)
    found = {row.name: row for row in rows}
    for name in ("0.output", "all"):
        row = found[name]
        assert all(map(math.isnan, (row.fidelity, row.error, row.headline or 0.0, row.kl or 0.0)))
        assert row.remark == "text vectors are not finite, logits are not finite"
    for name in ("none", "2.output"):
        row = found[name]
        assert all(map(math.isfinite, (row.fidelity, row.error, row.headline or 0.0, row.kl or 0.0)))
        assert row.remark == ""


def test_a_zero_vector_has_an_error_and_no_fidelity() -> None:
    dense = np.array([[1, 0], [0, 1], [-1, -1]], np.float32)
    lost = module._distance(dense, np.array([[0, 0], [0, 1], [-1, 1]], np.float32))
    assert math.isnan(lost[0])
    assert lost[1] == pytest.approx((1 + 4) / 4)
    assert LayerNormEffect("0.output", "identity", *lost).remark == "text vectors are zero"
    turned = module._distance(dense, np.array([[0, 2], [0, 3], [1, 1]], np.float32))
    assert turned == pytest.approx(((0 + 1 - 1) / 3, (5 + 4 + 8) / 4))


def test_pruned_models_are_studied_too(bert: BertModel, texts: list[str], tiny_tokenizer: Any) -> None:
    scores = score(bert, tiny_tokenizer, texts[:40], max_length=64)
    pruned = prune(bert, plan(scores, keep=0.6), repair="none")
    batches = tokenize(texts[:12], tiny_tokenizer, max_length=64)
    rows = study(pruned, batches, modes=["identity"])
    assert [row.name for row in rows] == ["none", *NAMES, "all"]
    dense = embed(pruned, batches)
    for row in rows:
        if row.name in PLACES:
            expected = embed(replaced(pruned, row.name, lambda _: nn.Identity()), batches)
            assert row.fidelity == pytest.approx(fidelity(dense, expected), rel=1e-5)
            assert row.fidelity < 0.999


def test_what_a_study_refuses(
    tiny_bert: BertModel, batches: TokenBatches, texts: list[str], tiny_tokenizer: Any
) -> None:
    examples = Examples(texts[:4], None, np.arange(4) % 2)
    data = TaskData(TASKS["SST-2"], examples, {"dev": examples})
    head = BertForSequenceClassification(tiny_bert.config).eval()
    assert message(lambda: study(tiny_bert, batches, modes=["gone"])).startswith("modes: found 'gone'")
    assert message(lambda: study(tiny_bert, batches, read="max")).startswith("pooling: found 'max'")
    assert message(lambda: study(tiny_bert, [])).startswith("batches: found no batch")
    same = tokenize([texts[0], texts[0]], tiny_tokenizer, max_length=64, batch_size=1)
    assert message(lambda: study(tiny_bert, same)).startswith("batches: found 2 texts with one and the same vector")
    assert message(lambda: study(head, batches, data=data)).startswith("tokenizer: found None beside data of SST-2")
    task = {"data": data, "tokenizer": tiny_tokenizer}
    assert "has no sequence classification head" in message(lambda: study(tiny_bert, batches, **task))
    with pytest.raises(ValueError, match="max_length is 128, but the model has 64 positions"):
        study(head, batches, **task)
    with torch.no_grad():
        head.classifier.bias[0] = math.inf
    refused = message(lambda: study(head, batches, **task, max_length=64))
    assert refused.startswith("model: its logits on SST-2 are not finite")
    with torch.no_grad():
        tiny_bert.encoder.layer[2].output.dense.bias[0] = math.nan
    assert "is not finite (24 of 24 texts)" in message(lambda: study(tiny_bert, batches))
