"""The labelled rows of an app: files, folders of splits, Hub data sets, and the columns they are read from.

Every row keeps its file and line, so that a message can name it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset

from ..errors import DataError
from .conll import CONLL_ENDINGS, read_conll
from .sources import READERS, load_file, load_hub, source_files

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

ENDINGS = {
    "ner": (*READERS, *CONLL_ENDINGS),
    "tc": tuple(ending for ending in READERS if ending != ".txt"),
}
"""Family → endings of its data files."""


@dataclass
class Rows:
    """Rows of one file or Hub split.

    Attributes:
        inputs: Texts, or the words of each sentence.
        labels: One a text, or one a word, as they are written.
        locations: File and line, or row, of each; for messages.
        comments: Lines of a CoNLL file that were left out.
    """

    inputs: list
    labels: list
    locations: list[str]
    comments: int = 0


def read_splits(source: str | Path, family: str, label_names: list[str] | None = None) -> dict[str, Rows]:
    """Read a file, a folder of split files, or a Hub data set ``owner/name[:config][@revision]``.

    Args:
        source: Where from.
        family: ``ner`` or ``tc``.
        label_names: Names of labels that are written as integers.

    Returns:
        Split → rows; a single file is ``train``.

    Raises:
        DataError: A mistake in the data, with its file and line.
    """
    path = Path(source)
    if path.is_file():
        return {"train": _read_file(path, family, label_names)}
    if path.is_dir():
        return {
            split: _join(files, family, label_names) for split, files in split_files(path, family).items()
        }
    loaded = load_hub(source)
    splits: dict[str, Rows] = {}
    for split, aliases in SPLITS.items():
        alias = next((alias for alias in aliases if alias in loaded), None)
        if alias is not None:
            splits[split] = _rows_of(loaded[alias], f"{source} ({alias})", family, label_names)
    if not splits:
        raise DataError(
            f"{source} has no split named train, validation or test; it has: {', '.join(loaded)}."
        )
    return splits


def read_one_split(
    source: str | Path, wanted: str, family: str, label_names: list[str] | None = None
) -> Rows:
    """Read the split that a source is named for: the one of that name, else its only one.

    Raises:
        DataError: It has several others, of which none is meant for this; and as `read_splits`.
    """
    splits = read_splits(source, family, label_names)
    if wanted in splits:
        return splits[wanted]
    if len(splits) > 1:
        raise DataError(
            f"{source} is to be the {wanted} split, but has {', '.join(sorted(splits))}; name one file."
        )
    return next(iter(splits.values()))


def split_files(folder: Path, family: str) -> dict[str, list[Path]]:
    """Sort the files of a folder by split; files that name no split are all training data."""
    files = source_files(folder, ENDINGS[family])
    splits: dict[str, list[Path]] = {}
    others = []
    for file in files:
        stem = file.stem.lower().replace("_", "-").split("-")[0].split(".")[0]
        split = next((split for split, aliases in SPLITS.items() if stem in aliases), None)
        if split is None:
            others.append(file.name)
        else:
            splits.setdefault(split, []).append(file)
    if not splits:
        return {"train": files}
    if others:
        raise DataError(
            f"{folder} has split files and others, e.g. {others[0]}; name every file after its split "
            "(train, validation, test), or none."
        )
    return splits


def _join(files: list[Path], family: str, label_names: list[str] | None) -> Rows:
    joined = Rows([], [], [])
    for part in (_read_file(file, family, label_names) for file in files):
        joined.inputs += part.inputs
        joined.labels += part.labels
        joined.locations += part.locations
        joined.comments += part.comments
    return joined


def _read_file(file: Path, family: str, label_names: list[str] | None) -> Rows:
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty.")
    if family == "ner" and file.suffix in CONLL_ENDINGS:
        tokens, tags, lines, comments = read_conll(file)
        if not tokens:
            raise DataError(f"{file} has no sentence; write a word and its tag on each line.")
        return Rows(tokens, tags, [f"{file}, line {line}" for line in lines], comments)
    source_files(file, ENDINGS[family])  # checks the ending
    if file.suffix == ".csv" and family == "ner":
        raise DataError(f"{file}: a CSV file cannot hold lists of words; use CoNLL, JSON lines or Parquet.")
    try:
        dataset = load_file(file, text_columns=True)
        return _rows_of(dataset, str(file), family, label_names, _line_numbers(file, len(dataset)))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not text in UTF-8 ({error}); save it as UTF-8.") from error


def _rows_of(
    dataset: Dataset, name: str, family: str, label_names: list[str] | None, lines: list[int] | None = None
) -> Rows:
    columns = []
    for aliases in COLUMNS[family]:
        column = next((alias for alias in aliases if alias in dataset.column_names), None)
        if column is None:
            raise DataError(
                f"{name} has no column {' or '.join(map(repr, aliases))}; it has: "
                f"{', '.join(dataset.column_names)}."
            )
        columns.append(column)
    if len(dataset) == 0:
        raise DataError(f"{name} has no rows.")
    feature = dataset.features[columns[1]]
    feature = getattr(feature, "feature", feature)  # of a list that of its elements
    if isinstance(feature, ClassLabel):
        label_names = feature.names
    locations = [
        f"{name}, {f'line {lines[row]}' if lines else f'row {row + 1}'}" for row in range(len(dataset))
    ]
    inputs, labels = dataset[columns[0]][:], dataset[columns[1]][:]
    check = check_sentence if family == "ner" else check_text
    for row, location in enumerate(locations):
        labels[row] = _named(labels[row], label_names, location, columns[1])
        check(inputs[row], labels[row], location)
    return Rows(list(inputs), list(labels), locations)


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
    if names is not None and all(not name.lstrip("-").isdigit() for name in names):
        if not 0 <= label < len(names):
            raise DataError(f"{location}: {column} is {label}, but there are {len(names)} label names.")
        return names[label]
    return str(label)


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
