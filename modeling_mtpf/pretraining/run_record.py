"""The output folder of a run: opening it, the comparison before it is resumed, what a finished run leaves."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from hub_cards import adapter_card, backbone_card, training_summary

from ..errors import MtpfError
from ..hub.files import TRAINING_FILE
from ..model.adapter_files_mtpf import ADAPTER_CONFIG_FILE, TASK_FILE
from ..model.adapters_mtpf import count_parameters
from ..model.modeling_mtpf import MtpfModel
from .checkpoint import list_checkpoints
from .families.base import FAMILY_CLASSES
from .metrics_log import METRICS_FILE
from .recipe import Recipe

RUN_FILE = "run.json"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "huggingface_hub", "tokenizers")


def open_output_dir(path: str, resume: str) -> tuple[Path, Path | None]:
    """Create the output folder of a run; return it, and the checkpoint to resume from, if any.

    Args:
        path: The folder.
        resume: ``never``; ``auto``, the newest checkpoint of the folder, if there is one; or a checkpoint.

    Raises:
        MtpfError: It holds another run that is not to be resumed, or the checkpoint does not exist.
    """
    folder = Path(path)
    if folder.is_file():
        raise MtpfError(f"{folder} is a file; choose another --output_dir.")
    checkpoints = list_checkpoints(folder)
    checkpoint = checkpoints[-1] if checkpoints and resume != "never" else None
    if resume == "never" and (folder / METRICS_FILE).exists():
        remedy = "continue it by --resume auto" if checkpoints else "remove the folder"
        raise MtpfError(f"{folder} holds another run; choose another --output_dir or {remedy}.")
    if resume not in ("never", "auto"):
        existing = f"it has: {', '.join(c.name for c in checkpoints)}" if checkpoints else "it has none"
        if Path(resume).resolve() not in [c.resolve() for c in checkpoints]:
            raise MtpfError(f"--resume {resume} is not a checkpoint of {folder}; {existing}.")
        if Path(resume).resolve() != checkpoints[-1].resolve():
            raise MtpfError(
                f"{resume} is not the newest checkpoint of {folder} ({existing}); remove the newer ones "
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
    then["recipe"] = _with_new_keys(then["recipe"])
    for key in (*FREE_KEYS, "demo"):  # older checkpoints record whether they were the demo
        now["recipe"].pop(key, None)
        then["recipe"].pop(key, None)
    for path, new, old in _differences(now, then):
        raise MtpfError(
            f"{checkpoint} was written with {path.removeprefix('recipe.')} = {old!r}, this run has {new!r}; "
            "resume with the same value, or choose another --output_dir."
        )


def _with_new_keys(recipe: dict[str, Any]) -> dict[str, Any]:
    """Fill keys that an older version did not know with their defaults, which do what it did."""
    families = {
        name: asdict(FAMILY_CLASSES[name].settings_class()) | settings if name in FAMILY_CLASSES else settings
        for name, settings in recipe.get("families", {}).items()
    }
    return json.loads(json.dumps({**asdict(Recipe()), **recipe, "families": families}))


def _differences(new: Any, old: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(new, dict) and isinstance(old, dict):
        for key in new.keys() | old.keys():
            yield from _differences(new.get(key), old.get(key), f"{path}.{key}" if path else key)
    elif new != old:
        yield path, new, old


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


def save_run(folder: Path, model: MtpfModel, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any]):
    """Write the backbone and one adapter per family, each with its card, below the run's folder."""
    for name in model.adapters:
        final = record["last"].items()
        metrics = {key.split("/")[0]: value for key, value in final if key.endswith(f"/{name}")}
        facts = {"family": name, "metrics": metrics, "training_data": record["data"].get(name)}
        target = model.save_adapter(folder / "adapters" / name, name, task=facts)
        files = [(target / file).read_text("utf-8") for file in (TASK_FILE, ADAPTER_CONFIG_FILE)]
        task, config = map(json.loads, files)
        size = count_parameters(model.backbone, name)
        adapter_card(task, config, num_parameters=size).save(target / "README.md")
    backbone = folder / "backbone"
    model.save_pretrained(backbone)
    tokenizer.save_pretrained(backbone)
    training = training_summary(record, model.adapters)
    (backbone / TRAINING_FILE).write_text(json.dumps(training, indent=2, ensure_ascii=False) + "\n", "utf-8")
    backbone_card(training).save(backbone / "README.md")


def summary(folder: Path, record: dict[str, Any]) -> str:
    """Return the table of a finished run: what was trained, losses, movement, folders, how to load."""
    first, last, moved = record["first"], record["last"], record["moved"]
    lines = [f"\nRegime {record['regime']}: {record['recipe']['steps']} steps in {record['seconds']:.0f} s\n"]
    if first:
        lines.append(f"{'family':<8} {'loss first → last':<20} {'quality first → last':<40} adapter moved")
    for family in record["data"]:
        loss, quality = f"{first[f'loss/{family}']:.2f} → {last[f'loss/{family}']:.2f}", ""
        for metric in [key for key in last if key.endswith(f"accuracy/{family}")][:1]:
            name = metric.split("/")[0].replace("_", " ")
            quality = f"{name} {first[metric]:.0%} → {last[metric]:.0%}"
        adapter = f"{moved[family]:.1%}" if family in moved else "no adapter"
        lines.append(f"{family:<8} {loss:<20} {quality:<40} {adapter}")
    lines.append(f"The shared backbone moved by {moved['backbone']:.1%} of its norm.")
    lines += ["\nFolders:", f"  {folder / 'backbone'}"]
    lines += [f"  {folder / 'adapters' / name}" for name in moved if name != "backbone"]
    lines += ["\nLoad them:", "  from modeling_mtpf import MtpfModel"]
    lines.append(f'  model = MtpfModel.from_pretrained("{folder / "backbone"}")')
    if "ner" in moved:
        lines.append(f'  model.load_adapter("{folder / "adapters" / "ner"}")')
    return "\n".join(lines)
