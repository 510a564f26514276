"""``mtpf serve``: answer HTTP requests for many apps on one encoder; apps come and go while it runs."""

import logging
import os
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import MtpfError, first_line
from ..serving import Limits
from ..settings import REPEATED, nearest, read_settings

EXAMPLES = """\
  mtpf serve --backbone runs/demo/backbone --adapter apps/entities --adapter apps/intent
  curl http://127.0.0.1:8080/predict -H 'Content-Type: application/json' \\
      -d '{"texts": ["Call Ada at 5pm"], "apps": ["entities", "intent"]}'
  MTPF_ADMIN_TOKEN=... mtpf serve --backbone packaged --apps_root apps --allow_repo 'ada/*'
  mtpf serve --backbone phone --engine int8

http://127.0.0.1:8080/docs describes the interface. SIGTERM or Ctrl-C stops the server when it has answered
what was begun."""

ENGINES = ("float32", "bf16", "auto", "int8")


@dataclass(kw_only=True)
class ServeSettings(Limits):
    """Backbone, apps, and what clients may do.

    Attributes:
        adapter: ``[NAME=]A``, folder or owner/name[@revision] of an app; may be given several times.
        backbone: ``packaged``, a folder or owner/name; by default the one of the first app. With
            int8: a folder of mtpf export.
        backbone_revision: Commit, tag or branch of the backbone's repo; main by default.
        engine: ``float32``, ``bf16`` or ``auto`` (bf16 where the device is fast at it) in torch, or ``int8``:
            an ONNX export with all its apps.
        device: Of torch, e.g. cuda.
        threads: Of a prediction; by default torch's or onnxruntime's choice.
        host: Address to listen on; by default other machines cannot connect.
        port: 0 takes a free one; the first line of the log names it.
        apps_root: Folder below which PUT /apps/NAME may load apps.
        allow_repo: Hub id that it may load, also as ``ada/*``; may be given several times.
        allow_origin: Origin of web pages that may predict, e.g. https://example.org; likewise.
        max_wait_ms: How long an idle server lets a request wait for others.
        queue_texts: Texts that may wait; beyond that a client is told to come back later (429).
        receive_seconds: Time a client has for sending a request.
        stop_seconds: Time for finishing at a stop.
        log_texts: Show texts in the log.
    """

    adapter: list[str] = field(default_factory=list, metadata=REPEATED)
    backbone: str | None = None
    backbone_revision: str | None = None
    engine: str = "float32"
    device: str = "cpu"
    threads: int = 0
    host: str = "127.0.0.1"
    port: int = 8080
    apps_root: str | None = None
    allow_repo: list[str] = field(default_factory=list, metadata=REPEATED)
    allow_origin: list[str] = field(default_factory=list, metadata=REPEATED)
    max_wait_ms: float = 2.0
    queue_texts: int = 1024
    receive_seconds: float = 20.0
    stop_seconds: float = 30.0
    log_texts: bool = False

    def __post_init__(self):
        if self.engine not in ENGINES:
            hint = nearest(self.engine, list(ENGINES))
            raise MtpfError(f"--engine is {self.engine!r}; {hint}choose one of: {', '.join(ENGINES)}.")
        if not self.adapter and self.backbone is None:
            raise MtpfError("Give --adapter, or at least the --backbone of apps that are added later.")
        if self.engine == "int8" and (self.adapter or self.backbone is None):
            raise MtpfError("With --engine int8 give --backbone, a folder of mtpf export, and no --adapter.")
        for name in ("max_texts", "max_characters", "max_body", "queue_texts", "receive_seconds"):
            if getattr(self, name) <= 0:
                raise MtpfError(f"--{name} is {getattr(self, name)}; it must be more than 0.")
        if self.max_wait_ms < 0 or self.threads < 0 or not 0 <= self.port <= 65535:
            raise MtpfError("--max_wait_ms and --threads must be at least 0, and --port from 0 to 65535.")
        if self.apps_root is not None and not Path(self.apps_root).is_dir():
            raise MtpfError(f"--apps_root {self.apps_root} is not a folder.")
        if self.token is not None and len(self.token) < 16:
            raise MtpfError("MTPF_ADMIN_TOKEN is too short; give it at least 16 characters.")

    @property
    def token(self) -> str | None:
        """The admin token; from the environment, because all users of a machine see arguments."""
        return os.environ.get("MTPF_ADMIN_TOKEN") or None


def run(arguments: list[str], prog: str) -> None:
    """Serve until a signal.

    Raises:
        MtpfError: The backbone, an app or the address cannot be used.
    """
    settings = read_settings(ServeSettings, arguments, prog, __doc__, EXAMPLES)
    from ..serving.protocol import JsonFormatter, serve

    listener = _listen(settings.host, settings.port)
    engine = open_engine(settings)
    root = logging.getLogger()
    root.handlers[:] = [logging.StreamHandler(sys.stderr)]
    root.handlers[0].setFormatter(JsonFormatter())
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    fields = {"address": address, "apps": len(engine.apps), "engine": settings.engine}
    logging.getLogger(__name__).info("Listening", extra={"fields": fields})
    serve(
        application(settings, engine),
        listener,
        receive_seconds=settings.receive_seconds,
        stop_seconds=settings.stop_seconds,
    )


def application(settings: ServeSettings, engine: Any, announce: Any = None) -> Any:
    """Build the FastAPI application of the settings around an engine."""
    from prometheus_client import CollectorRegistry

    from ..serving.apps import AllowedSources
    from ..serving.batching import Batcher
    from ..serving.server import Access, create_application

    metrics = CollectorRegistry()
    batcher = Batcher(
        engine,
        max_wait=settings.max_wait_ms / 1000,
        batch_characters=settings.max_characters,
        queue_texts=settings.queue_texts,
        metrics=metrics,
    )
    root = Path(settings.apps_root) if settings.apps_root else None
    access = Access(
        token=settings.token,
        sources=AllowedSources(root, tuple(settings.allow_repo)),
        origins=tuple(settings.allow_origin),
        log_texts=settings.log_texts,
    )
    return create_application(batcher, settings, access, metrics, announce)


def _listen(host: str, port: int) -> socket.socket:
    """Bind the address, before anything slow; connections are accepted when everything is loaded."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise MtpfError(
            f"Cannot listen on {host}, port {port}: {reason}. Choose --host and --port."
        ) from error


def open_engine(settings: ServeSettings) -> Any:
    """Load the backbone with its apps, or an export.

    Raises:
        MtpfError: One of them cannot be used.
    """
    from ..serving.engines import OnnxEngine, TorchEngine

    if settings.engine == "int8":
        from ..errors import require_extra

        require_extra("onnx", "onnxruntime")
        from ..export.runner import Runner

        try:
            return OnnxEngine(Runner(str(settings.backbone), settings.threads))
        except ValueError as error:
            raise MtpfError(str(error)) from error
    import torch

    from ..model.sources_mtpf import split_revision
    from ..serving.apps import read_app
    from .predict import open_model

    if settings.threads:
        torch.set_num_threads(settings.threads)
    apps = []
    for given in settings.adapter:
        name, equals, source = given.partition("=")
        path, revision = split_revision(source if equals else given)
        apps.append((name if equals else None, read_app(path, revision)))
    first = split_revision(settings.adapter[0].rpartition("=")[2]) if apps else None
    try:
        model = open_model(
            settings.backbone, settings.backbone_revision, first, settings.engine, settings.device
        ).to(settings.device)
    except (RuntimeError, AssertionError) as error:
        raise MtpfError(f"--device {settings.device} cannot be used: {first_line(error)}") from error
    engine = TorchEngine(model)
    for alias, app in apps:
        if (name := alias or app.name) in engine.apps:
            raise MtpfError(f"Two apps are named {name!r}; name one of them: --adapter NAME={app.source}.")
        engine.add(name, app)
    if apps:
        engine.predict(["Call Ada at 5pm."], list(engine.apps), False, 1, None)  # the first one loads much
    return engine
