"""What applies apps to texts: the model in torch, or an ONNX export."""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..devices import release_free_memory
from ..errors import AdapterError, MtpfError
from ..model.adapter_files_mtpf import read_task
from ..model.schemas_mtpf import BUNDLE
from .apps import AppFiles

_SHOWN = ("kind", "family", "labels", "max_length", "problem_type", "parts")
"""Entries of an app's ``task.json`` that clients see."""


def app_of(name: str, apps: dict[str, dict[str, Any]]) -> str | None:
    """Return the loaded app that a request means: by name, as ``bundle/part``, or by the name of a part."""
    base = name.partition("/")[0]
    if base in apps or "/" in name:
        return base if base in apps else None
    parts = (app for app, shown in apps.items() if any(p.get("name") == name for p in shown.get("parts", ())))
    return next(parts, None)


class TorchEngine:
    """Apps on one `MtpfModel`. Calls must not overlap: the caller owns the thread.

    Args:
        model: Without apps, or with some that are not served.
    """

    one_app_per_text = True
    """Whether `predict` takes an app for each text."""

    def __init__(self, model: Any):
        self.model = model.eval()
        self.apps: dict[str, dict[str, Any]] = {}

    def add(self, name: str, app: AppFiles) -> None:
        """Add or replace an app; on failure the old one stays.

        Raises:
            AdapterError: It is damaged, is not an app, or does not fit this backbone.
        """
        with TemporaryDirectory(prefix="mtpf-app-") as folder:
            try:
                app.write(Path(folder))
                task = read_task(Path(folder))
                if not (task.get("labels") or task.get("parts")):
                    raise AdapterError(f"{app.source} is a family's LoRA, not an app: it has no head.")
                self.model.load_adapter(folder, name, replace=True, activate=False)
            except MtpfError as error:
                raise AdapterError(str(error).replace(folder, app.source)) from error
        shown = {key: task[key] for key in _SHOWN if task.get(key) is not None}
        self.apps[name] = {"name": name, "source": app.source, "revision": app.revision, **shown}
        release_free_memory()  # what apps that are gone leave between others

    def remove(self, name: str) -> None:
        """Remove an app."""
        self.model.delete_adapter(name)
        del self.apps[name]
        release_free_memory()  # what apps that are gone leave between others

    def predict(
        self,
        texts: list[str],
        apps: list[str],
        paired: bool,
        top_k: int,
        threshold: float | None,
        in_scope: bool = False,
    ) -> Any:
        """Apply all apps to all texts and return a list for each app; or, paired, one app to each text."""
        names: dict[str, Any] = {"adapter_names": apps} if paired else {"adapters": apps}
        return self.model.predict(texts, **names, top_k=top_k or None, threshold=threshold, in_scope=in_scope)


class OnnxEngine:
    """The apps of one ONNX export, for instance with 8-bit weights; they are fixed while it is served.

    Args:
        runner: A `modeling_mtpf.export.runner.Runner`.
    """

    one_app_per_text = False

    def __init__(self, runner: Any):
        self.runner = runner
        self.apps = {}
        for name, app in runner.apps.items():
            shown = {key: copy.copy(app[key]) for key in _SHOWN if app.get(key) is not None}
            if app["kind"] != BUNDLE:
                shown.pop("parts", None)  # the runner's own table of heads
            else:
                heads = app["parts"].values()
                shown["parts"] = [{key: part[key] for key in ("name", "kind", "labels")} for part in heads]
            revision = runner.manifest["apps"][name]["sha256"][:40]
            self.apps[name] = {"name": name, "source": "export", "revision": revision, **shown}

    def add(self, name: str, app: AppFiles) -> None:
        """Refuse: an export is changed by ``mtpf export``."""
        raise MtpfError("An export's apps are fixed; add apps with mtpf export, then start the server again.")

    def remove(self, name: str) -> None:
        """Refuse, as `add` does."""
        self.add(name, AppFiles("", "", {}))

    def predict(
        self,
        texts: list[str],
        apps: list[str],
        paired: bool,
        top_k: int,
        threshold: float | None,
        in_scope: bool = False,
    ) -> Any:
        """Apply all apps to all texts; return a list for each app.

        Raises:
            MtpfError: Something else than the best label and all entities is asked for.
        """
        if top_k != 1 or threshold is not None:
            raise MtpfError("This server runs an ONNX export, which knows neither top_k nor threshold.")
        try:
            return self.runner.predict(texts, apps, in_scope=in_scope)
        except ValueError as error:  # RunnerError
            raise MtpfError(str(error)) from error
