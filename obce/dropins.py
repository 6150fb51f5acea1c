"""The engine behind the signatures of ripser.py and scipy: change an import, keep the code.

    from obce import ripser       # in place of: from ripser import ripser                   (maxdim=0)
    from obce import linkage      # in place of: from scipy.cluster.hierarchy import linkage (method="single")

What only a higher dimension, another method or all n x n distances could answer is refused or left out, never guessed.
Neither ripser nor scipy.cluster is imported.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from obce.h0 import H0, Input, h0, h0_distances

# How scikit-learn, which ripser.py asks for distances, and scipy call metrics of obce; their "minkowski" has p = 2.
_ALIASES = {"l1": "manhattan", "l2": "euclidean", "minkowski": "euclidean"}


class RipserResult(dict[str, Any]):
    """What `ripser` returns; asking for what is left out says why."""

    _LEFT_OUT = ("dperm2all", "num_edges")

    def __missing__(self, key: str) -> Any:
        if key in self._LEFT_OUT:
            raise KeyError(f"{key} needs all n x n distances, which obce never makes; scipy's pdist gives them.")
        raise KeyError(key)


def ripser(
    X: Input,
    maxdim: int = 0,
    thresh: float = math.inf,
    coeff: int = 2,
    distance_matrix: bool = False,
    do_cocycles: bool = False,
    metric: str = "euclidean",
    n_perm: int | None = None,
    *,
    backend: str | None = None,
    threads: int | None = None,
) -> RipserResult:
    """`ripser.ripser(X, maxdim=0)`, by the engine of `obce.h0`.

    ripser.py rounds all distances to float32. Here float64 input is computed in float64, so the two agree to a relative
    1e-6, and exactly where all distances are float32 numbers. Of a sparse matrix ripser.py reads what is above the
    diagonal alone; here either triangle will do.

    Args:
        X: [n, d] points or, with distance_matrix, [n, n] distances, or a scipy sparse matrix [n, n] of the edges there
            are; the kinds and dtypes of `obce.h0`.
        maxdim: 0, which is also the default; ripser.py's is 1.
        thresh: longest edge allowed, both rounded to float32 as ripser.py does.
        coeff: the field of coefficients; in dimension 0 every field has the same diagram.
        distance_matrix: X is a matrix of distances, exactly symmetric and 0 on its diagonal.
        do_cocycles: in dimension 0 ripser.py gives none, and neither does this.
        metric: a metric of `obce.h0` without parameters, or scikit-learn's name of one.
        n_perm: None, or at least n: all points are used.
        backend: as in `obce.h0`.
        threads: as in `obce.h0`.

    Returns:
        A dict: `dgms`, a list of one float64 array [k, 2] of (birth, death), births 0, deaths ascending, +inf last;
        merges of length 0 (equal points) are left out, as ripser does. `cocycles` [[]], `idx_perm` arange(n), `r_cover`
        0.0. `num_edges` and `dperm2all` are not there.

    Raises:
        ValueError: maxdim is not 0, n_perm is below n, or what `obce.h0` refuses.
        TypeError: as `obce.h0`.
    """
    if maxdim != 0:
        raise ValueError(f"maxdim is {maxdim}, expected 0; obce has dimension 0 alone, use ripser.py for others.")
    most = _longest(thresh)
    if distance_matrix:
        result = _named("X", lambda: h0_distances(X, max_edge=most, backend=backend, threads=threads))
    else:
        _warn_of_distances("X", X, "pass distance_matrix=True")
        name = _ALIASES.get(metric, metric)
        result = _named("X", lambda: h0(X, metric=name, max_edge=most, backend=backend, threads=threads))
    if len(result) != 1:
        raise ValueError(f"X has {len(result)} clouds, expected one; pass a batch to obce.h0 and take its diagrams().")
    n = int(result.lengths[0])
    if n_perm is not None and n_perm < n:
        raise ValueError(f"n_perm is {n_perm}, expected None or at least {n}; the engine takes all points.")
    diagram = result.diagrams()[0].astype(np.float64)
    return RipserResult(
        dgms=[diagram[diagram[:, 1] > 0]],
        cocycles=[[]],
        idx_perm=np.arange(n),
        r_cover=0.0,
    )


def _longest(thresh: Any) -> Any:
    """The longest edge that becomes no more than thresh when both are rounded to float32."""
    if isinstance(thresh, bool) or not isinstance(thresh, int | float | np.integer | np.floating):
        return thresh  # which is refused
    if not 0 < float(thresh) < float(np.finfo(np.float32).max):
        return thresh
    rounded = np.float32(thresh)
    middle = (float(rounded) + float(np.nextafter(rounded, np.float32(np.inf)))) / 2
    return middle if np.float32(middle) == rounded else math.nextafter(middle, 0)  # it rounds to the even one


def linkage(
    y: Input,
    method: str = "single",
    metric: str = "euclidean",
    optimal_ordering: bool = False,
    *,
    backend: str | None = None,
    threads: int | None = None,
) -> NDArray[np.float64]:
    """`scipy.cluster.hierarchy.linkage(y, "single")`, by the engine of `obce.h0`.

    Computed in float64, as scipy does. Where distances tie, the pairs may merge in another order than scipy's: the
    third column, and the distance at which any two points meet, are the same.

    Args:
        y: [n, d] points, or [n (n - 1) / 2] distances as scipy's `pdist` gives them.
        method: "single".
        metric: a metric of `obce.h0` without parameters, for points; not read for distances, as in scipy.
        optimal_ordering: False.
        backend: as in `obce.h0`.
        threads: as in `obce.h0`.

    Returns:
        Z [n - 1, 4] float64: the two clusters merged (smaller number first), their distance, the new size. One point,
        which scipy refuses, has no merge.

    Raises:
        ValueError: another method or an optimal ordering is asked for, y is not finite, or what `obce.h0` refuses.
        TypeError: as `obce.h0`.
    """
    if method != "single":
        raise ValueError(
            f"method is {method!r}, expected 'single'; obce has single linkage alone, use scipy.cluster.hierarchy."
        )
    if optimal_ordering:
        raise ValueError(
            "optimal_ordering is True, expected False; give Z to scipy.cluster.hierarchy.optimal_leaf_ordering."
        )
    points = _on_host(y)
    if points.dtype.kind == "f":
        points = points.astype(np.float64, copy=False)
    _warn_of_distances("y", points, "pass scipy.spatial.distance.squareform(y)")
    if points.ndim == 1:
        if points.dtype.kind == "f" and not np.isfinite(points).all():
            at = int(np.flatnonzero(~np.isfinite(points))[0])
            raise ValueError(f"y holds {points[at]} at entry {at}, expected finite distances, for the tree to be one.")
        result = _named("y", lambda: h0_distances(points, edges=True, backend=backend, threads=threads))
    elif points.ndim == 2:
        name = _ALIASES.get(metric, metric)
        result = _named("y", lambda: h0(points, metric=name, edges=True, backend=backend, threads=threads))
    else:
        raise ValueError(
            f"y has {points.ndim} dimensions, expected [n, d] or condensed [n (n - 1) / 2]; pass a batch to obce.h0 "
            "with edges=True and take its linkage(i)."
        )
    return result.linkage(0)


def _on_host(x: Any) -> NDArray[Any]:
    if hasattr(x, "detach"):  # torch: numpy has no bfloat16
        x = x.detach().cpu()
        x = x.double() if x.is_floating_point() else x
    if hasattr(x, "__dlpack__") and not hasattr(x, "__array__"):
        return np.from_dlpack(x)
    return np.asanyarray(x)  # a masked array stays one, and is refused


def _warn_of_distances(name: str, x: Any, otherwise: str) -> None:
    """Warns when points look like a square matrix of distances, as ripser.py and scipy do."""
    if not isinstance(x, np.ndarray) or x.ndim != 2 or not 1 < x.shape[0] == x.shape[1] or x.dtype.kind not in "fiu":
        return
    if not x.diagonal().any() and (x == x.T).all() and (x >= 0).all():
        warnings.warn(
            f"{name} is square, symmetric and 0 on its diagonal, and is taken as {len(x)} points; if it holds "
            f"distances, {otherwise}.",
            stacklevel=3,
        )


def _named(name: str, call: Callable[[], H0]) -> H0:
    """The call; what it refuses is said of the caller's argument."""
    try:
        return call()
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
