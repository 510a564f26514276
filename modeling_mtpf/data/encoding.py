"""Tokenized rows, kept without padding and padded batch by batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..model.texts_mtpf import TextTokenizer, has_symbols
from .words import pad_id

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
        fill = {"input_ids": self.pad_token_id}
        return {
            key: torch.from_numpy(padded([values[row] for row in rows], length, fill.get(key, 0)))
            for key, values in self.columns.items()
        }


def padded(values: list[np.ndarray], length: int, fill: int) -> np.ndarray:
    """Stack arrays of different length, int64 ``(len(values), length)``."""
    stacked = np.full((len(values), length), fill, dtype=np.int64)
    for row, value in enumerate(values):
        stacked[row, : len(value)] = value
    return stacked


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[str] | Sequence[list[str]], max_length: int
) -> EncodedRows:
    """Tokenize texts as prediction does, or sentences split into words, each cut at ``max_length`` tokens."""
    encoded = EncodedRows({"input_ids": []}, pad_id(tokenizer))
    split = bool(rows) and not isinstance(rows[0], str)
    if not split and any(has_symbols(str(row)) for row in rows):
        return _encode_texts(TextTokenizer(tokenizer), list(rows), max_length, encoded)
    for start in range(0, len(rows), CHUNK):
        part = list(rows[start : start + CHUNK])
        encoding = tokenizer(part, truncation=True, max_length=max_length, is_split_into_words=split)
        for key in filter(encoding.__contains__, tokenizer.model_input_names):
            encoded.columns.setdefault(key, []).extend(np.asarray(x, dtype=np.int32) for x in encoding[key])
        encoded.cut += [bool(row.overflowing) for row in encoding.encodings]
        for words in map(encoding.word_ids, range(len(part))) if split else ():
            encoded.word_ids.append(np.array([-1 if w is None else w for w in words], dtype=np.int32))
    return encoded


def _encode_texts(reader: TextTokenizer, texts: list, max_length: int, encoded: EncodedRows) -> EncodedRows:
    """Add the tokens of texts to empty rows."""
    for start in range(0, len(texts), CHUNK):
        for tokens in reader(texts[start : start + CHUNK]):
            ids = tokens.ids[: max_length - reader.special]
            row = np.concatenate([reader.prefix, ids, reader.suffix]).astype(np.int32)
            encoded.columns["input_ids"].append(row)
            encoded.columns.setdefault("attention_mask", []).append(np.ones_like(row))
            encoded.cut.append(len(ids) < len(tokens.ids))
    return encoded
