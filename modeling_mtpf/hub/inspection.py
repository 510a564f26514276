"""Look at a folder or a repo without running, unpacking or unpickling anything in it."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi

from hub_cards import adapter_card, backbone_card, how_made

from ..errors import MtpfError
from ..model.delta_mtpf import is_delta
from ..model.gate_mtpf import printable, read_json
from ..model.hub_cache_mtpf import sha256_of
from ..model.prefix_mtpf import PREFIX_FILE
from ..model.schemas_mtpf import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    CONFIG_FILE,
    DELTA_FILE,
    HEAD_FILE,
    TASK_FILE,
    WEIGHTS_FILE,
    read_config,
    read_task,
    task_heads,
)
from ..model.scope_mtpf import SCOPE_FILE
from ..model.sources_mtpf import backbone_hint, find_on_hub
from ..model.tokenizer_gate_mtpf import TOKENIZER_CONFIG_FILE
from .checks import (
    changed_code,
    check_adapter,
    check_backbone,
    check_bound,
    check_tokenizer,
    missing_files,
    objections,
    read_published_backbone,
)
from .client import HubError, check_repo_id
from .download import download
from .files import MARKERS, TRAINING_FILE, stored_parameters
from .manifest import HubFile, Manifest, read_manifest

SMALL_FILES = (
    *(CONFIG_FILE, TRAINING_FILE, TASK_FILE, ADAPTER_CONFIG_FILE),
    *(HEAD_FILE, SCOPE_FILE, PREFIX_FILE, ADAPTER_WEIGHTS_FILE, DELTA_FILE),
)
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
        standalone: Whether it is an encoder of its own, stored as what differs from its backbone.
        parts: Of a bundle: the labels of each part.
        composition: How the LoRA of a bundle was made.
        prefix: Slots of an adapter with a key/value prefix.
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
    standalone: bool = False
    parts: dict[str, list[str]] = field(default_factory=dict)
    composition: dict[str, Any] = field(default_factory=dict)
    prefix: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)
    regime: str | None = None
    files: list[HubFile] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = {
            **{name: getattr(self, name) for name in ("source", "revision", "kind", "name", "regime")},
            "standalone": self.standalone and "an encoder of its own: what differs from its backbone",
            "size": f"{self.size:,} bytes",
            "parameters": self.parameters and f"{self.parameters:,}",
            "prefix": self.prefix and f"{self.prefix} slots",
            "labels": ", ".join(self.labels),
            **{f"part {name}": ", ".join(labels) for name, labels in self.parts.items()},
            "made by": how_made(self.composition),
            "metrics": ", ".join(f"{key} {value}" for key, value in self.metrics.items()),
            "backbone": " ".join(f"{key}={value}" for key, value in self.backbone.items() if value),
        }
        lines = [f"{name:<10}  {value}" for name, value in rows.items() if value]
        width = max((len(file.path) for file in self.files), default=0)
        for file in self.files:
            digest = f"sha256:{file.sha256}" if file.sha256 else f"git:{file.git_sha1}"
            lines.append(f"{'file':<10}  {file.path:<{width}}  {file.size:>12,}  {digest}")
        lines += [f"{'FINDING':<10}  {finding}" for finding in self.findings]
        # A file's name or a label must not forge a line, or be obeyed by the terminal.
        return "\n".join(printable(line).replace("\n", "\\n").replace("\r", "\\r") for line in lines)


def inspect(
    folder_or_repo: str | Path, revision: str | None = None, *, token: str | None = None
) -> Inspection:
    """Describe a folder or repo: kind, size, labels, metrics, hashes, and what does not belong there.

    Pickles and foreign code are named, never opened. Of a repo only small files are fetched.

    Raises:
        MtpfError: There is no such folder, repo or revision.
    """
    source, folder = str(folder_or_repo), Path(folder_or_repo)
    if folder.is_dir():
        inspection = Inspection(source, findings=_foreign_links(folder))
        _describe(inspection, folder, _local_manifest(folder), None)
        return inspection
    commit = find_on_hub(source, revision, token=token, error=HubError)
    api = HfApi(token=token)
    manifest = read_manifest(api, source, commit.resolved)
    inspection = Inspection(source, manifest.sha)
    files = manifest.files
    names = [name for name in SMALL_FILES if name in files and files[name].size <= MAX_FETCH_BYTES]
    with TemporaryDirectory() as empty:
        folder = Path(empty)
        try:
            folder = download(api, source, manifest, names) if names else folder
        except HubError as error:
            inspection.findings.append(str(error))
        _describe(inspection, folder, manifest, api)
    return inspection


def _describe(inspection: Inspection, folder: Path, manifest: Manifest, api: HfApi | None) -> None:
    """Fill in what the files tell; ``api`` for a repo, of which the folder has the small files only."""
    files, findings = manifest.files, inspection.findings
    inspection.files = list(files.values())
    inspection.size = sum(file.size for file in inspection.files)
    try:
        if ADAPTER_CONFIG_FILE in files or TASK_FILE in files:
            _describe_adapter(inspection, folder, api)
        elif CONFIG_FILE in files or MARKERS["backbone"] in files:
            _describe_backbone(inspection, folder, manifest, api)
        else:
            findings.append(f"it is neither a backbone nor an adapter of mtpf{backbone_hint(folder)}")
    except MtpfError as error:
        name = rf"(?<![\w./-]){re.escape(str(folder))}(?![\w-])(/?)"
        findings.append(re.sub(name, lambda match: "" if match[1] else "it", str(error)))
    missing = missing_files(manifest) if inspection.kind == "backbone" else []
    code = [
        f"{path}: remote code that differs from this version of mtpf; read it"
        for path in changed_code(manifest)
    ]
    findings += sorted([*objections(manifest), *missing, *code])


def _describe_adapter(inspection: Inspection, folder: Path, api: HfApi | None) -> None:
    task = read_task(folder)
    inspection.kind, inspection.name = task.get("kind") or "unknown", task.get("name")
    inspection.labels, inspection.metrics = task.get("labels") or [], task.get("metrics") or {}
    inspection.parts = {part: head["labels"] for part, head in task_heads(task).items() if part}
    inspection.prefix = (task.get("prefix") or {}).get("length")
    inspection.backbone = task.get("backbone") or {}
    inspection.standalone = is_delta(folder)
    inspection.parameters = stored_parameters(folder)
    config, _ = check_adapter(folder)
    repo_id, revision = inspection.backbone.get("id"), inspection.backbone.get("revision")
    if config and (config.get("base_model_name_or_path"), config.get("revision")) != (repo_id, revision):
        raise HubError(f"{TASK_FILE} and {ADAPTER_CONFIG_FILE} name different backbones.")
    adapter_card(task, config)  # raises what a push would
    inspection.composition = task.get("composition") or {}
    if api is None:
        return
    if not isinstance(repo_id, str) or not isinstance(revision, str):
        raise HubError(f"{TASK_FILE} names no published backbone with its commit.")
    check_repo_id(repo_id)
    manifest = read_manifest(api, repo_id, revision)
    if manifest.files.get(WEIGHTS_FILE, HubFile("", 0)).sha256 != inspection.backbone.get("sha256"):
        raise HubError(f"its backbone {repo_id} has other weights at {revision[:8]} than it was trained on.")
    check_bound(api, repo_id, manifest, folder)


def _describe_backbone(inspection: Inspection, folder: Path, manifest: Manifest, api: HfApi | None) -> None:
    inspection.kind = "backbone"
    if CONFIG_FILE not in manifest.files:
        return  # the listing's findings say so
    config = read_config(folder)
    block = config.get("mtpf")
    if block is None:
        inspection.kind = "unknown"
        if config.get("auto_map"):
            inspection.findings.append(f"{CONFIG_FILE} names code to import that is not mtpf's")
        inspection.findings.append("it is a stock encoder, not a backbone of mtpf")
        return
    inspection.regime = block.get("regime")
    if WEIGHTS_FILE not in manifest.files:
        return
    if api is None:
        backbone = check_backbone(folder)
        inspection.parameters = backbone.num_parameters
        check_tokenizer(folder, backbone)
    elif TOKENIZER_CONFIG_FILE in manifest.files:
        inspection.parameters = read_published_backbone(api, inspection.source, manifest).num_parameters
    if (folder / TRAINING_FILE).is_file():
        backbone_card(read_json(folder / TRAINING_FILE), config=config)


def _local_manifest(folder: Path) -> Manifest:
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith((".git/", ".cache/")):
            files[name] = HubFile(name, path.stat().st_size, sha256_of(path))
    return Manifest("", False, files)


def _foreign_links(folder: Path) -> list[str]:
    """Name the links that lead elsewhere than into the Hub's own cache."""
    findings = []
    for path in sorted(folder.rglob("*")):
        target = path.readlink() if path.is_symlink() else Path()
        if target.is_absolute() or (".." in target.parts and "blobs" not in target.parts):
            name = path.relative_to(folder).as_posix()
            findings.append(f"{name}: it is a link that leads out of the folder")
    return findings
