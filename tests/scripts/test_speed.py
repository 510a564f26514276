"""The scripts behind this project's numbers about speed and labels, and the teacher's script."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from eval.speed import run as speed
from eval.study import summarize_labels
from train import ner_teacher


def test_sections_are_found_and_judged():
    rate = {"words_per_second": 20.0, "words_per_cpu_second": 15.0, "clustering_and_writing_share": 0.05}
    plain = {"words_per_second": 10.0, "words_per_second_loop_alone": 12.0, "words_per_cpu_second": 10.0}
    memory = {"mtpf_1x": {"peak_mb": 1000.0}, "mtpf_4x": {"peak_mb": 1200.0}}
    mining = {name: {"peak_mb": 900.0, "cpu_seconds": 8.0} for name in ("mining_10k", "mining_100k")}
    mining["mining_1m"] = {"peak_mb": 1000.0, "cpu_seconds": 9.0}
    mining["training"] = {"score_seconds": 2.0, "step_seconds": 0.1, "steps": 1010}
    expected = {
        "labels": [False, True, True, False, True],
        "labels_memory": [False, True],
        "mining": [False, True],
    }
    sections = {
        "labels": {"mtpf": rate, "plain": plain, "plain_sorted": plain},
        "labels_memory": memory,
        "mining": mining,
    }
    for name, medians in sections.items():
        section = speed.load_section(name)
        assert set(medians) == set(section.CONTESTANTS)
        met = [speed.judged(*numbers)["kept"] for numbers in section.compare(medians).values()]
        assert met == expected[name]
    with pytest.raises(SystemExit, match="no section 'none'; known: adapt, apps, bundle, cache"):
        speed.load_section("none")


def test_peak_memory_is_that_of_the_contestant(tmp_path):
    sections = tmp_path / "sections"
    sections.mkdir()
    (sections / "memory.py").write_text(
        "CONTESTANTS = {'small': 9, 'large': 1, 'peer_a': 9, 'other_b': 9}\n"
        "ENVIRONMENTS = ('peer', 'other')\n"
        "def measure(contestant, options):\n"
        "    size = {'small': 1, 'large': 200, 'other_b': 1}[contestant] << 20\n"
        "    return {'size': len(bytearray(b'x') * size), 'option': int(options['text'])}\n"
        "def compare(medians):\n"
        "    return {'more': (medians['large']['peak_mb'] - medians['small']['peak_mb'], '>=', 190)}\n"
    )
    script, output = tmp_path / "speed.py", tmp_path / "numbers" / "speed.json"
    script.write_text(Path(speed.__file__).read_text())
    arguments = ["--sections", "memory", "--rounds", "2", "--text", "7", "--output", str(output)]
    arguments += ["--python", f"other={sys.executable}"]
    # From a small process: a child's peak is never below the size of the one that starts it.
    done = subprocess.run(
        [sys.executable, str(script), *arguments], check=True, capture_output=True, text=True
    )
    assert "peer is left out; name its environment with --python peer=PATH" in done.stdout
    record = json.loads(output.read_text())
    section = record["sections"]["memory"]
    assert {name: len(runs) for name, runs in section["rounds"].items()} == {
        "small": 2,
        "large": 1,
        "other_b": 2,
    }
    low, high = section["compared"]["more"]["range"]
    assert low <= section["compared"]["more"]["value"] <= high
    assert record["machine"]["cores"] and record["machine"]["peaks"]["float32"] > 0
    assert section["compared"]["more"]["kept"] and section["compared"]["more"]["value"] < 230
    assert section["medians"]["small"]["option"] == 7


@pytest.fixture
def tagged(tmp_path):
    rows = {
        "people": [{"tokens": ["ada", "met", "noor"], "ner_tags": ["B-PER", "O", "B-PER"]}] * 30,
        "places": [{"tokens": ["in", "london", "."], "ner_tags": ["O", "B-LOC", "O"]}] * 30,
    }
    from datasets import Dataset

    for name, content in rows.items():
        (tmp_path / name).mkdir()
        Dataset.from_list(content).to_parquet(tmp_path / name / "train.parquet")
    return [str(tmp_path / name) for name in rows]


@pytest.mark.slow
def test_a_teacher_is_trained_in_pieces_and_learns(encoders, tagged, tmp_path, capsys):
    output = tmp_path / "teacher"
    arguments = ["--data", *tagged, "--encoder", str(encoders["bert"]), "--output_dir", str(output)]
    arguments += ["--epochs", "6", "--tokens", "64", "--learning_rate", "1e-3"]
    assert ner_teacher.main([*arguments, "--minutes", "0"]) == 3
    assert (output / ner_teacher.STATE).is_file() and not (output / "config.json").exists()
    state = torch.load(output / ner_teacher.STATE, weights_only=True)
    assert state["step"] == 0 and len(state["model"]) > 10
    assert ner_teacher.main([*arguments, "--sentences", "9"]) == 2
    assert "--sentences 0, this run has 9" in capsys.readouterr().err
    assert ner_teacher.main(arguments) == 0
    record = json.loads((output / "teacher.json").read_text())
    assert record["sets"]["people"] == {"sentences": 30, "types": ["PER"]} and record["last_loss"] < 0.5
    assert not (output / ner_teacher.STATE).exists()
    trained = AutoModel.from_pretrained(output).state_dict()
    start = AutoModel.from_pretrained(encoders["bert"]).state_dict()
    assert any(not torch.equal(value, start[key]) for key, value in trained.items())


def test_a_smaller_teacher_keeps_the_lowest_layers_and_some_sentences(encoders, tagged, tmp_path):
    output = tmp_path / "teacher"
    arguments = ["--data", *tagged, "--encoder", str(encoders["bert"]), "--output_dir", str(output)]
    arguments += ["--epochs", "1", "--tokens", "64", "--learning_rate", "0"]
    assert ner_teacher.main([*arguments, "--layers", "2", "--sentences", "10"]) == 0
    record = json.loads((output / "teacher.json").read_text())
    assert record["layers"] == 2 and [part["sentences"] for part in record["sets"].values()] == [10, 10]
    trained = AutoModel.from_pretrained(output).state_dict()
    start = AutoModel.from_pretrained(encoders["bert"]).state_dict()
    assert not any("layer.2" in key for key in trained) and any("layer.1" in key for key in trained)
    assert all(torch.equal(value, start[key]) for key, value in trained.items())


def test_a_students_accuracy_is_compared_with_guessing(tmp_path):
    sizes = [50, 25, 25]  # an entropy of 1.5 bits
    labels, run = tmp_path / "labels", tmp_path / "run"
    labels.mkdir()
    run.mkdir()
    report = {"words": 100, "entropy_bits": 1.5, "clusters": [{"size": size} for size in sizes]}
    (labels / "clusters.json").write_text(json.dumps(report))
    losses = [1.5 * math.log(2)] * 10 + [0.75 * math.log(2)] * 2  # in nats, as a loss is
    lines = [
        {"step": step, "loss/ner": loss, "pseudo_label_accuracy/ner": step / 100}
        for step, loss in enumerate(losses)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = summarize_labels.student_table([summarize_labels.run_record("mine", run, labels)])
    cells = table.splitlines()[-1].strip("| ").split(" | ")
    assert cells == "mine 0.500 1.500 0.005 0.025 0.045 0.065 0.085 0.105 0.500".split()
