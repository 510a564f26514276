"""``mtpf apply-delta``: write the whole model of a standalone app: a backbone, and an ordinary app on it."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import MtpfError, first_line
from ..settings import POSITIONAL, read_settings

EXAMPLES = """\
  mtpf apply-delta apps/airline --backbone packaged --output airline
  mtpf apply-delta me/airline --revision v2 --output airline
  mtpf predict --backbone airline/backbone --adapter airline/app messages.txt"""


@dataclass(kw_only=True)
class ApplySettings:
    """What is applied.

    Attributes:
        delta: Folder or owner/name of a standalone app.
        backbone: ``packaged``, a folder or owner/name; by default the one that the app names, else packaged.
        revision: Commit of the app's repo; main by default.
        output: A new folder, which gets ``backbone`` and ``app``.
    """

    delta: str = field(metadata=POSITIONAL)
    backbone: str | None = None
    revision: str | None = None
    output: str


def run(arguments: list[str], prog: str) -> str:
    """Write both folders and return their names."""
    settings = read_settings(ApplySettings, arguments, prog, __doc__, EXAMPLES)
    from ..model.adapter_files_mtpf import find_adapter
    from ..model.delta_mtpf import is_delta
    from ..model.modeling_mtpf import MtpfModel

    output = Path(settings.output)
    if output.exists():
        raise MtpfError(f"{output} exists already; choose another --output or remove it.")
    folder = find_adapter(settings.delta, settings.revision)
    if not is_delta(folder):
        raise MtpfError(f"{settings.delta} is not a standalone app.")
    try:
        model = MtpfModel.from_pretrained(folder, backbone=settings.backbone)
    except OSError as error:
        what = f"the backbone {settings.backbone}" if settings.backbone else "the backbone that the app names"
        raise MtpfError(f"{what} cannot be loaded: {first_line(error)}; give one with --backbone.") from error
    (name,) = model.adapters
    temporary = output.with_name(f".{output.name[:50]}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(temporary / "backbone")
        model.save_adapter(temporary / "app", name)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return f"{output / 'backbone'}\n{output / 'app'}"
