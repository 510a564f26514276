"""What a record names its tokenizer and adapter by: hashes of what decides values, and public names."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..model.adapter_files_mtpf import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, find_adapter


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
    """Return the sha256 of a fast tokenizer as it works, whatever files it came from."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.update(padding=None, truncation=None)  # every call sets them anew
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


__all__ = ["adapter_sha256", "public_name", "tokenizer_sha256"]
