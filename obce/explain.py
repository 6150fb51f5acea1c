"""What one neuron does: its scores, its outputs over the texts, the texts at both ends, and what its gap is worth.

The outputs are captured again, in the very batches of the scoring, so that they have its bits: the largest gap shown is
the r_f in the table.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from obce.capture import capture, eval_mode
from obce.corpus import Corpus, read_corpus, tokenize
from obce.sites import Site, base_model, find_sites, model_hash
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
) -> Iterator[Explanation]:
    """Explains several neurons with one pass over the texts; arguments and errors are those of `explain`."""
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
    own = _outputs(model, tokenizer, corpus, wanted, scores)
    other = {} if others is None else _outputs(model, tokenizer, others, wanted, scores)
    first = np.zeros(len(corpus), bool)
    first[corpus.halves(int(scores.meta["seed"]))[0]] = True
    facts = _facts([corpus] if others is None else [corpus, others], tokenizer, int(scores.meta["max_length"]))
    for one in found:
        values = own[one.site][:, one.index]
        if others is None:
            every, fit = values, first
        else:
            every = np.concatenate([values, other[one.site][:, one.index]])
            fit = np.arange(len(every)) < len(values)
        yield _explained(
            scores, one, sites[one.site], model, tokenizer, corpus, own[one.site], every, fit, facts, plan, tail
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


def _outputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, sites: Sequence[Site], scores: Scores
) -> dict[str, NDArray[np.float32]]:
    """Site -> float32 [n, width], outputs at [CLS] by the position of the text, in the batches of the scoring."""
    meta = scores.meta
    found = {site.name: np.empty((len(corpus), site.width), np.float32) for site in sites}
    every = find_sites(model)
    tokens = bool(meta["tokens"])
    # without sums over tokens the scoring computed the model's last layer at [CLS] alone, in other bits
    watched = list(sites) if tokens or every[-1] in sites else [*sites, every[-1]]
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


def _explained(
    scores: Scores,
    one: _Neuron,
    site: Site,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    outputs: NDArray[np.float32],
    every: NDArray[np.float32],
    fit: NDArray[np.bool_],
    facts: Facts,
    plan: Plan | None,
    tail: int,
) -> Explanation:
    values = outputs[:, one.index]
    order = np.argsort(values, kind="stable")
    constant = bool(scores.constant[one.row])
    gap = balanced = recurs = reason = None
    edge: NDArray[np.int64] = np.empty(0, np.int64)
    if not constant:
        gap = largest_gap(values)
        edge = order[max(0, gap.n_below - 3) : gap.n_below + 3]
        balanced = balanced_gap(every[fit], BALANCE)
        if balanced is not None:
            recurs = recurrence(balanced, every[~fit])
            reason = facts.best_reason(balanced.small_side(every), fit)
    shown = np.unique(np.concatenate([order[:tail], order[-tail:], edge]))
    texts = dict(
        zip(shown.tolist(), _shown(model, tokenizer, corpus, site, one.index, shown, scores, values), strict=True)
    )
    kept = _kept(plan, one, site)
    outside = len(every) > len(values)
    return Explanation(
        name=one.name,
        constant=constant,
        standings=_standings(scores, one),
        stability=_stability(scores, one.kind),
        values=values.copy(),
        gap=gap,
        balanced=balanced,
        recurs=recurs,
        reason=reason,
        fitted_on=f"the {np.count_nonzero(fit):,} {'scored texts' if outside else 'texts of the first half'}",
        judged_on=f"{np.count_nonzero(~fit):,} {'other texts' if outside else 'texts of the second half'}",
        low=tuple(texts[i] for i in order[:tail].tolist()),
        high=tuple(texts[i] for i in order[::-1][:tail].tolist()),
        edge=tuple(texts[i] for i in edge.tolist()),
        fate=None if kept is None else ("kept" if one.index in kept else "removed"),
        nearest=None if kept is None or constant else _nearest(outputs, one, kept),
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


def _stability(scores: Scores, kind: str) -> dict[str, float]:
    found = {}
    for name in scores.names():
        by_kind = scores.stability(name).by_kind
        if kind in by_kind:
            found[name] = by_kind[kind][0]
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
    site: Site,
    index: int,
    chosen: NDArray[np.int64],
    scores: Scores,
    values: NDArray[np.float32],
) -> list[ShownText]:
    """Some texts with the neuron's output at every token."""
    body = base_model(model)
    device = next(body.parameters()).device
    taken: list[torch.Tensor] = []
    handle = body.get_submodule(site.writer).register_forward_hook(lambda _m, _args, out: taken.append(out[..., index]))
    found: dict[int, ShownText] = {}
    try:
        with eval_mode(body):
            batches = tokenize(corpus.entries(chosen), tokenizer, max_length=int(scores.meta["max_length"]))
            for batch in batches:
                body(**{name: tensor.to(device) for name, tensor in batch.inputs.items()})
                outputs = taken.pop().float().cpu().numpy()
                lengths = batch.inputs["attention_mask"].sum(1).tolist()
                for row, place in enumerate(batch.indices.tolist()):
                    number = int(chosen[place])
                    ids = batch.inputs["input_ids"][row, : lengths[row]].tolist()
                    found[place] = ShownText(
                        number,
                        _as_one(corpus, number),
                        float(values[number]),
                        tuple(tokenizer.convert_ids_to_tokens(ids)),
                        tuple(outputs[row, : lengths[row]].tolist()),
                    )
    finally:
        handle.remove()
    return [found[place] for place in range(len(chosen))]
