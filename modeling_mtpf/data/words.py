"""Words: splitting raw text, and aligning words with a tokenizer's sub-words."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as Steps
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..model.texts_mtpf import SYMBOLS
from ..model.tokenizer_gate_mtpf import open_tokenizer

IGNORE = -100
"""Label of positions that a loss skips (PyTorch's ``ignore_index``)."""

_SPLITTER = Steps([Split(Regex(SYMBOLS), "isolated"), BertPreTokenizer()])


def load_word_tokenizer(encoder_id: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer that accepts words that are already split.

    Byte-level BPE needs ``add_prefix_space``: a word in the middle of a text is preceded by a space.
    """
    tokenizer = open_tokenizer(encoder_id, revision or "main")
    if getattr(tokenizer, "add_prefix_space", None) is False:
        tokenizer = open_tokenizer(encoder_id, revision or "main", add_prefix_space=True)
    if isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        # The generic class of ModernBERT's tokenizer accepts the option and ignores it.
        splitter = tokenizer.backend_tokenizer.pre_tokenizer
        if isinstance(splitter, ByteLevel) and not splitter.add_prefix_space:
            splitter.add_prefix_space = True
    pad_id(tokenizer)
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of a tokenizer's pad token; raise `DataError` if it has none."""
    if tokenizer.pad_token is None:
        raise DataError(
            f"The tokenizer of {tokenizer.name_or_path} has no pad token, so texts of different length make "
            "no batch; set tokenizer.pad_token and save it there."
        )
    return int(tokenizer.pad_token_id)  # type: ignore[arg-type]


def split_words(text: str) -> list[str]:
    """Split at white space and around every punctuation mark and run of `SYMBOLS`.

    But for the symbols it is what BERT's basic tokenizer does.

    Example:
        >>> split_words("Lunch at 1?")
        ['Lunch', 'at', '1', '?']
    """
    return [word for word, _ in word_starts(text)]


def word_starts(text: str) -> list[tuple[str, int]]:
    """Split like `split_words`; return each word with the offset of its first character."""
    return [(word, start) for word, (start, _) in _SPLITTER.pre_tokenize_str(text)]


def word_borders(text: str) -> list[tuple[int, int]]:
    """Split like `split_words`; return where each word starts and ends."""
    return [borders for _, borders in _SPLITTER.pre_tokenize_str(text)]


def first_subwords(word_ids: np.ndarray) -> np.ndarray:
    """Mark the first sub-word of each word; ``word_ids`` ``(..., tokens)`` are -1 for other tokens."""
    first = word_ids >= 0
    first[..., 1:] &= word_ids[..., 1:] != word_ids[..., :-1]
    return first


def align_labels(word_ids: np.ndarray, labels: Sequence[int]) -> tuple[np.ndarray, int]:
    """Put each word's label on its first sub-word and `IGNORE` everywhere else.

    Args:
        word_ids: Word of each token of a sentence ``(tokens,)``, -1 for special tokens.
        labels: Label of each word.

    Returns:
        Labels ``(tokens,)``, int64, and the number of labelled words without a sub-word: words that are cut
        off, or that the tokenizer maps to nothing.
    """
    labels_of_words = np.asarray(labels, dtype=np.int64)
    aligned = np.full(len(word_ids), IGNORE, dtype=np.int64)
    first = np.flatnonzero(first_subwords(word_ids))
    aligned[first] = labels_of_words[word_ids[first]]
    return aligned, int((labels_of_words != IGNORE).sum() - (aligned != IGNORE).sum())
