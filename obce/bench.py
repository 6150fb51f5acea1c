"""The engine beside its peers: first every answer is checked, then the clock runs.

One case is one set of clouds. Every peer answers it in a process of its own, so that one that crashes, hangs or eats
memory costs one row and no more. The order within a case:

1. the expected deaths: the oracle; scipy in float64 where the oracle is too slow; above SCIPY_POINTS points our own
   tree, once it carries a certificate (`certify`) that does not depend on how it was found;
2. every peer's answer is compared with them; a wrong one is refused and never timed;
3. a peer that is slow is given a part of the clouds and its time is scaled to all (column `clouds`);
4. repetitions, interleaved: each peer once, then each once more.

Axes: B clouds, n points, d coordinates. Times are seconds for the whole case. Peers are optional and imported late.
AGPL and GPL peers are no dependency of obce in any form: they are timed where the user has installed them.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import importlib.util
import itertools
import math
import multiprocessing
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from obce import __version__, backends, reference
from obce.files import whole
from obce.h0 import h0, h0_distances, h0_line, r_f

Array: TypeAlias = NDArray[Any]
Kind: TypeAlias = Literal["line", "cloud", "matrix"]
Want: TypeAlias = Literal["r_f", "deaths", "bagged"]
Row: TypeAlias = dict[str, str]

COLUMNS = (
    *("suite", "date", "commit", "machine", "versions", "peak_gflop_s", "peak_gb_s"),
    *("case", "kind", "want", "series", "B", "n", "d", "threads"),
    *("peer", "version", "licence", "status", "reason", "verified", "clouds", "repetitions"),
    *("wall_p20", "wall_p50", "wall_p80", "cpu_p20", "cpu_p50", "cpu_p80"),
    *("peak_mb", "ns_per_value", "gb_s", "gop_s", "ratio", "ratio_cpu"),
)

ORACLE_POINTS = 2_048  # above it scipy is asked: the oracle takes n steps of numpy, each slow by design
SCIPY_POINTS = 20_000  # its n (n - 1) / 2 distances in float64 fill 1.6 GB here
SQUARE_POINTS = 4_096  # the most points for peers that build a list of all pairs at 16 bytes and more a pair
RTOL = 2e-5  # float32 chains of up to a few hundred terms against float64

START_SECONDS = 300.0  # for imports and a first compilation, which are not timed
SHORT_SECONDS = 2e-3  # shorter calls are repeated within one repetition


# ---- cases -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """B clouds of n points with d coordinates: the same seed, the same bits on every machine.

    Attributes:
        name: as it stands in the CSV.
        kind: "line" (values [B, n]), "cloud" (points [B, n, d]) or "matrix" (distances [B, n, n]).
        want: "deaths" [B, n - 1], "r_f" [B], or "bagged" [B], the mean of r_f over groups of consecutive values.
        B: clouds.
        n: points of each.
        d: coordinates.
        clusters: 0 for Gaussian clouds, else the number of tight clusters the points fall into.
        group: values of a group, for "bagged".
        series: the growth curve the case is a point of: "n", "d", "B", or "cloud n" (one cloud); empty: none.
        budget: seconds a peer may use, where that is more than `Effort.budget`.
    """

    name: str
    kind: Kind
    want: Want
    B: int
    n: int
    d: int
    clusters: int = 0
    group: int = 0
    series: str = ""
    budget: float = 0.0

    def make(self) -> Array:
        """The data, float32."""
        g = np.random.default_rng(20240101)
        points = g.standard_normal((self.B, self.n, self.d), dtype=np.float32)
        if self.clusters:
            centres = 20 * g.standard_normal((self.clusters, self.d), dtype=np.float32)
            points += centres[g.integers(0, self.clusters, (self.B, self.n))]
        if self.kind == "line":
            return points[:, :, 0]
        if self.kind == "cloud":
            return points
        matrices = np.empty((self.B, self.n, self.n), np.float32)
        for cloud, matrix in zip(points, matrices, strict=True):
            matrix[:] = np.sqrt(((cloud[:, None] - cloud[None]) ** 2).sum(-1))
        return matrices

    @property
    def bytes(self) -> int:
        """Of the input, float32: what must be read at least once."""
        return 4 * self.B * self.n * (self.n if self.kind == "matrix" else self.d)

    @property
    def operations(self) -> int:
        """Of every pair's squared length, 3 a coordinate; 0 for kinds that need no arithmetic of that sort.

        It is the work of a method that looks at all pairs; a tree may need less, and then its rate says how much.
        """
        return self.B * self.n * (self.n - 1) // 2 * 3 * self.d if self.kind == "cloud" else 0


def _sweeps(
    n: tuple[Sequence[int], int, int],
    d: tuple[Sequence[int], int, int],
    B: tuple[Sequence[int], int, int],
    cloud: Sequence[int],
) -> tuple[Case, ...]:
    ns, n_B, n_d = n
    ds, d_B, d_n = d
    Bs, B_n, B_d = B
    return (
        *(Case(f"growth in n: {n_B} x {k:,} x {n_d}", "cloud", "deaths", n_B, k, n_d, series="n") for k in ns),
        *(Case(f"growth in d: {d_B} x {d_n} x {k}", "cloud", "deaths", d_B, d_n, k, series="d") for k in ds),
        *(Case(f"growth in B: {k:,} x {B_n} x {B_d}", "cloud", "deaths", k, B_n, B_d, series="B") for k in Bs),
        *(Case(f"growth in n: one {k:,} x 3", "cloud", "deaths", 1, k, 3, series="cloud n") for k in cloud),
    )


FULL = (
    Case("r_f, 20,000 lines of 1,000", "line", "r_f", 20_000, 1_000, 1),
    Case("r_f, 2,000 lines of 10,000", "line", "r_f", 2_000, 10_000, 1),
    Case("deaths, 20,000 lines of 1,000", "line", "deaths", 20_000, 1_000, 1),
    Case("deaths, 2,000 lines of 10,000", "line", "deaths", 2_000, 10_000, 1),
    Case("bagged r_f, 20,000 lines of 200 in groups of 20", "line", "bagged", 20_000, 200, 1, group=20),
    Case("1,000 clouds 512 x 8", "cloud", "deaths", 1_000, 512, 8),
    Case("200 clouds 1,024 x 64", "cloud", "deaths", 200, 1_024, 64),
    Case("50 clouds 2,048 x 16", "cloud", "deaths", 50, 2_048, 16),
    Case("100 matrices of 512", "matrix", "deaths", 100, 512, 8),
    Case("one cloud 20,000 x 3", "cloud", "deaths", 1, 20_000, 3),
    Case("one cloud 20,000 x 3 in 20 clusters", "cloud", "deaths", 1, 20_000, 3, clusters=20),
    Case("one cloud 100,000 x 3", "cloud", "deaths", 1, 100_000, 3),
    Case("one cloud 100,000 x 3 in 20 clusters", "cloud", "deaths", 1, 100_000, 3, clusters=20),
    Case("one cloud 1,000,000 x 2", "cloud", "deaths", 1, 1_000_000, 2),
    Case("one cloud 1,000,000 x 2 in 20 clusters", "cloud", "deaths", 1, 1_000_000, 2, clusters=20),
    Case("one cloud 20,000 x 64", "cloud", "deaths", 1, 20_000, 64),
    Case("one cloud 100,000 x 64", "cloud", "deaths", 1, 100_000, 64, budget=60),
    Case("one cloud 50,000 x 384", "cloud", "deaths", 1, 50_000, 384, budget=60),
    *_sweeps(
        n=((64, 256, 1_024, 4_096), 20, 8),
        d=((2, 8, 32, 128), 20, 512),
        B=((1, 16, 256), 256, 8),
        cloud=(1_000, 10_000, 100_000),
    ),
)
QUICK = (
    Case("r_f, 1,000 lines of 512", "line", "r_f", 1_000, 512, 1),
    Case("deaths, 1,000 lines of 512", "line", "deaths", 1_000, 512, 1),
    Case("bagged r_f, 1,000 lines of 200 in groups of 20", "line", "bagged", 1_000, 200, 1, group=20),
    Case("20 clouds 512 x 8", "cloud", "deaths", 20, 512, 8),
    Case("10 matrices of 256", "matrix", "deaths", 10, 256, 8),
    Case("one cloud 5,000 x 2", "cloud", "deaths", 1, 5_000, 2),
    Case("one cloud 5,000 x 3 in 20 clusters", "cloud", "deaths", 1, 5_000, 3, clusters=20),
    *_sweeps(
        n=((64, 128, 512), 4, 8),
        d=((2, 8, 32), 4, 256),
        B=((1, 8, 64), 128, 8),
        cloud=(250, 1_000, 5_000),
    ),
)


# ---- peers -------------------------------------------------------------------------------------------------------

Call: TypeAlias = Callable[[Any, Case, int], Any]


@dataclass(frozen=True)
class Peer:
    """A tool that can do some of the cases. Peers are sent to other processes: their functions are module-level.

    Attributes:
        name: as it stands in the CSV.
        package: module that must be there, empty for what obce needs anyway.
        distribution: its name on the package index.
        licence: its licence.
        kinds: the kinds of data it takes.
        call: (prepared data, case, threads) -> deaths [B, n - 1] ascending, or r_f [B].
        dtype: precision it computes in; the data are converted before the clock runs.
        prepare: a form of the data it wants ([B, ...] again), made before the clock runs.
        wants: what it can be asked for.
        threaded: it can use several threads; others get a row for one thread only.
        most_points: the largest cloud it is asked, and `why_most`, what bounds it.
        why_most: completes "not asked above most_points points: ".
        d: smallest and largest number of coordinates.
        ours: its answer must equal the oracle's bit for bit.
    """

    name: str
    package: str
    distribution: str
    licence: str
    kinds: tuple[Kind, ...]
    call: Call
    dtype: str = "float64"
    prepare: Callable[[Array, Case], Any] | None = None
    wants: tuple[Want, ...] = ("r_f", "deaths")
    threaded: bool = False
    most_points: int = 1 << 30
    why_most: str = ""
    d: tuple[int, int] = (1, 1 << 30)
    ours: bool = False

    def why_not(self) -> str | None:
        """Why it cannot run here, or None when it can."""
        for module in self.package.split():
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed; pip install {self.distribution}"
        return None

    def refuses(self, case: Case) -> str | None:
        """Why it is not asked this case although it takes its kind, or None."""
        if case.n > self.most_points:
            return f"not asked above {self.most_points:,} points: {self.why_most}"
        return None

    def does(self, case: Case) -> bool:
        """Whether the case is of a kind it takes."""
        return case.kind in self.kinds and case.want in self.wants and self.d[0] <= case.d <= self.d[1]

    def run(self, data: Any, case: Case, threads: int) -> Array:
        """Its answer: deaths [B, n - 1] ascending, or r_f [B]."""
        return np.asarray(self.call(data, case, threads))

    @property
    def version(self) -> str:
        """Of the installed distribution, or empty."""
        if self.ours:
            return __version__
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return ""


def _clouds(data: Array) -> Array:
    """Lines [B, n] as clouds [B, n, 1]; clouds as they are."""
    return data[:, :, None] if data.ndim == 2 else data


def _from_diagrams(diagrams: Iterable[Array], n: int) -> Array:
    """Deaths [B, n - 1] from diagrams [k, 2]; the merges of length 0 that were left out are put back."""
    out = []
    for diagram in diagrams:
        finite = np.sort(diagram[np.isfinite(diagram[:, 1]), 1])
        out.append(np.concatenate([np.zeros(n - 1 - len(finite), finite.dtype), finite]))
    return np.stack(out)


def _obce(data: Any, case: Case, threads: int) -> Any:
    if case.want == "r_f":
        return r_f(data, threads=threads)
    if case.want == "bagged":
        groups = data.reshape(-1, case.group)
        return np.asarray(r_f(groups, threads=threads)).reshape(len(data), -1).mean(1)
    do: Any = {"line": h0_line, "cloud": h0, "matrix": h0_distances}[case.kind]
    return do(data, threads=threads).deaths


def _obce_edges(data: Any, case: Case, threads: int) -> Any:
    do = h0_distances if case.kind == "matrix" else h0
    return do(data, threads=threads, edges=True).deaths


_CHUNK = 1 << 16  # values; a chunk stays in the cache


def _numpy(data: Any, case: Case, threads: int) -> Any:
    del threads
    rows = data.reshape(-1, case.group) if case.want == "bagged" else data
    gaps = np.diff(np.sort(rows, axis=1), axis=1)
    if case.want == "deaths":
        return np.sort(gaps, axis=1)
    largest = gaps.max(1)
    return largest.reshape(len(data), -1).mean(1) if case.want == "bagged" else largest


def _numpy_chunks(data: Any, case: Case, threads: int) -> Any:
    step = max(1, _CHUNK // case.n)
    return np.concatenate([_numpy(data[at : at + step], case, threads) for at in range(0, len(data), step)])


def _scipy(data: Any, case: Case, threads: int) -> Any:
    del case, threads
    from scipy.cluster.hierarchy import linkage

    return np.stack([linkage(cloud, "single")[:, 2] for cloud in data])


def _condensed(data: Array, case: Case) -> Array:
    """Matrices [B, n, n] as their upper triangles [B, n (n - 1) / 2]; clouds and lines as [B, n, d]."""
    if case.kind != "matrix":
        return _clouds(data)
    rows, columns = np.triu_indices(case.n, 1)
    return np.stack([matrix[rows, columns] for matrix in data])


def _sklearn(data: Any, case: Case, threads: int) -> Any:
    del threads
    if case.kind == "matrix":
        from sklearn.cluster import AgglomerativeClustering

        def tree(matrix: Array) -> Array:
            model = AgglomerativeClustering(
                n_clusters=None, distance_threshold=0, metric="precomputed", linkage="single"
            )
            distances: Array = model.fit(matrix).distances_
            return distances

        return np.stack([tree(matrix) for matrix in data])
    from sklearn.cluster._hierarchical_fast import mst_linkage_core
    from sklearn.metrics import DistanceMetric

    metric = DistanceMetric.get_metric("euclidean")
    return np.stack([np.sort(mst_linkage_core(cloud, metric)[:, 2]) for cloud in data])


def _fastcluster(data: Any, case: Case, threads: int) -> Any:
    del threads
    import fastcluster

    do = fastcluster.linkage if case.kind == "matrix" else fastcluster.linkage_vector
    return np.stack([do(cloud, "single")[:, 2] for cloud in data])


def _hdbscan_prim(data: Any, case: Case, threads: int) -> Any:
    del threads
    from hdbscan._hdbscan_linkage import mst_linkage_core, mst_linkage_core_vector
    from hdbscan.dist_metrics import DistanceMetric

    if case.kind == "matrix":
        return np.stack([np.sort(mst_linkage_core(matrix)[:, 2]) for matrix in data])
    metric, core = DistanceMetric.get_metric("euclidean"), np.zeros(data.shape[1])
    return np.stack([np.sort(mst_linkage_core_vector(cloud, core, metric, 1.0)[:, 2]) for cloud in data])


def _hdbscan_boruvka(data: Any, case: Case, threads: int) -> Any:
    del case
    from hdbscan._hdbscan_boruvka import KDTreeBoruvkaAlgorithm
    from sklearn.neighbors import KDTree

    def tree(cloud: Array) -> Array:
        found = KDTreeBoruvkaAlgorithm(
            KDTree(cloud, leaf_size=40), 0, "euclidean", leaf_size=13, approx_min_span_tree=False, n_jobs=threads
        )
        deaths: Array = np.sort(found.spanning_tree()[:, 2])
        return deaths

    return np.stack([tree(cloud) for cloud in data])


def _fast_hdbscan(data: Any, case: Case, threads: int) -> Any:
    del case
    from fast_hdbscan.boruvka import parallel_boruvka
    from fast_hdbscan.numba_kdtree import build_kdtree

    none = np.empty(1, np.float32)
    trees = (parallel_boruvka(build_kdtree(c), threads, 1, none, False)[0] for c in data)
    return np.stack([np.sort(tree[:, 2]) for tree in trees])


def _quitefastmst(data: Any, case: Case, threads: int) -> Any:
    del case, threads
    from quitefastmst import mst_euclid

    return np.stack([mst_euclid(cloud, 0)[0] for cloud in data])


def _quitefastmst_single(data: Any, case: Case, threads: int) -> Any:
    del case, threads
    from quitefastmst import mst_euclid

    return np.stack([mst_euclid(cloud, 0, algorithm="single_kd_tree")[0] for cloud in data])


def _quitefastmst_brute(data: Any, case: Case, threads: int) -> Any:
    del case, threads
    from quitefastmst import mst_euclid

    return np.stack([mst_euclid(cloud, 0, algorithm="brute")[0] for cloud in data])


def _genieclust(data: Any, case: Case, threads: int) -> Any:
    del threads
    from genieclust import Genie

    def tree(cloud: Array) -> Array:
        model = Genie(n_clusters=1, metric="precomputed" if case.kind == "matrix" else "l2")
        model._check_params()
        model._get_mst(cloud)  # its tree alone, without the clustering that `fit` goes on to
        deaths: Array = np.sort(model._tree_d_)
        return deaths

    return np.stack([tree(cloud) for cloud in data])


def _mlpack(data: Any, case: Case, threads: int) -> Any:
    del case, threads
    import mlpack

    return np.stack([np.sort(mlpack.emst(input_=cloud, leaf_size=16)["output"][:, 2]) for cloud in data])


def _ripser(data: Any, case: Case, threads: int) -> Any:
    del threads
    from ripser import ripser

    matrix = case.kind == "matrix"
    diagrams = (ripser(c, maxdim=0, distance_matrix=matrix)["dgms"][0] for c in data)
    return _from_diagrams(diagrams, data.shape[1])


def _giotto_ph(data: Any, case: Case, threads: int) -> Any:
    from gph import ripser_parallel

    metric = "precomputed" if case.kind == "matrix" else "euclidean"
    diagrams = (ripser_parallel(c, maxdim=0, metric=metric, n_threads=threads)["dgms"][0] for c in data)
    return _from_diagrams(diagrams, data.shape[1])


def _gudhi(data: Any, case: Case, threads: int) -> Any:
    from gudhi.sklearn import RipsPersistence

    kind = "full distance matrix" if case.kind == "matrix" else "point cloud"
    found = RipsPersistence(homology_dimensions=[0], input_type=kind, n_jobs=threads).fit_transform(list(data))
    return _from_diagrams((d[0] if isinstance(d, list) else d for d in found), data.shape[1])


def _torch_topological(data: Any, case: Case, threads: int) -> Any:
    del threads
    import torch
    from torch_topological.nn import VietorisRipsComplex

    complex_ = VietorisRipsComplex(dim=0)
    matrix = case.kind == "matrix"
    with torch.no_grad():
        found = [complex_(torch.as_tensor(c), treat_as_distances=matrix)[0].diagram.numpy() for c in data]
    return _from_diagrams(found, data.shape[1])


def _numba_prims() -> tuple[Any, Any]:
    """A plain Prim in numba, for clouds [B, n, d] and matrices [B, n, n]: what an afternoon gives."""
    import numba

    @numba.njit(parallel=True, fastmath={"reassoc", "nnan", "nsz", "contract"}, cache=True)  # type: ignore[untyped-decorator]
    def clouds(points: Array, deaths: Array) -> None:
        B, n, d = points.shape
        for b in numba.prange(B):
            x = points[b].T.copy()  # [d, n]: the inner loop runs over points
            key = np.full(n, np.inf, points.dtype)
            weight = np.empty(n, points.dtype)
            here = x[:, n - 1].copy()
            for live in range(n - 1, 0, -1):  # points that are not in the tree stand first
                weight[:live] = 0
                for k in range(d):
                    for j in range(live):
                        weight[j] += (x[k, j] - here[k]) * (x[k, j] - here[k])
                low = key[0]
                for j in range(live):
                    key[j] = min(key[j], weight[j])
                    low = min(low, key[j])
                best = 0
                while key[best] != low:
                    best += 1
                deaths[b, live - 1] = np.sqrt(low)
                here[:] = x[:, best]
                x[:, best] = x[:, live - 1]
                key[best] = key[live - 1]
            deaths[b].sort()

    @numba.njit(parallel=True, cache=True)  # type: ignore[untyped-decorator]
    def matrices(entries: Array, deaths: Array) -> None:
        B, n, _ = entries.shape
        for b in numba.prange(B):
            key = np.full(n, np.inf, entries.dtype)
            at = np.arange(n)
            here = n - 1
            for live in range(n - 1, 0, -1):
                best = 0
                for j in range(live):
                    key[j] = min(key[j], entries[b, here, at[j]])
                    if key[j] < key[best]:
                        best = j
                deaths[b, live - 1] = key[best]
                here = at[best]
                at[best], key[best] = at[live - 1], key[live - 1]
            deaths[b].sort()

    return clouds, matrices


_compiled: list[tuple[Any, Any]] = []


def _numba(data: Any, case: Case, threads: int) -> Any:
    del threads
    if not _compiled:
        _compiled.append(_numba_prims())
    deaths = np.empty((len(data), data.shape[1] - 1), data.dtype)
    _compiled[0][case.kind == "matrix"](data, deaths)
    return deaths


def _as_clouds(data: Array, case: Case) -> Array:
    del case
    return _clouds(data)


_ALL: tuple[Kind, ...] = ("line", "cloud", "matrix")
_POINTS: tuple[Kind, ...] = ("line", "cloud")
_PAIRS = "it holds all pairs"

PEERS = (
    Peer(
        "obce",
        "",
        "obce",
        "Apache-2.0",
        _ALL,
        _obce,
        dtype="float32",
        wants=("r_f", "deaths", "bagged"),
        threaded=True,
        ours=True,
    ),
    Peer(
        "obce, edges too",
        "",
        "obce",
        "Apache-2.0",
        ("cloud", "matrix"),
        _obce_edges,
        dtype="float32",
        threaded=True,
        ours=True,
    ),
    Peer("numpy sort", "", "numpy", "BSD", ("line",), _numpy, dtype="float32", wants=("r_f", "deaths", "bagged")),
    Peer(
        "numpy sort, in chunks",
        "",
        "numpy",
        "BSD",
        ("line",),
        _numpy_chunks,
        dtype="float32",
        wants=("r_f", "deaths", "bagged"),
    ),
    Peer(
        "numba Prim, 40 lines",
        "numba",
        "numba",
        "Apache-2.0 (ours), BSD",
        _ALL,
        _numba,
        dtype="float32",
        prepare=_as_clouds,
        threaded=True,
    ),
    Peer(
        "scipy linkage",
        "",
        "scipy",
        "BSD",
        _ALL,
        _scipy,
        prepare=_condensed,
        most_points=SCIPY_POINTS,
        why_most=_PAIRS,
    ),
    Peer("fastcluster", "fastcluster", "fastcluster", "BSD", _ALL, _fastcluster, prepare=_condensed),
    Peer("scikit-learn", "sklearn", "scikit-learn", "BSD", _ALL, _sklearn, prepare=_as_clouds),
    Peer("hdbscan Prim", "hdbscan", "hdbscan", "BSD", _ALL, _hdbscan_prim, prepare=_as_clouds),
    Peer("hdbscan Boruvka", "hdbscan", "hdbscan", "BSD", _POINTS, _hdbscan_boruvka, prepare=_as_clouds, threaded=True),
    Peer(
        "fast_hdbscan",
        "fast_hdbscan",
        "fast-hdbscan",
        "BSD",
        _POINTS,
        _fast_hdbscan,
        dtype="float32",
        prepare=_as_clouds,
        threaded=True,
    ),
    Peer(
        "quitefastmst",
        "quitefastmst",
        "quitefastmst",
        "AGPL-3.0",
        ("cloud",),
        _quitefastmst,
        dtype="float32",
        threaded=True,
    ),
    Peer(
        "quitefastmst, single tree",
        "quitefastmst",
        "quitefastmst",
        "AGPL-3.0",
        ("cloud",),
        _quitefastmst_single,
        dtype="float32",
        threaded=True,
        d=(2, 20),
    ),
    Peer(
        "quitefastmst, brute",
        "quitefastmst",
        "quitefastmst",
        "AGPL-3.0",
        ("cloud",),
        _quitefastmst_brute,
        dtype="float32",
        threaded=True,
    ),
    Peer(
        "genieclust",
        "genieclust",
        "genieclust",
        "AGPL-3.0",
        ("cloud", "matrix"),
        _genieclust,
        prepare=_as_clouds,
        threaded=True,
    ),
    Peer("mlpack", "mlpack", "mlpack", "BSD", _POINTS, _mlpack, prepare=_as_clouds),
    Peer(
        "ripser",
        "ripser",
        "ripser",
        "MIT",
        _ALL,
        _ripser,
        prepare=_as_clouds,
        most_points=SQUARE_POINTS,
        why_most=_PAIRS,
    ),
    Peer(
        "giotto-ph",
        "gph",
        "giotto-ph",
        "AGPL-3.0",
        _ALL,
        _giotto_ph,
        prepare=_as_clouds,
        threaded=True,
        most_points=SQUARE_POINTS,
        why_most=_PAIRS,
    ),
    Peer(
        "gudhi",
        "gudhi",
        "gudhi",
        "MIT",
        _ALL,
        _gudhi,
        prepare=_as_clouds,
        threaded=True,
        most_points=SQUARE_POINTS,
        why_most=_PAIRS,
    ),
    Peer(
        "torch-topological",
        "torch_topological",
        "torch-topological",
        "BSD",
        _ALL,
        _torch_topological,
        prepare=_as_clouds,
        most_points=SQUARE_POINTS,
        why_most=_PAIRS,
    ),
)


# ---- what is right -----------------------------------------------------------------------------------------------


class WrongAnswerError(ValueError):
    """An answer that is not the expected one; it is refused and never timed."""


class Expected(NamedTuple):
    """The right answer for the first clouds of a case.

    Attributes:
        answer: deaths [k, n - 1] or r_f [k].
        how: what it comes from, for the CSV.
        exact: ours must equal it bit for bit.
    """

    answer: Array
    how: str
    exact: bool


def expected(case: Case, data: Array) -> Expected:
    """The right answer for the first clouds, from the oracle or scipy in float64.

    Raises:
        ValueError: the case has more than SCIPY_POINTS points and needs `certify`.
    """
    if case.kind == "line":
        some = data[: max(1, 100_000 // case.n)]
        if case.want == "deaths":
            return Expected(reference.lines_deaths(some), f"oracle, {len(some)} clouds", True)
        groups = some.reshape(-1, case.group or case.n)
        largest = reference.lines_r_f(groups).reshape(len(some), -1).mean(1)
        return Expected(largest, f"oracle, {len(some)} clouds", True)
    some = data[: max(1, min(len(data), ORACLE_POINTS // case.n, 4))]
    if case.n <= ORACLE_POINTS:
        do = reference.matrices_h0 if case.kind == "matrix" else reference.clouds_h0
        return Expected(do(some)[0], f"oracle, {len(some)} clouds", True)
    if case.n > SCIPY_POINTS:
        raise ValueError(f"case {case.name!r} has {case.n} points, expected at most {SCIPY_POINTS} for scipy.")
    deaths = _scipy(_condensed(some.astype(np.float64), case), case, 1)
    return Expected(deaths, f"scipy in float64, {len(some)} clouds", False)


def certify(points: Array, deaths: Array, edges: Array) -> Array:
    """Check that edges are a minimum spanning tree, without looking for one.

    They must span the cloud, and by the cycle property no pair of points may be closer than the longest edge on the
    path between them in the tree. That is checked for the pairs of some points with all others, in float64.

    Args:
        points: [n, d].
        deaths: [n - 1], the lengths claimed.
        edges: [n - 1, 2].

    Returns:
        [n - 1] lengths of the edges in float64, ascending.

    Raises:
        WrongAnswerError: they are not.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import breadth_first_order

    n = len(points)
    wide = points.astype(np.float64)
    length = np.sqrt(((wide[edges[:, 0]] - wide[edges[:, 1]]) ** 2).sum(1))
    if not np.allclose(np.sort(length), deaths, rtol=RTOL, atol=0):
        raise WrongAnswerError("the deaths are not the lengths of the edges")
    stored = np.arange(1, n)  # edge numbers from 1 on, since 0 is no entry
    graph = coo_array((stored, (edges[:, 0], edges[:, 1])), shape=(n, n)).tocsr()
    number = (graph + graph.T).tocsr()
    samples = np.random.default_rng(0).choice(n, max(8, min(64, 4_000_000 // n)), replace=False)
    for start in samples:
        order, before = breadth_first_order(number, int(start), directed=False)
        if len(order) < n:
            raise WrongAnswerError(f"the edges reach {len(order)} of {n} points")
        # the longest edge on the way back to the start, by doubling the steps taken
        up = np.where(before < 0, start, before)
        below = np.where(before[edges[:, 0]] == edges[:, 1], edges[:, 0], edges[:, 1])
        longest = np.zeros(n)
        longest[below] = length
        while (up != start).any():
            longest = np.maximum(longest, longest[up])
            up = up[up]
        straight = np.sqrt(((wide - wide[start]) ** 2).sum(1))
        if (straight < longest * (1 - RTOL)).any():
            at = int(np.argmax(straight < longest * (1 - RTOL)))
            raise WrongAnswerError(f"points {start} and {at} are closer than the longest edge between them in the tree")
    return np.sort(length)


def compare(got: Array, right: Expected, case: Case, exact: bool) -> None:
    """Raises WrongAnswerError unless an answer for the first clouds is the expected one.

    Args:
        got: deaths [k, n - 1] or r_f [k].
        right: the expected answer for at least one cloud.
        case: what was asked.
        exact: every bit counts.
    """
    k = min(len(got), len(right.answer))
    wanted, got = right.answer[:k], got[:k]
    if case.want == "r_f" and got.ndim == 2:
        got = got[:, -1]
    if got.shape != wanted.shape:
        raise WrongAnswerError(f"it answered shape {got.shape}, expected {wanted.shape}")
    if (np.diff(got) < 0).any() and got.ndim == 2:
        raise WrongAnswerError("its deaths do not ascend")
    scale = float(np.abs(wanted).max(initial=0))
    wrong = got != wanted if exact and right.exact else ~np.isclose(got, wanted, rtol=RTOL, atol=1e-6 * scale)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise WrongAnswerError(f"it answered {got[at]} at {at}, expected {wanted[at]} ({int(wrong.sum())} differ)")


# ---- a process for each peer -------------------------------------------------------------------------------------


class Spent(NamedTuple):
    """One repetition: wall and processor seconds of one call, and the memory it took beyond its data, in bytes."""

    wall: float
    cpu: float
    peak: float


def _reset_peak() -> float:
    """Bytes held now, with the high-water mark reset to them; NaN where the system does not tell."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left behind would hide what this one takes
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError):
        return math.nan
    return float(pages * resource.getpagesize())


def _peak() -> float:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.nan
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), math.nan)


def _ceilings() -> tuple[float, float]:
    """(GFLOP/s of a float32 matrix product, GB/s read from memory), with the threads this process was given."""
    g = np.random.default_rng(0)
    a = g.standard_normal((2_048, 2_048), dtype=np.float32)
    x = np.ones(32 << 20, np.float32)  # 128 MiB, beyond the caches
    y = np.ones(32 << 20, np.float32)
    product, read = math.inf, math.inf
    for _ in range(7):
        start = time.perf_counter()
        a @ a
        middle = time.perf_counter()
        np.dot(x, y)
        product, read = min(product, middle - start), min(read, time.perf_counter() - middle)
    return 2e-9 * 2_048**3 / product, 1e-9 * (x.nbytes + y.nbytes) / read


def _small(case: Case) -> Case:
    return replace(case, n=min(case.n, 2 * case.group or 64))


def _serve(pipe: Any, peer: Peer, threads: int) -> None:
    """The loop of a peer's process: one order in, one answer out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the runner ends it
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    data: Any = None
    case: Any = None
    while True:
        try:
            what, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer: Any = None
            if what == "load":
                case, path = arguments
                data = np.load(path).astype(peer.dtype, copy=False)
                small = _small(case)  # imports and compilation
                few = data[:2, : small.n, : small.n].copy() if case.kind == "matrix" else data[:2, : small.n].copy()
                peer.run(peer.prepare(few, small) if peer.prepare else few, small, threads)
                data = peer.prepare(data, case) if peer.prepare else data
            elif what == "drop":
                data = None
            elif what == "ceilings":
                answer = _ceilings()
            elif what == "tree":
                found = h0(data, edges=True, threads=threads)
                answer = (np.asarray(found.deaths)[0], np.asarray(found.edges)[0])
            else:
                clouds, points, loops, keep, watch = arguments
                part = data[:clouds] if points is None else np.ascontiguousarray(data[:clouds, :points])
                held = _reset_peak() if watch else math.nan
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(loops):
                    got = peer.run(part, case, threads)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                spent = Spent(wall / loops, cpu / loops, _peak() - held if watch else math.nan)
                answer = (got if keep else None, spent)
        except Exception as error:  # whatever a peer raises is a row of the table
            pipe.send((f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", None))
        else:
            pipe.send((None, answer))


class RefusedError(Exception):
    """Why a peer has no time in a case.

    Attributes:
        status: "missing", "refused", "failed", "crashed", "wrong" or "over budget".
        reason: a clause.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


# What the libraries behind the peers read when they are loaded.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


@contextlib.contextmanager
def _environment(threads: int) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Process:
    """A peer in a process of its own, started when it is first needed and again after it broke."""

    def __init__(self, peer: Peer, threads: int) -> None:
        self.peer = peer
        self.threads = threads
        self._process: Any = None
        self._pipe: Any = None

    def post(self, *order: Any) -> None:
        """Send an order; `collect` waits for its answer."""
        if self._process is None:
            spawn = multiprocessing.get_context("spawn")  # a fork would inherit locks and thread pools
            self._pipe, theirs = spawn.Pipe()
            self._process = spawn.Process(target=_serve, args=(theirs, self.peer, self.threads), daemon=True)
            with _environment(self.threads):
                self._process.start()
            theirs.close()
        with contextlib.suppress(OSError):  # a process that broke is reported by `collect`
            self._pipe.send(order)

    def collect(self, seconds: float) -> Any:
        """The answer to the last order.

        Raises:
            RefusedError: the peer raised, its process ended, or it took longer than `seconds`.
        """
        if not self._pipe.poll(max(0.0, seconds)):
            self.close()
            raise RefusedError("over budget", f"no answer in {seconds:.0f} s")
        try:
            error, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self.close()
            died = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            raise RefusedError("crashed", f"its process ended with {died}") from None
        if error is not None:
            raise RefusedError("failed", error)
        return answer

    def ask(self, seconds: float, *order: Any) -> Any:
        """`post` and `collect`."""
        self.post(*order)
        return self.collect(seconds)

    @property
    def alive(self) -> bool:
        """Whether there is a process to talk to."""
        return self._process is not None

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._pipe.close()
            self._process = None


# ---- the runner --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        budget: seconds a peer may use in one case, checking and timing together.
        call: seconds of one repetition that a part of the clouds is cut to.
        repetitions: most of them.
        timing: seconds of timing that are enough once there are 3 repetitions, or 1 of a peer that takes half as long.
    """

    budget: float = 20.0
    call: float = 0.15
    repetitions: int = 7
    timing: float = 2.0


FULL_EFFORT = Effort()
SERIES_EFFORT = Effort(budget=8.0, call=0.05, repetitions=5, timing=1.0)
QUICK_EFFORT = Effort(budget=2.0, call=0.02, repetitions=3, timing=0.5)


@dataclass
class _Entry:
    """One peer in one case."""

    process: Process
    left: float
    clouds: int = 0
    loops: int = 1
    wanted: int = 0
    peak: float = math.nan
    spent: list[Spent] = field(default_factory=list)
    why: RefusedError | None = None

    @property
    def peer(self) -> Peer:
        return self.process.peer


def _run(
    entry: _Entry, clouds: int, points: int | None = None, loops: int = 1, keep: bool = False, watch: bool = False
) -> tuple[Array, Spent]:
    """One repetition on the first clouds, and the first points of them; `keep` its answer, `watch` its memory."""
    started = time.monotonic()
    try:
        answer: tuple[Array, Spent] = entry.process.ask(entry.left, "run", clouds, points, loops, keep, watch)
    finally:
        entry.left -= time.monotonic() - started
    return answer


def _predict(entry: _Entry, case: Case, budget: float) -> None:
    """Refuse a single large cloud when two smaller ones say that it would not be done in time."""
    times = [_run(entry, 1, case.n // part)[1].wall for part in (16, 16, 8)][1:]
    power = min(2.0, max(1.0, math.log2(times[1] / times[0])))
    seconds = times[1] * 8**power
    if 2 * seconds > budget:  # one call to check, one to time
        raise RefusedError(
            "over budget", f"about {seconds:.0f} s a call, from {case.n // 8:,} points; the budget is {budget:g} s"
        )


def _check(entry: _Entry, case: Case, right: Expected, effort: Effort) -> None:
    """Compare, and settle how many clouds, calls and repetitions the clock gets."""
    k, known = 1, len(right.answer)
    while True:
        got, spent = _run(entry, k, keep=True, watch=case.B == 1)
        try:
            compare(got, right, case, entry.peer.ours)
        except WrongAnswerError as error:
            raise RefusedError("wrong", str(error)) from None
        if k == known or spent.wall * known / k > 4 * effort.call:
            break
        k = known
    entry.peak = spent.peak
    if spent.wall <= effort.call:
        spent = _run(entry, k)[1]  # the first call warmed up
    entry.clouds = case.B
    if spent.wall * case.B / k > 4 * effort.call:
        entry.clouds = max(1, min(case.B, round(effort.call * k / spent.wall)))
    if case.B > 1:
        spent = _run(entry, entry.clouds, watch=True)[1]
        entry.peak = spent.peak
    entry.loops = min(100, max(1, math.ceil(SHORT_SECONDS / max(spent.wall, 1e-7))))
    seconds = max(spent.wall, 1e-7) * entry.loops
    fewest = 3 if entry.peer.ours or seconds < effort.timing / 2 else 1
    enough = max(fewest, int(effort.timing / seconds))
    entry.wanted = max(1, min(effort.repetitions, enough, int(entry.left / seconds)))


def _right(case: Case, data: Array, processes: Sequence[Process], budget: float) -> Expected:
    if case.kind == "line" or case.n <= SCIPY_POINTS:
        return expected(case, data)
    ours = next((p for p in processes if p.peer.ours and p.peer.does(case) and p.alive), None)
    if ours is None:
        raise RefusedError("refused", "not verified: obce gave no tree to certify")
    try:
        deaths, edges = ours.ask(max(60.0, 2 * budget), "tree")
        lengths = certify(data[0], deaths, edges)
    except RefusedError as error:
        raise RefusedError("refused", f"not verified: obce gave no tree to certify ({error})") from None
    except WrongAnswerError as error:
        raise RefusedError("refused", f"not verified: obce's tree is wrong, {error}") from None
    return Expected(lengths[None], "certificate in float64", False)


def _times(entry: _Entry, case: Case) -> dict[str, str]:
    scale = case.B / entry.clouds
    wall, cpu = (np.quantile([s[i] for s in entry.spent], (0.2, 0.5, 0.8)) * scale for i in (0, 1))
    values = case.B * case.n * (case.n if case.kind == "matrix" else case.d)
    out = {
        "clouds": str(entry.clouds),
        "repetitions": str(len(entry.spent)),
        "peak_mb": f"{entry.peak / 1e6:.1f}" if entry.peak == entry.peak else "",
        "ns_per_value": f"{1e9 * wall[1] / values:.3g}",
        "gb_s": f"{1e-9 * case.bytes / wall[1]:.3g}",
        "gop_s": f"{1e-9 * case.operations / wall[1]:.3g}" if case.operations else "",
    }
    for name, quantiles in (("wall", wall), ("cpu", cpu)):
        out |= {f"{name}_p{p}": f"{q:.4g}" for p, q in zip((20, 50, 80), quantiles, strict=True)}
    return out


def measure(case: Case, processes: Sequence[Process], effort: Effort, known: dict[str, Expected]) -> list[Row]:
    """All peers on one case: expected answer, comparison, interleaved repetitions.

    Args:
        case: what is asked.
        processes: the peers that do such a case, all with the same number of threads.
        effort: how long to measure.
        known: expected answers by case, kept from one number of threads to the next.

    Returns:
        One row a peer, ours first; ratio is its median over the first one's.
    """
    effort = replace(effort, budget=max(effort.budget, case.budget))
    entries = [_Entry(process, effort.budget) for process in processes]
    with tempfile.TemporaryDirectory(prefix="obce-bench-") as folder:
        data = case.make()
        path = Path(folder) / "data.npy"
        np.save(path, data)
        asked = []
        for entry in entries:
            missing, refused = entry.peer.why_not(), entry.peer.refuses(case)
            if missing or refused:
                entry.why = RefusedError("missing" if missing else "refused", missing or refused or "")
                continue
            entry.process.post("load", case, path)
            asked.append(entry)
        for entry in asked:
            with _noted(entry):
                entry.process.collect(START_SECONDS)
        alive = [entry for entry in asked if entry.why is None]
        try:
            if case.name not in known:
                known[case.name] = _right(case, data, [entry.process for entry in alive], effort.budget)
        except RefusedError as error:
            for entry in alive:
                entry.why = error
        del data
        right = known.get(case.name)
        for entry in alive:
            if right is not None:
                with _noted(entry):
                    if case.B == 1 and case.n > SQUARE_POINTS:
                        _predict(entry, case, effort.budget)
                    _check(entry, case, right, effort)
        for repetition in range(effort.repetitions):
            for entry in alive:
                if entry.why is None and repetition < entry.wanted:
                    entry.left = max(entry.left, effort.budget)
                    with _noted(entry):
                        entry.spent.append(_run(entry, entry.clouds, loops=entry.loops)[1])
        for entry in alive:
            if entry.process.alive:
                with contextlib.suppress(RefusedError):
                    entry.process.ask(START_SECONDS, "drop")
    rows = []
    for entry in entries:
        peer = entry.peer
        row = dict.fromkeys(COLUMNS, "") | {
            "peer": peer.name,
            "version": peer.version if entry.why is None or entry.why.status != "missing" else "",
            "licence": peer.licence,
            "status": "ok" if entry.why is None else entry.why.status,
            "reason": "" if entry.why is None else entry.why.reason,
            "verified": right.how if right is not None and entry.why is None else "",
        }
        rows.append(row | (_times(entry, case) if entry.why is None else {}))
    base = rows[0]
    for row in rows:
        for ratio, seconds in (("ratio", "wall_p50"), ("ratio_cpu", "cpu_p50")):
            if row[seconds] and base[seconds] and float(base[seconds]) > 0:
                row[ratio] = f"{float(row[seconds]) / float(base[seconds]):.3g}"
    return rows


@contextlib.contextmanager
def _noted(entry: _Entry) -> Iterator[None]:
    try:
        yield
    except RefusedError as error:
        entry.why = error


# ---- rows --------------------------------------------------------------------------------------------------------


def _commit() -> str:
    """The commit of the checkout, with -dirty when tracked files other than results changed; else the release."""
    root = Path(__file__).parents[1]
    if not (root / "csrc").is_dir():
        return f"release {__version__}"
    try:
        head = ["git", "rev-parse", "--short=12", "HEAD"]
        changed = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"]
        name, dirt = (
            subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for command in (head, changed)
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}-dirty" if dirt else name


def _machine() -> str:
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    level = "no compiled engine"
    if backends.BACKENDS["cpu"].why_not() is None:
        from obce import _cpu

        level = _cpu.simd_level()
    return f"{processor}, {os.cpu_count()} processors, {level}"


def facts() -> Row:
    """What every row carries: date, commit, machine, versions."""
    versions = {"python": platform.python_version(), "obce": __version__, "numpy": np.__version__}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": _commit(),
        "machine": _machine(),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }


def append_row(path: Path, row: Row) -> None:
    """Adds a row to a CSV; a new file gets a header first. A file of other columns is left for one beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = path
    for number in itertools.count(2):
        fresh = not path.exists()
        if fresh or path.read_text("utf-8").split("\n", 1)[0].split(",") == list(row):
            break
        path = wanted.with_stem(f"{wanted.stem}-{number}")
    if path != wanted:
        print(f"{wanted} has columns of another program or version; the row is in {path}.", file=sys.stderr)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV this module wrote; none when there is no such file.

    Raises:
        ValueError: it has other columns.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has columns of another program or version; give --out a new file.")
        return list(reader)


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def growth(rows: Iterable[Row]) -> dict[tuple[str, str, str], float]:
    """Exponents p of time ~ axis^p, by least squares of the logarithms.

    Returns:
        {(series, peer, threads): p} for every peer with two points of a series and more.
    """
    points: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row["series"] and row["status"] == "ok":
            along = float(row[row["series"].split()[-1]])
            key = (row["series"], row["peer"], row["threads"])
            points.setdefault(key, []).append((along, float(row["wall_p50"])))
    return {
        key: float(np.polyfit(np.log([x for x, _ in found]), np.log([y for _, y in found]), 1)[0])
        for key, found in points.items()
        if len({along for along, _ in found}) > 1
    }


def _lines(case: Case, threads: int, rows: Sequence[Row], product: float, read: float) -> Iterator[str]:
    yield f"\n{case.name}, {threads} thread{'s' if threads > 1 else ''}"
    for row in rows:
        if row["status"] == "missing":  # told once, at the start
            continue
        if row["status"] != "ok":
            yield f"  {row['peer']:26} {row['status']}: {row['reason']}"
            continue
        line = f"  {row['peer']:26} {float(row['wall_p50']):10.4g} s  x {row['ratio']:>8}"
        line += f"  {row['gb_s']:>8} GB/s ({float(row['gb_s']) / read:.1%})"
        if row["gop_s"]:
            line += f"  {row['gop_s']:>6} Gop/s ({float(row['gop_s']) / product:.0%})"
        yield line + (f"  from {row['clouds']} of {case.B}" if int(row["clouds"]) < case.B else "")


def growth_lines(rows: Iterable[Row]) -> Iterator[str]:
    """The exponents as text, a line a series."""
    found = growth(rows)
    for series, threads in sorted({(key[0], key[2]) for key in found}):
        exponents = {peer: p for (s, peer, t), p in found.items() if (s, t) == (series, threads)}
        listed = ", ".join(f"{peer} {p:.2f}" for peer, p in sorted(exponents.items(), key=lambda item: item[1]))
        axis = series.split()[-1]
        yield f"time ~ {axis}^p ({series}, {threads} thread{'s' if threads != '1' else ''}): {listed}"


def select(suite: Sequence[Case], name: str | None) -> list[Case]:
    """Cases whose name contains `name`.

    Raises:
        ValueError: there is none.
    """
    chosen = [case for case in suite if name is None or name.lower() in case.name.lower()]
    if not chosen:
        raise ValueError(f"case is {name!r}, expected part of one of: {'; '.join(case.name for case in suite)}.")
    return chosen


def run(
    *,
    quick: bool = False,
    case: str | None = None,
    out: Path | None = None,
    threads: Sequence[int] | None = None,
    budget: float | None = None,
    fresh: bool = False,
    peers: Sequence[Peer] = PEERS,
    tell: Callable[[str], None] = print,
) -> list[Row]:
    """Verify and time the cases of a suite, beside every peer that is installed.

    Args:
        quick: the small cases, under a minute in all, one thread. They show that everything works, not how fast.
        case: only cases whose name contains this.
        out: CSV to write, after every case. Cases it holds from the same commit and machine are not measured again,
            unless the checkout is dirty or a peer was installed since; rows of the other suite leave it.
        threads: numbers of threads to measure with (default: 1 and 2, or 1 for the quick suite).
        budget: seconds a peer may use in one case (default: 20; 2 for the quick suite, 8 for growth curves).
        fresh: measure again what `out` holds.
        peers: who is measured; the first is what the others are compared with.
        tell: is given lines of text as cases finish.

    Returns:
        The rows, as in `out`.

    Raises:
        ValueError: there is no such case, or `out` is another kind of file.
        RuntimeError: an answer of obce itself was wrong or missing; the rows are written all the same.
    """
    suite = "quick" if quick else "full"
    cases = select(QUICK if quick else FULL, case)
    common = facts()
    kept = [] if out is None else [row for row in read_rows(out) if row["suite"] == suite]
    trusted = not fresh and "dirty" not in common["commit"] and common["commit"] != "unknown"
    same = ("commit", "machine", "versions")
    installed = {peer.name: peer for peer in peers if peer.why_not() is None}
    done = {
        (row["case"], row["threads"]) for row in kept if trusted and all(row[name] == common[name] for name in same)
    }
    done -= {
        (row["case"], row["threads"])
        for row in kept
        if row["peer"] in installed and _installed_since(row, installed[row["peer"]])
    }
    tell(f"{common['machine']}; {common['versions']}; commit {common['commit']}")
    for peer in peers:
        why_not = peer.why_not()
        if why_not is not None:
            tell(f"{peer.name}: {why_not}")
    known: dict[str, Expected] = {}
    for count in threads or ((1,) if quick else (1, 2)):
        # growth curves are told on one thread
        todo = [c for c in cases if (c.name, str(count)) not in done and not (c.series and count > 1)]
        if not todo:
            continue
        processes = [Process(peer, count) for peer in peers]
        try:
            product, read = processes[0].ask(START_SECONDS, "ceilings")
            tell(f"{count} thread{'s' if count > 1 else ''}: {product:.0f} GFLOP/s in a product, {read:.1f} GB/s read")
            for one in todo:
                effort = QUICK_EFFORT if quick else SERIES_EFFORT if one.series else FULL_EFFORT
                if budget is not None:
                    effort = replace(effort, budget=budget)
                able = [p for p in processes if p.peer.does(one) and (count == 1 or p.peer.threaded)]
                rows = measure(one, able, effort, known)
                about = {"peak_gflop_s": f"{product:.1f}", "peak_gb_s": f"{read:.1f}", "threads": str(count)}
                for name in ("kind", "want", "series", "B", "n", "d"):
                    about[name] = str(getattr(one, name))
                for row in rows:
                    row.update(common | about | {"suite": suite, "case": one.name})
                for line in _lines(one, count, rows, product, read):
                    tell(line)
                kept = [row for row in kept if (row["case"], row["threads"]) != (one.name, str(count))] + rows
                if out is not None:
                    _write_rows(out, kept)
        finally:
            for process in processes:
                process.close()
    tell("")
    for line in growth_lines(kept):
        tell(line)
    _refuse_ours(kept, peers, {c.name for c in cases})
    return kept


def _installed_since(row: Row, peer: Peer) -> bool:
    """Whether a peer that is installed was not when the row was made, or was another version."""
    return row["status"] == "missing" or row["version"] != peer.version


def _refuse_ours(rows: Iterable[Row], peers: Sequence[Peer], cases: set[str]) -> None:
    ours = {peer.name for peer in peers if peer.ours}
    broken = ("wrong", "failed", "crashed", "missing")
    for row in rows:
        if row["peer"] in ours and row["case"] in cases and row["status"] in broken:
            raise RuntimeError(f"{row['peer']} on {row['case']!r}: {row['status']}, {row['reason']}.")
