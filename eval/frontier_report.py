"""Table and picture of the frontier of apps, from the records of ``frontier.py`` and its peers.

    python eval/frontier_report.py eval/results/frontier-*.json --page docs/apps.md --picture docs/apps.svg

The table replaces what the page has between its markers. A mean is over the sets of means over the seeds that
the row has; differences are over the cells that both have, with intervals over the sets.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from modeling_mtpf.evaluation.plots import decorate, save
from modeling_mtpf.evaluation.records import read_records
from modeling_mtpf.evaluation.statistics import paired_bootstrap
from modeling_mtpf.settings import ScriptParser

ROWS = {
    "ner": {
        "tpl": "`tpl`",
        "small": "`small`",
        "medium": "`medium` (default)",
        "large": "`large`",
        "full": "full fine-tuning",
    },
    "tc": {
        "probe": "`probe`",
        "small": "`lora`",
        "auto": "`auto` (default)",
        "linear": "sentence-transformers + logistic regression",
        "setfit": "SetFit",
        "full": "full fine-tuning",
    },
}
AGAINST = {"ner": ("full",), "tc": ("linear", "setfit")}
MARKERS = "<!-- frontier {} -->", "<!-- /frontier {} -->"

Values = dict[str, dict[tuple[str, int], dict[str, Any]]]


def cells_of(records: list[dict[str, Any]], family: str) -> Values:
    """Return regime, without its options, → (set, seed) → record."""
    values: Values = defaultdict(dict)
    for record in records:
        if record["family"] == family and record["protocol"] == "frontier":
            name = record["regime"].partition(":")[0]
            values[name][record["task"], record["seed"]] = record
    for cell, probe in values.get("probe", {}).items():  # `auto` keeps the better one by validation
        if lora := values.get("small", {}).get(cell):
            both = {"cpu_seconds": probe["cpu_seconds"] + lora["cpu_seconds"]}
            better = probe if probe["validation"] >= lora["validation"] else lora
            values["auto"][cell] = {**better, **both}
    return values


def table(records: list[dict[str, Any]], family: str) -> str:
    """Return the Markdown table of a family."""
    values, peers = cells_of(records, family), AGAINST[family]
    times = {r["regime"]: r for r in records if r["protocol"] == "frontier-times"}
    metric = "strict F1" if family == "ner" else "accuracy"
    against = " | ".join(f"against {ROWS[family][peer]}" for peer in peers)
    head = f"| | {metric} | {against} | sets × seeds | MB | CPU s |"
    head += " ms a text | ms, with a second |" if family == "ner" else ""
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for regime, name in ROWS[family].items():
        if not (cells := values.get(regime)):
            continue
        tasks = sorted({task for task, _ in cells})
        mean = np.mean([np.mean([r["value"] for (t, _), r in cells.items() if t == task]) for task in tasks])
        size = np.median([r["bytes"] for r in cells.values() if r.get("bytes")] or [np.nan]) / 1e6
        seconds = np.median([r["cpu_seconds"] for r in cells.values()])
        columns = [name, f"{100 * mean:.1f}", *(difference(values, regime, peer) for peer in peers)]
        columns += [str(len(cells)), "–" if np.isnan(size) else f"{size:.2f}", f"{seconds:.0f}"]
        if family == "ner":
            time = times.get(regime, {})
            columns += [f"{time[key]:.1f}" if key in time else "–" for key in ("alone", "two")]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def difference(values: Values, regime: str, reference: str) -> str:
    """Return the mean difference in points with its interval over the sets."""
    by_task = defaultdict(list)
    for cell, record in values[regime].items():
        if cell in values.get(reference, {}):
            by_task[cell[0]].append(100 * (record["value"] - values[reference][cell]["value"]))
    if regime == reference or not by_task:
        return "–"
    return paired_bootstrap([np.mean(of_task) for of_task in by_task.values()]).as_difference()


def picture(records: list[dict[str, Any]]) -> Figure:
    """Draw F1 of the NER apps against their size, with a mark for each set."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    values = cells_of(records, "ner")
    shown = [name for name in ("small", "tpl", "medium", "large") if name in values]
    tasks = sorted({task for name in shown for task, _ in values[name]})
    full = _by_task(values, "full")
    for task in tasks:
        points = [(r, _by_task(values, r)[task]) for r in shown if r != "tpl" and task in _by_task(values, r)]
        sizes = [_size(values, name) for name, _ in points]
        left.plot(sizes, [value - full.get(task, np.nan) for _, value in points], marker="o", label=task)
    left.axhline(0, color="0.4", linewidth=1, linestyle="--")
    left.set_xlabel("MB on disk (small, medium, large)")
    left.set_ylabel("F1 − full fine-tuning, points")
    decorate(left, "NER apps by size, mean over seeds")
    times = {r["regime"]: r for r in records if r["protocol"] == "frontier-times"}
    for name in shown:
        if name in times:
            mean = np.mean(list(_by_task(values, name).values()))
            right.plot([times[name]["alone"], times[name]["two"]], [mean, mean], marker="o", label=name)
    right.set_xlabel("ms a text: alone, and with a second app of its size")
    right.set_ylabel("strict F1, mean of the sets")
    decorate(right, "What a size costs in prediction")
    return figure


def _by_task(values: Values, regime: str) -> dict[str, float]:
    by_task = defaultdict(list)
    for (task, _), record in values.get(regime, {}).items():
        by_task[task].append(100 * record["value"])
    return {task: float(np.mean(of_task)) for task, of_task in by_task.items()}


def _size(values: Values, regime: str) -> float:
    return float(np.median([record["bytes"] for record in values[regime].values()])) / 1e6


def main() -> None:
    """Write the tables into the page, and the picture."""
    parser = ScriptParser(description=__doc__)
    parser.add_argument("records", nargs="+")
    parser.add_argument("--page", required=True)
    parser.add_argument("--picture", required=True)
    arguments = parser.parse_args()
    records = [record for path in arguments.records for record in read_records(path)]
    page = Path(arguments.page)
    text = page.read_text("utf-8")
    for family in ROWS:
        first, last = (marker.format(family) for marker in MARKERS)
        before, _, rest = text.partition(first)
        text = f"{before}{first}\n{table(records, family)}\n{last}{rest.partition(last)[2]}"
    page.write_text(text, "utf-8")
    save(picture(records), Path(arguments.picture))


if __name__ == "__main__":
    main()
