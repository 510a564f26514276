"""Gather the records of pre-finetuning runs into one small file without local paths.

    python eval/study/summarize_runs.py runs/tpl runs/naive --output eval/results/regimes.json

Prints the table of the log: means over the first and the last ten logged lines.
"""

import argparse
import json
import sys
from pathlib import Path

from eval.study.run_summaries import summarize_run

COLUMNS = {
    "loss/ner": "NER loss",
    "pseudo_label_accuracy/ner": "pseudo-label accuracy",
    "loss/tc": "TC loss",
    "retrieval_accuracy/tc": "retrieval accuracy",
    "uniformity/tc": "uniformity",
    "gradient_cosine/all": "gradient cosine",
}


def table(runs: list[dict]) -> str:
    """Return a Markdown table, first → last, with a row per run."""
    rows = ["| regime | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for run in runs:
        cells = []
        for key in COLUMNS:
            if key.startswith("gradient_cosine") and key in run["last"]:
                cells.append(f"{run['last'][key]:.3f}")
            else:
                cells.append(
                    f"{run['first'][key]:.3f} → {run['last'][key]:.3f}" if key in run["last"] else "–"
                )
        rows.append(f"| `{run['regime']}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of train/pretrain.py")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(arguments)
    for folder in options.runs:
        if not (folder / "run.json").is_file():
            print(f"error: {folder} has no run.json; name output folders of finished runs.", file=sys.stderr)
            return 2
    runs = [summarize_run(folder) for folder in options.runs]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(runs, indent=1) + "\n", "utf-8")
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
