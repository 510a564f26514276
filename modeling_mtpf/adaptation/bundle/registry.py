"""Registry of the methods that make a bundle, and what they work on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ...data.app_data import AppData
from ...errors import RecipeError
from ...model.adapters_mtpf import AdapterHead
from ...model.modeling_mtpf import MtpfModel
from ...model.prefix_mtpf import Prefixes
from ...model.trunk_mtpf import TrunkOutput
from ...settings import nearest
from ..calibration import HeldOut
from ..fit_state import FitStates
from .low_rank import Matrices
from .settings import BundleSettings


class Parametrisation(Protocol):
    """How the LoRA of a bundle is made from what is trained.

    One that makes a prefix, too, has a method ``prefixes()``.
    """

    parameters: list[nn.Parameter]

    def matrices(self, part: str | None) -> Matrices:
        """Return the LoRA as it is now, with gradients to the parameters.

        ``part`` names the part of the batch, for a method in which parts differ while it trains; ``None`` is
        the LoRA that the bundle will have.
        """
        ...


class BundleTail(Protocol):
    """The last layers with the LoRA as it is now."""

    def __call__(self, trunk: TrunkOutput, part: str | None) -> torch.Tensor:
        """Return hidden states ``(rows, tokens, hidden)`` of the batch of a part."""
        ...


class Objective(Protocol):
    """What a bundle learns from: labels, or the results of the apps."""

    steps: int
    record: dict[str, Any]

    def losses(
        self, tail: BundleTail, heads: dict[str, AdapterHead], settings: BundleSettings, start: int = 0
    ) -> Iterator[torch.Tensor]:
        """Yield the loss of each step after the first ``start`` ones, computed when it is asked for."""
        ...

    def validate(self, tail: BundleTail, heads: dict[str, AdapterHead]) -> "dict[str, Validation]":
        """Score each part on its validation rows."""
        ...


class Validation(NamedTuple):
    """A part on its validation rows: what is compared, all metrics, and scores for the head's temperature."""

    score: float
    metrics: dict[str, Any]
    held_out: HeldOut | None = None


@dataclass
class JobPart:
    """A part whose data is read, and whose app, named ``source``, is loaded under the name ``app``."""

    name: str
    family: str
    weight: float | None
    data: AppData | None = None
    app: str | None = None
    source: str = ""


@dataclass
class Job:
    """What a method works on.

    Attributes:
        model: The frozen backbone in eval mode, with the apps of ``parts`` in it.
        tokenizer: For words.
        parts: In the order of the bundle.
        texts: Unlabelled ones.
        start: Loaded adapter whose LoRA a fresh one starts from.
        settings: With the seed of this fit.
        name: Of the bundle.
        apart: Whether each part gets a LoRA, so that it is an app at run time.
        rounds: Whether parts take turns in training; else each step's part is drawn alone.
        states: Where a stopped fit resumes from, if its result will be saved.
        cache: What does not depend on the seed, for the fits with the next ones.
    """

    model: MtpfModel
    tokenizer: PreTrainedTokenizerBase
    parts: list[JobPart]
    texts: list[str]
    start: str | None
    settings: BundleSettings
    name: str
    apart: bool = False
    rounds: bool = False
    states: FitStates | None = None
    cache: dict[Any, Any] = field(default_factory=dict)


@dataclass
class BundleFit:
    """What a method returns.

    Attributes:
        matrices: The LoRA of the bundle; empty where each part has one.
        heads: By part.
        validation: By part.
        details: Of the fit: steps, scores of evaluations, ...
        composition: More for the record of how the LoRA was made.
        apart: LoRA of each part, of a method that gives each part one.
        prefixes: The prefix of the bundle, of a method that makes one.
    """

    matrices: Matrices
    heads: dict[str, AdapterHead]
    validation: dict[str, Validation]
    details: dict[str, Any] = field(default_factory=dict)
    composition: dict[str, Any] = field(default_factory=dict)
    apart: dict[str, Matrices] = field(default_factory=dict)
    prefixes: Prefixes = field(default_factory=dict)

    @property
    def loras(self) -> list[Matrices]:
        """The LoRA of the bundle, or that of each part."""
        return list(self.apart.values()) or [self.matrices]

    @property
    def score(self) -> float:
        """Mean of the parts' validation scores; 0 without any."""
        return sum(part.score for part in self.validation.values()) / max(len(self.validation), 1)


class BundleMethod(NamedTuple):
    """A method: a function, and what `register_bundle_method` was told of it."""

    fit: Callable[[Job], BundleFit]
    needs: str
    stored: bool = True
    apart: bool = False
    trains: bool = True
    random: bool = True


BUNDLE_METHODS: dict[str, BundleMethod] = {}


def register_bundle_method(name: str, needs: str, **told: bool) -> Callable[[Callable], Callable]:
    """Register a method.

    Args:
        name: By which it is chosen.
        needs: ``apps`` to compose, or ``data`` to train from.
        **told: ``stored=False`` for one that cannot be written as a LoRA, and is for evaluation;
            ``apart=True`` for one that gives each part a LoRA, which is saved as an app; ``trains=False`` for
            one that trains the heads at most; ``random=False`` for one whose LoRA is the same for every seed.
    """

    def register(fit: Callable[[Job], BundleFit]) -> Callable[[Job], BundleFit]:
        BUNDLE_METHODS[name] = BundleMethod(fit, needs, **told)
        return fit

    return register


def bundle_method(name: str, needs: str | None = None) -> BundleMethod:
    """Return a method by name.

    Raises:
        RecipeError: There is no such method, or none of this kind.
    """
    known = [key for key, method in BUNDLE_METHODS.items() if needs in (None, method.needs)]
    if name in BUNDLE_METHODS and name not in known:
        what, command = ("trains from data", "adapt --bundle")
        if needs == "data":
            what, command = "composes apps", "compose"
        raise RecipeError(f"The method {name} {what}; use it with: mtpf {command}")
    if name not in known:
        raise RecipeError(
            f"Unknown method {name!r} of making a bundle; {nearest(name, known)}choose one of: "
            f"{', '.join(known)}."
        )
    return BUNDLE_METHODS[name]
