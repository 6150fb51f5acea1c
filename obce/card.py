"""The model card of a pruned model: what it was made of and how, as far as it is known, in `README.md`'s form."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obce import __version__
from obce.evaluate import count_parameters, weight_bytes
from obce.export import auto_class_of
from obce.sites import layout_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from obce.plan import Plan
    from obce.scores import Scores

# Of a base's card: what holds for whatever is made of it.
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")

_OBCE_CODE = """import obce
from transformers import {auto}, {reader}

model = {auto}.from_pretrained("DIRECTORY")
{reading} = {reader}.from_pretrained("DIRECTORY")"""

_REMOTE_CODE = """from transformers import {auto}, {reader}

model = {auto}.from_pretrained("DIRECTORY", trust_remote_code=True)
{reading} = {reader}.from_pretrained("DIRECTORY", trust_remote_code=True)"""

_DENSE_CODE = """from transformers import {auto}, {reader}

model = {auto}.from_pretrained("DIRECTORY")
{reading} = {reader}.from_pretrained("DIRECTORY")"""

_ONNX_CODE = """import onnxruntime
from transformers import {reader}

session = onnxruntime.InferenceSession("DIRECTORY/model.onnx")
{reading} = {reader}.from_pretrained("DIRECTORY")
{given} = {call}
outputs = session.run(None, {{one.name: {given}[one.name] for one in session.get_inputs()}})"""

# What stands between a text, or a picture, and the model, in the code.
_OF_TEXTS = {
    "reader": "AutoTokenizer",
    "reading": "tokenizer",
    "given": "texts",
    "call": 'tokenizer(["A text."], padding=True, return_tensors="np")',
}
_OF_PICTURES = {
    "reader": "AutoImageProcessor",
    "reading": "processor",
    "given": "pictures",
    "call": 'processor(images=[image], return_tensors="np")',
}

_SENTENCES_CODE = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("DIRECTORY", trust_remote_code=True)
model.encode(["A text."])"""

# How a model was exported ("" for what `obce prune` writes) -> what to say, and the code.
_LOADING = {
    "": ("With obce installed; importing it makes the classes known to transformers.", _OBCE_CODE),
    "remote-code": (
        "Without obce: the code of its classes lies beside the weights, and runs when you say that you trust it.",
        _REMOTE_CODE,
    ),
    "onnx": ("With onnxruntime, for batches and lengths of any size, in float32.", _ONNX_CODE),
    "dense": ("With transformers alone.", _DENSE_CODE),
    "sentence-transformers": (
        "With sentence-transformers; the code of its classes lies beside the weights, and runs when you say that you "
        "trust it.",
        _SENTENCES_CODE,
    ),
}


@dataclass(frozen=True)
class Origin:
    """What is known of how a pruned model came to be, beside its own config.

    Attributes:
        base: Name of the dense model; a directory's last name, never a path.
        hub: Its name on the hub, where it has one.
        stated: Front matter of the dense model's card.
        plan: The plan.
        scores: The scores.
        results: Measured models, with the keys of `obce.report.RESULT_KEYS`.
        pooling: A sentence about the pooling of sentence-transformers, where the dense model has one.
    """

    base: str
    hub: str | None = None
    stated: Mapping[str, Any] = field(default_factory=dict)
    plan: Plan | None = None
    scores: Scores | None = None
    results: Sequence[Mapping[str, Any]] = ()
    pooling: str = ""


def name_of(source: str) -> str:
    """A model's name for people: of a directory the last part, or two where that is a plain `model`."""
    path = Path(source)
    if not path.is_dir():
        return source
    parts = [part for part in path.resolve().parts if part != path.anchor]
    return "/".join(parts[-2:] if parts[-1:] == ["model"] else parts[-1:])


def front_matter(source: str) -> dict[str, Any]:
    """YAML at the head of a model's card, from its directory or from what was fetched of the hub before; else {}."""
    from huggingface_hub import metadata_load, try_to_load_from_cache

    path: Any = Path(source) / "README.md"
    if not Path(source).is_dir():
        try:
            path = try_to_load_from_cache(source, "README.md")
        except ValueError:  # no name of the hub
            return {}
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        return {}
    try:
        found = metadata_load(path)
    # a card is prose by hand: one that does not parse says nothing, and is no reason to stop
    except Exception:
        return {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def render_card(model: PreTrainedModel, origin: Origin, way: str = "") -> str:
    """A model card in Markdown, headed by YAML that the hub reads.

    Args:
        model: The pruned model, or its zero-filled dense form.
        origin: How it came to be.
        way: How it is exported, of `obce.export.WAYS`; empty for what `obce prune` writes.

    Returns:
        Text of a README.md.
    """
    from huggingface_hub import ModelCard, ModelCardData

    config: Any = model.config
    made = _mapping(config.obce)
    carried = {key: origin.stated[key] for key in _CARRIED if origin.stated.get(key)}
    text, code = _LOADING[way]
    data = ModelCardData(
        base_model=origin.hub,
        library_name={"sentence-transformers": way, "onnx": None}.get(way, "transformers"),
        tags=["obce", "pruned", *([way] if way in ("sentence-transformers", "onnx") else [])],
        **carried,
    )
    template = files("obce.templates").joinpath("card.md.j2").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        data,
        template_str=template,
        title=f"{_plain(origin.base)}, pruned",
        base=f"`{_plain(origin.base)}`",
        zero_filled=way == "dense",
        sizes=_sizes(model, origin.plan, made, way),
        facts=_facts(made, origin),
        widths=_widths(model) if way != "dense" else [],
        load_text=text,
        load_code=code.format(auto=auto_class_of(model), **(_OF_PICTURES if layout_of(model).pictures else _OF_TEXTS)),
        pooling=_plain(origin.pooling),
        results=[_result(row) for row in origin.results],
        license=_license(carried),
    )
    return str(card).rstrip("\n") + "\n"


def sizes_of(plan: Plan) -> dict[str, dict[str, int]]:
    """Sizes of the dense and of the pruned model, for the pruned model's config."""
    return {"before": plan.before._asdict(), "after": plan.after._asdict()}


def _sizes(model: PreTrainedModel, plan: Plan | None, made: Mapping[str, Any], way: str) -> list[tuple[str, str, str]]:
    stated = sizes_of(plan) if plan is not None else _mapping(made.get("size"))
    before, after = _mapping(stated.get("before")), _mapping(stated.get("after"))
    total, encoder = count_parameters(model)
    # a zero-filled model computes what the dense one does
    after["flops"] = before.get("flops") if way == "dense" else after.get("flops")
    after |= {"parameters": total, "encoder": encoder, "bytes": weight_bytes(model)}
    words = {
        "parameters": "parameters",
        "encoder": "of these in the encoder",
        "flops": "FLOPs of a picture" if layout_of(model).pictures else "FLOPs of a text of 128 tokens",
        "bytes": "bytes of weights",
    }
    return [(word, _count(before.get(key)), _count(after.get(key))) for key, word in words.items()]


def _facts(made: Mapping[str, Any], origin: Origin) -> list[tuple[str, str]]:
    plan, scores = origin.plan, origin.scores
    meta: Mapping[str, Any] = {} if scores is None else scores.meta
    keep, dropped = made.get("keep"), made.get("layers_dropped")
    of = {"total": "all", "encoder": "the encoder's"}.get(str(made.get("of")), "the")
    asked = f"{keep:.4g} of {of} parameters" if isinstance(keep, float) else ""
    fitted = _mapping(made.get("least_squares"))
    found = [
        ("dense model", f"`{_plain(origin.base)}`"),
        ("hash of its weights (BLAKE2b)", f"`{_plain(made.get('model_hash'))}`"),
        ("hash of the texts that were scored", f"`{_plain(made.get('corpus_hash'))}`"),
        ("texts", _count(meta.get("n_texts")) if meta else ""),
        ("tokens", _count(meta.get("n_tokens")) if meta else ""),
        ("score", _plain(made.get("score"))),
        ("rank correlation of the score on two halves of the texts", _stability(scores, str(made.get("score")))),
        ("kept, as asked", asked),
        ("preset", _plain(made.get("preset") or "")),
        ("what could be removed", "" if plan is None else ", ".join(map(_plain, plan.units))),
        ("shares of the sites", "" if plan is None else _plain(plan.shares)),
        ("whole layers removed", ", ".join(map(_plain, dropped if isinstance(dropped, list) else []))),
        ("repair", _plain(made.get("repair"))),
        ("texts of the repair", _count(fitted.get("texts")) if fitted else ""),
        ("versions when scored", _versions(_mapping(meta.get("versions")))),
        ("versions when written", _versions(_own_versions())),
    ]
    return [(name, value) for name, value in found if value]


def _stability(scores: Scores | None, name: str) -> str:
    if scores is None or f"{name}_a" not in scores.columns:
        return ""
    return f"{scores.stability(name).spearman:.2f}"


def _own_versions() -> dict[str, str]:
    return {
        "obce": __version__,
        "python": sys.version.split()[0],
        **{name: version(name) for name in ("torch", "transformers")},
    }


def _versions(known: Mapping[str, Any]) -> str:
    return ", ".join(f"{_plain(name)} {_plain(number)}" for name, number in known.items())


def _widths(model: PreTrainedModel) -> list[list[str]]:
    known: Any = model.config
    return [
        [str(layer), *(f"{number:,}" for number in (w.query_key, w.value, w.heads, w.intermediate, *w[4:]))]
        for layer, w in enumerate(known.layer_widths())
    ]


def _result(row: Mapping[str, Any]) -> list[str]:
    def number(value: Any) -> str:
        return "" if not isinstance(value, (int, float)) else f"{value:.3f}"

    names = [_plain(row.get(key) or "") for key in ("name", "score", "repair")]
    return [*names, _count(row.get("parameters")), number(row.get("latency_ratio")), number(row.get("fidelity"))]


def _license(carried: Mapping[str, Any]) -> str:
    name = _plain(carried.get("license_name") or carried.get("license") or "")
    link = str(carried.get("license_link") or "")
    return f"[{name}]({link})" if name and re.fullmatch(r"https?://[^\s()<>]+", link) else name


def _mapping(value: Any) -> dict[str, Any]:
    """A copy; {} for what is none, as a config's notes may be after hands were on them."""
    return dict(value) if isinstance(value, Mapping) else {}


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else "not known"


def _plain(value: Any) -> str:
    """Text of one line that no Markdown table, code span, link or HTML can be broken with."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return re.sub(r"[`|<>\[\]]", "", text)[:200]
