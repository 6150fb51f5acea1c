"""Effects against what really happens when a neuron is held at its mean: finite differences in float64, by hand."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from obce.capture import capture
from obce.corpus import tokenize
from obce.effects import READS, bagged_rf, checked_labels, effect_clouds, read_hidden, reading_of, weight_scores
from obce.h0 import r_f
from obce.scoring import score
from obce.sites import SITE_KINDS, base_model, find_sites

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from obce.corpus import TokenBatches
    from obce.sites import Site
    from transformers import BertModel

SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
STEP = 1e-4


@pytest.fixture(scope="module")
def classifier(make_bert: Callable[..., BertModel]) -> Any:
    return with_head(make_bert(**SMALL), "BertForSequenceClassification", num_labels=3)


@pytest.fixture(scope="module")
def batches(texts: list[str], tiny_tokenizer: Any) -> TokenBatches:
    """Seven texts of unlike length in batches of three."""
    found = tokenize(texts[:7], tiny_tokenizer, max_length=24, batch_size=3)
    assert any((batch.inputs["attention_mask"] == 0).any() for batch in found)
    return found


def with_head(body: Any, name: str, **config: Any) -> Any:
    torch.manual_seed(7)
    settings = type(body.config)(**{**body.config.to_dict(), **config})
    model = getattr(transformers, name)(settings).eval().double()
    model.bert.load_state_dict(body.state_dict(), strict=model.bert.pooler is not None)
    return model


def means_of(model: Any, batches: TokenBatches) -> dict[str, np.ndarray]:
    return {
        f"{layer.layer}.{kind}": sums.sums / sums.count
        for layer in capture(model, batches, find_sites(model))
        for kind, sums in layer.tokens.items()
    }


def directions(seed: int, text: int, shape: tuple[int, ...]) -> torch.Tensor:
    drawn = np.random.default_rng([seed, text]).standard_normal(shape, np.float32)
    return torch.from_numpy(drawn).double() / (shape[0] if len(shape) == 2 else 1) ** 0.5


def read_alone(model: Any, inputs: dict[str, torch.Tensor], read: str) -> torch.Tensor:
    """What is read of one text without padding, from the model's public outputs."""
    out = model(**inputs, output_hidden_states=True)
    if read == "logits":
        return out.logits[0]
    last = out.hidden_states[-1][0]
    if read == "head":
        pooler = model.bert.pooler
        return torch.tanh(last[0] @ pooler.dense.weight.T + pooler.dense.bias)
    return {"cls": last[0], "last": last[-1], "mean": last.mean(0), "tokens": last}[read]


class Held:
    """Moves one neuron a step towards its mean, where its reader takes it in, or where it is written."""

    def __init__(self, model: Any, site: Site, neuron: int, mean: float) -> None:
        body: Any = base_model(model)
        self.neuron, self.mean, self.step = neuron, mean, 0.0
        if site.reader is None:
            module = body.get_submodule(site.writer)
            self.handle = module.register_forward_hook(lambda _m, _a, output: self.moved(output))
        else:
            module = body.get_submodule(site.reader)
            self.handle = module.register_forward_pre_hook(lambda _m, args: (self.moved(args[0]),))

    def moved(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[..., self.neuron] -= self.step * (x[..., self.neuron] - self.mean)
        return x


def slopes(
    model: Any, sites: Sequence[Site], neurons: Sequence[int], means: Any, aim: Callable[[], torch.Tensor]
) -> Iterator[tuple[str, int, float]]:
    """Site, neuron, and minus the derivative of `aim` by the step towards the mean (central difference)."""
    with torch.no_grad():
        for site in sites:
            for neuron in neurons:
                held = Held(model, site, neuron, means[site.name][neuron])
                found = []
                for held.step in (STEP, -STEP):
                    found.append(float(aim()))
                held.handle.remove()
                yield site.name, neuron, (found[1] - found[0]) / (2 * STEP)


def by_hand(
    model: Any, texts: Sequence[str], tokenizer: Any, means: Any, aim: Callable[[int, Any], torch.Tensor]
) -> dict[tuple[str, int, int], float]:
    """(site, neuron, text) -> effect; `aim(text number, inputs)` of each text alone."""
    found = {}
    for i, text in enumerate(texts):
        inputs = dict(tokenizer(text, truncation=True, max_length=24, return_tensors="pt"))
        for site, neuron, value in slopes(
            model, find_sites(model), (0, 7, 15), means, lambda i=i, inputs=inputs: aim(i, inputs)
        ):
            found[site, neuron, i] = value
    return found


def check(clouds: dict[str, np.ndarray], expected: dict[tuple[str, int, int], float]) -> None:
    assert {name.split(".")[1] for name in clouds} == set(SITE_KINDS)
    for name, cloud in clouds.items():
        mine = {(neuron, text): value for (site, neuron, text), value in expected.items() if site == name}
        got = np.array([cloud[at] for at in mine])
        oracle = np.array(list(mine.values()))
        np.testing.assert_allclose(got, oracle, rtol=1e-4, atol=1e-5 * np.abs(oracle).max() + 1e-9, err_msg=name)


@pytest.mark.parametrize("read", READS)
def test_an_effect_is_what_holding_the_neuron_does(
    read: str, classifier: Any, batches: TokenBatches, texts: list[str], tiny_tokenizer: Any
) -> None:
    means = means_of(classifier, batches)
    clouds = effect_clouds(classifier, batches, find_sites(classifier), means, read=read, seed=3)

    def aim(text: int, inputs: Any) -> torch.Tensor:
        vectors = read_alone(classifier, inputs, read)
        return (vectors * directions(3, text, tuple(vectors.shape))).sum()

    expected = by_hand(classifier, texts[:4], tiny_tokenizer, means, aim)
    assert np.abs(list(expected.values())).max() > 1e-2
    check(clouds, expected)
    for site in find_sites(classifier):
        assert clouds[site.name].shape == (site.width, 7)
        assert clouds[site.name].dtype == np.float32
        assert np.abs(clouds[site.name]).max() > 1e-6, f"{site.name} has no effect at all"


def test_inference_mode_of_a_caller_changes_nothing(classifier: Any, batches: TokenBatches) -> None:
    sites, means = find_sites(classifier), means_of(classifier, batches)
    plain = effect_clouds(classifier, batches, sites, means)
    with torch.inference_mode():
        found = effect_clouds(classifier, batches, sites, means)
        assert torch.is_inference_mode_enabled()
        own = copy.deepcopy(classifier)
        for call in (
            lambda: effect_clouds(own, batches, sites, means),
            lambda: score(own, None, ["one", "two", "three", "four"]),  # before any pass
        ):
            with pytest.raises(ValueError, match=r"weights that were made in torch\.inference_mode"):
                call()
    assert all((found[name] == plain[name]).all() for name in plain)


def test_a_mean_of_half_precision_does_not_overflow() -> None:
    hidden = torch.full((1, 128, 4), 1000.0, dtype=torch.float16)
    assert read_hidden(hidden, torch.ones(1, 128, dtype=torch.int64), "mean").tolist() == [[1000.0] * 4]


@pytest.mark.parametrize("outputs", [3, 1])
def test_with_labels_an_effect_is_on_the_loss(
    outputs: int, make_bert: Callable[..., BertModel], batches: TokenBatches, texts: list[str], tiny_tokenizer: Any
) -> None:
    model = with_head(make_bert(**SMALL), "BertForSequenceClassification", num_labels=outputs)
    means = means_of(model, batches)
    labels = np.array([0, 2, 1, 1, 0, 2, 2]) if outputs == 3 else np.linspace(-1, 2, 7)
    clouds = effect_clouds(model, batches, find_sites(model), means, labels=labels)

    def aim(text: int, inputs: Any) -> torch.Tensor:
        logits = model(**inputs).logits[0]
        if outputs == 1:
            return (logits[0] - np.float32(labels[text])) ** 2
        return -torch.log_softmax(logits, 0)[labels[text]]

    check(clouds, by_hand(model, texts[:4], tiny_tokenizer, means, aim))
    assert model.config.problem_type is None, "transformers notes its guess in the config"


@pytest.mark.parametrize("read", ["cls", "mean", "tokens"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_text_knows_nothing_of_its_batch(
    attention: str, read: str, make_bert: Callable[..., BertModel], texts: list[str], tiny_tokenizer: Any
) -> None:
    """Other batch mates and more padding: the same effects up to rounding."""
    model = make_bert(attn_implementation=attention)
    sites = find_sites(model)
    alone = tokenize(texts[:20], tiny_tokenizer, max_length=64, batch_size=1)
    means = means_of(model, alone)
    expected = effect_clouds(model, alone, sites, means, read=read)
    for size in (3, 20):
        found = effect_clouds(
            model, tokenize(texts[:20], tiny_tokenizer, max_length=64, batch_size=size), sites, means, read=read
        )
        for name, cloud in found.items():
            np.testing.assert_allclose(cloud, expected[name], rtol=0, atol=1e-5 * np.abs(expected[name]).max())


def test_what_stands_at_padding_has_no_influence(tiny_bert: BertModel, texts: list[str], tiny_tokenizer: Any) -> None:
    sites = find_sites(tiny_bert)
    batches = tokenize(texts[:10], tiny_tokenizer, max_length=64, batch_size=10)
    means = means_of(tiny_bert, batches)
    for read in ("cls", "mean", "tokens"):
        before = effect_clouds(tiny_bert, batches, sites, means, read=read)
        other = tokenize(texts[:10], tiny_tokenizer, max_length=64, batch_size=10)
        other._pad_id = 77
        assert (next(iter(other)).inputs["input_ids"] == 77).any()
        after = effect_clouds(tiny_bert, other, sites, means, read=read)
        for name, cloud in before.items():
            np.testing.assert_allclose(after[name], cloud, rtol=0, atol=1e-5 * np.abs(cloud).max(), err_msg=name)


def test_directions_are_decided_by_seed_and_position(classifier: Any, texts: list[str], tiny_tokenizer: Any) -> None:
    sites = find_sites(classifier)[:1]
    batches = tokenize(texts[:12], tiny_tokenizer, max_length=24)
    means = means_of(classifier, batches)

    def cloud(seed: int, of: TokenBatches = batches) -> np.ndarray:
        return effect_clouds(classifier, of, sites, means, read="cls", seed=seed)["0.query"]

    first = cloud(0)
    assert (cloud(0) == first).all()
    for seed in (1, 1 << 32, (1 << 64) - 1):
        assert np.abs(cloud(seed) - first).max() > 0.1 * np.abs(first).max(), seed
    # more texts after it change nothing for a text; the same text elsewhere has another direction
    more = cloud(0, tokenize([*texts[:12], texts[0]], tiny_tokenizer, max_length=24))
    np.testing.assert_allclose(more[:, :12], first, rtol=1e-4, atol=1e-6 * np.abs(first).max())
    assert np.abs(more[:, 12] - more[:, 0]).max() > 0.1 * np.abs(first).max()


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_model_is_left_as_it_was(make_bert: Callable[..., BertModel], batches: TokenBatches) -> None:
    model = with_head(make_bert(**SMALL), "BertForSequenceClassification", num_labels=3).float()
    sites = find_sites(model)
    means = means_of(model, batches)
    evaluated = effect_clouds(model, batches, sites, means, labels=np.zeros(7, int))
    model.train()
    model.bert.encoder.layer[1].eval()
    model.classifier.weight.requires_grad_(False)
    before = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = effect_clouds(model, batches, sites, means, labels=np.zeros(7, int))
    for name, cloud in evaluated.items():
        assert (cloud == found[name]).all(), "neither dropout nor the caller's autocast and gradient mode have a say"
    assert [module.training for module in model.modules()] == before
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["classifier.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert hooks(model) == 0
    assert model.config.to_dict() == config
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_hooks_and_flags_come_back_after_an_error(tiny_bert: BertModel, batches: TokenBatches) -> None:
    sites = find_sites(tiny_bert)
    means = means_of(tiny_bert, batches)
    with torch.no_grad():
        tiny_bert.encoder.layer[1].intermediate.dense.weight[5] = float("nan")
    with pytest.raises(ValueError, match=r"gives neuron 0\.query\.0 the effect nan on text 0, but every effect must"):
        effect_clouds(tiny_bert, batches, sites, means)
    with pytest.raises(
        ValueError, match="read is 'logits', but a BertModel has no classifier: read 'cls', 'last', 'mean'"
    ):
        effect_clouds(tiny_bert, batches, sites, means, read="logits")
    with pytest.raises(ValueError, match="read is 'all', expected 'auto' or one of 'head', 'cls', 'last', 'mean'"):
        effect_clouds(tiny_bert, batches, sites, means, read="all")
    assert all(p.requires_grad for p in tiny_bert.parameters())
    assert hooks(tiny_bert) == 0


def test_half_precision(make_bert: Callable[..., BertModel], batches: TokenBatches) -> None:
    model = make_bert(initializer_range=0.05)
    sites = find_sites(model)
    means = means_of(model, batches)
    whole = effect_clouds(model, batches, sites, means, read="mean")
    half = effect_clouds(model.bfloat16(), batches, sites, means, read="mean")
    for name, cloud in whole.items():
        assert np.corrcoef(cloud.ravel(), half[name].ravel())[0, 1] > 0.98, name


@pytest.mark.parametrize(
    ("head", "read"),
    [
        ("BertForSequenceClassification", "head"),
        ("BertForNextSentencePrediction", "cls"),
        ("BertForMultipleChoice", "cls"),
        ("BertForTokenClassification", "tokens"),
        ("BertForQuestionAnswering", "tokens"),
        ("BertForMaskedLM", "tokens"),
        ("BertForPreTraining", "tokens"),
    ],
)
def test_what_is_read_by_itself(
    head: str, read: str, make_bert: Callable[..., BertModel], batches: TokenBatches
) -> None:
    model = with_head(make_bert(**SMALL), head)
    assert reading_of(model) == read
    assert reading_of(base_model(model)) == "cls"
    sites = find_sites(model)
    means = means_of(model, batches)
    by_itself, named = (effect_clouds(model, batches, sites, means, read=how) for how in ("auto", read))
    assert all((by_itself[name] == named[name]).all() for name in named)


def test_labels_that_no_head_takes(classifier: Any, make_bert: Callable[..., BertModel]) -> None:
    body = make_bert(**SMALL)
    assert checked_labels(classifier, [True, False], 2).tolist() == [1, 0]
    assert checked_labels(classifier, np.array([2, 0], np.int8), 2).dtype == np.int64
    score = with_head(body, "BertForSequenceClassification", num_labels=1)
    assert checked_labels(score, [1, 2.5], 2).dtype == np.float32
    assert checked_labels(with_head(body, "BertForNextSentencePrediction"), [0, 1], 2).tolist() == [0, 1]
    for head in ("BertForQuestionAnswering", "BertForTokenClassification", "BertForMaskedLM", "BertForPreTraining"):
        with pytest.raises(ValueError, match=f"labels are given, but a {head} takes none of a text: load the model"):
            checked_labels(with_head(body, head), [0, 1], 2)
    with pytest.raises(ValueError, match="a BertModel takes none of a text"):
        checked_labels(body, [0, 1], 2)
    with pytest.raises(ValueError, match=r"labels have the shape \(3,\), expected \(2,\): one a text of the corpus"):
        checked_labels(classifier, [0, 1, 2], 2)
    for bad in ([0, 3], [-1, 0], [0.0, 1.0], ["a", "b"]):
        with pytest.raises(ValueError, match="expected numbers of classes from 0 to 2: give those of this head"):
            checked_labels(classifier, bad, 2)
    with pytest.raises(ValueError, match="expected finite numbers, for a head of one output"):
        checked_labels(score, [0.5, np.nan], 2)


def test_bagged_rf_is_the_mean_of_largest_gaps() -> None:
    values = np.random.default_rng(0).standard_normal((5, 47)).astype(np.float32)
    values[2] = 3.0
    rng = np.random.default_rng(11)
    expected = np.zeros(5)
    for _ in range(9):
        group = np.sort(values[:, rng.permutation(47)[:20]], axis=1)
        expected += np.diff(group, axis=1).max(axis=1).astype(np.float64)
    found = bagged_rf(values, bags=9, seed=11)
    np.testing.assert_array_equal(found, expected / 9)
    assert found[2] == 0
    assert (bagged_rf(values, bags=9, seed=12) != found)[[0, 1, 3, 4]].all()
    assert np.isnan(bagged_rf(values[:, :19])).all()
    # of as many texts as a bag takes there is one group
    np.testing.assert_allclose(bagged_rf(values[:, :20], bags=3), r_f(np.ascontiguousarray(values[:, :20])), rtol=1e-6)


def test_weight_scores_by_hand(make_bert: Callable[..., BertModel]) -> None:
    model = make_bert(**SMALL)
    sites = find_sites(model)
    rng = np.random.default_rng(2)
    spreads = {site.name: rng.random(site.width) + 0.5 for site in sites}
    found = weight_scores(model, sites, spreads)
    state = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    assert set(found) == {site.name for site in sites}
    for layer in range(2):
        at = f"encoder.layer.{layer}."
        linears = {
            "query": "attention.self.query",
            "key": "attention.self.key",
            "value": "attention.self.value",
            "attention_output": "attention.output.dense",
            "intermediate": "intermediate.dense",
            "output": "output.dense",
        }
        columns = {"value": "attention.output.dense", "intermediate": "output.dense"}
        for kind, linear in linears.items():
            own = np.column_stack([state[f"{at}{linear}.weight"], state[f"{at}{linear}.bias"]])
            factor: Any = 1.0
            if kind in columns:
                read = state[f"{at}{columns[kind]}.weight"].T
                own = np.concatenate([own, read], axis=1)
                factor = np.linalg.norm(read, axis=1)
            if kind in ("query", "key"):
                factor = spreads[f"{layer}.{'key' if kind == 'query' else 'query'}"]
            scores = found[f"{layer}.{kind}"]
            np.testing.assert_allclose(scores["magnitude"], np.linalg.norm(own, axis=1), rtol=1e-12, err_msg=kind)
            np.testing.assert_allclose(scores["spread"], spreads[f"{layer}.{kind}"] * factor, rtol=1e-12, err_msg=kind)
    assert set(weight_scores(model, sites, None)["0.query"]) == {"magnitude"}


def test_pairs_and_progress(classifier: Any, texts: list[str], tiny_tokenizer: Any) -> None:
    batches = tokenize(list(zip(texts[:6], texts[6:12], strict=True)), tiny_tokenizer, max_length=40, batch_size=4)
    sites = find_sites(classifier)
    means = means_of(classifier, batches)
    seen: list[tuple[float, float]] = []
    paired = effect_clouds(classifier, batches, sites, means, progress=lambda *at: seen.append(at))
    assert seen == [(4, 6), (6, 6)]
    joined = tokenize([f"{a} {b}" for a, b in zip(texts, texts[6:12], strict=False)], tiny_tokenizer, max_length=40)
    other = effect_clouds(classifier, joined, sites, means)
    assert np.abs(paired["0.value"] - other["0.value"]).max() > 1e-3, "the second segment is seen"
