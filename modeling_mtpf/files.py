"""Files that are either complete or absent."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import DataError

log = logging.getLogger(__name__)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an error of the operating system about a file into one sentence with the remedy."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(
            f"{path} cannot be written: {reason}. Free space or choose another folder, then run the same "
            "command again; it resumes where it can."
        ) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that appears only when it is complete and on disk, whatever happens meanwhile.

    Raises:
        DataError: The disk is full, or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold the lock of a file or folder among processes; the lock is a hidden file next to it, which stays.

    In a folder with files whose parent cannot be written to, it is inside.

    Raises:
        Timeout: Another process has held it for ``timeout`` seconds; by default there is no limit.
        DataError: Neither can be written to.
    """
    inside = path.is_dir() and any(path.iterdir()) and not os.access(path.parent, os.W_OK)
    lock = FileLock(path / ".lock" if inside else path.with_name(f".{path.name[:200]}.lock"))
    waits = False
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:  # an OSError
            waits = True
    if waits:
        if timeout:
            log.warning("Another process is writing to %s; waiting for it.", path)
        lock.acquire(timeout=timeout)
    try:
        yield
    finally:
        lock.release()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
