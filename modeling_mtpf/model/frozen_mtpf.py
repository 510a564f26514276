"""Views of an encoder for inference: always in eval mode, with one app each, and merged tails.

A view shares all parameters with the encoder and costs no memory to speak of. It is kept until the encoder's
modules change. Whoever holds the layers of an app can go on using them when the app is deleted or replaced,
or when the model goes into training mode: a prediction takes what it needs once, at its beginning.

A *merged* tail holds copies of the linear layers that carry LoRA, with the LoRA added in. It saves the
LoRA's two small products at the cost of that memory, about 12 MB for all-MiniLM.
"""

import hashlib
import math
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .trunk_mtpf import (
    BARE,
    Encoder,
    adapter_view,
    encoder_layers,
    is_lora_layer,
    lora_modules,
    shallow_view,
)

CHANGES = threading.RLock()
"""Held while adapters are put in, taken out, or looked up, in any model; never while a layer runs."""


class _FixedLora(nn.Module):
    """What PEFT computes for one adapter, with two passes over the output instead of four, bit for bit.

    Not for training: it writes into the output of the base layer.
    """

    def __init__(self, base: nn.Module, module: Any, name: str):
        super().__init__()
        self.base, self.down, self.up = base, module.lora_A[name], module.lora_B[name]
        self.scaling = module.scaling[name]
        self.exact = math.frexp(self.scaling)[0] == 0.5  # a power of two rounds nothing when it multiplies

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base(x)
        update = self.up(self.down(x.to(self.down.weight.dtype)))
        if update.dtype != result.dtype:
            return (result + update * self.scaling).to(result.dtype)
        return (
            result.add_(update, alpha=self.scaling) if self.exact else result.add_(update.mul_(self.scaling))
        )


class _Merged:
    """Copies of an app's linear layers with its LoRA added in."""

    def __init__(self, encoder: Encoder, name: str):
        self.linear: dict[str, nn.Linear] = {}
        self.marks = {path: _mark(module, name) for path, module in _carriers(encoder, name)}
        for path, module in _carriers(encoder, name):
            base = module.get_base_layer()
            copy = nn.Linear(
                base.in_features,
                base.out_features,
                False,
                device="meta",
                dtype=base.weight.dtype,
            )
            product = module.lora_B[name].weight.float() @ module.lora_A[name].weight.float()
            weight = base.weight.float() + product * module.scaling[name]
            copy.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
            copy.bias = base.bias
            self.linear[path] = copy.eval()

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(linear.weight.nbytes for linear in self.linear.values())

    def fits(self, encoder: Encoder, name: str) -> bool:
        """Whether the weights are still those that were merged."""
        return self.marks == {path: _mark(module, name) for path, module in _carriers(encoder, name)}


def _carriers(encoder: Encoder, name: str) -> list[tuple[str, Any]]:
    return [(path, module) for path, module in lora_modules(encoder) if name in module.lora_A]


def _mark(module: Any, name: str) -> tuple:
    """Fingerprint what a merged linear layer was made from.

    Not the tensors' version counters: a fused optimizer does not count. A few rows of each matrix are
    looked at, because training changes all of them and every call asks.
    """
    base, down, up = module.get_base_layer(), module.lora_A[name].weight, module.lora_B[name].weight
    trained = down.requires_grad or up.requires_grad
    samples = [_sampled(tensor) for tensor in (down, up, base.weight)]
    return trained, module.scaling[name], base.weight.device, base.weight.dtype, *samples


def _sampled(tensor: torch.Tensor) -> int:
    """Hash five or so rows, evenly spread."""
    rows = tensor.detach()[:: max(1, tensor.shape[0] // 4)]
    return hash(rows.contiguous().view(torch.uint8).cpu().numpy().tobytes())


def bits_digest(tensor: torch.Tensor) -> bytes:
    """Digest a tensor by the sums of its rows' bytes, read as integers of up to 64 bits, modulo 2^64.

    Reads a tensor as fast as memory gives it. Any change of one element changes it, and so does exchanging
    rows; exchanging numbers within a row does not.
    """
    flat = tensor.detach().contiguous().view(-1)
    size, offset = flat.element_size(), flat.storage_offset()
    wide = size < 8 and size * flat.numel() % 8 == 0 and size * offset % 8 == 0
    widths = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    numbers = flat.view(torch.int64 if wide else widths[size])
    rows = tensor.shape[0] if tensor.dim() > 1 and numbers.numel() % max(1, tensor.shape[0]) == 0 else 1
    numbers = numbers.reshape(max(1, rows), -1)
    if numbers.device.type != "cpu":
        return hashlib.sha256(numbers.sum(1, dtype=torch.int64).cpu().numpy().tobytes()).digest()
    # NumPy's sum takes one core and the time of reading; two threads of torch would wait for each other, a
    # hundred times over, on a machine that has other work.
    return hashlib.sha256(numbers.numpy().sum(1, dtype="int64").tobytes()).digest()


@dataclass
class _Tail:
    """The layers of one app, and what they were made from."""

    layers: list[nn.Module]
    parts: list[tuple[Any, nn.Module, nn.Module, float]]  # LoRA module, its A, its B, scaling
    merged: bool

    def stands(self, name: str) -> bool:
        return all(
            name in module.lora_A
            and module.lora_A[name] is down
            and module.lora_B[name] is up
            and module.scaling[name] == scaling
            for module, down, up, scaling in self.parts
        )


def _in_eval_mode(module: nn.Module) -> nn.Module:
    """Return a view of a module and all below it in eval mode."""
    view = shallow_view(module)
    view.__dict__["training"] = False
    view.__dict__["_modules"] = {
        name: None if child is None else _in_eval_mode(child) for name, child in module._modules.items()
    }
    return view


class FrozenEncoder:
    """Views of one encoder; get it from `frozen`.

    Attributes:
        bare: The encoder in eval mode without any adapter.
        layers: Its transformer layers, lowest first.
    """

    def __init__(self, encoder: Encoder):
        self._views: dict[nn.Module, nn.Module] = {}
        self._children: list[tuple[dict, dict]] = []
        self._tails: dict[str, _Tail] = {}
        self._merged: dict[str, _Merged] = {}
        self.bare: Any = self._freeze(encoder)
        del self._views[encoder]  # a reference from here would keep the encoder alive for ever
        self.bare.__dict__[BARE] = True
        self.bare.__dict__.pop("peft_config", None)
        self.layers: list[nn.Module] = list(encoder_layers(self.bare))

    def _freeze(self, module: nn.Module) -> nn.Module:
        if is_lora_layer(module):
            base: Any = module.base_layer
            self._views[module] = view = self._freeze(base)
            return view
        view = shallow_view(module)
        view.__dict__["training"] = False
        view.__dict__["_compiled_call_impl"] = None  # it is bound to the original
        if module._modules:
            self._children.append((module._modules, dict(module._modules)))
            view.__dict__["_modules"] = {
                name: None if child is None else self._freeze(child)
                for name, child in module._modules.items()
            }
        self._views[module] = view
        return view

    def stands(self) -> bool:
        """Whether the encoder still has the modules that the views were made of."""
        return all(now == then for now, then in self._children)

    def in_eval_mode(self, encoder: Encoder) -> bool:
        """Whether all modules of the encoder are in eval mode, so that the views compute what it computes."""
        return not encoder.training and not any(module.training for module in self._views)

    def tail(self, encoder: Encoder, name: str | None) -> list[nn.Module]:
        """Return the layers that an app touches, with its LoRA or merged; none for the bare backbone."""
        if name is None:
            return []
        merged = self.merged(encoder, name)
        tail = self._tails.get(name)
        if tail is None or not tail.stands(name) or tail.merged != (merged is not None):
            tail = self._tails[name] = self._make_tail(encoder, name, merged)
        return tail.layers

    def _make_tail(self, encoder: Encoder, name: str, merged: _Merged | None) -> _Tail:
        carriers = _carriers(encoder, name)
        parts = [(m, m.lora_A[name], m.lora_B[name], m.scaling[name]) for _, m in carriers]
        copies = {module: merged.linear[path] for path, module in carriers} if merged else {}
        layers: list[nn.Module] = []
        for layer, bare in zip(encoder_layers(encoder), self.layers, strict=True):
            view = self._with_adapter(layer, name, copies)
            if layers or view is not bare:
                layers.append(view)
        return _Tail(layers, parts, merged is not None)

    def _with_adapter(self, module: nn.Module, name: str, copies: dict) -> nn.Module:
        frozen = self._views[module]
        if is_lora_layer(module):
            lora: Any = module
            if name not in lora.lora_A:
                return frozen
            if module in copies:
                return copies[module]
            if lora.merged or name in lora.lora_variant:
                return _in_eval_mode(adapter_view(module, name))
            fixed = _FixedLora(frozen, module, name)
            fixed.training = False  # not .eval(): its parts belong to the model
            return fixed
        children = {
            key: None if child is None else self._with_adapter(child, name, copies)
            for key, child in module._modules.items()
        }
        if all(children[key] is child for key, child in frozen._modules.items()):
            return frozen
        view = shallow_view(frozen)
        view.__dict__["_modules"] = children
        return view

    def on_top(self, depth: int, layers: list[nn.Module]) -> list[nn.Module]:
        """Fill an app's layers up with bare ones below, to the last ``depth`` layers."""
        return self.layers[len(self.layers) - depth : len(self.layers) - len(layers)] + layers

    def merge(self, encoder: Encoder, name: str) -> None:
        """Make the merged tail of an app."""
        with torch.no_grad():
            self._merged[name] = _Merged(encoder, name)
        self._tails.pop(name, None)

    def merged(self, encoder: Encoder, name: str) -> _Merged | None:
        """Return an app's merged tail, if it has one; one whose weights were changed since is dropped."""
        found = self._merged.get(name)
        if found is not None and not found.fits(encoder, name):
            del self._merged[name]
            return None
        return found

    def unmerge(self, name: str) -> bool:
        """Drop an app's merged tail; say whether there was one."""
        return self._merged.pop(name, None) is not None

    def forget(self, name: str) -> None:
        """Drop all that is kept of an app."""
        self._merged.pop(name, None)
        self._tails.pop(name, None)


_FROZEN: "weakref.WeakKeyDictionary[nn.Module, FrozenEncoder]" = weakref.WeakKeyDictionary()
"""Not an attribute of the encoder: it belongs neither into its state, nor into copies or pickles."""


def frozen(encoder: Encoder) -> FrozenEncoder:
    """Return the views of an encoder; hold `CHANGES` while you use its methods."""
    found = _FROZEN.get(encoder)
    if found is None or not found.stands():
        merged = {} if found is None else found._merged
        found = _FROZEN[encoder] = FrozenEncoder(encoder)
        found._merged = merged
    return found


def forget_adapter(encoder: Encoder, name: str) -> None:
    """Drop the views and the merged tail of an adapter that goes."""
    if encoder in _FROZEN:
        _FROZEN[encoder].forget(name)


__all__ = ["CHANGES", "FrozenEncoder", "bits_digest", "forget_adapter", "frozen"]
