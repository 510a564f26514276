"""Standalone apps on the Hub: pushed, described, fetched, and run by what their card says."""

import json
import re

import pytest
import torch
from conftest import LABELS, SENTENCES, TOKENS, write_standalone
from safetensors.torch import load_file, save_file

from modeling_mtpf import AdapterError, MtpfModel
from modeling_mtpf.errors import MtpfError
from modeling_mtpf.hub import HubError, inspect, pull, push_adapter
from modeling_mtpf.model.delta_mtpf import PATTERNS_FILE, delta_parameters


@pytest.fixture
def airline(folders, tmp_path):
    folder = write_standalone(folders / "backbone", tmp_path / "airline")
    (folder / PATTERNS_FILE).write_text("# Token patterns\n")
    (folder / "README.md").write_text("the card of the run")
    return folder


def test_a_standalone_app_is_pushed_described_and_fetched(hub, airline, folders, published, fresh_process):
    local = inspect(airline)
    assert local.findings == [] and local.standalone and local.labels == LABELS["intent"][1]
    sha = push_adapter(airline, "mtpf/airline", backbone_id="mtpf/encoder")
    found = inspect("mtpf/airline")
    assert found.findings == [] and found.standalone and found.kind == "text-classification"
    tensors = load_file(airline / "delta.safetensors")
    values = sum(value.numel() for key, value in tensors.items() if not key.endswith(".rows"))
    assert found.parameters == delta_parameters(airline) == values
    assert found.backbone["id"] == "mtpf/encoder" and found.backbone["revision"] == published
    assert "standalone  an encoder of its own: what differs from its backbone" in str(found)
    assert not inspect("mtpf/encoder").standalone
    folder = pull("mtpf/airline", sha)
    assert {path.name for path in folder.iterdir()} == {path.name for path in airline.iterdir()}
    model = MtpfModel.from_pretrained("mtpf/encoder").eval()
    model.load_adapter("mtpf/airline", standalone=True)
    model.load_adapter(airline, adapter_name="local", standalone=True)
    results = model.predict(SENTENCES, ["airline", "local"])
    assert results["airline"] == results["local"]
    whole = MtpfModel.from_pretrained("mtpf/airline", revision=sha).eval()
    assert whole.predict(SENTENCES, ["airline"])["airline"] == results["local"]
    card = (folder / "README.md").read_text()
    assert "stored as what differs from a backbone, with 3 tokens that its tokenizer adds" in card
    assert f"`mtpf/encoder` at commit `{published}`" in card and "| accuracy | 0.67 |" in card
    sizes = sum((airline / name).stat().st_size for name in ("delta.safetensors", "head.safetensors"))
    assert f"{values:,} changed values; {sizes:,} bytes in all." in card
    assert "library_name: mtpf" in card and "- standalone" in card and "- lora" not in card
    examples = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = "\n".join(example.replace(", trust_remote_code=True", "") for example in examples[:1])
    environment = {**hub.environment(), "HF_HUB_OFFLINE": "0"}
    text = re.search(r"predict\(\[(.*?)\], adapters", examples[0])[1]
    printed = fresh_process(
        f"{code.replace('print(', 'import json; print(json.dumps(')[:-2]}))", **environment
    )
    assert printed == model.predict([json.loads(text)], ["airline"])


def test_a_repo_that_is_neither_is_refused_as_before(hub, published, airline, encoders):
    with pytest.raises(OSError, match="mtpf/nothing"):
        MtpfModel.from_pretrained("mtpf/nothing")
    push_adapter(airline, "mtpf/airline", backbone_id="mtpf/encoder")
    with pytest.raises(AdapterError, match="another backbone"):
        MtpfModel.from_pretrained("mtpf/airline", backbone=encoders["distilbert"])


def edit_task(folder, change):
    task = json.loads((folder / "task.json").read_text())
    change(task)
    (folder / "task.json").write_text(json.dumps(task))


def edit_tensors(folder, change):
    tensors = load_file(folder / "delta.safetensors")
    change(tensors)
    save_file(tensors, folder / "delta.safetensors")


def rows_key(tensors):
    return next(key for key in tensors if key.endswith(".rows"))


OWN = {
    "a row more": lambda f: edit_tensors(f, lambda t: t[rows_key(t)].__setitem__(0, 255)),
    "a mask alone": lambda f: edit_tensors(f, lambda t: t.pop(rows_key(t).removesuffix(".rows"))),
    "not a number": lambda f: edit_tensors(
        f, lambda t: t[next(k for k in t if not k.endswith(".rows"))].fill_(float("nan"))
    ),
    "labels": lambda f: edit_task(f, lambda t: t["labels"].reverse()),
    "a row less": lambda f: edit_task(f, lambda t: t["delta"].update(rows=t["delta"]["rows"] - 1)),
    "no record": lambda f: edit_task(f, lambda t: t.pop("delta")),
    "no head": lambda f: (f / "head.safetensors").unlink(),
    "no delta": lambda f: (f / "delta.safetensors").unlink(),
}
"""What the folder itself shows."""
BOUND = {
    "another backbone": lambda f: edit_task(f, lambda t: t["backbone"].update(sha256="0" * 64)),
    "another setting": lambda f: edit_task(f, lambda t: t["backbone"]["config"].update(layer_norm_eps=1.0)),
    "another tokenizer": lambda f: edit_task(f, lambda t: t["backbone"].update(tokenizer="0" * 64)),
    "another token": lambda f: edit_task(f, lambda t: t["delta"]["tokens"].__setitem__(0, "zz zz")),
    "a known token": lambda f: edit_task(f, lambda t: t["delta"]["tokens"].__setitem__(0, TOKENS[1])),
    "more rows": lambda f: edit_task(f, lambda t: t["delta"].update(rows=9999)),
    "another shape": lambda f: edit_tensors(
        f, lambda t: t.update({"encoder.layer.0.output.dense.weight": torch.zeros(3, 3)})
    ),
    "a foreign tensor": lambda f: edit_tensors(f, lambda t: t.update(x=torch.zeros(2))),
}
"""What only the backbone shows."""


@pytest.mark.parametrize("what", [*OWN, *BOUND])
def test_a_damaged_standalone_app_is_not_pushed(airline, folders, published, what):
    (OWN | BOUND)[what](airline)
    if what in OWN:
        assert inspect(airline).findings
    with pytest.raises(MtpfError) as raised:
        push_adapter(airline, "mtpf/airline", backbone_id="mtpf/encoder")
    assert "\n" not in str(raised.value) and "Traceback" not in str(raised.value)
    with pytest.raises(HubError):
        inspect("mtpf/airline")
    with pytest.raises(MtpfError):
        MtpfModel.from_pretrained(folders / "backbone").load_adapter(airline, standalone=True)


def test_what_a_repo_holds_is_inspected_with_its_backbone(airline, published, hub):
    push_adapter(airline, "mtpf/airline", backbone_id="mtpf/encoder")
    from huggingface_hub import HfApi

    task = json.loads((pull("mtpf/airline") / "task.json").read_text())
    task["delta"]["tokens"][0] = "zz zz"
    HfApi().upload_file(
        path_or_fileobj=json.dumps(task).encode(), path_in_repo="task.json", repo_id="mtpf/airline"
    )
    assert any("another tokenizer" in finding for finding in inspect("mtpf/airline").findings)
