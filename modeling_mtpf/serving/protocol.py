"""Running the application on uvicorn: clients that are slow or send endless headers, logs, graceful stop."""

import json
import logging
import signal
import socket
from asyncio import TimerHandle
from datetime import datetime, timezone
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADERS, MAX_HEAD_BYTES = 100, 32_768


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol; a connection whose request is not complete in time, or has a huge head, is closed.

    uvicorn waits without limit for a request's head and body, and its fast parser takes heads of any size.
    """

    receive_seconds = 20.0
    _deadline: TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: Any) -> None:
        """Give the client its time for the first request."""
        super().connection_made(transport)
        self._start()

    def data_received(self, data: bytes) -> None:
        """Give the client its time when a further request begins."""
        if self._deadline is None:
            self._start()
        super().data_received(data)

    def on_message_begin(self) -> None:
        """Count the head of each request."""
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Refuse a long URL."""
        super().on_url(url)
        self._check(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Refuse many or long headers."""
        super().on_header(name, value)
        self._check(len(name) + len(value))

    def on_message_complete(self) -> None:
        """Stop the clock."""
        super().on_message_complete()
        self._cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._cancel()
        super().connection_lost(exc)

    def _check(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            raise ValueError("The head of the request is too large.")  # the parser then refuses it

    def _start(self) -> None:
        self._deadline = self.loop.call_later(self.receive_seconds, self._expire)

    def _cancel(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._deadline = None
        self.transport.abort()


class JsonFormatter(logging.Formatter):
    """One line of JSON a record, with the ``fields`` of its ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def serve(application: Any, listener: socket.socket, *, receive_seconds: float, stop_seconds: float) -> None:
    """Answer on a socket until SIGTERM or Ctrl-C, then finish what was begun in at most ``stop_seconds``."""
    config = uvicorn.Config(
        application,
        http=type("Protocol", (LimitedProtocol,), {"receive_seconds": receive_seconds}),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, round(stop_seconds)),
    )
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which uvicorn replaces, and raises again when it is done
    uvicorn.Server(config).run(sockets=[listener])
