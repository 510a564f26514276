"""TC by linear probe: logistic regression on the mean-pooled vectors of the frozen backbone with a LoRA."""

from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from transformers import PreTrainedTokenizerBase

from ..adapters_mtpf import AdapterHead, LoraSettings
from ..data.app_data import AppData
from ..evaluation.metrics import text_scores
from ..modeling_mtpf import MtpfModel
from .lora_training import add_app
from .methods import register_method
from .settings import FitResult, FitSettings
from .text_vectors import embed_texts

STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""Inverse strengths of regularisation (scikit-learn's C), tried from the strongest on."""


@register_method("tc", "probe")
def fit_text_probe(
    model: MtpfModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    data: AppData,
    start_from: str | None,
    settings: FitSettings,
) -> FitResult:
    """Fit a TC app by linear probe and leave it in the model under ``name``; see `methods.FitMethod`.

    The LoRA is the one of ``start_from``, unchanged; without one, a LoRA of rank 1 that changes nothing, for
    an app's folder always holds one. The strength of regularisation is chosen on validation; when validation
    was held out from the training data, the final probe is fitted on both.
    """
    head = AdapterHead("text-classification", data.labels, model.config.hidden_size, settings.max_length)
    torch.manual_seed(settings.seed)
    add_app(model, name, head, start_from, LoraSettings(r=1, alpha=1, layers=1))
    train, validation = (
        embed_texts(
            model,
            tokenizer,
            split.inputs,
            name,
            max_length=settings.max_length,
            mixed_precision=settings.mixed_precision,
            progress=settings.progress,
        )
        for split in (data.train, data.validation)
    )
    weight = None if settings.class_weights == "none" else settings.class_weights
    best: dict[str, Any] = {"score": -1.0}
    tried = {}
    for strength in STRENGTHS:
        probe = LogisticRegression(C=strength, max_iter=1000, class_weight=weight, random_state=settings.seed)
        probe.fit(train, data.train.labels)
        scores = text_scores(
            data.validation.labels,
            list(probe.predict(validation)),
            probe.predict_proba(validation),
            list(probe.classes_),
        )
        tried[strength] = round(scores["accuracy"], 4)
        if scores["accuracy"] <= best["score"]:  # weaker regularisation helps no more
            break
        best = {"score": scores["accuracy"], "C": strength, "probe": probe, "scores": scores}
    probe = best["probe"]
    if data.held_out:
        probe = LogisticRegression(**probe.get_params())
        probe.fit(np.concatenate([train, validation]), [*data.train.labels, *data.validation.labels])
    _fill_head(model.heads[name], probe)
    details = {"C": best["C"], "validation_accuracy_by_C": tried, "refitted_with_validation": data.held_out}
    return FitResult(best["score"], best["scores"], details)


@torch.no_grad()
def _fill_head(head: Any, probe: LogisticRegression) -> None:
    """Copy a probe into a head, label by label; a label without training example is never predicted."""
    weight, bias = torch.from_numpy(probe.coef_), torch.from_numpy(probe.intercept_)
    if len(probe.classes_) == 2:  # scikit-learn keeps one row, the log-odds of the second class
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    head.weight.zero_()
    head.bias.fill_(-1e4)
    for row, label in enumerate(probe.classes_):
        head.weight[head.labels.index(label)] = weight[row]
        head.bias[head.labels.index(label)] = bias[row]
    head.eval()


__all__ = ["STRENGTHS", "fit_text_probe"]
