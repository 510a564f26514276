"""Scores that mean something: a temperature, fitted on held-out rows and folded into an app's head."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from ..metrics import expected_calibration_error

MOST = 20.0
"""Temperatures lie between its inverse and this."""

NEVER = -1e4
"""Bias of a label without a training example; float16 ends at -65,504."""


@dataclass
class HeldOut:
    """An app's scores for texts, or words, that its head was not fitted on.

    Attributes:
        scores: Logits or log-probabilities ``(rows, labels)``.
        targets: Number of each row's label ``(rows,)``; negative where the head does not know it.
    """

    scores: np.ndarray
    targets: np.ndarray

    def calibration_error(self, temperature: float = 1.0) -> float:
        """Return the expected calibration error of the best labels at a temperature."""
        probabilities = np.exp(log_softmax(self.scores / temperature, axis=1))
        right = probabilities.argmax(1) == self.targets
        return expected_calibration_error(probabilities.max(1), right)


def fit_temperature(held_out: HeldOut) -> float:
    """Return the temperature by which logits are divided for the lowest cross-entropy on held-out rows.

    A standard normal prior on its logarithm, which weighs little next to a hundred rows, keeps it finite
    where all rows are right. Source: Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    known = held_out.targets >= 0
    scores, targets = held_out.scores[known].astype(np.float64), held_out.targets[known]

    def loss(log_temperature: float) -> float:
        right = log_softmax(scores / np.exp(log_temperature), axis=1)[np.arange(len(targets)), targets]
        return log_temperature**2 / 2 - np.maximum(right, NEVER).sum()

    bounds = -np.log(MOST), np.log(MOST)
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


@torch.no_grad()
def calibrate(head: Any, held_out: HeldOut) -> dict[str, float]:
    """Divide a head's weights by the temperature that `fit_temperature` finds; no best label changes.

    Returns:
        The ``temperature``, and the calibration error on the same rows, ``ece_before`` and ``ece_after``.
    """
    temperature = fit_temperature(held_out)
    head.weight.div_(temperature)
    head.bias.div_(temperature).clamp_(min=NEVER)
    return {
        "temperature": round(temperature, 4),
        "ece_before": round(held_out.calibration_error(), 4),
        "ece_after": round(held_out.calibration_error(temperature), 4),
    }
