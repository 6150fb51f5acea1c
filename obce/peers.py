"""Other tools that give the deaths of 0-dimensional persistence, one small adapter each, for `obce bench`.

None is a dependency: a peer is imported when it is first run, and one that is missing says so. Those under the GPL or
AGPL are called when the user has installed them, and nothing of theirs is used or shipped here. Peers that take one
cloud a call are given one after the other. ripser, giotto-ph, gudhi and torch-topological drop merges of length 0,
which are put back in front.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Kind = Literal["line", "cloud", "matrix"]

HELD_BYTES = 2 << 30  # a peer that would hold more than this for its pairs is not started


@dataclass(frozen=True)
class Call:
    """What a tool is asked.

    Attributes:
        kind: "line" (values [B, n]), "cloud" (points [B, n, d]) or "matrix" (distances [B, n, n]); float32.
        want: "deaths" ([B, n - 1], ascending) or "r_f" ([B], the last death of each cloud).
        threads: as many as it may use.
    """

    kind: Kind
    want: Literal["deaths", "r_f"]
    threads: int


@dataclass(frozen=True)
class Peer:
    """A tool that can be timed.

    Attributes:
        name: as it stands in the CSV.
        package: what is imported.
        distribution: what is installed, whose version is reported.
        licence: SPDX identifier.
        run: (data, call) -> [B, n - 1] deaths ascending, or [B] r_f.
        kinds: data it takes.
        threaded: makes use of more than one thread.
        pair_bytes: bytes it holds for every pair of points of a cloud; 0 when it holds none.
        most_points: most points a cloud may have.
        most_coordinates: most coordinates a point may have.
    """

    name: str
    package: str
    distribution: str
    licence: str
    run: Callable[[Array, Call], Array]
    kinds: tuple[Kind, ...] = ("line", "cloud", "matrix")
    threaded: bool = False
    pair_bytes: int = 0
    most_points: int = 1 << 30
    most_coordinates: int = 1 << 30

    def why_not(self) -> str | None:
        """Why it cannot run here, or None."""
        return None if importlib.util.find_spec(self.package) else f"{self.distribution} is not installed"

    def refuses(self, kind: Kind, n: int, d: int) -> str | None:
        """Why it is not asked for clouds of n points with d coordinates, or None."""
        if kind not in self.kinds:
            return f"does not take a {kind}"
        held = self.pair_bytes * n * (n - 1) // 2
        if held > HELD_BYTES:
            return f"would hold {held / 2**30:,.1f} GiB for the pairs of {n:,} points"
        if n > self.most_points:
            return f"is not asked for more than {self.most_points:,} points"
        if d > self.most_coordinates:
            return f"is not asked for more than {self.most_coordinates:,} coordinates"
        return None

    def version(self) -> str:
        """Version of its distribution, "" when there is none."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return ""


def _each(one: Callable[[Array, Call], Any]) -> Callable[[Array, Call], Array]:
    """A tool for one cloud ([n, d] or [n, n]) -> deaths, in any order, made into one for a batch."""

    def run(data: Array, call: Call) -> Array:
        clouds = data[:, :, None] if call.kind == "line" else data
        deaths = np.zeros((len(clouds), clouds.shape[1] - 1))
        for row, cloud in zip(deaths, clouds, strict=True):
            found = np.sort(np.asarray(one(cloud, call)))
            row[len(row) - len(found) :] = found
        return deaths[:, -1] if call.want == "r_f" else deaths

    return run


def _obce(data: Array, call: Call) -> Array:
    import obce

    found: Any
    if call.want == "r_f" and call.kind == "line":
        found = obce.r_f(data, threads=call.threads)
        return np.asarray(found)
    if call.kind == "line":
        found = obce.h0_line(data, threads=call.threads)
    elif call.kind == "cloud":
        found = obce.h0(data, threads=call.threads)
    else:
        found = obce.h0_distances(data, threads=call.threads)
    return np.asarray(found.r_f if call.want == "r_f" else found.deaths)


def _sort(data: Array, call: Call) -> Array:
    gaps = np.diff(np.sort(data, 1), axis=1)
    deaths: Array = gaps.max(1) if call.want == "r_f" else np.sort(gaps, 1)
    return deaths


def _sort_in_chunks(data: Array, call: Call) -> Array:
    rows = max(1, (1 << 16) // data.shape[1])  # 256 KiB: sorted values are still in the cache when they are used
    return np.concatenate([_sort(data[start : start + rows], call) for start in range(0, len(data), rows)])


@cache
def _numba_prim() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Prim as one would write it in an afternoon: compiled, clouds over threads, no distances kept."""
    numba: Any = importlib.import_module("numba")

    @numba.njit(parallel=True, fastmath=True)  # type: ignore[untyped-decorator, unused-ignore]
    def grow(data: Array, matrix: bool, deaths: Array) -> None:
        B, n, d = data.shape
        for b in numba.prange(B):
            near = np.full(n, np.inf, np.float32)
            outside = np.arange(n)
            left = n - 1
            last = outside[left]
            for step in range(n - 1):
                best, where = np.float32(np.inf), 0
                for k in range(left):
                    p = outside[k]
                    w = np.float32(0)
                    if matrix:
                        w = data[b, last, p]
                    else:
                        for j in range(d):
                            gap = data[b, last, j] - data[b, p, j]
                            w += gap * gap
                    near[p] = min(near[p], w)
                    if near[p] < best:
                        best, where = near[p], k
                last = outside[where]
                left -= 1
                outside[where] = outside[left]
                deaths[b, step] = best

    return grow, numba.set_num_threads


def _numba(data: Array, call: Call) -> Array:
    grow, set_num_threads = _numba_prim()
    set_num_threads(call.threads)
    matrix = call.kind == "matrix"
    clouds = data[:, :, None] if call.kind == "line" else data
    deaths = np.empty((len(clouds), clouds.shape[1] - 1), np.float32)
    grow(clouds, matrix, deaths)
    deaths = np.sort(deaths if matrix else np.sqrt(deaths), 1)
    return deaths[:, -1] if call.want == "r_f" else deaths


def _condensed(cloud: Array) -> Array:
    from scipy.spatial.distance import squareform

    out: Array = squareform(cloud, checks=False)
    return out


def _scipy(cloud: Array, call: Call) -> Any:
    from scipy.cluster.hierarchy import linkage

    return linkage(_condensed(cloud) if call.kind == "matrix" else cloud, "single")[:, 2]


def _fastcluster(cloud: Array, call: Call) -> Any:
    fastcluster: Any = importlib.import_module("fastcluster")
    if call.kind == "matrix":
        return fastcluster.linkage(_condensed(cloud), "single")[:, 2]
    return fastcluster.linkage_vector(cloud, "single")[:, 2]


def _sklearn(cloud: Array, call: Call) -> Any:
    cluster: Any = importlib.import_module("sklearn.cluster")
    metric = "precomputed" if call.kind == "matrix" else "euclidean"
    model = cluster.AgglomerativeClustering(n_clusters=None, distance_threshold=0, linkage="single", metric=metric)
    return model.fit(cloud).distances_


def _hdbscan_prim(cloud: Array, call: Call) -> Any:
    linkage: Any = importlib.import_module("hdbscan._hdbscan_linkage")
    if call.kind == "matrix":
        return linkage.mst_linkage_core(cloud.astype(np.float64))[:, 2]
    metric: Any = importlib.import_module("hdbscan.dist_metrics").DistanceMetric.get_metric("euclidean")
    return linkage.mst_linkage_core_vector(cloud.astype(np.float64), np.zeros(len(cloud)), metric, 1.0)[:, 2]


def _hdbscan_boruvka(cloud: Array, _: Call) -> Any:
    boruvka: Any = importlib.import_module("hdbscan._hdbscan_boruvka")
    tree = importlib.import_module("sklearn.neighbors").KDTree(cloud.astype(np.float64))
    return boruvka.KDTreeBoruvkaAlgorithm(tree, 0, approx_min_span_tree=False).spanning_tree()[:, 2]


def _fast_hdbscan(cloud: Array, _: Call) -> Any:
    module: Any = importlib.import_module("fast_hdbscan.hdbscan")
    return module.compute_minimum_spanning_tree(cloud, min_samples=1)[0][:, 2]


def _quitefastmst(cloud: Array, _: Call) -> Any:
    module: Any = importlib.import_module("quitefastmst")
    return module.mst_euclid(cloud, 0)[0]


def _quitefastmst_brute(cloud: Array, _: Call) -> Any:
    module: Any = importlib.import_module("quitefastmst")
    return module.mst_euclid(cloud, 0, algorithm="brute")[0]


def _genieclust(cloud: Array, call: Call) -> Any:
    genieclust: Any = importlib.import_module("genieclust")
    metric = "precomputed" if call.kind == "matrix" else "l2"
    model = genieclust.Genie(M=0, metric=metric, quitefastmst_params={})
    model._get_mst(cloud)
    return model._tree_d_


def _mlpack(cloud: Array, _: Call) -> Any:
    mlpack: Any = importlib.import_module("mlpack")
    return mlpack.emst(cloud.astype(np.float64), leaf_size=16)["output"][:, 2]


def _finite(diagram: Any) -> Any:
    deaths = np.asarray(diagram)[:, 1]
    return deaths[np.isfinite(deaths)]


def _ripser(cloud: Array, call: Call) -> Any:
    ripser: Any = importlib.import_module("ripser")
    return _finite(ripser.ripser(cloud, maxdim=0, distance_matrix=call.kind == "matrix")["dgms"][0])


def _giotto(cloud: Array, call: Call) -> Any:
    gph: Any = importlib.import_module("gph")
    metric = "precomputed" if call.kind == "matrix" else "euclidean"
    return _finite(gph.ripser_parallel(cloud, maxdim=0, metric=metric, n_threads=call.threads)["dgms"][0])


def _gudhi(cloud: Array, call: Call) -> Any:
    module: Any = importlib.import_module("gudhi.sklearn.rips_persistence")
    kind = "full distance matrix" if call.kind == "matrix" else "point cloud"
    return _finite(module.RipsPersistence(homology_dimensions=0, input_type=kind).fit_transform([cloud])[0])


def _torch_topological(cloud: Array, call: Call) -> Any:
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(call.threads)
    complexes: Any = importlib.import_module("torch_topological.nn").VietorisRipsComplex(dim=0)
    found = complexes(torch.from_numpy(np.ascontiguousarray(cloud)), treat_as_distances=call.kind == "matrix")
    return _finite(found[0].diagram)


_POINTS: tuple[Kind, ...] = ("line", "cloud")

OURS = Peer("obce", "obce", "obce", "Apache-2.0", _obce, threaded=True)

PEERS = (
    OURS,
    Peer("numpy sort", "numpy", "numpy", "BSD-3-Clause", _sort, ("line",)),
    Peer("numpy sort, in chunks", "numpy", "numpy", "BSD-3-Clause", _sort_in_chunks, ("line",)),
    Peer("numba Prim", "numba", "numba", "BSD-2-Clause", _numba, threaded=True),
    Peer("scipy", "scipy", "scipy", "BSD-3-Clause", _each(_scipy), pair_bytes=8),
    Peer("fastcluster", "fastcluster", "fastcluster", "BSD-2-Clause", _each(_fastcluster)),
    Peer("scikit-learn", "sklearn", "scikit-learn", "BSD-3-Clause", _each(_sklearn)),
    Peer("hdbscan Prim", "hdbscan", "hdbscan", "BSD-3-Clause", _each(_hdbscan_prim)),
    Peer("hdbscan Boruvka", "hdbscan", "hdbscan", "BSD-3-Clause", _each(_hdbscan_boruvka), _POINTS),
    Peer("fast_hdbscan", "fast_hdbscan", "fast_hdbscan", "BSD-2-Clause", _each(_fast_hdbscan), _POINTS, threaded=True),
    Peer("quitefastmst", "quitefastmst", "quitefastmst", "AGPL-3.0", _each(_quitefastmst), _POINTS, threaded=True),
    Peer(
        *("quitefastmst brute", "quitefastmst", "quitefastmst", "AGPL-3.0"),
        *(_each(_quitefastmst_brute), _POINTS),
        threaded=True,
    ),
    Peer("genieclust", "genieclust", "genieclust", "AGPL-3.0", _each(_genieclust), threaded=True),
    Peer("mlpack", "mlpack", "mlpack", "BSD-3-Clause", _each(_mlpack), _POINTS),
    Peer("ripser", "ripser", "ripser", "MIT", _each(_ripser), pair_bytes=24),
    Peer("giotto-ph", "gph", "giotto-ph", "AGPL-3.0", _each(_giotto), threaded=True, pair_bytes=24),
    Peer("gudhi", "gudhi", "gudhi", "MIT", _each(_gudhi), pair_bytes=24),
    Peer(
        *("torch-topological", "torch_topological", "torch-topological", "BSD-3-Clause"),
        _each(_torch_topological),
        threaded=True,
        pair_bytes=24,
    ),
)
