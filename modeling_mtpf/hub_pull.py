"""Fetch a repo and compare every file with the hash that the Hub announces for it."""

import logging
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile

from .adapter_files_mtpf import drop_from_cache, has_announced_hash
from .hub_client import HubError, attempt, check_repo_id, explained, is_transient, list_files
from .hub_files import code_files, git_sha1, objection, sha256_of

log = logging.getLogger(__name__)

PULLED = ("*.json", "*.safetensors", "*.txt", "*.md", "*.model", "*.onnx", *code_files())
"""What `pull` fetches: data, and this project's remote code. Never pickles, archives or other code."""
MAX_PULL_BYTES = 20 * 10**9


def pull(
    repo_id: str,
    revision: str | None = None,
    *,
    token: str | None = None,
    max_bytes: int = MAX_PULL_BYTES,
) -> Path:
    """Fetch a repo into the Hub's cache, compare every file with its announced hash, and return the folder.

    The Hub's client compares sizes only. Without a network the cached folder is verified in the same way.
    Pickles, archives and foreign code are not fetched.

    Args:
        repo_id: ``owner/name``.
        revision: Commit, tag or branch; pin a commit in production.
        token: Hub token; by default the one of ``hf auth login``.
        max_bytes: Refuse a larger repo before fetching it.

    Raises:
        HubError: No such repo or revision, names that are no relative paths, too many bytes, or a hash that
            does not fit even after fetching the file anew.
    """
    check_repo_id(repo_id)
    api = HfApi(token=token)
    with explained(repo_id):
        resolved = attempt(lambda: api.resolve_revision(repo_id, revision=revision, token=token))
        sha = resolved.resolved  # `resolved` itself is the name that was asked for
        announced = _announced(api, repo_id, sha)
        if announced is not None:
            _check_listing(repo_id, announced.values(), max_bytes)

        def fetch() -> Path:
            offline = announced is None
            patterns = list(PULLED)
            return Path(
                snapshot_download(
                    repo_id, revision=resolved, token=token, allow_patterns=patterns, local_files_only=offline
                )
            )

        folder = attempt(fetch)
        damaged = _damaged(folder, announced)
        if damaged:
            log.warning("%s of %s is damaged; fetching it again.", ", ".join(damaged), repo_id)
            for name in damaged:
                drop_from_cache(folder / name)
            attempt(fetch)
            damaged = _damaged(folder, announced)
    if damaged:
        for name in damaged:
            drop_from_cache(folder / name)
        raise HubError(
            f"{damaged[0]} of {repo_id} at {sha[:8]} does not have the hash that the Hub announces for "
            "it; it was tampered with or broken on the way. Do not use it; try again later or tell its owner."
        )
    return folder


def _announced(api: HfApi, repo_id: str, sha: str) -> dict[str, RepoFile] | None:
    """Return the files of a commit as the Hub lists them, ``None`` when it cannot be reached."""
    try:
        # Unlike a listing, which the client repeats for half a minute, this fails at once without a network.
        attempt(lambda: api.model_info(repo_id, revision=sha))
        return list_files(api, repo_id, sha)
    except Exception as error:
        if isinstance(error, OfflineModeIsEnabled) or is_transient(error):
            return None
        raise


def _check_listing(repo_id: str, files: Iterable[RepoFile], max_bytes: int) -> None:
    total = 0
    for file in files:
        reason = objection(file.path)
        if reason and reason.startswith("its name"):
            raise HubError(f"{repo_id} has a file {file.path!r}: {reason}. It is not fetched.")
        total += 0 if reason else file.size
    if total > max_bytes:
        raise HubError(
            f"{repo_id} has {total:,} bytes, more than the {max_bytes:,} that are allowed; it is not "
            "fetched. Raise max_bytes if that is right."
        )


def _damaged(folder: Path, announced: dict[str, RepoFile] | None) -> list[str]:
    damaged = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        if announced is None:
            fits = has_announced_hash(path)
        elif name not in announced:
            continue  # left there by somebody else, not part of the repo
        elif (lfs := announced[name].lfs) is not None:
            fits = sha256_of(path) == lfs.sha256
        else:
            fits = git_sha1(path.read_bytes()) == announced[name].blob_id
        if not fits:
            damaged.append(name)
    return damaged


__all__ = ["MAX_PULL_BYTES", "PULLED", "pull"]
