"""Families: groups of tasks with one pre-finetuning objective, and the registry that recipes choose from.

A family is one module: a settings dataclass, the data of a step, and an objective. Register it with
[`register_family`] and name it in a recipe; nothing else changes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..adapters_mtpf import LoraSettings
from ..errors import RecipeError


@dataclass
class FamilySettings:
    """What every family has in a recipe.

    Attributes:
        batch_size: Examples per step, over all processes.
        max_length: Longest row in sub-words.
        weight: Factor of this family's loss in the sum (λ; our assumption: 1).
        lora: Shape of the task-primary LoRA.
    """

    batch_size: int = 32
    max_length: int = 64
    weight: float = 1.0
    lora: LoraSettings = field(default_factory=LoraSettings)


@dataclass
class RunContext:
    """What a family may use to open its data.

    Attributes:
        tokenizer: The backbone's tokenizer, made for split words.
        seed: Seed of the run.
        work_dir: Folder for intermediate files of the run.
        is_main: Whether this process is the one that writes and shows progress.
        barrier: Waits for all processes.
    """

    tokenizer: PreTrainedTokenizerBase
    seed: int
    work_dir: Path
    is_main: bool = True
    barrier: Any = staticmethod(lambda: None)


@dataclass
class FamilyBatch:
    """One family's rows of a step.

    Attributes:
        inputs: Encoder inputs, each ``(rows, tokens)``.
        targets: Whatever the objective needs, as tensors.
    """

    inputs: dict[str, torch.Tensor]
    targets: dict[str, torch.Tensor]


class Family(ABC):
    """One group of tasks. Subclasses say how data becomes batches and how hidden states become a loss."""

    settings_class: ClassVar[type[FamilySettings]] = FamilySettings

    def __init__(self, name: str, settings: FamilySettings):
        self.name = name
        self.settings: Any = settings

    @abstractmethod
    def prepare(self, context: RunContext) -> None:
        """Open the data; raise `DataError` for what is wrong with it."""

    @abstractmethod
    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> FamilyBatch:
        """Return this process's part of the batch of a step: a pure function of its arguments."""

    @abstractmethod
    def objective(self, hidden_size: int) -> nn.Module:
        """Build the module ``(hidden_states, attention_mask, targets) -> (loss, {metric: value})``.

        Its parameters are trained with the run and thrown away afterwards.
        """

    def describe(self) -> dict[str, Any]:
        """Return what ``run.json`` records about the data: sources, sizes, fingerprints, truncation."""
        return {}

    def share(self, rows: list[int], rank: int, world_size: int) -> list[int]:
        """Return this process's rows of a batch."""
        if len(rows) % world_size:
            raise RecipeError(
                f"families.{self.name}.batch_size is {len(rows)}; it must be a multiple of the "
                f"{world_size} processes."
            )
        return rows[rank::world_size]


FAMILIES: dict[str, type[Family]] = {}


def register_family(name: str):
    """Class decorator that makes a family available to recipes under ``families.<name>``.

    Example:
        >>> @register_family("toy")
        ... class ToyFamily(Family): ...
        >>> "toy" in FAMILIES
        True
        >>> _ = FAMILIES.pop("toy")
    """

    def register(cls: type[Family]) -> type[Family]:
        FAMILIES[name] = cls
        return cls

    return register


__all__ = ["FAMILIES", "Family", "FamilyBatch", "FamilySettings", "RunContext", "register_family"]
