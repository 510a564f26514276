"""The labelled data of an app: read, checked, counted, and split into train, validation and test.

Nothing is left out without a count: see `AppData.notes`.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import DataError
from .app_sources import Reading, Rows, check_example, check_text, read_one_split, read_splits
from .label_sets import are_sets, split_names, stripped
from .sources import Source, source_name
from .spans import Span, tags_of
from .tag_schemes import to_iob2

logger = logging.getLogger(__name__)

FAMILIES = ("ner", "tc")


@dataclass
class Examples:
    """One split: texts with a label each; of NER words with IOB2 tags, or a text with its `Span` list.

    Texts with several labels each have a list of them, which may be empty.
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
        train: Fitted.
        validation: Decides early stopping and the choice of a seed.
        test: Reported, if there is any.
        held_out: Whether the validation rows were taken from the training data.
        notes: What was skipped, held out or unusual, with counts, and the sources.
    """

    family: str
    labels: list[str]
    train: Examples
    validation: Examples
    test: Examples | None = None
    held_out: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def multi_label(self) -> bool:
        """Whether a text has a list of labels."""
        return self.family == "tc" and are_sets(self.train.labels)


def load_app_data(
    source: Source,
    family: str,
    *,
    validation: Source | None = None,
    test: Source | None = None,
    labels: list[str] | None = None,
    scheme: str = "auto",
    columns: Mapping[str, str] | None = None,
    encoding: str | None = None,
    label_separator: str | None = None,
    train_fraction: float = 1.0,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> AppData:
    """Read, check and split the data of an app.

    Args:
        source: A CoNLL, JSON-lines, Parquet or delimited file, texts with character spans as tools for
            annotating write them, a folder of such files named after their splits, a Hub data set
            ``owner/name[:config][@revision]``, a folder of ``save_to_disk``, or a table in memory:
            ``Dataset``, ``DatasetDict``, pandas ``DataFrame``, a list of dicts.
        family: ``ner`` or ``tc``.
        validation: Another source for validation; where there is none, a share of train is held out.
        test: Another source for the test set.
        labels: All labels in order; else those of the rows to fit, in order of first appearance in train. If
            the data has a column for each, with 1 or 0, these say which texts have it.
        label_separator: Between the labels of a text, where they are one string, as in ``joy|surprise``.
        scheme: Tag scheme of NER data, see `to_iob2`.
        columns: Names of the columns, where they are not found by themselves: of ``text`` and ``label``, for
            NER ``tokens`` and ``tags``, or ``text`` and ``spans``; in files without names their numbers.
        encoding: Of text files; by default that of the byte order mark, else UTF-8.
        train_fraction: Share of the training data to draw; of TC, the same share of every label.
        validation_fraction: Share to hold out.
        seed: Of both draws.

    Raises:
        DataError: A mistake in the data, with its file and line; too few examples or labels.
    """
    if family not in FAMILIES:
        raise DataError(f"Unknown family {family!r}; choose one of: {', '.join(FAMILIES)}.")
    _check_fraction("train_fraction", train_fraction, 1)
    _check_fraction("validation_fraction", validation_fraction, 0.5)
    reading = Reading(labels, columns or {}, encoding)
    splits = read_splits(source, family, reading)
    notes: dict[str, Any] = {"source": source_name(source)}
    for split, other in (("validation", validation), ("test", test)):
        if other is not None:
            splits[split] = read_one_split(other, split, family, reading)
            notes[f"{split}_source"] = source_name(other)
    if "train" not in splits:
        raise DataError(f"{source_name(source)} has no training split; it has: {', '.join(splits)}.")
    examples = _clean(splits, family, scheme, label_separator, notes)
    train, held_out = _draw(examples["train"], family, train_fraction, seed), None
    if "validation" not in examples:
        train, held_out = _hold_out(train, family, validation_fraction, seed)
    data = AppData(
        family,
        _labels(examples["train"], train, family, labels),
        train,
        examples.get("validation") or held_out or Examples(),
        examples.get("test"),
        held_out is not None,
        notes,
    )
    check_app_data(data, labels is not None)
    notes["examples"] = {name: len(getattr(data, name) or ()) for name in ("train", "validation", "test")}
    notes["fingerprint"] = _fingerprint(examples)
    return data


def _check_fraction(name: str, value: float, most: float) -> None:
    if not 0 < value <= most:
        raise DataError(f"{name} is {value}; it must be above 0 and at most {most}.")


def _clean(
    splits: dict[str, Rows], family: str, scheme: str, separator: str | None, notes: dict
) -> dict[str, Examples]:
    """Bring tags to IOB2, take labels apart, and leave out, with a count, rows without words."""
    if family == "tc":
        clean_labels(list(splits.values()), separator)
    if family == "ner":
        tagged = [(r, i) for r in splits.values() for i, row in enumerate(r.inputs) if isinstance(row, list)]
        tags = [rows.labels[i] for rows, i in tagged]
        converted, detected = to_iob2(tags, scheme, [rows.locations[i] for rows, i in tagged])
        notes["scheme"] = detected if tagged else "spans"
        for (rows, i), row in zip(tagged, converted, strict=True):
            rows.labels[i] = row
    examples = {}
    for split, rows in splits.items():
        for note, count in rows.notes.items():
            if count:
                notes.setdefault(note, {})[split] = count
                if note != "comment_lines_skipped":
                    logger.warning("%s split: %d %s.", split, count, note.replace("_", " "))
        filled = [
            i for i, value in enumerate(rows.inputs) if (value.strip() if isinstance(value, str) else value)
        ]
        if empty := len(rows.inputs) - len(filled):
            notes.setdefault("empty_rows_skipped", {})[split] = empty
            logger.warning("%d empty rows of the %s split are left out.", empty, split)
        examples[split] = Examples(rows.inputs, rows.labels).take(filled)
    return examples


def clean_labels(parts: list[Rows], separator: str | None = None) -> None:
    """Take apart and strip the labels of texts, in place; lists of one label each become this label.

    Raises:
        DataError: There is no text or label; or one label here and several there.
    """
    for rows in parts:
        if separator:
            pairs = zip(rows.labels, rows.locations, strict=True)
            rows.labels = [split_names(label, separator, location) for label, location in pairs]
        rows.labels = [stripped(label) for label in rows.labels]
    lists = [label for rows in parts for label in rows.labels if isinstance(label, list)]
    if not separator and all(len(label) == 1 and isinstance(label[0], str) for label in lists):
        for rows in parts:
            rows.labels = [label[0] if isinstance(label, list) else label for label in rows.labels]
        lists = []
    for rows in parts:
        for text, label, location in zip(rows.inputs, rows.labels, rows.locations, strict=True):
            check_text(text, label, location)
            if lists and not isinstance(label, list):
                raise DataError(
                    f"{location} has the label {label!r}, where other texts have a list: either all texts "
                    "have a list of labels, or all have one label."
                )
    names = set() if lists else {label for rows in parts for label in rows.labels}
    for mark in "|;":
        split = {name: set(split_names(name, mark, "")) for name in names}
        counts = Counter(part for of_name in split.values() for part in of_name)
        several = [x for x in sorted(names) if mark in x and any(counts[part] > 1 for part in split[x])]
        if several:
            logger.warning(
                "The label %r looks like several; if so, give --label_separator %r.", several[0], mark
            )


def _labels(whole: Examples, train: Examples, family: str, named: list[str] | None) -> list[str]:
    """Return the labels that the user named (tags or types), or those to fit, in the order of all rows."""
    present = set(_flat_labels(train, family))
    labels = list(dict.fromkeys(named or (x for x in _flat_labels(whole, family) if x in present)))
    if family == "tc":
        return labels
    if named and not any(label == "O" or label[:2] in ("B-", "I-") for label in labels):
        labels = [f"{prefix}-{kind}" for kind in labels for prefix in "BI"]
    elif not named:  # the tokenizer may split a word, whose parts continue its entity
        pairs = ([tag, f"I-{tag[2:]}"] if tag[0] == "B" else [tag] for tag in labels)
        labels = list(dict.fromkeys(tag for pair in pairs for tag in pair))
    return labels if "O" in labels else ["O", *labels]


def _flat_labels(examples: Examples, family: str) -> list[str]:
    if family == "tc":
        return [x for row in examples.labels for x in row] if are_sets(examples.labels) else examples.labels
    return [tag for row in zip(examples.inputs, examples.labels, strict=True) for tag in tags_of(*row)]


def _draw(train: Examples, family: str, fraction: float, seed: int) -> Examples:
    """Draw a share of the rows; of texts, the same share of every label, give or take one row."""
    if fraction == 1:
        return train
    generator = np.random.default_rng(seed)
    rows = generator.permutation(len(train))
    if family == "tc":
        # The rows of a label lie evenly between 0 and 1 from a random start, and the lowest are drawn.
        rows_of_label: dict[str, list[int]] = {}
        for row in rows:
            rows_of_label.setdefault(str(train.labels[row]), []).append(int(row))
        position = np.zeros(len(train))
        for members in rows_of_label.values():
            position[members] = (np.arange(len(members)) + generator.random()) / len(members)
        rows = np.argsort(position)
    return train.take(np.sort(rows[: max(round(len(train) * fraction), 1)]))


def _hold_out(train: Examples, family: str, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Hold out a share, at least one row; no label loses its only example."""
    if len(train) < 2:
        raise DataError(f"The training data has {len(train)} example; at least 2 are needed to hold one out.")
    wanted = max(round(len(train) * fraction), 1)
    if family == "tc":
        labels_of_row = [set(label) if isinstance(label, list) else {label} for label in train.labels]
    else:
        rows = zip(train.inputs, train.labels, strict=True)
        labels_of_row = [set(tags_of(*row)) - {"O"} for row in rows]
    left = Counter(label for labels in labels_of_row for label in labels)
    held_out: set[int] = set()
    for row in np.random.default_rng([seed, 1]).permutation(len(train)).tolist():
        if len(held_out) == wanted:
            break
        if all(left[label] > 1 for label in labels_of_row[row]):
            left.subtract(labels_of_row[row])
            held_out.add(row)
    return train.take(sorted(set(range(len(train))) - held_out)), train.take(sorted(held_out))


def check_app_data(data: AppData, labels_named: bool = False) -> None:
    """Check that an app can be fitted; add the labels that only one side has to ``data.notes``.

    Raises:
        DataError: Inputs and labels that do not fit together, too few of them, or, with ``labels_named``, a
            label that the user did not name.
    """
    known = set(data.labels)
    if data.family == "ner" and "O" not in known:
        raise DataError("The labels of a NER app need 'O', for words outside all entities; add it.")
    for split in ("train", "validation", "test"):
        examples: Examples = getattr(data, split) or Examples()
        _check_rows(examples, data, split)
        flat = _flat_labels(examples, data.family)
        unseen = sorted(set(flat) - known)
        if unseen and (split == "train" or labels_named):
            where = "--labels" if labels_named else "its labels"
            raise DataError(f"The {split} split has the label {unseen[0]!r}, which is not in {where}.")
        if unseen:
            count = sum(label in unseen for label in flat)
            data.notes.setdefault("labels_not_in_train", {})[split] = {"labels": unseen, "count": count}
            missed = "The %s split has %d labels %s that train does not have; they count as missed."
            logger.warning(missed, split, count, unseen[:5])
    trained = set(_flat_labels(data.train, data.family))
    if data.multi_label and not trained:
        raise DataError("No text of the training data has a label.")
    if data.family == "tc" and len(trained) < 2 and not data.multi_label:
        raise DataError(
            f"A text app needs at least two labels; the data has only {', '.join(sorted(trained))!r}."
        )
    if data.family == "ner" and trained <= {"O"}:
        raise DataError("The training data has no entity, every tag is O; check the column of the tags.")
    if not len(data.validation):
        raise DataError("Nothing can be held out for validation: every label has one example. Add some.")
    usual = {"O", *(f"I-{tag[2:]}" for tag in trained if tag[:2] == "B-" and data.family == "ner")}
    untrained = [label for label in data.labels if label not in trained | usual]
    if untrained:
        data.notes["labels_without_example"] = untrained
        logger.warning("%d labels have no training example, e.g. %s.", len(untrained), untrained[0])


def _check_rows(examples: Examples, data: AppData, split: str) -> None:
    family = data.family
    inputs, labels = examples.inputs, examples.labels
    if len(inputs) != len(labels):
        raise DataError(f"The {split} split has {len(inputs)} inputs but {len(labels)} labels.")
    check = check_example if family == "ner" else check_text
    for row, (value, label) in enumerate(zip(inputs, labels, strict=True), start=1):
        location = f"The {split} split, row {row}"
        check(value, label, location)
        if family == "tc" and isinstance(label, list) != data.multi_label:
            raise DataError(f"{location}: either all texts have a list of labels, or all have one label.")
        for tag in label if family == "ner" else ():
            if isinstance(value, str) != isinstance(tag, Span):
                raise DataError(f"{location}: a text has `Span` objects, and a list of words has tags.")
            if isinstance(tag, str) and tag != "O" and tag[:2] not in ("B-", "I-"):
                raise DataError(f"{location}: {tag!r} is not an IOB2 tag; convert the tags with `to_iob2`.")
        if family == "ner" and isinstance(value, str):
            _check_spans(value, label, location)


def _check_spans(text: str, spans: list[Span], location: str) -> None:
    borders = [border for span in spans for border in span[:2]]
    if borders != sorted(borders) or any(not 0 <= a < b <= len(text) for a, b, _ in spans):
        raise DataError(f"{location}: the spans {spans[:3]} are not in order inside the text, or overlap.")


def _fingerprint(examples: dict[str, Examples]) -> str:
    digest = hashlib.sha256()
    for split, rows in sorted(examples.items()):
        for row in zip(rows.inputs, rows.labels, strict=True):
            digest.update(json.dumps([split, *row], ensure_ascii=False).encode())
    return digest.hexdigest()[:16]
