"""Calls that are stored on a module object instead of its class, and how a copy of the object gets its own.

accelerate's hooks (per-layer device maps, offloading), kernel replacements and patches put a ``forward`` on
the object that is bound to it. In a copy it would silently run the original: without the copy's adapter.
"""

import functools
import itertools
import types
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from .errors_mtpf import MtpfError

CALLS = ("forward", "_old_forward", "_call_impl", "_slow_forward")
"""What runs when a module is called; ``_old_forward`` is where accelerate keeps the one it wraps."""

_BOUND = (types.MethodType, functools.partial)

_LEVELS, _LEVEL_SIZE = 6, 10_000
"""How many references in a row are followed from a callable, and how many objects on each level."""


def rebind_calls(module: nn.Module, view: nn.Module) -> None:
    """Make the callables stored on a module, which a view has copied, those of the view.

    Raises:
        MtpfError: What runs on a call is a closure or another object that may be tied to the original.
    """
    for name, value in module.__dict__.items():
        if name in CALLS or type(value) in _BOUND:
            bound = _rebind(value, module, view)
            if bound is None and name in CALLS:
                function = getattr(value, "__qualname__", type(value).__name__)
                raise MtpfError(
                    f"The {name.removeprefix('_old_')} of a {type(module).__name__} was replaced by "
                    f"{function!r}, which may be tied to that object: predict and encode_adapters, which "
                    "call copies with one adapter each, would ignore the adapters. Replace it on the class, "
                    "use register_forward_hook, or bind a function that refers to the module by its argument "
                    "alone: types.MethodType(function, module)."
                )
            if bound is not None:
                view.__dict__[name] = bound


def _rebind(value: Any, module: nn.Module, view: nn.Module) -> Any:
    """Return a callable for the view; ``None`` if this one does not take the module as its argument."""
    value = getattr(value, "_torchdynamo_orig_callable", value)  # torch.compile(module.forward)
    if isinstance(value, types.MethodType):
        function = value.__func__
        known = getattr(type(module), function.__name__, None) is function
        tied = value.__self__ is not module or (not known and _refers_to_a_module(function))
        return None if tied else types.MethodType(function, view)
    if not isinstance(value, functools.partial):
        return None
    function = _rebind(value.func, module, view)
    if function is None and _refers_to_a_module(value.func):
        return None
    args = [view if item is module else item for item in value.args]
    keywords = {key: view if item is module else item for key, item in value.keywords.items()}
    taken = function is not None or any(item is module for item in (*value.args, *value.keywords.values()))
    return functools.partial(function or value.func, *args, **keywords) if taken else None


def _refers_to_a_module(value: Any) -> bool:
    """Whether a callable can reach a module other than by its arguments, as far as can be seen.

    Globals are followed in functions of the source file that the callable comes from.
    """
    source, level = str(getattr(value, "__module__", "")), [value]
    for _ in range(_LEVELS):
        if any(isinstance(item, nn.Module) for item in level):
            return True
        opaque = (type, types.ModuleType, str, bytes)
        items = (_references(item, source) for item in level if not isinstance(item, opaque))
        level = list(itertools.islice(itertools.chain.from_iterable(items), _LEVEL_SIZE))
    return False


def _references(value: Any, source: str) -> Iterator[Any]:
    """Yield what a function, bound method, partial, container or plain object holds."""
    if isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # not assigned yet
                yield cell.cell_contents
        yield from (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        if value.__module__ == source:
            names = set(_global_names(value.__code__)) & value.__globals__.keys()
            yield from (value.__globals__[name] for name in names)
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, dict):
        yield from itertools.chain(value, value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    else:
        yield from list(getattr(value, "__dict__", {}).values())


def _global_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


def execution_device(model: Any) -> torch.device:
    """Return where a model's inputs belong, also while accelerate keeps its weights elsewhere."""
    if model.device.type != "meta":
        return model.device
    for module in model.modules():
        hook = module.__dict__.get("_hf_hook")
        for part in getattr(hook, "hooks", [hook]):
            if (device := getattr(part, "execution_device", None)) is not None:
                return torch.device(device)
    return model.device
