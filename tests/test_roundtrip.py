"""Saved and loaded again: every head, in a new process, through transformers' Auto classes, bit by bit."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from obce.configuration_obce import LayerWidths, ObceBertConfig
from obce.plan import Plan, Size
from obce.prune import prune
from obce.sites import architecture, model_hash
from safetensors import safe_open

from tiny import BERT_HEADS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from transformers import BertModel, PreTrainedTokenizerBase

ROOT = Path(__file__).parents[1]

# query_key, value, intermediate, heads, rows of attention_output and of output
WIDTHS = [LayerWidths(8, 16, 33, 4, 32, 32), LayerWidths(4, 4, 1, 4, 32, 32), LayerWidths(32, 12, 64, 4, 32, 32)]
EVERY_UNIT = [LayerWidths(2, 6, 33, 2, 5, 32), LayerWidths(0, 0, 64, 0, 32, 7), LayerWidths(24, 3, 1, 3, 32, 1)]


def run(code: str, *arguments: str) -> str:
    """Output of a new interpreter that has the checkout on its path."""
    environment = {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "PATH": "",
        "TOKENIZERS_PARALLELISM": "false",
        # products split among another number of threads may round differently
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def kept_indices(layers: Iterable[tuple[int, LayerWidths]]) -> dict[str, tuple[int, ...]]:
    """The last heads, and of each head and site the last neurons."""
    kept = {}
    for layer, widths in layers:
        for kind, width in (("query", widths.query_key), ("key", widths.query_key), ("value", widths.value)):
            per_head = width // max(1, widths.heads)
            heads = range(4 - widths.heads, 4)
            kept[f"{layer}.{kind}"] = tuple(8 * head + i for head in heads for i in range(8 - per_head, 8))
        kept[f"{layer}.intermediate"] = tuple(range(64 - widths.intermediate, 64))
        kept[f"{layer}.attention_output"] = tuple(range(32 - widths.attention_output, 32))
        kept[f"{layer}.output"] = tuple(range(32 - widths.output, 32))
    return kept


def small_of(body: BertModel, name: str, widths: Sequence[LayerWidths] = WIDTHS, dropped: tuple[int, ...] = ()) -> Any:
    """`widths` are those of the layers that stay."""
    torch.manual_seed(11)
    model = body if name == "BertModel" else getattr(transformers, name)(body.config).eval()
    size = Size(parameters=1, encoder=1, flops=1, bytes=1)
    plan = Plan(
        model_hash=model_hash(model),
        architecture=architecture(model),
        corpus_hash="c0",
        score="rf",
        preset="obce-2023",
        keep=None,
        of="total",
        seed=0,
        floor=0.1,
        levels={},
        kept=kept_indices(zip((i for i in range(3) if i not in dropped), widths, strict=True)),
        before=size,
        after=size,
        layers_dropped=dropped,
    )
    return prune(model, plan, repair="none")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(5, 5 + 24).reshape(2, 12)


LOAD_ALL = """
import sys
first, second, root = sys.argv[1:4]
__import__(first), __import__(second)
import numpy as np, torch, transformers
ids = torch.from_numpy(np.load(root + "/ids.npy"))
for auto in sys.argv[4:]:
    model = getattr(transformers, auto).from_pretrained(root + "/" + auto)
    assert type(model).__module__ == "obce.modeling_obce", type(model)
    assert not model.training
    x = ids[:, None] if "MultipleChoice" in auto else ids
    with torch.no_grad():
        found = model(x, token_type_ids=torch.zeros_like(x)).to_tuple()
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    np.savez(root + "/" + auto + ".npz", *[t.numpy() for t in found], **weights)
    if auto in ("AutoModelForMaskedLM", "AutoModelForPreTraining"):
        assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
print(type(transformers.AutoTokenizer.from_pretrained(root + "/AutoModel")).__name__)
print(transformers.AutoConfig.from_pretrained(root + "/AutoModel").obce["preset"])
"""


@pytest.mark.parametrize(
    ("order", "widths"),
    [
        (("obce", "transformers.models.bert.configuration_bert"), ()),
        (("transformers", "obce"), ()),
        (("transformers", "obce"), (EVERY_UNIT,)),
    ],
    ids=["obce-first", "transformers-first", "every-unit"],
)
def test_a_new_process_loads_the_same_model(
    tiny_bert: BertModel,
    tiny_tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    tmp_path: Path,
    order: tuple[str, str],
    widths: tuple[Any, ...],
) -> None:
    np.save(tmp_path / "ids.npy", ids.numpy())
    heads = BERT_HEADS if order[0] == "obce" else dict(list(BERT_HEADS.items())[:3])
    outputs, weights = {}, {}
    for auto, name in heads.items():
        small = small_of(tiny_bert, name, *widths)
        x = ids[:, None] if "MultipleChoice" in auto else ids
        with torch.no_grad():
            outputs[auto] = [t.numpy() for t in small(x, token_type_ids=torch.zeros_like(x)).to_tuple()]
        weights[auto] = {name: tensor.numpy() for name, tensor in small.state_dict().items()}
        small.save_pretrained(tmp_path / auto)
        assert sorted(p.name for p in (tmp_path / auto).iterdir()) == ["config.json", "model.safetensors"]
    tiny_tokenizer.save_pretrained(tmp_path / "AutoModel")
    lines = run(LOAD_ALL, *order, str(tmp_path), *heads).split()
    assert "Bert" in lines[0]
    assert lines[1] == "obce-2023"
    for auto in heads:
        with np.load(tmp_path / f"{auto}.npz") as found:
            positional = [found[name] for name in found.files if name.startswith("arr_")]
            assert set(found.files) - set(weights[auto]) == {f"arr_{i}" for i in range(len(outputs[auto]))}
            for name, array in weights[auto].items():
                np.testing.assert_array_equal(found[name], array, err_msg=f"{auto} {name}")
            for got, array in zip(positional, outputs[auto], strict=True):
                np.testing.assert_array_equal(got, array, err_msg=auto)


def test_the_file_holds_the_narrow_tensors(tiny_bert: BertModel, tmp_path: Path) -> None:
    small_of(tiny_bert, "BertModel").save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for layer, (query_key, value, inner, *_) in enumerate(WIDTHS):
        prefix = f"encoder.layer.{layer}."
        assert shapes[prefix + "attention.self.query.weight"] == (query_key, 32)
        assert shapes[prefix + "attention.self.key.weight"] == (query_key, 32)
        assert shapes[prefix + "attention.self.value.weight"] == (value, 32)
        assert shapes[prefix + "attention.output.dense.weight"] == (32, value)
        assert shapes[prefix + "intermediate.dense.weight"] == (inner, 32)
        assert shapes[prefix + "output.dense.weight"] == (32, inner)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "obce_bert"
    assert config["architectures"] == ["ObceBertModel"]
    assert (config["hidden_size"], config["intermediate_size"]) == (32, 64)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropped", [(), (1,)])
def test_heads_rows_and_layers(
    tiny_bert: BertModel,
    tmp_path: Path,
    ids: torch.Tensor,
    dropped: tuple[int, ...],
    dtype: torch.dtype,
    attention: str,
) -> None:
    widths = EVERY_UNIT[: 3 - len(dropped)]
    small = small_of(tiny_bert, "BertForMaskedLM", widths, dropped).to(dtype)
    small.set_attn_implementation(attention)
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation=attention)
    assert type(again) is type(small)
    assert again.config.layer_widths() == widths
    assert (again.config.num_hidden_layers, again.config.num_attention_heads) == (len(widths), 4)
    first, second = small.state_dict(), again.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {tensor.dtype for name, tensor in second.items()} == {dtype, torch.int64}
    with torch.no_grad():
        assert torch.equal(small(ids).logits, again(ids).logits)
    layers = second.keys() & {f"bert.encoder.layer.{i}.attention.output.dense.bias" for i in range(4)}
    assert len(layers) == len(widths)
    assert second["bert.encoder.layer.0.attention.output.dense.kept"].tolist() == [27, 28, 29, 30, 31]
    assert not any(name.startswith("bert.encoder.layer.1.attention.self.") for name in second)


def test_a_new_model_of_such_widths(ids: torch.Tensor) -> None:
    """From the config alone the first rows are those computed, and the weights are drawn as BERT's."""
    config = ObceBertConfig(
        **{**TestConfiguration.SIZES, "vocab_size": 99},
        per_layer_config={0: TestConfiguration.LAYER, 1: TestConfiguration.BARE},
    )
    model = transformers.AutoModel.from_config(config)
    assert torch.isfinite(model(ids).last_hidden_state).all()
    rows = model.encoder.layer[1].output.dense
    assert rows.kept.tolist() == list(range(9))
    assert 0.01 < float(rows.weight.std()) < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny_bert: BertModel, tmp_path: Path, ids: torch.Tensor, dtype: torch.dtype) -> None:
    small_of(tiny_bert, "BertForSequenceClassification").save_pretrained(tmp_path / "full")
    half = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "full", dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    half.save_pretrained(tmp_path / "half")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "half")
    assert {p.dtype for p in again.parameters()} == {dtype}
    with torch.no_grad():
        assert torch.equal(half(ids).logits, again(ids).logits)


def test_a_body_gets_a_new_head_and_a_head_gives_its_body(tiny_bert: BertModel, tmp_path: Path) -> None:
    """As with BERT: a bare encoder is fine-tuned under a new head, and an encoder is taken out of a task model."""
    small = small_of(tiny_bert, "BertModel")
    small.save_pretrained(tmp_path / "body")
    task = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "body", num_labels=5)
    assert task.classifier.out_features == 5
    assert model_hash(task) == model_hash(small)
    task.save_pretrained(tmp_path / "task")
    assert model_hash(transformers.AutoModel.from_pretrained(tmp_path / "task")) == model_hash(small)


def test_attention_can_be_chosen_on_loading(tiny_bert: BertModel, tmp_path: Path, ids: torch.Tensor) -> None:
    small_of(tiny_bert, "BertModel").save_pretrained(tmp_path)
    found = {}
    for attention in ("eager", "sdpa"):
        model = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation=attention)
        assert model.config._attn_implementation == attention
        with torch.no_grad():
            found[attention] = model(ids).last_hidden_state
    torch.testing.assert_close(found["eager"], found["sdpa"], rtol=0, atol=1e-5)


def test_a_vocabulary_alone_is_enough_for_the_tokenizer(
    tiny_bert: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    small_of(tiny_bert, "BertModel").save_pretrained(tmp_path)
    words = sorted(tiny_tokenizer.get_vocab().items(), key=lambda item: item[1])
    (tmp_path / "vocab.txt").write_text("\n".join(word for word, _ in words) + "\n")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "The river was old."
    assert found(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]


class TestImports:
    """`import obce` announces the classes without importing what they need."""

    def test_nothing_heavy_is_imported(self) -> None:
        code = "import obce, sys; print(*{m.split('.')[0] for m in sys.modules})"
        assert {"torch", "transformers", "numpy"}.isdisjoint(run(code).split())

    def test_a_model_imported_first(self) -> None:
        """transformers imports its Auto classes in the middle of importing BERT, which ours derive from."""
        code = """
import obce
import transformers.models.bert.modeling_bert
import transformers
config = transformers.AutoConfig.for_model("obce_bert", num_hidden_layers=1, vocab_size=9)
print(type(transformers.AutoModel.from_config(config)).__name__)
"""
        assert run(code).split() == ["ObceBertModel"]

    def test_the_finder_leaves_no_trace(self) -> None:
        code = """
import sys, importlib, importlib.util
before = list(sys.meta_path)
import obce
from obce import auto_classes
auto_classes.install()
added = [f for f in sys.meta_path if f not in before]
assert len(added) == 1, added
name = "transformers.models.auto.configuration_auto"
spec = importlib.util.find_spec(name)
assert spec.name == name and spec.origin.endswith("configuration_auto.py")
assert spec.loader.get_code(name).co_filename == spec.origin
assert spec.loader.get_source(name).startswith("#")
assert importlib.util.find_spec("transformers.models.auto.no_such_module") is None
plain = importlib.import_module("transformers.models.roberta.modeling_roberta")
auto = sys.modules[name]
assert type(auto.__loader__) is type(auto.__spec__.loader) is type(plain.__loader__)
import obce.modeling_obce
assert added[0] not in sys.meta_path
for _ in range(2):
    auto_classes.install()
    assert added[0] not in sys.meta_path
    assert auto.CONFIG_MAPPING["obce_bert"] is obce.modeling_obce.ObceBertConfig
importlib.reload(auto)
assert "obce_bert" not in auto.CONFIG_MAPPING
auto_classes.install()
assert auto.CONFIG_MAPPING["obce_bert"] is obce.modeling_obce.ObceBertConfig
"""
        run(code)

    def test_without_transformers(self) -> None:
        code = """
import sys
sys.modules["transformers"] = None
import obce
try:
    import transformers
except ImportError as error:
    print("absent", obce.__version__)
"""
        assert run(code).startswith("absent")

    def test_an_unknown_transformers_is_warned_about_and_not_broken(self) -> None:
        code = """
import types, warnings
from obce import auto_classes
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    auto_classes._enter_placeholders(types.ModuleType("configuration_auto"))
print(*[str(w.message) for w in found])
"""
        assert "install transformers >= 5.14, < 6" in run(code)

    def test_the_model_files_import_nothing_of_obce(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Copied into another package they work where there is no obce: so a checkpoint can carry them."""
        package = tmp_path / "carried"
        package.mkdir()
        (package / "__init__.py").write_text("")
        for name in ("checkpoint_obce.py", "configuration_obce.py", "modeling_obce.py"):
            (package / name).write_text((ROOT / "obce" / name).read_text())
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(sys.modules, "obce", None)
        carried = importlib.import_module("carried.modeling_obce")
        model = carried.ObceBertForMaskedLM(carried.ObceBertConfig(num_hidden_layers=1, vocab_size=9))
        assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 9)


class TestConfiguration:
    SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}  # noqa: RUF012
    LAYER = {  # noqa: RUF012
        "kept_query_key_size": 8,
        "kept_value_size": 4,
        "kept_intermediate_size": 5,
        "kept_heads": 4,
        "kept_attention_output_size": 32,
        "kept_output_size": 32,
    }
    BARE = {**LAYER, "kept_query_key_size": 0, "kept_value_size": 0, "kept_heads": 0, "kept_output_size": 9}  # noqa: RUF012

    def test_widths_survive_the_file(self, tmp_path: Path) -> None:
        layers = {0: self.LAYER, 1: {**self.LAYER, "kept_value_size": 32}}
        config = ObceBertConfig(**self.SIZES, per_layer_config=layers, obce={"score": "rf"})
        config.save_pretrained(tmp_path)
        again = ObceBertConfig.from_pretrained(tmp_path)
        assert (
            again.layer_widths()
            == config.layer_widths()
            == [
                LayerWidths(8, 4, 5, 4, 32, 32),
                LayerWidths(8, 32, 5, 4, 32, 32),
            ]
        )
        assert again.to_dict() == config.to_dict()
        assert (again.intermediate_size, again.hidden_size) == (64, 32)

    def test_no_entry_means_as_wide_as_the_dense_model(self) -> None:
        assert ObceBertConfig(**self.SIZES).layer_widths() == [LayerWidths(32, 32, 64, 4, 32, 32)] * 2

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"kept_value_size": 6}, "kept_value_size of layer 1 is 6, expected a multiple of 4 from 4 to 32"),
            ({"kept_query_key_size": 0}, "kept_query_key_size of layer 1 is 0, expected"),
            ({"kept_query_key_size": 36}, "is 36, expected a multiple of 4 from 4 to 32"),
            ({"kept_heads": 3}, "kept_query_key_size of layer 1 is 8, expected a multiple of 3 from 3 to 24"),
            ({"kept_heads": 0}, "kept_query_key_size of layer 1 is 8, expected a multiple of 1 from 0 to 0"),
            ({"kept_heads": 5}, "kept_heads of layer 1 is 5, expected a multiple of 1 from 0 to 4"),
            ({"kept_heads": None}, "kept_heads of layer 1 is None, expected"),
            ({"kept_attention_output_size": 33}, "kept_attention_output_size of layer 1 is 33, expected"),
            ({"kept_output_size": 0}, "kept_output_size of layer 1 is 0, expected a multiple of 1 from 1 to 32"),
            ({"kept_intermediate_size": 65}, "is 65, expected a multiple of 1 from 1 to 64"),
            ({"kept_intermediate_size": "5"}, "is '5', expected"),
            ({"kept_intermediate_size": True}, "is True, expected"),
            ({"intermediate_size": 5}, r"layer 1 has the keys \['intermediate_size', .*\], expected"),
        ],
    )
    def test_widths_are_checked(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ObceBertConfig(**self.SIZES, per_layer_config={0: self.LAYER, 1: {**self.LAYER, **change}})

    def test_layers_are_checked(self) -> None:
        with pytest.raises(ValueError, match=r"has the layers \[0\], expected each of 0 to 1 once"):
            ObceBertConfig(**self.SIZES, per_layer_config={0: self.LAYER})
        with pytest.raises(ValueError, match=r"has the layers \[0, 2\], expected each of 0 to 1 once"):
            ObceBertConfig(**self.SIZES, per_layer_config={0: self.LAYER, 2: self.LAYER})

    def test_what_bert_cannot_be(self) -> None:
        with pytest.raises(ValueError, match="expected False: a pruned model is an encoder only"):
            ObceBertConfig(**self.SIZES, is_decoder=True)
        with pytest.raises(ValueError, match="hidden_size is 30, expected a multiple of num_attention_heads = 4"):
            ObceBertConfig(**{**self.SIZES, "hidden_size": 30})
