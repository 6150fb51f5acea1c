"""Site maps that were damaged or made to mislead, from seeds: each is refused in a sentence, or what it says is true.

    python tests/fuzz_sitemap.py --count 10000 --seed 0

Every mutant is a TOML file with a change or two. It must end in a map that a model is cut by, the pruned model giving
what the masked one gives, or in a `ValueError` of one sentence. Nothing may take long, touch another file, or end the
process.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from obce.prune import masked, prune
from obce.sitemap_obce import checked_site_map, read_site_map
from obce.sites import LAYOUTS, find_sites, register_sites

import fuzz_checkpoints
from tiny import SITE_MAPS, make_mapped, make_plan

FAMILY = "camembert"
DEEP = 20_000

# What may stand for a value, as TOML.
ODD = (
    "0", "1", "-1", "2", "12", "16", "1" + "0" * 21, "9" * 5000, "0.5", "nan", "inf", "true", "false", '""', '"x"',
    '"encoder.layer"', '"intermediate.dense"', '"output.dense"', '"attention.self.query"', '"attention.self.value"',
    '"attention.output.dense"', '"attention.self"', '"attention.output.LayerNorm"', '"../../x"', '"encoder..layer"',
    "[]", '"\\u0000"', "[0]", "[0, 1]", "[1]", "[-1]", "[17]", '["a", "b"]',
    '["intermediate.dense", "intermediate.dense"]',
    '["intermediate.dense", "output.dense"]', "{}", '{a = 1}', "1979-05-27", "[[[]]]", '"bert"', '"albert"',
    '"camembert"',
    '"' + "a" * 300 + '"', "[" * DEEP, "[" * 200 + "]" * 200, "'''x'''", '"é"',
)  # fmt: skip
KEYS = (
    "model_type", "stack", "sites", "blocks", "norms", "pre_norm", "first_norm", "last_norm", "heads", "positions",
    "query", "key", "value", "attention_output", "intermediate", "output", "x", "a.b", '""', '"é"', "sites.query",
)  # fmt: skip


def toml_of(plain: dict[str, Any]) -> list[str]:
    """Lines of a map's TOML, tables last."""
    flat = [f"{key} = {json.dumps(value)}" for key, value in plain.items() if not isinstance(value, dict)]
    for key, table in plain.items():
        if isinstance(table, dict):
            flat += [f"[{key}]", *(f"{name} = {json.dumps(value)}" for name, value in table.items())]
    return flat


def mutate(lines: list[str], rng: random.Random) -> bytes:
    """One or two changes."""
    lines = list(lines)
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(lines))
        key, _, value = lines[at].partition(" = ")
        how = rng.randrange(7)
        if how == 0:
            del lines[at]
        elif how == 1:
            lines[at] = f"{rng.choice(KEYS)} = {value or rng.choice(ODD)}"
        elif how == 2:
            lines.insert(at, f"{rng.choice(KEYS)} = {rng.choice(ODD)}")
        elif how == 3:
            lines.insert(at, rng.choice(("[sites]", "[blocks]", "[x]", "[[sites]]", "[a.b.c]", "[", "=", "\x00")))
        elif how == 4 and len(lines) > 1:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        else:
            lines[at] = f"{key} = {rng.choice(ODD)}"
        if not lines:
            lines = ["x = 1"]
    data = "\n".join(lines).encode()
    if rng.random() < 0.15 and data:
        place = rng.randrange(len(data))
        data = rng.choice(
            (
                data[:place],
                data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :],
                data.decode().encode("utf-16"),
            )
        )
    return data


@contextmanager
def known_again() -> Iterator[None]:
    """Families that are registered inside the `with` are forgotten behind it."""
    before = dict(LAYOUTS)
    try:
        yield
    finally:
        LAYOUTS.clear()
        LAYOUTS.update(before)


def use(path: Path, model: Any) -> None:
    """Reads the map, and cuts the model by it if it is of its family."""
    plain = read_site_map(path)
    assert checked_site_map(json.loads(json.dumps(plain)), "again") == plain
    with known_again():
        if register_sites(path) != FAMILY:
            return
        sites = find_sites(model)
        kept = {site.name: tuple(range(0, site.width, 2)) for site in sites if site.layer == 1}
        plan = make_plan(model, kept)
        small = prune(model, plan, repair="none")
        ids = torch.arange(5, 17).reshape(2, 6)
        with torch.no_grad():
            found = small(input_ids=ids).last_hidden_state
            with masked(model, plan, repair="none"):
                expected = model(input_ids=ids).last_hidden_state
        assert float((found - expected).abs().max()) < 1e-5


def try_mutant(seed: int, folder: Path, model: Any) -> fuzz_checkpoints.Outcome:
    """Writes mutant `seed` into the folder and uses it."""
    rng = random.Random(seed)  # noqa: S311  (test data)
    plain = json.loads(json.dumps(SITE_MAPS[FAMILY]))
    if rng.random() < 0.3:
        plain["blocks"] = {"value": [0], "intermediate": [0]}
    path = folder / "map.toml"
    path.write_bytes(mutate(toml_of(plain), rng))
    return fuzz_checkpoints.attempt(lambda: use(path, model), folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first mutant; each of the others has the next one")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = make_mapped(FAMILY)
    ends: Counter[str] = Counter()
    slowest, started = 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        for seed in range(arguments.seed, arguments.seed + arguments.count):
            at = time.monotonic()
            found = try_mutant(seed, Path(place), model)
            slowest = max(slowest, time.monotonic() - at)
            ends[found.what] += 1
            if found.what == "failed":
                print(f"seed {seed}: {found.kind}: {found.words}\n", flush=True)
    print(", ".join(f"{name} {count:,}" for name, count in sorted(ends.items())))
    print(f"{arguments.count:,} mutants in {time.monotonic() - started:.0f} s, slowest {slowest:.2f} s")
    return int(ends["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
