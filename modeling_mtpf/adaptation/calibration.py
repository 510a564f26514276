"""Scores that mean something: a temperature, fitted on held-out rows and folded into an app's head."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax

from ..metrics import expected_calibration_error, label_set_scores

MOST = 20.0
"""Temperatures lie between its inverse and this."""

NEVER = -1e4
"""Bias of a label without a training example; float16 ends at -65,504."""


@dataclass
class HeldOut:
    """An app's scores for texts, or words, that its head was not fitted on.

    Attributes:
        scores: Logits or log-probabilities ``(rows, labels)``; of a multi-label app logits.
        targets: Number of each row's label ``(rows,)``; negative where the head does not know it. Of a
            multi-label app whether each has each label, bool ``(rows, labels)``. Of NER the labels that
            predict gives.
        names: Labels of the columns, where they are not those of the head in its order.
        entities: Of NER, whose rows are the words of the entities that predict gives, the number of each
            one's entity ``(rows,)``.
        right: Whether each of these is right ``(entities,)``.
    """

    scores: np.ndarray
    targets: np.ndarray
    names: list[str] | None = None
    entities: np.ndarray | None = None
    right: np.ndarray | None = None

    def of_labels(self, labels: list[str]) -> np.ndarray:
        """Return the scores in the order of a head ``(rows, labels)``; a missing label has the lowest."""
        if self.names is None:
            return self.scores
        scores = np.full((len(self.scores), len(labels)), self.scores.min(initial=0.0))
        scores[:, [labels.index(name) for name in self.names]] = self.scores
        return scores

    def calibration_error(self, temperature: float = 1.0) -> float:
        """Return the expected calibration error of the best labels, or the entities, at a temperature."""
        if self.right is not None:
            return expected_calibration_error(self.entity_scores(temperature), self.right)
        probabilities = np.exp(log_softmax(self.scores / temperature, axis=1))
        right = probabilities.argmax(1) == self.targets
        return expected_calibration_error(probabilities.max(1), right)

    def entity_scores(self, temperature: float) -> np.ndarray:
        """Return the score that predict gives each entity: the mean probability of its words' labels."""
        assert self.entities is not None and self.right is not None
        words = log_softmax(self.scores / temperature, axis=1)[np.arange(len(self.targets)), self.targets]
        sizes = np.bincount(self.entities, minlength=len(self.right))
        return np.bincount(self.entities, np.exp(words), len(self.right)) / sizes

    def set_scores(self) -> dict[str, float]:
        """Score a multi-label app at the threshold that is best for these rows."""
        return label_set_scores(self.targets, self.scores - best_threshold(self.scores, self.targets))


def binary_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the sum over all pairs of text and label."""
    return float(np.logaddexp(0, np.where(targets, -logits, logits)).sum())


def best_threshold(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the logit, one for all labels, from which on labels have the highest micro F1; 0 without any."""
    order = np.argsort(-logits, axis=None, kind="stable")
    values, right = logits.ravel()[order].astype(np.float64), targets.ravel()[order]
    if not right.any():
        return 0.0
    f1 = 2 * right.cumsum() / (np.arange(1, len(right) + 1) + right.sum())
    f1[:-1][values[:-1] == values[1:]] = 0  # equal logits cannot be told apart
    last = int(f1.argmax())
    return float(values[last : last + 2].mean())


def fit_temperature(held_out: HeldOut) -> float:
    """Return the temperature by which logits are divided for the lowest cross-entropy on held-out rows.

    Of NER it is that of the entities' scores and whether they are right, since these are what is delivered.
    A standard normal prior on its logarithm, which weighs little next to a hundred rows, keeps it finite
    where all rows are right. Source: Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    scores, targets = held_out.scores.astype(np.float64), held_out.targets

    known = targets >= 0

    def loss(log_temperature: float) -> float:
        if held_out.right is not None:
            each = held_out.entity_scores(np.exp(log_temperature))
            each = np.where(held_out.right, each, 1 - each)
            return log_temperature**2 / 2 - np.log(np.maximum(each, 1e-12)).sum()
        if targets.ndim == 2:
            return log_temperature**2 / 2 + binary_cross_entropy(scores / np.exp(log_temperature), targets)
        each = log_softmax(scores / np.exp(log_temperature), axis=1)
        right = each[known, targets[known]]
        wrong = np.log(np.maximum(-np.expm1(each[~known].max(1)), 1e-12))
        return log_temperature**2 / 2 - np.maximum(right, NEVER).sum() - wrong.sum()

    bounds = -np.log(MOST), np.log(MOST)
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


@torch.no_grad()
def calibrate(head: Any, held_out: HeldOut) -> dict[str, float]:
    """Divide a head's weights by the temperature that `fit_temperature` finds; no best label changes.

    Returns:
        The ``temperature``, and the calibration error on the same rows, ``ece_before`` and ``ece_after``. For
        a multi-label app instead the probability that became 0.5, the ``threshold`` of the best micro F1.
    """
    temperature = fit_temperature(held_out)
    head.weight.div_(temperature)
    head.bias.div_(temperature)
    if held_out.targets.ndim == 2:
        threshold = best_threshold(held_out.scores, held_out.targets) / temperature
        head.bias.sub_(threshold).clamp_(NEVER, -NEVER)
        return {"temperature": round(temperature, 4), "threshold": round(float(expit(threshold)), 4)}
    head.bias.clamp_(min=NEVER)
    return {
        "temperature": round(temperature, 4),
        "ece_before": round(held_out.calibration_error(), 4),
        "ece_after": round(held_out.calibration_error(temperature), 4),
    }
