"""Emoji and arrows glued to words: a word ends where they begin, in fitting, prediction and exports."""

import copy

import pytest
from conftest import SENTENCES, make_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_mtpf.data.encoding import encode_rows
from modeling_mtpf.data.words import split_words
from modeling_mtpf.model.texts_mtpf import (
    TextTokenizer,
    backend_sha256,
    is_symbol,
    plain_backend,
    with_symbols_apart,
)


def sentence_piece(splitter) -> PreTrainedTokenizerFast:
    letters = sorted({*"".join(SENTENCES), "▁"} - {" "})
    pieces = [("<unk>", 0.0), *((letter, -5.0) for letter in letters), ("▁Ada", -1.0), ("▁London", -1.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")


def cased() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(False)
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    return tokenizer


METASPACE = pre_tokenizers.Metaspace(prepend_scheme="always")
TOKENIZERS = {
    "WordPiece": make_tokenizer(False),
    "cased WordPiece": cased(),
    "byte-level": make_tokenizer(True),
    "Metaspace": sentence_piece(METASPACE),
    "sequence": sentence_piece(pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), METASPACE])),
    "sequence of one": sentence_piece(pre_tokenizers.Sequence([METASPACE])),
    "Metaspace at the first word": sentence_piece(pre_tokenizers.Metaspace(prepend_scheme="first")),
}
ALL = {**TOKENIZERS, "no splitter": sentence_piece(None)}
SYMBOLS = [
    "🙂",
    "🙂🙂🎉",
    "👩🏽‍🚀",
    "🇵🇹",
    "❤️",
    "→",
    "★",
    "👨‍👩‍👧",
    "🏴\U000e0067\U000e0062\U000e007f",
    "⌚",
    "🅰",
]
ORDINARY = [
    *(text for text in SENTENCES if "🙂" not in text),
    "£50 20°C 5±1 a≤b x² don't Ada™ №5 [MASK] 東京a",
]


def words(tokenizer, text: str) -> list[str]:
    tokens = TextTokenizer(tokenizer)([text])[0]
    return [text[start:end] for _, start, end in zip(*tokens.words(text), strict=True)]


def unknown(tokenizer, symbol: str) -> bool:
    return tokenizer is not TOKENIZERS["byte-level"] and not any(c in tokenizer.get_vocab() for c in symbol)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("symbol", SYMBOLS)
def test_a_word_ends_where_a_symbol_begins(tokenizer, symbol):
    reader, plain = TextTokenizer(tokenizer), plain_backend(tokenizer)
    for text in (
        f"Ada{symbol} in London{symbol}",
        f"{symbol}Ada in {symbol}London",
        f"Ada{symbol}in{symbol}London",
    ):
        read = words(tokenizer, text)
        assert read == ["Ada", "in", "London"]
    if unknown(tokenizer, symbol) or len(symbol) == 1:
        ids = reader([f"Ada {symbol} in"])[0].ids.tolist()
        expected = "Ada in" if unknown(tokenizer, symbol) else f"Ada {symbol} in"
        assert ids == plain.encode(expected, add_special_tokens=False).ids


def test_a_symbol_has_neither_letter_nor_digit():
    assert all(map(is_symbol, [*SYMBOLS, "→,", "(★)", " 🙂"]))
    assert not any(map(is_symbol, ["", "a→b", "①", "5\ufe0f\u20e3", ",", "€", "°", "Ada", "東京"]))


def test_a_key_with_a_digit_is_the_digit():
    assert words(make_tokenizer(False), "room 5\ufe0f\u20e3!") == ["room", "5", "!"]


@pytest.mark.parametrize("tokenizer", ALL.values(), ids=ALL)
def test_other_texts_and_the_identity_stay(tokenizer):
    plain, apart = plain_backend(tokenizer), with_symbols_apart(plain_backend(tokenizer))
    for text in ORDINARY:
        expected, read = (each.encode(text, add_special_tokens=False) for each in (plain, apart))
        assert (read.ids, read.offsets, read.word_ids) == (expected.ids, expected.offsets, expected.word_ids)
    reader = TextTokenizer(tokenizer)
    assert reader.sha256 == backend_sha256(plain)
    read = [tokens.encoding.ids for tokens in reader(["Ada", "Ada🙂", "Ada"])]
    assert read[0] == read[2] == plain.encode("Ada", add_special_tokens=False).ids
    stored = Tokenizer.from_str(apart.to_str())  # as an export has it
    assert backend_sha256(stored) == backend_sha256(reader.apart)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_texts_are_fitted_as_they_are_read(tokenizer):
    before = copy.deepcopy(tokenizer.backend_tokenizer.to_str())
    texts = [*SENTENCES, "Ada🙂 in London→5pm", "", "a " * 40]
    encoded, reader = encode_rows(tokenizer, texts, 24), TextTokenizer(tokenizer)
    for ids, cut, tokens in zip(encoded.columns["input_ids"], encoded.cut, reader(texts), strict=True):
        room = 24 - reader.special
        assert ids.tolist() == [*reader.prefix, *tokens.ids[:room], *reader.suffix]
        assert cut == (len(tokens.ids) > room)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_ordinary_texts_are_fitted_as_the_tokenizer_itself_reads_them():
    tokenizer = make_tokenizer(False)
    expected = tokenizer(ORDINARY, truncation=True, max_length=12)
    encoded = encode_rows(tokenizer, ORDINARY, 12)
    assert [ids.tolist() for ids in encoded.columns["input_ids"]] == expected["input_ids"]
    assert [mask.tolist() for mask in encoded.columns["attention_mask"]] == expected["attention_mask"]


def test_words_of_spans_end_there_too():
    assert split_words("Ada🙂, in #Paris→Rome❤️!") == [
        "Ada",
        "🙂",
        ",",
        "in",
        "#",
        "Paris",
        "→",
        "Rome",
        "❤️",
        "!",
    ]
