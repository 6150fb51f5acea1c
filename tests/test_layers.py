"""The one-way flow of imports: a module may import only what stands below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "obce"

# Lowest first; modules of one line do not import each other.
FLOW = (
    ("kernels", "_cpu", "_cuda", "files", "sitemap_obce"),
    ("reference", "cuda"),
    ("backends", "gradients"),
    ("operators",),
    ("h0",),
    ("transformer", "dropins"),
    ("images",),
    ("sites", "corpus"),
    ("sketch", "clouds", "world", "splits"),
    ("device",),
    ("packing",),
    ("capture", "scores"),
    ("effects", "repair"),
    ("scoring", "plan"),
    ("heads", "removal"),
    ("explain",),
    ("pages",),
    ("configuration_obce", "checkpoint_obce"),
    ("modeling_obce",),
    ("modeling_obce_mapped",),
    ("prune",),
    ("sensitivity",),
    ("evaluate", "glue", "report", "bench", "pictures", "export"),
    ("finetune", "layernorm", "card"),
    ("compare",),
    ("run",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(FLOW) for name in names}
# `__init__` and `auto_classes` are the package's face: they name modules as text and import them on first use.
FACE = {"__init__", "auto_classes"}
# These are copied into checkpoints, where no obce is installed.
SELF_CONTAINED = {
    "checkpoint_obce": set(),
    "configuration_obce": set(),
    "modeling_obce": {"checkpoint_obce", "configuration_obce"},
    "modeling_obce_mapped": {"configuration_obce", "modeling_obce", "sitemap_obce"},
    "sitemap_obce": set(),
}


def imports_of(path: Path) -> set[str]:
    """Modules of obce that a file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("obce.")}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 1:
                found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
            elif node.module == "obce":
                found |= {alias.name for alias in node.names if not alias.name.startswith("__")}
            elif node.module and node.module.startswith("obce."):
                found.add(node.module.split(".")[1])
    return found


def modules() -> list[Path]:
    files = [path for path in PACKAGE.glob("*.py") if path.stem not in FACE]
    return [*files, PACKAGE / "kernels" / "__init__.py"]


def name_of(path: Path) -> str:
    return path.parent.name if path.stem == "__init__" else path.stem


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_point_downwards(path: Path) -> None:
    name = name_of(path)
    assert name in LEVEL, f"{name} has no place in the flow: add it to FLOW"
    for imported in imports_of(path):
        assert imported in LEVEL, f"{name} imports {imported}, which has no place in the flow"
        assert LEVEL[imported] < LEVEL[name], f"{name} imports {imported}, which does not stand below it"


@pytest.mark.parametrize("name", SELF_CONTAINED)
def test_checkpoint_files_are_self_contained(name: str) -> None:
    assert imports_of(PACKAGE / f"{name}.py") == SELF_CONTAINED[name]


def test_the_check_sees_an_upward_import(tmp_path: Path) -> None:
    file = tmp_path / "h0.py"
    file.write_text(
        "def f():\n from obce.cli import main\n from obce import plan\n import obce.run\n from .scores import x\n"
    )
    assert imports_of(file) == {"cli", "plan", "run", "scores"}
    assert any(LEVEL[name] > LEVEL["h0"] for name in imports_of(file))


def test_no_module_called_helpers() -> None:
    assert not {path.stem for path in PACKAGE.rglob("*.py")} & {"utils", "helpers", "common", "misc"}
