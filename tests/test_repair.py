"""Least squares: exact where the removed can be told from the kept, never worse than the mean, and numpy agrees."""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from obce.corpus import Corpus, read_corpus, tokenize
from obce.prune import masked, prune
from obce.repair import RIDGE, Fit, InputMoments, KeyMoments, least_squares
from obce.sites import base_model

from tiny import make_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from obce.corpus import TokenBatches
    from transformers import BertModel

HEADS, SIZE, HIDDEN, INNER = 4, 8, 32, 64
EXACT = 1e-9
"""A ridge that leaves a fit in float64 exact for the eye."""


def first_of_each_head(count: int) -> tuple[int, ...]:
    return tuple(head * SIZE + i for head in range(HEADS) for i in range(count))


HALF = {
    f"{layer}.{kind}": tuple(range(0, INNER, 2)) if kind == "intermediate" else first_of_each_head(4)
    for layer in range(3)
    for kind in ("query", "key", "value", "intermediate")
}


@pytest.fixture(scope="module")
def batches(texts: list[str], tiny_tokenizer: Any) -> TokenBatches:
    return tokenize(texts[:100], tiny_tokenizer, max_length=64, batch_size=16)


def outputs(model: Any, batches: TokenBatches, **how: Any) -> list[torch.Tensor]:
    """Last hidden states of all real tokens, batch by batch."""
    found = []
    with torch.no_grad():
        for batch in batches:
            hidden = base_model(model)(**batch.inputs, **how).last_hidden_state
            found.append(hidden[batch.inputs["attention_mask"].bool()])
    return found


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True))


def spanned(model: Any, kinds: Sequence[str]) -> Any:
    """Gives the neurons that HALF removes what a linear function of the kept ones has, in these kinds of sites."""
    rng = torch.Generator().manual_seed(4)
    dtype = model.dtype
    with torch.no_grad():
        for layer in base_model(model).encoder.layer:
            for kind in kinds:
                if kind == "intermediate":  # the activation bends sums, so each odd neuron doubles the one before it
                    linear = layer.intermediate.dense
                    linear.weight[1::2], linear.bias[1::2] = linear.weight[::2].clone(), linear.bias[::2].clone()
                    continue
                linear = getattr(layer.attention.self, kind)
                for head in range(0, HIDDEN, SIZE):
                    mix = torch.randn(4, 4, generator=rng).to(dtype)
                    linear.weight[head + 4 : head + 8] = mix @ linear.weight[head : head + 4]
                    linear.bias[head + 4 : head + 8] = torch.randn(4, generator=rng).to(dtype)
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_can_be_told_from_the_kept_is_not_missed(
    attention: str, make_bert: Callable[..., BertModel], batches: TokenBatches
) -> None:
    model = spanned(make_bert(attn_implementation=attention).double(), ("key", "value", "intermediate"))
    plan = make_plan(model, HALF)
    dense = outputs(model, batches)
    assert distance(outputs(prune(model, plan, repair="none"), batches), dense) > 0.1
    small = prune(model, plan, texts=batches, ridge=EXACT)
    assert distance(outputs(small, batches), dense) < 1e-6
    errors = small.config.obce["least_squares"]["errors"]
    assert list(errors) == [f"{layer}.{kind}" for layer in range(3) for kind in ("value", "intermediate")]
    assert all(after < 1e-6 < before for before, after in errors.values())


def test_exact_in_float32_and_on_other_texts(
    make_bert: Callable[..., BertModel], texts: list[str], tiny_tokenizer: Any, batches: TokenBatches
) -> None:
    model = spanned(make_bert(), ("value", "intermediate"))
    plan = make_plan(model, {name: kept for name, kept in HALF.items() if name.split(".")[1] not in ("query", "key")})
    small = prune(model, plan, texts=batches, ridge=1e-7)
    assert distance(outputs(small, batches), outputs(model, batches)) < 1e-4
    others = tokenize(texts[100:], tiny_tokenizer, max_length=64)
    assert distance(outputs(small, others), outputs(model, others)) < 1e-3


def test_queries_that_need_no_more_than_the_kept_keys(
    make_bert: Callable[..., BertModel], batches: TokenBatches
) -> None:
    model = spanned(make_bert(attn_implementation="eager").double(), ("key",))
    plan = make_plan(model, {name: kept for name, kept in HALF.items() if name.split(".")[1] in ("query", "key")})
    small: Any = prune(model, plan, texts=batches, ridge=EXACT)
    plain: Any = prune(model, plan, repair="mean")
    batch = next(iter(batches))
    with torch.no_grad():
        found, bare, dense = (m(**batch.inputs, output_attentions=True).attentions for m in (small, plain, model))
    for layer in range(3):
        assert float((found[layer] - dense[layer]).abs().max()) < 1e-5
        assert float((bare[layer] - dense[layer]).abs().max()) > 1e-2
    assert small.encoder.layer[0].attention.self.query.out_features == HIDDEN // 2


def hooked(model: Any, batches: TokenBatches) -> dict[str, np.ndarray]:
    """[tokens, width] of every reader: what it takes in (x), puts out (y), and the stream it is added to (h)."""
    found: dict[str, list[torch.Tensor]] = {}
    real: list[torch.Tensor] = []
    handles = []

    def keep(name: str) -> Any:
        def hook(_module: Any, args: Any, output: Any) -> None:
            part = [("x", args[0]), ("y", output)] if not name.endswith("norm") else [("h", args[1])]
            for suffix, tensor in part:
                found.setdefault(f"{name.removesuffix(' norm')} {suffix}", []).append(tensor[real[-1]].double())

        return hook

    for number, layer in enumerate(base_model(model).encoder.layer):
        for kind, block in (("value", layer.attention.output), ("intermediate", layer.output)):
            handles.append(block.dense.register_forward_hook(keep(f"{number}.{kind}")))
            handles.append(block.register_forward_hook(keep(f"{number}.{kind} norm")))
    with torch.no_grad():
        for batch in batches:
            real.append(batch.inputs["attention_mask"].bool())
            base_model(model)(**batch.inputs)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def lost(found: np.ndarray, target: np.ndarray) -> float:
    return float((target - found).var(axis=0).sum() / target.var(axis=0).sum())


@pytest.mark.parametrize("ridge", [RIDGE, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_fit_is_the_ridge_regression_of_numpy(
    dtype: torch.dtype, ridge: float, make_bert: Callable[..., BertModel], batches: TokenBatches
) -> None:
    """Weights, biases and errors of every reader, from the activations of both models, a dropped layer among them."""
    model: Any = make_bert().to(dtype)
    kept = {name: indices for name, indices in HALF.items() if not name.startswith("1.")}
    kept["2.output"] = tuple(range(0, HIDDEN, 3))
    plan = make_plan(model, kept, (1,))
    small: Any = prune(model, plan, texts=batches, ridge=ridge)
    start: Any = prune(model, plan, repair="none")
    fits = small.config.obce["least_squares"]["errors"]
    assert list(fits) == ["0.value", "0.intermediate", "2.value", "2.intermediate"]
    dense, narrow = hooked(model, batches), hooked(small, batches)
    for name, (mean_error, error) in fits.items():
        layer, kind = int(name[0]), name[2:]
        place = {0: 0, 2: 1}[layer]
        readers = [
            (m.encoder.layer[place].attention.output if kind == "value" else m.encoder.layer[place].output).dense
            for m in (small, start)
        ]
        rows = np.array(kept["2.output"]) if name == "2.intermediate" else np.arange(HIDDEN)
        x, h = narrow[f"{place}.{kind} x"], narrow[f"{place}.{kind} h"]
        target = dense[f"{name} y"] + dense[f"{name} h"] - h
        old = np.zeros((HIDDEN, x.shape[1]))
        old[rows] = readers[1].weight.detach().double().numpy()
        residual = target - x @ old.T
        mx, mr = x.mean(0), residual.mean(0)
        covariance = (x - mx).T @ (x - mx) / len(x)
        cross = (x - mx).T @ (residual - mr) / len(x)
        more = ridge * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        change = np.linalg.solve(covariance + more, cross)[:, rows].T
        np.testing.assert_allclose(readers[0].weight.detach().numpy(), old[rows] + change, rtol=0, atol=2e-3)
        new = old.copy()
        new[rows] += change
        fitted = x @ new.T
        np.testing.assert_allclose(readers[0].bias.detach().numpy(), (target - fitted).mean(0), rtol=0, atol=5e-3)
        assert error == pytest.approx(lost(fitted, target), rel=1e-3, abs=2e-6)
        assert error == pytest.approx(lost(narrow[f"{place}.{kind} y"], target), rel=1e-3, abs=2e-6)
        assert mean_error == pytest.approx(lost(x @ old.T, target), rel=1e-3, abs=2e-6)
        assert error < mean_error
        # without a ridge nothing could be better, and this is not much worse
        best = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), residual[:, rows], rcond=None)[0]
        every = x @ old.T + residual.mean(0)
        every[:, rows] = x @ old[rows].T + np.column_stack([x, np.ones(len(x))]) @ best
        assert lost(every, target) <= error + 1e-6


def test_never_worse_than_the_best_constants(make_bert: Callable[..., BertModel], batches: TokenBatches) -> None:
    rng = np.random.default_rng(0)
    model = make_bert()
    for per_head, inner, ridge in ((1, 1, 1e-3), (7, 63, 1e-3), (3, 5, 1e3), (8, 64, 1e-3)):
        kept: dict[str, Any] = {}
        for layer in range(3):
            heads = np.concatenate([h * SIZE + np.sort(rng.choice(SIZE, per_head, False)) for h in range(HEADS)])
            kept[f"{layer}.query"] = kept[f"{layer}.key"] = kept[f"{layer}.value"] = heads
            kept[f"{layer}.intermediate"] = np.sort(rng.choice(INNER, inner, replace=False))
        plan = make_plan(model, kept)
        small = prune(model, plan, repair="none")
        queries = {layer: torch.from_numpy(np.array(kept[f"{layer}.query"])) for layer in range(3)}
        fits = least_squares(model, small, batches, queries, ridge=ridge)
        assert [type(fit) for fit in fits] == [Fit] * 6
        assert all(0 <= fit.error <= fit.mean_error for fit in fits)
        assert all(fit.ridge == ridge for fit in fits)
        if inner < INNER:
            assert sum(fit.error for fit in fits) < sum(fit.mean_error for fit in fits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("head", ["BertModel", "BertForSequenceClassification"])
def test_a_plan_that_removes_nothing_changes_no_bit(
    head: str, attention: str, tiny_bert: BertModel, batches: TokenBatches
) -> None:
    model: Any = tiny_bert if head == "BertModel" else getattr(transformers, head)(tiny_bert.config).eval()
    model.set_attn_implementation(attention)
    small: Any = prune(model, make_plan(model, {}), texts=batches)
    assert distance(outputs(small, batches), outputs(model, batches)) == 0
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in small.state_dict().items())
    # layers before the first cut are whole, and stay so
    cut: Any = prune(model, make_plan(model, {"2.intermediate": (1, 5, 9)}), texts=batches)
    whole = base_model(model).state_dict()
    changed = {name for name, tensor in base_model(cut).state_dict().items() if not torch.equal(tensor, whole[name])}
    assert changed == {
        f"encoder.layer.2.{linear}.dense.{part}" for linear in ("intermediate", "output") for part in ("weight", "bias")
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_pruned_is_masked(attention: str, make_bert: Callable[..., BertModel], batches: TokenBatches) -> None:
    model = make_bert(attn_implementation=attention)
    rows = {"0.attention_output": (0, 3, 4, 31), "2.output": tuple(range(0, HIDDEN, 2))}
    heads = {f"1.{kind}": tuple(range(2 * SIZE)) for kind in ("query", "key", "value")}
    for kept, dropped in ((HALF, ()), (HALF | heads | rows, ()), ({"1.value": HALF["1.value"]} | rows, ())):
        plan = make_plan(model, kept, dropped)
        small = prune(model, plan, texts=batches)
        dense = outputs(model, batches)
        with masked(model, plan, texts=batches) as same:
            assert distance(outputs(same, batches), outputs(small, batches)) < 1e-5
        assert distance(outputs(model, batches), dense) == 0
        assert distance(outputs(small, batches), dense) > 1e-3


def test_a_kernel_that_pruned_models_do_not_have(
    make_bert: Callable[..., BertModel], batches: TokenBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with flash attention the dense model hands on the plain mask [b, T]; the pruned one has sdpa."""
    from transformers import AttentionInterface, AttentionMaskInterface

    masks: list[Any] = []

    def attend(_module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_how: Any) -> Any:
        masks.append(mask)
        found = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask[:, None, None].bool(), scale=scaling
        )
        return found.transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "own", attend)
    monkeypatch.setitem(
        AttentionMaskInterface._global_mapping, "own", lambda *_args, attention_mask, **_how: attention_mask
    )
    model, plain = make_bert(), make_bert(attn_implementation="sdpa")
    model.set_attn_implementation("own")
    plan = make_plan(model, HALF)
    small, expected = (prune(m, plan, texts=batches) for m in (model, plain))
    assert masks[0].dim() == 2
    assert small.config._attn_implementation == "sdpa"
    assert distance(outputs(small, batches), outputs(expected, batches)) < 1e-4


def test_the_dense_model_is_left_as_it_was(tiny_bert: BertModel, batches: TokenBatches) -> None:
    tiny_bert.train()
    tiny_bert.encoder.layer[1].eval()
    tiny_bert.encoder.layer[0].output.dense.weight.requires_grad_(False)
    flags = [module.training for module in tiny_bert.modules()]
    state = {name: tensor.clone() for name, tensor in tiny_bert.state_dict().items()}
    seen: list[tuple[float, float]] = []
    plan = make_plan(tiny_bert, HALF)
    with torch.autocast("cpu", torch.bfloat16):
        small: Any = prune(tiny_bert, plan, texts=batches, progress=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert [module.training for module in tiny_bert.modules()] == flags
    assert small.training
    assert all(torch.equal(state[name], tensor) for name, tensor in tiny_bert.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_bert.modules())
    assert [name for name, p in small.named_parameters() if not p.requires_grad] == [
        "encoder.layer.0.output.dense.weight"
    ]
    assert all(p.grad_fn is None for p in small.parameters())
    # dropout was off, and the caller's autocast had no say
    again = prune(copy.deepcopy(tiny_bert).eval(), plan, texts=batches)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), small.parameters(), strict=True))
    seen.clear()
    with masked(tiny_bert, plan, texts=batches, progress=lambda *at: seen.append(at)):
        assert seen == [(1, 3), (2, 3), (3, 3)]


def test_half_precision(make_bert: Callable[..., BertModel], batches: TokenBatches) -> None:
    model: Any = make_bert(initializer_range=0.1).bfloat16()
    small: Any = prune(model, make_plan(model, HALF), texts=batches)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert all(bool(torch.isfinite(p).all()) for p in small.parameters())
    dense = outputs(model, batches)
    plain = prune(model, make_plan(model, HALF), repair="mean", texts=batches)
    far, near = (
        sum(float((a.double() - b.double()).square().sum()) for a, b in zip(outputs(m, batches), dense, strict=True))
        for m in (plain, small)
    )
    assert near < far


class TestInputsThatSayLittle:
    def facts(self, model: Any, texts: Any, **how: Any) -> tuple[Any, dict[str, Any]]:
        small: Any = prune(model, make_plan(model, how.pop("kept", HALF)), texts=texts, **how)
        assert all(bool(torch.isfinite(p).all()) for p in small.parameters())
        for fit, (mean_error, error) in small.config.obce["least_squares"]["errors"].items():
            assert 0 <= error <= mean_error < float("inf"), fit
        return small, small.config.obce["least_squares"]

    def test_fewer_tokens_than_inputs(self, tiny_bert: BertModel, texts: list[str], tiny_tokenizer: Any) -> None:
        few = tokenize(texts[:1], tiny_tokenizer, max_length=8)
        assert few.n_tokens < INNER // 2
        small, facts = self.facts(tiny_bert, few)
        assert facts["tokens"] == few.n_tokens
        # as many unknowns as equations or more: the ridge alone stands between the fit and the texts
        assert facts["errors"]["0.intermediate"][1] < 0.05
        # with no ridge at all the matrix does not factor, and the ridge that does is told
        small, facts = self.facts(tiny_bert, few, ridge=0.0)
        assert facts["ridge"] == 0
        assert facts["raised_ridge"]
        assert all(0 < ridge <= 1 for ridge in facts["raised_ridge"].values())
        assert distance(outputs(small, few), outputs(tiny_bert, few)) < 1

    def test_texts_that_are_all_the_same(self, tiny_bert: BertModel, texts: list[str], tiny_tokenizer: Any) -> None:
        once, often = (tokenize(texts[3:4] * n, tiny_tokenizer, max_length=64, batch_size=7) for n in (1, 30))
        small, facts = self.facts(tiny_bert, often)
        assert facts["raised_ridge"] == {}
        same, _ = self.facts(tiny_bert, once)
        # moments are means over tokens: repeating the text changes nothing
        assert distance(outputs(small, once), outputs(same, once)) < 1e-2

    @pytest.mark.parametrize("constant", ["intermediate", "value"])
    def test_constant_inputs(self, constant: str, tiny_bert: BertModel, batches: TokenBatches) -> None:
        """Kept neurons that never vary predict nothing: what is left is the repair by constants."""
        with torch.no_grad():
            for layer in tiny_bert.encoder.layer:
                if constant == "intermediate":
                    layer.intermediate.dense.weight[::2] = 0
                else:
                    layer.attention.self.value.weight[list(first_of_each_head(4))] = 0
        kept = {name: HALF[name] for name in HALF if name.endswith(constant)}
        small, facts = self.facts(tiny_bert, batches, kept=kept)
        for name in kept:
            mean_error, error = facts["errors"][name]
            assert error == pytest.approx(mean_error, rel=1e-4)
        place = "output.dense.weight" if constant == "intermediate" else "attention.output.dense.weight"
        columns = list(kept[f"0.{constant}"])
        for number in range(3):
            name = f"encoder.layer.{number}.{place}"
            before, after = tiny_bert.state_dict()[name][:, columns], small.state_dict()[name]
            assert float((after - before).abs().max()) < 1e-3

    def test_constant_keys(self, tiny_bert: BertModel, batches: TokenBatches) -> None:
        with torch.no_grad():
            for layer in tiny_bert.encoder.layer:
                layer.attention.self.key.weight[list(first_of_each_head(4))] = 0
        kept = {name: HALF[name] for name in HALF if name.split(".")[1] in ("query", "key")}
        small, _ = self.facts(tiny_bert, batches, kept=kept)
        own = tiny_bert.encoder.layer[0].attention.self.query.weight[list(first_of_each_head(4))]
        assert torch.equal(small.encoder.layer[0].attention.self.query.weight, own)

    @pytest.mark.parametrize("ridge", [-1e-3, float("nan"), float("inf")])
    def test_ridges_that_are_none(self, ridge: float, tiny_bert: BertModel, batches: TokenBatches) -> None:
        with pytest.raises(ValueError, match=f"ridge is {ridge}, expected a finite share of 0 or more"):
            prune(tiny_bert, make_plan(tiny_bert, HALF), texts=batches, ridge=ridge)


class TestTexts:
    def test_of_many_some_are_drawn(
        self, tiny_bert: BertModel, texts: list[str], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given: list[Any] = []
        module = sys.modules[prune.__module__]
        monkeypatch.setattr(module, "REPAIR_TEXTS", 30)
        monkeypatch.setattr(module, "tokenize", lambda t, *a, **k: given.append(list(t)) or tokenize(t, *a, **k))
        plan = make_plan(tiny_bert, HALF)
        corpus = read_corpus(texts)
        pairs = Corpus(tuple(texts[:100]), "pairs", 0, 0, pairs=tuple(texts[100:]))
        for source in (texts, corpus, pairs):
            small: Any = prune(tiny_bert, plan, texts=source, tokenizer=tiny_tokenizer)
            drawn = given.pop()
            assert small.config.obce["least_squares"]["texts"] == len(drawn) == len(set(drawn)) == 30
            every: list[Any] = texts if source is texts else source.entries()  # type: ignore[union-attr]
            assert set(drawn) <= set(every)
            assert {every.index(text) >= len(every) // 2 for text in drawn} == {True, False}, "not the first ones"
        prune(tiny_bert, plan, texts=texts[:30], tokenizer=tiny_tokenizer)
        assert given.pop() == texts[:30]
        prune(tiny_bert, plan, texts=(text for text in texts[:30]), tokenizer=tiny_tokenizer)  # type: ignore[arg-type]
        assert given.pop() == texts[:30]
        batches = tokenize(texts[:50], tiny_tokenizer, max_length=16)
        whole: Any = prune(tiny_bert, plan, texts=batches)
        assert not given
        facts = whole.config.obce["least_squares"]
        assert (facts["texts"], facts["tokens"], facts["ridge"]) == (50, batches.n_tokens, RIDGE)

    def test_missing_texts(self, tiny_bert: BertModel) -> None:
        plan = make_plan(tiny_bert, HALF)
        sentence = r"repair='least_squares' reads texts, but texts is not given: give texts= \(and tokenizer=\), or use"
        with pytest.raises(ValueError, match=sentence):
            prune(tiny_bert, plan)
        with pytest.raises(ValueError, match=sentence), masked(tiny_bert, plan):
            pass
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_bert.modules())


def test_a_dropped_layer_is_made_up_for_where_it_can(tiny_bert: BertModel, batches: TokenBatches) -> None:
    """The readers of the next layer are also fitted to what the dropped one would have added to the stream."""
    plan = make_plan(tiny_bert, {}, (1,))
    dense = outputs(tiny_bert, batches)
    bare, small = prune(tiny_bert, plan, repair="none"), prune(tiny_bert, plan, texts=batches)
    far, near = (
        sum(float((a - b).square().sum()) for a, b in zip(outputs(m, batches), dense, strict=True))
        for m in (bare, small)
    )
    assert near < 0.8 * far


@pytest.mark.parametrize("width", [3, 512, 513, 1100])
def test_moments_of_many_inputs_are_those_of_all_at_once(width: int) -> None:
    """Whose products are made in blocks."""
    rng = np.random.default_rng(width)
    tokens = rng.standard_normal((900, width)) * rng.uniform(0.1, 10, width) + rng.uniform(-50, 50, width)
    for dtype, rel in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        moments = InputMoments()
        for part in np.split(tokens, [200, 201, 650]):
            moments.add(torch.from_numpy(part).to(dtype))
        spread = tokens.std(0)
        expected = np.cov(tokens.T, bias=True) / np.outer(spread, spread)
        np.testing.assert_allclose(moments.covariance().numpy() / np.outer(spread, spread), expected, atol=rel)
        np.testing.assert_allclose(moments.mean().numpy(), tokens.mean(0), rtol=rel)


def test_factors_are_those_of_the_inputs_in_order() -> None:
    rng = np.random.default_rng(0)
    inputs, keys = InputMoments(), KeyMoments(2)
    tokens = torch.from_numpy(rng.standard_normal((2, 50, 12)) @ rng.standard_normal((12, 12)))
    inputs.add(tokens.flatten(0, 1))
    keys.add(tokens, torch.ones(2, 50, dtype=torch.int64))
    order = torch.from_numpy(rng.permutation(12))
    found = inputs.factor(order, 0.1)
    assert found is not None
    covariance = inputs.covariance()[order][:, order]
    covariance += 0.1 * covariance.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(found[0] @ found[0].T, covariance)
    assert torch.equal(found[0], found[0].tril())
    own = torch.from_numpy(np.stack([rng.permutation(6), rng.permutation(6)]))
    centred = tokens - tokens.mean(1, keepdim=True)
    for head, factor in enumerate(keys.factors(own, 0.1)):
        mine = centred.flatten(0, 1)[:, 6 * head : 6 * head + 6][:, own[head]]
        covariance = mine.T @ mine / 100
        covariance += 0.1 * covariance.diagonal().mean() * torch.eye(6, dtype=torch.float64)
        torch.testing.assert_close(factor @ factor.T, covariance)


def test_inputs_that_do_not_vary_predict_nothing() -> None:
    inputs, keys = InputMoments(), KeyMoments(2)
    inputs.add(torch.full((30, 4), 7.0))
    assert inputs.factor(torch.arange(4), RIDGE) is None
    keys.add(torch.full((2, 15, 4), 7.0), torch.ones(2, 15, dtype=torch.int64))
    assert torch.equal(
        keys.factors(torch.arange(2).expand(2, 2), RIDGE), torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    )
