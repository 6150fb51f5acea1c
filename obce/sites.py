"""Where the neurons of a model are: its Linears, who writes a neuron and who reads it.

A model is resolved by its structure (a stack of layers that each hold the Linears of its family's layout, of the widths
that its config states), so an encoder and every head on it give the same sites.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from obce.sitemap_obce import checked_site_map, read_site_map, site_map_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SITE_KINDS = ("query", "key", "value", "attention_output", "intermediate", "output")

DEFAULT_MAX_LENGTH = 128
"""Tokens a text is cut to when none are named."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a family keeps its sites.

    Attributes:
        stack: Name of the ModuleList of layers, relative to the base model.
        writers: Kind -> its Linear, relative to the layer. That of attention_output reads value, that of output
            reads intermediate; query and key are read by the attention product, and the other two write the residual
            stream.
        between: Modules that stand between the residual stream and what output's Linear takes in, in order; the last
            may hold that Linear.
        norms: LayerNorms of the residual stream behind attention_output and behind output; with `pre_norm` those
            before attention and before the feed-forward part.
        inner: Field of the config that states the width of intermediate.
        activation: Field of the config that names the activation function.
        positions: Whether query and key are also computed of embeddings of distances, in the same forward pass.
        blocks: Kind -> which blocks of its writer's rows are its neurons', each as long as the site is wide; (0,) for
            kinds that are absent. A kind with two blocks is gated: a neuron is the product that its reader takes in.
        biases: Whether every Linear has a bias. Where not, those that write the residual stream of a pruned model do.
        rotary: Whether query and key are turned by their position: neurons i and i + half of a head go together.
        pre_norm: Whether LayerNorms stand before what reads the residual stream, instead of behind what writes it.
        kinds_by: Attribute of a layer by which what the model hands to it differs, besides the hidden states.
        first_norm: LayerNorm of the embeddings, relative to the base model; None where there is none.
        last_norm: LayerNorm behind the last layer, relative to the base model.
        embeddings: Module that gives the first layer its hidden states, relative to the base model.
        partners: Kind -> a second Linear whose rows go with those of its writer: a neuron is the product that its
            reader takes in.
        whole: Kinds none of whose neurons can go.
        causal: Whether a token sees itself and those before it alone, so that the last token is the one to read.
        pictures: Whether the family reads pictures: patches are its tokens, and [CLS] stands before them.
        site_map: What a user's map says, where the layout comes from one (`register_sites`); it may then lack kinds,
            and have "" for norms that the map does not name.
        site_map_file: What that map is called in an error.
    """

    stack: str
    writers: Mapping[str, str]
    between: tuple[str, ...]
    norms: tuple[str, str]
    inner: str = "intermediate_size"
    activation: str = "hidden_act"
    positions: bool = False
    blocks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    biases: bool = True
    rotary: bool = False
    pre_norm: bool = False
    kinds_by: str | None = None
    first_norm: str | None = "embeddings.LayerNorm"
    last_norm: str | None = None
    embeddings: str = "embeddings"
    partners: Mapping[str, str] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    causal: bool = False
    pictures: bool = False
    site_map: Mapping[str, Any] | None = None
    site_map_file: str = ""

    @property
    def site_map_hash(self) -> str:
        """Hash of a user's map; "" for a family that obce knows by itself."""
        return "" if self.site_map is None else site_map_hash(self.site_map)

    def need(self, what: str, **stated: object) -> None:
        """Refuses what a user's map says too little for.

        Raises:
            ValueError: One of the map's keys, given by name with what the map states, is empty; names it.
        """
        for key, value in stated.items():
            if self.site_map is not None and not value:
                raise ValueError(
                    f"site map '{self.site_map_file}' has no key '{key}', which {what} needs: add it (docs/sites.md)"
                )

    def reader(self, kind: str) -> str | None:
        """The Linear that takes in a kind's outputs, relative to the layer."""
        return self.writers[READ_BY[kind]] if kind in READ_BY else None

    def linears(self, kind: str) -> tuple[str, ...]:
        """The Linears that have a kind's rows, relative to the layer."""
        return tuple(names[kind] for names in (self.writers, self.partners) if kind in names)

    def blocks_of(self, kind: str) -> tuple[int, ...]:
        """Which blocks of its writer's rows are the kind's."""
        return self.blocks.get(kind, (0,))


MAPPED = "obce_mapped"
"""`config.model_type` of pruned models of every family that a user's map made known."""

READ_BY = {"value": "attention_output", "intermediate": "output"}
"""Kind -> the kind whose Linear takes it in; the attention product takes in query and key, the stream the others."""


def _named(*writers: str) -> dict[str, str]:
    return dict(zip(SITE_KINDS, writers, strict=True))


_BERT = Layout(
    "encoder.layer",
    _named(
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    between=("intermediate",),
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
)

_DISTILBERT = Layout(
    "transformer.layer",
    _named("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"),
    between=("ffn.lin1", "ffn.activation"),
    norms=("sa_layer_norm", "output_layer_norm"),
    inner="hidden_dim",
    activation="activation",
)

_MPNET = Layout(
    "encoder.layer",
    _named(
        "attention.attn.q",
        "attention.attn.k",
        "attention.attn.v",
        "attention.attn.o",
        "intermediate.dense",
        "output.dense",
    ),
    between=("intermediate",),
    norms=("attention.LayerNorm", "output.LayerNorm"),
)

_DEBERTA = Layout(
    "encoder.layer",
    _named(
        "attention.self.query_proj",
        "attention.self.key_proj",
        "attention.self.value_proj",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    between=("intermediate",),
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    positions=True,
)

_MODERNBERT = Layout(
    "layers",
    _named("attn.Wqkv", "attn.Wqkv", "attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"),
    between=("mlp_norm", "mlp"),
    norms=("attn_norm", "mlp_norm"),
    activation="hidden_activation",
    blocks={"key": (1,), "value": (2,), "intermediate": (0, 1)},
    biases=False,
    rotary=True,
    pre_norm=True,
    kinds_by="attention_type",
    first_norm="embeddings.norm",
    last_norm="final_norm",
)

_GPT2 = Layout(
    "h",
    _named("attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    between=("ln_2", "mlp"),
    norms=("ln_1", "ln_2"),
    inner="n_inner",
    activation="activation_function",
    blocks={"key": (1,), "value": (2,)},
    pre_norm=True,
    first_norm=None,
    last_norm="ln_f",
    embeddings="drop",
    causal=True,
)

_LLAMA = Layout(
    "layers",
    _named(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.down_proj",
    ),
    between=("post_attention_layernorm", "mlp"),
    norms=("input_layernorm", "post_attention_layernorm"),
    biases=False,
    pre_norm=True,
    first_norm=None,
    last_norm="norm",
    embeddings="embed_tokens",
    partners={"intermediate": "mlp.up_proj"},
    whole=("query", "key"),
    causal=True,
)

_VIT = Layout(
    "layers",
    _named("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"),
    between=("layernorm_after", "mlp"),
    norms=("layernorm_before", "layernorm_after"),
    biases=False,
    pre_norm=True,
    first_norm="layers.0.layernorm_before",
    last_norm="layernorm",
    pictures=True,
)

LAYOUTS = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "deberta-v2": _DEBERTA,
    "distilbert": _DISTILBERT,
    "mpnet": _MPNET,
    "modernbert": _MODERNBERT,
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "vit": _VIT,
}
"""Family (`config.model_type`) -> its layout."""

# Families that people will try, and why they are refused.
_REFUSED = {
    "albert": "its layers are one and the same, so that no neuron can go from one of them alone",
    "modernbert-decoder": "of decoders obce knows GPT-2, Llama, Qwen2 and Qwen3",
}

PER_HEAD = ("query", "key", "value")
"""Kinds whose neurons are split among heads."""

POSITIONS = ("cls", "last", "mean")
"""Where outputs are read in a text: at its first token, at its last, or as their mean over all its tokens."""


def register_sites(sites: str | Path | Mapping[str, Any]) -> str:
    """Makes a family known in this process by a map of where its neurons are (docs/sites.md).

    Models of the family can then be scored, planned, cut and repaired like those that obce knows by itself. A second
    map of a family replaces the first.

    Args:
        sites: A TOML file, or the same keys and values as a mapping.

    Returns:
        The family, the map's `model_type`.

    Raises:
        ValueError: The map is damaged or incomplete, or the family needs none or is refused.
    """
    if isinstance(sites, Mapping):
        where, plain = "given", checked_site_map(sites, "given")
    else:
        where, plain = str(sites), read_site_map(sites)
    family: str = plain["model_type"]
    known = LAYOUTS.get(family)
    if family in _REFUSED or (known is not None and known.site_map is None) or family.startswith("obce_"):
        why = f"refuses it: {_REFUSED[family]}" if family in _REFUSED else "knows that family by itself"
        raise ValueError(
            f"site map '{where}': key 'model_type' is {family!r}, but obce {why}; expected a family that is unknown "
            "to it"
        )
    LAYOUTS[family] = mapped_layout(plain, where)
    return family


def mapped_layout(plain: Mapping[str, Any], where: str) -> Layout:
    """The layout that a checked map describes; `where` is what it is called in an error."""
    named = {kind: [name] if isinstance(name, str) else name for kind, name in plain["sites"].items()}
    norms = plain.get("norms", ["", ""])
    return Layout(
        stack=plain["stack"],
        writers={kind: names[0] for kind, names in named.items()},
        between=(),
        norms=(norms[0], norms[1]),
        blocks={kind: tuple(blocks) for kind, blocks in plain.get("blocks", {}).items()},
        biases=False,
        pre_norm=plain.get("pre_norm", False),
        first_norm=plain.get("first_norm", ""),
        last_norm=plain.get("last_norm"),
        partners={kind: names[1] for kind, names in named.items() if len(names) > 1},
        site_map=plain,
        site_map_file=where,
    )


@dataclass(frozen=True, slots=True)
class Site:
    """One kind of neuron in one layer.

    Attributes:
        layer: Layer number, from 0.
        kind: One of `SITE_KINDS`.
        writer: Name of the Linear that has the neurons' rows, relative to the base model.
        reader: Name of the Linear whose columns consume them, relative to the base model; None for query and
            key (read by the attention product) and for attention_output and output (they write the residual
            stream).
        width: Number of neurons.
        heads: Number of heads the width is split into, in order; 1 for kinds that have none.
        starts: Rows of the writer that the neurons are counted from: (0,), unless several sites share a writer. Two of
            them where a neuron has two rows.
        partner: Name of a second Linear that has a row of every neuron, relative to the base model.
        groups: Of key and value, query heads that share one of their heads: a neuron of value is read by so many
            columns of its reader, which go together.
    """

    layer: int
    kind: str
    writer: str
    reader: str | None
    width: int
    heads: int
    starts: tuple[int, ...] = (0,)
    partner: str | None = None
    groups: int = 1

    @property
    def name(self) -> str:
        """`"5.intermediate"`; neuron 830 of it is `"5.intermediate.830"`."""
        return f"{self.layer}.{self.kind}"

    @property
    def gated(self) -> bool:
        """Whether a neuron is a product of two rows' outputs: what the reader takes in, not what the writer gives."""
        return len(self.starts) > 1 or self.partner is not None

    @property
    def writers(self) -> tuple[str, ...]:
        """Names of the Linears that have the neurons' rows."""
        return (self.writer,) if self.partner is None else (self.writer, self.partner)

    @property
    def columns(self) -> slice:
        """The site's part of what its writer gives; with `gated` that of the neurons' first rows."""
        return slice(self.starts[0], self.starts[0] + self.width)

    def rows(self, neurons: torch.Tensor) -> torch.Tensor:
        """Rows of each of the writers that belong to some of the neurons, int64."""
        return torch.cat([neurons + start for start in self.starts])

    def sources(self) -> torch.Tensor:
        """int64 [width x groups], the neuron that each column of the reader takes in."""
        neurons = torch.arange(self.width).view(self.heads, -1)
        return neurons.repeat_interleave(self.groups, 0).flatten()

    def read_by(self, neurons: torch.Tensor) -> torch.Tensor:
        """Columns of the reader that take in some of the neurons, int64, ascending."""
        if self.groups == 1:
            return neurons
        return torch.nonzero(torch.isin(self.sources().to(neurons.device), neurons)).flatten()

    def grouped(self, columns: torch.Tensor) -> torch.Tensor:
        """What the reader takes in, [..., width x groups], as [..., groups, width]: the columns of each neuron."""
        split = columns.reshape(*columns.shape[:-1], self.heads, self.groups, -1)
        return split.transpose(-2, -3).flatten(-2)


def matrix(linear: nn.Module) -> torch.Tensor:
    """Weight of a Linear as [out, in]; of transformers' Conv1D, which keeps it as [in, out], a view.

    A pruned Linear's weight may be None, where it has no inputs.
    """
    weight: torch.Tensor = linear.weight  # type: ignore[assignment]
    return weight.T if transposed(linear) else weight


def transposed(linear: nn.Module) -> bool:
    """Whether the weight is kept as [in, out]: transformers' Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(linear, Conv1D)


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The encoder inside a model with a head; a bare encoder is its own."""
    inner = getattr(model, getattr(model, "base_model_prefix", "") or "base_model", model)
    return inner if isinstance(inner, nn.Module) else model  # type: ignore[return-value]


def find_sites(model: PreTrainedModel) -> list[Site]:
    """All sites of a model, layer by layer, each in the order of `SITE_KINDS`.

    Args:
        model: An encoder or decoder of a family in `LAYOUTS`, with any head or none.

    Raises:
        ValueError: The model is of another family, an encoder set up as a decoder, of settings that obce does not cut,
            already pruned by obce, or its Linears are not the plain ones that its config describes (adapters,
            quantized weights, other widths).
    """
    _refuse_unknown_family(model)
    base = base_model(model)
    layout = layout_of(model)
    if layout.site_map is not None:
        return mapped_sites(model, layout)
    stack = _layer_stack(base, type(model).__name__, layout)
    config = base.config
    hidden, inner, heads = config.hidden_size, inner_width(config), config.num_attention_heads
    attention, groups = attention_shape(config)
    widths = dict.fromkeys(SITE_KINDS, hidden) | {"intermediate": inner, "query": attention}
    widths |= dict.fromkeys(("key", "value"), attention // groups)
    inputs = dict.fromkeys(SITE_KINDS, hidden) | {"attention_output": attention, "output": inner}
    heads_of = {"query": heads, "key": heads // groups, "value": heads // groups}
    rows = dict.fromkeys(layout.writers.values(), 0)
    for kind, name in layout.writers.items():
        rows[name] += widths[kind] * len(layout.blocks_of(kind))
    sites = []
    for layer in range(len(base.get_submodule(stack))):  # type: ignore[arg-type]
        prefix = f"{stack}.{layer}."
        for kind in SITE_KINDS:
            name = layout.writers[kind]
            writer, where = prefix + name, f"{type(model).__name__}: {prefix}{name}"
            _check_linear(base.get_submodule(writer), where, inputs[kind], rows[name], layout.biases)
            read = layout.reader(kind)
            reader = None if read is None else prefix + read
            starts = tuple(block * widths[kind] for block in layout.blocks_of(kind))
            partner = layout.partners.get(kind)
            if partner is not None:
                where, partner = f"{type(model).__name__}: {prefix}{partner}", prefix + partner
                _check_linear(base.get_submodule(partner), where, inputs[kind], rows[name], layout.biases)
            shared = groups if kind in ("key", "value") else 1
            of_heads = heads_of.get(kind, 1)
            sites.append(Site(layer, kind, writer, reader, widths[kind], of_heads, starts, partner, shared))
    return sites


def mapped_sites(model: PreTrainedModel, layout: Layout) -> list[Site]:
    """All sites that a user's map names, found in a dense model; widths are those of its Linears.

    Raises:
        ValueError: The model is not as the map says; names file and key.
    """
    reader = _MapReader(base_model(model), layout)
    kinds = [kind for kind in SITE_KINDS if kind in layout.writers]
    first = {site.kind: site for site in (reader.site(0, kind) for kind in kinds)}
    sites = list(first.values())
    for layer in range(1, reader.layers):
        for kind in kinds:
            site = reader.site(layer, kind)
            if site.width != first[kind].width:
                raise reader.refusal(
                    f"sites.{kind}",
                    layout.writers[kind],
                    f"of {site.width} neurons in layer {layer}",
                    f"{first[kind].width} as in layer 0; leave it out",
                )
            sites.append(site)
    reader.check_biases(sites)
    return sites


class _MapReader:
    """Finds what a user's map names in a model, or says by file and key why it is not there."""

    def __init__(self, base: PreTrainedModel, layout: Layout) -> None:
        self.base, self.layout = base, layout
        self.seen: dict[int, str] = {}  # identity of a weight -> its Linear
        stack = self._module(layout.stack)
        if not isinstance(stack, nn.ModuleList) or not len(stack):
            raise self.refusal("stack", layout.stack, self._what(stack), "the name of its ModuleList of layers")
        self.layers = len(stack)
        self.hidden: Any = getattr(base.config, "hidden_size", None)
        if type(self.hidden) is not int:
            raise ValueError(f"model is a {type(base).__name__} whose config states no hidden_size, expected one")
        self.heads = _mapped_heads(base, layout)

    def refusal(self, key: str, name: str, found: str, expected: str) -> ValueError:
        return ValueError(
            f"site map '{self.layout.site_map_file}': key '{key}' is '{name}', {found}, expected {expected}"
        )

    def _module(self, name: str) -> nn.Module | None:
        try:
            return self.base.get_submodule(name)
        except AttributeError:
            return None

    def _what(self, module: nn.Module | None) -> str:
        of = type(self.base).__name__
        return f"no module of {of}" if module is None else f"a {type(module).__name__} of {of}"

    def linear(self, layer: int, key: str, name: str) -> nn.Linear:
        place = f"{self.layout.stack}.{layer}.{name}"
        module: Any = self._module(place)
        if not isinstance(module, nn.Linear) or module.weight.ndim != 2 or not module.weight.is_floating_point():
            found = f"{self._what(module)} at '{place}'"
            raise self.refusal(
                key, name, found, "a plain torch.nn.Linear in every layer; merge or remove adapters first"
            )
        other = self.seen.setdefault(id(module.weight), place)
        if other != place:
            found = f"in layer {layer} with the weight of '{other}'"
            raise self.refusal(key, name, found, "one of its own: what layers share cannot be cut from one of them")
        return module

    def check_biases(self, sites: list[Site]) -> None:
        """Parameters are counted alike in every layer, and for query, key and value."""
        first: dict[str, tuple[bool, Site]] = {}
        for site in sites:
            bias = cast(nn.Linear, self.base.get_submodule(site.writer)).bias is not None
            has, other = first.setdefault("attention" if site.kind in PER_HEAD else site.kind, (bias, site))
            if has != bias:
                words = "with a bias" if bias else "without a bias"
                found = f"{words} in layer {site.layer}, unlike sites.{other.kind} in layer {other.layer}"
                leave = "query and key" if site.kind in PER_HEAD else site.kind
                raise self.refusal(
                    f"sites.{site.kind}", self.layout.writers[site.kind], found, f"the same in both; leave {leave} out"
                )

    def site(self, layer: int, kind: str) -> Site:
        layout, key, name = self.layout, f"sites.{kind}", self.layout.writers[kind]
        partner, read, blocks = layout.partners.get(kind), layout.reader(kind), layout.blocks_of(kind)
        writer = self.linear(layer, key, name)
        width = self.hidden if read is None else self.linear(layer, f"sites.{READ_BY[kind]}", read).in_features
        rows = writer.out_features
        fits = rows % width == 0 and rows // width > max(blocks) if kind in layout.blocks else rows == width
        if not fits:
            whose = "the hidden size" if read is None else f"what '{read}' takes in"
            expected = f"{'blocks of ' if kind in layout.blocks else ''}{width}, {whose}; leave it out"
            raise self.refusal(key, name, f"of {rows} rows in layer {layer}", expected)
        if partner is not None:
            other = self.linear(layer, key, partner)
            if other.weight.shape != writer.weight.shape or (other.bias is None) != (writer.bias is None):
                raise self.refusal(
                    key, name, f"of another shape or bias than '{partner}' in layer {layer}", "two alike"
                )
        per_head = kind in PER_HEAD
        if (kind != "intermediate" and width != self.hidden) or (per_head and width % self.heads):
            expected = f"the hidden size {self.hidden}{f' in {self.heads} heads' if per_head else ''}; leave it out"
            raise self.refusal(key, name, f"of {width} neurons in layer {layer}", expected)
        prefix = f"{layout.stack}.{layer}."
        reader = None if read is None else prefix + read
        starts = tuple(block * width for block in blocks)
        second = None if partner is None else prefix + partner
        return Site(layer, kind, prefix + name, reader, width, self.heads if per_head else 1, starts, second)


def _mapped_heads(base: PreTrainedModel, layout: Layout) -> int:
    """Heads of a layer; 1 where the map names no kind that is split among them."""
    stated = (layout.site_map or {}).get("heads", getattr(base.config, "num_attention_heads", None))
    if not any(kind in layout.writers for kind in PER_HEAD):
        return 1
    if type(stated) is not int:
        layout.need(f"a {type(base).__name__}, whose config states no num_attention_heads,", heads=None)
    return int(stated)


def inner_width(config: Any) -> int:
    """Width of intermediate by a config; GPT-2's may leave it out, and then means four times the hidden size."""
    layout = _layout_named(str(config.model_type))
    return int(getattr(config, layout.inner if layout else "", None) or 4 * config.hidden_size)


def attention_shape(config: Any) -> tuple[int, int]:
    """Width of query by a config, and how many of its heads share one of key and value."""
    heads = int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * int(size), heads // int(getattr(config, "num_key_value_heads", None) or heads)


def position_of(model: PreTrainedModel, position: str = "auto") -> str:
    """Where a model's outputs are read, one of `POSITIONS`; `"auto"`: at [CLS], of a decoder at the last token.

    Raises:
        ValueError: There is no such place, or the model is of a family that obce does not know.
    """
    if position == "auto":
        return "last" if layout_of(model).causal else "cls"
    if position not in POSITIONS:
        raise ValueError(f"position is {position!r}, expected 'auto' or one of {', '.join(map(repr, POSITIONS))}.")
    return position


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout of a model's family, dense or pruned by obce.

    Raises:
        ValueError: The family has none.
    """
    found = known_layout(model)
    if found is None:
        family = getattr(getattr(model, "config", None), "model_type", None)
        raise unknown_family(f"model is a {type(model).__name__}", family)
    return found


def known_layout(model: PreTrainedModel) -> Layout | None:
    """As `layout_of`, None where the family has none."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family == MAPPED:
        mapped: Any = model.config
        return mapped_layout(mapped.mapped["map"], f"config of the pruned {mapped.mapped['class']}")
    return _layout_named(str(family))


def _layout_named(family: str) -> Layout | None:
    """Of `config.model_type`, dense or pruned."""
    return LAYOUTS.get(family) or LAYOUTS.get(family.removeprefix("obce_").replace("_", "-"))


def _user_layout(model: PreTrainedModel) -> Layout | None:
    """The layout of a family that a user's map made known; None of any other."""
    found = known_layout(model)
    return None if found is None or found.site_map is None else found


def unknown_family(model: str, family: str | None) -> ValueError:
    """The refusal of a model, told as "model is a AlbertModel", by its family, with the reason where it is known."""
    known = ", ".join(map(repr, LAYOUTS))
    why = "" if family not in _REFUSED else f" ({_REFUSED[family]})"
    how = (
        ""
        if why
        else ", or say in a site map where its neurons are, with obce.register_sites('map.toml') or --sites map.toml "
        "(docs/sites.md)"
    )
    return ValueError(
        f"{model} of the family {family!r}{why}, expected an encoder of a supported family ({known}): load a "
        f"checkpoint of one of these, for example with BertModel or RobertaForSequenceClassification{how}."
    )


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of an encoder, dense or pruned by obce."""
    return cast(nn.ModuleList, base_model(model).get_submodule(layout_of(model).stack))


def encoder_of(model: PreTrainedModel) -> nn.Module:
    """The module that holds the layers, below the base model: what budgets count as the encoder."""
    stack = layout_of(model).stack
    return base_model(model).get_submodule(stack.rpartition(".")[0] or stack)


def usable_positions(model: PreTrainedModel) -> int:
    """Tokens that the position table has room for; some families keep its first rows for padding.

    Of a model that reads pictures these are the tokens of every picture.
    """
    body = base_model(model)
    if layout_of(model).pictures:
        return int(cast(nn.Parameter, body.get_submodule("embeddings").position_embeddings).shape[1])
    table = getattr(getattr(body, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    if (layout := _user_layout(body)) is not None and layout.site_map is not None:
        if "positions" in layout.site_map:
            return int(layout.site_map["positions"])
        layout.need(
            f"a {type(body).__name__}, whose config states no max_position_embeddings,",
            positions=getattr(body.config, "max_position_embeddings", None),
        )
    return int(body.config.max_position_embeddings) - (0 if padding is None else padding + 1)


def picture_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Channels, height and width of the pictures that a model reads."""
    config: Any = base_model(model).config
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(config.num_channels), int(height), int(width)


def vocabulary_of(model: PreTrainedModel) -> int | None:
    """Tokens that a model has embeddings for; None of a model that reads pictures."""
    embeddings: Any = base_model(model).get_input_embeddings()
    return None if layout_of(model).pictures else int(embeddings.weight.shape[0])


def usable_max_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> int:
    """Tokens a text is cut to: as asked, else `DEFAULT_MAX_LENGTH` or the most that model and tokenizer take.

    Of a model that reads pictures, the tokens of every picture.

    Raises:
        ValueError: More was asked than the model has positions, or something else than a picture has.
    """
    positions = usable_positions(model)
    if layout_of(model).pictures:
        if max_length not in (None, positions):
            raise ValueError(
                f"max_length is {max_length}, but every picture has {positions} tokens for this model: leave it out"
            )
        return positions
    if max_length is None:
        return min(DEFAULT_MAX_LENGTH, positions, int(tokenizer.model_max_length))
    if max_length > positions:
        raise ValueError(f"max_length is {max_length}, but the model has {positions} positions: ask for at most that")
    return max_length


def model_hash(model: PreTrainedModel) -> str:
    """Fingerprint of the weights that a score depends on: embeddings and encoder, without pooler and heads.

    Name (relative to the base model), shape and values of every parameter, in the order of the names, so
    `BertModel` and a `BertFor*` with the same body agree, wherever the weights lie. Half precision counts as the
    float32 numbers it stands for: a checkpoint scored in float32 is the one that is pruned in half. Read one
    tensor at a time; a float32 model on the CPU is not copied.

    Returns:
        64 hexadecimal digits (BLAKE2b).

    Raises:
        ValueError: The model has no embeddings and encoder, or some of its weights are not in memory.
    """
    return _digest(_tensors_to_hash(model))


def _tensors_to_hash(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    parameters = sorted(_body_parameters(model), key=lambda named: named[0])
    if not parameters:
        raise ValueError(
            f"model is a {type(model).__name__} without modules 'embeddings' and 'encoder', expected a BERT encoder."
        )
    for name, parameter in parameters:
        if parameter.is_meta:
            raise ValueError(
                f"model holds no data for '{name}' (meta device), expected all weights in memory; "
                "load the model without offloading."
            )
    return [(name, parameter.detach()) for name, parameter in parameters]


def _digest(tensors: list[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in tensors:
        wide = torch.promote_types(tensor.dtype, torch.float32)
        digest.update(f"{name}\0{wide}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.to("cpu", wide).contiguous().reshape(-1).numpy().data)
    return digest.hexdigest()


_HASHED: weakref.WeakKeyDictionary[nn.Module, tuple[list[int], str]] = weakref.WeakKeyDictionary()


def model_hash_later(model: PreTrainedModel) -> Callable[[], str]:
    """Begins `model_hash` of the weights as they are now, beside other work; the call waits for it.

    On a CUDA device the hash of a gigabyte takes longer on the host than scoring thousands of texts does, so a thread
    makes it, and a later call for the same model is answered from the first if 64-bit sums of all weights, taken on the
    device, are still the same.
    """
    tensors = _tensors_to_hash(model)
    if not all(tensor.is_cuda for _, tensor in tensors):
        return lambda: _digest(tensors)
    sums = torch.stack([_checksum(tensor) for _, tensor in tensors])
    answer: list[str] = []
    stream = torch.cuda.Stream(sums.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(sums.device))

    def work() -> None:
        with torch.cuda.stream(stream):
            now = sums.tolist()
            before = _HASHED.get(model)
            if before is None or before[0] != now:
                before = _HASHED[model] = now, _digest(tensors)
            answer.append(before[1])

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def wait() -> str:
        thread.join()
        return answer[0] if answer else _digest(tensors)  # which raises again what ended the thread

    return wait


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """int64: sum of the bits of each weight times an odd number of its place, modulo 2^64."""
    bits = tensor.contiguous().view(-1)
    words = bits.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()]).to(torch.int64)
    places = torch.arange(len(words), device=words.device) * 0x9E3779B97F4A7C1 + 1
    return (words * (places | 1)).sum()


def architecture(model: PreTrainedModel) -> dict[str, int | str]:
    """Facts of a model that a person, a file or a plan needs to know it by; plain JSON values.

    Returns:
        `model_type`, `class`, `dtype` (of the encoder), the sizes that its config states, `pooler` (whether
        there is one), `parameters` (distinct ones, heads included), `encoder_parameters`, `weight_bytes` (of
        the distinct parameters) and `encoder_element_bytes` (of one encoder weight). Of a family whose layers are not
        made as BERT's, also `intermediate_rows` (rows of one neuron), `attention_bias` and `intermediate_bias` (1 or
        0), `norms` and `first_norms` (parameters of a layer's LayerNorms, and of the first one's), `rotary`, and where
        it differs from `attention_bias`, `value_bias`; of one whose query and key stay whole (`whole`) also
        `attention_size` (width of query) and `groups` (query heads that share a head of key and value). Of a family
        that reads pictures also `tokens` (of a picture), `patch_numbers` (numbers in a patch) and `pooler_size` (of its
        outputs).
    """
    base = base_model(model)
    config, layout = base.config, layout_of(model)
    encoder = encoder_of(model)
    weight = next(encoder.parameters())
    if layout.site_map is not None:
        return _mapped_architecture(model, layout)
    facts: dict[str, int | str] = {"model_type": str(config.model_type), "class": type(model).__name__}
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        *(() if layout.pictures else ("vocab_size", "max_position_embeddings")),
    ):
        facts[name] = int(getattr(config, name))
    facts["intermediate_size"] = inner_width(config)
    facts["type_vocab_size"] = int(getattr(config, "type_vocab_size", 0))
    # 0 unless a Linear stands between embeddings and layers
    projected = getattr(base, "embeddings_project", None) or getattr(
        base.get_submodule(layout.embeddings), "embed_proj", None
    )
    facts["embedding_size"] = 0 if projected is None else int(projected.in_features)
    # embeddings of distances, and how many products they take part in
    distances = getattr(encoder, "rel_embeddings", None) if layout.positions else None
    facts["distances"] = 0 if distances is None else int(distances.num_embeddings)
    facts["distance_products"] = 0 if distances is None else len(config.pos_att_type or [])
    facts["hidden_act"] = str(getattr(config, layout.activation))
    facts["dtype"] = str(weight.dtype).removeprefix("torch.")
    facts["pooler"] = getattr(base, "pooler", None) is not None
    # parameters() yields a tied parameter once
    facts["parameters"] = sum(p.numel() for p in model.parameters())
    facts["encoder_parameters"] = sum(p.numel() for p in encoder.parameters())
    facts["weight_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    facts["encoder_element_bytes"] = weight.element_size()
    if layout.pictures:
        facts |= _facts_of_pictures(model)
    return facts if layout.biases else facts | _shape_of_layers(layers_of(model), layout, config)


def _facts_of_pictures(model: PreTrainedModel) -> dict[str, int | str]:
    """What `obce.plan` needs to know of a model that reads pictures, to count what it computes."""
    body: Any = base_model(model)
    pooler = getattr(body, "pooler", None)
    return {
        "tokens": usable_positions(model),
        "patch_numbers": int(body.embeddings.patch_embeddings.projection.weight[0].numel()),
        "pooler_size": 0 if pooler is None else int(pooler.dense.out_features),
    }


def _mapped_architecture(model: PreTrainedModel, layout: Layout) -> dict[str, int | str]:
    """Facts of a model whose family a user's map made known: what the map covers, of which sizes change as stated."""
    base, encoder = base_model(model), encoder_of(model)
    config, layers = base.config, layers_of(model)
    weight = next(encoder.parameters())
    sites = {site.kind: site for site in mapped_sites(model, layout) if site.layer == 0}

    def biases(*kinds: str) -> set[bool]:
        return {cast(nn.Linear, base.get_submodule(sites[kind].writer)).bias is not None for kind in kinds}

    heads = [kind for kind in PER_HEAD if kind in sites]
    # those that write the residual stream have a bias when they are pruned
    added = sum(int(config.hidden_size) for kind in READ_BY.values() if kind in sites and biases(kind) == {False})
    return {
        "model_type": str(config.model_type),
        "class": type(model).__name__,
        "site_map": layout.site_map_hash,
        "kinds": " ".join(sites),
        "hidden_size": int(config.hidden_size),
        "num_hidden_layers": len(layers),
        "num_attention_heads": _mapped_heads(base, layout),
        "vocab_size": int(getattr(config, "vocab_size", 0)),
        "max_position_embeddings": usable_positions(model),
        "intermediate_size": sites["intermediate"].width if "intermediate" in sites else 0,
        "type_vocab_size": int(getattr(config, "type_vocab_size", 0)),
        "hidden_act": str(getattr(config, layout.activation, "")),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "pooler": getattr(base, "pooler", None) is not None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "encoder_parameters": sum(p.numel() for p in encoder.parameters()),
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "encoder_element_bytes": weight.element_size(),
        "intermediate_rows": 2 if "intermediate" in sites and sites["intermediate"].gated else 1,
        "attention_bias": int(biases(*heads) == {True}),
        "intermediate_bias": int("intermediate" in sites and biases("intermediate") == {True}),
        "norms": 0,
        "first_norms": 0,
        "rotary": 0,
        "added_biases": added,
    }


def _shape_of_layers(layers: nn.ModuleList, layout: Layout, config: Any) -> dict[str, int | str]:
    """What `obce.plan` needs to know of layers that are not made as BERT's."""
    linears = {name for kind in SITE_KINDS for name in layout.linears(kind)}

    def norms(layer: nn.Module) -> int:
        of_linears = sum(p.numel() for name in linears for p in layer.get_submodule(name).parameters())
        return sum(p.numel() for p in layer.parameters()) - of_linears

    def bias(kind: str) -> int:
        return int(layers[0].get_submodule(layout.writers[kind]).bias is not None)

    facts: dict[str, int | str] = {
        "intermediate_rows": len(layout.blocks_of("intermediate")) * len(layout.linears("intermediate")),
        "attention_bias": bias("attention_output"),
        "intermediate_bias": bias("output"),
        "norms": norms(layers[-1]),
        "first_norms": norms(layers[0]),
        "rotary": int(layout.rotary),
    }
    if layout.whole:
        attention, groups = attention_shape(config)
        facts |= {"whole": ", ".join(layout.whole), "attention_size": attention, "groups": groups}
    if bias("value") != bias("attention_output"):  # query and key are as value
        facts["value_bias"] = bias("value")
    return facts


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Holds back transformers' loading report and bars: what matters in them is raised as an error instead."""
    from transformers import utils

    logging: Any = utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


_BODY = (
    *("embeddings.", "embeddings_project.", "encoder.", "transformer.", "layers.", "final_norm.", "layernorm."),
    *("embed_tokens.", "norm.", "wte.", "wpe.", "h.", "ln_f."),  # of decoders
)

# Of the body, but read by the task of a head alone.
_OF_HEADS = ("embeddings.mask_token",)


def _body_parameters(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    mapped = _user_layout(model) is not None
    for name, parameter in base_model(model).named_parameters():
        known = name.startswith(_BODY) or (mapped and not name.startswith("pooler."))
        if known and name not in _OF_HEADS:
            yield name, parameter


def _refuse_unknown_family(model: PreTrainedModel) -> None:
    cls = type(model).__name__
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if str(family).startswith("obce_"):
        raise ValueError(
            f"model is a {cls}, which obce has already pruned, expected a dense model: scoring and pruning a "
            "pruned model again is not supported yet; start from the dense checkpoint."
        )
    if family not in LAYOUTS:
        raise unknown_family(f"model is a {cls}", family)
    _refuse_settings(cls, config)
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(
            f"model is a {cls} set up as a decoder (config.is_decoder or config.add_cross_attention), "
            "expected an encoder; load it with is_decoder=False and add_cross_attention=False."
            if not LAYOUTS[family].causal
            else f"model is a {cls} with add_cross_attention=True, expected False: obce does not cut attention to "
            "another text."
        )


_WINDOW = "obce does not cut layers that look at a window of tokens"

# Family -> field of its config -> the value that obce knows, and why no other.
_PLAIN: dict[str, dict[str, tuple[Any, str]]] = {
    "deberta-v2": {
        "conv_kernel_size": (0, "a convolution stands between its layers, past which least squares cannot see"),
    },
    "gpt2": {
        "scale_attn_by_inverse_layer_idx": (False, "its attention scales by a layer's number, which dropping changes"),
        "reorder_and_upcast_attn": (False, "its attention is computed in another way than the pruned layers are"),
    },
    "qwen2": {"use_sliding_window": (False, _WINDOW)},
    "qwen3": {"use_sliding_window": (False, _WINDOW)},
}


def _refuse_settings(cls: str, config: Any) -> None:
    """Refuses what some checkpoints of a known family have and obce does not cut."""
    if config.model_type == "deberta-v2" and (
        config.relative_attention and not config.share_att_key and config.pos_att_type
    ):
        raise ValueError(
            f"model is a {cls} with share_att_key=False, expected True: query and key of its distances have Linears of "
            "their own, which obce does not cut."
        )
    for name, (plain, why) in _PLAIN.get(str(config.model_type), {}).items():
        if (getattr(config, name, plain) or plain) != plain:
            raise ValueError(f"model is a {cls} with {name}={getattr(config, name)}, expected {plain}: {why}.")
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"} and LAYOUTS[config.model_type].causal:
        raise ValueError(
            f"model is a {cls} with layer_types={config.layer_types}, expected 'full_attention' in every layer: "
            f"{_WINDOW}."
        )


def _layer_stack(base: PreTrainedModel, cls: str, layout: Layout) -> str:
    """Name of the one ModuleList whose every member holds the Linears."""

    def holds_writers(layer: nn.Module) -> bool:
        return {name for name, _ in layer.named_modules()}.issuperset(layout.writers.values())

    found: list[str] = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0 and all(map(holds_writers, module))
    ]
    if len(found) != 1:
        raise ValueError(
            f"model is a {cls} with {len(found)} stacks of layers that hold "
            f"{', '.join(dict.fromkeys(layout.writers.values()))}, expected exactly one."
        )
    return found[0]


def _check_linear(module: nn.Module, where: str, inputs: int, width: int, bias: bool) -> None:
    if not (isinstance(module, nn.Linear) or transposed(module)) or (bias and module.bias is None):
        raise ValueError(
            f"model {where} is a {type(module).__name__}, expected a torch.nn.Linear{' with a bias' if bias else ''}; "
            "merge or remove adapters first."
        )
    # A quantized Linear is a subclass that keeps packed integers of another shape.
    weight = matrix(module)
    if tuple(weight.shape) != (width, inputs) or not weight.is_floating_point():
        raise ValueError(
            f"model {where} has a {str(weight.dtype).removeprefix('torch.')} weight of shape "
            f"{tuple(weight.shape)}, expected floating point of shape {(width, inputs)} as its config "
            "states; load the dense, unquantized checkpoint."
        )
