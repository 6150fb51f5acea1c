"""Adversarial streams against the sort of everything: no certificate of a sketch may be wrong.

    python tests/verify_sketch.py --streams 100000

Each stream is of one of the kinds of tests/test_sketch.py (heavy tails, ties, constant, growing range, subnormal, huge
offset ...), of 1 to 2,000 values, comes in random pieces, and is held in 2 to 256 cells.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np


def laws() -> ModuleType:
    spec = importlib.util.spec_from_file_location("test_sketch", Path(__file__).with_name("test_sketch.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verify(streams: int, seed: int = 0) -> dict[str, int]:
    """How many streams were looked at, how many r_f were certified, how many claims were wrong."""
    test = laws()
    rng = np.random.default_rng(seed)
    found = {"streams": 0, "certified": 0, "wrong": 0}
    while found["streams"] < streams:
        n = int(2 ** rng.uniform(0, 11))
        cells = int(rng.choice([2, 3, 8, 32, 64, 256]))
        values = test.streams(n, int(rng.integers(2**31)))
        flaws = test.wrong_certificates(values, cells)
        for flaw in flaws:
            print(f"n {n}, cells {cells}: {flaw}", file=sys.stderr)
        found["streams"] += len(values)
        found["certified"] += int(test.fed(values, cells, []).gaps().certified.sum())
        found["wrong"] += len(flaws)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begin = time.monotonic()
    found = verify(options.streams, options.seed)
    print(f"{found} in {time.monotonic() - begin:.0f} s")
    sys.exit(found["wrong"] > 0)


if __name__ == "__main__":
    main()
