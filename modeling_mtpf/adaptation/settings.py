"""Settings that all adaptation methods share, and the result they give."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import numpy as np
from typing_extensions import Self

from ..devices import PRECISIONS
from ..errors import RecipeError
from ..settings import nearest
from .calibration import HeldOut

_LEAST = dict(
    seed=0, max_length=4, learning_rate=0, batch_size=1, steps=0, evaluations=1, patience=1, cache_gb=0
)
_CHOICES = {
    "class_weights": ("none", "balanced"),
    "mixed_precision": PRECISIONS,
    "stored_dtype": ("float16", "float32"),
}


@dataclass(frozen=True)
class LoraShape:
    """Shape of an app's LoRA; what is not set is that of ``--adapter``, or of the paper: r 32 on two layers.

    Attributes:
        layers: How many of the last layers carry LoRA. Apps share the layers below theirs.
        r: Rank.
        targets: Linear modules inside a layer; ``all`` for every one, by default query, key and MLP.
    """

    layers: int | None = None
    r: int | None = None
    targets: list[str] | None = None

    def __post_init__(self):
        names = [name.strip() for target in self.targets or () for name in target.split(",")]
        object.__setattr__(self, "targets", names or None)


SIZES = {
    "tpl": LoraShape(2, 32),
    "small": LoraShape(2, 16, ["all"]),
    "medium": LoraShape(4, 16, ["all"]),
    "large": LoraShape(256, 16, ["all"]),
}
"""Shapes by name; of an encoder with fewer layers all. docs/apps.md compares them."""

DEFAULTS = {"ner": ("medium", 2e-3), "tc": ("small", 1e-3)}
"""Family → size of a LoRA that starts fresh, and learning rate."""


CHOICES = ("score", "worst", "random", "layers")


@dataclass(frozen=True)
class SparseSettings:
    """What the method ``sparse`` trains; the values are our assumptions, see docs/apps.md.

    Attributes:
        budget: Share of the encoder's numbers that are trained; 1 trains all of a standalone app.
        choice: Which matrices: those of the best ``score``, of the ``worst``, at ``random``, or whole
            ``layers`` from the last one down; the latter two are not scored.
        beta: Weight of the gradient's norm in the score, next to its dispersion.
        score_batches: Batches by which the matrices are scored.
        learning_rate: Peak learning rate of matrices and new token vectors.
        head_learning_rate: Peak learning rate of a head that starts from a probe, as in text apps with one
            label a text.
        vocabulary: Most new tokens of a standalone app, as a share of the distinct tokens of its texts.
    """

    budget: float = 0.1
    choice: str = "score"
    beta: float = 1.0
    score_batches: int = 12
    learning_rate: float = 3e-4
    head_learning_rate: float = 5e-4
    vocabulary: float = 0.1

    def __post_init__(self):
        for name, low, high in (
            ("budget", 0, 1),
            ("beta", 0, 1e6),
            ("score_batches", 1, 10_000),
            ("learning_rate", 0, 1),
            ("head_learning_rate", 0, 1),
            ("vocabulary", 0, 1),
        ):
            if not low <= getattr(self, name) <= high:
                value = getattr(self, name)
                raise RecipeError(f"sparse.{name} is {value}; it must be from {low:g} to {high:g}.")
        if self.choice not in CHOICES:
            raise RecipeError(f"sparse.choice is {self.choice!r}; choose one of: {', '.join(CHOICES)}.")


@dataclass
class FitSettings:
    """Settings of one fit, checked. The defaults are meant to need no tuning.

    Attributes:
        seed: Of everything random in one fit.
        max_length: Longest input in tokens. A longer sentence is read in windows, of a longer text the
            beginning is fitted.
        learning_rate: Peak learning rate of LoRA and head; by default 2e-3 for NER, 1e-3 for TC. Of the
            method ``sparse`` that of a head that does not start from a probe.
        batch_size: Rows per step.
        steps: Steps of LoRA training; 0: twenty passes over the data, but 400 to 2,500 steps.
        evaluations: How often validation is scored in the course of the steps.
        patience: Training ends after this many evaluations without a better validation score.
        class_weights: ``none``, or ``balanced``: every label weighs the same however rare it is.
        mixed_precision: ``auto`` (bf16 where the device is fast at it), ``bf16`` or ``float32``.
        stored_dtype: Type in which the app is saved: ``float16``, half the size, or ``float32``. Its
            weights are rounded to it before the test scores are computed; float32 is taken, and recorded,
            where float16 cannot hold them.
        cache_gb: Memory for the outputs of the frozen trunk; rows beyond are computed again in each pass.
        progress: Show progress bars.
        refit: Fit the final LoRA on train and validation together, for as many passes as validation chose,
            which takes up to twice the time; by default for TC. Probes are always refitted.
        size: Where the LoRA is: ``small`` (the last two layers), ``medium`` (the last four) or ``large``
            (all), on all their linear modules, with rank 16; or ``tpl``, as in pre-finetuning: on query, key
            and MLP of the last two layers, with rank 32. By default medium for NER, small for TC, but of an
            ``--adapter`` the rank stays, and without a size, or with tpl, all of its shape.
        lora: Shape of the LoRA in numbers, which replace those of the size.
        sparse: What the method ``sparse`` trains.
    """

    seed: int = 0
    max_length: int = 128
    learning_rate: float | None = None
    batch_size: int = 16
    steps: int = 0
    evaluations: int = 15
    patience: int = 4
    class_weights: str = "none"
    mixed_precision: str = "auto"
    stored_dtype: str = "float16"
    cache_gb: float = 2.0
    progress: bool = False
    refit: bool | None = None
    size: str | None = None
    lora: LoraShape = field(default_factory=LoraShape)
    sparse: SparseSettings = field(default_factory=SparseSettings)

    def __post_init__(self):
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not (value >= least and math.isfinite(value)):
                raise RecipeError(f"{name} is {value}; it must be a number of at least {least}.")
        if self.seed >= 2**31:
            raise RecipeError(f"seed is {self.seed}; it must be below 2^31.")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise RecipeError(f"{name} is {getattr(self, name)!r}; choose one of: {', '.join(known)}.")

        if self.size not in (None, *SIZES):
            hint = nearest(str(self.size), list(SIZES))
            raise RecipeError(f"size is {self.size!r}; {hint}choose one of: {', '.join(SIZES)}.")

    def changed(self) -> list[str]:
        """Return the names of the settings that are not their defaults, of a part as ``lora.r``."""
        default, names = type(self)(), []
        for name, value in vars(default).items():
            mine = vars(self)[name]
            if is_dataclass(value):
                names += [f"{name}.{key}" for key, part in vars(value).items() if vars(mine)[key] != part]
            elif mine != value:
                names.append(name)
        return names

    def for_family(self, family: str, started: bool = False) -> Self:
        """Fill in what depends on the family, and on whether the LoRA is ``started`` from an adapter."""
        size, rate = DEFAULTS[family]
        size_of_start = None if self.size == "tpl" else self.size
        return replace(
            self,
            learning_rate=rate if self.learning_rate is None else self.learning_rate,
            size=size_of_start if started else self.size or size,
            refit=family == "tc" if self.refit is None else self.refit,
        )

    def shape(self, layers: int, started: bool = False) -> LoraShape:
        """Return the shape of a LoRA in an encoder of ``layers``, ``started`` from an adapter or fresh."""
        named = SIZES[self.size] if self.size else LoraShape()
        return LoraShape(
            self.lora.layers or (min(named.layers, layers) if named.layers else None),
            self.lora.r or (None if started else named.r),
            self.lora.targets or named.targets,
        )

    def steps_for(self, rows: int) -> int:
        """Return the number of optimiser steps for a training set of ``rows``."""
        return self.steps or min(max(20 * -(-rows // self.batch_size), 400), 2500)


@dataclass
class FitResult:
    """What an adaptation method reports about the app that it leaves in the model.

    Attributes:
        score: Validation score by which seeds are compared.
        validation: All validation metrics.
        details: What was chosen and counted on the way (steps, words cut off, ...).
        held_out: Scores for rows that the head was not fitted on, for its temperature; without them the
            scores stay as they are.
        calibration: What `calibrate` returned, if the app was.
        vectors: Mean vectors ``(texts, hidden)`` of fitted texts and their labels, if the method has them.
        refit: Fits the app once more, on train and validation together, under its name, which is free then.
            Called for the result that is kept alone, after what needs held-out rows was learned from them.
    """

    score: float
    validation: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    held_out: HeldOut | None = None
    calibration: dict[str, float] = field(default_factory=dict)
    vectors: tuple[np.ndarray, Sequence[str]] | None = None
    refit: Callable[[], None] | None = None
