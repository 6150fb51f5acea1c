"""Which neurons stay: a plan is data, made before anything is cut.

Removing neurons by percentile of their score, inside each site of each layer (OBCE, arXiv 2312.10702). The paper
gives the levels (30, 50 and 70 %) but neither the rule that assigns a level to a layer nor the Linears that are
cut; what stands here is our reading (docs/method.md).

What can be cut without changing the width of the residual stream:

- `query` and `key` in pairs inside a head: the attention product sums over the pairs;
- `value`, with the column of `attention_output` that reads it;
- `intermediate`, with the column of `output` that reads it.

Query/key and value lose the same number in every head of a layer, so that heads stay rectangular.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from obce.scores import SCORE_NAMES, Scores

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

Of = Literal["total", "encoder"]

# Share removed in the layers whose median r_f is in the low, middle and high third of all layers.
# OBCE 2023 names the percentiles 30, 50 and 70; PBCE 2025 (Applied Sciences 15:390) quartiles. The assignment
# by thirds is our reading: layers that vary least lose most.
PRESETS: dict[str, tuple[float, float, float]] = {
    "obce-2023": (0.70, 0.50, 0.30),
    "pbce-2025": (0.75, 0.50, 0.25),
}

# Length in tokens of the one text that FLOPs are stated for.
FLOPS_LENGTH = 128

_FORMAT = "obce-plan"
_FORMAT_VERSION = 1


class Size(NamedTuple):
    """What a model weighs.

    Attributes:
        parameters: All distinct parameters, heads and embeddings included.
        encoder: Parameters of the encoder layers alone.
        flops: Floating-point operations (a multiply-add is two) of the matrix products of the base model
            (encoder and, if there is one, pooler) on one text of `FLOPS_LENGTH` tokens.
        bytes: Bytes of all distinct parameters in their own dtype: the data of the safetensors file.
    """

    parameters: int
    encoder: int
    flops: int
    bytes: int


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
        levels: Layer number (as text) -> share of its neurons that the level removes, before rounding.
        kept: Site name -> ascending kept indices; a site that is absent is kept whole.
        before: Size of the dense model.
        after: Predicted size of the pruned model, exact.
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
            fields["before"], fields["after"] = Size(**fields["before"]), Size(**fields["after"])
            return cls(**fields)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"plan is damaged ({error}): make the plan again") from error


class _Group:
    """Neurons of one layer that are cut together: the same count in every head.

    `order[h]` lists head h's ranked neurons, lowest score first; a step removes the next one of every head.
    """

    def __init__(
        self,
        layer: int,
        kinds: tuple[str, ...],
        scores: NDArray[np.float64],
        ranked: NDArray[np.bool_],
        heads: int,
        cost: int,
        floor: float,
    ) -> None:
        self.layer, self.kinds, self.cost, self.width = layer, kinds, heads * cost, len(scores)
        per_head = self.width // heads
        self.order = []
        for head in range(heads):
            ids = np.arange(head * per_head, (head + 1) * per_head)
            ids = ids[ranked[ids]]
            # stable: equal scores keep the order of their indices, lower index removed first
            self.order.append(ids[np.argsort(scores[ids], kind="stable")])
        candidates = min(len(ids) for ids in self.order)
        least = max(1, math.ceil(floor * per_head))
        self.ranked = candidates
        self.most = max(0, min(candidates, per_head - least))

    def kept(self, steps: int) -> tuple[int, ...]:
        gone = {int(i) for ids in self.order for i in ids[:steps]}
        return tuple(i for i in range(self.width) if i not in gone)


def _groups(scores: Scores, score: str, column: NDArray[np.float64], floor: float, heads: int) -> list[_Group]:
    from scipy.stats import rankdata

    hidden = int(scores.meta["architecture"]["hidden_size"])
    groups = []
    for layer in scores.layers():
        query, key = scores.rows(layer, "query"), scores.rows(layer, "key")
        ranked = ~(scores.constant[query] | scores.constant[key])
        # A pair is as good as its two halves together. Ranks, because query and key outputs differ in scale.
        pair = np.zeros(len(ranked))
        pair[ranked] = rankdata(column[query][ranked]) + rankdata(column[key][ranked])
        groups.append(_Group(layer, ("query", "key"), pair, ranked, heads, 2 * (hidden + 1), floor))
        for kind, parts in (("value", heads), ("intermediate", 1)):
            rows = scores.rows(layer, kind)
            groups.append(_Group(layer, (kind,), column[rows], ~scores.constant[rows], parts, 2 * hidden + 1, floor))
    return groups


def _levels(scores: Scores, preset: str | None) -> dict[int, float]:
    """Layer -> share removed, before it is scaled to a budget."""
    layers = scores.layers()
    if preset is None:
        return dict.fromkeys(layers, 1.0)
    rf = scores.column("rf")
    medians = []
    for layer in layers:
        here = (scores.layer == layer) & ~scores.constant
        medians.append(float(np.median(rf[here])) if here.any() else 0.0)
    rank = np.argsort(np.argsort(medians, kind="stable"), kind="stable")
    return {layer: PRESETS[preset][int(rank[i]) * 3 // len(layers)] for i, layer in enumerate(layers)}


def flops(
    architecture: Mapping[str, Any], widths: Mapping[int, tuple[int, int, int]], length: int = FLOPS_LENGTH
) -> int:
    """Floating-point operations of a base model's matrix products on one text.

    Args:
        architecture: Facts of the dense model (`obce.sites.architecture`).
        widths: Layer -> (query/key width, value width, intermediate width).
        length: Tokens of the text, T.

    Returns:
        Sum over layers of 2 T h (2 q + 2 v + 2 i) for the Linears and 2 T^2 (q + v) for the two attention
        products, plus 2 h^2 for the pooler; a multiply-add counts as two.
    """
    hidden = int(architecture["hidden_size"])
    total = 2 * hidden * hidden if architecture["pooler"] else 0
    for qk, value, intermediate in widths.values():
        total += 2 * length * hidden * (2 * qk + 2 * value + 2 * intermediate)
        total += 2 * length * length * (qk + value)
    return total


def _size(architecture: Mapping[str, Any], groups: list[_Group], steps: list[int]) -> Size:
    removed = sum(group.cost * n for group, n in zip(groups, steps, strict=True))
    widths: dict[int, list[int]] = {}
    for group, n in zip(groups, steps, strict=True):
        widths.setdefault(group.layer, []).append(group.width - n * len(group.order))
    return Size(
        parameters=int(architecture["parameters"]) - removed,
        encoder=int(architecture["encoder_parameters"]) - removed,
        flops=flops(architecture, {layer: (w[0], w[1], w[2]) for layer, w in widths.items()}),
        bytes=int(architecture["weight_bytes"]) - removed * int(architecture["encoder_element_bytes"]),
    )


def _fill_budget(groups: list[_Group], levels: dict[int, float], excess: int) -> tuple[list[int], int]:
    """Steps of each group until `excess` parameters are gone, levels growing together.

    Step k of a group with c ranked neurons a head is due when the common scale of all levels reaches
    k / (c * level). Taking steps in that order is the preset, scaled; a step too big for what is left is passed
    over, so that single intermediate neurons fill the rest.

    Returns:
        Steps of each group, and parameters still in excess: more than 0 only when nothing is left to take.
    """
    due = [
        (k / (group.ranked * levels[group.layer]), g)
        for g, group in enumerate(groups)
        for k in range(1, group.most + 1)
    ]
    due.sort()
    steps = [0] * len(groups)
    smallest = min((group.cost for group in groups if group.most), default=0)
    passed: set[int] = set()
    for _, g in due:
        if excess <= 0:
            break
        group = groups[g]
        if g in passed:
            continue
        if group.cost > max(excess, smallest):
            # a later step of the same group costs the same, so it can never fit again
            passed.add(g)
            continue
        steps[g] += 1
        excess -= group.cost
    while excess > 0:
        # near the floor, when the small steps are used up and only whole-head steps are left
        open_groups = [(group.cost, g) for g, group in enumerate(groups) if steps[g] < group.most]
        if not open_groups:
            break
        cost, g = min(open_groups)
        steps[g] += 1
        excess -= cost
    return steps, excess


def plan(
    scores: Scores,
    model: PreTrainedModel | None = None,
    *,
    keep: float | None = None,
    of: Of = "total",
    preset: str | None = None,
    score: str = "rf",
    floor: float = 1 / 16,
    seed: int | None = None,
) -> Plan:
    """Chooses the neurons that stay.

    Neurons flagged constant are never ranked and stay. Inside a site (for query/key and value: inside each
    head) the lowest scores go first, ties by index.

    Args:
        scores: Scores of the model.
        model: The model, if at hand: checked to be the one that was scored.
        keep: Share of parameters to keep, in (0, 1]. Met from below, to within one neuron.
        of: `"total"` (all parameters, embeddings and heads included) or `"encoder"` (the layers alone).
        preset: `"obce-2023"` or `"pbce-2025"`: a layer's level follows the rank of its median r_f. With `keep`,
            the levels are scaled together until the budget is met; without, they are taken as they are.
            None: every layer loses the same share.
        score: Score that ranks the neurons inside a site.
        floor: Least share of each site that stays (at least one neuron a head), in [0, 1].
        seed: For `score="random"`: draw anew with this seed instead of taking the scores' own column.

    Raises:
        ValueError: An argument is out of range, the model is another one, neither `keep` nor `preset` is given,
            or the budget cannot be met above the floor (the message names the smallest share that can).
    """
    check_request(keep=keep, of=of, preset=preset, score=score, floor=floor)
    keep, floor = None if keep is None else float(keep), float(floor)
    if model is not None:
        _check_model(scores, model)

    column = scores.column(score)
    own_seed = int(scores.meta["seed"])
    if score == "random" and seed is not None:
        column = np.random.default_rng(seed).random(len(scores))
    architecture = scores.meta["architecture"]
    levels = _levels(scores, preset)
    groups = _groups(scores, score, column, floor, int(architecture["num_attention_heads"]))
    before = _size(architecture, groups, [0] * len(groups))

    if keep is None:
        scale = 1.0
        steps = [min(group.most, int(levels[group.layer] * group.ranked)) for group in groups]
    else:
        whole = before.parameters if of == "total" else before.encoder
        excess = whole - int(keep * whole)
        steps, left = _fill_budget(groups, levels, excess)
        if left > 0:
            smallest = _size(architecture, groups, [group.most for group in groups])
            least = (smallest.parameters if of == "total" else smallest.encoder) / whole
            raise ValueError(
                f"keep is {keep:g} of {of}, but removing everything above the floor of {floor:g} still leaves "
                f"{least:.4f}: ask for more, or lower the floor"
            )
        # the scale that the budget gave the levels, for people; rounding makes it differ a little between sites
        wanted = sum(levels[group.layer] * group.ranked * group.cost for group in groups)
        scale = sum(n * group.cost for n, group in zip(steps, groups, strict=True)) / wanted if wanted else 0.0

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
        levels={str(layer): min(1.0, level * scale) for layer, level in levels.items()},
        kept=kept,
        before=before,
        after=_size(architecture, groups, steps),
    )


def check_request(*, keep: float | None, of: str, preset: str | None, score: str, floor: float) -> None:
    """Refuses what no scores could make valid; the arguments are those of `plan`.

    Raises:
        ValueError: An argument is out of range or unknown, or neither `keep` nor `preset` is given.
        TypeError: `keep` or `floor` is not a number.
    """
    if of not in ("total", "encoder"):
        raise ValueError(f"of is {of!r}, but must be 'total' or 'encoder'")
    if keep is None and preset is None:
        raise ValueError("keep and preset are both missing: give the share to keep, a preset, or both")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}, but must be one of {', '.join(PRESETS)}")
    if keep is not None:
        _check_share("keep", keep)
        if keep == 0:
            raise ValueError("keep is 0, but must lie in (0, 1]: name the share of parameters that stays")
    _check_share("floor", floor)
    if score not in SCORE_NAMES:
        raise ValueError(f"score is {score!r}, but must be one of {', '.join(SCORE_NAMES)}")


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
