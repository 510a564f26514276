"""The same numbers on a GPU as on the CPU, from the joint step to an app's predictions."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_apps import FLOAT, TEXTS, TOKENS, ner_data, tc_data
from test_joint import gradients, make, plan  # noqa: F401  a fixture
from test_labelling import corpus, label_corpus, rows_of, settings_for  # noqa: F401  a fixture
from test_scripts import arguments, data  # noqa: F401  fixtures

from modeling_mtpf import MtpfModel
from modeling_mtpf.adaptation import FitSettings, fit_app
from modeling_mtpf.adaptation.text_vectors import embed_texts
from modeling_mtpf.data.backbones import open_backbone
from modeling_mtpf.model.adapter_files_mtpf import backbone_sha256
from train import pretrain

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
GPU = torch.device("cuda")


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
def test_the_joint_step_has_the_gradients_of_the_cpu(make, architecture):  # noqa: F811
    joint, batches = make(architecture)
    expected = gradients(joint, joint(plan(batches)).loss)
    joint.to(GPU)
    found = gradients(joint, joint(plan(batches).to(GPU)).loss)
    assert found.keys() == expected.keys() and len(found) > 20
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.cpu(), expected[name], rtol=1e-6, atol=1e-9)


def test_a_run_on_a_gpu_has_the_losses_of_one_on_a_cpu(arguments, encoders, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(encoders["bert"], tmp_path / "encoder")
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    still = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)  # no draws
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(config | still))
    chosen = {"backbone": tmp_path / "encoder", "steps": 6, "log_every": 1, "families.ner.lora.dropout": 0}
    chosen |= {"families.tc.lora.dropout": 0, "learning_rate": 1e-4}
    assert pretrain.main(arguments(output_dir=tmp_path / "gpu", **chosen)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        AcceleratorState._reset_state(reset_partial_state=True)
        assert pretrain.main(arguments(output_dir=tmp_path / "cpu", **chosen)) == 0
    devices = [
        json.loads((tmp_path / device / "run.json").read_text())["hardware"]["device"]
        for device in ("gpu", "cpu")
    ]
    assert devices == [GPU.type, "cpu"]
    losses = []
    for device in ("gpu", "cpu"):
        lines = (tmp_path / device / "metrics.jsonl").read_text().splitlines()
        losses.append([[json.loads(line)[f"loss/{family}"] for family in ("ner", "tc")] for line in lines])
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.01)
    assert MtpfModel.from_pretrained(tmp_path / "gpu" / "backbone").device.type == "cpu"


def test_a_stopped_run_goes_on(arguments, tmp_path):  # noqa: F811
    chosen = {"mixed_precision": "auto", "save_every": 2}
    assert pretrain.main(arguments(output_dir=tmp_path / "whole", steps=4, **chosen)) == 0
    assert pretrain.main(arguments(output_dir=tmp_path / "parts", steps=4, **chosen)) == 0
    (tmp_path / "parts" / "run.json").unlink()  # as if it had been stopped after the last checkpoint
    newest = sorted((tmp_path / "parts" / "checkpoints").iterdir())[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert pretrain.main(arguments(output_dir=tmp_path / "parts", steps=4, resume="auto", **chosen)) == 0
    one, two = (load_file(tmp_path / run / "backbone" / "model.safetensors") for run in ("whole", "parts"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)


def test_labels_are_those_of_the_cpu(encoders, corpus, tmp_path, monkeypatch):  # noqa: F811
    settings = settings_for(encoders["bert"], precision="float32")
    found = rows_of(label_corpus(str(corpus), settings, tmp_path / "gpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = rows_of(label_corpus(str(corpus), settings, tmp_path / "cpu"))
    assert [row["words"] for row in found] == [row["words"] for row in expected]
    one, two = (np.array([label for row in rows for label in row["clusters"]]) for rows in (found, expected))
    assert np.mean(one == two) > 0.99  # k-means on vectors that differ in a last digit


@pytest.mark.parametrize("family", ["ner", "tc"])
def test_an_app_fitted_on_a_gpu_predicts_the_same_on_a_cpu(encoders, tmp_path, family):
    model, tokenizer = open_backbone(str(encoders["bert"]))
    assert model.device.type == GPU.type
    on_cpu = MtpfModel.from_pretrained(encoders["bert"]).eval()
    assert backbone_sha256(model.backbone) == backbone_sha256(on_cpu.backbone)
    examples = ner_data() if family == "ner" else tc_data()
    settings = FitSettings(steps=150, learning_rate=3e-3, batch_size=4, **FLOAT)
    app = fit_app(
        examples, family, backbone=(model, tokenizer), output_dir=tmp_path / "app", settings=settings
    )
    assert app.metrics["entity_f1" if family == "ner" else "accuracy"] > 0.9
    on_cpu.load_adapter(tmp_path / "app")
    texts = [" ".join(words) for words in TOKENS]
    found = model.predict(texts, adapters=["app"], tokenizer=tokenizer)["app"]
    expected = on_cpu.predict(texts, adapters=["app"], tokenizer=tokenizer)["app"]
    for one, two in zip(found, expected, strict=True):
        for own, other in zip(*([row] if isinstance(row, dict) else row for row in (one, two)), strict=True):
            assert own == {**other, "score": pytest.approx(other["score"], abs=1e-3)}


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bf16", 0.05)])
def test_text_vectors_are_those_of_the_cpu(encoders, precision, tolerance):
    model, tokenizer = open_backbone(str(encoders["bert"]))
    on_cpu = MtpfModel.from_pretrained(encoders["bert"]).eval()
    found = embed_texts(model, tokenizer, TEXTS, None, mixed_precision=precision)
    expected = embed_texts(on_cpu, tokenizer, TEXTS, None)
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)
