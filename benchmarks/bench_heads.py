"""Whole heads: which score of heads loses least when half of them go.

    python benchmarks/bench_heads.py GLUE [--seeds 3]

MiniLM is trained on SST-2 and CoLA as in results.py; half of the heads go, the same share of every layer, repaired by
least squares or by nothing. Heads are ranked by the effect of their neurons, by the persistence
of their clouds (r_f, total persistence, entropy; high stays), by r_f of their neurons (which does not rank layer 0), by
labels (taylor), and at random.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from obce.bench import facts
from obce.demo import default_model
from obce.evaluate import count_parameters
from obce.finetune import Settings, finetune, with_head
from obce.glue import calibration, evaluate, kl_divergence, read_task
from obce.plan import plan
from obce.prune import prune
from obce.run import load_model, load_tokenizer
from obce.scoring import score

TASKS = ("SST-2", "CoLA")
TRAINED = Path(__file__).parents[1] / "build" / "results"  # where results.py keeps its dense models
TRAIN_ROWS, TEXTS = 3000, 400
DENSE = Settings(epochs=3, learning_rate=1e-4, precision="bfloat16")
KEEP = 0.835  # of the encoder: half of the heads, which hold a third of it
WAYS = [
    *((name, None) for name in ("effect", "taylor", "rf", "random")),
    *(("effect", name) for name in ("rf", "total_persistence", "entropy")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("glue", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "heads.csv")
    options = parser.parse_args()
    encoder, tokenizer = load_model(default_model()), load_tokenizer(default_model())
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for task in TASKS:
            data = read_task(task, options.glue, limit=TRAIN_ROWS)
            fresh = with_head(encoder, data.task, seed)
            dense, _ = finetune(fresh, tokenizer, data, replace(DENSE, seed=seed), out=TRAINED / f"{task}-{seed}")
            reference = evaluate(dense, tokenizer, data)
            corpus, labels = calibration(data.train, f"{task} train", TEXTS, seed)
            scores = score(dense, tokenizer, corpus, seed=seed, labels=labels, cloud_texts=TEXTS)
            for name, head_score in WAYS:
                made = plan(scores, keep=KEEP, of="encoder", score=name, units=("heads",), head_score=head_score)
                for repair in ("least_squares", "none"):
                    small = prune(dense, made, repair=repair, texts=corpus, tokenizer=tokenizer)
                    found = evaluate(small, tokenizer, data)
                    row = {
                        **facts(),
                        "torch": torch.__version__,
                        "task": task,
                        "seed": seed,
                        "heads_by": name if head_score is None else f"clouds, {head_score}",
                        "repair": repair,
                        "headline": round(found.headline, 4),
                        "dense": round(reference.headline, 4),
                        "kl": round(kl_divergence(reference.splits["dev"].logits, found.splits["dev"].logits), 4),
                        "encoder_kept": round(count_parameters(small)[1] / count_parameters(dense)[1], 4),
                    }
                    print(*row.values(), file=sys.stderr, flush=True)
                    rows.append(row)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
