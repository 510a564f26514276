"""Checkpoints of a run: complete or absent, without pickles, enough to resume bit for bit.

The folder ``checkpoints/step-N`` has ``model.safetensors`` (backbone, task-primary LoRA, objectives),
``optimizer.safetensors`` (AdamW's moments by parameter name), ``random-R.safetensors`` (state of process R's
generators) and ``state.json`` (step, schedule, sums, counts, recipe). The sampler needs no state.
"""

import json
import os
import random
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..errors import MtpfError, first_line
from .distributed import num_processes, process_index, wait_for_all

FOLDER = "checkpoints"
MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"
_NAME = re.compile(r"step-(\d+)")
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_READ = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)


def list_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    folders = [path for path in (run / FOLDER).glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))


def clear_leftovers(run: Path) -> None:
    """Remove what a run left that was killed while saving."""
    for path in (run / FOLDER).glob(".step-*"):
        shutil.rmtree(path)


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint under a temporary name, and rename it when everything is on disk.

    All processes call it together; the first writes what all share.

    Args:
        run: Output folder of the run.
        step: Optimiser steps done.
        model: The model, wrapped or not.
        optimizer: Its optimiser.
        state: Plain values that `read_state` returns.
        keep: Number of newest checkpoints to keep.
    """
    rank = process_index()
    folder = run / FOLDER / f"step-{step}"
    partial = folder.with_name(f".{folder.name}.partial")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    wait_for_all()
    weights = get_model_state_dict(model, options=_FULL)
    moments = get_optimizer_state_dict(model, optimizer, options=_FULL)
    _save(random_state(), partial / f"random-{rank}.safetensors")
    if rank == 0:
        _save(weights, partial / MODEL_FILE)
        _save(_flat(moments), partial / OPTIMIZER_FILE)
        (partial / STATE_FILE).write_text(json.dumps({"step": step, **state}, ensure_ascii=False), "utf-8")
        _to_disk(partial / STATE_FILE)
    wait_for_all()
    if rank == 0:
        if folder.exists():
            _remove(folder)
        partial.rename(folder)
        _to_disk(folder.parent)
        for old in list_checkpoints(run)[:-keep]:
            _remove(old)
    wait_for_all()
    return folder


def _remove(folder: Path) -> None:
    """Remove a checkpoint, renamed first: half of one must not look like one."""
    hidden = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the plain values of a checkpoint; raise `MtpfError` if it cannot be read."""
    try:
        return json.loads((folder / STATE_FILE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise MtpfError(f"The checkpoint {folder} cannot be read: {error}.") from error


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load model, optimiser and random numbers of this process from a checkpoint.

    Raises:
        MtpfError: It does not fit the model, or was written by another number of processes.
    """
    written, processes = len(list(folder.glob("random-*.safetensors"))), num_processes()
    if written != processes:
        raise MtpfError(f"{folder} was written by {written} processes, not {processes}; resume with as many.")
    try:
        weights: dict[str, Any] = dict(load_file(folder / MODEL_FILE))
        set_model_state_dict(model, weights, options=_READ)
        template: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=_READ))
        template["state"] = _nested(load_file(folder / OPTIMIZER_FILE))
        set_optimizer_state_dict(model, optimizer, template, options=_READ)
        set_random_state(load_file(folder / f"random-{process_index()}.safetensors"))
    except (OSError, SafetensorError) as error:
        message = f"The checkpoint {folder} is damaged: {error}. Remove it to resume from the one before."
        raise MtpfError(message) from error
    except (RuntimeError, KeyError) as error:
        raise MtpfError(f"The checkpoint {folder} does not fit this model: {first_line(error)}") from error


def random_state() -> dict[str, torch.Tensor]:
    """Return the state of all random number generators of this process."""
    _, numbers, gauss = random.getstate()
    numbers_of_numpy: Any = np.random.get_state()
    _, keys, position, has_gauss, cached = numbers_of_numpy
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(numbers, dtype=torch.int64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "gauss": torch.tensor([cached, float("nan") if gauss is None else gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    cached, gauss = state["gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), None if gauss != gauss else gauss))
    position, has_gauss = state["numpy_position"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _flat(optimizer: Any) -> dict[str, torch.Tensor]:
    parts = optimizer["state"].items()
    return {f"{name}|{key}": value for name, moments in parts for key, value in moments.items()}


def _nested(flat: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    state: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for both, value in flat.items():
        name, _, key = both.rpartition("|")
        state[name][key] = value
    return dict(state)


def _save(tensors: dict[str, Any], file: Path) -> None:
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, file)
    _to_disk(file)


def _to_disk(path: Path) -> None:
    """Wait until a file or folder is on disk: a rename must not overtake what it makes visible."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
