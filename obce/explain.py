"""What single neurons, and the clouds of heads and layers, do: scores, outputs, texts, and what their gaps are worth.

The outputs are captured again, in the very batches of the scoring, so that they have its bits: the largest gap shown of
a neuron is the r_f in its table, and so is the last death shown of a head's cloud.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from obce.capture import capture, cloud_widths, eval_mode, precise_products, read_texts
from obce.clouds import CLOUD_KINDS
from obce.corpus import Batch, Corpus, TokenBatches, corpus_of, tokenize
from obce.heads import HeadExplanation, Standing, as_one, check_cloud, explain_clouds, texts_of
from obce.removal import Pruned, Replacement
from obce.scores import place_of_reading
from obce.sites import SITE_KINDS, Site, base_model, find_sites, layers_of, layout_of, model_hash
from obce.splits import BALANCE, Facts, Reason, Recurrence, Split, balanced_gap, largest_gap, recurrence, screen

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from obce.plan import Plan
    from obce.scores import Scores

TAIL = 8
"""Texts shown at each end."""

SEPARATED = 25
"""Removed neurons listed with the texts that they set apart."""

_SEPARATED_PAGES = 12  # of them with a page
_SEPARATED_TEXTS = 5  # shown of each

# Outputs of the neurons with a page at every token are kept while they take at most so many bytes; else the texts that
# are shown pass once more.
_TOKEN_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class ShownText:
    """A text, and what the neuron says at each of its tokens.

    Attributes:
        number: Position in the corpus.
        text: The text; of a pair, both with a line break between.
        value: Output at [CLS].
        tokens: Its tokens as the tokenizer writes them.
        at_tokens: The Linear's output at each.
    """

    number: int
    text: str
    value: float
    tokens: tuple[str, ...]
    at_tokens: tuple[float, ...]


@dataclass(frozen=True)
class Explanation:
    """What is known of one neuron; shows itself in a notebook.

    Attributes:
        name: `"5.intermediate.830"`.
        constant: Whether its output at [CLS] does not vary; then there is no gap.
        standings: Score -> where it stands in its site; scores that do not rank it are left out.
        stability: Score -> Spearman correlation of two halves of the texts in sites of this kind.
        values: float32 [n], outputs at [CLS], by the position of the text.
        gap: The largest gap.
        balanced: The largest gap with at least 1 % of the texts on each side, found on `fitted_on`.
        recurs: `balanced` on texts that took no part.
        reason: The plain fact that tells its smaller side best.
        fitted_on: What `balanced` and `reason` were chosen on.
        judged_on: What they were judged on.
        low: Texts of the least outputs, least first.
        high: Texts of the greatest outputs, greatest first.
        edge: The texts at the largest gap, the nearest three on each side, by ascending output.
        fate: `"kept"` or `"removed"` by the plan, None without one.
        nearest: The kept neuron of the same site whose outputs correlate most with this one's, and the correlation;
            None without a plan, or where none is kept.
        replaced: What a pruned model has in its place; None without one, or where it was kept.
        place: Where texts were read, in words; "at [CLS]" above means there.
    """

    name: str
    constant: bool
    standings: dict[str, Standing]
    stability: dict[str, float]
    values: NDArray[np.float32]
    gap: Split | None
    balanced: Split | None
    recurs: Recurrence | None
    reason: Reason | None
    fitted_on: str
    judged_on: str
    low: tuple[ShownText, ...]
    high: tuple[ShownText, ...]
    edge: tuple[ShownText, ...]
    fate: str | None
    nearest: tuple[str, float] | None
    replaced: Replacement | None = None
    place: str = "[CLS]"

    @property
    def verdict(self) -> str:
        """One sentence on the split."""
        if self.balanced is None or self.recurs is None:
            return f"constant at {self.place}: no split"
        if not self.recurs.recurs:
            return "no split that recurs"
        return f"a split that recurs{_told(self.reason)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the outputs included."""
        plain = asdict(self)
        plain["values"] = self.values.tolist()
        plain["verdict"] = self.verdict
        return plain

    def _repr_html_(self) -> str:
        def cell(text: object) -> str:
            return f"<td>{html.escape(str(text))}</td>"

        rows = "".join(
            f"<tr>{cell(name)}{cell(f'{at.value:.4g}')}{cell(f'{at.rank} of {at.of}')}</tr>"
            for name, at in self.standings.items()
        )
        ends = "".join(
            f"<tr>{cell(f'{one.value:.3f}')}{cell(one.text)}</tr>" for one in (*self.high, *reversed(self.low))
        )
        return (
            f"<h4>{html.escape(self.name)}</h4><p>{html.escape(self.verdict)}</p>"
            f"<table><tr><th>score</th><th>value</th><th>rank in its site</th></tr>{rows}</table>"
            f"<table><tr><th>output</th><th>text</th></tr>{ends}</table>"
        )


def _told(reason: Reason | None) -> str:
    if reason is None:
        return ""
    if not reason.precision:
        return "; no plain fact tells its smaller side"
    return f"; the plainest fact: {reason.words} (precision {reason.precision:.0%}, recall {reason.recall:.0%})"


@dataclass(frozen=True, slots=True)
class Separated:
    """A removed neuron, and texts that it set apart.

    Attributes:
        name: Its name.
        verdict: One sentence on its split; for one that was listed for its largest gap, how many texts that isolates.
        gap: Width of the gap in standard deviations of its outputs.
        small: Texts on the smaller side.
        of: Texts in all.
        texts: The outermost of them, the outermost first: position in the corpus, and the text.
    """

    name: str
    verdict: str
    gap: float
    small: int
    of: int
    texts: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class Removal:
    """What goes with the neurons that a plan removes.

    Attributes:
        counts: `"removed"` and `"kept"` -> neurons, and of them: that vary at [CLS], whose split recurs, and whose
            largest gap isolates at most 1 % of the texts (or one).
        recurring: Removed neurons whose split recurs, the widest gaps first, at most `SEPARATED`.
        isolating: Removed neurons whose largest gap isolates as few texts, the widest first, likewise.
        repair: What replaces removed neurons, None without a pruned model.
        errors: As in `obce.removal.Pruned`.
        fitted_on: Texts that least squares was fitted on.
    """

    counts: dict[str, tuple[int, int, int, int]]
    recurring: tuple[Separated, ...]
    isolating: tuple[Separated, ...]
    repair: str | None
    errors: dict[str, tuple[float, float]]
    fitted_on: int


@dataclass(frozen=True)
class Findings:
    """What one pass over the texts found.

    Attributes:
        neurons: Those that were asked for and, with `removal`, some of the removed ones.
        heads: Clouds that were asked for.
        truncated: Positions of the texts that were cut at the maximum length, ascending.
        removal: What goes with the removed neurons, where it was asked for.
    """

    neurons: tuple[Explanation, ...] = ()
    heads: tuple[HeadExplanation, ...] = ()
    truncated: tuple[int, ...] = ()
    removal: Removal | None = None


def explain(
    scores: Scores,
    neuron: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Corpus | Iterable[str],
    *,
    held_out: Corpus | Iterable[str] | None = None,
    plan: Plan | None = None,
    tail: int = TAIL,
) -> Explanation:
    """Explains one neuron.

    Args:
        scores: Scores of the model on these texts.
        neuron: Its name, `"5.intermediate.830"`.
        model: The dense model that was scored.
        tokenizer: Its tokenizer.
        texts: The texts that were scored.
        held_out: Other texts, that the split is judged on. Without them it is found on the first half of the scored
            texts and judged on the second.
        plan: A plan for the model, to say whether it keeps the neuron.
        tail: Texts shown at each end.

    Raises:
        KeyError: The scores hold no such neuron.
        ValueError: Model or texts are not those that were scored, or an argument is out of range.
    """
    return next(explain_many(scores, [neuron], model, tokenizer, texts, held_out=held_out, plan=plan, tail=tail))


def sample(scores: Scores, per_site: int = 3, layer: int | None = None) -> list[str]:
    """Names of some neurons of every site: those of the highest effect (or bagged r_f), and the one of the highest r_f.

    Args:
        scores: Scores of a model.
        per_site: Neurons of a site, at least 1.
        layer: Of this layer alone.

    Raises:
        ValueError: `per_site` is below 1, or there is no such layer.
    """
    if per_site < 1:
        raise ValueError(f"per_site is {per_site}, expected at least 1 neuron of each site.")
    if layer is not None and layer not in scores.layers():
        raise ValueError(f"layer is {layer}, expected one of 0 to {scores.layers()[-1]}.")
    found: list[str] = []
    first = next((name for name in ("effect", "effect_abs", "rf_bagged", "std") if name in scores.names()), "rf")
    for number, kind in scores.sites():
        if layer not in (None, number):
            continue
        rows = scores.rows(number, kind)
        picked: dict[int, None] = {}
        for name, most in ((first, per_site - 1), ("rf", per_site), (first, per_site)):
            column = np.where(scores.ranked(name)[rows], scores.column(name)[rows], -np.inf)
            for index in np.argsort(-column, kind="stable").tolist():
                if len(picked) >= most or column[index] == -np.inf:
                    break
                picked[index] = None
        found += [f"{number}.{kind}.{index}" for index in picked]
    return found


def search(scores: Scores, corpus: Corpus, words: str, most: int = 200) -> list[str]:
    """Names of neurons whose least or greatest output, or largest gap, is at a text that holds some words.

    Args:
        scores: Scores of a model on the corpus.
        corpus: The texts that were scored.
        words: What a text holds, in any case.
        most: So many names at most, those of the highest r_f first.

    Raises:
        ValueError: No text holds the words.
    """
    folded = words.casefold()
    holds = np.array([folded in as_one(corpus, i).casefold() for i in range(len(corpus))])
    if not holds.any():
        raise ValueError(f"words is {words!r}, which none of the {len(corpus):,} texts holds: search for others.")
    hit = np.zeros(len(scores), bool)
    for numbers in scores.texts.values():
        hit |= (numbers >= 0) & holds[numbers]
    rf = np.where(scores.ranked("rf"), scores.column("rf"), -np.inf)
    order = np.argsort(-rf, kind="stable")
    chosen = order[hit[order]][:most]
    return [f"{scores.layer[i]}.{SITE_KINDS[scores.site[i]]}.{scores.index[i]}" for i in chosen.tolist()]


def explain_head(
    scores: Scores,
    head: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Corpus | Iterable[str],
    *,
    plan: Plan | None = None,
) -> HeadExplanation:
    """Explains the cloud of one head or layer.

    Args:
        scores: Scores of the model on these texts, with clouds.
        head: `"5.query.3"` (layer, kind of `obce.clouds.CLOUD_KINDS`, head) or `"5.hidden"`.
        model: The dense model that was scored.
        tokenizer: Its tokenizer.
        texts: The texts that were scored.
        plan: A plan for the model, to say what it keeps of the head.

    Raises:
        ValueError: There is no such cloud, or model or texts are not those that were scored.
    """
    return examine(scores, model, tokenizer, texts, heads=[head], plan=plan).heads[0]


def explain_many(
    scores: Scores,
    neurons: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Corpus | Iterable[str],
    *,
    held_out: Corpus | Iterable[str] | None = None,
    plan: Plan | None = None,
    tail: int = TAIL,
    progress: Callable[[float, float], None] | None = None,
) -> Iterator[Explanation]:
    """Explains several neurons with one pass over the texts; arguments and errors are those of `explain`.

    `progress` is called with (texts done, texts in all) meanwhile.
    """
    found = examine(
        scores, model, tokenizer, texts, neurons=neurons, held_out=held_out, plan=plan, tail=tail, progress=progress
    )
    return iter(found.neurons)


def examine(
    scores: Scores,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Corpus | Iterable[str],
    *,
    neurons: Sequence[str] = (),
    heads: Sequence[str] = (),
    held_out: Corpus | Iterable[str] | None = None,
    plan: Plan | None = None,
    pruned: Pruned | None = None,
    removal: bool = False,
    tail: int = TAIL,
    progress: Callable[[float, float], None] | None = None,
) -> Findings:
    """Explains neurons and clouds with one pass over the texts.

    Args:
        scores, model, tokenizer, texts, held_out, plan, tail: As in `explain`.
        neurons: Names of neurons.
        heads: Names of clouds, as in `explain_head`.
        pruned: The model that the plan made of this one, to say what stands in for removed neurons.
        removal: Also find which texts the removed neurons set apart; needs a plan.
        progress: Called with (texts done, texts in all).

    Raises:
        KeyError: The scores hold no such neuron.
        ValueError: There is no such cloud, model or texts are not those that were scored, or an argument is out of
            range.
    """
    found = [_Neuron(scores, name) for name in neurons]
    places = [check_cloud(scores, name) for name in heads]
    if tail < 1:
        raise ValueError(f"tail is {tail}, expected at least 1 text at each end.")
    if removal and plan is None:
        raise ValueError("removal is True, but plan is not given: give the plan that removes neurons.")
    pictures = layout_of(model).pictures
    corpus = corpus_of(texts, pictures=pictures)
    others = None if held_out is None else corpus_of(held_out, pictures=pictures)
    if scores.meta["model_hash"] != model_hash(model):
        raise ValueError("model is not the one that was scored: load the weights that the scores are of.")
    if "merged" in scores.meta:
        raise ValueError("scores are of several scorings that were joined: explain one of these, with its own texts.")
    if scores.meta["corpus_hash"] != corpus.hash:
        raise ValueError(f"texts of {corpus.source} are not those that were scored: give the same corpus.")
    if plan is not None and plan.model_hash != scores.meta["model_hash"]:
        raise ValueError("plan is of another model than the scores: plan these scores.")
    every = {site.name: site for site in find_sites(model)}
    wanted = list(every.values()) if removal else [every[name] for name in dict.fromkeys(one.site for one in found)]
    clouds = dict.fromkeys((layer, kind) for layer, kind, _ in places)
    points = texts_of(corpus, scores.clouds, int(scores.meta["seed"])) if scores.clouds and clouds else None
    columns: dict[str, list[int]] = {}
    for one in found:
        columns.setdefault(one.site, []).append(one.index)
    if 4 * len(found) * int(scores.meta["n_tokens"]) > _TOKEN_BYTES:
        columns = {}
    total = len(corpus) + (0 if others is None else len(others))

    def note(before: int) -> Callable[[float, float], None] | None:
        return None if progress is None else lambda done, _of: progress(before + done, total)

    own = _passed(model, tokenizer, corpus, wanted, scores, columns, list(clouds), points, note(0))
    other = None if others is None else _passed(model, tokenizer, others, wanted, scores, progress=note(len(corpus)))
    judging = _Judging(scores, corpus, tokenizer, own, others, other, tail)
    went = None
    if removal and plan is not None:
        went = judging.removal(scores, plan, every, pruned)
        listed = [one.name for one in went.recurring[:_SEPARATED_PAGES]]
        found += [_Neuron(scores, name) for name in listed if name not in set(neurons)]
    splits = [judging.splits(one) for one in found]
    shown = _shown(model, tokenizer, corpus, every, found, splits, scores, own)
    explanations = _explained(scores, found, every, own, splits, shown, plan, pruned)
    return Findings(
        tuple(explanations),
        tuple(explain_clouds(scores, heads, own.vectors, corpus, plan)),
        tuple(np.flatnonzero(own.cut).tolist()),
        went,
    )


class _Neuron:
    """A neuron's place."""

    def __init__(self, scores: Scores, name: str) -> None:
        scores[name]  # refuses what is no neuron, with the reason
        layer, self.kind, index = name.split(".")
        self.name, self.layer, self.index = name, int(layer), int(index)
        self.site = f"{layer}.{self.kind}"
        self.rows = scores.rows(self.layer, self.kind)
        self.row = self.rows.start + self.index


# ---- passing the texts -----------------------------------------------------------------------------------------------


_Through = Callable[[TokenBatches, "NDArray[np.int64]"], None]
"""Takes batches of some texts of the corpus, and which texts these are."""


@dataclass
class _Passed:
    """What the texts gave, in the batches of the scoring.

    Attributes:
        outputs: Site -> float32 [n, width], outputs at [CLS] (or where else they were scored) by the text's position.
        vectors: (layer, kind of `CLOUD_KINDS`) -> float32 [points, width] of the clouds' texts.
        ids: Token ids of every text, special tokens included.
        cut: bool [n], whether a text lost its end.
        tokens: Site -> float32 [tokens, columns], outputs of some of its neurons at every token.
        starts: int64 [n], where the tokens of a text begin in `tokens`.
    """

    outputs: dict[str, NDArray[np.float32]]
    vectors: dict[tuple[int, str], NDArray[np.float32]]
    ids: list[NDArray[np.int64]]
    cut: NDArray[np.bool_]
    tokens: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    starts: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


class _Taking:
    """Hooks that hold what some modules say in one forward pass.

    The first call of a module counts: in some families query and key are called again, for embeddings of distances.
    """

    def __init__(self, body: PreTrainedModel, position: str) -> None:
        self.body = body
        self.position = position
        self.lengths = torch.empty(0)
        self.layers = layers_of(body)
        self.taken: dict[Any, torch.Tensor] = {}
        self._handles: list[Any] = []

    def _keep(self, key: Any, tensor: torch.Tensor, index: torch.Tensor | None) -> None:
        if key not in self.taken:
            if index is None:
                picked = read_texts(tensor, self.lengths, self.position)
            else:
                picked = tensor.index_select(-1, index)
            self.taken[key] = picked.to(torch.float32)

    def _layer(self, layer: int, key: Any) -> None:
        """Takes what a layer gives, where texts are read."""

        def hook(_module: Any, _args: Any, output: Any) -> None:
            self._keep(key, output[0] if isinstance(output, tuple) else output, None)

        self._handles.append(self.layers[layer].register_forward_hook(hook))

    def outputs(self, site: Site, key: Any, index: torch.Tensor | None = None) -> None:
        """Takes what the neurons of a site give: all where texts are read, or some at every token."""
        if site.gated:
            self._taken_in(site, key, index)
            return

        def hook(_module: Any, _args: Any, output: Any) -> None:
            self._keep(key, output[..., site.columns], index)

        self._handles.append(self.body.get_submodule(site.writer).register_forward_hook(hook))

    def _taken_in(self, site: Site, key: Any, index: torch.Tensor | None = None) -> None:
        """Takes what the reader of a site is given."""

        def hook(_module: Any, args: Any) -> None:
            self._keep(key, args[0], index)

        reader = self.body.get_submodule(cast(str, site.reader))
        self._handles.append(reader.register_forward_pre_hook(hook))

    def neurons(self, site: Site, indices: Sequence[int]) -> None:
        """Takes some neurons of a site at every token, under `("tokens", site)`."""
        index = torch.tensor(indices, device=next(self.body.parameters()).device)
        self.outputs(site, ("tokens", site.name), index)

    def cloud(self, sites: Mapping[str, Site], layer: int, kind: str) -> None:
        """Takes the vectors of a cloud, under `("cloud", (layer, kind))`."""
        key = ("cloud", (layer, kind))
        if kind == "hidden":
            self._layer(layer, key)
        elif kind == "context":
            self._taken_in(sites[f"{layer}.value"], key)
        else:
            self.outputs(sites[f"{layer}.{kind}"], key)

    def run(self, batch: Batch) -> dict[Any, NDArray[np.float32]]:
        """One forward pass."""
        self.taken.clear()
        device = next(self.body.parameters()).device
        self.lengths = torch.from_numpy(batch.lengths).to(device)
        self.body(**{name: tensor.to(device) for name, tensor in batch.inputs.items()})
        return {key: tensor.cpu().numpy() for key, tensor in self.taken.items()}

    @contextmanager
    def watching(self, precision: Any) -> Iterator[None]:
        """Eval mode without gradients; the hooks are gone behind it."""
        device = next(self.body.parameters()).device
        try:
            with eval_mode(self.body), torch.no_grad(), precise_products(device, precision):
                yield
        finally:
            for handle in self._handles:
                handle.remove()


def _passed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    sites: Sequence[Site],
    scores: Scores,
    columns: Mapping[str, Sequence[int]] | None = None,
    clouds: Sequence[tuple[int, str]] = (),
    points: NDArray[np.int64] | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> _Passed:
    """Passes a corpus through the model as the scoring did.

    Args:
        columns: Site -> its neurons that are kept at every token, too, where the scoring computed them there.
        clouds: Clouds whose vectors are kept.
        points: int64, texts that are their points.
    """
    meta = scores.meta
    points = np.empty(0, np.int64) if points is None else points
    widths = cloud_widths(model)
    found = _Passed(
        {site.name: np.empty((len(corpus), site.width), np.float32) for site in sites},
        {at: np.empty((len(points), widths[at[1]]), np.float32) for at in clouds},
        [np.empty(0, np.int64)] * len(corpus),
        np.zeros(len(corpus), bool),
    )
    place = np.full(len(corpus), -1)
    place[points] = np.arange(len(points))
    walk = _walk if meta["tokens"] else _walk_at_cls
    done = 0
    how = meta["precision"], str(meta["position"])
    with walk(model, sites, columns or {}, clouds, how, place, found) as through:
        for shard in corpus.shards(int(meta["seed"]), int(meta["shard_texts"])):
            batches = tokenize(
                corpus.entries(shard.texts),
                tokenizer,
                max_length=int(meta["max_length"]),
                batch_tokens=int(meta["batch_tokens"]),
            )
            through(batches, shard.texts)
            _take_ids(batches, corpus, tokenizer, shard.texts, found)
            done += len(shard.texts)
            if progress is not None:
                progress(done, len(corpus))
    return found


@contextmanager
def _walk(
    model: PreTrainedModel,
    sites: Sequence[Site],
    columns: Mapping[str, Sequence[int]],
    clouds: Sequence[tuple[int, str]],
    how: tuple[Any, str],
    place: NDArray[np.int64],
    found: _Passed,
) -> Iterator[_Through]:
    """Passes batches through the whole model; sums over tokens, which a scoring makes, are not made again."""
    every = {site.name: site for site in find_sites(model)}
    precision, position = how
    taking = _Taking(base_model(model), position)
    for site in sites:
        taking.outputs(site, ("cls", site.name))
    for name, indices in columns.items():
        taking.neurons(every[name], indices)
    for layer, kind in clouds:
        taking.cloud(every, layer, kind)
    pieces: dict[str, list[NDArray[np.float32]]] = {name: [] for name in columns}
    found.starts = np.full(len(place), -1)
    end = 0

    def through(batches: TokenBatches, texts: NDArray[np.int64]) -> None:
        nonlocal end
        for batch in batches:
            here = texts[batch.indices]
            inside = np.flatnonzero(place[here] >= 0)
            real = batch.real.numpy().astype(bool)
            for (what, of), output in taking.run(batch).items():
                if what == "cls":
                    found.outputs[of][here] = output
                elif what == "cloud":
                    found.vectors[of][place[here[inside]]] = output[inside]
                else:
                    pieces[of].append(output[real])
            lengths = real.sum(axis=1)
            found.starts[here] = end + np.cumsum(lengths) - lengths
            end += int(lengths.sum())

    with taking.watching(precision):
        yield through
    found.tokens = {name: np.concatenate(some) for name, some in pieces.items()}


@contextmanager
def _walk_at_cls(
    model: PreTrainedModel,
    sites: Sequence[Site],
    _columns: Mapping[str, Sequence[int]],
    clouds: Sequence[tuple[int, str]],
    how: tuple[Any, str],
    place: NDArray[np.int64],
    found: _Passed,
) -> Iterator[_Through]:
    """As a scoring without sums over tokens did, which computed the last layer at [CLS] alone, in other bits."""
    precision, position = how
    every = find_sites(model)
    of_clouds = [site for site in every if site.layer in {layer for layer, _ in clouds}]
    watched = list({site.name: site for site in [*sites, *of_clouds, every[-1]]}.values())
    wanted = {site.name for site in sites}

    def through(batches: TokenBatches, texts: NDArray[np.int64]) -> None:
        inside = place[texts] >= 0
        settings: dict[str, Any] = {"tokens": False, "precision": precision, "position": position}
        for layer in capture(model, batches, watched, chosen=inside, **settings):
            for kind, outputs in layer.outputs.items():
                if (name := f"{layer.layer}.{kind}") in wanted:
                    found.outputs[name][texts] = outputs.T
            for kind in CLOUD_KINDS:
                if (layer.layer, kind) in found.vectors and kind in layer.clouds:
                    found.vectors[layer.layer, kind][place[texts[inside]]] = layer.clouds[kind]

    yield through


def _words(corpus: Corpus, tokenizer: Any, ids: NDArray[np.int64]) -> tuple[str, ...]:
    """How tokens are written; those of a picture by their places, row by row."""
    if corpus.pictures is None:
        return tuple(tokenizer.convert_ids_to_tokens(ids.tolist()))
    return tuple(f"[patch {i}]" if i else "[CLS]" for i in ids.tolist())


def _take_ids(batches: TokenBatches, corpus: Corpus, tokenizer: Any, texts: NDArray[np.int64], found: _Passed) -> None:
    """Tokens of every text, and which texts were cut; of pictures the places of their tokens."""
    if corpus.pictures is not None:
        for text in texts.tolist():
            found.ids[text] = np.arange(batches.max_length)
        return
    full: list[int] = []
    for batch in batches:
        lengths = batch.lengths.tolist()
        for row, text in enumerate(texts[batch.indices].tolist()):
            found.ids[text] = batch.inputs["input_ids"][row, : lengths[row]].numpy().copy()
            if lengths[row] == batches.max_length:
                full.append(text)
    if batches.truncated < len(full):  # some had exactly that length
        full = [
            text
            for text in full
            if batches.truncated
            and tokenize(corpus.entries([text]), tokenizer, max_length=batches.max_length).truncated
        ]
    found.cut[full] = True


# ---- gaps ------------------------------------------------------------------------------------------------------------


class _Judging:
    """Outputs of some texts, which gaps are found on, and of others, which they are judged on.

    Without other texts these are the two halves of the scored ones.
    """

    def __init__(
        self,
        scores: Scores,
        corpus: Corpus,
        tokenizer: Any,
        own: _Passed,
        others: Corpus | None,
        other: _Passed | None,
        tail: int,
    ) -> None:
        self.scores, self.corpus, self.own, self.other, self.tail = scores, corpus, own, other, tail
        n, more = len(corpus), 0 if others is None else len(others)
        self.fit = np.arange(n + more) < n
        if others is None:
            self.fit[corpus.halves(int(scores.meta["seed"]))[1]] = False
        passed = [(corpus, own)] if others is None or other is None else [(corpus, own), (others, other)]
        self.facts = Facts(
            [as_one(texts, i) for texts, _ in passed for i in range(len(texts))],
            [ids for _, one in passed for ids in one.ids],
            np.concatenate([one.cut for _, one in passed]),
            lambda token: _words(corpus, tokenizer, np.array([token]))[0],
        )
        self.fitted_on = f"the {np.count_nonzero(self.fit):,} {'scored texts' if more else 'texts of the first half'}"
        self.judged_on = f"{np.count_nonzero(~self.fit):,} {'other texts' if more else 'texts of the second half'}"

    def outputs(self, site: str) -> NDArray[np.float32]:
        """[n, width], those of the other texts last."""
        own = self.own.outputs[site]
        return own if self.other is None else np.concatenate([own, self.other.outputs[site]])

    def splits(self, one: _Neuron) -> _Splits:
        """The gaps of one neuron."""
        own = self.own.outputs[one.site][:, one.index]
        every = own if self.other is None else np.concatenate([own, self.other.outputs[one.site][:, one.index]])
        return _Splits(self, one, own, every)

    def removal(self, scores: Scores, plan: Plan, sites: Mapping[str, Site], pruned: Pruned | None) -> Removal:
        """Which texts the removed neurons set apart."""
        counts = {"removed": np.zeros(4, np.int64), "kept": np.zeros(4, np.int64)}
        recurring: list[tuple[float, str]] = []
        isolating: list[tuple[float, str]] = []
        n = len(self.corpus)
        for layer, kind in scores.sites():
            name, rows = f"{layer}.{kind}", scores.rows(layer, kind)
            outputs = self.outputs(name)
            varies = ~scores.constant[rows]
            std = np.where(varies, outputs[:n].std(axis=0, dtype=np.float64), 1.0)
            found = screen(outputs[self.fit], outputs[~self.fit])
            recurs = varies & (False if found is None else found.recurs)
            small = self._isolated(rows, outputs[:n])
            alone = (small > 0) & (small <= max(1.0, BALANCE * n))
            kept = np.zeros(len(varies), bool)
            kept[list(plan.indices(name, sites[name].width))] = True
            for what, here in (("kept", kept), ("removed", ~kept)):
                counts[what] += [np.count_nonzero(here & such) for such in (here, varies, recurs, alone)]
            if found is not None:
                width = (found.above - found.below) / std
                recurring += [(float(width[i]), f"{name}.{i}") for i in np.flatnonzero(recurs & ~kept).tolist()]
            if "rf" in scores.names():
                width = scores.column("rf")[rows] / std
                isolating += [(float(width[i]), f"{name}.{i}") for i in np.flatnonzero(alone & ~kept).tolist()]
        recurring.sort(key=lambda one: -one[0])
        isolating.sort(key=lambda one: -one[0])
        return Removal(
            {what: cast("tuple[int, int, int, int]", tuple(some.tolist())) for what, some in counts.items()},
            tuple(self._divided(_Neuron(scores, name), width) for width, name in recurring[:SEPARATED]),
            tuple(self._alone(_Neuron(scores, name), width) for width, name in isolating[:SEPARATED]),
            None if pruned is None else pruned.repair,
            {} if pruned is None else pruned.errors,
            0 if pruned is None else pruned.texts,
        )

    def _isolated(self, rows: slice, own: NDArray[np.float32]) -> NDArray[np.int64]:
        """int64 [width], scored texts on the smaller side of the largest gap; 0 where it is not known."""
        known = self.scores.texts.get("gap_above")
        if known is None:
            return np.zeros(own.shape[1], np.int64)
        over = known[rows]
        above = (own >= own[np.maximum(over, 0), np.arange(own.shape[1])]).sum(axis=0)
        return np.where(over < 0, 0, np.minimum(above, len(own) - above))

    def _divided(self, one: _Neuron, width: float) -> Separated:
        found = self.splits(one)
        gap = cast(Split, found.balanced)
        side = gap.small_side(found.values)
        return Separated(
            one.name,
            f"a split that recurs{_told(found.reason)}",
            width,
            int(side.sum()),
            len(found.values),
            self._outermost(found.values, side, gap.high),
        )

    def _alone(self, one: _Neuron, width: float) -> Separated:
        values = self.own.outputs[one.site][:, one.index]
        gap = largest_gap(values)
        side = gap.small_side(values)
        small = int(side.sum())
        return Separated(
            one.name,
            f"its largest gap isolates {small:,} {'text' if small == 1 else 'texts'}",
            width,
            small,
            len(values),
            self._outermost(values, side, gap.high),
        )

    def _outermost(
        self, values: NDArray[np.float32], side: NDArray[np.bool_], high: bool
    ) -> tuple[tuple[int, str], ...]:
        texts = np.flatnonzero(side)
        order = np.argsort(-values[texts] if high else values[texts], kind="stable")[:_SEPARATED_TEXTS]
        return tuple((int(text), as_one(self.corpus, int(text))) for text in texts[order].tolist())


class _Splits:
    """The gaps of one neuron's outputs, and the texts that show them."""

    def __init__(self, by: _Judging, one: _Neuron, values: NDArray[np.float32], every: NDArray[np.float32]) -> None:
        order = np.argsort(values, kind="stable")
        self.values = values
        self.constant = bool(by.scores.constant[one.row])
        self.gap = self.balanced = None
        self.recurs: Recurrence | None = None
        self.reason: Reason | None = None
        self.low, self.high = order[: by.tail], order[::-1][: by.tail]
        self.edge = order[:0]
        if not self.constant:
            self.gap = largest_gap(values)
            self.edge = order[max(0, self.gap.n_below - 3) : self.gap.n_below + 3]
            self.balanced = balanced_gap(every[by.fit], BALANCE)
        if self.balanced is not None:
            self.recurs = recurrence(self.balanced, every[~by.fit])
            # the name of a file is no fact about the picture in it
            if by.corpus.pictures is None:
                self.reason = by.facts.best_reason(self.balanced.small_side(every), by.fit)
        self.fitted_on, self.judged_on = by.fitted_on, by.judged_on

    @property
    def shown(self) -> set[int]:
        """Texts that are shown."""
        return {int(i) for some in (self.low, self.high, self.edge) for i in some}


def _explained(
    scores: Scores,
    neurons: Sequence[_Neuron],
    sites: Mapping[str, Site],
    own: _Passed,
    splits: Sequence[_Splits],
    shown: Sequence[dict[int, ShownText]],
    plan: Plan | None,
    pruned: Pruned | None,
) -> Iterator[Explanation]:
    stability = {name: scores.stability(name).by_kind for name in scores.names()} if neurons else {}
    correlations = _correlations(own, neurons) if plan is not None else {}
    means = scores.columns.get("token_mean")
    for one, split, texts in zip(neurons, splits, shown, strict=True):
        site = sites[one.site]
        kept = None if plan is None else set(plan.indices(site.name, site.width))
        replaced = None
        if kept is not None and one.index not in kept and pruned is not None:
            mean = float("nan") if means is None else float(means[one.row])
            replaced = pruned.replacement(site, one.index, correlations[one.name], mean)
        low, high, edge = (tuple(texts[int(i)] for i in some) for some in (split.low, split.high, split.edge))
        yield Explanation(
            name=one.name,
            constant=split.constant,
            standings=_standings(scores, one),
            stability={name: by_kind[one.kind][0] for name, by_kind in stability.items() if one.kind in by_kind},
            values=split.values.copy(),
            gap=split.gap,
            balanced=split.balanced,
            recurs=split.recurs,
            reason=split.reason,
            fitted_on=split.fitted_on,
            judged_on=split.judged_on,
            low=low,
            high=high,
            edge=edge,
            fate=None if kept is None else ("kept" if one.index in kept else "removed"),
            nearest=None if kept is None or split.constant else _nearest(correlations[one.name], one, kept),
            replaced=replaced,
            place=place_of_reading(scores),
        )


def _standings(scores: Scores, one: _Neuron) -> dict[str, Standing]:
    found = {}
    for name in scores.names():
        ranked = scores.ranked(name)[one.rows]
        if not ranked[one.index]:
            continue
        column = scores.column(name)[one.rows]
        value = float(column[one.index])
        lower = int(np.count_nonzero(column[ranked] < value))
        higher = int(np.count_nonzero(column[ranked] > value))
        of = int(np.count_nonzero(ranked))
        found[name] = Standing(value, higher + 1, of, 100 * lower / of)
    return found


def _correlations(own: _Passed, neurons: Sequence[_Neuron]) -> dict[str, NDArray[np.float64]]:
    """Neuron -> float64 [width], correlation of its outputs with those of every neuron of its site; 0 for constants."""
    found: dict[str, NDArray[np.float64]] = {}
    for site in dict.fromkeys(one.site for one in neurons):
        here = [one for one in neurons if one.site == site]
        outputs = own.outputs[site].astype(np.float64)
        outputs -= outputs.mean(axis=0)
        norms = np.linalg.norm(outputs, axis=0)
        indices = [one.index for one in here]
        scale = norms[indices][:, None] * norms
        products = outputs[:, indices].T @ outputs
        both = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
        found |= {one.name: row for one, row in zip(here, both, strict=True)}
    return found


def _nearest(correlations: NDArray[np.float64], one: _Neuron, kept: set[int]) -> tuple[str, float] | None:
    """The kept neuron of the site, but itself, whose outputs correlate most, either way."""
    others = np.array(sorted(kept - {one.index}), dtype=np.int64)
    if not others.size:
        return None
    at = int(others[np.abs(correlations[others]).argmax()])
    return f"{one.site}.{at}", float(correlations[at])


def _shown(
    model: PreTrainedModel,
    tokenizer: Any,
    corpus: Corpus,
    sites: Mapping[str, Site],
    neurons: Sequence[_Neuron],
    splits: Sequence[_Splits],
    scores: Scores,
    own: _Passed,
) -> list[dict[int, ShownText]]:
    """For each neuron its shown texts with its output at every token; what was not kept passes once more."""
    taken: dict[str, int] = {}  # columns kept of a site; the first neurons of each come first
    places = []
    for one in neurons:
        column = taken[one.site] = taken.get(one.site, -1) + 1
        kept = own.tokens.get(one.site)
        places.append(column if kept is not None and column < kept.shape[1] else None)
    again = [i for i, place in enumerate(places) if place is None]
    passed = _again(model, tokenizer, corpus, sites, [(neurons[i], splits[i].shown) for i in again], scores)
    at_tokens: dict[int, dict[int, NDArray[np.float32]]] = dict(zip(again, passed, strict=True))
    words: dict[int, tuple[str, ...]] = {}
    answer = []
    for i, (one, split) in enumerate(zip(neurons, splits, strict=True)):
        found = {}
        for text in sorted(split.shown):
            ids = own.ids[text]
            if text not in words:
                words[text] = _words(corpus, tokenizer, ids)
            place = places[i]
            if place is None:
                at = at_tokens[i][text]
            else:
                start = int(own.starts[text])
                at = own.tokens[one.site][start : start + len(ids), place]
            found[text] = ShownText(
                text, as_one(corpus, text), float(split.values[text]), words[text], tuple(at.tolist())
            )
        answer.append(found)
    return answer


def _again(
    model: PreTrainedModel,
    tokenizer: Any,
    corpus: Corpus,
    sites: Mapping[str, Site],
    wanted: Sequence[tuple[_Neuron, set[int]]],
    scores: Scores,
) -> list[dict[int, NDArray[np.float32]]]:
    """For each neuron its output at every token of some texts, from one pass over all of them."""
    if not wanted:
        return []
    chosen = np.array(sorted(set().union(*(shown for _, shown in wanted))), dtype=np.int64)
    columns: dict[str, list[int]] = {}
    place = []
    for one, _ in wanted:
        columns.setdefault(one.site, []).append(one.index)
        place.append(len(columns[one.site]) - 1)
    taking = _Taking(base_model(model), str(scores.meta["position"]))
    for name, indices in columns.items():
        taking.neurons(sites[name], indices)
    answer: list[dict[int, NDArray[np.float32]]] = [{} for _ in wanted]
    batches = tokenize(corpus.entries(chosen), tokenizer, max_length=int(scores.meta["max_length"]))
    with taking.watching("float32"):
        for batch in batches:
            found = taking.run(batch)
            lengths = batch.lengths.tolist()
            for row, text in enumerate(chosen[batch.indices].tolist()):
                for i, (one, shown) in enumerate(wanted):
                    if text in shown:
                        answer[i][text] = found["tokens", one.site][row, : lengths[row], place[i]]
    return answer
