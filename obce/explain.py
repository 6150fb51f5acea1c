"""What one neuron does: its scores, its outputs over the texts, the texts at both ends, and what its gap is worth.

The outputs are captured again, in the very batches of the scoring, so that they have its bits: the largest gap shown is
the r_f in the table.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from obce.capture import capture, eval_mode
from obce.corpus import Corpus, read_corpus, tokenize
from obce.sites import SITE_KINDS, Site, base_model, find_sites, model_hash
from obce.splits import BALANCE, Facts, Reason, Recurrence, Split, balanced_gap, largest_gap, recurrence

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from obce.plan import Plan
    from obce.scores import Scores

TAIL = 8
"""Texts shown at each end."""


@dataclass(frozen=True, slots=True)
class Standing:
    """One score of a neuron among its site's.

    Attributes:
        value: The score.
        rank: 1 for the highest of the site.
        of: Neurons of the site that the score ranks.
        percentile: Share of them that are lower, in percent.
    """

    value: float
    rank: int
    of: int
    percentile: float


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

    @property
    def verdict(self) -> str:
        """One sentence on the split."""
        if self.balanced is None or self.recurs is None:
            return "constant at [CLS]: no split"
        if not self.recurs.recurs:
            return "no split that recurs"
        told = ""
        if self.reason is not None:
            told = (
                f"; the plainest fact: {self.reason.words} (precision {self.reason.precision:.0%}, recall "
                f"{self.reason.recall:.0%})"
            )
        return f"a split that recurs{told}"

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
    holds = np.array([folded in _as_one(corpus, i).casefold() for i in range(len(corpus))])
    if not holds.any():
        raise ValueError(f"words is {words!r}, which none of the {len(corpus):,} texts holds: search for others.")
    hit = np.zeros(len(scores), bool)
    for numbers in scores.texts.values():
        hit |= (numbers >= 0) & holds[numbers]
    rf = np.where(scores.ranked("rf"), scores.column("rf"), -np.inf)
    order = np.argsort(-rf, kind="stable")
    chosen = order[hit[order]][:most]
    return [f"{scores.layer[i]}.{SITE_KINDS[scores.site[i]]}.{scores.index[i]}" for i in chosen.tolist()]


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
    found = [_Neuron(scores, name) for name in neurons]
    if tail < 1:
        raise ValueError(f"tail is {tail}, expected at least 1 text at each end.")
    corpus = texts if isinstance(texts, Corpus) else read_corpus(texts)
    others = held_out if held_out is None or isinstance(held_out, Corpus) else read_corpus(held_out)
    if scores.meta["model_hash"] != model_hash(model):
        raise ValueError("model is not the one that was scored: load the weights that the scores are of.")
    if scores.meta["corpus_hash"] != corpus.hash:
        raise ValueError(f"texts of {corpus.source} are not those that were scored: give the same corpus.")
    if plan is not None and plan.model_hash != scores.meta["model_hash"]:
        raise ValueError("plan is of another model than the scores: plan these scores.")
    sites = {site.name: site for site in find_sites(model)}
    wanted = [sites[name] for name in dict.fromkeys(one.site for one in found)]
    total = len(corpus) + (0 if others is None else len(others))

    def note(before: int) -> Callable[[float, float], None] | None:
        return None if progress is None else lambda done, _of: progress(before + done, total)

    own = _outputs(model, tokenizer, corpus, wanted, scores, note(0))
    other = {} if others is None else _outputs(model, tokenizer, others, wanted, scores, note(len(corpus)))
    first = np.zeros(len(corpus), bool)
    first[corpus.halves(int(scores.meta["seed"]))[0]] = True
    facts = _facts([corpus] if others is None else [corpus, others], tokenizer, int(scores.meta["max_length"]))
    splits = []
    for one in found:
        values = own[one.site][:, one.index]
        if others is None:
            splits.append(_Splits(scores, one, values, values, first, facts, tail))
        else:
            every = np.concatenate([values, other[one.site][:, one.index]])
            splits.append(_Splits(scores, one, values, every, np.arange(len(every)) < len(values), facts, tail))
    texts_of = _shown(model, tokenizer, corpus, [sites[one.site] for one in found], found, splits, scores)
    stability = {name: scores.stability(name).by_kind for name in scores.names()}
    for one, split, shown in zip(found, splits, texts_of, strict=True):
        agreed = {name: by_kind[one.kind][0] for name, by_kind in stability.items() if one.kind in by_kind}
        yield _explained(scores, one, sites[one.site], own[one.site], split, shown, plan, agreed)


class _Neuron:
    """A neuron's place."""

    def __init__(self, scores: Scores, name: str) -> None:
        scores[name]  # refuses what is no neuron, with the reason
        layer, self.kind, index = name.split(".")
        self.name, self.layer, self.index = name, int(layer), int(index)
        self.site = f"{layer}.{self.kind}"
        self.rows = scores.rows(self.layer, self.kind)
        self.row = self.rows.start + self.index


def _outputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    sites: Sequence[Site],
    scores: Scores,
    progress: Callable[[float, float], None] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Site -> float32 [n, width], outputs at [CLS] by the position of the text, in the batches of the scoring."""
    meta = scores.meta
    found = {site.name: np.empty((len(corpus), site.width), np.float32) for site in sites}
    every = find_sites(model)
    tokens = bool(meta["tokens"])
    # without sums over tokens the scoring computed the model's last layer at [CLS] alone, in other bits
    watched = list(sites) if tokens or every[-1] in sites else [*sites, every[-1]]
    passed = 0
    for shard in corpus.shards(int(meta["seed"]), int(meta["shard_texts"])):
        batches = tokenize(
            corpus.entries(shard.texts),
            tokenizer,
            max_length=int(meta["max_length"]),
            batch_tokens=int(meta["batch_tokens"]),
        )
        for layer in capture(model, batches, watched, tokens=tokens, precision=meta["precision"]):
            for kind, outputs in layer.outputs.items():
                if (name := f"{layer.layer}.{kind}") in found:
                    found[name][shard.texts] = outputs.T
        passed += len(shard.texts)
        if progress is not None:
            progress(passed, len(corpus))
    return found


def _facts(corpora: Sequence[Corpus], tokenizer: Any, max_length: int) -> Facts:
    texts: list[str] = []
    tokens: list[NDArray[np.int64]] = []
    truncated: list[bool] = []
    for corpus in corpora:
        texts += [_as_one(corpus, i) for i in range(len(corpus))]
        places: list[Any] = [None] * len(corpus)
        batches = tokenize(corpus, tokenizer, max_length=max_length)
        for batch in batches:
            lengths = batch.inputs["attention_mask"].sum(1).tolist()
            for row, text in enumerate(batch.indices.tolist()):
                places[text] = batch.inputs["input_ids"][row, : lengths[row]].numpy()
        tokens += places
        # a text that fills the length exactly is rare enough to count as cut
        truncated += [len(ids) == max_length for ids in places]
    return Facts(
        texts, tokens, np.array(truncated), lambda token: cast(str, tokenizer.convert_ids_to_tokens(int(token)))
    )


def _as_one(corpus: Corpus, number: int) -> str:
    return corpus.texts[number] if corpus.pairs is None else f"{corpus.texts[number]}\n{corpus.pairs[number]}"


class _Splits:
    """The gaps of one neuron's outputs, and the texts that show them."""

    def __init__(
        self,
        scores: Scores,
        one: _Neuron,
        values: NDArray[np.float32],
        every: NDArray[np.float32],
        fit: NDArray[np.bool_],
        facts: Facts,
        tail: int,
    ) -> None:
        order = np.argsort(values, kind="stable")
        self.values = values
        self.constant = bool(scores.constant[one.row])
        self.gap = self.balanced = None
        self.recurs: Recurrence | None = None
        self.reason: Reason | None = None
        self.low, self.high = order[:tail], order[::-1][:tail]
        self.edge = order[:0]
        if not self.constant:
            self.gap = largest_gap(values)
            self.edge = order[max(0, self.gap.n_below - 3) : self.gap.n_below + 3]
            self.balanced = balanced_gap(every[fit], BALANCE)
        if self.balanced is not None:
            self.recurs = recurrence(self.balanced, every[~fit])
            self.reason = facts.best_reason(self.balanced.small_side(every), fit)
        outside = len(every) > len(values)
        self.fitted_on = f"the {np.count_nonzero(fit):,} {'scored texts' if outside else 'texts of the first half'}"
        self.judged_on = f"{np.count_nonzero(~fit):,} {'other texts' if outside else 'texts of the second half'}"

    @property
    def shown(self) -> set[int]:
        """Texts that are shown."""
        return {int(i) for some in (self.low, self.high, self.edge) for i in some}


def _explained(
    scores: Scores,
    one: _Neuron,
    site: Site,
    outputs: NDArray[np.float32],
    split: _Splits,
    texts: dict[int, ShownText],
    plan: Plan | None,
    stability: dict[str, float],
) -> Explanation:
    kept = _kept(plan, one, site)
    low, high, edge = (tuple(texts[int(i)] for i in some) for some in (split.low, split.high, split.edge))
    return Explanation(
        name=one.name,
        constant=split.constant,
        standings=_standings(scores, one),
        stability=stability,
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
        nearest=None if kept is None or split.constant else _nearest(outputs, one, kept),
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


def _kept(plan: Plan | None, one: _Neuron, site: Site) -> set[int] | None:
    if plan is None:
        return None
    if one.layer in plan.layers_dropped:
        return set()
    return set(plan.kept.get(one.site, range(site.width)))


def _nearest(outputs: NDArray[np.float32], one: _Neuron, kept: set[int]) -> tuple[str, float] | None:
    """The kept neuron of the site, but itself, whose outputs correlate most, either way."""
    others = np.array(sorted(kept - {one.index}), dtype=np.int64)
    if not others.size:
        return None
    centred = outputs.astype(np.float64) - outputs.mean(axis=0, dtype=np.float64)
    norms = np.linalg.norm(centred, axis=0)
    products = centred[:, others].T @ centred[:, one.index]
    scale = norms[others] * norms[one.index]
    found = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    at = int(np.abs(found).argmax())
    return f"{one.site}.{others[at]}", float(found[at])


@torch.no_grad()
def _shown(
    model: PreTrainedModel,
    tokenizer: Any,
    corpus: Corpus,
    sites: Sequence[Site],
    neurons: Sequence[_Neuron],
    splits: Sequence[_Splits],
    scores: Scores,
) -> list[dict[int, ShownText]]:
    """For each neuron its shown texts with its output at every token, from one pass over all of them."""
    body = base_model(model)
    device = next(body.parameters()).device
    chosen = np.array(sorted(set().union(*(split.shown for split in splits))), dtype=np.int64)
    places = {int(text): place for place, text in enumerate(chosen)}
    columns: dict[str, list[int]] = {}
    for one in neurons:
        columns.setdefault(one.site, []).append(one.index)
    taken: dict[str, torch.Tensor] = {}

    def taking(site: str) -> Any:
        index = torch.tensor(columns[site], device=device)

        def hook(_module: Any, _args: Any, output: torch.Tensor) -> None:
            taken[site] = output.index_select(-1, index)

        return hook

    handles = [
        body.get_submodule(site.writer).register_forward_hook(taking(name))
        for name, site in {site.name: site for site in sites}.items()
    ]
    tokens: list[tuple[str, ...]] = [()] * len(chosen)
    at_tokens: dict[str, list[NDArray[np.float32]]] = {
        name: [np.empty(0, np.float32)] * len(chosen) for name in columns
    }
    try:
        with eval_mode(body):
            batches = tokenize(corpus.entries(chosen), tokenizer, max_length=int(scores.meta["max_length"]))
            for batch in batches:
                body(**{name: tensor.to(device) for name, tensor in batch.inputs.items()})
                lengths = batch.inputs["attention_mask"].sum(1).tolist()
                found = {name: output.float().cpu().numpy() for name, output in taken.items()}
                for row, place in enumerate(batch.indices.tolist()):
                    ids = batch.inputs["input_ids"][row, : lengths[row]].tolist()
                    tokens[place] = tuple(tokenizer.convert_ids_to_tokens(ids))
                    for name, outputs in found.items():
                        at_tokens[name][place] = outputs[row, : lengths[row]]
    finally:
        for handle in handles:
            handle.remove()
    answer = []
    seen: dict[str, int] = {}
    for one, split in zip(neurons, splits, strict=True):
        column = seen[one.site] = seen.get(one.site, -1) + 1
        answer.append(
            {
                text: ShownText(
                    text,
                    _as_one(corpus, text),
                    float(split.values[text]),
                    tokens[places[text]],
                    tuple(at_tokens[one.site][places[text]][:, column].tolist()),
                )
                for text in split.shown
            }
        )
    return answer
