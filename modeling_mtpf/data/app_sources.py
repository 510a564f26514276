"""Where the labelled data of an app comes from: files, folders of splits, Hub data sets; their columns.

Every row keeps its place, so that a message can name it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset

from ..errors import DataError, first_line
from .conll import CONLL_ENDINGS, read_conll
from .sources import READERS, hub_id, load_file

COLUMNS = {
    "ner": (("tokens", "words"), ("ner_tags", "tags", "ner", "labels")),
    "tc": (
        ("text", "sentence", "utterance", "content", "query"),
        ("label_text", "label", "labels", "intent", "category", "class"),
    ),
}
"""Accepted names of the input and of the label column, the first that is there."""

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


@dataclass
class Rows:
    """Rows of one file or Hub split, with what their place is called in messages.

    Attributes:
        inputs: Texts, or the words of each sentence.
        labels: One a text, or one a word, as they are written.
        place: File and line, or row, of each.
        comments: Lines of a CoNLL file that were left out.
    """

    inputs: list
    labels: list
    place: list[str]
    comments: int = 0


def read_splits(source: str | Path, family: str, names: list[str] | None = None) -> dict[str, Rows]:
    """Read a file, a folder of split files, or a Hub data set ``owner/name[:config][@revision]``."""
    path = Path(source)
    if path.is_file():
        return {"train": _read_file(path, family, names)}
    if path.is_dir():
        return {split: _join(files, family, names) for split, files in split_files(path, family).items()}
    loaded = _load_hub(str(source))
    found: dict[str, Rows] = {}
    for split, aliases in SPLITS.items():
        for alias in aliases:
            if alias in loaded and split not in found:
                found[split] = _rows_of(loaded[alias], f"{source} ({alias})", family, names)
    if not found:
        raise DataError(
            f"{source} has no split named train, validation or test; it has: {', '.join(loaded)}."
        )
    return found


def read_one_split(source: str | Path, wanted: str, family: str, names: list[str] | None = None) -> Rows:
    """Read the split that a source is given for: the one of that name, else the only one there is.

    Raises:
        DataError: It has several others, of which none is meant for this; and as `read_splits`.
    """
    splits = read_splits(source, family, names)
    if wanted in splits:
        return splits[wanted]
    if len(splits) > 1:
        raise DataError(
            f"{source} is given for {wanted}, but has the splits {', '.join(sorted(splits))}; name one file."
        )
    return next(iter(splits.values()))


def _load_hub(source: str) -> DatasetDict:
    repository, config, revision = hub_id(source)
    try:
        return load_dataset(repository, config, revision=revision)
    except Exception as error:  # the Hub client has a dozen exception types; all mean the same to the user
        reason = first_line(error)
        raise DataError(
            f"The Hub data set {source!r} cannot be opened: {reason} (Data set scripts are never run: choose "
            "a revision in Parquet, e.g. @refs/convert/parquet.)"
        ) from error


def _endings(family: str) -> tuple[str, ...]:
    return (*READERS, *CONLL_ENDINGS) if family == "ner" else tuple(e for e in READERS if e != ".txt")


def split_files(folder: Path, family: str) -> dict[str, list[Path]]:
    """Sort the files of a folder by split; files that name no split are all training data."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.suffix in _endings(family))
    files = [file for file in files if not file.name.startswith((".", "_"))]
    if not files:
        accepted = ", ".join(dict.fromkeys(_endings(family)))
        raise DataError(f"The folder {folder} has no data file; accepted endings: {accepted}.")
    found: dict[str, list[Path]] = {}
    for file in files:
        stem = file.stem.lower().replace("_", "-").split("-")[0].split(".")[0]
        for split, aliases in SPLITS.items():
            if stem in aliases:
                found.setdefault(split, []).append(file)
    if not found:
        return {"train": files}
    others = [file.name for file in files if not any(file in own for own in found.values())]
    if others:
        raise DataError(
            f"{folder} has split files and others, e.g. {others[0]}; name every file after its split "
            "(train, validation, test), or none."
        )
    return found


def _join(files: list[Path], family: str, names: list[str] | None) -> Rows:
    joined = Rows([], [], [])
    for part in (_read_file(file, family, names) for file in files):
        joined.inputs += part.inputs
        joined.labels += part.labels
        joined.place += part.place
        joined.comments += part.comments
    return joined


def _read_file(file: Path, family: str, names: list[str] | None) -> Rows:
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty.")
    if family == "ner" and file.suffix in CONLL_ENDINGS:
        tokens, tags, lines, comments = read_conll(file)
        if not tokens:
            raise DataError(f"{file} has no sentence.")
        return Rows(tokens, tags, [f"{file}, line {line}" for line in lines], comments)
    if file.suffix not in _endings(family):
        accepted = ", ".join(dict.fromkeys(_endings(family)))
        raise DataError(f"{file} has an unknown ending; accepted: {accepted}.")
    if file.suffix == ".csv" and family == "ner":
        raise DataError(f"{file}: a CSV file cannot hold lists of words; use CoNLL, JSON lines or Parquet.")
    try:
        dataset = load_file(file, text_columns=True)
        return _rows_of(dataset, str(file), family, names, _line_numbers(file, len(dataset)))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not text in UTF-8: {error}.") from error


def _rows_of(
    dataset: Dataset, name: str, family: str, names: list[str] | None, lines: list[int] | None = None
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
    features = dataset.features[columns[1]]
    class_label = getattr(features, "feature", features)
    known = class_label.names if isinstance(class_label, ClassLabel) else names
    place = [f"{name}, {f'line {lines[row]}' if lines else f'row {row + 1}'}" for row in range(len(dataset))]
    inputs, labels = dataset[columns[0]][:], dataset[columns[1]][:]
    check = check_sentence if family == "ner" else check_text
    for row, where in enumerate(place):
        labels[row] = _named(labels[row], known, where, columns[1])
        check(inputs[row], labels[row], where)
    return Rows(list(inputs), list(labels), place)


def _line_numbers(file: Path, rows: int) -> list[int] | None:
    """Line of each row of a JSON-lines file, or ``None`` where rows are no lines."""
    if READERS[file.suffix] != "json":
        return None
    with file.open("rb") as stream:
        lines = [number for number, line in enumerate(stream, start=1) if line.strip()]
    return lines if len(lines) == rows else None


def _named(label: Any, names: list[str] | None, where: str, column: str) -> Any:
    """Turn the integers of Hub data sets into names; leave names as they are."""
    if isinstance(label, list):
        return [_named(part, names, where, column) for part in label]
    if isinstance(label, bool) or not isinstance(label, int):
        return label
    if names is not None and all(not name.lstrip("-").isdigit() for name in names):
        if not 0 <= label < len(names):
            raise DataError(f"{where}: {column} is {label}, but there are {len(names)} label names.")
        return names[label]
    return str(label)


def check_sentence(words: Any, tags: Any, where: str) -> None:
    """Raise `DataError` unless there is one tag for each word."""
    for name, value in (("tokens", words), ("tags", tags)):
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            raise DataError(f"{where}: the {name} must be a list of words, not {str(value)[:60]!r}.")
    if len(words) != len(tags):
        raise DataError(f"{where} has {len(words)} tokens but {len(tags)} tags.")


def check_text(text: Any, label: Any, where: str) -> None:
    """Raise `DataError` unless there are a text and a label."""
    if not isinstance(text, str) or not isinstance(label, str) or not label:
        raise DataError(
            f"{where}: a text and a label are needed, not {str(text)[:40]!r} and {str(label)[:40]!r}."
        )


__all__ = ["SPLITS", "Rows", "check_sentence", "check_text", "read_one_split", "read_splits", "split_files"]
