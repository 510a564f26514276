"""Pictures of the study: regimes by task, gradient conflict by layer, curves of the runs."""

from collections import defaultdict
from pathlib import Path

import numpy as np

from eval.study.records import FAMILIES, NAMES, REGIMES, Study
from eval.study.tables import layer_place
from modeling_mtpf.evaluation.report import mean_interval, tasks_of

COLOURS = {"base": "0.5", "ner": "tab:blue", "tc": "tab:orange", "naive": "tab:red", "tpl": "tab:green"}


def draw_pictures(study: Study, folder: Path, prefix: str) -> list[Path]:
    """Draw all pictures as SVG files whose bytes depend on the records alone, and return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "mtpf"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for start in study.starts:
        for name, draw in (("tasks", _tasks), ("gradients", _gradients), ("curves", _curves)):
            figure = draw(plt, study, start)
            if figure is not None:
                drawn.append(folder / f"{prefix}-{name}-{start}.svg")
                figure.savefig(drawn[-1], metadata={"Date": None})
                plt.close(figure)
    return drawn


def _tasks(plt, study: Study, start: str):
    """Points over base by task, a panel a family, a mark a regime with its interval over seeds."""
    figure, axes = plt.subplots(1, len(FAMILIES), figsize=(11, 5), layout="constrained")
    for axis, protocol in zip(axes, FAMILIES.values(), strict=True):
        tasks = [t for t in tasks_of(study.cells, protocol) if (protocol, t, f"{start}/base") in study.cells]
        for position, regime in enumerate(REGIMES[1:]):
            rows, bounds = [], []
            for row, task in enumerate(tasks):
                own = study.cells.get((protocol, task, f"{start}/{regime}"), {})
                base = study.cells[protocol, task, f"{start}/base"]
                if seeds := sorted(own.keys() & base.keys()):
                    rows.append(row + 0.17 * (position - 1.5))
                    bounds.append(mean_interval([own[seed] - base[seed] for seed in seeds]))
            if rows:
                axis.errorbar(
                    [bound.mean for bound in bounds],
                    rows,
                    xerr=[np.nan_to_num((bound.high - bound.low) / 2) for bound in bounds],
                    fmt="o",
                    markersize=4,
                    color=COLOURS[regime],
                    label=regime,
                )
        axis.axvline(0, color=COLOURS["base"], linewidth=1)
        axis.set_yticks(range(len(tasks)), tasks, fontsize=8)
        axis.invert_yaxis()
        axis.grid(alpha=0.3, axis="x")
        axis.set_title(f"{NAMES[protocol]}: points over base ({start})", fontsize=10)
        if axis.has_data():
            axis.legend(fontsize=8)
    return figure


def _gradients(plt, study: Study, start: str):
    """Cosine between the families' gradients by layer, a line a regime, a thin one each seed."""
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    lines = 0
    for run in study.runs:
        own_start, regime = run["variant"].split("/", 1)
        cosines = {
            key.split("/")[1]: float(np.mean(values))
            for key, values in run["diagnostics"].items()
            if key.startswith("gradient_cosine/") and not key.endswith("/all")
        }
        if own_start == start and regime in REGIMES and cosines:
            layers = sorted(cosines, key=layer_place)
            axis.plot(
                range(len(layers)),
                [cosines[layer] for layer in layers],
                color=COLOURS[regime],
                linewidth=1,
                label=regime if run["seed"] == 0 else None,
            )
            axis.set_xticks(range(len(layers)), [layer.replace("_", " ") for layer in layers], fontsize=8)
            lines += 1
    axis.axhline(0, color="0.5", linewidth=0.8)
    axis.set_title(f"Cosine between the families' gradients ({start})", fontsize=10)
    axis.grid(alpha=0.3)
    if lines:
        if axis.has_data():
            axis.legend(fontsize=8)
        return figure
    plt.close(figure)
    return None


CURVES = {
    "loss/ner": "NER loss",
    "pseudo_label_accuracy/ner": "pseudo-label accuracy",
    "loss/tc": "TC loss",
    "retrieval_accuracy/tc": "in-batch retrieval accuracy",
}


def _curves(plt, study: Study, start: str):
    """Losses and accuracies by step: means over seeds, smoothed over nine logged lines."""
    found = defaultdict(list)
    for run in study.runs:
        own_start, regime = run["variant"].split("/", 1)
        if own_start == start and regime in REGIMES:
            for key in run["curves"].keys() & CURVES.keys():
                found[key, regime].append((run["steps"], run["curves"][key]))
    if not found:
        return None
    figure, axes = plt.subplots(1, len(CURVES), figsize=(13, 3), layout="constrained")
    for axis, (key, title) in zip(axes, CURVES.items(), strict=True):
        for regime in REGIMES:
            runs = found.get((key, regime), [])
            if runs:
                shortest = min(len(values) for _, values in runs)
                mean = np.mean([values[:shortest] for _, values in runs], axis=0)
                window = min(9, shortest)
                smooth = np.convolve(mean, np.ones(window) / window, mode="valid")
                axis.plot(runs[0][0][window - 1 : shortest], smooth, color=COLOURS[regime], label=regime)
        axis.set_title(f"{title} ({start})", fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    return figure


__all__ = ["draw_pictures"]
