"""A corpus in flat memory: a survey checks it, divides it into shards and draws a sample; then its shards."""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from ..data.sources import TextStream
from ..data.words import split_words
from ..errors import DataError
from .settings import PseudoLabelSettings

MAX_WORD_CHARACTERS = 1000
"""A longer word is binary data or a file without spaces, not language."""


@dataclass
class CorpusPlan:
    """Result of the survey of a corpus. The shards depend on the texts and the settings alone.

    Counts the texts that are used, their characters and words (split at white space), the rows left out
    (``skipped``), and the texts and characters of each shard.
    """

    texts: int = 0
    characters: int = 0
    words: int = 0
    skipped: int = 0
    shard_texts: list[int] = field(default_factory=list)
    shard_characters: list[int] = field(default_factory=list)


def _usable_texts(stream: TextStream, settings: PseudoLabelSettings) -> Iterator[tuple[int, str | None]]:
    """Yield row number (from 0, over the whole source) and text; ``None`` for a row that is left out."""
    used = 0
    for number, row in enumerate(stream):
        fault = _fault(row.text, stream.column)
        if fault and settings.bad_rows == "error":
            remedy = "Fix or remove the row; --bad_rows skip leaves such rows out."
            raise DataError(f"{row.file}, row {row.row}: {fault} {remedy}")
        usable = not fault and bool(row.text and not row.text.isspace())
        yield number, row.text if usable else None
        used += usable
        if settings.max_texts and used == settings.max_texts:
            return


def _fault(text: str | None, column: str) -> str | None:
    """Say what is wrong with a row, if anything is."""
    if text is None:
        return f"column {column!r} is empty."
    # Splitting at white space is fast; only its long parts are split into words.
    long = (part for part in text.split() if len(part) > MAX_WORD_CHARACTERS)
    if any(len(word) > MAX_WORD_CHARACTERS for part in long for word in split_words(part)):
        return f"there is a word of more than {MAX_WORD_CHARACTERS:,} characters; is this text?"
    return None


def survey(
    stream: TextStream, settings: PseudoLabelSettings, progress: Callable[[int], object] = lambda texts: None
) -> tuple[CorpusPlan, list[str]]:
    """Read the corpus once: check every row, set the borders of the shards, draw the sample.

    The sample consists of the texts with the lowest random numbers, in their order: as many as have
    ``settings.sample_words`` words together.

    Raises:
        DataError: A row cannot be used, or there is no text.
    """
    plan = CorpusPlan()
    rng = np.random.Generator(np.random.PCG64(settings.seed))
    sample: list[tuple[float, int, str]] = []  # a heap with the highest random number on top
    sampled_words = 0
    for _, text in _usable_texts(stream, settings):
        progress(1)
        if text is None:
            plan.skipped += 1
            continue
        if not plan.shard_texts or plan.shard_characters[-1] >= settings.shard_characters:
            plan.shard_texts.append(0)
            plan.shard_characters.append(0)
        plan.shard_texts[-1] += 1
        plan.shard_characters[-1] += len(text)
        words = len(text.split())
        plan.texts += 1
        plan.characters += len(text)
        plan.words += words
        priority = rng.random()
        if sampled_words >= settings.sample_words and priority >= -sample[0][0]:
            continue
        heapq.heappush(sample, (-priority, words, text))
        sampled_words += words
        while sampled_words - sample[0][1] >= settings.sample_words:
            sampled_words -= heapq.heappop(sample)[1]
    if not plan.words:
        raise DataError(f"{stream.source} holds no words in column {stream.column!r}; give another source.")
    return plan, [text for _, _, text in sorted(sample, key=lambda entry: -entry[0])]


def shards(
    stream: TextStream, settings: PseudoLabelSettings, plan: CorpusPlan, wanted: set[int]
) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Yield number and texts (with their row numbers) of each shard that is wanted, in order."""
    texts = ((number, text) for number, text in _usable_texts(stream, settings) if text is not None)
    for shard, size in enumerate(plan.shard_texts[: max(wanted, default=-1) + 1]):
        rows = list(islice(texts, size))
        if shard in wanted:
            yield shard, rows
