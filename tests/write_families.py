"""Writes docs/families.md: every family, every way to load what was cut from it, each tried.

    python tests/write_families.py [FAMILY ...]

A tiny random model of each family is scored, planned, cut to 60 % of its encoder, repaired by least squares, and
opened in every way. A cell is the greatest difference in outputs from the pruned model in memory; a way that fails ends
the command. With families named, the rows of the others stay as they are on the page.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import obce
import pytest
import torch
import transformers
from obce import export
from obce.corpus import tokenize
from obce.prune import masked, prune
from obce.run import load_model
from obce.sites import usable_max_length

from conftest import make_texts, make_tiny_tokenizer
from test_families import HEADS_OF, given_to
from tiny import PREFIXES, classifier_of, make_encoder

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "families.md"

# In a process that cannot import obce.
OPENED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "obce":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch, transformers
folder, inputs, out, remote, auto = sys.argv[1:]
auto = getattr(transformers, auto)
opened = auto.from_pretrained(folder, trust_remote_code=remote == "remote")
with torch.no_grad():
    torch.save(opened.eval()(**torch.load(inputs)).logits, out)
"""

# Family -> why it has no zero-filled dense form after a repair.
NO_DENSE = {"qwen3": "none: no bias in its MLP"}

TEXT = """# Families and ways to load

Written by `python tests/write_families.py`, which tries each cell: a tiny random model of the family with a head for
classification is scored, planned, cut to 60 % of its encoder and repaired by least squares; then it is opened in every
way. A cell is the greatest difference in its logits from the pruned model in memory (float32; 0 means the same bits).
[load.md](load.md) says how each way is used, [method.md](method.md#models) what is particular to a family.

{table}

- **pruned, masked**: the dense model with the same neurons replaced, beside the pruned one.
- **`import obce`**: `AutoModelForSequenceClassification.from_pretrained` after `import obce`
  (`AutoModelForImageClassification` for vit, which reads pictures).
- **its own code**: `trust_remote_code=True` in a process that has no obce.
- **ONNX**: onnxruntime, three shapes of batch and length (of vit three batches).
- **dense, zeros**: the family's own class of transformers (of Qwen2 a Llama with biases, which is the same) in a
  process that has no obce. A Qwen3 has such a form where it was pruned with `repair="none"`: constants need a bias.
- **heads**: the family's heads that are cut, saved and loaded in `tests/test_families.py`.

transformers {transformers}, torch {torch}. Other families need a [site map](sites.md), or are
refused with the reason ([method.md](method.md#models)).
"""


def main() -> None:
    texts = make_texts(120)
    tokenizer = make_tiny_tokenizer(Path(tempfile.mkdtemp()))
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    named = sys.argv[1:] or list(PREFIXES)
    stand = [
        line.strip("| \n").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"
    ]
    written = {cells[0]: cells for cells in stand}
    lines = []
    for family in PREFIXES:
        lines.append(row(family, tokenizer, texts) if family in named else written[family])
        print(lines[-1], flush=True)
    head = ["family", "pruned, masked", "`import obce`", "its own code", "ONNX", "dense, zeros", "heads"]
    table = "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])
    page = TEXT.format(table=table, transformers=transformers.__version__, torch=torch.__version__)
    PAGE.write_text(page, encoding="utf-8")
    print(PAGE)


def row(family: str, tokenizer: Any, texts: list[str]) -> list[str]:
    model = make_encoder(family, classifier_of(family))
    given = given_to(family, tokenizer, texts)
    scores = obce.score(model, **given)
    plan = obce.plan(scores, model, keep=0.6, of="encoder")
    small: Any = prune(model, plan, **given, ridge=0.1)
    tokens = usable_max_length(model, tokenizer)
    (batch,) = tokenize(given["texts"].entries(range(5)), given["tokenizer"], max_length=tokens)
    inputs, auto = batch.inputs, f"AutoModelFor{classifier_of(family)}"

    @torch.no_grad()
    def says(one: Any) -> torch.Tensor:
        return one(**inputs).logits

    expected = says(small)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        places = {way: Path(folder) / way for way in ("own", "remote", "onnx", "dense")}
        for place in places.values():
            place.mkdir()
        with masked(model, plan, **given, ridge=0.1):
            replaced = says(model)
        small.save_pretrained(places["own"])
        own = getattr(transformers, auto).from_pretrained(places["own"]).eval()
        assert torch.equal(says(load_model(places["own"], pruned=True)), says(own))
        export.remote_code(small, places["remote"])
        ways = ["remote"] if family in NO_DENSE else ["remote", "dense"]
        if family not in NO_DENSE:
            export.dense(small, places["dense"], plan=plan)
        found = [replaced, says(own)]
        torch.save(inputs, Path(folder) / "inputs.pt")
        for way in ways:
            out = Path(folder) / f"{way}.pt"
            command = [sys.executable, "-P", "-c", OPENED, str(places[way]), f"{folder}/inputs.pt", str(out), way, auto]
            subprocess.run(command, check=True, capture_output=True, cwd=folder)
            found.append(torch.load(out))
        onnx = export.onnx(small, places["onnx"], given["tokenizer"])
    differences = [float((one - expected).abs().max()) for one in found]
    differences.insert(3, onnx)
    limits = (1e-5, 0.0, 0.0, 1e-5, 1e-5)
    names = ("masked", "own", "code", "ONNX", "dense")[: len(differences)]
    for name, difference, limit in zip(names, differences, limits[: len(names)], strict=True):
        if not difference <= limit:
            raise AssertionError(
                f"{family}, {name}: {difference:.2g} from the pruned model, expected at most {limit:g}"
            )
    cells = [f"{one:.0e}" if one else "0" for one in differences]
    if family in NO_DENSE:
        with pytest.raises(ValueError, match="so it has no dense form"):
            export.to_dense(small, plan)
        cells.append(NO_DENSE[family])
    return [family, *cells, ", ".join(HEADS_OF[family])]


if __name__ == "__main__":
    main()
