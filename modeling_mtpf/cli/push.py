"""``mtpf push backbone`` and ``mtpf push adapter``: publish a folder as one commit, and print its address."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..settings import POSITIONAL, nearest, read_settings

KINDS = ("backbone", "adapter")

EXAMPLES = """\
  mtpf push backbone runs/demo/backbone ada/notes-encoder --private
  mtpf push adapter runs/demo/apps/entities ada/notes-entities --backbone ada/notes-encoder --dry_run"""


@dataclass(kw_only=True)
class PushSettings:
    """What is published, and how.

    Attributes:
        kind: ``backbone`` or ``adapter``.
        folder: A backbone's folder, or an adapter's.
        repo: owner/name; created if need be.
        backbone: Of an adapter: Hub id of the published backbone that it is bound to.
        backbone_revision: Of an adapter: the backbone's commit; by default the recorded one, else main.
        results: Of a backbone: JSON list of evaluation records for the card's table.
        private: Create it as a private repo.
        create_pr: Open a pull request instead of committing.
        dry_run: Check all, list files and sizes, change nothing.
        json: Print the plan of a dry run, or the sha and the address, as JSON.
        branch: An existing branch.
        message: Title of the commit.
        license: For the card.
        language: For the card.
        datasets: Hub ids of the training data, for the card.
    """

    kind: str = field(metadata=POSITIONAL)
    folder: str = field(metadata=POSITIONAL)
    repo: str = field(metadata=POSITIONAL)
    backbone: str | None = None
    backbone_revision: str | None = None
    results: str | None = None
    private: bool = False
    create_pr: bool = False
    dry_run: bool = False
    json: bool = False
    branch: str = "main"
    message: str | None = None
    license: str = "apache-2.0"
    language: list[str] = field(default_factory=lambda: ["en"])
    datasets: list[str] | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            hint = nearest(self.kind, list(KINDS))
            raise RecipeError(f"Cannot push a {self.kind!r}; {hint}known: {', '.join(KINDS)}.")
        for name in ("results",) if self.kind == "adapter" else ("backbone", "backbone_revision"):
            if getattr(self, name) is not None:
                raise RecipeError(f"--{name} does not belong to mtpf push {self.kind}.")


def run(arguments: list[str], prog: str) -> str:
    """Publish; return the address of the commit, or the plan of a dry run."""
    settings = read_settings(PushSettings, arguments, prog, __doc__, EXAMPLES)
    from huggingface_hub import constants

    from ..hub import push_adapter, push_backbone

    passed_on = ("private", "create_pr", "dry_run", "branch", "license", "datasets")
    options: dict[str, Any] = {name: getattr(settings, name) for name in passed_on}
    options["language"] = settings.language[0] if len(settings.language) == 1 else settings.language
    if settings.message:
        options["commit_message"] = settings.message
    if settings.kind == "backbone":
        results = _results(settings.results) if settings.results else None
        done = push_backbone(settings.folder, settings.repo, results=results, **options)
    else:
        binding = {"backbone_id": settings.backbone, "backbone_revision": settings.backbone_revision}
        done = push_adapter(settings.folder, settings.repo, **binding, **options)
    if isinstance(done, str):
        address = f"{constants.ENDPOINT}/{settings.repo}/tree/{done}"
        shown: tuple[str, Any] = address, {"repo_id": settings.repo, "sha": done, "url": address}
    else:
        shown = str(done), done.to_dict()
    return json.dumps(shown[1], indent=2, ensure_ascii=False) if settings.json else shown[0]


def _results(file: str) -> list[dict[str, Any]]:
    try:
        results = json.loads(Path(file).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"--results {file} cannot be read as JSON: {error}") from error
    if not isinstance(results, list) or not all(isinstance(row, dict) for row in results):
        raise RecipeError(f"--results {file} must hold a list of records with task, metric, value.")
    return results
