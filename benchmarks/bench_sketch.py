"""The sketch on a long stream: memory, time and certificates; and r_f in one read beside a sort.

    python benchmarks/bench_sketch.py                  # 1,000,000 texts of 10,000 neurons: about 6 minutes on two cores
    python benchmarks/bench_sketch.py --rows           # 221,184 rows of 10,000 values (8.8 GB of memory)
    python benchmarks/bench_sketch.py --minilm         # a trained encoder on real sentences
    python benchmarks/bench_sketch.py --corpus         # 2,000,000 texts read from a file, beside the same in memory

The stream comes in shards of 1,000 texts and is never held. Its neurons are of five kinds in turn: Gaussian, heavy
tails, skewed, two clusters with outliers, uniform. At the end every neuron's stream is made again and sorted: a
certified r_f must be the largest difference, any other interval must hold it. Of a uniform neuron the largest gap
shrinks as log(n) / n, and no cell is so narrow: it is there to be not certified.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from obce import corpus as corpus_module
from obce.bench import facts
from obce.clouds import CLOUD_SCORES
from obce.corpus import read_corpus
from obce.h0 import r_f
from obce.sketch import Sketch

KINDS = ("gaussian", "heavy tails", "skewed", "two clusters", "uniform")
SHARD, CHUNK = 1000, 100
RESULTS = Path(__file__).parent / "results"


def block(chunk: int, shard: int) -> np.ndarray:
    """float32 [CHUNK, SHARD], what a chunk of neurons does on a shard of texts."""
    rng = np.random.Generator(np.random.SFC64([chunk, shard]))
    values = rng.standard_normal((CHUNK, SHARD), dtype=np.float32)
    kind = KINDS[chunk % len(KINDS)]
    if kind == "heavy tails":
        values **= 3
    elif kind == "skewed":
        np.exp(values, out=values)
    elif kind == "two clusters":
        values *= 0.1
        values[:, ::7] += 3
    elif kind == "uniform":
        values = rng.random((CHUNK, SHARD), dtype=np.float32)
    return values


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def stream(texts: int, neurons: int, out: Path) -> None:
    told, rows = facts(), []
    sketch = Sketch.empty(neurons)
    updating = 0.0
    shards, chunks = texts // SHARD, neurons // CHUNK
    for shard in range(shards):
        ids = np.arange(shard * SHARD, (shard + 1) * SHARD)
        for chunk in range(chunks):
            values = block(chunk, shard)
            begin = time.perf_counter()
            sketch.rows(slice(chunk * CHUNK, (chunk + 1) * CHUNK)).update(values, ids)
            updating += time.perf_counter() - begin
        if (shard + 1) in (1, 2, 5) or (shard + 1) % max(1, shards // 20) == 0:
            seen = (shard + 1) * SHARD
            row = {
                "texts": seen,
                "neurons": neurons,
                "resident_mb": f"{resident_mb():.1f}",
                "update_s": f"{updating:.4g}",
            }
            rows.append(told | row)
            print(row, flush=True)
    gaps = sketch.cells.gaps()
    wrong, certified = 0, dict.fromkeys(KINDS, 0)
    for chunk in range(chunks):
        ordered = np.concatenate([block(chunk, shard) for shard in range(shards)], axis=1)
        ordered.sort(axis=1)
        exact = np.diff(ordered, axis=1).max(axis=1)
        here = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        known = gaps.certified[here]
        wrong += int(np.count_nonzero(known & (gaps.low[here] != exact)))
        wrong += int(np.count_nonzero((gaps.low[here] > exact) | (gaps.high[here] < exact)))
        certified[KINDS[chunk % len(KINDS)]] += int(known.sum())
    each = neurons / len(KINDS)
    shares = {kind: number / each for kind, number in certified.items()}
    print(f"wrong: {wrong}; certified: " + ", ".join(f"{kind} {100 * share:.2f} %" for kind, share in shares.items()))
    if wrong:
        raise AssertionError(f"{wrong} claims of the sketch are wrong")
    for row in rows:
        row |= {f"certified {kind}": f"{share:.4f}" for kind, share in shares.items()}
    write(out / "sketch_stream.csv", rows)


def in_one_read(n_rows: int, n: int, out: Path) -> None:
    """r_f of a whole BERT Large on 10,000 texts, once captured, beside numpy's sort of some of the rows."""
    values = np.empty((n_rows, n), np.float32)
    rng = np.random.default_rng(0)
    for start in range(0, n_rows, 4096):
        rng.standard_normal(out=values[start : start + 4096], dtype=np.float32)
    some = values[: n_rows // 50].copy()
    if not (r_f(some) == np.diff(np.sort(some, axis=1), axis=1).max(axis=1)).all():
        raise AssertionError("r_f differs from the largest difference of the sorted values")
    calls = {
        "r_f": lambda: r_f(values),
        "r_f, no check": lambda: r_f(values, check=False),
        "numpy": lambda: [np.diff(np.sort(part, axis=1), axis=1).max(axis=1) for part in np.array_split(some, 70)],
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(5):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    times["numpy"] = [seconds * n_rows / len(some) for seconds in times["numpy"]]
    median = {name: float(np.median(seconds)) for name, seconds in times.items()}
    row = facts() | {
        "rows": n_rows,
        "values": n,
        "gb": f"{values.nbytes / 1e9:.3g}",
        **{f"{name} s": f"{seconds:.4g}" for name, seconds in median.items()},
        "numpy over r_f": f"{median['numpy'] / median['r_f']:.3g}",
        "numpy over r_f, no check": f"{median['numpy'] / median['r_f, no check']:.3g}",
        "note": "numpy: one thread, sorted in blocks of 64 rows, from 1 row in 50",
    }
    print(row)
    write(out / "rf_rows.csv", [row])


def trained(out: Path) -> None:
    """MiniLM on the sentences of examples/: neurons whose r_f is certified, stability of heads and layers."""
    from obce.demo import default_corpus, default_model
    from obce.run import load_model, load_tokenizer
    from obce.scoring import score

    model, tokenizer = load_model(default_model()), load_tokenizer(default_model())
    scores = score(model, tokenizer, str(default_corpus()), exact=False)
    if scores.clouds is None:
        raise AssertionError("the scores have no clouds")
    row = facts() | {"neurons": len(scores), "texts": scores.meta["n_texts"], "certified": f"{scores.certified():.6f}"}
    row |= {f"{name} spearman": f"{scores.stability(name).spearman:.4f}" for name in ("rf", "rf_bagged", "std")}
    for name in CLOUD_SCORES:
        row |= {f"{kind} {name} spearman": f"{rho:.4f}" for kind, rho in scores.clouds.stability(name).items()}
    print(row)
    write(out / "sketch_minilm.csv", [row])


def read_in(texts: int, held: bool) -> dict[str, Any]:
    """Memory of a corpus that is read from a file and put in order; `held` keeps all its texts in memory."""
    sentences = read_corpus(next((RESULTS.parents[1] / "examples").glob("wikipedia-2500.*"))).texts
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.txt"
        with path.open("w", encoding="utf-8") as file:
            for i in range(texts):
                file.write(f"{sentences[i % len(sentences)]} {i}\n")
        if held:
            corpus_module._MEMORY_BYTES = 1 << 40
        before, begin = resident_mb(), time.perf_counter()
        corpus = read_corpus(path)
        read, seconds = resident_mb() - before, time.perf_counter() - begin
        shards = corpus.shards()
        if sum(len(shard.texts) for shard in shards) != texts or len(corpus.entries(shards[-1].texts)) != len(
            shards[-1].texts
        ):
            raise AssertionError("the shards do not hold every text")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 - before
        return {
            "texts": texts,
            "file_mb": round(path.stat().st_size / 1e6),
            "where": "memory" if held else "file",
            "read_s": f"{seconds:.3g}",
            "resident_mb": round(read),
            "peak_mb": round(peak),
            "hash": corpus.hash,
        }


def corpora(texts: int, out: Path) -> None:
    rows = []
    for held in (True, False):  # a process each, whose peak is its own
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            rows.append(facts() | pool.submit(read_in, texts, held).result())
        print(rows[-1])
    if rows[0]["hash"] != rows[1]["hash"]:
        raise AssertionError("the two corpora are not the same")
    write(out / "corpus.csv", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=None, help="default: 1,000,000, of a corpus 2,000,000")
    parser.add_argument("--neurons", type=int, default=10_000)
    parser.add_argument("--rows", action="store_true", help="r_f of 221,184 rows of 10,000 values instead")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--minilm", action="store_true", help="a trained encoder on real sentences instead")
    parser.add_argument("--corpus", action="store_true", help="reading a large corpus instead")
    options = parser.parse_args()
    if options.corpus:
        corpora(options.texts or 2_000_000, options.out)
    elif options.minilm:
        trained(options.out)
    elif options.rows:
        in_one_read(221_184, 10_000, options.out)
    else:
        stream(options.texts or 1_000_000, options.neurons, options.out)


if __name__ == "__main__":
    main()
