"""Fine-tuning: it learns, it repeats itself bit for bit, it goes on where it was killed, and it follows a teacher."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from obce import finetune as module
from obce.files import locked
from obce.finetune import History, Settings, distill, finetune, with_head
from obce.glue import TASKS, Examples, TaskData, encode, evaluate, logits
from obce.modeling_obce import ObceBertForSequenceClassification, ObceBertModel
from obce.plan import plan
from obce.prune import prune
from obce.scoring import score
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)

from tiny import make_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUICK = Settings(max_length=64, learning_rate=4e-3, batch_size=16, epochs=6)


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def separable(name: str, n: int = 64) -> TaskData:
    """Rows whose label stands in one of their words."""
    found = TASKS[name]
    generator = random.Random(0)  # noqa: S311  (test data)
    colours = ["red", "green", "blue"]
    filler = ["the", "king", "of", "music", "city", "stone"]
    numbers = [i % max(2, found.num_labels) for i in range(n)]
    texts = [
        " ".join([*generator.choices(filler, k=generator.randint(1, 9)), *[colours[number]] * 3]) for number in numbers
    ]
    labels = np.array(numbers, np.float32) * 3 if found.regression else np.array(numbers)
    examples = Examples(texts, ["a river"] * n if len(found.texts) == 2 else None, labels)
    return TaskData(found, examples, {split: examples for split, _ in found.dev})


def message(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match=r"^[a-z_]+: found |^data: |^out: |^learning_rate: |^encoder: ") as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


# Heads


@pytest.mark.parametrize("name", ["CoLA", "MNLI", "STS-B"])
def test_a_head_has_the_encoders_weights_and_the_tasks_labels(name: str, tiny_bert: BertModel) -> None:
    before, state = weights(tiny_bert), torch.random.get_rng_state()
    model = with_head(tiny_bert, TASKS[name], seed=3)
    assert type(model) is BertForSequenceClassification
    assert same(weights(model.bert), before)
    assert same(weights(tiny_bert), before)
    assert tiny_bert.config.num_labels == 2
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.classifier.weight.shape == (TASKS[name].num_labels, 32)
    assert not model.training
    if name == "STS-B":
        assert model.config.problem_type == "regression"
    else:
        assert list(model.config.id2label.values()) == list(TASKS[name].names)
        assert list(model.config.label2id) == list(TASKS[name].names)
    again, other = with_head(tiny_bert, TASKS[name], seed=3), with_head(tiny_bert, TASKS[name], seed=4)
    assert same(weights(again), weights(model))
    assert not torch.equal(other.classifier.weight, model.classifier.weight)


def test_without_a_pooler_a_fresh_one_comes_with_the_head(tiny_bert: BertModel) -> None:
    masked = BertForMaskedLM(tiny_bert.config).eval()
    model = with_head(masked, TASKS["RTE"])
    assert torch.equal(
        model.bert.encoder.layer[0].output.dense.weight, masked.bert.encoder.layer[0].output.dense.weight
    )
    torch.rand(7)  # the seed alone decides
    assert same(weights(with_head(masked, TASKS["RTE"]).bert.pooler), weights(model.bert.pooler))
    assert float(model.bert.pooler.dense.weight.std()) == pytest.approx(masked.config.initializer_range, rel=0.1)
    half = with_head(masked.bfloat16(), TASKS["RTE"])
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_a_pruned_encoder_starts_with_the_head_of_the_dense_one(
    tiny_bert: BertModel, tiny_tokenizer: Any, texts: list[str], tmp_path: Path
) -> None:
    scores = score(tiny_bert, tiny_tokenizer, texts[:40], max_length=64)
    pruned = prune(tiny_bert, plan(scores, tiny_bert, keep=0.5), repair="none")
    assert isinstance(pruned, ObceBertModel)
    model, dense = with_head(pruned, TASKS["MNLI"]), with_head(tiny_bert, TASKS["MNLI"])
    assert type(model) is ObceBertForSequenceClassification
    assert torch.equal(model.classifier.weight, dense.classifier.weight)
    data = separable("MNLI", 32)
    settings = replace(QUICK, max_steps=2)
    trained, history = finetune(model, tiny_tokenizer, data, settings, out=tmp_path / "out")
    assert type(trained) is ObceBertForSequenceClassification
    assert len(history.losses) == 2
    before, layer = pruned.encoder.layer[0], trained.bert.encoder.layer[0]
    assert not torch.equal(layer.output.dense.weight, before.output.dense.weight)
    found, _ = finetune(model, tiny_tokenizer, data, settings, out=tmp_path / "out")
    assert same(weights(found), weights(trained))
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert type(opened) is ObceBertForSequenceClassification
    assert same(weights(opened), weights(trained))


def test_a_head_of_the_task_is_copied_and_another_refused(tiny_bert: BertModel) -> None:
    model = with_head(tiny_bert, TASKS["RTE"])
    again = with_head(model, TASKS["RTE"], seed=7)
    assert again is not model
    assert same(weights(again), weights(model))
    with pytest.raises(ValueError, match=r"has 2 outputs, expected 3 for MNLI"):
        with_head(model, TASKS["MNLI"])
    with pytest.raises(ValueError, match="model is a Linear of the family None, expected an encoder"):
        with_head(torch.nn.Linear(2, 2), TASKS["RTE"])  # type: ignore[arg-type]


# Training


@pytest.mark.parametrize(("name", "precision"), [("SST-2", "float32"), ("SST-2", "bfloat16"), ("STS-B", "float32")])
def test_it_learns_and_leaves_what_it_was_given(
    name: str, precision: Any, tiny_bert: BertModel, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = with_head(tiny_bert, TASKS[name]), separable(name)
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(12345)
    before, states = weights(model), (torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    seen: list[tuple[int, int]] = []
    settings = replace(QUICK, precision=precision)
    trained, history = finetune(
        model, tiny_tokenizer, data, settings, progress=lambda done, total: seen.append((done, total))
    )
    assert same(weights(model), before)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert not trained.training
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}
    assert seen == [(i + 1, 24) for i in range(24)]
    assert history.steps == tuple(range(1, 25))
    assert history.rows == 6 * 64
    assert np.mean(history.losses[-5:]) < 0.3 * np.mean(history.losses[:5])
    scored = evaluate(trained, tiny_tokenizer, data, max_length=64)
    assert scored.headline > 0.9
    assert scored.headline > evaluate(model, tiny_tokenizer, data, max_length=64).headline + 0.2
    assert capsys.readouterr() == ("", "")


def test_the_loss_is_the_models_own(tiny_bert: BertModel, tiny_tokenizer: Any) -> None:
    """One step on all rows without dropout: the loss that is noted is BERT's own on the same rows."""
    tiny_bert.config.hidden_dropout_prob = tiny_bert.config.attention_probs_dropout_prob = 0.0
    for name in ("MNLI", "STS-B"):
        model, data = with_head(tiny_bert, TASKS[name]), separable(name, 12)
        batch = encode(data.train, tiny_tokenizer, max_length=64).batch(range(12))
        with torch.no_grad():
            loss = model(**batch.inputs, labels=torch.from_numpy(data.train.labels)).loss
        _, history = finetune(model, tiny_tokenizer, data, replace(QUICK, max_steps=1))
        assert history.losses == (pytest.approx(float(loss), rel=1e-5),)
        _, narrow = finetune(model, tiny_tokenizer, data, replace(QUICK, max_steps=1, precision="bfloat16"))
        assert narrow.losses == (pytest.approx(float(loss), rel=0.05),)
        assert narrow.losses != history.losses


def test_a_head_in_another_order_learns_the_same_labels(tiny_bert: BertModel, tiny_tokenizer: Any) -> None:
    model, data = with_head(tiny_bert, TASKS["RTE"]), separable("RTE")
    model.config.id2label = {0: "not_entailment", 1: "entailment"}
    trained, _ = finetune(model, tiny_tokenizer, data, QUICK)
    assert evaluate(trained, tiny_tokenizer, data, max_length=64).headline > 0.9
    # the first output is the second label
    first = logits(trained, encode(data.train, tiny_tokenizer, max_length=64)).argmax(1)
    assert np.mean(first == data.train.labels) < 0.1


def test_the_seed_and_nothing_else_decides(
    tiny_bert: BertModel, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = with_head(tiny_bert, TASKS["CoLA"]), separable("CoLA", 48)
    settings = replace(QUICK, max_steps=4)
    first, history = finetune(model, tiny_tokenizer, data, settings)
    torch.rand(7)
    again, repeated = finetune(model, tiny_tokenizer, data, settings)
    assert same(weights(first), weights(again))
    assert repeated.losses == history.losses
    # the same rows in the same order: what is left to another seed is the dropout
    monkeypatch.setattr(module, "_plan", lambda _lengths, _settings: [np.arange(16)])
    one = replace(settings, max_steps=1)
    losses = [finetune(model, tiny_tokenizer, data, replace(one, seed=seed))[1].losses[0] for seed in (0, 1)]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_a_plan_brings_each_row_once_an_epoch_and_rows_of_like_length_together() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 1000)
    settings = Settings(batch_size=16, epochs=2)
    batches = module._plan(lengths, settings)
    half = len(batches) // 2
    assert len(batches) == 2 * 63
    for epoch in (batches[:half], batches[half:]):
        assert sorted(np.concatenate(epoch)) == list(range(1000))
    assert not np.array_equal(batches[0], batches[half])
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    assert spread < 0.2 * np.ptp(lengths)
    assert abs(np.corrcoef(range(half), [lengths[batch].mean() for batch in batches[:half]])[0, 1]) < 0.4
    assert len(module._plan(lengths, replace(settings, max_steps=5))) == 5
    assert len(module._plan(lengths, replace(settings, max_steps=200))) == 200


# Going on


class Killed(Exception):  # noqa: N818  (a signal, not an error)
    pass


def killing(at: int) -> Callable[[int, int], None]:
    def progress(done: int, _total: int) -> None:
        if done == at:
            raise Killed

    return progress


@pytest.fixture(scope="module")
def undisturbed(
    make_bert: Callable[..., BertModel], tiny_tokenizer: Any
) -> tuple[PreTrainedModel, TaskData, Settings, dict[str, torch.Tensor], History]:
    """A training of 8 steps in 3 epochs that no directory is asked for, and what comes of it."""
    data = separable("CoLA", 40)
    model, settings = with_head(make_bert(), data.task), replace(QUICK, max_steps=8, learning_rate=1e-3)
    trained, history = finetune(model, tiny_tokenizer, data, settings)
    return model, data, settings, weights(trained), history


@pytest.mark.parametrize("at", [2, 6])
def test_a_killed_training_goes_on_to_the_same_bits(
    at: int, undisturbed: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Killed before the first checkpoint, and after the second, in the middle of an epoch."""
    model, data, settings, whole, history = undisturbed
    with pytest.raises(Killed):
        finetune(model, tiny_tokenizer, data, settings, out=tmp_path / "out", save_every=2, progress=killing(at))
    assert not (tmp_path / "out" / "model").exists()
    with locked(tmp_path / "out"), pytest.raises(ValueError, match="out' is in use by another process: wait"):
        finetune(model, tiny_tokenizer, data, settings, out=tmp_path / "out", save_every=2)
    # one whose writing was cut off, as a killed process leaves it
    torn = tmp_path / "out" / "checkpoints" / f"checkpoint-{at}"
    torn.mkdir(parents=True)
    (torn / "trainer_state.json").write_text("{")
    seen: list[int] = []
    resumed, again = finetune(
        model,
        tiny_tokenizer,
        data,
        settings,
        out=tmp_path / "out",
        save_every=2,
        progress=lambda done, _: seen.append(done),
    )
    assert seen == list(range(1 + (at - 1) // 2 * 2, 9))
    assert same(weights(resumed), whole)
    assert (again.steps, again.losses, again.rows) == (history.steps, history.losses, history.rows)


def test_losses_between_two_notes_are_not_lost(
    undisturbed: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noted every 4 steps, saved every 3, killed in the last step."""
    model, data, settings, whole, history = undisturbed
    monkeypatch.setattr(module, "_LOGGED", 2)
    with pytest.raises(Killed):
        finetune(model, tiny_tokenizer, data, settings, out=tmp_path / "out", save_every=3, progress=killing(8))
    resumed, again = finetune(model, tiny_tokenizer, data, settings, out=tmp_path / "out", save_every=3)
    assert same(weights(resumed), whole)
    assert again.steps == (3, 4, 6, 8)
    means = [np.mean(history.losses[first:end]) for first, end in [(0, 3), (3, 4), (4, 6), (6, 8)]]
    np.testing.assert_allclose(again.losses, means, rtol=1e-5)


def test_a_finished_training_is_given_back_and_loads_as_a_checkpoint(
    tiny_bert: BertModel, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model, data = with_head(tiny_bert, TASKS["RTE"]), separable("RTE", 32)
    settings = replace(QUICK, max_steps=2)
    trained, history = finetune(model, tiny_tokenizer, data, settings, out=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "finetune.json", "model"]
    steps: list[int] = []
    with locked(tmp_path / "out"):  # nothing is written
        found, said = finetune(
            model, tiny_tokenizer, data, settings, out=tmp_path / "out", progress=lambda done, _: steps.append(done)
        )
    assert steps == []
    assert said == history
    assert same(weights(found), weights(trained))
    assert not found.training
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert same(weights(opened), weights(trained))
    assert opened.config.id2label == {0: "entailment", 1: "not_entailment"}
    (tmp_path / "out" / "model" / "model.safetensors").write_bytes(b"cut")
    assert "is missing or damaged" in message(
        lambda: finetune(model, tiny_tokenizer, data, settings, out=tmp_path / "out")
    )


def test_another_training_is_refused_by_what_differs(tiny_bert: BertModel, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model, data = with_head(tiny_bert, TASKS["RTE"]), separable("RTE", 32)
    settings = replace(QUICK, max_steps=2)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        finetune(model, tiny_tokenizer, data, settings, out=out, progress=killing(1))

    def refused(model: PreTrainedModel, data: TaskData, settings: Settings, **other: Any) -> str:
        return message(lambda: finetune(model, tiny_tokenizer, data, settings, out=out, **other))

    assert "with learning_rate 0.004, not 0.001, expected" in refused(
        model, data, replace(settings, learning_rate=1e-3)
    )
    assert "with max_steps 2, not 3, expected" in refused(model, data, replace(settings, max_steps=3))
    assert "with another model, expected" in refused(with_head(tiny_bert, TASKS["RTE"], seed=1), data, settings)
    turned = with_head(model, data.task)
    turned.config.id2label = {0: "not_entailment", 1: "entailment"}
    assert "with another model, expected" in refused(turned, data, settings)
    labels = data.train.labels.copy()
    labels[0] = 1 - labels[0]
    changed = replace(data, train=replace(data.train, labels=labels))
    assert "with other training rows (texts, labels or tokenizer), expected" in refused(model, changed, settings)
    assert "with another teacher, expected" in refused(model, data, replace(settings, distill=0.5), teacher=model)
    finetune(model, tiny_tokenizer, data, settings, out=out)  # the one that stands there is still taken up


def test_a_folder_of_something_else_is_left_alone(tiny_bert: BertModel, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model, data = with_head(tiny_bert, TASKS["RTE"]), separable("RTE", 32)
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "holds something other than a fine-tuning" in message(
        lambda: finetune(model, tiny_tokenizer, data, QUICK, out=tmp_path)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / "finetune.json").write_text(json.dumps({"format": "other", "version": 1}))
    assert "was not written by this version of obce" in message(
        lambda: finetune(model, tiny_tokenizer, data, QUICK, out=tmp_path)
    )


# Teachers


def test_a_teacher_is_followed_where_the_labels_say_otherwise(tiny_bert: BertModel, tiny_tokenizer: Any) -> None:
    data = separable("RTE")
    model = with_head(tiny_bert, data.task)
    teacher, _ = finetune(model, tiny_tokenizer, data, QUICK)
    teacher.train()
    wrong = replace(data, train=replace(data.train, labels=1 - data.train.labels))
    settings = replace(QUICK, distill=1.0)
    before = weights(teacher)
    pupil, history = finetune(model, tiny_tokenizer, wrong, settings, teacher=teacher)
    assert teacher.training  # run in eval mode all the same, else its answers would be random
    assert same(weights(teacher), before)
    assert evaluate(pupil, tiny_tokenizer, data, max_length=64).headline > 0.9
    # the same teacher with its outputs in the other order teaches the same
    with torch.no_grad():
        for parameter in (teacher.classifier.weight, teacher.classifier.bias):
            parameter.copy_(parameter.flip(0))
    teacher.config.id2label = {0: "not_entailment", 1: "entailment"}
    _, again = finetune(model, tiny_tokenizer, wrong, replace(settings, max_steps=1), teacher=teacher)
    assert again.losses[0] == pytest.approx(history.losses[0], rel=1e-4)
    # and so it does a model with its outputs in the other order
    with torch.no_grad():
        for parameter in (model.classifier.weight, model.classifier.bias):
            parameter.copy_(parameter.flip(0))
    model.config.id2label = {0: "not_entailment", 1: "entailment"}
    _, again = finetune(model, tiny_tokenizer, wrong, replace(settings, max_steps=1), teacher=teacher)
    assert again.losses[0] == pytest.approx(history.losses[0], rel=1e-4)


def test_distillation_pulls_the_logits_to_the_teachers(tiny_bert: BertModel, tiny_tokenizer: Any) -> None:
    data = separable("MNLI", 48)
    model, teacher = with_head(tiny_bert, data.task), with_head(tiny_bert, data.task, seed=5)
    rows = encode(data.train, tiny_tokenizer, max_length=64)
    target = logits(teacher, rows)

    def distance(trained: PreTrainedModel) -> float:
        gap = logits(trained, rows) - target
        return float(np.abs(gap - gap.mean(1, keepdims=True)).mean())  # softmax does not see a shift

    alone, _ = finetune(model, tiny_tokenizer, data, QUICK)
    taught, _ = finetune(model, tiny_tokenizer, data, replace(QUICK, distill=1.0), teacher=teacher)
    assert distance(taught) < 0.6 * distance(model)
    assert distance(taught) < 0.5 * distance(alone)


def test_losses_of_distillation_by_hand() -> None:
    outputs, target = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    # softened by 2: KL((1/2, 1/2) || softmax(1, 0)) in the first row, nothing in the second
    q = 1 / (1 + np.exp(-1))
    by_hand = 4 * (0.5 * np.log(0.5 / q) + 0.5 * np.log(0.5 / (1 - q))) / 2
    assert float(module._teacher_loss(outputs, target, 2.0)) == pytest.approx(by_hand, rel=1e-5)
    assert float(module._teacher_loss(outputs[:, :1], target[:, :1], 2.0)) == pytest.approx(2.0)


# Texts without labels

TEXTS = Settings(max_length=64, learning_rate=3e-3, batch_size=16, epochs=4)


@pytest.fixture(scope="module")
def cut(make_bert: Callable[..., BertModel], tiny_tokenizer: Any, texts: list[str]) -> tuple[BertModel, Any]:
    """A dense model, and what is left of it at half of its encoder."""
    dense = make_bert()
    made = plan(score(dense, tiny_tokenizer, texts[:60]), keep=0.5, of="encoder", preset=None)
    return dense, prune(dense, made, repair="none")


def lost(model: PreTrainedModel, teacher: PreTrainedModel, tokenizer: Any, texts: list[str]) -> list[float]:
    """Of [CLS] and of all tokens, what `distill` makes less."""
    inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=64)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        states = [one.eval()(**inputs).last_hidden_state for one in (model, teacher)]
    found = []
    for now, then in ([one[:, 0] for one in states], [one[real] for one in states]):
        found.append(float((now - then).square().sum() / (then - then.mean(0)).square().sum()))
    return found


def test_texts_alone_bring_a_cut_model_back_to_the_dense_one(
    cut: tuple[BertModel, Any], tiny_tokenizer: Any, texts: list[str]
) -> None:
    dense, small = cut
    before = weights(small)
    small.train()
    trained, history = distill(small, tiny_tokenizer, texts[:120], TEXTS, teacher=dense)
    assert same(weights(small), before)
    assert type(trained) is ObceBertModel
    assert not trained.training
    for now, then in zip(*(lost(one, dense, tiny_tokenizer, texts[120:]) for one in (trained, small)), strict=True):
        assert now < 0.7 * then
    one_step = replace(TEXTS, max_steps=1, batch_size=60)
    _, first = distill(small, tiny_tokenizer, texts[:60], one_step, teacher=dense)
    assert first.losses[0] == pytest.approx(sum(lost(small, dense, tiny_tokenizer, texts[:60])), rel=1e-4)
    _, every = distill(small, tiny_tokenizer, texts[:60], one_step, teacher=dense, read="tokens")
    assert every.losses[0] == pytest.approx(lost(small, dense, tiny_tokenizer, texts[:60])[1], rel=1e-4)
    again, same_history = distill(small, tiny_tokenizer, texts[:120], TEXTS, teacher=dense)
    assert same(weights(again), weights(trained)), "no dropout, and the same bits"
    assert same_history.losses == history.losses


def test_texts_go_on_where_they_were_stopped(
    cut: tuple[BertModel, Any], tiny_tokenizer: Any, texts: list[str], tmp_path: Path
) -> None:
    dense, small = cut
    settings, out = replace(TEXTS, epochs=2), tmp_path / "out"
    whole, _ = distill(small, tiny_tokenizer, texts[:64], settings, teacher=dense)
    with pytest.raises(Killed):
        distill(small, tiny_tokenizer, texts[:64], settings, teacher=dense, out=out, save_every=3, progress=killing(5))
    with pytest.raises(ValueError, match="with read cls, not mean, expected"):
        distill(small, tiny_tokenizer, texts[:64], settings, teacher=dense, out=out, read="mean")
    with pytest.raises(ValueError, match="with another teacher, expected"):
        distill(small, tiny_tokenizer, texts[:64], settings, teacher=small, out=out)
    resumed, _ = distill(small, tiny_tokenizer, texts[:64], settings, teacher=dense, out=out, save_every=3)
    assert same(weights(resumed), weights(whole))
    assert same(weights(AutoModel.from_pretrained(out / "model")), weights(whole))


def test_a_classifier_follows_what_its_head_takes_in(tiny_bert: BertModel, tiny_tokenizer: Any) -> None:
    data = separable("MNLI", 48)
    dense = with_head(tiny_bert, data.task)
    pairs = list(zip(data.train.texts, data.train.pairs or [], strict=True))
    small = prune(dense, plan(score(dense, tiny_tokenizer, data.train.texts), keep=0.5, of="encoder"), repair="none")
    trained, _ = distill(small, tiny_tokenizer, pairs, TEXTS, teacher=dense)
    rows = encode(data.train, tiny_tokenizer, max_length=64)
    target, before, now = (logits(one, rows) for one in (dense, small, trained))
    assert np.abs(now - target).mean() < 0.7 * np.abs(before - target).mean()


def test_the_pooling_of_an_encoder_goes_with_it(
    cut: tuple[BertModel, Any], tiny_tokenizer: Any, texts: list[str], tmp_path: Path
) -> None:
    dense, small = cut
    source = tmp_path / "small"
    small.save_pretrained(source)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    pooling = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    first = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    (source / "modules.json").write_text(json.dumps([first, pooling]))
    opened, settings = AutoModel.from_pretrained(source), replace(TEXTS, max_steps=1)
    distill(opened, tiny_tokenizer, texts[:32], settings, teacher=dense, out=tmp_path / "out")
    assert (tmp_path / "out" / "model" / "1_Pooling" / "config.json").read_text().startswith("{")
    assert json.loads((tmp_path / "out" / "model" / "modules.json").read_text())[1]["path"] == "1_Pooling"


def test_what_texts_cannot_teach_is_refused(
    cut: tuple[BertModel, Any], make_bert: Callable[..., BertModel], tiny_tokenizer: Any, texts: list[str]
) -> None:
    dense, small = cut

    def refused(words: str, model: Any = small, teacher: Any = dense, given: Any = texts, **other: Any) -> None:
        with pytest.raises(ValueError, match=words):
            distill(model, tiny_tokenizer, given, TEXTS, teacher=teacher, **other)

    refused("read is 'x', expected 'auto' or one of", read="x")
    refused("BertModel has no classifier: read", read="logits")
    refused(
        r"teacher: found a vocabulary and hidden size of \(\d+, 16\), expected \(\d+, 32\)",
        teacher=make_bert(hidden_size=16),
    )
    refused("no text is left", given=[])
    refused("save_every: found 1, expected at least 1, and `out`", save_every=1)
    with torch.inference_mode():
        made = make_bert()
    refused("weights that were made in torch.inference_mode", model=made)
    refused("model is a ViTModel, which reads pictures", model=make_encoder("vit"))


# Refusals


def test_what_cannot_be_trained_is_refused(tiny_bert: BertModel, tiny_tokenizer: Any, tmp_path: Path) -> None:
    data = separable("QNLI", 32)
    model = with_head(tiny_bert, data.task)
    none = replace(data, train=Examples([], [], np.zeros(0, np.int64)))
    assert "QNLI has no training rows" in message(lambda: finetune(model, tiny_tokenizer, none, QUICK))
    assert "distill of 0.5 and no teacher" in message(
        lambda: finetune(model, tiny_tokenizer, data, replace(QUICK, distill=0.5))
    )
    assert "distill of 0 and a teacher" in message(lambda: finetune(model, tiny_tokenizer, data, QUICK, teacher=model))
    with pytest.raises(ValueError, match=r"^teacher: BertForSequenceClassification has 3 outputs, expected 2 for QNLI"):
        finetune(
            model,
            tiny_tokenizer,
            data,
            replace(QUICK, distill=0.5),
            teacher=with_head(tiny_bert, TASKS["MNLI"]),
        )
    away = with_head(tiny_bert, data.task).to("meta")
    assert "teacher: found it on meta, expected cpu" in message(
        lambda: finetune(model, tiny_tokenizer, data, replace(QUICK, distill=0.5), teacher=away)
    )
    assert "save_every: found 3" in message(lambda: finetune(model, tiny_tokenizer, data, QUICK, save_every=3))
    with pytest.raises(ValueError, match="BertModel has no sequence classification head"):
        finetune(tiny_bert, tiny_tokenizer, data, QUICK)
    with pytest.raises(ValueError, match="max_length is 128, but the model has 64 positions"):
        finetune(model, tiny_tokenizer, data)
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    assert "the loss is not finite before step 1" in message(lambda: finetune(model, tiny_tokenizer, data, QUICK))


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"max_steps": 0},
        {"learning_rate": 0.0},
        {"warmup_ratio": 1.5},
        {"weight_decay": -0.1},
        {"distill": 1.1},
        {"temperature": -1.0},
        {"seed": -1},
        {"precision": "float16"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    name = next(iter(wrong))
    assert message(lambda: Settings(**wrong)).startswith(f"{name}: found ")


def test_without_accelerate_the_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tiny_bert: BertModel, tiny_tokenizer: Any
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "accelerate", None)
    data = separable("RTE", 32)
    with pytest.raises(
        ImportError, match=r"needs the package accelerate; install it with `pip install 'obce\[glue\]'`"
    ):
        finetune(with_head(tiny_bert, data.task), tiny_tokenizer, data, QUICK)


def test_rows_a_second() -> None:
    assert History((1,), (0.5,), rows=300, seconds=2.0).rows_per_second == 150.0
