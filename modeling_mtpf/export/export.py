"""Export for devices: one trunk, one tail whose LoRA is data, and a small file for each app.

An export is a folder that needs only onnxruntime, tokenizers and numpy:

    export.json        which backbone, which files with which hashes, which apps
    trunk.onnx         embeddings and lower layers, run once for a text
    tail.onnx          the last layers and the head, run once for each app, with the app's tensors as inputs
    tokenizer.json
    apps/NAME-HASH.safetensors
    runner.py          a copy of the module `runner`
"""

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from tokenizers import Tokenizer

from ..data.backbones import load_backbone
from ..errors import AdapterError, MtpfError, first_line, require_extra
from ..files import disk_errors, locked, write_bytes
from ..model.adapter_files_mtpf import about_head, backbone_sha256, find_adapter
from ..model.adapters_mtpf import LoraSettings, lora_targets, part_name
from ..model.backbone_identity_mtpf import changed_setting, settings_of
from ..model.configuration_mtpf import encoder_layout, max_tokens
from ..model.errors_mtpf import in_one_sentence
from ..model.gate_mtpf import Schema, list_of, matching, object_of, one_of, record, whole
from ..model.hub_cache_mtpf import sha256_of
from ..model.modeling_mtpf import MtpfModel
from ..model.predict_mtpf import check_tokenizer, load_tokenizer, text_tokenizer
from ..model.prefix_mtpf import prefix_tensors, prefixes_of
from ..model.schemas_mtpf import BUNDLE, MAX_LAYERS, MODULE, SHA256
from ..model.scope_mtpf import Scope
from ..model.sources_mtpf import is_hub_id
from ..model.texts_mtpf import WINDOW_OVERLAP, backend_sha256, plain_backend, with_symbols_apart
from ..model.trunk_mtpf import encoder_layers, lora_modules
from ..version import versions
from .graphs import (
    OPSET,
    TAIL_FILE,
    TRUNK_FILE,
    TailShape,
    export_tail,
    export_trunk,
    tail_modules,
    tail_prefixes,
)
from .int8 import quantize_export

MANIFEST_FILE, TOKENIZER_FILE, RUNNER_FILE, APPS_FOLDER = "export.json", "tokenizer.json", "runner.py", "apps"
FORMAT_VERSION = 1
SPECIAL_TOKENS = 2
"""Around a text, in all supported encoders."""
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu")
NEEDS_ONNXRUNTIME = [1, 17]
"""The oldest onnxruntime that reads the operators of the graphs."""
APP_PRECISION = {"float32": "float32", "int8": "float16"}
"""How an app's LoRA and head are stored, by the precision of the graphs."""


class ExportError(MtpfError):
    """Something cannot be exported, or a folder is not an export."""


_ENTRY = record(sha256=SHA256)
_APP_FILE = matching(rf"{APPS_FOLDER}/[\w.-]{{1,99}}\.safetensors", f"a file in {APPS_FOLDER}/")
EXPORT = Schema(
    MANIFEST_FILE,
    {
        "format_version": one_of(FORMAT_VERSION),
        "backbone": record(sha256=SHA256),
        "tail": record(layers=whole(1, MAX_LAYERS), targets=list_of(MODULE, 100)),
        "precision": one_of(*APP_PRECISION),
        "app_precision": one_of(*APP_PRECISION.values()),
        "files": object_of(_ENTRY, 100),
        "apps": object_of(record(sha256=SHA256, file=_APP_FILE, bytes=whole(0, 2**40)), 10_000),
    },
    error=ExportError,
    max_bytes=10_000_000,
    max_entries=500_000,
)
"""What is read of an export to add apps to it."""


@dataclass
class Export:
    """What `export_onnx` wrote: whether the graphs are new, the given apps, and all apps before them."""

    folder: Path
    manifest: dict[str, Any]
    created: bool
    added: list[str] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        graphs = self.manifest["files"]
        lines = [f"{self.folder}  ({'new' if self.created else 'apps added'}, {self.manifest['precision']})"]
        for name in (TRUNK_FILE, TAIL_FILE):
            lines.append(f"  {name:<40} {graphs[name]['bytes'] / 1e6:8.2f} MB")
        for name, app in self.manifest["apps"].items():
            known = self.before.get(name)
            mark = "new" if known is None else "unchanged" if known["file"] == app["file"] else "replaced"
            mark = f"  {mark}" if name in self.added else ""
            lines.append(f"  {app['file']:<40} {app['bytes'] / 1e6:8.2f} MB{mark}")
        return "\n".join(lines)


@dataclass
class _AppTensors:
    """An app to be written: tensors under the names of the tail's inputs, and its description."""

    name: str
    tensors: dict[str, np.ndarray]
    layers: int
    targets: set[str]
    prefix: bool
    about: dict[str, Any]


def export_onnx(
    backbone: str | os.PathLike,
    adapters: Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    *,
    int8: bool = False,
    layers: int | None = None,
    revision: str | None = None,
) -> Export:
    """Export a backbone and apps, or add apps to an export of the same backbone.

    In an existing export the graphs and the other apps stay as they are, byte for byte; an app of the same
    name is replaced. Where another process exports into the folder, this one waits for it.

    Args:
        backbone: ``packaged``, a folder or a Hub id.
        adapters: Folders or Hub ids of apps; ``NAME=ID`` gives one another name.
        output_dir: A new folder, or an export.
        int8: Store weights in 8 bits and multiply in them.
        layers: How many of the last layers the tail holds; by default as many as the apps need, at least the
            backbone's ``num_tail_layers``. Apps added later can have LoRA on these layers only.
        revision: Commit of the backbone's repo.

    Raises:
        MtpfError: The backbone cannot be loaded.
        ExportError: The folder is something else or an export of another backbone, or an app does not fit
            the existing graphs.
        AdapterError: An adapter is damaged, is not an app, or was trained on another backbone.
        DataError: The folder cannot be written.

    Example:
        >>> export_onnx("my/backbone", ["my/entities"], "phone", int8=True)  # doctest: +SKIP
    """
    require_extra("onnx", "onnx", "onnxscript", "onnxruntime")
    with disk_errors(Path(output_dir)):
        folder = Path(output_dir).resolve()
        _is_export(folder)  # before anything is loaded
    with locked(folder):
        precision = "int8" if int8 else "float32"
        return _export(backbone, adapters, folder, precision, layers, revision)


def _export(
    backbone: str | os.PathLike,
    adapters: Sequence[str | os.PathLike],
    folder: Path,
    precision: str,
    layers: int | None,
    revision: str | None,
) -> Export:
    """Do what `export_onnx` describes, while no other process writes to the folder."""
    manifest = read_manifest(folder) if _is_export(folder) else None
    for adapter in adapters:
        find_adapter(_named_source(adapter)[1])  # a missing one is noticed before the backbone is loaded
    model = _open(str(backbone), revision)
    sha256 = backbone_sha256(model.backbone)
    if manifest is not None:
        _check_same(folder, manifest, sha256, precision, layers)
        _check_same_settings(folder, manifest, model)
    apps = [_read_app(model, adapter, sha256) for adapter in adapters]
    names = [app.name for app in apps]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ExportError(f"Two adapters are named {twice!r}; give one another name: --adapter NAME={twice}.")
    if manifest is None:
        shape = _shape(model, apps, layers)
    else:
        tail = manifest["tail"]
        shape = TailShape(tail["layers"], tuple(tail["targets"]), tail.get("prefix", False))
    for app in apps:
        _check_fits(folder, app, shape, manifest)
        _fill(app, model, shape)
    created, known = manifest is None, dict(manifest["apps"]) if manifest else {}
    with disk_errors(folder):
        if manifest is None:
            manifest = _manifest(model, str(backbone), sha256, shape, precision)
            _create(folder, model, shape, manifest, apps)
        else:
            _write_apps(folder, manifest, apps)
    return Export(folder, read_manifest(folder), created, names, known)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read ``export.json``.

    Raises:
        ExportError: It is missing, damaged, or of a newer format.
    """
    where = f"{folder / MANIFEST_FILE} is damaged, export into a new folder"
    manifest = EXPORT.read(folder, f"{where}: ")
    if missing := EXPORT.keys.keys() - manifest.keys():
        raise ExportError(f"{where}: it has no {min(missing)!r}.")
    return manifest


def _is_export(folder: Path) -> bool:
    if (folder / MANIFEST_FILE).is_file():
        return True
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ExportError(f"{folder} exists and is not an export; name a new folder with --output.")
    return False


def _open(backbone: str, revision: str | None) -> MtpfModel:
    """Load the backbone in float32, with plain attention: its graph is smaller than that of the fused one."""
    model = load_backbone(backbone, revision, dtype=torch.float32, attn_implementation="eager")
    return model.eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------------- apps


def _named_source(adapter: str | os.PathLike) -> tuple[str | None, str | os.PathLike]:
    """Split ``NAME=ID``; without a name, or where that is an existing path, the name is ``None``."""
    name, equals, source = str(adapter).partition("=")
    return (name, source) if equals and not Path(str(adapter)).exists() else (None, adapter)


def _read_app(model: MtpfModel, adapter: str | os.PathLike, sha256: str) -> _AppTensors:
    """Load an adapter with all checks of `load_adapter`, copy its tensors, and delete it from the model."""
    name, source = _named_source(adapter)
    loaded = model.load_adapter(source, adapter_name=name, activate=False)
    try:
        if not (heads := model.parts(loaded)):
            raise AdapterError(f"{adapter} has no head: it is a family's LoRA, not an app; fit an app on it.")
        for key, head in heads.items():
            check_tokenizer(key, head, text_tokenizer(model))
            if head.max_length <= SPECIAL_TOKENS:
                raise ExportError(f"App {key!r} reads {head.max_length} tokens; there is no room for a word.")
        prefix = encoder_layout(model.config.encoder_config.model_type).layers + "."
        tensors = {
            "head.weight": torch.cat([head.weight.detach() for head in heads.values()]).T,
            "head.bias": torch.cat([head.bias.detach() for head in heads.values()]),
        }
        depth, total = 0, len(encoder_layers(model.backbone))
        targets: set[str] = set()
        for path, module in lora_modules(model.backbone):
            if loaded not in module.lora_A:
                continue
            a, b = (part[loaded].weight.detach().float().T for part in (module.lora_A, module.lora_B))
            if not b.any():  # as in a linear probe: it changes nothing
                continue
            index, _, target = path.removeprefix(prefix).partition(".")
            depth, targets = max(depth, total - int(index)), targets | {target}
            tensors |= {f"{path}.lora_A": a, f"{path}.lora_B": b * module.scaling[loaded]}
        if prefixes := prefixes_of(model.backbone, loaded):
            depth, tensors = model.adapter_depth(loaded), tensors | prefix_tensors(model.backbone, prefixes)
        if loaded in heads:
            about = {"name": loaded, **about_head(heads[loaded]), "backbone": sha256}
            if scope := heads[loaded].scope:
                about["scope"] = _as_text(scope)
        else:  # the columns of the head are the parts' labels, one part after the other
            parts = [{"name": part_name(key), **about_head(head)} for key, head in heads.items()]
            least = min(head.max_length for head in heads.values())
            about = {"name": loaded, "kind": BUNDLE, "parts": parts, "max_length": least, "backbone": sha256}
        arrays = {key: value.float().contiguous().numpy().copy() for key, value in tensors.items()}
        return _AppTensors(loaded, arrays, depth, targets, bool(prefixes), about)
    finally:
        model.delete_adapter(loaded)


def _as_text(scope: Scope) -> dict[str, Any]:
    """Return a scope as JSON has it, with base64 of float16: what runners do not know, they leave alone."""
    arrays = {key: value.astype("<f2") for key, value in scope.tensors().items() if value.ndim}
    coded = {key: [*value.shape, base64.b64encode(value.tobytes()).decode()] for key, value in arrays.items()}
    return {**coded, "threshold": float(scope.threshold)}


def _shape(model: MtpfModel, apps: list[_AppTensors], layers: int | None) -> TailShape:
    """Choose a tail that holds these apps and, for later ones, the default places of LoRA."""
    needed = max((app.layers for app in apps), default=0)
    total = len(encoder_layers(model.backbone))
    if layers is None:
        layers = max(needed, min(model.config.num_tail_layers, total))
    if layers < needed or not 1 <= layers <= total:
        raise ExportError(
            f"--layers is {layers}; these apps need at least {max(needed, 1)}, the encoder has {total}."
        )
    default = encoder_layout(model.config.encoder_config.model_type).lora_targets
    targets = sorted(set(default).union(*(app.targets for app in apps)))
    lora_targets(model.backbone, LoraSettings(layers=layers, targets=targets))  # raises for missing ones
    return TailShape(layers, tuple(targets), any(app.prefix for app in apps))


def _check_fits(folder: Path, app: _AppTensors, shape: TailShape, manifest: dict | None) -> None:
    runner = (manifest or {}).get("files", {}).get(RUNNER_FILE)
    current = sha256_of(Path(__file__).with_name(RUNNER_FILE))
    if app.about["kind"] == BUNDLE and runner and runner["sha256"] != current:
        raise ExportError(
            f"{folder} has the runner of another version of mtpf, which may not read the bundle "
            f"{app.name!r}; export into a new folder."
        )
    if app.layers > shape.layers:
        raise ExportError(
            f"App {app.name!r} has LoRA or a prefix on the last {app.layers} layers, but the tail of "
            f"{folder} holds {shape.layers}; export into a new folder with --layers {app.layers}."
        )
    foreign = [f"LoRA on {target!r}" for target in sorted(app.targets - set(shape.targets))]
    foreign += ["a prefix"] if app.prefix and not shape.prefix else []
    if foreign:
        raise ExportError(
            f"App {app.name!r} has {foreign[0]}, which the tail of {folder} cannot take; export it "
            "together with the others into a new folder."
        )


def _fill(app: _AppTensors, model: MtpfModel, shape: TailShape) -> None:
    """Add zeros of rank 1, or no slots, where the tail takes what the app lacks: inputs need a tensor."""
    for path in tail_modules(model.backbone, shape):
        linear = model.backbone.get_submodule(path)
        app.tensors.setdefault(f"{path}.lora_A", np.zeros((linear.in_features, 1), np.float32))
        app.tensors.setdefault(f"{path}.lora_B", np.zeros((1, linear.out_features), np.float32))
    for name, slots in prefix_tensors(model.backbone, tail_prefixes(model.backbone, shape, 0)).items():
        app.tensors.setdefault(name, slots.numpy())


def _app_bytes(app: _AppTensors, precision: str) -> bytes:
    """Serialise an app as one safetensors file, with its description in the metadata."""
    with np.errstate(over="ignore"):
        stored: dict[str, np.ndarray] = {name: v.astype(precision) for name, v in app.tensors.items()}
    beyond = [name for name, values in stored.items() if not np.isfinite(values).all()]
    if beyond:
        raise ExportError(f"App {app.name!r} has numbers in {beyond[0]!r} that {precision} cannot hold.")
    # One entry only: safetensors writes several in random order.
    return save(stored, metadata={"app": json.dumps(app.about, sort_keys=True, ensure_ascii=False)})


def _write_apps(folder: Path, manifest: dict[str, Any], apps: list[_AppTensors]) -> None:
    """Write app files, then the manifest: until then the export is as it was before.

    What the manifest named until then stays, for a runner that has read it, and goes with the next writing.
    """
    needed = {app["file"] for app in manifest["apps"].values()}
    (folder / APPS_FOLDER).mkdir(exist_ok=True)
    for app in apps:
        data = _app_bytes(app, manifest["app_precision"])
        digest = hashlib.sha256(data).hexdigest()
        # The hash is in the name, so that a replaced app stays complete until the manifest names the new one.
        file = f"{APPS_FOLDER}/{app.name}-{digest[:8]}.safetensors"
        write_bytes(folder / file, data)
        about = {"sha256": digest, "bytes": len(data), "kind": app.about["kind"]}
        manifest["apps"][app.name] = {"file": file, **about}
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    write_bytes(folder / MANIFEST_FILE, text.encode())
    needed |= {app["file"] for app in manifest["apps"].values()}
    for path in (folder / APPS_FOLDER).glob("*.safetensors"):
        if f"{APPS_FOLDER}/{path.name}" not in needed:
            path.unlink()


# ------------------------------------------------------------------------------------------------ folder


def _check_same(folder: Path, manifest: dict, sha256: str, precision: str, layers: Any) -> None:
    """Refuse to add to an export of other weights, precision or depth."""
    known = manifest["backbone"]["sha256"]
    if known != sha256:
        raise ExportError(
            f"{folder} is an export of another backbone (weights sha256 {known[:12]}…, given "
            f"{sha256[:12]}…); name that one, or a new folder."
        )
    if manifest["precision"] != precision:
        raise ExportError(
            f"{folder} is an export in {manifest['precision']}; to add apps to it "
            f"{'add' if manifest['precision'] == 'int8' else 'leave out'} --int8, or name a new folder."
        )
    if layers not in (None, manifest["tail"]["layers"]):
        raise ExportError(f"{folder} already has its graphs; leave out --layers, or name a new folder.")


def _check_same_settings(folder: Path, manifest: dict, model: MtpfModel) -> None:
    """Refuse a backbone with other settings or another tokenizer than the export's."""
    where = f"{folder} is an export of another backbone"
    recorded = manifest["backbone"].get("config")  # older versions recorded none
    if recorded is not None and (change := changed_setting(model.backbone, recorded)):
        raise ExportError(f"{where}: {change}; name that one, or a new folder.")
    with in_one_sentence(f"{folder / TOKENIZER_FILE} is damaged, export into a new folder"):
        stored = backend_sha256(Tokenizer.from_file(str(folder / TOKENIZER_FILE)))
    reader = text_tokenizer(model)
    if stored not in (reader.sha256, backend_sha256(reader.apart)):  # older exports: without its steps
        raise ExportError(f"{where}: it has another tokenizer; name that one, or a new folder.")


def _create(
    folder: Path,
    model: MtpfModel,
    shape: TailShape,
    manifest: dict[str, Any],
    apps: list[_AppTensors],
) -> None:
    """Write everything into a temporary folder, then move it to its place in one step."""
    try:
        tokenizer = load_tokenizer(model)
    except ValueError as error:
        raise ExportError(first_line(error)) from error
    temporary = folder.with_name(f".{folder.name[:50]}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        export_trunk(model.backbone, shape, temporary / TRUNK_FILE)
        export_tail(model.backbone, shape, temporary / TAIL_FILE)
        if manifest["precision"] == "int8":
            manifest["quantization"] = quantize_export(temporary)
        manifest["pad_token_id"] = tokenizer.pad_token_id or 0
        manifest["special_tokens"] = _save_tokenizer(tokenizer, temporary / TOKENIZER_FILE)
        shutil.copyfile(Path(__file__).with_name("runner.py"), temporary / RUNNER_FILE)
        manifest["files"] = {
            name: {"sha256": sha256_of(temporary / name), "bytes": (temporary / name).stat().st_size}
            for name in (TRUNK_FILE, TAIL_FILE, TOKENIZER_FILE, RUNNER_FILE)
        }
        _write_apps(temporary, manifest, apps)
        if folder.is_dir():
            folder.rmdir()  # it is empty
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _manifest(
    model: MtpfModel, backbone: str, sha256: str, shape: TailShape, precision: str
) -> dict[str, Any]:
    """Describe an export without files and apps yet."""
    return {
        "format_version": FORMAT_VERSION,
        "backbone": {
            "id": backbone if is_hub_id(backbone) and not Path(backbone).exists() else None,
            "sha256": sha256,
            "config": settings_of(model.backbone),
            "model_type": model.config.encoder_config.model_type,
            "layers": len(encoder_layers(model.backbone)),
            "hidden_size": model.config.hidden_size,
        },
        "tail": {
            "layers": shape.layers,
            "targets": list(shape.targets),
            **({"prefix": True} if shape.prefix else {}),
        },
        "precision": precision,
        "app_precision": APP_PRECISION[precision],
        "quantization": None,
        "max_length": max_tokens(model.config.encoder_config),
        "window_overlap": WINDOW_OVERLAP,
        "opset": OPSET,
        "needs_onnxruntime": NEEDS_ONNXRUNTIME,
        "versions": versions(*PACKAGES),
        "files": {},
        "apps": {},
    }


def _save_tokenizer(tokenizer: Any, file: Path) -> tuple[list[int], list[int]]:
    """Write `TextTokenizer.apart`, which reads all texts; return the special tokens before and after one."""
    backend = with_symbols_apart(plain_backend(tokenizer))
    backend.save(str(file))
    sample = backend.encode("a")
    text = [index for index, special in enumerate(sample.special_tokens_mask) if not special]
    return sample.ids[: text[0]], sample.ids[text[-1] + 1 :]
