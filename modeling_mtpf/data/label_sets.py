"""Texts with any number of labels each: a list of names, names in one string, or a column for each label."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import DataError

_YES_NO = {True: True, False: False, "1": True, "0": False, "true": True, "false": False}
"""What a column of one label may hold; 1, 0, 1.0 and 0.0 are equal to the first two."""


def are_sets(labels: Sequence[Any]) -> bool:
    """Say whether each text has a list of labels."""
    return len(labels) > 0 and isinstance(labels[0], list)


def split_names(label: Any, separator: str, location: str) -> list[str]:
    """Return the names in a string; an empty one has none."""
    if not isinstance(label, str):
        raise DataError(f"{location}: {str(label)[:40]!r} is not a string, which --label_separator is for.")
    return [name.strip() for name in label.split(separator)] if label.strip() else []


def stripped(label: Any) -> Any:
    """Return a label, or a list of labels, without blanks at their ends."""
    if isinstance(label, list):
        return [stripped(name) for name in label]
    return label.strip() if isinstance(label, str) else label


def are_marked(row: Mapping[str, Any], family: str, names: Sequence[str] | None) -> bool:
    """Say whether a row has a column for each label."""
    return family == "tc" and bool(names) and all(name in row for name in names or ())


def with_names(row: Mapping[str, Any], names: Sequence[str], location: str) -> dict[str, Any]:
    """Return a row with the list of labels whose columns say yes, in place of these columns.

    Raises:
        DataError: A column holds something else than yes or no.
    """
    marked = []
    for name in names:
        value = row[name].strip().lower() if isinstance(row[name], str) else row[name]
        if value is None or isinstance(value, (list, dict)) or value not in _YES_NO:
            raise DataError(
                f"{location}: the column of the label {name!r} holds {str(row[name])[:40]!r}; write 1 or 0, "
                "or true or false."
            )
        if _YES_NO[value]:
            marked.append(name)
    return {**{key: value for key, value in row.items() if key not in names}, "label_text": marked}


def check_names(names: list[Any], location: str) -> None:
    """Raise `DataError` for a list that does not hold distinct names."""
    wrong = [name for name in names if not isinstance(name, str) or not name.strip()]
    if wrong or len(set(names)) < len(names):
        fault = f"{str(wrong[0])[:40]!r} is not a name" if wrong else "a label is named twice"
        raise DataError(f"{location}: the labels of a text are a list of different names, but {fault}.")


def label_matrix(labels: Sequence[Sequence[str]], names: Sequence[str]) -> np.ndarray:
    """Return which text has which label, bool ``(texts, names)``; other labels are left out.

    Example:
        >>> label_matrix([["a"], ["b", "c"], []], ["a", "b"]).astype(int).tolist()
        [[1, 0], [0, 1], [0, 0]]
    """
    column = {name: number for number, name in enumerate(names)}
    matrix = np.zeros((len(labels), len(names)), dtype=bool)
    for row, of_text in zip(matrix, labels, strict=True):
        row[[column[name] for name in of_text if name in column]] = True
    return matrix
