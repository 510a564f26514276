"""Dataclasses filled from YAML and from the command line; options and help follow from their ``Attributes:``.

(tyro 1.0 was tried: it reads no YAML, and reports a mistake as a box that only a private hook can change.)
"""

import argparse
import difflib
import inspect
import re
import sys
import types
from collections import deque
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from .errors import RecipeError

POSITIONAL = {"form": "positional"}
"""Metadata of a field whose value comes without its name."""

REPEATED = {"form": "repeated"}
"""Metadata of a list that takes one value with each use of its option: positional values may follow it."""

COMMAS = {"form": "commas"}
"""Metadata of a text with commas between its parts, which are also accepted as several values."""

Sections = dict[str, dict[str, type]]
"""Field that holds named dataclasses → name → the dataclass, e.g. the families of a recipe."""

# YAML reads 5e-5 as text, and a folder or commit of digits only as a number.
_READABLE: dict[Any, tuple[type, ...]] = {float: (int, str), int: (str,), str: (int, float)}
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message[0].upper()}{message[1:]}; {self.prog} --help lists all.")

    def print_help(self, file: Any = None) -> None:
        sys.stdout.write(self.format_help())  # argparse would be silent about an error


class ScriptParser(argparse.ArgumentParser):
    """The parser of a script's options; a mistake ends in one sentence with the nearest option."""

    def __init__(self, **options: Any):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """End the script with status 2."""
        unknown = re.match(r"unrecognized arguments: (--?[^\s=]+)", message)
        if unknown:
            hint = nearest(unknown[1], list(self._option_string_actions))
            message = f"unknown argument {unknown[1]}; {hint}--help lists all"
        self.exit(2, f"error: {message[0].upper()}{message[1:]}.\n")


def parse(
    cls: type,
    arguments: list[str],
    prog: str,
    description: str,
    examples: str,
    sections: Sections | None = None,
) -> dict[str, Any]:
    """Return the values that a command line gives to the fields of a dataclass, nested where a key has dots.

    ``--key value`` or ``--key=value``, ``--key a b`` for a list, ``--key`` alone for true; ``-`` may stand
    for ``_``. ``--help`` prints the help and exits.

    Raises:
        RecipeError: An unknown key, with the nearest one, or a missing key or value.
    """
    positional = " ".join(f.name.upper() for f in fields(cls) if f.metadata == POSITIONAL)
    parser = _Parser(
        prog=prog,
        description=description,
        usage=f"%(prog)s {positional} [--KEY VALUE ...]",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    switches = {"--help": False}  # option → whether it may stand alone for true
    for key, field, hint, meaning in _options(cls, sections or {}):
        if field.metadata != POSITIONAL:
            switches[f"--{key}"] = hint is bool
        _add_option(parser, key, field, hint, meaning)
    values: dict[str, Any] = {}
    for key, value in vars(parser.parse_args(list(_regular(arguments, switches)))).items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return values


def _options(cls: type, sections: Sections, prefix: str = "") -> Iterator[tuple[str, Field, Any, str]]:
    """Yield dotted key, field, type and meaning of all settings, those of nested dataclasses included."""
    hints, meanings = get_type_hints(cls), _meanings(cls)
    for field in fields(cls):
        key, hint = prefix + field.name, _not_none(hints[field.name])
        if is_dataclass(hint):
            yield from _options(hint, sections, f"{key}.")  # type: ignore[arg-type]
        elif key in sections:
            for name, inner in sections[key].items():
                yield from _options(inner, sections, f"{key}.{name}.")
        else:
            yield key, field, hint, meanings.get(field.name, "")


def _add_option(parser: _Parser, key: str, field: Field, hint: Any, meaning: str) -> None:
    several = get_origin(hint) is list
    needed = field.default is MISSING and field.default_factory is MISSING
    default = field.default
    if default not in (MISSING, None, ""):
        meaning += f" (default: {str(default).lower() if hint is bool else default})"
    options: dict[str, Any] = {"help": meaning.replace("``", "").replace("%", "%%")}
    if field.metadata == POSITIONAL:
        nargs = "*" if several else None if needed else "?"
        parser.add_argument(key, nargs=nargs, metavar=field.name.upper(), **options)
        return
    if field.metadata == REPEATED:
        options["action"] = "append"
    elif several or field.metadata == COMMAS:
        options |= {"nargs": "+", "action": "extend"}
    metavar = "true|false" if hint is bool else (get_args(hint) or (hint,))[0].__name__.upper()
    parser.add_argument(f"--{key}", required=needed, metavar=metavar, **options)


def _regular(arguments: list[str], switches: dict[str, bool]) -> Iterator[str]:
    """Yield arguments as argparse wants them: known keys with ``_``, ``--key=true``, ``--key=-1,-7``."""
    rest = deque(arguments)
    while rest:
        argument = rest.popleft()
        if not argument.startswith("--") or argument == "--":
            yield argument
            continue
        key, equals, value = argument.partition("=")
        key = "--" + key[2:].replace("-", "_")
        if key not in switches:
            raise RecipeError(f"Unknown argument {key}; {nearest(key, list(switches))}--help lists all.")
        following = rest[0] if rest and not equals else ""
        if switches[key] and not equals:
            equals, value = "=", rest.popleft() if following.lower() in _TRUTH else "true"
        elif re.match(r"-[\d.]", following) and not re.fullmatch(r"-\d+|-\d*\.\d+", following):
            equals, value = "=", rest.popleft()  # argparse takes -1 for a value, but -1,-7 for an option
        yield f"{key}{equals}{value}"


def read_settings(cls: type, arguments: list[str], prog: str, description: str, examples: str) -> Any:
    """Build a settings dataclass from a command line (see `parse`).

    Raises:
        MtpfError: An unknown or missing key, or a value that is not accepted.
    """
    return build(cls, parse(cls, arguments, prog, description, examples))


def build(cls: type, values: Any, path: str = "", sections: Sections | None = None) -> Any:
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
    hints, known = get_type_hints(cls), {f.name: f for f in fields(cls)}
    built: dict[str, Any] = {}
    for key, value in values.items():
        prefix = f"{path}." if path else ""
        dotted, classes = f"{prefix}{key}", (sections or {}).get(f"{prefix}{key}")
        if key not in known:
            hint = nearest(dotted, [prefix + name for name in known])
            raise RecipeError(f"Unknown key {dotted!r}; {hint}Known here: {', '.join(sorted(known))}.")
        if classes is not None and isinstance(value, dict):
            built[key] = {n: build(classes[n], inner or {}, f"{dotted}.{n}") for n, inner in value.items()}
        else:
            built[key] = _convert(hints[key], value, dotted, known[key].metadata == COMMAS)
    return cls(**built)


def _convert(hint: Any, value: Any, path: str, commas: bool = False) -> Any:
    optional, hint = hint != _not_none(hint), _not_none(hint)
    if optional and value in (None, "null", "~", "", ["null"]):
        return None
    if is_dataclass(hint):
        return build(hint, value, path)  # type: ignore[arg-type]
    if get_origin(hint) is list:
        items = value if isinstance(value, list) else [value]
        if len(items) == 1 and str(items[0]).startswith("["):
            items = [item.strip(" \"'") for item in items[0].strip("[]").split(",") if item.strip()]
        return [_convert(get_args(hint)[0], item, path) for item in items]
    if "\0" in str(value):
        raise RecipeError(f"{path} is {value!r}, which holds the character NUL.")
    if commas and isinstance(value, list):
        value = ",".join(map(str, value))
    if hint is bool and str(value).lower() in _TRUTH:
        return _TRUTH[str(value).lower()]
    if type(value) in _READABLE.get(hint, ()):
        try:
            return hint(value)
        except ValueError:
            pass
    elif type(value) is hint:
        return value
    raise RecipeError(f"{path} is {value!r}, but must be of type {hint.__name__}.")


def _not_none(hint: Any) -> Any:
    """Return the type in ``type | None``."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(option for option in get_args(hint) if option is not type(None))
    return hint


def _meanings(cls: type) -> dict[str, str]:
    """Read field → meaning from the ``Attributes:`` sections of a class and its bases."""
    meanings: dict[str, str] = {}
    for base in cls.__mro__:
        entries = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        for entry in re.split(r"\n(?=    \S)", entries):
            name, _, text = " ".join(entry.split()).partition(": ")
            meanings.setdefault(name, text)
    return meanings


def nearest(value: str, known: list[str]) -> str:
    """Return ``did you mean …?`` where one of the known values is close, else nothing."""
    close = difflib.get_close_matches(str(value), known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}? " if close else ""


def check_same_arguments(now: dict[str, str], then: dict[str, str], state: Any) -> None:
    """Refuse to resume with other decisive arguments than those with which the state was written.

    Raises:
        RecipeError: With the first argument that differs.
    """
    for key, value in now.items():
        if then.get(key) != value:
            raise RecipeError(
                f"{state} was written with --{key} {then.get(key)}, this run has {value}; give the same, or "
                "choose another --output_dir."
            )
