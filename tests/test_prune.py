"""The pruned model is the dense one with the same neurons replaced: every head, repair and attention."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import obce
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from obce.capture import capture
from obce.corpus import tokenize
from obce.evaluate import count_parameters, flops, weight_bytes
from obce.modeling_obce import ObceRows
from obce.plan import DEFAULT_UNITS, Plan
from obce.plan import plan as choose
from obce.prune import masked, prune
from obce.scores import Scores
from obce.sites import SITE_KINDS, architecture, base_model, find_sites, model_hash
from torch import nn

from tiny import make_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from transformers import BertModel, PreTrainedModel, PreTrainedTokenizerBase

HEADS = [
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
]
LAYERS, HEAD_COUNT, HIDDEN, INNER = 3, 4, 32, 64


def with_head(body: BertModel, name: str) -> Any:
    if name == "BertModel":
        return body
    torch.manual_seed(7)
    model = getattr(transformers, name)(copy.deepcopy(body.config)).eval()
    model.bert.load_state_dict(body.state_dict(), strict=model.bert.pooler is not None)
    return model


def in_heads(rng: np.random.Generator, per_head: int, heads: Sequence[int] = range(HEAD_COUNT)) -> tuple[int, ...]:
    size = HIDDEN // HEAD_COUNT
    picked = [h * size + np.sort(rng.choice(size, per_head, replace=False)) for h in heads]
    return tuple(int(i) for i in np.concatenate(picked)) if picked else ()


def kept_of_every_unit(seed: int, dropped: Sequence[int] = ()) -> dict[str, tuple[int, ...]]:
    """Heads and rows of each layer at random, in the heads and intermediate layers that stay neurons too."""
    rng = np.random.default_rng(seed)
    kept = {}
    for layer in set(range(LAYERS)) - set(dropped):
        heads = np.flatnonzero(rng.random(HEAD_COUNT) < 0.6).tolist()
        kept[f"{layer}.query"] = kept[f"{layer}.key"] = in_heads(rng, int(rng.integers(1, 9)), heads)
        kept[f"{layer}.value"] = in_heads(rng, int(rng.integers(1, 9)), heads)
        for kind, width in (("intermediate", INNER), ("attention_output", HIDDEN), ("output", HIDDEN)):
            some = rng.choice(width, int(rng.integers(1, width + 1)), replace=False)
            kept[f"{layer}.{kind}"] = tuple(int(i) for i in np.sort(some))
    return kept


def kept_at_random(seed: int, sizes: Callable[[np.random.Generator, str], int]) -> dict[str, tuple[int, ...]]:
    """`sizes(rng, kind)`: neurons kept, per head for query and value."""
    rng = np.random.default_rng(seed)
    kept = {}
    for layer in range(LAYERS):
        kept[f"{layer}.query"] = kept[f"{layer}.key"] = in_heads(rng, sizes(rng, "query"))
        kept[f"{layer}.value"] = in_heads(rng, sizes(rng, "value"))
        inner = rng.choice(INNER, sizes(rng, "intermediate"), replace=False)
        kept[f"{layer}.intermediate"] = tuple(int(i) for i in np.sort(inner))
    return kept


KEPT = {
    "ragged": kept_at_random(1, lambda rng, kind: int(rng.integers(1, 64 if kind == "intermediate" else 8))),
    "one": kept_at_random(2, lambda _rng, _kind: 1),
    "half": kept_at_random(3, lambda _rng, kind: 32 if kind == "intermediate" else 4),
    "narrow-query": kept_at_random(4, lambda _rng, kind: {"query": 1, "value": 8, "intermediate": 64}[kind]),
    "inner-of-one-layer": {"1.intermediate": tuple(range(3, 64, 7))},
    "heads": {f"{i}.{k}": tuple(range(8 * i, 8 * i + 16)) for i in range(3) for k in ("query", "key", "value")},
    "no-head-of-one-layer": {f"1.{kind}": () for kind in ("query", "key", "value")},
    "rows": {"0.attention_output": (3, 4, 31), "1.output": tuple(range(0, 32, 2)), "2.output": (0,)},
    "every-unit": kept_of_every_unit(0),
}


def make_scores(model: PreTrainedModel, means: Mapping[str, np.ndarray]) -> Scores:
    """A table with the column that the repair reads."""
    layer, site, index, values = [], [], [], []
    for s in find_sites(model):
        layer += [s.layer] * s.width
        site += [SITE_KINDS.index(s.kind)] * s.width
        index += range(s.width)
        values += list(means.get(s.name, np.full(s.width, np.nan)))
    return Scores(
        layer=np.array(layer, np.int16),
        site=np.array(site, np.int8),
        index=np.array(index, np.int32),
        constant=np.zeros(len(layer), bool),
        columns={"token_mean": np.array(values)},
        meta={"model_hash": model_hash(model)},
    )


def random_means(model: PreTrainedModel) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {s.name: rng.normal(0.3, 0.5, s.width) for s in find_sites(model) if s.kind not in ("query", "key")}


def edited(model: PreTrainedModel, plan: Plan, fills: Mapping[str, np.ndarray] | None) -> Any:
    """The oracle: a dense copy whose weights make the removed neurons constant, without a hook or a cut.

    Zeroed query and key rows drop out of the product; a value row that is zero with bias c is the constant c, and so
    is a row that writes the residual stream; a reader that ignores the intermediate neuron's column takes its constant
    in the bias. Dropped layers are taken out of the stack.
    """
    dense = copy.deepcopy(model)
    base = base_model(dense)
    with torch.no_grad():
        for site in find_sites(model):
            if site.name not in plan.kept:
                continue
            gone = sorted(set(range(site.width)) - set(plan.kept[site.name]))
            fill = torch.zeros(len(gone)) if fills is None else torch.tensor(fills[site.name][gone])
            writer: Any = base.get_submodule(site.writer)
            if site.kind == "intermediate":
                assert site.reader is not None
                reader: Any = base.get_submodule(site.reader)
                reader.bias += (reader.weight[:, gone].double() @ fill.double()).to(reader.bias.dtype)
                reader.weight[:, gone] = 0
            else:
                writer.weight[gone] = 0
                writer.bias[gone] = 0.0 if site.kind in ("query", "key") else fill.float()
    layers: Any = base.get_submodule("encoder")
    layers.layer = nn.ModuleList(layer for i, layer in enumerate(layers.layer) if i not in plan.layers_dropped)
    return dense


@pytest.fixture(scope="session")
def inputs(texts: list[str], tiny_tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Eight texts of unlike length, padded, with two segments."""
    batch = tiny_tokenizer(texts[:8], texts[8:16], padding=True, truncation=True, return_tensors="pt")
    lengths = batch["attention_mask"].sum(1)
    assert lengths.min() < lengths.max()
    return dict(batch)


def answers(model: Any, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """All outputs; those of padding tokens, which no one reads, set to zero."""
    mask = inputs["attention_mask"].bool()
    if "MultipleChoice" in type(model).__name__:
        inputs = {name: tensor.view(4, 2, -1) for name, tensor in inputs.items()}
    with torch.no_grad():
        found = model(**inputs).to_tuple()
    return [x * mask.view(*mask.shape, *[1] * (x.dim() - 2)) if x.shape[:2] == mask.shape else x for x in found]


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    assert [x.shape for x in a] == [x.shape for x in b]
    assert all(bool(torch.isfinite(x).all()) for x in [*a, *b])
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("repair", ["none", "mean"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("head", ["BertModel", "BertForSequenceClassification", "BertForMaskedLM"])
def test_pruned_is_dense_with_the_neurons_replaced(
    tiny_bert: BertModel, inputs: Any, head: str, kept: str, attention: str, repair: str
) -> None:
    model = with_head(tiny_bert, head)
    model.set_attn_implementation(attention)
    plan = make_plan(model, KEPT[kept])
    means = random_means(model)
    scores = make_scores(model, means)
    dense = answers(model, inputs)
    small = prune(model, plan, repair=repair, scores=scores)
    assert small.config._attn_implementation == attention
    with masked(model, plan, repair=repair, scores=scores) as same:
        assert same is model
        expected = answers(model, inputs)
    by_weights = {s.name: np.zeros(s.width) for s in find_sites(model)} | means
    oracle = answers(edited(model, plan, by_weights if repair == "mean" else None), inputs)
    assert distance(answers(small, inputs), expected) < 1e-5
    assert distance(answers(small, inputs), oracle) < 1e-5
    assert distance(expected, dense) > 1e-2  # the plan does change this model
    assert distance(answers(model, inputs), dense) == 0  # and the hooks are gone


@pytest.mark.parametrize("repair", ["none", "mean"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dropped", [(0,), (1,), (0, 2)])
def test_layers_are_dropped(
    tiny_bert: BertModel, inputs: Any, dropped: tuple[int, ...], attention: str, repair: str
) -> None:
    model = with_head(tiny_bert, "BertForSequenceClassification")
    model.set_attn_implementation(attention)
    means = random_means(model)
    scores = make_scores(model, means)
    for kept in ({}, kept_of_every_unit(1, dropped)):
        plan = make_plan(model, kept, dropped)
        small: Any = prune(model, plan, repair=repair, scores=scores)
        assert len(small.bert.encoder.layer) == small.config.num_hidden_layers == LAYERS - len(dropped)
        assert small.config.obce["layers_dropped"] == list(dropped)
        fills = {s.name: np.zeros(s.width) for s in find_sites(model)} | means if repair == "mean" else None
        with masked(model, plan, repair=repair, scores=scores):
            assert distance(answers(small, inputs), answers(model, inputs)) < 1e-5
        assert distance(answers(small, inputs), answers(edited(model, plan, fills), inputs)) < 1e-5
    assert sum(len(m._forward_hooks) for m in model.modules()) == 0


@st.composite
def mixed_plans(draw: st.DrawFn) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """Kept indices of any sites, and layers dropped."""
    dropped = tuple(sorted(draw(st.sets(st.integers(0, LAYERS - 1), max_size=LAYERS - 1))))
    kept = {}
    for layer in set(range(LAYERS)) - set(dropped):
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        heads = sorted(draw(st.sets(st.integers(0, HEAD_COUNT - 1))))
        if draw(st.booleans()):
            kept[f"{layer}.query"] = kept[f"{layer}.key"] = in_heads(rng, draw(st.integers(1, 8)), heads)
            kept[f"{layer}.value"] = in_heads(rng, draw(st.integers(1, 8)), heads)
        for kind, width in (("intermediate", INNER), ("attention_output", HIDDEN), ("output", HIDDEN)):
            if draw(st.booleans()):
                some = rng.choice(width, draw(st.integers(1, width)), replace=False)
                kept[f"{layer}.{kind}"] = tuple(int(i) for i in np.sort(some))
    return kept, dropped


@settings(max_examples=40, deadline=None)
@given(
    cuts=mixed_plans(),
    repair=st.sampled_from(["none", "mean", "least_squares"]),
    attention=st.sampled_from(["eager", "sdpa"]),
)
def test_any_mixture(
    make_bert: Callable[..., BertModel],
    inputs: Any,
    texts: list[str],
    tiny_tokenizer: PreTrainedTokenizerBase,
    cuts: Any,
    repair: str,
    attention: str,
) -> None:
    model = make_bert()
    if repair == "least_squares":
        model.double()  # fitted weights can be large, and rounding with them
    model.set_attn_implementation(attention)
    plan = make_plan(model, *cuts)
    scores = make_scores(model, random_means(model)) if repair == "mean" else None
    how: dict[str, Any] = {"repair": repair, "scores": scores}
    if repair == "least_squares":
        how |= {"texts": tokenize(texts[:40], tiny_tokenizer, max_length=64), "ridge": 0.1}
    small: Any = prune(model, plan, **how)
    with masked(model, plan, **how):
        assert distance(answers(small, inputs), answers(model, inputs)) < 1e-5


@pytest.mark.parametrize("drop", [0, 1])
@pytest.mark.parametrize(
    ("units", "keep"),
    [
        (DEFAULT_UNITS, 0.5),
        (("heads",), 0.85),
        (("heads", "intermediate", "attention_output", "output"), 0.4),
        (("query_key", "value", "output"), 0.6),
        (("attention_output", "output"), None),
    ],
)
def test_a_plan_predicts_what_is_measured(
    make_bert: Callable[..., BertModel], inputs: Any, units: tuple[str, ...], keep: float | None, drop: int
) -> None:
    model = make_bert(max_position_embeddings=128)
    scores = make_scores(model, random_means(model))
    scores.columns["rf"] = np.random.default_rng(8).random(len(scores))
    scores.meta.update(architecture=architecture(model), corpus_hash="c", seed=0)
    preset = None if keep else "pbce-2025"
    how: dict[str, Any] = {"keep": keep, "of": "encoder", "preset": preset, "units": units, "drop_layers": drop}
    plan = choose(scores, model, score="rf", floor=0, **how)
    for repair in ("none", "mean"):
        small = prune(model, plan, repair=repair, scores=scores)
        assert (*count_parameters(small), flops(small), weight_bytes(small)) == tuple(plan.after)
        with masked(model, plan, repair=repair, scores=scores):
            assert distance(answers(small, inputs), answers(model, inputs)) < 1e-5
    assert len(plan.layers_dropped) == drop


def test_what_a_removed_row_writes_is_constant(tiny_bert: BertModel, inputs: Any) -> None:
    means = random_means(tiny_bert)
    plan = make_plan(tiny_bert, KEPT["rows"])
    for repair, scores in (("none", None), ("mean", make_scores(tiny_bert, means))):
        small: Any = prune(tiny_bert, plan, repair=repair, scores=scores)
        written: list[torch.Tensor] = []
        rows = small.encoder.layer[0].attention.output.dense
        assert isinstance(rows, ObceRows)
        assert rows.weight is not None
        assert tuple(rows.weight.shape) == (3, HIDDEN)
        assert repr(rows) == "ObceRows(in_features=32, out_features=32, kept=3)"
        rows.register_forward_hook(lambda _m, _a, output, written=written: written.append(output))
        answers(small, inputs)
        gone = sorted(set(range(HIDDEN)) - {3, 4, 31})
        expected = torch.tensor(means["0.attention_output"][gone] if scores else np.zeros(len(gone))).float()
        assert torch.equal(written[0][..., gone], expected.expand(*written[0].shape[:-1], -1))
        assert isinstance(small.encoder.layer[1].attention.output.dense, nn.Linear)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_has_its_class(tiny_bert: BertModel, inputs: Any, head: str) -> None:
    model = with_head(tiny_bert, head)
    plan = make_plan(model, KEPT["ragged"])
    small = prune(model, plan, repair="none")
    assert type(small).__name__ == "Obce" + head
    assert isinstance(small, getattr(transformers, head))
    assert type(base_model(small)).__name__ == "ObceBertModel"
    with masked(model, plan, repair="none"):
        assert distance(answers(small, inputs), answers(model, inputs)) < 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("head", ["BertModel", *HEADS])
def test_a_plan_that_removes_nothing_changes_no_bit(
    tiny_bert: BertModel, inputs: Any, head: str, attention: str
) -> None:
    model = with_head(tiny_bert, head)
    model.set_attn_implementation(attention)
    whole = {s.name: tuple(range(s.width)) for s in find_sites(model) if s.kind != "intermediate"}
    for kept in ({}, whole):
        small = prune(model, make_plan(model, kept), repair="mean")  # nothing to fill in, so no means are asked for
        assert distance(answers(small, inputs), answers(model, inputs)) == 0
        assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in model.parameters())


def test_constants_of_query_and_key_cancel(tiny_bert: BertModel, inputs: Any) -> None:
    """Any constants in the removed pairs give the pruned model, not only zeros: `mean` needs no fold there."""
    kept = {name: indices for name, indices in KEPT["half"].items() if name.endswith(("query", "key"))}
    plan = make_plan(tiny_bert, kept)
    constant = copy.deepcopy(tiny_bert)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, indices in kept.items():
            layer, kind = name.split(".")
            linear = getattr(constant.encoder.layer[int(layer)].attention.self, kind)
            gone = sorted(set(range(HIDDEN)) - set(indices))
            linear.weight[gone] = 0
            linear.bias[gone] = 2 * torch.randn(len(gone), generator=rng)
    for repair in ("none", "mean"):
        small = prune(tiny_bert, plan, repair=repair)
        assert distance(answers(small, inputs), answers(constant, inputs)) < 1e-5


def test_the_dense_scale_of_attention_is_kept(tiny_bert: BertModel, inputs: Any) -> None:
    plan = make_plan(tiny_bert, KEPT["half"])
    small: Any = prune(tiny_bert, plan, repair="none")
    with masked(tiny_bert, plan, repair="none"):
        expected = answers(tiny_bert, inputs)
    assert [layer.attention.self.scaling for layer in small.encoder.layer] == [8**-0.5] * LAYERS
    assert distance(answers(small, inputs), expected) < 1e-5
    for layer in small.encoder.layer:
        layer.attention.self.scaling = (layer.attention.self.query.out_features // 4) ** -0.5
    assert distance(answers(small, inputs), expected) > 1e-3


def test_it_is_really_smaller(tiny_bert: BertModel, tmp_path: Any) -> None:
    kept = KEPT["ragged"]
    small: Any = prune(tiny_bert, make_plan(tiny_bert, kept), repair="none")
    removed = 0
    for number, layer in enumerate(small.encoder.layer):
        q, v, f = (len(kept[f"{number}.{kind}"]) for kind in ("query", "value", "intermediate"))
        shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
        assert shapes["attention.self.query.weight"] == shapes["attention.self.key.weight"] == (q, HIDDEN)
        assert shapes["attention.self.query.bias"] == (q,)
        assert shapes["attention.self.value.weight"] == (v, HIDDEN)
        assert shapes["attention.output.dense.weight"] == (HIDDEN, v)
        assert shapes["intermediate.dense.weight"] == (f, HIDDEN)
        assert shapes["output.dense.weight"] == (HIDDEN, f)
        assert shapes["output.dense.bias"] == (HIDDEN,)
        for removed_q, removed_v, removed_f in [(HIDDEN - q, HIDDEN - v, INNER - f)]:
            removed += 2 * removed_q * (HIDDEN + 1)
            removed += removed_v * (2 * HIDDEN + 1) + removed_f * (2 * HIDDEN + 1)
    assert removed > 0
    count = [sum(p.numel() for p in m.parameters()) for m in (tiny_bert, small)]
    assert count[0] - count[1] == removed
    for model, name in ((tiny_bert, "dense"), (small, "small")):
        model.save_pretrained(tmp_path / name)
    size = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("dense", "small")]
    assert size[0] - size[1] >= 4 * removed * 0.95  # the header may differ by some bytes
    for parameter in small.parameters():  # no view of a dense matrix is kept alive
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()


def test_the_dense_model_is_untouched_and_shares_nothing(tiny_bert: BertModel, inputs: Any) -> None:
    model = with_head(tiny_bert, "BertForMaskedLM")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, config = answers(model, inputs), model.config.to_dict()
    plan = make_plan(model, KEPT["ragged"])
    small = prune(model, plan, repair="mean", scores=make_scores(model, random_means(model)))
    with torch.no_grad():
        for tensor in [*small.parameters(), *small.buffers()]:
            tensor.zero_()
    small.config.num_labels = 9
    assert model_hash(model) == plan.model_hash
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert distance(answers(model, inputs), first) == 0
    assert model.config.to_dict() == config
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_mean_repair_stays_nearer_to_the_dense_model(
    tiny_bert: BertModel, inputs: Any, texts: list[str], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Means of this model are far from zero, so zeroing moves the readers' inputs and the fold does not."""
    dense = answers(tiny_bert, inputs)
    error: dict[str, list[float]] = {"none": [], "mean": []}
    for seed in range(8):
        kept = kept_at_random(seed, lambda _rng, kind: 40 if kind == "intermediate" else 5)
        plan = make_plan(tiny_bert, kept)
        for repair, found in error.items():
            small = prune(tiny_bert, plan, repair=repair, texts=texts[:60], tokenizer=tiny_tokenizer)
            found.append(float((answers(small, inputs)[0] - dense[0]).square().mean()))
    assert np.mean(error["mean"]) < 0.9 * np.mean(error["none"])


def test_means_from_texts_and_from_scores_agree(
    tiny_bert: BertModel, texts: list[str], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    batches = tokenize(texts, tiny_tokenizer, max_length=64)
    means = {}
    for layer in capture(tiny_bert, batches, find_sites(tiny_bert)):
        means.update({f"{layer.layer}.{kind}": sums.sums / sums.count for kind, sums in layer.tokens.items()})
    scores = make_scores(tiny_bert, means)
    plan = make_plan(tiny_bert, KEPT["half"] | KEPT["rows"])
    by_texts = prune(tiny_bert, plan, repair="mean", texts=texts, tokenizer=tiny_tokenizer).state_dict()
    by_scores = prune(tiny_bert, plan, repair="mean", scores=scores).state_dict()
    for name, tensor in by_texts.items():
        torch.testing.assert_close(tensor, by_scores[name], rtol=1e-6, atol=1e-6)


def test_the_repair_touches_the_bias_of_readers_only(tiny_bert: BertModel) -> None:
    means = random_means(tiny_bert)
    plan = make_plan(tiny_bert, KEPT["half"])
    plain: Any = prune(tiny_bert, plan, repair="none").state_dict()
    repaired: Any = prune(tiny_bert, plan, repair="mean", scores=make_scores(tiny_bert, means)).state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], repaired[name])}
    assert changed == {
        f"encoder.layer.{layer}.{reader}.bias"
        for layer in range(3)
        for reader in ("attention.output.dense", "output.dense")
    }
    gone = sorted(set(range(INNER)) - set(KEPT["half"]["2.intermediate"]))
    dense = tiny_bert.encoder.layer[2].output.dense
    expected = dense.bias.double() + dense.weight[:, gone].double() @ torch.tensor(means["2.intermediate"][gone])
    torch.testing.assert_close(repaired["encoder.layer.2.output.dense.bias"], expected.float(), rtol=0, atol=0)


class TestWhatIsCarriedOver:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("kept", [KEPT["ragged"], KEPT["every-unit"]], ids=["ragged", "every-unit"])
    def test_dtype(self, tiny_bert: BertModel, inputs: Any, dtype: torch.dtype, kept: dict[str, Any]) -> None:
        model = tiny_bert.to(dtype)
        plan = make_plan(model, kept)
        scores = make_scores(model, random_means(model))
        small = prune(model, plan, repair="mean", scores=scores)
        assert {p.dtype for p in small.parameters()} == {dtype}
        assert small.dtype == dtype
        tolerance = {torch.float16: 0.02, torch.bfloat16: 0.2, torch.float64: 1e-12}[dtype]
        with masked(model, plan, repair="mean", scores=scores):
            assert distance(answers(small, inputs), answers(model, inputs)) < tolerance

    def test_training_flag_and_frozen_weights(self, tiny_bert: BertModel) -> None:
        tiny_bert.embeddings.requires_grad_(False)
        for training in (True, False):
            small: Any = prune(tiny_bert.train(training), make_plan(tiny_bert, KEPT["half"]), repair="none")
            assert all(module.training == training for module in small.modules())
        assert {n for n, p in small.named_parameters() if not p.requires_grad} == {
            n for n, p in tiny_bert.named_parameters() if not p.requires_grad
        }

    def test_labels_and_record(self, tiny_bert: BertModel) -> None:
        config = copy.deepcopy(tiny_bert.config)
        config.id2label, config.label2id = {0: "no", 1: "yes", 2: "maybe"}, {"no": 0, "yes": 1, "maybe": 2}
        config.classifier_dropout, config.problem_type = 0.3, "single_label_classification"
        model = transformers.BertForSequenceClassification(config).eval()
        plan = make_plan(model, KEPT["half"])
        small: Any = prune(model, plan, repair="none")
        old, new = model.config.to_dict(), small.config.to_dict()
        assert set(old) <= set(new)
        assert {k for k in old if old[k] != new[k]} <= {
            "model_type",
            "architectures",
            "_name_or_path",
            "dtype",
        }
        assert small.dropout.p == 0.3
        assert small.classifier.out_features == 3
        assert small.config.obce == {
            "version": obce.__version__,
            "score": "rf",
            "preset": None,
            "keep": 0.5,
            "of": "encoder",
            "repair": "none",
            "corpus_hash": "c0",
            "model_hash": plan.model_hash,
        }
        assert json.loads(small.config.to_json_string())["obce"] == small.config.obce

    def test_tied_and_untied_words(self, tiny_bert: BertModel) -> None:
        for tie in (True, False):
            config = copy.deepcopy(tiny_bert.config)
            config.tie_word_embeddings = tie
            model = transformers.BertForMaskedLM(config).eval()
            small: Any = prune(model, make_plan(model, KEPT["half"]), repair="none")
            words = small.bert.embeddings.word_embeddings.weight
            assert (small.cls.predictions.decoder.weight is words) == tie
            assert small.cls.predictions.bias is small.cls.predictions.decoder.bias or not tie
            assert small.config.tie_word_embeddings == tie

    def test_a_model_without_pooler(self, tiny_bert: BertModel, inputs: Any) -> None:
        model = transformers.BertModel(tiny_bert.config, add_pooling_layer=False).eval()
        small: Any = prune(model, make_plan(model, {}), repair="mean")
        assert small.pooler is None
        assert distance(answers(small, inputs), answers(model, inputs)) == 0


class TestUseOfThePrunedModel:
    @pytest.fixture
    def small(self, tiny_bert: BertModel) -> Any:
        model = with_head(tiny_bert, "BertForMaskedLM")
        return prune(model, make_plan(model, KEPT["ragged"]), repair="none")

    def test_attentions_and_hidden_states(self, small: Any, tiny_bert: BertModel, inputs: Any) -> None:
        small.set_attn_implementation("eager")
        with torch.no_grad():
            out = small(**inputs, output_attentions=True, output_hidden_states=True)
            plain = small(**inputs)
        length = inputs["input_ids"].shape[1]
        assert [tuple(a.shape) for a in out.attentions] == [(8, HEAD_COUNT, length, length)] * LAYERS
        for weights in out.attentions:
            torch.testing.assert_close(weights.sum(-1), torch.ones(8, HEAD_COUNT, length))
        assert [tuple(h.shape) for h in out.hidden_states] == [(8, length, HIDDEN)] * (LAYERS + 1)
        assert torch.equal(out.hidden_states[0], tiny_bert.embeddings(inputs["input_ids"], inputs["token_type_ids"]))
        assert torch.equal(out.logits, plain.logits)

    def test_gradients_with_and_without_checkpointing(self, small: Any, inputs: Any) -> None:
        small.config.hidden_dropout_prob = small.config.attention_probs_dropout_prob = 0.0
        for module in small.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        small.train()
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                small.gradient_checkpointing_enable()
            small.zero_grad()
            small(**inputs, labels=inputs["input_ids"]).loss.backward()
            gradients.append({name: p.grad.clone() for name, p in small.named_parameters()})
        assert all(g.abs().sum() > 0 for n, g in gradients[0].items() if "key.bias" not in n)
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name])

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_every_unit_at_once(self, tiny_bert: BertModel, inputs: Any, attention: str) -> None:
        """Heads differ from layer to layer, one layer has none; trained, moved, and under autocast."""
        kept = {**kept_of_every_unit(2), **KEPT["no-head-of-one-layer"]}
        small: Any = prune(tiny_bert, make_plan(tiny_bert, kept), repair="none")
        small.set_attn_implementation(attention)
        heads = [layer.attention.self.num_attention_heads for layer in small.encoder.layer]
        assert heads[1] == 0
        assert small.encoder.layer[1].attention.output.dense.weight is None
        length = inputs["input_ids"].shape[1]
        if attention == "eager":
            found = small(**inputs, output_attentions=True).attentions
            assert [tuple(a.shape) for a in found] == [(8, count, length, length) for count in heads]
        small.train()
        small(**inputs).pooler_output.sum().backward()
        assert all(parameter.grad is not None for parameter in small.parameters())
        small.eval()
        with torch.autocast("cpu", torch.bfloat16):
            low = answers(small, inputs)
        assert distance(low, answers(small, inputs)) < 0.2
        double = copy.deepcopy(small).double()
        assert distance(answers(double, inputs), answers(small, inputs)) < 1e-4
        assert all(not m.kept.is_floating_point() for m in double.modules() if getattr(m, "kept", None) is not None)

    def test_dropout_works_on_attention(self, small: Any, inputs: Any) -> None:
        small.train()
        with torch.no_grad():
            assert not torch.equal(small(**inputs).logits, small(**inputs).logits)

    def test_new_tokens(self, small: Any, inputs: Any) -> None:
        small.resize_token_embeddings(300, mean_resizing=False)
        assert small(**inputs).logits.shape[-1] == small.config.vocab_size == 300
        assert small.cls.predictions.decoder.weight is small.bert.embeddings.word_embeddings.weight

    def test_kernels_that_cannot_run_are_refused(self, small: Any) -> None:
        for kernel in ("flash_attention_2", "flex_attention"):
            with pytest.raises(ValueError, match="does not support"):
                type(small)._from_config(copy.deepcopy(small.config), attn_implementation=kernel)

    def test_a_pruned_model_is_not_pruned_again(self, small: Any, tiny_bert: BertModel) -> None:
        with pytest.raises(ValueError, match="already pruned"):
            prune(small, make_plan(tiny_bert, {}))


class TestMasked:
    def test_hooks_go_even_when_the_body_fails(self, tiny_bert: BertModel, inputs: Any) -> None:
        dense = answers(tiny_bert, inputs)
        with (
            pytest.raises(RuntimeError, match="inside"),
            masked(tiny_bert, make_plan(tiny_bert, KEPT["one"]), repair="none"),
        ):
            raise RuntimeError("inside")
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_bert.modules())
        assert distance(answers(tiny_bert, inputs), dense) == 0

    def test_gradients_of_kept_neurons_flow(self, tiny_bert: BertModel, inputs: Any) -> None:
        plan = make_plan(tiny_bert, KEPT["half"])
        with masked(tiny_bert, plan, repair="none"):
            tiny_bert(**inputs).pooler_output.sum().backward()
        grad = tiny_bert.encoder.layer[0].intermediate.dense.weight.grad
        assert grad is not None
        alive = (grad.abs().sum(1) > 0).nonzero().flatten().tolist()
        assert alive == list(plan.kept["0.intermediate"])


class TestRefusals:
    @pytest.fixture(params=["prune", "masked"])
    def cut(self, request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
        def call(*args: Any, **kwargs: Any) -> None:
            if request.param == "prune":
                prune(*args, **kwargs)
            else:
                with masked(*args, **kwargs):
                    pass

        return call

    def test_plan_of_another_model(self, tiny_bert: BertModel, cut: Any) -> None:
        plan = make_plan(tiny_bert, {})
        with torch.no_grad():
            tiny_bert.encoder.layer[0].output.dense.bias[0] += 1
        with pytest.raises(ValueError, match=r"plan was made for the model with hash \w+\.\.\., but this model has"):
            cut(tiny_bert, plan)

    def test_other_architectures(self, tiny_bert: BertModel, cut: Any) -> None:
        config = transformers.AlbertConfig(vocab_size=50, embedding_size=8, hidden_size=16, num_attention_heads=2)
        with pytest.raises(ValueError, match="of the family 'albert'"):
            cut(transformers.AlbertModel(config), make_plan(tiny_bert, {}))

    def test_classes_without_a_narrow_one(self, tiny_bert: BertModel) -> None:
        class Mine(transformers.BertModel):
            pass

        model = Mine(tiny_bert.config)
        with pytest.raises(ValueError, match="model is a Mine, expected one of BertForMaskedLM, BertForMultiple"):
            prune(model, make_plan(model, {}))

    def test_replaced_heads(self, tiny_bert: BertModel) -> None:
        model = with_head(tiny_bert, "BertForSequenceClassification")
        model.classifier = nn.Sequential(nn.Linear(HIDDEN, 2))
        with pytest.raises(ValueError, match="has a Sequential at 'classifier', expected the Linear"):
            prune(model, make_plan(model, {}), repair="none")
        model.classifier = nn.Linear(HIDDEN, 5)
        with pytest.raises(ValueError, match=r"classifier.weight of shape \(5, 32\), expected \(2, 32\)"):
            prune(model, make_plan(model, {}), repair="none")

    def test_unknown_repair(self, tiny_bert: BertModel, cut: Any) -> None:
        with pytest.raises(ValueError, match="repair is 'median', expected one of 'none', 'mean', 'least_squares'"):
            cut(tiny_bert, make_plan(tiny_bert, {}), repair="median")

    @pytest.mark.parametrize(
        ("kept", "message"),
        [
            ({"7.value": (0,)}, "site '7.value', expected only sites of this model: 0.query to 2.output"),
            ({"0.output": ()}, r"kept\['0.output'\] is \[\], expected at least one neuron"),
            ({"0.attention_output": (0, 32)}, r"is \[0, 32\], expected .* from 0 to 31"),
            ({"0.intermediate": ()}, r"kept\['0.intermediate'\] is \[\], expected at least one neuron"),
            ({"0.intermediate": (0, 64)}, r"is \[0, 64\], expected .* from 0 to 63"),
            ({"0.intermediate": (-1, 5)}, r"is \[-1, 5\], expected"),
            ({"0.intermediate": (5, 5)}, r"is \[5, 5\], expected .* distinct and ascending"),
            ({"0.intermediate": (6, 5)}, r"is \[6, 5\], expected .* distinct and ascending"),
            ({"0.intermediate": (*range(40), 3)}, r"is \[0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\] \(41 indices\)"),
            (
                {"0.intermediate": (1.5,)},
                "'float' object cannot be interpreted as an integer, expected integers",
            ),
            ({"1.value": (0, 8, 16)}, r"keeps the heads \[0, 1, 2\] in '1.value' but \[0, 1, 2, 3\] in '1.query'"),
            ({"1.query": (), "1.key": ()}, r"keeps the heads \[0, 1, 2, 3\] in '1.value' but \[\] in '1.query'"),
            ({"1.value": (0, 1, 8)}, r"keeps \[2, 1, 0, 0\] neurons in the heads"),
            ({"1.value": (0, 1, 8, 16, 24)}, r"keeps \[2, 1, 1, 1\] neurons in the heads"),
            (
                {"1.query": (0, 8, 16, 24), "1.key": (1, 8, 16, 24)},
                "other neurons of '1.query' than of '1.key'",
            ),
            ({"1.query": (0, 8, 16, 24)}, "query and key neurons are cut in pairs"),
        ],
    )
    def test_indices(self, tiny_bert: BertModel, cut: Any, kept: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            cut(tiny_bert, make_plan(tiny_bert, kept), repair="none")

    @pytest.mark.parametrize(
        ("dropped", "message"),
        [
            ((3,), r"layers_dropped is \[3\], expected distinct and ascending layer numbers from 0 to 2"),
            ((1, 1), r"layers_dropped is \[1, 1\], expected"),
            ((1, 0), r"layers_dropped is \[1, 0\], expected"),
            ((0, 1, 2), "and not all of them"),
            ((0,), "the site '0.query' of a layer that plan.layers_dropped removes"),
        ],
    )
    def test_layers(self, tiny_bert: BertModel, cut: Any, dropped: tuple[int, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            cut(tiny_bert, make_plan(tiny_bert, KEPT["half"], dropped), repair="none")

    def test_means_from_nowhere_or_twice(
        self, tiny_bert: BertModel, cut: Any, texts: list[str], tiny_tokenizer: PreTrainedTokenizerBase
    ) -> None:
        plan = make_plan(tiny_bert, KEPT["half"])
        scores = make_scores(tiny_bert, random_means(tiny_bert))
        with pytest.raises(ValueError, match=r"repair='mean' needs the means .* neither scores nor texts is given"):
            cut(tiny_bert, plan, repair="mean")
        with pytest.raises(ValueError, match="scores and texts are both given"):
            cut(tiny_bert, plan, repair="mean", scores=scores, texts=texts, tokenizer=tiny_tokenizer)
        with pytest.raises(ValueError, match="texts are given without a tokenizer"):
            cut(tiny_bert, plan, texts=texts)

    def test_scores_that_do_not_serve(self, tiny_bert: BertModel, cut: Any) -> None:
        plan = make_plan(tiny_bert, KEPT["half"])
        good = make_scores(tiny_bert, random_means(tiny_bert))
        with pytest.raises(ValueError, match="scores are of the model with hash ffff"):
            cut(tiny_bert, plan, repair="mean", scores=dataclasses.replace(good, meta={"model_hash": "ffff"}))
        with pytest.raises(ValueError, match="no column 'token_mean'"):
            cut(tiny_bert, plan, repair="mean", scores=dataclasses.replace(good, columns={}))
        rows = good.rows(0, "query")
        part = {f.name: getattr(good, f.name)[rows] for f in dataclasses.fields(good)[:4]}
        columns = {"token_mean": good.columns["token_mean"][rows]}
        with pytest.raises(ValueError, match=r"scores hold no site 0\.value, which the plan cuts"):
            cut(tiny_bert, plan, repair="mean", scores=Scores(**part, columns=columns, meta=good.meta))
        gone = min(set(range(HIDDEN)) - set(plan.kept["1.value"]))
        good.columns["token_mean"][good.rows(1, "value").start + gone] = np.nan
        with pytest.raises(ValueError, match=rf"the mean of neuron 1\.value\.{gone} is nan, expected a finite"):
            cut(tiny_bert, plan, repair="mean", scores=good)

    def test_means_of_kept_neurons_need_not_be_finite(self, tiny_bert: BertModel, cut: Any) -> None:
        plan = make_plan(tiny_bert, KEPT["half"])
        means = random_means(tiny_bert)
        for name, mean in means.items():
            mean[list(plan.kept.get(name, range(len(mean))))] = np.nan
        cut(tiny_bert, plan, repair="mean", scores=make_scores(tiny_bert, means))
