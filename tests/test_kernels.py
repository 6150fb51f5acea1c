"""The Triton kernels against the oracle: under Triton's interpreter on any machine, compiled on a CUDA device."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from obce import backends, reference
from obce.h0 import h0, h0_line, r_f

Array = reference.Array

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install triton)"
)

# The interpreter of Triton 3.6 multiplies and then adds where `tl.fma` rounds once; only squares are asked for here.
ROUND_ONCE = """
import numpy as np
from triton.runtime import interpreter
from obce import reference

one, tiny = (interpreter.TensorHandle(np.array([v], np.float32), interpreter.tl.float32) for v in (1 + 2.0**-12, -1.0))
if interpreter.InterpreterBuilder.create_fma(None, one, one, tiny).data[0] != 2.0**-11 + 2.0**-24:
    def create_fma(self, x, y, z):
        assert x is y
        square = reference._square_add(x.data.ravel(), z.data.ravel()).reshape(z.data.shape)
        return interpreter.TensorHandle(square, z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma

# With numpy 2.4 and later that interpreter cannot take a bound of a loop from an array of one number.
if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor
"""

# A process of its own: Triton reads TRITON_INTERPRET when it is imported. n around the tile of 64.
INTERPRETED = """
import numpy as np
import torch
from obce.h0 import h0, h0_line, r_f
from obce.kernels import components
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

# As many clouds at a time as a launch has blocks for, on the device of the data.
guarded, sizes = [], []

class Guard:
    def __init__(self, tensor):
        self.tensor = tensor
    def __enter__(self):
        guarded.append(self.tensor)
    def __exit__(self, *_):
        guarded.pop()

def search(x, lengths, real=components.Search):
    assert guarded[-1].device == x.device
    sizes.append(len(x))
    return real(x, lengths)

torch.cuda.device_of, components.Search, components._CLOUDS = Guard, search, 2
clouds = g.integers(0, 4, (5, 9, 2)).astype(np.float32)
check(clouds)
check(clouds, lengths=[9, 1, 5, 2, 8])
assert sizes == [2, 2, 1] * 2

# The kernel alone: weights of rule 1, the smaller index among ties, nothing foreign -> (inf, n).
x = torch.tensor([[[0.0, 0], [1, 0], [0, 1], [5, 5]]])
component = torch.tensor([[0, 1, 2, 0]], dtype=torch.int32)
weight, index = nearest_foreign(x, component, torch.tensor([4], dtype=torch.int32))
assert weight.tolist() == [[1, 1, 1, 41]] and index.tolist() == [[1, 0, 0, 1]]
weight, index = nearest_foreign(x, torch.zeros(1, 4, dtype=torch.int32), torch.tensor([3], dtype=torch.int32))
assert weight.isinf().all() and (index == 4).all()
print("done")
"""


def interpret(code: str, tmp_path: Path) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    path = [p for p in sys.path if p]
    code = f"import sys\nsys.path[:0] = {path!r}\n{ROUND_ONCE}{code}"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], env=env, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "done"


@needs_triton
def test_interpreted_kernel_gives_the_oracles_edges(tmp_path: Path) -> None:
    interpret(INTERPRETED, tmp_path)


# The filter on every cloud it can hold, also small ones; columns in one part and in several; lists that overflow.
FILTERED = """
import numpy as np
import torch
from obce.h0 import h0
from obce.kernels import components, filter, pairwise

components.FILTER_POINTS = 2
components.FILTER_COORDINATES = {torch.float32: 2, torch.float64: 2}
filter.PAIRS = 8192  # the interpreter is slow for each program
made = []

class Filter(filter.Filter):
    CAPACITY = filter.CAPACITY
    lists = overflows = 0

    def __init__(self, x, lengths):
        super().__init__(x, lengths)
        self.capacity = self.CAPACITY
        made.append(self.hat.dtype)

    def _list(self, *args):
        result = super()._list(*args)
        Filter.lists += 1
        Filter.overflows += result[0] > self.capacity
        return result

components.Filter = Filter

def equal(points, lengths=None):
    before = len(made)
    got = h0(points, edges=True, backend="triton", lengths=lengths)
    want = h0(points, edges=True, backend="reference", lengths=lengths)
    assert len(made) == before + (points.shape[1] > 1)
    return np.array_equal(got.edges, want.edges) and np.array_equal(got.deaths, want.deaths, equal_nan=True)

def check(points, lengths=None):
    assert equal(points, lengths), (points.shape, points.dtype, points.flat[0])

g = np.random.default_rng(3)
def clusters(n, d, radius):
    return 3 * g.standard_normal((5, d))[g.integers(0, 5, n)] + radius * g.standard_normal((n, d))

for n, d in ((1, 16), (2, 16), (3, 70), (64, 33), (65, 17)):
    for dtype in (np.float32, np.float64):
        check(g.standard_normal((1, n, d)).astype(dtype))
        check((g.integers(0, 3, (1, n, d)) * (g.random((1, n, 1)) < 0.8)).astype(dtype))  # ties and duplicates
for dtype in (np.float32, np.float64):
    check((1e6 + g.standard_normal((1, 70, 16))).astype(dtype))
    check(clusters(60, 20, 1e-3)[None].astype(dtype))
check(1e-9 * g.standard_normal((1, 60, 18)) + 1)  # differences far below what the copies keep of the points
check((1e25 * g.standard_normal((1, 70, 18))).astype(np.float32))
check((1e-25 * g.standard_normal((1, 70, 18))).astype(np.float32))
check(1e200 * g.standard_normal((1, 70, 18)))
constant = np.ones((1, 40, 17), np.float32)
constant[:, :, 3] = 1e-22 * g.standard_normal(40)  # squares that vanish beside a constant coordinate
check(constant)
check(np.zeros((1, 70, 16), np.float32))
check(g.standard_normal((3, 150, 16)).astype(np.float32), lengths=[150, 1, 33])
broken = g.standard_normal((2, 30, 16))
broken[1, 2, 0] = np.inf
result = h0(broken, edges=True, backend="triton", check=False)
assert np.isnan(result.deaths[1]).all() and np.isfinite(result.deaths[0]).all()
assert set(made) == {torch.float16}
far = g.standard_normal((1, 80, 16)).astype(np.float32)
far[0, :3] *= 1e8  # float16 copies of the others would be nothing
check(far)
assert made[-1] == torch.float32

check(g.standard_normal((1, 130, 130)).astype(np.float32))

pairwise.PROGRAMS = 1  # one part of several blocks
check(clusters(150, 20, 0.1)[None].astype(np.float32))
check(g.standard_normal((2, 130, 5)).astype(np.float32), lengths=[130, 70])
pairwise.PROGRAMS = 1024

assert Filter.lists and not Filter.overflows
Filter.CAPACITY = 40
mixed = np.concatenate([clusters(90, 20, 1e-4), g.standard_normal((30, 20)).repeat(2, 0)])[None].astype(np.float32)
check(mixed)
assert Filter.overflows > 1
Filter.CAPACITY = 1
check(g.integers(0, 2, (1, 70, 16)).astype(np.float32))
Filter.CAPACITY = filter.CAPACITY

hat = torch.as_tensor(g.standard_normal((70, 192)).astype(np.float16))
assert filter.product_error(hat) < 0.01  # plain float32 sums; tests marked gpu measure tensor cores
assert filter.product_error(filter.rounded_to_tf32(hat[:, :64].float())) < 0.01

# A device whose products err by more than the proof allows is not trusted with the filter.
assert filter.product_holds(torch.device("cpu"))
filter.product_holds.cache_clear()
trusted, filter.product_error = filter.product_error, lambda hat: 0.6
before = len(made)
assert not filter.product_holds(torch.device("cpu"))
points = g.standard_normal((1, 70, 16)).astype(np.float32)
expected = h0(points, edges=True, backend="reference")
assert np.array_equal(h0(points, edges=True, backend="triton").edges, expected.edges) and len(made) == before
filter.product_error = trusted
filter.product_holds.cache_clear()

# Without its bound the filter loses edges: the tests above can fail.
class Blind(Filter):
    def __init__(self, x, lengths):
        super().__init__(x, lengths)
        self.hat = torch.round(self.hat * 8) / 8
        self.norm = (self.hat.float() ** 2).sum(2)
        self.term = torch.where(self.term < filter.FAR / 2, self.norm, self.term)
        self.gamma = 0.0
        for part in (self.residual, self.block_residual, self.unit_residual):
            part.zero_()

filter.UNITS = 2  # with as many as usual nearly all of these points are weighed
points = g.standard_normal((1, 250, 16)).astype(np.float32)
check(points)
components.Filter = Blind
assert not equal(points)
print("done")
"""


@needs_triton
@pytest.mark.slow
def test_interpreted_filter_gives_the_oracles_edges(tmp_path: Path) -> None:
    interpret(FILTERED, tmp_path)


def tensor_core(a: Array, b: Array, terms: int) -> Array:
    """Products [n, n] of the rows of a and b [n, d] as tensor cores add them: every term of a step, and the sum, cut.

    float32 results; `terms` products and the sum so far are aligned to the largest and lose what is below its last
    place (Fasi, Higham, Mikaitis, Pranesh 2021).
    """
    total = np.zeros((len(a), len(b)))
    for k in range(0, a.shape[1], terms):
        part = a[:, None, k : k + terms].astype(np.float64) * b[None, :, k : k + terms].astype(np.float64)
        part = np.concatenate([part, total[:, :, None]], 2)
        place = np.ldexp(1.0, np.frexp(np.abs(part).max(2))[1] - 24)
        total = (np.trunc(part / place[:, :, None]) * place[:, :, None]).sum(2)
        place = np.ldexp(1.0, np.frexp(np.abs(total))[1] - 24)
        total = np.trunc(total / place) * place
    return total


def adversaries() -> list[Array]:
    g = np.random.default_rng(4)
    ties = np.ldexp(1 + np.ldexp(g.integers(0, 1 << 11, (24, 40)) * 2 + 1.0, -12), g.integers(-3, 1, (24, 40)))
    outlier = g.standard_normal((24, 32))
    outlier[0] *= 3e4
    positive = 1 - 1e-3 * g.random((16, 1024))
    clouds = [
        g.standard_normal((24, 16)),
        g.standard_normal((16, 1024)),
        ties,  # operands half way between two of the format
        outlier,
        np.concatenate([positive, -positive + 1e-4 * g.random((16, 1024))]),  # every cut of a sum goes the same way
        1e4 + g.standard_normal((24, 70)),
        3 * g.standard_normal((24, 1)).repeat(64, 1) + 1e-5 * g.standard_normal((24, 64)),
        2.0**-40 * g.standard_normal((24, 20)),
        np.where(g.random((24, 50)) < 0.5, 1e-12, 1.0) * g.standard_normal((24, 50)),
        g.integers(-2, 3, (24, 33)).astype(np.float64),
    ]
    clouds[0][1] = clouds[0][0] * (1 + 1e-6)
    return [cloud.astype(dtype) for cloud in clouds for dtype in (np.float32, np.float64)]


# Copies, norms and lists are the kernels' own; products are rounded and truncated as tensor cores do.
BOUND = """
import numpy as np
import torch
from obce import reference
from obce.kernels import filter
from test_kernels import adversaries, tensor_core

filter.PAIRS = 8192
copy, used = filter.Filter._copy, []
filter.Filter._copy = lambda self, _: copy(self, torch.DTYPE)
for cloud in adversaries():
    x, _ = reference.scaled(cloud)
    n, d = x.shape
    it = filter.Filter(torch.as_tensor(x)[None], torch.tensor([n], dtype=torch.int32))
    lists = it.empty_lists()
    it.list_all(lists)
    order = it.order[0].numpy()
    weights = np.stack([reference.weights(x, i) for i in range(n)])
    np.fill_diagonal(weights, np.inf)
    for i in range(n):
        point = lists.point[i].numpy()
        point = point[point >= 0]
        assert len(set(point)) == len(point) and i not in point
        assert (lists.weight[i].numpy()[: len(point)] == weights[i, point]).all()
        assert (np.lexsort((point, weights[i, point])) == np.arange(len(point))).all()
        assert (np.delete(weights[i], point) >= lists.beyond[i].item()).all()
    x, weights = x[order], weights[order][:, order]
    np.fill_diagonal(weights, 0)
    hat = it.hat[0, :n, :d].numpy().astype(np.float64)
    norm, residual, term = (part[0, :n].numpy().astype(np.float64) for part in (it.norm, it.residual, it.term))
    difference = x[:, None].astype(np.longdouble) - x[None].astype(np.longdouble)
    distance = np.sqrt((difference**2).sum(2)) * np.ldexp(np.longdouble(1), -int(it.exponent[0]))
    rounded = np.sqrt(((hat[:, None] - hat[None]).astype(np.longdouble) ** 2).sum(2))
    slack = residual[:, None] + residual
    assert (np.abs(distance - rounded) <= slack).all()
    assert (slack - np.abs(distance - rounded) >= 2.0**-50).all()
    assert (np.abs(norm - (hat**2).sum(1)) <= 2.0**-23 * norm).all()
    g = filter.unit_gamma(d)
    assert (np.abs(term - norm * (1 - g)) <= 2.0**-22 * norm).all()
    zero = torch.zeros(n * n, dtype=torch.int64)
    within = it._distance_of(torch.as_tensor(weights.reshape(-1)), zero).numpy().reshape(n, n)
    assert (within >= distance).all()
    scale = norm[:, None] + norm
    for terms in (1, 16):
        product = np.float32(2) * tensor_core(hat, hat, terms).astype(np.float32)
        s = norm[None].astype(np.float32) - product
        limit = (within + slack) ** 2 * (1 + 2.0**-20) - norm[:, None] + it.gamma * scale
        assert (s <= limit).all()
        s = term[None].astype(np.float32) - product
        for group in (1, 4):  # of columns; units of the last few too
            unit = np.minimum.reduceat(s, range(0, n, group), 1).repeat(group, 1)[:, :n]
            for number in (0, 127):
                packed = ((unit.view(np.int32) & -128) | number).view(np.float32).astype(np.float64)
                spare = rounded**2 - (packed + term[:, None]) + 2.0**-100
                assert (spare >= 0).all()
                used.append((1 - spare / (g * scale + 2.0**-100)).max())
                low = np.sqrt(np.maximum(packed + term[:, None], 0)) * (1 - 2.0**-18) - slack
                assert (low <= distance).all()
assert 0.03 < max(used) < 1, max(used)  # neither broken nor empty
print("done")
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_filters_bound_holds_on_rounded_and_truncated_products(dtype: str, tmp_path: Path) -> None:
    here = f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n"
    interpret(here + BOUND.replace("torch.DTYPE", f"torch.{dtype}"), tmp_path)


# Rounds on lists alone, on some that are stuck, on ties that only a second look settles; long paths to a root.
ROUNDS = """
import numpy as np
import torch
from obce.h0 import h0
from obce.kernels import components, filter

components.FILTER_POINTS = 2
filter.PAIRS = 8192
looks = []
certify = components.Search.certify
components.Search.certify = lambda self: (looks.append(self.label.unique().numel()), certify(self))[1]

def check(points, lengths=None):
    before = len(looks)
    got = h0(points, edges=True, backend="triton", lengths=lengths)
    want = h0(points, edges=True, backend="reference", lengths=lengths)
    assert np.array_equal(got.edges, want.edges), (points.shape, points.dtype)
    assert np.array_equal(got.deaths, want.deaths, equal_nan=True), (points.shape, points.dtype)
    return looks[before:]

g = np.random.default_rng(7)
assert check(g.standard_normal((1, 200, 16)).astype(np.float32)) == []  # lists were enough
far = g.standard_normal((1, 120, 16))
far[0, 60:, 0] += 100
assert 2 in check(far)  # nobody's list reaches the other half
assert check(g.integers(0, 2, (1, 120, 4)).astype(np.float64))  # ties at the end of a list
line = np.zeros((1, 300, 16), np.float32)
line[0, :, 0] = np.cumsum(1.0 + np.arange(300, 0, -1) / 300)  # all choose the next one: one path
check(line)
check(line.repeat(2, 0), lengths=[300, 40])
direct = check(g.standard_normal((2, 70, 3)).astype(np.float32))
assert direct[0] == 140 and len(direct) < 8
filter._SLOTS = 1  # as if there were too many rows for one pass
check(g.standard_normal((2, 600, 16)).astype(np.float32))
check(far.repeat(3, 1) + 1e-3 * g.standard_normal((1, 360, 16)))
filter._SLOTS = 1 << 27
filter.STEPS = 1  # a split a block
check(g.standard_normal((1, 600, 16)).astype(np.float32))

# A path of labels far longer than halving undoes at once.
n = 5000
label = torch.arange(n)
parent = (label - 1).clamp(min=0)
parts = [torch.full((n,), 5, dtype=torch.int32), torch.full((n,), 5, dtype=torch.int32), label.clone()]
components.flatten_kernel[(20,)](label, *parts, parent, n, NONE=7, LARGEST=9, BR=256)
assert (label == 0).all() and (parts[0] == 7).all() and (parts[1] == 7).all() and (parts[2] == 9).all()
print("done")
"""


@needs_triton
@pytest.mark.slow
def test_interpreted_rounds_join_what_lists_say_and_look_again_where_they_do_not(tmp_path: Path) -> None:
    interpret(ROUNDS, tmp_path)


@needs_triton
def test_tf32_is_rounded_to_nearest_even() -> None:
    import torch

    kernels = importlib.import_module("obce.kernels.filter")
    step = 2.0**-10
    x = torch.tensor([1 + step / 2, 1 + 1.5 * step, 1 + 0.49 * step, -(1 + 0.51 * step), 2 - step / 2, 0.0])
    assert kernels.rounded_to_tf32(x).tolist() == [1, 1 + 2 * step, 1, -(1 + step), 2, 0]


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
@needs_triton
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_tensor_cores_err_less_than_the_filters_proof_allows(dtype: str) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    kernels = importlib.import_module("obce.kernels.filter")
    g = np.random.default_rng(5)
    for d in (16, 64, 128, 160, 1024, 4096):
        DP = kernels.product_shape(d, getattr(torch, dtype).itemsize).DP
        flat = g.random((300, DP))
        spread = g.standard_normal((300, DP)) * np.exp2(g.integers(-12, 1, (300, DP)))
        for points in (flat, 1 - 1e-3 * flat, g.standard_normal((300, DP)), spread, np.sort(spread, 1)):
            x = torch.as_tensor(points, dtype=torch.float32).cuda()
            hat = x.to(torch.float16) if dtype == "float16" else kernels.rounded_to_tf32(x)
            assert kernels.product_error(hat) < 0.5, (d, dtype)  # half is spare: the model of (2) is four times off


@pytest.mark.gpu
@needs_triton
def test_the_filter_on_a_device_gives_the_edges_of_the_other_backends() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    g = np.random.default_rng(6)
    for n, d in ((256, 16), (1000, 70), (3000, 130), (2000, 768)):
        centers = 3 * g.standard_normal((20, d))
        for points in (g.standard_normal((n, d)), centers[g.integers(0, 20, n)] + 1e-2 * g.standard_normal((n, d))):
            for cloud in (points, 1e3 + points, np.rint(points)):
                for dtype in (np.float32, np.float64):
                    x = cloud.astype(dtype)[None]
                    got, want = h0(torch.as_tensor(x).cuda(), edges=True, backend="triton"), h0(x, edges=True)
                    assert np.array_equal(got.edges.cpu().numpy(), want.edges), (n, d, dtype)
                    assert np.array_equal(got.deaths.cpu().numpy(), want.deaths), (n, d, dtype)


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
