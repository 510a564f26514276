"""A layer whose call was replaced computes the same in every way to run it, or is refused in a sentence."""

import functools
import time
import types

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import SENTENCES
from torch import nn
from transformers import PreTrainedTokenizerFast

from modeling_mtpf import AdapterHead, LoraSettings, MtpfModel
from modeling_mtpf.errors import MtpfError
from modeling_mtpf.model.bound_calls_mtpf import _refers_to_a_module
from modeling_mtpf.model.trunk_mtpf import encoder_layers

ADAPTERS = {"app": LoraSettings(r=4), "deep": LoraSettings(r=2, layers=3)}
compiled = functools.partial(torch.compile, backend="eager")


def scaled(self, *args, **kwargs):
    return 1.25 * type(self).forward(self, *args, **kwargs)


class Half(ModelHook):
    def post_forward(self, module, output):
        return output / 2


class Wrapper(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.inner = layer

    def forward(self, *args, **kwargs):
        return 0.75 * self.inner(*args, **kwargs)


class Hidden(Wrapper):
    """Keeps the layer where no module looks for it."""

    def __init__(self, layer):
        nn.Module.__init__(self)
        self.__dict__["inner"] = layer


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def change_class(module):
    forward = type(module).forward
    changed = {"forward": lambda self, *args, **kwargs: 1.25 * forward(self, *args, **kwargs)}
    module.__class__ = type(type(module).__name__, (type(module),), changed)


def parametrize(layer):
    for module in list(layer.modules()):
        if isinstance(module, nn.Linear):
            nn.utils.parametrize.register_parametrization(module, "weight", Doubled())


def replace_base(lora):
    base = lora.base_layer
    lora.base_layer = nn.Linear(base.in_features, base.out_features)


def replace_children(parent, replace):
    for name, child in list(parent._modules.items()):
        parent._modules[name] = replace(child)


def wrap_layers(model, wrap):
    layers = encoder_layers(model.backbone)
    for index in range(len(layers)):
        layers[index] = wrap(layers[index])


def wrap_linear(model, wrap):
    for layer in encoder_layers(model.backbone):
        for parent in list(layer.modules()):
            for name, child in list(parent._modules.items()):
                if hasattr(child, "lora_A"):
                    parent._modules[name] = wrap(child)


def each_layer(change):
    return lambda model: [change(layer) for layer in encoder_layers(model.backbone)]


def each_module(change):
    return lambda model: [change(module) for module in list(model.backbone.modules())]


def each_lora(change):
    return lambda model: [
        change(module) for module in list(model.backbone.modules()) if hasattr(module, "lora_A")
    ]


def device_map(model):
    """One entry a layer, as ``device_map="auto"`` makes on several devices."""
    places = {f"backbone.{name}": "cpu" for name, _ in model.backbone.named_children()}
    path = next(name for name, module in model.backbone.named_modules() if isinstance(module, nn.ModuleList))
    places.pop(f"backbone.{path.partition('.')[0]}")
    places |= {f"backbone.{path}.{index}": "cpu" for index in range(4)}
    named = [name for name, _ in model.backbone.named_parameters() if not name.startswith(path)]
    places |= {f"backbone.{name}": "cpu" for name in named}
    dispatch_model(model, {**places, "heads": "cpu"}, main_device="cpu", force_hooks=True)


RIGHT = {
    "accelerate": each_layer(lambda layer: add_hook_to_module(layer, ModelHook())),
    "accelerate twice": each_layer(
        lambda layer: add_hook_to_module(add_hook_to_module(layer, Half()), Half(), append=True)
    ),
    "accelerate everywhere": each_module(lambda module: add_hook_to_module(module, ModelHook())),
    "accelerate on the LoRA": each_lora(lambda module: add_hook_to_module(module, Half())),
    "accelerate removed": each_layer(
        lambda layer: remove_hook_from_module(add_hook_to_module(layer, ModelHook()))
    ),
    "device map": device_map,
    "compiled layers": lambda model: wrap_layers(model, compiled),
    "compiled children": each_layer(lambda layer: replace_children(layer, compiled)),
    "compiled linear": lambda model: wrap_linear(model, compiled),
    "compiled backbone": lambda model: setattr(model, "backbone", compiled(model.backbone)),
    "layer.compile()": each_layer(lambda layer: layer.compile(backend="eager")),
    "backbone.compile()": lambda model: model.backbone.compile(backend="eager"),
    "compiled forward": each_layer(lambda layer: setattr(layer, "forward", compiled(layer.forward))),
    "bound function": each_layer(lambda layer: setattr(layer, "forward", types.MethodType(scaled, layer))),
    "bound function on the LoRA": each_lora(
        lambda module: setattr(module, "forward", types.MethodType(scaled, module))
    ),
    "partial of the method": each_layer(
        lambda layer: setattr(layer, "forward", functools.partial(layer.forward))
    ),
    "partial of the class": each_layer(
        lambda layer: setattr(layer, "forward", functools.partial(scaled, layer))
    ),
    "partial on the LoRA": each_lora(
        lambda module: setattr(module, "forward", functools.partial(scaled, module))
    ),
    "partial below": each_layer(
        lambda layer: [setattr(m, "forward", functools.partial(m.forward)) for m in layer.children()]
    ),
    "_call_impl": each_layer(
        lambda layer: setattr(layer, "_call_impl", types.MethodType(nn.Module._call_impl, layer))
    ),
    "_call_impl replaced": each_layer(
        lambda layer: setattr(layer, "_call_impl", types.MethodType(scaled, layer))
    ),
    "_call_impl replaced on the LoRA": each_lora(
        lambda module: setattr(module, "_call_impl", types.MethodType(scaled, module))
    ),
    "class": each_layer(change_class),
    "class below": each_layer(
        lambda layer: [change_class(m) for m in layer.modules() if type(m) is nn.Linear]
    ),
    "class of the LoRA": each_lora(change_class),
    "parametrization": each_layer(parametrize),
    "base layer": each_lora(replace_base),
    "wrapper module": lambda model: wrap_layers(model, Wrapper),
    "forward hook": each_layer(lambda layer: layer.register_forward_hook(lambda m, a, output: 1.5 * output)),
    "forward hook on the LoRA": each_lora(
        lambda module: module.register_forward_hook(lambda m, a, output: 1.5 * output)
    ),
    "pre-hook": each_layer(
        lambda layer: layer.register_forward_pre_hook(lambda m, args: (1.5 * args[0], *args[1:]))
    ),
    "pre-hook on the LoRA": each_lora(
        lambda module: module.register_forward_pre_hook(lambda m, args: (1.5 * args[0],))
    ),
    "observing hook": lambda model: model.backbone.register_forward_hook(lambda m, a, output: None),
}


class Patch:
    def __init__(self, module):
        self.module, self.original = module, module.forward

    def __call__(self, *args, **kwargs):
        return self.original(*args, **kwargs)

    def run(self, *args, **kwargs):
        return self.original(*args, **kwargs)


ORIGINALS = {}


def through_globals(self, *args, **kwargs):
    def inner():
        return ORIGINALS[id(self)](*args, **kwargs)

    return inner()


def closure(module):
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs)


def wrapped_closure(module):
    original = module.forward

    @functools.wraps(original)
    def forward(*args, **kwargs):
        return original(*args, **kwargs)

    module.forward = forward


def bound_closure(module):
    original = module.forward
    module.forward = types.MethodType(lambda self, *args, **kwargs: original(*args, **kwargs), module)


def bound_default(module):
    def forward(self, *args, _original=module.forward, **kwargs):
        return _original(*args, **kwargs)

    module.forward = types.MethodType(forward, module)


def partial_closure(module):
    original = module.forward
    module.forward = functools.partial(lambda self, *args, **kwargs: original(*args, **kwargs), module)


def bound_global(module):
    ORIGINALS[id(module)] = module.forward
    module.forward = types.MethodType(through_globals, module)


def closure_under_accelerate(module):
    closure(module)
    add_hook_to_module(module, ModelHook())


REFUSED = {
    "closure": each_layer(closure),
    "closure below": each_layer(lambda layer: closure(next(iter(layer.children())))),
    "closure on the LoRA": each_lora(closure),
    "closure on the backbone": lambda model: closure(model.backbone),
    "wrapped closure": each_layer(wrapped_closure),
    "bound closure": each_layer(bound_closure),
    "bound function with a default": each_layer(bound_default),
    "partial closure": each_layer(partial_closure),
    "global": each_layer(bound_global),
    "callable object": each_layer(lambda layer: setattr(layer, "forward", Patch(layer))),
    "method of another object": each_layer(lambda layer: setattr(layer, "forward", Patch(layer).run)),
    "closure under accelerate": each_layer(closure_under_accelerate),
    "hidden layers": lambda model: wrap_layers(model, Hidden),
    "changing hook on the backbone": lambda model: model.backbone.register_forward_hook(
        lambda m, a, output: (1.5 * output[0],)
    ),
}


SENTENCE = "Replace it on the class|on the last layer|Keep it as a child"


@pytest.fixture(autouse=True)
def uncompiled():
    """Run what is compiled as it is: compiling takes a minute, and which call runs is the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def model(load):
    model = load("bert", ADAPTERS)
    torch.manual_seed(0)
    model.heads["app"] = AdapterHead("text-classification", [str(number) for number in range(6)], 32)
    return model


def separate(model, inputs):
    """Run the replaced modules themselves, one adapter after the other."""
    states = {}
    for name in (*ADAPTERS, None):
        with model.use_adapter(name):
            states[name] = model(**inputs)[0]
    return states


def gradients(model, states):
    model.zero_grad()
    sum((state * torch.linspace(-1, 1, 32)).sum() for state in states.values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_states(model, inputs):
    with torch.no_grad():
        expected = separate(model, inputs)
        states = model.encode_adapters([*ADAPTERS, None], **inputs)
    assert all(torch.equal(states[name], expected[name]) for name in expected)
    distinct = torch.stack(list(states.values()))
    assert all((distinct[i] - distinct[j]).abs().max() > 1e-3 for i in range(3) for j in range(i))


def check_gradients(model, inputs):
    expected = gradients(model, separate(model, inputs))
    actual = gradients(model, model.encode_adapters([*ADAPTERS, None], **inputs))
    assert actual.keys() == expected.keys() and sum("lora" in name for name in actual) == 40
    for name, gradient in expected.items():
        # Key biases have a gradient of zero but for rounding.
        assert (actual[name] - gradient).norm() / gradient.norm().clamp(min=1) < 1e-2, name


def check_prediction(model, inputs, tokenizer):
    with torch.no_grad(), model.use_adapter("app"):
        states = [model(**tokenizer(text, return_tensors="pt"))[0][0] for text in SENTENCES]
        scores = [model.heads["app"](rows.mean(0)).softmax(-1).max(-1) for rows in states]
    for training in (False, True):
        model.train(training)
        results = model.predict(SENTENCES, adapters=["app"], tokenizer=tokenizer)["app"]
        assert [result["label"] for result in results] == [str(int(score.indices)) for score in scores]
        for result, score in zip(results, scores, strict=True):
            assert result["score"] == pytest.approx(float(score.values), abs=1e-3)
    model.eval()


@pytest.mark.parametrize("how", RIGHT)
def test_a_replaced_call_computes_the_same_in_every_way(model, batch, encoders, how):
    inputs, tokenizer = batch(), PreTrainedTokenizerFast.from_pretrained(encoders["bert"])
    with torch.no_grad():  # views of the unchanged layers are made, and must not be used later
        model.encode_adapters([*ADAPTERS, None], **inputs)
    RIGHT[how](model)
    check_states(model, inputs)
    check_prediction(model, inputs, tokenizer)
    check_gradients(model, inputs)


@pytest.mark.parametrize("how", REFUSED)
def test_a_call_tied_to_its_module_is_refused(model, batch, encoders, how):
    inputs, tokenizer = batch(), PreTrainedTokenizerFast.from_pretrained(encoders["bert"])
    with torch.no_grad():  # views of the unchanged layers are made, and must not be used later
        model.encode_adapters([*ADAPTERS, None], **inputs)
    REFUSED[how](model)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(MtpfError, match=SENTENCE):
            model.encode_adapters(["app"], **inputs)
    with pytest.raises(MtpfError, match=SENTENCE):
        model.predict(SENTENCES, adapters=["app"], tokenizer=tokenizer)


@pytest.mark.parametrize("how", ["accelerate", "device map", "compiled layers", "bound function"])
def test_a_replaced_call_in_every_architecture(load, batch, architecture, how):
    if architecture == "modernbert" and how == "bound function":
        pytest.skip("its layers return tuples")
    model, inputs = load(architecture, ADAPTERS), batch(architecture)
    RIGHT[how](model)
    check_states(model, inputs)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloaded_weights_come_back_for_each_call(model, batch, encoders, tmp_path, offload):
    inputs, tokenizer = batch(), PreTrainedTokenizerFast.from_pretrained(encoders["bert"])
    with torch.no_grad():
        expected = separate(model, inputs)
    if offload == "cpu":
        cpu_offload(model.backbone, execution_device="cpu")
    else:
        disk_offload(model.backbone, tmp_path / "weights", execution_device="cpu")
    with torch.no_grad():
        states = model.encode_adapters([*ADAPTERS, None], **inputs)
    assert all(torch.equal(states[name], expected[name]) for name in expected)
    check_prediction(model, inputs, tokenizer)


def test_offloaded_weights_are_not_saved_and_take_no_adapter(model, encoders, tmp_path):
    model.save_pretrained(tmp_path / "backbone")
    model.save_adapter(tmp_path / "app", "app")
    offloaded = MtpfModel.from_pretrained(
        tmp_path / "backbone", device_map={"": "disk"}, offload_folder=tmp_path / "weights"
    )
    for refused in (
        lambda: offloaded.load_adapter(tmp_path / "app"),
        lambda: offloaded.add_adapter("new"),
        lambda: offloaded.save_pretrained(tmp_path / "again"),
    ):
        with pytest.raises(MtpfError, match="offloaded"):
            refused()
    assert not (tmp_path / "again").exists()


def test_a_hidden_layer_is_noticed_when_an_adapter_is_chosen(model):
    wrap_layers(model, Hidden)
    with pytest.raises(MtpfError, match="Keep it as a child"):
        model.set_adapter("app")
    model.set_adapter(None)
    with pytest.raises(MtpfError, match="Keep it as a child"), model.use_adapter("app"):
        pass


def test_a_call_that_holds_much_is_looked_at_in_bounded_time():
    nested = [0] * 80
    for _ in range(4):
        nested = [list(nested) for _ in range(80)]
    start = time.process_time()
    assert not _refers_to_a_module(functools.partial(print, nested))
    assert time.process_time() - start < 1


def test_a_merged_adapter_is_refused(model, batch):
    for module in model.backbone.modules():
        if hasattr(module, "lora_A"):
            module.merge(adapter_names=["app"])
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(MtpfError, match="'app' is merged"):
            model.encode_adapters([None], **batch())
