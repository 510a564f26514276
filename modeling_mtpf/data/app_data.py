"""The labelled data of an app: splits, columns and labels of any source, checked and counted.

Nothing is left out without a count: see `AppData.notes`.
"""

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset

from ..errors import DataError
from .conll import CONLL_ENDINGS, read_conll
from .sources import READERS, load_file, source_name
from .tag_schemes import to_iob2

logger = logging.getLogger(__name__)

FAMILIES = ("ner", "tc")
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
class Examples:
    """One split.

    Attributes:
        inputs: Texts, or the words of each sentence.
        labels: One label a text, or one IOB2 tag a word.
    """

    inputs: list = field(default_factory=list)
    labels: list = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: Any) -> "Examples":
        """Return some rows."""
        return Examples([self.inputs[i] for i in rows], [self.labels[i] for i in rows])


@dataclass
class AppData:
    """Data of one app, ready to fit.

    Attributes:
        family: ``ner`` or ``tc``.
        labels: In the order of the head's logits.
        train: What is fitted.
        validation: What early stopping and the choice of a seed look at.
        test: What is reported, if there is any.
        held_out: Whether the validation rows were taken from the training data.
        notes: What was skipped, held out or unusual, with counts, and where the data came from.
    """

    family: str
    labels: list[str]
    train: Examples
    validation: Examples
    test: Examples | None = None
    held_out: bool = False
    notes: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------ reading


@dataclass
class _Rows:
    """Rows of one file or Hub split, with what their place is called in messages."""

    inputs: list
    labels: list
    place: list[str]


def read_splits(source: str | Path, family: str, names: list[str] | None = None) -> dict[str, _Rows]:
    """Read a file, a folder of split files, or a Hub data set ``owner/name[:config][@revision]``."""
    path = Path(source)
    if path.is_file():
        return {"train": _read_file(path, family, names)}
    if path.is_dir():
        return {split: _join(files, family, names) for split, files in _split_files(path, family).items()}
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise DataError(f"There is no file or folder {source}, and it is no Hub id of the form 'owner/name'.")
    loaded = _load_hub(str(source))
    found: dict[str, _Rows] = {}
    for split, aliases in SPLITS.items():
        for alias in aliases:
            if alias in loaded and split not in found:
                found[split] = _rows_of(loaded[alias], f"{source} ({alias})", family, names)
    if not found:
        raise DataError(
            f"{source} has no split named train, validation or test; it has: {', '.join(loaded)}."
        )
    return found


def _load_hub(source: str) -> DatasetDict:
    repository, _, revision = source.partition("@")
    repository, _, config = repository.partition(":")
    try:
        return load_dataset(repository, config or None, revision=revision or None)
    except Exception as error:  # the Hub client has a dozen exception types; all mean the same to the user
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"The Hub data set {source!r} cannot be opened: {reason} (Data set scripts are never run: choose "
            "a revision in Parquet, e.g. @refs/convert/parquet.)"
        ) from error


def _endings(family: str) -> tuple[str, ...]:
    return (*READERS, *CONLL_ENDINGS) if family == "ner" else tuple(e for e in READERS if e != ".txt")


def _split_files(folder: Path, family: str) -> dict[str, list[Path]]:
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


def _join(files: list[Path], family: str, names: list[str] | None) -> _Rows:
    parts = [_read_file(file, family, names) for file in files]
    return _Rows(*(sum((getattr(p, key) for p in parts), []) for key in ("inputs", "labels", "place")))


def _read_file(file: Path, family: str, names: list[str] | None) -> _Rows:
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty.")
    if family == "ner" and file.suffix in CONLL_ENDINGS:
        tokens, tags, lines = read_conll(file)
        if not tokens:
            raise DataError(f"{file} has no sentence.")
        return _Rows(tokens, tags, [f"{file}, line {line}" for line in lines])
    if file.suffix not in _endings(family):
        accepted = ", ".join(dict.fromkeys(_endings(family)))
        raise DataError(f"{file} has an unknown ending; accepted: {accepted}.")
    if file.suffix == ".csv" and family == "ner":
        raise DataError(f"{file}: a CSV file cannot hold lists of words; use CoNLL, JSON lines or Parquet.")
    try:
        dataset = load_file(file)
        return _rows_of(dataset, str(file), family, names, _line_numbers(file, len(dataset)))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not text in UTF-8: {error}.") from error


def _rows_of(
    dataset: Dataset, name: str, family: str, names: list[str] | None, lines: list[int] | None = None
) -> _Rows:
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
    check = _check_sentence if family == "ner" else _check_text
    for row, where in enumerate(place):
        labels[row] = _named(labels[row], known, where, columns[1])
        check(inputs[row], labels[row], where)
    return _Rows(list(inputs), list(labels), place)


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


def _check_sentence(words: Any, tags: Any, where: str) -> None:
    for name, value in (("tokens", words), ("tags", tags)):
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            raise DataError(f"{where}: the {name} must be a list of words, not {str(value)[:60]!r}.")
    if len(words) != len(tags):
        raise DataError(f"{where} has {len(words)} tokens but {len(tags)} tags.")


def _check_text(text: Any, label: Any, where: str) -> None:
    if not isinstance(text, str) or not isinstance(label, str) or not label:
        raise DataError(
            f"{where}: a text and a label are needed, not {str(text)[:40]!r} and {str(label)[:40]!r}."
        )


# ----------------------------------------------------------------------------------------------- checking


def load_app_data(
    source: str | Path,
    family: str,
    *,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    labels: list[str] | None = None,
    scheme: str = "auto",
    train_fraction: float = 1.0,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> AppData:
    """Read, check and split the data of an app.

    Args:
        source: A CoNLL, JSON-lines, Parquet or CSV file, a folder of such files named after their splits, or
            a Hub data set ``owner/name[:config][@revision]``.
        family: ``ner`` or ``tc``.
        validation: Another source for validation; where there is none, a share of train is held out.
        test: Another source for the test set.
        labels: All labels in order; else they are found in order of first appearance in train.
        scheme: Tag scheme of NER data, see `to_iob2`.
        train_fraction: Share of the training data that is used, drawn by ``seed``.
        validation_fraction: Share that is held out, drawn by ``seed``.
        seed: Of both draws.

    Raises:
        DataError: A mistake in the data, with its file and line; too few examples or labels.
    """
    if family not in FAMILIES:
        raise DataError(f"Unknown family {family!r}; choose one of: {', '.join(FAMILIES)}.")
    for name, value in (("train_fraction", train_fraction), ("validation_fraction", validation_fraction)):
        if not 0 < value <= (1 if name == "train_fraction" else 0.5):
            raise DataError(
                f"{name} is {value}; it must be above 0 and at most {1 if 'train' in name else 0.5}."
            )
    splits = read_splits(source, family, labels)
    if validation is not None:
        splits["validation"] = read_splits(validation, family, labels)["train"]
    if test is not None:
        splits["test"] = read_splits(test, family, labels)["train"]
    if "train" not in splits:
        raise DataError(f"{source} has no training split; it has: {', '.join(splits)}.")
    notes: dict[str, Any] = {"source": source_name(source)}
    examples = _clean(splits, family, scheme, notes)
    given = _labels(examples["train"], family, labels)
    train, held = _draw(examples["train"], family, train_fraction, seed), None
    if "validation" not in examples:
        train, held = _hold_out(train, family, validation_fraction, seed)
    data = AppData(
        family,
        given,
        train,
        examples.get("validation") or held or Examples(),
        examples.get("test"),
        held is not None,
        notes,
    )
    _check(data, labels)
    notes["examples"] = {name: len(getattr(data, name) or ()) for name in ("train", "validation", "test")}
    notes["fingerprint"] = _fingerprint(examples)
    return data


def _clean(splits: dict[str, _Rows], family: str, scheme: str, notes: dict) -> dict[str, Examples]:
    """Bring tags to IOB2 and leave out, with a count, what has nothing to read."""
    if family == "ner":
        rows = [row for own in splits.values() for row in own.labels]
        places = [place for own in splits.values() for place in own.place]
        converted, notes["scheme"] = to_iob2(rows, scheme, places)
        start = 0
        for own in splits.values():
            own.labels = converted[start : start + len(own.labels)]
            start += len(own.labels)
    examples = {}
    for split, own in splits.items():
        kept = [row for row, value in enumerate(own.inputs) if (value if family == "ner" else value.strip())]
        if len(kept) < len(own.inputs):
            notes.setdefault("empty_rows_skipped", {})[split] = len(own.inputs) - len(kept)
            logger.warning("%d empty rows of the %s split are left out.", len(own.inputs) - len(kept), split)
        examples[split] = Examples(own.inputs, own.labels).take(kept)
    return examples


def _labels(train: Examples, family: str, given: list[str] | None) -> list[str]:
    """Return the labels in order of first appearance, or as given: tags, or entity types alone."""
    seen = train.labels if family == "tc" else [tag for row in train.labels for tag in row]
    found = list(dict.fromkeys(given or seen))
    if family == "tc":
        return found
    if given and not any(label == "O" or label[:2] in ("B-", "I-") for label in found):
        found = [f"{prefix}-{kind}" for kind in found for prefix in "BI"]
    return found if "O" in found else ["O", *found]


def _draw(train: Examples, family: str, fraction: float, seed: int) -> Examples:
    if fraction == 1:
        return train
    rows = np.random.default_rng(seed).permutation(len(train))
    return train.take(np.sort(rows[: max(round(len(train) * fraction), 1)]))


def _hold_out(train: Examples, family: str, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Hold out a share, at least one row; no label of a text loses its only example."""
    if len(train) < 2:
        raise DataError(
            f"The training data has {len(train)} example; at least 2 are needed, one to fit and one to hold "
            "out, or a validation split."
        )
    wanted = max(round(len(train) * fraction), 1)
    left: dict[str, int] = {}
    for label in train.labels if family == "tc" else []:
        left[label] = left.get(label, 0) + 1
    held: list[int] = []
    for row in np.random.default_rng([seed, 1]).permutation(len(train)):
        if len(held) == wanted:
            break
        if family == "tc":
            if left[train.labels[row]] < 2:
                continue
            left[train.labels[row]] -= 1
        held.append(int(row))
    rest = sorted(set(range(len(train))) - set(held))
    return train.take(rest), train.take(sorted(held))


def _check(data: AppData, given: list[str] | None) -> None:
    known = set(data.labels)
    for split in ("train", "validation", "test"):
        own = getattr(data, split) or Examples()
        flat = own.labels if data.family == "tc" else [tag for row in own.labels for tag in row]
        unseen = sorted(set(flat) - known)
        if unseen and (split == "train" or given):
            raise DataError(f"The {split} split has the label {unseen[0]!r}, which is not in --labels.")
        if unseen:
            count = sum(label in unseen for label in flat)
            data.notes.setdefault("labels_not_in_train", {})[split] = {"labels": unseen, "count": count}
            logger.warning(
                "The %s split has %d labels %s that train does not have; they count as missed.",
                split,
                count,
                unseen[:5],
            )
    found = set(data.train.labels) if data.family == "tc" else set(data.labels)
    if data.family == "tc" and len(found) < 2:
        raise DataError(f"A text app needs at least two labels; the training data has {sorted(found)}.")
    if data.family == "ner" and found == {"O"}:
        raise DataError("The training data has no entity, every tag is O; check the column of the tags.")
    if not len(data.validation):
        raise DataError("Nothing can be held out for validation: every label has one example. Add some.")


def _fingerprint(examples: dict[str, Examples]) -> str:
    digest = hashlib.sha256()
    for split, own in sorted(examples.items()):
        for row in zip(own.inputs, own.labels, strict=True):
            digest.update(json.dumps([split, *row], ensure_ascii=False).encode())
    return digest.hexdigest()[:16]


__all__ = ["FAMILIES", "AppData", "Examples", "load_app_data", "read_splits"]
