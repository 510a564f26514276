"""The compositional benchmark: texts with slots and an intent, predicted together by two apps or one bundle.

Each task joins a NER and a TC set of the task list by the text: equal are two texts of the same letters and
digits in the same order. The splits are those of the TC set, and no text is in two of them.
"""

import hashlib
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..data.app_data import AppData, load_app_data
from ..data.spans import Span, join_words
from ..errors import DataError, RecipeError
from ..metrics import span_scores
from ..model.modeling_mtpf import MtpfModel
from ..settings import nearest
from .tasks import load_task, select_tasks

COMPOSITIONS = {
    "snips": ("ner/snips", "tc/snips"),
    "massive_hwu64": ("ner/hwu64", "tc/massive_intent"),
    "multidogo_airline": ("ner/multidogo", "tc/multidogo_airline"),
    "multidogo_fastfood": ("ner/multidogo", "tc/multidogo_fastfood"),
}
"""Compositional task → the sets of its slots and of its intents."""

SPLITS = ("train", "validation", "test")

_Row = tuple[list[str], list[str], str]
"""Words, IOB2 tags of the slots, and intent of a text."""


@dataclass
class ComposedTask:
    """A task of the compositional benchmark.

    Attributes:
        name: Of `COMPOSITIONS`.
        slots: The texts with their slots, as words and IOB2 tags.
        intents: The same texts in the same order, each the words joined by spaces, with its intent.
        shared: Split → rows of the TC set that the NER set has, too.
        counts: Split → those left when no text is in two splits, before any draw.
        fingerprint: sha256 of these rows.
    """

    name: str
    slots: AppData
    intents: AppData
    shared: dict[str, int]
    counts: dict[str, int]
    fingerprint: str


def text_identity(text: str) -> str:
    """Return the letters and digits of a text in lower case, by which texts of two sets are compared.

    Spaces and punctuation do not count: one set writes ``what's``, another ``what ' s`` or ``whats``.

    Example:
        >>> text_identity("What 's on, TODAY ?")
        'whatsontoday'
    """
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).casefold()))


def load_composition(
    name: str, data: str | None = None, rows: Mapping[str, int] | None = None, seed: int = 0
) -> ComposedTask:
    """Build a compositional task from its two sets.

    A text with several readings of its slots has the most frequent one, of equally frequent ones the first.
    A row is left out of train if validation or test has its text, and out of validation if test has it;
    within a split a text stays as often as it occurs.

    Args:
        name: Of `COMPOSITIONS`.
        data: Folder with ``<family>/<task>/<split>.parquet``; by default that of ``MTPF_DATA``.
        rows: Split → most rows of it to draw; by default all.
        seed: Of the draw.

    Raises:
        RecipeError: An unknown name.
        DataError: A set is missing or has no such split, or the two have no text in common.
    """
    if name not in COMPOSITIONS:
        known = list(COMPOSITIONS)
        raise RecipeError(
            f"Unknown compositional task {name!r}; {nearest(name, known)}known: {', '.join(known)}."
        )
    slots, intents = (load_task(select_tasks(key, {"ner", "tc"})[0], data) for key in COMPOSITIONS[name])
    readings = _readings(slots)
    found: dict[str, list[tuple[str, _Row]]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        examples = getattr(intents, split)
        for text, intent in zip(examples.inputs, examples.labels, strict=True) if examples else ():
            identity = text_identity(text)
            if identity in readings:
                found[split].append((identity, (*readings[identity], intent)))
    shared = {split: len(found[split]) for split in SPLITS}
    later: set[str] = set()
    for split in reversed(SPLITS):
        found[split] = [row for row in found[split] if row[0] not in later]
        later.update(identity for identity, _ in found[split])
    if empty := [split for split in SPLITS if not found[split]]:
        raise DataError(f"{' and '.join(COMPOSITIONS[name])} have no text of the split {empty[0]} in common.")
    every = {split: [row for _, row in found[split]] for split in SPLITS}
    digest = hashlib.sha256(json.dumps(every, ensure_ascii=False).encode()).hexdigest()
    drawn = {split: _draw(every[split], (rows or {}).get(split), seed) for split in SPLITS}
    parts = _tables(drawn, name)
    return ComposedTask(name, *parts, shared, {split: len(every[split]) for split in SPLITS}, digest)


def _readings(slots: AppData) -> dict[str, tuple[list[str], list[str]]]:
    """Return words and tags by `text_identity`, of all splits."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for split in SPLITS:
        examples = getattr(slots, split)
        for words, tags in zip(examples.inputs, examples.labels, strict=True) if examples else ():
            counts[text_identity(" ".join(words))][tuple(words), tuple(tags)] += 1
    counts.pop("", None)  # texts of punctuation alone are not equal
    best = {identity: max(of_text, key=of_text.__getitem__) for identity, of_text in counts.items()}
    return {identity: (list(words), list(tags)) for identity, (words, tags) in best.items()}


def _draw(rows: list[_Row], most: int | None, seed: int) -> list[_Row]:
    chosen = np.random.default_rng(seed).permutation(len(rows))[:most]
    return [rows[index] for index in np.sort(chosen)]


def _tables(rows: dict[str, list[_Row]], name: str) -> tuple[AppData, AppData]:
    """Return the data of the slots and of the intents."""
    from datasets import Dataset, DatasetDict

    slots, intents = DatasetDict(), DatasetDict()
    for split, of_split in rows.items():
        words, tags, labels = map(list, zip(*of_split, strict=True))
        slots[split] = Dataset.from_dict({"tokens": words, "ner_tags": tags})
        intents[split] = Dataset.from_dict({"text": [" ".join(row) for row in words], "label": labels})
    parts = load_app_data(slots, "ner"), load_app_data(intents, "tc")
    for part, key in zip(parts, COMPOSITIONS[name], strict=True):
        part.notes["source"] = f"{name}, from {key}"
    return parts


def score_composition(
    model: MtpfModel, tokenizer: PreTrainedTokenizerBase, task: ComposedTask, slots: str, intents: str
) -> dict[str, float]:
    """Score what one call of ``model.predict`` gives for the test texts.

    Args:
        model: With both apps, or a bundle with both parts.
        tokenizer: Of the backbone.
        task: Its test split is predicted.
        slots: Name of the app or part of the slots.
        intents: Name of that of the intents.

    Returns:
        ``entity_f1``, strict: type and both borders right; ``accuracy`` of the intents; ``frame_accuracy``,
        the share of texts with everything right.
    """
    assert task.slots.test is not None and task.intents.test is not None
    texts, labels = task.intents.test.inputs, task.intents.test.labels
    results = model.predict(texts, adapters=[slots, intents], tokenizer=tokenizer)
    gold = [join_words(*row)[1] for row in zip(task.slots.test.inputs, task.slots.test.labels, strict=True)]
    found = [[Span(row["start"], row["end"], row["entity_group"]) for row in rows] for rows in results[slots]]
    right = [result["label"] == label for result, label in zip(results[intents], labels, strict=True)]
    whole = [one and set(two) == set(three) for one, two, three in zip(right, gold, found, strict=True)]
    return {
        "entity_f1": float(span_scores(gold, found)["entity_f1"]),
        "accuracy": float(np.mean(right)),
        "frame_accuracy": float(np.mean(whole)),
    }
