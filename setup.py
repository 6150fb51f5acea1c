"""Builds obce._cpu where there is a compiler, obce._cuda where there is nvcc, and ships kernels/ as obce.kernels.

Metadata and the version's source stand in pyproject.toml. Building needs setuptools and pybind11 only; without a usable
compiler the installation succeeds and obce answers with its reference path. The environment variables of the CUDA
engine: OBCE_CUDA=1 (it must be built, or the installation fails) or 0 (it is not built); OBCE_CUDA_ARCHS, the compute
capabilities it is compiled for, as in "80 90".
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).parent

# -ffp-contract=off: a product and a sum are fused only where the source says fma (csrc/ph0_cpu.h).
# No -march: the level is chosen at run time, so one wheel serves every processor.
COMPILE_ARGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"]
LINK_ARGS = ["-pthread"]
if sanitizers := os.environ.get("OBCE_SANITIZE"):
    # -O1 -g: reports name lines. A report ends the process, so a test that meets one cannot pass.
    SANITIZE = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    COMPILE_ARGS += [*SANITIZE, "-O1", "-g", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"]
    LINK_ARGS += SANITIZE
# Machine code for these, as far as the toolkit knows them, and intermediate code (PTX) for what came after
# PTX_OF.
ARCHS = ("80", "86", "89", "90", "100", "120")
PTX_OF = "90"
# Fused only where the source says so, as on the host.
NVCC_ARGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all"]
KERNELS = sorted(ROOT.glob("csrc/ph0_cuda_*.cu"))

PROBE = "typedef float v __attribute__((vector_size(16)));\n#include <thread>\nint main() { return int(v{}[0]); }\n"


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, else of PATH; None where there is none or OBCE_CUDA forbids it."""
    wish = os.environ.get("OBCE_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"OBCE_CUDA is {wish!r}, expected 0, 1 or nothing.")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(str(Path(home) / "bin" / "nvcc")) if home else None
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None and wish == "1":
        raise SystemExit("OBCE_CUDA is 1 and there is no nvcc in CUDA_HOME or PATH; install the CUDA toolkit.")
    return nvcc


def output_of(command: list[str]) -> str:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout


def code_args(nvcc: str) -> list[str]:
    """What the machine code is made for: every wished capability that this nvcc knows."""
    known = set(re.findall(r"compute_(\d+)", output_of([nvcc, "--list-gpu-arch"])))
    wished = os.environ.get("OBCE_CUDA_ARCHS", "").split() or list(ARCHS)
    archs = [arch for arch in wished if arch in known]
    if not archs:
        raise SystemExit(
            f"OBCE_CUDA_ARCHS is {' '.join(wished)}, and this nvcc knows {' '.join(sorted(known, key=int))}."
        )
    args = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    ptx = PTX_OF if PTX_OF in known else archs[-1]
    return [*args, f"-gencode=arch=compute_{ptx},code=compute_{ptx}"]


def kernel_objects(nvcc: str) -> list[str]:
    """Objects of the .cu files, made side by side.

    They take minutes, so they are kept until a source, an argument or nvcc changes.
    """
    args = [*NVCC_ARGS, *code_args(nvcc)]
    read = b"".join(path.read_bytes() for path in (*sorted(ROOT.glob("csrc/ph0_c[ou]*.*h")), *KERNELS))
    key = read + " ".join(args).encode() + output_of([nvcc, "--version"]).encode()
    folder = ROOT / "build" / f"cuda-{hashlib.sha256(key).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    processors = os.cpu_count() or 1

    def compiled(source: Path) -> str:
        target = folder / (source.stem + ".o")
        if not target.exists():
            unfinished = target.with_suffix(".unfinished")
            output_of([nvcc, *args, f"--threads={processors}", "-c", str(source), "-o", str(unfinished)])
            unfinished.rename(target)
        return str(target)

    with ThreadPoolExecutor(processors) as pool:
        return list(pool.map(compiled, KERNELS))


class BuildExt(build_ext):
    """Leaves an extension out, aloud, when there is nothing to build it with; real errors stay errors."""

    def build_extensions(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / "probe.cpp"
            probe.write_text(PROBE, "utf-8")
            try:
                self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=COMPILE_ARGS)
            except (CompileError, OSError) as error:
                print(
                    f"obce: no C++17 compiler like gcc or clang found ({error}); installing without the compiled "
                    "engine, the slower reference path will answer. Install a compiler and reinstall for speed.",
                    file=sys.stderr,
                )
                self.extensions = []
                return
        self.extensions = [ext for ext in self.extensions if ext.name != "obce._cuda" or self._compile_kernels(ext)]
        super().build_extensions()

    def _compile_kernels(self, ext: Extension) -> bool:
        """Makes objects of the .cu files and adds them to the extension; False when it is to be left out."""
        nvcc = find_nvcc()
        if nvcc is None:
            return False
        try:
            # The toolkit's root, also where nvcc is a wrapper.
            top = re.search(r"^#\$ TOP=(.*)$", output_of([nvcc, "--dryrun", "-x", "cu", os.devnull]), re.MULTILINE)
            toolkit = Path(top.group(1).strip()) if top else Path(nvcc).resolve().parents[1]
            ext.extra_objects += kernel_objects(nvcc)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stdout", None) or error
            if os.environ.get("OBCE_CUDA") == "1":
                raise SystemExit(f"OBCE_CUDA is 1 and {nvcc} cannot build the CUDA engine: {said}") from error
            print(f"obce: the CUDA engine is left out, {nvcc} cannot build it: {said}", file=sys.stderr)
            return False
        ext.include_dirs.append(str(toolkit / "include"))
        ext.library_dirs += [str(toolkit / "lib64"), str(toolkit / "lib")]
        return True


class BuildPy(build_py):
    """Adds kernels/*.py to the package obce.kernels (see obce/kernels/__init__.py)."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        if package == "obce.kernels":
            modules += [(package, p.stem, str(p)) for p in sorted(Path("kernels").glob("*.py"))]
        return modules


setup(
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
    ext_modules=[
        Extension(
            "obce._cpu",
            sources=sorted(
                str(p.relative_to(ROOT)) for p in [*ROOT.glob("csrc/ph0_cpu*.cpp"), ROOT / "csrc" / "bind_cpu.cpp"]
            ),
            depends=sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*.h")),
            include_dirs=[pybind11.get_include()],
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=LINK_ARGS,
            language="c++",
        ),
        # The CUDA runtime is linked statically and hidden, so it cannot meet torch's; it finds the driver when it is
        # first asked for a device.
        Extension(
            "obce._cuda",
            sources=["csrc/bind_cuda.cpp"],
            depends=sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/ph0_c[ou]*")),
            include_dirs=[pybind11.get_include()],
            libraries=["cudart_static", "dl", "rt", "pthread"],
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=[*LINK_ARGS, "-Wl,--exclude-libs,ALL", "-s"],
            language="c++",
        ),
    ],
)
