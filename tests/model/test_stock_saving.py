"""What stock calls save or publish is whole, or the call names the command whose result is."""

import logging

import pytest
import torch
from conftest import randomize
from huggingface_hub import HfApi
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from modeling_mtpf import MtpfForTokenClassification, MtpfModel
from modeling_mtpf.errors import MtpfError
from modeling_mtpf.hub import inspect, push_backbone

TRUSTED = """
import json, torch
from transformers import AutoModelForTokenClassification, AutoTokenizer
model = AutoModelForTokenClassification.from_pretrained("mtpf/x", trust_remote_code=True).eval()
inputs = AutoTokenizer.from_pretrained("mtpf/x", trust_remote_code=False)("Call Ada", return_tensors="pt")
with torch.no_grad():
    print(json.dumps([type(model).__name__, model(**inputs)[0].tolist()]))
"""


@pytest.mark.parametrize("cls", [MtpfModel, MtpfForTokenClassification])
def test_pushing_a_model_alone_is_refused_before_anything_happens(folders, tmp_path, cls):
    model = cls.from_pretrained(folders / "backbone")
    command = "mtpf push backbone FOLDER ada/x" if cls is MtpfModel else "hf upload ada/x FOLDER"
    with pytest.raises(MtpfError, match=command):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="ada/x")
    with pytest.raises(MtpfError, match=command):
        model.push_to_hub("ada/x")
    assert not (tmp_path / "saved").exists()


@pytest.mark.hub
@pytest.mark.slow
def test_the_named_command_publishes_a_task_model_whole(hub, folders, tmp_path, fresh_process):
    model = MtpfForTokenClassification.from_pretrained(folders / "backbone").eval()
    tokenizer = AutoTokenizer.from_pretrained(folders / "backbone")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "saved")
    with pytest.raises(MtpfError, match="task model with its classifier"):
        push_backbone(tmp_path / "saved", "mtpf/x")
    HfApi().create_repo("mtpf/x")
    HfApi().upload_folder(repo_id="mtpf/x", folder_path=tmp_path / "saved")  # what `hf upload` calls
    environment = hub.environment() | {"HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "fresh")}
    name, output = fresh_process(TRUSTED, package=False, **environment)
    with torch.no_grad():
        expected = model(**tokenizer("Call Ada", return_tensors="pt"))[0]
    assert name == "MtpfForTokenClassification"
    torch.testing.assert_close(torch.tensor(output), expected)


@pytest.mark.parametrize("library", ["transformers", "sentence-transformers"])
def test_a_folder_saved_again_without_trust_loads_and_can_be_completed(folders, tmp_path, library):
    saved, tokenizer = tmp_path / "saved", AutoTokenizer.from_pretrained(folders / "backbone")
    if library == "transformers":
        AutoModel.from_pretrained(folders / "backbone").save_pretrained(saved)
        tokenizer.save_pretrained(saved)
    else:
        SentenceTransformer(str(folders / "backbone"), device="cpu").save(str(saved))
    inputs = tokenizer("Call Ada", return_tensors="pt")
    model = MtpfModel.from_pretrained(saved).eval()
    with torch.no_grad():
        expected = MtpfModel.from_pretrained(folders / "backbone").eval()(**inputs)[0]
        assert torch.equal(model(**inputs)[0], expected)
        assert torch.equal(AutoModel.from_pretrained(saved).eval()(**inputs)[0], expected)
    model.load_adapter(folders / "intent")  # it is the backbone that the app was fitted on
    model.delete_adapter("intent")
    advice = [
        finding for finding in inspect(saved).findings if "MtpfModel.from_pretrained(FOLDER)" in finding
    ]
    assert len(advice) == 1
    MtpfModel.from_pretrained(saved).save_pretrained(saved)
    assert not [finding for finding in inspect(saved).findings if "code" in finding]
    model = AutoModel.from_pretrained(saved, trust_remote_code=True).eval()
    with torch.no_grad():
        assert type(model).__name__ == "MtpfModel" and torch.equal(model(**inputs)[0], expected)


@pytest.mark.parametrize("path", ["missing/deep/folder", "./missing", "missing/folder/"])
def test_a_missing_folder_is_named_in_a_sentence(path):
    with pytest.raises(MtpfError, match=r"^There is no folder .*missing"):
        MtpfModel.from_pretrained(path)


@pytest.mark.parametrize("library", ["transformers", "sentence-transformers", "Trainer's state", "our own"])
def test_saving_the_backbone_says_which_trained_adapter_is_not_in_it(folders, tmp_path, caplog, library):
    lora = LoraConfig(target_modules=["attention.self.query"])
    model = whole = MtpfModel.from_pretrained(folders / "backbone")
    save = model.save_pretrained
    if library == "sentence-transformers":
        whole = SentenceTransformer(str(folders / "backbone"), trust_remote_code=True, device="cpu")
        model, save = whole[0].model, whole.save
        whole.add_adapter(lora, "mine")
    elif library == "our own":
        model.add_adapter("mine")
    else:
        model.add_adapter(lora, "mine")
    if library.startswith("Trainer"):
        save = lambda folder: model.save_pretrained(folder, state_dict=model.state_dict())  # noqa: E731

    def warned() -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            save(str(tmp_path / "saved"))
        return [record.getMessage() for record in caplog.records if "adapter" in record.getMessage()]

    expected = f"{tmp_path / 'saved'} holds the backbone without the adapter in training 'mine'; "
    assert warned() == [expected + "write it with: model.save_adapter(FOLDER, 'mine')"]
    model.save_adapter(tmp_path / "mine", "mine")
    assert warned() == []
    randomize(model, within=".mine.")  # trained further
    assert len(warned()) == 1
    model.save_adapter(tmp_path / "mine", "mine")
    model.load_adapter(folders / "intent")  # not in training: its folder has it
    assert warned() == []
    model.delete_adapter("mine")
    model.add_adapter("mine")
    assert len(warned()) == 1
