"""Builds obce._cpu where there is a compiler and ships the top-level kernels/ as obce.kernels.

Metadata and the version's source stand in pyproject.toml. Building needs setuptools and pybind11 only; without a usable
compiler the installation succeeds and obce answers with its reference path.
"""

from __future__ import annotations

import os
import sys
import tempfile
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
PROBE = "typedef float v __attribute__((vector_size(16)));\n#include <thread>\nint main() { return int(v{}[0]); }\n"


class BuildExt(build_ext):
    """Leaves the extension out, aloud, when no compiler can build the probe; real errors stay errors."""

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
        super().build_extensions()


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
        )
    ],
)
