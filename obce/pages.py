"""The part of the report that shows neurons one by one: data for its script, texts made harmless.

Corpus text comes from anywhere. It reaches the page as JSON in which no tag can begin, is written by the script as
text and never as markup, and has lost what a browser would obey: control characters, and marks that turn the reading
direction.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from obce.corpus import Corpus
    from obce.explain import Explanation, ShownText
    from obce.plan import Plan
    from obce.scores import Scores

LETTERS = 600
"""Letters of a text that the page has room for."""

ISOLATING = 25
"""Texts listed that isolate neurons."""

WITHHELD = "(text withheld)"

# Control characters, and marks that embed, override or isolate a direction.
_OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")


@dataclass(frozen=True)
class Explained:
    """What the template writes.

    Attributes:
        scores: Names of the scores in the table.
        truncated: Texts that were cut, as text.
        max_length: Tokens they were cut to.
        isolating: Texts that isolate neurons: `neurons`, `number`, `text`.
        data: JSON in which no tag can begin.
        script: The page's script.
        style: The page's additional style.
        policy: Content security policy that allows this script and no other.
    """

    scores: list[str]
    truncated: str
    max_length: int
    isolating: list[dict[str, Any]]
    data: Markup
    script: Markup
    style: Markup
    policy: str


def harmless(text: str, letters: int = LETTERS) -> str:
    """A text as a page may show it: nothing in it is obeyed, and a long one loses its end, with a word about it."""
    cut = text[:letters]
    shown = _OBEYED.sub(lambda found: "␣" if found[0] == "\t" else f"⟨U+{ord(found[0]):04X}⟩", cut)
    return shown if len(cut) == len(text) else f"{shown} … ({len(text):,} letters)"


def explained(
    scores: Scores,
    explanations: Sequence[Explanation],
    corpus: Corpus,
    *,
    plan: Plan | None = None,
    texts: bool = True,
) -> Explained:
    """Makes the data of the page.

    Args:
        scores: Scores of a model.
        explanations: Neurons that get a page.
        corpus: The texts that were scored.
        plan: A plan for the model.
        texts: Whether any text of the corpus may be shown; without them pages have numbers alone.
    """
    columns = [name for name in scores.names() if name not in ("mean",)]
    sites, end = [], 0
    for layer, kind in scores.sites():
        rows = scores.rows(layer, kind)
        sites.append(
            {"name": f"{layer}.{kind}", "layer": layer, "kind": kind, "width": rows.stop - rows.start, "start": end}
        )
        end += rows.stop - rows.start
    # each text once, whatever the number of neurons that show it
    shown: dict[int, dict[str, Any]] = {}
    pages = [_page(one, shown, texts) for one in explanations]
    packed = {
        "sites": sites,
        "scores": columns,
        "columns": {
            name: _coded(np.where(scores.ranked(name), scores.column(name), np.nan).astype(np.float32))
            for name in columns
        },
        "stability": {
            name: {kind: round(found[0], 4) for kind, found in by_kind.items()}
            for name in columns
            if (by_kind := scores.stability(name).by_kind)
        },
        "constant": _bits(scores.constant),
        "kept": None if plan is None else _bits(_kept(scores, plan)),
        "texts": shown,
        "pages": pages,
    }
    script = _asset("neurons.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Explained(
        columns,
        f"{scores.meta.get('truncated', 0):,}",
        int(scores.meta["max_length"]),
        _isolating(scores, corpus, texts),
        _json(packed),
        Markup(script),  # noqa: S704  (our own file)
        Markup(_asset("neurons.css")),  # noqa: S704
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )


def _asset(name: str) -> str:
    return resources.files("obce").joinpath(f"templates/{name}").read_text(encoding="utf-8")


def _json(value: Any) -> Markup:
    """JSON that may stand in a script element: nothing in it can end the element or begin another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)  # noqa: S704  (made harmless above)


def _coded(values: NDArray[np.float32]) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _bits(flags: NDArray[np.bool_]) -> str:
    return base64.b64encode(np.packbits(flags).tobytes()).decode()


def _kept(scores: Scores, plan: Plan) -> NDArray[np.bool_]:
    found = np.ones(len(scores), bool)
    for layer, kind in scores.sites():
        rows = scores.rows(layer, kind)
        indices = () if layer in plan.layers_dropped else plan.kept.get(f"{layer}.{kind}")
        if indices is not None:
            found[rows] = False
            found[rows.start + np.array(indices, dtype=np.int64)] = True
    return found


def _page(one: Explanation, shown: dict[int, dict[str, Any]], texts: bool) -> dict[str, Any]:
    def listed(some: Sequence[ShownText]) -> list[dict[str, Any]]:
        rows = []
        for text in some:
            row: dict[str, Any] = {"number": text.number, "value": _rounded(text.value)}
            if texts:
                shown.setdefault(
                    text.number, {"text": harmless(text.text), "tokens": [harmless(token) for token in text.tokens]}
                )
                row["at"] = [_rounded(value) for value in text.at_tokens]
            else:
                shown.setdefault(text.number, {"text": WITHHELD})
            rows.append(row)
        return rows

    return {
        "name": one.name,
        "verdict": one.verdict if texts else _without_words(one),
        "lines": lines(one, texts=texts),
        "gap": _gap(one.gap),
        "balanced": _gap(one.balanced),
        "values": _coded(one.values),
        "low": listed(one.low),
        "high": listed(one.high),
        "edge": listed(one.edge),
    }


def lines(one: Explanation, *, texts: bool = True) -> list[str]:
    """What is said of a neuron's gaps, one sentence a line.

    Args:
        one: The neuron.
        texts: Whether a token of the corpus may be named.
    """
    found = []
    for title, gap in (("Largest gap", one.gap), ("Largest gap with 1 % of the texts on each side", one.balanced)):
        if gap is not None:
            found.append(
                f"{title}: {gap.width:.4g} ({gap.width / gap.std:.2f} std), {_texts(gap.n_below)} up to "
                f"{gap.below:.4g}, {gap.n_above:,} from {gap.above:.4g} on."
            )
    if one.recurs is not None:
        found.append(
            f"Found on {one.fitted_on}; of {one.judged_on}, {one.recurs.small:,} are on the smaller side and "
            f"{one.recurs.inside:,} in the gap, where {one.recurs.beside:,} would be as dense as beside it "
            f"(p = {one.recurs.p:.2g})."
        )
    if (
        one.reason is not None
        and one.recurs is not None
        and one.recurs.recurs
        and (texts or "the token" not in one.reason.words)
    ):
        found.append(
            f"Plain fact that tells the smaller side best: {one.reason.words} (precision {one.reason.precision:.0%}, "
            f"recall {one.reason.recall:.0%} on the texts it was not chosen on)."
        )
    if one.fate is not None:
        near = (
            "" if one.nearest is None else f"; most like it of those kept: {one.nearest[0]} (r = {one.nearest[1]:.2f})"
        )
        found.append(f"The plan: {one.fate}{near}.")
    return found


def _texts(n: int) -> str:
    return "1 text" if n == 1 else f"{n:,} texts"


def _without_words(one: Explanation) -> str:
    return one.verdict.split(";")[0]


def _gap(gap: Any) -> dict[str, Any] | None:
    if gap is None:
        return None
    return {"below": gap.below, "above": gap.above, "n_below": gap.n_below, "n_above": gap.n_above}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _isolating(scores: Scores, corpus: Corpus, texts: bool) -> list[dict[str, Any]]:
    """Texts that are alone on one side of the largest gap of neurons, most neurons first."""
    known = scores.texts
    if not known or len(scores.constant) != len(known["least"]):
        return []
    varies = ~scores.constant
    alone = np.concatenate(
        [
            known["least"][varies & (known["gap_below"] == known["least"])],
            known["greatest"][varies & (known["gap_above"] == known["greatest"])],
        ]
    )
    numbers, counts = np.unique(alone[alone >= 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:ISOLATING]
    return [
        {
            "neurons": int(counts[i]),
            "number": int(numbers[i]),
            "text": harmless(" ".join(corpus.texts[int(numbers[i])].split())) if texts else WITHHELD,
        }
        for i in order
    ]
