"""Open the data a user gives: a file, a folder, a Hub data set, or a table in memory; mapped or streamed."""

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt
from datasets import (
    Dataset,
    DatasetInfo,
    Features,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.iterable_dataset import ArrowExamplesIterable
from huggingface_hub import constants

from ..errors import DataError, first_line
from ..model.sources_mtpf import find_on_hub, is_hub_id
from .text_files import JSON, LINES, TABLES, ending, has_mark, read_file

READERS = {
    ".parquet": "parquet",
    **dict.fromkeys(JSON, "json"),
    **dict.fromkeys(TABLES, "csv"),
    **dict.fromkeys(LINES, "text"),
}
"""File ending, in any case and before ``.gz`` → kind. No data set script is ever run."""

BATCH_ROWS = 1000
"""Rows that a `TextStream` reads at a time."""


def _is_text(arrow_type: pa.DataType) -> bool:
    return pt.is_string(arrow_type) or pt.is_large_string(arrow_type)


def _is_list(arrow_type: pa.DataType) -> bool:
    return pt.is_list(arrow_type) or pt.is_large_list(arrow_type)


_KINDS = {
    "text": ("text", Value("string"), _is_text),
    "words": ("a list of words", List(Value("string")), lambda t: _is_list(t) and _is_text(t.value_type)),
    "integers": (
        "a list of integers",
        List(Value("int32")),
        lambda t: _is_list(t) and pt.is_integer(t.value_type),
    ),
}
"""What a column may hold: in words, as a feature, and as a check of its Arrow type."""


Source = Any
"""A path or Hub id, or a table in memory: ``Dataset``, ``DatasetDict``, ``DataFrame``, a list of dicts."""


# Tables in memory, and folders that `save_to_disk` wrote


def tables(source: Source) -> dict[str, Dataset] | None:
    """Return a table in memory, or a folder of ``save_to_disk``, by split; ``None`` for another path or id.

    A table without splits is ``train``.

    Raises:
        DataError: It is of another type, or the folder is damaged.
    """
    if isinstance(source, (str, Path)):
        if not any((Path(source) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return None
        try:
            source = load_from_disk(source)
        except Exception as error:  # of Arrow, JSON and datasets
            raise DataError(f"The saved data set {source} cannot be read: {first_line(error)}") from error
    splits = source if isinstance(source, dict) else {"train": source}
    return {str(split): _table(part) for split, part in splits.items()}


def _table(part: Any) -> Dataset:
    try:
        if isinstance(part, list) and part and all(isinstance(row, dict) for row in part):
            part = Dataset.from_list(part)
        elif hasattr(part, "iloc") and hasattr(part, "columns"):  # pandas, which is not imported for this
            part = Dataset.from_pandas(part, preserve_index=False)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"The table in memory cannot be read: {first_line(error)}") from error
    if not isinstance(part, Dataset):
        raise DataError(
            f"Data of the type {type(part).__name__} cannot be read; give a path, a Hub id, a Dataset, a "
            "DatasetDict, a pandas DataFrame, or a list of dicts."
        )
    part = part.with_format(None)
    return part if part._indices is None else part.flatten_indices()


def _train(splits: dict[str, Dataset], name: str) -> Dataset:
    if "train" not in splits and len(splits) > 1:
        raise DataError(f"{name} has no split train; it has: {', '.join(splits)}. Give one of them.")
    return splits["train"] if "train" in splits else next(iter(splits.values()))


# Names


def source_files(source: str | Path, endings: Collection[str] = tuple(READERS)) -> list[Path]:
    """Return the data files of a folder in name order, or the file itself.

    Raises:
        DataError: The folder has no data file, or the file's ending is not known.
    """
    path = Path(source)
    accepted = ", ".join(dict.fromkeys(endings))
    if path.is_file():
        if ending(path) not in endings:
            raise DataError(f"{path} has an unknown ending; accepted: {accepted}.")
        return [path]
    files = sorted(
        file
        for file in path.iterdir()
        if file.is_file()
        and ending(file) in endings
        and not file.name.startswith((".", "_"))
        and file.name not in ("clusters.json", "run.json")
    )
    if not files:
        raise DataError(f"The folder {path} has no data file; accepted endings: {accepted}.")
    return files


def source_name(source: Source) -> str:
    """Name a source in logs and records without its local path."""
    if not isinstance(source, (str, Path)):
        return "data in memory"
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


def _commit_on_hub(repository: str, revision: str | None) -> str:
    options: Any = {"what": "file or folder", "repo_type": "dataset", "error": DataError}
    return find_on_hub(repository, revision, **options).resolved


def expand_pair_sources(sources: Sequence[Source]) -> dict[str, Source]:
    """Name each pair source; a folder of files stands for one source per file.

    Raises:
        DataError: Two sources of the same name, or none at all.
    """
    expanded: dict[str, Source] = {}
    for number, source in enumerate(sources, start=1):
        in_memory = not isinstance(source, (str, Path))
        is_folder = not in_memory and Path(source).is_dir() and tables(source) is None
        for part in source_files(source) if is_folder else [source]:
            name = f"table-{number}" if in_memory else source_name(part)
            if name in expanded:
                raise DataError(
                    f"Two pair sources are named {name!r}, {expanded[name]} and {part}; rename one."
                )
            expanded[name] = part
    if not expanded:
        raise DataError("No pair source is given; list files, folders or Hub ids in families.tc.pairs.")
    return expanded


def fingerprint(source: Source, dataset: Dataset | None) -> str:
    """Identify the data of a source: sha256 over its contents; for a Hub data set that of datasets."""
    digest = hashlib.sha256()
    if (splits := tables(source)) is not None:
        for table in _train(splits, source_name(source)).with_format("arrow").iter(batch_size=BATCH_ROWS):
            digest.update(json.dumps(table.to_pylist(), default=str).encode())
        return digest.hexdigest()
    if dataset is not None and not Path(source).exists():
        return dataset._fingerprint
    for file in source_files(source):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# Whole, memory-mapped


def open_source(
    source: Source, columns: dict[str, str], also: str | None = None, by_order: bool = False
) -> Dataset:
    """Open a source, memory-mapped, with just the columns that are needed, and check them.

    Args:
        source: A file or a folder of Parquet, JSON, JSON-lines, CSV or text files, a Hub id, see `hub_id`,
            or a table, see `tables`; of splits ``train``.
        columns: Column name → kind: ``text``, ``words`` (list of str) or ``integers`` (list of int).
        also: Prefix of further text columns to keep where the source has them.
        by_order: See `name_by_order`.

    Raises:
        DataError: With the file, and the line or row where there is one.
    """
    if (splits := tables(source)) is not None:
        return _checked(_train(splits, source_name(source)), source_name(source), columns, also, by_order)
    if not Path(source).exists():
        return _checked(load_hub(source, "train"), str(source), columns, also, by_order)
    parts: list[Dataset] = []
    for file in source_files(source):
        dataset = load_file(file)
        with _readable(file):
            part = _checked(dataset, str(file), columns, also, by_order)
            for column in part.column_names:  # Arrow's JSON reader does not look at the encoding
                part.data.column(column).validate(full=True)
        if parts and part.column_names != parts[0].column_names:
            names, others = (", ".join(d.column_names) for d in (part, parts[0]))
            raise DataError(f"{file} has the columns {names}, but other files of {source} have {others}.")
        parts.append(part)
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def load_file(file: Path) -> Dataset:
    """Open one file with all its columns, memory-mapped; all values of a delimited table are text.

    Raises:
        DataError: It is empty or cannot be read, with the line where that can be told.
    """
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty.")
    with _readable(file):
        # The Parquet reader of datasets fails on a file without rows.
        if ending(file) == ".parquet" and pq.ParquetFile(file).metadata.num_rows == 0:
            raise DataError(f"{file} has no rows.")
        return _load([file])


def load_hub(source: str | Path, split: str | None = None, streaming: bool = False) -> Any:
    """Load a split of a Hub data set, or with ``None`` all of them by name; see `hub_id`.

    Raises:
        DataError: There is no such data set, the Hub cannot be reached, or only a script could read it.
    """
    repository, config, revision = hub_id(source)
    if not constants.HF_HUB_OFFLINE:
        _commit_on_hub(repository, revision)  # answers at once, where load_dataset tries again for a minute
    try:
        return load_dataset(repository, config, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # the Hub client has a dozen exception types; all mean the same to the user
        reason = first_line(error)
        if "script" in reason:
            reason += ". Scripts are never run: choose a revision in Parquet, e.g. @refs/convert/parquet."
        raise DataError(f"The Hub data set {str(source)!r} cannot be opened: {reason}") from error


def _load(files: Sequence[Path], streaming: bool = False, encoding: str | None = None, **options: Any) -> Any:
    """Open files of one kind; what Arrow's readers do not check or know is read by `read_file`."""
    reader = READERS[ending(files[0])]
    if reader == "parquet" or (reader != "csv" and not encoding and not any(map(has_mark, files))):
        names = [str(file) for file in files]
        return load_dataset(reader, data_files=names, split="train", streaming=streaming, **options)
    changed = [(file.stat().st_mtime_ns, file.stat().st_size) for file in files]  # in the name of the cache
    arguments: Any = {"files": [str(file) for file in files], "changed": changed, "encoding": encoding}
    features = None
    if reader == "csv":
        first = next(_table_rows(arguments["files"][:1], [], encoding), None)
        if first is None:
            raise DataError(f"{files[0]} has no rows.")
        features = Features(dict.fromkeys(first, Value("string")))
    if streaming:  # in tables: row by row datasets would be ten times slower
        return IterableDataset(ArrowExamplesIterable(_tables, arguments), DatasetInfo(features=features))
    return Dataset.from_generator(_table_rows, features=features, gen_kwargs=arguments)


def _tables(**arguments: Any) -> Iterator[tuple[str, pa.Table]]:
    rows = _table_rows(**arguments)
    for number in count():
        batch = list(islice(rows, BATCH_ROWS))
        if not batch:
            return
        yield str(number), pa.Table.from_pylist(batch)


def _table_rows(
    files: list[str], changed: list[tuple[int, int]], encoding: str | None
) -> Iterator[dict[str, Any]]:
    for file in files:
        for _, row in read_file(file, encoding):
            yield row


@contextmanager
def _readable(source: Path | str) -> Iterator[None]:
    """Turn any error of a reader into one sentence: each, and the Hub client, has exceptions of its own."""
    messages = logging.getLogger("datasets.packaged_modules")  # they name local paths
    level = messages.level
    messages.setLevel(logging.CRITICAL)
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(_why_unreadable(source, error)) from error
    finally:
        messages.setLevel(level)


def _why_unreadable(source: Path | str, error: BaseException) -> str:
    if isinstance(source, str):
        return f"The Hub data set {source!r} cannot be read: {first_line(error)}"
    reader = READERS[ending(source)]
    while cause := error.__cause__ or error.__context__:
        if isinstance(error, DataError):
            return str(error)
        error = cause
    if isinstance(error, DataError):
        return str(error)
    if reader != "parquet":
        try:
            for _ in read_file(source):
                pass
        except DataError as fault:
            return str(fault)
    return (
        f"{source} cannot be read as {reader}: {first_line(error).rstrip('.')}. It is "
        "truncated, damaged, or has the wrong ending; fetch it again, or take it out of the source."
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
        needed, _, accepts = _KINDS[kind]
        data = dataset.data.column(column)
        if not accepts(data.type):
            line = _line_of_other_type(Path(name), column, kind)
            raise DataError(f"Column {column!r} of {name}{line} holds {data.type}; {needed} is needed.")
        if data.null_count:
            row = data.is_null().to_pylist().index(True)
            raise DataError(f"{name}, row {row + 1}: column {column!r} is empty.")
    dataset = dataset.select_columns(list(columns))
    # One type per kind, whatever the reader made of it: parts of a folder must fit together.
    features = Features({column: _KINDS[kind][1] for column, kind in columns.items()})
    return dataset if dataset.features == features else dataset.cast(features)


def name_by_order(dataset, columns: list[str]):
    """Rename the columns of a data set or stream by their order, if it has N others and none of these N."""
    names = dataset.column_names or []
    if len(names) != len(columns) or set(names) & set(columns):
        return dataset
    return dataset.rename_columns(dict(zip(names, columns, strict=True)))


def _line_of_other_type(file: Path, column: str, kind: str) -> str:
    """Name the line of a JSON-lines file with the first value of another type, if that can be told."""
    if not file.is_file() or READERS[ending(file)] != "json":
        return ""
    with suppress(DataError, KeyError, TypeError):
        for location, row in read_file(file):
            if not isinstance(row[column], str if kind == "text" else list):
                return f", {location},"
    return ""


# Front to back, in flat memory


def stream_source(source: Source) -> IterableDataset:
    """Open a source for reading from front to back, without downloading or converting it first.

    Raises:
        DataError: It cannot be opened.
    """
    if (splits := tables(source)) is not None:
        return _train(splits, source_name(source)).to_iterable_dataset()
    path = Path(source)
    if not path.exists():
        return load_hub(source, "train", streaming=True)
    files = source_files(path)
    readers = {READERS[ending(file)] for file in files}
    if len(readers) > 1:
        raise DataError(f"{path} mixes files of {', '.join(sorted(readers))}; a stream needs one kind.")
    try:
        return _load(files, streaming=True)
    except Exception as error:  # each reader has its own exceptions
        raise DataError(f"The source {str(source)!r} cannot be streamed: {first_line(error)}") from error


class StreamedText(NamedTuple):
    """A row: its file (or Hub id), its number there from 1, and its text (``None``: the column is empty)."""

    file: str
    row: int
    text: str | None


class TextStream:
    """The texts in a column of a source (see `open_source`), in the same order with each iteration.

    A Hub data set is pinned to its commit. The encoding is that of text files, by default that of the byte
    order mark, else UTF-8.

    Raises:
        DataError: The source does not exist. While reading: a file is malformed, or lacks the column.
    """

    def __init__(
        self, source: Source, column: str = "text", encoding: str | None = None, option: str = "--column"
    ):
        self.name, self.column, self.encoding = source_name(source), column, encoding
        self.option = option  # that names the column, for messages
        self.source = str(source) if isinstance(source, (str, Path)) else self.name
        splits, self._files = tables(source), []
        self._table = None if splits is None else _train(splits, self.name)
        if self._table is None and Path(source).exists():
            self._files = source_files(source)
        elif self._table is None:
            repository, config, revision = hub_id(source)
            commit = _commit_on_hub(repository, revision)
            self._pinned = f"{repository}{f':{config}' if config else ''}@{commit}"

    def fingerprint(self) -> str:
        """Identify the data: sha256 over the files' contents, or the commit of the Hub data set."""
        if self._table is not None:
            return fingerprint(self._table, None)
        return fingerprint(self.source, None) if self._files else self._pinned

    def __iter__(self) -> Iterator[StreamedText]:
        files: list[Path | None] = [*self._files] or [None]
        for file in files:
            name, numbers = str(file or self.source), count(1)
            with _readable(file or name):
                for table in self._open(file).with_format("arrow").iter(batch_size=BATCH_ROWS):
                    for text in self._texts(table, name):
                        yield StreamedText(name, next(numbers), text)

    def _open(self, file: Path | None) -> Any:
        if self._table is not None:
            return self._table
        if file is None:
            return load_hub(self._pinned, "train", streaming=True)
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty.")
        options = {"batch_size": BATCH_ROWS} if ending(file) == ".parquet" else {}
        return _load([file], streaming=True, encoding=self.encoding, **options)

    def _texts(self, table: pa.Table, name: str) -> list[str | None]:
        if self.column not in table.column_names:
            names = ", ".join(table.column_names)
            raise DataError(
                f"{name} has no column {self.column!r}; it has: {names}. Choose with {self.option}."
            )
        values = table.column(self.column)
        if not _is_text(values.type):
            if values.null_count == len(values):
                return [None] * len(values)
            raise DataError(f"Column {self.column!r} of {name} holds {values.type}; text is needed.")
        values.validate(full=True)  # Arrow's JSON reader does not look at the encoding
        return values.to_pylist()
