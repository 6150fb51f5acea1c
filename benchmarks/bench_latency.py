"""How much faster a cut encoder runs: the paper's size beside the dense model, in turn, in one run.

    python benchmarks/bench_latency.py [--model minilm|base|large ...] [--device cuda] [--dtype bfloat16 ...]

Every model is cut once for each --multiple, whose multiples all widths then are, and timed in each --dtype with each
number of --texts, of 64 tokens, no padding; the median over rounds of the ratio within a round. Random weights with the
real dimensions: time does not depend on the weights.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from obce.bench import append_row, facts
from obce.corpus import Batch
from obce.evaluate import count_parameters, latency
from obce.plan import plan
from obce.prune import prune
from obce.scores import Scores
from obce.sites import SITE_KINDS, architecture, find_sites, model_hash
from transformers import BertConfig, BertModel, PreTrainedModel

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
TOKENS = 64


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
    parser.add_argument("--model", choices=MODELS, default=["minilm"], nargs="+")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=["float32"], nargs="+")
    parser.add_argument("--multiple", type=int, default=[1], nargs="+")
    parser.add_argument("--texts", type=int, default=[32], nargs="+", help="in a batch")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--limit", type=float, help="seconds after which nothing further is begun")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "latency.csv")
    options = parser.parse_args()
    begin = time.perf_counter()
    for name in options.model:
        keep, dimensions = MODELS[name]
        torch.manual_seed(0)
        dense = BertModel(BertConfig(**dimensions)).eval().to(options.device)
        for multiple in options.multiple:
            spent = time.perf_counter() - begin
            if options.limit is not None and spent > options.limit:
                print(f"{name}, multiple {multiple}: not measured, {spent:.0f} s are spent", flush=True)
                continue
            made = plan(at_random(dense), keep=keep, of="encoder", score="random", multiple=multiple)
            small = prune(dense, made, repair="none")
            for dtype in options.dtype:
                cast = getattr(torch, dtype)
                models = {"dense": copy.deepcopy(dense).to(cast), "pruned": copy.deepcopy(small).to(cast)}
                for texts in options.texts:
                    measure(options, {"model": name, "dtype": dtype, "texts": texts}, multiple, models)


def measure(options: argparse.Namespace, of: dict[str, Any], multiple: int, models: dict[str, PreTrainedModel]) -> None:
    """One row of the CSV."""
    ids = torch.randint(1000, 30000, (of["texts"], TOKENS))
    batch = Batch(np.arange(len(ids)), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    timed = latency(models, [batch], repeats=options.repeats)
    row = {
        **facts(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
        "torch_threads": torch.get_num_threads(),
        **of,
        "tokens": TOKENS,
        "encoder_kept": round(count_parameters(models["pruned"])[1] / count_parameters(models["dense"])[1], 4),
        "dense_ms": round(1e3 * timed["dense"].median, 3),
        "pruned_ms": round(1e3 * timed["pruned"].median, 3),
        "ratio": round(timed["pruned"].ratio, 4),
        "repeats": options.repeats,
        "multiple": multiple,
    }
    for column, value in row.items():
        print(f"{column:16s} {value}", flush=True)
    append_row(options.out, row)


if __name__ == "__main__":
    main()
