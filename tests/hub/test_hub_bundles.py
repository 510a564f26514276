"""Bundles on the Hub: pushed, described, fetched, and run by what their card says."""

import json
import re

import pytest
import torch
from conftest import LABELS, SENTENCES, randomize

from hub_cards import adapter_card
from modeling_mtpf import AdapterHead, LoraSettings, MtpfModel
from modeling_mtpf.hub import HubError, inspect, pull, push_adapter


@pytest.fixture
def bundle(folders, tmp_path):
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    heads = {"words": AdapterHead(*LABELS["entities"], 32), "goal": AdapterHead(*LABELS["intent"], 32, 64)}
    for seed, head in enumerate(heads.values()):
        torch.manual_seed(seed)
        torch.nn.init.normal_(head.weight, 0, 3)
    model.add_adapter("both", LoraSettings(r=3), heads)
    randomize(model, 2, within=".both.")
    task = {"metrics": {"words/entity_f1": 0.8, "goal/accuracy": 0.7}, "training_data": "messages"}
    return model.save_adapter(tmp_path / "both", "both", task=task)


def test_a_bundle_is_pushed_described_and_fetched(hub, bundle, published, fresh_process):
    push_adapter(bundle, "mtpf/both", backbone_id="mtpf/encoder")
    found = inspect("mtpf/both")
    assert found.findings == [] and found.kind == "bundle" and found.metrics["goal/accuracy"] == 0.7
    assert found.parts == {"words": LABELS["entities"][1], "goal": LABELS["intent"][1]}
    assert "part goal   intent 0, intent 1" in str(found)
    model = MtpfModel.from_pretrained("mtpf/encoder").eval()
    model.load_adapter("mtpf/both")
    model.load_adapter(bundle, adapter_name="local")
    results = model.predict(SENTENCES, ["both", "local"])
    assert results["both"] == results["local"]
    assert (pull("mtpf/both") / "head.safetensors").read_bytes() == (bundle / "head.safetensors").read_bytes()
    card = (pull("mtpf/both") / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = f"""
import json
shapes = []
for example in {[example for example in examples if "trust_remote_code=True" not in example]!r}:
    scope = {{}}
    exec(example, scope)
    if "logits" in scope:
        shapes.append([scope["logits"].shape[-1], scope["labels"]])
print(json.dumps(shapes))
"""
    environment = {**hub.environment(), "HF_HUB_OFFLINE": "0"}
    assert fresh_process(code, **environment) == [[3, LABELS["entities"][1]]]


def test_a_card_of_a_bundle_names_its_parts_and_their_metrics(bundle):
    task = json.loads((bundle / "task.json").read_text())
    card = adapter_card(task, json.loads((bundle / "adapter_config.json").read_text()), repo_id="mtpf/both")
    text = str(card)
    assert "`both`: 2 apps on one LoRA (mtpf bundle)" in text and "pipeline(" not in text
    assert "`words`, a label for each word (IOB2); labels, in the order of the logits: `O`, `B-PER`" in text
    assert 'head["words.weight"]' in text and '["parts"][0]["labels"]' in text
    kinds = {row.metric_name: row.task_type for row in card.data.eval_results}
    assert kinds == {"words/entity_f1": "token-classification", "goal/accuracy": "text-classification"}
    assert {row.metric_type for row in card.data.eval_results} == {"f1", "accuracy"}


def test_a_damaged_bundle_is_not_pushed(bundle, published):
    task = json.loads((bundle / "task.json").read_text())
    task["parts"][1]["labels"].reverse()
    (bundle / "task.json").write_text(json.dumps(task))
    assert any("not those that its head was trained with" in finding for finding in inspect(bundle).findings)
    with pytest.raises(HubError.__mro__[1], match="not those that its head was trained with"):
        push_adapter(bundle, "mtpf/both", backbone_id="mtpf/encoder")
