"""Typed settings of the scripts: ``--key value`` arguments to checked dataclasses, and their description.

An unknown key is an error that names the nearest valid one.
"""

import difflib
import types
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import RecipeError

Converters = list[tuple[Any, Callable[[Any, str], Any]]]
"""Type → conversion ``(value, path)`` for fields that are no plain values, lists or dataclasses."""


def read_overrides(arguments: list[str], flags: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield key and value of ``--key value`` and ``--key=value``; values are read as YAML.

    Args:
        arguments: Without the program name.
        flags: Keys that may stand alone, which means true.
    """
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if not argument.startswith("--"):
            raise RecipeError(f"Unexpected argument {argument!r}; overrides are written --key value.")
        key, equals, text = argument[2:].partition("=")
        if not equals:
            position += 1
            alone = position == len(arguments) or arguments[position].startswith("--")
            if key in flags and alone:
                yield key, True
                continue
            if position == len(arguments):
                raise RecipeError(f"--{key} needs a value.")
            text = arguments[position]
        position += 1
        try:
            yield key, yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"--{key}: {text!r} is not a valid value.") from error


def parse_arguments(cls: type, arguments: list[str]) -> Any:
    """Build a settings dataclass from ``--key value`` arguments; a boolean key may stand alone.

    Raises:
        RecipeError: An unknown or missing key, or a value of the wrong type.
    """
    flags = tuple(name for name, hint in get_type_hints(cls).items() if hint is bool)
    values = dict(read_overrides(arguments, flags))
    for f in fields(cls):
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise RecipeError(f"--{f.name} is needed; --help lists all keys.")
    return build(cls, values)


def build(cls: type, values: Any, path: str = "", converters: Converters | None = None) -> Any:
    """Build a settings dataclass from plain values, checking every key and type.

    Example:
        >>> from modeling_mtpf import LoraSettings
        >>> build(LoraSettings, {"r": 8}).r
        8
        >>> build(LoraSettings, {"rr": 8})
        Traceback (most recent call last):
        ...
        modeling_mtpf.errors.RecipeError: Unknown key 'rr'; did you mean 'r'? Known here: alpha, dropout, layers, r, targets.
    """  # noqa: E501
    if not isinstance(values, dict):
        raise RecipeError(f"{path or 'The recipe'} must hold keys and values, not {values!r}.")
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"did you mean {dotted(path, close[0])!r}? " if close else ""
            raise RecipeError(
                f"Unknown key {dotted(path, key)!r}; {hint}Known here: {', '.join(sorted(known))}."
            )
    converted = {
        key: _convert(hints[key], value, dotted(path, key), converters or []) for key, value in values.items()
    }
    return cls(**converted)


def dotted(path: str, key: str) -> str:
    """Join a section and a key."""
    return f"{path}.{key}" if path else str(key)


def _convert(hint: Any, value: Any, path: str, converters: Converters) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in get_args(hint) if option is not type(None))
    for special, convert in converters:
        if hint == special:
            return convert(value, path)
    if is_dataclass(hint):
        return build(hint, value, path, converters)  # type: ignore[arg-type]
    if get_origin(hint) is list:
        items = value if isinstance(value, list) else [value]
        return [_convert(get_args(hint)[0], item, path, converters) for item in items]
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 5e-5 as text
        except ValueError:
            pass
    elif hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # a folder or a commit of digits only
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise RecipeError(f"{path} is {value!r}, but must be of type {hint.__name__}.")


def check_same_arguments(now: dict[str, str], then: dict[str, str], place: Any) -> None:
    """Refuse to go on with what was begun with other arguments.

    Args:
        now: The decisive arguments of this run.
        then: Those of the run that is to go on.
        place: Where its state is, for the message.

    Raises:
        RecipeError: With the first argument that differs.
    """
    for key, value in now.items():
        if then.get(key) != value:
            raise RecipeError(
                f"{place} was written with --{key} {then.get(key)}, this run has {value}; give the same, or "
                "choose another --output_dir."
            )


def nearest(value: str, known: list[str]) -> str:
    """Return ``did you mean …?`` where one of the known values is close, else nothing."""
    close = difflib.get_close_matches(str(value), known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def describe_keys(cls: type, prefix: str = "", skip: tuple[str, ...] = ()) -> str:
    """Return the keys of a settings dataclass with defaults and meanings, for ``--help``."""
    described = "".join((base.__doc__ or "").partition("Attributes:")[2] for base in cls.__mro__)
    lines = []
    for f in fields(cls):
        required = f.default is MISSING and f.default_factory is MISSING
        default = None if required else f.default if f.default is not MISSING else f.default_factory()  # type: ignore
        if is_dataclass(default) or f.name in skip:
            continue
        _, found, text = described.partition(f" {f.name}: ")
        meaning = " ".join(_first_entry(text).split()) if found else ""
        lines.append(f"  --{prefix}{f.name} {'(needed)' if required else repr(default)}\n        {meaning}")
    return "\n".join(lines)


def _first_entry(text: str) -> str:
    """The lines up to the next ``name: meaning`` at attribute depth."""
    first, *rest = text.splitlines()
    kept = [first]
    for line in rest:
        if not line.startswith("            "):
            break
        kept.append(line)
    return " ".join(kept)


__all__ = [
    "build",
    "check_same_arguments",
    "describe_keys",
    "dotted",
    "nearest",
    "parse_arguments",
    "read_overrides",
]
