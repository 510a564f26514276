"""``mtpf inspect``: describe a folder or repo, and report what is unexpected in it."""

import json
from dataclasses import dataclass, field

from ..settings import POSITIONAL, read_settings

EXAMPLES = """\
  mtpf inspect runs/demo/backbone
  mtpf inspect ada/notes-entities --json | jq .labels"""


@dataclass(kw_only=True)
class InspectSettings:
    """What is described.

    Attributes:
        source: A folder, or owner/name.
        revision: Commit, tag or branch of a repo; main by default.
        json: Print JSON.
    """

    source: str = field(metadata=POSITIONAL)
    revision: str | None = None
    json: bool = False


def run(arguments: list[str], prog: str) -> str:
    """Return the description."""
    settings = read_settings(InspectSettings, arguments, prog, __doc__, EXAMPLES)
    from ..hub import inspect

    description = inspect(settings.source, settings.revision)
    if settings.json:
        return json.dumps(description.to_dict(), indent=2, ensure_ascii=False)
    return str(description)
