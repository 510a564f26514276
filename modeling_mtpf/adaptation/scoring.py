"""How well an app does: the results that `predict` gives are compared with the labels."""

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..data.app_data import Examples
from ..data.label_sets import are_sets, label_matrix
from ..data.spans import Span, text_and_spans
from ..metrics import label_set_scores, span_scores, text_scores
from ..model.modeling_mtpf import MtpfModel


def score_app(
    model: MtpfModel, tokenizer: PreTrainedTokenizerBase, name: str, examples: Examples
) -> dict[str, Any]:
    """Score what ``model.predict`` gives for the texts: `span_scores` of NER, `text_scores` of TC.

    Of a multi-label app it is `label_set_scores`. The text of tagged words is these, joined by spaces.
    """
    head: Any = model.heads[name]
    if head.kind == "token-classification":
        pairs = [text_and_spans(*row) for row in zip(examples.inputs, examples.labels, strict=True)]
        results = model.predict([text for text, _ in pairs], adapters=[name], tokenizer=tokenizer)[name]
        predicted = [
            [Span(row["start"], row["end"], row["entity_group"]) for row in rows] for rows in results
        ]
        return span_scores([spans for _, spans in pairs], predicted)
    column = {label: number for number, label in enumerate(head.labels)}
    probabilities = np.zeros((len(examples), len(column)))
    everything: dict[str, Any] = {"top_k": None, "threshold": 0.0}
    results = model.predict(examples.inputs, adapters=[name], tokenizer=tokenizer, **everything)[name]
    for row, result in zip(probabilities, results, strict=True):
        row[[column[entry["label"]] for entry in result]] = [entry["score"] for entry in result]
    return score_probabilities(examples, probabilities, head.labels)


def score_probabilities(examples: Examples, probabilities: np.ndarray, labels: list[str]) -> dict[str, float]:
    """Score each text's probabilities ``(texts, labels)``.

    The most probable label is the prediction, of texts with a list of labels all from 0.5 on.
    """
    if are_sets(examples.labels):
        unknown = sorted({label for row in examples.labels for label in row} - set(labels))
        gold = label_matrix(examples.labels, [*labels, *unknown])
        missed = np.full((len(examples), len(unknown)), -0.5)
        return label_set_scores(gold, np.concatenate([probabilities - 0.5, missed], axis=1))
    predicted = [labels[column] for column in probabilities.argmax(1)]
    return text_scores(examples.labels, predicted, probabilities, labels)
