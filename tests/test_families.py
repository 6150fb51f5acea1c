"""Every family goes the whole way: sites, scores, plan, cut, repair, file and back, with all its heads."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import obce
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from obce import modeling_obce
from obce.capture import capture
from obce.corpus import tokenize
from obce.effects import effect_clouds
from obce.evaluate import count_parameters, embed, flops, site_parameters, weight_bytes
from obce.finetune import with_head
from obce.glue import TASKS
from obce.layernorm import layernorms
from obce.plan import single_cuts
from obce.prune import masked, prune
from obce.repair import start
from obce.run import load_model
from obce.sensitivity import sensitivity
from obce.sites import LAYOUTS, SITE_KINDS, find_sites, matrix, model_hash, usable_max_length
from scipy.stats import spearmanr

from tiny import (
    DEPTH,
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    INNER,
    KEY_VALUE_HEADS,
    PREFIXES,
    class_name,
    classifier_of,
    make_encoder,
    make_pictures,
    make_plan,
    processed,
)

if TYPE_CHECKING:
    from obce.plan import Plan
    from transformers import PreTrainedModel

COMMON = ["MaskedLM", "SequenceClassification", "MultipleChoice", "TokenClassification", "QuestionAnswering"]
HEADS_OF = dict.fromkeys(PREFIXES, COMMON)
HEADS_OF["bert"] = [*COMMON, "PreTraining", "NextSentencePrediction"]
HEADS_OF["electra"] = [*COMMON, "PreTraining"]
DECODERS = [family for family in PREFIXES if LAYOUTS[family].causal]
for decoder in DECODERS:
    HEADS_OF[decoder] = ["CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"]
HEADS_OF["vit"] = ["ImageClassification", "MaskedImageModeling"]
EVERY = [(family, head) for family in PREFIXES for head in ("", *HEADS_OF[family])]
EAGER = ("deberta-v2", "mpnet")  # transformers has no other attention for these
SHARED_BIASES = "all layers of an MPNet share the position biases of its heads"


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 200, (3, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 7:] = mask[2, 4:] = 0
    pixels = torch.from_numpy(processed(make_pictures(3, seed=9)))
    return {"input_ids": ids * mask, "attention_mask": mask, "pixel_values": pixels}


def taken(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the texts and pictures, what the model reads."""
    pictures = model.main_input_name == "pixel_values"
    return {name: tensor for name, tensor in inputs.items() if (name == "pixel_values") == pictures}


@torch.no_grad()
def answers(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model says, of the real tokens, in one row."""
    inputs = taken(model, inputs)
    if "pixel_values" in inputs:
        return torch.cat([one.flatten().double() for one in model(**inputs).to_tuple()])
    if type(model).__name__.endswith("MultipleChoice"):
        inputs = {name: tensor[:, None].repeat(1, 2, 1) for name, tensor in inputs.items()}
    real = inputs["attention_mask"].bool()
    found = [one for one in model(**inputs).to_tuple() if isinstance(one, torch.Tensor)]
    rows = [one[real] if one.shape[: real.ndim] == real.shape else one for one in found]
    return torch.cat([one.flatten().double() for one in rows])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def given_to(family: str, tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """Tokenizer, or image processor, and texts, or as many pictures, as `obce.score` takes them."""
    if LAYOUTS[family].pictures:
        return {"tokenizer": None, "texts": obce.read_pictures(processed(make_pictures(len(texts))))}
    return {"tokenizer": tokenizer, "texts": obce.read_corpus(texts)}


@pytest.mark.parametrize("family", PREFIXES)
def test_sites(family: str) -> None:
    model = make_encoder(family, classifier_of(family))
    sites = find_sites(model)
    assert [site.name for site in sites] == [f"{layer}.{kind}" for layer in range(DEPTH[family]) for kind in SITE_KINDS]
    body = model.base_model
    rows: dict[str, int] = {}
    heads = {"query": HEADS, "key": KEY_VALUE_HEADS[family], "value": KEY_VALUE_HEADS[family]}
    for site in sites:
        per_head = heads.get(site.kind, 0) * HEAD_SIZE[family]
        assert site.width == (INNER if "interm" in site.name else per_head or HIDDEN)
        assert site.heads == heads.get(site.kind, 1)
        assert site.starts[0] == rows.get(site.writer, 0)
        for writer in site.writers:
            rows[writer] = site.starts[-1] + site.width
        if site.reader is not None:
            assert matrix(body.get_submodule(site.reader)).shape[1] == site.width * site.groups == len(site.sources())
    assert rows == {name: len(matrix(body.get_submodule(name))) for name in rows}
    assert model_hash(model) == model_hash(body)
    with torch.no_grad():
        body.get_submodule(sites[2].writer).weight[0, 0] += 1
    assert model_hash(model) != model_hash(make_encoder(family, classifier_of(family)))
    assert len(layernorms(model)) == 1 + 2 * DEPTH[family]


def test_positions_kept_for_padding_take_no_text(tokenizer: Any) -> None:
    assert usable_max_length(make_encoder("bert"), tokenizer) == 64  # the tokenizer's own
    with pytest.raises(ValueError, match="the model has 69 positions"):
        usable_max_length(make_encoder("roberta"), tokenizer, 70)
    assert usable_max_length(make_encoder("roberta", pad_token_id=1), tokenizer, 68) == 68
    model = make_encoder("roberta", pad_token_id=1)
    model(input_ids=torch.full((1, 68), 5), attention_mask=torch.ones(1, 68, dtype=torch.int64))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 69), 5), attention_mask=torch.ones(1, 69, dtype=torch.int64))


@pytest.mark.parametrize("family", PREFIXES)
@pytest.mark.parametrize("memory", ["model", "layer"])
def test_scored_planned_and_cut(
    family: str, memory: Any, tokenizer: Any, texts: list[str], inputs: dict[str, torch.Tensor]
) -> None:
    """Predicted sizes are exact, least squares is no worse than the mean, and the masked model is the cut one."""
    model = make_encoder(family, classifier_of(family)).double()
    labels = np.arange(len(texts)) % 2
    given = given_to(family, tokenizer, texts)
    scores = obce.score(model, **given, memory=memory, labels=labels, cloud_texts=40)
    assert {"rf", "std", "effect", "effect_abs", "spread", "magnitude", "taylor", "random"} <= set(scores.names())
    assert scores.meta["read"] == "head"
    assert np.isfinite(scores.column("effect")).all()
    units = ("query_key", "value", "intermediate") if memory == "model" or family == "mpnet" else ("heads", "output")
    if LAYOUTS[family].whole:
        units = ("value", "intermediate") if memory == "model" else ("value", "intermediate", "output")
    plan = obce.plan(scores, model, keep=0.6, of="encoder", units=units)
    length = usable_max_length(model, tokenizer)
    batches = tokenize(**given, max_length=length)
    before = answers(model, inputs)
    for repair in ("none", "mean", "least_squares"):
        how: dict[str, Any] = {"scores": scores} if repair == "mean" else {}
        if repair == "least_squares":
            how = {"texts": batches}
        small = prune(model, plan, repair=repair, **how)
        assert type(small).__name__ == f"Obce{type(model).__name__}"
        assert count_parameters(small) == (plan.after.parameters, plan.after.encoder)
        assert weight_bytes(small) == plan.after.bytes
        assert flops(small, length=length) == flops_at(plan, small, length)
        with masked(model, plan, repair=repair, **how):
            # positions turn query and key, or norms see their tokens, in float32
            limit = 1e-5 if LAYOUTS[family].rotary or LAYOUTS[family].whole else 1e-8
            assert distance(answers(small, inputs), answers(model, inputs)) < limit
        assert distance(answers(small, inputs), before) > 1e-3
    assert torch.equal(answers(model, inputs), before)
    errors = small.config.obce["least_squares"]["errors"]
    assert len(errors) == 2 * DEPTH[family]
    assert all(fitted <= mean for mean, fitted in errors.values())


def flops_at(plan: Plan, small: Any, length: int) -> int:
    from obce.plan import Widths
    from obce.plan import flops as predicted

    kept = [
        Widths(w.query_key, w.value, w.intermediate, w.attention_output, w.output) for w in small.config.layer_widths()
    ]
    return predicted(plan.architecture, dict(enumerate(kept)), length)


@pytest.mark.parametrize(("family", "head"), EVERY)
def test_every_head_is_cut_saved_and_loaded(
    family: str, head: str, inputs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    model = make_encoder(family, head)
    kept: dict[str, tuple[int, ...]] = {"0.intermediate": tuple(range(0, INNER, 3)), "1.output": (0, 5, 31)}
    pairs = (0, 4, 9, 13, 17, 21, 26, 30) if LAYOUTS[family].rotary else (0, 9, 17, 25)
    if not LAYOUTS[family].whole:
        kept |= {"0.query": pairs, "0.key": pairs}
    size = HEAD_SIZE[family]
    kept["1.value"] = tuple(h * size + i for h in range(KEY_VALUE_HEADS[family]) for i in (h % 2, size - 1))
    plan = make_plan(model, kept)
    small = prune(model, plan, repair="none")
    with masked(model, plan, repair="none"):
        expected = answers(model, inputs)
    found = answers(small, inputs)
    assert distance(found, expected) < 1e-5
    assert distance(found, answers(model, inputs)) > 1e-3
    small.save_pretrained(tmp_path)
    auto = {"": "AutoModel", "PreTraining": "AutoModelForPreTraining"}.get(head, f"AutoModelFor{head}")
    loaded = getattr(transformers, auto).from_pretrained(tmp_path).eval()
    assert type(loaded) is type(small)
    assert torch.equal(answers(loaded, inputs), found)
    again = load_model(tmp_path, pruned=True)
    assert type(again) is type(small)
    assert torch.equal(answers(again, inputs), found)
    if "MaskedLM" in head or (head, family) == ("CausalLM", "gpt2"):
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("family", PREFIXES)
def test_hidden_states_and_gradients(family: str, inputs: dict[str, torch.Tensor]) -> None:
    small: Any = prune(
        make_encoder(family), make_plan(make_encoder(family), {"0.intermediate": (1, 2, 3)}), repair="none"
    )
    small.set_attn_implementation("eager")
    inputs = taken(small, inputs)
    told = small(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(told.hidden_states) == DEPTH[family] + 1
    tokens = 5 if LAYOUTS[family].pictures else 11
    assert [tuple(one.shape) for one in told.attentions] == [(3, HEADS, tokens, tokens)] * DEPTH[family]
    small.train()
    small(**inputs).last_hidden_state.sum().backward()
    layout = LAYOUTS[family]
    inner = small.get_submodule(f"{layout.stack}.0.{layout.writers['intermediate']}")
    assert matrix(inner).shape == (3 * len(layout.blocks_of("intermediate")), HIDDEN)
    assert inner.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", [family for family in PREFIXES if not LAYOUTS[family].pictures])
def test_a_head_for_a_task(family: str) -> None:
    dense = make_encoder(family)
    small = prune(dense, make_plan(dense, {"1.intermediate": (0, 4)}), repair="none")
    one, two, other = (with_head(model, TASKS["SST-2"], seed) for model, seed in ((dense, 1), (small, 1), (small, 2)))
    assert type(one).__name__ == f"{PREFIXES[family]}ForSequenceClassification"
    assert type(two).__name__ == f"Obce{PREFIXES[family]}ForSequenceClassification"
    of_head = [name for name, _ in one.named_parameters() if not name.startswith(f"{one.base_model_prefix}.")]
    assert of_head
    heads = [dict(model.named_parameters()) for model in (one, two, other)]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in of_head)
    assert not all(torch.equal(heads[1][name], heads[2][name]) for name in of_head)
    assert model_hash(one) == model_hash(dense)


@pytest.mark.parametrize("family", PREFIXES)
def test_layers_are_dropped(family: str, inputs: dict[str, torch.Tensor]) -> None:
    model = make_encoder(family, HEADS_OF[family][-1] if LAYOUTS[family].pictures else "TokenClassification")
    plan = make_plan(model, {"1.intermediate": (3, 4, 5)}, dropped=(0,))
    small: Any = prune(model, plan, repair="none")
    assert small.config.num_hidden_layers == DEPTH[family] - 1
    with masked(model, plan, repair="none"):
        assert distance(answers(small, inputs), answers(model, inputs)) < 1e-5


def test_heads_of_mpnet_stay(tokenizer: Any, texts: list[str]) -> None:
    model = make_encoder("mpnet")
    with pytest.raises(ValueError, match=SHARED_BIASES):
        obce.plan(obce.score(model, tokenizer, texts[:30]), model, keep=0.8, units=("heads",))
    gone: dict[str, tuple[int, ...]] = {f"0.{kind}": tuple(range(16)) for kind in ("query", "key", "value")}
    with pytest.raises(ValueError, match=SHARED_BIASES):
        prune(model, make_plan(model, gone), repair="none")


@pytest.fixture(scope="module")
def modern(tokenizer: Any, texts: list[str]) -> tuple[Any, obce.Scores, Any]:
    """A ModernBERT in double precision, its scores, and ten texts."""
    model = make_encoder("modernbert").double()
    return model, obce.score(model, tokenizer, texts[:80]), tokenize(texts[:10], tokenizer, max_length=64)


def test_what_a_neuron_of_modernbert_is(modern: tuple[Any, obce.Scores, Any]) -> None:
    """Rows of the one Linear for query, key and value; of a gated layer, what its reader takes in."""
    model, _, batches = modern
    sites = find_sites(model)
    (batch,) = batches
    with torch.no_grad():
        hidden = model(**batch.inputs, output_hidden_states=True).hidden_states
        for layer in capture(model, batches, sites):
            block = model.layers[layer.layer]
            wide = block.attn.Wqkv(block.attn_norm(hidden[layer.layer]))[:, 0]
            for kind, part in zip(("query", "key", "value"), wide.chunk(3, dim=-1), strict=True):
                assert distance(torch.from_numpy(layer.outputs[kind].T), part[batch.indices.argsort()]) < 1e-5
            between = (
                hidden[layer.layer]
                + block.attn(
                    block.attn_norm(hidden[layer.layer]),
                    position_embeddings=model.rotary_emb(
                        hidden[0], torch.arange(hidden[0].shape[1])[None], block.attention_type
                    ),
                    attention_mask=mask_of(model, batch.inputs["attention_mask"], block),
                )[0]
            )
            first, gate = block.mlp.Wi(block.mlp_norm(between))[:, 0].chunk(2, dim=-1)
            product = (block.mlp.act(first) * gate)[batch.indices.argsort()]
            assert distance(torch.from_numpy(layer.outputs["intermediate"].T), product) < 1e-5


def mask_of(model: Any, real: torch.Tensor, block: Any) -> torch.Tensor:
    """bool [B, 1, T, T], which tokens a layer looks at from each."""
    places = torch.arange(real.shape[1])
    near = (places[:, None] - places).abs() <= model.config.sliding_window
    everywhere = block.attention_type == "full_attention"
    return (real.bool()[:, None, :] & (near | everywhere))[:, None]


def test_effects_of_modernbert_are_those_of_small_steps(modern: tuple[Any, obce.Scores, Any]) -> None:
    """Towards the neuron's mean, at every token at once."""
    model, scores, batches = modern
    (batch,) = batches
    sites = {site.name: site for site in find_sites(model)}
    every = scores.columns["token_mean"]
    means = {name: every[scores.rows(site.layer, site.kind)] for name, site in sites.items()}
    clouds = effect_clouds(model, batches, list(sites.values()), means, read="cls")
    drawn = [np.random.default_rng([0, text]).standard_normal(HIDDEN, np.float32) for text in batch.indices.tolist()]
    directions = torch.from_numpy(np.stack(drawn)).double()
    for name in ("1.query", "2.key", "1.value", "3.intermediate", "0.output"):
        ahead, back = (stepped(model, batch, sites[name], 5, float(means[name][5]), by) for by in (0.02, -0.02))
        expected = ((ahead - back) * directions).sum(1) / 0.04
        found = torch.from_numpy(clouds[name][5][batch.indices])
        assert distance(found, expected) < 0.02 * float(expected.abs().max()) + 1e-6, name


@torch.no_grad()
def stepped(model: Any, batch: Any, site: Any, neuron: int, mean: float, by: float) -> torch.Tensor:
    """Vectors at [CLS] with a neuron that much further from its mean."""

    def moved(activation: torch.Tensor, at: int) -> torch.Tensor:
        other = activation.clone()
        other[..., at] += by * (activation[..., at] - mean)
        return other

    if site.reader:
        reader = model.get_submodule(site.reader)
        handle = reader.register_forward_pre_hook(lambda _module, args: (moved(args[0], neuron),))
    else:
        writer = model.get_submodule(site.writer)
        handle = writer.register_forward_hook(lambda _module, _args, output: moved(output, site.starts[0] + neuron))
    with handle:
        return model(**batch.inputs).last_hidden_state[:, 0]


def test_rotary_pairs_go_together(modern: tuple[Any, obce.Scores, Any]) -> None:
    model, scores, _ = modern
    half = HIDDEN // HEADS // 2
    plan = obce.plan(scores, model, keep=0.9, of="encoder", units=("query_key",))
    assert plan.kept
    for kept in plan.kept.values():
        assert {i ^ half for i in kept} == set(kept)
    alone = make_plan(model, {"1.query": (0, 9, 17, 25), "1.key": (0, 9, 17, 25)})
    with pytest.raises(ValueError, match=r"plan\.kept\['1\.query'\] keeps neuron 0 without 4, expected both or none"):
        prune(model, alone, repair="none")


def test_a_modernbert_that_loses_nothing_keeps_its_bits(inputs: dict[str, torch.Tensor]) -> None:
    for attention in ("eager", "sdpa"):
        model = make_encoder("modernbert", "MaskedLM", attn_implementation=attention)
        small: Any = prune(model, make_plan(model, {}), repair="none")
        assert torch.equal(answers(small, inputs), answers(model, inputs))
        assert small.model.layers[0].attn.Wo.bias is not None


def test_layers_of_modernbert_by_which_is_dropped(modern: tuple[Any, obce.Scores, Any], tokenizer: Any) -> None:
    """A model without its first layer, or of one kind of layer alone, is sized, cut, repaired, saved and loaded."""
    model, scores, batches = modern
    for dropped in ((0,), (1, 2), (0, 3)):
        kept = {f"{layer}.intermediate": range(0, INNER, 2) for layer in set(range(4)) - set(dropped)}
        small: Any = prune(model, make_plan(model, kept, dropped), texts=batches)
        assert small.config.layer_types == [model.config.layer_types[i] for i in range(4) if i not in dropped]
        assert [*layernorms(small)][1] == ("0.input" if 0 in dropped else "0.attention_output")
    plan = obce.plan(scores, model, keep=0.4, of="encoder", drop_layers=2)
    small = prune(model, plan, texts=batches)
    assert count_parameters(small) == (plan.after.parameters, plan.after.encoder)
    assert sum(site_parameters(small).values()) == plan.after.encoder - HIDDEN * (4 - (0 not in plan.layers_dropped))


def test_least_squares_needs_a_mask_that_says_what_a_layer_looks_at(
    modern: tuple[Any, obce.Scores, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, batches = modern
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(
        ValueError, match="ModernBertModel with attn_implementation='flash_attention_2', expected 'sdpa'"
    ):
        start(model, batches)


@pytest.mark.parametrize("family", PREFIXES)
def test_estimated_shares_are_in_the_order_of_measured_ones(
    family: str, tokenizer: Any, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = make_encoder(family).double(), given_to(family, tokenizer, texts[:60])
    scores = obce.score(model, cloud_texts=0, **given)
    length = usable_max_length(model, given["tokenizer"])
    fit, held_out = (
        tokenize(given["texts"].entries(part), given["tokenizer"], max_length=length)
        for part in (range(30), range(30, 60))
    )
    ways: tuple[Any, ...] = ("estimated", "measured")
    found = [sensitivity(model, scores, fit, held_out, how=how, levels=(0.25, 0.75)) for how in ways]
    assert list(found[0]) == list(found[1])
    monkeypatch.setattr(importlib.import_module("obce.sensitivity"), "_HELD_BYTES", 1)
    assert sensitivity(model, scores, fit, held_out, levels=(0.25, 0.75)) == found[0], "a layer at a time"
    losses = np.array([[loss for curve in curves.values() for _, loss in curve[1:]] for curves in found])
    assert spearmanr(*losses).statistic > 0.8


def test_measured_shares_of_modernbert_read_behind_the_last_norm(modern: tuple[Any, obce.Scores, Any]) -> None:
    model, scores, batches = modern
    units = ("query_key", "intermediate")
    curves = sensitivity(model, scores, batches, batches, how="measured", units=units, levels=(0.5,))
    assert set(curves) == {f"{layer}.{unit}" for layer in range(4) for unit in units}
    small = prune(model, make_plan(model, {"3.intermediate": cut_of(scores)}), texts=batches)
    vectors = [embed(one, batches, pooling="cls").astype(np.float64) for one in (model, small)]
    lost = np.square(vectors[1] - vectors[0]).sum() / np.square(vectors[0] - vectors[0].mean(0)).sum()
    assert curves["3.intermediate"][1][1] == pytest.approx(lost, rel=1e-3)


def cut_of(scores: obce.Scores) -> tuple[int, ...]:
    ((_, cut),) = single_cuts(scores, "effect", 3, "intermediate", (0.5,))
    return cut.kept["3.intermediate"]


def test_every_class_belongs_to_a_family() -> None:
    """No class of a family was forgotten here, and no head that transformers has for a family is missing there."""
    ours = {name for name in modeling_obce.__all__ if "For" in name}
    ours |= {name for name in modeling_obce.__all__ if name.endswith("LMHeadModel")}
    assert ours == {f"Obce{class_name(family, head)}" for family, head in EVERY if head}
    for family, prefix in PREFIXES.items():
        module = getattr(transformers.models, family.replace("-", "_"))
        theirs = {name for name in dir(module) if name.startswith(f"{prefix}For")}
        missing = theirs - {f"{prefix}For{head}" for head in HEADS_OF[family]}
        assert missing <= {f"{prefix}ForCausalLM"}  # of decoders


def test_the_page_has_every_family_and_no_empty_cell() -> None:
    """docs/families.md, which tests/write_families.py writes."""
    page = Path(__file__).parents[1] / "docs" / "families.md"
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = {line.split(" | ")[0].removeprefix("| "): line.strip("| ").split(" | ") for line in lines[2:]}
    assert set(cells) == set(LAYOUTS) == set(PREFIXES)
    for family, row in cells.items():
        assert len(row) == 7
        assert all(row)
        numbers = row[1:5] if row[5].startswith("none: ") else row[1:6]
        assert all(float(cell) < 1e-5 for cell in numbers)
        assert (len(numbers) == 4) == (family == "qwen3")
        assert row[6].split(", ") == HEADS_OF[family]


@st.composite
def cuts(draw: st.DrawFn, family: str) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """Kept indices of any sites, and layers dropped."""
    size, layers = HIDDEN // HEADS, DEPTH[family]
    whole_heads, turned = family != "mpnet", size // 2 if LAYOUTS[family].rotary else 0
    stay = bool(LAYOUTS[family].whole)
    dropped = tuple(sorted(draw(st.sets(st.integers(0, layers - 1), max_size=layers - 1))))
    kept = {}
    for layer in set(range(layers)) - set(dropped):
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        heads = sorted(draw(st.sets(st.integers(0, HEADS - 1)))) if whole_heads else list(range(HEADS))

        def some(width: int, count: int, rng: np.random.Generator = rng) -> list[int]:
            return sorted(int(i) for i in rng.choice(width, count, replace=False))

        if stay and draw(st.booleans()):
            values = draw(st.integers(1, HEAD_SIZE[family]))
            each = [(h * HEAD_SIZE[family], some(HEAD_SIZE[family], values)) for h in range(KEY_VALUE_HEADS[family])]
            kept[f"{layer}.value"] = tuple(h + i for h, here in each for i in here)
        elif not stay and draw(st.booleans()):
            pairs, values = draw(st.integers(1, turned or size)), draw(st.integers(1, size))
            alone = [(h * size, i) for h in heads for i in some(turned or size, pairs)]
            kept[f"{layer}.query"] = tuple(sorted({h + i + other for h, i in alone for other in (0, turned)}))
            kept[f"{layer}.key"] = kept[f"{layer}.query"]
            kept[f"{layer}.value"] = tuple(h * size + i for h in heads for i in some(size, values))
        for kind, width in (("intermediate", INNER), ("attention_output", HIDDEN), ("output", HIDDEN)):
            if draw(st.booleans()):
                kept[f"{layer}.{kind}"] = tuple(some(width, draw(st.integers(1, width))))
    return kept, dropped


@pytest.mark.parametrize("family", PREFIXES)
def test_any_plan(family: str, inputs: dict[str, torch.Tensor]) -> None:
    kinds = ("eager",) if family in EAGER else ("eager", "sdpa")
    models = {attention: make_encoder(family, attn_implementation=attention) for attention in kinds}
    if LAYOUTS[family].causal:
        # the last norm of these divides by little: in float32 either model is up to 1e-5 from what float64 gives
        models = {attention: model.double() for attention, model in models.items()}
    limit = 1e-9 if family == "gpt2" else 1e-5  # RMSNorms see their tokens in float32 all the same
    rng = np.random.default_rng(1)
    means = {site.name: rng.normal(0.3, 0.5, site.width) for site in find_sites(models["eager"])}

    @settings(max_examples=200, deadline=None)
    @given(cut=cuts(family), repair=st.sampled_from(["none", "mean"]), attention=st.sampled_from(sorted(models)))
    def check(cut: Any, repair: str, attention: str) -> None:
        model = models[attention]
        plan = make_plan(model, *cut)
        how: dict[str, Any] = {"repair": repair, "scores": table(model, means) if repair == "mean" else None}
        small = prune(model, plan, **how)
        with masked(model, plan, **how):
            assert distance(answers(small, inputs), answers(model, inputs)) < limit

    check()


def table(model: PreTrainedModel, means: dict[str, np.ndarray]) -> obce.Scores:
    sites = find_sites(model)
    widths = [site.width for site in sites]
    return obce.Scores(
        layer=np.repeat(np.array([site.layer for site in sites], np.int16), widths),
        site=np.repeat(np.array([SITE_KINDS.index(site.kind) for site in sites], np.int8), widths),
        index=np.concatenate([np.arange(width, dtype=np.int32) for width in widths]),
        constant=np.zeros(sum(widths), bool),
        columns={"token_mean": np.concatenate([means[site.name] for site in sites])},
        meta={"model_hash": model_hash(model)},
    )
