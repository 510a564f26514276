"""Statistics over tasks and seeds: intervals, and paired differences between two regimes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000
"""Resamples of the bootstrap."""
FEW = 5
"""Fewer tasks than this give no interval."""

Cells = dict[tuple[str, str, str], dict[int, float]]
"""(protocol, task, regime) → seed → value in percent."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; the bounds are NaN where there are too few values for one."""

    mean: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if math.isnan(self.low) else f" ± {(self.high - self.low) / 2:.2f}")

    def as_difference(self) -> str:
        """With a sign and both bounds: ``+1.00 [+0.50, +1.60]``, or ``+1.00 [–]`` without an interval."""
        return f"{self.mean:+.2f} {'[–]' if math.isnan(self.low) else self.bounds()}"

    def bounds(self) -> str:
        """Both bounds: ``[+0.50, +1.60]``, or ``–`` without an interval."""
        return "–" if math.isnan(self.low) else f"[{self.low:+.2f}, {self.high:+.2f}]"


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of a few seeds by Student's t distribution.

    Example:
        >>> str(mean_interval([1.0, 2.0, 3.0]))
        '2.00 ± 2.48'
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean)
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return Interval(mean, mean - half, mean + half)


def paired_bootstrap(differences: Sequence[float] | np.ndarray) -> Interval:
    """Mean difference with its 95 % bootstrap interval over tasks (BCa, 10,000 resamples).

    The differences are one a task: a regime minus the baseline, each the mean over the same seeds. Fewer than
    `FEW`, or all equal ones, give no interval.
    """
    values = np.asarray(differences, dtype=float)
    mean = float(values.mean())
    if len(values) < FEW or np.ptp(values) < 1e-9:
        return Interval(mean)
    result = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, rng=np.random.default_rng(0))
    return Interval(mean, *map(float, result.confidence_interval))


def tasks_of(cells: Cells, protocol: str) -> list[str]:
    """Tasks of a protocol in order of name."""
    return sorted({task for name, task, _ in cells if name == protocol})


def paired_differences(cells: Cells, protocol: str, first: str, second: str) -> dict[str, dict[int, float]]:
    """Task → seed → value of the first regime minus the second, for all tasks and seeds that both have."""
    differences = {}
    for task in tasks_of(cells, protocol):
        one, other = cells.get((protocol, task, first), {}), cells.get((protocol, task, second), {})
        if seeds := sorted(one.keys() & other.keys()):
            differences[task] = {seed: one[seed] - other[seed] for seed in seeds}
    return differences


def task_means(by_task: dict[str, dict[int, float]]) -> list[float]:
    """Mean over the seeds of each task."""
    return [float(np.mean(list(by_seed.values()))) for by_seed in by_task.values()]
