"""benchmarks/bench_gpu.py at tiny sizes on the CPU: every case is verified and timed; what fails is a row."""

from __future__ import annotations

import csv
import gc
import importlib.util
import re
import shutil
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obce
import pytest
import torch

if TYPE_CHECKING:
    from types import ModuleType

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_gpu.py"
needs_cpu = pytest.mark.skipif(
    importlib.util.find_spec("obce._cpu") is None, reason="obce._cpu is not built on this machine"
)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def start(bench: ModuleType, out: Path) -> Any:
    rates = bench.Ceilings(1e12, 1e13, 1e14, 1e15)
    return bench.Run(bench.Clock("cpu", time.monotonic() + 600), rates, {"device": "cpu"}, out)


@needs_cpu
def test_the_program_runs_without_a_gpu(bench: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "gpu.csv"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--out", str(out)]
    for _ in range(2):  # rows are appended
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    rows = read(out)
    ours = [row for row in rows if row["peer"] == "obce"]
    assert [row["case"] for row in ours] == 2 * [case.name for case in bench.QUICK]
    for row in rows:
        assert row["status"] in ("ok", "missing"), row
        assert float(row["copy_gb_s"]) > 0 and float(row["bf16_tflop_s"]) > 0 and row["commit"]
    for row in ours:
        assert row["verified"].startswith("the oracle") and row["backend"] == "cpu" and row["algorithm"]
        assert float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert int(row["bytes"]) > 0 and int(row["operations"]) > 0 and row["binds"] and row["share"]
    torch_peers = [row for row in rows if row["peer"].startswith("torch")]
    assert {row["group"] for row in torch_peers} == {"W1", "W2", "W3", "W4"}
    assert all(row["status"] == "ok" and float(row["ratio"]) > 0 for row in torch_peers)


def test_only_some_groups_and_files_of_others(tmp_path: Path) -> None:
    out = tmp_path / "other.csv"
    out.write_text("a,b\n1,2\n", encoding="utf-8")
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--out", str(out)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and "has columns of another program or version" in done.stderr
    done = subprocess.run([*command, "--only", "W9"], check=False, capture_output=True, text=True)
    assert done.returncode == 2 and "expected some of W1, W2, W3, W4" in done.stderr


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("no room"), "out of memory"),
        (ValueError("backend names 'x', which cannot do this."), "refused"),
        (RuntimeError("the device is gone"), "failed"),
        (LookupError("out of resource: shared memory"), "failed"),  # Triton's are of no narrower class
    ],
)
def test_what_fails_is_a_row(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    data: list[Any] = []

    def fail(_: Any, points: torch.Tensor, **__: Any) -> None:
        data.append(weakref.ref(points))
        raise error

    run = start(bench, tmp_path / "gpu.csv")
    monkeypatch.setattr(bench.Case, "ours", fail)
    gc.disable()
    try:
        bench.measure(run, bench.Case("W2", 1, 10, 2))
        assert data and all(points() is None for points in data), "the next case would be said to take this memory"
    finally:
        gc.enable()
    row, *peers = read(run.out)
    assert (row["status"], row["reason"], row["p50"]) == (status, str(error), "")
    assert len(peers) == 3
    assert run.bad == ([f"{row['case']}: failed, {error}"] if status == "failed" else [])


@needs_cpu
def test_a_wrong_answer_is_never_timed(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.Case.ours

    def wrong(case: Any, data: Any, edges: bool = False, **options: Any) -> Any:
        deaths, ends = right(case, data, edges, **options)
        return (deaths if "backend" in options else deaths + 1e-3), ends

    run = start(bench, tmp_path / "gpu.csv")
    monkeypatch.setattr(bench.Case, "ours", wrong)
    for case in (bench.Case("W1", 5, 10, 1, "r_f"), bench.Case("W3", 1, 20, 2), bench.Case("W4", 3, 9, 0)):
        bench.measure(run, case)
    ours = [row for row in read(run.out) if row["peer"] == "obce"]
    assert [row["status"] for row in ours] == ["wrong"] * 3 and not any(row["p50"] for row in ours)
    assert len(run.bad) == 3


@needs_cpu
def test_a_case_that_would_take_too_long_is_refused(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ONE_CALL", 1e-9)
    case = bench.Case("W2", 64, 10, 2)
    with pytest.raises(bench.RefusedError) as told:
        bench.verify(case, case.make("cpu"), bench.Clock("cpu", 0.0))
    assert told.value.args[0] == "refused" and "one call would take about" in told.value.args[1]
    with pytest.raises(bench.RefusedError):
        bench.Clock("cpu", 0.0).refuse_late()


def test_large_trees_are_verified_without_another_tree(bench: ModuleType) -> None:
    points = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    result: Any = obce.h0(points, edges=True)
    deaths, edges = result.deaths[0], result.edges[0]
    bench.nearest(points, deaths, edges)
    with pytest.raises(bench.RefusedError, match="not the lengths"):
        bench.nearest(points, deaths * 1.001, edges)
    cut = edges.clone()
    cut[-1] = cut[0]
    with pytest.raises(bench.RefusedError, match="the edges leave 2 pieces"):
        bench.nearest(points, deaths, cut)
    star = torch.stack([torch.zeros(299, dtype=torch.int64), torch.arange(1, 300)], 1)
    lengths = (points[0] - points[1:]).norm(dim=1)
    with pytest.raises(bench.RefusedError, match=r"has a neighbour at .* that the tree does not know"):
        bench.nearest(points, lengths, star)


def test_peers_in_torch_are_right(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BLOCK", 1 << 12)  # many tiles
    points = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    expected: Any = obce.h0(points).deaths
    torch.testing.assert_close(bench.boruvka(points)[None], expected, rtol=1e-5, atol=1e-6)
    matrices = torch.cdist(points, points)[None].repeat(2, 1, 1)
    torch.testing.assert_close(bench.batched_prim(matrices)[:1], expected, rtol=1e-5, atol=1e-3)


def test_floors_by_hand(bench: ModuleType) -> None:
    """At a copy of 3 TB/s, 67 TFLOP/s in fp32 and 800 in bfloat16: those of an H100."""
    rates = bench.Ceilings(3e12, 67e12, 400e12, 800e12)
    cases = bench.FULL
    for case, seconds, binds in (
        (cases[0], 2.95e-3, "bytes"),
        (cases[2], 1.47e-3, "bytes"),
        (cases[5], 5.9e-3, "bytes"),
        (cases[7], 0.9e-3, "fp32"),
        (replace(cases[12], d=3), 1.6e-3, "fp32"),
        (cases[12], 1.6e-3, "bf16"),
        (cases[13], 12.8e-3, "bf16"),
        (cases[16], 0.70e-3, "bytes"),
        (cases[18], 0.72e-3, "bytes"),
    ):
        floor, found = case.floor(rates)
        assert found == binds and floor == pytest.approx(seconds, rel=0.06), case.name


FAILING_PYTHON = """#!/bin/sh
case "$*" in
  -c*) ;;
  *pip*) sleep 2 ;;
  *) echo "$*" >> calls; exit 1 ;;
esac
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make on this machine")
@pytest.mark.parametrize("seconds", [1_000, 40, 1])
def test_make_gpu_runs_every_part_whatever_became_of_the_others(tmp_path: Path, seconds: int) -> None:
    python = tmp_path / "python"
    python.write_text(FAILING_PYTHON, encoding="utf-8")
    python.chmod(0o755)
    (tmp_path / "Makefile").symlink_to(SCRIPT.parents[1] / "Makefile")
    command = ["make", "gpu", f"PYTHON={python}", f"GPU_SECONDS={seconds}"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode != 0, done.stdout
    calls = (tmp_path / "calls").read_text("utf-8").splitlines()
    tests = [call for call in calls if "pytest" in call]
    measured = [call for call in calls if "benchmarks/" in call]
    assert [re.sub(r".*benchmarks/bench_(\w+)\.py.*", r"\1", call) for call in measured] == [
        *("gpu", "gpu", "score", "latency", "shares")
    ]
    limits = [int(re.sub(r".*--limit (\S+) .*", r"\1", call)) for call in measured]
    assert all(
        limit <= most and limit <= seconds - 2 for limit, most in zip(limits, (60, 70, *[seconds] * 3), strict=True)
    )
    if seconds < 20:
        assert not tests and "gpu-tests: not run, no time is left" in done.stdout
    else:
        assert [call.split("-k ")[1].split(" tests/")[0] for call in tests] == [
            *("not out_of_memory and not sanitizer", "out_of_memory", "sanitizer")
        ]
        assert "sanitizer" in calls[-1], "after what is measured"
