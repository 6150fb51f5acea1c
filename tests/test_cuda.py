"""The CUDA engine without a GPU: its sources on an emulated grid, its union-find on threads, its machine code read.

The emulator (tests/csrc/emulator) compiles the very .cuh and .cu files for the host, runs a block's threads as fibers
in an unfair order, and takes host tensors. Everything between the public functions and the kernels runs as on a
device. Edges and deaths equal those of the CPU engine, `==`.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import obce.cuda
import pytest
import torch
from obce import backends
from obce.h0 import h0, h0_distances, h0_line, r_f

ROOT = Path(__file__).parents[1]
CXX = os.environ.get("CXX", "g++")

needs_compiler = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"there is no {CXX} to build the emulator")


@pytest.fixture(scope="session")
def emulated_module(script: Callable[[str], ModuleType]) -> ModuleType:
    """obce._cuda on the emulated grid."""
    if shutil.which(CXX) is None:
        pytest.skip(f"there is no {CXX} to build the emulator")
    module: ModuleType = script("emulated_cuda").load()
    return module


@pytest.fixture
def emulated(emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """Makes the backend cuda the emulated one; gives the emulator's own functions."""
    monkeypatch.setitem(sys.modules, "obce._cuda", emulated_module)
    assert emulated_module.__file__ is not None
    library = ctypes.CDLL(emulated_module.__file__)
    library.emulator_seed.argtypes = [ctypes.c_uint64]
    library.emulator_site.restype = ctypes.c_char_p
    library.emulator_seed(1)
    return library


def equal(found: Any, expected: Any) -> None:
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def lengths_of(B: int, n: int) -> list[int]:
    return [n, max(1, n // 2), max(1, n - 1), 1, min(n, 2)][:B]


def lines(n: int, dtype: Any, seed: int = 0) -> np.ndarray:
    """Gaussian, with ties, near the ends of the number format, of tiny range far from zero, and constant."""
    g = np.random.default_rng([n, seed])
    x = np.stack([g.standard_normal(n), g.integers(0, 90, n), g.standard_normal(n), g.random(n), np.full(n, -2.5)])
    info = np.finfo(dtype)
    x = x.astype(dtype)
    x[2] *= info.max / (8 if seed % 2 else 2 * max(1, np.abs(x[2]).max()))
    x[3] = info.tiny * x[3] if seed % 2 else 1 + x[3] * info.eps * 8
    return x


@needs_compiler
class TestLines:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("n", [1, 2, 3, 31, 33, 512, 700, 1281, 5121, 10_241])
    def test_r_f(self, emulated: ctypes.CDLL, dtype: Any, n: int) -> None:
        for seed in (0, 1):
            x = lines(n, dtype, seed)
            with np.errstate(over="ignore"):
                equal(r_f(x, backend="cuda"), r_f(x, backend="cpu"))
                ragged = lengths_of(5, n)
                equal(r_f(x, lengths=ragged, backend="cuda"), r_f(x, lengths=ragged, backend="cpu"))

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_values_a_stride_apart(self, emulated: ctypes.CDLL, dtype: Any) -> None:
        x = lines(330, dtype)
        for view in (np.asfortranarray(x), x[::-1], x[:, ::-1], x[:, ::3], np.repeat(x, 9, 0)[::2]):
            equal(r_f(view, backend="cuda"), r_f(view, backend="cpu"))
            equal(h0_line(view, backend="cuda").deaths, h0_line(view, backend="cpu").deaths)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("n", [1, 2, 7, 8, 130, 1000, 10_241])
    def test_r_f_of_16_bit_numbers(self, emulated: ctypes.CDLL, dtype: torch.dtype, n: int) -> None:
        g = torch.Generator().manual_seed(n)
        x = torch.randn(40, n, generator=g)
        x[1::4] = x[1::4].round()
        x[5::8] = torch.arange(n) % 40
        x[2::4] *= 1e4
        x[3::4] *= 1e-7  # half's subnormal numbers
        x[0, : n // 2] = -0.0
        x = x.to(dtype)
        lengths = torch.randint(1, n + 1, (40,), generator=g)
        for values in (x, x.t().contiguous().t(), x[:, :: max(1, n // 3)]):
            m = lengths.clamp(max=values.shape[1])
            equal(obce.cuda.lines_r_f(values, None), r_f(values.float()))
            equal(obce.cuda.lines_r_f(values, m), r_f(values.float(), lengths=m))

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("n", [2, 17, 512, 513, 4000])
    def test_deaths(self, emulated: ctypes.CDLL, dtype: Any, n: int) -> None:
        with np.errstate(over="ignore"):
            for seed in (0, 1):
                x, ragged = lines(n, dtype, seed), lengths_of(5, n)
                found = h0_line(x, lengths=ragged, backend="cuda")
                assert (found.backend, found.algorithm) == ("cuda", "sort")
                equal(found.deaths, h0_line(x, lengths=ragged, backend="cpu").deaths)

    def test_what_is_not_finite_answers_nan_and_the_others_are_right(self, emulated: ctypes.CDLL) -> None:
        for dtype, n in ((torch.float32, 40), (torch.float32, 10_300), (torch.float64, 40), (torch.bfloat16, 40)):
            x = torch.randn(4, n).to(dtype)
            x[1, 3], x[2, n - 1] = torch.nan, -torch.inf
            found = obce.cuda.lines_r_f(x, None)
            assert found.isnan().tolist() == [False, True, True, False]
            equal(found[[0, 3]], r_f(x[[0, 3]].to(found.dtype)))
        with pytest.raises(ValueError, match="values: cloud 1, point 3 holds nan"):
            r_f(np.array([[0.0] * 5, [0, 0, 0, np.nan, 0]]), backend="cuda")

    @pytest.mark.parametrize("B", [1 << 31, 1 << 32])
    def test_more_lines_than_blocks_are_refused(self, emulated_module: ModuleType, B: int) -> None:
        values, space = np.zeros(2, np.float32), np.zeros(64, np.uint8)
        job = emulated_module.Lines(values.ctypes.data, 0, 1, B, 2, 0)
        for call in (emulated_module.lines_r_f, emulated_module.lines_deaths):
            with pytest.raises(ValueError, match=rf"would take {B} x 1 x 1 blocks, expected at most 2147483647 x"):
                call(job, "float32", 0, space.ctypes.data, 0, 0)

    def test_too_long_a_line_is_refused_by_name(self, emulated: ctypes.CDLL) -> None:
        with pytest.raises(ValueError, match="it sorts lines of at most 16384 values"):
            h0_line(np.zeros((1, 16_385), np.float32), backend="cuda")


def clouds(n: int, d: int, dtype: Any, scale: float) -> np.ndarray:
    """Gaussian; a lattice with ties and duplicates; huge; tiny; two heaps."""
    g = np.random.default_rng([n, d])
    x = g.standard_normal((5, n, d))
    x[1] = g.integers(0, 3, (n, d))
    x[2] *= scale
    x[3] /= scale
    x[4] = np.round(x[4], 1) * 1e-3 + g.integers(0, 2, (n, 1)) * 1e3
    return x.astype(dtype)


@needs_compiler
class TestTrees:
    @pytest.mark.parametrize("algorithm", ["prim", "boruvka"])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize(
        ("n", "d"),
        [
            *[(1, 2), (2, 2), (3, 1), (40, 1), (65, 3), (129, 2), (90, 5), (75, 6), (130, 7), (70, 8), (70, 9)],
            *[(257, 4), (100, 16), (90, 37)],
        ],
    )
    def test_edges_equal_those_of_the_cpu(
        self, emulated: ctypes.CDLL, algorithm: str, dtype: Any, n: int, d: int
    ) -> None:
        x = clouds(n, d, dtype, 1e30 if dtype == np.float32 else 1e300)
        for seed, ragged in ((n, None), (n + 1, lengths_of(5, n))):
            emulated.emulator_seed(seed)
            for metric in ("euclidean", "sqeuclidean") if ragged else ("euclidean",):
                found = h0(x, lengths=ragged, edges=True, metric=metric, backend="cuda", algorithm=algorithm)
                expected = h0(x, lengths=ragged, edges=True, metric=metric, backend="cpu")
                assert (found.backend, found.algorithm) == ("cuda", algorithm)
                equal(found.edges, expected.edges)
                equal(found.deaths, expected.deaths)

    @pytest.mark.parametrize("n", [300, 700, 1200, 2100, 4096])
    def test_every_size_of_block(self, emulated: ctypes.CDLL, n: int) -> None:
        g = np.random.default_rng(n)
        for d, dtype in ((3, np.float32), (2, np.float64)) if n < 2000 else ((2, np.float32),):
            x = g.integers(0, 60, (1, n, d)).astype(dtype)
            found = h0(x, edges=True, backend="cuda", algorithm="prim")
            expected = h0(x, edges=True, backend="cpu")
            equal(found.edges, expected.edges)
            equal(found.deaths, expected.deaths)

    @pytest.mark.parametrize("algorithm", ["prim", "boruvka"])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("shared", ["101376", "2000"])
    def test_lengths_of_one_coordinate_that_overflow(
        self, emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, algorithm: str, dtype: Any, shared: str
    ) -> None:
        """An edge of infinite length is one, of the smallest ends: heaps near either end of the number format."""
        monkeypatch.setenv("OBCE_EMULATED_SHARED", shared)
        x = np.random.default_rng(1).choice([-1, -0.99, 0.97, 1], (3, 70, 1)) * np.finfo(dtype).max
        with np.errstate(over="ignore"):
            found = h0(x.astype(dtype), edges=True, lengths=[70, 3, 33], backend="cuda", algorithm=algorithm)
            expected = h0(x.astype(dtype), edges=True, lengths=[70, 3, 33], backend="cpu")
        assert np.isinf(expected.deaths).any()
        equal(found.edges, expected.edges)
        equal(found.deaths, expected.deaths)

    @pytest.mark.parametrize("algorithm", ["prim", "boruvka"])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_squares_in_the_subnormal_range_are_rounded_once(
        self, emulated: ctypes.CDLL, algorithm: str, dtype: Any
    ) -> None:
        """In clouds of all small magnitudes an edge of a little more than 4.5 least numbers, so 5 and not 4."""
        info = np.finfo(dtype)
        least = info.minexp - info.nmant
        side = 3 * 2.0 ** ((least - 1) // 2)  # its square is 4.5, or half of that where the exponent is odd
        near = [side, side * ((least - 1) % 2), side / 2 ** ((info.nmant + 1) // 2), 0]
        exponents = range(*((-70, -31) if dtype == np.float32 else (-530, -201)))
        x = np.array([[[0] * 4, near, [0, 0, 0, 2.0**e]] for e in exponents], dtype)
        found = h0(x, metric="sqeuclidean", backend="cuda", algorithm=algorithm).deaths
        assert (found[:, 0] == 5 * 2.0**least).all()
        equal(found, h0(x, metric="sqeuclidean", backend="cpu").deaths)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_coordinates_that_do_not_fit_a_multiprocessor(
        self, emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, dtype: Any
    ) -> None:
        monkeypatch.setenv("OBCE_EMULATED_SHARED", "9000")
        x = clouds(150, 30, dtype, 1e30)
        ragged = lengths_of(5, 150)
        found = h0(x, lengths=ragged, edges=True, backend="cuda", algorithm="prim")
        equal(found.edges, h0(x, lengths=ragged, edges=True, backend="cpu").edges)

    def test_tiles_that_are_left_out(self, emulated: ctypes.CDLL) -> None:
        """More tiles than a block tests at a time, and clusters far apart: most of them are never read."""
        g = np.random.default_rng(5)
        n, d = 17_000, 9
        x = (np.arange(n)[:, None] // 40 * 50 + g.integers(0, 3, (n, d)))[None].astype(np.float64)
        found = h0(x, edges=True, backend="cuda", algorithm="boruvka")
        expected = h0(x, edges=True, backend="cpu")
        equal(found.edges, expected.edges)
        equal(found.deaths, expected.deaths)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize(("n", "d"), [(1025, 1), (2100, 2), (1300, 3), (1100, 4)])
    def test_leaves_under_two_levels(self, emulated: ctypes.CDLL, dtype: Any, n: int, d: int) -> None:
        """Clusters, ties on a lattice, many duplicates, outliers; whole nodes lie beyond the lengths."""
        g = np.random.default_rng(n)
        x = g.standard_normal((4, n, d))
        x[0] += g.integers(0, 4, (n, 1)) * 50
        x[1] = g.integers(0, 9, (n, d))
        x[2] = g.integers(0, 2, (n, d)) * 0.1
        x[3] **= 5
        x = x.astype(dtype)
        for seed, lengths in ((1, None), (2, [40, n, n - 1000, n - 1])):
            emulated.emulator_seed(seed)
            found = h0(x, lengths=lengths, edges=True, backend="cuda", algorithm="boruvka")
            expected = h0(x, lengths=lengths, edges=True, backend="cpu")
            equal(found.edges, expected.edges)
            equal(found.deaths, expected.deaths)

    def test_leaves_under_three_levels(self, emulated: ctypes.CDLL) -> None:
        g = np.random.default_rng(7)
        x = np.round(g.standard_normal((1, 33_500, 2)), 2).astype(np.float32) + g.integers(0, 3, (1, 33_500, 1)) * 20
        found = h0(x, edges=True, backend="cuda", algorithm="boruvka")
        expected = h0(x, edges=True, backend="cpu")
        equal(found.edges, expected.edges)
        equal(found.deaths, expected.deaths)

    @pytest.mark.parametrize("algorithm", ["prim", "boruvka"])
    def test_what_is_not_finite(self, emulated: ctypes.CDLL, algorithm: str) -> None:
        x = clouds(70, 3, np.float32, 1.0)
        x[1, 5, 2], x[3, 69, 0], x[4, 60, 1] = np.nan, np.inf, np.nan
        lengths = [70, 70, 70, 70, 60]  # the last NaN is padding
        found = h0(x, lengths=lengths, edges=True, backend="cuda", algorithm=algorithm, check=False)
        expected = h0(x, lengths=lengths, edges=True, backend="cpu", check=False)
        equal(found.edges, expected.edges)
        equal(found.deaths, expected.deaths)
        with pytest.raises(ValueError, match="points: cloud 1, point 5 holds nan"):
            h0(x, lengths=lengths, backend="cuda", algorithm=algorithm)

    @pytest.mark.parametrize("algorithm", ["prim", "boruvka"])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("n", [1, 2, 33, 150])
    def test_matrices(self, emulated: ctypes.CDLL, algorithm: str, dtype: Any, n: int) -> None:
        g = np.random.default_rng(n)
        entries = g.integers(0, 30, (4, n, n)).astype(dtype)
        entries[1][g.random((n, n)) < 0.97] = np.inf  # a forest
        entries[2][g.random((n, n)) < 0.1] = np.nan
        entries[3] -= 9
        entries = np.where(np.tri(n, dtype=bool), entries.transpose(0, 2, 1), entries)
        entries[:, np.arange(n), np.arange(n)] = 0
        for lengths in (None, lengths_of(4, n)):
            counts = None if lengths is None else torch.as_tensor(lengths)
            found = obce.cuda.trees(torch.as_tensor(entries), counts, False, True, algorithm, True)
            expected = h0_distances(entries, lengths=lengths, edges=True, check=False, backend="cpu")
            equal(found[1], expected.edges)
            equal(found[0], expected.deaths)
        checked = entries[:2]
        equal(h0_distances(checked, backend="cuda").deaths, h0_distances(checked, backend="cpu").deaths)
        if n > 2:
            with pytest.raises(ValueError, match=r"matrix 0 has nan at \[0, \d+\], expected a distance"):
                h0_distances(entries[2:], backend="cuda")

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("n", [260, 301])
    def test_rows_of_a_matrix_that_are_read_again(self, emulated: ctypes.CDLL, dtype: Any, n: int) -> None:
        """Clusters of more points than a row lists, alone and with ties, and a forest of such clusters."""
        g = np.random.default_rng(n)
        heap = g.integers(0, 4, n)
        apart = heap[:, None] != heap
        entries = np.stack([g.random((n, n)) + 3 * apart, g.integers(0, 4, (n, n)) + 2.0 * apart, g.random((n, n))])
        entries[2][apart] = np.inf
        entries = np.where(np.tri(n, dtype=bool), entries.transpose(0, 2, 1), entries).astype(dtype)
        for lengths in (None, torch.tensor([n, n - 3, n // 2])):
            found = obce.cuda.trees(torch.as_tensor(entries), lengths, False, True, "boruvka", True)
            counts = None if lengths is None else lengths.tolist()
            expected = h0_distances(entries, lengths=counts, edges=True, check=False, backend="cpu")
            equal(found[1], expected.edges)
            equal(found[0], expected.deaths)

    def test_a_batch_is_halved_when_memory_runs_out(
        self, emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x = clouds(60, 2, np.float32, 1.0)
        empty, asked = torch.empty, []

        def full(*size: Any, **options: Any) -> torch.Tensor:
            if options.get("dtype") == torch.uint8:
                asked.append(size[0])
                if size[0] > limit:
                    raise torch.OutOfMemoryError("Tried to allocate 1.00 GiB.")
            return empty(*size, **options)

        expected = h0(x, edges=True, backend="cuda", algorithm="boruvka")
        limit = 20_000
        monkeypatch.setattr(torch, "empty", full)
        found = h0(x, edges=True, backend="cuda", algorithm="boruvka")
        assert max(asked) > limit > min(asked)
        equal(found.edges, expected.edges)
        limit = 10
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (12_345, 99_999))
        with pytest.raises(RuntimeError, match="the device has 12345 free bytes, too few for one cloud of 60 points"):
            h0(x, backend="cuda", algorithm="boruvka")


@needs_compiler
def test_a_barrier_that_is_missing_is_noticed(emulated_module: ModuleType) -> None:
    """Every barrier of the kernels, taken out alone, gives a wrong answer or a deadlock under some order."""
    command = [sys.executable, str(ROOT / "tests" / "emulated_cuda.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    written = "".join(path.read_text("utf-8") for path in ROOT.glob("csrc/*.cuh"))
    assert done.stdout.count(" noticed: ") == written.count("__syncthreads();") > 15


def built_with_threads(name: str, folder: Path, *flags: str) -> Path | None:
    """A program of tests/csrc, or None where it cannot be built or started like this."""
    program = folder / name
    sources = [ROOT / "tests" / "csrc" / f"{name}.cpp", ROOT / "csrc" / "ph0_cpu_watch.cpp"]
    command = [CXX, "-std=c++17", *flags, *map(str, sources), "-o", str(program), "-pthread"]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        return None
    return program


@needs_compiler
@pytest.mark.parametrize("flags", [("-O3",), ("-O1", "-g", "-fsanitize=thread")], ids=["optimised", "watched"])
def test_union_find_under_threads(tmp_path: Path, flags: tuple[str, ...]) -> None:
    program = built_with_threads("union_find", tmp_path, *flags)
    if program is None:
        pytest.skip(f"{CXX} does not build with {' '.join(flags)} here")
    env = {"TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([program], capture_output=True, text=True, check=False, env=env)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not run in this kernel's memory layout")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]


@needs_compiler
def test_threads_that_find_no_memory(tmp_path: Path) -> None:
    program = built_with_threads("threads", tmp_path, "-O1")
    if program is None:
        pytest.skip(f"{CXX} does not build it here")
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]


# Shared memory a block may ask for, CUDA C++ Programming Guide, table of compute capabilities.
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


@pytest.fixture(scope="session")
def machine_code() -> Callable[..., str]:
    """cuobjdump on the built obce._cuda."""
    spec = importlib.machinery.PathFinder.find_spec("obce._cuda", obce.__path__)
    if spec is None or spec.origin is None:
        if os.environ.get("OBCE_CUDA") != "0" and shutil.which("nvcc"):
            pytest.fail("nvcc is here, and obce._cuda was not built with it; reinstall obce with OBCE_CUDA=1")
        pytest.skip("obce._cuda is not built here: there is no nvcc, or OBCE_CUDA=0")
    tool = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if tool is None and triton is not None and triton.origin is not None:
        carried = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        tool = str(carried) if carried.exists() else None
    if tool is None:
        pytest.skip("there is no cuobjdump here (the CUDA toolkit and triton bring it)")

    def dump(*options: str) -> str:
        done = subprocess.run([tool, *options, spec.origin], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    return dump


def test_machine_code_is_there_for_every_target(machine_code: Callable[..., str]) -> None:
    assert set(re.findall(r"sm_(\d+)\.cubin", machine_code("--list-elf"))) >= {str(arch) for arch in SHARED_LIMIT}
    assert set(re.findall(r"sm_(\d+)\.ptx", machine_code("--list-ptx"))) == {"90"}


def test_kernels_spill_nothing_and_fit_their_targets(machine_code: Callable[..., str]) -> None:
    kernels = defaultdict(set)
    arch = 0
    for line in machine_code("-res-usage").splitlines():
        if found := re.search(r"arch = sm_(\d+)", line):
            arch = int(found[1])
        elif found := re.search(r"Function (\S+):", line):
            name = found[1]
        elif "REG:" in line:
            used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            kernels[arch].add(name)
            assert used["STACK"] == used["LOCAL"] == 0, (arch, name, used)
            assert used["SHARED"] <= SHARED_LIMIT[arch] << 10, (arch, name, used)
    assert len(kernels[90]) > 80
    assert all(names == kernels[90] for names in kernels.values())


@needs_compiler
def test_what_prim_declares_is_counted(
    machine_code: Callable[..., str], emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cloud lies in shared memory where it and what the kernel declares fit, and not with a byte less."""
    usage = re.findall(
        r"Function (\S*prim_kernelI[fd]\S*):\n.*?SHARED:(\d+)", machine_code("-res-usage", "-arch", "sm_90")
    )
    for letter, number, size in (("f", "float32", 4), ("d", "float64", 8)):
        declared = {int(shared) - 1024 for name, shared in usage if f"prim_kernelI{letter}" in name}  # of the system
        job = emulated_module.Trees(0, 1, 65, 100, 0, False, 0, 0)
        asked = 65 * 100 * size + 67 * 2 * size  # coordinates, and spread(64) + 1 keys
        for missing in (0, 1):
            monkeypatch.setenv("OBCE_EMULATED_SHARED", str(asked + max(declared) - missing))
            assert (emulated_module.prim_workspace(job, number, 0) > 0) == bool(missing), number


def test_code_of_hopper(machine_code: Callable[..., str]) -> None:
    """No loop around a 64-bit exchange where 32-bit minima do, wide loads of 16-bit numbers, no unfused chain."""
    parts = re.split(r"Function : ", machine_code("-sass", "-arch", "sm_90"))[1:]
    code = {part.split("\n", 1)[0].strip(): part for part in parts}
    floats = [text for name, text in code.items() if "Ef" in name or "If" in name]
    assert len(floats) > 40
    assert not any("CAST.SPIN" in text for text in floats)
    assert all("REDUX" in text or "CREDUX" in text for name, text in code.items() if "prim_kernel" in name)
    for name, text in code.items():
        if "prim_kernelIfLi256ELi8ELi8E" in name:
            assert text.count("FFMA") >= 64


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
class TestWithoutADevice:
    def test_the_module_imports_and_says_why_it_cannot_run(self) -> None:
        try:
            import obce._cuda as cuda
        except ImportError:
            pytest.skip("obce._cuda is not built here: there is no nvcc")
        assert not cuda.emulated
        reason = cuda.why_not()
        assert re.match(r"there is no NVIDIA driver$|cudaError\w+: \w", reason)
        assert obce.cuda.why_not() == reason
        with pytest.raises(RuntimeError, match=r"^cuda\w+ failed: cudaError\w+, .*\.$"):
            cuda.device_limits(0)
        with pytest.raises(RuntimeError, match=f"backend names 'cuda', which cannot run here: {re.escape(reason)}"):
            h0([[0.0, 1.0], [2.0, 3.0]], backend="cuda")

    def test_without_the_module_the_reason_says_how_to_build_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "obce._cuda", None)
        with pytest.raises(RuntimeError, match=r"obce\._cuda is not built .*; install CUDA's nvcc and reinstall obce"):
            r_f([[0.0, 1.0]], backend="cuda")
        assert r_f([[0.0, 1.0]]) == 1


@needs_compiler
class TestDispatch:
    def test_what_has_no_kernel_is_refused_by_name(self, emulated: ctypes.CDLL) -> None:
        points = np.zeros((1, 3, 2))
        for call, reason in (
            (lambda: h0(points, metric="manhattan", backend="cuda"), "it has no kernel for the metric manhattan"),
            (
                lambda: h0(points, algorithm="kdtree", backend="cuda"),
                "it has the algorithms prim and boruvka for trees",
            ),
            (lambda: h0_distances(np.ones(3), backend="cuda"), "it has no kernel for a condensed"),
            (
                lambda: h0(np.zeros((1, 5000, 2)), algorithm="prim", backend="cuda"),
                "it does at most 4096 points by prim; ask for boruvka or auto",
            ),
        ):
            with pytest.raises(ValueError, match=reason):
                call()

    @pytest.mark.parametrize(
        ("shape", "algorithm"),
        [
            ((1, 1024, 2), "prim"),
            ((1, 1025, 2), "boruvka"),
            ((64, 4096, 2), "prim"),
            ((64, 4097, 2), "boruvka"),
            ((9, 500, 60), "boruvka"),  # 120 KB of coordinates
            ((9, 128, 600), "prim"),
        ],
    )
    def test_auto_goes_by_points_clouds_and_coordinates(
        self, emulated: ctypes.CDLL, shape: tuple[int, ...], algorithm: str
    ) -> None:
        points = torch.zeros(1, 1, 1).expand(shape)
        assert obce.cuda.choose(points, False, "auto") == algorithm
        assert obce.cuda.choose(points, False, "prim") == "prim"
        assert obce.cuda.choose(torch.zeros(1, 1, 1).expand(3, 1000, 1000), True, "auto") == "prim"

    def test_kinds_of_input(self, emulated: ctypes.CDLL) -> None:
        g = np.random.default_rng(3)
        points = g.integers(-9, 9, (2, 50, 3))
        expected = h0(points, edges=True, backend="cpu")
        read_only = points.astype(np.float64)
        read_only.flags.writeable = False
        for same in (points, torch.as_tensor(points), read_only, read_only[:, ::-1][:, ::-1], points.tolist()):
            found = h0(same, edges=True, backend="cuda")
            assert type(found.deaths) is (torch.Tensor if isinstance(same, torch.Tensor) else np.ndarray)
            equal(found.edges, expected.edges)
        half = torch.as_tensor(points).to(torch.bfloat16)
        found = h0(half, edges=True, backend="cuda")
        assert found.deaths.dtype == torch.float32
        equal(found.edges, expected.edges)
        assert h0(np.zeros((0, 3, 2)), edges=True, backend="cuda").edges.shape == (0, 2, 2)
        limited = h0(points, max_edge=3.0, edges=True, backend="cuda")
        equal(limited.edges, h0(points, max_edge=3.0, edges=True, backend="cpu").edges)
        equal(limited.deaths, h0(points, max_edge=3.0, backend="cpu").deaths)

    @pytest.mark.parametrize("algorithm", ["prim", "boruvka"])
    def test_gradients(self, emulated: ctypes.CDLL, algorithm: str) -> None:
        points = torch.randn(2, 40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        points[:, 4] = points[:, 9]
        grads = []
        for backend in ("cuda", "cpu"):
            x = points.clone().requires_grad_()
            h0(
                x, backend=backend, algorithm=algorithm if backend == "cuda" else "auto"
            ).deaths.square().sum().backward()
            grads.append(x.grad)
        assert torch.equal(*grads)


def test_large_clouds_of_many_coordinates_go_to_tensor_cores_first() -> None:
    def order(*shape: int) -> tuple[str, ...]:
        points = torch.empty(shape, device="meta")  # neither on the host nor of numbers
        return backends._order(backends.Job("cloud", points, None, "deaths", "auto", 1))

    assert order(1, 4097, 16) == ("triton", "cuda", "cpu", "reference")
    assert order(1, 4097, 15) == order(1, 4096, 16) == ("cuda", "triton", "cpu", "reference")
