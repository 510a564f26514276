"""Out of scope: fitted with an app, stored next to its head, and the same wherever it is asked."""

import json
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from test_apps import FLOAT, tc_data

from modeling_mtpf import AdapterError, MtpfModel
from modeling_mtpf.adaptation import FitSettings, fit_app
from modeling_mtpf.adaptation.methods.probe import fit_probe
from modeling_mtpf.adaptation.scope import fit_scope
from modeling_mtpf.data.words import load_word_tokenizer
from modeling_mtpf.hub.checks import check_adapter
from modeling_mtpf.model.scope_mtpf import SCOPE_FILE, Scope


@pytest.fixture
def setting(load, encoders):
    return load("bert"), load_word_tokenizer(str(encoders["bert"]))


def drawn(labels: int = 6, width: int = 20, rows: int = 400):
    """Vectors around one point for each label, and a head that tells them apart."""
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(labels, width))
    targets = generator.integers(labels, size=rows)
    vectors = centers[targets] + 0.3 * generator.normal(size=(rows, width))
    head = types.SimpleNamespace(weight=torch.tensor(3 * centers), bias=torch.zeros(labels))
    return head, vectors, targets, centers, generator


def test_texts_between_the_labels_are_out_of_scope():
    head, vectors, targets, centers, generator = drawn()
    logits = vectors @ head.weight.numpy().T
    scope = fit_scope(head, vectors[:300], targets[:300], logits[300:])
    assert np.mean(scope.scores(logits[300:]) >= scope.threshold) == pytest.approx(0.95, abs=0.01)
    between = (centers[[0, 1, 2]] + centers[[3, 4, 5]]) / 2
    assert not any(scope.contains(row) for row in (between @ head.weight.numpy().T).astype(np.float32))
    assert scope.scores(logits + 7.0) == pytest.approx(scope.scores(logits), abs=1e-3)  # as in a softmax
    again = Scope(**{key: value.astype(np.float32) for key, value in scope.tensors().items()})
    assert (again.scores(logits) == scope.scores(logits)).all()


@pytest.mark.parametrize("each", [1, 2])
def test_few_texts_and_labels_without_any(each):
    head, vectors, targets, *_ = drawn()
    rows = np.concatenate([np.flatnonzero(targets == label)[:each] for label in (0, 2, 3)])
    scope = fit_scope(head, vectors[rows], targets[rows], np.zeros((0, 6)))
    assert scope.means.shape == (3, 2) and not scope.projection[[1, 4, 5]].any()
    assert np.isfinite(scope.scores(np.random.default_rng(0).normal(size=(50, 6)) * 1e4)).all()


@pytest.mark.parametrize("method", ["probe", "lora"])
def test_an_app_says_what_is_in_scope(setting, tmp_path, method, encoders):
    folder = tmp_path / "intent"
    settings = FitSettings(**FLOAT, steps=4 if method == "lora" else 0)
    app = fit_app(tc_data(), "tc", backbone=setting, method=method, output_dir=folder, settings=settings)
    texts = [*tc_data().train.inputs[:4], "zebra " * 200, ""]
    results = app.model.predict(texts, adapters=["intent"], in_scope=True)["intent"]
    plain = app.model.predict(texts, adapters=["intent"])["intent"]
    assert [{**row, "in_scope": None} for row in plain] == [{**row, "in_scope": None} for row in results]
    assert {type(row["in_scope"]) for row in results} == {bool}
    assert app.record["calibration"]["in_scope"] == 0.95
    assert "held-out texts in scope           0.95" in str(app)
    assert (
        "`in_scope=True`" in (folder / "README.md").read_text()
        and "95 %" in (folder / "README.md").read_text()
    )
    assert (folder / SCOPE_FILE).stat().st_size < 5_000
    check_adapter(folder)
    model = MtpfModel.from_pretrained(encoders["bert"]).eval()
    model.load_adapter(folder)
    tokenizer = setting[1]
    loaded = model.predict(texts, adapters=["intent"], in_scope=True, tokenizer=tokenizer)["intent"]
    assert [row["in_scope"] for row in loaded] == [row["in_scope"] for row in results]
    command = ["-m", "modeling_mtpf.cli", "predict", "--in_scope", "--backbone", str(encoders["bert"])]
    lines = "\n".join([*texts[:4], "zebra " * 200]) + "\n"
    run = subprocess.run(
        [sys.executable, *command, "--adapter", str(folder)], input=lines, capture_output=True, text=True
    )
    rows = [json.loads(line)["results"]["intent"]["in_scope"] for line in run.stdout.splitlines()]
    assert rows == [row["in_scope"] for row in results[:5]], run.stderr
    model.save_adapter(tmp_path / "again", "intent")
    assert (tmp_path / "again" / SCOPE_FILE).read_bytes() == (folder / SCOPE_FILE).read_bytes()
    (folder / SCOPE_FILE).unlink()  # as older versions wrote it
    model.load_adapter(folder, replace=True)
    assert model.predict(texts, adapters=["intent"], tokenizer=tokenizer)["intent"]
    with pytest.raises(AdapterError, match="'intent' cannot say what is out of scope: it has no record"):
        model.predict(texts, adapters=["intent"], in_scope=True, tokenizer=tokenizer)


@pytest.mark.parametrize("method", ["lora", "auto"])
def test_the_threshold_is_that_of_the_app_that_has_not_seen_the_held_out_texts(setting, method, monkeypatch):
    if method == "auto":
        monkeypatch.setattr("modeling_mtpf.adaptation.methods.auto.fit_probe", worst_probe)
    made = []
    for refit in (False, True):
        settings = FitSettings(**FLOAT, steps=40, stored_dtype="float32", refit=refit)
        app = fit_app(tc_data(), "tc", method=method, backbone=setting, settings=settings, name="intent")
        made.append((app.model.heads["intent"].scope, app.record["calibration"]))
        setting[0].delete_adapter("intent")
    (plain, calibration), (refitted, calibrated) = made
    assert refitted.threshold == pytest.approx(plain.threshold, rel=1e-4)
    assert calibration == calibrated and not np.allclose(plain.means, refitted.means)


def worst_probe(*arguments):
    result = fit_probe(*arguments)
    result.score = -1.0
    return result


def test_held_out_columns_follow_the_labels(setting):
    data = tc_data()
    app = fit_app(data, "tc", backbone=setting, method="probe", name="intent", settings=FitSettings(**FLOAT))
    other = tc_data()
    other.labels = list(reversed(other.labels))
    second = fit_app(
        other, "tc", backbone=setting, method="probe", name="again", settings=FitSettings(**FLOAT)
    )
    scopes = [fitted.model.heads[fitted.name].scope for fitted in (app, second)]
    assert scopes[0].threshold == pytest.approx(scopes[1].threshold, abs=0.02)


def test_a_scope_that_does_not_fit_is_refused(folders, entities, tmp_path):
    from safetensors.numpy import save_file

    scope = Scope(np.ones((5, 2)), np.ones((4, 2)), np.ones((2, 2)), np.zeros(()))
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    model.load_adapter(folders / "intent")
    model.heads["intent"].scope = scope
    folder = model.save_adapter(tmp_path / "intent", "intent")
    model.load_adapter(folder, adapter_name="good")
    assert model.heads["good"].scope.threshold == 0
    good = scope.tensors()
    for change in (
        {"projection": np.ones((4, 2), np.float16)},
        {"means": np.ones((6, 2), np.float16)},
        {"means": np.ones((0, 2), np.float16)},
        {"background": np.ones((2, 3), np.float16)},
        {"background": np.full((2, 2), np.nan, np.float16)},
        {"threshold": np.zeros(1, np.float32)},
        {"more": np.zeros(1, np.float32)},
    ):
        save_file({**good, **change}, folder / SCOPE_FILE)
        for read in (lambda: model.load_adapter(folder, adapter_name="bad"), lambda: check_adapter(folder)):
            with pytest.raises(AdapterError, match=SCOPE_FILE):
                read()
    save_file(good, entities / SCOPE_FILE)
    with pytest.raises(AdapterError, match="of another app"):
        model.load_adapter(entities)


def test_who_cannot_be_asked(folders):
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    for name in ("intent", "entities"):
        model.load_adapter(folders / name)
    assert model.predict(["Ada"], adapters=["entities"], in_scope=True) == model.predict(
        ["Ada"], adapters=["entities"]
    )
    with pytest.raises(ValueError, match="leave top_k, which is 3, at 1"):
        model.predict(["Ada"], adapters=["intent"], in_scope=True, top_k=3)
    model.heads["intent"].problem_type = "multi_label_classification"
    with pytest.raises(AdapterError, match="it may give several labels or none; leave out"):
        model.predict(["Ada"], adapters=["intent"], in_scope=True)
    assert json.dumps(model.predict(["Ada"], adapters=["intent"]))
