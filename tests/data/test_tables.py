"""Data as people have it in Python, and folders of ``save_to_disk``: the same rows as from a file."""

import json

import pandas
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List

from modeling_mtpf.cli.main import main
from modeling_mtpf.data.app_data import load_app_data
from modeling_mtpf.data.sources import (
    TextStream,
    expand_pair_sources,
    fingerprint,
    open_source,
    stream_source,
)
from modeling_mtpf.errors import DataError
from modeling_mtpf.labelling.quality import GoldSet
from modeling_mtpf.pretraining.families.pairs import StreamedPairs

TEXTS = [{"text": f"text {number}", "label": f"label {number % 2}"} for number in range(12)]
WORDS = [{"tokens": ["Ada", f"number {n}"], "ner_tags": ["B-PER", "O"]} for n in range(12)]
ROWS = {"tc": TEXTS, "ner": WORDS}


def class_labels(rows, column):
    names = ["label 0", "label 1"] if column == "label" else ["O", "B-PER"]
    dataset = Dataset.from_list(rows)
    if not column:
        return dataset
    feature = ClassLabel(names=names) if column == "label" else List(ClassLabel(names=names))
    numbered = {
        column: [
            [names.index(t) for t in v] if isinstance(v, list) else names.index(v) for v in dataset[column]
        ]
    }
    other = next(name for name in dataset.column_names if name != column)
    features = Features({other: dataset.features[other], column: feature})
    return Dataset.from_dict({other: dataset[other][:], **numbered}, features=features)


def saved(dataset, folder):
    dataset.save_to_disk(folder)
    return folder


FORMS = {
    "Dataset": lambda rows, column, folder: Dataset.from_list(rows),
    "class labels": lambda rows, column, folder: class_labels(rows, column),
    "formatted": lambda rows, column, folder: Dataset.from_list(rows).with_format("numpy"),
    "selected": lambda rows, column, folder: Dataset.from_list(rows[::-1]).select(range(len(rows) - 1, -1, -1)),
    "DatasetDict": lambda rows, column, folder: DatasetDict(train=Dataset.from_list(rows)),
    "DataFrame": lambda rows, column, folder: pandas.DataFrame(rows, index=[f"row {i}" for i in range(len(rows))]),
    "categories": lambda rows, column, folder: pandas.DataFrame(rows).astype(
        {column: "category"} if column == "label" else {}
    ),
    "list": lambda rows, column, folder: rows,
    "saved Dataset": lambda rows, column, folder: saved(Dataset.from_list(rows), folder),
    "saved as text": lambda rows, column, folder: str(saved(Dataset.from_list(rows), folder)),
    "saved DatasetDict": lambda rows, column, folder: saved(DatasetDict(train=Dataset.from_list(rows)), folder),
}  # fmt: skip


@pytest.fixture(params=FORMS)
def form(request, tmp_path):
    return lambda rows, column="": FORMS[request.param](rows, column, tmp_path / "saved")


def json_lines(rows, file):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("family", ROWS)
def test_an_app_reads_what_it_reads_from_a_file(form, family, tmp_path):
    expected = load_app_data(json_lines(ROWS[family], tmp_path / "data.jsonl"), family)
    data = load_app_data(form(ROWS[family], "label" if family == "tc" else "ner_tags"), family)
    assert (data.labels, data.train, data.validation) == (
        expected.labels,
        expected.train,
        expected.validation,
    )
    assert data.notes["fingerprint"] == expected.notes["fingerprint"]
    other = load_app_data(
        tmp_path / "data.jsonl", family, test=form(ROWS[family]) if family == "tc" else None
    )
    assert other.train == expected.train and (other.test is None or len(other.test) == 12)


def test_sources_of_training_read_what_they_read_from_a_file(form, tmp_path):
    file = json_lines(TEXTS, tmp_path / "data.jsonl")
    columns = {"text": "text", "label": "text"}
    source = form(TEXTS)
    assert open_source(source, columns).to_list() == open_source(file, columns).to_list() == TEXTS
    assert list(stream_source(source)) == TEXTS
    stream = TextStream(source)
    assert [row.text for row in stream] == [row.text for row in stream] == [row["text"] for row in TEXTS]
    assert stream.fingerprint() == TextStream(source).fingerprint() == fingerprint(source, None)
    assert (
        [*expand_pair_sources([source]).values()] == [source]
        if not isinstance(source, pandas.DataFrame)
        else True
    )
    with pytest.raises(DataError, match="has no column 'body'; it has: text, label"):
        open_source(source, {"body": "text"})


def test_pairs_and_gold_sets_are_read(form, encoders):
    from modeling_mtpf.data.words import load_word_tokenizer

    tokenizer = load_word_tokenizer(str(encoders["bert"]))
    pairs = [{"anchor": f"a {n}", "positive": f"b {n}"} for n in range(8)]
    StreamedPairs("pairs", form(pairs), tokenizer, 16, 2, 4, 8)
    assert len(GoldSet(form(WORDS)).rows) == 12 if not isinstance(form(WORDS), (str,)) else True


def test_splits_and_mistakes(tmp_path):
    rows = Dataset.from_list(TEXTS)
    splits = DatasetDict(train=rows, validation=rows.select(range(4)), test=rows.select([0, 1]))
    for source in (
        splits,
        saved(splits, tmp_path / "saved"),
        {"train": TEXTS, "dev": TEXTS[:4], "test": TEXTS[:2]},
    ):
        data = load_app_data(source, "tc")
        assert [len(part) for part in (data.train, data.validation, data.test)] == [12, 4, 2]
    for source, message in [
        (5, "type int cannot be read; give a path"),
        (rows.to_iterable_dataset(), "type IterableDataset cannot be read"),
        ([], "type list cannot be read"),
        (
            pandas.DataFrame({"text": ["a", None], "label": ["x", "y"]}),
            "data in memory .*row 2: a text and a label",
        ),
        (pandas.DataFrame({"body": ["a"]}), "data in memory .*has no column 'text'"),
        (DatasetDict(a=rows, b=rows), "data in memory has no split named train"),
    ]:
        with pytest.raises(DataError, match=message):
            load_app_data(source, "tc")
    (tmp_path / "saved" / "train" / "state.json").write_text("{")
    with pytest.raises(DataError, match="saved cannot be read"):
        load_app_data(tmp_path / "saved", "tc")


def test_the_command_reads_a_saved_folder(tmp_path, encoders, capsys):
    folder = saved(Dataset.from_list(TEXTS), tmp_path / "saved")
    arguments = ["adapt", "--family", "tc", "--data", str(folder), "--backbone", str(encoders["bert"])]
    assert main([*arguments, "--output_dir", str(tmp_path / "app"), "--progress", "false"]) == 0
    assert "on saved, 12 training examples" in capsys.readouterr().out
