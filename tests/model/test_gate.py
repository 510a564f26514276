"""Files that someone else wrote: refused in one sentence, by loading and `inspect` alike, in bounded time."""

import json
import os
import re
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hub_cards import adapter_card
from modeling_mtpf import AdapterError, MtpfModel
from modeling_mtpf.cli.main import main
from modeling_mtpf.data.encoding import encode_rows
from modeling_mtpf.data.words import load_word_tokenizer
from modeling_mtpf.errors import DataError, MtpfError
from modeling_mtpf.hub import inspect
from modeling_mtpf.model.backbone_identity_mtpf import settings_of
from modeling_mtpf.model.texts_mtpf import TextTokenizer
from modeling_mtpf.model.tokenizer_gate_mtpf import open_tokenizer

EVIL = "(([a-z0-9]+)+[._]?)+!"
"""A pattern that takes hours on the name of a module."""


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(file: Path, change) -> None:
    tensors = {key: change(key, value).contiguous() for key, value in load_file(file).items()}
    labels = json.dumps(["O", "B-PER", "I-PER"])
    save_file(tensors, file, metadata={"labels": labels})


def refuses(load, folder: Path, message: str) -> None:
    """Loading refuses a folder in one sentence, and `inspect` finds the same, both at once."""
    started = time.process_time()
    with pytest.raises(MtpfError, match=message) as refusal:
        load()
    assert "\n" not in str(refusal.value)
    assert re.search(message, "\n".join(inspect(folder).findings)), inspect(folder).findings
    assert time.process_time() - started < 5


@pytest.fixture
def model(folders):
    return MtpfModel.from_pretrained(folders / "backbone").eval()


@pytest.mark.parametrize(
    "changes",
    [
        {"exclude_modules": EVIL},
        {"target_modules": EVIL},
        {"target_modules": [EVIL]},
        {"layers_pattern": EVIL},
        {"layers_pattern": [EVIL]},
        {"rank_pattern": {EVIL: 4}},
        {"alpha_pattern": {EVIL: 4}},
        {"exclude_modules": [EVIL]},
        {"target_modules": "all-linear"},
        {"target_modules": []},
        {"target_modules": [["query"]]},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 1e30},
        {"lora_alpha": True},
        {"lora_dropout": 1.5},
        {"r": 10**9},
        {"r": True},
        {"r": 5},
        {"rank_pattern": {"encoder.layer.3.attention.self.query": 10**9}},
        {"lora_bias": True},
        {"use_dora": True},
        {"modules_to_save": ["pooler"]},
        {"trainable_token_indices": [1]},
        {"target_parameters": ["x"]},
        {"init_lora_weights": "pissa"},
        {"a_setting_of_the_future": 3},
        {"peft_type": None},
        {"base_model_name_or_path": "a\x1b[31m"},
    ],
    ids=str,
)
def test_adapter_configs_are_refused(model, entities, changes):
    edit(entities / "adapter_config.json", **changes)
    key = next(iter(changes))
    message = rf"{key}|is not valid JSON|disagree about|control character"
    refuses(lambda: model.load_adapter(entities), entities, message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_length": -5}, "'max_length' in task.json is -5"),
        ({"max_length": 0}, "'max_length'"),
        ({"max_length": True}, "'max_length'"),
        ({"max_length": 10**9}, "'max_length'"),
        ({"format_version": 4}, "made by a newer mtpf"),
        ({"format_version": "x"}, "'format_version'"),
        ({"labels": ["O", "B-PER", "I-\x1b[2JPER"]}, "control character"),
        ({"labels": ["O", "B-PER", "I-PER\nFINDING none"]}, "'labels'"),
        ({"labels": ["O", "B-PER", "B-PER"]}, "twice"),
        ({"labels": ["O", "B-PER", ""]}, "'labels'"),
        ({"labels": [str(number) for number in range(1_000_000)]}, "labels|entries"),
        ({"labels": [str(number) for number in range(99_000)]}, "does not fit 99,000 labels"),
        ({"name": "a\x1b]0;b"}, "control character"),
        ({"name": "../x"}, "'name'"),
        ({"metrics": {"f1": float("nan")}}, "NaN is not a number"),
        ({"metrics": {"f1": [float("-inf")]}}, "Infinity is not a number"),
        ({"kind": "regression"}, "'kind'"),
        ({"problem_type": "multi_label_classification"}, "'problem_type' in task.json is only for"),
        ({"problem_type": ["x"]}, "'problem_type'"),
        ({"backbone": {"sha256": "x" * 64}}, "'sha256'"),
        ({"backbone": {"id": "../../x"}}, "'id'"),
        ({"notes": "\u202e"}, "control character"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_tasks_are_refused(model, entities, changes, message):
    edit(entities / "task.json", **changes)
    refuses(lambda: model.load_adapter(entities), entities, message)


def deep(text: str) -> str:
    return text[:-1] + ', "x": ' + "[" * 40 + "]" * 40 + "}"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text[:-1] + ', "r": 4, "r": 4}', "twice"),
        (lambda text: text[:-1] + "".join(f', "k{n}": 0' for n in range(40_000)) + ', "k39999": 0}', "twice"),
        (deep, "nested too deep"),
        (lambda text: text[:-1] + ', "x": 1e999}', "not finite"),
        (lambda text: " " * 33_000_000, "larger than"),
        (lambda text: '{"x": [' + "0," * 1_500_000 + "0]}", "entries|larger than"),
        (lambda text: text + "\x00", "not valid JSON"),
        (lambda text: text[:-1] + ', "x": "\\ud800"}', "control character"),
        (lambda text: "[]", "must hold a JSON object"),
    ],
)
@pytest.mark.parametrize("file", ["adapter_config.json", "task.json"])
def test_json_is_read_strictly(model, entities, file, change, message):
    (entities / file).write_text(change((entities / file).read_text().strip()))
    refuses(lambda: model.load_adapter(entities), entities, message)


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
    "file", ["adapter_config.json", "task.json", "adapter_model.safetensors", "head.safetensors"]
)
def test_pipes_and_devices_are_not_read(model, entities, file, kind):
    (entities / file).unlink()
    if kind == "pipe":
        os.mkfifo(entities / file)
    else:
        (entities / file).symlink_to("/dev/zero")
    with pytest.raises(AdapterError, match="not a regular file|has no|is missing"):
        model.load_adapter(entities)
    assert inspect(entities).findings


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "head.safetensors"])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: torch.full_like(v, float("nan")), "not finite"),
        (lambda v: v.index_fill(0, torch.tensor([0]), float("inf")), "not finite"),
        (lambda v: v.float() * 1e25, "beyond 1e.09"),
        (lambda v: torch.full_like(v, 3e38, dtype=torch.float32), "beyond 1e.09"),
        (lambda v: v.to(torch.int8), "has the type 'I8'"),
        (lambda v: v.to(torch.bool), "has the type 'BOOL'"),
        (lambda v: v.to(torch.float8_e4m3fn), "has the type 'F8_E4M3'"),
        (lambda v: v.to(torch.int32), "has the type 'I32'"),
    ],
    ids=["nan", "inf", "huge", "largest", "int8", "bool", "float8", "int32"],
)
def test_tensors_are_finite_floating_numbers(model, entities, file, change, message):
    edit_tensors(entities / file, lambda key, value: change(value))
    refuses(lambda: model.load_adapter(entities), entities, message)
    assert model.adapters == []


@pytest.mark.parametrize("app", ["entities", "intent"])
def test_scores_that_are_not_numbers_are_refused(folders, model, app):
    model.load_adapter(folders / app)
    with torch.no_grad():
        model.heads[app].weight.mul_(1e38)
    with pytest.raises(MtpfError, match=f"App '{app}' gives scores that are not numbers"):
        model.predict(["Call Ada", "Lunch"], adapters=[app])


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-1, 2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**50]}},
        {"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
        {"a": [], "__metadata__": {"a": 5}},
        {"__metadata__": 5},
    ],
)
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "head.safetensors"])
def test_headers_are_checked_against_the_file(model, entities, file, header):
    text = json.dumps(header).encode()
    (entities / file).write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    refuses(lambda: model.load_adapter(entities), entities, "damaged or not a safetensors file|incomplete")


@pytest.mark.parametrize("targets", [["query", "value"], ["attention.self.query"]])
@pytest.mark.parametrize("layers", [None, [2, 3]])
def test_adapters_of_peft_with_parts_of_names_load_as_in_peft(
    model, folders, tmp_path, batch, targets, layers
):
    torch.manual_seed(0)
    stock = AutoModel.from_pretrained(folders / "backbone")
    config = LoraConfig(r=4, target_modules=targets, layers_to_transform=layers, init_lora_weights=False)
    PeftModel(stock, config).save_pretrained(tmp_path / "plain")
    with torch.no_grad():
        expected = stock.eval()(**batch("bert"))[0]
        assert model.load_adapter(tmp_path / "plain", adapter_name="plain") == "plain"
        assert torch.equal(model.encode_adapters(["plain"], **batch("bert"))["plain"], expected)
    weights = tmp_path / "plain" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({key: value for key, value in tensors.items() if "layer.3" not in key}, weights)
    with pytest.raises(AdapterError, match="disagree about"):
        model.load_adapter(tmp_path / "plain", adapter_name="cut")


# ----------------------------------------------------------------------------------------------- backbones


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1_000_000},
        {"num_hidden_layers": 5},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 4.5},
        {"hidden_size": 10**8},
        {"vocab_size": 2 * 10**9},
        {"vocab_size": 1000},
        {"intermediate_size": 60_000},
        {"max_position_embeddings": 10**12},
        {"num_attention_heads": 0},
        {"layer_norm_eps": -1},
        {"layer_norm_eps": "x"},
        {"chunk_size_feed_forward": 7},
        {"dtype": "load"},
        {"id2label": {str(number): "x" for number in range(200_000)}},
        {"num_labels": 10**9},
        {"mtpf": {"attn_implementation": "evil/kernel"}},
        {"mtpf": {"encoder_config": None}},
        {"mtpf": {"source_revision": "main"}},
        {"mtpf": {"num_tail_layers": 10**9}},
        {"mtpf": {"regime": ["x"]}},
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "kernels-community/flash-attn"},
        {"attn_implementation": {"encoder_config": "evil/kernel"}},
        {"experts_implementation": "evil/kernel"},
        {"quantization_config": {"quant_method": "gptq"}},
        {"per_layer_config": {"0": {"x": 1}}},
        {"hidden_act": "evil/act"},
        {"to_dict": 1},
        {"architectures": ["\x1b[2J"]},
    ],
    ids=lambda changes: str(changes)[:50],
)
def test_configs_of_backbones_are_refused_before_anything_is_built(backbone, changes):
    edit(backbone / "config.json", **changes)
    key = next(iter(changes["mtpf"] if isinstance(changes.get("mtpf"), dict) else changes))
    message = rf"'{key}'|control character|sets '{key}'"
    refuses(lambda: MtpfModel.from_pretrained(backbone), backbone, message)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_of_backbones_are_finite(backbone, value):
    tensors = load_file(backbone / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][3, 4] = value
    save_file(tensors, backbone / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        MtpfError, match="encoder.layer.1.output.dense.weight' holds numbers that are not finite"
    ):
        MtpfModel.from_pretrained(backbone)


def test_weights_of_another_shape_are_one_sentence(backbone):
    tensors = load_file(backbone / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"] = torch.zeros(31)
    save_file(tensors, backbone / "model.safetensors", metadata={"format": "pt"})
    refuses(
        lambda: MtpfModel.from_pretrained(backbone), backbone, "embeddings.LayerNorm.bias' is .31,. there"
    )


# ------------------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize(
    "changes",
    [
        *({"layer_norm_eps": 0.5}, {"num_attention_heads": 4}, {"hidden_act": "relu"}),
        *({"is_causal": True}, {"a_setting_of_the_future": 3}),
    ],
)
def test_an_adapter_notices_a_setting_that_changes_results(backbone, entities, changes):
    edit(backbone / "config.json", **changes)
    other = MtpfModel.from_pretrained(backbone)
    with pytest.raises(
        AdapterError, match=f"another backbone: '{next(iter(changes))}' in its config.json was"
    ):
        other.load_adapter(entities)
    assert other.adapters == [] and other.load_adapter(entities, check_backbone=False) == "entities"
    old = json.loads((entities / "task.json").read_text())
    old["backbone"] = {key: old["backbone"][key] for key in ("id", "revision", "sha256", "dtype")}
    (entities / "task.json").write_text(json.dumps(old))  # as older versions wrote it: the weights alone
    assert other.load_adapter(entities, adapter_name="old") == "old"


def test_settings_that_change_nothing_are_not_compared(backbone, entities):
    edit(
        backbone / "config.json",
        hidden_dropout_prob=0.3,
        initializer_range=0.5,
        id2label={"0": "x"},
        label2id=None,
        use_cache=False,
        dtype="float32",
        gradient_checkpointing=False,
        eos_token_id=3,
    )
    assert MtpfModel.from_pretrained(backbone).load_adapter(entities) == "entities"


def test_settings_stay_the_same_when_a_backbone_is_saved(encoders, tmp_path):
    for name, encoder in encoders.items():
        model = MtpfModel.from_pretrained(encoder)
        model.save_pretrained(tmp_path / name)
        again = MtpfModel.from_pretrained(tmp_path / name, dtype="bfloat16", attn_implementation="eager")
        stock = AutoModel.from_pretrained(tmp_path / name)
        assert settings_of(model.backbone) == settings_of(again.backbone) == settings_of(stock)


def test_the_tokenizer_of_fitting_is_that_of_predicting(encoders):
    for encoder in encoders.values():
        predicting, fitting = open_tokenizer(str(encoder)), load_word_tokenizer(str(encoder))
        assert TextTokenizer(predicting).sha256 == TextTokenizer(fitting).sha256


def lower_case_off(folder: Path) -> None:
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(stored))


def words_exchanged(folder: Path) -> None:
    stored = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    vocabulary["remind"], vocabulary["tickets"] = vocabulary["tickets"], vocabulary["remind"]
    (folder / "tokenizer.json").write_text(json.dumps(stored))


def stored_with(change):
    def edit_stored(folder: Path) -> None:
        stored = json.loads((folder / "tokenizer.json").read_text())
        change(stored)
        (folder / "tokenizer.json").write_text(json.dumps(stored))

    return edit_stored


def word_replaced(stored) -> None:
    step = {"type": "Replace", "pattern": {"String": "remind"}, "content": "tickets"}
    stored["normalizer"] = {"type": "Sequence", "normalizers": [stored["normalizer"], step]}


def word_split(stored) -> None:
    step = {"type": "Split", "pattern": {"String": "mind"}, "behavior": "Isolated", "invert": False}
    stored["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [stored["pre_tokenizer"], step]}


@pytest.mark.parametrize(
    "change",
    [
        *(lower_case_off, words_exchanged, stored_with(word_replaced), stored_with(word_split)),
        stored_with(lambda stored: stored["model"].update(max_input_chars_per_word=400)),
        stored_with(lambda stored: stored["added_tokens"][-1].update(single_word=True)),
    ],
    ids=["lower case", "vocabulary", "normalizer", "pre-tokenizer", "model", "added tokens"],
)
def test_an_app_notices_another_tokenizer(backbone, entities, change):
    change(backbone)
    model = MtpfModel.from_pretrained(backbone).eval()
    model.load_adapter(entities)
    with pytest.raises(AdapterError, match="trained with another tokenizer"):
        model.predict(["Call Ada"], adapters=["entities"])
    with pytest.raises(AdapterError, match="trained with another tokenizer"):
        model.load_adapter(entities, adapter_name="again")  # now the tokenizer is known
    model.load_adapter(entities, adapter_name="trusted", check_backbone=False)
    assert model.predict(["Call Ada"], adapters=["trusted"])["trusted"]


def test_a_tokenizer_that_is_saved_again_is_the_same(folders, backbone, entities):
    stored = json.loads((backbone / "tokenizer.json").read_text())
    (backbone / "tokenizer.json").write_text(json.dumps(stored, sort_keys=True, indent=None))
    model = MtpfModel.from_pretrained(backbone).eval()
    model.load_adapter(entities)
    expected = MtpfModel.from_pretrained(folders / "backbone").eval()
    expected.load_adapter(entities)
    texts = ["Call Ada in London"]
    assert model.predict(texts, adapters=["entities"]) == expected.predict(texts, adapters=["entities"])


# ---------------------------------------------------------------------------------------------- tokenizers


def changed(**parts):
    return lambda stored: stored.update(parts)


def with_id(number):
    return lambda stored: stored["model"]["vocab"].update(evil=number)


def split_on(pattern):
    return changed(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
    )


def replaced(pattern, content, times=1):
    step = {"type": "Replace", "pattern": pattern, "content": content}
    return changed(normalizer={"type": "Sequence", "normalizers": [step] * times})


def precompiled(text):
    return changed(normalizer={"type": "Precompiled", "precompiled_charsmap": text})


TOKENIZERS = {
    "map": (precompiled("AAAA"), "map of characters is damaged"),
    "map of no base64": (precompiled("?"), "tokenizer.json"),
    "map of a huge trie": (precompiled("/////w=="), "map of characters is damaged"),
    "map of a broken trie": (precompiled("BAAAAP////9hAA=="), "tokenizer"),
    "exponential": (split_on("(a+)+b"), "may take exponential time"),
    "polynomial": (split_on(r"\s*\s*\s*x"), "may take exponential time"),
    "lookahead": (split_on("(?=a+)b"), "may take exponential time"),
    "exponential replacement": (replaced({"Regex": "(x+)+y"}, ""), "may take exponential time"),
    "no pattern": (split_on("["), "may take exponential time"),
    "growth": (replaced({"String": "a"}, "aa", 40), "too long"),
    "empty pattern": (replaced({"String": ""}, "x"), "too long"),
    "huge id": (with_id(4_000_000_000), "token id 4000000000"),
    "id beyond the embedding": (with_id(9_000_000), "token id 9000000, but the encoder only"),
    "negative id": (with_id(-1), "token id -1"),
    "text as id": (with_id("1"), "token id '1'"),
    "unknown missing": (lambda s: s["model"].update(unk_token="[NONE]"), "unknown words, '.NONE.'"),
    "unknown removed": (lambda s: s["model"]["vocab"].pop("[UNK]"), "unknown words"),
    "long words": (lambda s: s["model"].update(max_input_chars_per_word=10**9), "max_input_chars_per_word"),
    "special missing": (lambda s: s["post_processor"]["special_tokens"].clear(), "tokenizer"),
    "no model": (lambda s: s.pop("model"), "has no model"),
    "model of another type": (lambda s: s["model"].update(type="Evil"), "tokenizer"),
    "deep": (changed(normalizer=json.loads('{"normalizers": [' * 50 + "]}" * 50)), "nested too deep"),
    "control": (changed(decoder={"type": "\x1b[2J"}), "control character"),
}


@pytest.mark.parametrize("how", TOKENIZERS)
def test_tokenizers_are_refused(backbone, entities, how):
    change, message = TOKENIZERS[how]
    stored = json.loads((backbone / "tokenizer.json").read_text())
    change(stored)
    (backbone / "tokenizer.json").write_text(json.dumps(stored))
    model = MtpfModel.from_pretrained(backbone).eval()
    model.load_adapter(entities)
    refuses(lambda: model.predict(["Call Ada"], adapters=["entities"]), backbone, message)


@pytest.mark.parametrize(
    "changes",
    [
        {"fast_tokenizer_files": ["tokenizer.json", "tokenizer.5.0.json"]},
        {"tokenizer_file": "/dev/null"},
        {"vocab_file": "../vocab.txt"},
    ],
)
def test_a_tokenizer_is_not_read_from_a_file_that_is_not_checked(backbone, entities, changes):
    edit(backbone / "tokenizer_config.json", **changes)
    model = MtpfModel.from_pretrained(backbone).eval()
    model.load_adapter(entities)
    refuses(lambda: model.predict(["a"], ["entities"]), backbone, f"'{next(iter(changes))}' names a file")


@pytest.mark.parametrize("pattern", [r"\s+", " {2,}", "[^a-z]+|x", r"\p{L}+", "ab?"])
def test_linear_patterns_are_accepted(backbone, entities, pattern):
    stored = json.loads((backbone / "tokenizer.json").read_text())
    split_on(pattern)(stored)
    (backbone / "tokenizer.json").write_text(json.dumps(stored))
    model = MtpfModel.from_pretrained(backbone).eval()
    model.load_adapter(entities, check_backbone=False)
    assert model.predict(["Call Ada"], adapters=["entities"])


@pytest.mark.parametrize("keep", [(), ("tokenizer_config.json",)])
def test_a_backbone_without_tokenizer_predicts_nothing(backbone, entities, keep):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if file not in keep:
            (backbone / file).unlink()
    model = MtpfModel.from_pretrained(backbone).eval()
    model.load_adapter(entities)
    with pytest.raises(MtpfError, match="has no tokenizer, or a part of one only"):
        model.predict(["Call Ada"], adapters=["entities"])
    with pytest.raises(MtpfError, match="has no tokenizer, or a part of one only"):
        load_word_tokenizer(str(backbone))


def test_a_saved_backbone_has_the_tokenizer_of_the_loaded_one(folders, entities, tmp_path):
    MtpfModel.from_pretrained(folders / "backbone").save_pretrained(tmp_path / "saved")
    model = MtpfModel.from_pretrained(tmp_path / "saved").eval()
    model.load_adapter(entities)
    expected = MtpfModel.from_pretrained(folders / "backbone").eval()
    expected.load_adapter(entities)
    texts = ["Ada Lovelace met Charles Babbage in London on Monday."]
    assert (
        model.predict(texts, adapters=["entities"]) == expected.predict(texts, adapters=["entities"]) != [[]]
    )


def replace(file: Path, data: bytes | None) -> None:
    file.unlink()
    if data is not None:
        file.write_bytes(data)


BROKEN = {
    "nothing": lambda d: shutil.rmtree(d) or d.mkdir(),
    "no config": lambda d: (d / "config.json").unlink(),
    "config is a folder": lambda d: replace(d / "config.json", None) or (d / "config.json").mkdir(),
    "config is empty": lambda d: replace(d / "config.json", b""),
    "config is a list": lambda d: replace(d / "config.json", b"[]"),
    "config is not UTF-8": lambda d: replace(d / "config.json", b"\xff\xfe{}"),
    "config of nothing": lambda d: replace(d / "config.json", b"{}"),
    "another model": lambda d: edit(d / "config.json", model_type="llama"),
    "no such model": lambda d: edit(d / "config.json", model_type="x"),
    "a rope": lambda d: edit(d / "config.json", model_type="modernbert", rope_parameters=5),
    "layer types": lambda d: edit(d / "config.json", model_type="modernbert", layer_types=["x"]),
    "heads": lambda d: edit(d / "config.json", num_attention_heads=3),
    "no weights": lambda d: (d / "model.safetensors").unlink(),
    "weights are empty": lambda d: replace(d / "model.safetensors", b""),
    "weights are a folder": lambda d: (
        replace(d / "model.safetensors", None) or (d / "model.safetensors").mkdir()
    ),
    "weights are cut": lambda d: replace(
        d / "model.safetensors", (d / "model.safetensors").read_bytes()[:-99]
    ),
    "a pickle": lambda d: (
        replace(d / "model.safetensors", None)
        or (d / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    ),
    "an index of nothing": lambda d: (
        replace(d / "model.safetensors", None)
        or (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    ),
    "tokenizer is empty": lambda d: replace(d / "tokenizer.json", b""),
    "tokenizer of nothing": lambda d: replace(d / "tokenizer.json", b"{}"),
    "tokenizer is a list": lambda d: replace(d / "tokenizer.json", b"[1]"),
    "no tokenizer": lambda d: [file.unlink() for file in d.glob("tokenizer*")],
    "tokenizer's config": lambda d: replace(d / "tokenizer_config.json", b'{"tokenizer_class": 5}'),
    "tokenizer's class": lambda d: edit(d / "tokenizer_config.json", tokenizer_class="os.system"),
    "tokenizer's code": lambda d: edit(
        d / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_predict_says_in_one_sentence_what_is_wrong_with_a_backbone(backbone, entities, tmp_path, capfd, how):
    BROKEN[how](backbone)
    (tmp_path / "texts.txt").write_text("Call Ada\n")
    arguments = ["--backbone", str(backbone), "--adapter", str(entities), str(tmp_path / "texts.txt")]
    status = main(["predict", *arguments])
    printed = capfd.readouterr()
    if how in ("tokenizer's code", "tokenizer's class"):  # neither is run; the tokenizer itself is whole
        assert status == 0 and json.loads(printed.out)["results"]["entities"] is not None
        return
    assert status == 2 and printed.out == "" and "Traceback" not in printed.err
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and printed.err.endswith(errors[0] + "\n") and len(errors[0]) < 700


def test_a_tokenizer_without_pad_token_is_one_sentence(backbone):
    tokenizer = make_tokenizer(False)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(backbone)
    with pytest.raises(DataError, match="has no pad token"):
        load_word_tokenizer(str(backbone))
    with pytest.raises(DataError, match="has no pad token"):
        encode_rows(tokenizer, ["a"], 8)


def test_a_slow_class_is_one_sentence(backbone):
    edit(backbone / "tokenizer_config.json", tokenizer_class="BertJapaneseTokenizer")
    with pytest.raises(MtpfError, match="'tokenizer_class' in its tokenizer_config.json"):
        load_word_tokenizer(str(backbone))


def test_inspect_ends_a_sentence_once(backbone):
    edit(backbone / "config.json", to_dict=1)
    assert any("sets 'to_dict'." in finding for finding in inspect(backbone).findings)
    assert not any(finding.endswith("..") for finding in inspect(backbone).findings)


def test_inspect_shortens_whole_paths_only(entities, monkeypatch):
    monkeypatch.chdir(shutil.move(entities, entities.with_name("mb")).parent)
    edit(entities.with_name("mb") / "adapter_config.json", lora_alpha=True)
    (finding,) = inspect("mb").findings
    assert finding.startswith("it is not a plain LoRA") and "it must be a number from" in finding


# ------------------------------------------------------------------------------------------- what is shown


HOSTILE = "<script>alert(1)</script>\n# Heading\n| a | b |\n[x](javascript:y) `tick` \x1b[31m"


def test_a_card_shows_hostile_texts_as_texts():
    task = {
        "kind": "text-classification",
        "name": "app",
        "labels": ["`a` <b>", "x|y"],
        "family": HOSTILE,
        "protocol": HOSTILE,
        "training_data": HOSTILE,
        "metrics": {HOSTILE: 0.5},
    }
    body = str(adapter_card(task, {"r": 4, "lora_alpha": 8, "target_modules": []})).split("---", 2)[2]
    text = re.sub(r"```.*?```", "", body, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<script|^# Heading|^\| a|(?<!\\)\[x\]\(|\x1b", text, re.MULTILINE)
    assert "`` `a` <b> ``" in text and r"`x\|y`" in text


def test_inspect_prints_no_escape_and_no_forged_line(entities):
    (entities / "a\x1b[2J\nFINDING     none.pt").write_bytes(b"x")
    printed = str(inspect(entities))
    assert "\x1b" not in printed and "\nFINDING     none" not in printed and "may hold a pickle" in printed


def test_what_could_not_be_loaded_is_not_saved(model, entities, tmp_path):
    model.load_adapter(entities)
    for task in ({"metrics": {"f1": float("nan")}}, {"notes": "\x1b"}, {"backbone": 5, "metrics": [1]}):
        with pytest.raises(AdapterError):
            model.save_adapter(tmp_path / "new", "entities", task=task)
        assert not (tmp_path / "new" / "task.json").exists()


def test_a_folder_loads_after_a_copy(model, entities, tmp_path):
    copy = shutil.copytree(entities, tmp_path / "copy")
    assert model.load_adapter(copy) == "entities" and inspect(copy).findings == []
