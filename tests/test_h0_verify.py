"""A sample of what tests/verify_h0.py checks in full, and that it sees what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from obce.h0 import h0

pytest.importorskip("obce._cpu", reason="obce._cpu is not built on this machine")


@pytest.fixture(scope="module")
def verify(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("verify_h0")


def test_small_clouds(verify: ModuleType) -> None:
    verify.small(600, seed=1)


def test_large_clouds(verify: ModuleType) -> None:
    verify.large(len(verify.KINDS), seed=1, budget=1e6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_a_wrong_answer_is_seen(verify: ModuleType, dtype: type) -> None:
    cloud = np.random.default_rng(0).standard_normal((20, 3)).astype(dtype)
    result = h0(cloud, edges=True)
    deaths, edges = result.deaths[0], result.edges[0]
    assert np.array_equal(verify.canonical(cloud, edges), deaths)
    verify.against_scipy(cloud, deaths)
    with pytest.raises(AssertionError, match="strict order"):
        verify.canonical(cloud, edges[[1, 0, *range(2, 19)]])
    with pytest.raises(AssertionError, match="smaller end first"):
        verify.canonical(cloud, edges[:, ::-1])
    longer = deaths * dtype(1 + (1e-11 if dtype is np.float64 else 1e-6))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        verify.against_scipy(cloud, longer)
