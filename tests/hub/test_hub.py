"""Publishing and fetching over the local Hub, with the real client."""

import hashlib
import json
import logging
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from modeling_mtpf import AdapterError, MtpfModel
from modeling_mtpf.hub import HubError, PushPlan, pull, push_adapter, push_backbone
from modeling_mtpf.model.predict_mtpf import load_tokenizer
from modeling_mtpf.model.storage_methods_mtpf import HUB_FILES

pytestmark = pytest.mark.hub

BACKBONE, ENTITIES, NER = "mtpf/encoder", "mtpf/entities", "mtpf/encoder-ner"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Push


def test_a_backbone_is_one_complete_commit(hub, folders):
    sha = push_backbone(folders / "backbone", BACKBONE)
    files = hub.files(BACKBONE)
    local = content(folders / "backbone")
    assert sha == hub.head(BACKBONE) and len(hub.commits(BACKBONE)) == 2  # the Hub's own, and this one
    assert set(files) == {*local, ".gitattributes", "README.md"}
    assert files["model.safetensors"] == local["model.safetensors"]
    assert len(hub.calls("xet_upload_shard")) == 1 and len(hub.calls("commit")) == 1
    for name in HUB_FILES:
        digest = hashlib.sha256(files[name]).hexdigest()
        assert digest in files["README.md"].decode()
    assert content(folders / "backbone") == local


def test_an_adapter_names_repo_commit_and_weights(hub, folders, published):
    local = content(folders / "entities")
    sha = push_adapter(folders / "entities", ENTITIES, backbone_id=BACKBONE)
    files = hub.files(ENTITIES)
    config, task = json.loads(files["adapter_config.json"]), json.loads(files["task.json"])
    weights = hashlib.sha256(hub.files(BACKBONE)["model.safetensors"]).hexdigest()
    assert (config["base_model_name_or_path"], config["revision"]) == (BACKBONE, published)
    expected = {"id": BACKBONE, "revision": published, "sha256": weights, "dtype": "float32"}
    assert task["backbone"] == {**task["backbone"], **expected} and sha == hub.head(ENTITIES)
    assert content(folders / "entities") == local  # the user's folder is as before
    assert not hub.calls("xet_download")  # of the backbone's weights only the header is read

    hub.commit(BACKBONE, {"notes.txt": b"the branch moves on"})
    push_adapter(folders / "entities", ENTITIES, backbone_id=BACKBONE, backbone_revision=published)
    assert hub.head(ENTITIES) == sha


def test_pushing_again_makes_no_commit_and_removes_what_is_stale(hub, backbone, published):
    assert push_backbone(backbone, BACKBONE) == published and len(hub.calls("commit")) == 1
    hub.commit(BACKBONE, {"old/notes.txt": b"x", "extra.bin": b"\0" * 20})
    plan = push_backbone(backbone, BACKBONE, dry_run=True)
    assert [(file.path, file.change) for file in plan.changes] == [
        ("extra.bin", "delete"),
        ("old/notes.txt", "delete"),
    ]
    (backbone / "special_tokens_map.json").write_text("{}")
    sha = push_backbone(backbone, BACKBONE)
    assert set(hub.files(BACKBONE)) == {*content(backbone), ".gitattributes", "README.md"}
    assert sha == hub.head(BACKBONE) and len(hub.calls("commit")) == 2


def test_a_dry_run_lists_sizes_and_changes_nothing(hub, folders):
    plan = push_backbone(folders / "backbone", BACKBONE, dry_run=True)
    assert isinstance(plan, PushPlan) and plan.head is None
    changing = {call.path for call in hub.requests if call.method != "GET"}
    assert changing <= {"/api/validate-yaml"}
    sizes = {file.path: file.size for file in plan.files}
    local = {name: len(data) for name, data in content(folders / "backbone").items()}
    assert sizes == {**local, "README.md": sizes["README.md"]} and plan.size == sum(sizes.values())
    assert "to be created" in str(plan) and "model.safetensors" in str(plan)
    with pytest.raises(KeyError):
        hub.head(BACKBONE)


def test_private_repos_and_pull_requests(hub, folders, published):
    api = HfApi(endpoint=hub.url, token=hub.token)
    push_adapter(folders / "ner", NER, backbone_id=BACKBONE, private=True)
    assert api.model_info(NER).private and not api.model_info(BACKBONE).private
    with pytest.raises(HubError, match="exists and is public"):
        push_backbone(folders / "backbone", BACKBONE, private=True)
    head = hub.head(BACKBONE)
    assert push_backbone(folders / "backbone", BACKBONE, license="mit", create_pr=True) != head
    assert hub.head(BACKBONE) == head and b"license: mit" in hub.files(BACKBONE, "refs/pr/1")["README.md"]


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": b'{"model_type": "llama"}', "precious.bin": b"x"},
        {"adapter_config.json": b"{}", "optimizer.pt": b"x"},
    ],
)
def test_a_repo_of_another_kind_is_not_overwritten(hub, folders, published, files):
    hub.create("mtpf/other")
    head = hub.commit("mtpf/other", files)
    with pytest.raises(HubError, match="holds something else than an mtpf backbone"):
        push_backbone(folders / "backbone", "mtpf/other")
    for repo in ("mtpf/other", BACKBONE):
        with pytest.raises(HubError, match="holds something else than an mtpf adapter"):
            push_adapter(folders / "ner", repo, backbone_id=BACKBONE)
    assert hub.head("mtpf/other") == head and hub.head(BACKBONE) == published


def test_a_gitignore_in_the_repo_is_refused(hub, folders, published):
    hub.commit(BACKBONE, {".gitignore": b"*.safetensors"})
    with pytest.raises(HubError, match="has a .gitignore"):
        push_backbone(folders / "backbone", BACKBONE)


def test_the_token_is_never_shown_or_written(hub, folders, no_waiting, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", "")
    push_backbone(folders / "backbone", BACKBONE, token=hub.token)
    hub.fault("commit", status=500, times=None)
    with pytest.raises(HubError) as failure:
        push_adapter(folders / "ner", NER, backbone_id=BACKBONE, token=hub.token)
    shown = caplog.text + str(failure.value)
    assert hub.token not in shown
    assert not [name for name, data in hub.files(BACKBONE).items() if hub.token.encode() in data]
    with pytest.raises(HubError, match="hf auth login"):
        push_backbone(folders / "backbone", BACKBONE, token=hub.read_token, license="mit")
    with pytest.raises(HubError, match="hf auth login"):
        push_backbone(folders / "backbone", "another/encoder", token=hub.token)


# Pull


def test_pull_by_branch_tag_and_commit_and_offline(hub, folders, published, monkeypatch):
    HfApi(endpoint=hub.url, token=hub.token).create_tag(BACKBONE, tag="v1")
    second = push_backbone(folders / "backbone", BACKBONE, license="mit")
    assert pull(BACKBONE).name == second and pull(BACKBONE, "v1").name == published
    folder = pull(BACKBONE, published)
    assert (
        folder.name == published
        and (folder / "model.safetensors").read_bytes() == hub.files(BACKBONE)["model.safetensors"]
    )
    hub.stop()
    assert (
        pull(BACKBONE, published) == folder
        and pull(BACKBONE).name == second
        and pull(BACKBONE, "v1") == folder
    )
    with pytest.raises(HubError, match="cannot be reached"):
        pull(ENTITIES)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert pull(BACKBONE).name == second
    blob = (folder / "config.json").resolve()
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    with pytest.raises(HubError):  # noticed offline, too
        pull(BACKBONE, published)
    assert not blob.exists()


def test_pull_offline_notices_what_is_missing(hub, published, monkeypatch):
    folder = pull(BACKBONE, published)
    hub.stop()
    assert pull(BACKBONE, published) == folder
    (folder / "tokenizer.json").unlink()
    with pytest.raises(HubError, match="in(complete| the cache)|tokenizer.json .* is missing"):
        pull(BACKBONE, published)
    hub.start()
    assert (pull(BACKBONE, published) / "tokenizer.json").is_file()


def test_pull_offline_without_a_listing_is_refused(hub, published):
    """A model that was loaded file by file may lack any of them."""
    hf_hub_download(BACKBONE, "config.json", revision=published)
    hub.stop()
    with pytest.raises(HubError, match=f"no listing of {BACKBONE} .* mtpf pull {BACKBONE} --revision"):
        pull(BACKBONE, published)


def test_pull_notices_what_the_client_left_out(hub, published, monkeypatch):
    def without_tokenizer(*args, **kwargs):
        return snapshot_download(*args, **kwargs, ignore_patterns=["tokenizer.json"])

    monkeypatch.setattr("modeling_mtpf.hub.download.snapshot_download", without_tokenizer)
    with pytest.raises(HubError, match="tokenizer.json of mtpf/encoder"):
        pull(BACKBONE)


def test_prediction_on_a_private_repo_takes_a_token(hub, folders, monkeypatch):
    sha = push_backbone(folders / "backbone", BACKBONE, private=True)
    push_adapter(folders / "entities", ENTITIES, backbone_id=BACKBONE, private=True)
    monkeypatch.setenv("HF_TOKEN", "")
    model = MtpfModel.from_pretrained(BACKBONE, revision=sha, token=hub.token)
    model.load_adapter(ENTITIES, token=hub.token)
    with pytest.raises(ValueError, match="for a private repo token="):
        model.predict(["Hi Ada"], adapters=["entities"])
    assert model.predict(["Hi Ada"], adapters=["entities"], token=hub.token)
    assert hub.token not in repr(model.__dict__) + model.config.to_json_string()


SOURCE_REVISION = """
import json
from modeling_mtpf import MtpfModel
found = [MtpfModel.from_pretrained("mtpf/encoder").config]
found.append(MtpfModel.from_pretrained("mtpf/encoder", revision="v1").config)
written = "source_revision" in found[0].to_json_string()
print(json.dumps([*(config.source_revision for config in found), written]))
"""


@pytest.mark.slow
def test_a_model_knows_its_commit_and_reads_the_tokenizer_from_it(hub, folders, published, fresh_process):
    model = MtpfModel.from_pretrained(BACKBONE, revision=published)
    HfApi(endpoint=hub.url, token=hub.token).create_tag(BACKBONE, tag="v1")
    second = push_backbone(folders / "backbone", BACKBONE, license="mit")
    assert fresh_process(SOURCE_REVISION, **hub.environment()) == [second, published, False]
    hub.commit(
        BACKBONE, dict.fromkeys(("config.json", "tokenizer.json", "tokenizer_config.json"), b"damaged")
    )
    assert load_tokenizer(model)("Hi")["input_ids"] and model.config.source_revision == published


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_pull_fetches_again_what_broke_on_the_way(hub, published, path):
    route = "xet_download" if path == "model.safetensors" else "resolve"
    fault = hub.fault(route, corrupt=True, match="" if route == "xet_download" else path)
    assert (pull(BACKBONE) / path).read_bytes() == hub.files(BACKBONE)[path] and fault.fired == 1


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_pull_refuses_what_was_tampered_with(hub, published, path):
    hub.tamper(BACKBONE, path)
    with pytest.raises(HubError, match=f"{path} of mtpf/encoder .* does not have the hash"):
        pull(BACKBONE)


@pytest.mark.parametrize("path", ["adapter_model.safetensors", "head.safetensors", "task.json"])
def test_loading_a_tampered_adapter_is_refused_and_changes_nothing(hub, folders, published, path):
    sha = push_adapter(folders / "entities", ENTITIES, backbone_id=BACKBONE)
    model = MtpfModel.from_pretrained(folders / "backbone")
    hub.tamper(ENTITIES, path)
    with pytest.raises(AdapterError, match=f"{path} of {ENTITIES} does not have the hash"):
        model.load_adapter(ENTITIES, revision=sha)
    assert model.adapters == [] and len(model.heads) == 0


def test_an_oversized_adapter_is_not_fetched(hub, folders, published, monkeypatch):
    push_adapter(folders / "entities", ENTITIES, backbone_id=BACKBONE)
    model = MtpfModel.from_pretrained(folders / "backbone")
    monkeypatch.setattr("modeling_mtpf.model.adapter_files_mtpf.MAX_ADAPTER_BYTES", 1000)
    hub.requests.clear()
    with pytest.raises(AdapterError, match="more than the 1,000 that are fetched"):
        model.load_adapter(ENTITIES)
    assert not hub.calls("resolve") and not hub.calls("tree") and model.adapters == []


def test_an_adapter_loads_again_without_the_hub(hub, folders, published):
    sha = push_adapter(folders / "entities", ENTITIES, backbone_id=BACKBONE)
    model = MtpfModel.from_pretrained(folders / "backbone")
    model.load_adapter(ENTITIES, revision=sha)
    hub.stop()
    assert model.load_adapter(ENTITIES, adapter_name="again", revision=sha) == "again"
    with pytest.raises(AdapterError, match="no folder mtpf/encoder-ner, and the Hub cannot be reached"):
        model.load_adapter(NER)


def test_what_pull_refuses_and_leaves_out(hub, published, tmp_path):
    hub.commit(
        BACKBONE, {"pytorch_model.bin": b"\x80\x04.", "evil.py": b"1", "data.zip": b"PK", "a/b.py": b"1"}
    )
    assert not {"pytorch_model.bin", "evil.py", "data.zip", "a"} & set(content(pull(BACKBONE)))
    with pytest.raises(HubError, match="more than the 1,000 that are allowed"):
        pull(BACKBONE, max_bytes=1000)
    hub.commit(BACKBONE, {"big.json": b"x"})
    hub._storage.find("model", BACKBONE).resolve("main").files["../up.json"] = (
        hub._storage.find("model", BACKBONE).resolve("main").files["big.json"]
    )
    with pytest.raises(HubError, match=r"has a file '\.\./up.json': its name leads out"):
        pull(BACKBONE)
    with pytest.raises(HubError, match="no such revision"):
        pull(BACKBONE, "v9")
    with pytest.raises(HubError, match="There is no repo mtpf/absent"):
        pull("mtpf/absent")
    with pytest.raises(HubError, match="not a Hub id"):
        pull("../../etc")
