import json

import pytest

from eval.study import curves, summarize_runs
from modeling_mtpf.pretraining.curves import moving_mean


def test_picture_of_two_runs(tmp_path, capsys):
    for name in ("tpl", "naive"):
        (tmp_path / name).mkdir()
        lines = [{"step": s, "loss/ner": 5.0 - s, "gradient_cosine/all": 0.1 * s} for s in range(3)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    output = tmp_path / "pictures" / "curves.png"
    assert curves.main([str(tmp_path / "tpl"), str(tmp_path / "naive"), "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG") and output.stat().st_size > 5000
    assert curves.main([str(tmp_path), "--output", str(output)]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err


def test_moving_mean():
    assert moving_mean([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
    assert moving_mean([1.0, 5.0], 1) == pytest.approx([1.0, 5.0])


def test_summary_of_runs_has_means_and_no_paths(tmp_path, capsys):
    run = tmp_path / "tpl"
    run.mkdir()
    lines = [{"step": s, "loss/ner": float(s)} for s in range(30)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    keys = ("backbone", "steps", "learning_rate", "adapter_learning_rate", "seed", "mixed_precision")
    record = {"regime": "tpl", "recipe": dict.fromkeys(keys, 1) | {"output_dir": str(tmp_path)}, "moved": {}}
    record |= dict.fromkeys(("data", "versions", "hardware", "started", "seconds", "resumed_at"), 0)
    (run / "run.json").write_text(json.dumps(record))
    output = tmp_path / "results" / "runs.json"
    assert summarize_runs.main([str(run), "--output", str(output)]) == 0
    (summary,) = json.loads(output.read_text())
    assert (summary["first"]["loss/ner"], summary["last"]["loss/ner"]) == (4.5, 24.5)
    assert str(tmp_path) not in output.read_text() and "4.500 → 24.500" in capsys.readouterr().out
