"""Tokenized rows and the few fixed batch shapes in which they are computed.

With bf16 on CPU every new batch shape costs a compilation in oneDNN and memory for good (docs/log.md). So
rows are tokenized once, sorted by length, and cut into batches whose shape depends on the length alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .words import PAD_MULTIPLE

CHUNK = 2048
"""Rows per call of the tokenizer: bounds the memory of its Python lists."""


@dataclass
class EncodedRows:
    """Texts or split sentences as token ids, not padded.

    Attributes:
        columns: The encoder's inputs, one int32 array ``(tokens,)`` per row.
        word_ids: Of split sentences: the word of each token, -1 for special tokens.
        pad_token_id: Fills ``input_ids``; everything else is filled with 0.
        cut: Whether each row was longer and has been cut off.
    """

    columns: dict[str, list[np.ndarray]]
    pad_token_id: int
    word_ids: list[np.ndarray] = field(default_factory=list)
    cut: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 ``(rows,)``."""
        return np.array([len(ids) for ids in self.columns["input_ids"]], dtype=np.int64)

    def inputs(self, rows: Sequence[int] | np.ndarray, length: int) -> dict[str, torch.Tensor]:
        """Return some rows as the encoder's inputs, each int64 ``(rows, length)``."""
        batch = {}
        for key, values in self.columns.items():
            fill = self.pad_token_id if key == "input_ids" else 0
            batch[key] = torch.from_numpy(padded([values[row] for row in rows], length, fill))
        return batch


@dataclass(frozen=True)
class FixedBatch:
    """Rows that are computed together at one padded length.

    Attributes:
        rows: Row numbers; the last ``len(rows) - real`` of them repeat the first one to fill the shape.
        length: Padded tokens per row.
        real: How many of the rows count.
    """

    rows: np.ndarray
    length: int
    real: int


def padded(values: list[np.ndarray], length: int, fill: int) -> np.ndarray:
    """Stack arrays of different length, int64 ``(len(values), length)``."""
    stacked = np.full((len(values), length), fill, dtype=np.int64)
    for row, value in enumerate(values):
        stacked[row, : len(value)] = value
    return stacked


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[str] | Sequence[list[str]], max_length: int
) -> EncodedRows:
    """Tokenize texts, or sentences that are split into words, each cut at ``max_length`` tokens."""
    split = bool(rows) and not isinstance(rows[0], str)
    columns: dict[str, list[np.ndarray]] = {"input_ids": []}
    word_ids: list[np.ndarray] = []
    cut: list[bool] = []
    for start in range(0, len(rows), CHUNK):
        part = list(rows[start : start + CHUNK])
        encoding = tokenizer(part, truncation=True, max_length=max_length, is_split_into_words=split)
        for key in tokenizer.model_input_names:
            if key in encoding:
                arrays = [np.asarray(ids, dtype=np.int32) for ids in encoding[key]]
                columns.setdefault(key, []).extend(arrays)
        cut += [bool(own.overflowing) for own in encoding.encodings]
        if split:
            owners = [encoding.word_ids(row) for row in range(len(part))]
            word_ids += [np.array([-1 if w is None else w for w in own], dtype=np.int32) for own in owners]
    return EncodedRows(columns, int(tokenizer.pad_token_id), word_ids, cut)  # type: ignore[arg-type]


def padded_length(length: int, max_length: int) -> int:
    """Round a number of tokens up to a multiple of `PAD_MULTIPLE`, but not beyond ``max_length``."""
    return min(-(-max(length, 1) // PAD_MULTIPLE) * PAD_MULTIPLE, max_length)


def fixed_batches(lengths: np.ndarray, max_length: int, tokens: int = 4096) -> list[FixedBatch]:
    """Cut rows, longest first, into batches of one shape per padded length.

    Args:
        lengths: Tokens of each row.
        max_length: Longest padded length.
        tokens: Aimed-at tokens per batch; the number of rows is a multiple of 16.

    Example:
        >>> [(batch.rows.tolist(), batch.length) for batch in fixed_batches(np.array([3, 20, 4]), 64, 16)]
        [([1, 2, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], 32)]
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    batches, start = [], 0
    while start < len(order):
        length = padded_length(int(lengths[order[start]]), max_length)
        size = max(tokens // length // 16, 1) * 16
        rows = order[start : start + size]
        fill = np.full(size - len(rows), rows[0])
        batches.append(FixedBatch(np.concatenate([rows, fill]), length, len(rows)))
        start += size
    return batches


__all__ = ["EncodedRows", "FixedBatch", "encode_rows", "fixed_batches", "padded", "padded_length"]
