"""Pruned models without obce: with their code, as ONNX, dense again, and for sentence-transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from obce import export
from obce.plan import Plan
from obce.prune import prune
from obce.run import Run, export_model, load_model, push
from obce.sites import base_model, find_sites, layout_of
from transformers import LlamaForSequenceClassification

from tiny import BERT_HEADS, classifier_of, make_encoder, make_plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import BertModel, PreTrainedTokenizerBase

# Other shapes of layer, config and attention.
FAMILIES = (
    *("roberta", "electra", "distilbert", "mpnet", "deberta-v2", "modernbert", "gpt2", "llama", "qwen2", "qwen3"),
    "vit",
)
INPUTS = ("input_ids", "attention_mask")


def plan_of(model: Any, *, heads: Sequence[int] = (1, 3), rows: bool = True, dropped: tuple[int, ...] = ()) -> Plan:
    """Two heads of four, unequal neurons in them, a layer without heads, rows of constants."""
    kept: dict[str, tuple[int, ...]] = {}
    last = model.config.num_hidden_layers - 1
    pairs = (1, 3, 5, 7) if layout_of(model).rotary else (1, 3, 6)
    whole = layout_of(model).whole
    for site in find_sites(model):
        size = site.width // site.heads
        left = () if rows and site.layer == last else heads
        left = range(site.heads) if whole else left
        if site.layer in dropped or site.kind in whole:
            continue
        if site.kind in ("query", "key"):
            kept[site.name] = tuple(h * size + i for h in left for i in pairs)
        elif site.kind == "value":
            kept[site.name] = tuple(h * size + i for h in left for i in (0, 2, 5, 7))
        elif site.kind == "intermediate":
            kept[site.name] = tuple(range(1 + site.layer, site.width, 3))
        elif rows and site.layer != 1:
            kept[site.name] = tuple(range(2, site.width, 2))
    return make_plan(model, kept, dropped, score="effect")


def headed(body: BertModel, name: str) -> Any:
    torch.manual_seed(11)
    return body if name == "BertModel" else getattr(transformers, name)(body.config).eval()


def small_of(model: Any, **how: Any) -> Any:
    small = prune(model, plan_of(model, **how), repair="none")
    with torch.no_grad():
        for module in base_model(small).modules():
            if type(module).__name__ == "ObceRows":
                module.bias.add_(torch.linspace(-0.3, 0.4, len(module.bias)))
    return small


def how_of(family: str) -> dict[str, Any]:
    # all layers of an MPNet share the biases of its heads
    return {"heads": (0, 1, 2, 3), "rows": False} if family == "mpnet" else {}


@torch.no_grad()
def answers(model: Any, batch: int = 2, length: int = 11, names: Sequence[str] = INPUTS) -> list[torch.Tensor]:
    found = model(**export.example(model, batch, length, names))
    return [one for one in found.to_tuple() if isinstance(one, torch.Tensor)]


def furthest(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


WITHOUT_OBCE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "obce":
            raise ImportError("obce is not here")

sys.meta_path.insert(0, Blocked())
try:
    import obce
except ImportError:
    pass
else:
    raise SystemExit("obce can be imported")
import numpy as np, torch, transformers
root, trust = sys.argv[1], sys.argv[2] == "trust"
for auto, name in [one.split("=") for one in sys.argv[3:]]:
    model = getattr(transformers, auto).from_pretrained(root + "/" + name, trust_remote_code=trust)
    source = sys.modules[type(model).__module__].__file__
    assert trust == ("transformers_modules" in source), source
    with np.load(root + "/" + name + ".npz") as given, torch.no_grad():
        found = model(**{one: torch.from_numpy(given[one]) for one in given.files}).to_tuple()
    np.savez(root + "/" + name + ".found.npz", *[t.numpy() for t in found if isinstance(t, torch.Tensor)])
assert not any(name.partition(".")[0] == "obce" for name in sys.modules)
"""


def elsewhere(root: Path, trust: bool, models: Mapping[str, str]) -> None:
    """Loads and asks models (directory in `root` -> Auto class) in a process that cannot import obce."""
    pairs = [f"{auto}={name}" for name, auto in models.items()]
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", WITHOUT_OBCE, str(root), "trust" if trust else "stock", *pairs],
        capture_output=True,
        text=True,
        env={
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(root / "hub"),
            "PATH": "",
            "HOME": str(root),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


def found_in(root: Path, name: str) -> list[torch.Tensor]:
    with np.load(root / f"{name}.found.npz") as found:
        return [torch.from_numpy(found[name]) for name in found.files]


def test_every_head_opens_with_its_code_and_without_obce(tiny_bert: BertModel, tmp_path: Path) -> None:
    expected = {}
    for auto, name in BERT_HEADS.items():
        small = small_of(headed(tiny_bert, name))
        (tmp_path / auto).mkdir()
        export.remote_code(small, tmp_path / auto)
        np.savez(tmp_path / f"{auto}.npz", **{k: t.numpy() for k, t in export.example(small, 2, 11, INPUTS).items()})
        expected[auto] = answers(small)
        auto_map = json.loads((tmp_path / auto / "config.json").read_text())["auto_map"]
        assert auto_map["AutoConfig"] == "configuration_obce.ObceBertConfig"
        assert {auto: f"modeling_obce.Obce{name}"}.items() <= auto_map.items()
        assert {one.partition(".")[0] for one in auto_map.values()} <= {p.stem for p in (tmp_path / auto).glob("*.py")}
    elsewhere(tmp_path, True, {auto: auto for auto in BERT_HEADS})
    for auto, tensors in expected.items():
        for a, b in zip(tensors, found_in(tmp_path, auto), strict=True):
            assert torch.equal(a, b), auto


def test_other_families_open_with_their_code(tmp_path: Path) -> None:
    expected = {}
    models = [(family, classifier_of(family)) for family in FAMILIES]
    models += [("gpt2", "CausalLM"), ("qwen3", "CausalLM"), ("llama", "QuestionAnswering"), ("qwen2", "")]
    for family, head in models:
        name = family + head
        small = small_of(make_encoder(family, head), **how_of(family))
        (tmp_path / name).mkdir()
        export.remote_code(small, tmp_path / name)
        np.savez(tmp_path / f"{name}.npz", **{k: t.numpy() for k, t in export.example(small, 2, 11, INPUTS).items()})
        expected[name] = answers(small)
    elsewhere(tmp_path, True, {f + head: f"AutoModelFor{head}" if head else "AutoModel" for f, head in models})
    for name, tensors in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, found_in(tmp_path, name), strict=True)), name


def test_a_model_that_was_saved_by_obce_does_not_carry_code(tiny_bert: BertModel, tmp_path: Path) -> None:
    """Exporting leaves no mark on the classes or the model."""
    small = small_of(tiny_bert)
    (tmp_path / "code").mkdir()
    export.remote_code(small, tmp_path / "code")
    small.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())


# ---- dense again -----------------------------------------------------------------------------------------------------


def test_every_head_is_dense_again_for_stock_transformers(tiny_bert: BertModel, tmp_path: Path) -> None:
    expected = {}
    for auto, name in BERT_HEADS.items():
        model = headed(tiny_bert, name)
        small = small_of(model)
        (tmp_path / auto).mkdir()
        filled, found = export.dense(small, tmp_path / auto, plan=plan_of(model) if name == "BertModel" else None)
        assert found < export.TOLERANCE
        assert type(filled) is type(model)
        assert sum(p.numel() for p in filled.parameters()) == sum(p.numel() for p in model.parameters())
        np.savez(tmp_path / f"{auto}.npz", **{k: t.numpy() for k, t in export.example(small, 3, 40, INPUTS).items()})
        expected[auto] = answers(small, 3, 40)
        config = json.loads((tmp_path / auto / "config.json").read_text())
        assert (config["model_type"], config["obce"]["zero_filled"]) == ("bert", True)
        assert not {"per_layer_config", "auto_map"} & set(config)
    elsewhere(tmp_path, False, {auto: auto for auto in BERT_HEADS})
    for auto, tensors in expected.items():
        assert furthest(tensors, found_in(tmp_path, auto)) < export.TOLERANCE, auto


def test_a_model_in_training_is_dense_again(tiny_bert: BertModel, tmp_path: Path) -> None:
    small = small_of(tiny_bert).train()
    _, found = export.dense(small, tmp_path)
    assert found < export.TOLERANCE
    assert small.training


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("planned", [True, False])
def test_other_families_are_dense_again(family: str, planned: bool) -> None:
    model = make_encoder(family, classifier_of(family))
    small = small_of(model, **how_of(family))
    plan = plan_of(model, **how_of(family)) if planned else None
    if family == "qwen3":
        with pytest.raises(
            ValueError, match=r"whose layers.0.mlp.down_proj has a bias, and that of transformers' Qwen3"
        ):
            export.to_dense(small, plan)
        return
    filled = export.to_dense(small, plan)
    # a Qwen2 has no room for biases; a Llama with biases is one
    assert type(filled) is (LlamaForSequenceClassification if family == "qwen2" else type(model))
    assert furthest(answers(small), answers(filled)) < export.TOLERANCE


def test_a_modernbert_is_dense_again_with_biases_and_its_first_layer() -> None:
    model = make_encoder("modernbert", "MaskedLM")
    small = small_of(model, dropped=(1,))
    filled: Any = export.to_dense(small)
    assert filled.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    assert filled.config.attention_bias
    assert filled.config.mlp_bias
    assert not filled.model.layers[0].attn.Wqkv.bias.any()
    assert filled.decoder.weight is filled.model.embeddings.tok_embeddings.weight
    assert furthest(answers(small), answers(filled)) < export.TOLERANCE
    with pytest.raises(ValueError, match=r"ObceModernBert whose first layer was dropped.*keep layer 0"):
        export.to_dense(small_of(model, dropped=(0,)))


def test_neurons_return_to_their_places(tiny_bert: BertModel) -> None:
    plan = plan_of(tiny_bert, dropped=(1,))
    filled: Any = export.to_dense(prune(tiny_bert, plan, repair="none"), plan)
    assert filled.config.num_hidden_layers == len(filled.encoder.layer) == 2
    for site, old in zip(find_sites(filled), (s for s in find_sites(tiny_bert) if s.layer != 1), strict=True):
        rows = plan.kept.get(old.name, tuple(range(old.width)))
        new, before = filled.get_submodule(site.writer).weight, tiny_bert.get_submodule(old.writer).weight
        gone = [i for i in range(site.width) if i not in rows]
        assert not new[gone].any()
        if site.kind in ("query", "key", "value", "intermediate"):
            assert torch.equal(new[list(rows)], before[list(rows)])
        if site.reader is not None:
            assert not filled.get_submodule(site.reader).weight[:, gone].any()


def test_dropped_layers_stay_away(tiny_bert: BertModel) -> None:
    model = headed(tiny_bert, "BertForMaskedLM")
    small = small_of(model, dropped=(0,))
    filled: Any = export.to_dense(small)
    assert filled.config.num_hidden_layers == 2
    assert filled.cls.predictions.decoder.weight is filled.bert.embeddings.word_embeddings.weight
    assert furthest(answers(small), answers(filled)) < export.TOLERANCE


def test_half_precision_and_no_pooler(tiny_bert: BertModel) -> None:
    body = transformers.BertModel(tiny_bert.config, add_pooling_layer=False).eval()
    small = small_of(body).to(torch.bfloat16)
    filled: Any = export.to_dense(small)
    assert filled.pooler is None
    assert {p.dtype for p in filled.parameters()} == {torch.bfloat16}


def test_a_plan_of_other_widths_is_refused(tiny_bert: BertModel) -> None:
    with pytest.raises(ValueError, match=r"plan keeps 12 neurons of '0\.query', but the model has 6 there"):
        export.to_dense(small_of(tiny_bert), plan_of(tiny_bert, heads=(0, 1, 2, 3)))
    with pytest.raises(ValueError, match="expected one that obce has pruned"):
        export.to_dense(tiny_bert)


# ---- ONNX ------------------------------------------------------------------------------------------------------------


def asked(path: Path, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed; `make dev` installs it")
    session = onnxruntime.InferenceSession(str(path / "model.onnx"), providers=["CPUExecutionProvider"])
    taken = {one.name for one in session.get_inputs()}
    return [torch.from_numpy(x) for x in session.run(None, {k: t.numpy() for k, t in inputs.items() if k in taken})]


@pytest.mark.slow
@pytest.mark.parametrize("name", BERT_HEADS.values())
def test_onnx_of_every_head(tiny_bert: BertModel, tmp_path: Path, name: str) -> None:
    small = small_of(headed(tiny_bert, name))
    names = (*INPUTS, "token_type_ids")
    assert export.onnx(small, tmp_path) < export.TOLERANCE
    for batch, length in ((1, 1), (1, 64), (7, 5), (32, 33)):
        inputs = export.example(small, batch, length, names)
        inputs["token_type_ids"][..., length // 2 :] = 1
        with torch.no_grad():
            expected = [one for one in small(**inputs).to_tuple() if isinstance(one, torch.Tensor)]
        assert furthest(expected, asked(tmp_path, inputs)) < export.TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("gpt2", "llama", "qwen2")])
def test_onnx_of_other_families(tmp_path: Path, family: str) -> None:
    small = small_of(make_encoder(family, classifier_of(family)), **how_of(family))
    assert export.onnx(small, tmp_path) < export.TOLERANCE
    for batch, length in ((1, 1), (5, 3), (4, 60)):
        inputs = export.example(small, batch, length, INPUTS)
        given = inputs
        if family not in ("MPNet", "DistilBert", "vit"):
            given = {**inputs, "token_type_ids": 0 * inputs["input_ids"]}
        assert furthest(answers(small, batch, length), asked(tmp_path, given)) < export.TOLERANCE


def test_onnx_takes_what_the_tokenizer_gives(
    tiny_bert: BertModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx", reason="the extra 'onnx' is not installed; `make dev` installs it")
    small = small_of(tiny_bert).half()
    assert export.onnx(small, tmp_path, tiny_tokenizer) < export.TOLERANCE
    assert small.dtype == torch.float16
    graph = onnx.load(tmp_path / "model.onnx").graph
    axes = [[d.dim_param for d in one.type.tensor_type.shape.dim] for one in graph.input]
    assert {one.name for one in graph.input} == set(tiny_tokenizer.model_input_names)
    assert axes == [["batch", "length"]] * len(axes)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    inputs = dict(tokenizer(["The city.", "A river was in the north of the city."], padding=True, return_tensors="pt"))
    with torch.no_grad():
        expected = small.float()(**inputs).to_tuple()
    assert furthest(expected, asked(tmp_path, inputs)) < export.TOLERANCE


def test_onnx_says_what_is_missing(tiny_bert: BertModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obce.export.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ImportError, match=r"of which onnxscript cannot be imported: pip install 'obce\[onnx\]'"):
        export.onnx(small_of(tiny_bert), tmp_path)
    assert not list(tmp_path.iterdir())


# ---- sentence-transformers -------------------------------------------------------------------------------------------

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


@pytest.fixture
def sentences_base(tmp_path: Path, tiny_bert_dir: Path) -> Path:
    base = tmp_path / "base"
    (base / "1_Pooling").mkdir(parents=True)
    for file in tiny_bert_dir.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "modules.json").write_text(json.dumps(MODULES))
    (base / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 33, "do_lower_case": False}))
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (base / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# A model\n")
    return base


def test_pooling_is_carried_over(tiny_bert: BertModel, sentences_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    carried = export.sentence_transformers(small_of(tiny_bert), out, sentences_base)
    assert sorted(carried) == ["1_Pooling/config.json", "modules.json", "sentence_bert_config.json"]
    for name in carried:
        assert (out / name).read_bytes() == (sentences_base / name).read_bytes()
    assert {"modeling_obce.py", "configuration_obce.py", "model.safetensors"} <= {p.name for p in out.iterdir()}


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ([{**MODULES[0]}, {**MODULES[1], "path": "../1_Pooling"}], "expected one inside"),
        ([{**MODULES[0]}, {**MODULES[1], "path": "/etc"}], "expected one inside"),
        ([{**MODULES[0], "path": "0_Transformer"}], "keeps its encoder in '0_Transformer'"),
        ([{**MODULES[0]}, {**MODULES[1], "type": "evil.Pooling"}], "not of sentence-transformers"),
        ({}, "not a list of modules"),
        ([7], "not a list of modules"),
    ],
)
def test_modules_that_lead_elsewhere_are_refused(
    tiny_bert: BertModel, sentences_base: Path, tmp_path: Path, modules: Any, words: str
) -> None:
    (sentences_base / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=words):
        export.sentence_transformers(small_of(tiny_bert), tmp_path / "out", sentences_base)
    assert not list((tmp_path / "out").iterdir())


def test_pickled_modules_are_refused(sentences_base: Path) -> None:
    (sentences_base / "1_Pooling" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin' is not safetensors"):
        export.pooling_files(sentences_base)


# ---- runs and directories --------------------------------------------------------------------------------------------


@pytest.fixture
def run(sentences_base: Path, tmp_path: Path, texts: list[str]) -> Run:
    from obce.corpus import read_corpus
    from obce.plan import plan

    run = Run(tmp_path / "run")
    scores, _ = run.score(str(sentences_base), read_corpus(texts[:60]), effect_texts=0, cloud_texts=0)
    run.make_plan(plan(scores, keep=0.6, of="encoder", score="std", units=("heads", "intermediate", "output")))
    run.prune(repair="mean")
    return run


def test_a_run_is_exported_every_way(run: Run, tmp_path: Path) -> None:
    small = load_model(run.model_path, pruned=True)
    for way in export.WAYS:
        facts = run.export(way, tmp_path / way)
        assert set(facts["files"]) >= {"README.md", "obce.json", "tokenizer.json", "config.json"}
        assert not list(tmp_path.glob(".partial*"))
        assert (facts["difference"] is None) == (way in ("remote-code", "sentence-transformers"))
    dense = load_model(tmp_path / "dense")
    assert furthest(answers(small), answers(dense)) < export.TOLERANCE
    for layer in range(3):
        # back in their places
        rows: Any = dense.encoder.layer[layer].intermediate.dense.weight  # type: ignore[union-attr]
        kept = run.plan().kept.get(f"{layer}.intermediate", tuple(range(64)))
        assert torch.nonzero(rows.abs().sum(1)).flatten().tolist() == list(kept)
    found = load_model(tmp_path / "remote-code", pruned=True)
    assert all(torch.equal(a, b) for a, b in zip(answers(small), answers(found), strict=True))
    assert json.loads((tmp_path / "sentence-transformers" / "modules.json").read_text()) == MODULES
    assert json.loads((run.model_path / "modules.json").read_text()) == MODULES
    with pytest.raises(ValueError, match=r"--out '.*dense' exists and is not an empty directory"):
        run.export("dense", tmp_path / "dense")


def test_another_plan_moves_no_neuron_to_a_wrong_place(run: Run, tmp_path: Path) -> None:
    """After planning anew the model is still exported, by its own widths."""
    from obce.plan import plan

    run.make_plan(plan(run.scores(), keep=0.4, of="encoder", score="std"))
    assert run.export("dense", tmp_path / "dense")["difference"] < export.TOLERANCE


def test_a_directory_is_exported_without_its_run(run: Run, tmp_path: Path, sentences_base: Path) -> None:
    alone = tmp_path / "alone"
    run.model_path.rename(alone)
    assert export_model(alone, "dense", tmp_path / "dense")["difference"] < export.TOLERANCE
    facts = export_model(alone, "sentence-transformers", tmp_path / "sentences")
    assert "1_Pooling/config.json" in facts["files"]
    assert "license: mit" in (tmp_path / "sentences" / "README.md").read_text()
    with pytest.raises(ValueError, match="has no model: make it with `obce prune"):
        run.export("dense", tmp_path / "x")
    with pytest.raises(ValueError, match="was not pruned by obce"):
        export_model(sentences_base, "dense", tmp_path / "x")
    with pytest.raises(ValueError, match="--to is 'tflite', expected one of remote-code"):
        export_model(alone, "tflite", tmp_path / "x")
    (alone / "modules.json").unlink()
    (alone / "obce.json").unlink()
    with pytest.raises(ValueError, match=r"has no modules\.json"):
        export_model(alone, "sentence-transformers", tmp_path / "x")
    export_model(alone, "sentence-transformers", tmp_path / "y", base=str(sentences_base))
    assert not (tmp_path / "x").exists()


def test_nothing_is_uploaded_unasked(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from obce.cli import app
    from typer.testing import CliRunner

    calls: list[Any] = []

    class Hub:
        def create_repo(self, repository: str, **how: Any) -> None:
            calls.append((repository, how))

        def upload_folder(self, **how: Any) -> Any:
            calls.append((how["repo_id"], {p.name for p in Path(how["folder_path"]).iterdir()}))
            return type("Done", (), {"commit_url": "https://hub/commit"})

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    command = ["export", str(run.path), "--to", "remote-code", "--json"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "a")])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["pushed"] is None
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "b"), "--push", "me/small", "--dry-run"])
    assert json.loads(done.stdout)["push"] == "me/small"
    assert not (tmp_path / "b").exists()
    assert calls == []
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "b"), "--push", "me/small"])
    assert json.loads(done.stdout)["pushed"] == "https://hub/commit"
    assert calls[0] == ("me/small", {"private": True, "exist_ok": True})
    assert calls[1][0] == "me/small"
    assert {"README.md", "obce.json", "modeling_obce.py", "model.safetensors"} <= calls[1][1]


def test_a_hub_that_refuses_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--push not a name: the hub could not be written") as error:
        push(tmp_path, "not a name")
    assert "\n" not in str(error.value)


@pytest.mark.minilm
def test_sentence_transformers_opens_it(minilm_dir: Path, wikipedia: Path, tmp_path: Path) -> None:
    """With the library, where it is installed; else by our own reading of the pooling."""
    from obce.corpus import read_corpus

    model = transformers.AutoModel.from_pretrained(minilm_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_dir)
    size = model.config.hidden_size // model.config.num_attention_heads
    half = tuple(i for i in range(model.config.hidden_size) if i % size < size // 2)
    kept = {f"{layer}.{kind}": half for layer in range(6) for kind in ("query", "key", "value")}
    plan = plan_of(model, rows=False)
    small = prune(model, Plan(**{**vars(plan), "kept": kept}), repair="none")
    export.sentence_transformers(small, tmp_path, minilm_dir, tokenizer)
    texts = list(read_corpus(str(wikipedia), column="sentence", limit=6).entries())
    inputs = tokenizer([str(text) for text in texts], padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        states = small(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    stated = json.loads((tmp_path / "1_Pooling" / "config.json").read_text())
    assert stated["pooling_mode_mean_tokens"]
    assert [m["type"].rpartition(".")[2] for m in json.loads((tmp_path / "modules.json").read_text())] == [
        "Transformer",
        "Pooling",
        "Normalize",
    ]
    library = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed; `make dev` installs it"
    )
    found = library.SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu").encode(texts)
    assert float(np.abs(found - expected.numpy()).max()) < export.TOLERANCE


def test_every_way_is_a_function() -> None:
    assert all(callable(getattr(export, way.replace("-", "_"))) for way in export.WAYS)
