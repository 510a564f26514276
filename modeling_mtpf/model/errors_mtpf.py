"""Errors the user can fix."""

from collections.abc import Iterator
from contextlib import contextmanager


class MtpfError(ValueError):
    """A mistake in what the user gave: one sentence that names it, what is accepted and how to fix it."""


class AdapterError(MtpfError):
    """An adapter is missing, damaged, not allowed, or does not fit the backbone."""


class ShapeMismatchError(MtpfError, RuntimeError):
    """Tensors of a checkpoint do not fit its config, for which transformers raises a ``RuntimeError``."""


class MissingExtraError(MtpfError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str):
        super().__init__(f"This needs the package {package!r}; install it with: pip install 'mtpf[{extra}]'")


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error's message, or the error's type where it has none.

    Example:
        >>> first_line(OSError("no such file\nTraceback ...")), first_line(KeyError())
        ('no such file', 'KeyError')
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def in_one_sentence(what: str) -> Iterator[None]:
    """Turn what a library raises into an `MtpfError`, and a panic of Rust, which is not an `Exception`."""
    try:
        yield
    except MtpfError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise MtpfError(f"{what}: {first_line(error)[:300]}") from error
