"""Key/value prefixes: against attention written out, in files, in threads, and what is refused."""

import copy
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ARCHITECTURES, SENTENCES, assert_close, randomize
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, pipeline

from modeling_mtpf import (
    AdapterError,
    AdapterHead,
    LoraSettings,
    MtpfForTokenClassification,
    MtpfModel,
)
from modeling_mtpf.model.prefix_mtpf import PREFIX_FILE, PREFIXES, STATE, Prefix, prefix_attention
from modeling_mtpf.model.trunk_mtpf import encoder_layers, run_layers, run_trunk, with_prefixes

LAYERS = (2, 3)


def random_prefixes(length, seed=0, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 2, length, 16)
    return {n: Prefix(*torch.randn(shape, generator=generator, dtype=dtype, **options)) for n in LAYERS}


def add_prefixed(model, name, length=5, head=None, layers=1):
    """Add an adapter with random LoRA on the last layers, and slots in the last two."""
    model.add_adapter(name, LoraSettings(r=2, layers=layers), head)
    randomize(model, 1, within=f".{name}.")
    setattr(model.backbone.peft_config[name], PREFIXES, random_prefixes(length))


def words_head():
    torch.manual_seed(3)
    head = AdapterHead("token-classification", ["O", "B-PER", "I-PER"], 32, 40)
    torch.nn.init.normal_(head.weight, 0, 3)
    return head


@pytest.fixture(scope="module")
def saved(folders, tmp_path_factory):
    """Folder of an app with a prefix."""
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    add_prefixed(model, "slots", head=words_head())
    return model.save_adapter(tmp_path_factory.mktemp("prefix") / "slots", "slots", dtype=torch.float16)


@pytest.fixture
def model(folders, saved):
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    model.load_adapter(saved)
    return model


# ----------------------------------------------------------------------------------------------- numbers


def explicit_attention(query, key, value, mask, scaling, prefix=None, weights=None):
    """Attention one query at a time, where a slot counts ``weights`` times."""
    rows = torch.empty_like(query)
    for b in range(len(query)):
        for h in range(query.shape[1]):
            keys, values, counts = key[b, h], value[b, h], torch.ones(key.shape[2], dtype=query.dtype)
            if prefix is not None:
                counts = torch.cat([torch.ones(prefix.key.shape[1]) if weights is None else weights, counts])
                keys, values = torch.cat([prefix.key[h], keys]), torch.cat([prefix.value[h], values])
            for q in range(query.shape[2]):
                shown = counts.clone()
                if mask is not None:
                    row = mask[min(b, len(mask) - 1), 0, q]
                    shown[-key.shape[2] :] *= row if row.dtype == torch.bool else row.exp()
                powers = (keys @ query[b, h, q] * scaling).exp() * shown
                rows[b, h, q] = powers @ values / powers.sum()
    return rows.transpose(1, 2)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", ["none", "bool", "additive"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_and_gradients_equal_attention_written_out(load, implementation, form, weighted):
    """Of values and gradients in float64, for all forms of masks."""
    module = load("bert", attn_implementation=implementation).backbone.encoder.layer[3].attention.self
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 4, 16, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 1, 4, 4, generator=generator) < 0.6
    mask[..., 0] = True
    additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    mask = {"none": None, "bool": mask, "additive": additive}[form]
    prefix = random_prefixes(3, dtype=torch.float64)[2]
    weights = torch.tensor([1.0, 0.7, 0.2], dtype=torch.float64).requires_grad_() if weighted else None
    leaves = [t.requires_grad_() for t in (query, key, value, prefix.key, prefix.value)]
    leaves += [weights] if weighted else []
    expected = explicit_attention(query, key, value, mask, 0.25, prefix, weights)
    module.__dict__[STATE] = prefix._replace(bias=weights.log() if weighted else None), module.config
    if implementation == "eager" and form == "bool":
        mask = additive  # as the encoders make it
    found = prefix_attention(module, query, key, value, mask, scaling=0.25)[0]
    assert torch.allclose(found, expected, atol=1e-12)
    direction = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(
        *(torch.autograd.grad((x * direction).sum(), leaves) for x in (found, expected)), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_tail_equals_an_encoder_whose_attention_is_written_out(
    load, batch, architecture, implementation, monkeypatch
):
    """The reference runs the stock encoder with its eager attention replaced: no views, no registered function.

    In float64; padded, and each row alone. In ModernBERT a slot is outside every sliding window.
    """
    model = load(architecture, attn_implementation=implementation).double()
    add_prefixed(model, "slots")
    prefixes = random_prefixes(5, dtype=torch.float64)
    setattr(model.backbone.peft_config["slots"], PREFIXES, prefixes)
    inputs = {key: value[:2, :14] for key, value in batch(architecture).items()}
    inputs["attention_mask"][1, 11:] = 0  # few, so that a window shows real tokens to each padded one
    # ModernBERT's eager attention has its softmax in float32.
    exact = {"atol": 1e-4 if (architecture, implementation) == ("modernbert", "eager") else 1e-9}
    with torch.no_grad():
        found = model.encode_adapters(["slots"], **inputs)["slots"]
        with model.use_adapter("slots"):
            plain = model(**inputs).last_hidden_state
        real = inputs["attention_mask"].bool()
        assert torch.equal(plain[real], found[real])
        for row, mask in enumerate(real):
            alone = model.encode_adapters(["slots"], input_ids=inputs["input_ids"][row : row + 1, mask])
            assert torch.allclose(alone["slots"][0], found[row, mask], **exact)
    layers = list(encoder_layers(model.backbone))
    of_module = {id(module): prefixes.get(n) for n, layer in enumerate(layers) for module in layer.modules()}

    def eager(module, query, key, value, mask, scaling, **kwargs):
        return explicit_attention(query, key, value, mask, scaling, of_module[id(module)]), None

    monkeypatch.setattr(sys.modules[type(layers[0]).__module__], "eager_attention_forward", eager)
    model.backbone.set_attn_implementation("eager")
    with torch.no_grad(), model.use_adapter("slots"):
        expected = model.backbone(**inputs).last_hidden_state
    assert torch.allclose(found[real], expected[real], **exact)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_no_slots_are_bit_equal_to_no_prefix(load, batch, architecture, implementation):
    model, inputs = load(architecture, attn_implementation=implementation), batch(architecture)
    for name, length in (("none", 0), ("some", 1)):
        add_prefixed(model, name, length)
    model.add_adapter("plain", LoraSettings(r=2, layers=1))
    randomize(model, 1, within=".plain.")
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            states = model.encode_adapters(["none", "plain", "some", None], **inputs)
        assert torch.equal(states["none"], states["plain"])
        assert not torch.allclose(states["some"], states["plain"], atol=1e-3)
    one = {key: value[:1, :9] for key, value in inputs.items() if key != "attention_mask"}  # without a mask
    states = model.encode_adapters(["none", "plain"], **one)
    assert torch.equal(states["none"], states["plain"])


def test_training_mode_and_checkpointing_give_the_same_gradients(load, batch):
    model, inputs = load("bert"), batch("bert")
    prefixes = random_prefixes(3, requires_grad=True)
    leaves = [tensor for prefix in prefixes.values() for tensor in prefix[:2]]
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
            model.train()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                elif hasattr(module, "dropout_prob"):
                    module.dropout_prob = 0.0
        trunk = run_trunk(model.backbone, 2, **inputs)
        layers = with_prefixes(model.backbone, list(encoder_layers(model.backbone))[-2:], prefixes, 2)
        found.append(torch.autograd.grad(run_layers(model.backbone, trunk, layers).sin().sum(), leaves))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-4) and one.abs().sum() > 0


# ------------------------------------------------------------------------------------------------- files


def test_a_folder_round_trip_in_a_fresh_process(model, saved, folders, fresh_process, tmp_path):
    task = json.loads((saved / "task.json").read_text())
    assert task["prefix"] == {"length": 5} and task["format_version"] == 3
    stored = load_file(saved / PREFIX_FILE)
    assert stored.keys() == {f"encoder.layer.{n}.prefix_{part}" for n in LAYERS for part in ("key", "value")}
    again = model.save_adapter(tmp_path / "again", "slots", dtype=torch.float16)
    for file in saved.iterdir():
        if file.name != "task.json":
            assert (again / file.name).read_bytes() == file.read_bytes()
    model.load_adapter(folders / "entities")
    expected = model.predict(SENTENCES, ["slots", "entities"])
    code = f"""
import json
from transformers import AutoModel
model = AutoModel.from_pretrained({str(folders / "backbone")!r}, trust_remote_code=True)
model.load_adapter({str(again)!r})
model.load_adapter({str(folders / "entities")!r})
print(json.dumps(model.predict({SENTENCES!r}, adapters=["slots", "entities"])))
"""
    assert_close(fresh_process(code, package=False), expected)
    model.delete_adapter("entities")
    model.load_adapter(folders / "intent", adapter_name="slots", replace=True)
    model.save_adapter(again, "slots")  # an adapter without a prefix takes the file away
    assert not (again / PREFIX_FILE).exists() and MtpfModel.load_adapter(model, again, "more") == "more"


def test_stock_loaders_fail_loudly(saved, folders):
    """PEFT would run the LoRA alone."""
    stock = AutoModel.from_pretrained(folders / "backbone")
    for load_folder in (
        lambda: PeftModel.from_pretrained(stock, saved),
        lambda: stock.load_adapter(str(saved)),
    ):
        with pytest.raises(KeyError, match="LORA_WITH_PREFIX_OF_MTPF"):
            load_folder()


def test_plain_forwards_pipelines_and_outputs_use_the_prefix(saved, folders):
    model = MtpfModel.from_pretrained(folders / "backbone", attn_implementation="eager").eval()
    model.load_adapter(saved)  # which makes it active
    tokenizer = AutoTokenizer.from_pretrained(folders / "backbone")
    inputs = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    with torch.no_grad():
        out = model(**inputs, output_attentions=True, output_hidden_states=True)
        assert torch.equal(out.last_hidden_state, model.encode_adapters(["slots"], **inputs)["slots"])
        tokens = inputs["input_ids"].shape[1]
        assert [row.shape[-1] - tokens for row in out.attentions] == [0, 0, 5, 5]
        model.set_adapter(None)
        bare = model.encode_adapters([None], **inputs)[None]
        assert torch.equal(model(**inputs).last_hidden_state, bare)
    words = MtpfForTokenClassification.from_pretrained(folders / "backbone").eval()
    words.load_adapter(saved)
    app = pipeline("token-classification", model=words, tokenizer=tokenizer, aggregation_strategy="first")
    expected = model.predict(SENTENCES[0], ["slots"])["slots"][0]
    assert [(row["start"], row["end"]) for row in app(SENTENCES[0])] == [
        (row["start"], row["end"]) for row in expected
    ]


def test_replacing_copying_deleting_and_memory(model, saved, folders):
    expected = model.predict(SENTENCES, ["slots"])
    assert model.adapter_memory()["slots"]["prefix"] == 2 * 2 * 2 * 5 * 16 * 4
    assert model.adapter_depth("slots") == 2  # of the prefix; the LoRA's is 1
    assert copy.deepcopy(model).predict(SENTENCES, ["slots"]) == expected
    model.load_adapter(folders / "entities", adapter_name="slots", replace=True)
    assert "prefix" not in model.adapter_memory()["slots"]
    assert model.predict(SENTENCES, ["slots"]) != expected
    model.load_adapter(saved, replace=True)
    assert model.predict(SENTENCES, ["slots"]) == expected
    model.delete_adapter("slots")
    assert not hasattr(model.backbone, "peft_config")
    assert all(STATE not in module.__dict__ for module in model.modules())


@pytest.mark.slow
def test_sixteen_threads_with_and_without_prefixes_give_what_one_gives(model, saved, folders):
    model.load_adapter(saved, adapter_name="second")
    for name in ("entities", "intent"):
        model.load_adapter(folders / name)
    asked = [["slots"], ["intent", "second"], ["entities", "slots"], ["second", "entities", "intent"]]

    def work(number):
        mixed = [asked[(number + row) % 4][0] for row in range(len(SENTENCES))]
        return model.predict(SENTENCES, asked[number % 4]), model.predict(SENTENCES, adapter_names=mixed)

    expected = [work(number) for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        for _ in range(4):
            assert list(pool.map(work, range(16))) == expected


# ----------------------------------------------------------------------------------------------- mistakes


def in_json(file, **changes):
    def change(folder):
        value = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**value, **changes}))

    return change


def in_tensors(change):
    def rewrite(folder):
        tensors = load_file(folder / PREFIX_FILE)
        change(tensors)
        save_file(tensors, folder / PREFIX_FILE)

    return rewrite


KEY = "encoder.layer.3.prefix_key"
BAD = {
    "missing": (lambda folder: (folder / PREFIX_FILE).unlink(), "disagree about whether it has a prefix"),
    "not told": (
        in_json("task.json", prefix=None, format_version=1),
        "disagree about whether it has a prefix",
    ),
    "as LoRA": (in_json("adapter_config.json", peft_type="LORA"), "disagree about whether it has a prefix"),
    "old version": (in_json("task.json", format_version=1), "the format version 1 .* do not belong together"),
    "length": (in_json("task.json", prefix={"length": 4}), "is not half of a prefix of 4 slots"),
    "no length": (in_json("task.json", prefix={}), "'prefix' in task.json is {}; it must be"),
    "not a number": (in_json("task.json", prefix={"length": "x"}), "'prefix' in task.json"),
    "NaN": (in_tensors(lambda t: t[KEY].fill_(torch.nan)), "not finite|NaN"),
    "half": (in_tensors(lambda t: t.pop(KEY)), "is not half of a prefix"),
    "empty": (in_tensors(lambda t: t.clear()), "it holds no prefix"),
    "shape": (in_tensors(lambda t: t.update({KEY: torch.zeros(2, 5, 3)})), "is not half of a prefix"),
    "flat": (in_tensors(lambda t: t.update({KEY: torch.zeros(160)})), "is not half of a prefix"),
    "name": (in_tensors(lambda t: t.update(x=torch.zeros(2, 5, 16))), "'x' of shape"),
    "heads": (
        in_tensors(lambda t: t.update({k: torch.zeros(4, 5, 8) for k in t})),
        "made for 4 heads of width 8, this one has 2 of 16",
    ),
    "layer": (
        in_tensors(lambda t: t.update({k.replace("3", "9"): t.pop(k) for k in list(t) if "3" in k})),
        "no layer for its tensor 'encoder.layer.9.prefix_",
    ),
    "other encoder": (
        in_tensors(lambda t: t.update({k.removeprefix("encoder."): t.pop(k) for k in list(t)})),
        "no layer for its tensor 'layer.2.prefix_",
    ),
    "truncated": (
        lambda folder: (folder / PREFIX_FILE).write_bytes((folder / PREFIX_FILE).read_bytes()[:-9]),
        "prefix.safetensors is damaged",
    ),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_a_damaged_prefix_is_refused_in_one_sentence(model, saved, tmp_path, change, message):
    folder = shutil.copytree(saved, tmp_path / "damaged")
    change(folder)
    before = model.predict(SENTENCES[:1], ["slots"])
    for replace in (False, True):
        with pytest.raises(AdapterError, match=message) as error:
            model.load_adapter(folder, adapter_name="slots" if replace else "other", replace=replace)
        assert "\n" not in str(error.value)
    assert model.adapters == ["slots"] and model.predict(SENTENCES[:1], ["slots"]) == before


def test_what_cannot_run_a_prefix_is_refused_when_it_runs(model):
    trunk = run_trunk(model.backbone, 2, inputs_embeds=torch.zeros(1, 3, 32))
    model.backbone.config._attn_implementation_internal = "flex_attention"
    layers = with_prefixes(model.backbone, list(encoder_layers(model.backbone))[-2:], random_prefixes(2), 2)
    with pytest.raises(AdapterError, match="with a prefix cannot use flex_attention; load the backbone with"):
        run_layers(model.backbone, trunk, layers)
    model.backbone.config._attn_implementation_internal = "sdpa"

    class Wrapper(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

    model.backbone.encoder.layer[3] = Wrapper(model.backbone.encoder.layer[3])
    with pytest.raises(AdapterError, match="replaced by a Wrapper, which hides its attention"):
        model.predict("Hi", ["slots"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_its_attention_where_the_layout_says(load, name):
    model = load(name)
    layers = list(encoder_layers(model.backbone))
    views = with_prefixes(model.backbone, layers, random_prefixes(1))
    assert [view is layer for view, layer in zip(views, layers, strict=True)] == [True, True, False, False]
    assert sum(STATE in module.__dict__ for module in views[3].modules()) == 1
