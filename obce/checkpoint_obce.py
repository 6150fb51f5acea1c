"""Whether the files of a checkpoint are what they say, before a model is built of them.

A checkpoint is safetensors and JSON. A manifest, `obce.json`, lists a hash of every file that obce wrote beside it, so
that a file which was cut short or changed is refused by its name. It tells accidents and careless hands; who can change
a file can change the manifest, too.

This file imports nothing of obce, so that it can be copied into checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

MANIFEST = "obce.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_FORMAT = "obce-checkpoint"
_FORMAT_VERSION = 1

# People edit a card after the model was made; it decides nothing that is loaded.
_UNLISTED = (MANIFEST, "README.md", ".gitattributes")

# Endings of files that only unpickling opens, or that hold other frameworks' weights.
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")

_JSON_BYTES = 64 * 2**20
_GREATEST_INT = 2**31 - 1

# Fields of a config that make transformers build so many things one by one.
_LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
_MOST_LABELS = 10**6


def check_checkpoint(folder: str | Path, *, weights: bool = True) -> None:
    """Refuses a directory whose files are damaged, changed since obce wrote them, pickled, or point elsewhere.

    What is read: the manifest, if there is one, and with it every file that it lists; `config.json`; the headers of the
    weights, and of a pruned model the weights themselves.

    Args:
        folder: Directory of a checkpoint, dense or pruned.
        weights: Whether weights are to be loaded, too; without them only what a tokenizer needs is checked.

    Raises:
        ValueError: One sentence that names the file.
    """
    folder = Path(folder)
    _check_manifest(folder, weights)
    if not weights:
        return
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"'{folder / 'config.json'}' holds a {type(config).__name__}, expected a JSON object")
    files = _weight_files(folder)
    pruned = str(config.get("model_type")).startswith("obce_")
    shapes: dict[str, list[int]] = {}
    kept: dict[str, torch.Tensor] = {}
    for file in files:
        stated, found = _checked_tensors(file, pruned)
        shapes |= stated
        kept |= found
    _check_config(folder / "config.json", config, len(shapes), pruned)
    for name, numbers in kept.items():
        if name.endswith(".pairs"):
            _check_pairs(folder, name, numbers, config)
        else:
            _check_rows(folder, name, numbers, shapes)


def write_manifest(folder: str | Path) -> None:
    """Writes `obce.json`: a hash of every file that lies in the directory now."""
    folder = Path(folder)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    listed = {name: _digest(folder / name) for name in names if name not in _UNLISTED}
    plain = {"format": _FORMAT, "format_version": _FORMAT_VERSION, "blake2b": listed}
    (folder / MANIFEST).write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        ValueError: It is too large, no UTF-8, no JSON, or nested too deeply; one sentence that names it.
    """
    size = path.stat().st_size
    if size > _JSON_BYTES:
        raise ValueError(f"'{path}' has {size:,} bytes, expected JSON of at most {_JSON_BYTES:,}")
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except RecursionError:
        raise ValueError(f"'{path}' is not readable JSON (it is nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"'{path}' is not readable JSON ({str(error).partition(';')[0]})") from None


def inside(name: object) -> bool:
    """Whether a file's name, as a JSON file gives it, stays in the directory that it is relative to."""
    if not isinstance(name, str) or not name or re.search(r"[\\:\x00-\x1f]", name):
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and path.as_posix() == name


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _check_manifest(folder: Path, weights: bool) -> None:
    path = folder / MANIFEST
    if not path.is_file():
        return
    manifest = read_json(path)
    listed = manifest.get("blake2b") if isinstance(manifest, dict) else None
    if not isinstance(listed, dict) or manifest.get("format") != _FORMAT:
        raise ValueError(f"'{path}' is not a manifest of obce: fetch the checkpoint again, or remove the file")
    if manifest.get("format_version") != _FORMAT_VERSION:
        raise ValueError(
            f"'{path}' has format version {str(manifest.get('format_version'))[:20]}, but this version reads "
            f"{_FORMAT_VERSION}: install a newer obce"
        )
    for name, expected in listed.items():
        if not inside(name):
            raise ValueError(f"'{path}' lists the file {name[:80]!r}, expected names of files inside '{folder}'")
        if not weights and name.endswith(".safetensors"):
            continue
        if not (folder / name).is_file():
            raise ValueError(f"'{folder / name}' is missing, but '{path}' lists it: fetch the checkpoint again")
        if _digest(folder / name) != expected:
            raise ValueError(
                f"'{folder / name}' is not the file that was written there, by its hash in '{path}': fetch the "
                f"checkpoint again, or remove {MANIFEST} if you changed the file yourself"
            )


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers will open, in its order of preference."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"'{folder / 'adapter_config.json'}' describes an adapter: merge it into the model first")
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        stated = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(stated, Mapping) or not stated or not isinstance(index.get("metadata", {}), dict):
            raise ValueError(f"'{folder / INDEX}' has no weight_map: fetch the checkpoint again")
        for name in stated.values():
            if not inside(name) or not name.endswith(".safetensors"):
                raise ValueError(
                    f"'{folder / INDEX}' names the file {str(name)[:80]!r}, expected safetensors inside '{folder}'"
                )
            if not (folder / name).is_file():
                raise ValueError(f"'{folder / name}' is missing, but '{folder / INDEX}' names it")
        return [folder / name for name in sorted(set(stated.values()))]
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in _PICKLED)
    if pickled:
        raise ValueError(
            f"'{folder / pickled[0]}' is not safetensors, and obce unpickles nothing: convert the checkpoint first, "
            "with from_pretrained and save_pretrained of transformers"
        )
    raise ValueError(f"'{folder}' has no {WEIGHTS}, expected the weights there")


def _checked_tensors(path: Path, pruned: bool) -> tuple[dict[str, list[int]], dict[str, torch.Tensor]]:
    """Shapes of a file's tensors, and those that hold numbers of rows or pairs; of a pruned model all are looked at."""
    shapes: dict[str, list[int]] = {}
    kept: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dictionary)
                shapes[name] = list(file.get_slice(name).get_shape())
                if not pruned:
                    continue
                tensor = file.get_tensor(name)
                if name.endswith((".kept", ".pairs")):
                    kept[name] = tensor
                elif name.endswith((".weight", ".bias")):
                    _check_numbers(path, name, tensor)
    except (SafetensorError, OSError, RuntimeError, TypeError, AttributeError) as error:
        # torch lacks some of the dtypes that a file may state
        raise ValueError(
            f"'{path}' is damaged or cut short ({' '.join(str(error).split())[:160]}): fetch the checkpoint again"
        ) from error
    return shapes, kept


def _check_numbers(path: Path, name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ValueError(
            f"'{path}' holds '{name[:120]}' as {str(tensor.dtype).removeprefix('torch.')}, expected floating point"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"'{path}' holds a number that is not finite in '{name[:120]}', expected finite weights")


def _check_rows(folder: Path, name: str, kept: torch.Tensor, shapes: Mapping[str, list[int]]) -> None:
    """Row numbers go into an index without another look, on some devices without a bound."""
    module = name.removesuffix("kept")
    weight, bias = shapes.get(module + "weight", []), shapes.get(module + "bias", [])
    fits = kept.dtype == torch.int64 and kept.ndim == 1 and weight[:1] == [len(kept)] and len(bias) == 1
    if not fits or not bool((kept[1:] > kept[:-1]).all()) or not bool(((kept >= 0) & (kept < bias[0])).all()):
        raise ValueError(
            f"'{folder}' holds row numbers '{name[:120]}' that do not fit its weights, expected ascending int64 "
            "numbers below the length of the bias, one for each row of the weight"
        )


def _check_pairs(folder: Path, name: str, pairs: torch.Tensor, config: Mapping[str, Any]) -> None:
    """Numbers of rotary pairs go into an index, too."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    half = hidden // heads // 2 if type(hidden) is int and type(heads) is int and heads > 0 else 0
    fits = pairs.dtype == torch.int64 and pairs.ndim == 2
    if not fits or not bool((pairs[:, 1:] > pairs[:, :-1]).all()) or not bool(((pairs >= 0) & (pairs < half)).all()):
        raise ValueError(
            f"'{folder}' holds numbers of pairs '{name[:120]}' that do not fit its config, expected ascending int64 "
            f"numbers below {half} in each head"
        )


def _check_config(path: Path, config: Mapping[str, Any], tensors: int, pruned: bool) -> None:
    for key in _LAYERS:
        layers = config.get(key) or 0
        if type(layers) is not int or not 0 <= layers <= tensors:
            raise ValueError(f"'{path}' has {key} = {_shown(layers)}, but its weights are {tensors} tensors")
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"'{path}' has architectures = {_shown(names)}, expected a list of names")
    labels = config.get("num_labels") or 0
    if type(labels) is not int or not 0 <= labels <= _MOST_LABELS:
        raise ValueError(f"'{path}' has num_labels = {_shown(labels)}, expected 0 to {_MOST_LABELS:,}")
    if not pruned:
        return
    # `obce` is for people: nothing is built by what stands there
    for key, value in _numbers({key: value for key, value in config.items() if key != "obce"}):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"'{path}' has {key} = {value}, expected finite numbers")
        if isinstance(value, int) and abs(value) > _GREATEST_INT:
            raise ValueError(f"'{path}' has {key} = {_shown(value)}, expected at most {_GREATEST_INT:,}")


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number of a parsed JSON value, with the key that it stands under."""
    pending = [(key, value)]
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict):
            pending += [(str(name)[:80], entry) for name, entry in value.items()]
        elif isinstance(value, list):
            pending += [(key, entry) for entry in value]
        elif isinstance(value, (int, float)):
            yield key, value


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**18:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


__all__ = ["INDEX", "MANIFEST", "WEIGHTS", "check_checkpoint", "inside", "read_json", "write_manifest"]
