"""Run the study of sparse fine-tuning, and make its report from the raw records.

    python eval/sparse_study.py run
    python eval/sparse_study.py run --seeds 0 --sets tc/banking77 --only end-to-end sparse-10
    python eval/sparse_study.py run --ablations
    python eval/sparse_study.py report

``run`` computes the records of the plan that eval/results/sparse.json does not have yet; the same command
resumes after a stop. A record is one fit: the test score of the app that comes back from its folder, CPU
seconds of the whole fit, bytes of its weights, and CPU time to predict a text. ``report`` fills in the tables
of docs/sparse_results.md and docs/apps.md.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from modeling_mtpf.errors import exit_without_extra

exit_without_extra("train", "datasets", "sklearn", "yaml", "tqdm")
exit_without_extra("eval", "evaluate", "seqeval", "scipy", "matplotlib")

import torch
import yaml

from eval.checks.calibration import small
from eval.sparse_report import write_report
from eval.studies import METRICS, TIMED, add_missing, milliseconds, study
from modeling_mtpf.adaptation import FitSettings, fit_app
from modeling_mtpf.adaptation.scoring import score_app
from modeling_mtpf.adaptation.settings import LoraShape, SparseSettings
from modeling_mtpf.data.app_data import AppData
from modeling_mtpf.data.backbones import open_backbone
from modeling_mtpf.data.spans import text_and_spans
from modeling_mtpf.errors import RecipeError
from modeling_mtpf.evaluation.records import PACKAGES, today
from modeling_mtpf.evaluation.tasks import Task, load_task, select_tasks
from modeling_mtpf.model.adapter_files_mtpf import backbone_sha256
from modeling_mtpf.version import versions

ROOT = Path(__file__).parents[1]
PLAN, RECORDS = ROOT / "eval" / "sparse.yaml", ROOT / "eval" / "results" / "sparse.json"
DETAILS = ("steps", "best_step", "trained_share", "tokens", "rank", "change_kept", "validation_before_svd")


def settings_of(common: dict[str, Any], spec: dict[str, Any], seed: int) -> FitSettings:
    """Return the settings of a fit from the plan's; those of training are not for a probe."""
    values = ({} if spec["method"] == "probe" else common) | spec.get("settings", {})
    nested = {"sparse": SparseSettings, "lora": LoraShape}
    return FitSettings(seed=seed, **{k: nested[k](**v) if k in nested else v for k, v in values.items()})


def measure(
    opened: Any, data: AppData, spec: dict[str, Any], settings: FitSettings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fit an app and load it from its folder; return its scores, and its cost with what was chosen."""
    (model, tokenizer), test = opened, data.test
    assert test is not None
    data.test = None
    alone = spec.get("standalone", False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "app"
        options: dict[str, Any] = {"method": spec["method"], "standalone": alone, "settings": settings}
        started = time.process_time()
        app = fit_app(data, data.family, backbone=opened, output_dir=folder, **options)
        seconds = time.process_time() - started
        if not alone:
            model.delete_adapter("app")
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        model.load_adapter(folder, standalone=alone)
    try:
        loaded = model.standalone["app"] if alone else model
        tokenizer = loaded.__dict__.get("_mtpf_tokenizer", tokenizer)
        scores = score_app(loaded, tokenizer, "app", test)
        rows = zip(test.inputs[:TIMED], test.labels, strict=False)
        texts = [text_and_spans(*row)[0] if data.family == "ner" else row[0] for row in rows]
        time_a_text = milliseconds((loaded, tokenizer), texts, ["app"])
    finally:
        model.delete_adapter("app")
    details = next(iter(app.record["seeds"].values()))
    found = {
        "value": round(scores[METRICS[data.family]], 6),
        "scores": {name: round(value, 6) for name, value in scores.items() if isinstance(value, float)},
        "validation": details["validation_score"],
    }
    cost = {
        "bytes": size,
        "cpu_seconds": round(seconds, 1),
        "cpu_ms_a_text": time_a_text,
    }
    return found, {"cost": cost, "details": {key: details[key] for key in DETAILS if key in details}}


def run(options: argparse.Namespace) -> None:
    """Compute all records of the plan that are not there."""
    plan = yaml.safe_load(options.plan.read_text("utf-8"))
    torch.set_num_threads(options.threads)
    known = plan["methods"] | plan["ablations"]
    methods = options.only or list(plan["ablations"] if options.ablations else plan["methods"])
    if unknown := set(methods) - set(known):
        raise RecipeError(f"--only: the plan has no {min(unknown)!r}; it has: {', '.join(known)}.")
    tasks = select_tasks(",".join(options.sets or plan["sets"]), set(METRICS))
    opened = open_backbone(options.backbone)
    identity = {"name": Path(options.backbone).name, "sha256": backbone_sha256(opened[0].backbone)}
    for seed in options.seeds or plan["seeds"]:
        for task in tasks:
            for method in methods:
                spec = known[method]
                facts = {"backbone": identity, "method": spec, **{k: plan[k] for k in ("rows", "settings")}}
                if task.family not in spec.get("families", METRICS):
                    continue
                key = {"regime": method, "seed": seed, "task": task.name, "family": task.family}
                key |= {"protocol": "sparse", "metric": METRICS[task.family]}
                fit = partial(compute, opened, task, key, facts, options.data)
                add_missing(options.records, [key], facts, fit)


def compute(
    opened: Any, task: Task, key: dict[str, Any], facts: dict[str, Any], folder: str | None
) -> Iterator[dict[str, Any]]:
    """Yield the record of one fit on the rows that its seed draws."""
    data = small(load_task(task, folder), facts["rows"], key["seed"])
    rows = {"n_train": len(data.train), "n_test": len(data.test or ())}
    source = data.notes["fingerprint"]
    settings = settings_of(facts["settings"], facts["method"], key["seed"])
    scores, measured = measure(opened, data, facts["method"], settings)
    config = {**facts, **measured, "data": source}
    yield {**key, **scores, **rows, "config": config, "versions": versions(*PACKAGES), "date": today()}


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""

    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--ablations", action="store_true", help="these instead of the methods")
        parser.add_argument("--sets", nargs="+", help="by default all of the plan")
        parser.add_argument("--backbone", default="packaged")

    return study(str(__doc__), run, write_report, (PLAN, RECORDS), add_options, arguments)


if __name__ == "__main__":
    sys.exit(main())
