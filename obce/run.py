"""The run directory: the only module that knows file names and formats.

    run.json         what was asked and what stands, with hashes
    scores.parquet   one row a neuron; the facts of the run in the file's metadata under the key `obce`
    plan.json        kept neurons of every site, predicted size
    results.json     measured models, one object each, where some were measured
    model/           the pruned model and its tokenizer, as transformers writes them
    report.html      one page for people

Every file appears under its name only when it is whole: written beside it, flushed to disk, then renamed.
A killed run leaves at most a `.partial-...` file, which is never read.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from obce import __version__
from obce.plan import Plan
from obce.prune import prune
from obce.report import render_html
from obce.scores import Scores, score, usable_max_length
from obce.sites import SITE_KINDS, architecture, model_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from obce.capture import Memory, Progress
    from obce.corpus import Corpus

_FORMAT = "obce-run"
_FORMAT_VERSION = 1
_PARTIAL = ".partial-"


# ---- models ---------------------------------------------------------------------------------------------------


def load_model(source: str | Path) -> PreTrainedModel:
    """Loads a BERT with the head its checkpoint names, in the dtype it was saved in, in eval mode.

    Args:
        source: Directory of a checkpoint, or a hub name.

    Raises:
        ValueError: Not a checkpoint, an architecture that is not supported, or weights that do not fit; one
            sentence.
    """
    import transformers

    config = _load_config(source)
    if config.model_type != "bert":
        raise ValueError(
            f"model '{source}' has architecture '{config.model_type}', but only 'bert' is supported: choose a BERT "
            "checkpoint"
        )
    names = [name for name in (config.architectures or []) if name.startswith("Bert")]
    model_class = getattr(transformers, names[0], None) if names else None
    if model_class is None:
        model_class = transformers.BertModel
    options: dict[str, Any] = {"config": config, "output_loading_info": True, "dtype": "auto"}
    loader: Any = model_class.from_pretrained
    with quiet_transformers():
        try:
            model, info = loader(source, **options)
            missing = set(info["missing_keys"])
            if model_class is transformers.BertModel and any(name.startswith("pooler.") for name in missing):
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


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Loads a checkpoint's tokenizer.

    Raises:
        ValueError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(source)
        except Exception as error:
            raise ValueError(f"model '{source}' has no tokenizer that loads: {_first_sentence(error)}") from error


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
    with quiet_transformers():
        try:
            return AutoConfig.from_pretrained(source)
        except Exception as error:
            if path.is_dir():
                raise ValueError(
                    f"model '{source}' has a config.json that does not load: {_first_sentence(error)}"
                ) from error
            raise ValueError(
                f"model '{source}' is neither a directory here nor a hub name that could be loaded: give a "
                "checkpoint directory, or go online"
            ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Holds back transformers' loading report and bars: what matters in them is raised as an error instead."""
    from transformers import utils

    logging: Any = utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


# ---- files ----------------------------------------------------------------------------------------------------


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A path to write to, which takes the target's name only if the block ends well; files and directories."""
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=target.parent)) / target.name
    try:
        yield partial
        if partial.is_dir():
            for file in sorted(partial.rglob("*")):
                if file.is_file():
                    _flush(file)
            if target.exists():
                # a directory cannot be renamed over a full one: the old one steps aside first
                os.replace(target, partial.parent / "old")
        else:
            _flush(partial)
        os.replace(partial, target)
        _flush(target.parent)
    finally:
        shutil.rmtree(partial.parent, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_text(target: Path, text: str) -> None:
    with _whole(target) as path:
        path.write_text(text, encoding="utf-8")


def _read_json(path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} '{path}' is not readable JSON ({error}): make it again") from error


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
        }
    ).replace_schema_metadata({"obce": json.dumps(scores.meta)})
    with _whole(path) as partial:
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
                if name not in fixed
            },
            meta=meta,
        )
    except (pa.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(
            f"scores '{path}' are damaged or not of obce ({_first_sentence(error)}): score again"
        ) from error


def read_plan(path: Path) -> Plan:
    """Reads a plan.

    Raises:
        ValueError: The file is missing, damaged, or not a plan.
    """
    if not path.is_file():
        raise ValueError(f"plan '{path}' does not exist: run `obce plan` first")
    return Plan.from_dict(_read_json(path, "plan"))


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
        file = self.path / "run.json"
        if file.is_file():
            state = _read_json(file, "run")
            if not isinstance(state, dict) or state.get("format") != _FORMAT:
                raise ValueError(f"run '{file}' was not written by obce: choose another directory")
            if state.get("format_version") != _FORMAT_VERSION:
                raise ValueError(
                    f"run '{file}' has format version {state.get('format_version')}, but this version reads "
                    f"{_FORMAT_VERSION}: choose another directory"
                )
            self.state = state
        elif self.path.is_dir() and any(not p.name.startswith(_PARTIAL) for p in self.path.iterdir()):
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

    def _save(self, **steps: Any) -> None:
        self.state = {**self.state, "obce": __version__, **steps}
        _write_text(self.path / "run.json", json.dumps(self.state, indent=1) + "\n")

    @property
    def scores_path(self) -> Path:
        """Path of scores.parquet."""
        return self.path / "scores.parquet"

    @property
    def plan_path(self) -> Path:
        """Path of plan.json."""
        return self.path / "plan.json"

    @property
    def model_path(self) -> Path:
        """Path of the pruned model's directory."""
        return self.path / "model"

    @property
    def results_path(self) -> Path:
        """Path of results.json."""
        return self.path / "results.json"

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
        for left in self.path.glob(_PARTIAL + "*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=self.path) as probe:
            (Path(probe) / "probe").write_bytes(b"obce")

    def score(
        self,
        model_source: str,
        corpus: Corpus,
        *,
        seed: int = 0,
        max_length: int | None = None,
        batch_size: int = 32,
        memory: Memory = "model",
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> tuple[Scores, bool]:
        """Scores a model on a corpus, unless this run already holds exactly these scores.

        A checkpoint in half precision is scored in float32: its rounding would be most of what is measured.

        Returns:
            The scores, and whether they were there before.

        Raises:
            ValueError: The run holds scores of another model, corpus or setting; says which.
        """
        model = load_model(model_source)
        facts = architecture(model)
        if model.dtype in (torch.float16, torch.bfloat16):
            torch.nn.Module.to(model, torch.float32)  # in place
        tokenizer = load_tokenizer(model_source)
        asked = {
            "model_hash": model_hash(model),
            "corpus_hash": corpus.hash,
            "seed": seed,
            "max_length": usable_max_length(model, tokenizer, max_length),
        }
        words = {
            "model_hash": "model",
            "corpus_hash": "corpus",
            "seed": "seed",
            "max_length": "maximum length",
        }
        before = self.state.get("score")
        if before is not None:
            for name, value in asked.items():
                if before.get(name) != value:
                    raise ValueError(
                        f"run directory '{self.path}' holds scores of another {words[name]} ({before.get(name)}, "
                        f"now {value}): choose another --out"
                    )
            if self.scores_path.is_file():
                return self.scores(), True
        self.check_writable()
        found = score(
            model,
            tokenizer,
            corpus,
            seed=seed,
            max_length=max_length,
            batch_size=batch_size,
            memory=memory,
            threads=threads,
            progress=progress,
        )
        # sizes are those of the checkpoint, which is what will be pruned
        found.meta["architecture"] = facts
        write_scores(self.scores_path, found)
        self._save(model=str(model_source), corpus=corpus.source, score=asked)
        return found, False

    def make_plan(self, plan_made: Plan) -> Path:
        """Stores a plan made for this run's scores."""
        _write_text(self.plan_path, json.dumps(plan_made.to_dict()) + "\n")
        self._save(
            plan={
                name: getattr(plan_made, name)
                for name in ("score", "preset", "keep", "of", "seed", "floor", "model_hash")
            }
        )
        return self.plan_path

    def prune(
        self, *, repair: str = "mean", plan_file: Path | None = None, model_source: str | None = None
    ) -> PreTrainedModel:
        """Prunes the scored model by the run's plan and stores the smaller one with its tokenizer.

        Raises:
            ValueError: There is no plan, or plan and model do not belong together.
        """
        scores = self.scores()
        chosen = read_plan(plan_file) if plan_file is not None else self.plan()
        source = model_source or self.state["model"]
        self.check_writable()
        model = load_model(source)
        small = prune(model, chosen, repair=repair, scores=scores)
        tokenizer = load_tokenizer(source)
        with _whole(self.model_path) as partial, quiet_transformers():
            small.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        self._save(prune={"repair": repair, "plan_model_hash": chosen.model_hash})
        return small

    def add_results(self, results: list[dict[str, Any]]) -> Path:
        """Stores measured models, with the keys of `obce.report.RESULT_KEYS` each; the report shows them."""
        _write_text(self.results_path, json.dumps(results, indent=1) + "\n")
        return self.results_path

    def report(self) -> Path:
        """Renders the run's page from what the run holds.

        Raises:
            ValueError: The run has no scores.
        """
        scores = self.scores()
        chosen = self.plan() if self.plan_path.is_file() else None
        results = _read_json(self.results_path, "results") if self.results_path.is_file() else []
        if not isinstance(results, list):
            raise ValueError(f"'{self.results_path}' holds no list of results: remove it, or measure again")
        name = "/".join(Path(str(scores.meta["model_name"])).parts[-2:])
        html = render_html(scores, chosen, results, title=f"obce report: {name}")
        self.check_writable()
        _write_text(self.report_path, html)
        return self.report_path
