"""Pictures in the place of texts: who they are, how they come to a model, and the whole way of a ViT."""

from __future__ import annotations

import builtins
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import obce
import pytest
import torch
import transformers
from obce import export, images
from obce.capture import capture, first_inputs
from obce.cli import app
from obce.corpus import tokenize
from obce.effects import effect_clouds, reading_of
from obce.evaluate import count_parameters, embed, flops, weight_bytes
from obce.explain import explain
from obce.finetune import with_head
from obce.glue import TASKS
from obce.prune import masked, prune
from obce.run import Run, load_model, load_tokenizer
from obce.sites import find_sites, model_hash, usable_max_length
from typer.testing import CliRunner

from tiny import HIDDEN, INNER, equal_scores, make_encoder, make_pictures, make_plan, processed

if TYPE_CHECKING:
    from transformers import BertModel

Image: Any = pytest.importorskip("PIL.Image", reason="the extra 'pictures' is not installed; `make dev` installs it")

TOKENS = 5  # [CLS], and four patches


@pytest.fixture(scope="module")
def processor() -> Any:
    return transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures in three formats and two directories, two of them equal, beside other files."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "more").mkdir()
    for i, pixels in enumerate(make_pictures(59, size=20)):
        Image.fromarray(pixels).save(root / ("more" if i % 2 else ".") / f"{i:02d}.{('png', 'JPG', 'webp')[i % 3]}")
    shutil.copy(root / "00.png", root / "more" / "same.png")
    (root / "more" / "up").symlink_to(root)
    (root / "labels.csv").write_text("a,b\n")
    (root / ".hidden.png").write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def vit_dir(tmp_path_factory: pytest.TempPathFactory, processor: Any) -> Path:
    root = tmp_path_factory.mktemp("vit")
    make_encoder("vit", "ImageClassification").save_pretrained(root)
    processor.save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def arrays() -> obce.Corpus:
    return obce.read_pictures(processed(make_pictures(80)))


@pytest.fixture(scope="module")
def scored(arrays: obce.Corpus) -> tuple[Any, obce.Scores]:
    model = make_encoder("vit", "ImageClassification")
    return model, obce.score(model, None, arrays)  # type: ignore[arg-type]


# ---- reading -----------------------------------------------------------------------------------------------------


def test_a_directory(folder: Path, tmp_path: Path) -> None:
    corpus = obce.read_corpus(folder)
    assert len(corpus) == 59
    assert corpus.texts[:2] == ("00.png", "02.webp")
    assert corpus.texts[-1] == "more/57.png"
    assert (corpus.dropped_duplicate, corpus.dropped_empty) == (1, 0)
    assert corpus.source == f"{folder} (1 files of other kinds left out)"
    assert obce.read_pictures(folder, limit=7).texts == corpus.texts[:7]
    with pytest.raises(ValueError, match="limit is 3, expected at least 4; leave it out to read all"):
        obce.read_pictures(folder, limit=3)
    assert obce.read_corpus(corpus, limit=7).hash == obce.read_pictures(folder, limit=7).hash
    again = obce.read_corpus(**corpus.reading)  # type: ignore[arg-type]
    assert again.hash == corpus.hash
    # names and places decide nothing
    for i, name in enumerate(reversed(corpus.texts)):
        shutil.copy(folder / name, tmp_path / f"{i}{Path(name).suffix}")
    moved = obce.read_pictures(tmp_path)
    assert moved.hash == corpus.hash
    assert [moved.texts[i] for i in moved.order()] != [corpus.texts[i] for i in corpus.order()]
    sources = [[corpus.pictures[i].digest for i in corpus.order()] for corpus in (moved, corpus) if corpus.pictures]
    assert sources[0] == sources[1]
    assert len(np.unique(corpus.digests())) == 59
    (tmp_path / "0.png").unlink(missing_ok=True)
    (tmp_path / f"0{Path(corpus.texts[-1]).suffix}").unlink(missing_ok=True)
    assert obce.read_pictures(tmp_path).hash != corpus.hash


def test_lists_of_paths_images_and_arrays(folder: Path) -> None:
    paths = sorted(folder.glob("[0-9]*.png"))
    assert obce.read_pictures(paths).hash == obce.read_pictures([str(path) for path in reversed(paths)]).hash
    opened = [Image.open(path) for path in paths]
    assert obce.read_pictures(opened).texts[:2] == ("picture 0", "picture 1")
    assert obce.read_pictures(opened).hash == obce.read_pictures([one.copy() for one in opened]).hash
    whole = processed(make_pictures(6))
    forms = (whole, torch.from_numpy(whole), list(whole), [torch.from_numpy(one) for one in whole], whole.astype("f8"))
    assert len({obce.read_pictures(form).hash for form in forms}) == 1
    other = whole.copy()
    other[3, 0, 0, 0] += 1
    assert obce.read_pictures(other).hash != obce.read_pictures(whole).hash


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("nowhere", ValueError, "'nowhere' is not a directory, expected one of picture files"),
        (["a.png"], ValueError, r"picture 'a\.png' does not exist"),
        (np.zeros((5, 3, 4, 4), np.uint8), ValueError, r"picture 0 is uint8 of shape \(3, 4, 4\), .* as PIL images"),
        (np.zeros((3, 4, 4), np.float32), ValueError, r"picture 0 is float32 of shape \(4, 4\), expected"),
        ([np.full((3, 4, 4), np.nan)], ValueError, "picture 0 holds NaN or infinity"),
        (processed(make_pictures(3)), ValueError, "ndarray in memory has 3 distinct pictures, expected at least 4"),
        (7, TypeError, "source is an int, expected a directory of picture files or a list of pictures"),
        ([7], TypeError, "entry 0 is an int, expected a path, a PIL image"),
        ({"a": 1}, TypeError, "source is a dict"),
    ],
)
def test_what_is_no_corpus_of_pictures(source: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        obce.read_pictures(source)


def test_damaged_files_are_named(folder: Path, tmp_path: Path, processor: Any) -> None:
    for path in folder.glob("*"):
        if path.is_file():
            shutil.copy(path, tmp_path)
    png, jpg = tmp_path / "00.png", tmp_path / "04.JPG"
    whole = png.read_bytes(), jpg.read_bytes()
    other = io.BytesIO()
    Image.open(png).save(other, "eps")
    for content in (b"", b"no picture at all", whole[0][:60], whole[0][:-30] + bytes(30), other.getvalue()):
        png.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"picture '00\.png' is damaged or no picture \(.*\): replace it, or leave"
        ):
            obce.read_pictures(tmp_path)
    png.write_bytes(whole[0])
    jpg.write_bytes(whole[1][:-8])  # whose head is whole
    corpus = obce.read_pictures(tmp_path)
    with pytest.raises(ValueError, match=r"picture '04\.JPG' is damaged or no picture \(.*truncated"):
        list(tokenize(corpus, processor, max_length=TOKENS))
    jpg.write_bytes(whole[1])
    with pytest.raises(ValueError, match=r"picture '04\.JPG' is not the file that was there"):
        list(tokenize(corpus, processor, max_length=TOKENS))
    jpg.unlink()
    with pytest.raises(ValueError, match=r"picture '04\.JPG' does not exist"):
        list(tokenize(corpus, processor, max_length=TOKENS))


def test_a_missing_package_is_named(folder: Path, vit_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "PIL":
            raise ImportError(name)
        return there(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"picture files need the package pillow: pip install 'obce\[pictures\]'"):
        obce.read_pictures(folder)
    monkeypatch.undo()

    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("ViTImageProcessor requires the Torchvision library")

    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", refuse)
    with pytest.raises(ImportError, match="needs the package torchvision: pip install torchvision"):
        load_tokenizer(vit_dir)
    monkeypatch.setattr("obce.images.find_spec", lambda name: None if name == "PIL" else name)
    with pytest.raises(ImportError, match=r"needs the package pillow: pip install 'obce\[pictures\]'"):
        load_tokenizer(vit_dir)


# ---- batches -----------------------------------------------------------------------------------------------------


def test_batches_come_one_by_one(folder: Path, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = obce.read_pictures(folder)
    decoded: list[str] = []
    plain: Callable[..., Any] = images._decoded
    monkeypatch.setattr(images, "_decoded", lambda content, name, **how: decoded.append(name) or plain(content, name))
    batches = tokenize(corpus, processor, max_length=TOKENS, batch_tokens=4 * TOKENS + 3)
    assert (batches.n_texts, batches.n_tokens, batches.truncated, len(batches)) == (59, 59 * TOKENS, 0, 15)
    assert batches.tokens_of_first()[-1] == 59 * TOKENS
    assert not decoded
    walk = iter(batches)
    first = next(walk)
    assert decoded == list(corpus.texts[:4])
    assert first.inputs["pixel_values"].shape == (4, 3, 16, 16)
    assert first.lengths.tolist() == [TOKENS] * 4
    assert first.real.tolist() == [[1] * TOKENS] * 4
    rest = [first, *walk]
    assert np.concatenate([batch.indices for batch in rest]).tolist() == list(range(59))
    # whatever lies beside it
    (alone,) = tokenize(corpus.entries([2]), processor, max_length=TOKENS)
    assert torch.equal(alone.inputs["pixel_values"][0], first.inputs["pixel_values"][2])
    with pytest.raises(ValueError, match="pictures have no padding"):
        batches.packs(100)
    # as ranks share them
    given = [[batch.indices.tolist() for batch in batches.share(rank, 3)] for rank in range(3)]
    every = [batch.indices.tolist() for batch in batches]
    assert len(every) > 3
    assert given == [every[rank::3] for rank in range(3)]


def test_every_mode_and_turned_pictures(processor: Any) -> None:
    pixels = make_pictures(1)[0]
    picture = Image.fromarray(pixels)
    modes = ("L", "RGBA", "P", "CMYK", "1")
    corpus = obce.read_pictures([picture, *(picture.convert(mode) for mode in modes)])
    (batch,) = tokenize(corpus, processor, max_length=TOKENS)
    taken = batch.inputs["pixel_values"]
    assert taken.shape == (6, 3, 16, 16)
    assert torch.allclose(taken[0], torch.from_numpy(processed(pixels[None])[0]), atol=1e-6)
    assert torch.equal(taken[2], taken[0])  # RGBA
    wide = Image.fromarray(np.full((4, 4), 60000, np.uint16))
    with pytest.raises(ValueError, match="picture 'picture 0' has the mode I;16, expected 8 bits a channel or fewer"):
        obce.read_pictures([wide])
    turned = io.BytesIO()
    exif = picture.getexif()
    exif[0x0112] = 3  # upside down
    picture.rotate(180).save(turned, "png", exif=exif)
    found = images._decoded(turned.getvalue(), "turned.png").convert("RGB")
    assert np.array_equal(np.asarray(found), pixels)


def test_pictures_of_different_shapes_are_refused() -> None:
    unlike = [*processed(make_pictures(4)), *processed(make_pictures(1, size=24))]
    with pytest.raises(ValueError, match=r"picture 'picture 4' has the shape \(3, 24, 24\) where 'picture 0' has"):
        list(tokenize(obce.read_pictures(unlike), None, max_length=TOKENS))
    with pytest.raises(ValueError, match=r"\(24\*24\) doesn't match model"):
        obce.score(make_encoder("vit"), None, processed(make_pictures(5, size=24)))  # type: ignore[arg-type]


def test_pixels_are_let_go_when_they_have_entered(arrays: obce.Corpus) -> None:
    model = make_encoder("vit")
    for batch, hidden, _ in first_inputs(model, tokenize(arrays, None, max_length=TOKENS)):
        assert not batch.inputs
        assert hidden.shape == (len(batch.indices), TOKENS, HIDDEN)
        assert batch.lengths.tolist() == [TOKENS] * len(batch.indices)


# ---- scores ------------------------------------------------------------------------------------------------------


def test_files_and_arrays_give_the_same_scores(folder: Path, processor: Any) -> None:
    model = make_encoder("vit", "ImageClassification")
    files = obce.read_pictures(sorted(folder.glob("more/*.png")))
    (batch,) = tokenize(files, processor, max_length=TOKENS)
    arrays = obce.read_pictures(batch.inputs["pixel_values"])
    assert arrays.hash != files.hash
    (layer, *_) = capture(model, tokenize(files, processor, max_length=TOKENS), find_sites(model))
    (other, *_) = capture(model, tokenize(arrays, None, max_length=TOKENS), find_sites(model))
    assert np.array_equal(layer.values, other.values)
    scores = obce.score(model, processor, files, labels=np.arange(len(files)) % 2)
    assert scores.meta["corpus_hash"] == files.hash
    assert scores.meta["n_tokens"] == TOKENS * len(files)
    assert (scores.meta["pictures"], scores.meta["max_length"], scores.meta["read"]) == (True, TOKENS, "head")
    assert np.isfinite(scores.column("taylor")).all()
    # [CLS] sees no picture before the first attention
    first = np.concatenate([np.arange(len(scores))[scores.rows(0, kind)] for kind in ("query", "key", "value")])
    assert set(np.flatnonzero(scores.constant)) == set(first)
    equal_scores(scores, obce.score(model, processor, files, labels=np.arange(len(files)) % 2, memory="layer"))


def test_what_is_read_by_itself(scored: tuple[Any, obce.Scores], arrays: obce.Corpus) -> None:
    """A classifier's head takes in [CLS] behind the last LayerNorm."""
    model, scores = scored
    assert reading_of(model) == "head"
    assert reading_of(model.vit) == "cls"
    assert reading_of(make_encoder("vit", "MaskedImageModeling")) == "tokens"
    batches = tokenize(arrays.entries(range(9)), None, max_length=TOKENS)
    sites = find_sites(model)
    means = {site.name: scores.columns["token_mean"][scores.rows(site.layer, site.kind)] for site in sites}
    head, cls, mean = (effect_clouds(model, batches, sites, means, read=read) for read in ("head", "cls", "mean"))
    for site in sites:
        assert np.array_equal(head[site.name], cls[site.name])
    assert not np.allclose(head["0.value"], mean["0.value"], rtol=0.1)
    (batch,) = batches
    with torch.no_grad():
        hidden = model.vit(**batch.inputs).last_hidden_state
    assert np.allclose(embed(model, batches, pooling="cls"), hidden[:, 0].numpy(), atol=1e-6)
    assert np.allclose(embed(model, batches, pooling="mean"), hidden.mean(1).numpy(), atol=1e-6)


def test_the_hash_is_that_of_the_body() -> None:
    model = make_encoder("vit", "MaskedImageModeling")
    body = transformers.ViTModel(model.config).eval()
    body.load_state_dict(model.vit.state_dict(), strict=False)
    before = model_hash(model)
    assert model_hash(body) == before
    counted = dict(model.named_parameters())
    for name, counts in (
        ("vit.embeddings.cls_token", True),
        ("vit.embeddings.position_embeddings", True),
        ("vit.embeddings.patch_embeddings.projection.weight", True),
        ("vit.layers.1.mlp.fc2.bias", True),
        ("vit.layernorm.weight", True),
        ("vit.embeddings.mask_token", False),
        ("decoder.0.weight", False),
    ):
        with torch.no_grad():
            old = counted[name].clone()
            counted[name].view(-1)[0] += 1
            assert (model_hash(model) != before) is counts, name
            counted[name].copy_(old)


@pytest.mark.parametrize(
    "config", [{}, {"pooler_output_size": 20}, {"qkv_bias": False}, {"image_size": (16, 24), "patch_size": (8, 4)}]
)
def test_predicted_sizes_are_exact(config: dict[str, Any], tmp_path: Path) -> None:
    """Also of a pooler of another width, without biases of query, key and value, and of patches that are no squares."""
    model = make_encoder("vit", **config)
    generator = np.random.default_rng(0)
    height, width = (16, 24) if "image_size" in config else (16, 16)
    pictures = generator.standard_normal((40, 3, height, width), np.float32)
    corpus = obce.read_pictures(pictures)
    assert usable_max_length(model, None) == 1 + height // 8 * (width // (4 if "patch_size" in config else 8))  # type: ignore[arg-type]
    scores = obce.score(model, None, corpus, effect_texts=0, cloud_texts=0)  # type: ignore[arg-type]
    plan = obce.plan(scores, model, keep=0.6, of="encoder", score="std", units=("query_key", "value", "output"))
    assert plan.before.flops == flops(model)
    for repair in ("none", "least_squares"):
        texts = {"texts": corpus} if repair == "least_squares" else {}
        small: Any = prune(model, plan, repair=repair, **texts)  # type: ignore[arg-type]
        assert count_parameters(small) == (plan.after.parameters, plan.after.encoder)
        assert (weight_bytes(small), flops(small)) == (plan.after.bytes, plan.after.flops)
        inputs = {"pixel_values": torch.from_numpy(pictures[:3])}
        with torch.no_grad(), masked(model, plan, repair=repair, **texts):  # type: ignore[arg-type]
            expected = model(**inputs)
        with torch.no_grad():
            found = small(**inputs)
        assert float((found.last_hidden_state - expected.last_hidden_state).abs().max()) < 1e-5
        assert found.pooler_output.shape == (3, config.get("pooler_output_size", HIDDEN))
    _, difference = export.dense(small, tmp_path, plan=plan)
    assert difference < export.TOLERANCE
    stock, info = transformers.ViTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert (stock.layers[0].attention.q_proj.bias is None) == (config.get("qkv_bias") is False)
    with pytest.raises(ValueError, match="length: found 128, expected"):
        flops(model, length=128)


# ---- cutting -----------------------------------------------------------------------------------------------------


def test_what_restores_masked_pictures() -> None:
    """Mask tokens go through, and a bare encoder with them, too."""
    model = make_encoder("vit", "MaskedImageModeling")
    with torch.no_grad():
        model.vit.embeddings.mask_token.normal_()
    plan = make_plan(model, {"0.intermediate": range(0, INNER, 2), "1.output": (1, 4, 9)})  # type: ignore[dict-item]
    inputs = {
        "pixel_values": torch.from_numpy(processed(make_pictures(3))),
        "bool_masked_pos": torch.tensor([[True, False, True, False]] * 3),
    }
    small: Any = prune(model, plan, repair="none")
    bare: Any = prune(model.vit, plan, repair="none")
    filled: Any = export.to_dense(small, plan)
    with torch.no_grad():
        with masked(model, plan, repair="none"):
            expected = model(**inputs)
        for one in (small, filled):
            found = one(**inputs)
            assert torch.allclose(found.reconstruction, expected.reconstruction, atol=1e-5)
            assert torch.allclose(found.loss, expected.loss, atol=1e-5)
        assert torch.equal(bare(**inputs)[0], small.vit(**inputs)[0])
    assert bare.pooler is None
    known = {"AutoModel", "AutoModelForImageClassification", "AutoModelForMaskedImageModeling"}
    assert set(export.auto_classes_of(small)) == known
    assert torch.equal(export.to_dense(bare).embeddings.mask_token, model.vit.embeddings.mask_token)  # type: ignore[union-attr]


def test_repairs_take_pictures_in_any_form(
    scored: tuple[Any, obce.Scores],
    arrays: obce.Corpus,
    vit_dir: Path,
    folder: Path,
    processor: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, scores = scored
    plan = obce.plan(scores, model, keep=0.6, of="encoder")
    monkeypatch.setattr(sys.modules[prune.__module__], "REPAIR_TEXTS", 60)
    monkeypatch.setattr(
        sys.modules[prune.__module__], "DEFAULT_MAX_LENGTH", 2
    )  # tokens a text: 24 pictures have as many as 60
    some: Any = prune(model, plan, texts=arrays)
    assert some.config.obce["least_squares"]["texts"] == 24
    monkeypatch.undo()
    fitted: Any = prune(model, plan, texts=arrays)
    again: Any = prune(model, plan, texts=processed(make_pictures(80)))  # type: ignore[arg-type]
    assert fitted.config.obce["least_squares"]["texts"] == 80
    for a, b in zip(fitted.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    # the processor that lies beside the model
    loaded = load_model(vit_dir)
    by_itself: Any = prune(loaded, plan, texts=folder)  # type: ignore[arg-type]
    named: Any = prune(loaded, plan, texts=obce.read_pictures(folder), tokenizer=processor)
    for a, b in zip(by_itself.parameters(), named.parameters(), strict=True):
        assert torch.equal(a, b)
    means: Any = prune(model, plan, repair="mean", texts=arrays)
    known: Any = prune(model, plan, repair="mean", scores=scores)
    for a, b in zip(means.parameters(), known.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_texts_and_pictures_do_not_mix(
    tiny_bert: BertModel,
    tiny_tokenizer: Any,
    texts: list[str],
    folder: Path,
    processor: Any,
    vit_dir: Path,
    tmp_path: Path,
) -> None:
    vit, pictures = make_encoder("vit"), obce.read_pictures(folder)
    with pytest.raises(
        ValueError, match=r"corpus list in memory holds texts, but the model reads pictures: give it a dir"
    ):
        obce.score(vit, processor, obce.read_corpus(texts))
    with pytest.raises(ValueError, match=r"corpus .* holds pictures, but the model reads texts: give it a file or"):
        obce.score(tiny_bert, tiny_tokenizer, pictures)
    with pytest.raises(TypeError, match="processor is a BertTokenizer, expected the image processor of the model"):
        obce.score(vit, tiny_tokenizer, pictures)
    with pytest.raises(TypeError, match="processor is a NoneType, expected the image processor"):
        obce.score(vit, None, pictures)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_length is 64, but every picture has 5 tokens for this model: leave"):
        obce.score(vit, processor, pictures, max_length=64)
    with pytest.raises(ValueError, match="holds texts, but the model reads pictures"):
        Run(tmp_path / "run").score(str(vit_dir), obce.read_corpus(texts))
    plan = make_plan(tiny_bert, {"0.intermediate": (0, 1)})
    with pytest.raises(ValueError, match="holds pictures, but the model reads texts"):
        prune(tiny_bert, plan, texts=pictures, tokenizer=tiny_tokenizer)
    with pytest.raises(ValueError, match="encoder is a ViTModel, which reads pictures, expected one that reads texts"):
        with_head(vit, TASKS["SST-2"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is a directory, expected a file"):
        obce.read_corpus(tmp_path / "empty")


# ---- runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
def test_a_stopped_run_goes_on_with_the_same_bits(folder: Path, vit_dir: Path, tmp_path: Path, exact: bool) -> None:
    corpus = obce.read_corpus(folder)
    how: dict[str, Any] = {"shard_texts": 20, "exact": exact, "batch_tokens": 30}
    whole, _ = Run(tmp_path / "whole").score(str(vit_dir), corpus, **how)

    class Stop(Exception):  # noqa: N818
        pass

    def stop(at: Any) -> None:
        if at.texts > 35:
            raise Stop

    with pytest.raises(Stop):
        Run(tmp_path / "run").score(str(vit_dir), corpus, progress=stop, **how)
    assert Run(tmp_path / "run").unfinished() >= 19
    resumed: list[int] = []
    found, reused = Run(tmp_path / "run").score(
        str(vit_dir), obce.read_corpus(folder), progress=lambda at: resumed.append(at.resumed), **how
    )
    assert not reused
    assert min(resumed) >= 19
    equal_scores(found, whole)
    assert Run(tmp_path / "run").score(str(vit_dir), corpus, **how)[1]
    with pytest.raises(ValueError, match="holds scores of another corpus"):
        Run(tmp_path / "run").score(str(vit_dir), obce.read_pictures(folder, limit=50), **how)


def test_the_whole_way_on_the_command_line(folder: Path, vit_dir: Path, tmp_path: Path) -> None:
    def asked(*arguments: object) -> dict[str, Any]:
        done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    run = tmp_path / "run"
    assert asked("score", vit_dir, folder, "--out", run, "--dry-run")["tokens"] == 59 * TOKENS
    facts = asked("run", vit_dir, folder, "--out", run, "--keep", 0.7, "--of", "encoder", "--shares", "measured")
    assert facts["after"]["encoder"] <= 0.7 * facts["before"]["encoder"]
    assert {"preprocessor_config.json", "obce.json"} <= {path.name for path in (run / "model").iterdir()}
    card = (run / "model" / "README.md").read_text(encoding="utf-8")
    assert 'processor = AutoImageProcessor.from_pretrained("DIRECTORY")' in card
    assert "| FLOPs of a picture |" in card
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "FLOPs, one picture" in page
    assert "59 pictures." in page
    assert "where this page says text, take picture" in page
    small, processor = load_model(run / "model", pruned=True), load_tokenizer(run / "model")
    assert small(**processor(images=Image.open(folder / "00.png"), return_tensors="pt")).logits.shape == (1, 2)
    assert asked("explain", run)["pages"]
    assert "more/" in (run / "report.html").read_text(encoding="utf-8")
    one = asked("explain", run, "--neuron", "1.intermediate.5", "--head", "1.hidden")["neurons"][0]
    assert one["high"][0]["text"] in obce.read_corpus(folder).texts
    assert one["high"][0]["tokens"] == ["[CLS]", "[patch 1]", "[patch 2]", "[patch 3]", "[patch 4]"]
    assert one["reason"] is None
    for way in ("remote-code", "dense"):
        assert "preprocessor_config.json" in asked("export", run, "--to", way, "--out", tmp_path / way)["files"]
    done = CliRunner().invoke(app, ["layernorm", str(vit_dir), str(folder), "--limit", "8"])
    assert done.exit_code == 0, done.output
    assert "1.output" in done.output


def test_a_neuron_is_explained_by_the_names_of_pictures(scored: tuple[Any, obce.Scores], arrays: obce.Corpus) -> None:
    model, scores = scored
    found = explain(scores, "1.value.3", model, None, arrays, tail=5)  # type: ignore[arg-type]
    assert [shown.text for shown in found.high] == [f"picture {i}" for i in np.argsort(-found.values)[:5]]
    assert found.high[0].at_tokens[0] == pytest.approx(found.high[0].value)
    assert found.reason is None
    with pytest.raises(ValueError, match="picture 'a text' does not exist"):
        explain(scores, "1.value.3", model, None, ["a text", "b", "c", "d"])  # type: ignore[arg-type]
