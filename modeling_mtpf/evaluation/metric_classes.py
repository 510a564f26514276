"""The metrics as local ``evaluate.Metric`` classes; nothing is downloaded."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from ..metrics import entity_scores, text_scores


def _metric_info(description: str, inputs: str, predictions: Any, references: Any) -> evaluate.MetricInfo:
    features = datasets.Features({"predictions": predictions, "references": references})
    return evaluate.MetricInfo(description, "", features, inputs_description=inputs)


class EntityF1(evaluate.Metric):
    """Strict IOB2 entity F1 as an ``evaluate.Metric``, see `entity_scores`.

    Example:
        >>> EntityF1().compute(references=[["B-PER"]], predictions=[["B-PER"]])["entity_f1"]
        1.0
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.List(datasets.Value("string"))
        return _metric_info(
            "Strict entity F1 at word level (seqeval).", "IOB2 tags of sentences.", tags, tags
        )

    def _compute(self, predictions, references) -> dict[str, Any]:
        return entity_scores(references, predictions)


class TextScores(evaluate.Metric):
    """Accuracy, macro F1 and average precision as an ``evaluate.Metric``, see `text_scores`.

    Args:
        labels: Names of the columns of the probabilities; the most probable one is the prediction.

    Example:
        >>> TextScores(["a", "b"]).compute(references=["b"], predictions=[[0.2, 0.8]])["accuracy"]
        1.0
    """

    def __init__(self, labels: Sequence[str], **kwargs: Any):
        self.labels = list(labels)
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        return _metric_info(
            "Accuracy, macro F1 and average precision of text classification.",
            "Probabilities of every label, and the right label.",
            datasets.List(datasets.Value("float32")),
            datasets.Value("string"),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        probabilities = np.asarray(predictions)
        predicted = [self.labels[column] for column in probabilities.argmax(1)]
        return text_scores(references, predicted, probabilities, self.labels)
