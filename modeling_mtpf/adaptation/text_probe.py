"""TC by linear probe: logistic regression on the mean-pooled vectors of the frozen backbone with a LoRA."""

from collections.abc import Sequence
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
    probe, best = choose_probe(
        train, data.train.labels, validation, data.validation.labels, settings.class_weights, settings.seed
    )
    if data.held_out:
        probe = LogisticRegression(**probe.get_params())
        probe.fit(np.concatenate([train, validation]), [*data.train.labels, *data.validation.labels])
    _fill_head(model.heads[name], probe)
    details = {
        "C": probe.C,
        "validation_accuracy_by_C": best.details,
        "refitted_with_validation": data.held_out,
    }
    return FitResult(best.score, best.validation, details)


def choose_probe(
    train: np.ndarray,
    train_labels: Sequence[str],
    validation: np.ndarray,
    validation_labels: Sequence[str],
    class_weights: str = "none",
    seed: int = 0,
) -> tuple[LogisticRegression, FitResult]:
    """Fit logistic regression with the strength of regularisation that is best on validation.

    Args:
        train: Vectors ``(texts, width)``.
        train_labels: Their labels.
        validation: Vectors that decide.
        validation_labels: Their labels.
        class_weights: ``none`` or ``balanced``.
        seed: Of the solver.

    Returns:
        The probe, and its validation scores with the accuracy of every strength tried.
    """
    best: tuple[LogisticRegression, FitResult] | None = None
    tried: dict[str, float] = {}
    for strength in STRENGTHS:
        weight = None if class_weights == "none" else class_weights
        probe = LogisticRegression(C=strength, max_iter=1000, class_weight=weight, random_state=seed)
        probe.fit(train, train_labels)
        scores = text_scores(
            validation_labels,
            list(probe.predict(validation)),
            probe.predict_proba(validation),
            list(probe.classes_),
        )
        tried[str(strength)] = round(scores["accuracy"], 4)
        if best is not None and scores["accuracy"] <= best[1].score:
            break  # weaker regularisation helps no more
        best = probe, FitResult(scores["accuracy"], scores, tried)
    assert best is not None
    return best


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


__all__ = ["STRENGTHS", "choose_probe", "fit_text_probe"]
