"""Whether a backbone or an adapter is complete and fits, for a push and for `inspect`.

Both are tried on a model without memory (on the meta device) that is made from the backbone's config.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from safetensors import safe_open
from transformers import AutoModel

from ..model.adapter_files_mtpf import install_adapter, read_adapter, read_tensors
from ..model.backbone_identity_mtpf import check_finite, check_settings
from ..model.configuration_mtpf import AUTO_MAP, MtpfConfig, encoder_layout
from ..model.delta_mtpf import delta_tensors, delta_tokenizer, is_delta
from ..model.gate_mtpf import read_json
from ..model.prefix_mtpf import PREFIX_FILE, check_prefix
from ..model.schemas_mtpf import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    CONFIG_FILE,
    HEAD_FILE,
    TASK_FILE,
    WEIGHTS_FILE,
    Shapes,
    check_checkpoint,
    check_head,
    read_adapter_config,
    read_config,
    read_lora_header,
    read_task,
)
from ..model.scope_mtpf import SCOPE_FILE, check_scope
from ..model.storage_methods_mtpf import HUB_FILES
from ..model.tokenizer_gate_mtpf import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILES,
    has_vocabulary,
    open_tokenizer,
)
from ..model.trunk_mtpf import Encoder
from .client import HubError, attempt, explained
from .download import download
from .files import check_code_references, code_files, objection
from .manifest import Manifest


@dataclass(frozen=True)
class Backbone:
    """A checked backbone: its ``config.json``, and its encoder without memory."""

    config: dict[str, Any]
    encoder: Encoder

    @property
    def num_parameters(self) -> int:
        """Number of values in its weights."""
        return sum(tensor.numel() for tensor in self.encoder.state_dict().values())


def check_backbone(folder: Path, shapes: Shapes | None = None) -> Backbone:
    """Check that config and weights of a folder are those of a backbone, tensor by tensor.

    Args:
        folder: Holds ``config.json``.
        shapes: Shapes of the weights; by default those of the folder's ``model.safetensors``.

    Raises:
        HubError: Something is missing, damaged, or not a backbone of this project.
    """
    local, shapes = shapes is None, check_checkpoint(folder, shapes)
    if local:
        with safe_open(folder / WEIGHTS_FILE, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118  it is no dict; one at a time, a backbone may be large
                check_finite(folder / WEIGHTS_FILE, {key: weights.get_tensor(key)}, HubError)
    config = read_config(folder)
    check_code_references(CONFIG_FILE, config)
    if config.get("auto_map") != AUTO_MAP or not isinstance(config.get("mtpf"), dict):
        raise HubError(
            f"{folder} is not a backbone of mtpf (its {CONFIG_FILE} has no 'mtpf' block with the complete "
            "auto_map); write it with MtpfModel.from_pretrained(...).save_pretrained(folder)."
        )
    encoder = _encoder_without_memory(folder, config)
    expected = {key: tuple(tensor.shape) for key, tensor in encoder.state_dict().items()}
    if "classifier.weight" in shapes:
        raise HubError(
            f"{folder} holds a task model with its classifier, not a backbone alone; publish it whole with "
            f"hf upload OWNER/NAME {folder}, or write its backbone to another folder with "
            f"MtpfModel.from_pretrained({str(folder)!r}).save_pretrained(...)."
        )
    for key in sorted(expected.keys() | shapes.keys()):
        if key.startswith("pooler.") and key not in shapes:
            continue  # some stock checkpoints have no pooler, and nothing here uses it
        if shapes.get(key) != expected.get(key):
            raise HubError(
                f"{WEIGHTS_FILE} of {folder} does not fit its {CONFIG_FILE}: {key!r} is "
                f"{shapes.get(key, 'absent')} there and {expected.get(key, 'absent')} in the stock encoder. "
                "Write both with model.save_pretrained."
            )
    return Backbone(config, encoder)


def _encoder_without_memory(folder: Path, config: dict[str, Any]) -> Encoder:
    try:
        encoder_layout(str(config.get("model_type")))
        parsed = MtpfConfig.from_pretrained(folder)
        with torch.device("meta"):
            return AutoModel.from_config(parsed.encoder_config)
    except Exception as error:  # there is no end to what transformers raises for an unexpected config
        reason = str(error).strip().rstrip(".").splitlines() or [type(error).__name__]
        raise HubError(f"{folder / CONFIG_FILE} makes no encoder: {reason[-1].strip()}.") from error


def check_tokenizer(folder: Path, backbone: Backbone) -> None:
    """Raise `MtpfError` unless the tokenizer of a folder loads without remote code and fits the encoder."""
    check_code_references(TOKENIZER_CONFIG_FILE, read_json(folder / TOKENIZER_CONFIG_FILE))
    open_tokenizer(str(folder), rows=backbone.encoder.get_input_embeddings().weight.shape[0])


def objections(manifest: Manifest) -> list[str]:
    """Say which files do not belong in a repo of this project, judging by their names."""
    return [f"{path}: {reason}" for path in manifest.files if (reason := objection(path))]


def missing_files(manifest: Manifest) -> list[str]:
    """Say what a published backbone lacks, judging by the names of its files."""
    wanted = (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_CONFIG_FILE, *HUB_FILES)
    missing = [f"it has no {name}" for name in wanted if name not in manifest.files]
    if not manifest.files.keys() & set(HUB_FILES):  # saved again by a library that loaded it without trust
        missing = [reason for reason in missing if not reason.endswith("_mtpf.py")]
        missing.append(
            "its code is missing, so that trust_remote_code=True fails; add it with "
            "MtpfModel.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return missing + ([] if has_vocabulary(manifest.files) else ["it has no vocabulary of a tokenizer"])


def changed_code(manifest: Manifest) -> list[str]:
    """Return the files of remote code that are not those of this version of mtpf."""
    files = manifest.files
    return [name for name, path in code_files().items() if name in files and not files[name].is_at(path)]


def check_published_backbone(api: HfApi, repo_id: str, manifest: Manifest) -> Backbone:
    """Check that a published backbone is complete, holds nothing else, and can be read."""
    if findings := [*objections(manifest), *missing_files(manifest)]:
        source = f"The backbone {repo_id} at {manifest.sha[:8]}"
        raise HubError(f"{source} is not as mtpf publishes it: {findings[0]}.")
    return read_published_backbone(api, repo_id, manifest)


def read_published_backbone(api: HfApi, repo_id: str, manifest: Manifest) -> Backbone:
    """Check config, tokenizer config and the header of the weights of a published backbone.

    Raises:
        HubError: One of them cannot be read, or does not fit.
    """
    folder = download(api, repo_id, manifest, (CONFIG_FILE, TOKENIZER_CONFIG_FILE))
    check_code_references(TOKENIZER_CONFIG_FILE, read_json(folder / TOKENIZER_CONFIG_FILE))
    read_header = partial(api.parse_safetensors_file_metadata, repo_id, WEIGHTS_FILE, revision=manifest.sha)
    try:
        with explained(repo_id):
            header = attempt(read_header)
    except (NotASafetensorsRepoError, SafetensorsParsingError, UnicodeDecodeError) as error:
        raise HubError(f"{WEIGHTS_FILE} of {repo_id} is damaged or not a safetensors file.") from error
    return check_backbone(folder, {key: tuple(info.shape) for key, info in header.tensors.items()})


def check_bound(api: HfApi, repo_id: str, manifest: Manifest, folder: Path) -> None:
    """Check an adapter with the published backbone that it belongs to, and a standalone app's tokenizer."""
    backbone = check_published_backbone(api, repo_id, manifest)
    check_adapter(folder, backbone)
    if is_delta(folder):
        names = [name for name in (CONFIG_FILE, *TOKENIZER_FILES) if name in manifest.files]
        source = download(api, repo_id, manifest, names)
        rows = backbone.encoder.get_input_embeddings().weight.shape[0]
        delta_tokenizer(folder, read_task(folder), open_tokenizer(str(source), rows=rows))


def check_adapter(folder: Path, backbone: Backbone | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check that a folder is a complete adapter; return its PEFT config and its task.

    Args:
        folder: As ``model.save_adapter`` writes it, or that of a standalone app, which has no PEFT config.
        backbone: What it has to fit; without one only its own files are compared with each other.

    Raises:
        MtpfError: Something is missing or damaged, or does not fit.
    """
    task = read_task(folder)
    if is_delta(folder):
        if backbone is not None:
            check_settings(folder, backbone.encoder, task.get("backbone") or {})
        delta_tensors(folder, task, backbone and backbone.encoder)
        read_tensors(folder / HEAD_FILE)
        return {}, task
    config = read_adapter_config(folder)
    check_code_references(ADAPTER_CONFIG_FILE, config)
    if config.get("task_type") != "FEATURE_EXTRACTION":
        raise HubError(f"{folder} is not a LoRA of mtpf; write it with model.save_adapter(folder, name).")
    for key in ("kind", "name"):
        if task.get(key) is None:
            raise HubError(f"{folder} has no {TASK_FILE} with a {key}; write it with model.save_adapter.")
    if backbone is not None:
        # With all checks of load_adapter but the hash of the weights, which are not there.
        check_settings(folder, backbone.encoder, task.get("backbone") or {})
        install_adapter(backbone.encoder, read_adapter(folder, backbone.encoder, check_backbone=False))
    else:
        read_lora_header(folder, config)
        more = {
            HEAD_FILE: check_head(folder, task),
            SCOPE_FILE: check_scope(folder, task),
            PREFIX_FILE: check_prefix(folder, config, task),
        }
        for name in (ADAPTER_WEIGHTS_FILE, *(name for name, exists in more.items() if exists)):
            read_tensors(folder / name)
    return config, task
