"""What a run leaves behind: ``metrics.jsonl`` while it runs, then ``run.json``."""

import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from ..errors import MtpfError
from .checkpoint import list_checkpoints
from .chunks import JointBatch
from .distributed import mean_over_processes, num_processes
from .joint import JointOutput

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "tokenizers",
)


def open_output_dir(path: str, resume: str) -> tuple[Path, Path | None]:
    """Create the output folder of a run, or find where to go on.

    Args:
        path: The folder.
        resume: ``never``; ``auto``, the newest checkpoint of the folder, if there is one; or a checkpoint.

    Returns:
        The folder, and the checkpoint to go on from.

    Raises:
        MtpfError: It holds another run that is not to be resumed, or the checkpoint does not exist.
    """
    folder = Path(path)
    if folder.is_file():
        raise MtpfError(f"{folder} is a file; choose another --output_dir.")
    checkpoints = list_checkpoints(folder)
    if resume == "never":
        if (folder / METRICS_FILE).exists():
            mend = "go on with it by --resume auto" if checkpoints else "remove the folder"
            raise MtpfError(f"{folder} holds another run; choose another --output_dir or {mend}.")
        checkpoint = None
    elif resume == "auto":
        checkpoint = checkpoints[-1] if checkpoints else None
    else:
        checkpoint = next((c for c in checkpoints if c.resolve() == Path(resume).resolve()), None)
        found = f"it has: {', '.join(c.name for c in checkpoints)}" if checkpoints else "it has none"
        if checkpoint is None:
            raise MtpfError(f"--resume {resume} is no checkpoint of {folder}; {found}.")
        if checkpoint != checkpoints[-1]:
            raise MtpfError(
                f"{checkpoint} is not the newest checkpoint of {folder} ({found}); remove the newer ones "
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
    with (folder / ".lock").open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise MtpfError(
                    f"Another run writes to {folder}; wait for it, or choose another folder."
                ) from error
        yield


_CPU = torch.device("cpu")
FREE_KEYS = {"output_dir", "resume", "keep", "save_every", "threads", "prefetch", "log_every", "report_to"}
"""Recipe keys that a resumed run may change: they do not touch its numbers."""


def check_same_run(facts: dict[str, Any], checkpoint: Path, state: dict[str, Any]) -> None:
    """Refuse to resume with another recipe, other data or another starting encoder.

    Raises:
        MtpfError: It names what differs.
    """
    now, then = json.loads(json.dumps(facts)), {key: state.get(key, {}) for key in facts}
    for key in FREE_KEYS:
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


class MetricsLog:
    """Collects the steps between two log lines and writes their means to ``metrics.jsonl``.

    Args:
        folder: Output folder of the run.
        enabled: Only the main process writes.
        device: Where processes exchange numbers.
        step: Step to go on after; later lines of a run that was broken off are dropped.
        state: What `state` gave there.
    """

    def __init__(
        self,
        folder: Path,
        enabled: bool,
        device: torch.device = _CPU,
        step: int = 0,
        state: dict[str, Any] | None = None,
    ):
        file = folder / METRICS_FILE
        self.lines = [line for line in _read_lines(file) if line["step"] <= step] if step else []
        self._file = None
        if enabled:
            temporary = file.with_name(f".{file.name}.tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines), "utf-8")
            temporary.replace(file)
            self._file = file.open("a", encoding="utf-8")
        state = state or {}
        self._sums: dict[str, float] = defaultdict(float, state.get("sums", {}))
        self._steps: float = state.get("steps", 0.0)
        # Counts of the whole run: those of all processes up to the checkpoint, and of this one since.
        self.counts: dict[str, dict[str, int]] = {k: dict(v) for k, v in state.get("counts", {}).items()}
        self._counts_before = state.get("counts", {})
        self._tokens, self._padding = state.get("tokens", 0), state.get("padding", 0)
        self._tokens_before = self._tokens
        self._device = device
        self._since = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must keep: means over all processes, which call it together."""
        sums = self._mean(list(self._sums.values()))
        tokens = self._mean([self._tokens, self._padding])
        return {
            "sums": dict(zip(self._sums, sums, strict=True)),
            "steps": self._steps,
            "counts": self.total_counts(),
            "tokens": tokens[0],
            "padding": tokens[1],
        }

    def total_counts(self) -> dict[str, dict[str, int]]:
        """Return the counts of all processes, which call it together."""
        found: dict[str, dict[str, int]] = {}
        for name, own in self.counts.items():
            before = self._counts_before.get(name, {})
            since = self._mean([value - before.get(key, 0) for key, value in own.items()])
            found[name] = {
                key: before.get(key, 0) + round(mean * num_processes())
                for key, mean in zip(own, since, strict=True)
            }
        return found

    def _mean(self, values: list[float]) -> list[float]:
        if num_processes() == 1:
            return values
        return mean_over_processes(torch.tensor(values, dtype=torch.float64, device=self._device)).tolist()

    def add(self, output: JointOutput, batch: JointBatch, weight: float = 1.0) -> None:
        """Add one forward's results; ``weight`` is its share of an optimiser step."""
        for name, loss in output.losses.items():
            self._sums[f"loss/{name}"] += float(loss.detach()) * weight
            for metric, value in output.metrics[name].items():
                self._sums[f"{metric}/{name}"] += float(value) * weight
            own = self.counts.setdefault(name, {})
            for key, count in batch.batches[name].counts.items():
                own[key] = own.get(key, 0) + count
        self._sums["loss"] += float(output.loss.detach()) * weight
        self._steps += weight
        self._tokens += batch.num_real_tokens
        self._padding += batch.num_tokens - batch.num_real_tokens

    def write(self, step: int, **more: Any) -> dict[str, Any]:
        """Write the means since the last line, over all processes, and start anew; all call it together."""
        seconds = time.perf_counter() - self._since
        means = self._mean([value / max(self._steps, 1e-9) for value in self._sums.values()])
        line: dict[str, Any] = {"step": step}
        line.update({key: round(value, 6) for key, value in zip(self._sums, means, strict=True)})
        line.update(more)
        tokens, padding, since = self._mean([self._tokens, self._padding, self._tokens - self._tokens_before])
        line["tokens_per_second"] = round(since * num_processes() / seconds, 1)
        line["padding"] = round(padding / max(1.0, padding + tokens), 4)
        self.lines.append(line)
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        self._sums.clear()
        self._steps, self._tokens, self._padding, self._tokens_before = 0.0, 0, 0, 0
        self._since = time.perf_counter()
        return line

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a log, without a last one that was cut off."""
    lines = []
    for text in file.read_text("utf-8").splitlines() if file.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


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
    "FREE_KEYS",
    "METRICS_FILE",
    "RUN_FILE",
    "MetricsLog",
    "check_same_run",
    "hardware",
    "lock_folder",
    "open_output_dir",
    "summary",
    "write_run_file",
]
