"""Words: splitting raw text, and aligning words with a tokenizer's sub-words."""

from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import DataError

IGNORE = -100
"""Label of positions that a loss skips (PyTorch's ``ignore_index``)."""

PAD_MULTIPLE = 16
"""Batches are padded to a multiple of this: few shapes let oneDNN reuse its compiled kernels."""

_SPLITTER = BertPreTokenizer()


def load_word_tokenizer(encoder_id: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer that accepts words that are already split.

    Byte-level BPE needs ``add_prefix_space``: a word in the middle of a text is preceded by a space.
    """
    kwargs: dict[str, Any] = {"revision": revision} if revision else {}
    tokenizer = AutoTokenizer.from_pretrained(encoder_id, trust_remote_code=False, **kwargs)
    if getattr(tokenizer, "add_prefix_space", None) is False:
        tokenizer = AutoTokenizer.from_pretrained(
            encoder_id, trust_remote_code=False, add_prefix_space=True, **kwargs
        )
    if isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        # The generic class that ModernBERT's tokenizer has takes the option and ignores it.
        splitter = tokenizer.backend_tokenizer.pre_tokenizer
        if isinstance(splitter, ByteLevel) and not splitter.add_prefix_space:
            splitter.add_prefix_space = True
    if not tokenizer.is_fast:
        raise DataError(f"The tokenizer of {encoder_id} is not a fast one; words cannot be aligned with it.")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers builds where there are no files
        raise DataError(f"{encoder_id} has no tokenizer; save one there with tokenizer.save_pretrained(...).")
    return tokenizer


def pad_to_multiple(
    inputs: dict[str, torch.Tensor], pad_token_id: int, limit: int, multiple: int = PAD_MULTIPLE
) -> dict[str, torch.Tensor]:
    """Pad a batch further to a multiple of some tokens, but not beyond ``limit``.

    The tokenizer's own option refuses a ``max_length`` that is not a multiple itself.
    """
    length = inputs["input_ids"].shape[1]
    extra = max(0, min(-(-length // multiple) * multiple, limit) - length)
    return {
        key: nn.functional.pad(value, (0, extra), value=pad_token_id if key == "input_ids" else 0)
        for key, value in inputs.items()
    }


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int
) -> dict[str, torch.Tensor]:
    """Tokenize texts, each cut at ``max_length`` sub-words, padded to a few different lengths."""
    encoding = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    return pad_to_multiple(dict(encoding), tokenizer.pad_token_id, max_length)


def split_words(text: str) -> list[str]:
    """Split at white space and around every punctuation mark, as BERT's basic tokenizer does.

    Example:
        >>> split_words("Lunch at 1?")
        ['Lunch', 'at', '1', '?']
    """
    return [word for word, _ in _SPLITTER.pre_tokenize_str(text)]


def split_word_spans(text: str) -> list[tuple[str, int, int]]:
    """Split like `split_words`; return each word with its first character and the one after its last.

    Example:
        >>> split_word_spans("Hi, you")
        [('Hi', 0, 2), (',', 2, 3), ('you', 4, 7)]
    """
    return [(word, *span) for word, span in _SPLITTER.pre_tokenize_str(text)]


def encode_words(
    tokenizer: PreTrainedTokenizerBase,
    sentences: list[list[str]],
    max_length: int,
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Tokenize split sentences and say which word each sub-word belongs to.

    Args:
        tokenizer: A fast tokenizer, see `load_word_tokenizer`.
        sentences: Words of each sentence.
        max_length: Longest row in sub-words; what is beyond is cut off.

    Returns:
        The encoder's inputs, each ``(batch, tokens)``, and the word index of every sub-word, int64
        ``(batch, tokens)``, -1 for special and padding tokens.
    """
    encoding = tokenizer(
        sentences,
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
        padding=True,
        return_tensors="pt",
    )
    inputs = pad_to_multiple(dict(encoding), tokenizer.pad_token_id, max_length)
    word_ids = np.full(tuple(inputs["input_ids"].shape), -1, dtype=np.int64)
    for row in range(len(sentences)):
        own = [-1 if word is None else word for word in encoding.word_ids(row)]
        word_ids[row, : len(own)] = own
    return inputs, word_ids


def first_subwords(word_ids: np.ndarray) -> np.ndarray:
    """Mark the first sub-word of each word: boolean, shape of ``word_ids``."""
    first = word_ids >= 0
    first[:, 1:] &= word_ids[:, 1:] != word_ids[:, :-1]
    return first


def align_labels(word_ids: np.ndarray, labels: list[list[int]]) -> tuple[torch.Tensor, int]:
    """Put each word's label on its first sub-word and `IGNORE` everywhere else.

    Returns:
        Labels ``(batch, tokens)``, int64, and how many labelled words have no sub-word in the batch, because
        they were cut off or the tokenizer maps them to nothing.
    """
    aligned = np.full(word_ids.shape, IGNORE, dtype=np.int64)
    rows, columns = np.nonzero(first_subwords(word_ids))
    lost = 0
    for row, row_labels in enumerate(labels):
        positions = columns[rows == row]
        words = word_ids[row, positions]
        values = np.asarray(row_labels, dtype=np.int64)
        aligned[row, positions] = values[words]
        lost += int((values != IGNORE).sum() - (values[words] != IGNORE).sum())
    return torch.from_numpy(aligned), lost


__all__ = [
    "IGNORE",
    "PAD_MULTIPLE",
    "align_labels",
    "encode_texts",
    "encode_words",
    "first_subwords",
    "load_word_tokenizer",
    "pad_to_multiple",
    "split_word_spans",
    "split_words",
]
