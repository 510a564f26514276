"""Pictures of runs: losses, accuracies and diagnostics over the steps."""

from pathlib import Path
from typing import Any

CURVES_FILE = "curves.png"
PANELS = {
    "loss/ner": "NER: cross-entropy over clusters",
    "pseudo_label_accuracy/ner": "NER: pseudo-label accuracy",
    "loss/tc": "TC: InfoNCE",
    "retrieval_accuracy/tc": "TC: in-batch retrieval accuracy",
    "uniformity/tc": "TC: uniformity (0 is collapse)",
    "gradient_cosine/all": "cosine of the families' gradients",
}
"""Metric of a log line → title of its panel."""


def moving_mean(values: list[float], width: int) -> list[float]:
    """Average each value with those before it, up to ``width``."""
    return [
        sum(part) / len(part) for part in (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    ]


def draw(runs: dict[str, list[dict]], output: Path, smooth: int) -> None:
    """Draw one panel per metric, one line per run."""
    # Late: most of the package does without, and it takes half a second.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, (key, title) in zip(axes.flat, PANELS.items(), strict=True):
        for name, lines in runs.items():
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                steps, values = zip(*points, strict=True)
                width = 1 if key.startswith("gradient_cosine") else smooth
                axis.plot(steps, moving_mean(list(values), width), label=name, linewidth=1.6)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.set_xlabel("step", fontsize=9)
        if axis.lines:
            axis.legend(fontsize=8)
    axes.flat[-1].axhline(0, color="black", linewidth=0.6)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)


def draw_run(folder: Path, name: str, lines: list[dict[str, Any]]) -> Path:
    """Draw the curves of one run into its folder."""
    draw({name: lines}, folder / CURVES_FILE, smooth=10)
    return folder / CURVES_FILE


__all__ = ["CURVES_FILE", "draw", "draw_run", "moving_mean"]
