"""The kept cases of tests/fuzz_h0.py, some new ones, and that the harness sees what is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from obce import backends

pytest.importorskip("obce._cpu", reason="obce._cpu is not built on this machine")


BACKEND = None if os.environ.get("OBCE_TEST_EMULATED") == "1" else "cpu"  # None: the CUDA engine where it can


@pytest.fixture(scope="module")
def fuzz(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("fuzz_h0")


def test_kept_cases_pass(fuzz: ModuleType) -> None:
    kept = fuzz.corpus()
    assert len(kept) > 50
    for case in kept:
        assert fuzz.failure(case, BACKEND) is None, case.to_json()


def test_new_cases_pass(fuzz: ModuleType) -> None:
    for number in range(250):
        assert fuzz.failure(fuzz.draw(2312, number), BACKEND) is None, f"case {number}"


def test_a_case_is_its_line_and_its_number(fuzz: ModuleType) -> None:
    for number in range(50):
        line = fuzz.draw(1, number).to_json()
        assert fuzz.Case.from_json(line).to_json() == line == fuzz.draw(1, number).to_json()


@pytest.mark.parametrize("field", ["lengths", "edges"])
def test_a_wrong_bit_is_seen_and_shrunk(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    right = backends.CpuBackend.run

    def wrong(self: backends.CpuBackend, job: backends.Job) -> backends.Answer:
        answer = right(self, job)
        array = getattr(answer, field)
        if array is not None and array.size:
            array.flat[-1] = np.nextafter(array.flat[-1], 0) if field == "lengths" else array.flat[-1] + 1
        return answer

    case = fuzz.Case("h0", "fortran", np.arange(60.0).reshape(20, 3), {"edges": True, "algorithm": "prim"}, "")
    assert fuzz.failure(case) is None
    monkeypatch.setattr(backends.CpuBackend, "run", wrong)
    assert fuzz.failure(case) is not None
    small = fuzz.shrunk(case)
    assert fuzz.failure(small) is not None
    assert small.form == "plain" and len(small.numbers) == 2


def test_errors_that_are_no_refusals_are_seen(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case = fuzz.Case("r_f", "plain", np.arange(4.0), {}, "")
    assert fuzz.failure(case) is None

    def broken(self: backends.CpuBackend, job: backends.Job) -> backends.Answer:
        raise KeyError("x")

    monkeypatch.setattr(backends.CpuBackend, "run", broken)
    assert "KeyError" in fuzz.failure(case)
    monkeypatch.setattr(backends.CpuBackend, "run", lambda self, job: (_ for _ in ()).throw(ValueError("no")))
    assert "refused (ValueError: no), the oracle answered" in fuzz.failure(case)
