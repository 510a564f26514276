"""What a run leaves behind: ``metrics.jsonl`` while it runs, then ``run.json``."""

import json
import os
import platform
import time
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..errors import MtpfError
from .joint import JointOutput

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
PACKAGES = (
    "mtpf",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "tokenizers",
)


def new_output_dir(path: str) -> Path:
    """Create the output folder of a run.

    Raises:
        MtpfError: It holds a finished or a broken-off run already.
    """
    folder = Path(path)
    if folder.is_file():
        raise MtpfError(f"{folder} is a file; choose another --output_dir.")
    if (folder / METRICS_FILE).exists():
        raise MtpfError(f"{folder} holds another run; choose another --output_dir or remove the folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware(accelerator: Accelerator) -> dict[str, Any]:
    """Return what the run computed on."""
    device = accelerator.device
    cpu = platform.processor() or platform.machine()
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
    }


class MetricsLog:
    """Collects the steps between two log lines and writes their means to ``metrics.jsonl``.

    Args:
        folder: Output folder of the run.
        enabled: Only the main process writes.
    """

    def __init__(self, folder: Path, enabled: bool):
        self._file = (folder / METRICS_FILE).open("a", encoding="utf-8") if enabled else None
        self._sums: dict[str, float] = defaultdict(float)
        self._steps = 0
        self._since = time.perf_counter()
        self.lines: list[dict[str, Any]] = []

    def add(self, output: JointOutput, tokens: int, weight: float = 1.0) -> None:
        """Add one forward's results; ``weight`` is its share of an optimiser step."""
        for name, loss in output.losses.items():
            self._sums[f"loss/{name}"] += float(loss.detach()) * weight
            for metric, value in output.metrics[name].items():
                self._sums[f"{metric}/{name}"] += float(value) * weight
        self._sums["loss"] += float(output.loss.detach()) * weight
        self._sums["tokens"] += tokens
        self._steps += weight  # type: ignore[assignment]

    def write(self, step: int, **more: Any) -> dict[str, Any]:
        """Write the means since the last line, and start anew."""
        seconds = time.perf_counter() - self._since
        line: dict[str, Any] = {"step": step}
        tokens = self._sums.pop("tokens", 0.0)
        line.update({key: round(value / max(self._steps, 1e-9), 6) for key, value in self._sums.items()})
        line.update(more)
        line["tokens_per_second"] = round(tokens / seconds, 1)
        self.lines.append(line)
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        self._sums.clear()
        self._steps, self._since = 0, time.perf_counter()
        return line

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def write_run_file(folder: Path, record: dict[str, Any]) -> None:
    """Write ``run.json`` in one go."""
    temporary = folder / f".{RUN_FILE}.tmp"
    temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
    temporary.replace(folder / RUN_FILE)


def summary(folder: Path, record: dict[str, Any]) -> str:
    """Return the table of a finished run: what was trained, losses, movement, folders, how to load."""
    first, last = record["first"], record["last"]
    lines = [
        "",
        f"Regime {record['regime']}: {record['recipe']['steps']} steps in {record['seconds']:.0f} s",
        "",
    ]
    if first:
        lines.append(f"{'family':<8} {'loss first → last':<20} {'quality first → last':<40} adapter moved")
    for family in record["data"]:
        loss = f"{first[f'loss/{family}']:.2f} → {last[f'loss/{family}']:.2f}"
        metric = next((key for key in last if key.endswith(f"accuracy/{family}")), None)
        quality = ""
        if metric:
            name = metric.split("/")[0].replace("_", " ")
            quality = f"{name} {first[metric]:.0%} → {last[metric]:.0%}"
        moved = record["moved"].get(family)
        lines.append(
            f"{family:<8} {loss:<20} {quality:<40} {f'{moved:.1%}' if moved is not None else 'no adapter'}"
        )
    lines.append(f"The shared backbone moved by {record['moved']['backbone']:.1%} of its norm.")
    lines += ["", "Folders:", f"  {folder / 'backbone'}"]
    lines += [f"  {folder / 'adapters' / name}" for name in record["moved"] if name != "backbone"]
    lines += [
        "",
        "Load them:",
        "  from modeling_mtpf import MtpfModel",
        f'  model = MtpfModel.from_pretrained("{folder / "backbone"}")',
    ]
    if "ner" in record["moved"]:
        lines.append(f'  model.load_adapter("{folder / "adapters" / "ner"}")')
    return "\n".join(lines)


__all__ = [
    "METRICS_FILE",
    "RUN_FILE",
    "MetricsLog",
    "hardware",
    "new_output_dir",
    "summary",
    "versions",
    "write_run_file",
]
