"""What each part of a model can spare: how far the vector that is read moves when a share of one unit goes.

One layer and one unit at a time is cut at a few levels, the neurons that stay say what they can of those that go, and
what is left is measured on other texts; all else is whole. `obce.plan(sensitivity=...)` then takes each parameter where
it costs least. There are two ways:

- estimated: to first order. Let a_f be neuron f's output, p_f what the best linear predictor makes of it from the
  neurons of its site that stay, and g_f the gradient of <v_s, read(s)> with respect to a_f, v_s a random direction of
  the text s. The square of

      sum over tokens t, and neurons f that go, of g_f(t) (a_f(t) - p_f(t))

  has over v_s the mean |change of read(s)|^2. It is the effect cloud (`obce.effects`) of all that goes together, after
  what stays has been heard. One forward and one backward pass serve every site and level; of keys, g and a are those of
  the key, which is the product of query and key counted once.
- measured: each cut is made, repaired by least squares and passed through the layers behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from obce.capture import eval_mode, precise_products, run_to_stop, stopping_before
from obce.corpus import TokenBatches, corpus_of
from obce.device import upload
from obce.effects import Watch, no_weight_gradients, projection, read_hidden, reading_of, what_is_read
from obce.plan import Curves, check_request, check_units, default_units, single_cuts
from obce.prune import at_most, prune, tokenised
from obce.repair import RIDGE, InputMoments, KeyMoments, Passing, fit_layer, start, through
from obce.sites import base_model, find_sites, layers_of, layout_of, position_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from obce.corpus import Corpus
    from obce.plan import Plan
    from obce.scores import Scores
    from obce.sites import Layout, Site

LEVELS = {"estimated": (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.9375), "measured": (0.25, 0.5, 0.75, 0.9)}
"""Levels if nothing else is said: where one costs a cut and passes of its own, fewer."""

SENSITIVITY_TEXTS = 450
"""Texts that suffice: two thirds for the repairs, one to measure on."""

How = Literal["estimated", "measured"]

_LEAST_TEXTS = 6

# Site in which a unit's neurons are looked at, where its name differs: without its value a head says nothing.
_SEEN_AT = {"query_key": "key", "heads": "value"}

# Values, gradients and moments of the sites that one pair of passes serves.
_HELD_BYTES = 3 << 30


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked of either way: the arguments of `sensitivity`, with plans in the place of scores and levels."""

    batches: TokenBatches
    held_out: TokenBatches
    cuts: Callable[[int, str], Iterator[tuple[float, Plan]]]
    units: Sequence[str]
    read: str
    ridge: float
    seed: int
    progress: Callable[[float, float], None]


def sensitivity(
    model: PreTrainedModel,
    scores: Scores,
    texts: Corpus | Sequence[str] | TokenBatches,
    held_out: TokenBatches | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    how: How = "estimated",
    score: str = "effect",
    units: Sequence[str] | None = None,
    head_score: str | None = None,
    levels: Sequence[float] | None = None,
    read: str = "auto",
    ridge: float = RIDGE,
    seed: int = 0,
    progress: Callable[[float, float], None] | None = None,
) -> Curves:
    """What every layer and unit loses when a share of it goes.

    Memory: estimated, up to 3 GiB, or what one layer takes: 8 bytes x widths x (tokens held out + width); beside it the
    activations of one batch of a backward pass, and some matrices of the widest site's moments. Measured, three hidden
    states of every token and a copy of the embeddings.

    Arithmetic: estimated, a forward and a backward pass for as many layers as fit that memory; measured, units x
    levels x (one layer on the texts of the repair, and half the layers on those held out), a layer.

    Args:
        model: The dense model, not changed.
        scores: Its scores.
        texts: Texts, or pictures for a model that reads them; of a longer list `SENSITIVITY_TEXTS`, drawn evenly. Two
            thirds of them are for the repairs, and the outcome is measured on the others. `TokenBatches` are all for
            the repairs.
        held_out: With `TokenBatches`: other texts, that the outcome is measured on.
        tokenizer: Tokenizer or image processor of the model, with `texts` (default: the one saved beside the model).
        max_length: Tokens a text is cut to (default: 128, or the most the model takes).
        how: `"estimated"` or `"measured"`.
        score: Score that says which neurons of a unit go first.
        units: As in `obce.plan`.
        head_score: As in `obce.plan`.
        levels: Shares removed of what may be removed, ascending (default: those of `LEVELS`).
        read: What of the model is not to move: `"cls"`, `"last"`, `"mean"`, `"tokens"`, `"head"` or `"logits"`;
            `"auto"`: what its head takes from the encoder. Measured, `"head"` and `"logits"` stand for the token they
            are made of.
        ridge: As in `obce.prune`.
        seed: Of the random directions, and of the texts that are drawn.
        progress: Called with (layers done, layers).

    Returns:
        `"3.value"` -> [(0, 0), (share removed, share of the variance of what is read that is lost), ...].

    Raises:
        ValueError: `how` is neither, a score or unit is unknown, a unit cannot be cut, there are fewer than 6 texts, or
            `TokenBatches` without others held out, or what is to be measured is known by a site map alone.
    """
    if how not in ("estimated", "measured"):
        raise ValueError(f"how is {how!r}, expected 'estimated' or 'measured'.")
    batches, held_out = _parts(model, texts, held_out, tokenizer, max_length, seed)
    read = reading_of(model) if read == "auto" else read
    units = default_units(scores.meta["architecture"]) if units is None else units
    for unit in units:  # alone: these are not one plan's
        ranks = head_score if unit == "heads" else None
        check_request(keep=1.0, of="encoder", preset=None, score=None, floor=0.0, units=(unit,), head_score=ranks)
    check_units(scores.meta["architecture"], units)
    progress = progress or (lambda done, total: None)
    shares = LEVELS[how] if levels is None else levels

    def cuts(layer: int, unit: str) -> Iterator[tuple[float, Plan]]:
        return single_cuts(scores, score, layer, unit, shares, head_score=head_score)

    asked = _Question(batches, held_out, cuts, units, read, ridge, seed, progress)
    return (_estimated if how == "estimated" else _measured)(model, asked)


def _parts(
    model: PreTrainedModel,
    texts: Corpus | Sequence[str] | TokenBatches,
    held_out: TokenBatches | None,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int | None,
    seed: int,
) -> tuple[TokenBatches, TokenBatches]:
    """Texts for the repairs, and others."""
    if isinstance(texts, TokenBatches):
        if held_out is None:
            raise ValueError("texts is TokenBatches, but held_out is not given: give other TokenBatches, or a corpus")
        return texts, held_out
    if held_out is not None:
        raise ValueError("held_out is given, but texts is no TokenBatches, of which a third is held out: leave it out")
    corpus = corpus_of(texts, pictures=layout_of(model).pictures)
    if len(corpus) < _LEAST_TEXTS:
        raise ValueError(
            f"texts has {len(corpus)} distinct ones, expected at least {_LEAST_TEXTS} to find what sites can spare: "
            "give more, or plan with uniform shares"
        )
    order = corpus.order(seed)[: at_most(model, SENSITIVITY_TEXTS)]
    some = 2 * len(order) // 3
    first, others = (
        tokenised(model, corpus.entries(part), tokenizer, max_length) for part in (order[:some], order[some:])
    )
    return first, others


@torch.no_grad()
def _measured(model: PreTrainedModel, asked: _Question) -> Curves:
    base = base_model(model)
    if layout_of(base).site_map is not None:
        raise ValueError(
            f"model is a {type(model).__name__}, whose site map does not say what its layers are given, expected a "
            "family that obce knows by itself: plan with estimated shares."
        )
    read = position_of(model) if asked.read in ("head", "logits") else asked.read
    layers = list(layers_of(base))
    curves: dict[str, list[tuple[float, float]]] = {}
    with eval_mode(base), precise_products(next(base.parameters()).device):
        fit, held = start(base, asked.batches), start(base, asked.held_out)
        reference = list(_read(base, 0, held, read))
        whole = _variance(torch.cat(reference))
        for layer, block in enumerate(layers):
            for unit in asked.units:
                points = [(0.0, 0.0)]
                for share, cut in asked.cuts(layer, unit):
                    # the small model has this layer alone: what comes before and after it is dense
                    small = base_model(prune(base, cut, repair="none"))
                    narrow = layers_of(small)[0]
                    own = [replace(at, small=at.dense) for at in fit]
                    kept = torch.tensor(cut.kept.get(f"{layer}.query", range(base.config.hidden_size)))
                    for _ in fit_layer(base, layer, narrow, own, kept, asked.ridge):
                        pass
                    moved = [replace(at, dense=through(narrow, at.dense, at.small_given[layer])) for at in held]
                    lost = 0.0
                    for now, then in zip(_read(base, layer + 1, moved, read), reference, strict=True):
                        lost += float((now - then).double().square().sum())
                    points.append((share, lost / whole if whole > 0 else 0.0))
                curves[f"{layer}.{unit}"] = points
            for at in (*fit, *held):
                at.dense = at.small = through(block, at.dense, at.given[layer])
            asked.progress(layer + 1, len(layers))
    return Curves(curves, "measured")


def _read(body: PreTrainedModel, first: int, passing: Sequence[Passing], read: str) -> Iterator[torch.Tensor]:
    """What is read of each batch after the layers from number `first` on."""
    layers, last = layers_of(body), layout_of(body).last_norm
    for at in passing:
        hidden = at.dense
        for layer in range(first, len(layers)):
            hidden = through(layers[layer], hidden, at.given[layer])
        if last is not None:
            hidden = body.get_submodule(last)(hidden)
        found = read_hidden(hidden, at.real, read)
        yield found[at.real] if read == "tokens" else found


def _variance(vectors: torch.Tensor, weights: torch.Tensor | None = None) -> float:
    """Sum of the squared distances of vectors [m, d] from their mean, each with its weight, [m] (None: 1)."""
    vectors = vectors.double()
    weights = torch.ones(len(vectors), device=vectors.device) if weights is None else weights
    weights = weights.to(vectors.dtype)[:, None]
    mean = (weights * vectors).sum(0) / weights.sum()
    return float((weights * (vectors - mean).square()).sum())


# ---- estimated


class _Said:
    """What the neurons of a site that stay say of those that go, from unlabelled texts."""

    def __init__(self, site: Site, layout: Layout, heads: int) -> None:
        self.site = site
        self.keys = self.inputs = None
        if site.kind != "key":
            self.inputs = InputMoments()
        elif not layout.rotary and not layout.whole and layout.site_map is None:
            self.keys = KeyMoments(heads)

    def add(self, values: torch.Tensor, real: torch.Tensor) -> None:
        """Values [b, T, columns] of the real tokens [b, T]."""
        if self.inputs is not None:
            self.inputs.add(values[real])
        elif self.keys is not None:
            self.keys.add(values, real)

    def unsaid(self, values: torch.Tensor, kept: torch.Tensor, gone: torch.Tensor, ridge: float) -> torch.Tensor:
        """[m, gone], what is left of the columns that go, of values [m, columns], as `obce.repair` mends them."""
        if self.inputs is None:
            if self.keys is None:
                return values[:, gone]
            said = self.keys.predictors(kept.cpu(), ridge)[gone].to(values.dtype)
            return values[:, gone] - values[:, kept] @ said.T
        centred = values - self.inputs.mean().to(values.dtype)
        if self.site.reader is None:  # a row gets its mean
            return centred[:, gone]
        return centred[:, gone] - centred[:, kept] @ self.inputs.predictors(kept, gone, ridge).to(values.dtype)


def _estimated(model: PreTrainedModel, asked: _Question) -> Curves:
    body = base_model(model)
    layout, device = layout_of(body), next(body.parameters()).device
    sites = {(site.layer, site.kind): site for site in find_sites(body)}
    count, heads = len(layers_of(body)), int(body.config.num_attention_heads)
    tokens = sum(int(batch.real.sum()) for batch in asked.held_out)
    curves: dict[str, list[tuple[float, float]]] = {}
    with eval_mode(model), precise_products(device), no_weight_gradients(model):
        whole = None
        for layers in _together(sites, asked.units, count, tokens):
            seen = {(layer, unit): sites[layer, _SEEN_AT.get(unit, unit)] for layer in layers for unit in asked.units}
            here = {site.name: site for site in seen.values()}
            said = {name: _Said(site, layout, heads) for name, site in here.items()}
            _hear(body, asked.batches, said, layers[-1] + 1)
            values, gradients, texts, spread = _effects(model, asked, list(here.values()), tokens, layers[0])
            whole = spread if whole is None else whole
            for (layer, unit), site in seen.items():
                points = [(0.0, 0.0)]
                for share, cut in asked.cuts(layer, unit):
                    kept = site.read_by(torch.tensor(cut.kept[site.name], dtype=torch.int64)).to(device)
                    stays = torch.zeros(values[site.name].shape[1], dtype=torch.bool, device=device)
                    stays[kept] = True
                    gone = torch.nonzero(~stays).flatten()
                    left = said[site.name].unsaid(values[site.name], kept, gone, asked.ridge)
                    moved = torch.zeros(asked.held_out.n_texts, dtype=torch.float64, device=device)
                    moved.index_add_(0, texts, (left * gradients[site.name][:, gone]).sum(1, dtype=torch.float64))
                    points.append((share, float(moved.square().sum()) / whole if whole > 0 else 0.0))
                curves[f"{layer}.{unit}"] = points
            asked.progress(layers[-1] + 1, count)
    return Curves(curves, "estimated")


def _together(
    sites: Mapping[tuple[int, str], Site], units: Sequence[str], count: int, tokens: int
) -> Iterator[list[int]]:
    """Layers in runs, the sites of each of which are held at once."""
    run: list[int] = []
    held = 0
    for layer in range(count):
        here = [sites[layer, kind] for kind in {_SEEN_AT.get(unit, unit) for unit in units}]
        need = sum(8 * site.width * site.groups * (tokens + site.width * site.groups) for site in here)
        if run and held + need > _HELD_BYTES:
            yield run
            run, held = [], 0
        run.append(layer)
        held += need
    yield run


@torch.no_grad()
def _hear(body: PreTrainedModel, batches: TokenBatches, said: Mapping[str, _Said], stop: int) -> None:
    """One pass over the texts that the repairs are fitted on, up to layer `stop`."""
    device = next(body.parameters()).device
    real = torch.empty(0)

    def take(site: Site, values: torch.Tensor, _gradient: torch.Tensor | None) -> None:
        said[site.name].add(values, real)

    layers = layers_of(body)
    early = stop < len(layers) and layout_of(body).site_map is None  # a map's layers may be called in another way
    ending = stopping_before(layers[stop], lambda *_: None) if early else nullcontext()
    with Watch(body, [one.site for one in said.values()], take, gradients=False), ending:
        for batch in batches:
            real = upload(batch.real, device).bool()
            inputs = {name: upload(tensor, device) for name, tensor in batch.inputs.items()}
            if early:
                run_to_stop(body, **inputs)
            else:
                body(**inputs)


def _effects(
    model: PreTrainedModel, asked: _Question, sites: Sequence[Site], tokens: int, first: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor, float]:
    """Of each site [tokens, columns] values and gradients; int64 [tokens] texts; the variance of what is read."""
    body = base_model(model)
    weight = next(body.parameters())
    wide = torch.promote_types(weight.dtype, torch.float32)
    held, gradients = (
        {site.name: torch.zeros((tokens, site.width * site.groups), dtype=wide, device=weight.device) for site in sites}
        for _ in range(2)
    )
    real, at = torch.empty(0), slice(0)

    def take(site: Site, values: torch.Tensor, gradient: torch.Tensor | None) -> None:
        if gradient is None:
            raise RuntimeError("effects are taken from gradients")
        held[site.name][at], gradients[site.name][at] = values[real].to(wide), gradient[real].to(wide)

    texts, found, weights = [], [], []
    with torch.enable_grad(), Watch(body, sites, take, first=first):
        for batch in asked.held_out:
            real = upload(batch.real, weight.device).bool()
            at = slice(at.stop, at.stop + int(batch.real.sum()))
            inputs = {name: upload(tensor, weight.device) for name, tensor in batch.inputs.items()}
            vectors = what_is_read(model, inputs, batch, asked.read)
            projection(vectors, batch, asked.seed).backward()  # type: ignore[no-untyped-call]
            texts.append(upload(batch.indices, weight.device)[:, None].expand(real.shape)[real])
            if asked.read == "tokens":  # texts count alike, whatever their length, as they do in the projection
                weights.append((1 / real.sum(1, keepdim=True)).expand(real.shape)[real])
                found.append(vectors.detach()[real])
            else:
                weights.append(torch.ones(len(vectors), device=weight.device))
                found.append(vectors.detach())
    return held, gradients, torch.cat(texts), _variance(torch.cat(found), torch.cat(weights))
