"""Errors that a user can mend. Scripts print their message alone; all else is a bug and shows a traceback."""

import importlib.util
import sys

PACKAGES = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
"""Module → package, where the names differ."""


class MtpfError(ValueError):
    """A mistake in what the user gave: one sentence that names it, what is accepted and how to mend it."""


class RecipeError(MtpfError):
    """A recipe or a command-line override is wrong."""


class DataError(MtpfError):
    """A data file or data set is missing, malformed, empty, or lacks a column."""


class MissingExtraError(MtpfError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str):
        super().__init__(f"This needs the package {package!r}; install it with: pip install 'mtpf[{extra}]'")


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


__all__ = ["DataError", "MissingExtraError", "MtpfError", "RecipeError", "require_extra"]
