"""The files of a published repo: which belong there, their hashes, and the checks before they leave."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from .adapter_files_mtpf import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    HEAD_FILE,
    PEFT_PREFIX,
    TASK_FILE,
    read_head,
)
from .adapters_mtpf import KINDS, NAME_PATTERN, AdapterError
from .configuration_mtpf import AUTO_MAP, encoder_layout
from .errors import MtpfError
from .modeling_mtpf import HUB_FILES

CARD_FILE = "README.md"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TRAINING_FILE = "training.json"
"""What the card of a backbone tells of its run, as `hub_cards.training_summary` returns it."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model"),
)
BACKBONE_FILES = (CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE, *TOKENIZER_FILES)
ADAPTER_FILES = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, HEAD_FILE, TASK_FILE)
PICKLES = (".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth")
ARCHIVES = (".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".whl", ".xz", ".zip", ".zst")
MAX_JSON_BYTES = 50_000_000

_LOCAL_PATH = re.compile(
    r"(?<![\w/.:-])/(?:home|Users|root|tmp|mnt|media|data|work|workspace|var|opt|srv|scratch|content|kaggle)"
    r"/[\w.-]+|\b[A-Za-z]:\\{1,2}\w[\w.-]*|file://\S+|(?<![\w/])~/[\w.-]+"
)
_PATH_VALUE = re.compile(r"(?:\.{0,2}|~)/[\w.-]+")
_FREE_TEXT_KEYS = {
    "labels",
    "id2label",
    "label2id",
    "examples",
}  # '/person/artist' is a label of some data sets


class HubFileError(MtpfError):
    """A folder or repo holds something that may not be published or loaded."""


# ------------------------------------------------------------------------------------------- names


def objection(path: str) -> str | None:
    """Say why a file has no place in a repo of this project, judging by its name; ``None`` if it has one."""
    name = PurePosixPath(path).name
    suffix = PurePosixPath(path).suffix.lower()
    parts = path.split("/")
    if path.startswith("/") or re.match(r"[A-Za-z]:", path) or "\\" in path or "\0" in path:
        return "its name is not a relative path"
    if any(part in ("", ".", "..") for part in parts):
        return "its name leads out of the folder"
    if suffix in PICKLES:
        return "it may hold a pickle, which runs code when it is opened; use safetensors"
    if suffix in ARCHIVES:
        return "it is an archive, and archives are neither published nor unpacked"
    if suffix in (".py", ".pyc", ".so", ".sh", ".dll", ".exe", ".ipynb") and not (
        name in HUB_FILES and len(parts) == 1
    ):
        return "it is code other than mtpf's own files"
    return None


def list_folder(folder: Path, accepted: tuple[str, ...]) -> dict[str, Path]:
    """Return the publishable files of a folder by name.

    The card and the remote code are not among them: the first is written, the second taken from this package
    when the folder is pushed. Hidden files are left out.

    Raises:
        HubFileError: There is no such folder, or it holds anything else: a link, a pickle, an unknown file.
    """
    if not folder.is_dir():
        raise HubFileError(f"There is no folder {folder}.")
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_symlink():
            raise HubFileError(
                f"{path.name} in {folder} is a symbolic link; publish a copy with its content (cp -rL)."
            )
        reason = objection(path.name)
        if reason:
            raise HubFileError(f"{path.name} in {folder} cannot be published: {reason}. Move it elsewhere.")
        if path.name in (CARD_FILE, *HUB_FILES):
            continue
        if not path.is_file() or path.name not in accepted:
            raise HubFileError(
                f"{path.name} in {folder} does not belong there; move it elsewhere. "
                f"What is published: {', '.join(accepted)}."
            )
        found[path.name] = path
    return found


# ------------------------------------------------------------------------------------------ hashes


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, as the Hub shows it for large files."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def git_sha1(data: bytes) -> str:
    """Return the hash that git, and so the Hub, gives a small file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def code_files() -> dict[str, Path]:
    """Return this package's own remote code by name."""
    return {name: Path(__file__).with_name(name) for name in HUB_FILES}


# ----------------------------------------------------------------------------------------- content


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        HubFileError: The file is missing, too large, or not a JSON object.
    """
    if not path.is_file():
        raise HubFileError(f"{path.parent} has no {path.name}.")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise HubFileError(f"{path} is larger than {MAX_JSON_BYTES // 10**6} MB; that is no {path.name}.")
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise HubFileError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise HubFileError(f"{path} must hold a JSON object.")
    return value


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes in a safetensors file, from its header alone.

    Raises:
        HubFileError: The file is missing, damaged, or no safetensors file.
    """
    if not path.is_file():
        raise HubFileError(f"{path.parent} has no {path.name}.")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise HubFileError(f"{path} is damaged or no safetensors file: {error}") from error


def count_values(shapes: dict[str, tuple[int, ...]]) -> int:
    """Return the number of values in all tensors."""
    total = 0
    for shape in shapes.values():
        size = 1
        for length in shape:
            size *= length
        total += size
    return total


def check_local_paths(name: str, data: bytes) -> None:
    """Refuse a text file that tells where its author keeps files; such paths also break loading elsewhere.

    Raises:
        HubFileError: The file holds a local path.
    """
    if name in ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt") or name in HUB_FILES:
        return  # pieces of words may look like paths; the code is this package's own
    if not name.endswith((".json", ".md", ".txt")):
        return
    text = data.decode("utf-8", "replace")
    found = _LOCAL_PATH.search(text)
    place, value = "", found[0] if found else None
    if value is None and name.endswith(".json"):
        suspects = ((key, v) for key, v in _strings(json.loads(text)) if _is_path(v))
        key, value = next(suspects, ("", None))
        place = f" (key {key!r})"
    if value is not None:
        raise HubFileError(
            f"{name} contains the local path {value!r}{place}; replace it by a Hub id or a plain name, "
            "for instance when you save: save_adapter(..., task={'training_data': 'what it is'})."
        )


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in _FREE_TEXT_KEYS:
                yield from _strings(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)


def _is_path(value: str) -> bool:
    if _PATH_VALUE.match(value):
        return True
    return "/" in value and "\0" not in value and len(value) < 500 and Path(value).exists()


# ----------------------------------------------------------------------------------------- folders


def check_backbone(folder: Path) -> dict[str, Any]:
    """Check that a folder is a complete backbone; return its config.

    Raises:
        HubFileError: Something is missing, damaged, or no backbone of this project.
    """
    config = read_json(folder / CONFIG_FILE)
    if config.get("auto_map") != AUTO_MAP or "mtpf" not in config:
        raise HubFileError(
            f"{folder} is not a backbone of mtpf (its {CONFIG_FILE} has no 'mtpf' block with the complete "
            "auto_map); write it with MtpfModel.from_pretrained(...).save_pretrained(folder)."
        )
    try:
        encoder_layout(str(config.get("model_type")))
    except ValueError as error:
        raise HubFileError(f"{folder / CONFIG_FILE}: {error}") from error
    shapes = tensor_shapes(folder / WEIGHTS_FILE)
    odd = [key for key in shapes if "lora_" in key or key.startswith(("backbone.", "heads."))]
    if odd or not shapes:
        raise HubFileError(
            f"{folder / WEIGHTS_FILE} holds {odd[0] if odd else 'nothing'!r}; a backbone has the stock "
            "encoder's tensors only. Write it with model.save_pretrained."
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise HubFileError(
            f"{folder} has no tokenizer; add it with tokenizer.save_pretrained({str(folder)!r})."
        )
    return config


def check_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check that a folder is a complete adapter; return its PEFT config and its task.

    Raises:
        HubFileError: Something is missing or damaged, or head and labels do not fit each other.
    """
    config, task = read_json(folder / ADAPTER_CONFIG_FILE), read_json(folder / TASK_FILE)
    if config.get("peft_type") != "LORA" or config.get("task_type") != "FEATURE_EXTRACTION":
        raise HubFileError(f"{folder} is no LoRA of mtpf; write it with model.save_adapter(folder, name).")
    if task.get("kind") not in KINDS:
        raise HubFileError(
            f"{folder / TASK_FILE} has the kind {task.get('kind')!r}; known: {', '.join(KINDS)}."
        )
    if not NAME_PATTERN.fullmatch(str(task.get("name", ""))):
        raise HubFileError(
            f"{TASK_FILE} of {folder} has the name {task.get('name')!r}, which no adapter can have."
        )
    shapes = tensor_shapes(folder / ADAPTER_WEIGHTS_FILE)
    paths = {f"{PEFT_PREFIX}{target}.lora_{part}.weight" for target in _targets(config) for part in "AB"}
    if set(shapes) != paths:
        odd = sorted(set(shapes) ^ paths)[0]
        raise HubFileError(
            f"{ADAPTER_WEIGHTS_FILE} and {ADAPTER_CONFIG_FILE} of {folder} disagree about {odd!r}."
        )
    has_head = (folder / HEAD_FILE).is_file()
    if has_head and task["kind"] == KINDS[0]:
        raise HubFileError(f"{folder} is the LoRA of a family, but it holds a {HEAD_FILE}; remove that file.")
    width = tensor_shapes(folder / HEAD_FILE).get("weight", (0, 0))[-1] if has_head else 0
    try:
        read_head(folder, task, width)
    except AdapterError as error:
        raise HubFileError(str(error)) from error
    return config, task


def _targets(config: dict[str, Any]) -> list[str]:
    targets = config.get("target_modules")
    return targets if isinstance(targets, list) else []


__all__ = [
    "ADAPTER_FILES",
    "BACKBONE_FILES",
    "CARD_FILE",
    "CONFIG_FILE",
    "TRAINING_FILE",
    "WEIGHTS_FILE",
    "HubFileError",
    "check_adapter",
    "check_backbone",
    "check_local_paths",
    "code_files",
    "count_values",
    "git_sha1",
    "list_folder",
    "objection",
    "read_json",
    "sha256_of",
    "tensor_shapes",
]
