"""Trunk and tails: bit-equal to separate passes, exact gradients, nothing left behind."""

import pytest
import torch
from torch import nn

from modeling_mtpf import LoraSettings
from modeling_mtpf.model.trunk_mtpf import run_tail, run_trunk

ADAPTERS = {
    "ner": LoraSettings(r=4),
    "tc": LoraSettings(r=2, alpha=8, layers=3),
    "other": LoraSettings(layers=1),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tails_equal_separate_passes(load, batch, architecture, attention):
    model, inputs = load(architecture, ADAPTERS, attn_implementation=attention), batch(architecture)
    with torch.no_grad():
        shared = model.encode_adapters([*ADAPTERS, None], **inputs)
        for name, states in shared.items():
            with model.use_adapter(name):
                assert torch.equal(model(**inputs)[0], states), name
    distinct = torch.stack(list(shared.values()))
    assert all((distinct[i] - distinct[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))


def test_an_active_deeper_adapter_does_not_reach_the_trunk(load, batch, architecture):
    model, inputs = load(architecture, {"deep": LoraSettings(layers=4), "ner": None}), batch(architecture)
    with torch.no_grad():
        expected = model.encode_adapters(["ner", None], **inputs)
        model.set_adapter("deep")
        states = model.encode_adapters(["ner", None], **inputs)
    assert all(torch.equal(states[name], expected[name]) for name in expected)


def test_rows_of_a_trunk_output_equal_a_run_on_those_rows(load, batch, architecture):
    model, inputs = load(architecture, ADAPTERS).double(), batch(architecture)
    with torch.no_grad():
        trunk = run_trunk(model.backbone, 2, **inputs)
        whole = run_tail(model.backbone, trunk, "ner")
        part = run_tail(model.backbone, trunk.rows(1, 3), "ner")
    # In float64: large random weights enlarge the rounding of float32 beyond any fixed number.
    torch.testing.assert_close(part, whole[1:3], rtol=0, atol=1e-9)


def gradients_of(model, compute) -> dict[str, torch.Tensor]:
    model.zero_grad()
    compute()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(gradients, expected):
    assert gradients.keys() == expected.keys()
    assert any("lora" in name for name in gradients) and any("embeddings" in name for name in gradients)
    for name, gradient in expected.items():
        # In float64; key biases have a gradient of zero but for rounding.
        assert (gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-6) < 1e-6, name


@pytest.fixture
def losses():
    """Two different losses on the hidden states, for two adapters."""
    weight = torch.linspace(-1, 1, 32, dtype=torch.float64)
    return {"ner": lambda states: (states * weight).sum(), "tc": lambda states: states.pow(2).sum()}


def test_gradients_equal_the_sum_of_separate_backward_passes(load, batch, architecture, losses):
    model, inputs = load(architecture, ADAPTERS).double(), batch(architecture)

    def shared():
        states = model.encode_adapters(["ner", "tc"], **inputs)
        sum(loss(states[name]) for name, loss in losses.items()).backward()

    def separate():
        for name, loss in losses.items():
            with model.use_adapter(name):
                loss(model(**inputs)[0]).backward()

    assert_equal_gradients(gradients_of(model, shared), gradients_of(model, separate))


def test_activation_checkpointing_runs_the_layers_again_with_the_same_adapter(load, batch, losses):
    model, inputs = load("bert", ADAPTERS).double(), batch("bert")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()  # checkpointing is active in training mode only

    def shared():
        states = model.encode_adapters(["ner", "tc"], **inputs)
        sum(loss(states[name]) for name, loss in losses.items()).backward()

    expected = gradients_of(model, shared)
    enable = getattr(
        model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
    )  # before 5.20
    enable({"use_reentrant": False})
    assert_equal_gradients(gradients_of(model, shared), expected)


def test_nothing_is_left_behind(load, batch):
    model, inputs = load("bert", ADAPTERS), batch("bert")
    model.set_adapter("tc")
    modules = dict(model.named_modules())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before = model(**inputs)[0]
        model.encode_adapters(["ner", "other"], **inputs)
        with pytest.raises(RuntimeError, match="inside"), model.use_adapter("ner"):
            raise RuntimeError("inside")
        assert torch.equal(model(**inputs)[0], before)
    assert model.active_adapters() == ["tc"]
    assert all(dict(model.named_modules())[name] is module for name, module in modules.items())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_switching_between_forward_and_backward_keeps_all_gradients(load, batch):
    model, inputs = load("bert", {"ner": None, "tc": None}), batch("bert")
    with model.use_adapter("ner"):
        first = model(**inputs)[0].sum()
    with model.use_adapter("tc"):
        second = model(**inputs)[0].sum()
    (first + second).backward()
    for name in ("ner", "tc"):
        assert all(p.grad is not None for key, p in model.named_parameters() if f".{name}." in key)


def test_threads_do_not_meet(load, batch):
    from concurrent.futures import ThreadPoolExecutor

    model, inputs = load("bert", ADAPTERS), batch("bert")
    with torch.no_grad():
        expected = model.encode_adapters(list(ADAPTERS), **inputs)

    def once(number: int) -> bool:
        name = list(ADAPTERS)[number % 3]
        with torch.no_grad():
            return torch.equal(model.encode_adapters([name], **inputs)[name], expected[name])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(once, range(60)))


@pytest.mark.parametrize("depth", [0, 5])
def test_a_depth_outside_the_encoder_is_refused(load, batch, depth):
    with pytest.raises(ValueError, match="from 1 to 4"):
        run_trunk(load("bert").backbone, depth, **batch("bert"))
