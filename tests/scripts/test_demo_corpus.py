"""The demo corpus is reproducible, its parts are disjoint, and its tags are exact."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from train.demo import corpus as demo
from train.demo import vocabulary

FINGERPRINT = """
import hashlib, json, sys
from dataclasses import asdict
sys.path.insert(0, sys.argv[1])
from train.demo.corpus import demo_corpus
print(hashlib.sha256(json.dumps(asdict(demo_corpus(seed=3, scale=0.1))).encode()).hexdigest())
"""
APP_TYPES = {"PERSON", "PLACE", "DATE", "TIME", "PRODUCT", "MONEY"}
# Kinds whose words occur in messages unchanged; brands, models and halves of place names occur in pairs only.
WHOLE = {"first_name", "city", "venue", "hotel", "shop", "org", "item", "dish", "grocery", "media"}
CLOSED = set("today tomorrow tmrw tonight yesterday noon midnight o'clock dollars bucks euros eur".split())
CLOSED |= {word.lower() for word in demo._WEEKDAYS + demo._MONTHS}


split_block = demo._split_templates


@pytest.fixture(scope="module")
def corpus():
    return demo.demo_corpus()


@pytest.fixture(scope="module")
def pretraining_texts(corpus):
    pairs = [text for rows in corpus.pairs.values() for row in rows for text in row.values()]
    return corpus.texts + pairs


@pytest.fixture(scope="module")
def app_texts(corpus):
    """The texts of each app and split; a tagged message by its tokens."""
    texts = {
        ("ner", split): [" ".join(row["tokens"]) for row in rows] for split, rows in corpus.ner_app.items()
    }
    return texts | {("tc", split): [row["text"] for row in rows] for split, rows in corpus.tc_app.items()}


def words_of(part):
    return {kind: values.split("|") for kind, values in part.items()}


def entities(rows):
    """The entities of tagged rows, as (type, lower-case text); fails on tags that are not IOB2."""
    found = []
    for row in rows:
        assert len(row["tokens"]) == len(row["ner_tags"]) > 0
        before = "O"
        for token, tag in zip(row["tokens"], row["ner_tags"], strict=True):
            assert token and not re.search(r"\s", token)
            if tag.startswith("B-"):
                found.append((tag[2:], token.lower()))
            elif tag != "O":
                assert tag.startswith("I-") and before[2:] == tag[2:], f"{before} before {tag}"
                found[-1] = (tag[2:], f"{found[-1][1]} {token.lower()}")
            before = tag
    return found


def scene_templates():
    return [line for scene in demo._scenes() for line in scene.messages + scene.replies + scene.titles]


def app_templates():
    blocks = [vocabulary.NER_APP_TEMPLATES, *vocabulary.TC_APP_TEMPLATES.values()]
    return [template for block in blocks for template in split_block(block)]


def test_sizes(corpus):
    assert (len(corpus.texts), len(corpus.gold)) == (4000, 1000)
    assert {source: len(rows) for source, rows in corpus.pairs.items()} == {
        "message_reply": 2000,
        "paraphrase": 2000,
        "title_body": 2000,
    }
    for app in (corpus.ner_app, corpus.tc_app):
        assert {split: len(rows) for split, rows in app.items()} == {
            "train": 400,
            "validation": 100,
            "test": 200,
        }


def test_scale_and_seed(corpus):
    small = demo.demo_corpus(scale=0.02)
    assert (len(small.texts), len(small.gold), len(small.pairs["paraphrase"])) == (80, 20, 40)
    assert {len(rows) for rows in small.ner_app.values()} == {8}
    assert small.texts == corpus.texts[:80]
    assert not set(demo.demo_corpus(seed=1, scale=0.02).texts) & set(small.texts)
    with pytest.raises(ValueError, match="positive"):
        demo.demo_corpus(scale=0)


def test_templates_that_run_out_are_reported():
    message = demo.render("Hello.", {})
    with pytest.raises(ValueError, match="1 distinct rows here, not 2"):
        demo._collect(lambda: [message], 2, set())


def test_same_corpus_in_a_fresh_process():
    here = hashlib.sha256(json.dumps(asdict(demo.demo_corpus(seed=3, scale=0.1))).encode()).hexdigest()
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    fresh = subprocess.run(
        [sys.executable, "-c", FINGERPRINT, str(Path(demo.__file__).parents[2])],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert fresh.stdout.strip() == here


def test_texts_are_unique_messages(corpus):
    assert len({demo._key(text) for text in corpus.texts}) == len(corpus.texts)
    lengths = [len(text.split()) for text in corpus.texts]
    assert sum(4 <= length <= 20 for length in lengths) > 0.9 * len(lengths)
    assert not any(re.search(r"[{}|]|  ", text) for text in corpus.texts)


def test_gold_tags_the_first_texts(corpus):
    for text, row in zip(corpus.texts, corpus.gold, strict=False):
        assert "".join(row["tokens"]) == text.replace(" ", "")
    assert {kind for kind, _ in entities(corpus.gold)} == set(demo.ENTITY_TYPES.values())


@pytest.mark.parametrize("split", demo.APP_SPLITS)
def test_ner_app(corpus, split):
    counts = Counter(kind for kind, _ in entities(corpus.ner_app[split]))
    assert set(counts) == APP_TYPES
    assert min(counts.values()) > 0.2 * max(counts.values())


@pytest.mark.parametrize("split", demo.APP_SPLITS)
def test_tc_app_is_balanced(corpus, split):
    counts = Counter(row["label"] for row in corpus.tc_app[split])
    assert set(counts) == set(vocabulary.TC_APP_TEMPLATES)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_pairs(corpus):
    for rows in corpus.pairs.values():
        keys = [demo._key(text) for row in rows for text in row.values()]
        assert len(set(keys)) == len(keys) == 3 * len(rows)


def test_names_do_not_tell_a_positive_from_a_negative():
    """Negatives have the anchor's names and times, and half of the paraphrases have all but one of their own."""
    words, rng = demo._lists(vocabulary.PRETRAIN_WORDS), random.Random(0)
    for source in demo._SOURCES:
        rows = [
            [set(entities([vars(message)])) for message in demo._pair(source, words, rng)] for _ in range(300)
        ]
        assert sum(bool(anchor & negative) for anchor, _, negative in rows) > 0.7 * len(rows)
        if source == "paraphrase":
            assert 0.3 < sum(anchor == positive for anchor, positive, _ in rows) / len(rows) < 0.8


def test_scenes_hold_together():
    """Ways to say a thing carry the same details, and every reply and subject line carries one of them."""
    for scene in demo._scenes():
        details = {tuple(demo._slot_names(message)) for message in scene.messages}
        assert len(details) == 1 and len(scene.messages) > 2, scene.messages
        for line in scene.replies + scene.titles:
            assert set(demo._slot_names(line)) & set(*details), line
        assert scene.replies and scene.titles


def test_parts_share_no_name():
    common = {"the", "and", "of", "in", "a"}
    pretraining, app = (
        {word.lower() for values in words_of(part).values() for value in values for word in value.split()}
        for part in (vocabulary.PRETRAIN_WORDS, vocabulary.APP_WORDS)
    )
    shared = (pretraining & app) - common
    assert not shared


def test_parts_share_no_open_class_entity(corpus):
    open_class = {"PERSON", "PLACE", "PRODUCT"}
    gold = {text for _, text in entities(corpus.gold)}
    app = {text for rows in corpus.ner_app.values() for kind, text in entities(rows) if kind in open_class}
    assert len(app) > 300
    # A few names of the app are also months and weekdays, which both parts use as dates.
    assert not (gold & app) - CLOSED


def test_parts_share_no_template():
    def bare(template):
        return demo._key(re.sub(r"\{\w+\}", "0", template))

    openers = [*vocabulary.APP_OPENERS.split("|"), *vocabulary.TC_OPENERS.split("|")]
    closers = ["", *vocabulary.APP_CLOSERS.split("|")]
    pretraining = {bare(template) for template in scene_templates()}
    for template in app_templates():
        for dressed in [template, *(opener + template for opener in openers)]:
            assert not pretraining & {bare(f"{dressed} {closer}") for closer in closers}, template
    assert len(set(map(bare, app_templates()))) == len(app_templates())


def test_parts_share_no_delexicalised_text(pretraining_texts, app_texts):
    """Independent of the templates: names, dates and numbers are masked in the texts themselves."""
    values = {value for part in (vocabulary.PRETRAIN_WORDS, vocabulary.APP_WORDS) for value in part.values()}
    names = CLOSED | {name.lower() for value in values for name in value.split("|")}
    mask = re.compile(
        r"\b(" + "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) + r")\b"
    )

    def bare(text):
        return demo._key(re.sub(r"\d+", "0", mask.sub("0", text.lower())))

    app = {bare(text) for texts in app_texts.values() for text in texts}
    assert not app & {bare(text) for text in pretraining_texts}


def test_no_text_is_in_two_places(pretraining_texts, app_texts):
    keys = [demo._key(text) for texts in app_texts.values() for text in texts]
    assert len(set(keys)) == len(keys)
    assert not set(keys) & {demo._key(text) for text in pretraining_texts}


def test_training_split_leaves_names_for_the_test(corpus):
    train, test = (set(entities(corpus.ner_app[split])) for split in ("train", "test"))
    for kind, entity in (("item", "PRODUCT"), ("city", "PLACE"), ("venue", "PLACE")):
        held_out = {(entity, name.lower()) for name in words_of(vocabulary.APP_WORDS)[kind][3::4]}
        assert not held_out & train
        assert held_out & test


def test_training_split_leaves_templates_for_the_test(corpus):
    held_out = [
        template for block in vocabulary.TC_APP_TEMPLATES.values() for template in split_block(block)[3::4]
    ]
    patterns = [".*".join(map(demo._key, re.split(r"\{\w+\}", template))) for template in held_out]
    matches = {
        split: sum(any(re.search(pattern, demo._key(row["text"])) for pattern in patterns) for row in rows)
        for split, rows in corpus.tc_app.items()
    }
    assert matches["train"] == 0
    assert 0.1 < matches["test"] / 200 < 0.4


def test_literal_text_names_no_entity():
    """A name outside a slot would carry no tag; the few words with two meanings are there on purpose."""
    two_meanings = {"may", "will", "mark", "rose", "grace"}
    for part, templates in (
        (vocabulary.PRETRAIN_WORDS, scene_templates()),
        (vocabulary.APP_WORDS, split_block(vocabulary.NER_APP_TEMPLATES)),
    ):
        names = {name.lower() for kind, values in words_of(part).items() if kind in WHOLE for name in values}
        for template in templates:
            literal = " " + " ".join(demo._TOKEN.findall(re.sub(r"\{\w+\}", "|", template).lower())) + " "
            found = {name for name in names | CLOSED if f" {name} " in literal}
            assert not found - two_meanings, template


def test_render_tags_slots_and_nothing_else():
    slots = {
        "person": "Maya Costa",
        "time": "half past six",
        "money": "$1,299.99",
        "count": "4",
        "email": "m@a.io",
    }
    message = demo.render("{person}'s table for {count}, {time}: {money}, {email}.", slots)
    assert message.text == "Maya Costa's table for 4, half past six: $1,299.99, m@a.io."
    assert list(zip(message.tokens, message.ner_tags, strict=True)) == [
        ("Maya", "B-PERSON"),
        ("Costa", "I-PERSON"),
        ("'s", "O"),
        ("table", "O"),
        ("for", "O"),
        ("4", "O"),
        (",", "O"),
        ("half", "B-TIME"),
        ("past", "I-TIME"),
        ("six", "I-TIME"),
        (":", "O"),
        ("$", "B-MONEY"),
        ("1,299.99", "I-MONEY"),
        (",", "O"),
        ("m@a.io", "B-CONTACT"),
        (".", "O"),
    ]


def test_typing_variation_keeps_the_tags():
    template, slots = "Please tell {person}, you are late.", {"person": "Maya Costa"}
    messages = [demo.render(template, slots, random.Random(seed)) for seed in range(60)]
    assert len({message.text for message in messages}) > 8
    assert {text for _, text in entities([vars(message) for message in messages])} == {"maya costa"}


def test_write_demo(tmp_path, corpus):
    small = demo.demo_corpus(seed=5, scale=0.05)
    for _ in range(2):  # the second run replaces the files of the first
        demo.write_demo(tmp_path, seed=5, scale=0.05)
    files = {
        path.relative_to(tmp_path).as_posix(): [
            json.loads(line) for line in path.read_text("utf-8").splitlines()
        ]
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    expected = {"text.jsonl": [{"text": text} for text in small.texts], "gold.jsonl": small.gold}
    for part in ("pairs", "ner_app", "tc_app"):
        expected |= {f"{part}/{name}.jsonl": rows for name, rows in getattr(small, part).items()}
    assert files == expected
