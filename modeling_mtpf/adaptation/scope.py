"""Fit what tells texts out of scope: where an app's training texts lie in its logits."""

from typing import Any

import numpy as np

from ..model.scope_mtpf import MAX_AXES, Scope

IN_SCOPE = 0.95
"""Share of held-out texts that are in scope at the threshold."""

MAX_TEXTS = 2000
"""Training texts that are read once more for it, where a method does not return their vectors."""

SHRINKAGE, LEAST = 0.1, 1e-4
"""Share of a spread that is equal in all directions, and the least spread within labels, of the whole's."""


def fit_scope(head: Any, vectors: np.ndarray, targets: np.ndarray, held_out: np.ndarray) -> Scope:
    """Fit the scope of an app that gives one label.

    Args:
        head: As it is stored, calibrated.
        vectors: Mean vectors of texts ``(texts, hidden)``.
        targets: Number of each one's label.
        held_out: Logits or log-probabilities ``(texts, labels)`` of texts that the head was not fitted on.
    """
    weight, bias = (part.detach().double().cpu().numpy() for part in (head.weight, head.bias))
    labels, numbers = np.unique(targets, return_inverse=True)
    # Only differences between the logits of labels with texts count, as in a softmax.
    center = np.zeros((len(bias), len(labels)))
    center[labels] = np.eye(len(labels)) - 1 / len(labels)
    points = (vectors @ weight.T + bias) @ center
    means = np.stack([points[numbers == label].mean(0) for label in range(len(labels))])
    inside, whole = points - means[numbers], points - points.mean(0)
    # Axes along which labels differ most, in units of the spread within labels; few texts tell it roughly.
    within, least = (
        (inside.T @ inside) / len(points),
        LEAST * max(whole.var(0).mean(), 1e-3),
    )  # vectors may be equal
    mixed = (1 - SHRINKAGE) * within + (SHRINKAGE * np.trace(within) / len(within) + least) * np.eye(
        len(within)
    )
    spreads, axes = np.linalg.eigh(mixed)
    axes /= np.sqrt(spreads)
    _, rotation = np.linalg.eigh(axes.T @ (whole.T @ whole) @ axes)
    axes = axes @ rotation[:, ::-1][:, : min(MAX_AXES, len(labels) - 1)]
    inverse = 1 / np.maximum((points @ axes).var(0), LEAST)
    axes /= np.sqrt(((inside @ axes) ** 2).sum(1).mean() or 1.0)
    background = np.stack([(points @ axes).mean(0), inverse])
    scope = Scope(center @ axes, means @ axes, background, np.zeros(())).rounded()
    if len(held_out):
        scope.threshold = np.asarray(np.quantile(scope.scores(held_out), 1 - IN_SCOPE), np.float32)
    return scope
