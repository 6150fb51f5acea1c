"""Lets transformers' Auto classes open pruned models once `obce` is imported, without importing transformers.

transformers has no entry points: a class is known to `AutoConfig` and `AutoModel*` only after it was
registered, and registering needs the class. `install` waits for two modules to be executed:

1. transformers' module of `AutoConfig`. It is often imported in the middle of importing a model, so our
   classes, which derive from its family's, cannot be imported then. A placeholder is entered for each model type;
   the first use of it, which is the first pruned model met, imports the classes.
2. `obce.modeling_obce`, whoever imports it: now the classes are registered, and replace the placeholder.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Kind of pruned model -> how its classes' names begin, and its tokenizer: directories with a vocabulary but no
# tokenizer_config.json are read by the kind of model. Empty for models that read pictures; the file of an image
# processor always names its class.
_FAMILIES = {
    "obce_bert": ("ObceBert", "BertTokenizer"),
    "obce_roberta": ("ObceRoberta", "RobertaTokenizer"),
    "obce_xlm_roberta": ("ObceXLMRoberta", "XLMRobertaTokenizer"),
    "obce_electra": ("ObceElectra", "BertTokenizer"),
    "obce_deberta_v2": ("ObceDebertaV2", "DebertaV2Tokenizer"),
    "obce_distilbert": ("ObceDistilBert", "BertTokenizer"),
    "obce_mpnet": ("ObceMPNet", "MPNetTokenizer"),
    "obce_modernbert": ("ObceModernBert", "PreTrainedTokenizerFast"),
    "obce_gpt2": ("ObceGPT2", "GPT2Tokenizer"),
    "obce_llama": ("ObceLlama", "LlamaTokenizer"),
    "obce_qwen2": ("ObceQwen2", "Qwen2Tokenizer"),
    "obce_qwen3": ("ObceQwen3", "Qwen2Tokenizer"),
    "obce_vit": ("ObceViT", ""),
}

# Kind of all models whose family a user's site map made known. Its placeholder stays: what it reads is of classes that
# are made of a family's own, one by one, and register themselves then.
_MAPPED_TYPE = "obce_mapped"

# Auto class and how our class's name ends; those that transformers maps to a class of the same head.
_HEADS = (
    ("AutoModel", "Model"),
    ("AutoModelForTextEncoding", "Model"),
    ("AutoModelForPreTraining", "ForPreTraining"),
    ("AutoModelForMaskedLM", "ForMaskedLM"),
    ("AutoModelForCausalLM", "ForCausalLM"),
    ("AutoModelForCausalLM", "LMHeadModel"),
    ("AutoModelForNextSentencePrediction", "ForNextSentencePrediction"),
    ("AutoModelForSequenceClassification", "ForSequenceClassification"),
    ("AutoModelForMultipleChoice", "ForMultipleChoice"),
    ("AutoModelForTokenClassification", "ForTokenClassification"),
    ("AutoModelForQuestionAnswering", "ForQuestionAnswering"),
    ("AutoModelForImageClassification", "ForImageClassification"),
    ("AutoModelForMaskedImageModeling", "ForMaskedImageModeling"),
)


def install() -> None:
    """Registers what can be registered now, arranges for the rest. Idempotent, imports no other package."""
    for name, action in _ACTIONS.items():
        if name in sys.modules:
            # Not sys.modules[name]: another thread may still be executing it, and this waits for the end.
            action(importlib.import_module(name))
        else:
            _FINDER.waiting.add(name)
    if _FINDER.waiting and _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the awaited modules as the other finders do, with a loader that acts afterwards."""

    def __init__(self) -> None:
        self.waiting: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None

    def executed(self, module: ModuleType) -> None:
        self.waiting.discard(module.__name__)
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)
        _ACTIONS[module.__name__](module)


class _Loader:
    """Stands for another loader until the module is executed, and leaves no trace on the module."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        _FINDER.executed(module)


class _Placeholder:
    """Stands where a config class will in transformers' table; calling or reading it imports the class."""

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type
        self.__name__ = "ObceMappedConfig" if model_type == _MAPPED_TYPE else f"{_FAMILIES[model_type][0]}Config"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _load_config_class(self.__name__)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_load_config_class(self.__name__), name)


def _load_config_class(name: str) -> Any:
    from transformers.utils.import_utils import is_torch_available

    if is_torch_available():
        importlib.import_module(_MODELING)  # registers on the way
    from obce import configuration_obce

    mapped = None if hasattr(configuration_obce, name) else importlib.import_module(_MAPPED_MODELING)
    return getattr(mapped or configuration_obce, name)


def _enter_placeholders(auto: ModuleType) -> None:
    try:
        for model_type in (*_FAMILIES, _MAPPED_TYPE):
            if model_type not in auto.CONFIG_MAPPING:
                auto.CONFIG_MAPPING.register(model_type, _Placeholder(model_type))
    # Whatever an unknown transformers raises: importing it must not fail because obce was imported.
    except Exception as error:
        warnings.warn(
            f"obce cannot make its models known to transformers' Auto classes ({error!r}): they will not "
            "load pruned models; install transformers >= 5.14, < 6.",
            RuntimeWarning,
            stacklevel=2,
        )


def _register(modeling: ModuleType) -> None:
    import transformers

    auto: Any = transformers
    for model_type, (prefix, tokenizer) in _FAMILIES.items():
        config_class = getattr(modeling, f"{prefix}Config")
        auto.AutoConfig.register(model_type, config_class, exist_ok=True)
        if tokenizer:
            auto.AutoTokenizer.register(config_class, getattr(auto, tokenizer), exist_ok=True)
        for name, ending in _HEADS:
            if not tokenizer and name == "AutoModelForTextEncoding":
                continue
            if hasattr(modeling, prefix + ending):
                getattr(auto, name).register(config_class, getattr(modeling, prefix + ending), exist_ok=True)


_MODELING = "obce.modeling_obce"
_MAPPED_MODELING = "obce.modeling_obce_mapped"
_ACTIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _enter_placeholders,
    _MODELING: _register,
}
_FINDER = _Finder()
