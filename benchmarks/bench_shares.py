"""Shares of the sites: what finding them costs, and what it is worth on a trained encoder.

    python benchmarks/bench_shares.py [--model minilm|base|large] [--device cuda]

Scores 2,000 sentences of examples/, finds what each site can spare (estimated; of MiniLM also measured, cut by cut),
and, of the trained MiniLM, cuts the encoder to 30, 46.5 and 70 %, repaired on 1,000 of them: `fidelity_*` is the mean
cosine to the dense model's embedding of 500 other sentences. Models of other dimensions have random weights, are scored
on 450 sentences, and say what it costs alone. `peak_mb` is above what the process held before.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from obce.bench import append_row, facts
from obce.corpus import Corpus, read_corpus, tokenize
from obce.demo import default_corpus
from obce.evaluate import embed, fidelity
from obce.plan import plan
from obce.prune import prune
from obce.scoring import score
from obce.sensitivity import sensitivity

from bench_score import DIMENSIONS, Memory, load

KEEPS = (0.3, 0.465, 0.7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=DIMENSIONS, default="minilm")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=float, help="with less than a second of it nothing is measured")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "shares.csv")
    options = parser.parse_args()
    if options.limit is not None and options.limit < 1:
        print(f"shares of {options.model}: not measured, no time is left")
        return
    whole = read_corpus(default_corpus()).texts
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer, weights = load(options.model, Corpus(whole, "examples", 0, 0), Path(folder), options.device)
        scoring = Corpus(whole[: 2000 if weights == "trained" else 450], "examples", 0, 0)
        start = time.perf_counter()
        scores = score(model, tokenizer, scoring)
        scored = time.perf_counter() - start
        held_out = tokenize(whole[2000:], tokenizer)
        dense = embed(model, held_out) if weights == "trained" else None
        for how in ("uniform", "estimated", "measured") if weights == "trained" else ("estimated",):
            curves, seconds, peak = None, 0.0, 0
            if how != "uniform":
                start = time.perf_counter()
                with Memory(options.device).watched() as seen:
                    curves = sensitivity(model, scores, scoring, tokenizer=tokenizer, how=how)
                seconds, peak = time.perf_counter() - start, seen[0]
            row: dict[str, Any] = {
                **facts(),
                "torch": torch.__version__,
                "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
                "torch_threads": torch.get_num_threads(),
                "model": options.model,
                "weights": weights,
                "texts_scored": len(scoring),
                "score_s": round(scored, 2),
                "shares": how,
                "shares_s": round(seconds, 2),
                "peak_mb": round(peak / 1e6, 1),
                **dict.fromkeys((f"fidelity_{keep:g}" for keep in KEEPS), ""),
            }
            for keep in KEEPS if dense is not None else ():
                made = plan(scores, keep=keep, of="encoder", sensitivity=curves)
                small = prune(model, made, texts=scoring, tokenizer=tokenizer)
                row[f"fidelity_{keep:g}"] = round(fidelity(dense, embed(small, held_out)), 4)
            print({name: row[name] for name in list(row)[-9:]}, flush=True)
            append_row(options.out, row)


if __name__ == "__main__":
    main()
