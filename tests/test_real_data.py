"""A few joint steps on real text and pairs, where there are any."""

import json
import os
from pathlib import Path

import pytest

from eval.checks import multi_label
from train import pretrain


@pytest.mark.data
@pytest.mark.slow
def test_joint_steps_on_real_data(tmp_path):
    data = Path(os.environ["MTPF_DATA"])
    # Every pair of a source is tokenized before the first step: the large ones would take minutes.
    smallest = sorted((data / "pairs").glob("*.parquet"), key=lambda file: file.stat().st_size)[:3]
    recipe = {
        "steps": 4,
        "log_every": 2,
        "output_dir": str(tmp_path / "run"),
        "families": {
            "ner": {
                "text": str(sorted((data / "text").glob("*.parquet"))[0]),
                "max_texts": 60,
                "clusters": 20,
            },
            "tc": {"pairs": [str(file) for file in smallest], "batch_size": 8},
        },
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    assert pretrain.main([str(file)]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(record["data"]["tc"]) == 3 and record["data"]["ner"]["sentences"] > 60
    assert all(value > 0 for value in record["moved"].values())


@pytest.mark.data
@pytest.mark.slow
def test_printed_scores_of_several_labels_are_those_of_predict(tmp_path):
    data = Path(os.environ["MTPF_DATA"])
    sizes = {"train": 80, "validation": 60, "test": 60}
    row = multi_label.measure(str(data / "ner" / "hwu64"), "probe", sizes, tmp_path)
    assert row["printed"] == row["recomputed"] and 0 < row["printed"]["micro_f1"] < 1
