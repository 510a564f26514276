"""``mtpf pull``: fetch a repo, verify every hash, and print its folder."""

from dataclasses import dataclass, field

from ..settings import POSITIONAL, read_settings

EXAMPLES = """\
  mtpf pull ada/notes-entities
  cd "$(mtpf pull ada/notes-encoder --revision 1f0c3b2)\""""


@dataclass(kw_only=True)
class PullSettings:
    """What is fetched.

    Attributes:
        repo: owner/name.
        revision: Commit, tag or branch; main by default.
    """

    repo: str = field(metadata=POSITIONAL)
    revision: str | None = None


def run(arguments: list[str], prog: str) -> str:
    """Fetch the repo and return its folder."""
    settings = read_settings(PullSettings, arguments, prog, __doc__, EXAMPLES)
    from ..hub import pull

    return str(pull(settings.repo, settings.revision))
