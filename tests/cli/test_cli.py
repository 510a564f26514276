"""The command `mtpf`, as a user or a script runs it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_api import match_route

from modeling_mtpf.cli.main import main
from modeling_mtpf.hub import push_adapter, push_backbone
from modeling_mtpf.hub.inspection import inspect

pytestmark = pytest.mark.hub

BACKBONE, ENTITIES, NER = "mtpf/encoder", "mtpf/entities", "mtpf/encoder-ner"


@pytest.fixture
def run(capsys):
    """Run a command in this process; return its exit code, standard output and standard error."""

    def call(*arguments) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's way out
            code = stop.code
        return code, *capsys.readouterr()

    return call


def test_push_pull_and_inspect(hub, folders, run, caplog):
    code, out, _ = run("push", "backbone", folders / "backbone", BACKBONE)
    assert (code, out.strip()) == (0, f"{hub.url}/{BACKBONE}/tree/{hub.head(BACKBONE)}")
    code, out, _ = run("push", "adapter", folders / "entities", ENTITIES, "--backbone", BACKBONE, "--dry_run")
    assert code == 0 and "head.safetensors" in out and "to be created" in out
    with pytest.raises(KeyError):
        hub.head(ENTITIES)
    options = ["--backbone", BACKBONE, "--backbone_revision", hub.head(BACKBONE), "--json", "--private"]
    code, out, _ = run("push", "adapter", folders / "entities", ENTITIES, *options)
    url = f"{hub.url}/{ENTITIES}/tree/{hub.head(ENTITIES)}"
    assert code == 0 and json.loads(out) == {"repo_id": ENTITIES, "sha": hub.head(ENTITIES), "url": url}
    code, out, _ = run("push", "adapter", folders / "entities", ENTITIES, "--backbone", BACKBONE)
    assert code == 0 and out.strip() == url and "no commit was made" in caplog.text

    code, out, _ = run("pull", ENTITIES, "--revision", hub.head(ENTITIES))
    assert code == 0 and (Path(out.strip()) / "head.safetensors").is_file()
    code, out, _ = run("inspect", ENTITIES, "--json")
    found = json.loads(out)
    assert code == 0 and found["labels"] == ["O", "B-PER", "I-PER"] and found["metrics"] == {"entity_f1": 0.8}
    assert found["findings"] == [] and found["backbone"]["revision"] == hub.head(BACKBONE)
    assert found["size"] == sum(len(data) for data in hub.files(ENTITIES).values())


def test_results_for_the_card(hub, folders, run, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps([{"task": "Banking77", "metric": "accuracy", "value": 0.8}]))
    assert run("push", "backbone", folders / "backbone", BACKBONE, "--results", file)[0] == 0
    assert b"| Banking77 | accuracy | 0.8 |" in hub.files(BACKBONE)["README.md"]
    for text, message in (
        ('[{"task": "x", "metric": "f1"}]', "result 1 has no 'value'"),
        ('[{"task": "x", "metric": "f1", "value": NaN}]', "'value' of result 1 is nan"),
        ('[{"task": ["x"], "metric": "f1", "value": 1}]', "result 1 is malformed"),
        ("[" * 100_000, "cannot be read as JSON"),
    ):
        file.write_text(text)
        code, out, err = run("push", "backbone", folders / "backbone", BACKBONE, "--results", file)
        assert code == 2 and out == "" and message in err
    file.write_text("{}")
    code, _, err = run("push", "backbone", folders / "backbone", BACKBONE, "--results", file)
    assert code == 2 and "must hold a list of records" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["push", "backbone", "no/such/folder", BACKBONE], "There is no folder no/such/folder"),
        (
            ["push", "adapter", "{ner}", NER, "--backbone", "mtpf/absent"],
            "mtpf push backbone FOLDER mtpf/absent",
        ),
        (["push", "adapter", "{ner}", NER], "--backbone OWNER/NAME"),
        (["push", "adapter", "{ner}", NER, "--backbone_id", "x"], "--backbone_id; did you mean '--backbone'"),
        (["push", "backbone", "{ner}", NER, "--backbone", "x"], "does not belong to mtpf push backbone"),
        (["push", "adaptor", "{ner}", NER], "did you mean 'adapter'"),
        (["push", "backbone", "{backbone}", "encoder"], "use the form 'owner/name'"),
        (["pull", "mtpf/absent"], "There is no repo mtpf/absent"),
        (["pull", "../../etc"], "use the form 'owner/name'"),
        (["inspect", "./nothing/here"], "not a Hub id of the form"),
        (["inspect", "mtpf/absent"], "There is no folder mtpf/absent, and no repo of that name"),
        (["push", "backbone", "{backbone}", BACKBONE, "--license", ""], "The license '' is not an id"),
        (["push", "backbone", "{backbone}", BACKBONE, "--branch", "dev"], "has no branch 'dev'"),
        (["predict"], "required: --adapter"),
        (["export-all"], "Unknown command 'export-all'; did you mean 'export'"),
        ([], "Name a command: label, "),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(hub, folders, run, arguments, message):
    code, out, err = run(*(a.format(ner=folders / "ner", backbone=folders / "backbone") for a in arguments))
    assert code == 2 and out == "" and "Traceback" not in err
    assert re.search(message, err)


@pytest.mark.slow
def test_the_command_in_a_pipe(hub, folders):
    push_backbone(folders / "backbone", BACKBONE)
    command = f"{sys.executable} -m modeling_mtpf.cli inspect {BACKBONE} | head -1"
    root = {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        env={**hub.environment(), **root},
        timeout=120,
    )
    assert done.stdout.split() == ["source", BACKBONE] and done.stderr == "" and done.returncode == 0


def test_help_names_every_option(run):
    code, out, _ = run("--help")
    assert code == 0 and all(word in out for word in ("push", "pull", "inspect", "examples:"))
    code, out, _ = run("push", "adapter", "--help")
    wanted = (
        "--backbone",
        "--backbone_revision",
        "--private",
        "--create_pr",
        "--dry_run",
        "--license",
        "--json",
    )
    assert code == 0 and all(word in out for word in wanted)


# What inspect reports


def test_inspect_of_folders(folders, run):
    found = inspect(folders / "backbone")
    assert (found.kind, found.regime, found.findings) == ("backbone", "tpl", []) and found.parameters > 1000
    assert {len(file.sha256) for file in found.files} == {64}
    found = inspect(folders / "intent")
    assert (found.kind, found.name, len(found.labels)) == ("text-classification", "intent", 5)
    assert inspect(folders / "ner").kind == "task-primary-lora"
    code, out, _ = run("inspect", folders / "entities")
    assert code == 0 and "O, B-PER, I-PER" in out and "entity_f1 0.8" in out and "FINDING" not in out


def test_inspect_reports_what_does_not_belong_in_a_folder(folders, tmp_path):
    folder = Path(shutil.copytree(folders / "entities", tmp_path / "app"))
    (folder / "evil.py").write_text("raise SystemExit")
    (folder / "model.pkl").write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
    (folder / "deep").mkdir()
    (folder / "deep" / "data.zip").write_bytes(b"PK")
    (folder / "vocab.txt").symlink_to("/etc/hostname")
    (folder / "modeling_mtpf.py").write_text("print('other')")
    (folder / "head.safetensors").unlink()
    findings = "\n".join(inspect(folder).findings)
    for part in (
        "evil.py: it is code other",
        "model.pkl: it may hold a pickle",
        "deep/data.zip: it is an archive",
    ):
        assert part in findings
    assert "vocab.txt: it is a link" in findings and "modeling_mtpf.py: remote code that differs" in findings
    assert "its head is missing" in findings and str(tmp_path) not in findings


def test_inspect_reports_what_does_not_belong_in_a_repo(hub, folders):
    push_backbone(folders / "backbone", BACKBONE)
    push_adapter(folders / "entities", ENTITIES, backbone_id=BACKBONE)
    before = len(hub.requests)
    found = inspect(BACKBONE)
    assert (found.kind, found.regime, found.findings) == ("backbone", "tpl", [])
    assert found.parameters == inspect(folders / "backbone").parameters
    assert (
        not {"xet_download", "xet_reconstruction"}
        & {  # of the weights only the header is read
            match_route(call.method, call.path)[0].name for call in hub.requests[before:]
        }
    )
    hub.commit(BACKBONE, {"evil.py": b"1", "a/model.bin": b"\x80\x04.", "trunk_mtpf.py": b"import os"})
    assert [finding.split(":")[0] for finding in inspect(BACKBONE).findings] == [
        "a/model.bin",
        "evil.py",
        "trunk_mtpf.py",
    ]
    task = json.loads(hub.files(ENTITIES)["task.json"])
    hub.commit(ENTITIES, {"task.json": json.dumps({**task, "labels": ["O", "B-ORG", "I-ORG"]}).encode()})
    (finding,) = inspect(ENTITIES).findings
    assert "not those that its head was trained with" in finding
    hub.create("mtpf/other")
    assert inspect("mtpf/other").findings == ["it is neither a backbone nor an adapter of mtpf"]


def test_a_token_that_is_none_is_one_line(hub, folders, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_gehéim")
    for arguments in (("push", "backbone", folders / "backbone", BACKBONE), ("pull", BACKBONE)):
        code, out, err = run(*arguments)
        assert code == 2 and out == "" and "token has characters" in err and "gehéim" not in err


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("task.json", "{", "not valid JSON"),
        ("task.json", "[]", "must hold a JSON object"),
        ("task.json", '{"kind": "text-classification", "labels": 5}', "'labels' in task.json is 5"),
        ("task.json", '{"metrics": "x"}', "'metrics' in task.json is 'x'"),
        ("task.json", '{"metrics": {"f1": NaN}}', "NaN is not a number of JSON"),
        ("task.json", '{"backbone": 3, "name": 5}', "'backbone' in task.json"),
        ("adapter_config.json", '{"r": "x"}', "not a plain LoRA"),
        ("adapter_config.json", "null", "must hold a JSON object"),
        ("adapter_model.safetensors", "\xff" * 8, "damaged or not a safetensors"),
        ("head.safetensors", "", "head .*does not fit|damaged"),
    ],
)
def test_inspect_of_invalid_files_gives_findings(hub, folders, tmp_path, run, file, text, message):
    """In a folder and in a repo: never a traceback, and valid JSON on demand."""
    folder = Path(shutil.copytree(folders / "entities", tmp_path / "app"))
    (folder / file).write_bytes(text.encode("latin-1"))
    push_backbone(folders / "backbone", BACKBONE)
    push_adapter(folders / "entities", ENTITIES, backbone_id=BACKBONE)
    hub.commit(ENTITIES, {file: text.encode("latin-1")})
    for source in (folder, ENTITIES):
        code, out, err = run("inspect", source, "--json")
        found = json.loads(out, parse_constant=lambda name: pytest.fail(name))
        assert code == 0 and re.search(message, "\n".join(found["findings"])), found["findings"]


def test_inspect_tells_of_foreign_code_alongside_other_findings(hub, folders):
    push_backbone(folders / "backbone", BACKBONE)
    config = json.loads(hub.files(BACKBONE)["config.json"])
    foreign = {"auto_map": {"AutoModel": "other/repo--evil.Model"}}
    hub.commit(BACKBONE, {"config.json": json.dumps({**config, **foreign}).encode(), "trunk_mtpf.py": None})
    findings = "\n".join(inspect(BACKBONE).findings)
    assert "complete auto_map" in findings and "it has no trunk_mtpf.py" in findings
    hub.create("mtpf/other")
    hub.commit("mtpf/other", {"config.json": json.dumps({"model_type": "bert", **foreign}).encode()})
    assert "names code to import that is not mtpf's" in "\n".join(inspect("mtpf/other").findings)


def test_inspect_names_an_adapter_whose_backbone_is_not_the_one_it_was_trained_on(hub, folders):
    push_backbone(folders / "backbone", BACKBONE)
    push_adapter(folders / "entities", ENTITIES, backbone_id=BACKBONE)
    task = json.loads(hub.files(ENTITIES)["task.json"])
    for change, message in (
        ({"sha256": "0" * 64}, "has other weights at"),
        ({"revision": "0" * 40}, "name different backbones"),
        ({"id": "mtpf/absent"}, "name different backbones"),
    ):
        changed = {**task, "backbone": {**task["backbone"], **change}}
        hub.commit(ENTITIES, {"task.json": json.dumps(changed).encode()})
        (finding,) = inspect(ENTITIES).findings
        assert message in finding
