"""Train a model on a task of GLUE, with or without a teacher to follow, or on plain texts by the teacher alone.

transformers' Trainer steps; the order of the rows is fixed here, in advance and for the whole training, so that
a training which was killed goes on with the very batches that were to come. With a directory it keeps

    finetune.json    what was asked, with hashes, and the losses once it is finished
    checkpoints/     what a killed training goes on from; gone when it is finished
    model/           the trained model and its tokenizer

Distillation: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015); of hidden states: Romero
et al., "FitNets" (2015).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from obce import modeling_obce
from obce.capture import eval_mode, padded_as_read
from obce.corpus import Batch, corpus_of
from obce.device import upload
from obce.effects import check_gradients, last_states, reading_of, what_is_read
from obce.export import carry_pooling, pooling_files
from obce.files import LOCK, PARTIAL, flush, locked, whole, write_text
from obce.glue import MAX_LENGTH, Encoded, Examples, Task, TaskData, encode, label_order, logits
from obce.modeling_obce import NarrowModel
from obce.modeling_obce_mapped import class_of, classes_of
from obce.sites import MAPPED, base_model, layout_of, quiet_transformers, usable_max_length

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from obce.corpus import Corpus

Progress = Callable[[int, int], None]

_FORMAT = "obce-finetune"
_FORMAT_VERSION = 1
_WHOLE = "whole"  # in a checkpoint: every file of it is on disk
_GROUP = 50  # batches whose rows are sorted by length together, as transformers' length-grouped sampler has it
_VARIANCE_ROWS = 450  # of the teacher: enough to say how far its vectors lie apart
_LOGGED = 100  # losses of a training, about

# Words for what decides the bits of a training and is no setting.
_OTHER = {
    "task": "another task",
    "data": "other training rows (texts, labels or tokenizer)",
    "model": "another model",
    "teacher": "another teacher",
}


@dataclass(frozen=True)
class Settings:
    """How to train. The defaults are those of BERT's paper for a dense model.

    Attributes:
        epochs: Passes over the training rows.
        learning_rate: Peak of the schedule, which rises linearly from 0 and falls linearly to 0.
        batch_size: Rows a step.
        max_length: Most tokens a row, special tokens included.
        warmup_ratio: Share of the steps in which the learning rate rises.
        weight_decay: AdamW's, of all weights but biases and LayerNorms.
        max_steps: Steps in all, instead of `epochs`.
        seed: Decides the order of the rows and the dropout.
        distill: Weight of the teacher's loss, from 0 (labels alone) to 1 (teacher alone).
        temperature: By which logits are divided in the teacher's loss.
        precision: "bfloat16" runs forward passes in mixed precision; weights and AdamW stay in float32.
    """

    epochs: int = 3
    learning_rate: float = 2e-5
    batch_size: int = 32
    max_length: int = MAX_LENGTH
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_steps: int | None = None
    seed: int = 0
    distill: float = 0.0
    temperature: float = 2.0
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name, least, most in (
            ("epochs", 1, math.inf),
            ("batch_size", 1, math.inf),
            ("max_length", 1, math.inf),
            ("max_steps", 1, math.inf),
            ("warmup_ratio", 0, 1),
            ("weight_decay", 0, math.inf),
            ("seed", 0, (1 << 32) - 1),
            ("distill", 0, 1),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                bound = f"at least {least}" if most == math.inf else f"{least} to {most}"
                raise ValueError(f"{name}: found {value}, expected {bound}; choose another.")
        for name in ("learning_rate", "temperature"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: found {value}, expected a number above 0; choose another.")
        if self.precision not in {"float32", "bfloat16"}:
            raise ValueError(f"precision: found {self.precision!r}, expected float32 or bfloat16; choose one of them.")


DISTILLING = Settings(learning_rate=3e-4, weight_decay=0.0)
"""What `distill` does if nothing else is said: a model that was cut and repaired is near, and its texts are few."""


@dataclass(frozen=True)
class History:
    """How a training went.

    Attributes:
        steps: Steps at which the loss was noted, the last one among them.
        losses: Mean loss of the steps since the one before.
        rows: Rows that were trained on, over all steps.
        seconds: Wall-clock seconds of the steps, over all parts of a training that was taken up again.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    rows: int
    seconds: float

    @property
    def rows_per_second(self) -> float:
        """Rows trained on in a second."""
        return self.rows / self.seconds


def with_head(encoder: PreTrainedModel, task: Task, seed: int = 0) -> PreTrainedModel:
    """A copy of an encoder with a fresh classification head for a task.

    The head depends on the seed and the hidden size alone, so that a dense encoder and its pruned form start
    with the same one. The pooler is the encoder's own where it has one, else it is part of the fresh head.

    Args:
        encoder: An encoder of a known family or a model pruned by obce, with any head or none; never changed. One with
            a sequence classification head of the task is copied as it is.
        task: The task; its labels are written to the config.
        seed: Which head.

    Returns:
        The family's `...ForSequenceClassification`, of transformers or of obce, in eval mode, with the device and dtype
        of the encoder.

    Raises:
        ValueError: The model is of another family or reads pictures, or has a sequence classification head that does
            not fit.
    """
    if type(encoder).__name__.endswith("ForSequenceClassification"):
        label_order(encoder, task)
        copied: PreTrainedModel = copy.deepcopy(encoder).eval()
        return copied
    body = base_model(encoder)
    if layout_of(body).pictures:  # refuses other families with the reason, too
        raise ValueError(
            f"encoder is a {type(body).__name__}, which reads pictures, expected one that reads texts, as {task.name} "
            "has them: train it on pictures with transformers' own Trainer."
        )
    ours = isinstance(body, NarrowModel)
    name = type(body).__name__.removesuffix("Model") + "ForSequenceClassification"
    kind: Any = getattr(modeling_obce if ours else transformers, name, None)
    if body.config.model_type == MAPPED:
        name = name.removeprefix("Obce")
        family: str = body.config.mapped["family"]
        kind = class_of(family, name) if name in classes_of(family) else None
    if kind is None:
        raise ValueError(
            f"encoder: transformers has no {name}, expected a class of its own such as BertModel or RobertaModel; load "
            "the encoder with one of these."
        )
    config = copy.deepcopy(body.config)
    config.num_labels = task.num_labels
    config.problem_type = "regression" if task.regression else "single_label_classification"
    if not task.regression:
        config.id2label = dict(enumerate(task.names))
        config.label2id = {name: number for number, name in enumerate(task.names)}
    with torch.random.fork_rng(devices=[]):
        model = kind(config)
    own = base_model(model)
    missing, unexpected = own.load_state_dict(body.state_dict(), strict=False)
    unknown = [name for name in [*missing, *unexpected] if not name.startswith("pooler.")]
    if unknown:
        raise ValueError(
            f"encoder: its weight '{unknown[0]}' is not as in {type(body).__name__}, expected a plain one; merge or "
            "remove adapters first."
        )
    of_body = {id(module) for module in own.modules()}
    fresh = [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in of_body]
    if missing:
        fresh.append(cast(nn.Linear, own.get_submodule("pooler.dense")))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for linear in fresh:
            linear.weight.normal_(0.0, config.initializer_range, generator=generator)
            if linear.bias is not None:
                linear.bias.zero_()
    weight = next(body.parameters())
    made: PreTrainedModel = model.to(weight.device, weight.dtype).eval()
    return made


def finetune(
    model: PreTrainedModel,
    tokenizer: Any,
    data: TaskData,
    settings: Settings | None = None,
    *,
    teacher: PreTrainedModel | None = None,
    out: str | os.PathLike[str] | None = None,
    save_every: int | None = None,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, History]:
    """Train a copy of a model on a task's training rows.

    The same model, rows and settings give the same weights on the same machine and number of threads, bit for
    bit on a CPU, also if the training was killed and taken up again in between.

    With a teacher, the loss of a row is `(1 - distill) * task + distill * T^2 KL(teacher || model)`, both softened
    by the temperature T; for regression the teacher's part is the squared difference. The teacher runs once over
    the rows, in eval mode.

    Args:
        model: A model with a sequence classification head, see `with_head`; never changed.
        tokenizer: Its tokenizer.
        data: The task's rows; the dev splits are not looked at.
        settings: How to train.
        teacher: A model with a head for the same task on the same device; needed if `distill` is above 0.
        out: Directory for checkpoints and the trained model. A training that stands there unfinished is gone on
            with, a finished one is given back.
        save_every: Steps between two checkpoints; an epoch when left out. Needs `out`.
        progress: Called with (steps done, steps in all) after each step.

    Returns:
        The trained model, float32, in eval mode on the device of `model`, and how it went.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: No training rows, a head that does not fit the task, a teacher that is missing, superfluous or
            elsewhere, a loss that is not finite, or a training in `out` that differs from this one or goes on.
    """
    settings = settings or Settings()
    task = data.task
    order = label_order(model, task)
    usable_max_length(model, tokenizer, settings.max_length)
    _check(model, data, settings, teacher)
    rows = encode(data.train, tokenizer, max_length=settings.max_length)
    plan = _plan(rows.lengths, settings)

    def prepared() -> tuple[Collate, Loss]:
        # the model's own outputs are trained: labels and teacher are put in its order, not the other way round
        labels = torch.from_numpy(data.train.labels if task.regression else order[data.train.labels])
        followed = None
        if teacher is not None:
            used = np.unique(np.concatenate(plan))
            said = np.empty((len(rows), task.num_labels), dtype=np.float32)
            said[:, order] = logits(teacher, rows, only=used)[:, label_order(teacher, task)]
            followed = torch.from_numpy(said)

        def collated(indices: list[int]) -> dict[str, torch.Tensor]:
            batch = rows.batch(indices)
            inputs = {**batch.inputs, "labels": labels[batch.indices]}
            return inputs if followed is None else {**inputs, "followed": followed[batch.indices]}

        def loss(trained: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            given, said = inputs.pop("labels"), inputs.pop("followed", None)
            with _mixed(settings, given.device):
                outputs = trained(**padded_as_read(model, inputs)).logits
            outputs = outputs.float()
            found = _task_loss(outputs, given)
            if said is None:
                return found
            weight = settings.distill
            return (1 - weight) * found + weight * _teacher_loss(outputs, said, settings.temperature)

        return collated, loss

    asked = {"task": task.name, "data": _rows_hash(rows, data.train.labels)}
    course = _Course(model, teacher, tokenizer, len(rows), plan, asked, prepared)
    return _trained(course, settings, out, save_every, progress)


def distill(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Corpus | Sequence[str] | Sequence[tuple[str, str]],
    settings: Settings | None = None,
    *,
    teacher: PreTrainedModel,
    read: str = "auto",
    out: str | os.PathLike[str] | None = None,
    save_every: int | None = None,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, History]:
    """Train a copy of a cut model on plain texts to say what the dense one says; there are no labels.

    The loss of a batch is the squared distance of what is read from what the teacher says, as a share of its variance
    over texts, and the same of the last hidden states of all tokens. Dropout is off. Bits, and what `out` keeps, are as
    in `finetune`.

    Args:
        model: A model that was cut, with or without a head; never changed.
        tokenizer: Its tokenizer.
        texts: A corpus, or texts, or pairs of them.
        settings: How to train (default: `DISTILLING`, and as many tokens as texts are scored with); `distill` and
            `temperature` are not looked at.
        teacher: The dense model, on the same device, with the same vocabulary, hidden size and head.
        read: What is read, as in `obce.sensitivity`; `"auto"`: what the teacher's head takes from the encoder.
        out: As in `finetune`.
        save_every: As in `finetune`.
        progress: As in `finetune`.

    Returns:
        The trained model, float32, in eval mode on the device of `model`, and how it went; losses of 0 say that nothing
        is lost, of 1 or 2 that everything is.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: There are no texts, models that read pictures, a teacher elsewhere or of other dimensions, a `read`
            that the models do not have, a loss that is not finite, or a training in `out` that differs from this one or
            goes on.
    """
    _check_pair(model, teacher)
    if settings is None:
        settings = replace(DISTILLING, max_length=usable_max_length(teacher, tokenizer))
    settings = replace(settings, distill=1.0)
    if (pooled := _pooled(model)) is not None:
        pooling_files(pooled)  # refused before the training, not after it
    read = reading_of(teacher, read)
    length = usable_max_length(teacher, tokenizer, settings.max_length)
    rows = encode(_examples(texts), tokenizer, max_length=length)
    plan = _plan(rows.lengths, settings)
    device = next(model.parameters()).device

    def said(by: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """What is read, [b, d], and the last hidden states of all tokens, [tokens, hidden]: one, where it is both."""
        states: list[torch.Tensor] = []
        handle = base_model(by).register_forward_hook(lambda _m, _args, told: states.append(last_states(by, told)))
        try:
            with _mixed(settings, device):
                vectors = what_is_read(by, inputs, Batch(np.arange(len(inputs["input_ids"])), inputs), read)
        finally:
            handle.remove()
        every = states[0].float()[inputs["attention_mask"].bool()]
        return [every] if read == "tokens" else [vectors.float(), every]

    def prepared() -> tuple[Collate, Loss]:
        some = np.unique(np.linspace(0, len(rows) - 1, _VARIANCE_ROWS).astype(np.int64))
        with eval_mode(teacher), torch.no_grad():
            batches = (
                {name: upload(one, device) for name, one in batch.inputs.items()} for batch in rows.batches(rows=some)
            )
            parts = [torch.cat(part) for part in zip(*(said(teacher, inputs) for inputs in batches), strict=True)]
        # of one text what is read has none
        spread = [float((part - part.mean(0)).square().sum(1).mean()) or 1.0 for part in parts]

        def loss(trained: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            with eval_mode(teacher), torch.no_grad():
                targets = said(teacher, inputs)
            trained.eval()  # the teacher has no dropout either
            lost = [
                (now - then).square().sum(1).mean() / whole
                for now, then, whole in zip(said(trained, inputs), targets, spread, strict=True)
            ]
            return torch.stack(lost).sum()

        return lambda indices: rows.batch(indices).inputs, loss

    asked = {"read": read, "data": _rows_hash(rows)}
    course = _Course(model, teacher, tokenizer, len(rows), plan, asked, prepared)
    return _trained(course, settings, out, save_every, progress)


def _examples(texts: Any) -> Examples:
    """Rows without labels."""
    pairs = isinstance(texts, Sequence) and len(texts) > 0 and isinstance(texts[0], tuple)
    entries: Any = texts if pairs else corpus_of(texts, pictures=False).entries()
    paired = isinstance(entries[0], tuple)
    firsts, seconds = zip(*entries, strict=True) if paired else (entries, ())
    return Examples(list(firsts), list(seconds) if paired else None, np.empty(0, np.float32))


def _check_pair(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    for name, one in (("model", model), ("teacher", teacher)):
        if layout_of(one).pictures:
            raise ValueError(
                f"{name} is a {type(one).__name__}, which reads pictures, expected one that reads texts: train it with "
                "transformers' own Trainer."
            )
    found, wanted = ((one.config.vocab_size, one.config.hidden_size) for one in (teacher, model))
    if found != wanted:
        raise ValueError(
            f"teacher: found a vocabulary and hidden size of {found}, expected {wanted}, those of the model; give the "
            "model that it was cut from."
        )
    _check_device(model, teacher)


def _check_device(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    here, there = next(model.parameters()).device, next(teacher.parameters()).device
    if here != there:
        raise ValueError(f"teacher: found it on {there}, expected {here}, where the model is; move it there.")


def _check(
    model: PreTrainedModel,
    data: TaskData,
    settings: Settings,
    teacher: PreTrainedModel | None,
) -> None:
    if not len(data.train):
        raise ValueError(
            f"data: {data.task.name} has no training rows, expected some; put its train.tsv beside the dev set."
        )
    if (teacher is None) != (settings.distill == 0):
        found = f"a distill of {settings.distill:g} and {'no' if teacher is None else 'a'} teacher"
        raise ValueError(f"teacher: found {found}, expected both or neither; give the teacher and its weight.")
    if teacher is not None:
        try:
            label_order(teacher, data.task)
        except ValueError as error:
            raise ValueError(f"teacher: {str(error).removeprefix('model: ')}") from None
        _check_device(model, teacher)


# The training

Collate = Callable[[list[int]], dict[str, torch.Tensor]]
Loss = Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Course:
    """What a training is made of.

    Attributes:
        model: Of which a copy is trained.
        tokenizer: To be saved beside it.
        rows: How many there are.
        plan: The rows of every step.
        asked: What decides its bits, beside the models and the settings.
        prepared: Called once, before the first step: what makes a batch's inputs, and its loss.
    """

    model: PreTrainedModel
    teacher: PreTrainedModel | None
    tokenizer: Any
    rows: int
    plan: Sequence[NDArray[np.int64]]
    asked: Mapping[str, Any]
    prepared: Callable[[], tuple[Collate, Loss]]


def _trained(
    course: _Course,
    settings: Settings,
    out: str | os.PathLike[str] | None,
    save_every: int | None,
    progress: Progress | None,
) -> tuple[PreTrainedModel, History]:
    """The trained copy and how it went, with all that `out` is for."""
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "training: transformers' Trainer needs the package accelerate; install it with `pip install 'obce[glue]'`."
        ) from error
    if save_every is not None and (out is None or save_every < 1):
        raise ValueError(f"save_every: found {save_every}, expected at least 1, and `out` to save to; give both.")
    model, plan = course.model, course.plan
    check_gradients(model)
    device = next(model.parameters()).device
    trained = copy.deepcopy(model).float()
    folder = None if out is None else Path(out)
    if folder is not None:
        _refuse_other(folder)
        asked = _asked(course, settings)
        history = _finished(folder, asked, trained)  # which is read whoever may write here
        if history is not None:
            return trained.eval(), history
    with nullcontext() if folder is None else locked(folder):
        if folder is not None:
            history = _finished(folder, asked, trained)  # by another process since
            if history is not None:
                return trained.eval(), history
            _write_json(folder / "finetune.json", {"asked": asked})

        with _left_alone(), tempfile.TemporaryDirectory(prefix="obce-finetune-") as temporary:
            checkpoints = Path(temporary) if folder is None else folder / "checkpoints"
            saving = None if folder is None else save_every or -(-course.rows // settings.batch_size)
            watch = _Watch(len(plan), progress, _whole_checkpoint(checkpoints))
            trainer = _Steps(trained, _arguments(settings, checkpoints, plan, device, saving), watch, course)
            trainer.train(resume_from_checkpoint=watch.resumed)
            history = watch.history(trainer.state.log_history, sum(map(len, plan)))
        trained.to(device).eval()
        if folder is not None:
            _write(folder, asked, trained, course.tokenizer, history)
    return trained, history


def _mixed(settings: Settings, device: torch.device) -> torch.autocast:
    """The precision of forward passes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16")


def steps_of(rows: int, settings: Settings) -> int:
    """Steps that a training on so many rows takes."""
    return settings.max_steps or settings.epochs * -(-rows // settings.batch_size)


def _plan(lengths: NDArray[np.int64], settings: Settings) -> list[NDArray[np.int64]]:
    """The rows of every step: each epoch in another order, rows of similar length together."""
    size = settings.batch_size
    steps = steps_of(len(lengths), settings)
    plan: list[NDArray[np.int64]] = []
    epoch = 0
    while len(plan) < steps:
        generator = np.random.default_rng([settings.seed, epoch])
        order = generator.permutation(len(lengths))
        batches: list[NDArray[np.int64]] = []
        for start in range(0, len(order), _GROUP * size):
            group = order[start : start + _GROUP * size]
            group = group[np.argsort(-lengths[group], kind="stable")]
            batches += [group[first : first + size] for first in range(0, len(group), size)]
        plan += [batches[i] for i in generator.permutation(len(batches))]
        epoch += 1
    return plan[:steps]


def _arguments(
    settings: Settings, folder: Path, plan: Sequence[NDArray[np.int64]], device: torch.device, saving: int | None
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=len(plan),
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        # as a number of steps: the name of the share has changed between versions
        warmup_steps=math.ceil(settings.warmup_ratio * len(plan)),
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        use_cpu=device.type == "cpu",
        logging_steps=max(1, len(plan) // _LOGGED),
        logging_nan_inf_filter=False,  # a loss that is not finite is an error here, not left out
        save_strategy="no" if saving is None else "steps",
        save_steps=saving or len(plan),
        save_total_limit=2,  # the last but one stands until the last is whole
        report_to="none",
        disable_tqdm=True,
    )


class _Watch(TrainerCallback):
    """Tells how far a training is, and keeps what it said."""

    def __init__(self, steps: int, progress: Progress | None, resumed: str | None) -> None:
        self.steps = steps
        self.progress = progress
        self.resumed = resumed
        self.before = 0.0 if resumed is None else float((Path(resumed) / _WHOLE).read_text())
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.start

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # the sum of losses since the last note is not part of a checkpoint
        control.should_log |= control.should_save or state.global_step == self.steps
        if self.progress is not None:
            self.progress(state.global_step, self.steps)

    def on_log(self, args: Any, state: Any, control: Any, **said: Any) -> None:
        if not math.isfinite(said["logs"].get("loss", 0.0)):
            raise ValueError(
                f"learning_rate: the loss is not finite before step {state.global_step}, expected a finite one; choose "
                "a lower learning rate, or check the model's weights."
            )

    def history(self, notes: Sequence[Mapping[str, Any]], rows: int) -> History:
        losses = {int(note["step"]): float(note["loss"]) for note in notes if "loss" in note}
        return History(tuple(losses), tuple(losses.values()), rows, self.seconds)


class _Steps(Trainer):
    """transformers' Trainer on a plan of batches, with the losses of this module."""

    def __init__(self, model: PreTrainedModel, arguments: TrainingArguments, watch: _Watch, course: _Course) -> None:
        # several devices would each be given a part of a batch, whose rows are planned for one
        arguments._n_gpu = min(1, arguments.n_gpu)
        super().__init__(model=model, args=arguments, train_dataset=range(course.rows), callbacks=[watch])
        for callback in [c for c in self.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
            self.remove_callback(callback)
        self.watch = watch
        self.course = course
        self.collated, self.loss = course.prepared()

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(
            range(self.course.rows),  # type: ignore[arg-type]  # a sequence is all that a loader needs
            batch_sampler=self.course.plan,  # type: ignore[arg-type]  # any iterable of lists of indices
            collate_fn=self.collated,
        )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        del return_outputs, num_items_in_batch  # asked for in evaluation and gradient accumulation alone
        return self.loss(model, inputs)

    def floating_point_ops(self, _inputs: Any) -> int:
        return 0  # counting the parameters at every step is a part of a small model's time

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        for file in folder.iterdir():
            flush(file)
        (folder / _WHOLE).write_text(repr(self.watch.seconds))
        flush(folder / _WHOLE)


def _task_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if labels.is_floating_point():
        return functional.mse_loss(outputs[:, 0], labels)
    return functional.cross_entropy(outputs, labels)


def _teacher_loss(outputs: torch.Tensor, followed: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL of the softened distributions, mean over the rows; squared difference of a single output."""
    if outputs.shape[1] == 1:
        return functional.mse_loss(outputs, followed)
    soft, target = (functional.log_softmax(part / temperature, dim=1) for part in (outputs, followed))
    return temperature**2 * functional.kl_div(soft, target, reduction="batchmean", log_target=True)


@contextmanager
def _left_alone() -> Iterator[None]:
    """Trainer seeds every generator of the process and talks: both are as before afterwards."""
    states = random.getstate(), np.random.get_state()
    try:
        with quiet_transformers(), torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


# The directory


def _asked(course: _Course, settings: Settings) -> dict[str, Any]:
    return {
        **course.asked,
        "model": _weights_hash(course.model),
        "teacher": None if course.teacher is None else _weights_hash(course.teacher),
        **asdict(settings),
    }


def _rows_hash(rows: Encoded, *beside: NDArray[Any]) -> str:
    """Fingerprint of tokenised rows, and of what goes with them."""
    parts: list[NDArray[Any]] = [rows.lengths, rows.ids, *beside]
    parts += [] if rows.types is None else [rows.types]
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(f"{part.dtype}{part.shape}".encode())
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def _weights_hash(model: PreTrainedModel) -> str:
    """Fingerprint of all weights and the names of the labels; unlike `obce.sites.model_hash`, heads are in it."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{type(model).__name__}\0{sorted((model.config.id2label or {}).items())}\0".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _refuse_other(folder: Path) -> None:
    if (folder / "finetune.json").is_file() or not folder.exists():
        return
    if not folder.is_dir() or any(not path.name.startswith((PARTIAL, LOCK)) for path in folder.iterdir()):
        raise ValueError(
            f"out: '{folder}' holds something other than a fine-tuning, expected a new directory; choose another."
        )


def _finished(folder: Path, asked: dict[str, Any], model: PreTrainedModel) -> History | None:
    """What a finished training in the folder said, whose weights the model gets; refuses another training."""
    file = folder / "finetune.json"
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if (record["format"], record["version"]) != (_FORMAT, _FORMAT_VERSION):
            raise ValueError(f"format {record['format']} {record['version']}")
        before: dict[str, Any] = record["asked"]
        history, found = record.get("history"), None
        if history is not None:
            steps, losses = tuple(history["steps"]), tuple(history["losses"])
            found = History(steps, losses, history["rows"], history["seconds"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"out: '{file}' was not written by this version of obce ({error}), expected a fine-tuning's own; choose a "
            "new directory."
        ) from error
    for name in [*asked, *before]:
        if before.get(name) != asked.get(name):
            differs = _OTHER.get(name, f"{name} {before.get(name)}, not {asked.get(name)}")
            raise ValueError(
                f"out: '{folder}' holds a fine-tuning with {differs}, expected the same one; choose a new directory."
            )
    if found is not None:
        _load(model, folder / "model")
    return found


def _whole_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that is whole; those that are not are removed, so that none of them is ever read."""
    whole = None
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in found:
        if (path / _WHOLE).is_file() and (path / _WHOLE).read_text():
            whole = str(path)
        else:
            shutil.rmtree(path)
    return whole


def _write(folder: Path, asked: dict[str, Any], model: PreTrainedModel, tokenizer: Any, history: History) -> None:
    # a model that was written before the process was killed is of the same bits, but may not be finished
    with whole(folder / "model") as partial, quiet_transformers():
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if (pooled := _pooled(model)) is not None:
            carry_pooling(pooled, partial)
    _write_json(folder / "finetune.json", {"asked": asked, "history": asdict(history)})
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _pooled(model: PreTrainedModel) -> Path | None:
    """Directory of sentence-transformers that a bare encoder was loaded from."""
    source = Path(str(model.config.name_or_path or ""))
    return source if model is base_model(model) and (source / "modules.json").is_file() else None


def _write_json(file: Path, record: dict[str, Any]) -> None:
    text = json.dumps({"format": _FORMAT, "version": _FORMAT_VERSION, **record}, indent=1)
    write_text(file, text + "\n")


def _load(model: PreTrainedModel, folder: Path) -> None:
    """Puts saved weights into a model of the same shape, whose memory is aligned as torch allocates it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"out: the trained model in '{folder}' is missing or damaged, expected the one that was saved; remove "
            f"'{folder.parent}' and train again."
        ) from error
