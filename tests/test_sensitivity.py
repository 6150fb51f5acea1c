"""What each site can spare: measured against a model pruned as a whole, estimated against finite differences."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import obce
import pytest
import torch
from obce.corpus import tokenize
from obce.plan import plan, single_cuts
from obce.prune import prune
from obce.scoring import score
from obce.sensitivity import sensitivity
from obce.sites import find_sites
from scipy.stats import spearmanr

if TYPE_CHECKING:
    from collections.abc import Callable

    from obce.corpus import TokenBatches
    from obce.scores import Scores
    from transformers import BertModel, PreTrainedTokenizerBase


@pytest.fixture(scope="module")
def model(make_bert: Callable[..., BertModel]) -> BertModel:
    return make_bert(seed=3).eval()


@pytest.fixture(scope="module")
def texts(texts: list[str]) -> list[str]:
    return texts[:60]


@pytest.fixture(scope="module")
def parts(texts: list[str], tiny_tokenizer: PreTrainedTokenizerBase) -> tuple[TokenBatches, TokenBatches]:
    return tokenize(texts[:40], tiny_tokenizer, max_length=32), tokenize(texts[40:], tiny_tokenizer, max_length=32)


@pytest.fixture(scope="module")
def scores(model: BertModel, texts: list[str], tiny_tokenizer: PreTrainedTokenizerBase) -> Scores:
    return score(model, tiny_tokenizer, texts, max_length=32, cloud_texts=40, effect_texts=60)


def vectors(model: Any, batches: TokenBatches, read: str) -> torch.Tensor:
    found = []
    with torch.no_grad():
        for batch in batches:
            hidden = model(**batch.inputs).last_hidden_state
            mask = batch.inputs["attention_mask"][..., None]
            found.append(hidden[:, 0] if read == "cls" else (hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(found).double()


@pytest.mark.parametrize("read", ["cls", "mean"])
def test_the_last_layer_is_measured_as_a_whole_pruned_model_is(
    model: BertModel, scores: Scores, parts: tuple[TokenBatches, TokenBatches], read: str
) -> None:
    """Before the last layer nothing is cut, so a model pruned there alone is repaired there alone."""
    last = model.config.num_hidden_layers - 1
    curves = sensitivity(model, scores, *parts, how="measured", units=("intermediate",), levels=(0.5,), read=read)
    ((share, cut),) = single_cuts(scores, "effect", last, "intermediate", (0.5,))
    whole = plan(scores, keep=1.0)
    small = prune(model, type(whole)(**{**vars(whole), "kept": cut.kept}), texts=parts[0])
    dense = vectors(model, parts[1], read)
    lost = (vectors(small, parts[1], read) - dense).square().sum() / (dense - dense.mean(0)).square().sum()
    assert curves[f"{last}.intermediate"][0] == (0.0, 0.0)
    assert curves[f"{last}.intermediate"][1] == (share, pytest.approx(float(lost), rel=1e-3))


@pytest.mark.parametrize("how", ["estimated", "measured"])
def test_every_site_is_looked_at_and_a_plan_spends_by_it(
    model: BertModel, scores: Scores, parts: tuple[TokenBatches, TokenBatches], how: Any
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = []
    curves = sensitivity(model, scores, *parts, how=how, progress=lambda at, of: done.append((at, of)))
    layers = model.config.num_hidden_layers
    assert list(curves) == [f"{i}.{unit}" for i in range(layers) for unit in ("query_key", "value", "intermediate")]
    if how == "estimated":  # half for the moments layer by layer, half for the batches held out, here one
        assert done == [*(((i + 1) / 2, layers) for i in range(layers)), (layers, layers)]
    else:
        assert done == [(i + 1, layers) for i in range(layers)]
    assert all(parameter.requires_grad for parameter in model.parameters())
    for curve in curves.values():
        shares, losses = np.array(curve).T
        assert (np.diff(shares) > 0).all()
        assert np.isfinite(losses).all() and (losses[1:] > 0).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    made = plan(scores, keep=0.6, of="encoder", sensitivity=curves)
    assert (curves.how, made.shares) == (how, how)
    assert made.kept_share <= 0.6
    widths = {name: len(kept) for name, kept in made.kept.items()}
    assert widths != {name: len(kept) for name, kept in plan(scores, keep=0.6, of="encoder").kept.items()}


def test_single_cuts_name_the_lowest_scores_of_one_unit(scores: Scores) -> None:
    for share, cut in single_cuts(scores, "std", 1, "query_key", (0.25, 0.5)):
        assert set(cut.kept) == {"1.query", "1.key"}
        assert cut.layers_dropped == tuple(i for i in scores.layers() if i != 1)
        assert len(cut.kept["1.query"]) == pytest.approx((1 - share) * 32)
    (_, by_clouds), (_, by_neurons) = (
        next(single_cuts(scores, "std", 1, "heads", (0.25,), head_score=name)) for name in ("entropy", None)
    )
    assert by_clouds.kept != by_neurons.kept
    assert list(single_cuts(scores, "std", 0, "value", (0.5,))) == [], "constant at [CLS], so std ranks none"
    assert len(list(single_cuts(scores, "std", 1, "query_key", (0.9, 0.99, 1.0)))) == 1, "one stays in each head"
    ((share, cut),) = single_cuts(scores, "std", 1, "query_key", (0.01, 0.02))
    assert (share, len(cut.kept["1.query"])) == (1 / 8, 28), "one of eight in each of four heads, and no less"


# ---- estimated

UNITS = ("query_key", "value", "intermediate", "heads", "attention_output", "output")
SEEN_AT = {"query_key": "key", "heads": "value"}
STEP, RIDGE = 1e-4, 0.01


def ridge(covariance: np.ndarray, kept: list[int], gone: list[int]) -> np.ndarray:
    """[kept, gone], weights of the best linear predictor, with a share of the mean variance of both as ridge."""
    square, scale = covariance[np.ix_(kept, kept)], covariance.diagonal()[kept + gone].mean()
    return np.linalg.solve(square + RIDGE * scale * np.eye(len(kept)), covariance[kept][:, gone])


def heard(model: Any, name: str, on_input: bool, batches: TokenBatches) -> list[np.ndarray]:
    """What a Linear takes in or gives of each text, [tokens, width]."""
    found = {}
    module = model.get_submodule(name)
    for batch in batches:
        held: list[torch.Tensor] = []
        hooks = (
            module.register_forward_pre_hook(lambda _m, args, held=held: held.append(args[0]))
            if on_input
            else module.register_forward_hook(lambda _m, _a, out, held=held: held.append(out))
        )
        with torch.no_grad():
            model(**batch.inputs)
        hooks.remove()
        for row, text in enumerate(batch.indices.tolist()):
            found[text] = held[0][row, batch.inputs["attention_mask"][row].bool()].numpy()
    return [found[text] for text in range(len(found))]


def predictor(site: Any, kept: list[int], gone: list[int], heads: int, values: list[np.ndarray]) -> Any:
    """What is left of the columns that go, [tokens, width] -> [tokens, gone]."""
    tokens = np.concatenate(values)
    if site.kind == "key":
        tokens = np.concatenate([text - text.mean(0) for text in values])
        size, weights = tokens.shape[1] // heads, np.zeros((len(kept), len(gone)))
        for head in range(heads):
            stay, go = ([i for i in part if i // size == head] for part in (kept, gone))
            if stay and go:
                rows, columns = [kept.index(i) for i in stay], [gone.index(i) for i in go]
                weights[np.ix_(rows, columns)] = ridge(tokens.T @ tokens / len(tokens), stay, go)
        return lambda x: x[:, gone] - x[:, kept] @ weights
    mean = tokens.mean(0)
    if site.reader is None:
        return lambda x: (x - mean)[:, gone]
    weights = ridge(np.cov(tokens.T, bias=True), kept, gone)
    return lambda x: (x - mean)[:, gone] - (x - mean)[:, kept] @ weights


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("read", ["cls", "tokens"])
def test_estimates_are_slopes_of_what_is_read(
    make_bert: Callable[..., BertModel], texts: list[str], tiny_tokenizer: Any, unit: str, read: str
) -> None:
    """The neurons that go are moved a small step towards what the others say of them, text by text, in float64."""
    model: Any = make_bert(seed=5, num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=24)
    model = model.double().eval()
    scores = score(model, tiny_tokenizer, texts, max_length=32, cloud_texts=0, effect_texts=40)
    fit, held = (tokenize(part, tiny_tokenizer, max_length=32, batch_size=7) for part in (texts[:30], texts[30:40]))
    curves = sensitivity(
        model, scores, fit, held, units=(unit,), levels=(0.5,), read=read, ridge=RIDGE, seed=11, how="estimated"
    )
    for layer in range(2):
        ((share, cut),) = single_cuts(scores, "effect", layer, unit, (0.5,))
        (site,) = (one for one in find_sites(model) if one.name == f"{layer}.{SEEN_AT.get(unit, unit)}")
        name, on_input = site.reader or site.writer, site.reader is not None
        kept = list(cut.kept[site.name])
        gone = [i for i in range(site.width) if i not in kept]
        left = predictor(site, kept, gone, 2, heard(model, name, on_input, fit))
        module, lost, vectors = model.get_submodule(name), 0.0, []

        def moved(x: torch.Tensor, step: float, left: Any = left, gone: list[int] = gone) -> torch.Tensor:
            x = x.clone()
            x[0, :, gone] -= step * torch.from_numpy(left(x[0].numpy()))
            return x

        for text, words in enumerate(texts[30:40]):
            inputs = tiny_tokenizer(words, truncation=True, max_length=32, return_tensors="pt")
            aims = []
            for step in (STEP, -STEP, 0.0):
                handle = (
                    module.register_forward_pre_hook(lambda _m, args, step=step: (moved(args[0], step),))
                    if on_input
                    else module.register_forward_hook(lambda _m, _a, out, step=step: moved(out, step))
                )
                with torch.no_grad():
                    hidden = model(**inputs).last_hidden_state[0]
                handle.remove()
                hidden = hidden / len(hidden) ** 0.5 if read == "tokens" else hidden[0]
                drawn = np.random.default_rng([11, text]).standard_normal(hidden.shape, np.float32)
                aims.append(float((hidden * torch.from_numpy(drawn)).sum()))
            lost += ((aims[0] - aims[1]) / (2 * STEP)) ** 2
            vectors.append(hidden.reshape(-1, hidden.shape[-1]).numpy())
        # of every token with the weight 1 / tokens, of which the root is in the vectors already
        roots = np.concatenate([np.full((len(v), 1), len(v) ** -0.5) for v in vectors])
        every = np.concatenate(vectors)
        mean = (every * roots).sum(0) / np.square(roots).sum()
        whole = np.square(every - roots * mean).sum()
        assert curves[f"{layer}.{unit}"] == [(0.0, 0.0), (share, pytest.approx(lost / whole, rel=1e-4))]


def test_estimates_do_not_depend_on_how_many_layers_are_held_at_once(
    model: BertModel, scores: Scores, parts: tuple[TokenBatches, TokenBatches], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[float] = []
    at_once = sensitivity(model, scores, *parts)
    monkeypatch.setattr(importlib.import_module("obce.sensitivity"), "_HELD_BYTES", 1)
    assert sensitivity(model, scores, *parts, progress=lambda at, _of: done.append(at)) == at_once
    assert done == [0.5, 1, 1.5, 2, 2.5, 3], "a pass for each layer"
    with torch.inference_mode():
        assert sensitivity(model, scores, *parts) == at_once


def test_estimates_are_near_what_is_measured(
    model: BertModel, scores: Scores, parts: tuple[TokenBatches, TokenBatches]
) -> None:
    """To first order and with one random direction for each of 20 texts, so not the same, but in the same order."""
    ways: tuple[Any, ...] = ("estimated", "measured")
    found = [sensitivity(model, scores, *parts, how=how, levels=(0.25, 0.75)) for how in ways]
    losses = np.array([[loss for curve in curves.values() for _, loss in curve[1:]] for curves in found])
    assert np.abs(np.log(losses[0] / losses[1])).mean() < np.log(2)
    assert spearmanr(*losses).statistic > 0.9


def test_a_third_of_the_texts_is_held_out(
    model: BertModel, scores: Scores, texts: list[str], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    corpus = obce.read_corpus(texts)
    order = corpus.order(3)
    fit, held = (
        tokenize(corpus.entries(part), tiny_tokenizer, max_length=32, batch_tokens=4096)
        for part in (order[: 2 * len(corpus) // 3], order[2 * len(corpus) // 3 :])
    )
    found = sensitivity(model, scores, texts, tokenizer=tiny_tokenizer, max_length=32, seed=3)
    assert found == sensitivity(model, scores, fit, held, seed=3)
    with pytest.raises(ValueError, match="held_out is not given: give other TokenBatches, or a corpus"):
        sensitivity(model, scores, fit)
    with pytest.raises(ValueError, match="held_out is given, but texts is no TokenBatches"):
        sensitivity(model, scores, texts, held)
    with pytest.raises(ValueError, match="texts has 5 distinct ones, expected at least 6"):
        sensitivity(model, scores, texts[:5], tokenizer=tiny_tokenizer)


def test_an_unknown_way_is_refused(model: BertModel, scores: Scores, parts: tuple[TokenBatches, TokenBatches]) -> None:
    size = {"units": ("heads",), "head_score": "size"}
    for wrong, words in (
        ({"units": ("layers",)}, "units is"),
        (size, "head_score is"),
        ({"score": "x"}, "score is 'x'"),
        ({"ridge": -1.0}, "ridge is -1.0, expected a finite share of 0 or more"),
        ({"ridge": float("nan")}, "ridge is nan"),
    ):
        for how in ("estimated", "measured"):
            with pytest.raises(ValueError, match=words):
                sensitivity(model, scores, *parts, how=how, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="how is 'guessed', expected 'estimated' or 'measured'"):
        sensitivity(model, scores, *parts, how="guessed")  # type: ignore[arg-type]
