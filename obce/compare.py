"""Scores, repairs and budgets beside each other on a task: the same dense model, data and training for all.

For each seed an encoder is fine-tuned on the task; that dense model is scored on the task's training texts, cut in
every way that is asked for, measured as it is, and measured again after a second training that is the same for all.
Nothing is chosen by looking at the dev set.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from obce.corpus import Corpus
from obce.evaluate import count_parameters, flops, weight_bytes
from obce.finetune import Settings, finetune, with_head
from obce.glue import CALIBRATION_TEXTS, Evaluation, TaskData, calibration, evaluate, kl_divergence, model_labels
from obce.plan import FLOPS_LENGTH, Curves, Of, plan
from obce.prune import REPAIRS, prune
from obce.repair import RIDGE, check_ridge
from obce.scores import SCORE_NAMES
from obce.scoring import EFFECT_TEXTS, score
from obce.sensitivity import How, sensitivity
from obce.sites import usable_positions

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


KEY = ("task", "seed", "score", "keep", "of", "repair", "shares", "ridge", "tuned")
"""Columns that tell rows of a comparison apart; `score` and the like are empty in the dense model's row, and `ridge` in
one of another repair than least squares."""

_FIRST_RIDGE = "0.001"  # of tables that were written before they had the column

SIZES = ("parameters", "encoder", "kept_share", "flops", "bytes")

COLUMNS = (
    *KEY,
    "headline",
    "loss",
    "kl",
    "metrics",
    *SIZES,
    "seconds",
)

Key: TypeAlias = tuple[str, ...]
Other: TypeAlias = "Callable[[PreTrainedModel, Way, Corpus, NDArray[Any]], PreTrainedModel]"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to cut a model.

    Attributes:
        score: Score that ranks the neurons, or the name of one of the `others` of `compare`.
        keep: Share of parameters kept, of `of`.
        of: `"encoder"` or `"total"`.
        repair: What replaces removed neurons.
        shares: `"uniform"`, or `"estimated"` or `"measured"` (by `obce.sensitivity`, with the score `effect`).
        tune: Whether the cut model is also fine-tuned and measured again.
        ridge: Of least squares, see `obce.prune`.
    """

    score: str
    keep: float
    of: Of = "encoder"
    repair: str = "least_squares"
    shares: Literal["uniform", "estimated", "measured"] = "uniform"
    tune: bool = False
    ridge: float = RIDGE

    def __post_init__(self) -> None:
        known = {"repair": REPAIRS, "of": get_args(Of), "shares": ("uniform", *get_args(How))}
        for name, choices in known.items():
            if (asked := getattr(self, name)) not in choices:
                raise ValueError(f"{name} is {asked!r}, expected one of {', '.join(map(repr, choices))}.")
        check_ridge(self.ridge)
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep:g}, but must lie in (0, 1]: name the share of parameters that stays.")


def key_of(row: dict[str, Any]) -> Key:
    """What tells a row apart, as text: rows read from a file have the key of the rows that were written to it."""
    return tuple("" if row[name] is None else str(row[name]) for name in KEY)


def row_of(fields: dict[str, str]) -> dict[str, Any]:
    """A row as `compare` makes it, from its fields as text.

    Raises:
        KeyError, TypeError, ValueError: It is not one.
    """
    first = {"ridge": _FIRST_RIDGE if fields["repair"] == "least_squares" else None}
    row: dict[str, Any] = {name: (first | fields)[name] or None for name in COLUMNS}
    for name in ("seed", "parameters", "encoder", "flops", "bytes"):
        row[name] = int(fields[name])
    for name in ("headline", "loss", "kl", "kept_share", "seconds"):
        row[name] = float(fields[name])
    for name in ("keep", "ridge"):
        row[name] = float(row[name]) if row[name] else None
    row["tuned"] = {"True": True, "False": False}[fields["tuned"]]
    row["metrics"] = json.loads(fields["metrics"])
    return row


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that differ in nothing but the seed as one.

    Returns:
        One row a group, in order of appearance: the fields of the key but `seed`, `kept_share`, `parameters`,
        `encoder`, `flops` and `bytes`, means of `headline`, `loss` and `kl` (and `headline_min`, `headline_max`,
        `headline_sd`, the standard deviation of a sample, 0 for one), and `seeds`, their number.
    """
    groups: dict[Key, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(key_of({**row, "seed": None}), []).append(row)
    found = []
    for group in groups.values():
        first = {name: group[0][name] for name in (*KEY, *SIZES) if name != "seed"}
        headlines = [row["headline"] for row in group]
        means = {name: fmean(row[name] for row in group) for name in ("headline", "loss", "kl")}
        spread = {"headline_min": min(headlines), "headline_max": max(headlines)}
        spread["headline_sd"] = stdev(headlines) if len(headlines) > 1 else 0.0
        found.append({**first, **means, **spread, "seeds": len(group)})
    return found


def compare(
    encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TaskData,
    ways: Sequence[Way],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    settings: Settings | None = None,
    after: Settings | None = None,
    texts: int = CALIBRATION_TEXTS,
    effect_texts: int = EFFECT_TEXTS,
    read: str = "auto",
    others: Mapping[str, Other] | None = None,
    folder: Path | None = None,
    done: Collection[Key] = (),
    on_row: Callable[[dict[str, Any]], None],
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Measures a dense model and what is cut from it, seed by seed.

    Args:
        encoder: A BERT, or one with a head for the task.
        tokenizer: Its tokenizer.
        data: The task.
        ways: Ways to cut.
        seeds: Each decides the head, the order of training, the texts drawn, the score `random`, and the directions
            of effects.
        settings: Training of the dense model.
        after: Training of the cut models (default: `settings`).
        texts: Training rows that scores and repairs are made of, without their labels but for `taylor`.
        effect_texts: As in `obce.score`.
        read: As in `obce.score`.
        others: Ways of cutting that are none of obce's: name -> function of the dense model, the way, the corpus and
            its labels (as the model's loss takes them) that gives the smaller model; the given one must stay as it is.
        folder: Where the dense models are kept, so that a comparison that was stopped does not train them again.
        done: Keys of rows that are there.
        on_row: Called with each row as it is made, with the names of `COLUMNS`.
        tell: Called with a line for people before each piece of work.
    """
    settings = settings or Settings()
    after = after or settings
    others = others or {}
    for way in ways:
        if way.score not in (*SCORE_NAMES, *others):
            raise ValueError(f"score is {way.score!r}, expected one of {', '.join((*SCORE_NAMES, *others))}.")
    for seed in seeds:
        wanted = [way for way in ways if not _keys(data, seed, way) <= set(done)]
        dense_row = _row(data, seed, None, True)
        if not wanted and key_of(dense_row) in done:
            continue
        tell(f"{data.task.name}, seed {seed}: dense")
        start = time.perf_counter()
        place = None if folder is None else folder / f"{data.task.name}-{seed}"
        dense, _ = finetune(
            with_head(encoder, data.task, seed), tokenizer, data, replace(settings, seed=seed), out=place
        )
        reference = evaluate(dense, tokenizer, data, max_length=settings.max_length)
        if key_of(dense_row) not in done:
            whole = {"seconds": _since(start), "kept_share": 1.0}
            on_row(dense_row | _measured(dense, reference, reference, data) | whole)
        if not wanted:
            continue
        corpus, of_task = calibration(data.train, f"{data.task.name} train", texts, seed)
        labels = model_labels(dense, data.task, of_task)
        tell(f"{data.task.name}, seed {seed}: scores")
        scores = score(
            dense,
            tokenizer,
            corpus,
            seed=seed,
            max_length=settings.max_length,
            cloud_texts=0,
            effect_texts=effect_texts,
            read=read,
            labels=labels if any(way.score == "taylor" for way in wanted) else None,
        )
        curves: dict[tuple[How, float | None], Curves] = {}
        for how, ridge in dict.fromkeys(asked for way in wanted if (asked := _asked(way)) is not None):
            tell(f"{data.task.name}, seed {seed}: what each site can spare, {how}")
            curves[how, ridge] = sensitivity(
                dense,
                scores,
                corpus,
                tokenizer=tokenizer,
                max_length=settings.max_length,
                how=how,
                read=read,
                ridge=ridge,
                seed=seed,
            )
        for way in wanted:
            tell(f"{data.task.name}, seed {seed}: {way.score}, {way.keep:g} of {way.of}, {way.repair}, {way.shares}")
            start = time.perf_counter()
            if way.score in others:
                small = others[way.score](dense, way, corpus, labels)
            else:
                made = plan(
                    scores,
                    keep=way.keep,
                    of=way.of,
                    score=way.score,
                    sensitivity=None if (asked := _asked(way)) is None else curves[asked],
                )
                given: dict[str, Any] = {"scores": scores}
                if way.repair == "least_squares":
                    given = {"texts": corpus, "tokenizer": tokenizer, "max_length": settings.max_length}
                    given["ridge"] = way.ridge
                small = prune(dense, made, repair=way.repair, **given)
            seconds = _since(start)
            index = {"encoder": 1, "total": 0}[way.of]
            share = count_parameters(small)[index] / count_parameters(dense)[index]
            row = _row(data, seed, way, False)
            if key_of(row) not in done:
                found = evaluate(small, tokenizer, data, max_length=settings.max_length)
                facts = {"kept_share": share, "seconds": seconds}
                on_row(row | _measured(small, found, reference, data) | facts)
            row = _row(data, seed, way, True)
            if way.tune and key_of(row) not in done:
                start = time.perf_counter()
                teacher = dense if after.distill else None
                small, _ = finetune(small, tokenizer, data, replace(after, seed=seed), teacher=teacher)
                found = evaluate(small, tokenizer, data, max_length=settings.max_length)
                facts = {"kept_share": share, "seconds": _since(start)}
                on_row(row | _measured(small, found, reference, data) | facts)


def _asked(way: Way) -> tuple[How, float | None] | None:
    """How shares are found, and the ridge of the repairs that are tried for it."""
    if way.shares == "uniform":
        return None
    return way.shares, way.ridge if way.shares == "measured" else None


def _keys(data: TaskData, seed: int, way: Way) -> set[Key]:
    tuned = (False, True) if way.tune else (False,)
    return {key_of(_row(data, seed, way, one)) for one in tuned}


def _row(data: TaskData, seed: int, way: Way | None, tuned: bool) -> dict[str, Any]:
    names = ("score", "keep", "of", "repair", "shares", "ridge")
    facts: dict[str, Any] = {name: getattr(way, name, None) for name in names}
    if facts["repair"] != "least_squares":
        facts["ridge"] = None
    facts |= {name: float(facts[name]) for name in ("keep", "ridge") if facts[name] is not None}  # as files have them
    return {"task": data.task.name, "seed": seed, **facts, "tuned": tuned}


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 2)


def _measured(model: PreTrainedModel, found: Evaluation, reference: Evaluation, data: TaskData) -> dict[str, Any]:
    """What one row says of a model; loss and KL are means over all dev rows (KL NaN for regression)."""
    sizes = [len(data.dev[name]) for name in found.splits]
    weights = np.array(sizes) / sum(sizes)
    divergences = [
        float("nan") if data.task.regression else kl_divergence(reference.splits[name].logits, result.logits)
        for name, result in found.splits.items()
    ]
    total, encoder = count_parameters(model)
    return {
        "headline": found.headline,
        "loss": float(weights @ [result.loss for result in found.splits.values()]),
        "kl": float(weights @ divergences),
        "metrics": {
            (metric if len(found.splits) == 1 else f"{name} {metric}"): value
            for name, result in found.splits.items()
            for metric, value in result.metrics.items()
        },
        "parameters": total,
        "encoder": encoder,
        "flops": flops(model, length=min(FLOPS_LENGTH, usable_positions(model))),
        "bytes": weight_bytes(model),
    }
