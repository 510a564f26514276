"""Adapters in memory: LoRA placement, names, switching, and the heads of apps.

An adapter is a LoRA on the last layers of the encoder, made by PEFT. Functions here take the stock encoder
(``model.backbone``), not the wrapper.
"""

import copy
import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .configuration_mtpf import encoder_layout
from .errors_mtpf import AdapterError
from .prefix_mtpf import prefixes_of
from .schemas_mtpf import KINDS, LABEL, MULTI_LABEL, NAME_PATTERN
from .scope_mtpf import Scope
from .trunk_mtpf import (
    NUMBER,
    Encoder,
    adapter_modules,
    encoder_layers,
    is_lora_layer,
    lora_modules,
    uncompiled,
)
from .views_mtpf import CHANGES, forget_adapter

STANDALONE = "_mtpf_standalone"
"""Attribute of an encoder: the models of the standalone apps that are loaded next to it."""


def import_peft() -> Any:
    """Import PEFT on first use: without adapters the published code needs only torch and transformers."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ImportError("Adapters need PEFT; install it with: pip install peft") from error


# --------------------------------------------------------------------------------------------- placement


@dataclass
class LoraSettings:
    """Shape and place of one adapter. Defaults are the paper's: r 32, alpha 64, last 2 layers.

    Attributes:
        r: Rank.
        alpha: Scale; the update is multiplied by ``alpha / r``.
        layers: How many of the last layers carry LoRA.
        targets: Linear modules inside a layer, e.g. ``["attention.self.query"]``; ``["all"]`` for every one,
            ``None`` for the architecture's query, key and MLP matrices.
        dropout: Dropout on the LoRA input (our assumption: 0).
    """

    r: int = 32
    alpha: float = 64
    layers: int = 2
    targets: list[str] | None = None
    dropout: float = 0.0


def lora_targets(encoder: Encoder, settings: LoraSettings) -> list[str]:
    """Return the full names, inside the encoder, of the modules that get LoRA, sorted.

    Explicit names are needed: the suffix ``output.dense`` alone also hits BERT's ``attention.output.dense``.

    Raises:
        AdapterError: More layers than the encoder has, or a target that is not one of its linear modules.
    """
    layout = encoder_layout(encoder.config.model_type)
    layers = encoder_layers(encoder)
    if not 1 <= settings.layers <= len(layers):
        raise AdapterError(f"lora.layers is {settings.layers}, but this encoder has {len(layers)} layers.")
    linear = [n for n, m in layers[-1].named_modules() if isinstance(m, nn.Linear) and "lora_" not in n]
    known = sorted({name.removesuffix(".base_layer") for name in linear})
    targets = known if settings.targets == ["all"] else list(settings.targets or layout.lora_targets)
    if settings.r < 1 or not 0 <= settings.dropout < 1:
        raise AdapterError(
            f"lora.r is {settings.r} and lora.dropout {settings.dropout}; the rank must be at least 1, "
            "and the dropout from 0 to below 1."
        )
    for target in targets:
        if target not in known:
            raise AdapterError(f"LoRA target {target!r} is not in this encoder; it has: {', '.join(known)}.")
    first = len(layers) - settings.layers
    return sorted(f"{layout.layers}.{i}.{target}" for i in range(first, len(layers)) for target in targets)


def lora_config(encoder: Encoder, settings: LoraSettings) -> Any:
    """Build the PEFT ``LoraConfig`` for this encoder.

    ``task_type`` is set because without it PEFT records a machine-specific module path that its Auto class
    refuses (peft#3085).
    """
    return import_peft().LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=lora_targets(encoder, settings),
        task_type="FEATURE_EXTRACTION",
    )


def check_adapter_name(name: Any, what: str = "Adapter") -> None:
    """Raise `AdapterError` for a name that no adapter, or no part of one, can have."""
    if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
        raise AdapterError(
            f"{what} name {name!r} is not allowed; use 2 to 64 lower-case letters, digits, '_' or '-', "
            "beginning with a letter."
        )


def validate_adapter_name(encoder: Encoder, name: str) -> None:
    """Raise `AdapterError` for a name that is malformed, in use, or that of a part of the model.

    The last makes *other* adapters save truncated or empty files without an error (peft#3584).
    """
    check_adapter_name(name)
    if name in adapter_names(encoder) or name in standalone_apps(encoder):
        raise AdapterError(
            f"An adapter named {name!r} is already loaded; delete it or choose another adapter_name."
        )
    if name in _parts(encoder) or hasattr(nn.ModuleDict(), name) or "lora" in name or "weight" in name:
        raise AdapterError(
            f"Adapter name {name!r} collides with a part of the model; add a prefix, e.g. 'app-{name}'."
        )


def _parts(module: nn.Module) -> set[str]:
    """Names that occur in the paths of the encoder's own modules and parameters."""
    if is_lora_layer(module):
        return {"base_layer"} | _parts(module.get_submodule("base_layer"))
    names = {*module._modules, *module._parameters}
    return names.union(*(_parts(child) for child in module._modules.values() if child is not None))


def adapter_names(encoder: Encoder) -> list[str]:
    """Return the names of the loaded adapters, in the order in which they were added."""
    return list(getattr(encoder, "peft_config", {}))


def standalone_apps(encoder: Encoder) -> dict[str, Any]:
    """Return the models of the standalone apps that are loaded next to this encoder, by name."""
    return uncompiled(encoder).__dict__.get(STANDALONE, {})


def check_loaded(encoder: Encoder, name: Any) -> None:
    """Raise `AdapterError` for a name that is not that of a loaded adapter."""
    if isinstance(name, str) and name in standalone_apps(encoder):
        raise AdapterError(
            f"App {name!r} is standalone: it has an encoder of its own and shares no trunk. predict gives it "
            f"a pass of its own; for anything else use model.standalone[{name!r}]."
        )
    if not isinstance(name, str) or name not in getattr(encoder, "peft_config", {}):
        known, whole = ", ".join(adapter_names(encoder)) or "none", str(name).partition("/")[0]
        hint = "Load it with load_adapter."
        if "/" in str(name) and whole in adapter_names(encoder):
            hint = f"Only predict takes a part of a bundle; elsewhere name the whole, {whole!r}."
        raise AdapterError(f"There is no adapter {name!r}; loaded: {known}. {hint}")


def adapter_depth(encoder: Encoder, name: str) -> int:
    """Return how many of the last layers the adapter touches."""
    layout = encoder_layout(encoder.config.model_type)
    prefix = layout.layers + "."
    indices = [
        int(path.removeprefix(prefix).split(".")[0])
        for path, _ in adapter_modules(encoder, name)
        if path.startswith(prefix)
    ]
    return len(encoder_layers(encoder)) - min([*indices, *prefixes_of(encoder, name)])


def inject_lora(encoder: Encoder, name: str, config: Any, trainable: bool) -> None:
    """Add a fresh LoRA to the encoder; all else keeps its trainability, mode and active adapter.

    PEFT freezes the whole base at the first injection and makes the new adapter active: both are undone.
    """
    with CHANGES:
        validate_adapter_name(encoder, name)
        config = copy.deepcopy(config)  # PEFT shortens the list of targets in place
        config.inference_mode = False
        carriers = dict(lora_modules(encoder))
        if _can_extend(encoder, carriers, config):
            _extend_layers(encoder, carriers, name, config)
        else:
            _inject(encoder, name, config)
        modules = adapter_modules(encoder, name)
        for _, module in modules:
            mode = module.get_base_layer().training
            for part in (module.lora_A, module.lora_B, module.lora_dropout):
                part[name].train(mode).requires_grad_(trainable)
        setattr(encoder.peft_config[name], NUMBER, len(modules))


def _can_extend(encoder: Encoder, carriers: dict[str, Any], config: Any) -> bool:
    """Return whether all target modules carry LoRA already, and the config names them, not patterns."""
    prefix = encoder_layout(encoder.config.model_type).layers + "."
    special = ("exclude_modules", "layers_to_transform", "layers_pattern")
    targets = config.target_modules
    return (
        not isinstance(targets, str)
        and bool(targets)
        and all(target.startswith(prefix) and target in carriers for target in targets)
        and {*config.rank_pattern, *config.alpha_pattern} <= carriers.keys()
        and not any(getattr(config, key, None) for key in special)
    )


def _extend_layers(encoder: Encoder, carriers: dict[str, Any], name: str, config: Any) -> None:
    """Add an adapter to layers that carry LoRA already, in the same time however many they carry.

    PEFT's injection visits all modules of all adapters, and its ``update_layer`` all adapters of the layer.
    So the latter gets a twin of the layer whose tables of modules are empty, and its entries are moved.
    """
    try:
        for path, module in carriers.items():  # in the order in which PEFT draws random numbers
            if path not in config.target_modules:
                continue
            kind: Any = type(module)
            twin = kind.__new__(kind)
            twin.__dict__.update(module.__dict__)
            tables = {key: table for key, table in module._modules.items() if key != "base_layer"}
            twin.__dict__["_modules"] = {**module._modules, **{key: type(tables[key])() for key in tables}}
            rank = config.rank_pattern.get(path, config.r)
            alpha = config.alpha_pattern.get(path, config.lora_alpha)
            twin.update_layer(name, r=rank, lora_alpha=alpha, config=config)
            for key, table in tables.items():
                if name in twin._modules[key]:
                    table[name] = twin._modules[key][name]
        encoder.peft_config[name] = config
    except Exception:
        remove_lora(encoder, name)
        raise


def _inject(encoder: Encoder, name: str, config: Any) -> None:
    """Let PEFT replace or extend the layers that an adapter targets."""
    before = {id(parameter): parameter.requires_grad for parameter in encoder.parameters()}
    active = active_adapter(encoder)
    with warnings.catch_warnings():
        # From the second adapter on PEFT warns that the model has adapters already, as intended here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        try:
            import_peft().inject_adapter_in_model(config, encoder, adapter_name=name)
        except Exception:
            remove_lora(encoder, name)
            raise
    for parameter in encoder.parameters():
        parameter.requires_grad_(before.get(id(parameter), False))
    for _, module in lora_modules(encoder):
        module.train(module.get_base_layer().training)  # PEFT leaves what it adds in training mode
    set_active_adapter(encoder, active)


def copy_lora(encoder: Encoder, source: str, name: str) -> None:
    """Add a trainable LoRA that starts as a copy of a loaded one, as an app starts from its family's."""
    inject_lora(encoder, name, encoder.peft_config[source], trainable=True)
    with torch.no_grad():
        for _, module in lora_modules(encoder):
            for part in (module.lora_A, module.lora_B):
                if source in part:
                    part[name].weight.copy_(part[source].weight)


def extend_lora(
    encoder: Encoder, source: str, name: str, layers: int | None, r: int | None, targets: list[str] | None
) -> None:
    """Add a trainable LoRA that starts as a loaded one in more layers or modules, or with a higher rank.

    What is not given is as in the loaded one. What is added has no effect yet.

    Raises:
        AdapterError: The loaded one has a layer, a module or a rank that does not fit into this shape.
    """
    carriers = {path: module for path, module in lora_modules(encoder) if source in module.lora_A}
    prefix = encoder_layout(encoder.config.model_type).layers
    inner = {path.removeprefix(f"{prefix}.").partition(".")[2] for path in carriers}
    rank = max(module.r[source] for module in carriers.values())
    scale = next(iter(carriers.values())).scaling[source]
    depth = adapter_depth(encoder, source)
    settings = LoraSettings(r or rank, scale * (r or rank), layers or depth, targets or sorted(inner))
    places = lora_targets(encoder, settings)
    if settings.r < rank or (absent := sorted(set(carriers) - set(places))):
        reason = f"its rank is {rank}" if settings.r < rank else f"it has a LoRA at {absent[0]}"
        raise AdapterError(
            f"The adapter cannot start a LoRA of rank {settings.r} on {settings.layers} layers: "
            f"{reason}; ask for at least its shape, or start without it."
        )
    inject_lora(encoder, name, lora_config(encoder, settings), trainable=True)
    with torch.no_grad():
        for path, module in lora_modules(encoder):
            if path in carriers:
                size = module.r[source]
                module.lora_A[name].weight[:size].copy_(module.lora_A[source].weight)
                module.lora_B[name].weight[:, :size].copy_(
                    module.lora_B[source].weight * (module.scaling[source] / module.scaling[name])
                )


def remove_lora(encoder: Encoder, name: str) -> None:
    """Remove one adapter from the encoder; with the last one the plain linear layers are restored."""
    with CHANGES:
        forget_adapter(encoder, name)
        active = active_adapter(encoder)
        getattr(encoder, "peft_config", {}).pop(name, None)
        for path, module in list(lora_modules(encoder)):
            if name in module.lora_A:
                if name in module.active_adapters:  # else PEFT picks another adapter and warns
                    set_active_adapter(module, None)
                module.delete_adapter(name)
            if not module.lora_A:
                parent, _, child = path.rpartition(".")
                setattr(encoder.get_submodule(parent), child, module.get_base_layer())
        if not getattr(encoder, "peft_config", True):
            del encoder.peft_config
        set_active_adapter(encoder, None if active == name else active)


# --------------------------------------------------------------------------------------------- switching


def active_adapter(encoder: Encoder) -> str | None:
    """Return the adapter that a plain forward uses, or ``None`` for the bare backbone."""
    for _, module in lora_modules(encoder):
        if module.active_adapters and not module.disable_adapters:
            return module.active_adapters[0]
    return None


def set_active_adapter(encoder: Encoder, name: str | None) -> None:
    """Choose the adapter of plain forwards, without touching ``requires_grad``.

    PEFT's own ``set_adapter`` turns the gradients of all other adapters off; between forward and backward it
    silently drops the gradients of the first adapter (peft#1303).
    """
    for _, module in lora_modules(encoder):
        module._active_adapter = [] if name is None else [name]
        module._disable_adapters = False


# ------------------------------------------------------------------------------------------------- heads


class AdapterHead(nn.Linear):
    """The linear head of an app, with its ordered labels.

    Args:
        kind: ``token-classification`` (one label a word, from its first sub-word) or
            ``text-classification`` (one label a text, from the mean of its token vectors).
        labels: Label names; their order is the order of the logits.
        hidden_size: Width of the encoder.
        max_length: Longest input in sub-words, special tokens included.
        problem_type: ``multi_label_classification`` for text classification with any number of labels a text:
            those whose sigmoid is at least 0.5.
    """

    def __init__(
        self,
        kind: str,
        labels: list[str],
        hidden_size: int,
        max_length: int = 128,
        problem_type: str | None = None,
    ):
        if kind not in KINDS[1:]:
            raise AdapterError(f"Head kind {kind!r} is unknown; choose one of: {', '.join(KINDS[1:])}.")
        if not labels or len(set(labels)) != len(labels):
            raise AdapterError(f"A head needs distinct labels, at least one; got {labels!r}.")
        if invalid := [label for label in labels if not LABEL.fits(label)]:
            raise AdapterError(f"The label {invalid[0]!r} cannot be used; it must be {LABEL.accepts}.")
        if problem_type not in (None, MULTI_LABEL) or (problem_type and kind != KINDS[2]):
            raise AdapterError(
                f"problem_type is {problem_type!r}; it may be {MULTI_LABEL!r}, of a {KINDS[2]} head."
            )
        super().__init__(hidden_size, len(labels))
        self.kind, self.problem_type = kind, problem_type
        self.labels = list(labels)
        self.max_length = max_length
        self.tokenizer_sha256: str | None = None  # of the tokenizer that it was trained with, if known
        self.scope: Scope | None = None  # by which texts out of scope are told, if known


def named_heads(name: str, heads: AdapterHead | Mapping[str, AdapterHead] | None) -> dict[str, AdapterHead]:
    """Return an adapter's heads by full name: ``name`` of a plain app, ``name/part`` of a bundle.

    Raises:
        AdapterError: A part's name is not allowed.
    """
    if heads is None:
        return {}
    if isinstance(heads, AdapterHead):
        return {name: heads}
    for part in heads:
        check_adapter_name(part, "Part")
    return {f"{name}/{part}": head for part, head in heads.items()}


def part_name(full_name: str) -> str:
    """Return the part in the full name of a head; nothing for that of a plain app."""
    return full_name.partition("/")[2]


def heads_of(heads: nn.ModuleDict, name: str) -> dict[str, Any]:
    """Return the heads of an adapter by full name, in order; none for a family's LoRA."""
    if name in heads:
        return {name: heads[name]}
    return {key: head for key, head in list(heads.items()) if key.startswith(f"{name}/")}


def find_heads(encoder: Encoder, heads: nn.ModuleDict, name: Any) -> tuple[str, dict[str, Any]]:
    """Return the adapter that a name means, and its heads: all of an adapter, or the one of a part.

    Raises:
        AdapterError: Nothing loaded has this name, several bundles have a part of it, or there is no head.
    """
    if isinstance(name, str) and name not in getattr(encoder, "peft_config", {}):
        keys = [key for key in list(heads) if "/" in key and f"/{key}".endswith(f"/{name}")]
        if len(keys) > 1:
            raise AdapterError(f"Several bundles have a part {name!r}; choose one of: {', '.join(keys)}.")
        if keys:
            return keys[0].partition("/")[0], {keys[0]: heads[keys[0]]}
    check_loaded(encoder, name)
    if not (named := heads_of(heads, name)):
        raise AdapterError(
            f"Adapter {name!r} has no head: it is a family's LoRA, not an app; fit an app on it."
        )
    return name, named


def lora_parameters(encoder: Encoder, name: str) -> list[nn.Parameter]:
    """Return the LoRA matrices of one adapter."""
    return [
        part[name].weight
        for _, module in lora_modules(encoder)
        for part in (module.lora_A, module.lora_B)
        if name in part
    ]


def count_parameters(encoder: Encoder, name: str) -> int:
    """Return the number of LoRA parameters of one adapter."""
    return sum(parameter.numel() for parameter in lora_parameters(encoder, name))
