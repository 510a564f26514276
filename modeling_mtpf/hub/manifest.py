"""What the Hub announces of a commit: sizes and hashes of its files; push and pull compare theirs."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_cached_repo_tree
from huggingface_hub.errors import CachedRepoTreeNotFoundError, RepositoryNotFoundError

from ..model.hub_cache_mtpf import git_sha1, has_announced_hash, sha256_of
from .client import HubError, attempt, explained


@dataclass(frozen=True)
class HubFile:
    """One file: a large one has a ``sha256``, a small one git's hash, one of a cached listing neither."""

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None

    def is_what(self, operation: CommitOperationAdd) -> bool:
        """Say whether the content is what a commit would write."""
        if self.sha256 is not None:
            return self.sha256 == operation.upload_info.sha256.hex()
        with operation.as_file() as content:
            return self.git_sha1 == git_sha1(content.read())

    def is_at(self, path: Path) -> bool:
        """Say whether a local file has the announced size and content."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if self.sha256 is not None:
            return sha256_of(path) == self.sha256
        return git_sha1(path.read_bytes()) == self.git_sha1 if self.git_sha1 else has_announced_hash(path)


@dataclass(frozen=True)
class Manifest:
    """All files of a repo at one commit."""

    sha: str
    private: bool
    files: dict[str, HubFile]


def read_manifest(api: HfApi, repo_id: str, revision: str = "main") -> Manifest:
    """Ask the Hub for the files of a revision.

    Raises:
        HubError: No such repo or revision, or the Hub cannot be reached.
    """
    with explained(repo_id):
        info = attempt(lambda: api.model_info(repo_id, revision=revision, files_metadata=True))
    files = {}
    for file in info.siblings or []:
        sha256, git = (file.lfs.sha256, None) if file.lfs else (None, file.blob_id)
        files[file.rfilename] = HubFile(file.rfilename, file.size or 0, sha256, git)
    return Manifest(str(info.sha), bool(info.private), files)


def find_manifest(api: HfApi, repo_id: str, revision: str = "main") -> Manifest | None:
    """Do as `read_manifest`, but return ``None`` where there is no such repo."""
    try:
        return read_manifest(api, repo_id, revision)
    except HubError as error:
        if type(error.__cause__) is RepositoryNotFoundError:  # not a subclass: a gated repo exists
            return None
        raise


def cached_manifest(repo_id: str, sha: str) -> Manifest:
    """Return the listing that the cache keeps of a commit.

    Raises:
        HubError: There is none: nothing tells whether the cached files are complete.
    """
    try:
        files = get_cached_repo_tree(repo_id, revision=sha)
    except CachedRepoTreeNotFoundError as error:
        raise HubError(
            f"The Hub cannot be reached, and the cache has no listing of {repo_id} at {sha[:8]} that tells "
            f"whether it is complete; connect and fetch it once with: mtpf pull {repo_id} --revision {sha}"
        ) from error
    return Manifest(sha, False, {file.path: HubFile(file.path, file.size) for file in files})
