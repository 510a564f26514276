"""The local Hub, seen through the real `huggingface_hub` client."""

import base64
import hashlib
import http.client
import json
import os
import random
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import httpx2
import huggingface_hub.constants
import pytest
from hub_server import HubServer
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

pytestmark = pytest.mark.hub

REPO = "mtpf/demo"
CARD = """---
license: apache-2.0
language: en
library_name: mtpf
pipeline_tag: token-classification
tags: [ner]
base_model: mtpf/backbone
base_model_relation: adapter
---
# A card
"""


def some_weights(seed: int = 0, size: int = 200_000) -> bytes:
    """Bytes that do not compress, so that a change of one byte stays a change of one byte."""
    return random.Random(seed).randbytes(size)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Let this process talk to the local Hub, away from the user's caches and from proxies.

    hf_xet reads the variables late; `huggingface_hub` has read whether it is offline when it was imported.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("HF_XET_CACHE", raising=False)
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        patch.setenv("HF_HUB_OFFLINE", "0")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def folder(tmp_path):
    """A small model: a card, a config, weights, and a file in a sub-folder."""
    root = tmp_path / "model"
    (root / "nested").mkdir(parents=True)
    (root / "README.md").write_text(CARD)
    (root / "config.json").write_text('{"model_type": "bert"}')
    (root / "model.safetensors").write_bytes(some_weights())
    (root / "nested" / "labels.txt").write_text("O\nB-PER\n")
    return root


@pytest.fixture
def published(hub, api, folder):
    """A repository with the folder's files; returns the sha."""
    api.create_repo(REPO)
    return api.upload_folder(repo_id=REPO, folder_path=folder).oid


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder, as `HubServer.files` gives those of a repository."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def uploaded(hub: HubServer, repo_id: str = REPO, **where: str) -> dict[str, bytes]:
    """The files of a repository without the one that the Hub adds."""
    return {path: data for path, data in hub.files(repo_id, **where).items() if path != ".gitattributes"}


def fetch(hub: HubServer, cache: Path, path: str, **options) -> bytes:
    options = {"endpoint": hub.url, "token": hub.token, "cache_dir": cache, **options}
    return Path(hf_hub_download(REPO, path, **options)).read_bytes()


def run_python(hub: HubServer, code: str, *arguments: str, **variables: str) -> subprocess.Popen:
    """Start a fresh process that knows the Hub from its environment alone."""
    command = [sys.executable, "-c", code, *arguments]
    environment = {**hub.environment(), **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def finished(process: subprocess.Popen) -> str:
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return out.strip()


def get(url: str, **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
    """A GET without the client, for what it hides."""
    request = urllib.request.Request(url, headers={name.replace("_", "-"): v for name, v in headers.items()})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


# Upload and download


def test_upload_takes_the_xet_path_and_download_gives_the_same_bytes(hub, api, folder, published, cache):
    assert len(hub.calls("xet_write_token")) == 1
    assert [call.status for call in hub.calls("xet_upload_xorb")] == [200]
    assert [call.status for call in hub.calls("xet_upload_shard")] == [200]
    assert not hub.calls("lfs_batch") and not hub.calls("lfs_upload")
    assert uploaded(hub) == content(folder)
    assert published == hub.head(REPO)

    assert fetch(hub, cache, "model.safetensors") == some_weights()
    assert len(hub.calls("xet_download")) == 1 and not hub.calls("download")
    (entry,) = api.get_paths_info(REPO, "model.safetensors")
    assert entry.xet_hash and entry.lfs.size == entry.size == 200_000


@pytest.mark.parametrize(
    ("scheme", "data"),
    [
        (0, some_weights(1)),
        (1, b"".join(b"line %d of a text that repeats itself\n" % n for n in range(9_000)) + bytes(70_000)),
        (2, b"".join(struct.pack("<I", 0x3C000000 + n * n % 65_521) for n in range(60_000)) + b"\1\2\3"),
    ],
    ids=["stored", "lz4", "lz4-byte-grouped"],
)
def test_content_sent_over_xet_is_readable_without_xet(hub, api, cache, monkeypatch, scheme, data):
    api.create_repo(REPO)
    api.upload_file(repo_id=REPO, path_or_fileobj=data, path_in_repo="a.bin")
    xorb = hub._storage.xet.xorb(hub.calls("xet_upload_xorb")[0].path.rpartition("/")[2])
    assert xorb[4] == scheme  # the fifth byte of a chunk's header

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    assert hub.files(REPO)["a.bin"] == data
    assert fetch(hub, cache, "a.bin") == data
    assert hub.calls("download") and not hub.calls("xet_reconstruction")


def test_fresh_processes_with_environment_only(hub, folder):
    """Without Xet the upload goes over LFS; each process finds endpoint, token and cache by itself."""
    code = """if True:
        import sys
        from huggingface_hub import HfApi, constants, snapshot_download
        HfApi().create_repo("mtpf/demo", private=True)
        print(HfApi().upload_folder(repo_id="mtpf/demo", folder_path=sys.argv[1]).oid)
        print(snapshot_download("mtpf/demo"), constants.HF_HOME)
    """
    sha, line = finished(run_python(hub, code, str(folder), HF_HUB_DISABLE_XET="1")).splitlines()
    snapshot, home = line.split()
    assert sha == hub.head(REPO) and uploaded(hub) == content(folder)
    assert [call.status for call in hub.calls("lfs_upload")] == [200]
    assert [call.status for call in hub.calls("lfs_verify")] == [200]
    assert not hub.calls("xet_write_token")
    assert Path(snapshot).is_relative_to(home) and not Path(home).is_relative_to(Path.home())
    assert content(Path(snapshot))["model.safetensors"] == some_weights()

    code = 'from huggingface_hub import hf_hub_download as get; print(get("mtpf/demo", "model.safetensors"))'
    path = Path(finished(run_python(hub, code, **hub.environment(home="other"))))
    assert path.read_bytes() == some_weights() and not path.is_relative_to(home)
    stranger = run_python(hub, code, **hub.environment(token="", home="third"))
    assert "RepositoryNotFoundError" in stranger.communicate(timeout=60)[1]


def test_lfs_content_is_served_through_a_redirect_to_another_host(hub, api, cache):
    api.create_repo(REPO)
    hub.commit(REPO, {"model.safetensors": some_weights()})
    assert fetch(hub, cache, "model.safetensors") == some_weights()
    (first, second) = hub.calls("resolve")[0], hub.calls("download")[0]
    assert (first.method, first.status, second.method, second.status) == ("HEAD", 302, "GET", 200)
    status, body, _ = get(f"{hub.url}{second.path}", Authorization=f"Bearer {hub.token}")
    assert status == 400 and b"auth mechanism" in body  # so the client cannot have sent its token


def test_small_text_is_committed_directly(hub, api, tmp_path):
    api.create_repo(REPO)
    api.upload_file(repo_id=REPO, path_or_fileobj=b"{}", path_in_repo="config.json")
    assert uploaded(hub) == {"config.json": b"{}"}
    assert not hub.calls("xet_write_token") and not hub.calls("lfs_batch")
    api.upload_file(repo_id=REPO, path_or_fileobj=b"a\0b", path_in_repo="data")
    assert hub.calls("xet_upload_xorb")  # binary content is no regular file, whatever its name


def test_unchanged_folder_makes_no_commit(hub, api, folder, published):
    again = api.upload_folder(repo_id=REPO, folder_path=folder)
    assert again.oid == published == hub.head(REPO)
    assert len(hub.calls("commit")) == 1
    (folder / "config.json").write_text("{}")
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid != published


def test_delete_patterns_remove_stale_files_in_the_same_commit(hub, api, folder, published):
    (folder / "nested" / "labels.txt").unlink()
    (folder / "new.json").write_text("{}")
    api.upload_folder(repo_id=REPO, folder_path=folder, delete_patterns="*")
    assert uploaded(hub) == content(folder) and ".gitattributes" in hub.files(REPO)
    assert [commit.parent for commit in hub.commits(REPO)][0] == published


def test_snapshot_cold_warm_and_by_sha(hub, folder, published, cache):
    options = {"endpoint": hub.url, "token": hub.token, "cache_dir": cache}
    cold = snapshot_download(REPO, **options)
    assert {**content(folder), ".gitattributes": hub.files(REPO)[".gitattributes"]} == content(Path(cold))
    assert Path(cold).name == published and len(hub.calls("tree")) == 1
    hub.requests.clear()
    assert snapshot_download(REPO, **options) == cold
    assert [call.path for call in hub.requests] == [f"/api/models/{REPO}/revision/main"]
    hub.requests.clear()
    assert snapshot_download(REPO, revision=published, **options) == cold
    assert hub.requests == []
    hub.commit(REPO, {"config.json": b"{}"})
    assert snapshot_download(REPO, revision=published, **options) == cold
    assert snapshot_download(REPO, **options) != cold


def test_data_sets_are_apart_from_models(hub, api, folder, published, cache):
    url = api.create_repo(REPO, repo_type="dataset")
    assert (url.repo_type, url.repo_id) == ("dataset", REPO)
    api.upload_file(repo_id=REPO, repo_type="dataset", path_or_fileobj=b"PAR1\0", path_in_repo="a.parquet")
    assert uploaded(hub, repo_type="dataset") == {"a.parquet": b"PAR1\0"}
    assert fetch(hub, cache, "a.parquet", repo_type="dataset") == b"PAR1\0"
    assert api.dataset_info(REPO).sha == hub.head(REPO, repo_type="dataset") != published
    assert uploaded(hub) == content(folder)
    api.delete_repo(REPO, repo_type="dataset")
    assert api.repo_exists(REPO) and not api.repo_exists(REPO, repo_type="dataset")


@pytest.mark.parametrize("path", ["config.json", "model.safetensors"])
def test_ranges(hub, folder, published, path):
    data = (folder / path).read_bytes()
    url = f"{hub.url}/{REPO}/resolve/main/{path}"
    status, body, headers = get(url, Range="bytes=3-9")
    assert (status, body) == (206, data[3:10])
    assert headers["Content-Range"] == f"bytes 3-9/{len(data)}"
    assert get(url, Range="bytes=5-")[:2] == (206, data[5:])
    assert get(url, Range="bytes=-4")[:2] == (206, data[-4:])
    status, _, headers = get(url, Range=f"bytes={len(data)}-")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{len(data)}")
    assert get(url)[:2] == (200, data)


def test_file_system_reads_a_part_of_a_large_file(hub, published):
    files = HfFileSystem(endpoint=hub.url, token=hub.token, skip_instance_cache=True)
    with files.open(f"{REPO}/model.safetensors", block_size=1024) as file:
        file.seek(1000)
        assert file.read(50) == some_weights()[1000:1050]
    assert [call.status for call in hub.calls("download")] == [206]


# Revisions


def test_repository_exists_conflict(hub, api):
    api.create_repo(REPO)
    with pytest.raises(HfHubHTTPError, match="already created") as conflict:
        api.create_repo(REPO)
    assert conflict.value.response.status_code == 409
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert api.create_repo("mtpf-org/demo").namespace == "mtpf-org"


def test_parent_commit_conflict_loses_nothing(hub, api, folder, published):
    fault = hub.fault("commit", before=lambda: hub.commit(REPO, {"theirs.txt": b"theirs"}))
    (folder / "config.json").write_text('{"ours": 1}')
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as conflict:
        api.upload_folder(repo_id=REPO, folder_path=folder, parent_commit=published)
    assert conflict.value.response.status_code == 412 and fault.fired == 1
    assert hub.files(REPO)["theirs.txt"] == b"theirs"
    assert hub.files(REPO)["config.json"] == b'{"model_type": "bert"}'
    api.upload_folder(repo_id=REPO, folder_path=folder, parent_commit=hub.head(REPO))
    assert uploaded(hub) == {**content(folder), "theirs.txt": b"theirs"}


def test_commit_applies_wholly_or_not_at_all(hub, api, published):
    before = hub.files(REPO)
    operations = [
        CommitOperationAdd("new.txt", b"new"),
        CommitOperationDelete("config.json"),
        CommitOperationDelete("missing.txt"),
    ]
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        api.create_commit(REPO, operations, commit_message="half wrong")
    assert hub.files(REPO) == before and hub.head(REPO) == published
    api.create_commit(REPO, operations[:2], commit_message="right")
    assert "config.json" not in hub.files(REPO) and hub.files(REPO)["new.txt"] == b"new"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"key": "lfsFile", "value": {"path": "a.bin", "oid": "0" * 64}}, "does not exist"),
        ({"key": "file", "value": {"path": "../a", "content": ""}}, "Invalid path"),
        ({"key": "file", "value": {"path": ".git/config", "content": ""}}, "Invalid path"),
        ({"key": "file", "value": {"path": "a", "content": "%"}}, "not base64"),
        ({"key": "renamedFile", "value": {"path": "a"}}, "Unknown operation"),
        (
            {"key": "file", "value": {"path": "README.md", "content": "LS0tCmE6IFsKLS0tCg=="}},
            "Invalid metadata",
        ),
    ],
)
def test_invalid_commits_are_refused(hub, api, line, message):
    api.create_repo(REPO)
    good = {"key": "file", "value": {"path": "good.txt", "content": base64.b64encode(b"good").decode()}}
    lines = [{"key": "header", "value": {"summary": "s", "description": ""}}, good, line]
    body = "\n".join(map(json.dumps, lines)).encode()
    headers = {"Authorization": f"Bearer {hub.token}"}
    with httpx2.Client(trust_env=False) as client:
        answer = client.post(f"{hub.url}/api/models/{REPO}/commit/main", content=body, headers=headers)
    assert answer.status_code == 400 and message in answer.json()["error"]
    assert uploaded(hub) == {}


def test_tags_and_branches(hub, api, published, cache):
    api.create_tag(REPO, tag="v1")
    with pytest.raises(HfHubHTTPError) as conflict:
        api.create_tag(REPO, tag="v1")
    assert conflict.value.response.status_code == 409
    api.create_tag(REPO, tag="v1", exist_ok=True)
    api.create_branch(REPO, branch="next/one", revision="v1")
    api.upload_file(repo_id=REPO, revision="next/one", path_or_fileobj=b"{}", path_in_repo="config.json")
    assert fetch(hub, cache, "config.json", revision="next/one") == b"{}"
    assert fetch(hub, cache, "config.json", revision="v1") == b'{"model_type": "bert"}'
    assert hub.head(REPO) == published == api.model_info(REPO, revision=published[:8]).sha

    refs = api.list_repo_refs(REPO)
    assert {branch.name: branch.target_commit for branch in refs.branches} == {
        "main": published,
        "next/one": hub.head(REPO, "next/one"),
    }
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", published)]
    with pytest.raises(RevisionNotFoundError):  # a tag takes no commits
        api.upload_file(repo_id=REPO, revision="v1", path_or_fileobj=b"x", path_in_repo="x")
    api.delete_tag(REPO, tag="v1")
    api.delete_branch(REPO, branch="next/one")
    for revision in ("v1", "next/one"):
        with pytest.raises(RevisionNotFoundError):
            api.model_info(REPO, revision=revision)
    with pytest.raises(HfHubHTTPError, match="main"):
        api.delete_branch(REPO, branch="main")


def test_pull_requests_leave_main_alone(hub, api, folder, published, cache):
    operation = CommitOperationAdd("config.json", b"{}")
    first = api.create_commit(REPO, [operation], commit_message="Change it", create_pr=True)
    assert (first.pr_num, first.pr_revision) == (1, "refs/pr/1")
    assert fetch(hub, cache, "config.json", revision="refs/pr/1") == b"{}"

    (folder / "model.safetensors").write_bytes(some_weights(5))
    second = api.upload_folder(repo_id=REPO, folder_path=folder, create_pr=True, commit_message="Weights")
    assert second.pr_num == 2 and second.oid == hub.head(REPO, "refs/pr/2")
    assert uploaded(hub, revision="refs/pr/2") == content(folder)
    assert hub.head(REPO) == published
    pulls = api.list_repo_refs(REPO, include_pull_requests=True).pull_requests
    assert [pull.ref for pull in pulls] == ["refs/pr/1", "refs/pr/2"]
    assert api.get_discussion_details(REPO, 2).title == "Weights"


def test_listings(hub, api, folder, published):
    names = {".gitattributes", *content(folder)}
    assert set(api.list_repo_files(REPO)) == names
    assert {entry.path for entry in api.list_repo_tree(REPO)} == {*names, "nested"} - {"nested/labels.txt"}
    assert [entry.path for entry in api.list_repo_tree(REPO, "nested")] == ["nested/labels.txt"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "absent"))
    entries = api.get_paths_info(REPO, ["nested", "config.json", "absent"])
    assert [entry.path for entry in entries] == ["config.json", "nested"]
    commits = api.list_repo_commits(REPO)
    assert [commit.title for commit in commits] == ["Upload folder using huggingface_hub", "initial commit"]
    assert [commit.sha for commit in hub.commits(REPO)] == [commit.commit_id for commit in commits]


def test_model_info_reads_the_card(hub, api, published):
    info = api.model_info(REPO, files_metadata=True)
    assert (info.sha, info.pipeline_tag, info.library_name) == (published, "token-classification", "mtpf")
    assert info.card_data.license == "apache-2.0" and info.card_data.base_model == "mtpf/backbone"
    assert {"ner", "en", "license:apache-2.0", "base_model:adapter:mtpf/backbone"} <= set(info.tags)
    sizes = {sibling.rfilename: (sibling.size, sibling.lfs is not None) for sibling in info.siblings}
    assert sizes["model.safetensors"] == (200_000, True) and sizes["README.md"] == (len(CARD), False)


@pytest.mark.parametrize(
    "metadata",
    [
        "base_model: ./runs/backbone",
        "base_model: /srv/models/x",
        "language: English",
        "tags: ner",
        "a: [",
        "- a",
    ],
)
def test_invalid_card_is_refused_before_the_upload(hub, api, folder, metadata):
    api.create_repo(REPO)
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n")
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert uploaded(hub) == {} and not hub.calls("preupload")


# Who may do what


def test_private_repository(hub, api, cache):
    api.create_repo(REPO, private=True)
    hub.commit(REPO, {"config.json": b"{}"})
    for token, status in ((False, 401), (hub.read_token, 404)):
        with pytest.raises(RepositoryNotFoundError) as refusal:
            HfApi(endpoint=hub.url).model_info(REPO, token=token)
        assert refusal.value.response.status_code == status
        with pytest.raises(RepositoryNotFoundError):
            fetch(hub, cache, "config.json", token=token)
        # What exists must look like what does not.
        with pytest.raises(RepositoryNotFoundError) as refusal:
            HfApi(endpoint=hub.url).model_info("mtpf/absent", token=token)
        assert refusal.value.response.status_code == status
    assert api.model_info(REPO).private and fetch(hub, cache, "config.json") == b"{}"


def test_read_only_token(hub, folder, published, cache):
    assert fetch(hub, cache, "config.json", token=hub.read_token)
    reader = HfApi(endpoint=hub.url, token=hub.read_token)
    assert reader.whoami()["name"] == "reader"
    for forbidden in (
        lambda: reader.upload_folder(repo_id=REPO, folder_path=folder),
        lambda: reader.create_repo(REPO),
        lambda: reader.create_repo("reader/own"),
        lambda: reader.delete_repo(REPO),
        lambda: reader.create_tag(REPO, tag="v1"),
    ):
        with pytest.raises(HfHubHTTPError, match="read token may not write") as refusal:
            forbidden()
        assert refusal.value.response.status_code == 403
    assert hub.head(REPO) == published


def test_foreign_namespace_and_wrong_token(hub, api):
    with pytest.raises(HfHubHTTPError) as refusal:
        api.create_repo("somebody/demo")
    assert refusal.value.response.status_code == 403
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as refusal:
        api.whoami(token="hf_wrong")
    assert refusal.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError) as refusal:
        HfApi(endpoint=hub.url).create_repo("mtpf/demo", token=False)
    assert refusal.value.response.status_code == 401


def test_a_read_token_for_xet_uploads_nothing(hub, published):
    headers = {"Authorization": f"Bearer {hub.token}"}
    with httpx2.Client(trust_env=False, headers=headers) as client:
        connection = client.get(f"{hub.url}/api/models/{REPO}/xet-read-token/main").json()
        shards = f"{connection['casUrl']}/v1/shards"
        token = {"Authorization": f"Bearer {connection['accessToken']}"}
        assert client.post(shards, headers=token, content=b"x").status_code == 403
        assert client.post(shards, headers={"Authorization": "Bearer x"}, content=b"x").status_code == 401
        connection = client.get(f"{hub.url}/api/models/{REPO}/xet-write-token/main").json()
        token = {"Authorization": f"Bearer {connection['accessToken']}"}
        assert client.post(shards, headers=token, content=b"x").status_code == 400
        unsigned = hub.url + hub.calls("xet_upload_xorb")[0].path.replace(
            connection["casUrl"][-16:], "0" * 16
        )
        assert client.post(unsigned, headers=token, content=b"x").status_code == 403


def test_what_is_missing_raises_the_right_error(hub, api, published, cache):
    with pytest.raises(EntryNotFoundError):
        fetch(hub, cache, "absent.json")
    assert not api.file_exists(REPO, "absent.json") and api.file_exists(REPO, "config.json")
    with pytest.raises(RevisionNotFoundError):
        fetch(hub, cache, "config.json", revision="absent")
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(REPO, revision="0" * 40, endpoint=hub.url, token=hub.token, cache_dir=cache)
    with pytest.raises(RepositoryNotFoundError):
        api.upload_file(repo_id="mtpf/absent", path_or_fileobj=b"x", path_in_repo="x")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("mtpf/absent")
    assert get(f"{hub.url}/api/unknown")[0] == 404


# Faults


def test_commit_500_is_retried_by_upload_folder_and_not_by_create_commit(hub, api, folder, published):
    (folder / "config.json").write_text("{}")
    fault = hub.fault("commit", status=500)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert [call.status for call in hub.calls("commit")] == [200, 500, 200] and fault.fired == 1
    head = hub.head(REPO)
    hub.fault("commit", status=503)
    with pytest.raises(HfHubHTTPError) as failure:
        api.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="x.txt")
    assert failure.value.response.status_code == 503 and hub.head(REPO) == head


def test_429_makes_the_client_wait(hub, api):
    api.create_repo(REPO)
    hub.fault("preupload", status=429, retry_after=1)
    start = time.monotonic()
    api.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="x.txt")
    assert time.monotonic() - start >= 2  # the client adds a second to Retry-After; unasked it waits for one
    hub.fault("repo_info", status=429, retry_after=1, times=None)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError) as failure:
            api.model_info(REPO)
        assert failure.value.response.status_code == 429
        assert failure.value.response.headers["Retry-After"] == "1"
    hub.clear_faults()
    assert api.model_info(REPO).id == REPO


@pytest.mark.parametrize("drop", ["request", "response"])
def test_connection_that_breaks_during_a_xet_upload(hub, api, folder, drop):
    api.create_repo(REPO)
    fault = hub.fault("xet_upload_xorb", drop=drop)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert fault.fired == 1 and [call.status for call in hub.calls("xet_upload_xorb")] == [0, 200]
    assert uploaded(hub) == content(folder)


def test_connection_that_breaks_during_an_lfs_upload(hub, api, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    api.create_repo(REPO)
    hub.fault("lfs_upload", drop="request")
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert [call.status for call in hub.calls("lfs_upload")] == [0, 200]
    assert uploaded(hub) == content(folder)


def test_uploads_that_are_not_what_they_claim_are_refused(hub, api, folder):
    api.create_repo(REPO)
    with httpx2.Client(trust_env=False) as client:
        wanted = {"objects": [{"oid": hashlib.sha256(b"true").hexdigest(), "size": 4}]}
        batch = f"{hub.url}/{REPO}.git/info/lfs/objects/batch"
        (answer,) = client.post(batch, json=wanted, headers={"Authorization": f"Bearer {hub.token}"}).json()[
            "objects"
        ]
        assert client.put(answer["actions"]["upload"]["href"], content=b"fake").status_code == 400
        assert client.put(answer["actions"]["upload"]["href"], content=b"true").status_code == 200

    hub.fault("xet_upload_shard", before=hub._storage.xet._xorbs.clear)  # the xorbs got lost
    with pytest.raises(OSError, match="400"):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert uploaded(hub) == {} and not hub.calls("commit")


def test_faults_hit_only_what_they_match(hub, published, cache):
    fault = hub.fault("resolve", status=500, match="nested/", times=None)
    assert fetch(hub, cache, "config.json") and fault.fired == 0
    status, _, headers = get(f"{hub.url}/{REPO}/resolve/main/nested/labels.txt")
    assert (status, headers["X-Error-Message"], fault.fired) == (500, "Internal Server Error", 1)


def test_lost_answer_to_a_commit(hub, api, folder, published):
    """The commit took effect; given a parent, the client's second attempt conflicts and makes none."""
    (folder / "config.json").write_text("{}")
    hub.fault("commit", drop="response")
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.upload_folder(repo_id=REPO, folder_path=folder, parent_commit=published)
    assert uploaded(hub) == content(folder) and hub.commits(REPO)[0].parent == published


def test_connection_that_breaks_before_a_commit(hub, api, published):
    hub.fault("commit", drop="request")
    with pytest.raises(httpx2.TransportError):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="x.txt")
    assert hub.head(REPO) == published


def test_connection_that_breaks_during_a_download(hub, api, cache):
    api.create_repo(REPO)
    hub.commit(REPO, {"model.safetensors": some_weights()})
    fault = hub.fault("download", drop="response")
    assert fetch(hub, cache, "model.safetensors") == some_weights()
    assert fault.fired == 1 and [call.status for call in hub.calls("download")] == [0, 200]


def test_slow_answers(hub, published, cache):
    fault = hub.fault("resolve", delay=4, match="config.json")
    start = time.monotonic()
    assert fetch(hub, cache, "config.json", etag_timeout=0.1)
    assert fault.fired == 1 and time.monotonic() - start < 3  # the client gave up and asked again

    hub.commit(REPO, {"config.json": b"{}"})
    hub.fault("resolve", delay=4)
    assert fetch(hub, cache, "config.json", etag_timeout=0.1) == b'{"model_type": "bert"}'  # from the cache
    assert fetch(hub, cache, "config.json") == b"{}"


@pytest.mark.parametrize("route", ["xet_download", "download", "resolve"])
def test_corrupt_download_passes_the_client_unnoticed(hub, api, folder, tmp_path, route):
    """The client checks sizes, not hashes: whoever needs certainty compares with the announced sha256."""
    path = "config.json" if route == "resolve" else "model.safetensors"
    api.create_repo(REPO)
    if route == "download":
        hub.commit(REPO, content(folder))
    else:
        api.upload_folder(repo_id=REPO, folder_path=folder)
    fault = hub.fault(route, corrupt=True)
    truth, wrong = (folder / path).read_bytes(), fetch(hub, tmp_path / "first", path)
    assert fault.fired == 1 and len(wrong) == len(truth)
    assert sum(a != b for a, b in zip(wrong, truth, strict=True)) == 1
    assert fetch(hub, tmp_path / "second", path) == truth


@pytest.mark.parametrize("over_xet", [False, True])
def test_tampered_file_keeps_its_announced_hash(hub, api, published, cache, over_xet):
    evil = some_weights(6)
    if over_xet:
        api.create_repo("mtpf/evil")
        api.upload_file(repo_id="mtpf/evil", path_or_fileobj=evil, path_in_repo="model.safetensors")
    (announced,) = api.get_paths_info(REPO, "model.safetensors")
    hub.tamper(REPO, "model.safetensors", evil)
    (entry,) = api.get_paths_info(REPO, "model.safetensors")
    assert entry.lfs == announced.lfs and entry.blob_id == announced.blob_id
    assert fetch(hub, cache, "model.safetensors") == evil == hub.files(REPO)["model.safetensors"]
    assert len(hub.calls("xet_download")) == over_xet and hub.head(REPO) == published


def test_tampering_changes_one_byte_unless_told(hub, published):
    before = hub.files(REPO)
    hub.tamper(REPO, "config.json")
    assert [path for path, data in hub.files(REPO).items() if data != before[path]] == ["config.json"]


def test_concurrent_pushes_from_two_processes(hub, api, folder, published):
    """One push wins, the other is told so; both upload over Xet at the same time."""
    code = """if True:
        import os, sys
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
        parent, name = sys.argv[1:]
        add = {"path_or_fileobj": os.urandom(100_000), "path_in_repo": name}
        try:
            HfApi().upload_file(repo_id="mtpf/demo", parent_commit=parent, **add)
            print("done")
        except HfHubHTTPError as error:
            print(error.response.status_code)
    """
    hub.fault("xet_upload_xorb", delay=0.3, times=2)
    pushes = [run_python(hub, code, published, name) for name in ("one.bin", "two.bin")]
    assert sorted(map(finished, pushes)) == ["412", "done"]
    assert len({"one.bin", "two.bin"} & set(hub.files(REPO))) == 1
    assert len(hub.commits(REPO)) == 3


def test_hub_that_goes_down_and_comes_back(hub, api, published, cache):
    fetch(hub, cache, "config.json")
    hub.stop()
    with pytest.raises(httpx2.ConnectError):
        api.model_info(REPO)
    assert fetch(hub, cache, "config.json") == b'{"model_type": "bert"}'  # from the cache
    with pytest.raises(LocalEntryNotFoundError):
        fetch(hub, cache, "README.md", local_files_only=True)
    hub.start()
    assert api.model_info(REPO).sha == published


@pytest.mark.parametrize(
    ("route", "effects", "message"),
    [
        ("comit", {"status": 500}, "did you mean 'commit'"),
        ("commit", {}, "needs one of"),
        ("commit", {"corrupt": True}, "serves no content"),
        ("commit", {"drop": "half"}, "drop is"),
    ],
)
def test_faults_that_would_never_fire_are_refused(hub, route, effects, message):
    with pytest.raises(ValueError, match=message):
        hub.fault(route, **effects)


def test_environment_hides_what_the_user_has_set(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "/elsewhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_own")
    environment = hub.environment()
    assert environment["HF_ENDPOINT"] == hub.url and environment["HF_TOKEN"] == hub.token
    assert "hf_own" not in environment.values() and environment["HF_HUB_OFFLINE"] == "0"
    assert environment["HF_HUB_CACHE"].startswith(environment["HF_HOME"])
    assert environment["PATH"] == os.environ["PATH"]


def test_what_a_gitignore_names_is_left_out_by_the_client(hub, api, published):
    hub.commit(REPO, {".gitignore": b"# weights\n*.bin\n/logs/\n"})
    files = {"a.bin": b"1", "logs/b.txt": b"2", "c.txt": b"3"}
    api.create_commit(
        REPO, [CommitOperationAdd(path, data) for path, data in files.items()], commit_message="Add"
    )
    assert set(files) & set(hub.files(REPO)) == {"c.txt"}
