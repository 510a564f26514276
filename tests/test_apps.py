"""Fitting apps on the frozen backbone."""

import numpy as np
import pytest
import torch
from modeling_mtpf.adaptation.text_app import embed_texts, fit_text_app
from modeling_mtpf.adaptation.token_app import TokenAppSettings, find_labels, fit_token_app, tag_words
from modeling_mtpf.evaluation.entities import entity_f1
from sklearn.linear_model import LogisticRegression

from modeling_mtpf.adapter_files_mtpf import backbone_sha256
from modeling_mtpf.data.words import load_word_tokenizer
from modeling_mtpf.errors import DataError, MissingExtraError, require_extra
from modeling_mtpf.modeling_mtpf import mean_pool

NAMES, PLACES = ["Ada", "Noor", "Grace", "Alan"], ["London", "Paris", "Rome"]
TOKENS = [[name, "is", "in", place, "."] for name in NAMES for place in PLACES]
TAGS = [["B-PER", "O", "O", "B-LOC", "O"] for _ in TOKENS]


@pytest.fixture
def setting(load, encoders):
    return load("bert", {"ner": None, "tc": None}), load_word_tokenizer(str(encoders["bert"]))


@pytest.mark.parametrize("start_from", ["ner", None])
def test_a_token_app_learns_and_leaves_everything_else_alone(setting, tmp_path, start_from, load):
    model, tokenizer = setting
    model.requires_grad_(True)
    digest, before = backbone_sha256(model.backbone), {n: p.clone() for n, p in model.named_parameters()}
    settings = TokenAppSettings(epochs=60, batch_size=4, learning_rate=3e-3)
    first = fit_token_app(model, tokenizer, "short", TOKENS, TAGS, settings=TokenAppSettings(epochs=1))
    loss = fit_token_app(model, tokenizer, "people", TOKENS, TAGS, start_from=start_from, settings=settings)
    assert loss < first / 3
    assert entity_f1(TAGS, tag_words(model, tokenizer, "people", TOKENS)) > 0.9
    assert backbone_sha256(model.backbone) == digest
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], value) for n, value in before.items())
    assert all(p.grad is None for p in model.parameters())
    assert model.heads["people"].labels == ["B-PER", "O", "B-LOC"]
    model.save_adapter(tmp_path, "people")
    again = load("bert")
    again.load_adapter(tmp_path)
    assert tag_words(again, tokenizer, "people", TOKENS) == tag_words(model, tokenizer, "people", TOKENS)


def test_an_app_starts_as_a_copy_of_the_family(setting, batch):
    model, tokenizer = setting
    settings = TokenAppSettings(epochs=1, learning_rate=0.0)
    fit_token_app(model, tokenizer, "people", TOKENS, TAGS, start_from="ner", settings=settings)
    with torch.no_grad():
        states = model.encode_adapters(["ner", "people"], **batch("bert"))
    assert torch.equal(states["ner"], states["people"])


@pytest.mark.parametrize("num_labels", [2, 3])
def test_a_text_app_is_sklearns_probe(setting, num_labels):
    model, tokenizer = setting
    texts = [" ".join(words) for words in TOKENS]
    labels = [f"label {i % num_labels}" for i in range(len(texts))]
    fit_text_app(model, tokenizer, "topic", texts, labels, start_from="tc")
    vectors = embed_texts(model, tokenizer, texts, "tc")
    probe = LogisticRegression(max_iter=1000).fit(vectors, labels)
    with torch.no_grad():
        found = model.heads["topic"](torch.from_numpy(vectors)).softmax(-1).numpy()
    assert model.heads["topic"].labels == sorted(set(labels)) == list(probe.classes_)
    np.testing.assert_allclose(found, probe.predict_proba(vectors), atol=2e-3)
    predicted = model.predict(texts, adapters=["topic"], tokenizer=tokenizer)["topic"]
    assert [row["label"] for row in predicted] == probe.predict(vectors).tolist()


def test_embeddings_equal_one_text_at_a_time(setting):
    model, tokenizer = setting
    texts = ["Ada", "Noor is in London.", "", "a much longer text about Grace and Alan in Rome " * 3]
    found = embed_texts(model, tokenizer, texts, "tc", batch_size=2)
    for text, vector in zip(texts, found, strict=True):
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=128)
        with torch.no_grad(), model.use_adapter("tc"):
            expected = mean_pool(model(**inputs)[0], inputs["attention_mask"])[0]
        np.testing.assert_allclose(vector, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "tags, message",
    [([["O", "O"]], "no entity label"), ([["PER"]], "'PER' is not IOB2"), ([["S-PER"]], "not IOB2")],
)
def test_labels_absent_or_of_another_scheme(tags, message):
    with pytest.raises(DataError, match=message):
        find_labels(tags)


def test_mistakes_name_the_row_and_the_remedy(setting):
    model, tokenizer = setting
    with pytest.raises(DataError, match="Row 2 has 5 tokens but 1 tags"):
        fit_token_app(model, tokenizer, "people", TOKENS[:2], [TAGS[0], ["O"]])
    with pytest.raises(DataError, match="at least two labels"):
        fit_text_app(model, tokenizer, "topic", ["a", "b"], ["x", "x"], start_from="tc")
    assert model.adapters == ["ner", "tc"]


def test_strict_entity_scores():
    """Both traps of seqeval: lenient by default, and strict without a scheme."""
    gold = [["B-PER", "I-PER", "O", "B-LOC"]]
    assert entity_f1(gold, gold) == 1.0
    assert entity_f1(gold, [["B-PER", "O", "O", "B-LOC"]]) == 0.5  # a border is wrong
    assert entity_f1(gold, [["I-PER", "I-PER", "O", "B-LOC"]]) == pytest.approx(2 / 3)  # not an entity at all
    assert entity_f1(gold, [["O"] * 4]) == 0.0


def test_a_missing_extra_names_the_installation():
    with pytest.raises(
        MissingExtraError, match=r"'no_such_module'; install it with: pip install 'mtpf\[train\]'"
    ):
        require_extra("train", "json", "no_such_module")
