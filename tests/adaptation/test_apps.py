"""Fitting apps on the frozen backbone: what changes, what does not, and what comes back from disk."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from tokenizers.normalizers import BertNormalizer

from modeling_mtpf import AdapterError, AdapterHead
from modeling_mtpf.adaptation import FitSettings, fit_app
from modeling_mtpf.adaptation.methods import auto, lora, probe
from modeling_mtpf.adaptation.methods.probe import STRENGTHS, choose_by_folds, choose_probe
from modeling_mtpf.adaptation.methods.registry import METHODS, register_method
from modeling_mtpf.adaptation.settings import FitResult, LoraShape
from modeling_mtpf.adaptation.tagged_texts import TaggedTexts
from modeling_mtpf.adaptation.tail_training import (
    add_app,
    app_parameters,
    label_weights,
    shuffled_batches,
    train_tail,
)
from modeling_mtpf.adaptation.text_vectors import embed_texts
from modeling_mtpf.adaptation.trunk_cache import TrunkCache
from modeling_mtpf.cli.main import main
from modeling_mtpf.data.app_data import AppData, Examples
from modeling_mtpf.data.backbones import open_backbone
from modeling_mtpf.data.batches import row_batches
from modeling_mtpf.data.encoding import encode_rows
from modeling_mtpf.data.spans import join_words
from modeling_mtpf.data.words import load_word_tokenizer
from modeling_mtpf.errors import MissingExtraError, MtpfError, RecipeError, require_extra
from modeling_mtpf.model.adapter_files_mtpf import (
    ADAPTER_WEIGHTS_FILE,
    HEAD_FILE,
    backbone_sha256,
    lora_state_dict,
)
from modeling_mtpf.model.modeling_mtpf import mean_pool
from modeling_mtpf.model.predict_mtpf import load_tokenizer, text_tokenizer
from modeling_mtpf.model.trunk_mtpf import lora_modules, run_tail
from train import adapt

NAMES, PLACES = ["Ada", "Noor", "Grace", "Alan"], ["London", "Paris", "Rome"]
TOKENS = [[name, "is", "in", place, "."] for name in NAMES for place in PLACES]
TAGS = [["B-PER", "O", "O", "B-LOC", "O"] for _ in TOKENS]
TEXTS = [" ".join(words) for words in TOKENS]
FLOAT = {"mixed_precision": "float32"}


def ner_data() -> AppData:
    examples = Examples(TOKENS, TAGS)
    return AppData("ner", ["B-PER", "O", "B-LOC"], examples, examples, examples)


def tc_data(num_labels: int = 2) -> AppData:
    examples = Examples(TEXTS, [f"label {9 - i % num_labels}" for i in range(len(TEXTS))])
    return AppData("tc", list(dict.fromkeys(examples.labels)), examples, examples, examples)


@pytest.fixture
def setting(load, encoders):
    return load("bert", {"ner": None, "tc": None}), load_word_tokenizer(str(encoders["bert"]))


@pytest.fixture
def family_adapter(load, tmp_path):
    """Folder of a family's LoRA with random weights."""
    return load("bert", {"ner": None}).save_adapter(tmp_path / "tpl" / "ner", "ner")


@pytest.mark.parametrize("start", [True, False])
def test_a_token_app_learns_and_leaves_everything_else_alone(setting, family_adapter, tmp_path, start, load):
    model, tokenizer = setting
    model.requires_grad_(True)
    digest, before = backbone_sha256(model.backbone), {n: p.clone() for n, p in model.named_parameters()}
    app = fit_app(
        ner_data(),
        "ner",
        backbone=(model, tokenizer),
        adapter=family_adapter if start else None,
        output_dir=tmp_path / "people",
        settings=FitSettings(steps=150, learning_rate=3e-3, batch_size=4, **FLOAT),
    )
    assert app.metrics["entity_f1"] > 0.9 and app.metrics["validation_entity_f1"] == app.metrics["entity_f1"]
    assert backbone_sha256(model.backbone) == digest and model.adapters == ["ner", "tc", "people"]
    after = {n.replace(".base_layer", ""): value for n, value in model.named_parameters()}
    assert all(torch.equal(after[n.replace(".base_layer", "")], value) for n, value in before.items())
    assert all(p.grad is None for p in model.parameters())
    task = json.loads((tmp_path / "people" / "task.json").read_text())
    assert task["labels"] == ["B-PER", "O", "B-LOC"] and task["start"] == ("ner" if start else "fresh")
    assert task["backbone"]["sha256"] == digest and task["metrics"] == app.metrics
    assert (tmp_path / "people" / "README.md").read_text().startswith("---\n")
    again = load("bert")
    again.load_adapter(tmp_path / "people")
    texts = [" ".join(words) for words in TOKENS]
    results = again.predict(texts, adapters=["people"], tokenizer=tokenizer)
    assert results == model.predict(texts, adapters=["people"], tokenizer=tokenizer) and any(
        results["people"]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["people", "tpl"]  # nothing half-written


def test_an_app_starts_as_a_copy_of_the_family(setting, family_adapter, batch):
    model, tokenizer = setting
    settings = FitSettings(steps=1, learning_rate=0.0, stored_dtype="float32")
    app = fit_app(ner_data(), "ner", backbone=(model, tokenizer), adapter=family_adapter, settings=settings)
    with torch.no_grad():
        states = model.encode_adapters(["ner", app.name], **batch("bert"))
    assert torch.equal(states["ner"], states["app"])


@pytest.mark.parametrize("shape", [{"layers": 3}, {"r": 40}, {"targets": ["all"]}, {"layers": 4, "r": 33}])
def test_a_larger_lora_starts_as_the_family_does(setting, family_adapter, batch, shape):
    """What is added has no effect before it is trained, and is trained."""
    model, tokenizer = setting
    options = {"backbone": (model, tokenizer), "adapter": family_adapter}
    untrained = FitSettings(
        steps=1, learning_rate=0.0, stored_dtype="float32", lora=LoraShape(**shape), **FLOAT
    )
    fit_app(ner_data(), "ner", name="still", settings=untrained, **options)
    with torch.no_grad():
        states = model.encode_adapters(["ner", "still"], **batch("bert"))
    torch.testing.assert_close(states["ner"], states["still"], atol=1e-5, rtol=1e-5)
    app = fit_app(
        ner_data(),
        "ner",
        name="moved",
        settings=replace(untrained, steps=4, evaluations=1, learning_rate=1e-3),
        **options,
    )
    config, first = model.backbone.peft_config["moved"], model.backbone.peft_config["ner"]
    assert model.adapter_depth("moved") == shape.get("layers", 2) and config.r == shape.get("r", first.r)
    assert config.lora_alpha / config.r == first.lora_alpha / first.r
    assert app.record["settings"]["lora"] == {"layers": None, "r": None, "targets": None, **shape}
    before, after = (lora_state_dict(model.backbone, name) for name in ("still", "moved"))
    assert all(not torch.equal(after[key], value) for key, value in before.items() if "lora_B" in key)


@pytest.mark.parametrize(
    "shape, reason",
    [({"layers": 1}, "it has a LoRA at"), ({"r": 8}, "its rank is 32"), ({"layers": 99}, "has 4")],
)
def test_a_shape_without_room_for_the_start_is_refused(setting, family_adapter, shape, reason):
    settings = FitSettings(steps=1, lora=LoraShape(**shape))
    with pytest.raises(AdapterError, match=reason):
        fit_app(ner_data(), "ner", backbone=setting, adapter=family_adapter, settings=settings)
    assert setting[0].adapters == ["ner", "tc"]


@pytest.mark.parametrize("num_labels", [2, 3])
def test_a_text_app_is_sklearns_probe(setting, family_adapter, num_labels):
    model, tokenizer = setting
    data = tc_data(num_labels)
    app = fit_app(
        data,
        "tc",
        backbone=(model, tokenizer),
        adapter=family_adapter,
        method="probe",
        settings=FitSettings(**FLOAT),
    )
    vectors = embed_texts(model, tokenizer, TEXTS, "ner")
    chosen = app.record["seeds"]["0"]["C"]
    both = np.concatenate([vectors, vectors]), data.train.labels * 2  # train and validation
    probe = LogisticRegression(C=chosen, max_iter=1000).fit(*both)
    with torch.no_grad():
        logits = model.heads["app"](torch.from_numpy(vectors)) * app.record["calibration"]["temperature"]
        found = logits.softmax(-1).numpy()
    columns = [list(probe.classes_).index(label) for label in model.heads["app"].labels]
    np.testing.assert_allclose(found, probe.predict_proba(vectors)[:, columns], atol=5e-3)
    predicted = model.predict(TEXTS, adapters=["app"], tokenizer=tokenizer)["app"]
    assert [row["label"] for row in predicted] == probe.predict(vectors).tolist()
    assert app.metrics["accuracy"] == pytest.approx(probe.score(vectors, data.train.labels), abs=1e-4)


@pytest.mark.parametrize("better", ["probe", "lora"])
def test_auto_keeps_the_method_that_validation_prefers(setting, monkeypatch, better):
    model, tokenizer = setting
    for method in (probe, lora):
        fit = METHODS["tc", method.__name__.rpartition(".")[2]]

        def scored(*arguments, fit=fit):
            result = fit(*arguments)
            result.score = 0.9 if fit.__name__ == f"fit_{better}" else 0.5
            return result

        monkeypatch.setattr(auto, fit.__name__, scored)
    app = fit_app(tc_data(3), "tc", backbone=setting, settings=FitSettings(steps=2, **FLOAT))
    assert app.record["method"] == better and model.adapters == ["ner", "tc", "app"]
    assert model.adapter_depth("app") == (1 if better == "probe" else 2)  # no trace of the other
    scores = {"probe": 0.5, "lora": 0.5, better: 0.9}
    assert app.record["seeds"]["0"]["validation_accuracy_by_method"] == scores


def test_a_probe_is_refitted_with_validation_rows_of_known_labels(setting):
    data = tc_data(2)
    data.validation = Examples([*TEXTS, "a new one"], [*data.train.labels, "new"])
    app = fit_app(data, "tc", backbone=setting, method="probe", settings=FitSettings(**FLOAT))
    vectors = embed_texts(*setting, [*TEXTS, *TEXTS], None)
    chosen = app.record["seeds"]["0"]["C"]
    expected = LogisticRegression(C=chosen, max_iter=1000).fit(vectors, [*data.train.labels] * 2)
    with torch.no_grad():
        logits = setting[0].heads["app"](torch.from_numpy(vectors)) * app.record["calibration"]["temperature"]
        result = logits.softmax(-1).numpy()
    columns = [list(expected.classes_).index(label) for label in data.labels]
    np.testing.assert_allclose(result, expected.predict_proba(vectors)[:, columns], atol=5e-3)


def test_the_strength_of_a_probe_is_the_best_of_all():
    """Accuracy stays at that of the larger class until regularisation is weak enough."""
    generator = np.random.default_rng(0)
    labels = generator.choice(["a", "b"], 400, p=[0.8, 0.2])
    vectors = generator.normal(size=(400, 4)) + 2 * (labels == "b")[:, None]
    halves = [(0.02 * vectors[i::2], labels[i::2].tolist()) for i in (0, 1)]
    probe, result = choose_probe(*halves[0], *halves[1])
    scores = {}
    for strength in STRENGTHS:
        own = LogisticRegression(C=strength, max_iter=1000).fit(*halves[0])
        loss = log_loss(halves[1][1], own.predict_proba(halves[1][0]))
        scores[strength] = own.score(*halves[1]), -loss
    assert scores[0.1][0] == scores[1.0][0] < scores[100.0][0]
    assert probe.C == max(STRENGTHS, key=scores.get)
    assert result.details == {str(s): round(scores[s][0], 4) for s in STRENGTHS}


@pytest.mark.slow
def test_few_held_out_texts_do_not_choose_the_strength():
    """Folds, against scikit-learn's own; a label with one example is always fitted."""
    generator = np.random.default_rng(0)
    labels = [*generator.choice(["a", "b", "c"], 60).tolist(), "only"]
    vectors = generator.normal(size=(61, 4)) + np.array([ord(label[0]) for label in labels])[:, None]
    strength, result = choose_by_folds(vectors[:60], labels[:60])
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    for own in STRENGTHS:
        probe = LogisticRegression(C=own, max_iter=1000)
        found = cross_val_predict(probe, vectors[:60], labels[:60], cv=folds)
        assert result.details[str(own)] == round(float(np.mean(found == labels[:60])), 4)
    assert result.score == pytest.approx(max(result.details.values()), abs=1e-4)
    assert choose_by_folds(vectors, labels)[0] in STRENGTHS and strength in STRENGTHS
    tiny = ["a", "a", "b"]
    assert choose_by_folds(vectors[:3], tiny)[0] in STRENGTHS


def test_a_text_app_by_lora(setting, family_adapter):
    model, tokenizer = setting
    settings = FitSettings(steps=120, learning_rate=3e-3, batch_size=4, class_weights="balanced", **FLOAT)
    app = fit_app(tc_data(), "tc", backbone=(model, tokenizer), method="lora", settings=settings)
    assert app.metrics["accuracy"] == 1.0 and app.record["seeds"]["0"]["steps"] <= 120


def test_the_best_of_several_seeds_is_kept(setting, monkeypatch):
    """A way of fitting of one's own, whose seeds end at known scores."""
    scores, fitted = {0: 0.2, 1: 0.9, 2: 0.4}, {}
    real = METHODS["ner", "lora"]

    def fit(model, tokenizer, name, data, start_from, settings):
        shape = LoraShape(layers=1 + settings.seed)  # another one for each seed
        real(model, tokenizer, name, data, start_from, replace(settings, lora=shape))
        with torch.no_grad():
            model.heads[name].bias.fill_(settings.seed)
            fitted[settings.seed] = lora_state_dict(model.backbone, name)
        return FitResult(scores[settings.seed], {"entity_f1": scores[settings.seed]})

    monkeypatch.setitem(METHODS, ("ner", "known-scores"), None)  # is taken out again after the test
    register_method("ner", "known-scores")(fit)
    model, tokenizer = setting
    app = fit_app(
        ner_data(),
        "ner",
        backbone=setting,
        method="known-scores",
        seeds=3,
        settings=FitSettings(steps=1, stored_dtype="float32", **FLOAT),
    )
    assert app.record["seed"] == 1 and (model.heads["app"].bias == 1).all()
    weights = lora_state_dict(model.backbone, "app")
    assert weights.keys() == fitted[1].keys() and model.adapter_depth("app") == 2
    assert all(torch.equal(weights[key], value) for key, value in fitted[1].items())
    assert [own["validation_score"] for own in app.record["seeds"].values()] == [0.2, 0.9, 0.4]


def test_early_stopping_restores_the_best_state(setting):
    """Scores are told, so that the third look is the best and the sixth ends the training."""
    model, tokenizer = setting
    settings = FitSettings(steps=40, evaluations=20, patience=3, batch_size=4, learning_rate=2e-3, **FLOAT)
    encoded = encode_rows(tokenizer, TOKENS, 64)
    add_app(model, "app", AdapterHead("token-classification", ["O", "B-PER"], 32), None, LoraShape())
    rows = TrunkCache(model, encoded, 2, settings)
    told, states = [0.1, 0.2, 0.9, 0.3, 0.9, 0.4, 1.0], []

    def score() -> float:
        states.append({n: p.detach().clone() for n, p in model.named_parameters() if "app" in n})
        return told[len(states) - 1]

    found = train_tail(
        model, "app", rows, lambda hidden, _: model.heads["app"](hidden).square().mean(), score, settings
    )
    assert found["validation_scores"] == told[:6] and (found["best_step"], found["steps"]) == (6, 12)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in states[2].items())
    assert any(not torch.equal(states[5][name], value) for name, value in states[2].items())


@pytest.mark.parametrize(
    "size, start, shape, layers, modules, rank",
    [
        (None, False, {}, 4, 6, 16),
        ("small", False, {}, 2, 6, 16),
        ("medium", False, {}, 4, 6, 16),
        ("large", False, {}, 4, 6, 16),  # the encoder has four
        ("small", False, {"r": 3, "layers": 1}, 1, 6, 3),
        ("small", False, {"targets": ["output.dense"]}, 2, 1, 16),
        ("tpl", False, {}, 2, 4, 32),
        (None, True, {}, 2, 4, 32),
        ("tpl", True, {}, 2, 4, 32),
        ("medium", True, {}, 4, 6, 32),
        (None, True, {"layers": 3}, 3, 4, 32),
    ],
)
def test_a_size_is_a_shape(setting, family_adapter, size, start, shape, layers, modules, rank):
    settings = FitSettings(steps=1, size=size, lora=LoraShape(**shape), **FLOAT)
    adapter = family_adapter if start else None
    model = fit_app(ner_data(), "ner", backbone=setting, adapter=adapter, settings=settings).model
    carriers = [module for _, module in lora_modules(model.backbone) if "app" in module.lora_A]
    assert model.adapter_depth("app") == layers and len(carriers) == layers * modules
    assert {module.r["app"] for module in carriers} == {rank}


def test_refitting_leaves_out_texts_with_labels_that_train_lacks(setting):
    data = tc_data(2)
    unknown = Examples([*data.validation.inputs, "a new one"], [*data.validation.labels, "label x"])
    settings = FitSettings(steps=3, refit=True, **FLOAT)
    arguments = replace(data, validation=unknown), "tc"
    app = fit_app(*arguments, method="lora", backbone=setting, settings=settings)
    assert app.record["seeds"]["0"]["refitted_with_validation"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--zero_shot", "--labels", "a,b", "--refit", "true"], "--refit is not for --zero_shot"),
        (["--zero_shot", "--labels", "a,b", "--max_length", "1000"], "max_length is 1000"),
        (["--data", "x.csv", "--rank", "3"], "--rank is for a --bundle"),
        (["--zero_shot", "--data", "x.csv", "--labels", "a,b"], "--zero_shot is for --family tc"),
    ],
)
def test_options_that_would_do_nothing_are_refused(encoders, tmp_path, capsys, arguments, message):
    command = ["adapt", "--family", "tc", *arguments, "--backbone", str(encoders["bert"])]
    assert main([*command, "--output_dir", str(tmp_path / "app")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "app").exists()


def test_an_unknown_size_is_refused():
    with pytest.raises(RecipeError, match="size is 'tiny'; choose one of: tpl, small, medium, large"):
        FitSettings(size="tiny")


@pytest.mark.parametrize("family, method", [("ner", "lora"), ("tc", "lora"), ("tc", "sparse")])
def test_the_lora_of_text_apps_is_refitted_by_default(setting, family, method):
    data = ner_data() if family == "ner" else tc_data()
    options = {"method": method, "backbone": setting, "settings": FitSettings(steps=2, **FLOAT)}
    record = fit_app(data, family, **options).record
    refitted = (family, method) == ("tc", "lora")
    assert record["seeds"]["0"].get("refitted_with_validation", False) is refitted
    assert bool(record["settings"]["refit"]) is refitted
    rows = len(data.train) + (len(data.validation) if refitted else 0)
    assert record["training_data"].endswith(f", {rows} training examples")


@pytest.mark.parametrize("family", ["ner", "tc"])
def test_refitting_takes_all_rows_for_the_best_number_of_passes(setting, family):
    """The weights equal those of a fit on the union that is stopped at that step."""
    data = ner_data() if family == "ner" else tc_data(3)
    data = replace(data, validation=data.train.take([0, 1, 2]), test=None)
    options = dict(steps=20, evaluations=4, patience=1, batch_size=4, **FLOAT)
    app = fit_app(data, family, method="lora", backbone=setting, settings=FitSettings(refit=True, **options))
    details = app.record["seeds"]["0"]
    assert details["refitted_with_validation"] and app.record["calibration"]
    scores = details["validation_scores"]
    assert details["best_step"] == 5 * (1 + scores.index(max(scores)))
    rows = len(data.train)
    assert app.record["training_data"].endswith(f", {rows + 3} training examples")
    union = Examples(
        [*data.train.inputs, *data.train.inputs[:3]], [*data.train.labels, *data.train.labels[:3]]
    )
    steps = round(20 * (1 + 3 / rows))
    stop = round(details["best_step"] * (1 + 3 / rows))
    plain = replace(data, train=union)
    options |= {"steps": steps, "evaluations": steps, "patience": steps, "refit": False}
    settings = FitSettings(**options)
    states = {}

    def scored(trained, name, train, loss_of, score, *rest, **more):
        def state() -> float:
            states[len(states) + 1] = [p.detach().clone() for p in app_parameters(trained, name)]
            return 0.5

        return train_tail(trained, name, train, loss_of, state, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "train_tail", scored)
        fit_app(plain, family, method="lora", name="plain", backbone=setting, settings=settings)
    refitted = app_parameters(setting[0], "app")[:-2]  # the head was scaled by the temperature
    for value, expected in zip(refitted, states[stop], strict=False):
        torch.testing.assert_close(value, expected.half().float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "roberta", "modernbert", "electra"])
@pytest.mark.parametrize("cache_gb", [1.0, 0.0])
def test_cached_trunk_outputs_give_the_states_of_a_plain_pass(load, encoders, architecture, cache_gb):
    model = load(architecture, {"ner": None})
    tokenizer = load_word_tokenizer(str(encoders[architecture]))
    encoded = encode_rows(tokenizer, [*TOKENS, ["Hi"], ["a"] * 40], 64)
    cache = TrunkCache(model, encoded, 2, FitSettings(max_length=64, cache_gb=cache_gb, **FLOAT))
    rows = np.array([3, 12, 13, 0])
    inputs = encoded.inputs(rows, 64)
    with torch.no_grad():
        found = run_tail(model.backbone, cache.batch(rows, 64), "ner")
        expected = model.encode_adapters(["ner"], **inputs)["ner"]
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)


def test_embeddings_equal_one_text_at_a_time(setting):
    model, tokenizer = setting
    texts = ["Ada", "Noor is in London.", "", "a much longer text about Grace and Alan in Rome " * 3]
    found = embed_texts(model, tokenizer, texts, "tc")
    for text, vector in zip(texts, found, strict=True):
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=128)
        with torch.no_grad(), model.use_adapter("tc"):
            expected = mean_pool(model(**inputs)[0], inputs["attention_mask"])[0]
        np.testing.assert_allclose(vector, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_batches_have_every_row_once_in_few_shapes_or_without_padding(precision):
    lengths = np.random.default_rng(0).integers(1, 100, 333)
    batches = row_batches(lengths, 128, torch.device("cpu"), precision, 1024)
    assert sorted(np.concatenate([b.rows[: b.real] for b in batches])) == list(range(333))
    assert all(lengths[b.rows].max() <= b.length for b in batches)
    if precision == "bf16":
        assert len({(len(b.rows), b.length) for b in batches}) == len({b.length for b in batches})
    else:
        assert all(
            len(b.rows) == b.real and len(b.rows) * b.length - lengths[b.rows].sum() <= 48 for b in batches
        )


def test_training_batches_have_every_row_once_a_pass():
    lengths = np.random.default_rng(0).integers(1, 100, 333)
    order = shuffled_batches(lengths, 16, 128, np.random.default_rng(0))
    drawn = [next(order) for _ in range(20)]
    seen = np.concatenate([rows for rows, _ in drawn])
    assert len(set(seen.tolist())) == 320  # 20 whole batches of the first pass, no row twice
    assert all(length % 16 == 0 and 0 <= length - lengths[rows].max() < 16 for rows, length in drawn)
    exact = shuffled_batches(lengths, 16, 128, np.random.default_rng(0), 1)
    assert all(length == lengths[rows].max() for rows, length in (next(exact) for _ in range(20)))


def test_balanced_weights_are_sklearns():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.array([0] * 7 + [1] * 2 + [3])
    found = label_weights(np.bincount(labels), "balanced").numpy()
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    np.testing.assert_allclose(found, [expected[0], expected[1], 0, expected[2]], rtol=1e-6)
    assert label_weights(np.bincount(labels), "none") is None


# The script


def write_conll(path, rows=12):
    sentences = [
        "\n".join(f"{w} {t}" for w, t in zip(*row, strict=True)) for row in zip(TOKENS, TAGS, strict=True)
    ]
    path.write_text("\n\n".join(sentences[:rows]) + "\n", "utf-8")
    return path


@pytest.mark.slow
def test_the_script_and_a_fresh_process_predict_alike(encoders, tmp_path, load, fresh_process, capsys):
    data = write_conll(tmp_path / "people.conll")
    shuffled = tmp_path / "shuffled.conll"
    shuffled.write_text("\n\n".join(reversed(data.read_text().strip().split("\n\n"))) + "\n")
    arguments = ["--family", "ner", "--backbone", str(encoders["bert"]), "--steps", "20", "--seeds", "2"]
    arguments += "--batch_size 4 --mixed_precision float32 --progress false --threads 1".split()
    labels = ["--labels", "O,B-LOC,B-PER"]
    for name, source, more in (("plain", data, labels), ("other", shuffled, labels), ("free", data, [])):
        output = ["--data", str(source), "--output_dir", str(tmp_path / name), "--test", str(data)]
        assert adapt.main([*arguments, *output, *more]) == 0
    assert "validation by seed: 0: " in capsys.readouterr().out
    labels = [
        json.loads((tmp_path / n / "task.json").read_text())["labels"] for n in ("plain", "other", "free")
    ]
    assert labels == [["O", "B-LOC", "B-PER"]] * 2 + [["B-PER", "I-PER", "O", "B-LOC", "I-LOC"]]
    model = load("bert")
    model.load_adapter(tmp_path / "plain", "people")
    tokenizer = load_word_tokenizer(str(encoders["bert"]))
    found = model.predict(TEXTS, adapters=["people"], tokenizer=tokenizer)["people"]
    code = f"""
import json
from modeling_mtpf import MtpfModel
model = MtpfModel.from_pretrained({str(encoders["bert"])!r})
model.load_adapter({str(tmp_path / "plain")!r}, "people")
print(json.dumps(model.predict({TEXTS!r}, adapters=["people"])["people"]))
"""
    assert fresh_process(code) == json.loads(json.dumps(found))


@pytest.mark.slow
def test_text_apps_of_shuffled_data_predict_alike_in_a_fresh_process(
    setting, encoders, tmp_path, fresh_process
):
    """Labels in the order of each file; their logits must go with them through saving and loading."""
    rows = [json.dumps({"text": text, "label": f"label {i % 3}"}) for i, text in enumerate(TEXTS * 10)]
    for name, own in (("plain", rows), ("shuffled", rows[1:] + rows[:1])):
        (tmp_path / name).mkdir()
        for split in ("train", "validation"):
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(own))
        fit_app(tmp_path / name, "tc", backbone=setting, output_dir=tmp_path / f"app-{name}", name=name)
    model, tokenizer = setting
    assert model.heads["plain"].labels == ["label 0", "label 1", "label 2"]
    assert model.heads["shuffled"].labels == ["label 1", "label 2", "label 0"]
    found = model.predict(TEXTS, adapters=["plain", "shuffled"], tokenizer=tokenizer)
    labels = {name: [row["label"] for row in own] for name, own in found.items()}
    assert labels["plain"] == labels["shuffled"] and len(set(labels["plain"])) == 3
    code = f"""
import json
from modeling_mtpf import MtpfModel
model = MtpfModel.from_pretrained({str(encoders["bert"])!r})
for name in ("plain", "shuffled"):
    model.load_adapter({str(tmp_path)!r} + "/app-" + name, name)
print(json.dumps(model.predict({TEXTS!r}, adapters=["plain", "shuffled"])))
"""
    fresh = fresh_process(code)
    assert {name: [row["label"] for row in own] for name, own in fresh.items()} == labels
    for name, own in found.items():
        np.testing.assert_allclose([r["score"] for r in own], [r["score"] for r in fresh[name]], rtol=1e-5)


def test_a_label_only_in_test_counts_as_missed(setting):
    data = tc_data()
    known = fit_app(data, "tc", backbone=setting, name="known").metrics["accuracy"]
    data.test = Examples([*TEXTS, "x"], [*data.test.labels, "new"])
    app = fit_app(data, "tc", backbone=setting)
    assert app.metrics["accuracy"] == pytest.approx(known * 12 / 13, abs=1e-4)
    assert app.record["data"]["labels_not_in_train"] == {"test": {"labels": ["new"], "count": 1}}


@pytest.mark.parametrize(
    "change, message",
    [
        (["--famly", "ner"], "Unknown argument --famly; did you mean '--family'"),
        (["--family", "nre"], "did you mean 'ner'"),
        (["--method", "lroa"], "did you mean 'lora'"),
        (["--class_weights", "some"], "class_weights is 'some'; choose one of: none, balanced"),
        (["--mixed_precision", "fp8"], "choose one of: auto, bf16, float32"),
        (["--steps", "-1"], "steps is -1; it must be a number of at least 0"),
        (["--learning_rate", "-1"], "learning_rate is -1.0"),
        (["--learning_rate", "nan"], "learning_rate is nan"),
        (["--seed", "-1"], "seed is -1"),
        (["--seeds", "0"], "seeds is 0"),
        (["--threads", "-1"], "threads is -1"),
        (["--patience", "0"], "patience is 0; it must be a number of at least 1"),
        (["--output_dir", "people.conll/app"], "Nothing can be written to"),
        (["--max_length", "100000"], "reads 4 to 132 tokens"),
        (["--data", "nowhere.conll"], "no file or folder nowhere.conll"),
        (["--backbone", "./nowhere"], "backbone './nowhere' cannot be loaded"),
        (["--adapter", "./nowhere"], "not a Hub id of the form"),
        (["--output_dir", "."], "exists already"),
        (["--name", "layer"], "collides"),
        (["--train_fraction", "2"], "at most 1"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    encoders, tmp_path, capsys, monkeypatch, change, message
):
    monkeypatch.chdir(tmp_path)
    write_conll(tmp_path / "people.conll")
    arguments = {"--family": "ner", "--data": "people.conll", "--output_dir": "app", "--steps": "1"}
    arguments |= {"--threads": "1", "--backbone": str(encoders["bert"]), **dict([change])}
    assert adapt.main([part for pair in arguments.items() for part in pair]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["people.conll"]


def test_an_app_records_the_tokenizer_that_it_was_fitted_with(setting, encoders, tmp_path, load):
    model, _ = setting
    cased = load_word_tokenizer(str(encoders["bert"]))
    cased.backend_tokenizer.normalizer = BertNormalizer(lowercase=False)
    fit_app(tc_data(), "tc", backbone=(model, cased), output_dir=tmp_path / "app", method="probe")
    model = load("bert")
    model.load_adapter(tmp_path / "app", "app")
    assert len(model.predict(TEXTS, adapters=["app"], tokenizer=cased)["app"]) == len(TEXTS)
    with pytest.raises(AdapterError, match="trained with another tokenizer"):
        model.predict(TEXTS, adapters=["app"])
    model.add_adapter("mine", None, AdapterHead("text-classification", ["a", "b"], 32))
    folder = model.save_adapter(tmp_path / "mine", "mine")  # trained elsewhere, with any tokenizer
    assert "tokenizer" not in json.loads((folder / "task.json").read_text())["backbone"]


def test_a_failed_fit_leaves_the_model_as_it_was(setting, family_adapter, monkeypatch):
    model, tokenizer = setting
    monkeypatch.setattr(lora, "train_tail", lambda *rest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit_app(ner_data(), "ner", backbone=(model, tokenizer), adapter=family_adapter)
    assert model.adapters == ["ner", "tc"]
    with pytest.raises(RecipeError, match="at least 1"):
        fit_app(ner_data(), "ner", backbone=(model, tokenizer), seeds=0)
    with pytest.raises(RecipeError, match="the same for every seed"):
        fit_app(tc_data(), "tc", backbone=(model, tokenizer), method="probe", seeds=3)


@pytest.mark.parametrize("fault", ["full", "taken", "a file", "all full"])
def test_an_app_that_cannot_be_saved_is_saved_elsewhere(fault, setting, tmp_path, monkeypatch, load):
    model, tokenizer = setting
    folder, save = tmp_path / "apps" / "people", model.save_adapter
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def save_at_the_end(target, *arguments, **options):
        if fault in ("taken", "a file") and not folder.exists():
            folder.mkdir(parents=True) if fault == "taken" else folder.write_text("another one's")
            if fault == "taken":
                (folder / "notes").write_text("another one's")
        if fault == "all full" or (fault == "full" and Path(target).parent == folder.parent):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return save(target, *arguments, **options)

    folder.parent.mkdir()
    monkeypatch.setattr(model, "save_adapter", save_at_the_end)
    with pytest.raises(MtpfError) as refused:
        fit_app(
            tc_data(), "tc", backbone=(model, tokenizer), output_dir=folder, settings=FitSettings(**FLOAT)
        )
    message = str(refused.value)
    if fault == "all full":
        assert "No space left on device" in message and message.endswith("the fitted app is lost.")
        assert not os.listdir(folder.parent)
        return
    assert ("No space left on device" if fault == "full" else "people appeared while") in message
    saved = Path(re.search(r"the fitted app is in ([^ ;]+?)(\.$| instead)", message, re.I)[1])
    again = load("bert")
    assert again.predict(TEXTS, [again.load_adapter(saved)]) == model.predict(TEXTS, ["people"])
    assert (saved / "README.md").is_file()
    others = set(os.listdir(folder.parent)) - {saved.name}
    assert others == (set() if fault == "full" else {"people"})


def test_an_adapter_of_another_family_is_refused(setting, tmp_path):
    model, tokenizer = setting
    folder = model.save_adapter(tmp_path / "lora", "tc", task={"family": "tc"})
    with pytest.raises(RecipeError, match="is of the family 'tc', the app of 'ner'"):
        fit_app(ner_data(), "ner", backbone=setting, adapter=folder)
    settings = FitSettings(steps=1, **FLOAT)
    app = fit_app(tc_data(), "tc", backbone=setting, adapter=folder, name="intent", settings=settings)
    assert repr(app).startswith("FittedApp('intent', probe, accuracy 1.000") and "\n" not in repr(app)
    assert str(app).splitlines()[0] == "App 'intent', probe on data in memory, 24 training examples"


def test_the_current_folder_is_no_place_for_an_app(setting, tmp_path, monkeypatch):
    """It is empty, so it does not exist "already", and it has no name in "."."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MtpfError, match="is the current folder"):
        fit_app(ner_data(), "ner", backbone=setting, output_dir=".", name="abc")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train": Examples(TOKENS, TAGS[1:])}, "train split has 12 inputs but 11 labels"),
        ({"test": Examples([["Ada"]], [["B-PER", "O"]])}, "test split, row 1 has 1 tokens but 2 tags"),
        ({"validation": Examples()}, "held out for validation"),
        ({"labels": ["B-PER", "B-LOC"]}, "need 'O'"),
        ({"labels": ["O", "B-PER"]}, "train split has the label 'B-LOC', which is not in its labels"),
        ({"train": Examples([["Ada"]] * 3, [["PER"]] * 3)}, "'PER' is not an IOB2 tag"),
        ({"family": "tc"}, "family 'tc', not 'ner'"),
    ],
)
def test_data_in_memory_is_checked(setting, change, message):
    data = ner_data()
    for key, value in change.items():
        setattr(data, key, value)
    with pytest.raises(MtpfError, match=message):
        fit_app(data, "ner", backbone=setting)
    with pytest.raises(MtpfError, match="train_fraction is an option of reading data"):
        fit_app(ner_data(), "ner", backbone=setting, train_fraction=0.1)


def test_a_long_sentence_is_fitted_and_scored_in_windows(setting):
    """Every word counts once, whichever window shows it."""
    _, tokenizer = setting
    words = [f"Ada{'!' * (i % 3)}" for i in range(60)]
    examples = Examples([words, ["Hi"]], [["B-PER"] * 60, ["O"]])
    texts = TaggedTexts(tokenizer, examples, ["O", "B-PER", "I-PER"], 16)
    assert len(texts.targets) > 5 and max(texts.encoded.lengths) == 16
    labelled = np.concatenate(texts.targets)
    assert (labelled == 1).sum() == 60 and (labelled == 2).sum() == 60  # 0, 1 or 2 marks continue a word
    whole = TaggedTexts(tokenizer, examples, ["O", "B-PER", "I-PER"], 512)
    assert np.concatenate(whole.targets).tolist().count(1) == 60 and len(whole.targets) == 2

    def right(rows):  # logits that are sure of the labels
        for row, (targets, length) in enumerate(zip(rows.targets, rows.encoded.lengths, strict=True)):
            logits = np.zeros((1, length, 3), dtype=np.float32)
            logits[0, np.arange(length), np.maximum(targets, 0)] = 9
            yield np.array([row]), torch.from_numpy(logits)

    assert texts.score(texts.read(right(texts)))["entity_f1"] == 1.0


def test_printed_scores_are_those_of_what_predict_delivers(setting, tmp_path):
    """An independent count over the files of a fresh process: NER by spans, TC by labels; long texts, too."""
    model, tokenizer = setting
    model.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    words = [*TOKENS, ["Ada's", "friend", "O'Noor", "in", "U.S.", *["London"] * 60]]
    tags = [*TAGS, ["B-PER", "O", "B-PER", "O", "B-LOC", *["B-LOC", "I-LOC", "O"] * 20]]
    settings = FitSettings(steps=30, learning_rate=3e-3, batch_size=4, max_length=32, **FLOAT)
    data = ner_data()
    data.test = Examples(words, tags)
    text = tc_data(2)
    text.test = Examples(
        [*text.train.inputs, "good Ada bad " * 40], [*text.train.labels, text.train.labels[0]]
    )
    rows = {"ner": [" ".join(row) for row in words], "tc": text.test.inputs}
    for family, of_family in (("ner", data), ("tc", text)):
        app = fit_app(
            of_family,
            family,
            backbone=setting,
            output_dir=tmp_path / f"app-{family}",
            settings=settings,
            method="lora",
        )
        (tmp_path / "texts.txt").write_text("\n".join(rows[family]))
        command = f"{sys.executable} -m modeling_mtpf.cli predict --backbone backbone --adapter app-{family} texts.txt"
        environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
        lines = subprocess.check_output(
            command.split(), cwd=tmp_path, env=environment, text=True
        ).splitlines()
        results = [json.loads(line)["results"] for line in lines]
        assert len(results) == len(rows[family])
        if family == "tc":
            right = [
                row["app-tc"]["label"] == label for row, label in zip(results, text.test.labels, strict=True)
            ]
            assert app.metrics["accuracy"] == round(sum(right) / len(right), 4)
            continue
        delivered = [{(s["start"], s["end"], s["entity_group"]) for s in row["app-ner"]} for row in results]
        gold = [set(join_words(*row)[1]) for row in zip(words, tags, strict=True)]
        right = sum(len(a & b) for a, b in zip(gold, delivered, strict=True))
        assert app.metrics["recall"] == round(right / sum(map(len, gold)), 4) > 0
        assert app.metrics["precision"] == round(right / sum(map(len, delivered)), 4)


def test_a_missing_extra_names_the_installation():
    with pytest.raises(
        MissingExtraError, match=r"'no_such_module'; install it with: pip install 'mtpf\[train\]'"
    ):
        require_extra("train", "json", "no_such_module")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_saved_is_what_was_scored(setting, tmp_path, load, dtype):
    model, tokenizer = setting
    settings = FitSettings(steps=3, learning_rate=3e-3, stored_dtype=dtype)
    fit_app(ner_data(), "ner", backbone=(model, tokenizer), output_dir=tmp_path / "app", settings=settings)
    files = {**load_file(tmp_path / "app" / ADAPTER_WEIGHTS_FILE), **load_file(tmp_path / "app" / HEAD_FILE)}
    assert {str(value.dtype) for value in files.values()} == {f"torch.{dtype}"}
    again = load("bert")
    again.load_adapter(tmp_path / "app")
    found, expected = (lora_state_dict(own.backbone, "app") for own in (again, model))
    assert len(found) == 2 * 6 * 4 and all(torch.equal(found[key], value) for key, value in expected.items())
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert torch.equal(again.heads["app"].weight, model.heads["app"].weight)
    stock = PeftModel.from_pretrained(load("bert").backbone, tmp_path / "app")
    inputs = tokenizer(TEXTS[:1], return_tensors="pt")
    with torch.no_grad():
        states = stock(**inputs)[0], again.encode_adapters(["app"], **inputs)["app"]
    torch.testing.assert_close(*states, atol=1e-6, rtol=1e-6)


def test_numbers_beyond_float16_stay_float32(setting, tmp_path, monkeypatch):
    model, tokenizer = setting
    monkeypatch.setattr(probe, "STRENGTHS", (1.0,))
    fill = probe.fill_head

    def fill_largely(head, probe):
        fill(head, probe)
        head.weight.data[0, 0] = 1e7

    monkeypatch.setattr(probe, "fill_head", fill_largely)
    options = {"backbone": (model, tokenizer), "method": "probe"}
    app = fit_app(tc_data(), "tc", output_dir=tmp_path / "app", **options)
    stored = load_file(tmp_path / "app" / HEAD_FILE)["weight"]
    expected = 1e7 / app.record["calibration"]["temperature"]
    assert stored.dtype == torch.float32 and float(stored[0, 0]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("architecture", ["roberta", "modernbert"])
def test_predict_reads_the_tokens_that_apps_are_fitted_on(encoders, tmp_path, architecture):
    """Tokenizers of bytes are published without the space before a text's first word."""
    folder = tmp_path / "published"
    shutil.copytree(encoders[architecture], folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text("utf-8"))
    assert tokenizer["pre_tokenizer"]["add_prefix_space"] is True
    tokenizer["pre_tokenizer"]["add_prefix_space"] = False
    file.write_text(json.dumps(tokenizer), "utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_prefix_space": False}), "utf-8")
    model, fitted = open_backbone(str(folder))
    plain, found = load_tokenizer(model), text_tokenizer(model)(TEXTS)
    assert plain(TEXTS[0])["input_ids"] != fitted(TEXTS[0])["input_ids"]
    for text, tokens in zip(TEXTS, found, strict=True):
        assert tokens.ids.tolist() == fitted(text, add_special_tokens=False)["input_ids"]
        starts, ends = tokens.words(text)[1:]
        assert [text[a:b] for a, b in zip(starts, ends, strict=True)][0] in text.split()


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_rows_without_a_token_are_batched(precision):
    batches = row_batches([0, 0, 0], 64, torch.device("cpu"), precision)
    assert sorted(np.concatenate([b.rows[: b.real] for b in batches])) == [0, 1, 2]


HUB = """
import json
from modeling_mtpf.data.app_data import load_app_data
found = load_app_data("{source}", "ner")
print(json.dumps([found.labels, found.train.inputs, found.test.labels]))
"""


@pytest.mark.hub
def test_an_app_reads_a_hub_data_set_at_its_commit(hub, fresh_process):
    rows = [{"tokens": words, "ner_tags": tags} for words, tags in zip(TOKENS, TAGS, strict=True)]
    data = "\n".join(map(json.dumps, rows)).encode()
    hub.create("me/people", repo_type="dataset")
    files = {f"{split}.jsonl": data for split in ("train", "validation", "test")}
    sha = hub.commit("me/people", files, repo_type="dataset")
    labels, words, tags = fresh_process(HUB.format(source=f"me/people@{sha}"), **hub.environment())
    assert (labels, words, tags) == (["B-PER", "I-PER", "O", "B-LOC", "I-LOC"], TOKENS, TAGS)


def test_an_app_of_a_real_size_is_small(tmp_path):
    """What a fit leaves by default on the packaged encoder, with 71 labels."""
    kinds = [f"type{i}" for i in range(35)]
    examples = Examples([["to", kind, kind] for kind in kinds], [["O", f"B-{k}", f"I-{k}"] for k in kinds])
    labels = ["O", *(f"{p}-{kind}" for kind in kinds for p in "BI")]
    data = AppData("ner", labels, examples, examples)
    folder = tmp_path / "app"
    fit_app(data, "ner", output_dir=folder, settings=FitSettings(steps=1))
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1e6
    shutil.rmtree(folder)
