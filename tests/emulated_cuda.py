"""The CUDA engine on an emulated grid: builds it and, run by hand, shows what notices each barrier that is missing.

    python tests/emulated_cuda.py

takes the barriers of the kernels out one by one, each in a process of its own, and runs every kernel under several
orders of the threads. The exit status is 1 when the answers stay right without one of them.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pybind11
import torch

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "tests" / "csrc" / "emulator"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
ORDERS = 30
SMALL = "9000"  # bytes of shared memory: the coordinates of some of the clouds do not fit


def build() -> Path:
    """The library; kept in build/ until a source changes."""
    sources = [*sorted(ROOT.glob("csrc/ph0_cuda_*.cu")), ROOT / "csrc" / "bind_cuda.cpp", *EMULATOR.glob("*.cpp")]
    read = sorted([*sources, *ROOT.glob("csrc/ph0_c[ou]*.*h"), *EMULATOR.glob("*.h")])
    key = b"".join(path.read_bytes() for path in read) + f"{sys.version} {CXX} {FLAGS}".encode()
    folder = ROOT / "build" / f"emulator-{hashlib.sha256(key).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if library.exists():
        return library
    places = (EMULATOR, ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))
    objects = [str(folder / (source.name + ".o")) for source in sources]
    builds = [
        subprocess.Popen(
            [CXX, *FLAGS, *(f"-I{place}" for place in places), "-x", "c++", "-c", str(source), "-o", target],
            stderr=subprocess.PIPE,
            text=True,
        )
        for source, target in zip(sources, objects, strict=True)
    ]
    for done in builds:
        _, error = done.communicate()
        if done.returncode != 0:
            raise RuntimeError(error[-3000:])
    unfinished = folder / "unfinished"
    subprocess.run([CXX, "-shared", *objects, "-o", str(unfinished)], check=True)
    unfinished.rename(library)
    return library


def load() -> ModuleType:
    """The library as a module to stand in for obce._cuda; not yet in sys.modules."""
    spec = importlib.util.spec_from_file_location("emulated._cuda", build())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def workload(device: str = "cpu") -> Callable[[], list[np.ndarray]]:
    """Calls that go through every kernel; device: "cuda" where there is one (tests/test_gpu.py)."""
    import obce.cuda
    from obce.h0 import h0, h0_distances, h0_line, r_f

    g = np.random.default_rng(0)
    line, half = g.standard_normal((9, 600)).astype(np.float32), torch.as_tensor(g.standard_normal((2, 600))).half()
    half[1] = torch.arange(600) % 40
    half = half.to(device)
    line[4] = 1
    line[5:7] = g.integers(0, 40, (2, 600))  # too many gaps that may be the largest
    # Evenly, so that the widest gap may lie within one lane's look; the second line's is less wide and lies in the
    # other warp's part.
    line[7] = line[8] = np.arange(600) / 600
    line[7][abs(line[7] - 0.75) < 0.006] = 0.1
    line[8][abs(line[8] - 0.25) < 0.004] = 0.1
    points = g.integers(0, 7, (1, 300, 3)).astype(np.float32)
    # A tree of two levels. In order stand a heap at (19, 19) that is one component after a round and fills the leaves
    # of the first node's first warp, points right of it, points above it, and the only ones of the second node. With
    # what the second node's block leaves behind, empty leaves, in place of its others, the first is the heap's alone.
    many = g.integers(0, 20, (1, 1030, 2)).astype(np.float32)
    many[0, :140] = 19
    many[0, 140:500, 0] += 20
    many[0, 500:, 1] += 20
    many[0, 140], many[0, 1024:] = (20, 0), 22
    deep = g.integers(0, 2, (1, 140, 20)).astype(np.float64)
    upper = np.triu(g.integers(1, 50, (1, 290, 290)), 1)
    entries = (upper + upper.transpose(0, 2, 1)).astype(np.float32)

    def run() -> list[np.ndarray]:
        trees = [
            h0(x, edges=True, backend="cuda", algorithm=algorithm)
            for algorithm, clouds in (("prim", (points, deep)), ("boruvka", (points, many, deep)))
            for x in clouds
        ]
        trees += [h0_distances(entries, edges=True, backend="cuda", algorithm="prim")]
        # Few points in threads for many are dealt out twice without a step between.
        trees += [h0(points, lengths=[40], edges=True, backend="cuda", algorithm="prim")]
        forest = obce.cuda.trees(torch.as_tensor(entries, device=device), None, False, True, "boruvka", True)
        return [
            r_f(line, backend="cuda"),
            r_f(np.asfortranarray(line), backend="cuda"),
            r_f(line.astype(np.float64), backend="cuda"),
            h0_line(line, backend="cuda").deaths,
            obce.cuda.lines_r_f(half, None).cpu().numpy(),
            *(np.asarray(part) for tree in trees for part in (tree.edges, tree.deaths)),
            *(part.cpu().numpy() for part in forest),
        ]

    return run


def notice(emulator: ctypes.CDLL, run: Callable[[], list[np.ndarray]], expected: list[np.ndarray]) -> str | None:
    """What shows that a barrier is missing, under the first order that shows it; None when nothing does."""
    for seed in range(ORDERS):
        emulator.emulator_seed(seed)
        os.environ["OBCE_EMULATED_SHARED"] = ("101376", SMALL)[seed % 2]
        try:
            found = run()
        except RuntimeError as error:
            return f"order {seed}: {error}"
        if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(found, expected, strict=True)):
            return f"order {seed}: a wrong answer"
    return None


def in_a_child(question: Callable[[], str | None]) -> str | None:
    """The answer of a forked process, or how it died: without a barrier a kernel may write anywhere."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.write(writer, (question() or "").encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return (answer or None) if status == 0 else f"the process died of signal {-status}"


def main() -> int:
    torch.set_num_threads(1)
    module = sys.modules["obce._cuda"] = load()
    emulator = ctypes.CDLL(str(module.__file__))
    emulator.emulator_seed.argtypes = [ctypes.c_uint64]
    emulator.emulator_site.restype = ctypes.c_char_p
    run = workload()
    expected = run()
    if missed := notice(emulator, run, expected):  # with every barrier in its place
        print(missed)
        return 1
    unnoticed, place = 0, 0
    while (site := emulator.emulator_site(place)) is not None:
        emulator.emulator_skip(place)
        found = in_a_child(lambda: notice(emulator, run, expected))
        print(f"{site.decode()} {'NOT noticed' if found is None else 'noticed: ' + found}")
        unnoticed += found is None
        place += 1
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main())
