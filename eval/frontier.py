"""Quality, size and training time of apps of different shapes, next to full fine-tuning of the same encoder.

    python eval/frontier.py --ner DATA --ner DATA --tc DATA --methods small,medium,large,full --seeds 0,1,2 \
        --output eval/results/frontier.json

Each seed draws its rows of each set, on which every method is fitted. Validation chooses what is kept, test
reports: strict F1 of the entities that are delivered, or accuracy. Cells in the output are skipped. A method
is a size of `mtpf adapt` or ``full``; an app of another shape and rate is written as
``lora:layers=3:r=16:targets=all:lr=2e-3``. ``--write_rows DIR`` writes the drawn texts for
``frontier_peers.py``, which runs where SetFit and sentence-transformers are installed.
"""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import get_linear_schedule_with_warmup

from modeling_mtpf.adaptation import FitSettings, fit_app
from modeling_mtpf.adaptation.methods.lora import labels_of
from modeling_mtpf.adaptation.settings import SIZES, LoraShape
from modeling_mtpf.adaptation.tail_training import shuffled_batches
from modeling_mtpf.data.app_data import AppData, load_app_data
from modeling_mtpf.data.backbones import open_backbone
from modeling_mtpf.data.batches import row_batches
from modeling_mtpf.devices import precision
from modeling_mtpf.evaluation.records import add_record, read_records, today
from modeling_mtpf.model.adapters_mtpf import AdapterHead, LoraSettings
from modeling_mtpf.settings import ScriptParser
from modeling_mtpf.version import versions

LEARNING_RATE, EPOCHS, BATCH_SIZE = 3e-4, 12, 16
"""Of full fine-tuning; the better of the rates 1e-4 and 3e-4 by validation on hwu64."""


def drawn(source: str, family: str, sizes: dict[str, int], seed: int) -> AppData:
    """Return random rows of each split, and the labels of those one fits on: of texts validation's, too."""
    data = load_app_data(source, family)
    for split, size in sizes.items():
        examples = getattr(data, split)
        rows = np.random.default_rng(seed).permutation(len(examples))[:size]
        setattr(data, split, examples.take(np.sort(rows)))
    train, validation = data.train.labels, data.validation.labels
    present = {*train, *validation} if family == "tc" else {tag for tags in train for tag in tags}
    known = set(present) | {"O"} | {"I-" + tag[2:] for tag in present if tag.startswith("B-")}
    data.labels = [label for label in data.labels if label in known]
    return data


def full_fine_tuning(data: AppData, family: str, seed: int, learning_rate: float) -> dict[str, float]:
    """Train all weights of the encoder and a head; return validation and test score of the best epoch."""
    torch.manual_seed(seed)
    model, tokenizer = open_backbone("packaged")
    encoder = model.backbone.train().requires_grad_(True)
    labels = labels_of(tokenizer, data, 128)
    test = labels_of(tokenizer, replace(data, validation=data.test or data.validation), 128)
    head = AdapterHead(labels.kind, data.labels, model.config.hidden_size)
    parameters = [*encoder.parameters(), *head.parameters()]
    lengths = labels.train.lengths
    each = math.ceil(len(lengths) / BATCH_SIZE)
    steps = each * EPOCHS
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(0.1 * steps), steps)

    def logits(encoded: Any, rows: np.ndarray, length: int) -> torch.Tensor:
        with precision(torch.device("cpu"), "auto"):
            hidden = encoder(**encoded.inputs(rows, length)).last_hidden_state
        return labels.logits(head, hidden.float(), encoded, rows)

    @torch.no_grad()
    def score(of: Any) -> float:
        encoder.eval()
        batches = row_batches(of.validation.lengths, 128, torch.device("cpu"), "auto")
        outputs = [(b.rows[: b.real], logits(of.validation, b.rows, b.length)[: b.real]) for b in batches]
        encoder.train()
        return of.scores(of.read(outputs))[labels.metric]

    best = {"validation": -1.0, "value": 0.0, "epoch": 0.0}
    batches = shuffled_batches(lengths, BATCH_SIZE, 128, np.random.default_rng([seed, 2]), 8)
    for step, (rows, length) in zip(range(1, steps + 1), batches, strict=False):
        loss = labels.loss(logits(labels.train, rows, length), labels.targets(rows, length), None)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % each == 0 and (validation := score(labels)) > best["validation"]:
            best = {"validation": validation, "value": score(test), "epoch": step // each}
    stored = sum(parameter.numel() for parameter in parameters) * 2
    return {**best, "bytes": stored, "steps": steps}


def settings_of(method: str, seed: int) -> tuple[str, FitSettings]:
    """Return method and settings of an app as the command line writes it."""
    name, *options = method.split(":")
    values = dict(option.split("=") for option in options)
    shape: dict[str, Any] = {key: int(values[key]) for key in ("layers", "r") if key in values}
    if "targets" in values:
        shape["targets"] = values["targets"].split("+")
    rest: dict[str, Any] = {"learning_rate": float(values["lr"])} if "lr" in values else {}
    rest |= {"refit": values["refit"] == "1"} if "refit" in values else {}
    rest |= {key: int(values[key]) for key in ("steps", "patience", "batch_size") if key in values}
    if name in SIZES:
        return "lora", FitSettings(seed=seed, size=name, **rest)
    return name, FitSettings(seed=seed, lora=LoraShape(**shape), **rest)


def measure(data: AppData, method: str, seed: int) -> dict[str, Any]:
    """Fit one method and return its scores, stored bytes and CPU seconds."""
    started = time.process_time()
    if method.partition(":")[0] == "full":
        rate = float(method.partition("lr=")[2] or LEARNING_RATE)
        result: dict[str, Any] = full_fine_tuning(data, data.family, seed, rate)
    else:
        name, settings = settings_of(method, seed)
        app = fit_app(data, data.family, backbone=open_backbone("packaged"), method=name, settings=settings)
        metric = "entity_f1" if data.family == "ner" else "accuracy"
        details = app.record["seeds"][str(seed)]
        memory = app.model.adapter_memory()[app.name]["total"]
        result = {
            "value": app.metrics[metric],
            "validation": app.metrics[f"validation_{metric}"],
            "bytes": memory // 2,
            "steps": details.get("steps"),
            "best_step": details.get("best_step"),
            "method": app.record["method"],
            "calibration": app.record["calibration"],
        }
    return {**result, "cpu_seconds": round(time.process_time() - started, 1)}


def times(rounds: int = 5) -> list[dict[str, Any]]:
    """Return the CPU milliseconds of `predict` for a text of 32 sub-words, alone and next to a second app.

    The apps of all sizes take turns, one thread; the least of the rounds counts.
    """
    model, tokenizer = open_backbone("packaged")
    for name in SIZES:
        shape = FitSettings(size=name).shape(6, started=False)
        for copy in ("one", "two"):
            head = AdapterHead("token-classification", ["O", "B-A", "I-A"], model.config.hidden_size)
            lora = LoraSettings(shape.r or 16, 32, shape.layers or 2, shape.targets)
            model.add_adapter(f"{name}-{copy}", lora, head)
    text = " ".join(["word"] * 30)
    calls = {(name, n): [f"{name}-{c}" for c in ("one", "two")[:n]] for name in SIZES for n in (1, 2)}
    best = dict.fromkeys(calls, math.inf)
    for _ in range(rounds):
        for call, names in calls.items():
            model.predict([text], adapters=names, tokenizer=tokenizer)
            started = time.process_time()
            for _ in range(20):
                model.predict([text], adapters=names, tokenizer=tokenizer)
            best[call] = min(best[call], (time.process_time() - started) / 20 * 1000)
    common = {"seed": 0, "task": "times", "family": "ner", "protocol": "frontier-times", "metric": "ms"}
    common |= {"n_train": 0, "n_test": 20 * rounds, "config": {"threads": 1, "sub-words": 32}}
    common |= {"versions": versions("torch", "transformers", "peft"), "date": today()}
    return [
        {**common, "regime": name, "value": best[name, 1], "alone": best[name, 1], "two": best[name, 2]}
        for name in SIZES
    ]


def main() -> None:
    """Measure every cell that the output lacks."""
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--ner", action="append", default=[])
    parser.add_argument("--tc", action="append", default=[])
    parser.add_argument("--methods", default="")
    parser.add_argument("--times", action="store_true", help="measure prediction, too")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", default="500,200,500", help="of train, validation, test")
    parser.add_argument("--output", required=True)
    parser.add_argument("--write_rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    sizes = dict(zip(("train", "validation", "test"), map(int, arguments.rows.split(",")), strict=True))
    for record in times() if arguments.times else ():
        add_record(arguments.output, record)
    sources = [("ner", source) for source in arguments.ner] + [("tc", source) for source in arguments.tc]
    for seed in map(int, arguments.seeds.split(",")):
        for family, source in sources:
            data = None
            for method in filter(None, arguments.methods.split(",")):
                task = Path(source).name
                done = {
                    (r["regime"], r["seed"], r["task"], r["family"]) for r in read_records(arguments.output)
                }
                if (method, seed, task, family) in done:
                    continue
                data = drawn(source, family, sizes, seed)
                result = measure(data, method, seed)
                record = {
                    "regime": method,
                    "seed": seed,
                    "task": task,
                    "family": family,
                    "protocol": "frontier",
                    "metric": "entity_f1" if family == "ner" else "accuracy",
                    **result,
                    "n_train": len(data.train),
                    "n_test": len(data.test or ()),
                    "config": {"rows": arguments.rows},
                    "versions": versions("torch", "transformers", "peft"),
                    "date": today(),
                }
                add_record(arguments.output, record)
                print(
                    json.dumps(
                        {
                            k: record[k]
                            for k in ("task", "regime", "seed", "value", "validation", "cpu_seconds", "steps")
                        }
                    ),
                    flush=True,
                )
            if arguments.write_rows:
                data = data or drawn(source, family, sizes, seed)
                folder = Path(arguments.write_rows)
                folder.mkdir(parents=True, exist_ok=True)
                rows = {s: [getattr(data, s).inputs, getattr(data, s).labels] for s in sizes}
                (folder / f"{family}-{Path(source).name}-{seed}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
