"""How much of MiniLM's sentence embeddings survives a cut, by score, repair and size.

    python benchmarks/bench_fidelity.py

2,000 sentences of examples/ score, 1,000 of them fit the least squares, the other 500 measure. `fidelity` is the mean
cosine to the dense model's embedding of the same sentence; `alike` is the mean cosine between embeddings of different
sentences (neighbours in the corpus), which grows when a cut adds a direction that all sentences share.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
from pathlib import Path

import numpy as np
import torch
import transformers

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import obce
from obce.corpus import Corpus, read_corpus, tokenize
from obce.demo import default_corpus, default_model
from obce.evaluate import count_parameters, embed, fidelity
from obce.plan import plan
from obce.prune import prune
from obce.run import load_model, load_tokenizer
from obce.scoring import score

SHARES = (0.95, 0.9, 0.8, 0.65, 0.465)
NAMES = ("effect", "spread", "magnitude", "rf", "std")
CHOICES = (*((name, None) for name in NAMES), *(("random", seed) for seed in range(3)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fidelity.csv")
    options = parser.parse_args()

    whole = read_corpus(default_corpus())
    scoring = Corpus(whole.texts[:2000], whole.source, 0, 0)
    model, tokenizer = load_model(default_model()), load_tokenizer(default_model())
    scores = score(model, tokenizer, scoring)
    held_out = tokenize(whole.texts[2000:], tokenizer)
    dense = embed(model, held_out)

    rows = []
    for keep in SHARES:
        for name, seed in CHOICES:
            made = plan(scores, keep=keep, of="encoder", preset="obce-2023", score=name, seed=seed, keep_constant=True)
            for repair in ("none", "mean", "least_squares"):
                fitted = repair == "least_squares"
                given = {"texts": scoring, "tokenizer": tokenizer} if fitted else {"scores": scores}
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
