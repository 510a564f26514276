"""What the local Hub keeps: repositories, commits and content, with the Hub's rules and without HTTP."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from hub_xet import XetStore

REPO_TYPES = ("model", "dataset")
LARGE_FILE_SIZE = 10 * 1024 * 1024
LARGE_PATTERNS = "*.arrow *.bin *.h5 *.npz *.onnx *.parquet *.pkl *.pt *.safetensors *.zip".split()
INITIAL_FILES = {
    ".gitattributes": "".join(
        f"{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LARGE_PATTERNS
    ).encode()
}


class HubError(Exception):
    """An error answer: status, message, and the code from which the client chooses its exception."""

    def __init__(
        self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None, **details: Any
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers, self.details = headers or {}, details


@dataclass(frozen=True)
class StoredFile:
    """A file of a revision: regular without `sha256`; `content` is the key of the bytes served for it."""

    size: int
    oid: str
    content: str
    sha256: str | None = None
    xet_hash: str | None = None

    @property
    def etag(self) -> str:
        """The hash that the Hub announces for the content."""
        return self.sha256 or self.oid

    def entry(self, path: str) -> dict[str, Any]:
        """The file as the Hub lists it."""
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": self.oid, "size": self.size}
        if self.sha256 is not None:
            pointer_size = len(lfs_pointer(self.sha256, self.size))
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": pointer_size}
        if self.xet_hash is not None:
            entry["xetHash"] = self.xet_hash
        return entry


@dataclass(frozen=True)
class Commit:
    """A complete revision of a repository."""

    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: float
    files: dict[str, StoredFile]

    def entry(self) -> dict[str, Any]:
        """The commit as the Hub lists it."""
        authors = [{"user": self.author}]
        entry = {"id": self.sha, "title": self.title, "message": self.message, "authors": authors}
        return {**entry, "date": timestamp(self.date)}

    def entries(self, folder: str = "", recursive: bool = True) -> list[dict[str, Any]]:
        """List the files and folders in a folder; raise `HubError` 404 when there is no such folder."""
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, file in sorted(self.files.items()):
            if not path.startswith(prefix):
                continue
            parents = [
                path[: match.start()] for match in re.finditer("/", path) if match.start() >= len(prefix)
            ]
            for parent in parents if recursive else parents[:1]:
                oid = hashlib.sha1(f"{self.sha}{parent}".encode()).hexdigest()
                entries.setdefault(parent, {"type": "directory", "path": parent, "oid": oid, "size": 0})
            if recursive or not parents:
                entries[path] = file.entry(path)
        if folder and not entries:
            raise HubError(404, f'{folder} does not exist on "{self.sha}"', "EntryNotFound")
        return list(entries.values())


@dataclass
class Repository:
    """Commits and the names that point to them (`refs/heads/main`, `refs/tags/v1`, `refs/pr/1`)."""

    repo_id: str
    repo_type: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    num_pull_requests: int = 0

    @property
    def path(self) -> str:
        """The path of the repository's page."""
        return f"datasets/{self.repo_id}" if self.repo_type == "dataset" else self.repo_id

    def resolve(self, revision: str) -> Commit:
        """Find a revision by branch, tag, `refs/pr/<number>`, or sha (at least 7 characters of it)."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.commits[self.refs[name]]
        matches = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        if len(matches) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[matches[0]]

    def branch(self, revision: str) -> str:
        """Return the full name of a branch or pull request, the only things that take commits."""
        for name in (f"refs/heads/{revision}", revision):
            if name in self.refs and not name.startswith("refs/tags/"):
                return name
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def log(self, revision: str) -> list[Commit]:
        """List a revision and its ancestors, newest first."""
        commits: list[Commit] = []
        commit: Commit | None = self.resolve(revision)
        while commit is not None:
            commits.append(commit)
            commit = self.commits[commit.parent] if commit.parent else None
        return commits

    def create_ref(self, name: str, revision: str) -> None:
        """Let a new branch or tag point to a revision."""
        if name in self.refs:
            raise HubError(409, f"Reference already exists: {name}")
        self.refs[name] = self.resolve(revision).sha

    def add_commit(
        self, ref: str, files: Mapping[str, StoredFile], title: str, message: str, author: str
    ) -> Commit:
        """Move a reference to a new commit with these files."""
        parent, date = self.refs.get(ref), time.time()
        listing = [f"{path} {file.oid}" for path, file in sorted(files.items())]
        identity = "\n".join([self.path, parent or "", title, message, str(time.time_ns()), *listing])
        sha = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, message, author, date, dict(files))
        self.refs[ref] = sha
        return self.commits[sha]


class HubStorage:
    """All repositories and the content they share.

    `lock` guards every change: a commit is computed on a copy and becomes visible in one assignment.
    """

    def __init__(self, xet: XetStore) -> None:
        self.lock = threading.RLock()
        self.xet = xet
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._contents: dict[str, bytes] = {}

    def create(self, repo_type: str, repo_id: str, private: bool = False) -> Repository:
        """Create a repository with the Hub's initial commit; raise `HubError` 409 when it exists."""
        if (repo_type, repo_id) in self._repositories:
            raise HubError(409, f"You already created this {repo_type} repo: {repo_id}")
        repository = Repository(repo_id, repo_type, private)
        files = {path: self.regular_file(data) for path, data in INITIAL_FILES.items()}
        repository.add_commit("refs/heads/main", files, "initial commit", "", "system")
        self._repositories[repo_type, repo_id] = repository
        return repository

    def find(self, repo_type: str, repo_id: str) -> Repository | None:
        """Return a repository, `None` when there is none."""
        return self._repositories.get((repo_type, repo_id))

    def put(self, data: bytes) -> str:
        """Store bytes; return their sha256, which is also their key."""
        key = hashlib.sha256(data).hexdigest()
        self._contents[key] = data
        return key

    def has(self, sha256: str) -> bool:
        """Say whether a large file was uploaded."""
        return sha256 in self._contents or self.xet.hash_of(sha256) is not None

    def get(self, key: str) -> bytes:
        """Return stored bytes, wherever they came from; raise `HubError` 404 for an unknown key."""
        if key in self._contents:
            return self._contents[key]
        xet_hash = self.xet.hash_of(key)
        if xet_hash is None:
            raise HubError(404, f"No content with sha256 {key}")
        return self.xet.read(xet_hash)

    def regular_file(self, data: bytes) -> StoredFile:
        """Store a file that git itself would hold."""
        return StoredFile(len(data), _git_oid(data), self.put(data))

    def large_file(self, sha256: str) -> StoredFile:
        """Refer to an uploaded large file; raise `HubError` 400 when it never arrived."""
        xet_hash = self.xet.hash_of(sha256)
        if not self.has(sha256):
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        size = self.xet.size(xet_hash) if xet_hash else len(self._contents[sha256])
        return StoredFile(size, _git_oid(lfs_pointer(sha256, size)), sha256, sha256, xet_hash)

    def is_large(self, files: Mapping[str, StoredFile], path: str, size: int, sample: bytes) -> bool:
        """Decide, as the Hub does by `.gitattributes`, size and content, what is not a regular file."""
        if size > LARGE_FILE_SIZE or b"\0" in sample:
            return True
        lines = (
            self.get(files[".gitattributes"].content).decode().splitlines()
            if ".gitattributes" in files
            else []
        )
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
        name = path.rsplit("/", 1)[-1]
        return any(fnmatch(path, pattern) or fnmatch(name, pattern) for pattern in patterns)

    def tampered(self, file: StoredFile, data: bytes) -> StoredFile:
        """Return the file with other bytes behind the same announced hashes and size.

        They come over Xet when they were once uploaded over Xet, otherwise by plain HTTP.
        """
        key = self.put(data)
        return replace(file, content=key, xet_hash=self.xet.hash_of(key) if file.xet_hash else None)

    def commit(
        self,
        repository: Repository,
        revision: str,
        header: Mapping[str, str],
        operations: Iterable[dict[str, Any]],
        author: str,
        as_pull_request: bool = False,
    ) -> tuple[Commit, int | None]:
        """Make a commit wholly or not at all, on a branch or as a pull request; return it and the request's number.

        Raises:
            HubError: 412 when the branch has moved on from `header["parentCommit"]`, 400 for an operation
                that is not valid, 404 for deleting what is not there.
        """
        with self.lock:
            branch = repository.branch(revision)
            base, parent = repository.resolve(branch), header.get("parentCommit")
            if as_pull_request and parent:
                base = repository.resolve(parent)
            elif parent and not base.sha.startswith(parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files, number = self._apply(base.files, operations), None
            if as_pull_request:
                number = repository.num_pull_requests = repository.num_pull_requests + 1
                branch = f"refs/pr/{number}"
                repository.refs[branch] = base.sha
            description = header.get("description", "")
            return repository.add_commit(branch, files, header["summary"], description, author), number

    def describe(self, repository: Repository, commit: Commit, with_blobs: bool = False) -> dict[str, Any]:
        """Describe a repository at a revision, as far as its clients read it."""
        card: dict[str, Any] = {}
        if "README.md" in commit.files:
            card = check_card(self.get(commit.files["README.md"].content).decode(errors="replace"))[0]
        siblings: list[dict[str, Any]] = []
        for path, file in sorted(commit.files.items()):
            sibling: dict[str, Any] = {"rfilename": path}
            if with_blobs:
                sibling |= {"size": file.size, "blobId": file.oid}
                if file.sha256 is not None:
                    sizes = {"size": file.size, "pointerSize": len(lfs_pointer(file.sha256, file.size))}
                    sibling["lfs"] = {"sha256": file.sha256, **sizes}
            siblings.append(sibling)
        names = {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
        info = {"id": repository.repo_id, "sha": commit.sha, "private": repository.private, **names}
        return {**info, "tags": _listed(card, "tags"), "cardData": card, "siblings": siblings}

    def _apply(
        self, files: Mapping[str, StoredFile], operations: Iterable[dict[str, Any]]
    ) -> dict[str, StoredFile]:
        """Apply the operations of a commit to a copy of `files`."""
        result = dict(files)
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            path = _checked_path(value["path"])
            if kind == "file":
                result[path] = self.regular_file(_decode(path, value))
            elif kind == "lfsFile":
                result[path] = self.large_file(value["oid"])
            elif kind in ("deletedFile", "deletedFolder"):
                doomed = [name for name in result if name == path or name.startswith(f"{path}/")]
                if not doomed or (kind == "deletedFile") != (path in doomed):
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for name in doomed:
                    del result[name]
            else:
                raise HubError(400, f"Unknown operation {kind!r} in the commit")
        if "README.md" in result and result["README.md"] != files.get("README.md"):
            errors = check_card(self.get(result["README.md"].content).decode(errors="replace"))[1]
            if errors:
                raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
        return result


def timestamp(seconds: float) -> str:
    """Write a time as the Hub does."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))


def lfs_pointer(sha256: str, size: int) -> bytes:
    """Write the pointer that git holds in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _checked_path(path: str) -> str:
    path = path.removesuffix("/")
    if any(part in ("", ".", "..", ".git") for part in path.split("/")):
        raise HubError(400, f"Invalid path in the commit: {path!r}")
    return path


def _decode(path: str, value: dict[str, Any]) -> bytes:
    try:
        return base64.b64decode(value["content"], validate=True)
    except binascii.Error as error:
        raise HubError(400, f"The content of {path} is not base64") from error


def check_card(text: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """Read the metadata block of a card and return (metadata, errors, warnings).

    The rules are those of the Hub's validator that a card of this project can break.
    """
    match = re.match(r"---\r?\n(.*?)\r?\n?---(?:\r?\n|$)", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        return {}, [f"YAML Metadata Error: {error}"], []
    if metadata is None:
        return {}, [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(metadata, dict):
        return {}, ["YAML Metadata Error: it must be a mapping"], []
    return metadata, _card_errors(metadata), []


def _card_errors(metadata: dict[str, Any]) -> list[str]:
    errors = []
    for key, page in (("base_model", "models"), ("datasets", "datasets")):
        for value in _listed(metadata, key):
            if not re.fullmatch(r"[\w.-]*\w(?:/\w[\w.-]*)?", str(value)):
                errors.append(
                    f'"{key}" with value "{value}" is not valid. Use an id from https://hf.co/{page}.'
                )
    for language in _listed(metadata, "language"):
        if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", str(language)):
            errors.append(f'"language" with value "{language}" is not valid. It must be an ISO 639 code.')
    relation = metadata.get("base_model_relation")
    if relation not in (None, "adapter", "finetune", "merge", "quantized"):
        errors.append(f'"base_model_relation" with value "{relation}" is not valid.')
    if not isinstance(metadata.get("tags", []), list):
        errors.append('"tags" must be an array')
    for index, model in enumerate(metadata.get("model-index") or []):
        if not (isinstance(model, dict) and model.get("name") and isinstance(model.get("results"), list)):
            errors.append(f'"model-index[{index}]" must have a "name" and an array of "results"')
    return errors


def _listed(metadata: dict[str, Any], key: str) -> list[Any]:
    value = metadata.get(key)
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
