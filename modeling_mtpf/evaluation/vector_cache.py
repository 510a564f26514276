"""Text vectors on disk, computed once and shared between protocols and processes that follow."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class StoredVectors:
    """The vectors of one split under one encoder: a memory-mapped file, filled row by row on demand.

    A row of NaN has not been computed yet; so a run that breaks off loses nothing, and a protocol that looks
    at few rows pays for those alone. Several processes may fill one file: they write the same values.

    Args:
        folder: Cache folder; ``None`` keeps the vectors in memory.
        identity: Everything that decides the vectors but the texts: hashes of backbone and adapter, maximal
            length, precision. It is written beside the vectors.
        texts: The texts of the split; their hash belongs to the identity.
        width: Size of a vector.
        embed: Computes the vectors of some texts, float32 ``(texts, width)``.
    """

    PART = 2048
    """Rows that are computed before they are written."""

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
        identity = {**identity, "texts": texts_sha256(texts), "rows": len(texts), "width": width}
        text = json.dumps(identity, indent=1, sort_keys=True)
        path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npy"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp.npy")
            empty = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
            empty[:] = np.nan
            empty.flush()
            path.with_suffix(".json").write_text(text + "\n", "utf-8")
            if path.exists():  # another process was faster, and fills it by now
                temporary.unlink()
            else:
                temporary.replace(path)
        self.vectors = np.load(path, mmap_mode="r+")

    def rows(self, wanted: np.ndarray | None = None) -> np.ndarray:
        """Return the vectors of some rows (all by default), computing those that are missing.

        Returns:
            float32 ``(rows, width)``.
        """
        wanted = np.arange(len(self.texts)) if wanted is None else np.asarray(wanted)
        missing = np.unique(wanted[np.isnan(self.vectors[wanted]).any(axis=1)])
        # Long texts first and in one go, so that a part holds texts of about one length.
        missing = missing[np.argsort([-len(self.texts[i]) for i in missing], kind="stable")]
        for start in range(0, len(missing), self.PART):
            part = missing[start : start + self.PART]
            self.vectors[part] = self.embed([self.texts[i] for i in part])
            if isinstance(self.vectors, np.memmap):
                self.vectors.flush()
        return np.asarray(self.vectors[wanted])


def texts_sha256(texts: Sequence[str]) -> str:
    """Return a hash of the texts and their order."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


__all__ = ["StoredVectors", "texts_sha256"]
