"""Decoders: texts are read at their last token, heads are shared, keys and values are kept for the next token."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import obce
import pytest
import torch
import transformers
from obce import device, export
from obce.capture import capture
from obce.cli import app
from obce.clouds import CLOUD_KINDS
from obce.configuration_obce import ObceLlamaConfig
from obce.corpus import tokenize
from obce.effects import effect_clouds, reading_of
from obce.evaluate import embed
from obce.glue import Examples, encode, logits
from obce.layernorm import layernorm_statistics, without_layernorm
from obce.plan import default_units, single_cuts
from obce.prune import masked, prune
from obce.removal import Pruned
from obce.repair import start
from obce.run import Run
from obce.scoring import Kept, merge
from obce.sensitivity import sensitivity
from obce.sites import LAYOUTS, find_sites, position_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from typer.testing import CliRunner

from tiny import HEAD_SIZE, HEADS, HIDDEN, INNER, KEY_VALUE_HEADS, PREFIXES, make_encoder, make_plan

if TYPE_CHECKING:
    from pathlib import Path

    from obce.corpus import TokenBatches
    from obce.sites import Site

DECODERS = [family for family in PREFIXES if LAYOUTS[family].causal]
LLAMAS = [family for family in DECODERS if LAYOUTS[family].whole]


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> Any:
    """Words, one token each: no [CLS], no padding token, as GPT-2's."""
    words = sorted({word for text in texts for word in text.replace(".", " .").split()})
    known = Tokenizer(WordLevel({"<unk>": 0, "<eos>": 1, **{word: i + 2 for i, word in enumerate(words)}}, "<unk>"))
    known.pre_tokenizer = Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "<eos>"}
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=known, model_max_length=64, **special)
    assert found.pad_token_id is None
    return found


@pytest.fixture(scope="module")
def batches(texts: list[str], tokenizer: Any) -> TokenBatches:
    """Nine texts of unlike length, four a batch."""
    found = tokenize(texts[:9], tokenizer, max_length=24, batch_size=4)
    assert any((batch.inputs["attention_mask"] == 0).any() for batch in found)
    return found


def value_cut(family: str, layer: int, per_head: int) -> dict[str, tuple[int, ...]]:
    size = HEAD_SIZE[family]
    return {f"{layer}.value": tuple(h * size + i for h in range(KEY_VALUE_HEADS[family]) for i in range(per_head))}


# ---- where texts are read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2", "qwen3"])
@pytest.mark.parametrize("position", ["cls", "last", "mean"])
def test_outputs_are_those_of_each_text_alone(
    family: str, position: str, texts: list[str], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without padding, from hooks of the test's own; in both memory modes, and where scoring stays on a device."""
    model = make_encoder(family)
    batches = tokenize(texts[:9], tokenizer, max_length=24, batch_size=4)
    sites = [site for site in find_sites(model) if site.layer == 1]
    expected = [alone(model, batches, text, sites, position) for text in range(9)]
    chosen = np.arange(9) % 2 == 0
    for resident in (set(), {"cpu"}):
        monkeypatch.setattr(device, "RESIDENT", resident)
        for settings in ({"memory": "model"}, {"memory": "layer"}, {"memory": "model", "tokens": False}):
            found = list(capture(model, batches, find_sites(model), position=position, chosen=chosen, **settings))[1]
            for kind, values in found.outputs.items():
                wanted = np.stack([each[kind] for each in expected], axis=1)
                np.testing.assert_allclose(values, wanted, rtol=0, atol=2e-5, err_msg=kind)
            assert set(found.clouds) == set(CLOUD_KINDS)
            for kind in ("context", "hidden"):
                wanted = np.stack([each[kind] for each, some in zip(expected, chosen, strict=True) if some])
                np.testing.assert_allclose(found.clouds[kind], wanted, rtol=0, atol=2e-5, err_msg=kind)


@torch.no_grad()
def alone(model: Any, batches: TokenBatches, text: int, sites: list[Site], position: str) -> dict[str, np.ndarray]:
    batch = next(one for one in batches if text in one.indices)
    row = int(np.flatnonzero(batch.indices == text)[0])
    ids = batch.inputs["input_ids"][row : row + 1, : int(batch.inputs["attention_mask"][row].sum())]
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for site in sites:

        def written(_m: Any, _a: Any, out: torch.Tensor, site: Site = site) -> None:
            seen[site.kind] = out[0][:, site.columns]

        def read(_m: Any, args: Any, name: str = "context" if site.kind == "value" else site.kind) -> None:
            seen[name] = args[0][0]

        if not site.gated:
            handles.append(model.get_submodule(site.writer).register_forward_hook(written))
        if site.kind == "value" or site.gated:
            handles.append(model.get_submodule(str(site.reader)).register_forward_pre_hook(read))
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    layers = model.get_submodule(LAYOUTS[model.config.model_type].stack)
    if len(layers) > 2:
        seen["hidden"] = hidden[2][0]
    else:  # the last of the hidden states is behind the last norm
        handle = layers[1].register_forward_hook(
            lambda _m, _a, out: seen.update(hidden=(out[0] if isinstance(out, tuple) else out)[0])
        )
        model(input_ids=ids)
        handle.remove()
    pick = {"cls": lambda x: x[0], "last": lambda x: x[-1], "mean": lambda x: x.mean(0)}[position]
    return {name: pick(tensor).numpy() for name, tensor in seen.items()}


def test_the_place_is_the_familys_unless_it_is_named(texts: list[str], tokenizer: Any) -> None:
    assert [position_of(make_encoder(family)) for family in ("bert", "gpt2", "llama")] == ["cls", "last", "last"]
    with pytest.raises(ValueError, match="position is 'first', expected 'auto' or one of 'cls', 'last', 'mean'"):
        obce.score(make_encoder("gpt2"), tokenizer, texts[:40], position="first")
    model = make_encoder("gpt2")
    found = {place: obce.score(model, tokenizer, texts[:60], position=place) for place in ("auto", "cls", "last")}
    assert [one.meta["position"] for one in found.values()] == ["last", "cls", "last"]
    assert np.array_equal(found["auto"].column("std"), found["last"].column("std"), equal_nan=True)
    # the first token of a decoder sees no other: what it says hangs on which token it is, and on nothing else
    assert not np.array_equal(found["cls"].column("std"), found["last"].column("std"), equal_nan=True)


def test_a_text_with_more_behind_it_says_the_same_at_its_last_token(texts: list[str], tokenizer: Any) -> None:
    """Whatever fills the places behind it: id 0, or another token."""
    model = make_encoder("llama")
    batches = tokenize(texts[:9], tokenizer, max_length=24, batch_size=4)
    other = copy.copy(batches)
    other._pad_id = 7
    pair = [[layer.values for layer in capture(model, one, find_sites(model))] for one in (batches, other)]
    for mine, theirs in zip(*pair, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_models_keep_no_keys_while_they_are_scored(texts: list[str], tokenizer: Any) -> None:
    model = make_encoder("gpt2", "CausalLM")
    assert model.config.use_cache
    obce.score(model, tokenizer, texts[:40])
    assert model.config.use_cache


# ---- effects -------------------------------------------------------------------------------------------------------


def test_what_is_read_of_a_decoder() -> None:
    heads = {"": "last", "CausalLM": "tokens", "SequenceClassification": "head", "TokenClassification": "tokens"}
    for family in DECODERS:
        assert {head: reading_of(make_encoder(family, head)) for head in heads} == heads


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@pytest.mark.parametrize(("head", "read"), [("", "last"), ("SequenceClassification", "head")])
def test_effects_are_those_of_small_steps(family: str, head: str, read: str, batches: TokenBatches) -> None:
    """Towards the neuron's mean, at every token and in every head that shares it at once."""
    model = make_encoder(family, head, pad_token_id=None).double()
    body = model.base_model
    sites = {site.name: site for site in find_sites(model)}
    means = {
        f"{layer.layer}.{kind}": sums.sums / sums.count
        for layer in capture(model, batches, list(sites.values()))
        for kind, sums in layer.tokens.items()
    }
    clouds = effect_clouds(model, batches, list(sites.values()), means)
    for name in ("0.query", "0.key", "0.value", "1.value", "1.intermediate", "0.output"):
        site = sites[name]
        for batch in batches:
            drawn = [np.random.default_rng([0, i]).standard_normal(HIDDEN, np.float32) for i in batch.indices.tolist()]
            step = [stepped(body, batch, site, 5, float(means[name][5]), by) for by in (0.01, -0.01)]
            expected = ((step[0] - step[1]) * torch.from_numpy(np.stack(drawn)).double()).sum(1) / 0.02
            found = torch.from_numpy(clouds[name][5][batch.indices])
            limit = 0.02 * float(expected.abs().max()) + 2e-5  # norms see their tokens in float32
            assert float((found - expected).abs().max()) < limit, (name, read)


@torch.no_grad()
def stepped(body: Any, batch: Any, site: Site, neuron: int, mean: float, by: float) -> torch.Tensor:
    """Last hidden states at the last tokens with a neuron that much further from its mean."""

    def moved(activation: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        other = activation.clone()
        other[..., at] += by * (activation[..., at] - mean)
        return other

    one = torch.tensor([neuron])
    if site.reader:
        reader = body.get_submodule(site.reader)
        handle = reader.register_forward_pre_hook(lambda _m, args: (moved(args[0], site.read_by(one)),))
    else:
        writer = body.get_submodule(site.writer)
        handle = writer.register_forward_hook(lambda _m, _a, output: moved(output, site.rows(one)))
    with handle:
        hidden = body(**batch.inputs).last_hidden_state
    return hidden[torch.arange(len(hidden)), batch.inputs["attention_mask"].sum(1) - 1]


@pytest.mark.parametrize("family", DECODERS)
def test_a_classifier_is_read_where_it_pools(family: str, batches: TokenBatches) -> None:
    """Its own logits are what its Linear makes of what is read, also where a text ends with what pads."""
    from obce.effects import what_is_read

    model = make_encoder(family, "SequenceClassification", pad_token_id=1)
    for batch in batches:
        inputs = {name: tensor.clone() for name, tensor in batch.inputs.items()}
        ends = inputs["attention_mask"].sum(1) - 1
        inputs["input_ids"][0, ends[0]] = 1
        inputs["input_ids"][inputs["attention_mask"] == 0] = 9  # a tokenizer that pads with another token
        padded = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 1)
        with torch.no_grad():
            expected = model(input_ids=padded, attention_mask=inputs["attention_mask"]).logits
            assert torch.equal(
                model.score(what_is_read(model, inputs, batch, "head")), what_is_read(model, inputs, batch, "logits")
            )
            torch.testing.assert_close(what_is_read(model, inputs, batch, "logits"), expected)


def test_labels_and_exports_want_a_padding_token(texts: list[str], tokenizer: Any, tmp_path: Path) -> None:
    model = make_encoder("gpt2", "SequenceClassification", pad_token_id=None)
    with pytest.raises(ValueError, match=r"model is a GPT2ForSequenceClassification without config.pad_token_id"):
        obce.score(model, tokenizer, texts[:40], labels=np.arange(40) % 2)
    small = prune(model, make_plan(model, {"0.intermediate": (0, 1)}), repair="none")
    for way in (export.onnx, export.dense):
        with pytest.raises(ValueError, match=r"model is a ObceGPT2ForSequenceClassification without config.pad_token"):
            way(small, tmp_path)
    model.config.pad_token_id = 1
    scores = obce.score(model, tokenizer, texts[:40], labels=np.arange(40) % 2)
    assert np.isfinite(scores.column("taylor")).all()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logits_do_not_hang_on_the_tokenizers_padding(family: str, texts: list[str], tokenizer: Any) -> None:
    """The config's token tells where a text ends, whatever the tokenizer pads with."""
    model = make_encoder(family, "SequenceClassification", pad_token_id=1)
    padding = copy.deepcopy(tokenizer)
    padding.pad_token = "<unk>"  # noqa: S105  (a token of text)
    rows = encode(Examples(texts[:9], None, np.zeros(9, np.int64)), padding, max_length=24)
    found = logits(model, rows, batch_tokens=60)
    for text, row in zip(texts[:9], found, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=24)).logits[0]
        torch.testing.assert_close(torch.from_numpy(row), expected, rtol=0, atol=1e-5)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match=r"ForSequenceClassification without config.pad_token_id, by which it finds"):
        logits(model, rows)


def test_rms_norms_are_studied_as_layernorms(batches: TokenBatches) -> None:
    model = make_encoder("llama")
    seen: list[torch.Tensor] = []
    handle = model.layers[1].input_layernorm.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch.inputs)
    handle.remove()
    real = [one[batch.inputs["attention_mask"].bool()] for one, batch in zip(seen, batches, strict=True)]
    tokens = torch.cat(real).double()
    size = (tokens.square().mean(1) + model.config.rms_norm_eps).sqrt().mean()
    found = layernorm_statistics(model, batches)
    assert found["0.output"] == pytest.approx((0.0, float(size)), rel=1e-6)
    inputs = next(iter(batches)).inputs
    with torch.no_grad(), without_layernorm(model, "1.output", "frozen", found):
        hidden = model(**inputs, output_hidden_states=True)
    before: list[torch.Tensor] = []
    with torch.no_grad(), model.norm.register_forward_pre_hook(lambda _m, args: before.append(args[0])):
        model(**inputs)
    expected = model.norm.weight * before[0] / found["1.output"][1]
    torch.testing.assert_close(hidden.last_hidden_state, expected)


# ---- cut -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LLAMAS)
def test_query_key_and_heads_stay(family: str, texts: list[str], tokenizer: Any) -> None:
    model = make_encoder(family)
    scores = obce.score(model, tokenizer, texts[:40])
    assert default_units(scores.meta["architecture"]) == ("value", "intermediate")
    assert obce.plan(scores, model, keep=0.8, of="encoder").units == ("value", "intermediate")
    for unit in ("query_key", "heads"):
        with pytest.raises(ValueError, match=f"units holds {unit}, but obce leaves query, key and heads of a {family}"):
            obce.plan(scores, model, keep=0.8, units=(unit, "intermediate"))
    for kept in ({"0.query": (0, 1)}, {"0.key": (0,)}):
        with pytest.raises(ValueError, match=r"plan.kept\['0.\w+'\] keeps . neurons of .*expected all: obce does not"):
            prune(model, make_plan(model, kept), repair="none")
    with pytest.raises(
        ValueError, match=r"keeps \[2, 0\] neurons in the heads of its layer, expected the same .* each"
    ):
        prune(model, make_plan(model, {"0.value": (0, 1)}), repair="none")


def test_what_is_refused() -> None:
    for family, settings, words in (
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "expected False: its attention scales by a layer's number"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "expected False: its attention is computed in another way"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True, expected False: obce does not cut"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True, expected False: obce does not cut layers"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True, expected False: obce does not cut layers"),
    ):
        with pytest.raises(ValueError, match=words):
            find_sites(make_encoder(family, **settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor of num_attention_heads = 4"),
        ({"num_key_value_heads": -2}, "num_key_value_heads is -2, expected a size above 0 and at most 4 heads"),
        ({"head_dim": -8}, "head_dim is -8 and"),
        ({"kept_heads": 2}, "kept_heads of layer 0 is 2, expected a multiple of 1 from 4 to 4"),
        ({"kept_query_key_size": 16}, "kept_query_key_size of layer 0 is 16, expected a multiple of 32 from 32 to 32"),
        ({"kept_value_size": 5}, "kept_value_size of layer 0 is 5, expected a multiple of 2 from 2 to 16"),
        ({"kept_value_size": 0}, "kept_value_size of layer 0 is 0, expected a multiple of 2 from 2 to 16"),
    ],
)
def test_configs_of_pruned_llamas_are_checked(settings: dict[str, Any], words: str) -> None:
    model = make_encoder("llama")
    stated = prune(model, make_plan(model, value_cut("llama", 0, 3)), repair="none").config.to_dict()
    stated["per_layer_config"] = {int(layer): dict(entry) for layer, entry in stated["per_layer_config"].items()}
    for name, value in settings.items():
        (stated["per_layer_config"][0] if name.startswith("kept") else stated)[name] = value
    with pytest.raises(ValueError, match=words):
        ObceLlamaConfig(**stated)


@pytest.mark.parametrize("settings", [{"n_inner": None}, {"scale_attn_weights": False}], ids=str)
def test_gpt2_by_its_own_settings(settings: dict[str, Any], batches: TokenBatches) -> None:
    model = make_encoder("gpt2", **settings)
    plan = make_plan(model, {"0.intermediate": range(20), "1.query": (0, 9, 17, 25), "1.key": (0, 9, 17, 25)})
    small = prune(model, plan, texts=batches)
    inputs = next(iter(batches)).inputs
    with torch.no_grad(), masked(model, plan, texts=batches):
        expected = model(**inputs).last_hidden_state
        torch.testing.assert_close(small(**inputs).last_hidden_state, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_a_llama_of_single_heads_tied_or_biased(
    settings: dict[str, Any], texts: list[str], tokenizer: Any, batches: TokenBatches
) -> None:
    model = make_encoder("llama", "CausalLM", num_key_value_heads=HEADS, head_dim=6, **settings)
    scores = obce.score(model, tokenizer, texts[:60])
    plan = obce.plan(scores, model, keep=0.7, of="encoder")
    small: Any = prune(model, plan, repair="mean", scores=scores)
    assert sum(p.numel() for p in small.parameters()) == plan.after.parameters
    tied = small.lm_head.weight is small.model.embed_tokens.weight
    assert tied == settings.get("tie_word_embeddings", False)
    inputs = next(iter(batches)).inputs
    with torch.no_grad(), masked(model, plan, repair="mean", scores=scores):
        expected = model.model(**inputs).last_hidden_state
        torch.testing.assert_close(small.model(**inputs).last_hidden_state, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_generated_tokens_are_those_of_the_masked_model(family: str, batches: TokenBatches, tmp_path: Path) -> None:
    """With and without keys and values kept, also where the first layer has lost all of its heads."""
    model = make_encoder(family, "CausalLM", eos_token_id=255)
    kept = {"0.intermediate": range(0, INNER, 2), "1.output": range(5, HIDDEN), **value_cut(family, 1, 5)}
    if not LAYOUTS[family].whole:
        kept |= {f"0.{kind}": () for kind in ("query", "key", "value")}
    plan = make_plan(model, kept)
    small = prune(model, plan, texts=batches)
    model.generation_config.max_new_tokens = 12
    small.save_pretrained(tmp_path)
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[9, 30, 17, 88, 41], [2, 6, 40, 40, 13]])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    with masked(model, plan, texts=batches):
        expected = model.generate(ids, use_cache=False, **settings)
        assert torch.equal(model.generate(ids, use_cache=True, **settings), expected)
    assert expected.shape == (2, 17)
    for cached in (True, False):
        assert torch.equal(small.generate(ids, use_cache=cached, **settings), expected)
    assert not torch.equal(model.generate(ids, **settings), expected)


def test_least_squares_wants_a_mask_that_is_causal(batches: TokenBatches, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_encoder("llama")
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match=r"expected 'sdpa' or 'eager' for least squares: its tokens look at those bef"):
        start(model, batches)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_measured_shares_read_the_last_token(
    family: str, texts: list[str], tokenizer: Any, batches: TokenBatches
) -> None:
    model = make_encoder(family)
    scores = obce.score(model, tokenizer, texts[:40])
    curves = sensitivity(model, scores, batches, batches, how="measured", levels=(0.5,))
    units = default_units(scores.meta["architecture"])
    assert set(curves) == {f"{layer}.{unit}" for layer in range(2) for unit in units}
    ((_, cut),) = single_cuts(scores, "effect", 1, "value", (0.5,))
    small = prune(model, make_plan(model, {"1.value": cut.kept["1.value"]}), texts=batches)
    vectors = [embed(one, batches, pooling="last").astype(np.float64) for one in (model, small)]
    lost = np.square(vectors[1] - vectors[0]).sum() / np.square(vectors[0] - vectors[0].mean(0)).sum()
    assert curves["1.value"][1][1] == pytest.approx(lost, rel=1e-3)
    with pytest.raises(ValueError, match="units holds heads, but obce leaves") if family == "qwen3" else nullcontext():
        sensitivity(model, scores, batches, batches, units=("heads",), levels=(0.5,))


@pytest.mark.parametrize("family", DECODERS)
def test_what_stands_in_for_a_neuron(family: str, batches: TokenBatches) -> None:
    model = make_encoder(family)
    plan = make_plan(model, {"0.intermediate": range(0, INNER, 2), **value_cut(family, 1, 3)})
    small = prune(model, plan, texts=batches)
    pruned = Pruned(model, small, plan)
    sites = {site.name: site for site in find_sites(model)}
    value = sites["1.value"]
    found = pruned.replacement(value, 4, np.ones(value.width), 0.0)
    assert found is not None
    (shares,) = [[one.share for one in found.carriers]]
    # the columns of the reader, before and after, by hand
    layout = LAYOUTS[family]
    readers = [one.get_submodule(f"{layout.stack}.1.{layout.writers['attention_output']}") for one in (model, small)]
    before, after = (one.weight.T if family == "gpt2" else one.weight for one in readers)
    size, groups = HEAD_SIZE[family], HEADS // KEY_VALUE_HEADS[family]
    own = torch.stack([before[:, g * size + 4] for g in range(groups)])
    expected = []
    for i, neuron in enumerate(plan.kept["1.value"]):
        head, inside = divmod(neuron, size)
        change = [
            after[:, (head * groups + g) * 3 + i % 3] - before[:, (head * groups + g) * size + inside]
            for g in range(groups)
        ]
        expected.append(float((torch.stack(change) * own).double().sum() / own.double().square().sum()))
    assert sorted(map(abs, shares), reverse=True) == pytest.approx(
        sorted(map(abs, expected), reverse=True)[:5], rel=1e-4
    )
    with torch.no_grad():
        small.get_submodule(f"{layout.stack}.0.{layout.linears('intermediate')[-1]}").weight[0, 0] += 1
    with pytest.raises(ValueError, match="is not what this plan cuts out of the scored model"):
        Pruned(model, small, plan)


# ---- ways to load --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("head", ["CausalLM", "TokenClassification"])
@pytest.mark.parametrize("planned", [True, False])
def test_dense_again(family: str, head: str, planned: bool) -> None:
    model = make_encoder(family, head)
    plan = make_plan(model, {"0.intermediate": range(0, INNER, 2), "1.output": range(9), **value_cut(family, 1, 5)})
    filled = export.to_dense(prune(model, plan, repair="none"), plan if planned else None)
    # a Qwen2 has no room for biases, and a Llama with biases is one
    assert type(filled).__name__ == type(model).__name__.replace("Qwen2", "Llama")
    with torch.no_grad(), masked(model, plan, repair="none"):
        inputs = export.example(model, 3, 17, ("input_ids", "attention_mask"))
        torch.testing.assert_close(filled(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)


# ---- the whole way -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_run_from_the_command_line(family: str, texts: list[str], tokenizer: Any, tmp_path: Path) -> None:
    """A language model whose tokenizer has neither [CLS] nor padding: scored, cut, explained, reported, measured."""

    def said(*arguments: object, code: int = 0) -> Any:
        found = CliRunner().invoke(app, [str(one) for one in arguments])
        assert found.exit_code == code, found.output
        return found

    model = make_encoder(family, "CausalLM", pad_token_id=None, eos_token_id=1)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "texts.txt").write_text("\n".join(texts[:120]), encoding="utf-8")
    given = (tmp_path / "dense", tmp_path / "texts.txt")
    out = tmp_path / "run"
    facts = json.loads(said("run", *given, "--out", out, "--keep", 0.7, "--of", "encoder", "--json").stdout)
    run = Run.existing(out)
    scores, plan = run.scores(), run.plan()
    assert (scores.meta["position"], scores.meta["read"]) == ("last", "tokens")
    small: Any = transformers.AutoModelForCausalLM.from_pretrained(run.model_path)
    assert sum(p.numel() for p in small.parameters()) == plan.after.parameters == facts["after"]["parameters"]
    assert "the last token" in said("report", out).stdout
    said("explain", out, "--neuron", "0.intermediate.3", "--head", "1.context.3", "--head", "0.key.1")
    # the same scoring goes on, another place is another scoring
    assert "already scored" in said("score", *given, "--out", out).stdout
    refused = said("score", *given, "--out", out, "--position", "mean", code=2)
    assert (
        "holds scores of another token that texts are read at (last, now mean): choose another --out" in refused.stderr
    )
    said("score", *given, "--out", tmp_path / "mean", "--position", "mean", "--effect-texts", 0)
    assert Run.existing(tmp_path / "mean").scores().meta["position"] == "mean"


def test_a_run_from_before_there_were_places_is_one_of_cls(
    tiny_bert_dir: Path, texts: list[str], tmp_path: Path
) -> None:
    corpus, run = obce.read_corpus(texts[:40]), Run(tmp_path / "run")
    asked: dict[str, Any] = {"effect_texts": 0, "cloud_texts": 0}
    run.score(str(tiny_bert_dir), corpus, **asked)
    stated = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stated["score"].pop("position") == "cls"
    (tmp_path / "run" / "run.json").write_text(json.dumps(stated))
    assert Run(tmp_path / "run").score(str(tiny_bert_dir), corpus, **asked)[1]
    with pytest.raises(ValueError, match=r"another token that texts are read at \(cls, now last\)"):
        Run(tmp_path / "run").score(str(tiny_bert_dir), corpus, position="last", **asked)


def test_a_cloud_of_a_shared_key_is_that_of_the_table(texts: list[str], tokenizer: Any, tmp_path: Path) -> None:
    make_encoder("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run = Run(tmp_path / "run")
    scores, _ = run.score(str(tmp_path / "model"), obce.read_corpus(texts[:40]), keep_sketch=True, effect_texts=0)
    clouds = scores.clouds
    assert clouds is not None
    for kind, head in (("key", 1), ("value", 0), ("query", 3), ("hidden", -1)):
        found = run.cloud(f"1.{kind}" + (f".{head}" if head >= 0 else ""))
        assert float(found.r_f[0]) == clouds.columns["rf"][clouds.row(1, kind, head)]
    with pytest.raises(ValueError, match=r"cloud is '1.key.2', but layer 1 has 2 heads of key: name one from 0 on"):
        run.cloud("1.key.2")


def test_joined_scorings_know_which_heads_share_a_key(texts: list[str], tokenizer: Any) -> None:
    model = make_encoder("qwen2")
    kept: list[Kept] = []
    for part in (texts[:60], texts[60:100]):
        obce.score(model, tokenizer, part, on_kept=kept.append, cloud_texts=0)
    whole = obce.score(model, tokenizer, texts[:100], cloud_texts=0)
    np.testing.assert_allclose(merge(kept).column("spread"), whole.column("spread"), rtol=1e-9)
