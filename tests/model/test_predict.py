"""Every way to predict gives what a plain forward pass of one text with one app gives."""

import itertools
import unicodedata

import numpy as np
import pytest
import torch
from conftest import assert_close
from transformers import AutoTokenizer

from modeling_mtpf import AdapterError, AdapterHead, LoraSettings
from modeling_mtpf.model.results_mtpf import TagScheme
from modeling_mtpf.model.texts_mtpf import TextTokenizer

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
APPS = {
    "names": (LoraSettings(r=4), "token-classification", LABELS, 24),
    "places": (LoraSettings(r=2, alpha=3, layers=3), "token-classification", LABELS[::-1], 40),
    "topic": (LoraSettings(layers=1), "text-classification", ["a", "b", "c"], 24),
    "mood": (LoraSettings(r=4), "text-classification", ["good", "bad"], 40),
}
TEXTS = [
    "Ada met Noor in London.",
    "",
    "  🙂 café\u00a0東京!\n\tHi  ",
    "e\u0301clair don't",
    "Monday",
    "Noor's train leaves at 7:30pm from gate 12, don't be late!" * 3,
    "can you remind me to buy 3 tickets " * 9,
    "Hi",
    "Ada met Noor in London.",
]


@pytest.fixture
def apps(load, encoders):
    """A model with four apps that differ in depth, kind, rank and longest input, and its tokenizer."""

    def build(architecture="bert", **kwargs):
        model = load(architecture, {name: app[0] for name, app in APPS.items()}, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(encoders[architecture])
        for seed, (name, (_, kind, labels, limit)) in enumerate(APPS.items()):
            torch.manual_seed(seed)
            model.heads[name] = AdapterHead(kind, labels, 32, limit).eval()
            head, inputs = model.heads[name], tokenizer(TEXTS, padding=True, return_tensors="pt")
            with torch.no_grad():  # centred and steep, so that all labels occur
                head.weight.normal_(0, 3)
                states = model.encode_adapters([name], **inputs)[name][inputs["attention_mask"].bool()]
                head.bias.copy_(-head.weight @ states.mean(0))
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return model, tokenizer

    return build


def plain(model, tokenizer, text, name):
    """One app on one text: windows by the tokenizer, stock forward passes, labels word by word."""
    head = model.heads[name]
    encoding = tokenizer(
        text,
        truncation=True,
        max_length=head.max_length,
        stride=int(head.max_length * 0.25),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows = []
    for row, ids in enumerate(encoding["input_ids"]):
        with torch.no_grad(), model.use_adapter(name):
            hidden = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long())[0][0]
            windows.append((row, len(ids), hidden))
    if head.kind == "text-classification":
        scores = [head(hidden.mean(0)).softmax(-1) * size for _, size, hidden in windows]
        mean = sum(scores) / sum(size for _, size, _ in windows)
        return {"label": head.labels[mean.argmax()], "score": float(mean.max())}
    words: dict[int, list] = {}
    for row, size, hidden in windows:
        scores, ids = head(hidden).softmax(-1), encoding.word_ids(row)
        for index, word in enumerate(ids):
            if word is None:
                continue
            start, end = encoding["offset_mapping"][row][index]
            left = index if row else 10**6  # nothing is missing before the text begins or after it ends
            right = size - 1 - index if row + 1 < len(windows) else 10**6
            entry = words.setdefault(word, [start, end, -1, None])
            if start < entry[0]:
                entry[2] = -1
            entry[0], entry[1] = min(entry[0], start), max(entry[1], end)
            if start == entry[0] and (index == 1 or ids[index - 1] != word) and min(left, right) > entry[2]:
                entry[2], entry[3] = min(left, right), scores[index]
    trimmed = [[end - len(text[start:end].lstrip()), end, *rest] for start, end, *rest in words.values()]
    real = sorted((word for word in trimmed if has_label(text[word[0] : word[1]])), key=lambda word: word[0])
    spans: list[dict] = []
    tags = best_tags([scores.log().tolist() for *_, scores in real], head.labels)
    for (start, end, _, scores), label in zip(real, tags, strict=True):
        tag, _, group = label.partition("-")
        probability = float(scores[head.labels.index(label)])
        if tag == "I":
            assert spans[-1]["entity_group"] == group
            spans[-1]["end"] = end
            spans[-1]["scores"].append(probability)
        elif tag == "B":
            spans.append({"entity_group": group, "start": start, "end": end, "scores": [probability]})
    return [
        {
            "entity_group": span["entity_group"],
            "score": sum(span["scores"]) / len(span["scores"]),
            "word": text[span["start"] : span["end"]],
            "start": span["start"],
            "end": span["end"],
        }
        for span in spans
    ]


def has_label(word):
    """Say whether a word gets one: not an empty one, and no emoji without a letter or digit."""
    emoji = any(unicodedata.category(character) == "So" for character in word)
    return bool(word) and (not emoji or any(map(str.isalnum, word)))


def best_tags(scores, labels):
    """The IOB2 tags with the highest sum of scores, from the best path to each label of the word before."""
    paths = [(0.0, [])]
    for row in scores:
        paths = [
            max(
                (total + score, [*path, label])
                for total, path in paths
                if label[0] != "I" or (path and path[-1] in (label, "B" + label[1:]))
            )
            for label, score in zip(labels, row, strict=True)
            if label[0] != "I" or any(path and path[-1] in (label, "B" + label[1:]) for _, path in paths)
        ]
    return max(paths)[1]


def test_the_decoder_finds_the_best_of_all_valid_sequences():
    generator = np.random.default_rng(0)
    labels = ["I-LOC", "B-PER", "O", "B-LOC", "I-PER", "I-ORG"]  # no B-ORG: I-ORG may open an entity
    scheme = TagScheme(labels)

    def valid(path):
        names = [labels[number] for number in path]
        return all(
            tag[0] != "I" or tag == "I-ORG" or before in (tag, "B" + tag[1:])
            for before, tag in zip(["O", *names], names, strict=False)
        )

    repaired = 0
    for _ in range(60):
        scores = generator.normal(size=(generator.integers(1, 5), len(labels))).astype(np.float32)
        paths = [path for path in itertools.product(range(len(labels)), repeat=len(scores)) if valid(path)]
        best = max(paths, key=lambda path: sum(scores[i, label] for i, label in enumerate(path)))
        assert scheme.decode(scores).tolist() == list(best)
        repaired += list(best) != scores.argmax(1).tolist()
    assert 10 < repaired < 60


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "modernbert"])
def test_single_several_and_mixed_apps_equal_plain_passes(apps, architecture):
    model, tokenizer = apps(architecture)
    expected = {name: [plain(model, tokenizer, text, name) for text in TEXTS] for name in APPS}
    assert sum(map(len, expected["names"])) > 5 and len({r["label"] for r in expected["mood"]}) > 1
    for name in APPS:
        assert_close(model.predict(TEXTS, adapters=[name])[name], expected[name])
    several = model.predict(TEXTS, adapters=list(APPS), batch_tokens=64)
    names = [list(APPS)[number % 4] for number in range(len(TEXTS))]
    mixed = model.predict(TEXTS, adapter_names=names)
    stream = list(model.predict_stream(iter(TEXTS), list(APPS), portion=2))
    for row, name in enumerate(names):
        assert_close(mixed[row], expected[name][row])
    for name in APPS:
        assert_close(several[name], expected[name])
        assert_close([row[name] for row in stream], expected[name])


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_results_are_shaped_like_pipelines_and_offsets_are_exact(apps, architecture):
    model, _ = apps(architecture)
    results = model.predict(TEXTS, adapters=["names", "topic"])
    assert list(results) == ["names", "topic"] and all(len(rows) == len(TEXTS) for rows in results.values())
    for text, spans in zip(TEXTS, results["names"], strict=True):
        for span in spans:
            assert set(span) == {"entity_group", "score", "word", "start", "end"}
            assert text[span["start"] : span["end"]] == span["word"] != ""
            assert span["word"] == span["word"].strip()
            assert span["entity_group"] in ("PER", "LOC") and 0 < span["score"] <= 1
        assert all(a["end"] <= b["start"] for a, b in zip(spans, spans[1:], strict=False))
    assert any(results["names"]) and all(set(r) == {"label", "score"} for r in results["topic"])


def test_long_texts_are_read_in_windows_and_nothing_is_dropped(apps):
    model, _ = apps()
    with torch.no_grad():  # every word becomes an entity of its own
        model.heads["names"].weight.zero_()
        model.heads["names"].bias.copy_(torch.tensor([0.0, 5.0, 0, 0, 0]))
    text = " ".join(["Ada met Noor in London on Monday"] * 30)
    spans = model.predict(text, adapters=["names", "topic"])["names"][0]
    assert [span["word"] for span in spans] == text.split()
    model.heads["topic"].max_length = 4000  # longer than what the encoder reads
    assert len(model.predict(text, adapters=["topic"])["topic"]) == 1


def test_inputs_of_every_kind_give_the_same(apps, tmp_path):
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    model, _ = apps()
    expected = model.predict(TEXTS, adapters=["names"])
    table = {"text": TEXTS, "number": list(range(len(TEXTS)))}
    data = datasets.Dataset.from_dict(table)
    for texts in (
        tuple(TEXTS),
        (text for text in TEXTS),
        np.array(TEXTS, dtype=object),
        pandas.Series(TEXTS),
        data,
        data["text"],
        data.to_iterable_dataset(),
        [{"text": text} for text in TEXTS],
        pandas.DataFrame(table),
    ):
        assert_close(model.predict(texts, adapters=["names"])["names"], expected["names"])
    renamed = data.rename_column("text", "body")
    assert_close(model.predict(renamed, adapters=["names"], column="body")["names"], expected["names"])
    with pytest.raises(ValueError, match="no column 'text'; choose one with column=: body, number"):
        model.predict(renamed, adapters=["names"])
    assert_close(model.predict(TEXTS[0], adapters=["names"])["names"], expected["names"][:1])
    assert_close(model.predict(TEXTS[0], adapter_names=["names"]), expected["names"][:1])
    assert model.predict([], adapters=["names"]) == {"names": []}
    assert model.predict([], adapter_names=[]) == [] and model.predict("a", adapters=[]) == {}


def test_a_stream_reads_no_further_than_its_portion(apps):
    model, _ = apps()
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield f"Ada met Noor {len(taken)} times"

    stream = model.predict_stream(endless(), ["names"], portion=8)
    for number in range(20):
        next(stream)
        assert len(taken) <= 8 * (number // 8 + 1)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_never_acts_and_the_mode_is_kept(apps, training):
    model, tokenizer = apps()
    expected = model.predict(TEXTS, adapters=list(APPS))
    model.train(training)
    model.backbone.embeddings.train(not training)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, results in model.predict(TEXTS, adapters=list(APPS)).items():
        assert results == expected[name]
    assert modes == {name: module.training for name, module in model.named_modules()}


def test_a_threshold_leaves_out_what_has_a_lower_score(apps):
    model, _ = apps()
    everything = model.predict(TEXTS, adapters=list(APPS), top_k=None)
    best = model.predict(TEXTS, adapters=list(APPS))
    scores = sorted(row["score"] for name in APPS for rows in everything[name] for row in rows)
    for threshold in (0.0, scores[len(scores) // 2], scores[-1], 1.0):
        several = model.predict(TEXTS, adapters=list(APPS), top_k=None, threshold=threshold)
        single = model.predict(TEXTS, adapters=list(APPS), threshold=threshold)
        for name, (_, kind, *_) in APPS.items():
            left = [[row for row in rows if row["score"] >= threshold] for rows in everything[name]]
            assert several[name] == left
            if kind == "text-classification":
                left = [row if row["score"] >= threshold else row | {"label": None} for row in best[name]]
            assert single[name] == left


def test_mistakes_are_named_and_the_model_stays_usable(apps, load):
    model, _ = apps()
    before = model.predict(TEXTS, adapters=list(APPS))
    for texts, error, message in (
        (["a", None], TypeError, "Text 1 is NoneType, not a string"),
        (["a", b"b"], TypeError, "Text 1 is bytes, not a string; decode it"),
        (b"a", TypeError, "texts is bytes"),
        (5, TypeError, "texts is int"),
        ({"text": ["a"]}, TypeError, "texts is dict"),
        (["a", float("nan")], TypeError, "Text 1 is float"),
        ([["a"]], TypeError, "Text 0 is list"),
        ([{"body": "a"}], ValueError, "Row 0 has no 'text'; choose one with column=: body"),
        (["a", "x" * 5_000_000], ValueError, "Text 1 has 5,000,000 characters; at most 1,000,000"),
    ):
        with pytest.raises(error, match=message):
            model.predict(texts, adapters=["names"])
    for arguments, error, message in (
        ({"adapters": ["date"]}, AdapterError, "no adapter 'date'; loaded: names, places, topic, mood"),
        ({"adapters": [None]}, AdapterError, "no adapter None"),
        ({"adapters": "names"}, TypeError, r"adapters is 'names'; give a list of names"),
        ({"adapter_names": "names"}, TypeError, "adapter_names is 'names'"),
        ({"adapter_names": ["names"]}, ValueError, "adapter_names has 1 names, but there are more texts"),
        ({"adapter_names": ["names"] * 3}, ValueError, "more names than the 2 texts"),
        ({"adapter_names": ["names", "date"]}, AdapterError, "no adapter 'date'"),
        ({}, TypeError, "either adapters=.*or adapter_names="),
        ({"adapters": ["names"], "adapter_names": ["names"] * 2}, TypeError, "either"),
        ({"adapters": ["names"], "batch_tokens": 0}, ValueError, "batch_tokens is 0"),
        ({"adapters": ["names"], "threshold": 1.1}, ValueError, "threshold is 1.1; it must be a number from"),
        ({"adapters": ["names"], "threshold": float("nan")}, ValueError, "threshold is nan"),
        ({"adapters": ["names"], "threshold": "0.5"}, ValueError, "threshold is '0.5'"),
    ):
        with pytest.raises(error, match=message):
            model.predict(["a", "b"], **arguments)
    model.add_adapter("ner-tpl")
    with pytest.raises(AdapterError, match="'ner-tpl' has no head"):
        model.predict("a", adapters=["ner-tpl"])
    model.delete_adapter("ner-tpl")
    model.heads["topic"].max_length = 2
    with pytest.raises(ValueError, match="max_length of 2 has no room next to 2 special tokens"):
        model.predict("a", adapters=["topic"])
    model.heads["topic"].max_length = 24
    with pytest.raises(AdapterError, match="no adapter 'late'"):
        model.predict_stream(["a"], ["late"])  # at the call, not at the first result
    assert model.predict(TEXTS, adapters=list(APPS)) == before


def test_windows_cover_a_text_and_each_word_has_one_owner(encoders):
    tokenizer = TextTokenizer(AutoTokenizer.from_pretrained(encoders["bert"]))
    for limit in (3, 4, 7, 16, 40):
        for size in (*range(60), 500):
            windows = tokenizer.windows(0, size, limit)
            owned = [index for w in windows for index in range(w.label_start, w.label_stop)]
            assert owned == list(range(size))
            for window in windows:
                assert window.start <= window.label_start <= window.label_stop <= window.stop
                assert window.stop - window.start <= limit - 2
            for left, right in zip(windows, windows[1:], strict=False):
                overlap = left.stop - right.start
                assert 0 <= overlap == int(limit * 0.25)
                # The owner shows at least as much of the surroundings as the other window.
                for index in range(right.start, left.stop):
                    owner_is_left = index < left.label_stop
                    assert owner_is_left == (left.stop - 1 - index >= index - right.start) or (
                        left.stop - 1 - index == index - right.start
                    )
