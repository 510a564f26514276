"""The local Hub, seen through the real client: what the tests of push, pull and inspect rely on."""

import os
import random
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

from modeling_mtpf.hub.client import httpx

pytestmark = pytest.mark.hub

REPO = "mtpf/demo"
CARD = b"---\nlicense: apache-2.0\nlanguage: en\n---\n# A card\n"
WEIGHTS = random.Random(0).randbytes(200_000)  # they do not compress: a changed byte stays one
FILES = {"README.md": CARD, "config.json": b"{}", "model.safetensors": WEIGHTS, "nested/labels.txt": b"O\n"}


@pytest.fixture
def api(hub):
    return HfApi(token=hub.token)


@pytest.fixture
def published(hub, api):
    """A repo with a file of each kind; returns the sha."""
    api.create_repo(REPO)
    return commit(api, FILES).oid


def commit(api: HfApi, files: dict[str, bytes], **options):
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    return api.create_commit(REPO, operations, commit_message="Add", **options)


def fetch(path: str, cache: Path) -> bytes:
    return Path(hf_hub_download(REPO, path, cache_dir=cache)).read_bytes()


def test_large_files_go_over_xet_and_come_back_unchanged(hub, api, published, tmp_path):
    assert published == hub.head(REPO) and FILES.items() <= hub.files(REPO).items()
    assert [call.status for call in hub.calls("xet_upload_shard")] == [200]
    assert fetch("model.safetensors", tmp_path) == WEIGHTS and len(hub.calls("xet_download")) == 1
    files = {file.rfilename: file for file in api.model_info(REPO, files_metadata=True).siblings}
    assert files["model.safetensors"].lfs.size == len(WEIGHTS) and files["README.md"].lfs is None
    assert set(files) == {*FILES, ".gitattributes"} == set(api.list_repo_files(REPO))


def test_a_commit_applies_wholly_or_not_at_all(hub, api, published):
    operations = [
        CommitOperationAdd("new.txt", b"new"),
        CommitOperationDelete("config.json"),
        CommitOperationDelete("missing.txt"),
    ]
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        api.create_commit(REPO, operations, commit_message="half wrong")
    assert hub.head(REPO) == published and "new.txt" not in hub.files(REPO)
    api.create_commit(REPO, operations[:2], commit_message="right")
    assert "config.json" not in hub.files(REPO) and hub.files(REPO)["new.txt"] == b"new"
    assert [entry.parent for entry in hub.commits(REPO)][0] == published


def test_a_commit_on_an_old_parent_is_refused(hub, api, published):
    fault = hub.fault("commit", before=lambda: hub.commit(REPO, {"theirs.txt": b"theirs"}))
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as conflict:
        commit(api, {"config.json": b"[]"}, parent_commit=published)
    assert conflict.value.response.status_code == 412 and fault.fired == 1
    assert hub.files(REPO)["theirs.txt"] == b"theirs" and hub.files(REPO)["config.json"] == b"{}"


def test_an_answer_to_a_commit_can_get_lost(hub, api, published):
    """The commit took effect; the client's second attempt on the same parent conflicts and makes none."""
    hub.fault("commit", drop="response")
    with pytest.raises((HfHubHTTPError, httpx.TransportError)):
        commit(api, {"config.json": b"[]"}, parent_commit=published)
    assert hub.files(REPO)["config.json"] == b"[]" and hub.commits(REPO)[0].parent == published


@pytest.mark.parametrize("route, path", [("xet_download", "model.safetensors"), ("resolve", "config.json")])
def test_the_client_does_not_notice_what_breaks_or_is_tampered_with(hub, published, tmp_path, route, path):
    hub.fault(route, corrupt=True)
    broken = fetch(path, tmp_path / "first")
    assert len(broken) == len(FILES[path]) and broken != FILES[path]
    assert fetch(path, tmp_path / "second") == FILES[path]
    hub.tamper(REPO, path)
    assert fetch(path, tmp_path / "third") == hub.files(REPO)[path] != FILES[path]
    assert hub.head(REPO) == published


@pytest.mark.parametrize(
    "metadata", ["base_model: ./runs/backbone", "language: English", "tags: ner", "a: ["]
)
def test_an_invalid_card_is_refused(hub, api, metadata):
    api.create_repo(REPO)
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        commit(api, {"README.md": f"---\n{metadata}\n---\n".encode()})
    assert not hub.calls("commit")


def test_tokens_open_what_they_should(hub, api):
    api.create_repo(REPO, private=True)
    for token, status in ((False, 401), (hub.read_token, 404)):
        for repo in (REPO, "mtpf/absent"):  # what exists looks like what does not
            with pytest.raises(RepositoryNotFoundError) as refusal:
                api.model_info(repo, token=token)
            assert refusal.value.response.status_code == status
    for repo, token in (("reader/own", hub.read_token), ("other/demo", hub.token)):
        with pytest.raises(HfHubHTTPError) as refusal:
            api.create_repo(repo, token=token)
        assert refusal.value.response.status_code == 403


@pytest.mark.parametrize(
    "route, effects, message",
    [
        ("comit", {"status": 500}, "did you mean 'commit'"),
        ("commit", {}, "needs one of"),
        ("commit", {"corrupt": True}, "serves no content"),
    ],
)
def test_faults_that_would_never_fire_are_refused(hub, route, effects, message):
    with pytest.raises(ValueError, match=message):
        hub.fault(route, **effects)


def test_the_environment_hides_what_the_user_has_set(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "/elsewhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_own")
    environment = hub.environment()
    assert environment["HF_ENDPOINT"] == hub.url and environment["HF_TOKEN"] == hub.token
    assert "hf_own" not in environment.values() and environment["HF_HUB_OFFLINE"] == "0"
    assert environment["HF_HUB_CACHE"].startswith(environment["HF_HOME"])
    assert environment["PATH"] == os.environ["PATH"]
