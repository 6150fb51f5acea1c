"""Outputs of every neuron at [CLS], and the means its reader sees over all tokens, streamed layer by layer.

Nothing is copied or patched: forward hooks stand on the Linears of a site inside a context manager and are gone
when it closes, also after an exception. Each text must arrive exactly once a site; a hook that fires twice
(gradient checkpointing) or never (a compiled graph) is an error, not a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from obce.corpus import Batch, TokenBatches
from obce.sites import Site, base_model

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

Memory = Literal["model", "layer"]
Progress = Callable[[float, float], None]


@dataclass
class LayerActivations:
    """What one layer said about every text.

    Attributes:
        layer: Layer number, from 0.
        outputs: Site kind -> float32 [width, n_texts], the Linear's output at [CLS] (before the activation
            function), columns in corpus order.
        token_means: Site kind -> float64 [width], mean over all real tokens of all texts of what the site's
            reader takes in: after the activation for `intermediate`, the attention context for `value`.
    """

    layer: int
    outputs: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    token_means: dict[str, NDArray[np.float64]] = field(default_factory=dict)


class _Stop(Exception):  # noqa: N818  (a signal, not an error)
    """Ends a forward pass once the first layer's input is known."""


class _Observer:
    """Hooks for some sites; `see(batch)` names the texts that the next forward pass carries."""

    def __init__(self, sites: Sequence[Site], n_texts: int, *, outputs: bool) -> None:
        self.sites = sites
        self.n_texts = n_texts
        self.outputs = {s.name: np.empty((s.width, n_texts), np.float32) for s in sites if outputs}
        self.sums = {s.name: np.zeros(s.width, np.float64) for s in sites if s.reader is not None}
        self.seen = {s.name: np.zeros(n_texts, np.int64) for s in sites}
        self.tokens = dict.fromkeys(self.sums, 0)
        self.batch: Batch | None = None
        self.mask = torch.empty(0)

    def see(self, batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        self.batch, self.mask = batch, inputs["attention_mask"].to(torch.float32)[:, None]
        return inputs

    def _current(self) -> Batch:
        if self.batch is None:
            raise RuntimeError("the model ran on a batch that was not announced")
        return self.batch

    def _on_writer(self, site: Site) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
            batch = self._current()
            at_cls = output[:, 0].to(torch.float32).cpu()
            if not bool(torch.isfinite(at_cls).all()):
                text, neuron = (int(i) for i in torch.nonzero(~torch.isfinite(at_cls))[0])
                raise ValueError(
                    f"model gives {at_cls[text, neuron].item()} at [CLS] for neuron {site.name}.{neuron} on text "
                    f"{int(batch.indices[text])}, but every output must be finite: check the weights of "
                    f"'{site.writer}' and of the layers before it for NaN or overflow"
                )
            self.outputs[site.name][:, batch.indices] = at_cls.numpy().T
            self.seen[site.name][batch.indices] += 1

        return hook

    def _on_reader(self, site: Site) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            batch = self._current()
            # [b, 1, T] x [b, T, width]: padding is left out by the product, each text's sum is over at most T
            # fp32 terms, and the texts are added up in float64
            texts = torch.bmm(self.mask, args[0].to(torch.float32))
            self.sums[site.name] += texts.sum((0, 1), dtype=torch.float64).cpu().numpy()
            self.tokens[site.name] += int(batch.inputs["attention_mask"].sum())
            if not self.outputs:
                self.seen[site.name][batch.indices] += 1

        return hook

    @contextmanager
    def watching(self, body: nn.Module) -> Iterator[None]:
        handles = []
        try:
            for site in self.sites:
                if self.outputs:
                    writer = body.get_submodule(site.writer)
                    handles.append(writer.register_forward_hook(self._on_writer(site)))
                if site.reader is not None:
                    reader = body.get_submodule(site.reader)
                    handles.append(reader.register_forward_pre_hook(self._on_reader(site)))
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
        found = LayerActivations(layer)
        for site in self.sites:
            if site.layer != layer:
                continue
            if self.outputs:
                # popped, so that a layer's activations can be freed by the caller before the next is asked for
                found.outputs[site.kind] = self.outputs.pop(site.name)
            if site.reader is not None:
                mean = self.sums[site.name] / self.tokens[site.name]
                if not np.isfinite(mean).all():
                    neuron = int(np.flatnonzero(~np.isfinite(mean))[0])
                    raise ValueError(
                        f"model gives a mean of {mean[neuron]} over all tokens for neuron {site.name}.{neuron}, but "
                        f"it must be finite: check the weights of '{site.writer}' for NaN or overflow"
                    )
                found.token_means[site.kind] = mean
        return found


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
def _evaluating(body: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no autocast."""
    device = next(body.parameters()).device
    # no_grad, not inference_mode: hidden states kept between layers may meet code that makes views of them
    with eval_mode(body), torch.no_grad(), torch.autocast(device.type, enabled=False):
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
    progress: Progress | None = None,
) -> Iterator[LayerActivations]:
    """Yields each layer's outputs at [CLS] and token means, layer by layer.

    Args:
        model: The dense model; never changed, its training flags are restored.
        batches: Tokenised corpus, padded on the right, so that [CLS] is position 0.
        sites: Sites to watch, as `obce.sites.find_sites` gives them.
        memory: `"model"` runs each batch through the whole model once and holds every layer's outputs
            (4 bytes x neurons x texts). `"layer"` takes all texts through layer 0, then all through layer 1,
            and so on: it holds one layer's outputs and the hidden states of all tokens (4 bytes x hidden size
            x tokens), at the same amount of arithmetic and with the same bits.
        progress: Called with (texts done, texts in all); a layer counts as its share of a text.

    Raises:
        ValueError: `memory` is unknown, or an output is NaN or infinite (names site, neuron and text).
        RuntimeError: A site did not see every text exactly once.
    """
    if memory not in ("model", "layer"):
        raise ValueError(f"memory is {memory!r}, but must be 'model' or 'layer'")
    body = base_model(model)
    device = next(body.parameters()).device
    layers = sorted({site.layer for site in sites})
    walk = _through_model if memory == "model" else _layer_by_layer
    yield from walk(body, device, batches, sites, layers, progress or (lambda done, total: None))


def _through_model(
    body: nn.Module,
    device: torch.device,
    batches: TokenBatches,
    sites: Sequence[Site],
    layers: list[int],
    progress: Progress,
) -> Iterator[LayerActivations]:
    observer = _Observer(sites, batches.n_texts, outputs=True)
    done = 0
    with _evaluating(body), observer.watching(body):
        for batch in batches:
            body(**observer.see(batch, device))
            done += len(batch.indices)
            progress(done, batches.n_texts)
    observer.check_counts()
    for layer in layers:
        yield observer.results(layer)


def _layer_by_layer(
    body: nn.Module,
    device: torch.device,
    batches: TokenBatches,
    sites: Sequence[Site],
    layers: list[int],
    progress: Progress,
) -> Iterator[LayerActivations]:
    held: list[tuple[Batch, torch.Tensor, tuple[Any, ...], dict[str, Any]]] = []
    first = _layer_module(body, next(site for site in sites if site.layer == layers[0]))

    def stop_before_layers(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        held.append((batch, args[0], args[1:], kwargs))
        raise _Stop

    handle = first.register_forward_pre_hook(stop_before_layers, with_kwargs=True)
    try:
        with _evaluating(body):
            for batch in batches:
                try:
                    body(**{name: tensor.to(device) for name, tensor in batch.inputs.items()})
                except _Stop:
                    continue
                raise RuntimeError("the model ran without calling its first layer: use memory='model'")
    finally:
        handle.remove()

    done = 0.0
    for layer in layers:
        here = [site for site in sites if site.layer == layer]
        block = _layer_module(body, here[0])
        observer = _Observer(here, batches.n_texts, outputs=True)
        # entered anew for every layer: a caller between two layers sees its own gradient mode and training flags
        with _evaluating(body), observer.watching(body):
            for i, (batch, hidden, args, kwargs) in enumerate(held):
                observer.see(batch, device)
                output = block(hidden, *args, **kwargs)
                held[i] = (batch, output[0] if isinstance(output, tuple) else output, args, kwargs)
                done += len(batch.indices) / len(layers)
                progress(done, batches.n_texts)
        observer.check_counts()
        yield observer.results(layer)


def token_means(
    model: PreTrainedModel,
    batches: TokenBatches,
    sites: Sequence[Site],
    *,
    progress: Progress | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Mean over all real tokens of what each site's reader takes in.

    Args:
        model: The dense model; never changed.
        batches: Tokenised texts.
        sites: Sites to watch; those without a reader are left out of the result.
        progress: Called with (texts done, texts in all).

    Returns:
        Site name -> float64 [width]: after the activation function for `intermediate`, the attention context
        for `value`. This is the constant that `repair="mean"` puts in a removed neuron's place.
    """
    body = base_model(model)
    device = next(body.parameters()).device
    read = [site for site in sites if site.reader is not None]
    observer = _Observer(read, batches.n_texts, outputs=False)
    done = 0
    with _evaluating(body), observer.watching(body):
        for batch in batches:
            body(**observer.see(batch, device))
            done += len(batch.indices)
            if progress is not None:
                progress(done, batches.n_texts)
    observer.check_counts()
    found: dict[str, NDArray[np.float64]] = {}
    for layer in sorted({site.layer for site in read}):
        for kind, mean in observer.results(layer).token_means.items():
            found[f"{layer}.{kind}"] = mean
    return found
