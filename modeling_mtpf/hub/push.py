"""Publish backbones and adapters on the Hub, one atomic commit each."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd

from hub_cards import adapter_card, backbone_card

from ..model.adapter_files_mtpf import ADAPTER_FILES
from ..model.delta_mtpf import is_delta
from ..model.folders_mtpf import read_unchanged
from ..model.gate_mtpf import read_json
from ..model.schemas_mtpf import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    TASK_FILE,
    WEIGHTS_FILE,
)
from ..model.sources_mtpf import backbone_hint
from ..model.storage_methods_mtpf import HUB_FILES
from .checks import changed_code, check_adapter, check_backbone, check_bound, check_tokenizer
from .client import HubError, check_repo_id
from .commit import PushPlan, Release, log, publish
from .files import (
    BACKBONE_FILES,
    DELTA_FILES,
    TRAINING_FILE,
    code_files,
    read_folder,
    stored_parameters,
)
from .manifest import find_manifest


def push_backbone(
    folder: str | Path,
    repo_id: str,
    *,
    dry_run: bool = False,
    results: list[dict[str, Any]] | None = None,
    **options: Any,
) -> str | PushPlan:
    """Publish a backbone folder as one commit: weights, tokenizer, this package's loading code, and its card.

    Args:
        folder: As ``mtpf pretrain``, or ``save_pretrained`` of model and tokenizer, write it.
        repo_id: ``owner/name``; created if need be.
        dry_run: Check everything, change nothing, and return the plan.
        results: Evaluation records (``task``, ``metric``, ``value``, ...) for the card's table.
        **options: The other attributes of `Release`: ``private``, ``create_pr``, ``token``, ``license``, ...

    Returns:
        The sha of the commit, or of the head where nothing had changed; with ``dry_run`` a `PushPlan`.

    Raises:
        MtpfError: The folder is not a backbone, holds what may not be published, or the Hub refuses.
    """
    release, folder = Release(repo_id, **options), Path(folder)
    if hint := backbone_hint(folder):
        raise HubError(f"{folder} is not a backbone: it has no {CONFIG_FILE}.{hint}")
    content = read_folder(folder, BACKBONE_FILES)
    for name, path in code_files().items():
        content[name] = CommitOperationAdd(name, path.read_bytes())
    backbone = check_backbone(folder)
    check_tokenizer(folder, backbone)
    card = backbone_card(
        read_json(folder / TRAINING_FILE) if TRAINING_FILE in content else None,
        config=backbone.config,
        num_parameters=backbone.num_parameters,
        hashes={name: content[name].upload_info.sha256.hex() for name in (*HUB_FILES, WEIGHTS_FILE)},
        results=results,
        **release.card,
    )
    return publish(release, "backbone", content, card, dry_run)


def push_adapter(
    folder: str | Path,
    repo_id: str,
    *,
    backbone_id: str | None = None,
    backbone_revision: str | None = None,
    dry_run: bool = False,
    **options: Any,
) -> str | PushPlan:
    """Publish an adapter folder as one commit, bound to a published backbone by id, commit and weights' hash.

    The folder is not changed: the uploaded ``adapter_config.json``, which a standalone app has not, and
    ``task.json`` name the backbone.

    Args:
        folder: As ``model.save_adapter`` writes it.
        repo_id: ``owner/name``; created if need be.
        backbone_id: Hub id of the published backbone; by default the one recorded in the folder.
        backbone_revision: Its commit, tag or branch; by default the one recorded, else the head of ``main``.
        dry_run: Check everything, change nothing, and return the plan.
        **options: The other attributes of `Release`, as in `push_backbone`.

    Returns:
        What `push_backbone` returns.

    Raises:
        MtpfError: The folder is damaged, its backbone is not published or another one, a file holds a local
            path, or the Hub refuses.
    """
    release, folder = Release(repo_id, **options), Path(folder)
    files = DELTA_FILES if is_delta(folder) else ADAPTER_FILES
    content, (config, task) = read_unchanged(
        folder, lambda: (read_folder(folder, files), check_adapter(folder))
    )
    task["backbone"] = _bind(release, folder, task.get("backbone") or {}, backbone_id, backbone_revision)
    if config:
        config["base_model_name_or_path"] = task["backbone"]["id"]
        config["revision"] = task["backbone"]["revision"]
    for name, value in ((TASK_FILE, task), *([(ADAPTER_CONFIG_FILE, config)] if config else [])):
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        content[name] = CommitOperationAdd(name, (text + "\n").encode())
    num_bytes = sum(file.upload_info.size for name, file in content.items() if name.endswith(".safetensors"))
    num_parameters = stored_parameters(folder)
    card = adapter_card(task, config, num_parameters=num_parameters, num_bytes=num_bytes, **release.card)
    return publish(release, "adapter", content, card, dry_run)


def _bind(
    release: Release, folder: Path, recorded: dict[str, Any], backbone_id: str | None, revision: str | None
) -> dict[str, Any]:
    """Return the record of the published backbone, after checking that it is the adapter's and complete."""
    backbone_id, revision = backbone_id or recorded.get("id"), revision or recorded.get("revision")
    if not backbone_id:
        raise HubError(
            f"{folder} does not say which published backbone it belongs to; publish that first (mtpf push "
            "backbone FOLDER OWNER/NAME) and name it with --backbone OWNER/NAME."
        )
    check_repo_id(backbone_id)
    manifest = find_manifest(release.api, backbone_id, revision or "main")
    if manifest is None:
        raise HubError(
            f"The backbone {backbone_id} is not published, or your token may not read it; publish it first "
            f"with: mtpf push backbone FOLDER {backbone_id}"
        )
    weights = manifest.files.get(WEIGHTS_FILE)
    if weights is None:
        raise HubError(f"{backbone_id} at {manifest.sha[:8]} is not a backbone: it has no {WEIGHTS_FILE}.")
    expected = recorded.get("sha256")
    if not expected or weights.sha256 != expected:
        raise HubError(
            f"{folder} was trained on another backbone than {backbone_id} at {manifest.sha[:8]} (weights "
            f"sha256 {str(expected)[:12]}…, published {str(weights.sha256)[:12]}…); push the backbone it was "
            "trained on, or name its commit with --backbone_revision."
        )
    check_bound(release.api, backbone_id, manifest, folder)
    if changed := changed_code(manifest):
        log.warning(
            "%s at %s carries other code (%s) than this version of mtpf; push the backbone again to renew.",
            *(backbone_id, manifest.sha[:8], ", ".join(changed)),
        )
    return {**recorded, "id": backbone_id, "revision": manifest.sha}
