"""Open a data source that a user names: a file, a folder of files, or a Hub data set, memory-mapped."""

import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..errors import DataError, first_line

READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}
"""File ending → packaged reader of ``datasets``. No data set script is ever run."""

COLUMN_TYPES: dict[str, tuple[str, Callable]] = {
    "text": ("text", lambda t: _is_text(t)),
    "words": ("a list of words", lambda t: _is_list(t) and _is_text(t.value_type)),
    "integers": ("a list of integers", lambda t: _is_list(t) and pt.is_integer(t.value_type)),
}
COLUMN_FEATURES = {
    "text": Value("string"),
    "words": List(Value("string")),
    "integers": List(Value("int32")),
}


def _is_text(arrow_type: pa.DataType) -> bool:
    return pt.is_string(arrow_type) or pt.is_large_string(arrow_type)


def _is_list(arrow_type: pa.DataType) -> bool:
    return pt.is_list(arrow_type) or pt.is_large_list(arrow_type)


def source_files(source: str | Path) -> list[Path]:
    """Return the data files of a local source in name order; a single file is itself.

    Raises:
        DataError: The folder has no data file, or the file's ending is not known.
    """
    path = Path(source)
    accepted = ", ".join(READERS)
    if path.is_file():
        if path.suffix not in READERS:
            raise DataError(f"{path} has an unknown ending; accepted: {accepted}.")
        return [path]
    files = sorted(
        file for file in path.iterdir() if file.suffix in READERS and not file.name.startswith((".", "_"))
    )
    files = [file for file in files if file.name not in ("clusters.json", "run.json")]
    if not files:
        raise DataError(f"The folder {path} has no data file; accepted endings: {accepted}.")
    return files


def open_source(
    source: str | Path, columns: dict[str, str], also: str | None = None, by_order: bool = False
) -> Dataset:
    """Open a source and check the columns that are needed.

    Args:
        source: A file or a folder of Parquet, JSON, JSON-lines, CSV or text files, or a Hub id, see `hub_id`
            (its split ``train``).
        columns: Column name → kind: ``text``, ``words`` (list of str) or ``integers`` (list of int).
        also: Columns of text whose name begins so are taken, too, where there are any.
        by_order: Where the columns are missing and there are just as many others, those stand for them.

    Returns:
        A memory-mapped data set with just these columns.

    Raises:
        DataError: With the file, and the line or row where there is one.
    """
    path = Path(source)
    if path.exists():
        parts = [_read_file(file, columns, also, by_order) for file in source_files(path)]
        for part, file in zip(parts, source_files(path), strict=True):
            if part.column_names != parts[0].column_names:
                found, first = (", ".join(names) for names in (part.column_names, parts[0].column_names))
                raise DataError(f"{file} has the columns {found}, but other files of {path} have {first}.")
        return concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    repository, config, revision = hub_id(source)
    try:
        dataset = load_dataset(repository, config, split="train", revision=revision)
    except Exception as error:  # the Hub client has a dozen exception types; all mean the same to the user
        raise DataError(f"The Hub data set {source!r} cannot be opened: {first_line(error)}") from error
    return _checked(dataset, str(source), columns, also, by_order)


def stream_source(source: str | Path) -> IterableDataset:
    """Open a source for reading from front to back, without downloading or converting it first.

    Raises:
        DataError: It cannot be opened.
    """
    path = Path(source)
    try:
        if path.exists():
            files = source_files(path)
            readers = {READERS[file.suffix] for file in files}
            if len(readers) > 1:
                raise DataError(
                    f"{path} mixes files of {', '.join(sorted(readers))}; a stream needs one kind."
                )
            reader = readers.pop()
            data_files = [str(file) for file in files]
            return load_dataset(
                reader, data_files=data_files, split="train", streaming=True, **_options(reader)
            )
        repository, config, revision = hub_id(source)
        return load_dataset(repository, config, split="train", revision=revision, streaming=True)
    except DataError:
        raise
    except Exception as error:  # as above
        raise DataError(f"The source {source!r} cannot be streamed: {first_line(error)}") from error


def _options(reader: str) -> dict[str, Any]:
    return {"keep_default_na": False} if reader == "csv" else {}  # "NA" is a word


def hub_id(source: str | Path) -> tuple[str, str | None, str | None]:
    """Split ``owner/name:configuration@revision``; the last two parts may be missing.

    Raises:
        DataError: It does not look like that, so it must be a missing file.

    Example:
        >>> hub_id("owner/questions:pair@0a1b2c")
        ('owner/questions', 'pair', '0a1b2c')
    """
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise DataError(f"There is no file or folder {source}, and it is no Hub id of the form 'owner/name'.")
    place, _, revision = str(source).partition("@")
    repository, _, config = place.partition(":")
    return repository, config or None, revision or None


def _read_file(file: Path, columns: dict[str, str], also: str | None, by_order: bool) -> Dataset:
    dataset = load_file(file)
    try:
        checked = _checked(dataset, str(file), columns, also, by_order)
        for column in checked.column_names:  # Arrow's JSON reader does not look at the encoding
            checked.data.column(column).validate(full=True)
    except DataError:
        raise
    except (pa.ArrowException, ValueError) as error:
        raise DataError(_where_malformed(file, error)) from error
    return checked


def load_file(file: Path, text_columns: bool = False) -> Dataset:
    """Open one file with all its columns, memory-mapped.

    Args:
        file: Its ending decides the reader.
        text_columns: Read every column of a CSV file as text as it stands there, ``007`` and ``True`` too.

    Raises:
        DataError: It is empty or cannot be read, with the line where that can be told.
    """
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty.")
    try:
        # The Parquet reader of datasets stumbles over a file without rows.
        if file.suffix == ".parquet" and pq.ParquetFile(file).metadata.num_rows == 0:
            raise DataError(f"{file} has no rows.")
        reader = READERS[file.suffix]
        options = _options(reader)
        if text_columns and reader == "csv":
            with file.open(encoding="utf-8-sig", newline="") as lines:
                options["features"] = Features({name: Value("string") for name in next(csv.reader(lines))})
        return load_dataset(reader, data_files=str(file), split="train", **options)
    except DataError:
        raise
    except (DatasetGenerationError, pa.ArrowException, ValueError, csv.Error) as error:
        raise DataError(_where_malformed(file, error)) from error


def _where_malformed(file: Path, error: BaseException) -> str:
    if READERS[file.suffix] == "json":
        for number, line in enumerate(file.read_bytes().splitlines(), start=1):
            try:
                json.loads(line or b"null")
            except (json.JSONDecodeError, UnicodeDecodeError) as fault:
                return f"{file}, line {number} is not valid JSON: {fault}."
    root = error
    while root.__cause__ is not None or root.__context__ is not None:
        root = root.__cause__ or root.__context__  # type: ignore[assignment]
    return f"{file} cannot be read as {READERS[file.suffix]}: {first_line(root)}"


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
        wanted, fits = COLUMN_TYPES[kind]
        data = dataset.data.column(column)
        if not fits(data.type):
            line = _line_of_other_type(Path(name), column, kind)
            raise DataError(f"Column {column!r} of {name}{line} holds {data.type}; {wanted} is needed.")
        if data.null_count:
            row = next(i for i, missing in enumerate(data.is_null().to_pylist()) if missing)
            raise DataError(f"{name}, row {row + 1}: column {column!r} is empty.")
    dataset = dataset.select_columns(list(columns))
    # One type per kind, whatever the reader made of it: parts of a folder must fit together.
    features = Features({column: COLUMN_FEATURES[kind] for column, kind in columns.items()})
    return dataset if dataset.features == features else dataset.cast(features)


def name_by_order(dataset, columns: list[str]):
    """Name the columns of a data set, or of a stream, by their order, if none of the names is there."""
    found = dataset.column_names or []
    if len(found) != len(columns) or set(found) & set(columns):
        return dataset
    return dataset.rename_columns(dict(zip(found, columns, strict=True)))


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


def fingerprint(source: str | Path, dataset: Dataset | None) -> str:
    """Identify the data of a source: sha256 over its files' contents; for a Hub data set that of datasets."""
    path = Path(source)
    if dataset is not None and not path.exists():
        return dataset._fingerprint
    digest = hashlib.sha256()
    for file in source_files(path):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def source_name(source: str | Path) -> str:
    """Name a source in logs and records without its local path."""
    path = Path(source)
    return path.stem if path.exists() else str(source)


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


__all__ = [
    "expand_pair_sources",
    "fingerprint",
    "hub_id",
    "load_file",
    "name_by_order",
    "open_source",
    "source_files",
    "source_name",
    "stream_source",
]
