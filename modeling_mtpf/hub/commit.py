"""One push: what it would change, one atomic commit on the head it was planned against, and a second look.

Everything is checked before anything changes. The Hub refuses the commit if another push was faster; after it
the head is read again and compared with what was sent.
"""

import logging
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard

from .client import HubError, PushConflictError, attempt, check_repo_id, explained, validate_card
from .files import CARD_FILE, MARKERS, Content, check_text
from .manifest import HubFile, Manifest, find_manifest, read_manifest

log = logging.getLogger(__name__)

KEPT_FILES = {".gitattributes"}
"""Files of a repo that are not ours to delete: the Hub writes them."""


@dataclass(frozen=True)
class Release:
    """Where a push goes, and what its card says in addition to what the folder tells.

    Attributes:
        repo_id: ``owner/name``; created if need be.
        private: Create the repo as a private one.
        create_pr: Open a pull request instead of committing to the branch.
        branch: An existing branch.
        commit_message: Title of the commit.
        license: License id for the card.
        language: Language codes for the card.
        datasets: Hub ids of the training data for the card, instead of those recorded in the folder.
        token: Hub token; by default the one of ``hf auth login``.
    """

    repo_id: str
    private: bool = False
    create_pr: bool = False
    branch: str = "main"
    commit_message: str = "Publish with mtpf"
    license: str = "apache-2.0"
    language: str | list[str] = "en"
    datasets: list[str] | None = None
    token: str | None = field(default=None, repr=False)

    def __post_init__(self):
        check_repo_id(self.repo_id)
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.license):
            raise HubError(
                f"The license {self.license!r} is not an id; use one of "
                "https://huggingface.co/docs/hub/repositories-licenses, for instance apache-2.0."
            )
        if self.create_pr and self.branch != "main":
            raise HubError("A pull request goes to main; leave out either the branch or the pull request.")

    @property
    def api(self) -> HfApi:
        """The Hub's client, with this release's token."""
        return HfApi(token=self.token)

    @property
    def card(self) -> dict[str, Any]:
        """What goes into the card."""
        names = ("repo_id", "branch", "license", "language", "datasets")
        return {name: getattr(self, name) for name in names}

    def read_head(self) -> Manifest:
        """Ask the Hub for the files at the head of the branch."""
        return read_manifest(self.api, self.repo_id, self.branch)


@dataclass(frozen=True)
class PlannedFile:
    """One file of a push: ``change`` is ``add``, ``update``, ``keep`` or ``delete``."""

    path: str
    size: int
    sha256: str | None
    change: str


@dataclass(frozen=True)
class PushPlan:
    """What a push would do, as a dry run returns it.

    Attributes:
        repo_id: The repo.
        kind: ``backbone`` or ``adapter``.
        branch: The branch that gets the commit.
        head: The commit that the plan was made against; ``None`` if the repo does not exist yet.
        files: All files of the repo after the push, and those that it deletes.
    """

    repo_id: str
    kind: str
    branch: str
    head: str | None
    files: tuple[PlannedFile, ...]

    @property
    def changes(self) -> tuple[PlannedFile, ...]:
        """The files that the commit touches; none means that there will be no commit."""
        return tuple(file for file in self.files if file.change != "keep")

    @property
    def size(self) -> int:
        """Bytes of the repo after the push."""
        return sum(file.size for file in self.files if file.change != "delete")

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return {**asdict(self), "size": self.size}

    def __str__(self) -> str:
        width = max((len(file.path) for file in self.files), default=0)
        lines = [f"{file.change:<6}  {file.path:<{width}}  {file.size:>12,}" for file in self.files]
        where = f"{self.repo_id}@{self.branch}" + ("" if self.head else " (to be created)")
        return "\n".join([f"{self.kind} → {where}: {self.size:,} bytes", *lines])


def publish(release: Release, kind: str, content: Content, card: ModelCard, dry_run: bool) -> str | PushPlan:
    """Make the checked files and the card of a ``backbone`` or ``adapter`` the whole content of a repo.

    Returns:
        The sha of the commit, or of the head where nothing had changed; with ``dry_run`` a `PushPlan`.

    Raises:
        HubError: The repo is another kind of thing, the Hub refuses, or holds something else afterwards.
    """
    api, repo_id = release.api, release.repo_id
    content = {**content, CARD_FILE: CommitOperationAdd(CARD_FILE, str(card).encode())}
    for operation in content.values():
        check_text(operation)
    remote = find_manifest(api, repo_id, release.branch)
    if remote is None and release.branch != "main":
        raise HubError(
            f"There is no repo {repo_id} yet, and a new one has no branch {release.branch!r}; push to main "
            "first."
        )
    plan = _plan(release, kind, remote, content)
    validate_card(repo_id, card)  # the client would check it only after the repo is made
    if dry_run:
        return plan
    if remote is None:
        with explained(repo_id):
            attempt(lambda: api.create_repo(repo_id, private=release.private, exist_ok=True))
        # Read it even though it is new: it may have been created by another push meanwhile.
        plan = _plan(release, kind, release.read_head(), content)
    if not plan.changes:
        log.info("%s holds exactly these files already; no commit was made.", repo_id)
        return str(plan.head)
    sha = _commit(release, plan, content)
    _verify(release, content, sha)
    return sha


def _plan(release: Release, kind: str, remote: Manifest | None, content: Content) -> PushPlan:
    """Compare content and repo; refuse a repo of another kind, or a public one where it should be private."""
    repo_id, files = release.repo_id, remote.files if remote else {}
    if remote and release.private and not remote.private:
        raise HubError(f"{repo_id} exists and is public; make it private in its settings, or choose another.")
    if files.keys() - {*KEPT_FILES, CARD_FILE} and MARKERS[kind] not in files:
        raise HubError(f"{repo_id} holds something else than an mtpf {kind}; choose another name.")
    if ".gitignore" in files:
        raise HubError(f"{repo_id} has a .gitignore, which can make the Hub leave files out; delete it.")
    head = remote.sha if remote else None
    return PushPlan(repo_id, kind, release.branch, head, tuple(_compare(files, content)))


def _compare(files: dict[str, HubFile], content: Content) -> list[PlannedFile]:
    """Return what a push does with each file; `create_commit` finds unchanged files only on sending."""
    planned = []
    for path, operation in sorted(content.items()):
        change = "add" if path not in files else "keep" if files[path].is_what(operation) else "update"
        info = operation.upload_info
        planned.append(PlannedFile(path, info.size, info.sha256.hex(), change))
    stale = sorted(files.keys() - content.keys() - KEPT_FILES)
    return planned + [PlannedFile(path, files[path].size, None, "delete") for path in stale]


def _differing(remote: Manifest, content: Content) -> list[str]:
    return [file.path for file in _compare(remote.files, content) if file.change != "keep"]


def _commit(release: Release, plan: PushPlan, content: Content) -> str:
    """Send the commit; after a failure look whether it took effect, then try again on the same parent."""
    operations: list[Any] = [
        CommitOperationDelete(file.path, is_folder=False) if file.change == "delete" else content[file.path]
        for file in plan.changes
    ]

    def send() -> str:
        info = release.api.create_commit(
            release.repo_id,
            operations,
            commit_message=release.commit_message,
            revision=release.branch,
            create_pr=release.create_pr,
            parent_commit=plan.head,
        )
        if info.pr_url:
            log.info("Opened %s", info.pr_url)
        return info.oid

    try:
        with explained(release.repo_id):
            # A pull request whose answer got lost cannot be found again; a second one would be a double.
            return send() if release.create_pr else attempt(send, lambda: _landed(release, plan, content))
    except PushConflictError:
        raise
    except HubError as error:
        raise HubError(f"{error} {_state(release, plan)}") from error


def _landed(release: Release, plan: PushPlan, content: Content) -> str | None:
    """Return the sha of this push's commit if it took effect; refuse if another one is in its place.

    It names the planned head as its parent: if it took effect at all, it is the next one on the branch.
    """
    api, repo_id = release.api, release.repo_id
    head = release.read_head()
    if head.sha == plan.head:
        return None
    with explained(repo_id):
        shas = attempt(lambda: [c.commit_id for c in api.list_repo_commits(repo_id, revision=release.branch)])
    following = shas[: shas.index(plan.head)] if plan.head in shas else []
    if following and not _differing(read_manifest(api, repo_id, following[-1]), content):
        return following[-1]
    raise PushConflictError(
        f"Another push has committed {head.sha[:8]} to {repo_id} since this one was planned; it stays as it "
        "is, and nothing of this push was published. Look at that commit, then push again."
    )


def _state(release: Release, plan: PushPlan) -> str:
    """Say what the repo holds after a push has failed."""
    try:
        head = release.read_head()
    except HubError:
        return "What its head is now could not be read; look at it before you push again."
    if head.sha != plan.head:
        return f"Nothing of this push was published; its head is {head.sha[:8]}, another push's commit."
    if not head.files.keys() - KEPT_FILES:
        return "Nothing was published: the repo is there, but still empty."
    return f"Nothing was published: its head is still {head.sha[:8]}, a complete revision."


def _verify(release: Release, content: Content, sha: str) -> None:
    """Compare what the Hub now holds with what was sent."""
    api, repo_id = release.api, release.repo_id
    try:
        head = read_manifest(api, repo_id, sha if release.create_pr else release.branch)
        commit = head if head.sha == sha else read_manifest(api, repo_id, sha)
    except HubError as error:
        raise HubError(
            f"{repo_id} has the commit {sha}, but it could not be read again to compare it with what was "
            f"sent; push again to have it compared. {error}"
        ) from error
    if differing := _differing(commit, content):
        raise HubError(
            f"{repo_id} does not hold at {sha[:8]} what was sent: {', '.join(differing)} differ. Push again, "
            "and do not load this commit."
        )
    if head.sha != sha:
        log.warning("Another push has committed %s on top of this push's %s.", head.sha[:8], sha[:8])
