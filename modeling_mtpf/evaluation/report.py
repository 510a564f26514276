"""From benchmark records to a report: tables with intervals, paired bootstrap between regimes, a picture."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, RecipeError
from ..settings import nearest
from .plots import interval_panel, save
from .records import Key, record_key
from .statistics import FEW, Cells, mean_interval, paired_bootstrap, paired_differences, task_means, tasks_of
from .tasks import all_tasks

BASELINES = ("base", "naive")
"""Regimes that the others are compared with."""


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def gather(records: Sequence[dict[str, Any]]) -> Cells:
    """Sort the values of records, in percent, by protocol, task and regime.

    Raises:
        DataError: No records, those of a smoke run, two for one cell, or a task on different data.
    """
    _check_records(records)
    cells: Cells = defaultdict(dict)
    for record in records:
        key = record["protocol"], record["task"], record["regime"]
        cells[key][int(record["seed"])] = 100 * record["value"]
    return cells


def _check_records(records: Sequence[dict[str, Any]]) -> None:
    if not records:
        raise DataError("There are no records to report; run mtpf benchmark first.")
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


def _regimes_of(cells: Cells) -> list[str]:
    """Regimes in order: the baselines first, then as they come."""
    regimes = list(dict.fromkeys(regime for _, _, regime in cells))
    return sorted(regimes, key=lambda name: BASELINES.index(name) if name in BASELINES else len(BASELINES))


def _difference(differences: Sequence[float] | np.ndarray) -> str:
    return paired_bootstrap(differences).as_difference() if len(differences) else "–"


def _protocol_table(cells: Cells, protocol: str) -> str:
    """One protocol: a row a task, a column a regime, then the averages and the comparisons.

    Only tasks measured for every regime that has the protocol at all are averaged.
    """
    regimes, tasks = _regimes_of(cells), tasks_of(cells, protocol)
    rows = []
    for task in tasks:
        by_seed = [cells.get((protocol, task, regime)) for regime in regimes]
        rows.append([task, *(str(mean_interval(list(v.values()))) if v else "–" for v in by_seed)])
    having = [regime for regime in regimes if any((protocol, task, regime) in cells for task in tasks)]
    common = [task for task in tasks if all((protocol, task, regime) in cells for regime in having)]
    means = {r: task_means({t: cells[protocol, t, r] for t in common}) for r in having if common}
    averages = [f"**{np.mean(means[regime]):.2f}**" if regime in means else "–" for regime in regimes]
    rows.append([f"average of {len(common)}", *averages])
    for baseline in (name for name in BASELINES if name in regimes):
        differences = [
            task_means(paired_differences(cells, protocol, regime, baseline)) if regime != baseline else []
            for regime in regimes
        ]
        rows.append([f"against `{baseline}`", *map(_difference, differences)])
    return markdown_table([protocol, *(f"`{name}`" for name in regimes)], rows)


def _family_table(cells: Cells, families: dict[str, str]) -> str:
    """Averages of each family over its tasks, each the mean over the task's protocols and seeds.

    Only tasks and seeds measured for every regime that has the family at all are averaged. ``families`` maps
    protocols to families.
    """
    regimes = _regimes_of(cells)
    rows = []
    for family in dict.fromkeys(families.values()):
        protocols = [protocol for protocol in families if families[protocol] == family]
        having = [r for r in regimes if any(p in protocols and name == r for p, _, name in cells)]
        means = _family_means(cells, protocols, having)
        count = len(next(iter(means.values())))
        averages = [f"**{np.mean(means[r]):.2f}**" if r in having and count else "–" for r in regimes]
        measured = f"mean of {' and '.join(protocols)}" if len(protocols) > 1 else protocols[0]
        rows.append([f"{family} ({measured}; {count} tasks)", *averages])
        for baseline in (name for name in BASELINES if name in having and count):
            others: dict[str, Any] = {
                r: np.subtract(means[r], means[baseline]) for r in having if r != baseline
            }
            differences = [_difference(others.get(r, [])) for r in regimes]
            rows.append([f"{family} against `{baseline}`", *differences])
    return markdown_table(["family", *(f"`{name}`" for name in regimes)], rows)


def _family_means(cells: Cells, protocols: list[str], regimes: list[str]) -> dict[str, list[float]]:
    """Means by regime, one a task, over the protocols and seeds that all these regimes have of the task."""
    by_task: dict[str, dict[str, list[float]]] = {}
    for protocol in protocols:
        for task in tasks_of(cells, protocol):
            values = {regime: cells.get((protocol, task, regime), {}) for regime in regimes}
            seeds = set.intersection(*map(set, values.values()))
            for regime in regimes if seeds else ():
                mean = float(np.mean([values[regime][seed] for seed in seeds]))
                by_task.setdefault(task, {}).setdefault(regime, []).append(mean)
    return {regime: [float(np.mean(means[regime])) for means in by_task.values()] for regime in regimes}


def published_table(records: Sequence[dict[str, Any]], encoder: str) -> str:
    """Few-shot accuracies next to the published ones of an encoder, with the mean difference.

    Raises:
        DataError: As `gather`; records of several regimes, or none of the protocol ``mteb``, seed 0.
        RecipeError: Nothing is published for this encoder.
    """
    names = sorted({name for task in all_tasks() for name in task.published})
    if encoder not in names:
        known = f"{nearest(encoder, names)}known: {', '.join(names)}"
        raise RecipeError(f"Nothing is published for {encoder!r}; {known}.")
    _check_records(records)
    chosen = [record for record in records if record["protocol"] == "mteb" and record["seed"] == 0]
    regimes = sorted({record["regime"] for record in chosen})
    if len(regimes) != 1:
        there = f"those of {', '.join(regimes)}" if regimes else "none"
        raise DataError(f"Records of mteb with seed 0 of one regime are needed; there are {there}.")
    by_task = {record["task"]: record for record in chosen}
    rows: list[list[str]] = []
    differences: list[float] = []
    for task in (task for task in all_tasks() if encoder in task.published):
        published, record = task.published[encoder], by_task.get(task.name)
        if record is None:
            rows.append([task.name, "–", f"{published:.2f}", "–", "–"])
            continue
        here, spread = 100 * record["value"], 100 * float(np.std(record["config"]["draws"]))
        differences.append(here - published)
        rows.append(
            [task.name, f"{here:.2f}", f"{published:.2f}", f"{here - published:+.2f}", f"{spread:.2f}"]
        )
    if differences:
        mean = f"{np.mean(np.abs(differences)):.2f}"
        rows.append([f"mean absolute difference of {len(differences)}", "", "", mean, ""])
    return markdown_table(["task", "here", "published", "difference", "sd over draws"], rows)


def report(records: Sequence[dict[str, Any]], picture: str | None = None) -> str:
    """Return the whole report in Markdown, with a picture of that file name at the end."""
    cells = gather(records)
    protocols = dict.fromkeys(protocol for protocol, _, _ in cells)
    seeds = sorted({seed for by_seed in cells.values() for seed in by_seed})
    parts = [
        "Values in percent: strict entity F1 for `ner` and `ner10`, accuracy for `mteb` and `full`; mean ± "
        f"half the 95 % interval over the seeds {', '.join(map(str, seeds))} (t distribution). *Against*: "
        "mean difference over the tasks that both have, paired by task and seed, with its 95 % bootstrap "
        f"interval over tasks (none below {FEW} tasks). Only tasks measured for every regime are averaged; "
        "a regime without any of a protocol or family does not count there.",
        _family_table(cells, {record["protocol"]: record["family"] for record in records}),
        *(_protocol_table(cells, protocol) for protocol in protocols),
    ]
    parts += [f"![Values by task]({picture})"] if picture else []
    return "\n\n".join(parts) + "\n"


def draw(records: Sequence[dict[str, Any]], output: Path) -> None:
    """Draw values by task, a panel a protocol, a mark a regime with its interval over seeds."""
    from matplotlib.figure import Figure

    cells = gather(records)
    protocols = list(dict.fromkeys(protocol for protocol, _, _ in cells))
    longest = max(len(tasks_of(cells, protocol)) for protocol in protocols)
    figure = Figure(figsize=(5 * len(protocols), 1.5 + 0.28 * longest), layout="constrained")
    axes = figure.subplots(1, len(protocols), squeeze=False)
    for axis, protocol in zip(axes[0], protocols, strict=True):
        tasks = tasks_of(cells, protocol)
        series = {
            regime: {
                task: mean_interval(list(values.values()))
                for task in tasks
                if (values := cells.get((protocol, task, regime)))
            }
            for regime in _regimes_of(cells)
        }
        interval_panel(axis, tasks, series, spacing=0.12, title=protocol)
        axis.set_xlabel("strict F1, %" if protocol.startswith("ner") else "accuracy, %", fontsize=9)
    save(figure, output)
