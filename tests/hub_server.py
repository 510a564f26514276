"""A local Hub for tests: real HTTP on 127.0.0.1, for the unmodified `huggingface_hub` client.

    with HubServer() as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        api.create_repo("mtpf/demo")
        api.upload_folder(repo_id="mtpf/demo", folder_path=folder)  # over Xet, as the client does by default
        subprocess.run([...], env=hub.environment())  # programs that read HF_ENDPOINT

        hub.fault("commit", status=500)  # the next commit fails
        hub.fault("commit", before=lambda: hub.commit("mtpf/demo", {"a": b""}))  # somebody else is faster
        hub.fault("xet_upload_xorb", drop="request")  # the connection breaks half-way
        hub.fault("tree", status=429, retry_after=1, times=2)
        hub.fault("xet_download", corrupt=True)  # wrong bytes, once
        hub.tamper("mtpf/demo", "model.safetensors")  # wrong bytes, from now on

A fault is named after its route in `ROUTES`. `HF_ENDPOINT` is read when `huggingface_hub` is imported, so
within the running process pass `endpoint=hub.url`. Nothing but stdlib, and PyYAML for the cards' metadata.
"""

from __future__ import annotations

import base64
import difflib
import http
import json
import os
import re
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
from urllib.parse import parse_qs, unquote

sys.path.insert(0, str(Path(__file__).parent))  # for its neighbours, when this file is loaded by path

from hub_storage import Commit, HubError, HubStorage, Repository, check_card, timestamp  # noqa: E402
from hub_xet import LargeFileApi, Request, Response, User, XetStore  # noqa: E402

REPO = r"/api/(?P<kind>model|dataset)s/(?P<repo_id>[^/]+/[^/]+)"
PAGE = r"/(?:(?P<kind>dataset)s/)?(?P<repo_id>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
XET = r"/xet/(?P<secret>[^/]+)"
KEY = r"(?P<key>[0-9a-f]{64})"
STORAGE = r"/storage/(?P<secret>[^/]+)"


class Route(NamedTuple):
    """A method and a path pattern, handled by the method of `HubApi` with the route's name.

    `access` is what the request needs: nothing, to "read" or to "write" the repository in the path.
    """

    name: str
    method: str
    pattern: str
    access: str = ""


ROUTES = (
    Route("whoami", "GET", r"/api/whoami-v2"),
    Route("validate_yaml", "POST", r"/api/validate-yaml"),
    Route("create_repo", "POST", r"/api/repos/create"),
    Route("delete_repo", "DELETE", r"/api/repos/delete"),
    Route("repo_info", "GET", rf"{REPO}(?:/revision/{REVISION})?", "read"),
    Route("tree", "GET", rf"{REPO}/tree/{REVISION}(?:/(?P<path>.*))?", "read"),
    Route("paths_info", "POST", rf"{REPO}/paths-info/{REVISION}", "read"),
    Route("refs", "GET", rf"{REPO}/refs", "read"),
    Route("commits", "GET", rf"{REPO}/commits/{REVISION}", "read"),
    Route("create_branch", "POST", rf"{REPO}/branch/(?P<name>[^/]+)", "write"),
    Route("delete_branch", "DELETE", rf"{REPO}/branch/(?P<name>[^/]+)", "write"),
    Route("create_tag", "POST", rf"{REPO}/tag/{REVISION}", "write"),
    Route("delete_tag", "DELETE", rf"{REPO}/tag/(?P<name>[^/]+)", "write"),
    Route("create_discussion", "POST", rf"{REPO}/discussions", "write"),
    Route("discussion", "GET", rf"{REPO}/discussions/(?P<number>\d+)", "read"),
    Route("preupload", "POST", rf"{REPO}/preupload/{REVISION}", "write"),
    Route("commit", "POST", rf"{REPO}/commit/{REVISION}", "write"),
    Route("resolve", "GET", rf"{PAGE}/resolve/{REVISION}/(?P<path>.+)", "read"),
    Route("download", "GET", rf"{STORAGE}/{KEY}"),
    Route("lfs_batch", "POST", rf"{PAGE}\.git/info/lfs/objects/batch", "write"),
    Route("lfs_verify", "POST", rf"{PAGE}\.git/info/lfs/objects/verify", "write"),
    Route("lfs_upload", "PUT", rf"{STORAGE}/{KEY}"),
    Route("xet_read_token", "GET", rf"{REPO}/xet-(?P<scope>read)-token/{REVISION}", "read"),
    Route("xet_write_token", "GET", rf"{REPO}/xet-(?P<scope>write)-token/{REVISION}", "write"),
    Route("xet_upload_xorb", "POST", rf"{XET}/v1/xorbs/default/{KEY}"),
    Route("xet_upload_shard", "POST", rf"{XET}/v1/shards"),
    Route("xet_reconstruction", "GET", rf"{XET}/v1/reconstructions/{KEY}"),
    Route("xet_download", "GET", rf"{STORAGE}/xorbs/{KEY}"),
)
NO_ROUTE = Route("no_route", "", "")


class HubApi(LargeFileApi):
    """Answer requests, one method a route; errors are raised as `HubError`."""

    def __init__(
        self, storage: HubStorage, users: Mapping[str, User], organizations: tuple[str, ...]
    ) -> None:
        super().__init__(storage)
        self.users, self.organizations = users, organizations

    def answer(self, route: Route, request: Request) -> Response:
        """Check who asks, and call the route's method."""
        if route is NO_ROUTE:
            raise HubError(404, f"This Hub has no {request.method} {request.path}")
        secret = request.params.get("secret")
        if secret is None:
            request.user = self._user(request)
        elif secret != self.secret:
            raise HubError(403, "The signature of this address is not valid")
        elif request.headers.get("Authorization", "").startswith("Bearer hf_"):
            raise HubError(400, "Only one auth mechanism allowed")  # as S3: a token must not leave the Hub
        with self.storage.lock:
            repository = self._repository(route, request) if route.access else None
            return getattr(self, route.name)(request, repository)

    def _user(self, request: Request) -> User | None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.users.get(token)

    def _is_member(self, user: User | None, repo_id: str) -> bool:
        if user is None or user.role != "write":
            return False
        return repo_id.split("/")[0] in (user.name, *self.organizations)

    def _require_write(self, user: User | None, repo_id: str) -> None:
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if not self._is_member(user, repo_id):
            raise HubError(403, f"Forbidden: {user.name}'s {user.role} token may not write to {repo_id}")

    def _repository(self, route: Route, request: Request) -> Repository:
        repo_id = request.params["repo_id"]
        repository = self.storage.find(request.params.get("kind", "model"), repo_id)
        if repository is None or (repository.private and not self._is_member(request.user, repo_id)):
            # The Hub tells strangers nothing about what exists, and asks them to log in first.
            if request.user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if route.access == "write":
            self._require_write(request.user, repo_id)
        return repository

    # Users and repositories

    def whoami(self, request: Request, _: None) -> Response:
        if request.user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        orgs = [{"type": "org", "name": name} for name in self.organizations if request.user.role == "write"]
        token = {"displayName": "test", "role": request.user.role}
        auth = {"type": "access_token", "accessToken": token}
        return Response({"type": "user", "name": request.user.name, "orgs": orgs, "auth": auth})

    def validate_yaml(self, request: Request, _: None) -> Response:
        """The check that precedes every upload of a README."""
        errors, warnings = check_card(request.json()["content"])[1:]
        found = {"errors": errors, "warnings": warnings}
        body = {key: [{"message": message} for message in messages] for key, messages in found.items()}
        return Response(body, status=400 if errors else 200)

    def create_repo(self, request: Request, _: None) -> Response:
        data = request.json()
        repo_type, repo_id = self._named_repository(data, request.user)
        self._require_write(request.user, repo_id)
        url = f"{self.url}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
        private = data.get("visibility") == "private" or bool(data.get("private"))
        if self.storage.find(repo_type, repo_id):
            raise HubError(409, f"You already created this {repo_type} repo: {repo_id}", url=url)
        self.storage.create(repo_type, repo_id, private)
        return Response({"url": url, "name": repo_id})

    def delete_repo(self, request: Request, _: None) -> Response:
        repo_type, repo_id = self._named_repository(request.json(), request.user)
        repository = self.storage.find(repo_type, repo_id)
        if repository is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        self._require_write(request.user, repo_id)
        self.storage.delete(repository)
        return Response({})

    def _named_repository(self, data: dict[str, Any], user: User | None) -> tuple[str, str]:
        namespace = data.get("organization") or (user.name if user else "")
        return data.get("type") or "model", f"{namespace}/{data['name']}"

    def repo_info(self, request: Request, repository: Repository) -> Response:
        commit = repository.resolve(request.params.get("revision", "main"))
        return Response(self.storage.describe(repository, commit, with_blobs="blobs" in request.query))

    def commit(self, request: Request, repository: Repository) -> Response:
        assert request.user is not None  # the route requires the right to write
        try:
            lines = [json.loads(line) for line in request.body.splitlines()]
            header, operations = lines[0]["value"], lines[1:]
        except (ValueError, LookupError) as error:
            raise HubError(400, "A commit is JSON lines, the first one its header") from error
        commit, pull_request = self.storage.commit(
            *(repository, request.params["revision"], header, operations, request.user.name),
            as_pull_request=request.query.get("create_pr") == "1",
        )
        page = f"{self.url}/{repository.path}"
        body = {"success": True, "commitOid": commit.sha, "commitUrl": f"{page}/commit/{commit.sha}"}
        if pull_request is not None:
            body["pullRequestUrl"] = f"{page}/discussions/{pull_request.number}"
        return Response(body)

    # Revisions

    def tree(self, request: Request, repository: Repository) -> Response:
        commit = repository.resolve(request.params["revision"])
        folder = request.params.get("path", "").strip("/")
        recursive = request.query.get("recursive", "").lower() in ("1", "true")
        return Response(commit.entries(folder, recursive))

    def paths_info(self, request: Request, repository: Repository) -> Response:
        commit = repository.resolve(request.params["revision"])
        is_json = "json" in request.headers.get("Content-Type", "")
        paths = (request.json() if is_json else parse_qs(request.body.decode())).get("paths", [])
        return Response([entry for entry in commit.entries() if entry["path"] in paths])

    def refs(self, request: Request, repository: Repository) -> Response:
        def listed(prefix: str) -> list[dict[str, str]]:
            found = [(ref, sha) for ref, sha in repository.refs.items() if ref.startswith(prefix)]
            return [{"name": ref[len(prefix) :], "ref": ref, "targetCommit": sha} for ref, sha in found]

        body = {"branches": listed("refs/heads/"), "tags": listed("refs/tags/"), "converts": []}
        if "include_prs" in request.query:
            body["pullRequests"] = listed("refs/pr/")
        return Response(body)

    def commits(self, request: Request, repository: Repository) -> Response:
        log = repository.log(request.params["revision"])
        return Response([commit.entry() for commit in log])

    def create_branch(self, request: Request, repository: Repository) -> Response:
        name = request.params["name"]
        if name.startswith("refs/"):
            raise HubError(400, f"Invalid reference for a branch: {name}")
        repository.create_ref(f"refs/heads/{name}", request.json().get("startingPoint") or "main")
        return Response({})

    def delete_branch(self, request: Request, repository: Repository) -> Response:
        repository.delete_ref(f"refs/heads/{request.params['name']}")
        return Response({})

    def create_tag(self, request: Request, repository: Repository) -> Response:
        repository.create_ref(f"refs/tags/{request.json()['tag']}", request.params["revision"])
        return Response({})

    def delete_tag(self, request: Request, repository: Repository) -> Response:
        repository.delete_ref(f"refs/tags/{request.params['name']}")
        return Response({})

    def create_discussion(self, request: Request, repository: Repository) -> Response:
        assert request.user is not None  # the route requires the right to write
        data = request.json()
        if not data.get("pullRequest"):
            raise HubError(400, "Only pull requests are supported")
        opened = repository.open_pull_request(data["title"], request.user.name, "refs/heads/main", "main")
        return Response({"num": opened.number})

    def discussion(self, request: Request, repository: Repository) -> Response:
        found = repository.pull_requests.get(int(request.params["number"]))
        if found is None:
            raise HubError(404, "Discussion not found")
        repo = {"name": repository.repo_id, "type": repository.repo_type}
        about = {"title": found.title, "author": {"name": found.author}, "createdAt": timestamp(found.date)}
        state = {"status": "draft", "events": [], "filesWithConflicts": [], "changes": {"base": found.base}}
        return Response({"num": found.number, "isPullRequest": True, "repo": repo, **about, **state})


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
            token: whose token the process finds; `token` when `None`, nobody's when empty.
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
            **{
                "HF_HUB_DISABLE_XET": "0",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            },
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
        title: str = "A change by somebody else",
        revision: str = "main",
        repo_type: str = "model",
    ) -> str:
        """Commit files as somebody else would, `None` deletes one; return the sha."""
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
            commit, _ = self._storage.commit(repository, revision, {"summary": title}, operations, "somebody")
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
        """Return the requests to a route so far, by its name in `ROUTES`."""
        return [entry for entry in self.requests if _match(entry.method, entry.path)[0].name == _known(route)]

    def fault(self, route: str, **effects: Any) -> Fault:
        """Make requests to a route fail; return the fault, which counts how often it fired.

        Args:
            route: a name in `ROUTES`. "resolve" sees a HEAD and a GET for each file.
            effects: at least one of
                `status` (answer with this error; `retry_after` adds the header, in seconds),
                `delay` (seconds before anything else),
                `drop` ("request": the connection breaks while the body arrives, nothing happens;
                "response": the request takes effect, the connection breaks within the answer),
                `corrupt` (one byte of the content is wrong; for "resolve", "download", "xet_download"),
                `before` (called before the request is handled: what somebody else does in between);
                and `times` (once unless said, `None`: always) and `match` (a part of the path and query).

        Raises:
            ValueError: there is no such route or effect.
        """
        fault = Fault(_known(route), **effects)
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
        route, params = _match(self.command, self.path)
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


def _match(method: str, target: str) -> tuple[Route, dict[str, str]]:
    path = target.partition("?")[0]
    for route in ROUTES:
        found = re.fullmatch(route.pattern, path) if route.method == method.replace("HEAD", "GET") else None
        if found:
            groups = found.groupdict().items()
            return route, {name: unquote(value) for name, value in groups if value is not None}
    return NO_ROUTE, {}


def _known(route: str) -> str:
    names = [known.name for known in ROUTES]
    if route not in names:
        close = difflib.get_close_matches(route, names, 1, 0)
        raise ValueError(f"There is no route {route!r}; did you mean {close[0]!r}? All: {', '.join(names)}")
    return route


def _with_one_byte_changed(data: bytes) -> bytes:
    place = len(data) // 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :] if data else b"\1"


def _break(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the client was faster
