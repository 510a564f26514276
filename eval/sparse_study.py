"""Measure sparse fine-tuning against its rivals, and make the report from the raw records.

python eval/sparse_study.py run --output eval/results/sparse.jsonl --data DATA --sets tc/banking77,ner/bc5cdr
python eval/sparse_study.py report eval/results/sparse.jsonl > docs/study/sparse.md

A record is one fit: set, variant, seed, test score, seconds of CPU time, bytes of the app, and seconds to
predict the test texts. Records that exist already are skipped.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from modeling_mtpf.adaptation import FitSettings, fit_app
from modeling_mtpf.adaptation.settings import LoraShape, SparseSettings
from modeling_mtpf.data.backbones import open_backbone
from modeling_mtpf.settings import ScriptParser

SPARSE = SparseSettings(vocabulary=0.0)
VARIANTS: dict[str, tuple[str, bool, SparseSettings, LoraShape]] = {
    "probe": ("probe", False, SPARSE, LoraShape()),
    "lora": ("lora", False, SPARSE, LoraShape()),
    "lora-all": ("lora", False, SPARSE, LoraShape(targets=["all"])),
    "tail": ("sparse", False, SPARSE, LoraShape()),
    "tail-worst": ("sparse", False, replace(SPARSE, choice="worst"), LoraShape()),
    "tail-random": ("sparse", False, replace(SPARSE, choice="random"), LoraShape()),
    "end-to-end": ("sparse", True, replace(SPARSE, budget=1.0, learning_rate=5e-5), LoraShape()),
    "sparse-10": ("sparse", True, SPARSE, LoraShape()),
    "sparse-10-tokens": ("sparse", True, SparseSettings(), LoraShape()),
    "sparse-5": ("sparse", True, replace(SPARSE, budget=0.05), LoraShape()),
    "sparse-20": ("sparse", True, replace(SPARSE, budget=0.2), LoraShape()),
    "random-10": ("sparse", True, replace(SPARSE, choice="random"), LoraShape()),
    "worst-10": ("sparse", True, replace(SPARSE, choice="worst"), LoraShape()),
    "layers-10": ("sparse", True, replace(SPARSE, choice="layers"), LoraShape()),
    "beta-0": ("sparse", True, replace(SPARSE, beta=0.0), LoraShape()),
}
"""Name → method, whether standalone, what is trained, and the LoRA."""

FIELDS = ("accuracy", "entity_f1")


def fit(source: Path, variant: str, seed: int, rows: int, opened: Any) -> dict[str, Any]:
    """Fit one app and return its record."""
    method, standalone, sparse, lora = VARIANTS[variant]
    family = source.parent.name
    sizes = {"train": rows, "validation": rows // 3, "test": 1000}
    splits = {split: pd.read_parquet(source / f"{split}.parquet") for split in sizes}
    parts = {
        split: table.sample(min(sizes[split], len(table)), random_state=0) for split, table in splits.items()
    }
    settings = FitSettings(seed=seed, mixed_precision="float32", sparse=sparse, lora=lora)
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        app = fit_app(
            parts["train"],
            family,
            validation=parts["validation"],
            backbone=opened,
            method=method,
            standalone=standalone,
            name="app",
            output_dir=Path(folder) / "app",
            settings=settings,
        )
        fitted = time.process_time() - started
        stored = sum(file.stat().st_size for file in (Path(folder) / "app").iterdir())
    from modeling_mtpf.adaptation.scoring import score_app
    from modeling_mtpf.data.app_data import load_app_data

    data = load_app_data(parts["test"], family, validation=parts["validation"])
    tokenizer = app.model.__dict__.get("_mtpf_tokenizer") if standalone else opened[1]
    started = time.process_time()
    scores = score_app(app.model, tokenizer or opened[1], "app", data.train)
    details = next(iter(app.record["seeds"].values()))
    if not standalone:
        app.model.delete_adapter("app")
    return {
        "task": f"{family}/{source.name}",
        "variant": variant,
        "seed": seed,
        "n_train": len(parts["train"]),
        "n_test": len(parts["test"]),
        "score": round(float(next(scores[key] for key in FIELDS if key in scores)), 4),
        "cpu_seconds": round(fitted, 1),
        "predict_seconds": round(time.process_time() - started, 2),
        "bytes": stored,
        **{key: details[key] for key in ("steps", "best_step", "trained_share", "tokens") if key in details},
        **{key: details[key] for key in ("change_kept", "validation_before_svd") if key in details},
        "validation": details["validation_score"],
    }


def run(options: argparse.Namespace) -> None:
    """Write a record for each set, variant and seed that has none yet."""
    torch.set_num_threads(1)
    known = {(r["task"], r["variant"], r["seed"]) for r in read(options.output)}
    opened = open_backbone(options.backbone)
    for seed in map(int, options.seeds.split(",")):
        for name in options.sets.split(","):
            for variant in options.variants.split(","):
                if (name, variant, seed) in known or (variant == "probe" and (name[:3] == "ner" or seed)):
                    continue
                record = fit(options.data / name, variant, seed, options.rows, opened)
                with options.output.open("a") as file:
                    file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, if there is one."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(options: argparse.Namespace) -> None:
    """Print a table of scores by set, and one of costs, as means and spreads over the seeds."""
    table = pd.DataFrame([record for path in options.files for record in read(path)])
    tasks, order = sorted(table["task"].unique()), [v for v in VARIANTS if v in set(table["variant"])]
    lines = ["| variant | " + " | ".join(tasks) + " | mean |", "|---" * (len(tasks) + 2) + "|"]
    for variant in order:
        cells, means = [], []
        for task in tasks:
            scores = 100 * table[(table["variant"] == variant) & (table["task"] == task)]["score"]
            spread = f" ± {scores.std():.1f}" if len(scores) > 1 else ""
            cells.append(f"{scores.mean():.1f}{spread}" if len(scores) else "–")
            means += [scores.mean()] if len(scores) else []
        mean = f"{np.mean(means):.1f}" if len(means) == len(tasks) else "–"
        lines.append(f"| {variant} | " + " | ".join(cells) + f" | {mean} |")
    lines += ["", "| variant | fits | CPU s | MB | predict s | trained |", "|---|---|---|---|---|---|"]
    for variant in order:
        rows = table[table["variant"] == variant]
        seconds, size, predict, share = (
            rows[column].mean() for column in ("cpu_seconds", "bytes", "predict_seconds", "trained_share")
        )
        trained = "–" if np.isnan(share) else f"{share:.1%}"
        lines.append(
            f"| {variant} | {len(rows)} | {seconds:.0f} | {size / 1e6:.2f} | {predict:.1f} | {trained} |"
        )
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    """Run or report."""
    parser = ScriptParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run")
    running.add_argument("--output", type=Path, required=True)
    running.add_argument("--data", type=Path, required=True)
    running.add_argument("--sets", required=True)
    running.add_argument("--variants", default=",".join(VARIANTS))
    running.add_argument("--seeds", default="0,1,2")
    running.add_argument("--rows", type=int, default=1000)
    running.add_argument("--backbone", default="packaged")
    running.set_defaults(action=run)
    reporting = commands.add_parser("report")
    reporting.add_argument("files", nargs="+", type=Path)
    reporting.set_defaults(action=report)
    options = parser.parse_args()
    options.action(options)


if __name__ == "__main__":
    main()
