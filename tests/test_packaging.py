"""Wheel, source archive and editable installs all find obce.kernels.pairwise, and none ships a module `kernels`."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
for package in ("setuptools", "pybind11", "wheel"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed, so nothing can be built here", allow_module_level=True)

LOOK = (
    "import importlib.util, sys\n"
    "import obce.kernels\n"
    "assert 'triton' not in sys.modules\n"
    "print(obce.__file__)\n"
    "print(importlib.util.find_spec('obce.kernels.pairwise').origin)\n"
    "spec = importlib.util.find_spec('obce._cpu')\n"
    "print(spec.origin if spec else None)\n"
)


def look(code: str, cwd: Path, *paths: Path, after: str = "") -> list[str]:
    """Lines printed by code in a process that sees `paths` and this environment's packages, but none of its .pth
    files: obce may be installed here in editable mode, and its finder would answer first."""
    path = [str(p) for p in paths]
    first = f"import sys\nsys.path[:0] = {path!r}\nsys.path.append({sysconfig.get_path('purelib')!r})\n{after}"
    return run(sys.executable, "-S", "-P", "-c", first + code, cwd=cwd).split("\n")


def run(*command: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is needed to build, without the compiled module that may lie in the real one."""
    import shutil

    copy = tmp_path_factory.mktemp("checkout") / "obce"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "build", "dist", "*.egg-info")
    for name in ("csrc", "kernels", "obce"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / file).is_file():
            shutil.copy(ROOT / file, copy / file)
    return copy


def no_compiler(folder: Path) -> str:
    """A compiler that fails, to stand for none."""
    fake = folder / "no-compiler"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    return str(fake)


def build_wheel(checkout: Path, out: Path, **env: str) -> tuple[Path, str]:
    log = run(
        *(
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-v",
            "--no-build-isolation",
            "--no-deps",
            "-w",
            str(out),
            ".",
        ),
        cwd=checkout,
        **env,
    )
    (wheel,) = out.glob("obce-*.whl")
    return wheel, log


def test_wheel_without_a_compiler_still_answers(checkout: Path, tmp_path: Path) -> None:
    fake = no_compiler(tmp_path)
    wheel, log = build_wheel(checkout, tmp_path / "out", CC=fake, CXX=fake)
    assert "no C++17 compiler like gcc or clang found" in log
    names = zipfile.ZipFile(wheel).namelist()
    assert "obce/kernels/pairwise.py" in names
    assert "obce/kernels/__init__.py" in names
    assert not [n for n in names if n.startswith(("kernels/", "csrc/")) or ("_cpu." in n and not n.endswith(".pyi"))]
    site = tmp_path / "site"
    run(sys.executable, "-m", "zipfile", "-e", str(wheel), str(site), cwd=tmp_path)
    code = "from obce.h0 import r_f, h0_line\nassert h0_line([0., 1., 3.]).backend == 'reference'\n"
    assert look(LOOK + code, tmp_path, site)[:3] == [
        str(site / "obce" / "__init__.py"),
        str(site / "obce" / "kernels" / "pairwise.py"),
        "None",
    ]


def test_a_compile_error_is_not_taken_for_a_missing_compiler(checkout: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(checkout, broken, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    (broken / "csrc" / "bind_cpu.cpp").write_text("this is no C++\n")
    for source in (broken / "csrc").glob("ph0_cpu*.cpp"):
        source.unlink()
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    env = {**os.environ, "OBCE_CUDA": "0"}
    done = subprocess.run(command, cwd=broken, check=False, capture_output=True, text=True, timeout=300, env=env)
    if "no C++17 compiler" in done.stderr:
        pytest.skip("there is no compiler on this machine")
    assert done.returncode != 0
    assert "bind_cpu.cpp" in done.stdout + done.stderr


def build_with(checkout: Path, folder: Path, nvcc: str | None, wish: str) -> subprocess.CompletedProcess[str]:
    """Builds with a C++ compiler that makes empty files and with `nvcc`, a script; None: there is none."""
    compiler = folder / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n')
    compiler.chmod(0o755)
    home = folder / "cuda"
    (home / "bin").mkdir(parents=True)
    if nvcc is not None:
        script = home / "bin" / "nvcc"
        script.write_text(f"#!/bin/sh\n{nvcc}\n")
        script.chmod(0o755)
    env = {**os.environ, "CC": str(compiler), "CXX": str(compiler), "OBCE_CUDA": wish, "CUDA_HOME": str(home)}
    if nvcc is None:
        env["PATH"] = os.pathsep.join(p for p in env["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists())
        env["PATH"] += os.pathsep + "/bin"
    command = (sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "lib"))
    command += ("--build-temp", str(folder / "temp"))
    return subprocess.run(command, cwd=checkout, check=False, capture_output=True, text=True, timeout=300, env=env)


WORKING_NVCC = """
case "$*" in
  *--list-gpu-arch*) printf 'compute_80\ncompute_90\n' ;;
  *--dryrun*) echo '#$ TOP=/opt/cuda' ;;
  *--version*) echo one ;;
  *) echo "$*" >> "$(dirname "$0")/calls"; while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done ;;
esac
"""
BROKEN_NVCC = WORKING_NVCC.replace('echo "$*"', "echo unsupported GNU version; exit 1; echo").replace(
    "echo one", "echo two"
)
DEAD_NVCC = "echo no licence; exit 2"
# Each file's call waits for that of another.
WAITING_NVCC = WORKING_NVCC.replace(
    'echo "$*"',
    ': > "$0.$$"; i=0; until ls "$0".* | grep -vq "$0.$$"; do i=$((i + 1)); [ $i -lt 50 ] || exit 1; sleep 0.1; done; '
    'echo "$*"',
)


@pytest.mark.parametrize(
    ("nvcc", "wish", "built", "said"),
    [
        (WORKING_NVCC, "", True, ""),
        (WORKING_NVCC, "1", True, ""),
        (WORKING_NVCC, "0", False, ""),
        (WORKING_NVCC, "yes", None, "OBCE_CUDA is 'yes', expected 0, 1 or nothing."),
        (None, "", False, ""),
        (None, "1", None, "OBCE_CUDA is 1 and there is no nvcc in CUDA_HOME or PATH; install the CUDA toolkit."),
        (BROKEN_NVCC, "", False, "cannot build it: unsupported GNU version"),
        (BROKEN_NVCC, "1", None, "cannot build the CUDA engine: unsupported GNU version"),
        (DEAD_NVCC, "", False, "cannot build it: no licence"),
        pytest.param(
            *(WAITING_NVCC, "1", True, ""),
            marks=pytest.mark.skipif(os.cpu_count() == 1, reason="one processor: nothing runs side by side"),
        ),
    ],
    ids=[
        "found",
        "asked",
        "forbidden",
        "unclear",
        "absent",
        "asked-absent",
        "broken",
        "asked-broken",
        "dead",
        "waiting",
    ],
)
def test_cuda_engine_is_built_as_asked(
    checkout: Path, tmp_path: Path, nvcc: str | None, wish: str, built: bool | None, said: str
) -> None:
    done = build_with(checkout, tmp_path, nvcc, wish)
    assert said in done.stderr
    assert (done.returncode == 0) == (built is not None), done.stderr
    assert bool(list((tmp_path / "lib").rglob("_cuda*.so"))) == bool(built)
    assert bool(list((tmp_path / "lib").rglob("_cpu*.so"))) == (built is not None)
    calls = tmp_path / "cuda" / "bin" / "calls"
    if built and not wish:  # and nothing is kept from a build before
        # What this compiler knows of the wished targets, and code for what comes later.
        assert "arch=compute_80,code=sm_80" in calls.read_text()
        assert "arch=compute_90,code=compute_90" in calls.read_text()
        assert "sm_120" not in calls.read_text()


@pytest.mark.parametrize("mode", ["lenient", "strict", "compat"])
def test_editable_install_finds_the_kernels_in_the_checkout(checkout: Path, tmp_path: Path, mode: str) -> None:
    fake = no_compiler(tmp_path)  # the compiled module plays no part here and takes half a minute
    prefix = tmp_path / "site"
    run(
        *(
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-build-isolation",
            "--no-deps",
            "--target",
            str(prefix),
        ),
        *("--config-settings", f"editable_mode={mode}", "-e", "."),
        cwd=checkout,
        CC=fake,
        CXX=fake,
    )
    found = look(LOOK, tmp_path, prefix, after=f"import site\nsite.addsitedir({str(prefix)!r})\n")
    assert Path(found[1]).samefile(checkout / "kernels" / "pairwise.py")


def test_source_archive_holds_all_that_a_build_reads(checkout: Path, tmp_path: Path) -> None:
    run(sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path), cwd=checkout)
    (archive,) = tmp_path.glob("obce-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {n.split("/", 1)[1] for n in tar.getnames() if "/" in n}
    wanted = {str(p.relative_to(checkout)) for p in (*checkout.glob("csrc/*"), *checkout.glob("kernels/*.py"))}
    assert wanted and wanted <= names
    assert {"setup.py", "pyproject.toml", "obce/h0.py", "obce/kernels/__init__.py", "obce/_cpu.pyi"} <= names
    assert not [n for n in names if n.endswith(".so")]


def test_kernels_folder_is_no_package() -> None:
    # transformers imports a distribution called `kernels`; with an __init__.py ours would take its place.
    assert (ROOT / "kernels" / "pairwise.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_a_foreign_kernels_folder_beside_the_package_is_left_alone(checkout: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(checkout / "obce", tmp_path / "site" / "obce")
    (tmp_path / "site" / "kernels").mkdir()
    (tmp_path / "site" / "kernels" / "layer.py").write_text("")
    code = "import obce.kernels; print(list(obce.kernels.__path__))"
    found = look(code, tmp_path, tmp_path / "site")
    assert found[0] == str([str(tmp_path / "site" / "obce" / "kernels")])


@pytest.mark.parametrize("command", [("sdist",), ("bdist_wheel",)], ids=["sdist", "wheel"])
def test_building_needs_neither_torch_nor_numpy(checkout: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    for name in ("torch", "numpy", "transformers", "scipy"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the build imported {name}')\n")
    fake = no_compiler(tmp_path)
    run(
        *(sys.executable, "setup.py", "-q", *command, "-d", str(tmp_path / "out")),
        cwd=checkout,
        PYTHONPATH=str(tmp_path),
        CC=fake,
        CXX=fake,
    )
    assert len(list((tmp_path / "out").iterdir())) == 1


HEAVY = ("numpy", "scipy", "torch", "transformers", "sklearn", "triton", "pyarrow", "typer", "rich")


def test_import_is_fast_and_imports_nothing_else() -> None:
    code = (
        "import sys, time; start = time.process_time(); import obce; took = time.process_time() - start\n"
        f"print(took, *set({HEAVY!r}) & set(sys.modules))"
    )
    told = [run(sys.executable, "-P", "-c", code, cwd=ROOT).split() for _ in range(5)]
    assert [names for _, *names in told] == [[]] * 5
    assert statistics.median(float(seconds) for seconds, *_ in told) < 0.3


def test_numpy_is_all_that_the_engine_imports() -> None:
    code = (
        "import sys, obce; obce.h0([[0.0, 1.0], [2.0, 3.0]], edges=True).deaths; obce.r_f([0.0, 1.0])\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    assert run(sys.executable, "-P", "-c", code, cwd=ROOT) == "['numpy']\n"


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_what_needs_a_missing_package_says_so(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "import obce\n"
        "assert obce.h0([[0.0, 1.0], [2.0, 3.0]]).r_f[0] > 0\n"
        "try:\n obce.prune\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    said = run(sys.executable, "-P", "-c", code, cwd=ROOT)
    assert f"obce.prune needs the package {missing}, which is not installed; install obce with its" in said


def stub(module: str) -> dict[str, int | None]:
    """Name -> number of arguments of a function, None for what is none; of a stub."""
    found: dict[str, int | None] = {}
    for node in ast.parse((ROOT / "obce" / f"{module}.pyi").read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            assert not node.args.args and not node.args.kwonlyargs, f"{node.name}: pybind11 takes arguments by position"
            found[node.name] = len(node.args.posonlyargs)
        elif isinstance(node, ast.ClassDef):
            found[node.name] = None
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = None
    return {name: count for name, count in found.items() if not name.startswith("_")}


def test_stub_of_the_cuda_module_names_what_is_bound() -> None:
    source = (ROOT / "csrc" / "bind_cuda.cpp").read_text("utf-8")
    bound = re.findall(r"(?:m\.def|m\.attr)\(\"(\w+)\"|py::class_<[\w:]+>\(m, \"(\w+)\"", source)
    assert len(bound) > 10
    assert set(stub("_cuda")) == {a or b for a, b in bound}


def test_stub_of_the_compiled_module_is_its_face() -> None:
    module = pytest.importorskip("obce._cpu", reason="the compiled engine is not built here")
    bound = {}
    for name in dir(module):
        if not name.startswith("_"):
            signature = str(getattr(module, name).__doc__).partition(") ->")[0]
            bound[name] = len(re.findall(r"\barg\d+:", signature))
    assert stub("_cpu") == bound


@pytest.mark.parametrize(
    ("torch", "transformers", "sentence"),
    [
        ("2.13.0+cpu", "5.24.0", ""),
        ("2.6.0", "5.24.0", "torch 2.6.0 was there, expected 2.13.0"),
        ("2.13.0", "5.14.1", "transformers 5.14.1 was there, expected the newest"),
    ],
)
def test_an_environment_of_other_versions_than_its_name_fails(
    script: Callable[[str], ModuleType], torch: str, transformers: str, sentence: str
) -> None:
    environments = script("environments")
    one = environments.Environment("x", ["torch==2.13.0", "transformers"], "models", "x")
    one.row = {"torch": torch, "transformers": transformers}
    if not sentence:
        environments.check_versions(one)
        return
    with pytest.raises(AssertionError, match=re.escape(sentence)):
        environments.check_versions(one)
