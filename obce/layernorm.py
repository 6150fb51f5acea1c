"""What LayerNorm is worth: a BERT encoder with its LayerNorms taken out, one at a time and all together.

The OBCE paper (arXiv 2312.10702) keeps LayerNorm because removing it hurts; this measures how much. Nothing is
trained or repaired after a removal, and no weight is touched: forward hooks answer in the place of a LayerNorm. It
gives gamma (x - mean(x)) / std(x) + beta for a token's x, std(x) = sqrt(variance of x + eps). In its place stands

- `"identity"`: x;
- `"affine"`: gamma x + beta;
- `"frozen"`: gamma (x - m) / s + beta, where m and s are the means of mean(x) and std(x) over all tokens of some
  texts. This map is the same for every token, so it needs no statistics when the model runs, and it keeps the scale
  of the average token: the fairest removal. A token far from the average, as [CLS] often is, keeps its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from obce.capture import eval_mode
from obce.corpus import Batch
from obce.evaluate import embed, fidelity
from obce.glue import MAX_LENGTH, Encoded, TaskData, encode, headline, kl_divergence, label_order, logits, metrics
from obce.sites import base_model, layers_of, layout_of, usable_max_length

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

MODES = ("identity", "affine", "frozen")
"""What may stand in the place of a LayerNorm."""

NONE, ALL = "none", "all"
"""Names of the rows of a study that stand for no LayerNorm and for all of them."""

Statistics = Mapping[str, tuple[float, float]]

_SAME = 1e-10  # share of the squares of vectors below which their variance is rounding


@dataclass(frozen=True, slots=True)
class LayerNormEffect:
    """What is left of a model without a LayerNorm, or without all.

    Attributes:
        name: Name of the LayerNorm as in `layernorms`; `"all"` for all together, `"none"` for the model as it is.
        mode: What stands in its place, one of `MODES`; `"none"` in the row of the model as it is.
        fidelity: Mean cosine of the text vectors with those of the model as it is. NaN if a vector is zero or not
            finite.
        error: Share of the variance of the vectors that is lost, sum |v - v_dense|^2 / sum |v_dense - mean|^2; 0 is
            best, and 1 what the mean vector of all texts in the place of each would have. NaN if a vector is not
            finite.
        headline: GLUE's number of the task, None without a task, NaN if a logit is not finite.
        kl: Mean KL divergence of the answers from those of the model as it is, in nats, None without a task and for
            regression, NaN if a logit is not finite.
    """

    name: str
    mode: str
    fidelity: float
    error: float
    headline: float | None = None
    kl: float | None = None

    @property
    def remark(self) -> str:
        """Why a number is NaN, in words; empty if none is."""
        found = []
        if math.isnan(self.error):
            found.append("text vectors are not finite")
        elif math.isnan(self.fidelity):
            found.append("text vectors are zero")
        if self.headline is not None and math.isnan(self.headline):
            found.append("logits are not finite")
        return ", ".join(found)


def layernorms(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The LayerNorms of a model in the order in which a text meets them; one in a head is none of them.

    The RMSNorms of a family that has these count as such: they divide a token and take nothing off it.

    Args:
        model: An encoder, with or without a head, dense or pruned by obce.

    Returns:
        Name -> module: `"embeddings"`, then for each layer from 0 `"0.attention_output"` and `"0.output"`. Where they
        stand before what reads the residual stream, that is the next one that reads what the kind wrote; `"0.input"`
        reads the embeddings, where the first layer of the dense model was dropped.

    Raises:
        ValueError: There is none behind the embeddings, or a layer lacks one of its two.
    """
    body = base_model(model)
    layout = layout_of(model)
    what = "finding the LayerNorms"
    layout.need(what, norms=layout.norms[0], first_norm=layout.first_norm)
    layout.need(what, last_norm=layout.last_norm or not layout.pre_norm)
    places = {} if layout.first_norm is None else {"embeddings": layout.first_norm}
    layers = layers_of(model)
    first = f"{layout.stack}.0.{layout.norms[0]}"
    if layout.pre_norm and first != layout.first_norm and not isinstance(body.get_submodule(first), nn.Identity):
        places["0.input"] = first  # of a layer that was not the first
    for layer in range(len(layers)):
        here, there = (f"{layout.stack}.{at}" for at in (layer, layer + 1))
        behind = [f"{here}.{norm}" for norm in layout.norms]
        if layout.pre_norm:
            last = layer + 1 == len(layers)
            behind = [f"{here}.{layout.norms[1]}", str(layout.last_norm) if last else f"{there}.{layout.norms[0]}"]
        for kind, norm in zip(("attention_output", "output"), behind, strict=True):
            places[f"{layer}.{kind}"] = norm
    inside = dict(body.named_modules())
    found = {name: inside.get(place) for name, place in places.items()}
    absent = [places[name] for name, module in found.items() if module is None or _epsilon(module) is None]
    if absent:
        raise ValueError(
            f"model: {type(model).__name__} has no LayerNorm at {absent[0]}, expected one after the embeddings, after "
            "attention and after the feed-forward part of every layer; give an encoder of transformers, or one that "
            "obce has pruned."
        )
    return {name: module for name, module in found.items() if module is not None}


def _epsilon(module: nn.Module) -> float | None:
    """What a LayerNorm, or an RMSNorm of transformers, adds to the mean square; None of another module."""
    found: float | None = getattr(module, "eps" if isinstance(module, nn.LayerNorm) else "variance_epsilon", None)
    return found


def _taken_off(module: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[tokens] each: what is taken off every token [tokens, hidden], and the mean square of what is left."""
    if isinstance(module, nn.LayerNorm):
        return tokens.mean(dim=1), tokens.var(dim=1, correction=0)
    squares = tokens.square().mean(dim=1)
    return torch.zeros_like(squares), squares


def layernorm_statistics(model: PreTrainedModel, batches: Iterable[Batch]) -> dict[str, tuple[float, float]]:
    """Means over tokens of what each LayerNorm takes off a token and divides it by, from one forward pass.

    Args:
        model: As in `layernorms`; never changed.
        batches: Token batches, for instance from `obce.corpus.tokenize`. Padding plays no part.

    Returns:
        Name of each LayerNorm -> (mean, std): the means over all real tokens of all texts of a token's mean over its
        hidden values, and of the sqrt(variance + eps) of these, summed in float64.

    Raises:
        ValueError: `model` is refused by `layernorms`, there is no text, the model does not call a LayerNorm once for
            every token, or a sum is not finite.
    """
    found = layernorms(model)
    body = base_model(model)
    device = next(body.parameters()).device
    sums = {name: torch.zeros(3, dtype=torch.float64, device=device) for name in found}  # tokens, means, deviations
    real = torch.empty(0)

    def watch(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            tokens = args[0][real].double()  # [real tokens, hidden]
            means, squares = _taken_off(module, tokens)
            deviations = (squares + (_epsilon(module) or 0.0)).sqrt()
            sums[name] += torch.stack([torch.ones_like(deviations), means, deviations]).sum(dim=1)

        return hook

    tokens = 0
    with eval_mode(body), torch.no_grad(), ExitStack() as hooks:
        for name, module in found.items():
            hooks.callback(module.register_forward_pre_hook(watch(name)).remove)
        for batch in batches:
            inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
            real = batch.real.to(device).bool()  # [b, T]
            tokens += int(batch.lengths.sum())
            body(**inputs)
    if not tokens:
        raise ValueError("batches: found no token, expected at least one; pass a corpus that is not empty.")
    answer: dict[str, tuple[float, float]] = {}
    for name, (count, means, deviations) in ((name, total.tolist()) for name, total in sums.items()):
        if count != tokens:
            raise ValueError(
                f"model: LayerNorm {name} met {count:.0f} tokens of {tokens}, expected each once; give a model whose "
                "forward pass calls its modules, without gradient checkpointing and not compiled."
            )
        if not (math.isfinite(means) and math.isfinite(deviations)):
            raise ValueError(
                f"model: what LayerNorm {name} takes in is not finite, expected finite numbers; check the model's "
                "weights and dtype."
            )
        answer[name] = means / count, deviations / count
    return answer


@contextmanager
def without_layernorm(
    model: PreTrainedModel, which: str | Iterable[str], mode: str, statistics: Statistics | None = None
) -> Iterator[None]:
    """The model without some of its LayerNorms inside the `with`; the hooks are gone after it, also after an error.

    Args:
        model: As in `layernorms`. Its weights stay what they are.
        which: A name, or names, as `layernorms` gives them.
        mode: One of `MODES`.
        statistics: Name -> (mean, std), as `layernorm_statistics` gives them; only `"frozen"` reads them.

    Raises:
        ValueError: `model` is refused by `layernorms`, a name or the mode is unknown, or the mode is `"frozen"` and
            the statistics of a name are missing, not finite, or have a std that is not positive.
    """
    found = layernorms(model)
    names = [which] if isinstance(which, str) else list(dict.fromkeys(which))
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(
            f"which: found {unknown[0]!r}, expected names among {', '.join(found)}; choose from them, all of them for "
            "all LayerNorms."
        )
    _check_mode("mode", mode)
    hooks = [_hook(mode, *_statistics(name, mode, statistics)) for name in names]
    handles = []
    try:
        for name, hook in zip(names, hooks, strict=True):
            # the hooks of others, which may be there to watch, see what the model goes on with
            handles.append(found[name].register_forward_hook(hook, prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def study(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    modes: Sequence[str] = MODES,
    data: TaskData | None = None,
    tokenizer: Any = None,
    read: str = "mean",
    max_length: int = MAX_LENGTH,
    progress: Callable[[int, int], None] | None = None,
) -> list[LayerNormEffect]:
    """Measure a model without each of its LayerNorms alone, and without all, for every mode.

    A model of L layers runs over all texts 2 + (2 L + 2) x modes times. The statistics of `"frozen"` are those of the
    model as it is over the same texts, also where LayerNorms in front of one are gone.

    Args:
        model: As in `layernorms`; with a sequence classification head where `data` is given. Never changed.
        batches: Token batches, for instance from `obce.corpus.tokenize`; kept in memory as token ids.
        modes: Some of `MODES`.
        data: A task, on whose dev splits the model is measured too.
        tokenizer: The model's tokenizer, for `data`.
        read: The vector of a text: `"mean"`, the last hidden state over its real tokens, `"cls"`, at its first, or
            `"last"`, at its last.
        max_length: Most tokens a row of `data`, special tokens included.
        progress: Called with (measurements done, measurements in all).

    Returns:
        The model as it is (`"none"`, with fidelity 1 and error 0 by definition), then for each mode every LayerNorm in
        the order of `layernorms` and `"all"`. A removal that overflows gives NaN, and `remark` says why.

    Raises:
        ImportError: `data` is given and scikit-learn is not installed.
        ValueError: `model` is refused by `layernorms`, a mode is unknown, `read` or `batches` are refused by
            `obce.evaluate.embed`, the model as it is gives vectors that are zero, all equal or not finite or logits
            that are not finite, or `data` is given without a tokenizer or to a model without a head for it.
    """
    chosen = [modes] if isinstance(modes, str) else list(dict.fromkeys(modes))
    for mode in chosen:
        _check_mode("modes", mode)
    names = list(layernorms(model))
    task = None if data is None else _Dev(model, data, tokenizer, max_length)
    held = list(batches)
    total = 1 + len(chosen) * (len(names) + 1)
    dense = embed(model, held, pooling=read)
    _check_dense(dense)
    statistics = layernorm_statistics(model, held) if "frozen" in chosen else None
    rows = [LayerNormEffect(NONE, NONE, 1.0, 0.0, *(task.measure(model) if task else (None, None)))]
    removals = [(mode, name, which) for mode in chosen for name, which in [*((n, [n]) for n in names), (ALL, names)]]
    for done, (mode, name, which) in enumerate(removals, start=1):
        if progress is not None:
            progress(done, total)
        with without_layernorm(model, which, mode, statistics):
            try:
                vectors = embed(model, held, pooling=read)
            except ValueError:
                # the dense model took the same arguments, so this says that a vector is not finite
                vectors = np.full_like(dense, np.nan)
            answers = task.measure(model) if task else (None, None)
        rows.append(LayerNormEffect(name, mode, *_distance(dense, vectors), *answers))
    if progress is not None:
        progress(total, total)
    return rows


class _Dev:
    """The dev splits of a task, tokenised once; the first model that is measured is what KL compares with."""

    def __init__(self, model: PreTrainedModel, data: TaskData, tokenizer: Any, max_length: int) -> None:
        if tokenizer is None:
            raise ValueError(
                f"tokenizer: found None beside data of {data.task.name}, expected the model's own; pass it, or leave "
                "data out."
            )
        self.task = data.task
        self.order = label_order(model, data.task)
        usable_max_length(model, tokenizer, max_length)
        self.splits: dict[str, tuple[Encoded, NDArray[Any]]] = {
            name: (encode(examples, tokenizer, max_length=max_length), examples.labels)
            for name, examples in data.dev.items()
        }
        self.reference: dict[str, NDArray[np.float32]] = {}

    def measure(self, model: PreTrainedModel) -> tuple[float, float | None]:
        """Headline, and KL over all rows; NaN where a logit is not finite."""
        regression = self.task.regression
        found = {name: logits(model, rows)[:, self.order] for name, (rows, _) in self.splits.items()}
        if not all(np.isfinite(values).all() for values in found.values()):
            if not self.reference:
                raise ValueError(
                    f"model: its logits on {self.task.name} are not finite, expected finite numbers; check the model's "
                    "weights and dtype."
                )
            return math.nan, None if regression else math.nan
        self.reference = self.reference or found
        scores = {
            name: metrics(self.task, values[:, 0] if regression else values.argmax(axis=1), self.splits[name][1])
            for name, values in found.items()
        }
        kl = None
        if not regression:
            kl = kl_divergence(np.concatenate(list(self.reference.values())), np.concatenate(list(found.values())))
        return headline(self.task, scores), kl


def _hook(mode: str, mean: float, std: float) -> Callable[[Any, tuple[torch.Tensor, ...], torch.Tensor], Any]:
    def hook(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        # half precision is widened as LayerNorm itself does; the answer has the dtype that LayerNorm's has
        wide = torch.promote_types(args[0].dtype, torch.float32)
        answer = args[0].to(wide)
        if mode == "frozen":
            answer = (answer - mean) / std
        if mode != "identity":
            answer = module.weight.to(wide) * answer
            if getattr(module, "bias", None) is not None:
                answer = answer + module.bias.to(wide)
        return answer.to(output.dtype)

    return hook


def _statistics(name: str, mode: str, statistics: Statistics | None) -> tuple[float, float]:
    if mode != "frozen":
        return 0.0, 1.0
    found = (statistics or {}).get(name)
    if found is None or not (math.isfinite(found[0]) and math.isfinite(found[1]) and found[1] > 0):
        raise ValueError(
            f"statistics: found {found} for {name}, expected a finite mean and a finite positive std for mode "
            "'frozen'; pass layernorm_statistics(model, batches)."
        )
    return found


def _check_mode(argument: str, mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"{argument}: found {mode!r}, expected one of {', '.join(MODES)}; choose one of them.")


def _check_dense(vectors: NDArray[np.float32]) -> None:
    """Refuses vectors to which no other can be compared."""
    fidelity(vectors, vectors)  # refuses vectors without a direction
    wide = vectors.astype(np.float64)
    # one text in two batches has two vectors, by the rounding of float32
    if np.square(wide - wide.mean(axis=0)).sum() <= _SAME * np.square(wide).sum():
        raise ValueError(
            f"batches: found {len(vectors)} texts with one and the same vector, expected vectors that differ; pass at "
            "least two different texts."
        )


def _distance(dense: NDArray[np.float32], vectors: NDArray[np.float32]) -> tuple[float, float]:
    """Fidelity and error of vectors [n, hidden] beside those of the dense model; NaN where undefined."""
    if not np.isfinite(vectors).all():
        return math.nan, math.nan
    first, second = dense.astype(np.float64), vectors.astype(np.float64)
    lost = np.square(second - first).sum() / np.square(first - first.mean(axis=0)).sum()
    directed = (vectors != 0).any(axis=1).all()
    return fidelity(first, second) if directed else math.nan, float(lost)
