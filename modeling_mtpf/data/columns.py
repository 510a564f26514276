"""Which columns of a table hold what: by the names that the user gives, else by common ones."""

from collections.abc import Mapping
from typing import Any

from ..errors import DataError
from ..settings import nearest

COLUMNS = {
    "tokens": ("tokens", "words"),
    "tags": ("ner_tags", "tags", "ner", "labels"),
    "text": ("text", "sentence", "utterance", "content", "query"),
    "spans": ("spans", "entities", "label", "labels"),
    "label": ("label_text", "label", "labels", "intent", "category", "class"),
}
"""What a column holds → its accepted names, in any case; of several that are present the first is certain."""


def check_roles(columns: Mapping[str, str], family: str) -> None:
    """Raise `DataError` for the column of something that data of a family does not have."""
    roles = ("tokens", "tags", "text", "spans") if family == "ner" else ("text", "label")
    for role in columns:
        if role not in roles:
            hint = nearest(role, list(roles))
            raise DataError(
                f"columns.{role} is nothing that {family} data has; {hint}known: {', '.join(roles)}."
            )


def columns_of(row: dict[str, Any], name: str, family: str, named: Mapping[str, str]) -> tuple[str, str]:
    """Return the columns of input and label: those that the user named, else those of a certain name."""
    if family == "tc":
        return choose_column("text", row, name, named), choose_column("label", row, name, named)
    words, texts = _words(row), _candidates("text", row, lambda value: isinstance(value, str))
    if not {"tokens", "tags"} & set(named) and ({"text", "spans"} & set(named) or (texts and not words)):
        return choose_column("text", row, name, named), choose_column("spans", row, name, named)
    return choose_column("tokens", row, name, named), choose_column("tags", row, name, named)


def has_words(row: Mapping[str, Any]) -> bool:
    """Say whether a row has words, and no text."""
    return bool(_words(row)) and not _candidates("text", row, lambda value: isinstance(value, str))


def _words(row: Mapping[str, Any]) -> list[str]:
    return _candidates(
        "tokens", row, lambda value: isinstance(value, list) and not any(isinstance(v, dict) for v in value)
    )


def _candidates(role: str, row: Mapping[str, Any], accepts: Any) -> list[str]:
    return [column for column in row if str(column).strip().lower() in COLUMNS[role] and accepts(row[column])]


def choose_column(
    role: str, row: Mapping[str, Any], name: str, named: Mapping[str, str], option: str | None = None
) -> str:
    """Return the column of a row that the user named for a role, in any case, else the one of a known name.

    Args:
        role: A key of `COLUMNS`.
        row: Its keys are the names of the columns.
        name: Of the source, for messages.
        named: Columns of roles that the user named.
        option: Option that names it, ``--columns.<role>`` by default.

    Raises:
        DataError: There is no such column, or there are several.
    """
    option = option or f"--columns.{role}"
    present = ", ".join(str(column)[:60] for column in row)
    if role in named:
        wanted = str(named[role])
        same = [column for column in row if column == wanted] or [
            column for column in row if str(column).strip().lower() == wanted.strip().lower()
        ]
        if len(same) != 1:
            hint = nearest(wanted, list(row))
            raise DataError(f"{name} has no column {wanted!r}; {hint}it has: {present}.")
        return same[0]
    listed = role in ("tags", "spans")
    accepted = COLUMNS[role]
    columns = _candidates(role, row, lambda value: isinstance(value, (list, dict)) or not listed)
    certain = [column for column in columns if column.strip().lower() == accepted[0]]
    if len(columns) > 1 and len(certain) == 1:
        others = {column.strip().lower() for column in columns} - {accepted[0]}
        if role != "label" or others <= {"label", "labels"}:  # label_text names what label numbers
            return certain[0]
    if len(columns) > 1:
        several = " and ".join(map(repr, columns))
        raise DataError(
            f"{name} has the columns {several}, which may each hold the {role}; choose one with "
            f"{option}, e.g. {option} {columns[-1]}."
        )
    if not columns:
        names = " or ".join(map(repr, accepted))
        raise DataError(f"{name} has no column {names}; it has: {present}. Name it with {option}.")
    return columns[0]


def values_of(values: Any, name: str) -> list[Any]:
    """Return a list, an array, a Series or a table of one column as a list of plain values.

    Raises:
        DataError: It is a string, a mapping, a table of several columns, or holds no values.
    """
    columns = getattr(values, "column_names", getattr(values, "columns", None))
    if columns is not None and len(columns) != 1:
        raise DataError(
            f"{name} is a table with the columns {', '.join(map(str, columns))}; give one of them."
        )
    values = values if columns is None else values[columns[0]]
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__iter__"):
        kind = type(values).__name__
        raise DataError(f"{name} must be a list, array or Series, or a table of one column, not {kind}.")
    return [_plain(value) for value in values]


def _plain(value: Any) -> Any:
    """Return arrays and NumPy's scalars, tuples and sets as Python's types and lists."""
    if isinstance(value, (tuple, set, frozenset)):
        return list(value) if isinstance(value, tuple) else sorted(value, key=str)
    return value.tolist() if hasattr(value, "tolist") else value
