"""The study of sparse fine-tuning: a small run on made-up data, resumed, and the report from records."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset

from eval import sparse_study as script
from eval.sparse_report import PAGES, TABLES
from eval.studies import fill
from modeling_mtpf.errors import DataError
from modeling_mtpf.evaluation.records import read_records

ALONE = {"method": "sparse", "standalone": True}
PLAN = {
    "sets": ["tc/sms_spam", "ner/fin"],
    "seeds": [0],
    "rows": {"train": 20, "validation": 5, "test": 6},
    "settings": {"steps": 3, "evaluations": 1, "mixed_precision": "float32"},
    "methods": {
        "probe": {"method": "probe", "families": ["tc"]},
        "lora": {"method": "lora", "settings": {"size": "tpl"}},
        "tail": {"method": "sparse", "settings": {"sparse": {"budget": 0.3}}},
        "sparse-10": {**ALONE, "settings": {"sparse": {"budget": 0.3, "vocabulary": 0}}},
    },
    "ablations": {"end-to-end": {**ALONE, "settings": {"sparse": {"budget": 1, "vocabulary": 0}}}},
}


@pytest.fixture
def data(tmp_path) -> Path:
    """Write two sets of made-up messages."""
    for split, names in (("train", "bcdfghjklmnpqrstvwxyz"), ("validation", "aeiou"), ("test", "AEIOUY")):
        texts = [f"call {x}an now" if number % 2 else f"play {x}el" for number, x in enumerate(names)]
        tables = {
            "tc/sms_spam": {"text": texts, "label": [text.split()[0] for text in texts]},
            "ner/fin": {
                "tokens": [text.split() for text in texts],
                "ner_tags": [["O", "B-person", "O"][: len(text.split())] for text in texts],
            },
        }
        for key, table in tables.items():
            (tmp_path / "data" / key).mkdir(parents=True, exist_ok=True)
            Dataset.from_dict(table).to_parquet(tmp_path / "data" / key / f"{split}.parquet")
    return tmp_path / "data"


@pytest.mark.slow
def test_a_small_study_runs_in_slices_and_resumes(data, tmp_path, folders, capsys):
    plan, records = tmp_path / "plan.yaml", tmp_path / "records.json"
    plan.write_text(yaml.safe_dump(PLAN, sort_keys=False))
    options = ["run", "--plan", plan, "--records", records, "--data", data]
    options += ["--backbone", folders / "backbone"]

    def run(*more) -> tuple[int, str]:
        status = script.main([str(option) for option in (*options, *more)])
        return status, capsys.readouterr().err

    assert run("--sets", "tc/sms_spam", "--only", "probe", "sparse-10")[0] == 0
    first = records.read_text()
    assert len(read_records(records)) == 2
    assert run()[0] == 0
    assert all(line.strip(",") in records.read_text() for line in first.splitlines())
    found = {(r["regime"], r["task"]): r for r in read_records(records)}
    expected = {(m, t) for m in PLAN["methods"] for t in ("sms_spam", "fin")} - {("probe", "fin")}
    assert found.keys() == expected
    for (method, _), record in found.items():
        cost, details = record["config"]["cost"], record["config"]["details"]
        assert 0 <= record["value"] <= 1 and record["n_train"] == 20 and cost["bytes"] > 0
        assert method == "probe" or details["steps"] == 3
        assert method != "sparse-10" or 0 < details["trained_share"] <= 0.3 and details["tokens"] == 0
    assert str(tmp_path) not in records.read_text()
    before = records.stat().st_mtime_ns
    assert run()[0] == 0 and records.stat().st_mtime_ns == before
    assert run("--ablations", "--sets", "tc/sms_spam", "--seeds", "1")[0] == 0
    assert {(r["regime"], r["seed"]) for r in read_records(records)} > {("end-to-end", 1)}
    plan.write_text(yaml.safe_dump({**PLAN, "rows": {"train": 9}}, sort_keys=False))
    status, error = run()
    assert status == 2 and "has records of probe with other rows: {'test': 6" in error
    assert run("--only", "lor")[1].startswith("error: --only: the plan has no 'lor'; it has: probe, lora,")
    page = "".join(f"<!-- sparse: {name} --><!-- end -->" for name in TABLES)
    assert "| `sparse-10` |" in fill(page, "sparse", TABLES, read_records(records))


def record(method: str, task: str, seed: int, value: float) -> dict:
    cost = {"bytes": 2e6 if method == "lora" else 40e6, "cpu_seconds": 30.0, "cpu_ms_a_text": 2.0}
    cost["cpu_seconds"] *= 2 if method == "end-to-end" else 1
    details = {"trained_share": 0.1} if method != "lora" else {}
    details |= {"change_kept": 0.9, "validation_before_svd": value + 0.01} if method == "tail" else {}
    family = "ner" if task == "fin" else "tc"
    return {
        **{"regime": method, "seed": seed, "task": task, "family": family, "protocol": "sparse"},
        **{"metric": "accuracy", "value": value, "validation": value, "n_train": 10, "n_test": 10},
        "config": {"cost": cost, "details": details},
    }


def test_tables_of_made_up_records():
    values = {"end-to-end": (0.6, 0.7), "lora": (0.5, 0.6), "tail": (0.55, 0.64)}
    records = [
        record(method, task, seed, value + shift)
        for method, of_seed in values.items()
        for seed, value in enumerate(of_seed)
        for task, shift in (("fin", 0.0), ("sms_spam", 0.1), ("banking77", 0.2))
    ]
    text = "".join(f"<!-- sparse: {name} -->x<!-- end -->" for name in TABLES)
    filled = fill(text, "sparse", TABLES, records)
    assert fill(filled, "sparse", TABLES, records) == filled
    spread = np.std([55, 64], ddof=1)
    line = next(row for row in filled.splitlines() if row.startswith("| `tail` |"))
    assert f"| {spread:.2f} | 6 | 10.0% | 40.00 | 30 | 2.0 |" in line
    assert "| `tail` − `end-to-end` | -5.50 [–] | -5.50 [–] | -5.50 [–] | 0.50 | 1.00 |" in filled
    assert "| `tail` − `lora` | +4.50 [–] |" in filled and "| `end-to-end` − `lora`" not in filled
    assert "| fin | – | 90.0 % | -1.00 |" in filled
    with pytest.raises(DataError, match="no table 'set' of the sparse; known: averages"):
        fill("<!-- sparse: set --><!-- end -->", "sparse", TABLES, records)


def test_the_pages_are_made_from_the_committed_records():
    records = read_records(script.RECORDS)
    for name in PAGES:
        page = (script.ROOT / "docs" / name).read_text("utf-8")
        assert "<!-- sparse: averages -->" in page and fill(page, "sparse", TABLES, records) == page
    configs = json.dumps([record["config"] for record in records])
    assert not any(f'"{key}":' in configs for key in ("text", "texts", "inputs"))
