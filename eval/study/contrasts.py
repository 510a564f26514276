"""One regime of the study against another: mean difference, intervals and the permutation test."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from modeling_mtpf.evaluation.statistics import (
    FEW,
    RESAMPLES,
    Cells,
    Interval,
    mean_interval,
    paired_bootstrap,
    paired_differences,
    task_means,
)


@dataclass(frozen=True)
class Contrast:
    """One regime minus another, in points of a protocol.

    Attributes:
        over_tasks: Mean difference with its 95 % bootstrap interval over tasks.
        over_seeds: The same mean with its 95 % t interval over seeds, each the mean over all tasks.
        p_value: Of the paired permutation test over tasks: signs of the differences flipped, two-sided.
        wins: Number of tasks on which the first regime is ahead.
        tasks: Number of tasks.
        seeds: Seeds that both regimes have on all of these tasks.
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
    by_task = paired_differences(cells, protocol, first, second)
    if not by_task:
        return None
    means = task_means(by_task)
    seeds = tuple(sorted(set.intersection(*map(set, by_task.values()))))
    by_seed = [float(np.mean([values[seed] for values in by_task.values()])) for seed in seeds]
    return Contrast(
        paired_bootstrap(means),
        mean_interval(by_seed) if by_seed else Interval(float(np.mean(means))),
        sign_flip_test(means),
        sum(value > 0 for value in means),
        len(means),
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
        return math.nan
    result = stats.permutation_test(
        (np.asarray(differences),),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)
