"""Which engine answers: a table of backends, each with the reason why it cannot run here.

A backend the caller names (`backend=` or the environment variable OBCE_BACKEND) runs or raises. Otherwise the
first of the order for that kind of data runs, and the logger "obce" says once which one and why those before it
were refused. Input is checked by obce/h0.py before it arrives here.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from obce import reference

if TYPE_CHECKING:
    import torch

Array = reference.Array
Kind = Literal["line", "cloud", "matrix", "condensed", "graph"]
Want = Literal["r_f", "deaths", "edges"]

ALGORITHMS = ("auto", "sort", "prim", "boruvka", "kdtree", "kruskal")
# Of large clouds with many coordinates tensor cores look at all pairs (kernels/filter.py), where the compiled engine
# would compute all distances. Estimated from counts of operations, not measured.
PRODUCT_POINTS, PRODUCT_COORDINATES = 4096, 16
SQUARED = ("euclidean", "sqeuclidean")  # metrics with one tree: their weight is the squared length

_log = logging.getLogger("obce")
_told: set[str] = set()


@dataclass(frozen=True)
class Job:
    """One checked call.

    Attributes:
        kind: "line" (clouds of scalars), "cloud", "matrix", "condensed" (one matrix) or "graph" (one).
        data: values [B, n], points [B, n, d], entries [B, n, n] or [1, n (n - 1) / 2], or a reference.Graph;
            float32 or float64; numpy, or a torch tensor when it lies on an accelerator, which for r_f may be float16 or
            bfloat16.
        lengths: [B] int64 on the host, or None for n everywhere.
        want: "r_f" ([B], line only), "deaths" or "edges" (deaths and edges).
        algorithm: one of ALGORITHMS.
        threads: number of host threads, at least 1.
        metric: of a cloud, one of reference.METRICS; "euclidean" for every other kind.
        p: exponent of minkowski.
        check: raises when the square matrices are no distances; None when that is not asked for.
        progress: is told the share of the work done, about ten times a second, where the backend can.
    """

    kind: Kind
    data: Any
    lengths: Array | None
    want: Want
    algorithm: str
    threads: int
    metric: str = "euclidean"
    p: float = 0.0
    check: Callable[[], None] | None = None
    progress: Callable[[float], object] | None = None

    @property
    def _is_host(self) -> bool:
        return isinstance(self.data, np.ndarray | reference.Graph)

    @property
    def device(self) -> str:
        """Type of the device the data lies on, "cpu" for numpy."""
        return "cpu" if self._is_host else str(self.data.device.type)

    @property
    def size(self) -> tuple[int, int]:
        """B and n."""
        if self.kind == "graph":
            return 1, self.data.n
        if self.kind == "condensed":
            return 1, reference.condensed_points(self.data.shape[1]) or 0
        return self.data.shape[0], self.data.shape[1]

    @property
    def sorts(self) -> bool:
        """A line whose lengths alone are wanted is answered by sorting, unless a tree is asked for by name."""
        return self.kind == "line" and self.want != "edges" and self.algorithm in ("auto", "sort")

    def on_host(self) -> Job:
        """The same job with numpy data."""
        return self if self._is_host else replace(self, data=self.as_wide().data.cpu().numpy())

    def as_wide(self) -> Job:
        """The same job with float32 in place of 16-bit numbers."""
        if self._is_host or self.data.dtype.itemsize > 2:
            return self
        return replace(self, data=self.data.float())

    def as_cloud(self) -> Job:
        """A line seen as a cloud with one coordinate."""
        if self.kind != "line":
            return self
        return replace(self, kind="cloud", data=self.data[:, :, None])


@dataclass(frozen=True)
class Answer:
    """Numpy arrays or torch tensors, as the backend made them.

    Attributes:
        lengths: r_f [B] or deaths [B, n - 1], in the dtype of the data.
        edges: [B, n - 1, 2] int64, or None.
        backend: name of the backend that ran.
        algorithm: what it ran: "buckets", "sort", "prim", "boruvka", "kdtree" or "kruskal".
    """

    lengths: Any
    edges: Any
    backend: str
    algorithm: str


class Backend(ABC):
    """One engine."""

    name: str
    checks_matrices = (
        False  # looks for flaws itself, in the pass that reads them, and calls Job.check when it found one
    )

    @abstractmethod
    def why_not(self) -> str | None:
        """Why it cannot run on this machine, or None when it can."""

    @abstractmethod
    def refuses(self, job: Job) -> str | None:
        """Why it cannot do this job although it can run, or None."""

    @abstractmethod
    def run(self, job: Job) -> Answer:
        """Do the job."""


def _address(array: Array | None) -> int:
    return 0 if array is None else int(array.ctypes.data)


class CpuBackend(Backend):
    """The compiled engine, csrc/ph0_cpu.cpp."""

    name = "cpu"
    checks_matrices = True

    # Sizes at which the algorithms meet on Gaussian clouds, where trees and lists gain least:
    # benchmarks/bench_choice.py measures them, docs/engine.md shows them.
    # d -> points from which the k-d tree is the fastest, for float32 and float64. In more coordinates its boxes rule
    # out too little.
    TREE_POINTS: ClassVar[dict[int, tuple[float, float]]] = {
        1: (2_000, 2_000),
        2: (3_500, 1_950),
        3: (4_000, 2_150),
        4: (5_000, 2_800),
        5: (7_300, 4_400),
        6: (10_500, 6_000),
        7: (16_000, 9_000),
        8: (26_000, 72_000),
        9: (70_000, 180_000),
        10: (200_000, math.inf),
    }
    # Boruvka on lists beats Prim from FACTOR * d^-0.75 points on, not below LEAST, and on clouds of fewer coordinates
    # the k-d tree comes first. For float32 and float64.
    LIST_COORDINATES = 8
    LIST_FACTOR: ClassVar[tuple[int, int]] = (135_000, 33_000)
    LIST_LEAST: ClassVar[tuple[int, int]] = (1_700, 500)

    TREES = ("prim", "boruvka", "kdtree")  # in the order of ph0::Algorithm

    def why_not(self) -> str | None:
        """See `Backend.why_not`."""
        try:
            importlib.import_module("obce._cpu")
        except ImportError as error:
            return f"obce._cpu is not built ({error}); install a C++17 compiler and reinstall obce"
        return None

    def refuses(self, job: Job) -> str | None:
        """See `Backend.refuses`."""
        if job.kind != "line" and job.algorithm in ("boruvka", "kdtree"):
            if job.kind != "cloud":
                return "it does given matrices by prim only"
            if job.metric not in SQUARED:
                return f"it does the metric {job.metric} by prim only"
        return None

    def run(self, job: Job) -> Answer:
        """See `Backend.run`."""
        from obce import _cpu

        job = job.on_host()
        data, lengths, threads = job.data, job.lengths, job.threads
        B, n = job.size
        dtype = data.weights.dtype if isinstance(data, reference.Graph) else data.dtype
        suffix = dtype.name
        if job.sorts:
            strides = [stride // data.itemsize for stride in data.strides]
            out = np.empty(B if job.want == "r_f" else (B, n - 1), dtype)
            call = getattr(_cpu, ("lines_r_f_" if job.want == "r_f" else "lines_deaths_") + suffix)
            call(_address(data), *strides, B, n, _address(lengths), _address(out), threads, job.progress)
            return Answer(out, None, self.name, "buckets" if job.want == "r_f" else "sort")

        deaths = np.empty((B, n - 1), dtype)
        edges = np.empty((B, n - 1, 2), np.int64) if job.want == "edges" else None
        if isinstance(data, reference.Graph):
            a, b, weights = (np.ascontiguousarray(part) for part in (data.ends_a, data.ends_b, data.weights))
            call = getattr(_cpu, "graph_h0_" + suffix)
            call(
                _address(a),
                _address(b),
                _address(weights),
                len(weights),
                n,
                _address(deaths),
                _address(edges),
                job.progress,
            )
            return Answer(deaths, edges, self.name, "kruskal")
        data = np.ascontiguousarray(job.as_cloud().data)
        if job.kind in ("matrix", "condensed"):
            call = getattr(_cpu, "matrices_h0_" + suffix)
            condensed = job.kind == "condensed"
            into = _address(deaths), _address(edges)
            check = job.check is not None
            flawed = call(_address(data), B, n, _address(lengths), condensed, check, *into, threads, job.progress)
            if job.check is not None and flawed >= 0:
                job.check()
                raise RuntimeError(f"matrix {flawed} holds no distances.")
            return Answer(deaths, edges, self.name, "prim")
        d = data.shape[2]
        algorithm = job.algorithm
        if algorithm == "auto":
            algorithm = self._choose(n, d, data.itemsize) if job.metric in SQUARED else "prim"
        elif algorithm == "boruvka" and d == 1:
            algorithm = "kdtree"  # the same rounds; the lists are for weights that are squares
        call = getattr(_cpu, "clouds_h0_" + suffix)
        sizes = B, n, d, _address(lengths)
        metric = reference.METRICS.index(job.metric), job.p
        which = self.TREES.index(algorithm)
        call(_address(data), *sizes, *metric, _address(deaths), _address(edges), which, threads, job.progress)
        return Answer(deaths, edges, self.name, algorithm)

    def _choose(self, n: int, d: int, itemsize: int) -> str:
        """The fastest algorithm for clouds of n points with d coordinates."""
        double = int(itemsize == 8)
        if d in self.TREE_POINTS and n >= self.TREE_POINTS[d][double]:
            return "kdtree"
        lists = max(self.LIST_LEAST[double], self.LIST_FACTOR[double] * d**-0.75)
        if d >= self.LIST_COORDINATES and n >= lists:
            return "boruvka"
        return "prim"


class ReferenceBackend(Backend):
    """numpy by definition (obce/reference.py); clouds of scalars on an accelerator by torch.sort on it."""

    name = "reference"

    def why_not(self) -> str | None:
        """See `Backend.why_not`."""
        return None

    def refuses(self, job: Job) -> str | None:
        """See `Backend.refuses`."""
        if job.algorithm in ("boruvka", "kdtree"):
            return "it has the algorithms sort, prim and kruskal"
        return None

    def run(self, job: Job) -> Answer:
        """See `Backend.run`."""
        if job.sorts:
            if isinstance(job.data, np.ndarray):
                line = reference.lines_r_f if job.want == "r_f" else reference.lines_deaths
                return Answer(line(job.data, job.lengths), None, self.name, "sort")
            job = job.as_wide()
            torch_line = reference.torch_lines_r_f if job.want == "r_f" else reference.torch_lines_deaths
            return Answer(torch_line(job.data, _beside(job.data, job.lengths)), None, self.name, "sort")
        job = job.on_host().as_cloud()
        if job.kind == "graph":
            deaths, edges = reference.graph_h0(job.data)
        elif job.kind == "condensed":
            deaths, edges = reference.condensed_h0(job.data, job.algorithm)
        elif job.kind == "matrix":
            deaths, edges = reference.matrices_h0(job.data, job.lengths, job.algorithm)
        else:
            deaths, edges = reference.clouds_h0(job.data, job.lengths, job.algorithm, job.metric, job.p)
        kruskal = job.kind == "graph" or (job.algorithm == "auto" and job.size[1] <= reference.KRUSKAL_POINTS)
        return Answer(deaths, edges if job.want == "edges" else None, self.name, "kruskal" if kruskal else "prim")


class CudaBackend(Backend):
    """The compiled CUDA engine, csrc/ph0_cuda.h, by way of obce/cuda.py."""

    name = "cuda"

    def why_not(self) -> str | None:
        """See `Backend.why_not`."""
        if importlib.util.find_spec("torch") is None:
            return "torch is not installed"
        reason: str | None = importlib.import_module("obce.cuda").why_not()
        return reason

    def refuses(self, job: Job) -> str | None:
        """See `Backend.refuses`."""
        if job.kind in ("condensed", "graph"):
            return f"it has no kernel for a {job.kind}"
        if job.metric not in SQUARED:
            return f"it has no kernel for the metric {job.metric}"
        if job.sorts:
            return None if job.want == "r_f" else self._too_long(job)
        if job.algorithm in ("sort", "kdtree"):
            return "it has the algorithms prim and boruvka for trees"
        engine = importlib.import_module("obce.cuda").engine()
        if job.algorithm == "prim" and job.size[1] > engine.prim_points():
            return f"it does at most {engine.prim_points()} points by prim; ask for boruvka or auto"
        return None

    @staticmethod
    def _too_long(job: Job) -> str | None:
        cuda = importlib.import_module("obce.cuda")
        most = cuda.sorted_values(cuda.on_device(job.data[:1]))
        return None if job.size[1] <= most else f"it sorts lines of at most {most} values"

    def run(self, job: Job) -> Answer:
        """See `Backend.run`."""
        cuda = importlib.import_module("obce.cuda")
        data = cuda.on_device(job.data)
        lengths = _beside(data, job.lengths)
        if job.sorts:
            if job.want == "r_f":
                return Answer(cuda.lines_r_f(data, lengths), None, self.name, "buckets")
            return Answer(cuda.lines_deaths(data, lengths), None, self.name, "sort")
        tree = replace(job, data=data).as_wide().as_cloud()
        squared, edges, matrix = job.metric == "sqeuclidean", job.want == "edges", job.kind == "matrix"
        algorithm = cuda.choose(tree.data, matrix, job.algorithm)
        deaths, ends = cuda.trees(tree.data, lengths, squared, edges, algorithm, matrix)
        if job.want == "r_f":
            return Answer(_last(deaths, lengths), None, self.name, algorithm)
        return Answer(deaths, ends, self.name, algorithm)


def _last(deaths: torch.Tensor, lengths: torch.Tensor | None) -> Any:
    """The last death [B] of each cloud from deaths [B, n - 1]; 0 for one point."""
    import torch

    padded = torch.cat([deaths.new_zeros((len(deaths), 1)), deaths], 1)
    if lengths is None:
        return padded[:, -1].clone()
    return padded.gather(1, lengths[:, None] - 1)[:, 0]


class TritonBackend(Backend):
    """Boruvka rounds over the fused kernels of kernels/pairwise.py and kernels/filter.py, on a CUDA device.

    With TRITON_INTERPRET=1 in the environment it runs on the host, for tests: Triton's interpreter is slow.
    """

    name = "triton"

    def why_not(self) -> str | None:
        """See `Backend.why_not`."""
        for package in ("torch", "triton"):
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        import torch

        if not torch.cuda.is_available() and not self._interprets():
            return "torch sees no CUDA device"
        return None

    def refuses(self, job: Job) -> str | None:
        """See `Backend.refuses`."""
        if job.kind not in ("line", "cloud"):
            return "it has no kernel for given matrices"
        if job.metric != "euclidean":
            return f"it has no kernel for the metric {job.metric}"
        if job.algorithm in ("sort", "prim", "kdtree"):
            return "it has the algorithm boruvka"
        return None

    def run(self, job: Job) -> Answer:
        """See `Backend.run`."""
        import torch

        components = importlib.import_module("obce.kernels.components")
        job = job.as_wide().as_cloud()
        data = torch.as_tensor(job.data)
        if not data.is_cuda and not self._interprets():
            data = data.cuda()
        lengths = _beside(data, job.lengths)
        with torch.cuda.device_of(data):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            deaths, edges = components.clouds_h0(data, lengths)
        if job.want == "r_f":
            return Answer(_last(deaths, lengths), None, self.name, "boruvka")
        return Answer(deaths, edges if job.want == "edges" else None, self.name, "boruvka")

    @staticmethod
    def _interprets() -> bool:
        return os.environ.get("TRITON_INTERPRET") == "1"


def _beside(data: torch.Tensor, lengths: Array | None) -> Any:
    import torch

    return None if lengths is None else torch.as_tensor(lengths, device=data.device)


def merges(edges: Array, n: int) -> tuple[Array, ...]:
    """`reference.forest_merges`, by the compiled engine where it is built.

    Raises:
        ValueError: an end of an edge is no point.
    """
    if edges.size and not 0 <= edges.min() <= edges.max() < n:
        raise ValueError(f"edges has ends from {edges.min()} to {edges.max()}, expected points 0 to {n - 1}.")
    if BACKENDS["cpu"].why_not() is not None:
        return reference.forest_merges(edges, n)
    from obce import _cpu

    edges = np.ascontiguousarray(edges)
    out = np.empty((len(edges), 5), np.int64)
    _cpu.forest_merges(_address(edges), len(edges), n, _address(out))
    return tuple(np.ascontiguousarray(out.T))


BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (CudaBackend(), TritonBackend(), CpuBackend(), ReferenceBackend())
}


@dataclass(frozen=True)
class BackendStatus:
    """A row of the table `obce doctor` prints."""

    name: str
    usable: bool
    reason: str


def backend_table() -> list[BackendStatus]:
    """Every backend, whether it can run here, and why not (or what it runs with).

    Returns:
        One row a backend, in the order of preference.
    """
    rows = []
    for backend in BACKENDS.values():
        reason = backend.why_not()
        rows.append(BackendStatus(backend.name, reason is None, reason or "ready"))
    return rows


def default_threads() -> int:
    """OMP_NUM_THREADS (its first number) when it is set, else the processors this process may use."""
    wish = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if wish.isdigit() and int(wish) > 0:
        return int(wish)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _order(job: Job) -> tuple[str, ...]:
    if job.device == "cpu":
        return ("cpu", "reference")
    if job.sorts:
        return ("cuda", "reference", "cpu")  # reference: torch.sort on the device, no copy
    if job.kind == "cloud" and job.size[1] > PRODUCT_POINTS and job.data.shape[2] >= PRODUCT_COORDINATES:
        return ("triton", "cuda", "cpu", "reference")
    return ("cuda", "triton", "cpu", "reference")


def _named(name: str, source: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}, expected one of {', '.join(BACKENDS)}.")
    return BACKENDS[name]


def run(job: Job, name: str | None) -> Answer:
    """Do a checked job with the named backend, or with the first that can.

    Args:
        job: what to do.
        name: a key of BACKENDS, or None to follow OBCE_BACKEND, or the order for this data when that is unset.

    Raises:
        ValueError: the name is unknown, or the named backend cannot do this job.
        RuntimeError: the named backend cannot run on this machine.
    """
    source = "backend" if name is not None else "the environment variable OBCE_BACKEND"
    name = name if name is not None else os.environ.get("OBCE_BACKEND") or None
    if name is not None:
        backend = _named(name, source)
        reason = backend.why_not()
        if reason is not None:
            raise RuntimeError(f"{source} names {name!r}, which cannot run here: {reason}.")
        reason = backend.refuses(job)
        if reason is not None:
            raise ValueError(f"{source} names {name!r}, which cannot do this: {reason}.")
        return _run(job, backend)

    refused: list[str] = []
    for candidate in _order(job):
        backend = BACKENDS[candidate]
        reason = backend.why_not() or backend.refuses(job)
        if reason is None:
            _tell(job, backend, refused)
            return _run(job, backend)
        refused.append(f"{candidate} refused: {reason}")
    raise ValueError(f"algorithm {job.algorithm!r} is not possible here: {'; '.join(refused)}.")


def _run(job: Job, backend: Backend) -> Answer:
    if job.check is not None and not backend.checks_matrices:
        job.check()
    return backend.run(job)


def _tell(job: Job, backend: Backend, refused: list[str]) -> None:
    message = f"{job.kind} data on {job.device}: backend {backend.name}"
    if refused:
        message += f" ({'; '.join(refused)})"
    if message not in _told:
        _told.add(message)
        _log.log(logging.WARNING if refused else logging.INFO, message)
