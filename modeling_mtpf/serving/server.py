"""The HTTP interface: ``POST /predict``, the apps, health and metrics, as a FastAPI application."""

import hmac
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, HTTPException, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import MtpfError, first_line
from ..model.schemas_mtpf import NAME_PATTERN
from ..version import __version__
from . import Limits
from .apps import AllowedSources, AppFiles
from .batching import Batcher, BusyError, UnknownAppError

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PART = r"^[a-z][a-z0-9_-]{1,63}(/[a-z][a-z0-9_-]{1,63})?$"


@dataclass(kw_only=True)
class Access:
    """Who may do more than predict.

    Attributes:
        token: What requests that add or remove apps must show; without one there are none.
        sources: Where apps may come from.
        origins: Origins of web pages that may call the server.
        log_texts: Whether the log shows the texts.
    """

    token: str | None = None
    sources: AllowedSources = field(default_factory=AllowedSources)
    origins: tuple[str, ...] = ()
    log_texts: bool = False


class PredictRequest(BaseModel):
    """Texts, and the apps that are applied to all of them."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        json_schema_extra={"examples": [{"texts": ["Call Ada at 5pm"], "apps": ["entities", "intent"]}]},
    )
    texts: list[str] = Field(min_length=1)
    apps: list[Annotated[str, Field(pattern=_PART)]] = Field(
        min_length=1, max_length=64, description="Names of apps, or bundle/part."
    )
    top_k: int = Field(1, ge=0, le=100_000, description="Labels of a TC app; 0 gives all of them.")
    threshold: float | None = Field(None, ge=0, le=1, description="Leave out what has a lower score.")
    in_scope: bool = Field(
        False, description="Say of each text whether it is about anything that a TC app was fitted on."
    )

    @model_validator(mode="after")
    def _best_label_only(self) -> "PredictRequest":
        if self.in_scope and self.top_k != 1:
            raise ValueError(
                f"in_scope belongs to a text's best label; leave top_k, which is {self.top_k}, at 1"
            )
        return self


class Entity(BaseModel):
    """A part of a text; offsets count characters (code points)."""

    entity_group: str
    score: float
    word: str
    start: int
    end: int


class Label(BaseModel):
    """A label of a text; null where the best one is below the threshold.

    ``in_scope`` is there where the request asks for it.
    """

    label: str | None
    score: float
    in_scope: bool | None = None


Result = Label | list[Label] | list[Entity]


class Predictions(BaseModel):
    """For each app its results, one a text, and the revision of the app that gave them.

    The result of a bundle has those of its parts by name.
    """

    results: dict[str, list[Result | dict[str, Result]]]
    revisions: dict[str, str]


class AppSource(BaseModel):
    """Where an app comes from: a folder below the operator's root, or a repo of the Hub."""

    model_config = ConfigDict(strict=True, extra="forbid")
    folder: str | None = Field(None, max_length=1024)
    repo: str | None = Field(None, max_length=128, description="owner/name")
    revision: str | None = Field(
        None, max_length=128, pattern=r"^[\w./-]+$", description="Commit, tag or branch."
    )

    @model_validator(mode="after")
    def _one(self) -> "AppSource":
        if (self.folder is None) == (self.repo is None) or (self.revision and self.repo is None):
            raise ValueError("give either a folder, or a repo and perhaps its revision")
        return self


class App(BaseModel):
    """A loaded app."""

    name: str
    source: str
    revision: str
    kind: str
    family: str | None = None
    labels: list[str] | None = None
    max_length: int | None = None
    problem_type: str | None = None
    parts: list[dict[str, Any]] | None = None


class Apps(BaseModel):
    """All loaded apps."""

    apps: list[App]


class Status(BaseModel):
    """What a probe of the server sees."""

    status: Literal["ok", "stopping"]
    version: str = __version__


class Problem(BaseModel):
    """Why a request was refused, in one sentence."""

    detail: str


_PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": text}
    for code, text in {
        400: "The body is not JSON",
        404: "No such app",
        413: "More than the limits allow",
        422: "The request is not accepted",
        429: "Too many requests; Retry-After says when to come back",
        503: "The server stops",
    }.items()
}
_ADMIN: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "The admin token is wrong"},
    403: {"model": Problem, "description": "Apps are not changed at requests"},
}
AppName = Annotated[str, Path(pattern=f"^{NAME_PATTERN.pattern}$")]


def create_application(
    batcher: Batcher,
    limits: Limits | None = None,
    access: Access | None = None,
    metrics: CollectorRegistry | None = None,
    announce: Callable[[str, AppFiles | None], Awaitable[None]] | None = None,
) -> FastAPI:
    """Build the application; it starts the batcher when it starts, and stops it when it stops.

    Args:
        batcher: With the engine and its apps.
        limits: Of requests.
        access: Of everything but predictions; by default nobody's.
        metrics: The registry that ``/metrics`` shows, the batcher's.
        announce: Awaited after an app was added or, with ``None``, removed here: tells other replicas.
    """
    limits, access = limits or Limits(), access or Access()
    metrics = metrics or CollectorRegistry()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()

    application = FastAPI(
        title="mtpf", version=__version__, summary="Many text apps on one encoder", lifespan=lifespan
    )
    application.state.batcher = batcher
    _add_predict(application, batcher, limits, access)
    _add_apps(application, batcher, access, announce)
    _add_probes(application, batcher, metrics)
    application.add_exception_handler(RequestValidationError, _refuse_request)
    application.add_exception_handler(StarletteHTTPException, _refuse)
    application.add_exception_handler(MtpfError, _refuse_mistake)
    application.add_middleware(RequestBodyLimitMiddleware, max_body_size=limits.max_body)
    if access.origins:
        application.add_middleware(
            CORSMiddleware,
            allow_origins=access.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    application.add_middleware(_Envelope, metrics=metrics)
    return application


def _add_predict(application: FastAPI, batcher: Batcher, limits: Limits, access: Access) -> None:
    @application.post("/predict", response_model=Predictions, responses=_PROBLEMS)
    async def predict(body: PredictRequest, request: Request) -> Response:
        """Apply apps to texts; the results are those of `MtpfModel.predict`."""
        characters = sum(map(len, body.texts))
        request.scope["mtpf"] = {"texts": len(body.texts), "characters": characters, "apps": body.apps}
        if access.log_texts:
            request.scope["mtpf"]["text"] = body.texts
        if len(body.texts) > limits.max_texts or characters > limits.max_characters:
            raise HTTPException(
                413,
                f"The request has {len(body.texts):,} texts with {characters:,} characters; at most "
                f"{limits.max_texts:,} with {limits.max_characters:,} are accepted. Send several requests.",
            )
        answer = await batcher.predict(body.texts, body.apps, body.top_k, body.threshold, body.in_scope)
        return Response(answer, media_type="application/json")


def _add_apps(
    application: FastAPI,
    batcher: Batcher,
    access: Access,
    announce: Callable[[str, AppFiles | None], Awaitable[None]] | None,
) -> None:
    bearer = HTTPBearer(auto_error=False, description="The variable MTPF_ADMIN_TOKEN of the server")
    engine = batcher.engine

    def admin(shown: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        if not access.token:
            raise HTTPException(
                403, "Apps are not changed at requests: the server was started without MTPF_ADMIN_TOKEN."
            )
        given = shown.credentials if shown else ""
        if not hmac.compare_digest(given.encode("utf-8", "replace"), access.token.encode()):
            raise HTTPException(401, "The admin token is wrong or missing.", {"WWW-Authenticate": "Bearer"})

    guarded: dict[str, Any] = {"dependencies": [Depends(admin)], "responses": {**_PROBLEMS, **_ADMIN}}

    @application.get("/apps", response_model_exclude_none=True)
    async def apps() -> Apps:
        """List the loaded apps."""
        return Apps.model_validate({"apps": list(engine.apps.values())})

    @application.put("/apps/{name}", response_model_exclude_none=True, **guarded)
    async def put(name: AppName, body: AppSource) -> App:
        """Add or replace an app; requests that are being answered keep the old one."""
        app = await run_in_threadpool(access.sources.read, body.folder, body.repo, body.revision)
        await batcher.change(engine.add, name, app)
        if announce:
            await announce(name, app)
        log.info("Loaded", extra={"fields": {"app": name, "source": app.source, "revision": app.revision}})
        return App.model_validate(engine.apps[name])

    @application.delete("/apps/{name}", response_model_exclude_none=True, **guarded)
    async def delete(name: AppName) -> App:
        """Remove an app; requests that are being answered keep it."""
        removed = App.model_validate(await batcher.change(_remove, engine, name))
        if announce:
            await announce(name, None)
        log.info("Removed", extra={"fields": {"app": name}})
        return removed


def _remove(engine: Any, name: str) -> dict[str, Any]:
    if name not in engine.apps:
        raise UnknownAppError(name, engine.apps)
    app = engine.apps[name]
    engine.remove(name)
    return app


def _add_probes(application: FastAPI, batcher: Batcher, metrics: CollectorRegistry) -> None:
    ProcessCollector(registry=metrics)
    GCCollector(registry=metrics)

    @application.get("/health")
    async def health() -> Status:
        """Whether the process lives."""
        return Status(status="ok")

    @application.get("/ready", responses={503: {"model": Status}})
    async def ready(response: Response) -> Status:
        """Whether requests are answered."""
        response.status_code = 200 if batcher.running else 503
        return Status(status="ok" if batcher.running else "stopping")

    @application.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def numbers() -> Response:
        """Metrics for Prometheus."""
        return Response(generate_latest(metrics), media_type=CONTENT_TYPE_LATEST)


# --------------------------------------------------------------------------------------------- refusals


def _refuse_request(_: Request, error: Exception) -> Response:
    """Say what is wrong in one sentence, without the texts that the request holds."""
    (first, *_) = error.errors()  # type: ignore[attr-defined]
    where = ".".join(str(part) for part in first["loc"])
    return JSONResponse({"detail": f"{where[:200]}: {first['msg']}."}, 422)


def _refuse(_: Request, error: Exception) -> Response:
    status, headers = error.status_code, error.headers  # type: ignore[attr-defined]
    return JSONResponse({"detail": str(error.detail)}, status, headers)  # type: ignore[attr-defined]


def _refuse_mistake(_: Request, error: Exception) -> Response:
    headers = {"Retry-After": str(error.seconds)} if isinstance(error, BusyError) else None
    status = 429 if headers else 404 if isinstance(error, UnknownAppError) else 422
    return JSONResponse({"detail": first_line(error)}, status, headers)


# ----------------------------------------------------------------------------- around every request


class _Envelope:
    """Gives each request an id, a line in the log and its metrics; an error of ours becomes status 500."""

    def __init__(self, app: ASGIApp, metrics: CollectorRegistry):
        self.app = app
        names = ["method", "path", "status"]
        self._requests = Counter("mtpf_requests", "Requests answered", names, registry=metrics)
        self._seconds = Histogram("mtpf_request_seconds", "Time to answer", ["path"], registry=metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun, status = time.perf_counter(), 0
        wanted = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = wanted if _REQUEST_ID.fullmatch(wanted) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            log.exception("A request failed", extra={"fields": {"request_id": request_id}})
            if not status:
                response = JSONResponse(
                    {"detail": f"The server failed; its log tells, at {request_id}."}, 500
                )
                await response(scope, receive, send_with_id)
        finally:
            self._count(scope, status, request_id, time.perf_counter() - begun)

    def _count(self, scope: Scope, status: int, request_id: str, seconds: float) -> None:
        # The route, not the path: hostile paths would make a metric each.
        path = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if path != "other" else "other"
        self._requests.labels(method, path, status).inc()
        self._seconds.labels(path).observe(seconds)
        fields = {"request_id": request_id, "method": method, "path": path, "status": status}
        log.info(
            "Answered", extra={"fields": {**fields, "ms": round(1000 * seconds, 2), **scope.get("mtpf", {})}}
        )
