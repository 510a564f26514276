"""A local Hub for tests: real HTTP on 127.0.0.1, for the unmodified `huggingface_hub` client.

    with HubServer() as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        api.create_repo("mtpf/demo")
        api.upload_folder(repo_id="mtpf/demo", folder_path=folder)  # over Xet, as the client does by default
        subprocess.run([...], env=hub.environment())  # programs that read HF_ENDPOINT

        hub.fault("commit", status=500)  # the next commit fails
        hub.fault("commit", before=lambda: hub.commit("mtpf/demo", {"a": b""}))  # a concurrent push
        hub.fault("xet_upload_xorb", drop="request")  # the connection breaks half-way
        hub.fault("tree", status=429, retry_after=1, times=2)
        hub.fault("xet_download", corrupt=True)  # wrong bytes, once
        hub.tamper("mtpf/demo", "model.safetensors")  # wrong bytes, from now on

A fault is named after its route in `hub_api.ROUTES`. `HF_ENDPOINT` is read when `huggingface_hub` is
imported, so within the running process pass `endpoint=hub.url`. Nothing but stdlib, PyYAML for the cards'
metadata, and pyarrow for LZ4.
"""

from __future__ import annotations

import base64
import http
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # for its neighbours, when this file is loaded by path

from hub_api import HubApi, Route, known_route, match_route  # noqa: E402
from hub_storage import Commit, HubError, HubStorage, Repository  # noqa: E402
from hub_xet import Request, Response, User, XetStore  # noqa: E402


class LoggedRequest(NamedTuple):
    """What `HubServer.requests` keeps; a status of 0 stands for a connection that broke before the answer."""

    method: str
    path: str
    status: int


@dataclass
class Fault:
    """Something that goes wrong; `fired` counts how often it did. See `HubServer.fault` for the fields."""

    route: str
    times: int | None = 1
    match: str = ""
    status: int | None = None
    retry_after: int | None = None
    delay: float = 0.0
    drop: str | None = None
    corrupt: bool = False
    before: Callable[[], object] | None = None
    fired: int = 0


class HubServer:
    """A Hub for the time of a test; see the module for how to use it.

    `token` belongs to `user`, who may write to their own namespace and to those of `organizations`;
    `read_token` to another user, "reader", who may write nowhere and sees no private repositories.
    `url` is set by `start`, and `requests` logs what the Hub was asked, in the order of the answers.
    """

    def __init__(self, user: str = "mtpf", organizations: tuple[str, ...] = ("mtpf-org",)) -> None:
        self.user, self.token = user, f"hf_{secrets.token_hex(17)}"
        self.read_token = f"hf_{secrets.token_hex(17)}"
        self.requests: list[LoggedRequest] = []
        self.url = ""
        self._faults: list[Fault] = []
        self._fault_lock = threading.Lock()
        self._storage = HubStorage(XetStore())
        users = {self.token: User(user, "write"), self.read_token: User("reader", "read")}
        self._api = HubApi(self._storage, users, organizations)
        self._folder = Path(tempfile.mkdtemp(prefix="hub-"))
        self._server: _HttpServer | None = None

    def __enter__(self) -> HubServer:
        """Start the server."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server and remove what `environment` pointed to."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        """Accept connections, after a `stop` at the same address as before."""
        port = int(self.url.rpartition(":")[2]) if self.url else 0
        self._server = _HttpServer(("127.0.0.1", port), self)
        port = self._server.server_address[1]
        self.url = self._api.url = f"http://127.0.0.1:{port}"
        # Content has another host name, as on huggingface.co: the client must not send its token there.
        self._api.storage_url = f"http://localhost:{port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections and break the open ones, as a Hub that is down; what it stores stays."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.break_connections()
            self._server = None

    def environment(self, token: str | None = None, home: str = "home") -> dict[str, str]:
        """Return the variables with which another process uses this Hub, and nothing of the user's own.

        Args:
            token: whose token the process finds; `token` when `None`, no one's when empty.
            home: names the cache; two processes with the same name share one.
        """
        folder = self._folder / home
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "0")
        names = {"HF_HOME": "", "HF_HUB_CACHE": "hub", "HF_XET_CACHE": "xet", "HF_ASSETS_CACHE": "assets"}
        names |= {"HF_DATASETS_CACHE": "datasets", "HF_MODULES_CACHE": "modules", "HF_TOKEN_PATH": "token"}
        return {
            **{name: value for name, value in os.environ.items() if name != "HUGGING_FACE_HUB_TOKEN"},
            **offline,
            **{name: str(folder / place) for name, place in names.items()},
            **{"HF_ENDPOINT": self.url, "HF_TOKEN": self.token if token is None else token},
            **dict.fromkeys(("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"), "1"),
            "HF_HUB_DISABLE_XET": "0",
            **{"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"},
        }

    # What the Hub holds

    def create(self, repo_id: str, *, private: bool = False, repo_type: str = "model") -> None:
        """Create a repository without a client."""
        with self._storage.lock:
            self._storage.create(repo_type, repo_id, private)

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | None],
        title: str = "A change by another user",
        revision: str = "main",
        repo_type: str = "model",
    ) -> str:
        """Commit files as another user would, `None` deletes one; return the sha."""
        with self._storage.lock:
            repository = self._find(repo_id, repo_type)
            present, operations = repository.resolve(revision).files, []
            for path, data in files.items():
                if data is None:
                    operations.append({"key": "deletedFile", "value": {"path": path}})
                elif self._storage.is_large(present, path, len(data), data[:512]):
                    operations.append(
                        {"key": "lfsFile", "value": {"path": path, "oid": self._storage.put(data)}}
                    )
                else:
                    value = {"path": path, "content": base64.b64encode(data).decode()}
                    operations.append({"key": "file", "value": value})
            commit, _ = self._storage.commit(repository, revision, {"summary": title}, operations, "another")
            return commit.sha

    def tamper(
        self,
        repo_id: str,
        path: str,
        data: bytes | None = None,
        revision: str = "main",
        repo_type: str = "model",
    ) -> None:
        """Serve other bytes for a file, under the hashes and the size announced for the true ones.

        Args:
            repo_id: the repository.
            path: the file in it.
            data: what to serve; the true content with one byte changed when `None`. It is served over Xet
                when it was once uploaded over Xet (say, to another repository), otherwise over plain HTTP.
            revision: the revision whose file is replaced.
            repo_type: "model" or "dataset".
        """
        with self._storage.lock:
            commit = self._find(repo_id, repo_type).resolve(revision)
            file = commit.files[path]
            data = _with_one_byte_changed(self._storage.get(file.content)) if data is None else data
            commit.files[path] = self._storage.tampered(file, data)

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """Return the content of each file of a revision."""
        with self._storage.lock:
            commit = self._find(repo_id, repo_type).resolve(revision)
            return {path: self._storage.get(file.content) for path, file in sorted(commit.files.items())}

    def head(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> str:
        """Return the sha of a revision."""
        return self._find(repo_id, repo_type).resolve(revision).sha

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """Return the commits of a revision, newest first."""
        return self._find(repo_id, repo_type).log(revision)

    def _find(self, repo_id: str, repo_type: str) -> Repository:
        repository = self._storage.find(repo_type, repo_id)
        if repository is None:
            raise KeyError(f"This Hub has no {repo_type} {repo_id}")
        return repository

    # What happens on the way

    def calls(self, route: str) -> list[LoggedRequest]:
        """Return the requests to a route so far, by its name in `hub_api.ROUTES`."""
        name = known_route(route)
        return [entry for entry in self.requests if match_route(entry.method, entry.path)[0].name == name]

    def fault(self, route: str, **effects: Any) -> Fault:
        """Make requests to a route fail; return the fault, which counts how often it fired.

        Args:
            route: a name in `hub_api.ROUTES`. "resolve" sees a HEAD and a GET for each file.
            effects: at least one of
                `status` (answer with this error; `retry_after` adds the header, in seconds),
                `delay` (seconds before anything else),
                `drop` ("request": the connection breaks while the body arrives, nothing happens;
                "response": the request takes effect, the connection breaks within the answer),
                `corrupt` (one byte of the content is wrong; for "resolve", "download", "xet_download"),
                `before` (called before the request is handled: what another user does in between);
                and `times` (once unless said, `None`: always) and `match` (a part of the path and query).

        Raises:
            ValueError: there is no such route or effect.
        """
        fault = Fault(known_route(route), **effects)
        if not (fault.status or fault.delay or fault.drop or fault.corrupt or fault.before):
            raise ValueError("A fault needs one of status, delay, drop, corrupt, before")
        if fault.drop not in (None, "request", "response"):
            raise ValueError(f'drop is "request" or "response", not {fault.drop!r}')
        if fault.corrupt and route not in ("resolve", "download", "xet_download"):
            raise ValueError(f'{route!r} serves no content; "resolve", "download" and "xet_download" do')
        self._faults.append(fault)
        return fault

    def clear_faults(self) -> None:
        """Forget all faults."""
        self._faults.clear()

    def take_fault(self, route: str, target: str, corrupt: bool) -> Fault | None:
        """Return the fault that hits this request, if any, and count it."""
        with self._fault_lock:
            for fault in self._faults:
                is_due = fault.times is None or fault.fired < fault.times
                if is_due and fault.route == route and fault.corrupt == corrupt and fault.match in target:
                    fault.fired += 1
                    return fault
        return None

    def answer(self, route: Route, request: Request, fault: Fault | None) -> Response:
        """Answer a request, through a fault if there is one; never raises."""
        try:
            if fault is not None and fault.before is not None:
                fault.before()
            if fault is not None and fault.status is not None:
                retry = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
                raise HubError(fault.status, http.HTTPStatus(fault.status).phrase, headers=retry)
            response = self._api.answer(route, request)
        except HubError as error:
            line = " ".join(error.message.split()).encode("ascii", "replace").decode()
            headers = {**error.headers, "X-Error-Message": line}
            if error.code:
                headers["X-Error-Code"] = error.code
            return Response({"error": error.message, **error.details}, error.status, headers)
        except Exception:  # a mistake in this module must reach the test
            return Response({"error": traceback.format_exc()}, 500)
        if isinstance(response.body, bytes) and response.body and request.method == "GET":
            if self.take_fault(route.name, request.target, corrupt=True):
                response.body = _with_one_byte_changed(response.body)
        return response


class _HttpServer(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True

    def __init__(self, address: tuple[str, int], hub: HubServer) -> None:
        super().__init__(address, _Handler)
        self.hub = hub
        self._connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def break_connections(self) -> None:
        for connection in list(self._connections):
            _break(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # clients may go away
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _HttpServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet for headers and body: small answers would wait for each other otherwise
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        """Stay silent; `HubServer.requests` is the log."""

    def _serve(self) -> None:
        hub = self.server.hub
        route, params = match_route(self.command, self.path)
        fault = hub.take_fault(route.name, self.path, corrupt=False)
        if fault is not None:
            time.sleep(fault.delay)
        drop = fault.drop if fault is not None else None
        body = self._read_body(half=drop == "request")
        if drop == "request":
            hub.requests.append(LoggedRequest(self.command, self.path, 0))
            _break(self.connection)
            self.close_connection = True
            return
        request = Request(self.command, self.path, self.headers, body, params=params)
        response = hub.answer(route, request, fault)
        hub.requests.append(LoggedRequest(self.command, self.path, 0 if drop else response.status))
        self._send(response, half=drop == "response")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _read_body(self, half: bool) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            length = int(self.headers.get("Content-Length") or 0)
            return self.rfile.read(length // 2 if half else length)
        body = b""
        while length := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(length)
            self.rfile.readline()
            if half:
                return body
        self.rfile.readline()
        return body

    def _send(self, response: Response, half: bool) -> None:
        body = response.encoded()
        is_json = not isinstance(response.body, bytes)
        if not half or (body and self.command != "HEAD"):
            self.send_response(response.status)
            defaults = {"Content-Type": "application/json" if is_json else "application/octet-stream"}
            defaults |= {"Content-Length": str(len(body)), "X-Request-Id": secrets.token_hex(8)}
            for name, value in {**defaults, **response.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if half else body)
        self.wfile.flush()
        if half:
            _break(self.connection)
            self.close_connection = True


def _with_one_byte_changed(data: bytes) -> bytes:
    place = len(data) // 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :] if data else b"\1"


def _break(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the client was faster
