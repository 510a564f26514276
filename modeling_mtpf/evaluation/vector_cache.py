"""Text vectors on disk, computed once and shared by all protocols and later processes."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomically, write_bytes


class StoredVectors:
    """The vectors of one split under one encoder: a memory-mapped file, filled row by row on demand.

    A row of NaN is not computed yet: an interrupted run loses nothing, and a protocol that reads few rows
    computes only those. Several processes may fill one file, since they write the same values.

    Args:
        folder: Cache folder; ``None`` keeps the vectors in memory.
        identity: Everything that decides the vectors except the texts (hashes of backbone and adapter,
            maximal length, precision), written next to the vectors with the hash of the texts.
        texts: The texts of the split.
        width: Size of a vector.
        embed: Computes the vectors of some texts, float32 ``(texts, width)``.
    """

    PART = 2048
    """Rows computed between two writes."""

    def __init__(
        self,
        folder: Path | None,
        identity: dict[str, Any],
        texts: Sequence[str],
        width: int,
        embed: Callable[[list[str]], np.ndarray],
    ):
        self.texts, self.embed = texts, embed
        shape = (len(texts), width)
        if folder is None:
            self.vectors = np.full(shape, np.nan, dtype=np.float32)
            return
        identity = {**identity, "texts": _texts_sha256(texts), "rows": len(texts), "width": width}
        text = json.dumps(identity, indent=1, sort_keys=True)
        path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npy"
        if not path.exists():  # two processes may create it; the later file replaces the earlier one
            write_bytes(path.with_suffix(".json"), (text + "\n").encode())
            write_atomically(path, lambda temporary: _write_empty(temporary, shape))
        self.vectors = np.load(path, mmap_mode="r+")

    def rows(self, wanted: np.ndarray | None = None) -> np.ndarray:
        """Return the vectors of some (default: all) rows, float32 ``(rows, width)``; compute missing ones."""
        wanted = np.arange(len(self.texts)) if wanted is None else wanted
        missing = np.unique(wanted[np.isnan(self.vectors[wanted]).any(axis=1)])
        # Long texts first and in one go, so that a part holds texts of about one length.
        missing = missing[np.argsort([-len(self.texts[i]) for i in missing], kind="stable")]
        for start in range(0, len(missing), self.PART):
            part = missing[start : start + self.PART]
            self.vectors[part] = self.embed([self.texts[i] for i in part])
            if isinstance(self.vectors, np.memmap):
                self.vectors.flush()
        return np.asarray(self.vectors[wanted])


def _write_empty(path: Path, shape: tuple[int, int]) -> None:
    empty = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    empty[:] = np.nan
    empty.flush()


def _texts_sha256(texts: Sequence[str]) -> str:
    """Return a hash of the texts and their order."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
