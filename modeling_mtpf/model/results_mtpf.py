"""Results: entities and labels from an app's scores, shaped like the results of transformers' pipelines."""

import unicodedata
from typing import Any

import numpy as np


class TagScheme:
    """IOB2 labels, in the order of the logits, as numbers; those without ``B-`` or ``I-`` are outside."""

    def __init__(self, labels: list[str]):
        parts = [label.partition("-") for label in labels]
        self.groups = sorted({group for prefix, _, group in parts if prefix in ("B", "I")})
        self.group_of = np.array(
            [self.groups.index(group) if prefix in ("B", "I") else -1 for prefix, _, group in parts]
        )
        self.begins = np.array([prefix == "B" for prefix, _, _ in parts])

    def spans(self, best: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first word of each entity and the one after its last, from the words' label numbers."""
        groups = self.group_of[best]
        before = np.concatenate([[-1], groups[:-1]])
        inside = groups >= 0
        opens = inside & (self.begins[best] | (groups != before))
        closes = np.concatenate([~inside[1:] | opens[1:], [True]]) & inside if len(best) else inside
        return np.flatnonzero(opens), np.flatnonzero(closes) + 1


def entities(
    text: str,
    words: tuple[np.ndarray, np.ndarray, np.ndarray],
    best: np.ndarray,
    score: np.ndarray,
    scheme: TagScheme,
) -> list[dict[str, Any]]:
    """Return the entities of a text.

    Args:
        text: The text.
        words: As `Tokens.words` returns them.
        best: Label number of each sub-word.
        score: Its probability.
        scheme: The app's labels.
    """
    first, starts, ends = words
    best = best[first]
    spans = []
    for begin, after in zip(*scheme.spans(best), strict=True):
        start = int(starts[begin])
        limit = int(starts[after]) if after < len(starts) else len(text)
        end = _with_marks(text, int(ends[after - 1]), limit)
        spans.append(
            {
                "entity_group": scheme.groups[scheme.group_of[best[begin]]],
                "score": float(score[first[begin:after]].mean()),
                "word": text[start:end],
                "start": start,
                "end": end,
            }
        )
    return spans


def _with_marks(text: str, end: int, limit: int) -> int:
    """Move an end past the combining marks that follow: tokenizers that strip accents leave them out."""
    while end < limit and not text[end].isascii() and unicodedata.category(text[end]).startswith("M"):
        end += 1
    return end


def text_label(probabilities: np.ndarray, labels: list[str]) -> dict[str, Any]:
    """Return the best label of a text from its probabilities ``(labels,)``."""
    best = int(probabilities.argmax())
    return {"label": labels[best], "score": float(probabilities[best])}
