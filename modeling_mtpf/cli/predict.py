"""``mtpf predict``: apply apps to texts from files or a pipe, one line of JSON for each, as a stream."""

import codecs
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError, MtpfError
from ..model.packaged_mtpf import PACKAGED
from ..settings import POSITIONAL, REPEATED, nearest, read_settings

EXAMPLES = """\
  echo "Call Ada in Lisbon at 5pm" | mtpf predict --adapter apps/entities --backbone runs/demo/backbone
  mtpf predict --adapter me/entities --adapter me/intent messages.txt > results.jsonl
  mtpf predict --adapter me/intent@1f0c3b2 --column body mails.jsonl | jq .results.intent.label | sort
  tail -f chat.log | mtpf predict --adapter me/intent --lines_ahead 1

Input is one text a line, or a table (.csv, .tsv) or JSON (.jsonl, .ndjson, .json), of which --column names
the text; each may be packed (.gz). Output is one line of JSON a text, in order:
{"text": ..., "results": {APP: ...}}, for a NER app a list of {"entity_group", "score", "word", "start",
"end"}, for a TC app {"label", "score"}, with --top_k or of a multi-label app a list of them. With --format
label-studio it is a list of tasks with predictions, for a project whose controls are named label (Labels) and
choice (Choices), and its text text."""

FORMATS = ("jsonl", "label-studio")


@dataclass(kw_only=True)
class PredictSettings:
    """Texts, apps and their backbone.

    Attributes:
        files: Texts, one a line, tables or JSON; standard input by default, also written ``-``.
        adapter: An app: a folder, or owner/name or owner/name@revision; several times for several apps. A
            bundle gives the results of all its parts, apps/both/intent or owner/both/intent those of one.
        backbone: ``packaged``, a folder or owner/name; by default the one that the first app was
            fitted on: its commit on the Hub, or the packaged encoder.
        backbone_revision: Commit, tag or branch of the backbone's repo; main by default.
        column: Column of the text in tables and JSON; by default text or another usual name.
        encoding: Of the files, e.g. latin-1; by default that of the byte order mark, else UTF-8.
        format: ``jsonl``, or ``label-studio`` for pre-annotated tasks.
        top_k: Labels of a TC app, as a list; 1 gives the best alone, 0 a list of all.
        threshold: Leave out entities and labels with a lower score; a single label becomes null. By default
            0, and 0.5 for multi-label apps.
        lines_ahead: Lines read before results come; more is faster, 1 answers at once.
    """

    files: list[str] = field(default_factory=list, metadata=POSITIONAL)
    adapter: list[str] = field(metadata=REPEATED)
    backbone: str | None = None
    backbone_revision: str | None = None
    column: str | None = None
    encoding: str | None = None
    format: str = "jsonl"
    top_k: int = 1
    threshold: float | None = None
    lines_ahead: int = 1024

    def __post_init__(self):
        if self.lines_ahead < 1:
            raise MtpfError(f"--lines_ahead is {self.lines_ahead}; it must be at least 1.")
        if self.format not in FORMATS:
            hint = nearest(self.format, list(FORMATS))
            raise MtpfError(f"--format is {self.format!r}; {hint}choose one of: {', '.join(FORMATS)}.")
        if self.top_k < 0:
            raise MtpfError(f"--top_k is {self.top_k}; it must be at least 1, or 0 for all labels.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise MtpfError(f"--threshold is {self.threshold}; it must be from 0 to 1.")
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
        options = {"portion": settings.lines_ahead, "threshold": settings.threshold}
        results = model.predict_stream(texts(), adapters, top_k=settings.top_k or None, **options)
        # A bar only where the terminal shows nothing else.
        bar = tqdm(results, unit=" texts", disable=not sys.stderr.isatty() or sys.stdout.isatty())
        for line in _output(((waiting.popleft(), row) for row in bar), settings.format, escaped):
            sys.stdout.write(line)
            if not waiting:
                sys.stdout.flush()
    except MtpfError:
        raise
    except ValueError as error:  # a text that is too long, a tokenizer that cannot be read
        raise MtpfError(str(error)) from error
    if faults:
        raise faults[0]


def _output(rows: Iterable[tuple[str, dict[str, Any]]], form: str, escaped: bool) -> Iterator[str]:
    """Yield what is written for each text and its results."""
    if form == "jsonl":
        for text, results in rows:
            yield json.dumps({"text": text, "results": results}, ensure_ascii=escaped) + "\n"
        return
    from ..data.span_forms import label_studio_task

    before = "[\n"
    for text, results in rows:
        yield before + json.dumps(label_studio_task(text, results), ensure_ascii=escaped)
        before = ",\n"
    yield "[]\n" if before == "[\n" else "\n]\n"


def _load(settings: PredictSettings) -> tuple[Any, list[str]]:
    """Load the backbone and all apps; return the model and the apps' names in it."""
    import transformers

    from ..data.backbones import load_backbone
    from ..model.adapter_files_mtpf import find_adapter, read_task

    transformers.utils.logging.disable_progress_bar()
    sources = [_split_source(source) for source in settings.adapter]
    backbone, revision, model = settings.backbone, settings.backbone_revision, None
    if backbone is None:
        recorded = read_task(find_adapter(*sources[0][:2])).get("backbone") or {}
        backbone, revision = recorded.get("id"), revision or recorded.get("revision")
        model = None if backbone else _packaged(recorded.get("sha256"))
        if not backbone and model is None:
            raise MtpfError(f"{sources[0][0]} records no published backbone; give one with --backbone.")
    model = (model or load_backbone(str(backbone), revision)).eval()
    names: list[str] = []
    loaded: dict[tuple[str, str | None], str] = {}
    for source, at, part in sources:
        if (source, at) not in loaded:
            loaded[source, at] = model.load_adapter(source, revision=at)
        name = loaded[source, at]
        if not (known := model.parts(name)):
            raise MtpfError(f"{source} is a family's LoRA, not an app: it has no head; fit an app on it.")
        names.append(f"{name}/{part}" if part else name)
        if part and names[-1] not in known:
            parts = ", ".join(key.partition("/")[2] for key in known) or "none, it is one app"
            raise MtpfError(f"{source} has no part {part!r}; it has: {parts}.")
    return model, names


def _split_source(source: str) -> tuple[str, str | None, str | None]:
    """Return folder or Hub id, revision, and the part of a bundle, from ``source[/part][@revision]``."""
    if Path(source).is_dir():
        return source, None, None
    name, _, revision = source.partition("@")
    whole, _, part = name.rpartition("/")
    if (Path(whole) / "task.json").is_file() or whole.count("/") == 1 and not Path(whole).parent.is_dir():
        return whole, revision or None, part
    return (name, revision, None) if name and revision else (source, None, None)


def _packaged(sha256: str | None) -> Any:
    """Load the packaged encoder if it is installed and has this identity."""
    from ..data.backbones import load_backbone
    from ..model.adapter_files_mtpf import backbone_sha256

    with suppress(MtpfError):
        model = load_backbone(PACKAGED)
        return model if backbone_sha256(model.backbone) == sha256 else None


def _texts(settings: PredictSettings) -> Iterator[str]:
    from ..data.text_files import JSON, TABLES, ending, read_file, read_lines

    for name in settings.files:
        if name == "-":
            name = "standard input"
            yield from _column(read_lines(sys.stdin.buffer, name, settings.encoding), name, "text")
        else:
            column = settings.column if ending(name) in (*JSON, *TABLES) else "text"
            yield from _column(read_file(name, settings.encoding), name, column)


def _column(rows: Iterable[tuple[str, Any]], name: str, column: str | None) -> Iterator[str]:
    from ..data.columns import choose_column
    from ..model.texts_mtpf import MAX_CHARACTERS

    chosen = None
    for at, row in rows:
        where = f"{name}, {at}"
        if isinstance(row, dict) and isinstance(row.get("data"), dict):
            row = row["data"]  # a task of Label Studio
        if not isinstance(row, dict):
            raise DataError(f"{where} is {str(row)[:40]!r}, not an object with keys.")
        chosen = chosen or choose_column("text", row, name, {"text": column} if column else {}, "--column")
        if chosen not in row:
            raise DataError(f"{where} has no {chosen!r}; it has: {', '.join(row)}. Choose one with --column.")
        text = row[chosen]
        if not isinstance(text, str):
            raise DataError(f"{where}: {chosen!r} is {type(text).__name__}, not a string.")
        if len(text) > MAX_CHARACTERS:
            raise DataError(f"{where} has {len(text):,} characters; at most {MAX_CHARACTERS:,} are accepted.")
        yield text
