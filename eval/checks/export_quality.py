"""What an export, or bf16, costs in quality: apps on real tasks, in torch and as ONNX, on the same test rows.

    python eval/checks/export_quality.py --apps runs/apps --exports runs/exports \
        --output eval/results/export-quality.json
    python eval/checks/export_quality.py --tasks ner/fin,tc/emotion --apps runs/apps --exports runs/exports --output out.json

Apps without a folder are fitted on the packaged encoder first, quickly and on few rows. Task data comes from
MTPF_DATA or the Hub. Words, labels and metrics are those of `eval/benchmark.py`, with the export as the model;
the variant ``bf16`` is torch with such weights.
"""  # noqa: E501

import argparse
import json
import logging
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from modeling_mtpf.adaptation import FitSettings, fit_app
from modeling_mtpf.adaptation.scoring import score_app
from modeling_mtpf.data.app_data import AppData
from modeling_mtpf.data.backbones import load_backbone, open_backbone
from modeling_mtpf.evaluation.records import today
from modeling_mtpf.evaluation.tasks import Task, load_task, select_tasks
from modeling_mtpf.export import export_onnx, read_manifest
from modeling_mtpf.export.runner import Runner
from modeling_mtpf.model.adapter_files_mtpf import read_task
from modeling_mtpf.settings import ScriptParser
from modeling_mtpf.version import versions

TASKS = {
    "ner/fin": "lora",
    "ner/snips": "lora",
    "ner/btc": "lora",
    "ner/bc5cdr": "lora",
    "ner/hwu64": "lora",
    "tc/emotion": "lora",
    "tc/massive_scenario": "lora",
    "tc/tweet_sentiment_extraction": "lora",
    "tc/tweeteval_irony": "lora",
    "tc/banking77": "probe",
    "tc/mtop_intent": "probe",
    "tc/sst2": "probe",
}
"""Task → method; some of both families and both methods."""
ROWS = {"train": 1500, "validation": 250}
STEPS, EVALUATIONS = 250, 5
METRICS = {"ner": "entity_f1", "tc": "accuracy"}
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"int8": False},
    "int8": {"int8": True},
}
BF16 = "bf16"


class ExportedModel:
    """An export with the part of the interface of `MtpfModel` that scoring an app needs."""

    def __init__(self, folder: Path, threads: int):
        self.runner = Runner(folder, threads)
        self.heads = {
            name: SimpleNamespace(kind=app["kind"], labels=app["labels"])
            for name, app in self.runner.apps.items()
        }

    def predict(
        self, texts: list[str], adapters: list[str], batch_size: int = 32, **_: Any
    ) -> dict[str, list]:
        """Return the runner's results; of a text its best label alone."""
        results = self.runner.predict(texts, adapters, batch_size=batch_size)
        return {
            name: [[row] if isinstance(row, dict) else row for row in rows] for name, rows in results.items()
        }


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--tasks", default=",".join(TASKS), help="separated by commas")
    parser.add_argument(
        "--apps", type=Path, required=True, help="folder of the apps; missing ones are fitted"
    )
    parser.add_argument(
        "--exports", type=Path, required=True, help="folder of the exports; missing ones are made"
    )
    parser.add_argument("--variants", default=",".join((*VARIANTS, BF16)), help="separated by commas")
    parser.add_argument("--test_rows", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fit_only", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR)
    torch.set_num_threads(options.threads)
    tasks = [select_tasks(key, {key.split("/")[0]})[0] for key in options.tasks.split(",")]
    for task in tasks:
        fit(task, options.apps)
    if options.fit_only:
        return 0
    folders = export(tasks, options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    records = []
    for task in tasks:
        records.append(score(task, folders, options))
        options.output.write_text(json.dumps(records, indent=1) + "\n", "utf-8")
    print(f"\n{'mean of the differences, points':<40}", end="")
    for variant in records[0]["difference"]:
        points = [record["difference"][variant] for record in records]
        print(f"{variant} {np.mean(points):+.2f} (worst {min(points):+.2f})", end="  ")
    print()
    return 0


def fit(task: Task, apps: Path) -> None:
    """Fit the app of a task on a part of its rows, unless its folder exists."""
    folder = apps / app_name(task)
    if folder.exists():
        return
    data = load_task(task)
    for split, most in ROWS.items():
        setattr(data, split, some(data, split, most))
    data.test = None
    method = TASKS.get(task.key, "auto")
    training: dict[str, Any] = (
        {} if method == "probe" else {"steps": STEPS, "evaluations": EVALUATIONS, "refit": False}
    )
    settings = FitSettings(**training)
    app = fit_app(data, task.family, output_dir=folder, method=method, settings=settings)
    print(f"fitted {task.key} in {app.record['seconds']:.0f} s: {app.metrics}", flush=True)


def some(data: AppData, split: str, most: int) -> Any:
    """Return a split, or ``most`` of its rows drawn with a fixed seed."""
    rows = getattr(data, split)
    if len(rows) <= most:
        return rows
    return rows.take(sorted(random.Random(0).sample(range(len(rows)), most)))


def app_name(task: Task) -> str:
    """Return a task's name as an app's."""
    return task.key.replace("/", "-").replace("_", "-")


def export(tasks: list[Task], options: argparse.Namespace) -> dict[str, Path]:
    """Export all apps in each variant; an existing export is used, and missing apps are added to it."""
    folders = {}
    for variant in options.variants.split(","):
        if variant == BF16:
            continue
        folder = folders[variant] = options.exports / variant
        exported = read_manifest(folder)["apps"] if folder.exists() else {}
        missing = [options.apps / app_name(task) for task in tasks if app_name(task) not in exported]
        if missing:
            print(export_onnx("packaged", missing, folder, **VARIANTS[variant]), flush=True)
    return folders


def score(task: Task, folders: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Score one app in torch and in every export."""
    model, tokenizer = open_backbone("packaged")
    name = model.load_adapter(options.apps / app_name(task))
    test = some(load_task(task), "test", options.test_rows)
    metric = METRICS[task.family]
    values, seconds = {}, {}
    contestants: dict[str, Any] = {"torch": model} | {
        key: ExportedModel(folder, options.threads) for key, folder in folders.items()
    }
    if BF16 in options.variants.split(","):
        contestants[BF16] = load_backbone("packaged", dtype=torch.bfloat16).eval()
        contestants[BF16].load_adapter(options.apps / app_name(task))
    for key, contestant in contestants.items():
        started = time.perf_counter()
        values[key] = round(float(score_app(contestant, tokenizer, name, test)[metric]), 4)
        seconds[key] = round(time.perf_counter() - started, 1)
    app = read_task(options.apps / app_name(task))
    del contestants["torch"]
    agree = {key: agreement(of, name, test.inputs) for key, of in contestants.items()}
    difference = {key: round(100 * (values[key] - values["torch"]), 2) for key in contestants}
    print(f"{task.key:<32}{metric:<12}", *(f"{key} {values[key]:.4f}" for key in values), flush=True)
    return {
        "regime": "base",
        "seed": 0,
        "task": task.name,
        "family": task.family,
        "metric": metric,
        "value": values["torch"],
        "exported": {key: values[key] for key in contestants},
        "difference": difference,
        "same_in_batch": agree,
        "seconds": seconds,
        "method": app["method"],
        "training_data": app["training_data"],
        "n_test": len(test),
        "config": {"backbone": "packaged", "steps": app["settings"]["steps"], "threads": options.threads},
        "versions": versions("torch", "transformers", "onnx", "onnxruntime"),
        "date": today(),
    }


def agreement(contestant: Any, name: str, inputs: list[Any]) -> float:
    """Return the share of texts with equal labels or entities one by one and in batches of 32."""
    texts = [text if isinstance(text, str) else " ".join(text) for text in inputs]
    results = [contestant.predict(texts, adapters=[name], batch_size=size)[name] for size in (1, 32)]

    def decided(result: Any) -> Any:
        if isinstance(result, dict):
            return result["label"]
        if result and "label" in result[0]:
            return [row["label"] for row in result]
        return [(entity["start"], entity["end"], entity["entity_group"]) for entity in result]

    same = [decided(one) == decided(batch) for one, batch in zip(*results, strict=True)]
    return round(sum(same) / len(same), 4)


if __name__ == "__main__":
    sys.exit(main())
