"""Opening a backbone: what each wrong name is told, in one sentence."""

import pytest
import torch

from modeling_mtpf.data.backbones import load_backbone, open_backbone
from modeling_mtpf.data.packaged_encoder import packaged_encoder
from modeling_mtpf.errors import MtpfError


def test_a_folder_is_opened_frozen_with_its_tokenizer(encoders):
    model, tokenizer = open_backbone(str(encoders["roberta"]))
    assert model.dtype == torch.float32 and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer(["Ada", "left"], is_split_into_words=True).word_ids()[1] == 0
    eager = load_backbone(str(encoders["roberta"]), attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "name, reason",
    [
        ("./nowhere", "There is no folder ./nowhere, and it is not a Hub id"),
        ("user/models/mine", "There is no folder user/models/mine"),
        ("{root}/run", "has no config.json. Did you mean {root}/run/backbone?"),
        ("{root}/app", "has no config.json. It is an adapter."),
        ("{root}", "has no config.json."),
        ("apps/entities", "There is no folder apps/entities in the local folder apps"),
        ("{root}/gpt2", "gpt2"),
        ("{root}/damaged", ""),
    ],
)
def test_what_cannot_be_opened_is_one_sentence(encoders, tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "apps").mkdir()
    files = {
        "run/backbone/config.json": "{}",
        "app/adapter_config.json": "{}",
        "gpt2/config.json": '{"model_type": "gpt2"}',
        "damaged/config.json": (encoders["bert"] / "config.json").read_text(),
        "damaged/model.safetensors": "x",
    }
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    with pytest.raises(MtpfError) as error:
        load_backbone(name.format(root=tmp_path))
    message = str(error.value)
    assert message.startswith(f"The backbone '{name.format(root=tmp_path)}' cannot be loaded: ")
    assert reason.format(root=tmp_path) in message and "\n" not in message


def test_packaged_encoder_with_other_weights_is_refused(tmp_path):
    assert (packaged_encoder() / "tokenizer.json").is_file()
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    with pytest.raises(MtpfError, match="sha256 .* not 53aa5117.*reinstall"):
        packaged_encoder(tmp_path)
