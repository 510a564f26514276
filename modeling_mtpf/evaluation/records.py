"""Records of results: one per regime, seed, task and protocol, in one JSON file."""

import datetime
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import DataError

try:
    import fcntl
except ImportError:  # Windows has no advisory locks: there, one run a file
    fcntl = None  # type: ignore[assignment]

PACKAGES = ("torch", "transformers", "peft", "scikit-learn", "seqeval", "numpy", "datasets")
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


def write_records(
    path: str | Path, records: Iterable[dict[str, Any]], key: Callable[[dict[str, Any]], Any] = record_key
) -> None:
    """Write all records in one go, sorted by ``key``, one a line so that differences show."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(r, ensure_ascii=False, sort_keys=True) for r in sorted(records, key=key)]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("[\n" + ",\n".join(lines) + "\n]\n", "utf-8")
    temporary.replace(path)


def add_record(
    path: str | Path, record: dict[str, Any], check: Callable[[list[dict[str, Any]]], None] = lambda old: None
) -> None:
    """Add a record to a file that other processes may write to at the same time.

    A record that is there already under the same key stays as it is.

    Args:
        path: JSON file of records; it is made where there is none.
        record: The new one.
        check: Called with the records that are there; raises if the new one must not stand beside them.
    """
    with locked(Path(path)):
        records = read_records(path)
        check(records)
        if record_key(record) not in {record_key(own) for own in records}:
            write_records(path, [*records, record])


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock of a file, and hold it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def today() -> str:
    """Date of a record, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


__all__ = ["Key", "add_record", "locked", "read_records", "record_key", "today", "write_records"]
