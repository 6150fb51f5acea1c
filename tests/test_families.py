"""Every family of encoders goes the whole way: sites, scores, plan, cut, repair, file and back, with all its heads."""

from __future__ import annotations

import copy
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
from obce.corpus import tokenize
from obce.evaluate import count_parameters, flops, weight_bytes
from obce.finetune import with_head
from obce.glue import TASKS
from obce.layernorm import layernorms
from obce.prune import masked, prune
from obce.run import load_model
from obce.sites import LAYOUTS, SITE_KINDS, find_sites, model_hash, usable_max_length

from tiny import HEADS, HIDDEN, INNER, LAYERS, PREFIXES, make_encoder, make_plan

if TYPE_CHECKING:
    from obce.plan import Plan
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COMMON = ["MaskedLM", "SequenceClassification", "MultipleChoice", "TokenClassification", "QuestionAnswering"]
HEADS_OF = dict.fromkeys(PREFIXES, COMMON)
HEADS_OF["bert"] = [*COMMON, "PreTraining", "NextSentencePrediction"]
HEADS_OF["electra"] = [*COMMON, "PreTraining"]
EVERY = [(family, head) for family in PREFIXES for head in ("", *HEADS_OF[family])]
EAGER = ("deberta-v2", "mpnet")  # transformers has no other attention for these
SHARED_BIASES = "all layers of an MPNet share the position biases of its heads"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tiny one without token types, which some of the families do not have."""
    found: Any = copy.deepcopy(tiny_tokenizer)
    found.model_input_names = ["input_ids", "attention_mask"]
    return found


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 200, (3, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 7:] = mask[2, 4:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@torch.no_grad()
def answers(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model says, of the real tokens, in one row."""
    if type(model).__name__.endswith("MultipleChoice"):
        inputs = {name: tensor[:, None].repeat(1, 2, 1) for name, tensor in inputs.items()}
    real = inputs["attention_mask"].bool()
    found = [one for one in model(**inputs).to_tuple() if isinstance(one, torch.Tensor)]
    rows = [one[real] if one.shape[: real.ndim] == real.shape else one for one in found]
    return torch.cat([one.flatten().double() for one in rows])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("family", PREFIXES)
def test_sites(family: str) -> None:
    model = make_encoder(family, "SequenceClassification")
    sites = find_sites(model)
    assert [site.name for site in sites] == [f"{layer}.{kind}" for layer in range(LAYERS) for kind in SITE_KINDS]
    body = model.base_model
    for site in sites:
        assert (
            body.get_submodule(site.writer).out_features == site.width == (INNER if "interm" in site.name else HIDDEN)
        )
        if site.reader is not None:
            assert body.get_submodule(site.reader).in_features == site.width
    assert model_hash(model) == model_hash(body)
    with torch.no_grad():
        body.get_submodule(sites[2].writer).weight[0, 0] += 1
    assert model_hash(model) != model_hash(make_encoder(family, "SequenceClassification"))
    assert len(layernorms(model)) == 1 + 2 * LAYERS


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
    model = make_encoder(family, "SequenceClassification").double()
    labels = np.arange(len(texts)) % 2
    scores = obce.score(model, tokenizer, texts, memory=memory, labels=labels, cloud_texts=40)
    assert {"rf", "std", "effect", "effect_abs", "spread", "magnitude", "taylor", "random"} <= set(scores.names())
    assert scores.meta["read"] == "head"
    assert np.isfinite(scores.column("effect")).all()
    units = ("query_key", "value", "intermediate") if memory == "model" or family == "mpnet" else ("heads", "output")
    plan = obce.plan(scores, model, keep=0.6, of="encoder", units=units)
    batches = tokenize(texts, tokenizer, max_length=64)
    before = answers(model, inputs)
    for repair in ("none", "mean", "least_squares"):
        how: dict[str, Any] = {"scores": scores} if repair == "mean" else {}
        if repair == "least_squares":
            how = {"texts": batches}
        small = prune(model, plan, repair=repair, **how)
        assert type(small).__name__ == f"Obce{type(model).__name__}"
        assert count_parameters(small) == (plan.after.parameters, plan.after.encoder)
        assert weight_bytes(small) == plan.after.bytes
        assert flops(small, length=64) == flops_at(plan, small, 64)
        with masked(model, plan, repair=repair, **how):
            assert distance(answers(small, inputs), answers(model, inputs)) < 1e-8
        assert distance(answers(small, inputs), before) > 1e-3
    assert torch.equal(answers(model, inputs), before)
    errors = small.config.obce["least_squares"]["errors"]
    assert len(errors) == 2 * LAYERS
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
    kept |= {"0.query": (0, 9, 17, 25), "0.key": (0, 9, 17, 25), "1.value": (1, 2, 8, 9, 16, 17, 30, 31)}
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
    if "MaskedLM" in head:
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("family", PREFIXES)
def test_hidden_states_and_gradients(family: str, inputs: dict[str, torch.Tensor]) -> None:
    small: Any = prune(
        make_encoder(family), make_plan(make_encoder(family), {"0.intermediate": (1, 2, 3)}), repair="none"
    )
    small.set_attn_implementation("eager")
    told = small(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(told.hidden_states) == LAYERS + 1
    assert [tuple(one.shape) for one in told.attentions] == [(3, HEADS, 11, 11)] * LAYERS
    small.train()
    small(**inputs).last_hidden_state.sum().backward()
    inner = small.get_submodule(f"{LAYOUTS[family].stack}.0.{LAYOUTS[family].writers['intermediate']}")
    assert inner.weight.shape == (3, HIDDEN)
    assert inner.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", PREFIXES)
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
    model = make_encoder(family, "TokenClassification")
    plan = make_plan(model, {"1.intermediate": (3, 4, 5)}, dropped=(0,))
    small: Any = prune(model, plan, repair="none")
    assert small.config.num_hidden_layers == 1
    with masked(model, plan, repair="none"):
        assert distance(answers(small, inputs), answers(model, inputs)) < 1e-5


def test_heads_of_mpnet_stay(tokenizer: Any, texts: list[str]) -> None:
    model = make_encoder("mpnet")
    with pytest.raises(ValueError, match=SHARED_BIASES):
        obce.plan(obce.score(model, tokenizer, texts[:30]), model, keep=0.8, units=("heads",))
    gone: dict[str, tuple[int, ...]] = {f"0.{kind}": tuple(range(16)) for kind in ("query", "key", "value")}
    with pytest.raises(ValueError, match=SHARED_BIASES):
        prune(model, make_plan(model, gone), repair="none")


def test_every_class_belongs_to_a_family() -> None:
    """No class of a family was forgotten here, and no head that transformers has for a family is missing there."""
    ours = {name for name in modeling_obce.__all__ if "For" in name}
    assert ours == {f"Obce{PREFIXES[family]}For{head}" for family, head in EVERY if head}
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
        assert all(float(cell) < 1e-5 for cell in row[1:6])
        assert row[6].split(", ") == HEADS_OF[family]


@st.composite
def cuts(draw: st.DrawFn, whole_heads: bool) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """Kept indices of any sites, and layers dropped."""
    size = HIDDEN // HEADS
    dropped = tuple(sorted(draw(st.sets(st.integers(0, LAYERS - 1), max_size=LAYERS - 1))))
    kept = {}
    for layer in set(range(LAYERS)) - set(dropped):
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        heads = sorted(draw(st.sets(st.integers(0, HEADS - 1)))) if whole_heads else list(range(HEADS))

        def some(width: int, count: int, rng: np.random.Generator = rng) -> list[int]:
            return sorted(int(i) for i in rng.choice(width, count, replace=False))

        if draw(st.booleans()):
            pairs, values = draw(st.integers(1, size)), draw(st.integers(1, size))
            kept[f"{layer}.query"] = tuple(h * size + i for h in heads for i in some(size, pairs))
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
    rng = np.random.default_rng(1)
    means = {site.name: rng.normal(0.3, 0.5, site.width) for site in find_sites(models["eager"])}

    @settings(max_examples=200, deadline=None)
    @given(
        cut=cuts(family != "mpnet"), repair=st.sampled_from(["none", "mean"]), attention=st.sampled_from(sorted(models))
    )
    def check(cut: Any, repair: str, attention: str) -> None:
        model = models[attention]
        plan = make_plan(model, *cut)
        how: dict[str, Any] = {"repair": repair, "scores": table(model, means) if repair == "mean" else None}
        small = prune(model, plan, **how)
        with masked(model, plan, **how):
            assert distance(answers(small, inputs), answers(model, inputs)) < 1e-5

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
