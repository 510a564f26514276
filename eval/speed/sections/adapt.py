"""Time and size of an app of 1,000 short messages at default settings, the start of the process included.

Reads the training sets of `TASKS` below the folder that ``MTPF_DATA`` names.
"""

import os
import tempfile
import time
from pathlib import Path

ROWS = 1_000
TASKS = {"ner": ("hwu64", "snips", "restaurants8k"), "tc": ("banking77", "massive_intent", "sms_spam")}
SECONDS = {"ner": 120, "tc": 20}
MEGABYTES = 1.5

CONTESTANTS = {f"{family}-{task}": 99 for family, tasks in TASKS.items() for task in tasks}


def measure(contestant: str, options: dict) -> dict[str, float]:
    """Fit one app in this process and return the age of the process."""
    import datasets
    import psutil
    import torch

    from modeling_mtpf.adaptation import fit_app

    torch.set_num_threads(options["threads"])
    datasets.disable_progress_bars()
    family, task = contestant.split("-")
    with tempfile.TemporaryDirectory() as work:
        rows = datasets.Dataset.from_parquet(
            str(Path(os.environ["MTPF_DATA"]) / family / task / "train.parquet"), cache_dir=work
        )
        drawn = rows.shuffle(seed=0).select(range(ROWS))  # type: ignore[union-attr]
        drawn.to_parquet(f"{work}/messages.parquet")  # type: ignore[union-attr]
        started = time.time()
        app = fit_app(f"{work}/messages.parquet", family, output_dir=f"{work}/{task}")
        assert app.folder is not None
        size = sum(file.stat().st_size for file in app.folder.iterdir())
    return {
        "seconds": round(time.time() - psutil.Process().create_time(), 2),
        "seconds_fit": round(time.time() - started, 2),
        "megabytes": round(size / 1e6, 3),
        "labels": len(app.model.heads[app.name].labels),  # type: ignore[arg-type]
    }


def compare(medians: dict[str, dict[str, float]]) -> dict[str, tuple[float, str, float]]:
    """Return time and size of every app, each with its limit."""
    judged: dict[str, tuple[float, str, float]] = {}
    for name, numbers in medians.items():
        judged[f"seconds, {name}"] = numbers["seconds"], "<=", SECONDS[name.split("-")[0]]
        judged[f"megabytes, {name}"] = numbers["megabytes"], "<=", MEGABYTES
    return judged
