"""The compositional benchmark: texts that two sets share, and how both answers are scored."""

import numpy as np
import pytest
from conftest import SENTENCES
from datasets import Dataset

from modeling_mtpf.adaptation.scoring import score_app
from modeling_mtpf.data.app_data import AppData, Examples
from modeling_mtpf.data.backbones import open_backbone
from modeling_mtpf.errors import DataError, RecipeError
from modeling_mtpf.evaluation.composition import (
    COMPOSITIONS,
    SPLITS,
    ComposedTask,
    load_composition,
    score_composition,
    text_identity,
)

SLOTS = {
    "train": [
        ("what 's on today", "O O O B-date"),
        ("call Ada now", "O O O"),
        ("call ada now", "O B-person O"),
        ("no intent at all", "O O O O"),
        ("? !", "O O"),
        ("book a table", "O O O"),
    ],
    "validation": [("call ada now", "O B-person O"), ("play some jazz", "O O B-genre")],
    "test": [("wake me at five", "O O O B-time"), ("play that", "O O")],
}
INTENTS = {
    "train": [
        ("What's on, today?", "calendar"),
        ("wake me at FIVE", "alarm"),
        ("Call Ada, now!", "call"),
        ("call ada now", "phone"),
        ("only an intent", "call"),
        ("...", "call"),
        ("play some jazz.", "music"),
        ("play that", "music"),
    ],
    "validation": [("book a table", "booking"), ("play some jazz", "music"), ("play that", "music")],
    "test": [("wake me at five!", "alarm"), ("Play some jazz", "music")],
}


@pytest.fixture
def data(tmp_path):
    """Write both sets of ``massive_hwu64`` and return the folder of the data."""

    def write(slots=SLOTS, intents=INTENTS) -> str:
        for key, rows_of in zip(COMPOSITIONS["massive_hwu64"], (slots, intents), strict=True):
            (tmp_path / key).mkdir(parents=True, exist_ok=True)
            for split, rows in rows_of.items():
                inputs, labels = map(list, zip(*rows, strict=True))
                table = {"text": inputs, "label": labels}
                if rows_of is slots:
                    table = {"tokens": [x.split() for x in inputs], "ner_tags": [x.split() for x in labels]}
                Dataset.from_dict(table).to_parquet(tmp_path / key / f"{split}.parquet")
        return str(tmp_path)

    return write


def rows(task: ComposedTask, split: str) -> list[tuple[str, str, str]]:
    """Return text, tags and intent of each row, and check that both parts have the same texts."""
    slots, intents = getattr(task.slots, split), getattr(task.intents, split)
    assert [" ".join(words) for words in slots.inputs] == intents.inputs
    tags = (" ".join(row) for row in slots.labels)
    return list(zip(intents.inputs, tags, intents.labels, strict=True))


def test_texts_are_matched_by_their_letters_and_the_splits_are_disjoint(data):
    task = load_composition("massive_hwu64", data())
    call = ("call ada now", "O B-person O")  # the most frequent reading
    calendar = ("what 's on today", "O O O B-date", "calendar")
    assert rows(task, "train") == [calendar, (*call, "call"), (*call, "phone")]
    assert rows(task, "validation") == [("book a table", "O O O", "booking"), ("play that", "O O", "music")]
    assert rows(task, "test") == [
        ("wake me at five", "O O O B-time", "alarm"),
        ("play some jazz", "O O B-genre", "music"),
    ]
    assert task.shared == {"train": 6, "validation": 3, "test": 2}
    assert task.counts == {"train": 3, "validation": 2, "test": 2}
    assert task.slots.labels == ["O", "B-date", "I-date", "B-person", "I-person"]
    assert task.intents.labels == ["calendar", "call", "phone"]


def test_a_draw_takes_the_same_rows_of_both_parts_and_keeps_the_fingerprint(data):
    folder = data()
    whole = load_composition("massive_hwu64", folder)
    drawn = {
        seed: load_composition("massive_hwu64", folder, {"train": 2, "test": 9}, seed) for seed in range(9)
    }
    for task in drawn.values():
        assert len(rows(task, "train")) == 2 and rows(task, "test") == rows(whole, "test")
        assert set(rows(task, "train")) <= set(rows(whole, "train"))
        assert (task.counts, task.fingerprint) == (whole.counts, whole.fingerprint)
    assert len({tuple(rows(task, "train")) for task in drawn.values()}) > 1
    other = {**INTENTS, "test": [("wake me at five!", "clock"), ("Play some jazz", "music")]}
    assert load_composition("massive_hwu64", data(intents=other)).fingerprint != whole.fingerprint


def test_mistakes_end_in_one_sentence(data):
    with pytest.raises(RecipeError, match="'massive'; did you mean.*massive_hwu64.*known: snips"):
        load_composition("massive")
    with pytest.raises(DataError, match="ner/hwu64 and tc/massive_intent have no text of the split test"):
        load_composition("massive_hwu64", data(intents={**INTENTS, "test": [("else", "alarm")]}))


@pytest.mark.parametrize("text", ["What 's on ,\ttoday ?", "WHATS ON today", "ｗｈａｔ’s on—today"])
def test_identity_ignores_spaces_punctuation_and_case(text):
    assert text_identity(text) == "whatsontoday"


def test_scores_equal_those_of_each_app(folders):
    """Against `score_app`, which predicts one app, and a count of texts with everything right."""
    model, tokenizer = open_backbone(str(folders / "backbone"))
    for name in ("entities", "intent"):
        model.load_adapter(folders / name, name, activate=False)
    texts = [sentence for sentence in SENTENCES for _ in range(4)]
    answers = model.predict(texts, adapters=["entities", "intent"], tokenizer=tokenizer)
    generator = np.random.default_rng(0)
    tags, intents, whole = [], [], []
    for row, (text, entities, intent) in enumerate(zip(texts, *answers.values(), strict=True)):
        words, right = text.split(), row % 2 > 0
        random = generator.choice(["O", "B-PER"], len(words)).tolist()
        tags.append(random if row % 4 < 2 else ["O"] * len(words))
        intents.append(intent["label"] if right else "intent x")
        starts = np.cumsum([0, *(len(word) + 1 for word in words)])
        gold = {(starts[i], starts[i] + len(words[i])) for i, tag in enumerate(tags[-1]) if tag == "B-PER"}
        whole.append(right and {(entity["start"], entity["end"]) for entity in entities} == gold)
    words = [text.split() for text in texts]
    slots = AppData("ner", [], Examples(), Examples(), Examples(words, tags))
    parts = slots, AppData("tc", [], Examples(), Examples(), Examples(texts, intents))
    task = ComposedTask("made-up", *parts, {}, {}, "")
    scores = score_composition(model, tokenizer, task, "entities", "intent")
    expected = score_app(model, tokenizer, "entities", slots.test)["entity_f1"]
    assert scores == pytest.approx(
        {"entity_f1": expected, "accuracy": 0.5, "frame_accuracy": sum(whole) / len(whole)}
    )
    assert 0 < scores["entity_f1"] and 0 < scores["frame_accuracy"] < 0.5


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, shared, counts",
    [
        ("snips", (13084, 700, 700), (13000, 699, 700)),
        ("massive_hwu64", (4604, 486, 1260), (4594, 486, 1260)),
        ("multidogo_airline", (2760, 407, 399), (2746, 394, 399)),
        ("multidogo_fastfood", (2871, 343, 435), (2845, 328, 435)),
    ],
)
def test_counts_of_the_real_sets(name, shared, counts):
    task = load_composition(name)
    assert tuple(task.shared.values()) == shared and tuple(task.counts.values()) == counts
    texts = [{text_identity(text) for text in getattr(task.intents, split).inputs} for split in SPLITS]
    assert len(set.union(*texts)) == sum(map(len, texts))
