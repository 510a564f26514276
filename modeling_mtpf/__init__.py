"""mtpf: one small encoder for many text apps, pre-finetuned with task-primary LoRA (arXiv 2510.07566)."""

from .adapters_mtpf import AdapterError, AdapterHead, LoraSettings
from .configuration_mtpf import MtpfConfig
from .modeling_mtpf import MtpfForSequenceClassification, MtpfForTokenClassification, MtpfModel
from .version import __version__

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
