"""Records of results: one per regime, seed, task and protocol, in one JSON file; and what identifies them."""

import datetime
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import locked, write_bytes
from ..model.adapter_files_mtpf import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, find_adapter

PACKAGES = ("torch", "transformers", "peft", "scikit-learn", "seqeval", "numpy", "datasets")
"""Packages that decide the numbers."""
NEEDED = ("regime", "seed", "task", "family", "protocol", "metric", "value", "n_train", "n_test", "config")

Key = tuple[str, int, str, str]


def record_key(record: dict[str, Any]) -> Key:
    """Regime, seed, task and protocol: what makes a record unique in a file."""
    return record["regime"], int(record["seed"]), f"{record['family']}/{record['task']}", record["protocol"]


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Read the records of a file, none if there is no file; raise `DataError` if it holds something else."""
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
    """Write all records atomically, sorted by ``key``, one a line so that differences show."""
    lines = [json.dumps(r, ensure_ascii=False, sort_keys=True) for r in sorted(records, key=key)]
    write_bytes(Path(path), ("[\n" + ",\n".join(lines) + "\n]\n").encode())


def add_record(
    path: str | Path, record: dict[str, Any], check: Callable[[list[dict[str, Any]]], None] = lambda old: None
) -> None:
    """Add a record to a file that other processes may write to; an existing one of the same key stays.

    ``check`` is called with the existing records, and raises if the new one may not be added to them.
    """
    with locked(Path(path)):
        records = read_records(path)
        check(records)
        if record_key(record) not in map(record_key, records):
            write_records(path, [*records, record])


def config_value(record: dict[str, Any], path: str) -> Any:
    """Return what a record's ``config`` has at a dotted path, or ``None``."""
    value = record["config"]
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def public_name(identifier: str | None) -> str | None:
    """Name a backbone or adapter without its local path."""
    return Path(identifier).name if identifier and Path(identifier).exists() else identifier


def adapter_sha256(adapter: str | None, revision: str | None = None) -> str | None:
    """Return the sha256 of an adapter's weights and of its config, which says how they are applied."""
    if adapter is None:
        return None
    folder, digest = find_adapter(adapter, revision), hashlib.sha256()
    for name in (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE):
        digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """Return the sha256 of a fast tokenizer's behaviour, whatever files it came from."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.update(padding=None, truncation=None)  # every call sets them
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def today() -> str:
    """Date of a record, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()
