"""The ways of fitting an app, by family and name. One module each; a further one registers itself here."""

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
DEFAULTS = {"ner": "lora", "tc": "probe"}
"""Family → the way that ``auto`` stands for."""


def register_method(family: str, name: str) -> Callable[[FitMethod], FitMethod]:
    """Make a way of fitting known under a name that ``--method`` accepts."""

    def register(method: FitMethod) -> FitMethod:
        METHODS[family, name] = method
        return method

    return register


def method_named(family: str, name: str) -> tuple[str, FitMethod]:
    """Return a way of fitting and its name; ``auto`` is the family's default.

    Raises:
        RecipeError: No such way for this family.
    """
    name = DEFAULTS[family] if name == "auto" else name
    if (family, name) not in METHODS:
        known = [own for own_family, own in METHODS if own_family == family]
        raise RecipeError(
            f"Unknown method {name!r} for family {family!r}; {nearest(name, known)}choose one of: "
            f"{', '.join(['auto', *known])}."
        )
    return name, METHODS[family, name]


__all__ = ["DEFAULTS", "METHODS", "FitMethod", "method_named", "register_method"]
