"""What each site can spare: the curves against a model pruned and measured as a whole, and the plans made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from obce.corpus import tokenize
from obce.plan import plan, single_cuts
from obce.prune import prune
from obce.scoring import score
from obce.sensitivity import sensitivity

if TYPE_CHECKING:
    from collections.abc import Callable

    from obce.corpus import TokenBatches
    from obce.scores import Scores
    from transformers import BertModel, PreTrainedTokenizerBase


@pytest.fixture(scope="module")
def model(make_bert: Callable[..., BertModel]) -> BertModel:
    return make_bert(seed=3).eval()


@pytest.fixture(scope="module")
def texts(texts: list[str]) -> list[str]:
    return texts[:60]


@pytest.fixture(scope="module")
def parts(texts: list[str], tiny_tokenizer: PreTrainedTokenizerBase) -> tuple[TokenBatches, TokenBatches]:
    return tokenize(texts[:40], tiny_tokenizer, max_length=32), tokenize(texts[40:], tiny_tokenizer, max_length=32)


@pytest.fixture(scope="module")
def scores(model: BertModel, texts: list[str], tiny_tokenizer: PreTrainedTokenizerBase) -> Scores:
    return score(model, tiny_tokenizer, texts, max_length=32, cloud_texts=0, effect_texts=60)


def vectors(model: Any, batches: TokenBatches, read: str) -> torch.Tensor:
    found = []
    with torch.no_grad():
        for batch in batches:
            hidden = model(**batch.inputs).last_hidden_state
            mask = batch.inputs["attention_mask"][..., None]
            found.append(hidden[:, 0] if read == "cls" else (hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(found).double()


@pytest.mark.parametrize("read", ["cls", "mean"])
def test_the_last_layer_is_measured_as_a_whole_pruned_model_is(
    model: BertModel, scores: Scores, parts: tuple[TokenBatches, TokenBatches], read: str
) -> None:
    """Before the last layer nothing is cut, so a model pruned there alone is repaired there alone."""
    last = model.config.num_hidden_layers - 1
    curves = sensitivity(model, scores, *parts, units=("intermediate",), levels=(0.5,), read=read)
    ((share, cut),) = single_cuts(scores, "effect", last, "intermediate", (0.5,))
    whole = plan(scores, keep=1.0)
    small = prune(model, type(whole)(**{**vars(whole), "kept": cut.kept}), texts=parts[0])
    dense = vectors(model, parts[1], read)
    lost = (vectors(small, parts[1], read) - dense).square().sum() / (dense - dense.mean(0)).square().sum()
    assert curves[f"{last}.intermediate"][0] == (0.0, 0.0)
    assert curves[f"{last}.intermediate"][1] == (share, pytest.approx(float(lost), rel=1e-3))


def test_every_site_is_measured_and_a_plan_spends_by_it(
    model: BertModel, scores: Scores, parts: tuple[TokenBatches, TokenBatches]
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = []
    curves = sensitivity(model, scores, *parts, progress=lambda at, of: done.append((at, of)))
    layers = model.config.num_hidden_layers
    assert list(curves) == [f"{i}.{unit}" for i in range(layers) for unit in ("query_key", "value", "intermediate")]
    assert done == [(i + 1, layers) for i in range(layers)]
    for curve in curves.values():
        shares, losses = np.array(curve).T
        assert (np.diff(shares) > 0).all()
        assert np.isfinite(losses).all() and (losses[1:] > 0).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    made = plan(scores, keep=0.6, of="encoder", sensitivity=curves)
    assert made.kept_share <= 0.6
    widths = {name: len(kept) for name, kept in made.kept.items()}
    assert widths != {name: len(kept) for name, kept in plan(scores, keep=0.6, of="encoder").kept.items()}


def test_single_cuts_name_the_lowest_scores_of_one_unit(scores: Scores) -> None:
    for share, cut in single_cuts(scores, "std", 1, "query_key", (0.25, 0.5)):
        assert set(cut.kept) == {"1.query", "1.key"}
        assert cut.layers_dropped == tuple(i for i in scores.layers() if i != 1)
        assert len(cut.kept["1.query"]) == pytest.approx((1 - share) * 32)
    assert list(single_cuts(scores, "std", 0, "value", (0.5,))) == [], "constant at [CLS], so std ranks none"
