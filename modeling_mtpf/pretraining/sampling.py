"""Which rows make the batch of a step: pure functions of (seed, step), so resuming is starting at a step."""

from collections.abc import Callable, Sequence

import numpy as np

from ..errors import DataError

Seed = int | tuple[int, ...]


def _generator(seed: Seed, *more: int) -> np.random.Generator:
    key = (*(seed if isinstance(seed, tuple) else (seed,)), *more)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


class EpochSampler:
    """Walks through shuffled epochs of one data set in batches of fixed size.

    Every row comes once an epoch; a batch may span two epochs, so none is ever short.

    Example:
        >>> sampler = EpochSampler(num_rows=5, batch_size=2, seed=0)
        >>> sorted(row for step in range(5) for row in sampler.rows(step))
        [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    """

    def __init__(self, num_rows: int, batch_size: int, seed: Seed):
        if num_rows < 1 or batch_size < 1:
            raise DataError(f"Cannot draw batches of {batch_size} from {num_rows} rows.")
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self._order: tuple[int, np.ndarray] | None = None

    def rows(self, step: int) -> list[int]:
        """Return the row numbers of one step's batch."""
        first = step * self.batch_size
        return [self._row(position) for position in range(first, first + self.batch_size)]

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_rows)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, _generator(self.seed, epoch).permutation(self.num_rows))
        return int(self._order[1][offset])


class SourceSampler:
    """Chooses one source per step, by size with a temperature and a cap.

    Args:
        sizes: Rows of each source.
        temperature: A source is drawn with probability proportional to ``min(size, cap) ** (1 /
            temperature)``; 1 is by size, larger is flatter.
        cap: Size beyond which a source counts no more.
        seed: Seed of the choice.
    """

    def __init__(self, sizes: Sequence[int], temperature: float = 1.0, cap: int | None = None, seed: int = 0):
        weights = np.minimum(np.asarray(sizes, dtype=np.float64), cap or np.inf) ** (1.0 / temperature)
        self.shares = weights / weights.sum()
        self.seed = seed
        self._draws = np.empty(0, dtype=np.int64)

    def choose(self, step: int) -> tuple[int, int]:
        """Return the source of a step, and how many earlier steps drew the same source."""
        if step >= len(self._draws):
            # One uniform number per step from one stream: a longer draw begins with the shorter one.
            uniform = _generator(self.seed).random(max(1024, 2 * (step + 1)))
            self._draws = np.searchsorted(np.cumsum(self.shares)[:-1], uniform, side="right")
        source = int(self._draws[step])
        return source, int((self._draws[:step] == source).sum())


def distinct_rows(
    rows: list[int], num_rows: int, keys: Callable[[int], tuple], seed: Seed, step: int, name: str
) -> list[int]:
    """Replace rows that repeat a text of an earlier row of the batch by other rows of the same source.

    A text that occurs twice in a batch is a false negative: the loss would push a pair away from itself.

    Args:
        rows: Row numbers of the batch.
        num_rows: Rows of the source.
        keys: Row number → the row's texts; no text may occur in two rows.
        seed: Seed of the replacements.
        step: Training step, part of the seed.
        name: Name of the source, for the error.

    Raises:
        DataError: The source has too few distinct rows for the batch.
    """
    seen: set = set()
    chosen: list[int] = []
    spare = _generator(seed, step, 1)
    for wanted in rows:
        row = wanted
        for _ in range(200):
            texts = set(keys(row))
            if not texts & seen:
                break
            row = int(spare.integers(num_rows))
        else:
            raise DataError(
                f"The pair source {name!r} has too few distinct texts for a batch of {len(rows)}; "
                "lower families.tc.batch_size or leave the source out."
            )
        seen |= texts
        chosen.append(row)
    return chosen


__all__ = ["EpochSampler", "SourceSampler", "distinct_rows"]
