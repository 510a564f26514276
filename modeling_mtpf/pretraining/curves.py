"""Draw runs: losses, accuracies and diagnostics over the steps."""

from pathlib import Path

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


def draw(runs: dict[str, list[dict]], output: Path, smooth: int) -> None:
    """Draw one panel per metric; per run the logged values, and bold their mean over ``smooth`` lines."""
    # Late: most of the package does without, and it takes half a second.
    import pandas as pd
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, (key, title) in zip(axes.flat, PANELS.items(), strict=True):
        for number, (name, lines) in enumerate(runs.items()):
            values = pd.Series({line["step"]: line[key] for line in lines if key in line}, dtype=float)
            if values.empty:
                continue
            color = f"C{number}"
            if smooth > 1 and not key.startswith("gradient_cosine"):
                axis.plot(values, color=color, label=f"{name}, as logged", linewidth=0.8, alpha=0.5)
                values, name = values.rolling(smooth, min_periods=1).mean(), f"{name}, mean of {smooth} lines"
            axis.plot(values, color=color, label=name, linewidth=1.6)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    axes.flat[-1].axhline(0, color="black", linewidth=0.6)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
