"""What goes wrong during a push: a retry or a clear error, and always a complete head."""

import hashlib
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from modeling_mtpf.hub import HubError, PushConflictError, push_adapter, push_backbone
from modeling_mtpf.hub.client import explained

pytestmark = pytest.mark.hub

BACKBONE, ENTITIES = "mtpf/encoder", "mtpf/entities"


def change_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][7, 3] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "route, effects",
    [
        ("commit", {"status": 500}),
        ("commit", {"status": 503, "times": 2}),
        ("commit", {"drop": "request"}),
        ("commit", {"drop": "response"}),
        ("preupload", {"status": 429, "retry_after": 1}),
        ("repo_info", {"status": 502}),
        ("repo_info", {"drop": "response"}),
        ("create_repo", {"status": 500}),
        ("xet_upload_xorb", {"drop": "request"}),
        ("xet_write_token", {"status": 500}),
        ("repo_info", {"delay": 0.5}),
        ("commit", {"delay": 0.5}),
        ("xet_upload_shard", {"delay": 0.5}),
    ],
)
def test_faults_that_pass_are_survived(hub, folders, no_waiting, route, effects):
    fault = hub.fault(route, **effects)
    sha = push_backbone(folders / "backbone", BACKBONE)
    assert fault.fired and sha == hub.head(BACKBONE) and len(hub.commits(BACKBONE)) == 2
    assert {*content(folders / "backbone"), "README.md"} <= set(hub.files(BACKBONE))


@pytest.mark.parametrize(
    "route, effects, message",
    [
        ("commit", {"status": 500}, "answers 500"),
        ("commit", {"drop": "request"}, "connection to the Hub failed"),
        ("xet_upload_shard", {"status": 400}, "connection to the Hub failed|answers"),
    ],
)
def test_faults_that_stay_leave_the_head_as_it_was(
    hub, backbone, published, no_waiting, route, effects, message
):
    before = hub.files(BACKBONE)
    change_weights(backbone)
    hub.fault(route, times=None, **effects)
    with pytest.raises(HubError, match=message) as failure:
        push_backbone(backbone, BACKBONE)
    assert "complete revision" in str(failure.value)
    assert hub.head(BACKBONE) == published and hub.files(BACKBONE) == before
    hub.clear_faults()
    assert push_backbone(backbone, BACKBONE) == hub.head(BACKBONE) != published


def test_a_lost_answer_is_no_conflict(hub, folders, published, no_waiting):
    hub.fault("commit", drop="response")
    sha = push_backbone(folders / "backbone", BACKBONE, license="mit")
    assert sha == hub.head(BACKBONE) and hub.commits(BACKBONE)[0].parent == published


@pytest.mark.parametrize("effects", [{}, {"status": 500}])
def test_a_concurrent_push_is_a_conflict_and_loses_nothing(hub, folders, published, no_waiting, effects):
    theirs = []
    before = lambda: theirs.append(hub.commit(BACKBONE, {"theirs.txt": b"theirs"}))  # noqa: E731
    hub.fault("commit", before=before, **effects)
    with pytest.raises(PushConflictError, match="Another push has committed .* then push again"):
        push_backbone(folders / "backbone", BACKBONE, license="mit")
    assert hub.head(BACKBONE) == theirs[0] and hub.files(BACKBONE)["theirs.txt"] == b"theirs"
    assert b"license: apache-2.0" in hub.files(BACKBONE)["README.md"]


def test_an_answer_lost_below_another_commit_is_no_conflict(hub, folders, published, no_waiting):
    """Ours is the next commit after the planned head, whatever came on top of it."""
    theirs = []

    def another_commits():
        theirs.append(hub.commit(BACKBONE, {"theirs.txt": b"theirs"}))

    hub.fault("commit", drop="response", before=lambda: hub.fault("repo_info", before=another_commits))
    sha = push_backbone(folders / "backbone", BACKBONE, license="mit")
    assert [commit.sha for commit in hub.commits(BACKBONE)][:3] == [*theirs, sha, published]
    assert b"license: mit" in hub.files(BACKBONE, sha)["README.md"]


@pytest.mark.parametrize("change", [lambda files: files.pop("tokenizer.json"), None])
def test_a_commit_that_does_not_hold_what_was_sent_is_noticed(hub, folders, monkeypatch, change):
    apply = hub._storage._apply

    def badly(files, operations):
        found = apply(files, operations)
        change(found) if change else found.update({"config.json": found["tokenizer.json"]})
        return found

    monkeypatch.setattr(hub._storage, "_apply", badly)
    with pytest.raises(HubError, match=r"does not hold at \w+ what was sent: (tokenizer|config).json differ"):
        push_backbone(folders / "backbone", BACKBONE)
    monkeypatch.undo()


def test_a_push_that_cannot_be_compared_afterwards_says_so(hub, folders, published, no_waiting):
    hub.fault("commit", before=lambda: hub.fault("repo_info", status=503, times=None))
    with pytest.raises(HubError, match="has the commit .* could not be read again .* push again") as failure:
        push_backbone(folders / "backbone", BACKBONE, license="mit")
    assert hub.head(BACKBONE) in str(failure.value)
    hub.clear_faults()
    assert push_backbone(folders / "backbone", BACKBONE, license="mit") == hub.head(BACKBONE)


def test_a_failed_push_says_what_the_head_is_now(hub, folders, published, no_waiting):
    hub.fault("commit", status=500, times=None)
    with pytest.raises(HubError, match="mtpf/entities .*the repo is there, but still empty") as failure:
        push_adapter(folders / "entities", ENTITIES, backbone_id=BACKBONE)
    assert "complete" not in str(failure.value)
    with pytest.raises(HubError, match=f"its head is still {published[:8]}, a complete revision"):
        push_backbone(folders / "backbone", BACKBONE, license="mit")
    hub.clear_faults()
    hub.fault("commit", status=400, before=lambda: hub.fault("repo_info", status=500, times=None))
    with pytest.raises(HubError, match="answers 400 .*What its head is now could not be read"):
        push_backbone(folders / "backbone", BACKBONE, license="mit")


def test_a_new_repo_has_no_other_branch(hub, folders):
    with pytest.raises(HubError, match="a new one has no branch 'dev'"):
        push_backbone(folders / "backbone", BACKBONE, branch="dev")
    assert not hub.calls("create_repo")


def test_weights_that_change_during_a_push_do_not_mix_with_what_was_read(hub, backbone):
    before = (backbone / "model.safetensors").read_bytes()
    fault = hub.fault("preupload", before=lambda: change_weights(backbone))
    push_backbone(backbone, BACKBONE)
    files = hub.files(BACKBONE)
    assert (
        fault.fired and files["model.safetensors"] == before != (backbone / "model.safetensors").read_bytes()
    )
    assert hashlib.sha256(before).hexdigest() in files["README.md"].decode()


def test_a_local_file_error_is_not_called_one_of_the_connection():
    with pytest.raises(HubError, match=r"cannot be read or written \(/srv/cache\): No space left"):
        with explained(BACKBONE):
            raise OSError(28, "No space left on device", "/srv/cache")
    with pytest.raises(HubError, match="connection to the Hub failed"):
        with explained(BACKBONE):
            raise ConnectionResetError


def test_a_token_that_no_header_can_hold_is_named_not_shown(hub, folders):
    with pytest.raises(HubError, match="token has characters that no token has") as failure:
        push_backbone(folders / "backbone", BACKBONE, token="hf_gehéim")
    assert "gehéim" not in str(failure.value) and failure.value.__cause__ is None


CONCURRENT = """
import json, sys
from modeling_mtpf.hub import PushConflictError, push_backbone
try:
    print(json.dumps(["pushed", push_backbone({folder!r}, "mtpf/encoder", license={license!r})]))
except PushConflictError as error:
    print(json.dumps(["conflict", str(error)]))
"""


@pytest.mark.slow
def test_two_processes_that_push_at_the_same_time(hub, folders, published, fresh_process):
    """Both plan against the same head before either commits: one is told of the other, nothing is mixed."""
    both = threading.Barrier(2, timeout=120)
    hub.fault("preupload", times=2, before=both.wait)
    answers = {}

    def push(license):
        code = CONCURRENT.format(folder=str(folders / "backbone"), license=license)
        answers[license] = fresh_process(code, **hub.environment(home=license))

    threads = [threading.Thread(target=push, args=(license,)) for license in ("mit", "bsd-3-clause")]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    (winner, (_, sha)), (_, (_, said)) = sorted(answers.items(), key=lambda item: item[1][0], reverse=True)
    assert sorted(answer for answer, _ in answers.values()) == ["conflict", "pushed"]
    assert hub.head(BACKBONE) == sha and [commit.sha for commit in hub.commits(BACKBONE)][:2] == [
        sha,
        published,
    ]
    assert f"license: {winner}".encode() in hub.files(BACKBONE)["README.md"]
    assert {*content(folders / "backbone"), "README.md"} <= set(hub.files(BACKBONE))
    assert f"Another push has committed {sha[:8]}" in said and "push again" in said
