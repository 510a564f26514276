"""The study of composed apps: a small run on made-up data, resumed, and the report from records."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset
from scipy import stats

from eval import composition as script
from eval.composition_report import PAGE, TABLES
from eval.studies import fill
from modeling_mtpf.errors import DataError
from modeling_mtpf.evaluation.composition import COMPOSITIONS
from modeling_mtpf.evaluation.records import read_records

PLAN = {
    "tasks": ["snips"],
    "seeds": [0],
    "rows": {"train": 20, "validation": 5, "test": 6},
    "apps": {"steps": 3, "evaluations": 1},
    "bundles": {"steps": 2, "evaluations": 1},
    "methods": {
        "separate": {},
        "separate-heads": {
            "method": "mean",
            "each": True,
            "settings": {"heads": "retrained", "loss": "labels"},
        },
        "joint": {"method": "joint"},
        "lc": {"method": "lc", "texts": "own"},
        "mean": {"method": "mean", "texts": "none"},  # which does not read the steps of all bundles
    },
    "groups": {"two": [], "three": ["tc/emotion"]},
}


@pytest.fixture
def data(tmp_path) -> Path:
    """Write a task and a further set of made-up messages."""
    names = [
        f"{first}{second}" for first in "bcdfg" for second in ("an", "el", "io", "ur", "ym", "ost", "ax")
    ]
    for split, some in (("train", names[:25]), ("validation", names[25:30]), ("test", names[30:])):
        texts = [f"call {x} now" if len(x) % 2 else f"play {x}" for x in some]
        tags = [["O", "B-person", "O"][: len(text.split())] for text in texts]
        labels = [text.split()[0] for text in texts]
        tables = {
            COMPOSITIONS["snips"][0]: {"tokens": [text.split() for text in texts], "ner_tags": tags},
            COMPOSITIONS["snips"][1]: {"text": texts, "label": labels},
            "tc/emotion": {"text": [f"{x} is here" for x in some], "label": labels},
        }
        for key, table in tables.items():
            (tmp_path / "data" / key).mkdir(parents=True, exist_ok=True)
            Dataset.from_dict(table).to_parquet(tmp_path / "data" / key / f"{split}.parquet")
    return tmp_path / "data"


@pytest.mark.slow
def test_a_small_study_resumes(data, tmp_path, folders, capsys):
    pytest.importorskip("modeling_mtpf.adaptation.bundle")
    plan, records = tmp_path / "plan.yaml", tmp_path / "records.json"
    plan.write_text(yaml.safe_dump(PLAN, sort_keys=False))
    options = ["run", "--work", tmp_path / "work", "--plan", plan, "--records", records, "--data", data]
    options += ["--backbone", f"tiny={folders / 'backbone'}", "--threads", "1"]

    def run(*more) -> tuple[int, str]:
        status = script.main([str(option) for option in (*options, *more)])
        return status, capsys.readouterr().err

    assert run("--only", "separate")[0] == 0
    first = records.read_text()
    made = sorted((tmp_path / "work").iterdir())
    assert len(made) == 2
    assert run("--groups", "two", "three")[0] == 0
    assert sorted(tmp_path.glob("work/*"))[:2] == made
    found = read_records(records)
    assert all(line.strip(",") in records.read_text() for line in first.splitlines())
    regimes = {f"tiny/{group}/{method}" for group in PLAN["groups"] for method in PLAN["methods"]}
    assert {record["regime"] for record in found} == regimes and len(found) == 5 * 2 + 5 * 3
    by_key = {(r["regime"], r["protocol"]): r for r in found}
    assert by_key["tiny/three/joint", "further"]["n_test"] == 5
    two, one = (
        by_key[f"tiny/two/{method}", "slots"]["config"]["cost"]["bytes"] for method in ("separate", "joint")
    )
    assert one < 0.7 * two  # a LoRA less
    vector = by_key["tiny/three/lc", "further"]  # it has no folder
    assert vector["config"]["cost"].keys() == {"cpu_seconds"} and 0 <= vector["value"] <= 1
    assert "–" in next(row for row in TABLES["averages"](found).splitlines() if "three | `lc`" in row)
    assert str(tmp_path) not in records.read_text()
    before = records.stat().st_mtime_ns
    assert run()[0] == 0 and records.stat().st_mtime_ns == before
    plan.write_text(yaml.safe_dump({**PLAN, "apps": {"steps": 4, "evaluations": 1}}, sort_keys=False))
    status, error = run()
    assert (
        status == 2
        and "has records of tiny/two/separate with other apps: {'evaluations': 1, 'steps': 3}" in error
    )
    assert run("--only", "lc+")[1] == (
        "error: --only: the plan has no 'lc+'; it has: separate, separate-heads, joint, lc, mean.\n"
    )


def record(method: str, task: str, seed: int, protocol: str, value: float) -> dict:
    cost = {"bytes": 2_000_000, "cpu_seconds": 1.0, "cpu_ms_a_text": 2.0}
    return {
        "regime": f"packaged/two/{method}",
        "seed": seed,
        "task": task,
        "family": "ner" if protocol == "slots" else "tc",
        "protocol": protocol,
        "metric": "entity_f1" if protocol == "slots" else "accuracy",
        "value": value,
        "n_train": 10,
        "n_test": 10,
        "config": {"cost": cost},
    }


def test_tables_of_made_up_records():
    values = {
        "separate": (0.6, 0.7, 0.62),
        "joint": (0.62, 0.71, 0.63),
        "lc++": (0.5, 0.6),
        "mean": (0.4, 0.4),
    }
    records = [
        record(method, task, seed, protocol, value + shift)
        for method, of_seed in values.items()
        for seed, value in enumerate(of_seed)
        for task, shift in (("snips", 0.0), ("massive_hwu64", 0.1))
        for protocol in ("slots", "intents")
    ]
    records.append(record("lc++", "snips", 2, "slots", 0.1))  # a seed that lacks a task does not count
    text = "a <!-- composition: averages --><!-- end --> b <!-- composition: differences -->x<!-- end -->"
    filled = fill(text, "composition", TABLES, records)
    assert fill(filled, "composition", TABLES, records) == filled
    half = stats.t.ppf(0.975, 1) * np.std([55, 65], ddof=1) / 2**0.5
    cell = f"60.00 ± {half:.2f}"
    assert f"| packaged/two | `lc++` | {cell} | {cell} | – | 2 of 3 | 2.00 | 1 | 2.0 |" in filled
    half = stats.t.ppf(0.975, 1) * np.std([10, 20], ddof=1) / 2**0.5
    cell = f"+15.00 [{15 - half:+.2f}, {15 + half:+.2f}]"
    assert f"| packaged/two | `lc++` − `mean` | {cell} | {cell} | – |" in filled
    assert (
        "| packaged/two | `joint` − `separate` | +1.33 [-0.10, +2.77] | +1.33 [-0.10, +2.77] | – |" in filled
    )
    with pytest.raises(DataError, match="no table 'average' of the composition; known: averages"):
        fill("<!-- composition: average --><!-- end -->", "composition", TABLES, records)


def test_the_page_is_made_from_the_committed_records():
    records = read_records(script.RECORDS)
    page = (script.ROOT / "docs" / PAGE).read_text("utf-8")
    assert fill(page, "composition", TABLES, records) == page
    slots = [r for r in records if r["regime"] == "packaged/two/separate" and r["protocol"] == "slots"]
    tasks = {r["task"] for r in slots}
    assert len(slots) == len(tasks) * len({r["seed"] for r in slots}) == 12
    assert f"| `separate` | {100 * np.mean([r['value'] for r in slots]):.2f} ± " in page
    assert not {"text", "texts", "inputs"} & set(json.dumps(records[0]["config"]))
