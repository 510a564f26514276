"""Look at a folder or a repo without running, unpacking or unpickling anything in it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download

from .adapter_files_mtpf import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, HEAD_FILE, TASK_FILE
from .errors import MtpfError
from .hub_client import HubError, check_repo_id, explained, read_remote
from .hub_files import (
    CONFIG_FILE,
    TRAINING_FILE,
    WEIGHTS_FILE,
    HubFileError,
    check_adapter,
    check_backbone,
    code_files,
    count_values,
    git_sha1,
    objection,
    read_json,
    sha256_of,
    tensor_shapes,
)

SMALL_FILES = (CONFIG_FILE, TRAINING_FILE, TASK_FILE, ADAPTER_CONFIG_FILE, HEAD_FILE, ADAPTER_WEIGHTS_FILE)
"""What `inspect` fetches of a repo; a backbone's weights stay where they are."""
MAX_FETCH_BYTES = 200_000_000


@dataclass
class InspectedFile:
    """One file; ``sha256`` or, for a small file of a repo, the hash that git gives it."""

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass
class Inspection:
    """What `inspect` found.

    Attributes:
        source: The folder or repo.
        revision: Commit of the repo; ``None`` for a folder.
        kind: ``backbone``, one of the kinds of adapter, or ``unknown``.
        name: Name of the adapter.
        size: Bytes of all files.
        parameters: Values in the encoder or the LoRA, where the weights could be read.
        labels: Labels of an app, in the order of its logits.
        metrics: Metrics that the adapter recorded.
        backbone: Id, revision and weights' sha256 of the backbone that an adapter belongs to.
        regime: What a backbone was pre-finetuned for.
        files: All files with their hashes.
        findings: What is missing, damaged, or does not belong there; empty when all is well.
    """

    source: str
    revision: str | None = None
    kind: str = "unknown"
    name: str | None = None
    size: int = 0
    parameters: int | None = None
    labels: list[str] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)
    regime: str | None = None
    files: list[InspectedFile] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            ("source", self.source),
            ("revision", self.revision),
            ("kind", self.kind),
            ("name", self.name),
            ("regime", self.regime),
            ("size", f"{self.size:,} bytes"),
            ("parameters", None if self.parameters is None else f"{self.parameters:,}"),
            ("labels", ", ".join(self.labels)),
            ("metrics", ", ".join(f"{key} {value}" for key, value in self.metrics.items())),
            ("backbone", " ".join(f"{key}={value}" for key, value in self.backbone.items() if value)),
        ]
        lines = [f"{name:<10}  {value}" for name, value in rows if value]
        width = max((len(file.path) for file in self.files), default=0)
        for file in self.files:
            digest = f"sha256:{file.sha256}" if file.sha256 else f"git:{file.git_sha1}"
            lines.append(f"{'file':<10}  {file.path:<{width}}  {file.size:>12,}  {digest}")
        lines += [f"{'FINDING':<10}  {finding}" for finding in self.findings]
        return "\n".join(lines)


def inspect(
    folder_or_repo: str | Path, revision: str | None = None, *, token: str | None = None
) -> Inspection:
    """Describe a folder or repo: kind, size, labels, metrics, hashes, and what does not belong there.

    Pickles and foreign code are named, never opened. Of a repo only small files are fetched.

    Raises:
        MtpfError: There is no such folder, repo or revision.
    """
    folder = Path(folder_or_repo)
    if folder.is_dir():
        found = Inspection(str(folder_or_repo), files=_local_files(folder))
    else:
        if str(folder_or_repo).count("/") != 1 or str(folder_or_repo).startswith((".", "/", "~")):
            raise HubError(f"{folder_or_repo} is neither a folder nor a Hub id of the form 'owner/name'.")
        found, folder = _fetch(str(folder_or_repo), revision, token)
    found.size = sum(file.size for file in found.files)
    own = {name: path.read_bytes() for name, path in code_files().items()}
    for file in found.files:
        reason = objection(file.path)
        if reason is None and not found.revision and (folder / file.path).is_symlink():
            target = (folder / file.path).readlink()
            if target.is_absolute() or (
                ".." in target.parts and "blobs" not in target.parts
            ):  # not the cache's
                reason = "it is a link that leads out of the folder"
        if reason:
            found.findings.append(f"{file.path}: {reason}")
        elif file.path in own and file.git_sha1 != git_sha1(own[file.path]):
            found.findings.append(f"{file.path}: remote code that differs from this version of mtpf; read it")
    paths = {file.path for file in found.files}
    try:
        if ADAPTER_CONFIG_FILE in paths or TASK_FILE in paths:
            _describe_adapter(folder, found)
        elif CONFIG_FILE in paths:
            _describe_backbone(folder, found)
        else:
            found.findings.append("it is neither a backbone nor an adapter of mtpf")
    except MtpfError as error:
        found.findings.append(str(error).replace(f"{folder}/", "").replace(str(folder), "it"))
    return found


def _local_files(folder: Path) -> list[InspectedFile]:
    files = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith((".git/", ".cache/")):
            small = git_sha1(path.read_bytes()) if name in code_files() else None
            files.append(InspectedFile(name, path.stat().st_size, sha256_of(path), small))
    return files


def _fetch(repo_id: str, revision: str | None, token: str | None) -> tuple[Inspection, Path]:
    check_repo_id(repo_id)
    remote = read_remote(HfApi(token=token), repo_id, revision or "main")
    assert remote is not None
    files = [
        InspectedFile(
            path, file.size, file.lfs.sha256 if file.lfs else None, None if file.lfs else file.blob_id
        )
        for path, file in sorted(remote.files.items())
    ]
    folder = Path("/nonexistent")
    for name in SMALL_FILES:
        if name in remote.files and remote.files[name].size <= MAX_FETCH_BYTES:
            with explained(repo_id):
                place = hf_hub_download(repo_id, name, revision=remote.sha, token=token)  # retries by itself
                folder = Path(place).parent
    return Inspection(repo_id, remote.sha, files=files), folder


def _describe_adapter(folder: Path, found: Inspection) -> None:
    task = read_json(folder / TASK_FILE)
    found.kind, found.name = str(task.get("kind")), task.get("name")
    found.labels = [str(label) for label in task.get("labels") or []]
    found.metrics, found.backbone = task.get("metrics") or {}, task.get("backbone") or {}
    found.parameters = count_values(tensor_shapes(folder / ADAPTER_WEIGHTS_FILE))
    config, _ = check_adapter(folder)
    named = (config.get("base_model_name_or_path"), config.get("revision"))
    if named != (found.backbone.get("id"), found.backbone.get("revision")):
        raise HubFileError(f"{TASK_FILE} and {ADAPTER_CONFIG_FILE} name different backbones.")


def _describe_backbone(folder: Path, found: Inspection) -> None:
    config = read_json(folder / CONFIG_FILE)
    if "mtpf" not in config:
        found.findings.append("it is a stock encoder, no backbone of mtpf")
        return
    found.kind, found.regime = "backbone", config["mtpf"].get("regime")
    if found.revision is None:
        check_backbone(folder)
        found.parameters = count_values(tensor_shapes(folder / WEIGHTS_FILE))
    elif not any(file.path == WEIGHTS_FILE for file in found.files):
        found.findings.append(f"it has no {WEIGHTS_FILE}")


__all__ = ["InspectedFile", "Inspection", "inspect"]
