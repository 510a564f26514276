"""The layout of a labelled folder, and its shards of words and cluster ids."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..files import write_atomically

CLUSTERS_FILE = "clusters.json"
CENTROIDS_FILE = "centroids.safetensors"
REPORT_FILE = "report.html"
PLAN_FILE = "_plan.json"

SCHEMA = pa.schema([("words", pa.list_(pa.string())), ("clusters", pa.list_(pa.int32()))])
OFFSETS_SCHEMA = pa.schema([*SCHEMA, ("row", pa.int64()), ("starts", pa.list_(pa.int32()))])


def shard_file(folder: Path, number: int) -> Path:
    """Return the file of a shard."""
    return folder / f"shard-{number:05d}.parquet"


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
        sentence_starts: Position of each sentence's first word, and the number of words.
        labels: Cluster of each word.
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
