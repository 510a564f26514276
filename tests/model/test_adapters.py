"""Adapters: names, folders, other people's loaders, heads, and refusals that change nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import config_of, encoder_config
from peft import PeftModel
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from modeling_mtpf import AdapterError, AdapterHead, LoraSettings, MtpfConfig, MtpfModel
from modeling_mtpf.model.adapter_files_mtpf import backbone_sha256
from modeling_mtpf.model.adapters_mtpf import count_parameters, lora_targets


def head(kind="token-classification", labels=("O", "B-PER", "I-PER"), width=32) -> AdapterHead:
    torch.manual_seed(len(labels))
    return AdapterHead(kind, list(labels), width)


@pytest.fixture
def app(load, tmp_path):
    """A backbone folder, an app's folder, and the model they came from."""
    model = load("bert", {"ner": LoraSettings(r=4)})
    model.heads["ner"] = head()
    model.save_pretrained(tmp_path / "backbone")
    model.save_adapter(tmp_path / "app", "ner", task={"family": "ner"})
    return tmp_path / "backbone", tmp_path / "app", model


@pytest.mark.parametrize(
    "architecture, overrides, expected",
    [
        ("bert", {"hidden_size": 384, "num_hidden_layers": 12, "intermediate_size": 1536}, 344_064),
        ("distilbert", {"dim": 768, "n_layers": 6, "hidden_dim": 3072}, 688_128),
    ],
)
def test_parameter_counts_of_the_paper(architecture, overrides, expected):
    heads = {"num_attention_heads": 12} if architecture == "bert" else {"n_heads": 12}
    with torch.device("meta"):
        model = MtpfModel(MtpfConfig(encoder_config=encoder_config(architecture, 100, **overrides, **heads)))
        model.add_adapter("ner")
    assert count_parameters(model.backbone, "ner") == expected


def test_targets_are_the_last_layers_query_key_and_mlp(load, architecture):
    model = load(architecture)
    targets = lora_targets(model.backbone, LoraSettings(layers=1))
    expected = {
        "distilbert": ["attention.k_lin", "attention.q_lin", "ffn.lin1", "ffn.lin2"],
        "modernbert": ["attn.Wqkv", "mlp.Wi", "mlp.Wo"],
    }.get(architecture, ["attention.self.key", "attention.self.query", "intermediate.dense", "output.dense"])
    assert [target.split(".3.")[1] for target in targets] == expected
    model.add_adapter("ner", LoraSettings(layers=1))
    carrying = [name for name, module in model.backbone.named_modules() if hasattr(module, "lora_A")]
    assert sorted(carrying) == targets  # nothing more, e.g. not attention.output.dense


@pytest.mark.parametrize(
    "settings, message",
    [
        (LoraSettings(layers=5), "lora.layers is 5, but this encoder has 4 layers"),
        (LoraSettings(layers=0), "lora.layers is 0"),
        (LoraSettings(r=0), "rank must be at least 1"),
        (LoraSettings(dropout=2), "dropout from 0 to below 1"),
        (LoraSettings(targets=["attention.self"]), "'attention.self' is not in this encoder"),
        (
            LoraSettings(targets=["attention.quarry"]),
            "'attention.quarry' is not in this encoder; it has:.*intermediate",
        ),
    ],
)
def test_impossible_placement_is_refused(load, settings, message):
    model = load("bert")
    with pytest.raises(AdapterError, match=message):
        model.add_adapter("ner", settings)
    assert model.adapters == []


@pytest.mark.parametrize(
    "name",
    [
        "layer",
        "query",
        "0",
        "x",
        "Ner",
        "a b",
        "../up",
        "my_lora",
        "weights",
        "encoder",
        "a" * 65,
        "",
        "dense",
        "items",
        "train",
    ],
)
def test_dangerous_names_are_refused(load, name):
    with pytest.raises(AdapterError, match="[Aa]dapter name"):
        load("bert").add_adapter(name)


def test_a_name_in_use_is_refused(load):
    model = load("bert", {"ner": None})
    with pytest.raises(AdapterError, match="'ner' is already loaded"):
        model.add_adapter("ner")


def test_several_adapters_save_completely(load, tmp_path, batch):
    """Other adapters in memory must not change what one saves (peft#3584)."""
    adapters = {
        "ner": LoraSettings(r=4),
        "ner-2": LoraSettings(r=2, layers=3),
        "tc": LoraSettings(r=8, layers=1),
    }
    model = load("bert", adapters)
    for name, settings in adapters.items():
        model.save_adapter(tmp_path / name, name)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert len(tensors) == 2 * 4 * settings.layers
        again = load("bert")
        assert again.load_adapter(tmp_path / name) == name
        with torch.no_grad():
            expected = model.encode_adapters([name], **batch("bert"))[name]
            assert torch.equal(again.encode_adapters([name], **batch("bert"))[name], expected)


def test_saving_is_deterministic(load, tmp_path):
    model = load("bert", {"ner": LoraSettings(layers=4)})
    for folder in ("a", "b"):
        model.save_adapter(tmp_path / folder, "ner")
    for file in ("adapter_config.json", "adapter_model.safetensors", "task.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    targets = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets) and len(targets) == 16  # not shortened by PEFT


def test_other_loaders_read_the_folder(load, batch, encoders, architecture, tmp_path):
    model, inputs = load(architecture, {"ner": LoraSettings(r=4)}), batch(architecture)
    model.save_pretrained(tmp_path / "backbone")
    shutil.copytree(
        encoders[architecture], tmp_path / "backbone", dirs_exist_ok=True, ignore=lambda *_: {"config.json"}
    )
    model.save_adapter(tmp_path / "ner", "ner")
    with torch.no_grad():
        expected = model.encode_adapters(["ner"], **inputs)["ner"]
        stock = AutoModel.from_pretrained(tmp_path / "backbone").eval()
        stock.load_adapter(str(tmp_path / "ner"))
        assert torch.equal(stock(**inputs)[0], expected)
        for base in (AutoModel, MtpfModel):
            peft_model = PeftModel.from_pretrained(
                base.from_pretrained(tmp_path / "backbone"), tmp_path / "ner"
            )
            assert torch.equal(peft_model.eval()(**inputs)[0], expected), base
        sentence = SentenceTransformer(str(tmp_path / "backbone"), device="cpu")
        sentence.load_adapter(str(tmp_path / "ner"))
        # The pooling module passes the token vectors on.
        assert torch.equal(sentence.eval()(dict(inputs))["token_embeddings"], expected)


def test_heads_of_different_sizes_live_side_by_side(load, tmp_path):
    model = load("bert", {"one": None, "two": None})
    model.heads["one"] = head()
    model.heads["two"] = head("text-classification", [f"label {i}" for i in range(7)])
    for name in ("one", "two"):
        model.save_adapter(tmp_path / name, name)
    again = load("bert")
    for name in ("one", "two"):
        again.load_adapter(tmp_path / name)
        assert torch.equal(again.heads[name].weight, model.heads[name].weight)
        assert (again.heads[name].kind, again.heads[name].labels) == (
            model.heads[name].kind,
            model.heads[name].labels,
        )


def snapshot(model) -> dict:
    return {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}


def assert_unchanged(model, before):
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], v) and after[n].requires_grad == g for n, (v, g) in before.items())


def test_adding_and_deleting_leaves_the_rest_as_it_was(load, batch):
    model = load("bert", {"ner": None})
    model.backbone.embeddings.requires_grad_(False)
    model.set_adapter("ner")
    before, modules = snapshot(model), {name for name, _ in model.named_modules()}
    model.add_adapter("tc", LoraSettings(layers=3), head())
    assert model.active_adapters() == ["ner"] and model.adapters == ["ner", "tc"]
    model.delete_adapter("tc")
    assert_unchanged(model, before)
    assert {name for name, _ in model.named_modules()} == modules
    model.delete_adapter("ner")
    assert not [name for name, _ in model.named_modules() if "lora" in name or "base_layer" in name]
    assert model.adapters == [] and model.active_adapters() == []
    model.add_adapter("ner")  # the name is free again


def damage(app, how):  # noqa: C901
    file = {"head": "head.safetensors", "weights": "adapter_model.safetensors"}.get(how)
    if how == "head missing":
        (app / "head.safetensors").unlink()
    elif how == "no adapter":
        (app / "adapter_config.json").unlink()
    elif how == "weights":
        (app / file).write_bytes((app / file).read_bytes()[:-100])
    elif how == "head":
        save_file({"weight": torch.zeros(5, 32), "bias": torch.zeros(5)}, app / file)
    elif how in ("labels", "task"):
        task = json.loads((app / "task.json").read_text())
        task.pop("labels")
        (app / "task.json").write_text(json.dumps(task) if how == "labels" else "{")
    elif how == "one tensor less":
        tensors = load_file(app / "adapter_model.safetensors")
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, app / "adapter_model.safetensors")
    elif how == "another rank":  # a rank of 1 would be broadcast silently
        tensors = load_file(app / "adapter_model.safetensors")
        one = {k: v[:1] if "lora_A" in k else v[:, :1] for k, v in tensors.items()}
        save_file({k: v.contiguous() for k, v in one.items()}, app / "adapter_model.safetensors")
    elif how == "no matrix":
        tensors = load_file(app / "adapter_model.safetensors")
        flat = {k: v[:, 0].contiguous() if "lora_A" in k else v for k, v in tensors.items()}
        save_file(flat, app / "adapter_model.safetensors")
    elif how == "task missing":
        (app / "task.json").unlink()
    elif how in ("labels renamed", "max_length"):
        task = json.loads((app / "task.json").read_text())
        task |= {"max_length": "abc"} if how == "max_length" else {"labels": ["O", "I-PER", "B-PER"]}
        (app / "task.json").write_text(json.dumps(task))
    elif how == "task is a list":
        (app / "task.json").write_text("[]")
    elif how == "one module less":
        tensors = load_file(app / "adapter_model.safetensors")
        for key in sorted(tensors)[:2]:
            tensors.pop(key)
        save_file(tensors, app / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "how, message",
    [
        ("head missing", "its head is missing"),
        ("no adapter", "is not an adapter folder"),
        ("weights", "is damaged"),
        ("head", "does not fit 3 labels of width 32"),
        ("labels", "has no labels"),
        ("task", "is damaged"),
        ("one tensor less", "incomplete"),
        ("one module less", "disagree about"),
        ("another rank", "disagree about .* rank 4"),
        ("no matrix", "is not a matrix"),
        ("task is a list", "is damaged"),
        ("task missing", "has a head, but task.json does not name its kind"),
        ("labels renamed", "are not those that its head was trained with"),
        ("max_length", "'max_length' in task.json is 'abc'"),
    ],
)
def test_damaged_folders_are_refused_and_change_nothing(app, how, message):
    backbone, folder, _ = app
    damage(folder, how)
    model = MtpfModel.from_pretrained(backbone)
    before = snapshot(model)
    with pytest.raises(AdapterError, match=message):
        model.load_adapter(folder)
    assert_unchanged(model, before)
    assert model.adapters == [] and len(model.heads) == 0


def test_an_adapter_of_another_backbone_is_refused(app, load, batch):
    backbone, folder, _ = app
    other = MtpfModel.from_pretrained(backbone)
    with torch.no_grad():
        other.backbone.embeddings.word_embeddings.weight[7, 3] += 1e-3
    with pytest.raises(AdapterError, match="trained on another backbone.*sha256"):
        other.load_adapter(folder)
    assert other.load_adapter(folder, check_backbone=False) == "ner"
    wide = MtpfModel(config_of("bert", hidden_size=64))
    with pytest.raises(AdapterError, match="made for width 32, this one has 64"):
        wide.load_adapter(folder)
    shallow = MtpfModel(config_of("bert", num_hidden_layers=2))
    with pytest.raises(AdapterError, match="no linear layer for its tensor"):
        shallow.load_adapter(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_backbone_is_compared_in_every_dtype(app, load, tmp_path, dtype):
    backbone, folder, _ = app
    model = MtpfModel.from_pretrained(backbone, dtype=dtype)
    assert model.load_adapter(folder) == "ner"
    other = MtpfModel.from_pretrained(backbone, dtype=dtype)
    with torch.no_grad():
        other.backbone.embeddings.word_embeddings.weight[7, 3] += 1
    with pytest.raises(AdapterError, match=f"loaded in {dtype} from something else"):
        other.load_adapter(folder)
    changed = MtpfModel.from_pretrained(backbone)
    with torch.no_grad():
        changed.backbone.embeddings.word_embeddings.weight[7, 3] += 1
    changed.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match=f"loaded in {dtype} from something else"):
        MtpfModel.from_pretrained(tmp_path / "other", dtype=dtype).load_adapter(folder)
    assert other.adapters == [] and other.load_adapter(folder, check_backbone=False) == "ner"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_stock_encoders_file_with_other_bytes_is_compared_in_every_dtype(encoders, tmp_path, dtype):
    """Files that others wrote may hold more tensors, such as position ids, and other metadata."""
    folder = Path(shutil.copytree(encoders["bert"], tmp_path / "encoder"))
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.position_ids"] = torch.arange(64)[None]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "made_by": "others"})
    model = MtpfModel.from_pretrained(folder)
    model.add_adapter("ner", LoraSettings(r=2))
    model.save_adapter(tmp_path / "ner", "ner")
    other = MtpfModel.from_pretrained(folder, dtype=dtype)
    assert other.load_adapter(tmp_path / "ner") == "ner"
    with torch.no_grad():
        other.backbone.embeddings.word_embeddings.weight[7, 3] += 1
    with pytest.raises(AdapterError, match=f"loaded in {dtype} from something else"):
        other.load_adapter(tmp_path / "ner", "again")


def test_a_step_after_loading_is_noticed(app):
    """The file that the weights came from is still the right one, but fused AdamW has changed them."""
    backbone, folder, _ = app
    model = MtpfModel.from_pretrained(backbone)
    model.load_adapter(folder)
    model(input_ids=torch.tensor([[5, 6, 7]]))[0].sum().backward()
    torch.optim.AdamW(model.backbone.embeddings.parameters(), lr=1e-2, fused=True).step()
    with pytest.raises(AdapterError, match="trained on another backbone"):
        model.load_adapter(folder, adapter_name="again")


def test_the_weights_file_may_be_replaced_after_loading(app, load):
    backbone, folder, _ = app
    model = MtpfModel.from_pretrained(backbone)
    model.load_adapter(folder)
    tensors = load_file(backbone / "model.safetensors")
    save_file({key: value + 1 for key, value in tensors.items()}, backbone / "model.safetensors")
    assert model.load_adapter(folder, adapter_name="again") == "again"  # those in memory are the right ones
    with pytest.raises(AdapterError, match="trained on another backbone"):
        MtpfModel.from_pretrained(backbone).load_adapter(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"init_lora_weights": "pissa"}, "'init_lora_weights' .* is 'pissa'"),
        ({"layer_replication": [[0, 4], [2, 4]]}, "'layer_replication' .* left out"),
        ({"modules_to_save": ["pooler"]}, "'modules_to_save' .* left out"),
        ({"bias": "all"}, "'bias' .* is 'all'; it must be 'none'"),
        ({"use_dora": True}, "'use_dora' .* left out"),
        ({"r": "4"}, "'r' .* is '4'; it must be a whole number"),
        ({"r": 0}, "'r' .* is 0; it must be a whole number"),
        ({"target_modules": 5}, "'target_modules' .* must be a list"),
        ({"rank_pattern": "x"}, "'rank_pattern' .* is 'x'"),
        ({"peft_type": "IA3"}, "not a plain LoRA: 'peft_type'"),
    ],
)
def test_configs_that_do_more_than_add_a_lora_change_nothing(app, changes, message):
    """PiSSA, for one, would subtract from the backbone's weights while its LoRA is injected."""
    backbone, folder, _ = app
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    model = MtpfModel.from_pretrained(backbone)
    before = snapshot(model)
    with pytest.raises(AdapterError, match=message):
        model.load_adapter(folder)
    assert_unchanged(model, before)
    assert model.adapters == []


def test_an_endlessly_nested_task_is_damaged(app):
    backbone, folder, _ = app
    (folder / "task.json").write_text("[" * 100_000)
    with pytest.raises(AdapterError, match="is damaged"):
        MtpfModel.from_pretrained(backbone).load_adapter(folder)


def test_the_recorded_hash_is_that_of_the_saved_file(app):
    import hashlib

    backbone, folder, model = app
    digest = hashlib.sha256((backbone / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads((folder / "task.json").read_text())["backbone"]["sha256"] == digest
    assert backbone_sha256(model.backbone) == digest  # also with adapters attached


def test_unknown_places_and_local_backbone_ids_are_refused(load, tmp_path):
    model = load("bert", {"ner": None})
    with pytest.raises(AdapterError, match="not a Hub id of the form"):
        model.load_adapter(str(tmp_path / "nowhere"))
    with pytest.raises(AdapterError, match="no folder owner/missing, and the Hub cannot be reached"):
        model.load_adapter("owner/missing")
    with pytest.raises(AdapterError, match="'owner/name', not the path"):
        model.save_adapter(tmp_path / "a", "ner", backbone_id=str(tmp_path))
    with pytest.raises(AdapterError, match="no adapter 'tc'; loaded: ner"):
        model.save_adapter(tmp_path / "a", "tc")
    with pytest.raises(AdapterError, match="no adapter 'tc'; loaded: ner"), model.use_adapter("tc"):
        pass


def test_hash_notices_a_fused_optimiser_step(load, tmp_path):
    """Fused AdamW does not raise the version counter of what it changes."""
    model = load("bert", {"ner": None})
    model.requires_grad_(True)
    before = backbone_sha256(model.backbone)
    model(input_ids=torch.tensor([[5, 6, 7]]))[0].sum().backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True).step()
    assert backbone_sha256(model.backbone) != before
    model.save_pretrained(tmp_path / "backbone")
    model.save_adapter(tmp_path / "ner", "ner")
    assert MtpfModel.from_pretrained(tmp_path / "backbone").load_adapter(tmp_path / "ner") == "ner"


def test_dropout_of_a_loaded_adapter_is_off_in_eval_mode(load, batch, tmp_path):
    load("bert", {"ner": LoraSettings(dropout=0.5)}).save_adapter(tmp_path, "ner")
    model = load("bert")
    model.load_adapter(tmp_path)
    with torch.no_grad():
        first, second = (model.encode_adapters(["ner"], **batch("bert"))["ner"] for _ in range(2))
    assert torch.equal(first, second)


ADAPTER_AS_MODEL = """
import json, torch
from transformers import AutoModel
model = AutoModel.from_pretrained({folder!r}, trust_remote_code=True).eval()
inputs, expected = torch.load({expected!r})
with torch.no_grad():
    difference = float((model(**inputs)[0] - expected).abs().max())
print(json.dumps([type(model).__name__, model.active_adapters(), difference]))
"""


@pytest.mark.slow
def test_auto_model_of_an_adapter_folder_has_it_active(load, batch, tmp_path, fresh_process):
    model, inputs = load("bert", {"ner": LoraSettings(r=4)}), batch("bert")
    model.save_pretrained(tmp_path / "backbone")
    folder = model.save_adapter(tmp_path / "ner", "ner")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "backbone")  # stands for the published repo id
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with torch.no_grad():
        torch.save((inputs, model.encode_adapters(["ner"], **inputs)["ner"]), tmp_path / "expected.pt")
    code = ADAPTER_AS_MODEL.format(folder=str(folder), expected=str(tmp_path / "expected.pt"))
    name, active, difference = fresh_process(code, package=False)
    assert (name, len(active), difference) == ("MtpfModel", 1, 0.0)
