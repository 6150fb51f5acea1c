"""Outputs of every neuron at one token of each text ([CLS], of a decoder the last), and what it does over all tokens.

Nothing is copied or patched: forward hooks stand on the Linears of a site inside a context manager and are gone
when it closes, also after an exception. Each text must arrive exactly once a site; a hook that fires twice
(gradient checkpointing) or never (a compiled graph) is an error, not a wrong number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast

import numpy as np
import torch
from torch import nn

from obce.clouds import CLOUD_KINDS
from obce.corpus import Batch, Pack, TokenBatches
from obce.device import Fetch, TokenSlots, column_sums, resident, take_rows, to_host, upload
from obce.packing import packing, packs
from obce.sites import Site, attention_shape, base_model, known_layout, layers_of, layout_of, position_of
from obce.sketch import TokenSums

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

Given: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"
"""What a layer is given beside hidden states, by place and by name."""

Memory = Literal["model", "layer"]
Precision = Literal["float32", "tf32", "bfloat16"]
Progress = Callable[[float, float], None]


@dataclass
class LayerActivations:
    """What one layer said about every text.

    Attributes:
        layer: Layer number, from 0.
        values: float32 [n_texts, neurons], every Linear's output at [CLS], or where else texts are read (before the
            activation function; of a gated site what its reader takes in), the sites of the layer side by side.
        columns: Site kind -> its columns in `values`.
        tokens: Site kind -> sums over all real tokens of all texts of what the site's reader takes in (after the
            activation for `intermediate`, the attention context for `value`), or of the Linear's output where none
            reads it. Where several query heads share a value, the mean over these heads. Empty when not asked for.
        clouds: Kind in `CLOUD_KINDS` -> float32 [n_chosen, width], vectors of the chosen texts at the same place. Empty
            when none were chosen.
    """

    layer: int
    values: NDArray[np.float32]
    columns: dict[str, slice]
    tokens: dict[str, TokenSums] = field(default_factory=dict)
    clouds: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def outputs(self) -> dict[str, NDArray[np.float32]]:
        """Site kind -> float32 [width, n_texts], a view."""
        return {kind: self.values[:, columns].T for kind, columns in self.columns.items()}


class _Stop(Exception):  # noqa: N818  (a signal, not an error)
    """Ends a forward pass once the input of a layer is known."""


@dataclass(frozen=True)
class _Wish:
    """Where outputs are taken, one of `obce.sites.POSITIONS`, and what is taken beside them.

    That is sums over tokens, and vectors of the texts that `chosen` [n_texts] marks.
    """

    tokens: bool
    chosen: NDArray[np.bool_]
    position: str

    def vectors(self, batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of the batch that are chosen, and their places among the chosen."""
        rows = np.flatnonzero(self.chosen[batch.indices])
        return rows, np.cumsum(self.chosen)[batch.indices[rows]] - 1


# How errors name the place.
_AT = {"cls": "at [CLS]", "last": "at the last token", "mean": "as a mean over tokens"}


def read_texts(tokens: torch.Tensor, lengths: torch.Tensor, position: str) -> torch.Tensor:
    """[b, width] of what a module gives for each token, [b, T, width]: at the first, at the last, or their mean.

    Args:
        tokens: Texts padded on the right.
        lengths: Integers [b], tokens of each text, on the same device.
        position: One of `obce.sites.POSITIONS`.
    """
    if position == "cls":
        return tokens[:, 0]
    if position == "last":
        return tokens[torch.arange(len(tokens), device=tokens.device), lengths.long() - 1]
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    real = (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None])[..., None]
    return torch.where(real, wide, 0).sum(1) / lengths[:, None]


class _Observer:
    """Hooks for some sites; `see(batch)` names the texts that the next forward pass carries."""

    def __init__(self, sites: Sequence[Site], n_texts: int, device: torch.device, wish: _Wish) -> None:
        self.sites = sites
        self.n_texts = n_texts
        self.device = device
        self.wish = wish
        self.values: dict[int, torch.Tensor] = {}
        self.columns: dict[int, dict[str, slice]] = {}
        for layer in sorted({site.layer for site in sites}):
            here = [site for site in sites if site.layer == layer]
            ends = list(accumulate(site.width for site in here))
            self.columns[layer] = {s.kind: slice(end - s.width, end) for s, end in zip(here, ends, strict=True)}
        self._make_buffers()
        self.tokens = {s.name: TokenSums(s.width) for s in sites if wish.tokens}
        self.clouds: dict[tuple[int, str], torch.Tensor] = {}
        # how often each text came, each site was called for the current batch, and the first that was not called once
        self.passed = np.zeros(n_texts, np.int64)
        self.calls = {s.name: 1 for s in sites}
        self.wrong: tuple[str, int, int] | None = None
        self.batch: Batch | Pack | None = None
        self.places = torch.empty(0)
        self.chosen = np.empty(0, np.int64), np.empty(0, np.int64)
        self.lengths = np.empty(0, np.int64)
        self.real = torch.empty(0)  # tokens of each text, on the device
        # what entered the layer, where query and key are called for more than that
        self.entering: torch.Tensor | None = None
        self.mapped = False  # whether the family is known by a user's map alone

    def _make_buffers(self) -> None:
        for layer, columns in self.columns.items():
            width = max(here.stop for here in columns.values())
            self.values[layer] = torch.empty((self.n_texts, width), dtype=torch.float32, device=self.device)
        self.of_site = {s.name: self.values[s.layer][:, self.columns[s.layer][s.kind]] for s in self.sites}

    def _begin(self, batch: Batch | Pack) -> None:
        self._end()
        self.batch = batch
        self.passed[batch.indices] += 1
        self.calls = dict.fromkeys(self.calls, 0)

    def _end(self) -> None:
        if self.wrong is None and self.batch is not None:
            wrong = [(name, calls) for name, calls in self.calls.items() if calls != 1]
            self.wrong = (*wrong[0], int(self.batch.indices[0])) if wrong else None

    def see(self, batch: Batch | Pack) -> dict[str, torch.Tensor]:
        self._begin(batch)
        inputs = {name: tensor.to(self.device) for name, tensor in batch.inputs.items()}
        self.chosen = self.wish.vectors(cast("Batch", batch))
        self.places = torch.from_numpy(batch.indices).to(self.device)
        self.lengths = batch.lengths
        self.real = torch.from_numpy(self.lengths).to(self.device)
        return inputs

    def _current(self) -> Batch | Pack:
        if self.batch is None:
            raise RuntimeError("the model ran on a batch that was not announced")
        return self.batch

    def _read(self, tokens: torch.Tensor) -> torch.Tensor:
        return read_texts(tokens, self.real, self.wish.position).to(torch.float32)

    def _take_values(self, site: Site, tokens: torch.Tensor) -> None:
        self.of_site[site.name].index_copy_(0, self.places, self._read(tokens))

    def _take_tokens(self, site: Site, tokens: torch.Tensor) -> None:
        if self.wish.tokens:
            self.tokens[site.name].add(tokens, self.lengths)

    def _take_cloud(self, layer: int, kind: str, tokens: torch.Tensor) -> None:
        rows, places = self.chosen
        if rows.size:
            if (layer, kind) not in self.clouds:
                shape = (int(self.wish.chosen.sum()), tokens.shape[2])
                self.clouds[layer, kind] = torch.empty(shape, dtype=torch.float32, device=self.device)
            self.clouds[layer, kind][torch.from_numpy(places)] = self._read(tokens)[torch.from_numpy(rows)]

    def _take_outputs(self, site: Site, output: torch.Tensor) -> None:
        self._take_values(site, output)
        self.calls[site.name] += 1

    def _check_shape(self, site: Site, tokens: torch.Tensor) -> None:
        if not self.mapped:
            return
        shape = tuple(self._current().inputs["attention_mask"].shape)
        if tokens.ndim != 3 or tuple(tokens.shape[:2]) != shape:
            raise ValueError(
                f"model gives site {site.name} a tensor of shape {tuple(tokens.shape)} for {shape[0]} texts of "
                f"{shape[1]} tokens, expected one of texts, tokens and neurons: obce cannot score that module"
            )

    def _on_writer(self, site: Site) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if self.entering is not None and args[0] is not self.entering and site.kind in ("query", "key"):
                return  # of embeddings of distances
            self._check_shape(site, output)
            output = output[..., site.columns]
            self._take_outputs(site, output)
            if site.reader is None:
                self._take_tokens(site, output)
            if site.kind in CLOUD_KINDS:
                self._take_cloud(site.layer, site.kind, output)

        return hook

    def _on_reader(self, site: Site) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._check_shape(site, args[0])
            if site.gated:
                self._take_outputs(site, args[0])
            if site.groups == 1:
                self._take_tokens(site, args[0])
            elif self.wish.tokens:
                self._take_tokens(site, site.grouped(args[0]).mean(-2))
            if site.kind == "value":
                self._take_cloud(site.layer, "context", args[0])

        return hook

    def _on_layer(self, layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self.see_hidden(layer, output[0] if isinstance(output, tuple) else output)

        return hook

    def _before_layer(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.entering = args[0]

    def see_hidden(self, layer: int, hidden: torch.Tensor) -> None:
        self._take_cloud(layer, "hidden", hidden)

    @contextmanager
    def watching(self, body: nn.Module) -> Iterator[None]:
        handles = []
        self.mapped = layout_of(cast("PreTrainedModel", body)).site_map is not None
        try:
            for site in self.sites:
                if not site.gated:
                    handles.append(body.get_submodule(site.writer).register_forward_hook(self._on_writer(site)))
                if site.reader is not None and (self.wish.tokens or site.gated or site.kind == "value"):
                    reader = body.get_submodule(site.reader)
                    handles.append(reader.register_forward_pre_hook(self._on_reader(site)))
            blocks = {site.layer: _layer_module(body, site) for site in self.sites}
            if layout_of(cast("PreTrainedModel", body)).positions:
                handles += [block.register_forward_pre_hook(self._before_layer) for block in blocks.values()]
            if self.wish.chosen.any():
                for layer, block in blocks.items():
                    handles.append(block.register_forward_hook(self._on_layer(layer)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def check_counts(self) -> None:
        self._end()
        odd = np.flatnonzero(self.passed != 1)
        if self.wrong is not None or odd.size:
            name, times, text = self.wrong or (self.sites[0].name, int(self.passed[odd[0]]), int(odd[0]))
            raise RuntimeError(
                f"site {name} was seen {times} times on text {text}, but every text must pass exactly once: turn off "
                "gradient checkpointing and torch.compile while scoring"
            )

    def results(self, layer: int) -> LayerActivations:
        # popped, so that a layer's activations can be freed by the caller before the next is asked for
        values = self.values.pop(layer)
        here = [site for site in self.sites if site.layer == layer]
        for site in here:
            columns = self.of_site.pop(site.name)
            # NaN and infinity both spoil a sum; a finite sum has finite terms
            if not math.isfinite(float(columns.sum(dtype=torch.float64))):
                text, neuron = (int(i) for i in torch.nonzero(~torch.isfinite(columns))[0])
                raise ValueError(
                    f"model gives {columns[text, neuron].item()} {_AT[self.wish.position]} for neuron "
                    f"{site.name}.{neuron} on text {text}, but every output must be finite: check the weights of "
                    f"'{site.writer}' and of the layers before it for NaN or overflow"
                )
        for site in here if self.wish.tokens else ():
            found = self.tokens[site.name].settle()
            if not np.isfinite(found.squares).all():
                neuron = int(np.flatnonzero(~np.isfinite(found.squares))[0])
                raise ValueError(
                    f"model gives {found.sums[neuron]} as a sum over all tokens for neuron {site.name}.{neuron}, but "
                    f"it must be finite: check the weights of '{site.writer}' for NaN or overflow"
                )
        return LayerActivations(
            layer,
            values.cpu().numpy(),
            self.columns[layer],
            {site.kind: self.tokens[site.name] for site in here if self.wish.tokens},
            {kind: vectors.cpu().numpy() for (at, kind), vectors in self.clouds.items() if at == layer},
        )


@dataclass
class Resident:
    """What some layers said about every text, where the model is.

    Attributes:
        values: float32 [n_texts, neurons of these layers], side by side, as in `LayerActivations` but for the order of
            the rows.
        texts: int64 [n_texts], the text of each row.
        places: int64 [n_texts] on the device, the row of each text.
        rows: Layer -> its neurons, columns of `values`.
        columns: Layer -> site kind -> its columns among those of the layer.
        tokens: Sums over all real tokens, of the neurons of `values`; None when not asked for.
        clouds: (layer, kind in `CLOUD_KINDS`) -> float32 [n_chosen, width]. Empty when none were chosen.
        position: Where the outputs were taken, one of `obce.sites.POSITIONS`.
    """

    values: torch.Tensor
    texts: NDArray[np.int64]
    places: torch.Tensor
    rows: dict[int, slice]
    columns: dict[int, dict[str, slice]]
    tokens: TokenSlots | None
    clouds: dict[tuple[int, str], torch.Tensor]
    position: str = "cls"

    def site_of(self, sites: Sequence[Site], at: int) -> tuple[Site, int]:
        """The site of column `at` of `values`, and the neuron's index there."""
        layer = next(layer for layer, rows in self.rows.items() if rows.start <= at < rows.stop)
        at -= self.rows[layer].start
        kind, here = next((k, c) for k, c in self.columns[layer].items() if c.start <= at < c.stop)
        return next(site for site in sites if (site.layer, site.kind) == (layer, kind)), at - here.start

    def check_values(self, sites: Sequence[Site], bad: NDArray[np.int32]) -> None:
        """Raises for the first neuron with an output that is not finite, by `obce.device.ColumnSums.bad`.

        Raises:
            ValueError: There is one.
        """
        found = np.flatnonzero(bad < len(self.texts))
        if found.size:
            site, neuron = self.site_of(sites, int(found[0]))
            raise ValueError(
                f"model gives NaN or infinity {_AT[self.position]} for neuron {site.name}.{neuron} on text "
                f"{int(self.texts[bad[found[0]]])}, but every output must be finite: check the weights of "
                f"'{site.writer}' and of the layers before it for NaN or overflow"
            )

    def check_tokens(self, sites: Sequence[Site], sums: NDArray[Any], squares: NDArray[Any]) -> None:
        """Raises for the first neuron whose sums over all tokens are not finite.

        Raises:
            ValueError: There is one.
        """
        found = np.flatnonzero(~np.isfinite(squares))
        if found.size:
            site, neuron = self.site_of(sites, int(found[0]))
            raise ValueError(
                f"model gives {sums[found[0]]} as a sum over all tokens for neuron {site.name}.{neuron}, but it must "
                f"be finite: check the weights of '{site.writer}' for NaN or overflow"
            )


class _ResidentObserver(_Observer):
    """An observer that leaves everything on the device, in buffers that are there before the first batch.

    A batch's rows lie where the last batch's end, so that a hook copies one block; `Resident.places` says whose
    they are. The host neither waits nor fetches.
    """

    def __init__(self, sites: Sequence[Site], n_texts: int, device: torch.device, wish: _Wish) -> None:
        self.rows: dict[int, slice] = {}
        self.order: list[NDArray[np.int64]] = []
        self.first = 0  # row of the batch's first text
        self.starts: torch.Tensor | None = None  # tokens to read in a pack
        super().__init__(sites, n_texts, device, wish)

    def _make_buffers(self) -> None:
        end = 0
        for layer, columns in self.columns.items():
            start, end = end, end + max(here.stop for here in columns.values())
            self.rows[layer] = slice(start, end)
        self.whole = torch.empty((self.n_texts, end), dtype=torch.float32, device=self.device)
        self.values = {layer: self.whole[:, rows] for layer, rows in self.rows.items()}
        self.slots = TokenSlots(end, self.device) if self.wish.tokens else None

    def see(self, batch: Batch | Pack) -> dict[str, torch.Tensor]:
        names = list(batch.inputs)
        both = [batch.inputs[name] for name in names]
        # one copy for all: they are of one shape and dtype; none are left of pictures that have entered
        stacked = upload(torch.stack(both), self.device) if both else torch.empty(0)
        inputs = dict(zip(names, stacked, strict=True))
        self.first += len(self.order[-1]) if self.order else 0
        self.order.append(batch.indices)
        self._begin(batch)
        if isinstance(batch, Pack):
            ends = np.cumsum(batch.lengths)
            self.starts = upload(ends - 1 if self.wish.position == "last" else ends - batch.lengths, self.device)
            self.real = torch.full((1,), int(batch.lengths.sum()), dtype=torch.int32, device=self.device)
        else:
            self.starts = None
            if batch.tokens:
                self.real = torch.full((len(batch.indices),), batch.tokens, dtype=torch.int32, device=self.device)
            else:
                self.real = inputs["attention_mask"].sum(1, dtype=torch.int32)
        return inputs

    def _copy(self, tokens: torch.Tensor, out: torch.Tensor) -> None:
        # packs are of texts that are read at a token
        if self.starts is not None or self.wish.position == "cls":
            take_rows(tokens, self.starts, out)
        else:
            out.copy_(self._read(tokens))

    def _take_values(self, site: Site, tokens: torch.Tensor) -> None:
        rows = slice(self.first, self.first + len(self._current().indices))
        self._copy(tokens, self.values[site.layer][rows, self.columns[site.layer][site.kind]])

    def _take_tokens(self, site: Site, tokens: torch.Tensor) -> None:
        if self.slots is not None:
            start, here = self.rows[site.layer].start, self.columns[site.layer][site.kind]
            self.slots.add(tokens, self.real, slice(start + here.start, start + here.stop))

    def _take_cloud(self, layer: int, kind: str, tokens: torch.Tensor) -> None:
        # query, key and value are among the values
        if kind not in ("context", "hidden") or not self.wish.chosen.any():
            return
        if (layer, kind) not in self.clouds:
            shape = (self.n_texts, tokens.shape[2])
            self.clouds[layer, kind] = torch.empty(shape, dtype=torch.float32, device=self.device)
        rows = slice(self.first, self.first + len(self._current().indices))
        self._copy(tokens, self.clouds[layer, kind][rows])

    def resident(self) -> Resident:
        """What was taken, in all layers."""
        texts = np.concatenate(self.order)
        places = upload(np.argsort(texts), self.device)
        clouds: dict[tuple[int, str], torch.Tensor] = {}
        if self.wish.chosen.any():
            rows = places.index_select(0, upload(np.flatnonzero(self.wish.chosen), self.device))
            for layer, columns in self.columns.items():
                for kind in CLOUD_KINDS:
                    mine = kind in columns
                    every = self.values[layer][:, columns[kind]] if mine else self.clouds.pop((layer, kind), None)
                    if every is not None:
                        clouds[layer, kind] = every.index_select(0, rows)
        wish = self.wish
        return Resident(self.whole, texts, places, self.rows, self.columns, self.slots, clouds, wish.position)


def _fetched(taken: Resident, sites: Sequence[Site]) -> Iterator[LayerActivations]:
    """Layers on the host, each by one transfer, checked."""
    bad = to_host(column_sums(taken.values).bad)
    taken.check_values(sites, bad)
    totals: list[NDArray[Any]] = []
    if taken.tokens is not None:
        fetch = Fetch()
        fetch.ask(*taken.tokens.total())
        totals = fetch.wait()
        taken.check_tokens(sites, totals[0], totals[1])
    for layer, rows in taken.rows.items():
        fetch = Fetch()
        kinds = [kind for at, kind in taken.clouds if at == layer]
        fetch.ask(taken.values[:, rows].index_select(0, taken.places), *(taken.clouds[layer, kind] for kind in kinds))
        values, *vectors = fetch.wait()
        tokens: dict[str, TokenSums] = {}
        for kind, here in taken.columns[layer].items() if taken.tokens is not None else ():
            of_site = slice(rows.start + here.start, rows.start + here.stop)
            tokens[kind] = TokenSums(here.stop - here.start)
            tokens[kind].take(taken.tokens.count, *(part[of_site] for part in totals))  # type: ignore[union-attr]
        yield LayerActivations(layer, values, taken.columns[layer], tokens, dict(zip(kinds, vectors, strict=True)))


def _ends_by_padding(model: PreTrainedModel) -> bool:
    """Whether a model tells by the padding where a text ends: a decoder's classifier."""
    layout = known_layout(model)
    return layout is not None and layout.causal and type(model).__name__.endswith("ForSequenceClassification")


def check_padding(model: PreTrainedModel) -> None:
    """Refuses a decoder's classifier that cannot tell where each of several texts ends.

    Raises:
        ValueError: Its config names no padding token.
    """
    if _ends_by_padding(model) and model.config.pad_token_id is None:
        raise ValueError(
            f"model is a {type(model).__name__} without config.pad_token_id, by which it finds the last token of each "
            "of several texts: set it to the tokenizer's, or to the id that the head was trained with."
        )


def padded_as_read(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of a model with a head, with the padding that a decoder's classifier tells the ends of texts by.

    Raises:
        ValueError: As `check_padding`.
    """
    if not _ends_by_padding(model):
        return inputs
    check_padding(model)
    pad = model.config.pad_token_id
    return {**inputs, "input_ids": torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], pad)}


def cloud_widths(model: PreTrainedModel) -> dict[str, int]:
    """Kind in `CLOUD_KINDS` -> width of the vectors of a text."""
    config: Any = base_model(model).config
    if layout_of(model).site_map is not None:  # it takes no other widths
        return dict.fromkeys(CLOUD_KINDS, int(config.hidden_size))
    attention, groups = attention_shape(config)
    widths = {"query": attention, "context": attention, "hidden": int(config.hidden_size)}
    return widths | dict.fromkeys(("key", "value"), attention // groups)


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode inside the `with`; every module's own training flag is put back, also after an error.

    Nor do they keep keys and values for a next token, which would be looked at by a layer that runs twice.
    """
    # module by module, because a model may hold parts frozen in eval mode inside a model in training mode
    flags = [(module, module.training) for model in models for module in model.modules()]
    configs: list[Any] = [getattr(model, "config", None) for model in models]
    configs = [config for config in configs if getattr(config, "use_cache", False)]
    try:
        for model in models:
            model.eval()
        for config in configs:
            config.use_cache = False
        yield
    finally:
        for module, training in flags:
            module.training = training
        for config in configs:
            config.use_cache = True


@contextmanager
def precise_products(device: torch.device, precision: Precision = "float32") -> Iterator[None]:
    """Products of matrices in the precision asked for inside the `with`, whatever the caller has set."""
    narrow = precision == "bfloat16"
    with (
        _cuda_products(precision == "tf32") if device.type == "cuda" else nullcontext(),
        torch.autocast(device.type, torch.bfloat16 if narrow else None, narrow),
    ):
        yield


@contextmanager
def _cuda_products(tf32: bool) -> Iterator[None]:
    """Products and convolutions in float32 on CUDA with or without TF32; what was set is put back."""
    matmul, cudnn = torch.backends.cuda.matmul, cast("Any", torch.backends.cudnn)
    # torch 2.9 brought a second name, and raises where the first is read after a caller has set the second
    newer = hasattr(matmul, "fp32_precision")
    name, asked = ("fp32_precision", "tf32" if tf32 else "ieee") if newer else ("allow_tf32", tf32)
    places: tuple[Any, ...] = (matmul, cudnn.conv if newer else cudnn)
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, asked)
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)


@contextmanager
def _narrow_weights(body: nn.Module) -> Iterator[None]:
    """The weights as bfloat16 inside the `with`; the very float32 tensors are put back, also after an error.

    Cast once a pass, where autocast casts activations before every Linear and keeps sums and LayerNorms in float32:
    what is between two Linears moves half the bytes, at the same 8 bits that a Linear under autocast gives and takes.
    """
    held = [(tensor, tensor.data) for tensor in (*body.parameters(), *body.buffers()) if tensor.dtype == torch.float32]
    try:
        for tensor, wide in held:
            tensor.data = wide.to(torch.bfloat16)
        yield
    finally:
        for tensor, wide in held:
            tensor.data = wide


@contextmanager
def _evaluating(body: nn.Module, precision: Precision) -> Iterator[None]:
    """Eval mode, no gradients, products of matrices in the precision asked for."""
    device = next(body.parameters()).device
    if precision == "bfloat16" and resident(device):
        with eval_mode(body), torch.no_grad(), _narrow_weights(body):
            yield
        return
    # no_grad, not inference_mode: hidden states kept between layers may meet code that makes views of them
    with eval_mode(body), torch.no_grad(), precise_products(device, precision):
        yield


def _layer_module(body: nn.Module, site: Site) -> nn.Module:
    """The block that holds the site."""
    return layers_of(cast("PreTrainedModel", body))[site.layer]


def capture(
    model: PreTrainedModel,
    batches: TokenBatches,
    sites: Sequence[Site],
    *,
    memory: Memory = "model",
    tokens: bool = True,
    chosen: NDArray[np.bool_] | None = None,
    precision: Precision = "float32",
    position: str = "auto",
    progress: Progress | None = None,
) -> Iterator[LayerActivations]:
    """Yields each layer's outputs where texts are read, sums over tokens and vectors of chosen texts, layer by layer.

    Args:
        model: The dense model; never changed, its training flags are restored.
        batches: Tokenised corpus, padded on the right, so that [CLS] is position 0 and the last token is known by the
            length of a text.
        sites: Sites to watch, as `obce.sites.find_sites` gives them.
        memory: `"model"` runs each batch through the whole model once and holds every layer's outputs
            (4 bytes x neurons x texts). `"layer"` takes all texts through layer 0, then all through layer 1,
            and so on: it holds one layer's outputs and the hidden states of all tokens (4 bytes x hidden size
            x tokens), at the same amount of arithmetic and with the same bits.
        tokens: Sum up what every neuron does over all tokens. Without it the last layer of an encoder of BERT's
            shape is computed at [CLS] alone, since nothing else of it is read.
        chosen: [n_texts] texts whose vectors are kept for the clouds of heads and layers (default: none).
        precision: Of products of matrices. `"tf32"` means something on CUDA alone; `"bfloat16"` runs under autocast,
            on CUDA with weights that are bfloat16 for the pass. What is captured is float32 always.
        position: Where outputs are taken: `"cls"` the first token of a text, `"last"` its last one, `"mean"` the mean
            over its tokens; `"auto"`: see `obce.sites.position_of`.
        progress: Called with (texts done, texts in all); a layer counts as its share of a text.

    Raises:
        ValueError: `memory`, `precision` or `position` is unknown, or an output is NaN or infinite (names site, neuron
            and text).
        RuntimeError: A site did not see every text exactly once.
    """
    given = model, batches, sites
    if resident(next(base_model(model).parameters()).device):
        settings: dict[str, Any] = {"memory": memory, "tokens": tokens, "chosen": chosen, "position": position}
        for taken in capture_resident(*given, precision=precision, progress=progress, **settings):
            yield from _fetched(taken, sites)
        return
    walk, rest = _prepared(*given, memory, tokens, chosen, precision, position, progress)
    for observer in walk(*rest, _Observer):
        for layer in list(observer.values):
            yield observer.results(layer)


def capture_resident(
    model: PreTrainedModel,
    batches: TokenBatches,
    sites: Sequence[Site],
    *,
    memory: Memory = "model",
    tokens: bool = True,
    chosen: NDArray[np.bool_] | None = None,
    precision: Precision = "float32",
    position: str = "auto",
    progress: Progress | None = None,
) -> Iterator[Resident]:
    """`capture` without the transfers: all stays where the model is, and the host does not wait for it.

    All layers come at once with `memory="model"`, one by one with `"layer"`. Values and sums are not checked: see
    `Resident`. Where the family allows it, texts run one after another without padding (`obce.packing`), and then up
    to four times `batch_tokens` of them a pass.
    """
    walk, rest = _prepared(model, batches, sites, memory, tokens, chosen, precision, position, progress)
    for observer in walk(*rest, _ResidentObserver):
        taken = cast("_ResidentObserver", observer).resident()
        if taken.tokens is not None:
            taken.tokens.count = batches.n_tokens
        yield taken


def _prepared(
    model: PreTrainedModel,
    batches: TokenBatches,
    sites: Sequence[Site],
    memory: Memory,
    tokens: bool,
    chosen: NDArray[np.bool_] | None,
    precision: Precision,
    position: str,
    progress: Progress | None,
) -> tuple[Callable[..., Iterator[_Observer]], tuple[Any, ...]]:
    """How to walk through the model, and what with."""
    if memory not in ("model", "layer"):
        raise ValueError(f"memory is {memory!r}, but must be 'model' or 'layer'")
    if precision not in ("float32", "tf32", "bfloat16"):
        raise ValueError(f"precision is {precision!r}, but must be 'float32', 'tf32' or 'bfloat16'")
    body = base_model(model)
    if memory == "layer" and (stated := layout_of(model).site_map) is not None:
        raise ValueError(
            f"memory is 'layer', but a site map does not say what the layers of a {stated['model_type']!r} are given: "
            "leave it 'model'"
        )
    device = next(body.parameters()).device
    layers = sorted({site.layer for site in sites})
    marked = np.zeros(batches.n_texts, bool) if chosen is None else chosen
    wish = _Wish(tokens, marked, position_of(model, position))
    walk = _through_model if memory == "model" else _layer_by_layer
    return walk, (body, device, batches, sites, layers, wish, precision, progress or (lambda done, total: None))


@contextmanager
def stopping_before(module: nn.Module, keep: Callable[[torch.Tensor, tuple[Any, ...], dict[str, Any]], None]) -> Any:
    """Inside the `with`, forward passes end where the module would begin, after `keep` saw what it is given.

    `keep` is called with the first argument, the others by place, and those by name. Run by `run_to_stop`.
    """

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(args[0], args[1:], kwargs)
        raise _Stop

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


Passed = TypeVar("Passed", bound=Batch | Pack)


def first_inputs(
    body: PreTrainedModel, batches: Iterable[Passed], first: int = 0
) -> Iterator[tuple[Passed, torch.Tensor, dict[int, Given]]]:
    """Every batch with the hidden states that a model hands to layer `first`, and what else it hands to each layer.

    Layers before `first` are left out. Where layers are given different things, the model runs on to one of each kind.
    """
    device = next(body.parameters()).device
    held: list[tuple[torch.Tensor, Given]] = []
    layers, attribute = layers_of(body), layout_of(body).kinds_by
    kinds = {i: attribute and getattr(layers[i], attribute) for i in range(first, len(layers))}
    doors = {kind: layer for layer, kind in reversed(kinds.items())}
    for batch in batches:
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        for door in doors.values():
            stopping = stopping_before(layers[door], lambda hidden, args, kwargs: held.append((hidden, (args, kwargs))))
            with stopping, packing(body, batch):
                run_to_stop(body, **inputs)
        by_kind = dict(zip(doors, held, strict=True))
        held.clear()
        entered = cast("Passed", batch if isinstance(batch, Pack) else batch.entered())
        yield entered, by_kind[kinds[first]][0], {layer: by_kind[kind][1] for layer, kind in kinds.items()}


def _at_cls_alone(block: nn.Module, mapped: bool = False) -> bool:
    """Whether a layer can be computed at [CLS] alone: it has BERT's shape."""
    return not mapped and {"attention.self.query", "intermediate.dense"} <= {name for name, _ in block.named_modules()}


def _layer_at_cls(block: nn.Module, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[b, 1, hidden size]: a BERT layer's output at [CLS] alone; keys and values are those of all tokens.

    Every Linear is called as a module, so that its hooks see it.
    """
    part = block.get_submodule
    first = hidden[:, :1]
    attention: Any = part("attention.self")

    def heads(linear: str, states: torch.Tensor) -> torch.Tensor:
        split: torch.Tensor = part(f"attention.self.{linear}")(states)
        return split.view(*states.shape[:2], -1, attention.attention_head_size).transpose(1, 2)

    query, key, value = heads("query", first), heads("key", hidden), heads("value", hidden)
    context = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask[:, None, None].bool(), scale=attention.scaling
    )
    attended = part("attention.output")(context.transpose(1, 2).flatten(2), first)
    answer: torch.Tensor = part("output")(part("intermediate")(attended), attended)
    return answer


def _through_model(
    body: PreTrainedModel,
    device: torch.device,
    batches: TokenBatches,
    sites: Sequence[Site],
    layers: list[int],
    wish: _Wish,
    precision: Precision,
    progress: Progress,
    watcher: type[_Observer],
) -> Iterator[_Observer]:
    observer = watcher(sites, batches.n_texts, device, wish)
    done = 0
    last = _layer_module(body, next(site for site in sites if site.layer == layers[-1]))
    held: list[torch.Tensor] = []
    mapped = layout_of(body).site_map is not None
    whole = wish.tokens or wish.position != "cls" or not _at_cls_alone(last, mapped)
    with _evaluating(body, precision), observer.watching(body):
        for batch in _passes(body, batches, watcher, wish.position):
            inputs = observer.see(batch)
            if whole or isinstance(batch, Pack):
                with packing(body, batch):
                    body(**inputs)
            else:
                with stopping_before(last, lambda hidden, _args, _kwargs: held.append(hidden)):
                    run_to_stop(body, **inputs)
                observer.see_hidden(layers[-1], _layer_at_cls(last, held.pop(), inputs["attention_mask"]))
            done += len(batch.indices)
            progress(done, batches.n_texts)
    observer.check_counts()
    yield observer


def _passes(
    body: nn.Module, batches: TokenBatches, watcher: type[_Observer], position: str = "cls"
) -> Iterable[Batch | Pack]:
    """What goes through the model at a time."""
    packed = watcher is _ResidentObserver and position != "mean"
    return (packs(body, batches) if packed else None) or batches


def pass_texts(model: PreTrainedModel, batches: TokenBatches, precision: Precision = "float32") -> None:
    """The forward passes that `capture` makes with `memory="model"`, unwatched: what its time is compared with."""
    body = base_model(model)
    device = next(body.parameters()).device
    watcher = _ResidentObserver if resident(device) else _Observer
    with _evaluating(body, precision):
        for batch in _passes(body, batches, watcher):
            with packing(body, batch):
                body(**{name: upload(tensor, device) for name, tensor in batch.inputs.items()})


def run_to_stop(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Runs a module until `stopping_before` ends it.

    Raises:
        RuntimeError: It came to its end.
    """
    try:
        module(*args, **kwargs)
    except _Stop:
        return
    raise RuntimeError(f"a {type(module).__name__} ran without calling the module that was to come")


def _layer_by_layer(
    body: PreTrainedModel,
    device: torch.device,
    batches: TokenBatches,
    sites: Sequence[Site],
    layers: list[int],
    wish: _Wish,
    precision: Precision,
    progress: Progress,
    watcher: type[_Observer],
) -> Iterator[_Observer]:
    with _evaluating(body, precision):
        held = list(first_inputs(body, _passes(body, batches, watcher, wish.position), layers[0]))

    done = 0.0
    for layer in layers:
        here = [site for site in sites if site.layer == layer]
        block = _layer_module(body, here[0])
        observer = watcher(here, batches.n_texts, device, wish)
        # entered anew for every layer: a caller between two layers sees its own gradient mode and training flags
        with _evaluating(body, precision), observer.watching(body):
            for i, (batch, hidden, given) in enumerate(held):
                inputs = observer.see(batch)
                alone = layer == layers[-1] and not wish.tokens and wish.position == "cls"
                alone = alone and isinstance(batch, Batch) and _at_cls_alone(block)
                if alone:
                    observer.see_hidden(layer, _layer_at_cls(block, hidden, inputs["attention_mask"]))
                else:
                    args, kwargs = given[layer]
                    with packing(body, batch):
                        output = block(hidden, *args, **kwargs)
                    held[i] = (batch, output[0] if isinstance(output, tuple) else output, given)
                done += len(batch.indices) / len(layers)
                progress(done, batches.n_texts)
        observer.check_counts()
        yield observer
