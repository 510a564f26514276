"""The probe of a multi-label app: logistic regression of each label against the others."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold

from ...data.app_data import AppData
from ...data.label_sets import label_matrix
from ...metrics import label_set_scores
from ..calibration import NEVER, HeldOut, binary_cross_entropy
from ..settings import FitResult


def fit_one_vs_rest(
    head: Any,
    data: AppData,
    train: np.ndarray,
    validation: np.ndarray,
    fit: Callable[[np.ndarray, np.ndarray, float], LogisticRegression],
    strengths: Sequence[float],
    folds: KFold | None,
) -> FitResult:
    """Fit a head on vectors ``(texts, hidden)``, finally those of train and validation.

    The strength of regularisation has the highest mean average precision on validation, or on folds of all
    texts, then the lower cross-entropy. ``fit`` takes vectors, whether each has the label, and the strength.
    """
    known = [label_matrix(split.labels, data.labels) for split in (data.train, data.validation)]
    vectors, targets = np.concatenate([train, validation]), np.concatenate(known)
    rows = np.arange(len(targets))
    parts = [rows[len(train) :]]
    if folds is not None:
        parts = [held for _, held in folds.split(rows)]
    tried = []
    for strength in strengths:
        logits = np.zeros(targets.shape)
        for held in parts:
            rest = np.setdiff1d(rows, held)
            weight, bias = _fit(vectors[rest], targets[rest], strength, fit)
            logits[held] = vectors[held] @ weight.T + bias
        held = np.concatenate(parts)
        tried.append(HeldOut(logits[held], targets[held]))
    precisions = [label_set_scores(one.targets, one.scores)["average_precision"] for one in tried]
    losses = [binary_cross_entropy(one.scores, one.targets) for one in tried]
    best = max(range(len(tried)), key=lambda number: (precisions[number], -losses[number]))
    weight, bias = _fit(vectors, targets, strengths[best], fit)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))
    head.eval()
    shown = [round(precision, 4) for precision in precisions]
    details = {
        "C": strengths[best],
        "validation_average_precision_by_C": dict(zip(map(str, strengths), shown, strict=True)),
        "chosen_by": f"{folds.get_n_splits()} folds" if folds is not None else "validation",
        "refitted_with_validation": True,
    }
    return FitResult(precisions[best], tried[best].set_scores(), details, tried[best])


def _fit(
    vectors: np.ndarray, targets: np.ndarray, strength: float, fit: Callable
) -> tuple[np.ndarray, np.ndarray]:
    """Return weights ``(labels, hidden)`` and biases; a label that all or no texts have needs no weights."""
    weight, bias = np.zeros((targets.shape[1], vectors.shape[1])), np.zeros(targets.shape[1])
    for label, of_label in enumerate(targets.T):
        if of_label.all() or not of_label.any():
            bias[label] = -NEVER if of_label.all() else NEVER
            continue
        probe = fit(vectors, of_label, strength)
        weight[label], bias[label] = probe.coef_[0], probe.intercept_[0]
    return weight, bias
