"""PEML: a LoRA with a prefix, its networks and their search, against references; what is recorded and refused."""

import json
import sys

import pytest
import torch
from conftest import assert_close
from test_bundle_training import FLOAT, TEXTS, ner_data, tc_data
from test_prefix import explicit_attention

from modeling_mtpf import MtpfModel
from modeling_mtpf.adaptation.bundle import BundleSettings, Part, fit_bundle
from modeling_mtpf.adaptation.bundle.low_rank import lora_matrices, run_with
from modeling_mtpf.adaptation.bundle.prefix import CANDIDATES, Candidate, PrefixAlone, PrefixedLora
from modeling_mtpf.adaptation.bundle.registry import Job
from modeling_mtpf.data.words import load_word_tokenizer
from modeling_mtpf.errors import MtpfError
from modeling_mtpf.model.prefix_mtpf import Prefix, prefixes_of
from modeling_mtpf.model.trunk_mtpf import encoder_layers, run_trunk


@pytest.fixture
def setting(load, encoders):
    return load("bert", {}), load_word_tokenizer(str(encoders["bert"]))


def parts():
    return [Part("entities", "ner", ner_data()), Part("intent", "tc", tc_data())]


def job_of(setting):
    settings = BundleSettings(**FLOAT, size="tpl").for_family("tc")
    return Job(*setting, [], [], None, settings, "both")


# ---------------------------------------------------------------------------------------------- references


def test_mixture_and_gradients_equal_a_reference_in_float64(setting, batch, monkeypatch):
    """Networks as matrices, slots as sums over candidates, attention with a factor for each slot."""
    model = setting[0]
    model.backbone.set_attn_implementation("eager")
    torch.manual_seed(0)
    candidates = [Candidate("table", 0, 2), Candidate("tanh", 3, 4), Candidate("gelu", 5, 3)]
    mixture = PrefixedLora(job_of(setting), candidates)
    model.double()
    with torch.no_grad():
        for tensor in [*mixture._networks.parameters(), mixture.choice]:
            tensor.data = torch.randn_like(tensor, dtype=torch.float64)
    inputs = {key: value[[0, 4], :12] for key, value in batch("bert").items()}
    trunk = run_trunk(model.backbone, 2, **inputs)
    trained = [*mixture._networks.parameters(), mixture.choice]
    found = run_with(model.backbone, trunk, {}, mixture.prefixes())
    direction = torch.randn(found.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((found * direction).sum(), trained)

    made = []
    for network, (kind, width, length) in zip(mixture._networks, candidates, strict=True):
        values = network.start
        if width:
            first, _, second = network.network
            hidden = values @ first.weight.T + first.bias
            hidden = hidden.tanh() if kind == "tanh" else torch.nn.functional.gelu(hidden)
            values = hidden @ second.weight.T + second.bias
        made.append(values.reshape(length, 2, 2, 2, 16))  # slot, layer, key or value, head, width
    powers = mixture.choice.exp()
    shares = powers / powers.sum()
    weights, slots = [], []
    for slot in range(4):
        having = [(share, each[slot]) for share, each in zip(shares, made, strict=True) if len(each) > slot]
        weights.append(sum(share for share, _ in having))
        slots.append(sum(share * each for share, each in having) / weights[-1])
    weights, slots = torch.stack(weights), torch.stack(slots)
    layers = list(encoder_layers(model.backbone))
    of_module = {
        id(layer.attention.self): Prefix(*slots[:, n].permute(1, 2, 0, 3))
        for n, layer in enumerate(layers[2:])
    }

    def eager(module, query, key, value, mask, scaling, **kwargs):
        prefix = of_module[id(module)]
        return explicit_attention(query, key, value, mask, scaling, prefix, weights), None

    monkeypatch.setattr(sys.modules[type(layers[0]).__module__], "eager_attention_forward", eager)
    expected = run_with(model.backbone, trunk, {})
    assert torch.allclose(found, expected, atol=1e-9)
    for one, other in zip(gradients, torch.autograd.grad((expected * direction).sum(), trained), strict=True):
        assert torch.allclose(one, other, atol=1e-8, rtol=1e-7) and other.abs().max() > 0


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_mixture_with_all_weight_on_one_candidate_is_that_candidate(load, encoders, batch, implementation):
    model, inputs = load("bert", attn_implementation=implementation), batch("bert")
    mixture = PrefixedLora(job_of((model, None)), CANDIDATES)
    trunk = run_trunk(model.backbone, 2, **inputs)
    for number in (0, 4, 11):
        with torch.no_grad():
            mixture.choice.fill_(-60.0)[number] = 0.0
            found = run_with(model.backbone, trunk, mixture.matrices(None), mixture.prefixes())
            slots = mixture._networks[number]()
            alone = {n: Prefix(*slots[n - 2]) for n in (2, 3)}
            expected = run_with(model.backbone, trunk, mixture.matrices(None), alone)
        assert torch.allclose(found, expected, atol=1e-3)


# ------------------------------------------------------------------------------------------------- fitting


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fixed", "random", "searched", "none"])
def test_peml_learns_and_is_stored(setting, tmp_path, kind):
    model, tokenizer = setting
    settings = BundleSettings(steps=120, evaluations=3, learning_rate=3e-3, prefix=kind, **FLOAT)
    bundle = fit_bundle(parts(), "peml", setting, tmp_path / "both", settings=settings)
    assert bundle.metrics["intent"]["accuracy"] > 0.6
    made = json.loads((tmp_path / "both" / "task.json").read_text())["composition"]
    assert made["method"] == "peml" and made["prefix"]["kind"] == kind
    slots = prefixes_of(model.backbone, "both")
    if kind == "none":
        assert not slots
    else:
        names = {str(candidate): candidate.length for candidate in CANDIDATES}
        assert made["prefix"]["network"] in names and "tanh-128x8" in names
        assert {n: slot.key.shape[1] for n, slot in slots.items()}.keys() <= {0, 1, 2, 3}
        assert {slot.key.shape[1] for slot in slots.values()} == {names[made["prefix"]["network"]]}
    if kind == "searched":
        weights = made["architecture_weights"]
        assert weights.keys() == {str(candidate) for candidate in CANDIDATES}
        assert sum(weights.values()) == pytest.approx(1, abs=0.01) and len(set(weights.values())) > 1
        assert weights[made["prefix"]["network"]] == max(weights.values())
        assert made["search"]["search_steps"] == 120 and made["search"]["search_seconds"] > 0
    again = MtpfModel.from_pretrained(model.config.name_or_path).eval()
    again.load_adapter(tmp_path / "both")
    assert_close(again.predict(TEXTS, ["both"]), model.predict(TEXTS, ["both"], tokenizer=tokenizer))


def test_a_search_and_its_fit_depend_on_the_seed_alone(setting):
    settings = BundleSettings(steps=6, evaluations=2, prefix="searched", **FLOAT)
    made = [
        fit_bundle(parts(), "peml", setting, name=name, settings=settings).record["composition"]
        for name in ("one", "two")
    ]
    assert made[0]["architecture_weights"] == made[1]["architecture_weights"]
    first, second = (prefixes_of(setting[0].backbone, name) for name in ("one", "two"))
    assert all(torch.equal(first[n].key, second[n].key) for n in first)
    assert all(torch.isfinite(slot.value).all() for slot in first.values())


def test_a_prefix_alone_leaves_the_lora_without_effect(setting):
    model = setting[0]
    before = PrefixAlone(job_of(setting), [Candidate("tanh", 4, 2)])
    assert len(before.parameters) == 5
    settings = BundleSettings(steps=20, evaluations=2, prefix_length=3, prefix_width=6, **FLOAT)
    bundle = fit_bundle(parts()[1:], "prefix", setting, name="alone", settings=settings)
    for pair in lora_matrices(model.backbone, "alone").values():
        assert len(pair.down) == 1 and not pair.up.any()
    made = bundle.record["composition"]["prefix"]
    assert made["network"] == "tanh-6x3" and made["length"] == 3
    assert model.predict(TEXTS[:2], ["alone/intent"], tokenizer=setting[1])


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "method, settings, message",
    [
        ("joint", {"prefix": "searched"}, "The method joint does not use prefix; leave it out"),
        ("joint", {"prefix_length": 4}, "The method joint does not use prefix_length"),
        ("peml", {"prefix": "best"}, "prefix is 'best'; choose one of: fixed, searched, random, none"),
        ("peml", {"prefix": "searched", "prefix_width": 4}, "prefix_width is for prefix: fixed"),
        ("peml", {"prefix_length": 0}, "prefix_length is 0; it must be from 1 to 1024"),
        ("peml", {"prefix_width": 10**6}, "prefix_width is 1000000; it must be from 1 to"),
        ("prefix", {"prefix": "none"}, "The method prefix trains nothing else"),
    ],
)
def test_settings_that_do_nothing_are_refused(setting, method, settings, message):
    with pytest.raises(MtpfError, match=message) as error:
        fit_bundle(parts(), method, setting, settings=BundleSettings(steps=2, **FLOAT, **settings))
    assert "\n" not in str(error.value) and setting[0].adapters == []


def test_apps_with_a_prefix_are_neither_starts_nor_composed(setting, tmp_path):
    settings = BundleSettings(steps=2, evaluations=1, **FLOAT)
    fit_bundle(parts()[1:], "peml", setting, tmp_path / "one", settings=settings)
    for adapter, part in ((tmp_path / "one", None), (None, str(tmp_path / "one"))):
        given = parts()
        given[1].adapter = given[0].adapter = part
        with pytest.raises(MtpfError, match="has a prefix, which what starts from it or is composed of it"):
            fit_bundle(given, "mean" if part else "joint", setting, adapter=adapter, name="more")
