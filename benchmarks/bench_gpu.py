"""The engine on a CUDA device beside its ceilings and its peers; every answer is checked before it is timed.

    python benchmarks/bench_gpu.py                            # all of it, about four minutes on an H100
    python benchmarks/bench_gpu.py --only W1,W3 --out gpu.csv
    python benchmarks/bench_gpu.py --device cpu --quick       # tiny sizes, on any machine: shows that it works

W1: clouds of scalars, r_f and all deaths. W2: many small clouds. W3: one large cloud. W4: given matrices. All through
the public functions with tensors on the device and check=False, except where a case says "checked".

The order within a case: a part of it, whose time predicts the whole; the whole against the CPU engine, bit for bit, on
clouds spread over the batch (one cloud: a part of it in this way, and the whole too, or, where the CPU engine would be
too slow, by lengths, connectedness and nearest neighbours in float64); then the clock; then the peers. What runs out of
memory, is refused or too slow is a row with the sentence. A wrong answer of ours or a failure is one too, and the
program ends with status 1.

`floor_s` is the least time that the ceilings measured on this device allow: the bytes that must be read and written
once (of a symmetric matrix half) at the rate of a large copy, or the fewest operations of a method that looks at all
pairs, 2 d + 5 each, at half the rate of an fp32 product, whose multiply-adds count 2; from 16 coordinates on a product
in bfloat16 may take the coordinates over. `binds` says which it is, `share` is floor_s / p50. A method that rules out
pairs unseen, as trees do, can pass 100 %. `peak_mb` is memory of the device with the data in it.

Axes: B clouds, n points, d coordinates. Times are seconds for the whole case, by CUDA events on a device.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.util
import math
import statistics as stats
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import obce
import torch
from obce import backends
from obce.bench import RTOL, facts

COLUMNS = (
    *("date", "commit", "machine", "versions", "device", "driver", "quick"),
    *("copy_gb_s", "fp32_tflop_s", "tf32_tflop_s", "bf16_tflop_s"),
    *("group", "case", "B", "n", "d", "dtype", "peer", "backend", "algorithm", "status", "reason", "verified"),
    *("repetitions", "p20", "p50", "p80", "peak_mb"),
    *("bytes", "operations", "floor_s", "binds", "share", "gb_s", "ratio"),
)

ROWS = 1_024  # lines that are compared with the CPU engine
ONE_CALL = 12.0  # seconds that one call may be predicted to take
PEER_SECONDS = 1.5  # for one peer in one case
OURS_SECONDS = 1.5
CPU_SECONDS = 4.0  # for the CPU engine's answer to one large cloud
BLOCK = 1 << 28  # numbers in the largest temporary of a peer


class RefusedError(Exception):
    """Why there is no time: (status, sentence)."""


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One set of clouds, standard normal, the same on every run of one device.

    Attributes:
        group: "W1" to "W4".
        B: clouds.
        n: points of each.
        d: coordinates; 0 for given matrices.
        want: "r_f" or "deaths".
        dtype: of the data.
        sample_major: values lie as [n, B].
        check: the public function looks for NaN.
    """

    group: str
    B: int
    n: int
    d: int
    want: str = "deaths"
    dtype: torch.dtype = torch.float32
    sample_major: bool = False
    check: bool = False

    @property
    def name(self) -> str:
        size = {"W1": f"{self.B:,} lines of {self.n:,}", "W4": f"{self.B:,} x {self.n:,}^2 matrices"}
        clouds = f"{self.B:,} clouds {self.n:,} x {self.d}" if self.B > 1 else f"one cloud {self.n:,} x {self.d}"
        marks = [str(self.dtype).removeprefix("torch.")]
        marks += ["sample-major"] * self.sample_major + ["checked"] * self.check
        return f"{self.want}, {size.get(self.group, clouds)}, {', '.join(marks)}"

    def make(self, device: str) -> torch.Tensor:
        """Values [B, n], points [B, n, d] or matrices [B, n, n] on the device."""
        g = torch.Generator(device).manual_seed(20240101)
        if self.group == "W1":
            shape = (self.n, self.B) if self.sample_major else (self.B, self.n)
            values = torch.randn(shape, generator=g, device=device, dtype=self.dtype)
            return values.T if self.sample_major else values
        if self.group != "W4":
            return torch.randn((self.B, self.n, self.d), generator=g, device=device, dtype=self.dtype)
        matrices = torch.empty((self.B, self.n, self.n), device=device)
        step = max(1, BLOCK // self.n**2)
        for at in range(0, self.B, step):
            some = matrices[at : at + step]
            some.uniform_(generator=g)
            some.triu_(1)
            some += some.mT.clone()
        return matrices

    def ours(self, data: torch.Tensor, edges: bool = False, **options: Any) -> tuple[Any, Any]:
        """Deaths [B, n - 1] or r_f [B], and edges or None, by the public function."""
        options = {"check": self.check, **options}
        if self.want == "r_f":
            return obce.r_f(data, **options), None
        edges = edges and self.group != "W1"  # a tree of a line is another, longer job than its gaps
        do: Any = {"W1": obce.h0_line, "W4": obce.h0_distances}.get(self.group, obce.h0)
        result = do(data, edges=edges, **options)
        return result.deaths, result.edges

    @property
    def bytes(self) -> int:
        """The least that is read and written."""
        size = self.dtype.itemsize
        out = 4 * self.B * (1 if self.want == "r_f" else self.n - 1)
        if self.group == "W4":
            return self.B * self.n * (self.n - 1) // 2 * size + out
        return self.B * self.n * self.d * size + out

    @property
    def operations(self) -> int:
        """Issue slots: a subtraction and a multiply-add a coordinate and 5 more a pair; 15 a scalar; 1 an entry."""
        pairs = self.B * self.n * (self.n - 1) // 2
        return {"W1": 15 * self.B * self.n, "W4": pairs}.get(self.group, pairs * (2 * self.d + 5))

    def floor(self, rates: Ceilings) -> tuple[float, str]:
        """Least seconds on a device with these rates, and what binds."""
        slots = rates.fp32 / 2
        bounds = {"bytes": self.bytes / rates.copy, "fp32": self.operations / slots}
        if self.group in ("W2", "W3") and self.d >= 16:
            pairs = self.B * self.n * (self.n - 1) // 2
            parts = {"bf16": 2 * pairs * self.d / rates.bf16, "fp32 beside bf16": 5 * pairs / slots}
            if max(parts.values()) < bounds["fp32"]:
                bounds = {"bytes": bounds["bytes"], **parts}
        binds = max(bounds, key=bounds.__getitem__)
        return bounds[binds], binds


NEURONS = 24 * 9_216  # of BERT Large
FULL = (
    Case("W1", NEURONS, 10_000, 1, "r_f"),
    Case("W1", NEURONS, 10_000, 1, "r_f", check=True),
    Case("W1", NEURONS, 10_000, 1, "r_f", torch.bfloat16),
    Case("W1", NEURONS, 10_000, 1, "r_f", sample_major=True),
    Case("W1", NEURONS, 1_000, 1, "r_f"),
    Case("W1", NEURONS, 10_000, 1),
    Case("W1", NEURONS, 1_000, 1),
    Case("W2", 100_000, 256, 2),
    Case("W2", 100_000, 512, 8),
    Case("W2", 100_000, 1_024, 16),
    Case("W3", 1, 100_000, 3),
    Case("W3", 1, 100_000, 16),
    Case("W3", 1, 100_000, 128),
    Case("W3", 1, 100_000, 1_024),
    Case("W3", 1, 1_000_000, 3),
    Case("W3", 1, 1_000_000, 128),
    Case("W4", 1_000, 1_024, 0),
    Case("W4", 100, 4_096, 0),
    Case("W4", 1, 32_768, 0),
)
QUICK = (
    Case("W1", 40, 100, 1, "r_f"),
    Case("W1", 40, 100, 1, "r_f", check=True),
    Case("W1", 40, 100, 1, "r_f", torch.bfloat16),
    Case("W1", 40, 100, 1, "r_f", sample_major=True),
    Case("W1", 40, 50, 1),
    Case("W2", 20, 24, 2),
    Case("W2", 20, 24, 16),
    Case("W3", 1, 150, 3),
    Case("W3", 1, 150, 20),
    Case("W4", 8, 24, 0),
    Case("W4", 1, 60, 0),
)


# ---- the clock and the ceilings --------------------------------------------------------------------------------------


@dataclass
class Clock:
    """Times calls on one device until the whole run's time is up."""

    device: str
    ends: float

    def once(self, call: Callable[[], Any]) -> float:
        """Seconds of one call, by CUDA events on a device."""
        if self.device == "cpu":
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    def many(self, call: Callable[[], Any], budget: float, most: int = 15, warm: bool = False) -> list[float]:
        """Seconds of repeated calls, after one that warms up; that one alone where it used up the budget."""
        if not warm:
            first = self.once(call)
            if first > budget:
                return [first]
        spent: list[float] = []
        while len(spent) < most and sum(spent) < (budget if len(spent) >= 3 else 2 * budget):
            spent.append(self.once(call))
        return spent

    def refuse_late(self) -> None:
        if time.monotonic() > self.ends:
            raise RefusedError("skipped", "the time of the whole run is up; give it more by --limit, or fewer groups.")


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: bytes/s of a copy (read and written), flop/s of a product."""

    copy: float
    fp32: float
    tf32: float
    bf16: float


def _copy_rate(clock: Clock, size: int) -> float:
    source = torch.zeros(size, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / min(clock.many(lambda: target.copy_(source), 0.5))


def ceilings(clock: Clock, quick: bool) -> Ceilings:
    rate = _copy_rate(clock, 1 << (20 if quick else 31))
    size = 256 if quick else 8_192

    def product(dtype: torch.dtype) -> float:
        a = torch.randn(size, size, device=clock.device).to(dtype)
        return 2 * size**3 / min(clock.many(lambda: a @ a, 0.5))

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        fp32 = product(torch.float32)
        torch.set_float32_matmul_precision("high")
        tf32 = product(torch.float32) if clock.device == "cuda" else math.nan
    finally:
        torch.set_float32_matmul_precision(before)
    return Ceilings(rate, fp32, tf32, product(torch.bfloat16))


# ---- right answers ---------------------------------------------------------------------------------------------------


def oracle(device: torch.device) -> str:
    """Whose answer counts: the CPU engine's, and the oracle's where the CPU engine is what is measured."""
    if device.type != "cuda":
        return "reference"
    why_not = backends.BACKENDS["cpu"].why_not()
    if why_not is not None:
        raise RefusedError("refused", f"nothing to verify against: {why_not}.")
    return "cpu"


def expected(case: Case, data: torch.Tensor) -> tuple[Any, Any]:
    """The right answer to data, on the host."""
    return case.ours(data.cpu(), edges=True, backend=oracle(data.device))


def same(case: Case, found: tuple[Any, Any], right: tuple[Any, Any]) -> None:
    for what, ours, theirs in zip((case.want, "edges"), found, right, strict=True):
        if theirs is not None and not torch.equal(ours.cpu(), theirs):
            raise RefusedError("wrong", f"{what} differ from the right ones.")


def nearest(points: torch.Tensor, deaths: torch.Tensor, edges: torch.Tensor) -> None:
    """A tree of all points, of these lengths, with every sampled point's nearest neighbour; in float64.

    points [n, d], deaths [n - 1], edges [n - 1, 2].
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(points)
    ends = edges.cpu().numpy()
    pieces = connected_components(coo_array((np.ones(n - 1), (ends[:, 0], ends[:, 1])), shape=(n, n)), False)[0]
    if pieces != 1:
        raise RefusedError("wrong", f"the edges leave {pieces} pieces.")
    step = max(1, BLOCK // 8 // points.shape[1])
    for at in range(0, n - 1, step):
        a, b = (points[edges[at : at + step, end]].double() for end in (0, 1))
        if not torch.allclose((a - b).norm(dim=1), deaths[at : at + step].double(), rtol=RTOL, atol=0):
            raise RefusedError("wrong", "the deaths are not the lengths of the edges.")
    shortest = torch.full((n,), torch.inf, dtype=torch.float64, device=points.device)
    for end in (0, 1):
        shortest.scatter_reduce_(0, edges[:, end], deaths.double(), "amin")
    for i in torch.linspace(0, n - 1, 64).long().tolist():
        closest = torch.stack([_closest(points, i, at, step) for at in range(0, n, step)]).min()
        if not torch.allclose(closest, shortest[i], rtol=RTOL, atol=0):
            raise RefusedError("wrong", f"point {i} has a neighbour at {float(closest)} that the tree does not know.")


def _closest(points: torch.Tensor, i: int, at: int, step: int) -> torch.Tensor:
    away = (points[at : at + step].double() - points[i].double()).norm(dim=1)
    if at <= i < at + step:
        away[i - at] = torch.inf
    return away.min()


def part_of(case: Case, data: torch.Tensor, most: int = 0) -> torch.Tensor:
    """Some of the clouds, or some of the points of one."""
    if case.B > 1:
        return data[: max(1, case.B // 32)]
    points = min(case.n, most or (8_192 if case.group == "W4" else 20_000 if case.d < 512 else 10_000))
    return data[:, :points, :points].contiguous() if case.group == "W4" else data[:, :points]


def predict(case: Case, data: torch.Tensor, clock: Clock) -> float:
    """Seconds of the whole from those of a part, as n^2 within a cloud; the part grows while that says too much."""
    part = part_of(case, data)
    while True:
        case.ours(part)
        found = clock.once(lambda some=part: case.ours(some))
        whole = found * (case.B / len(part)) * (case.n / part.shape[1]) ** 2
        if whole <= ONE_CALL or found > 0.2 or case.B > 1 or part.shape[1] == case.n:
            return whole
        part = part_of(case, data, 3 * part.shape[1])


def slower_on_host(case: Case, points: int) -> tuple[float, float]:
    """Time of the CPU engine for one whole cloud over that for some of its points, and the exponent behind it."""
    growth = 1.2 if 0 < case.d <= 8 else 2.0  # trees up to 8 coordinates
    return (case.n / points) ** growth, growth


def verify(case: Case, data: torch.Tensor, clock: Clock) -> tuple[str, torch.Tensor]:
    """How the answer was found right, and the largest death of every cloud [B].

    Refuses a case before one call would take too long.
    """
    who = "the CPU engine" if oracle(data.device) == "cpu" else "the oracle"
    seconds = predict(case, data, clock)
    if seconds > ONE_CALL:
        raise RefusedError("refused", f"one call would take about {seconds:.0f} s, expected up to {ONE_CALL:.0f} s.")
    slow = 0.0
    if case.B == 1:
        part = part_of(case, data)
        begin = time.perf_counter()
        right = expected(case, part)
        slow = (time.perf_counter() - begin) * slower_on_host(case, part.shape[1])[0]
        same(case, case.ours(part, edges=True), right)
        del part, right
    deaths, edges = case.ours(data, edges=True)
    largest = deaths if case.want == "r_f" else deaths[:, -1].clone()
    if edges is not None and not torch.equal(case.ours(data)[0], deaths):
        raise RefusedError("wrong", "deaths without edges differ from those with them.")
    if case.B > 1:
        rows = spread(case)
        same(case, (deaths[rows], None if edges is None else edges[rows]), expected(case, data[rows]))
        return who + (f", {len(rows):,} clouds" if len(rows) < case.B else ""), largest
    if slow <= CPU_SECONDS:
        same(case, (deaths, edges), expected(case, data))
        return who, largest
    if case.group == "W4":
        return f"{who}, a part", largest
    nearest(data[0], deaths[0], edges[0])
    return f"{who}, a part; the whole by lengths, connectedness and nearest neighbours", largest


def spread(case: Case) -> list[int]:
    """Clouds over the whole batch that the CPU engine answers in about a second; of matrices no more than 2 GB."""
    work = case.n * case.n * (case.d or 6)
    most = ROWS if case.group == "W1" else int(3e9 // work)
    k = max(1, min(case.B, most))
    return sorted({round(i) for i in np.linspace(0, case.B - 1, k)})


# ---- peers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a peer is timed with.

    Attributes:
        call: the call.
        factor: from its time to that of the whole case.
        note: what was done instead of the whole; empty: the whole.
        host: the call runs on the host, whose clock counts.
        compare: the call gives r_f [k] or deaths [k, n - 1] of the first k clouds, which can be compared.
    """

    call: Callable[[], Any]
    factor: float = 1.0
    note: str = ""
    host: bool = False
    compare: bool = False


@dataclass(frozen=True)
class Peer:
    """A way to the same numbers: prepare(case, data, clock) -> Job, and the groups it is asked for."""

    name: str
    groups: tuple[str, ...]
    prepare: Callable[[Case, torch.Tensor, Clock], Job]
    package: str = ""

    @property
    def version(self) -> str:
        try:
            return version(self.package) if self.package else ""
        except PackageNotFoundError:
            return ""


def _cpu_engine(case: Case, data: torch.Tensor, clock: Clock) -> Job:
    del clock
    why_not = backends.BACKENDS["cpu"].why_not()
    if why_not is not None:
        raise RefusedError("missing", f"{why_not}.")
    if case.B > 1:
        rows = spread(case)
        some = data[rows].cpu()
        return Job(lambda: case.ours(some, backend="cpu"), case.B / len(rows), _scaled(len(rows), case.B), host=True)
    part = part_of(case, data).cpu()
    begin = time.perf_counter()
    case.ours(part, backend="cpu")
    factor, growth = slower_on_host(case, part.shape[1])
    if (time.perf_counter() - begin) * factor <= 2 * PEER_SECONDS:
        part, factor = data.cpu(), 1.0
    note = f"scaled from {part.shape[1]:,} of {case.n:,} points as n^{growth:g}" if factor > 1 else ""
    return Job(lambda: case.ours(part, backend="cpu"), factor, note, host=True)


def _scaled(some: int, all_: int, what: str = "clouds") -> str:
    return f"scaled from {some:,} of {all_:,} {what}" if some < all_ else ""


def _sort(case: Case, data: torch.Tensor, clock: Clock) -> Job:
    """torch.sort, differences, and their maximum or a second sort."""
    del clock
    step = max(1, BLOCK // 2 // case.n)

    def call() -> torch.Tensor:
        out = []
        for at in range(0, case.B, step):
            gaps = data[at : at + step].sort(dim=1).values.float().diff(dim=1)
            out.append(gaps.amax(1) if case.want == "r_f" else gaps.sort(dim=1).values)
        return torch.cat(out)

    return Job(call, compare=True)


def batched_prim(matrices: torch.Tensor) -> torch.Tensor:
    """Deaths [B, n - 1] of matrices [B, n, n] by n - 1 steps over the whole batch."""
    B, n, _ = matrices.shape
    out = matrices.new_empty((B, n - 1))
    cloud = torch.arange(B, device=matrices.device)
    gone = torch.zeros((B, n), dtype=torch.bool, device=matrices.device)
    at = torch.zeros(B, dtype=torch.int64, device=matrices.device)
    best = matrices.new_full((B, n), torch.inf)
    for k in range(n - 1):
        gone[cloud, at] = True
        best = torch.minimum(best, matrices[cloud, at]).masked_fill_(gone, torch.inf)
        out[:, k], at = best.min(1)
    return out.sort(1).values


def _prim(case: Case, data: torch.Tensor, clock: Clock) -> Job:
    """torch.cdist and batched Prim; for matrices Prim alone. One chunk of clouds stands for all."""
    del clock
    some = data[: max(1, min(case.B, 4 * BLOCK // case.n**2))]

    def call() -> torch.Tensor:
        return batched_prim(some if case.group == "W4" else _distances(some, some))

    return Job(call, case.B / len(some), _scaled(len(some), case.B), compare=True)


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """torch.cdist, by a product where there are many coordinates."""
    mode = "donot_use_mm_for_euclid_dist" if a.shape[-1] <= 16 else "use_mm_for_euclid_dist"
    return torch.cdist(a, b, compute_mode=mode)


def nearest_foreign(
    points: torch.Tensor, label: torch.Tensor, rows: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance to, and index of, the nearest point of another component [n], in tiles; of the first `rows` points."""
    n = len(points)
    rows = n if rows is None else rows
    step = max(1, BLOCK // n)
    best, at = points.new_empty(rows), torch.empty(rows, dtype=torch.int64, device=points.device)
    for i in range(0, rows, step):
        some = slice(i, min(i + step, rows))
        tile = _distances(points[some], points)
        tile.masked_fill_(label[some, None] == label[None], torch.inf)
        best[some], at[some] = tile.min(1)
    return best, at


def boruvka(points: torch.Tensor) -> torch.Tensor:
    """Deaths [n - 1] of points [n, d] by rounds of `nearest_foreign`; n x n never exists."""
    n = len(points)
    index = torch.arange(n, device=points.device)
    label, deaths = index.clone(), []
    for _ in range(n.bit_length()):
        best, at = nearest_foreign(points, label)
        least = best.new_full((n,), torch.inf).scatter_reduce(0, label, best, "amin")
        first = torch.where(best == least[label], index, n)
        chosen = torch.full((n,), n, device=points.device).scatter_reduce(0, label, first, "amin")
        component = index[chosen < n]
        row = chosen[component]
        parent = index.clone()
        parent[component] = label[at[row]]
        both = (parent[parent[component]] == component) & (component < parent[component])
        parent[component[both]] = component[both]
        deaths.append(best[row[~both]])
        for _ in range(n.bit_length()):
            parent = parent[parent]
        label = parent[label]
        if sum(map(len, deaths)) >= n - 1:
            break
    return torch.cat(deaths).sort().values


def _tiles(case: Case, data: torch.Tensor, clock: Clock) -> Job:
    """Boruvka on tiles of torch.cdist, each reduced at once; where that is too slow, a part of its first round."""
    points = data[0]
    label = torch.arange(case.n, device=points.device)
    rows = min(case.n, max(1, BLOCK // case.n))
    nearest_foreign(points, label, rows)
    one = clock.once(lambda: nearest_foreign(points, label, rows)) * case.n / rows
    if one * 6 <= 2 * PEER_SECONDS:
        return Job(lambda: boruvka(points)[None], compare=True)
    note = ", ".join(["one round of several", *filter(None, [_scaled(rows, case.n, "rows")])])
    return Job(lambda: nearest_foreign(points, label, rows), case.n / rows, note)


def _cuml(case: Case, data: torch.Tensor, clock: Clock) -> Job:
    del clock
    from cuml.cluster import AgglomerativeClustering

    kind = "pairwise" if case.n <= 50_000 else "knn"  # the second is not exact
    model = AgglomerativeClustering(n_clusters=1, metric="euclidean", linkage="single", connectivity=kind)
    points = data[0]
    return Job(lambda: model.fit(points), note=f"single linkage, connectivity {kind}, not compared")


def _cuvs(case: Case, data: torch.Tensor, clock: Clock) -> Job:
    """The lists behind its single linkage: 16 exact neighbours a point, without the tree."""
    del clock
    from cuvs.neighbors import brute_force

    del case
    points = data[0]

    def call() -> Any:
        return brute_force.search(brute_force.build(points, metric="sqeuclidean"), points, 16)

    return Job(call, note="16 nearest neighbours alone, no tree")


def _ripser(case: Case, data: torch.Tensor, clock: Clock) -> Job:
    del clock
    from ripser import ripser

    if case.n > 4_096:
        raise RefusedError("refused", f"not asked above 4,096 points, found {case.n:,}: it lists all pairs.")
    rows = min(case.B, 2)
    clouds = data[:rows].float().cpu().numpy()
    if case.group == "W1":
        clouds = clouds[:, :, None]
    given = case.group == "W4"

    def call() -> Any:
        return [ripser(cloud, maxdim=0, distance_matrix=given) for cloud in clouds]

    return Job(call, case.B / rows, _scaled(rows, case.B), host=True)


PEERS = (
    Peer("obce on the CPU", ("W1", "W2", "W3", "W4"), _cpu_engine),
    Peer("torch.sort", ("W1",), _sort),
    Peer("torch.cdist, batched Prim", ("W2", "W4"), _prim),
    Peer("torch.cdist tiles, Boruvka", ("W3",), _tiles),
    Peer("cuml", ("W3",), _cuml, "cuml"),
    Peer("cuvs", ("W3",), _cuvs, "cuvs"),
    Peer("ripser", ("W1", "W2", "W4"), _ripser, "ripser"),
)


def agrees(case: Case, job: Job, largest: torch.Tensor) -> None:
    """A peer's largest deaths are ours, up to the rounding of its distances."""
    found = job.call()
    found = found if case.want == "r_f" else found[:, -1]
    if not torch.allclose(found.float(), largest[: len(found)].float(), rtol=1e-2, atol=0):
        raise RefusedError("wrong", "its largest deaths are others.")


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One run's common columns, rates and file."""

    clock: Clock
    rates: Ceilings
    common: dict[str, str]
    out: Path
    bad: list[str] = field(default_factory=list)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row and tell it."""
        row = dict.fromkeys(COLUMNS, "") | self.common | row
        self.out.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.out.exists()
        with self.out.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        line = f"  {row['peer']:27}"
        if row["status"] == "ok":
            line += f"{float(row['p50']) * 1e3:12.3f} ms"
            line += f"  {row['share']:>7} of {row['binds']}" if row["share"] else f"  x {row['ratio']:>7}"
        notes = [str(row[name]) for name in ("algorithm", "reason", "verified") if row[name]]
        print(line, "" if row["status"] == "ok" else f"{row['status']}:", "; ".join(notes), flush=True)


@contextmanager
def answered() -> Iterator[list[tuple[str, str]]]:
    """Backend and algorithm of each call inside the `with`, which r_f alone does not tell."""
    told: list[tuple[str, str]] = []
    run = backends.run

    def noted(*arguments: Any, **named: Any) -> Any:
        answer = run(*arguments, **named)
        told.append((answer.backend, answer.algorithm))
        return answer

    backends.run = noted
    try:
        yield told
    finally:
        backends.run = run


def _times(spent: list[float], factor: float) -> dict[str, Any]:
    low, middle, high = (factor * float(np.quantile(spent, q)) for q in (0.2, 0.5, 0.8))
    return {"repetitions": len(spent), "p20": f"{low:.4g}", "p50": f"{middle:.4g}", "p80": f"{high:.4g}"}


@contextmanager
def refusals(row: dict[str, Any]) -> Iterator[None]:
    """What is raised inside becomes the row's status and sentence."""
    try:
        yield
    except Exception as error:  # Triton's derive from nothing else; and one case must not end the others
        if isinstance(error, RefusedError):
            row["status"], row["reason"] = error.args
        elif isinstance(error, torch.OutOfMemoryError | MemoryError):
            row["status"], row["reason"] = "out of memory", _sentence(error)
        elif isinstance(error, ValueError | TypeError):
            row["status"], row["reason"] = "refused", _sentence(error)
        else:
            row["status"], row["reason"] = "failed", _sentence(error)
        error.__traceback__ = None  # its frames hold the data, and from Python 3.12 on something holds it in turn
    with suppress(RuntimeError):  # what broke the device is told already
        torch.cuda.empty_cache()


def _sentence(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]


def measure(run: Run, case: Case) -> None:
    """One case: verified, timed, and beside its peers."""
    clock = run.clock
    gc.collect()  # peak_mb shall count no data of earlier cases
    print(f"\n{case.group}: {case.name}", flush=True)
    about = {"group": case.group, "case": case.name, "B": case.B, "n": case.n, "d": case.d or ""}
    about["dtype"] = str(case.dtype).removeprefix("torch.")
    row = {**about, "peer": "obce", "status": "ok"}
    data = largest = None
    with refusals(row):
        clock.refuse_late()
        data = case.make(clock.device)
        row["verified"], largest = verify(case, data, clock)
        if clock.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with answered() as told:
            spent = clock.many(lambda: case.ours(data), OURS_SECONDS, warm=True)
        row["backend"], row["algorithm"] = told[-1] if told else ("", "")
        if clock.device == "cuda":
            row["peak_mb"] = round(torch.cuda.max_memory_allocated() / 1e6)
        floor, binds = case.floor(run.rates)
        row |= _times(spent, 1.0) | {"bytes": case.bytes, "operations": case.operations, "binds": binds}
        middle = stats.median(spent)
        row |= {"floor_s": f"{floor:.4g}", "share": f"{floor / middle:.1%}", "gb_s": f"{case.bytes / middle / 1e9:.1f}"}
    run.write(row)
    if row["status"] in ("wrong", "failed"):
        run.bad.append(f"{case.name}: {row['status']}, {row['reason']}")
    if data is None:
        return
    for peer in PEERS:
        if case.group not in peer.groups or case.check:  # the same peers stand beside the case without the check
            continue
        beside = {**about, "peer": f"{peer.name} {peer.version}".strip(), "status": "ok"}
        with refusals(beside):
            clock.refuse_late()
            if peer.package and importlib.util.find_spec(peer.package) is None:
                raise RefusedError("missing", f"{peer.package} is not installed.")
            job = peer.prepare(case, data, clock)
            warm = job.compare and largest is not None
            if warm:
                agrees(case, job, largest)
            spent = (Clock("cpu", clock.ends) if job.host else clock).many(job.call, PEER_SECONDS, 7, warm)
            beside |= _times(spent, job.factor) | {"reason": job.note}
            if row.get("p50"):
                beside["ratio"] = f"{float(beside['p50']) / float(row['p50']):.3g}"
            del job
        run.write(beside)


def about_machine(device: str) -> dict[str, str]:
    """Versions, device and driver beside the facts of every benchmark."""
    common = facts()
    parts = [f"torch {torch.__version__}"]
    try:
        parts.append(f"triton {version('triton')}")
    except PackageNotFoundError:
        parts.append("no triton")
    parts.append(f"cuda {torch.version.cuda}" if torch.version.cuda else "no cuda")
    common["versions"] = ", ".join([common["versions"], *parts])
    common["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    if device == "cuda":
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")
            common["driver"] = found[0].strip()
        except (OSError, subprocess.SubprocessError):
            common["driver"] = "unknown"
    return common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything works, not how fast")
    parser.add_argument("--only", default="W1,W2,W3,W4", help="groups, for example W1,W3")
    parser.add_argument("--limit", type=float, default=225.0, help="seconds after which nothing new is begun")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.csv")
    options = parser.parse_args()
    groups = options.only.upper().split(",")
    unknown = sorted(set(groups) - {case.group for case in FULL})
    if unknown:
        parser.error(f"--only is {options.only!r}, expected some of W1, W2, W3, W4")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch sees no CUDA device here")
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu needs --quick: the sizes are those of a CUDA device")
    if options.out.exists():
        with options.out.open(newline="", encoding="utf-8") as file:
            if tuple(next(csv.reader(file), ())) != COLUMNS:
                parser.error(f"{options.out} has columns of another program or version; give --out a new file")

    clock = Clock(options.device, time.monotonic() + options.limit)
    rates = ceilings(clock, options.quick)
    common = about_machine(options.device) | {"quick": str(options.quick), "copy_gb_s": f"{rates.copy / 1e9:.1f}"}
    for name in ("fp32", "tf32", "bf16"):
        rate = getattr(rates, name)
        common[f"{name}_tflop_s"] = "" if math.isnan(rate) else f"{rate / 1e12:.4g}"
    print(f"{common['device']}; {common['machine']}; {common['versions']}; commit {common['commit']}")
    print(", ".join(f"{name} {common[name]}" for name in COLUMNS if name in common and name.endswith("_s")))
    run = Run(clock, rates, common, options.out)
    for case in QUICK if options.quick else FULL:
        if case.group in groups:
            measure(run, case)
    if run.bad:
        sys.exit("\n".join(run.bad))


if __name__ == "__main__":
    main()
