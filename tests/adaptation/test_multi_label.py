"""Text apps with any number of labels: forms of data, both methods, what is stored, and who reads it."""

import itertools
import json

import numpy as np
import pandas
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score
from sklearn.multiclass import OneVsRestClassifier
from transformers import pipeline

from modeling_mtpf import AdapterError, AdapterHead, MtpfForSequenceClassification, MtpfModel
from modeling_mtpf.adaptation import FitSettings, fit_app
from modeling_mtpf.adaptation.calibration import best_threshold
from modeling_mtpf.adaptation.methods import probe
from modeling_mtpf.adaptation.text_vectors import embed_texts
from modeling_mtpf.data.app_data import AppData, Examples, load_app_data
from modeling_mtpf.data.label_sets import label_matrix
from modeling_mtpf.data.words import load_word_tokenizer
from modeling_mtpf.errors import DataError
from modeling_mtpf.metrics import label_set_scores
from modeling_mtpf.model.schemas_mtpf import MULTI_LABEL

LABELS = ["joy", "fear", "awe"]
SETS = [["joy"], ["fear", "joy"], [], ["awe"], ["joy", "fear", "awe"], ["fear"]] * 3
TEXTS = [f"text {number}" for number in range(len(SETS))]
FLOAT = {"mixed_precision": "float32"}


def rows(value):
    return [{"text": text, **value(labels)} for text, labels in zip(TEXTS, SETS, strict=True)]


def columns(yes, no):
    return rows(lambda labels: {name: yes if name in labels else no for name in LABELS})


def write(path, rows):
    if path.suffix == ".csv":
        pandas.DataFrame(rows).to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def forms(folder):
    """Ways to write the same texts and labels, with the options that read them."""
    numbers = rows(lambda labels: {"labels": [LABELS.index(name) for name in labels]})
    features = Features({"text": Value("string"), "labels": List(ClassLabel(names=LABELS))})
    lists = rows(lambda labels: {"labels": labels})
    joined = rows(lambda labels: {"label": " | ".join(labels)})
    named = {"labels": LABELS}
    yield lists, {}
    yield write(folder / "lists.jsonl", lists), {}
    yield Dataset.from_list(numbers, features=features), {}
    yield numbers, named
    yield write(folder / "joined.csv", joined), {"label_separator": "|"}
    yield pandas.DataFrame(joined), {"label_separator": "|"}
    yield write(folder / "hot.csv", columns(1, 0)), named
    yield write(folder / "hot.jsonl", columns(True, False)), named
    yield pandas.DataFrame(columns(1.0, 0.0)), named
    yield columns("true", "False"), named


def test_every_form_gives_the_same(tmp_path):
    seen = []
    for source, options in forms(tmp_path):
        data = load_app_data(source, "tc", **options)
        assert data.multi_label and sorted(data.labels) == sorted(LABELS) and data.held_out
        pairs = zip(
            data.train.inputs + data.validation.inputs,
            data.train.labels + data.validation.labels,
            strict=True,
        )
        seen.append({text: set(labels) for text, labels in pairs})
    assert seen == [dict(zip(TEXTS, map(set, SETS), strict=True))] * len(seen) and len(seen) == 10
    single = load_app_data(rows(lambda labels: {"label": "|".join(labels) or "none"}), "tc")
    assert not single.multi_label and "fear|joy" in single.labels


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({"label": True}, {}, "row 1: the label is True, neither text nor number; write a name"),
        ({"labels": ["a", "a"]}, {}, "row 1: .* but a label is named twice"),
        ({"labels": ["a", " "]}, {}, "row 1: .* but '' is not a name"),
        ({"labels": [True]}, {}, "row 1: .* but 'True' is not a name"),
        ({"a": 1, "b": 2}, {"labels": ["a", "b"]}, "row 1: the column of the label 'b' holds '2'; write 1 or 0"),
        ({"labels": ["a"]}, {"label_separator": "|"}, r"row 1: .* is not a string, which --label_separator"),
        ({"labels": ["a"]}, {"labels": ["b", "c"]}, "has the label 'a', which is not in --labels"),
        ({"labels": []}, {}, "No text of the training data has a label"),
    ],
)  # fmt: skip
def test_mistakes_are_named(change, options, message):
    table = [{"text": f"text {number}", **change} for number in range(8)]
    with pytest.raises(DataError, match=message):
        load_app_data(table, "tc", **options)


def test_one_label_and_lists_do_not_mix():
    train, other = Examples(TEXTS, SETS), Examples(["a", "b"], ["joy", "fear"])
    with pytest.raises(DataError, match="validation split, row 1: either all texts have a list"):
        fit_app(AppData("tc", LABELS, train, other), "tc")


def test_scores_are_sklearns():
    generator = np.random.default_rng(0)
    gold, logits = generator.random((50, 4)) < 0.4, generator.normal(size=(50, 4))
    gold[:, 3], logits[:, 3] = False, -1  # occurs nowhere
    scores = label_set_scores(gold, logits)
    assert scores["micro_f1"] == pytest.approx(f1_score(gold, logits >= 0, average="micro"))
    assert scores["macro_f1"] == pytest.approx(f1_score(gold[:, :3], logits[:, :3] >= 0, average="macro"))
    assert scores["average_precision"] == pytest.approx(average_precision_score(gold[:, :3], logits[:, :3]))


def test_the_threshold_is_the_best_of_all():
    generator = np.random.default_rng(1)
    for texts, labels in itertools.product([1, 2, 5, 9], [1, 3]):
        logits = generator.integers(-3, 3, (texts, labels)).astype(float)  # with equal ones
        gold = generator.random((texts, labels)) < 0.5
        threshold = best_threshold(logits, gold)
        tried = [f1_score(gold.ravel(), logits.ravel() >= cut, zero_division=0) for cut in np.arange(-3.5, 4)]
        assert f1_score(gold.ravel(), logits.ravel() >= threshold, zero_division=0) == max(tried)


@pytest.fixture
def setting(load, encoders):
    return load("bert"), load_word_tokenizer(str(encoders["bert"]))


WORDS = {"joy": "Ada", "fear": "London", "awe": "Monday"}


def data() -> AppData:
    """Each label has a word."""
    generator = np.random.default_rng(0)
    sets = [[name for name in LABELS if generator.random() < 0.4] for _ in range(60)]
    texts = [f"met {' '.join(WORDS[name] for name in labels)} in" for labels in sets]
    splits = [Examples(texts[start : start + 20], sets[start : start + 20]) for start in (0, 20, 40)]
    splits[2] = Examples([*splits[2].inputs, "met Ada in " * 20], [*splits[2].labels, ["joy", "unseen"]])
    return AppData("tc", LABELS, *splits)


@pytest.mark.parametrize("method", ["probe", "lora"])
def test_an_app_gives_label_sets_everywhere(setting, tmp_path, load, method):
    model, tokenizer = setting
    model.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    steps = {"steps": 150, "learning_rate": 3e-3, "batch_size": 4} if method == "lora" else {}
    settings = FitSettings(max_length=32, **steps, **FLOAT)
    app = fit_app(
        data(), "tc", backbone=setting, method=method, output_dir=tmp_path / "app", settings=settings
    )
    task = json.loads((tmp_path / "app" / "task.json").read_text())
    assert task["problem_type"] == MULTI_LABEL and task["kind"] == "text-classification"
    assert app.metrics["micro_f1"] > 0.7 and 0 < task["calibration"]["threshold"] < 1
    assert "threshold on held-out rows" in str(app)
    card = (tmp_path / "app" / "README.md").read_text()
    assert "any number of labels per text" in card and "top_k=None" in card and "is the score 0.5" in card

    again = MtpfModel.from_pretrained(tmp_path / "backbone").eval()
    again.load_adapter(tmp_path / "app")
    test = data().test
    results = again.predict(test.inputs, adapters=["app"])["app"]
    delivered = label_matrix([[row["label"] for row in result] for result in results], LABELS)
    gold = label_matrix(test.labels, [*LABELS, "unseen"])
    predicted = np.concatenate([delivered, np.zeros((len(gold), 1), bool)], axis=1)
    assert app.metrics["micro_f1"] == round(f1_score(gold, predicted, average="micro"), 4)
    assert app.metrics["macro_f1"] == round(f1_score(gold, predicted, average="macro"), 4)

    everything = again.predict(test.inputs, adapters=["app"], top_k=None, threshold=0)["app"]
    for result, all_rows in zip(results, everything, strict=True):
        assert [row["score"] for row in all_rows] == sorted((row["score"] for row in all_rows), reverse=True)
        assert result == [row for row in all_rows if row["score"] >= 0.5] and len(all_rows) == 3
    two = again.predict(test.inputs, adapters=["app"], top_k=2, threshold=0.0)["app"]
    assert two == [all_rows[:2] for all_rows in everything]

    stock = MtpfForSequenceClassification.from_pretrained(tmp_path / "backbone", num_labels=2).eval()
    stock.load_adapter(tmp_path / "app")
    classify = pipeline("text-classification", model=stock, tokenizer=tokenizer, top_k=None)
    for result, rows in zip(everything[:5], classify(test.inputs[:5]), strict=True):
        assert {row["label"]: pytest.approx(row["score"], abs=1e-4) for row in result} == {
            row["label"]: row["score"] for row in rows
        }
    stock.load_adapter(single_label_app(tmp_path, load))
    assert stock.config.problem_type is None  # as before, the softmax of pipelines


def single_label_app(folder, load):
    model = load("bert")
    model.add_adapter("single", head=AdapterHead("text-classification", ["a", "b"], 32))
    return model.save_adapter(folder / "single", "single")


@pytest.mark.parametrize("folds", [False, True])
def test_a_probe_is_one_against_the_rest(setting, monkeypatch, folds):
    monkeypatch.setattr(probe, "STRENGTHS", (1.0,))
    both = data()
    both.held_out = folds
    both.labels = [*LABELS, "never"]
    app = fit_app(both, "tc", backbone=setting, method="probe", settings=FitSettings(**FLOAT))
    assert app.record["seeds"]["0"]["chosen_by"] == ("5 folds" if folds else "validation")
    vectors = embed_texts(*setting, [*both.train.inputs, *both.validation.inputs], None)
    targets = label_matrix([*both.train.labels, *both.validation.labels], LABELS)
    plain = OneVsRestClassifier(LogisticRegression(C=1.0, max_iter=1000)).fit(vectors, targets)
    fitted = app.record["calibration"]
    with torch.no_grad():
        logits = setting[0].heads["app"](torch.from_numpy(vectors)).numpy()
    shift = np.log(fitted["threshold"] / (1 - fitted["threshold"]))
    probabilities = expit((logits + shift) * fitted["temperature"])
    np.testing.assert_allclose(probabilities[:, :3], plain.predict_proba(vectors), atol=1e-2)
    assert (probabilities[:, 3] < 1e-6).all()


def test_a_lora_learns_rare_labels_with_balanced_weights(setting):
    settings = FitSettings(steps=60, learning_rate=3e-3, batch_size=4, class_weights="balanced", **FLOAT)
    app = fit_app(data(), "tc", backbone=setting, method="lora", settings=settings)
    assert app.metrics["average_precision"] > 0.6


def test_other_heads_have_no_problem_type():
    for kind, problem in (("token-classification", MULTI_LABEL), ("text-classification", "regression")):
        with pytest.raises(
            AdapterError, match="problem_type is '.*'; it may be 'multi_label_classification'"
        ):
            AdapterHead(kind, ["a"], 32, problem_type=problem)


@pytest.mark.parametrize("problem", ["regression", 3, "multi"])
def test_a_folder_with_another_problem_type_is_refused(tmp_path, load, problem):
    folder = single_label_app(tmp_path, load)
    task = json.loads((folder / "task.json").read_text())
    assert "problem_type" not in task  # old folders and new ones of one label are the same
    (folder / "task.json").write_text(json.dumps(task | {"problem_type": problem}))
    with pytest.raises(AdapterError, match="'problem_type' in task.json"):
        load("bert").load_adapter(folder)
