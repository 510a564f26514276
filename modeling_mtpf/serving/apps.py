"""Apps as files: read whole at one moment, from a folder or the Hub, with the revision that answers name."""

import hashlib
import json
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import AdapterError, MtpfError
from ..model.adapter_files_mtpf import ADAPTER_FILES, MAX_ADAPTER_BYTES, TASK_FILE, find_adapter
from ..model.folders_mtpf import read_unchanged
from ..model.schemas_mtpf import DELTA_FILE
from ..model.sources_mtpf import find_on_hub, is_hub_id


@dataclass(frozen=True)
class AppFiles:
    """The files of an app, as they were at one moment.

    Attributes:
        source: Where they came from, as clients may see it: no path of the server.
        revision: The commit on the Hub, or 40 hexadecimal digits of the sha256 of names and contents.
        files: Name → content.
    """

    source: str
    revision: str
    files: dict[str, bytes] = field(repr=False)

    @property
    def name(self) -> str:
        """The name that the app records, else that of its folder or repo."""
        with suppress(ValueError, AttributeError):
            return str(json.loads(self.files.get(TASK_FILE, b"")).get("name") or Path(self.source).name)
        return Path(self.source).name

    def write(self, folder: Path) -> None:
        """Write them into an empty folder."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


def read_app(source: str, revision: str | None = None) -> AppFiles:
    """Read an app that the operator named: a folder, or a Hub id.

    Raises:
        AdapterError: There is no such app, or it is too large.
    """
    folder = Path(source)
    return _read_folder(folder, folder.resolve().name) if folder.is_dir() else _read_repo(source, revision)


def _read_folder(folder: Path, shown: str, check: Callable[[Path], None] = lambda path: None) -> AppFiles:
    """Read the files of a folder; again if it is replaced meanwhile."""
    if (folder / DELTA_FILE).is_file():
        raise AdapterError(
            f"{shown} is a standalone app, which shares no trunk; mtpf apply-delta makes a backbone and app "
            "of it."
        )

    def read() -> dict[str, bytes]:
        files: dict[str, bytes] = {}
        for name in sorted(ADAPTER_FILES):
            if (folder / name).exists():
                check(folder / name)
                files[name] = _read_file(folder / name, MAX_ADAPTER_BYTES - sum(map(len, files.values())))
        return files

    try:
        files = read_unchanged(folder, read)
    except OSError as error:
        raise AdapterError(f"{shown} cannot be read: {error.strerror}.") from error
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return AppFiles(shown, digest.hexdigest()[:40], files)


def _read_file(path: Path, most: int) -> bytes:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > most:
        raise AdapterError(f"{path.name} is not a file, or the app exceeds {MAX_ADAPTER_BYTES:,} bytes.")
    with path.open("rb") as file:
        return file.read(most)


def _read_repo(repo: str, revision: str | None) -> AppFiles:
    commit = find_on_hub(repo, revision, error=AdapterError).resolved
    app = _read_folder(find_adapter(repo, commit), repo)
    return AppFiles(repo, commit, app.files)


@dataclass(frozen=True)
class AllowedSources:
    """What may be loaded at a request: folders below a root, and repos of the Hub.

    Attributes:
        root: Folder of the apps; without one, none is read from folders.
        repos: Hub ids; ``*`` stands for anything, as in ``ada/*``.
    """

    root: Path | None = None
    repos: tuple[str, ...] = ()

    def read(self, folder: str | None, repo: str | None, revision: str | None) -> AppFiles:
        """Read an app that a request named.

        Raises:
            AdapterError: It is not allowed, or cannot be used.
        """
        if repo is not None:
            if not is_hub_id(repo) or not any(fnmatchcase(repo, pattern) for pattern in self.repos):
                raise AdapterError(
                    f"The repo {repo!r} is not allowed; the operator lists them: --allow_repo."
                )
            if Path(repo).exists():  # find_adapter would read it
                raise AdapterError(f"{repo!r} is a local path of the server; it cannot be loaded as a repo.")
            return _read_repo(repo, revision)
        if self.root is None:
            raise AdapterError("No folder is allowed; the operator names their root: --apps_root.")
        root = self.root.resolve()

        def check(path: Path) -> None:
            if not path.resolve().is_relative_to(root):
                raise AdapterError(f"The folder {folder!r} leads out of the root of apps.")

        try:
            path = root / str(folder)
            check(path)
            if path == root or not path.is_dir():
                raise AdapterError(f"There is no folder {folder!r} in the root of apps.")
            return _read_folder(path, str(folder), check)
        except MtpfError:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # a name too long, NUL, a loop of links
            raise AdapterError(f"{str(folder)[:80]!r} cannot be the name of a folder.") from error
