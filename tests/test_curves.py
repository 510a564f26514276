import json

import pytest

from eval import curves


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
    assert curves.moving_mean([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
    assert curves.moving_mean([1.0, 5.0], 1) == pytest.approx([1.0, 5.0])
