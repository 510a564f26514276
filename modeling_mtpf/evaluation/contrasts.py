"""Differences between two regimes on the same tasks and seeds, with interval and paired test."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from .report import FEW, Cells, Interval, mean_interval, paired_bootstrap, tasks_of


@dataclass(frozen=True)
class Contrast:
    """One regime minus another, in points of a protocol.

    Attributes:
        over_tasks: Mean difference with its 95 % bootstrap interval over tasks (see `report`).
        over_seeds: The same mean with its 95 % t interval over seeds, each the mean over all tasks.
        p_value: Of the paired permutation test over tasks: signs of the differences flipped, two-sided.
        wins: Tasks on which the first is ahead.
        tasks: How many there are.
        seeds: Those that both have on all of these tasks.
    """

    over_tasks: Interval
    over_seeds: Interval
    p_value: float
    wins: int
    tasks: int
    seeds: tuple[int, ...]

    @property
    def sign(self) -> int:
        """1 or -1 where the interval over tasks excludes zero, else 0."""
        return int(self.over_tasks.low > 0) - int(self.over_tasks.high < 0)


def contrast(cells: Cells, protocol: str, first: str, second: str) -> Contrast | None:
    """Compare two regimes on the tasks and seeds of a protocol that both have; ``None`` if there are none."""
    pairs = {}
    for task in tasks_of(cells, protocol):
        one, other = cells.get((protocol, task, first), {}), cells.get((protocol, task, second), {})
        if both := one.keys() & other.keys():
            pairs[task] = {seed: one[seed] - other[seed] for seed in both}
    if not pairs:
        return None
    differences = [float(np.mean(list(own.values()))) for own in pairs.values()]
    seeds = tuple(sorted(set.intersection(*(set(own) for own in pairs.values()))))
    by_seed = [float(np.mean([own[seed] for own in pairs.values()])) for seed in seeds]
    return Contrast(
        paired_bootstrap(differences),
        mean_interval(by_seed) if by_seed else Interval(float(np.mean(differences)), np.nan, np.nan),
        sign_flip_test(differences),
        sum(value > 0 for value in differences),
        len(differences),
        seeds,
    )


def sign_flip_test(differences: Sequence[float]) -> float:
    """Two-sided p-value of the paired permutation test: exact for up to 13 tasks, else of 10,000 draws.

    Below `FEW` tasks it is NaN: no arrangement of signs would be rare.

    Example:
        >>> sign_flip_test([1.0, 2.0, 3.0, 4.0, 5.0])
        0.0625
    """
    if len(differences) < FEW:
        return float("nan")
    found = stats.permutation_test(
        (np.asarray(differences),),
        np.mean,
        permutation_type="samples",
        n_resamples=10_000,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


__all__ = ["Contrast", "contrast", "sign_flip_test"]
