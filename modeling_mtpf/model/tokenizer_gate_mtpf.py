"""The gate for tokenizers: their files are checked before they are parsed, and a tokenizer is tried once.

What a tokenizer does is data, but that data can hold regular expressions that take exponential time, texts
that grow a thousandfold, ids beyond the embedding, and maps on which the Rust library panics.
"""

import base64
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

from .errors_mtpf import MtpfError, first_line, in_one_sentence
from .gate_mtpf import check_values, read_json, shortened
from .schemas_mtpf import MAX_IDS
from .texts_mtpf import PROBES, plain_backend

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
VOCABULARIES = (
    *((TOKENIZER_FILE,), ("vocab.txt",), ("vocab.json", "merges.txt")),
    ("sentencepiece.bpe.model",),
)
"""Each entry is a complete vocabulary."""
VOCABULARY_FILES = tuple(name for names in VOCABULARIES for name in names)
TOKENIZER_FILES = (TOKENIZER_CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", *VOCABULARY_FILES)
MAX_TOKENIZER_BYTES, MAX_TOKENIZER_ENTRIES = 48_000_000, 4_000_000
MAX_GROWTH = 64
"""How many times longer a text may become by the replacements of a tokenizer, and how long one may be."""

_ATOM = r"(?:[^\\\[\](){}.*+?|^$]|\.|\\p\{\w+\}|\\[sSwWdDnrtfv]|\\[^\w\s]|\[\^?(?:[^\\\[\]]|\\.)+\])"
_ALTERNATIVE = rf"{_ATOM}{{1,64}}(?:[*+?]|\{{\d{{1,2}},?\d{{0,2}}\}})?"
_LINEAR = re.compile(rf"{_ALTERNATIVE}(?:\|{_ALTERNATIVE}){{0,31}}")
"""Regular expressions in which nothing follows a quantifier, and nothing is nested: a match that has passed
its quantifier cannot fail, so that no text makes it go back."""
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN_PATTERNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    rf"{_CONTRACTIONS}|\p{{N}}{{1,3}}|{_REST}",
    rf"{_CONTRACTIONS}|\p{{N}}|{_REST}",
)
"""Those of GPT-2, Llama 3 and Qwen 2, which are linear, too."""


def has_vocabulary(names: Collection[str]) -> bool:
    """Say whether these files include those that a tokenizer needs."""
    return any(set(names).issuperset(vocabulary) for vocabulary in VOCABULARIES)


def open_tokenizer(
    source: str,
    revision: str | None = None,
    token: str | None = None,
    rows: int | None = None,
    **options: Any,
) -> Any:
    """Load a fast tokenizer of a folder or repo, after checking its files, and try it.

    Args:
        source: A folder or a Hub id.
        revision: Commit, tag or branch.
        token: Hub token.
        rows: Of the embedding, which ids must not exceed.
        **options: Of ``AutoTokenizer.from_pretrained``.

    Raises:
        MtpfError: There is none, or it cannot be used.
    """
    where = f"The tokenizer of {source} cannot be used"
    with in_one_sentence(where):
        folder = Path(source)
        if not folder.is_dir():
            patterns = [*TOKENIZER_FILES, "config.json"]
            folder = Path(snapshot_download(source, revision=revision, token=token, allow_patterns=patterns))
        check_tokenizer_files(folder, source)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, use_fast=True, trust_remote_code=False, **options
            )
        except TypeError as error:  # a slow class reads files of its own, of which it is given None
            raise MtpfError(
                f"{where}: the 'tokenizer_class' in its {TOKENIZER_CONFIG_FILE} does not read its files; "
                f"name a fast one, such as 'PreTrainedTokenizerFast', which reads {TOKENIZER_FILE}."
            ) from error
    if not tokenizer.is_fast:
        raise MtpfError(f"{where}: it is not a fast one; choose an encoder with a {TOKENIZER_FILE}.")
    with in_one_sentence(where):
        vocabulary = tokenizer.get_vocab()
        highest = max(vocabulary.values(), default=0)
        backend = plain_backend(tokenizer)
        for text in PROBES:  # one by one: a batch would start the library's threads
            backend.encode(text)
    if len(vocabulary) <= len(tokenizer.all_special_ids):  # what transformers makes up without files
        raise MtpfError(f"{source} has no tokenizer; save one there with tokenizer.save_pretrained(...).")
    if rows is not None and highest >= rows:
        raise MtpfError(
            f"{where}: it has the token id {highest}, but the encoder only {rows} rows; save the encoder's "
            "own tokenizer there."
        )
    return tokenizer


# --------------------------------------------------------------------------------------------------- files


def check_tokenizer_files(folder: Path, source: Any = None) -> None:
    """Check the files of a tokenizer without loading it.

    Raises:
        MtpfError: One is missing, damaged, too large, or could take a time or memory without bound.
    """
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    source = folder if source is None else source
    if not has_vocabulary(names):
        raise MtpfError(
            f"{source} has no tokenizer, or a part of one only; add it with "
            f"tokenizer.save_pretrained({str(source)!r})."
        )
    for name in names:
        path = folder / name
        if not name.endswith(".json"):
            if path.stat().st_size > MAX_TOKENIZER_BYTES or path.read_bytes().count(b"\n") > MAX_IDS // 5:
                raise MtpfError(f"{source} is damaged: {name} is too large for a vocabulary.")
            continue
        value = read_json(path, MAX_TOKENIZER_BYTES, MAX_TOKENIZER_ENTRIES, shallow=True)
        try:
            if name == TOKENIZER_FILE:
                _check_backend(value)
            elif name in ("vocab.json", "added_tokens.json"):
                _check_ids(value.values())
            else:
                check_values(value)
                if name == TOKENIZER_CONFIG_FILE and (key := _named_file(value)):
                    raise ValueError(f"{key!r} names a file, which is not checked; leave it out")
                _check_ids(map(int, value.get("added_tokens_decoder") or {}))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise MtpfError(f"{source} is damaged: {name}: {first_line(error)}.") from error


def _named_file(config: dict[str, Any]) -> str | None:
    """Return a key that makes transformers read another file; it does not read special_tokens_map_file."""
    keys = (key for key, value in config.items() if re.search("_files?$", key) and value)
    return next((key for key in keys if key != "special_tokens_map_file"), None)


def _check_ids(ids: Any) -> None:
    for number in ids:
        if type(number) is not int or not 0 <= number < MAX_IDS:
            raise ValueError(f"the token id {shortened(number)} is not a whole number below {MAX_IDS:,}")


def _check_backend(value: dict[str, Any]) -> None:
    model = value.get("model")
    if not isinstance(model, dict):
        raise ValueError("it has no model")
    vocabulary, unknown = model.get("vocab"), model.get("unk_token")
    if isinstance(vocabulary, dict):
        _check_ids(vocabulary.values())
        if model.get("type") in ("WordPiece", "WordLevel") and unknown not in vocabulary:
            raise ValueError(f"its token for unknown words, {shortened(unknown)}, is not in its vocabulary")
    elif not isinstance(vocabulary, list):
        raise ValueError("its model has no vocabulary")
    if model.get("dropout"):
        raise ValueError("its model drops merges at random ('dropout')")
    if not 0 <= model.get("max_input_chars_per_word", 100) <= 1000:
        raise ValueError("'max_input_chars_per_word' must be at most 1000")
    _check_ids(entry["id"] for entry in value.get("added_tokens") or [])
    steps = {key: part for key, part in value.items() if key not in ("model", "added_tokens")}
    check_values(steps)
    growth = 1.0
    for step in _objects(steps):
        growth *= _check_step(step)
        if growth > MAX_GROWTH:
            raise ValueError("its replacements make texts too long")


def _check_step(step: dict[str, Any]) -> float:
    """Check one step of normalizer, splitter or post-processor; return by how much it lengthens a text."""
    pattern = step.get("Regex")
    if pattern is not None and pattern not in KNOWN_PATTERNS and not _is_linear(pattern):
        raise ValueError(
            f"the pattern {shortened(pattern)} may take exponential time; accepted are patterns without "
            "groups in which nothing follows a quantifier"
        )
    if "precompiled_charsmap" in step:
        _check_map(step["precompiled_charsmap"])
    if isinstance(step.get("single"), list) and len(step["single"]) > MAX_GROWTH:
        raise ValueError("it puts too many special tokens around a text")
    if max((number for number in step.values() if type(number) is int), default=0) > MAX_IDS:
        raise ValueError(f"{shortened(step)} holds a number above {MAX_IDS:,}")
    if step.get("type") not in ("Replace", "Prepend"):
        return 1.0
    replaced = (step.get("pattern") or {}).get("String", "x")
    return max(1.0, len(step.get("content", step.get("prepend", ""))) / (len(replaced) or 1e-9))


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield item
            stack += item.values()
        elif isinstance(item, list):
            stack += item


def _is_linear(pattern: Any) -> bool:
    return isinstance(pattern, str) and len(pattern) <= 500 and _LINEAR.fullmatch(pattern) is not None


def _check_map(text: Any) -> None:
    """Check the parts of SentencePiece's map: a size, a trie, and texts that end with a zero."""
    data = base64.b64decode(text or "", validate=True)
    size = int.from_bytes(data[:4], "little")
    if data and (size % 4 or 4 + size >= len(data) or data[-1]):
        raise ValueError("its map of characters is damaged")
    data[4 + size :].decode("utf-8")
