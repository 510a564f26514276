"""transformers' and sentence-transformers' calls for adapters do with remote code what they do without."""

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from peft import IA3Config, LoraConfig, PeftModel
from peft.utils.hotswap import hotswap_adapter
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from modeling_mtpf import AdapterError, MtpfModel

TARGETS = ["attention.self.query", "attention.self.value"]


@pytest.fixture(params=["AutoModel", "SentenceTransformer"])
def pair(request, folders):
    """The backbone's folder as one library opens it, without and with its code, and a way to run it."""
    if request.param == "AutoModel":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folders / "backbone")
        inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")

        def run(model):
            with torch.no_grad():
                return model(**inputs)[0].numpy()

        stock = AutoModel.from_pretrained(folders / "backbone").eval()
        return stock, MtpfModel.from_pretrained(folders / "backbone").eval(), run
    stock, trusted = (
        SentenceTransformer(str(folders / "backbone"), trust_remote_code=trust, device="cpu")
        for trust in (False, True)
    )
    return stock, trusted, lambda model: model.encode(SENTENCES)


def test_each_call_does_what_it_does_without_trust(pair, folders):
    stock, trusted, run = pair
    bare = run(stock)
    assert np.array_equal(run(trusted), bare)

    def step(call):
        for model in (stock, trusted):
            call(model)
        assert stock.active_adapters() == trusted.active_adapters()
        results = run(stock), run(trusted)
        assert np.array_equal(*results)
        return results[0]

    ner = step(lambda model: model.load_adapter(str(folders / "ner"), adapter_name="ner"))
    intent = step(lambda model: model.load_adapter(str(folders / "intent"), adapter_name="intent"))
    assert min(np.abs(ner - bare).max(), np.abs(ner - intent).max()) > 1e-3
    assert np.array_equal(step(lambda model: model.set_adapter("ner")), ner)
    assert np.array_equal(step(lambda model: model.set_adapter(["intent"])), intent)
    assert np.array_equal(step(lambda model: model.disable_adapters()), bare)
    assert np.array_equal(step(lambda model: model.enable_adapters()), intent)
    for name in ("intent", None):
        expected, state = stock.get_adapter_state_dict(name), trusted.get_adapter_state_dict(name)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], value) for key, value in expected.items())
    step(lambda model: model.delete_adapter(["intent"]) or model.set_adapter("ner"))
    for model in (stock, trusted):
        model.delete_adapter("ner")
        with pytest.raises(ValueError, match="o adapter"):
            model.disable_adapters()
    assert np.array_equal(run(stock), bare) and np.array_equal(run(trusted), bare)


@pytest.mark.parametrize("name", [(), ("mine",)])
def test_a_config_of_peft_is_added_active_with_the_rest_frozen(pair, name):
    stock, trusted, run = pair
    for model in (stock, trusted):
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=True), *name)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.ones_(parameter)
    assert stock.active_adapters() == trusted.active_adapters() == list(name or ("default",))
    assert np.array_equal(run(stock), run(trusted))
    trained = [
        sorted(
            key.removeprefix("0.model.").removeprefix("model.").removeprefix("backbone.")
            for key, p in model.named_parameters()
            if p.requires_grad
        )
        for model in (stock, trusted)
    ]
    assert trained[0] == trained[1] and len(trained[0]) == 16


@pytest.mark.parametrize(
    "config, message",
    [
        (IA3Config(target_modules=["key"], feedforward_modules=[]), "not a plain LoRA"),
        (LoraConfig(target_modules=TARGETS, init_lora_weights="pissa"), "not a plain LoRA .init_lora"),
        (LoraConfig(target_modules=TARGETS, use_dora=True), "not a plain LoRA .use_dora=True"),
        (LoraConfig(target_modules=["nothing"]), "cannot be added"),
        (LoraConfig(target_modules=["word_embeddings"]), "not in a layer|cannot be added"),
    ],
)
def test_a_config_that_does_more_than_add_a_lora_changes_nothing(load, config, message):
    model = load("bert", {"other": None})
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match=message):
        model.add_adapter(config, "mine")
    assert model.adapters == ["other"] and model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_several_active_adapters_and_unknown_arguments_are_refused(load, folders):
    model = load("bert", {"one": None, "two": None})
    with pytest.raises(AdapterError, match="one adapter, not 2"):
        model.set_adapter(["one", "two"])
    with pytest.raises(TypeError, match="'adaptername'"):
        model.load_adapter(folders / "ner", adaptername="x")
    with pytest.raises(AdapterError, match="folder or a Hub repo"):
        model.load_adapter(peft_config={}, adapter_state_dict={})


def test_hot_swapping_replaces_the_weights(folders, batch):
    expected, swapped = (MtpfModel.from_pretrained(folders / "backbone").eval() for _ in range(2))
    expected.load_adapter(folders / "intent", adapter_name="app")
    swapped.enable_peft_hotswap(target_rank=4)
    swapped.load_adapter(folders / "entities", adapter_name="app")
    swapped.load_adapter(folders / "intent", adapter_name="app")
    again = MtpfModel.from_pretrained(folders / "backbone").eval()
    again.load_adapter(folders / "entities", adapter_name="app")
    again.load_adapter(folders / "intent", adapter_name="app", hotswap=True)
    with torch.no_grad():
        for model in (swapped, again):
            assert model.adapters == ["app"] and model.heads["app"].labels == expected.heads["app"].labels
            assert torch.equal(model(**batch())[0], expected(**batch())[0])


def test_an_adapter_of_peft_swaps_merges_and_is_saved_again(folders, batch, tmp_path):
    """What PEFT does to stock models, on ours: several adapters, hot swap, merge, save, load."""
    stock, ours = (
        PeftModel.from_pretrained(cls.from_pretrained(folders / "backbone"), folders / "ner").eval()
        for cls in (AutoModel, MtpfModel)
    )
    inputs = batch()

    def same():
        with torch.no_grad():
            expected, states = stock(**inputs)[0], ours(**inputs)[0]
        assert torch.equal(states, expected)
        return states

    first = same()
    for model in (stock, ours):
        model.load_adapter(folders / "intent", adapter_name="second")
        model.set_adapter("second")
    assert not torch.equal(same(), first)
    for model in (stock, ours):
        model.merge_adapter(["second"])
    same()
    for model in (stock, ours):
        model.unmerge_adapter()
        model.set_adapter("default")
    ours.save_pretrained(tmp_path / "again", selected_adapters=["second"])
    swap = {stock: folders / "intent", ours: tmp_path / "again" / "second"}
    for model in (stock, ours):  # PEFT swaps what was saved from the same class
        hotswap_adapter(model, swap[model], adapter_name="default", torch_device="cpu")
    swapped = same()
    assert not torch.equal(swapped, first)
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    model.load_adapter(tmp_path / "again" / "second", adapter_name="again")
    with torch.no_grad():
        # Merging and unmerging has rounded the weights.
        torch.testing.assert_close(model(**inputs)[0], swapped, rtol=0, atol=1e-3)
    for model in (stock, ours):
        model.delete_adapter("second")
    merged = [model.merge_and_unload() for model in (stock, ours)]
    with torch.no_grad():
        assert torch.equal(merged[0](**inputs)[0], merged[1](**inputs)[0])


@pytest.mark.slow
def test_encoding_in_several_processes_uses_the_adapter(folders):
    """As sentence-transformers' own test of multi-process encoding; its processes import the code again."""
    model = SentenceTransformer(str(folders / "backbone"), trust_remote_code=True, device="cpu")
    bare = model.encode(SENTENCES)
    model.load_adapter(str(folders / "intent"))
    expected = model.encode(SENTENCES)
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        vectors = model.encode(SENTENCES, pool=pool, chunk_size=2)
    finally:
        model.stop_multi_process_pool(pool)
    np.testing.assert_allclose(vectors, expected, atol=1e-3)
    assert np.abs(vectors - bare).max() > 1e-2
