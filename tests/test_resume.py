"""Runs that end in the middle: killed at any moment, started twice, or told to do something else."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from obce.corpus import read_corpus
from obce.run import Run

from tiny import equal_scores

if TYPE_CHECKING:
    pass

# More by hand: OBCE_TEST_KILLS=20 pytest tests/test_resume.py
KILLS = int(os.environ.get("OBCE_TEST_KILLS", "2"))
TEXTS = 500
LAUNCH = "import sys; from obce.cli import main; sys.argv[0] = 'obce'; main()"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-P", "-c", LAUNCH, *map(str, arguments)]


def torchrun(*arguments: object) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "obce"]
    return [sys.executable, *launch, *map(str, arguments)]


def same_scores(a: Path, b: Path) -> None:
    equal_scores(Run(a).scores(), Run(b).scores())


Scoring = tuple[list[object], Path, float]


def undisturbed(kept: str, folder: Path, model: Path, corpus: Path) -> Scoring:
    """Arguments of a scoring in 14 shards, the run it makes undisturbed, and how long that takes."""
    arguments = ["score", model, corpus, "--limit", TEXTS, "--shard-texts", 40, kept, "--threads", 1]
    begin = time.monotonic()
    subprocess.run(command(*arguments, "--out", folder), check=True, capture_output=True)
    return arguments, folder, time.monotonic() - begin


@pytest.fixture(scope="module")
def exactly(tmp_path_factory: pytest.TempPathFactory, tiny_bert_dir: Path, wikipedia: Path) -> Scoring:
    return undisturbed("--exact", tmp_path_factory.mktemp("exact") / "run", tiny_bert_dir, wikipedia)


@pytest.fixture(scope="module", params=["--exact", "--sketch"])
def scoring(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_bert_dir: Path, wikipedia: Path
) -> Scoring:
    if request.param == "--exact":
        return request.getfixturevalue("exactly")
    return undisturbed("--sketch", tmp_path_factory.mktemp("sketch") / "run", tiny_bert_dir, wikipedia)


def shards_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "shards").glob("*.safetensors"))


def test_killed_at_random_moments(scoring: Scoring, tmp_path: Path) -> None:
    arguments, whole, _ = scoring
    rng = random.Random(0)  # noqa: S311  (moments)
    killed = with_shards = 0
    for attempt in range(100 * KILLS):
        out = tmp_path / str(killed)
        process = subprocess.Popen(
            command(*arguments, "--out", out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # mostly while shards are written, now and then while everything is loaded
        while attempt % 4 and not shards_of(out) and process.poll() is None:
            time.sleep(0.005)
        try:
            process.wait(rng.uniform(0, 0.6))
            continue  # it was done before
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        killed += 1
        with_shards += bool(shards_of(out))
        subprocess.run(command(*arguments, "--out", out), check=True, capture_output=True)
        same_scores(out, whole)
        assert not (out / "shards").exists()
        assert not list(out.glob(".partial-*"))
        if killed == KILLS:
            break
    assert killed == KILLS
    assert with_shards


def stopped_in_the_middle(arguments: list[object], out: Path, sig: int = signal.SIGKILL) -> str:
    process = subprocess.Popen(
        command(*arguments, "--out", out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not shards_of(out):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(sig)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (-sig, 128 + sig)
    return errors


def test_something_else_is_refused_and_the_same_goes_on(
    exactly: Scoring, tiny_bert_dir: Path, wikipedia: Path, tmp_path: Path
) -> None:
    arguments, whole, _ = exactly
    out = tmp_path / "run"
    stopped_in_the_middle(arguments, out)
    before = shards_of(out)
    corpus = read_corpus(wikipedia, limit=TEXTS)
    for change, word in (
        ({"seed": 1}, "seed"),
        ({"corpus": read_corpus(wikipedia, limit=TEXTS - 1)}, "corpus"),
        ({"max_length": 16}, "maximum length"),
        ({"shard_texts": 200}, "number of texts a shard"),
        ({"batch_tokens": 500}, "number of tokens a pass"),
        ({"tokens": False}, "choice of sums over all tokens"),
        ({"cloud_texts": 100}, "number of texts in the clouds"),
        ({"precision": "bfloat16"}, "precision"),
        ({"exact": False}, "choice between every value and a sketch"),
    ):
        settings: dict[str, Any] = {"corpus": corpus, "exact": True, "shard_texts": 40, **change}
        with pytest.raises(ValueError, match=f"holds unfinished scores of another {word} .*choose another --out"):
            Run(out).score(str(tiny_bert_dir), settings.pop("corpus"), **settings)
    assert shards_of(out) == before
    dry = subprocess.run(command(*arguments, "--out", out, "--dry-run", "--json"), capture_output=True, check=True)
    assert 0 < json.loads(dry.stdout)["texts_done"] < TEXTS
    subprocess.run(command(*arguments, "--out", out), check=True, capture_output=True)
    same_scores(out, whole)


def test_two_runs_in_one_directory(exactly: Scoring, tmp_path: Path) -> None:
    arguments, whole, _ = exactly
    out = tmp_path / "run"
    first = subprocess.Popen(command(*arguments, "--out", out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not shards_of(out):
        assert first.poll() is None
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)  # so that it is not done before the second one asks
    try:
        second = subprocess.run(command(*arguments, "--out", out), capture_output=True, text=True, check=False)
    finally:
        first.send_signal(signal.SIGCONT)
    assert second.returncode == 2
    assert "is in use by another process: wait for it, or choose another --out" in second.stderr
    assert first.wait(120) == 0
    same_scores(out, whole)


def test_a_shard_that_vanished_or_was_damaged(exactly: Scoring, tmp_path: Path) -> None:
    arguments, whole, _ = exactly
    out = tmp_path / "run"
    stopped_in_the_middle(arguments, out)
    damaged = out / "shards" / shards_of(out)[0]
    damaged.write_bytes(damaged.read_bytes()[:1000])
    found = subprocess.run(command(*arguments, "--out", out), capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "is missing or damaged" in found.stderr
    assert "remove it, and score again" in found.stderr
    assert "Traceback" not in found.stderr
    damaged.unlink()
    subprocess.run(command(*arguments, "--out", out), check=True, capture_output=True)
    same_scores(out, whole)


def test_sigterm_ends_with_a_sentence(exactly: Scoring, tmp_path: Path) -> None:
    arguments, _, _ = exactly
    errors = stopped_in_the_middle(arguments, tmp_path / "run", signal.SIGTERM)
    assert "terminated, as torchrun does when another process ends: finished shards are kept" in errors
    assert "Traceback" not in errors


def children_of(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if f"\nPPid:\t{parent}\n" in status.read_text(encoding="utf-8"):
                found.append(int(status.parent.name))
    return sorted(found)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a job in /proc")
def test_torchrun(scoring: Scoring, tmp_path: Path) -> None:
    """Two processes as one, bit for bit, and after one of them was killed."""
    arguments, whole, _ = scoring
    environment: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    out = tmp_path / "run"
    subprocess.run(torchrun(*arguments, "--out", out), check=True, capture_output=True, env=environment)
    same_scores(out, whole)

    out = tmp_path / "killed"
    job = subprocess.Popen(
        torchrun(*arguments, "--out", out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    while len(shards_of(out)) < 2:
        assert job.poll() is None
        time.sleep(0.005)
    os.kill(children_of(job.pid)[-1], signal.SIGKILL)
    _, errors = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "finished shards are kept" in errors or "what was finished is kept" in errors
    assert shards_of(out)
    # one process goes on where two stopped
    subprocess.run(command(*arguments, "--out", out), check=True, capture_output=True, env=environment)
    same_scores(out, whole)
