"""Fit a TC app by the method that validation prefers."""

from transformers import PreTrainedTokenizerBase

from ...data.app_data import AppData
from ...model.modeling_mtpf import MtpfModel
from ..settings import FitResult, FitSettings
from .lora import fit_lora
from .probe import fit_probe
from .registry import register_method


@register_method("tc", "auto", unused=["sparse"])
def fit_better(
    model: MtpfModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    data: AppData,
    start_from: str | None,
    settings: FitSettings,
) -> FitResult:
    """Fit a probe and a LoRA, keep the one with the higher validation accuracy; see `registry.FitMethod`.

    Of equal ones it is the probe, which is smaller. Its accuracy may come from folds, see `fit_probe`.
    """
    arguments = model, tokenizer, name, data, start_from, settings
    probe = fit_probe(*arguments)
    model.delete_adapter(name)
    lora = fit_lora(*arguments)
    scores = {"probe": round(probe.score, 4), "lora": round(lora.score, 4)}
    chosen, result = "lora", lora
    if probe.score >= lora.score:
        model.delete_adapter(name)
        chosen, result = "probe", fit_probe(*arguments)
    result.details |= {"method": chosen, "validation_accuracy_by_method": scores}
    return result
