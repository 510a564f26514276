"""Apps with several labels a text, on real texts: printed scores are those of what `mtpf predict` gives.

    python eval/checks/multi_label.py --tc DATA+DATA --ner DATA --output eval/results/multi-label.json

``--tc A+B`` are two sets of the same texts with a label each, e.g. a scenario and an intent: a text has both.
``--ner`` is a set of words with tags: a text's labels are the types of its entities, any number or none.
`mtpf predict` runs in a process of its own, on the file of the test texts; scikit-learn scores what it gives.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, f1_score

from modeling_mtpf.adaptation import FitSettings, fit_app
from modeling_mtpf.data.app_data import load_app_data
from modeling_mtpf.settings import ScriptParser

SPLITS = ("train", "validation", "test")


def rows_of(source: str) -> dict[str, list[dict[str, Any]]]:
    """Return the texts of each split with their labels."""
    if "+" in source:
        first, second = (load_app_data(part, "tc") for part in source.split("+"))
        rows = {}
        for split in SPLITS:
            one, other = getattr(first, split), getattr(second, split)
            more = dict(zip(other.inputs, other.labels, strict=True))
            pairs = {text: label for text, label in zip(one.inputs, one.labels, strict=True) if text in more}
            rows[split] = [
                {"text": text, "labels": [f"1 {pairs[text]}", f"2 {more[text]}"]} for text in pairs
            ]
        return rows
    data = load_app_data(source, "ner")
    return {
        split: [
            {"text": " ".join(words), "labels": list(dict.fromkeys(tag[2:] for tag in tags if tag != "O"))}
            for words, tags in zip(getattr(data, split).inputs, getattr(data, split).labels, strict=True)
        ]
        for split in SPLITS
    }


def recomputed(test: list[dict[str, Any]], lines: list[dict[str, Any]]) -> dict[str, float]:
    """Score the lines of ``mtpf predict --top_k 0 --threshold 0``, of which labels from 0.5 on are given."""
    scores = [{entry["label"]: entry["score"] for entry in line["results"]["app"]} for line in lines]
    labels = sorted({*scores[0], *(label for row in test for label in row["labels"])})
    values = np.array([[row.get(label, 0.0) for label in labels] for row in scores])
    gold = np.array([[label in row["labels"] for label in labels] for row in test])
    given = values >= 0.5
    occurs = (gold | given).any(0)
    return {
        "micro_f1": f1_score(gold, given, average="micro"),
        "macro_f1": f1_score(gold[:, occurs], given[:, occurs], average="macro", zero_division=0),
        "average_precision": average_precision_score(gold[:, gold.any(0)], values[:, gold.any(0)]),
    }


def measure(source: str, method: str, sizes: dict[str, int], folder: Path) -> dict[str, Any]:
    """Fit one app on some rows of a set; return printed and recomputed scores."""
    rows = rows_of(source)
    for split, size in sizes.items():
        order = np.random.default_rng(0).permutation(len(rows[split]))[:size]
        rows[split] = [rows[split][row] for row in order]
        lines = (json.dumps(row) + "\n" for row in rows[split])
        (folder / f"{split}.jsonl").write_text("".join(lines), "utf-8")
    app = fit_app(folder, "tc", method=method, output_dir=folder / "app", settings=FitSettings())
    command = ["predict", "--adapter", "app", "--top_k", "0", "--threshold", "0", "test.jsonl"]
    done = subprocess.run(
        [sys.executable, "-m", "modeling_mtpf.cli", *command],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    again = recomputed(rows["test"], [json.loads(line) for line in done.stdout.splitlines()])
    return {
        "set": "+".join(Path(part).name for part in source.split("+")),
        "method": app.record["method"],
        "labels": len(app.model.heads[app.name].labels),  # type: ignore[arg-type]
        "labels_a_text": round(float(np.mean([len(row["labels"]) for row in rows["test"]])), 2),
        "texts_without": sum(not row["labels"] for row in rows["test"]),
        "printed": {name: app.metrics[name] for name in again},
        "recomputed": {name: round(float(value), 4) for name, value in again.items()},
        "calibration": app.record["calibration"],
    }


def main() -> None:
    """Run all sets and methods, and write one record."""
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--tc", action="append", default=[], help="two folders or Hub ids: A+B")
    parser.add_argument("--ner", action="append", default=[], help="a folder or Hub id")
    parser.add_argument("--method", action="append", help="probe by default")
    parser.add_argument("--sizes", default="500,200,500", help="rows of train, validation and test")
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    sizes = dict(zip(SPLITS, map(int, options.sizes.split(",")), strict=True))
    results = []
    for source in [*options.tc, *options.ner]:
        for method in options.method or ["probe"]:
            with tempfile.TemporaryDirectory() as folder:
                results.append(measure(source, method, sizes, Path(folder)))
            print(json.dumps(results[-1]), flush=True)
            names = ("+".join(Path(part).name for part in each.split("+")) for each in sys.argv[1:])
            record = {"command": " ".join(["python eval/checks/multi_label.py", *names]), "sizes": sizes}
            Path(options.output).write_text(json.dumps({**record, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
