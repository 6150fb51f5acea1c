"""Minimum spanning trees of a batch of clouds: lazy Boruvka rounds over pairwise.py and filter.py.

Each round every component takes its least outgoing edge in the order (weight, smaller end, larger end). The order
is strict, so the only cycles among the chosen edges are pairs of components that chose the same edge (two trees
that chose each other chose the least edge between them). The smaller label of such a pair stays a root, and its
copy of the edge is dropped. At most ceil(log2 n) rounds.

Foreign points only become fewer, so of what a row knows the following stays true from round to round:

    low    no foreign point weighs less
    near   one foreign point, of weight `weight`, until its component becomes the row's own
    sure   near is the nearest, in the order (weight, index), as long as it is foreign

The least weight of a component's foreign points caps what can matter to it: rows with low above the cap are left
alone. Of the others those without a foreign `near` search again, and those that are not sure then look for points
that weigh at most the cap. Afterwards every row that can hold the component's least edge is sure of it.

Everything but the distances is torch on [B n] arrays; components of different clouds never meet because labels are
global (cloud * n + point).
"""

from __future__ import annotations

import numpy as np
import torch
from obce.kernels.filter import MAX_COORDINATES, Filter, product_holds
from obce.kernels.pairwise import nearest_foreign
from obce.kernels.scaling import scaled, times_power

_LARGEST = torch.iinfo(torch.int64).max

# From here on tensor cores rule out; below, differences of all pairs cost little more than reading a product.
FILTER_COORDINATES = {torch.float32: 16, torch.float64: 8}
FILTER_POINTS = 256


class Search:
    """What the rows of a batch know of their nearest foreign points.

    Attributes:
        low, weight: [B n] in the dtype of x; weight is +inf where near is not foreign.
        near: [B n] int64, cloud * n + point.
        has: [B n] bool, near is foreign.
        sure: [B n] bool.
    """

    def __init__(self, x: torch.Tensor, lengths: torch.Tensor) -> None:
        """Prepare.

        Args:
            x: [B, n, d] contiguous, float32 or float64, scaled, finite, 0 beyond lengths.
            lengths: [B] int32, at least 1.
        """
        B, n, d = x.shape
        self.x, self.lengths = x, lengths
        filtered = FILTER_COORDINATES[x.dtype] <= d <= MAX_COORDINATES and n >= FILTER_POINTS
        self.filter = Filter(x, lengths) if filtered and product_holds(x.device) else None
        self.low = torch.zeros(B * n, dtype=x.dtype, device=x.device)
        self.weight = torch.full_like(self.low, torch.inf)
        self.near = torch.zeros(B * n, dtype=torch.int64, device=x.device)
        self.has = torch.zeros(B * n, dtype=torch.bool, device=x.device)
        self.sure = torch.zeros_like(self.has)

    def least(self, label: torch.Tensor, open_rows: torch.Tensor) -> torch.Tensor:
        """Make sure of every row that can hold the least edge of its component.

        Args:
            label: [B n] int64, the component of each point, as one of its points.
            open_rows: [B n] bool, points inside clouds that have more than one component.

        Returns:
            [B n]: at each component's label the least weight of its outgoing edges. The rows with `has` whose weight
            is that are sure.
        """
        n = self.x.shape[1]
        self.has &= open_rows & (label[self.near] != label)
        self.sure &= self.has
        self.weight = torch.where(self.has, self.weight, torch.inf)
        base = torch.div(torch.arange(len(label), device=label.device), n, rounding_mode="floor") * n
        component = (label - base).to(torch.int32).view(self.x.shape[:2])
        # A component that knows no foreign point first asks its most promising rows, which caps the rest.
        stale = open_rows & ~self.has
        known = torch.zeros_like(self.has).index_fill_(0, label[self.has], True)
        lost = stale & ~known[label]
        promise = torch.full_like(self.low, torch.inf).scatter_reduce_(0, label[lost], self.low[lost], "amin")
        self._search(torch.nonzero(lost & (self.low == promise[label]))[:, 0], component, base)
        cap = self._cap(label)
        self._search(torch.nonzero(open_rows & ~self.has & (self.low <= cap[label]))[:, 0], component, base)
        if self.filter is not None:
            cap = self._cap(label)
            rows = torch.nonzero(open_rows & ~self.sure & (self.low <= cap[label]))[:, 0]
            if len(rows):
                reach = cap[label[rows]]
                weight, index = self.filter.within(rows, component, reach)
                found = weight <= reach
                self.low[rows] = torch.where(found, weight, torch.maximum(self.low[rows], reach))
                at, weight, index = rows[found], weight[found], index[found]
                self.weight[at] = weight
                self.near[at] = base[at] + index
                self.has[at] = True
                self.sure[at] = True
        return self._cap(label)

    def _cap(self, label: torch.Tensor) -> torch.Tensor:
        """At each component's label the least weight its rows know; +inf where they know none."""
        least = torch.full_like(self.weight, torch.inf)
        return least.scatter_reduce_(0, label[self.has], self.weight[self.has], "amin")

    def _search(self, rows: torch.Tensor, component: torch.Tensor, base: torch.Tensor) -> None:
        """Give each of these rows a foreign point; base [B n] is its cloud's first point."""
        if len(rows) == 0:
            return
        if self.filter is None:
            weight, index = nearest_foreign(self.x, component, self.lengths, rows)
            below = weight
            self.sure[rows] = True
        else:
            weight, index, below = self.filter.nearest(rows, component)
            self.sure[rows] = weight < below
        self.low[rows] = torch.minimum(weight, below)
        self.weight[rows] = weight
        self.near[rows] = base[rows] + index
        self.has[rows] = True


def _root(x: torch.Tensor) -> torch.Tensor:
    """Correctly rounded square root. CUDA's is; torch on the host may call a vector library whose root is not."""
    return torch.sqrt(x) if x.is_cuda else torch.as_tensor(np.sqrt(x.numpy()))


def _flatten(parent: torch.Tensor) -> torch.Tensor:
    """Root of every node by pointer jumping; parent has no cycle but roots."""
    while True:
        above = parent[parent]
        if torch.equal(above, parent):
            return parent
        parent = above


def clouds_h0(points: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Deaths and edges of clouds, as obce.reference.clouds_h0.

    Args:
        points: [B, n, d], float32 or float64.
        lengths: [B] integers or None.

    Returns:
        (deaths [B, n - 1], edges [B, n - 1, 2] int64) on the device of points.
    """
    B, n, _ = points.shape
    device = points.device
    size = torch.full((B,), n, device=device) if lengths is None else lengths.to(torch.int64)
    deaths = torch.full((B, n - 1), torch.nan, dtype=points.dtype, device=device)
    edges = torch.full((B, n - 1, 2), -1, dtype=torch.int64, device=device)
    if B == 0 or n == 1:
        return deaths, edges
    column = torch.arange(n, device=device)
    inside = column < size[:, None]
    x = torch.where(inside[:, :, None], points, 0)
    finite = torch.isfinite(x).all(2).all(1)
    size = torch.where(finite, size, 1)  # a cloud that is not finite has no edges, and its deaths stay NaN
    inside = (column < size[:, None]).view(-1)
    x, exponent = scaled(torch.where(finite[:, None, None], x, 0))
    x = x.contiguous()

    cloud = torch.arange(B, device=device)[:, None].expand(B, n).reshape(-1)  # [B n]
    point = column.expand(B, n).reshape(-1)
    label = cloud * n + point
    search = Search(x, size.to(torch.int32))
    found = []
    missing = size - 1
    while True:
        open_rows = inside & (missing > 0)[cloud]
        if not bool(open_rows.any()):
            break
        least = search.least(label, open_rows)
        row = torch.nonzero(search.has & (search.weight == least[label]))[:, 0]
        here, near = point[row], point[search.near[row]]
        pair = torch.minimum(here, near) * n + torch.maximum(here, near)
        chosen = torch.full_like(label, _LARGEST).scatter_reduce(0, label[row], pair, "amin")
        root = torch.nonzero(chosen < _LARGEST)[:, 0]
        lo = torch.div(chosen[root], n, rounding_mode="floor")
        hi = chosen[root] - lo * n
        base = cloud[root] * n
        at_lo, at_hi = label[base + lo], label[base + hi]
        parent = torch.arange(B * n, device=device)
        parent[root] = torch.where(at_lo == root, at_hi, at_lo)
        stays = (parent[parent[root]] == root) & (root < parent[root])
        parent[root[stays]] = root[stays]
        joins = ~stays
        found.append((cloud[root][joins], least[root][joins], chosen[root][joins]))
        missing = missing - torch.bincount(cloud[root][joins], minlength=B)
        label = _flatten(parent)[label]

    if found:
        of, weight, pair = (torch.cat(part) for part in zip(*found, strict=True))
        order = torch.argsort(pair)
        for key in (weight, of):  # stable, so the keys sorted by before decide ties
            order = order[torch.argsort(key[order], stable=True)]
        of, weight, pair = of[order], weight[order], pair[order]
        first = torch.cumsum(size - 1, 0) - (size - 1)
        place = torch.arange(len(of), device=device) - first[of]
        length = weight if points.shape[2] == 1 else _root(weight)
        deaths[of, place] = times_power(length, exponent[of])
        lo = torch.div(pair, n, rounding_mode="floor")
        edges[of, place] = torch.stack([lo, pair - lo * n], 1)
    return deaths, edges
