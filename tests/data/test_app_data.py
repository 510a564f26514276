"""The labelled data of apps: every format, tag schemes, splits, and mistakes with their file and line."""

import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from seqeval.scheme import IOB1, IOB2, IOBES, Entities

from modeling_mtpf.adaptation import FitSettings, fit_app
from modeling_mtpf.data.app_data import load_app_data
from modeling_mtpf.data.sources import hub_id
from modeling_mtpf.data.tag_schemes import to_iob2
from modeling_mtpf.data.words import load_word_tokenizer
from modeling_mtpf.errors import DataError

ROWS = [
    {"tokens": ["Call", "Ada", "Lovelace"], "ner_tags": ["O", "B-PER", "I-PER"]},
    {"tokens": ["in", "Rome"], "ner_tags": ["O", "B-LOC"]},
    {"tokens": ["Hi"], "ner_tags": ["O"]},
    {"tokens": ["Rome", "Paris"], "ner_tags": ["B-LOC", "B-LOC"]},
]
TEXTS = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]


def write(folder, kind: str, rows: list[dict], name: str = "train"):
    """Write rows in one of the accepted formats."""
    path = folder / f"{name}.{kind}"
    if kind == "conll":
        sentences = ["\n".join(map(" ".join, zip(r["tokens"], r["ner_tags"], strict=True))) for r in rows]
        path.write_text("-DOCSTART- O\n\n" + "\n\n".join(sentences) + "\n", "utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif kind == "csv":
        Dataset.from_list(rows).to_csv(path)
    return path


@pytest.mark.parametrize("kind", ["conll", "jsonl", "parquet"])
def test_ner_formats_give_the_same_data(tmp_path, kind):
    data = load_app_data(write(tmp_path, kind, ROWS * 5), "ner")
    assert data.labels == ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]  # as they first appear
    assert len(data.train) == 18 and len(data.validation) == 2 and data.held_out
    inputs, labels = data.train.inputs + data.validation.inputs, data.train.labels + data.validation.labels
    assert sorted(zip(inputs, labels, strict=True)) == sorted(
        (row["tokens"], row["ner_tags"]) for row in ROWS * 5
    )
    assert data.notes["scheme"] == "IOB2" and data.notes["source"] == "train"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_text_formats_give_the_same_data(tmp_path, kind):
    data = load_app_data(write(tmp_path, kind, TEXTS), "tc")
    assert data.labels == ["a", "b"] and len(data.train) + len(data.validation) == 20


def test_aliases_and_class_labels_of_hub_sets(tmp_path):
    names = ["O", "B-PER", "I-PER"]
    features = Features({"words": List(Value("string")), "tags": List(ClassLabel(names=names))})
    rows = {"words": [["Ada", "L."], ["Hi"]], "tags": [[1, 2], [0]]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "ner.parquet")
    data = load_app_data(tmp_path / "ner.parquet", "ner")
    assert sorted(data.train.labels + data.validation.labels) == [["B-PER", "I-PER"], ["O"]]
    features = Features({"utterance": Value("string"), "intent": ClassLabel(names=["yes", "no"])})
    rows = {"utterance": ["a", "b", "c"], "intent": [0, 1, 1]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "tc.parquet")
    assert set(load_app_data(tmp_path / "tc.parquet", "tc").labels) == {"yes", "no"}


def test_integers_without_names_need_them(tmp_path):
    rows = [{"tokens": ["Ada"], "ner_tags": [1]}, {"tokens": ["Hi"], "ner_tags": [0]}]
    source = write(tmp_path, "jsonl", rows)
    with pytest.raises(DataError, match=r"line 1: Tag '1' is not of a known scheme"):
        load_app_data(source, "ner")
    assert load_app_data(source, "ner", labels=["O", "B-PER"]).labels == ["O", "B-PER"]


def test_split_files_and_other_sources(tmp_path):
    for name, rows in (("train", TEXTS), ("dev", TEXTS[:4]), ("test", TEXTS[4:7])):
        write(tmp_path, "jsonl", rows, name)
    data = load_app_data(tmp_path, "tc")
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 4, 3) and not data.held_out
    other = load_app_data(tmp_path / "train.jsonl", "tc", test=tmp_path / "dev.jsonl")
    assert len(other.test) == 4 and other.held_out
    write(tmp_path, "jsonl", TEXTS, "more")
    with pytest.raises(DataError, match="others, e.g. more.jsonl; name every file after its split"):
        load_app_data(tmp_path, "tc")


def test_other_sources_give_the_split_that_they_are_named_for(tmp_path):
    """A folder passed for test must not yield its training rows."""
    whole, only = tmp_path / "whole", tmp_path / "only"
    for folder in (whole, only):
        folder.mkdir()
    train = write(tmp_path, "jsonl", TEXTS)
    for name, rows in (("train", TEXTS[:12]), ("dev", TEXTS[12:15]), ("test", TEXTS[15:])):
        write(whole, "jsonl", rows, name)
    write(only, "jsonl", TEXTS[:3], "test")
    data = load_app_data(train, "tc", validation=whole, test=whole)
    assert data.validation.inputs == [row["text"] for row in TEXTS[12:15]]
    assert data.test.inputs == [row["text"] for row in TEXTS[15:]]
    assert data.notes["validation_source"] == data.notes["test_source"] == "whole"
    assert load_app_data(train, "tc", test=only).test.inputs == [row["text"] for row in TEXTS[:3]]
    assert len(load_app_data(train, "tc", validation=only).validation) == 3  # its only split
    (whole / "dev.jsonl").unlink()
    with pytest.raises(DataError, match="to be the validation split, but has test, train; name one file"):
        load_app_data(train, "tc", validation=whole)


def test_labels_are_those_of_the_drawn_rows(tmp_path):
    """Fifty labels of four rows each: a tenth of the rows cannot have them all."""
    rows = [{"text": f"t{i}", "label": f"{i % 50}"} for i in range(200)]
    source = write(tmp_path, "jsonl", rows)
    folder = tmp_path / "split"
    folder.mkdir()
    write(folder, "jsonl", rows)
    write(folder, "jsonl", rows[:50], "validation")
    data = load_app_data(folder, "tc", train_fraction=0.1)
    assert set(data.labels) == set(data.train.labels) and 15 < len(data.labels) <= 20
    assert data.labels == sorted(data.labels, key=int)  # as they first appear in the file
    missing = data.notes["labels_not_in_train"]["validation"]
    assert missing["count"] == 50 - len(data.labels) == len(missing["labels"])
    named = load_app_data(source, "tc", labels=[f"{i}" for i in range(51)])
    assert named.notes["labels_without_example"] == ["50"]
    with pytest.raises(DataError, match="no entity, every tag is O"):
        words = [{"tokens": ["a"], "ner_tags": ["O"]}] * 99 + [{"tokens": ["a"], "ner_tags": ["B-X"]}]
        load_app_data(write(tmp_path, "jsonl", words, "words"), "ner", train_fraction=0.1)


def test_a_drawn_share_has_the_same_share_of_every_label(tmp_path):
    rows = [{"text": f"t{i}", "label": "rare" if i < 20 else "often"} for i in range(1000)]
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", "jsonl", rows)
    write(tmp_path / "set", "jsonl", rows[:30], "dev")
    for seed in range(5):
        drawn = load_app_data(tmp_path / "set", "tc", train_fraction=0.1, seed=seed).train.labels
        assert drawn.count("rare") == 2 and len(drawn) == 100


def test_draws_are_seeded_and_a_fraction_is_a_fraction(tmp_path):
    source = write(tmp_path, "jsonl", [{"text": f"t{i}", "label": "abcd"[i % 4]} for i in range(200)])
    one, same, other = (load_app_data(source, "tc", train_fraction=0.1, seed=seed) for seed in (0, 0, 1))
    assert one.train == same.train and one.train != other.train
    assert len(one.train) + len(one.validation) == 20 and one.labels == ["a", "b", "c", "d"]
    assert {label for label in one.train.labels} >= set(one.validation.labels)


# Tag schemes, against seqeval's own readers


def random_entities(generator) -> tuple[int, list]:
    length, spans, start = int(generator.integers(1, 12)), [], 0
    while start < length:
        size = int(generator.integers(1, 4))
        if start + size <= length and generator.random() < 0.6:
            spans.append((start, start + size, "PQ"[generator.integers(2)]))
        start += size
    return length, spans


def encode(length: int, spans: list, scheme: str) -> list[str]:
    tags, before = ["O"] * length, (-1, "")
    for start, end, kind in spans:
        for i in range(start, end):
            tags[i] = f"I-{kind}"
        if scheme == "IOB2" or (scheme == "IOB1" and before == (start, kind)):
            tags[start] = f"B-{kind}"
        if scheme == "BIOES":
            tags[start], tags[end - 1] = f"B-{kind}", f"E-{kind}"
            if end - start == 1:
                tags[start] = f"S-{kind}"
        before = (end, kind)
    return tags


@pytest.mark.parametrize("scheme, reader", [("IOB1", IOB1), ("IOB2", IOB2), ("BIOES", IOBES)])
def test_every_scheme_keeps_its_entities(scheme, reader):
    generator = np.random.default_rng(0)
    drawn = [random_entities(generator) for _ in range(300)]
    tags = [encode(length, spans, scheme) for length, spans in drawn]
    if scheme != "IOB1":  # seqeval merges IOB1 neighbours of one type; the spans below are the reference
        entities = Entities(tags, reader).entities
        assert [[(e.start, e.end, e.tag) for e in row] for row in entities] == [spans for _, spans in drawn]
    converted, detected = to_iob2(tags)
    assert detected == scheme
    assert converted == [encode(length, spans, "IOB2") for length, spans in drawn]


@pytest.mark.parametrize(
    "tags, scheme, message",
    [
        (["S-P"], "IOB2", "row 2: Tag 'S-P' is not of the scheme IOB2"),
        (["B-P", "E-P"], "IOB1", "row 2: Tag 'E-P' is not of the scheme IOB1"),
        (["B-P", "O"], "auto", "row 2: an entity of type P has no last word, E-P"),
        (["B-P", "I-P"], "BIOES", "row 2: an entity of type P has no last word, E-P"),
        (["I-P", "E-P"], "auto", "row 2: I-P continues an entity that has not begun"),
        (["B-P", "E-Q"], "auto", "row 2: E-Q continues an entity that has not begun"),
    ],
)
def test_tags_outside_a_scheme_are_refused(tags, scheme, message):
    first = ["B-P", "I-P"] if scheme.startswith("IOB") else ["S-P"]
    with pytest.raises(DataError, match=message):
        to_iob2([first, tags], scheme)


def test_every_line_of_a_conll_file_is_read_unchanged(tmp_path):
    """Hash tags are words; only blanks, tabs and line ends separate; a byte order mark is left out."""
    text = "# a comment\n#\nin O\n#Rome B-LOC\n# O\n\n10\u00a0km O\na\u2028b O\n\x0c O\nc\u0085d\tO\r\n"
    (tmp_path / "a.conll").write_bytes(b"\xef\xbb\xbf" + (text + "\n" + text).encode())
    data = load_app_data(tmp_path / "a.conll", "ner")
    rows = sorted(data.train.inputs + data.validation.inputs)
    assert rows[0] == ["10\u00a0km", "a\u2028b", "\x0c", "c\u0085d"] and rows[-1] == ["in", "#Rome", "#"]
    assert data.notes["comment_lines_skipped"] == {"train": 4}


def test_labels_of_csv_files_are_text(tmp_path):
    rows = [("a", "007"), ("b", "7"), ("c", "True"), ("d", "1.50"), ("NA", "NA")] * 4
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{x},{y}\n" for x, y in rows))
    data = load_app_data(tmp_path / "a.csv", "tc")
    assert data.labels == ["007", "7", "True", "1.50", "NA"]
    assert set(data.train.inputs) == {"a", "b", "c", "d", "NA"}


def test_bilou_and_ambiguous_tags():
    assert to_iob2([["B-P", "L-P", "U-P", "U-P", "O"]]) == ([["B-P", "I-P", "B-P", "B-P", "O"]], "BIOES")
    assert to_iob2([["O"], ["B-P", "I-P"]])[1] == "IOB2"
    assert to_iob2([["I-P", "I-P"], ["I-Q", "B-Q"]])[1] == "IOB1"
    with pytest.raises(DataError, match="neither IOB1 nor IOB2: .* at row 1, .* at row 2. .* --scheme IOB2"):
        to_iob2([["I-P"], ["B-P"]])
    assert to_iob2([["I-P"], ["B-P"]], "IOB2")[0] == [["B-P"], ["B-P"]]


# Bad input: one clear error, or a counted note


@pytest.mark.parametrize(
    "text, message",
    [
        ("Ada PER\n", "line 1: Tag 'PER' is not of a known scheme.*does not say where an entity ends"),
        ("Ada B-PER\n\nRome X-LOC\n", "line 3: Tag 'X-LOC' is not of a known scheme"),
        ("Ada B-PER\nRome\n", "line 2: 'Rome' is not a token with a tag"),
        ("\n\n", "has no sentence"),
        ("Hi O\n\nyou O\n", "no entity, every tag is O"),
        ("Ada B-PER\n", "1 example; at least 2 are needed"),
    ],
)
def test_bad_conll_files(tmp_path, text, message):
    path = tmp_path / "bad.conll"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_app_data(path, "ner")


def test_bad_json_lines(tmp_path):
    path = tmp_path / "bad.jsonl"
    good = json.dumps(ROWS[0])
    path.write_text(f'{good}\n\n{{"tokens": ["a", "b"], "ner_tags": ["O"]}}\n')
    with pytest.raises(DataError, match="bad.jsonl, line 3 has 2 tokens but 1 tags"):
        load_app_data(path, "ner")
    path.write_text(f'{good}\n{{"tokens": ["a"]\n')
    with pytest.raises(DataError, match="bad.jsonl, line 2 is not valid JSON"):
        load_app_data(path, "ner")
    path.write_text(json.dumps({"text": "a"}) + "\n")
    with pytest.raises(DataError, match="no column 'label_text' or 'label'.*it has: text"):
        load_app_data(path, "tc")


@pytest.mark.parametrize(
    "ending, family", [("conll", "ner"), ("jsonl", "tc"), ("csv", "tc"), ("parquet", "tc")]
)
def test_binary_in_place_of_text_and_empty_files(tmp_path, ending, family):
    path = tmp_path / f"data.{ending}"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe" * 50)
    with pytest.raises(DataError, match=f"data.{ending}"):
        load_app_data(path, family)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=f"data.{ending} is empty"):
        load_app_data(path, family)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"text": "a", "label": "x"}] * 5, r"at least two labels; the data has only 'x'"),
        ([{"text": "a", "label": "x"}], "1 example; at least 2"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], "every label has one example"),
        ([{"text": None, "label": "x"}], "row 1|line 1"),
    ],
)
def test_too_little_text_data(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load_app_data(write(tmp_path, "jsonl", rows), "tc")


def test_a_label_only_in_test_is_counted_and_one_that_is_not_given_refused(tmp_path, caplog):
    write(tmp_path, "jsonl", TEXTS)
    write(tmp_path, "jsonl", [{"text": "t", "label": "new"}, {"text": "u", "label": "a"}], "test")
    data = load_app_data(tmp_path, "tc")
    assert data.notes["labels_not_in_train"] == {"test": {"labels": ["new"], "count": 1}}
    assert len(data.test) == 2 and "count as missed" in caplog.text
    with pytest.raises(DataError, match="'new', which is not in --labels"):
        load_app_data(tmp_path, "tc", labels=["a", "b"])


def test_empty_rows_are_counted(tmp_path):
    data = load_app_data(write(tmp_path, "jsonl", [*ROWS, {"tokens": [], "ner_tags": []}]), "ner")
    assert data.notes["empty_rows_skipped"] == {"train": 1}
    assert len(data.train) + len(data.validation) == 4


@pytest.mark.slow
def test_a_document_of_100000_words_is_fitted_whole(tmp_path, load, encoders):
    words = ["Ada", "meets", "Noor", "."] * 25_000
    tags = ["B-PER", "O", "B-PER", "O"] * 25_000
    data = load_app_data(write(tmp_path, "jsonl", [{"tokens": words, "ner_tags": tags}] * 2), "ner")
    tokenizer = load_word_tokenizer(str(encoders["bert"]))
    app = fit_app(data, "ner", backbone=(load("bert"), tokenizer), settings=FitSettings(steps=1))
    assert app.record["types"]["PER"]["support"] == 50_000


@pytest.mark.hub
def test_a_hub_set_that_needs_remote_code_is_refused(hub, tmp_path, monkeypatch):
    """A repo of the local Hub with nothing but a loading script."""
    from huggingface_hub import HfApi

    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("mtpf/scripted", repo_type="dataset")
    api.upload_file(
        path_or_fileobj=b"raise SystemExit('this must never run')",
        path_in_repo="scripted.py",
        repo_id="mtpf/scripted",
        repo_type="dataset",
    )
    message = "'mtpf/scripted' cannot be opened: .*Scripts are never run: choose a revision"
    with pytest.raises(DataError, match=message):
        load_app_data("mtpf/scripted", "tc")


@pytest.mark.hub
def test_a_name_that_no_file_and_no_hub_set_has(hub):
    with pytest.raises(DataError, match="no file or folder user/intents, and no data set of that name on"):
        load_app_data("user/intents", "tc")
    hub.create("user/intents", repo_type="dataset")
    with pytest.raises(DataError, match="The data set user/intents on the Hub has no revision 'v9'"):
        load_app_data("user/intents:all@v9", "tc")


@pytest.mark.hub
def test_a_missing_path_is_not_looked_for_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "apps").mkdir()
    for name in ("./nowhere", "user/intents.csv", "user/a/b", "intents"):
        with pytest.raises(DataError, match=f"no file or folder {name}, and it is not a Hub id"):
            load_app_data(name, "tc")
    with pytest.raises(DataError, match="no file or folder apps/entities in the local folder apps"):
        load_app_data("apps/entities", "tc")
    assert not hub.requests
    parts = "apps/entities", "all", "refs/convert/parquet"
    assert hub_id("apps/entities:all@refs/convert/parquet") == parts


def test_files_that_cannot_be_app_data(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match="no data file; accepted endings"):
        load_app_data(tmp_path, "tc")
    with pytest.raises(DataError, match="unknown ending"):
        load_app_data(tmp_path / "notes.md", "tc")
    with pytest.raises(DataError, match="cannot hold lists of words"):
        (tmp_path / "a.csv").write_text("tokens,ner_tags\n")
        load_app_data(tmp_path / "a.csv", "ner")
