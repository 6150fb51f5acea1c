"""Minimum spanning trees of a batch of clouds: lazy Boruvka rounds over pairwise.py and filter.py.

In a round components take their least outgoing edge in the order (weight, smaller end, larger end). The order is
strict, so the only cycles among the chosen edges are pairs of components that chose the same edge (two trees that
chose each other chose the least edge between them). The smaller label of such a pair stays a root, and its copy of
the edge is dropped. A component whose least edge is not certain waits: the others' edges are edges of the tree all
the same, and it may be joined by them.

Every row has a list (filter.Lists): some points with their weights, ascending, and `beyond`, what all others weigh
at least. Foreign points only become fewer, so a list stays true from round to round. Of a row's list

    near    is the first foreign point, of weight `weight`
    sure    near is the nearest foreign point: it weighs less than beyond, or the list was made of it alone (`certain`)

A component's edge is certain if its least weight among sure rows is less than the `beyond` of all its other rows.
When no component's is, all but the largest of each cloud look again (`Search.certify`): the least weight known of a
component caps what can matter to it, and only rows that can hold less or as much search among all points.

Four launches a round, over [B n] arrays; components of different clouds never meet because labels are global
(cloud * n + point).
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from obce.kernels.filter import MAX_COORDINATES, Filter, Lists, product_holds
from obce.kernels.pairwise import nearest_foreign
from obce.kernels.scaling import scaled, spans, times_power

_LARGEST = torch.iinfo(torch.int64).max

# From here on tensor cores rule out; below, differences of all pairs cost little more than reading a product.
FILTER_COORDINATES = {torch.float32: 16, torch.float64: 8}
FILTER_POINTS = 256
_ROWS = 256  # of a program
_CLOUDS = 65_535  # at a time: blocks of a launch in y


@triton.jit
def _lower(p_least, own, value, m_row, LARGEST: tl.constexpr, BR: tl.constexpr):
    """least[own] = min(least[own], value) where m_row: at once for all that share the first row's component."""
    i_lane = tl.arange(0, BR)
    shared = tl.max(tl.where(i_lane == 0, own, -1), axis=0)
    together = tl.min(tl.where(m_row & (own == shared), value, LARGEST), axis=0)
    value = tl.where(i_lane == 0, together, value)
    m_row = (m_row & (own != shared)) | (i_lane == 0)
    # A value read late is too large: nothing is lost.
    m_row = m_row & (value < tl.load(p_least + own, mask=m_row, other=0))
    tl.atomic_min(p_least + own, value, mask=m_row)


@triton.jit(do_not_specialize=["n", "n_rows"])
def look_kernel(
    p_label,
    p_list_weight,
    p_list_point,
    p_beyond,
    p_certain,
    p_weight,
    p_near,
    p_sure,
    p_least,
    p_threat,
    n,
    n_rows,
    KEPT: tl.constexpr,
    LARGEST: tl.constexpr,
    ROUND: tl.constexpr,
    BR: tl.constexpr,
):
    """weight (+inf for none), near (-1 for none) and sure of every row, module docstring; all [n_rows].

    With ROUND also, at each label, as bits, which are in the order of weights: least, of the weights of sure rows;
    threat, of beyond of the others.
    """
    i_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_row = i_row < n_rows
    own = tl.load(p_label + i_row, mask=m_row, other=0)
    base = i_row // n * n
    beyond = tl.load(p_beyond + i_row, mask=m_row, other=float("inf"))
    certain = tl.load(p_certain + i_row, mask=m_row, other=0)
    weight = tl.full((BR,), float("inf"), beyond.dtype)
    near = tl.full((BR,), -1, tl.int64)
    m_open = m_row
    for t in tl.static_range(KEPT):
        point = tl.load(p_list_point + i_row * KEPT + t, mask=m_open, other=-1)
        m_point = m_open & (point >= 0)
        of = tl.load(p_label + base + point, mask=m_point, other=0)
        m_found = m_point & (of != own)
        weight = tl.where(m_found, tl.load(p_list_weight + i_row * KEPT + t, mask=m_found, other=0.0), weight)
        near = tl.where(m_found, base + point, near)
        m_open = m_open & (of == own) & (point >= 0)
        if t == 0:
            certain = tl.where(m_found, certain, 0)
    sure = (near >= 0) & ((weight < beyond) | (certain != 0))
    tl.store(p_weight + i_row, weight, mask=m_row)
    tl.store(p_near + i_row, near, mask=m_row)
    tl.store(p_sure + i_row, sure.to(tl.int8), mask=m_row)
    if ROUND:
        bits = p_least.dtype.element_ty
        _lower(p_least, own, weight.to(bits, bitcast=True), m_row & sure, LARGEST, BR)
        _lower(p_threat, own, beyond.to(bits, bitcast=True), m_row & (sure == 0), LARGEST, BR)


@triton.jit(do_not_specialize=["n", "n_rows"])
def choose_kernel(p_label, p_weight, p_near, p_sure, p_least, p_threat, p_pair, n, n_rows, BR: tl.constexpr):
    """pair, smaller end * n + larger end, at each label whose least edge is certain; of equal weights the least."""
    i_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_row = i_row < n_rows
    m_row = m_row & (tl.load(p_sure + i_row, mask=m_row, other=0) != 0)
    own = tl.load(p_label + i_row, mask=m_row, other=0)
    least = tl.load(p_least + own, mask=m_row, other=0)
    weight = tl.load(p_weight + i_row, mask=m_row, other=0.0).to(p_least.dtype.element_ty, bitcast=True)
    m_row = m_row & (weight == least) & (least < tl.load(p_threat + own, mask=m_row, other=0))
    base = i_row // n * n
    near = tl.load(p_near + i_row, mask=m_row, other=0)
    pair = (tl.minimum(i_row, near) - base) * n + (tl.maximum(i_row, near) - base)
    tl.atomic_min(p_pair + own, pair, mask=m_row)


@triton.jit(do_not_specialize=["n", "n_rows"])
def join_kernel(
    p_label,
    p_least,
    p_pair,
    p_parent,
    p_count,
    p_edge_cloud,
    p_edge_weight,
    p_edge_pair,
    n,
    n_rows,
    LARGEST: tl.constexpr,
    BR: tl.constexpr,
):
    """parent of every label that chose, the others' own; appends the edges, of which count [1] says the number."""
    i_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_row = i_row < n_rows
    pair = tl.load(p_pair + i_row, mask=m_row, other=LARGEST)
    chose = pair < LARGEST
    base = i_row // n * n
    smaller = tl.load(p_label + base + pair // n, mask=chose, other=0)
    larger = tl.load(p_label + base + pair % n, mask=chose, other=0)
    above = tl.where(smaller == i_row, larger, smaller)
    same = chose & (tl.load(p_pair + above, mask=chose, other=LARGEST) == pair)
    joins = chose & ((same == 0) | (above < i_row))
    tl.store(p_parent + i_row, tl.where(joins, above, i_row), mask=m_row)
    one = joins.to(tl.int32)
    place = tl.atomic_add(p_count, tl.sum(one, axis=0)) + tl.cumsum(one, axis=0) - 1
    weight = tl.load(p_least + i_row, mask=joins, other=0).to(p_edge_weight.dtype.element_ty, bitcast=True)
    tl.store(p_edge_cloud + place, i_row // n, mask=joins)
    tl.store(p_edge_weight + place, weight, mask=joins)
    tl.store(p_edge_pair + place, pair, mask=joins)


@triton.jit(do_not_specialize=["n_rows"])
def flatten_kernel(
    p_label, p_least, p_threat, p_pair, p_parent, n_rows, NONE: tl.constexpr, LARGEST: tl.constexpr, BR: tl.constexpr
):
    """label = root of the label, and least, threat and pair as before the round.

    Paths are halved on the way. Programs write parents that others read: whatever is read is an ancestor, and roots
    are never written.
    """
    i_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_row = i_row < n_rows
    node = tl.load(p_label + i_row, mask=m_row, other=0)
    above = tl.load(p_parent + node, mask=m_row, other=0)
    above = tl.where(m_row, above, node)
    while tl.max((above != node).to(tl.int32), axis=0) > 0:
        m_up = above != node
        next_above = tl.load(p_parent + above, mask=m_up, other=0)
        tl.store(p_parent + node, next_above, mask=m_up)
        node = above
        above = tl.where(m_up, next_above, above)
    tl.store(p_label + i_row, node, mask=m_row)
    none = tl.full((BR,), NONE, p_least.dtype.element_ty)
    tl.store(p_least + i_row, none, mask=m_row)
    tl.store(p_threat + i_row, none, mask=m_row)
    tl.store(p_pair + i_row, tl.full((BR,), LARGEST, tl.int64), mask=m_row)


class Search:
    """Components of a batch of clouds, what their rows know of foreign points, and the edges found.

    Attributes:
        label: [B n] int64, the component of each point, as one of its points.
        lists: what each row knows.
        certain: [B n] int8, 1: the first point of the list, while foreign, is the nearest foreign one.
        weight, near, sure: [B n] as look_kernel leaves them.
        edge_cloud, edge_weight, edge_pair: [B n] of edges, `found` of which are there, in no order.
    """

    def __init__(self, x: torch.Tensor, lengths: torch.Tensor) -> None:
        """Prepare.

        Args:
            x: [B, n, d] contiguous, float32 or float64, scaled, finite.
            lengths: [B] int32, at least 1.
        """
        B, n, d = x.shape
        rows, device = B * n, x.device
        self.x, self.lengths, self.rows = x, lengths, rows
        bits = torch.int32 if x.dtype == torch.float32 else torch.int64
        self.none = (0x7F800000 if bits == torch.int32 else 0x7FF << 52) + 1  # above +inf, which weights can be
        filtered = FILTER_COORDINATES[x.dtype] <= d <= MAX_COORDINATES and n >= FILTER_POINTS
        self.filter = Filter(x, lengths) if filtered and product_holds(device) else None
        self.label = torch.arange(rows, device=device)
        if self.filter is None:
            self.lists = Lists(
                torch.full((rows, 1), torch.inf, dtype=x.dtype, device=device),
                torch.full((rows, 1), -1, dtype=torch.int32, device=device),
                torch.zeros(rows, dtype=x.dtype, device=device),
            )
        else:
            self.lists = self.filter.empty_lists()
            self.filter.list_all(self.lists)
        self.certain = torch.zeros(rows, dtype=torch.int8, device=device)
        self.weight = torch.empty(rows, dtype=x.dtype, device=device)
        self.near = torch.empty(rows, dtype=torch.int64, device=device)
        self.sure = torch.empty(rows, dtype=torch.int8, device=device)
        self._least, self._threat = (torch.full((rows,), self.none, dtype=bits, device=device) for _ in range(2))
        self._pair = torch.full((rows,), _LARGEST, dtype=torch.int64, device=device)
        self._parent = torch.empty_like(self.near)
        self._count = torch.zeros(1, dtype=torch.int64, device=device)
        self.edge_cloud, self.edge_pair = torch.empty_like(self.near), torch.empty_like(self.near)
        self.edge_weight = torch.empty_like(self.weight)

    def grow(self, edges: int) -> None:
        """Find edges until there are so many."""
        found = 0
        stuck = self.filter is None  # lists are empty
        while found < edges:
            if stuck:
                self.certify()
            before, found = found, self.join()
            if stuck and found == before:
                raise RuntimeError(f"no component of {edges - found} missing edges found one.")  # a wrong kernel
            stuck = found == before

    def join(self) -> int:
        """One round: components whose least edge is certain take it. The number of edges found so far."""
        grid = (triton.cdiv(self.rows, _ROWS),)
        n = self.x.shape[1]
        self._look(True)
        choose_kernel[grid](
            self.label,
            self.weight,
            self.near,
            self.sure,
            self._least,
            self._threat,
            self._pair,
            n,
            self.rows,
            BR=_ROWS,
        )
        join_kernel[grid](
            self.label,
            self._least,
            self._pair,
            self._parent,
            self._count,
            self.edge_cloud,
            self.edge_weight,
            self.edge_pair,
            n,
            self.rows,
            LARGEST=_LARGEST,
            BR=_ROWS,
        )
        flatten_kernel[grid](
            self.label,
            self._least,
            self._threat,
            self._pair,
            self._parent,
            self.rows,
            NONE=self.none,
            LARGEST=_LARGEST,
            BR=_ROWS,
        )
        return int(self._count)

    def _look(self, in_round: bool) -> None:
        look_kernel[(triton.cdiv(self.rows, _ROWS),)](
            self.label,
            self.lists.weight,
            self.lists.point,
            self.lists.beyond,
            self.certain,
            self.weight,
            self.near,
            self.sure,
            self._least,
            self._threat,
            self.x.shape[1],
            self.rows,
            KEPT=self.lists.point.shape[1],
            LARGEST=self.none,
            ROUND=in_round,
            BR=_ROWS,
        )

    def certify(self) -> None:
        """Make the least edge certain of every component but the largest of each cloud."""
        B, n, _ = self.x.shape
        device = self.label.device
        row = torch.arange(self.rows, device=device)
        base = torch.div(row, n, rounding_mode="floor") * n
        inside = row - base < self.lengths.repeat_interleave(n, output_size=self.rows)
        size = torch.zeros_like(row).scatter_add_(0, self.label, inside.to(torch.int64))
        largest = size.view(B, n).argmax(1).repeat_interleave(n, output_size=self.rows) + base
        acting = inside & (self.label != largest)
        component = (self.label - base).to(torch.int32).view(B, n)
        low, cap = self._known(acting)
        # A component that knows no foreign point first asks its most promising rows, which caps the rest.
        lost = acting & torch.isinf(cap[self.label]) & (self.near < 0)
        promise = torch.full_like(low, torch.inf)
        promise.scatter_reduce_(0, self.label, torch.where(lost, low, torch.inf), "amin")
        self._search(torch.nonzero(lost & (low == promise[self.label]))[:, 0], component)
        low, cap = self._known(acting)
        self._search(torch.nonzero(acting & (self.near < 0) & (low <= cap[self.label]))[:, 0], component)
        if self.filter is None:
            return
        low, cap = self._known(acting)
        rows = torch.nonzero(acting & (self.sure == 0) & (low <= cap[self.label]))[:, 0]
        if len(rows):
            reach = cap[self.label[rows]]
            weight, index = self.filter.within(rows, component, reach)
            found = weight <= reach
            # Otherwise every foreign point weighs more than the reach.
            self.lists.beyond[rows] = torch.where(
                found, weight, torch.nextafter(reach, torch.full_like(reach, torch.inf))
            )
            self._alone(rows[found], weight[found], index[found])

    def _known(self, acting: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([B n] what no foreign point is below, and at each label of acting rows the least weight these know)."""
        self._look(False)
        low = torch.where(self.sure != 0, self.weight, self.lists.beyond)
        cap = torch.full_like(self.weight, torch.inf)
        return low, cap.scatter_reduce_(0, self.label, torch.where(acting, self.weight, torch.inf), "amin")

    def _alone(self, rows: torch.Tensor, weight: torch.Tensor, index: torch.Tensor) -> None:
        """The nearest foreign point of each of these rows is found."""
        self.lists.weight[rows, 0] = weight
        self.lists.point[rows] = torch.nn.functional.pad(index[:, None], (0, self.lists.point.shape[1] - 1), value=-1)
        self.certain[rows] = 1

    def _search(self, rows: torch.Tensor, component: torch.Tensor) -> None:
        """List the nearest foreign points of each of these rows."""
        if len(rows) == 0:
            return
        if self.filter is None:
            weight, index = nearest_foreign(self.x, component, self.lengths, rows)
            self.lists.beyond[rows] = weight
            self._alone(rows, weight, index)
        else:
            self.filter.list_foreign(self.lists, rows, component)
            self.certain[rows] = 0


def _root(x: torch.Tensor) -> torch.Tensor:
    """Correctly rounded square root. CUDA's is; torch on the host may call a vector library whose root is not."""
    return torch.sqrt(x) if x.is_cuda else torch.as_tensor(np.sqrt(x.numpy()))


def clouds_h0(points: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Deaths and edges of clouds, as obce.reference.clouds_h0.

    Args:
        points: [B, n, d], float32 or float64.
        lengths: [B] integers or None.

    Returns:
        (deaths [B, n - 1], edges [B, n - 1, 2] int64) on the device of points.
    """
    B, n, _ = points.shape
    if B > _CLOUDS:
        rest = [None] * B if lengths is None else lengths.split(_CLOUDS)
        parts = [clouds_h0(*part) for part in zip(points.split(_CLOUDS), rest, strict=False)]
        deaths, edges = (torch.cat(arrays) for arrays in zip(*parts, strict=True))
        return deaths, edges
    device = points.device
    size = torch.full((B,), n, device=device) if lengths is None else lengths.to(torch.int64)
    deaths = torch.full((B, n - 1), torch.nan, dtype=points.dtype, device=device)
    edges = torch.full((B, n - 1, 2), -1, dtype=torch.int64, device=device)
    if B == 0 or n == 1:
        return deaths, edges
    x, exponent = points.contiguous(), None
    if lengths is not None or not spans(x):
        column = torch.arange(n, device=device)
        inside = column < size[:, None]
        x = torch.where(inside[:, :, None], points, 0)
        finite = torch.isfinite(x).all(2).all(1)
        size = torch.where(finite, size, 1)  # a cloud that is not finite has no edges, and its deaths stay NaN
        x, exponent = scaled(torch.where(finite[:, None, None], x, 0))
        x = x.contiguous()
    count = B * (n - 1) if exponent is None else int((size - 1).sum())
    search = Search(x, size.to(torch.int32))
    search.grow(count)

    of, weight, pair = search.edge_cloud[:count], search.edge_weight[:count], search.edge_pair[:count]
    order = torch.argsort(pair)
    for key in (weight, of) if B > 1 else (weight,):  # stable, so the keys sorted by before decide ties
        order = order[torch.argsort(key[order], stable=True)]
    of, weight, pair = of[order], weight[order], pair[order]
    length = weight if points.shape[2] == 1 else _root(weight)
    lo = torch.div(pair, n, rounding_mode="floor")
    ends = torch.stack([lo, pair - lo * n], 1)
    if exponent is None:
        return length.view(B, n - 1), ends.view(B, n - 1, 2)
    first = torch.cumsum(size - 1, 0) - (size - 1)
    place = torch.arange(count, device=device) - first[of]
    deaths[of, place] = times_power(length, exponent[of])
    edges[of, place] = ends
    return deaths, edges
