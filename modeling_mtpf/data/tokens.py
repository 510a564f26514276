"""Tokenize a data set once, into memory-mapped columns of sub-word ids.

The tables live in the cache of ``datasets`` (``HF_DATASETS_CACHE``), named by the data, the tokenizer and the
settings: a second run, a resumed run and other processes open them at once.
"""

import hashlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from .encoding import encode_rows
from .words import align_labels

IDS = List(Value("int32"))


def text_key(text: str) -> int:
    """Return a 63-bit number for a text, the same for texts that differ in case or outer space only."""
    digest = hashlib.blake2b(text.strip().lower().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _tokenized(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    function: Callable[[dict[str, list]], dict[str, list]],
    features: Features,
    key: tuple,
    max_length: int,
    name: str,
) -> Dataset:
    """Map a data set to token columns; the cache is keyed by contents and settings, not by code objects."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # the key must not depend on the tokenizer's last call
    backend.no_truncation()
    digest = hashlib.sha256(backend.to_str().encode()).hexdigest()
    return dataset.map(
        function,
        batched=True,
        batch_size=2000,
        remove_columns=dataset.column_names,
        features=features,
        new_fingerprint=Hasher.hash([dataset._fingerprint, *key, digest, max_length]),
        desc=f"tokenize {name}",
    )


def tokenize_columns(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, name: str
) -> Dataset:
    """Return the sub-word ids of each text column, cut at ``max_length``, and each row's `text_key`s."""
    columns = dataset.column_names

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
    return _tokenized(dataset, tokenizer, encode, features, ("texts-1", columns), max_length, name)


def tokenize_labelled_words(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, words: str, labels: str, name: str
) -> Dataset:
    """Tokenize split sentences and put each word's label on its first sub-word.

    Returns:
        ``ids`` and ``labels`` of equal length per row (see `align_labels`), ``words``, its number of words,
        and ``lost``, how many of those with a label have no sub-word.
    """

    def encode(rows: dict[str, list]) -> dict[str, list]:
        encoded = encode_rows(tokenizer, rows[words], max_length)
        aligned = list(map(align_labels, encoded.word_ids, rows[labels]))
        return {
            "ids": encoded.columns["input_ids"],
            "labels": [row for row, _ in aligned],
            "words": [len(row) for row in rows[words]],
            "lost": [lost for _, lost in aligned],
        }

    features = Features({"ids": IDS, "labels": IDS, "words": Value("int32"), "lost": Value("int32")})
    return _tokenized(dataset, tokenizer, encode, features, ("words-1", words, labels), max_length, name)


def list_arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Return a column of lists as arrays, without Python numbers in between."""
    whole = column.combine_chunks()
    whole = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
    values, offsets = whole.values.to_numpy(), whole.offsets.to_numpy()
    return [values[start:stop] for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
