"""The task list ``tasks.json``: downstream sets of both families, the source of their data, and settings."""

import json
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..data.app_data import AppData, load_app_data
from ..data.app_sources import split_files
from ..data.sources import tables
from ..errors import DataError, RecipeError
from ..settings import nearest

DATA_VARIABLE = "MTPF_DATA"
"""Environment variable that names the folder ``<family>/<task>/<split>.parquet``."""


@dataclass(frozen=True)
class Task:
    """One downstream set.

    Attributes:
        name: Unique within its family.
        family: ``ner`` or ``tc``.
        source: Who publishes it.
        licence: Of the data.
        hub: ``id``, ``config`` and ``revision`` of a Hub data set, where the source is one.
        samples_per_label: Of MTEB's few-shot protocol.
        published: Encoder → published accuracy in that protocol, to check this harness against.
    """

    name: str
    family: str
    source: str
    licence: str
    hub: dict[str, str | None] | None = None
    samples_per_label: int = 8
    published: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Family and name, ``tc/snips``."""
        return f"{self.family}/{self.name}"


@cache
def all_tasks() -> tuple[Task, ...]:
    """Read the task list."""
    rows = json.loads((Path(__file__).parent / "tasks.json").read_text("utf-8"))
    return tuple(Task(**row) for row in rows)


def select_tasks(names: str, families: set[str]) -> list[Task]:
    """Return the tasks of the families that a comma-separated list names, or ``all``.

    A name alone means the task of that name in each of the families; ``tc/snips`` means one.

    Raises:
        RecipeError: An unknown name, or one of another family.
    """
    tasks = [task for task in all_tasks() if task.family in families]
    if names == "all":
        return tasks
    chosen: list[Task] = []
    for name in (part.strip() for part in names.split(",")):
        named = [task for task in tasks if name in (task.name, task.key)]
        if not named:
            known = [task.name for task in tasks]
            others = [task.key for task in all_tasks() if name in (task.name, task.key)]
            hint = f"{others[0]} needs a protocol of its family; " if others else nearest(name, known)
            raise RecipeError(f"Unknown task {name!r}; {hint}known: {', '.join(known)}.")
        chosen += [task for task in named if task not in chosen]
    return chosen


def check_task(task: Task, data: str | None = None) -> Path | None:
    """Return the folder with a task's data, or ``None`` if it comes from the Hub; no data is read.

    ``data`` is the folder with ``<family>/<task>/<split>.parquet``, by default that of ``MTPF_DATA``.

    Raises:
        DataError: The data is neither in the folder nor on the Hub, or the folder lacks a split.
    """
    root = data or os.environ.get(DATA_VARIABLE)
    folder = Path(root or "") / task.family / task.name
    if root and folder.is_dir():
        files = tables(folder) or split_files(folder, task.family)
        if missing := [split for split in ("train", "test") if split not in files]:
            raise DataError(f"{folder} has no file of the split {missing[0]}.")
        return folder
    if task.hub is None:
        raise DataError(
            f"There is no {folder} with train.parquet, validation.parquet and test.parquet. Task {task.key} "
            f"({task.source}) is not a Hub data set: set {DATA_VARIABLE} to the folder with your copy."
        )
    return None


def load_task(task: Task, data: str | None = None, **options: Any) -> AppData:
    """Read a task's data from the folder, see `check_task`, else from the Hub at the pinned revision.

    The options are those of `load_app_data`.
    """
    folder = check_task(task, data)
    if folder is not None:
        return load_app_data(folder, task.family, **options)
    hub: Any = task.hub
    config = f":{hub['config']}" if hub.get("config") else ""
    return load_app_data(f"{hub['id']}{config}@{hub['revision']}", task.family, **options)
