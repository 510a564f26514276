"""The one rule that tells a local path from the id of a repo on the Hub."""

import time

import pytest
from huggingface_hub import HfApi

from modeling_mtpf import MtpfModel
from modeling_mtpf.hub import HubError, inspect
from modeling_mtpf.model.errors_mtpf import MtpfError
from modeling_mtpf.model.sources_mtpf import backbone_hint, find_on_hub, is_hub_id


@pytest.mark.parametrize("name", ["ada/notes", "BAAI/bge-small-en-v1.5", "a1/B_2-c.d"])
def test_owner_and_name_are_a_hub_id(name):
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "notes",
        "a/b/c",
        "./a",
        "../a",
        "~/a",
        "/a",
        "a/",
        "a//b",
        "-/x",
        "a/..",
        "a b/c",
        "C:\\a/b",
        "a/b@c",
    ]
    + ["user/intents.csv", "user/Train.JSONL", "user/notes.conll", "run/model.safetensors"],
)
def test_paths_and_files_are_not(name):
    assert not is_hub_id(name)


def test_the_oldest_repos_have_no_owner():
    assert is_hub_id("bert-base-uncased", bare=True) and not is_hub_id("notes.txt", bare=True)


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_a_missing_path_never_reaches_the_hub(repo_type, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "modeling_mtpf.model.sources_mtpf.HfApi", None
    )  # whatever asks the Hub fails otherwise
    monkeypatch.chdir(tmp_path)
    (tmp_path / "apps").mkdir()
    for name in ("user/intents.csv", "./apps/entities", "a/b/c"):
        with pytest.raises(MtpfError, match=f"There is no file {name}, and it is not a Hub id"):
            find_on_hub(name, what="file", repo_type=repo_type)
    with pytest.raises(MtpfError, match="There is no folder apps/entities in the local folder apps;"):
        find_on_hub("apps/entities", repo_type=repo_type)


def test_a_revision_says_that_the_hub_is_meant(hub, monkeypatch, tmp_path):
    HfApi(token=hub.token).create_repo("mtpf/entities")
    sha = hub.head("mtpf/entities")
    assert find_on_hub("mtpf/entities").resolved == sha
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mtpf").mkdir()
    assert find_on_hub("mtpf/entities", "main").resolved == sha
    with pytest.raises(HubError, match="in the local folder mtpf; to mean the repo"):
        inspect("mtpf/entities")


def test_what_the_hub_does_not_have(hub):
    HfApi(token=hub.token).create_repo("mtpf/notes")
    with pytest.raises(
        MtpfError, match="There is no folder mtpf/absent, and no repo of that name on the Hub"
    ):
        find_on_hub("mtpf/absent")
    with pytest.raises(MtpfError, match="The repo mtpf/notes on the Hub has no revision 'v9'"):
        find_on_hub("mtpf/notes", "v9")
    with pytest.raises(MtpfError, match="There is no file mtpf/notes, and no data set of that name"):
        find_on_hub("mtpf/notes", what="file", repo_type="dataset")


def test_without_a_network_both_readings_are_named_at_once(hub):
    hub.stop()
    begin = time.monotonic()
    with pytest.raises(MtpfError, match="There is no folder ada/notes, and the Hub cannot be reached"):
        find_on_hub("ada/notes")
    assert time.monotonic() - begin < 5


def test_the_folder_above_a_backbone_gets_a_hint(tmp_path):
    assert backbone_hint(tmp_path) == ""
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "config.json").write_text("{}")
    assert backbone_hint(tmp_path) == f" Did you mean {tmp_path / 'backbone'}?"
    with pytest.raises(MtpfError, match="has no config.json. Did you mean .*backbone?"):
        MtpfModel.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        MtpfModel.from_pretrained(tmp_path, subfolder="backbone")
