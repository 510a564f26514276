"""Tables and picture of the study of composed apps, from its records, and the page that holds them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.studies import fill
from eval.study.contrasts import contrast
from modeling_mtpf.evaluation.plots import interval_panel, save
from modeling_mtpf.evaluation.report import gather, markdown_table
from modeling_mtpf.evaluation.statistics import Cells, mean_interval, tasks_of

PAGE, PICTURE = "composition_results.md", "composition.svg"
PROTOCOLS = {"slots": "slots, strict F1", "intents": "intent, accuracy", "further": "further apps"}
REFERENCES = ("separate", "separate-heads", "joint")
LEARNED, MERGES = "lc++", ("mean", "sum", "ties", "dare", "lorahub", "lc++-labels")
"""The method that learns without labels, and what it is compared with."""

Records = Sequence[dict[str, Any]]


def groups_of(records: Records, references: Sequence[str] = REFERENCES) -> dict[str, list[str]]:
    """Return ``backbone/group`` → its methods, the references first."""
    groups: dict[str, list[str]] = {}
    for regime in sorted({record["regime"] for record in records}):
        group, _, method = regime.rpartition("/")
        groups.setdefault(group, []).append(method)
    order = {method: number for number, method in enumerate(references)}
    return {group: sorted(methods, key=lambda m: order.get(m, 9)) for group, methods in groups.items()}


def seed_means(cells: Cells, protocol: str, regime: str) -> list[float]:
    """Return the mean over all tasks of the protocol for each seed that has all of them."""
    tasks = tasks_of(cells, protocol)
    by_task = [cells.get((protocol, task, regime), {}) for task in tasks]
    seeds = sorted(set.intersection(*map(set, by_task))) if by_task else []
    return [float(np.mean([values[seed] for values in by_task])) for seed in seeds]


def averages(records: Records) -> str:
    """Means over the tasks, and what a method costs."""
    cells, rows = gather(records), []
    for group, methods in groups_of(records).items():
        within = {key: v for key, v in cells.items() if key[2].rpartition("/")[0] == group}
        every = {m: {name: seed_means(within, name, f"{group}/{m}") for name in PROTOCOLS} for m in methods}
        most = max(len(means["slots"]) for means in every.values())
        for method, means in every.items():
            regime, seeds = f"{group}/{method}", len(means["slots"])
            costs = [record["config"]["cost"] for record in records if record["regime"] == regime]
            shown = [str(mean_interval(values)) if values else "–" for values in means.values()]
            cost = {key: float(np.mean([one[key] for one in costs])) for key in costs[0]}
            formats = ("bytes", 1e-6, ".2f"), ("cpu_seconds", 1, ".0f"), ("cpu_ms_a_text", 1, ".1f")
            sizes = [f"{cost[key] * by:{form}}" if key in cost else "–" for key, by, form in formats]
            rows.append(
                [group, f"`{method}`", *shown, f"{seeds} of {most}" if seeds < most else str(seeds), *sizes]
            )
    head = ["apps", "method", *PROTOCOLS.values(), "seeds", "MB", "CPU s to make", "CPU ms a text"]
    return markdown_table(head, rows)


def differences(records: Records) -> str:
    """Each method minus the references, and `LEARNED` minus `MERGES`, with the 95 % interval over seeds."""
    cells, rows = gather(records), []
    for group, methods in groups_of(records).items():
        pairs = [(m, r) for number, m in enumerate(methods) for r in REFERENCES if r in methods[:number]]
        pairs += [(LEARNED, merge) for merge in MERGES if {LEARNED, merge} <= set(methods)]
        for method, reference in pairs:
            row = [group, f"`{method}` − `{reference}`"]
            for protocol in PROTOCOLS:
                result = contrast(cells, protocol, f"{group}/{method}", f"{group}/{reference}")
                row.append(result.over_seeds.as_difference() if result else "–")
            rows.append(row)
    return markdown_table(["apps", "difference", *PROTOCOLS.values()], rows)


def tasks(records: Records) -> str:
    """Every task: mean over seeds with its interval, slots / intent."""
    cells, rows = gather(records), []
    names = tasks_of(cells, "slots")
    for group, methods in groups_of(records).items():
        for method in methods:
            row = [group, f"`{method}`"]
            for task in names:
                found = [cells.get((name, task, f"{group}/{method}")) for name in ("slots", "intents")]
                row.append(" / ".join(str(mean_interval(list(v.values()))) if v else "–" for v in found))
            rows.append(row)
    return markdown_table(["apps", "method", *names], rows)


TABLES = {"averages": averages, "differences": differences, "tasks": tasks}


def draw(records: Records, file: Path) -> None:
    """Draw each method's distance to separate apps, a panel a metric, with the interval over seeds."""
    from matplotlib.figure import Figure

    cells, groups = gather(records), groups_of(records)
    rows = list(dict.fromkeys(m for methods in groups.values() for m in methods if m != REFERENCES[0]))
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(rows)), layout="constrained")
    for axis, protocol in zip(figure.subplots(1, 2), ("slots", "intents"), strict=True):
        series = {
            group: {
                method: result.over_seeds
                for method in methods
                if method in rows
                and (result := contrast(cells, protocol, f"{group}/{method}", f"{group}/{REFERENCES[0]}"))
            }
            for group, methods in groups.items()
        }
        interval_panel(
            axis, rows, series, spacing=0.2, title=f"{PROTOCOLS[protocol]}: points over separate apps"
        )
        axis.axvline(0, color="grey", linewidth=1)
    save(figure, file)


def write_report(records: Records, docs: Path) -> list[Path]:
    """Fill in the page and draw the picture; return the files."""
    page, picture = docs / PAGE, docs / PICTURE
    page.write_text(fill(page.read_text("utf-8"), "composition", TABLES, records), "utf-8")
    draw(records, picture)
    return [page, picture]
