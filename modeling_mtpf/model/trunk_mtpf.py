"""The encoder split into a trunk, run once, and tails, run once per adapter.

The trunk is a shallow view of the stock encoder whose last layers only record the arguments with which the
encoder calls them; a tail replays the recorded calls through the real layers. No forward code is copied, so
every transformers encoder works and the result is bit-equal to separate passes.

A tail runs on shallow views as well, in which the LoRA modules have their own active adapter. Nothing in the
model changes: several adapters can take part in one graph, backward (also with activation checkpointing,
which runs the layers again) sees the adapters of the forward, and threads do not disturb each other.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .bound_calls_mtpf import rebind_calls
from .configuration_mtpf import encoder_layout
from .errors_mtpf import AdapterError, MtpfError
from .prefix_mtpf import ATTENTION, STATE, Prefix, Prefixes, prefixes_of

BARE = "_mtpf_bare"
"""Attribute of an encoder view that is known to have no LoRA in it."""

NUMBER = "_mtpf_modules"
"""Attribute of an adapter's config in memory: how many modules got its LoRA."""

Encoder = Any
"""A stock transformers encoder; its attributes differ by architecture, so that no static type fits."""


def encoder_layers(encoder: Encoder) -> nn.ModuleList:
    """Return the transformer layers of a stock encoder, lowest first."""
    return encoder.get_submodule(encoder_layout(encoder.config.model_type).layers)


def uncompiled(module: Any) -> Any:
    """Return the module inside the wrapper that ``torch.compile(module)`` returns, or the module itself."""
    while "_orig_mod" in module.__dict__.get("_modules", ()):
        module = module._modules["_orig_mod"]
    return module


def shallow_view(module: nn.Module) -> nn.Module:
    """Copy a module object without its children: they and all parameters are shared with the original.

    What calls the original through its attributes (a replaced ``forward``, hooks of accelerate,
    ``module.compile()``) calls the view instead; compiled code runs uncompiled. ``copy.copy`` is not used
    because some modules define a costly ``__setstate__``.

    Raises:
        MtpfError: The module's ``forward`` was replaced by something that may be tied to the original.
    """
    view = module.__class__.__new__(module.__class__)
    view.__dict__.update(module.__dict__)
    view.__dict__["_modules"] = dict(module._modules)
    view.__dict__["_compiled_call_impl"] = None
    rebind_calls(module, view)
    return view


@dataclass
class TrunkOutput:
    """What the tails need from the trunk.

    Attributes:
        hidden_states: ``(batch, tokens, hidden)``, the input of the first tail layer.
        calls: For each tail layer its other arguments, positional and by keyword (masks, rotary tables, ...).
    """

    hidden_states: torch.Tensor
    calls: list[tuple[tuple, dict[str, Any]]]

    def rows(self, start: int, stop: int) -> "TrunkOutput":
        """Return the part that belongs to the batch rows ``start:stop``."""
        return self.pick(slice(start, stop))

    def pick(self, rows: torch.Tensor | slice) -> "TrunkOutput":
        """Return the part that belongs to some batch rows, int64 ``(picked,)`` on the states' device."""
        size = self.hidden_states.shape[0]

        def select(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                # Masks and per-row tables have the batch in front; tables shared by all rows have 1 there.
                return value[rows] if value.dim() > 1 and value.shape[0] == size else value
            if isinstance(value, (tuple, list)):
                return type(value)(select(item) for item in value)
            if isinstance(value, dict):
                return {key: select(item) for key, item in value.items()}
            return value

        calls = [(select(args), select(kwargs)) for args, kwargs in self.calls]
        return TrunkOutput(self.hidden_states[rows], calls)


class _Recorder(nn.Module):
    """Stands in for one tail layer in the trunk's view: records its call and passes the hidden states on."""

    def __init__(self, layer: nn.Module, calls: list):
        super().__init__()
        # Not registered as a child: the layer's parameters belong to the encoder.
        self.__dict__["layer"] = layer
        self.__dict__["calls"] = calls

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # the encoder may read the layer, e.g. ModernBERT its attention_type
            return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        self.calls.append((hidden_states, args, kwargs))
        return hidden_states


def run_trunk(encoder: Encoder, num_tail_layers: int, **inputs) -> TrunkOutput:
    """Run embeddings and all but the last ``num_tail_layers`` layers.

    Args:
        encoder: A stock encoder, with or without LoRA injected in its last layers.
        num_tail_layers: Number of layers left to the tails, from 1 to all of them.
        **inputs: The encoder's inputs: ``input_ids`` ``(batch, tokens)``, ``attention_mask``, ...

    Raises:
        ValueError: The encoder has fewer layers than that.
    """
    encoder = uncompiled(encoder)
    layout = encoder_layout(encoder.config.model_type)
    layers = list(encoder_layers(encoder))
    if not 1 <= num_tail_layers <= len(layers):
        raise ValueError(f"num_tail_layers must be from 1 to {len(layers)}, not {num_tail_layers}.")
    split = len(layers) - num_tail_layers
    recorded: list[tuple] = []
    # No adapter acts in the trunk, not even one that plain forwards use and that reaches deeper.
    bare = BARE in encoder.__dict__
    lower = layers[:split] if bare else [adapter_view(layer, None) for layer in layers[:split]]
    recorders = [_Recorder(layer, recorded) for layer in layers[split:]]
    view = _with_layers(encoder, [*lower, *recorders], _trunk_view)
    if view._modules.get("pooler") is not None:
        view._modules["pooler"] = None
    if layout.final_norm is not None:
        view._modules[layout.final_norm] = nn.Identity()
    view(**inputs)
    return TrunkOutput(recorded[0][0], [(args, kwargs) for _, args, kwargs in recorded])


def _with_layers(encoder: Encoder, layers: list[nn.Module], view_of: Callable[[nn.Module], Any]) -> Any:
    """Return a view of an encoder that has other layers."""
    view = parent = view_of(encoder)
    *path, last = encoder_layout(encoder.config.model_type).layers.split(".")
    for part in path:
        parent._modules[part] = view_of(uncompiled(parent._modules[part]))
        parent = parent._modules[part]
    parent._modules[last] = nn.ModuleList(layers)
    return view


def _trunk_view(module: nn.Module) -> Any:
    """Return a view of a module above the layers; its forward hooks may look at its output, not change it."""
    view = shallow_view(module)
    if module._forward_hooks:
        hooks = {key: _observing(hook) for key, hook in module._forward_hooks.items()}
        view.__dict__["_forward_hooks"] = OrderedDict(hooks)
    return view


def _observing(hook: Any) -> Any:
    def observe(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        if hook(module, *args, **kwargs) is not None:
            raise MtpfError(
                f"A forward hook on {type(module).__name__} changes its output, which predict and "
                "encode_adapters cannot use: they run its layers one by one. Register it on the last layer."
            )

    return observe


def is_lora_layer(module: nn.Module) -> bool:
    """Whether PEFT has put LoRA on this module. Needs no import of PEFT."""
    # Not hasattr(): it raises and catches an error for each of the other modules.
    return "lora_A" in module._modules and "base_layer" in module._modules


def check_unmerged(lora: Any) -> None:
    """Raise `MtpfError` for a layer with an adapter merged into the weights that all adapters share."""
    if lora.merged:
        raise MtpfError(
            f"The adapter {lora.merged_adapters[0]!r} is merged into the weights of the backbone, which all "
            "adapters share; unmerge it first, with PeftModel.unmerge_adapter()."
        )


def lora_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield name and module of every LoRA-carrying linear layer in ``module``.

    Modules inside them are not visited: their number grows with the adapters, and another thread may be
    adding one. Wrappers of ``torch.compile`` do not appear in the names.
    """
    module = uncompiled(module)
    if is_lora_layer(module):
        yield prefix, module
        return
    for name, child in module._modules.items():
        if child is not None:
            yield from lora_modules(child, f"{prefix}.{name}" if prefix else name)


def adapter_modules(encoder: Encoder, name: str) -> list[tuple[str, Any]]:
    """Return path and module of every layer with LoRA of an adapter.

    Raises:
        MtpfError: Some have disappeared since it was added.
    """
    modules = [(path, module) for path, module in lora_modules(encoder) if name in module.lora_A]
    if len(modules) < (number := getattr(encoder.peft_config[name], NUMBER, 0)):
        raise MtpfError(
            f"Of the {number} modules with the adapter {name!r} only {len(modules)} are left in the model: a "
            "layer was removed, or replaced by a module that hides it. Keep it as a child of the new one "
            "(self.layer = layer in its __init__), or delete the adapter."
        )
    return modules


def adapter_view(module: nn.Module, adapter: str | None) -> nn.Module:
    """Return a view of ``module`` in which exactly ``adapter`` (or none) is active.

    Only the containers above a LoRA module are copied, a few microseconds each; parameters, plain
    modules, hooks and the training flag are those of the original at the time of the call.
    """
    compiled, module = module, uncompiled(module)
    if is_lora_layer(module):
        check_unmerged(module)
        view = shallow_view(module)
        view.__dict__["_active_adapter"] = [] if adapter is None else [adapter]
        # Tables of all adapters, which another thread may be changing.
        for part in ("lora_A", "lora_B", "lora_dropout"):
            view._modules[part] = shallow_view(module.get_submodule(part))
        lora: Any = module
        view.__dict__["scaling"] = dict(lora.scaling)
        view.__dict__["_disable_adapters"] = False
        return view
    children = {
        name: adapter_view(child, adapter) if child is not None else None
        for name, child in module._modules.items()
    }
    if all(children[name] is child for name, child in module._modules.items()):
        return compiled
    view = shallow_view(module)
    view.__dict__["_modules"] = children
    return view


def run_tail(encoder: Encoder, trunk: TrunkOutput, adapter: str | None) -> torch.Tensor:
    """Run the last layers with one adapter (or none); return hidden states ``(batch, tokens, hidden)``."""
    return run_layers(encoder, trunk, tail_views(encoder, len(trunk.calls), adapter))


def tail_views(encoder: Encoder, depth: int, adapter: str | None) -> list[nn.Module]:
    """Return views of the last ``depth`` layers with one adapter active, or none.

    The views stay usable when the adapter is deleted or replaced.
    """
    layers = list(encoder_layers(encoder))
    views = [adapter_view(layer, adapter) for layer in layers[-depth:]]
    return with_prefixes(encoder, views, prefixes_of(encoder, adapter), len(layers) - depth)


def with_prefixes(
    encoder: Encoder, layers: list[nn.Module], prefixes: Prefixes, first: int = 0
) -> list[nn.Module]:
    """Return layers, numbered from ``first`` on, with views in place of those that have a prefix.

    Raises:
        AdapterError: A layer was replaced by a module that hides its attention.
    """
    if not prefixes:
        return layers
    path = encoder_layout(encoder.config.model_type).attention.split(".")
    return [
        _with_prefix(layer, path, prefixes[number]) if number in prefixes else layer
        for number, layer in enumerate(layers, first)
    ]


def _with_prefix(layer: nn.Module, path: list[str], prefix: Prefix) -> nn.Module:
    view: Any = shallow_view(uncompiled(layer))
    parent = view
    for part in path:
        if parent._modules.get(part) is None:
            raise AdapterError(
                f"A layer was replaced by a {type(uncompiled(layer)).__name__}, which hides its attention "
                "from an adapter with a prefix; keep the stock layer, or use an adapter without one."
            )
        parent._modules[part] = shallow_view(uncompiled(parent._modules[part]))
        parent = parent._modules[part]
    parent.__dict__[STATE] = prefix, parent.config
    config: Any = copy.copy(parent.config)
    config._attn_implementation_internal = ATTENTION
    parent.__dict__["config"] = config
    return view


def prefixed(encoder: Encoder, name: str | None) -> Encoder:
    """Return an encoder for plain forwards with the prefix of its active adapter; itself without one."""
    if not (prefixes := prefixes_of(encoder, name)):
        return encoder
    encoder = uncompiled(encoder)
    layers = with_prefixes(encoder, list(encoder_layers(encoder)), prefixes)
    return _with_layers(encoder, layers, shallow_view)


def run_layers(encoder: Encoder, trunk: TrunkOutput, layers: list[nn.Module]) -> torch.Tensor:
    """Run given layers, one for each recorded call, and the encoder's final norm on a trunk output."""
    hidden_states = trunk.hidden_states
    for layer, (args, kwargs) in zip(layers, trunk.calls, strict=True):
        hidden_states = layer(hidden_states, *args, **kwargs)
    final_norm = encoder_layout(encoder.config.model_type).final_norm
    return hidden_states if final_norm is None else getattr(encoder, final_norm)(hidden_states)
