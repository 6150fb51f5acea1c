"""Triton kernels under one import name, wherever their files lie.

In an installed package they lie beside this file. In a checkout they lie in the top-level folder `kernels/`,
which has no `__init__.py`: as a package it would shadow the distribution `kernels` that transformers imports.
Imports no triton.
"""

from __future__ import annotations

from pathlib import Path

_checkout = Path(__file__).parents[2] / "kernels"
if (_checkout / "pairwise.py").is_file():  # in site-packages that folder may be the other `kernels`
    __path__.append(str(_checkout))
