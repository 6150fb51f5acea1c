"""Checkpoints and plans that were cut short, changed or made to mislead, from seeds: each is opened in full or refused.

    python tests/fuzz_checkpoints.py --count 10000 --seed 0

Every mutant is a copy of a tiny pruned model's directory, or of a plan for a dense model, with a change or two. It
must end in a model or plan that holds what its files say, and answers; or in a `ValueError` or `OSError` of one
sentence. Nothing may take longer than a few seconds, touch a file outside of the directory, or end the process.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from obce import modeling_obce
from obce.card import Origin, render_card
from obce.checkpoint_obce import MANIFEST, write_manifest
from obce.prune import prune
from obce.run import load_model, read_plan
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tiny import make_plan

SECONDS = 30
"""Most that one mutant may take, on a busy machine."""

WEIGHTS, CONFIG, PLAN = "model.safetensors", "config.json", "plan.json"
HIDDEN, INNER, HEADS, LAYERS = 16, 24, 4, 2
DEEP = 100_000

# One of these stands for a number or a text that JSON allows and nobody expects.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, 1e308, -0.0,
    float("nan"), float("inf"), -float("inf"), "", "x", "../../x", "/etc/passwd", "\x00", "\ud800", "9" * 400, [], {},
    [[]], [0, 0, 0], {"0": {}}, [1] * 5000, "relu", "obce_bert", "bert", "gelu",
)  # fmt: skip
NAMES = ("../../x", "../outside.safetensors", "/etc/x", "a/../../x", "..\\x", "x\x00y", "", ".", "..", "é" * 300)


# ---- what is mutated -------------------------------------------------------------------------------------------------


def originals(folder: Path) -> None:
    """`dense/`, `small/` (pruned, with constant rows and a layer of fewer heads) and `plan.json`."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config = BertConfig(
        vocab_size=40, intermediate_size=INNER, max_position_embeddings=16, initializer_range=0.3, **sizes
    )
    model = BertModel(config).eval()
    kept = {
        "0.query": (0, 4, 8, 12),
        "0.key": (0, 4, 8, 12),
        "0.intermediate": tuple(range(0, INNER, 2)),
        "1.query": (4, 5, 12, 13),
        "1.key": (4, 5, 12, 13),
        "1.value": (5, 6, 7, 13, 14, 15),
        "1.attention_output": (0, 3, 15),
        "1.output": tuple(range(1, HIDDEN)),
    }
    plan = make_plan(model, kept, score="effect", levels={"0": 0.5, "1": 0.5})
    model.save_pretrained(folder / "dense")
    small = prune(model, plan, repair="none")
    small.save_pretrained(folder / "small")
    write_manifest(folder / "small")
    (folder / PLAN).write_text(json.dumps(plan.to_dict()), encoding="utf-8")


# ---- changes ---------------------------------------------------------------------------------------------------------


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a parsed JSON value."""
    found: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        at = pending.pop()
        keys: Any = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ()
        found += [(at, key) for key in keys]
        pending += [at[key] for key in keys]
    return found


def _edit_json(path: Path, rng: random.Random) -> None:
    text = path.read_text(encoding="utf-8")
    value = json.loads(text)
    places = _places(value)
    for _ in range(rng.randint(1, 2)):
        at, key = rng.choice(places)
        how = rng.randrange(5)
        try:
            if how == 0:
                del at[key]
            elif how == 1 and isinstance(at[key], (int, float)) and not isinstance(at[key], bool):
                at[key] += rng.choice((-1, 1, 10**6, 0.5))
            elif how == 2 and isinstance(at, dict):
                at[rng.choice((*NAMES, *at))] = at.pop(key)
            else:
                at[key] = copy.deepcopy(rng.choice(ODD))
        except (KeyError, IndexError):
            pass
    path.write_text(json.dumps(value, ensure_ascii=rng.random() < 0.9), encoding="utf-8", errors="surrogatepass")


def _bad_json(path: Path, rng: random.Random) -> None:
    whole = path.read_bytes()
    at = rng.randrange(len(whole))
    path.write_bytes(
        rng.choice(
            (
                whole[:at],
                b"",
                b"null",
                b"[]",
                b"7",
                b"[" * DEEP,
                b'{"a":' * DEEP,
                b"[" * DEEP + b"]" * DEEP,
                whole[:-1] + b', "x": ' + b"[" * DEEP + b"]" * DEEP + b"}",
                whole[:-1] + b', "x": ' + b"9" * 10_000 + b"}",
                whole[:at] + b"\xff\xfe" + whole[at:],
                b"\xef\xbb\xbf" + whole,
                whole.decode().encode("utf-16"),
                whole + whole,
                whole.replace(b"0", b"NaN", 1),
                whole.replace(b"1", b"1e999", 1),
                whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :],
                b'{"a": 1}' + b" " * (65 * 2**20) if rng.random() < 0.05 else b"{}",
            )
        )
    )


def _bytes(path: Path, rng: random.Random) -> None:
    whole = bytearray(path.read_bytes())
    how = rng.randrange(6)
    if how == 0:
        del whole[rng.randrange(len(whole)) :]
    elif how == 1:
        whole[:8] = struct.pack("<Q", rng.choice((0, 1, 7, 2**20, 10**8, 10**8 + 1, 2**31, 2**40, 2**63, 2**64 - 1)))
    elif how == 2:
        for _ in range(rng.randint(1, 8)):
            whole[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    elif how == 3:
        # in the header alone, where a change has most to break
        for _ in range(rng.randint(1, 3)):
            whole[8 + rng.randrange(struct.unpack("<Q", whole[:8])[0])] = rng.randrange(256)
    elif how == 4:
        whole += rng.randbytes(rng.randint(1, 100))
    else:
        whole[:] = rng.choice((b"", b"\x80\x04.", b"PK\x03\x04", rng.randbytes(200), bytes(64)))
    path.write_bytes(bytes(whole))


def _header(path: Path, rng: random.Random) -> None:
    """Another safetensors header over the same data."""
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    how = rng.randrange(8)
    if how == 0:
        entry["dtype"] = rng.choice(("F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "?", 7))
    elif how == 1:
        entry["shape"] = rng.choice(
            ([], [0], [-1], [2**63], [2**40, 2**40], [1] * 200, entry["shape"][::-1], "x", None)
        )
    elif how == 2:
        entry["data_offsets"] = rng.choice(([0, 0], [0, 2**63], [5, 1], [-1, 4], [0, len(data) + 1], [0], None))
    elif how == 3:
        header[rng.choice(NAMES)] = header.pop(name)
    elif how == 4:
        del header[name]
    elif how == 5:
        header["__metadata__"] = rng.choice(({}, {"format": "tf"}, {"format": 7}, None, [], {"format": "pt", "a": [1]}))
    elif how == 6:
        header[name] = rng.choice(([], None, {"dtype": "F32"}, 0))
    text = json.dumps(header).encode()
    if how == 7:
        text = text[:-1] + b',"x":' + b"[" * DEEP + b"]" * DEEP + b"}"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _tensors(path: Path, rng: random.Random) -> None:
    """A whole safetensors file with other tensors: shapes, dtypes, names, numbers."""
    tensors = load_file(path)
    name = rng.choice(list(tensors))
    tensor = tensors[name]
    how = rng.randrange(9)
    if how == 0:
        tensors[name] = tensor[: rng.randrange(len(tensor))].clone()
    elif how == 1:
        kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.uint8)
        tensors[name] = tensor.to(rng.choice(kinds))
    elif how == 2:
        del tensors[name]
    elif how == 3:
        tensors[rng.choice(NAMES)] = tensors.pop(name)
    elif how == 4:
        tensors[rng.choice(NAMES)] = torch.zeros(3)
    elif how == 5 and tensor.is_floating_point():
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice((float("nan"), float("inf"), -1e38, 0.0))
    elif how == 6:
        tensors[name] = tensor[None].clone()
    elif how == 7:
        rows = rng.choice([name for name in tensors if name.endswith(".kept")])
        kept = tensors[rows]
        kept[rng.randrange(len(kept))] = rng.choice((-1, 0, HIDDEN, HIDDEN + 1, 2**62, -(2**62), 3))
    else:
        rows = rng.choice([name for name in tensors if name.endswith(".kept")])
        tensors[rows] = rng.choice(
            (tensors[rows].flip(0), tensors[rows].double(), tensors[rows][:0], tensors[rows][:1])
        )
        tensors[rows] = tensors[rows].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def _files(folder: Path, rng: random.Random) -> None:
    """Other files beside, or instead of, the weights."""
    weights = folder / WEIGHTS
    how = rng.randrange(8)
    if how == 0:
        weights.unlink()
    elif how == 1:
        tensors = load_file(weights)
        weights.unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    elif how == 2:
        # an index that leads out of the directory, to a file that fits
        weights.unlink()
        place = rng.choice(
            ("../outside.safetensors", str(folder.parent / "outside.safetensors"), "../../x", "", 7, None)
        )
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(load_file(folder.parent / OUTSIDE), place)}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    elif how == 3:
        weights.unlink()
        text = rng.choice(("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "b.safetensors"}}', "[" * DEEP))
        (folder / f"{WEIGHTS}.index.json").write_text(text)
    elif how == 4:
        # shards that are whole, with an index that may leave out metadata
        tensors = list(load_file(weights).items())
        weights.unlink()
        half = len(tensors) // 2
        for place, part in (("a.safetensors", tensors[:half]), ("b.safetensors", tensors[half:])):
            save_file(dict(part), folder / place, metadata={"format": "pt"})
        index = {name: "a.safetensors" if at < half else "b.safetensors" for at, (name, _) in enumerate(tensors)}
        total: dict[str, Any] = {"metadata": {"total_size": 1}} if rng.random() < 0.5 else {}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({**total, "weight_map": index}))
    elif how == 5:
        config = json.loads((folder / CONFIG).read_text())
        config["transformers_weights"] = rng.choice(
            ("../outside.safetensors", "/etc/passwd", "x", 7, "pytorch_model.bin")
        )
        (folder / CONFIG).write_text(json.dumps(config))
    elif how == 6:
        config = json.loads((folder / CONFIG).read_text())
        code = rng.choice(("evil.ObceBertModel", "a/b--evil.Model", "../../evil.Model", 7))
        config["auto_map"] = {"AutoConfig": code, "AutoModel": code}
        config["model_type"] = rng.choice(("obce_bert", "unknown"))
        (folder / CONFIG).write_text(json.dumps(config))
        (folder / "evil.py").write_text("raise SystemExit('code of a checkpoint ran')\n")
    else:
        (folder / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": "../outside", "peft_type": "LORA"})
        )


OUTSIDE = "outside.safetensors"


def _manifest(folder: Path, rng: random.Random) -> None:
    path = folder / MANIFEST
    if rng.random() < 0.5:
        _bad_json(path, rng)
        return
    manifest = json.loads(path.read_text())
    manifest["blake2b"][rng.choice(NAMES)] = rng.choice(("0" * 64, None, 7))
    path.write_text(json.dumps(manifest))


# ---- one mutant ------------------------------------------------------------------------------------------------------


class TookTooLongError(BaseException):
    """No `Exception`: nothing that is tested may catch it."""


@dataclass
class Outcome:
    """How a mutant ended: `what` is "opened", "refused" or "failed"."""

    what: str
    kind: str
    words: str


@dataclass
class Guard:
    """Notes every file outside of a directory that Python opens while it is on."""

    inside: Path | None = None
    found: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None or event not in ("open", "os.remove", "os.rename", "os.mkdir", "subprocess.Popen"):
            return
        name = arguments[0]
        if event == "subprocess.Popen":
            self.found.append(f"{event} {arguments[1]}")
        elif isinstance(name, (str, bytes)) and not self._allowed(event, os.fsdecode(name), arguments):
            self.found.append(f"{event} {os.fsdecode(name)}")

    def _allowed(self, event: str, name: str, arguments: tuple[Any, ...]) -> bool:
        path = Path(os.path.normpath(Path.cwd() / name))
        if self.inside is not None and path.is_relative_to(self.inside):
            return True
        # Python's own modules, and what libraries read of the system; nothing near the directory, nothing to write
        near = self.inside is not None and path.is_relative_to(self.inside.parent)
        mode, flags = (arguments[1], arguments[2]) if event == "open" else ("w", 0)
        writes = (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return (
            event == "open"
            and not near
            and not (writes and not name.endswith((".pyc", "null")))
            and name != "/etc/passwd"
        )

    @contextmanager
    def on(self, folder: Path) -> Iterator[None]:
        self.inside, self.found = folder, []
        try:
            yield
        finally:
            self.inside = None


_guards: list[Guard] = []  # one for the process: audit hooks cannot be taken away


def _sentence(error: BaseException) -> bool:
    text = str(error)
    return bool(text) and "\n" not in text and len(text) < 1000


def attempt(action: Callable[[], None], folder: Path) -> Outcome:
    """How an action ended that may touch nothing outside of the folder."""

    def stop(_signal: int, _frame: object) -> None:
        raise TookTooLongError

    if not _guards:
        _guards.append(Guard())
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with _guards[0].on(folder):
            action()
        found = Outcome("opened", "", "")
    except (ValueError, OSError) as error:
        found = Outcome("refused" if _sentence(error) else "failed", type(error).__name__, str(error))
    except BaseException as error:
        found = Outcome("failed", type(error).__name__, "".join(traceback.format_exception(error))[-2000:])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if _guards[0].found:
        return Outcome("failed", "touched", f"{_guards[0].found[:3]} {found}")
    return found


def _open_checkpoint(folder: Path) -> None:
    """Loads, compares with the files, and lets it answer."""
    model = load_model(folder, pruned=True)
    state = model.state_dict()
    index = folder / f"{WEIGHTS}.index.json"
    places = (
        [WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(set(json.loads(index.read_text())["weight_map"].values()))
    )
    for place in places:
        with safe_open(folder / place, "pt") as file:
            for name in set(file.keys()) & set(state):
                stated = file.get_tensor(name)
                assert torch.equal(state[name], stated.to(state[name].dtype)), name
                state.pop(name)
    missing = {name for name in state if not name.startswith("pooler.")}
    assert not missing, missing
    length = min(5, model.config.max_position_embeddings)
    ids = torch.arange(2 * length).reshape(2, length) % model.config.vocab_size
    with torch.no_grad():
        answer = model(input_ids=ids).last_hidden_state
    assert answer.shape == (2, length, model.config.hidden_size)
    assert render_card(model, Origin("a model")).startswith("---\n")


def _open_plan(path: Path, dense: Any) -> None:
    """Reads, compares with the file, and prunes by it."""
    plan = read_plan(path)
    plain = json.loads(path.read_text(encoding="utf-8"))
    assert {name: list(kept) for name, kept in plan.kept.items()} == plain["kept"]
    small = prune(dense, plan, repair="none")
    for layer, widths in enumerate(small.config.layer_widths()):
        known = plain["kept"].get(f"{layer}.intermediate")
        if not plan.layers_dropped and known is not None:
            assert widths.intermediate == len(known)
    rows = [module for module in small.modules() if isinstance(module, modeling_obce.ObceRows)]
    assert all(int(np.diff(row.kept.numpy()).min(initial=1)) > 0 for row in rows if row.kept is not None)


def try_mutant(seed: int, source: Path, sandbox: Path, dense: Any) -> tuple[str, Outcome]:
    """Makes mutant `seed` of what `originals` wrote to `source`, in `sandbox`, and opens it."""
    rng = random.Random(seed)  # noqa: S311  (test data)
    folder = sandbox / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source / "small", folder)
    # weights that would fit, where a name that leads out of the directory points to
    shutil.copyfile(source / "small" / WEIGHTS, sandbox / OUTSIDE)
    listing = _listing(sandbox)
    if rng.random() < 0.3:
        shutil.copyfile(source / PLAN, folder / PLAN)
        rng.choice((_edit_json, _edit_json, _bad_json))(folder / PLAN, rng)
        what, found = "plan", attempt(lambda: _open_plan(folder / PLAN, dense), folder)
    else:
        changes: list[tuple[str, Callable[[], None]]] = [
            ("config", lambda: _edit_json(folder / CONFIG, rng)),
            ("config", lambda: _edit_json(folder / CONFIG, rng)),
            ("bad config", lambda: _bad_json(folder / CONFIG, rng)),
            ("bytes", lambda: _bytes(folder / WEIGHTS, rng)),
            ("header", lambda: _header(folder / WEIGHTS, rng)),
            ("tensors", lambda: _tensors(folder / WEIGHTS, rng)),
            ("tensors", lambda: _tensors(folder / WEIGHTS, rng)),
            ("files", lambda: _files(folder, rng)),
            ("manifest", lambda: _manifest(folder, rng)),
        ]
        what, change = rng.choice(changes)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        change()
        changed = {path.name: path.read_bytes() for path in folder.iterdir()} != before
        manifest = rng.random() if what != "manifest" else 0.0
        if manifest > 0.7:
            write_manifest(folder)
        elif manifest > 0.3:
            (folder / MANIFEST).unlink()
        found = attempt(lambda: _open_checkpoint(folder), folder)
        added = what in ("manifest", "files")
        if found.what == "opened" and manifest <= 0.3 and changed and not added:
            found = Outcome("failed", "unseen", "a changed file was opened although the manifest lists it")
    if _listing(sandbox) != listing and found.what != "failed":
        found = Outcome("failed", "touched", "files beside the directory changed")
    return what, found


def _listing(sandbox: Path) -> list[tuple[str, int, int]]:
    beside = [path for path in sandbox.iterdir() if path.name != "checkpoint"]
    return sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in beside)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first mutant; each of the others has the next one")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    ends: Counter[str] = Counter()
    failed, slowest, started = 0, 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        source, sandbox = Path(place) / "source", Path(place) / "sandbox"
        source.mkdir(), sandbox.mkdir()
        originals(source)
        dense = load_model(source / "dense")
        for seed in range(arguments.seed, arguments.seed + arguments.count):
            at = time.monotonic()
            what, found = try_mutant(seed, source, sandbox, dense)
            slowest = max(slowest, time.monotonic() - at)
            ends[f"{what}: {found.what}"] += 1
            if found.what == "failed":
                failed += 1
                print(f"seed {seed}, {what}: {found.kind}: {found.words}\n", flush=True)
    for name, count in sorted(ends.items()):
        print(f"{name:24} {count:6,}")
    print(
        f"{arguments.count:,} mutants in {time.monotonic() - started:.0f} s, slowest {slowest:.2f} s, {failed} failed"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
