"""The labelled rows of an app: files, folders of splits, Hub data sets, and the columns they are read from.

Every row keeps its file and line, so that a message can name it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset

from ..errors import DataError
from .columns import check_roles, columns_of
from .conll import read_conll
from .label_sets import are_marked, check_names, with_names
from .sources import READERS, Source, load_file, load_hub, source_files, source_name, tables
from .span_forms import flat_row, read_brat, spans_of
from .text_files import (
    CONLL,
    SPLITS,
    TABLES,
    ending,
    numbered_lines,
    open_binary,
    read_file,
    read_labelled_lines,
)

CONLL_ENDINGS = (*CONLL, ".tsv", ".txt")

ENDINGS = {
    "ner": tuple(dict.fromkeys([*(end for end in READERS if end != ".csv"), *CONLL_ENDINGS])),
    "tc": tuple(READERS),
}
"""Family → endings of its data files, in any case, with or without .gz."""

PARALLEL = ("seq.in", {"tc": "label", "ner": "seq.out"})
"""Names of the file of texts and, for each family, the file with their labels line by line."""


class Reading(NamedTuple):
    """How a source is read: names of integer labels, columns by what they hold, and the text encoding."""

    label_names: list[str] | None = None
    columns: Mapping[str, str] = {}
    encoding: str | None = None


@dataclass
class Rows:
    """Rows of a file or Hub split: texts or words, and their labels or tags as written, or character spans.

    ``locations`` has the file and line, or row, of each; ``notes`` counts what was left out or changed.
    """

    inputs: list = field(default_factory=list)
    labels: list = field(default_factory=list)
    locations: list[str] = field(default_factory=list)
    notes: Counter = field(default_factory=Counter)

    def add(self, example: Any, label: Any, location: str) -> None:
        """Append a row."""
        self.inputs.append(example)
        self.labels.append(label)
        self.locations.append(location)


def read_splits(source: Source, family: str, reading: Reading = Reading()) -> dict[str, Rows]:  # noqa: B008
    """Read a file, a folder of split files, a Hub data set ``owner/name[:config][@revision]``, or tables.

    A single file is the split ``train``.

    Raises:
        DataError: A mistake in the data, with its file and line.
    """
    check_roles(reading.columns, family)
    loaded: Any = source
    if isinstance(source, (str, Path)):
        path = Path(source)
        loaded = tables(source)
        if loaded is None and path.is_file():
            return {"train": _read_files([path], family, reading)}
        if loaded is None and path.is_dir():
            return _read_folder(path, family, reading)
        loaded = load_hub(source) if loaded is None else loaded
    else:
        loaded = source if isinstance(source, dict) else {"train": source}
        source = source_name(source)
    splits: dict[str, Rows] = {}
    for split, aliases in SPLITS.items():
        alias = next((alias for alias in aliases if alias in loaded), None)
        if alias:
            splits[split] = _read_table(loaded[alias], f"{source} ({alias})", family, reading)
    if not splits:
        raise DataError(
            f"{source} has no split named train, validation or test; it has: {', '.join(loaded)}."
        )
    return splits


def read_one_split(source: Source, wanted: str, family: str, reading: Reading = Reading()) -> Rows:  # noqa: B008
    """Read the split that a source is named for: the one of that name, else its only one.

    Raises:
        DataError: It has several others, of which none is meant for this; and as `read_splits`.
    """
    splits = read_splits(source, family, reading)
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
        split = _split_named(file.name)
        (splits.setdefault(split, []) if split else others).append(file)
    if splits and others:
        raise DataError(
            f"{folder} has split files and others, e.g. {others[0].name}; name every file after its split "
            "(train, validation, test), or none."
        )
    return splits or {"train": others}


def _split_named(name: str) -> str | None:
    """Return the split that a file or folder is named for: the first that a part of its name is."""
    for part in re.split("[-_.]", name.lower()):
        for split, aliases in SPLITS.items():
            if part in aliases:
                return split
    return None


# Files and folders


def _read_folder(folder: Path, family: str, reading: Reading) -> dict[str, Rows]:
    """Read a folder of split files, or of a folder for each split, or of files that belong together."""
    if any(_together(folder, family)):
        return {"train": _read_together(folder, family, reading)}
    folders = {_split_named(part.name): part for part in sorted(folder.iterdir()) if part.is_dir()}
    parts = {split: part for split, part in folders.items() if split and any(_together(part, family))}
    if parts:
        return {split: _read_together(part, family, reading) for split, part in parts.items()}
    return {
        split: _read_files(files, family, reading) for split, files in split_files(folder, family).items()
    }


def _together(folder: Path, family: str) -> tuple[bool, bool]:
    """Say whether a folder has parallel files, and whether it has texts with annotations of BRAT."""
    return (folder / PARALLEL[0]).is_file(), family == "ner" and any(folder.glob("*.ann"))


def _read_together(folder: Path, family: str, reading: Reading) -> Rows:
    if not _together(folder, family)[0]:
        marked = {file.with_suffix(".txt") for kind in ("*.txt", "*.ann") for file in folder.glob(kind)}
        return _read_brat(sorted(marked), reading)
    files = [folder / PARALLEL[0], folder / PARALLEL[1][family]]
    texts, labels = ([row["text"] for _, row in read_file(file, reading.encoding)] for file in files)
    if len(texts) != len(labels):
        counts = f"{files[0]} has {len(texts)} lines, but {files[1].name} has {len(labels)}"
        raise DataError(f"{counts}; line by line they belong together.")
    rows = Rows()
    for number, (text, label) in enumerate(zip(texts, labels, strict=True), start=1):
        example = (text.split(), label.split()) if family == "ner" else (text, label.strip())
        rows.add(*example, f"{files[0]}, line {number}")
    return _checked(rows, family)


def _read_files(files: list[Path], family: str, reading: Reading) -> Rows:
    joined = Rows()
    for file in files:
        part = _read_file(file, family, reading)
        joined.inputs += part.inputs
        joined.labels += part.labels
        joined.locations += part.locations
        joined.notes += part.notes
    return joined


def _read_file(file: Path, family: str, reading: Reading) -> Rows:
    kind, columns = ending(file), reading.columns
    if kind == ".csv" and family == "ner":
        raise DataError(f"{file}: a CSV file cannot hold lists of words; use CoNLL, JSON lines or Parquet.")
    source_files(file, ENDINGS[family])  # checks the ending
    if kind == ".parquet":
        return _read_table(load_file(file), str(file), family, reading)
    if file.stat().st_size == 0 and not file.with_suffix(".ann").is_file():
        raise DataError(f"{file} is empty.")
    if family == "ner" and kind == ".txt" and file.with_suffix(".ann").is_file():
        return _read_brat([file], reading)
    if family == "ner" and kind in CONLL_ENDINGS:
        return _read_conll(file, reading)
    numbered = bool(columns) and all(str(column).isdecimal() for column in columns.values())
    records = read_file(file, reading.encoding, header=not (numbered and kind in TABLES))
    if kind == ".txt":
        records = read_labelled_lines(records, str(file), numbered)
    return _rows_of(records, str(file), family, reading)


def _read_brat(files: list[Path], reading: Reading) -> Rows:
    rows = Rows()
    for file in files:
        rows.add(*read_brat(file, reading.encoding, rows.notes), str(file))
    return rows


def _read_conll(file: Path, reading: Reading) -> Rows:
    with open_binary(file) as stream:
        lines = numbered_lines(stream, str(file), reading.encoding)
        words, tags, starts, comments = read_conll(lines, str(file), reading.columns)
    locations = [f"{file}, line {start}" for start in starts]
    return Rows(words, tags, locations, Counter(comment_lines_skipped=comments) if comments else Counter())


# Rows and their columns


def _read_table(table: Any, name: str, family: str, reading: Reading) -> Rows:
    """Read a table in memory or a split of a Hub data set; a list of dicts may hold what no table can."""
    if isinstance(table, list) and table and all(isinstance(row, dict) for row in table):
        return _rows_of(((f"row {n}", row) for n, row in enumerate(table, start=1)), name, family, reading)
    try:
        dataset: Dataset = table if isinstance(table, Dataset) else tables({"train": table})["train"]  # type: ignore[index]
    except DataError:
        if not hasattr(table, "iloc") or not table.columns.is_unique:
            raise
        # Arrow takes no mixed types, as in (0, 3, "PER").
        return _read_table(table.to_dict("records"), name, family, reading)
    dataset = dataset.with_format(None)
    if len(dataset) == 0:
        raise DataError(f"{name} has no rows.")
    first, names = dataset[0], {}
    unchanged = flat_row(first, family, f"{name}, row 1", Counter()) is first
    if unchanged and not are_marked(first, family, reading.label_names):
        chosen = columns_of(first, name, family, reading.columns)
        dataset = dataset.select_columns(list(dict.fromkeys([*chosen, *{"answer"} & set(first)])))
        feature = dataset.features[chosen[1]]
        feature = getattr(feature, "feature", feature)  # of a list that of its elements
        names = {"label_names": feature.names} if isinstance(feature, ClassLabel) else {}
    rows = ((f"row {number}", row) for number, row in enumerate(dataset.to_list(), start=1))
    return _rows_of(rows, name, family, reading._replace(**names))


def _rows_of(records: Iterable[tuple[str, Any]], name: str, family: str, reading: Reading) -> Rows:
    """Take input and label from each row, from the columns that the first one has."""
    rows, chosen = Rows(), None
    for at, record in records:
        location = f"{name}, {at}"
        row = flat_row(record, family, location, rows.notes)
        if row is None:
            continue
        if are_marked(row, family, reading.label_names):
            row = with_names(row, reading.label_names or [], location)
        chosen = chosen or columns_of(row, name, family, reading.columns)
        missing = next((column for column in chosen if column not in row), None)
        if missing is not None:
            raise DataError(f"{location} has no {missing!r}; it has: {', '.join(map(str, row))}.")
        example, label = (row[column] for column in chosen)
        if family == "ner" and isinstance(example, str):
            rows.add(example, spans_of(example, label, location, rows.notes), location)
        else:
            rows.add(example, _named(label, reading.label_names, location, chosen[1]), location)
    if chosen is None:
        left_out = ", ".join(f"{count} {note.replace('_', ' ')}" for note, count in rows.notes.items())
        raise DataError(f"{name} has no rows{left_out and f' that count: {left_out}'}.")
    return _checked(rows, family)


def _checked(rows: Rows, family: str) -> Rows:
    for example in zip(rows.inputs, rows.labels, rows.locations, strict=True) if family == "ner" else ():
        check_example(*example)  # texts are checked once their labels are taken apart
    return rows


def check_example(example: Any, labels: Any, location: str) -> None:
    """Raise `DataError` unless there is one tag for each word, or spans for a text."""
    if not isinstance(example, str):
        check_sentence(example, labels, location)


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
    """Raise `DataError` unless there are a text and a label, or a list of labels."""
    if isinstance(label, bool):
        raise DataError(f"{location}: the label is {label}, neither text nor number; write a name for it.")
    if isinstance(text, str) and isinstance(label, list):
        return check_names(label, location)
    if not isinstance(text, str) or not isinstance(label, str) or not label:
        raise DataError(
            f"{location}: a text and a label are needed, not {str(text)[:40]!r} and {str(label)[:40]!r}."
        )
