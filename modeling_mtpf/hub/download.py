"""Fetch files of a repo, and compare each with the hash that the Hub announces for it."""

import glob
import logging
from collections.abc import Collection
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects

from ..model.hub_cache_mtpf import drop_from_cache
from ..model.storage_methods_mtpf import HUB_FILES
from .client import HubError, attempt, check_repo_id, explained, is_transient
from .files import path_objection
from .manifest import Manifest, cached_manifest, read_manifest

log = logging.getLogger(__name__)

PULLED = ["*.json", "*.safetensors", "*.txt", "*.md", "*.model", "*.onnx", *HUB_FILES]
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

    Without a network the cached folder is verified in the same way, against the listing that the cache keeps.
    Pickles, archives and foreign code are not fetched.

    Args:
        repo_id: ``owner/name``.
        revision: Commit, tag or branch; pin a commit in production.
        token: Hub token; by default the one of ``hf auth login``.
        max_bytes: Refuse a larger repo before fetching it.

    Raises:
        HubError: No such repo or revision, names that are not relative paths, too many bytes, a file that is
            missing, or a hash that does not fit even after fetching the file again.
    """
    check_repo_id(repo_id)
    api = HfApi(token=token)
    with explained(repo_id):
        sha = attempt(lambda: api.resolve_revision(repo_id, revision=revision)).resolved
    offline = False
    try:
        manifest = read_manifest(api, repo_id, sha)
    except HubError as error:
        if not isinstance(error.__cause__, OfflineModeIsEnabled) and not is_transient(error.__cause__):
            raise
        manifest, offline = cached_manifest(repo_id, sha), True
    for path in manifest.files:
        if reason := path_objection(path):
            raise HubError(f"{repo_id} has a file {path!r}: {reason}. It is not fetched.")
    names = list(filter_repo_objects(manifest.files, allow_patterns=PULLED))
    size = sum(manifest.files[name].size for name in names)
    if size > max_bytes:
        raise HubError(
            f"{repo_id} has {size:,} bytes, more than the {max_bytes:,} that are allowed; it is not fetched. "
            "Raise max_bytes if that is right."
        )
    return download(api, repo_id, manifest, names, offline=offline)


def download(
    api: HfApi, repo_id: str, manifest: Manifest, names: Collection[str], *, offline: bool = False
) -> Path:
    """Return the folder of the cache that holds these files of a commit, verified.

    `HfApi.verify_repo_checksums` is not used: it needs the network, retries for half a minute where there is
    none, and counts the files that are left out on purpose as missing.

    Raises:
        HubError: A file cannot be fetched, or does not have its announced hash, even when fetched again.
    """
    fetch = partial(
        snapshot_download,
        repo_id,
        revision=manifest.sha,
        token=api.token,
        allow_patterns=[glob.escape(name) for name in names],
        local_files_only=offline,
    )
    for _ in range(2):
        with explained(repo_id):
            folder = Path(attempt(fetch))
        damaged = [name for name in names if not manifest.files[name].is_at(folder / name)]
        if not damaged:
            return folder
        log.warning("%s of %s is damaged or missing.", ", ".join(damaged), repo_id)
        for name in damaged:
            drop_from_cache(folder / name)
    raise HubError(
        f"{damaged[0]} of {repo_id} at {manifest.sha[:8]} does not have the hash that the Hub announces for "
        "it; it was tampered with or broken on the way. Do not use it; try again later or tell its owner."
    )
