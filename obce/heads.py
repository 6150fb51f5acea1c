"""What one head's or layer's cloud looks like: how its points merge, its clusters at some scales, the texts in them.

The points are those of the clouds in the table (`Scores.clouds`): the first texts of each half, so what is said here of
a cloud is said of the same numbers.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from obce.clouds import CLOUD_KINDS, CLOUD_SCORES, Clouds, parts_of, place_of, points_of
from obce.h0 import H0, h0

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from obce.corpus import Corpus
    from obce.plan import Plan
    from obce.scores import Scores

Vectors = Mapping[tuple[int, str], "NDArray[np.float32]"]
"""(layer, kind of `CLOUD_KINDS`) -> float32 [n, width], a row a text in the order of `texts_of`."""

MERGES = 30
"""Merges of a tree that are drawn, the last ones."""

LARGER = 4
"""Clusters of a scale whose texts are shown, the largest ones."""

NEAREST = 4
"""Texts shown of a cluster: those nearest its centre."""

_LAST = 5  # texts shown that join last
_GAPS = 2  # scales taken at the largest relative gaps between deaths
_FACTOR = 4  # by which these differ at least in their number of components


@dataclass(frozen=True, slots=True)
class Standing:
    """One score of a neuron among its site's, or of a cloud among those of its kind.

    Attributes:
        value: The score.
        rank: 1 for the highest of the site or kind.
        of: Neurons of the site, or clouds of the kind, that the score ranks.
        percentile: Share of them that are lower, in percent.
    """

    value: float
    rank: int
    of: int
    percentile: float


@dataclass(frozen=True, slots=True)
class NearText:
    """A text of a cloud.

    Attributes:
        number: Position in the corpus.
        text: The text; of a pair, both with a line break between.
        at: Of a text in a cluster, the distance to its centre; of one that joins last, the scale at which it does.
    """

    number: int
    text: str
    at: float


@dataclass(frozen=True, slots=True)
class Cluster:
    """Texts that are one component at a scale.

    Attributes:
        size: How many.
        nearest: Those nearest the mean of the cluster, nearest first.
    """

    size: int
    nearest: tuple[NearText, ...]


@dataclass(frozen=True, slots=True)
class Scale:
    """The clusters of a cloud at one scale.

    Attributes:
        at: The scale, an edge length in activation units, in the middle between two deaths.
        below: The last death under it.
        above: The first death over it.
        why: What it was chosen for.
        sizes: Sizes of all clusters of two texts or more, largest first.
        alone: Texts that are a component by themselves.
        clusters: The largest clusters.
    """

    at: float
    below: float
    above: float
    why: str
    sizes: tuple[int, ...]
    alone: int
    clusters: tuple[Cluster, ...]


@dataclass(frozen=True)
class Tree:
    """The last merges of a cloud, ready to be drawn without crossings.

    Attributes:
        sizes: Texts in each leaf, from the left; a leaf is what has merged before the first merge drawn.
        heights: Scale at which each leaf has become one, 0 for a single text.
        merges: (left, right, death) in the order of the deaths. Numbers below `len(sizes)` are leaves, `len(sizes) + i`
            is what merge i gave.
    """

    sizes: tuple[int, ...]
    heights: tuple[float, ...]
    merges: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True)
class HeadExplanation:
    """What is known of one head's or layer's cloud; shows itself in a notebook.

    Attributes:
        name: `"5.query.3"`, or `"5.hidden"` for the whole layer.
        n: Points, one a text.
        d: Coordinates.
        constant: Whether the points do not differ beyond rounding; then nothing else is known.
        standings: Score of `CLOUD_SCORES` -> where it stands among the clouds of its kind.
        stability: Score -> Spearman correlation of two halves of the texts over the clouds of this kind.
        deaths: [n - 1] edge lengths in activation units, ascending.
        tree: The last merges.
        scales: Clusters at a few scales, ascending.
        last: Texts that join by themselves in the last merges, the last one first.
        kept: Neurons of the head that the plan keeps and all of them; None without a plan, and for `hidden`.
        fate: `"kept"` or `"removed"` by the plan, None without one.
    """

    name: str
    n: int
    d: int
    constant: bool
    standings: dict[str, Standing]
    stability: dict[str, float]
    deaths: NDArray[Any]
    tree: Tree | None
    scales: tuple[Scale, ...]
    last: tuple[NearText, ...]
    kept: tuple[int, int] | None
    fate: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what does not exist is None."""
        plain = asdict(self)
        plain["deaths"] = self.deaths.tolist()
        plain["stability"] = {name: None if np.isnan(value) else value for name, value in self.stability.items()}
        return plain

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{at.value:.4g}</td><td>{at.rank} of {at.of}</td></tr>"
            for name, at in self.standings.items()
        )
        said = "".join(f"<p>{html.escape(clusters_said(scale))}</p>" for scale in self.scales)
        return (
            f"<h4>{html.escape(self.name)}</h4>"
            f"<table><tr><th>score</th><th>value</th><th>rank in its kind</th></tr>{rows}</table>{said}"
        )


def clusters_said(scale: Scale) -> str:
    """One sentence on the clusters at a scale: how many texts are in each, and how many are alone."""
    found: dict[int, int] = {}
    for size in scale.sizes:
        found[size] = found.get(size, 0) + 1
    sizes = [f"{size:,}" if many == 1 else f"{many:,} of {size:,}" for size, many in found.items()]
    shown = sizes if len(sizes) <= 12 else [*sizes[:12], "…"]
    many = "a cluster" if len(scale.sizes) == 1 else "clusters"
    clusters = "no cluster of two texts or more" if not sizes else f"{many} of {', '.join(shown)} texts"
    alone = "1 text alone" if scale.alone == 1 else f"{scale.alone:,} texts alone"
    return f"At {scale.at:.4g} ({scale.why}): {clusters}; {alone}."


def texts_of(corpus: Corpus, clouds: Clouds, seed: int) -> NDArray[np.int64]:
    """int64 [n] positions of the clouds' texts: the first of each half, those of the first half first."""
    order = corpus.order(seed)
    middle = (len(order) + 1) // 2
    return np.concatenate([order[:middle][: (clouds.n + 1) // 2], order[middle:][: clouds.n // 2]])


def check_cloud(scores: Scores, name: str) -> tuple[int, str, int]:
    """Layer, kind and head (-1 for `hidden`) of a cloud in the table.

    Raises:
        ValueError: The scores hold no clouds, or none of that name.
    """
    if scores.clouds is None:
        raise ValueError(
            f"head is {name!r}, but these scores hold no clouds of heads: score again with cloud_texts above 0."
        )
    clouds = scores.clouds
    kind = name.split(".")[1] if name.count(".") else ""
    rows = clouds.kind == CLOUD_KINDS.index(kind) if kind in CLOUD_KINDS[:-1] else np.ones(len(clouds), bool)
    return place_of(name, np.unique(clouds.layer).tolist(), int(clouds.head[rows].max(initial=-1)) + 1)


def sample_clouds(scores: Scores, *, every: Sequence[str] = ("context", "hidden"), best: int = 12) -> list[str]:
    """Names of clouds: those of some kinds all, then the other kinds of the heads whose context persists most.

    Args:
        scores: Scores of a model.
        every: Kinds of which all are taken.
        best: Heads of which the other kinds are taken, too: those of the highest total persistence of the context.
    """
    clouds = scores.clouds
    if clouds is None:
        return []
    names = clouds.names()
    kinds = [name.split(".")[1] for name in names]
    found = [name for kind in every for name, of in zip(names, kinds, strict=True) if of == kind]
    total = np.where(np.array(kinds) == "context", clouds.columns["total_persistence"], np.nan)
    ranked = [i for i in np.argsort(-total, kind="stable").tolist() if not np.isnan(total[i])][:best]
    heads = [(int(clouds.layer[i]), int(clouds.head[i])) for i in ranked]
    groups = int(scores.meta.get("groups", 1))
    more = [
        f"{layer}.{kind}.{head if kind == 'query' else head // groups}"
        for layer, head in heads
        for kind in ("query", "key", "value")
    ]
    more = list(dict.fromkeys(more))
    return found + [name for name in more if name in set(names) and name not in set(found)]


def explain_clouds(
    scores: Scores, names: Sequence[str], vectors: Vectors, corpus: Corpus, plan: Plan | None = None
) -> list[HeadExplanation]:
    """Explains clouds from the vectors of their texts.

    Args:
        scores: Scores with clouds.
        names: `"5.query.3"` or `"5.hidden"`.
        vectors: At least those of the layers and kinds named.
        corpus: The texts that were scored.
        plan: A plan for the model, to say what it keeps of a head.

    Raises:
        ValueError: There is no such cloud, or vectors or texts are not those of the table.
    """
    if scores.meta["corpus_hash"] != corpus.hash:
        raise ValueError(f"texts of {corpus.source} are not those that were scored: give the same corpus.")
    places = [check_cloud(scores, name) for name in names]
    clouds = scores.clouds
    if clouds is None or not names:
        return []
    texts = texts_of(corpus, clouds, int(scores.meta["seed"]))
    stability = {score: clouds.stability(score) for score in CLOUD_SCORES}
    heads, groups = int(clouds.head.max()) + 1, int(scores.meta.get("groups", 1))
    found = []
    for name, (layer, kind, head) in zip(names, places, strict=True):
        row = clouds.row(layer, kind, head)
        points = points_of(vectors[layer, kind], parts_of(kind, heads, groups), head)
        if points.shape != (clouds.n, clouds.d[row]):
            raise ValueError(
                f"vectors of {name} have the shape {points.shape}, expected {(clouds.n, int(clouds.d[row]))} as in the "
                "scores: capture them again on the scored texts."
            )
        kept, fate = _fate(scores, plan, layer, kind, head, heads, groups)
        constant = bool(clouds.constant[row])
        answer = h0(points, edges=True)
        drawn = None if constant or clouds.n < 3 else answer
        found.append(
            HeadExplanation(
                name=name,
                n=clouds.n,
                d=int(clouds.d[row]),
                constant=constant,
                standings={} if constant else {score: _standing(clouds, score, row) for score in CLOUD_SCORES},
                stability={score: stability[score][kind] for score in CLOUD_SCORES},
                deaths=np.asarray(answer.deaths[0]),
                tree=None if drawn is None else last_merges(answer.linkage(0)),
                scales=() if drawn is None else _scales(drawn, points, texts, corpus),
                last=() if drawn is None else _joining_last(drawn.linkage(0), texts, corpus),
                kept=kept,
                fate=fate,
            )
        )
    return found


def _standing(clouds: Clouds, score: str, row: int) -> Standing:
    values = clouds.columns[score][(clouds.kind == clouds.kind[row]) & ~clouds.constant]
    value = float(clouds.columns[score][row])
    lower, higher = int(np.count_nonzero(values < value)), int(np.count_nonzero(values > value))
    return Standing(value, higher + 1, len(values), 100 * lower / len(values))


def _fate(
    scores: Scores, plan: Plan | None, layer: int, kind: str, head: int, heads: int, groups: int
) -> tuple[tuple[int, int] | None, str | None]:
    if plan is None:
        return None, None
    if head < 0:
        return None, "removed" if layer in plan.layers_dropped else "kept"
    site, head = ("value", head // groups) if kind == "context" else (kind, head)
    rows = scores.rows(layer, site)
    width = rows.stop - rows.start
    size = width // parts_of(site, heads, groups)
    kept = sum(head * size <= index < (head + 1) * size for index in plan.indices(f"{layer}.{site}", width))
    return (kept, size), "kept" if kept else "removed"


# ---- merges ----------------------------------------------------------------------------------------------------------


def last_merges(linkage: NDArray[np.float64], most: int = MERGES) -> Tree:
    """The last merges of a hierarchy as a tree whose leaves stand in an order without crossings, larger sides left.

    Args:
        linkage: [n - 1, 4], as `H0.linkage` and scipy give it.
        most: Merges taken, at least 1.
    """
    n = len(linkage) + 1
    first = max(0, len(linkage) - most)  # the first merge that is drawn

    def size(node: int) -> int:
        return 1 if node < n else int(linkage[node - n, 3])

    leaves: list[int] = []
    waiting = [2 * n - 2]
    while waiting:
        node = waiting.pop()
        if node < n + first:
            leaves.append(node)
            continue
        a, b = sorted((int(linkage[node - n, 0]), int(linkage[node - n, 1])), key=size, reverse=True)
        waiting += [b, a]
    place = {node: i for i, node in enumerate(leaves)}
    left = {node: i for i, node in enumerate(leaves)}  # leftmost leaf of each
    merges = []
    for step in range(first, len(linkage)):
        a, b = sorted((int(linkage[step, 0]), int(linkage[step, 1])), key=left.__getitem__)
        place[n + step], left[n + step] = len(leaves) + step - first, left[a]
        merges.append((place[a], place[b], float(linkage[step, 2])))
    return Tree(
        tuple(size(node) for node in leaves),
        tuple(0.0 if node < n else float(linkage[node - n, 2]) for node in leaves),
        tuple(merges),
    )


def _joining_last(linkage: NDArray[np.float64], texts: NDArray[np.int64], corpus: Corpus) -> tuple[NearText, ...]:
    n = len(texts)
    found: list[NearText] = []
    for a, b, death, _ in linkage[::-1].tolist():
        for point in (int(a), int(b)):
            if point < n and len(found) < _LAST:
                found.append(NearText(int(texts[point]), as_one(corpus, int(texts[point])), death))
    return tuple(found)


# ---- clusters --------------------------------------------------------------------------------------------------------


def scales_of(linkage: NDArray[np.float64]) -> list[tuple[float, float, str]]:
    """Scales that the data suggest: (death below, death above, why), ascending.

    Those are the scale with the most clusters of 1 % of the texts (at least 3), and the two largest ratios of
    consecutive deaths in the upper half of the merges that differ by a factor of 4 in their number of components: of
    gaps that cut off a few more or fewer odd texts one is enough.

    Args:
        linkage: [n - 1, 4], as `H0.linkage` and scipy give it; n is at least 3.
    """
    n = len(linkage) + 1
    deaths = linkage[:, 2]
    apart = np.flatnonzero(deaths[1:] > deaths[:-1])  # a scale lies behind merge i
    if not apart.size:
        return []
    least = max(3, -(-n // 100))
    sizes = np.concatenate([np.ones(n), linkage[:, 3]])
    ends = linkage[:, :2].astype(np.int64)
    change = (linkage[:, 3] >= least).astype(np.int64) - (sizes[ends] >= least).sum(axis=1)
    clusters = np.cumsum(change)
    found: dict[int, str] = {}
    upper = apart[apart >= n // 2 - 1]
    with np.errstate(divide="ignore"):
        ratios = deaths[upper + 1] / deaths[upper]
    components = n - 1 - upper
    gaps: list[int] = []
    for at in np.argsort(-ratios, kind="stable").tolist():
        far = np.maximum(components[gaps], components[at]) >= _FACTOR * np.minimum(components[gaps], components[at])
        if len(gaps) < _GAPS and far.all():
            gaps.append(at)
            many = "" if not np.isfinite(ratios[at]) else f", × {ratios[at]:.3g}"
            found[int(upper[at])] = f"a large relative gap between deaths{many}"
    most = int(apart[clusters[apart].argmax()])
    if clusters[most] > 1:
        found.setdefault(most, f"most clusters of {least} texts or more: {clusters[most]}")
    return [(float(deaths[i]), float(deaths[i + 1]), found[i]) for i in sorted(found)]


def _scales(answer: H0, points: NDArray[np.float32], texts: NDArray[np.int64], corpus: Corpus) -> tuple[Scale, ...]:
    found = []
    for below, above, why in scales_of(answer.linkage(0)):
        at = below + (above - below) / 2
        labels = answer.labels(at, 0)
        sizes = np.bincount(labels)
        order = np.argsort(-sizes, kind="stable")
        joined = [int(label) for label in order if sizes[label] > 1]
        found.append(
            Scale(
                at,
                below,
                above,
                why,
                tuple(int(sizes[label]) for label in joined),
                int(np.count_nonzero(sizes == 1)),
                tuple(_cluster(points, np.flatnonzero(labels == label), texts, corpus) for label in joined[:LARGER]),
            )
        )
    return tuple(found)


def _cluster(
    points: NDArray[np.float32], members: NDArray[np.int64], texts: NDArray[np.int64], corpus: Corpus
) -> Cluster:
    inside = points[members].astype(np.float64)
    distances = np.linalg.norm(inside - inside.mean(axis=0), axis=1)
    nearest = np.argsort(distances, kind="stable")[:NEAREST]
    return Cluster(
        len(members),
        tuple(
            NearText(int(texts[members[i]]), as_one(corpus, int(texts[members[i]])), float(distances[i]))
            for i in nearest.tolist()
        ),
    )


def as_one(corpus: Corpus, number: int) -> str:
    """A text of a corpus; of a pair, both with a line break between."""
    return corpus.texts[number] if corpus.pairs is None else f"{corpus.texts[number]}\n{corpus.pairs[number]}"
