"""Entities as character spans of a text, and as tags of its words."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .words import word_borders


class Span(NamedTuple):
    """An entity: characters ``start:end`` of a text, and its type."""

    start: int
    end: int
    kind: str


def join_words(words: Sequence[str], tags: Sequence[str]) -> tuple[str, list[Span]]:
    """Return the text of a tagged sentence, its words joined by spaces, and the entities in it.

    Example:
        >>> join_words(["in", "New", "York"], ["O", "B-LOC", "I-LOC"])
        ('in New York', [Span(start=3, end=11, kind='LOC')])
    """
    spans: list[Span] = []
    start = 0
    for word, tag in zip(words, tags, strict=True):
        prefix, _, kind = tag.partition("-")
        if prefix == "I":
            spans[-1] = spans[-1]._replace(end=start + len(word))
        elif prefix == "B":
            spans.append(Span(start, start + len(word), kind))
        start += len(word) + 1
    return " ".join(words), spans


def text_and_spans(example: str | list[str], labels: Sequence[Any]) -> tuple[str, list[Span]]:
    """Return text and entities of an example: a text with spans, or words with IOB2 tags."""
    return (example, list(labels)) if isinstance(example, str) else join_words(example, labels)


def tags_of(example: str | list[str], labels: Sequence[Any]) -> list[str]:
    """Return the IOB2 tags of an example: those of its words, or of the words of its text."""
    return tags_of_words(word_borders(example), labels) if isinstance(example, str) else list(labels)


def tags_of_words(words: Iterable[tuple[int, int]], spans: Sequence[Span]) -> list[str]:
    """Return the IOB2 tag of each word ``(start, end)``, from the first span that it touches.

    Words and spans are in order; spans do not overlap.

    Example:
        >>> tags_of_words([(0, 2), (3, 6), (7, 11), (11, 12)], [Span(3, 11, "LOC")])
        ['O', 'B-LOC', 'I-LOC', 'O']
    """
    tags, number, before = [], 0, -1
    for start, end in words:
        while number < len(spans) and spans[number].end <= start:
            number += 1
        if number == len(spans) or spans[number].start >= end:
            tags.append("O")
            continue
        tags.append(f"{'I' if before == number else 'B'}-{spans[number].kind}")
        before = number
    return tags
