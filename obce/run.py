"""The run directory: the only module that knows file names and formats.

    run.json         what was asked and what stands, with hashes
    scores.parquet   one row a neuron; the facts of the run in the file's metadata under the key `obce`,
                     the table of heads and layers under the key `obce.clouds`
    sketch.safetensors  what `obce merge` takes, where it was asked for
    shards/          finished shards of a scoring that goes on or was stopped
    sensitivity.json what each site can spare, where it was measured
    plan.json        kept neurons of every site, predicted size
    results.json     measured models, one object each, where some were measured
    model/           the pruned model and its tokenizer, as transformers writes them, with a model card and hashes
    report.html      one page for people

Every file appears under its name only when it is whole: written beside it, flushed to disk, then renamed.
A killed run leaves at most a `.partial-...` file, which is never read.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from obce import __version__, export, modeling_obce
from obce.card import Origin, front_matter, name_of, render_card, sizes_of
from obce.checkpoint_obce import check_checkpoint, read_json, write_manifest
from obce.clouds import Clouds, parts_of, place_of, points_of
from obce.compare import COLUMNS, key_of, row_of
from obce.corpus import corpus_of, read_corpus
from obce.effects import reading_of
from obce.explain import TAIL, Findings, examine, sample
from obce.explain import search as search_texts
from obce.files import LOCK, PARTIAL, locked, whole, write_text
from obce.glue import calibration, read_task
from obce.h0 import H0, h0
from obce.heads import check_cloud, explain_clouds, sample_clouds
from obce.images import load_processor
from obce.modeling_obce_mapped import ObceMapped
from obce.pages import Explained, explained
from obce.plan import Curves, Plan, default_units
from obce.prune import prune
from obce.removal import Pruned
from obce.repair import RIDGE
from obce.report import render_html
from obce.scores import Scores
from obce.scoring import (
    CLOUD_TEXTS,
    EFFECT_TEXTS,
    SHARD_TEXTS,
    Kept,
    ShardProgress,
    default_batch_tokens,
    kept_exactly,
    merge,
    score,
)
from obce.sensitivity import How, sensitivity
from obce.sitemap_obce import site_map_hash
from obce.sites import (
    LAYOUTS,
    MAPPED,
    SITE_KINDS,
    architecture,
    find_sites,
    layout_of,
    model_hash,
    position_of,
    quiet_transformers,
    register_sites,
    unknown_family,
    usable_max_length,
)
from obce.sketch import Sketch
from obce.world import World

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from obce.corpus import Corpus
    from obce.finetune import Settings

_FORMAT = "obce-run"
_FORMAT_VERSION = 1
_SHARDS = "shards"

# Settings of a scoring that decide its bits, with their defaults, and the words for them.
_SCORING: dict[str, Any] = {
    "batch_tokens": None,
    "shard_texts": SHARD_TEXTS,
    "tokens": True,
    "cloud_texts": CLOUD_TEXTS,
    "effect_texts": EFFECT_TEXTS,
    "read": "auto",
    "precision": "float32",
    "position": "auto",
}
_EARLIER = {"position": "cls"}  # of runs that were begun before there was the setting
_WORDS = {
    "model_hash": "model",
    "corpus_hash": "corpus",
    "max_length": "maximum length",
    "exact": "choice between every value and a sketch",
    "batch_tokens": "number of tokens a pass",
    "shard_texts": "number of texts a shard",
    "tokens": "choice of sums over all tokens",
    "cloud_texts": "number of texts in the clouds",
    "effect_texts": "number of texts in the effect clouds",
    "read": "place that effects are measured at",
    "labels": "choice of labels",
    "position": "token that texts are read at",
    "site_map": "site map",
}


# ---- models ---------------------------------------------------------------------------------------------------


def load_model(source: str | Path, *, pruned: bool = False) -> PreTrainedModel:
    """Loads an encoder with the head its checkpoint names, in the dtype it was saved in, in eval mode.

    Args:
        source: Directory of a checkpoint, or a hub name.
        pruned: Whether a model that obce has pruned will do, too.

    Raises:
        ValueError: Not a checkpoint, an architecture that is not supported, or weights that do not fit; one
            sentence.
    """
    import transformers

    config = _load_config(source)
    kind = str(config.model_type)
    narrow = kind.startswith("obce_")
    if narrow and not pruned:
        raise ValueError(
            f"model '{source}' was pruned by obce, but a dense one is needed here: name the checkpoint it was made from"
        )
    if not narrow and kind not in LAYOUTS:
        named = [name for name in (config.architectures or []) if name.isidentifier()]
        raise unknown_family(f"model '{source}' is a {(named or [type(config).__name__])[0][:80]}", kind)
    if type(config) not in transformers.MODEL_MAPPING:
        raise ValueError(f"model '{source}' is of the family {kind!r}, which AutoModel of transformers does not open")
    bare: Any = transformers.MODEL_MAPPING[type(config)]
    bare = bare[0] if isinstance(bare, (tuple, list)) else bare
    known, prefix = (modeling_obce if narrow else transformers), bare.__name__.removesuffix("Model")
    names = [name for name in (config.architectures or []) if name.startswith(prefix)]
    model_class = getattr(known, names[0], bare) if names else bare
    if kind == MAPPED:
        # not AutoModel's class, which has no head
        model_class = ObceMapped
    # without use_safetensors transformers would unpickle what has no safetensors
    options: dict[str, Any] = {"config": config, "output_loading_info": True, "dtype": "auto", "use_safetensors": True}
    if narrow:
        options["files_checked"] = True  # every byte of them is read for that
    loader: Any = model_class.from_pretrained
    with quiet_transformers():
        try:
            model, info = loader(source, **options)
            missing = set(info["missing_keys"])
            if model_class is bare and any(name.startswith("pooler.") for name in missing):
                # a pooler that the checkpoint lacks would be random, and would be saved as if it were trained
                model, info = loader(source, **options, add_pooling_layer=False)
                missing = set(info["missing_keys"])
        except Exception as error:
            # safetensors, torch and transformers each raise classes of their own for a damaged or misfit file
            raise ValueError(f"model '{source}' could not be loaded: {_first_sentence(error)}") from error
    if missing:
        raise ValueError(
            f"model '{source}' lacks {len(missing)} of its weights, among them '{min(missing)}': the checkpoint must "
            f"be complete for {model_class.__name__}"
        )
    mismatched = info.get("mismatched_keys")
    if mismatched:
        raise ValueError(
            f"model '{source}' has {len(mismatched)} weights of another shape than its config says: the checkpoint "
            "must fit its config.json"
        )
    dense: PreTrainedModel = model.eval()
    return dense


def _load_scored(source: str | Path, scores: Scores) -> PreTrainedModel:
    """The dense model that was scored; the site map that it was scored by makes its family known again.

    Raises:
        ValueError: Another map of the family is registered, or as `load_model`.
    """
    stated = scores.meta.get("site_map")
    if isinstance(stated, dict):
        known = LAYOUTS.get(str(stated.get("model_type")))
        if known is None:
            register_sites(stated)
        elif known.site_map_hash != site_map_hash(stated):
            raise ValueError(
                f"the scores are of another site map ({site_map_hash(stated)}, now {known.site_map_hash or 'none'}) of "
                f"the family {stated.get('model_type')!r}: give the one that was scored by, or score again into "
                "another --out"
            )
    return load_model(source)


def _as_scored(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, in float32 where it was in half precision."""
    if model.dtype in (torch.float16, torch.bfloat16):
        torch.nn.Module.to(model, torch.float32)
    return model


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Loads a checkpoint's tokenizer, or the image processor of a model that reads pictures.

    Raises:
        ValueError: There is none, or it cannot be read.
        ImportError: A package that the image processor needs is not installed.
    """
    from transformers import AutoTokenizer

    with quiet_transformers():
        pictures = False
        try:
            if Path(source).is_dir():
                check_checkpoint(source, weights=False)
            if pictures := _reads_pictures(source):
                return cast("PreTrainedTokenizerBase", load_processor(source))
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except Exception as error:
            if pictures and isinstance(error, ImportError):
                raise
            what = "image processor" if pictures else "tokenizer"
            raise ValueError(f"model '{source}' has no {what} that loads: {_first_sentence(error)}") from error


def _reads_pictures(source: str | Path) -> bool:
    from transformers import PreTrainedConfig

    stated, _ = PreTrainedConfig.get_config_dict(source)
    family = LAYOUTS.get(str(stated.get("model_type")).removeprefix("obce_").replace("_", "-"))
    return family is not None and family.pictures


def _load_config(source: str | Path) -> Any:
    from transformers import AutoConfig

    path = Path(source)
    if path.is_file():
        raise ValueError(f"model '{source}' is a file, but must be a checkpoint directory or a hub name")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(
            f"model '{source}' is a directory without config.json: name the directory that transformers saved the "
            "model to"
        )
    if path.is_dir():
        try:
            read_json(path / "config.json")
        except ValueError as error:
            raise ValueError(f"model '{source}' has a config.json that does not load: {error}") from error
        try:
            check_checkpoint(path)
        except ValueError as error:
            raise ValueError(f"model '{source}' could not be loaded: {error}") from error
    with quiet_transformers():
        try:
            return AutoConfig.from_pretrained(source, trust_remote_code=False)
        except Exception as error:
            if path.is_dir():
                raise ValueError(
                    f"model '{source}' has a config.json that does not load: {_first_sentence(error)}"
                ) from error
            raise ValueError(
                f"model '{source}' is neither a directory here nor a hub name that could be loaded: give a "
                "checkpoint directory, or go online"
            ) from error


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


# ---- files ----------------------------------------------------------------------------------------------------


def _read_json(path: Path, what: str) -> Any:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{what} {error}: make it again") from error


def write_scores(path: Path, scores: Scores) -> None:
    """Writes scores as parquet: columns layer, site, index, constant and every score; null where undefined."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    site = pa.DictionaryArray.from_arrays(pa.array(scores.site), pa.array(SITE_KINDS))
    table = pa.table(
        {
            "layer": pa.array(scores.layer),
            "site": site,
            "index": pa.array(scores.index),
            "constant": pa.array(scores.constant),
            **{name: pa.array(c, mask=np.isnan(c)) for name, c in scores.columns.items()},
            **{f"text_{name}": pa.array(ids) for name, ids in scores.texts.items()},
        }
    )
    facts = {"obce": json.dumps(scores.meta)}
    if scores.clouds is not None:
        facts["obce.clouds"] = json.dumps(scores.clouds.to_dict())
    table = table.replace_schema_metadata(facts)
    with whole(path) as partial:
        pq.write_table(table, partial, compression="zstd")


def read_scores(path: Path) -> Scores:
    """Reads what `write_scores` wrote.

    Raises:
        ValueError: The file is missing, damaged, or not of obce.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise ValueError(f"run directory '{path.parent}' has no {path.name}: run `obce score` into it first")
    try:
        table = pq.read_table(path)
        meta = json.loads(table.schema.metadata[b"obce"])
        fixed = {"layer", "site", "index", "constant"}
        texts = {name for name in table.column_names if name.startswith("text_")}
        clouds = table.schema.metadata.get(b"obce.clouds")
        names = pa.array(SITE_KINDS)
        codes = pa.compute.index_in(table["site"].cast(pa.string()), names).to_numpy()
        return Scores(
            layer=table["layer"].to_numpy().astype(np.int16),
            site=codes.astype(np.int8),
            index=table["index"].to_numpy().astype(np.int32),
            constant=table["constant"].to_numpy().astype(bool),
            columns={
                name: table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
                for name in table.column_names
                if name not in fixed | texts
            },
            meta=meta,
            texts={name.removeprefix("text_"): table[name].to_numpy() for name in sorted(texts)},
            clouds=None if clouds is None else Clouds.from_dict(json.loads(clouds)),
        )
    # what a damaged file makes of itself is of any class: too deep, too large, of other types
    except Exception as error:
        raise ValueError(
            f"scores '{path}' are damaged or not of obce ({_first_sentence(error)}): score again"
        ) from error


class _Files:
    """A folder of pieces, one safetensors file each: `obce.scoring.Store`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def names(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*.safetensors"))

    def save(self, name: str, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_arrays(self._path(name), arrays, facts)

    def facts(self, name: str) -> dict[str, Any]:
        return _read_facts(self._path(name))

    def read(self, name: str, array: str) -> NDArray[Any]:
        with _opened_arrays(self._path(name)) as file:
            found: NDArray[Any] = file.get_tensor(array)
            return found

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)


def _write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with whole(path) as partial:
        try:
            save_file({k: np.ascontiguousarray(a) for k, a in arrays.items()}, partial, {"obce": json.dumps(facts)})
        except SafetensorError as error:
            # it tells what the system refused in its text alone
            refused = re.search(r"\(os error (\d+)\)", str(error))
            if refused is None:
                raise
            number = int(refused[1])
            raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def _opened_arrays(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(
            f"'{path}' is missing or damaged ({_first_sentence(error)}): remove it, and score again"
        ) from error


def _read_facts(path: Path) -> dict[str, Any]:
    with _opened_arrays(path) as file:
        try:
            facts: dict[str, Any] = json.loads(file.metadata()["obce"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' was not written by obce: remove it, and score again") from error
        return facts


def write_kept(path: Path, kept: Kept) -> None:
    """Writes what is left of a scoring when its texts are gone."""
    arrays: dict[str, NDArray[Any]] = {"digests": kept.digests}
    arrays |= {f"columns.{name}": column for name, column in kept.columns.items()}
    for half, sketch in zip("ab", kept.halves, strict=True):
        arrays |= {f"{half}.{name}": array for name, array in sketch.arrays().items()}
    for (layer, kind), pair in kept.vectors.items():
        arrays |= {f"clouds.{layer}.{kind}.{half}": part for half, part in zip("ab", pair, strict=True)}
    _write_arrays(path, arrays, kept.meta)


def read_kept(path: Path) -> Kept:
    """Reads what `write_kept` wrote.

    Raises:
        ValueError: The file is missing or damaged.
    """
    if not path.is_file():
        raise ValueError(f"run directory '{path.parent}' has no {path.name}: score it with --keep-sketch")
    meta = _read_facts(path)
    with _opened_arrays(path) as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    a, b = (
        Sketch.from_arrays({name[2:]: array for name, array in arrays.items() if name.startswith(half)})
        for half in ("a.", "b.")
    )
    firsts = [name.split(".") for name in arrays if name.startswith("clouds.") and name.endswith(".a")]
    vectors = {
        (int(layer), kind): (arrays[f"clouds.{layer}.{kind}.a"], arrays[f"clouds.{layer}.{kind}.b"])
        for _, layer, kind, _ in firsts
    }
    columns = {name[8:]: array for name, array in arrays.items() if name.startswith("columns.")}
    return Kept((a, b), vectors, arrays["digests"], columns, meta)


def merge_runs(runs: Sequence[Run], out: Run) -> Scores:
    """Joins runs of one model on different texts, scored with `keep_sketch`, in a new run directory.

    Raises:
        ValueError: A run has no sketch, two of them do not belong together or share a text, or `out` holds a run.
    """
    with out._locked():
        if "score" in out.state or "scoring" in out.state:
            raise ValueError(f"run directory '{out.path}' holds a run already: choose another --out")
        found = merge([read_kept(run.sketch_path) for run in runs])
        out.check_writable()
        write_scores(out.scores_path, found)
        fixed = ("model_hash", "corpus_hash", "seed", "max_length", "exact", "tokens", "precision", "position")
        reads = {run.state.get("score", {}).get("read", "auto") for run in runs}
        out._save(
            model=runs[0].state["model"],
            corpus=found.meta["corpus_source"],
            score={
                **{name: found.meta.get(name, _EARLIER.get(name)) for name in fixed},
                "read": reads.pop() if len(reads) == 1 else "auto",
            },
        )
    return found


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {name!r}, which torch cannot use here: {_first_sentence(error)}") from error
    return device


def _digest(array: NDArray[Any]) -> str:
    return blake2b(np.ascontiguousarray(array).data, digest_size=16).hexdigest()


def to_device(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The model itself, moved; `"auto"` is CUDA where there is one.

    Raises:
        ValueError: torch cannot use that device here.
    """
    torch.nn.Module.to(model, _device(name))
    return model


def write_results(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(rows, indent=1) + "\n")


class CompareRun:
    """Directory of a comparison: `compare.json` (what was asked) and `compare.csv`, one row a measured model.

    Attributes:
        path: The table.
        rows: Its rows, with the names and types of `obce.compare.compare`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "compare.csv"
        self.rows: list[dict[str, Any]] = []
        self._read()

    def _read(self) -> None:
        if self.path.is_file():
            with self.path.open(encoding="utf-8", newline="") as file:
                try:
                    self.rows = [row_of(row) for row in csv.DictReader(file)]
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(f"'{self.path}' is damaged ({error!r}): remove it, and compare again") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """This process alone adds rows; there are those that others left.

        Raises:
            ValueError: Another one does.
        """
        with locked(self.folder):
            self._read()
            yield

    def ask(self, asked: Mapping[str, Any], settings: Settings) -> None:
        """Notes what is compared, or refuses if the directory holds another comparison.

        Raises:
            ValueError: It does; says which setting differs.
        """
        now = json.loads(json.dumps({**asked, **asdict(settings)}))
        file = self.folder / "compare.json"
        if file.is_file():
            before = _read_json(file, "comparison")
            for name, value in now.items():
                if not isinstance(before, dict) or before.get(name) != value:
                    found = before.get(name) if isinstance(before, dict) else None
                    raise ValueError(
                        f"'{self.folder}' holds a comparison with another {name} ({found}, now {value}): choose "
                        "another --out"
                    )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(now, indent=1) + "\n")

    def keys(self) -> set[tuple[str, ...]]:
        """Keys of the rows there are."""
        return {key_of(row) for row in self.rows}

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a row."""
        self.rows.append(row)
        with whole(self.path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, "metrics": json.dumps(row["metrics"])} for row in self.rows)


def _first_here(world: World) -> bool:
    """Whether this rank is the first of its machine: ranks of one machine share the directory's lock."""
    return world.rank == 0 if world.size == 1 else os.environ.get("LOCAL_RANK", "0") == "0"


def read_plan(path: Path) -> Plan:
    """Reads a plan.

    Raises:
        ValueError: The file is missing, damaged, or not a plan.
    """
    if not path.is_file():
        raise ValueError(f"plan '{path}' does not exist: run `obce plan` first")
    found = _read_json(path, "plan")
    try:
        return _checked_plan(Plan.from_dict(found), found)
    except (OverflowError, RecursionError, ValueError) as error:
        raise ValueError(f"plan '{path}' cannot be used: {_first_sentence(error)}") from error


def _checked_plan(plan: Plan, plain: Any) -> Plan:
    """The plan, if all its numbers are of the kind that a plan has; `plain` is what it was read from."""

    def refuse(what: str, found: object, expected: str) -> None:
        shown = repr(found)
        raise ValueError(f"its {what} is {shown[:60]}{'...' if len(shown) > 60 else ''}, expected {expected}")

    def whole(value: object) -> bool:
        return type(value) is int and 0 <= value < 2**31

    def finite(value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float(2**63)

    for name, indices in [*plain["kept"].items(), ("layers_dropped", plain["layers_dropped"])]:
        wrong = [index for index in indices if not whole(index)] if isinstance(indices, list) else [indices]
        if wrong:
            refuse(f"entry of {name[:40]!r}", wrong[0], "a list of whole numbers")
    for size in (plan.before, plan.after):
        for what, number in size._asdict().items():
            if type(number) is not int or not 0 < number < 2**63:
                refuse(what, number, "a whole number above 0")
    for what in ("model_hash", "corpus_hash", "score", "of", "shares"):
        if not isinstance(getattr(plan, what), str):
            refuse(what, getattr(plan, what), "text")
    for what in ("preset", "head_score"):
        if not isinstance(getattr(plan, what), (str, type(None))):
            refuse(what, getattr(plan, what), "text or null")
    if plan.of not in ("total", "encoder"):
        refuse("of", plan.of, "'total' or 'encoder'")
    if plan.keep is not None and not (finite(plan.keep) and 0 < plan.keep <= 1):
        refuse("keep", plan.keep, "a share in (0, 1] or null")
    if not whole(plan.seed) or not finite(plan.floor):
        refuse("seed or floor", (plan.seed, plan.floor), "finite numbers")
    unknown = [name for name in plan.kept if not re.fullmatch(rf"[0-9]{{1,9}}\.({'|'.join(SITE_KINDS)})", name)]
    if unknown:
        refuse("site", unknown[0], "a layer and a kind, such as 3.value")
    levels = plan.levels
    if not isinstance(levels, dict) or not all(re.fullmatch("[0-9]{1,9}", k) and finite(v) for k, v in levels.items()):
        refuse("levels", levels, "a share for each layer")
    facts = plan.architecture
    if not isinstance(facts, dict) or not all(type(fact) in (str, bool) or finite(fact) for fact in facts.values()):
        refuse("architecture", facts, "the facts that `obce score` states")
    for what in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if type(facts.get(what)) is not int or not 0 < facts[what] <= 10**6:
            refuse(f"architecture's {what}", facts.get(what), "a whole number above 0")
    dropped = list(plan.layers_dropped)
    if dropped != sorted(set(dropped)) or any(layer >= facts["num_hidden_layers"] for layer in dropped):
        refuse("layers_dropped", dropped, f"distinct and ascending layers below {facts['num_hidden_layers']}")
    return plan


def _hash_of(plain: Any) -> str:
    return blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=16).hexdigest()


def _plan_hash(plan: Plan) -> str:
    return _hash_of(plan.to_dict())


# ---- exports --------------------------------------------------------------------------------------------------


def export_model(
    source: str | Path,
    way: str,
    out: str | Path,
    *,
    base: str | None = None,
    origin: Callable[[str], Origin] | None = None,
) -> dict[str, Any]:
    """Writes a pruned model in a form that opens without obce, with its tokenizer, card and hashes.

    Args:
        source: Directory of a model that obce has pruned.
        way: One of `obce.export.WAYS`.
        out: Directory to make; it must not exist, or be empty.
        base: For sentence-transformers: directory of the dense model, where `source` holds no modules.json.
        origin: Makes what the card says, of a sentence about pooling (default: what the model's own files tell).

    Returns:
        `way`, `out`, `class`, `parameters`, `files` (name -> bytes) and `difference`: the greatest difference in
        outputs between the pruned model and a dense or ONNX export on some random tokens, else None.

    Raises:
        ValueError: The way is unknown, `out` is taken, the model was not pruned by obce, or has no pooling.
        ImportError: ONNX packages are missing.
    """
    if way not in export.WAYS:
        raise ValueError(f"--to is {way!r}, expected one of {', '.join(export.WAYS)}")
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--out '{out}' exists and is not an empty directory: choose another --out")
    model = load_model(source, pruned=True)
    if not str(model.config.model_type).startswith("obce_"):
        raise ValueError(f"model '{source}' was not pruned by obce, so there is nothing to export: it opens as it is")
    tokenizer = load_tokenizer(source)
    about = origin(_pooling_of(source)) if origin else _own_origin(model, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    difference = None
    with whole(target) as partial:
        partial.mkdir()
        shown = model
        if way == "remote-code":
            export.remote_code(model, partial, tokenizer)
        elif way == "onnx":
            difference = export.onnx(model, partial, tokenizer)
        elif way == "dense":
            shown, difference = export.dense(model, partial, tokenizer, about.plan)
        else:
            here = source if base is None or (Path(source) / "modules.json").is_file() else base
            export.sentence_transformers(model, partial, here, tokenizer)
        _finish(partial, shown, about, way)
    return {
        "way": way,
        "out": str(target),
        "class": type(shown).__name__,
        "parameters": sum(p.numel() for p in shown.parameters()),
        "files": {
            path.relative_to(target).as_posix(): path.stat().st_size
            for path in sorted(target.rglob("*"))
            if path.is_file()
        },
        "difference": difference,
    }


def push(folder: str | Path, repository: str) -> str:
    """Uploads a directory to the hub, as a private repository where there is none yet; never called but on request.

    Returns:
        Address of the commit.

    Raises:
        ValueError: The hub refused; one sentence.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Upload by obce {__version__}")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"--push {repository}: the hub could not be written ({_first_sentence(error)})") from error
    return str(done.commit_url)


def _finish(folder: Path, model: PreTrainedModel, origin: Origin, way: str = "") -> None:
    """Card and hashes, when all other files are there."""
    (folder / "README.md").write_text(render_card(model, origin, way), encoding="utf-8")
    write_manifest(folder)


def _carry_pooling(source: str, folder: Path) -> str:
    """Carries over what sentence-transformers needs; a sentence for the card, empty where the model has none."""
    if not (Path(source) / "modules.json").is_file():
        return ""
    try:
        export.carry_pooling(source, folder)
    except ValueError as error:
        # the model itself is whole, and may have taken hours
        return f"The pooling of the dense model was not carried over: {_first_sentence(error)}."
    return _pooling_of(folder)


def _pooling_of(folder: str | Path) -> str:
    if not (Path(folder) / "modules.json").is_file():
        return ""
    return "The directory is one of sentence-transformers, too; pooling is that of the dense model."


def _own_origin(model: PreTrainedModel, source: str | Path) -> Origin:
    config: Any = model.config
    made = config.obce
    base = made.get("base") if isinstance(made, dict) else None
    stated = front_matter(str(source))
    hub = stated.get("base_model")
    hub = hub if isinstance(hub, str) else None
    return Origin(str(base or hub or "not recorded"), hub, stated, pooling=_pooling_of(source))


# ---- the run --------------------------------------------------------------------------------------------------


class Run:
    """One run directory.

    Attributes:
        path: The directory.
        state: Content of run.json: `model`, `corpus`, and what each finished step was asked.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.state: dict[str, Any] = {"format": _FORMAT, "format_version": _FORMAT_VERSION}
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run '{path}' is a file, but must be a directory")
        if (self.path / "run.json").is_file():
            self._read()
        elif self.path.is_dir() and any(not p.name.startswith((PARTIAL, LOCK)) for p in self.path.iterdir()):
            raise ValueError(f"run directory '{path}' holds files but no run.json: choose an empty or a new directory")

    @classmethod
    def existing(cls, path: str | Path) -> Run:
        """Opens a run that was scored.

        Raises:
            ValueError: There is none.
        """
        if not (Path(path) / "run.json").is_file():
            raise ValueError(
                f"run directory '{path}' has no run.json: make it with `obce score MODEL CORPUS --out {path}`"
            )
        return cls(path)

    def _read(self) -> None:
        file = self.path / "run.json"
        state = _read_json(file, "run")
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ValueError(f"run '{file}' was not written by obce: choose another directory")
        if state.get("format_version") != _FORMAT_VERSION:
            raise ValueError(
                f"run '{file}' has format version {state.get('format_version')}, but this version reads "
                f"{_FORMAT_VERSION}: choose another directory"
            )
        self.state = state

    def _save(self, **steps: Any) -> None:
        self.state = {**self.state, "obce": __version__, **steps}
        write_text(self.path / "run.json", json.dumps(self.state, indent=1) + "\n")

    @property
    def scores_path(self) -> Path:
        """Path of scores.parquet."""
        return self.path / "scores.parquet"

    @property
    def sketch_path(self) -> Path:
        """Path of sketch.safetensors."""
        return self.path / "sketch.safetensors"

    @property
    def plan_path(self) -> Path:
        """Path of plan.json."""
        return self.path / "plan.json"

    @property
    def model_path(self) -> Path:
        """Path of the pruned model's directory."""
        return self.path / "model"

    @property
    def sensitivity_path(self) -> Path:
        """Path of sensitivity.json."""
        return self.path / "sensitivity.json"

    @property
    def results_path(self) -> Path:
        """Path of results.json."""
        return self.path / "results.json"

    @property
    def explained_path(self) -> Path:
        """Path of explained.json."""
        return self.path / "explained.json"

    @property
    def report_path(self) -> Path:
        """Path of report.html."""
        return self.path / "report.html"

    def scores(self) -> Scores:
        """Reads the run's scores; raises `ValueError` when there are none."""
        return read_scores(self.scores_path)

    def plan(self) -> Plan:
        """Reads the run's plan; raises `ValueError` when there is none."""
        return read_plan(self.plan_path)

    def check_writable(self) -> None:
        """Makes the directory and proves that a file can be written, before hours of work.

        Raises:
            OSError: It cannot.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for left in self.path.glob(PARTIAL + "*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=self.path) as probe:
            (Path(probe) / "probe").write_bytes(b"obce")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """This process alone writes to the directory; its state is what others left.

        Raises:
            ValueError: Another one does.
        """
        with locked(self.path):
            if (self.path / "run.json").is_file():
                self._read()
            yield

    def _asked(self, asked: dict[str, Any]) -> None:
        """Refuses settings that are not those of what the directory holds."""
        for step, what in (("score", "scores"), ("scoring", "unfinished scores")):
            before = self.state.get(step)
            if step == "scoring" and not self.unfinished():
                continue
            for name, value in asked.items():
                there = None if before is None else before.get(name, _EARLIER.get(name))
                if before is not None and there != value:
                    raise ValueError(
                        f"run directory '{self.path}' holds {what} of another {_WORDS.get(name, name)} "
                        f"({there}, now {value}): choose another --out"
                    )

    def score(
        self,
        model_source: str,
        corpus: Corpus,
        *,
        seed: int = 0,
        max_length: int | None = None,
        device: str = "auto",
        keep_sketch: bool = False,
        threads: int | None = None,
        labels: NDArray[Any] | None = None,
        progress: Callable[[ShardProgress], None] | None = None,
        effect_progress: Callable[[float, float], None] | None = None,
        **settings: Any,
    ) -> tuple[Scores, bool]:
        """Scores a model on a corpus, unless this run already holds exactly these scores.

        Finished shards are kept in the run and found again by a later call. Under `torch.distributed` every rank calls
        this; rank 0 writes the scores, and ranks may or may not share the directory. A checkpoint in half precision is
        scored in float32: its rounding would be most of what is measured.

        Args:
            model_source: A checkpoint's directory, or a hub name.
            corpus: Distinct texts; distinct pictures for a model that reads these.
            seed, max_length, threads: As in `obce.score`.
            device: `"auto"` (CUDA where there is one), or a device of torch.
            keep_sketch: Keep what `merge_runs` takes, too.
            progress: As in `obce.score`.
            settings: `batch_tokens`, `shard_texts`, `memory`, `exact`, `tokens`, `cloud_texts`, `effect_texts`, `read`,
                `precision` and `position` of `obce.score`.

        Returns:
            The scores, and whether they were there before.

        Raises:
            ValueError: The run holds scores of another model, corpus or setting (says which), or another process
                writes to it.
        """
        # later steps may be started in another folder
        place = str(Path(model_source).resolve()) if Path(model_source).is_dir() else str(model_source)
        model = load_model(model_source)
        corpus_of(corpus, pictures=layout_of(model).pictures)  # refuses one of the other kind
        facts = architecture(model)
        model = _as_scored(model)
        tokenizer = load_tokenizer(model_source)
        torch.nn.Module.to(model, where := _device(device))
        world = World()
        neurons = sum(site.width for site in find_sites(model))
        exact = settings.pop("exact", None)
        asked = {
            "model_hash": model_hash(model),
            "corpus_hash": corpus.hash,
            "seed": seed,
            "max_length": usable_max_length(model, tokenizer, max_length),
            "exact": kept_exactly(neurons, len(corpus)) if exact is None else exact,
            **_SCORING,
            **{name: value for name, value in settings.items() if name in _SCORING},
            "labels": None if labels is None else _digest(labels),
            "site_map": layout_of(model).site_map_hash or None,
        }
        if asked["read"] == "auto":
            asked["read"] = settings["read"] = reading_of(model)
        asked["position"] = settings["position"] = position_of(model, asked["position"])
        asked["batch_tokens"] = settings["batch_tokens"] = asked["batch_tokens"] or default_batch_tokens(where.type)
        self._asked(asked)
        complete = self.scores_path.is_file() and "score" in self.state
        complete = complete and (self.sketch_path.is_file() or not keep_sketch)
        # of ranks that share the directory the first speaks for it
        if world.from_first(complete):
            if world.rank == 0 and (self.path / _SHARDS).exists():
                self._sweep_shards()
            if world.rank == 0 and self.state["model"] != place:  # the same weights, moved
                with self._locked():
                    self._save(model=place)
            return world.from_first(self.scores() if world.rank == 0 else None), True
        first = _first_here(world)
        with self._locked() if first else nullcontext():
            if first:
                self._asked(asked)  # another process may have ended since
                self.check_writable()
                self._save(model=place, corpus=corpus.source, reading=corpus.reading, scoring=asked)
            world.tell(None)  # the directory is there
            shards = self.path / _SHARDS
            kept: list[Kept] = []
            found = score(
                model,
                tokenizer,
                corpus,
                seed=seed,
                max_length=max_length,
                exact=asked["exact"],
                threads=threads,
                store=_Files(shards),
                labels=labels,
                progress=progress if world.rank == 0 else None,
                effect_progress=effect_progress,
                on_kept=kept.append if keep_sketch else None,
                **settings,
            )
            if world.rank == 0:
                # sizes are those of the checkpoint, which is what will be pruned
                for meta in (found.meta, *(one.meta for one in kept)):
                    meta["architecture"] = facts
                for one in kept:
                    write_kept(self.sketch_path, one)
                write_scores(self.scores_path, found)
                self.state.pop("scoring", None)
                self._save(score=asked)
            world.tell(None)  # rank 0 has written what replaces the shards
            if first:
                shutil.rmtree(shards, ignore_errors=True)
        return found, False

    def _sweep_shards(self) -> None:
        """Removes the shards of a process that was killed in its last moment."""
        with suppress(OSError, ValueError), self._locked():  # another process writes here: they may be its own
            if "scoring" not in self.state:  # else the same command goes on from them
                shutil.rmtree(self.path / _SHARDS, ignore_errors=True)

    def unfinished(self) -> int:
        """Texts of an unfinished scoring that need not be scored again."""
        store = _Files(self.path / _SHARDS)
        return sum(int(store.facts(name)["n_texts"]) for name in store.names())

    def make_plan(self, plan_made: Plan) -> Path:
        """Stores a plan made for this run's scores."""
        with self._locked():
            write_text(self.plan_path, json.dumps(plan_made.to_dict()) + "\n")
            self._save(
                plan={
                    name: getattr(plan_made, name)
                    for name in ("score", "preset", "keep", "of", "seed", "floor", "model_hash")
                }
            )
        return self.plan_path

    def corpus(self, otherwise: str = "use --repair mean") -> Corpus:
        """Reads the scored texts again from where they were read.

        Args:
            otherwise: What can be done without them, for the error.

        Raises:
            ValueError: They were not read from a file or dataset, or are not the same any more.
        """
        reading = self.state.get("reading")
        if not reading:
            raise ValueError(
                f"run directory '{self.path}' was not scored on a file or dataset: name the texts with --corpus, or "
                f"{otherwise}"
            )
        reading = dict(reading)
        if "task" in reading:
            data = read_task(reading.pop("task"), reading.pop("source"))
            found, _ = calibration(data.train, self.state["corpus"], **reading)
        else:
            found = read_corpus(str(reading.pop("source")), **reading)
        if found.hash != self.state["score"]["corpus_hash"]:
            raise ValueError(
                f"the texts of '{self.state['corpus']}' are not those that run directory '{self.path}' was scored on: "
                f"name others with --corpus, or {otherwise}"
            )
        return found

    def prune(
        self,
        *,
        repair: str = "least_squares",
        plan_file: Path | None = None,
        model_source: str | None = None,
        corpus: Corpus | None = None,
        device: str = "auto",
        progress: Callable[[float, float], None] | None = None,
    ) -> PreTrainedModel:
        """Prunes the scored model by the run's plan and stores the smaller one with its tokenizer.

        Args:
            repair: As in `obce.prune`; the means are those of the scores.
            plan_file: Plan to use instead of the run's own.
            model_source: Where the scored model lies now, if it was moved.
            corpus: Texts for least squares (default: those that were scored).
            device: As in `score`.
            progress: Called with (layers done, layers in all) by least squares.

        Raises:
            ValueError: There is no plan, plan and model do not belong together, or the texts are not to be had.
        """
        scores = self.scores()
        chosen = read_plan(plan_file) if plan_file is not None else self.plan()
        source = model_source or self.state["model"]
        with self._locked():
            self.check_writable()
            model = _load_scored(source, scores)
            tokenizer = load_tokenizer(source)
            given: dict[str, Any] = {"scores": scores}
            if repair == "least_squares":
                texts = self.corpus() if corpus is None else corpus
                given = {"texts": texts, "tokenizer": tokenizer, "max_length": self.state["score"]["max_length"]}
                torch.nn.Module.to(model, _device(device))
            small = prune(model, chosen, repair=repair, progress=progress, **given).cpu()
            small.config.obce = {**small.config.obce, "base": name_of(source), "size": sizes_of(chosen)}
            with whole(self.model_path) as partial, quiet_transformers():
                small.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
                pooling = _carry_pooling(source, partial)
                _finish(partial, small, self._origin(source, chosen, pooling=pooling))
            self._save(
                prune={
                    "repair": repair,
                    "plan_model_hash": chosen.model_hash,
                    "plan_hash": _plan_hash(chosen),
                    "model": str(source),
                }
            )
        return small

    def _origin(self, source: str, chosen: Plan | None, *, pooling: str = "") -> Origin:
        results = _read_json(self.results_path, "results") if self.results_path.is_file() else []
        rows = [row for row in results if isinstance(row, dict)] if isinstance(results, list) else []
        hub = None if Path(source).is_dir() else source
        return Origin(name_of(source), hub, front_matter(source), chosen, self.scores(), rows, pooling)

    def export(self, way: str, out: str | Path, *, base: str | None = None) -> dict[str, Any]:
        """Exports the run's pruned model; neurons of a dense export return to their places by the run's plan.

        Args:
            way, out: As for `export_model`.
            base: Where the dense model lies now, if it was moved.

        Returns:
            As `export_model`.

        Raises:
            ValueError: Nothing was pruned yet, or as `export_model`.
        """
        if not (self.model_path / "config.json").is_file():
            raise ValueError(f"run directory '{self.path}' has no model: make it with `obce prune {self.path}`")
        stated = self.state.get("prune")
        stated = stated if isinstance(stated, dict) else {}
        source = base or str(stated.get("model") or self.state.get("model"))
        chosen = self.plan() if self.plan_path.is_file() else None
        if chosen is not None and stated.get("plan_hash") != _plan_hash(chosen):
            chosen = None  # pruned by another one
        return export_model(
            self.model_path, way, out, base=base, origin=lambda pooling: self._origin(source, chosen, pooling=pooling)
        )

    def sensitivity(
        self,
        *,
        how: How = "estimated",
        score: str,
        units: Sequence[str] | None = None,
        head_score: str | None = None,
        corpus: Corpus | None = None,
        device: str = "auto",
        store: bool = True,
        progress: Callable[[float, float], None] | None = None,
    ) -> Curves:
        """What every layer and unit of the scored model can spare, found once and kept in the run.

        What was found before a run was cut short is not looked for again.

        Args:
            how, score, units, head_score: As in `obce.sensitivity`.
            corpus: Texts (default: those that were scored).
            device: As in `score`.
            store: Whether the run keeps what is found.
            progress: Called with (layers done, layers in all).

        Raises:
            ValueError: The texts are not to be had, or fewer than six.
        """
        texts = self.corpus("take --shares uniform") if corpus is None else corpus
        scores = self.scores()
        units = default_units(scores.meta["architecture"]) if units is None else units
        asked = {
            "how": how,
            "model_hash": self.state["score"]["model_hash"],
            "corpus_hash": texts.hash,
            "score": score,
            "units": list(units),
            "head_score": head_score,
            "read": self.state["score"].get("read", "auto"),
            **({"ridge": RIDGE} if how == "measured" else {}),
        }
        known = None
        if self.sensitivity_path.is_file():
            kept = _read_json(self.sensitivity_path, "sensitivity")
            if isinstance(kept, dict) and kept.get("asked") == asked:
                try:
                    known = Curves(kept["curves"], how)
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    raise ValueError(
                        f"'{self.sensitivity_path}' holds no curves ({type(error).__name__}), expected shares and "
                        "losses: delete it, and they are found anew"
                    ) from error
                if kept.get("complete", True):
                    return known

        def keep(curves: Curves, complete: bool = False) -> None:
            if store:
                with self._locked():
                    found = {"asked": asked, "complete": complete, "curves": curves}
                    write_text(self.sensitivity_path, json.dumps(found) + "\n")

        source = self.state["model"]
        model, tokenizer = _as_scored(_load_scored(source, scores)), load_tokenizer(source)
        torch.nn.Module.to(model, _device(device))
        curves = sensitivity(
            model,
            scores,
            texts,
            tokenizer=tokenizer,
            max_length=self.state["score"]["max_length"],
            how=how,
            score=score,
            units=units,
            head_score=head_score,
            read=asked["read"],
            progress=progress,
            known=known,
            on_layer=keep,
        )
        keep(curves, complete=True)
        return curves

    def add_results(self, results: list[dict[str, Any]]) -> Path:
        """Stores measured models, with the keys of `obce.report.RESULT_KEYS` each; the report shows them."""
        write_text(self.results_path, json.dumps(results, indent=1) + "\n")
        return self.results_path

    def cloud(self, name: str) -> H0:
        """Persistence of one head's or layer's cloud, edges included.

        Args:
            name: `"5.query.3"` (layer, kind of `obce.clouds.CLOUD_KINDS`, head) or `"5.hidden"`.

        Raises:
            ValueError: There is no such cloud, or the run was scored without `keep_sketch`.
        """
        kept = read_kept(self.sketch_path)
        heads = int(kept.meta["heads"])
        layer, kind, head = place_of(name, sorted({at for at, _ in kept.vectors}), heads)
        # a map may name no heads, and heads of the query may share one of key and value
        parts = parts_of(kind, heads, int(kept.meta.get("groups", 1))) if (layer, kind) in kept.vectors else 0
        if head >= parts:
            raise ValueError(
                f"cloud is {name!r}, but layer {layer} has {parts} heads of {kind}: name one from 0 on, or "
                f"{layer}.hidden"
            )
        return h0(points_of(np.concatenate(kept.vectors[layer, kind]), parts, head), edges=True)

    def explain(
        self,
        neurons: Sequence[str] | None = None,
        heads: Sequence[str] | None = None,
        *,
        layer: int | None = None,
        top: int = 3,
        search: str | None = None,
        corpus: Corpus | None = None,
        held_out: Corpus | None = None,
        tail: int = TAIL,
        device: str = "auto",
        progress: Callable[[float, float], None] | None = None,
    ) -> Findings:
        """Explains neurons and heads of the scored model.

        Args:
            neurons: Their names. Without names of neurons and heads: some of every site, or those that `search` finds,
                with the clouds that get a page (`obce.heads.sample_clouds`), and what the plan removes.
            heads: Names of clouds, `"5.query.3"` or `"5.hidden"`.
            layer, top: As `layer` and `per_site` of `obce.explain.sample`.
            search: Words, as in `obce.explain.search`.
            corpus: The scored texts, where they cannot be read again.
            held_out, tail: As in `obce.explain.explain`.
            device: As in `score`.
            progress: Called with (texts done, texts in all).

        Raises:
            ValueError: There is no such neuron or head, or the texts are not to be had.
        """
        scores = self.scores()
        texts = self.corpus() if corpus is None else corpus
        whole = neurons is None and heads is None
        if whole:
            neurons = sample(scores, top, layer) if search is None else search_texts(scores, texts, search)
            heads = [name for name in sample_clouds(scores) if layer is None or name.startswith(f"{layer}.")]
        for name in neurons or ():
            try:
                scores[name]
            except KeyError as error:
                raise ValueError(f"neuron: {error.args[0]}") from None
        for name in heads or ():
            check_cloud(scores, name)
        made = self.plan() if self.plan_path.is_file() else None
        if heads and not neurons and self.sketch_path.is_file():
            kept = read_kept(self.sketch_path)
            if all(kept.meta[name] == scores.meta[name] for name in ("model_hash", "corpus_hash")):
                vectors = {at: np.concatenate(pair) for at, pair in kept.vectors.items()}
                return Findings(heads=tuple(explain_clouds(scores, heads, vectors, texts, made)))
        source = self.state["model"]
        model = to_device(_as_scored(_load_scored(source, scores)), device)
        cut = None
        if made is not None and self.model_path.is_dir():
            try:
                cut = Pruned(model, load_model(self.model_path, pruned=True), made)
            except ValueError:
                cut = None  # of another plan, or trained again: the report says so
        return examine(
            scores,
            model,
            load_tokenizer(source),
            texts,
            neurons=neurons or (),
            heads=heads or (),
            held_out=held_out,
            plan=made,
            pruned=cut,
            removal=whole and made is not None,
            tail=tail,
            progress=progress,
        )

    def report(self, *, findings: Findings | None = None, corpus: Corpus | None = None, texts: bool = True) -> Path:
        """Renders the run's page from what the run holds.

        Args:
            findings: Neurons and heads that get a page, from `explain`; with them the report has every neuron in a
                table. They are kept in the run: without findings the report has those kept before, unless the scores,
                the plan or the pruned model are others now.
            corpus: The scored texts, where they cannot be read again.
            texts: Whether the page may show texts of the corpus.

        Raises:
            ValueError: The run has no scores.
        """
        scores = self.scores()
        chosen = self.plan() if self.plan_path.is_file() else None
        results = _read_json(self.results_path, "results") if self.results_path.is_file() else []
        if not isinstance(results, list):
            raise ValueError(f"'{self.results_path}' holds no list of results: remove it, or measure again")
        name = "/".join(Path(str(scores.meta["model_name"])).parts[-2:])
        pages = self.pages()
        if findings is not None:
            pages = explained(scores, findings, self.corpus() if corpus is None else corpus, plan=chosen, texts=texts)
        compared = CompareRun(self.path).rows
        pruned = self.state.get("prune", {}).get("repair") if self.model_path.is_dir() else None
        html = render_html(
            scores,
            chosen,
            results,
            title=f"obce report: {name}",
            explained=pages,
            repair=pruned,
            compared=compared,
        )
        with self._locked():
            self.check_writable()
            write_text(self.report_path, html)
            if findings is not None and pages is not None:
                plain = pages.to_dict()
                kept = {"of": self._explained_of(), "hash": _hash_of(plain), "pages": plain}
                write_text(self.explained_path, json.dumps(kept, ensure_ascii=False) + "\n")
        return self.report_path

    def pages(self) -> Explained | None:
        """Pages that `report` kept, where they still belong to the scores, the plan and the pruned model.

        Raises:
            ValueError: explained.json is damaged.
        """
        if not self.explained_path.is_file():
            return None
        kept = _read_json(self.explained_path, "pages")
        if not isinstance(kept, dict) or kept.get("hash") != _hash_of(kept.get("pages")):
            raise ValueError(f"'{self.explained_path}' is not as it was written: remove it, or explain again")
        return Explained.from_dict(kept["pages"]) if kept.get("of") == self._explained_of() else None

    def _explained_of(self) -> dict[str, Any]:
        """What pages are of: this release, hashes of the scores and the plan, and how the model was pruned."""
        made = self.plan() if self.plan_path.is_file() else None
        scores = blake2b(self.scores_path.read_bytes(), digest_size=16).hexdigest()
        pruned = self.state.get("prune") if self.model_path.is_dir() else None
        plan_hash = None if made is None else _plan_hash(made)
        return {"obce": __version__, "scores": scores, "plan": plan_hash, "pruned": pruned}
