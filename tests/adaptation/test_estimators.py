"""Apps from lists, as a scikit-learn classifier, and from the names of labels alone."""

import json
import pickle

import numpy as np
import pandas
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks as checks
from test_apps import FLOAT, TEXTS, ner_data

from modeling_mtpf import MtpfModel
from modeling_mtpf.adaptation import FitSettings, fit_app, zero_shot_app
from modeling_mtpf.cli.main import main
from modeling_mtpf.data.words import load_word_tokenizer
from modeling_mtpf.errors import MtpfError
from modeling_mtpf.hub.checks import check_adapter
from modeling_mtpf.sklearn import MtpfClassifier

LABELS = [f"label {i % 2}" for i in range(len(TEXTS))]
CHECKS = [
    checks.check_do_not_raise_errors_in_init_or_set_params,
    checks.check_estimator_cloneable,
    checks.check_estimator_repr,
    checks.check_estimator_tags_renamed,
    checks.check_estimators_unfitted,
    checks.check_get_params_invariance,
    checks.check_mixin_order,
    checks.check_no_attributes_set_in_init,
    checks.check_parameters_default_constructible,
    checks.check_set_params,
    checks.check_valid_tag_types,
]
"""scikit-learn's checks that apply: `check_estimator` leaves out all others, as they fit tables of numbers, of
which columns, types, missing or sparse values and weights are checked, and texts have none of these."""


@pytest.fixture
def setting(load, encoders):
    return load("bert"), load_word_tokenizer(str(encoders["bert"]))


@pytest.fixture
def classifier(encoders):
    return MtpfClassifier(backbone=str(encoders["bert"]))


def test_texts_and_labels_are_enough(setting):
    settings = FitSettings(**FLOAT)
    app = fit_app(TEXTS, LABELS, backbone=setting, method="probe", name="one", settings=settings)
    frame = pandas.DataFrame({"text": TEXTS})
    fit_app((frame, np.array(LABELS)), backbone=setting, method="probe", name="two", settings=settings)
    results = app.model.predict(TEXTS, adapters=["one", "two"])
    assert results["one"] == results["two"] and app.record["family"] == "tc"
    several = pandas.DataFrame({"moods": [(label, "all") for label in LABELS]})
    moods = fit_app(
        pandas.Series(TEXTS), several, backbone=setting, method="probe", name="moods", settings=settings
    )
    assert moods.model.heads["moods"].problem_type
    data = ner_data().train
    tags = fit_app(
        data.inputs, data.labels, backbone=setting, name="tags", settings=FitSettings(**FLOAT, steps=2)
    )
    spans = [[{"start": 0, "end": 3, "label": "PER"}] for _ in TEXTS]
    entities = fit_app(TEXTS, spans, backbone=setting, name="spans", settings=settings)
    assert tags.record["family"] == entities.record["family"] == "ner"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((TEXTS, LABELS[1:]), "texts but"),
        ((TEXTS,), "Give the family, ner or tc, or a label for each text"),
        (([], []), "There are 0 texts"),
        (((TEXTS, "abc"),), "labels must be a list, array or Series, .* not str"),
        ((dict.fromkeys(TEXTS), LABELS), "texts must be a list, .* not dict"),
        ((pandas.DataFrame({"a": TEXTS, "b": TEXTS}), LABELS), "texts is a table with the columns a, b; give one"),
        ((TEXTS, np.eye(len(TEXTS), dtype=int)), "labels of a text are numbers; give a list of their names"),
        (((TEXTS, [[True, False]] * len(TEXTS)), "tc"), "labels of a text are numbers"),
        ((TEXTS, [None, *LABELS[1:]]), "row 1: a text and a label are needed, not .* 'None'"),
        ((TEXTS, [["a", "b"], *LABELS[1:]]), "row 2 has the label .* either all texts have a list"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(setting, arguments, message):
    with pytest.raises(MtpfError, match=message) as caught:
        fit_app(*arguments, backbone=setting)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_passes_the_estimator_checks_that_apply(classifier, check):
    check("MtpfClassifier", classifier)


@pytest.mark.filterwarnings("ignore:Can't test estimator")
def test_it_passes_check_estimator(classifier):
    assert checks.check_estimator(classifier)


def test_a_classifier_predicts_clones_and_pickles(classifier):
    with pytest.raises(NotFittedError):
        classifier.predict(TEXTS)
    labels = np.array([7, 3] * len(TEXTS))[: len(TEXTS)]
    assert classifier.fit(TEXTS, labels) is classifier
    probabilities, frame = classifier.predict_proba(TEXTS), pandas.DataFrame({"text": TEXTS})
    assert classifier.classes_.tolist() == [3, 7] and probabilities.shape == (len(TEXTS), 2)
    assert probabilities.sum(1) == pytest.approx(1, abs=1e-5)
    assert (classifier.predict(np.array(TEXTS)) == classifier.classes_[probabilities.argmax(1)]).all()
    data = pickle.dumps(classifier)
    assert len(data) < 200_000  # the app alone
    assert pickle.loads(data).predict_proba(TEXTS) == pytest.approx(probabilities, abs=1e-6)
    with pytest.raises(NotFittedError):
        clone(classifier).predict(TEXTS)
    for wrong in ("a text", [1, 2], [["a"]]):
        with pytest.raises(ValueError, match="X must be a list, array or Series"):
            classifier.predict(wrong)
    for wrong, message in (
        ({"text": TEXTS}, "not dict"),
        (frame.assign(more=1), "columns text, more; give one"),
    ):
        with pytest.raises(ValueError, match=message):
            classifier.predict(wrong)
    assert (classifier.predict_proba(frame) == probabilities).all()


@pytest.mark.parametrize(
    "y, message",
    [
        (None, "y must be a list"),
        ([None, *LABELS[1:]], "y holds None at position 0; every text needs a label"),
        ([float("nan"), *LABELS[1:]], "y holds nan at position 0"),
        (pandas.Series([*LABELS[1:], pandas.NA], dtype=object), "y holds <NA> at position"),
        (np.array(LABELS)[:, None], r"y holds \['label 0'\] at position 0; give one label a text"),
        ([["a", "b"], *LABELS[1:]], "give one label a text, or use fit_app"),
        ([number + 0.5 for number in range(len(TEXTS))], "Unknown label type: continuous"),
        (["a"] * len(TEXTS), r"y has \['a'\] alone; at least two"),
        (LABELS[1:], "texts but"),
    ],
)
def test_a_classifier_needs_one_label_a_text(classifier, y, message):
    with pytest.raises(ValueError, match=message) as caught:
        classifier.fit(TEXTS, y)
    assert "\n" not in str(caught.value)


def test_a_classifier_in_a_pipeline_and_a_grid(classifier):
    pipeline = make_pipeline(FunctionTransformer(lambda texts: [text.lower() for text in texts]), classifier)
    grid = GridSearchCV(pipeline, {"mtpfclassifier__max_length": [8, 16]}, cv=2, error_score="raise")
    grid.fit(TEXTS * 2, LABELS * 2)
    assert set(grid.predict(TEXTS)) <= set(LABELS) and len(grid.cv_results_["mean_test_score"]) == 2


def test_an_app_of_label_names_alone(encoders, tmp_path, capsys):
    folder, rows = tmp_path / "topic", tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"{text.replace(',', '')},alarm\n" for text in TEXTS))
    labels = ["set_alarm", "alarm", "Ada Lovelace"]
    backbone = str(encoders["bert"])
    app = zero_shot_app(labels, backbone=backbone, output_dir=folder, test=str(rows))
    card = (folder / "README.md").read_text()
    assert "no training texts, 3 label names alone; scores are not calibrated" in card
    assert 0 <= app.metrics["accuracy"] <= 1 and json.dumps(app.record)
    check_adapter(folder)
    model = MtpfModel.from_pretrained(backbone).eval()
    model.load_adapter(folder)
    names = ["set alarm", "alarm", "Ada Lovelace"]  # each name is nearest to itself
    found = model.predict(names, adapters=["topic"], tokenizer=load_word_tokenizer(backbone))["topic"]
    assert [row["label"] for row in found] == labels
    options = ["--family", "tc", "--zero_shot", "--labels", "a b,c d", "--backbone", backbone]
    main(["adapt", *options, "--output_dir", str(tmp_path / "cli")])
    assert "It has not been evaluated." in (tmp_path / "cli" / "README.md").read_text()
    rows.write_text("à,a b\né,other\n", "latin-1")
    options += ["--test", str(rows), "--columns.text", "1", "--columns.label", "2", "--encoding", "latin-1"]
    capsys.readouterr()
    main(["adapt", *options, "--output_dir", str(tmp_path / "scored")])
    assert "'labels': ['other'], 'count': 1" in capsys.readouterr().out
    rows.write_text('{"text": "a", "label": ["a b", "c d"]}\n')
    with pytest.raises(MtpfError, match="gives a text one label, but the texts of --test have lists"):
        zero_shot_app(["a b", "c d"], test=rows.rename(tmp_path / "rows.jsonl"))
    with pytest.raises(MtpfError, match="columns and encoding say how --test is read"):
        zero_shot_app(["a b", "c d"], encoding="latin-1")


@pytest.mark.parametrize("labels", [["a"], ["a", "a"]])
def test_labels_that_tell_nothing_apart_are_refused(labels):
    with pytest.raises(MtpfError, match="at least two different labels"):
        zero_shot_app(labels)
