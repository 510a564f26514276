"""Errors the user can fix. Commands print their message alone; anything else is a bug with a traceback."""

import importlib.util
import sys

from .model.errors_mtpf import AdapterError, MissingExtraError, MtpfError, first_line

__all__ = [
    "AdapterError",
    "DataError",
    "MissingExtraError",
    "MtpfError",
    "RecipeError",
    "exit_without_extra",
    "first_line",
    "require_extra",
]

PACKAGES = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
"""Module → package, where the names differ."""


class RecipeError(MtpfError):
    """A recipe or a command-line override is wrong."""


class DataError(MtpfError):
    """A data file or data set is missing, malformed, empty, or lacks a column."""


def require_extra(extra: str, *modules: str) -> None:
    """Raise `MissingExtraError` unless all modules of an extra can be imported; imports none of them."""
    for module in modules:
        if _absent(module):
            raise MissingExtraError(PACKAGES.get(module, module), extra)


def _absent(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ValueError:  # switched off in sys.modules
        return True


def exit_without_extra(extra: str, *modules: str) -> None:
    """End a script with one sentence when an extra is not installed; for use above a script's imports."""
    try:
        require_extra(extra, *modules)
    except MissingExtraError as error:
        sys.exit(f"error: {error}")
