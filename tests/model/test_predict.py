"""Prediction: spans in characters, one label a text, windows, and equality with plain forwards."""

import pytest
import torch
from transformers import AutoTokenizer

from modeling_mtpf import AdapterError, AdapterHead

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


@pytest.fixture
def apps(load, encoders):
    """Two apps with random heads on one backbone, and the tokenizer."""

    def build(architecture="bert", max_length=32):
        model = load(architecture, {"names": None, "topic": None})
        torch.manual_seed(1)
        model.heads["names"] = AdapterHead("token-classification", LABELS, 32, max_length).eval()
        model.heads["topic"] = AdapterHead("text-classification", ["a", "b", "c"], 32, max_length).eval()
        return model, AutoTokenizer.from_pretrained(encoders[architecture])

    return build


TEXTS = ["Ada met Noor in London.", "", "  🙂 café\u00a0東京!\n\tHi  ", "e\u0301clair don't", "Monday"]


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_results_are_shaped_like_pipelines_and_offsets_are_exact(apps, architecture):
    model, _ = apps(architecture)
    results = model.predict(TEXTS, adapters=["names", "topic"])
    assert list(results) == ["names", "topic"] and all(len(rows) == len(TEXTS) for rows in results.values())
    for text, spans in zip(TEXTS, results["names"], strict=True):
        for span in spans:
            assert set(span) == {"entity_group", "score", "word", "start", "end"}
            assert text[span["start"] : span["end"]] == span["word"] == span["word"].strip() != ""
            assert span["entity_group"] in ("PER", "LOC") and 0 < span["score"] <= 1
        assert all(a["end"] <= b["start"] for a, b in zip(spans, spans[1:], strict=False))
    assert any(results["names"]) and all(set(r) == {"label", "score"} for r in results["topic"])


def test_several_apps_together_equal_each_alone(apps):
    model, _ = apps()
    together = model.predict(TEXTS, adapters=["names", "topic"], batch_size=2)
    for name in ("names", "topic"):
        for text, expected in zip(TEXTS, together[name], strict=True):
            assert approximately(model.predict(text, adapters=[name])[name][0], expected)


def approximately(a, b):
    if isinstance(a, list):
        return len(a) == len(b) and all(approximately(x, y) for x, y in zip(a, b, strict=True))
    return all(a[k] == b[k] if k != "score" else a[k] == pytest.approx(b[k], abs=1e-5) for k in a)


def test_labels_equal_a_plain_forward(apps):
    model, tokenizer = apps()
    text = "Ada Lovelace met Charles in London"
    encoding = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    offsets = encoding.pop("offset_mapping")[0].tolist()
    with torch.no_grad(), model.use_adapter("names"):
        best = model.heads["names"](model(**encoding)[0])[0].argmax(-1).tolist()
    tags, words = [], []
    for position, word in enumerate(encoding.word_ids(0)):
        if word is not None and word != encoding.word_ids(0)[position - 1]:
            tags.append(LABELS[best[position]])
            words.append(offsets[position][0])
    spans = model.predict(text, adapters=["names"])["names"][0]
    starts = [
        w for i, (w, t) in enumerate(zip(words, tags, strict=True)) if opens(t, tags[i - 1] if i else "O")
    ]
    assert [span["start"] for span in spans] == starts


def opens(tag: str, before: str) -> bool:
    return tag.startswith("B-") or (tag.startswith("I-") and before[2:] != tag[2:])


def test_long_texts_are_read_in_windows_and_nothing_is_dropped(apps):
    model, tokenizer = apps(max_length=16)
    with torch.no_grad():  # every word becomes an entity of its own
        model.heads["names"].weight.zero_()
        model.heads["names"].bias.copy_(torch.tensor([0.0, 5.0, 0, 0, 0]))
    text = " ".join(["Ada met Noor in London on Monday"] * 30)
    spans = model.predict(text, adapters=["names", "topic"])["names"][0]
    assert [span["word"] for span in spans] == text.split()


def test_an_app_longer_than_the_encoder_reads_in_windows(apps):
    model, _ = apps(max_length=4000)
    assert len(model.predict("Ada met Noor in London. " * 200, adapters=["topic"])["topic"]) == 1


def test_mistakes_are_named(apps, load):
    model, _ = apps()
    with pytest.raises(TypeError, match="Text 1 is NoneType"):
        model.predict(["a", None], adapters=["names"])
    with pytest.raises(AdapterError, match="no adapter 'date'; loaded: names, topic"):
        model.predict("a", adapters=["date"])
    model.add_adapter("ner-tpl")
    with pytest.raises(AdapterError, match="'ner-tpl' has no head"):
        model.predict("a", adapters=["ner-tpl"])
    assert model.predict([], adapters=["names"]) == {"names": []}


def test_the_mode_of_the_model_is_kept(apps):
    model, _ = apps()
    model.train()
    model.backbone.embeddings.eval()
    modes = [module.training for module in model.modules()]
    first = model.predict(TEXTS, adapters=["topic"])
    assert first == model.predict(TEXTS, adapters=["topic"])
    assert [module.training for module in model.modules()] == modes and model.training
