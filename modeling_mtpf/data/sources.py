"""Open the data a user names: a file, a folder of files, or a Hub data set; memory-mapped or streamed."""

import csv
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import constants

from ..errors import DataError, first_line
from ..model.sources_mtpf import find_on_hub, is_hub_id

READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}
"""File ending → packaged reader of ``datasets``. No data set script is ever run."""

BATCH_ROWS = 1000
"""Rows that a `TextStream` reads at a time."""


def _is_text(arrow_type: pa.DataType) -> bool:
    return pt.is_string(arrow_type) or pt.is_large_string(arrow_type)


def _is_list(arrow_type: pa.DataType) -> bool:
    return pt.is_list(arrow_type) or pt.is_large_list(arrow_type)


@dataclass(frozen=True)
class _Kind:
    """What a column may hold: in words, as a feature, and as a check of its Arrow type."""

    needed: str
    feature: Any
    accepts: Callable[[pa.DataType], bool]


_KINDS = {
    "text": _Kind("text", Value("string"), _is_text),
    "words": _Kind(
        "a list of words", List(Value("string")), lambda t: _is_list(t) and _is_text(t.value_type)
    ),
    "integers": _Kind(
        "a list of integers", List(Value("int32")), lambda t: _is_list(t) and pt.is_integer(t.value_type)
    ),
}


# Names


def source_files(source: str | Path, endings: Collection[str] = tuple(READERS)) -> list[Path]:
    """Return the data files of a local source in name order; a single file is itself.

    Raises:
        DataError: The folder has no data file, or the file's ending is not known.
    """
    path = Path(source)
    accepted = ", ".join(dict.fromkeys(endings))
    if path.is_file():
        if path.suffix not in endings:
            raise DataError(f"{path} has an unknown ending; accepted: {accepted}.")
        return [path]
    files = sorted(
        file
        for file in path.iterdir()
        if file.is_file()
        and file.suffix in endings
        and not file.name.startswith((".", "_"))
        and file.name not in ("clusters.json", "run.json")
    )
    if not files:
        raise DataError(f"The folder {path} has no data file; accepted endings: {accepted}.")
    return files


def source_name(source: str | Path) -> str:
    """Name a source in logs and records without its local path."""
    path = Path(source)
    return path.stem if path.exists() else str(source)


def hub_id(source: str | Path) -> tuple[str, str | None, str | None]:
    """Split ``owner/name:configuration@revision``; the last two parts may be missing.

    Raises:
        DataError: It is not a Hub id, so it must be a missing file.

    Example:
        >>> hub_id("owner/questions:pair@0a1b2c")
        ('owner/questions', 'pair', '0a1b2c')
    """
    name, _, revision = str(source).partition("@")
    repository, _, config = name.partition(":")
    if not is_hub_id(repository):
        raise DataError(
            f"There is no file or folder {source}, and it is not a Hub id of the form 'owner/name'."
        )
    return repository, config or None, revision or None


def _commit_on_hub(source: str | Path) -> str:
    repository, _, revision = hub_id(source)
    options: Any = {"what": "file or folder", "repo_type": "dataset", "error": DataError}
    return find_on_hub(repository, revision, **options).resolved


def expand_pair_sources(sources: Sequence[str | Path]) -> dict[str, str | Path]:
    """Name each pair source; a folder stands for one source per file.

    Raises:
        DataError: Two sources of the same name, or none at all.
    """
    expanded: dict[str, str | Path] = {}
    for source in sources:
        for part in source_files(source) if Path(source).is_dir() else [source]:
            name = source_name(part)
            if name in expanded:
                raise DataError(
                    f"Two pair sources are named {name!r} ({expanded[name]} and {part}); rename one."
                )
            expanded[name] = part
    if not expanded:
        raise DataError(
            "No pair source is given; set families.tc.pairs to a list of files, folders or Hub ids."
        )
    return expanded


def fingerprint(source: str | Path, dataset: Dataset | None) -> str:
    """Identify the data of a source: sha256 over its files' contents; for a Hub data set that of datasets."""
    if dataset is not None and not Path(source).exists():
        return dataset._fingerprint
    return _sha256_of_files(source_files(source))


def _sha256_of_files(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# Whole, memory-mapped


def open_source(
    source: str | Path, columns: dict[str, str], also: str | None = None, by_order: bool = False
) -> Dataset:
    """Open a source and check the columns that are needed.

    Args:
        source: A file or a folder of Parquet, JSON, JSON-lines, CSV or text files, or a Hub id, see `hub_id`
            (its split ``train``).
        columns: Column name → kind: ``text``, ``words`` (list of str) or ``integers`` (list of int).
        also: Prefix of further text columns to keep where the source has them.
        by_order: If none of the columns is there and the source has as many others, take those in order.

    Returns:
        A memory-mapped data set with just these columns.

    Raises:
        DataError: With the file, and the line or row where there is one.
    """
    path = Path(source)
    if not path.exists():
        return _checked(load_hub(source, "train"), str(source), columns, also, by_order)
    files = source_files(path)
    parts = [_open_file(file, columns, also, by_order) for file in files]
    for part, file in zip(parts, files, strict=True):
        if part.column_names != parts[0].column_names:
            names, first_names = (", ".join(d.column_names) for d in (part, parts[0]))
            raise DataError(f"{file} has the columns {names}, but other files of {path} have {first_names}.")
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def _open_file(file: Path, columns: dict[str, str], also: str | None, by_order: bool) -> Dataset:
    dataset = load_file(file)
    try:
        checked = _checked(dataset, str(file), columns, also, by_order)
        for column in checked.column_names:  # Arrow's JSON reader does not look at the encoding
            checked.data.column(column).validate(full=True)
    except DataError:
        raise
    except (pa.ArrowException, ValueError) as error:
        raise DataError(_why_unreadable(file, error)) from error
    return checked


def load_file(file: Path, text_columns: bool = False) -> Dataset:
    """Open one file with all its columns, memory-mapped.

    Args:
        file: Its ending decides the reader.
        text_columns: Read every column of a CSV file as the text in it, ``007`` and ``True`` too.

    Raises:
        DataError: It is empty or cannot be read, with the line where that can be told.
    """
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty.")
    try:
        # The Parquet reader of datasets fails on a file without rows.
        if file.suffix == ".parquet" and pq.ParquetFile(file).metadata.num_rows == 0:
            raise DataError(f"{file} has no rows.")
        options = {}
        if text_columns and file.suffix == ".csv":
            with file.open(encoding="utf-8-sig", newline="") as lines:
                options["features"] = Features({name: Value("string") for name in next(csv.reader(lines))})
        return _load([file], **options)
    except DataError:
        raise
    except (DatasetGenerationError, pa.ArrowException, ValueError, csv.Error) as error:
        raise DataError(_why_unreadable(file, error)) from error


def load_hub(source: str | Path, split: str | None = None, streaming: bool = False) -> Any:
    """Load a split of a Hub data set, or with ``None`` all of them by name; see `hub_id`.

    Raises:
        DataError: There is no such data set, the Hub cannot be reached, or only a script could read it.
    """
    repository, config, revision = hub_id(source)
    if not constants.HF_HUB_OFFLINE:
        _commit_on_hub(source)  # answers at once, where load_dataset tries again for a minute
    try:
        return load_dataset(repository, config, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # the Hub client has a dozen exception types; all mean the same to the user
        reason = first_line(error)
        if "script" in reason:
            reason += ". Scripts are never run: choose a revision in Parquet, e.g. @refs/convert/parquet."
        raise DataError(f"The Hub data set {str(source)!r} cannot be opened: {reason}") from error


def _load(files: Sequence[Path], **options: Any) -> Any:
    """Open files of one kind with their reader."""
    reader = READERS[files[0].suffix]
    if reader == "csv":
        options["keep_default_na"] = False  # "NA" is a word
    return load_dataset(reader, data_files=[str(file) for file in files], split="train", **options)


def _why_unreadable(file: Path, error: BaseException) -> str:
    if READERS[file.suffix] == "json":
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    json.loads(line.strip() or b"null")
                except (json.JSONDecodeError, UnicodeDecodeError) as fault:
                    return f"{file}, line {number} is not valid JSON: {fault}."
    root = error
    while root.__cause__ is not None or root.__context__ is not None:
        root = root.__cause__ or root.__context__  # type: ignore[assignment]
    return (
        f"{file} cannot be read as {READERS[file.suffix]}: {first_line(root).rstrip('.')}. It is truncated, "
        "damaged, or its ending is not that of its contents; fetch it again, or take it out of the source."
    )


def _checked(
    dataset: Dataset, name: str, columns: dict[str, str], also: str | None, by_order: bool
) -> Dataset:
    if len(dataset) == 0:
        raise DataError(f"{name} has no rows.")
    if by_order:
        dataset = name_by_order(dataset, list(columns))
    if also is not None:
        columns = columns | {column: "text" for column in dataset.column_names if column.startswith(also)}
    for column, kind in columns.items():
        if column not in dataset.column_names:
            raise DataError(f"{name} has no column {column!r}; it has: {', '.join(dataset.column_names)}.")
        data = dataset.data.column(column)
        if not _KINDS[kind].accepts(data.type):
            line = _line_of_other_type(Path(name), column, kind)
            raise DataError(
                f"Column {column!r} of {name}{line} holds {data.type}; {_KINDS[kind].needed} is needed."
            )
        if data.null_count:
            row = data.is_null().to_pylist().index(True)
            raise DataError(f"{name}, row {row + 1}: column {column!r} is empty.")
    dataset = dataset.select_columns(list(columns))
    # One type per kind, whatever the reader made of it: parts of a folder must fit together.
    features = Features({column: _KINDS[kind].feature for column, kind in columns.items()})
    return dataset if dataset.features == features else dataset.cast(features)


def name_by_order(dataset, columns: list[str]):
    """Name the columns of a data set, or of a stream, by their order, if none of the names is there."""
    names = dataset.column_names or []
    if len(names) != len(columns) or set(names) & set(columns):
        return dataset
    return dataset.rename_columns(dict(zip(names, columns, strict=True)))


def _line_of_other_type(file: Path, column: str, kind: str) -> str:
    """Say which line of a JSON-lines file has the first value of another type, if that can be told."""
    if not file.is_file() or READERS[file.suffix] != "json":
        return ""
    try:
        for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1):
            if line.strip() and not isinstance(json.loads(line)[column], str if kind == "text" else list):
                return f", line {number},"
    except (ValueError, KeyError, TypeError):
        pass
    return ""


# Front to back, in flat memory


def stream_source(source: str | Path) -> IterableDataset:
    """Open a source for reading from front to back, without downloading or converting it first.

    Raises:
        DataError: It cannot be opened.
    """
    path = Path(source)
    if not path.exists():
        return load_hub(source, "train", streaming=True)
    files = source_files(path)
    readers = {READERS[file.suffix] for file in files}
    if len(readers) > 1:
        raise DataError(f"{path} mixes files of {', '.join(sorted(readers))}; a stream needs one kind.")
    try:
        return _load(files, streaming=True)
    except Exception as error:  # each reader has its own exceptions
        raise DataError(f"The source {str(source)!r} cannot be streamed: {first_line(error)}") from error


@dataclass(frozen=True)
class StreamedText:
    """One row of a source.

    Attributes:
        file: File (or Hub id) that it comes from.
        row: Its row in that file, from 1.
        text: The text, or ``None`` where the column is empty.
    """

    file: str
    row: int
    text: str | None


class TextStream:
    """The texts of a source, in the same order with each iteration.

    Args:
        source: A file, or a folder of files in name order: Parquet, JSON lines, JSON, CSV or text; or a Hub
            id, see `hub_id` (its split ``train``), pinned to its commit.
        column: Column that holds the text.

    Raises:
        DataError: The source does not exist. While reading: a file is malformed, or lacks the column.
    """

    def __init__(self, source: str | Path, column: str = "text"):
        self.source, self.column = str(source), column
        self.name = source_name(source)
        self.files = source_files(source) if Path(source).exists() else []
        if not self.files:
            repository, config, _ = hub_id(source)
            self._pinned = f"{repository}{f':{config}' if config else ''}@{_commit_on_hub(source)}"

    def fingerprint(self) -> str:
        """Identify the data: sha256 over the files' contents, or the commit of the Hub data set."""
        return _sha256_of_files(self.files) if self.files else self._pinned

    def __iter__(self) -> Iterator[StreamedText]:
        parts: list[Path | None] = [*self.files] or [None]
        for file in parts:
            name = self.source if file is None else str(file)
            row = 0
            for values in self._batches(file, name):
                for text in values:
                    row += 1
                    yield StreamedText(name, row, text)

    def _batches(self, file: Path | None, name: str) -> Iterator[list[str | None]]:
        try:
            for table in self._open(file).with_format("arrow").iter(batch_size=BATCH_ROWS):
                yield self._texts(table, name)
        except DataError:
            raise
        # Each reader, and the Hub client, has its own exceptions.
        except Exception as error:
            if file is None:
                reason = f"The Hub data set {name!r} cannot be read: {first_line(error)}"
            else:
                reason = _why_unreadable(file, error)
            raise DataError(reason) from error

    def _open(self, file: Path | None) -> IterableDataset:
        if file is None:
            repository, config, commit = hub_id(self._pinned)
            return load_dataset(repository, config, revision=commit, split="train", streaming=True)
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty.")
        options = {"batch_size": BATCH_ROWS} if file.suffix == ".parquet" else {}
        return _load([file], streaming=True, **options)

    def _texts(self, table: pa.Table, name: str) -> list[str | None]:
        if self.column not in table.column_names:
            raise DataError(
                f"{name} has no column {self.column!r}; it has: {', '.join(table.column_names)}. Name the "
                "one that holds the text with --column."
            )
        values = table.column(self.column)
        if not _is_text(values.type):
            if values.null_count == len(values):
                return [None] * len(values)
            raise DataError(f"Column {self.column!r} of {name} holds {values.type}; text is needed.")
        values.validate(full=True)  # Arrow's JSON reader does not look at the encoding
        return values.to_pylist()
