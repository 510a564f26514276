"""Users' mistakes in data files and recipes: one sentence with the place and the remedy."""

import json
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling_mtpf.data.sources import expand_pair_sources, fingerprint, open_source
from modeling_mtpf.errors import DataError, RecipeError
from modeling_mtpf.pretraining import setup  # noqa: F401  registers the families
from modeling_mtpf.pretraining.recipe import Recipe, load_recipe

PAIRS = {"anchor": "text", "positive": "text"}


def write(path, content) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", "", "a.jsonl is empty"),
        (
            "a.jsonl",
            '{"anchor": "x", "positive": "y"}\n{"anchor": "x", \n',
            "a.jsonl, line 2 is not valid JSON",
        ),
        ("a.jsonl", b'{"anchor": "x", "positive": "\xff"}\n', "a.jsonl, line 1"),
        ("a.jsonl", '{"anchor": "x", "reply": "y"}\n', "has no column 'positive'; it has: anchor, reply"),
        (
            "a.jsonl",
            '{"anchor": "x", "positive": 3}\n',
            "Column 'positive' of .*a.jsonl, line 1, holds int64; text is needed",
        ),
        (
            "a.jsonl",
            '{"anchor": "x", "positive": "y"}\n{"anchor": "x", "positive": null}\n',
            "row 2: column 'positive'",
        ),
        ("a.parquet", b"PAR1 not a parquet file", "a.parquet cannot be read as parquet"),
        ("a.docx", "x", "unknown ending; accepted: .parquet, .json"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        open_source(write(tmp_path / name, content), PAIRS)


def test_bad_places(tmp_path):
    with pytest.raises(DataError, match="no file or folder ./nowhere"):
        open_source("./nowhere", PAIRS)
    with pytest.raises(DataError, match="has no data file"):
        open_source(tmp_path, PAIRS)
    with pytest.raises(DataError, match="'owner/missing' cannot be opened"):
        open_source("owner/missing", PAIRS)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="empty.parquet has no rows"):
        open_source(tmp_path / "empty.parquet", {"text": "text"})


def test_every_reader_gives_the_same_rows(tmp_path):
    rows = [{"text": "one, two"}, {"text": "Zoë 🙂"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.txt").write_text("\n".join(row["text"] for row in rows))
    (tmp_path / "a.csv").write_text('text\n"one, two"\nZoë 🙂\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for suffix in ("jsonl", "json", "txt", "csv", "parquet"):
        assert open_source(tmp_path / f"a.{suffix}", {"text": "text"}).to_list() == rows, suffix
    assert len(open_source(tmp_path, {"text": "text"})) == 10  # a folder is all its files


def test_a_folder_of_pairs_is_one_source_per_file(tmp_path):
    for name in ("faq", "news"):
        write(tmp_path / f"{name}.jsonl", '{"anchor": "x", "positive": "y"}\n')
    assert list(expand_pair_sources([tmp_path])) == ["faq", "news"]
    with pytest.raises(DataError, match="Two pair sources are named 'faq'"):
        expand_pair_sources([tmp_path, tmp_path / "faq.jsonl"])
    with pytest.raises(DataError, match="No pair source"):
        expand_pair_sources([])


@pytest.fixture
def recipe_file(tmp_path):
    text = "steps: 7\nlearning_rate: 1e-4\nfamilies:\n  ner: {data: labels, lora: {r: 8}}\n  tc: {pairs: [a, b]}\n"
    return write(tmp_path / "recipe.yaml", text)


def test_recipe_with_overrides(recipe_file, tmp_path):
    recipe = load_recipe(
        [recipe_file, "--steps", "9", "--families.tc.temperature=0.1", "--families.ner.lora.layers", "3"]
    )
    assert (recipe.steps, recipe.learning_rate, recipe.regime) == (9, 1e-4, "tpl")
    assert recipe.families["tc"].temperature == 0.1 and recipe.families["tc"].pairs == ["a", "b"]
    assert (recipe.families["ner"].lora.r, recipe.families["ner"].lora.layers) == (8, 3)
    again = load_recipe([write(tmp_path / "again.yaml", json.dumps(asdict(recipe)))])
    assert again == recipe  # what run.json records is itself a recipe


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stepps", "9"], "Unknown argument --stepps; did you mean '--steps'"),
        (
            ["--families.tc.temprature", "1"],
            "--families.tc.temprature; did you mean '--families.tc.temperature'",
        ),
        (
            ["--families.ner.lora.rank", "1"],
            "Unknown argument --families.ner.lora.rank; did you mean '--families.ner.lora.r'",
        ),
        (["--families.qa.batch_size", "1"], "Unknown family 'qa'; known: ner, tc"),
        (["--regime", "both"], "Unknown regime 'both'; choose one of: base, naive, tpl, ner, tc"),
        (["--steps", "many"], "steps is 'many', but must be of type int"),
        (["--steps", "0"], "steps is 0; it must be at least 1"),
        (["--steps"], "Argument --steps: expected one argument"),
        (["--steps.more", "1"], "Unknown argument --steps.more; did you mean '--steps'"),
        (["stray"], "Unrecognized arguments: stray"),
        (["--mixed_precision", "fp8"], "choose auto, bf16, float32"),
        (["--regime", "tpll"], "did you mean 'tpl'"),
        (["--families.nre.batch_size", "1"], "Unknown family 'nre'; did you mean 'ner'"),
        (["--max_grad_norm", "0"], "must be above 0"),
        (["--seed", "-1"], "seed is -1; it must be at least 0"),
        (["--plugins", "no.such.module"], "plugin 'no.such.module' cannot be imported"),
        (["--warmup", "2"], "from 0 to below 1"),
    ],
)
def test_bad_recipes(recipe_file, tmp_path, arguments, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe([recipe_file, *arguments])


def test_bad_recipe_files(tmp_path):
    with pytest.raises(
        RecipeError, match="There is no recipe .*none.yaml; known: laptop, paper_distilbert, paper_minilm"
    ):
        load_recipe([str(tmp_path / "none.yaml")])
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe([write(tmp_path / "a.yaml", "a: [")])
    with pytest.raises(RecipeError, match="must hold keys and values"):
        load_recipe([write(tmp_path / "b.yaml", "- a\n- b")])


def test_values_that_yaml_reads_as_something_else(recipe_file, tmp_path):
    recipe = load_recipe([recipe_file, "--output_dir", "2024", "--mixed_precision", "float32"])
    assert (recipe.output_dir, recipe.mixed_precision) == ("2024", "float32")
    empty = write(tmp_path / "empty.yaml", "families:\n  ner:\n")
    assert load_recipe([empty, "--families.ner.data", "x"]).families["ner"].data == "x"


def test_na_is_a_word(tmp_path):
    source = write(tmp_path / "a.csv", "anchor,positive\nNA,null\n")
    assert open_source(source, PAIRS).to_list() == [{"anchor": "NA", "positive": "null"}]


def test_fingerprint_is_of_the_contents(tmp_path):
    rows = '{"anchor": "x", "positive": "y"}\n'
    prints = []
    for name, content in (("a", rows), ("b", rows), ("c", rows * 2)):
        source = write(tmp_path / f"{name}.jsonl", content)
        prints.append(fingerprint(source, open_source(source, PAIRS)))
    assert prints[0] == prints[1] != prints[2]


def test_help_describes_every_key(capsys):
    with pytest.raises(SystemExit):
        load_recipe(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for key in asdict(Recipe()).keys() - {"families"}:
        assert f"--{key} " in text
    for key in ("tc.temperature FLOAT", "ner.clusters INT", "ner.max_length INT", "ner.lora.r INT"):
        assert f"--families.{key} " in text
    assert "Share of the steps with linear warm-up, before cosine decay to zero. (default: 0.05)" in text
    assert "laptop, paper_distilbert, paper_minilm" in text


def test_a_recipe_is_known_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--families.ner.data", "labels", "--families.tc.pairs", "a", "b"]
    recipe = load_recipe(["laptop", *data])
    assert recipe == load_recipe(["laptop.yaml", *data]) and recipe.families["tc"].source_cap == 100000
    write(tmp_path / "laptop.yaml", "steps: 3\nfamilies: {tc: {pairs: a}}\n")
    assert load_recipe(["laptop.yaml"]).steps == 3  # a file comes first
    with pytest.raises(RecipeError, match="no recipe labtop; did you mean 'laptop'"):
        load_recipe(["labtop"])


def test_without_recipe_the_families_whose_data_is_given_are_trained_with_the_defaults():
    recipe = load_recipe(["--families.ner.data", "labels", "--families.tc.pairs", "my_pairs"])
    default = Recipe()
    assert (recipe.steps, recipe.save_every, recipe.regime) == (default.steps, default.save_every, "tpl")
    assert (recipe.families["ner"].data, recipe.families["tc"].pairs) == ("labels", ["my_pairs"])
    with pytest.raises(RecipeError, match="name a recipe .laptop.* `make pretrain`"):
        load_recipe([])


@pytest.mark.parametrize("demo", ["true", "false"])
def test_the_key_demo_of_older_recipes_is_ignored(recipe_file, tmp_path, caplog, demo):
    old = write(tmp_path / "old.yaml", f"demo: {demo}\nfamilies: {{tc: {{pairs: a}}}}\n")
    assert load_recipe([old]) == load_recipe(["--demo", demo, "--families.tc.pairs", "a"])
    assert ("is ignored" in caplog.text) == (demo == "true")
