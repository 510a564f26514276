"""Sources of text pairs, memory-mapped or streamed in blocks: which rows make a source's n-th batch."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ...data.sources import Source, fingerprint, name_by_order, open_source, stream_source
from ...data.tokens import list_arrays, tokenize_columns
from ...errors import DataError, first_line
from .sampling import EpochSampler, Seed, Shuffle, extended

logger = logging.getLogger(__name__)

PAIR_COLUMNS = {"anchor": "text", "positive": "text"}
NEGATIVE = "negative"
"""Columns whose name begins with this hold hard negatives."""


class PairTable:
    """Tokenized pairs, memory-mapped.

    Args:
        dataset: What `tokenize_columns` returns.
        rows: Rows of the dataset that are pairs of the table, int64.
        numbers: Number of each row of the dataset in the source, from 1; by default they are counted.
    """

    def __init__(self, dataset: Dataset, rows: np.ndarray, numbers: Sequence[int] | None = None):
        self.num_rows, self._rows, self._numbers = len(rows), rows, numbers
        self.columns = [name for name in dataset.column_names if name != "keys"]
        self._data = dataset.with_format("arrow")

    def keys(self, pairs: list[int]) -> list[list[int]]:
        """Return for each pair one number per text."""
        return self._data.select_columns("keys")[self._rows[pairs].tolist()].column("keys").to_pylist()

    def numbers(self, pairs: list[int]) -> list[int]:
        """Return for each pair its number in the source, from 1."""
        return [
            row + 1 if self._numbers is None else self._numbers[row] for row in self._rows[pairs].tolist()
        ]

    def texts(self, pairs: list[int]) -> list[list[np.ndarray]]:
        """Return for each column (anchor, positive, hard negatives) the sub-word ids of the pairs."""
        table = self._data[self._rows[pairs].tolist()]
        return [list_arrays(table.column(name)) for name in self.columns]


class PairSource(ABC):
    """One source of pairs."""

    name: str
    num_rows: int
    """Size, as far as it is known; decides how often the source is drawn."""

    @abstractmethod
    def draw(self, turn: int, batch_size: int, seed: Seed) -> tuple[PairTable, list[int]]:
        """Return the table and its rows that make the source's batch number ``turn``."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return size and fingerprint."""

    def counts(self, turn: int, batch_size: int) -> dict[str, int]:
        """Return what a run adds up for this batch of the source."""
        return {}


class MappedPairs(PairSource):
    """A source that is opened, checked and tokenized as a whole before training."""

    def __init__(self, name: str, source: Source, tokenizer: Any, max_length: int, batch_size: int):
        self.name = name
        dataset = open_source(source, PAIR_COLUMNS, also=NEGATIVE, by_order=True)
        self._fingerprint = fingerprint(source, dataset)
        empty = np.zeros(len(dataset), dtype=bool)
        for column in dataset.column_names:
            side = dataset.data.column(column)
            empty |= pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(side)), 0).to_numpy()
            if column in PAIR_COLUMNS and not _has_distinct(side, batch_size):
                raise DataError(
                    f"The pair source {name!r} has too few distinct texts for a batch of {batch_size}; "
                    "lower families.tc.batch_size or leave the source out."
                )
        self._num_empty = int(empty.sum())
        if self._num_empty:
            logger.warning("%s: %d pairs with an empty text are left out", name, self._num_empty)
        self._table = PairTable(
            tokenize_columns(dataset, tokenizer, max_length, name), np.flatnonzero(~empty)
        )
        self.num_rows = self._table.num_rows

    def draw(self, turn: int, batch_size: int, seed: Seed) -> tuple[PairTable, list[int]]:
        """Return rows of shuffled epochs over the whole source."""
        return self._table, EpochSampler(self.num_rows, batch_size, seed).rows(turn)

    def describe(self) -> dict[str, Any]:
        """Return size, pairs left out, hard negatives per pair, and fingerprint."""
        return {
            "pairs": self.num_rows,
            "empty_left_out": self._num_empty,
            "hard_negatives": len(self._table.columns) - len(PAIR_COLUMNS),
            "fingerprint": self._fingerprint,
        }


def _has_distinct(texts: pa.ChunkedArray, wanted: int) -> bool:
    """Return True if a column has ``wanted`` different texts; read no more of it than needed."""
    size = 8 * wanted
    while size < 8 * len(texts):
        if pc.count_distinct(texts.slice(0, size)).as_py() >= wanted:
            return True
        size *= 8
    return pc.count_distinct(texts).as_py() >= wanted


class StreamedPairs(PairSource):
    """A source that is read from front to back, again and again, while training.

    Its rows are cut into blocks of ``block_rows``, rounded down to whole batches; a block is tokenized when
    its first batch is due, and shuffled. A resumed run skips to its block. ``cap`` stands for the size where
    the source does not announce one.
    """

    def __init__(
        self, name: str, source, tokenizer, max_length: int, batch_size: int, block_rows: int, cap: int
    ):
        self.name, self._tokenizer, self._max_length = name, tokenizer, max_length
        if block_rows < batch_size:
            raise DataError(f"families.tc.block_rows is {block_rows}; it must hold a batch of {batch_size}.")
        self._block_rows = block_rows // batch_size * batch_size
        self._stream = name_by_order(stream_source(source), list(PAIR_COLUMNS))
        self._fingerprint = (
            str(source)
            if isinstance(source, (str, Path)) and not Path(source).exists()
            else fingerprint(source, None)
        )
        splits = self._stream.info.splits or {}
        announced = splits["train"].num_examples if "train" in splits else 0
        self.num_rows = announced or cap
        if not self.num_rows:
            raise DataError(
                f"The streamed source {name!r} does not announce its size; set families.tc.source_cap, which "
                "then stands for it."
            )
        self._rows, self._next_block = self._endless(), 0
        self._open = lru_cache(maxsize=1)(self._read)

    def draw(self, turn: int, batch_size: int, seed: Seed) -> tuple[PairTable, list[int]]:
        """Return rows of the block that the turn falls into."""
        block, first = divmod(turn * batch_size, self._block_rows)
        table, _ = self._open(block)
        shuffle = Shuffle(table.num_rows, extended(seed, block))
        return table, shuffle(np.arange(first, first + batch_size)).tolist()

    def counts(self, turn: int, batch_size: int) -> dict[str, int]:
        """Return with the first batch of a block how many of its pairs were left out for an empty text."""
        block, first = divmod(turn * batch_size, self._block_rows)
        return {"empty_left_out": self._open(block)[1]} if first == 0 else {}

    def _read(self, block: int) -> tuple[PairTable, int]:
        """Return a block's pairs and how many were left out; for an earlier one, start the source again."""
        if block < self._next_block:
            self._rows, self._next_block = self._endless(), 0
        for _ in range(block - self._next_block):
            self._read_rows()
        numbers, rows, empty = self._read_rows()
        self._next_block = block + 1
        name = f"{self.name}, block {block + 1}"
        if empty:
            logger.warning("%s: %d pairs with an empty text are left out", name, empty)
        dataset = Dataset.from_dict(
            {column: [row[column] for row in rows] for column in _text_columns(rows[0])}
        )
        tokenized = tokenize_columns(dataset, self._tokenizer, self._max_length, name)
        return PairTable(tokenized, np.arange(len(rows)), numbers), empty

    def _read_rows(self) -> tuple[list[int], list[dict[str, Any]], int]:
        """Return numbers and pairs of the next block, and how many rows had an empty text."""
        numbers: list[int] = []
        rows: list[dict[str, Any]] = []
        read = 0
        while len(rows) < self._block_rows:
            number, row = next(self._rows)
            read += 1
            if row is not None:
                numbers.append(number)
                rows.append(row)
        return numbers, rows, read - len(rows)

    def _endless(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Yield row numbers and pairs (None for one with an empty text), again and again."""
        while True:
            pairs = number = 0
            try:
                for number, row in enumerate(self._stream, start=1):
                    complete = self._is_complete(row, number)
                    pairs += complete
                    yield number, row if complete else None
            except DataError:
                raise
            except Exception as error:  # whatever the reader or the network raises
                raise DataError(
                    f"The pair source {self.name!r} broke off after row {number}: {first_line(error)}"
                ) from error
            if not pairs:
                raise DataError(f"The pair source {self.name!r} has run dry: it has no pair with two texts.")

    def _is_complete(self, row: dict[str, Any], number: int) -> bool:
        for column in _text_columns(row):
            if not isinstance(row.get(column), str):
                raise DataError(
                    f"The pair source {self.name!r}, row {number}: column {column!r} holds "
                    f"{type(row.get(column)).__name__}; text is needed."
                )
        return all(row[column].strip() for column in _text_columns(row))

    def describe(self) -> dict[str, Any]:
        """Return the announced size and what identifies the data."""
        return {"pairs": self.num_rows, "streamed": True, "fingerprint": self._fingerprint}


def _text_columns(row: dict[str, Any]) -> list[str]:
    return [*PAIR_COLUMNS, *sorted(name for name in row if name.startswith(NEGATIVE))]
