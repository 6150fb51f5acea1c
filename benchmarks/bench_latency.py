"""How much faster a cut encoder runs: the paper's size beside the dense model, in turn, in one run.

    python benchmarks/bench_latency.py [--model minilm|base|large] [--device cuda] [--dtype bfloat16]

32 texts of 64 tokens, no padding; the median over rounds of the ratio within a round. Random weights with the real
dimensions: time does not depend on the weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from obce.bench import append_row, facts
from obce.corpus import Batch
from obce.evaluate import count_parameters, latency
from obce.plan import plan
from obce.prune import prune
from obce.scores import Scores
from obce.sites import SITE_KINDS, architecture, find_sites, model_hash
from transformers import BertConfig, BertModel

# share of the encoder that the paper's size is, and dimensions
MODELS = {
    "minilm": (
        0.465,
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    ),
    "base": (0.465, {}),
    "large": (
        0.471,
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
}
TEXTS, TOKENS = 32, 64


def at_random(model: BertModel) -> Scores:
    """Scores of which only the random one is defined: enough for widths."""
    sites = find_sites(model)
    widths = [site.width for site in sites]
    return Scores(
        layer=np.repeat(np.array([site.layer for site in sites], np.int16), widths),
        site=np.repeat(np.array([SITE_KINDS.index(site.kind) for site in sites], np.int8), widths),
        index=np.concatenate([np.arange(width, dtype=np.int32) for width in widths]),
        constant=np.zeros(sum(widths), bool),
        columns={"random": np.random.default_rng(0).random(sum(widths))},
        meta={
            "model_hash": model_hash(model),
            "corpus_hash": "",
            "seed": 0,
            "architecture": architecture(model),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "latency.csv")
    options = parser.parse_args()
    keep, dimensions = MODELS[options.model]
    torch.manual_seed(0)
    dense = BertModel(BertConfig(**dimensions)).eval()
    small = prune(dense, plan(at_random(dense), keep=keep, of="encoder", score="random"), repair="none")
    ids = torch.randint(1000, 30000, (TEXTS, TOKENS))
    batch = Batch(np.arange(TEXTS), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    dtype = getattr(torch, options.dtype)
    models = {"dense": dense.to(options.device, dtype), "pruned": small.to(options.device, dtype)}
    timed = latency(models, [batch], repeats=options.repeats)
    row = {
        **facts(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
        "torch_threads": torch.get_num_threads(),
        "model": options.model,
        "dtype": options.dtype,
        "texts": TEXTS,
        "tokens": TOKENS,
        "encoder_kept": round(count_parameters(small)[1] / count_parameters(dense)[1], 4),
        "dense_ms": round(1e3 * timed["dense"].median, 3),
        "pruned_ms": round(1e3 * timed["pruned"].median, 3),
        "ratio": round(timed["pruned"].ratio, 4),
        "repeats": options.repeats,
    }
    for name, value in row.items():
        print(f"{name:16s} {value}")
    append_row(options.out, row)


if __name__ == "__main__":
    main()
