"""Least-squares repair: the readers of a pruned model learn to do without what was removed, from unlabelled text.

The pruned model is walked beside the dense one, layer by layer, on the same texts. In each layer three things are
fitted, each on inputs that the repaired layers before it give:

- query: the keys that go are predicted linearly from the keys that stay, k_r = B k_s + c. Then q_r k_r = (B' q_r) k_s
  plus a number that is the same for every key of a text, which the softmax cancels: the kept query rows become
  W_s + B' W_r. Moments are taken inside each text, since c may differ between texts. Where positions turn query and
  key, each pair by its own angle, no pair stands for another, and queries stay as they are;
- attention_output, the reader of value: y = W' x_s + b' is fitted to what the dense model adds to the residual stream
  at this place, and to the difference that has built up in the stream before it;
- output, the reader of intermediate: likewise.

Of a family that a user's site map describes nothing is known but its Linears: each reader is fitted to what the dense
one says on the same texts, by hooks alone, in the order of the layers, and query and key stay as they are. Where the
map names the LayerNorms, what these take in is the stream with what the reader adds: then the difference that has built
up is made up for, too.

Fitted is the change of the weights, with a ridge, so that the error minimised is never above that of the best
constant (`mean`): no change at all is one of the candidates. Nothing but second moments of the inputs is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from obce.capture import Given, eval_mode, first_inputs, precise_products, run_to_stop, stopping_before
from obce.sites import READ_BY, Layout, base_model, layers_of, layout_of, matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from obce.corpus import Batch, TokenBatches

RIDGE = 0.1
"""Ridge as a share of the mean variance of a reader's inputs: docs/method.md has what others do."""

# Kinds that write the residual stream, in the order of `Layout.norms`.
_NORMED = ("attention_output", "output")

# A matrix of moments that does not factor is given a ridge ten times as large, so often.
_ATTEMPTS = 8

# Inputs whose products with themselves and all behind them are made at once; the rest is the mirror image.
_BLOCK = 512

# Variance of numbers that are equal but for rounding, as a share of their mean square.
_ROUNDING = {torch.float32: 1e-12, torch.float64: 1e-28}


@dataclass(frozen=True, slots=True)
class Fit:
    """One reader's repair.

    Attributes:
        site: Whose reader it is, by the dense model's numbering: `"3.value"`.
        mean_error: Share of the variance of what was to be reached that is lost with the best constants.
        error: Share that is lost with the fitted weights; never more.
        ridge: Ridge that was used, as a share of the mean variance of the inputs.
    """

    site: str
    mean_error: float
    error: float
    ridge: float


class InputMoments:
    """Second moments of inputs x [w] over tokens.

    Products in the model's arithmetic, but at least float32, batch by batch, about the mean of the first batch; sums
    in float64. Products are symmetric: those of a block with the blocks before it are not made.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [m, w]; returns them about the mean of the first batch."""
        x = _wide(x)
        if not self.count:
            self.centre = x.mean(0)
            self.x = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
            self.xx = torch.outer(self.x, self.x)
        x = x - self.centre
        self.count += len(x)
        self.x += x.sum(0, dtype=torch.float64)
        for start in range(0, x.shape[1], _BLOCK):
            stop = start + _BLOCK
            self.xx[start:stop, start:] += x[:, start:stop].T @ x[:, start:]
        return x

    def mean(self) -> torch.Tensor:
        """float64 [w]."""
        return self.x / self.count + self.centre

    def covariance(self) -> torch.Tensor:
        """float64 [w, w]."""
        about = self.x / self.count
        found = self.xx / self.count
        found -= torch.outer(about, about)
        for start in range(0, len(found), _BLOCK):
            stop = start + _BLOCK
            found[stop:, start:stop] = found[start:stop, stop:].T
        return found

    def noise(self, covariance: torch.Tensor) -> torch.Tensor:
        """float64 [w], variance that rounding alone gives each input."""
        return (covariance.diagonal() + self.mean().square()) * _ROUNDING[self.centre.dtype]

    def factor(self, order: torch.Tensor, ridge: float) -> torch.Tensor | None:
        """float64 [1, w, w], lower factor of the covariance with its ridge, the inputs in some order, int64 [w].

        None where inputs predict nothing.
        """
        covariance = self.covariance()
        found, _ = ridge_factor(covariance[order[:, None], order], ridge, self.noise(covariance))
        return None if found is None else found[None]


class _Moments:
    """Second moments of inputs x [w] and of what is to be added to a reader's outputs r [h], over tokens."""

    def __init__(self) -> None:
        self.inputs = InputMoments()

    @property
    def count(self) -> int:
        return self.inputs.count

    def add(self, x: torch.Tensor, r: torch.Tensor, target: torch.Tensor) -> None:
        """Tokens [m, w], [m, h], and the outputs that are to be reached [m, h]."""
        r, target = _wide(r), _wide(target)
        first = not self.count
        x = self.inputs.add(x)
        if first:
            self.centre = r.mean(0)
            none = torch.zeros(r.shape[1], dtype=torch.float64, device=x.device)
            self.xr = torch.outer(self.inputs.x, none).zero_()
            self.r, self.rr, self.t, self.tt = (none.clone() for _ in range(4))
        r = r - self.centre
        self.r += r.sum(0, dtype=torch.float64)
        self.xr += x.T @ r
        self.rr += r.square().sum(0, dtype=torch.float64)
        self.t += target.sum(0, dtype=torch.float64)
        self.tt += target.double().square().sum(0)

    def solve(
        self, ridge: float, rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, float, float, float]:
        """Change of the weights [h, w] and of the bias [h], errors with the best constants and with both, ridge.

        The weights of other rows than `rows` (int64; None: all are free) do not change: these get the best constant.
        """
        if not self.count:
            raise RuntimeError("no tokens were added before solving")
        n = self.count
        r = self.r / n
        covariance = self.inputs.covariance()
        cross = self.xr / n - torch.outer(self.inputs.x / n, r)
        if rows is not None:
            cross = torch.zeros_like(cross).index_copy(1, rows, cross.index_select(1, rows))
        left = float((self.rr / n - r.square()).clamp_min(0).sum())
        whole = float((self.tt / n - (self.t / n).square()).clamp_min(0).sum())
        change, ridge = ridge_solve(covariance, cross, ridge, self.inputs.noise(covariance))
        gained = float(2 * (change * cross).sum() - (change * (covariance @ change)).sum())
        bias = r + self.centre - self.inputs.mean() @ change
        return change.T, bias, _share(left, whole), _share(max(0.0, left - max(0.0, gained)), whole), ridge


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def ridge_solve(
    covariance: torch.Tensor, cross: torch.Tensor, ridge: float, noise: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Solves (covariance + ridge mean variance) X = cross, raising the ridge while the matrix does not factor.

    Inputs whose variances are, taken together, no more than those of rounding (`noise`, [w]) predict nothing.
    """
    for _ in range(_ATTEMPTS):
        factor, ridge = ridge_factor(covariance, ridge, noise)
        if factor is None:
            break
        found = torch.cholesky_solve(cross, factor)
        if bool(torch.isfinite(found).all()):
            return found, ridge
        ridge = _next(ridge)
    return torch.zeros_like(cross), ridge


def ridge_factor(covariance: torch.Tensor, ridge: float, noise: torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """Lower Cholesky factor of covariance + ridge mean variance, and the ridge, raised while there is none.

    None as in `ridge_solve`, where inputs predict nothing.
    """
    scale = float(covariance.diagonal().mean()) if len(covariance) else 0.0
    if scale > (float(noise.mean()) if len(noise) else 0.0):
        for _ in range(_ATTEMPTS):
            shifted = covariance.clone()
            shifted.diagonal().add_(ridge * scale)
            factor, failed = torch.linalg.cholesky_ex(shifted)
            if not int(failed):
                return factor, ridge
            ridge = _next(ridge)
    return None, ridge


def _next(ridge: float) -> float:
    return max(10 * ridge, 1e-12)


class KeyMoments:
    """Second moments of the dense keys of every head, about their mean inside each text."""

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self.count = 0
        self.products: torch.Tensor | None = None
        self.noise: torch.Tensor | None = None

    def add(self, keys: torch.Tensor, mask: torch.Tensor) -> None:
        """Keys [b, T, hidden], real tokens [b, T]."""
        b, length, _ = keys.shape
        keys = _wide(keys)
        real = mask[..., None].to(keys.dtype)
        noise = (keys * real).double().square().sum((0, 1)).view(self.heads, -1) * _ROUNDING[keys.dtype]
        keys = (keys - (keys * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)) * real
        split = keys.view(b * length, self.heads, -1).transpose(0, 1)  # [heads, tokens, size]
        products = (split.transpose(1, 2) @ split).double()
        self.products = products if self.products is None else self.products + products
        self.noise = noise if self.noise is None else self.noise + noise
        self.count += int(mask.sum())

    def factors(self, order: torch.Tensor, ridge: float) -> torch.Tensor:
        """float64 [heads, size, size], lower factors of each head's covariance, its keys in some order [heads, size].

        One of a head whose keys predict nothing is the identity.
        """
        if self.products is None or self.noise is None:
            raise RuntimeError("no keys were added before solving")
        found = []
        for products, noise, own in zip(self.products, self.noise, order, strict=True):
            covariance = products[own[:, None], own] / self.count
            factor, _ = ridge_factor(covariance, ridge, noise / self.count)
            found.append(
                torch.eye(len(own), dtype=products.dtype, device=products.device) if factor is None else factor
            )
        return torch.stack(found)

    def predictors(self, kept: torch.Tensor, ridge: float) -> torch.Tensor:
        """[hidden, kept]: column i says how much of every dense key dimension the i-th kept key stands for."""
        if self.products is None or self.noise is None:
            raise RuntimeError("no keys were added before solving")
        size = self.products.shape[1]
        answer = torch.zeros(self.heads * size, len(kept), dtype=torch.float64, device=self.products.device)
        for head in range(self.heads):
            columns = torch.nonzero(kept // size == head).flatten()
            if not len(columns):
                continue
            stay = kept[columns] - head * size
            covariance = self.products[head] / self.count
            gone = torch.tensor([i for i in range(size) if i not in set(stay.tolist())], dtype=torch.int64)
            answer[head * size + stay, columns] = 1.0
            if len(gone):
                noise = self.noise[head][stay] / self.count
                found, _ = ridge_solve(covariance[stay][:, stay], covariance[stay][:, gone], ridge, noise)
                answer[(head * size + gone)[:, None], columns[None, :]] = found.T
        return answer


@torch.no_grad()
def least_squares(
    dense: PreTrainedModel,
    small: PreTrainedModel,
    batches: TokenBatches,
    kept: Mapping[int, torch.Tensor],
    *,
    ridge: float = RIDGE,
    progress: Callable[[float, float], None] | None = None,
) -> list[Fit]:
    """Fits the readers of `small` in place, so that it says what `dense` says on these texts.

    Memory: four hidden states of every token (16 bytes x hidden size x tokens in float32) and one matrix of second
    moments at a time. Of a family with a site map no hidden states are held: all texts pass through both models up to
    each reader.

    Args:
        dense: The dense model, not changed.
        small: What was cut from it, on the same device.
        batches: Texts, some thousand tokens more than the widest reader has inputs.
        kept: Dense layer number -> int64 [kept], its kept query and key neurons; layers that are absent are dropped.
            Ascending layers are those of `small`.
        ridge: Share of the mean variance of a reader's inputs that is added to each.
        progress: Called with (layers done, layers).

    Returns:
        One `Fit` a reader, in order.

    Raises:
        ValueError: `ridge` is negative or not finite.
    """
    check_ridge(ridge)
    progress = progress or (lambda done, total: None)
    if layout_of(dense).site_map is not None:
        return list(_fit_by_hooks(dense, small, batches, ridge, progress))
    return list(_walk(dense, small, batches, kept, ridge, progress))


def check_ridge(ridge: float) -> None:
    """Refuses a ridge that would be raised in silence.

    Raises:
        ValueError: It is negative or not finite.
    """
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge is {ridge}, expected a finite share of 0 or more.")


def _fit_by_hooks(
    dense: PreTrainedModel,
    small: PreTrainedModel,
    batches: TokenBatches,
    ridge: float,
    progress: Callable[[float, float], None],
) -> Iterator[Fit]:
    bodies = base_model(dense), base_model(small)
    device, layout = next(bodies[0].parameters()).device, layout_of(dense)
    count = len(layers_of(bodies[0]))
    with eval_mode(*bodies), precise_products(device):
        for layer in range(count):
            for kind in (kind for kind in READ_BY if kind in layout.writers):
                name, behind = f"{layout.stack}.{layer}.{layout.reader(kind)}", _behind(layout, layer, kind, count)
                narrow = bodies[1].get_submodule(name)
                columns = getattr(narrow, "columns", None)
                moments = _Moments()
                for batch in batches:
                    inputs = {key: tensor.to(device) for key, tensor in batch.inputs.items()}
                    real = inputs["attention_mask"].bool()
                    if behind and not moments.count:
                        _check_stream(bodies[0], layout, name, behind, inputs)
                    _, wanted, whole = _on_the_way(bodies[0], name, behind, inputs)
                    x, said, summed = _on_the_way(bodies[1], name, behind, inputs)
                    x = x if columns is None else x.index_select(-1, columns)
                    # in this order, so that where nothing differs nothing is fitted
                    left = whole - summed
                    target = left + said if behind else wanted
                    moments.add(x[real], left[real], target[real])
                yield _apply(f"{layer}.{kind}", narrow, moments, ridge)
            progress(layer + 1, count)


def _behind(layout: Layout, layer: int, kind: str, count: int) -> str:
    """The LayerNorm that takes in the stream with what a kind's reader adds; "" where the map does not name it."""
    first, second = layout.norms
    if not first:
        return ""
    here, there = (f"{layout.stack}.{at}" for at in (layer, layer + 1))
    if not layout.pre_norm:
        return f"{here}.{first if kind == 'value' else second}"
    if kind == "value":
        return f"{here}.{second}"
    return f"{there}.{first}" if layer + 1 < count else layout.last_norm or ""


def _on_the_way(
    body: nn.Module, name: str, behind: str, inputs: Mapping[str, torch.Tensor], added: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a Linear takes in and says when a model is run, and what the module behind it takes in: [b, T, width] each.

    Without a module behind it the last is what it says. `added` is added to what it says.
    """
    reader = body.get_submodule(name)
    held: list[torch.Tensor] = []
    if not behind:
        with stopping_before(reader, lambda taken, _args, _kwargs: held.append(taken)):
            run_to_stop(body, **inputs)
        said = reader(held[0])
        return held[0], said, said

    def hear(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        held[:] = [args[0], output if added is None else output + added]
        return held[1]

    handle = reader.register_forward_hook(hear)
    try:
        with stopping_before(body.get_submodule(behind), lambda taken, _args, _kwargs: held.append(taken)):
            run_to_stop(body, **inputs)
    finally:
        handle.remove()
    if len(held) != 3:
        raise ValueError(f"'{behind}' is run before '{name}', expected behind it")
    return held[0], held[1], held[2]


def _check_stream(body: nn.Module, layout: Layout, name: str, behind: str, inputs: Mapping[str, torch.Tensor]) -> None:
    """Refuses a map by whose word what a reader adds would be looked for in the wrong place.

    Raises:
        ValueError: What the named module takes in does not move by what is added to what the reader says.
    """
    problem = ""
    try:
        _, said, before = _on_the_way(body, name, behind, inputs)
        added = torch.linspace(-1, 1, said.shape[-1], dtype=said.dtype, device=said.device)
        _, _, after = _on_the_way(body, name, behind, inputs, added)
        limit = 1e-2 if said.dtype in (torch.float16, torch.bfloat16) else 1e-4
        if float((after - before - added).abs().max()) > limit * max(1.0, float(before.abs().max())):
            problem = f"does not take in what '{name}' adds to the stream"
    except (AttributeError, RuntimeError, ValueError, IndexError) as error:
        problem = f"cannot be used ({' '.join(str(error).split())[:100]})"
    if problem:
        raise ValueError(
            f"site map '{layout.site_map_file}': keys 'norms', 'pre_norm' and 'last_norm' name '{behind}', which "
            f"{problem}, expected that; mend them, or leave them out"
        )


@dataclass
class Passing:
    """One batch on its way through both models.

    Attributes:
        batch: The texts.
        real: bool [b, T], which places are no padding.
        given: Number of each dense layer -> what it is given beside hidden states.
        small_given: Number of a dense layer -> what the pruned one in its place is given; another mask where the dense
            model has a flash or flex kernel.
        dense: [b, T, hidden], hidden states of the dense model.
        small: [b, T, hidden], those of the pruned one.
    """

    batch: Batch
    real: torch.Tensor
    given: Mapping[int, Given]
    small_given: Mapping[int, Given]
    dense: torch.Tensor
    small: torch.Tensor


def _walk(
    dense: PreTrainedModel,
    small: PreTrainedModel,
    batches: TokenBatches,
    kept: Mapping[int, torch.Tensor],
    ridge: float,
    progress: Callable[[float, float], None],
) -> Iterator[Fit]:
    bodies = base_model(dense), base_model(small)
    layers, small_layers = map(layers_of, bodies)
    with eval_mode(*bodies), precise_products(next(bodies[0].parameters()).device):
        passing = start(bodies[0], batches)
        small_of = {layer: small_layers[i] for i, layer in enumerate(sorted(kept))}
        for layer in range(len(layers)):
            block = layers[layer]
            if layer in small_of:
                yield from fit_layer(bodies[0], layer, small_of[layer], passing, kept[layer], ridge)
            else:
                for at in passing:
                    at.dense = through(block, at.dense, at.given[layer])
            progress(layer + 1, len(layers))


def start(body: PreTrainedModel, batches: TokenBatches) -> list[Passing]:
    """Every batch at the door of the first layer: embeddings are the same in both models.

    Raises:
        ValueError: The model has a flash or flex kernel and layers that do not look at all tokens.
    """
    kernel = body.config._attn_implementation
    shared = kernel in ("eager", "sdpa")
    if not shared and (layout_of(body).kinds_by is not None or layout_of(body).causal):
        differs = (
            "its tokens look at those before them alone"
            if layout_of(body).causal
            else ("what its layers may look at differs")
        )
        raise ValueError(
            f"model is a {type(body).__name__} with attn_implementation={kernel!r}, expected 'sdpa' or 'eager' for "
            f"least squares: {differs}; load it with one of these."
        )
    passing = []
    for batch, hidden, given in first_inputs(body, batches):
        real = batch.real.to(hidden.device).bool()
        small_given = given
        if not shared:
            # pruned models have sdpa where the dense one has neither: True is a place to look at
            small_given = {layer: _with_mask(one, real[:, None, None]) for layer, one in given.items()}
        passing.append(Passing(batch, real, given, small_given, hidden, hidden))
    return passing


def _with_mask(given: Given, mask: torch.Tensor) -> Given:
    args, kwargs = given
    named = "attention_mask" in kwargs
    return (args, {**kwargs, "attention_mask": mask}) if named else ((mask, *args[1:]), kwargs)


def through(block: nn.Module, hidden: torch.Tensor, given: Given) -> torch.Tensor:
    """Hidden states [b, T, hidden] behind a layer."""
    output = block(hidden, *given[0], **given[1])
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _context(block: nn.Module, layout: Layout, hidden: torch.Tensor, given: Given) -> torch.Tensor:
    """What the Linear of attention_output would take in: [b, T, value width]."""
    return _taken_in(block.get_submodule(layout.writers["attention_output"]), block, hidden, given)


def _taken_in(reader: nn.Module, block: nn.Module, hidden: torch.Tensor, given: Given = ((), {})) -> torch.Tensor:
    """What a Linear would take in when the module that holds it is run: [b, T, width]."""
    held: list[torch.Tensor] = []
    with stopping_before(reader, lambda taken, _args, _kwargs: held.append(taken)):
        run_to_stop(block, hidden, *given[0], **given[1])
    return held[0]


def fit_layer(
    body: PreTrainedModel, layer: int, narrow: nn.Module, passing: list[Passing], kept: torch.Tensor, ridge: float
) -> Iterator[Fit]:
    """Fits one layer and takes every batch through it, in both models.

    Args:
        body: The dense encoder.
        layer: Number of the layer in it.
        narrow: The pruned layer, whose weights are changed.
        passing: Batches at the door of the layer.
        kept: int64 [kept], query and key neurons that stay.
        ridge: As in `least_squares`.
    """
    layout, block = layout_of(body), layers_of(body)[layer]
    part, small_part = block.get_submodule, narrow.get_submodule
    names = layout.writers
    hidden = int(body.config.hidden_size)
    if 0 < len(kept) < hidden and not layout.rotary and not layout.whole:
        keys = KeyMoments(int(body.config.num_attention_heads))
        first = layout.blocks_of("key")[0] * hidden
        for at in passing:
            given = part(layout.norms[0])(at.small) if layout.pre_norm else at.small
            keys.add(part(names["key"])(given)[..., first : first + hidden], at.real)
        _fit_queries(part(names["query"]), small_part(names["query"]), keys.predictors(kept, ridge))

    def behind(of: Callable[[str], nn.Module], kind: str, summed: torch.Tensor) -> torch.Tensor:
        """The stream behind attention_output or output."""
        if layout.pre_norm:
            return summed
        normed: torch.Tensor = of(layout.norms[_NORMED.index(kind)])(summed)
        return normed

    moments = _Moments()
    contexts = []
    reader = small_part(names["attention_output"])
    for at in passing:
        added = part(names["attention_output"])(_context(block, layout, at.dense, at.given[layer]))
        contexts.append(_context(narrow, layout, at.small, at.small_given[layer]))
        target = added + (at.dense - at.small)  # in this order, so that where nothing differs nothing is fitted
        moments.add(contexts[-1][at.real], (target - reader(contexts[-1]))[at.real], target[at.real])
        at.dense = behind(part, "attention_output", added + at.dense)
    yield _apply(f"{layer}.value", reader, moments, ridge)

    def inner(of: Callable[[str], nn.Module], hidden: torch.Tensor) -> torch.Tensor:
        """What output's Linear takes in."""
        for name in layout.between:
            held = names["output"].startswith(f"{name}.")
            hidden = _taken_in(of(names["output"]), of(name), hidden) if held else of(name)(hidden)
        return hidden

    moments = _Moments()
    reader = small_part(names["output"])
    for at, context in zip(passing, contexts, strict=True):
        added = small_part(names["attention_output"])(context)
        at.small = behind(small_part, "attention_output", added + at.small)
        taken = inner(small_part, at.small)
        added = part(names["output"])(inner(part, at.dense))
        target = added + (at.dense - at.small)
        moments.add(taken[at.real], (target - reader(taken))[at.real], target[at.real])
        at.dense = behind(part, "output", added + at.dense)
    del contexts
    yield _apply(f"{layer}.intermediate", reader, moments, ridge)
    for at in passing:
        at.small = behind(small_part, "output", reader(inner(small_part, at.small)) + at.small)


def _fit_queries(dense: Any, narrow: Any, predictors: torch.Tensor) -> None:
    """Query rows are the first ones, alone or before those of key and value."""
    rows, kept = predictors.shape
    weight = matrix(narrow)[:kept]
    weight.copy_((predictors.T @ matrix(dense)[:rows].double()).to(weight.dtype))
    if dense.bias is not None:
        narrow.bias[:kept].copy_((predictors.T @ dense.bias[:rows].double()).to(narrow.bias.dtype))


def _apply(site: str, reader: Any, moments: _Moments, ridge: float) -> Fit:
    rows = getattr(reader, "kept", None)  # of a Linear that computes some of its rows
    change, bias, before, after, used = moments.solve(ridge, rows)
    if reader.weight is not None:
        matrix(reader).add_((change if rows is None else change[rows]).to(reader.weight.dtype))
    reader.bias.add_(bias.to(reader.bias.dtype))
    return Fit(site, before, after, used)
