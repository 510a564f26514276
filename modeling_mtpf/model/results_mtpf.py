"""Results: entities and labels from an app's scores, shaped like the results of transformers' pipelines."""

import unicodedata
from typing import Any

import numpy as np


class TagScheme:
    """IOB2 labels, in the order of the logits, as numbers; those without ``B-`` or ``I-`` are outside.

    ``I-X`` only continues an entity: it follows ``B-X`` or ``I-X``. (If the labels have no ``B-X``, it may
    open one.)
    """

    def __init__(self, labels: list[str]):
        parts = [label.partition("-") for label in labels]
        self.groups = sorted({group for prefix, _, group in parts if prefix in ("B", "I")})
        self.group_of = np.array(
            [self.groups.index(group) if prefix in ("B", "I") else -1 for prefix, _, group in parts]
        )
        self.begins = np.array([prefix == "B" for prefix, _, _ in parts])
        with_begin = set(self.group_of[self.begins].tolist())
        self.continues = np.array([prefix == "I" for prefix, _, _ in parts]) & np.isin(
            self.group_of, list(with_begin)
        )
        follows = ~self.continues[None] | (self.group_of[:, None] == self.group_of[None])
        self._step = np.where(follows, 0.0, -np.inf).astype(np.float32)
        self._start = np.where(self.continues, -np.inf, 0.0).astype(np.float32)

    def decode(self, scores: np.ndarray) -> np.ndarray:
        """Return the labels ``(words,)`` of the best valid sequence of a text (Viterbi).

        ``scores`` are the words' log-probabilities ``(words, labels)``; the sequence with the highest sum is
        best. It is that of each word's best label wherever these are valid.
        """
        best = scores.argmax(-1)
        groups = self.group_of[best]
        before = np.concatenate([[-2], groups[:-1]])
        if not (self.continues[best] & (groups != before)).any():
            return best
        total, steps = scores[0] + self._start, []
        for row in scores[1:]:
            paths = total[:, None] + self._step
            steps.append(paths.argmax(0))
            total = paths.max(0) + row
        best[-1] = total.argmax()
        for word in range(len(steps), 0, -1):
            best[word - 1] = steps[word - 1][best[word]]
        return best

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
    scores: np.ndarray,
    scheme: TagScheme,
) -> list[dict[str, Any]]:
    """Return the entities of a text; a score is the mean probability of the labels of an entity's words.

    Args:
        text: The text.
        words: As `Tokens.words` returns them.
        scores: Log-probabilities ``(sub-words, labels)``; those of a word's first sub-word count.
        scheme: The app's labels.
    """
    first, starts, ends = words
    if not len(first):
        return []
    scores = scores[first]
    best = scheme.decode(scores)
    spans = []
    for begin, after in zip(*scheme.spans(best), strict=True):
        start = int(starts[begin])
        limit = int(starts[after]) if after < len(starts) else len(text)
        end = _with_marks(text, int(ends[after - 1]), limit)
        spans.append(
            {
                "entity_group": scheme.groups[scheme.group_of[best[begin]]],
                "score": float(np.exp(scores[np.arange(begin, after), best[begin:after]]).mean()),
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


def text_labels(probabilities: np.ndarray, labels: list[str], top_k: int | None, threshold: float) -> Any:
    """Return the best label of a text from its probabilities ``(labels,)``; of ``top_k`` not 1, a list.

    A list has no label with a score below the threshold; a single one becomes ``None``.
    """
    best = np.argsort(-probabilities, kind="stable")[:top_k]
    rows = [{"label": labels[label], "score": float(probabilities[label])} for label in best.tolist()]
    if top_k != 1:
        return [row for row in rows if row["score"] >= threshold]
    return rows[0] if rows[0]["score"] >= threshold else {**rows[0], "label": None}
