"""The records of the study: measurements and summaries of runs, checked to be comparable."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eval.study.contrasts import Contrast, contrast
from modeling_mtpf.errors import DataError
from modeling_mtpf.evaluation.records import config_value, locked, read_records, write_records
from modeling_mtpf.evaluation.report import gather
from modeling_mtpf.evaluation.statistics import Cells, mean_interval, tasks_of

REGIMES = ("base", "ner", "tc", "naive", "tpl")
MAIN_PROTOCOLS = {"ner": "ner", "tc": "mteb"}
"""Family → the protocol of its main results."""
NAMES = {"ner": "NER, strict F1", "ner10": "NER, a tenth of the data, strict F1", "mteb": "TC, accuracy"}
SAME = (
    "test_rows",
    "ner_rows",
    "settings.steps",
    "precision",
    "normalize",
    "max_length",
    "samples_per_label",
)
"""What must be equal in all records of a protocol and task, by its path in ``config``."""


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Read the summaries of runs; return an empty list if there is no file."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else []


def add_run(path: Path, variant: str, summary: dict[str, Any]) -> None:
    """Add a run's summary to a file, replacing one of the same variant and seed.

    Args:
        path: JSON file that other processes may write to at the same time.
        variant: Name of the run's variant.
        summary: See `summarize_runs.summarize_run`.
    """
    record = {"variant": variant, "seed": summary["recipe"]["seed"], **summary}
    with locked(path):
        others = [run for run in read_runs(path) if _run_key(run) != _run_key(record)]
        write_records(path, [*others, record], _run_key)


def _run_key(record: dict[str, Any]) -> tuple[str, int]:
    return record["variant"], record["seed"]


def read_study(records: Path, runs: Path, overlap: Path) -> "Study":
    """Read everything that the report is made from."""
    counts = json.loads(overlap.read_text("utf-8")) if overlap.is_file() else {}
    return Study(read_records(records), read_runs(runs), counts)


def _check_settings(records: Sequence[dict[str, Any]]) -> None:
    """Check that all variants were measured alike."""
    seen: dict[tuple[str, str, str], tuple[Any, str]] = {}
    for record in records:
        for path in SAME:
            here = config_value(record, path), record["regime"]
            first = seen.setdefault((record["protocol"], record["task"], path), here)
            if first[0] != here[0]:
                raise DataError(
                    f"{record['task']} was measured with {path} = {here[0]} for {here[1]!r}, but "
                    f"{first[0]} for {first[1]!r}; measure both alike."
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
        """Values in percent; empty for a plan that has not been run.

        Raises:
            DataError: Two records of one task and protocol were measured with different settings.
        """
        _check_settings(self.records)
        return gather(self.records) if self.records else {}

    @cached_property
    def starts(self) -> list[str]:
        """Starting encoders, in order of name."""
        return sorted({variant.split("/")[0] for _, _, variant in self.cells})

    def variants(self, protocol: str, start: str) -> list[str]:
        """Variants of a starting encoder, the regimes first."""
        names = {v for p, _, v in self.cells if p == protocol and v.split("/")[0] == start}
        return self.regimes(protocol, start) + sorted(names - {f"{start}/{regime}" for regime in REGIMES})

    def regimes(self, protocol: str, start: str) -> list[str]:
        """Variants of a starting encoder that are one of the five regimes themselves."""
        names = {variant for p, _, variant in self.cells if p == protocol}
        return [name for regime in REGIMES if (name := f"{start}/{regime}") in names]

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
        values = [self.cells[protocol, task, variant] for task in tasks]
        return str(mean_interval([float(np.mean([by_seed[seed] for by_seed in values])) for seed in seeds]))

    def contrast(self, protocol: str, first: str, second: str) -> Contrast | None:
        """See `contrasts.contrast`."""
        return contrast(self.cells, protocol, first, second)
