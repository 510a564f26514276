"""Mistakes and full disks in every command: at once, one sentence, exit status 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_mtpf.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
NEEDED = {
    "label": ["--text", "t.txt", "--output_dir", "out"],
    "pretrain": ["--output_dir", "out"],
    "adapt": ["--family", "tc", "--data", "d.csv", "--output_dir", "out"],
    "compose": ["--app", "app", "--output_dir", "out"],
    "benchmark": ["--regime", "base", "--output", "out.json"],
    "predict": ["--adapter", "app"],
    "export": ["packaged", "--output", "out"],
    "apply-delta": ["app", "--output", "out"],
    "serve": ["--backbone", "nope", "--port", "0"],
    "push": ["backbone", "folder", "ada/notes"],
    "pull": ["ada/notes"],
    "inspect": ["folder"],
}
"""The least that each command wants."""
PATHS = [
    (command, i)
    for command, given in NEEDED.items()
    for i, value in enumerate(given)
    if value not in ("tc", "base")
]
SCRIPTS = ["train/pseudo_label.py", "train/ner_teacher.py", "eval/study/run.py"]


def one_sentence(arguments, capsys, monkeypatch, tmp_path) -> str:
    """Run a command in an empty folder; return its one line on standard error."""
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    out, error = capsys.readouterr()
    assert status == 2 and not out and error.startswith("error: ") and error.count("\n") == 1, (status, error)
    assert set(os.listdir(tmp_path)) <= {".out.lock"}
    return error


def test_all_commands_are_tried():
    assert NEEDED.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option(command, capsys, monkeypatch, tmp_path):
    option = {"predict": "--colum", "pull": "--revison", "push": "--privat", "inspect": "--revison"}
    option |= {"export": "--layer", "pretrain": "--stps", "benchmark": "--quik", "serve": "--adaptr"}
    option |= {"apply-delta": "--revison"}
    error = one_sentence(
        [command, *NEEDED[command], option.get(command, "--progres"), "1"], capsys, monkeypatch, tmp_path
    )
    assert "Unknown argument --" in error and ("did you mean" in error or command == "label"), error


@pytest.mark.parametrize("command, index", PATHS)
@pytest.mark.parametrize("value", ["a\0b", "x" * 5000], ids=["NUL", "long"])
def test_a_value_with_nul_or_too_long(command, index, value, capsys, monkeypatch, tmp_path):
    given = list(NEEDED[command])
    given[index] = f"--{value}" if given[index].startswith("--") else value
    one_sentence([command, *given], capsys, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["adapt", "--family", "tc", "--data", "nope.csv", "--name", "X" * 300, "--output_dir", "o"], "Adapter name"),
        (["adapt", "--family", "tc", "--data", "nope.csv", "--output_dir", "y"], "--name 2 to 64 lower-case letters"),
        (["adapt", "--family", "tc", "--data", "nope.csv", "--name", "ab", "--output_dir", "y" * 300], "File name too long"),
        (["benchmark", "--report", "nope.json", "--output", "out.md"], "There is no file nope.json"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_is_loaded(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("modeling_mtpf.model.modeling_mtpf.MtpfModel.from_pretrained", None)
    assert message in one_sentence(arguments, capsys, monkeypatch, tmp_path)


def test_a_run_whose_labels_are_missing_is_not_announced(encoders, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    data = ["--families.ner.data", "nope", "--backbone", str(encoders["bert"])]
    assert main(["pretrain", *data, "--output_dir", "out"]) == 2
    out, error = capsys.readouterr()
    assert not out and "error: There is no file or folder nope" in error


def test_every_script_has_the_parser_that_names_the_nearest_option():
    for file in [*(ROOT / "train").rglob("*.py"), *(ROOT / "eval").rglob("*.py")]:
        assert "argparse.ArgumentParser(" not in file.read_text("utf-8"), file


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.slow
def test_an_unknown_option_of_a_script(script):
    arguments = {"eval/study/run.py": ["run", "--work", "w", "--worker", "1"]}.get(script, ["--outpt", "1"])
    done = subprocess.run(
        [sys.executable, ROOT / script, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["adapt", "--help"], ["inspect", "."]])
def test_output_that_cannot_be_written(arguments, folders):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "modeling_mtpf.cli", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folders / "entities",
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert done.returncode == 2, done.stderr
    assert done.stderr == "error: The output cannot be used: No space left on device.\n"
