"""Model + plan -> smaller model: the planned neurons are cut out of the Linears that write and read them.

What replaces a removed neuron (the repair) is exact algebra:

- `value` and `intermediate` neurons are columns of a reader y = W x + b. Replacing neuron i by a constant c_i
  adds W[:, i] c_i to every output, so the column goes and the bias takes the term. For a value neuron the
  reader takes in the attention context, a mixture of the neuron's values over the tokens; attention weights
  sum to one, so a constant neuron has that constant as its context.
- `query` and `key` neurons go in pairs (same index of the same head). Attention takes the softmax over the
  keys j of s * sum_d q_id k_jd. A removed pair held at constants adds s * q_d k_d, the same number for every
  j, and the softmax does not change when all its arguments move alike. So constants and zeros give the same
  model: `mean` and `none` do not differ there. The scale s stays that of the dense head size.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from obce import __version__
from obce.capture import token_means
from obce.configuration_obce import ObceBertConfig
from obce.corpus import tokenize
from obce.modeling_obce import (
    ObceBertForMaskedLM,
    ObceBertForMultipleChoice,
    ObceBertForNextSentencePrediction,
    ObceBertForPreTraining,
    ObceBertForQuestionAnswering,
    ObceBertForSequenceClassification,
    ObceBertForTokenClassification,
    ObceBertModel,
    ObceBertPreTrainedModel,
)
from obce.sites import Site, base_model, find_sites, model_hash, usable_max_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from obce.corpus import Corpus
    from obce.plan import Plan
    from obce.scores import Scores

REPAIRS = ("none", "mean")

PRUNABLE_KINDS = ("query", "key", "value", "intermediate")

_NARROW: dict[str, type[ObceBertPreTrainedModel]] = {
    "BertModel": ObceBertModel,
    "BertForPreTraining": ObceBertForPreTraining,
    "BertForMaskedLM": ObceBertForMaskedLM,
    "BertForNextSentencePrediction": ObceBertForNextSentencePrediction,
    "BertForSequenceClassification": ObceBertForSequenceClassification,
    "BertForMultipleChoice": ObceBertForMultipleChoice,
    "BertForTokenClassification": ObceBertForTokenClassification,
    "BertForQuestionAnswering": ObceBertForQuestionAnswering,
}


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


@dataclass(frozen=True, slots=True)
class _Repair:
    """What replaces a removed neuron, and where its constants come from."""

    name: str
    scores: Scores | None
    texts: Corpus | Sequence[str] | None
    tokenizer: PreTrainedTokenizerBase | None


def prune(
    model: PreTrainedModel,
    plan: Plan,
    *,
    repair: str = "mean",
    scores: Scores | None = None,
    texts: Corpus | Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Builds the smaller model; the given one is not touched.

    Args:
        model: The dense `BertModel` or `BertFor*` that the plan was made for.
        plan: Kept neurons, from `obce.plan`.
        repair: What replaces a removed neuron: `"none"` zero, `"mean"` its mean over all tokens of the texts,
            folded into the bias of its reader (see the head of this module; query and key need none).
        scores: For `repair="mean"`: take the means from this table (its column `token_mean`).
        texts: For `repair="mean"`, instead of `scores`: take the means over these texts. Texts of the
            model's own task serve best.
        tokenizer: Tokenizer of the model, with `texts` (default: the one saved beside the model).

    Returns:
        A model of the matching `ObceBert*` class with the same head, labels, dtype, devices, training flag
        and attention implementation (but `sdpa` where the dense model has a flash or flex kernel, which need
        equal head sizes). `config.obce` records how it was made. With a plan that removes nothing its
        outputs are bit by bit those of the dense model.

    Raises:
        ValueError: The plan is of another model or its indices are not what can be cut, the repair is
            unknown, means are needed but neither `scores` nor `texts` is given or both are, or the model is
            not a dense BERT encoder of a known class.
    """
    narrow = _narrow_class(model)
    cuts = _cuts(model, plan, _Repair(repair, scores, texts, tokenizer))
    config = _narrow_config(model, plan, repair, cuts)
    small: ObceBertPreTrainedModel
    with torch.device("meta"):
        if type(model).__name__ == "BertModel":
            small = ObceBertModel(config, add_pooling_layer=model.pooler is not None)
        else:
            small = narrow(config)
    _fill(small, model, cuts)
    small.train(model.training)
    return small


@contextmanager
def masked(
    model: PreTrainedModel,
    plan: Plan,
    *,
    repair: str = "mean",
    scores: Scores | None = None,
    texts: Corpus | Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[PreTrainedModel]:
    """Inside the `with`, the dense model answers as the pruned one would, up to rounding; no weight is
    changed.

    Removed query and key neurons give zero; what a reader takes in from a removed value or intermediate
    neuron is its replacement. Arguments and errors are those of `prune`, but any `BertFor*` will do.

    Yields:
        The given model itself, with hooks that are removed at the end of the `with`.
    """
    cuts = _cuts(model, plan, _Repair(repair, scores, texts, tokenizer))
    base = base_model(model)
    handles = []
    try:
        for cut in cuts:
            if not len(cut.removed):
                continue
            gone = torch.zeros(cut.site.width, dtype=torch.bool)
            gone[cut.removed] = True
            fill = torch.zeros(cut.site.width, dtype=torch.float64)
            fill[cut.removed] = cut.fill
            if cut.site.reader is None:
                handles.append(base.get_submodule(cut.site.writer).register_forward_hook(_OutputMask(gone, fill)))
            else:
                handles.append(base.get_submodule(cut.site.reader).register_forward_pre_hook(_InputMask(gone, fill)))
        yield model
    finally:
        for handle in handles:
            handle.remove()


class _Mask:
    """Replaces neurons [..., width] by constants; the tensors follow the activations' device and dtype."""

    def __init__(self, gone: torch.Tensor, fill: torch.Tensor) -> None:
        self.gone = gone
        self.fill = fill

    def replace(self, x: torch.Tensor) -> torch.Tensor:
        fill = self.fill.to(x.dtype).to(x.device)
        return torch.where(self.gone.to(x.device), fill, x)


class _OutputMask(_Mask):
    def __call__(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return self.replace(output)


class _InputMask(_Mask):
    def __call__(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (self.replace(args[0]), *args[1:])


def _narrow_class(model: PreTrainedModel) -> type[ObceBertPreTrainedModel]:
    find_sites(model)  # refuses other families with the reason
    cls = type(model)
    if cls.__name__ not in _NARROW or not cls.__module__.startswith("transformers."):
        raise ValueError(f"model is a {cls.__name__}, expected one of {', '.join(_NARROW)} of transformers.")
    return _NARROW[cls.__name__]


def _cuts(model: PreTrainedModel, plan: Plan, repair: _Repair) -> list[_Cut]:
    """The plan, checked against the model, with the repair's constants; every prunable site, in order."""
    if repair.name not in REPAIRS:
        raise ValueError(f"repair is {repair.name!r}, expected one of {', '.join(map(repr, REPAIRS))}.")
    if repair.scores is not None and repair.texts is not None:
        raise ValueError("scores and texts are both given, expected one: the means come from either.")
    sites = {site.name: site for site in find_sites(model)}
    found = model_hash(model)
    if plan.model_hash != found:
        raise ValueError(
            f"plan was made for the model with hash {plan.model_hash[:12]}..., but this model has "
            f"{found[:12]}...: score this model and plan again, or load the weights that were scored."
        )
    kept = _checked_indices(plan.kept, sites)
    removed = {name: np.setdiff1d(np.arange(sites[name].width), kept[name]) for name in kept}
    fills = {name: np.zeros(len(indices)) for name, indices in removed.items()}
    if repair.name == "mean":
        repaired = [site for site in sites.values() if site.name in kept and site.reader and len(removed[site.name])]
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


def _checked_indices(plan_kept: Mapping[str, Sequence[int]], sites: Mapping[str, Site]) -> dict[str, np.ndarray]:
    """Kept indices int64 of every prunable site; a site that the plan leaves out is kept whole."""
    for name in plan_kept:
        if name not in sites or sites[name].kind not in PRUNABLE_KINDS:
            prunable = [s.name for s in sites.values() if s.kind in PRUNABLE_KINDS]
            raise ValueError(
                f"plan.kept has the site {name!r}, expected only sites that can be cut: {prunable[0]} to "
                f"{prunable[-1]}, of the kinds {', '.join(PRUNABLE_KINDS)}."
            )
    kept = {}
    for name, site in sites.items():
        if site.kind not in PRUNABLE_KINDS:
            continue
        try:
            indices = np.array([operator.index(i) for i in plan_kept.get(name, range(site.width))], dtype=np.int64)
        except TypeError as error:
            raise ValueError(f"plan.kept[{name!r}] holds {error.args[0]}, expected integers.") from None
        if not len(indices) or np.any(np.diff(indices) <= 0) or indices[0] < 0 or indices[-1] >= site.width:
            raise ValueError(
                f"plan.kept[{name!r}] is {_shown(indices)}, expected at least one neuron, distinct and "
                f"ascending, from 0 to {site.width - 1}."
            )
        counts = np.bincount(indices // (site.width // site.heads), minlength=site.heads)
        if counts.min() != counts.max():
            raise ValueError(
                f"plan.kept[{name!r}] keeps {counts.tolist()} neurons in the heads of its layer, expected "
                "the same number in each."
            )
        kept[name] = indices
    for name, site in sites.items():
        if site.kind == "query" and not np.array_equal(kept[name], kept[f"{site.layer}.key"]):
            raise ValueError(
                f"plan.kept keeps other neurons of {name!r} than of '{site.layer}.key', expected the same "
                "indices: query and key neurons are cut in pairs."
            )
    return kept


def _shown(indices: np.ndarray) -> str:
    listed = ", ".join(map(str, indices[:8].tolist()))
    return f"[{listed}, ...] ({len(indices)} indices)" if len(indices) > 8 else f"[{listed}]"


def _token_means(
    model: PreTrainedModel, plan: Plan, repaired: Sequence[Site], repair: _Repair
) -> Mapping[str, np.ndarray]:
    """Site name -> float64 [width], mean over all real tokens of what the site's reader takes in."""
    scores, texts, tokenizer = repair.scores, repair.texts, repair.tokenizer
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
    if texts is None:
        raise ValueError(
            "repair='mean' needs the means of the removed neurons, but neither scores nor texts is given: "
            "give scores=, or texts= and tokenizer=, or use repair='none'."
        )
    if tokenizer is None:
        tokenizer = _own_tokenizer(model)
    batches = tokenize(texts, tokenizer, max_length=usable_max_length(model, tokenizer))
    return token_means(model, batches, repaired)


def _own_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    source = model.config.name_or_path
    try:
        if not source:
            raise OSError("the model was not loaded from a checkpoint")
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"texts are given without a tokenizer and '{source}', where the model came from, has none: give "
            "the model's tokenizer with them."
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


def _narrow_config(model: PreTrainedModel, plan: Plan, repair: str, cuts: Sequence[_Cut]) -> ObceBertConfig:
    settings = model.config.to_dict()
    # What names the dense checkpoint or is written anew on saving.
    for key in ("model_type", "architectures", "transformers_version", "_name_or_path", "name_or_path"):
        settings.pop(key, None)
    widths = {cut.site.name: len(cut.kept) for cut in cuts}
    settings["per_layer_config"] = {
        layer: {
            "kept_query_key_size": widths[f"{layer}.query"],
            "kept_value_size": widths[f"{layer}.value"],
            "kept_intermediate_size": widths[f"{layer}.intermediate"],
        }
        for layer in sorted({cut.site.layer for cut in cuts})
    }
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
    attention = model.config._attn_implementation
    if attention in ("eager", "sdpa"):
        settings["attn_implementation"] = attention
    return ObceBertConfig(**settings)


@torch.no_grad()
def _fill(small: PreTrainedModel, model: PreTrainedModel, cuts: Sequence[_Cut]) -> None:
    """Gives the empty model its weights: sliced where neurons go, else cloned; tied where the dense are."""
    sliced: dict[nn.Module, dict[str, torch.Tensor]] = {}
    base = base_model(model)
    for cut in cuts:
        writer = _linear(base, cut.site.writer)
        kept = cut.kept.to(writer.weight.device)
        parts = sliced.setdefault(writer, {"weight": writer.weight, "bias": writer.bias})
        parts["weight"] = parts["weight"].index_select(0, kept)
        parts["bias"] = parts["bias"].index_select(0, kept)
        if cut.site.reader is not None and len(cut.removed):
            reader = _linear(base, cut.site.reader)
            parts = sliced.setdefault(reader, {"weight": reader.weight, "bias": reader.bias})
            # Added in float64 on the host: some devices have no float64, and half precision would lose terms.
            lost = parts["weight"].cpu().double().index_select(1, cut.removed) @ cut.fill
            parts["bias"] = (parts["bias"].cpu().double() + lost).to(reader.bias)
            parts["weight"] = parts["weight"].index_select(1, cut.kept.to(reader.weight.device))
    modules = dict(model.named_modules(remove_duplicate=False))
    made: dict[int, nn.Parameter] = {}
    for name, module in small.named_modules(remove_duplicate=False):
        dense = modules.get(name)
        if dense is None or _names(dense) != _names(module):
            raise ValueError(
                f"model has a {type(dense).__name__} at {name!r}, expected the {type(module).__name__} that "
                f"transformers' {type(model).__name__} holds there; replaced heads cannot be pruned."
            )
        for key, old in dense.named_parameters(recurse=False):
            if id(old) not in made:
                data = sliced.get(dense, {}).get(key, old)
                if data.shape != getattr(module, key).shape:
                    raise ValueError(
                        f"model has a {name}.{key} of shape {tuple(old.shape)}, expected "
                        f"{tuple(getattr(module, key).shape)} as its config states."
                    )
                data = data.detach().clone() if data is old else data
                made[id(old)] = nn.Parameter(data, requires_grad=old.requires_grad)
            setattr(module, key, made[id(old)])
        for key, buffer in dense.named_buffers(recurse=False):
            setattr(module, key, buffer.detach().clone())


def _linear(base: PreTrainedModel, name: str) -> nn.Linear:
    return cast(nn.Linear, base.get_submodule(name))


def _names(module: nn.Module) -> set[str]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name for name, _ in own} | {name for name, _ in module.named_children()}
