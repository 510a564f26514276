"""Gather the records of pre-finetuning runs into one small file without local paths.

    python eval/study/summarize_runs.py runs/tpl runs/naive --output eval/results/regimes.json

Prints the table of the log: means over the first and the last ten logged lines.
"""

import json
import sys
from pathlib import Path
from typing import Any

from modeling_mtpf.data.sources import source_name
from modeling_mtpf.evaluation.report import markdown_table
from modeling_mtpf.pretraining.run_record import FREE_KEYS, METRICS_FILE, RUN_FILE
from modeling_mtpf.settings import ScriptParser

WINDOW = 10
"""Logged lines that are averaged at the start and at the end of a run."""
CURVES = ("loss/ner", "loss/tc", "pseudo_label_accuracy/ner", "retrieval_accuracy/tc", "uniformity/tc")
DIAGNOSTICS = ("gradient_cosine/", "tail_cka/")
COPIED = ("data", "versions", "hardware", "started", "seconds")
COLUMNS = {
    "loss/ner": "NER loss",
    "pseudo_label_accuracy/ner": "pseudo-label accuracy",
    "loss/tc": "TC loss",
    "retrieval_accuracy/tc": "retrieval accuracy",
    "uniformity/tc": "uniformity",
    "gradient_cosine/all": "gradient cosine",
}


def summarize_run(folder: Path) -> dict[str, Any]:
    """Return the summary of a finished run: recipe, data, movement, curves, diagnostics, sizes, seconds.

    Args:
        folder: Output folder of ``train/pretrain.py``.
    """
    record = json.loads((folder / RUN_FILE).read_text("utf-8"))
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text("utf-8").splitlines()]
    keys = sorted({key for line in lines for key in line if "/" in key})
    values = {key: [line[key] for line in lines if key in line] for key in keys}
    recipe = {key: value for key, value in record["recipe"].items() if key not in FREE_KEYS}
    return {
        "regime": record["regime"],
        "recipe": _without_paths(recipe),
        **{key: record[key] for key in COPIED},
        "resumed_at": record.get("resumed_at"),
        "moved": record["moved"],
        "sizes": _sizes(folder),
        "first": {key: _mean(value[:WINDOW]) for key, value in values.items()},
        "last": {key: _mean(value[-WINDOW:]) for key, value in values.items()},
        "steps": [line["step"] for line in lines],
        "curves": {key: values[key] for key in CURVES if key in values},
        "diagnostics": {key: values[key] for key in keys if key.startswith(DIAGNOSTICS)},
    }


def _without_paths(value: Any) -> Any:
    """Name files and folders by their last part."""
    if isinstance(value, dict):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    return source_name(value) if isinstance(value, str) and "/" in value else value


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of the weights of the backbone and of each adapter."""
    return {
        str(file.parent.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.glob("*/**/*model.safetensors"))
        if "checkpoints" not in file.parts
    }


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)


def table(runs: list[dict]) -> str:
    """Return a Markdown table, first → last, with a row per run."""

    def cell(run: dict, key: str) -> str:
        if key not in run["last"]:
            return "–"
        first = "" if key.startswith("gradient_cosine") else f"{run['first'][key]:.3f} → "
        return f"{first}{run['last'][key]:.3f}"

    rows = [[f"`{run['regime']}`", *(cell(run, key) for key in COLUMNS)] for run in runs]
    return markdown_table(["regime", *COLUMNS.values()], rows)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = ScriptParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of train/pretrain.py")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(arguments)
    for folder in options.runs:
        if not (folder / RUN_FILE).is_file():
            print(f"error: {folder} has no run.json; name output folders of finished runs.", file=sys.stderr)
            return 2
    runs = [summarize_run(folder) for folder in options.runs]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(runs, indent=1) + "\n", "utf-8")
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
