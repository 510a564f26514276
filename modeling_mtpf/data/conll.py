"""CoNLL files: a line has a token and its tag in columns, an empty line ends a sentence."""

import re
from collections.abc import Iterable, Mapping

from ..errors import DataError

_TAG = re.compile(r"O|[BIESLU]-(.+)")
_SEEN = 60
"""Characters of a line that a message shows."""


def read_conll(
    lines: Iterable[tuple[int, str]], file: str, columns: Mapping[str, str]
) -> tuple[list[list[str]], list[list[str]], list[int], int]:
    """Return words and tags of each sentence, the numbers of their first lines, and the number of comments.

    Columns are separated by tabs where a line has one, else by blanks; no other character ends a column or a
    line, because words may hold it; all lines have as many. ``-DOCSTART-`` lines and comments are left out:
    ``#`` alone or before a blank, ahead of the first token of a sentence, on a line that has neither a tab
    nor a tag as the second of two columns.

    Args:
        lines: Number and text of each.
        file: For messages.
        columns: Numbers of the columns ``tokens`` and ``tags``, from 1; the first and the last by default.

    Raises:
        DataError: With the line; or the columns are not told and cannot be guessed.
    """
    chosen = {role: _number(columns[role], role) for role in ("tokens", "tags") if role in columns}
    sentences: list[list[list[str]]] = []
    starts: list[int] = []
    comments, inside, width, first = 0, False, 0, 0
    for number, line in lines:
        parts = _columns(line)
        if not any(parts):
            inside = False
        elif parts[0] == "-DOCSTART-":
            continue
        elif not inside and _is_comment(line, parts):
            comments += 1
        else:
            if len(parts) < 2 or not parts[0] or not parts[-1]:
                raise DataError(
                    f"{file}, line {number}: {line.strip()[:_SEEN]!r} is not a token with a tag; write both, "
                    "with a blank or a tab between them."
                )
            width, first = width or len(parts), first or number
            if len(parts) != width:
                raise DataError(
                    f"{file}, line {number}: {line.strip()[:_SEEN]!r} has {len(parts)} columns, but line "
                    f"{first} has {width}; all lines need as many, with tabs between them where a token "
                    "holds a blank."
                )
            if not inside:
                sentences.append([])
                starts.append(number)
                inside = True
            sentences[-1].append(parts)
    if not sentences:
        raise DataError(f"{file} has no sentence; write a word and its tag on each line.")
    for role, column in chosen.items():
        if column > width:
            raise DataError(f"{file} has {width} columns, but --columns.{role} is {column}.")
    if not chosen:
        _check_columns(sentences, file)
    token, tag = chosen.get("tokens", 1) - 1, chosen.get("tags", width) - 1
    words = [[parts[token] for parts in sentence] for sentence in sentences]
    tags = [[parts[tag] for parts in sentence] for sentence in sentences]
    return words, tags, starts, comments


def _columns(line: str) -> list[str]:
    line = line.removesuffix("\n").removesuffix("\r")
    if "\t" in line:
        return [part.strip(" ") for part in line.split("\t")]
    return [part for part in line.split(" ") if part]


def _is_comment(line: str, parts: list[str]) -> bool:
    if "\t" in line or not re.match(r"#(\s|$)", line):
        return False
    return not (len(parts) == 2 and _TAG.fullmatch(parts[1]))


def _number(column: str, role: str) -> int:
    if not str(column).isdecimal() or int(column) < 1:
        raise DataError(f"--columns.{role} is {column!r}; columns of a CoNLL file are numbered, from 1.")
    return int(column)


def _check_columns(sentences: list[list[list[str]]], file: str) -> None:
    """Refuse a file whose first column numbers the tokens, or that has tags of the same types twice."""
    rows = [parts for sentence in sentences for parts in sentence]
    shown, width = "  ".join(rows[0])[:_SEEN], len(rows[0])
    choose = "choose with --columns.tokens and --columns.tags (in predict --column)"
    if width > 2 and all(re.fullmatch(r"\d+([-.]\d+)?", parts[0]) for parts in rows):
        raise DataError(
            f"{file} has numbers in its first column ({shown!r}), so it is not clear where words and "
            f"tags are; {choose}, e.g. --columns.tokens 2 --columns.tags 3."
        )
    last = _types([parts[-1] for parts in rows])
    for column in range(1, width - 1):
        types = _types([parts[column] for parts in rows])
        if types and (not last or types & last):
            raise DataError(
                f"{file} has tags in its columns {column + 1} and {width} ({shown!r}); {choose}, e.g. "
                f"--columns.tokens 1 --columns.tags {column + 1}."
            )


def _types(tags: list[str]) -> set[str]:
    """Return the entity types of a column of tags; nothing if it holds anything else."""
    matches = [_TAG.fullmatch(tag) for tag in tags]
    return {match[1] for match in matches if match and match[1]} if all(matches) else set()
