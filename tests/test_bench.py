"""The benchmark suite: wrong, crashing and missing peers become rows, nothing wrong is timed; no time is asserted."""

from __future__ import annotations

import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from obce import bench, h0
from obce.cli import app
from typer.testing import CliRunner

if TYPE_CHECKING:
    from types import ModuleType

CASE = bench.Case("fake case", "cloud", "deaths", 6, 40, 3)
EFFORT = bench.Effort(budget=30.0, call=0.02, repetitions=3)
OBCE = bench.PEERS[0]

FAKES = """
    import os, signal, time
    import obce

    def right(data, case, threads):
        return obce.h0(data).deaths

    def wrong(data, case, threads):
        deaths = obce.h0(data).deaths.copy()
        deaths[:, -1] *= 1.001
        return deaths

    def raises(data, case, threads):
        raise ValueError("no clouds today")

    def dies(data, case, threads):
        os.kill(os.getpid(), signal.SIGKILL)

    def hangs(data, case, threads):
        if len(data) == 1:  # the first cloud, which is checked
            time.sleep(60)
        return obce.h0(data).deaths

    def many(data, case, threads):
        return int(os.environ["OMP_NUM_THREADS"]) + obce.h0(data).deaths * 0
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that the peers' processes can import too."""
    (tmp_path / "obce_fake_peers.py").write_text(textwrap.dedent(FAKES), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    sys.modules.pop("obce_fake_peers", None)
    import obce_fake_peers  # type: ignore[import-not-found]

    return obce_fake_peers  # type: ignore[no-any-return]


def fake(fakes: ModuleType, call: str, **changes: Any) -> bench.Peer:
    peer = bench.Peer(call, "", "no-such-distribution", "MIT", ("cloud",), getattr(fakes, call), dtype="float32")
    return replace(peer, **changes)


def rows_of(case: bench.Case, peers: list[bench.Peer], effort: bench.Effort = EFFORT) -> dict[str, bench.Row]:
    processes = [bench.Process(peer, 1) for peer in peers]
    try:
        return {row["peer"]: row for row in bench.measure(case, processes, effort, {})}
    finally:
        for process in processes:
            process.close()


def test_a_wrong_answer_is_refused_and_never_timed(fakes: ModuleType) -> None:
    rows = rows_of(CASE, [OBCE, fake(fakes, "right"), fake(fakes, "wrong")])
    assert [rows[name]["status"] for name in ("obce", "right", "wrong")] == ["ok", "ok", "wrong"]
    assert "expected" in rows["wrong"]["reason"]
    for column in ("wall_p50", "cpu_p50", "ratio", "repetitions", "verified"):
        assert rows["wrong"][column] == ""
        assert rows["right"][column] != ""
    assert rows["obce"]["ratio"] == "1"


def test_crashing_raising_and_missing_peers_are_rows_with_the_reason(fakes: ModuleType) -> None:
    missing = fake(fakes, "right", name="missing", package="no_such_module_of_ours")
    peers = [OBCE, fake(fakes, "dies"), fake(fakes, "raises"), missing, fake(fakes, "right", most_points=9)]
    rows = rows_of(CASE, peers)
    assert rows["obce"]["status"] == "ok"
    assert (rows["dies"]["status"], rows["dies"]["reason"]) == ("crashed", "its process ended with signal 9")
    assert (rows["raises"]["status"], rows["raises"]["reason"]) == ("failed", "ValueError: no clouds today")
    assert rows["missing"]["status"] == "missing"
    assert "no_such_module_of_ours is not installed; pip install" in rows["missing"]["reason"]
    assert rows["right"]["status"] == "refused"
    assert "not asked above 9 points" in rows["right"]["reason"]


def test_a_peer_that_hangs_is_over_budget_and_the_others_go_on(fakes: ModuleType) -> None:
    rows = rows_of(CASE, [OBCE, fake(fakes, "hangs"), fake(fakes, "right")], replace(EFFORT, budget=2.0))
    assert rows["hangs"]["status"] == "over budget"
    assert rows["right"]["status"] == "ok"


def test_a_process_gets_its_number_of_threads(fakes: ModuleType, tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", CASE.make())
    process = bench.Process(fake(fakes, "many"), 2)
    try:
        process.ask(60, "load", CASE, tmp_path / "data.npy")
        answer, spent = process.ask(60, "run", 1, None, 1, True, True)
    finally:
        process.close()
    assert (answer == 2).all()
    assert spent.wall > 0


def test_csv_resumes_and_keeps_to_one_suite(fakes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK", (CASE,))
    monkeypatch.setattr(bench, "FULL", (replace(CASE, name="other case"),))
    monkeypatch.setattr(bench, "_commit", lambda: "0123456789ab")
    peers = [OBCE, fake(fakes, "right", threaded=True)]
    out = tmp_path / "new" / "h0.csv"
    told: list[str] = []
    first = bench.run(quick=True, out=out, peers=peers, tell=told.append)
    header = out.read_text(encoding="utf-8").splitlines()[0].split(",")
    assert tuple(header) == bench.COLUMNS
    assert bench.read_rows(out) == first
    for row in first:
        assert row["commit"] == "0123456789ab"
        assert all(row[name] for name in ("date", "machine", "versions", "peak_gflop_s", "peak_gb_s", "licence"))
        assert float(row["wall_p20"]) <= float(row["wall_p50"]) <= float(row["wall_p80"])
    again = bench.run(quick=True, out=out, peers=peers, tell=told.append)
    assert again == first  # dates and times too: nothing was measured again
    monkeypatch.setattr(bench, "_commit", lambda: "0123456789ab-dirty")
    assert bench.run(quick=True, out=out, peers=peers, tell=told.append) != first
    full = bench.run(out=out, peers=peers, threads=[1, 2], tell=told.append)
    assert {row["suite"] for row in bench.read_rows(out)} == {"full"}
    assert {(row["peer"], row["threads"]) for row in full} == {(p.name, t) for p in peers for t in ("1", "2")}
    with pytest.raises(ValueError, match="expected part of one of: fake case"):
        bench.run(quick=True, case="nothing", peers=peers, tell=told.append)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="columns of another program"):
        bench.run(quick=True, out=tmp_path / "other.csv", peers=peers, tell=told.append)


def test_a_peer_that_was_installed_since_is_measured(
    fakes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "QUICK", (CASE,))
    monkeypatch.setattr(bench, "_commit", lambda: "0123456789ab")
    out = tmp_path / "h0.csv"

    def rows(**changes: Any) -> list[bench.Row]:
        peers = [OBCE, fake(fakes, "right", **changes)]
        return bench.run(quick=True, out=out, peers=peers, tell=lambda line: None)

    first = rows(package="no_such_module_of_ours")
    assert first[1]["status"] == "missing"
    assert rows(package="no_such_module_of_ours") == first
    second = rows(distribution="numpy")
    assert (second[1]["status"], second[1]["version"]) == ("ok", np.__version__)
    assert rows(distribution="numpy") == second
    assert bench._installed_since(second[1], fake(fakes, "right", distribution="scipy")), "another version"
    assert [path.name for path in tmp_path.glob("h0*")] == ["h0.csv"]


def test_our_own_wrong_answer_is_an_error(fakes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK", (CASE,))
    with pytest.raises(RuntimeError, match=r"^wrong on 'fake case': wrong, it answered"):
        bench.run(quick=True, peers=[fake(fakes, "wrong", ours=True)], tell=lambda line: None)


def test_every_peer_that_is_installed_is_right_on_every_kind() -> None:
    cases = (
        bench.Case("r_f", "line", "r_f", 3, 100, 1),
        bench.Case("deaths", "line", "deaths", 3, 100, 1),
        bench.Case("bagged", "line", "bagged", 3, 100, 1, group=20),
        bench.Case("clouds", "cloud", "deaths", 3, 100, 3),
        bench.Case("matrices", "matrix", "deaths", 3, 100, 3),
    )
    for case in cases:
        data = case.make()
        right = bench.expected(case, data)
        for peer in bench.PEERS:
            # numba's first compilation has its place in `obce bench`
            if peer.does(case) and peer.why_not() is None and "numba" not in peer.package:
                given = data.astype(peer.dtype)
                got = peer.run(peer.prepare(given, case) if peer.prepare else given, case, 1)
                bench.compare(got, right, case, peer.ours)


def test_scipy_and_the_certificate_agree_with_the_oracle() -> None:
    case = bench.Case("cloud", "cloud", "deaths", 1, 300, 3, clusters=4)
    data = case.make()
    found = h0(data, edges=True)
    deaths, edges = np.asarray(found.deaths)[0], np.asarray(found.edges)[0]
    lengths = bench.certify(data[0], deaths, edges)
    right = bench.expected(case, data)
    assert right.exact
    assert np.allclose(lengths, right.answer[0], rtol=1e-6)

    broken = edges.copy()
    broken[-1] = broken[0]
    with pytest.raises(bench.WrongAnswerError, match="not the lengths"):
        bench.certify(data[0], deaths, broken)
    again = np.concatenate([deaths[:-1], deaths[:1]])
    with pytest.raises(bench.WrongAnswerError, match="reach"):
        bench.certify(data[0], np.sort(again), broken)
    side = edges[-1, 0]  # a star spans the cloud, and is not the shortest tree
    star = np.stack([np.full(299, side), np.delete(np.arange(300), side)], 1)
    long = np.sqrt(((data[0][star[:, 0]].astype(float) - data[0][star[:, 1]]) ** 2).sum(1))
    with pytest.raises(bench.WrongAnswerError, match="closer than the longest edge"):
        bench.certify(data[0], np.sort(long), star)


def test_growth_is_the_slope_of_the_logarithms() -> None:
    def row(n: int, seconds: float, status: str = "ok") -> bench.Row:
        known = {"series": "cloud n", "n": str(n), "peer": "p", "threads": "1", "status": status}
        return dict.fromkeys(bench.COLUMNS, "") | known | {"wall_p50": str(seconds)}

    rows = [row(10, 1.0), row(100, 100.0), row(1_000, 10_000.0), row(5, 0.0, "wrong")]
    assert bench.growth(rows) == {("cloud n", "p", "1"): pytest.approx(2.0)}
    assert list(bench.growth_lines(rows)) == ["time ~ n^p (cloud n, 1 thread): p 2.00"]
    assert bench.growth(rows[:1]) == {}


def test_cases_are_named_once_and_always_the_same() -> None:
    for suite in (bench.FULL, bench.QUICK):
        assert len({case.name for case in suite}) == len(suite)
        assert {case.series for case in suite} == {"", "n", "d", "B", "cloud n"}
    assert (CASE.make() == CASE.make()).all()
    matrix = bench.Case("m", "matrix", "deaths", 2, 30, 3).make()
    assert (matrix == matrix.transpose(0, 2, 1)).all()


def test_a_row_of_other_columns_goes_to_another_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, other = tmp_path / "score.csv", tmp_path / "score-2.csv"
    for row in ({"a": 1}, {"a": 2, "b": 3}, {"a": 4}, {"a": 5, "b": 6}):
        bench.append_row(out, row)
    assert out.read_text() == "a\n1\n4\n"
    assert other.read_text() == "a,b\n2,3\n5,6\n"
    sentence = f"{out} has columns of another program or version; the row is in {other}.\n"
    assert capsys.readouterr().err == 2 * sentence


@pytest.mark.slow
def test_the_quick_suite_runs(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["bench", "--quick", "--out", str(tmp_path / "h0.csv")])
    assert found.exit_code == 0, found.output
    rows = bench.read_rows(tmp_path / "h0.csv")
    assert {row["case"] for row in rows} == {case.name for case in bench.QUICK}
    assert {row["status"] for row in rows if row["peer"] == "obce"} == {"ok"}
    assert "time ~ n^p" in found.output


def test_an_unknown_case_is_one_sentence() -> None:
    found = CliRunner().invoke(app, ["bench", "--quick", "--case", "nonsense"])
    assert found.exit_code == 2
    assert "case is 'nonsense', expected part of one of" in found.stderr
