"""What holds on a CUDA device; run by `make gpu` and skipped where there is none.

The compiled CUDA engine and the Triton path, each by name, against the CPU engine: `==` on edges and deaths. What does
not need a device is shown on the emulated grid (tests/test_cuda.py) and by Triton's interpreter (test_kernels.py).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import obce
import pytest
import torch
from obce import device, packing
from obce.backends import BACKENDS
from obce.corpus import tokenize
from obce.plan import plan
from obce.prune import prune
from obce.scoring import score
from obce.sensitivity import sensitivity

import test_device
from tiny import equal_scores

if TYPE_CHECKING:
    from transformers import BertModel

TESTS = Path(__file__).parent
HAS_DEVICE = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_DEVICE, reason="no CUDA device here; `make gpu` runs these on one"),
]


def usable(name: str) -> Any:
    reason = BACKENDS[name].why_not() if HAS_DEVICE else None
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))


ENGINES = [usable("cuda"), usable("triton")]
COMPILED = [usable("cuda")]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_both_engines_run_here(backend: str) -> None:
    """What cannot run is left out below; on a machine with a device that is a failure, and this one tells it."""
    assert BACKENDS[backend].why_not() is None


def generator(seed: int) -> torch.Generator:
    return torch.Generator(device="cuda").manual_seed(seed)


def same(found: obce.H0, points: torch.Tensor, **options: Any) -> None:
    """The answer lies on the device and holds the CPU engine's deaths and edges."""
    expected = obce.h0(points.cpu(), edges=True, **options)
    assert found.deaths.device == points.device
    assert torch.equal(found.edges.cpu(), expected.edges)
    assert torch.equal(found.deaths.cpu().nan_to_num(-1), expected.deaths.nan_to_num(-1))


def clouds(B: int, n: int, d: int, dtype: torch.dtype, kind: str) -> torch.Tensor:
    g = generator(n * 1000 + d)
    points = torch.randn(B, n, d, device="cuda", generator=g)
    if kind == "ties":
        points = points.round()
    elif kind == "duplicates":
        points = points[:, torch.randint(0, max(1, n // 3), (n,), device="cuda", generator=g)]
    elif kind == "heaps":
        points = 0.01 * points + 50 * torch.randint(0, 4, (B, n, 1), device="cuda", generator=g)
    return points.to(dtype)


def test_scores_on_the_device_are_those_of_the_cpu(tiny_bert: BertModel, tiny_tokenizer: Any, texts: list[str]) -> None:
    on_cpu = score(tiny_bert, tiny_tokenizer, texts)
    on_gpu = score(tiny_bert.cuda(), tiny_tokenizer, texts)
    assert on_gpu.meta["model_hash"] == on_cpu.meta["model_hash"]
    assert (on_gpu.constant == on_cpu.constant).all()
    np.testing.assert_allclose(on_gpu.columns["std"], on_cpu.columns["std"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(on_gpu.columns["effect_abs"], on_cpu.columns["effect_abs"], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("path", ["kernels", "torch"])
@pytest.mark.parametrize("check", test_device.CHECKS, ids=lambda check: check.__name__)
def test_what_scoring_keeps(check: Any, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "torch":
        monkeypatch.setattr(device, "_kernels", lambda: None)
    check("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 64])
def test_attention_without_padding(dtype: torch.dtype, size: int) -> None:
    assert packing._works(torch.device("cuda"), dtype, size)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_scores_again_are_the_same_bits(
    exact: bool, precision: Any, tiny_bert: BertModel, tiny_tokenizer: Any, texts: list[str]
) -> None:
    settings: dict[str, Any] = {"exact": exact, "precision": precision, "shard_texts": 40, "effect_texts": 0}
    once, again = (score(tiny_bert.cuda(), tiny_tokenizer, texts, **settings) for _ in range(2))
    equal_scores(once, again)


@pytest.mark.parametrize("units", [("query_key", "value", "intermediate"), ("heads", "output")])
def test_a_repaired_model_is_that_of_the_cpu(
    tiny_bert: BertModel, tiny_tokenizer: Any, texts: list[str], units: tuple[str, ...]
) -> None:
    tiny_bert.eval()
    scores = score(tiny_bert, tiny_tokenizer, texts)
    made = plan(scores, keep=0.7, of="encoder", units=units)
    small = prune(tiny_bert, made, texts=texts, tokenizer=tiny_tokenizer)
    batches = tokenize(texts, tiny_tokenizer, max_length=32)
    ways: tuple[tuple[Any, tuple[str, ...]], ...] = (("estimated", units), ("measured", units[:1]))
    here = [sensitivity(tiny_bert, scores, batches, batches, how=how, units=some) for how, some in ways]
    batch = next(iter(batches))
    with torch.no_grad():
        expected = small(**batch.inputs).last_hidden_state
        on_gpu = prune(tiny_bert.cuda(), made, texts=texts, tokenizer=tiny_tokenizer)
        found = on_gpu(**{name: values.cuda() for name, values in batch.inputs.items()}).last_hidden_state
    real = batch.inputs["attention_mask"].bool()
    torch.testing.assert_close(found.cpu()[real], expected[real], rtol=1e-2, atol=1e-2)
    for (how, some), curves in zip(ways, here, strict=True):
        there = sensitivity(tiny_bert, scores, batches, batches, how=how, units=some)
        for name, curve in curves.items():
            np.testing.assert_allclose(there[name], curve, rtol=0.05, atol=1e-3)


class TestLines:
    @pytest.mark.parametrize("backend", COMPILED)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("n", [1, 2, 33, 1000, 5000, 10_240, 10_241, 100_000])
    def test_r_f(self, backend: str, dtype: torch.dtype, n: int) -> None:
        values = torch.randn(200, n, device="cuda", generator=generator(n)).to(dtype)
        values[::3] = values[::3].mul(4).round()
        lengths = torch.randint(1, n + 1, (200,), device="cuda", generator=generator(n))
        wide = values.cpu().to(torch.float64 if dtype == torch.float64 else torch.float32)
        for view, host in ((values, wide), (values.t().contiguous().t(), wide), (values[:, ::3], wide[:, ::3])):
            assert torch.equal(obce.r_f(view, backend=backend).cpu(), obce.r_f(host))
        assert torch.equal(
            obce.r_f(values, lengths=lengths, backend=backend).cpu(), obce.r_f(wide, lengths=lengths.cpu())
        )

    @pytest.mark.parametrize("backend", COMPILED)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("n", [2, 31, 512, 3000, 8192])
    def test_deaths(self, backend: str, dtype: torch.dtype, n: int) -> None:
        values = torch.randn(100, n, device="cuda", generator=generator(n)).to(dtype)
        assert torch.equal(obce.h0_line(values, backend=backend).deaths.cpu(), obce.h0_line(values.cpu()).deaths)

    def test_longer_lines_are_sorted_by_torch_on_the_device(self) -> None:
        values = torch.randn(3, 50_000, device="cuda", generator=generator(1))
        found = obce.h0_line(values)
        assert found.backend == "reference" and found.deaths.is_cuda
        assert torch.equal(found.deaths.cpu(), obce.h0_line(values.cpu()).deaths)


class TestTrees:
    @pytest.mark.parametrize("backend", ENGINES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("kind", ["gauss", "ties", "duplicates", "heaps"])
    @pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 2), (100, 2), (257, 1), (1000, 8), (1024, 16), (600, 70)])
    def test_clouds(self, backend: str, dtype: torch.dtype, kind: str, n: int, d: int) -> None:
        points = clouds(5, n, d, dtype, kind)
        same(obce.h0(points, edges=True, backend=backend), points)
        lengths = torch.tensor([n, 1, max(1, n // 2), max(1, n - 1), min(n, 2)], device="cuda")
        same(obce.h0(points, edges=True, backend=backend, lengths=lengths), points, lengths=lengths.cpu())

    @pytest.mark.parametrize("backend", COMPILED)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("kind", ["gauss", "ties", "heaps"])
    @pytest.mark.parametrize(("n", "d"), [(300, 3), (5000, 2), (20_000, 3), (6000, 24)])
    def test_many_blocks_a_cloud(self, backend: str, dtype: torch.dtype, kind: str, n: int, d: int) -> None:
        points = clouds(2, n, d, dtype, kind)
        found = obce.h0(points, edges=True, backend=backend, algorithm="boruvka")
        assert (found.backend, found.algorithm) == ("cuda", "boruvka")
        same(found, points)

    @pytest.mark.parametrize("backend", COMPILED)
    def test_100_000_clouds(self, backend: str) -> None:
        points = torch.randn(100_000, 64, 3, device="cuda", generator=generator(1))
        same(obce.h0(points, edges=True, backend=backend), points)

    def test_one_cloud_of_a_million_points(self) -> None:
        points = torch.randn(1_000_000, 3, device="cuda", generator=generator(2))
        same(obce.h0(points, edges=True), points)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_16_bit_clouds(self, dtype: torch.dtype) -> None:
        points = torch.randn(4, 500, 6, device="cuda", generator=generator(3)).to(dtype)
        same(obce.h0(points, edges=True), points)

    @pytest.mark.parametrize("backend", COMPILED)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("n", [2, 100, 1024, 5000])
    def test_matrices(self, backend: str, dtype: torch.dtype, n: int) -> None:
        upper = torch.randint(0, 1000, (2, n, n), device="cuda", generator=generator(n)).to(dtype).triu(1)
        upper[1] = torch.where(upper[1] > 10, torch.inf, upper[1]).triu(1)
        entries = upper + upper.mT
        found, expected = obce.h0_distances(entries, edges=True), obce.h0_distances(entries.cpu(), edges=True)
        assert found.backend == backend and found.deaths.is_cuda
        assert torch.equal(found.edges.cpu(), expected.edges)
        assert torch.equal(found.deaths.cpu(), expected.deaths)
        entries[0, 0, 1] += 1
        with pytest.raises(ValueError, match="matrix 0 is not symmetric"):
            obce.h0_distances(entries)

    @pytest.mark.parametrize("metric", ["sqeuclidean", "cosine", "correlation", "manhattan"])
    def test_metrics(self, metric: str) -> None:
        points = torch.randn(3, 300, 5, device="cuda", generator=generator(4))
        same(obce.h0(points, edges=True, metric=metric), points, metric=metric)

    @pytest.mark.parametrize("backend", ENGINES)
    def test_what_is_not_finite(self, backend: str) -> None:
        points = clouds(3, 100, 3, torch.float32, "gauss")
        points[1, 7, 2] = torch.nan
        with pytest.raises(ValueError, match="points: cloud 1, point 7 holds nan"):
            obce.h0(points, backend=backend)
        found = obce.h0(points, edges=True, backend=backend, check=False)
        assert found.deaths[1].isnan().all() and (found.edges[1] == -1).all()
        assert torch.equal(found.edges[[0, 2]].cpu(), obce.h0(points[[0, 2]].cpu(), edges=True).edges)

    @pytest.mark.parametrize("scale", [1e30, 1e-30])
    @pytest.mark.parametrize("backend", ENGINES)
    def test_squares_that_would_overflow(self, backend: str, scale: float) -> None:
        points = clouds(2, 200, 3, torch.float32, "gauss") * scale
        same(obce.h0(points, edges=True, backend=backend), points)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices here")
@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize(("n", "d"), [(300, 3), (600, 16)])
def test_a_device_that_is_not_the_current_one(backend: str, n: int, d: int) -> None:
    points = clouds(3, n, d, torch.float32, "gauss").to("cuda:1")
    same(obce.h0(points, edges=True, backend=backend), points)


class TestStreams:
    def test_another_stream(self) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            points = torch.randn(3, 400, 3, device="cuda", generator=generator(5))
            found = obce.h0(points, edges=True, check=False)
        stream.synchronize()
        same(found, points)

    def test_two_streams_at_once(self) -> None:
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        points = [torch.randn(50, 700, 3, device="cuda", generator=generator(seed)) for seed in (6, 7)]
        torch.cuda.synchronize()
        found: list[list[obce.H0]] = [[], []]
        for _ in range(10):
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    found[i].append(obce.h0(points[i], edges=True, check=False))
        torch.cuda.synchronize()
        for answers, cloud in zip(found, points, strict=True):
            for answer in answers:
                same(answer, cloud)

    @pytest.mark.parametrize("backend", COMPILED)
    @pytest.mark.parametrize("algorithm", ["prim", "boruvka"])
    def test_graph_capture(self, backend: str, algorithm: str) -> None:
        points = torch.randn(2, 600, 3, device="cuda", generator=generator(8))
        values = torch.randn(20, 600, device="cuda", generator=generator(9))

        def call() -> tuple[obce.H0, torch.Tensor]:
            return (
                obce.h0(points, edges=True, check=False, backend=backend, algorithm=algorithm),
                obce.r_f(values, check=False, backend=backend),
            )

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            call()  # sorts allocate their plans the first time
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found, gaps = call()
        points.copy_(torch.randn(2, 600, 3, device="cuda", generator=generator(10)))
        values.copy_(torch.randn(20, 600, device="cuda", generator=generator(11)))
        graph.replay()
        torch.cuda.synchronize()
        same(found, points)
        assert torch.equal(gaps.cpu(), obce.r_f(values.cpu()))


class TestGradients:
    def test_deaths_pull_on_the_ends_of_their_edges(self) -> None:
        points = torch.randn(2, 50, 3, device="cuda", dtype=torch.float64, generator=generator(12))
        points[:, 10] = points[:, 11]  # an edge of length 0 has the gradient 0
        here, there = points.clone().requires_grad_(), points.cpu().clone().requires_grad_()
        obce.h0(here).deaths.square().sum().backward()
        obce.h0(there).deaths.square().sum().backward()
        assert here.grad is not None and there.grad is not None
        torch.testing.assert_close(here.grad.cpu(), there.grad)

    def test_compiled_code(self) -> None:
        @torch.compile(fullgraph=True)
        def loss(points: torch.Tensor) -> torch.Tensor:
            return obce.h0(points).deaths.sum()

        points = torch.randn(2, 80, 3, device="cuda", generator=generator(13), requires_grad=True)
        loss(points).backward()
        assert points.grad is not None and points.grad.isfinite().all()


class TestBadInput:
    @pytest.mark.parametrize("backend", COMPILED)
    def test_out_of_memory_says_what_is_free(self, backend: str) -> None:
        points = torch.randn(1, 2_000_000, 3, device="cuda")
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        hog = torch.empty(free - 60_000_000, dtype=torch.uint8, device="cuda")  # the workspace alone wants more
        with pytest.raises(RuntimeError, match="free bytes, too few for one cloud of 2000000 points"):
            obce.h0(points, backend=backend, algorithm="boruvka")
        del hog
        torch.cuda.empty_cache()
        same(obce.h0(points[:, :5000], edges=True, backend=backend), points[:, :5000])

    def test_lengths_on_another_device(self) -> None:
        points = clouds(2, 30, 2, torch.float32, "gauss")
        same(obce.h0(points, edges=True, lengths=[30, 7]), points, lengths=[30, 7])

    def test_integers(self) -> None:
        points = torch.randint(0, 9, (2, 100, 3), device="cuda", generator=generator(14))
        same(obce.h0(points, edges=True), points)


# argv: tests/, and the device. Where little is shared between multiprocessors a path needs many points: round_level
# more than 32,768, and coordinates that no multiprocessor holds.
SANITIZED = """
import sys
import torch, obce

tests, device = sys.argv[1:]
sys.path.insert(0, tests)
from emulated_cuda import workload

g = torch.Generator(device=device).manual_seed(0)
rand = lambda *size: torch.randn(*size, device=device, generator=g)
values = rand(5, 700)
for x in (values, values.t().contiguous().t(), values.half(), values.bfloat16()):
    obce.cuda.lines_r_f(x, None)
obce.h0_line(values, backend="cuda")
for length in (1_300, 2_600, 5_200, 10_400):
    obce.r_f(rand(2, length), backend="cuda")
for algorithm in ("prim", "boruvka"):
    for points in (rand(2, 150, 2), rand(1, 140, 20).double(), rand(2, 70, 1), rand(2, 300, 9)):
        obce.h0(points, edges=True, lengths=[len(points[0])] * len(points), backend="cuda", algorithm=algorithm)
obce.h0(rand(1, 600, 100), edges=True, backend="cuda", algorithm="prim")
obce.h0(rand(1, 33_000, 2), edges=True, backend="cuda", algorithm="boruvka")
workload(device)()
if device == "cuda":
    obce.h0(rand(1, 300, 16), edges=True, backend="triton")
    torch.cuda.synchronize()
print("done")
"""


def output_of(command: list[str], seconds: float, **variables: str) -> tuple[int, str]:
    """Exit status and what was said; when the time is up the whole group is ended, not the tool alone."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **variables},
    ) as child:
        try:
            said, _ = child.communicate(timeout=seconds)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
    return child.returncode, said


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    """initcheck looks at torch's kernels too, and what these leave unwritten is not ours."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    if importlib.util.find_spec("obce._cuda") is None:
        pytest.skip("obce._cuda is not built")
    command = [sanitizer, f"--tool={tool}", f"--error-exitcode={0 if tool == 'initcheck' else 9}"]
    # Every tensor an allocation of its own, so that what is read beside one is seen.
    status, said = output_of(
        [*command, sys.executable, "-c", SANITIZED, str(TESTS), "cuda"], 120, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
    )
    assert status == 0 and "done" in said, said[-3000:]
    triton = [
        name
        for path in TESTS.parent.glob("kernels/*.py")
        for name in re.findall(r"def (\w+_kernel)\(", path.read_text())
    ]
    ours = re.compile(rf"^=+ +at .*(ph0::cuda::|\b({'|'.join(triton)})\b)", re.MULTILINE)
    assert not ours.search(said), said[-3000:]
