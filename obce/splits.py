"""Does a gap between a neuron's outputs divide texts, or does it cut off one odd text?

The largest gap of a sample lies in its tail and usually isolates one text (docs/method.md). A split that means
something has texts on both sides, stays empty in other texts, too, and may be told by a plainer fact than the neuron.
All three are tested here: the split is fixed on some texts, and judged on texts that took no part.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BALANCE = 0.01
"""Least share of the texts on each side of a balanced gap."""

RECURS_BELOW = 1e-3
"""A gap recurs if, were texts as dense in it as beside it, so few inside would be less probable than this."""

_LEAST_TEXTS = 3  # with a token, and without it, before the token may explain anything


@dataclass(frozen=True, slots=True)
class Split:
    """A gap between neighbouring outputs.

    Attributes:
        below: The output under the gap, in activation units.
        above: The output over it.
        n_below: Texts under the gap, that at its edge included.
        n_above: Texts over it.
        std: Population standard deviation of all outputs.
    """

    below: float
    above: float
    n_below: int
    n_above: int
    std: float

    @property
    def width(self) -> float:
        """Width of the gap, in activation units: a death of the neuron's cloud."""
        return self.above - self.below

    @property
    def threshold(self) -> float:
        """Middle of the gap."""
        return self.below + self.width / 2

    @property
    def high(self) -> bool:
        """Whether the smaller side is the one over the gap."""
        return self.n_above <= self.n_below

    def small_side(self, values: NDArray[Any]) -> NDArray[np.bool_]:
        """[n] which of some outputs lie on the side that is the smaller one here."""
        found: NDArray[np.bool_] = (values > self.threshold) == self.high
        return found


@dataclass(frozen=True, slots=True)
class Recurrence:
    """What a split does to other texts.

    Attributes:
        n: Number of other texts.
        small: Of them on the side that was the smaller one.
        inside: Of them in the gap.
        beside: In a window as wide as the gap, on the side of it where there are fewer.
        p: Probability of so few inside if texts were as dense in the gap as in that window (Poisson).
        recurs: Whether there is a gap in these texts, too.
    """

    n: int
    small: int
    inside: int
    beside: int
    p: float

    @property
    def recurs(self) -> bool:
        """Whether the gap is there in these texts, too, with texts on both sides."""
        return self.p < RECURS_BELOW and 0 < self.small < self.n


@dataclass(frozen=True, slots=True)
class Reason:
    """A plain fact of a text, as an explanation of the smaller side of a split.

    Attributes:
        words: The fact: "contains a digit", "has more than 31 tokens", "contains the token 'war'".
        precision: Share of the texts with that fact that are on the smaller side, among texts that took no part.
        recall: Share of the texts on the smaller side that have that fact, likewise.
        fitted: F1 on the texts that the fact was chosen on.
    """

    words: str
    precision: float
    recall: float
    fitted: float


def largest_gap(values: NDArray[Any]) -> Split:
    """The gap whose width is r_f of the outputs; of equal ones the lowest.

    Raises:
        ValueError: There are fewer than two outputs, or one is not finite.
    """
    return _split(values, 1)


def balanced_gap(values: NDArray[Any], share: float = BALANCE) -> Split | None:
    """The largest gap that leaves at least a share of the texts on each side; None if no gap does.

    Raises:
        ValueError: As `largest_gap`.
    """
    least = max(1, math.ceil(share * len(values)))
    return None if 2 * least > len(values) else _split(values, least)


def _split(values: NDArray[Any], least: int) -> Split:
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if len(ordered) < 2 or not np.isfinite(ordered).all():
        raise ValueError(f"values has {len(ordered)} outputs, expected at least 2, all finite.")
    gaps = np.diff(ordered)[least - 1 : len(ordered) - least]
    at = int(gaps.argmax()) + least - 1
    return Split(float(ordered[at]), float(ordered[at + 1]), at + 1, len(ordered) - at - 1, float(ordered.std()))


def recurrence(split: Split, values: NDArray[Any]) -> Recurrence:
    """Tests a split on the outputs of other texts.

    Args:
        split: Found on some texts.
        values: [n] outputs of others.
    """
    others = np.asarray(values, dtype=np.float64)
    inside = int(np.count_nonzero((others > split.below) & (others < split.above)))
    under = int(np.count_nonzero((others > split.below - split.width) & (others <= split.below)))
    over = int(np.count_nonzero((others >= split.above) & (others < split.above + split.width)))
    beside = min(under, over)
    terms = np.cumsum([0.0, *np.log(np.arange(1, inside + 1))])  # log k!
    k = np.arange(inside + 1)
    # P(Poisson(beside) <= inside); no texts beside tell nothing
    p = 1.0 if beside == 0 else float(min(1.0, np.exp(k * math.log(beside) - beside - terms).sum()))
    return Recurrence(len(others), int(split.small_side(others).sum()), inside, beside, p)


@dataclass(frozen=True, slots=True)
class Screening:
    """Balanced gaps of many neurons, found on some texts and judged on others as `balanced_gap` and `recurrence` do.

    Attributes:
        below: float64 [width], the output under each gap.
        above: float64 [width], the output over it.
        high: bool [width], whether the smaller side of the texts that it was found on is the one over the gap.
        p: float64 [width], as in `Recurrence`.
        recurs: bool [width], as in `Recurrence`.
    """

    below: NDArray[np.float64]
    above: NDArray[np.float64]
    high: NDArray[np.bool_]
    p: NDArray[np.float64]
    recurs: NDArray[np.bool_]


def screen(found_on: NDArray[Any], judged_on: NDArray[Any], share: float = BALANCE) -> Screening | None:
    """Asks many neurons at once whether they have a split that recurs.

    Args:
        found_on: [n, width] finite outputs, a column a neuron.
        judged_on: [m, width], their outputs on other texts.
        share: As in `balanced_gap`.

    Returns:
        None if there are too few texts for a gap with that share on each side.
    """
    from scipy.special import pdtr

    n = len(found_on)
    least = max(1, math.ceil(share * n))
    if 2 * least > n or not len(judged_on):
        return None
    ordered = np.sort(found_on, axis=0).astype(np.float64)
    at = np.diff(ordered, axis=0)[least - 1 : n - least].argmax(axis=0) + least - 1
    columns = np.arange(ordered.shape[1])
    below, above = ordered[at, columns], ordered[at + 1, columns]
    del ordered
    high = n - at - 1 <= at + 1
    width = above - below
    others = judged_on.astype(np.float64)
    inside = ((others > below) & (others < above)).sum(axis=0)
    under = ((others > below - width) & (others <= below)).sum(axis=0)
    over = ((others >= above) & (others < above + width)).sum(axis=0)
    small = ((others > below + width / 2) == high).sum(axis=0)
    beside = np.minimum(under, over)
    p = np.where(beside == 0, 1.0, pdtr(inside, np.maximum(beside, 1)))
    return Screening(below, above, high, p, (p < RECURS_BELOW) & (small > 0) & (small < len(others)))


# ---- plain facts -----------------------------------------------------------------------------------------------------

_FACTS: dict[str, Callable[[str], bool]] = {
    "contains a digit": lambda text: re.search(r"\d", text) is not None,
    "ends with a full stop": lambda text: text.endswith("."),
    "ends with no mark": lambda text: text[-1:].isalnum(),
    "contains a question mark": lambda text: "?" in text,
    "contains an exclamation mark": lambda text: "!" in text,
    "contains a comma": lambda text: "," in text,
    "contains a semicolon or colon": lambda text: re.search(r"[;:]", text) is not None,
    "contains quotation marks": lambda text: re.search('["“”„«»]', text) is not None,
    "contains a bracket": lambda text: re.search(r"[()\[\]]", text) is not None,
    "contains a hyphen or dash": lambda text: re.search("[-–—]", text) is not None,
    "contains letters that are not ASCII": lambda text: not text.isascii(),
    "begins with a lower-case letter": lambda text: text[:1].islower(),
}


class Facts:
    """Plain facts of texts, from which `best_reason` chooses: marks, digits, length, truncation, tokens.

    Args:
        texts: [n] texts.
        tokens: [n] token ids of each, special tokens included.
        truncated: [n] whether a text lost its end.
        words: Token id -> how the token is written.
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokens: Sequence[NDArray[np.int64]],
        truncated: NDArray[np.bool_],
        words: Callable[[int], str],
    ) -> None:
        from scipy.sparse import csr_array

        self.lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)
        self.plain = {name: np.array([fact(text) for text in texts], dtype=bool) for name, fact in _FACTS.items()}
        self.plain["was cut at the maximum length"] = truncated
        distinct = [np.unique(ids) for ids in tokens]
        columns = np.concatenate(distinct) if distinct else np.empty(0, np.int64)
        ends = np.cumsum([0, *(len(ids) for ids in distinct)])
        shape = (len(texts), int(columns.max(initial=0)) + 1)
        self.holds = csr_array((np.ones(len(columns), np.int32), columns, ends), shape=shape)
        self.words = words

    def best_reason(self, small: NDArray[np.bool_], fit: NDArray[np.bool_]) -> Reason | None:
        """The plain fact that tells the smaller side best on some texts, judged on the others.

        Args:
            small: [n] whether a text is on the smaller side.
            fit: [n] whether a text is one of those that the fact is chosen on.

        Returns:
            The fact of the highest F1, shorter to say first where they tie; None if neither side has a text.
        """
        chosen = small[fit]
        if not chosen.any() or chosen.all():
            return None
        found: list[tuple[float, int, str, NDArray[np.bool_]]] = []

        def offer(words: str, has: NDArray[np.bool_]) -> None:
            found.append((_f1(has[fit], chosen), -len(words), words, has))

        for name, has in self.plain.items():
            offer(name, has)
            offer(f"not: {name}", ~has)
        offer(*self._by_length(chosen, fit))
        both = np.asarray(self.holds[fit].T @ chosen.astype(np.int32)).ravel()
        with_token = np.asarray(self.holds[fit].sum(axis=0)).ravel()
        usable = (with_token >= _LEAST_TEXTS) & (with_token <= len(chosen) - _LEAST_TEXTS)
        score = np.where(usable, 2 * both / np.maximum(1, with_token + int(chosen.sum())), 0.0)
        if usable.any():
            token = int(score.argmax())
            offer(f"contains the token {self.words(token)!r}", np.asarray(self.holds[:, [token]].todense()).ravel() > 0)
        fitted, _, words, has = max(found, key=lambda one: (one[0], one[1]))
        rest = ~fit
        right = int(np.count_nonzero(has[rest] & small[rest]))
        precision = right / max(1, int(np.count_nonzero(has[rest])))
        recall = right / max(1, int(np.count_nonzero(small[rest])))
        return Reason(words, precision, recall, fitted)

    def _by_length(self, chosen: NDArray[np.bool_], fit: NDArray[np.bool_]) -> tuple[str, NDArray[np.bool_]]:
        lengths = self.lengths[fit]
        best: tuple[float, int, bool] = (-1.0, 0, True)
        for limit in np.unique(lengths)[:-1].tolist():
            for longer in (True, False):
                best = max(best, (_f1((lengths > limit) == longer, chosen), -limit, longer))
        _, negative, longer = best
        words = f"has more than {-negative} tokens" if longer else f"has at most {-negative} tokens"
        return words, (self.lengths > -negative) == longer


def _f1(has: NDArray[np.bool_], wanted: NDArray[np.bool_]) -> float:
    together = int(np.count_nonzero(has)) + int(np.count_nonzero(wanted))
    return 2 * int(np.count_nonzero(has & wanted)) / together if together else 0.0
