"""The command ``mtpf predict``: texts from files or a pipe, one line of JSON for each, as a stream."""

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError, MtpfError
from ..model.adapter_files_mtpf import find_adapter, read_task
from ..model.texts_mtpf import MAX_CHARACTERS

LINES_AHEAD = 1024
JSON_SUFFIXES = (".jsonl", ".ndjson")

EXAMPLES = """\
input is one text a line; a file that ends in .jsonl holds objects, of which --column names the text. Output
is one line of JSON a text, in order: {"text": ..., "results": {APP: ...}}, for a NER app a list of
{"entity_group", "score", "word", "start", "end"}, for a TC app {"label", "score"}.

examples:
  echo "Call Ada in Lisbon at 5pm" | mtpf predict --adapter apps/entities --backbone runs/demo/backbone
  mtpf predict --adapter me/entities --adapter me/intent messages.txt > results.jsonl
  mtpf predict --adapter me/intent@1f0c3b2 --column body mails.jsonl | jq .results.intent.label | sort
  tail -f chat.log | mtpf predict --adapter me/intent --lines_ahead 1
"""


def add_predict_parser(commands: Any) -> None:
    """Add the command to the parser of ``mtpf``."""
    parser = commands.add_parser(
        "predict",
        help="apply apps to texts, one line of JSON a text",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        help="texts, one a line, or .jsonl (default: standard input)",
    )
    parser.add_argument(
        "--adapter",
        metavar="ID",
        action="append",
        required=True,
        dest="adapters",
        help="an app: a folder, or owner/name or owner/name@revision; several times for several apps",
    )
    parser.add_argument(
        "--backbone",
        metavar="ID",
        help="a folder or owner/name (default: the one that the first app was trained on, at its commit)",
    )
    parser.add_argument(
        "--backbone_revision", metavar="SHA", help="commit, tag or branch of --backbone (default: main)"
    )
    parser.add_argument(
        "--column", default="text", metavar="NAME", help="key of the text in .jsonl (default: %(default)s)"
    )
    parser.add_argument(
        "--lines_ahead",
        type=int,
        default=LINES_AHEAD,
        metavar="N",
        help="lines read before results come; more is faster, 1 answers at once (default: %(default)s)",
    )
    parser.set_defaults(run=predict_command)


def predict_command(arguments: argparse.Namespace) -> None:
    """Write the results of all lines to standard output.

    Raises:
        MtpfError: A file, line or app cannot be used.
        AdapterError: Likewise.
    """
    if arguments.lines_ahead < 1:
        raise MtpfError(f"--lines_ahead is {arguments.lines_ahead}; it must be at least 1.")
    names = arguments.files or ["-"]
    for name in names:
        if name != "-" and not Path(name).is_file():
            raise DataError(f"There is no file {name}; give files of texts, or - for standard input.")
    model, adapters = _load(arguments)
    if "-" in names and sys.stdin.isatty():
        sys.stderr.write("mtpf: reading texts from the terminal, one a line; end with Ctrl-D\n")
    waiting: deque[str] = deque()  # texts whose results have not come yet
    faults: list[MtpfError] = []
    texts = _remember(_until_fault(_texts(names, arguments.column), faults), waiting)
    try:
        results = model.predict_stream(texts, adapters, portion=arguments.lines_ahead)
        for row in _with_progress(results):
            line = {"text": waiting.popleft(), "results": row}
            sys.stdout.write(_as_json(line) + "\n")
            sys.stdout.flush() if not waiting else None
        if faults:
            raise faults[0]
    except MtpfError:
        raise
    except ValueError as error:  # a text that is too long, a tokenizer that cannot be read
        raise MtpfError(str(error)) from error
    finally:
        _flush()


def _until_fault(texts: Iterator[str], faults: list[MtpfError]) -> Iterator[str]:
    """Yield texts up to the first that cannot be read: those before it still get their results."""
    try:
        yield from texts
    except MtpfError as error:
        faults.append(error)


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        pass  # the next write or the end of the command tells


def _load(arguments: argparse.Namespace) -> tuple[Any, list[str]]:
    """Load the backbone and all apps; return the model and the apps' names in it."""
    import transformers

    from ..data.backbones import load_backbone

    transformers.utils.logging.disable_progress_bar()
    sources = [_split_revision(source) for source in arguments.adapters]
    backbone, revision = arguments.backbone, arguments.backbone_revision
    if backbone is None:
        recorded = read_task(find_adapter(*sources[0])).get("backbone") or {}
        backbone, revision = recorded.get("id"), revision or recorded.get("revision")
        if not backbone:
            raise MtpfError(f"{sources[0][0]} records no published backbone; give one with --backbone.")
    model = load_backbone(backbone, revision).eval()
    names: list[str] = []
    for source, at in sources:
        name = model.load_adapter(source, revision=at)
        if name not in model.heads:
            raise MtpfError(f"{source} is a family's LoRA, not an app: it has no head; fit an app on it.")
        model.merge_tail(name)
        names.append(name)
    return model, names


def _split_revision(source: str) -> tuple[str, str | None]:
    if Path(source).is_dir():
        return source, None
    name, at, revision = source.partition("@")
    return (name, revision) if at and revision else (source, None)


def _texts(names: list[str], column: str) -> Iterator[str]:
    for name in names:
        if name == "-":
            yield from _lines(sys.stdin.buffer, "standard input", None)
            continue
        try:
            with open(name, "rb") as file:
                yield from _lines(file, name, column if name.endswith(JSON_SUFFIXES) else None)
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror}.") from error


def _lines(file: BinaryIO, name: str, column: str | None) -> Iterator[str]:
    """Yield the texts of a file.

    Raises:
        DataError: A line is not UTF-8, or no JSON object with a string in the column.
    """
    for number, line in enumerate(file, 1):
        place = f"{name}, line {number}"
        try:
            text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DataError(f"{place} is not UTF-8: {error.reason}.") from error
        if column is not None and not text.strip():
            continue
        text = text if column is None else _field(text, column, place)
        if len(text) > MAX_CHARACTERS:
            raise DataError(
                f"{place} has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read at once."
            )
        yield text


def _field(text: str, column: str, place: str) -> str:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is no JSON: {error}") from error
    if not isinstance(row, dict) or column not in row:
        known = f"; it has: {', '.join(row)}" if isinstance(row, dict) else ""
        raise DataError(f"{place} has no {column!r}{known}. Choose one with --column.")
    if not isinstance(row[column], str):
        raise DataError(f"{place}: {column!r} is {type(row[column]).__name__}, not a string.")
    return row[column]


def _remember(texts: Iterator[str], waiting: deque[str]) -> Iterator[str]:
    for text in texts:
        waiting.append(text)
        yield text


def _with_progress(results: Iterator[Any]) -> Iterator[Any]:
    """Show how many texts are done, where somebody watches and results go elsewhere."""
    if not sys.stderr.isatty() or sys.stdout.isatty():
        return results
    from tqdm import tqdm

    return iter(tqdm(results, unit=" texts"))


def _as_json(line: dict[str, Any]) -> str:
    """Write as readable JSON; a lone surrogate, which is no UTF-8, makes its line all escapes."""
    found = json.dumps(line, ensure_ascii=False)
    try:
        found.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(line)
    return found


__all__ = ["add_predict_parser", "predict_command"]
