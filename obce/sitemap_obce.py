"""A site map: where the neurons of a model are, in a user's own words, as TOML or as plain values.

This file imports nothing of obce: it is copied into checkpoints, whose config holds the map they were pruned by.
`docs/sites.md` has every key.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_KINDS = ("query", "key", "value", "attention_output", "intermediate", "output")

# Kinds that a map names together: who writes a neuron and who reads it.
_PAIRS = (("query", "key"), ("value", "attention_output"), ("intermediate", "output"))

_NAMES = ("stack", "first_norm", "last_norm")
_NUMBERS = ("heads", "positions")
_KEYS = ("model_type", "stack", "sites", "blocks", "norms", "pre_norm", "first_norm", "last_norm", *_NUMBERS)

_BYTES = 64 * 2**10
_MOST = 2**31 - 1
_MOST_BLOCKS = 16


def read_site_map(path: str | Path) -> dict[str, Any]:
    """The map in a TOML file, checked.

    Raises:
        ValueError: The file is missing, no TOML, or holds no map; one sentence that names file and key.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"site map '{path}' is no file, expected a TOML file: name the file that says where sites are")
    if path.stat().st_size > _BYTES:
        raise ValueError(f"site map '{path}' has {path.stat().st_size:,} bytes, expected TOML of at most {_BYTES:,}")
    try:
        plain = tomllib.loads(path.read_bytes().decode("utf-8"))
    except RecursionError:
        raise ValueError(f"site map '{path}' is not readable TOML (it is nested too deeply)") from None
    except ValueError as error:
        said = " ".join(str(error).partition("\n")[0].split())[:160]
        raise ValueError(f"site map '{path}' is not readable TOML ({said}): see docs/sites.md") from None
    return checked_site_map(plain, str(path))


def checked_site_map(plain: Any, where: str) -> dict[str, Any]:
    """A map's plain values, if they are ones, without what is as by default.

    Args:
        plain: What TOML or JSON gave.
        where: What the map is called in an error: its file.

    Raises:
        ValueError: A key is unknown or missing, or its value of another kind; one sentence.
    """
    refuse = _Refusal(where)
    if not isinstance(plain, Mapping):
        raise refuse.of("", plain, "a table of keys")
    _no_others(plain, _KEYS, "", refuse)
    for key in ("model_type", "stack", "sites"):
        if key not in plain:
            raise ValueError(f"site map '{where}': key '{key}' is missing, expected {_EXPECTED[key]}")
    family = plain["model_type"]
    if not isinstance(family, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,80}", family):
        raise refuse.of("model_type", family, _EXPECTED["model_type"])
    found: dict[str, Any] = {"model_type": family}
    for key in _NAMES:
        if key in plain:
            found[key] = _module(plain[key], key, refuse)
    found["sites"] = _sites(plain["sites"], refuse)
    blocks = _blocks(plain.get("blocks", {}), found["sites"], refuse)
    if blocks:
        found["blocks"] = blocks
    if "norms" in plain:
        norms = plain["norms"]
        if not isinstance(norms, (list, tuple)) or len(norms) != 2:
            raise refuse.of("norms", norms, "two names of modules, behind (or, with pre_norm, before) each half")
        found["norms"] = [_module(norm, "norms", refuse) for norm in norms]
    if not isinstance(plain.get("pre_norm", False), bool):
        raise refuse.of("pre_norm", plain["pre_norm"], "true or false")
    if plain.get("pre_norm", False):
        found["pre_norm"] = True
    for key in _NUMBERS:
        if key in plain:
            if type(plain[key]) is not int or not 0 < plain[key] <= _MOST:
                raise refuse.of(key, plain[key], "a whole number above 0")
            found[key] = plain[key]
    return found


def site_map_hash(plain: Mapping[str, Any]) -> str:
    """32 hexadecimal digits of a checked map: the same for the same keys and values, in whatever order."""
    text = json.dumps(plain, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


_EXPECTED = {
    "model_type": "the family's name as in config.json, of letters, digits, '-', '_' and '.'",
    "stack": "the name of the ModuleList of layers, relative to the base model",
    "sites": 'a table of kinds, such as intermediate = "intermediate.dense" and output = "output.dense"',
}


class _Refusal:
    """Makes the sentences."""

    def __init__(self, where: str) -> None:
        self.where = where

    def of(self, key: str, found: object, expected: str) -> ValueError:
        shown = repr(found)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        named = f"key '{key}'" if key else "the map"
        return ValueError(f"site map '{self.where}': {named} is {shown}, expected {expected}")


def _no_others(table: Mapping[str, Any], known: tuple[str, ...], prefix: str, refuse: _Refusal) -> None:
    others = [key for key in table if key not in known]
    if others:
        raise ValueError(
            f"site map '{refuse.where}': key '{prefix}{str(others[0])[:60]}' is unknown, expected only "
            f"{', '.join(prefix + key for key in known)}"
        )


def _module(name: object, key: str, refuse: _Refusal) -> str:
    if not isinstance(name, str) or len(name) > 200 or not re.fullmatch(r"\w+(\.\w+)*", name, re.ASCII):
        raise refuse.of(key, name, 'the name of a module, such as "attention.output.dense"')
    return name


def _sites(table: object, refuse: _Refusal) -> dict[str, str | list[str]]:
    if not isinstance(table, Mapping) or not table:
        raise refuse.of("sites", table, _EXPECTED["sites"])
    _no_others(table, _KINDS, "sites.", refuse)
    for pair in _PAIRS:
        for here, other in (pair, pair[::-1]):
            if here in table and other not in table:
                raise ValueError(
                    f"site map '{refuse.where}': key 'sites.{other}' is missing beside 'sites.{here}', expected both: "
                    "the neurons of the one are "
                    + ("cut with those of the other" if pair[0] == "query" else "read by the other")
                )
    found: dict[str, str | list[str]] = {}
    for kind in (kind for kind in _KINDS if kind in table):
        named, key = table[kind], f"sites.{kind}"
        if not isinstance(named, list):
            found[kind] = _module(named, key, refuse)
            continue
        if kind != "intermediate" or len(named) != 2 or named[0] == named[1]:
            expected = "the name of one Linear"
            raise refuse.of(
                key, named, expected + (", or of two that are multiplied" if kind == "intermediate" else "")
            )
        found[kind] = [_module(name, key, refuse) for name in named]
    return found


def _blocks(table: object, sites: Mapping[str, str | list[str]], refuse: _Refusal) -> dict[str, list[int]]:
    if not isinstance(table, Mapping):
        raise refuse.of("blocks", table, "a table of kinds, such as value = [2]")
    shareable = tuple(kind for kind in sites if kind not in ("attention_output", "output"))
    _no_others(table, shareable, "blocks.", refuse)
    found: dict[str, list[int]] = {}
    for kind in shareable:
        if kind not in table:
            continue
        given, most = table[kind], 2 if kind == "intermediate" else 1
        plain = (
            isinstance(given, list) and 1 <= len(given) <= most and len({str(block) for block in given}) == len(given)
        )
        if not plain or not all(type(block) is int and 0 <= block < _MOST_BLOCKS for block in given):
            what = "one number of a block, or two that are multiplied," if most == 2 else "one number of a block"
            raise refuse.of(f"blocks.{kind}", given, f"a list of {what} from 0 to {_MOST_BLOCKS - 1}")
        if isinstance(sites[kind], list):
            raise refuse.of(f"blocks.{kind}", given, "none, as sites.intermediate names two Linears")
        found[kind] = list(given)
    places: dict[tuple[str, int], str] = {}
    for kind, named in sites.items():
        for name in named if isinstance(named, list) else [named]:
            for block in found.get(kind, [-1]):
                # a Linear without blocks is the kind's alone
                taken = [
                    other for (of, at), other in places.items() if of == name and (-1 in (at, block) or at == block)
                ]
                if taken:
                    raise ValueError(
                        f"site map '{refuse.where}': key 'sites.{kind}' is '{name[:60]}', which 'sites.{taken[0]}' "
                        f"names, too, expected a Linear of its own, or other blocks of it: blocks.{kind} = [1]"
                    )
                places[name, block] = kind
    inner = sites.get("intermediate")
    if isinstance(inner, str) and inner in {of for (of, _), kind in places.items() if kind != "intermediate"}:
        raise refuse.of("sites.intermediate", inner, "a Linear that no other kind shares")
    return found


__all__ = ["checked_site_map", "read_site_map", "site_map_hash"]
