"""``mtpf compose``: make one bundle of apps that exist: one LoRA, a head for each, one pass over a text."""

import logging
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from ..adaptation.bundle import BundleSettings, Part, fit_bundle
from ..adaptation.bundle.registry import bundle_method
from ..adaptation.bundle.settings import read_parts
from ..devices import available_cores
from ..errors import RecipeError
from ..model.adapter_files_mtpf import find_adapter, read_task
from ..model.sources_mtpf import split_revision
from ..settings import REPEATED, read_settings
from .adapt import adapter_name

EXAMPLES = """\
  mtpf compose --app apps/entities --app apps/intent --texts my_texts.txt --output_dir apps/both
  mtpf compose --backbone me/encoder --app words=me/entities --app me/intent --method mean --output_dir both
  mtpf compose --parts parts.yaml --output_dir apps/both"""


@dataclass(kw_only=True)
class ComposeSettings(BundleSettings):
    """What is composed, and how.

    Attributes:
        app: ``[NAME=]A``, an app: a folder, or owner/name or owner/name@revision; once for each.
        parts: Instead of apps: a YAML list of parts with ``name``, ``adapter``, and maybe ``data``,
            ``family``, ``weight``; labelled data is learned from where there are no texts.
        texts: Unlabelled texts to learn the apps' own results on: a file, a folder or a Hub id.
        method: ``lc++``, or without training ``mean``, ``sum``, ``concat``, ``ties``, ``dare``, ``lorahub``.
        output_dir: New folder for the bundle.
        backbone: ``packaged``, a folder or a Hub id; that of the apps.
        backbone_revision: Commit of the backbone's repo.
        name: Adapter name of the bundle; made from that of the folder by default.
        seeds: Number of seeds to try, from ``seed`` on; the best by validation is saved.
        threads: CPU threads (0: all cores).
        progress: Show progress bars.
    """

    app: list[str] = field(default_factory=list, metadata=REPEATED)
    parts: str | None = None
    texts: str | None = None
    method: str = "lc++"
    output_dir: str
    backbone: str = "packaged"
    backbone_revision: str | None = None
    name: str | None = None
    seeds: int = 1
    threads: int = 0
    progress: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.name = self.name if self.name is not None else adapter_name(self.output_dir)


def run(arguments: list[str], prog: str) -> str:
    """Compose the apps and return the summary."""
    settings = read_settings(ComposeSettings, arguments, prog, __doc__, EXAMPLES)
    if bool(settings.app) == bool(settings.parts):
        raise RecipeError("Give the apps to compose with --app, once for each, or with --parts.")
    if not bundle_method(settings.method, "apps").stored:
        raise RecipeError(
            f"The method {settings.method} gives scores, no folder: call fit_bundle in Python, or take lc++."
        )
    logging.getLogger("modeling_mtpf").setLevel(logging.WARNING)
    torch.set_num_threads(settings.threads or available_cores())
    parts = read_parts(settings.parts) if settings.parts else [_part(app) for app in settings.app]
    how = BundleSettings(**{f.name: getattr(settings, f.name) for f in fields(BundleSettings)})
    used = ("method", "backbone", "output_dir", "texts", "name", "seeds", "backbone_revision")
    return str(fit_bundle(parts, settings=how, **{name: getattr(settings, name) for name in used}))


def _part(app: str) -> Part:
    """Return the part of ``[NAME=]A``; by default its name is the one that the app records."""
    name, equals, source = app.partition("=")
    if equals and not Path(app).exists():
        return Part(name, adapter=source)
    whole, revision = split_revision(app)
    task = read_task(find_adapter(whole, revision))
    return Part(task.get("name") or Path(whole).name, adapter=app)
