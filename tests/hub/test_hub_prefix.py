"""Adapters with a prefix on the Hub: pushed, described, fetched, and run as their card says."""

import re

import pytest
import torch
from conftest import SENTENCES
from safetensors.torch import load_file, save_file
from test_prefix import add_prefixed, words_head

from modeling_mtpf import MtpfModel
from modeling_mtpf.errors import MtpfError
from modeling_mtpf.hub import inspect, pull, push_adapter


@pytest.fixture
def slots(folders, tmp_path):
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    add_prefixed(model, "slots", head=words_head())
    return model.save_adapter(tmp_path / "slots", "slots")


def test_it_is_pushed_described_fetched_and_run_by_its_card(hub, slots, published, fresh_process):
    push_adapter(slots, "mtpf/slots", backbone_id="mtpf/encoder")
    found = inspect("mtpf/slots")
    assert found.findings == [] and found.prefix == 5 and "prefix      5 slots" in str(found)
    assert found.to_dict()["prefix"] == 5 and inspect(slots).prefix == 5
    fetched = pull("mtpf/slots")
    assert (fetched / "prefix.safetensors").read_bytes() == (slots / "prefix.safetensors").read_bytes()
    model = MtpfModel.from_pretrained("mtpf/encoder").eval()
    model.load_adapter("mtpf/slots")
    model.load_adapter(slots, adapter_name="local")
    results = model.predict(SENTENCES, ["slots", "local"])
    assert results["slots"] == results["local"]
    card = (fetched / "README.md").read_text()
    assert "library_name: transformers" in card and "peft" not in card.lower().replace("peft and other", "")
    examples = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    remote = [example for example in examples if "trust_remote_code=True" in example and "predict" in example]
    code = f"exec({remote[0]!r}); print(1)"
    assert fresh_process(code, package=False, **hub.environment()) == 1


def test_a_damaged_prefix_is_found_and_not_pushed(slots, published):
    tensors = load_file(slots / "prefix.safetensors")
    tensors["encoder.layer.3.prefix_key"][0, 0, 0] = torch.nan
    save_file(tensors, slots / "prefix.safetensors")
    assert any("prefix.safetensors" in finding for finding in inspect(slots).findings)
    with pytest.raises(MtpfError, match="prefix.safetensors"):
        push_adapter(slots, "mtpf/slots", backbone_id="mtpf/encoder")
    (slots / "prefix.safetensors").unlink()
    assert any("disagree about whether it has a prefix" in finding for finding in inspect(slots).findings)
