"""What the local Hub answers: its routes, and one method for each."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import unquote

from hub_storage import HubError, HubStorage, Repository, check_card
from hub_xet import LargeFileApi, Request, Response, User

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
    Route("validate_yaml", "POST", r"/api/validate-yaml"),
    Route("create_repo", "POST", r"/api/repos/create"),
    Route("repo_info", "GET", rf"{REPO}(?:/revision/{REVISION})?", "read"),
    Route("tree", "GET", rf"{REPO}/tree/{REVISION}(?:/(?P<path>.*))?", "read"),
    Route("commits", "GET", rf"{REPO}/commits/{REVISION}", "read"),
    Route("create_tag", "POST", rf"{REPO}/tag/{REVISION}", "write"),
    Route("preupload", "POST", rf"{REPO}/preupload/{REVISION}", "write"),
    Route("commit", "POST", rf"{REPO}/commit/{REVISION}", "write"),
    Route("resolve", "GET", rf"{PAGE}/resolve/{REVISION}/(?P<path>.+)", "read"),
    Route("download", "GET", rf"{STORAGE}/{KEY}"),
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

    def validate_yaml(self, request: Request, _: None) -> Response:
        """The check that precedes every upload of a README."""
        errors, warnings = check_card(request.json()["content"])[1:]
        found = {"errors": errors, "warnings": warnings}
        body = {key: [{"message": message} for message in messages] for key, messages in found.items()}
        return Response(body, status=400 if errors else 200)

    def create_repo(self, request: Request, _: None) -> Response:
        data = request.json()
        namespace = data.get("organization") or (request.user.name if request.user else "")
        repo_type, repo_id = data.get("type") or "model", f"{namespace}/{data['name']}"
        self._require_write(request.user, repo_id)
        url = f"{self.url}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
        private = data.get("visibility") == "private" or bool(data.get("private"))
        if self.storage.find(repo_type, repo_id):
            raise HubError(409, f"You already created this {repo_type} repo: {repo_id}", url=url)
        self.storage.create(repo_type, repo_id, private)
        return Response({"url": url, "name": repo_id})

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
        commit, number = self.storage.commit(
            *(repository, request.params["revision"], header, operations, request.user.name),
            as_pull_request=request.query.get("create_pr") == "1",
        )
        page = f"{self.url}/{repository.path}"
        body = {"success": True, "commitOid": commit.sha, "commitUrl": f"{page}/commit/{commit.sha}"}
        if number is not None:
            body["pullRequestUrl"] = f"{page}/discussions/{number}"
        return Response(body)

    # Revisions

    def tree(self, request: Request, repository: Repository) -> Response:
        commit = repository.resolve(request.params["revision"])
        folder = request.params.get("path", "").strip("/")
        recursive = request.query.get("recursive", "").lower() in ("1", "true")
        return Response(commit.entries(folder, recursive))

    def commits(self, request: Request, repository: Repository) -> Response:
        log = repository.log(request.params["revision"])
        return Response([commit.entry() for commit in log])

    def create_tag(self, request: Request, repository: Repository) -> Response:
        repository.create_ref(f"refs/tags/{request.json()['tag']}", request.params["revision"])
        return Response({})


def match_route(method: str, target: str) -> tuple[Route, dict[str, str]]:
    """Return the route of a request and the parameters in its path."""
    path = target.partition("?")[0]
    for route in ROUTES:
        found = re.fullmatch(route.pattern, path) if route.method == method.replace("HEAD", "GET") else None
        if found:
            groups = found.groupdict().items()
            return route, {name: unquote(value) for name, value in groups if value is not None}
    return NO_ROUTE, {}


def known_route(route: str) -> str:
    """Return the name of a route; raise `ValueError` with a close one if there is none of this name."""
    names = [known.name for known in ROUTES]
    if route not in names:
        close = difflib.get_close_matches(route, names, 1, 0)
        raise ValueError(f"There is no route {route!r}; did you mean {close[0]!r}? All: {', '.join(names)}")
    return route
