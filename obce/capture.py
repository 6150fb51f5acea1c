"""Outputs of every neuron at [CLS], and what it does over all tokens, layer by layer.

Nothing is copied or patched: forward hooks stand on the Linears of a site inside a context manager and are gone
when it closes, also after an exception. Each text must arrive exactly once a site; a hook that fires twice
(gradient checkpointing) or never (a compiled graph) is an error, not a wrong number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np
import torch
from torch import nn

from obce.clouds import CLOUD_KINDS
from obce.corpus import Batch, TokenBatches
from obce.sites import Site, base_model, layers_of, layout_of
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
        values: float32 [n_texts, neurons], every Linear's output at [CLS] (before the activation function; of a
            gated site what its reader takes in), the sites of the layer side by side.
        columns: Site kind -> its columns in `values`.
        tokens: Site kind -> sums over all real tokens of all texts of what the site's reader takes in (after the
            activation for `intermediate`, the attention context for `value`), or of the Linear's output where none
            reads it. Empty when not asked for.
        clouds: Kind in `CLOUD_KINDS` -> float32 [n_chosen, hidden size], vectors of the chosen texts at [CLS]. Empty
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
    """What is taken beside the outputs: sums over tokens, and vectors of the texts that `chosen` [n_texts] marks."""

    tokens: bool
    chosen: NDArray[np.bool_]

    def vectors(self, batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of the batch that are chosen, and their places among the chosen."""
        rows = np.flatnonzero(self.chosen[batch.indices])
        return rows, np.cumsum(self.chosen)[batch.indices[rows]] - 1


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
            self.values[layer] = torch.empty((n_texts, ends[-1]), dtype=torch.float32, device=device)
        self.tokens = {s.name: TokenSums(s.width) for s in sites if wish.tokens}
        self.clouds: dict[tuple[int, str], torch.Tensor] = {}
        self.seen = {s.name: np.zeros(n_texts, np.int64) for s in sites}
        self.batch: Batch | None = None
        self.places = torch.empty(0)
        self.lengths = np.empty(0, np.int64)
        # what entered the layer, where query and key are called for more than that
        self.entering: torch.Tensor | None = None

    def see(self, batch: Batch) -> dict[str, torch.Tensor]:
        inputs = {name: tensor.to(self.device) for name, tensor in batch.inputs.items()}
        self.batch = batch
        self.places = torch.from_numpy(batch.indices).to(self.device)
        self.lengths = batch.inputs["attention_mask"].sum(1).numpy()
        return inputs

    def _current(self) -> Batch:
        if self.batch is None:
            raise RuntimeError("the model ran on a batch that was not announced")
        return self.batch

    def _take_tokens(self, site: Site, tokens: torch.Tensor) -> None:
        if self.wish.tokens:
            self.tokens[site.name].add(tokens, self.lengths)

    def _take_cloud(self, layer: int, kind: str, tokens: torch.Tensor) -> None:
        batch = self._current()
        rows, places = self.wish.vectors(batch)
        if rows.size:
            if (layer, kind) not in self.clouds:
                shape = (int(self.wish.chosen.sum()), tokens.shape[2])
                self.clouds[layer, kind] = torch.empty(shape, dtype=torch.float32, device=self.device)
            self.clouds[layer, kind][torch.from_numpy(places)] = tokens[torch.from_numpy(rows), 0].to(torch.float32)

    def _take_outputs(self, site: Site, output: torch.Tensor) -> None:
        columns = self.columns[site.layer][site.kind]
        self.values[site.layer][self.places, columns] = output[:, 0].to(torch.float32)
        self.seen[site.name][self._current().indices] += 1

    def _on_writer(self, site: Site) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if self.entering is not None and args[0] is not self.entering and site.kind in ("query", "key"):
                return  # of embeddings of distances
            output = output[..., site.columns]
            self._take_outputs(site, output)
            if site.reader is None:
                self._take_tokens(site, output)
            if site.kind in CLOUD_KINDS:
                self._take_cloud(site.layer, site.kind, output)

        return hook

    def _on_reader(self, site: Site) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if site.gated:
                self._take_outputs(site, args[0])
            self._take_tokens(site, args[0])
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
        for site in self.sites:
            wrong = np.flatnonzero(self.seen[site.name] != 1)
            if wrong.size:
                raise RuntimeError(
                    f"site {site.name} was seen {int(self.seen[site.name][wrong[0]])} times on text {int(wrong[0])}, "
                    "but every text must pass exactly once: turn off gradient checkpointing and torch.compile "
                    "while scoring"
                )

    def results(self, layer: int) -> LayerActivations:
        # popped, so that a layer's activations can be freed by the caller before the next is asked for
        values = self.values.pop(layer)
        here = [site for site in self.sites if site.layer == layer]
        for site in here:
            columns = values[:, self.columns[layer][site.kind]]
            # NaN and infinity both spoil a sum; a finite sum has finite terms
            if not math.isfinite(float(columns.sum(dtype=torch.float64))):
                text, neuron = (int(i) for i in torch.nonzero(~torch.isfinite(columns))[0])
                raise ValueError(
                    f"model gives {columns[text, neuron].item()} at [CLS] for neuron {site.name}.{neuron} on text "
                    f"{text}, but every output must be finite: check the weights of '{site.writer}' and of the layers "
                    "before it for NaN or overflow"
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


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode inside the `with`; every module's own training flag is put back, also after an error."""
    # module by module, because a model may hold parts frozen in eval mode inside a model in training mode
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def precise_products(device: torch.device, precision: Precision = "float32") -> Iterator[None]:
    """Products of matrices in the precision asked for inside the `with`, whatever the caller has set."""
    narrow = precision == "bfloat16"
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        with torch.autocast(device.type, torch.bfloat16 if narrow else None, narrow):
            yield
    finally:
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def _evaluating(body: nn.Module, precision: Precision) -> Iterator[None]:
    """Eval mode, no gradients, products of matrices in the precision asked for."""
    device = next(body.parameters()).device
    # no_grad, not inference_mode: hidden states kept between layers may meet code that makes views of them
    with eval_mode(body), torch.no_grad(), precise_products(device, precision):
        yield


def _layer_module(body: nn.Module, site: Site) -> nn.Module:
    """The block that holds the site: the module whose last name is the layer's number."""
    parts = site.writer.split(".")
    return body.get_submodule(".".join(parts[: parts.index(str(site.layer)) + 1]))


def capture(
    model: PreTrainedModel,
    batches: TokenBatches,
    sites: Sequence[Site],
    *,
    memory: Memory = "model",
    tokens: bool = True,
    chosen: NDArray[np.bool_] | None = None,
    precision: Precision = "float32",
    progress: Progress | None = None,
) -> Iterator[LayerActivations]:
    """Yields each layer's outputs at [CLS], sums over tokens and vectors of chosen texts, layer by layer.

    Args:
        model: The dense model; never changed, its training flags are restored.
        batches: Tokenised corpus, padded on the right, so that [CLS] is position 0.
        sites: Sites to watch, as `obce.sites.find_sites` gives them.
        memory: `"model"` runs each batch through the whole model once and holds every layer's outputs
            (4 bytes x neurons x texts). `"layer"` takes all texts through layer 0, then all through layer 1,
            and so on: it holds one layer's outputs and the hidden states of all tokens (4 bytes x hidden size
            x tokens), at the same amount of arithmetic and with the same bits.
        tokens: Sum up what every neuron does over all tokens. Without it the last layer of an encoder of BERT's
            shape is computed at [CLS] alone, since nothing else of it is read.
        chosen: [n_texts] texts whose vectors are kept for the clouds of heads and layers (default: none).
        precision: Of products of matrices. `"tf32"` means something on CUDA alone; `"bfloat16"` runs under autocast.
            What is captured is float32 always.
        progress: Called with (texts done, texts in all); a layer counts as its share of a text.

    Raises:
        ValueError: `memory` or `precision` is unknown, or an output is NaN or infinite (names site, neuron and text).
        RuntimeError: A site did not see every text exactly once.
    """
    if memory not in ("model", "layer"):
        raise ValueError(f"memory is {memory!r}, but must be 'model' or 'layer'")
    if precision not in ("float32", "tf32", "bfloat16"):
        raise ValueError(f"precision is {precision!r}, but must be 'float32', 'tf32' or 'bfloat16'")
    body = base_model(model)
    device = next(body.parameters()).device
    layers = sorted({site.layer for site in sites})
    wish = _Wish(tokens, np.zeros(batches.n_texts, bool) if chosen is None else chosen)
    walk = _through_model if memory == "model" else _layer_by_layer
    yield from walk(body, device, batches, sites, layers, wish, precision, progress or (lambda done, total: None))


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


def first_inputs(
    body: PreTrainedModel, batches: TokenBatches, first: int = 0
) -> Iterator[tuple[Batch, torch.Tensor, dict[int, Given]]]:
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
            with stopping_before(layers[door], lambda hidden, args, kwargs: held.append((hidden, (args, kwargs)))):
                run_to_stop(body, **inputs)
        by_kind = dict(zip(doors, held, strict=True))
        held.clear()
        yield batch, by_kind[kinds[first]][0], {layer: by_kind[kind][1] for layer, kind in kinds.items()}


def _at_cls_alone(block: nn.Module) -> bool:
    """Whether a layer can be computed at [CLS] alone: it has BERT's shape."""
    return {"attention.self.query", "intermediate.dense"} <= {name for name, _ in block.named_modules()}


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
) -> Iterator[LayerActivations]:
    observer = _Observer(sites, batches.n_texts, device, wish)
    done = 0
    last = _layer_module(body, next(site for site in sites if site.layer == layers[-1]))
    held: list[torch.Tensor] = []
    whole = wish.tokens or not _at_cls_alone(last)
    with _evaluating(body, precision), observer.watching(body):
        for batch in batches:
            inputs = observer.see(batch)
            if whole:
                body(**inputs)
            else:
                with stopping_before(last, lambda hidden, _args, _kwargs: held.append(hidden)):
                    run_to_stop(body, **inputs)
                observer.see_hidden(layers[-1], _layer_at_cls(last, held.pop(), inputs["attention_mask"]))
            done += len(batch.indices)
            progress(done, batches.n_texts)
    observer.check_counts()
    for layer in layers:
        yield observer.results(layer)


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
) -> Iterator[LayerActivations]:
    with _evaluating(body, precision):
        held = list(first_inputs(body, batches, layers[0]))

    done = 0.0
    for layer in layers:
        here = [site for site in sites if site.layer == layer]
        block = _layer_module(body, here[0])
        observer = _Observer(here, batches.n_texts, device, wish)
        # entered anew for every layer: a caller between two layers sees its own gradient mode and training flags
        with _evaluating(body, precision), observer.watching(body):
            for i, (batch, hidden, given) in enumerate(held):
                inputs = observer.see(batch)
                if layer == layers[-1] and not wish.tokens and _at_cls_alone(block):
                    observer.see_hidden(layer, _layer_at_cls(block, hidden, inputs["attention_mask"]))
                else:
                    args, kwargs = given[layer]
                    output = block(hidden, *args, **kwargs)
                    held[i] = (batch, output[0] if isinstance(output, tuple) else output, given)
                done += len(batch.indices) / len(layers)
                progress(done, batches.n_texts)
        observer.check_counts()
        yield observer.results(layer)
