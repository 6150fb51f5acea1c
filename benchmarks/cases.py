"""Named clouds for the benchmarks of the engine: the same seed, the same bits on every machine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Case:
    """B clouds of n points with d coordinates.

    Attributes:
        name: as it stands in the CSV.
        kind: "line" (values [B, n]), "cloud" (points [B, n, d]) or "matrix" (distances [B, n, n]).
        B: clouds.
        n: points of each.
        d: coordinates.
        clusters: 0 for Gaussian clouds, else the number of clusters the points fall into.
        quick: part of `--quick`.
    """

    name: str
    kind: str
    B: int
    n: int
    d: int
    clusters: int = 0
    quick: bool = False

    def make(self) -> NDArray[np.float32]:
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
        difference = points[:, :, None, :] - points[:, None, :, :]
        matrix: NDArray[np.float32] = np.sqrt((difference**2).sum(-1))
        return matrix


CASES = (
    Case("neurons of BERT Base, 200 texts", "line", 82_944, 200, 1),
    Case("lines of 512", "line", 1_000, 512, 1, quick=True),
    Case("lines of 2,000", "line", 2_000, 2_000, 1, quick=True),
    Case("lines of 10,000", "line", 500, 10_000, 1),
    Case("clouds 512 x 2", "cloud", 100, 512, 2, quick=True),
    Case("clouds 512 x 8", "cloud", 100, 512, 8, quick=True),
    Case("clouds 1,024 x 64", "cloud", 20, 1_024, 64),
    Case("clouds 2,048 x 16", "cloud", 10, 2_048, 16),
    Case("one cloud 20,000 x 3", "cloud", 1, 20_000, 3),
    Case("one cloud 20,000 x 3 in 20 clusters", "cloud", 1, 20_000, 3, clusters=20),
    Case("one cloud 20,000 x 64", "cloud", 1, 20_000, 64),
    Case("one cloud 20,000 x 8", "cloud", 1, 20_000, 8),
    Case("one cloud 100,000 x 3", "cloud", 1, 100_000, 3),
    Case("one cloud 100,000 x 3 in 20 clusters", "cloud", 1, 100_000, 3, clusters=20),
    Case("one cloud 1,000,000 x 2", "cloud", 1, 1_000_000, 2),
    Case("matrices 512", "matrix", 50, 512, 8, quick=True),
)
