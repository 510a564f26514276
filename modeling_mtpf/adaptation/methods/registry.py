"""Registry of adaptation methods."""

from collections.abc import Callable
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from ...data.app_data import AppData
from ...errors import RecipeError
from ...model.modeling_mtpf import MtpfModel
from ...settings import nearest
from ..settings import FitResult, FitSettings


class FitMethod(Protocol):
    """Fits an app and leaves it, LoRA and head, in the model under ``name``; the backbone stays as it is."""

    def __call__(
        self,
        model: MtpfModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        data: AppData,
        start_from: str | None,
        settings: FitSettings,
    ) -> FitResult:
        """Fit on ``data.train``, watch ``data.validation``; start from a loaded adapter if one is named."""
        ...


METHODS: dict[tuple[str, str], FitMethod] = {}
_DEFAULTS = {"ner": "lora"}
"""Family → the method that ``auto`` stands for, where it is not a method itself."""


def register_method(family: str, name: str) -> Callable[[FitMethod], FitMethod]:
    """Register a method for a family under a name that ``--method`` accepts."""

    def register(method: FitMethod) -> FitMethod:
        METHODS[family, name] = method
        return method

    return register


def method_named(family: str, name: str) -> tuple[str, FitMethod]:
    """Return a method and its name; ``auto`` is the family's default.

    Raises:
        RecipeError: The family has no such method.
    """
    name = _DEFAULTS.get(family, name) if name == "auto" else name
    if (family, name) not in METHODS:
        known = [method for of_family, method in METHODS if of_family == family]
        raise RecipeError(
            f"Unknown method {name!r} for family {family!r}; {nearest(name, known)}choose one of: "
            f"{', '.join(dict.fromkeys(['auto', *known]))}."
        )
    return name, METHODS[family, name]
