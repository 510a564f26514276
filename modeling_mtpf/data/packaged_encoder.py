"""Where an encoder lies: the one that can be installed from PyPI, a folder, or the Hub."""

from pathlib import Path

from ..errors import DataError
from ..model.packaged_mtpf import PACKAGED, packaged_encoder
from ..model.schemas_mtpf import DELTA_FILE

__all__ = ["PACKAGED", "packaged_encoder", "resolve_encoder"]


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
    if not (folder / "config.json").is_file() and not (folder / DELTA_FILE).is_file():
        adapter = " It is an adapter." if (folder / "adapter_config.json").is_file() else ""
        raise DataError(f"{identifier} has no config.json.{adapter or backbone_hint(folder)}")
    return str(folder)
