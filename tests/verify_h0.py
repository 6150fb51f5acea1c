"""Every algorithm, thread count and SIMD level against scipy, the oracle and each other, on many clouds.

    python tests/verify_h0.py --small 100000 --large 200

Of each cloud, in float32 and float64: all answers have the same bits; the deaths are the correctly rounded lengths of
their edges' weights, in the order (weight, smaller index, larger index); they equal scipy's single linkage of the same
numbers in float64. The oracle, which is slow, answers a part of the small clouds.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import numpy as np
import obce
from obce import _cpu, reference
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import pdist

Maker = Callable[[np.random.Generator, int, int], np.ndarray]
KINDS: dict[str, Maker] = {
    "gauss": lambda g, n, d: g.standard_normal((n, d)),
    "clusters": lambda g, n, d: 30 * g.standard_normal((4, d))[g.integers(0, 4, n)] + g.standard_normal((n, d)),
    "lattice": lambda g, n, d: g.integers(0, max(2, round(n ** (1 / d))), (n, d)),
    "duplicates": lambda g, n, d: g.standard_normal((max(1, n // 3), d))[g.integers(0, max(1, n // 3), n)],
    "collinear": lambda g, n, d: g.integers(-40, 41, (n, 1)) * g.integers(-3, 4, d),
    "offset": lambda g, n, d: 1e6 + g.standard_normal((n, d)),
    "scaled": lambda g, n, d: 10.0 ** g.integers(-30, 31) * g.standard_normal((n, d)),
    "rank deficient": lambda g, n, d: g.standard_normal((n, 2)) @ g.standard_normal((2, d)),
    "one point": lambda g, n, d: np.full((n, d), g.standard_normal()),
}
ALGORITHMS = ("auto", "prim", "boruvka", "kdtree")
THREADS = (1, 3)


def same(a: obce.H0, b: obce.H0, what: str) -> None:
    assert np.array_equal(a.deaths, b.deaths), f"{what}: deaths differ"
    assert np.array_equal(a.edges, b.edges), f"{what}: edges differ"


def canonical(cloud: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Deaths [n - 1] of the edges [n - 1, 2] by rule: their weights (obce/reference.py), the rounded root, unscaled."""
    x, exponent = reference.scaled(cloud)
    difference = x[edges[:, 1]] - x[edges[:, 0]]
    if x.shape[1] == 1:
        weight, death = (np.abs(difference[:, 0]),) * 2
    else:
        weight = np.zeros(len(edges), x.dtype)
        with np.errstate(under="ignore"):
            for k in range(x.shape[1]):
                weight = reference._square_add(difference[:, k].copy(), weight)
        death = np.ldexp(np.sqrt(weight), exponent)
    order = np.lexsort((edges[:, 1], edges[:, 0], weight))
    assert np.array_equal(order, np.arange(len(edges))), "the edges are not in the strict order"
    assert (edges[:, 0] < edges[:, 1]).all(), "an edge does not name its smaller end first"
    return death


def against_scipy(cloud: np.ndarray, deaths: np.ndarray) -> None:
    """float64: to 1e-12. float32: to what the rounding of d terms of a square and of its root can change."""
    d = cloud.shape[1]
    wide = cloud.astype(np.float64)
    expected = linkage(pdist(wide), "single")[:, 2]
    if cloud.dtype == np.float64:
        np.testing.assert_allclose(deaths, expected, rtol=1e-12, atol=0)
        return
    # A square below the smallest normal number is off by up to the smallest subnormal one, 2^-149.
    atol = d**0.5 * 2.0 ** (reference.scaled(cloud)[1] - 73)
    np.testing.assert_allclose(deaths.astype(np.float64), expected, rtol=(d / 2 + 4) * 2.0**-24, atol=atol)


def check(batch: np.ndarray, with_oracle: bool) -> int:
    """Checks a batch [B, n, d] by every combination; returns how many answers were compared."""
    wish = os.environ.pop("OBCE_SIMD", None)
    first = obce.h0(batch, edges=True, algorithm="prim", backend="cpu", threads=1)
    answers = 1
    for level in _cpu.simd_levels():
        os.environ["OBCE_SIMD"] = level
        for algorithm in ALGORITHMS:
            for threads in THREADS:
                result = obce.h0(batch, edges=True, algorithm=algorithm, backend="cpu", threads=threads)
                same(result, first, f"{batch.dtype}{batch.shape} {level} {algorithm}, {threads} threads")
                answers += 1
            bare = obce.h0(batch, algorithm=algorithm, backend="cpu")
            assert np.array_equal(bare.deaths, first.deaths), f"{algorithm} without edges: deaths differ"
            answers += 1
    del os.environ["OBCE_SIMD"]
    if wish is not None:
        os.environ["OBCE_SIMD"] = wish
    for cloud, deaths, edges in zip(batch, first.deaths, first.edges, strict=True):
        assert np.array_equal(deaths, canonical(cloud, edges)), f"{batch.dtype}{batch.shape}: a death is not its edge's"
        if len(cloud) > 1:
            against_scipy(cloud, deaths)
    if with_oracle:
        same(first, obce.h0(batch, edges=True, backend="reference"), "oracle")
        answers += 1
    return answers * len(batch)


def small(clouds: int, seed: int = 0, of_the_oracle: float = 0.1) -> tuple[int, int]:
    """Batches of up to 200 clouds of one shape and of all kinds; returns (clouds, answers compared)."""
    g = np.random.default_rng(seed)
    done = answers = 0
    while done < clouds:
        B = min(200, clouds - done)
        n = int(g.choice([1, 2, 3])) if g.random() < 0.15 else int(g.integers(2, 41))
        d = int(g.integers(1, 13)) if g.random() < 0.9 else int(g.choice([16, 17, 33, 64, 300]))
        if g.random() < 0.01:
            n, d = min(n, 12), 2048
        kinds = list(KINDS)
        wide = np.stack([KINDS[kinds[int(g.integers(len(kinds)))]](g, n, d) for _ in range(B)])
        for dtype in (np.float32, np.float64):
            answers += check(wide.astype(dtype), with_oracle=g.random() < of_the_oracle and n * d < 400)
        done += B
    return done, answers


def large(clouds: int, seed: int = 0, budget: float = 4e7) -> tuple[int, int]:
    """Clouds of hundreds to thousands of points, every kind in turn; n n d stays below the budget."""
    g = np.random.default_rng(seed)
    answers = 0
    for number in range(clouds):
        d = int(g.choice([1, 2, 3, 4, 5, 8, 10, 17, 64, 300, 768, 2048]))
        n = int(g.uniform(0.4, 1) * min(4500, (budget / d) ** 0.5))
        wide = list(KINDS.values())[number % len(KINDS)](g, n, d)
        for dtype in (np.float32, np.float64):
            answers += check(wide[None].astype(dtype), with_oracle=False)
    return clouds, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--small", type=int, default=100_000)
    parser.add_argument("--large", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"obce from {obce.__file__}, SIMD levels {', '.join(_cpu.simd_levels())}", flush=True)
    for name, run, clouds in (("small", small, options.small), ("large", large, options.large)):
        begin = time.monotonic()
        done, answers = run(clouds, options.seed)
        seconds = time.monotonic() - begin
        print(f"{done} {name} clouds in two precisions, {answers} answers compared, in {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
