"""The records of the study: what is kept of runs and measurements, checked to be comparable."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from modeling_mtpf.errors import DataError
from modeling_mtpf.evaluation.contrasts import Contrast, contrast
from modeling_mtpf.evaluation.records import locked, read_records, write_records
from modeling_mtpf.evaluation.report import Cells, gather, mean_interval, tasks_of

REGIMES = ("base", "ner", "tc", "naive", "tpl")
FAMILIES = {"ner": "ner", "tc": "mteb"}
"""Family → the protocol of its main results."""
NAMES = {"ner": "NER, strict F1", "ner10": "NER, a tenth of the data, strict F1", "mteb": "TC, accuracy"}

# ------------------------------------------------------------------------------------------------ records


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Read the summaries of runs; none where there is no file."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else []


def add_run(path: Path, variant: str, summary: dict[str, Any]) -> None:
    """Add a run's summary to a file, in place of one of the same variant and seed.

    Args:
        path: JSON file that other processes may write to at the same time.
        variant: Name under which the run stands.
        summary: See `run_summaries.summarize_run`.
    """
    record = {"variant": variant, "seed": summary["recipe"]["seed"], **summary}
    with locked(path):
        others = [own for own in read_runs(path) if run_key(own) != run_key(record)]
        write_records(path, [*others, record], run_key)


def run_key(record: dict[str, Any]) -> tuple[str, int]:
    """Variant and seed."""
    return record["variant"], record["seed"]


def read_study(records: Path, runs: Path, overlap: Path) -> "Study":
    """Read everything that the report is made from."""
    counts = json.loads(overlap.read_text("utf-8")) if overlap.is_file() else {}
    return Study(read_records(records), read_runs(runs), counts)


SAME = (
    "test_rows",
    "ner_rows",
    "settings.steps",
    "precision",
    "normalize",
    "max_length",
    "samples_per_label",
)
"""What must be equal in all records of a protocol and task, by its place in ``config``."""


def check_settings(records: Sequence[dict[str, Any]]) -> None:
    """Check that variants were measured alike.

    Raises:
        DataError: With the first setting that two records of one task and protocol do not share.
    """
    seen: dict[tuple[str, str, str], tuple[Any, str]] = {}
    for record in records:
        for place in SAME:
            value: Any = record["config"]
            for key in place.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            known = seen.setdefault((record["protocol"], record["task"], place), (value, record["regime"]))
            if known[0] != value:
                raise DataError(
                    f"{record['task']} was measured with {place} = {value} for {record['regime']!r}, but "
                    f"{known[0]} for {known[1]!r}; measure both alike."
                )


@dataclass(frozen=True)
class Study:
    """All records of the study.

    Attributes:
        records: Of the benchmark; their regimes are the variants' names, ``start/regime…``.
        runs: Summaries of the pre-finetuning runs.
        overlap: Test texts that occur in the training data, by ``eval/study/overlap.py``.
    """

    records: Sequence[dict[str, Any]]
    runs: Sequence[dict[str, Any]]
    overlap: dict[str, Any]

    @cached_property
    def cells(self) -> Cells:
        """Values in percent; none of a plan that has not been run."""
        check_settings(self.records)
        return gather(self.records) if self.records else {}

    @cached_property
    def starts(self) -> list[str]:
        """Starting encoders, in order of name."""
        return sorted({variant.split("/")[0] for _, _, variant in self.cells})

    def variants(self, protocol: str, start: str) -> list[str]:
        """Variants of a starting encoder, the regimes first."""
        found = {v for own, _, v in self.cells if own == protocol and v.split("/")[0] == start}
        main = [f"{start}/{regime}" for regime in REGIMES]
        return [v for v in main if v in found] + sorted(found - set(main))

    def common(self, protocol: str, variants: Sequence[str]) -> tuple[list[str], list[int]]:
        """Return the tasks that all these variants have, and the seeds that all have of all of them."""
        tasks = [
            task
            for task in tasks_of(self.cells, protocol)
            if all((protocol, task, variant) in self.cells for variant in variants)
        ]
        seeds = [set(self.cells[protocol, task, variant]) for task in tasks for variant in variants]
        return tasks, sorted(set.intersection(*seeds)) if seeds else []

    def average(self, protocol: str, variant: str, tasks: Sequence[str], seeds: Sequence[int]) -> str:
        """Mean over tasks, ± half the 95 % t interval over seeds."""
        if not tasks or not seeds:
            return "–"
        own = [self.cells[protocol, task, variant] for task in tasks]
        return str(mean_interval([float(np.mean([values[seed] for values in own])) for seed in seeds]))

    def contrast(self, protocol: str, first: str, second: str) -> Contrast | None:
        """See `contrasts.contrast`."""
        return contrast(self.cells, protocol, first, second)


__all__ = ["Study", "add_run", "check_settings", "read_runs", "read_study"]
