"""One pre-finetuning run, from a recipe to the saved folders."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ..errors import MtpfError
from ..files import write_bytes
from ..model.adapter_files_mtpf import backbone_sha256
from ..model.modeling_mtpf import MtpfModel
from ..version import versions
from .checkpoint import clear_leftovers, read_state
from .curves import CURVES_FILE, draw
from .diagnostics import adapter_movement, backbone_movement
from .joint import JointModel
from .loop import Loop, is_lost_process
from .metrics_log import MetricsLog
from .recipe import Recipe
from .run_record import (
    PACKAGES,
    RUN_FILE,
    check_same_run,
    hardware,
    lock_folder,
    open_output_dir,
    save_run,
    summary,
)
from .setup import load_backbone, make_accelerator, prepare_families, whole_model


class Run:
    """A run in its output folder, which it locks; made by `open_run`.

    Attributes:
        recipe: Its settings.
        accelerator: Its device and processes.
        folder: Where everything is written.
        checkpoint: The checkpoint that it resumes from, if any.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, folder: Path, checkpoint: Path | None):
        self.recipe, self.accelerator = recipe, accelerator
        self.folder, self.checkpoint = folder, checkpoint
        self.started = time.time()

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to resume."""
        return self.recipe.resume == "auto" and (self.folder / RUN_FILE).is_file()

    def carry_out(self) -> tuple[MtpfModel, PreTrainedTokenizerBase] | None:
        """Train and save everything; return model and tokenizer in the main process.

        Raises:
            MtpfError: A mistake in the data or the settings, or a run that broke off.
        """
        recipe, families = self.recipe, ", ".join(self.recipe.families) or "no family"
        saved = f"a checkpoint every {recipe.save_every}" if recipe.save_every else "a checkpoint if stopped"
        job = f"Pre-finetuning {recipe.backbone} (regime {recipe.regime}: {families}), {recipe.steps} steps"
        model = load_backbone(recipe)
        self.families, context = prepare_families(recipe, model, self.folder)
        if self.accelerator.is_main_process:
            print(f"{job}, {saved}, into {self.folder}", flush=True)  # noqa: T201
        self.start_sha256 = backbone_sha256(model)
        state = read_state(self.checkpoint) if self.checkpoint else {}
        if self.checkpoint:
            check_same_run(self._facts(), self.checkpoint, state)
        before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
        joint, log = self._train(model, state)
        if not self.accelerator.is_main_process:
            return None
        joint.to("cpu").eval()
        moved = {"backbone": backbone_movement(before, joint.model.backbone), **adapter_movement(joint)}
        record = self._record(log, moved, state.get("step"))
        save_run(self.folder, joint.model, context.tokenizer, record)
        if log.lines:
            draw({self.recipe.regime: log.lines}, self.folder / CURVES_FILE, smooth=10)
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        write_bytes(self.folder / RUN_FILE, text.encode())
        print(summary(self.folder, record), flush=True)  # noqa: T201
        return joint.model, context.tokenizer

    @cached_property
    def _data(self) -> dict[str, Any]:
        return {family.name: family.describe() for family in self.families}

    def _facts(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with its checkpoint."""
        return {
            "recipe": asdict(self.recipe),
            "data": self._data,
            "start_sha256": self.start_sha256,
            "precision": self.accelerator.mixed_precision,
            "device": self.accelerator.device.type,
        }

    def _train(self, model: MtpfModel, state: dict[str, Any]) -> tuple[JointModel, MetricsLog]:
        """Run the remaining steps; return the whole model and the log."""
        recipe, accelerator, step = self.recipe, self.accelerator, state.get("step", 0)
        joint = JointModel(model, self.families, recipe.regime == "tpl", recipe.gradient_cache)
        if accelerator.is_main_process:
            clear_leftovers(self.folder)
        log = MetricsLog(self.folder, accelerator.is_main_process, accelerator.device, step, state.get("log"))
        if self.families:
            start = self._facts(), self.checkpoint, state
            Loop(recipe, joint, self.families, accelerator, log, self.folder, *start).train()
        log.close()
        self._counts = log.total_counts()
        joint = whole_model(recipe, joint, self.families, accelerator)
        accelerator.wait_for_everyone()
        accelerator.end_training()  # ends the process group, too: nothing may wait for others from here on
        return joint, log

    def _record(self, log: MetricsLog, moved: dict[str, float], resumed_at: int | None) -> dict[str, Any]:
        return {
            "regime": self.recipe.regime,
            "recipe": asdict(self.recipe),
            "versions": versions(*PACKAGES),
            "hardware": hardware(self.accelerator),
            "data": {name: {**facts, **self._counts.get(name, {})} for name, facts in self._data.items()},
            "first": log.lines[0] if log.lines else {},
            "last": log.lines[-1] if log.lines else {},
            "moved": moved,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "seconds": round(time.time() - self.started, 1),
            "resumed_at": resumed_at,
        }


@contextmanager
def open_run(recipe: Recipe) -> Iterator[Run]:
    """Start accelerate, open or resume the output folder, and lock it while the run lasts.

    Raises:
        MtpfError: The folder holds another run, or another process writes to it.
    """
    accelerator = make_accelerator(recipe)
    folder, checkpoint = open_output_dir(recipe.output_dir, recipe.resume)
    with lock_folder(folder) if accelerator.is_main_process else nullcontext():
        try:
            accelerator.wait_for_everyone()
            yield Run(recipe, accelerator, folder, checkpoint)
        except RuntimeError as error:
            if is_lost_process(error, accelerator):
                raise MtpfError("Another process of this run has ended; its message says why.") from error
            raise


def pretrain(recipe: Recipe) -> None:
    """Carry out one run, unless the folder holds it finished already."""
    with open_run(recipe) as run:
        if run.finished:
            print(f"{run.folder} holds the finished run; there is nothing to resume.")  # noqa: T201
        else:
            run.carry_out()
