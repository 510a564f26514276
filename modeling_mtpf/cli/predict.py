"""``mtpf predict``: apply apps to texts from files or a pipe, one line of JSON for each, as a stream."""

import codecs
import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import DataError, MtpfError, require_extra
from ..model.packaged_mtpf import PACKAGED
from ..settings import POSITIONAL, REPEATED, nearest, read_settings

EXAMPLES = """\
  echo "Call Ada in Lisbon at 5pm" | mtpf predict --adapter apps/entities --backbone runs/demo/backbone
  mtpf predict --adapter me/entities --adapter me/intent messages.txt > results.jsonl
  mtpf predict --adapter me/intent@1f0c3b2 --column body mails.jsonl | jq .results.intent.label | sort
  tail -f chat.log | mtpf predict --adapter me/intent --lines_ahead 1
  mtpf predict --engine ray --adapter me/intent mails/ --output_dir results --workers 8

Input is one text a line (labels of fastText are left out), or a table (.csv, .tsv), JSON (.jsonl, .ndjson,
.json) or Parquet, of which --column names the text, or CoNLL (.conll, .bio, ...), whose words are joined; all
but Parquet may be packed (.gz). Output is one line of JSON a text, in order:
{"text": ..., "results": {APP: ...}}, for a NER app a list of {"entity_group", "score", "word", "start",
"end"}, for a TC app {"label", "score"}, with --in_scope also "in_scope", with
--top_k or of a multi-label app a list of them. With --format label-studio it is a list of tasks with
predictions, for a project whose controls are named label (Labels) and choice (Choices), and its text text."""

FORMATS = ("jsonl", "label-studio")
ENGINES = ("torch", "ray")
PRECISIONS = ("float32", "bf16", "auto")


@dataclass(kw_only=True)
class PredictSettings:
    """Texts, apps and their backbone.

    Attributes:
        files: Texts, one a line, tables, JSON, Parquet or CoNLL; standard input by default, also written
            ``-``.
        adapter: An app: a folder, or owner/name or owner/name@revision; several times for several apps. A
            bundle gives the results of all its parts, apps/both/intent or owner/both/intent those of one.
        backbone: ``packaged``, a folder or owner/name; by default the one that the first app was
            fitted on: its commit on the Hub, or the packaged encoder.
        backbone_revision: Commit, tag or branch of the backbone's repo; main by default.
        column: Column of the text; by default text or another usual name. Of tables without names and of
            CoNLL files its number.
        encoding: Of the files, e.g. latin-1; by default that of the byte order mark, else UTF-8.
        format: ``jsonl``, or ``label-studio`` for pre-annotated tasks.
        top_k: Labels of a TC app, as a list; 1 gives the best alone, 0 a list of all.
        threshold: Leave out entities and labels with a lower score; a single label becomes null. By default
            0, and 0.5 for multi-label apps.
        in_scope: Also say of each text whether it is about anything that a TC app was fitted on.
        precision: ``float32``, ``bf16`` (less exact, half the memory), or ``auto``: bf16 where the processor
            is fast at it. Scores that apps were printed with are those of float32.
        lines_ahead: Lines read before results come; more is faster, 1 answers at once.
        engine: ``torch`` in this process, or ``ray``: the files of folders in parallel, on a cluster where
            RAY_ADDRESS names one.
        output_dir: With ray: folder for the results of each file; those that exist are kept.
        workers: With ray: files at once.
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
    in_scope: bool = False
    precision: str = "float32"
    lines_ahead: int = 1024
    engine: str = "torch"
    output_dir: str | None = None
    workers: int = 2

    def __post_init__(self):
        if self.lines_ahead < 1:
            raise MtpfError(f"--lines_ahead is {self.lines_ahead}; it must be at least 1.")
        if self.top_k < 0:
            raise MtpfError(f"--top_k is {self.top_k}; it must be at least 1, or 0 for all labels.")
        if self.top_k != 1 and (self.in_scope or self.format == "label-studio"):
            what = "--in_scope" if self.in_scope else "--format label-studio"
            raise MtpfError(f"{what} belongs to a text's best label; leave out --top_k.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise MtpfError(f"--threshold is {self.threshold}; it must be from 0 to 1.")
        choices = {"engine": ENGINES, "format": FORMATS, "precision": PRECISIONS}
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                hint = nearest(value, list(allowed))
                raise MtpfError(f"--{name} is {value!r}; {hint}choose one of: {', '.join(allowed)}.")
        if self.engine == "ray":
            if self.output_dir is None or not self.files or self.workers < 1:
                raise MtpfError(
                    "With --engine ray give files or folders, --output_dir, and --workers of at least 1."
                )
            return
        if self.output_dir is not None:
            raise MtpfError("--output_dir belongs to --engine ray; redirect the output: > results.jsonl")
        self.files = self.files or ["-"]
        for name in self.files:
            if name != "-" and not Path(name).is_file():
                raise DataError(f"There is no file {name}; give files of texts, or - for standard input.")


def run(arguments: list[str], prog: str) -> str | None:
    """Write the results of all lines to standard output, or with Ray those of each file to a file.

    Raises:
        MtpfError: A file, line or app cannot be used; the lines before it have their results.
    """
    settings = read_settings(PredictSettings, arguments, prog, __doc__, EXAMPLES)
    if settings.engine == "ray":
        require_extra("ray", "ray")
        from ..serving.ray import predict_files

        # Workers start in a folder of their own.
        absolute = [_absolute(source) for source in settings.adapter]
        backbone = settings.backbone and (
            os.path.abspath(settings.backbone) if Path(settings.backbone).exists() else settings.backbone
        )
        there = replace(settings, adapter=absolute, backbone=backbone)
        output = Path(str(settings.output_dir)).resolve()
        return predict_files(settings.files, output, partial(_file_lines, there), settings.workers)
    model, adapters = _load(settings)
    _write_lines(settings, model, adapters)
    return None


def _file_lines(settings: PredictSettings) -> Callable[[str], Iterator[str]]:
    """Load the apps once; return what yields the lines of a file's results."""
    model, adapters = _load(settings)

    def lines(file: str) -> Iterator[str]:
        texts, rest = itertools.tee(_texts(replace(settings, engine="torch", output_dir=None, files=[file])))
        return _output(
            zip(rest, _results(settings, model, adapters, texts), strict=True), settings.format, False
        )

    return lines


def _results(
    settings: PredictSettings, model: Any, adapters: list[str], texts: Iterable[str]
) -> Iterator[Any]:
    options = {"portion": settings.lines_ahead, "threshold": settings.threshold}
    options["in_scope"] = settings.in_scope
    return model.predict_stream(texts, adapters, top_k=settings.top_k or None, **options)


def _write_lines(settings: PredictSettings, model: Any, adapters: list[str]) -> None:
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
        results = _results(settings, model, adapters, texts())
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
    from ..model.adapter_files_mtpf import find_adapter
    from ..model.delta_mtpf import is_delta

    sources = [_split_source(source) for source in settings.adapter]
    revision = settings.backbone_revision
    model = open_model(settings.backbone, revision, sources[0][:2], settings.precision)
    names: list[str] = []
    loaded: dict[tuple[str, str | None], str] = {}
    for source, at, part in sources:
        alone = is_delta(find_adapter(source, at))
        if (source, at) not in loaded:
            loaded[source, at] = model.load_adapter(source, revision=at, standalone=alone)
        name = loaded[source, at]
        known = {} if alone else model.parts(name)
        if not known and not alone:
            raise MtpfError(f"{source} is a family's LoRA, not an app: it has no head; fit an app on it.")
        names.append(f"{name}/{part}" if part else name)
        if part and names[-1] not in known:
            parts = ", ".join(key.partition("/")[2] for key in known if "/" in key) or "none, it is one app"
            raise MtpfError(f"{source} has no part {part!r}; it has: {parts}.")
    return model, names


def open_model(
    backbone: str | None,
    revision: str | None,
    app: tuple[str, str | None] | None,
    precision: str = "float32",
    device: str = "cpu",
) -> Any:
    """Load a backbone; where none is named, the one that an app (source, revision) was fitted on."""
    import torch
    import transformers

    from ..data.backbones import load_backbone
    from ..devices import weights_dtype
    from ..model.adapter_files_mtpf import find_adapter, read_task

    transformers.utils.logging.disable_progress_bar()
    model = None
    if backbone is None and app is not None:
        recorded = read_task(find_adapter(*app)).get("backbone") or {}
        backbone, revision = recorded.get("id"), revision or recorded.get("revision")
        model = None if backbone else _packaged(recorded.get("sha256"))
        if not backbone and model is None:
            raise MtpfError(f"{app[0]} records no published backbone; give one with --backbone.")
    model = model or load_backbone(str(backbone), revision)
    return model.to(dtype=weights_dtype(torch.device(device), precision)).eval()  # type: ignore[call-arg]


def _absolute(source: str) -> str:
    """Return an app's source, part and revision included, as another folder's process finds it."""
    whole, revision, part = _split_source(source)
    if not Path(whole).exists():
        return source
    return "/".join(filter(None, [os.path.abspath(whole), part])) + (f"@{revision}" if revision else "")


def _split_source(source: str) -> tuple[str, str | None, str | None]:
    """Return folder or Hub id, revision, and the part of a bundle, from ``source[/part][@revision]``."""
    from ..model.sources_mtpf import split_revision

    name, revision = split_revision(source)
    whole, _, part = name.rpartition("/")
    folder = (Path(whole) / "task.json").is_file()
    if not Path(name).is_dir() and (folder or (whole.count("/") == 1 and not Path(whole).parent.is_dir())):
        return whole, revision, part
    return name, revision, None


def _packaged(sha256: str | None) -> Any:
    """Load the packaged encoder if it is installed and has this identity."""
    from ..data.backbones import load_backbone
    from ..model.adapter_files_mtpf import backbone_sha256

    with suppress(MtpfError):
        model = load_backbone(PACKAGED)
        return model if backbone_sha256(model.backbone) == sha256 else None


def _texts(settings: PredictSettings) -> Iterator[str]:
    from ..data.texts import read_text_lines, read_texts

    for name in settings.files:
        if name == "-":
            yield from read_text_lines(sys.stdin.buffer, "standard input", settings.encoding)
        else:
            yield from read_texts(name, settings.column, settings.encoding)
