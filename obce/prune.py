"""Model + plan -> smaller model: the planned neurons are cut out of the Linears that write and read them.

What replaces a removed neuron (the repair) is exact algebra:

- `value` and `intermediate` neurons are columns of a reader y = W x + b. Replacing neuron i by a constant c_i
  adds W[:, i] c_i to every output, so the column goes and the bias takes the term. For a value neuron the
  reader takes in the attention context, a mixture of the neuron's values over the tokens; attention weights
  sum to one, so a constant neuron has that constant as its context.
- `query` and `key` neurons go in pairs (same index of the same head). Attention takes the softmax over the
  keys j of s * sum_d q_id k_jd. A removed pair held at constants adds s * q_d k_d, the same number for every
  j, and the softmax does not change when all its arguments move alike. So constants and zeros give the same
  model: `mean` and `none` do not differ there. The scale s stays that of the dense head size. Where positions turn
  query and key, neurons i and i + half of a head go together, and zeros stand for them whatever the repair: what two
  constants add there depends on the distance.
- Where query heads share a head of value (`Site.groups`), a value neuron is several columns of its reader: they go
  together, and one constant stands in all of them.
- A head that goes is all its value neurons replaced; its query and key then matter to no one.
- Rows of `attention_output` and `output` write the residual stream, which no one can do without: the Linear keeps its
  other rows, and the constant stands in its bias.
- A layer that goes hands on what it was given. The layers that stay are numbered anew.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn
from transformers.models.modernbert.modeling_modernbert import ModernBertRotaryEmbedding

from obce import __version__, modeling_obce
from obce.capture import capture, eval_mode
from obce.corpus import Corpus, TokenBatches, corpus_of, tokenize
from obce.effects import gradient_tokens
from obce.images import load_processor
from obce.modeling_obce import NarrowAttention, NarrowModel, ObceDebertaV2SelfAttention, ObceRows, parts_of
from obce.modeling_obce_mapped import ObceMapped, class_of, classes_of
from obce.repair import RIDGE, Fit, least_squares
from obce.sites import (
    DEFAULT_MAX_LENGTH,
    PER_HEAD,
    Site,
    base_model,
    find_sites,
    layers_of,
    layout_of,
    matrix,
    model_hash,
    transposed,
    usable_max_length,
    usable_positions,
    vocabulary_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from obce.plan import Plan
    from obce.scores import Scores

REPAIRS = ("none", "mean", "least_squares")

REPAIR_TEXTS = 1000
"""Texts that least squares takes of a longer corpus: enough tokens for a reader of 4,096 inputs. Of pictures as many as
have no more tokens than so many texts of 128."""

# Places a forward pass of the repair, padding included.
_BATCH_TOKENS = 4096

# Kinds that write the residual stream: of these only rows go, their outputs do not.
_RESIDUAL = ("attention_output", "output")

# Greatest difference between a pruned model of a mapped family and the masked one, as a share of the largest number of
# the two if that is above 1; in float32.
_BESIDE = 1e-5

# Batch and length of the texts that these two are run on.
_TRIED = (3, 12)


@dataclass(frozen=True, slots=True)
class _Cut:
    """What the plan does to one site.

    Attributes:
        site: The site.
        kept: int64 [kept], ascending.
        removed: int64 [removed], ascending.
        fill: float64 [removed], the constants that stand for the removed neurons.
    """

    site: Site
    kept: torch.Tensor
    removed: torch.Tensor
    fill: torch.Tensor

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of the reader that take in the removed neurons, and the constant that stands in each."""
        if self.site.groups == 1:
            return self.removed, self.fill
        columns = self.site.read_by(self.removed)
        return columns, self.fill[torch.searchsorted(self.removed, self.site.sources()[columns])]


@dataclass(frozen=True, slots=True)
class _Repair:
    """What replaces a removed neuron, and where its constants come from."""

    name: str
    scores: Scores | None
    texts: Corpus | Sequence[str] | TokenBatches | None
    tokenizer: PreTrainedTokenizerBase | None
    max_length: int | None = None

    def batches(self, model: PreTrainedModel, most: int | None = None) -> TokenBatches:
        """The texts, tokenised; of more than `most` a part that is drawn evenly."""
        if isinstance(self.texts, TokenBatches):
            return self.texts
        if self.texts is None:
            raise ValueError(
                f"repair={self.name!r} reads texts, but texts is not given: give texts= (and tokenizer=), or use "
                "repair='mean' with scores=, or repair='none'."
            )
        pictures = layout_of(model).pictures
        texts: Any = self.texts
        if pictures or isinstance(texts, Corpus):
            texts = corpus_of(texts, pictures=pictures).entries()
        elif not isinstance(texts, Sequence):
            texts = list(texts)
        most = None if most is None else at_most(model, most)
        if most is not None and len(texts) > most:
            texts = [texts[i] for i in np.random.default_rng(0).choice(len(texts), most, replace=False)]
        return tokenised(model, texts, self.tokenizer, self.max_length)


def at_most(model: PreTrainedModel, texts: int) -> int:
    """So many texts, or pictures that have no more tokens than so many texts of full length."""
    if not layout_of(model).pictures:
        return texts
    return max(1, min(texts, texts * DEFAULT_MAX_LENGTH // usable_positions(model)))


def tokenised(
    model: PreTrainedModel,
    entries: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    *,
    gradients: bool = False,
) -> TokenBatches:
    """Entries of a corpus in batches for a model, by the tokenizer that was saved beside it if none is given.

    For a backward pass (`gradients`) the batches are as small as its memory wants them.
    """
    if tokenizer is None and not (layout_of(model).pictures and all(picture.processed for picture in entries)):
        tokenizer = _own_tokenizer(model)
    length = usable_max_length(model, cast("PreTrainedTokenizerBase", tokenizer), max_length)
    most = gradient_tokens(model, length, _BATCH_TOKENS) if gradients else _BATCH_TOKENS
    return tokenize(
        entries,
        cast("PreTrainedTokenizerBase", tokenizer),
        max_length=length,
        batch_tokens=most,
        vocabulary=vocabulary_of(model),
    )


def prune(
    model: PreTrainedModel,
    plan: Plan,
    *,
    repair: str = "least_squares",
    scores: Scores | None = None,
    texts: Corpus | Sequence[str] | TokenBatches | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    ridge: float = RIDGE,
    progress: Callable[[float, float], None] | None = None,
) -> PreTrainedModel:
    """Builds the smaller model; the given one is not touched.

    Args:
        model: The dense encoder that the plan was made for, with any head of its family or none.
        plan: Kept neurons, from `obce.plan`.
        repair: What replaces a removed neuron: `"none"` zero; `"mean"` its mean over all tokens of the texts,
            folded into the bias of its reader (see the head of this module; query and key need none);
            `"least_squares"` the best linear guess from the neurons that stay, over all tokens of the texts, in
            the weights of its reader (see `obce.repair`).
        scores: For `repair="mean"`: take the means from this table (its column `token_mean`).
        texts: What `"least_squares"` is fitted on (of a longer list, `REPAIR_TEXTS` drawn evenly), or, for `"mean"`
            instead of `scores`, what the means are taken over. Texts of the task that the model is for are best.
            `TokenBatches` are taken as they are. For a model that reads pictures anything `obce.read_pictures` takes.
        tokenizer: Tokenizer or image processor of the model, with `texts` (default: the one saved beside the model).
        max_length: Tokens a text is cut to (default: 128, or the most the model takes).
        ridge: Of least squares, as a share of the mean variance of a reader's inputs.
        progress: Called with (layers done, layers in all) by least squares.

    Returns:
        A model of the matching class of `obce.modeling_obce` with the same head, labels, dtype, devices, training flag
        and attention implementation (but `sdpa` where the dense model has a flash or flex kernel, which need
        equal head sizes). `config.obce` records how it was made. With a plan that removes nothing its
        outputs are bit by bit those of the dense model.

    Raises:
        ValueError: The plan is of another model or its indices are not what can be cut, the repair is
            unknown, means are needed but neither `scores` nor `texts` is given or both are, or the model is
            not a dense BERT encoder of a known class.
    """
    narrow = _narrow_class(model)
    how = _Repair(repair, scores, texts, tokenizer, max_length)
    cuts = _cuts(model, plan, how)
    batches = how.batches(model, REPAIR_TEXTS) if repair == "least_squares" else None
    small = _narrowed(model, narrow, plan, repair, cuts)
    config = small.config
    if isinstance(small, ObceMapped):
        _check_beside(model, narrow, plan, small, cuts)
    if batches is not None:
        kept = {cut.site.layer: cut.kept for cut in cuts if cut.site.kind == "query"}
        fits = least_squares(model, small, batches, kept, ridge=ridge, progress=progress)
        small.config.obce = {**(config.obce or {}), "least_squares": _fit_facts(fits, batches, ridge)}
    return small


def _narrowed(
    model: PreTrainedModel, narrow: type[NarrowModel], plan: Plan, repair: str, cuts: Sequence[_Cut]
) -> PreTrainedModel:
    """The smaller model with its weights, as the repairs by constants leave it."""
    config = _narrow_config(model, narrow, plan, repair, cuts)
    with torch.device("meta"):
        small = narrow(config, **({} if issubclass(narrow, ObceMapped) else parts_of(model)))
    _fill(small, model, cuts)
    small.train(model.training)
    if small.can_generate():
        small.generation_config = copy.deepcopy(model.generation_config)
    return small


def _check_beside(
    model: PreTrainedModel, narrow: type[NarrowModel], plan: Plan, small: PreTrainedModel, cuts: Sequence[_Cut]
) -> None:
    """Runs the pruned model beside the masked one, since nothing is known of a mapped family's code.

    With zeros in the place of what goes: constants are a matter of the bias of a reader alone, and rounded there.

    Raises:
        ValueError: They do not agree; names the kind of site.
    """
    if any(bool(cut.fill.any()) for cut in cuts):
        cuts = [replace(cut, fill=torch.zeros_like(cut.fill)) for cut in cuts]
        small = _narrowed(model, narrow, plan, "none", cuts)
    found = _beside(model, small, cuts)
    if not found:
        return
    # which kind it is: each alone, the others whole
    nothing = torch.arange(0)
    kinds: tuple[str, ...]
    for kinds in (("value",), ("intermediate",), ("query", "key"), _RESIDUAL):
        if not any(cut.site.kind in kinds and len(cut.removed) for cut in cuts):
            continue
        alone = [
            cut
            if cut.site.kind in kinds
            else replace(cut, kept=torch.arange(cut.site.width), removed=nothing, fill=nothing.double())
            for cut in cuts
        ]
        here = _beside(model, _narrowed(model, narrow, plan, "none", alone), alone)
        if here:
            found = here
            break
    else:
        kinds = tuple(dict.fromkeys(cut.site.kind for cut in cuts if len(cut.removed)))
    raise ValueError(
        f"model is a {type(model).__name__}, whose pruned form {found} where neurons of {' and '.join(kinds)} go, "
        f"expected what the dense one says with these masked, to {_BESIDE:g}: its code does not let them go; leave "
        f"{' and '.join(f'sites.{kind}' for kind in kinds)} out of the site map '{layout_of(model).site_map_file}'."
    )


def _beside(model: PreTrainedModel, small: PreTrainedModel, cuts: Sequence[_Cut]) -> str:
    """How a pruned model's hidden states fail to be the masked one's on some random tokens; "" where they do not.

    In float32, whatever the models are in. Sums over other numbers of terms round differently, in a deep model perhaps
    by more than is allowed: where that is all, float64 shows it.
    """
    pair: tuple[Any, Any] = base_model(model), base_model(small)
    if model.dtype in (torch.float16, torch.bfloat16):
        pair = copy.deepcopy(pair[0]).float(), copy.deepcopy(pair[1]).float()
    found = _difference(*pair, cuts)
    if not found.startswith("differs"):
        return found
    pair = copy.deepcopy(pair[0]).double(), copy.deepcopy(pair[1]).double()
    try:
        return _difference(*pair, cuts)
    except (RuntimeError, TypeError, ValueError):  # code that float32 is written into
        return found


@torch.no_grad()
def _difference(dense: PreTrainedModel, narrow: PreTrainedModel, cuts: Sequence[_Cut]) -> str:
    batch, length = _TRIED[0], min(_TRIED[1], usable_positions(dense))
    generator = torch.Generator().manual_seed(0)
    size = int(dense.config.vocab_size)
    ids = torch.randint(size // 2, size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, max(1, length - 2) :] = 0
    inputs = {name: tensor.to(dense.device) for name, tensor in (("input_ids", ids), ("attention_mask", mask))}
    answers = []
    with eval_mode(dense, narrow):
        for one, hooks in ((dense, _mask_hooks(dense, cuts)), (narrow, [])):
            handles: list[Any] = []
            try:
                handles.extend(hooks)
                answers.append(one(**inputs)[0].double())
            except Exception as error:  # whatever the family's own code raises
                if one is dense:
                    raise
                return f"fails ({' '.join(str(error).split())[:120]})"
            finally:
                for handle in handles:
                    handle.remove()
    if answers[0].shape != answers[1].shape:
        return f"gives the shape {tuple(answers[1].shape)} in the place of {tuple(answers[0].shape)}"
    largest = max(1.0, float(answers[0].abs().max()))
    difference = float((answers[0] - answers[1]).abs().max())
    return "" if difference <= _BESIDE * largest else f"differs by {difference:.2g}"


def _fit_facts(fits: Sequence[Fit], batches: TokenBatches, ridge: float) -> dict[str, Any]:
    """For the config: what was fitted, on how much, and what is lost of each reader's outputs."""
    raised = {fit.site: fit.ridge for fit in fits if fit.ridge != ridge}
    return {
        "texts": batches.n_texts,
        "tokens": batches.n_tokens,
        "ridge": ridge,
        "raised_ridge": raised,
        "errors": {fit.site: [round(fit.mean_error, 6), round(fit.error, 6)] for fit in fits},
    }


@contextmanager
def masked(
    model: PreTrainedModel,
    plan: Plan,
    *,
    repair: str = "least_squares",
    scores: Scores | None = None,
    texts: Corpus | Sequence[str] | TokenBatches | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    ridge: float = RIDGE,
    progress: Callable[[float, float], None] | None = None,
) -> Iterator[PreTrainedModel]:
    """Inside the `with`, the dense model answers as the pruned one would, up to rounding; no weight is
    changed.

    Removed query and key neurons give zero; what a reader takes in from a removed value or intermediate
    neuron is its replacement, and so is what a removed row writes; with least squares the fitted Linears answer in the
    place of the dense ones. A dropped layer gives what it was given, but still counts among `hidden_states`.
    Arguments and errors are those of `prune`, but any head will do.

    Yields:
        The given model itself, with hooks that are removed at the end of the `with`.
    """
    cuts = _cuts(model, plan, _Repair(repair, scores, texts, tokenizer, max_length))
    base = base_model(model)
    handles: list[Any] = []
    try:
        if repair == "least_squares":
            given: dict[str, Any] = {"texts": texts, "tokenizer": tokenizer, "max_length": max_length, "ridge": ridge}
            small = base_model(prune(base, plan, repair=repair, progress=progress, **given))
            handles += _fitted_hooks(base, small, cuts)
        handles += [layer.register_forward_hook(_hand_on) for layer in _dropped_layers(model, plan)]
        # the fitted Linears have their constants
        constant = [cut for cut in cuts if repair != "least_squares" or cut.site.kind not in _RESIDUAL]
        handles += _mask_hooks(base, constant)
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _mask_hooks(base: PreTrainedModel, cuts: Sequence[_Cut]) -> Iterator[Any]:
    """Hooks that put constants in the place of removed neurons."""
    for cut in cuts:
        if not len(cut.removed):
            continue
        name = cut.site.reader
        if name is None:
            width, places, values = len(_matrix(base, cut.site.writer)), cut.site.rows(cut.removed), cut.fill
        else:
            width, (places, values) = _matrix(base, name).shape[1], cut.read()
        gone = torch.zeros(width, dtype=torch.bool)
        gone[places] = True
        fill = torch.zeros(width, dtype=torch.float64)
        fill[places] = values
        if name is None:
            yield base.get_submodule(cut.site.writer).register_forward_hook(_OutputMask(gone, fill))
        else:
            yield base.get_submodule(name).register_forward_pre_hook(_InputMask(gone, fill))


def _fitted_hooks(base: PreTrainedModel, small: PreTrainedModel, cuts: Sequence[_Cut]) -> Iterator[Any]:
    """Hooks that let the fitted Linears of the pruned model answer in the dense one."""
    layout = layout_of(base)
    stay = sorted({cut.site.layer for cut in cuts})
    modules = {_dense_name(name, layout.stack, stay): module for name, module in small.named_modules()}
    fitted: _FittedQuery | _FittedReader
    for cut in cuts:
        whole = layout.rotary or layout.whole or layout.site_map is not None
        if cut.site.kind == "query" and len(cut.kept) and not whole:
            name, fitted = cut.site.writer, _FittedQuery(modules[cut.site.writer], cut.kept, cut.site.columns)
        elif cut.site.reader is not None:
            name, fitted = cut.site.reader, _FittedReader(modules[cut.site.reader], cut.site.read_by(cut.kept))
        else:
            continue
        yield base.get_submodule(name).register_forward_hook(fitted)


@dataclass(frozen=True)
class _FittedQuery:
    """A dense query Linear answers as the fitted one where neurons are kept, and zero elsewhere.

    One that is also key's and value's answers for these as before.
    """

    linear: nn.Module
    kept: torch.Tensor
    columns: slice

    def __call__(self, _module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        answer = output.clone()
        answer[..., self.columns] = 0
        # not by calling it: a pruned model's query may scale what it says; its query rows come first
        bias: torch.Tensor | None = self.linear.bias  # type: ignore[assignment]
        rows = slice(len(self.kept))
        fitted = nn.functional.linear(args[0], matrix(self.linear)[rows], None if bias is None else bias[rows])
        answer[..., self.columns.start + self.kept.to(output.device)] = fitted
        return answer


@dataclass(frozen=True)
class _FittedReader:
    """A dense reader answers as the fitted one that takes in the kept columns alone."""

    linear: nn.Module
    kept: torch.Tensor

    def __call__(self, _module: nn.Module, args: tuple[torch.Tensor, ...], _output: torch.Tensor) -> torch.Tensor:
        # that of a mapped family takes its columns by itself
        picks = hasattr(self.linear, "columns")
        taken = args[0] if picks else args[0].index_select(-1, self.kept.to(args[0].device))
        answer: torch.Tensor = self.linear(taken)
        return answer


class _Mask:
    """Replaces neurons [..., width] by constants; the tensors follow the activations' device and dtype."""

    def __init__(self, gone: torch.Tensor, fill: torch.Tensor) -> None:
        self.gone = gone
        self.fill = fill

    def replace(self, x: torch.Tensor) -> torch.Tensor:
        fill = self.fill.to(x.dtype).to(x.device)
        return torch.where(self.gone.to(x.device), fill, x)


def _hand_on(_module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> Any:
    return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]


class _OutputMask(_Mask):
    def __call__(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return self.replace(output)


class _InputMask(_Mask):
    def __call__(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (self.replace(args[0]), *args[1:])


def _narrow_class(model: PreTrainedModel) -> type[NarrowModel]:
    find_sites(model)  # refuses other families with the reason
    cls = type(model)
    if layout_of(model).site_map is not None:
        known = list(classes_of(model.config.model_type))
        if cls.__name__ not in known or not cls.__module__.startswith("transformers."):
            raise ValueError(f"model is a {cls.__name__}, expected one of {', '.join(known)} of transformers.")
        return cast(type[NarrowModel], class_of(model.config.model_type, cls.__name__))
    found = getattr(modeling_obce, f"Obce{cls.__name__}", None)
    if found is None or not cls.__module__.startswith("transformers."):
        narrow = f"obce_{model.config.model_type.replace('-', '_')}"
        classes = [getattr(modeling_obce, name) for name in modeling_obce.__all__]
        known = [
            one.__name__.removeprefix("Obce")
            for one in classes
            if getattr(getattr(one, "config_class", None), "model_type", "") == narrow
            and not one.__name__.endswith("PreTrainedModel")
        ]
        raise ValueError(f"model is a {cls.__name__}, expected one of {', '.join(known)} of transformers.")
    return cast(type[NarrowModel], found)


def _cuts(model: PreTrainedModel, plan: Plan, repair: _Repair) -> list[_Cut]:
    """The plan, checked against the model, with the repair's constants; every site that stays, in order."""
    if repair.name not in REPAIRS:
        raise ValueError(f"repair is {repair.name!r}, expected one of {', '.join(map(repr, REPAIRS))}.")
    if repair.name == "mean" and repair.scores is not None and repair.texts is not None:
        raise ValueError("scores and texts are both given, expected one: the means come from either.")
    sites = {site.name: site for site in find_sites(model)}
    found = model_hash(model)
    if plan.model_hash != found:
        raise ValueError(
            f"plan was made for the model with hash {plan.model_hash[:12]}..., but this model has "
            f"{found[:12]}...: score this model and plan again, or load the weights that were scored."
        )
    layout = layout_of(model)
    if plan.architecture.get("site_map", "") != layout.site_map_hash:
        raise ValueError(
            f"plan was made by the site map {plan.architecture.get('site_map', '')!r}, but the map of the family "
            f"{model.config.model_type!r} is now {layout.site_map_hash!r}: register the map that was scored by."
        )
    if plan.layers_dropped and layout.site_map is not None:
        raise ValueError(
            f"plan.layers_dropped is {list(plan.layers_dropped)}, but a site map does not say what a layer is besides "
            "its Linears, expected none."
        )
    _check_layers(plan, sites)
    stay = {k: site for k, site in sites.items() if site.layer not in plan.layers_dropped}
    kept = _checked_indices(plan.kept, stay, layout.whole)
    if layout.rotary:
        _check_turned(kept, sites)
    removed = {name: np.setdiff1d(np.arange(sites[name].width), kept[name]) for name in kept}
    fills = {name: np.zeros(len(indices)) for name, indices in removed.items()}
    if repair.name == "mean":
        repaired = [sites[name] for name in kept if sites[name].kind not in ("query", "key") and len(removed[name])]
        means = _token_means(model, plan, repaired, repair)
        for site in repaired:
            fills[site.name] = _finite(means[site.name], removed[site.name], site)
    return [
        _Cut(
            sites[name],
            torch.from_numpy(kept[name]),
            torch.from_numpy(removed[name]),
            torch.from_numpy(fills[name]),
        )
        for name in kept
    ]


def _check_layers(plan: Plan, sites: Mapping[str, Site]) -> None:
    layers = sorted({site.layer for site in sites.values()})
    dropped = plan.layers_dropped
    if sorted(set(dropped)) != list(dropped) or not set(dropped) < set(layers):
        raise ValueError(
            f"plan.layers_dropped is {list(dropped)}, expected distinct and ascending layer numbers from 0 to "
            f"{layers[-1]}, and not all of them."
        )
    for name in plan.kept:
        if name not in sites:
            raise ValueError(
                f"plan.kept has the site {name!r}, expected only sites of this model: {next(iter(sites))} to "
                f"{list(sites)[-1]}."
            )
        if sites[name].layer in dropped:
            raise ValueError(
                f"plan.kept has the site {name!r} of a layer that plan.layers_dropped removes, expected no sites of it."
            )


def _checked_indices(
    plan_kept: Mapping[str, Sequence[int]], sites: Mapping[str, Site], whole: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Kept indices int64 of every site; a site that the plan leaves out is kept whole, as kinds `whole` always are."""
    kept = {}
    for name, site in sites.items():
        try:
            indices = np.array([operator.index(i) for i in plan_kept.get(name, range(site.width))], dtype=np.int64)
        except TypeError as error:
            raise ValueError(f"plan.kept[{name!r}] holds {error.args[0]}, expected integers.") from None
        # without a neuron a site with heads has lost them all, which is checked below
        least = 0 if site.kind in PER_HEAD and not whole else 1
        if site.kind in whole and len(indices) < site.width:
            raise ValueError(
                f"plan.kept[{name!r}] keeps {len(indices)} neurons of {site.width}, expected all: obce does not cut "
                f"{' and '.join(whole)} of this family, whose positions turn them in heads that may be shared."
            )
        if len(indices) < least or np.any(np.diff(indices) <= 0) or np.any((indices < 0) | (indices >= site.width)):
            raise ValueError(
                f"plan.kept[{name!r}] is {_shown(indices)}, expected {'at least one neuron' if least else 'neurons'}, "
                f"distinct and ascending, from 0 to {site.width - 1}."
            )
        counts = _counts(indices, site)
        if len(set(counts[counts > 0].tolist())) > 1 or (whole and not counts.all()):
            raise ValueError(
                f"plan.kept[{name!r}] keeps {counts.tolist()} neurons in the heads of its layer, expected "
                f"the same number in each{'' if whole else ', or none where the whole head goes'}."
            )
        kept[name] = indices
    for name, site in () if whole else sites.items():
        if site.kind == "query" and not np.array_equal(kept[name], kept[f"{site.layer}.key"]):
            raise ValueError(
                f"plan.kept keeps other neurons of {name!r} than of '{site.layer}.key', expected the same "
                "indices: query and key neurons are cut in pairs."
            )
        if site.kind == "value" and f"{site.layer}.query" in kept:
            here, there = (np.flatnonzero(_counts(kept[at], site)).tolist() for at in (name, f"{site.layer}.query"))
            if here != there:
                raise ValueError(
                    f"plan.kept keeps the heads {here} in {name!r} but {there} in '{site.layer}.query', "
                    "expected the same: a head goes with its query, key and value."
                )
    return kept


def _check_turned(kept: Mapping[str, np.ndarray], sites: Mapping[str, Site]) -> None:
    for name, indices in kept.items():
        site = sites[name]
        if site.kind != "query":
            continue
        size = site.width // site.heads
        partners = np.where(indices % size < size // 2, indices + size // 2, indices - size // 2)
        alone = np.setdiff1d(indices, partners)
        if len(alone):
            partner = partners[np.searchsorted(indices, alone[0])]
            raise ValueError(
                f"plan.kept[{name!r}] keeps neuron {alone[0]} without {partner}, expected both or none: positions turn "
                f"them together, as neurons i and i + {size // 2} of a head."
            )


def _counts(indices: np.ndarray, site: Site) -> np.ndarray:
    """[heads], kept neurons of each head."""
    return np.bincount(indices // (site.width // site.heads), minlength=site.heads)


def _shown(indices: np.ndarray) -> str:
    listed = ", ".join(map(str, indices[:8].tolist()))
    return f"[{listed}, ...] ({len(indices)} indices)" if len(indices) > 8 else f"[{listed}]"


def _token_means(
    model: PreTrainedModel, plan: Plan, repaired: Sequence[Site], repair: _Repair
) -> Mapping[str, np.ndarray]:
    """Site name -> float64 [width], mean over all real tokens of what the reader takes in, or of the outputs."""
    scores = repair.scores
    if not repaired:
        return {}
    if scores is not None:
        if scores.meta.get("model_hash") != plan.model_hash:
            raise ValueError(
                f"scores are of the model with hash {str(scores.meta.get('model_hash'))[:12]}..., expected "
                f"that of the plan, {plan.model_hash[:12]}...: give the scores that the plan was made from."
            )
        if "token_mean" not in scores.columns:
            raise ValueError(
                "scores have no column 'token_mean', expected it for repair='mean'; score again, or give "
                "texts and tokenizer."
            )
        means = np.asarray(scores.columns["token_mean"], dtype=np.float64)
        missing = [site.name for site in repaired if (site.layer, site.kind) not in scores.sites()]
        if missing:
            raise ValueError(
                f"scores hold no site {missing[0]}, which the plan cuts, expected every site that it cuts; "
                "score them too, or give texts and tokenizer."
            )
        return {site.name: means[scores.rows(site.layer, site.kind)] for site in repaired}
    if repair.texts is None:
        raise ValueError(
            "repair='mean' needs the means of the removed neurons, but neither scores nor texts is given: "
            "give scores=, or texts= and tokenizer=, or use repair='none'."
        )
    return {
        f"{layer.layer}.{kind}": sums.sums / sums.count
        for layer in capture(model, repair.batches(model), repaired)
        for kind, sums in layer.tokens.items()
    }


def _own_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    source = model.config.name_or_path
    try:
        if not source:
            raise OSError("the model was not loaded from a checkpoint")
        if layout_of(model).pictures:
            return cast("PreTrainedTokenizerBase", load_processor(source))
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"texts are given without a tokenizer and '{source}', where the model came from, has none: give "
            "the model's tokenizer (of a model that reads pictures its image processor) with them."
        ) from error


def _finite(means: np.ndarray, removed: np.ndarray, site: Site) -> np.ndarray:
    if means.shape != (site.width,):
        raise ValueError(
            f"the means of site {site.name} have the shape {means.shape}, expected {(site.width,)}: take "
            "them from scores or texts of this model."
        )
    bad = removed[~np.isfinite(means[removed])]
    if len(bad):
        raise ValueError(
            f"the mean of neuron {site.name}.{bad[0]} is {means[bad[0]]}, expected a finite number: score "
            "again, or give texts and tokenizer, or use repair='none'."
        )
    return np.asarray(means[removed], dtype=np.float64)


def _narrow_config(
    model: PreTrainedModel, narrow: type[NarrowModel], plan: Plan, repair: str, cuts: Sequence[_Cut]
) -> Any:
    settings = model.config.to_dict()
    # What names the dense checkpoint or is written anew on saving.
    for key in ("model_type", "architectures", "transformers_version", "_name_or_path", "name_or_path"):
        settings.pop(key, None)
    widths = {cut.site.name: len(cut.kept) for cut in cuts}
    queries = [cut for cut in cuts if cut.site.kind == "query"]
    heads = {cut.site.layer: int(np.count_nonzero(_counts(cut.kept.numpy(), cut.site))) for cut in queries}
    config_class: Any = narrow.config_class
    layout = layout_of(model)
    if layout.site_map is not None:
        layers: list[dict[str, int]] = [{} for _ in layers_of(model)]
        for cut in cuts:
            layers[cut.site.layer][cut.site.kind] = len(cut.kept)
        settings["mapped"] = {
            "class": type(model).__name__,
            "family": model.config.model_type,
            "pooler": getattr(base_model(model), "pooler", None) is not None,
            "map": dict(layout.site_map),
            "layers": layers,
        }
    else:
        settings = config_class.of_layers(settings, list(heads))
        settings["per_layer_config"] = _per_layer(widths, heads)
    settings["obce"] = {
        "version": __version__,
        "score": plan.score,
        "preset": plan.preset,
        "keep": plan.keep,
        "of": plan.of,
        "repair": repair,
        "corpus_hash": plan.corpus_hash,
        "model_hash": plan.model_hash,
    }
    if plan.layers_dropped:
        settings["obce"]["layers_dropped"] = list(plan.layers_dropped)
    attention = model.config._attn_implementation
    if attention in ("eager", "sdpa"):
        settings["attn_implementation"] = attention
    return config_class(**settings)


def _per_layer(widths: Mapping[str, int], heads: Mapping[int, int]) -> dict[int, dict[str, int]]:
    """Widths as the config has them; layers that stay are numbered anew."""
    return {
        place: {
            "kept_query_key_size": widths[f"{layer}.query"],
            "kept_value_size": widths[f"{layer}.value"],
            "kept_intermediate_size": widths[f"{layer}.intermediate"],
            "kept_heads": heads[layer],
            "kept_attention_output_size": widths[f"{layer}.attention_output"],
            "kept_output_size": widths[f"{layer}.output"],
        }
        for place, layer in enumerate(heads)
    }


@torch.no_grad()
def _fill(small: PreTrainedModel, model: PreTrainedModel, cuts: Sequence[_Cut]) -> None:
    """Gives the empty model its weights: sliced where neurons go, else cloned; tied where the dense are."""
    base, layout = base_model(model), layout_of(model)
    sliced: dict[nn.Module, dict[str, torch.Tensor]] = {}
    rows: dict[nn.Linear, list[torch.Tensor]] = {}  # that go
    spread: set[nn.Linear] = set()  # whose rows keep their places
    for cut in cuts:
        writer = _linear(base, cut.site.writer)
        kept = cut.kept.to(writer.weight.device)
        if cut.site.kind not in _RESIDUAL:
            removed = cut.site.rows(cut.removed)
            for name in cut.site.writers:
                rows.setdefault(_linear(base, name), []).append(removed)
            if cut.site.kind in PER_HEAD and layout.site_map is not None:
                spread.add(writer)
        else:
            parts = sliced.setdefault(writer, _with_bias(writer))
            if len(cut.removed):
                # last of the cuts of its Linear: what the columns left in the bias of a removed row is overwritten
                parts["weight"] = parts["weight"].index_select(0, kept)
                fill = cut.fill.to(parts["bias"].dtype).to(kept.device)
                parts["bias"] = parts["bias"].index_copy(0, cut.removed.to(kept.device), fill)
                parts["kept"] = kept
        if cut.site.reader is not None and len(cut.removed):
            reader = _linear(base, cut.site.reader)
            parts = sliced.setdefault(reader, _with_bias(reader))
            # Added in float64 on the host: some devices have no float64, and half precision would lose terms.
            columns, fill = cut.read()
            lost = parts["weight"].cpu().double().index_select(1, columns) @ fill
            parts["bias"] = (parts["bias"].cpu().double() + lost).to(parts["bias"])
            parts["weight"] = parts["weight"].index_select(1, cut.site.read_by(cut.kept).to(reader.weight.device))
            if writer in spread:
                parts["columns"] = cut.kept.to(reader.weight.device)
        if layout.rotary and cut.site.kind == "query" and (pairs := _pairs(cut.site, kept)) is not None:
            sliced[base.get_submodule(cut.site.writer.rpartition(".")[0])] = {"pairs": pairs}
    for writer, some in rows.items():
        weight = matrix(writer)
        stays = torch.ones(len(weight), dtype=torch.bool)
        stays[torch.cat(some)] = False
        places = torch.nonzero(stays).flatten().to(weight.device)
        own = {"weight": weight} if writer.bias is None else {"weight": weight, "bias": writer.bias}
        sliced[writer] = {key: tensor.index_select(0, places) for key, tensor in own.items()}
        if writer in spread and len(places) < len(weight):
            sliced[writer]["places"] = places
    modules = dict(model.named_modules(remove_duplicate=False))
    made: dict[int, nn.Parameter] = {}
    stay = sorted({cut.site.layer for cut in cuts})
    for name, module in small.named_modules(remove_duplicate=False):
        dense = modules.get(_dense_name(name, layout.stack, stay))
        given = {} if dense is None else sliced.get(dense, {})
        if dense is None or not _matches(dense, module, given):
            raise ValueError(
                f"model has a {type(dense).__name__} at {name!r}, expected the {type(module).__name__} that "
                f"transformers' {type(model).__name__} holds there; replaced heads cannot be pruned."
            )
        for key, old in dense.named_parameters(recurse=False):
            if getattr(module, key) is None:
                continue  # of no input features
            if id(old) not in made:
                data = given.get(key, old)
                if key == "weight" and key in given and transposed(module):
                    data = data.T.clone(memory_format=torch.contiguous_format)
                if data.shape != getattr(module, key).shape:
                    raise ValueError(
                        f"model has a {name}.{key} of shape {tuple(old.shape)}, expected "
                        f"{tuple(getattr(module, key).shape)} as its config states."
                    )
                data = data.detach().clone() if data is old else data
                made[id(old)] = nn.Parameter(data, requires_grad=old.requires_grad)
            setattr(module, key, made[id(old)])
        for key, buffer in dense.named_buffers(recurse=False):
            if hasattr(module, key):
                setattr(module, key, buffer.detach().clone())
        # what the dense one has not: a bias, or numbers of what is left
        for key in given.keys() - dict(dense.named_parameters(recurse=False)).keys():
            if getattr(module, key, None) is not None:
                setattr(module, key, nn.Parameter(given[key]) if key == "bias" else given[key])


def _with_bias(linear: nn.Linear) -> dict[str, torch.Tensor]:
    """Weight and bias of a Linear that writes the residual stream; zeros where it has no bias."""
    weight = matrix(linear)
    return {"weight": weight, "bias": weight.new_zeros(len(weight)) if linear.bias is None else linear.bias}


def _pairs(site: Site, kept: torch.Tensor) -> torch.Tensor | None:
    """int64 [heads, pairs], which of a dense head's rotary pairs are left in each head that is; None if all."""
    size = site.width // site.heads
    left = len(torch.unique(kept // size))
    return None if len(kept) == left * size else (kept % size).view(left, 2, -1)[:, 0].contiguous()


def _matrix(base: PreTrainedModel, name: str) -> torch.Tensor:
    return matrix(base.get_submodule(name))


def _linear(base: PreTrainedModel, name: str) -> nn.Linear:
    return cast(nn.Linear, base.get_submodule(name))


def _dropped_layers(model: PreTrainedModel, plan: Plan) -> list[nn.Module]:
    """The layers' modules."""
    layers = layers_of(model)
    return [layers[layer] for layer in plan.layers_dropped]


def _dense_name(name: str, stack: str, stay: Sequence[int]) -> str:
    """Name in the dense model of a module of the small one, whose layers are those of `stay`."""
    return re.sub(rf"(\b{re.escape(stack)}\.)(\d+)", lambda at: f"{at[1]}{stay[int(at[2])]}", name, count=1)


def _matches(dense: nn.Module, small: nn.Module, given: Mapping[str, torch.Tensor]) -> bool:
    if isinstance(small, ObceRows):
        return isinstance(dense, nn.Linear) or transposed(dense)
    # angles of the kinds of layers that are left
    if isinstance(small, (nn.ModuleList, ModernBertRotaryEmbedding)) or (
        isinstance(small, (NarrowAttention, ObceDebertaV2SelfAttention)) and not small.num_attention_heads
    ):
        return _names(small) <= _names(dense)
    return _names(small) == _names(dense) | given.keys()


def _names(module: nn.Module) -> set[str]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name for name, _ in own} | {name for name, _ in module.named_children()}
