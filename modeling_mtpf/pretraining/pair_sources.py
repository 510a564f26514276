"""Sources of text pairs: memory-mapped as a whole, or streamed block by block.

Both answer the same question, which rows make the n-th batch of the source, as a pure function of the seed.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.sources import (
    expand_pair_sources,
    fingerprint,
    name_by_order,
    open_source,
    stream_source,
)
from ..data.tokens import list_arrays, tokenize_columns
from ..errors import DataError
from .families import RunContext
from .sampling import EpochSampler, Seed, Shuffle

if TYPE_CHECKING:
    from .tc import TcSettings

logger = logging.getLogger(__name__)

PAIR_COLUMNS = {"anchor": "text", "positive": "text"}
NEGATIVE = "negative"
"""Columns whose name begins so hold hard negatives."""


class PairTable:
    """Tokenized pairs, memory-mapped.

    Args:
        dataset: What `tokenize_columns` returns.
        first_row: Number, in the source, of the table's first row.
    """

    def __init__(self, dataset: Dataset, first_row: int = 0):
        self.num_rows, self.first_row = len(dataset), first_row
        self.columns = [name for name in dataset.column_names if name != "keys"]
        self._data = dataset.with_format("arrow")

    def keys(self, rows: list[int]) -> list[list[int]]:
        """Return for each row one number per text."""
        return self._data.select_columns("keys")[rows].column("keys").to_pylist()

    def numbers(self, rows: list[int]) -> list[int]:
        """Return for each row its number in the source, from 1."""
        return [self.first_row + row + 1 for row in rows]

    def texts(self, rows: list[int]) -> list[list[np.ndarray]]:
        """Return for each column (anchor, positive, hard negatives) the sub-word ids of the rows."""
        table = self._data[rows]
        return [list_arrays(table.column(name)) for name in self.columns]


class PairSource(ABC):
    """One source of pairs.

    Attributes:
        name: Without its path.
        num_rows: Its size, as far as it is known; decides how often it is drawn.
    """

    name: str
    num_rows: int

    @abstractmethod
    def draw(self, turn: int, batch_size: int, seed: Seed) -> tuple[PairTable, list[int]]:
        """Return the table and its rows that make the source's batch number ``turn``."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return size and fingerprint."""


class MappedPairs(PairSource):
    """A source that is opened, checked and tokenized as a whole before training."""

    def __init__(
        self,
        name: str,
        source: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        batch_size: int,
    ):
        self.name, self._source = name, source
        dataset = open_source(source, PAIR_COLUMNS, also=NEGATIVE, by_order=True)
        self._fingerprint = fingerprint(source, dataset)
        empty = np.zeros(len(dataset), dtype=bool)
        for column in dataset.column_names:
            side = dataset.data.column(column)
            empty |= pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(side)), 0).to_numpy()
            if column in PAIR_COLUMNS and pc.count_distinct(side).as_py() < batch_size:
                raise DataError(
                    f"The pair source {name!r} has too few distinct texts for a batch of {batch_size}; "
                    "lower families.tc.batch_size or leave the source out."
                )
        self._num_empty = int(empty.sum())
        if self._num_empty:
            logger.warning("%s: %d pairs with an empty text are left out", name, self._num_empty)
        self._kept = np.flatnonzero(~empty)
        self._table = PairTable(tokenize_columns(dataset, tokenizer, max_length, name))
        self.num_rows = len(self._kept)

    def draw(self, turn: int, batch_size: int, seed: Seed) -> tuple[PairTable, list[int]]:
        """Return rows of shuffled epochs over the whole source."""
        rows = EpochSampler(self.num_rows, batch_size, seed).rows(turn)
        return _Selected(self._table, self._kept), rows

    def describe(self) -> dict[str, Any]:
        """Return size, pairs left out, hard negatives per pair, and fingerprint."""
        return {
            "pairs": self.num_rows,
            "empty_left_out": self._num_empty,
            "hard_negatives": len(self._table.columns) - 2,
            "fingerprint": self._fingerprint,
        }


class _Selected(PairTable):
    """Some rows of a table, renumbered."""

    def __init__(self, table: PairTable, kept: np.ndarray):
        self.num_rows, self.first_row, self.columns = len(kept), table.first_row, table.columns
        self._table, self._kept = table, kept

    def keys(self, rows: list[int]) -> list[list[int]]:
        return self._table.keys(self._kept[rows].tolist())

    def numbers(self, rows: list[int]) -> list[int]:
        return self._table.numbers(self._kept[rows].tolist())

    def texts(self, rows: list[int]) -> list[list[np.ndarray]]:
        return self._table.texts(self._kept[rows].tolist())


class StreamedPairs(PairSource):
    """A source that is read from front to back, again and again, while training.

    Its rows are cut into blocks of fixed size; a block is tokenized when its first batch is due, and its rows
    are shuffled among themselves. A resumed run skips to its block.

    Args:
        name: Of the source.
        source: Folder, file or Hub id.
        tokenizer: Of the backbone.
        max_length: Texts are cut there.
        batch_size: Pairs per batch.
        block_rows: Pairs per block; rounded down to whole batches.
        cap: Stands for the size where the source does not announce one.
    """

    def __init__(self, name, source, tokenizer, max_length: int, batch_size: int, block_rows: int, cap: int):
        self.name, self._source = name, source
        self._tokenizer, self._max_length = tokenizer, max_length
        if block_rows < batch_size:
            raise DataError(f"families.tc.block_rows is {block_rows}; it must hold a batch of {batch_size}.")
        self._block_rows = block_rows // batch_size * batch_size
        self._stream = name_by_order(stream_source(source), list(PAIR_COLUMNS))
        self._fingerprint = fingerprint(source, None) if Path(source).exists() else str(source)
        splits = self._stream.info.splits or {}
        announced = splits["train"].num_examples if "train" in splits else 0
        self.num_rows = announced or cap
        if not self.num_rows:
            raise DataError(
                f"The streamed source {name!r} does not announce its size; set families.tc.source_cap, which "
                "then stands for it."
            )
        self._rows: Iterator[dict[str, Any]] | None = None
        self._next_block = 0
        self._block: tuple[int, PairTable] | None = None
        self._num_empty = 0

    def draw(self, turn: int, batch_size: int, seed: Seed) -> tuple[PairTable, list[int]]:
        """Return rows of the block that the turn falls into."""
        block, place = divmod(turn * batch_size, self._block_rows)
        if self._block is None or self._block[0] != block:
            self._block = (block, self._read(block))
        table = self._block[1]
        seed = (*(seed if isinstance(seed, tuple) else (seed,)), block)
        return table, Shuffle(table.num_rows, seed)(np.arange(place, place + batch_size)).tolist()

    def _read(self, block: int) -> PairTable:
        """Read one block; going back means starting anew."""
        if self._rows is None or block < self._next_block:
            self._rows, self._next_block = self._endless(), 0
        first = block * self._block_rows
        for _ in range((block - self._next_block) * self._block_rows):
            next(self._rows)
        rows = [next(self._rows) for _ in range(self._block_rows)]
        self._next_block = block + 1
        columns = [*PAIR_COLUMNS, *sorted(name for name in rows[0] if name.startswith(NEGATIVE))]
        dataset = Dataset.from_dict({name: [row[name] for row in rows] for name in columns})
        tokens = tokenize_columns(
            dataset, self._tokenizer, self._max_length, f"{self.name}, block {block + 1}"
        )
        return PairTable(tokens, first)

    def _endless(self) -> Iterator[dict[str, Any]]:
        """Yield the pairs without empty texts, from the front again after the end."""
        while True:
            found = 0
            number = 0
            try:
                for number, row in enumerate(self._stream, start=1):
                    if self._is_complete(row, number):
                        found += 1
                        yield row
            except DataError:
                raise
            except Exception as error:  # whatever the reader or the network raises
                first, *_ = str(error).strip().splitlines() or [type(error).__name__]
                raise DataError(
                    f"The pair source {self.name!r} broke off after row {number}: {first}"
                ) from error
            if not found:
                raise DataError(f"The pair source {self.name!r} has run dry: it has no pair with two texts.")

    def _is_complete(self, row: dict[str, Any], number: int) -> bool:
        for column in PAIR_COLUMNS:
            if not isinstance(row.get(column), str):
                raise DataError(
                    f"The pair source {self.name!r}, row {number}: column {column!r} holds "
                    f"{type(row.get(column)).__name__}; text is needed."
                )
        if all(text.strip() for name, text in row.items() if name in PAIR_COLUMNS):
            return True
        self._num_empty += 1
        return False

    def describe(self) -> dict[str, Any]:
        """Return the announced size and what identifies the data."""
        return {
            "pairs": self.num_rows,
            "streamed": True,
            "empty_left_out_so_far": self._num_empty,
            "fingerprint": self._fingerprint,
        }


def open_pair_sources(settings: "TcSettings", context: RunContext) -> list[PairSource]:
    """Open all pair sources of the settings."""
    opened: list[PairSource] = []
    with context.main_first():  # it fills the cache of tokenized tables, the others read it
        for name, source in expand_pair_sources(settings.pairs).items():
            arguments = (name, source, context.tokenizer, settings.max_length, settings.batch_size)
            if settings.streaming:
                opened.append(StreamedPairs(*arguments, settings.block_rows, settings.source_cap))
            else:
                opened.append(MappedPairs(*arguments))
    return opened


__all__ = ["MappedPairs", "PairSource", "PairTable", "StreamedPairs", "open_pair_sources"]
