"""Temperature: fitted on rows that the head was not fitted on, and no best label changes."""

import json

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from test_apps import FLOAT, TEXTS, ner_data, tc_data

from modeling_mtpf.adaptation import FitSettings, app, fit_app
from modeling_mtpf.adaptation.calibration import MOST, HeldOut, calibrate, fit_temperature
from modeling_mtpf.adaptation.methods.probe import choose_by_folds
from modeling_mtpf.adaptation.tagged_texts import TaggedTexts
from modeling_mtpf.adaptation.text_vectors import embed_texts
from modeling_mtpf.data.app_data import Examples
from modeling_mtpf.data.words import load_word_tokenizer
from modeling_mtpf.metrics import expected_calibration_error


@pytest.fixture
def setting(load, encoders):
    return load("bert"), load_word_tokenizer(str(encoders["bert"]))


def drawn(temperature: float, rows: int = 4000, labels: int = 5) -> HeldOut:
    """Logits whose softmax at the temperature is the distribution of the labels."""
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(rows, labels)) * 3 * temperature
    draws = (softmax(scores / temperature, axis=1).cumsum(1) < generator.random((rows, 1))).sum(1)
    return HeldOut(scores, draws)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_known_temperature_is_found(temperature):
    held_out = drawn(temperature)
    assert fit_temperature(held_out) == pytest.approx(temperature, rel=0.05)
    assert held_out.calibration_error(temperature) < 0.02
    best = held_out.scores.argmax(1)
    right_or_wrong = HeldOut(held_out.scores, np.where(best == held_out.targets, best, -100))
    assert fit_temperature(right_or_wrong) == pytest.approx(temperature, rel=0.05)
    log_probabilities = HeldOut(log_softmax(held_out.scores, axis=1), held_out.targets)
    assert fit_temperature(log_probabilities) == pytest.approx(fit_temperature(held_out))


def test_few_rows_and_perfect_rows_stay_moderate():
    scores = np.eye(3)[[0, 1, 2, 0]] * 4
    assert 0.3 < fit_temperature(HeldOut(scores, np.array([0, 1, 2, 0]))) < 1
    assert 1 < fit_temperature(HeldOut(scores, np.array([1, 2, 0, 1]))) < MOST
    assert 1 < fit_temperature(HeldOut(scores, np.full(4, -100))) < MOST
    nothing = HeldOut(np.zeros((0, 3)), np.zeros(0, int))
    assert fit_temperature(nothing) == pytest.approx(1, abs=1e-3)
    assert calibrate(torch.nn.Linear(2, 3), nothing)["ece_before"] == 0


def test_the_calibration_error_is_a_count_over_bins():
    generator = np.random.default_rng(1)
    scores = np.append(generator.random(500), [0.0, 1.0, 1.0])
    right = np.append(generator.random(500) < 0.4, [False, True, False])
    expected = 0.0
    for low in range(15):
        inside = [i for i, s in enumerate(scores) if low <= s * 15 < low + 1 or (s == 1 and low == 14)]
        if inside:
            distance = abs(np.mean(scores[inside]) - np.mean(right[inside]))
            expected += len(inside) / len(scores) * distance
    assert expected_calibration_error(scores, right) == pytest.approx(expected)
    assert expected_calibration_error(np.zeros(0), np.zeros(0, bool)) == 0


def seen(monkeypatch) -> list[HeldOut]:
    """Collect what apps are calibrated on."""
    rows: list[HeldOut] = []
    monkeypatch.setattr(
        app, "calibrate", lambda head, held_out: rows.append(held_out) or calibrate(head, held_out)
    )
    return rows  # fmt: skip


def test_a_probe_is_calibrated_on_rows_that_it_was_not_fitted_on(setting, monkeypatch):
    rows = seen(monkeypatch)
    data = tc_data(3)
    data.validation = Examples([f"{text} {text}" for text in TEXTS], data.train.labels[::-1])
    fitted = fit_app(data, "tc", backbone=setting, method="probe", settings=FitSettings(**FLOAT))
    vectors = [embed_texts(*setting, split.inputs, None) for split in (data.train, data.validation)]
    chosen = fitted.record["seeds"]["0"]["C"]
    plain = LogisticRegression(C=chosen, max_iter=1000).fit(vectors[0], data.train.labels)
    np.testing.assert_allclose(rows[0].scores, plain.predict_log_proba(vectors[1]), atol=1e-3)
    assert [plain.classes_[target] for target in rows[0].targets] == data.validation.labels


def test_folds_calibrate_on_what_each_was_not_fitted_on():
    generator = np.random.default_rng(0)
    labels = generator.choice(["a", "b", "c"], 60).tolist()
    vectors = 0.1 * (
        generator.normal(size=(60, 4)) + np.array([ord(label) - 98 for label in labels])[:, None]
    )
    strength, result = choose_by_folds(vectors, labels)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    probe = LogisticRegression(C=strength, max_iter=1000)
    expected = cross_val_predict(probe, vectors, labels, cv=folds, method="predict_proba")
    order = [list("abc").index(label) for label in dict.fromkeys(labels)]
    np.testing.assert_allclose(np.exp(result.held_out.scores), expected[:, order], atol=1e-6)


def entities(temperature: float, count: int = 3000) -> HeldOut:
    """Entities of one to three words, right as often as the mean probability of the words' labels says."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 4, count)
    scores = generator.normal(size=(sizes.sum(), 5)) * 3 * temperature
    numbers = np.repeat(np.arange(count), sizes)
    rows = HeldOut(scores, scores.argmax(1), None, numbers, np.zeros(count, bool))
    each = softmax(scores / temperature, axis=1).max(1)
    means = np.array([each[numbers == entity].mean() for entity in range(count)])
    np.testing.assert_allclose(rows.entity_scores(temperature), means)
    rows.right = generator.random(count) < means
    return rows


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_score_of_an_entity_says_how_often_it_is_right(temperature):
    """Not those of its words: that of a word says little where all of an entity must be right."""
    rows = entities(temperature)
    assert fit_temperature(rows) == pytest.approx(temperature, rel=0.07)
    assert rows.calibration_error(temperature) < 0.03 < rows.calibration_error(temperature * 3)
    nothing = HeldOut(np.zeros((0, 3)), np.zeros(0, int), None, np.zeros(0, int), np.zeros(0, bool))
    assert fit_temperature(nothing) == pytest.approx(1, abs=1e-3) and nothing.calibration_error() == 0


def test_an_entity_is_right_where_all_of_it_is(setting):
    """One entity is right, one too short, one of another type, one is none, one is missed."""
    labels = ["O", "B-A", "I-A", "B-B", "I-B"]
    sentence = "Ada met in London Paris Rome is good bad".split()
    gold = ["B-A", "O", "B-A", "I-A", "B-B", "O", "O", "B-C", "B-B"]
    told = ["B-A", "O", "B-A", "O", "B-A", "B-B", "I-B", "O", "O"]
    texts = TaggedTexts(setting[1], Examples([sentence, ["Hi"]], [gold, ["O"]]), labels, 64)
    scores = [np.eye(5)[[labels.index(tag) for tag in tags]] for tags in (told, ["O"])]
    rows = texts.held_out(scores)
    assert [labels[best] for best in rows.targets] == ["B-A", "B-A", "B-A", "B-B", "I-B"]
    assert rows.entities.tolist() == [0, 1, 2, 3, 3] and rows.right.tolist() == [True, False, False, False]
    np.testing.assert_array_equal(rows.scores.argmax(1), rows.targets)
    empty = TaggedTexts(setting[1], Examples([["Hi"]], [["O"]]), labels, 64).held_out([scores[1]])
    assert empty.scores.shape == (0, 5) and not len(empty.right)


@pytest.mark.parametrize("family", ["ner", "tc"])
def test_labels_and_entities_are_those_without_temperature(setting, tmp_path, load, family):
    """By LoRA; the folder alone gives the calibrated scores."""
    model, tokenizer = setting
    data = ner_data() if family == "ner" else tc_data(3)
    settings = FitSettings(steps=40, learning_rate=3e-3, batch_size=4, stored_dtype="float32", **FLOAT)
    fitted = fit_app(
        data, family, backbone=setting, method="lora", output_dir=tmp_path / "app", settings=settings
    )
    after = model.predict(TEXTS, adapters=["app"], tokenizer=tokenizer)["app"]
    stored = json.loads((tmp_path / "app" / "task.json").read_text())["calibration"]
    assert stored == fitted.record["calibration"] and stored["temperature"] != 1
    assert f"{stored['ece_after']:.3f} with it" in (tmp_path / "app" / "README.md").read_text()
    assert f"{stored['ece_after']:.4f}  (temperature" in str(fitted)
    again = load("bert")
    again.load_adapter(tmp_path / "app")
    assert again.predict(TEXTS, adapters=["app"], tokenizer=tokenizer)["app"] == after
    with torch.no_grad():
        for parameter in model.heads["app"].parameters():
            parameter.mul_(stored["temperature"])
    before = model.predict(TEXTS, adapters=["app"], tokenizer=tokenizer)["app"]
    keys = ("label",) if family == "tc" else ("entity_group", "start", "end")
    flat = [[rows] if family == "tc" else rows for rows in (*before, *after)]
    chosen = [[tuple(row[key] for key in keys) for row in rows] for rows in flat]
    assert chosen[: len(TEXTS)] == chosen[len(TEXTS) :] and any(chosen) and before != after
