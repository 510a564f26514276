"""Draw the curves of one or more pre-finetuning runs, side by side.

python eval/curves.py runs/tpl runs/naive runs/ner runs/tc --output curves.png
"""  # noqa: D208

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "loss/ner": "NER: cross-entropy over clusters",
    "pseudo_label_accuracy/ner": "NER: pseudo-label accuracy",
    "loss/tc": "TC: InfoNCE",
    "retrieval_accuracy/tc": "TC: in-batch retrieval accuracy",
    "uniformity/tc": "TC: uniformity (0 is collapse)",
    "gradient_cosine/all": "cosine of the families' gradients",
}


def read_run(folder: Path) -> tuple[str, list[dict]]:
    """Return the regime and the logged lines of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    record = folder / "run.json"
    return (json.loads(record.read_text("utf-8"))["regime"] if record.is_file() else folder.name), lines


def moving_mean(values: list[float], width: int) -> list[float]:
    """Average each value with those before it, up to ``width``."""
    return [
        sum(part) / len(part) for part in (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    ]


def draw(runs: dict[str, list[dict]], output: Path, smooth: int) -> None:
    """Draw one panel per metric, one line per run."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), constrained_layout=True)
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


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of train/pretrain.py")
    parser.add_argument("--output", type=Path, required=True, help="picture to write (.png, .svg)")
    parser.add_argument("--smooth", type=int, default=10, help="logged lines per moving mean")
    options = parser.parse_args(arguments)
    for folder in options.runs:
        if not (folder / "metrics.jsonl").is_file():
            print(f"error: {folder} has no metrics.jsonl; name output folders of runs.", file=sys.stderr)
            return 2
    draw(dict(read_run(folder) for folder in options.runs), options.output, options.smooth)
    return 0


if __name__ == "__main__":
    sys.exit(main())
