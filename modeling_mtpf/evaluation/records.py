"""Records of results: one per regime, seed, task and protocol, in one JSON file."""

import datetime
import json
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import DataError

PACKAGES = ("mtpf", "torch", "transformers", "peft", "scikit-learn", "seqeval", "numpy", "datasets")
NEEDED = ("regime", "seed", "task", "family", "protocol", "metric", "value", "n_train", "n_test", "config")

Key = tuple[str, int, str, str]


def record_key(record: dict[str, Any]) -> Key:
    """Regime, seed, task and protocol: what makes a record unique in a file."""
    return record["regime"], int(record["seed"]), f"{record['family']}/{record['task']}", record["protocol"]


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Read the records of a file; none where there is no file.

    Raises:
        DataError: The file holds something else.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    for record in records if isinstance(records, list) else [None]:
        missing = [key for key in NEEDED if not isinstance(record, dict) or key not in record]
        if missing:
            raise DataError(f"{path} does not hold benchmark records: {missing[0]!r} is missing.")
    return records


def write_records(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """Write all records in one go, one a line so that differences show."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(r, ensure_ascii=False, sort_keys=True) for r in sorted(records, key=record_key)]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("[\n" + ",\n".join(lines) + "\n]\n", "utf-8")
    temporary.replace(path)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def today() -> str:
    """Date of a record, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


__all__ = ["read_records", "record_key", "today", "versions", "write_records"]
