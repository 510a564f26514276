"""Look at a folder or a repo without running, unpacking or unpickling anything in it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi

from hub_cards import adapter_card, backbone_card

from ..errors import MtpfError
from ..model.adapter_files_mtpf import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    HEAD_FILE,
    TASK_FILE,
    read_task,
)
from ..model.hub_cache_mtpf import sha256_of
from ..model.sources_mtpf import backbone_hint, find_on_hub
from .checks import (
    Backbone,
    changed_code,
    check_adapter,
    check_backbone,
    check_published_backbone,
    check_tokenizer,
    listing_findings,
    read_published_backbone,
)
from .client import HubError, check_repo_id
from .download import download
from .files import (
    CONFIG_FILE,
    MARKERS,
    TOKENIZER_CONFIG_FILE,
    TRAINING_FILE,
    WEIGHTS_FILE,
    objection,
    read_json,
    tensor_shapes,
)
from .manifest import HubFile, Manifest, read_manifest

SMALL_FILES = (CONFIG_FILE, TRAINING_FILE, TASK_FILE, ADAPTER_CONFIG_FILE, HEAD_FILE, ADAPTER_WEIGHTS_FILE)
"""What `inspect` fetches of a repo; of a backbone's weights it reads the header alone."""
MAX_FETCH_BYTES = 200_000_000


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
    files: list[HubFile] = field(default_factory=list)
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
        manifest = _local_manifest(folder)
        inspection = Inspection(str(folder_or_repo))
        inspection.findings = [
            f"{path}: it is a link that leads out of the folder" for path in _foreign_links(folder)
        ]
        _describe(inspection, folder, manifest, None)
        return inspection
    repo_id = str(folder_or_repo)
    commit = find_on_hub(repo_id, revision, token=token, error=HubError)
    api = HfApi(token=token)
    manifest = read_manifest(api, repo_id, commit.resolved)
    inspection = Inspection(repo_id, manifest.sha)
    with TemporaryDirectory() as nowhere:
        folder = Path(nowhere)
        try:
            names = [name for name in SMALL_FILES if name in manifest.files]
            names = [name for name in names if manifest.files[name].size <= MAX_FETCH_BYTES]
            folder = download(api, repo_id, manifest, names) if names else folder
        except HubError as error:
            inspection.findings.append(str(error))
        _describe(inspection, folder, manifest, api)
    return inspection


def _describe(inspection: Inspection, folder: Path, manifest: Manifest, api: HfApi | None) -> None:
    """Fill in what the files tell; ``api`` for a repo, of which the folder has the small files only."""
    paths = manifest.files
    inspection.files = list(paths.values())
    inspection.size = sum(file.size for file in inspection.files)
    is_adapter = ADAPTER_CONFIG_FILE in paths or TASK_FILE in paths
    is_backbone = not is_adapter and bool({CONFIG_FILE, MARKERS["backbone"]} & set(paths))
    try:
        if is_adapter:
            _describe_adapter(inspection, folder, api)
        elif is_backbone:
            is_backbone = _describe_backbone(inspection, folder, manifest, api)
        else:
            inspection.findings.append(
                f"it is neither a backbone nor an adapter of mtpf{backbone_hint(folder)}"
            )
    except MtpfError as error:
        inspection.findings.append(str(error).replace(f"{folder}/", "").replace(str(folder), "it"))
    objections = [f"{path}: {reason}" for path in paths if (reason := objection(path))]
    code = [
        f"{path}: remote code that differs from this version of mtpf; read it"
        for path in changed_code(manifest)
    ]
    inspection.findings += sorted((listing_findings(manifest) if is_backbone else objections) + code)


def _describe_adapter(inspection: Inspection, folder: Path, api: HfApi | None) -> None:
    task = read_json(folder / TASK_FILE)
    inspection.kind, inspection.name = str(task.get("kind") or "unknown"), str(task.get("name") or "") or None
    read_task(folder)  # the types of what follows
    inspection.labels, inspection.metrics = task.get("labels") or [], task.get("metrics") or {}
    inspection.backbone = task.get("backbone") or {}
    shapes = tensor_shapes(folder / ADAPTER_WEIGHTS_FILE).values()
    inspection.parameters = sum(
        rows * columns for rows, columns in (shape for shape in shapes if len(shape) == 2)
    )
    config, _ = check_adapter(folder)
    repo_id, revision = inspection.backbone.get("id"), inspection.backbone.get("revision")
    if (config.get("base_model_name_or_path"), config.get("revision")) != (repo_id, revision):
        raise HubError(f"{TASK_FILE} and {ADAPTER_CONFIG_FILE} name different backbones.")
    adapter_card(task, config)  # raises what a push would
    if api is None:
        return
    if not isinstance(repo_id, str) or not isinstance(revision, str):
        raise HubError(f"{TASK_FILE} names no published backbone with its commit.")
    check_repo_id(repo_id)
    manifest = read_manifest(api, repo_id, revision)
    if manifest.files.get(WEIGHTS_FILE, HubFile("", 0)).sha256 != inspection.backbone.get("sha256"):
        raise HubError(f"its backbone {repo_id} has other weights at {revision[:8]} than it was trained on.")
    check_adapter(folder, check_published_backbone(api, repo_id, manifest))


def _describe_backbone(inspection: Inspection, folder: Path, manifest: Manifest, api: HfApi | None) -> bool:
    """Say whether it is a backbone of mtpf, rather than a stock encoder."""
    inspection.kind = "backbone"
    if CONFIG_FILE not in manifest.files:
        return True  # the listing's findings say so
    config = read_json(folder / CONFIG_FILE)
    block = config.get("mtpf")
    if block is None:
        inspection.kind = "unknown"
        if config.get("auto_map"):
            inspection.findings.append(f"{CONFIG_FILE} names code to import that is not mtpf's")
        inspection.findings.append("it is a stock encoder, not a backbone of mtpf")
        return False
    inspection.regime = str(block["regime"]) if isinstance(block, dict) and block.get("regime") else None
    if WEIGHTS_FILE not in manifest.files:
        return True
    backbone: Backbone
    if api is None:
        backbone = check_backbone(folder)
        inspection.parameters = backbone.num_parameters
        check_tokenizer(folder, backbone)
    elif TOKENIZER_CONFIG_FILE in manifest.files:
        inspection.parameters = read_published_backbone(api, inspection.source, manifest).num_parameters
    if (folder / TRAINING_FILE).is_file():
        backbone_card(read_json(folder / TRAINING_FILE), config=config)
    return True


def _local_manifest(folder: Path) -> Manifest:
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith((".git/", ".cache/")):
            files[name] = HubFile(name, path.stat().st_size, sha256_of(path))
    return Manifest("", False, files)


def _foreign_links(folder: Path) -> list[str]:
    """Return the links that lead elsewhere than into the Hub's own cache."""
    links = {path: path.readlink() for path in sorted(folder.rglob("*")) if path.is_symlink()}
    return [
        path.relative_to(folder).as_posix()
        for path, target in links.items()
        if target.is_absolute() or (".." in target.parts and "blobs" not in target.parts)
    ]
