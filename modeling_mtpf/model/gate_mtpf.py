"""Read files that someone else wrote: rules for JSON, and the headers of safetensors, in bounded memory.

`schemas_mtpf` has the table of each file. Nothing here imports torch or reads a tensor.
"""

import json
import math
import re
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .errors_mtpf import MtpfError, first_line

MAX_DEPTH = 32
MAX_HEADER_BYTES = 25_000_000
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types of weights; integers would be read as numbers without an error."""

_CONTROL = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_HIDDEN = re.compile(f"[{_CONTROL}]")
_NOT_ONE_LINE = re.compile(f"[{_CONTROL}\t\n\r]")


# --------------------------------------------------------------------------------------------------- rules


class Rule(NamedTuple):
    """What a value must be, in words and as a test."""

    accepts: str
    fits: Callable[[Any], bool]


def whole(low: int, high: int) -> Rule:
    """Accept whole numbers; ``True`` is none."""
    return Rule(f"a whole number from {low:,} to {high:,}", lambda v: type(v) is int and low <= v <= high)


def number(low: float, high: float) -> Rule:
    """Accept finite numbers."""
    return Rule(f"a number from {low:g} to {high:g}", lambda v: type(v) in (int, float) and low <= v <= high)


def one_of(*values: Any) -> Rule:
    """Accept these values."""
    names = ", ".join(map(repr, values))
    return Rule(names, lambda v: any(type(v) is type(value) and v == value for value in values))


def matching(pattern: str, accepts: str) -> Rule:
    """Accept strings that match a pattern of ours."""
    return Rule(accepts, lambda v: isinstance(v, str) and re.fullmatch(pattern, v) is not None)


def list_of(rule: Rule, most: int) -> Rule:
    """Accept lists."""
    accepts = f"a list of at most {most:,}, each {rule.accepts}"
    return Rule(accepts, lambda v: isinstance(v, list) and len(v) <= most and all(map(rule.fits, v)))


def object_of(rule: Rule, most: int, keys: Rule | None = None) -> Rule:
    """Accept objects."""
    return Rule(
        f"an object of at most {most:,} entries, each {rule.accepts}",
        lambda v: (
            isinstance(v, dict)
            and len(v) <= most
            and all(map(rule.fits, v.values()))
            and (keys is None or all(map(keys.fits, v)))
        ),
    )


def record(**keys: Rule) -> Rule:
    """Accept objects that have these keys, among others."""
    return Rule(
        f"an object with {', '.join(f'{key} ({rule.accepts})' for key, rule in keys.items())}",
        lambda v: isinstance(v, dict) and all(key in v and keys[key].fits(v[key]) for key in keys),
    )


def either(*rules: Rule) -> Rule:
    """Accept what one of the rules does."""
    return Rule(" or ".join(rule.accepts for rule in rules), lambda v: any(rule.fits(v) for rule in rules))


NONE = Rule("null", lambda v: v is None)
FLAG = Rule("true or false", lambda v: isinstance(v, bool))
ANYTHING = Rule("anything", lambda v: True)
LINE = Rule(
    "one line of at most 256 characters",
    lambda v: isinstance(v, str) and len(v) <= 256 and not _NOT_ONE_LINE.search(v),
)
SCALAR = either(NONE, FLAG, number(-1e18, 1e18), LINE)


@dataclass(frozen=True)
class Schema:
    """One kind of JSON file.

    Attributes:
        file: Its name.
        keys: Key → what is accepted. Other keys follow ``others``.
        error: What to raise.
        max_bytes: Its size.
        max_entries: Values and containers in it, which take up to a hundred bytes each.
        others: For all other keys.
    """

    file: str
    keys: Mapping[str, Rule]
    error: type[MtpfError] = MtpfError
    max_bytes: int = 1_000_000
    max_entries: int = 50_000
    others: Rule = ANYTHING

    def read(self, folder: Path, where: str) -> dict[str, Any]:
        """Read and check the file of a folder; raise ``error`` for a missing or damaged one."""
        value = read_json(folder / self.file, self.max_bytes, self.max_entries, self.error)
        self.check(value, where)
        return value

    def check(self, value: Mapping[str, Any], where: str = "") -> None:
        """Raise ``error`` for the first value that is not accepted."""
        for key, item in value.items():
            rule = self.keys.get(key, self.others)
            if not rule.fits(item):
                raise self.error(
                    f"{where}{key!r} in {self.file} is {shortened(item)}; it must be {rule.accepts}."
                )


def shortened(value: Any) -> str:
    """Return a value as Python writes it, without control characters and of bounded length."""
    text = repr(value) if not isinstance(value, (list, dict)) or len(value) < 100 else f"{len(value):,} items"
    text = printable(text)
    return text if len(text) <= 120 else f"{text[:100]}…"


def printable(text: str) -> str:
    r"""Replace what a terminal would obey or hide by its escape.

    Example:
        >>> printable("a\x1b[31m")
        'a\\u001b[31m'
    """
    return _HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


# ---------------------------------------------------------------------------------------------------- JSON


def parse_json(data: bytes, max_entries: int, *, shallow: bool = False) -> dict[str, Any]:
    """Parse a JSON object in bounded memory; with ``shallow`` without visiting each value.

    Raises:
        ValueError: Not a JSON object in UTF-8; too many entries, a key twice, a number that is not finite,
            control characters, or nested too deep.
    """
    entries = sum(map(data.count, (b",", b"[", b"{")))
    if entries > max_entries:
        raise ValueError(f"it has {entries:,} entries, more than the {max_entries:,} that are read")
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=with_unique_keys, parse_constant=_refuse_constant
        )
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(value, dict):
        raise ValueError("it must hold a JSON object")
    if not shallow:
        check_values(value)
    return value


def with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of JSON with these entries; raise `ValueError` for a key that it names twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it names {twice[:60]!r} twice")
    return value


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON; leave that entry out")


def check_values(value: Any) -> None:
    """Raise `ValueError` for what `parse_json` refuses in a value."""
    stack = [(0, value)]  # no recursion: a file may be nested as deep as its author likes
    while stack:
        depth, item = stack.pop()
        if isinstance(item, str):
            if match := _HIDDEN.search(item):
                raise ValueError(f"it holds the control character {ascii(match[0])}")
        elif isinstance(item, (float, int)):
            if not -1e38 < item < 1e38:
                raise ValueError("it holds a number that is not finite or too large")
        elif item is not None:
            if depth == MAX_DEPTH:
                raise ValueError("it is nested too deep")
            stack += [(depth + 1, inner) for inner in item]
            if isinstance(item, dict):
                stack += [(depth + 1, inner) for inner in item.values()]


def open_file(path: Path) -> BinaryIO:
    """Open a file, which may be a link to one; a pipe or a device could deliver without end, or never."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is not a regular file")
    return path.open("rb")


def read_json(
    path: Path,
    max_bytes: int = 1_000_000,
    max_entries: int = 50_000,
    error: type[MtpfError] = MtpfError,
    **options: bool,
) -> dict[str, Any]:
    """Read a JSON object as `parse_json` does, and raise ``error`` for a file that is missing or damaged."""
    try:
        with open_file(path) as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise error(f"{path} is larger than {max_bytes / 1e6:g} MB; that is not a {path.name}.")
        return parse_json(data, max_entries, **options)
    except FileNotFoundError as reason:
        raise error(f"{path.parent} has no {path.name}.") from reason
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}.") from reason
    except MtpfError:
        raise
    except ValueError as reason:
        raise error(f"{path.parent} is damaged: {path.name} is not valid JSON: {reason}.") from reason


# ------------------------------------------------------------------------------------------------- tensors


class Tensor(NamedTuple):
    """What the header of a safetensors file says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


class Header(NamedTuple):
    """The header of a safetensors file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


def read_header(path: Path, error: type[MtpfError] = MtpfError, masks: str | None = None) -> Header:
    """Read and check the header of a safetensors file; no tensor is read.

    Bytes are accepted only for names that end with ``masks``.

    Raises:
        MtpfError: ``error``, for a file that is missing or damaged, or a type other than floating numbers.
    """
    try:
        with open_file(path) as file:
            file_size = path.stat().st_size
            size = int.from_bytes(file.read(8), "little")
            if file_size < 8 or size > min(MAX_HEADER_BYTES, file_size - 8):
                raise ValueError(f"its header has {size:,} bytes, the file {file_size:,}")
            header = parse_json(file.read(size), 1_000_000)
    except FileNotFoundError as reason:
        raise error(f"{path.parent} has no {path.name}.") from reason
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}.") from reason
    except ValueError as reason:
        raise error(f"{path} is damaged or not a safetensors file: {first_line(reason)}.") from reason
    try:
        metadata = header.pop("__metadata__", {})
        if not object_of(Rule("", lambda v: isinstance(v, str)), 1000).fits(metadata):
            raise ValueError("its metadata are not texts")
        tensors = {key: _tensor(key, entry, file_size - 8 - size, masks) for key, entry in header.items()}
        extents = sorted(entry["data_offsets"] for entry in header.values())
        if [0, *(stop for _, stop in extents)] != [*(start for start, _ in extents), file_size - 8 - size]:
            raise ValueError("its tensors overlap, or do not fill it")
    except ValueError as reason:
        raise error(f"{path} is damaged or not a safetensors file: {reason}.") from reason
    return Header(tensors, metadata)


def _tensor(key: str, entry: Any, size: int, masks: str | None) -> Tensor:
    fits = isinstance(entry, dict) and entry.keys() == _ENTRY_KEYS
    extents, numbers = list_of(whole(0, 2**40), 8), list_of(whole(0, size), 2)
    if not fits or not extents.fits(entry["shape"]) or not numbers.fits(entry["data_offsets"]):
        raise ValueError(f"the entry of {key[:80]!r} is {shortened(entry)}")
    dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    # Some stock checkpoints store the positions 0, 1, 2, ...
    width = 8 if dtype == "I64" and key.endswith("position_ids") else DTYPE_BYTES.get(str(dtype))
    width = 1 if dtype == "U8" and masks and key.endswith(masks) else width
    if width is None:
        raise ValueError(f"{key[:80]!r} has the type {shortened(dtype)}; known: {', '.join(DTYPE_BYTES)}")
    if math.prod(shape) * width != stop - start:
        raise ValueError(f"{key[:80]!r} has {stop - start:,} bytes for the shape {list(shape)} in {dtype}")
    return Tensor(dtype, shape)
