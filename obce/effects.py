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
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import nn

from obce.capture import check_padding, eval_mode, padded_as_read, precise_products, read_texts
from obce.device import resident, to_host, upload
from obce.h0 import r_f
from obce.sites import Layout, Site, base_model, inner_width, layers_of, layout_of, matrix, position_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from transformers import PreTrainedModel

    from obce.corpus import Batch, TokenBatches

READS = ("head", "cls", "last", "mean", "tokens", "logits")
"""What may be read of a model, `"auto"` aside."""

BAGS, BAG_TEXTS = 100, 20

# Bytes that a batch's activations may take while they wait for the backward pass.
_GRADIENT_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}

PARTNER = {"query": "key", "key": "query"}
"""Kind -> the kind whose neurons its own are multiplied with."""

_ONE_CLASS = "single_label_classification"

_CLASSIFIERS = ("SequenceClassification", "ImageClassification")


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
        read: What the directions meet: `"cls"`, the last hidden state at [CLS]; `"last"`, at the last token; `"mean"`,
            its mean over the real tokens; `"tokens"`, the last hidden state of every token; `"head"`, what a sequence
            classifier's last Linear takes in; `"logits"`, what it puts out. `"auto"`: see `reading_of`.
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
    found = _effects(model, batches, sites, means, read, labels, seed, progress)
    return {name: np.ascontiguousarray(to_host(values).T) for name, values in found.items()}


def resident_effects(
    model: PreTrainedModel,
    batches: TokenBatches,
    sites: Sequence[Site],
    means: Mapping[str, NDArray[np.float64]],
    *,
    read: str = "auto",
    labels: NDArray[Any] | None = None,
    seed: int = 0,
    progress: Callable[[float, float], None] | None = None,
) -> torch.Tensor:
    """float32 [n_texts, neurons], where the model is: what `effect_clouds` gives, the sites side by side."""
    found = _effects(model, batches, sites, means, read, labels, seed, progress)
    return torch.cat([torch.as_tensor(found[site.name]) for site in sites], 1)


@torch.inference_mode(False)  # nothing has a gradient in a caller's inference mode
def _effects(
    model: PreTrainedModel,
    batches: TokenBatches,
    sites: Sequence[Site],
    means: Mapping[str, NDArray[np.float64]],
    read: str,
    labels: NDArray[Any] | None,
    seed: int,
    progress: Callable[[float, float], None] | None,
) -> dict[str, NDArray[np.float32] | torch.Tensor]:
    """Site name -> float32 [n_texts, width], on the device where scoring stays there."""
    given = None if labels is None else torch.from_numpy(checked_labels(model, labels, batches.n_texts))
    read = reading_of(model, read)
    body = base_model(model)
    device = next(body.parameters()).device
    stays = resident(device)
    found: dict[str, Any] = {
        site.name: torch.zeros((batches.n_texts, site.width), device=device)
        if stays
        else np.zeros((batches.n_texts, site.width), np.float32)
        for site in sites
    }
    wide = torch.promote_types(next(body.parameters()).dtype, torch.float32)
    centres = {site.name: torch.from_numpy(means[site.name]).to(wide).to(device) for site in sites}
    rows: Any = np.empty(0, np.int64)

    def take(site: Site, values: torch.Tensor, gradient: torch.Tensor | None) -> None:
        # padding has no gradient: no real token looks at it
        if gradient is None:
            raise RuntimeError("effects are taken from gradients")
        own, grouped = gradient.to(wide), site.groups > 1 and site.reader is not None
        values, own = (site.grouped(values), site.grouped(own)) if grouped else (values, own)
        effects = (own * (values.to(wide) - centres[site.name])).sum((1, 2) if grouped else 1)
        into = found[site.name]
        if isinstance(into, torch.Tensor):
            into.index_add_(0, rows, effects.to(torch.float32))
        else:
            into[rows] += effects.cpu().numpy()

    done = 0
    with (
        eval_mode(model),
        precise_products(device),
        no_weight_gradients(model),
        torch.enable_grad(),
        Watch(body, sites, take),
    ):
        for batch in batches:
            inputs = {name: upload(tensor, device) for name, tensor in batch.inputs.items()}
            rows = upload(batch.indices, device) if stays else batch.indices
            if given is not None:
                aim = _loss(model, inputs, given[torch.from_numpy(batch.indices)].to(device))
            else:
                aim = projection(what_is_read(model, inputs, batch, read), batch, seed)
            aim.backward()  # type: ignore[no-untyped-call]
            done += len(batch.indices)
            if progress is not None:
                progress(done, batches.n_texts)
    if stays:  # a sum in float64 is finite if its terms are
        sums = to_host(torch.stack([values.sum(dtype=torch.float64) for values in found.values()]))
        spoilt = [name for name, total in zip(found, sums, strict=True) if not np.isfinite(total)]
        found |= {name: to_host(found[name]) for name in spoilt}
    for name, values in found.items():
        if isinstance(values, np.ndarray) and not np.isfinite(values).all():
            text, neuron = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise ValueError(
                f"model gives neuron {name}.{neuron} the effect {values[text, neuron]} on text {text}, but every "
                "effect must be finite: check the model's weights for NaN or overflow"
            )
    return found


def gradient_tokens(model: PreTrainedModel, max_length: int, batch_tokens: int) -> int:
    """Places of a batch, up to `batch_tokens`, whose activations take 1 GiB (on a GPU 4), as a rough count has them."""
    device = next(base_model(model).parameters()).device.type
    config: Any = base_model(model).config
    heads: int = getattr(config, "num_attention_heads", 16)
    each: int = 16 * config.hidden_size + 4 * inner_width(config) + 2 * heads * max_length
    fit = _GRADIENT_BYTES.get(device, _GRADIENT_BYTES["cpu"]) // (4 * int(config.num_hidden_layers) * each)
    return max(max_length, min(batch_tokens, fit))


def reading_of(model: PreTrainedModel, read: str = "auto") -> str:
    """What is read of a model: one of `READS`, or what is read if nothing else is said.

    The head of a classifier of sequences or pictures reads `"head"`; token classifiers, question answerers, language
    models and what restores masked pictures `"tokens"`; a bare encoder is read at `"cls"`, a bare decoder at `"last"`,
    and either as `"mean"` if it was loaded from a directory of sentence-transformers that says so in `1_Pooling`.

    Raises:
        ValueError: `read` is unknown, or that file is not readable JSON.
    """
    if read in READS:
        return read
    if read != "auto":
        raise ValueError(f"read is {read!r}, expected 'auto' or one of {', '.join(map(repr, READS))}.")
    name = type(model).__name__
    if head_linear(model) is not None and any(kind in name for kind in _CLASSIFIERS):
        return "head"
    if model is base_model(model):
        return "mean" if _mean_pooled(Path(str(model.config.name_or_path or ""))) else position_of(model)
    return "cls" if any(kind in name for kind in ("NextSentence", "MultipleChoice", "ImageClass")) else "tokens"


def head_linear(model: PreTrainedModel) -> nn.Linear | None:
    """The last Linear of a classifier's head, alone or inside a head of several modules; None where there is none."""
    classifier = getattr(model, "classifier", getattr(model, "score", None))
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
        model: A classifier of sequences or pictures, or a model that predicts the next sentence.
        labels: [n_texts].
        n_texts: Number of texts.

    Raises:
        ValueError: The head takes no single label of a text, or the labels are not one of its classes for each text.
    """
    name, config = type(model).__name__, model.config
    outputs = int(config.num_labels or 0)
    if not any(kind in name for kind in (*_CLASSIFIERS, "NextSentence")):
        raise ValueError(
            f"labels are given, but a {name} takes none of a text: load the model with the head they are for."
        )
    check_padding(model)
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
    rows = bag_rows(n, bags=bags, size=size, seed=seed)
    if rows is None:
        return np.full(width, np.nan)
    total = np.zeros(width)
    for row in rows:
        total += r_f(np.ascontiguousarray(values[:, row]), threads=threads, check=False)
    return total / bags


def bag_rows(n: int, *, bags: int = BAGS, size: int = BAG_TEXTS, seed: int = 0) -> NDArray[np.int64] | None:
    """int64 [bags, size], the random groups of n texts; None where there are fewer texts than `size`."""
    if n < size:
        return None
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(n)[:size] for _ in range(bags)])


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
    return weight_scores_each(model, sites, [spreads])[0]


def weight_scores_each(
    model: PreTrainedModel, sites: Sequence[Site], spreads: Sequence[Mapping[str, NDArray[np.float64]] | None]
) -> list[dict[str, dict[str, NDArray[np.float64]]]]:
    """`weight_scores` for each of some spreads (of all texts, of half of them), the weights being read once."""
    body = base_model(model)
    # one transfer for all sites
    squares: list[torch.Tensor] = []
    pieces = []  # of each site's writer
    for site in sites:
        before = len(squares)
        for name in site.writers:
            writer: Any = body.get_submodule(name)
            for start in site.starts:
                rows = slice(start, start + site.width)
                squares.append(_squares(matrix(writer)[rows], 1))
                if writer.bias is not None:
                    squares.append(_squares(writer.bias[rows, None], 1))
        pieces.append(len(squares) - before)
        if site.reader is not None:
            columns = _squares(matrix(body.get_submodule(site.reader)), 0)
            squares.append(columns if site.groups == 1 else site.grouped(columns).sum(0))
    parts = iter(np.split(to_host(torch.cat(squares)), np.cumsum([len(part) for part in squares])[:-1]))
    found: list[dict[str, dict[str, NDArray[np.float64]]]] = [{} for _ in spreads]
    for site, count in zip(sites, pieces, strict=True):
        total = sum((next(parts) for _ in range(count)), np.zeros(site.width))
        column = None
        if site.reader is not None:
            column = next(parts)
            total = total + column
        for each, given in zip(found, spreads, strict=True):
            each[site.name] = {"magnitude": np.sqrt(total)}
            if given is not None:
                factor = 1.0 if column is None else np.sqrt(column)
                if site.kind in PARTNER:
                    factor = as_wide(given[f"{site.layer}.{PARTNER[site.kind]}"], site)
                each[site.name]["spread"] = given[site.name] * factor
    return found


def as_wide(partner: NDArray[np.float64], site: Site) -> NDArray[np.float64]:
    """Standard deviations of the partners of a site's neurons, [width]; of a key that several query heads meet, of all.

    `partner` holds those of the partner's site, which is as wide or wider, or narrower, by the heads that share one.
    """
    if len(partner) == site.width:
        return partner
    if site.kind == "key":
        grouped = site.grouped(torch.from_numpy(partner)).numpy()
        found: NDArray[np.float64] = np.sqrt(np.square(grouped).mean(0))
        return found
    heads, groups = site.heads, site.width // len(partner)
    return np.repeat(partner.reshape(heads // groups, -1), groups, axis=0).reshape(-1)


def _squares(weight: torch.Tensor, dim: int) -> torch.Tensor:
    return weight.detach().double().square().sum(dim)


Take: TypeAlias = "Callable[[Site, torch.Tensor, torch.Tensor | None], None]"
"""Site, its values [b, T, columns], and the gradient with respect to them or None."""


class Watch:
    """Hooks on what the readers of sites take in, or on a Linear's output where none reads it.

    `take` is called for every site and batch: when the backward pass meets the site, or, without gradients, the
    forward pass. Nothing is held for it between batches, and the hooks are gone when the `with` closes. The weights
    want no gradient meanwhile (`no_weight_gradients`), and the backward pass ends at the door of layer `first`.
    """

    def __init__(
        self, body: PreTrainedModel, sites: Sequence[Site], take: Take, *, gradients: bool = True, first: int = 0
    ) -> None:
        self.body = body
        self.sites = sites
        self.take = take
        self.gradients = gradients
        self.first = first
        # what entered the layer, where query and key are called for embeddings of distances as well
        self.entering: torch.Tensor | None = None
        self.handles: list[Any] = []

    def __enter__(self) -> Watch:
        layout = layout_of(self.body)
        if self.gradients:
            self._ask_for_gradients(layout)
        if layout.positions:
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

    def _ask_for_gradients(self, layout: Layout) -> None:
        """The weights want none, so something before the first site has to."""
        if self.first and layout.site_map is None:
            door = layers_of(self.body)[self.first]
            self.handles.append(
                door.register_forward_pre_hook(lambda _m, args: (args[0].detach().requires_grad_(), *args[1:]))
            )
            return
        if layout.site_map is None:
            embeddings = [self.body.get_submodule(layout.embeddings)]
        else:  # which does not say where they are
            embeddings = [module for module in self.body.modules() if isinstance(module, nn.Embedding)]
        for module in embeddings:
            self.handles.append(module.register_forward_hook(lambda _m, _args, out: out.detach().requires_grad_()))

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
        held = activation.detach()[..., columns]
        if self.gradients:
            activation.register_hook(lambda gradient: self.take(site, held, gradient[..., columns]))  # type: ignore[no-untyped-call]
        else:
            self.take(site, held, None)


def check_gradients(model: nn.Module) -> None:
    """Raises `ValueError` where the weights do not let gradients pass."""
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "model has weights that were made in torch.inference_mode, which let no gradient pass, expected others; "
            "load it outside of that mode, in which it may be scored."
        )


@contextmanager
def no_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Parameters want no gradient until the `with` closes; raises `ValueError` where nothing has one."""
    check_gradients(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def projection(vectors: torch.Tensor, batch: Batch, seed: int) -> torch.Tensor:
    """Sum over texts of <v_s, what is read>, v_s standard normal; of every token, divided by the root of their number.

    `vectors` [b, d], or [b, T, d]; a text's direction depends on seed and its position alone.
    """
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    directions = np.zeros(vectors.shape, np.float32)
    lengths = batch.lengths.tolist()
    for row, text in enumerate(batch.indices.tolist()):
        rng = np.random.default_rng([seed, text])
        if vectors.ndim == 3:
            drawn = rng.standard_normal((lengths[row], vectors.shape[2]), np.float32)
            directions[row, : lengths[row]] = drawn / np.float32(lengths[row]) ** 0.5
        else:
            directions[row] = rng.standard_normal(vectors.shape[1], np.float32)
    return (vectors * upload(directions, vectors.device)).sum()


def what_is_read(model: PreTrainedModel, inputs: dict[str, torch.Tensor], batch: Batch, read: str) -> torch.Tensor:
    """[b, d], or [b, T, d] where every token is read; `read` is one of `READS`.

    Raises:
        ValueError: The model has nothing of that kind.
    """
    if read in ("head", "logits"):
        classifier = head_linear(model)
        if classifier is None:
            raise ValueError(
                f"read is {read!r}, but a {type(model).__name__} has no classifier: read 'cls', 'last', 'mean' or "
                "'tokens'."
            )
        if layout_of(model).causal and "SequenceClassification" in type(model).__name__:
            hidden = base_model(model)(**inputs).last_hidden_state
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), _pooled_tokens(model, inputs)]
            return pooled if read == "head" else classifier(pooled)  # type: ignore[no-any-return]
        taken: list[torch.Tensor] = []
        handle = classifier.register_forward_hook(
            lambda _m, args, out: taken.append(args[0] if read == "head" else out)
        )
        try:
            model(**inputs)
        finally:
            handle.remove()
        return taken[0]
    states = last_states(model, base_model(model)(**inputs))
    mask = batch.real.to(states.device) if batch.tokens else inputs["attention_mask"]
    return read_hidden(states, mask, read)


def last_states(model: PreTrainedModel, told: Any) -> torch.Tensor:
    """Last hidden states, [b, T, hidden], of what the base model told.

    Raises:
        ValueError: There are none.
    """
    if not hasattr(told, "last_hidden_state"):
        raise ValueError(
            f"model is a {type(model).__name__}, whose base model gives no last_hidden_state, expected an encoder of "
            "transformers that does."
        )
    states: torch.Tensor = told.last_hidden_state
    return states


def _pooled_tokens(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """int64 [b], the token whose state a decoder's classifier takes, by transformers' own rule."""
    pad, real = model.config.pad_token_id, inputs["attention_mask"]
    if pad is not None:
        real = (padded_as_read(model, inputs)["input_ids"] != pad).long()
    return (torch.arange(real.shape[1], device=real.device) * real).argmax(-1)


def read_hidden(hidden: torch.Tensor, mask: torch.Tensor, read: str) -> torch.Tensor:
    """What is read of last hidden states [b, T, hidden] with the mask [b, T] of texts padded on the right.

    `read` is `"cls"`, `"last"`, `"mean"` or `"tokens"`.
    """
    return hidden if read == "tokens" else read_texts(hidden, mask.sum(1), read)


def _loss(model: PreTrainedModel, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Sum over the texts of the model's own loss."""
    before = model.config.problem_type
    try:
        loss: torch.Tensor = model(**padded_as_read(model, inputs), labels=labels).loss
    finally:
        model.config.problem_type = before  # the forward pass notes there what it takes the labels for
    return loss * len(labels)
