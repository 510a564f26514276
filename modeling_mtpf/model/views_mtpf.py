"""Views of an encoder for inference: always in eval mode, with the layers of one app each.

A view shares all parameters with the encoder and costs next to no memory. It is kept until the encoder's
modules change. Layers that a caller holds stay usable when their app is deleted or replaced, or when the
model goes into training mode: a prediction takes what it needs once, at its beginning.
"""

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .bound_calls_mtpf import CALLS
from .forks_mtpf import held_at_fork
from .prefix_mtpf import prefixes_of
from .trunk_mtpf import (
    BARE,
    Encoder,
    adapter_modules,
    adapter_view,
    check_unmerged,
    encoder_layers,
    is_lora_layer,
    shallow_view,
    uncompiled,
    with_prefixes,
)

CHANGES = held_at_fork()
"""Held while adapters are added, removed or looked up, in any model; never while a layer runs."""


class _FixedLora(nn.Module):
    """What PEFT computes for one adapter, with two passes over the output instead of four, bit for bit.

    Not for training: it writes into the output of the base layer.
    """

    def __init__(self, base: nn.Module, module: Any, name: str):
        super().__init__()
        self.base, self.down, self.up = base, module.lora_A[name], module.lora_B[name]
        self.scaling = module.scaling[name]
        self.exact = math.frexp(self.scaling)[0] == 0.5  # a power of two rounds nothing when it multiplies
        self.training = False  # not .eval(): its parts belong to the model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base(x)
        update = self.up(self.down(x.to(self.down.weight.dtype)))
        if update.dtype != result.dtype:
            return (result + update * self.scaling).to(result.dtype)
        return (
            result.add_(update, alpha=self.scaling) if self.exact else result.add_(update.mul_(self.scaling))
        )


@dataclass
class _Tail:
    """The layers of one app, and what they were made from."""

    layers: list[nn.Module]
    parts: list[tuple[Any, nn.Module, nn.Module, float]]  # LoRA module, its A, its B, scaling

    def is_current(self, name: str) -> bool:
        return all(
            name in module.lora_A
            and module.lora_A[name] is down
            and module.lora_B[name] is up
            and module.scaling[name] == scaling
            for module, down, up, scaling in self.parts
        )


def _in_eval_mode(module: nn.Module) -> nn.Module:
    """Return a view of a module and all below it in eval mode."""
    module = uncompiled(module)
    view = shallow_view(module)
    view.__dict__["training"] = False
    view.__dict__["_modules"] = {
        name: None if child is None else _in_eval_mode(child) for name, child in module._modules.items()
    }
    return view


def _is_plain(lora: Any) -> bool:
    """Whether calling this LoRA layer adds an unmerged LoRA and does nothing else."""
    changed = not lora.__dict__.keys().isdisjoint(CALLS) or not type(lora).__module__.startswith("peft.")
    return not (changed or lora._forward_hooks or lora._forward_pre_hooks or lora.merged_adapters)


class InferenceViews:
    """Views of one encoder; get it from `inference_views`.

    Attributes:
        bare: The encoder in eval mode without any adapter.
        layers: Its transformer layers, lowest first.
    """

    def __init__(self, encoder: Encoder):
        self._views: dict[nn.Module, nn.Module] = {}
        self._children: list[tuple[dict, dict]] = []
        self._tails: dict[str, _Tail] = {}
        self.bare: Any = self._without_lora(encoder)
        del self._views[encoder]  # a reference from here would keep the encoder alive for ever
        self._lora: list[Any] = [module for module in self._views if is_lora_layer(module)]
        forward = encoder.__dict__.get("forward")
        self._forward = forward and weakref.ref(forward)
        self._calls = self._current_calls()
        self.bare.__dict__[BARE] = True
        self.bare.__dict__.pop("peft_config", None)
        self.layers: list[nn.Module] = list(encoder_layers(self.bare))

    def _without_lora(self, module: nn.Module) -> nn.Module:
        module = uncompiled(module)
        if is_lora_layer(module):
            check_unmerged(module)
            base: Any = module.base_layer
            view = self._without_lora(base)
            if not _is_plain(module):
                view = _in_eval_mode(adapter_view(module, None))
            self._views[module] = view
            return view
        view = shallow_view(module)
        view.__dict__["training"] = False
        self._children.append((module._modules, dict(module._modules)))
        if module._modules:
            view.__dict__["_modules"] = {
                name: None if child is None else self._without_lora(child)
                for name, child in module._modules.items()
            }
        self._views[module] = view
        return view

    def are_current(self, encoder: Encoder) -> bool:
        """Whether the encoder still has the modules, and they the calls, that the views were made of."""
        return (
            all(now == then for now, then in self._children)
            and (self._forward and self._forward()) is encoder.__dict__.get("forward")
            and self._calls == self._current_calls()
        )

    def _current_calls(self) -> list[Any]:
        """What runs when a module below the encoder is called, where that can be changed on its object."""
        calls: list[Any] = [type(module) for module in self._views]
        for module in self._views:
            if not module.__dict__.keys().isdisjoint(CALLS):
                calls += [(module, name, module.__dict__.get(name)) for name in CALLS]
        return calls + [(_is_plain(lora), lora.base_layer) for lora in self._lora]

    def in_eval_mode(self, encoder: Encoder) -> bool:
        """Whether all modules of the encoder are in eval mode, so that the views compute what it computes."""
        return not encoder.training and not any(module.training for module in self._views)

    def tail(self, encoder: Encoder, name: str | None) -> list[nn.Module]:
        """Return the layers that an app touches, with its LoRA; none for the bare backbone."""
        if name is None:
            return []
        tail = self._tails.get(name)
        if tail is None or not tail.is_current(name):
            tail = self._tails[name] = self._make_tail(encoder, name)
        return tail.layers

    def _make_tail(self, encoder: Encoder, name: str) -> _Tail:
        parts = [
            (module, module.lora_A[name], module.lora_B[name], module.scaling[name])
            for _, module in adapter_modules(encoder, name)
        ]
        views = [self._with_lora(layer, name) for layer in encoder_layers(encoder)]
        views = with_prefixes(encoder, views, prefixes_of(encoder, name))
        changed = (n for n, view in enumerate(views) if view is not self.layers[n])
        return _Tail(views[next(changed, len(views)) :], parts)

    def _with_lora(self, module: nn.Module, name: str) -> nn.Module:
        module = uncompiled(module)
        bare = self._views[module]
        if is_lora_layer(module):
            lora: Any = module
            if name not in lora.lora_A:
                return bare
            if name in lora.lora_variant or not _is_plain(lora):
                return _in_eval_mode(adapter_view(module, name))
            return _FixedLora(bare, module, name)
        children = {
            key: None if child is None else self._with_lora(child, name)
            for key, child in module._modules.items()
        }
        if all(children[key] is child for key, child in bare._modules.items()):
            return bare
        view = shallow_view(bare)
        view.__dict__["_modules"] = children
        return view

    def on_top(self, depth: int, layers: list[nn.Module]) -> list[nn.Module]:
        """Fill an app's layers up with bare ones below, to the last ``depth`` layers."""
        return self.layers[len(self.layers) - depth : len(self.layers) - len(layers)] + layers

    def forget(self, name: str) -> None:
        """Drop the layers of an app."""
        self._tails.pop(name, None)


_VIEWS: "weakref.WeakKeyDictionary[nn.Module, InferenceViews]" = weakref.WeakKeyDictionary()
"""Not an attribute of the encoder: it belongs neither into its state, nor into copies or pickles."""


def inference_views(encoder: Encoder) -> InferenceViews:
    """Return the views of an encoder; hold `CHANGES` while you use its methods."""
    encoder = uncompiled(encoder)
    views = _VIEWS.get(encoder)
    if views is None or not views.are_current(encoder):
        views = _VIEWS[encoder] = InferenceViews(encoder)
    return views


def forget_adapter(encoder: Encoder, name: str) -> None:
    """Drop the views of an adapter that is removed."""
    encoder = uncompiled(encoder)
    if encoder in _VIEWS:
        _VIEWS[encoder].forget(name)
