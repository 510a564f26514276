"""mtpf: one small encoder for many text apps, pre-finetuned with task-primary LoRA (arXiv 2510.07566)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .errors import AdapterError
    from .model.adapters_mtpf import AdapterHead, LoraSettings
    from .model.configuration_mtpf import MtpfConfig
    from .model.modeling_mtpf import MtpfForSequenceClassification, MtpfForTokenClassification, MtpfModel

__all__ = [
    "AdapterError",
    "AdapterHead",
    "LoraSettings",
    "MtpfConfig",
    "MtpfForSequenceClassification",
    "MtpfForTokenClassification",
    "MtpfModel",
    "__version__",
]

# Loaded at first use: torch and transformers take seconds, which `mtpf --help` need not wait for.
_MODULES = {
    "AdapterError": "errors_mtpf",
    "AdapterHead": "adapters_mtpf",
    "LoraSettings": "adapters_mtpf",
    "MtpfConfig": "configuration_mtpf",
    "MtpfForSequenceClassification": "modeling_mtpf",
    "MtpfForTokenClassification": "modeling_mtpf",
    "MtpfModel": "modeling_mtpf",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".model.{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
