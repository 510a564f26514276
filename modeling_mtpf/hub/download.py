"""Fetch a repo whole, and compare every file with the hash that the Hub announces for it."""

import logging
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects

from ..model.hub_cache_mtpf import drop_from_cache
from .client import HubError, attempt, check_repo_id, explained, is_transient
from .files import code_files, objection
from .manifest import Manifest, cached_manifest, read_manifest

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

    The Hub's client compares sizes only. Without a network the cached folder is verified in the same way,
    against the listing that the cache keeps. Pickles, archives and foreign code are not fetched.

    Args:
        repo_id: ``owner/name``.
        revision: Commit, tag or branch; pin a commit in production.
        token: Hub token; by default the one of ``hf auth login``.
        max_bytes: Refuse a larger repo before fetching it.

    Raises:
        HubError: No such repo or revision, names that are no relative paths, too many bytes, a file that is
            missing, or a hash that does not fit even after fetching the file anew.
    """
    check_repo_id(repo_id)
    api = HfApi(token=token)
    with explained(repo_id):
        # Its `resolved` is the commit; it is itself the name that was asked for.
        resolved = attempt(lambda: api.resolve_revision(repo_id, revision=revision, token=token))
    sha = resolved.resolved
    manifest, reachable = _manifest(api, repo_id, sha)
    names = _wanted(repo_id, manifest, max_bytes)

    def fetch() -> Path:
        patterns = list(PULLED)
        with explained(repo_id):
            return Path(
                attempt(
                    lambda: snapshot_download(
                        repo_id,
                        revision=resolved,
                        token=token,
                        allow_patterns=patterns,
                        local_files_only=not reachable,
                    )
                )
            )

    folder = fetch()
    damaged = manifest.damaged(folder, names)
    if damaged and reachable:
        log.warning("%s of %s is damaged; fetching it again.", ", ".join(damaged), repo_id)
        for name in damaged:
            drop_from_cache(folder / name)
        folder = fetch()
        damaged = manifest.damaged(folder, names)
    if damaged:
        for name in damaged:
            drop_from_cache(folder / name)
        what = f"{damaged[0]} of {repo_id} at {sha[:8]}"
        raise HubError(
            f"{what} does not have the hash that the Hub announces for it; it was tampered with or broken on "
            "the way. Do not use it; try again later or tell its owner."
            if reachable
            else f"{what} is missing from the cache or damaged there; connect and fetch it again with: "
            f"mtpf pull {repo_id} --revision {sha}"
        )
    return folder


def _manifest(api: HfApi, repo_id: str, sha: str) -> tuple[Manifest, bool]:
    """Return the files of a commit, and whether the Hub could be asked for them."""
    try:
        return read_manifest(api, repo_id, sha), True
    except HubError as error:
        if isinstance(error.__cause__, OfflineModeIsEnabled) or is_transient(error.__cause__ or error):
            return cached_manifest(repo_id, sha), False
        raise


def _wanted(repo_id: str, manifest: Manifest, max_bytes: int) -> list[str]:
    """Return the names of the files to fetch; refuse a repo with impossible names or too many bytes."""
    for path in manifest.files:
        reason = objection(path)
        if reason and reason.startswith("its name"):
            raise HubError(f"{repo_id} has a file {path!r}: {reason}. It is not fetched.")
    names = list(filter_repo_objects(manifest.files, allow_patterns=list(PULLED)))
    total = sum(manifest.files[name].size for name in names)
    if total > max_bytes:
        raise HubError(
            f"{repo_id} has {total:,} bytes, more than the {max_bytes:,} that are allowed; it is not "
            "fetched. Raise max_bytes if that is right."
        )
    return names


__all__ = ["MAX_PULL_BYTES", "PULLED", "pull"]
