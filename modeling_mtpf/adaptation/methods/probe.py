"""Fit a TC app by linear probe: logistic regression on the vectors of the frozen backbone with a LoRA."""

import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, StratifiedKFold
from threadpoolctl import threadpool_limits
from transformers import PreTrainedTokenizerBase

from ...data.app_data import AppData
from ...data.words import IGNORE
from ...metrics import text_scores
from ...model.adapters_mtpf import AdapterHead, lora_parameters
from ...model.modeling_mtpf import MtpfModel
from ...model.schemas_mtpf import MULTI_LABEL
from ..calibration import NEVER, HeldOut
from ..rounding import round_to_stored
from ..settings import FitResult, FitSettings, LoraShape
from ..tail_training import add_app
from ..text_vectors import embed_texts
from .one_vs_rest import fit_one_vs_rest
from .registry import register_method

STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""Inverse strengths of regularisation to try (scikit-learn's C)."""

FEW, FOLDS = 50, 5
"""With fewer held-out texts than `FEW`, the strength is chosen by `FOLDS` folds of all texts."""


_TRAINING = ("learning_rate", "batch_size", "steps", "evaluations", "patience", "cache_gb")


@register_method("tc", "probe", unused=[*_TRAINING, "refit", "size", "lora", "sparse"])
def fit_probe(
    model: MtpfModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    data: AppData,
    start_from: str | None,
    settings: FitSettings,
) -> FitResult:
    """Fit a TC app by linear probe and leave it in the model under ``name``; see `registry.FitMethod`.

    The LoRA is that of ``start_from``, rounded as it is stored, or one of rank 1 that changes nothing. The
    strength of regularisation is chosen on validation, or by folds of all rows if validation was held out
    from the training data and has fewer than `FEW`. The final probe is fitted on train and validation.
    """
    shape = model.config.hidden_size, settings.max_length, MULTI_LABEL if data.multi_label else None
    head = AdapterHead("text-classification", data.labels, *shape)
    torch.manual_seed(settings.seed)
    add_app(model, name, head, start_from, LoraShape() if start_from else LoraShape(layers=1, r=1))
    round_to_stored(lora_parameters(model.backbone, name), settings)  # the probe sees what will be stored
    shared = {key: getattr(settings, key) for key in ("max_length", "mixed_precision", "progress")}
    train, validation = (
        embed_texts(model, tokenizer, split.inputs, name, **shared) for split in (data.train, data.validation)
    )
    folded = data.held_out and len(validation) < FEW
    if data.multi_label:
        fit = partial(_fit_probe, class_weights=settings.class_weights, seed=settings.seed)
        parts = KFold(FOLDS, shuffle=True, random_state=settings.seed) if folded else None
        return fit_one_vs_rest(model.heads[name], data, train, validation, fit, STRENGTHS, parts)
    options = settings.class_weights, settings.seed
    both = np.concatenate([train, validation]), [*data.train.labels, *data.validation.labels]
    if folded:
        strength, best = choose_by_folds(*both, *options)
    else:
        probe, best = choose_probe(train, data.train.labels, validation, data.validation.labels, *options)
        strength = probe.C
    fitted = np.isin(both[1], data.labels)  # validation may have a label that train lacks
    probe = _fit_probe(both[0][fitted], np.asarray(both[1], dtype=object)[fitted], strength, *options)
    fill_head(model.heads[name], probe)
    details = {
        "C": strength,
        "validation_accuracy_by_C": best.details,
        "chosen_by": f"{FOLDS} stratified folds" if folded else "validation",
        "refitted_with_validation": True,
    }
    return FitResult(best.score, best.validation, details, best.held_out, vectors=both)


def choose_probe(
    train: np.ndarray,
    train_labels: Sequence[str],
    validation: np.ndarray,
    validation_labels: Sequence[str],
    class_weights: str = "none",
    seed: int = 0,
) -> tuple[LogisticRegression, FitResult]:
    """Fit logistic regression with the strength of regularisation that is best on validation.

    The highest accuracy decides, then the lower log-loss. Vectors are ``(texts, width)``, class weights
    ``none`` or ``balanced``; the seed is the solver's.

    Returns:
        The probe, and its validation scores with the accuracy of every strength tried.
    """
    probes = [_fit_probe(train, train_labels, strength, class_weights, seed) for strength in STRENGTHS]
    results = [
        _result(validation_labels, probe.predict_proba(validation), list(probe.classes_)) for probe in probes
    ]
    chosen, result = _best(results)
    return probes[chosen], result


def choose_by_folds(
    vectors: np.ndarray, labels: Sequence[str], class_weights: str = "none", seed: int = 0
) -> tuple[float, FitResult]:
    """Choose the strength of regularisation, as `choose_probe`, by stratified folds.

    At least one label must have two texts; a label's only example is never held out.

    Returns:
        The strength, and the scores of the predictions for the folds with the accuracy of every strength.
    """
    targets, counts = np.asarray(labels, dtype=object), Counter(labels)
    several = np.array([row for row, label in enumerate(labels) if counts[label] > 1])
    folds = StratifiedKFold(min(FOLDS, max(counts.values())), shuffle=True, random_state=seed)
    names = list(dict.fromkeys(labels))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        parts = [several[held] for _, held in folds.split(several, targets[several].astype(str))]
    results = []
    for strength in STRENGTHS:
        probabilities = np.zeros((len(targets), len(names)))
        for held in parts:
            rest = np.setdiff1d(np.arange(len(targets)), held)
            probe = _fit_probe(vectors[rest], targets[rest], strength, class_weights, seed)
            columns = [names.index(label) for label in probe.classes_]
            probabilities[np.ix_(held, columns)] = probe.predict_proba(vectors[held])
        results.append(_result(list(targets[several]), probabilities[several], names))
    chosen, result = _best(results)
    return STRENGTHS[chosen], result


@threadpool_limits.wrap(limits=1, user_api="blas")
def _fit_probe(
    vectors: np.ndarray, labels: Sequence[str], strength: float, class_weights: str, seed: int
) -> LogisticRegression:
    """Fit on one thread: waiting threads of PyTorch and of BLAS would take the cores from each other."""
    weight = None if class_weights == "none" else class_weights
    probe = LogisticRegression(C=strength, max_iter=1000, class_weight=weight, random_state=seed)
    return probe.fit(vectors, labels)


def _result(labels: Sequence[str], probabilities: np.ndarray, names: list[str]) -> tuple[FitResult, float]:
    """Return scores and log-loss; a label that the probe does not know gets the probability 1e-12."""
    predicted = [names[column] for column in probabilities.argmax(1)]
    scores = text_scores(labels, predicted, probabilities, names)
    columns = {name: column for column, name in enumerate(names)}
    pairs = zip(probabilities, labels, strict=True)
    right = [row[columns[label]] if label in columns else 0.0 for row, label in pairs]
    targets = np.array([columns.get(label, IGNORE) for label in labels])
    held_out = HeldOut(np.log(np.maximum(probabilities, 1e-12)), targets, names)
    result = FitResult(scores["accuracy"], scores, held_out=held_out)
    return result, -float(np.log(np.maximum(right, 1e-12)).mean())


def _best(results: list[tuple[FitResult, float]]) -> tuple[int, FitResult]:
    """Return index and result of the highest accuracy, then of the lower log-loss."""
    chosen = max(range(len(results)), key=lambda i: (results[i][0].score, -results[i][1]))
    result = results[chosen][0]
    accuracies = [round(scored.score, 4) for scored, _ in results]
    result.details = dict(zip(map(str, STRENGTHS), accuracies, strict=True))
    return chosen, result


@torch.no_grad()
def fill_head(head: Any, probe: LogisticRegression) -> None:
    """Copy a probe into a head, label by label; a label without a training example is never predicted."""
    weight, bias = torch.from_numpy(probe.coef_), torch.from_numpy(probe.intercept_)
    if len(probe.classes_) == 2:  # scikit-learn keeps one row, the log-odds of the second class
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    head.weight.zero_()
    head.bias.fill_(NEVER)
    rows = [head.labels.index(label) for label in probe.classes_]
    head.weight[rows], head.bias[rows] = weight.to(head.weight), bias.to(head.bias)
    head.eval()
