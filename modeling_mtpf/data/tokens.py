"""Tokenize a data set once, into memory-mapped columns of sub-word ids.

The tables live in the cache of ``datasets`` (``HF_DATASETS_CACHE``), named by the data, the tokenizer and the
settings: a second run, a resumed run and other processes open them at once.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from .words import align_labels

IDS = List(Value("int32"))


def text_key(text: str) -> int:
    """Return a 63-bit number for a text, the same for texts that differ in case or outer space only."""
    digest = hashlib.blake2b(text.strip().lower().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identify what a fast tokenizer does, whatever padding and truncation it was last used with."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return hashlib.sha256(backend.to_str().encode()).hexdigest()


def _tokenized(
    dataset: Dataset,
    function: Callable[[dict[str, list]], dict[str, list]],
    features: Features,
    settings: Sequence[Any],
    description: str,
) -> Dataset:
    """Map a data set to token columns; the cache is keyed by contents and settings, not by code objects."""
    return dataset.map(
        function,
        batched=True,
        batch_size=2000,
        remove_columns=dataset.column_names,
        features=features,
        new_fingerprint=Hasher.hash([dataset._fingerprint, *settings]),
        desc=description,
    )


def tokenize_columns(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, name: str
) -> Dataset:
    """Tokenize every text column of a data set.

    Returns:
        For each column its sub-word ids, cut at ``max_length``; and ``keys``, one number per text of the row
        (see `text_key`).
    """
    columns = dataset.column_names
    fingerprint = _tokenizer_fingerprint(tokenizer)

    def encode(rows: dict[str, list]) -> dict[str, list]:
        encoded: dict[str, list] = {
            column: tokenizer(
                rows[column],
                truncation=True,
                max_length=max_length,
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
            for column in columns
        }
        encoded["keys"] = [[text_key(text) for text in row] for row in zip(*rows.values(), strict=True)]
        return encoded

    features = Features({**dict.fromkeys(columns, IDS), "keys": List(Value("int64"))})
    settings = ("texts-1", columns, fingerprint, max_length)
    return _tokenized(dataset, encode, features, settings, f"tokenize {name}")


def tokenize_labelled_words(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, words: str, labels: str, name: str
) -> Dataset:
    """Tokenize split sentences and put each word's label on its first sub-word.

    Returns:
        ``ids`` and ``labels`` of equal length per row, ``IGNORE`` on positions without a label; ``words``,
        how many words the row has; ``lost``, how many labelled words have no sub-word, because they were cut
        off or the tokenizer maps them to nothing.
    """
    fingerprint = _tokenizer_fingerprint(tokenizer)

    def encode(rows: dict[str, list]) -> dict[str, list]:
        encoding = tokenizer(
            rows[words], is_split_into_words=True, truncation=True, max_length=max_length, padding=False
        )
        aligned, lost = [], []
        for number, row_labels in enumerate(rows[labels]):
            word_ids = np.array([-1 if word is None else word for word in encoding.word_ids(number)])
            row, missing = align_labels(word_ids, row_labels)
            aligned.append(row)
            lost.append(missing)
        return {
            "ids": encoding["input_ids"],
            "labels": aligned,
            "words": [len(row) for row in rows[words]],
            "lost": lost,
        }

    features = Features({"ids": IDS, "labels": IDS, "words": Value("int32"), "lost": Value("int32")})
    settings = ("words-1", words, labels, fingerprint, max_length)
    return _tokenized(dataset, encode, features, settings, f"tokenize {name}")


def list_arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Return a column of lists as arrays, without Python numbers in between."""
    whole = column.combine_chunks()
    whole = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
    values, offsets = whole.values.to_numpy(), whole.offsets.to_numpy()
    return [values[start:stop] for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
