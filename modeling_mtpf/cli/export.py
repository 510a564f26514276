"""``mtpf export``: write ONNX graphs and apps for devices, or add apps to an existing export."""

from dataclasses import dataclass, field
from pathlib import Path

from ..settings import POSITIONAL, REPEATED, read_settings

EXAMPLES = """\
  mtpf export ada/notes-encoder --adapter ada/notes-entities --output phone --int8
  mtpf export packaged --adapter intent=apps/intent --output phone --web"""


@dataclass(kw_only=True)
class ExportSettings:
    """What is exported.

    Attributes:
        backbone: ``packaged``, a folder, or owner/name.
        revision: Commit of the backbone's repo; main by default.
        adapter: ``[NAME=]A``, folder or repo of an app; may be given several times.
        output: A new folder, or an export to add to.
        int8: 8-bit weights: a quarter of the size.
        layers: Last layers in the tail; by default what the apps need.
        web: Add a page that runs the export in a browser; needs npm.
    """

    backbone: str = field(metadata=POSITIONAL)
    revision: str | None = None
    adapter: list[str] = field(default_factory=list, metadata=REPEATED)
    output: str
    int8: bool = False
    layers: int | None = None
    web: bool = False


def run(arguments: list[str], prog: str) -> str:
    """Export and return the folder."""
    settings = read_settings(ExportSettings, arguments, prog, __doc__, EXAMPLES)
    from ..export import add_page, export_onnx, find_npm  # here: --help does without what it imports

    values = vars(settings).copy()
    output, web = Path(values.pop("output")), values.pop("web")
    if web:
        find_npm()  # a missing one is noticed before the backbone is loaded
    export = str(export_onnx(values.pop("backbone"), values.pop("adapter"), output, **values))
    return f"{export}\n{add_page(output)}" if web else export
