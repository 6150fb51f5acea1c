"""The numbers of docs/results.md: every score, repair and budget on four GLUE tasks, measured on one trained encoder.

    python benchmarks/results.py GLUE [--seeds 3] [--minutes N] [--task NAME | --half] [--only-write]

GLUE is a folder with SST-2, CoLA, RTE and STS-B (official tsv files). Seed by seed, task by task, each row is kept in
benchmarks/results/pruning/ as it is measured; the command goes on where it stopped, and then draws the plots and writes
docs/results.md. With --minutes it starts no new task after so many; --only-write measures nothing.

The encoder is all-MiniLM-L6-v2 (6 layers, hidden 384). The peers are Torch-Pruning's magnitude and Taylor importances,
where the package torch-pruning is installed (`pip install 'obce[bench]'`).
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from obce.bench import facts
from obce.compare import Way, compare
from obce.corpus import tokenize
from obce.demo import default_model
from obce.evaluate import count_parameters
from obce.finetune import Settings
from obce.glue import read_task
from obce.repair import RIDGE
from obce.run import CompareRun, load_model, load_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from obce.corpus import Corpus
    from transformers import PreTrainedModel

HERE = Path(__file__).parent
FOLDER = HERE / "results" / "pruning"
TASKS = ("SST-2", "CoLA", "RTE", "STS-B")
TRAIN_ROWS = 3000
PAPER = 0.465  # of the encoder: what 58.47 % of all parameters means on BERT Base

# The dense model is trained on all rows kept; what is cut from it gets a fixed number of steps more.
DENSE = Settings(epochs=3, learning_rate=1e-4, precision="bfloat16")
AFTER = Settings(max_steps=75, learning_rate=1e-4, precision="bfloat16")
TEXTS = 400

# Half of the encoder with more of everything: what is lost when neither rows nor texts are short.
HALF = Settings(epochs=2, learning_rate=1e-4, precision="bfloat16")
HALF_ROWS, HALF_TEXTS = 8000, 1000

# The table about the ridge of least squares; all others have the default, but for measured shares, which take longest
# and stay as they were measured with the ridge that was the default before.
RIDGES = (0.001, 0.01, 0.1, 1.0)
MEASURED_RIDGE = 0.001
RIDGE_KEEPS = (0.3, PAPER)

SCORES = ("effect", "effect_abs", "spread", "rf", "std", "magnitude", "random", "taylor")
PEERS = ("tp_magnitude", "tp_taylor")


def ways(phase: str, seed: int, peers: tuple[str, ...]) -> list[Way]:
    """What is measured of a seed: first the paper's size, trained again, then the grid, most of it on seed 0."""
    if phase == "paper":
        found = [Way(name, PAPER, tune=True) for name in SCORES]
        found += [Way(name, PAPER, repair="none", tune=True) for name in peers]
        return [*found, Way("rf", PAPER, repair="none", tune=True)]  # the last is the paper's own way
    if phase == "ridge":
        found = [Way("effect", keep, shares="estimated", ridge=ridge) for keep in RIDGE_KEEPS for ridge in RIDGES]
        return [replace(one, tune=(one.keep, one.ridge) == (PAPER, RIDGE)) for one in found]
    found = [Way(name, 0.5) for name in SCORES]
    found += [Way("effect", PAPER, shares="measured", ridge=MEASURED_RIDGE, tune=True)]
    found += [Way("effect", PAPER, shares="estimated", tune=True)]
    found += [Way(name, PAPER, shares="estimated") for name in ("spread", "taylor", "rf", "random")]
    found += [Way("effect", 0.5, shares="estimated")]
    if seed == 0:
        found += [Way(name, keep) for keep in (0.7, 0.3) for name in SCORES]
        found += [Way("effect", keep, shares="estimated") for keep in (0.7, 0.3)]
        found += [Way(name, 0.5, repair=repair) for repair in ("none", "mean") for name in SCORES]
    return found


def torch_pruning(importance: str) -> Callable[[PreTrainedModel, Way, Corpus, NDArray[Any]], PreTrainedModel]:
    """Torch-Pruning's own choice of the same neurons: intermediate, and query, key and value dimensions of each head.

    Its dependency graph ties query, key and value of a head to the same indices, which obce does not.
    """
    import torch_pruning as tp

    def cut(dense: PreTrainedModel, way: Way, corpus: Corpus, labels: NDArray[Any]) -> PreTrainedModel:
        # it rounds widths down: the largest ratio, in steps of a hundredth, that keeps as much as was asked for
        least = way.keep * count_parameters(dense)[1]
        for step in range(10):
            small = attempt(dense, 1 - way.keep - step / 100, corpus, labels)
            if count_parameters(small)[1] >= least:
                break
        return small

    def attempt(dense: PreTrainedModel, ratio: float, corpus: Corpus, labels: NDArray[Any]) -> PreTrainedModel:
        small = copy.deepcopy(dense).eval()
        tokenizer = load_tokenizer(default_model())
        layers: Any = small.base_model.encoder.layer
        (first,) = corpus.entries([0])
        example = tokenizer(*([part] for part in ([first] if isinstance(first, str) else first)), return_tensors="pt")
        heads = {
            linear: layer.attention.self.num_attention_heads
            for layer in layers
            for linear in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value)
        }
        kept_whole = [m for m in small.modules() if isinstance(m, (torch.nn.LayerNorm, torch.nn.Embedding))]
        kept_whole += [layer.attention.output.dense for layer in layers] + [layer.output.dense for layer in layers]
        kept_whole += [small.base_model.pooler.dense, small.classifier]
        names = {"tp_magnitude": "GroupMagnitudeImportance", "tp_taylor": "GroupTaylorImportance"}
        pruner = tp.pruner.BasePruner(
            small,
            dict(example),
            importance=getattr(tp.importance, names[importance])(),
            pruning_ratio=ratio,
            ignored_layers=kept_whole,
            num_heads=heads,
            prune_num_heads=False,
            prune_head_dims=True,
            output_transform=lambda out: out.logits.sum(),
        )
        if importance == "tp_taylor":
            few = corpus.entries(range(min(len(corpus), 400)))
            for batch in tokenize(few, tokenizer, batch_tokens=2048):
                given = torch.from_numpy(labels[batch.indices])
                (small(**batch.inputs, labels=given).loss * len(batch.indices) / len(few)).backward()
        pruner.step()
        small.zero_grad(set_to_none=True)
        for layer in layers:
            inner = layer.attention.self
            inner.all_head_size = inner.query.out_features
            inner.attention_head_size = inner.all_head_size // inner.num_attention_heads
        return small

    return cut


def measure(glue: Path, tasks: Sequence[str], seeds: int, minutes: float | None) -> None:
    encoder, tokenizer = load_model(default_model()), load_tokenizer(default_model())
    try:
        others = {name: torch_pruning(name) for name in PEERS}
    except ImportError:
        print("torch-pruning is not installed: its rows are left out", file=sys.stderr)
        others = {}
    begun = time.monotonic()
    for phase, seed in product(("paper", "grid", "ridge"), range(seeds)):
        for name in tasks:
            if minutes is not None and time.monotonic() - begun > 60 * minutes:
                print(f"stopped before {name}, seed {seed}: {minutes:g} minutes are over", file=sys.stderr)
                return
            data = read_task(name, glue, limit=TRAIN_ROWS)
            run = CompareRun(FOLDER / name)
            with run.locked():
                run.ask({"task": name, "rows": len(data.train), "texts": TEXTS, "steps_after": AFTER.max_steps}, DENSE)
                compare(
                    encoder,
                    tokenizer,
                    data,
                    ways(phase, seed, tuple(others)),
                    seeds=[seed],
                    settings=DENSE,
                    after=AFTER,
                    texts=TEXTS,
                    others=others,
                    folder=HERE.parent / "build" / "results",
                    done=run.keys(),
                    on_row=run.add,
                    tell=lambda line: print(f"{time.monotonic() - begun:6.0f} s  {line}", file=sys.stderr, flush=True),
                )


def measure_half(glue: Path, seeds: int) -> None:
    """SST-2 with more rows and more texts, half of the encoder, as cut."""
    encoder, tokenizer = load_model(default_model()), load_tokenizer(default_model())
    data = read_task("SST-2", glue, limit=HALF_ROWS)
    run = CompareRun(FOLDER / "half")
    with run.locked():
        run.ask({"task": "SST-2", "rows": len(data.train), "texts": HALF_TEXTS}, HALF)
        scores = ("effect", "spread", "taylor", "rf", "std", "random")
        asked = [Way(name, 0.5) for name in scores]
        asked += [Way("effect", 0.5, shares="measured", ridge=MEASURED_RIDGE), Way("effect", 0.5, shares="estimated")]
        asked += [Way("effect", 0.5, shares="estimated", ridge=RIDGES[0])]
        compare(
            encoder,
            tokenizer,
            data,
            asked,
            seeds=range(seeds),
            settings=HALF,
            texts=HALF_TEXTS,
            folder=HERE.parent / "build" / "results" / "half",
            done=run.keys(),
            on_row=run.add,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )


def machine() -> dict[str, Any]:
    found: dict[str, Any] = {**facts(), "threads": torch.get_num_threads()}
    for name in ("torch", "transformers", "scikit-learn", "torch-pruning"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


# ---- the page ------------------------------------------------------------------------------------------------------

PAGE = HERE.parent / "docs" / "results.md"
NAMES = {
    "effect": "effect (default)",
    "effect_abs": "effect, mean absolute",
    "spread": "spread",
    "rf": "r_f (the paper's)",
    "std": "std at [CLS]",
    "magnitude": "magnitude",
    "random": "random",
    "taylor": "Taylor (labels)",
    "tp_magnitude": "Torch-Pruning, magnitude",
    "tp_taylor": "Torch-Pruning, Taylor (labels)",
}
METRICS = {"SST-2": "accuracy", "CoLA": "Matthews", "RTE": "accuracy", "STS-B": "mean of Pearson and Spearman"}

Row = dict[str, Any]


def chosen(rows: list[Row], **fields: Any) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def cell(rows: list[Row], value: str = "headline", digits: int = 3) -> str:
    """Mean over seeds, and the standard deviation where there are several."""
    found = [row[value] for row in rows]
    if not found or any(math.isnan(x) for x in found):
        return "–"
    spread = f" ± {stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{fmean(found):.{digits}f}{spread}"


def over_tasks(rows: list[Row], tasks: Sequence[str]) -> dict[int, float]:
    """Seed -> mean headline over the tasks, for seeds that have all of them."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row["seed"], {})[row["task"]] = row["headline"]
    return {seed: fmean(by_task.values()) for seed, by_task in sorted(found.items()) if set(by_task) == set(tasks)}


def means(values: Sequence[float], signed: bool = False) -> str:
    if not values:
        return "–"
    sign = "+" if signed else ""
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):{sign}.3f}{spread}"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def paper_way(name: str, repair: str, shares: str) -> str:
    words = NAMES[name]
    if name in PEERS:
        return words
    if repair != "least_squares":
        return f"{words}, removed neurons zero"
    return words if shares == "uniform" else f"{words}, {shares} shares"


def paper_table(rows: list[Row], tasks: Sequence[str]) -> str:
    at = [row for row in rows if row["keep"] == PAPER]
    groups = list(dict.fromkeys((row["score"], row["repair"], row["shares"]) for row in at))
    dense = chosen(rows, score=None)
    body = [["dense", "", *(cell(chosen(dense, task=t)) for t in tasks), means([*over_tasks(dense, tasks).values()])]]
    for score_name, repair, shares in groups:
        here = chosen(at, score=score_name, repair=repair, shares=shares)
        for tuned in (False, True):
            some = chosen(here, tuned=tuned)
            if some:
                body.append(
                    [
                        paper_way(score_name, repair, shares),
                        "yes" if tuned else "no",
                        *(cell(chosen(some, task=t)) for t in tasks),
                        means([*over_tasks(some, tasks).values()]),
                    ]
                )
    return table(["", "trained again", *(f"{t} ({METRICS[t]})" for t in tasks), "mean of the tasks"], body)


def differences(rows: list[Row], tasks: Sequence[str], shares: str) -> str:
    """Effect minus the others, seed by seed: the same dense models, texts and training."""
    at = [row for row in rows if row["keep"] == PAPER and row["shares"] == shares]
    ours = chosen(at, score="effect", repair="least_squares")
    trained = (False, True) if any(row["tuned"] for row in at if row["score"] != "effect") else (False,)
    body = []
    for name, repair in dict.fromkeys((row["score"], row["repair"]) for row in at):
        if (name, repair) == ("effect", "least_squares"):
            continue
        line = [paper_way(name, repair, "uniform")]
        for tuned in trained:
            mine = over_tasks(chosen(ours, tuned=tuned), tasks)
            theirs = over_tasks(chosen(at, score=name, repair=repair, tuned=tuned), tasks)
            line.append(means([mine[seed] - theirs[seed] for seed in theirs if seed in mine], signed=True))
        body.append(line)
    return table(["effect, least squares, minus", *("trained again" if one else "as cut" for one in trained)], body)


def half_table(rows: list[Row], tasks: Sequence[str]) -> str:
    """Half of the encoder, as cut: headline and KL of every score and repair."""
    at = chosen(rows, keep=0.5, tuned=False)
    body = []
    ways = [(repair, "uniform") for repair in ("least_squares", "mean", "none")]
    for name in SCORES:
        for repair, shares in [("least_squares", "estimated"), *ways]:
            some = chosen(at, score=name, repair=repair, shares=shares)
            if some:
                cells = []
                for task_name in tasks:
                    here = chosen(some, task=task_name)
                    kl = cell(here, "kl")
                    cells.append(cell(here) + ("" if kl == "–" else f" / {kl}"))
                body.append([paper_way(name, "least_squares", shares), repair.replace("_", " "), *cells])
    return table(["score", "repair", *(f"{t}, / KL" if t != "STS-B" else t for t in tasks)], body)


def more_table(rows: list[Row]) -> str:
    if not rows:
        return "Not measured yet."
    body = [["dense", cell(chosen(rows, score=None)), ""]]
    for name, shares, ridge in dict.fromkeys(
        (row["score"], row["shares"], row["ridge"]) for row in rows if row["score"]
    ):
        some = chosen(rows, score=name, shares=shares, ridge=ridge)
        words = "" if ridge == RIDGE else f", ridge {ridge:g}"
        body.append([paper_way(name, "least_squares", shares) + words, cell(some), cell(some, "kl")])
    return table(["", "accuracy", "KL"], body)


def ridge_table(rows: list[Row], tasks: Sequence[str]) -> str:
    """Headline, and KL, of effect with estimated shares by the ridge of least squares."""
    body = []
    for keep, ridge, tuned in product(RIDGE_KEEPS, RIDGES, (False, True)):
        some = chosen(rows, score="effect", shares="estimated", keep=keep, ridge=ridge, tuned=tuned)
        if some:
            here = [chosen(some, task=task) for task in tasks]
            cells = [cell(one) + ("" if (kl := cell(one, "kl")) == "–" else f" / {kl}") for one in here]
            words = f"{keep:.1%}", f"{ridge:g}", "yes" if tuned else "no"
            body.append([*words, *cells, means([*over_tasks(some, tasks).values()])])
    heads = (f"{task}, / KL" if task != "STS-B" else task for task in tasks)
    return table(["encoder kept", "ridge", "trained again", *heads, "mean of the tasks"], body)


def budget_table(rows: list[Row], tasks: Sequence[str]) -> str:
    body = []
    for name, shares in [("effect", "estimated"), *((name, "uniform") for name in SCORES)]:
        for keep in (0.7, 0.5, 0.3):
            some = chosen(rows, score=name, keep=keep, repair="least_squares", tuned=False, seed=0, shares=shares)
            if some:
                cells = [cell(chosen(some, task=t)) for t in tasks]
                body.append([paper_way(name, "least_squares", shares), f"{keep:.0%}", *cells])
    return table(["score", "encoder kept", *tasks], body)


def latency_table() -> str:
    path = HERE / "results" / "latency.csv"
    if not path.is_file():
        return "Not measured yet."
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = ("model", "device", "dtype", "torch_threads", "texts", "multiple")
    found = {tuple(row[name] for name in names): row for row in rows}  # the last of each
    order = ("minilm", "base", "large")
    measured = ("encoder_kept", "dense_ms", "pruned_ms", "ratio")
    body = [
        [*key, *(row[name] for name in measured)]
        for key, row in sorted(found.items(), key=lambda at: (order.index(at[0][0]), at[0][1:]))
    ]
    heads = ["dimensions", "device", "dtype", "threads", "texts", "widths a multiple of"]
    return table([*heads, "encoder kept", "dense, ms", "cut, ms", "ratio"], body)


def draw(rows: list[Row], tasks: Sequence[str]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    looks = {
        "effect": ("#D55E00", "o", "-"),
        "taylor": ("#000000", "s", "--"),
        "spread": ("#E69F00", "v", "-"),
        "std": ("#56B4E9", "P", ":"),
        "magnitude": ("#009E73", "D", ":"),
        "random": ("#999999", "X", ":"),
        "rf": ("#0072B2", "^", "-"),
    }
    style = {"font.size": 7, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}
    with plt.rc_context(style | {"svg.hashsalt": "obce"}):
        figure, axes = plt.subplots(1, len(tasks), figsize=(1.8 * len(tasks), 2.1), layout="constrained", squeeze=False)
        for axis, name in zip(axes[0], tasks, strict=True):
            dense = chosen(rows, task=name, score=None, seed=0)
            for score_name, (colour, marker, line) in looks.items():
                some = [
                    row
                    for row in chosen(rows, task=name, score=score_name, repair="least_squares", tuned=False, seed=0)
                    if row["shares"] == "uniform"
                ]
                points = sorted((row["keep"], row["headline"]) for row in some) + [(1.0, d["headline"]) for d in dense]
                axis.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    marker=marker,
                    linestyle=line,
                    markersize=3,
                    linewidth=0.9,
                    label=NAMES[score_name],
                )
            shared = chosen(rows, task=name, score="effect", shares="estimated", tuned=False, seed=0)
            points = sorted((row["keep"], row["headline"]) for row in shared) + [(1.0, d["headline"]) for d in dense]
            axis.plot(
                *zip(*points, strict=True),
                color=looks["effect"][0],
                marker="*",
                linestyle="--",
                markersize=6,
                linewidth=0.9,
                label="effect, estimated shares",
            )
            axis.set_title(name)
            axis.set_xlabel("share of the encoder kept")
            axis.set_ylabel(METRICS[name] if name != "STS-B" else "correlation")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        for suffix, facts in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
            figure.savefig(FOLDER / f"budgets{suffix}", dpi=300, metadata=facts)
        plt.close(figure)


TEXT = """# Results: what is left of a BERT that is cut

Written by `make results GLUE=FOLDER` (benchmarks/results.py) from the rows in `benchmarks/results/pruning/`; every
number that was measured is here, the losing ones too.

**Encoder**: all-MiniLM-L6-v2 (BERT architecture, 6 layers, hidden size 384). **Tasks**: {tasks}, official dev sets;
at most {rows:,} training rows each, drawn evenly. **Training**: for each seed the encoder gets a fresh head and is
trained for {epochs} epochs (AdamW, peak learning rate {rate:g}, batches of {batch}, bfloat16 forward passes); that
dense model is scored on {texts} of its training rows and cut; "trained again" is {steps} more steps of the same
training, the same for all. Nothing was chosen by looking at the dev sets. **Seeds**: {seeds}. Numbers are means, ±
the standard deviation over seeds; one without ± is of one seed alone. Labels are seen by the scores that say so, and by
the training.

{machine}

## The paper's size: {paper:.1%} of the encoder
That is what 58.47 % of all parameters means on BERT Base. The same share of every site goes and least squares repairs
it, where nothing else is said; `obce plan` and `obce run` take estimated shares by themselves ([method.md](method.md)).
With estimated and measured shares all scores have the widths that `effect` has; measured ones have a ridge of
{measured_ridge:g}. "r_f, removed neurons zero" is the paper's way as we read it.

{paper_table}

### Effect beside the others
Differences of the mean over the tasks, seed by seed, ± their standard deviation; above 0 effect is ahead.

{differences}

With estimated shares:

{differences_estimated}

## Half of the encoder, as cut
Headline, and KL(dense || cut) in nats. `mean` and `none` were measured on the first seed alone.

{half_table}

### With more rows and texts
SST-2, {half_rows:,} training rows, {half_epochs} epochs, {half_texts:,} texts for scores and repair; accuracy, and KL
in nats.

{more_table}

## Budgets, as cut
Least squares, first seed.

{budget_table}

![Quality against the share of the encoder that is kept](../benchmarks/results/pruning/budgets.png)

### The ridge of least squares
The ridge is a share of the mean variance of what a reader takes in. All other tables have the default, {ridge:g} (but
for measured shares), which was chosen by the cosines of sentence vectors, which have nothing to do with these tasks
([method.md](method.md)); but that more is better than 0.001 was seen on some of these dev sets before. Effect,
estimated shares:

{ridge_table}

## Speed
Cut to the paper's size, batches of texts of 64 tokens, dense and cut model in turn (benchmarks/bench_latency.py, random
weights of the real dimensions):

{latency_table}

In bfloat16 the cut model is slower on a GPU: its matrix units want widths that are multiples of 8, and these plans
leave any, which is the likely cause. `obce plan --multiple 8` makes such widths at no cost on a CPU; on a GPU they are
not measured yet.

## Not measured here
BERT Base and Large, whose weights were not to be had, and quality on a GPU. Ready to run where they are:

```
obce compare bert-base-uncased --task SST-2 --data GLUE_FOLDER --out base-sst2 --keep 0.465 --learning-rate 2e-5
obce compare bert-large-uncased --task SST-2 --data GLUE_FOLDER --out large-sst2 --keep 0.471 --learning-rate 2e-5
```
"""


def write() -> None:
    every = [row for name in TASKS for row in CompareRun(FOLDER / name).rows]
    rows = [row for row in every if row["ridge"] in (None, MEASURED_RIDGE if row["shares"] == "measured" else RIDGE)]
    tasks = [name for name in TASKS if chosen(rows, task=name)]
    if not rows:
        raise SystemExit(f"{FOLDER} holds no rows: run this script with the folder of the GLUE files first")
    told = json.loads((FOLDER / "machine.json").read_text(encoding="utf-8"))
    draw(rows, tasks)
    by_task = {t: len({row["seed"] for row in chosen(rows, task=t, keep=PAPER, score="effect")}) for t in tasks}
    packages = [f"{name} {told[name]}" for name in ("torch", "transformers", "scikit-learn", "torch-pruning")]
    PAGE.write_text(
        TEXT.format(
            tasks=", ".join(tasks),
            rows=TRAIN_ROWS,
            epochs=DENSE.epochs,
            rate=DENSE.learning_rate,
            batch=DENSE.batch_size,
            texts=TEXTS,
            steps=AFTER.max_steps,
            seeds=", ".join(f"{name} {count}" for name, count in by_task.items()),
            machine=f"{told['machine']}; {', '.join([told['versions'], *packages])}; commit {told['commit']}.",
            paper=PAPER,
            paper_table=paper_table(rows, tasks),
            differences=differences(rows, tasks, "uniform"),
            differences_estimated=differences(rows, tasks, "estimated"),
            half_table=half_table(rows, tasks),
            half_rows=HALF_ROWS,
            half_epochs=HALF.epochs,
            half_texts=HALF_TEXTS,
            more_table=more_table(CompareRun(FOLDER / "half").rows),
            budget_table=budget_table(rows, tasks),
            ridge=RIDGE,
            measured_ridge=MEASURED_RIDGE,
            ridge_table=ridge_table(every, tasks),
            latency_table=latency_table(),
        ),
        encoding="utf-8",
    )
    print(PAGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("glue", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--task", choices=TASKS, action="append")
    parser.add_argument("--half", action="store_true", help="measure half of the encoder on 8,000 rows of SST-2 alone")
    parser.add_argument("--only-write", action="store_true")
    options = parser.parse_args()
    if not options.only_write:
        if options.glue is None:
            parser.error("name the folder of GLUE files, or --only-write")
        FOLDER.mkdir(parents=True, exist_ok=True)
        if options.task is None or options.half:
            measure_half(options.glue, options.seeds)
        if options.task is not None or not options.half:
            measure(options.glue, options.task or TASKS, options.seeds, options.minutes)
        (FOLDER / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n", encoding="utf-8")
    write()


if __name__ == "__main__":
    main()
