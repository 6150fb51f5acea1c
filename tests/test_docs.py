"""What README.md and docs/ show is run as it stands there: every Python block, every `obce` line, every link.

Blocks of a file run one after the other in a folder of its own that holds what they name: MODEL_DIR (a tiny random BERT
with 6 layers), NOMIC_DIR (of a family that obce does not know), VIT_DIR, PICTURES_DIR, sentences.txt, GLUE_DIR, RUN. A
block of TOML is written to the file that its first line names. A block or line that cannot run stands in the markdown
below `<!-- not run: reason -->`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from obce.cli import app
from PIL import Image
from transformers import ViTImageProcessorPil
from typer.testing import CliRunner

from tiny import make_encoder, make_mapped, make_pictures

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results.md"  # written by `make results`
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(p for p in sorted(ROOT.glob("docs/*.md")) if p != RESULTS)]
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->", re.DOTALL)
# Blocks that import these are run where they are installed.
OPTIONAL = ("sentence_transformers", "gudhi")
# What a line means here: the tiny model is the only one, a name of the hub is nowhere, training is short.
STAND_INS = (
    ("bert-base-uncased", "MODEL_DIR"),
    ("torchrun --nproc-per-node=4 -m obce", "obce"),
    ("--push NAME/REPOSITORY", "--dry-run"),
    ("GLUE_FOLDER", "GLUE_DIR"),
)
CHEAPER = {
    "finetune": "--max-steps 2 --batch-size 8 --max-length 32",
    "distill": "--max-steps 2 --batch-size 8 --max-length 32",
    "compare": "--max-steps 2 --batch-size 8 --max-length 32 --seeds 1 --score std --score random",
    "eval": "--max-length 32 --latency-rows 0",
    "bench": "--quick --case '4 x 64 x 8' --threads 1 --budget 0.5",
}
COMMANDS = ("obce", "make", "pip", "python", "torchrun", ".venv/bin/python", "apt-get")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line it begins on, and why it is not run."""

    language: str
    text: str
    line: int
    not_run: str | None


def blocks(markdown: str) -> list[Block]:
    found, reason = [], None
    for token in MarkdownIt("commonmark").parse(markdown):
        if token.type == "html_block":
            match = NOT_RUN.search(token.content)
            reason = match.group(1) if match else reason
        elif token.type in ("fence", "code_block"):
            assert token.map is not None
            found.append(Block(token.info.strip(), token.content, token.map[0] + 1, reason))
            reason = None
        elif token.type.endswith("_open"):
            reason = None
    return found


def lines(block: Block) -> list[str]:
    """The commands of a block of shell lines; [] for a block of something else."""
    joined = block.text.replace("\\\n", " ")
    stripped = [re.sub(r"\s+# .*", "", line).strip() for line in joined.splitlines()]
    found = [one.strip() for line in stripped if line for one in line.split("&&")]
    words = [command_of(line) for line in found]
    if not any(word in COMMANDS for word in words):
        return []
    assert all(word in COMMANDS for word in words), f"line {block.line}: neither all commands nor none: {found}"
    return found


def command_of(line: str) -> str:
    return next((word for word in line.split() if not re.fullmatch(r"\w+=\S*", word)), "")


# ---- what the blocks find in their folder ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(
    tmp_path_factory: pytest.TempPathFactory, make_bert: Callable[..., Any], tiny_tokenizer: Any, texts: list[str]
) -> Path:
    """The folder that each file's folder is a copy of."""
    folder = tmp_path_factory.mktemp("shown")
    model = folder / "MODEL_DIR"
    make_bert(num_hidden_layers=6, intermediate_size=832).save_pretrained(model)  # 5.intermediate.830 is a neuron
    tiny_tokenizer.save_pretrained(model)
    make_mapped("nomic_bert").save_pretrained(folder / "NOMIC_DIR")
    tiny_tokenizer.save_pretrained(folder / "NOMIC_DIR")
    modules = [("", "sentence_transformers.models.Transformer"), ("1_Pooling", "sentence_transformers.models.Pooling")]
    (model / "modules.json").write_text(
        json.dumps([{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)])
    )
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
    )
    make_encoder("vit", "ImageClassification").save_pretrained(folder / "VIT_DIR")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "VIT_DIR")
    (folder / "PICTURES_DIR").mkdir()
    for i, pixels in enumerate(make_pictures(60)):
        Image.fromarray(pixels).save(folder / "PICTURES_DIR" / f"{i}.png")
    for name, part in (("sentences", texts[:80]), ("part-1", texts[80:140]), ("part-2", texts[140:])):
        (folder / f"{name}.txt").write_text("\n".join(part) + "\n", encoding="utf-8")
    (folder / "GLUE_DIR" / "SST-2").mkdir(parents=True)
    for name, part in (("train", texts[:80]), ("dev", texts[80:110])):
        rows = [f"{text}\t{int('river' in text or 'city' in text)}" for text in part]
        (folder / "GLUE_DIR" / "SST-2" / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    (folder / "examples").symlink_to(ROOT / "examples")
    run_line(f"obce run {model} {folder}/sentences.txt --out {folder}/RUN --keep 0.7 --of encoder")
    return folder


def run_line(line: str) -> None:
    """One `obce` line, in this process."""
    for written, instead in STAND_INS:
        line = line.replace(written, instead)
    _, *arguments = shlex.split(line)
    arguments += shlex.split(CHEAPER.get(arguments[0], ""))
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"


def check_line(line: str) -> None:
    """A line of a block: `obce` runs, of the others what they name is there."""
    command = command_of(line)
    words = shlex.split(line)
    if command in ("obce", "torchrun"):
        run_line(line)
    elif command == "make":
        rules = (ROOT / "Makefile").read_text("utf-8")
        targets = [word for word in words[1:] if "=" not in word and not word.startswith("-") and word != "make"]
        for target in targets:
            assert re.search(rf"^{target}:", rules, re.MULTILINE), f"the Makefile has no target {target}"
        for variable in re.findall(r"(\w+)=", line.split("make", 1)[1]):
            assert re.search(rf"\b{variable}\b", rules), f"the Makefile has no variable {variable}"
    elif command == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
        for extra in re.findall(r"\.\[(\w+)\]", line):
            assert extra in extras, f"pyproject.toml has no extra {extra}"
    elif command.endswith("python"):
        scripts = [word for word in words if word.endswith(".py")]
        assert scripts and all((ROOT / script).is_file() for script in scripts), line


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_shown_runs(path: Path, shown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(path.read_text("utf-8"))
    if not any(block.language == "python" or lines(block) for block in found):
        return
    folder = tmp_path / "folder"
    shutil.copytree(shown, folder, symlinks=True)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "snippet"}
    for block in found:
        if block.not_run is not None:
            continue
        if block.language in ("", "sh", "bash"):
            for out in re.findall(r"--out (\S+)", block.text):  # a block shows how from the beginning
                shutil.rmtree(folder / out, ignore_errors=True)
            for line in lines(block):
                check_line(line)
        elif block.language == "python":
            optional = [name for name in OPTIONAL if re.search(rf"^(import|from) {name}\b", block.text, re.MULTILINE)]
            if all(importlib.util.find_spec(name) for name in optional):
                # As many lines before it as in the file: a traceback names the line there.
                code = compile("\n" * block.line + block.text, str(path), "exec")
                exec(code, names)  # noqa: S102  (that is the test)
        elif block.language == "toml":
            (folder / block.text.partition("\n")[0].removeprefix("# ")).write_text(block.text, encoding="utf-8")
        else:
            raise AssertionError(f"{path.name}, line {block.line}: a block of {block.language!r} is run by nothing")


def test_the_reader_of_blocks() -> None:
    markdown = (
        "# A\n```python\nx = 1\n```\n<!-- not run: no network -->\n```\nobce run A B  # why\n```\ntext\n"
        "```\nOBCE_CUDA=0 make test && make lint\nobce plan a \\\n  --b\n```\n```\na formula\n```\n"
        "<!-- not run: lost -->\n\ntext\n\n```python\ny\n```\n"
    )
    first, second, third, fourth, fifth = blocks(markdown)
    assert (first.language, first.text, first.line, first.not_run) == ("python", "x = 1\n", 2, None)
    assert second.not_run == "no network" and lines(second) == ["obce run A B"]
    assert third.not_run is None and lines(third) == ["OBCE_CUDA=0 make test", "make lint", "obce plan a    --b"]
    assert lines(fourth) == [] and fifth.not_run is None


@pytest.mark.parametrize(
    "line", ["make nothing", "make fuzz NOTHING=1", "pip install '.[nothing]'", "python nothing.py", "obce nothing"]
)
def test_a_line_that_is_wrong_is_seen(line: str) -> None:
    with pytest.raises(AssertionError):
        check_line(line)


# ---- links ----------------------------------------------------------------------------------------------------------


def links(markdown: str) -> Iterator[str]:
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        for child in token.children or []:
            if child.type in ("link_open", "image"):
                yield str(child.attrGet("href") or child.attrGet("src"))


def anchors(markdown: str) -> set[str]:
    """The names of its headings, as GitHub makes them."""
    tokens = MarkdownIt("commonmark").parse(markdown)
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(path: Path) -> list[str]:
    found = []
    for link in links(path.read_text("utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text("utf-8"))):
            found.append(link)
    return found


@pytest.mark.parametrize("path", [*FILES, RESULTS, ROOT / "examples" / "README.md"], ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken(path) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`, c\n[x](nothing.md) [y](#a-b-c) [z](#a) [w](page.md#a-b-c) ![v](no.png) [u](https://x.y)\n"
    )
    assert broken(page) == ["nothing.md", "#a", "no.png"]


def test_every_page_stands_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert [p.name for p in ROOT.glob("docs/*.md") if f"docs/{p.name}" not in nav] == []


def test_names_of_commands_are_the_command_lines() -> None:
    """`CHEAPER` cuts commands that there are."""
    assert set(CHEAPER) <= {command.name for command in app.registered_commands}
    assert sys.version_info >= (3, 11)
