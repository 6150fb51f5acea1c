"""The door of the engine: exact 0-dimensional Vietoris-Rips persistence of one cloud or of many.

Axes: B clouds, n points, d coordinates. A death is the scale at which a component merges into another: an **edge
length**, not half of it. n points have n - 1 finite deaths, the edges of the minimum spanning tree. r_f is the
largest of them. Exactness and the order of ties: obce/reference.py.
"""

from __future__ import annotations

import importlib
import math
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from obce import backends, reference

if TYPE_CHECKING:
    import torch

Array: TypeAlias = "NDArray[Any] | torch.Tensor"
Input: TypeAlias = "ArrayLike | torch.Tensor"

MAX_POINTS = 1 << 30

METRICS = ("euclidean", "sqeuclidean", "cosine", "correlation", "manhattan", "chebyshev", "minkowski")

_DLPACK_HOST = 1  # kDLCPU
_ENTRIES = 1 << 26  # of matrices on a device checked at a time
_EXACT_INTEGER = 1 << 53
_NO_NUMBERS = (str, bytes, bool, np.bool_)  # although float() takes them
_ROWS = 1 << 16  # numbers of a cloud normalised at a time
_SQUARES = ("sqeuclidean", "cosine", "correlation")  # their engine's weight is a squared length
_TILE = 128  # a matrix is checked in square tiles, so that both a tile and its mirror stay in the cache


def _is_torch(x: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _namespace(x: Any) -> ModuleType:
    return sys.modules["torch"] if _is_torch(x) else np


def _to_numpy(x: Any) -> NDArray[Any]:
    array: NDArray[Any] = x.detach().cpu().numpy() if _is_torch(x) else x
    return array


@dataclass(frozen=True, eq=False)
class MergeTree:
    """The merges of one cloud in their order, each naming its two components by their smallest members.

    All points are born at scale 0, so which component survives a merge is a convention: the one with the smaller
    smallest member (the elder) lives on under its name, the other one (the younger) ends. Every point except the
    smallest of each final component is the younger of exactly one merge.

    Attributes:
        elder: [m] int64, smallest member of the component that lives on; m = n - 1 for a connected cloud.
        younger: [m] int64, smallest member of the component that ends; larger than elder.
        deaths: [m] scale of the merge, an edge length, ascending.
        sizes: [m] int64, number of points of the component after the merge.
    """

    elder: NDArray[np.int64]
    younger: NDArray[np.int64]
    deaths: NDArray[Any]
    sizes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.elder)


@dataclass(frozen=True, eq=False)
class H0:
    """0-dimensional persistence of B clouds. Arrays are numpy or torch, as the input was, and on its device.

    Attributes:
        deaths: [B, n - 1] edge lengths, ascending in each row, float32 or float64. +inf: that component never
            merges (beyond max_edge, or no edge in the matrix), or at a length that overflows. NaN: padding beyond
            lengths - 1, and the whole row of a cloud that is not finite when the input was not checked.
        edges: [B, n - 1, 2] int64, the two points that each death joins, smaller index first, in the order
            (weight, smaller index, larger index); -1 where there is no edge. None unless edges=True.
        lengths: [B] int64, number of points of each cloud.
        backend: name of the backend that answered. In code that torch.compile or torch.export traced, it and the
            algorithm are what was asked for, or "auto".
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
        value = np.take_along_axis(deaths, last, 1) if xp is np else deaths.gather(1, last)
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
        if deaths.shape[1] == 0:
            return deaths.sum(1)
        top = deaths.max(1)[:, None] if xp is np else deaths.amax(1)[:, None]
        share = deaths / xp.where(top == 0, xp.ones_like(top), top)  # whose sum does not overflow
        total = share.sum(1)[:, None]
        q = share / xp.where(total == 0, xp.ones_like(total), total)
        return 0 - (q * xp.log(xp.where(q == 0, xp.ones_like(q), q))).sum(1)

    def betti(self, r: float) -> Any:
        """Number of components of each cloud at scale r (edges of length <= r are in).

        Args:
            r: scale, an edge length.

        Returns:
            [B] int64; -1 for a cloud that is not finite.

        Raises:
            TypeError: r is not a number.
            ValueError: r is NaN.
        """
        lengths: Any = self.lengths
        merged = self._merged(_take_scale(r)).sum(1)
        xp = _namespace(merged)
        return xp.where(self._undefined(), xp.full_like(lengths, -1), lengths - merged)

    def _undefined(self) -> Any:
        """[B] whether a cloud is not finite, so that nothing is known of it."""
        deaths: Any = self.deaths
        lengths: Any = self.lengths
        xp = _namespace(deaths)
        return (lengths > 1) & xp.isnan(deaths[:, :1]).any(1)

    def _merged(self, r: float) -> Any:
        """[B, n - 1] which merges have happened at scale r; compared without rounding r to the dtype of deaths."""
        deaths: Any = self.deaths
        if _namespace(deaths) is np:
            return (deaths.astype(np.float64) <= r) & np.isfinite(deaths)
        return (deaths.detach().double() <= r) & deaths.detach().isfinite()

    def betti_curve(self, scales: ArrayLike | torch.Tensor) -> Any:
        """`betti` at many scales: the number of components as a function of the scale.

        Args:
            scales: [s] scales, edge lengths, in any order.

        Returns:
            [B, s] int64; -1 for a cloud that is not finite.

        Raises:
            TypeError: scales is not made of numbers.
            ValueError: scales is not one row of numbers, or holds NaN.
        """
        try:
            at = np.asarray(_to_numpy(scales), np.float64)
        except (TypeError, ValueError):
            raise TypeError(f"scales is {scales!r}, expected [s], a row of numbers.") from None
        if at.ndim != 1 or np.isnan(at).any():
            raise ValueError(f"scales has shape {_shape(at)} or holds NaN, expected [s], a row of numbers.")
        deaths, lengths = _to_numpy(self.deaths).astype(np.float64), _to_numpy(self.lengths)
        curve = np.empty((len(deaths), len(at)), np.int64)
        for row, out, length in zip(deaths, curve, lengths, strict=True):
            out[:] = length - np.searchsorted(row[np.isfinite(row)], at, "right")
        curve[_to_numpy(self._undefined())] = -1
        return _give(curve, self.deaths)

    def labels(self, r: float, i: int | None = None) -> Any:
        """The cluster of every point at scale r: single linkage, edges of length <= r are in.

        Args:
            r: scale, an edge length.
            i: one cloud alone; default: all.

        Returns:
            [B, n] int64, or [lengths[i]] with i. Clusters of a cloud are numbered from 0 in the order of their smallest
            members; -1 is padding, and the whole row of a cloud that is not finite.

        Raises:
            TypeError: r is not a number, or i not a whole one.
            ValueError: edges were not asked for, or r is NaN.
            IndexError: there is no cloud i.
        """
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        r = _take_scale(r)
        if i is not None:
            i = self._cloud(i)
            only = slice(i, i + 1)
            one = H0(self.deaths[only], self._needed(only), self.lengths[only], self.backend, self.algorithm)
            return one.labels(r)[0, : int(self.lengths[i])]
        edges, lengths = _to_numpy(self._needed(slice(None))), _to_numpy(self.lengths)
        B, n = len(edges), edges.shape[1] + 1
        merged = _to_numpy(self._merged(r)) & (edges[:, :, 0] >= 0)
        ends = (edges + n * np.arange(B)[:, None, None])[merged]
        graph = coo_array((np.ones(len(ends), np.int8), (ends[:, 0], ends[:, 1])), shape=(B * n, B * n))
        component = connected_components(graph, directed=False)[1].astype(np.int64)
        smallest = np.empty(B * n, np.int64)
        smallest[component[::-1]] = np.arange(B * n)[::-1]  # the last write stays: the first member
        is_first = (smallest[component] == np.arange(B * n)).reshape(B, n)
        number = is_first.cumsum(1) - 1
        out = number.reshape(-1)[smallest[component]].reshape(B, n)
        undefined = _to_numpy(self._undefined())
        out[(np.arange(n) >= lengths[:, None]) | undefined[:, None]] = -1
        return _give(out, self.deaths)

    def merge_tree(self, i: int) -> MergeTree:
        """The merges of cloud i as components named by their smallest members.

        Args:
            i: index of the cloud.

        Returns:
            MergeTree, numpy arrays. Merges that never happen are left out.

        Raises:
            TypeError: i is not a whole number.
            ValueError: edges were not asked for.
            IndexError: there is no cloud i.
        """
        i = self._cloud(i)
        n = int(self.lengths[i])
        edges = _to_numpy(self._needed(slice(i, i + 1)))[0, : n - 1]
        real = edges[:, 0] >= 0
        elder, younger, sizes, _, _ = backends.merges(edges[real], n)
        return MergeTree(elder, younger, _to_numpy(self.deaths)[i, : n - 1][real], sizes)

    def _cloud(self, i: int) -> int:
        try:
            i = operator.index(i)
        except TypeError:
            raise TypeError(f"i is {i!r}, expected a whole number, the index of a cloud.") from None
        if not -len(self) <= i < len(self):
            raise IndexError(f"i is {i}, expected a cloud from 0 to {len(self) - 1}.")
        return i % len(self)

    def _needed(self, clouds: slice) -> Any:
        if self.edges is None:
            raise ValueError("edges is None and this needs them; call again with edges=True.")
        return self.edges[clouds]

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
            TypeError: i is not a whole number.
            ValueError: edges were not asked for, or the cloud is not connected.
            IndexError: there is no cloud i.
        """
        i = self._cloud(i)
        n = int(self.lengths[i])
        edges = _to_numpy(self._needed(slice(i, i + 1)))[0, : n - 1]
        deaths = _to_numpy(self.deaths)[i, : n - 1]
        if not np.isfinite(deaths).all():
            if np.isnan(deaths).any():
                problem = "is not finite; give finite points"
            elif (edges[np.isinf(deaths)] >= 0).any():
                problem = f"has an edge whose length overflows {deaths.dtype}; scale the points down"
            else:
                problem = "is not connected, and scipy's linkage needs one tree; raise max_edge"
            raise ValueError(f"cloud {i} {problem}.")
        _, _, sizes, first, second = backends.merges(edges, n)
        return np.stack([first, second, deaths, sizes], 1).astype(np.float64)


def _take_number(value: Any, name: str, expected: str) -> float:
    """The value as a float; text and truth values, which float() would take, are no numbers here."""
    try:
        if isinstance(value, _NO_NUMBERS):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # torch raises RuntimeError for more than one element
        raise TypeError(f"{name} is {value!r}, expected {expected}.") from None


def _take_scale(r: float) -> float:
    scale = _take_number(r, "r", "a number, an edge length")
    if not -math.inf <= scale <= math.inf:  # math.isnan is not traced by torch.compile
        raise ValueError("r is NaN, expected a number.")
    return scale


def _open(x: Any) -> Any:
    """What speaks only DLPack, as numpy when it lies on the host and as torch elsewhere; the rest as it is.

    Nothing is copied, and the result comes back as the kind that was opened here.
    """
    if isinstance(x, np.ndarray) or _is_torch(x) or not hasattr(x, "__dlpack_device__"):
        return x
    if int(x.__dlpack_device__()[0]) == _DLPACK_HOST:
        try:
            return np.from_dlpack(x)
        except (BufferError, RuntimeError, TypeError):  # a type numpy lacks, as bfloat16
            pass
    return importlib.import_module("torch").from_dlpack(x)


def _is_sparse(x: object) -> bool:
    sparse = sys.modules.get("scipy.sparse")
    return sparse is not None and bool(sparse.issparse(x))


def _take(x: Input, name: str, short: bool = False) -> Any:
    """The input as float32 or float64: numpy when it lies on the host, a torch tensor otherwise.

    With short, 16-bit numbers that do not lie on the host stay what they are.
    """
    if _is_torch(x):
        import torch

        tensor: Any = x
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name} is a {tensor.layout} tensor, expected a dense one; call .to_dense() first.")
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor if short and tensor.device.type != "cpu" else tensor.float()
        elif tensor.dtype not in (torch.float32, torch.float64):
            if tensor.is_complex() or tensor.is_floating_point():
                raise TypeError(_dtype_sentence(name, tensor.dtype))
            if tensor.dtype.itemsize == 8 and tensor.numel():
                # torch has no least uint64
                ends = tensor.cpu().numpy() if tensor.dtype is torch.uint64 else tensor
                _check_integers(name, int(ends.min()), int(ends.max()))
            tensor = tensor.double()
        dual = torch.autograd.forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
        if dual.tangent is not None:
            raise TypeError(
                f"{name} carries a tangent (forward-mode differentiation), expected a plain tensor; use backward(), or "
                "call .detach() first."
            )
        tensor = tensor.detach().resolve_neg()
        try:
            tensor.data_ptr()
        except RuntimeError as error:
            raise TypeError(
                f"{name} is a tensor without memory of its own ({error}), expected a plain one; transforms of "
                "torch.func (vmap, grad, jacrev) do not reach the engine: pass a batch, and use backward()."
            ) from None
        return tensor.numpy() if tensor.device.type == "cpu" else tensor
    if any(isinstance(one, np.ma.MaskedArray) for one in (x if isinstance(x, list | tuple) else (x,))):
        raise TypeError(
            f"{name} is a masked array, expected a plain one; pad the clouds and pass their sizes as lengths."
        )
    if _is_sparse(x):
        raise TypeError(f"{name} is a sparse matrix, expected a dense array; call .toarray() first.")
    try:
        array = np.asarray(x)
    except ValueError as error:
        raise ValueError(
            f"{name} is a ragged sequence ({error}); pad the clouds to one size and pass their sizes as lengths."
        ) from None
    if array.dtype.kind == "f" and array.dtype.itemsize <= 8:
        array = array.astype(np.float64 if array.dtype.itemsize == 8 else np.float32, copy=False)
        return array if array.flags.aligned else array.copy()
    if array.dtype.kind in "biu":
        if array.dtype.itemsize == 8 and array.size:
            _check_integers(name, int(array.min()), int(array.max()))
        return array.astype(np.float64)
    raise TypeError(_dtype_sentence(name, array.dtype))


def _check_integers(name: str, low: int, high: int) -> None:
    if max(-low, high) > _EXACT_INTEGER:
        raise ValueError(
            f"{name} holds the integer {high if high > _EXACT_INTEGER else low}, expected magnitudes up to 2^53, which "
            "float64 holds exactly; convert it to float64 yourself if rounding is meant."
        )


def _dtype_sentence(name: str, dtype: object) -> str:
    return (
        f"{name} has dtype {dtype}, expected float16, bfloat16, float32, float64, bool or an integer type; "
        "convert it to float32 or float64."
    )


def _give(array: Any, like: Input) -> Any:
    """A backend's array as the kind, and on the device, of the input."""
    if not _is_torch(like):
        return _to_numpy(array)
    import torch

    tensor: Any = like
    return torch.as_tensor(array, device=tensor.device)


def _shape(x: Any) -> str:
    return "[" + ", ".join(map(str, x.shape)) + "]"


def _sizes(name: str, n: int, d: int = 1) -> None:
    n, d = (size if isinstance(size, int) else 1 for size in (n, d))  # else: what tracing leaves open, told at run time
    if n == 0:
        raise ValueError(f"{name} has clouds of 0 points, expected at least 1; drop empty clouds.")
    if d == 0:
        raise ValueError(f"{name} has points with 0 coordinates, expected at least 1.")
    if n > MAX_POINTS:
        raise ValueError(f"{name} has clouds of {n} points, expected at most {MAX_POINTS}.")


def _points_size(points: Any) -> tuple[int, int, int]:
    """B, n and d of points [n, d] or [B, n, d]."""
    if points.ndim == 1:
        raise ValueError(
            f"points has shape {_shape(points)}, expected [n, d] or [B, n, d]: the coordinate axis d is missing; for "
            "scalars use obce.h0_line."
        )
    if points.ndim not in (2, 3):
        raise ValueError(f"points has shape {_shape(points)}, expected [n, d] (one cloud) or [B, n, d] (a batch).")
    B, n, d = (1, *points.shape) if points.ndim == 2 else points.shape
    _sizes("points", n, d)
    return B, n, d


def _values_size(values: Any) -> tuple[int, int]:
    """B and n of values [n] or [B, n]."""
    if values.ndim not in (1, 2):
        raise ValueError(
            f"values has shape {_shape(values)}, expected [n] (one cloud of scalars) or [B, n] (a batch); for points "
            "with coordinates use obce.h0."
        )
    B, n = (1, *values.shape) if values.ndim == 1 else values.shape
    _sizes("values", n)
    return B, n


def _matrix_size(matrix: Any) -> tuple[int, int]:
    """B and n of a condensed matrix [n (n - 1) / 2], or of square ones [n, n] or [B, n, n]."""
    if matrix.ndim == 1:
        n = reference.condensed_points(len(matrix))
        if n is None:
            raise ValueError(
                f"matrix has shape {_shape(matrix)}, expected [n, n], [B, n, n] or, condensed, [n (n - 1) / 2], and "
                f"{len(matrix)} is no such number; for scalars use obce.h0_line."
            )
        _sizes("matrix", n)
        return 1, n
    if matrix.ndim not in (2, 3) or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix has shape {_shape(matrix)}, expected [n, n] or [B, n, n]; for points use obce.h0.")
    _sizes("matrix", matrix.shape[-1])
    return 1 if matrix.ndim == 2 else matrix.shape[0], matrix.shape[-1]


def _take_lengths(lengths: Any, B: int, n: int) -> NDArray[np.int64] | None:
    if lengths is None:
        return None
    array = np.asarray(lengths.cpu() if _is_torch(lengths) else lengths)
    if array.ndim == 0:
        array = array[None]
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"lengths has dtype {array.dtype}, expected integers.")
    _check_lengths_shape(array, B)
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


def _check_lengths_shape(lengths: Any, B: int) -> None:
    if lengths.ndim != 1 or lengths.shape[0] != B:
        raise ValueError(f"lengths has shape {_shape(lengths)}, expected [{B}], one number a cloud.")


def _check_one_matrix_has_no_lengths(lengths: Any, kind: backends.Kind) -> None:
    if lengths is not None and kind != "matrix":
        raise ValueError("lengths is given with one condensed or sparse matrix, expected None; cut the matrix instead.")


def _are_distances(matrices: torch.Tensor) -> bool:
    """Whether all of [B, n, n] are symmetric, non-negative and zero on the diagonal, asked where they lie."""
    step = max(1, _ENTRIES // matrices[:1].numel())
    for part in (matrices[at : at + step] for at in range(0, len(matrices), step)):
        fine = (part == part.mT).all() & (part >= 0).all() & (part.diagonal(dim1=1, dim2=2) == 0).all()
        if not bool(fine):
            return False
    return True


def _check_matrices(matrices: Array, lengths: NDArray[np.int64] | None) -> None:
    """Raises unless every matrix is symmetric, non-negative and zero on the diagonal."""
    if not isinstance(matrices, np.ndarray) and lengths is None and len(matrices) and _are_distances(matrices):
        return
    entries = _to_numpy(matrices)
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


def _check_condensed(entries: NDArray[Any], n: int) -> None:
    """Raises on the first NaN or negative entry of a condensed matrix [n (n - 1) / 2]."""
    if not entries.size or entries.min() >= 0:
        return
    at = int(np.flatnonzero(~(entries >= 0))[0])
    i = next(i for i in range(n) if at < (i + 1) * n - (i + 1) * (i + 2) // 2)
    j = at - (i * n - i * (i + 1) // 2) + i + 1
    what = "a distance or inf for no edge" if np.isnan(entries[at]) else "distances >= 0"
    raise ValueError(f"matrix 0 has {entries[at]} at [{i}, {j}] (entry {at}), expected {what}.")


def _check_indices(matrix: Any, n: int) -> None:
    """Raises where a sparse matrix [n, n] points outside of itself, which scipy would follow when it converts it."""
    try:
        if matrix.format == "coo":
            outside = [i for i in (matrix.row, matrix.col) if len(i) and not 0 <= i.min() <= i.max() < n]
            if outside:
                raise ValueError(f"indices must be >= 0 and < {n}")
        elif hasattr(matrix, "check_format"):
            matrix.check_format(full_check=True)
    except ValueError as error:
        raise ValueError(f"matrix is a broken {matrix.format} matrix ({error}), expected valid indices.") from None


def _take_graph(matrix: Any, check: bool) -> reference.Graph:
    """A scipy sparse matrix as its edges: every pair once when both triangles are stored and checked."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix has shape {_shape(matrix)}, expected [n, n]; for points use obce.h0.")
    if matrix.format in ("bsr", "dia"):
        raise TypeError(
            f"matrix is sparse in the form {matrix.format}, which cannot tell a stored 0 from none, expected csr, csc, "
            "coo, lil or dok; call .tocsr() and .eliminate_zeros()."
        )
    n = matrix.shape[0]
    _sizes("matrix", n)
    _check_indices(matrix, n)
    csr = matrix.tocsr()
    if not csr.has_canonical_format:  # repeated entries are summed, as everywhere in scipy
        csr = csr.copy()
        csr.sum_duplicates()
    coo = csr.tocoo(copy=False)
    weights = _take(coo.data, "matrix")
    rows, cols = coo.row, coo.col
    if check:
        for wrong, what in (
            (np.isnan(weights), "a distance or inf for no edge"),
            (weights < 0, "distances >= 0"),
            ((rows == cols) & (weights != 0), "0 on the diagonal"),
        ):
            if wrong.any():
                e = int(wrong.argmax())
                raise ValueError(f"matrix 0 has {weights[e]} at [{rows[e]}, {cols[e]}], expected {what}.")
        if (rows < cols).any() and (rows > cols).any():
            lo, hi = np.minimum(rows, cols).astype(np.int64), np.maximum(rows, cols).astype(np.int64)
            order = np.argsort(lo * n + hi, kind="stable")
            lo, hi, weights = lo[order], hi[order], weights[order]
            again = (lo[1:] == lo[:-1]) & (hi[1:] == hi[:-1])
            differs = again & (weights[1:] != weights[:-1])
            if differs.any():
                e = int(differs.argmax())
                upper, lower = (e, e + 1) if rows[order[e]] == lo[e] else (e + 1, e)
                raise ValueError(
                    f"matrix 0 is not symmetric: {weights[upper]} at [{lo[e]}, {hi[e]}] but {weights[lower]} at "
                    f"[{hi[e]}, {lo[e]}]; "
                    "store one triangle only, or equal entries in both."
                )
            once = np.concatenate([[True], ~again])
            rows, cols, weights = lo[once], hi[once], weights[once]
    return reference.Graph(rows.astype(np.int32, copy=False), cols.astype(np.int32, copy=False), weights, n)


def _take_metric(metric: str, p: float | None) -> tuple[str, float]:
    """The metric's one name, and minkowski's p (0 for the others); p of 1, 2 and inf are other metrics."""
    if metric == "precomputed":
        raise ValueError("metric is 'precomputed', expected the metric of points; pass a matrix to obce.h0_distances.")
    name = "manhattan" if metric == "cityblock" else metric
    if name not in METRICS:
        raise ValueError(
            f"metric is {metric!r}, expected one of {', '.join(METRICS)}; compute other distances yourself and pass "
            "the matrix to obce.h0_distances."
        )
    if name != "minkowski":
        if p is not None:
            raise ValueError(f"p is {p} with metric {metric!r}, expected None; only 'minkowski' takes p.")
        return name, 0.0
    expected = "a number >= 1, the exponent of metric 'minkowski'"
    exponent = math.nan if p is None else _take_number(p, "p", expected)
    if not exponent >= 1:
        raise ValueError(f"p is {p}, expected {expected}.")
    special = {1.0: "manhattan", 2.0: "euclidean", math.inf: "chebyshev"}.get(exponent)
    return (special, 0.0) if special else (name, exponent)


def _normalised(data: NDArray[Any], lengths: NDArray[np.int64] | None, metric: str, check: bool) -> NDArray[Any]:
    """Rows of length 1 [B, n, d], for "correlation" after their mean is taken off.

    In float64, sums as one chain of additions in coordinate order, then rounded to the dtype of the data. A row is
    first multiplied by the power of two that brings its largest magnitude into [1/2, 1).
    """
    B, n, d = data.shape
    out = np.empty(data.shape, data.dtype)
    step = max(1, _ROWS // d)
    with np.errstate(all="ignore"):
        for b in range(B):
            m = n if lengths is None else int(lengths[b])
            out[b, m:] = 0
            for rows in (slice(at, min(at + step, m)) for at in range(0, m, step)):
                x = np.ascontiguousarray(data[b, rows], np.float64)
                x = np.ldexp(x, -np.frexp(np.abs(x).max(1, keepdims=True))[1])
                empty = (x == 0).all(1) if metric == "cosine" else (x == x[:, :1]).all(1)
                if check and empty.any():
                    raise ValueError(
                        f"points: cloud {b}, point {rows.start + int(empty.argmax())} is "
                        f"{'zero' if metric == 'cosine' else 'constant'}, which has no direction, and metric "
                        f"{metric!r} needs one; drop that point or mark it as padding with lengths."
                    )
                if metric == "correlation":
                    x = x - x.cumsum(1)[:, -1:] / d
                    x = np.ldexp(x, -np.frexp(np.abs(x).max(1, keepdims=True))[1])
                x /= np.sqrt(np.square(x).cumsum(1)[:, -1:])
                x[empty] = np.nan  # only unchecked: such a cloud answers NaN, as one that is not finite
                out[b, rows] = x
    return out


def checked_threads(threads: int | None) -> int:
    """Threads as the engine takes them: default from `OMP_NUM_THREADS`, else all.

    Raises:
        TypeError, ValueError: It is no whole number from 1 on.
    """
    if threads is None:
        return backends.default_threads()
    if isinstance(threads, bool) or not isinstance(threads, int | np.integer):
        raise TypeError(f"threads is {threads!r}, expected a whole number or None.")
    if threads < 1:
        raise ValueError(f"threads is {threads}, expected at least 1.")
    return min(int(threads), 1024)


def _take_progress(progress: Callable[[float], object] | None) -> Callable[[float], object] | None:
    if progress is not None and not callable(progress):
        raise TypeError(f"progress is {progress!r}, expected a function of the share done, or None.")
    return progress


def _take_max_edge(max_edge: float | None) -> float | None:
    if max_edge is None:
        return None
    limit = _take_number(max_edge, "max_edge", "a length >= 0 or None")
    if not limit >= 0:
        raise ValueError(f"max_edge is {max_edge}, expected a length >= 0 or None.")
    return limit


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
    if algorithm in ("boruvka", "kdtree") and kind in ("matrix", "condensed"):
        raise ValueError(f"algorithm is {algorithm!r}, which needs points; use 'auto' or 'prim' for matrices.")
    if algorithm == "kruskal" and kind != "graph":
        raise ValueError("algorithm is 'kruskal', which needs a sparse matrix; use 'auto' here.")
    if kind == "graph" and algorithm not in ("auto", "kruskal"):
        raise ValueError(f"algorithm is {algorithm!r}, and a sparse matrix is done by 'kruskal'; use that or 'auto'.")
    return algorithm


def _beyond(values: Any, max_edge: float) -> Any:
    """Where a length exceeds max_edge, compared without rounding it to the dtype of the lengths."""
    return (values.astype(np.float64) if _namespace(values) is np else values.double()) > max_edge


def _is_traced(x: object) -> bool:
    """Whether torch.compile or torch.export looks on: then the call becomes an operator (obce/operators.py)."""
    if not _is_torch(x):
        return False
    import torch

    return torch.compiler.is_compiling()


def _traced(
    deaths: Array, edges: Array | None, lengths: Array, progress: object, backend: str | None, algorithm: str
) -> H0:
    if progress is not None:
        raise ValueError("progress is given in compiled code, expected None; call the function outside of it.")
    return H0(deaths, edges, lengths, backend or "auto", algorithm)


def _wants_grad(x: Any) -> bool:
    return _is_torch(x) and bool(x.requires_grad) and bool(sys.modules["torch"].is_grad_enabled())


def _h0(
    like: Input,
    job: backends.Job,
    max_edge: float | None,
    edges: bool,
    backend: str | None,
    metric: str = "euclidean",
) -> H0:
    """Runs the job and finishes its deaths.

    metric is the one that was asked for: on a line a squared one leaves the weights |x - y|, and the engine
    answers "cosine" and "correlation" with squared lengths.
    """
    limit = _take_max_edge(max_edge)
    grad = _wants_grad(like)
    if grad and job.kind != "line":
        job = replace(job, want="edges")
    answer = backends.run(job, backend)
    if job.progress is not None:
        job.progress(1.0)
    deaths, ends = answer.lengths, answer.edges
    if job.kind == "line" and metric in _SQUARES:
        with np.errstate(over="ignore", under="ignore"):
            deaths = deaths * deaths
    if metric in ("cosine", "correlation"):
        deaths = deaths * 0.5
    if limit is not None:
        beyond = _beyond(deaths, limit)
        xp = _namespace(deaths)
        deaths = xp.where(beyond, xp.full_like(deaths, math.inf), deaths)
        if ends is not None:
            ends = xp.where(beyond[:, :, None], xp.full_like(ends, -1), ends)
    B, n = job.size
    if job.lengths is not None:
        lengths = _give(job.lengths, like)
    elif _is_torch(like):
        torch = sys.modules["torch"]
        lengths = torch.full((B,), n, device=like.device)  # type: ignore[union-attr]  # no copy from the host
    else:
        lengths = np.full(B, n, np.int64)
    deaths, ends = _give(deaths, like), None if ends is None else _give(ends, like)
    if grad:
        deaths = _with_gradient(like, job, deaths, ends, lengths, metric)
    return H0(deaths, ends if edges else None, lengths, answer.backend, answer.algorithm)


def _with_gradient(like: Any, job: backends.Job, deaths: Any, ends: Any, lengths: Any, metric: str) -> Any:
    gradients = importlib.import_module("obce.gradients")
    source = like.to(deaths.dtype)
    if job.kind == "line":
        source = source.reshape(job.size)
        if ends is None:
            ends = gradients.line_edges(source.detach(), lengths)
        source = source[:, :, None]
    elif source.ndim < job.data.ndim:
        source = source[None]
    return gradients.attach(source, deaths, ends, metric, job.p)


def h0(
    points: Input,
    *,
    lengths: Sequence[int] | Array | None = None,
    metric: str = "euclidean",
    p: float | None = None,
    max_edge: float | None = None,
    edges: bool = False,
    algorithm: str = "auto",
    backend: str | None = None,
    check: bool = True,
    threads: int | None = None,
    progress: Callable[[float], object] | None = None,
) -> H0:
    """Exact 0-dimensional Vietoris-Rips persistence of one cloud or a batch of clouds.

    Args:
        points: [n, d], one cloud, or [B, n, d], a batch; numpy, torch, nested sequences, or anything with __dlpack__
            or __array__. float32 and float64 are computed as they are, float16 and bfloat16 in float32, integers and
            truth values in float64. A torch tensor that requires grad gets the gradient of each death through its edge
            (once; a second derivative raises).
        lengths: [B] number of points of each cloud; what lies beyond is padding and is never read. Default: n.
        metric: "euclidean"; "sqeuclidean", its square; "cosine" and "correlation", 1 - cosine of the rows (minus their
            mean), whose rows must not be zero (constant); "manhattan" ("cityblock"); "chebyshev"; "minkowski".
        p: exponent of "minkowski", at least 1.
        max_edge: longest edge allowed, ripser's `thresh`, in the unit of the deaths; deaths beyond it become +inf and
            their edges -1.
        edges: also return the edge behind each death.
        algorithm: "auto", "sort" (d = 1, without edges), "prim", "boruvka" (for many points with many coordinates) or
            "kdtree" (with few).
        backend: name of a backend, which then runs or raises. Default: the environment variable OBCE_BACKEND, else
            the best one for where the data lies.
        check: refuse NaN and infinities. Without it such a cloud answers NaN.
        threads: host threads. Default: OMP_NUM_THREADS, else the processors this process may use.
        progress: called with the share of the work done, 0 to 1 (an estimate inside one cloud), about ten times a
            second and with 1 at the end, from the calling thread. What it raises ends the call.

    Returns:
        H0 with B = 1 for one cloud; arrays of the kind and on the device of `points`, float32 or float64.

    Raises:
        TypeError: a dtype that is not a number's.
        ValueError: a shape, length, name or value that is refused; the sentence says which.
        RuntimeError: the named backend cannot run on this machine.
    """
    if _is_traced(points):
        from obce.operators import trace_h0

        found = trace_h0(points, lengths, metric, p, max_edge, edges, algorithm, backend, check, threads)
        return _traced(*found, progress, backend, algorithm)
    metric, exponent = _take_metric(metric, p)
    points = _open(points)
    data = _take(points, "points")
    B, n, d = _points_size(data)
    if data.ndim == 2:
        data = data[None]
    counts = _take_lengths(lengths, B, n)
    if check:
        _check_finite(data, counts, "points")
    if metric in ("cosine", "correlation"):
        data = _give(_normalised(_to_numpy(data), counts, metric, check), data)
    kind: backends.Kind = "line" if d == 1 else "cloud"
    job = backends.Job(
        kind,
        data[:, :, 0] if d == 1 else data,
        counts,
        "edges" if edges else "deaths",
        _take_algorithm(algorithm, kind, edges),
        checked_threads(threads),
        "euclidean" if d == 1 else "sqeuclidean" if metric in _SQUARES else metric,
        exponent,
        progress=_take_progress(progress),
    )
    return _h0(points, job, max_edge, edges, backend, metric)


def _take_line(values: Input, short: bool = False) -> Any:
    data = _take(values, "values", short)
    _values_size(data)
    return data[None] if data.ndim == 1 else data


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
    progress: Callable[[float], object] | None = None,
) -> H0:
    """`h0` of clouds of scalars: the deaths are the gaps between sorted neighbours.

    Args:
        values: [n], one cloud, or [B, n], a batch. Kinds and dtypes as in `h0`; a gradient without edges=True is that
            of the sorted neighbours. Values a stride apart (a transposed batch) are read where they lie.
        lengths: as in `h0`.
        max_edge: as in `h0`.
        edges: as in `h0`. Ties can make an edge join points that are no sorted neighbours.
        algorithm: as in `h0`.
        backend: as in `h0`.
        check: as in `h0`.
        threads: as in `h0`.
        progress: as in `h0`.

    Returns:
        H0, as `h0`.

    Raises:
        TypeError: as `h0`.
        ValueError: as `h0`.
        RuntimeError: as `h0`.
    """
    if _is_traced(values):
        from obce.operators import trace_h0_line

        found = trace_h0_line(values, lengths, max_edge, edges, algorithm, backend, check, threads)
        return _traced(*found, progress, backend, algorithm)
    values = _open(values)
    return _line(values, _take_line(values), lengths, max_edge, edges, algorithm, backend, check, threads, progress)


def _line(
    values: Input,
    data: Any,
    lengths: Any,
    max_edge: float | None,
    edges: bool,
    algorithm: str,
    backend: str | None,
    check: bool,
    threads: int | None,
    progress: Callable[[float], object] | None = None,
) -> H0:
    counts = _take_lengths(lengths, *data.shape)
    if check:
        _check_finite(data, counts, "values")
    algorithm = _take_algorithm(algorithm, "line", edges)
    want: backends.Want = "edges" if edges else "deaths"
    job = backends.Job(
        "line", data, counts, want, algorithm, checked_threads(threads), progress=_take_progress(progress)
    )
    return _h0(values, job, max_edge, edges, backend)


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
    progress: Callable[[float], object] | None = None,
) -> H0:
    """0-dimensional persistence of given distances (any metric, or any symmetric weights >= 0).

    Args:
        matrix: [n, n], or [B, n, n], a batch: exactly symmetric, 0 on the diagonal, >= 0; +inf is no edge. Or [m] with
            m = n (n - 1) / 2, the upper triangle row by row as scipy's pdist gives it. Or one scipy sparse matrix
            [n, n]: what is not stored is no edge, a stored 0 is an edge of length 0, and of each pair either triangle
            may be stored, or both with equal entries. A square torch matrix gets half of each gradient at [i, j] and
            half at [j, i]; a condensed one gets it whole.
        lengths: [B], the leading block of each matrix that counts; only for square matrices.
        max_edge: as in `h0`.
        edges: as in `h0`.
        algorithm: "auto" or "prim"; "auto" or "kruskal" for a sparse matrix.
        backend: as in `h0`.
        check: refuse what is not such a matrix. Without it NaN counts as no edge and asymmetry goes unseen (sparse: of
            two different entries the smaller counts).
        threads: as in `h0`.
        progress: as in `h0`.

    Returns:
        H0, as `h0`; +inf deaths where no edge connects.

    Raises:
        TypeError: as `h0`.
        ValueError: as `h0`; the sentence names the matrix and the entry.
        RuntimeError: as `h0`.
    """
    if _is_traced(matrix):
        from obce.operators import trace_h0_distances

        found = trace_h0_distances(matrix, lengths, max_edge, edges, algorithm, backend, check, threads)
        return _traced(*found, progress, backend, algorithm)
    matrix = _open(matrix)
    kind: backends.Kind = "matrix"
    counts = None
    look: Callable[[], None] | None = None
    data: Any
    if _is_sparse(matrix):
        kind = "graph"
        data = _take_graph(matrix, check)
    else:
        data = _take(matrix, "matrix")
        kind = "condensed" if data.ndim == 1 else "matrix"
    _check_one_matrix_has_no_lengths(lengths, kind)
    if kind == "condensed":
        n = _matrix_size(data)[1]
        if check:
            _check_condensed(_to_numpy(data), n)
        data = data[None]
    elif kind == "matrix":
        counts = _take_lengths(lengths, *_matrix_size(data))
        if data.ndim == 2:
            data = data[None]
        if check:
            look = partial(_check_matrices, data, counts)
    algorithm = _take_algorithm(algorithm, kind, edges)
    want: backends.Want = "edges" if edges else "deaths"
    job = backends.Job(
        kind, data, counts, want, algorithm, checked_threads(threads), check=look, progress=_take_progress(progress)
    )
    return _h0(matrix, job, max_edge, edges, backend, "precomputed")


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
        values: [n], one cloud, or [B, n], a batch. Kinds and dtypes as in `h0`; with a gradient all gaps are sorted.
            A transposed batch (sample-major, `x.T`) is read where it lies.
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
    if _is_traced(values):
        from obce.operators import trace_r_f

        return trace_r_f(values, lengths, max_edge, backend, check, threads)
    values = _open(values)
    data = _take_line(values, short=not _wants_grad(values))
    if _wants_grad(values):
        return _line(values, data, lengths, max_edge, False, "auto", backend, check, threads).r_f
    counts = _take_lengths(lengths, *data.shape)
    limit = _take_max_edge(max_edge)
    answer = backends.run(backends.Job("line", data, counts, "r_f", "auto", checked_threads(threads)), backend)
    out = answer.lengths
    # Every backend answers NaN for a line of two or more values that is not finite: no scan of its own is needed.
    lone = data.shape[1] == 1 or (counts is not None and bool((counts == 1).any()))
    if check and (lone or bool(_namespace(out).isnan(out).any())):
        _check_finite(data, counts, "values")
    if limit is not None:
        out = _namespace(out).where(_beyond(out, limit), _namespace(out).full_like(out, math.inf), out)
    return _give(out, values)
