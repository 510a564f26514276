"""Word vectors against a plain reference: one forward per sentence, without padding, pooled in Python."""

import json

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, BYTE_LEVEL, SENTENCES, make_tokenizer
from tokenizers import pre_tokenizers
from transformers import AutoModel, RobertaTokenizer, T5Config, T5Model

from modeling_mtpf.data.batches import close_batches, length_sorted_batches
from modeling_mtpf.data.words import load_word_tokenizer, split_words
from modeling_mtpf.errors import DataError
from modeling_mtpf.labelling.segmentation import split_sentences
from modeling_mtpf.labelling.settings import PseudoLabelSettings
from modeling_mtpf.labelling.teacher import LayerReader, load_teacher

TEXTS = [
    *SENTENCES,
    "Noor and Ada take the 7:30pm train to London.",
    "don't @ me, I'd rather they'd've asked",
    "a\u200bb \u200b c",
    "I'll see 東京. 大阪も好きです。",
    "👩‍👩‍👧 🙂🙂 cafe\u0301 naïve Zürich",
]


def settings_for(folder, **kwargs) -> PseudoLabelSettings:
    defaults = {"clusters": "6", "sample_words": 500, "precision": "float32"}
    return PseudoLabelSettings(teacher=str(folder), **(defaults | kwargs))


def reference_vectors(
    folder, sentences, layers=(-1,), pooling="mean", max_length=128
) -> list[np.ndarray | None]:
    """One unit vector per word, from one sentence at a time, without padding."""
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = load_word_tokenizer(str(folder))
    vectors: list[np.ndarray | None] = []
    for words in sentences:
        encoding = tokenizer(
            words, is_split_into_words=True, return_tensors="pt", truncation=True, max_length=max_length
        )
        with torch.no_grad():
            states = model(**encoding, output_hidden_states=True).hidden_states
        hidden = torch.cat([states[layer][0] for layer in layers], dim=-1)
        for index in range(len(words)):
            positions = [position for position, word in enumerate(encoding.word_ids(0)) if word == index]
            positions = positions[:1] if pooling == "first" else positions
            mean = hidden[positions].mean(0) if positions else None
            vectors.append(None if mean is None else (mean / mean.norm()).numpy())
    return vectors


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert"])
@pytest.mark.parametrize(
    "layer, pooling, tokens",
    [("-1", "mean", 4096), ("2", "first", 64), ("-1,2", "mean", 100), ("0,1", "mean", 64)],
)
def test_word_vectors_equal_the_reference(encoders, architecture, layer, pooling, tokens):
    folder = encoders[architecture]
    sentences = [split_words(text) for text in TEXTS]
    layers = [int(part) for part in layer.split(",")]
    expected = reference_vectors(folder, sentences, layers, pooling)
    encoder = load_teacher(settings_for(folder, layer=layer, pooling=pooling, batch_tokens=tokens))
    vectors, covered = encoder(sentences)
    assert covered.tolist() == [vector is not None for vector in expected]
    np.testing.assert_allclose(vectors, np.stack([v for v in expected if v is not None]), atol=1e-5)
    if architecture not in BYTE_LEVEL:
        assert not covered.all()  # BERT's normaliser maps a zero-width space to nothing


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_words_that_are_cut_off_have_no_vector(encoders, architecture):
    sentences = [split_words(text) for text in TEXTS]
    expected = reference_vectors(encoders[architecture], sentences, max_length=10)
    vectors, covered = load_teacher(settings_for(encoders[architecture], max_length=10))(sentences)
    assert covered.tolist() == [vector is not None for vector in expected]
    assert 0 < covered.sum() < 0.8 * len(covered)
    np.testing.assert_allclose(vectors, np.stack([v for v in expected if v is not None]), atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_above_the_highest_wanted_are_not_run(encoders, architecture):
    model = AutoModel.from_pretrained(encoders[architecture]).eval()
    inputs = dict(load_word_tokenizer(str(encoders[architecture]))(TEXTS, padding=True, return_tensors="pt"))
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    stack = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    ran = []
    for number, layer in enumerate(stack):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    for layers in ([2], [0], [1, 3], [-2], [3, 1, 1], [-1], [4, 1]):
        ran.clear()
        hidden = LayerReader(model, layers)(**inputs)
        assert torch.equal(hidden, torch.cat([states[layer] for layer in layers], dim=-1))
        assert ran == list(range(max(layer % 5 for layer in layers)))


def test_bf16_is_near_float32(encoders):
    sentences = [split_words(text) for text in TEXTS]
    settings = [settings_for(encoders["bert"], precision=name) for name in ("float32", "bf16")]
    vectors = [load_teacher(part)(sentences)[0] for part in settings]
    assert 1e-5 < np.abs(vectors[0] - vectors[1]).max() < 0.1
    assert (vectors[0] * vectors[1]).sum(1).min() > 0.98


def test_batches_hold_every_row_once_in_few_shapes():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 131, 3000).tolist()
    batches = list(length_sorted_batches(lengths, 1024, limit=130))
    assert sorted(row for rows, _ in batches for row in rows) == list(range(3000))
    assert len({shape for _, shape in batches}) <= 9
    for rows, (height, width) in batches:
        assert len(rows) <= height and max(lengths[row] for row in rows) <= width <= 130
        assert width % 16 == 0 or width == 130
    assert all(len(rows) == height for rows, (height, _) in batches[:-1])
    filled = sum(lengths) / sum(height * width for _, (height, width) in batches)
    assert filled > 0.88


def test_close_batches_hardly_pad():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(27, 10, 8000), 5, 128).astype(int)  # a shard of Wikipedia has such ones
    batches = list(close_batches(lengths, 4096, padding=48))
    assert sorted(row for rows, _ in batches for row in rows) == list(range(8000))
    longest = [width for _, (_, width) in batches]
    assert longest == sorted(longest, reverse=True)
    for rows, (height, width) in batches:
        assert len(rows) == height and max(lengths[row] for row in rows) == width
        assert height * width <= 4096 and height * width - sum(lengths[row] for row in rows) <= 48
    assert sum(lengths) / sum(height * width for _, (height, width) in batches) > 0.98
    assert len(batches) < 1.5 * sum(lengths) / 4096 + 60
    longer_than_a_batch = [rows.tolist() for rows, _ in close_batches([200, 3], 100, 48)]
    assert longer_than_a_batch == [[0], [1]]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_padding_and_masks_are_used_only_where_needed(encoders, precision):
    sentences = [split_words(text) for text in TEXTS * 3]
    encoder = load_teacher(settings_for(encoders["bert"], precision=precision, batch_tokens=96))
    seen, reader = [], encoder.reader
    encoder.reader = lambda **inputs: seen.append(inputs) or reader(**inputs)
    slots = np.concatenate([slots for slots, _ in encoder.batches(sentences)])
    assert len(set(slots.tolist())) == len(slots)  # rows that fill up a batch give no words
    shapes = [tuple(inputs["input_ids"].shape) for inputs in seen]
    padded = [bool((inputs["input_ids"] == encoder.tokenizer.pad_token_id).any()) for inputs in seen]
    assert [("attention_mask" in inputs) for inputs in seen] == padded and True in padded
    if precision == "bf16":
        assert all(length % 16 == 0 for _, length in shapes) and len(set(shapes)) <= 4
    else:
        assert False in padded
        assert all(not (i["input_ids"] == encoder.tokenizer.pad_token_id).all(0).any() for i in seen)


@pytest.mark.parametrize("own_class", [True, False])
def test_byte_level_words_are_read_with_a_space_before_them(tmp_path, own_class):
    """Wherever a word stands, also at the beginning; by a tokenizer as published, on single words."""
    published = make_tokenizer(byte_level=True)  # transformers' generic class, as ModernBERT's is
    published.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if own_class:
        model = json.loads(published.backend_tokenizer.to_str())["model"]
        published = RobertaTokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]])
    published.save_pretrained(tmp_path)
    words = ["Monday", *(word for text in TEXTS for word in split_words(text))]
    row = load_word_tokenizer(str(tmp_path))(words, is_split_into_words=True)
    for number, word in enumerate(words):
        ids = [i for i, owner in zip(row["input_ids"], row.word_ids(), strict=True) if owner == number]
        assert ids == published(" " + word, add_special_tokens=False)["input_ids"]
        assert number or ids != published(word, add_special_tokens=False)["input_ids"]


def test_sentences_keep_every_word_and_its_offset():
    rng = np.random.default_rng(0)
    alphabet = list(" .!?\n\u200b\u0301aB東。'\"()-1,🙂\t\u3000")
    texts = ["".join(rng.choice(alphabet, rng.integers(0, 40))) for _ in range(2000)]
    for text in [*TEXTS, *texts, "One. Two.\n\nThree"]:
        sentences = list(split_sentences(text, max_words=4))
        assert [word for sentence in sentences for word in sentence.words] == split_words(text)
        for sentence in sentences:
            assert 0 < len(sentence.words) <= 4
            for word, start in zip(sentence.words, sentence.starts, strict=True):
                assert text[start : start + len(word)] == word


def test_sentences_do_not_end_at_abbreviations_or_numbers():
    text = "Dr. Noor paid 3.50 at 7.30 a.m. in St. Ives, i.e. early. Was it e.g. Monday? “No.” Ada left."
    assert [sentence.words[0] for sentence in split_sentences(text, 100)] == ["Dr", "Was", "“", "Ada"]


def test_a_teacher_without_hidden_states_is_refused(tmp_path):
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="type 't5' gives no hidden states .* choose an encoder such as BERT"):
        load_teacher(settings_for(tmp_path))
