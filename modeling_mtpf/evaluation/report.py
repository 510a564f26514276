"""From records to a report: tables with intervals, paired bootstrap between regimes, and a picture."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ..errors import DataError
from .tasks import all_tasks

BASELINES = ("base", "naive")
"""Regimes that the others are compared with."""

RESAMPLES = 10_000
Cells = dict[tuple[str, str, str], dict[int, float]]
"""(protocol, task, regime) → seed → value in percent."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; the interval of a single value is unknown (NaN)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} ± {(self.high - self.low) / 2:.2f}"


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of a few seeds by Student's t distribution.

    Example:
        >>> str(mean_interval([1.0, 2.0, 3.0]))
        '2.00 ± 2.48'
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return Interval(mean, mean - half, mean + half)


def paired_bootstrap(differences: Sequence[float] | np.ndarray, seed: int = 0) -> Interval:
    """Mean difference with its 95 % bootstrap interval over tasks (BCa, 10,000 resamples).

    Args:
        differences: One value a task: a regime minus the baseline, each the mean over the same seeds.
        seed: Of the resampling.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or np.ptp(values) == 0:
        return Interval(float(values.mean()), math.nan, math.nan)
    found = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, rng=np.random.default_rng(seed))
    low, high = found.confidence_interval
    return Interval(float(values.mean()), float(low), float(high))


def gather(records: Sequence[dict[str, Any]]) -> Cells:
    """Sort the values of records, in percent, by protocol, task and regime.

    Raises:
        DataError: No records, or those of a smoke run.
    """
    if not records:
        raise DataError("There are no records to report; run eval/benchmark.py first.")
    if any(record["config"].get("quick") for record in records):
        raise DataError("These are records of a smoke run (--quick); their numbers mean nothing.")
    cells: Cells = defaultdict(dict)
    for record in records:
        key = record["protocol"], record["task"], record["regime"]
        cells[key][int(record["seed"])] = 100 * record["value"]
    return cells


def regimes_of(cells: Cells) -> list[str]:
    """Regimes in order: the baselines first, then as they come."""
    found = list(dict.fromkeys(regime for _, _, regime in cells))
    return [name for name in BASELINES if name in found] + [name for name in found if name not in BASELINES]


def tasks_of(cells: Cells, protocol: str) -> list[str]:
    """Tasks of a protocol in order of name."""
    return sorted({task for own, task, _ in cells if own == protocol})


def common_differences(cells: Cells, protocol: str, regime: str, baseline: str) -> list[float]:
    """Differences on every task that both regimes have, each over the seeds that both have."""
    found = []
    for task in tasks_of(cells, protocol):
        one, other = cells.get((protocol, task, regime), {}), cells.get((protocol, task, baseline), {})
        seeds = sorted(one.keys() & other.keys())
        if seeds:
            found.append(float(np.mean([one[seed] - other[seed] for seed in seeds])))
    return found


def table(cells: Cells, protocol: str) -> str:
    """One protocol as a Markdown table: a row a task, a column a regime, then the averages."""
    regimes, tasks = regimes_of(cells), tasks_of(cells, protocol)
    rows = [f"| {protocol} | " + " | ".join(f"`{name}`" for name in regimes) + " |"]
    rows.append("|---" * (len(regimes) + 1) + "|")
    for task in tasks:
        own = [cells.get((protocol, task, regime)) for regime in regimes]
        shown = [str(mean_interval(list(seeds.values()))) if seeds else "–" for seeds in own]
        rows.append(f"| {task} | " + " | ".join(shown) + " |")
    averages = []
    for regime in regimes:
        means = [
            np.mean(list(cells[protocol, t, regime].values()))
            for t in tasks
            if (protocol, t, regime) in cells
        ]
        part = "" if len(means) == len(tasks) else f" ({len(means)} of {len(tasks)})"
        averages.append(f"**{np.mean(means):.2f}**{part}" if means else "–")
    rows.append(f"| average of {len(tasks)} | " + " | ".join(averages) + " |")
    for baseline in (name for name in BASELINES if name in regimes):
        shown = []
        for regime in regimes:
            differences = common_differences(cells, protocol, regime, baseline)
            if regime == baseline or not differences:
                shown.append("–")
                continue
            bound = paired_bootstrap(differences)
            shown.append(f"{bound.mean:+.2f} [{bound.low:+.2f}, {bound.high:+.2f}]")
        rows.append(f"| against `{baseline}` | " + " | ".join(shown) + " |")
    return "\n".join(rows)


def family_table(cells: Cells, families: dict[str, str]) -> str:
    """Averages of each family: over its tasks, each the mean over the protocols that every regime has of it.

    Args:
        cells: All values.
        families: Protocol → family.
    """
    regimes = regimes_of(cells)
    rows = ["| family | " + " | ".join(f"`{name}`" for name in regimes) + " |"]
    rows.append("|---" * (len(regimes) + 1) + "|")
    for family in dict.fromkeys(families.values()):
        protocols = [name for name, own in families.items() if own == family]
        by_task: dict[str, dict[str, list[float]]] = {}
        for protocol in protocols:
            for task in tasks_of(cells, protocol):
                own = {regime: cells.get((protocol, task, regime), {}) for regime in regimes}
                seeds = set.intersection(*(set(values) for values in own.values()))
                for regime in regimes if seeds else ():
                    mean = float(np.mean([own[regime][seed] for seed in seeds]))
                    by_task.setdefault(task, {}).setdefault(regime, []).append(mean)
        means = {r: [float(np.mean(values[r])) for values in by_task.values()] for r in regimes}
        shown = [f"**{np.mean(means[regime]):.2f}**" if by_task else "–" for regime in regimes]
        rows.append(
            f"| {family} ({', '.join(protocols)}; {len(by_task)} tasks) | " + " | ".join(shown) + " |"
        )
        for baseline in (name for name in BASELINES if name in regimes and by_task):
            bounds = [paired_bootstrap(np.subtract(means[regime], means[baseline])) for regime in regimes]
            shown = [
                "–" if regime == baseline else f"{b.mean:+.2f} [{b.low:+.2f}, {b.high:+.2f}]"
                for regime, b in zip(regimes, bounds, strict=True)
            ]
            rows.append(f"| {family} against `{baseline}` | " + " | ".join(shown) + " |")
    return "\n".join(rows)


def published_table(records: Sequence[dict[str, Any]], encoder: str) -> str:
    """Few-shot accuracies beside those that are published for an encoder, with the mean difference."""
    published = {task.name: task.published[encoder] for task in all_tasks() if encoder in task.published}
    found = {
        record["task"]: record for record in records if record["protocol"] == "mteb" and record["seed"] == 0
    }
    rows = ["| task | here | published | difference | sd over draws |", "|---|---|---|---|---|"]
    differences = []
    for name, value in published.items():
        if name not in found:
            rows.append(f"| {name} | – | {value:.2f} | – | – |")
            continue
        own = 100 * found[name]["value"]
        differences.append(abs(own - value))
        spread = 100 * float(np.std(found[name]["config"]["draws"]))
        rows.append(f"| {name} | {own:.2f} | {value:.2f} | {own - value:+.2f} | {spread:.2f} |")
    if differences:
        mean = float(np.mean(differences))
        rows.append(f"| mean absolute difference of {len(differences)} | | | {mean:.2f} | |")
    return "\n".join(rows)


def report(records: Sequence[dict[str, Any]], picture: str | None = None) -> str:
    """Return the whole report in Markdown.

    Args:
        records: Of one or more files.
        picture: Name of a picture to show at the end.
    """
    cells = gather(records)
    protocols = list(dict.fromkeys(protocol for protocol, _, _ in cells))
    seeds = sorted({seed for own in cells.values() for seed in own})
    parts = [
        "Values in percent: strict entity F1 for `ner` and `ner10`, accuracy for `mteb` and `full`; mean ± "
        f"half the 95 % interval over the seeds {', '.join(map(str, seeds))} (t distribution). *Against*: "
        "mean difference over the tasks that both have, paired by task and seed, with its 95 % bootstrap "
        "interval over tasks. Averages of a family are over what every regime has.",
        family_table(cells, {record["protocol"]: record["family"] for record in records}),
        *(table(cells, protocol) for protocol in protocols),
    ]
    if picture:
        parts.append(f"![Differences by task]({picture})")
    return "\n\n".join(parts) + "\n"


def draw(records: Sequence[dict[str, Any]], output: Path) -> None:
    """Draw values by task, a panel a protocol, a mark a regime with its interval over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = gather(records)
    protocols = list(dict.fromkeys(protocol for protocol, _, _ in cells))
    longest = max(len(tasks_of(cells, protocol)) for protocol in protocols)
    figure, axes = plt.subplots(
        1,
        len(protocols),
        figsize=(5 * len(protocols), 1.5 + 0.28 * longest),
        squeeze=False,
        layout="constrained",
    )
    regimes = regimes_of(cells)
    for axis, protocol in zip(axes[0], protocols, strict=True):
        tasks = tasks_of(cells, protocol)
        for position, regime in enumerate(regimes):
            shift = 0.12 * (position - (len(regimes) - 1) / 2)
            points = [(row, cells.get((protocol, task, regime))) for row, task in enumerate(tasks)]
            bounds = [(row + shift, mean_interval(list(own.values()))) for row, own in points if own]
            if bounds:
                axis.errorbar(
                    [bound.mean for _, bound in bounds],
                    [row for row, _ in bounds],
                    xerr=[np.nan_to_num((bound.high - bound.low) / 2) for _, bound in bounds],
                    fmt="o",
                    markersize=4,
                    label=regime,
                )
        axis.set_yticks(range(len(tasks)), tasks, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(protocol, fontsize=10)
        axis.grid(alpha=0.3, axis="x")
        axis.set_xlabel("strict F1, %" if protocol.startswith("ner") else "accuracy, %", fontsize=9)
        axis.legend(fontsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    plt.close(figure)


__all__ = ["Interval", "draw", "gather", "mean_interval", "paired_bootstrap", "published_table", "report"]
