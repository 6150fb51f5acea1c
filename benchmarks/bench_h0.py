"""Times the engine beside ripser, scipy and numpy: first the answers must agree, then the clock runs.

    python benchmarks/bench_h0.py [--quick] [--threads 1] [--csv FILE]

A tool that is slow is timed on the first clouds of a case and its time scaled to all of them; the column `clouds`
says how many it did. Every row carries machine, versions and commit.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from obce import backends, reference
from obce.h0 import h0, h0_distances, h0_line, r_f
from scipy.cluster.hierarchy import linkage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial import Delaunay
from scipy.spatial.distance import squareform

from cases import CASES, Case

Tool = Callable[[Any], Any]  # data of some clouds -> their largest deaths [B], or their deaths [B, n - 1]

COLUMNS = (
    *("date", "commit", "machine", "threads", "versions", "case", "B", "n", "d", "tool", "clouds"),
    *("seconds", "low", "high", "ns_per_value", "ratio"),
)
VERIFIED_POINTS = 2_000  # above it Kruskal over all pairs would not fit; the reference grows the tree by Prim
MATRIX_POINTS = 20_000  # above it no tool gets n x n numbers, and the answer is verified on the first points of a cloud
SLOW_POINTS = 8_000_000  # pairs of points a slow tool is given per repetition


def by_delaunay(x: Any) -> Any:
    """Deaths of clouds in the plane or in space: the spanning tree lies in the Delaunay triangulation."""
    rows = []
    for cloud in x.astype(np.float64):
        simplices = Delaunay(cloud).simplices
        ends = np.concatenate([simplices[:, pair] for pair in combinations(range(simplices.shape[1]), 2)])
        ends = np.unique(np.sort(ends, 1), axis=0)
        lengths = np.sqrt(((cloud[ends[:, 0]] - cloud[ends[:, 1]]) ** 2).sum(1))
        graph = coo_array((lengths, (ends[:, 0], ends[:, 1])), shape=(len(cloud), len(cloud)))
        rows.append(np.sort(minimum_spanning_tree(graph.tocsr()).data))
    return np.stack(rows)


def tools(case: Case, threads: int) -> dict[str, Tool]:
    """Ours first, then the peers that can do this case."""
    ours: dict[str, Tool]
    peers: dict[str, Tool] = {}
    if case.kind == "line":
        ours = {
            "obce r_f": lambda x: r_f(x, threads=threads),
            "obce deaths": lambda x: h0_line(x, threads=threads).deaths,
        }
        peers = {
            "numpy sort+diff+max": lambda x: np.diff(np.sort(x, 1), axis=1).max(1),
            "numpy sort+diff+sort": lambda x: np.sort(np.diff(np.sort(x, 1), axis=1), 1),
            "scipy linkage": lambda x: np.stack([linkage(c[:, None], "single")[:, 2] for c in x]),
        }
    elif case.kind == "cloud":
        ours = {
            "obce deaths": lambda x: h0(x, threads=threads).deaths,
            "obce edges": lambda x: h0(x, threads=threads, edges=True).deaths,
        }
        if case.n > MATRIX_POINTS:
            peers = {"scipy Delaunay+mst": by_delaunay} if case.d <= 3 else {}
        else:
            peers = {"scipy linkage": lambda x: np.stack([linkage(c, "single")[:, 2] for c in x])}
    else:
        ours = {"obce deaths": lambda x: h0_distances(x, threads=threads).deaths}
        peers = {"scipy linkage": lambda x: np.stack([linkage(squareform(c, checks=False), "single")[:, 2] for c in x])}
    if importlib.util.find_spec("ripser") is not None and case.n <= 2_048:
        from ripser import ripser

        def by_ripser(x: Any) -> Any:
            clouds = x[:, :, None] if case.kind == "line" else x
            diagrams = [ripser(c, maxdim=0, distance_matrix=case.kind == "matrix")["dgms"][0] for c in clouds]
            return np.stack([np.sort(diagram[np.isfinite(diagram[:, 1]), 1])[-1] for diagram in diagrams])

        peers["ripser"] = by_ripser
    return ours | peers


def verify(case: Case, data: Any, tool: Tool, name: str) -> None:
    """The first clouds against the reference; ours bit for bit, others to float32 rounding."""
    some = data[: max(1, min(len(data), VERIFIED_POINTS // case.n)), :MATRIX_POINTS]
    if case.kind == "line":
        expected = reference.lines_deaths(some)
    elif case.kind == "cloud":
        expected = reference.clouds_h0(some)[0]
    else:
        expected = reference.matrices_h0(some)[0]
    got = np.asarray(tool(some))
    expected = expected[:, -1] if got.ndim == 1 else expected
    if name.startswith("obce"):
        assert (got == expected).all(), f"{name} is not the reference on {case.name}"
    else:
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6, err_msg=f"{name} on {case.name}")


def measure(tool: Tool, data: Any, repeats: int) -> list[float]:
    """Seconds of each repetition; the first, uncounted one warms caches."""
    seconds = []
    for repetition in range(repeats + 1):
        start = time.perf_counter()
        tool(data)
        if repetition:
            seconds.append(time.perf_counter() - start)
    return sorted(seconds)


def clouds_for(case: Case, name: str) -> int:
    """How many clouds of a case a tool is given."""
    if name.startswith(("obce", "numpy")):
        return case.B
    slow = 20 if name == "ripser" else 1
    return max(1, min(case.B, SLOW_POINTS // (slow * case.n * case.n)))


def facts(threads: int) -> dict[str, Any]:
    """What every row carries."""
    root = Path(__file__).parents[1]
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    level = "no engine"
    if backends.BACKENDS["cpu"].why_not() is None:
        from obce import _cpu

        level = _cpu.simd_level()
    versions = [f"python {platform.python_version()}"]
    for package in ("obce", "numpy", "scipy", "ripser"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} -")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": commit,
        "machine": f"{processor}, {os.cpu_count()} processors, {level}",
        "threads": threads,
        "versions": ", ".join(versions),
    }


def main() -> None:
    """Verify, time, print, and write the CSV."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small cases, three repetitions")
    parser.add_argument("--threads", type=int, default=1, help="host threads of the engine (default 1, as its peers)")
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    parser.add_argument("--case", help="only cases whose name contains this")
    wish = parser.parse_args()
    common = facts(wish.threads)
    print(f"{common['machine']}; {common['versions']}; commit {common['commit']}; {wish.threads} threads")
    rows = []
    for case in CASES:
        if (wish.quick and not case.quick) or (wish.case and wish.case not in case.name):
            continue
        data = case.make()
        print(f"\n{case.name}: {case.B} x {case.n} x {case.d}")
        base = None
        for name, tool in tools(case, wish.threads).items():
            verify(case, data, tool, name)
            count = clouds_for(case, name)
            seconds = measure(tool, data[:count], 3 if wish.quick or name == "scipy Delaunay+mst" else 7)
            low, middle, high = (s * case.B / count for s in (seconds[0], statistics.median(seconds), seconds[-1]))
            base = base or middle
            row = common | {
                "case": case.name,
                "B": case.B,
                "n": case.n,
                "d": case.d,
                "tool": name,
                "clouds": count,
                "seconds": f"{middle:.3g}",
                "low": f"{low:.3g}",
                "high": f"{high:.3g}",
                "ns_per_value": f"{1e9 * middle / (case.B * case.n * case.d):.3g}",
                "ratio": f"{middle / base:.3g}",
            }
            rows.append(row)
            print(f"  {name:22} {middle:10.4g} s   {row['ns_per_value']:>8} ns a value   x {row['ratio']}")
    if wish.csv:
        new = not wish.csv.exists()
        with wish.csv.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows(rows)
        print(f"\n{len(rows)} rows appended to {wish.csv}")


if __name__ == "__main__":
    sys.exit(main())
