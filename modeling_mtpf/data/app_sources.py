"""The labelled rows of an app: files, folders of splits, Hub data sets, and the columns they are read from.

Every row keeps its file and line, so that a message can name it.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset

from ..errors import DataError
from .sources import READERS, Source, load_file, load_hub, source_files, source_name, tables

COLUMNS = {
    "ner": (("tokens", "words"), ("ner_tags", "tags", "ner", "labels")),
    "tc": (
        ("text", "sentence", "utterance", "content", "query"),
        ("label_text", "label", "labels", "intent", "category", "class"),
    ),
}
"""Accepted names of the input and of the label column; the first one present is taken."""

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}

CONLL_ENDINGS = (".conll", ".bio", ".iob", ".iob2", ".bioes", ".tsv", ".txt")

ENDINGS = {
    "ner": (*READERS, *CONLL_ENDINGS),
    "tc": tuple(ending for ending in READERS if ending != ".txt"),
}
"""Family → endings of its data files."""


@dataclass
class Rows:
    """Rows of a file or Hub split: texts, or the words of each sentence, and their labels as written.

    ``locations`` has the file and line, or row, of each; ``comments`` counts lines of CoNLL files left out.
    """

    inputs: list = field(default_factory=list)
    labels: list = field(default_factory=list)
    locations: list[str] = field(default_factory=list)
    comments: int = 0


def read_splits(source: Source, family: str, label_names: list[str] | None = None) -> dict[str, Rows]:
    """Read a file, a folder of split files, a Hub data set ``owner/name[:config][@revision]``, or tables.

    Args:
        source: The data; a single file is the split ``train``.
        family: ``ner`` or ``tc``.
        label_names: Names of labels that are written as integers.

    Raises:
        DataError: A mistake in the data, with its file and line.
    """
    loaded: Any = tables(source)
    if loaded is None:
        path = Path(source)
        if path.is_file():
            return {"train": _read_files([path], family, label_names)}
        if path.is_dir():
            files_of_split = split_files(path, family).items()
            return {split: _read_files(files, family, label_names) for split, files in files_of_split}
        loaded = load_hub(source)
    elif not isinstance(source, (str, Path)):
        source = source_name(source)
    splits: dict[str, Rows] = {}
    for split, aliases in SPLITS.items():
        alias = next((alias for alias in aliases if alias in loaded), None)
        if alias:
            splits[split] = _rows_of(loaded[alias], f"{source} ({alias})", family, label_names)
    if not splits:
        raise DataError(
            f"{source} has no split named train, validation or test; it has: {', '.join(loaded)}."
        )
    return splits


def read_one_split(source: Source, wanted: str, family: str, label_names: list[str] | None = None) -> Rows:
    """Read the split that a source is named for: the one of that name, else its only one.

    Raises:
        DataError: It has several others, of which none is meant for this; and as `read_splits`.
    """
    splits = read_splits(source, family, label_names)
    if wanted not in splits and len(splits) > 1:
        raise DataError(
            f"{source_name(source)} is to be the {wanted} split, but has {', '.join(sorted(splits))}; "
            "name one file."
        )
    return splits.get(wanted) or next(iter(splits.values()))


def split_files(folder: Path, family: str) -> dict[str, list[Path]]:
    """Sort the files of a folder by split; files that name no split are all training data."""
    splits: dict[str, list[Path]] = {}
    others: list[Path] = []
    for file in source_files(folder, ENDINGS[family]):
        stem = re.split("[-_.]", file.stem.lower())[0]
        split = next((split for split, aliases in SPLITS.items() if stem in aliases), None)
        (splits.setdefault(split, []) if split else others).append(file)
    if splits and others:
        raise DataError(
            f"{folder} has split files and others, e.g. {others[0].name}; name every file after its split "
            "(train, validation, test), or none."
        )
    return splits or {"train": others}


def _read_files(files: list[Path], family: str, label_names: list[str] | None) -> Rows:
    joined = Rows()
    for file in files:
        part = _read_file(file, family, label_names)
        joined.inputs += part.inputs
        joined.labels += part.labels
        joined.locations += part.locations
        joined.comments += part.comments
    return joined


def _read_file(file: Path, family: str, label_names: list[str] | None) -> Rows:
    source_files(file, ENDINGS[family])  # checks the ending
    try:
        if family == "ner" and file.suffix in CONLL_ENDINGS:
            return _read_conll(file)
        if file.suffix == ".csv" and family == "ner":
            raise DataError(
                f"{file}: a CSV file cannot hold lists of words; use CoNLL, JSON lines or Parquet."
            )
        dataset = load_file(file, text_columns=True)
        return _rows_of(dataset, str(file), family, label_names, _line_numbers(file, len(dataset)))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not text in UTF-8 ({error}); save it as UTF-8.") from error


def _read_conll(file: Path) -> Rows:
    """Read a CoNLL file: a line has a token first and its tag last, an empty line ends a sentence.

    Columns are separated by tabs where a line has one, else by blanks; no other character ends a column or a
    line, because words may hold it. ``-DOCSTART-`` lines and comments (``#`` alone or before a blank, ahead
    of the first token of a sentence) are left out.
    """
    text = file.read_bytes().decode("utf-8-sig")  # without the mark that some editors put first
    if not text:
        raise DataError(f"{file} is empty.")
    if "\0" in text:
        raise DataError(f"{file} is not a text file: it has zero bytes.")
    rows = Rows()
    inside = False
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        columns = [part.strip(" ") for part in line.split("\t")]
        if len(columns) == 1:
            columns = [part for part in line.split(" ") if part]
        if not any(columns):
            inside = False
        elif columns[0] == "-DOCSTART-":
            continue
        elif not inside and re.match(r"#(\s|$)", line):
            rows.comments += 1
        elif len(columns) < 2 or not columns[0] or not columns[-1]:
            raise DataError(
                f"{file}, line {number}: {line.strip()[:60]!r} is not a token with a tag; write both, with a "
                "blank or a tab between them."
            )
        else:
            if not inside:
                rows.inputs.append([])
                rows.labels.append([])
                rows.locations.append(f"{file}, line {number}")
                inside = True
            rows.inputs[-1].append(columns[0])
            rows.labels[-1].append(columns[-1])
    if not rows.inputs:
        raise DataError(f"{file} has no sentence; write a word and its tag on each line.")
    return rows


def _rows_of(
    dataset: Dataset, name: str, family: str, label_names: list[str] | None, lines: list[int] | None = None
) -> Rows:
    columns = []
    for aliases in COLUMNS[family]:
        column = next((alias for alias in aliases if alias in dataset.column_names), None)
        if column is None:
            accepted, present = " or ".join(map(repr, aliases)), ", ".join(dataset.column_names)
            raise DataError(f"{name} has no column {accepted}; it has: {present}.")
        columns.append(column)
    if len(dataset) == 0:
        raise DataError(f"{name} has no rows.")
    feature = dataset.features[columns[1]]
    feature = getattr(feature, "feature", feature)  # of a list that of its elements
    if isinstance(feature, ClassLabel):
        label_names = feature.names
    inputs, labels = (list(dataset[column][:]) for column in columns)
    places = [f"line {line}" for line in lines] if lines else [f"row {i}" for i in range(1, len(inputs) + 1)]
    rows = Rows(inputs, labels, [f"{name}, {place}" for place in places])
    check = check_sentence if family == "ner" else check_text
    for row, location in enumerate(rows.locations):
        labels[row] = _named(labels[row], label_names, location, columns[1])
        check(inputs[row], labels[row], location)
    return rows


def _line_numbers(file: Path, rows: int) -> list[int] | None:
    """Line of each row of a JSON-lines file, or ``None`` where a row is not a line."""
    if READERS[file.suffix] != "json":
        return None
    with file.open("rb") as stream:
        lines = [number for number, line in enumerate(stream, start=1) if line.strip()]
    return lines if len(lines) == rows else None


def _named(label: Any, names: list[str] | None, location: str, column: str) -> Any:
    """Turn the integers of Hub data sets into names; leave names as they are."""
    if isinstance(label, list):
        return [_named(part, names, location, column) for part in label]
    if isinstance(label, bool) or not isinstance(label, int):
        return label
    if names is None or any(name.lstrip("-").isdigit() for name in names):
        return str(label)
    if not 0 <= label < len(names):
        raise DataError(f"{location}: {column} is {label}, but there are {len(names)} label names.")
    return names[label]


def check_sentence(words: Any, tags: Any, location: str) -> None:
    """Raise `DataError` unless there is one tag for each word."""
    for name, value in (("tokens", words), ("tags", tags)):
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            raise DataError(f"{location}: the {name} must be a list of words, not {str(value)[:60]!r}.")
    if len(words) != len(tags):
        raise DataError(f"{location} has {len(words)} tokens but {len(tags)} tags.")


def check_text(text: Any, label: Any, location: str) -> None:
    """Raise `DataError` unless there are a text and a label."""
    if not isinstance(text, str) or not isinstance(label, str) or not label:
        raise DataError(
            f"{location}: a text and a label are needed, not {str(text)[:40]!r} and {str(label)[:40]!r}."
        )
