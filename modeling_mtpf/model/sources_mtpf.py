"""The one place that tells a local path from the id of a repo on the Hub."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from .errors_mtpf import MtpfError, first_line

if TYPE_CHECKING:
    from huggingface_hub import ResolvedRevision

FILE_ENDINGS = (
    *(".arrow", ".bin", ".bio", ".conll", ".csv", ".gz", ".iob", ".iob2", ".json", ".jsonl", ".onnx"),
    *(".parquet", ".pt", ".safetensors", ".tar", ".tsv", ".txt", ".yaml", ".yml", ".zip"),
)
"""A name that ends so is a file, not a repo."""


def is_hub_id(name: str, *, bare: bool = False) -> bool:
    """Say whether a string has the form of a Hub id; nothing is looked up.

    With ``bare`` also accept names without an owner: those of the Hub's oldest models and data sets.

    Example:
        >>> [is_hub_id(name) for name in ("ada/notes", "user/intents.csv", "./apps", "a/b/c", "bert-base")]
        [True, False, False, False, False]
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return (bare or "/" in name) and not name.lower().endswith(FILE_ENDINGS)


def split_revision(source: str) -> tuple[str, str | None]:
    """Split ``owner/name@revision``; a folder may have such a name."""
    name, _, revision = source.partition("@")
    return (source, None) if Path(source).is_dir() or not (name and revision) else (name, revision)


def find_on_hub(
    source: str | os.PathLike,
    revision: str | None = None,
    *,
    what: str = "folder",
    repo_type: str = "model",
    bare: bool = False,
    token: str | None = None,
    error: type[MtpfError] = MtpfError,
) -> "ResolvedRevision":
    """Return the commit of the Hub repo that a user named, where no local path of that name exists.

    Without a network this fails at once, unless the cache knows the revision.

    Args:
        source: The name; a revision belongs into the next argument.
        revision: Commit, tag or branch. With one, the name is a Hub id even if a folder here
            has its owner's name.
        what: What the path could have been, for the message: ``folder``, ``file or folder``.
        repo_type: ``model`` or ``dataset``.
        bare: As in `is_hub_id`.
        token: Hub token.
        error: What to raise.

    Raises:
        MtpfError: It can only be a path, which does not exist; or there is no such repo or revision, or the
            Hub cannot be reached.
    """
    name, missing = str(source), f"There is no {what} {source}"
    if not is_hub_id(name, bare=bare):
        raise error(f"{missing}, and it is not a Hub id of the form 'owner/name'.")
    owner = Path(name).parent
    if revision is None and owner != Path() and owner.is_dir():
        raise error(
            f"{missing} in the local folder {owner}; to mean the repo {name} on the Hub, name its revision, "
            "for instance main."
        )
    # Here: a stranger who loads a backbone from a folder may have an older client, which lacks it.
    from huggingface_hub.errors import RevisionResolutionError

    repo = "data set" if repo_type == "dataset" else "repo"
    try:
        return HfApi(token=token).resolve_revision(name, repo_type=repo_type, revision=revision)
    except RevisionNotFoundError as reason:
        raise error(f"The {repo} {name} on the Hub has no revision {revision!r}.") from reason
    except RepositoryNotFoundError as reason:
        raise error(
            f"{missing}, and no {repo} of that name on the Hub that your token may read; check the name, or "
            "log in with: hf auth login"
        ) from reason
    except RevisionResolutionError as reason:
        raise error(
            f"{missing}, and the Hub cannot be reached to look for a {repo} of that name; check the path, or "
            "connect."
        ) from reason
    except Exception as reason:  # the client has a dozen types of errors, of several libraries
        raise error(f"The {repo} {name} on the Hub cannot be read: {first_line(reason)}") from reason


def backbone_hint(folder: str | os.PathLike) -> str:
    """Return a hint to append to an error about a folder whose subfolder is the backbone, else nothing."""
    inner = Path(folder) / "backbone"
    is_above = (inner / "config.json").is_file() and not (Path(folder) / "config.json").is_file()
    return f" Did you mean {inner}?" if is_above else ""
