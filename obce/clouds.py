"""Heads and layers as point clouds: where 0-dimensional persistence is stable and more than one sort.

A head's query, key, value or context vector at [CLS] is a point of 32 to 64 coordinates, one a text; a layer's [CLS]
vector one of 384 to 1,024. The deaths of such a cloud are the edge lengths of its minimum spanning tree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from obce.h0 import H0, h0

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

CLOUD_KINDS = ("query", "key", "value", "context", "hidden")
"""Vectors of a text at [CLS]: a head's, and `hidden`, the output of the whole layer."""

CLOUD_SCORES = ("rf", "total_persistence", "entropy")

# As for neurons (obce.scores): layer-0 query, key and value are the same vector for every text up to rounding.
_CONSTANT_TOLERANCE = 2e-5


@dataclass(frozen=True)
class Clouds:
    """Persistence of every head's and layer's cloud, one row a cloud, ordered by layer, kind and head.

    Attributes:
        layer: [M] int16.
        kind: [M] int8, position in `CLOUD_KINDS`.
        head: [M] int16, -1 for `hidden`.
        n: Points a cloud.
        d: [M] int32, coordinates.
        constant: [M] bool, the points do not differ beyond rounding; all columns are then NaN.
        columns: Name -> [M] float64: `rf` (largest death, an edge length), `total_persistence` (sum of deaths),
            `entropy` (of the deaths as shares of their sum, natural logarithm); each again as `<name>_a` and
            `<name>_b` on two disjoint halves of the texts.
    """

    layer: NDArray[np.int16]
    kind: NDArray[np.int8]
    head: NDArray[np.int16]
    n: int
    d: NDArray[np.int32]
    constant: NDArray[np.bool_]
    columns: dict[str, NDArray[np.float64]]

    def __len__(self) -> int:
        return len(self.layer)

    def names(self) -> list[str]:
        """[M] names: `"5.query.3"`, or `"5.hidden"`."""
        return [
            f"{layer}.{CLOUD_KINDS[kind]}" + ("" if head < 0 else f".{head}")
            for layer, kind, head in zip(self.layer.tolist(), self.kind.tolist(), self.head.tolist(), strict=True)
        ]

    def row(self, layer: int, kind: str, head: int = -1) -> int:
        """Row of a cloud; head is -1 for `hidden`.

        Raises:
            KeyError: There is none.
        """
        here = (self.layer == layer) & (self.kind == CLOUD_KINDS.index(kind)) & (self.head == head)
        if not here.any():
            raise KeyError(f"there is no cloud of layer {layer}, {kind}, head {head}")
        return int(here.argmax())

    def stability(self, score: str) -> dict[str, float]:
        """Kind -> Spearman correlation of a score between the two halves, over all clouds of that kind; NaN below 3.

        Raises:
            ValueError: No such score.
        """
        from scipy.stats import spearmanr

        if score not in CLOUD_SCORES:
            raise ValueError(f"score is {score!r}, expected one of {', '.join(CLOUD_SCORES)}.")
        found = {}
        for code, kind in enumerate(CLOUD_KINDS):
            rows = (self.kind == code) & ~self.constant
            a, b = self.columns[f"{score}_a"][rows], self.columns[f"{score}_b"][rows]
            defined = np.count_nonzero(rows) >= 3 and np.ptp(a) > 0 and np.ptp(b) > 0
            found[kind] = float(spearmanr(a, b).statistic) if defined else float("nan")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; NaN as None."""
        return {
            "n": self.n,
            "layer": self.layer.tolist(),
            "kind": [CLOUD_KINDS[code] for code in self.kind],
            "head": self.head.tolist(),
            "d": self.d.tolist(),
            "constant": self.constant.tolist(),
            **{
                name: [None if np.isnan(value) else value for value in column.tolist()]
                for name, column in self.columns.items()
            },
        }

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Clouds:
        """What `to_dict` gave.

        Raises:
            KeyError, ValueError, TypeError: It is not that.
        """
        return cls(
            np.array(facts["layer"], np.int16),
            np.array([CLOUD_KINDS.index(kind) for kind in facts["kind"]], np.int8),
            np.array(facts["head"], np.int16),
            int(facts["n"]),
            np.array(facts["d"], np.int32),
            np.array(facts["constant"], np.bool_),
            {
                name: np.array(facts[name], np.float64)
                for score in CLOUD_SCORES
                for name in (score, f"{score}_a", f"{score}_b")
            },
        )


def place_of(name: str, layers: Sequence[int], heads: int) -> tuple[int, str, int]:
    """Layer, kind and head (-1 for `hidden`) of a cloud's name.

    Args:
        name: `"5.query.3"` (layer, kind of `CLOUD_KINDS`, head) or `"5.hidden"`.
        layers: Layers that there are.
        heads: Heads of a layer.

    Raises:
        ValueError: It names none.
    """
    found = re.fullmatch(r"(\d{1,6})\.([a-z]+)(?:\.(\d{1,6}))?", name, re.ASCII)
    if found is not None and found[2] in CLOUD_KINDS and int(found[1]) in layers:
        head = -1 if found[3] is None else int(found[3])
        if (found[2] == "hidden") == (head < 0) and head < heads:
            return int(found[1]), found[2], head
    raise ValueError(
        f"cloud is {name!r}, expected layer.kind.head with a layer from {min(layers, default=0)} to "
        f"{max(layers, default=0)}, a kind of {', '.join(CLOUD_KINDS[:-1])} and a head below {heads}, or layer.hidden"
    )


def points_of(vectors: NDArray[np.float32], heads: int, head: int) -> NDArray[np.float32]:
    """float32 [n, d], contiguous: a head's part of vectors [n, width] of all heads, or all of it where head is -1."""
    if head < 0:
        return np.ascontiguousarray(vectors)
    size = vectors.shape[1] // heads
    return np.ascontiguousarray(vectors[:, head * size : (head + 1) * size])


def parts_of(kind: str, heads: int, groups: int = 1) -> int:
    """Clouds of a kind in a layer: its heads, of which `groups` of the query share one of key and value; or 1."""
    if kind == "hidden":
        return 1
    return heads // groups if kind in ("key", "value") else heads


def cloud_scores(
    vectors: Mapping[tuple[int, str], tuple[NDArray[np.float32] | torch.Tensor, NDArray[np.float32] | torch.Tensor]],
    heads: int,
    groups: int = 1,
    *,
    threads: int | None = None,
) -> Clouds:
    """Persistence of every head's and layer's cloud.

    Args:
        vectors: (layer, kind of `CLOUD_KINDS`) -> vectors of the texts of each half, float32 [n_a, width] and
            [n_b, width], at least 2 each. Every kind but `hidden` is cut into equal parts, its heads. Tensors are
            scored where they lie, all clouds of a shape at a time.
        heads: Heads of query, and of the context, a layer.
        groups: How many of them share a head of key and value.
        threads: Default as `obce.h0`.
    """
    order = sorted(vectors, key=lambda at: (at[0], CLOUD_KINDS.index(at[1])))
    tensors = any(not isinstance(part, np.ndarray) for pair in vectors.values() for part in pair)
    parts_by = {at: parts_of(at[1], heads, groups) for at in order}
    answers = _by_shape(vectors, parts_by) if tensors else {}
    rows: dict[str, list[NDArray[Any]]] = {}
    n = 0
    for layer, kind in order:
        a, b = vectors[layer, kind]
        parts = parts_by[layer, kind]
        n = len(a) + len(b)
        constant, found = answers[layer, kind] if tensors else _of_arrays(a, b, parts, threads)  # type: ignore[arg-type]
        facts: dict[str, NDArray[Any]] = {
            "layer": np.full(parts, layer, np.int16),
            "kind": np.full(parts, CLOUD_KINDS.index(kind), np.int8),
            "head": np.full(1, -1, np.int16) if kind == "hidden" else np.arange(parts, dtype=np.int16),
            "d": np.full(parts, a.shape[1] // parts, np.int32),
            "constant": constant,
        }
        for suffix, answer in zip(("", "_a", "_b"), found, strict=True):
            for name, column in (
                ("rf", answer.r_f),
                ("total_persistence", answer.total_persistence()),
                ("entropy", answer.entropy()),
            ):
                facts[name + suffix] = np.where(constant, np.nan, np.asarray(column, np.float64))
        for name, column in facts.items():
            rows.setdefault(name, []).append(column)
    joined = {name: np.concatenate(columns) for name, columns in rows.items()}
    fixed = [joined.pop(name) for name in ("layer", "kind", "head", "d", "constant")]
    return Clouds(fixed[0], fixed[1], fixed[2], n, fixed[3], fixed[4], joined)


_Answers = tuple["NDArray[np.bool_]", list[H0]]  # [parts] constant; of all texts and of each half


def _of_arrays(a: NDArray[np.float32], b: NDArray[np.float32], parts: int, threads: int | None) -> _Answers:
    # [parts, n, width / parts]
    clouds = np.ascontiguousarray(np.concatenate([a, b]).reshape(len(a) + len(b), parts, -1).transpose(1, 0, 2))
    constant = np.ptp(clouds, axis=1).max(axis=1) <= _CONSTANT_TOLERANCE * np.abs(clouds).max(axis=(1, 2))
    return constant, [h0(some, threads=threads) for some in (clouds, clouds[:, : len(a)], clouds[:, len(a) :])]


def _by_shape(
    vectors: Mapping[tuple[int, str], tuple[Any, Any]], parts_by: Mapping[tuple[int, str], int]
) -> dict[tuple[int, str], _Answers]:
    """All clouds of heads of a shape in one call, all layers in another; fetched when all are done."""
    import torch

    device = next(part.device for pair in vectors.values() for part in pair if isinstance(part, torch.Tensor))
    under_way = []
    shapes = {at: (at[1] == "hidden", parts, vectors[at][0].shape[1]) for at, parts in parts_by.items()}
    for shape in sorted(set(shapes.values())):
        some = [at for at in parts_by if shapes[at] == shape]
        parts = shape[1]
        halves = [[torch.as_tensor(vectors[at][half]).to(device) for at in some] for half in (0, 1)]
        whole = torch.stack([torch.cat(pair) for pair in zip(*halves, strict=True)])  # [sites, n, width]
        clouds = whole.view(*whole.shape[:2], parts, -1).transpose(1, 2).flatten(0, 1).contiguous()
        spread = (clouds.amax(1) - clouds.amin(1)).amax(1)
        constant = spread <= _CONSTANT_TOLERANCE * clouds.abs().amax((1, 2))
        n_a = len(halves[0][0])
        deaths = [h0(part, check=False).deaths for part in (clouds, clouds[:, :n_a], clouds[:, n_a:])]
        under_way.append((some, parts, constant, deaths))
    found: dict[tuple[int, str], _Answers] = {}
    for some, parts, constant, tensors in under_way:
        flags, arrays = constant.cpu().numpy(), [np.asarray(deaths.cpu()) for deaths in tensors]  # type: ignore[union-attr]
        for i, at in enumerate(some):
            here = slice(i * parts, (i + 1) * parts)
            of_site = [
                H0(deaths[here], None, np.full(parts, deaths.shape[1] + 1), "device", "auto") for deaths in arrays
            ]
            found[at] = flags[here], of_site
    return found
