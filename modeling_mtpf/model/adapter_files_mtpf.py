"""The adapter folder: what it holds, how it is written, and what is checked before it is loaded.

A folder is a plain PEFT LoRA adapter under the stock encoder's key names, so that PEFT, transformers and
sentence-transformers load it too. An app's head is next to it in a file of our own: PEFT's
``modules_to_save`` cannot hold heads of different sizes in one model.
"""

import copy
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.numpy import save as save_arrays
from safetensors.torch import load_file, save

from .adapters_mtpf import (
    AdapterHead,
    active_adapter,
    check_loaded,
    import_peft,
    inject_lora,
    lora_parameters,
    named_heads,
    part_name,
    remove_lora,
    set_active_adapter,
)
from .backbone_identity_mtpf import (
    backbone_sha256,
    backbone_state_dict,
    check_finite,
    check_identity,
    check_settings,
    settings_of,
)
from .configuration_mtpf import encoder_layout, max_tokens
from .errors_mtpf import AdapterError, first_line
from .folders_mtpf import replaced_files
from .gate_mtpf import Tensor, parse_json
from .hub_cache_mtpf import drop_from_cache, has_announced_hash
from .prefix_mtpf import (
    PREFIX_FILE,
    PREFIXES,
    Prefix,
    as_prefixes,
    check_prefix,
    prefix_tensors,
    prefixes_of,
)
from .schemas_mtpf import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    BUNDLE,
    DELTA_FILE,
    HEAD_FILE,
    KINDS,
    PEFT_PREFIX,
    PREFIX_TYPE,
    TASK_ENTRIES,
    TASK_FILE,
    check_head,
    check_task,
    format_version,
    head_key,
    is_part,
    read_adapter_config,
    read_lora_header,
    read_task,
    stock_key,
    task_heads,
)
from .scope_mtpf import SCOPE_FILE, Scope, check_scope
from .sources_mtpf import find_on_hub
from .trunk_mtpf import Encoder, lora_modules

ADAPTER_FILES = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, HEAD_FILE, PREFIX_FILE, SCOPE_FILE, TASK_FILE)
MAX_ADAPTER_BYTES = 1_000_000_000
"""The most that `find_adapter` fetches; a LoRA of rank 32 on two layers has about a megabyte."""


@dataclass
class AdapterFiles:
    """An adapter folder, read and checked against a backbone but not yet part of the model.

    ``heads`` are by full name, see `named_heads`.
    """

    name: str
    config: Any
    lora: dict[str, torch.Tensor]
    task: dict[str, Any] = field(default_factory=dict)
    heads: dict[str, AdapterHead] = field(default_factory=dict)


# ----------------------------------------------------------------------------------------- saving, loading


def lora_state_dict(encoder: Encoder, name: str) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors under PEFT's names, ``base_model.model.<stock path>.lora_A.weight``."""
    return {
        PEFT_PREFIX + key: weight.detach().cpu().contiguous()
        for key, weight in _lora_weights(encoder, name).items()
    }


def _lora_weights(encoder: Encoder, name: str) -> dict[str, torch.Tensor]:
    """Return the adapter's matrices under their paths in the encoder, without the adapter's name."""
    return {
        f"{path}.{part}.weight": getattr(module, part)[name].weight
        for path, module in lora_modules(encoder)
        for part in ("lora_A", "lora_B")
        if name in getattr(module, part)
    }


def write_adapter(
    folder: str | os.PathLike,
    encoder: Encoder,
    name: str,
    *,
    heads: Mapping[str, AdapterHead],
    backbone_id: str | None = None,
    backbone_revision: str | None = None,
    dtype: torch.dtype | None = None,
    task: dict[str, Any] | None = None,
    tokenizer_sha256: str | None = None,
) -> Path:
    """Write the adapter folder: PEFT files, the heads and ``task.json``; other files of the folder stay.

    Of a bundle ``task`` may have ``parts``, with more of each part under its ``name``. A reader or a stopped
    process finds the old adapter of the folder or the new one, see `replaced_files`. Numbers are stored
    as ``dtype``, by default as they are in memory.

    Raises:
        AdapterError: The adapter is not loaded or is damaged.
        MtpfError: The folder cannot be written; it is as it was.
    """
    check_loaded(encoder, name)
    tensors = lora_state_dict(encoder, name)
    paths = [path for path, module in lora_modules(encoder) if name in module.lora_A]
    if len(tensors) != 2 * len(paths):  # pitfall: PEFT once wrote truncated adapters without an error
        raise AdapterError(
            f"Adapter {name!r} has {len(tensors)} tensors for {len(paths)} modules; it is damaged."
        )

    config = copy.deepcopy(encoder.peft_config[name]).to_dict()
    config.update(
        base_model_name_or_path=backbone_id,
        revision=backbone_revision,
        inference_mode=True,
        target_modules=sorted(paths),  # PEFT keeps a set: its order would differ from run to run
    )
    prefixes = prefixes_of(encoder, name)
    record = {
        **{key: value for key, value in (task or {}).items() if key != "prefix"},
        "name": name,
        "kind": KINDS[0],
        "backbone": {
            "id": backbone_id,
            "revision": backbone_revision,
            "sha256": backbone_sha256(encoder),
            "dtype": str(encoder.dtype).removeprefix("torch."),
            "config": settings_of(encoder),
            **({"tokenizer": tokenizer_sha256} if tokenizer_sha256 else {}),
        },
    }
    if name in heads:
        record |= about_head(heads[name])
    elif heads:
        told = {part["name"]: part for part in (task or {}).get("parts") or []}
        parts = {part_name(key): head for key, head in heads.items()}
        record |= {
            "kind": BUNDLE,
            "parts": [{**told.get(p, {}), "name": p, **about_head(head)} for p, head in parts.items()],
        }
    if prefixes:
        config["peft_type"] = PREFIX_TYPE
        record["prefix"] = {"length": next(iter(prefixes.values())).key.shape[1]}
    record["format_version"] = format_version(record)
    _check_record(record)
    tensors = {key: value.to(dtype or value.dtype) for key, value in tensors.items()}
    files = {ADAPTER_WEIGHTS_FILE: save(tensors, metadata={"format": "pt"})}
    if prefixes:
        slots = prefix_tensors(encoder, prefixes).items()
        files[PREFIX_FILE] = save(
            {key: value.cpu().to(dtype or value.dtype).contiguous() for key, value in slots}
        )
    if heads:
        weights = {
            head_key(part_name(name)) + key: value.detach().cpu().to(dtype or value.dtype).contiguous()
            for name, head in heads.items()
            for key, value in head.state_dict().items()
        }
        # The labels are stored with the weights, so that renaming or moving one in task.json is noticed.
        # One entry only: safetensors writes several in random order.
        labels = {part_name(name): head.labels for name, head in heads.items()}
        metadata = {"labels": json.dumps(labels.get("", labels), ensure_ascii=False)}
        files[HEAD_FILE] = save(weights, metadata=metadata)
    if name in heads and (scope := heads[name].scope) is not None:
        files[SCOPE_FILE] = save_arrays(scope.tensors())
    files[TASK_FILE], files[ADAPTER_CONFIG_FILE] = json_bytes(record), json_bytes(config)
    with replaced_files(folder, ADAPTER_FILES, last=ADAPTER_CONFIG_FILE) as new:
        for file, content in files.items():
            (new / file).write_bytes(content)
    return Path(folder)


def about_head(head: AdapterHead) -> dict[str, Any]:
    """Return what is recorded of a head."""
    more = {"problem_type": head.problem_type} if head.problem_type else {}
    return {"kind": head.kind, "labels": head.labels, "max_length": head.max_length, **more}


def _check_record(record: dict[str, Any]) -> None:
    """Refuse to write a ``task.json`` that loading would refuse."""
    try:
        check_task(parse_json(_json_text(record).encode("utf-8", "surrogatepass"), TASK_ENTRIES))
    except ValueError as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{TASK_FILE} cannot be written: {first_line(error)}.") from error


def json_bytes(value: dict[str, Any]) -> bytes:
    """Serialise a record, with sorted keys and a line break at its end."""
    return (_json_text(value) + "\n").encode()


def _json_text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def find_adapter(
    path_or_repo: str | os.PathLike, revision: str | None = None, token: str | None = None
) -> Path:
    """Return the local folder of an adapter, fetching only its data files when it is a Hub repo."""
    path = Path(path_or_repo)
    if path.is_dir():
        return path
    if (path.parent / TASK_FILE).is_file() and path.name in task_heads(read_task(path.parent)):
        raise AdapterError(
            f"{path} is a part of the bundle {path.parent}, not a folder; name the bundle, or to compose it "
            "the app that it was made of."
        )
    files = [*ADAPTER_FILES, DELTA_FILE]
    commit = find_on_hub(path_or_repo, revision, token=token, error=AdapterError)
    try:
        api = HfApi(token=token)
        reachable = _check_size(api, str(path_or_repo), commit.resolved, files)
        fetched = snapshot_download(
            str(path_or_repo),
            revision=commit,
            token=token,
            allow_patterns=files,
            local_files_only=not reachable,
        )
    except AdapterError:
        raise
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = first_line(error)
        raise AdapterError(f"The adapter {path_or_repo} cannot be fetched: {reason}") from error
    folder = Path(fetched)
    damaged = [name for name in files if (folder / name).is_file() and not has_announced_hash(folder / name)]
    for name in damaged:
        drop_from_cache(folder / name)
    if damaged:
        raise AdapterError(
            f"{damaged[0]} of {path_or_repo} does not have the hash that the Hub announces for it; it was "
            "tampered with or damaged on the way. Load it again; if that does not help, do not use this repo."
        )
    return folder


def _check_size(api: HfApi, repo_id: str, commit: str, names: list[str]) -> bool:
    """Refuse an adapter that is too large before it is fetched; return whether the Hub answered."""
    try:
        info = api.model_info(repo_id, revision=commit, files_metadata=True)
    except HfHubHTTPError:
        raise
    except Exception:  # of the client's transport: an earlier download can still be loaded
        return False
    size = sum(file.size or 0 for file in info.siblings or [] if file.rfilename in names)
    if size > MAX_ADAPTER_BYTES:
        raise AdapterError(
            f"The adapter {repo_id} has {size:,} bytes, more than the {MAX_ADAPTER_BYTES:,} that are "
            "fetched; check it with mtpf inspect, then download it and give load_adapter the folder."
        )
    return True


def read_adapter(
    folder: Path,
    encoder: Encoder,
    name: str | None = None,
    check_backbone: bool = True,
    source: Path | None = None,
) -> AdapterFiles:
    """Read an adapter folder and check that it fits this encoder. Changes nothing.

    Args:
        folder: As `write_adapter` writes it, or a plain PEFT LoRA.
        encoder: The stock encoder.
        name: Name in memory; by default the one that the folder records.
        check_backbone: Whether to compare the encoder's weights with those that it was trained on.
        source: The file that they came from, if known.

    Raises:
        AdapterError: A file is missing or damaged, the head is missing, or the adapter was trained on another
            backbone (shapes or sha256).
    """
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        raise AdapterError(f"{folder} is not an adapter folder: it has no {ADAPTER_CONFIG_FILE}.")
    config, task = read_adapter_config(folder), read_task(folder)
    header = read_lora_header(folder, config)
    _check_shapes(folder, encoder, header)
    modules = _check_targets(folder, encoder, config, header)
    records = task_heads(task) if check_head(folder, task, encoder.config.hidden_size) else {}
    for record in records.values():
        if record.get("max_length", 1) > (most := max_tokens(encoder.config)):
            raise AdapterError(
                f"{folder} is damaged: 'max_length' in {TASK_FILE} is {record['max_length']:,}, but the "
                f"backbone reads {most:,} tokens."
            )
    has_scope = check_scope(folder, task)
    has_prefix = check_prefix(folder, config, task, encoder)
    if check_backbone:
        recorded = task.get("backbone") or {}
        check_identity(folder, encoder, recorded, source)
        check_settings(folder, encoder, recorded)
    lora = {stock_key(key): value for key, value in read_tensors(folder / ADAPTER_WEIGHTS_FILE).items()}
    heads: dict[str, AdapterHead] = {}
    weights = read_tensors(folder / HEAD_FILE) if records else {}
    for part, record in records.items():
        options = record.get("max_length", 128), record.get("problem_type")
        heads[part] = head = AdapterHead(
            record["kind"], record["labels"], encoder.config.hidden_size, *options
        )
        head.load_state_dict({key: weights[head_key(part) + key] for key in ("weight", "bias")})
        head.tokenizer_sha256 = (task.get("backbone") or {}).get("tokenizer") if check_backbone else None
        if has_scope:
            stored = read_tensors(folder / SCOPE_FILE)
            head.scope = Scope(**{key: tensor.float().numpy() for key, tensor in stored.items()})
        head.eval()
    fallback = re.sub(r"[^a-z0-9_-]+", "-", folder.resolve().name.lower()).strip("-_0123456789")
    name = name or task.get("name") or fallback
    named = named_heads(name, heads.get("", heads))
    peft_config = _lora_config(config, modules)
    if has_prefix:
        setattr(peft_config, PREFIXES, as_prefixes(read_tensors(folder / PREFIX_FILE)))
    return AdapterFiles(name, peft_config, lora, task, named)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file; raise `AdapterError` for numbers that are not finite."""
    try:
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"{path} is damaged or not a safetensors file: {first_line(error)}.") from error
    check_finite(path, tensors)
    return tensors


def _check_shapes(folder: Path, encoder: Encoder, lora: dict[str, Tensor]) -> None:
    layers = encoder_layout(encoder.config.model_type).layers + "."
    for key, (_, shape) in lora.items():
        path, _, part = key.removesuffix(".weight").rpartition(".")
        module: Any = None
        with suppress(AttributeError):  # not a list of all modules: another thread may be adding some
            module = encoder.get_submodule(path)
        if not path.startswith(layers) or not hasattr(module, "weight") or module.weight.dim() != 2:
            raise AdapterError(
                f"Adapter {folder} does not fit: the backbone has no linear layer for its tensor {key!r}; "
                "load the backbone it was trained on."
            )
        rows, columns = module.weight.shape
        expected, width = (columns, shape[1]) if part == "lora_A" else (rows, shape[0])
        if expected != width:
            raise AdapterError(
                f"Adapter {folder} was trained on another backbone: {key!r} is made for width {width}, "
                f"this one has {expected}."
            )


def _check_targets(
    folder: Path, encoder: Encoder, config: dict[str, Any], lora: dict[str, Tensor]
) -> list[str]:
    """Return the modules with LoRA, after checking that the config's names mean exactly these."""
    indices = config.get("layers_to_transform")
    indices = [indices] if isinstance(indices, int) else indices

    def named(module: str) -> bool:
        if module in config["target_modules"]:
            return True
        number = next((int(part) for part in module.split(".") if part.isdigit()), -1)
        names = any(is_part(module, target) for target in config["target_modules"])
        excluded = any(is_part(module, name) for name in config.get("exclude_modules") or [])
        return names and not excluded and (not indices or number in indices)

    modules = {key.rpartition(".lora_")[0] for key in lora}
    if modules == set(config["target_modules"]) and not config.get("exclude_modules"):
        return sorted(modules)
    linear = (key.removesuffix(".weight") for key in backbone_state_dict(encoder) if key.endswith(".weight"))
    if different := modules ^ {module for module in linear if named(module)}:
        raise AdapterError(
            f"{ADAPTER_WEIGHTS_FILE} and {ADAPTER_CONFIG_FILE} of {folder} disagree about "
            f"{min(different)!r}; save it again."
        )
    return sorted(modules)


def _lora_config(config: dict[str, Any], modules: list[str]) -> Any:
    """Build PEFT's config from checked values: it would compile what a file calls a name as a pattern."""
    keys = ("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights")
    patterns = ("rank_pattern", "alpha_pattern")  # of names, here
    values = {key: config[key] for key in (*keys, *patterns) if config.get(key) is not None}
    return import_peft().LoraConfig(target_modules=modules, task_type="FEATURE_EXTRACTION", **values)


def replace_adapter(encoder: Encoder, files: AdapterFiles, trainable: bool = False) -> None:
    """Replace the adapter of the same name; on any failure the old one is restored."""
    name = files.name
    trained = [parameter.requires_grad for parameter in lora_parameters(encoder, name)]
    tensors = {key: weight.detach() for key, weight in _lora_weights(encoder, name).items()}
    old = AdapterFiles(name, encoder.peft_config[name], tensors)
    active = active_adapter(encoder)
    remove_lora(encoder, name)
    try:
        install_adapter(encoder, files, trainable)
    except BaseException:
        install_adapter(encoder, old)
        for parameter, gradient in zip(lora_parameters(encoder, name), trained, strict=True):
            parameter.requires_grad_(gradient)
        raise
    finally:
        set_active_adapter(encoder, active)


def install_adapter(encoder: Encoder, files: AdapterFiles, trainable: bool = False) -> None:
    """Add a read and checked adapter with its weights; on any failure the encoder is as before."""
    try:
        inject_lora(encoder, files.name, files.config, trainable)
    except AdapterError:
        raise
    except Exception as error:  # PEFT's, for a config that it cannot use
        raise AdapterError(f"Adapter {files.name!r} cannot be loaded: {error}") from error
    wanted = _lora_weights(encoder, files.name)
    try:
        if wanted.keys() != files.lora.keys():
            key = min(wanted.keys() ^ files.lora.keys())
            raise AdapterError(f"Weights and {ADAPTER_CONFIG_FILE} disagree about {key!r}; save it again.")
        with torch.no_grad():
            for key, parameter in wanted.items():
                if parameter.shape != files.lora[key].shape:  # copy_ would broadcast a rank of 1
                    raise AdapterError(
                        f"{key!r} has shape {tuple(files.lora[key].shape)}, its config wants "
                        f"{tuple(parameter.shape)}."
                    )
                parameter.copy_(files.lora[key])
        slots = prefixes_of(encoder, files.name).items()  # which came with the config
        moved = {number: Prefix(slot.key.to(parameter), slot.value.to(parameter)) for number, slot in slots}
        setattr(encoder.peft_config[files.name], PREFIXES, moved)
    except (AdapterError, RuntimeError) as error:
        remove_lora(encoder, files.name)
        raise AdapterError(f"Adapter {files.name!r} cannot be loaded: {error}") from error
