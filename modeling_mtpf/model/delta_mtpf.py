"""Standalone apps: a whole encoder of their own, stored as what of it differs from a backbone.

The folder has ``delta.safetensors``, ``head.safetensors`` and ``task.json``. The first holds each changed
tensor under its stock name, whole, or as its changed rows with a mask ``<name>.rows``, a bit a row. New rows
of the embedding belong to the new tokens that ``task.json`` lists: the tokenizer is the backbone's with
these, and its hash is recorded. In memory such an app shares every unchanged tensor with the backbone.
"""

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn
from transformers import AddedToken

from .adapter_files_mtpf import json_bytes, read_tensors
from .adapters_mtpf import (
    STANDALONE,
    AdapterHead,
    LoraSettings,
    adapter_names,
    check_adapter_name,
    inject_lora,
    lora_config,
    remove_lora,
)
from .backbone_identity_mtpf import (
    backbone_sha256,
    backbone_state_dict,
    check_identity,
    check_settings,
    settings_of,
)
from .configuration_mtpf import max_tokens
from .errors_mtpf import AdapterError
from .folders_mtpf import replaced_files
from .gate_mtpf import Tensor, read_header
from .predict_mtpf import load_tokenizer, text_tokenizer
from .schemas_mtpf import (
    DELTA_FILE,
    HEAD_FILE,
    TASK_FILE,
    TASK_FORMAT_VERSION,
    check_head,
    check_task,
    read_task,
)
from .trunk_mtpf import Encoder, shallow_view, uncompiled
from .views_mtpf import CHANGES

ROWS = ".rows"
"""Ending of the key of a mask of changed rows."""

PATTERNS_FILE = "patterns.md"
"""What was mined to choose the new tokens, for a reader."""

_CACHES = ("_mtpf_tokenizer", "_mtpf_text_tokenizer", "_written_adapters", "_disabled_adapter")


def own_model(model: Any, share: bool = True) -> Any:
    """Return a model with the same encoder, without adapters; it shares the parameters, or copies them."""
    with CHANGES:  # another thread may be adding an adapter
        encoder = uncompiled(model.backbone)
        memo: dict[int, Any] = {id(p): p for key, p in encoder.named_parameters() if share or ".lora_" in key}
        if apps := encoder.__dict__.get(STANDALONE):
            memo[id(apps)] = {}  # they are not the copy's
        own: Any = shallow_view(model)
        backbone, config = copy.deepcopy((encoder, model.config), memo)
        for name in adapter_names(backbone):
            remove_lora(backbone, name)
        own.__dict__["_modules"] = {"backbone": backbone, "heads": nn.ModuleDict()}
        own.__dict__["config"] = config
        for key in _CACHES:
            own.__dict__.pop(key, None)
        return own


def add_tokens(tokenizer: Any, tokens: list[str]) -> Any:
    """Return a copy of a fast tokenizer that reads whole words, or sequences of them, as one token each.

    They are compared with the normalised text, so that case and accents count as they do for other tokens.

    Raises:
        AdapterError: It has one of them already.
    """
    tokenizer = copy.deepcopy(tokenizer)
    added = [AddedToken(token, single_word=True, normalized=True) for token in tokens]
    if tokenizer.add_tokens(added) != len(tokens):
        raise AdapterError(
            "The tokenizer has one of the new tokens already; use the tokenizer of the backbone."
        )
    return tokenizer


def set_tensor(encoder: Encoder, key: str, value: torch.Tensor) -> None:
    """Replace a parameter or buffer of an encoder by another tensor, of any number of rows."""
    path, _, name = key.rpartition(".")
    module = encoder.get_submodule(path)
    if name in module._buffers:
        module._buffers[name] = value
    else:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    if isinstance(module, nn.Embedding):
        module.num_embeddings = len(value)


def embedding_key(encoder: Encoder) -> str:
    """Return the stock name of the token embedding's matrix."""
    weight = encoder.get_input_embeddings().weight
    return next(key for key, value in encoder.named_parameters() if value is weight)


def finish(own: Any, name: str, head: AdapterHead, tokenizer: Any = None) -> None:
    """Make the app of an encoder of its own one that `predict` knows: a head, and a LoRA without effect."""
    own.config.vocab_size = own.backbone.get_input_embeddings().weight.shape[0]
    inject_lora(own.backbone, name, lora_config(own.backbone, LoraSettings(r=1, layers=1)), trainable=False)
    own.heads[name] = head.eval().requires_grad_(False)
    if tokenizer is not None:
        own.__dict__["_mtpf_tokenizer"] = tokenizer


# ------------------------------------------------------------------------------------------------- writing


def write_delta(
    folder: str | os.PathLike,
    base: Any,
    own: Any,
    name: str,
    tokens: list[str],
    *,
    dtype: torch.dtype = torch.float16,
    task: dict[str, Any] | None = None,
    backbone_id: str | None = None,
    backbone_revision: str | None = None,
) -> Path:
    """Write a standalone app as what differs from its backbone.

    Args:
        folder: Where to write; other files there stay.
        base: Model with the backbone.
        own: Model with the app's encoder and its head under ``name``.
        name: Of the app.
        tokens: New ones, in the order of their rows.
        dtype: Of the stored numbers; those in memory should have been rounded to it.
        task: More for ``task.json``.
        backbone_id: Hub id of the backbone.
        backbone_revision: Commit of that repo.
    """
    head = own.heads[name]
    before, tensors = backbone_state_dict(base.backbone), {}
    for key, value in backbone_state_dict(own.backbone).items():
        value, old = value.cpu(), before[key].cpu()
        changed = np.ones(len(value) if value.dim() else 1, dtype=bool)
        if value.dim():
            differs = value[: len(old)].ne(old).flatten(1).any(1) if value.dim() > 1 else value.ne(old)
            changed[: len(old)] = differs.numpy()
        if not changed.all():
            tensors[key + ROWS] = torch.from_numpy(np.packbits(changed))
        if changed.any():
            tensors[key] = value[torch.from_numpy(changed)].to(dtype).contiguous()
        else:
            del tensors[key + ROWS]
    record = {
        **(task or {}),
        "format_version": TASK_FORMAT_VERSION,
        "name": name,
        "kind": head.kind,
        "labels": head.labels,
        "max_length": head.max_length,
        **({"problem_type": head.problem_type} if head.problem_type else {}),
        "delta": {"rows": own.backbone.get_input_embeddings().weight.shape[0], "tokens": tokens},
        "backbone": {
            "id": backbone_id,
            "revision": backbone_revision,
            "sha256": backbone_sha256(base.backbone),
            "dtype": str(base.dtype).removeprefix("torch."),
            "config": settings_of(base.backbone),
            "tokenizer": head.tokenizer_sha256,
        },
    }
    check_task(json.loads(json_bytes(record)))
    weights = {key: value.detach().cpu().to(dtype).contiguous() for key, value in head.state_dict().items()}
    labels = {"labels": json.dumps(head.labels, ensure_ascii=False)}
    with replaced_files(folder, (DELTA_FILE, HEAD_FILE, TASK_FILE), last=TASK_FILE) as new:
        (new / DELTA_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
        (new / HEAD_FILE).write_bytes(save(weights, metadata=labels))
        (new / TASK_FILE).write_bytes(json_bytes(record))
    return Path(folder)


# ------------------------------------------------------------------------------------------------- reading


def is_delta(folder: str | os.PathLike) -> bool:
    """Say whether a local folder is a standalone app."""
    return (Path(folder) / DELTA_FILE).is_file()


def read_delta(
    folder: Path, model: Any, name: str | None = None, check_backbone: bool = True, source: Path | None = None
) -> Any:
    """Return the model of a standalone app, which shares what is unchanged with ``model``. Changes nothing.

    Args:
        folder: As `write_delta` writes it.
        model: With its backbone.
        name: Of the app; by default the recorded one.
        check_backbone: Whether to compare the backbone and the tokenizer with the recorded ones.
        source: File of the backbone's weights, if known.

    Raises:
        AdapterError: A file is missing or damaged, or the app belongs to another backbone or tokenizer.
    """
    encoder, task = uncompiled(model.backbone), read_task(folder)
    name = name or task.get("name") or "app"
    check_adapter_name(name)
    recorded = task.get("backbone") or {}
    if check_backbone:
        check_identity(folder, encoder, recorded, source)
        check_settings(folder, encoder, recorded)
    before = backbone_state_dict(encoder)
    stored, masks = delta_tensors(folder, task, encoder)
    tokenizer = None
    if task["delta"]["tokens"]:
        cached = model.__dict__.get("_mtpf_text_tokenizer")
        plain = cached[0] if cached else load_tokenizer(model)
        tokenizer = delta_tokenizer(folder, task, plain, check_backbone)
    head = AdapterHead(
        task["kind"],
        task["labels"],
        model.config.hidden_size,
        task.get("max_length", 128),
        task.get("problem_type"),
    )
    head.load_state_dict(read_tensors(folder / HEAD_FILE))
    head.tokenizer_sha256 = recorded.get("tokenizer") if check_backbone else None
    own = own_model(model)
    for key, mask in masks.items():
        old = before[key]
        value = old.new_zeros(len(mask), *old.shape[1:])
        value[: len(old)] = old
        value[mask.to(old.device)] = stored[key].to(old)
        set_tensor(own.backbone, key, value)
    finish(own, name, head.to(model.device), tokenizer)
    return own.eval()


def delta_parameters(folder: Path) -> int:
    """Return the number of values in the changed rows of a standalone app."""
    tensors = read_header(folder / DELTA_FILE, AdapterError, masks=ROWS).tensors
    return sum(math.prod(tensor.shape) for key, tensor in tensors.items() if not key.endswith(ROWS))


def delta_tensors(
    folder: Path, task: dict[str, Any], encoder: Encoder = None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Read the tensors of a standalone app, after all checks of it but those of hashes.

    Args:
        folder: Of the app.
        task: Its ``task.json``.
        encoder: Of its backbone, which may be without memory; without one the files are only compared with
            each other.

    Returns:
        What is stored, by name, and for each tensor which of its rows are, bool ``(rows,)``.

    Raises:
        AdapterError: A file is missing or damaged, or does not fit.
    """
    width = None if encoder is None else encoder.config.hidden_size
    if not task.get("delta") or not check_head(folder, task, width):
        raise AdapterError(f"{folder} is damaged: its {TASK_FILE} does not describe a standalone app.")
    if encoder is not None and task.get("max_length", 1) > (most := max_tokens(encoder.config)):
        raise AdapterError(
            f"{folder} is damaged: 'max_length' in {TASK_FILE} is {task['max_length']:,}, but the backbone "
            f"reads {most:,} tokens."
        )
    path = folder / DELTA_FILE
    header = read_header(path, AdapterError, masks=ROWS).tensors
    for key, (dtype, shape) in header.items():
        if key.endswith(ROWS) and key.removesuffix(ROWS) not in header:
            raise AdapterError(f"{folder} is damaged: {DELTA_FILE} has no tensor for its mask {key[:120]!r}.")
        if key.endswith(ROWS) and (dtype != "U8" or len(shape) != 1) or not shape:
            raise AdapterError(f"{folder} is damaged: {key[:120]!r} is not a mask of rows, or has none.")
    before = {} if encoder is None else backbone_state_dict(encoder)
    shapes = {key: tuple(value.shape) for key, value in before.items()}
    embedding = "" if encoder is None else embedding_key(encoder)
    if encoder is not None:
        _check_shapes(folder, header, shapes, embedding, task["delta"])
    stored = read_tensors(path)
    masks = {
        key: _mask(path, key, stored, shapes[key][0] if shapes else None)
        for key in header
        if not key.endswith(ROWS)
    }
    rows, tokens = task["delta"]["rows"], task["delta"]["tokens"]
    if encoder is None and tokens and not any(_ends_at(mask, rows) for mask in masks.values()):
        raise AdapterError(f"{path} is damaged: it has no tensor of {rows:,} rows for its new tokens.")
    new = len(masks.get(embedding, ())) - len(before.get(embedding, ()))
    if new > 0 and not masks[embedding][-new:].all():
        raise AdapterError(f"{path} is damaged: rows of new tokens are missing.")
    return stored, masks


def _check_shapes(
    folder: Path,
    header: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    embedding: str,
    delta: dict[str, Any],
) -> None:
    """Compare a header with the backbone's shapes; set that of an embedding that has grown."""
    before, rows = shapes[embedding], delta["rows"]
    if not before[0] <= rows <= before[0] + len(delta["tokens"]):
        raise AdapterError(
            f"{folder} was trained on another backbone: its embedding has {rows:,} rows with "
            f"{len(delta['tokens'])} new tokens, this one {before[0]:,} without."
        )
    shapes[embedding] = (rows, *before[1:])
    if rows > before[0] and embedding not in header:
        raise AdapterError(f"{folder} is damaged: {DELTA_FILE} has no {embedding!r} for its new tokens.")
    for key, (_, shape) in header.items():
        name = key.removesuffix(ROWS)
        if name not in shapes or not shapes[name]:
            raise AdapterError(f"{folder} does not fit: the backbone has no tensor for {key[:120]!r}.")
        expected = shapes[name]
        if key.endswith(ROWS):
            if shape != (-(-expected[0] // 8),):
                raise AdapterError(
                    f"{folder} was trained on another backbone: {key!r} is not a mask of the {expected[0]:,} "
                    "rows that its tensor has here."
                )
        elif shape[1:] != expected[1:] or not (
            key + ROWS in header and shape[0] <= expected[0] or shape == expected
        ):
            raise AdapterError(
                f"{folder} was trained on another backbone: {key!r} has the shape {list(shape)}, here it is "
                f"{list(expected)}."
            )


def _mask(path: Path, key: str, stored: dict[str, torch.Tensor], rows: int | None) -> torch.Tensor:
    """Return which rows of a tensor are stored, bool ``(rows,)``; without ``rows`` up to seven too many."""
    if key + ROWS not in stored:
        return torch.ones(len(stored[key]), dtype=torch.bool)
    bits = np.unpackbits(stored[key + ROWS].numpy())
    beyond = rows is not None and bits[rows:].any()
    if beyond or bits.sum() != len(stored[key]):
        raise AdapterError(
            f"{path} is damaged: {key + ROWS!r} names {bits.sum():,} rows"
            + (f" of {rows:,} and beyond" if beyond else "")
            + f", but {len(stored[key]):,} are stored."
        )
    return torch.from_numpy(bits[:rows].astype(bool))


def _ends_at(mask: torch.Tensor, rows: int) -> bool:
    return rows <= len(mask) < rows + 8 and bool(mask[rows - 1]) and not mask[rows:].any()


def delta_tokenizer(folder: Path, task: dict[str, Any], tokenizer: Any, check: bool = True) -> Any:
    """Return the tokenizer of a standalone app: its backbone's with the app's tokens.

    Raises:
        AdapterError: The backbone's is another one than the app was trained with.
    """
    delta, recorded = task["delta"], (task.get("backbone") or {}).get("tokenizer") if check else None
    if delta["tokens"]:
        tokenizer = add_tokens(tokenizer, delta["tokens"])
    sha256, highest = text_tokenizer(nn.Module(), tokenizer).sha256, max(tokenizer.get_vocab().values())
    if highest >= delta["rows"] or (recorded or sha256) != sha256:
        known = f" (sha256 {recorded[:12]}…, here {sha256[:12]}…)" if recorded else ""
        raise AdapterError(
            f"The app {folder} was trained with another tokenizer{known}; use the one of its backbone."
        )
    return tokenizer
