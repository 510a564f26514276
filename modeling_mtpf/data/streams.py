"""Read the texts of a source in order, in flat memory: files of any size, or a Hub data set."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import IterableDataset, load_dataset
from huggingface_hub import HfApi

from ..errors import DataError, first_line
from .sources import READERS, source_files, source_name

BATCH_ROWS = 1000
"""Rows that are read at a time."""


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
    """The texts of a source, read anew and in the same order with each iteration.

    Args:
        source: A file, or a folder of files in name order: Parquet, JSON lines, JSON, CSV or text; or a Hub
            id ``owner/name`` or ``owner/name@revision`` (its split ``train``), pinned to its commit.
        column: Column that holds the text.

    Raises:
        DataError: There is no such source. While reading: a file is malformed, or lacks the column.
    """

    def __init__(self, source: str | Path, column: str = "text"):
        self.source, self.column = str(source), column
        self.name = source_name(source)
        self.files: list[Path] = []
        if Path(source).exists():
            self.files = source_files(source)
            return
        if self.source.count("/") != 1 or self.source.startswith((".", "/", "~")):
            raise DataError(
                f"There is no file or folder {source}, and it is no Hub id of the form 'owner/name'."
            )
        self._repository, _, revision = self.source.partition("@")
        try:
            self._commit = HfApi().dataset_info(self._repository, revision=revision or None).sha
        except (
            Exception
        ) as error:  # the Hub client has a dozen exception types; all mean the same to the user
            raise DataError(
                f"The Hub data set {self.source!r} cannot be opened: {first_line(error)}"
            ) from error

    def fingerprint(self) -> str:
        """Identify the data: sha256 over the files' contents, or the commit of the Hub data set."""
        if not self.files:
            return f"{self._repository}@{self._commit}"
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()

    def __iter__(self) -> Iterator[StreamedText]:
        parts: list[Path | None] = [*self.files] or [None]
        for file in parts:
            row = 0
            name = self.source if file is None else str(file)
            for values in self._batches(file, name):
                for text in values:
                    row += 1
                    yield StreamedText(name, row, text)

    def _batches(self, file: Path | None, name: str) -> Iterator[list[str | None]]:
        try:
            for table in self._open(file).with_format("arrow").iter(batch_size=BATCH_ROWS):
                yield self._column(table, name)
        except DataError:
            raise
        # Each reader, and the Hub client, has its own exceptions.
        except Exception as error:
            raise DataError(_explained(file, name, error)) from error

    def _open(self, file: Path | None) -> IterableDataset:
        if file is None:
            return load_dataset(self._repository, revision=self._commit, split="train", streaming=True)
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty.")
        reader = READERS[file.suffix]
        options: dict[str, Any] = {"batch_size": BATCH_ROWS} if reader == "parquet" else {}
        if reader == "csv":
            options["keep_default_na"] = False  # "NA" is a word
        return load_dataset(reader, data_files=str(file), split="train", streaming=True, **options)

    def _column(self, table: pa.Table, name: str) -> list[str | None]:
        if self.column not in table.column_names:
            raise DataError(
                f"{name} has no column {self.column!r}; it has: {', '.join(table.column_names)}. Name the "
                "one that holds the text with --column."
            )
        values = table.column(self.column)
        if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
            if values.null_count == len(values):
                return [None] * len(values)
            raise DataError(f"Column {self.column!r} of {name} holds {values.type}; text is needed.")
        values.validate(full=True)  # Arrow's JSON reader does not look at the encoding
        return values.to_pylist()


def _explained(file: Path | None, name: str, error: Exception) -> str:
    if file is None:
        return f"The Hub data set {name!r} cannot be read: {first_line(error)}"
    if READERS[file.suffix] == "json":
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    json.loads(line or b"null")
                except (json.JSONDecodeError, UnicodeDecodeError) as fault:
                    return f"{file}, line {number} is not valid JSON: {fault}."
    root: BaseException = error
    while root.__cause__ is not None or root.__context__ is not None:
        root = root.__cause__ or root.__context__  # type: ignore[assignment]
    return (
        f"{file} cannot be read as {READERS[file.suffix]}: {first_line(root)} "
        "It is truncated or damaged; fetch it again, or take it out of the source."
    )


__all__ = ["StreamedText", "TextStream"]
