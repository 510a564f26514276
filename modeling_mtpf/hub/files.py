"""The files of a published repo: which belong there, and what their texts may not tell."""

import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd

from ..model import modeling_mtpf
from ..model.delta_mtpf import PATTERNS_FILE, delta_parameters, is_delta
from ..model.gate_mtpf import parse_json, read_header
from ..model.schemas_mtpf import (
    ADAPTER_WEIGHTS_FILE,
    CONFIG_FILE,
    DELTA_FILE,
    HEAD_FILE,
    TASK_FILE,
    WEIGHTS_FILE,
)
from ..model.storage_methods_mtpf import HUB_FILES
from ..model.tokenizer_gate_mtpf import TOKENIZER_FILES, VOCABULARY_FILES
from .client import HubError

Content = dict[str, CommitOperationAdd]
"""What is published, by path. An operation knows size and sha256 of what it uploads."""
CARD_FILE = "README.md"
TRAINING_FILE = "training.json"
"""What the card of a backbone tells of its run, as `hub_cards.training_summary` returns it."""
BACKBONE_FILES = (CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE, *TOKENIZER_FILES)
DELTA_FILES = (DELTA_FILE, HEAD_FILE, TASK_FILE, PATTERNS_FILE)
MARKERS = {"backbone": "modeling_mtpf.py", "adapter": TASK_FILE}
"""Files that only this project publishes: another model's config.json must not make its repo fair game."""
REFUSED_SUFFIXES = {
    "it may hold a pickle, which runs code when it is opened; use safetensors": (
        *(".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"),
    ),
    "it holds weights in another format than safetensors": (
        *(".gguf", ".h5", ".keras", ".mlmodel", ".msgpack", ".ot", ".pb", ".tflite"),
    ),
    "it is an archive, and archives are neither published nor unpacked": (
        *(".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".whl", ".xz", ".zip", ".zst"),
    ),
    "it is code other than mtpf's own files": (".py", ".pyc", ".so", ".sh", ".dll", ".exe", ".ipynb"),
}
CODE_KEYS = ("auto_map", "auto_mapping", "custom_pipelines")
"""Keys of JSON files under which transformers and PEFT look for code to import."""

_ROOTS = (
    "home|Users|root|tmp|mnt|media|data|datasets|work|workspace|var|opt|srv|usr|etc|dev|proc|run|private|Volumes"
    r"|scratch\w*|content|kaggle|gpfs\w*|lustre\w*|nfs\w*|efs|fsx|nas|ssd\w*|net|export|shared?|storage|cluster"
    "|projects?|users?|dbfs|teamspace"
)
_LOCAL_PATH = re.compile(
    rf"(?<![\w/.:<-])/(?:{_ROOTS})/[\w.-]+"
    r"|\b[A-Za-z]:[\\/]{1,2}\w[\w.-]*"  # of Windows
    r"|(?<!\\)\\{2}\w[\w.-]*\\\w[\w.$-]*"  # of a Windows share
    r"|file://\S+|(?<![\w/])~/[\w.-]+"
)
_PATH_VALUE = re.compile(
    r"(?:\.{0,2}|~)/[\w.-]+.*"  # absolute, or from here or home
    r"|(?!\d+/\d+/\d+$)[\w.-]+(?:/[\w.-]+){2,}"  # more parts than a Hub id has, and not a date
    r"|[\w.-]+(?:/[\w.-]+)*/[\w.-]+\.(?:jsonl?|csv|tsv|txt|conll|parquet|arrow|yaml|safetensors|bin|pt)"
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
_FREE_TEXT_KEYS = {"labels", "id2label", "label2id", "examples", "tokens"}
"""'/person/artist' is a label of some data sets."""


def path_objection(path: str) -> str | None:
    """Say why a name of a file in a repo cannot be used on this machine; ``None`` if it can."""
    if path.startswith("/") or re.match(r"[A-Za-z]:", path) or "\\" in path or "\0" in path:
        return "its name is not a relative path"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "its name leads out of the folder"
    return None


def objection(path: str) -> str | None:
    """Say why a file does not belong in a repo of this project, judging by its name; ``None`` if it does."""
    if path in HUB_FILES:
        return None
    suffix = PurePosixPath(path).suffix.lower()
    refusals = (reason for reason, suffixes in REFUSED_SUFFIXES.items() if suffix in suffixes)
    return path_objection(path) or next(refusals, None)


def code_files() -> dict[str, Path]:
    """Return this package's own remote code by name."""
    folder = Path(modeling_mtpf.__file__).parent
    return {name: folder / name for name in HUB_FILES}


def read_folder(folder: Path, accepted: tuple[str, ...]) -> Content:
    """Read the publishable files of a folder once: the bytes that are hashed for the card are uploaded.

    Leaves out hidden files, the card, which a push writes, and remote code, which it takes from this package.

    Raises:
        HubError: There is no such folder, it holds a link, a pickle or an unknown file, or cannot be read.
    """
    if not folder.is_dir():
        raise HubError(f"There is no folder {folder}.")
    paths = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_symlink():
            raise HubError(
                f"{path.name} in {folder} is a symbolic link; publish a copy with its content (cp -rL)."
            )
        if reason := objection(path.name):
            raise HubError(f"{path.name} in {folder} cannot be published: {reason}. Move it elsewhere.")
        if path.name in (CARD_FILE, *HUB_FILES):
            continue
        if not path.is_file() or path.name not in accepted:
            raise HubError(
                f"{path.name} in {folder} does not belong there; move it elsewhere. "
                f"What is published: {', '.join(accepted)}."
            )
        paths.append(path)
    return {path.name: CommitOperationAdd(path.name, _read_bytes(path)) for path in paths}


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise HubError(f"{path} cannot be read: {error.strerror or error}.") from error


def stored_parameters(folder: Path) -> int:
    """Return the number of values in the matrices of a LoRA, or in the changed rows of a standalone app."""
    if is_delta(folder):
        return delta_parameters(folder)
    tensors = read_header(folder / ADAPTER_WEIGHTS_FILE).tensors
    return sum(math.prod(tensor.shape) for tensor in tensors.values() if len(tensor.shape) == 2)


def check_text(operation: CommitOperationAdd) -> None:
    """Refuse a file that holds a token, names code to import, or tells where its author keeps files.

    Raises:
        HubError: It does one of these.
    """
    name, data = operation.path_in_repo, operation.path_or_fileobj
    assert isinstance(data, bytes)
    if name in HUB_FILES or name in VOCABULARY_FILES:
        return  # the code is this package's own; pieces of words may look like paths
    value: Any
    if name.endswith(".safetensors"):
        size = int.from_bytes(data[:8], "little")
        value = _parsed(data[8 : 8 + size], f"The header of {name}").get("__metadata__")
    elif name.endswith(".json"):
        value = _parsed(data, name)
        check_code_references(name, value)
    else:
        value = data.decode("utf-8", "replace")
    for _, key, item in _entries(value, skipped=_FREE_TEXT_KEYS):
        where = f" (key {key!r})" if key else ""
        for text in (key, item) if isinstance(item, str) else (key,):
            if _TOKEN.search(text):
                raise HubError(f"{name} holds what looks like a Hub token{where}; revoke it and take it out.")
            path = _LOCAL_PATH.search(text) or (_PATH_VALUE.fullmatch(text) if key else None)
            if path:
                raise HubError(
                    f"{name} contains the local path {path[0]!r}{where}; replace it by a Hub id or a plain "
                    "name, as in save_adapter(..., task={'training_data': 'what it is'})."
                )


def _parsed(data: bytes, name: str) -> dict[str, Any]:
    try:
        return parse_json(data, 1_000_000)
    except ValueError as error:
        raise HubError(f"{name} is not valid JSON: {error}.") from error


def check_code_references(name: str, value: dict[str, Any]) -> None:
    """Refuse a JSON file that names code to import; `check_backbone` checks ``auto_map`` of ``config.json``.

    Raises:
        HubError: It does.
    """
    for depth, key, item in _entries(value):
        if key in CODE_KEYS and item and not (name == CONFIG_FILE and key == "auto_map" and depth == 1):
            raise HubError(f"{name} names code to import ({key!r}: {item!r}); take that entry out.")


def _entries(value: Any, skipped: Collection[str] = ()) -> Iterator[tuple[int, str, Any]]:
    """Yield depth, key and value of all that is nested in a JSON value; items of a list have its key."""
    stack = [(0, "", value)]  # no recursion: a file may be nested as deep as its author likes
    while stack:
        depth, key, item = stack.pop()
        yield depth, key, item
        if isinstance(item, dict):
            stack += [(depth + 1, name, inner) for name, inner in item.items() if name not in skipped]
        elif isinstance(item, list):
            stack += [(depth + 1, key, inner) for inner in item]
