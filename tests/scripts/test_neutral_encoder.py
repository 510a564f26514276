"""Undoing the tuning of an encoder: fresh layers on top of the old ones, and one hash at every loading."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModel

from modeling_mtpf import MtpfModel
from modeling_mtpf.model.adapter_files_mtpf import backbone_sha256
from train import neutral_encoder


@pytest.fixture
def arguments(encoders, tmp_path):
    text = tmp_path / "text.parquet"
    Dataset.from_dict({"text": ["Ada came to London with Grace and Noor."] * 60}).to_parquet(text)
    sizes = ["--steps", "3", "--batch_size", "2", "--length", "16", "--fresh_layers", "2"]
    where = {"--text": text, "--encoder": encoders["bert"], "--output_dir": tmp_path / "out"}
    return [*(str(part) for pair in where.items() for part in pair), *sizes]


def test_the_top_is_fresh_and_everything_is_trained(arguments, encoders, tmp_path):
    start = AutoModel.from_pretrained(encoders["bert"])
    fresh = neutral_encoder.fresh_top(str(encoders["bert"]), 2).bert.state_dict()
    for name, value in start.state_dict().items():
        same = name in fresh and torch.equal(fresh[name], value)
        top = name.startswith(("encoder.layer.2.", "encoder.layer.3.")) and name.endswith("dense.weight")
        assert not (top and same) and (same or "layer.2." in name or "layer.3." in name or "pooler" in name)
    assert neutral_encoder.main(arguments) == 0
    trained = AutoModel.from_pretrained(tmp_path / "out")
    weights = trained.state_dict()
    moved = {name for name, value in start.state_dict().items() if not torch.equal(weights[name], value)}
    assert {name for name in weights if name.endswith("dense.weight") and "pooler" not in name} <= moved
    assert trained.config.hidden_dropout_prob == start.config.hidden_dropout_prob
    hashes = {backbone_sha256(MtpfModel.from_pretrained(tmp_path / "out").backbone) for _ in range(2)}
    assert len(hashes) == 1
    assert json.loads((tmp_path / "out" / "neutral.json").read_text())["steps"] == 3
    assert not (tmp_path / "out" / "_checkpoints").exists()


def test_other_arguments_and_too_little_text_are_refused(arguments, encoders, tmp_path, capsys):
    facts = tmp_path / "out" / "_checkpoints" / neutral_encoder.FACTS
    facts.parent.mkdir(parents=True)
    facts.write_text(json.dumps({"text": arguments[1], "encoder": arguments[3], "fresh_layers": "1"}))
    assert neutral_encoder.main(arguments) == 2
    assert "with --fresh_layers 1, this run has 2" in capsys.readouterr().err
    facts.unlink()
    assert neutral_encoder.main([*arguments, "--steps", "1000"]) == 2
    assert "sub-words; these steps need" in capsys.readouterr().err
    assert neutral_encoder.main([*arguments, "--encoder", str(encoders["distilbert"])]) == 2
    assert "knows BERT encoders only" in capsys.readouterr().err
