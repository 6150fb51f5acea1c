"""The slow, obvious engine: the oracle of the tests and the answer where nothing else runs.

Rules (shared with csrc/ph0_cpu.h; every backend must give the same bits):

* d >= 2: the weight of an edge is its squared length as one chain of fused multiply-adds over the coordinates,
  in the input's precision: `w = fma(x_k - y_k, x_k - y_k, w)`. numpy has no fma, so it is emulated exactly.
  When the exponent e of the cloud's largest magnitude m (2^(e-1) <= m < 2^e) lies outside [-30, 40] (float32)
  or [-200, 400] (float64), coordinates are first multiplied by 2^-e and deaths by 2^e at the end.
* d = 1: the weight is `|x - y|`. It orders edges as the square does, since `sqrt(fl(g * g)) == g`.
* sqeuclidean: the same weights, so the same tree; the death is the weight times 2^(2e) (d = 1: `fl(g * g)`).
* cosine, correlation: rows are normalised once (obce/h0.py), then sqeuclidean; the death is half the weight.
* manhattan, d >= 2: one chain of additions in coordinate order in the input's precision, `w = w + |x_k - y_k|`,
  without fma; chebyshev, d >= 2: `w = max(w, |x_k - y_k|)`. Scaled as above; the death is the weight times 2^e.
* minkowski, d >= 2: `w = t * pow(s, 1 / p)` with t the largest |x_k - y_k| and s the chain of additions of
  `pow(|x_k - y_k| / t, p)`: differences in the input's precision, the rest in float64, rounded to the input's
  precision; 0 when t is 0. Scaled as above. `pow` is the C library's, which is not correctly rounded: within one
  process every backend gives the same bits, between platforms the last bit of a weight may differ.
* d = 1: manhattan, chebyshev and minkowski are `|x - y|`.
* a given matrix, condensed or square, or a graph: the weight is the entry, `+inf` is no edge.
* Edges are ordered by (weight, smaller index, larger index): a strict total order, so the minimum spanning
  forest is unique. Deaths are the weights of its edges (euclidean, d >= 2: their correctly rounded roots), ascending.
* A cloud with a NaN or infinite coordinate has NaN deaths and edges -1. Padding is NaN and -1 too, and so is an
  edge that does not exist (its death is +inf).

Axes: B clouds, n points, d coordinates. float32 or float64 in, the same out; edges int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Array = NDArray[Any]
Row = Callable[[int], Array]  # i -> weights of the edges {i, j}, j = 0..n-1

METRICS = ("euclidean", "sqeuclidean", "manhattan", "chebyshev", "minkowski")  # csrc/ph0_core.h numbers them alike

SAFE_EXPONENTS = {np.dtype(np.float32): (-30, 40), np.dtype(np.float64): (-200, 400)}

# Kruskal holds all n (n - 1) / 2 pairs; above this many points the reference grows the tree by Prim instead.
KRUSKAL_POINTS = 1024

_LINE_CHUNK = 1 << 16  # values sorted at a time: they stay in the cache


@dataclass(frozen=True)
class Graph:
    """Edges of one graph; loops and edges of weight NaN or +inf do not count, of parallel edges the least does.

    Attributes:
        ends_a: [m] int32, one end of each edge.
        ends_b: [m] int32, the other.
        weights: [m] float32 or float64.
        n: number of vertices.
    """

    ends_a: Array
    ends_b: Array
    weights: Array
    n: int


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b as a rounded sum and its exact error (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """a * b as a rounded product and its exact error (Veltkamp, Dekker)."""
    p = a * b
    split = 134217729.0  # 2^27 + 1
    ah = a * split
    ah = ah - (ah - a)
    al = a - ah
    bh = b * split
    bh = bh - (bh - b)
    bl = b - bh
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def _round_to_odd(s: Array, error: Array) -> Array:
    """The exact s + error rounded to odd: of the two doubles around it, the one with an odd last bit."""
    even = (s.view(np.int64) & 1) == 0
    towards = np.where(error > 0, np.inf, -np.inf)
    return np.where((error != 0) & even, np.nextafter(s, towards), s)


def _square_add(diff: Array, acc: Array) -> Array:
    """fma(diff, diff, acc) >= 0, correctly rounded, elementwise.

    float32: the product is exact in float64; the sum is rounded to odd there and then to float32, which equals
    one rounding since 53 >= 24 + 2. float64: the algorithm of Boldo and Melquiond (Emulation of a FMA and
    correctly rounded sums, 2008), and exact rationals where its error terms could underflow.
    """
    if diff.dtype == np.float32:
        wide = diff.astype(np.float64)
        s, error = _two_sum(wide * wide, acc.astype(np.float64))
        narrow: Array = _round_to_odd(s, error).astype(np.float32)
        return narrow
    uh, ul = _two_product(diff, diff)
    th, tl = _two_sum(acc, ul)
    vh, vl = _two_sum(uh, th)
    result: Array = vh + _round_to_odd(*_two_sum(tl, vl))
    for i in np.flatnonzero((uh < 2.0**-900) & (diff != 0)):
        result[i] = float(Fraction(float(diff[i])) ** 2 + Fraction(float(acc[i])))
    return result


def _minkowski(differences: Array, p: float) -> float:
    """Weight of one edge from the magnitudes [d] of its coordinate differences; math.pow is the C library's."""
    top = float(differences.max())
    if top == 0:
        return 0.0
    total = 0.0
    for difference in differences.tolist():
        total += math.pow(difference / top, p)
    return top * math.pow(total, 1 / p)


def weights(points: Array, i: int, metric: str = "euclidean", p: float = 0.0) -> Array:
    """Weights of the edges from point i of a (scaled) cloud.

    Args:
        points: [n, d], float32 or float64.
        i: index of a point.
        metric: one of METRICS.
        p: exponent of minkowski.

    Returns:
        [n]: for d = 1, manhattan, chebyshev and minkowski lengths, else squared lengths.
    """
    difference = points - points[i]
    if points.shape[1] == 1:
        length: Array = np.abs(difference[:, 0])
        return length
    if metric == "minkowski":
        return np.array([_minkowski(row, p) for row in np.abs(difference)]).astype(points.dtype)
    if metric == "chebyshev":
        longest: Array = np.abs(difference).max(1)
        return longest
    acc = np.zeros(len(points), points.dtype)
    if metric == "manhattan":
        for k in range(points.shape[1]):
            acc += np.abs(difference[:, k])
        return acc
    for k in range(points.shape[1]):
        acc = _square_add(difference[:, k].copy(), acc)
    return acc


def scaled(points: Array) -> tuple[Array, int]:
    """The cloud [n, d] times 2^-e and e; e is 0 inside the safe range and for d = 1 (module docstring)."""
    largest = np.abs(points).max()
    if points.shape[1] == 1 or largest == 0:
        return points + 0, 0  # + 0 turns -0 into +0
    exponent = int(np.frexp(largest)[1])
    low, high = SAFE_EXPONENTS[points.dtype]
    if low <= exponent <= high:
        return points + 0, 0
    return np.ldexp(points + 0, -exponent), exponent


def kruskal(row: Row, n: int) -> tuple[Array, Array]:
    """Minimum spanning forest by looking at every pair in the strict order.

    Args:
        row: weights of the edges from one vertex.
        n: number of vertices.

    Returns:
        (weights [n - 1], edges [n - 1, 2]) in the strict order; missing edges are (+inf, -1, -1).
    """
    lo, hi = np.triu_indices(n, 1)
    return _kruskal_of_pairs(np.concatenate([row(i)[i + 1 :] for i in range(n)]), lo, hi, n)


def _kruskal_of_pairs(weight: Array, lo: Array, hi: Array, n: int) -> tuple[Array, Array]:
    parent = list(range(n))

    def root(x: int) -> int:
        while parent[x] != x:
            x = parent[x]
        return x

    out_weight = np.full(n - 1, np.inf, weight.dtype)
    out_edges = np.full((n - 1, 2), -1, np.int64)
    found = 0
    for at in np.lexsort((hi, lo, weight)):
        if found == n - 1 or np.isnan(weight[at]):
            break
        a, b = root(int(lo[at])), root(int(hi[at]))
        if a != b:
            parent[max(a, b)] = min(a, b)
            out_weight[found] = weight[at]
            out_edges[found] = lo[at], hi[at]
            found += 1
    return out_weight, out_edges


def prim(row: Row, n: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """The same forest as `kruskal`, grown from vertex 0 with O(n) memory and n calls of `row`."""
    key = np.full(n, np.inf, dtype)
    other = np.full(n, n, np.int64)
    live = np.ones(n, bool)
    current = 0
    out_weight = np.full(n - 1, np.inf, dtype)
    out_edges = np.full((n - 1, 2), -1, np.int64)
    for step in range(n - 1):
        live[current] = False
        weight = row(current)
        better = live & ((weight < key) | ((weight == key) & (current < other)))
        key[better] = weight[better]
        other[better] = current
        reached = live & (other < n)
        if not reached.any():
            current = int(np.flatnonzero(live)[0])
            continue
        tied = np.flatnonzero(reached & (key == key[reached].min()))
        lo, hi = np.minimum(tied, other[tied]), np.maximum(tied, other[tied])
        first = np.lexsort((hi, lo))[0]
        current = int(tied[first])
        out_weight[step] = key[current]
        out_edges[step] = lo[first], hi[first]
    order = np.lexsort((out_edges[:, 1], out_edges[:, 0], out_weight))
    return out_weight[order], out_edges[order]


def _forest(row: Row, n: int, dtype: np.dtype[Any], algorithm: str) -> tuple[Array, Array]:
    if algorithm == "prim" or n > KRUSKAL_POINTS:
        return prim(row, n, dtype)
    return kruskal(row, n)


def _padded(B: int, n: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    return np.full((B, n - 1), np.nan, dtype), np.full((B, n - 1, 2), -1, np.int64)


def clouds_h0(
    points: Array,
    lengths: Array | None = None,
    algorithm: str = "auto",
    metric: str = "euclidean",
    p: float = 0.0,
) -> tuple[Array, Array]:
    """Deaths and edges of clouds, by definition.

    Args:
        points: [B, n, d], float32 or float64.
        lengths: [B] points of each cloud, or None for n everywhere.
        algorithm: "auto" (Kruskal over all pairs up to KRUSKAL_POINTS points) or "prim".
        metric: one of METRICS; for d = 1 "euclidean".
        p: exponent of minkowski.

    Returns:
        (deaths [B, n - 1], edges [B, n - 1, 2]).
    """
    B, n, _ = points.shape
    deaths, edges = _padded(B, n, points.dtype)
    for b in range(B):
        m = n if lengths is None else int(lengths[b])
        if m == 1 or not np.isfinite(points[b, :m]).all():
            continue
        cloud, exponent = scaled(points[b, :m])
        with np.errstate(over="ignore", under="ignore"):
            weight, edges[b, : m - 1] = _forest(partial(weights, cloud, metric=metric, p=p), m, points.dtype, algorithm)
            length = np.sqrt(weight) if metric == "euclidean" and cloud.shape[1] > 1 else weight
            deaths[b, : m - 1] = np.ldexp(length, 2 * exponent if metric == "sqeuclidean" else exponent)
    return deaths, edges


def _present(matrix: Array, i: int) -> Array:
    """Row i of a matrix [n, n], NaN where there is no edge: a NaN (only with check=False) or +inf."""
    row: Array = np.where(matrix[i] < np.inf, matrix[i], np.nan)
    return row


def matrices_h0(entries: Array, lengths: Array | None = None, algorithm: str = "auto") -> tuple[Array, Array]:
    """Deaths and edges of symmetric distance matrices [B, n, n]; +inf is no edge. Otherwise as `clouds_h0`."""
    B, n, _ = entries.shape
    deaths, edges = _padded(B, n, entries.dtype)
    for b in range(B):
        m = n if lengths is None else int(lengths[b])
        if m == 1:
            continue
        row = partial(_present, entries[b, :m, :m] + 0)
        weight, ends = _forest(row, m, entries.dtype, algorithm)
        deaths[b, : m - 1], edges[b, : m - 1] = weight, ends
    return deaths, edges


def condensed_points(m: int) -> int | None:
    """The n with n (n - 1) / 2 = m, or None; 1 for m = 0."""
    n = (1 + math.isqrt(1 + 8 * m)) // 2
    return n if n * (n - 1) // 2 == m else None


def _condensed_row(entries: Array, n: int, i: int) -> Array:
    """Row i [n] of the square matrix, NaN where there is no edge."""
    before = np.arange(i)
    at = before * n - before * (before + 1) // 2 + i - before - 1
    start = i * n - i * (i + 1) // 2
    row = np.concatenate([entries[at], np.zeros(1, entries.dtype), entries[start : start + n - i - 1]])
    return np.where(row < np.inf, row, np.nan)


def condensed_h0(entries: Array, algorithm: str = "auto") -> tuple[Array, Array]:
    """`matrices_h0` of one matrix given as its upper triangle row by row, [1, n (n - 1) / 2]."""
    n = condensed_points(entries.shape[1])
    assert n is not None  # noqa: S101  (checked at the door)
    deaths, edges = _padded(1, n, entries.dtype)
    deaths[0], edges[0] = _forest(partial(_condensed_row, entries[0] + 0, n), n, entries.dtype, algorithm)
    return deaths, edges


def graph_h0(graph: Graph) -> tuple[Array, Array]:
    """Deaths [1, n - 1] and edges [1, n - 1, 2] of a graph by Kruskal."""
    real = (graph.ends_a != graph.ends_b) & (graph.weights < np.inf)
    a, b = graph.ends_a[real].astype(np.int64), graph.ends_b[real].astype(np.int64)
    weight, edges = _kruskal_of_pairs(graph.weights[real] + 0, np.minimum(a, b), np.maximum(a, b), graph.n)
    return weight[None], edges[None]


def _sorted_gaps(values: Array, lengths: Array | None) -> Array:
    """Gaps [B, n - 1] of the sorted values; NaN beyond a row's length and in rows that are not finite."""
    x = values + 0
    if lengths is not None:
        x[np.arange(x.shape[1]) >= lengths[:, None]] = np.nan
        inside = np.arange(x.shape[1]) < lengths[:, None]
        broken = ~(np.isfinite(x) | ~inside).all(1)
    else:
        broken = ~np.isfinite(x).all(1)
    x[broken] = np.nan
    x.sort(1)  # NaN goes last
    gaps: Array = np.diff(x, axis=1)
    return gaps


def _line_chunks(values: Array) -> list[slice]:
    rows = max(1, _LINE_CHUNK // values.shape[1])
    return [slice(at, at + rows) for at in range(0, len(values), rows)]


def lines_deaths(values: Array, lengths: Array | None = None) -> Array:
    """Sorted gaps between sorted neighbours.

    Args:
        values: [B, n], float32 or float64: clouds of scalars.
        lengths: [B] or None.

    Returns:
        [B, n - 1], ascending, NaN-padded.
    """
    out = np.empty((len(values), values.shape[1] - 1), values.dtype)
    with np.errstate(over="ignore"):
        for rows in _line_chunks(values):
            out[rows] = np.sort(_sorted_gaps(values[rows], None if lengths is None else lengths[rows]), axis=1)
    return out


def lines_r_f(values: Array, lengths: Array | None = None) -> Array:
    """Largest gap between sorted neighbours, [B]; 0 for one point, NaN for a row that is not finite."""
    out = np.zeros(len(values), values.dtype)
    if values.shape[1] > 1:
        with np.errstate(over="ignore"):
            for rows in _line_chunks(values):
                gaps = _sorted_gaps(values[rows], None if lengths is None else lengths[rows])
                out[rows] = np.fmax.reduce(gaps, axis=1)
    if lengths is not None:
        out[np.asarray(lengths) == 1] = 0
    return out


def _torch_sorted_gaps(values: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    import torch

    x = values + 0
    inside = None
    if lengths is not None:
        inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    finite = torch.isfinite(x) if inside is None else torch.isfinite(x) | ~inside
    keep = finite.all(1, keepdim=True) if inside is None else finite.all(1, keepdim=True) & inside
    return torch.where(keep, x, torch.nan).sort(1).values.diff(dim=1)  # NaN goes last


def torch_lines_deaths(values: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """`lines_deaths` on the device of `values`."""
    return _torch_sorted_gaps(values, lengths).sort(1).values


def torch_lines_r_f(values: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """`lines_r_f` on the device of `values`."""
    import torch

    out = torch.zeros(len(values), dtype=values.dtype, device=values.device)
    if values.shape[1] > 1:
        gaps = _torch_sorted_gaps(values, lengths)
        # Padding is NaN and so is the first gap of a row that is not finite, and only of such a row (or one point).
        real = torch.where(torch.isnan(gaps), -1, gaps).amax(1)
        out = torch.where(torch.isnan(gaps[:, 0]), torch.nan, real)
    if lengths is not None:
        out = torch.where(lengths == 1, torch.zeros_like(out), out)
    return out


def forest_merges(edges: Array, n: int) -> tuple[Array, ...]:
    """The merges along the edges of a forest, in their order.

    Args:
        edges: [m, 2] int64.
        n: points.

    Returns:
        elder, younger (the smallest members of the two components, elder < younger), sizes (after the merge), first,
        second (the numbers of the two clusters, first < second; points are 0 to n - 1, merge i makes cluster n + i,
        as in scipy's linkage), each [m] int64.
    """
    parent, size, cluster = list(range(n)), [1] * n, list(range(n))

    def root(x: int) -> int:
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    out = np.empty((5, len(edges)), np.int64)
    for step, (a, b) in enumerate(edges.tolist()):
        elder, younger = sorted((root(a), root(b)))
        first, second = sorted((cluster[elder], cluster[younger]))
        parent[younger] = elder
        size[elder] += size[younger]
        out[:, step] = elder, younger, size[elder], first, second
        cluster[elder] = n + step
    return tuple(out)
