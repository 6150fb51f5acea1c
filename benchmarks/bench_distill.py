"""What training on plain texts brings back of MiniLM's sentence embeddings, by score and size.

    python benchmarks/bench_distill.py [--epochs 3] [--keep 0.465 ...] [--score effect ...]

2,000 sentences of examples/ score; the encoder is cut by the shares that each site can spare, repaired on 1,000 of
them, and then trained on the 2,000 to say what the dense model says (`obce.distill`). `repaired` and `trained` are the
mean cosines to the dense model's embedding of 500 other sentences.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from obce.bench import append_row, facts
from obce.corpus import Corpus, read_corpus, tokenize
from obce.demo import default_corpus, default_model
from obce.evaluate import count_parameters, embed, fidelity
from obce.finetune import DISTILLING, distill
from obce.plan import plan
from obce.prune import prune
from obce.run import load_model, load_tokenizer
from obce.scoring import score
from obce.sensitivity import sensitivity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=DISTILLING.epochs)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.3, 0.465])
    parser.add_argument("--score", nargs="+", default=["effect", "rf", "random"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "distill.csv")
    options = parser.parse_args()
    whole = read_corpus(default_corpus())
    scoring = Corpus(whole.texts[:2000], whole.source, 0, 0)
    model, tokenizer = load_model(default_model()), load_tokenizer(default_model())
    scores = score(model, tokenizer, scoring)
    curves = sensitivity(model, scores, scoring, tokenizer=tokenizer)
    held_out = tokenize(whole.texts[2000:], tokenizer)
    dense = embed(model, held_out)
    settings = replace(DISTILLING, epochs=options.epochs)
    for keep in options.keep:
        for name in options.score:
            made = plan(scores, keep=keep, of="encoder", score=name, sensitivity=curves, keep_constant=True)
            small = prune(model, made, texts=scoring, tokenizer=tokenizer)
            trained, history = distill(small, tokenizer, scoring, settings, teacher=model)
            row: dict[str, Any] = {
                **facts(),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "encoder_kept": keep,
                "score": name,
                "encoder_parameters": count_parameters(small)[1],
                "epochs": options.epochs,
                "learning_rate": settings.learning_rate,
                "repaired": round(fidelity(dense, embed(small, held_out)), 4),
                "trained": round(fidelity(dense, embed(trained, held_out)), 4),
                "training_s": round(history.seconds, 1),
            }
            print(row, flush=True)
            append_row(options.out, row)


if __name__ == "__main__":
    main()
