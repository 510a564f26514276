"""Text files as rows with their line: delimited tables, JSON and plain lines, packed or not, in any encoding.

The one reader of all commands; it needs no other package.
"""

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import DataError, first_line
from ..model.gate_mtpf import with_unique_keys

JSON = (".json", ".jsonl", ".ndjson")
TABLES = (".csv", ".tsv")
LINES = (".txt",)

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "devel", "development", "testa"),
    "test": ("test", "testb"),
}
"""Split → the words in names of files that mean it."""

CONLL = (
    *(".conll", ".bio", ".iob", ".iob2", ".bioes", ".annotated"),
    *(f".{name}" for names in SPLITS.values() for name in names),
)
"""Endings of files with a word and its tag on each line, and of nothing else."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    *((mark, "utf-32") for mark in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),  # before UTF-16: it starts so
    *((mark, "utf-16") for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
)
_DELIMITERS = ",;\t|"
_ROWS = ("data", "rows", "examples")
"""Keys under which a JSON document has its rows."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def ending(path: str | Path) -> str:
    """Return the ending of a file's name in lower case, without that of gzip.

    Example:
        >>> [ending(name) for name in ("a.CSV", "b.jsonl.gz", "eng.testa")]
        ['.csv', '.jsonl', '.testa']
    """
    return Path(Path(path).name.lower().removesuffix(".gz")).suffix


def read_file(
    file: str | Path, encoding: str | None = None, header: bool = True
) -> Iterator[tuple[str, Any]]:
    """Yield the location (``line 3``) and the value of each row of a table, a JSON or a text file.

    A row of a table, or a line of text as ``text``, is a dict of strings; of JSON it is what it is.

    Args:
        file: Its ending says what it is: `TABLES`, `JSON`; any other holds lines of text.
        encoding: By default that of the byte order mark, else UTF-8.
        header: Whether the first line of a table has the names; else columns are named ``1``, ``2``, ...

    Raises:
        DataError: With file, line, what was seen, and what is accepted.
    """
    kind = ending(file)
    with open_binary(file) as stream:
        if kind in TABLES:
            yield from _table(numbered_lines(stream, str(file), encoding), str(file), kind, header)
        elif kind in JSON:
            yield from _json(numbered_lines(stream, str(file), encoding), str(file))
        else:
            yield from read_lines(stream, str(file), encoding)


def read_lines(stream: Any, name: str, encoding: str | None = None) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each line of a binary stream as `read_file` does."""
    for number, line in numbered_lines(stream, name, encoding):
        yield f"line {number}", {"text": line.removesuffix("\n").removesuffix("\r")}


def split_fasttext(line: str) -> tuple[list[str], str]:
    """Return the labels that a line of fastText begins with, and its text.

    Example:
        >>> split_fasttext("__label__joy __label__awe What a day")
        (['joy', 'awe'], 'What a day')
    """
    labels = []
    while match := re.match(r"\s*__label__(\S*)\s*", line):
        labels.append(match[1])
        line = line[match.end() :]
    return labels, line


def read_labelled_lines(
    lines: Iterable[tuple[str, dict[str, str]]], name: str, numbered: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the labels and the text of each line of fastText; or its two columns, named by number."""
    for at, row in lines:
        line = row["text"].strip()
        labels, text = split_fasttext(line)
        if not line:
            continue
        if numbered:
            first, *rest = re.split("\t" if "\t" in line else r"\s+", line, maxsplit=1)
            yield at, {"1": first, "2": rest[0] if rest else ""}
        elif not labels:
            raise DataError(
                f"{name}, {at}: {line[:60]!r} does not begin with __label__, as lines of fastText do. "
                "If each line has a label and a text, say where: --columns.label 1 --columns.text 2."
            )
        else:
            yield at, {"label": labels, "text": text}


@contextmanager
def open_binary(file: str | Path) -> Iterator[Any]:
    """Open a file for reading bytes; one that gzip packed, whatever its name, is unpacked.

    Raises:
        DataError: It cannot be read, or its packed data is damaged.
    """
    try:
        with open(file, "rb") as stream:
            if stream.peek(2)[:2] == b"\x1f\x8b":
                with gzip.open(stream) as unpacked:
                    yield unpacked
            else:
                yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file} is damaged: {first_line(error)}; fetch or pack it again.") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error


def numbered_lines(stream: Any, name: str, encoding: str | None = None) -> Iterator[tuple[int, str]]:
    r"""Yield the number and the text of each line of a binary stream, with its end; only ``\n`` ends a line.

    Raises:
        DataError: Bytes that are not of the encoding, zero bytes, or no such encoding.
    """
    try:
        codec = codecs.lookup(encoding or _mark(stream) or "utf-8").name
        "".encode(codec)  # `codecs` also has some that are not of text
    except LookupError as error:
        raise DataError(
            f"There is no text encoding {encoding!r}; usual ones: utf-8, utf-16, latin-1."
        ) from error
    codec = "utf-8-sig" if codec == "utf-8" else codec
    if codec.startswith(("utf-16", "utf-32", "utf_16", "utf_32")):  # the byte of "\n" may be half a character
        lines: Iterable[Any] = TextIOWrapper(stream, codec, newline="\n")
    else:
        lines = stream
    number = 0
    try:
        for number, line in enumerate(lines, start=1):  # noqa: B007
            if isinstance(line, bytes):
                line = line.decode(codec if number == 1 or codec != "utf-8-sig" else "utf-8")
            if "\0" in line:
                raise DataError(
                    f"{name}, line {number} has zero bytes: it is not text, or in an encoding to be named "
                    "with --encoding."
                )
            yield number, line
    except UnicodeDecodeError as error:
        line_number = number + (lines is not stream)  # a line that is not decoded has not been counted
        known = codec.removesuffix("-sig").upper()
        hint = "its encoding" if encoding is None else "another encoding"
        raise DataError(
            f"{name}, line {line_number} is not {known}: {error.reason}; save it as UTF-8, or name {hint} "
            "to adapt, label or predict: --encoding latin-1."
        ) from error


def has_mark(file: str | Path) -> bool:
    """Say whether a file starts with a byte order mark."""
    with open_binary(file) as stream:
        return _mark(stream) is not None


def _mark(stream: Any) -> str | None:
    return next((encoding for mark, encoding in _MARKS if stream.peek(4).startswith(mark)), None)


# JSON


def parse_json(text: str, location: str) -> Any:
    """Parse JSON strictly: no key twice, no half of a surrogate pair.

    Raises:
        DataError: With the location and the reason.
    """
    try:
        value = json.loads(text, object_pairs_hook=with_unique_keys)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("ascii", "backslashreplace").decode()
        raise DataError(
            f"{location} is not valid JSON text: {half} is half of a surrogate pair, which is not a "
            "character; write both halves, or remove it."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location} is not valid JSON: {first_line(error)}.") from error
    return value


def _json(lines: Iterator[tuple[int, str]], name: str) -> Iterator[tuple[str, Any]]:
    """Yield the values of a file of JSON lines, or the elements of one document."""
    filled = ((number, line) for number, line in lines if line.strip())
    first = next(filled, None)
    if first is None:
        raise DataError(f"{name} is empty.")
    number, line = first
    # One document: a list, except of a text and its annotations, or an object that the line does not end.
    if re.match(r"\s*\[(?!\s*\")", line) or re.search(r"[\[{,:]\s*$", line):
        text = line + "".join(rest for _, rest in lines)
        rows = parse_json(text, name)
        if isinstance(rows, dict):
            rows = next((rows[key] for key in _ROWS if isinstance(rows.get(key), list)), [rows])
        yield from ((f"row {row}", value) for row, value in enumerate(rows, start=1))
        return
    for number, line in chain([first], filled):
        yield f"line {number}", parse_json(line, f"{name}, line {number}")


# Delimited tables


class _Lines:
    """An iterator of lines that knows the number of the last one."""

    def __init__(self, lines: Iterable[tuple[int, str]], name: str):
        self.lines, self.name, self.number = iter(lines), name, 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        self.number, line = next(self.lines)
        return line


def _table(
    lines: Iterable[tuple[int, str]], name: str, kind: str, header: bool
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of a table; every row has as many fields as the header.

    An index that pandas or R wrote, first and without a name, is left out; other columns without a name are
    named by their number.
    """
    source = _Lines(lines, name)
    first = next((line for line in source if line.strip()), None)
    if first is None:
        raise DataError(f"{name} is empty.")
    if "\r" in first.rstrip("\r\n"):
        raise DataError(
            f"{name}, line {source.number} has carriage returns inside; save it with line ends of \\n or "
            "\\r\\n, not of \\r alone."
        )
    csv.field_size_limit(2**31 - 1)  # the default of 131,072 is less than a long text has
    told = re.fullmatch(r'"?sep=(.)"?\s*', first, re.IGNORECASE)
    delimiter = "\t" if kind == ".tsv" else told[1] if told else _delimiter(first)
    spaced = f"{delimiter} " in first  # as in: text, label
    records = _records(source if told else _again(first, source), source, kind, delimiter, spaced)
    start, fields = next(records, (0, []))
    if not fields:
        raise DataError(f"{name} is empty.")
    if header:
        names = [field.strip() or str(column) for column, field in enumerate(fields, start=1)]
        twice = next((column for column in names if names.count(column) > 1), None)
        if twice:
            raise DataError(f"{name}, line {start}: two columns are named {twice!r}; rename one.")
        skipped = 0 if fields[0].strip() or len(fields) == 1 else 1
    else:
        names, skipped = [str(column) for column in range(1, len(fields) + 1)], 0
        records = chain([(start, fields)], records)
    for start, fields in records:
        if len(fields) != len(names):
            raise DataError(_other_number(name, start, fields, names, header, delimiter, kind))
        yield f"line {start}", dict(zip(names[skipped:], fields[skipped:], strict=True))


def _again(first: str, source: _Lines) -> Iterator[str]:
    yield first
    yield from source


def _delimiter(header: str) -> str:
    """Return the delimiter that makes the most columns of a header."""
    counts = {mark: len(next(csv.reader([header], delimiter=mark))) for mark in _DELIMITERS}
    return max(_DELIMITERS, key=lambda mark: counts[mark])


def _records(
    lines: Iterator[str], source: _Lines, kind: str, delimiter: str, spaced: bool
) -> Iterator[tuple[int, list[str]]]:
    """Yield first line and fields of each record; values separated by tabs in a .tsv file may hold quotes."""
    plain = kind == ".tsv"
    quoting: Any = csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, skipinitialspace=spaced, strict=True)
    while True:
        before = source.number
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{source.name}, line {before + (source.number > before)}: {first_line(error)}. A field that "
                'holds a quotation mark is written in quotes, with each mark doubled: "say ""hi""".'
            ) from error
        if fields is None:
            return
        if fields:  # not an empty line
            start = before + (source.number > before)  # the first line may have been read before
            yield start, [_unquoted(field) for field in fields] if plain else fields


def _unquoted(field: str) -> str:
    if len(field) > 1 and field[0] == field[-1] == '"':
        return field[1:-1].replace('""', '"')
    return field


def _other_number(
    name: str, line: int, fields: list[str], names: list[str], header: bool, delimiter: str, kind: str
) -> str:
    shown = delimiter.join(fields)
    seen = f"{shown[:60]}…" if len(shown) > 60 else shown
    mark = {"\t": "tab", ",": "comma", ";": "semicolon"}.get(delimiter, repr(delimiter))
    columns = f"the header has {len(names)} ({', '.join(names)})" if header else f"the first row {len(names)}"
    fix = "write a blank instead" if kind == ".tsv" else 'write such a field in quotes: "yes, please"'
    return (
        f"{name}, line {line} has {len(fields)} fields, but {columns}: {seen!r}. Is there a {mark} or a line "
        f"break inside a field? Then {fix}."
    )
