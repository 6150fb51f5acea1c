"""Which neurons stay: a plan is data, made before anything is cut.

Removing neurons by percentile of their score, inside each site of each layer (OBCE, arXiv 2312.10702). The paper
gives the levels (30, 50 and 70 %) but neither the rule that assigns a level to a layer nor the Linears that are
cut; what stands here is our reading (docs/method.md).

What can be cut without changing the width of the residual stream (`UNITS`):

- `query_key`: query and key in pairs inside a head; the attention product sums over the pairs (where positions turn
  query and key, over two of them together);
- `value`, with the column of `attention_output` that reads it;
- `intermediate`, with the column of `output` that reads it;
- `heads`: query, key and value of a head, with the columns of `attention_output` that read it;
- `attention_output` and `output`: rows of the Linears that write the residual stream; what a removed row wrote
  becomes a constant.

Whole layers go before any of these. Query/key and value lose the same number in every head of a layer, so that
heads stay rectangular.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from obce.clouds import CLOUD_KINDS, CLOUD_SCORES
from obce.scores import SCORE_NAMES, Scores

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from transformers import PreTrainedModel

Of = Literal["total", "encoder"]

# Share removed in the layers whose median r_f is in the low, middle and high third of all layers.
# OBCE 2023 names the percentiles 30, 50 and 70; PBCE 2025 (Applied Sciences 15:390) quartiles. The assignment
# by thirds is our reading: layers that vary least lose most.
PRESETS: dict[str, tuple[float, float, float]] = {
    "obce-2023": (0.70, 0.50, 0.30),
    "pbce-2025": (0.75, 0.50, 0.25),
}

UNITS = ("query_key", "value", "heads", "intermediate", "attention_output", "output")
"""What one step of a plan can remove."""

DEFAULT_UNITS = ("query_key", "value", "intermediate")

# Sites that a unit cuts, where their names differ from it.
_KINDS = {"query_key": ("query", "key"), "heads": ("query", "key", "value")}


def default_units(architecture: Mapping[str, Any]) -> tuple[str, ...]:
    """What a plan removes if nothing else is said.

    `DEFAULT_UNITS`, but no query and key where they stay whole, and of a site map's family what the map names.
    """
    whole, named = str(architecture.get("whole", "")).split(", "), architecture.get("kinds")

    def known(kind: str) -> bool:
        return kind not in whole and (named is None or kind in str(named).split())

    return tuple(unit for unit in DEFAULT_UNITS if all(map(known, _KINDS.get(unit, (unit,)))))


def check_units(architecture: Mapping[str, Any], units: Sequence[str]) -> None:
    """Refuses units that a family's layers cannot lose.

    Raises:
        ValueError: There is one.
    """
    family = architecture.get("model_type")
    if "heads" in units and family == "mpnet":
        raise ValueError(
            "units holds heads, but all layers of an MPNet share the position biases of its heads: cut other units, "
            "such as query_key and value"
        )
    held = [unit for unit in ("query_key", "heads") if unit in units]
    if held and architecture.get("whole"):
        raise ValueError(
            f"units holds {held[0]}, but obce leaves query, key and heads of a {family} whole, as positions turn them "
            "and several heads may share one of key: cut other units, such as value and intermediate"
        )


class Curves(dict[str, list[tuple[float, float]]]):
    """What each part of a model can spare: `"3.value"` -> [(share removed, what is lost by it), ...].

    Each from (0, 0) on, by ascending shares.

    Attributes:
        how: `"estimated"` or `"measured"`, how `obce.sensitivity` found them.

    Raises:
        ValueError: A point is not a share and a finite loss, or shares do not ascend.
    """

    def __init__(
        self, points: Mapping[str, Sequence[tuple[float, float]]], how: Literal["estimated", "measured"] = "measured"
    ) -> None:
        super().__init__({name: [_point(name, point) for point in curve] for name, curve in points.items()})
        self.how = how
        for name, curve in self.items():
            for (before, _), (share, _) in pairwise(curve):
                if share <= before:
                    raise ValueError(f"sensitivity's {name} has {share:g} after {before:g}, expected ascending shares")


def _point(name: str, point: Any) -> tuple[float, float]:
    try:
        share, loss = map(float, point)
    except (TypeError, ValueError):
        share, loss = math.nan, math.nan
    if not (0 <= share <= 1 and math.isfinite(loss)):
        raise ValueError(f"sensitivity's {name} holds {point!r}, expected a share in [0, 1] and a finite loss")
    return share, loss


# Length in tokens of the one text that FLOPs are stated for.
FLOPS_LENGTH = 128

_FORMAT = "obce-plan"
_FORMAT_VERSION = 2


class Size(NamedTuple):
    """What a model weighs.

    Attributes:
        parameters: All distinct parameters, heads and embeddings included.
        encoder: Parameters of the encoder layers alone.
        flops: Floating-point operations (a multiply-add is two) of the matrix products of the base model
            (encoder and, if there is one, pooler) on one text of `FLOPS_LENGTH` tokens, or on one picture.
        bytes: Bytes of all distinct parameters in their own dtype: the data of the safetensors file, which holds
            8 bytes more for every row kept of a site of attention_output or output that loses some.
    """

    parameters: int
    encoder: int
    flops: int
    bytes: int


class Widths(NamedTuple):
    """Neurons of one layer, by the sites that can be cut.

    Attributes:
        query_key: Width of query, and of key (less where query heads share one of key).
        value: Width of value.
        intermediate: Width of intermediate.
        attention_output: Rows of attention_output that are computed.
        output: Rows of output that are computed.
    """

    query_key: int
    value: int
    intermediate: int
    attention_output: int
    output: int


@dataclass(frozen=True)
class Plan:
    """Kept neurons of every site that loses some, and the size that follows.

    Attributes:
        model_hash: Hash of the model that was scored; `prune` refuses any other.
        architecture: Facts of that model.
        corpus_hash: Hash of the corpus it was scored on.
        score: Score that ranks the neurons.
        preset: Name of the preset, or None.
        keep: Share of parameters asked for, or None when the preset's levels are taken as they are.
        of: What `keep` is a share of.
        seed: Seed of the `random` score.
        floor: Least share of a site that stays.
        levels: Layer number (as text) -> share of its neurons that the level removes, before rounding (with shares
            by `obce.sensitivity`, of its parameters that may go, after it); 1 for a layer that is dropped.
        kept: Site name -> ascending kept indices; a site that is absent is kept whole, unless its layer is dropped.
            A head of which nothing is kept in query, key and value is gone.
        before: Size of the dense model.
        after: Predicted size of the pruned model, exact.
        layers_dropped: Numbers of the dense model's layers that go, ascending.
        units: What a step removed, of `UNITS`.
        head_score: Score of the heads' clouds that ranks heads, or None for the sum over their neurons.
        shares: How sites share the loss: `"uniform"`, `"preset"`, or `"estimated"` or `"measured"` (by
            `obce.sensitivity`).
    """

    model_hash: str
    architecture: dict[str, Any]
    corpus_hash: str
    score: str
    preset: str | None
    keep: float | None
    of: Of
    seed: int
    floor: float
    levels: dict[str, float]
    kept: dict[str, tuple[int, ...]]
    before: Size
    after: Size
    layers_dropped: tuple[int, ...] = ()
    units: tuple[str, ...] = DEFAULT_UNITS
    head_score: str | None = None
    shares: str = "uniform"

    def indices(self, site: str, width: int) -> Sequence[int]:
        """Ascending indices of the neurons that stay, of the `width` of a site, `"3.value"`."""
        gone = int(site.partition(".")[0]) in self.layers_dropped
        return () if gone else self.kept.get(site, range(width))

    @property
    def kept_share(self) -> float:
        """Predicted share of parameters kept, of `of`."""
        if self.of == "total":
            return self.after.parameters / self.before.parameters
        return self.after.encoder / self.before.encoder

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `Plan.from_dict` reads it back."""
        plain = asdict(self)
        plain["before"], plain["after"] = self.before._asdict(), self.after._asdict()
        plain["kept"] = {name: list(indices) for name, indices in self.kept.items()}
        plain["layers_dropped"], plain["units"] = list(self.layers_dropped), list(self.units)
        return {"format": _FORMAT, "format_version": _FORMAT_VERSION, **plain}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Plan:
        """Reads what `to_dict` wrote.

        Raises:
            ValueError: It is not a plan, or of a newer format.
        """
        if not isinstance(plain, Mapping) or plain.get("format") != _FORMAT:
            raise ValueError("plan is not a plan of obce: expected the JSON object that `obce plan` writes")
        if plain.get("format_version") != _FORMAT_VERSION:
            raise ValueError(
                f"plan has format version {plain.get('format_version')}, but this version reads {_FORMAT_VERSION}: "
                "make the plan again"
            )
        fields = {k: v for k, v in plain.items() if k not in ("format", "format_version")}
        try:
            fields["kept"] = {name: tuple(int(i) for i in kept) for name, kept in fields["kept"].items()}
            fields["layers_dropped"] = tuple(int(layer) for layer in fields["layers_dropped"])
            fields["units"] = tuple(str(unit) for unit in fields["units"])
            fields["before"], fields["after"] = Size(**fields["before"]), Size(**fields["after"])
            return cls(**fields)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"plan is damaged ({error}): make the plan again") from error


class _Shape(NamedTuple):
    """Parameters of a layer beside its columns, which count one a row that reads them.

    Attributes:
        attention_row: Of a row of query, key or value, with its bias.
        groups: Query heads that share a head of key and value, so that a neuron of value has so many columns.
        intermediate_rows: Of the rows of an intermediate neuron, with their biases.
        rest: Of each layer's LayerNorms and of the biases of attention_output and output.
        added: Of biases that a pruned layer has there and a dense one has not.
    """

    attention_row: int
    groups: int
    intermediate_rows: int
    rest: tuple[int, ...]
    added: int


def _shape(architecture: Mapping[str, Any]) -> _Shape:
    """As the architecture says, or as BERT's."""
    hidden = int(architecture["hidden_size"])
    attention, inner = (int(architecture.get(f"{name}_bias", 1)) for name in ("attention", "intermediate"))
    norms = int(architecture.get("norms", 4 * hidden))
    each = [int(architecture.get("first_norms", norms))] + [norms] * (int(architecture["num_hidden_layers"]) - 1)
    biases = hidden * (attention + inner)
    return _Shape(
        attention_row=hidden + int(architecture.get("value_bias", attention)),
        groups=int(architecture.get("groups", 1)),
        intermediate_rows=int(architecture.get("intermediate_rows", 1)) * (hidden + inner),
        rest=tuple(one + biases for one in each),
        added=int(architecture.get("added_biases", 2 * hidden - biases)),
    )


class _Group:
    """Neurons of one layer that are cut together: the same count in every head, or whole heads.

    `order[p]` lists the ranked members of part p, lowest score first; a step removes the next one of every part.
    A member is a neuron, or several that go together: those of a head, or the two of a rotary pair.
    """

    def __init__(
        self,
        layer: int,
        unit: str,
        scores: NDArray[np.float64],
        ranked: NDArray[np.bool_],
        *,
        parts: int = 1,
        neurons: NDArray[np.int64] | None = None,
        floor: float,
        multiple: int = 1,
    ) -> None:
        # [members, neurons of one]
        self.neurons = np.arange(len(scores))[:, None] if neurons is None else neurons
        self.layer, self.members = layer, len(scores)
        self.name = f"{layer}.{unit}"
        self.kinds = _KINDS.get(unit, (unit,))
        per_part = self.members // parts
        self.order = []
        for part in range(parts):
            ids = np.arange(part * per_part, (part + 1) * per_part)
            ids = ids[ranked[ids]]
            # stable: equal scores keep the order of their indices, lower index removed first
            self.order.append(ids[np.argsort(scores[ids], kind="stable")])
        lost = parts * self.neurons.shape[1]
        self.step = Widths(
            query_key=lost if unit in ("query_key", "heads") else 0,
            value=lost if unit in ("value", "heads") else 0,
            intermediate=lost if unit == "intermediate" else 0,
            attention_output=lost if unit == "attention_output" else 0,
            output=lost if unit == "output" else 0,
        )
        candidates = min(len(ids) for ids in self.order)
        # a model can do without any head of a layer; whoever gives a floor wants some of every site
        least = max(0 if unit == "heads" and floor == 0 else 1, math.ceil(floor * per_part))
        self.ranked = candidates
        self.per_part = per_part
        # members of a part that stay come in multiples of this
        self.multiple = 1 if unit == "heads" else max(1, multiple // self.neurons.shape[1])
        self.most = self.reached(max(0, min(candidates, per_part - least)))

    def reached(self, steps: int) -> int:
        """The most steps, up to these, that leave a width which is allowed; none leave the dense width."""
        stay = math.ceil((self.per_part - steps) / self.multiple) * self.multiple
        return max(0, self.per_part - stay)

    def ahead(self, steps: int) -> int:
        """Steps from here to the next width that is allowed; 0 where there is none."""
        stay = (self.per_part - steps - 1) // self.multiple * self.multiple
        return self.per_part - stay - steps if self.per_part - stay <= self.most else 0

    def cost(self, shape: _Shape, now: Widths) -> int:
        """Parameters that the next step removes from a layer of these widths; 0 where no weight is left to go."""
        step = self.step
        return (
            2 * step.query_key * shape.attention_row
            + step.value * (shape.attention_row + shape.groups * now.attention_output)
            + step.intermediate * (shape.intermediate_rows + now.output)
            + step.attention_output * shape.groups * now.value
            + step.output * now.intermediate
        )

    def kept(self, steps: int) -> tuple[int, ...]:
        gone = {int(i) for ids in self.order for member in ids[:steps] for i in self.neurons[member]}
        return tuple(i for i in range(self.neurons.size) if i not in gone)


def _check_known(scores: Scores, units: Sequence[str], head_score: str | None) -> None:
    known = scores.kinds()
    for unit in units:
        missing = [kind for kind in _KINDS.get(unit, (unit,)) if kind not in known]
        if missing:
            raise ValueError(
                f"units holds {unit}, but the scores hold no neurons of {missing[0]}, as the site map has no key "
                f"'sites.{missing[0]}': name it there and score again, or leave {unit} out"
            )


def _groups(
    scores: Scores,
    column: NDArray[np.float64],
    ranked: NDArray[np.bool_],
    layers: Sequence[int],
    *,
    units: Sequence[str],
    head_score: str | None,
    floor: float,
    multiple: int = 1,
) -> list[_Group]:
    _check_known(scores, units, head_score)
    heads = int(scores.meta["architecture"]["num_attention_heads"])
    hidden = int(scores.meta["architecture"]["hidden_size"])
    rotary = bool(scores.meta["architecture"].get("rotary", 0))
    groups = []
    for layer in layers:
        for unit in units:
            if unit == "query_key":
                pair, both = _pairs(scores, column, ranked, layer)
                turned = None
                if rotary:
                    turned = np.arange(hidden).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1, 2)
                    pair, both = pair[turned].sum(axis=1), np.all(both[turned], axis=1)
                groups.append(
                    _Group(layer, unit, pair, both, parts=heads, neurons=turned, floor=floor, multiple=multiple)
                )
            elif unit == "heads":
                if head_score is None:
                    head, known = _heads_by_neurons(scores, column, ranked, layer, heads)
                else:
                    head, known = _heads_by_clouds(scores, head_score, layer, heads)
                whole = np.arange(hidden).reshape(heads, -1)
                groups.append(_Group(layer, unit, head, known, neurons=whole, floor=floor))
            else:
                rows = scores.rows(layer, unit)
                parts = heads // int(scores.meta["architecture"].get("groups", 1)) if unit == "value" else 1
                groups.append(
                    _Group(layer, unit, column[rows], ranked[rows], parts=parts, floor=floor, multiple=multiple)
                )
    return groups


# Members' scores and which of them are ranked. Ranks are summed, not values, because sites differ in scale.
_Ranking: TypeAlias = "tuple[NDArray[np.float64], NDArray[np.bool_]]"


def _pairs(scores: Scores, column: NDArray[np.float64], ranked: NDArray[np.bool_], layer: int) -> _Ranking:
    from scipy.stats import rankdata

    query, key = scores.rows(layer, "query"), scores.rows(layer, "key")
    both = ranked[query] & ranked[key]
    # A pair is as good as its two halves together.
    pair = np.zeros(len(both))
    pair[both] = rankdata(column[query][both]) + rankdata(column[key][both])
    return pair, both


def _heads_by_neurons(
    scores: Scores, column: NDArray[np.float64], ranked: NDArray[np.bool_], layer: int, heads: int
) -> _Ranking:
    from scipy.stats import rankdata

    total, known = np.zeros(heads), np.ones(heads, bool)
    for kind in ("query", "key", "value"):
        rows = scores.rows(layer, kind)
        here = ranked[rows]
        ranks = np.zeros(len(here))
        ranks[here] = rankdata(column[rows][here])
        total += ranks.reshape(heads, -1).sum(axis=1)
        # a head with nothing to rank in one of its sites is no better known than a constant neuron
        known &= here.reshape(heads, -1).any(axis=1)
    return total, known


def _heads_by_clouds(scores: Scores, score: str, layer: int, heads: int) -> _Ranking:
    from scipy.stats import rankdata

    clouds = scores.clouds
    if clouds is None:
        raise ValueError(
            f"head_score is {score!r}, but the scores have no clouds: score again with cloud_texts above 0, or leave "
            "head_score out"
        )
    total, known = np.zeros(heads), np.zeros(heads)
    for kind in ("query", "key", "value", "context"):
        rows = (clouds.layer == layer) & (clouds.kind == CLOUD_KINDS.index(kind)) & ~clouds.constant
        if rows.any():
            # as shares of the heads ranked, so that a kind with constant clouds weighs no less
            total[clouds.head[rows]] += rankdata(clouds.columns[score][rows]) / np.count_nonzero(rows)
            known[clouds.head[rows]] += 1
    ranked = known > 0
    return np.where(ranked, total / np.maximum(known, 1), 0.0), ranked


def _dropped(scores: Scores, column: NDArray[np.float64], ranked: NDArray[np.bool_], count: int) -> tuple[int, ...]:
    """The layers whose neurons' scores add up to least; those that are not ranked count 0."""
    layers = scores.layers()
    if count >= len(layers):
        raise ValueError(f"drop_layers is {count}, but the model has {len(layers)} layers and at least one must stay")
    counted = np.where(ranked, column, 0.0)
    sums = [float(counted[scores.layer == layer].sum()) for layer in layers]
    return tuple(sorted(layers[i] for i in np.argsort(sums, kind="stable")[:count]))


def _levels(scores: Scores, layers: Sequence[int], preset: str | None) -> dict[int, float]:
    """Layer -> share removed, before it is scaled to a budget, among the layers that stay."""
    if preset is None:
        return dict.fromkeys(layers, 1.0)
    rf = scores.column("rf")
    medians = []
    for layer in layers:
        here = (scores.layer == layer) & ~scores.constant
        medians.append(float(np.median(rf[here])) if here.any() else 0.0)
    rank = np.argsort(np.argsort(medians, kind="stable"), kind="stable")
    return {layer: PRESETS[preset][int(rank[i]) * 3 // len(layers)] for i, layer in enumerate(layers)}


def flops(architecture: Mapping[str, Any], widths: Mapping[int, Widths], length: int | None = None) -> int:
    """Floating-point operations of a base model's matrix products on one text, or one picture.

    Args:
        architecture: Facts of the dense model (`obce.sites.architecture`).
        widths: Layer -> its widths, for every layer that stays.
        length: Tokens of the text, T (default: `FLOPS_LENGTH`, or those of a picture).

    Returns:
        Sum over layers of 2 T (h (2 q + v + i) + a v + o i) for the Linears, of which attention_output computes a
        rows and output o rows, and 2 T^2 (q + v) for the two attention products (where g query heads share a head of
        key and value: h (q + q / g + v), a v g and q + v g), plus 2 h^2 for a pooler, 2 T h e for a
        Linear between embeddings of e numbers and the layers, and in each layer 4 D h q + 2 T D q p for p products with
        D embeddings of distances; an intermediate neuron of two rows counts h i twice; a multiply-add counts as two. Of
        pictures also 2 (T - 1) h n for patches of n numbers; a pooler has outputs of its own number. Of a model that a
        site map describes, the Linears alone that the map names.
    """
    hidden = int(architecture["hidden_size"])
    mapped = "site_map" in architecture
    tokens = int(architecture.get("tokens", FLOPS_LENGTH))
    length = tokens if length is None else length
    total = 2 * hidden * int(architecture.get("pooler_size", hidden)) if architecture["pooler"] and not mapped else 0
    total += 2 * (tokens - 1) * hidden * int(architecture.get("patch_numbers", 0))
    total += 2 * length * hidden * int(architecture.get("embedding_size", 0))
    rows, groups = int(architecture.get("intermediate_rows", 1)), int(architecture.get("groups", 1))
    for one in widths.values():
        query_key, context = one.query_key + one.query_key // groups, one.value * groups
        total += 2 * length * hidden * (query_key + one.value + rows * one.intermediate)
        total += 2 * length * (one.attention_output * context + one.output * one.intermediate)
        # a mapped model's attention sees as many numbers as before
        total += 0 if mapped else 2 * length * length * (one.query_key + context)
        distances = int(architecture.get("distances", 0))
        products = int(architecture.get("distance_products", 0))
        total += 2 * distances * one.query_key * (2 * hidden + length * products)
    return total


def _dense_widths(architecture: Mapping[str, Any]) -> Widths:
    hidden = int(architecture["hidden_size"])
    attention = int(architecture.get("attention_size", hidden))
    value = attention // int(architecture.get("groups", 1))
    whole = Widths(attention, value, int(architecture["intermediate_size"]), hidden, hidden)
    if "kinds" not in architecture:
        return whole
    # of what no site map names nothing goes, and nothing is counted
    known = str(architecture["kinds"]).split()
    return Widths(*(n if {"query_key": "query"}.get(kind, kind) in known else 0 for kind, n in whole._asdict().items()))


def _widths(
    architecture: Mapping[str, Any], layers: Sequence[int], groups: list[_Group], steps: list[int]
) -> dict[int, Widths]:
    widths = dict.fromkeys(layers, _dense_widths(architecture))
    for group, n in zip(groups, steps, strict=True):
        widths[group.layer] = _less(widths[group.layer], group.step, n)
    return widths


def _less(widths: Widths, step: Widths, times: int = 1) -> Widths:
    return Widths(*(width - times * lost for width, lost in zip(widths, step, strict=True)))


def _layer_parameters(shape: _Shape, layer: int, widths: Widths) -> int:
    """Parameters of a layer; its full-width biases hold the constants, and its LayerNorms stay whole."""
    q, v, i, a, o = widths
    rows, context = q + q // shape.groups + v, shape.groups * v
    return rows * shape.attention_row + i * shape.intermediate_rows + a * context + o * i + shape.rest[layer]


def _size(architecture: Mapping[str, Any], widths: Mapping[int, Widths], *, pruned: bool = True) -> Size:
    shape, dense = _shape(architecture), _dense_widths(architecture)
    removed = sum(_layer_parameters(shape, layer, dense) for layer in range(len(shape.rest)))
    removed -= sum(_layer_parameters(shape, layer, one) + pruned * shape.added for layer, one in widths.items())
    return Size(
        parameters=int(architecture["parameters"]) - removed,
        encoder=int(architecture["encoder_parameters"]) - removed,
        flops=flops(architecture, widths),
        bytes=int(architecture["weight_bytes"]) - removed * int(architecture["encoder_element_bytes"]),
    )


def _due_by_level(groups: list[_Group], levels: Mapping[int, float]) -> list[tuple[float, int]]:
    """When the steps of each group are due, if levels grow together.

    Step k of a group with c ranked members a part is due when the common scale of all levels reaches k / (c * level).
    Taking steps in that order is the preset, scaled.
    """
    return sorted(
        (k / (group.ranked * levels[group.layer]), g)
        for g, group in enumerate(groups)
        for k in range(1, group.most + 1)
    )


def _due_by_loss(
    groups: list[_Group], curves: Curves, shape: _Shape, dense: Mapping[int, Widths]
) -> list[tuple[float, int]]:
    """When the steps of each group are due, if each is taken where it costs least a parameter.

    The lower convex hull of a group's curve is followed: of a curve that falls off a cliff, what lies before it is
    spread over the way there, since steps of one group can only be taken in order.
    """
    due: list[tuple[float, int]] = []
    for g, group in enumerate(groups):
        curve = curves.get(group.name)
        if curve is None or not group.most:
            if group.most:
                raise ValueError(f"sensitivity has no {group.name}, but the plan may cut it: measure it, too")
            continue
        # in steps; loss cannot fall, and beyond the last point it goes on as before
        points = [(0.0, 0.0)]
        for share, loss in curve:
            if share > 0:
                points.append((share * group.ranked, max(points[-1][1], float(loss))))
        if len(points) == 1:
            raise ValueError(f"sensitivity's {group.name} holds no share above 0, expected one: measure it, too")
        hull = [points[0]]
        while hull[-1] != points[-1]:
            at = points.index(hull[-1])
            hull.append(min(points[at + 1 :], key=lambda p: ((p[1] - hull[-1][1]) / (p[0] - hull[-1][0]), -p[0])))
        cost = group.cost(shape, dense[group.layer])
        for k in range(1, group.most + 1):
            at = next((i for i in range(1, len(hull)) if k <= hull[i][0]), len(hull) - 1)
            (left, below), (right, above) = hull[at - 1], hull[at]
            due.append(((above - below) / (right - left) / cost, g))
    return sorted(due)


def _fill_budget(
    architecture: Mapping[str, Any], groups: list[_Group], due: Sequence[tuple[float, int]], excess: int
) -> tuple[list[int], int]:
    """Steps of each group until `excess` parameters are gone, in the order they are due.

    Where widths come in multiples, the steps to the next one are taken together when the middle one of them is due. A
    step too big for what is left is passed over, so that single neurons fill the rest. A step that removes no parameter
    (rows of attention_output in a layer without heads) is never taken.

    Returns:
        Steps of each group, and parameters still in excess: more than 0 only when nothing is left to take.
    """
    shape = _shape(architecture)
    steps, seen = [0] * len(groups), [0] * len(groups)
    dense = _dense_widths(architecture)
    widths = {group.layer: dense for group in groups}
    smallest = min((group.ahead(0) * group.cost(shape, dense) for group in groups if group.most), default=0)
    passed: set[int] = set()
    for _, g in due:
        if excess <= 0:
            break
        group = groups[g]
        seen[g] += 1
        count = group.ahead(steps[g])
        if g in passed or not count or seen[g] < steps[g] + (count + 1) // 2:
            continue
        cost = count * group.cost(shape, widths[group.layer])
        if cost > max(excess, smallest):
            # what is left only shrinks, and what a step costs hardly does
            passed.add(g)
        elif cost:
            steps[g] += count
            excess -= cost
            widths[group.layer] = _less(widths[group.layer], group.step, count)
    while excess > 0:
        # near the floor, when the small steps are used up and only whole-head steps are left
        counts = [group.ahead(n) for group, n in zip(groups, steps, strict=True)]
        costs = [n * group.cost(shape, widths[group.layer]) for group, n in zip(groups, counts, strict=True)]
        open_groups = [(cost, g) for g, cost in enumerate(costs) if cost]
        if not open_groups:
            break
        cost, g = min(open_groups)
        steps[g] += counts[g]
        excess -= cost
        widths[groups[g].layer] = _less(widths[groups[g].layer], groups[g].step, counts[g])
    return steps, excess


def plan(
    scores: Scores,
    model: PreTrainedModel | None = None,
    *,
    keep: float | None = None,
    of: Of = "total",
    preset: str | None = None,
    score: str | Callable[[Scores], ArrayLike] = "effect",
    floor: float = 1 / 16,
    seed: int | None = None,
    keep_constant: bool = False,
    units: Sequence[str] | None = None,
    head_score: str | None = None,
    drop_layers: int = 0,
    multiple: int = 1,
    sensitivity: Curves | Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Plan:
    """Chooses the neurons, heads and layers that stay.

    Inside a site (for query/key and value: inside each head; for heads: inside the layer) the lowest scores go first,
    ties by index. Neurons that the score does not rank stay, unless their head or layer goes: those that it is
    undefined for and, for a score of the outputs at [CLS], those that are constant there.

    Args:
        scores: Scores of the model.
        model: The model, if at hand: checked to be the one that was scored.
        keep: Share of parameters to keep, in (0, 1]. Met from below, to within one neuron (one head, where heads
            are the smallest unit), unless the dropped layers alone undercut it: then nothing else is cut.
        of: `"total"` (all parameters, embeddings and heads included) or `"encoder"` (the layers alone).
        preset: `"obce-2023"` or `"pbce-2025"`: a layer's level follows the rank of its median r_f. With `keep`,
            the levels are scaled together until the budget is met; without, they are taken as they are.
            None: every layer loses the same share. Dropped layers have no part in it.
        score: Score that ranks the neurons inside a site: a name, or a function that makes [N] values of the scores,
            high for what is to stay, NaN for what is not to be ranked.
        floor: Least share of each site that stays (at least one neuron a head), and of the heads of each layer (at
            least one, but none if floor is 0), in [0, 1].
        seed: For `score="random"`: draw anew with this seed instead of taking the scores' own column.
        keep_constant: Keep neurons that are constant at [CLS] whatever the score, as those of [CLS] do: plans by
            different scores then have the same widths.
        units: What may be removed, of `UNITS` (default: `default_units`). `"heads"` excludes `"query_key"` and
            `"value"`.
        head_score: What ranks heads. None: the sum of the ranks of their neurons in query, key and value, each
            inside its site; a head needs a neuron that is not constant in each. Or a score of their clouds, `"rf"`,
            `"total_persistence"` or `"entropy"`: the mean over the head's query, key, value and context of its rank
            among the layer's heads; clouds that are constant are left out.
        drop_layers: Layers to remove whole before anything else: those with the lowest sum of scores over all their
            neurons, constant and undefined ones counting 0. With neither `keep` nor `preset` nothing else is cut.
        multiple: What is left of a site that is cut (for query/key and value: of each head) is a multiple of this many
            neurons. The matrix units of GPUs want 8; the budget is then met to within so many.
        sensitivity: What every layer and unit can spare (`obce.sensitivity`): with `keep`, each step is taken where
            it costs least a parameter, instead of the same share everywhere.

    Raises:
        ValueError: An argument is out of range, the model is another one, none of `keep`, `preset` and `drop_layers`
            is given, `sensitivity` lacks a part or comes without `keep` or with `preset`, the scores have no clouds for
            `head_score`, or the budget cannot be met above the floor (the message names the smallest share that can).
        TypeError: `keep` or `floor` is not a number, or `drop_layers` or `multiple` not an integer.
    """
    architecture = scores.meta["architecture"]
    units = default_units(architecture) if units is None else units
    check_request(
        keep=keep,
        of=of,
        preset=preset,
        score=None,  # the scores know best which columns they hold
        floor=floor,
        units=units,
        head_score=head_score,
        drop_layers=drop_layers,
        multiple=multiple,
    )
    if sensitivity is not None and not isinstance(sensitivity, Curves):
        sensitivity = Curves(sensitivity)
    keep, floor = None if keep is None else float(keep), float(floor)
    if sensitivity is not None and (keep is None or preset is not None):
        raise ValueError("sensitivity is given, which spends the budget keep by itself: give keep, and no preset")
    if model is not None:
        _check_model(scores, model)

    if callable(score):
        name = getattr(score, "__name__", "own").strip("<>")
        scores = scores.with_column(name, score(scores))
        score = name
    column, ranked = scores.column(score), scores.ranked(score)
    if keep_constant:
        ranked &= ~scores.constant
    own_seed = int(scores.meta["seed"])
    if score == "random" and seed is not None:
        column = np.random.default_rng(seed).random(len(scores))
    check_units(architecture, units)
    if drop_layers and "site_map" in architecture:
        raise ValueError(
            f"drop_layers is {drop_layers}, but a site map does not say what a layer is besides its Linears: leave it "
            "out"
        )
    dropped = _dropped(scores, column, ranked, drop_layers)
    layers = [layer for layer in scores.layers() if layer not in dropped]
    levels = _levels(scores, layers, preset)
    used = tuple(unit for unit in UNITS if unit in units)
    groups = _groups(scores, column, ranked, layers, units=used, head_score=head_score, floor=floor, multiple=multiple)

    if keep is not None:
        steps, levels = _spent(architecture, layers, groups, levels, keep, of, floor, sensitivity)
    elif preset is not None:
        # 0.7 of 90 is 62.999... in binary
        asked = [int(levels[group.layer] * group.ranked + 1e-9) for group in groups]
        steps = [group.reached(min(group.most, n)) for group, n in zip(groups, asked, strict=True)]
    else:
        steps, levels = [0] * len(groups), dict.fromkeys(layers, 0.0)

    widths = _widths(architecture, layers, groups, steps)
    # Rows of attention_output were worth their cost until the last head of their layer went.
    for g, group in enumerate(groups):
        if group.kinds == ("attention_output",) and not widths[group.layer].value:
            steps[g] = 0
    kept = {
        f"{group.layer}.{kind}": group.kept(n)
        for group, n in zip(groups, steps, strict=True)
        if n
        for kind in group.kinds
    }
    return Plan(
        model_hash=scores.meta["model_hash"],
        architecture=dict(architecture),
        corpus_hash=scores.meta["corpus_hash"],
        score=score,
        preset=preset,
        keep=keep,
        of=of,
        seed=own_seed if seed is None else seed,
        floor=floor,
        levels={str(layer): 1.0 if layer in dropped else min(1.0, levels[layer]) for layer in scores.layers()},
        kept=kept,
        before=_whole_size(architecture),
        after=_size(architecture, _widths(architecture, layers, groups, steps)),
        layers_dropped=dropped,
        units=used,
        head_score=head_score,
        shares=sensitivity.how if sensitivity is not None else "uniform" if preset is None else "preset",
    )


def _whole_size(architecture: Mapping[str, Any]) -> Size:
    """Of the dense model."""
    dense = dict.fromkeys(range(int(architecture["num_hidden_layers"])), _dense_widths(architecture))
    return _size(architecture, dense, pruned=False)


def _spent(
    architecture: Mapping[str, Any],
    layers: list[int],
    groups: list[_Group],
    levels: dict[int, float],
    keep: float,
    of: Of,
    floor: float,
    curves: Curves | None,
) -> tuple[list[int], dict[int, float]]:
    """Steps of each group that leave `keep` of the parameters, and the level that each layer comes to by them.

    Raises:
        ValueError: So few cannot be left.
    """
    shape, before = _shape(architecture), _whole_size(architecture)
    dense = dict.fromkeys(layers, _dense_widths(architecture))
    whole = before.parameters if of == "total" else before.encoder
    excess = whole - int(keep * whole)
    fewer = _size(architecture, _widths(architecture, layers, [], []))
    due = _due_by_level(groups, levels) if curves is None else _due_by_loss(groups, curves, shape, dense)
    steps, left = _fill_budget(architecture, groups, due, excess - (before.parameters - fewer.parameters))
    if left > 0:
        most = [group.most for group in groups]
        smallest = _size(architecture, _widths(architecture, layers, groups, most))
        least = (smallest.parameters if of == "total" else smallest.encoder) / whole
        raise ValueError(
            f"keep is {keep:g} of {of}, but removing everything above the floor of {floor:g} still leaves "
            f"{least:.4f}: ask for more, or lower the floor"
        )
    costs = [group.cost(shape, dense[group.layer]) for group in groups]
    if curves is not None:
        return steps, {layer: _share_gone(layer, groups, steps, costs) for layer in layers}
    # the scale that the budget gave the levels, for people; rounding makes it differ a little between sites
    wanted = sum(levels[group.layer] * group.ranked * cost for group, cost in zip(groups, costs, strict=True))
    scale = sum(n * cost for n, cost in zip(steps, costs, strict=True)) / wanted if wanted else 0.0
    return steps, {layer: level * scale for layer, level in levels.items()}


def _share_gone(layer: int, groups: list[_Group], steps: list[int], costs: list[int]) -> float:
    """Share of the parameters of a layer's ranked neurons that goes."""
    here = [
        (n * cost, group.ranked * cost)
        for group, n, cost in zip(groups, steps, costs, strict=True)
        if group.layer == layer
    ]
    whole = sum(all_of_it for _, all_of_it in here)
    return sum(gone for gone, _ in here) / whole if whole else 0.0


def single_cuts(
    scores: Scores,
    score: str,
    layer: int,
    unit: str,
    levels: Sequence[float],
    *,
    head_score: str | None = None,
    whole: Plan | None = None,
) -> Iterator[tuple[float, Plan]]:
    """Plans that cut one unit of one layer and drop all other layers, so that this layer is all there is to build.

    Args:
        scores: Scores of the model.
        score: Score that ranks the neurons.
        layer: The layer.
        unit: One of `UNITS`.
        levels: Shares of what may be removed, ascending; of each at least one step is taken.
        head_score: As in `plan`.
        whole: Plan by the score that keeps everything, where it was made before.

    Yields:
        The share of the ranked neurons that goes, and the plan; shares that come to no further step are left out.
    """
    column, ranked = scores.column(score), scores.ranked(score)
    (group,) = _groups(scores, column, ranked, [layer], units=(unit,), head_score=head_score, floor=0.0)
    whole = plan(scores, keep=1.0, score=score) if whole is None else whole
    others = tuple(other for other in scores.layers() if other != layer)
    taken = 0
    for level in levels:
        steps = min(group.most, max(1, round(level * group.ranked)))
        if steps > taken:
            taken = steps
            kept = {f"{layer}.{kind}": group.kept(steps) for kind in group.kinds}
            yield steps / group.ranked, replace(whole, kept=kept, layers_dropped=others)


def check_request(
    *,
    keep: float | None,
    of: str,
    preset: str | None,
    score: str | None,
    floor: float,
    units: Sequence[str] = DEFAULT_UNITS,
    head_score: str | None = None,
    drop_layers: int = 0,
    multiple: int = 1,
) -> None:
    """Refuses what no scores could make valid; the arguments are those of `plan`, `score` None for one's own.

    Raises:
        ValueError: An argument is out of range or unknown, or none of `keep`, `preset` and `drop_layers` is given.
        TypeError: `keep` or `floor` is not a number, or `drop_layers` or `multiple` not an integer.
    """
    if of not in ("total", "encoder"):
        raise ValueError(f"of is {of!r}, but must be 'total' or 'encoder'")
    if isinstance(drop_layers, bool) or not isinstance(drop_layers, (int, np.integer)):
        raise TypeError(f"drop_layers is {drop_layers!r}, but must be a number of layers, 0 or more")
    if drop_layers < 0:
        raise ValueError(f"drop_layers is {drop_layers}, but must be 0 or more")
    if isinstance(multiple, bool) or not isinstance(multiple, (int, np.integer)):
        raise TypeError(f"multiple is {multiple!r}, but must be a number of neurons, 1 or more")
    if multiple < 1:
        raise ValueError(f"multiple is {multiple}, but must be 1 or more")
    if keep is None and preset is None and not drop_layers:
        raise ValueError("keep and preset are both missing: give the share to keep, a preset, or both")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}, but must be one of {', '.join(PRESETS)}")
    if keep is not None:
        _check_share("keep", keep)
        if keep == 0:
            raise ValueError("keep is 0, but must lie in (0, 1]: name the share of parameters that stays")
    _check_share("floor", floor)
    if score is not None and score not in SCORE_NAMES:
        raise ValueError(f"score is {score!r}, but must be one of {', '.join(SCORE_NAMES)}")
    _check_units(units, head_score, drop_layers)


def _check_units(units: Sequence[str], head_score: str | None, drop_layers: int) -> None:
    if isinstance(units, str) or any(unit not in UNITS for unit in units) or len(set(units)) != len(units):
        raise ValueError(f"units is {units!r}, but must be a list of distinct names of {', '.join(UNITS)}")
    if not units and not drop_layers:
        raise ValueError("units is empty: name what may be removed, or give drop_layers")
    if "heads" in units and ("query_key" in units or "value" in units):
        raise ValueError(
            f"units is {', '.join(units)}, but heads take query, key and value with them: leave query_key and value out"
        )
    if head_score is not None and head_score not in CLOUD_SCORES:
        raise ValueError(f"head_score is {head_score!r}, but must be one of {', '.join(CLOUD_SCORES)}, or left out")
    if head_score is not None and "heads" not in units:
        raise ValueError(f"head_score is {head_score!r}, but units has no heads to rank: add heads, or leave it out")


def _check_share(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)):
        raise TypeError(f"{name} is {value!r}, but must be a number between 0 and 1")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value:g}, but must lie between 0 and 1: 0.5847 keeps 58.47 %")


def _check_model(scores: Scores, model: PreTrainedModel) -> None:
    from obce.sites import model_hash

    found = model_hash(model)
    if found != scores.meta["model_hash"]:
        raise ValueError(
            f"model has hash {found}, but the scores are of the model with hash {scores.meta['model_hash']}: "
            "score this model first"
        )
