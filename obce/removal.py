"""What stands in for a removed neuron: read from the weights of a pruned model beside those of the dense one.

Nothing is run here. A pruned model must be the one that the plan cuts: what pruning never changes (value, key and
intermediate rows that stay) is compared with the dense model first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from obce.sites import READ_BY, find_sites, layers_of, layout_of, matrix

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from obce.plan import Plan
    from obce.sites import Site

CARRIERS = 5
"""Kept neurons shown that took over most of a removed one."""

_PAIRED = ("query", "key")


@dataclass(frozen=True, slots=True)
class Carrier:
    """A kept neuron of the same site whose weights now stand for a removed one.

    Attributes:
        name: Its name.
        share: How much of the removed neuron's weights w is in the change d of this one's: <d, w> / <w, w>.
        correlation: Of the outputs of the two at [CLS] over the texts.
    """

    name: str
    share: float
    correlation: float


@dataclass(frozen=True, slots=True)
class Replacement:
    """What a pruned model has in the place of a removed neuron.

    Attributes:
        repair: As in `obce.prune`.
        words: What was done, in words.
        constant: The number that its reader's bias, or its place in the residual stream, holds for it; None where
            nothing does, or weights do.
        carriers: Kept neurons that took over most of it, by the size of their share; with `"least_squares"` alone.
    """

    repair: str
    words: str
    constant: float | None = None
    carriers: tuple[Carrier, ...] = ()


class Pruned:
    """A pruned model beside the dense one it was cut from.

    Args:
        dense: The dense model.
        small: What `obce.prune` made of it.
        plan: The plan.

    Attributes:
        repair: What replaces removed neurons.
        errors: Site -> share of the variance of what its reader was to add that is lost with the best constants, and
            with the fitted weights; of least squares alone.
        texts: Texts that least squares was fitted on, 0 without it.

    Raises:
        ValueError: The pruned model is not the one that this plan cuts out of the dense one.
    """

    def __init__(self, dense: PreTrainedModel, small: PreTrainedModel, plan: Plan) -> None:
        facts: dict[str, Any] = getattr(small.config, "obce", None) or {}
        self.repair = str(facts.get("repair", "none"))
        fitted = facts.get("least_squares") or {}
        self.errors = {name: (float(a), float(b)) for name, (a, b) in fitted.get("errors", {}).items()}
        self.texts = int(fitted.get("texts", 0))
        self.sites = {site.name: site for site in find_sites(dense)}
        self.kept = {
            name: np.array(plan.indices(name, site.width), dtype=np.int64)
            for name, site in self.sites.items()
            if site.layer not in plan.layers_dropped
        }
        self._stay = sorted({self.sites[name].layer for name in self.kept})
        self._dense, self._small = layers_of(dense), layers_of(small)
        layout = layout_of(dense)
        self._layout = layout
        self._mapped = layout.site_map is not None
        self._change: dict[str, torch.Tensor] = {}
        if facts.get("model_hash") != plan.model_hash or len(self._small) != len(self._stay) or not self._is_cut():
            raise ValueError("the pruned model is not what this plan cuts out of the scored model: prune again.")

    def _is_cut(self) -> bool:
        writers: dict[tuple[int, str], list[str]] = {}
        for name, site in self.sites.items():
            if name in self.kept:
                for place in self._layout.linears(site.kind):
                    writers.setdefault((site.layer, place), []).append(name)
        for (layer, place), names in writers.items():
            sites = [self.sites[name] for name in names]
            rows = [site.rows(torch.from_numpy(self.kept[site.name])) for site in sites]
            if sites[-1].kind in ("key", "value", "intermediate") and any(len(some) for some in rows):
                old, new = self._module(layer, place)
                if old is None or new is None:
                    return False
                before, after = matrix(old), matrix(new)
                weight = before[torch.cat(rows).to(before.device)].to(after)
                # least squares changes the query rows, which come first
                fitted = len(rows[0]) if sites[0].kind == "query" and not self._layout.rotary else 0
                if weight.shape != after.shape or not torch.equal(weight[fitted:], after[fitted:]):
                    return False
        return True

    def _linear(self, site: Site, kind: str) -> tuple[Any, Any]:
        """The Linear of a kind in the site's layer, dense and pruned; None where a layer has lost it."""
        return self._module(site.layer, self._layout.writers[kind])

    def _module(self, of_layer: int, place: str) -> tuple[Any, Any]:
        found: list[Any] = []
        for layers, layer in ((self._dense, of_layer), (self._small, self._stay.index(of_layer))):
            try:
                found.append(layers[layer].get_submodule(place))
            except AttributeError:  # of attention without heads
                found.append(None)
        return found[0], found[1]

    def replacement(self, site: Site, index: int, correlations: NDArray[np.float64], mean: float) -> Replacement | None:
        """What stands in for a neuron; None if it was kept.

        Args:
            site: Its site.
            index: Its number there.
            correlations: float64 [width], of its outputs with those of every neuron of the site.
            mean: Its mean over all tokens, for `repair="mean"`.
        """
        if site.name not in self.kept:
            return Replacement(
                self.repair, f"The whole layer {site.layer} goes: what comes after is given what it was given."
            )
        if index in self.kept[site.name]:
            return None
        if site.kind in _PAIRED:
            return self._of_a_pair(site, index, correlations)
        if site.reader is None:
            return self._of_the_stream(site, index)
        if self.repair == "least_squares":
            before, after = self.errors.get(site.name, (float("nan"), float("nan")))
            return Replacement(
                self.repair,
                f"Its column of the reader went, and least squares changed the columns that stay (of the variance of "
                f"what the reader adds, {before:.2%} would be lost with constants and {after:.2%} is lost with these "
                "weights). A share says how much of its column is in the change of another; the change answers for "
                "all removed neurons at once.",
                carriers=self._carriers(site, index, correlations),
            )
        if self.repair == "mean":
            return Replacement(
                self.repair,
                f"Its column of the reader went, and the reader's bias took the column times {mean:.4g}, the neuron's "
                "mean over all tokens.",
                constant=mean,
            )
        return Replacement(self.repair, "Its column of the reader went, and nothing replaces it.", constant=0.0)

    def _of_a_pair(self, site: Site, index: int, correlations: NDArray[np.float64]) -> Replacement:
        if self._layout.rotary:
            return Replacement(
                self.repair,
                "Query and key neurons go four at a time, as positions turn two of each together, by an angle of their "
                "own; nothing replaces them, whatever the repair.",
            )
        if self._mapped:
            return Replacement(
                self.repair, "Query and key neurons go in pairs; zeros stand for them, whatever the repair."
            )
        gone = (
            "Query and key neurons go in pairs. Held at constants, a pair adds the same number for every token that is "
            "looked at, which the softmax cancels"
        )
        if self.repair != "least_squares":
            return Replacement(self.repair, f"{gone}; nothing replaces it.")
        return Replacement(
            self.repair,
            f"{gone}. Least squares predicts its keys from the keys that stay and changed the query rows that stay. A "
            "share says how much of this pair's query row is in the change of another; the change answers for all "
            "removed pairs of the head at once.",
            carriers=self._carriers(site, index, correlations),
        )

    def _of_the_stream(self, site: Site, index: int) -> Replacement:
        _, new = self._linear(site, site.kind)
        constant = float(new.bias[index])
        return Replacement(
            self.repair,
            f"It wrote coordinate {index} of the residual stream, which stays: {constant:.4g} is added there instead.",
            constant=constant,
        )

    def _carriers(self, site: Site, index: int, correlations: NDArray[np.float64]) -> tuple[Carrier, ...]:
        change = self._changes(site)
        kept = self.kept[site.name]
        old, _ = self._linear(site, "query" if site.kind in _PAIRED else READ_BY[site.kind])
        if change is None or not len(kept):
            return ()
        if site.kind in _PAIRED:
            own = matrix(old)[index].detach().double().cpu()
        else:
            own = self._columns(site, matrix(old).detach().double().cpu()[self._rows(site)], torch.tensor([index]))[0]
        square = float(own.square().sum())
        if not square > 0:
            return ()
        shares = (change @ own / square).numpy()
        order = np.argsort(-np.abs(shares), kind="stable")[:CARRIERS].tolist()
        return tuple(
            Carrier(f"{site.name}.{kept[i]}", float(shares[i]), float(correlations[kept[i]]))
            for i in order
            if shares[i] != 0
        )

    def _rows(self, site: Site) -> torch.Tensor:
        """Rows of the dense reader that the pruned one still computes."""
        old, new = self._linear(site, READ_BY[site.kind])
        rows = getattr(new, "kept", None)
        found: torch.Tensor = torch.arange(len(matrix(old))) if rows is None else rows.cpu()
        return found

    @staticmethod
    def _columns(site: Site, weight: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
        """[neurons, groups x rows]: the columns of a reader [rows, width x groups] that take in some neurons."""
        return site.grouped(weight)[..., neurons].flatten(0, 1).T if site.groups > 1 else weight[:, neurons].T

    @torch.no_grad()
    def _changes(self, site: Site) -> torch.Tensor | None:
        """float64 [kept, ...]: how each kept neuron's weights were changed; of a reader its columns."""
        name = f"{site.layer}.{'query' if site.kind in _PAIRED else site.kind}"
        if name not in self._change:
            kind = "query" if site.kind in _PAIRED else READ_BY[site.kind]
            old, new = self._linear(site, kind)
            kept = torch.from_numpy(self.kept[name])
            if new is None or new.weight is None:
                return None
            before, after = matrix(old).detach().cpu(), matrix(new).detach().cpu().double()
            if site.kind in _PAIRED:
                self._change[name] = after[: len(kept)] - before[kept].double()
            else:
                changed = torch.zeros(len(after), before.shape[1], dtype=torch.float64)
                columns = site.read_by(kept)
                changed[:, columns] = after - before[self._rows(site)][:, columns].double()
                self._change[name] = self._columns(site, changed, kept).contiguous()
        return self._change[name]
