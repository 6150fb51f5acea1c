"""The tables of docs/results.md: what they show of rows whose means and spreads are known."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "results.py"
TASKS = ("SST-2", "STS-B")


@pytest.fixture(scope="module")
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows() -> list[dict[str, Any]]:
    """Effect is 0.1 ahead of r_f on seed 0 and 0.2 on seed 1, on both tasks alike; dense is 0.9."""
    found = []
    for seed in (0, 1):
        for name in TASKS:
            kl = math.nan if name == "STS-B" else 0.25
            plain: dict[str, Any] = {"task": name, "seed": seed, "kl": kl}
            blank = dict.fromkeys(("score", "keep", "of", "repair", "shares", "ridge"))
            found.append({**plain, **blank, "tuned": True, "headline": 0.9})
            for score, headline in (("effect", 0.8), ("rf", 0.7 - seed / 10)):
                for keep, tuned in ((0.465, False), (0.465, True), (0.5, False)):
                    how = {"keep": keep, "of": "encoder", "repair": "least_squares", "shares": "uniform"}
                    how["ridge"] = 0.1
                    found.append({**plain, "score": score, **how, "tuned": tuned, "headline": headline + tuned / 100})
    return found


def line(table: str, start: str) -> list[str]:
    (found,) = (one for one in table.splitlines() if one.startswith(f"| {start} |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_the_table_of_the_papers_size(results: ModuleType) -> None:
    table = results.paper_table(rows(), TASKS)
    assert line(table, "dense")[2:] == ["0.900 ± 0.000", "0.900 ± 0.000", "0.900 ± 0.000"]
    assert line(table, "r_f (the paper's) | no")[2:] == ["0.650 ± 0.071"] * 3
    assert line(table, "effect (default) | yes")[2:] == ["0.810 ± 0.000"] * 3


def test_differences_are_seed_by_seed(results: ModuleType) -> None:
    found = line(results.differences(rows(), TASKS, "uniform"), "r_f (the paper's)")
    assert found[1:] == ["+0.150 ± 0.071", "+0.150 ± 0.071"]
    unfinished = [row for row in rows() if (row["seed"], row["task"]) != (1, "STS-B")]
    table = results.differences(unfinished, TASKS, "uniform")
    assert line(table, "r_f (the paper's)")[1:] == ["+0.100", "+0.100"], "whole seeds"
    shared = [{**row, "shares": "estimated"} for row in rows() if row["score"] == "effect" or not row["tuned"]]
    table = results.differences(shared, TASKS, "estimated")
    assert line(table, "r_f (the paper's)")[1:] == ["+0.150 ± 0.071"], "not trained again"


def test_half_of_the_encoder_has_kl_where_there_is_one(results: ModuleType) -> None:
    shared = [{**row, "shares": "estimated", "headline": 0.85} for row in rows() if row["score"] == "effect"]
    table = results.half_table(rows() + shared, TASKS)
    assert line(table, "effect (default) | least squares")[2:] == ["0.800 ± 0.000 / 0.250 ± 0.000", "0.800 ± 0.000"]
    assert line(table, "effect (default), estimated shares | least squares")[2].startswith("0.850 ± 0.000 / 0.250")


def test_every_way_has_a_name_and_the_peers_stand_beside(results: ModuleType) -> None:
    for phase in ("paper", "grid", "ridge"):
        for seed in (0, 1):
            ways = results.ways(phase, seed, results.PEERS)
            assert len(set(ways)) == len(ways)
            assert {way.score for way in ways} <= set(results.NAMES)
    tuned = [way.score for way in results.ways("paper", 1, results.PEERS) if way.tune]
    assert {"effect", "rf", "random", "magnitude", "std", "taylor", *results.PEERS} <= set(tuned)


def test_ridges_stand_beside_each_other(results: ModuleType) -> None:
    some = [{**row, "shares": "estimated"} for row in rows() if row["score"] == "effect"]
    more = [{**row, "ridge": 0.001, "headline": 0.88} for row in some]
    table = results.ridge_table(rows() + some + more, TASKS)
    assert line(table, "46.5% | 0.1 | no")[3:] == ["0.800 ± 0.000 / 0.250 ± 0.000", "0.800 ± 0.000", "0.800 ± 0.000"]
    assert line(table, "46.5% | 0.001 | yes")[3:] == ["0.880 ± 0.000 / 0.250 ± 0.000", "0.880 ± 0.000", "0.880 ± 0.000"]
    assert "30.0%" not in table
    found = results.more_table([*some, *more])
    assert line(found, "effect (default), estimated shares")[1] == "0.803 ± 0.005"
    assert line(found, "effect (default), estimated shares, ridge 0.001")[1] == "0.880 ± 0.000"
