"""Pruned models of families that a user's site map made known: one configuration and one model for all of them.

`obce.modeling_obce` has a class for every class of a family that obce knows, with narrower attention of its own. Of
other families nothing is known but where some Linears are, so their own class of transformers does the work, whatever
it is, and only those Linears are replaced:

- query, key and value compute the rows that are left and put them in their places among zeros, as wide as before, and
  attention_output takes in the columns that are left: attention sees the shapes that it is written for;
- intermediate and output are narrower, since what stands between them works number by number.

The classes are made when they are needed, of `ObceMapped` and the class of transformers: `ObceCamembertModel`, of
`CamembertModel`. Names of parameters, heads, generation and embeddings are that class's own.
This file is copied into checkpoints: it imports nothing of obce but the files that are copied with it.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .configuration_obce import LayerWidths
from .modeling_obce import CheckedModel, ObceRows
from .sitemap_obce import checked_site_map

# Kinds that attention splits among heads, whose Linears stay as wide as they were.
_IN_ATTENTION = ("query", "key", "value")

_READ_BY = {"value": "attention_output", "intermediate": "output"}


# ---- configuration ---------------------------------------------------------------------------------------------------


if TYPE_CHECKING:
    _Base = PreTrainedConfig
else:
    _Base = object


class _Mapped(_Base):
    """What the configurations of all mapped families share, beside the family's own."""

    stock_family: ClassVar[str | None] = None

    if TYPE_CHECKING:
        mapped: Any
        obce: Any

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.mapped is not None:
            _check_mapped(self.mapped)

    def layer_widths(self) -> list[LayerWidths]:
        """Neurons that each layer keeps of the kinds that the map names, 0 of the others."""
        heads = int(getattr(self, "num_attention_heads", 0) or 0)
        return [
            LayerWidths(
                query_key=one.get("query", 0),
                value=one.get("value", 0),
                intermediate=one.get("intermediate", 0),
                heads=heads if set(one) & set(_IN_ATTENTION) else 0,
                attention_output=one.get("attention_output", 0),
                output=one.get("output", 0),
            )
            for one in self.mapped["layers"]
        ]

    def stock(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings of this model, as those of a model of the family that has zeros for what went."""
        return {name: value for name, value in settings.items() if name != "mapped"}


@strict
class ObceMappedConfig(_Mapped, PreTrainedConfig):
    """Configuration of a pruned model of a mapped family; what it reads is of a class made of the family's own.

    Args:
        mapped: `class`, the class of transformers that the pruned one stands on; `family`, its `model_type`; `pooler`,
            whether the base model has one; `map`, the site map; `layers`, for each layer the neurons that are kept of
            each kind that the map names.
        obce: How the model was made (score, preset, repair, corpus, ...); for people and reports.
        **kwargs: As for the family's configuration.

    Raises:
        ValueError: `mapped` holds something else.
    """

    model_type = "obce_mapped"

    mapped: dict[str, Any] | None = None
    obce: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; gives the class that is made of the family's own."""
        mapped = config_dict.get("mapped")
        _check_mapped(mapped)
        return config_class_of(mapped["family"]).from_dict(config_dict, **kwargs)  # type: ignore[index]


@functools.cache
def config_class_of(family: str) -> Any:
    """The configuration of pruned models of a family, made of the family's own.

    Raises:
        ValueError: transformers does not know the family.
    """
    if family not in CONFIG_MAPPING:
        raise ValueError(f"mapped: family is {family[:80]!r}, expected a model_type that transformers knows")
    stock = CONFIG_MAPPING[family]
    body = {
        "__module__": __name__,
        "__doc__": f"Configuration of pruned models of the family {family!r}: see `ObceMappedConfig`.",
        "__annotations__": {"mapped": dict[str, Any] | None, "obce": dict[str, Any] | None},
        "model_type": ObceMappedConfig.model_type,
        "mapped": None,
        "obce": None,
    }
    made: Any = strict(type(ObceMappedConfig.__name__, (_Mapped, stock), body))
    auto: Any = transformers
    for entry in ENTRIES:
        if stock in getattr(auto, entry.auto)._model_mapping:
            getattr(auto, entry.auto).register(made, entry, exist_ok=True)
    tokenizer = auto.TOKENIZER_MAPPING.get(stock, None)
    if tokenizer is not None:
        auto.TOKENIZER_MAPPING.register(made, tokenizer, exist_ok=True)
    return made


def _check_mapped(mapped: Any) -> None:
    keys = {"class", "family", "pooler", "map", "layers"}
    if not isinstance(mapped, Mapping) or set(mapped) != keys:
        found = sorted(mapped) if isinstance(mapped, Mapping) else type(mapped).__name__
        raise ValueError(f"mapped has {found}, expected the keys {', '.join(sorted(keys))}")
    if not isinstance(mapped["family"], str) or not isinstance(mapped["class"], str):
        raise ValueError("mapped: class or family is no text, expected the names of a class and a model_type")
    if not isinstance(mapped["pooler"], bool):
        raise ValueError(f"mapped: pooler is {str(mapped['pooler'])[:60]!r}, expected true or false")
    kinds = checked_site_map(mapped["map"], "config.json")["sites"]
    if not isinstance(mapped["layers"], (list, tuple)):
        raise ValueError("mapped: layers is no list, expected the widths of every layer")
    for layer, one in enumerate(mapped["layers"]):
        if not isinstance(one, Mapping) or set(one) != set(kinds) or not all(type(n) is int for n in one.values()):
            raise ValueError(f"mapped: layers[{layer}] is not a whole number for each of {', '.join(kinds)}")


# ---- Linears ---------------------------------------------------------------------------------------------------------


class ObceSpread(nn.Module):
    """A Linear that computes some of its rows and puts them in their places; the others give zero.

    Attributes:
        weight: [kept, in_features].
        bias: [kept], or None.
        places: int64 [kept], ascending row numbers; part of the state.
    """

    places: torch.Tensor

    def __init__(self, in_features: int, out_features: int, kept: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.zeros(kept, in_features))
        self.bias = nn.Parameter(torch.zeros(kept)) if bias else None
        self.register_buffer("places", torch.arange(kept))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        rows = nn.functional.linear(x, self.weight, self.bias)
        return rows.new_zeros(*rows.shape[:-1], self.out_features).index_copy(-1, self.places, rows)

    def extra_repr(self) -> str:
        """As a Linear's, with the number of rows that are computed."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kept={len(self.places)}"


class ObceColumns(nn.Linear):
    """A Linear that reads some of the numbers it is given.

    Attributes:
        columns: int64 [in_features], ascending, which ones; part of the state.
        given: How many it is given.
    """

    columns: torch.Tensor

    def __init__(self, in_features: int, out_features: int, given: int) -> None:
        super().__init__(in_features, out_features)
        self.given = given
        self.register_buffer("columns", torch.arange(in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., given] -> [..., out_features]."""
        return super().forward(x.index_select(-1, self.columns))


class ObceColumnRows(ObceRows):
    """An `ObceRows` that reads some of the numbers it is given.

    Attributes:
        columns: int64 [in_features], ascending, which ones; part of the state.
        given: How many it is given.
    """

    columns: torch.Tensor

    def __init__(self, in_features: int, out_features: int, kept: int, given: int) -> None:
        super().__init__(in_features, out_features, kept)
        self.given = given
        self.register_buffer("columns", torch.arange(in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., given] -> [..., out_features]."""
        return super().forward(x.index_select(-1, self.columns))


def _reader(linear: nn.Linear, columns: int, rows: int, spread: bool) -> nn.Module:
    """What reads `columns` of what a Linear reads, and computes `rows` of its rows; always with a bias."""
    given, hidden = linear.in_features, linear.out_features
    if columns == given or not spread:
        whole = columns and rows == hidden
        return nn.Linear(columns, hidden) if whole else ObceRows(columns, hidden, rows)
    return (
        ObceColumns(columns, hidden, given)
        if columns and rows == hidden
        else ObceColumnRows(columns, hidden, rows, given)
    )


def _narrow(body: PreTrainedModel, mapped: Mapping[str, Any]) -> None:
    """Replaces a dense model's Linears by the smaller ones that the configuration states."""
    layout = mapped["map"]
    layers: Any = body.get_submodule(layout["stack"])
    if len(layers) != len(mapped["layers"]):
        raise ValueError(f"mapped: layers has {len(mapped['layers'])} layers, but the model {len(layers)}")
    sites = {kind: [named] if isinstance(named, str) else list(named) for kind, named in layout["sites"].items()}
    made: nn.Module
    for number, (layer, kept) in enumerate(zip(layers, mapped["layers"], strict=True)):
        dense = {name: layer.get_submodule(name) for names in sites.values() for name in names}
        rows = {name: module.out_features for name, module in dense.items()}
        for kind, names in sites.items():
            reader = _READ_BY.get(kind)
            first = dense[names[0]]
            width = dense[sites[reader][0]].in_features if reader else int(body.config.hidden_size)
            if not (0 if kind in _IN_ATTENTION else 1) <= kept[kind] <= width:
                raise ValueError(f"mapped: layers[{number}] keeps {kept[kind]} of {kind}, expected at most {width}")
            blocks = len(layout.get("blocks", {}).get(kind, [0]))
            for name in names:
                rows[name] -= (width - kept[kind]) * blocks
            if kind in _READ_BY.values():
                at = next(writer for writer, by in _READ_BY.items() if by == kind)
                made = _reader(first, kept[at], kept[kind], at in _IN_ATTENTION)
                layer.set_submodule(names[0], made)
        for kind, names in sites.items():
            for name in names:
                old = dense[name]
                if kind in _READ_BY.values() or rows[name] == old.out_features or layer.get_submodule(name) is not old:
                    continue
                taken, bias = old.in_features, old.bias is not None
                made = nn.Linear(taken, rows[name], bias)
                if kind in _IN_ATTENTION:
                    made = ObceSpread(taken, old.out_features, rows[name], bias)
                layer.set_submodule(name, made)


# ---- models ----------------------------------------------------------------------------------------------------------


class ObceMapped(CheckedModel):
    """A pruned model of any mapped family; `from_pretrained` gives the class that it was pruned as.

    Attributes:
        auto: Auto class of transformers that gives the class of transformers which a subclass stands for.
    """

    config_class = ObceMappedConfig
    auto: ClassVar[str] = ""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        stock = stock_of(type(self))
        super().__init__(config, *args, **{**pooling_of(stock, config.mapped["pooler"]), **kwargs})
        body: Any = self.base_model
        pooler = getattr(body, "pooler", None) is not None
        config.mapped = {**config.mapped, "class": stock.__name__, "pooler": pooler}
        _narrow(body, config.mapped)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As in transformers; see `CheckedModel.from_pretrained`.

        Raises:
            ValueError: A file is damaged, or the family has no class of this kind.
        """
        source = pretrained_model_name_or_path
        if not cls.__dict__.get("made", False):
            stated: Any = ObceMappedConfig.from_pretrained(source) if config is None else config
            name = _class_of_auto(stated.mapped["family"], cls.auto) if cls.auto else stated.mapped["class"]
            return class_of(stated.mapped["family"], name).from_pretrained(source, *args, config=config, **kwargs)
        loaded = super().from_pretrained(source, *args, config=config, **kwargs)
        _check_places(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded


class ObceMappedModel(ObceMapped):
    """Opens a pruned model without its head."""

    auto = "AutoModel"


class ObceMappedForPreTraining(ObceMapped):
    """Opens a pruned model with its heads for pre-training."""

    auto = "AutoModelForPreTraining"


class ObceMappedForMaskedLM(ObceMapped):
    """Opens a pruned masked language model."""

    auto = "AutoModelForMaskedLM"


class ObceMappedForNextSentencePrediction(ObceMapped):
    """Opens a pruned predictor of the next sentence."""

    auto = "AutoModelForNextSentencePrediction"


class ObceMappedForSequenceClassification(ObceMapped):
    """Opens a pruned sequence classifier."""

    auto = "AutoModelForSequenceClassification"


class ObceMappedForMultipleChoice(ObceMapped):
    """Opens a pruned model for multiple choice."""

    auto = "AutoModelForMultipleChoice"


class ObceMappedForTokenClassification(ObceMapped):
    """Opens a pruned token classifier."""

    auto = "AutoModelForTokenClassification"


class ObceMappedForQuestionAnswering(ObceMapped):
    """Opens a pruned question answerer."""

    auto = "AutoModelForQuestionAnswering"


class ObceMappedForTextEncoding(ObceMapped):
    """Opens a pruned encoder of a family that has a decoder, too."""

    auto = "AutoModelForTextEncoding"


ENTRIES: tuple[type[ObceMapped], ...] = (
    ObceMappedModel,
    ObceMappedForMaskedLM,
    ObceMappedForNextSentencePrediction,
    ObceMappedForSequenceClassification,
    ObceMappedForMultipleChoice,
    ObceMappedForTokenClassification,
    ObceMappedForQuestionAnswering,
    ObceMappedForPreTraining,
    ObceMappedForTextEncoding,
)
"""Classes that Auto classes are given; what a family gives for pre-training often is one of the others."""


def _class_of_auto(family: str, auto: str) -> str:
    """Name of the class of transformers that an Auto class gives for a family; "" where it gives none."""
    found = getattr(transformers, auto)._model_mapping.get(CONFIG_MAPPING[family], None)
    found = found[0] if isinstance(found, (tuple, list)) else found
    return "" if found is None else found.__name__


def classes_of(family: str) -> dict[str, type[ObceMapped]]:
    """Class of transformers that the Auto classes give for a family -> the one of ours that opens it."""
    found: dict[str, type[ObceMapped]] = {}
    for entry in ENTRIES:
        name = _class_of_auto(family, entry.auto)
        if name:
            found.setdefault(name, entry)
    return found


@functools.cache
def class_of(family: str, name: str) -> type[ObceMapped]:
    """The pruned form of a class of transformers.

    Raises:
        ValueError: The family has no such class among those that the Auto classes give.
    """
    config, known = config_class_of(family), classes_of(family)
    if name not in known:
        raise ValueError(f"class is {name[:80]!r} of the family {family!r}, expected one of {', '.join(known)}")
    stock = getattr(transformers, name)
    body = {
        "__module__": __name__,
        "__doc__": f"`{name}` with smaller Linears.",
        "config_class": config,
        "made": True,
    }
    return type(f"Obce{name}", (known[name], stock), body)


def stock_of(known: type[Any]) -> Any:
    """The class of transformers that a class made here stands on."""
    return next(one for one in known.__mro__ if one.__module__.startswith("transformers.models."))


def pooling_of(known: type[Any], pooler: bool) -> dict[str, bool]:
    """Arguments of a class of transformers that give its base model a pooler or none, where it asks."""
    return {"add_pooling_layer": pooler} if "add_pooling_layer" in inspect.signature(known).parameters else {}


def _check_places(model: nn.Module) -> None:
    """Numbers of rows and columns go into an index without another look, on some devices without a bound."""
    for name, module in model.named_modules():
        for key, most in (("places", "out_features"), ("columns", "given")):
            found = getattr(module, key, None)
            if not isinstance(module, (ObceSpread, ObceColumns, ObceColumnRows)) or found is None:
                continue
            ascending = bool((found[1:] > found[:-1]).all()) and found.dtype == torch.int64
            if not ascending or not bool(((found >= 0) & (found < getattr(module, most))).all()):
                raise ValueError(
                    f"the checkpoint holds numbers '{name}.{key}' that do not fit its config, expected ascending int64 "
                    f"numbers below {getattr(module, most)}"
                )


__all__ = [
    "ObceColumnRows",
    "ObceColumns",
    "ObceMapped",
    "ObceMappedConfig",
    "ObceMappedForMaskedLM",
    "ObceMappedForMultipleChoice",
    "ObceMappedForNextSentencePrediction",
    "ObceMappedForPreTraining",
    "ObceMappedForQuestionAnswering",
    "ObceMappedForSequenceClassification",
    "ObceMappedForTextEncoding",
    "ObceMappedForTokenClassification",
    "ObceMappedModel",
    "ObceSpread",
    "class_of",
    "classes_of",
    "config_class_of",
    "pooling_of",
    "stock_of",
]
