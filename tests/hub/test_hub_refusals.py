"""What may not be published: refused with the reason, before anything changes on the Hub."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, TRAINING
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from modeling_mtpf import AdapterError, LoraSettings, MtpfModel
from modeling_mtpf.errors import MtpfError
from modeling_mtpf.hub import HubError, inspect, pull, push_adapter, push_backbone
from modeling_mtpf.hub.checks import check_adapter, check_backbone, check_tokenizer
from modeling_mtpf.model.adapters_mtpf import count_parameters

pytestmark = pytest.mark.hub

BACKBONE, ENTITIES, NER = "mtpf/encoder", "mtpf/entities", "mtpf/encoder-ner"


def pushes_nothing(hub, push, message):
    before = len(hub.requests)
    with pytest.raises(MtpfError, match=message) as refusal:
        push()
    assert {call.method for call in hub.requests[before:]} <= {"GET", "HEAD"}
    return str(refusal.value)


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "backbone_id, message",
    [
        (None, "does not say which published backbone.*--backbone"),
        ("mtpf/absent", "mtpf/absent is not published.*mtpf push backbone FOLDER mtpf/absent"),
        ("./runs/demo/backbone", "not a Hub id; use the form 'owner/name'"),
        ("/srv/backbone", "not a Hub id"),
    ],
)
def test_an_adapter_without_a_published_backbone_is_refused(hub, folders, backbone_id, message):
    pushes_nothing(hub, lambda: push_adapter(folders / "ner", NER, backbone_id=backbone_id), message)


def test_an_adapter_of_another_backbone_is_refused(hub, folders, backbone, published):
    weights = load_file(backbone / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][7, 3] += 1e-3
    save_file(weights, backbone / "model.safetensors", metadata={"format": "pt"})
    other = push_backbone(backbone, BACKBONE)
    pushes_nothing(
        hub, lambda: push_adapter(folders / "ner", NER, backbone_id=BACKBONE), "trained on another backbone"
    )
    assert push_adapter(folders / "ner", NER, backbone_id=BACKBONE, backbone_revision=published)
    with pytest.raises(AdapterError, match="trained on another backbone"):
        MtpfModel.from_pretrained(pull(BACKBONE, other)).load_adapter(NER)


def change_lora(folder: Path, change, **options) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, **options)


def change_task(folder: Path, change) -> None:
    edit(folder / "task.json", **change(json.loads((folder / "task.json").read_text())))


def change_bytes(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(change(file.read_bytes()))


def each_lora_a(change):
    return lambda tensors: {k: change(v) if "lora_A" in k else v for k, v in tensors.items()}


DAMAGES = {
    "pickle": (
        lambda d: (d / "optimizer.pt").write_bytes(b"\x80\x04."),
        "optimizer.pt .* may hold a pickle",
    ),
    "archive": (lambda d: (d / "data.zip").write_bytes(b"PK"), "data.zip .* archive"),
    "code": (lambda d: (d / "run.py").write_text("print()"), "run.py .* code other than mtpf's own"),
    "unknown": (lambda d: (d / "notes.txt").write_text("my notes"), "notes.txt .* does not belong there"),
    "folder": (lambda d: (d / "old").mkdir(), "old .* does not belong there"),
    "link": (lambda d: (d / "vocab.txt").symlink_to("/etc/hostname"), "vocab.txt .* symbolic link"),
    "no head": (lambda d: (d / "head.safetensors").unlink(), "its head is missing"),
    "label renamed": (
        lambda d: change_task(
            d, lambda t: {"labels": ["B-NAME" if n == "B-PER" else n for n in t["labels"]]}
        ),
        "not those that its head was trained with",
    ),
    "labels moved": (
        lambda d: change_task(d, lambda t: {"labels": t["labels"][::-1]}),
        "not those that its head was trained with",
    ),
    "label less": (
        lambda d: change_task(d, lambda t: {"labels": t["labels"][:-1]}),
        "does not fit 2 labels",
    ),
    "name": (
        lambda d: edit(d / "task.json", name='../"); import os; ("'),
        "it must be a name: lower-case letters",
    ),
    "giant": (lambda d: (d / "task.json").write_text(" " * 50_000_001), "larger than 32 MB"),
    "weights cut": (lambda d: change_bytes(d, lambda b: b[:-100]), "is damaged or not a safetensors file"),
    "header bomb": (
        lambda d: change_bytes(d, lambda b: (2**62).to_bytes(8, "little") + b[8:]),
        "is damaged or not a safetensors file",
    ),
    "weights are a pickle": (
        lambda d: torch.save({"a": torch.zeros(2)}, d / "adapter_model.safetensors"),
        "is damaged or not a safetensors file",
    ),
    "one tensor less": (
        lambda d: change_lora(d, lambda t: {k: t[k] for k in sorted(t)[1:]}),
        "is incomplete: 15 tensors",
    ),
    "wider": (
        lambda d: change_lora(d, each_lora_a(lambda v: torch.cat([v, v], 1))),
        "made for width 64, this one has 32",
    ),
    "not a matrix": (
        lambda d: change_lora(d, each_lora_a(lambda v: v[:, 0].contiguous())),
        "lora_A.weight' is not a matrix",
    ),
    "path in metadata": (
        lambda d: change_lora(d, dict, metadata={"format": "pt", "from": "/home/ada/runs"}),
        r"adapter_model.safetensors contains the local path '/home/ada' \(key 'from'\)",
    ),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_folders_that_may_not_be_published(hub, published, entities, how):
    damage, message = DAMAGES[how]
    damage(entities)
    pushes_nothing(hub, lambda: push_adapter(entities, ENTITIES, backbone_id=BACKBONE), message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"r": 8}, r"disagree about .*shape \(4, 32\), rank 8"),
        ({"bias": "all"}, "not a plain LoRA: 'bias'"),
        ({"modules_to_save": ["pooler"]}, "not a plain LoRA: 'modules_to_save'"),
        ({"layer_replication": [[0, 4], [2, 4]]}, "not a plain LoRA: 'layer_replication'"),
        ({"init_lora_weights": "pissa"}, "not a plain LoRA: 'init_lora_weights'"),
        ({"target_modules": ".*query"}, "not a plain LoRA: 'target_modules' .* no pattern"),
        ({"task_type": None}, "not a LoRA of mtpf"),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}}, "names code to import"),
    ],
)
def test_adapter_configs_that_may_not_be_published(hub, published, entities, changes, message):
    edit(entities / "adapter_config.json", **changes)
    pushes_nothing(hub, lambda: push_adapter(entities, ENTITIES, backbone_id=BACKBONE), message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"training_data": "C:/Users/ada/mail"}, "local path 'C:/Users'"),
        ({"training_data": "D:\\mail"}, r"local path 'D:\\\\mail'"),
        ({"training_data": "\\\\server\\share\\mail"}, "contains the local path"),
        ({"training_data": "from /gpfs/projects/mail, cleaned"}, "local path '/gpfs/projects'"),
        ({"training_data": {"train": "/home/ada/messages.jsonl"}}, "local path '/home/ada"),
        ({"training_data": "../messages"}, r"local path '\.\./messages' \(key 'training_data'\)"),
        ({"training_data": "/anywhere"}, "local path '/anywhere'"),
        ({"training_data": "runs/demo/labels"}, "local path 'runs/demo/labels'"),
        ({"training_data": "labels/train.jsonl"}, "local path 'labels/train.jsonl'"),
        ({"training_data": {"/home/ada/mail": {"rows": 3}}}, "local path '/home/ada'"),
        ({"notes": [{"deep": ["~/mail"]}]}, r"local path '~/mail' \(key 'deep'\)"),
        ({"protocol": "hf_" + "a1B2" * 9}, "looks like a Hub token"),
        ({"metrics": {"entity_f1": float("nan")}}, "NaN is not a number of JSON"),
        ({"metrics": {"entity_f1": float("inf")}}, "Infinity is not a number of JSON"),
        ({"metrics": [0.5]}, "'metrics' in task.json"),
        ({"examples": 5}, "task.json is malformed: .*examples"),
        ({"examples": [5]}, "task.json is malformed: .*examples"),
        ({"protocol": ["a"]}, "task.json is malformed: .*protocol"),
        ({"dataset": "not a hub id"}, "'dataset' of task.json is 'not a hub id'"),
        ({"training_data": 5}, "task.json is malformed: .*training_data"),
        ({"family": {"a": 1}}, "task.json is malformed: .*family"),
        ({"backbone": "x"}, "'backbone' in task.json"),
    ],
)
def test_tasks_that_may_not_be_published(hub, published, entities, changes, message):
    edit(entities / "task.json", **changes)
    pushes_nothing(hub, lambda: push_adapter(entities, ENTITIES, backbone_id=BACKBONE), message)


def test_what_is_no_local_path(hub, published, entities, tmp_path, monkeypatch):
    (tmp_path / ENTITIES).mkdir(parents=True)  # a folder that is called like the repo
    (tmp_path / BACKBONE).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    plain = {
        "training_data": {"mteb/banking77": {"rows": 1000}, "made up on 2024/01/02": {}},
        "protocol": "https://example.org/data/x and/or " + "a text of many words " * 20,
        "dataset": ENTITIES,
        "examples": ["/remind me at 5pm"],
    }
    edit(entities / "task.json", **plain)
    assert push_adapter(entities, ENTITIES, backbone_id=BACKBONE) == hub.head(ENTITIES)


def shrink(folder: Path, how) -> None:
    weights = load_file(folder / "model.safetensors")
    how(weights)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("encoder.layer.1.output.dense.bias"), "layer.1.output.dense.bias' is absent"),
        (lambda w: w.update(extra=torch.zeros(2)), "'extra' is .2,. there and absent in the stock"),
        (
            lambda w: w.update({"embeddings.LayerNorm.bias": torch.zeros(31)}),
            "'embeddings.LayerNorm.bias' is .31,. there and .32,.",
        ),
        (lambda w: w.clear(), "is absent"),
        (
            lambda w: w.update({"encoder.layer.3.attention.self.query.lora_A.weight": torch.zeros(2)}),
            "lora_A",
        ),
    ],
)
def test_weights_must_be_those_of_the_config(hub, backbone, change, message):
    shrink(backbone, change)
    pushes_nothing(hub, lambda: push_backbone(backbone, BACKBONE), message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -2e9], ids=["NaN", "infinite", "huge"])
def test_weights_that_loading_refuses_are_neither_pushed_nor_unseen(hub, backbone, value):
    shrink(backbone, lambda w: w["embeddings.LayerNorm.bias"].fill_(value))
    message = "'embeddings.LayerNorm.bias' holds numbers that are not finite or beyond 1e"
    pushes_nothing(hub, lambda: push_backbone(backbone, BACKBONE), message)
    assert any(message in finding for finding in inspect(backbone).findings)


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ("config.json", {"mtpf": "x"}, "'mtpf' in config.json is 'x'"),
        ("config.json", {"mtpf": {"regime": ["x"]}}, "'regime' in the 'mtpf' block of config.json is"),
        ("config.json", {"auto_map": {"AutoModel": "evil.Model"}}, "complete auto_map"),
        ("config.json", {"custom_pipelines": {"ner": {"impl": "evil.P"}}}, "names code to import"),
        ("config.json", {"model_type": "llama"}, "'llama' is not supported"),
        ("config.json", {"hidden_size": 64}, "does not fit its config.json"),
        ("config.json", {"num_hidden_layers": 10**9}, "'num_hidden_layers' .* whole number from 1 to 256"),
        ("config.json", {"num_hidden_layers": "x"}, "'num_hidden_layers' in config.json is 'x'"),
        ("config.json", {"hidden_size": 10**30}, "whole number from 1 to 65,536"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.T", None]}}, "names code to import"),
        ("training.json", {"regime": "naive"}, "regime 'naive', config.json of 'tpl'"),
        ("training.json", {"families": [5]}, "training.json is malformed"),
        ("training.json", {"families": [{"name": "ner"}]}, "family 1 of training.json has no 'batch_size'"),
        ("training.json", {"families": [{**TRAINING["families"][0], "last": "x"}]}, "family 1 .* malformed"),
        ("training.json", {"assumptions": [["steps"]]}, "must be pairs"),
        ("training.json", {"versions": []}, "training.json is malformed: .*versions"),
        ("training.json", {"regime": None}, "training.json is malformed: .*regime"),
        ("training.json", {"start": "runs/../../secret/encoder"}, "local path"),
    ],
)
def test_invalid_records_of_a_backbone_are_refused_and_reported(hub, backbone, file, changes, message):
    edit(backbone / file, **changes)
    pushes_nothing(hub, lambda: push_backbone(backbone, BACKBONE), message)
    if "local path" not in message:
        assert re.search(message, "\n".join(inspect(backbone).findings))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"results": [{"task": "x", "metric": "f1"}]}, "result 1 has no 'value'"),
        ({"results": [{"task": "x", "metric": "f1", "value": "0.5"}]}, "result 1 is malformed: .*value"),
        ({"results": [{"task": "x", "metric": "f1", "value": float("nan")}]}, "'value' of result 1 is nan"),
        ({"results": [5]}, "result 1 must be an object"),
        ({"license": ""}, "The license '' is not an id"),
        ({"create_pr": True, "branch": "dev"}, "pull request goes to main"),
    ],
)
def test_invalid_options_are_refused(hub, folders, options, message):
    pushes_nothing(hub, lambda: push_backbone(folders / "backbone", BACKBONE, **options), message)


def test_a_tokenizer_must_be_complete_and_fit(hub, backbone):
    push = lambda: push_backbone(backbone, BACKBONE)  # noqa: E731
    tokenizer = PreTrainedTokenizerFast.from_pretrained(backbone)
    tokenizer.add_tokens(["mtpf"])
    tokenizer.save_pretrained(backbone)
    pushes_nothing(hub, push, f"has the token id {len(tokenizer) - 1}, but the encoder only")
    (backbone / "tokenizer.json").write_text("{}")
    pushes_nothing(hub, push, "tokenizer.json: it has no model")
    (backbone / "tokenizer.json").unlink()
    pushes_nothing(hub, push, "has no tokenizer, or a part of one only")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_backbones_of_every_architecture_pass_the_checks(encoders, tmp_path, architecture):
    model = MtpfModel.from_pretrained(encoders[architecture])
    model.add_adapter("ner", LoraSettings(r=4))
    model.save_pretrained(tmp_path / "backbone")
    PreTrainedTokenizerFast.from_pretrained(encoders[architecture]).save_pretrained(tmp_path / "backbone")
    backbone = check_backbone(tmp_path / "backbone")
    check_tokenizer(tmp_path / "backbone", backbone)
    assert backbone.num_parameters == sum(value.numel() for value in model.backbone.state_dict().values()) - (
        count_parameters(model.backbone, "ner")
    )
    check_adapter(model.save_adapter(tmp_path / "ner", "ner"), backbone)


def test_backbones_that_may_not_be_published(hub, backbone, encoders):
    push = lambda: push_backbone(backbone, BACKBONE)  # noqa: E731
    pushes_nothing(hub, lambda: push_backbone(encoders["bert"], BACKBONE), "no 'mtpf' block")
    pushes_nothing(hub, lambda: push_backbone(backbone / "absent", BACKBONE), "There is no folder")
    archive = shutil.make_archive(str(backbone), "zip", backbone)
    pushes_nothing(hub, lambda: push_backbone(archive, BACKBONE), "There is no folder .*zip")
    with pytest.raises(AdapterError, match="not a Hub id of the form"):
        MtpfModel.from_pretrained(encoders["bert"]).load_adapter(archive)
    edit(backbone / "config.json", _name_or_path="/tmp/encoder")
    pushes_nothing(hub, push, "config.json contains the local path '/tmp/encoder'")
    pushes_nothing(hub, lambda: push_backbone(backbone.parent, BACKBONE), f"Did you mean {backbone}")
    assert f"Did you mean {backbone}?" in "\n".join(inspect(backbone.parent).findings)
    for name in ("encoder", "a/b/c", "../up/x", "-/x", str(backbone)):
        with pytest.raises(HubError, match="not a Hub id"):
            push_backbone(backbone, name)


def test_a_card_that_the_hub_does_not_accept_leaves_no_empty_repo(hub, folders):
    with pytest.raises(HubError, match='card of mtpf/encoder: "language" with value "English"'):
        push_backbone(folders / "backbone", BACKBONE, language="English")
    assert not hub.calls("create_repo")


def test_remote_code_is_this_packages_own(hub, backbone, published):
    (backbone / "modeling_mtpf.py").write_text("import os; os.system('true')")
    assert push_backbone(backbone, BACKBONE) == published


@pytest.mark.parametrize(
    "files, message",
    [
        ({"trunk_mtpf.py": None}, "it has no trunk_mtpf.py"),
        ({"evil.py": b"import os"}, "evil.py: it is code other"),
        ({"a/model.bin": b"\x80\x04."}, "a/model.bin: it may hold a pickle"),
        ({"tf_model.h5": b"x"}, "tf_model.h5: it holds weights in another format"),
        ({"tokenizer.json": None}, "it has no vocabulary"),
        ({"config.json": None}, "it has no config.json"),
        ({"config.json": b"{"}, "is not valid JSON"),
        ({"config.json": {"auto_map": {"AutoModel": "other/repo--evil.Model"}}}, "complete auto_map"),
        ({"config.json": {"hidden_size": 64, "num_attention_heads": 4}}, "does not fit its config.json"),
        ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["x.T", None]}}}, "names code to import"),
    ],
)
def test_a_published_backbone_that_is_not_as_it_was_pushed(hub, folders, published, files, message):
    """Refused where an adapter would be bound to it, and reported by `inspect`."""
    for name, change in files.items():
        if isinstance(change, dict):
            files = {name: json.dumps({**json.loads(hub.files(BACKBONE)[name]), **change}).encode()}
    hub.commit(BACKBONE, files)
    pushes_nothing(hub, lambda: push_adapter(folders / "ner", NER, backbone_id=BACKBONE), message)
    assert re.search(message, "\n".join(inspect(BACKBONE).findings))
    assert push_adapter(folders / "ner", NER, backbone_id=BACKBONE, backbone_revision=published)
    assert inspect(NER).findings == []


def test_a_published_backbone_whose_config_is_tampered_with(hub, folders, published):
    hub.tamper(BACKBONE, "config.json")
    message = "config.json of mtpf/encoder .* does not have the hash"
    pushes_nothing(hub, lambda: push_adapter(folders / "ner", NER, backbone_id=BACKBONE), message)
    assert re.search(message, "\n".join(inspect(BACKBONE).findings))


def test_a_file_of_the_published_backbone_that_breaks_on_the_way_is_fetched_again(hub, folders, published):
    fault = hub.fault("resolve", corrupt=True, match="config.json")
    assert push_adapter(folders / "ner", NER, backbone_id=BACKBONE) and fault.fired == 1


def test_a_published_backbone_with_other_code_is_pointed_out(hub, folders, published, caplog):
    hub.commit(BACKBONE, {"trunk_mtpf.py": b"# of another version"})
    assert push_adapter(folders / "ner", NER, backbone_id=BACKBONE)
    assert "carries other code (trunk_mtpf.py)" in caplog.text
