"""Counting test texts in training data: whole ones, long runs of words, and their sources."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval.study import overlap


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_whole_texts_and_long_runs_are_found_where_they_are(tmp_path, capsys):
    tagged = ["the cat sat down", "see also", "x c d e f g h i j y", "x d e f g h i j y"]
    words = [text.split() for text in tagged]
    write(tmp_path / "ner/one/test.parquet", tokens=words, ner_tags=[["O"] * len(row) for row in words])
    write(
        tmp_path / "tc/two/test.parquet", text=["The cat, sat DOWN!", "no one wrote this"], label=["a", "b"]
    )
    pairs = write(
        tmp_path / "pairs.parquet", anchor=["see also", "a b c d e f g h i j"], positive=["no", "no"]
    )
    raw = write(
        tmp_path / "raw.parquet", text=["It rained. The cat sat down. It slept.", "No one wrote this."]
    )
    output = tmp_path / "counts.json"
    tests = [str(tmp_path / "ner/one"), str(tmp_path / "tc/two")]
    train = [pairs, f"{raw}:1"]  # the second row, which has a test text, is not looked at
    assert overlap.main(["--test", *tests, "--train", *train, "--output", str(output)]) == 0
    counts = json.loads(output.read_text())
    assert counts["sources"] == {"pairs": "all", "raw": "1"}
    one, two = counts["tasks"]["ner/one"], counts["tasks"]["tc/two"]
    assert one == {"texts": 4, "whole": {"raw": 1}, "part": {"pairs": 1}}  # "see also" says nothing
    assert two == {"texts": 2, "whole": {"raw": 1}, "part": {}}


@pytest.mark.parametrize("columns", [{"other": ["a"]}, {}])
def test_a_source_without_texts_is_an_error(tmp_path, capsys, columns):
    write(tmp_path / "tc/two/test.parquet", text=["a"], label=["b"])
    source = tmp_path / "invalid.parquet"
    if columns:
        write(source, **columns)
    assert overlap.main(["--test", str(tmp_path / "tc/two"), "--train", str(source)]) == 2
    assert "invalid.parquet" in capsys.readouterr().err
