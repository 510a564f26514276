"""Publish backbones and adapters on the Hub, one atomic commit each; fetch and inspect them.

Everything is checked before anything changes: the files of the folder, the state of the repo, and for an
adapter the published backbone. A push plans against one commit of the repo and names it as the parent of its
own; when somebody else was faster, the Hub refuses it and nothing is lost.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

from hub_cards import adapter_card, backbone_card

from .adapter_files_mtpf import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, TASK_FILE
from .hub_client import (
    HubError,
    PushConflictError,
    RemoteRepo,
    attempt,
    check_repo_id,
    explained,
    read_remote,
    validate_card,
)
from .hub_files import (
    ADAPTER_FILES,
    BACKBONE_FILES,
    CARD_FILE,
    CONFIG_FILE,
    TRAINING_FILE,
    WEIGHTS_FILE,
    check_adapter,
    check_backbone,
    check_local_paths,
    code_files,
    count_values,
    git_sha1,
    list_folder,
    read_json,
    sha256_of,
    tensor_shapes,
)
from .hub_pull import pull
from .inspection import inspect

log = logging.getLogger(__name__)

KEPT_FILES = (".gitattributes",)
"""Files of a repo that are not ours to delete: the Hub writes them."""

# -------------------------------------------------------------------------------------------- plans


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
        return {**asdict(self), "files": [asdict(file) for file in self.files], "size": self.size}

    def __str__(self) -> str:
        width = max((len(file.path) for file in self.files), default=0)
        lines = [f"{file.change:<6}  {file.path:<{width}}  {file.size:>12,}" for file in self.files]
        where = f"{self.repo_id}@{self.branch}" + ("" if self.head else " (to be created)")
        return "\n".join([f"{self.kind} → {where}: {self.size:,} bytes", *lines])


# --------------------------------------------------------------------------------------------- push


def push_backbone(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    branch: str = "main",
    commit_message: str = "Publish the backbone with mtpf",
    license: str = "apache-2.0",  # noqa: A002
    language: str | list[str] = "en",
    datasets: list[str] | None = None,
    results: list[dict[str, Any]] | None = None,
) -> str | PushPlan:
    """Publish a backbone folder as one commit: weights, tokenizer, this package's loading code, and its card.

    Args:
        folder: As ``train/pretrain.py``, or ``save_pretrained`` of model and tokenizer, write it.
        repo_id: ``owner/name``; created if need be.
        private: Create the repo as a private one.
        create_pr: Open a pull request instead of committing to the branch.
        dry_run: Check everything, change nothing, and return the plan.
        token: Hub token; by default the one of ``hf auth login``.
        branch: An existing branch.
        commit_message: Title of the commit.
        license: License id for the card.
        language: Language codes for the card.
        datasets: Hub ids of the training data for the card, instead of those recorded in the folder.
        results: Evaluation records (``task``, ``metric``, ``value``, ...) for the card's table.

    Returns:
        The sha of the commit, or of the head where nothing had changed; with ``dry_run`` a `PushPlan`.

    Raises:
        MtpfError: The folder is no backbone or holds something that may not be published, or the Hub refuses.
    """
    folder = Path(folder)
    api = HfApi(token=token)
    check_repo_id(repo_id)
    files: dict[str, Path | bytes] = {**list_folder(folder, BACKBONE_FILES)}
    config = check_backbone(folder)
    code = code_files()
    card = backbone_card(
        read_json(folder / TRAINING_FILE) if TRAINING_FILE in files else None,
        repo_id=repo_id,
        config=config,
        num_parameters=count_values(tensor_shapes(folder / WEIGHTS_FILE)),
        hashes={
            name: sha256_of(path) for name, path in {**code, WEIGHTS_FILE: folder / WEIGHTS_FILE}.items()
        },
        license=license,
        language=language,
        datasets=datasets,
        results=results,
    )
    files.update(code)
    target = _Target(repo_id, "backbone", private, create_pr, branch, commit_message)
    return _push(api, target, card, files, dry_run)


def push_adapter(
    folder: str | Path,
    repo_id: str,
    *,
    backbone_id: str | None = None,
    backbone_revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    branch: str = "main",
    commit_message: str = "Publish the adapter with mtpf",
    license: str = "apache-2.0",  # noqa: A002
    language: str | list[str] = "en",
    datasets: list[str] | None = None,
) -> str | PushPlan:
    """Publish an adapter folder as one commit, bound to a published backbone by id, commit and weights' hash.

    The folder is not changed: the uploaded ``adapter_config.json`` and ``task.json`` name the backbone.

    Args:
        folder: As ``model.save_adapter`` writes it.
        repo_id: ``owner/name``; created if need be.
        backbone_id: Hub id of the published backbone; by default the one recorded in the folder.
        backbone_revision: Its commit, tag or branch; by default the one recorded, else the head of ``main``.
        private: Create the repo as a private one.
        create_pr: Open a pull request instead of committing to the branch.
        dry_run: Check everything, change nothing, and return the plan.
        token: Hub token; by default the one of ``hf auth login``.
        branch: An existing branch.
        commit_message: Title of the commit.
        license: License id for the card.
        language: Language codes for the card.
        datasets: Hub ids of the training data for the card, instead of those recorded in the folder.

    Returns:
        The sha of the commit, or of the head where nothing had changed; with ``dry_run`` a `PushPlan`.

    Raises:
        MtpfError: The folder is damaged, its backbone is not published or another one, a file holds a local
            path, or the Hub refuses.
    """
    folder = Path(folder)
    api = HfApi(token=token)
    check_repo_id(repo_id)
    files: dict[str, Path | bytes] = {**list_folder(folder, ADAPTER_FILES)}
    config, task = check_adapter(folder)
    recorded = task.get("backbone") or {}
    backbone_id, revision = _published_backbone(
        api, folder, recorded, backbone_id, backbone_revision or recorded.get("revision")
    )
    task = {**task, "backbone": {**recorded, "id": backbone_id, "revision": revision}}
    config = {**config, "base_model_name_or_path": backbone_id, "revision": revision}
    files[TASK_FILE], files[ADAPTER_CONFIG_FILE] = _json_bytes(task), _json_bytes(config)
    card = adapter_card(
        task,
        config,
        repo_id=repo_id,
        num_parameters=count_values(tensor_shapes(folder / ADAPTER_WEIGHTS_FILE)),
        num_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        license=license,
        language=language,
        datasets=datasets,
    )
    target = _Target(repo_id, "adapter", private, create_pr, branch, commit_message)
    return _push(api, target, card, files, dry_run)


def _published_backbone(
    api: HfApi, folder: Path, recorded: dict[str, Any], backbone_id: str | None, revision: str | None
) -> tuple[str, str]:
    """Return the id and commit of the published backbone, after comparing the hash of its weights."""
    backbone_id = backbone_id or recorded.get("id")
    if not backbone_id:
        raise HubError(
            f"{folder} does not say which published backbone it belongs to; publish that first (mtpf push "
            "backbone FOLDER OWNER/NAME) and name it with --backbone OWNER/NAME."
        )
    check_repo_id(backbone_id)
    remote = read_remote(api, backbone_id, revision or "main", missing_ok=True)
    if remote is None:
        raise HubError(
            f"The backbone {backbone_id} is not published, or your token may not read it; publish it first "
            f"with: mtpf push backbone FOLDER {backbone_id}"
        )
    weights = remote.files.get(WEIGHTS_FILE)
    if weights is None or CONFIG_FILE not in remote.files:
        raise HubError(
            f"{backbone_id} at {remote.sha[:8]} is no backbone: it has no {WEIGHTS_FILE} or config."
        )
    published = weights.lfs.sha256 if weights.lfs is not None else None
    expected = recorded.get("sha256")
    if not expected or published != expected:
        raise HubError(
            f"{folder} was trained on another backbone than {backbone_id} at {remote.sha[:8]} (weights "
            f"sha256 {str(expected)[:12]}…, published {str(published)[:12]}…); push the backbone it was "
            "trained on, or name its commit with --backbone_revision."
        )
    return backbone_id, remote.sha


def _json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class _Target:
    """Where a push goes, and how."""

    repo_id: str
    kind: str
    private: bool
    create_pr: bool
    branch: str
    commit_message: str


def _push(
    api: HfApi, target: _Target, card: ModelCard, content: dict[str, Path | bytes], dry_run: bool
) -> str | PushPlan:
    content = {**content, CARD_FILE: str(card).encode()}
    for name, data in content.items():
        if not name.endswith((".safetensors", ".py", ".model")):
            check_local_paths(name, data if isinstance(data, bytes) else data.read_bytes())
    files = {name: CommitOperationAdd(name, data) for name, data in sorted(content.items())}
    remote = read_remote(api, target.repo_id, target.branch, missing_ok=True)
    plan = _plan(target, remote, files)
    validate_card(
        target.repo_id, card
    )  # before anything changes: the client checks it after the repo is made
    if dry_run:
        return plan
    if remote is None:
        with explained(target.repo_id):
            attempt(lambda: api.create_repo(target.repo_id, private=target.private, exist_ok=True))
        # Read it even though it is new: somebody else may have made one meanwhile.
        plan = _plan(target, read_remote(api, target.repo_id, target.branch), files)
    if not plan.changes:
        log.info("%s holds exactly these files already; no commit was made.", target.repo_id)
        return str(plan.head)
    return _commit(api, target, plan, files)


def _plan(target: _Target, remote: RemoteRepo | None, files: dict[str, CommitOperationAdd]) -> PushPlan:
    """Compare what is to be published with what is there.

    Raises:
        HubError: The repo is another kind of thing, or public where a private one was asked for.
    """
    there = remote.files if remote else {}
    if remote and target.private and not remote.private:
        raise HubError(
            f"{target.repo_id} exists and is public; make it private in its settings, or choose another name."
        )
    # Files that only this project publishes: another model's config.json must not make its repo fair game.
    marker = {"backbone": "modeling_mtpf.py", "adapter": TASK_FILE}[target.kind]
    if set(there) - {*KEPT_FILES, CARD_FILE} and marker not in there:
        raise HubError(
            f"{target.repo_id} holds something else than an mtpf {target.kind}; choose another name."
        )
    if ".gitignore" in there:
        raise HubError(
            f"{target.repo_id} has a .gitignore, which can make the Hub leave files out; delete it first."
        )
    planned = []
    for path, operation in sorted(files.items()):
        info = operation.upload_info
        change = "add" if path not in there else "keep" if _is_same(operation, there[path]) else "update"
        planned.append(PlannedFile(path, info.size, info.sha256.hex(), change))
    for path in sorted(set(there) - set(files) - set(KEPT_FILES)):
        planned.append(PlannedFile(path, there[path].size, None, "delete"))
    head = remote.sha if remote else None
    return PushPlan(target.repo_id, target.kind, target.branch, head, tuple(planned))


def _is_same(operation: CommitOperationAdd, file: RepoFile) -> bool:
    if file.lfs is not None:
        return file.lfs.sha256 == operation.upload_info.sha256.hex()
    if file.size != operation.upload_info.size:
        return False
    with operation.as_file() as content:
        return file.blob_id == git_sha1(content.read())


def _commit(api: HfApi, target: _Target, plan: PushPlan, files: dict[str, CommitOperationAdd]) -> str:
    """Send the commit; after a failure look whether it took effect, then try again on the same parent."""
    operations: list[Any] = [
        CommitOperationDelete(file.path, is_folder=False) if file.change == "delete" else files[file.path]
        for file in plan.changes
    ]

    def send() -> str:
        info = api.create_commit(
            target.repo_id,
            operations,
            commit_message=target.commit_message,
            revision=target.branch,
            create_pr=target.create_pr,
            parent_commit=plan.head,
        )
        if info.pr_url:
            log.info("Opened %s", info.pr_url)
        return info.oid

    def landed() -> str | None:
        """Return the head's sha if it is what was to be published; refuse if it is somebody else's."""
        remote = read_remote(api, target.repo_id, target.branch)
        assert remote is not None
        if not _plan(target, remote, files).changes:
            return remote.sha
        if remote.sha != plan.head:
            raise PushConflictError(
                f"Somebody else has committed {remote.sha[:8]} to {target.repo_id} since this push was "
                "planned; nothing was changed. Look at their commit, then push again."
            )
        return None

    with explained(target.repo_id):
        try:
            # A pull request whose answer got lost cannot be found again; a second one would be a double.
            return send() if target.create_pr else attempt(send, before_retry=landed)
        except HfHubHTTPError as error:
            if error.response.status_code != 412:
                raise
            sha = landed()  # the client may have retried on its own after the answer got lost
            if sha is None:
                raise
            return sha


__all__ = [
    "HubError",
    "PlannedFile",
    "PushConflictError",
    "PushPlan",
    "inspect",
    "pull",
    "push_adapter",
    "push_backbone",
]
