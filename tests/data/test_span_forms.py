"""Character spans as annotation tools write them: read to the same texts and spans, fitted, and written back."""

import json
from pathlib import Path

import pandas
import pytest
from datasets import Dataset

from modeling_mtpf.adaptation import FitSettings, fit_app
from modeling_mtpf.adaptation.tagged_texts import TaggedTexts
from modeling_mtpf.cli.main import main
from modeling_mtpf.data.app_data import AppData, Examples, load_app_data
from modeling_mtpf.data.app_sources import read_splits
from modeling_mtpf.data.span_forms import label_studio_task
from modeling_mtpf.data.spans import Span, join_words, tags_of, text_and_spans
from modeling_mtpf.data.words import load_word_tokenizer
from modeling_mtpf.errors import DataError

TEXT = "Call Ada Lovelace, in Rome 🙂 with Noor."
SPANS = [Span(5, 17, "PER"), Span(22, 26, "LOC"), Span(34, 38, "PER")]
OTHER = "Nobody is here."
LISTS = [list(span) for span in SPANS]
DICTS = [{"start": a, "end": b, "label": kind} for a, b, kind in SPANS]


def utf16(position: int) -> int:
    return len(TEXT[:position].encode("utf-16-le")) // 2


def studio(*regions, **more) -> dict:
    result = [
        {"id": "x", "from_name": "label", "to_name": "text", "type": "labels",
         "value": {"start": a, "end": b, "text": said, "labels": [kind]}}
        for a, b, kind, said in regions
    ]  # fmt: skip
    return {"id": 1, "annotations": [{"was_cancelled": False, "result": result}], "predictions": [], **more}


SAID = [(*span, TEXT[span.start : span.end]) for span in SPANS]
FORMS = {
    "lists": [{"text": TEXT, "spans": LISTS}, {"text": OTHER, "spans": []}],
    "dicts": [{"text": TEXT, "entities": DICTS}, {"text": OTHER, "entities": []}],
    "not in order": [{"text": TEXT, "spans": LISTS[::-1]}, {"text": OTHER, "spans": None}],
    "doccano": [{"id": 1, "text": TEXT, "label": LISTS, "Comments": []}, {"id": 2, "text": OTHER, "label": []}],
    "doccano, relations": [
        {"id": 1, "text": TEXT, "relations": [], "entities": [
            {"id": n, "label": kind, "start_offset": a, "end_offset": b} for n, (a, b, kind) in enumerate(SPANS)]},
        {"id": 2, "text": OTHER, "relations": [], "entities": []},
    ],
    "Prodigy": [
        {"text": TEXT, "answer": "accept", "tokens": [{"text": "Call", "start": 0, "end": 4, "id": 0}],
         "spans": [{**span, "token_start": 1, "token_end": 2} for span in DICTS]},
        {"text": OTHER, "answer": "accept", "tokens": [], "spans": []},
        {"text": TEXT, "answer": "reject", "tokens": [], "spans": []},
    ],
    "spaCy": [[TEXT, {"entities": LISTS}], [OTHER, {"entities": []}]],
    "Label Studio": [studio(*SAID, data={"text": TEXT, "id": 7}), studio(data={"text": OTHER})],
    "Label Studio, UTF-16": [
        studio(*((utf16(a), utf16(b), kind, said) for a, b, kind, said in SAID), data={"text": TEXT}),
        studio(data={"text": OTHER}),
    ],
    "Label Studio, JSON-MIN": [
        {"id": 1, "text": TEXT, "label": [{"start": a, "end": b, "text": t, "labels": [k]} for a, b, k, t in SAID]},
        {"id": 2, "text": OTHER, "label": []},
    ],
}  # fmt: skip


def write(folder: Path, rows: list, kind: str = "jsonl") -> Path:
    path = folder / f"train.{kind}"
    text = json.dumps(rows, indent=1) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, "utf-8")
    return path


def read(source, **options) -> AppData:
    return load_app_data(source, "ner", validation=source, **options)


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize("rows", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_texts_and_spans(tmp_path, rows, kind):
    data = read(write(tmp_path, rows, kind))
    assert data.train == Examples([TEXT, OTHER], [SPANS, []])
    assert data.labels == ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"] and data.notes["scheme"] == "spans"
    assert data.notes.get("annotations_rejected", {}).get("train", 0) == len(rows) - 2
    assert "spans_inside_words" not in data.notes


@pytest.mark.parametrize("rows", [FORMS["lists"], FORMS["dicts"], FORMS["Label Studio"]])
def test_rows_in_memory(rows):
    assert read(rows).train == Examples([TEXT, OTHER], [SPANS, []])
    if rows is FORMS["dicts"]:
        assert read(Dataset.from_list(rows)).train == Examples([TEXT, OTHER], [SPANS, []])


def test_columns_of_spans_can_be_named(tmp_path):
    path = write(tmp_path, [{"body": TEXT, "marks": LISTS, "text": "x", "spans": []}])
    assert read(path, columns={"text": "body", "spans": "marks"}).train == Examples([TEXT], [SPANS])


def test_brat(tmp_path):
    (tmp_path / "train").mkdir()
    text = f"{TEXT}\n{OTHER}\n"
    entities = [f"T{n}\t{kind} {a} {b}\t{TEXT[a:b]}" for n, (a, b, kind) in enumerate(SPANS)]
    more = ["#1\tAnnotatorNotes T1\tsure", "R1\tKnows Arg1:T0 Arg2:T2", "T8\tPER 0 4;6 8\tCall da"]
    (tmp_path / "train" / "1.txt").write_text(text, "utf-8")
    (tmp_path / "train" / "1.ann").write_text("\n".join([*more, *entities[::-1]]), "utf-8")
    (tmp_path / "train" / "2.txt").write_text(OTHER)
    (tmp_path / "train" / "2.ann").write_text("")
    for source in (tmp_path, tmp_path / "train"):
        data = load_app_data(source, "ner", validation=tmp_path / "train")
        assert data.train == Examples([text, OTHER], [SPANS, []])
        assert data.notes["discontinuous_spans_left_out"] == {"train": 1, "validation": 1}
    (tmp_path / "train" / "1.ann").write_text(f"{entities[0]}\nT1\tPER 6 10\tAda\n")
    with pytest.raises(DataError, match="1.ann, line 2: 6:10 covers 'da L', not 'Ada'"):
        load_app_data(tmp_path, "ner")
    (tmp_path / "train" / "2.ann").unlink()
    (tmp_path / "train" / "1.ann").write_text(entities[0])
    with pytest.raises(DataError, match="2.txt has no 2.ann next to it"):
        load_app_data(tmp_path, "ner")
    (tmp_path / "train" / "2.txt").rename(tmp_path / "train" / "2.ann")
    with pytest.raises(DataError, match="2.ann has no 2.txt next to it"):
        load_app_data(tmp_path, "ner")


def test_gliner(tmp_path):
    words, tags = ["Call", "Ada", "Lovelace", "in", "Rome"], ["O", "B-PER", "I-PER", "O", "B-LOC"]
    rows = [{"tokenized_text": words, "ner": [[1, 2, "PER"], [4, 4, "LOC"], [2, 2, "NAME"]]}]
    data = read(write(tmp_path, rows, "json"))
    assert data.train == Examples([words], [tags])
    assert data.notes["overlapping_spans_left_out"] == {"train": 1, "validation": 1}


def test_labels_of_texts(tmp_path):
    choice = {"from_name": "c", "to_name": "text", "type": "choices"}
    rows = [
        {"data": {"text": text}, "annotations": [{"result": [{**choice, "value": {"choices": [label]}}]}]}
        for text, label in (("a", "x"), ("b", "y"), ("c", "x"))
    ]
    rows.append({"data": {"text": "not done"}, "annotations": []})
    source = write(tmp_path, rows, "json")
    data = load_app_data(source, "tc", validation=source)
    assert data.train == Examples(["a", "b", "c"], ["x", "y", "x"])
    assert data.notes["tasks_without_annotation"]["train"] == 1
    pairs = [
        [text, {"cats": {"x": label == "x", "y": label == "y"}}] for text, label in (("a", "x"), ("b", "y"))
    ]
    source = write(tmp_path, pairs)
    assert load_app_data(source, "tc", validation=source).train == Examples(["a", "b"], ["x", "y"])


def task(*results, **more) -> dict:
    return {"data": {"text": TEXT}, "annotations": [{"result": list(results), **more}]}


def choices(*labels) -> dict:
    return {"type": "choices", "value": {"choices": list(labels)}}


TOOLS = {
    "Label Studio": lambda labels: task(choices(*labels)),
    "Label Studio, apart": lambda labels: task(*map(choices, labels)),
    "spaCy": lambda labels: {"text": TEXT, "cats": {x: 0.9 if x in labels else 0.05 for x in "xyz"}},
    "spaCy, pairs": lambda labels: [TEXT, {"cats": {x: x in labels for x in "xyz"}}],
    "Prodigy": lambda labels: {"text": TEXT, "accept": list(labels), "answer": "accept"},
    "doccano": lambda labels: {"text": TEXT, "label": [f" {label}" for label in labels]},
}


@pytest.mark.parametrize("form", TOOLS.values(), ids=TOOLS)
def test_texts_have_lists_of_labels_unless_all_have_one(tmp_path, form):
    one, several = ([form(labels) for labels in sets] for sets in (["x", "y"], ["xy", "x", "", "z"]))
    source = write(tmp_path, one)
    data = load_app_data(source, "tc", validation=source)
    assert data.train.labels == ["x", "y"] and not data.multi_label
    other = tmp_path / "more"
    other.mkdir()
    data = load_app_data(source, "tc", validation=write(other, several))
    assert data.multi_label and data.train.labels == [["x"], ["y"]]
    assert data.validation.labels == [["x", "y"], ["x"], [], ["z"]]
    if form is not TOOLS["spaCy, pairs"] and form is not TOOLS["spaCy"]:  # Arrow has a column for each label
        assert load_app_data(Dataset.from_list(several[::2] * 2), "tc").train.labels[0] in ([], ["x", "y"])


def test_one_label_and_lists_do_not_mix(tmp_path):
    source = write(tmp_path, [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": "x"}] * 4)
    with pytest.raises(DataError, match="line 2 has the label 'x', where .* either all texts have a list"):
        load_app_data(source, "tc")


def test_labels_that_differ_by_blanks_are_one(tmp_path, caplog):
    path = tmp_path / "train.csv"
    path.write_text("text,label\na, x\nb,x \nc,y\nd,x/y\n")
    assert set(load_app_data(path, "tc", validation=path).labels) == {"x", "y", "x/y"}
    assert "looks like several" not in caplog.text


@pytest.mark.parametrize("labels, mark", [(["x", "y", "x|y"], "|"), (["a; x", "b; x"], ";")])
def test_labels_that_look_like_several_are_hinted_at(caplog, labels, mark):
    load_app_data([{"text": "a", "label": label} for label in labels * 2], "tc")
    assert f"looks like several; if so, give --label_separator '{mark}'" in caplog.text


def test_label_sets_come_back_from_label_studio(tmp_path):
    sets = [["x", "y"], [], ["z"]]
    rows = []
    for labels in sets:
        made = label_studio_task(TEXT, {"moods": [{"label": label, "score": 0.9} for label in labels]})
        assert len(made["predictions"][0]["result"]) == bool(
            labels
        )  # one of a control, as the tool writes it
        rows.append({**made, "annotations": made["predictions"]})
    source = write(tmp_path, rows, "json")
    assert load_app_data(source, "tc", validation=source).train.labels == sets


LABELLED = {"type": "labels", "value": {"start": 0, "end": 4, "labels": ["X"]}}


@pytest.mark.parametrize("family", ["ner", "tc"])
@pytest.mark.parametrize(
    "row, message",
    [
        ({"data": {"text": "a"}, "annotations": [None]}, "line 1: .* as annotations, not .None."),
        (task() | {"annotations": [{"result": None}]}, "line 1: .* as result, not None"),
        (task("x"), "line 1: .* as result, not .'x'."),
        (task({"value": "x"}), "line 1: .* as value"),
        (task(LABELLED) | {"data": None}, "line 1: .* as data"),
        (task(LABELLED) | {"data": "x"}, "line 1: .* as data"),
        (task({"value": {"choices": "x"}}), "line 1: choices must be a list|no entity"),
        ({"text": TEXT, "spans": {"start": 0, "end": 1, "label": "P"}, "cats": {"x": "y"}}, "line 1: (spans are|a label in cats)"),
        ({"text": TEXT, "spans": {"start": [0, 1], "end": [1], "label": ["P"]}, "cats": {"x": []}}, "line 1: (spans are|a label in)"),
    ],
)  # fmt: skip
def test_damaged_annotations_say_where(tmp_path, family, row, message):
    with pytest.raises(DataError, match=message):
        load_app_data(write(tmp_path, [row] * 4), family)


@pytest.mark.parametrize("kind", ["hypertextlabels", "paragraphlabels", "relation"])
def test_results_of_other_types_are_counted(tmp_path, caplog, kind):
    other = {"type": kind, **({"value": {"start": 0, kind: ["P"]}} if kind != "relation" else {})}
    source = write(tmp_path, [task(LABELLED, choices("x"), other), task(LABELLED, choices("y"))])
    for family in ("ner", "tc"):
        data = load_app_data(source, family, validation=source)
        assert data.notes["results_of_other_types_left_out"] == {"train": 1, "validation": 1}
    assert data.train.labels == ["x", "y"] and "1 results of other types left out" in caplog.text


def test_tasks_of_label_studio_in_a_table():
    rows = [task(LABELLED, choices(label)) for label in "xyxy"]  # Arrow gives every value all keys
    data = load_app_data(Dataset.from_list(rows), "ner")
    assert data.train.labels[0] == [Span(0, 4, "X")] and "results_of_other_types_left_out" not in data.notes
    assert load_app_data(Dataset.from_list(rows), "tc").labels == ["x", "y"]


def test_rows_of_prodigy_without_spans_have_none(tmp_path):
    rows = [{"text": TEXT, "spans": DICTS}, {"text": OTHER}]
    source = write(tmp_path, [{**row, "answer": "accept"} for row in rows])
    assert read(source).train == Examples([TEXT, OTHER], [SPANS, []])
    rows = [
        {"text": t, "label": "xy"[n % 2], "answer": "accept" if n < 4 else "reject"}
        for n, t in enumerate("abcdef")
    ]
    assert load_app_data(Dataset.from_list(rows), "tc").notes["annotations_rejected"] == {"train": 2}


def test_a_frame_of_tuples(tmp_path):
    frame = pandas.DataFrame({"text": [TEXT, OTHER], "spans": [[tuple(span) for span in SPANS], []]})
    assert read(frame).train == Examples([TEXT, OTHER], [SPANS, []])
    frame.columns = ["text", "text"]
    with pytest.raises(DataError, match="table in memory cannot be read"):
        read(frame)


@pytest.mark.parametrize(
    "spans, expected, note",
    [
        ([[4, 18, "PER"]], [Span(5, 18, "PER")], "spans_with_blanks_at_their_ends"),  # the comma is a word
        ([[4, 5, "PER"], *LISTS], SPANS, "empty_spans_left_out"),
        ([[5, 8, "NAME"], *LISTS], SPANS, "overlapping_spans_left_out"),
        ([[5, 7, "PER"]], [Span(5, 7, "PER")], "spans_inside_words"),
        ([[5, 7, "A"], [7, 8, "B"]], [Span(5, 7, "A"), Span(7, 8, "B")], "spans_sharing_a_word_with_another"),
        ([*LISTS, *LISTS], SPANS, None),
    ],
)
def test_what_is_left_out_or_not_on_words_is_counted(tmp_path, caplog, spans, expected, note):
    data = read(write(tmp_path, [{"text": TEXT, "spans": spans}]))
    assert data.train.labels == [expected]
    notes = {key for key in data.notes if key.startswith(("spans", "empty", "over"))}
    notes -= {"spans_inside_words"} if note == "spans_sharing_a_word_with_another" else set()
    assert notes == ({note} if note else set())
    assert not note or (data.notes[note]["train"] == 1 and note.replace("_", " ") in caplog.text)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": TEXT, "spans": [[5, 99, "PER"]]}, "line 1: the span 5:99 .PER. is not inside the text, 0:39"),
        ({"text": TEXT, "spans": [[-1, 3, "PER"]]}, "the span -1:3 .PER. is not inside"),
        ({"text": TEXT, "spans": [[5, "8", "PER"]]}, r"is not a span; write \[start, end, \"TYPE\"\] or"),
        ({"text": TEXT, "spans": [{"start": 5, "end": 8}]}, "is not a span"),
        ({"text": TEXT, "spans": [[5, 8, ""]]}, "is not a span"),
        ({"text": TEXT, "spans": [{"start": 5, "end": 8, "label": "P", "text": "Eva"}]}, "covers 'Ada', but says 'Eva'"),
        ({"text": TEXT, "spans": "PER"}, "no column 'spans'"),
        ({"text": TEXT}, "no column 'spans' or 'entities'.*Name it with --columns.spans"),
        ({"tokenized_text": ["a"], "ner": [[0, 1, "PER"]]}, "the span 0:2 .PER. is not inside"),
    ],
)  # fmt: skip
def test_spans_that_are_not_of_their_text_are_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path, [row]))


def test_spans_in_memory_are_checked():
    good = Examples([TEXT], [SPANS])
    for labels, message in (
        ([SPANS[::-1]], "not in order inside the text"),
        ([["B-PER"]], "a text has `Span` objects"),
        ([[Span(0, 99, "PER")]], "not in order inside"),
    ):
        data = AppData("ner", ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"], Examples([TEXT], labels), good)
        with pytest.raises(DataError, match=message):
            fit_app(data, "ner", backbone=(None, None))


def test_a_text_with_spans_is_fitted_like_its_words(encoders):
    words = [["Call", "Ada", "Lovelace", "in", "Rome"], ["Noor", "is", "here", "."]]
    tags = [["O", "B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "O", "O", "O"]]
    texts, spans = zip(*(join_words(*row) for row in zip(words, tags, strict=True)), strict=True)
    tokenizer = load_word_tokenizer(str(encoders["bert"]))
    labels = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    of_words, of_texts = (
        TaggedTexts(tokenizer, examples, labels, 16)
        for examples in (Examples(words, tags), Examples(list(texts), list(spans)))
    )
    assert [t.tolist() for t in of_words.targets] == [t.tolist() for t in of_texts.targets]
    assert [tags_of(*row) for row in zip(texts, spans, strict=True)] == tags
    assert text_and_spans(texts[0], spans[0]) == text_and_spans(words[0], tags[0])


def test_predictions_come_back_as_annotations(folders, tmp_path, capsys):
    """What `mtpf predict` gives, accepted as it is in Label Studio, is read as it was."""
    texts = ["Ada met Noor in London.", "café 東京 🙂 Ada", "Hi"]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    command = ["predict", "--backbone", folders / "backbone"]
    for name in ("entities", "intent"):
        command += ["--adapter", folders / name]

    def run(*more) -> str:
        capsys.readouterr()
        assert main([*map(str, command), *more, str(tmp_path / "a.txt")]) == 0
        return capsys.readouterr().out

    lines = [json.loads(line) for line in run().splitlines()]
    tasks = json.loads(run("--format", "label-studio"))
    assert [task["data"]["text"] for task in tasks] == texts
    for family, app in (("ner", "entities"), ("tc", "intent")):
        accepted = [
            {
                "data": task["data"],
                "annotations": [p for p in task["predictions"] if p["model_version"] == app],
            }
            for task in tasks
        ]
        source = write(tmp_path, accepted, "json")
        results = [line["results"][app] for line in lines]
        if family == "ner":
            expected = [[Span(r["start"], r["end"], r["entity_group"]) for r in row] for row in results]
            assert any(expected) and read(source).train == Examples(texts, expected)
        else:
            rows = read_splits(source, family)["train"]
            assert (rows.inputs, rows.labels) == (texts, [[row["label"]] for row in results])


def test_an_app_is_fitted_on_spans_and_scored_by_what_predict_gives(load, encoders, tmp_path):
    rows = []
    for name in ("Ada", "Noor", "Grace", "Alan"):
        for place in ("London", "Paris", "Rome"):
            text = f"{name} is in {place}."
            spans = [[0, len(name), "PER"], [len(text) - 1 - len(place), len(text) - 1, "LOC"]]
            rows.append({"text": text, "spans": spans})
    source = write(tmp_path, rows)
    tokenizer = load_word_tokenizer(str(encoders["bert"]))
    settings = FitSettings(
        steps=150, learning_rate=3e-3, batch_size=4, max_length=32, mixed_precision="float32"
    )
    app = fit_app(
        source, "ner", backbone=(load("bert"), tokenizer), settings=settings, validation=source, test=source
    )
    texts = [row["text"] for row in rows]
    found = app.model.predict(texts, adapters=[app.name], tokenizer=tokenizer)[app.name]
    gold = [{tuple(span) for span in row["spans"]} for row in rows]
    delivered = [{(r["start"], r["end"], r["entity_group"]) for r in row} for row in found]
    right = sum(len(a & b) for a, b in zip(gold, delivered, strict=True))
    assert app.metrics["recall"] == round(right / 24, 4) > 0.5


def test_a_part_named_score_is_a_part():
    task = label_studio_task("Hi", {"both": {"score": {"label": "high", "score": 0.5}, "mood": []}})
    assert [row["model_version"] for row in task["predictions"]] == ["both/score", "both/mood"]
