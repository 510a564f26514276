"""The texts of a file to predict, read as the data of apps is."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..model.texts_mtpf import MAX_CHARACTERS
from .columns import choose_column, has_words
from .conll import read_conll
from .text_files import (
    CONLL,
    JSON,
    TABLES,
    ending,
    numbered_lines,
    open_binary,
    read_file,
    read_lines,
    split_fasttext,
)


def read_texts(file: str, column: str | None = None, encoding: str | None = None) -> Iterator[str]:
    """Yield the texts of a file; tagged words are joined by spaces, labels of fastText are left out.

    Args:
        file: Its ending says what it is, see `read_file`.
        column: Name of the column of texts or words in tables, JSON and Parquet; its number, from 1, in CoNLL
            files and tables without names.
        encoding: By default that of the byte order mark, else UTF-8.

    Raises:
        DataError: With file, line, what was seen, and what is accepted.
    """
    kind, number = ending(file), column if column and column.isdecimal() else None
    if kind in CONLL:
        with open_binary(file) as stream:
            lines = numbered_lines(stream, file, encoding)
            words, _, starts, _ = read_conll(lines, file, {"tokens": number} if number else {})
        rows: Any = ((f"line {at}", {"tokens": row}) for at, row in zip(starts, words, strict=True))
        yield from _texts(rows, file, None)
    elif kind == ".parquet":
        from .sources import load_file  # imports datasets, which takes a second

        rows = ((f"row {at}", row) for at, row in enumerate(load_file(Path(file)), start=1))
        yield from _texts(rows, file, column)
    elif kind in (*JSON, *TABLES):
        yield from _texts(read_file(file, encoding, header=not (number and kind in TABLES)), file, column)
    else:
        with open_binary(file) as stream:
            yield from read_text_lines(stream, file, encoding)


def read_text_lines(stream: Any, name: str, encoding: str | None = None) -> Iterator[str]:
    """Yield the text of each line of a binary stream, as `read_texts` does."""
    lines = read_lines(stream, name, encoding)
    yield from _texts(((at, {"text": split_fasttext(row["text"])[1]}) for at, row in lines), name, "text")


def _texts(rows: Iterable[tuple[str, Any]], name: str, column: str | None) -> Iterator[str]:
    chosen = None
    for at, row in rows:
        where = f"{name}, {at}"
        if isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) and isinstance(row[1], dict):
            row = {"text": row[0]}  # of spaCy
        if isinstance(row, dict):
            row = row["data"] if isinstance(row.get("data"), dict) else row  # a task of Label Studio
            row = {"tokens": row["tokenized_text"]} if "tokenized_text" in row else row  # of GLiNER
        if not isinstance(row, dict):
            raise DataError(f"{where} is {str(row)[:40]!r}, not an object with keys.")
        if chosen is None:
            role = "text" if column or not has_words(row) else "tokens"
            chosen = choose_column(role, row, name, {"text": column} if column else {}, "--column")
        if chosen not in row:
            raise DataError(f"{where} has no {chosen!r}; it has: {', '.join(row)}. Choose one with --column.")
        text = row[chosen]
        if isinstance(text, list) and all(isinstance(word, str) for word in text):
            text = " ".join(text)
        if not isinstance(text, str):
            raise DataError(f"{where}: {chosen!r} is {type(text).__name__}, not a string.")
        if len(text) > MAX_CHARACTERS:
            raise DataError(f"{where} has {len(text):,} characters; at most {MAX_CHARACTERS:,} are accepted.")
        yield text
