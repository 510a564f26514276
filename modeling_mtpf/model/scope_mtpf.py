"""Out of scope: whether a text is about anything that a text app was fitted on."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from .errors_mtpf import AdapterError
from .gate_mtpf import read_header

SCOPE_FILE = "scope.safetensors"
MAX_AXES = 48


@dataclass
class Scope:
    """How an app's logits lie for its training texts. A text's score is log p + far - near.

    p is the probability of its best label. On axes along which the labels differ, ``near`` is the squared
    distance to the nearest label's mean, and ``far`` to that of all texts, each in units of the spread there.
    Sources: Hendrycks and Gimpel 2017 (p); Ren et al. 2021 (relative Mahalanobis distance).

    Attributes:
        projection: Logits to axes, float32 ``(labels, axes)``.
        means: Of the labels' texts ``(labels with texts, axes)``.
        background: Mean of all texts, and the inverse of their variance ``(2, axes)``.
        threshold: The score ``()`` from which on a text is in scope.
    """

    projection: np.ndarray
    means: np.ndarray
    background: np.ndarray
    threshold: np.ndarray

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """Return the scores ``(texts,)`` of logits ``(texts, labels)``, of which only differences count."""
        logits = logits - logits.max(-1, keepdims=True)
        points = logits @ self.projection
        products = points @ self.means.T
        near = (points**2).sum(-1) + ((self.means**2).sum(-1) - 2 * products).min(-1)
        center, inverse = self.background
        far = ((points - center) ** 2 * inverse).sum(-1)
        return far - near - np.log(np.exp(logits).sum(-1))

    def contains(self, logits: np.ndarray) -> bool:
        """Say whether the text with these logits ``(labels,)`` is in scope."""
        return bool(self.scores(logits[None])[0] >= self.threshold)

    def rounded(self) -> "Scope":
        """Return it as it is stored: float16, the threshold in float32."""
        arrays = {part.name: getattr(self, part.name) for part in fields(self)}
        halves = {name: array.astype(np.float16).astype(np.float32) for name, array in arrays.items()}
        return Scope(**halves | {"threshold": np.asarray(self.threshold, np.float32)})

    def tensors(self) -> dict[str, np.ndarray]:
        """Return what is stored."""
        names = [part.name for part in fields(self)]
        return {n: getattr(self, n).astype(np.float32 if n == "threshold" else np.float16) for n in names}


def check_scope(folder: Path, task: Mapping[str, Any]) -> bool:
    """Say whether an adapter folder has a scope, after comparing its header with ``task.json``.

    Raises:
        AdapterError: It is damaged, or not that of an app with these labels.
    """
    path = folder / SCOPE_FILE
    if not path.exists():
        return False
    labels = len(task.get("labels") or [])
    shapes = {key: tensor.shape for key, tensor in read_header(path, AdapterError).tensors.items()}
    axes = next(iter(shapes.get("projection", ())[1:]), 0)
    known = next(iter(shapes.get("means", ())), 0)
    expected = {
        "projection": (labels, axes),
        "means": (known, axes),
        "background": (2, axes),
        "threshold": (),
    }
    single = task.get("kind") == "text-classification" and not task.get("problem_type")
    if not single or shapes != expected or not (1 <= axes <= MAX_AXES and 1 <= known <= labels):
        raise AdapterError(
            f"{path} is damaged, or of another app: it does not fit a text app with {labels:,} labels; "
            "remove it, or fetch the folder again."
        )
    return True
