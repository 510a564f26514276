"""Texts: read from anything that yields strings, tokenized once, cut into windows that fit the encoder.

The tokenizer is used without truncation and padding: they are settings of the one object behind a fast
tokenizer, and changing them while another thread tokenizes fails ("Already borrowed"). So a private copy is
made once and never changed, and windows are cut here.
"""

import copy
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Regex
from tokenizers.pre_tokenizers import Sequence, Split

from .errors_mtpf import in_one_sentence

WINDOW_OVERLAP = 0.25
"""Share of a window that the next one repeats, so that no word is seen only at a border."""

MAX_CHARACTERS = 1_000_000
"""The longest text that is read by default: about five minutes on two slow cores."""

PROBES = [
    "Call Ada O'Neill at 5:30pm, don't be late!  2024-01-02\tÀ bientôt, Noël",
    "e\u0301clair Ñandú Straße ŒUVRE Ελλάδα ΟΔΟΣ привет мир İstanbul",
    "東京 서울 भारत ไทย العربية עברית 👩🏽‍🚀🇵🇹 ﬁ ½ ² \u00a0\u200b\ufeff \U0010ffff",
    "x" * 300 + " " * 300 + "user@example.org/path?q=1#a_b-c [CLS] <s> [MASK]</s> ▁Ġ##a",
    "",
]
"""Texts whose tokens tell tokenizers apart, and on which a broken one fails."""

_SYMBOLS = "\ufe0f\u20e3\u2190-\u21ff\u2300-\u2bff\U0001f000-\U0001faff"
_JOINED = "\ufe0e\u200d\U000e0020-\U000e007f"
SYMBOLS = f" [{_SYMBOLS}][{_SYMBOLS}{_JOINED}]*|[{_SYMBOLS}][{_SYMBOLS}{_JOINED}]*"
"""A run of emoji, arrows and pictographs, as a regular expression of characters. The space before is part of
it: SentencePiece reads one alone as a token. Signs that are part of a word or a number, such as ``°``, ``€``
and mathematical operators, are not among them."""

_SYMBOL = re.compile(f"[{_SYMBOLS}]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_TABLE_ROWS = 1000


# ------------------------------------------------------------------------------------------------- reading


def read_texts(texts: Any, column: str | None = None, max_characters: int = MAX_CHARACTERS) -> Iterator[str]:
    """Yield the texts of a string, list, iterator, pandas Series, or a column of a table, in order.

    Of a table (`datasets.Dataset`, pandas DataFrame) or of rows that are dicts, ``column`` is read; it is
    ``text`` by default.

    Raises:
        TypeError: A text is not a string, or ``texts`` is not iterable.
        ValueError: A text is longer than ``max_characters``, or there is no such column.
    """
    for position, text in enumerate(_rows(texts, column)):
        if not isinstance(text, str):
            raise TypeError(
                f"Text {position} is {type(text).__name__}, not a string"
                + ("; decode it, e.g. with .decode('utf-8')." if isinstance(text, bytes) else ".")
            )
        if len(text) > max_characters:
            raise ValueError(
                f"Text {position} has {len(text):,} characters; at most {max_characters:,} are read at once. "
                "Split it, or raise max_characters."
            )
        yield text


def _rows(texts: Any, column: str | None) -> Iterator[Any]:
    if isinstance(texts, str):
        yield texts
        return
    if isinstance(texts, (bytes, Mapping)) or not hasattr(texts, "__iter__"):
        raise TypeError(
            f"texts is {type(texts).__name__}; give a string, or a list, iterator or Series of strings."
        )
    names = getattr(texts, "column_names", None)
    names = getattr(texts, "columns", None) if names is None else names
    if names is not None:
        names, column = list(names), column or "text"
        if column not in names:
            raise ValueError(
                f"There is no column {column!r}; choose one with column=: {', '.join(map(str, names))}."
            )
        if hasattr(texts, "select_columns"):
            for part in texts.select_columns([column]).iter(batch_size=_TABLE_ROWS):
                yield from part[column]
            return
        texts = texts[column]
    for position, row in enumerate(texts):
        if isinstance(row, Mapping):
            name = column or "text"
            if name not in row:
                raise ValueError(
                    f"Row {position} has no {name!r}; choose one with column=: {', '.join(row)}."
                )
            row = row[name]
        yield row


def in_portions(
    pairs: Iterable[tuple[str, Any]], rows: int, characters: int
) -> Iterator[list[tuple[str, Any]]]:
    """Split a stream of (text, anything) into lists of bounded length and number of characters."""
    source = iter(pairs)
    while portion := list(itertools.islice(source, 1)):
        size = len(portion[0][0])
        while len(portion) < rows and size < characters:
            following = next(source, None)
            if following is None:
                break
            portion.append(following)
            size += len(following[0])
        yield portion


# ---------------------------------------------------------------------------------------------- tokenizing


@dataclass
class Tokens:
    """One text in sub-words, without special tokens: ids ``(tokens,)`` and the tokenizer's own record."""

    ids: np.ndarray
    encoding: Any

    def words(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the first sub-word of each word, and where the word begins and ends in the text.

        Byte-level tokenizers count the space before a word as part of it; here it is not. Words without a
        character of their own are left out, and those of `SYMBOLS` alone: an app that saw none in fitting
        takes them for parts of the entities next to them.
        """
        numbers = np.array([-1 if word is None else word for word in self.encoding.word_ids], dtype=np.int64)
        opens = np.ones(len(numbers), dtype=bool)
        opens[1:] = numbers[1:] != numbers[:-1]
        first = np.flatnonzero(opens)
        if not len(first):
            return first, first, first
        offsets = np.array(self.encoding.offsets, dtype=np.int64)
        spaced = np.minimum.reduceat(offsets[:, 0], first)
        ends = np.maximum.reduceat(offsets[:, 1], first)
        spans = zip(spaced.tolist(), ends.tolist(), strict=True)
        starts = np.array([end - len(text[start:end].lstrip()) for start, end in spans], dtype=np.int64)
        real = (starts < ends) & (numbers[first] >= 0)
        if has_symbols(text):
            borders = zip(starts.tolist(), ends.tolist(), strict=True)
            real &= [not is_symbol(text[start:end]) for start, end in borders]
        return first[real], starts[real], ends[real]


@dataclass
class Window:
    """The sub-words ``start:stop`` of one text, for the apps with these indices.

    Sub-words ``label_start:label_stop`` take their labels from it: up to the middle of an overlap, where both
    windows show equally much of a word's surroundings.
    """

    text: int
    start: int
    stop: int
    label_start: int
    label_stop: int
    apps: list[int] = field(default_factory=list)

    @property
    def labelled(self) -> slice:
        """Sub-words of the text that take their labels from this window."""
        return slice(self.label_start, self.label_stop)

    def positions(self, prefix: int) -> slice:
        """Return where they are in the window's row, which begins with special tokens."""
        return slice(self.label_start - self.start + prefix, self.label_stop - self.start + prefix)


def plain_backend(tokenizer: Any) -> Any:
    """Return a copy of a fast tokenizer's backend that neither cuts nor pads.

    A byte-level one reads a text's first word like the others, with a space before it, as in fitting.

    Raises:
        ValueError: The tokenizer is not a fast one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer; predict needs one, for its offsets."
        )
    backend = copy.deepcopy(backend)
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.pre_tokenizer, "add_prefix_space", None) is False:
        backend.pre_tokenizer.add_prefix_space = True
    return backend


def has_symbols(text: str) -> bool:
    """Say whether a text has any of `SYMBOLS`."""
    return not text.isascii() and _SYMBOL.search(text) is not None


def is_symbol(word: str) -> bool:
    """Say whether a word has any of `SYMBOLS`, and neither letter nor digit."""
    return has_symbols(word) and not any(map(str.isalnum, word))


def with_symbols_apart(backend: Any) -> Any:
    """Let words end where a run of `SYMBOLS` begins, in place, and leave out those without a token.

    Otherwise BERT's tokenizer reads ``Paris🙂`` as one unknown word, and SentencePiece as one with the emoji;
    and apps, which saw few unknown words, take one for anything. All else is as before. Byte-level tokenizers
    do it by themselves.
    """
    if len(set(backend.encode("a\u2192a", add_special_tokens=False).word_ids)) == 3:
        return backend
    steps = [Split(Regex(SYMBOLS), "isolated")]
    if backend.pre_tokenizer is not None:
        steps.append(backend.pre_tokenizer)
    if backend.token_to_id("<0x0A>") is None:  # else what has no token is read byte by byte
        unknown = _unknown_symbols(backend)
        steps.insert(0, Split(Regex(f" [{unknown}][{_JOINED}]*|[{unknown}][{_JOINED}]*"), "removed"))
    backend.pre_tokenizer = Sequence(steps)
    return backend


def _unknown_symbols(backend: Any) -> str:
    """Return the symbols without a token of their own as ranges of a regular expression."""
    ranges = "\ufe0f\u20e3"
    for first, last in re.findall("(.)-(.)", _SYMBOLS):
        run = ""
        for symbol in map(chr, range(ord(first), ord(last) + 2)):
            known = any(backend.token_to_id(before + symbol) is not None for before in ("", "▁"))
            if not known and symbol <= last:
                run = run[:1] + symbol
            elif run:
                ranges, run = ranges + "-".join(run), ""
    return ranges


def backend_sha256(backend: Any) -> str:
    """Return a hash of what a backend of `plain_backend` does: its parts, and the tokens of `PROBES`.

    Not of its file, which other versions of the library write differently. Its post-processor does the same
    to every text, so that the tokens tell it.
    """
    stored = json.loads(backend.to_str())
    model = stored["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
    parts = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    steps = [parts, stored["normalizer"], stored["pre_tokenizer"], stored["added_tokens"]]
    rules = json.dumps(json.loads(json.dumps(steps), object_hook=_without_defaults), sort_keys=True)
    # One by one: a batch would start the library's threads, and no process could be forked any more.
    tokens = [(encoding.ids, encoding.offsets) for encoding in map(backend.encode, PROBES)]
    vocabulary = model.get("vocab") or {}
    pieces = sorted(vocabulary.items()) if isinstance(vocabulary, dict) else vocabulary
    return hashlib.sha256(repr((pieces, merges, rules, tokens)).encode("utf-8", "surrogatepass")).hexdigest()


def _without_defaults(part: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is off, and what fitting and `plain_backend` turn on: the tokens of `PROBES` tell it."""
    told = ("add_prefix_space", "trim_offsets")
    return {k: v for k, v in part.items() if v is not None and v is not False and k not in told}


class TextTokenizer:
    """A private, unchanging copy of a fast tokenizer; safe to use from several threads.

    Texts with `SYMBOLS` are read by another copy, `with_symbols_apart`.
    """

    def __init__(self, tokenizer: Any):
        self._backend = plain_backend(tokenizer)
        sample = self._backend.encode("a")
        special = np.array(sample.special_tokens_mask, dtype=bool)
        content = np.flatnonzero(~special)
        first, after = (content[0], content[-1] + 1) if len(content) else (len(special), len(special))
        self.prefix = np.array(sample.ids[:first], dtype=np.int64)
        self.suffix = np.array(sample.ids[after:], dtype=np.int64)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    @functools.cached_property
    def sha256(self) -> str:
        """The hash that an app records of the tokenizer that it was trained with."""
        return backend_sha256(self._backend)

    @functools.cached_property
    def apart(self) -> Any:
        """The backend for texts with `SYMBOLS`, which reads other texts as the tokenizer itself does."""
        return with_symbols_apart(copy.deepcopy(self._backend))

    @property
    def special(self) -> int:
        """Special tokens around every window."""
        return len(self.prefix) + len(self.suffix)

    def __call__(self, texts: list[str]) -> list[Tokens]:
        """Tokenize texts. A lone surrogate, which no tokenizer takes, is read as U+FFFD; offsets stay."""
        readable = [text if text.isascii() else _SURROGATES.sub("\ufffd", text) for text in texts]
        with in_one_sentence("The tokenizer cannot read a text"):
            encodings = self._backend.encode_batch(readable, add_special_tokens=False)
            if some := [i for i, text in enumerate(readable) if has_symbols(text)]:
                again = self.apart.encode_batch([readable[i] for i in some], add_special_tokens=False)
                for i, encoding in zip(some, again, strict=True):
                    encodings[i] = encoding
        return [Tokens(np.array(encoding.ids, dtype=np.int64), encoding) for encoding in encodings]

    def windows(self, text: int, tokens: int, max_length: int | None) -> list[Window]:
        """Cut a text of N sub-words into windows that overlap by a quarter.

        ``max_length`` counts special tokens; it is ``None`` where the text is known to fit.

        Raises:
            ValueError: Nothing fits next to the special tokens.
        """
        if max_length is None:
            return [Window(text, 0, tokens, 0, tokens)]
        capacity = max_length - self.special
        if capacity < 1:
            raise ValueError(
                f"An app's max_length of {max_length} has no room next to {self.special} special tokens."
            )
        if tokens <= capacity:
            return [Window(text, 0, tokens, 0, tokens)]
        step = max(1, capacity - int(max_length * WINDOW_OVERLAP))
        starts = range(0, tokens - capacity + step, step)
        windows = [Window(text, start, min(start + capacity, tokens), start, tokens) for start in starts]
        for left, right in zip(windows, windows[1:], strict=False):
            left.label_stop = right.label_start = (left.stop + right.start) // 2
        return windows
