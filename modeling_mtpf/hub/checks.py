"""Whether a backbone or an adapter is complete and fits: the same questions before a push and in `inspect`.

Both are tried on a model without memory (on the meta device), made from the backbone's config: what cannot be
loaded there cannot be loaded anywhere.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from transformers import AutoModel, AutoTokenizer

from ..errors import first_line
from ..model.adapter_files_mtpf import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    HEAD_FILE,
    PEFT_PREFIX,
    TASK_FILE,
    install_adapter,
    read_adapter,
    read_head,
    read_task,
)
from ..model.adapters_mtpf import KINDS, NAME_PATTERN
from ..model.configuration_mtpf import AUTO_MAP, MtpfConfig, encoder_layout
from ..model.trunk_mtpf import Encoder
from .client import HubError, attempt, explained
from .download import download
from .files import (
    CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    WEIGHTS_FILE,
    check_code_references,
    code_files,
    has_vocabulary,
    objection,
    read_json,
    tensor_shapes,
)
from .manifest import Manifest

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Backbone:
    """A checked backbone: its ``config.json``, and its encoder without memory."""

    config: dict[str, Any]
    encoder: Encoder

    @property
    def num_parameters(self) -> int:
        """Number of values in its weights."""
        return sum(tensor.numel() for tensor in self.encoder.state_dict().values())


# --------------------------------------------------------------------------------------- backbones


def check_backbone(folder: Path, shapes: Shapes | None = None) -> Backbone:
    """Check that config and weights of a folder are those of a backbone, tensor by tensor.

    Args:
        folder: Holds ``config.json``.
        shapes: Shapes of the weights; by default those of the folder's ``model.safetensors``.

    Raises:
        HubError: Something is missing, damaged, or not a backbone of this project.
    """
    config = read_json(folder / CONFIG_FILE)
    check_code_references(CONFIG_FILE, config)
    if config.get("auto_map") != AUTO_MAP or not isinstance(config.get("mtpf"), dict):
        raise HubError(
            f"{folder} is not a backbone of mtpf (its {CONFIG_FILE} has no 'mtpf' block with the complete "
            "auto_map); write it with MtpfModel.from_pretrained(...).save_pretrained(folder)."
        )
    shapes = tensor_shapes(folder / WEIGHTS_FILE) if shapes is None else shapes
    encoder = _encoder_without_memory(folder, config, len(shapes))
    expected = {key: tuple(tensor.shape) for key, tensor in encoder.state_dict().items()}
    # Some stock checkpoints have no pooler, and nothing here uses it.
    missing = [key for key in expected if key not in shapes and not key.startswith("pooler.")]
    differing = missing or [key for key in shapes if shapes[key] != expected.get(key)]
    if differing:
        key = min(differing)
        raise HubError(
            f"{WEIGHTS_FILE} of {folder} does not fit its {CONFIG_FILE}: {key!r} is "
            f"{shapes.get(key, 'absent')} there and {expected.get(key, 'absent')} in the stock encoder. "
            "Write both with model.save_pretrained."
        )
    return Backbone(config, encoder)


def _encoder_without_memory(folder: Path, config: dict[str, Any], num_tensors: int) -> Encoder:
    try:
        encoder_layout(str(config.get("model_type")))
        parsed = MtpfConfig.from_pretrained(folder)
        if not isinstance(parsed.regime, str | None):
            raise ValueError(f"the regime is {parsed.regime!r}, not a name")
        if parsed.num_hidden_layers > num_tensors:  # else a huge number would be built for hours
            raise ValueError(f"it has {parsed.num_hidden_layers} layers, but only {num_tensors} tensors")
        with torch.device("meta"):
            return AutoModel.from_config(parsed.encoder_config)
    except Exception as error:  # there is no end to what transformers raises for an unexpected config
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise HubError(f"{folder / CONFIG_FILE} makes no encoder: {reason[-1].strip()}.") from error


def check_tokenizer(folder: Path, backbone: Backbone) -> None:
    """Check that the tokenizer of a folder loads without remote code, and fits the encoder.

    Raises:
        HubError: It does not.
    """
    names = [path.name for path in folder.iterdir()]
    if not has_vocabulary(names) or TOKENIZER_CONFIG_FILE not in names:
        raise HubError(
            f"{folder} has no tokenizer, or a part of one only; add it with "
            f"tokenizer.save_pretrained({str(folder)!r})."
        )
    check_code_references(TOKENIZER_CONFIG_FILE, read_json(folder / TOKENIZER_CONFIG_FILE))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
        highest = max(tokenizer.get_vocab().values())
    except Exception as error:  # as above
        reason = first_line(error)
        raise HubError(f"The tokenizer of {folder} cannot be loaded: {reason}.") from error
    rows = backbone.encoder.get_input_embeddings().weight.shape[0]
    if highest >= rows or not tokenizer.is_fast:
        reason = (
            "is slow" if highest < rows else f"has the token id {highest}, but the encoder only {rows} rows"
        )
        raise HubError(f"The tokenizer of {folder} {reason}; save the encoder's own fast tokenizer there.")


def listing_findings(manifest: Manifest) -> list[str]:
    """Say what a published backbone lacks or should not have, judging by the names of its files."""
    findings = [f"{path}: {reason}" for path in sorted(manifest.files) if (reason := objection(path))]
    wanted = (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_CONFIG_FILE, *code_files())
    findings += [f"it has no {name}" for name in wanted if name not in manifest.files]
    if not has_vocabulary(manifest.files):
        findings.append("it has no vocabulary of a tokenizer")
    return findings


def changed_code(manifest: Manifest) -> list[str]:
    """Return the files of remote code that are not those of this version of mtpf."""
    files = manifest.files
    return [name for name, path in code_files().items() if name in files and not files[name].is_at(path)]


def check_published_backbone(api: HfApi, repo_id: str, manifest: Manifest) -> Backbone:
    """Check a published backbone by its listing, its small files, and the header of its weights.

    Raises:
        HubError: It is incomplete, holds what does not belong there, or cannot be read.
    """
    findings = listing_findings(manifest)
    if findings:
        raise HubError(
            f"The backbone {repo_id} at {manifest.sha[:8]} is not as mtpf publishes it: {findings[0]}."
        )
    return read_published_backbone(api, repo_id, manifest)


def read_published_backbone(api: HfApi, repo_id: str, manifest: Manifest) -> Backbone:
    """Check config, tokenizer config and the header of the weights of a published backbone.

    Raises:
        HubError: One of them cannot be read, or does not fit.
    """
    folder = download(api, repo_id, manifest, (CONFIG_FILE, TOKENIZER_CONFIG_FILE))
    check_code_references(TOKENIZER_CONFIG_FILE, read_json(folder / TOKENIZER_CONFIG_FILE))
    with explained(repo_id):
        try:
            header = attempt(
                lambda: api.parse_safetensors_file_metadata(repo_id, WEIGHTS_FILE, revision=manifest.sha)
            )
        except (NotASafetensorsRepoError, SafetensorsParsingError, UnicodeDecodeError) as error:
            raise HubError(f"{WEIGHTS_FILE} of {repo_id} is damaged or not a safetensors file.") from error
    return check_backbone(folder, {key: tuple(info.shape) for key, info in header.tensors.items()})


# ---------------------------------------------------------------------------------------- adapters


def check_adapter(folder: Path, backbone: Backbone | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check that a folder is a complete adapter; return its PEFT config and its task.

    Args:
        folder: As ``model.save_adapter`` writes it.
        backbone: What it has to fit; without one only its own files are compared with each other.

    Raises:
        MtpfError: Something is missing or damaged, or does not fit.
    """
    config, task = read_json(folder / ADAPTER_CONFIG_FILE), read_json(folder / TASK_FILE)
    check_code_references(ADAPTER_CONFIG_FILE, config)
    if config.get("peft_type") != "LORA" or config.get("task_type") != "FEATURE_EXTRACTION":
        raise HubError(f"{folder} is not a LoRA of mtpf; write it with model.save_adapter(folder, name).")
    if task.get("kind") not in KINDS:
        raise HubError(f"{folder / TASK_FILE} has the kind {task.get('kind')!r}; known: {', '.join(KINDS)}.")
    if not NAME_PATTERN.fullmatch(str(task.get("name", ""))):
        raise HubError(
            f"{TASK_FILE} of {folder} has the name {task.get('name')!r}, which no adapter can have."
        )
    has_head = (folder / HEAD_FILE).is_file()
    if task["kind"] == KINDS[0] and has_head:
        raise HubError(f"{folder} is the LoRA of a family, but it holds a {HEAD_FILE}; remove that file.")
    _check_lora_shapes(folder, config)
    if backbone is not None:
        # With all checks of load_adapter but the hash of the weights, which are not there.
        install_adapter(backbone.encoder, read_adapter(folder, backbone.encoder, check_backbone=False))
    else:
        width = tensor_shapes(folder / HEAD_FILE).get("weight", (0,))[-1] if has_head else 0
        read_head(folder, read_task(folder), width)
    return config, task


def _check_lora_shapes(folder: Path, config: dict[str, Any]) -> None:
    """Compare the tensors with the modules and the rank that the config names."""
    shapes = tensor_shapes(folder / ADAPTER_WEIGHTS_FILE)
    targets, rank = config.get("target_modules"), config.get("r")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise HubError(f"{ADAPTER_CONFIG_FILE} of {folder} has no list of target_modules; save it again.")
    ranks = {
        f"{PEFT_PREFIX}{target}.lora_{part}.weight": side
        for target in targets
        for side, part in enumerate("AB")
    }
    differing = set(shapes) ^ set(ranks)
    differing |= {
        key for key in ranks.keys() - differing if len(shapes[key]) != 2 or shapes[key][ranks[key]] != rank
    }
    if differing:
        key = min(differing)
        raise HubError(
            f"{ADAPTER_WEIGHTS_FILE} and {ADAPTER_CONFIG_FILE} of {folder} disagree about {key!r} "
            f"(shape {shapes.get(key, 'absent')}, rank {rank!r})."
        )
