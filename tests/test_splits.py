"""Splits of texts by a neuron's outputs: gaps by hand, what recurs and what does not, and the plain facts beside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from obce.splits import Facts, Split, balanced_gap, largest_gap, recurrence


def texts_with_digits(n: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Sentences of random words, every fifth with a number; [n] which have one."""
    rng = np.random.default_rng(seed)
    words = ["river", "house", "music", "stone", "winter", "paper", "garden", "window", "letter", "road"]
    texts = [" ".join(rng.choice(words, rng.integers(4, 20))) for _ in range(n)]
    digits = rng.random(n) < 0.2
    return [
        f"{text} {rng.integers(100)} ." if has else f"{text} ." for text, has in zip(texts, digits, strict=True)
    ], digits


def facts(texts: list[str]) -> Facts:
    vocabulary: dict[str, int] = {}
    ids = [np.array([vocabulary.setdefault(word, len(vocabulary)) for word in text.split()]) for text in texts]
    names = {number: word for word, number in vocabulary.items()}
    return Facts(texts, ids, np.zeros(len(texts), bool), names.__getitem__)


def test_gaps_by_hand() -> None:
    values = np.array([0.0, 0.1, 0.2, 5.0, 0.3, 2.0, 2.1, 2.2])
    gap = largest_gap(values)
    assert (gap.below, gap.above, gap.n_below, gap.n_above, gap.high) == (2.2, 5.0, 7, 1, True)
    assert gap.width == pytest.approx(2.8)
    assert gap.threshold == pytest.approx(3.6)
    assert gap.std == pytest.approx(values.std())
    balanced = balanced_gap(values, 0.25)
    assert balanced is not None
    assert (balanced.below, balanced.above, balanced.n_below, balanced.n_above) == (0.3, 2.0, 4, 4)
    assert balanced_gap(values, 0.51) is None
    low = largest_gap(-values)
    assert not low.high
    assert low.small_side(-values).tolist() == gap.small_side(values).tolist() == [False] * 3 + [True] + [False] * 4
    for bad in ([1.0], [0.0, np.nan]):
        with pytest.raises(ValueError, match="values has"):
            largest_gap(np.array(bad))


def test_two_clusters_recur() -> None:
    rng = np.random.default_rng(1)
    values = np.where(rng.random(4000) < 0.1, 3.0, 0.0) + 0.2 * rng.standard_normal(4000)
    gap = balanced_gap(values[:2000])
    assert gap is not None
    found = recurrence(gap, values[2000:])
    assert found.recurs
    assert (found.n, found.inside) == (2000, 0)
    assert found.small == pytest.approx(200, abs=50)


@pytest.mark.parametrize("law", ["normal", "laplace", "lognormal", "uniform", "standard_t"])
def test_noise_does_not(law: str) -> None:
    """Of 200 neurons of pure noise hardly one has a gap that recurs."""
    rng = np.random.default_rng(2)
    recurring = 0
    for _ in range(200):
        values = rng.standard_t(3, 2000) if law == "standard_t" else getattr(rng, law)(size=2000)
        gap = balanced_gap(values[:1000])
        assert gap is not None
        recurring += recurrence(gap, values[1000:]).recurs
    assert recurring <= 2


def test_probability_by_hand() -> None:
    gap = Split(0.0, 1.0, 5, 5, 1.0)
    others = np.array([-0.5, -0.4, -0.3, -0.2, 0.5, 1.1, 1.2, 1.3, 7.0])
    found = recurrence(gap, others)
    assert (found.inside, found.beside, found.small) == (1, 3, 4)
    assert found.p == pytest.approx(np.exp(-3) * (1 + 3))
    assert recurrence(gap, np.array([-9.0, 9.0])).p == 1.0, "nothing beside the gap, nothing known"


def test_a_planted_digit_is_named() -> None:
    texts, digits = texts_with_digits(3000)
    values = digits + 0.08 * np.random.default_rng(3).standard_normal(3000)
    fit = np.arange(3000) < 2000
    gap = balanced_gap(values[fit])
    assert gap is not None
    assert recurrence(gap, values[~fit]).recurs
    reason = facts(texts).best_reason(gap.small_side(values), fit)
    assert reason is not None
    assert reason.words == "contains a digit"
    assert min(reason.precision, reason.recall) > 0.95


@pytest.mark.parametrize(
    ("words", "small"),
    [
        ("contains the token 'music'", lambda text: "music" in text.split()),
        ("has more than 14 tokens", lambda text: len(text.split()) > 14),
        ("has at most 7 tokens", lambda text: len(text.split()) <= 7),
        ("not: contains a digit", lambda text: not any(letter.isdigit() for letter in text)),
    ],
)
def test_other_facts_are_named(words: str, small: Any) -> None:
    texts, _ = texts_with_digits(1200, seed=4)
    side = np.array([small(text) for text in texts])
    reason = facts(texts).best_reason(side, np.arange(1200) < 800)
    assert reason is not None
    assert (reason.words, reason.precision, reason.recall, reason.fitted) == (words, 1.0, 1.0, 1.0)


def test_a_side_without_texts_has_no_reason() -> None:
    texts, _ = texts_with_digits(50)
    assert facts(texts).best_reason(np.zeros(50, bool), np.ones(50, bool)) is None
