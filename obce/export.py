"""Pruned model -> forms that open without obce: with its code beside it, as ONNX, or dense again with zeros.

Each function writes into a directory that exists. None of them names a family: what is stock is found among the bases
of the pruned model's own classes, and where its neurons go in the layout of `obce.sites`.
"""

from __future__ import annotations

import copy
import inspect
import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from obce.capture import check_padding, eval_mode
from obce.checkpoint_obce import inside, read_json
from obce.modeling_obce import ObceRows, parts_of
from obce.modeling_obce_mapped import pooling_of
from obce.sites import (
    PER_HEAD,
    Site,
    base_model,
    find_sites,
    layers_of,
    layout_of,
    mapped_sites,
    matrix,
    picture_shape,
    quiet_transformers,
    transposed,
    usable_positions,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from obce.plan import Plan

WAYS = ("remote-code", "onnx", "dense", "sentence-transformers")

TOLERANCE = 1e-5
"""Greatest difference of ONNX and dense exports from the pruned model, as a share of its largest output, if that is
above 1; in float32."""

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

# A protobuf ends at 2 GiB; weights beyond this go into a file beside the graph.
_ONNX_BYTES = 1_900_000_000

# Batch and length of the texts that exports are tried on; the first is what the graph is traced with.
_TRIED = ((2, 9), (1, 1), (3, 17))


# ---- with its code ---------------------------------------------------------------------------------------------------


def remote_code(model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Saves a pruned model with the code of its classes, for `from_pretrained(..., trust_remote_code=True)`.

    The config names a class for every Auto class that obce registers for the family, so a model with a head opens as a
    bare encoder, too, as with transformers' own models.

    Args:
        model: A model that obce has pruned.
        folder: Existing directory.
        tokenizer: Saved beside it.

    Raises:
        ValueError: The model was not pruned by obce.
    """
    from transformers.dynamic_module_utils import custom_object_save

    _check_pruned(model)
    with quiet_transformers():
        model.save_pretrained(folder)
        custom_object_save(model, folder)
        custom_object_save(model.config, folder)
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.auto_map = _auto_map(model)
        config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def auto_classes_of(model: PreTrainedModel) -> dict[str, type[Any]]:
    """Auto classes of transformers that know the model's family -> the class that each gives."""
    import transformers

    found: dict[str, type[Any]] = {}
    for name in sorted(dir(transformers)):
        if name.startswith("AutoModel"):
            mapping = getattr(getattr(transformers, name), "_model_mapping", None)
            if mapping is not None and type(model.config) in mapping:
                known = mapping[type(model.config)]
                found[name] = known[0] if isinstance(known, (tuple, list)) else known
    return found


def auto_class_of(model: PreTrainedModel) -> str:
    """The Auto class that gives the model with its head."""
    own = type(model)
    return next((name for name, known in auto_classes_of(model).items() if issubclass(own, known)), "AutoModel")


def _auto_map(model: PreTrainedModel) -> dict[str, str]:
    def place(known: type[Any]) -> str:
        return f"{known.__module__.rpartition('.')[2]}.{known.__name__}"

    return {"AutoConfig": place(type(model.config))} | {
        name: place(known) for name, known in auto_classes_of(model).items()
    }


def _check_pruned(model: PreTrainedModel) -> None:
    if not str(model.config.model_type).startswith("obce_"):
        raise ValueError(
            f"model is a {type(model).__name__}, expected one that obce has pruned: a dense model opens without "
            "obce as it is"
        )


# ---- sentence-transformers -------------------------------------------------------------------------------------------


def sentence_transformers(
    model: PreTrainedModel,
    folder: str | Path,
    base: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[str]:
    """Saves a pruned encoder as a directory of sentence-transformers, with its code and the dense model's pooling.

    Args:
        model: A model that obce has pruned.
        folder: Existing directory.
        base: Directory of sentence-transformers that the dense model was loaded from.
        tokenizer: Saved beside it.

    Returns:
        The files that were carried over from `base`.

    Raises:
        ValueError: The model was not pruned by obce, or the base directory is none of sentence-transformers.
    """
    files = pooling_files(base)
    remote_code(model, folder, tokenizer)
    carry_pooling(base, folder)
    return files


def pooling_files(base: str | Path) -> list[str]:
    """Files of a sentence-transformers directory that say what happens to token vectors, relative to it.

    Raises:
        ValueError: There are none, they lie outside of the directory, hold pickled weights, or need code that is not
            sentence-transformers' own.
    """
    base = Path(base)
    stated = base / "modules.json"
    if not stated.is_file():
        raise ValueError(f"'{base}' has no modules.json, expected a directory of sentence-transformers")
    modules = read_json(stated)
    if not isinstance(modules, list) or not modules or not all(isinstance(module, dict) for module in modules):
        raise ValueError(f"'{stated}' is not a list of modules, expected what sentence-transformers writes")
    found = ["modules.json"]
    found += [p.name for p in sorted(base.glob("sentence_*_config.json"))]
    found += [name for name in ("config_sentence_transformers.json",) if (base / name).is_file()]
    for position, module in enumerate(modules):
        place, kind = module.get("path"), str(module.get("type"))
        if not kind.startswith("sentence_transformers."):
            raise ValueError(f"'{stated}' has a module of type {kind[:80]!r}, which is not of sentence-transformers")
        if position == 0:
            if place != "":
                raise ValueError(f"'{stated}' keeps its encoder in {place!r}, expected the directory itself ('')")
            continue
        if not inside(place):
            raise ValueError(f"'{stated}' names the folder {str(place)[:80]!r}, expected one inside '{base}'")
        here = sorted(path for path in (base / str(place)).glob("*") if path.is_file())
        pickled = [path for path in here if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
        if pickled and not any(path.suffix == ".safetensors" for path in here):
            raise ValueError(
                f"'{pickled[0]}' is not safetensors: save the model again with sentence-transformers first"
            )
        found += [f"{place}/{path.name}" for path in here if path.suffix in (".json", ".safetensors", ".txt")]
    return found


def carry_pooling(base: str | Path, folder: str | Path) -> None:
    """Copies what `pooling_files` finds; raises as it does."""
    for name in pooling_files(base):
        target = Path(folder) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(base) / name, target)


# ---- dense again -----------------------------------------------------------------------------------------------------


def dense(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    plan: Plan | None = None,
) -> tuple[PreTrainedModel, float]:
    """Saves the zero-filled dense model, which transformers opens without obce: as large and as slow as the first.

    Args:
        model, plan: As for `to_dense`.
        folder: Existing directory.
        tokenizer: Saved beside it.

    Returns:
        The saved model, and the greatest difference between the two models' outputs on some random tokens.

    Raises:
        ValueError: As `to_dense`, or a decoder's classifier has no `pad_token_id`.
        RuntimeError: In full precision its outputs are not those of the model.
    """
    check_padding(model)
    filled = to_dense(model, plan)
    with quiet_transformers():
        filled.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    found = 0.0
    for batch, length in _TRIED:
        inputs = example(model, batch, length, _input_names(model, tokenizer))
        found = max(found, _difference(_answers(model, inputs), _answers(filled, inputs)))
    if model.dtype in (torch.float32, torch.float64):  # sums in half precision round by more
        _check_difference(found, model, _input_names(model, tokenizer), "zero-filled form")
    return filled, found


@torch.no_grad()
def to_dense(model: PreTrainedModel, plan: Plan | None = None) -> PreTrainedModel:
    """A pruned model as its family's own class of transformers, zeros where neurons were removed.

    Removed query and key neurons give zeros to the attention product, removed value and intermediate neurons meet zero
    columns of their reader, and constants of removed rows stand in the bias, so the outputs are those of the pruned
    model up to the rounding of longer sums. Layers that were dropped are not there: behind every layer of most families
    stands a LayerNorm, so no layer of zeros hands on what it is given. A family whose config says whether its Linears
    have biases is given them, zero where the pruned model has none.

    Args:
        model: A model that obce has pruned.
        plan: The plan that it was pruned by: neurons return to their places. Without it the neurons of a head come
            first in their head, and the heads that stay come first.

    Returns:
        A model of transformers with the same head, on the CPU, in the same dtype, in eval mode.

    Raises:
        ValueError: The model was not pruned by obce, the plan keeps other numbers of neurons, or the family's own class
            cannot hold the model.
    """
    _check_pruned(model)
    config = _stock_config(model)
    stock, parts = _stock_class(model), parts_of(model)
    if layout_of(model).site_map is not None:
        parts = pooling_of(stock, getattr(base_model(model), "pooler", None) is not None)
    with torch.device("meta"):
        filled: PreTrainedModel = stock(config, **parts)
    rows, columns = _places(model, filled, plan)
    body, small = base_model(filled), dict(model.named_modules(remove_duplicate=False))
    inner = dict(base_model(model).named_modules())
    names = {id(module): name for name, module in body.named_modules()}
    made: dict[int, nn.Parameter] = {}
    for name, module in filled.named_modules(remove_duplicate=False):
        site = names.get(id(module))
        if site in rows:
            weight, bias = _spread(inner.get(site), module, rows[site], columns.get(site), model.dtype)
            module.weight = nn.Parameter(weight.T.contiguous() if transposed(module) else weight)
            if module.bias is not None:
                module.bias = nn.Parameter(bias)
            elif bool(bias.any()):
                raise ValueError(
                    f"model is a {type(model).__name__}, whose {site} has a bias, and that of transformers' "
                    f"{type(filled).__name__} has none, so it has no dense form; export it in another way, or prune it "
                    "with repair='none'."
                )
            continue
        own = small.get(name)
        for key, _ in list(module.named_parameters(recurse=False)):
            old = getattr(own, key)
            made.setdefault(id(old), nn.Parameter(old.detach().cpu().clone(), requires_grad=old.requires_grad))
            setattr(module, key, made[id(old)])
        for key, _ in list(module.named_buffers(recurse=False)):
            setattr(module, key, getattr(own, key).detach().cpu().clone())
    torch.nn.Module.eval(filled)
    return filled


def _stock(known: type[Any]) -> Any:
    """The class of transformers that a class of ours stands on."""
    return next(one for one in known.__mro__ if one.__module__.startswith("transformers.models."))


def _stock_class(model: PreTrainedModel) -> Any:
    """The class of transformers that holds the zero-filled model."""
    import transformers

    found, config = _stock(type(model)), type(model.config)
    family = config.stock_family  # type: ignore[attr-defined]
    if family is None:
        return found
    own, other = (one.__name__.removesuffix("Config") for one in (_stock(config), _config_of(family)))
    return getattr(transformers, other + found.__name__.removeprefix(own))


def _config_of(family: str) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[family]


def _stock_config(model: PreTrainedModel) -> Any:
    config: Any = model.config
    settings = config.stock(config.to_dict())
    # what names the pruned classes, or is written anew on saving
    gone = ("model_type", "architectures", "transformers_version", "auto_map", "per_layer_config")
    for key in (*gone, "_name_or_path", "name_or_path", "is_heterogeneous"):
        settings.pop(key, None)
    settings["obce"] = {**(settings.get("obce") or {}), "zero_filled": True}
    attention = config._attn_implementation
    if attention in ("eager", "sdpa"):
        settings["attn_implementation"] = attention
    known = _stock(type(config)) if config.stock_family is None else _config_of(config.stock_family)
    return known(**settings)


def _places(
    model: PreTrainedModel, filled: PreTrainedModel, plan: Plan | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Name of each Linear that lost something -> the rows, and the columns, where its numbers go; int64."""
    small = base_model(model)
    known: Any = model.config
    widths = known.layer_widths()
    rows: dict[str, torch.Tensor] = {}
    columns: dict[str, torch.Tensor] = {}
    layout = layout_of(model)
    if layout.site_map is not None:
        return _mapped_places(model, filled, plan)
    rotary = layout_of(filled).rotary
    for site in find_sites(filled):
        here = widths[site.layer]
        if site.kind in ("attention_output", "output"):
            linear = small.get_submodule(site.writer)
            kept = linear.kept if isinstance(linear, ObceRows) else torch.arange(site.width)
            rows[site.writer] = torch.arange(0) if kept is None else kept.cpu()
            continue
        of_key = site.groups if site.kind == "key" else 1
        width = here.query_key // of_key if site.kind in ("query", "key") else here.value
        width = here.intermediate if site.kind == "intermediate" else width
        if plan is not None:
            places = _planned_places(site, width, plan)
        elif rotary and site.kind in ("query", "key"):
            holder = small.get_submodule(site.writer.rpartition(".")[0])
            places = _turned_places(site, width, here.heads, getattr(holder, "pairs", None))
        else:
            places = _first_places(site, width, here.heads // site.groups)
        for writer in site.writers:
            rows[writer] = torch.cat([rows.get(writer, torch.arange(0)), site.rows(places)])
        if site.reader is not None:
            columns[site.reader] = site.read_by(places)
    if len(widths) != len(layers_of(filled)):
        raise ValueError(f"model has {len(widths)} layers by its config, but {len(layers_of(filled))} of them")
    return rows, columns


def _mapped_places(
    model: PreTrainedModel, filled: PreTrainedModel, plan: Plan | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """As `_places`, of a family that a site map describes: what attention sees has its places in the model."""
    small: Any = base_model(model)
    dense: Any = base_model(filled)
    widths = small.config.layer_widths()
    rows: dict[str, torch.Tensor] = {}
    columns: dict[str, torch.Tensor] = {}
    for site in mapped_sites(filled, layout_of(model)):
        linear = small.get_submodule(site.writer)
        if site.kind in PER_HEAD:
            places = getattr(linear, "places", torch.arange(linear.out_features)).cpu()
            rows[site.writer] = places
        elif site.reader is not None:
            width = widths[site.layer].intermediate
            places = torch.arange(width) if plan is None else _planned_places(site, width, plan)
            stays = torch.ones(site.width, dtype=torch.bool)
            stays[places] = False
            of_linear = torch.ones(dense.get_submodule(site.writer).out_features, dtype=torch.bool)
            of_linear[site.rows(torch.nonzero(stays).flatten())] = False
            rows |= dict.fromkeys(site.writers, torch.nonzero(of_linear).flatten())
            columns[site.reader] = places
        else:
            kept = getattr(linear, "kept", torch.arange(site.width))
            rows[site.writer] = torch.arange(0) if kept is None else kept.cpu()
            taken = getattr(linear, "columns", None)
            if taken is not None:
                columns[site.writer] = taken.cpu()
    return rows, columns


def _first_places(site: Site, width: int, heads: int) -> torch.Tensor:
    if site.kind not in PER_HEAD:
        return torch.arange(width)
    if not heads:
        return torch.arange(0)
    within = torch.arange(width // heads)
    return (torch.arange(heads)[:, None] * (site.width // site.heads) + within).flatten()


def _turned_places(site: Site, width: int, heads: int, pairs: Any) -> torch.Tensor:
    """As `_first_places`, inside a head by the pairs [heads, pairs] that are left: a place there is an angle."""
    if pairs is None:
        return _first_places(site, width, heads)
    size = site.width // site.heads
    within = torch.cat([pairs.cpu(), pairs.cpu() + size // 2], dim=1)
    return (torch.arange(heads)[:, None] * size + within).flatten()


def _planned_places(site: Site, width: int, plan: Plan) -> torch.Tensor:
    layers = [i for i in range(int(plan.architecture["num_hidden_layers"])) if i not in plan.layers_dropped]
    name = f"{layers[site.layer]}.{site.kind}" if site.layer < len(layers) else ""
    places = torch.tensor(plan.kept.get(name, range(site.width)), dtype=torch.int64)
    if not name or len(places) != width or (width and int(places.max()) >= site.width):
        raise ValueError(
            f"plan keeps {len(places)} neurons of {name or site.name!r}, but the model has {width} there: give the "
            "plan that the model was pruned by, or none"
        )
    return places


def _spread(
    own: nn.Module | None, module: nn.Module, rows: torch.Tensor, columns: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [out, in] and bias [out] of a dense Linear, zero but where the narrow one has numbers."""
    shape = matrix(module).shape
    weight, bias = torch.zeros(shape, dtype=dtype), torch.zeros(shape[0], dtype=dtype)
    if own is None:  # of a layer without heads
        return weight, bias
    narrow, stated = getattr(own, "weight", None), getattr(own, "bias", None)
    if own is not None and narrow is not None:
        across = torch.arange(weight.shape[1]) if columns is None else columns
        weight[rows[:, None], across[None]] = matrix(own).detach().cpu()
    # a Linear that writes the residual stream has the constants of removed rows in its bias
    if stated is not None and len(stated) == len(bias):
        bias.copy_(stated.detach().cpu())
    elif stated is not None:
        bias[rows] = stated.detach().cpu()
    return weight, bias


# ---- ONNX ------------------------------------------------------------------------------------------------------------


def onnx(model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> float:
    """Saves the model as `model.onnx`, in float32, for batches and lengths of any size, with config and tokenizer.

    Inputs and outputs have the names that they have in transformers: `input_ids` and what else the tokenizer gives,
    int64 [batch, length] ([batch, choices, length] for multiple choice), or `pixel_values`, float32 [batch, channels,
    height, width]. The graph is tried in onnxruntime before
    it counts as made.

    Args:
        model: A pruned model, or a dense one.
        folder: Existing directory.
        tokenizer: Saved beside it.

    Returns:
        Greatest difference between onnxruntime's and torch's outputs on some random tokens.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: A decoder's classifier has no `pad_token_id`.
        RuntimeError: The graph's outputs are not those of the model.
    """
    check_padding(model)
    missing = [name for name in _ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"export to ONNX needs the packages {', '.join(_ONNX_PACKAGES)}, of which {', '.join(missing)} cannot be "
            "imported: pip install 'obce[onnx]'"
        )
    wide = copy.deepcopy(model).to(device="cpu", dtype=torch.float32).eval()  # type: ignore[call-arg]
    config = copy.deepcopy(wide.config)
    wide.config.use_cache = False  # a graph takes whole texts
    names = _input_names(wide, tokenizer)
    inputs = example(wide, *_TRIED[0], names)
    outputs = list(_named_answers(wide, inputs))
    axes = {name: torch.export.Dim(name, min=1) for name in ("batch", "choices")}
    axes["length"] = torch.export.Dim("length", min=1, max=usable_positions(wide))
    shape: tuple[str, ...] = ("batch", "choices", "length") if inputs[names[0]].ndim == 3 else ("batch", "length")
    if layout_of(wide).pictures:
        shape = ("batch",)
    path = Path(folder) / "model.onnx"
    large = sum(p.numel() * p.element_size() for p in wide.parameters()) > _ONNX_BYTES
    with _quiet_exporter():
        torch.onnx.export(
            wide,
            args=(),
            kwargs=inputs,
            f=path,
            input_names=names,
            output_names=outputs,
            dynamic_shapes={name: {i: axes[axis] for i, axis in enumerate(shape)} for name in names},
            dynamo=True,
            external_data=large,
            verbose=False,
        )
    found = _tried_in_onnxruntime(path, wide, names, outputs)
    _check_difference(found, wide, names, "ONNX graph")
    with quiet_transformers():
        config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return found


def _tried_in_onnxruntime(path: Path, model: PreTrainedModel, names: Sequence[str], outputs: Sequence[str]) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    taken = {one.name for one in session.get_inputs()}
    found = 0.0
    for batch, length in _TRIED:
        inputs = example(model, batch, length, names)
        given = {name: tensor.numpy() for name, tensor in inputs.items() if name in taken}
        answers = [torch.from_numpy(array) for array in session.run(list(outputs), given)]
        found = max(found, _difference(_answers(model, inputs), answers))
    return found


def _check_difference(found: float, model: PreTrainedModel, names: Sequence[str], what: str) -> None:
    largest = max(float(one.abs().max()) for one in _answers(model, example(model, *_TRIED[0], names)))
    if not found <= TOLERANCE * max(1.0, largest):
        raise RuntimeError(f"the {what} of {type(model).__name__} differs from it by {found:.2g}: report this")


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Holds back what the exporter says about packages that are not there; its errors are raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ---- trying a model out ----------------------------------------------------------------------------------------------


def example(model: PreTrainedModel, batch: int, length: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Random tokens with some padding, int64 [batch, length], or [batch, 2, length] for multiple choice.

    Of a model that reads pictures, random numbers, float32 [batch, channels, height, width].

    Args:
        model: Whose vocabulary the tokens are of.
        batch, length: Shape.
        names: Inputs that are wanted, of `input_ids`, `attention_mask` and `token_type_ids`, or `pixel_values` alone.
    """
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    if layout_of(model).pictures:
        return {"pixel_values": torch.randn(batch, *picture_shape(model), generator=generator)}
    choices = (2,) if type(model).__name__.endswith("MultipleChoice") else ()
    shape = (batch, *choices, length)
    # tokens from the second half of the vocabulary: those that stand for padding and the like come first
    size = int(model.config.vocab_size)
    ids = torch.randint(size // 2, size, shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.int64)
    mask[-1, ..., max(1, length - 2) :] = 0
    padding = getattr(model.config, "pad_token_id", None) or 0
    kinds = {
        "input_ids": torch.where(mask.bool(), ids, padding),
        "attention_mask": mask,
        "token_type_ids": torch.zeros(shape, dtype=torch.int64),
    }
    return {name: kinds[name] for name in names}


def _input_names(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """What the tokenizer gives and the model takes."""
    if layout_of(model).pictures:
        return ["pixel_values"]
    types = ["token_type_ids"] if getattr(model.config, "type_vocab_size", 0) else []
    given = ["input_ids", "attention_mask", *types] if tokenizer is None else list(tokenizer.model_input_names)
    taken = inspect.signature(model.forward).parameters
    return [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in given and name in taken]


@torch.no_grad()
def _named_answers(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with eval_mode(model):
        found: Mapping[str, Any] = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
    return {name: value.cpu() for name, value in found.items() if isinstance(value, torch.Tensor)}


def _answers(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    return list(_named_answers(model, inputs).values())


def _difference(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True))
