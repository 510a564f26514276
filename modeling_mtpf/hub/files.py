"""The files of a published repo: which belong there, and what their texts may not tell."""

import json
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd
from safetensors import SafetensorError, safe_open

from ..model import modeling_mtpf
from ..model.adapter_files_mtpf import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, HEAD_FILE, TASK_FILE
from ..model.modeling_mtpf import HUB_FILES
from .client import HubError

CARD_FILE = "README.md"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TRAINING_FILE = "training.json"
"""What the card of a backbone tells of its run, as `hub_cards.training_summary` returns it."""
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.txt",),
    ("vocab.json", "merges.txt"),
    ("sentencepiece.bpe.model",),
)
"""Each entry is a complete vocabulary."""
VOCABULARY_FILES = tuple(name for names in VOCABULARIES for name in names)
TOKENIZER_FILES = (TOKENIZER_CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", *VOCABULARY_FILES)
BACKBONE_FILES = (CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE, *TOKENIZER_FILES)
ADAPTER_FILES = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, HEAD_FILE, TASK_FILE)
MARKERS = {"backbone": "modeling_mtpf.py", "adapter": TASK_FILE}
"""Files that only this project publishes: another model's config.json must not make its repo fair game."""
PICKLES = (".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth")
OTHER_WEIGHTS = (".gguf", ".h5", ".keras", ".mlmodel", ".msgpack", ".ot", ".pb", ".tflite")
ARCHIVES = (".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".whl", ".xz", ".zip", ".zst")
CODE = (".py", ".pyc", ".so", ".sh", ".dll", ".exe", ".ipynb")
CODE_KEYS = ("auto_map", "auto_mapping", "custom_pipelines")
"""Keys of JSON files under which transformers and PEFT look for code to import."""
MAX_JSON_BYTES = 50_000_000

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
_FREE_TEXT_KEYS = {"labels", "id2label", "label2id", "examples"}
"""'/person/artist' is a label of some data sets."""


# ------------------------------------------------------------------------------------------- names


def objection(path: str) -> str | None:
    """Say why a file has no place in a repo of this project, judging by its name; ``None`` if it has one."""
    suffix = PurePosixPath(path).suffix.lower()
    if path.startswith("/") or re.match(r"[A-Za-z]:", path) or "\\" in path or "\0" in path:
        return "its name is not a relative path"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "its name leads out of the folder"
    if suffix in PICKLES:
        return "it may hold a pickle, which runs code when it is opened; use safetensors"
    if suffix in OTHER_WEIGHTS:
        return "it holds weights in another format than safetensors"
    if suffix in ARCHIVES:
        return "it is an archive, and archives are neither published nor unpacked"
    if suffix in CODE and path not in HUB_FILES:
        return "it is code other than mtpf's own files"
    return None


def has_vocabulary(names: Iterable[str]) -> bool:
    """Say whether these files include those that a tokenizer needs."""
    present = set(names)
    return any(present.issuperset(vocabulary) for vocabulary in VOCABULARIES)


def code_files() -> dict[str, Path]:
    """Return this package's own remote code by name."""
    folder = Path(modeling_mtpf.__file__).parent
    return {name: folder / name for name in HUB_FILES}


def list_folder(folder: Path, accepted: tuple[str, ...]) -> dict[str, Path]:
    """Return the publishable files of a folder by name.

    The card and the remote code are not among them: the first is written, the second taken from this package
    when the folder is pushed. Hidden files are left out.

    Raises:
        HubError: There is no such folder, or it holds anything else: a link, a pickle, an unknown file.
    """
    if not folder.is_dir():
        raise HubError(f"There is no folder {folder}.")
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_symlink():
            raise HubError(
                f"{path.name} in {folder} is a symbolic link; publish a copy with its content (cp -rL)."
            )
        reason = objection(path.name)
        if reason:
            raise HubError(f"{path.name} in {folder} cannot be published: {reason}. Move it elsewhere.")
        if path.name in (CARD_FILE, *HUB_FILES):
            continue
        if not path.is_file() or path.name not in accepted:
            raise HubError(
                f"{path.name} in {folder} does not belong there; move it elsewhere. "
                f"What is published: {', '.join(accepted)}."
            )
        files[path.name] = path
    return files


def read_content(files: dict[str, Path]) -> dict[str, CommitOperationAdd]:
    """Read files once, so that the bytes hashed for the card are those uploaded, whatever happens on disk.

    Raises:
        HubError: A file cannot be read.
    """
    content = {}
    for name, path in files.items():
        try:
            content[name] = CommitOperationAdd(name, path.read_bytes())
        except OSError as error:
            raise HubError(f"{path} cannot be read: {error.strerror or error}.") from error
    return content


# ----------------------------------------------------------------------------------------- content


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        HubError: The file is missing, too large, or not a JSON object; numbers like NaN are not JSON.
    """
    if not path.is_file():
        raise HubError(f"{path.parent} has no {path.name}.")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise HubError(f"{path} is larger than {MAX_JSON_BYTES // 10**6} MB; that is not a {path.name}.")
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise HubError(f"{path} cannot be read: {error.strerror or error}.") from error


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object strictly.

    Raises:
        HubError: It is not one.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number of JSON; leave that entry out")

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise HubError(f"{name} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise HubError(f"{name} must hold a JSON object.")
    return value


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes in a safetensors file, from its header alone.

    Raises:
        HubError: The file is missing, damaged, or not a safetensors file.
    """
    if not path.is_file():
        raise HubError(f"{path.parent} has no {path.name}.")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise HubError(f"{path} is damaged or not a safetensors file: {error}") from error


def check_text(operation: CommitOperationAdd) -> None:
    """Refuse a file that tells where its author keeps files, names code to import, or holds a token.

    Local paths also break loading elsewhere.

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
        value = parse_json(data[8 : 8 + size], f"The header of {name}").get("__metadata__")
    elif name.endswith(".json"):
        value = parse_json(data, name)
        check_code_references(name, value)
    else:
        value = data.decode("utf-8", "replace")
    for key, text in _texts(value):
        where = f" (key {key!r})" if key else ""
        if _TOKEN.search(text):
            raise HubError(f"{name} holds what looks like a Hub token{where}; revoke it and take it out.")
        path = _LOCAL_PATH.search(text) or (_PATH_VALUE.fullmatch(text) if key else None)
        if path:
            raise HubError(
                f"{name} contains the local path {path[0]!r}{where}; replace it by a Hub id or a plain name, "
                "for instance when you save: save_adapter(..., task={'training_data': 'what it is'})."
            )


def check_code_references(name: str, value: dict[str, Any]) -> None:
    """Refuse a JSON file that names code to import; the ``auto_map`` of ``config.json`` is checked apart.

    Raises:
        HubError: It does.
    """
    for depth, key, item in _entries(value):
        if key in CODE_KEYS and item and not (name == CONFIG_FILE and key == "auto_map" and depth == 1):
            raise HubError(f"{name} names code to import ({key!r}: {item!r}); take that entry out.")


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    """Yield each string of a JSON value, and each key, with the key that it belongs to."""
    for _, key, item in _entries(value, skipped=_FREE_TEXT_KEYS):
        yield key, key
        if isinstance(item, str):
            yield key, item


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
