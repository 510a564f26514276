"""CoNLL files: a token and its tag on a line, an empty line between sentences."""

from pathlib import Path

from ..errors import DataError
from .tag_schemes import split_tag

CONLL_ENDINGS = (".conll", ".bio", ".iob", ".iob2", ".bioes", ".tsv", ".txt")
"""Endings that are read as CoNLL where NER data is wanted."""


def read_conll(file: Path) -> tuple[list[list[str]], list[list[str]], list[int]]:
    """Read a CoNLL file: the first column is the token, the last the tag.

    Columns are separated by tabs where a line has one, else by white space. ``-DOCSTART-`` lines and comments
    (``#`` at the start of a line whose last column is no tag) are left out.

    Returns:
        Tokens and tags of each sentence, and the line on which each begins.

    Raises:
        DataError: No text, or a line without a tag; with the line.
    """
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not a text file in UTF-8: {error}.") from error
    if "\0" in text:
        raise DataError(f"{file} is not a text file: it has zero bytes.")
    tokens: list[list[str]] = []
    tags: list[list[str]] = []
    lines: list[int] = []
    inside = False
    for number, line in enumerate(text.splitlines(), start=1):
        columns = [part.strip() for part in line.split("\t")] if "\t" in line else line.split()
        if not any(columns):
            inside = False
            continue
        if columns[0] == "-DOCSTART-" or (columns[0].startswith("#") and not _is_tag(columns[-1])):
            continue
        if len(columns) < 2 or not columns[0] or not columns[-1]:
            raise DataError(f"{file}, line {number}: {line.strip()[:60]!r} is no token with a tag.")
        if not inside:
            tokens.append([])
            tags.append([])
            lines.append(number)
            inside = True
        tokens[-1].append(columns[0])
        tags[-1].append(columns[-1])
    return tokens, tags, lines


def _is_tag(column: str) -> bool:
    try:
        split_tag(column)
    except DataError:
        return False
    return True


__all__ = ["CONLL_ENDINGS", "read_conll"]
