"""Pictures of the study: regimes by task, gradient conflict by layer, curves of the runs."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from eval.study.records import MAIN_PROTOCOLS, NAMES, REGIMES, Study
from eval.study.tables import layer_order
from modeling_mtpf.evaluation.plots import decorate, interval_panel, save
from modeling_mtpf.evaluation.statistics import mean_interval, paired_differences, tasks_of

COLOURS = {"base": "0.5", "ner": "tab:blue", "tc": "tab:orange", "naive": "tab:red", "tpl": "tab:green"}
CURVES = {
    "loss/ner": "NER loss",
    "pseudo_label_accuracy/ner": "pseudo-label accuracy",
    "loss/tc": "TC loss",
    "retrieval_accuracy/tc": "in-batch retrieval accuracy",
}


def draw_pictures(study: Study, folder: Path, prefix: str) -> list[Path]:
    """Draw all pictures as SVG files whose bytes depend on the records alone, and return their paths."""
    figures: dict[str, Figure | None] = {"summary": _summary(study)} if study.starts else {}
    for start in study.starts:
        figures[f"tasks-{start}"] = _tasks(study, start)
        figures[f"gradients-{start}"] = _gradients(study, start)
        figures[f"curves-{start}"] = _curves(study, start)
    paths = {folder / f"{prefix}-{name}.svg": figure for name, figure in figures.items() if figure}
    for path, figure in paths.items():
        save(figure, path)
    return list(paths)


def _summary(study: Study) -> Figure:
    """Points over base of each regime with the interval over tasks, a panel a family, a mark a start."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots(1, len(MAIN_PROTOCOLS))
    for axis, protocol in zip(axes, MAIN_PROTOCOLS.values(), strict=True):
        series = {
            f"from the {start} encoder": {
                regime: contrast.over_tasks
                for regime in REGIMES[1:]
                if (contrast := study.contrast(protocol, f"{start}/{regime}", f"{start}/base"))
            }
            for start in study.starts
        }
        interval_panel(axis, REGIMES[1:], series, spacing=0.3, title=f"{NAMES[protocol]}: points over base")
        axis.axvline(0, color=COLOURS["base"], linewidth=1)
    return figure


def _tasks(study: Study, start: str) -> Figure:
    """Points over base by task, a panel a family, a mark a regime with its interval over seeds."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, len(MAIN_PROTOCOLS))
    for axis, protocol in zip(axes, MAIN_PROTOCOLS.values(), strict=True):
        base = f"{start}/base"
        tasks = [task for task in tasks_of(study.cells, protocol) if (protocol, task, base) in study.cells]
        series = {
            regime: {
                task: mean_interval(list(by_seed.values()))
                for task, by_seed in paired_differences(
                    study.cells, protocol, f"{start}/{regime}", base
                ).items()
            }
            for regime in REGIMES[1:]
        }
        title = f"{NAMES[protocol]}: points over base ({start})"
        interval_panel(axis, tasks, series, spacing=0.17, title=title, colours=COLOURS)
        axis.axvline(0, color=COLOURS["base"], linewidth=1)
    return figure


def _runs_of(study: Study, start: str) -> list[tuple[str, dict[str, Any]]]:
    """Regime and summary of all runs of the regimes from a starting encoder."""
    runs = [(*run["variant"].split("/", 1), run) for run in study.runs]
    return [(regime, run) for encoder, regime, run in runs if encoder == start and regime in REGIMES]


def _gradients(study: Study, start: str) -> Figure | None:
    """Cosine between the families' gradients by layer, a line for each run."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    for regime, run in _runs_of(study, start):
        cosines = {
            key.split("/")[1]: float(np.mean(values))
            for key, values in run["diagnostics"].items()
            if key.startswith("gradient_cosine/") and not key.endswith("/all")
        }
        if cosines:
            layers = sorted(cosines, key=layer_order)
            axis.plot(
                range(len(layers)),
                [cosines[layer] for layer in layers],
                color=COLOURS[regime],
                linewidth=1,
                label=regime if run["seed"] == 0 else None,
            )
            axis.set_xticks(range(len(layers)), [layer.replace("_", " ") for layer in layers], fontsize=8)
    if not axis.lines:
        return None
    axis.axhline(0, color="0.5", linewidth=0.8)
    decorate(axis, f"Cosine between the families' gradients ({start})")
    return figure


def _curves(study: Study, start: str) -> Figure | None:
    """Losses and accuracies by step: means over seeds, smoothed over nine logged lines."""
    curves = defaultdict(list)
    for regime, run in _runs_of(study, start):
        for key in run["curves"].keys() & CURVES.keys():
            curves[key, regime].append((run["steps"], run["curves"][key]))
    if not curves:
        return None
    figure = Figure(figsize=(13, 3), layout="constrained")
    for axis, (key, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for regime in REGIMES:
            if runs := curves.get((key, regime)):
                shortest = min(len(values) for _, values in runs)
                mean = np.mean([values[:shortest] for _, values in runs], axis=0)
                window = min(9, shortest)
                smooth = np.convolve(mean, np.ones(window) / window, mode="valid")
                axis.plot(runs[0][0][window - 1 : shortest], smooth, color=COLOURS[regime], label=regime)
        axis.set_xlabel("step", fontsize=8)
        decorate(axis, f"{title} ({start})", size=9)
    return figure
