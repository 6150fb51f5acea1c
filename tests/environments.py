"""Makes environments under build/environments, installs the wheel in each, tries it there, and writes what happened.

    python tests/environments.py                        # make environments: all, and docs/environments.md
    python tests/environments.py --only engine plain    # some, printed only

Gigabytes: old releases of torch come with CUDA's libraries. Environments that share a torch share a folder, in which
transformers and numpy are changed; each folder is removed when it is done. Needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "environments"
OLDEST = {"torch": "2.6.0", "transformers": "5.14.*", "numpy": "2.0.*"}
KNOWN = "2.13.0"  # torch of requirements/dev.txt
PYTHONS = ("3.12", "3.13", "3.14")
IMPORT_SECONDS = 0.3
EXPLAINED = """\
`engine`: numpy and scipy, neither torch nor transformers. `no compiler`: the source archive, where the C++ compiler
fails. `plain`: what `pip install obce` brings, without triton, datasets, scikit-learn, matplotlib and onnx; what
needs one of them says so. All but the first two score, plan, prune and save a tiny random BERT, and open it in
another process. In each of them single linkage is scipy's, the reference gives the same bits, and `import obce`
imports neither torch, transformers, numpy nor scipy.
"""


@dataclass
class Environment:
    """One row of the report.

    Attributes:
        name: for --only and the table.
        packages: requirements that are installed before the wheel; the wheel brings what they lack, unless alone.
        smoke: the function of SMOKES that is run.
        folder: environments that name the same one share it.
        python: the interpreter.
        alone: the wheel is installed without its requirements.
        compiler: False: built from the source archive where no compiler works.
        without: packages that are taken away again.
    """

    name: str
    packages: list[str]
    smoke: str
    folder: str
    python: str = sys.executable
    alone: bool = False
    compiler: bool = True
    without: tuple[str, ...] = ()
    row: dict[str, Any] = field(default_factory=dict)


def environments() -> list[Environment]:
    found = [
        Environment("engine", ["numpy", "scipy"], "engine", "engine", alone=True),
        Environment(
            "no compiler", ["numpy", "scipy", "setuptools", "pybind11"], "reference", "bare", alone=True, compiler=False
        ),
        Environment("plain", [f"torch=={KNOWN}"], "plain", f"torch-{KNOWN}", without=("triton",)),
    ]
    for torch, transformers, numpy in itertools.product(
        (KNOWN, OLDEST["torch"]), (OLDEST["transformers"], ""), (OLDEST["numpy"], "")
    ):
        packages = [f"torch=={torch}", *(f"{k}=={v}" if v else k for k, v in _pair(transformers, numpy))]
        name = f"torch {torch}, transformers {transformers or 'newest'}, numpy {numpy or 'newest'}"
        found.append(Environment(name, packages, "models", f"torch-{torch}"))
    found.append(Environment("all newest", ["torch", "transformers", "numpy"], "models", "newest"))
    pythons = ((version, find_python(version)) for version in PYTHONS)
    found += [Environment(f"Python {v}", ["torch"], "models", f"python-{v}", python) for v, python in pythons if python]
    return found


def _pair(transformers: str, numpy: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("transformers", transformers), ("numpy", numpy)


def find_python(version: str) -> str | None:
    """An interpreter of that version: from PATH, else pyenv's."""
    candidates = [shutil.which(f"python{version}")]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates += [str(p) for p in sorted(pyenv.glob(f"{version}*/bin/python{version}"), reverse=True)]
    for candidate in filter(None, candidates):
        done = subprocess.run([candidate, "-c", "import ssl, venv"], check=False, capture_output=True)
        if done.returncode == 0:
            return candidate
    return None


def run(*command: str, **env: str) -> str:
    """Standard output and error; a command that fails raises with the end of them."""
    done = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **env}
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:6])} ended with {done.returncode}: {done.stdout[-3000:]}")
    return done.stdout


def make(folder: str, python: str, *packages: str) -> str:
    """The interpreter of a fresh environment, or of the one that is there, with the packages installed."""
    place = WORK / folder
    if not place.exists():
        run(python, "-m", "venv", str(place))
    inside = str(place / "bin" / "python")
    if packages:
        run(inside, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages)
    return inside


def build(python: str, folder: str, source: str, no_compiler: bool = False) -> tuple[Path, str]:
    """A wheel of the source archive, made where only setuptools and pybind11 are; and what was said meanwhile."""
    builder = make(folder, python, "setuptools>=77", "pybind11>=2.13", "wheel")
    seen = run(builder, "-c", "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('numpy'))")
    assert seen.split() == ["None", "None"], seen
    out = WORK / "wheels" / (folder + ("-no-compiler" if no_compiler else ""))
    env = {
        "OBCE_CUDA": os.environ.get("OBCE_CUDA", "0"),
        **({"CC": "/bin/false", "CXX": "/bin/false"} if no_compiler else {}),
    }
    said = run(builder, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", str(out), source, **env)
    (wheel,) = out.glob("obce-*.whl")
    return wheel, said


def sources() -> str:
    builder = make("build", sys.executable, "setuptools>=77", "pybind11>=2.13", "wheel")
    copy = WORK / "checkout"  # setuptools writes beside its sources
    for name in ("csrc", "kernels", "obce"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    run("sh", "-c", f"cd '{copy}' && '{builder}' setup.py -q sdist -d '{WORK / 'sdist'}'")
    (archive,) = (WORK / "sdist").glob("obce-*.tar.gz")
    return str(archive)


def audit(wheel: Path) -> str:
    """What auditwheel says of a wheel: the tag, and what it links."""
    tool = make("audit", sys.executable, "auditwheel")
    said = " ".join(run(tool, "-m", "auditwheel", "show", str(wheel)).split())
    tag = re.search(r'platform tag: "(\w+)"', said)
    links = re.search(r"shared libraries: (.*?)\. ?This", said + " This")
    libraries = sorted(set(re.findall(r"\blib[\w+]+\.so[.\d]*", links.group(1) if links else "")))
    return f"`{tag.group(1) if tag else said}`, links {', '.join(f'`{one}`' for one in libraries) or 'nothing'}"


# What is tried inside an environment ---------------------------------------------------------------------------------


def imports(*modules: str) -> float:
    """Median seconds of `import obce` in fresh processes, none of which imported the modules."""
    code = (
        "import sys, time; start = time.perf_counter(); import obce; took = time.perf_counter() - start\n"
        f"assert not set({modules!r}) & set(sys.modules), 'import obce imported more'\nprint(took)"
    )
    seconds = statistics.median(float(run(sys.executable, "-c", code)) for _ in range(7))
    assert seconds < IMPORT_SECONDS, f"import obce takes {seconds:.2f} s"
    return seconds


def must_refuse(call: Callable[[], object], *words: str) -> None:
    """The call must fail with a sentence that holds the words."""
    said = "nothing was refused"
    try:
        call()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    if not all(word in said for word in words):
        raise AssertionError(f"{said}; expected a sentence with {words}")


def try_engine(backend: str) -> None:
    import numpy as np
    import obce
    from scipy.cluster.hierarchy import linkage

    g = np.random.default_rng(0)
    clouds = g.standard_normal((3, 200, 3))
    found = obce.h0(clouds, edges=True)
    assert found.backend == backend, f"{found.backend} answered, expected {backend}"
    for i, cloud in enumerate(clouds):
        np.testing.assert_allclose(found.linkage(i), linkage(cloud, "single"), rtol=1e-12)
        np.testing.assert_array_equal(obce.linkage(cloud), found.linkage(i))
    np.testing.assert_array_equal(obce.h0(clouds, backend="reference").deaths, found.deaths)
    lines = g.standard_normal((5, 300)).astype(np.float32)
    assert (obce.r_f(lines) == np.diff(np.sort(lines), axis=1).max(1)).all()


def smoke_engine() -> dict[str, Any]:
    """numpy and scipy alone: the engine answers, what needs models says so."""
    import numpy as np
    import obce

    seconds = imports("torch", "transformers", "numpy", "scipy")
    try_engine("cpu")
    assert importlib.util.find_spec("torch") is None and importlib.util.find_spec("transformers") is None
    must_refuse(lambda: obce.score(None, None, None), "obce.score needs the package torch, which is not installed")
    must_refuse(obce.H0Transformer, "H0Transformer needs scikit-learn", "pip install scikit-learn")
    must_refuse(lambda: obce.h0(np.zeros((3, 2)), backend="triton"), "triton")
    return {"seconds": seconds}


def smoke_reference() -> dict[str, Any]:
    """Without the compiled engine."""
    import obce

    assert importlib.util.find_spec("obce._cpu") is None
    seconds = imports("torch", "transformers", "numpy", "scipy")
    try_engine("reference")
    must_refuse(lambda: obce.h0([[0.0], [1.0]], backend="cpu"), "obce._cpu is not built")
    return {"seconds": seconds}


def smoke_plain() -> dict[str, Any]:
    """What `pip install` gives: no triton, datasets, scikit-learn, matplotlib, onnx."""
    import numpy as np
    import obce
    from obce import pictures
    from obce.corpus import read_corpus

    for name in ("triton", "datasets", "sklearn", "matplotlib", "onnx"):
        assert importlib.util.find_spec(name) is None, f"{name} is there, so nothing is shown of its absence"
    must_refuse(lambda: obce.h0([[0.0], [1.0]], backend="triton"), "triton")
    must_refuse(obce.H0Transformer, "H0Transformer needs scikit-learn")
    must_refuse(lambda: read_corpus("some/dataset"), "datasets")
    must_refuse(lambda: pictures.barcode(np.ones(3)), "need the package matplotlib", "pip install")
    return smoke_models()


def smoke_models() -> dict[str, Any]:
    """A tiny random BERT is scored, planned, pruned, saved, and opened in another process."""
    import obce

    seconds = imports("torch", "transformers", "numpy", "scipy")
    try_engine("cpu")
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = [
        "river",
        "stone",
        "music",
        "city",
        "light",
        "house",
        "road",
        "north",
        "old",
        "new",
        "water",
        "song",
        "film",
    ]
    texts = [" ".join(words[(i * k + k) % len(words)] for k in range(1, 4 + i % 9)) + f" {i}" for i in range(60)]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.txt"
        pieces = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            *words,
            *"0123456789",
            *(f"##{c}" for c in "0123456789"),
        ]
        vocabulary.write_text("\n".join(pieces) + "\n", "utf-8")
        tokenizer = BertTokenizerFast(vocab=str(vocabulary))
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(
                vocab_size=len(pieces),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                max_position_embeddings=32,
                initializer_range=0.25,
            )
        ).eval()
        scores = obce.score(model, tokenizer, texts)
        plan = obce.plan(scores, model, keep=0.5, of="encoder")
        small = obce.prune(model, plan, texts=texts, tokenizer=tokenizer).eval()
        assert small.num_parameters() < model.num_parameters()
        small.save_pretrained(f"{folder}/small")
        tokenizer.save_pretrained(f"{folder}/small")
        inputs = tokenizer(texts[:4], padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = small(**inputs).last_hidden_state
        torch.save({"inputs": dict(inputs), "expected": expected}, f"{folder}/outputs.pt")
        code = (
            "import obce, torch, sys\nfrom transformers import AutoModel\n"
            "kept = torch.load(sys.argv[1] + '/outputs.pt', weights_only=True)\n"
            "model = AutoModel.from_pretrained(sys.argv[1] + '/small').eval()\n"
            "with torch.no_grad(): found = model(**kept['inputs']).last_hidden_state\n"
            "assert torch.equal(found, kept['expected']), (found - kept['expected']).abs().max()\n"
        )
        run(sys.executable, "-c", code, folder, HF_HUB_OFFLINE="1")
    deaths = obce.h0(torch.randn(2, 30, 3, requires_grad=True)).deaths
    deaths.sum().backward()
    return {"seconds": seconds}


SMOKES: dict[str, Callable[[], dict[str, Any]]] = {
    "engine": smoke_engine,
    "reference": smoke_reference,
    "plain": smoke_plain,
    "models": smoke_models,
}


def facts(smoke: str) -> dict[str, Any]:
    found = SMOKES[smoke]()
    for name in ("torch", "transformers", "numpy", "scipy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "-"
    return {**found, "python": platform.python_version()}


# The report ----------------------------------------------------------------------------------------------------------


def check_versions(one: Environment) -> None:
    """The environment was what its name says."""
    for package in one.packages:
        name, _, wanted = package.partition("==")
        found = one.row.get(name, "")
        if wanted and not fnmatch(found.partition("+")[0], wanted):
            raise AssertionError(f"{name} {found} was there, expected {wanted}")
        if not wanted and name in OLDEST and fnmatch(found, OLDEST[name]):
            raise AssertionError(f"{name} {found} was there, expected the newest")


def attempt(one: Environment, archive: str, wheels: dict[str, Path]) -> None:
    """Fills the row."""
    try:
        inside = make(one.folder, one.python, *one.packages)
        if one.compiler:
            if one.python not in wheels:
                wheels[one.python], _ = build(one.python, f"build-{one.folder}", archive)
            install = [str(wheels[one.python])]
        else:
            wheel, said = build(one.python, "build", archive, no_compiler=True)
            assert "no C++17 compiler like gcc or clang found" in said, said[-2000:]
            install = [str(wheel)]
        options = ["--no-deps"] if one.alone else []
        run(inside, "-m", "pip", "install", "-q", *options, "--force-reinstall", "--no-deps", *install)
        if not one.alone:
            asked = ("--upgrade", *install, *one.packages)  # what is there already may be older than "newest"
            run(inside, "-m", "pip", "install", "-q", "--disable-pip-version-check", *asked)
        if one.without:
            run(inside, "-m", "pip", "uninstall", "-q", "-y", *one.without)
        said = run(inside, "-P", str(Path(__file__).resolve()), "--smoke", one.smoke, HF_HUB_OFFLINE="1")
        one.row = {**json.loads(said.strip().splitlines()[-1]), "result": "works"}
        check_versions(one)
    except (RuntimeError, AssertionError, OSError, ValueError) as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        one.row = {"result": f"FAILS: {lines[-1].strip()[:300]}" if lines else f"FAILS: {error!r}"}
        (WORK / "failures.txt").open("a").write(f"== {one.name}\n{error}\n")


def markdown(done: list[Environment], wheel: Path, absent: list[str]) -> Iterator[str]:
    binaries = [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")]
    yield "# Where it was tried\n"
    system = f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}"
    yield f"Written by `make environments` on {datetime.date.today()}, {system}.\n"
    yield "| environment | Python | torch | transformers | numpy | `import obce` | result |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for one in done:
        seconds = f"{one.row['seconds'] * 1000:.0f} ms" if "seconds" in one.row else ""
        cells = [str(one.row.get(k, "")) for k in ("python", "torch", "transformers", "numpy")]
        yield f"| {one.name} | {' | '.join(cells)} | {seconds} | {one.row['result'].replace('|', '/')} |"
    yield ""
    if absent:
        yield f"Not on this machine, so not tried: Python {', '.join(absent)}.\n"
    yield EXPLAINED
    yield f"The wheel holds {', '.join(f'`{n}`' for n in binaries)}. auditwheel: {audit(wheel)}."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="environments whose name holds one of these words")
    parser.add_argument("--out", type=Path, help="write the report here")
    parser.add_argument("--smoke", choices=SMOKES, help="what the environments themselves run")
    asked = parser.parse_args()
    if asked.smoke:
        print(json.dumps(facts(asked.smoke)))
        return 0
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    archive = sources()
    wheels: dict[str, Path] = {}
    chosen = [e for e in environments() if not asked.only or any(word in e.name for word in asked.only)]
    for i, one in enumerate(chosen):
        attempt(one, archive, wheels)
        print(f"{one.name}: {one.row['result']}", flush=True)
        if one.folder not in {later.folder for later in chosen[i + 1 :]}:
            shutil.rmtree(WORK / one.folder, ignore_errors=True)
    if sys.executable not in wheels:
        wheels[sys.executable], _ = build(sys.executable, "build", archive)
    report = "\n".join(markdown(chosen, wheels[sys.executable], [v for v in PYTHONS if find_python(v) is None])) + "\n"
    print(report)
    if asked.out:
        asked.out.write_text(report, "utf-8")
    return int(any(one.row["result"] != "works" for one in chosen))


if __name__ == "__main__":
    raise SystemExit(main())
