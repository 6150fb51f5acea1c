"""Random calls of the engine, valid and not, against the oracle: the same bits, or the same refusal.

    python tests/fuzz_h0.py --seconds 60

A case follows from (seed, number) alone. It is written to corpus/running.jsonl before it runs, so a case that ends the
process, as the sanitizers of `make fuzz` do, is left there; one that fails is shrunk and added to corpus/found.jsonl.
tests/test_h0_fuzz.py replays the folder.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import obce
import scipy.sparse as sp

CORPUS = Path(__file__).parent / "corpus"
ORACLE_POINTS = 400  # above it Prim at the portable level stands in for the oracle, which would take seconds

Make = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        call: "h0", "h0_line", "r_f", "matrix" or "sparse" (the last two: h0_distances).
        form: key of FORMS, how the numbers reach the call; of a sparse matrix its format.
        numbers: what the call is about; of a sparse matrix [m, 3] rows (i, j, weight).
        keywords: of the call, JSON's types only; of a sparse matrix also "n".
        level: OBCE_SIMD.
    """

    call: str
    form: str
    numbers: np.ndarray
    keywords: dict[str, Any]
    level: str

    def to_json(self) -> str:
        """The case as one line; numbers as their bytes, so that every NaN and -0 comes back."""
        return json.dumps(
            {
                "call": self.call,
                "form": self.form,
                "dtype": self.numbers.dtype.str,
                "shape": self.numbers.shape,
                "bytes": base64.b85encode(zlib.compress(np.ascontiguousarray(self.numbers).tobytes())).decode(),
                "keywords": self.keywords,
                "level": self.level,
            }
        )

    @classmethod
    def from_json(cls, line: str) -> Case:
        """The inverse of `to_json`."""
        fields = json.loads(line)
        numbers = np.frombuffer(zlib.decompress(base64.b85decode(fields["bytes"])), fields["dtype"])
        numbers = numbers.reshape(fields["shape"]).copy()
        return cls(fields["call"], fields["form"], numbers, fields["keywords"], fields["level"])


def _strided(x: np.ndarray) -> np.ndarray:
    wide = np.full([3 * size for size in x.shape], np.nan, x.dtype)
    view = wide[(slice(1, None, 3),) * x.ndim]
    view[...] = x
    return view


def _unaligned(x: np.ndarray) -> np.ndarray:
    view = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def _frozen(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def _torch(x: np.ndarray, dtype: str | None = None) -> Any:
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(x))
    return tensor if dtype is None else tensor.to(getattr(torch, dtype))


def _ragged(x: np.ndarray) -> list[Any]:
    rows = x.tolist()
    return [*rows[:-1], rows[-1][:-1]] if x.ndim > 1 and len(rows) else rows


def _mirrored(x: np.ndarray, axis: int) -> np.ndarray:
    return np.flip(np.flip(x, axis).copy(), axis)


FORMS: dict[str, Make] = {
    "plain": lambda x: x,
    "fortran": np.asfortranarray,
    "strided": _strided,
    "last axis reversed": lambda x: _mirrored(x, -1) if x.ndim else x,
    "first axis reversed": lambda x: _mirrored(x, 0) if x.ndim else x,
    "big endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "unaligned": _unaligned,
    "read only": _frozen,
    "one row, repeated": lambda x: np.broadcast_to(x[:1] if x.ndim else x, x.shape),
    "list": lambda x: x.tolist(),
    "float16": lambda x: x.astype(np.float16),
    "longdouble": lambda x: x.astype(np.longdouble),
    "int8": lambda x: x.astype(np.int8),
    "int64": lambda x: x.astype(np.int64),
    "uint64": lambda x: x.astype(np.uint64),
    "complex": lambda x: x.astype(complex),
    "bool": lambda x: x.astype(bool),
    "text": lambda x: x.astype(str),
    "object": lambda x: x.astype(object),
    "date": lambda x: np.zeros(x.shape, "M8[s]"),
    "ragged": _ragged,
    "torch": _torch,
    "torch, bfloat16": lambda x: _torch(x, "bfloat16"),
    "torch, int32": lambda x: _torch(x, "int32"),
    "torch, transposed": lambda x: _torch(x.swapaxes(-1, -2)).mT if x.ndim > 1 else _torch(x),
}
LAYOUTS = tuple(FORMS)[:9]
ALGORITHMS = {
    "h0": ["auto", "prim", "boruvka", "boruvka", "kdtree", "kdtree"],
    "h0_line": ["auto", "prim", "sort", "boruvka", "kdtree"],
    "matrix": ["auto", "prim"],
    "sparse": ["auto", "kruskal"],
}
SPARSE = ("coo", "csr", "csc")


def _specials(g: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    info = np.finfo(dtype)
    pool = [info.max, info.tiny, info.smallest_subnormal, info.eps, 1, 1 + info.eps, 0]
    return g.choice(pool, shape) * g.choice([-1, 1], shape)


def _broken(g: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    x = g.standard_normal(shape)
    x[g.random(shape) < 2 / (1 + x.size)] = g.choice([np.nan, np.inf, -np.inf])
    return x


def _duplicated(g: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    x = g.standard_normal(shape)
    if not shape:
        return x
    at = min(1, len(shape) - 1)
    return np.take(x, g.integers(0, max(1, shape[at] // 3), shape[at]), at) if shape[at] else x


VALUES: dict[str, Callable[[np.random.Generator, tuple[int, ...], np.dtype[Any]], np.ndarray]] = {
    "gauss": lambda g, s, t: g.standard_normal(s),
    "grid": lambda g, s, t: g.integers(0, 4, s),
    "duplicates": lambda g, s, t: _duplicated(g, s),
    "constant": lambda g, s, t: np.full(s, g.choice([0, -0.0, 1.5])),
    "offset": lambda g, s, t: 1e6 + g.standard_normal(s),
    "scaled": lambda g, s, t: 10.0 ** g.integers(-30, 31) * g.standard_normal(s),
    "far scaled": lambda g, s, t: np.ldexp(g.standard_normal(s), g.integers(np.finfo(t).minexp, np.finfo(t).maxexp)),
    "subnormal": lambda g, s, t: np.finfo(t).smallest_subnormal * g.integers(-9, 10, s),
    "spread": lambda g, s, t: np.exp(12 * g.standard_normal(s)),
    "collinear": lambda g, s, t: g.integers(-40, 41, (*s[:-1], 1)[: len(s)]) * np.arange(1, 1 + math.prod(s[-1:])),
    "signed zeros": lambda g, s, t: np.where(g.random(s) < 0.5, -0.0, 0.0),
    "specials": _specials,
    "not finite": lambda g, s, t: _broken(g, s),
}


def _size(g: np.random.Generator) -> int:
    kind = g.random()
    if kind < 0.5:
        return int(g.integers(1, 20))
    if kind < 0.85:
        return max(1, int(g.choice([16, 32, 64, 128])) + int(g.integers(-1, 2)))
    return int(g.integers(20, 200))


def _coordinates(g: np.random.Generator) -> int:
    return int(g.integers(1, 6)) if g.random() < 0.8 else int(g.choice([7, 8, 9, 16, 17, 31, 65]))


def _values(g: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    dtype = np.dtype(g.choice(["f4", "f8"]))
    with np.errstate(all="ignore"):
        return VALUES[str(g.choice(list(VALUES)))](g, shape, dtype).astype(dtype)


def _keywords(g: np.random.Generator, B: int, n: int) -> dict[str, Any]:
    keywords: dict[str, Any] = {}
    if g.random() < 0.6:
        keywords["threads"] = int(g.integers(1, 5))
    if g.random() < 0.3:
        keywords["max_edge"] = float(g.choice([0, 0.5, 1, 2, 1e30, math.inf]))
    if g.random() < 0.3:
        keywords["lengths"] = g.integers(1, n + 1, B).tolist()
    if g.random() < 0.5:
        keywords["check"] = False
    if g.random() < 0.06:  # refused, or nearly
        keywords |= [
            {"threads": 0},
            {"threads": 1.5},
            {"max_edge": -1.0},
            {"max_edge": math.nan},
            {"lengths": [0] * B},
            {"lengths": [n + 1] * B},
            {"lengths": [1] * (B + 1)},
            {"lengths": [1.0] * B},
            {"algorithm": "dijkstra"},
            {"backend": "gpu"},
            {"check": "no"},
        ][int(g.integers(11))]
    return keywords


def draw(seed: int, number: int) -> Case:
    """Case `number` of a seed."""
    g = np.random.default_rng([seed, number])
    call = str(g.choice(["h0", "h0_line", "r_f", "matrix", "sparse"], p=[0.4, 0.1, 0.15, 0.2, 0.15]))
    B, n, d = int(g.choice([1, 1, 2, 3, 5, 17])), _size(g), _coordinates(g)
    if call != "r_f" and n > 70:
        B, d = min(B, 2), min(d, 9)
    if g.random() < 0.004:  # enough points for the upper levels of the k-d tree
        call, B, n, d = "h0", 1, int(g.integers(4100, 6000)), int(g.integers(1, 4))
    if call == "r_f" and g.random() < 0.1:  # enough values for the digits of the sort
        call, n = str(g.choice(["r_f", "h0_line"])), int(g.integers(900, 3000))
    B, n, d = (0 if g.random() < 0.01 else size for size in (B, n, d))
    keywords = _keywords(g, B, max(n, 1))
    if call != "r_f":
        keywords["edges"] = bool(g.random() < 0.6) and (call == "h0" or n < ORACLE_POINTS)
        names = ALGORITHMS[call] if g.random() < 0.97 else ["sort", "boruvka", "kruskal"]
        if call == "h0_line" and n >= ORACLE_POINTS:
            names = ["auto", "sort"]
        keywords.setdefault("algorithm", str(g.choice(names)))
    if call == "h0" and g.random() < 0.35:
        names = ["sqeuclidean", "cosine", "correlation", "manhattan", "chebyshev", "minkowski"]
        keywords["metric"] = str(g.choice(names)) if g.random() < 0.97 else "hamming"
        if keywords["metric"] == "minkowski" and g.random() < 0.95:
            keywords["p"] = float(g.choice([1, 1.5, 2, 3, 40.5, math.inf, 0.5]))
        if g.random() < 0.9:
            keywords["algorithm"] = str(g.choice(["auto", "prim"]))
    form = str(g.choice(LAYOUTS if g.random() < 0.8 else list(FORMS)))
    level = str(g.choice(LEVELS))
    if call == "sparse":
        numbers = _sparse(g, n, keywords)
        return Case(call, str(g.choice(SPARSE)), numbers, keywords, level)
    shape: tuple[int, ...] = {"h0": (B, n, d), "matrix": (B, n, n)}.get(call, (B, n))
    if call == "matrix" and g.random() < 0.4:
        shape = (n * (n - 1) // 2,)
        keywords.pop("lengths", None)
    elif B == 1 and g.random() < 0.5:
        shape = shape[1:]
    if g.random() < 0.02:
        shape = (*shape, 2) if g.random() < 0.5 else shape[1:]
    numbers = _values(g, shape)
    if call == "matrix" and g.random() < 0.95:
        numbers = np.abs(numbers)
        if numbers.ndim > 1 and numbers.shape[-1] == numbers.shape[-2]:
            numbers = np.triu(numbers, 1)
            numbers = numbers + np.swapaxes(numbers, -1, -2)
    elif numbers.ndim > 1 and "lengths" in keywords and len(numbers) == len(keywords["lengths"]):
        for row, length in zip(numbers, keywords["lengths"], strict=True):
            row[int(length) :] = np.nan  # padding, never to be read
    return Case(call, form, numbers, keywords, level)


def _sparse(g: np.random.Generator, n: int, keywords: dict[str, Any]) -> np.ndarray:
    m = int(g.integers(0, 4 * n + 1))
    ends = g.integers(0, max(n, 1), (m, 2)).astype(float)
    if g.random() < 0.5:
        ends.sort(axis=1)  # one triangle
        ends = ends[ends[:, 0] < ends[:, 1]]
    if g.random() < 0.5:
        ends = np.unique(ends, axis=0)
    if g.random() < 0.03 and len(ends):
        ends[0, g.integers(2)] = g.choice([-1, n, 2**31])  # outside of the matrix
    weights = np.abs(_values(g, (len(ends), 1)))
    numbers = np.concatenate([ends.astype(weights.dtype), weights], 1)
    if g.random() < 0.3:
        numbers = np.concatenate([numbers, numbers[:, [1, 0, 2]]])  # both triangles
    keywords.pop("lengths", None)
    keywords["n"] = n
    return numbers


def _restore(level: str | None) -> None:
    if level is None:
        os.environ.pop("OBCE_SIMD", None)
    else:
        os.environ["OBCE_SIMD"] = level


try:
    from obce import _cpu

    LEVELS = _cpu.simd_levels()
except ImportError:
    LEVELS = [""]


def _input(case: Case) -> Any:
    if case.call != "sparse":
        with np.errstate(all="ignore"):
            return FORMS[case.form](case.numbers)
    n = case.keywords["n"]
    rows, cols, weights = case.numbers[:, 0].astype(np.int64), case.numbers[:, 1].astype(np.int64), case.numbers[:, 2]
    if case.form == "coo":
        return sp.coo_array((weights, (rows, cols)), shape=(n, n))
    if case.form == "csc":
        rows, cols = cols, rows
    order = np.argsort(rows, kind="stable")
    starts = np.searchsorted(rows[order], np.arange(n + 1))  # a row outside is lost, a column outside is not
    make = sp.csr_array if case.form == "csr" else sp.csc_array
    return make((weights[order], cols[order], starts), shape=(n, n))


Outcome = tuple[str, Any]


def answer(case: Case, backend: str | None, level: str, algorithm: str | None = None) -> Outcome:
    """("refused", sentence) or ("answered", arrays). Warnings, and errors of other types, are raised."""
    keywords: dict[str, Any] = {"backend": backend} | {k: v for k, v in case.keywords.items() if k != "n"}
    if algorithm is not None:
        keywords["algorithm"] = algorithm
    door = {"matrix": obce.h0_distances, "sparse": obce.h0_distances}.get(case.call) or getattr(obce, case.call)
    before = os.environ.get("OBCE_SIMD")
    os.environ["OBCE_SIMD"] = level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = door(_input(case), **keywords)
    except (TypeError, ValueError) as error:
        return "refused", f"{type(error).__name__}: {error}"
    finally:
        _restore(before)
    fields = (result,) if case.call == "r_f" else (result.deaths, result.edges, result.lengths)
    return "answered", [None if field is None else np.asarray(field) for field in fields]


def _differ(a: list[Any], b: list[Any]) -> str | None:
    for name, x, y in zip(("first array", "edges", "lengths"), a, b, strict=False):
        if (x is None) != (y is None):
            return f"{name} is there once"
        if x is None:
            continue
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"{name} has {x.dtype}{x.shape} and {y.dtype}{y.shape}"
        unequal = ~((x == y) | ((x != x) & (y != y)))
        if unequal.any():
            at = tuple(int(i) for i in np.argwhere(unequal)[0])
            return f"{name} has {x[at]!r} and {y[at]!r} at {at}"
        if x.dtype.kind == "f" and np.signbit(x[x == 0]).any():
            return f"{name} has a -0"
    return None


def _has_no_oracle(case: Case) -> bool:
    """Unchecked matrices that are not symmetric have no defined answer; they must only do no harm."""
    if case.call != "matrix" or case.keywords.get("check", True) or case.numbers.ndim < 2:
        return False
    a = case.numbers
    if a.shape[-1] != a.shape[-2]:
        return False
    return case.form == "one row, repeated" or not np.array_equal(a, np.swapaxes(a, -1, -2), equal_nan=True)


def failure(case: Case, backend: str | None = "cpu") -> str | None:
    """What is wrong with the answer of a backend (None: of the first that can) to a case, or None."""
    try:
        ours = answer(case, backend, case.level)
        if ours[0] == "refused" and "by prim only" in ours[1]:
            return None if case.keywords["algorithm"] in ("boruvka", "kdtree") else ours[1]
        if _has_no_oracle(case):
            return None
        known = case.keywords.get("algorithm") in ("auto", "prim", "boruvka", "kdtree")
        if case.call == "h0" and known and max(case.numbers.shape, default=0) > ORACLE_POINTS:
            expected = answer(case, "cpu", "portable", "prim")
        elif case.call in ("h0", "h0_line") and case.keywords.get("algorithm") in ("boruvka", "kdtree"):
            expected = answer(case, "reference", "", "auto")
        else:
            expected = answer(case, "reference", "")
    except Exception as error:  # anything but a refusal is a finding
        return f"{type(error).__name__}: {error}"
    if ours[0] != expected[0]:
        return f"{ours[0]} ({ours[1]}), the oracle {expected[0]} ({expected[1]})"
    if ours[0] == "refused":
        return None if ours[1] == expected[1] else f"{ours[1]!r}, the oracle {expected[1]!r}"
    return _differ(ours[1], expected[1])


def _smaller(case: Case) -> Iterator[Case]:
    for keyword in case.keywords:
        if keyword not in ("algorithm", "n"):
            yield replace(case, keywords={k: v for k, v in case.keywords.items() if k != keyword})
    if case.call != "sparse":
        yield replace(case, form="plain")
    yield replace(case, level=LEVELS[0])
    square = case.call == "matrix" and case.numbers.ndim > 1
    for axis in range(case.numbers.ndim):
        size = case.numbers.shape[axis]
        for part in (slice(size // 2), slice(size // 2, None), slice(1, None), slice(size - 1)):
            at: list[Any] = [slice(None)] * case.numbers.ndim
            at[axis] = part
            if square and axis >= case.numbers.ndim - 2:
                at[-2] = at[-1] = part
            if 0 < len(range(size)[part]) < size:
                yield replace(case, numbers=case.numbers[tuple(at)])


def shrunk(case: Case) -> Case:
    """A smaller case that fails too, where there is one."""
    for _ in range(200):
        smaller = next((c for c in _smaller(case) if c.to_json() != case.to_json() and failure(c)), None)
        if smaller is None:
            break
        case = smaller
    return case


def corpus(folder: Path = CORPUS) -> list[Case]:
    """The kept cases."""
    return [Case.from_json(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def _tally(seed: int, begin: float, kinds: Counter[str], failures: int) -> str:
    calls = ", ".join(f"{name} {count}" for name, count in sorted(kinds.items()))
    seconds = time.monotonic() - begin
    return f"seed {seed}: {kinds.total()} cases in {seconds:.0f} s ({calls}), {failures} failed"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    options = parser.parse_args()
    seed = int(time.time()) if options.seed is None else options.seed
    CORPUS.mkdir(exist_ok=True)
    running, found = CORPUS / "running.jsonl", CORPUS / "found.jsonl"
    print(f"obce from {obce.__file__}, SIMD levels {', '.join(LEVELS)}, seed {seed}", flush=True)
    begin, number, failures = time.monotonic(), 0, 0
    kinds: Counter[str] = Counter()
    while time.monotonic() - begin < options.seconds:
        case = draw(seed, number)
        running.write_text(case.to_json() + "\n")
        wrong = failure(case)
        running.unlink()
        kinds[case.call] += 1
        if wrong:
            failures += 1
            print(f"seed {seed} number {number}: {wrong}", flush=True)
            with found.open("a") as file:
                file.write(shrunk(case).to_json() + "\n")
            if failures == 20:
                break
        number += 1
        if number % 10_000 == 0:
            print(_tally(seed, begin, kinds, failures), flush=True)
    print(_tally(seed, begin, kinds, failures))
    raise SystemExit(failures > 0)


if __name__ == "__main__":
    main()
