"""Where the algorithms on points meet: the measurement behind the tables of `algorithm="auto"` (docs/engine.md).

    python benchmarks/bench_choice.py

Gaussian clouds, one thread. Around each size from which `auto` takes `kdtree` or `boruvka`, the algorithms that meet
there answer the same cloud; the edges must be equal, then each is timed. A row has the size as a multiple of that
border, processor seconds of the fastest of 3 calls, and what `auto` took.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path

import numpy as np
from obce.backends import CpuBackend
from obce.bench import facts
from obce.h0 import h0

AROUND = (0.5, 1.0, 2.0)
REPETITIONS = 3
MOST_POINTS = 200_000  # beyond, a call of the algorithms that look at all pairs takes minutes


def borders(dtype: type) -> list[tuple[int, str, int]]:
    """(d, algorithm, points from which auto takes it)."""
    double = int(dtype is np.float64)
    tree = [(d, "kdtree", sizes[double]) for d, sizes in CpuBackend.TREE_POINTS.items() if d > 1]
    lists = [
        (d, "boruvka", max(CpuBackend.LIST_LEAST[double], CpuBackend.LIST_FACTOR[double] * d**-0.75))
        for d in (8, 16, 32, 64, 128, 384)
    ]
    return [(d, name, round(n)) for d, name, n in [*tree, *lists] if n * 0.5 <= MOST_POINTS and math.isfinite(n)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "choice.csv")
    options = parser.parse_args()
    told, rows = facts(), []
    for dtype in (np.float32, np.float64):
        for d, border, start in borders(dtype):
            for share in AROUND:
                n = round(share * start)
                if n > MOST_POINTS:
                    continue
                cloud = np.random.default_rng(0).standard_normal((n, d), dtype)
                rivals = {"kdtree", "boruvka" if d >= CpuBackend.LIST_COORDINATES else "prim"}
                if border == "boruvka":
                    rivals = {"boruvka", "prim"}
                first = h0(cloud, edges=True, threads=1)
                rivals.add(first.algorithm)
                row = told | {
                    "dtype": dtype.__name__,
                    "d": str(d),
                    "n": str(n),
                    "border": border,
                    "of_border": f"{share:g}",
                    "auto": first.algorithm,
                }
                for name in ("prim", "boruvka", "kdtree"):
                    row[f"{name}_s"] = ""
                    if name not in rivals:
                        continue
                    if not np.array_equal(h0(cloud, edges=True, algorithm=name, threads=1).edges, first.edges):
                        raise AssertionError(f"{name} and {first.algorithm} differ on {n} x {d} {dtype.__name__}")
                    seconds = []
                    for _ in range(REPETITIONS):
                        begin = time.process_time()
                        h0(cloud, algorithm=name, threads=1, check=False)
                        seconds.append(time.process_time() - begin)
                    row[f"{name}_s"] = f"{min(seconds):.4g}"
                rows.append(row)
                print({k: v for k, v in row.items() if k not in told}, flush=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
