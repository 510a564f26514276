"""CoNLL files: a token and its tag on a line, an empty line between sentences."""

import re
from pathlib import Path

from ..errors import DataError

CONLL_ENDINGS = (".conll", ".bio", ".iob", ".iob2", ".bioes", ".tsv", ".txt")
"""Endings of NER data that is read as CoNLL."""


def read_conll(file: Path) -> tuple[list[list[str]], list[list[str]], list[int], int]:
    """Read a CoNLL file: the first column is the token, the last the tag.

    Columns are separated by tabs where a line has one, else by blanks; no other character ends a column or a
    line, because words may hold it. ``-DOCSTART-`` lines and comments (``#`` alone or before a blank, ahead
    of the first token of a sentence) are left out.

    Returns:
        Tokens and tags of each sentence, the line on which each begins, and the number of comments.

    Raises:
        DataError: The file is not text, or has a line without a tag; with the line.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")  # without the mark that some editors put first
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not text in UTF-8 ({error}); save it as UTF-8.") from error
    if "\0" in text:
        raise DataError(f"{file} is not a text file: it has zero bytes.")
    tokens: list[list[str]] = []
    tags: list[list[str]] = []
    lines: list[int] = []
    comments, inside = 0, False
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        columns = [part.strip(" ") for part in line.split("\t")] if "\t" in line else line.split(" ")
        columns = columns if "\t" in line else [part for part in columns if part]
        if not any(columns):
            inside = False
            continue
        if columns[0] == "-DOCSTART-":
            continue
        if not inside and re.match(r"#(\s|$)", line):
            comments += 1
            continue
        if len(columns) < 2 or not columns[0] or not columns[-1]:
            raise DataError(
                f"{file}, line {number}: {line.strip()[:60]!r} is not a token with a tag; write both, with a "
                "blank or a tab between them."
            )
        if not inside:
            tokens.append([])
            tags.append([])
            lines.append(number)
            inside = True
        tokens[-1].append(columns[0])
        tags[-1].append(columns[-1])
    return tokens, tags, lines, comments
