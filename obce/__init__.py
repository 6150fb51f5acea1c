"""Compress and explain BERT by persistent homology, on an exact batched H0 engine.

Names load on first use, so `import obce` needs neither torch nor transformers. Importing `obce` lets
`transformers.AutoModel*.from_pretrained` open models pruned by `obce` (see `obce.auto_classes`).
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from obce.auto_classes import install as _install_auto_classes

__version__ = "0.1.0"

if TYPE_CHECKING:
    from obce.corpus import Corpus as Corpus
    from obce.corpus import read_corpus as read_corpus
    from obce.corpus import read_pictures as read_pictures
    from obce.dropins import linkage as linkage
    from obce.dropins import ripser as ripser
    from obce.explain import explain as explain
    from obce.explain import explain_head as explain_head
    from obce.finetune import distill as distill
    from obce.h0 import H0 as H0
    from obce.h0 import h0 as h0
    from obce.h0 import h0_distances as h0_distances
    from obce.h0 import h0_line as h0_line
    from obce.h0 import r_f as r_f
    from obce.plan import Plan as Plan
    from obce.plan import plan as plan
    from obce.prune import prune as prune
    from obce.scores import Scores as Scores
    from obce.scoring import score as score
    from obce.sensitivity import sensitivity as sensitivity
    from obce.sites import register_sites as register_sites
    from obce.transformer import H0Transformer as H0Transformer

_PUBLIC = {
    "Corpus": "obce.corpus",
    "H0": "obce.h0",
    "H0Transformer": "obce.transformer",
    "Plan": "obce.plan",
    "Scores": "obce.scores",
    "distill": "obce.finetune",
    "explain": "obce.explain",
    "explain_head": "obce.explain",
    "h0": "obce.h0",
    "h0_distances": "obce.h0",
    "h0_line": "obce.h0",
    "linkage": "obce.dropins",
    "plan": "obce.plan",
    "prune": "obce.prune",
    "r_f": "obce.h0",
    "read_corpus": "obce.corpus",
    "read_pictures": "obce.corpus",
    "register_sites": "obce.sites",
    "ripser": "obce.dropins",
    "score": "obce.scoring",
    "sensitivity": "obce.sensitivity",
}

__all__ = ["__version__", *sorted(_PUBLIC)]  # noqa: PLE0604  (a table, so that the lazy names are written once)


class _Package(ModuleType):
    """`obce.h0`, `obce.plan` and `obce.prune` are functions, whatever was imported first.

    Importing the submodule `obce.h0` makes the import system bind that module to the package's name `h0`, over
    the function of the same name. The binding is answered with the function instead; `from obce.h0 import ...`
    looks in `sys.modules` and is not touched.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PUBLIC and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        try:
            module = import_module(_PUBLIC[name])
        except ModuleNotFoundError as error:
            package = (error.name or "").split(".")[0]
            if package in ("", "obce"):
                raise
            raise ModuleNotFoundError(
                f"obce.{name} needs the package {package}, which is not installed; install obce with its requirements.",
                name=error.name,
            ) from error
        value = getattr(module, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'obce' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


_install_auto_classes()
