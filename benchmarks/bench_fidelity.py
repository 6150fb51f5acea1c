"""How much of MiniLM's sentence embeddings survives a cut, by score, repair and size.

    python benchmarks/bench_fidelity.py [--ridges]

2,000 sentences of examples/ score, 1,000 of them fit the least squares, the other 500 measure.
`fidelity` is the mean cosine to the dense model's embedding of the same sentence; `alike` is the mean cosine between
embeddings of different sentences (neighbours in the corpus), which grows when a cut adds a direction that all
sentences share.

With --ridges: what the ridge does, by effect and estimated shares, fitted on 300 and on 1,000 sentences.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import obce
from obce.bench import append_row, facts
from obce.corpus import Corpus, read_corpus, tokenize
from obce.demo import default_corpus, default_model
from obce.evaluate import count_parameters, embed, fidelity
from obce.plan import plan
from obce.prune import prune
from obce.run import load_model, load_tokenizer
from obce.scoring import score
from obce.sensitivity import sensitivity

RIDGES = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
RIDGE_SHARES = (0.3, 0.465, 0.7)

SHARES = (0.95, 0.9, 0.8, 0.65, 0.465)
NAMES = ("effect", "spread", "magnitude", "rf", "std")
CHOICES = (*((name, None) for name in NAMES), *(("random", seed) for seed in range(3)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ridges", action="store_true", help="measure the ridges, into ridge.csv")
    parser.add_argument("--out", type=Path, help="CSV (default: fidelity.csv or ridge.csv in results/)")
    options = parser.parse_args()
    name = "ridge" if options.ridges else "fidelity"
    options.out = options.out or Path(__file__).parent / "results" / f"{name}.csv"

    whole = read_corpus(default_corpus())
    scoring = Corpus(whole.texts[:2000], whole.source, 0, 0)
    model, tokenizer = load_model(default_model()), load_tokenizer(default_model())
    scores = score(model, tokenizer, scoring)
    held_out = tokenize(whole.texts[2000:], tokenizer)
    dense = embed(model, held_out)
    if options.ridges:
        curves = sensitivity(model, scores, scoring, tokenizer=tokenizer)
        plans = {keep: plan(scores, keep=keep, of="encoder", sensitivity=curves) for keep in RIDGE_SHARES}
        for n in (300, 1000):
            fitted_on = Corpus(whole.texts[:n], whole.source, 0, 0)
            for ridge in RIDGES:
                row: dict[str, Any] = {**facts(), "torch": torch.__version__, "texts": n, "ridge": ridge}
                for keep, made in plans.items():
                    small = prune(model, made, texts=fitted_on, tokenizer=tokenizer, ridge=ridge)
                    row[f"fidelity_{keep:g}"] = round(fidelity(dense, embed(small, held_out)), 4)
                print(row, flush=True)
                append_row(options.out, row)
        return

    rows = []
    for keep in SHARES:
        for name, seed in CHOICES:
            made = plan(scores, keep=keep, of="encoder", preset="obce-2023", score=name, seed=seed, keep_constant=True)
            for repair in ("none", "mean", "least_squares"):
                fitted = repair == "least_squares"
                fit = {"texts": scoring, "tokenizer": tokenizer}
                given: dict[str, Any] = fit if fitted else {"scores": scores}
                small = prune(model, made, repair=repair, **given)
                found = embed(small, held_out)
                row = {
                    "encoder_kept": keep,
                    "score": name,
                    "seed": "" if seed is None else seed,
                    "repair": repair,
                    "encoder_parameters": count_parameters(small)[1],
                    "fidelity": round(fidelity(dense, found), 4),
                    "alike": round(fidelity(found, np.roll(found, 1, axis=0)), 4),
                    "alike_dense": round(fidelity(dense, np.roll(dense, 1, axis=0)), 4),
                    "obce": obce.__version__,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "python": platform.python_version(),
                }
                print(*list(row.values())[:8])
                rows.append(row)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
