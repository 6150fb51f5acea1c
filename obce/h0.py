"""The door of the engine: exact 0-dimensional Vietoris-Rips persistence of one cloud or of many.

Axes: B clouds, n points, d coordinates. A death is the scale at which a component merges into another: an **edge
length**, not half of it. n points have n - 1 finite deaths, the edges of the minimum spanning tree. r_f is the
largest of them. Exactness and the order of ties: obce/reference.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from obce import backends

if TYPE_CHECKING:
    import torch

Array: TypeAlias = "NDArray[Any] | torch.Tensor"
Input: TypeAlias = "ArrayLike | torch.Tensor"

MAX_POINTS = 1 << 30

_TILE = 128  # a matrix is checked in square tiles, so that both a tile and its mirror stay in the cache


def _is_torch(x: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _namespace(x: Any) -> ModuleType:
    return sys.modules["torch"] if _is_torch(x) else np


def _to_numpy(x: Any) -> NDArray[Any]:
    array: NDArray[Any] = x.cpu().numpy() if _is_torch(x) else x
    return array


@dataclass(frozen=True, eq=False)
class H0:
    """0-dimensional persistence of B clouds. Arrays are numpy or torch, as the input was, and on its device.

    Attributes:
        deaths: [B, n - 1] edge lengths, ascending in each row, float32 or float64. +inf: that component never
            merges (beyond max_edge, or no edge in the matrix). NaN: padding beyond lengths - 1, and the whole row
            of a cloud that is not finite when the input was not checked.
        edges: [B, n - 1, 2] int64, the two points that each death joins, smaller index first, in the order
            (weight, smaller index, larger index); -1 where there is no edge. None unless edges=True.
        lengths: [B] int64, number of points of each cloud.
        backend: name of the backend that answered.
        algorithm: what it ran.
    """

    deaths: Array
    edges: Array | None
    lengths: Array
    backend: str
    algorithm: str

    def __len__(self) -> int:
        return len(self.deaths)

    @property
    def r_f(self) -> Any:
        """[B] scale at which each cloud has become one component: its last death.

        0 for one point, +inf for a cloud that does not become connected.
        """
        deaths: Any = self.deaths
        lengths: Any = self.lengths
        xp = _namespace(deaths)
        if deaths.shape[1] == 0:
            return xp.zeros_like(lengths, dtype=deaths.dtype)
        last = xp.clip(lengths - 2, 0, None)[:, None]
        value = xp.take_along_dim(deaths, last, 1) if xp is not np else np.take_along_axis(deaths, last, 1)
        return xp.where(lengths > 1, value[:, 0], xp.zeros_like(value[:, 0]))

    def _finite_deaths(self) -> Any:
        """[B, n - 1] deaths with 0 in place of what is infinite or padding; NaN rows stay NaN."""
        deaths: Any = self.deaths
        lengths: Any = self.lengths
        xp = _namespace(deaths)
        column = xp.arange(deaths.shape[1]) if xp is np else xp.arange(deaths.shape[1], device=deaths.device)
        skip = xp.isinf(deaths) | (column >= lengths[:, None] - 1)
        return xp.where(skip, xp.zeros_like(deaths), deaths)

    def total_persistence(self, p: float = 1.0) -> Any:
        """Sum of the p-th powers of the finite deaths.

        For d = 1 and p = 1 that is the range of the values, up to rounding.

        Args:
            p: exponent, positive.

        Returns:
            [B].

        Raises:
            ValueError: p is not positive.
        """
        if not p > 0:
            raise ValueError(f"p is {p}, expected a positive number.")
        return (self._finite_deaths() ** p).sum(1)

    def entropy(self) -> Any:
        """Persistent entropy (natural logarithm) of the finite deaths: -sum q log q, q = death / sum of deaths.

        Returns:
            [B]; 0 where all deaths are 0 or there are none.
        """
        deaths = self._finite_deaths()
        xp = _namespace(deaths)
        total = deaths.sum(1)[:, None]
        q = deaths / xp.where(total == 0, xp.ones_like(total), total)
        return -(q * xp.log(xp.where(q == 0, xp.ones_like(q), q))).sum(1)

    def betti(self, r: float) -> Any:
        """Number of components of each cloud at scale r (edges of length <= r are in).

        Args:
            r: scale, an edge length.

        Returns:
            [B] int64.

        Raises:
            ValueError: r is NaN.
        """
        if math.isnan(r):
            raise ValueError("r is NaN, expected a number.")
        deaths: Any = self.deaths
        lengths: Any = self.lengths
        wide = deaths.astype(np.float64) if _namespace(deaths) is np else deaths.double()
        return lengths - (wide <= r).sum(1)

    def diagrams(self) -> list[NDArray[Any]]:
        """The persistence diagrams in ripser's layout.

        Returns:
            B numpy arrays [lengths[i], 2] of (0, death), ascending, the essential class (0, inf) last. Unlike
            ripser, merges of length 0 (duplicates) are listed too.
        """
        deaths, lengths = _to_numpy(self.deaths), _to_numpy(self.lengths)
        out = []
        for row, length in zip(deaths, lengths, strict=True):
            diagram = np.zeros((int(length), 2), deaths.dtype)
            diagram[:-1, 1] = row[: length - 1]
            diagram[-1, 1] = np.inf
            out.append(diagram)
        return out

    def linkage(self, i: int) -> NDArray[np.float64]:
        """Single-linkage hierarchy of cloud i as scipy.cluster.hierarchy writes it.

        Args:
            i: index of the cloud.

        Returns:
            Z [lengths[i] - 1, 4]: the two clusters merged (smaller number first), their distance, the new size.

        Raises:
            ValueError: edges were not asked for, or the cloud is not connected.
            IndexError: there is no cloud i.
        """
        if self.edges is None:
            raise ValueError("edges is None and a linkage needs them; call again with edges=True.")
        if not -len(self) <= i < len(self):
            raise IndexError(f"i is {i}, expected a cloud from 0 to {len(self) - 1}.")
        n = int(self.lengths[i])
        deaths, edges = _to_numpy(self.deaths[i])[: n - 1], _to_numpy(self.edges[i])[: n - 1]
        if not np.isfinite(deaths).all():
            raise ValueError(f"cloud {i} is not connected, and scipy's linkage needs one tree; raise max_edge.")
        parent, cluster, size = list(range(n)), list(range(n)), [1] * n

        def root(x: int) -> int:
            while parent[x] != x:
                parent[x] = parent[parent[x]]
                x = parent[x]
            return x

        z = np.empty((n - 1, 4))
        for step, (a, b) in enumerate(edges.tolist()):
            left, right = root(a), root(b)
            parent[right] = left
            size[left] += size[right]
            z[step] = *sorted((cluster[left], cluster[right])), deaths[step], size[left]
            cluster[left] = n + step
        return z


def _take(x: Input, name: str) -> Any:
    """The input as float32 or float64: numpy when it lies on the host, a torch tensor otherwise."""
    if _is_torch(x):
        import torch

        tensor: Any = x
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name} is a {tensor.layout} tensor, expected a dense one; call .to_dense() first.")
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()
        elif tensor.dtype not in (torch.float32, torch.float64):
            if tensor.is_complex() or tensor.is_floating_point() or tensor.dtype == torch.bool:
                raise TypeError(_dtype_sentence(name, tensor.dtype))
            tensor = tensor.double()
        tensor = tensor.detach()
        return tensor.numpy() if tensor.device.type == "cpu" else tensor
    try:
        array = np.asarray(x)
    except ValueError as error:
        raise ValueError(
            f"{name} is a ragged sequence ({error}); pad the clouds to one size and pass their sizes as lengths."
        ) from None
    if array.dtype.kind == "f" and array.dtype.itemsize <= 8:
        return array.astype(np.float64 if array.dtype.itemsize == 8 else np.float32, copy=False)
    if array.dtype.kind in "iu":
        return array.astype(np.float64)
    raise TypeError(_dtype_sentence(name, array.dtype))


def _dtype_sentence(name: str, dtype: object) -> str:
    return (
        f"{name} has dtype {dtype}, expected float16, bfloat16, float32, float64 or an integer type; "
        "convert it to float32 or float64."
    )


def _give(array: Any, like: Input) -> Any:
    """A backend's array as the kind, and on the device, of the input."""
    if not _is_torch(like):
        return _to_numpy(array)
    import torch

    tensor: Any = like
    return torch.as_tensor(array).to(tensor.device)


def _shape(x: Any) -> str:
    return "[" + ", ".join(map(str, x.shape)) + "]"


def _sizes(name: str, n: int, d: int = 1) -> None:
    if n == 0:
        raise ValueError(f"{name} has clouds of 0 points, expected at least 1; drop empty clouds.")
    if d == 0:
        raise ValueError(f"{name} has points with 0 coordinates, expected at least 1.")
    if n > MAX_POINTS:
        raise ValueError(f"{name} has clouds of {n} points, expected at most {MAX_POINTS}.")


def _take_lengths(lengths: Any, B: int, n: int) -> NDArray[np.int64] | None:
    if lengths is None:
        return None
    array = np.asarray(lengths.cpu() if _is_torch(lengths) else lengths)
    if array.ndim == 0:
        array = array[None]
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"lengths has dtype {array.dtype}, expected integers.")
    if array.shape != (B,):
        raise ValueError(f"lengths has shape {_shape(array)}, expected [{B}], one number a cloud.")
    bad = np.flatnonzero((array < 1) | (array > n))
    if bad.size:
        i = int(bad[0])
        raise ValueError(f"lengths[{i}] is {array[i]}, expected 1 to {n}, the size of a padded cloud.")
    return np.ascontiguousarray(array, np.int64)


def _check_finite(data: Any, lengths: NDArray[np.int64] | None, name: str) -> None:
    """Raises on the first NaN or infinity; data is [B, n] or [B, n, d]."""
    xp = _namespace(data)
    if xp is np:
        with np.errstate(all="ignore"):
            total = data.sum()
    else:
        total = data.sum()
    if xp.isfinite(total):  # NaN and infinities survive any sum; a finite one has met none
        return
    bad = ~xp.isfinite(data)
    if bad.ndim == 3:
        bad = bad.any(2)
    bad = _to_numpy(bad)
    if lengths is not None:
        bad &= np.arange(bad.shape[1]) < lengths[:, None]
    if bad.any():
        i, j = (int(k) for k in np.unravel_index(int(bad.argmax()), bad.shape))
        value = [float(v) for v in data[i, j].reshape(-1)]
        found = next(v for v in value if not math.isfinite(v))
        raise ValueError(
            f"{name}: cloud {i}, point {j} holds {found}, expected finite numbers; "
            "drop that point or mark it as padding with lengths."
        )


def _check_matrices(entries: NDArray[Any], lengths: NDArray[np.int64] | None) -> None:
    """Raises unless every matrix is symmetric, non-negative and zero on the diagonal."""
    B, n, _ = entries.shape
    for b in range(B):
        m = n if lengths is None else int(lengths[b])
        a = entries[b, :m, :m]
        diagonal = np.flatnonzero(a.diagonal() != 0)
        if diagonal.size:
            i = int(diagonal[0])
            raise ValueError(
                f"matrix {b} has {a[i, i]} at [{i}, {i}], expected 0 on the diagonal; pass distances, not similarities."
            )
        for at, beside in ((i, j) for i in range(0, m, _TILE) for j in range(i, m, _TILE)):
            tile = a[at : at + _TILE, beside : beside + _TILE]
            mirror = a[beside : beside + _TILE, at : at + _TILE].T
            if (tile == mirror).all() and tile.min() >= 0:
                continue
            for wrong, what in ((np.isnan(tile), "a distance or inf for no edge"), (tile < 0, "distances >= 0")):
                if wrong.any():
                    i, j = (int(k) for k in np.argwhere(wrong)[0])
                    raise ValueError(f"matrix {b} has {tile[i, j]} at [{at + i}, {beside + j}], expected {what}.")
            i, j = (int(k) for k in np.argwhere(tile != mirror)[0])
            raise ValueError(
                f"matrix {b} is not symmetric: {tile[i, j]} at [{at + i}, {beside + j}] but {mirror[i, j]} at "
                f"[{beside + j}, {at + i}]; pass for example (m + m.T) / 2."
            )


def _take_threads(threads: int | None) -> int:
    if threads is None:
        return backends.default_threads()
    if isinstance(threads, bool) or not isinstance(threads, int | np.integer):
        raise TypeError(f"threads is {threads!r}, expected a whole number or None.")
    if threads < 1:
        raise ValueError(f"threads is {threads}, expected at least 1.")
    return min(int(threads), 1024)


def _take_max_edge(max_edge: float | None) -> float | None:
    if max_edge is not None and not max_edge >= 0:
        raise ValueError(f"max_edge is {max_edge}, expected a length >= 0 or None.")
    return None if max_edge is None else float(max_edge)


def _take_algorithm(algorithm: str, kind: backends.Kind, edges: bool) -> str:
    if algorithm not in backends.ALGORITHMS:
        raise ValueError(f"algorithm is {algorithm!r}, expected one of {', '.join(backends.ALGORITHMS)}.")
    if algorithm == "sort" and kind != "line":
        raise ValueError("algorithm is 'sort', which needs points with 1 coordinate; use 'auto' or 'prim' here.")
    if algorithm == "sort" and edges:
        raise ValueError(
            "algorithm is 'sort', which finds lengths but not the edges that the order of ties asks for; "
            "use 'auto' or 'prim' with edges=True."
        )
    if algorithm in ("boruvka", "kdtree") and kind == "matrix":
        raise ValueError(f"algorithm is {algorithm!r}, which needs points; use 'auto' or 'prim' for matrices.")
    return algorithm


def _beyond(values: Any, max_edge: float) -> Any:
    """Where a length exceeds max_edge, compared without rounding it to the dtype of the lengths."""
    return (values.astype(np.float64) if _namespace(values) is np else values.double()) > max_edge


def _h0(
    like: Input,
    data: Any,
    kind: backends.Kind,
    lengths: NDArray[np.int64] | None,
    max_edge: float | None,
    edges: bool,
    algorithm: str,
    backend: str | None,
    threads: int | None,
) -> H0:
    job = backends.Job(
        kind,
        data,
        lengths,
        "edges" if edges else "deaths",
        _take_algorithm(algorithm, kind, edges),
        _take_threads(threads),
    )
    limit = _take_max_edge(max_edge)
    answer = backends.run(job, backend)
    deaths, ends = answer.lengths, answer.edges
    if limit is not None:
        beyond = _beyond(deaths, limit)
        deaths[beyond] = math.inf
        if ends is not None:
            ends[beyond] = -1
    B, n = data.shape[:2]
    counts = np.full(B, n, np.int64) if lengths is None else lengths
    return H0(
        _give(deaths, like),
        None if ends is None else _give(ends, like),
        _give(counts, like),
        answer.backend,
        answer.algorithm,
    )


def h0(
    points: Input,
    *,
    lengths: Sequence[int] | Array | None = None,
    metric: str = "euclidean",
    max_edge: float | None = None,
    edges: bool = False,
    algorithm: str = "auto",
    backend: str | None = None,
    check: bool = True,
    threads: int | None = None,
) -> H0:
    """Exact 0-dimensional Vietoris-Rips persistence of one cloud or a batch of clouds.

    Args:
        points: [n, d], one cloud, or [B, n, d], a batch; numpy, torch or nested sequences. float32 and float64 are
            computed as they are, float16 and bfloat16 in float32, integers in float64. No gradient is recorded.
        lengths: [B] number of points of each cloud; what lies beyond is padding and is never read. Default: n.
        metric: "euclidean".
        max_edge: longest edge allowed; deaths beyond it become +inf and their edges -1.
        edges: also return the edge behind each death.
        algorithm: "auto", "sort" (d = 1, without edges), "prim", "boruvka" or "kdtree" (for many points with few
                coordinates).
        backend: name of a backend, which then runs or raises. Default: the environment variable OBCE_BACKEND, else
            the best one for where the data lies.
        check: refuse NaN and infinities. Without it such a cloud answers NaN.
        threads: host threads. Default: OMP_NUM_THREADS, else the processors this process may use.

    Returns:
        H0 with B = 1 for one cloud; arrays of the kind and on the device of `points`, float32 or float64.

    Raises:
        TypeError: a dtype that is not a number's.
        ValueError: a shape, length, name or value that is refused; the sentence says which.
        RuntimeError: the named backend cannot run on this machine.
    """
    if metric != "euclidean":
        raise ValueError(
            f"metric is {metric!r}, expected 'euclidean'; compute other distances yourself and pass the matrix to "
            "obce.h0_distances."
        )
    data = _take(points, "points")
    if data.ndim == 1:
        raise ValueError(
            f"points has shape {_shape(data)}, expected [n, d] or [B, n, d]: the coordinate axis d is missing; for "
            "scalars use obce.h0_line."
        )
    if data.ndim not in (2, 3):
        raise ValueError(f"points has shape {_shape(data)}, expected [n, d] (one cloud) or [B, n, d] (a batch).")
    if data.ndim == 2:
        data = data[None]
    B, n, d = data.shape
    _sizes("points", n, d)
    counts = _take_lengths(lengths, B, n)
    if check:
        _check_finite(data, counts, "points")
    kind: backends.Kind = "line" if d == 1 else "cloud"
    return _h0(points, data[:, :, 0] if d == 1 else data, kind, counts, max_edge, edges, algorithm, backend, threads)


def _take_line(values: Input) -> Any:
    data = _take(values, "values")
    if data.ndim not in (1, 2):
        raise ValueError(
            f"values has shape {_shape(data)}, expected [n] (one cloud of scalars) or [B, n] (a batch); for points "
            "with coordinates use obce.h0."
        )
    if data.ndim == 1:
        data = data[None]
    _sizes("values", data.shape[1])
    return data


def h0_line(
    values: Input,
    *,
    lengths: Sequence[int] | Array | None = None,
    max_edge: float | None = None,
    edges: bool = False,
    algorithm: str = "auto",
    backend: str | None = None,
    check: bool = True,
    threads: int | None = None,
) -> H0:
    """`h0` of clouds of scalars: the deaths are the gaps between sorted neighbours.

    Args:
        values: [n], one cloud, or [B, n], a batch. Dtypes as in `h0`.
        lengths: as in `h0`.
        max_edge: as in `h0`.
        edges: as in `h0`. Ties can make an edge join points that are no sorted neighbours.
        algorithm: as in `h0`.
        backend: as in `h0`.
        check: as in `h0`.
        threads: as in `h0`.

    Returns:
        H0, as `h0`.

    Raises:
        TypeError: as `h0`.
        ValueError: as `h0`.
        RuntimeError: as `h0`.
    """
    data = _take_line(values)
    counts = _take_lengths(lengths, *data.shape)
    if check:
        _check_finite(data, counts, "values")
    return _h0(values, data, "line", counts, max_edge, edges, algorithm, backend, threads)


def h0_distances(
    matrix: Input,
    *,
    lengths: Sequence[int] | Array | None = None,
    max_edge: float | None = None,
    edges: bool = False,
    algorithm: str = "auto",
    backend: str | None = None,
    check: bool = True,
    threads: int | None = None,
) -> H0:
    """0-dimensional persistence of given distances (any metric, or any symmetric weights >= 0).

    Args:
        matrix: [n, n], or [B, n, n], a batch: exactly symmetric, 0 on the diagonal, >= 0; +inf is no edge.
        lengths: [B], the leading block of each matrix that counts.
        max_edge: as in `h0`.
        edges: as in `h0`.
        algorithm: "auto" or "prim".
        backend: as in `h0`.
        check: refuse what is not such a matrix. Without it NaN counts as no edge and asymmetry goes unseen.
        threads: as in `h0`.

    Returns:
        H0, as `h0`; +inf deaths where no edge connects.

    Raises:
        TypeError: as `h0`.
        ValueError: as `h0`; the sentence names the matrix and the entry.
        RuntimeError: as `h0`.
    """
    data = _take(matrix, "matrix")
    if data.ndim not in (2, 3) or data.shape[-1] != data.shape[-2]:
        raise ValueError(f"matrix has shape {_shape(data)}, expected [n, n] or [B, n, n]; for points use obce.h0.")
    if data.ndim == 2:
        data = data[None]
    _sizes("matrix", data.shape[1])
    counts = _take_lengths(lengths, *data.shape[:2])
    if check:
        _check_matrices(_to_numpy(data), counts)
    return _h0(matrix, data, "matrix", counts, max_edge, edges, algorithm, backend, threads)


def r_f(
    values: Input,
    *,
    lengths: Sequence[int] | Array | None = None,
    max_edge: float | None = None,
    backend: str | None = None,
    check: bool = True,
    threads: int | None = None,
) -> Any:
    """r_f of clouds of scalars: the largest gap between sorted neighbours, an edge length, without sorting.

    The importance of a neuron in OBCE (arXiv 2312.10702) with `values` its outputs at [CLS].

    Args:
        values: [n], one cloud, or [B, n], a batch. Dtypes as in `h0`.
        lengths: as in `h0`.
        max_edge: a larger gap becomes +inf.
        backend: as in `h0`.
        check: as in `h0`.
        threads: as in `h0`.

    Returns:
        [B] ([1] for one cloud), of the kind and on the device of `values`; 0 for one point.

    Raises:
        TypeError: as `h0`.
        ValueError: as `h0`.
        RuntimeError: as `h0`.
    """
    data = _take_line(values)
    counts = _take_lengths(lengths, *data.shape)
    limit = _take_max_edge(max_edge)
    answer = backends.run(backends.Job("line", data, counts, "r_f", "auto", _take_threads(threads)), backend)
    out = answer.lengths
    # Every backend answers NaN for a line of two or more values that is not finite: no scan of its own is needed.
    lone = data.shape[1] == 1 or (counts is not None and bool((counts == 1).any()))
    if check and (lone or bool(_namespace(out).isnan(out).any())):
        _check_finite(data, counts, "values")
    if limit is not None:
        out[_beyond(out, limit)] = math.inf
    return _give(out, values)
