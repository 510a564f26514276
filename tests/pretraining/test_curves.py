import json

from matplotlib.figure import Figure

from eval.study import curves, summarize_runs
from modeling_mtpf.pretraining.curves import draw


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


def test_logged_values_are_drawn_next_to_their_mean(tmp_path, monkeypatch):
    """A reader must see where the log ends, and which line is a mean."""
    lines = [{"step": step, "loss/ner": float(step)} for step in range(1, 5)]
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    draw({"tpl": lines}, tmp_path / "curves.png", smooth=2)
    logged, mean = figures[0].axes[0].lines
    assert (logged.get_label(), mean.get_label()) == ("tpl, as logged", "tpl, mean of 2 lines")
    assert logged.get_ydata().tolist() == [1, 2, 3, 4] and mean.get_ydata().tolist() == [1, 1.5, 2.5, 3.5]


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
