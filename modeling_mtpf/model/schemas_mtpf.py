"""The gate for adapters and backbones: what each file may hold, checked before anything is built.

Loading, `inspect`, pushes and prediction read ``adapter_config.json``, ``task.json``, ``config.json`` and the
headers of the weights through this module, so that `inspect` finds what loading refuses. A file is one table:
key → what is accepted. docs/hub.md lists the limits.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors_mtpf import AdapterError, MtpfError, first_line
from .gate_mtpf import (
    ANYTHING,
    FLAG,
    LINE,
    NONE,
    SCALAR,
    Rule,
    Schema,
    Tensor,
    either,
    list_of,
    matching,
    number,
    object_of,
    one_of,
    read_header,
    read_json,
    record,
    shortened,
    whole,
)

KINDS = ("task-primary-lora", "token-classification", "text-classification")
"""What an adapter is: the LoRA of a family, or an app of one of the two head types."""
BUNDLE = "bundle"
"""The kind of an adapter with several heads, its parts, on one LoRA."""
MULTI_LABEL = "multi_label_classification"
"""The problem type, as transformers calls it, of a text app that gives any number of labels."""
NAME_PATTERN = re.compile(r"[a-z][a-z0-9_-]{1,63}")
ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
HEAD_FILE, TASK_FILE, DELTA_FILE = "head.safetensors", "task.json", "delta.safetensors"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
PEFT_PREFIX = "base_model.model."
TASK_FORMAT_VERSION, BUNDLE_FORMAT_VERSION, PREFIX_FORMAT_VERSION = 1, 2, 3
"""Of ``task.json``: of an app, of a bundle, and of either with a prefix, which versions without refuse."""
PREFIX_TYPE = "LORA_WITH_PREFIX_OF_MTPF"
"""The ``peft_type`` of a LoRA with a prefix: PEFT, which would run the LoRA alone, has none of this name."""
Shapes = dict[str, tuple[int, ...]]

MAX_LABELS, MAX_PARTS, MAX_LAYERS, MAX_WIDTH, MAX_RANK, MAX_PREFIX = 100_000, 1000, 256, 65_536, 4096, 1024
MAX_TOKENS, MAX_IDS, TASK_ENTRIES = 1_000_000, 10_000_000, 1_000_000

LABEL = Rule("a label of 1 to 256 characters on one line", lambda v: LINE.fits(v) and v.strip() != "")
TOKEN = Rule("a token: words on one line", lambda v: LINE.fits(v) and v != "" and v == v.strip())
SHA256 = matching("[0-9a-f]{64}", "a sha256")
MODULE = matching(r"[A-Za-z_][\w-]{0,63}(\.[\w-]{1,64}){0,15}", "the name of a module, no pattern")
NAME = matching(r"[A-Za-z][\w.+-]{0,63}", "a name")
SHARD = matching(r"[\w.-]{1,99}\.safetensors", "the name of a file")
ABSENT = Rule("left out", lambda v: False)
EMPTY = Rule("left out", lambda v: v is None or v is False or v in ({}, [], "none"))
_LAYER = re.compile(r"(?:^|\.)(?:encoder\.layer|transformer\.layer|layers)\.(\d+)\.")


# ------------------------------------------------------------------------------------------------ adapters

_ADAPTER_CONFIG = Schema(
    ADAPTER_CONFIG_FILE,
    {
        "peft_type": one_of("LORA", PREFIX_TYPE),
        "r": whole(1, MAX_RANK),
        "lora_alpha": number(-1e6, 1e6),
        "lora_dropout": Rule("a number from 0 to below 1", lambda v: number(0, 1).fits(v) and v < 1),
        "use_rslora": either(NONE, FLAG),
        "init_lora_weights": FLAG,
        "target_modules": list_of(MODULE, 10_000),
        "exclude_modules": either(NONE, list_of(MODULE, 10_000)),
        "layers_to_transform": either(NONE, whole(0, MAX_LAYERS), list_of(whole(0, MAX_LAYERS), MAX_LAYERS)),
        "layers_pattern": either(NONE, MODULE, list_of(MODULE, 10)),
        "rank_pattern": either(NONE, object_of(whole(1, MAX_RANK), 10_000, MODULE)),
        "alpha_pattern": either(NONE, object_of(number(-1e6, 1e6), 10_000, MODULE)),
        "bias": one_of("none"),
        # What the file tells of itself, and defaults that nothing here uses.
        **dict.fromkeys(("task_type", "peft_version", "base_model_name_or_path", "revision"), SCALAR),
        **dict.fromkeys(("megatron_core", "qalora_group_size", "inference_mode"), SCALAR),
        **dict.fromkeys(("auto_mapping", "runtime_config"), either(NONE, object_of(SCALAR, 100))),
    },
    error=AdapterError,
    others=EMPTY,
)
"""A plain LoRA. Other settings of PEFT add tensors of their own or change the backbone, which all adapters
share: PiSSA and its kin subtract from its weights, ``layer_replication`` repeats its layers."""

_APP_NAME = matching(NAME_PATTERN.pattern, "a name: lower-case letters, digits, '_' and '-', at most 64")
_HEAD_KEYS = {
    "labels": either(NONE, list_of(LABEL, MAX_LABELS)),
    "problem_type": one_of(None, MULTI_LABEL),
    "max_length": whole(3, MAX_TOKENS),  # two special tokens and one of a text
    "metrics": either(NONE, object_of(ANYTHING, 10_000)),
}
_TASK = Schema(
    TASK_FILE,
    {
        "format_version": one_of(TASK_FORMAT_VERSION, BUNDLE_FORMAT_VERSION, PREFIX_FORMAT_VERSION),
        "name": _APP_NAME,
        "kind": either(NONE, one_of(*KINDS, BUNDLE)),
        "backbone": either(NONE, object_of(either(SCALAR, object_of(ANYTHING, 100)), 100)),
        **_HEAD_KEYS,
        "prefix": either(NONE, record(length=whole(1, MAX_PREFIX))),
        "delta": either(NONE, record(rows=whole(1, MAX_IDS), tokens=list_of(TOKEN, MAX_LABELS))),
    },
    error=AdapterError,
    max_bytes=32_000_000,
    max_entries=TASK_ENTRIES,
)
_BUNDLE = Schema(
    TASK_FILE,
    {
        "parts": list_of(object_of(ANYTHING, 100), MAX_PARTS),
        "composition": either(NONE, object_of(ANYTHING, 100)),
        **dict.fromkeys(("labels", "problem_type", "max_length", "delta"), ABSENT),
    },
    error=AdapterError,
)
_PART = Schema(
    f"a part of {TASK_FILE}",
    {
        "name": _APP_NAME,
        "kind": one_of(*KINDS[1:]),
        "family": either(NONE, NAME),
        **_HEAD_KEYS,
    },
    error=AdapterError,
    others=either(SCALAR, object_of(ANYTHING, 1000)),
)
_COMPOSITION = Schema(
    f"the 'composition' of {TASK_FILE}",
    {
        "method": NAME,
        "weights": either(NONE, object_of(number(-1e3, 1e3), MAX_PARTS, _APP_NAME)),
        "rank": either(NONE, whole(1, MAX_RANK)),
        "steps": whole(0, 2**31),
        "learning_rate": either(NONE, number(0, 1e3)),
        "seed": whole(0, 2**31),
        "loss": either(NONE, NAME),
        "texts": either(NONE, object_of(SCALAR, 10)),
    },
    error=AdapterError,
    others=either(SCALAR, object_of(SCALAR, 100)),
)
"""How the LoRA of a bundle was made."""
_TRAINED_ON = Schema(
    f"the 'backbone' of {TASK_FILE}",
    {
        "sha256": either(NONE, SHA256),
        "tokenizer": either(NONE, SHA256),
        "config": either(NONE, object_of(ANYTHING, 100)),
        "id": either(NONE, matching(r"[\w.-]{1,96}/[\w.-]{1,96}", "an id owner/name")),
        "revision": either(NONE, matching(r"[\w./-]{1,255}", "a revision")),
        "dtype": either(NONE, NAME),
    },
    error=AdapterError,
)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``, which must be that of a plain LoRA that names its modules.

    Raises:
        AdapterError: It is missing, damaged, or does more than add a LoRA.
    """
    config = _ADAPTER_CONFIG.read(folder, f"{folder} is not a plain LoRA: ")
    if config.get("peft_type") is None or not config.get("target_modules"):
        raise AdapterError(
            f"{folder} is not a plain LoRA: its {ADAPTER_CONFIG_FILE} must have the peft_type 'LORA' and a "
            "list of target_modules."
        )
    return config


def read_task(folder: Path) -> dict[str, Any]:
    """Read and check ``task.json``; a plain PEFT adapter has none.

    Raises:
        AdapterError: It is not what ``save_adapter`` writes, or a newer version wrote it.
    """
    if not (folder / TASK_FILE).exists():
        return {}
    task = read_json(folder / TASK_FILE, _TASK.max_bytes, _TASK.max_entries, AdapterError)
    check_task(task, f"{folder} is damaged: ")
    return task


def check_task(task: Mapping[str, Any], where: str = "") -> None:
    """Raise `AdapterError` for a ``task.json`` that is not accepted."""
    version = task.get("format_version", TASK_FORMAT_VERSION)
    if type(version) is int and version > PREFIX_FORMAT_VERSION:
        raise AdapterError(
            f"{where.partition(' is damaged')[0] or 'The adapter'} was made by a newer mtpf: its {TASK_FILE} "
            f"has the format version {version}, this one reads {PREFIX_FORMAT_VERSION}; update mtpf."
        )
    _TASK.check(task, where)
    _TRAINED_ON.check(task.get("backbone") or {}, where)
    if version != format_version(task):
        raise AdapterError(
            f"{where}the kind {task.get('kind')!r} and the format version {version} in {TASK_FILE} do not "
            "belong together; save it again."
        )
    if task.get("kind") == BUNDLE:
        _BUNDLE.check(task, where)
        _COMPOSITION.check(task.get("composition") or {}, where)
        _check_parts(task.get("parts") or [], where)
    for head in task_heads(task).values():
        if head.get("problem_type") and head.get("kind") != KINDS[2]:
            raise AdapterError(f"{where}'problem_type' in {TASK_FILE} is only for a {KINDS[2]} app.")
        labels = head.get("labels") or []
        if len(set(labels)) < len(labels):
            raise AdapterError(f"{where}'labels' in {TASK_FILE} holds a label twice.")


def format_version(task: Mapping[str, Any]) -> int:
    """Return the version that ``task.json`` must have for what it tells of."""
    if task.get("prefix"):
        return PREFIX_FORMAT_VERSION
    return BUNDLE_FORMAT_VERSION if task.get("kind") == BUNDLE else TASK_FORMAT_VERSION


def _check_parts(parts: list[dict[str, Any]], where: str) -> None:
    for part in parts:
        _PART.check(part, where)
        if missing := [key for key in ("name", "kind", "labels", "max_length") if part.get(key) is None]:
            raise AdapterError(f"{where}a part of {TASK_FILE} has no {missing[0]!r}.")
    names = [part["name"] for part in parts]
    if not names or len(set(names)) < len(names):
        raise AdapterError(f"{where}'parts' in {TASK_FILE} must have different names, at least one.")


def task_heads(task: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what ``task.json`` says of each head: by a bundle's part, of an app under ``""``."""
    if task.get("kind") == BUNDLE:
        return {part["name"]: part for part in task["parts"]}
    return {} if task.get("kind") == KINDS[0] else {"": task}


def read_lora_header(folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the matrices of a LoRA by their stock names, after comparing them with its config.

    Raises:
        AdapterError: The file is damaged, a matrix is missing, or has not the rank that the config names.
    """
    path = folder / ADAPTER_WEIGHTS_FILE
    stored = read_header(path, AdapterError).tensors
    tensors = {stock_key(key): tensor for key, tensor in stored.items()}
    if not tensors or len(tensors) % 2 or len(tensors) < len(stored):
        raise AdapterError(f"Adapter {folder} is incomplete: {len(tensors)} tensors; save it again.")
    targets, excluded = config["target_modules"], config.get("exclude_modules") or []
    ranks = config.get("rank_pattern") or {}
    for key, (_, shape) in tensors.items():
        module, _, part = key.removesuffix(".weight").rpartition(".")
        other = f"{module}.lora_{'B' if part == 'lora_A' else 'A'}.weight"
        rank = next((r for name, r in ranks.items() if is_part(module, name)), config.get("r", 8))
        if part not in ("lora_A", "lora_B") or len(shape) != 2 or other not in tensors:
            raise AdapterError(f"Adapter {folder} is damaged: {key[:120]!r} is not a matrix of a LoRA pair.")
        named = any(is_part(module, target) for target in targets)
        if not named or any(is_part(module, name) for name in excluded):
            raise AdapterError(f"{path.name} and {ADAPTER_CONFIG_FILE} of {folder} disagree about {key!r}.")
        if shape[0 if part == "lora_A" else 1] != rank:
            raise AdapterError(
                f"{path.name} and {ADAPTER_CONFIG_FILE} of {folder} disagree about {key!r} (shape {shape}, "
                f"rank {rank}); save it again."
            )
    modules = {key.rpartition(".lora_")[0] for key in tensors}
    ends = {".".join(parts[i:]) for parts in (m.split(".") for m in modules) for i in range(len(parts))}
    if missing := [target for target in targets if target not in ends]:
        raise AdapterError(
            f"{path.name} and {ADAPTER_CONFIG_FILE} of {folder} disagree about {missing[0]!r}: it has no "
            "matrices; save it again."
        )
    return tensors


def stock_key(key: str) -> str:
    """Return the name of an adapter's tensor without the prefixes of PEFT and of this project's wrapper."""
    return key.removeprefix(PEFT_PREFIX).removeprefix("backbone.")


def is_part(module: str, name: str) -> bool:
    """Say whether a name is that of a module, in full or from some dot on, as PEFT reads it."""
    return module == name or module.endswith(f".{name}")


def head_key(part: str) -> str:
    """Return what precedes ``weight`` and ``bias`` of a part's head in its file; nothing for a plain app."""
    return f"{part}." if part else ""


def check_head(folder: Path, task: Mapping[str, Any], width: int | None = None) -> bool:
    """Say whether a folder has a head, after comparing its header with ``task.json``.

    Args:
        folder: An adapter's.
        task: Its ``task.json``.
        width: Of the encoder, where it is known.

    Raises:
        AdapterError: A head is missing or damaged, or does not fit the width or the labels.
    """
    kind, path, heads = task.get("kind"), folder / HEAD_FILE, task_heads(task)
    if kind is None or not heads:
        if path.exists():
            raise AdapterError(
                f"Adapter {folder} has a head, but {TASK_FILE} does not name its kind; fetch it again, or "
                f"remove {HEAD_FILE}."
            )
        return False
    if not path.is_file():
        raise AdapterError(f"Adapter {folder} is a {kind} app, but its head is missing; fetch it again.")
    if not all(head.get("labels") for head in heads.values()):
        raise AdapterError(f"Adapter {folder} is a {kind} app, but {TASK_FILE} has no labels.")
    tensors, metadata = read_header(path, AdapterError)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    width = width or next((shape[1] for shape in shapes.values() if len(shape) == 2), 0)
    sizes = {head_key(part): len(head["labels"]) for part, head in heads.items()}
    expected = {f"{key}weight": (size, width) for key, size in sizes.items()}
    if shapes != expected | {f"{key}bias": (size,) for key, size in sizes.items()}:
        raise AdapterError(
            f"The head of {folder} does not fit {sum(sizes.values()):,} labels of width {width}: "
            f"{shortened(shapes)}."
        )
    try:
        trained = json.loads(metadata.get("labels", "null"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is damaged: its labels are not JSON: {first_line(error)}.") from error
    labels = {part: head["labels"] for part, head in heads.items()}
    if trained != labels.get("", labels):
        raise AdapterError(
            f"The labels in {folder / TASK_FILE} are not those that its head was trained with, in order: "
            f"{shortened(trained)}. Restore them; new labels need a new head."
        )
    return True


# ----------------------------------------------------------------------------------------------- backbones

_SIZE, _LABELS = whole(1, MAX_WIDTH), either(NONE, object_of(either(LABEL, whole(0, MAX_IDS)), MAX_LABELS))
_TOKEN_ID = either(NONE, whole(-1, MAX_IDS), list_of(whole(0, MAX_IDS), 10))
_SHARE, _BUILT_IN = number(0, 1), either(NONE, matching(r"\w{1,40}", "the name of a built-in function"))
_BLOCK_KEYS = {"num_tail_layers": whole(1, MAX_LAYERS), "regime": either(NONE, LINE)}
_BLOCK = Schema(f"the 'mtpf' block of {CONFIG_FILE}", _BLOCK_KEYS, others=ABSENT)
"""Any other key would become an argument of the config."""
_CONFIG = Schema(
    CONFIG_FILE,
    {
        "model_type": NAME,
        **dict.fromkeys(("num_hidden_layers", "n_layers"), whole(1, MAX_LAYERS)),
        **dict.fromkeys(("hidden_size", "dim", "embedding_size", "intermediate_size", "hidden_dim"), _SIZE),
        **dict.fromkeys(("num_attention_heads", "n_heads"), whole(1, 1024)),
        "vocab_size": whole(1, MAX_IDS),
        "chunk_size_feed_forward": either(NONE, one_of(0)),  # another one fails for most lengths
        "max_position_embeddings": whole(1, MAX_TOKENS),
        "type_vocab_size": whole(0, 1000),
        "num_labels": either(NONE, whole(0, MAX_LABELS)),
        **dict.fromkeys(("id2label", "label2id"), _LABELS),
        **{f"{name}_token_id": _TOKEN_ID for name in ("pad", "bos", "eos", "cls", "sep", "mask")},
        **dict.fromkeys(
            ("layer_norm_eps", "norm_eps"), Rule("above 0, at most 1", lambda v: _SHARE.fits(v) and v > 0)
        ),
        **dict.fromkeys(("dtype", "torch_dtype"), one_of(None, "float32", "float16", "bfloat16", "float64")),
        **dict.fromkeys(("hidden_act", "activation", "hidden_activation"), _BUILT_IN),
        **dict.fromkeys(("attn_implementation", "_attn_implementation"), _BUILT_IN),
        **dict.fromkeys(("experts_implementation", "_experts_implementation"), _BUILT_IN),
        "architectures": either(NONE, list_of(NAME, 100)),
        **dict.fromkeys(("quantization_config", "per_layer_config", "kernel_config"), EMPTY),
        **dict.fromkeys(("mtpf", "encoder_config"), either(NONE, object_of(ANYTHING, 10_000))),
        **_BLOCK_KEYS,
    },
    max_bytes=16_000_000,
    max_entries=1_000_000,
)


def check_config(config: Mapping[str, Any], where: str = "") -> None:
    """Raise `MtpfError` for a ``config.json`` of which no encoder should be built.

    Sizes are bounded, and what transformers would import or look up by name is a built-in name. Whether the
    weights fit is for `check_checkpoint`.
    """
    _CONFIG.check(config, where)
    _CONFIG.check(config.get("encoder_config") or {}, where)
    _BLOCK.check(config.get("mtpf") or {}, where)


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check a folder's ``config.json``."""
    config = read_json(folder / CONFIG_FILE, _CONFIG.max_bytes, _CONFIG.max_entries)
    check_config(config, f"{folder} is damaged: ")
    return config


def check_checkpoint(folder: Path, shapes: Shapes | None = None) -> Shapes:
    """Refuse a folder whose ``config.json`` asks for more than its weights hold, so that none of it is built.

    Args:
        folder: Holds ``config.json``.
        shapes: Of the weights; by default read from the folder's safetensors files. A checkpoint in another
            format has no header, and only the sizes in the config are bounded.

    Returns:
        The shapes.

    Raises:
        MtpfError: A file is damaged, or the sizes differ.
    """
    config = read_config(folder)
    shapes = _stored_shapes(folder) if shapes is None else shapes
    if shapes is None:
        return {}
    layers = {int(match[1]) for match in map(_LAYER.search, shapes) if match}
    widest = max((extent for shape in shapes.values() for extent in shape), default=0)
    # Only upper bounds: a caller may want fewer layers, and transformers compares every shape.
    sizes = {
        **dict.fromkeys(("num_hidden_layers", "n_layers"), max(layers, default=-1) + 1),
        **dict.fromkeys(("vocab_size", "hidden_size", "dim", "embedding_size"), widest),
        **dict.fromkeys(("intermediate_size", "hidden_dim"), widest),
    }
    for key, limit in sizes.items():
        if (
            layers and config.get(key, 0) > limit
        ):  # without a layer it is not an encoder, as transformers finds
            raise MtpfError(
                f"{folder} is damaged: {key!r} in {CONFIG_FILE} is {config[key]:,}, but its weights have "
                f"{limit:,}; fetch the folder again, or write both with save_pretrained."
            )
    return shapes


def _stored_shapes(folder: Path) -> Shapes | None:
    paths, index = [folder / WEIGHTS_FILE], folder / f"{WEIGHTS_FILE}.index.json"
    if not paths[0].exists():
        if not index.exists():
            return None
        schema = Schema(index.name, {"weight_map": object_of(SHARD, 100_000)}, max_bytes=25_000_000)
        shards = schema.read(folder, f"{folder} is damaged: ").get("weight_map", {})
        paths = [folder / name for name in sorted(set(shards.values()))]
    return {key: tensor.shape for path in paths for key, tensor in read_header(path).tensors.items()}
