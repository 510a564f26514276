"""Files that came from the Hub: their hashes, and where the cache keeps them."""

import hashlib
import os
import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils.sha import sha_fileobj

from .sources_mtpf import is_hub_id

BACKBONE_WEIGHTS_FILE = "model.safetensors"


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, as the Hub shows it for large files."""
    with path.open("rb") as file:
        return sha_fileobj(file).hex()


def git_sha1(data: bytes) -> str:
    """Return the hash that git, and so the Hub, gives a small file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def has_announced_hash(path: Path) -> bool:
    """Compare a cached file with the hash under which the Hub announced it: the name of its blob.

    The Hub's client compares sizes only. A blob is named by its sha256, a small file by its git hash.
    Where the cache has no links (Windows), there is nothing to compare with and the answer is yes.
    """
    # One step only: the blob itself may be a link into a store that is shared by all repos.
    announced = Path(os.readlink(path)).name if path.is_symlink() else ""
    if re.fullmatch("[0-9a-f]{64}", announced):
        return sha256_of(path) == announced
    if re.fullmatch("[0-9a-f]{40}", announced):
        return git_sha1(path.read_bytes()) == announced
    return True


def drop_from_cache(path: Path) -> None:
    """Remove a cached file and the blobs behind it, which the cache would serve again."""
    while path.is_symlink():
        target = path.parent / os.readlink(path)
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def weights_file(name_or_path: str | None, revision: str | None) -> Path | None:
    """Return the local file from which a model's weights came: in its folder, or in the Hub's cache."""
    if not name_or_path:
        return None
    if os.path.isdir(name_or_path):
        path = os.path.join(name_or_path, BACKBONE_WEIGHTS_FILE)
        return Path(path) if os.path.isfile(path) else None
    if not revision or not is_hub_id(name_or_path):
        return None
    cached = try_to_load_from_cache(name_or_path, BACKBONE_WEIGHTS_FILE, revision=revision)
    return Path(cached) if isinstance(cached, str) else None
