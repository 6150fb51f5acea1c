"""Files of checkpoints and plans that are damaged, changed or made to mislead are refused by name, in one sentence."""

from __future__ import annotations

import json
import shutil
import struct
from typing import TYPE_CHECKING, Any

import pytest
import torch
from obce.checkpoint_obce import MANIFEST, check_checkpoint, inside, read_json, write_manifest
from obce.prune import prune
from obce.run import load_model, load_tokenizer, read_plan
from safetensors.torch import load_file, save_file

from tiny import make_encoder, make_plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

MUTANTS = 300


@pytest.fixture(scope="module")
def fuzz(request: pytest.FixtureRequest) -> ModuleType:
    script: Callable[[str], ModuleType] = request.getfixturevalue("script")
    return script("fuzz_checkpoints")


@pytest.fixture(scope="module")
def source(fuzz: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("originals")
    fuzz.originals(path)
    return path


@pytest.fixture
def small(source: Path, tmp_path: Path) -> Path:
    shutil.copytree(source / "small", tmp_path / "small")
    return tmp_path / "small"


def refused(path: Path, word: str) -> str:
    with pytest.raises(ValueError, match=r"\S") as error:
        load_model(path, pruned=True)
    text = str(error.value)
    assert "\n" not in text
    assert word in text
    return text


@pytest.mark.slow
def test_mutants_are_opened_in_full_or_refused(fuzz: ModuleType, source: Path, tmp_path: Path) -> None:
    dense = load_model(source / "dense")
    ends = [(seed, *fuzz.try_mutant(seed, source, tmp_path, dense)) for seed in range(MUTANTS)]
    assert [end for end in ends if end[2].what == "failed"] == []
    kinds = {(what, found.what) for _, what, found in ends}
    assert {("plan", "opened"), ("plan", "refused"), ("tensors", "opened"), ("header", "refused")} <= kinds


@pytest.mark.slow
def test_the_fuzzer_sees_what_is_wrong(
    fuzz: ModuleType, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the checks before loading some mutants end in other ways, and are found."""
    for module in ("run", "modeling_obce"):
        monkeypatch.setattr(f"obce.{module}.check_checkpoint", lambda *_, **__: None)
    monkeypatch.setattr(fuzz, "SECONDS", 2)
    dense = load_model(source / "dense")
    failed = 0
    for seed in range(MUTANTS):
        failed += fuzz.try_mutant(seed, source, tmp_path, dense)[1].what == "failed"
        if failed == 3:
            return
    pytest.fail(f"only {failed} of {MUTANTS} mutants were found")


def test_the_originals_open(source: Path) -> None:
    model = load_model(source / "small", pruned=True)
    assert [widths.heads for widths in model.config.layer_widths()] == [4, 2]
    assert read_plan(source / "plan.json").kept["1.output"][0] == 1


@pytest.mark.parametrize("where", [0, 9, 500, -1])
def test_a_file_that_was_cut_short_is_named(small: Path, where: int) -> None:
    file = small / "model.safetensors"
    file.write_bytes(file.read_bytes()[:where])
    assert "hash" in refused(small, str(file))
    (small / MANIFEST).unlink()
    assert "cut short" in refused(small, str(file))


def test_one_changed_bit_is_seen(small: Path) -> None:
    file = small / "model.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-5] ^= 1
    file.write_bytes(bytes(whole))
    assert "obce.json" in refused(small, str(file))
    (small / MANIFEST).unlink()
    load_model(small, pruned=True)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_listed_file_must_be_there(small: Path, name: str) -> None:
    (small / name).unlink()
    refused(small, name)


def test_the_card_may_be_edited(small: Path) -> None:
    (small / "README.md").write_text("one")
    write_manifest(small)
    (small / "README.md").write_text("two")
    assert "README.md" not in json.loads((small / MANIFEST).read_text())["blake2b"]
    load_model(small, pruned=True)


def test_a_changed_tokenizer_is_named(small: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.save_pretrained(small)
    write_manifest(small)
    assert load_tokenizer(small).vocab_size == tiny_tokenizer.vocab_size
    with (small / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match=r"tokenizer\.json' is not the file"):
        load_tokenizer(small)


class Canary:
    """Its pickle leaves a mark where it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
@pytest.mark.parametrize("which", ["small", "dense"])
def test_pickles_are_refused_unopened(source: Path, tmp_path: Path, name: str, which: str) -> None:
    path = tmp_path / which
    shutil.copytree(source / which, path)
    (path / "model.safetensors").unlink()
    (path / MANIFEST).unlink(missing_ok=True)
    torch.save({"x": Canary(tmp_path / "opened")}, path / name)
    assert "unpickles nothing" in refused(path, name)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "a\\..\\b.safetensors", "", None])
def test_an_index_does_not_lead_out_of_the_directory(small: Path, place: Any) -> None:
    weights = load_file(small / "model.safetensors")
    shutil.move(small / "model.safetensors", small.parent / "outside.safetensors")
    (small / MANIFEST).unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, place)}
    (small / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(small, "model.safetensors.index.json")


def test_shards_are_opened(small: Path) -> None:
    weights = list(load_file(small / "model.safetensors").items())
    expected = load_model(small, pruned=True).state_dict()
    (small / "model.safetensors").unlink()
    (small / MANIFEST).unlink()
    save_file(dict(weights[:9]), small / "a.safetensors", metadata={"format": "pt"})
    save_file(dict(weights[9:]), small / "b.safetensors", metadata={"format": "pt"})
    index = {name: "a.safetensors" if i < 9 else "b.safetensors" for i, (name, _) in enumerate(weights)}
    (small / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    found = load_model(small, pruned=True).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_huge_header_is_refused_unread(small: Path) -> None:
    file = small / "model.safetensors"
    (small / MANIFEST).unlink()
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])
    refused(small, str(file))


def changed(small: Path, name: str, tensor: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weights = load_file(small / "model.safetensors")
    weights[name] = tensor(weights[name]).contiguous()
    save_file(weights, small / "model.safetensors", metadata={"format": "pt"})
    (small / MANIFEST).unlink()


ROWS = "encoder.layer.1.attention.output.dense.kept"
WEIGHT = "encoder.layer.0.intermediate.dense.weight"


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        (WEIGHT, lambda x: x[:3], "could not be loaded"),
        (WEIGHT, lambda x: x.to(torch.int32), "int32, expected floating point"),
        (WEIGHT, lambda x: x * float("nan"), "not finite"),
        (ROWS, lambda x: x + 14, ROWS),
        (ROWS, lambda x: x - 1, ROWS),
        (ROWS, lambda x: x.flip(0), ROWS),
        (ROWS, lambda x: x.double(), ROWS),
        (ROWS, lambda x: x[:2], ROWS),
    ],
)
def test_tensors_that_do_not_fit(small: Path, name: str, change: Any, word: str) -> None:
    changed(small, name, change)
    refused(small, word)


@pytest.mark.parametrize("change", [lambda x: x + 2, lambda x: x - 1, lambda x: x.flip(1), lambda x: x.float()])
def test_rotary_pairs_that_do_not_fit(tmp_path: Path, change: Any) -> None:
    model = make_encoder("modernbert")
    kept = (0, 2, 4, 6, 9, 11, 13, 15, 16, 17, 20, 21, 24, 27, 28, 31)
    prune(model, make_plan(model, {"1.query": kept, "1.key": kept}), repair="none").save_pretrained(tmp_path)
    write_manifest(tmp_path)
    check_checkpoint(tmp_path)
    changed(tmp_path, "layers.1.attn.pairs", change)
    refused(tmp_path, r"layers.1.attn.pairs' that do not fit its config, expected ascending int64 numbers below 4")


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers = 1000000000"),
        ("num_hidden_layers", True, "num_hidden_layers = True"),
        ("num_labels", 10**9, "num_labels"),
        ("vocab_size", 10**30, "vocab_size = an integer of 100 bits"),
        ("layer_norm_eps", float("nan"), "layer_norm_eps = nan"),
        ("architectures", [None], "architectures"),
        ("hidden_size", "x", "config.json"),
    ],
)
def test_numbers_of_a_config(small: Path, key: str, value: Any, word: str) -> None:
    (small / MANIFEST).unlink()
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, key: value}))
    refused(small, word)


def test_code_beside_a_checkpoint_does_not_run_unasked(small: Path) -> None:
    (small / MANIFEST).unlink()
    (small / "evil.py").write_text("raise SystemExit('ran')\n")
    config = json.loads((small / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.Config"}}
    (small / "config.json").write_text(json.dumps(config))
    refused(small, "config.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": "\xff"}', "codec can't decode"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b"{", "Expecting property name"),
        (b" " * (64 * 2**20 + 1), "bytes, expected JSON of at most"),
    ],
)
def test_json_that_does_not_parse_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    for read in (read_json, read_plan):
        with pytest.raises(ValueError, match=words) as error:
            read(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kept": {"0.value": [0, 1.5]}}, r"entry of '0\.value' is 1\.5"),
        ({"kept": {"0.value": [float("inf")]}}, "cannot be used: cannot convert float infinity"),
        ({"kept": {"../x": [1]}}, r"site is '\.\./x'"),
        ({"kept": {"0.value": [2**70]}}, "whole numbers"),
        ({"kept": []}, "damaged"),
        ({"layers_dropped": [1] * 4000}, "layers_dropped is"),
        ({"keep": float("nan")}, "keep is nan"),
        ({"keep": 2}, "keep is 2"),
        ({"levels": {"0": None}}, "levels"),
        ({"architecture": {"hidden_size": 4}}, "num_hidden_layers is None"),
        ({"before": {"parameters": 0, "encoder": 1, "flops": 1, "bytes": 1}}, "parameters is 0"),
        ({"of": "x"}, "of is 'x'"),
        ({"model_hash": 7}, "model_hash is 7"),
        ({"seed": -1}, "seed or floor"),
    ],
)
def test_plans_hold_what_plans_hold(source: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    plain = json.loads((source / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**plain, **change}))
    with pytest.raises(ValueError, match=words) as error:
        read_plan(tmp_path / "plan.json")
    assert len(str(error.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize("listed", [{"../x": "0"}, {"/etc/passwd": "0"}, {"a\\b": "0"}, {"": "0"}])
def test_a_manifest_does_not_lead_out_of_the_directory(small: Path, listed: dict[str, str]) -> None:
    manifest = json.loads((small / MANIFEST).read_text())
    (small / MANIFEST).write_text(json.dumps({**manifest, "blake2b": listed}))
    with pytest.raises(ValueError, match="expected names of files inside"):
        check_checkpoint(small)


@pytest.mark.parametrize("name", ["a", "a.json", "1_Pooling/config.json", "a b", "é"])
def test_names_inside(name: str) -> None:
    assert inside(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/../b", "/a", "a//b", "a/", "./a", "c:\\x", "a\x00", None, 7]
)
def test_names_outside(name: Any) -> None:
    assert not inside(name)


# ---- through transformers' Auto classes ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cut short", "changed", "pickled", "index", "rows"])
def test_the_auto_classes_refuse_it_too(small: Path, how: str) -> None:
    from transformers import AutoModel

    file = small / "model.safetensors"
    weights = load_file(file)
    if how == "cut short":
        (small / MANIFEST).unlink()
        file.write_bytes(file.read_bytes()[:900])
    elif how == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    elif how == "rows":
        changed(small, ROWS, lambda x: x + 14)
    else:
        (small / MANIFEST).unlink()
        file.unlink()
        if how == "pickled":
            torch.save({"x": Canary(small / "opened")}, small / "pytorch_model.bin")
        else:
            index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../outside.safetensors")}
            (small / "model.safetensors.index.json").write_text(json.dumps(index))
    word = {"pickled": r"pytorch_model\.bin", "index": r"index\.json", "rows": ROWS}.get(how, r"model\.safetensors")
    with pytest.raises(ValueError, match=word) as error:
        AutoModel.from_pretrained(small)
    assert "\n" not in str(error.value)
    assert not (small / "opened").exists()
