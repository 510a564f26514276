"""What a family is, a group of tasks with one pre-finetuning objective, and the registry of families.

A family is one module: a settings dataclass, the data of a step, and an objective under `register_family`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ...errors import RecipeError
from ...model.adapters_mtpf import LoraSettings


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
        work_dir: Folder for intermediate files of the run, shared by all its processes
            (`accelerate.PartialState`).
    """

    tokenizer: PreTrainedTokenizerBase
    seed: int
    work_dir: Path


@dataclass
class FamilyBatch:
    """One family's rows of a step, not yet padded.

    Attributes:
        rows: Sub-word ids of each row, with special tokens.
        labels: One label per sub-word of each row (`IGNORE` where there is none), or None.
        targets: What else `Objective.loss` needs, as tensors.
        source: Name of the data source, for messages.
        row_numbers: Row of the source that each row comes from, for messages.
        counts: What the run adds up, e.g. words that were cut off.
    """

    rows: list[np.ndarray]
    labels: list[np.ndarray] | None = None
    targets: dict[str, torch.Tensor] = field(default_factory=dict)
    source: str = ""
    row_numbers: list[int] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


class Objective(nn.Module, ABC):
    """A family's loss in two stages, so that a batch can be larger than memory.

    ``forward`` reduces hidden states to what the loss needs of each row. It sees the rows in pieces, and with
    gradient caching a second time in the backward pass. ``loss`` sees the whole batch, once.

    Attributes:
        needs_start: Whether ``loss`` needs the target ``start``: what ``forward`` returns for the same rows
            from the encoder before training. Costs one forward pass more.
    """

    needs_start: bool = False

    @abstractmethod
    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Return float32 ``(rows, features)`` from ``(rows, tokens, hidden)`` and ``(rows, tokens)``."""

    @abstractmethod
    def loss(
        self, rows: torch.Tensor, targets: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return this process's loss and metrics from all its rows, in the order of the batch.

        The mean of all processes' losses must be the loss of the joined batch (see `distributed`).
        """


class Family(ABC):
    """One group of tasks: how data becomes batches, and hidden states a loss."""

    settings_class: ClassVar[type[FamilySettings]] = FamilySettings

    def __init__(self, name: str, settings: Any):
        self.name, self.settings = name, settings

    @abstractmethod
    def prepare(self, context: RunContext) -> None:
        """Open the data; raise `DataError` for what is wrong with it."""

    @abstractmethod
    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> FamilyBatch:
        """Return this process's part of the batch of a step: a pure function of its arguments."""

    @abstractmethod
    def objective(self, hidden_size: int) -> Objective:
        """Build the loss. Its parameters are trained with the run and thrown away afterwards."""

    def describe(self) -> dict[str, Any]:
        """Return what ``run.json`` records about the data: sources, sizes, fingerprints."""
        return {}

    def share(self, rows: list[int], rank: int, world_size: int) -> list[int]:
        """Return this process's rows of a batch."""
        if len(rows) % world_size:
            size = f"families.{self.name}.batch_size is {len(rows)}"
            raise RecipeError(f"{size}; it must be a multiple of the {world_size} processes.")
        return rows[rank::world_size]


FAMILY_CLASSES: dict[str, type[Family]] = {}
"""Name in a recipe → class."""


def register_family(name: str):
    """Class decorator that makes a family available to recipes under ``families.<name>``.

    Example:
        >>> @register_family("toy")
        ... class ToyFamily(Family): ...
        >>> "toy" in FAMILY_CLASSES
        True
        >>> _ = FAMILY_CLASSES.pop("toy")
    """

    def register(cls: type[Family]) -> type[Family]:
        FAMILY_CLASSES[name] = cls
        return cls

    return register
