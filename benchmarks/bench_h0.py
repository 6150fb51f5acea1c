"""The engine beside its peers, from a checkout: `obce bench` with the CSV of this folder as its output.

    python benchmarks/bench_h0.py [--quick] [--case NAME] [--out CSV]

Cases, peers and the runner are in obce/bench.py; plots are made from the CSV by benchmarks/plot.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

from obce.cli import main

if __name__ == "__main__":
    if "--out" not in sys.argv:
        sys.argv += ["--out", str(Path(__file__).parent / "results" / "h0.csv")]
    sys.argv.insert(1, "bench")
    main()
