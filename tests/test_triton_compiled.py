"""The Triton kernels compiled ahead of time for GPUs that are not here: registers, shared memory, instructions."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install triton)"
)

# Compute capability -> bytes of shared memory a program may have.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# The filter's instruction: warpgroup products on Hopper, those of the tensor memory on Blackwell's data-centre parts.
PRODUCT = {90: "HGMMA", 100: "UTCHMMA"}

COMPILED = """
import json, re, subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from obce.kernels import components, filter, pairwise, scaling

tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
folder = Path(sys.argv[1])

def variants(capability):
    pointers = dict.fromkeys(["p_rows", "p_tile_cloud", "p_tile_first", "p_tile_end", "p_row", "p_column"], "*i64")
    pointers |= dict.fromkeys(["p_component", "p_lengths", "p_index"], "*i32")
    for one, dtype in ((False, "fp32"), (True, "fp32"), (False, "fp64")):
        types = pointers | dict.fromkeys(["p_x", "p_weight"], "*" + dtype)
        constants = dict(ONE_COORDINATE=one, BM=64, BN=64)
        warps = pairwise.direct_warps(int(dtype[2:]) // 8)
        name = f"direct {dtype}" + " line" * one
        yield name, pairwise.nearest_foreign_kernel, types, constants, dict(num_warps=warps)
        if not one:
            yield f"pairs {dtype}", pairwise.pair_weights_kernel, types, dict(BP=128), dict(num_warps=4)

    pointers |= dict(p_total="*i64", p_order="*i64") | dict.fromkeys(["p_power", "p_center"], "*fp64")
    pointers |= dict.fromkeys(["p_column", "p_count", "p_list_slot", "p_list_column", "p_unit", "p_coarse"], "*i32")
    for dtype, d in (("fp16", 128), ("fp16", 768), ("fp32", 200)):
        shape = filter.product_shape(d, int(dtype[2:]) // 8)
        units = filter.unit_shape(shape.DP, int(dtype[2:]) // 8, capability)
        types = pointers | dict(p_hat="*" + dtype, gamma="fp32")
        constants = dict(WHOLE=shape.BK == shape.DP, BK=shape.BK, BM=filter.BM, BN=filter.BN, FAR=filter.FAR)
        options = dict(num_warps=shape.num_warps, num_stages=shape.num_stages)
        yield f"filter {dtype} {d}", filter.list_within_kernel, types, constants, options
        constants = dict(WHOLE=units.WHOLE, BK=units.BK, BM=units.BM, BN=units.BN, FAR=filter.FAR)
        constants |= dict(KS=filter._FEW, GROUP=filter._GROUP)
        options = dict(num_warps=units.num_warps, num_stages=units.num_stages)
        for every in (True, False):
            name = f"filter {dtype} {d}" + " all" * every
            constants |= dict(ALL=every, G=units.unit(every))
            options |= dict(maxnreg=units.registers if every else None)
            yield name, filter.nearest_units_kernel, types, constants, options
        types = pointers | dict(p_x="*fp32", p_hat="*" + dtype)
        yield f"copies {dtype} {d}", filter.copies_kernel, types, dict(BP=16, BD=128, FAR=filter.FAR), dict(num_warps=4)
    for dtype in ("fp32", "fp64"):
        types = pointers | dict.fromkeys(["p_x", "p_list_weight", "p_beyond", "p_norm", "p_largest"], "*" + dtype)
        types |= dict(p_list_point="*i32")
        constants = dict(BN=128, G=4, KS=filter._FEW, K=filter.UNITS, KEPT=filter.KEPT, C=64, S=8)
        constants |= dict(BR=filter.PAIRS // (4 * filter.UNITS), ALL=True)
        yield f"lists {dtype}", filter.lists_kernel, types, constants, dict(num_warps=4)
    types = pointers | dict.fromkeys(["p_norm", "p_largest"], "*fp64")
    yield "spread", filter.spread_kernel, types, dict(BP=16, BD=128), dict(num_warps=4)

    for dtype, bits, none in (("fp32", "*i32", 0x7F800001), ("fp64", "*i64", 0x7FF0000000000001)):
        types = dict.fromkeys(["p_label", "p_near", "p_pair", "p_parent", "p_count", "p_edge_cloud"], "*i64")
        types |= dict.fromkeys(["p_list_weight", "p_beyond", "p_weight", "p_edge_weight", "p_x"], "*" + dtype)
        types |= dict(p_list_point="*i32", p_certain="*i8", p_sure="*i8", p_least=bits, p_threat=bits, p_bits=bits)
        types |= dict(p_edge_pair="*i64")
        rounds = dict(BR=components._ROWS, LARGEST=components._LARGEST)
        look = dict(KEPT=filter.KEPT, BR=components._ROWS, LARGEST=none, ROUND=True)
        for kernel, constants in (
            (components.look_kernel, look),
            (components.choose_kernel, dict(BR=components._ROWS)),
            (components.join_kernel, rounds),
            (components.flatten_kernel, rounds | dict(NONE=none)),
            (scaling.largest_kernel, dict(BLOCK=scaling._BLOCK, STEPS=scaling._STEPS)),
        ):
            yield f"rounds {dtype}", kernel, types, constants, dict(num_warps=4)

# Near copies of the others: one target is enough.
FEWER = ("direct fp32 line", "pairs fp64", "filter fp32 200", "copies fp16 128", "copies fp16 768", "rounds fp64")

even = ("d", "dp", "stride")  # multiples of 16
result = []
every = ((capability, *variant) for capability in map(int, sys.argv[2:]) for variant in variants(capability))
for capability, name, kernel, types, constants, options in every:
    if name in FEWER and capability != 90:
        continue
    names = kernel.arg_names
    signature = {
        k: "constexpr" if k in constants else types.get(k, "*fp32" if k.startswith("p_") else "i32") for k in names
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, k in enumerate(names) if k.startswith("p_") or k in even},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    run = lambda tool, *flags: subprocess.run(
        [tools / tool, *flags, cubin], check=True, capture_output=True, text=True
    ).stdout
    usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\\d+)", run("cuobjdump", "-res-usage"))}
    sass = run("nvdisasm", "-c") if name.startswith("filter fp16 128") else ""
    products = sorted(set(re.findall(r"\\b(?:HGMMA|HMMA|UTCHMMA)\\b", sass)))
    ptx = compiled.asm["ptx"]
    float_ops = sorted(set(re.findall(r"\\b((?:fma|mul|add|sub)(?:\\.\\w+)*\\.f(?:32|64)x?2?)\\b", ptx)))
    row = dict(name=name, kernel=kernel.__name__, capability=capability, shared=compiled.metadata.shared)
    result.append(row | dict(version=triton.__version__, usage=usage, products=products, float_ops=float_ops))
print(json.dumps(result))
"""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}
    code = f"import sys\nsys.path[:0] = {[p for p in sys.path if p]!r}\n{COMPILED}"
    command = [sys.executable, "-c", code, str(folder), *map(str, SHARED)]
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    assert len(rows) == 19 * len(SHARED) + 11
    return rows


@needs_triton
def test_no_kernel_spills_or_outgrows_shared_memory(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        where = row["name"], row["kernel"], row["capability"], row["usage"]
        # ptxas of Triton 3.6 keeps 32 bytes of this one kernel outside the registers, on 8.6 and 8.9 only.
        old = row["version"].startswith("3.6") and row["name"] == "direct fp32" and row["capability"] in (86, 89)
        assert row["usage"]["STACK"] <= 32 * old, where
        assert row["usage"]["LOCAL"] == 0, where
        assert row["shared"] <= SHARED[row["capability"]], where
        assert row["usage"]["REG"] <= 255, where


@needs_triton
def test_the_filter_runs_on_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    rows = [row for row in compiled if row["name"].startswith("filter fp16 128")]
    assert len(rows) == 3 * len(SHARED)
    for row in rows:
        assert PRODUCT.get(row["capability"], "HMMA") in row["products"], row


@needs_triton
def test_weights_are_made_by_subtraction_and_fma_alone(compiled: list[dict[str, Any]]) -> None:
    rows = [row for row in compiled if row["name"].startswith(("direct", "pairs", "lists fp32"))]
    assert len(rows) == 4 * len(SHARED) + 2
    for row in rows:
        dtype = "f64" if "fp64" in row["name"] else "f32"
        line = row["name"].endswith("line")
        allowed = {f"{op}.{dtype}" for op in ("sub", "sub.rn")}
        allowed |= set() if line else {f"fma.rn.{dtype}", "sub.f32x2", "fma.rn.f32x2"}
        bounds = row["name"].startswith("lists")  # these are float64
        assert {op for op in row["float_ops"] if not (bounds and op.endswith("f64"))} <= allowed, row
        assert line or any(op.startswith("fma.rn") for op in row["float_ops"]), row
