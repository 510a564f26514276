"""Interrupted runs: whatever ends them, going on gives the run that was never interrupted."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from test_scripts import ROOT, arguments, data  # noqa: F401  fixtures

from modeling_mtpf.errors import MtpfError
from modeling_mtpf.pretraining.checkpoint import (
    clear_leftovers,
    list_checkpoints,
    random_state,
    read_state,
    save_checkpoint,
    set_random_state,
)
from modeling_mtpf.pretraining.families.base import FAMILY_CLASSES
from modeling_mtpf.pretraining.families.ner import ClusterObjective
from modeling_mtpf.pretraining.metrics_log import MetricsLog
from modeling_mtpf.pretraining.recipe import Recipe
from modeling_mtpf.pretraining.run_record import check_same_run, lock_folder
from train import pretrain


def lines_of(run: Path) -> list[dict]:
    """The logged lines without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second",)} for line in lines]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    files = sorted(run.glob("backbone/*.safetensors")) + sorted(run.glob("adapters/*/*.safetensors"))
    return {f"{file.parent.name}/{key}": value for file in files for key, value in load_file(file).items()}


def assert_same_run(one: Path, other: Path) -> None:
    assert lines_of(one) == lines_of(other)
    expected, found = weights_of(one), weights_of(other)
    assert expected.keys() == found.keys() and len(expected) > 40
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    records = [json.loads((run / "run.json").read_text()) for run in (one, other)]
    assert records[0]["data"] == records[1]["data"] and records[0]["moved"] == records[1]["moved"]


SETTINGS = {"steps": 7, "gradient_accumulation_steps": 2, "gradient_cache": True, "chunk_tokens": 128}


def stop_at(monkeypatch, step: int, number=signal.SIGTERM) -> None:
    """Send this process a signal in the middle of a step."""
    add = MetricsLog.add
    calls = []

    def counting(log, *rest):
        add(log, *rest)
        calls.append(1)
        if len(calls) == 2 * step - 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(MetricsLog, "add", counting)


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["tpl", "naive"])
def test_a_stopped_run_goes_on_bit_for_bit(arguments, tmp_path, monkeypatch, capsys, regime):  # noqa: F811
    settings = {**SETTINGS, "regime": regime}
    assert pretrain.main(arguments("whole", **settings)) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert pretrain.main(arguments("stopped", **settings)) == 143
    assert "Stopped after step 3 by SIGTERM" in capsys.readouterr().err
    assert [path.name for path in list_checkpoints(tmp_path / "stopped")] == ["step-3"]
    assert pretrain.main(arguments("stopped", **settings)) == 2
    assert "continue it by --resume auto" in capsys.readouterr().err
    # Prefetching, checkpoints and log intervals do not touch the numbers; a line after the checkpoint is dropped.
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 99.0}\n{"step": 5, "lo')
    assert (
        pretrain.main(arguments("stopped", **settings, resume="auto", prefetch=0, save_every=2, keep=1)) == 0
    )
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert [path.name for path in list_checkpoints(tmp_path / "stopped")] == ["step-7"]
    capsys.readouterr()
    assert pretrain.main(arguments("stopped", **settings, resume="auto")) == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert (
        pretrain.main(arguments("fresh", **settings, resume="auto")) == 0
    )  # nothing there yet: from the start
    assert_same_run(tmp_path / "whole", tmp_path / "fresh")


def test_another_run_is_not_resumed(arguments, tmp_path, monkeypatch, capsys, data):  # noqa: F811
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        assert pretrain.main(arguments(steps=4, gradient_accumulation_steps=2)) == 143
    base = {"steps": 4, "gradient_accumulation_steps": 2, "resume": "auto"}
    for change, named in (
        ({"learning_rate": 0.5}, "learning_rate = 0.001, this run has 0.5"),
        ({"families.tc.batch_size": 6}, "families.tc.batch_size = 4, this run has 6"),
        ({"weight_decay": 0.3}, "weight_decay = 0.01, this run has 0.3"),
    ):
        assert pretrain.main(arguments(**{**base, **change})) == 2
        assert named in capsys.readouterr().err
    (data / "pairs" / "turned.jsonl").write_text((data / "pairs" / "facts.jsonl").read_text())
    assert pretrain.main(arguments(**base)) == 2
    assert "data.tc.turned.fingerprint" in capsys.readouterr().err
    assert (
        pretrain.main(arguments(**{**base, "resume": str(tmp_path / "run" / "checkpoints" / "step-9")})) == 2
    )
    assert "step-9 is not a checkpoint of" in capsys.readouterr().err
    older = tmp_path / "run" / "checkpoints" / "step-1"
    shutil.copytree(older, older.with_name("step-2"))
    assert pretrain.main(arguments(**{**base, "resume": str(older)})) == 2
    assert "is not the newest checkpoint" in capsys.readouterr().err
    with lock_folder(tmp_path / "run"):
        assert pretrain.main(arguments(**base)) == 2
    assert "Another run writes to" in capsys.readouterr().err


def test_a_checkpoint_of_an_older_version_lacks_new_keys(tmp_path):
    recipe = asdict(Recipe(families={"tc": FAMILY_CLASSES["tc"].settings_class()}))
    older = json.loads(json.dumps(recipe | {"demo": True}))
    for key in ("contrastive_weight", "keep_similarities", "keep_vectors"):
        del older["families"]["tc"][key]
    check_same_run({"recipe": recipe}, tmp_path, {"recipe": older})
    recipe["families"]["tc"]["keep_vectors"] = 5.0
    with pytest.raises(MtpfError, match=r"keep_vectors = 0\.0, this run has 5\.0"):
        check_same_run({"recipe": recipe}, tmp_path, {"recipe": older})


class Small(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, 2)


def small():
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_write_that_breaks_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    model, optimizer = small()
    save_checkpoint(tmp_path, 1, model, optimizer, {"a": 1}, keep=2)
    for place in ("rename", "write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, place, lambda *_: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                save_checkpoint(tmp_path, 2, model, optimizer, {}, keep=2)
        assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1"]
    for step in (2, 3, 10):
        save_checkpoint(tmp_path, step, model, optimizer, {}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-3", "step-10"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-10", "step-3"]


def test_random_numbers_go_on():
    random.gauss(0, 1)
    np.random.randn()  # noqa: NPY002
    state = random_state()

    def draw():
        return random.gauss(0, 1), random.random(), np.random.randn(3).tolist(), torch.rand(3).tolist()  # noqa: NPY002

    first = draw()
    set_random_state({name: value.clone() for name, value in state.items()})
    assert draw() == first


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    from modeling_mtpf.pretraining.checkpoint import load_checkpoint

    model, optimizer = small()
    folder = save_checkpoint(tmp_path, 1, model, optimizer, {}, keep=1)
    other = torch.nn.Linear(5, 2)
    with pytest.raises(MtpfError, match="does not fit this model"):
        load_checkpoint(folder, other, torch.optim.AdamW(other.parameters()))
    shutil.copy(folder / "random-0.safetensors", folder / "random-1.safetensors")
    with pytest.raises(MtpfError, match="was written by 2 processes, not 1; resume with as many"):
        load_checkpoint(folder, model, optimizer)
    (folder / "random-1.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(b"half of a file")
    with pytest.raises(MtpfError, match="step-1 is damaged: .* Remove it to resume from the one before"):
        load_checkpoint(folder, model, optimizer)


def test_saving_a_step_again_replaces_it_and_leftovers_are_cleared(tmp_path):
    model, optimizer = small()
    for value in (1, 2):
        save_checkpoint(tmp_path, 3, model, optimizer, {"value": value}, keep=1)
    assert read_state(tmp_path / "checkpoints" / "step-3")["value"] == 2
    for name in (".step-4.partial", ".step-1.old"):
        (tmp_path / "checkpoints" / name / "x").mkdir(parents=True)
    clear_leftovers(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(arguments, tmp_path, encoders, capsys):  # noqa: F811
    """Stopped between two log lines; counts and log lines are those of both processes."""
    labels = {"families.ner.data": tmp_path / "labels", "diagnostics_every": 0, "log_every": 4, "steps": 6}
    assert pretrain.main(arguments("make", steps=1)) == 0
    (tmp_path / "make" / "pseudo_labels").rename(tmp_path / "labels")
    script = [*TORCHRUN, str(ROOT / "train" / "pretrain.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def launch(*rest):
        done = subprocess.run([*script, *rest], capture_output=True, text=True, timeout=200, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]

    launch(*arguments("whole", **labels, save_every=3, keep=9))
    cut = tmp_path / "cut"
    (cut / "checkpoints").mkdir(parents=True)
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-3", cut / "checkpoints" / "step-3")
    assert pretrain.main(arguments("cut", **labels, resume="auto")) == 2  # by one process
    assert "was written by 2 processes, not 1" in capsys.readouterr().err
    launch(*arguments("cut", **labels, save_every=3, keep=9, resume="auto"))
    assert_same_run(tmp_path / "whole", cut)
    seen = json.loads((cut / "run.json").read_text())["data"]["ner"]["words_seen"]
    assert pretrain.main(arguments("alone", **labels)) == 0  # the same batches by one process
    assert seen == json.loads((tmp_path / "alone" / "run.json").read_text())["data"]["ner"]["words_seen"]


def broken_at(monkeypatch, step: int, value: float, rows: int | None) -> None:
    """Let the NER objective give bad numbers in one step, for some rows of its first chunk or for all rows."""
    forward, loss = ClusterObjective.forward, ClusterObjective.loss
    chunks, steps = [], []

    def broken(objective, *rest):
        found = forward(objective, *rest)
        if len(steps) + 1 != step:
            return found
        chunks.append(1)
        factor = torch.ones_like(found)
        if rows is None or len(chunks) == 1:
            factor[:rows] = value
        return found * factor

    def counted(objective, *rest):
        steps.append(1)
        return loss(objective, *rest)

    monkeypatch.setattr(ClusterObjective, "forward", broken)
    monkeypatch.setattr(ClusterObjective, "loss", counted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "rows", "message"),
    [
        (float("nan"), 1, r"family 'ner' is not finite, from row \d+ of source 'text' \(1 of 4 rows\)"),
        (float("inf"), None, "the loss of family 'ner' is not finite in the whole batch of source 'text'"),
        (1e7, None, r"above gradient_norm_limit \(10000\), after family 'ner' \(source 'text' rows \d+, \d+"),
    ],
)
def test_broken_numbers_stop_the_run_and_are_named(
    arguments,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
    value,
    rows,
    message,
):
    """The step, family, source and row; the last good checkpoint stays and can be resumed."""
    settings = {"steps": 6, "save_every": 2, "diagnostics_every": 0}
    with monkeypatch.context() as patch:
        broken_at(patch, 5, value, rows)
        assert pretrain.main(arguments("broken", **settings)) == 2
    error = capsys.readouterr().err
    assert "Step 5: the " in error and re.search(message, error)
    assert "The last checkpoint is that of step 4." in error
    assert [path.name for path in list_checkpoints(tmp_path / "broken")] == ["step-2", "step-4"]
    assert pretrain.main(arguments("broken", **settings, resume="auto")) == 0
    assert pretrain.main(arguments("whole", **settings)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_a_lost_process_ends_the_run_and_the_checkpoint_stays(arguments, tmp_path):  # noqa: F811
    settings = {
        "steps": 400,
        "save_every": 2,
        "families.ner.data": tmp_path / "labels",
        "diagnostics_every": 0,
    }
    assert pretrain.main(arguments("labels-run", steps=1)) == 0
    (tmp_path / "labels-run" / "pseudo_labels").rename(tmp_path / "labels")
    run = tmp_path / "run"
    command = [*TORCHRUN, str(ROOT / "train" / "pretrain.py"), *arguments(**settings)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not list_checkpoints(run):
        time.sleep(0.05)
    workers = [
        child
        for child in psutil.Process(process.pid).children()
        if "pretrain.py" in " ".join(child.cmdline())
    ]
    workers[-1].kill()
    _, error = process.communicate(timeout=200)
    assert process.returncode != 0
    newest = list_checkpoints(run)[-1]
    assert load_file(newest / "model.safetensors") and not (run / "run.json").exists()
    step = int(newest.name.removeprefix("step-"))
    resumed = arguments(**{**settings, "steps": 400, "resume": "auto"})
    process = subprocess.Popen(
        [*command[: -len(arguments(**settings))], *resumed], stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and list_checkpoints(run)[-1] == newest:
        time.sleep(0.05)
    process.terminate()  # torchrun passes it on, and both processes agree on the step at which they stop
    _, error = process.communicate(timeout=200)
    assert int(list_checkpoints(run)[-1].name.removeprefix("step-")) > step, error[-2000:]


@pytest.mark.slow
def test_killed_at_random_moments(arguments, tmp_path):  # noqa: F811
    """SIGKILL and SIGTERM, also while a checkpoint is written; ``MTPF_KILLS`` says how often (default 2)."""
    kills = int(os.environ.get("MTPF_KILLS", "2"))
    settings = {
        "steps": 20 * kills + 20,
        "save_every": 3,
        "keep": 2,
        "log_every": 5,
        "diagnostics_every": 20,
    }
    assert pretrain.main(arguments("whole", **settings)) == 0
    run = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "train" / "pretrain.py")]
    command += arguments("killed", **settings, resume="auto")
    rng = random.Random(0)
    done, codes = 0, []
    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done < kills:
            wait_for_moment(process, run, rng, while_saving=done % 3 == 1)
            process.send_signal(signal.SIGTERM if done % 2 else signal.SIGKILL)
            done += 1
        _, error = process.communicate(timeout=300)
        codes.append(process.returncode)
        assert process.returncode in (0, 143, -signal.SIGKILL, -signal.SIGTERM), error[-2000:]
        for checkpoint in list_checkpoints(run):  # whatever is there can be read
            for file in checkpoint.glob("*.safetensors"):
                load_file(file)
            json.loads((checkpoint / "state.json").read_text())
        if process.returncode == 0:
            break
    assert len(codes) >= kills
    assert_same_run(tmp_path / "whole", run)


def wait_for_moment(process, run: Path, rng: random.Random, while_saving: bool) -> None:
    """Wait until training continues, then a random time, or until a checkpoint is being written."""
    before = newest(run)
    while process.poll() is None and newest(run) == before:
        time.sleep(0.01)
    if not while_saving:
        time.sleep(rng.random())
        return
    while process.poll() is None and not list((run / "checkpoints").glob(".*.partial")):
        time.sleep(0.0005)


def newest(run: Path) -> str:
    checkpoints = list_checkpoints(run)
    return checkpoints[-1].name if checkpoints else ""
