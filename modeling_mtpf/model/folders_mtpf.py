"""Folders that are replaced whole: a reader, or a stopped process, finds the old files or the new ones."""

import ctypes
import itertools
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from .errors_mtpf import MtpfError

_TRIES = 5
_COUNTER = itertools.count()

T = TypeVar("T")


@contextmanager
def replaced_files(folder: str | os.PathLike, names: Collection[str], last: str) -> Iterator[Path]:
    """Yield an empty folder for files that then replace those of a folder, all of them at once.

    The new folder is completed next to the old one, and the two exchange their names: a single step on Linux
    and macOS. Where the file system cannot do that, or the folder is the current one, the files are replaced
    one by one, and ``last`` is missing meanwhile, so that nothing takes the folder for a complete one. The
    folder and the new files belong to the caller and its group; modes and the owners of other files stay.

    Args:
        folder: A new folder, or an existing one, whose other files stay.
        names: Files of the folder that are replaced, or removed where none is written.
        last: The one of them without which no folder is accepted.

    Raises:
        MtpfError: Nothing can be written, or the disk is full; the folder is as it was.
    """
    if "\0" in os.fspath(folder):  # type: ignore[operator]
        raise MtpfError(f"{folder!r} cannot be a folder's name: it holds the character NUL.")
    target = Path(os.path.realpath(folder))
    # Another name for each call: threads and processes may write at once.
    hidden = f".{target.name[:50]}.{os.getpid()}.{next(_COUNTER)}.tmp"
    temporary = target.with_name(hidden)
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError:  # what is above the folder cannot be written to
            if not target.is_dir():
                raise
            temporary = target / hidden
            temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _publish(temporary, target, names, last)
    except (OSError, shutil.Error) as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise MtpfError(
            f"{folder} cannot be written: {reason}. Free space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, target: Path, names: Collection[str], last: str) -> None:
    try:
        if target.is_dir() and os.name == "nt":
            target.rmdir()  # elsewhere an empty folder is replaced
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        if temporary.parent == target or Path.cwd().is_relative_to(target):
            return _replace_one_by_one(temporary, target, names, last)
        _link_others(target, temporary, names)
        if not _exchange(temporary, target):
            _replace_one_by_one(temporary, target, names, last)
    return None


def _link_others(source: Path, target: Path, names: Collection[str]) -> None:
    """Give the new folder the files that stay; another process may exchange the old folder meanwhile."""
    unfinished = re.compile(rf"\.{re.escape(source.name[:50])}\.\d+\.\d+\.tmp")  # of `replaced_files`

    def left_out(folder: str, entries: list[str]) -> list[str]:
        return [e for e in entries if folder == str(source) and (e in names or unfinished.fullmatch(e))]

    for attempt in range(_TRIES):
        try:
            shutil.copytree(
                source, target, symlinks=True, ignore=left_out, copy_function=_link, dirs_exist_ok=True
            )
            return
        except (FileNotFoundError, shutil.Error):
            if attempt == _TRIES - 1:
                raise


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        pass
    except (OSError, NotImplementedError):
        shutil.copy2(source, target)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; return whether the system could."""
    library: Any = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    paths = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "darwin":
            return library.renamex_np(*paths, 2) == 0  # RENAME_SWAP
        return library.renameat2(-100, paths[0], -100, paths[1], 2) == 0  # AT_FDCWD, RENAME_EXCHANGE
    except AttributeError:
        return False


def _replace_one_by_one(temporary: Path, target: Path, names: Collection[str], last: str) -> None:
    staged = {name: temporary / name for name in names if (temporary / name).is_file()}
    if temporary.parent != target:  # maybe another file system: nothing below may fail for lack of space
        inside = target / temporary.name
        try:
            inside.mkdir()
            for name in staged:
                shutil.copyfile(staged[name], inside / name)
            return _replace_one_by_one(inside, target, names, last)
        finally:
            shutil.rmtree(inside, ignore_errors=True)
    (target / last).unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: name == last):
        if name in staged:
            staged[name].replace(target / name)
        else:
            (target / name).unlink(missing_ok=True)
    return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_unchanged(folder: Path, read: Callable[[], T]) -> T:
    """Read several files of a folder; again, if another process has replaced them meanwhile.

    Raises:
        MtpfError: As ``read`` does; or the folder changes again and again.
    """
    for attempt in range(_TRIES):
        time.sleep(0.02 * attempt)
        before = _state(folder)
        try:
            result = read()
        except MtpfError:
            if _state(folder) == before:
                raise
            continue
        if _state(folder) == before:
            return result
    raise MtpfError(f"{folder} is being written to; try again when that is done.")


def _state(folder: Path) -> Any:
    """What differs when files of a folder, or the folder itself, are replaced."""
    try:
        with os.scandir(folder) as entries:
            files = sorted((e.name, *_identity(os.stat(e.path))) for e in entries if e.is_file())
        return os.stat(folder).st_ino, files
    except OSError:
        return None


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_mtime_ns, status.st_size
