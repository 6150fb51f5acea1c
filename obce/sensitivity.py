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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from obce.capture import eval_mode, first_inputs, precise_products
from obce.corpus import TokenBatches, corpus_of
from obce.device import upload
from obce.effects import Watch, no_weight_gradients, projection, read_hidden, reading_of, what_is_read
from obce.plan import Curves, check_request, check_units, default_units, plan, single_cuts
from obce.prune import at_most, prune, tokenised
from obce.repair import RIDGE, InputMoments, KeyMoments, Passing, check_ridge, fit_layer, start, through
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

ESTIMATE_RIDGE = 0.001
"""Ridge of estimated shares: less than that of repairs, as it stands for no repair, but keeps the factors well."""

How = Literal["estimated", "measured"]

_LEAST_TEXTS = 6

# Site in which a unit's neurons are looked at, where its name differs: without its value a head says nothing.
_SEEN_AT = {"query_key": "key", "heads": "value"}

# Factors of the covariances of the sites that one forward and backward pass serves.
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
    known: Mapping[str, Sequence[tuple[float, float]]]
    on_layer: Callable[[Curves], None]


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
    ridge: float | None = None,
    seed: int = 0,
    progress: Callable[[float, float], None] | None = None,
    known: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    on_layer: Callable[[Curves], None] | None = None,
) -> Curves:
    """What every layer and unit loses when a share of it goes.

    Memory: estimated, 4 bytes x the squares of the sites' widths, up to 3 GiB, or what one layer takes; beside it
    some matrices of the widest site's moments, a hidden state of every token, and the activations of one batch of a
    backward pass. Measured, three hidden states of every token and a copy of the embeddings.

    Arithmetic: estimated, a forward pass of all texts, and a backward pass of those held out, again for every 3 GiB;
    measured, units x levels x (one layer on the texts of the repair, and half the layers on those held out), a layer.

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
        ridge: Measured, as in `obce.prune`. Estimated, a share of the mean variance of all inputs, not of those that
            stay, and `ESTIMATE_RIDGE` by default.
        seed: Of the random directions, and of the texts that are drawn.
        progress: Called with (layers done, layers).
        known: Curves of the same call that are there already: what is known is not looked for again.
        on_layer: Called with the curves so far, after each layer (estimated, after the layers that one backward pass
            serves), so that a run that is cut short can be gone on with by `known`.

    Returns:
        `"3.value"` -> [(0, 0), (share removed, share of the variance of what is read that is lost), ...].

    Raises:
        ValueError: `how` is neither, `ridge` is negative or not finite, a score or unit is unknown, a unit cannot be
            cut, there are fewer than 6 texts, or `TokenBatches` without others held out, or what is to be measured is
            known by a site map alone.
    """
    if how not in ("estimated", "measured"):
        raise ValueError(f"how is {how!r}, expected 'estimated' or 'measured'.")
    ridge = {"estimated": ESTIMATE_RIDGE}.get(how, RIDGE) if ridge is None else ridge
    check_ridge(ridge)
    batches, held_out = _parts(model, texts, held_out, tokenizer, max_length, seed)
    read = reading_of(model, read)
    units = default_units(scores.meta["architecture"]) if units is None else units
    for unit in units:  # alone: these are not one plan's
        ranks = head_score if unit == "heads" else None
        check_request(keep=1.0, of="encoder", preset=None, score=None, floor=0.0, units=(unit,), head_score=ranks)
    check_units(scores.meta["architecture"], units)
    progress = progress or (lambda done, total: None)
    shares = LEVELS[how] if levels is None else levels
    whole = plan(scores, keep=1.0, score=score)

    def cuts(layer: int, unit: str) -> Iterator[tuple[float, Plan]]:
        return single_cuts(scores, score, layer, unit, shares, head_score=head_score, whole=whole)

    asked = _Question(
        batches, held_out, cuts, units, read, ridge, seed, progress, known or {}, on_layer or (lambda curves: None)
    )
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
    first = tokenised(model, corpus.entries(order[:some]), tokenizer, max_length)
    others = tokenised(model, corpus.entries(order[some:]), tokenizer, max_length, gradients=True)
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
                if f"{layer}.{unit}" in asked.known:
                    curves[f"{layer}.{unit}"] = list(asked.known[f"{layer}.{unit}"])
                    continue
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
            asked.on_layer(Curves(curves, "measured"))
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


class _Moments:
    """Second moments of what a site's reader takes in, by which `obce.repair` mends it."""

    def __init__(self, site: Site, layout: Layout, heads: int) -> None:
        self.inputs = self.keys = None
        self.is_read = site.reader is not None
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


class _Estimate:
    """What goes when one unit of a layer is cut at some levels, less what the columns that stay say of it.

    Let the columns stand in an order in which at every level those that stay come first, and L L' be their covariance
    with the ridge. What the first k say of column f is the sum over j < k of L_fj z_j, z = L^-1 (a - mean a), so

        sum over the f that go of g_f (a_f - p_f) = sum over j >= k of z_j (L' g)_j

    and one factor serves every level. Keys are such columns head by head.

    Args:
        site: The site whose columns are looked at.
        cuts: Shares removed and plans, as `single_cuts` yields them.
        moments: Of the site.
        asked: The question.
        dtype: Of the values and gradients to come.
    """

    def __init__(
        self,
        site: Site,
        cuts: Sequence[tuple[float, Plan]],
        moments: _Moments,
        asked: _Question,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.shares = [share for share, _ in cuts]
        gone = torch.ones((len(cuts), site.width * site.groups), dtype=torch.bool)
        for level, (_, cut) in enumerate(cuts):
            gone[level, site.read_by(torch.tensor(cut.kept[site.name], dtype=torch.int64))] = False
        if not bool((gone[1:] >= gone[:-1]).all()):
            raise RuntimeError(f"a neuron of {site.name} that goes at one level stays at the next")
        keys, inputs = moments.keys, moments.inputs
        blocks = 1 if keys is None else keys.heads
        order = torch.argsort(gone.sum(0).view(blocks, -1), stable=True).to(device)
        self.order = (order + order.shape[1] * torch.arange(blocks, device=device)[:, None]).flatten()
        self.gone = gone.to(device).T[self.order].double()
        self.mean = None if inputs is None else inputs.mean().to(dtype)
        factors = None
        if keys is not None:
            factors = keys.factors(order, asked.ridge)
        elif inputs is not None and moments.is_read:  # of a row, which nothing reads, its mean alone is said
            factors = inputs.factor(order[0], asked.ridge)
        self.factors = None if factors is None else factors.to(dtype)  # [blocks, size, size], lower
        self.moved = torch.zeros((asked.held_out.n_texts, len(cuts)), dtype=torch.float64, device=device)

    def add(self, values: torch.Tensor, gradients: torch.Tensor, texts: torch.Tensor) -> None:
        """Values and gradients of tokens, [m, columns], and of which texts they are, int64 [m]."""
        if self.mean is not None:
            values = values - self.mean
        values, gradients = values[:, self.order], gradients[:, self.order]
        if self.factors is not None:
            values, gradients = (x.view(len(x), len(self.factors), -1).transpose(0, 1) for x in (values, gradients))
            values = torch.linalg.solve_triangular(self.factors, values.mT, upper=False).mT
            gradients = gradients @ self.factors
            values, gradients = (x.transpose(0, 1).flatten(1) for x in (values, gradients))
        self.moved.index_add_(0, texts, (values * gradients).double() @ self.gone)

    def curve(self, whole: float) -> list[tuple[float, float]]:
        """Points of the curve; `whole` is the variance of what is read."""
        lost = self.moved.square().sum(0).tolist()
        return [
            (0.0, 0.0),
            *((share, one / whole if whole > 0 else 0.0) for share, one in zip(self.shares, lost, strict=True)),
        ]


@torch.inference_mode(False)
@torch.no_grad()
def _estimated(model: PreTrainedModel, asked: _Question) -> Curves:
    body = base_model(model)
    weight, count = next(body.parameters()), len(layers_of(body))
    wide = torch.promote_types(weight.dtype, torch.float32)
    by_name = {site.name: site for site in find_sites(body)}
    seen = [{unit: by_name[f"{layer}.{_SEEN_AT.get(unit, unit)}"] for unit in asked.units} for layer in range(count)]
    curves: dict[str, list[tuple[float, float]]] = {}
    whole = None
    with eval_mode(model), precise_products(weight.device), no_weight_gradients(model):
        runs = []
        for layers in _runs(body, seen, wide.itemsize):
            names = [f"{layer}.{unit}" for layer in layers for unit in asked.units]
            if all(name in asked.known for name in names):
                curves |= {name: list(asked.known[name]) for name in names}
            else:
                runs.append(layers)
        heard = _heard(body, asked.batches, seen, runs)
        for layers in runs:
            estimates = {}
            for layer in layers:
                moments = next(heard)
                for unit, site in seen[layer].items():
                    cuts = list(asked.cuts(layer, unit))
                    one = _Estimate(site, cuts, moments[site.name], asked, weight.device, wide)
                    estimates[layer, unit] = site, one
                del moments  # before those of the next layer are made
                asked.progress((layers[0] + layer + 1) / 2, count)
            spread = _moved(model, asked, list(estimates.values()), layers)
            whole = spread if whole is None else whole
            curves |= {f"{layer}.{unit}": one.curve(whole) for (layer, unit), (_, one) in estimates.items()}
            asked.on_layer(Curves(curves, "estimated"))
    names = [f"{layer}.{unit}" for layer in range(count) for unit in asked.units]
    return Curves({name: curves[name] for name in names}, "estimated")


def _runs(body: PreTrainedModel, seen: Sequence[Mapping[str, Site]], itemsize: int) -> Iterator[range]:
    """Layers in runs, the factors of each of which are held at once."""
    mapped, heads = layout_of(body).site_map is not None, int(body.config.num_attention_heads)
    start = held = 0
    for layer, sites in enumerate(seen):
        squares = [(site.width * site.groups) ** 2 // (heads if site.kind == "key" else 1) for site in sites.values()]
        need = sum(squares) * (itemsize + (8 if mapped else 0))
        if layer > start and held + need > _HELD_BYTES:
            yield range(start, layer)
            start, held = layer, 0
        held += need
    yield range(start, len(seen))


def _heard(
    body: PreTrainedModel, batches: TokenBatches, seen: Sequence[Mapping[str, Site]], runs: Sequence[range]
) -> Iterator[dict[str, _Moments]]:
    """Of every layer of the runs its sites' moments on the texts that the repairs are fitted on.

    All texts pass through one layer, then through the next. A site map does not say what a layer is given: then
    they pass through the model once a run.
    """
    layout, heads = layout_of(body), int(body.config.num_attention_heads)
    device = next(body.parameters()).device
    moments: dict[str, _Moments] = {}
    real = torch.empty(0)

    def take(site: Site, values: torch.Tensor, _gradient: torch.Tensor | None) -> None:
        moments[site.name].add(values, real)

    def sites_of(layers: range) -> dict[str, Site]:
        return {site.name: site for layer in layers for site in seen[layer].values()}

    if layout.site_map is None:
        passing = [
            (hidden, upload(batch.real, device).bool(), given) for batch, hidden, given in first_inputs(body, batches)
        ]
        for layer, block in enumerate(layers_of(body)):
            asked = any(layer in layers for layers in runs)
            sites = sites_of(range(layer, layer + 1)) if asked else {}
            moments = {name: _Moments(site, layout, heads) for name, site in sites.items()}
            with Watch(body, list(sites.values()), take, gradients=False):
                for at, (hidden, real, given) in enumerate(passing):
                    passing[at] = through(block, hidden, given[layer]), real, given
            if asked:
                yield moments
        return
    for layers in runs:
        sites = sites_of(layers)
        moments = {name: _Moments(site, layout, heads) for name, site in sites.items()}
        with Watch(body, list(sites.values()), take, gradients=False):
            for batch in batches:
                real = upload(batch.real, device).bool()
                body(**{name: upload(tensor, device) for name, tensor in batch.inputs.items()})
        for _ in layers:
            yield moments


def _moved(
    model: PreTrainedModel, asked: _Question, estimates: Sequence[tuple[Site, _Estimate]], layers: range
) -> float:
    """One forward pass over the texts held out, and a backward pass to the first of the layers, for their estimates.

    Returns:
        The variance of what is read.
    """
    body = base_model(model)
    weight, count = next(body.parameters()), len(layers_of(body))
    wide = torch.promote_types(weight.dtype, torch.float32)
    real = of_text = torch.empty(0)

    def take(site: Site, values: torch.Tensor, gradient: torch.Tensor | None) -> None:
        if gradient is None:
            raise RuntimeError("effects are taken from gradients")
        values, gradient = values[real].to(wide), gradient[real].to(wide)
        for where, estimate in estimates:
            if where.name == site.name:
                estimate.add(values, gradient, of_text)

    found, weights, done = [], [], 0
    sites = {site.name: site for site, _ in estimates}
    with torch.enable_grad(), Watch(body, list(sites.values()), take, first=layers.start):
        for batch in asked.held_out:
            real = upload(batch.real, weight.device).bool()
            of_text = upload(batch.indices, weight.device)[:, None].expand(real.shape)[real]
            inputs = {name: upload(tensor, weight.device) for name, tensor in batch.inputs.items()}
            vectors = what_is_read(model, inputs, batch, asked.read)
            projection(vectors, batch, asked.seed).backward()  # type: ignore[no-untyped-call]
            if asked.read == "tokens":  # texts count alike, whatever their length, as they do in the projection
                weights.append((1 / real.sum(1, keepdim=True)).expand(real.shape)[real])
                found.append(vectors.detach()[real])
            else:
                weights.append(torch.ones(len(vectors), device=weight.device))
                found.append(vectors.detach())
            done += len(batch.indices)
            part = done / asked.held_out.n_texts
            asked.progress((layers.start + layers.stop) / 2 + part * len(layers) / 2, count)
    return _variance(torch.cat(found), torch.cat(weights))
