"""What each part of a model can spare: how far the vector that is read moves when a share of one unit goes.

One layer and one unit at a time is cut at a few levels, repaired by least squares on some texts, and measured on
others; all other layers are whole. `obce.plan(sensitivity=...)` then takes each parameter where it costs least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from obce.capture import eval_mode, precise_products
from obce.corpus import TokenBatches
from obce.effects import read_hidden, reading_of
from obce.plan import check_units, default_units, single_cuts
from obce.prune import prune
from obce.repair import RIDGE, Passing, fit_layer, start, through
from obce.sites import base_model, layers_of, layout_of, position_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from obce.plan import Curves
    from obce.scores import Scores

LEVELS = (0.25, 0.5, 0.75, 0.9)

SENSITIVITY_TEXTS = 450
"""Texts that suffice: two thirds for the repairs, one to measure on."""


@torch.no_grad()
def sensitivity(
    model: PreTrainedModel,
    scores: Scores,
    batches: TokenBatches,
    held_out: TokenBatches,
    *,
    score: str = "effect",
    units: Sequence[str] | None = None,
    levels: Sequence[float] = LEVELS,
    read: str = "auto",
    ridge: float = RIDGE,
    progress: Callable[[float, float], None] | None = None,
) -> Curves:
    """Measures every layer and unit.

    Memory: three hidden states of every token and a copy of the embeddings. Arithmetic: units x levels x (one layer on
    the texts of the repair, and half the layers on those held out), a layer.

    Args:
        model: The dense model, not changed.
        scores: Its scores.
        batches: Texts that the repairs are fitted on.
        held_out: Other texts, that the outcome is measured on.
        score: Score that says which neurons of a unit go first.
        units: As in `obce.plan`.
        levels: Shares removed of what may be removed.
        read: `"cls"`, `"last"`, `"mean"` or `"tokens"`; `"auto"`, `"head"` and `"logits"`: what the model's head takes
            from the encoder.
        ridge: As in `obce.prune`.
        progress: Called with (layers done, layers).

    Returns:
        `"3.value"` -> [(0, 0), (share removed, share of the variance of what is read that is lost), ...].
    """
    base = base_model(model)
    if layout_of(base).site_map is not None:
        raise ValueError(
            f"model is a {type(model).__name__}, whose site map does not say what its layers are given, expected a "
            "family that obce knows by itself: plan with uniform shares."
        )
    read = reading_of(model) if read == "auto" else read
    read = position_of(model) if read in ("head", "logits") else read
    units = default_units(scores.meta["architecture"]) if units is None else units
    check_units(scores.meta["architecture"], units)
    layers = list(layers_of(base))
    curves: Curves = {}
    with eval_mode(base), precise_products(next(base.parameters()).device):
        fit, held = start(base, batches), start(base, held_out)
        reference = list(_read(base, 0, held, read))
        whole = _variance(reference)
        for layer, block in enumerate(layers):
            for unit in units:
                points = [(0.0, 0.0)]
                for share, cut in single_cuts(scores, score, layer, unit, levels):
                    # the small model has this layer alone: what comes before and after it is dense
                    small = base_model(prune(base, cut, repair="none"))
                    narrow = layers_of(small)[0]
                    own = [replace(at, small=at.dense) for at in fit]
                    kept = torch.tensor(cut.kept.get(f"{layer}.query", range(base.config.hidden_size)))
                    for _ in fit_layer(base, layer, narrow, own, kept, ridge):
                        pass
                    moved = [replace(at, dense=through(narrow, at.dense, at.small_given[layer])) for at in held]
                    lost = 0.0
                    for now, then in zip(_read(base, layer + 1, moved, read), reference, strict=True):
                        lost += float((now - then).double().square().sum())
                    points.append((share, lost / whole if whole > 0 else 0.0))
                curves[f"{layer}.{unit}"] = points
            for at in (*fit, *held):
                at.dense = at.small = through(block, at.dense, at.given[layer])
            if progress is not None:
                progress(layer + 1, len(layers))
    return curves


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


def _variance(vectors: Sequence[torch.Tensor]) -> float:
    every = torch.cat(list(vectors)).double()
    return float((every - every.mean(0)).square().sum())
