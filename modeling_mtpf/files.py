"""Files that are either complete or absent, and the layout of a labelled folder."""

import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import DataError

CLUSTERS_FILE = "clusters.json"
CENTROIDS_FILE = "centroids.safetensors"
REPORT_FILE = "report.html"
PLAN_FILE = "_plan.json"

SCHEMA = pa.schema([("words", pa.list_(pa.string())), ("clusters", pa.list_(pa.int32()))])
OFFSETS_SCHEMA = pa.schema([*SCHEMA, ("row", pa.int64()), ("starts", pa.list_(pa.int32()))])


def shard_file(folder: Path, number: int) -> Path:
    """Return the path of a shard."""
    return folder / f"shard-{number:05d}.parquet"


@contextmanager
def disk_errors(path: Path):
    """Turn what the operating system says about a file into one sentence with the remedy."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(
            f"{path} cannot be written: {reason}. Free space or choose another folder; the same "
            "command then goes on after the last complete shard."
        ) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that appears only when it is complete and on disk, whatever happens meanwhile.

    Raises:
        DataError: The disk is full, or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_shard(
    path: Path,
    words: pa.Array,
    sentence_starts: np.ndarray,
    labels: np.ndarray,
    offsets: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:
    """Write a shard atomically.

    Args:
        path: The file.
        words: All words of all sentences, one after the other.
        sentence_starts: Position of each sentence's first word, and the number of words; int32
            ``(sentences + 1,)``.
        labels: Cluster of each word, int32.
        offsets: Row in the source of each sentence, and first character of each word.
    """
    borders = pa.array(sentence_starts, pa.int32())
    columns = [pa.ListArray.from_arrays(borders, part) for part in (words, pa.array(labels, pa.int32()))]
    schema = SCHEMA
    if offsets is not None:
        schema = OFFSETS_SCHEMA
        columns += [pa.array(offsets[0]), pa.ListArray.from_arrays(borders, pa.array(offsets[1], pa.int32()))]
    table = pa.table(columns, schema=schema)
    write_atomically(path, lambda temporary: pq.write_table(table, temporary))


__all__ = [
    "CENTROIDS_FILE",
    "CLUSTERS_FILE",
    "PLAN_FILE",
    "REPORT_FILE",
    "disk_errors",
    "shard_file",
    "write_atomically",
    "write_bytes",
    "write_shard",
]
