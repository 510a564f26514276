"""Saving an adapter over another one: stopped at any step, or read at any moment, it is the old or the new one."""

import errno
import json
import os
import stat
import sys
import threading
from pathlib import Path

import pytest
import torch
from filelock import Timeout

from modeling_mtpf import AdapterHead, LoraSettings, MtpfModel
from modeling_mtpf.errors import MtpfError
from modeling_mtpf.files import locked
from modeling_mtpf.model import folders_mtpf
from modeling_mtpf.model.adapter_files_mtpf import read_adapter

STEPS = ("open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.scandir")


class Stopped(BaseException):
    """The process is gone: every further step on a file fails."""


class Clock:
    """Counts steps on files below a folder, and lets none happen from a step on."""

    def __init__(self):
        self.limit, self.steps, self.folder = None, 0, None

    def __call__(self, event, arguments):
        if self.folder is not None and event in STEPS and self.folder in str(arguments[0]):
            self.steps += 1
            if self.limit is not None and self.steps > self.limit:
                raise Stopped


CLOCK = Clock()
sys.addaudithook(CLOCK)  # cannot be removed; without a folder it does nothing


@pytest.fixture(params=["exchange", "one by one"])
def way(request, monkeypatch):
    if request.param == "one by one":
        monkeypatch.setattr(folders_mtpf, "_exchange", lambda one, other: False)
    return request.param


@pytest.fixture
def models(encoders):
    """Two models with an adapter of the same shapes; every file of the two differs."""
    made = {}
    for number, label in enumerate(("old", "new")):
        model = MtpfModel.from_pretrained(encoders["bert"]).eval()
        model.add_adapter("app", LoraSettings(r=2, alpha=4 + number))
        model.heads["app"] = AdapterHead("text-classification", ["a", label], 32)
        torch.nn.init.constant_(model.heads["app"].weight, number)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.constant_(parameter, number)
        made[label] = model
    return made


def save(models, label, folder):
    return models[label].save_adapter(folder, "app", task={"training_data": label})


def state(models, folder) -> str:
    """Which adapter the folder holds; fails if it holds a mix of both."""
    files = read_adapter(Path(folder), models["old"].backbone)
    found = {
        "config": "old" if files.config.lora_alpha == 4 else "new",
        "lora": "new" if any(v.any() for k, v in files.lora.items() if "lora_B" in k) else "old",
        "head": files.heads[files.name].labels[1],
        "task": files.task["training_data"],
    }
    assert len(set(found.values())) == 1, found
    return found["task"]


def test_saving_over_an_adapter_that_is_stopped_at_any_step_leaves_the_old_or_the_new_one(
    way, models, tmp_path
):
    folder = tmp_path / "app"
    seen = []
    for limit in range(200):
        save(models, "old", folder)
        (folder / "README.md").write_text("a card")
        CLOCK.folder, CLOCK.limit, CLOCK.steps = str(tmp_path), limit, 0
        try:
            save(models, "new", folder)
            seen.append("done")
        except Stopped:
            pass
        finally:
            CLOCK.folder = None
        try:
            seen.append(state(models, folder))
        except MtpfError as error:
            assert way == "one by one" and "it has no adapter_config.json" in str(error)
            seen.append("refused")
        assert (folder / "README.md").read_text() == "a card"
        if "done" in seen:
            break
    assert seen[0] == "old" and seen[-1] == "new" and len(seen) > 10
    assert ("refused" in seen) == (way == "one by one")


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_leaves_the_old_adapter(way, fault, models, tmp_path, monkeypatch):
    folder = save(models, "old", tmp_path / "app")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(path, data):
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(MtpfError, match=f"app cannot be written: {os.strerror(fault)}"):
        save(models, "new", folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_reader_next_to_writers_finds_the_old_or_the_new_adapter(models, tmp_path):
    folder, stop, errors = save(models, "old", tmp_path / "app"), threading.Event(), []

    def write(label):
        try:
            while not stop.is_set():
                save(models, label, folder)
                stop.wait(0.02)
        except MtpfError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(label,)) for label in models]
    for thread in threads:
        thread.start()
    try:
        seen = set()
        for _ in range(60):
            try:
                seen.add(folders_mtpf.read_unchanged(folder, lambda: state_of(models, folder)))
                models["old"].load_adapter(folder, "again", replace=True)
            except MtpfError as error:  # on a busy machine a reader is slower than the writers
                assert "is being written to; try again" in str(error)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    seen.add(folders_mtpf.read_unchanged(folder, lambda: state_of(models, folder)))
    assert seen <= {("old",) * 3, ("new",) * 3}, seen
    assert not errors, errors
    assert os.listdir(tmp_path) == ["app"]


def state_of(models, folder):
    files = read_adapter(folder, models["old"].backbone)
    return (
        "old" if files.config.lora_alpha == 4 else "new",
        files.heads[files.name].labels[1],
        files.task["training_data"],
    )


def test_other_files_links_and_modes_of_the_folder_stay(way, models, tmp_path, monkeypatch):
    folder = save(models, "old", tmp_path / "app")
    (folder / "notes").mkdir()
    (folder / "notes" / "today.txt").write_text("x")
    (folder / "link").symlink_to("notes")
    others = [".app.1.tmp", "draft.tmp", ".other.7.0.tmp", ".app.x.0.tmp"]
    for name in others:
        (folder / name).write_text("mine")
    (folder / f".app.{2**22 + 1}.0.tmp").mkdir()  # of a process that was stopped
    folder.chmod(0o750)
    (tmp_path / "alias").symlink_to("app")
    save(models, "new", tmp_path / "alias")
    assert state(models, folder) == "new" and (tmp_path / "alias").is_symlink()
    assert (folder / "notes" / "today.txt").read_text() == "x" and (folder / "link").is_symlink()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    monkeypatch.chdir(folder)
    save(models, "old", ".")
    assert state(models, ".") == "old" and os.path.samefile(".", folder)
    assert sorted(os.listdir(tmp_path)) == ["alias", "app"]
    if way == "exchange":
        assert sorted(name for name in os.listdir(folder) if name.endswith(".tmp")) == sorted(others)


@pytest.mark.parametrize(
    "name, reason",
    [("x" * 300, "File name too long"), ("a\0b", "holds the character NUL"), ("file/app", "Not a directory")],
)
def test_a_folder_that_cannot_be_made_is_refused_in_a_sentence(name, reason, models, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MtpfError, match=reason):
        save(models, "old", f"{tmp_path}/{name}")
    assert os.listdir(tmp_path) == ["file"]


def test_names_of_the_greatest_length_are_accepted(models, tmp_path):
    assert state(models, save(models, "old", tmp_path / ("x" * 255))) == "old"
    assert json.loads((tmp_path / ("x" * 255) / "task.json").read_text())["name"] == "app"


def test_the_lock_of_a_folder_whose_parent_cannot_be_written_to_is_inside(tmp_path, monkeypatch):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "export.json").write_text("{}")
    monkeypatch.setattr("modeling_mtpf.files.os.access", lambda path, mode: path != tmp_path)
    with locked(folder), pytest.raises(Timeout), locked(folder, timeout=0):
        pass
    assert os.listdir(tmp_path) == ["export"]
