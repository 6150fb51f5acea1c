"""A user's site map: what it may say, what is refused, and that its family goes the whole way as the others do."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import obce
import pytest
import torch
import transformers
from obce import export
from obce.capture import capture
from obce.cli import app
from obce.corpus import tokenize
from obce.evaluate import count_parameters, embed, flops, site_parameters, weight_bytes
from obce.finetune import with_head
from obce.glue import TASKS
from obce.layernorm import layernorms
from obce.modeling_obce_mapped import ObceColumns, ObceMappedConfig, ObceSpread
from obce.plan import UNITS
from obce.plan import flops as planned_flops
from obce.prune import masked, prune
from obce.run import Run, load_model
from obce.sensitivity import sensitivity
from obce.sitemap_obce import checked_site_map, read_site_map, site_map_hash
from obce.sites import LAYOUTS, SITE_KINDS, base_model, find_sites, layers_of, model_hash
from torch import nn
from transformers.models.camembert.modeling_camembert import CamembertIntermediate
from typer.testing import CliRunner

from fuzz_sitemap import known_again, toml_of
from test_export import INPUTS, elsewhere, found_in, furthest
from test_export import answers as told
from tiny import HIDDEN, INNER, LAYERS, SITE_MAPS, make_encoder, make_mapped, make_plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


ONLY_MLP = ("intermediate", "output")


@pytest.fixture(autouse=True)
def _families() -> Iterator[None]:
    with known_again():
        yield


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 200, (3, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 7:] = mask[2, 4:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@torch.no_grad()
def answers(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    real = inputs["attention_mask"].bool()
    found = [one for one in model(**inputs).to_tuple() if isinstance(one, torch.Tensor)]
    return torch.cat([(one[real] if one.shape[:2] == real.shape else one).flatten().double() for one in found])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def some_plan(model: Any) -> Any:
    """A little of everything, unequal in the layers."""
    values = (1, 2, 8, 9, 16, 17, 30, 31)
    kept = {"0.query": (0, 9, 17, 25), "0.key": (0, 9, 17, 25), "1.value": values, "1.output": (0, 5, 31)}
    kept |= {"0.intermediate": tuple(range(0, INNER, 3)), "1.attention_output": tuple(range(20))}
    return make_plan(model, kept)


def mlp_map(family: str) -> dict[str, Any]:
    """The least that is worth a map."""
    whole = SITE_MAPS[family]
    sites = {kind: whole["sites"][kind] for kind in ONLY_MLP}
    return {"model_type": family, "stack": whole["stack"], "sites": sites}


# ---- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SITE_MAPS)
def test_scored_planned_and_cut(family: str, tokenizer: Any, texts: list[str], inputs: dict[str, torch.Tensor]) -> None:
    """Predicted sizes are exact, least squares is no worse than the mean, and the masked model is the cut one."""
    assert obce.register_sites(SITE_MAPS[family]) == family
    model, texts = make_mapped(family, "SequenceClassification").double(), texts[:100]
    labels = np.arange(len(texts)) % 2
    scores = obce.score(model, tokenizer, texts, labels=labels, cloud_texts=40, effect_texts=40)
    assert {"rf", "std", "effect", "effect_abs", "spread", "magnitude", "taylor", "random"} <= set(scores.names())
    assert scores.meta["site_map"] == checked_site_map(SITE_MAPS[family], "")
    assert np.isfinite(scores.column("effect")).all()
    assert scores.kinds() == list(SITE_KINDS)
    batches = tokenize(texts, tokenizer, max_length=64)
    before = answers(model, inputs)
    for units in (("query_key", "value", "intermediate"), ("heads", "attention_output", "output")):
        plan = obce.plan(scores, model, keep=0.6, of="encoder", units=units, floor=0.0)
        for repair in ("none", "mean", "least_squares"):
            how: dict[str, Any] = {"mean": {"scores": scores}, "least_squares": {"texts": batches}}.get(repair, {})
            small = prune(model, plan, repair=repair, **how)
            assert type(small).__name__ == f"Obce{type(model).__name__}"
            assert count_parameters(small) == (plan.after.parameters, plan.after.encoder)
            assert weight_bytes(small) == plan.after.bytes
            with masked(model, plan, repair=repair, **how):
                assert distance(answers(small, inputs), answers(model, inputs)) < 1e-8
            assert distance(answers(small, inputs), before) > 1e-3
        # what the map does not name computes what it did
        less = flops(model, length=64) - flops(small, length=64)
        widths = [tuple(one[i] for i in (0, 1, 2, 4, 5)) for one in small.config.layer_widths()]
        predicted = planned_flops(plan.architecture, dict(enumerate(map(obce_widths, widths))), 64)
        assert less == planned_flops(plan.architecture, whole_widths(), 64) - predicted
        errors = small.config.obce["least_squares"]["errors"]
        assert len(errors) == 2 * LAYERS
        assert all(fitted <= mean for mean, fitted in errors.values())
        assert sum(mean - fitted for mean, fitted in errors.values()) > 0.01
        assert sum(site_parameters(small).values()) < sum(site_parameters(model).values())
    assert torch.equal(answers(model, inputs), before)


def obce_widths(widths: Any) -> Any:
    from obce.plan import Widths

    return Widths(*widths)


def whole_widths() -> Any:
    return dict.fromkeys(range(LAYERS), obce_widths((HIDDEN, HIDDEN, INNER, HIDDEN, HIDDEN)))


@pytest.mark.parametrize("family", SITE_MAPS)
@pytest.mark.parametrize("head", ["", "MaskedLM", "SequenceClassification", "TokenClassification"])
def test_saved_and_opened(family: str, head: str, inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    obce.register_sites(SITE_MAPS[family])
    model = make_mapped(family, head)
    plan = some_plan(model)
    small = prune(model, plan, repair="none")
    found = answers(small, inputs)
    with masked(model, plan, repair="none"):
        assert distance(found, answers(model, inputs)) < 1e-5
    small.save_pretrained(tmp_path)
    del LAYOUTS[family]  # the map lies in the checkpoint
    loaded = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel").from_pretrained(tmp_path).eval()
    assert type(loaded) is type(small)
    assert torch.equal(answers(loaded, inputs), found)
    again = load_model(tmp_path, pruned=True)
    assert type(again) is type(small)
    assert torch.equal(answers(again, inputs), found)
    bare = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert distance(bare(**inputs)[0], base_model(small)(**inputs)[0]) == 0
    if head == "MaskedLM":
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    loaded.set_attn_implementation("eager")
    told = loaded(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(told.hidden_states) == LAYERS + 1
    assert len(told.attentions) == LAYERS
    loaded.train()
    told[0].sum().backward()
    spread = next(module for module in loaded.modules() if isinstance(module, ObceSpread))
    assert spread.weight.grad is not None
    assert spread.weight.shape == (4, HIDDEN)


def test_opened_by_its_code_without_obce_and_dense_again(tmp_path: Path) -> None:
    expected = {}
    for family in SITE_MAPS:
        obce.register_sites(SITE_MAPS[family])
        model = make_mapped(family, "SequenceClassification")
        small = prune(model, some_plan(model), repair="none")
        (tmp_path / family).mkdir()
        export.remote_code(small, tmp_path / family)
        assert (tmp_path / family / "modeling_obce_mapped.py").is_file()
        expected[family] = told(small)
        given = export.example(small, 2, 11, INPUTS)
        np.savez(tmp_path / f"{family}.npz", **{key: tensor.numpy() for key, tensor in given.items()})
        for plan in (None, some_plan(model)):
            filled = export.to_dense(small, plan)
            assert type(filled) is type(model)
            assert furthest(told(filled), expected[family]) < 1e-5
        key = f"{LAYOUTS[family].stack}.0.{LAYOUTS[family].writers['key']}"
        kept, back = (one.base_model.get_submodule(key).weight for one in (model, filled))
        assert torch.equal(back[[0, 9, 17, 25]], kept[[0, 9, 17, 25]])
        assert int(back.count_nonzero()) == 4 * HIDDEN
    elsewhere(tmp_path, True, dict.fromkeys(SITE_MAPS, "AutoModelForSequenceClassification"))
    for family in SITE_MAPS:
        assert furthest(expected[family], found_in(tmp_path, family)) == 0


def test_no_dense_form_where_the_family_has_no_bias(tokenizer: Any, texts: list[str]) -> None:
    obce.register_sites(SITE_MAPS["nomic_bert"])
    model = make_mapped("nomic_bert")
    small = prune(model, some_plan(model), repair="mean", texts=texts, tokenizer=tokenizer)
    with pytest.raises(
        ValueError, match=r"whose layers.0.mlp.down_proj has a bias, and that of transformers' NomicBertModel"
    ):
        export.to_dense(small)


def test_onnx(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; `make dev` installs it")
    obce.register_sites(SITE_MAPS["nomic_bert"])
    small = prune(make_mapped("nomic_bert"), some_plan(make_mapped("nomic_bert")), repair="none")
    assert export.onnx(small, tmp_path, tokenizer) < 1e-5


@pytest.mark.parametrize("family", SITE_MAPS)
def test_a_head_for_a_task(family: str, inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    obce.register_sites(SITE_MAPS[family])
    dense = make_mapped(family)
    small = prune(dense, make_plan(dense, {"1.intermediate": (0, 4), "0.value": (0, 8, 16, 24)}), repair="none")
    one, two = (with_head(model, TASKS["SST-2"], 1) for model in (dense, small))
    assert type(two).__name__ == f"Obce{type(one).__name__}"
    assert torch.equal(base_model(two)(**inputs)[0], small(**inputs)[0])
    two.save_pretrained(tmp_path)
    again = load_model(tmp_path, pruned=True)
    assert type(again) is type(two)
    assert torch.equal(answers(again, inputs), answers(two, inputs))


def test_an_encoder_of_a_family_that_has_a_decoder(
    tokenizer: Any, texts: list[str], inputs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """T5's layers have no biases and are lists themselves, and its embeddings are called from two places."""
    names = {"intermediate": "layer.1.DenseReluDense.wi", "output": "layer.1.DenseReluDense.wo"}
    obce.register_sites({"model_type": "t5", "stack": "encoder.block", "sites": names, "positions": 64})
    torch.manual_seed(0)
    sizes = {"d_model": HIDDEN, "d_kv": 8, "d_ff": INNER, "num_layers": LAYERS, "num_heads": 4}
    model = transformers.T5EncoderModel(transformers.T5Config(vocab_size=256, pad_token_id=0, **sizes)).eval()
    scores = obce.score(model, tokenizer, texts[:60], effect_texts=40, cloud_texts=0)
    assert scores.column("effect").max() > 0
    plan = obce.plan(scores, model, keep=0.9, of="encoder")
    small = prune(model, plan, texts=texts[:60], tokenizer=tokenizer)
    assert count_parameters(small) == (plan.after.parameters, plan.after.encoder)
    small.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForTextEncoding.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(small)
    assert torch.equal(answers(loaded, inputs), answers(small, inputs))


def test_rows_columns_and_a_layer_without_heads(inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    obce.register_sites(SITE_MAPS["camembert"])
    model = make_mapped("camembert")
    plan = make_plan(model, {"0.query": (), "0.key": (), "0.value": (), "1.value": (0, 8, 16, 24)})
    small = prune(model, plan, repair="none")
    with masked(model, plan, repair="none"):
        assert distance(answers(small, inputs), answers(model, inputs)) < 1e-5
    layers: Any = small.encoder.layer
    assert layers[0].attention.output.dense.weight is None
    assert isinstance(layers[1].attention.output.dense, ObceColumns)
    assert type(layers[1].attention.self.query) is nn.Linear
    small.save_pretrained(tmp_path)
    assert torch.equal(answers(load_model(tmp_path, pruned=True), inputs), answers(small, inputs))
    filled = export.to_dense(small)
    assert distance(answers(filled, inputs), answers(small, inputs)) < 1e-5


def test_nothing_removed_is_the_dense_model(inputs: dict[str, torch.Tensor]) -> None:
    for family in SITE_MAPS:
        obce.register_sites(SITE_MAPS[family])
        model = make_mapped(family)
        assert torch.equal(answers(prune(model, make_plan(model, {}), repair="none"), inputs), answers(model, inputs))


@pytest.mark.parametrize(("family", "blocks"), [("bert", {}), ("modernbert", LAYOUTS["modernbert"].blocks)])
def test_a_map_of_a_family_that_obce_knows_says_the_same(
    family: str, blocks: Any, tokenizer: Any, texts: list[str], inputs: dict[str, torch.Tensor]
) -> None:
    """Scores and pruned models are those of the family's own classes; ModernBERT's Linears hold several kinds."""
    model = make_encoder(family)
    layout = LAYOUTS[family]
    pairs = (0, 4, 9, 13, 17, 21, 26, 30)
    kept = {"0.query": pairs, "0.key": pairs, "1.value": (1, 2, 8, 9, 16, 17, 30, 31), "1.output": (0, 5, 31)}
    kept |= {"0.intermediate": tuple(range(0, INNER, 3))}
    how: dict[str, Any] = {"texts": texts[:60], "tokenizer": tokenizer}
    native = [answers(prune(model, make_plan(model, kept), repair=r, **how), inputs) for r in ("none", "mean")]
    known = obce.score(model, tokenizer, texts[:60], cloud_texts=0, effect_texts=40)
    del LAYOUTS[family]
    given = {"query": [0], "intermediate": [0]} | {kind: list(one) for kind, one in blocks.items()} if blocks else {}
    obce.register_sites({"model_type": family, "stack": layout.stack, "sites": dict(layout.writers), "blocks": given})
    mapped = [answers(prune(model, make_plan(model, kept), repair=r, **how), inputs) for r in ("none", "mean")]
    for one, other in zip(native, mapped, strict=True):
        assert distance(one, other) < 1e-5
    scores = obce.score(model, tokenizer, texts[:60], cloud_texts=0, effect_texts=40)
    for name in ("rf", "effect", "spread", "magnitude"):
        np.testing.assert_allclose(scores.column(name), known.column(name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("rows", [False, True])
def test_least_squares_by_hooks_is_the_walk_through_the_layers(
    family: str, rows: bool, tokenizer: Any, texts: list[str], inputs: dict[str, torch.Tensor]
) -> None:
    """With its LayerNorms named a mapped family gets the weights that it gets as one that obce knows."""
    model = make_encoder(family).double()
    layout = LAYOUTS[family]
    kept: dict[str, Any] = {f"{i}.value": (1, 2, 8, 9, 16, 17, 30, 31) for i in range(1, len(layers_of(model)))}
    kept |= {f"{i}.intermediate": tuple(range(i, INNER, 3)) for i in range(len(layers_of(model)))}
    if rows:
        kept |= {"1.output": tuple(range(20)), "0.attention_output": tuple(range(5, 32))}
    batches = tokenize(texts[:100], tokenizer, max_length=64)
    native = prune(model, make_plan(model, kept), texts=batches)
    del LAYOUTS[family]
    norms = {"norms": list(layout.norms), "pre_norm": layout.pre_norm}
    norms |= {"last_norm": layout.last_norm} if layout.last_norm else {}
    blocks = {"query": [0], **{kind: list(of) for kind, of in layout.blocks.items()}} if layout.blocks else {}
    obce.register_sites(
        {"model_type": family, "stack": layout.stack, "sites": dict(layout.writers), "blocks": blocks, **norms}
    )
    mapped = prune(model, make_plan(model, kept), texts=batches)
    limit = 1e-4 if layout.rotary else 1e-8  # positions turn query and key in float32
    assert distance(answers(native, inputs), answers(mapped, inputs)) < limit
    one, other = (small.config.obce["least_squares"]["errors"] for small in (native, mapped))
    assert set(one) == set(other)
    np.testing.assert_allclose(list(one.values()), [other[name] for name in one], atol=1e-5)


@pytest.mark.parametrize(
    "changed",
    [
        {"norms": ["output.LayerNorm", "attention.output.LayerNorm"]},
        {"norms": ["attention.output.dropout", "output.LayerNorm"], "pre_norm": True},
        {"norms": ["attention.output.LayerNorm", "intermediate"]},
        {"norms": ["attention.nothing", "output.LayerNorm"]},
    ],
)
def test_wrong_norms_are_refused_by_least_squares(changed: Any, tokenizer: Any, texts: list[str]) -> None:
    obce.register_sites({**SITE_MAPS["camembert"], **changed})
    model = make_mapped("camembert")
    plan = make_plan(model, {"0.intermediate": (0, 1, 2)})
    with pytest.raises(ValueError, match=r"keys 'norms', 'pre_norm' and 'last_norm' name 'encoder.layer.[01]") as error:
        prune(model, plan, texts=texts[:20], tokenizer=tokenizer)
    assert "\n" not in str(error.value)
    assert not model.encoder.layer[0].output.dense._forward_hooks
    obce.register_sites({key: value for key, value in SITE_MAPS["camembert"].items() if key != "norms"})
    prune(model, make_plan(model, {"0.intermediate": (0, 1, 2)}), texts=texts[:20], tokenizer=tokenizer)


# ---- a map that says little ------------------------------------------------------------------------------------------


def test_what_needs_more_than_the_map_says_names_the_key(tokenizer: Any, texts: list[str]) -> None:
    obce.register_sites(mlp_map("camembert"))
    model = make_mapped("camembert")
    scores = obce.score(model, tokenizer, texts[:60], effect_texts=40, cloud_texts=20)
    assert scores.kinds() == list(ONLY_MLP)
    assert scores.clouds is not None
    assert len(scores.clouds.layer) == LAYERS  # of whole layers alone
    plan = obce.plan(scores, model, keep=0.8, of="encoder")
    assert plan.units == ("intermediate",)
    small = prune(model, plan, scores=scores, repair="mean")
    assert count_parameters(small) == (plan.after.parameters, plan.after.encoder)
    for unit in ("value", "query_key", "heads"):
        with pytest.raises(ValueError, match=rf"units holds {unit}.*no key 'sites\.\w+'"):
            obce.plan(scores, model, keep=0.8, of="encoder", units=(unit,))
    with pytest.raises(ValueError, match="drop_layers is 1, but a site map"):
        obce.plan(scores, model, drop_layers=1)
    with pytest.raises(ValueError, match=r"plan.layers_dropped is \[1\], but a site map"):
        prune(model, make_plan(model, {}, (1,)), repair="none")
    with pytest.raises(ValueError, match="site map 'given' has no key 'norms', which finding the LayerNorms needs"):
        layernorms(model)
    batches = tokenize(texts[:20], tokenizer, max_length=32)
    with pytest.raises(ValueError, match="memory is 'layer', but a site map"):
        next(capture(model, batches, find_sites(model), memory="layer"))
    with pytest.raises(ValueError, match="plan with estimated shares"):
        sensitivity(model, scores, batches, batches, how="measured")
    curves = sensitivity(model, scores, batches, batches)
    assert obce.plan(scores, model, keep=0.8, of="encoder", sensitivity=curves).shares == "estimated"
    assert all(0 < loss < math.inf for curve in curves.values() for _, loss in curve[1:])
    assert embed(small, batches).shape == (20, HIDDEN)


def test_layernorms_by_the_map() -> None:
    obce.register_sites(SITE_MAPS["camembert"])
    assert len(layernorms(make_mapped("camembert"))) == 1 + 2 * LAYERS
    without = {key: value for key, value in SITE_MAPS["esm"].items() if key != "last_norm"}
    obce.register_sites({**without, "first_norm": "encoder.emb_layer_norm_after"})
    with pytest.raises(ValueError, match="no key 'last_norm'"):
        layernorms(make_mapped("esm"))


def test_numbers_that_a_config_does_not_state() -> None:
    given = {**SITE_MAPS["camembert"], "positions": 20, "heads": 2}
    obce.register_sites(given)
    model = make_mapped("camembert")
    assert obce.sites.usable_positions(model) == 20
    assert {site.heads for site in find_sites(model) if site.kind == "query"} == {2}
    obce.register_sites(SITE_MAPS["camembert"])
    assert obce.sites.usable_positions(model) == 69  # the first row is for padding
    model.config = SimpleNamespace(model_type="camembert", hidden_size=32)
    with pytest.raises(ValueError, match="has no key 'positions', which a CamembertModel, whose config states no max_"):
        obce.sites.usable_positions(model)
    with pytest.raises(ValueError, match="has no key 'heads', which a CamembertModel, whose config states no num_att"):
        find_sites(model)
    model.config = SimpleNamespace(model_type="camembert")
    with pytest.raises(ValueError, match="model is a CamembertModel whose config states no hidden_size"):
        find_sites(model)


# ---- what does not let its neurons go --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inside", "words"),
    [
        (lambda found: found - found.mean(-1, keepdim=True), "differs by"),
        (lambda found: found.view(*found.shape[:-1], 4, INNER // 4).flip(-2).flatten(-2), r"fails \(.*shape"),
    ],
)
def test_no_wrong_model_leaves(monkeypatch: pytest.MonkeyPatch, inside: Any, words: str) -> None:
    """Code between the two Linears that does not work number by number."""
    own = CamembertIntermediate.forward
    monkeypatch.setattr(CamembertIntermediate, "forward", lambda self, hidden: inside(own(self, hidden)))
    obce.register_sites(SITE_MAPS["camembert"])
    model = make_mapped("camembert")
    with pytest.raises(
        ValueError, match=rf"{words}.*neurons of intermediate go.*sites.intermediate out of the site map"
    ):
        prune(model, some_plan(model), repair="none")
    obce.register_sites({**SITE_MAPS["camembert"], "sites": {k: v for k, v in BERT.items() if k not in ONLY_MLP}})
    prune(model, make_plan(model, {"1.value": (0, 8, 16, 24)}), repair="none")


BERT = SITE_MAPS["camembert"]["sites"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_only_rounds_differently_is_not_refused(
    dtype: torch.dtype, tokenizer: Any, texts: list[str], inputs: dict[str, torch.Tensor]
) -> None:
    """Of large numbers that cancel little is left when a bias is rounded; the code has no part in that."""
    obce.register_sites(SITE_MAPS["camembert"])
    model = make_mapped("camembert")
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.intermediate.dense.bias.add_(3000)
            layer.output.dense.bias.sub_(3000 * layer.output.dense.weight.sum(1))
    model = model.to(dtype)
    plan = make_plan(model, {"0.intermediate": tuple(range(0, INNER, 2)), "1.intermediate": (0, 1, 2)})
    how: dict[str, Any] = {"repair": "mean", "texts": texts[:20], "tokenizer": tokenizer}
    small = prune(model, plan, **how)
    assert small.dtype == dtype
    with masked(model, plan, **how):
        assert distance(answers(model, inputs), answers(small, inputs)) > 1e-5


def test_a_plan_of_another_map_is_refused() -> None:
    obce.register_sites(SITE_MAPS["camembert"])
    model = make_mapped("camembert")
    plan = make_plan(model, {"0.intermediate": (0, 1)})
    obce.register_sites(mlp_map("camembert"))
    with pytest.raises(ValueError, match=r"plan was made by the site map '[0-9a-f]{32}', but the map .* is now"):
        prune(model, plan, repair="none")


# ---- what a map may say ----------------------------------------------------------------------------------------------


def test_toml(tmp_path: Path) -> None:
    for family, plain in SITE_MAPS.items():
        path = tmp_path / f"{family}.toml"
        path.write_text("\n".join(toml_of(plain)), encoding="utf-8")
        found = read_site_map(path)
        assert found == checked_site_map(plain, "")
        assert obce.register_sites(path) == family
        assert LAYOUTS[family].site_map_hash == site_map_hash(found)
    assert len({LAYOUTS[family].site_map_hash for family in SITE_MAPS}) == 3
    assert site_map_hash(dict(reversed(found.items()))) == site_map_hash(found)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"stack": None}, "key 'stack' is missing, expected the name of the ModuleList"),
    ({"model_type": None}, "key 'model_type' is missing, expected the family's name"),
    ({"sites": None}, "key 'sites' is missing, expected a table of kinds"),
    ({"stak": "x"}, "key 'stak' is unknown, expected only model_type, stack, sites"),
    ({"model_type": 7}, "key 'model_type' is 7, expected the family's name"),
    ({"model_type": "bert"}, "key 'model_type' is 'bert', but obce knows that family by itself"),
    ({"model_type": "albert"}, "key 'model_type' is 'albert', but obce refuses it: its layers are one and the same"),
    ({"model_type": "obce_bert"}, "key 'model_type' is 'obce_bert', but obce knows that family"),
    ({"stack": "encoder..layer"}, "key 'stack' is 'encoder..layer', expected the name of a module"),
    ({"stack": ["a"]}, r"key 'stack' is \['a'\], expected the name of a module"),
    ({"sites": {}}, "key 'sites' is {}, expected a table of kinds"),
    ({"sites": {"values": "x"}}, "key 'sites.values' is unknown, expected only sites.query"),
    ({"sites": {"value": "x"}}, "key 'sites.attention_output' is missing beside 'sites.value'.*read by the other"),
    ({"sites": {"output": "x"}}, "key 'sites.intermediate' is missing beside 'sites.output'"),
    ({"sites": {"query": "x"}}, "key 'sites.key' is missing beside 'sites.query'.*cut with those of the other"),
    ({"sites": {"intermediate": 3, "output": "x"}}, "key 'sites.intermediate' is 3, expected the name of a module"),
    (
        {"sites": {"intermediate": ["a", "a"], "output": "x"}},
        "expected the name of one Linear, or of two that are mult",
    ),
    (
        {"sites": {"intermediate": "a", "output": ["x", "y"]}},
        r"'sites.output' is \['x', 'y'\], expected the name of one",
    ),
    (
        {"sites": {"intermediate": "a", "output": "a"}},
        "key 'sites.output' is 'a', which 'sites.intermediate' names, too",
    ),
    ({"blocks": {"output": [0]}}, "key 'blocks.output' is unknown, expected only blocks.query"),
    ({"blocks": {"value": [0, 1]}}, r"key 'blocks.value' is \[0, 1\], expected a list of one number of a block from 0"),
    ({"blocks": {"value": [-1]}}, r"key 'blocks.value' is \[-1\], expected"),
    ({"blocks": {"value": True}}, "key 'blocks.value' is True, expected"),
    ({"blocks": {"intermediate": [1, 1]}}, r"key 'blocks.intermediate' is \[1, 1\], expected"),
    ({"blocks": 3}, "key 'blocks' is 3, expected a table of kinds"),
    ({"norms": ["a"]}, r"key 'norms' is \['a'\], expected two names of modules"),
    ({"pre_norm": 1}, "key 'pre_norm' is 1, expected true or false"),
    ({"heads": 0}, "key 'heads' is 0, expected a whole number above 0"),
    ({"positions": 1.5}, "key 'positions' is 1.5, expected a whole number above 0"),
]


@pytest.mark.parametrize(("changed", "words"), WRONG, ids=[words[:40] for _, words in WRONG])
def test_wrong_keys_are_refused(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    plain = {key: value for key, value in {**SITE_MAPS["camembert"], **changed}.items() if value is not None}
    path = tmp_path / "map.toml"
    path.write_text("\n".join(toml_of(plain)), encoding="utf-8")
    with pytest.raises(ValueError, match=words) as error:
        obce.register_sites(path)
    assert str(error.value).startswith(f"site map '{path}': ")
    assert "\n" not in str(error.value)
    assert "camembert" not in LAYOUTS


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.toml"
    with pytest.raises(ValueError, match="is no file, expected a TOML file"):
        obce.register_sites(path)
    for content, words in (
        (b"x = ", "is not readable TOML"),
        (b"\xff\xfe", "is not readable TOML"),
        (b"x = " + b"[" * 30_000, r"is not readable TOML \(it is nested too deeply\)"),
        (b"#" * 70_000, "has 70,000 bytes, expected TOML of at most 65,536"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            obce.register_sites(path)
    with pytest.raises(ValueError, match="site map 'given': the map is 7, expected a table of keys"):
        checked_site_map(7, "given")


def swapped(**sites: Any) -> dict[str, Any]:
    return {"sites": {**BERT, **sites}}


INNER_DENSE, QUERY, OUTER_DENSE = "intermediate.dense", "attention.self.query", "output.dense"
UNFIT: list[tuple[dict[str, Any], str]] = [
    (
        {"stack": "encoder.layers"},
        "'stack' is 'encoder.layers', no module of CamembertModel, expected the name of its ",
    ),
    ({"stack": "encoder"}, "'stack' is 'encoder', a CamembertEncoder of CamembertModel, expected"),
    (swapped(value="attention.v"), "'sites.value' is 'attention.v', no module .* at 'encoder.layer.0.attention.v'"),
    (swapped(value="attention.self"), "'sites.value' is 'attention.self', a CamembertSelfAttention"),
    (swapped(query=INNER_DENSE, intermediate=QUERY), "'sites.query' is 'intermediate.dense', of 48 rows in layer 0"),
    (
        swapped(intermediate=QUERY, query=OUTER_DENSE, output=INNER_DENSE),
        "'sites.output' is 'intermediate.dense', of 48 rows in layer 0, expected 32, the hidden size",
    ),
    ({"blocks": {"value": [1]}}, "'sites.value' is .* of 32 rows in layer 0, expected blocks of 32, what"),
    (swapped(query="attention.q"), "'sites.query' is 'attention.q', no module"),
    ({"heads": 5}, "'sites.query' is .* of 32 neurons in layer 0, expected the hidden size 32 in 5 heads"),
]


@pytest.mark.parametrize(("changed", "words"), UNFIT, ids=[words[:40] for _, words in UNFIT])
def test_what_a_model_has_not_is_refused(changed: dict[str, Any], words: str) -> None:
    obce.register_sites({**SITE_MAPS["camembert"], **changed})
    with pytest.raises(ValueError, match=rf"site map 'given': key {words}") as error:
        find_sites(make_mapped("camembert"))
    assert "\n" not in str(error.value)


def test_linears_that_are_not_alike_are_refused() -> None:
    obce.register_sites(SITE_MAPS["camembert"])
    model = make_mapped("camembert")
    model.encoder.layer[1].attention.self.key.bias = None
    with pytest.raises(
        ValueError, match=r"'sites.key'.*without a bias in layer 1, unlike sites.query.*query and key out"
    ):
        find_sites(model)
    model = make_mapped("camembert")
    model.encoder.layer[1].output.dense.weight = model.encoder.layer[0].output.dense.weight
    with pytest.raises(
        ValueError, match=r"'sites.output' .* in layer 1 with the weight of 'encoder.layer.0.output.dense'"
    ):
        find_sites(model)
    model = make_mapped("camembert")
    model.encoder.layer[1].intermediate.dense, model.encoder.layer[1].output.dense = (
        nn.Linear(32, 40),
        nn.Linear(40, 32),
    )
    with pytest.raises(
        ValueError, match=r"'sites.intermediate' .* of 40 neurons in layer 1, expected 48 as in layer 0"
    ):
        find_sites(model)
    obce.register_sites(SITE_MAPS["nomic_bert"])
    model = make_mapped("nomic_bert")
    model.layers[0].mlp.up_proj = nn.Linear(32, 48)
    with pytest.raises(
        ValueError, match=r"'sites.intermediate' .* another shape or bias than 'mlp.up_proj' in layer 0"
    ):
        find_sites(model)


def test_an_unknown_family_is_told_of_maps() -> None:
    with pytest.raises(
        ValueError, match=r"CamembertModel of the family 'camembert', .*register_sites.*--sites map.toml"
    ):
        find_sites(make_mapped("camembert"))


def test_hash_covers_what_is_scored() -> None:
    model = make_mapped("nomic_bert")
    with pytest.raises(ValueError, match="family 'nomic_bert'"):
        find_sites(model)
    obce.register_sites(SITE_MAPS["nomic_bert"])
    first = model_hash(model)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-2
        assert (model_hash(model) == first) == name.startswith("pooler."), name
        first = model_hash(model)


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    obce.register_sites(SITE_MAPS["camembert"])
    model = make_mapped("camembert")
    prune(model, some_plan(model), repair="none").save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    changes: list[tuple[Callable[[Any], Any], str]] = [
        (lambda mapped: mapped.pop("map"), "expected the keys"),
        (lambda mapped: mapped.update(family="nothing"), "family is 'nothing'"),
        (lambda mapped: mapped.update({"class": "BertModel"}), "class is 'BertModel' of the family 'camembert'"),
        (lambda mapped: mapped["map"].update(stack=3), "'stack' is 3"),
        (lambda mapped: mapped["layers"].pop(), "layers has 1 layers, but the model 2"),
        (lambda mapped: mapped["layers"][0].update(value=33), "keeps 33 of value, expected at most 32"),
        (lambda mapped: mapped["layers"][0].update(value="x"), "is not a whole number"),
    ]
    for change, words in changes:
        config = copy.deepcopy(whole)
        change(config["mapped"])
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=re.escape(words)):
            load_model(tmp_path, pruned=True)
    (tmp_path / "config.json").write_text(json.dumps(whole))
    small = load_model(tmp_path, pruned=True)
    place: Any = small.get_submodule("encoder.layer.0.attention.self.query")
    for wrong in (torch.tensor([0, 9, 17, 32]), torch.tensor([9, 0, 17, 25]), torch.tensor([-1, 9, 17, 25])):
        place.places = wrong
        small.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"'encoder.layer.0.attention.self.query.places' that do not fit"):
            load_model(tmp_path, pruned=True)
    with pytest.raises(ValueError, match="expected the keys"):
        ObceMappedConfig.from_dict({"mapped": None})


# ---- commands --------------------------------------------------------------------------------------------------------


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_commands_and_a_resume_by_another_map(
    tokenizer: Any, texts: list[str], inputs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    make_mapped("camembert").save_pretrained(model)
    tokenizer.save_pretrained(model)
    corpus, first, second = tmp_path / "texts.txt", tmp_path / "first.toml", tmp_path / "second.toml"
    corpus.write_text("\n".join(texts[:60]) + "\n", encoding="utf-8")
    first.write_text("\n".join(toml_of(SITE_MAPS["camembert"])), encoding="utf-8")
    second.write_text("\n".join(toml_of(mlp_map("camembert"))), encoding="utf-8")
    run = tmp_path / "run"
    unknown = command("score", model, corpus, "--out", run)
    assert unknown.exit_code == 2
    assert "--sites map.toml" in unknown.stderr
    wrong = command("score", model, corpus, "--out", run, "--sites", corpus)
    assert wrong.exit_code == 2
    assert "is not readable TOML" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1
    made = command("run", model, corpus, "--out", run, "--sites", first, "--keep", 0.7, "--of", "encoder", "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["kept_share"] == pytest.approx(0.7, abs=0.01)
    other = command("score", model, corpus, "--out", run, "--sites", second)
    assert other.exit_code == 2
    assert "holds scores of another site map" in other.stderr
    other = command("prune", run, "--sites", second)
    assert other.exit_code == 2
    assert "the scores are of another site map" in other.stderr
    # the run knows its map
    del LAYOUTS["camembert"]
    found = command("explain", run, "--neuron", "1.intermediate.3", "--json")
    assert found.exit_code == 0, found.output
    del LAYOUTS["camembert"]
    assert command("prune", run, "--repair", "mean").exit_code == 0
    found = command("export", run, "--to", "dense", "--out", tmp_path / "dense", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["class"] == "CamembertModel"
    little = tmp_path / "little"  # no kind that has heads
    made = command("run", model, corpus, "--out", little, "--sites", second, "--keep", 0.9, "--of", "encoder")
    assert made.exit_code == 0, made.output
    found = command("explain", little, "--top", 1, "--head", "1.hidden", "--json")
    assert found.exit_code == 0, found.output
    assert command("explain", little, "--top", 1).exit_code == 0
    del LAYOUTS["camembert"]  # that of the other run
    measured = command("plan", run, "--keep", 0.7, "--shares", "measured")
    assert measured.exit_code == 2
    assert "plan with estimated shares" in measured.stderr
    small = load_model(run / "model", pruned=True)
    assert site_map_hash(Run(run).scores().meta["site_map"]) == LAYOUTS["camembert"].site_map_hash
    assert "camembert" in (run / "model" / "README.md").read_text() or type(small).__name__ == "ObceCamembertModel"
    assert set(UNITS) > {"value"}


def test_a_sketch_of_a_map_without_heads(tokenizer: Any, texts: list[str], tmp_path: Path) -> None:
    make_mapped("camembert").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    obce.register_sites(mlp_map("camembert"))
    run = Run(tmp_path / "run")
    scores, _ = run.score(str(tmp_path / "model"), obce.read_corpus(texts[:40]), keep_sketch=True, effect_texts=0)
    assert scores.clouds is not None
    assert float(run.cloud("1.hidden").r_f[0]) == scores.clouds.columns["rf"][1]
    (explained,) = run.explain(heads=["1.hidden"], corpus=obce.read_corpus(texts[:40])).heads
    assert explained.standings["rf"].value == scores.clouds.columns["rf"][1]
    with pytest.raises(ValueError, match=r"cloud is '1.query.0', but layer 1 has 0 heads of query"):
        run.cloud("1.query.0")


# ---- from seeds ------------------------------------------------------------------------------------------------------


def test_mutants_are_refused_or_true(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    fuzz = script("fuzz_sitemap")
    model = make_mapped("camembert")
    ends = [fuzz.try_mutant(seed, tmp_path, model) for seed in range(300)]
    assert not [(seed, one) for seed, one in enumerate(ends) if one.what == "failed"]
    assert {one.what for one in ends} == {"opened", "refused"}
