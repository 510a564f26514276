"""Requests of many clients meet in batches: one thread predicts while the next batch gathers."""

import asyncio
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..errors import MtpfError
from .engines import app_of

log = logging.getLogger(__name__)


class BusyError(MtpfError):
    """The queue is full; try again in ``seconds``."""

    def __init__(self, seconds: int):
        super().__init__(f"The server has more requests than it can answer; try again in {seconds} s.")
        self.seconds = seconds


class UnknownAppError(MtpfError):
    """A request names an app that is not loaded."""

    def __init__(self, name: str, apps: dict[str, Any]):
        known = ", ".join(list(apps)[:20]) or "none"
        super().__init__(f"There is no app {name!r}; loaded: {known}{', …' if len(apps) > 20 else ''}.")


@dataclass(eq=False)
class _Request:
    texts: list[str]
    apps: tuple[str, ...]
    top_k: int
    threshold: float | None
    in_scope: bool
    answer: "asyncio.Future[bytes]"

    @property
    def characters(self) -> int:
        return sum(map(len, self.texts))


class Batcher:
    """Gathers requests into calls of an engine's ``predict``, in one thread.

    Args:
        engine: A `TorchEngine` or `OnnxEngine`.
        max_wait: Seconds that a request waits for others while the engine is idle. While it is busy requests
            gather anyhow.
        batch_texts: Texts of a batch at most, unless one request has more.
        batch_characters: Likewise.
        queue_texts: Texts that may wait; a request beyond is refused with `BusyError`.
        metrics: Where its metrics are registered.
    """

    def __init__(
        self,
        engine: Any,
        *,
        max_wait: float = 0.002,
        batch_texts: int = 128,
        batch_characters: int = 50_000,
        queue_texts: int = 1024,
        metrics: CollectorRegistry | None = None,
    ):
        self.engine = engine
        self.max_wait, self.queue_texts = max_wait, queue_texts
        self.batch_texts, self.batch_characters = batch_texts, batch_characters
        self._queue: deque[_Request] = deque()
        self._waiting = 0  # texts in the queue
        self._rate = 0.0  # texts a second, of the last batches
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mtpf-predict")
        self._loop: asyncio.Task | None = None
        registry = metrics or CollectorRegistry()
        sizes = [2**power for power in range(11)]
        self._batch_texts = Histogram(
            "mtpf_batch_texts", "Texts of a batch", buckets=sizes, registry=registry
        )
        self._batch_seconds = Histogram(
            "mtpf_batch_seconds",
            "Time a batch takes",
            buckets=[0.002 * 2**p for p in range(13)],
            registry=registry,
        )
        self._texts = Counter("mtpf_texts", "Texts predicted", registry=registry)
        Gauge("mtpf_queue_texts", "Texts that wait", registry=registry).set_function(lambda: self._waiting)
        Gauge("mtpf_apps", "Apps loaded", registry=registry).set_function(lambda: len(self.engine.apps))

    @property
    def running(self) -> bool:
        """Whether requests are answered."""
        return self._loop is not None and not self._loop.done()

    def start(self) -> None:
        """Begin to answer; called in the event loop."""
        self._loop = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Answer what waits, then end the thread."""
        while self._queue:
            await asyncio.sleep(0.01)
        if self._loop is not None:
            self._loop.cancel()
            with suppress(asyncio.CancelledError):
                await self._loop
        self._thread.shutdown()

    async def predict(
        self,
        texts: list[str],
        apps: list[str],
        top_k: int = 1,
        threshold: float | None = None,
        in_scope: bool = False,
    ) -> bytes:
        """Return the answer to one request as JSON: ``results``, a list for each app, and ``revisions``.

        Raises:
            BusyError: Too many texts wait.
            UnknownAppError: An app is not loaded.
            MtpfError: The texts cannot be predicted.
        """
        if self._waiting and self._waiting + len(texts) > self.queue_texts:
            raise BusyError(max(1, min(60, math.ceil(self._waiting / (self._rate or 100)))))
        for name in apps:
            if app_of(name, self.engine.apps) is None:
                raise UnknownAppError(name, self.engine.apps)
        answer = asyncio.get_running_loop().create_future()
        self._queue.append(_Request(texts, tuple(dict.fromkeys(apps)), top_k, threshold, in_scope, answer))
        self._waiting += len(texts)
        self._arrived.set()
        return await answer

    async def change(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that changes the engine's apps, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, action, *arguments)

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            if self.max_wait and self._waiting < self.batch_texts:
                await asyncio.sleep(self.max_wait)
            batch = self._next()
            begun = time.perf_counter()
            outcomes = await self.change(self._answer, batch)
            seconds, texts = time.perf_counter() - begun, sum(len(request.texts) for request in batch)
            self._rate = 0.8 * self._rate + 0.2 * texts / seconds if self._rate else texts / seconds
            self._batch_texts.observe(texts)
            self._batch_seconds.observe(seconds)
            self._texts.inc(texts)
            for request, outcome in zip(batch, outcomes, strict=True):
                if request.answer.done():  # its client is gone
                    continue
                if isinstance(outcome, bytes):
                    request.answer.set_result(outcome)
                else:
                    request.answer.set_exception(outcome)

    def _next(self) -> list[_Request]:
        """Take the requests of the next batch, in the order of their arrival."""
        batch: list[_Request] = []
        texts = characters = 0
        while self._queue:
            request = self._queue[0]
            texts, characters = texts + len(request.texts), characters + request.characters
            if batch and (texts > self.batch_texts or characters > self.batch_characters):
                break
            batch.append(self._queue.popleft())
            self._waiting -= len(request.texts)
        if not self._queue:
            self._arrived.clear()
        return batch

    # ------------------------------------------------------------------------------------- in the thread

    def _answer(self, batch: list[_Request]) -> list[bytes | Exception]:
        """Return an answer or an error for each request; those that can share a call of the engine do."""
        groups: dict[Hashable, list[_Request]] = {}
        for request in batch:
            apps = None if self._paired(request) else request.apps
            groups.setdefault((apps, request.top_k, request.threshold, request.in_scope), []).append(request)
        outcomes: dict[_Request, bytes | Exception] = {}
        for requests in groups.values():
            outcomes.update(self._together(requests))
        return [outcomes[request] for request in batch]

    def _paired(self, request: _Request) -> bool:
        """Whether the request can share a call with requests for other apps."""
        return self.engine.one_app_per_text and len(request.apps) == 1

    def _together(self, requests: list[_Request]) -> dict[_Request, bytes | Exception]:
        """Answer requests with one call; if it fails, each with a call of its own."""
        first, paired = requests[0], self._paired(requests[0])
        texts = [text for request in requests for text in request.texts]
        apps = list(first.apps)
        if paired:
            apps = [request.apps[0] for request in requests for _ in request.texts]
        try:
            rows = self.engine.predict(texts, apps, paired, first.top_k, first.threshold, first.in_scope)
        except Exception as error:
            if len(requests) > 1:
                return {r: e for request in requests for r, e in self._together([request]).items()}
            if (missing := self._missing(first)) is not None:
                return {first: UnknownAppError(missing, self.engine.apps)}
            if not isinstance(error, MtpfError):
                log.exception("A batch failed")
            return {first: error}
        answers: dict[_Request, bytes | Exception] = {}
        start = 0
        for request in requests:
            part = slice(start, start := start + len(request.texts))
            by_app = {request.apps[0]: rows} if paired else rows
            answers[request] = self._encode(request, {app: by_app[app][part] for app in request.apps})
        return answers

    def _missing(self, request: _Request) -> str | None:
        return next((name for name in request.apps if app_of(name, self.engine.apps) is None), None)

    def _encode(self, request: _Request, results: dict[str, list]) -> bytes:
        apps = self.engine.apps
        revisions = {name: apps[app_of(name, apps)]["revision"] for name in request.apps}
        return json.dumps({"results": results, "revisions": revisions}).encode("ascii")
