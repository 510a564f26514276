"""Metrics of both families."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from seqeval.metrics import classification_report
from seqeval.scheme import IOB2
from sklearn.metrics import accuracy_score, average_precision_score, f1_score

from .errors import DataError

PIECE = 100
"""Words after which a long sentence is cut for counting."""


def entity_scores(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Strict IOB2 scores over entities: type and both borders must be right.

    seqeval's defaults are lenient, and ``mode="strict"`` without a scheme scores wrong predictions 1.0.

    Args:
        gold: IOB2 tags of every word.
        predicted: Likewise.

    Returns:
        ``entity_f1``, ``precision`` and ``recall`` over all entities, and ``types`` with the scores and the
        number of gold entities (``support``) of each type.

    Raises:
        DataError: The numbers of sentences or of their words differ.

    Example:
        >>> entity_scores([["B-PER", "I-PER", "O"]], [["B-PER", "O", "O"]])["entity_f1"]
        0.0
    """
    if len(gold) != len(predicted):
        raise DataError(f"There are {len(gold)} sentences but {len(predicted)} predictions.")
    for row, (tags, guesses) in enumerate(zip(gold, predicted, strict=True), start=1):
        if len(tags) != len(guesses):
            raise DataError(f"Sentence {row} has {len(tags)} words but {len(guesses)} predicted tags.")
    overall, types = {"f1": 0.0, "precision": 0.0, "recall": 0.0}, {}
    if any(tag != "O" for rows in (gold, predicted) for row in rows for tag in row):
        pieces = [piece for rows in zip(gold, predicted, strict=True) for piece in _pieces(*rows)]
        report = classification_report(
            [tags for tags, _ in pieces],
            [guesses for _, guesses in pieces],
            mode="strict",
            scheme=IOB2,
            output_dict=True,
            zero_division=0,
        )
        overall = _as_numbers(report["micro avg"])
        types = {kind: _as_numbers(row) for kind, row in report.items() if not kind.endswith(" avg")}
    return {
        "entity_f1": overall["f1"],
        "precision": overall["precision"],
        "recall": overall["recall"],
        "types": types,
    }


def span_scores(
    gold: Sequence[Sequence[tuple[int, int, str]]], predicted: Sequence[Sequence[tuple[int, int, str]]]
) -> dict[str, Any]:
    """Strict scores of entities given as character spans ``(start, end, type)``, see `entity_scores`.

    Spans of one side do not overlap.

    Example:
        >>> span_scores([[(0, 3, "PER")]], [[(0, 3, "PER"), (7, 9, "LOC")]])["precision"]
        0.5
    """
    tags = [_tags_of_pieces(*row) for row in zip(gold, predicted, strict=True)]
    return entity_scores([row for row, _ in tags], [row for _, row in tags])


def _tags_of_pieces(*readings: Sequence[tuple[int, int, str]]) -> list[list[str]]:
    """Return the tags of each reading for the pieces between all borders, so that no piece is split."""
    borders = sorted({border for spans in readings for start, end, _ in spans for border in (start, end)})
    position = {border: piece for piece, border in enumerate(borders)}
    tags = []
    for spans in readings:
        row = ["O"] * max(len(borders) - 1, 0)
        for start, end, kind in spans:
            pieces = range(position[start], position[end])
            row[pieces.start : pieces.stop] = [
                f"{'I' if piece > pieces.start else 'B'}-{kind}" for piece in pieces
            ]
        tags.append(row)
    return tags


def label_set_scores(gold: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """Scores of texts with any number of labels; those with a logit of at least 0 are predicted.

    Args:
        gold: Which text has which label, bool ``(texts, labels)``.
        logits: Likewise.

    Returns:
        ``micro_f1`` over all pairs of text and label; ``macro_f1``, the mean over the labels that occur in
        either; ``average_precision``, the mean over the gold labels.
    """
    predicted = logits >= 0
    occurs, in_gold = (gold | predicted).any(0), gold.any(0)
    precisions = [average_precision_score(gold[:, i], logits[:, i]) for i in np.flatnonzero(in_gold)]
    each = f1_score(gold, predicted, average=None, zero_division=0)
    return {
        "micro_f1": float(f1_score(gold, predicted, average="micro", zero_division=0)),
        "macro_f1": float(np.mean(each[occurs])) if occurs.any() else 0.0,
        "average_precision": float(np.mean(precisions)) if precisions else 0.0,
    }


def expected_calibration_error(scores: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Mean distance between score and share of right answers, over bins of equal width, by their sizes.

    ``scores`` in [0, 1] and ``right`` are ``(answers,)``; without an answer it is 0.

    Example:
        >>> expected_calibration_error(np.array([0.75, 0.75, 1.0]), np.array([True, False, True]))
        0.16666666666666666
    """
    of_score = np.minimum((scores * bins).astype(int), bins - 1)
    distances = np.bincount(of_score, right.astype(float) - scores, minlength=bins)
    return float(np.abs(distances).sum() / max(len(scores), 1))


def _as_numbers(values: dict[str, Any]) -> dict[str, float]:
    return {
        "f1": float(values["f1-score"]),
        "precision": float(values["precision"]),
        "recall": float(values["recall"]),
        "support": int(values["support"]),
    }


def _pieces(gold: Sequence[str], predicted: Sequence[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Cut a sentence where no entity of either continues: seqeval takes quadratic time in its length."""
    start = 0
    for i in range(1, len(gold) + 1):
        if i == len(gold) or (i - start >= PIECE and "I" not in (gold[i][0], predicted[i][0])):
            yield list(gold[start:i]), list(predicted[start:i])
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
        does not know scores at chance level).
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
