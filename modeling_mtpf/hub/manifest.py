"""What the Hub announces of a commit: its files with sizes and hashes.

A push compares it with what it sends, before and after the commit; `pull` and `inspect` compare it with what
they fetch.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_cached_repo_tree
from huggingface_hub.errors import CachedRepoTreeNotFoundError, GatedRepoError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from ..model.hub_cache_mtpf import git_sha1, has_announced_hash, sha256_of
from .client import HubError, attempt, explained


@dataclass(frozen=True)
class HubFile:
    """One file; a large one is known by its ``sha256``, a small one by the hash that git gives it.

    A cached listing tells neither; there the cache's own name of the file is its hash.
    """

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None

    @classmethod
    def announced(cls, file: RepoFile) -> "HubFile":
        """Read an entry of the Hub's listing."""
        if file.lfs is not None:
            return cls(file.path, file.size, sha256=file.lfs.sha256)
        return cls(file.path, file.size, git_sha1=file.blob_id)

    def holds(self, data: bytes) -> bool:
        """Say whether this is the content."""
        if self.sha256 is not None:
            return hashlib.sha256(data).hexdigest() == self.sha256
        return git_sha1(data) == self.git_sha1

    def is_what(self, operation: CommitOperationAdd) -> bool:
        """Say whether the content is what a commit would write."""
        if self.sha256 is not None:
            return self.sha256 == operation.upload_info.sha256.hex()
        if self.size != operation.upload_info.size:
            return False
        with operation.as_file() as content:
            return self.holds(content.read())

    def is_at(self, path: Path) -> bool:
        """Say whether a file of the cache has the announced size and content."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if self.sha256 is not None:
            return sha256_of(path) == self.sha256
        return self.holds(path.read_bytes()) if self.git_sha1 is not None else has_announced_hash(path)


@dataclass(frozen=True)
class Manifest:
    """All files of a repo at one commit."""

    sha: str
    private: bool
    files: dict[str, HubFile]

    def damaged(self, folder: Path, names: Iterable[str]) -> list[str]:
        """Return those of the named files that a folder lacks or has with other content."""
        return [name for name in names if not self.files[name].is_at(folder / name)]


def read_manifest(api: HfApi, repo_id: str, revision: str = "main") -> Manifest:
    """Ask the Hub for the files of a revision.

    Raises:
        HubError: No such repo or revision, or the Hub cannot be reached.
    """
    with explained(repo_id):
        return _read(api, repo_id, revision)


def find_manifest(api: HfApi, repo_id: str, revision: str = "main") -> Manifest | None:
    """Do the same; return ``None`` where there is no such repo."""
    with explained(repo_id):
        try:
            return _read(api, repo_id, revision)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None


def _read(api: HfApi, repo_id: str, revision: str) -> Manifest:
    # Unlike a listing, which the client repeats for half a minute, this fails at once without a network.
    info = attempt(lambda: api.model_info(repo_id, revision=revision))
    sha = str(info.sha)
    tree = attempt(lambda: list(api.list_repo_tree(repo_id, revision=sha, recursive=True)))
    files = {entry.path: HubFile.announced(entry) for entry in tree if isinstance(entry, RepoFile)}
    return Manifest(sha, bool(info.private), files)


def cached_manifest(repo_id: str, sha: str) -> Manifest:
    """Return the listing of a commit that the cache has kept from fetching it.

    Raises:
        HubError: There is none, so that nobody can tell whether the cached files are all.
    """
    try:
        files = get_cached_repo_tree(repo_id, revision=sha)
    except CachedRepoTreeNotFoundError as error:
        raise HubError(
            f"The Hub cannot be reached, and the cache has no listing of {repo_id} at {sha[:8]} that tells "
            f"whether it is complete; connect and fetch it once with: mtpf pull {repo_id} --revision {sha}"
        ) from error
    return Manifest(sha, False, {file.path: HubFile(file.path, file.size) for file in files})


__all__ = ["HubFile", "Manifest", "cached_manifest", "find_manifest", "read_manifest"]
