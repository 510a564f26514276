"""The log of a run: means over the steps between two lines of ``metrics.jsonl``."""

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from ..files import write_bytes
from .chunks import JointBatch
from .distributed import mean_over_processes, num_processes
from .joint import JointOutput

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Collects the steps between two log lines and, if enabled, writes their means to ``metrics.jsonl``.

    Args:
        folder: Output folder of the run.
        enabled: Whether this process writes.
        device: Where processes exchange numbers.
        step: Step to resume after; later lines of an interrupted run are dropped.
        state: What `state` returned after that step.
    """

    def __init__(
        self,
        folder: Path,
        enabled: bool,
        device: torch.device | str = "cpu",
        step: int = 0,
        state: dict[str, Any] | None = None,
    ):
        file = folder / METRICS_FILE
        self.lines = [line for line in _read_lines(file) if line["step"] <= step] if step else []
        self._file = None
        if enabled:
            write_bytes(file, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
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
        tokens, padding = self._mean([self._tokens, self._padding])
        return {
            "sums": dict(zip(self._sums, sums, strict=True)),
            "steps": self._steps,
            "counts": self.total_counts(),
            "tokens": tokens,
            "padding": padding,
        }

    def total_counts(self) -> dict[str, dict[str, int]]:
        """Return the counts of all processes, which call it together."""
        totals: dict[str, dict[str, int]] = {}
        for name, counts in self.counts.items():
            before = self._counts_before.get(name, {})
            since = self._mean([value - before.get(key, 0) for key, value in counts.items()])
            means = zip(counts, since, strict=True)
            totals[name] = {key: before.get(key, 0) + round(mean * num_processes()) for key, mean in means}
        return totals

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
            counts = self.counts.setdefault(name, {})
            for key, count in batch.batches[name].counts.items():
                counts[key] = counts.get(key, 0) + count
        self._sums["loss"] += float(output.loss.detach()) * weight
        self._steps += weight
        self._tokens += batch.num_real_tokens
        self._padding += batch.num_tokens - batch.num_real_tokens

    def write(self, step: int, **more: Any) -> dict[str, Any]:
        """Write the means since the last line, over all processes, and start over; all call it together."""
        seconds = time.perf_counter() - self._since
        means = self._mean([value / max(self._steps, 1e-9) for value in self._sums.values()])
        rounded = {key: round(value, 6) for key, value in zip(self._sums, means, strict=True)}
        line: dict[str, Any] = {"step": step, **rounded, **more}
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
