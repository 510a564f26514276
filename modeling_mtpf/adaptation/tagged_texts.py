"""Tagged sentences, read as `MtpfModel.predict` reads their text: the same words, in the same windows."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..data.app_data import Examples
from ..data.encoding import CHUNK, EncodedRows, padded
from ..data.spans import tags_of_words, text_and_spans
from ..data.words import IGNORE, pad_id
from ..metrics import entity_scores
from ..model.results_mtpf import TagScheme
from ..model.texts_mtpf import TextTokenizer, Window
from .calibration import HeldOut


class TaggedTexts:
    """The windows of tagged sentences, with a label on the first sub-word of each word.

    A word here is one of the backbone's tokenizer, which may split a given word, e.g. at an apostrophe: its
    parts continue its entity. Nothing is cut off: a long sentence has several windows.

    Args:
        tokenizer: The backbone's.
        examples: Words and IOB2 tags, or texts and spans.
        labels: Of the head, in the order of its logits.
        max_length: Longest window in tokens, special tokens included.

    Attributes:
        encoded: One row per window.
        targets: For each row its label numbers ``(tokens,)``; `IGNORE` where no word begins, or where
            another window counts.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, examples: Examples, labels: list[str], max_length: int
    ):
        self.encoded = EncodedRows({"input_ids": [], "attention_mask": []}, pad_id(tokenizer))
        self.targets: list[np.ndarray] = []
        self._scheme, self._labels, self._tags = TagScheme(labels), labels, []  # type: ignore[var-annotated]
        self._first: list[np.ndarray] = []
        self._sizes: list[int] = []
        self._windows: list[Window] = []
        reader = TextTokenizer(tokenizer)
        self._prefix = len(reader.prefix)
        number = {label: index for index, label in enumerate(labels)}
        pairs = [text_and_spans(*row) for row in zip(examples.inputs, examples.labels, strict=True)]
        for start in range(0, len(pairs), CHUNK):
            part = pairs[start : start + CHUNK]
            for tokens, (text, spans) in zip(reader([text for text, _ in part]), part, strict=True):
                first, starts, ends = tokens.words(text)
                tags = tags_of_words(zip(starts.tolist(), ends.tolist(), strict=True), spans)
                target = np.full(len(tokens.ids), IGNORE, dtype=np.int64)
                target[first] = [number.get(tag, IGNORE) for tag in tags]
                for window in reader.windows(len(self._tags), len(tokens.ids), max_length):
                    self._add(
                        window, [reader.prefix, tokens.ids[window.start : window.stop], reader.suffix], target
                    )
                self._tags.append(tags)
                self._first.append(first)
                self._sizes.append(len(tokens.ids))

    def _add(self, window: Window, ids: list[np.ndarray], target: np.ndarray) -> None:
        row = np.concatenate(ids).astype(np.int32)
        self.encoded.columns["input_ids"].append(row)
        self.encoded.columns["attention_mask"].append(np.ones_like(row))
        self._windows.append(window)
        labels = np.full(len(row), IGNORE, dtype=np.int64)
        labels[window.positions(self._prefix)] = target[window.labelled]
        self.targets.append(labels)

    def batch_targets(self, rows: np.ndarray, length: int) -> torch.Tensor:
        """Return the label numbers of some rows, int64 ``(rows, length)``."""
        return torch.from_numpy(padded([self.targets[row] for row in rows], length, IGNORE))

    def read(self, outputs: Iterable[tuple[np.ndarray, torch.Tensor]]) -> list[np.ndarray]:
        """Return each text's log-probabilities ``(words, labels)``.

        ``outputs`` are row numbers and logits ``(rows, tokens, labels)`` of all rows.
        """
        scores = [np.zeros((size, len(self._labels)), dtype=np.float32) for size in self._sizes]
        for rows, logits in outputs:
            for row, values in zip(rows, logits.float().log_softmax(-1).cpu().numpy(), strict=True):
                window = self._windows[row]
                scores[window.text][window.labelled] = values[window.positions(self._prefix)]
        return [values[first] for values, first in zip(scores, self._first, strict=True)]

    def score(self, scores: list[np.ndarray]) -> dict[str, Any]:
        """Score the best valid tags, from what `read` returns."""
        predicted = [
            [self._labels[number] for number in self._scheme.decode(values)] if len(values) else []
            for values in scores
        ]
        return entity_scores(self._tags, predicted)

    def held_out(self, scores: list[np.ndarray]) -> HeldOut:
        """Return the words of the entities that are found, and which of these are right."""
        number = {label: index for index, label in enumerate(self._labels)}
        words, targets = [np.zeros((0, len(number)))], [np.zeros(0, dtype=np.int64)]
        right: list[bool] = []
        for tags, values in zip(self._tags, scores, strict=True):
            if not len(values):
                continue
            best = self._scheme.decode(values)
            gold = set(self._entities(np.array([number.get(tag, number["O"]) for tag in tags])))
            for entity in self._entities(best):
                part = slice(*entity[:2])
                words.append(values[part])
                targets.append(best[part])
                right.append(entity in gold)
        sizes = np.array([len(part) for part in targets[1:]], dtype=np.int64)
        entities = np.repeat(np.arange(len(right)), sizes)
        return HeldOut(
            np.concatenate(words), np.concatenate(targets), None, entities, np.array(right, dtype=bool)
        )

    def _entities(self, best: np.ndarray) -> list[tuple[int, int, int]]:
        """Return first word, the one after the last, and type of each entity."""
        begins, ends = (borders.tolist() for borders in self._scheme.spans(best))
        return [(b, e, int(self._scheme.group_of[best[b]])) for b, e in zip(begins, ends, strict=True)]
