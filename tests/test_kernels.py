"""The Triton kernels against the oracle: under Triton's interpreter on any machine, compiled on a CUDA device."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from obce import backends
from obce.h0 import h0, h0_line, r_f

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install triton)"
)

# A process of its own: Triton reads TRITON_INTERPRET when it is imported. n around the tile of 64.
INTERPRETED = """
import numpy as np
import torch
from obce.h0 import h0, h0_line, r_f
from obce.kernels.pairwise import nearest_foreign

def check(points, lengths=None):
    got = h0(points, edges=True, backend="triton", lengths=lengths)
    want = h0(points, edges=True, backend="reference", lengths=lengths)
    assert got.algorithm == "boruvka" and got.backend == "triton"
    assert got.deaths.dtype == want.deaths.dtype
    assert np.array_equal(got.edges, want.edges), (points.shape, points.dtype)
    assert np.array_equal(got.deaths, want.deaths, equal_nan=True), (points.shape, points.dtype)

g = np.random.default_rng(1)
for n, d in ((1, 2), (2, 1), (9, 3), (63, 1), (64, 2), (65, 4), (130, 5)):
    for dtype in (np.float32, np.float64):
        check(g.integers(0, 3, (1, n, d)).astype(dtype))  # ties and duplicates
        check((1e6 + g.standard_normal((1, n, d))).astype(dtype))
check((1e25 * g.standard_normal((2, 20, 3))).astype(np.float32))
check((1e-25 * g.standard_normal((2, 20, 3))).astype(np.float32))
check(np.array([[[3e38], [-3e38], [2e38], [-2.9e38]]], np.float32))  # a gap that overflows
check(g.integers(0, 4, (4, 70, 2)).astype(np.float32), lengths=[70, 1, 65, 13])

broken = g.standard_normal((3, 6, 2))
broken[1, 2, 0] = np.nan
result = h0(broken, edges=True, backend="triton", check=False)
assert np.isnan(result.deaths[1]).all() and (result.edges[1] == -1).all() and np.isfinite(result.deaths[[0, 2]]).all()

values = g.integers(0, 9, (3, 20)) / 4
assert (r_f(values, backend="triton", lengths=[20, 1, 7]) == r_f(values, lengths=[20, 1, 7])).all()
tensor = torch.as_tensor(values, dtype=torch.float32)
result = h0_line(tensor, edges=True, backend="triton")
assert isinstance(result.deaths, torch.Tensor) and torch.equal(result.deaths, h0_line(tensor).deaths)
assert h0(np.zeros((0, 3, 2)), edges=True, backend="triton").edges.shape == (0, 2, 2)

# The kernel alone: weights of rule 1, the smaller index among ties, nothing foreign -> (inf, n).
x = torch.tensor([[[0.0, 0], [1, 0], [0, 1], [5, 5]]])
component = torch.tensor([[0, 1, 2, 0]], dtype=torch.int32)
weight, index = nearest_foreign(x, component, torch.tensor([4], dtype=torch.int32))
assert weight.tolist() == [[1, 1, 1, 41]] and index.tolist() == [[1, 0, 0, 1]]
weight, index = nearest_foreign(x, torch.zeros(1, 4, dtype=torch.int32), torch.tensor([3], dtype=torch.int32))
assert weight.isinf().all() and (index == 4).all()
print("done")
"""


@needs_triton
def test_interpreted_kernel_gives_the_oracles_edges(tmp_path: Path) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    path = [p for p in sys.path if p]
    code = f"import sys\nsys.path[:0] = {path!r}\n{INTERPRETED}"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], env=env, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "done"


# Ahead of time, to PTX, for GPUs that are not here.
COMPILED = """
import json
from itertools import product
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from obce.kernels.pairwise import nearest_foreign_kernel as kernel

names = kernel.arg_names
types = dict.fromkeys(["p_component", "p_lengths", "p_index"], "*i32") | dict(n="i32", d="i32")
result = []
for capability, one, dtype in product((80, 90), (False, True), ("fp32", "fp64")):
    constants = dict(ONE_COORDINATE=one, BM=64, BN=64)
    signature = types | dict.fromkeys(["p_x", "p_weight"], "*" + dtype)
    source = ASTSource(
        fn=kernel,
        signature={k: signature.get(k, "constexpr") for k in names},
        constexprs={(names.index(k),): v for k, v in constants.items()},
    )
    result.append((one, dtype, triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]))
print(json.dumps(result))
"""


@needs_triton
def test_compiled_kernel_makes_weights_by_fma_alone(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    code = f"import sys\nsys.path[:0] = {[p for p in sys.path if p]!r}\n{COMPILED}"
    done = subprocess.run([sys.executable, "-c", code], env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = json.loads(done.stdout)
    assert len(compiled) == 8
    for one_coordinate, dtype, ptx in compiled:
        suffix = dtype.replace("fp", "f")
        assert (f"fma.rn.{suffix}" in ptx) == (not one_coordinate)
        assert f"mul.{suffix}" not in ptx
        assert f"mul.rn.{suffix}" not in ptx


def test_triton_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = backends.BACKENDS["triton"].why_not()
    assert reason in ("triton is not installed", "torch sees no CUDA device")
    with pytest.raises(RuntimeError, match=f"backend names 'triton', which cannot run here: {reason}"):
        h0([[0.0, 1.0], [2.0, 3.0]], backend="triton")


def test_triton_refuses_what_it_has_no_kernel_for() -> None:
    triton = backends.BACKENDS["triton"]
    entries = np.zeros((1, 2, 2))
    assert (
        triton.refuses(backends.Job("matrix", entries, None, "deaths", "auto", 1))
        == "it has no kernel for given matrices"
    )
    assert triton.refuses(backends.Job("cloud", entries, None, "deaths", "prim", 1)) == "it has the algorithm boruvka"
    assert triton.refuses(backends.Job("cloud", entries, None, "edges", "boruvka", 1)) is None


@pytest.mark.gpu
def test_cuda_tensors_are_answered_on_their_device() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    g = np.random.default_rng(2)
    for n, d in ((300, 1), (300, 2), (1000, 8), (257, 64)):
        for dtype in (np.float32, np.float64):
            points = g.integers(-3, 4, (3, n, d)).astype(dtype) if d < 8 else g.standard_normal((3, n, d)).astype(dtype)
            got, want = h0(torch.as_tensor(points).cuda(), edges=True), h0(points, edges=True)
            assert got.deaths.is_cuda and got.edges.is_cuda
            assert np.array_equal(got.edges.cpu().numpy(), want.edges)
            assert np.array_equal(got.deaths.cpu().numpy(), want.deaths)
    values = g.standard_normal((50, 500)).astype(np.float32)
    on_device = torch.as_tensor(values).cuda()
    assert np.array_equal(r_f(on_device).cpu().numpy(), r_f(values))
    assert np.array_equal(h0_line(on_device).deaths.cpu().numpy(), h0_line(values).deaths)
