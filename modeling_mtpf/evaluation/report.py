"""From records to a report: tables with intervals, paired bootstrap between regimes, and a picture."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ..errors import DataError, RecipeError
from ..settings import nearest
from .records import Key, record_key
from .tasks import all_tasks

BASELINES = ("base", "naive")
"""Regimes that the others are compared with."""

RESAMPLES = 10_000
FEW = 5
"""Fewer tasks than this give no interval over tasks."""

Cells = dict[tuple[str, str, str], dict[int, float]]
"""(protocol, task, regime) → seed → value in percent."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; an interval that too few values do not give is NaN."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} ± {(self.high - self.low) / 2:.2f}"

    def as_difference(self) -> str:
        """With a sign and both bounds: ``+1.00 [+0.50, +1.60]``, or ``+1.00 [–]`` without an interval."""
        bounds = "–" if math.isnan(self.low) else f"{self.low:+.2f}, {self.high:+.2f}"
        return f"{self.mean:+.2f} [{bounds}]"


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
        differences: One value a task: a regime minus the baseline, each the mean over the same seeds. Fewer
            than `FEW`, or all equal ones, give no interval.
        seed: Of the resampling.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < FEW or np.ptp(values) < 1e-9:
        return Interval(float(values.mean()), math.nan, math.nan)
    found = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, rng=np.random.default_rng(seed))
    low, high = found.confidence_interval
    return Interval(float(values.mean()), float(low), float(high))


def gather(records: Sequence[dict[str, Any]]) -> Cells:
    """Sort the values of records, in percent, by protocol, task and regime.

    Raises:
        DataError: As `check_records`.
    """
    check_records(records)
    cells: Cells = defaultdict(dict)
    for record in records:
        key = record["protocol"], record["task"], record["regime"]
        cells[key][int(record["seed"])] = 100 * record["value"]
    return cells


def check_records(records: Sequence[dict[str, Any]]) -> None:
    """Check that records may stand in one table.

    Raises:
        DataError: No records, those of a smoke run, two for one cell, or a task on different data.
    """
    if not records:
        raise DataError("There are no records to report; run eval/benchmark.py first.")
    seen: dict[Key, dict[str, Any]] = {}
    data: dict[str, str] = {}
    for record in records:
        if record["config"].get("quick"):
            raise DataError("These are records of a smoke run (--quick); their numbers mean nothing.")
        key = record_key(record)
        if seen.setdefault(key, record) != record:
            regime, seed, task, protocol = key
            raise DataError(
                f"Two files have different records of regime {regime!r}, {task}, {protocol}, seed {seed}; "
                "give one of them, or rename a regime."
            )
        fingerprint = record["config"].get("data")
        if fingerprint and data.setdefault(key[2], fingerprint) != fingerprint:
            raise DataError(f"The records of {key[2]} were made on different data; compare equal ones.")


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
    """One protocol as a Markdown table: a row a task, a column a regime, then the averages.

    An average is over the tasks that every regime has which has the protocol at all.
    """
    regimes, tasks = regimes_of(cells), tasks_of(cells, protocol)
    rows = [f"| {protocol} | " + " | ".join(f"`{name}`" for name in regimes) + " |"]
    rows.append("|---" * (len(regimes) + 1) + "|")
    for task in tasks:
        own = [cells.get((protocol, task, regime)) for regime in regimes]
        shown = [str(mean_interval(list(seeds.values()))) if seeds else "–" for seeds in own]
        rows.append(f"| {task} | " + " | ".join(shown) + " |")
    having = [regime for regime in regimes if any((protocol, task, regime) in cells for task in tasks)]
    common = [task for task in tasks if all((protocol, task, regime) in cells for regime in having)]
    averages = ["–"] * len(regimes)
    for regime in having if common else ():
        mean = np.mean([np.mean(list(cells[protocol, task, regime].values())) for task in common])
        averages[regimes.index(regime)] = f"**{mean:.2f}**"
    rows.append(f"| average of {len(common)} | " + " | ".join(averages) + " |")
    for baseline in (name for name in BASELINES if name in regimes):
        shown = []
        for regime in regimes:
            differences = common_differences(cells, protocol, regime, baseline)
            if regime == baseline or not differences:
                shown.append("–")
                continue
            shown.append(paired_bootstrap(differences).as_difference())
        rows.append(f"| against `{baseline}` | " + " | ".join(shown) + " |")
    return "\n".join(rows)


def family_table(cells: Cells, families: dict[str, str]) -> str:
    """Averages of each family: over its tasks, each the mean over the protocols and seeds of it.

    What counts is what every regime has which has anything of the family.

    Args:
        cells: All values.
        families: Protocol → family.
    """
    regimes = regimes_of(cells)
    rows = ["| family | " + " | ".join(f"`{name}`" for name in regimes) + " |"]
    rows.append("|---" * (len(regimes) + 1) + "|")
    for family in dict.fromkeys(families.values()):
        protocols = [name for name, own in families.items() if own == family]
        having = [name for name in regimes if any(own in protocols and r == name for own, _, r in cells)]
        means = _family_means(cells, protocols, having)
        count = len(next(iter(means.values())))
        shown = [f"**{np.mean(means[name]):.2f}**" if name in having and count else "–" for name in regimes]
        rows.append(f"| {family} ({', '.join(protocols)}; {count} tasks) | " + " | ".join(shown) + " |")
        for baseline in (name for name in BASELINES if name in having and count):
            shown = [
                paired_bootstrap(np.subtract(means[name], means[baseline])).as_difference()
                if name in having and name != baseline
                else "–"
                for name in regimes
            ]
            rows.append(f"| {family} against `{baseline}` | " + " | ".join(shown) + " |")
    return "\n".join(rows)


def _family_means(cells: Cells, protocols: list[str], regimes: list[str]) -> dict[str, list[float]]:
    """Means by regime, one a task, over the protocols and seeds that all these regimes have of the task."""
    by_task: dict[str, dict[str, list[float]]] = {}
    for protocol in protocols:
        for task in tasks_of(cells, protocol):
            own = {regime: cells.get((protocol, task, regime), {}) for regime in regimes}
            seeds = set.intersection(*(set(values) for values in own.values()))
            for regime in regimes if seeds else ():
                mean = float(np.mean([own[regime][seed] for seed in seeds]))
                by_task.setdefault(task, {}).setdefault(regime, []).append(mean)
    return {regime: [float(np.mean(own[regime])) for own in by_task.values()] for regime in regimes}


def published_table(records: Sequence[dict[str, Any]], encoder: str) -> str:
    """Few-shot accuracies beside those that are published for an encoder, with the mean difference.

    Raises:
        DataError: As `check_records`; records of several regimes, or none of the protocol ``mteb``, seed 0.
        RecipeError: Nothing is published for this encoder.
    """
    known = sorted({name for task in all_tasks() for name in task.published})
    if encoder not in known:
        raise RecipeError(
            f"Nothing is published for {encoder!r}; {nearest(encoder, known)}known: {', '.join(known)}."
        )
    check_records(records)
    published = {task.name: task.published[encoder] for task in all_tasks() if encoder in task.published}
    chosen = [record for record in records if record["protocol"] == "mteb" and record["seed"] == 0]
    regimes = sorted({record["regime"] for record in chosen})
    if len(regimes) != 1:
        there = f"those of {', '.join(regimes)}" if regimes else "none"
        raise DataError(f"Records of mteb with seed 0 of one regime are needed; there are {there}.")
    found = {record["task"]: record for record in chosen}
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
        f"interval over tasks (none below {FEW} tasks). Averages are over what "
        "every regime has that has any of it.",
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


__all__ = [
    "Interval",
    "check_records",
    "draw",
    "gather",
    "mean_interval",
    "paired_bootstrap",
    "published_table",
    "report",
]
