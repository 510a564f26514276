"""Metrics, protocols, records and reports of the benchmark."""

import json
import multiprocessing
import os
import random

import numpy as np
import pytest
from datasets import Dataset
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

import modeling_mtpf.evaluation.benchmark as bench
from eval import benchmark as script
from modeling_mtpf.adaptation import FitSettings
from modeling_mtpf.data.words import load_word_tokenizer
from modeling_mtpf.errors import DataError, RecipeError
from modeling_mtpf.evaluation.few_shot import few_shot, few_shot_rows
from modeling_mtpf.evaluation.metric_classes import EntityF1, TextScores
from modeling_mtpf.evaluation.records import add_record
from modeling_mtpf.evaluation.report import published_table, report
from modeling_mtpf.evaluation.statistics import mean_interval, paired_bootstrap
from modeling_mtpf.evaluation.tasks import all_tasks, load_task, select_tasks
from modeling_mtpf.evaluation.vector_cache import StoredVectors
from modeling_mtpf.metrics import entity_scores, span_scores, text_scores

# Metrics


def test_strict_entity_scores():
    """Both traps of seqeval: lenient by default, and strict without a scheme."""
    gold = [["B-PER", "I-PER", "O", "B-LOC"]]
    assert entity_scores(gold, gold)["entity_f1"] == 1.0
    assert entity_scores(gold, [["B-PER", "O", "O", "B-LOC"]])["entity_f1"] == 0.5  # a border is wrong
    wrong = entity_scores(gold, [["I-PER", "I-PER", "O", "B-LOC"]])  # not an entity at all
    assert wrong["entity_f1"] == pytest.approx(2 / 3)
    assert wrong["types"]["PER"] == {"f1": 0, "precision": 0, "recall": 0, "support": 1}
    assert wrong["types"]["LOC"]["f1"] == 1.0
    assert entity_scores(gold, [["O"] * 4])["entity_f1"] == 0.0
    assert entity_scores([["O"]], [["O"]])["entity_f1"] == 0.0


def test_entity_scores_equal_counting_spans():
    """Against a direct count of equal spans, on random IOB2 tags."""
    generator = random.Random(0)

    def spans(tags):
        entities, start, kind = set(), None, None
        for i, tag in enumerate([*tags, "O"]):
            if start is not None and tag != f"I-{kind}":
                entities.add((start, i, kind))
                start = None
            if tag.startswith("B-"):
                start, kind = i, tag[2:]
        return entities

    tags = ["O", "B-P", "I-P", "B-Q", "I-Q"]
    rows = [generator.choices(tags, k=9) for _ in range(398)] + [generator.choices(tags, k=999) for _ in "ab"]
    gold, predicted = rows[0::2], rows[1::2]
    right = sum(len(spans(a) & spans(b)) for a, b in zip(gold, predicted, strict=True))
    total = sum(len(spans(row)) for row in rows)
    assert entity_scores(gold, predicted)["entity_f1"] == pytest.approx(2 * right / total)


def test_an_entity_across_the_cut_of_a_long_sentence_stays_whole():
    gold = ["O"] * 99 + ["B-P", "I-P", "I-P"] + ["O"] * 100
    predicted = ["O"] * 99 + ["B-P", "O", "O"] + ["O"] * 100
    assert entity_scores([gold], [predicted])["entity_f1"] == 0.0
    assert entity_scores([gold], [gold])["recall"] == 1.0


def test_spans_are_scored_as_seqeval_scores_their_tags():
    generator = random.Random(1)
    gold, predicted = ([], [])
    for rows in (gold, predicted):
        for _ in range(200):
            borders = sorted(generator.sample(range(8), generator.choice([0, 2, 4])))
            pairs = zip(borders[::2], borders[1::2], strict=True)
            rows.append([(start, end, generator.choice("PQ")) for start, end in pairs])
    right = sum(len({*a} & {*b}) for a, b in zip(gold, predicted, strict=True))
    scores = span_scores(gold, predicted)
    assert scores["recall"] == pytest.approx(right / sum(map(len, gold))) and right > 1
    assert scores["precision"] == pytest.approx(right / sum(map(len, predicted)))


def test_a_prediction_for_other_words_is_refused():
    with pytest.raises(DataError, match="Sentence 1 has 1 words but 2"):
        entity_scores([["O"]], [["O", "O"]])
    with pytest.raises(DataError, match="1 sentences but 0"):
        entity_scores([["O"]], [])


def test_text_scores():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    gold = ["a", "b", "b", "new"]
    scores = text_scores(gold, ["a", "b", "a", "b"], probabilities, ["a", "b"])
    assert scores["accuracy"] == 0.5
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 0.5 + 0) / 3)
    a = average_precision_score([1, 0, 0, 0], probabilities[:, 0])
    b = average_precision_score([0, 1, 1, 0], probabilities[:, 1])
    assert scores["average_precision"] == pytest.approx((a + b + 0.25) / 3)  # chance for the unknown label


def test_metric_classes_compute_without_network(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("network"))
    gold = [["B-PER", "I-PER"], ["O"]]
    assert EntityF1().compute(references=gold, predictions=[["B-PER", "O"], ["O"]])["entity_f1"] == 0.0
    metric = EntityF1()
    metric.add_batch(references=gold, predictions=gold)
    assert metric.compute()["entity_f1"] == 1.0
    scores = TextScores(["a", "b"]).compute(references=["b", "a"], predictions=[[0.1, 0.9], [0.2, 0.8]])
    assert scores["accuracy"] == 0.5


# Protocols


def mteb_draws(labels, samples, draws):
    """MTEB's procedure, written out: one list, shuffled repeatedly, the generator seeded before each draw."""
    chosen, order = [], list(range(len(labels)))
    for _ in range(draws):
        np.random.seed(42)
        np.random.shuffle(order)
        counter, rows = {}, []
        for row in order:
            if counter.get(labels[row], 0) < samples:
                rows.append(row)
                counter[labels[row]] = counter.get(labels[row], 0) + 1
        chosen.append(rows)
    return chosen


def test_few_shot_draws_are_mtebs():
    labels = [f"label {i % 7}" for i in range(300)] + ["rare"] * 3
    chosen = few_shot_rows(labels, 8)
    assert [rows.tolist() for rows in chosen] == mteb_draws(labels, 8, 10)
    assert all(sum(labels[i] == "rare" for i in rows) == 3 and len(rows) == 59 for rows in chosen)
    assert chosen[0].tolist() != chosen[1].tolist()


def test_few_shot_scores_are_those_of_a_plain_loop():
    generator = np.random.default_rng(0)
    labels = [f"{i % 5}" for i in range(200)]
    vectors = generator.normal(size=(200, 8)) + np.array([int(label) for label in labels])[:, None] / 2
    draws = few_shot(lambda rows: vectors[rows], labels, vectors[100:], labels[100:], 8)
    for rows, draw in zip(mteb_draws(labels, 8, 10), draws, strict=True):
        probe = LogisticRegression(max_iter=100).fit(vectors[rows], [labels[i] for i in rows])
        assert draw["accuracy"] == probe.score(vectors[100:], labels[100:])


def test_vectors_are_computed_once_and_only_where_needed(tmp_path):
    texts, calls = [f"text {i}" for i in range(50)], []

    def embed(part):
        calls.append(len(part))
        return np.array([[float(text.split()[1]), 1.0] for text in part], dtype=np.float32)

    identity = {"backbone": "abc", "adapter": None}
    first = StoredVectors(tmp_path, identity, texts, 2, embed)
    assert first.rows(np.array([7, 3, 7]))[:, 0].tolist() == [7, 3, 7] and calls == [2]
    again = StoredVectors(tmp_path, identity, texts, 2, embed)  # another process, later
    assert again.rows()[:, 0].tolist() == list(range(50)) and calls == [2, 48]
    again.rows()
    StoredVectors(None, identity, texts, 2, embed).rows(np.array([1]))
    StoredVectors(tmp_path, {**identity, "adapter": "def"}, texts, 2, embed).rows(np.array([1]))
    StoredVectors(tmp_path, identity, texts[::-1], 2, embed).rows(np.array([1]))
    assert calls == [2, 48, 1, 1, 1]


# Tasks


def test_the_task_list_is_complete_and_names_its_sources():
    tasks = all_tasks()
    assert len(tasks) == 44 == len({task.key for task in tasks})
    assert all(task.source and task.licence and task.family in ("ner", "tc") for task in tasks)
    assert all(len(task.hub["revision"]) == 40 for task in tasks if task.hub)
    assert sum(bool(task.published) for task in tasks) == 9
    assert [task.key for task in select_tasks("snips", {"ner", "tc"})] == ["ner/snips", "tc/snips"]
    assert [task.key for task in select_tasks("tc/snips,btc", {"ner", "tc"})] == ["tc/snips", "ner/btc"]
    with pytest.raises(RecipeError, match="did you mean 'banking77'"):
        select_tasks("bankin77", {"tc"})
    with pytest.raises(RecipeError, match="ner/btc needs a protocol of its family"):
        select_tasks("btc", {"tc"})
    with pytest.raises(DataError, match="set MTPF_DATA to the folder"):
        load_task(select_tasks("btc", {"ner"})[0], "/nowhere")


@pytest.mark.data
def test_every_task_has_its_data():
    from pathlib import Path

    for task in all_tasks():
        folder = Path(os.environ["MTPF_DATA"]) / task.family / task.name
        assert all((folder / f"{split}.parquet").is_file() for split in ("train", "validation", "test"))


# Runs


def run(arguments: list[str]) -> int:
    """Run the script with the last value of each key: it joins those of a repeated ``--tasks``."""
    values: dict[str, list[str]] = {}
    for argument in arguments:
        if argument.startswith("--"):
            key = argument
            values[key] = []
        else:
            values[key].append(argument)
    return script.main([part for key, rest in values.items() for part in (key, *rest)])


@pytest.fixture
def data_folder(tmp_path):
    """A little data for one task of each family."""
    words = {"PER": ["Ada", "Noor", "Grace"], "LOC": ["London", "Rome", "Paris"]}
    for split, size in (("train", 40), ("validation", 12), ("test", 12)):
        rows = [(words["PER"][i % 3], words["LOC"][i % 2]) for i in range(size)]
        ner = [{"tokens": [a, "in", b], "ner_tags": ["B-PER", "O", "B-LOC"]} for a, b in rows]
        tc = [{"text": f"{a} {b} {i}", "label": b} for i, (a, b) in enumerate(rows)]
        for family, name, rows in (("ner", "btc", ner), ("tc", "sst2", tc), ("ner", "fin", ner)):
            folder = tmp_path / "data" / family / name
            folder.mkdir(parents=True, exist_ok=True)
            Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    return tmp_path / "data"


@pytest.fixture
def arguments(data_folder, encoders, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "available_cores", lambda: 1)  # models are tiny: threads would only wait
    return [
        "--backbone", str(encoders["bert"]), "--tasks", "btc,sst2", "--seeds", "0,1", "--workers", "1",
        "--data", str(data_folder), "--output", str(tmp_path / "out" / "r.json"), "--max_length", "32",
        "--cache_dir", str(tmp_path / "cache"), "--quick",
    ]  # fmt: skip


def test_records_are_complete_and_never_recomputed(arguments, tmp_path, monkeypatch, capsys):
    assert run([*arguments, "--regime", "base", "--protocols", "ner10,mteb"]) == 0
    path = tmp_path / "out" / "r.json"
    records = json.loads(path.read_text())
    names = [(r["task"], r["protocol"], r["seed"]) for r in records]
    assert sorted(names) == [(t, p, s) for t, p in (("btc", "ner10"), ("sst2", "mteb")) for s in (0, 1)]
    for record in records:
        assert {"regime", "metric", "value", "n_train", "n_test", "config", "versions", "date"} <= set(record)
        assert record["n_test"] == 12 and 0 <= record["value"] <= 1
        assert str(tmp_path) not in json.dumps(record)  # no local path
    assert {r["n_train"] for r in records if r["protocol"] == "ner10"} == {4}
    few = [r for r in records if r["protocol"] == "mteb" and r["seed"] == 0][0]
    assert np.mean(few["config"]["draws"]) == pytest.approx(few["value"], abs=1e-6)

    def explode(*a, **k):
        raise AssertionError("computed again")

    monkeypatch.setattr(bench.Bench, "_mteb", explode)
    monkeypatch.setattr(bench.Bench, "_ner", explode)
    monkeypatch.setattr(bench.StoredVectors, "PART", 1)
    before = path.read_bytes()
    assert run([*arguments, "--regime", "base", "--protocols", "ner10,mteb"]) == 0
    assert path.read_bytes() == before
    monkeypatch.setattr(bench, "embed_texts", explode)  # its vectors are on disk
    only = ["--tasks", "sst2", "--regime", "base", "--protocols", "mteb,full"]
    assert run([*arguments, *only]) == 0
    assert len(json.loads(path.read_text())) == 5 and "1 new records, 5 in" in capsys.readouterr().out


def test_an_interrupted_run_keeps_its_records(arguments, tmp_path, monkeypatch):
    real, calls = bench.Bench._ner, []

    def second_breaks(self, *rest):
        calls.append(rest)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *rest)

    monkeypatch.setattr(bench.Bench, "_ner", second_breaks)
    command = [*arguments, "--tasks", "btc", "--regime", "base", "--protocols", "ner"]
    assert run(command) == 130
    first = json.loads((tmp_path / "out" / "r.json").read_text())
    assert len(first) == 1
    assert run(command) == 0
    records = json.loads((tmp_path / "out" / "r.json").read_text())
    assert len(records) == 2 and first[0] in records and len(calls) == 3


@pytest.mark.slow
def test_two_workers_write_the_same_values(arguments, tmp_path):
    assert run([*arguments, "--regime", "base", "--protocols", "mteb,full,ner"]) == 0
    other = [*arguments, "--output", str(tmp_path / "two.json"), "--cache_dir", str(tmp_path / "cache2")]
    other[other.index("--workers") + 1] = "2"
    assert run([*other, "--regime", "base", "--protocols", "mteb,full,ner"]) == 0
    one, two = (json.loads(p.read_text()) for p in (tmp_path / "out" / "r.json", tmp_path / "two.json"))
    assert [r["value"] for r in one] == pytest.approx([r["value"] for r in two], abs=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        (["--backbone", "distilbert"], "another backbone.sha256"),
        (["--max_length", "16"], "another max_length: 32, not 16"),
        (["--normalize", "false"], "another normalize: True, not False"),
        (["--mixed_precision", "bf16"], "another precision: float32, not bf16"),
        (["--quick", "false"], "another quick"),
    ],
)
def test_a_finished_run_with_other_settings_is_refused(finished, encoders, capsys, change, message):
    """Nothing is left to compute, and yet the old records must not pass as the new setting's."""
    arguments, path = finished
    before = path.read_bytes()
    other = [str(encoders.get(part, part)) for part in change]
    assert run([*arguments, *other]) == 2
    error = capsys.readouterr().err
    assert message in error and "choose another --output or --regime" in error
    assert path.read_bytes() == before
    assert run(["--report", str(path), "--output", "r.md"]) == 2
    assert "smoke run" in capsys.readouterr().err


@pytest.fixture
def finished(arguments, tmp_path):
    """Arguments of a finished run, and its records."""
    chosen = ["--tasks", "sst2", "--regime", "base", "--protocols", "mteb", "--seeds", "0"]
    arguments = [*arguments, *chosen, "--mixed_precision", "float32"]
    assert run(arguments) == 0
    return arguments, tmp_path / "out" / "r.json"


def test_records_on_other_data_are_refused(finished, data_folder, capsys):
    arguments, _ = finished
    Dataset.from_list([{"text": "Ada Rome", "label": "Rome"}] * 3).to_parquet(
        data_folder / "tc" / "sst2" / "test.parquet"
    )
    assert run([*arguments, "--protocols", "full"]) == 2
    assert "records of tc/sst2 on other data (fingerprint" in capsys.readouterr().err


def test_the_settings_of_ner_fits_must_be_the_same(arguments, monkeypatch, capsys):
    command = [*arguments, "--tasks", "btc", "--regime", "base", "--protocols", "ner", "--seeds", "0"]
    assert run(command) == 0
    changed = FitSettings(steps=20, evaluations=1, patience=5, size="tpl").for_family("ner")
    monkeypatch.setattr(bench.Bench, "_fit_settings", lambda self, seed: changed)
    assert run(command) == 2 and "another settings.patience: 4, not 5" in capsys.readouterr().err


def test_two_runs_may_share_a_file(finished, monkeypatch):
    """The other run finishes a record while this one computes."""
    arguments, path = finished
    theirs = {**json.loads(path.read_text())[0], "regime": "theirs"}
    real = bench.Bench._full

    def meanwhile(self, *rest):
        add_record(path, theirs)
        return real(self, *rest)

    monkeypatch.setattr(bench.Bench, "_full", meanwhile)
    assert run([*arguments, "--protocols", "full"]) == 0
    keys = [(r["regime"], r["protocol"]) for r in json.loads(path.read_text())]
    assert sorted(keys) == [("base", "full"), ("base", "mteb"), ("theirs", "mteb")]


def _in_processes(work) -> list[int]:
    """Run ``work(number)`` in two processes that begin together; their exit codes."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(number,)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_two_processes_add_records_to_one_file(tmp_path):
    def work(number):
        for seed in range(15):
            add_record(tmp_path / "r.json", record(f"regime {number}", "fin", seed, 0.5))

    assert _in_processes(work) == [0, 0]
    assert len(json.loads((tmp_path / "r.json").read_text())) == 30


def test_two_processes_share_vectors(tmp_path):
    """Both want the same new files at the same time."""
    barrier = multiprocessing.get_context("fork").Barrier(2)
    expected = np.arange(1, 3000, dtype=np.float32)[:, None].repeat(8, axis=1)

    def work(number):
        for trial in range(15):
            barrier.wait(30)
            texts = [f"{row}" for row in range(1, 3000)]
            embed = lambda part: np.array([[float(text)] * 8 for text in part], dtype=np.float32)  # noqa: E731
            vectors = StoredVectors(tmp_path, {"trial": trial}, texts, 8, embed)
            np.testing.assert_array_equal(vectors.rows(), expected)

    assert _in_processes(work) == [0, 0]
    assert len(list(tmp_path.iterdir())) == 30  # vectors and identities, and nothing temporary


def test_missing_data_shows_before_anything_is_computed(arguments, data_folder, monkeypatch, capsys):
    (data_folder / "ner" / "fin" / "test.parquet").unlink()
    monkeypatch.setattr(bench, "Bench", lambda settings: pytest.fail("a backbone was loaded"))
    assert run([*arguments, "--tasks", "sst2,btc,fin", "--regime", "base"]) == 2
    assert "fin has no file of the split test" in capsys.readouterr().err


@pytest.mark.slow
def test_other_units_that_run_are_saved_when_one_fails(arguments, data_folder, tmp_path, capsys):
    bad = [{"tokens": ["Ada"], "ner_tags": ["PER"]}] * 4
    Dataset.from_list(bad).to_parquet(data_folder / "ner" / "fin" / "test.parquet")
    command = [*arguments, "--tasks", "fin,sst2,btc", "--regime", "base", "--protocols", "mteb,ner"]
    assert run([*command, "--workers", "2", "--seeds", "0"]) == 2
    assert "'PER' is not of a known scheme" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "r.json").read_text())[0]["task"] in ("sst2", "btc")


def test_a_smoke_run_draws_its_rows(arguments, data_folder):
    """A set that is sorted by label: its first rows have one label alone."""
    for split in ("train", "validation", "test"):
        rows = [{"text": f"text {i}", "label": f"{i // 250}"} for i in range(500)]
        Dataset.from_list(rows).to_parquet(data_folder / "tc" / "sst2" / f"{split}.parquet")
    command = [*arguments, "--tasks", "sst2", "--regime", "base", "--protocols", "mteb,full"]
    assert run([*command, "--seeds", "0"]) == 0


def test_limits_are_applied_recorded_and_the_same_when_a_run_resumes(arguments, tmp_path, capsys):
    command = [*arguments, "--quick", "false", "--tasks", "btc", "--regime", "base", "--seeds", "0"]
    limits = ["--ner_rows", "20", "--ner_steps", "10", "--test_rows", "10"]
    assert run([*command, *limits, "--protocols", "ner"]) == 0
    assert run([*command, *limits, "--protocols", "ner,ner10"]) == 0  # resumes
    records = json.loads((tmp_path / "out" / "r.json").read_text())
    sizes = {r["protocol"]: (r["n_train"], r["n_test"], r["config"]["fit"]["steps"]) for r in records}
    assert sizes == {"ner": (20, 10, 10), "ner10": (2, 10, 10)}
    for name, value in (("ner_rows", "30"), ("ner_steps", "11"), ("test_rows", "11")):
        assert run([*command, *limits, f"--{name}", value, "--protocols", "ner"]) == 2
        assert f"another {name.replace('ner_steps', 'settings.steps')}" in capsys.readouterr().err


def test_each_seed_may_have_its_own_backbone(finished, encoders, capsys):
    arguments, path = finished
    other = [*arguments, "--backbone", str(encoders["distilbert"]), "--backbone_per_seed", "true"]
    assert run([*other, "--seeds", "1"]) == 0
    hashes = {r["seed"]: r["config"]["backbone"]["sha256"] for r in json.loads(path.read_text())}
    assert hashes[0] != hashes[1]
    assert run([*other, "--seeds", "0"]) == 2 and "another backbone.sha256" in capsys.readouterr().err


def test_hashes_cover_everything_that_decides_a_value(load, encoders, tmp_path):
    folder = load("bert", {"ner": None}).save_adapter(tmp_path / "ner", "ner")
    before = bench.adapter_sha256(str(folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1}))
    assert bench.adapter_sha256(str(folder)) != before and bench.adapter_sha256(None) is None
    tokenizer = load_word_tokenizer(str(encoders["bert"]))
    digest = bench.tokenizer_sha256(tokenizer)
    tokenizer(["Ada"], truncation=True, max_length=4, padding=True)
    assert bench.tokenizer_sha256(tokenizer) == digest
    tokenizer.add_tokens(["zebra"])
    assert bench.tokenizer_sha256(tokenizer) != digest


@pytest.mark.parametrize(
    "more, message",
    [
        (["--protocols", "mtbe"], "did you mean 'mteb'"),
        (["--tasks", "nothing"], "Unknown task 'nothing'"),
        (["--seeds", "a"], "numbers separated by commas"),
        (["--seeds", "-1"], "a seed is at least 0"),
        (["--workers", "-1"], "workers must be at least 0"),
        (["--mixed_precision", "fp8"], "choose one of: auto, bf16, float32"),
        (["--ner_rows", "9"], "ner_rows is 9; it must be at least 10"),
        (["--adapter", "x"], "did you mean '--adapter_"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, capsys, more, message):
    assert run([*arguments, "--regime", "base", *more]) == 2
    assert message in capsys.readouterr().err
    assert run(["--output", "x.json"]) == 2 and "required: --regime" in capsys.readouterr().err


# Reports


def record(regime, task, seed, value, protocol="ner"):
    config = {"quick": False, "draws": [value]}
    return {
        "regime": regime, "task": task, "seed": seed, "value": value, "protocol": protocol, "family": "ner",
        "metric": "entity_f1", "n_train": 1, "n_test": 1, "config": config,
    }  # fmt: skip


def test_intervals_and_paired_bootstrap():
    values = [70.0, 72.0, 77.0]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    interval = mean_interval(values)
    assert (interval.low, interval.high) == pytest.approx((low, high))
    assert str(mean_interval([70.0])) == "70.00"  # one seed says nothing of the spread
    gains = np.random.default_rng(0).normal(2, 1, 25)
    bound = paired_bootstrap(gains)
    assert bound.mean == pytest.approx(gains.mean()) and 0 < bound.low < bound.mean < bound.high
    assert bound.high - bound.low == pytest.approx(2 * 1.96 * stats.sem(gains), rel=0.2)


def test_a_report_pairs_by_task_and_seed(tmp_path, capsys):
    records = [
        record(regime, task, seed, base + gain + seed / 100)
        for regime, gain in (("tpl", 0.05), ("base", 0.0))
        for task, base in (("fin", 0.5), ("btc", 0.6), ("snips", 0.9))
        for seed in (0, 1)
    ]
    records.append(record("tpl", "fin", 2, 0.99))  # base has no such seed: it must not count
    files = []
    for regime in ("base", "tpl"):
        files.append(str(tmp_path / f"{regime}.json"))
        of_regime = [r for r in records if r["regime"] == regime]
        (tmp_path / f"{regime}.json").write_text(json.dumps(of_regime))
    assert run(["--report", ",".join(files), "--output", str(tmp_path / "report.md")]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| ner | `base` | `tpl` |" in text and "| btc | 60.50 ± 6.35 | 65.50 ± 6.35 |" in text
    assert "| against `base` | – | +5.00 [" in text
    assert "| average of 3 | **67.17** |" in text
    assert (
        "| ner (ner; 3 tasks) | **67.17** | **72.17** |" in text
        and "| ner against `base` | – | +5.00 [" in text
    )
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert report(records[:6]).count("against") == 0  # no baseline, no comparison


def test_published_values_are_compared_with_ours():
    records = [{**record("m", "banking77", 0, 0.80, "mteb"), "family": "tc"}]
    text = published_table(records, "all-MiniLM-L6-v2")
    assert "| banking77 | 80.00 | 79.75 | +0.25 | 0.00 |" in text and "| emotion | – | 38.43 |" in text
    assert "mean absolute difference of 1 |  |  | 0.25" in text
    with pytest.raises(RecipeError, match="Nothing is published for 'nonsense'.*known: all-MiniLM-L6-v2"):
        published_table(records, "nonsense")
    with pytest.raises(DataError, match="of one regime are needed; there are those of m, other"):
        published_table([*records, {**records[0], "regime": "other"}], "all-MiniLM-L6-v2")
    with pytest.raises(DataError, match="there are none"):
        published_table([record("m", "fin", 0, 0.5)], "all-MiniLM-L6-v2")
    with pytest.raises(DataError, match="smoke run"):
        published_table([{**records[0], "config": {"quick": True}}], "all-MiniLM-L6-v2")


def test_records_that_contradict_each_other_are_refused():
    one = record("m", "fin", 0, 0.5)
    assert "50.00" in report([one, dict(one)])  # the same record in two files
    with pytest.raises(DataError, match="different records of regime 'm', ner/fin, ner, seed 0"):
        report([one, record("m", "fin", 0, 0.6)])
    other = {**record("n", "fin", 0, 0.6), "config": {"data": "b"}}
    with pytest.raises(DataError, match="ner/fin were made on different data"):
        report([{**one, "config": {"data": "a"}}, other])


def test_a_report_of_few_or_partial_records():
    """Two tasks give no interval; a regime of one family leaves the averages of the other alone."""
    records = [record(r, t, 0, v) for r, v in (("base", 0.5), ("tpl", 0.6)) for t in ("fin", "btc")]
    records += [{**record("base", t, 0, 0.8, "full"), "family": "tc"} for t in ("sst2", "snips")]
    records += [{**record("tc", t, 0, 0.9, "full"), "family": "tc"} for t in ("sst2", "imdb")]
    text = report(records)
    assert "nan" not in text and "| ner against `base` | – | +10.00 [–] | – |" in text
    assert "| ner (ner; 2 tasks) | **50.00** | **60.00** | – |" in text
    assert "| tc (full; 1 tasks) | **80.00** | – | **90.00** |" in text
    assert "| average of 1 | **80.00** | – | **90.00** |" in text  # sst2, which both have
    many = [
        record(r, f"task {i}", 0, v + i / 100) for r, v in (("base", 0.5), ("tpl", 0.6)) for i in range(6)
    ]
    assert "nan" not in report(many)  # all differences are equal
