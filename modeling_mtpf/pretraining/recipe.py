"""Recipes: typed settings of a run, read from YAML and overridden on the command line.

``train/pretrain.py my.yaml --steps 500 --families.tc.temperature 0.1`` reads the file, then sets the two
keys. An unknown key is an error that names the nearest valid one.
"""

import importlib.util
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import RecipeError
from ..model.adapters_mtpf import LoraSettings
from ..settings import build, describe_keys, nearest, read_overrides
from .families.base import FAMILIES, FamilySettings
from .joint import REGIMES


@dataclass
class Recipe:
    """All settings of a pre-finetuning run.

    Attributes:
        backbone: Starting encoder: ``packaged``, a folder or a Hub id.
        revision: Commit of its repo.
        regime: ``tpl`` (all families, each with its LoRA), ``naive`` (all, without), the name of one family
            (that one alone, without LoRA), or ``base`` (nothing is trained).
        families: Family name → its settings.
        plugins: Python modules or files that register further families.
        steps: Optimiser steps.
        learning_rate: Peak learning rate of the backbone (our assumption).
        adapter_learning_rate: Peak learning rate of LoRA and heads (our assumption).
        weight_decay: On matrices of the backbone.
        warmup: Share of the steps with linear warm-up, before cosine decay to zero.
        max_grad_norm: Gradients are clipped to this norm.
        gradient_norm_limit: The run stops when the norm before clipping is larger (0: never).
        gradient_accumulation_steps: Batches per optimiser step. Adds no in-batch negatives.
        gradient_cache: Hold the activations of one chunk at a time, so that a batch may be larger than
            memory, at the price of a second forward pass.
        chunk_tokens: Tokens per chunk, padding included (0: 4,096 on CPUs, 65,536 on GPUs).
        mixed_precision: ``auto`` (bf16 where the device is fast at it), ``bf16`` or ``float32``.
        threads: CPU threads of a single process (0: all cores; ``accelerate launch`` alone would leave one).
        prefetch: Batches that a thread prepares ahead (0: none).
        compile: Compile the trunk's layers with torch.compile.
        fast_dropout: On CPUs, draw dropout masks 16 bits at a time.
        seed: Seed of everything.
        log_every: Steps between lines of ``metrics.jsonl``.
        diagnostics_every: Steps between gradient diagnostics (0: never).
        save_every: Steps between checkpoints (0: none).
        keep: Checkpoints that stay, the newest ones.
        resume: ``never``; ``auto``, the newest checkpoint in output_dir, if there is one; or a checkpoint's
            folder.
        report_to: Trackers of accelerate, e.g. ``tensorboard``; none by default.
        output_dir: Where everything is written; must not hold another run.
        demo: Generate the embedded synthetic corpus, and fit two small apps at the end.
    """

    backbone: str = "packaged"
    revision: str | None = None
    regime: str = "tpl"
    families: dict[str, FamilySettings] = field(default_factory=dict)
    plugins: list[str] = field(default_factory=list)
    steps: int = 1000
    learning_rate: float = 5e-5
    adapter_learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warmup: float = 0.05
    max_grad_norm: float = 1.0
    gradient_norm_limit: float = 10_000.0
    gradient_accumulation_steps: int = 1
    gradient_cache: bool = False
    chunk_tokens: int = 0
    mixed_precision: str = "auto"
    threads: int = 0
    prefetch: int = 2
    compile: bool = False
    fast_dropout: bool = True
    seed: int = 0
    log_every: int = 10
    diagnostics_every: int = 50
    save_every: int = 500
    keep: int = 2
    resume: str = "never"
    report_to: str | None = None
    output_dir: str = "runs/pretrain"
    demo: bool = False


PRECISIONS = ("auto", "bf16", "float32")
MINIMA = dict.fromkeys(("steps", "gradient_accumulation_steps", "log_every", "keep"), 1) | dict.fromkeys(
    (
        "learning_rate",
        "adapter_learning_rate",
        "weight_decay",
        "gradient_norm_limit",
        "chunk_tokens",
        "diagnostics_every",
        "save_every",
        "threads",
        "prefetch",
        "seed",
    ),
    0,
)
"""Lowest accepted values."""


def load_recipe(arguments: list[str], default: Path) -> Recipe:
    """Build a recipe from command-line arguments: an optional YAML file, then ``--key value`` overrides.

    Args:
        arguments: Without the program name.
        default: Recipe file that is used when none is named.

    Raises:
        RecipeError: An unknown key or family, a value of the wrong type, a missing file.
    """
    named = bool(arguments) and not arguments[0].startswith("--")
    path = Path(arguments[0]) if named else default
    values = _read_yaml(path)
    for key, value in read_overrides(arguments[1:] if named else arguments):
        target = values
        *parents, last = key.split(".")
        for parent in parents:
            if target.get(parent) is None:
                target[parent] = {}
            target = target[parent]
            if not isinstance(target, dict):
                raise RecipeError(f"--{key}: {parent!r} has no keys below it.")
        target[last] = value
    plugins = values.get("plugins") or []
    _load_plugins([plugins] if isinstance(plugins, str) else plugins)
    recipe = build(Recipe, values, converters=[(dict[str, FamilySettings], _families)])
    _check(recipe)
    return recipe


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain values, with every default filled in."""
    return asdict(recipe)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"There is no recipe file {path}.")
    try:
        values = yaml.safe_load(path.read_text("utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold keys and values, not a {type(values).__name__}.")
    return values


def _load_plugins(plugins: list[str]) -> None:
    for plugin in plugins:
        try:
            if str(plugin).endswith(".py"):
                spec: Any = importlib.util.spec_from_file_location(Path(plugin).stem, plugin)
                module = importlib.util.module_from_spec(spec)
                sys.modules[spec.name] = module  # dataclasses look their module up there
                spec.loader.exec_module(module)
            else:
                importlib.import_module(plugin)
        except (ImportError, OSError) as error:
            raise RecipeError(f"The plugin {plugin!r} cannot be imported: {error}") from error


def _families(values: Any, path: str) -> dict[str, FamilySettings]:
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold one entry per family, e.g. families.ner.batch_size.")
    built = {}
    for name, settings in values.items():
        if name not in FAMILIES:
            raise RecipeError(
                f"Unknown family {name!r}; {nearest(name, list(FAMILIES))}known: "
                f"{', '.join(sorted(FAMILIES))}. "
                "Name the module that registers a further one under 'plugins'."
            )
        built[name] = build(FAMILIES[name].settings_class, settings or {}, f"{path}.{name}")
    return built


def _check(recipe: Recipe) -> None:
    regimes = [*REGIMES, *recipe.families]
    if recipe.regime not in regimes:
        hint = nearest(recipe.regime, regimes)
        raise RecipeError(f"Unknown regime {recipe.regime!r}; {hint}choose one of: {', '.join(regimes)}.")
    if recipe.regime != "base" and not recipe.families:
        raise RecipeError("The recipe names no family; add at least one under 'families'.")
    if recipe.mixed_precision not in PRECISIONS:
        raise RecipeError(f"mixed_precision is {recipe.mixed_precision!r}; choose {', '.join(PRECISIONS)}.")
    for name, lowest in MINIMA.items():
        if getattr(recipe, name) < lowest:
            raise RecipeError(f"{name} is {getattr(recipe, name)}; it must be at least {lowest:g}.")
    if not 0 <= recipe.warmup < 1:
        raise RecipeError(f"warmup is {recipe.warmup}; it is a share of the steps, from 0 to below 1.")
    if recipe.max_grad_norm <= 0:
        raise RecipeError(f"max_grad_norm is {recipe.max_grad_norm}; it must be above 0.")
    for name, settings in recipe.families.items():
        if settings.batch_size < 1 or settings.max_length < 4:
            raise RecipeError(f"families.{name}: batch_size must be at least 1 and max_length at least 4.")


def usage() -> str:
    """Return all keys of a recipe, the families' among them, with defaults and meanings, for ``--help``."""
    sections = [describe_keys(Recipe, skip=("families",))]
    for name, family in FAMILIES.items():
        sections.append(f"family {name}:\n{describe_keys(family.settings_class, f'families.{name}.')}")
    sections.append(f"LoRA of a family:\n{describe_keys(LoraSettings, 'families.<family>.lora.')}")
    return "\n".join(sections)


__all__ = ["Recipe", "build", "load_recipe", "resolved", "usage"]
