"""The nine tasks of GLUE: their files, their metrics, and what a model with a classification head scores on them.

Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding" (2019). The
test labels of GLUE are hidden, so every score here is on the dev sets. Numbers of a task stand in the order that
GLUE and `datasets` give its labels; a model that orders them otherwise has its columns put in this order by name.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from obce.capture import eval_mode, padded_as_read
from obce.corpus import Batch, Corpus, CorpusNotFoundError, first_line, shortened
from obce.sites import usable_max_length

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from transformers import PreTrainedModel

DATASET = "nyu-mll/glue"
"""Where `datasets` has GLUE; what the source "datasets" stands for."""

MAX_LENGTH = 128
"""Tokens a row is cut to when none are named: GLUE's own baselines and BERT's use it."""

BATCH_TOKENS = 4096
"""Places of a batch in evaluation, padding included."""

CALIBRATION_TEXTS = 1000
"""Training texts that scores and repairs are made of."""

MAX_SCORE = 5.0
"""STS-B scores run from 0 to this."""

_CHUNK = 1024  # rows a call of the tokenizer
_DATASET_NAME = re.compile(r"(?:hf:)?[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Task:
    """One task of GLUE.

    Attributes:
        name: As GLUE writes it, which is also the folder of its files.
        texts: Columns of the one or two texts in the official tsv files.
        label: Column of the label there.
        labels: Labels as the files write them, in the order of their numbers; empty for regression.
        names: The same labels in words, as `datasets` names them; a head built for the task carries these.
        metrics: Names of what `metrics` gives.
        dev: Name of each dev split -> the file without extension.
        dataset: Name of the configuration in `datasets`' GLUE.
        dataset_texts: Columns of the texts there.
        dataset_dev: Name of each dev split -> the split there.
        columns: Columns of files without a header; None where the first line is one.
        ragged: Whether the official files hold broken rows, which are left out and counted.
    """

    name: str
    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    names: tuple[str, ...]
    metrics: tuple[str, ...]
    dataset: str
    dataset_texts: tuple[str, ...]
    dev: tuple[tuple[str, str], ...] = (("dev", "dev"),)
    dataset_dev: tuple[tuple[str, str], ...] = (("dev", "validation"),)
    columns: tuple[str, ...] | None = None
    ragged: bool = False

    @property
    def regression(self) -> bool:
        """Whether the label is a number (STS-B)."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Outputs of a head for the task: 1 for regression."""
        return len(self.labels) or 1


_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
_MNLI = ("entailment", "neutral", "contradiction")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "CoLA",
            ("sentence",),
            "label",
            _BINARY,
            ("unacceptable", "acceptable"),
            ("matthews_correlation",),
            "cola",
            ("sentence",),
            columns=("source", "label", "star", "sentence"),
        ),
        Task("SST-2", ("sentence",), "label", _BINARY, ("negative", "positive"), ("accuracy",), "sst2", ("sentence",)),
        Task(
            "MRPC",
            ("#1 String", "#2 String"),
            "Quality",
            _BINARY,
            ("not_equivalent", "equivalent"),
            ("accuracy", "f1"),
            "mrpc",
            _PAIR,
        ),
        Task(
            "QQP",
            ("question1", "question2"),
            "is_duplicate",
            _BINARY,
            ("not_duplicate", "duplicate"),
            ("accuracy", "f1"),
            "qqp",
            ("question1", "question2"),
            ragged=True,
        ),
        Task("STS-B", _PAIR, "score", (), (), ("pearson", "spearman"), "stsb", _PAIR),
        Task(
            "MNLI",
            _PAIR,
            "gold_label",
            _MNLI,
            _MNLI,
            ("accuracy",),
            "mnli",
            ("premise", "hypothesis"),
            dev=(("matched", "dev_matched"), ("mismatched", "dev_mismatched")),
            dataset_dev=(("matched", "validation_matched"), ("mismatched", "validation_mismatched")),
        ),
        Task(
            "QNLI",
            ("question", "sentence"),
            "label",
            _ENTAILMENT,
            _ENTAILMENT,
            ("accuracy",),
            "qnli",
            ("question", "sentence"),
        ),
        Task("RTE", _PAIR, "label", _ENTAILMENT, _ENTAILMENT, ("accuracy",), "rte", _PAIR),
        Task("WNLI", _PAIR, "label", _BINARY, _ENTAILMENT[::-1], ("accuracy",), "wnli", _PAIR),
    )
}
"""The tasks by GLUE's own names; `task` finds them however they are written."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows of a split.

    Attributes:
        texts: The first text of each row.
        pairs: The second text of each row, or None where the task has one text.
        labels: [n], int64 numbers of the labels, or float32 scores for regression.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: NDArray[Any]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, eq=False)
class TaskData:
    """A task's training rows and dev splits.

    Attributes:
        task: The task.
        train: Rows for training, of which there may be none.
        dev: Name of each dev split -> its rows, at least one.
        skipped: Broken rows that were left out, over all files.
    """

    task: Task
    train: Examples
    dev: dict[str, Examples]
    skipped: int = 0


@dataclass(frozen=True, eq=False)
class SplitResult:
    """What a model gives on one dev split.

    Attributes:
        metrics: Name -> value, as `metrics` gives them.
        loss: Mean cross-entropy in nats, or mean squared error for regression.
        logits: float32 [n, labels], rows as in the split, columns in the order of the task's labels.
    """

    metrics: dict[str, float]
    loss: float
    logits: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model gives on a task.

    Attributes:
        splits: Name of each dev split -> its result.
        headline: GLUE's one number for the task, from 0 (or -1, for correlations) to 1.
    """

    splits: dict[str, SplitResult]
    headline: float


def task(name: str | Task) -> Task:
    """The task of a name, written in capitals or not, with hyphens or without ("SST-2", "sst2").

    Raises:
        ValueError: There is none of that name.
    """
    if isinstance(name, Task):
        return name
    for known in TASKS.values():
        if _plain(name) == _plain(known.name):
            return known
    raise ValueError(f"task: found {name!r}, expected one of {', '.join(TASKS)}; choose one of them.")


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()


# Reading


def read_task(name: str | Task, source: str | os.PathLike[str], *, limit: int | None = None, seed: int = 0) -> TaskData:
    """Reads a task's training rows and dev splits.

    Files are the official ones: tab separated, unquoted, UTF-8, with the extension `.tsv` or `.tsv.gz`; a task
    without a training file can still be evaluated. In QQP, whose official files hold some rows that a line break
    tore apart, rows with too few fields are left out and counted, as `datasets` does; elsewhere they are refused.

    Args:
        name: Name of the task.
        source: Directory with `train.tsv` and `dev.tsv` (`dev_matched.tsv` and `dev_mismatched.tsv` in MNLI), or
            one with a folder of the task's name; "datasets" for `nyu-mll/glue`, or the `owner/name` of another
            dataset of the same form.
        limit: Most training rows; more are sampled without replacement and keep their order. Dev sets stay whole.
        seed: Which of the possible samples.

    Raises:
        CorpusNotFoundError: A dev file or the directory is missing.
        ImportError: A dataset was named and `datasets` is not installed.
        ValueError: No such task; a file with other columns, a label that the task has not, a score that is not a
            number from 0 to 5, bytes that are no UTF-8, too few fields, no rows; or `limit` below 1.
    """
    found = task(name)
    if limit is not None and limit < 1:
        raise ValueError(f"limit: found {limit}, expected at least 1; leave it out to train on every row.")
    if _is_dataset(source):
        data = _read_dataset(found, str(source).removeprefix("hf:"))
    else:
        data = _read_folder(found, Path(os.path.expanduser(source)))
    if limit is None or limit >= len(data.train):
        return data
    chosen = np.sort(np.random.default_rng(seed).choice(len(data.train), limit, replace=False))
    return TaskData(found, _taken(data.train, chosen), data.dev, data.skipped)


def calibration(
    examples: Examples, source: str, limit: int = CALIBRATION_TEXTS, seed: int = 0
) -> tuple[Corpus, NDArray[Any]]:
    """Distinct rows of a task as a corpus, and their labels.

    Args:
        examples: Rows; of rows with the same text the first counts.
        source: What the corpus is called.
        limit: Most rows, drawn evenly.
        seed: Of the drawing.

    Returns:
        The corpus, of pairs where the task has pairs, and the labels of its texts.
    """
    texts = examples.texts if examples.pairs is None else list(zip(examples.texts, examples.pairs, strict=True))
    first: dict[Any, int] = {}
    for row, text in enumerate(texts):
        first.setdefault(text, row)
    rows = np.array(sorted(first.values()), dtype=np.int64)
    dropped = len(texts) - len(rows)
    if len(rows) > limit:
        rows = np.sort(np.random.default_rng(seed).choice(rows, limit, replace=False))
    pairs = None if examples.pairs is None else tuple(examples.pairs[i] for i in rows)
    corpus = Corpus(tuple(examples.texts[i] for i in rows), source, 0, dropped, pairs=pairs)
    return corpus, examples.labels[rows]


def _taken(examples: Examples, chosen: NDArray[np.int64]) -> Examples:
    pairs = examples.pairs
    return Examples(
        [examples.texts[i] for i in chosen],
        None if pairs is None else [pairs[i] for i in chosen],
        examples.labels[chosen],
    )


def _is_dataset(source: str | os.PathLike[str]) -> bool:
    if not isinstance(source, str) or os.path.isdir(os.path.expanduser(source)):
        return False
    return source == "datasets" or (_DATASET_NAME.fullmatch(source) is not None and not source.startswith("."))


def _read_folder(task: Task, source: Path) -> TaskData:
    if not source.is_dir():
        raise CorpusNotFoundError(
            f"source: there is no directory {source}, expected the folder of GLUE or of {task.name}; check the path "
            "(a dataset is written 'owner/name')."
        )
    inner = sorted(p for p in source.iterdir() if p.is_dir() and _plain(p.name) == _plain(task.name))
    folder = inner[0] if inner else source
    files = {name: _file(folder, stem) for name, stem in task.dev}
    missing = [stem for name, stem in task.dev if files[name] is None]
    if missing:
        raise CorpusNotFoundError(
            f"source: {folder} has no dev set of {task.name}, expected {missing[0]}.tsv or {missing[0]}.tsv.gz there "
            f"or in a folder '{task.name}'; give the folder of GLUE's files."
        )
    dev: dict[str, Examples] = {}
    skipped = 0
    for name, path in files.items():
        assert path is not None  # noqa: S101  (refused above; for the type checker)
        dev[name], broken = _read_tsv(task, path)
        skipped += broken
        if not len(dev[name]):
            raise ValueError(f"source: {path} has no row, expected a dev set; get the file of {task.name} again.")
    train_file = _file(folder, "train")
    if train_file is None:
        return TaskData(task, _examples(task, [], []), dev, skipped)
    train, broken = _read_tsv(task, train_file)
    return TaskData(task, train, dev, skipped + broken)


def _file(folder: Path, stem: str) -> Path | None:
    return next((path for end in (".tsv", ".tsv.gz") if (path := folder / f"{stem}{end}").is_file()), None)


def _read_tsv(task: Task, path: Path) -> tuple[Examples, int]:
    """The rows, and how many broken ones were left out."""
    lines = _lines(path)
    columns = task.columns
    if columns is None:
        _, header = next(lines, (0, ""))
        columns = tuple(header.split("\t"))
    wanted = (*task.texts, task.label)
    absent = [column for column in wanted if column not in columns]
    if absent:
        raise ValueError(
            f"source: {path} has the columns {_listed(columns)}, expected {_listed(wanted)} among them; give the "
            f"official file of {task.name}."
        )
    places = [columns.index(column) for column in wanted]
    texts: list[list[str]] = []
    labels: list[float] = []
    skipped = 0
    for number, line in lines:
        fields = line.split("\t")
        if len(fields) <= max(places):
            if task.ragged:
                skipped += 1
                continue
            raise ValueError(
                f"source: line {number} of {path} has {len(fields)} fields, expected {len(columns)} separated by "
                "tabs; get the file again."
            )
        *row, label = (fields[place] for place in places)
        texts.append(row)
        labels.append(_label(task, label, f"line {number} of {path}"))
    return _examples(task, texts, labels), skipped


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers from 1; quotes are text, and only a line feed ends a line."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, raw in enumerate(file, start=1):
                line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                line = line.rstrip(b"\r\n")
                if line:
                    yield number, line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"source: line {number} of {path} is not UTF-8 at byte {error.start}, expected UTF-8; convert the file."
            ) from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"source: {path} is not whole gzip ({first_line(error)}), expected a gzip file; get it again."
            ) from None


def _label(task: Task, found: str, place: str) -> float:
    if not task.regression:
        try:
            return task.labels.index(found)
        except ValueError:
            raise ValueError(
                f"source: {place} has the label {shortened(found)}, expected {_listed(task.labels)}; give labelled "
                f"rows of {task.name}."
            ) from None
    try:
        score = float(found)
    except ValueError:
        score = math.nan
    if not 0 <= score <= MAX_SCORE:
        raise ValueError(
            f"source: {place} has the score {shortened(found)}, expected a number from 0 to {MAX_SCORE:g}; give "
            f"labelled rows of {task.name}."
        )
    return score


def _examples(task: Task, texts: Sequence[Sequence[str]], labels: Sequence[float]) -> Examples:
    kind = np.float32 if task.regression else np.int64
    pairs = [row[1] for row in texts] if len(task.texts) == 2 else None
    return Examples([row[0] for row in texts], pairs, np.array(labels, dtype=kind))


def _read_dataset(task: Task, source: str) -> TaskData:
    name = DATASET if source == "datasets" else source
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"source: {source!r} is no directory here, and reading it as a dataset needs the optional package "
            "datasets; install it with `pip install datasets`, or give the folder of GLUE's files."
        ) from error
    try:
        found = datasets.load_dataset(name, task.dataset)
    except Exception as error:  # a dataset fails in its own ways: offline, unknown name, a broken loader
        raise ValueError(
            f"source: the dataset {name}:{task.dataset} could not be read ({type(error).__name__}: "
            f"{first_line(error)}); check its name and the connection, or give the folder of GLUE's files."
        ) from error
    splits = {"train": "train", **dict(task.dataset_dev)}
    absent = [split for split in splits.values() if split not in found]
    if absent:
        raise ValueError(
            f"source: the dataset {name}:{task.dataset} has the splits {_listed(list(found))}, expected "
            f"{_listed(list(splits.values()))}; give a dataset of the form of {DATASET}."
        )
    examples = {
        ours: _of_split(task, found[split], f"{name}:{task.dataset}[{split}]") for ours, split in splits.items()
    }
    return TaskData(task, examples.pop("train"), examples)


def _of_split(task: Task, split: Any, place: str) -> Examples:
    wanted = (*task.dataset_texts, "label")
    columns = list(split.column_names)
    if any(column not in columns for column in wanted):
        raise ValueError(
            f"source: {place} has the columns {_listed(columns)}, expected {_listed(wanted)} among them; give a "
            f"dataset of the form of {DATASET}."
        )
    names = getattr(split.features["label"], "names", None)
    if names is not None and tuple(names) != task.names:
        raise ValueError(
            f"source: {place} has the labels {_listed(names)}, expected {_listed(task.names)} in this order; give a "
            f"dataset of the form of {DATASET}."
        )
    labels = list(split["label"])
    if not labels:
        raise ValueError(f"source: {place} has no row, expected some; give a dataset of the form of {DATASET}.")
    top = MAX_SCORE if task.regression else task.num_labels - 1
    for row, label in enumerate(labels):
        if label is None or not 0 <= label <= top:
            raise ValueError(
                f"source: row {row} of {place} has the label {label}, expected 0 to {top:g}; GLUE hides the labels "
                "of its test sets, so give a split that has them."
            )
    return _examples(task, list(zip(*(split[column] for column in task.dataset_texts), strict=True)), labels)


def _listed(names: Iterable[object]) -> str:
    return ", ".join(shortened(str(name)) for name in names) or "none"


# Metrics


def metrics(task: Task, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """GLUE's metrics of a task, by scikit-learn and scipy.

    A metric that its formula leaves undefined counts as 0, so that a model which always gives the same answer
    scores 0 and not NaN: Matthews' correlation and F1 as scikit-learn has it, Pearson's and Spearman's where
    predictions or labels are all equal.

    Args:
        task: The task.
        predictions: [n], numbers of labels, or scores for regression.
        labels: [n], what is right.

    Returns:
        Name -> value, in the order of `Task.metrics`.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: Shapes differ or are not [n], n is 0, or a number is not finite.
    """
    guessed, right = np.asarray(predictions), np.asarray(labels)
    if guessed.shape != right.shape or guessed.ndim != 1 or not len(guessed):
        raise ValueError(
            f"predictions: found shape {guessed.shape} beside labels of shape {right.shape}, expected the same [n] "
            "with at least one row; give one prediction a row."
        )
    if not (np.isfinite(guessed).all() and np.isfinite(right).all()):
        raise ValueError("predictions: found numbers that are not finite, expected finite ones; check the model.")
    if task.regression:
        return {name: _correlation(name, guessed, right) for name in task.metrics}
    try:
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
    except ImportError as error:
        raise ImportError(
            "metrics: GLUE's metrics need the package scikit-learn; install it with `pip install 'obce[glue]'`."
        ) from error
    formulas = {
        "accuracy": lambda: accuracy_score(right, guessed),
        "f1": lambda: f1_score(right, guessed, zero_division=0.0),
        "matthews_correlation": lambda: matthews_corrcoef(right, guessed),
    }
    return {name: float(formulas[name]()) for name in task.metrics}


def _correlation(name: str, guessed: NDArray[Any], right: NDArray[Any]) -> float:
    from scipy.stats import pearsonr, spearmanr

    if np.ptp(guessed) == 0 or np.ptp(right) == 0:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nearly constant predictions: the number is still theirs
        formula = pearsonr if name == "pearson" else spearmanr
        value = float(formula(guessed.astype(np.float64), right.astype(np.float64)).statistic)
    return value if math.isfinite(value) else 0.0


def headline(task: Task, splits: Mapping[str, Mapping[str, float]]) -> float:
    """GLUE's one number of a task: the mean over its metrics, then over its dev splits.

    Args:
        task: The task.
        splits: Name of each dev split -> what `metrics` gave there.

    Raises:
        ValueError: A split or a metric is missing.
    """
    absent = [f"{split}.{name}" for split, _ in task.dev for name in task.metrics if name not in splits.get(split, {})]
    if absent:
        raise ValueError(
            f"splits: found no {', '.join(absent)}, expected the metrics of every dev set of {task.name}; evaluate "
            "the whole task."
        )
    return float(np.mean([np.mean([splits[split][name] for name in task.metrics]) for split, _ in task.dev]))


def kl_divergence(reference_logits: ArrayLike, logits: ArrayLike) -> float:
    """Mean KL(reference || other) of the distributions that two sets of logits stand for.

    For a row with softmax p of the reference and q of the other it is sum_k p_k (log p_k - log q_k), here in
    float64 and averaged over the rows.

    Args:
        reference_logits: [n, labels] with at least two labels, usually of the dense model.
        logits: [n, labels], the same rows and columns.

    Returns:
        Nats, 0 when all rows agree.

    Raises:
        ValueError: Shapes differ or are not [n, labels], or a number is not finite.
    """
    first, second = np.asarray(reference_logits, dtype=np.float64), np.asarray(logits, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 2 or not len(first) or first.shape[1] < 2:
        raise ValueError(
            f"logits: found shape {second.shape} beside a reference of shape {first.shape}, expected the same "
            "[n, labels] with at least one row and two labels; evaluate both models on the same rows."
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("logits: found numbers that are not finite, expected finite ones; check the models' weights.")
    p, q = _log_softmax(first), _log_softmax(second)
    # rounding may leave a sum of equal distributions a little below zero
    return max(0.0, float((np.exp(p) * (p - q)).sum(axis=1).mean()))


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


# Models


class Encoded:
    """Rows of token ids, from which batches are made.

    Attributes:
        lengths: int64 [n], tokens of each row, special tokens included.
        ids: int32 [sum of lengths], the rows one after another.
        types: int8 of the same shape, 0 for the first text and 1 for the second; None if the tokenizer makes none.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        ids: NDArray[np.int32],
        types: NDArray[np.int8] | None,
        *,
        pad_id: int,
        pad_type: int,
    ) -> None:
        self.lengths = lengths
        self.ids = ids
        self.types = types
        self._starts = np.cumsum(lengths) - lengths
        self._pad_id = pad_id
        self._pad_type = pad_type

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """The rows of these numbers in this order, padded on the right to the longest of them."""
        rows = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[rows]
        columns = np.arange(lengths.max())
        real = columns < lengths[:, None]  # [b, T]
        places = (self._starts[rows, None] + columns)[real]
        inputs = {"input_ids": np.full(real.shape, self._pad_id, np.int64), "attention_mask": real.astype(np.int64)}
        inputs["input_ids"][real] = self.ids[places]
        if self.types is not None:
            inputs["token_type_ids"] = np.full(real.shape, self._pad_type, np.int64)
            inputs["token_type_ids"][real] = self.types[places]
        return Batch(rows, {name: torch.from_numpy(array) for name, array in inputs.items()})

    def batches(self, batch_tokens: int = BATCH_TOKENS, rows: NDArray[np.int64] | None = None) -> Iterator[Batch]:
        """Batches from the longest rows to the shortest.

        Args:
            batch_tokens: Most places a batch, padding included; a longer row is a batch of its own.
            rows: int64 [m], numbers of the rows to take; all of them when left out.

        Raises:
            ValueError: `batch_tokens` is below 1.
        """
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens: found {batch_tokens}, expected at least 1; give the places of a batch.")
        taken = np.arange(len(self), dtype=np.int64) if rows is None else rows
        order = taken[np.argsort(-self.lengths[taken], kind="stable")]
        first = 0
        while first < len(order):
            end = first + max(1, batch_tokens // int(self.lengths[order[first]]))
            yield self.batch(order[first:end])
            first = end


def encode(examples: Examples, tokenizer: Any, *, max_length: int = MAX_LENGTH) -> Encoded:
    """Tokenise the rows of a split; a pair becomes one row, [CLS] first [SEP] second [SEP] in BERT.

    Args:
        examples: Rows.
        tokenizer: A tokenizer of transformers with a padding token.
        max_length: Most tokens a row, special tokens included. Of a pair, the longer text loses its end first.

    Raises:
        ValueError: There is no row, the tokenizer has no padding token, or `max_length` leaves no room beside the
            special tokens or is above the tokenizer's own.
    """
    if not len(examples):
        raise ValueError("examples: found no row, expected at least one; give a split that is not empty.")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"tokenizer: {type(tokenizer).__name__} has no padding token, expected one to fill batches; set "
            "tokenizer.pad_token."
        )
    paired = examples.pairs is not None
    least = tokenizer.num_special_tokens_to_add(pair=paired) + 1 + paired
    if not least <= max_length <= tokenizer.model_max_length:
        raise ValueError(
            f"max_length: found {max_length}, expected {least} (the special tokens and one of each text) to "
            f"{tokenizer.model_max_length}, the tokenizer's own; choose one between."
        )
    lengths: list[int] = []
    ids: list[NDArray[np.int32]] = []
    types: list[NDArray[np.int8]] = []
    for start in range(0, len(examples), _CHUNK):
        texts = [part[start : start + _CHUNK] for part in (examples.texts, examples.pairs) if part is not None]
        rows = tokenizer(
            *texts, truncation=True, max_length=max_length, padding=False, return_attention_mask=False, verbose=False
        )
        lengths += map(len, rows["input_ids"])
        ids.append(np.fromiter(chain.from_iterable(rows["input_ids"]), np.int32))
        if "token_type_ids" in rows:
            types.append(np.fromiter(chain.from_iterable(rows["token_type_ids"]), np.int8))
    return Encoded(
        np.array(lengths, dtype=np.int64),
        np.concatenate(ids),
        np.concatenate(types) if types else None,
        pad_id=tokenizer.pad_token_id,
        pad_type=getattr(tokenizer, "pad_token_type_id", 0),
    )


def label_order(model: PreTrainedModel, task: Task) -> NDArray[np.int64]:
    """Which output of a model stands for which label of a task.

    The names in the model's config decide, written in capitals or not: the task's labels in words or as the files
    have them. Generic names (LABEL_0, ...) mean the task's own order.

    Args:
        model: A model with a sequence classification head.
        task: The task.

    Returns:
        int64 [labels]: `logits[:, order]` has its columns in the order of the task's labels.

    Raises:
        ValueError: The model has no such head, one of another size, or names of other labels.
    """
    kind = type(model).__name__
    if not kind.endswith("ForSequenceClassification"):
        raise ValueError(
            f"model: {kind} has no sequence classification head, expected one with {task.num_labels} outputs for "
            f"{task.name}; give it one with obce.finetune.with_head and train it."
        )
    config = model.config
    if config.num_labels != task.num_labels:
        raise ValueError(
            f"model: {kind} has {config.num_labels} outputs, expected {task.num_labels} for {task.name}; give a model "
            "that was fine-tuned on this task."
        )
    identity = np.arange(task.num_labels, dtype=np.int64)
    if task.regression:
        return identity
    numbers: Any = config.id2label or {}
    named = {int(number): str(name) for number, name in numbers.items()}
    if _generic(named) and config.label2id:
        numbers = config.label2id
        named = {int(number): str(name) for name, number in numbers.items()}
    if _generic(named):
        return identity
    written = [_plain(named.get(number, "")) for number in range(task.num_labels)]
    for names in (task.names, task.labels):
        wanted = [_plain(name) for name in names]
        if sorted(wanted) == sorted(written):
            return np.array([written.index(name) for name in wanted], dtype=np.int64)
    raise ValueError(
        f"model: its config names the labels {_listed(named.values())}, expected {_listed(task.names)} for "
        f"{task.name}; set config.id2label to the task's labels in the order of the model's outputs."
    )


def model_labels(model: PreTrainedModel, task: Task, labels: NDArray[Any]) -> NDArray[Any]:
    """Labels of a task's rows, [rows], as the loss of a model's head takes them.

    Returns:
        int64 numbers of the model's outputs, which `label_order` finds; float32 for regression.

    Raises:
        ValueError: As `label_order`.
    """
    order = label_order(model, task)
    return labels.astype(np.float32) if task.regression else order[labels]


def _generic(named: Mapping[int, str]) -> bool:
    return all(name.upper() == f"LABEL_{number}" for number, name in named.items())


def logits(
    model: PreTrainedModel, rows: Encoded, *, batch_tokens: int = BATCH_TOKENS, only: NDArray[np.int64] | None = None
) -> NDArray[np.float32]:
    """Logits of a model in eval mode; its training flags are put back.

    Args:
        model: A model with a sequence classification head.
        rows: Encoded rows.
        batch_tokens: Most places a batch, padding included.
        only: int64 [m], numbers of the rows to run; the others stay 0. All when left out.

    Returns:
        float32 [n, labels], columns as the model has them.
    """
    device = next(model.parameters()).device
    result = np.zeros((len(rows), int(model.config.num_labels or 1)), dtype=np.float32)
    with eval_mode(model), torch.no_grad():
        for batch in rows.batches(batch_tokens, only):
            inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
            result[batch.indices] = model(**padded_as_read(model, inputs)).logits.float().cpu().numpy()
    return result


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    data: TaskData,
    *,
    max_length: int = MAX_LENGTH,
    batch_tokens: int = BATCH_TOKENS,
) -> Evaluation:
    """Score a model on the dev splits of a task.

    Args:
        model: A model with a sequence classification head of the task's size; never changed.
        tokenizer: Its tokenizer.
        data: The task's rows.
        max_length: Most tokens a row, special tokens included.
        batch_tokens: Most places a batch, padding included.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: The head does not fit the task (see `label_order`), `max_length` is more than the model or the
            tokenizer takes, or the model's logits are not finite.
    """
    task = data.task
    order = label_order(model, task)
    usable_max_length(model, tokenizer, max_length)
    splits: dict[str, SplitResult] = {}
    for name, examples in data.dev.items():
        found = logits(model, encode(examples, tokenizer, max_length=max_length), batch_tokens=batch_tokens)[:, order]
        unusable = np.flatnonzero(~np.isfinite(found).all(axis=1))
        if len(unusable):
            raise ValueError(
                f"model: the logits of row {unusable[0]} of {task.name}'s {name} set are not finite ({len(unusable)} "
                f"of {len(found)} rows), expected finite numbers; check the model's weights and dtype."
            )
        wide = found.astype(np.float64)
        if task.regression:
            predictions = wide[:, 0]
            loss = float(np.mean((predictions - examples.labels) ** 2))
        else:
            predictions = found.argmax(axis=1)
            loss = float(-_log_softmax(wide)[np.arange(len(wide)), examples.labels].mean())
        splits[name] = SplitResult(metrics(task, predictions, examples.labels), loss, np.ascontiguousarray(found))
    return Evaluation(splits, headline(task, {name: result.metrics for name, result in splits.items()}))
