"""Registry of adaptation methods."""

from collections.abc import Callable, Iterable
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


_UNUSED: dict[tuple[str, str], frozenset[str]] = {}


def register_method(family: str, name: str, unused: Iterable[str] = ()) -> Callable[[FitMethod], FitMethod]:
    """Register a method for a family under a name that ``--method`` accepts.

    ``unused`` are the fields of `FitSettings`, ``lora.targets`` for one of a part, that it does not read; a
    fit in which one of them is set is refused.
    """

    def register(method: FitMethod) -> FitMethod:
        METHODS[family, name] = method
        _UNUSED[family, name] = frozenset(unused)
        return method

    return register


def uses(family: str, name: str, key: str, standalone: bool = False) -> bool:
    """Say whether a method reads a setting."""
    unused = _UNUSED[family, name]
    unused |= {"lora.r"} if standalone else {"sparse.vocabulary"}  # one has no LoRA, the others no new tokens
    return not unused & {key, key.partition(".")[0]}


def check_used(family: str, name: str, settings: FitSettings, standalone: bool = False) -> None:
    """Raise `RecipeError` for a setting that is not its default and that the method does not use."""
    for key in settings.changed():
        if not uses(family, name, key, standalone):
            what = f"standalone apps of {family}" if standalone else f"the method {name} for {family}"
            others = [other for of, other in METHODS if of == family and uses(of, other, key)]
            way = f", or choose the method {' or '.join(others)}" if others else ""
            way = ", or add --standalone" if key == "sparse.vocabulary" and name == "sparse" else way
            raise RecipeError(f"{key} is not a setting of {what}; leave it out{way}.")


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
