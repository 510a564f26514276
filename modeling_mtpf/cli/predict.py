"""``mtpf predict``: apply apps to texts from files or a pipe, one line of JSON for each, as a stream."""

import codecs
import json
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError, MtpfError
from ..settings import POSITIONAL, REPEATED, read_settings

JSON_SUFFIXES = (".jsonl", ".ndjson")

EXAMPLES = """\
  echo "Call Ada in Lisbon at 5pm" | mtpf predict --adapter apps/entities --backbone runs/demo/backbone
  mtpf predict --adapter me/entities --adapter me/intent messages.txt > results.jsonl
  mtpf predict --adapter me/intent@1f0c3b2 --column body mails.jsonl | jq .results.intent.label | sort
  tail -f chat.log | mtpf predict --adapter me/intent --lines_ahead 1

Input is one text a line; a file that ends in .jsonl holds objects, of which --column names the text. Output
is one line of JSON a text, in order: {"text": ..., "results": {APP: ...}}, for a NER app a list of
{"entity_group", "score", "word", "start", "end"}, for a TC app {"label", "score"}."""


@dataclass(kw_only=True)
class PredictSettings:
    """Texts, apps and their backbone.

    Attributes:
        files: Texts, one a line, or .jsonl; standard input by default, also written ``-``.
        adapter: An app: a folder, or owner/name or owner/name@revision; several times for several apps.
        backbone: A folder or owner/name; by default the one that the first app was trained on, at its commit.
        backbone_revision: Commit, tag or branch of the backbone's repo; main by default.
        column: Key of the text in .jsonl.
        lines_ahead: Lines read before results come; more is faster, 1 answers at once.
    """

    files: list[str] = field(default_factory=list, metadata=POSITIONAL)
    adapter: list[str] = field(metadata=REPEATED)
    backbone: str | None = None
    backbone_revision: str | None = None
    column: str = "text"
    lines_ahead: int = 1024

    def __post_init__(self):
        if self.lines_ahead < 1:
            raise MtpfError(f"--lines_ahead is {self.lines_ahead}; it must be at least 1.")
        self.files = self.files or ["-"]
        for name in self.files:
            if name != "-" and not Path(name).is_file():
                raise DataError(f"There is no file {name}; give files of texts, or - for standard input.")


def run(arguments: list[str], prog: str) -> None:
    """Write the results of all lines to standard output.

    Raises:
        MtpfError: A file, line or app cannot be used; the lines before it have their results.
    """
    settings = read_settings(PredictSettings, arguments, prog, __doc__, EXAMPLES)
    model, adapters = _load(settings)
    from tqdm import tqdm

    if "-" in settings.files and sys.stdin.isatty():
        sys.stderr.write("Reading texts from the terminal, one a line; end with Ctrl-D\n")
    waiting: deque[str] = deque()  # texts whose results have not come yet
    faults: list[MtpfError] = []

    def texts() -> Iterator[str]:
        try:
            for text in _texts(settings):
                waiting.append(text)
                yield text
        except MtpfError as error:
            faults.append(error)  # raised below, when the texts before it have their results

    # In UTF-8 a lone surrogate becomes the escape of JSON; other encodings get escapes throughout.
    escaped = codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"
    try:
        results = model.predict_stream(texts(), adapters, portion=settings.lines_ahead)
        # A bar only where the terminal shows nothing else.
        for row in tqdm(results, unit=" texts", disable=not sys.stderr.isatty() or sys.stdout.isatty()):
            line = {"text": waiting.popleft(), "results": row}
            sys.stdout.write(json.dumps(line, ensure_ascii=escaped) + "\n")
            if not waiting:
                sys.stdout.flush()
    except MtpfError:
        raise
    except ValueError as error:  # a text that is too long, a tokenizer that cannot be read
        raise MtpfError(str(error)) from error
    if faults:
        raise faults[0]


def _load(settings: PredictSettings) -> tuple[Any, list[str]]:
    """Load the backbone and all apps; return the model and the apps' names in it."""
    import transformers

    from ..data.backbones import load_backbone
    from ..model.adapter_files_mtpf import find_adapter, read_task

    transformers.utils.logging.disable_progress_bar()
    sources = [_split_revision(source) for source in settings.adapter]
    backbone, revision = settings.backbone, settings.backbone_revision
    if backbone is None:
        recorded = read_task(find_adapter(*sources[0])).get("backbone") or {}
        backbone, revision = recorded.get("id"), revision or recorded.get("revision")
        if not backbone:
            raise MtpfError(f"{sources[0][0]} records no published backbone; give one with --backbone.")
    model = load_backbone(backbone, revision).eval()
    names = []
    for source, at in sources:
        names.append(model.load_adapter(source, revision=at))
        if names[-1] not in model.heads:
            raise MtpfError(f"{source} is a family's LoRA, not an app: it has no head; fit an app on it.")
    return model, names


def _split_revision(source: str) -> tuple[str, str | None]:
    name, _, revision = source.partition("@")
    return (source, None) if Path(source).is_dir() or not (name and revision) else (name, revision)


def _texts(settings: PredictSettings) -> Iterator[str]:
    for name in settings.files:
        if name == "-":
            yield from _lines(sys.stdin.buffer, "standard input", None)
            continue
        try:
            with open(name, "rb") as file:
                yield from _lines(file, name, settings.column if name.endswith(JSON_SUFFIXES) else None)
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror}.") from error


def _lines(file: BinaryIO, name: str, column: str | None) -> Iterator[str]:
    from ..model.texts_mtpf import MAX_CHARACTERS

    for number, line in enumerate(file, 1):
        where = f"{name}, line {number}"
        try:
            text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not UTF-8: {error.reason}.") from error
        if column is not None:
            if not text.strip():
                continue
            text = _field(text, column, where)
        if len(text) > MAX_CHARACTERS:
            raise DataError(f"{where} has {len(text):,} characters; at most {MAX_CHARACTERS:,} are accepted.")
        yield text


def _field(text: str, column: str, where: str) -> str:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict) or column not in row:
        known = f"; it has: {', '.join(row)}" if isinstance(row, dict) else ""
        raise DataError(f"{where} has no {column!r}{known}. Choose one with --column.")
    if not isinstance(row[column], str):
        raise DataError(f"{where}: {column!r} is {type(row[column]).__name__}, not a string.")
    return row[column]
