"""Sentences and words of raw text, with their character offsets."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from syntok import segmenter

from ..data.words import word_starts


class Sentence(NamedTuple):
    """The words of a sentence, or of a part of one, and the offset of each in the text, in characters."""

    words: list[str]
    starts: list[int]


def split_sentences(text: str, max_words: int) -> Iterator[Sentence]:
    """Yield the sentences of a text; one of more than ``max_words`` words in equal parts.

    syntok finds where sentences begin. The words are those of `split_words` on the whole text, whatever the
    sentences are, so that no character is lost and a student sees the words that it will see in use.

    Example:
        >>> [s.words for s in split_sentences("It rains, Mr. Bean. Take a coat.", max_words=40)]
        [['It', 'rains', ',', 'Mr', '.', 'Bean', '.'], ['Take', 'a', 'coat', '.']]
        >>> [s.starts for s in split_sentences("one two three", max_words=2)]
        [[0], [4, 8]]
    """
    spans = word_starts(text)
    starts = [start for _, start in spans]
    first = 0
    for end in (*np.searchsorted(starts, _sentence_starts(text)[1:]).tolist(), len(spans)):
        parts = -(-(end - first) // max_words)
        borders = [first + (end - first) * part // parts for part in range(parts)] + [end] if parts else []
        for begin, stop in zip(borders, borders[1:], strict=False):
            yield Sentence([word for word, _ in spans[begin:stop]], starts[begin:stop])
        first = max(first, end)


def _sentence_starts(text: str) -> list[int]:
    return [sentence[0].offset for paragraph in segmenter.analyze(text) for sentence in paragraph if sentence]
