"""The part of the report that shows neurons and heads one by one: data for its script, texts made harmless.

Corpus text comes from anywhere. It reaches the page as JSON in which no tag can begin, is written by the script as
text and never as markup, and has lost what a browser would obey: control characters, and marks that turn the reading
direction.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from obce.clouds import CLOUD_KINDS, CLOUD_SCORES
from obce.heads import NearText, clusters_said
from obce.scores import place_of_reading

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from obce.corpus import Corpus
    from obce.explain import Explanation, Findings, Separated, ShownText
    from obce.heads import HeadExplanation
    from obce.plan import Plan
    from obce.removal import Replacement
    from obce.scores import Scores

LETTERS = 600
"""Letters of a text that the page has room for."""

ISOLATING = 25
"""Texts listed that isolate neurons, and texts listed that were cut."""

DATA_BYTES = 18_000_000
"""The page's data: what would make it larger is left out, and the page says so."""

# Shares of it: the table of all neurons, their pages, the pages of heads.
_TABLE_SHARE, _NEURONS_SHARE = 0.68, 0.25

# Which scores the table has first, where it has no room for all; the plan's own comes before them.
_FIRST = ("effect", "rf", "std", "spread", "rf_bagged", "magnitude", "taylor", "effect_abs")

WITHHELD = "(text withheld)"

# Control characters, and marks that embed, override or isolate a direction.
_OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")


@dataclass(frozen=True)
class Explained:
    """What the template writes.

    Attributes:
        scores: Names of the scores in the table.
        left_out: What the page has no room for, one sentence each.
        truncated: Number of texts that were cut, as text.
        cut: Some of them: `number`, `text`.
        max_length: Tokens they were cut to.
        isolating: Texts that isolate neurons: `neurons`, `number`, `text`.
        best: The neurons highest in the first score, for paper, where the table cannot scroll: name and values.
        clouds: Whether there are pages of heads and layers.
        removal: What goes with the removed neurons: `counts`, `recurring`, `isolating`, `repair`, `errors`,
            `fitted_on`; None without a plan.
        data: JSON in which no tag can begin.
        script: The page's script.
        style: The page's additional style.
        policy: Content security policy that allows this script and no other.
    """

    scores: list[str]
    left_out: list[str]
    truncated: str
    cut: list[dict[str, Any]]
    max_length: int
    isolating: list[dict[str, Any]]
    best: list[tuple[str, list[float]]]
    clouds: bool
    removal: dict[str, Any] | None
    data: Markup
    script: Markup
    style: Markup
    policy: str

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without the page's own files."""
        plain = {name: getattr(self, name) for name in _STORED}
        return {**plain, "data": json.loads(self.data)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Explained:
        """What `to_dict` gave, with the page's own files as they are now; its data is made harmless anew."""
        return cls(**{name: plain[name] for name in _STORED}, data=_json(plain["data"]), **_own_files())


_STORED = ("scores", "left_out", "truncated", "cut", "max_length", "isolating", "best", "clouds", "removal")


def harmless(text: str, letters: int = LETTERS) -> str:
    """A text as a page may show it: nothing in it is obeyed, and a long one loses its end, with a word about it."""
    cut = text[:letters]
    shown = _OBEYED.sub(lambda found: "␣" if found[0] == "\t" else f"⟨U+{ord(found[0]):04X}⟩", cut)
    return shown if len(cut) == len(text) else f"{shown} … ({len(text):,} letters)"


def explained(
    scores: Scores,
    findings: Findings,
    corpus: Corpus,
    *,
    plan: Plan | None = None,
    texts: bool = True,
    data_bytes: int = DATA_BYTES,
) -> Explained:
    """Makes the data of the page.

    Args:
        scores: Scores of a model.
        findings: Neurons and clouds that get a page, and what the plan removes.
        corpus: The texts that were scored.
        plan: A plan for the model.
        texts: Whether any text of the corpus may be shown; without them pages have numbers alone.
        data_bytes: Most bytes of data; then columns of the table, and pages, are left out from the last.
    """
    sites, end = [], 0
    for layer, kind in scores.sites():
        rows = scores.rows(layer, kind)
        sites.append(
            {"name": f"{layer}.{kind}", "layer": layer, "kind": kind, "width": rows.stop - rows.start, "start": end}
        )
        end += rows.stop - rows.start
    fixed = {
        "sites": sites,
        "stability": {
            name: {kind: round(found[0], 4) for kind, found in by_kind.items()}
            for name in _shown_scores(scores)
            if (by_kind := scores.stability(name).by_kind)
        },
        "constant": _bits(scores.constant),
        "kept": None if plan is None else _bits(_kept(scores, plan)),
        "clouds": _clouds(scores),
        "at": place_of_reading(scores),
    }
    room = _Room(data_bytes, len(_json(fixed).encode()))
    columns = room.columns(scores, plan)
    # each text once, whatever the number of neurons that show it
    shown: dict[int, dict[str, Any]] = {}
    neurons, neurons_left = room.pages(findings.neurons, _page, shown, texts, _NEURONS_SHARE)
    heads, heads_left = room.pages(findings.heads, _head_page, shown, texts, None)
    packed = {
        **fixed,
        "scores": columns,
        "columns": {
            name: _coded(np.where(scores.ranked(name), scores.column(name), np.nan).astype(np.float32))
            for name in columns
        },
        "texts": shown,
        "pages": neurons,
        "heads": heads,
    }
    out = [name for name in _shown_scores(scores) if name not in columns]
    return Explained(
        columns,
        [
            *([f"The table has no room for {', '.join(out)}: these are in scores.parquet."] if out else []),
            *_left_out("neuron", neurons_left),
            *_left_out("head", heads_left),
        ],
        f"{scores.meta.get('truncated', 0):,}",
        [
            {"number": number, "text": _line(corpus.texts[number]) if texts else WITHHELD}
            for number in findings.truncated[:ISOLATING]
        ],
        int(scores.meta["max_length"]),
        _isolating(scores, corpus, texts),
        _best(scores, columns),
        bool(heads),
        _removal(findings, texts),
        _json(packed),
        **_own_files(),
    )


def _shown_scores(scores: Scores) -> list[str]:
    return [name for name in scores.names() if name != "mean"]


class _Room:
    """How much of the data fits beside what is always there."""

    def __init__(self, data_bytes: int, fixed: int) -> None:
        self.all = data_bytes
        self.left = float(data_bytes - fixed - 1000)  # the names of the other parts, and of their columns

    def columns(self, scores: Scores, plan: Plan | None) -> list[str]:
        """The scores that the table has room for, at least one, in their usual order."""
        names = _shown_scores(scores)
        first = [name for name in (*([] if plan is None else [plan.score]), *_FIRST) if name in names]
        order = list(dict.fromkeys([*first, *names]))
        each = 16 * len(scores) / 3
        order = order[: max(1, int(_TABLE_SHARE * self.all / each))]
        self.left -= each * len(order)
        return [name for name in names if name in order]

    def pages(
        self,
        found: Iterable[Any],
        page: Callable[[Any, dict[int, dict[str, Any]], bool], dict[str, Any]],
        shown: dict[int, dict[str, Any]],
        texts: bool,
        share: float | None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Pages that fit into a share (None: into what is left), and names of the others; texts go to `shown`."""
        room = self.left if share is None else min(self.left, share * self.all)
        fit, left = [], []
        for one in found:
            more: dict[int, dict[str, Any]] = {}
            made = page(one, more, texts)
            new = {
                number: text
                for number, text in more.items()
                if number not in shown or ("tokens" in text and "tokens" not in shown[number])
            }
            size = len(_json([made, new]).encode())
            if size > room:
                left.append(one.name)
                continue
            room -= size
            self.left -= size
            shown |= new
            fit.append(made)
        return fit, left


def _left_out(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [
        f"The page has no room for the pages of {len(names):,} more {what}s, {names[0]} to {names[-1]}: "
        f"obce explain RUN --{what} NAME prints one."
    ]


def _asset(name: str) -> str:
    return resources.files("obce").joinpath(f"templates/{name}").read_text(encoding="utf-8")


def _own_files() -> dict[str, Any]:
    """script, style and policy of `Explained`."""
    script = _asset("neurons.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {
        "script": Markup(script),  # noqa: S704  (our own file)
        "style": Markup(_asset("neurons.css")),  # noqa: S704
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    }


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
    found = np.zeros(len(scores), bool)
    for layer, kind in scores.sites():
        rows = scores.rows(layer, kind)
        indices = plan.indices(f"{layer}.{kind}", rows.stop - rows.start)
        found[rows.start + np.array(indices, dtype=np.int64)] = True
    return found


def _line(text: str) -> str:
    return harmless(" ".join(text.split()))


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
        "instead": _instead(one.replaced),
    }


def _instead(replaced: Replacement | None) -> dict[str, Any] | None:
    if replaced is None:
        return None
    return {
        "words": replaced.words,
        "rows": [[one.name, _rounded(one.share), _rounded(one.correlation)] for one in replaced.carriers],
    }


def _head_page(one: HeadExplanation, shown: dict[int, dict[str, Any]], texts: bool) -> dict[str, Any]:
    def listed(some: Sequence[NearText]) -> list[list[float]]:
        for text in some:
            shown.setdefault(text.number, {"text": harmless(text.text) if texts else WITHHELD})
        return [[text.number, _rounded(text.at)] for text in some]

    return {
        "name": one.name,
        "n": one.n,
        "d": one.d,
        "constant": one.constant,
        "lines": head_lines(one),
        "tree": None
        if one.tree is None
        else {
            "sizes": one.tree.sizes,
            "heights": [_rounded(height) for height in one.tree.heights],
            "merges": [[left, right, death] for left, right, death in one.tree.merges],
        },
        "scales": [
            {
                "said": clusters_said(scale),
                "at": _rounded(scale.at),
                "clusters": [{"size": cluster.size, "texts": listed(cluster.nearest)} for cluster in scale.clusters],
            }
            for scale in one.scales
        ],
        "last": listed(one.last),
    }


def head_lines(one: HeadExplanation) -> list[str]:
    """What is said of a cloud beside its numbers, one sentence a line."""
    found = []
    if one.constant:
        found.append("The points do not differ beyond rounding: the cloud has no persistence to speak of.")
    elif not one.scales:
        found.append("No scale of this cloud divides its texts.")
    if one.kept is not None:
        found.append(f"The plan: {one.fate}, {one.kept[0]:,} of {one.kept[1]:,} neurons stay.")
    elif one.fate is not None:
        found.append(f"The plan: the layer is {one.fate}.")
    return found


def _clouds(scores: Scores) -> dict[str, Any] | None:
    """The table of clouds: names, and for each score its values and the agreement of two halves by kind."""
    clouds = scores.clouds
    if clouds is None:
        return None
    return {
        "names": clouds.names(),
        "n": clouds.n,
        "columns": {name: [_or_none(value) for value in clouds.columns[name].tolist()] for name in CLOUD_SCORES},
        "stability": {
            name: {kind: _or_none(value) for kind, value in clouds.stability(name).items()} for name in CLOUD_SCORES
        },
        "kinds": list(CLOUD_KINDS),
        "heads": int(clouds.head.max()) + 1,
    }


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(f"{value:.7g}")


def _removal(findings: Findings, texts: bool) -> dict[str, Any] | None:
    found = findings.removal
    if found is None:
        return None

    def listed(some: Sequence[Separated]) -> list[dict[str, Any]]:
        return [
            {
                "name": one.name,
                "verdict": one.verdict if texts else one.verdict.split(";")[0],
                "gap": f"{one.gap:.2f}",
                "small": f"{one.small:,} of {one.of:,}",
                "numbers": [number for number, _ in one.texts],
                "texts": [_line(text) for _, text in one.texts] if texts else [],
            }
            for one in some
        ]

    return {
        "counts": found.counts,
        "recurring": listed(found.recurring),
        "isolating": listed(found.isolating),
        "repair": found.repair,
        "errors": found.errors,
        "fitted_on": found.fitted_on,
    }


def _best(scores: Scores, columns: Sequence[str]) -> list[tuple[str, list[float]]]:
    values = np.where(scores.ranked(columns[0]), scores.column(columns[0]), -np.inf)
    names = scores.sites()
    starts = np.array([scores.rows(*site).start for site in names])
    found = []
    for row in np.argsort(-values, kind="stable")[:ISOLATING].tolist():
        at = int(np.searchsorted(starts, row, side="right")) - 1
        layer, kind = names[at]
        found.append((f"{layer}.{kind}.{row - starts[at]}", [float(scores.column(name)[row]) for name in columns]))
    return found


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
        and one.reason.precision
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


def instead_lines(replaced: Replacement) -> list[str]:
    """What a pruned model has in the place of a removed neuron, one sentence a line."""
    return [
        replaced.words,
        *(
            f"{one.name}: share {one.share:.3g}, correlation of the outputs {one.correlation:.2f}"
            for one in replaced.carriers
        ),
    ]


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
            "text": _line(corpus.texts[int(numbers[i])]) if texts else WITHHELD,
        }
        for i in order
    ]
