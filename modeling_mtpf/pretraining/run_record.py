"""The output folder of a run, what a resumed run is compared with, and what is left behind: ``run.json``."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout

from ..errors import MtpfError
from ..files import write_bytes
from .checkpoint import list_checkpoints
from .metrics_log import METRICS_FILE

RUN_FILE = "run.json"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "huggingface_hub", "tokenizers")


def open_output_dir(path: str, resume: str) -> tuple[Path, Path | None]:
    """Create the output folder of a run, or find the checkpoint to resume from.

    Args:
        path: The folder.
        resume: ``never``; ``auto``, the newest checkpoint of the folder, if there is one; or a checkpoint.

    Returns:
        The folder, and the checkpoint to resume from, if any.

    Raises:
        MtpfError: It holds another run that is not to be resumed, or the checkpoint does not exist.
    """
    folder = Path(path)
    if folder.is_file():
        raise MtpfError(f"{folder} is a file; choose another --output_dir.")
    checkpoints = list_checkpoints(folder)
    if resume == "never":
        if (folder / METRICS_FILE).exists():
            remedy = "continue it by --resume auto" if checkpoints else "remove the folder"
            raise MtpfError(f"{folder} holds another run; choose another --output_dir or {remedy}.")
        checkpoint = None
    elif resume == "auto":
        checkpoint = checkpoints[-1] if checkpoints else None
    else:
        checkpoint = next((c for c in checkpoints if c.resolve() == Path(resume).resolve()), None)
        existing = f"it has: {', '.join(c.name for c in checkpoints)}" if checkpoints else "it has none"
        if checkpoint is None:
            raise MtpfError(f"--resume {resume} is not a checkpoint of {folder}; {existing}.")
        if checkpoint != checkpoints[-1]:
            raise MtpfError(
                f"{checkpoint} is not the newest checkpoint of {folder} ({existing}); remove the newer ones "
                "first: the run would write them again."
            )
    folder.mkdir(parents=True, exist_ok=True)
    return folder, checkpoint


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep a second run out of an output folder.

    Raises:
        MtpfError: Another process writes to the folder.
    """
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise MtpfError(f"Another run writes to {folder}; wait for it, or choose another folder.") from error


FREE_KEYS = {"output_dir", "resume", "keep", "save_every", "threads", "prefetch", "log_every", "report_to"}
"""Recipe keys that a resumed run may change: they do not touch its numbers."""


def check_same_run(facts: dict[str, Any], checkpoint: Path, state: dict[str, Any]) -> None:
    """Refuse to resume with another recipe, other data or another starting encoder.

    Raises:
        MtpfError: It names what differs.
    """
    now, then = json.loads(json.dumps(facts)), {key: state.get(key, {}) for key in facts}
    for key in (*FREE_KEYS, "demo"):  # older checkpoints record whether they were the demo
        now["recipe"].pop(key, None)
        then["recipe"].pop(key, None)
    for path, new, old in _differences(now, then):
        raise MtpfError(
            f"{checkpoint} was written with {path} = {old!r}, this run has {new!r}; resume with the same "
            "value, or choose another --output_dir."
        )


def _differences(new: Any, old: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(new, dict) and isinstance(old, dict):
        for key in new.keys() | old.keys():
            yield from _differences(new.get(key), old.get(key), f"{path}.{key}" if path else key)
    elif new != old:
        yield path.removeprefix("recipe."), new, old


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


def write_run_file(folder: Path, record: dict[str, Any]) -> None:
    """Write ``run.json`` atomically."""
    write_bytes(folder / RUN_FILE, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())


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
