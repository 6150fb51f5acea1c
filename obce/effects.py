"""What neurons do to what is read of a model: the effect cloud, and scores that need weights or labels.

The effect of neuron f on text s is the first-order change of <v_s, what is read> when f is held at its mean over all
tokens, v_s a random direction of the text:

    c_f(s) = sum over tokens t of g_f(t) (a_f(t) - mean a_f),    g = gradient of <v_s, read(s)> with respect to a,

a being what f's reader takes in (or the Linear's output where none reads it). {c_f(s)} over the texts is f's effect
cloud. It needs no labels, and unlike the raw outputs at [CLS] it is in the same unit for every neuron of a model.
With the loss of labelled texts in the place of <v_s, read(s)> it is Taylor's criterion (Molchanov et al.,
arXiv 1611.06440), taken about the mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from obce.capture import eval_mode, precise_products
from obce.h0 import r_f
from obce.sites import Site, base_model, layers_of, layout_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from transformers import PreTrainedModel

    from obce.corpus import Batch, TokenBatches

READS = ("head", "cls", "mean", "tokens", "logits")
"""What may be read of a model, `"auto"` aside."""

BAGS, BAG_TEXTS = 100, 20

_ONE_CLASS = "single_label_classification"


def effect_clouds(
    model: PreTrainedModel,
    batches: TokenBatches,
    sites: Sequence[Site],
    means: Mapping[str, NDArray[np.float64]],
    *,
    read: str = "auto",
    labels: NDArray[Any] | None = None,
    seed: int = 0,
    progress: Callable[[float, float], None] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Effect of every neuron on every text, by one forward and one backward pass.

    Memory beside the activations of one batch: 4 bytes x neurons x texts. No gradient of a weight is made.

    Args:
        model: An encoder with any head or none; never changed.
        batches: Texts.
        sites: Sites to watch.
        means: Site name -> float64 [width], mean over all tokens of what the site's reader takes in, or of the
            Linear's output where none reads it.
        read: What the directions meet: `"cls"`, the last hidden state at [CLS]; `"mean"`, its mean over the real
            tokens; `"tokens"`, the last hidden state of every token; `"head"`, what a sequence classifier's last
            Linear takes in; `"logits"`, what it puts out. `"auto"`: see `reading_of`.
        labels: [n_texts]; then the model's own loss takes the place of the random directions, and `read` has no say.
            Numbers of classes, or of any kind for a head of one output (regression).
        seed: Of the directions; a text's depends on seed and its position alone.
        progress: Called with (texts done, texts in all).

    Returns:
        Site name -> float32 [width, n_texts].

    Raises:
        ValueError: `read` is unknown or the model has nothing of that kind, labels are given to a model without a
            head that takes them or are none of its classes, or an effect is not finite.
    """
    given = None if labels is None else torch.from_numpy(checked_labels(model, labels, batches.n_texts))
    read = reading_of(model) if read == "auto" else read
    if read not in READS:
        raise ValueError(f"read is {read!r}, expected 'auto' or one of {', '.join(map(repr, READS))}.")
    body = base_model(model)
    device = next(body.parameters()).device
    found = {site.name: np.zeros((batches.n_texts, site.width), np.float32) for site in sites}
    done = 0
    with (
        eval_mode(model),
        precise_products(device),
        _no_weight_gradients(model),
        torch.enable_grad(),
        _Watch(body, sites, means, found) as watch,
    ):
        for batch in batches:
            inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
            watch.rows = batch.indices
            if given is not None:
                aim = _loss(model, inputs, given[torch.from_numpy(batch.indices)].to(device))
            else:
                aim = _projection(model, inputs, read, batch, seed)
            aim.backward()  # type: ignore[no-untyped-call]
            done += len(batch.indices)
            if progress is not None:
                progress(done, batches.n_texts)
    for name, values in found.items():
        if not np.isfinite(values).all():
            text, neuron = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise ValueError(
                f"model gives neuron {name}.{neuron} the effect {values[text, neuron]} on text {text}, but every "
                "effect must be finite: check the model's weights for NaN or overflow"
            )
    return {name: np.ascontiguousarray(values.T) for name, values in found.items()}


def reading_of(model: PreTrainedModel) -> str:
    """What is read of a model if nothing else is said.

    A sequence classifier's head reads `"head"`; token classifiers, question answerers and language models `"tokens"`;
    a bare encoder is read at `"cls"`, or as `"mean"` if it was loaded from a directory of sentence-transformers that
    says so in `1_Pooling`.

    Raises:
        ValueError: That file is not readable JSON.
    """
    name = type(model).__name__
    if head_linear(model) is not None and "SequenceClassification" in name:
        return "head"
    if model is base_model(model):
        return "mean" if _mean_pooled(Path(str(model.config.name_or_path or ""))) else "cls"
    return "cls" if any(kind in name for kind in ("NextSentence", "MultipleChoice")) else "tokens"


def head_linear(model: PreTrainedModel) -> nn.Linear | None:
    """The last Linear of a classifier's head, alone or inside a head of several modules; None where there is none."""
    classifier = getattr(model, "classifier", None)
    found = getattr(classifier, "out_proj", classifier)
    return found if isinstance(found, nn.Linear) else None


def _mean_pooled(checkpoint: Path) -> bool:
    file = checkpoint / "1_Pooling" / "config.json"
    if not file.is_file():
        return False
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"pooling '{file}' is not readable JSON ({error}): mend it, or name what is read") from error
    # two spellings, by version
    return isinstance(stated, dict) and bool(
        stated.get("pooling_mode_mean_tokens") or stated.get("pooling_mode") in ("mean", ["mean"])
    )


def checked_labels(model: PreTrainedModel, labels: ArrayLike, n_texts: int) -> NDArray[Any]:
    """Labels as the loss of the model's head takes them: int64 numbers of classes, or float32 for regression.

    Args:
        model: A sequence classifier, or a model that predicts the next sentence.
        labels: [n_texts].
        n_texts: Number of texts.

    Raises:
        ValueError: The head takes no single label of a text, or the labels are not one of its classes for each text.
    """
    name, config = type(model).__name__, model.config
    outputs = int(config.num_labels or 0)
    if not any(kind in name for kind in ("SequenceClassification", "NextSentence")):
        raise ValueError(
            f"labels are given, but a {name} takes none of a text: load the model with the head they are for."
        )
    given = np.asarray(labels)
    if given.shape != (n_texts,):
        raise ValueError(
            f"labels have the shape {given.shape}, expected {(n_texts,)}: one a text of the corpus, in its order "
            "(a corpus holds each text once)."
        )
    if outputs == 1 and given.dtype.kind in "biuf" and np.isfinite(given).all():
        return given.astype(np.float32)
    classes = outputs if outputs > 1 and config.problem_type in (None, _ONE_CLASS) else 0
    if not (classes and given.dtype.kind in "biu" and given.min() >= 0 and given.max() < classes):
        expected = (
            f"numbers of classes from 0 to {classes - 1}" if classes else "finite numbers, for a head of one output"
        )
        raise ValueError(
            f"labels hold {given.dtype} {given.tolist()[:5]}, expected {expected}: give those of this head."
        )
    return given.astype(np.int64)


def bagged_rf(
    values: NDArray[np.float32], *, bags: int = BAGS, size: int = BAG_TEXTS, seed: int = 0, threads: int | None = None
) -> NDArray[np.float64]:
    """Mean r_f of random groups of texts: [width, n] -> float64 [width]; NaN where there are fewer texts than `size`.

    All rows share the groups.
    """
    width, n = values.shape
    if n < size:
        return np.full(width, np.nan)
    rng = np.random.default_rng(seed)
    total = np.zeros(width)
    for _ in range(bags):
        group = values[:, rng.permutation(n)[:size]]
        total += r_f(np.ascontiguousarray(group), threads=threads, check=False)
    return total / bags


def weight_scores(
    model: PreTrainedModel, sites: Sequence[Site], spreads: Mapping[str, NDArray[np.float64]] | None
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Scores from the weights that go with a neuron.

    Args:
        model: The dense model.
        sites: Sites to score.
        spreads: Site name -> float64 [width], standard deviation over all tokens of what the site's reader takes in.

    Returns:
        Site name -> `magnitude`, the L2 norm of all weights that go with the neuron (its row, its bias and the
        column that reads it), and, with `spreads`, `spread`, the standard deviation times the norm of that column;
        for query and key, which no Linear reads, times the partner's standard deviation; for the others times 1.
    """
    body = base_model(model)
    partner = {"query": "key", "key": "query"}
    found: dict[str, dict[str, NDArray[np.float64]]] = {}
    for site in sites:
        writer: Any = body.get_submodule(site.writer)
        squares = np.zeros(site.width)
        for start in site.starts:
            rows = slice(start, start + site.width)
            squares = squares + _squares(writer.weight[rows], 1)
            if writer.bias is not None:
                squares = squares + _squares(writer.bias[rows, None], 1)
        column = None
        if site.reader is not None:
            reader: Any = body.get_submodule(site.reader)
            column = _squares(reader.weight, 0)
            squares = squares + column
        found[site.name] = {"magnitude": np.sqrt(squares)}
        if spreads is not None:
            factor = 1.0 if column is None else np.sqrt(column)
            if site.kind in partner:
                factor = spreads[f"{site.layer}.{partner[site.kind]}"]
            found[site.name]["spread"] = spreads[site.name] * factor
    return found


def _squares(weight: torch.Tensor, dim: int) -> NDArray[np.float64]:
    found: NDArray[np.float64] = weight.detach().double().square().sum(dim).cpu().numpy()
    return found


class _Watch:
    """Hooks that turn gradients into effects as the backward pass meets them; gone when the `with` closes."""

    def __init__(
        self,
        body: PreTrainedModel,
        sites: Sequence[Site],
        means: Mapping[str, NDArray[np.float64]],
        found: Mapping[str, NDArray[np.float32]],
    ) -> None:
        self.body = body
        self.sites = sites
        self.found = found
        weight = next(body.parameters())
        self.wide = torch.promote_types(weight.dtype, torch.float32)
        self.means = {s.name: torch.from_numpy(means[s.name]).to(self.wide).to(weight.device) for s in sites}
        self.rows: NDArray[np.int64] = np.empty(0, np.int64)
        # what entered the layer, where query and key are called for embeddings of distances as well
        self.entering: torch.Tensor | None = None
        self.handles: list[Any] = []

    def __enter__(self) -> _Watch:
        # the weights want no gradient, so something before the first layer has to
        embeddings = self.body.get_submodule("embeddings")
        self.handles.append(embeddings.register_forward_hook(lambda _m, _args, out: out.detach().requires_grad_()))
        if layout_of(self.body).positions:
            for block in layers_of(self.body):
                self.handles.append(block.register_forward_pre_hook(self._before_layer))
        for site in self.sites:
            if site.reader is None:
                self.handles.append(self.body.get_submodule(site.writer).register_forward_hook(self._on_output(site)))
            else:
                reader = self.body.get_submodule(site.reader)
                self.handles.append(reader.register_forward_pre_hook(self._on_input(site)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _before_layer(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.entering = args[0]

    def _on_output(self, site: Site) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if self.entering is None or args[0] is self.entering or site.kind not in ("query", "key"):
                self._follow(site, output, site.columns)

        return hook

    def _on_input(self, site: Site) -> Callable[..., None]:
        return lambda _module, args: self._follow(site, args[0], slice(None))

    def _follow(self, site: Site, activation: torch.Tensor, columns: slice) -> None:
        held, rows = activation.detach()[..., columns], self.rows

        def take(gradient: torch.Tensor) -> None:
            # padding has no gradient: no real token looks at it
            own = gradient[..., columns].to(self.wide)
            effects = (own * (held.to(self.wide) - self.means[site.name])).sum(1)
            self.found[site.name][rows] += effects.cpu().numpy()

        activation.register_hook(take)  # type: ignore[no-untyped-call]


@contextmanager
def _no_weight_gradients(model: nn.Module) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _projection(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], read: str, batch: Batch, seed: int
) -> torch.Tensor:
    """Sum over texts of <v_s, what is read>, v_s standard normal."""
    vectors = _read(model, inputs, read)  # [b, d], or [b, T, d]
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    directions = np.zeros(vectors.shape, np.float32)
    lengths = batch.inputs["attention_mask"].sum(1).tolist()
    for row, text in enumerate(batch.indices.tolist()):
        rng = np.random.default_rng([seed, text])
        if vectors.ndim == 3:
            drawn = rng.standard_normal((lengths[row], vectors.shape[2]), np.float32)
            directions[row, : lengths[row]] = drawn / np.float32(lengths[row]) ** 0.5
        else:
            directions[row] = rng.standard_normal(vectors.shape[1], np.float32)
    return (vectors * torch.from_numpy(directions).to(vectors.device)).sum()


def _read(model: PreTrainedModel, inputs: dict[str, torch.Tensor], read: str) -> torch.Tensor:
    if read in ("head", "logits"):
        classifier = head_linear(model)
        if classifier is None:
            raise ValueError(
                f"read is {read!r}, but a {type(model).__name__} has no classifier: read 'cls', 'mean' or 'tokens'."
            )
        taken: list[torch.Tensor] = []
        handle = classifier.register_forward_hook(
            lambda _m, args, out: taken.append(args[0] if read == "head" else out)
        )
        try:
            model(**inputs)
        finally:
            handle.remove()
        return taken[0]
    hidden: torch.Tensor = base_model(model)(**inputs).last_hidden_state
    return read_hidden(hidden, inputs["attention_mask"], read)


def read_hidden(hidden: torch.Tensor, mask: torch.Tensor, read: str) -> torch.Tensor:
    """What is read of last hidden states [b, T, hidden] with the mask [b, T]: `"cls"`, `"mean"` or `"tokens"`."""
    if read == "cls":
        return hidden[:, 0]
    if read == "tokens":
        return hidden
    real = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * real).sum(1) / real.sum(1)


def _loss(model: PreTrainedModel, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Sum over the texts of the model's own loss."""
    before = model.config.problem_type
    try:
        loss: torch.Tensor = model(**inputs, labels=labels).loss
    finally:
        model.config.problem_type = before  # the forward pass notes there what it takes the labels for
    return loss * len(labels)
