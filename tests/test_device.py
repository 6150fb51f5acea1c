"""Scoring that stays on the device, run on the CPU: the same functions, by torch and by Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from obce import device, scoring
from obce.capture import capture, capture_resident
from obce.clouds import CLOUD_KINDS
from obce.corpus import read_corpus, read_pictures, tokenize
from obce.device import DeviceCells, TokenSlots
from obce.h0 import r_f
from obce.run import _Files
from obce.scores import Scores, rank_correlation
from obce.scoring import Kept, MemoryStore, ShardProgress, _rank_correlations, score
from obce.sites import find_sites
from obce.sketch import GapCells, Moments, TokenMoments, TokenSums

from tiny import equal_scores, make_encoder, make_pictures, processed

if TYPE_CHECKING:
    from transformers import BertModel


@pytest.fixture
def resident(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "RESIDENT", {"cpu"})


# ---- capture


@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # packed, and padded
@pytest.mark.parametrize("memory", ["model", "layer"])
@pytest.mark.parametrize("tokens", [True, False])
def test_capture_as_on_the_host(
    tokens: bool,
    memory: Any,
    attention: str,
    make_bert: Any,
    texts: list[str],
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_bert(attn_implementation=attention)
    sites = find_sites(model)
    batches = tokenize(texts[:50], tiny_tokenizer, max_length=32, batch_tokens=40)
    chosen = np.zeros(50, bool)
    chosen[[3, 8, 40, 41]] = True
    settings: dict[str, Any] = {"memory": memory, "tokens": tokens, "chosen": chosen}
    expected = list(capture(model, batches, sites, **settings))
    monkeypatch.setattr(device, "RESIDENT", {"cpu"})
    done: list[tuple[float, float]] = []
    found = list(capture(model, batches, sites, progress=lambda a, b: done.append((a, b)), **settings))
    assert done[-1] == pytest.approx((50, 50))
    assert model.config._attn_implementation == attention
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.columns == theirs.columns
        np.testing.assert_allclose(mine.values, theirs.values, rtol=0, atol=1e-5)
        assert set(mine.clouds) == set(CLOUD_KINDS)
        for kind, vectors in mine.clouds.items():
            np.testing.assert_allclose(vectors, theirs.clouds[kind], rtol=0, atol=1e-5)
        assert set(mine.tokens) == set(theirs.tokens)
        for kind, sums in mine.tokens.items():
            other = theirs.tokens[kind]
            assert sums.count == other.count == batches.n_tokens
            np.testing.assert_allclose(sums.sums, other.sums, rtol=1e-5, atol=1e-3)
            np.testing.assert_allclose(sums.squares, other.squares, rtol=1e-5)
            np.testing.assert_allclose(sums.least, other.least, rtol=0, atol=1e-5)
            np.testing.assert_allclose(sums.greatest, other.greatest, rtol=0, atol=1e-5)


def test_packs_hold_every_token_once(texts: list[str], tiny_tokenizer: Any) -> None:
    batches = tokenize(texts[:50], tiny_tokenizer, max_length=32, batch_tokens=100)
    padded = {}
    for batch in batches:
        for row, text in enumerate(batch.indices.tolist()):
            real = batch.inputs["attention_mask"][row].bool()
            padded[text] = {name: tensor[row][real].tolist() for name, tensor in batch.inputs.items()}
    for size in (1, 90, 10**6):
        packs = list(batches.packs(size))
        assert len(packs) == min(50, -(-batches.n_tokens // size)) or size == 1
        assert sorted(np.concatenate([pack.indices for pack in packs])) == list(range(50))
        for pack in packs:
            starts = np.cumsum(pack.lengths) - pack.lengths
            for text, start, length in zip(pack.indices.tolist(), starts, pack.lengths, strict=True):
                here = slice(start, start + length)
                assert pack.inputs["position_ids"][0, here].tolist() == list(range(length))
                for name in ("input_ids", "token_type_ids"):
                    assert pack.inputs[name][0, here].tolist() == padded[text][name]


@pytest.mark.usefixtures("resident")
def test_narrow_weights_are_put_back(tiny_bert: BertModel, texts: list[str], tiny_tokenizer: Any) -> None:
    batches = tokenize(texts[:50], tiny_tokenizer, max_length=32, batch_tokens=100)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in tiny_bert.state_dict().items()}
    sites = find_sites(tiny_bert)
    wide = list(capture(tiny_bert, batches, sites))
    narrow = list(capture(tiny_bert, batches, sites, precision="bfloat16"))
    differ = [np.abs(a.values - b.values).max() for a, b in zip(wide, narrow, strict=True)]
    assert all(0 < value < 0.2 for value in differ)

    def fail(*_: Any) -> None:
        assert tiny_bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16
        raise RuntimeError("stopped")

    handle = tiny_bert.encoder.layer[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stopped"):
        list(capture(tiny_bert, batches, sites, precision="bfloat16"))
    handle.remove()
    assert tiny_bert.config._attn_implementation == "sdpa"
    for name, tensor in tiny_bert.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])


@pytest.mark.usefixtures("resident")
def test_what_is_not_finite_is_named(tiny_bert: BertModel, texts: list[str], tiny_tokenizer: Any) -> None:
    batches = tokenize(texts[:50], tiny_tokenizer, max_length=32, batch_tokens=100)
    sites = find_sites(tiny_bert)
    with torch.no_grad():
        tiny_bert.encoder.layer[1].attention.self.key.bias[5] = torch.inf
    with pytest.raises(ValueError, match=r"for neuron 1\.key\.5 on text \d+.*layer\.1\.attention\.self\.key"):
        list(capture(tiny_bert, batches, sites))


@pytest.mark.usefixtures("resident")
def test_nothing_waits_for_the_device(make_bert: Any, texts: list[str], tiny_tokenizer: Any) -> None:
    """Operations that make the host wait on a device do not occur once texts run through the model."""
    from torch.utils._python_dispatch import TorchDispatchMode

    waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::item", "aten::is_nonzero"}
    seen: dict[str, int] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen[func._schema.name] = seen.get(func._schema.name, 0) + 1
            return func(*args, **(kwargs or {}))

    model = make_bert()
    batches = tokenize(texts[:50], tiny_tokenizer, max_length=32, batch_tokens=100)
    with Watch():
        (taken,) = capture_resident(model, batches, find_sites(model), chosen=np.ones(50, bool))
        device.column_sums(taken.values)
        device.bags(taken.values, device.groups_of(50, taken.values.device, taken.places))
    assert seen["aten::addmm"] > 0
    assert not waits & set(seen)


# ---- what is kept of values


def values_of(g: np.random.Generator, n: int, kind: str) -> np.ndarray:
    if kind == "wide":
        return (g.standard_normal((n, 70)) * np.exp(5 * g.standard_normal(70))).astype(np.float32)
    scales = g.choice([0, 1, 1e-3, 1e30, 1e-40], 70)  # ties, constants, zeros of both signs, subnormals
    return (g.integers(-3, 4, (n, 70)) * scales).astype(np.float32)


def same_cells(mine: DeviceCells, theirs: GapCells) -> None:
    for name, array in mine.host().arrays().items():
        np.testing.assert_array_equal(array, theirs.arrays()[name], err_msg=name)
    fetch = device.Fetch()
    mine.ask_gaps(fetch)
    found, expected = device.gaps_of(fetch.wait()), theirs.gaps()
    for name in ("low", "high", "texts", "least", "greatest"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def check_cells_and_sums(where: str = "cpu", sizes: tuple[int, ...] = (1, 2, 7, 20, 45, 300)) -> None:
    g = np.random.default_rng(0)
    at = torch.device(where)
    for n in sizes:
        made = []
        for kind in ("wide", "ties"):
            values = values_of(g, n, kind)
            lines, tensor = np.ascontiguousarray(values.T), torch.from_numpy(values).to(at)
            ids = g.permutation(1000)[:n].astype(np.int64)
            sums = device.column_sums(tensor)
            assert (sums.bad == 2**31 - 1).all()
            mine, theirs = DeviceCells.empty(70, at), GapCells.empty(70)
            mine.fill(tensor, torch.from_numpy(ids).to(at), sums.least, sums.greatest)
            theirs.update(lines, ids)
            same_cells(mine, theirs)
            same_cells(DeviceCells.from_host(theirs, at), theirs)
            made.append((mine, theirs))
            moments, tokens = Moments.empty(70), TokenMoments.empty(70)
            groups = device.groups_of(n, at)
            gaps = device.bags(tensor, groups) if len(groups) else torch.zeros(70, dtype=torch.float64)
            parts = [part.cpu().numpy() for part in (sums.positive, sums.negative, sums.squares, gaps)]
            device.add_sums(moments, tokens, [device.ShardSums(n, parts)])
            right = Moments.empty(70)
            right.update(lines)
            for name in ("mean", "mean_abs", "std", "rf_bagged"):
                ours, other = getattr(moments, name)(), getattr(right, name)()
                np.testing.assert_allclose(ours, other, rtol=1e-10, atol=1e-300, err_msg=name)
        (a, of_a), (b, of_b) = made
        a.merge(b)
        of_a.merge(of_b)
        same_cells(a, of_a)


def check_bags(where: str = "cpu") -> None:
    g = np.random.default_rng(1)
    values = g.standard_normal((50, 40)).astype(np.float32)
    values[:, 3] = 7
    values[:, 5] = g.integers(0, 3, 50)
    rows = np.stack([g.permutation(50)[:20] for _ in range(6)])
    right = sum(r_f(np.ascontiguousarray(values[row].T)).astype(float) for row in rows)
    found = device.bags(torch.from_numpy(values).to(where), torch.from_numpy(rows).to(where))
    np.testing.assert_allclose(found.cpu(), right, rtol=1e-14)


def check_bad_values(where: str = "cpu") -> None:
    values = torch.randn(50, 40, device=where)
    values[7, 3], values[9, 3], values[11, 5] = torch.nan, torch.inf, -torch.inf
    sums = device.column_sums(values)
    assert sums.bad[[3, 5]].tolist() == [7, 11]
    assert (~sums.squares.isfinite()).nonzero().flatten().tolist() == [3, 5]


TOKENS = (
    (3, 9, 40, 0.0, torch.bfloat16),
    (40, 33, 130, 1000.0, torch.float32),
    (40, 33, 130, 1000.0, torch.bfloat16),
    (1, 700, 64, 0.0, torch.float32),
)


def check_token_slots(where: str = "cpu", cases: Sequence[tuple[int, int, int, float, torch.dtype]] = TOKENS) -> None:
    """Ragged texts, NaN in the padding, a mean a thousand times the deviation, texts that a program begins inside."""
    g = np.random.default_rng(2)
    for b, T, width, mean, dtype in cases:
        lengths = g.integers(1, T + 1, b)
        lengths[0] = T
        tokens = (torch.from_numpy(g.standard_normal((b, T, width)).astype(np.float32)) + mean).to(dtype)
        dirty = tokens.clone()
        dirty[torch.arange(T)[None] >= torch.from_numpy(lengths)[:, None]] = torch.nan
        slots, right = TokenSlots(width + 8, torch.device(where)), TokenSums(width)
        for _ in range(2):
            slots.add(dirty.to(where), torch.from_numpy(lengths).to(where, torch.int32), slice(5, 5 + width))
            right.add(tokens, lengths)
        sums, squares, least, greatest = (part[5 : 5 + width].cpu().numpy() for part in slots.total())
        np.testing.assert_allclose(sums, right.sums, rtol=1e-6, atol=1e-3)
        variance = squares / right.count - (sums / right.count) ** 2
        exact = right.squares / right.count - (right.sums / right.count) ** 2
        np.testing.assert_allclose(variance, exact, rtol=1e-6)
        np.testing.assert_array_equal(least, right.least)
        np.testing.assert_array_equal(greatest, right.greatest)


def check_rows(where: str = "cpu") -> None:
    tokens = torch.randn(3, 7, 40, device=where).to(torch.bfloat16)
    buffer = torch.zeros(5, 100, device=where)
    device.take_rows(tokens, None, buffer[1:4, 10:50])
    assert torch.equal(buffer[1:4, 10:50], tokens[:, 0].float())
    device.take_rows(tokens[:1], torch.tensor([0, 2, 6], device=where), buffer[1:4, 10:50])
    assert torch.equal(buffer[1:4, 10:50], tokens[0, [0, 2, 6]].float())
    assert not buffer[[0, 4]].any()
    assert not buffer[:, [9, 50]].any()


CHECKS = (check_cells_and_sums, check_bags, check_bad_values, check_token_slots, check_rows)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_by_torch(check: Any) -> None:
    check()


def test_gap_ends() -> None:
    g = np.random.default_rng(3)
    values = g.integers(0, 5, (30, 60)).astype(np.float32)
    ids = g.permutation(100)[:30]
    found = device.gap_ends(torch.from_numpy(values), torch.from_numpy(ids))
    for column, ends in zip(values.T, found.tolist(), strict=True):
        order = np.lexsort((ids, column))
        at = np.diff(column[order]).argmax()
        assert ends == ids[order[[at, at + 1]]].tolist()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install triton)")
def test_by_the_kernels() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    code = f"import sys\nsys.path[:0] = {[p for p in sys.path if p]!r}\n" + (
        "import test_device as t, torch\n"
        "assert t.device._kernels_for(torch.empty(0)) is not None\n"
        "t.check_cells_and_sums(sizes=(25,))\n"
        "t.check_bags(); t.check_bad_values(); t.check_token_slots(cases=t.TOKENS[:2]); t.check_rows()\n"
    )
    folder = os.path.dirname(__file__)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([folder, *sys.path])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


# ---- a whole scoring


# Sums are rounded once a shard, and kernels take texts without padding, so outputs differ by rounding of float32.
def check_scores(mine: Scores, theirs: Scores) -> None:
    assert list(mine.columns) == list(theirs.columns)
    np.testing.assert_array_equal(mine.constant, theirs.constant)
    for name, column in mine.columns.items():
        if name == "random":
            continue
        scale = np.nanmax(np.abs(theirs.columns[name]))
        np.testing.assert_allclose(column, theirs.columns[name], rtol=0, atol=2e-4 * scale, err_msg=name)
    for name, ids in mine.texts.items():
        assert np.mean(ids == theirs.texts[name]) > 0.99, name
    assert (mine.clouds is None) == (theirs.clouds is None)
    if mine.clouds is not None and theirs.clouds is not None:
        np.testing.assert_array_equal(mine.clouds.constant, theirs.clouds.constant)
        for name, column in mine.clouds.columns.items():
            np.testing.assert_allclose(column, theirs.clouds.columns[name], rtol=1e-3, atol=1e-5, err_msg=name)
    volatile = {"versions"}
    assert {k: v for k, v in mine.meta.items() if k not in volatile} == {
        k: v for k, v in theirs.meta.items() if k not in volatile
    }


SETTINGS: dict[str, Any] = {
    "shard_texts": 40,
    "cloud_texts": 50,
    "effect_texts": 60,
    "max_length": 32,
    "batch_tokens": 200,
}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("settings", [{}, {"memory": "layer"}, {"tokens": False, "cloud_texts": 0}], ids=str)
def test_scores_as_on_the_host(
    settings: dict[str, Any],
    exact: bool,
    tiny_bert: BertModel,
    texts: list[str],
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {**SETTINGS, **settings, "exact": exact}
    theirs = score(tiny_bert, tiny_tokenizer, texts, **given)
    monkeypatch.setattr(device, "RESIDENT", {"cpu"})
    seen: list[ShardProgress] = []
    mine = score(tiny_bert, tiny_tokenizer, texts, progress=seen.append, **given)
    check_scores(mine, theirs)
    assert seen[-1].texts == pytest.approx(seen[-1].of)
    assert seen[-1].tokens == pytest.approx(mine.meta["n_tokens"])


@pytest.mark.usefixtures("resident")
@pytest.mark.parametrize("exact", [True, False])
def test_a_resident_scoring_that_stops_and_goes_on(
    exact: bool,
    tiny_bert: BertModel,
    texts: list[str],
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Same bits after a stop, with a store in memory and one on disk, and with the layers one by one."""
    given = {**SETTINGS, "exact": exact, "effect_texts": 0}
    monkeypatch.setattr(scoring, "STORE_SECONDS", 0)
    whole = score(tiny_bert, tiny_tokenizer, texts, **given)
    equal_scores(score(tiny_bert, tiny_tokenizer, texts, **given, memory="layer"), whole)
    for store in (MemoryStore(), _Files(tmp_path)):

        def stop(done: ShardProgress) -> None:
            if done.texts > 120:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            score(tiny_bert, tiny_tokenizer, texts, store=store, progress=stop, **given)
        kept: list[Kept] = []
        seen: list[ShardProgress] = []
        again = score(tiny_bert, tiny_tokenizer, texts, store=store, progress=seen.append, on_kept=kept.append, **given)
        assert seen[0].resumed >= 40
        equal_scores(again, whole)
        assert len(kept[0].halves[0]) == len(whole)
        assert all(isinstance(part, np.ndarray) for pair in kept[0].vectors.values() for part in pair)


SHARED = """
import sys
import weakref
import numpy as np
from obce import device
from obce.corpus import read_corpus
from obce.scoring import score
from obce.world import joined
from transformers import AutoModel, AutoTokenizer

device.RESIDENT = {"cpu"}
folder, exact, out = sys.argv[1:]
with joined() as world:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = dict(shard_texts=40, cloud_texts=50, effect_texts=0, max_length=32, batch_tokens=200)
    texts = read_corpus(out + ".txt")
    found = score(AutoModel.from_pretrained(folder), tokenizer, texts, exact=exact == "exact", **settings)
    assert world.size == int(out.endswith("two")) + 1
    if world.rank == 0:
        parts = {"score": found.columns, "text": found.texts, "cloud": found.clouds.columns}
        np.savez(out, **{f"{part}.{name}": some[name] for part, some in parts.items() for name in some})
    group = weakref.ref(world._group) if world.size > 1 else None
assert group is None or group() is None, "its threads would meet an interpreter that is going away"
"""


@pytest.mark.parametrize("kept", ["exact", "sketch"])
def test_two_ranks_are_one_process(kept: str, tiny_bert_dir: Path, texts: list[str], tmp_path: Path) -> None:
    script = tmp_path / "shared.py"
    script.write_text(f"import sys\nsys.path[:0] = {[p for p in sys.path if p]!r}\n{SHARED}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    found = []
    for ranks in ("one", "two"):
        out = tmp_path / ranks
        (tmp_path / f"{ranks}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
        launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"] if ranks == "two" else []
        command = [sys.executable, *launch, str(script), str(tiny_bert_dir), kept, str(out)]
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(dict(np.load(tmp_path / f"{ranks}.npz")))
    assert list(found[0]) == list(found[1])
    for name, column in found[0].items():
        np.testing.assert_array_equal(column, found[1][name], err_msg=name)


@pytest.mark.usefixtures("resident")
def test_agreement_of_a_resident_scoring(
    tiny_bert: BertModel, texts: list[str], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = score(tiny_bert, tiny_tokenizer, texts, **SETTINGS, precision="bfloat16").meta["precision_agreement"]
    monkeypatch.setattr(device, "RESIDENT", set())
    expected = score(tiny_bert, tiny_tokenizer, texts, **SETTINGS, precision="bfloat16").meta["precision_agreement"]
    assert set(found) == set(expected) == {"rf", "rf_bagged", "std"}
    # autocast there, narrow weights here
    assert all(abs(found[name] - expected[name]) < 0.15 for name in found)


def test_rank_correlations() -> None:
    g = np.random.default_rng(4)
    x, y = g.integers(0, 9, (3, 50)) / 4, g.standard_normal((3, 50))
    live = g.random((3, 50)) < 0.8
    y[2] = 1.0
    found = _rank_correlations(*(torch.from_numpy(array) for array in (x, y, live))).tolist()
    for row in range(2):
        assert found[row] == pytest.approx(rank_correlation(x[row][live[row]], y[row][live[row]]), abs=1e-12)
    assert np.isnan(found[2])


@pytest.mark.usefixtures("resident")
@pytest.mark.parametrize("memory", ["model", "layer"])
def test_scores_of_pictures(memory: Any) -> None:
    model = make_encoder("vit", "ImageClassification")
    given: dict[str, Any] = {"tokenizer": None, "texts": read_pictures(processed(make_pictures(100))), "memory": memory}
    settings = {name: value for name, value in SETTINGS.items() if name != "max_length"}
    found = score(model, **given, labels=np.arange(100) % 2, **settings)
    device.RESIDENT.clear()
    check_scores(found, score(model, **given, labels=np.arange(100) % 2, **settings))


@pytest.mark.usefixtures("resident")
def test_scores_of_another_family_and_with_labels(texts: list[str], tiny_tokenizer: Any) -> None:
    """Padded batches, a head, and the model's own loss."""
    model = make_encoder("roberta", "SequenceClassification", num_labels=2)
    labels = np.arange(len(texts)) % 2
    corpus = read_corpus(texts)
    found = score(model, tiny_tokenizer, corpus, labels=labels[: len(corpus)], **SETTINGS)
    assert np.isfinite(found.columns["taylor"]).all()
    device.RESIDENT.clear()
    expected = score(model, tiny_tokenizer, corpus, labels=labels[: len(corpus)], **SETTINGS)
    check_scores(found, expected)
