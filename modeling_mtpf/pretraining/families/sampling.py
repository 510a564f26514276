"""Which rows make the batch of a step: pure functions of (seed, step), so resuming is starting at a step."""

from collections.abc import Callable, Sequence

import numpy as np

from ...errors import DataError

Seed = int | tuple[int, ...]


def extended(seed: Seed, *more: int) -> tuple[int, ...]:
    """Return a seed with further numbers."""
    return (*(seed if isinstance(seed, tuple) else (seed,)), *more)


def _generator(seed: Seed, *more: int) -> np.random.Generator:
    key = extended(seed, *more)
    # The length keeps apart keys that differ by zeros at their end, which numpy ignores.
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((*key, len(key)))))


class Shuffle:
    """A pseudo-random permutation of ``range(size)`` that needs no memory and gives any element at once.

    A Feistel network over the next even number of bits, with cycle walking for numbers beyond ``size``
    (Black and Rogaway, 2002); an array of hundreds of millions of rows would need gigabytes in each process.

    Example:
        >>> sorted(Shuffle(5, seed=0)(np.arange(5)).tolist())
        [0, 1, 2, 3, 4]
    """

    ROUNDS = 6

    def __init__(self, size: int, seed: Seed):
        self.size = size
        self.half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self.keys = _generator(seed).integers(1 << 63, size=self.ROUNDS, dtype=np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return the elements at some positions, int64."""
        values = self._encrypt(np.asarray(positions, dtype=np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        mask = np.uint64((1 << int(self.half_bits)) - 1)
        left, right = values >> self.half_bits, values & mask
        for key in self.keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        return left << self.half_bits | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers (the finaliser of splitmix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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

    def rows(self, step: int) -> list[int]:
        """Return the row numbers of one step's batch."""
        positions = step * self.batch_size + np.arange(self.batch_size)
        epochs, offsets = np.divmod(positions, self.num_rows)
        rows = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            rows[of_epoch] = Shuffle(self.num_rows, extended(self.seed, int(epoch)))(offsets[of_epoch])
        return rows.tolist()


class SourceSampler:
    """Chooses one source per step, drawn in proportion to ``min(size, cap) ** (1 / temperature)``."""

    def __init__(self, sizes: Sequence[int], temperature: float = 1.0, cap: int | None = None, seed: int = 0):
        weights = np.minimum(np.asarray(sizes, dtype=np.float64), cap or np.inf) ** (1.0 / temperature)
        self.shares = weights / weights.sum()
        self.seed = seed
        self._draws = np.empty(0, dtype=np.int64)
        self._turns = np.empty(0, dtype=np.int64)

    def choose(self, step: int) -> tuple[int, int]:
        """Return the source of a step, and how many earlier steps drew the same source."""
        if step >= len(self._draws):
            # One uniform number per step from one stream: a longer draw begins with the shorter one.
            uniform = _generator(self.seed).random(max(1024, 2 * (step + 1)))
            self._draws = np.searchsorted(np.cumsum(self.shares)[:-1], uniform, side="right")
            self._turns = np.empty_like(self._draws)
            for source in range(len(self.shares)):
                steps = np.flatnonzero(self._draws == source)
                self._turns[steps] = np.arange(len(steps))
        return int(self._draws[step]), int(self._turns[step])


def distinct_rows(
    rows: list[int],
    num_rows: int,
    keys: Callable[[list[int]], Sequence[Sequence[int]]],
    seed: Seed,
    step: int,
    name: str,
) -> list[int]:
    """Replace rows that repeat a text of an earlier row of the batch by other rows of the same source.

    A text that occurs twice in a batch is a false negative: the loss would push a pair away from itself.

    Args:
        rows: Row numbers of the batch.
        num_rows: Rows of the source.
        keys: Row numbers → the texts of each; no text may occur in two rows.
        seed: Of the replacements.
        step: Part of the seed.
        name: Of the source.

    Raises:
        DataError: The source has too few distinct rows for the batch.
    """
    chosen = list(rows)
    seen: set[int] = set()
    spare = _generator(seed, step, 1)
    open_positions = list(range(len(rows)))
    for _ in range(200):
        clashing = []
        texts_of_rows = keys([chosen[position] for position in open_positions])
        for position, texts in zip(open_positions, texts_of_rows, strict=True):
            if seen.isdisjoint(texts):
                seen.update(texts)
            else:
                clashing.append(position)
        if not clashing:
            return chosen
        for position in clashing:
            chosen[position] = int(spare.integers(num_rows))
        open_positions = clashing
    raise DataError(
        f"The pair source {name!r} has too few distinct texts for a batch of {len(rows)}; "
        "lower families.tc.batch_size or leave the source out."
    )
