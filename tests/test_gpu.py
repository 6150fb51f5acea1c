"""What holds on a CUDA device; run by `make gpu` and skipped where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import obce
import pytest
import torch
from obce.scoring import score

if TYPE_CHECKING:
    from transformers import BertModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here; `make gpu` runs these on one"),
]


def test_scores_on_the_device_are_those_of_the_cpu(tiny_bert: BertModel, tiny_tokenizer: Any, texts: list[str]) -> None:
    on_cpu = score(tiny_bert, tiny_tokenizer, texts)
    on_gpu = score(tiny_bert.cuda(), tiny_tokenizer, texts)
    assert on_gpu.meta["model_hash"] == on_cpu.meta["model_hash"]
    assert (on_gpu.constant == on_cpu.constant).all()
    np.testing.assert_allclose(on_gpu.columns["std"], on_cpu.columns["std"], rtol=1e-3, atol=1e-5)


def test_rf_of_a_cuda_tensor_stays_on_its_device() -> None:
    values = torch.randn(64, 1000, device="cuda")
    found = obce.r_f(values)
    assert found.device == values.device
    assert torch.equal(found.cpu(), obce.r_f(values.cpu()))


@pytest.mark.parametrize("d", [1, 3])
def test_edges_of_a_cuda_cloud_equal_the_cpus(d: int) -> None:
    points = torch.randn(4, 200, d, device="cuda")
    points[:, 50:60] = points[:, :10]
    found, expected = obce.h0(points, edges=True), obce.h0(points.cpu(), edges=True)
    assert found.deaths.device == points.device
    assert torch.equal(found.edges.cpu(), expected.edges)
    assert torch.equal(found.deaths.cpu(), expected.deaths)
