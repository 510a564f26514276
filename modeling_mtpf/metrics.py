"""Metrics of both families."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from seqeval.metrics import classification_report
from seqeval.scheme import IOB2
from sklearn.metrics import accuracy_score, average_precision_score, f1_score

from .errors import DataError

logger = logging.getLogger(__name__)

PIECE = 100
"""Words after which a long sentence is cut for counting."""


def entity_scores(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Strict IOB2 scores over entities: type and both borders must be right.

    seqeval's defaults are lenient, and ``mode="strict"`` without a scheme scores wrong predictions 1.0. A
    sentence with fewer predicted tags than words was cut off: the words beyond count as ``O``, so that their
    entities are missed, and are counted.

    Args:
        gold: IOB2 tags of every word.
        predicted: IOB2 tags, one a word, perhaps fewer at the end of a sentence.

    Returns:
        ``entity_f1``, ``precision`` and ``recall`` over all entities, ``types`` with the scores and the
        number of gold entities (``support``) of each type, and ``words_cut_off``.

    Raises:
        DataError: More tags than words, or another number of sentences.

    Example:
        >>> entity_scores([["B-PER", "I-PER", "O"]], [["B-PER", "O", "O"]])["entity_f1"]
        0.0
    """
    if len(gold) != len(predicted):
        raise DataError(f"There are {len(gold)} sentences but {len(predicted)} predictions.")
    filled, cut = [], 0
    for row, (own, found) in enumerate(zip(gold, predicted, strict=True), start=1):
        if len(found) > len(own):
            raise DataError(f"Sentence {row} has {len(own)} words but {len(found)} predicted tags.")
        cut += len(own) - len(found)
        filled.append([*found, *["O"] * (len(own) - len(found))])
    if cut:
        logger.warning("%d words were cut off; entities in them count as missed.", cut)
    scores: dict[str, Any] = {"entity_f1": 0.0, "precision": 0.0, "recall": 0.0, "types": {}}
    if any(tag != "O" for rows in (gold, filled) for row in rows for tag in row):
        pieces = [piece for rows in zip(gold, filled, strict=True) for piece in _pieces(*rows)]
        report = classification_report(
            [own for own, _ in pieces],
            [found for _, found in pieces],
            mode="strict",
            scheme=IOB2,
            output_dict=True,
            zero_division=0,
        )
        whole = report.pop("micro avg")
        scores.update(entity_f1=float(whole["f1-score"]))
        scores.update({key: float(whole[key]) for key in ("precision", "recall")})
        scores["types"] = {
            kind: {
                "f1": float(own["f1-score"]),
                "precision": float(own["precision"]),
                "recall": float(own["recall"]),
                "support": int(own["support"]),
            }
            for kind, own in report.items()
            if not kind.endswith(" avg")
        }
    return {**scores, "words_cut_off": cut}


def _pieces(gold: Sequence[str], predicted: list[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Cut a sentence where no entity of either goes on: seqeval takes quadratic time in its length."""
    start = 0
    for i in range(1, len(gold) + 1):
        if i == len(gold) or (i - start >= PIECE and "I" not in (gold[i][0], predicted[i][0])):
            yield list(gold[start:i]), predicted[start:i]
            start = i


def text_scores(
    gold: Sequence[str], predicted: Sequence[str], probabilities: np.ndarray, labels: Sequence[str]
) -> dict[str, float]:
    """Scores of text classification.

    Args:
        gold: Right labels.
        predicted: Predicted labels.
        probabilities: ``(texts, labels)``.
        labels: Names of the columns.

    Returns:
        ``accuracy``; ``macro_f1``, the mean over the labels that occur in either; ``average_precision``, the
        mean over the gold labels of the area under each one's precision-recall curve (a label that the model
        does not know scores as chance does).
    """
    columns = {label: column for column, label in enumerate(labels)}
    names = np.asarray(gold, dtype=object)
    precisions = []
    for label in dict.fromkeys(gold):
        known = label in columns
        scores = probabilities[:, columns[label]] if known else np.zeros(len(names))
        precisions.append(average_precision_score(names == label, scores))
    return {
        "accuracy": float(accuracy_score(gold, predicted)),
        "macro_f1": float(f1_score(gold, predicted, average="macro", zero_division=0)),
        "average_precision": float(np.mean(precisions)),
    }


__all__ = ["entity_scores", "text_scores"]
