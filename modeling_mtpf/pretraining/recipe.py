"""Recipes: typed settings of a run, read from YAML and overridden on the command line."""

import argparse
import importlib.util
import logging
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..devices import PRECISIONS
from ..errors import RecipeError
from ..settings import build, nearest, parse
from .families import ner, tc  # noqa: F401  both register themselves
from .families.base import FAMILY_CLASSES, FamilySettings
from .joint import REGIMES

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]
FOLDERS = (PACKAGE / "recipes", PACKAGE.parent / "train" / "recipes")
"""Where recipes with a bare name are: in a wheel, and in a checkout."""

EXAMPLES = """\
  mtpf pretrain laptop --families.ner.data labels --families.tc.pairs PAIRS --output_dir runs/laptop
  mtpf pretrain my.yaml --resume auto
  torchrun --nproc_per_node 2 -m modeling_mtpf.cli pretrain my.yaml --regime naive --steps 5000
"""


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


@dataclass
class _Overrides(Recipe):
    """What only the command line accepts.

    Attributes:
        demo: Ignored; accepted from older command lines.
    """

    demo: bool = False


def known_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(file.stem for folder in FOLDERS for file in folder.glob("*.yaml"))


def load_recipe(arguments: list[str], prog: str = "mtpf pretrain") -> Recipe:
    """Build a recipe from command-line arguments: a recipe, if named, then ``--key value`` overrides.

    Raises:
        RecipeError: An unknown key or family, a value of the wrong type, a missing file.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    values = _read_yaml(find_recipe(arguments[0])) if named else {}
    overrides = arguments[1:] if named else arguments
    # Plugins and families come first: what else is accepted depends on them.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--plugins", nargs="*", action="extend", default=[])
    plugins = values.get("plugins") or []
    _load_plugins([plugins] if isinstance(plugins, str) else plugins)
    listed = ",".join(early.parse_known_args(overrides)[0].plugins).strip("[]")
    _load_plugins([plugin.strip() for plugin in listed.split(",") if plugin.strip()])
    names = re.findall(r"(?m)^--families\.(\w+)", "\n".join(overrides))
    for name in [*(values.get("families") or {}), *names]:
        if name not in FAMILY_CLASSES:
            hint, known = nearest(name, list(FAMILY_CLASSES)), ", ".join(sorted(FAMILY_CLASSES))
            raise RecipeError(
                f"Unknown family {name!r}; {hint}known: {known}. Name a module of another one in plugins."
            )
    sections = {"families": {name: family.settings_class for name, family in FAMILY_CLASSES.items()}}
    description = (
        "Pre-finetune one encoder for all families: one forward, one backward, a LoRA for each family. The\n"
        f"first argument may be a recipe, a YAML file or one of: {', '.join(known_recipes())}.\n"
        "Without a recipe the families whose data is named are trained with the defaults below."
    )
    _merge(values, parse(_Overrides, overrides, prog, description, EXAMPLES, sections))
    if values.pop("demo", None) not in (None, False, "false"):
        logger.warning("The key 'demo' is ignored: the demo is train/pretrain.py without recipe and data.")
    recipe = build(Recipe, values, sections=sections)
    _check(recipe)
    return recipe


def find_recipe(name: str) -> Path:
    """Return the file of a recipe, named by path or by its bare name in the package.

    Raises:
        RecipeError: There is none.
    """
    path = Path(name)
    folders = FOLDERS if path.parent == Path(".") else ()
    for file in (path, *(folder / f"{path.stem}.yaml" for folder in folders)):
        if file.is_file():
            return file
    known = known_recipes()
    raise RecipeError(
        f"There is no recipe {name}; {nearest(path.stem, known)}known: {', '.join(known)}, or a YAML file."
    )


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        if isinstance(value, dict):
            value = _merge(values.get(key) or {}, value)
        values[key] = value
    return values


def _read_yaml(path: Path) -> dict[str, Any]:
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


def _check(recipe: Recipe) -> None:
    regimes = [*REGIMES, *recipe.families]
    if recipe.regime not in regimes:
        hint = nearest(recipe.regime, regimes)
        raise RecipeError(f"Unknown regime {recipe.regime!r}; {hint}choose one of: {', '.join(regimes)}.")
    if recipe.regime != "base" and not recipe.families:
        raise RecipeError(
            f"There is nothing to train on; name a recipe ({', '.join(known_recipes())}, or a YAML file), or "
            "data: --families.ner.data LABELS, --families.tc.pairs PAIRS. The demo is `make pretrain` in the "
            "repository."
        )
    if recipe.mixed_precision not in PRECISIONS:
        raise RecipeError(f"mixed_precision is {recipe.mixed_precision!r}; choose {', '.join(PRECISIONS)}.")
    if not 0 <= recipe.warmup < 1:
        raise RecipeError(f"warmup is {recipe.warmup}; it is a share of the steps, from 0 to below 1.")
    if recipe.max_grad_norm <= 0:
        raise RecipeError(f"max_grad_norm is {recipe.max_grad_norm}; it must be above 0.")
    for name, value in vars(recipe).items():
        lowest = 1 if name in ("steps", "gradient_accumulation_steps", "log_every", "keep") else 0
        if isinstance(value, (int, float)) and value < lowest:
            raise RecipeError(f"{name} is {value}; it must be at least {lowest}.")
    for name, settings in recipe.families.items():
        if settings.batch_size < 1 or settings.max_length < 4:
            raise RecipeError(f"families.{name}: batch_size must be at least 1 and max_length at least 4.")
