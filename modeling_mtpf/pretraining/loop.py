"""The training loop: steps, checkpoints, log lines, and an orderly end when something breaks."""

import signal
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from ..devices import wants_few_shapes
from ..errors import MtpfError
from .checkpoint import load_checkpoint, save_checkpoint
from .chunks import JointBatch, chunk_shape
from .diagnostics import gradient_cosine, tail_similarity
from .distributed import mean_over_processes
from .dropout import fast_dropout_in
from .families.base import Family
from .joint import JointModel, JointOutput, parameter_groups
from .loader import joint_batch, load_batches
from .metrics_log import MetricsLog
from .recipe import Recipe


class Interrupted(MtpfError):
    """The run was asked to stop, and has written a checkpoint."""

    exit_status = 128 + signal.SIGTERM


def is_lost_process(error: RuntimeError, accelerator: Accelerator) -> bool:
    """Return whether an error says that another process of the run has ended."""
    signs = ("connection", "gloo", "nccl", "timed out", "peer")
    return accelerator.num_processes > 1 and any(sign in str(error).lower() for sign in signs)


class StopRequest:
    """Collects SIGTERM and Ctrl-C in its context instead of ending at once; a second Ctrl-C interrupts."""

    received: signal.Signals | None = None

    def __enter__(self):
        self._handlers = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def by_any(self, accelerator: Accelerator) -> bool:
        """Return whether any process has been asked to stop; all call it together."""
        if accelerator.num_processes == 1:
            return self.received is not None
        flag = torch.tensor(float(self.received is not None), device=accelerator.device)
        return bool(mean_over_processes(flag) > 0)


@dataclass
class Loop:
    """The optimiser steps of a run.

    Attributes:
        recipe: Settings of the run.
        joint: The model and the families' objectives.
        families: What is trained, its data prepared.
        accelerator: Device and processes.
        log: Takes the losses of every step.
        folder: Where checkpoints are written.
        facts: What every checkpoint also records, such as the recipe.
        checkpoint: The checkpoint to resume from, if any.
        state: Its plain values.
    """

    recipe: Recipe
    joint: JointModel
    families: list[Family]
    accelerator: Accelerator
    log: MetricsLog
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)

    def train(self) -> None:
        """Run the remaining steps.

        Raises:
            MtpfError: Broken data, numbers that are not finite, a lost process; the last checkpoint stays.
            Interrupted: The run was asked to stop; it has written a checkpoint.
        """
        self.step = self.saved = self.state.get("step", 0)
        on_cpu, encoder = self.accelerator.device.type == "cpu", self.joint.model.backbone
        dropout = fast_dropout_in(encoder) if on_cpu and self.recipe.fast_dropout else nullcontext()
        with StopRequest() as request, dropout:
            try:
                self._prepare()
                self._run_steps(request)
            except RuntimeError as error:
                if is_lost_process(error, self.accelerator):
                    raise MtpfError(
                        f"Step {self.step + 1}: another process was lost. Start again with --resume auto to "
                        "resume from the last checkpoint."
                    ) from error
                raise

    def _prepare(self) -> None:
        """Make optimiser, schedule and batches; load the checkpoint, if any."""
        recipe, joint, accelerator = self.recipe, self.joint, self.accelerator
        rates = recipe.learning_rate, recipe.adapter_learning_rate
        optimizer = torch.optim.AdamW(parameter_groups(joint, *rates, recipe.weight_decay), fused=True)
        warmup = int(recipe.warmup * recipe.steps)
        self.schedule = get_cosine_schedule_with_warmup(optimizer, warmup, recipe.steps)
        if recipe.compile:
            joint.compile_trunk()
        self.wrapped, self.optimizer = accelerator.prepare(joint, optimizer)
        longest = max(family.settings.max_length for family in self.families)
        few_shapes = wants_few_shapes(accelerator.device, accelerator.mixed_precision)
        self.shape = chunk_shape(accelerator.device, longest, recipe.chunk_tokens, few_shapes)
        self.batch_of = partial(
            joint_batch,
            families=self.families,
            shape=self.shape,
            pad_token_id=joint.model.config.pad_token_id or 0,
            parts=recipe.gradient_accumulation_steps,
        )
        if recipe.report_to:
            plain = {
                key: value for key, value in vars(recipe).items() if isinstance(value, (int, float, str))
            }
            accelerator.init_trackers("mtpf", config=plain)
        if self.checkpoint is not None:
            inner = self.optimizer.optimizer
            load_checkpoint(self.checkpoint, joint, inner)
            self.schedule.load_state_dict(self.state["schedule"])
            for group, rate in zip(inner.param_groups, self.schedule.get_last_lr(), strict=True):
                group["lr"] = rate

    def _run_steps(self, request: StopRequest) -> None:
        """Train to the last step, or until asked to stop."""
        recipe, accelerator, first = self.recipe, self.accelerator, self.step
        parts = recipe.gradient_accumulation_steps
        first_last = first * parts, recipe.steps * parts
        stream = load_batches(self.batch_of, *first_last, recipe.prefetch, accelerator.device)
        self.wrapped.train()
        silent = not accelerator.is_main_process
        with tqdm(total=recipe.steps, initial=first, desc=recipe.regime, disable=silent) as bar:
            for step in range(first + 1, recipe.steps + 1):
                batch = self._step(step, stream)
                self.step = step
                bar.update()
                if line := self._report(step, batch):
                    bar.set_postfix({k: f"{v:.3f}" for k, v in line.items() if k.startswith("loss/")})
                stop = request.by_any(accelerator)
                due = bool(recipe.save_every) and (step % recipe.save_every == 0 or step == recipe.steps)
                if stop or due:
                    self._save(step)
                if stop and step < recipe.steps:
                    name = request.received.name if request.received else "a signal to another process"
                    raise Interrupted(
                        f"Stopped after step {step} by {name}; a checkpoint is written. Resume with "
                        "--resume auto."
                    )

    def _step(self, step: int, stream: Iterator[JointBatch]) -> JointBatch:
        """One optimiser step."""
        parts = self.recipe.gradient_accumulation_steps
        for part in range(parts):
            batch = next(stream)
            last = part == parts - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                output = self.wrapped(batch)
                # Every process looks at the mean of all, so that all stop in the same step.
                if not torch.isfinite(mean_over_processes(output.loss)):
                    raise MtpfError(f"Step {step}: {_broken_rows(output, batch)} {self._last()}")
                self.accelerator.backward(output.loss / parts)
            self.log.add(output, batch, 1 / parts)
        parameters, limit = self.joint.parameters(), self.recipe.gradient_norm_limit or float("inf")
        self._norm = float(self.accelerator.clip_grad_norm_(parameters, self.recipe.max_grad_norm))
        if not self._norm <= limit:
            raise MtpfError(
                f"Step {step}: the gradient norm is {self._norm:.3g}, above gradient_norm_limit ({limit:g}), "
                f"after {_describe(batch)}; lower the learning rate or look at the data. {self._last()}"
            )
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return batch

    def _last(self) -> str:
        if not self.saved:
            return "There is no checkpoint yet."
        return f"The last checkpoint is that of step {self.saved}."

    def _report(self, step: int, batch: JointBatch) -> dict[str, Any]:
        """Write a line of the log when it is due, and return it."""
        recipe, accelerator = self.recipe, self.accelerator
        sharded = accelerator.distributed_type == DistributedType.FSDP
        due = bool(recipe.diagnostics_every) and step % recipe.diagnostics_every == 0 and not sharded
        if not (due or step % recipe.log_every == 0 or step == recipe.steps):
            return {}
        more = {"gradient_norm": round(self._norm, 4), "learning_rate": self.schedule.get_last_lr()[0]}
        if due:
            with accelerator.autocast():
                cosine = gradient_cosine(self.joint, batch, self.shape)
                similarity = tail_similarity(self.joint, batch)
            more |= {f"gradient_cosine/{group}": round(value, 4) for group, value in cosine.items()}
            more |= {f"tail_cka/{layer}": round(value, 4) for layer, value in similarity.items()}
        line = self.log.write(step, **more)
        accelerator.log(line, step=step)
        return line

    def _save(self, step: int) -> None:
        state = {"schedule": self.schedule.state_dict(), "log": self.log.state(), **self.facts}
        optimizer = self.optimizer.optimizer
        try:
            save_checkpoint(self.folder, step, self.joint, optimizer, state, self.recipe.keep)
        except OSError as error:
            raise MtpfError(
                f"Step {step}: the checkpoint cannot be written: {error}. {self._last()}"
            ) from error
        self.saved = step


def _describe(batch: JointBatch) -> str:
    """Name family, source and rows of a batch."""
    parts = []
    for name, rows in batch.batches.items():
        numbers = f" rows {', '.join(map(str, rows.row_numbers[:3]))}, …" if rows.row_numbers else ""
        parts.append(f"family {name!r} (source {rows.source!r}{numbers})")
    return " and ".join(parts)


def _broken_rows(output: JointOutput, batch: JointBatch) -> str:
    """Say in which family, source and row numbers stopped being finite."""
    for name, rows in output.rows.items():
        bad = (~torch.isfinite(rows).all(1)).nonzero().flatten().tolist()
        part = batch.batches[name]
        if not bad and torch.isfinite(output.losses[name]):
            continue
        start, source = f"the loss of family {name!r} is not finite", repr(part.source)
        if not bad or len(bad) == len(rows) or not part.row_numbers:
            return f"{start} in the whole batch of source {source}: lower the learning rate."
        return (
            f"{start}, from row {part.row_numbers[bad[0]]} of source {source} ({len(bad)} of {len(rows)} "
            "rows): look at that row, or lower the learning rate."
        )
    return "the loss is not finite in another process; its message names the row."
