"""Character offsets for any text, by hypothesis."""

import unicodedata

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from modeling_mtpf import AdapterHead
from modeling_mtpf.model.texts_mtpf import has_symbols, is_symbol, plain_backend, with_symbols_apart

PIECES = st.sampled_from(
    [
        *("Ada", "london", "don't", "7:30pm", "x" * 300, "Hi", "@", "…"),
        *("🙂", "👩‍👩‍👧", "🇳🇱", "❤️", "👍🏽"),  # with joiners, variation selectors, skin tones
        *("e\u0301", "a\u0300\u0316\u0301", "\u0301", "n\u0303o", "ﬁ", "ß", "İ", "ǅ"),
        *("שלום", "مَرحَبا", "\u202eabc\u202c", "\u200f", "עבריתabc"),
        *("東京", "日本語テキスト", "한국어", "が", "か\u3099"),
        *("\ud800", "\udfff", "a\udc00b", "\ud83d\ude42"),  # lone surrogates, and a pair left apart
        *(
            " ",
            "\t",
            "\n",
            "\r\n",
            "\u00a0",
            "\u3000",
            "\u200b",
            "\ufeff",
            "\x00",
            "\x85",
            "\ufffd",
            "\U0010ffff",
        ),
    ]
)
TEXTS = st.one_of(
    st.lists(PIECES, max_size=12).map("".join),
    st.lists(PIECES, max_size=12).map(" ".join),
    st.text(max_size=40),
    st.text(st.characters(), max_size=40),
)


@pytest.fixture(scope="module")
def predictors(encoders):
    """Models whose app calls every word an entity of its own, with their tokenizers."""
    from modeling_mtpf import MtpfModel

    predictors = []
    for architecture in ("bert", "roberta"):
        model = MtpfModel.from_pretrained(encoders[architecture]).eval()
        model.add_adapter("words")
        model.heads["words"] = head = AdapterHead("token-classification", ["O", "B-W"], 32, 16)
        with torch.no_grad():
            head.weight.zero_()
            head.bias.copy_(torch.tensor([0.0, 5.0]))
        predictors.append((model, AutoTokenizer.from_pretrained(encoders[architecture])))
    return predictors


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.lists(TEXTS, max_size=4))
@example([""])
@example(["\ud800"])
@example(["Ada " * 400 + "\ud800" + "e\u0301" * 400])
@example(["e\u0301", "cafe\u0301 x", "\u0301\u0301", "❤️ b"])
def test_words_lie_where_the_text_has_them(predictors, texts):
    for model, tokenizer in predictors:
        results = model.predict(texts, adapters=["words"])["words"]
        assert len(results) == len(texts)
        for text, spans in zip(texts, results, strict=True):
            end = 0
            for span in spans:
                assert 0 <= end <= span["start"] < span["end"] <= len(text)
                assert span["word"] == text[span["start"] : span["end"]] == span["word"].strip()
                end = span["end"]
                if end < len(text):  # no combining mark is cut from its letter, unless it is a word itself
                    mark = unicodedata.category(text[end]).startswith("M") and not text[end].isascii()
                    assert not mark or any(other["start"] == end for other in spans)
            assert_same_words(text, spans, tokenizer)


def assert_same_words(text, spans, tokenizer):
    """The words are those of the tokenizer by itself, whatever the windows; ends may include marks."""
    readable = "".join("\ufffd" if "\ud800" <= letter <= "\udfff" else letter for letter in text)
    # Words end where symbols begin: tests/model/test_symbols.py compares that with a reference of its own.
    backend = plain_backend(tokenizer)
    backend = with_symbols_apart(backend) if has_symbols(readable) else backend
    encoding = backend.encode(readable, add_special_tokens=False)
    words: dict[int, list[int]] = {}
    for word, (start, end) in zip(encoding.word_ids, encoding.offsets, strict=True):
        if word is None:
            continue
        known = words.setdefault(word, [start, end])
        known[0], known[1] = min(known[0], start), max(known[1], end)
    trimmed = [(end - len(text[start:end].lstrip()), end) for start, end in words.values()]
    expected = sorted(word for word in trimmed if word[0] < word[1] and not is_symbol(text[slice(*word)]))
    assert [span["start"] for span in spans] == [start for start, _ in expected]
    for span, (_, end) in zip(spans, expected, strict=True):
        assert span["end"] >= end
        assert all(unicodedata.category(letter).startswith("M") for letter in text[end : span["end"]])


def test_a_huge_text_is_read_to_its_end(predictors):
    model, _ = predictors[0]
    text = "Ada met Noor. 🙂 " * 2000
    spans = model.predict(text, adapters=["words"])["words"][0]
    assert len(spans) >= 8000 and spans[-1]["end"] >= len(text) - 3
