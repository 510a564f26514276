"""Whether scores mean what they say: expected calibration error on test, with and without the temperature.

    python eval/checks/calibration.py --tc DATA --tc DATA --ner DATA --output eval/results/calibration.json

An app is fitted on a few rows of each set, with each method and seed. An answer is a text's best label, or an
entity that `predict` delivers; it is right where label, or type and both borders, are.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_mtpf.adaptation import FitSettings, fit_app
from modeling_mtpf.adaptation.methods.registry import METHODS
from modeling_mtpf.data.app_data import AppData, Examples, load_app_data
from modeling_mtpf.data.backbones import open_backbone
from modeling_mtpf.data.spans import join_words
from modeling_mtpf.metrics import expected_calibration_error
from modeling_mtpf.settings import ScriptParser


def small(data: AppData, sizes: dict[str, int], seed: int) -> AppData:
    """Return a few random rows of each split, and their labels."""
    for split, size in sizes.items():
        examples = getattr(data, split)
        rows = np.random.default_rng(seed).permutation(len(examples))[:size]
        setattr(data, split, examples.take(np.sort(rows)))
    if data.family == "tc":
        data.labels = list(dict.fromkeys(data.train.labels))
    return data


def answers(model: Any, name: str, test: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Return score and rightness of each answer for the test set."""
    scores, right = [], []
    if model.heads[name].kind == "text-classification":
        results = model.predict(test.inputs, adapters=[name])[name]
        for result, label in zip(results, test.labels, strict=True):
            scores.append(result["score"])
            right.append(result["label"] == label)
        return np.array(scores), np.array(right)
    pairs = [join_words(*row) for row in zip(test.inputs, test.labels, strict=True)]
    results = model.predict([text for text, _ in pairs], adapters=[name])[name]
    for rows, (_, gold) in zip(results, pairs, strict=True):
        wanted = set(gold)
        for row in rows:
            scores.append(row["score"])
            right.append((row["start"], row["end"], row["entity_group"]) in wanted)
    return np.array(scores), np.array(right)


def measure(source: str, family: str, method: str, seed: int, sizes: dict[str, int]) -> dict[str, Any]:
    """Fit one app and return the calibration of its test answers with and without the temperature."""
    data = small(load_app_data(source, family), sizes, seed)
    assert data.test is not None
    backbone = open_backbone("packaged", None)
    app = fit_app(data, family, backbone=backbone, method=method, settings=FitSettings(seed=seed))
    calibration = app.record["calibration"]
    after = answers(app.model, app.name, data.test)
    with torch.no_grad():
        for parameter in app.model.heads[app.name].parameters():
            parameter.mul_(calibration["temperature"])
    before = answers(app.model, app.name, data.test)
    return {
        "set": Path(source).name,
        "family": family,
        "method": method,
        "seed": seed,
        "temperature": calibration["temperature"],
        "right": round(float(after[1].mean()), 4),
        "mean_score_before": round(float(before[0].mean()), 4),
        "mean_score_after": round(float(after[0].mean()), 4),
        "ece_before": round(expected_calibration_error(*before), 4),
        "ece_after": round(expected_calibration_error(*after), 4),
    }


def main() -> None:
    """Run all sets, methods and seeds, and write one record."""
    parser = ScriptParser(description=__doc__)
    for family in ("tc", "ner"):
        parser.add_argument(f"--{family}", action="append", default=[], help="a folder or Hub id")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", default="probe,lora")
    parser.add_argument("--sizes", default="500,200,1000", help="rows of train, validation and test")
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    sizes = dict(zip(("train", "validation", "test"), map(int, options.sizes.split(",")), strict=True))
    torch.set_num_threads(1)
    rows = []
    for family in ("tc", "ner"):
        for source in getattr(options, family):
            for method in options.methods.split(","):
                for seed in range(options.seeds) if (family, method) in METHODS else ():
                    rows.append(measure(source, family, method, seed, sizes))
                    print(json.dumps(rows[-1]), flush=True)
    command = " ".join(["python eval/checks/calibration.py", *(Path(part).name for part in sys.argv[1:])])
    record = {"command": command, "sizes": sizes, "rows": rows}
    Path(options.output).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
