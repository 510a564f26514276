"""Many machines, on Ray: the server as a Ray Serve deployment, and Ray Data over folders of files.

Ray schedules, retries, balances and scales; here is what it runs.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve

from ..errors import DataError, first_line
from ..files import write_atomically
from .apps import AppFiles

REGISTRY = "mtpf-apps"


@ray.remote(num_cpus=0, max_restarts=-1)
class _Registry:
    """The apps that requests have added or, with ``None``, removed; a new replica begins with them."""

    def __init__(self) -> None:
        self.apps: dict[str, AppFiles | None] = {}

    def change(self, name: str, app: AppFiles | None) -> None:
        self.apps[name] = app

    def revisions(self) -> dict[str, str | None]:
        return {name: app.revision if app else None for name, app in self.apps.items()}

    def read(self, name: str) -> AppFiles | None:
        return self.apps[name]


def deployment(
    engine: Callable[[], Any], application: Callable[[Any, Any], Any], name: str = "mtpf", **options: Any
) -> Any:
    """Return the server as a Ray Serve application, for ``serve.run(..., name=name)``.

    An app that one replica adds or removes is announced to all replicas before the request is answered; what
    a replica misses, while it starts, it learns at its next health check.

    Args:
        engine: Makes a replica's engine, with the apps that all have from the start.
        application: From an engine and ``announce`` to the FastAPI application, see `create_application`.
        name: Of the Ray Serve application.
        **options: Of Ray's deployment: ``num_replicas``, ``autoscaling_config``, ``ray_actor_options``, ...
    """

    @serve.deployment(name="MtpfServer", **options)
    @serve.ingress(None)
    class MtpfServer:
        def __init__(self) -> None:
            registry = _Registry.options(  # type: ignore[attr-defined]
                name=f"{REGISTRY}-{name}", get_if_exists=True, lifetime="detached"
            )
            self.registry = registry.remote()
            self.engine = engine()
            self.changing = asyncio.Lock()
            self.known: dict[str, str | None] = {}

        def __serve_build_asgi_app__(self) -> Any:
            self.application = application(self.engine, self.announce)
            return self.application

        async def announce(self, app_name: str, app: AppFiles | None) -> None:
            await self.registry.change.remote(app_name, app)
            handle = serve.get_deployment_handle("MtpfServer", name)
            await asyncio.to_thread(handle.broadcast("check_health").results)

        async def check_health(self) -> None:
            """Load and remove what other replicas announced."""
            async with self.changing:
                revisions = await self.registry.revisions.remote()
                for app_name, revision in revisions.items():
                    if self.known.get(app_name, "") == revision:
                        continue
                    app = await self.registry.read.remote(app_name)
                    change = self.application.state.batcher.change
                    if app is None and app_name in self.engine.apps:
                        await change(self.engine.remove, app_name)
                    elif app is not None:
                        await change(self.engine.add, app_name, app)
                    self.known[app_name] = revision

    return MtpfServer.bind()  # type: ignore[attr-defined]


@dataclass
class FilePredictor:
    """Makes the results of one file; every worker of Ray Data has one, with the model loaded once.

    Attributes:
        load: Loads what predicts: from a file to the lines of its results.
        output: Folder of the results.
    """

    load: Callable[[], Callable[[str], Iterable[str]]]
    output: Path

    def __post_init__(self) -> None:
        self.lines = self.load()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write the results of a file, all or nothing; return the error that the user can fix, if any."""

        def write(path: Path) -> None:
            with path.open("w", encoding="utf-8", errors="backslashreplace") as stream:
                stream.writelines(self.lines(row["file"]))

        try:
            write_atomically(self.output / row["result"], write)
        except ValueError as error:  # MtpfError, a text that is too long
            return {**row, "error": first_line(error)}
        return {**row, "error": ""}


def predict_files(
    files: list[str], output: Path, load: Callable[[], Callable[[str], Iterable[str]]], workers: int
) -> str:
    """Predict every file whose results are missing, with Ray Data; return what was done.

    Args:
        files: Files and folders of files.
        output: Folder for ``<path>.jsonl``, one for each file; existing ones are skipped.
        load: See `FilePredictor`; run once in each worker.
        workers: Processes at once.

    Raises:
        DataError: Some files could not be predicted; the others have their results.
    """
    every: dict[str, str] = {}
    for name, file in _results(files):
        if name in every:
            raise DataError(f"{every[name]} and {file} would both be written to {name}; predict them apart.")
        every[name] = file
    todo = [{"file": file, "result": name} for name, file in every.items() if not (output / name).exists()]
    rows: list[dict[str, Any]] = []
    if todo:
        data = ray.data.from_items(todo, override_num_blocks=len(todo))
        predictor: Any = FilePredictor  # a class, which Ray's types do not know
        options: dict[str, Any] = {"concurrency": min(workers, len(todo)), "num_cpus": 1}
        rows = data.map(predictor, fn_constructor_args=(load, output), **options).take_all()
    if failed := [row for row in rows if row["error"]]:
        raise DataError(f"{failed[0]['error']} {len(failed)} of {len(every)} files have no results.")
    return f"{len(rows)} files predicted, {len(every) - len(todo)} had results: {output}"


def _results(files: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the name of each file's results and the file."""
    for name in files:
        path = Path(name).resolve()
        if path.is_dir():
            inside = (p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith("."))
            yield from ((f"{p.relative_to(path)}.jsonl", str(p)) for p in inside)
        elif path.is_file():
            yield f"{path.name}.jsonl", str(path)
        else:
            raise DataError(f"There is no file or folder {name}.")
