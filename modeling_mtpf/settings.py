"""Typed settings: dataclasses filled from YAML and from the command line, and the parser of every command.

Options, help and checks follow from the fields and their ``Attributes:`` section, on top of argparse.
(tyro 1.0 was tried: it reads no YAML, and reports a mistake as a box that only a private hook can change.)
"""

import argparse
import difflib
import inspect
import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from .errors import RecipeError

POSITIONAL = {"form": "positional"}
"""Metadata of a field that is given without its name."""

REPEATED = {"form": "repeated"}
"""Metadata of a list that takes one value each time its option is given: positional values may follow it."""

COMMAS = {"form": "commas"}
"""Metadata of a text with commas between its parts, which may also be given as several values."""

Sections = dict[str, dict[str, type]]
"""Field that holds named dataclasses → name → the dataclass, e.g. the families of a recipe."""

_READABLE: dict[Any, tuple[type, ...]] = {float: (int, str), int: (str,)}  # YAML reads 5e-5 as text
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message[0].upper()}{message[1:]}; {self.prog} --help lists all.")


def parse(
    cls: type,
    arguments: list[str],
    *,
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
    positional = " ".join(f.name.upper() for f in fields(cls) if f.metadata.get("form") == "positional")
    parser = _Parser(
        prog=prog,
        description=description,
        usage=f"%(prog)s {positional} [--KEY VALUE ...]",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    switches = set()
    for key, field, hint, meaning in _options(cls, sections or {}):
        if hint is bool:
            switches.add(key)
        _add_option(parser, key, field, hint, meaning)
    known = [option for action in parser._actions for option in action.option_strings]
    given = vars(parser.parse_args(list(_regular(arguments, known, switches))))
    values: dict[str, Any] = {}
    for key, value in given.items():
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
        inner: dict[str, Any] | None = {"": hint} if is_dataclass(hint) else sections.get(key)
        if inner is None:
            yield key, field, hint, meanings.get(field.name, "")
        for name, settings in (inner or {}).items():
            yield from _options(settings, sections, f"{key}.{name}.".replace("..", "."))


def _add_option(parser: _Parser, key: str, field: Field, hint: Any, meaning: str) -> None:
    form, several = field.metadata.get("form"), get_origin(hint) is list
    needed = field.default is MISSING and field.default_factory is MISSING
    default = None if needed or field.default is MISSING else field.default
    shown = (
        "" if default in (None, "") else f" (default: {str(default).lower() if hint is bool else default})"
    )
    options: dict[str, Any] = {"help": (meaning.replace("``", "") + shown).replace("%", "%%")}
    options["metavar"] = "true|false" if hint is bool else (get_args(hint) or (hint,))[0].__name__.upper()
    if form == "positional":
        options["metavar"] = field.name.upper()
        parser.add_argument(key, nargs="*" if several else None if needed else "?", **options)
        return
    if form == "repeated":
        options["action"] = "append"
    elif several or form == "commas":
        options |= {"nargs": "+", "action": "extend"}
    parser.add_argument(f"--{key}", required=needed, **options)


def _regular(arguments: Iterable[str], known: list[str], switches: set[str]) -> Iterator[str]:
    """Yield arguments as argparse wants them: known keys with ``_``, ``--key=true``, ``--key=-1``."""
    waiting = ""  # a key whose value may be the next argument
    for argument in arguments:
        is_key = argument.startswith("--") and argument != "--"
        if waiting:
            if waiting[2:] in switches:
                joined = not is_key and argument.lower() in _TRUTH
                yield f"{waiting}={argument if joined else 'true'}"
            else:
                # argparse reads -1 as a value, but takes -1,-7 and -5e-4 for options
                joined = bool(re.match(r"-[\d.]", argument)) and not re.fullmatch(r"-\d+|-\d*\.\d+", argument)
                yield f"{waiting}={argument}" if joined else waiting
            waiting = ""
            if joined:
                continue
        if not is_key:
            yield argument
            continue
        key, equals, value = argument.partition("=")
        key = "--" + key[2:].replace("-", "_")
        if key not in known:
            raise RecipeError(f"Unknown argument {key}; {nearest(key, known)}--help lists all.")
        if equals:
            yield f"{key}={value}"
        else:
            waiting = key
    if waiting:
        yield f"{waiting}=true" if waiting[2:] in switches else waiting


def read_settings(cls: type, arguments: list[str], **described: Any) -> Any:
    """Build a settings dataclass from a command line; see `parse` for the arguments.

    Raises:
        MtpfError: An unknown or missing key, or a value that is not accepted.
    """
    return build(cls, parse(cls, arguments, **described))


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
    hints, known, built = get_type_hints(cls), {f.name: f for f in fields(cls)}, {}
    for key, value in values.items():
        dotted = f"{path}.{key}" if path else str(key)
        if key not in known:
            close = nearest(dotted, [f"{path}.{name}" if path else name for name in known])
            raise RecipeError(f"Unknown key {dotted!r}; {close}Known here: {', '.join(sorted(known))}.")
        if dotted in (sections or {}) and isinstance(value, dict):
            classes = (sections or {})[dotted]
            built[key] = {
                name: build(classes[name], inner or {}, f"{dotted}.{name}") for name, inner in value.items()
            }
        else:
            built[key] = _convert(hints[key], value, dotted, known[key].metadata.get("form"))
    return cls(**built)


def _convert(hint: Any, value: Any, path: str, form: str | None = None) -> Any:
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
    if form == "commas" and isinstance(value, list):
        value = ",".join(map(str, value))
    if hint is bool and str(value).lower() in _TRUTH:
        return _TRUTH[str(value).lower()]
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # a folder or a commit of digits only
    if not isinstance(value, bool) and isinstance(value, _READABLE.get(hint, ())):
        try:
            return hint(value)
        except ValueError:
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
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
    close = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


def check_same_arguments(now: dict[str, str], then: dict[str, str], state: Any) -> None:
    """Refuse to resume with different arguments.

    Args:
        now: The decisive arguments of this run.
        then: Those of the run that is resumed.
        state: Where its state is, for the message.

    Raises:
        RecipeError: With the first argument that differs.
    """
    for key, value in now.items():
        if then.get(key) != value:
            raise RecipeError(
                f"{state} was written with --{key} {then.get(key)}, this run has {value}; give the same, or "
                "choose another --output_dir."
            )
