"""The study: verdicts and tables from records, the report against an independent look at the committed ones."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from datasets import Dataset

from eval.study import commands
from eval.study import run as script
from eval.study.commands import Command, run_commands
from eval.study.contrasts import contrast, sign_flip_test
from eval.study.pictures import draw_pictures
from eval.study.plan import Job, needed_stages, plan_name, read_jobs, read_plan, save_plan
from eval.study.records import Study, add_run, read_runs, read_study
from eval.study.tables import CLAIMS, average_table, claim_table, fill, layer_order
from modeling_mtpf.errors import DataError, MtpfError, RecipeError
from modeling_mtpf.evaluation.records import locked

ROOT = Path(__file__).parents[2]
GAINS = {"base": 0.0, "ner": 0.02, "tc": -0.01, "naive": 0.0, "tpl": 0.02}


def record(variant: str, task: str, protocol: str, seed: int, value: float) -> dict:
    family = "ner" if protocol.startswith("ner") else "tc"
    return {
        "regime": variant, "seed": seed, "task": task, "family": family, "protocol": protocol,
        "metric": "x", "value": value, "n_train": 1, "n_test": 1, "config": {},
    }  # fmt: skip


def made_up_records(gains=GAINS, seeds: int = 3, noise: float = 0.002, shift: float = 0.0) -> list[dict]:
    """Regimes that differ by ``gains`` in NER, `ner` and `tc` the other way round in TC, with noise.

    ``shift`` is added to all values of seed 1, 2, ... once, twice, ...
    """
    rng = np.random.default_rng(0)
    records = []
    for protocol, sign in (("ner", 1), ("mteb", -1)):
        for task in (f"task{number}" for number in range(8)):
            level = rng.uniform(0.4, 0.8)
            for seed in range(seeds):
                for regime, gain in gains.items():
                    gain = sign * gain if regime in ("ner", "tc") else gain
                    value = level + gain + rng.normal(0, noise) + shift * seed
                    records.append(record(f"neutral/{regime}", task, protocol, seed, value))
    return records


def made_up_run(seed: int = 0) -> dict:
    return {
        "variant": "neutral/tpl", "seed": seed, "regime": "tpl", "seconds": 10.0,
        "recipe": {"seed": seed, "steps": 2, "families": {"ner": {}, "tc": {"batch_size": 4}}},
        "data": {"ner": {"words_seen": 7}}, "moved": {"backbone": 0.01},
        "sizes": {"backbone": 10_000_000, "adapters/ner": 1_000_000}, "steps": [1, 2],
        "curves": {"loss/ner": [2.0, 1.0], "loss/tc": [1.0, 0.5]},
        "diagnostics": {"gradient_cosine/layer_0": [0.1, 0.3], "gradient_cosine/all": [0.0],
                        "tail_cka/layer_5": [0.9]},
    }  # fmt: skip


HELD = ["held"] * 6
"""`GAINS`: each family's regime gains and the other's loses, naive is behind, tpl level with the better one."""


@pytest.mark.parametrize(
    "records, expected",
    [
        (dict(), HELD),
        (dict(seeds=2), ["undecided: 2 of 3 seeds"] * 6),
        # each family's regime loses and the other's gains, so tpl is behind the better one
        (dict(gains=GAINS | {"ner": -0.03, "tc": 0.03}), ["not held"] * 4 + ["held", "held"]),
        # tpl loses a little to base, and to naive
        (dict(gains=GAINS | {"tpl": -0.01}), HELD[:3] + ["not held"] * 3),
        (dict(gains=GAINS | {"tpl": 0.002}, noise=0.05), None),
    ],
)
def test_verdicts_follow_the_differences_that_were_put_in(records, expected):
    table = claim_table(Study(made_up_records(**records), [made_up_run()], {}))
    verdicts = re.findall(r"^\| (.+?) \| neutral \| \*\*(.+?)\*\*", table, re.MULTILINE)
    assert [text for text, _ in verdicts] == [claim.text for claim in CLAIMS]
    words = [word for _, word in verdicts]
    assert words[6:] == ["not tested"] * 2  # no records of a tenth of the data, nor of other layers
    if expected is None:
        assert "undecided" in words or "not held" in words
    else:
        assert words[:6] == expected


def test_a_contrast_pairs_tasks_and_seeds():
    """A large common shift of the seeds cancels only where the same seeds are subtracted."""
    records = made_up_records(shift=0.1)
    result = contrast(Study(records, [], {}).cells, "ner", "neutral/tpl", "neutral/base")
    values = {(r["regime"], r["task"], r["seed"]): r["value"] for r in records if r["protocol"] == "ner"}
    expected = mean(
        100 * (value - values["neutral/base", task, seed])
        for (regime, task, seed), value in values.items()
        if regime == "neutral/tpl"
    )
    assert result.over_tasks.mean == pytest.approx(expected) == pytest.approx(result.over_seeds.mean)
    assert result.over_seeds.high - result.over_seeds.low < 1
    assert (result.wins, result.tasks, result.sign, result.seeds) == (8, 8, 1, (0, 1, 2))
    assert result.p_value == pytest.approx(2 / 2**8)
    fewer = [r for r in records if (r["regime"], r["seed"]) != ("neutral/tpl", 1)]
    fewer = [r for r in fewer if (r["regime"], r["task"]) != ("neutral/base", "task3")]
    again = contrast(Study(fewer, [], {}).cells, "ner", "neutral/tpl", "neutral/base")
    assert (again.tasks, again.seeds) == (7, (0, 2))
    assert np.isnan(sign_flip_test([1.0, 2.0]))


def test_averages_are_over_what_all_regimes_have():
    records = made_up_records()
    common = [r for r in records if r["task"] != "task0" and r["seed"] != 2]
    partly = [r for r in records if r["regime"] != "neutral/naive" or r in common]
    row = next(line for line in average_table(Study(partly, [], {})).splitlines() if "NER" in line)
    values = [100 * r["value"] for r in common if (r["regime"], r["protocol"]) == ("neutral/base", "ner")]
    assert row.startswith(f"| neutral | NER, strict F1 | 7 | 2 | {mean(values):.2f} ±")


def test_variants_measured_with_other_settings_are_refused():
    records = made_up_records()
    records[3]["config"] = {"settings": {"steps": 7}}
    with pytest.raises(DataError, match="settings.steps = 7 for 'neutral/naive', but None"):
        _ = Study(records, [], {}).cells


def test_runs_of_one_variant_and_seed_replace_each_other(tmp_path):
    file = tmp_path / "runs.json"
    for seed, seconds in ((1, 1.0), (0, 2.0), (1, 3.0)):
        run = made_up_run(seed) | {"seconds": seconds}
        add_run(file, run.pop("variant"), {key: value for key, value in run.items() if key != "seed"})
    assert [(run["seed"], run["seconds"]) for run in read_runs(file)] == [(0, 2.0), (1, 3.0)]


@pytest.mark.slow
def test_a_document_is_filled_in_place_and_only_there(tmp_path):
    study = Study(made_up_records(), [made_up_run()], {"sources": {"pairs": "all"}, "tasks": {}})
    text = "Before.\n\n<!-- table: cpu cost -->old<!-- end -->\n\nAfter.\n"
    filled = fill(text, {"cpu": study})
    assert filled.startswith("Before.\n\n<!-- table: cpu cost -->\n\n| variant |") and filled.endswith(
        "After.\n"
    )
    assert fill(filled, {"cpu": study}) == filled
    inline = "<!-- points: cpu ner neutral/tpl neutral/base --><!-- end -->, <!-- verdict: cpu neutral 5 --><!-- end -->"
    assert re.fullmatch(
        r"<!.*?>\+[12]\.\d\d \[\+.*\]<!-- end -->, <!.*?>\*\*held\*\*<!-- end -->",
        fill(inline, {"cpu": study}),
    )
    for wrong in (
        "table: cpu costs",
        "table: gpu cost",
        "points: cpu ner a/b c/d",
        "verdict: cpu neutral 99",
    ):
        with pytest.raises(DataError, match=f"mark '{wrong}'"):
            fill(f"<!-- {wrong} --><!-- end -->", {"cpu": study})
    pictures = draw_pictures(study, tmp_path, "cpu")
    assert len(pictures) == 4
    before = [picture.read_bytes() for picture in pictures]
    assert [picture.read_bytes() for picture in draw_pictures(study, tmp_path, "cpu")] == before


@pytest.mark.parametrize("name", script.PLANS)
def test_the_plan_names_what_each_run_needs(tmp_path, name):
    plan = read_plan(script.PLANS[name], tmp_path, "DATA")
    assert plan["name"] == name
    planned = {(job.variant, job.seed): job for job in read_jobs(plan)}
    tpl, ner = planned["neutral/tpl", 0], planned["neutral/ner", 1]
    assert set(tpl.recipe["families"]) == {"ner", "tc"} and set(ner.recipe["families"]) == {"ner"}
    assert tpl.recipe["families"]["ner"] == ner.recipe["families"]["ner"]
    assert (tpl.adapters, ner.adapters) == ({"ner": "ner", "tc": "tc"}, {})
    assert planned["neutral/base", 0].recipe["families"] == {} and not planned["neutral/base", 0].trains
    assert {task.split("/")[0] for task in planned["neutral/ner-last", 0].tasks} == {"ner"}
    assert len(tpl.tasks) == 24
    swapped = planned["neutral/tpl-swapped", 2]
    assert swapped.folder(tmp_path) == planned["neutral/tpl", 2].folder(tmp_path)
    assert swapped.recipe == planned["neutral/tpl", 2].recipe
    stages = plan["stages"]
    pairs = ["pairs"] if "pairs" in stages else []
    assert needed_stages(stages, ner.recipe, tmp_path) == ["teacher", "labels_tuned", "neutral"]
    assert needed_stages(stages, tpl.recipe, tmp_path) == ["teacher", "labels_tuned", *pairs, "neutral"]
    assert needed_stages(stages, planned["neutral/ner-last", 0].recipe, tmp_path) == [
        "neutral",
        "labels_last",
    ]
    assert needed_stages(stages, planned["packaged/tc", 0].recipe, tmp_path) == pairs
    workplace = script.Workplace(tmp_path, "DATA", 1, stages, [])
    needs = {stage: workplace.stage(stage).needs for stage in stages}
    assert {stage: names for stage, names in needs.items() if names} == {"labels_tuned": ["teacher"]}
    assert "{work}" not in json.dumps(plan) and "{data}" not in json.dumps(plan)
    with pytest.raises(RecipeError, match="space"):
        read_plan(script.PLANS[name], tmp_path / "a b", "DATA")


def test_a_run_of_another_plan_is_refused(tmp_path):
    recipe = {"regime": "tc", "steps": 5, "families": {"tc": {"batch_size": 4, "pairs": ["/here/pairs"]}}}
    job = Job("a/tc", 0, recipe, {}, "a/tc")
    assert not job.is_trained(tmp_path)
    recorded = {"steps": 5, "regime": "tc", "threads": 1, "output_dir": "x"}
    recorded["families"] = {"tc": {"batch_size": 4, "pairs": ["/there/pairs"], "max_length": 64}}
    file = job.folder(tmp_path) / "run.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"recipe": recorded}))
    assert job.is_trained(tmp_path)
    recorded["families"]["tc"]["batch_size"] = 8
    file.write_text(json.dumps({"recipe": recorded}))
    with pytest.raises(RecipeError, match="families.tc.batch_size = 8, the plan has 4"):
        job.is_trained(tmp_path)


def test_layers_are_sorted_from_bottom_to_top():
    names = ["all", "layer_10", "layer_2", "embeddings"]
    assert sorted(names, key=layer_order) == ["embeddings", "layer_2", "layer_10", "all"]


def test_commands_run_in_the_order_of_the_list_after_what_they_need(tmp_path):
    file = tmp_path / "order"

    def command(name: str, *needs: str, **options) -> Command:
        return Command(name, ["-c", f"open({str(file)!r}, 'a').write('{name} ')"], needs, **options)

    after = []
    done = command("done", is_done=lambda: True, after=lambda: after.append("done"))
    chain = [command("train", "labels"), command("measure", "train", "done"), command("labels"), done]
    run_commands([*chain, command("last")], 1, tmp_path / "logs", {})
    assert file.read_text() == "labels train measure last " and after == ["done"]


def test_a_failure_takes_only_what_depends_on_it(tmp_path, capsys):
    def refuse() -> bool:
        raise RecipeError("made with other settings")

    chain = [
        Command("labels", ["-c", "raise SystemExit(3)"]),
        Command("train", ["-c", f"open({str(tmp_path / 'begun')!r}, 'w')"], ["labels"]),
        Command("refused", ["-c", ""], is_done=refuse),
        Command("unreadable", ["-c", ""], after=refuse),
        Command("counted", ["-c", f"open({str(tmp_path / 'begun')!r}, 'w')"], ["unreadable"]),
        Command("other", ["-c", f"open({str(tmp_path / 'other')!r}, 'w')"]),
    ]
    with pytest.raises(
        MtpfError, match=r"3 of 6 commands failed, the first: labels ended with status 3; see .*labels\.log"
    ):
        run_commands(chain, 1, tmp_path / "logs", {})
    assert (tmp_path / "other").exists() and not (tmp_path / "begun").exists()
    errors = capsys.readouterr().err
    assert "error: made with other settings" in errors
    assert "error: unreadable: made with other settings" in errors


@pytest.fixture
def all_cores():
    """All cores of the machine, though the tests are pinned to some."""
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("no cores to choose here")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the system leaves those that are allowed
    yield os.sched_getaffinity(0)
    os.sched_setaffinity(0, before)


def test_a_command_has_its_own_cores(tmp_path, all_cores):
    if len(all_cores) < 2:
        pytest.skip("one core is the same as all")
    show = ["-c", "import os; print(*os.sched_getaffinity(0), os.environ['OMP_NUM_THREADS'])"]
    run_commands([Command("one", show), Command("all", show, all_cores=True)], len(all_cores), tmp_path, {})
    one, every = ((tmp_path / f"{name}.log").read_text().split() for name in ("one", "all"))
    assert one == [str(min(all_cores)), "1"] and every == [*map(str, sorted(all_cores)), str(len(all_cores))]
    assert os.sched_getaffinity(0) == all_cores


@pytest.mark.parametrize("deaf", [False, True])
def test_a_stop_ends_what_runs_and_starts_nothing_more(tmp_path, monkeypatch, deaf):
    monkeypatch.setattr(commands, "GRACE_SECONDS", 0.5 if deaf else 30.0)
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " if deaf else ""
    long = f"import os, signal, time; {ignore}print(os.getpid(), flush=True); time.sleep(60)"
    chain = [
        Command("long", ["-c", long]),
        Command("next", ["-c", f"open({str(tmp_path / 'begun')!r}, 'w')"]),
    ]

    def interrupt() -> None:
        end = time.monotonic() + 30
        while not ((tmp_path / "long.log").exists() and (tmp_path / "long.log").read_text()):
            assert time.monotonic() < end
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the script does
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            run_commands(chain, 1, tmp_path, {})
    finally:
        signal.signal(signal.SIGTERM, before)
        thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "long.log").read_text()), 0)
    assert not (tmp_path / "begun").exists()


def test_a_stage_comes_with_the_first_job_that_needs_it_and_may_have_all_cores(tmp_path):
    pairs = "pairs: {done: '{work}/pairs', needed_by: tc, cores: all, command: -c pass}"
    (tmp_path / "plan.yaml").write_text(TINY.replace("stages:", f"stages:\n  {pairs}"))
    plan = read_plan(tmp_path / "plan.yaml", tmp_path, "DATA")
    workplace = script.Workplace(tmp_path, "DATA", 1, plan["stages"], read_jobs(plan))
    assert [(command.name, command.needs) for command in workplace.commands(workplace.jobs)] == [
        ("tiny-base-0-benchmark", []),
        ("pairs", []),
        ("labels", []),
        ("tiny-tpl-0", ["pairs", "labels"]),
        ("tiny-tpl-0-benchmark", ["tiny-tpl-0"]),
        ("tiny-tpl-swapped-0-benchmark", ["tiny-tpl-0"]),  # measures the run of tpl
    ]
    assert [c.name for c in workplace.commands(workplace.jobs) if c.all_cores] == ["pairs"]


def test_a_folder_belongs_to_one_plan(tmp_path):
    plan, work = tmp_path / "plan.yaml", tmp_path / "work"
    work.mkdir()
    with pytest.raises(RecipeError, match="not the folder of a study"):
        plan_name(work)
    plan.write_text(TINY)
    save_plan(plan, work)
    assert plan_name(work) == "tiny"
    plan.write_text(TINY.replace("*8)", "*9)"))
    save_plan(plan, work)  # nothing of that stage is there yet
    (work / "labels.jsonl").touch()
    plan.write_text(TINY.replace("*8)", "*10)").replace("seeds: [0]", "seeds: [0, 1]"))
    with pytest.raises(RecipeError, match="'labels' .* made with another command"):
        save_plan(plan, work)
    plan.write_text(TINY.replace("*8)", "*9)").replace("seeds: [0]", "seeds: [0, 1]"))
    save_plan(plan, work)
    plan.write_text(TINY.replace("name: tiny", "name: cpu"))
    with pytest.raises(RecipeError, match="of the plan 'tiny', not 'cpu'"):
        save_plan(plan, work)
    plan.write_text(TINY.replace("name: tiny\n", ""))
    with pytest.raises(RecipeError, match="no key 'name'"):
        read_plan(plan, work, "DATA")


def test_a_second_run_in_one_folder_is_refused(tmp_path, capsys):
    plan, work = tmp_path / "plan.yaml", tmp_path / "work"
    plan.write_text(TINY)
    with locked(work / "run"):
        assert script.main(["run", "--plan", str(plan), "--work", str(work), "--data", str(tmp_path)]) == 2
    assert "Another run is at work" in capsys.readouterr().err and not (work / "logs").exists()


def test_a_folder_without_records_is_refused(tmp_path, capsys):
    work, plan = tmp_path / "work", tmp_path / "plan.yaml"
    plan.write_text(TINY.replace("name: tiny", "name: cpu"))
    arguments = ["--work", str(work), "--data", str(tmp_path), "--plan", str(plan)]
    assert script.main(["rerun", *arguments]) == 2 and "has no records" in capsys.readouterr().err
    assert (
        script.main(["report", "--work", str(work)]) == 2 and "has no study.json" in capsys.readouterr().err
    )


def test_a_report_takes_the_records_of_a_folder_under_its_plans_name(tmp_path, monkeypatch, capsys):
    work, results = tmp_path / "work", tmp_path / "results"
    for folder in (work, results, tmp_path / "docs" / "study"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(script, "RESULTS", results)
    monkeypatch.setattr(script, "DOCS", tmp_path / "docs")
    (tmp_path / "docs" / "study.md").write_text("<!-- table: cpu averages --><!-- end -->")
    (tmp_path / "docs" / "study" / "appendix.md").write_text("<!-- table: gpu averages --><!-- end -->")
    (work / script.RECORDS).write_text(json.dumps(made_up_records()))
    (work / script.RUNS).write_text(json.dumps([made_up_run()]))
    assert script.main(["report", "--work", str(work)]) == 2 and "no plan.yaml" in capsys.readouterr().err
    (work / "plan.yaml").write_text(TINY)
    assert script.main(["report", "--work", str(work)]) == 2 and "'tiny'" in capsys.readouterr().err
    assert not any(results.iterdir())
    (work / "plan.yaml").write_text(TINY.replace("name: tiny", "name: gpu"))
    assert script.main(["report", "--work", str(work)]) == 0
    assert sorted(file.name for file in results.iterdir()) == ["study-gpu-runs.json", "study-gpu.json"]
    cpu, gpu = ((tmp_path / "docs" / name).read_text() for name in script.DOCUMENTS)
    assert "| neutral |" in gpu and "| neutral |" not in cpu
    drawn = {picture.name for picture in (tmp_path / "docs" / "study").glob("*.svg")}
    names = ("summary", "tasks-neutral", "gradients-neutral", "curves-neutral")
    assert drawn == {f"gpu-{name}.svg" for name in names}


TINY = """
name: tiny
stages:
  labels:
    done: "{work}/labels.jsonl"
    command: -c open('{work}/labels.jsonl','w').write('{"words":["Ada","came"],"clusters":[0,1]}\\n'*8)
starts: {tiny: TINY_ENCODER}
recipe:
  steps: 2
  families:
    ner: {data: "{work}/labels.jsonl", batch_size: 4, max_length: 16}
    tc: {pairs: ["{data}/pairs.jsonl"], batch_size: 4, max_length: 16}
benchmark: {protocols: "ner,mteb", quick: "true", tasks: [ner/btc, tc/sst2]}
seeds: [0]
variants:
  tiny/base: {start: tiny, regime: base}
  tiny/tpl: {start: tiny, regime: tpl}
  tiny/tpl-swapped: {start: tiny, regime: tpl, of: tiny/tpl, after: 1, adapters: {ner: tc, tc: ner}}
"""


@pytest.mark.hub
@pytest.mark.slow
def test_a_small_study_runs_once_and_is_published(encoders, hub, tmp_path, monkeypatch, capsys):
    data, work = tmp_path / "data", tmp_path / "work"
    for split in ("train", "validation", "test"):
        for family, rows in (
            ("ner/btc", [{"tokens": ["Ada", "came"], "ner_tags": ["B-PER", "O"]}] * 12),
            ("tc/sst2", [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(24)]),
        ):
            (data / family).mkdir(parents=True, exist_ok=True)
            Dataset.from_list(rows).to_parquet(data / family / f"{split}.parquet")
    pairs = [json.dumps({"anchor": f"a {i}", "positive": f"b {i}"}) for i in range(12)]
    (data / "pairs.jsonl").write_text("\n".join(pairs))
    plan = tmp_path / "plan.yaml"
    plan.write_text(TINY.replace("TINY_ENCODER", str(encoders["bert"])))
    where = ["--work", str(work), "--data", str(data), "--plan", str(plan)]
    command = ["run", *where]
    assert script.main(command) == 0, capsys.readouterr().err
    records = json.loads((work / script.RECORDS).read_text())
    adapters = {(r["regime"], r["family"]): r["config"]["adapter"]["name"] for r in records}
    assert adapters == {
        ("tiny/base", "ner"): None, ("tiny/base", "tc"): None,
        ("tiny/tpl", "ner"): "ner", ("tiny/tpl", "tc"): "tc",
        ("tiny/tpl-swapped", "ner"): "tc", ("tiny/tpl-swapped", "tc"): "ner",
    }  # fmt: skip
    hashes = {r["regime"]: r["config"]["backbone"]["sha256"] for r in records}
    assert hashes["tiny/base"] != hashes["tiny/tpl"] == hashes["tiny/tpl-swapped"]
    assert [(run["variant"], run["seed"]) for run in read_runs(work / script.RUNS)] == [("tiny/tpl", 0)]
    assert str(tmp_path) not in (work / script.RUNS).read_text() + (work / script.RECORDS).read_text()
    before = (work / script.RECORDS).read_bytes()
    assert script.main(["rerun", *where, "--count", "1"]) == 0
    assert "+0.000000" in capsys.readouterr().out
    assert script.main(["release", *where, "mtpf/tiny", "--variant", "tiny/tpl"]) == 0
    folders = [Path(line.split(": ")[1]) for line in capsys.readouterr().out.splitlines()]
    cards = [(folder / "README.md").read_text("utf-8") for folder in folders]
    assert len(cards) == 3 and "| sst2 | accuracy |" in cards[0]
    assert all("`mtpf/tiny` at commit" in card for card in cards[1:])
    assert script.main(["release", *where, "mtpf/tiny", "--variant", "tiny/base"]) == 2
    assert "is not a finished run" in capsys.readouterr().err
    monkeypatch.setattr(commands.subprocess, "Popen", lambda *a, **k: pytest.fail("done before"))
    assert script.main(command) == 0
    assert (work / script.RECORDS).read_bytes() == before
    assert (
        script.main([*command, "--only", "tinny/"]) == 2 and "there are: tiny/base" in capsys.readouterr().err
    )


# ------------------------------------------------------------------------------------ the committed records


@pytest.fixture(scope="module")
def committed() -> tuple[dict[str, str], dict[str, Study]]:
    studies = {name: read_study(*script.committed(name)) for name in script.PLANS}
    return {name: (script.DOCS / name).read_text("utf-8") for name in script.DOCUMENTS}, studies


@pytest.mark.parametrize("name, start", [("cpu", "neutral"), ("gpu", "neutral"), ("gpu", "packaged")])
@pytest.mark.parametrize("family, protocol", [("NER", "ner"), ("TC", "mteb")])
def test_averages_of_the_report_computed_otherwise(committed, name, start, family, protocol):
    documents, studies = committed
    table = (
        documents["study/appendix.md"].split(f"<!-- table: {name} averages -->")[1].split("<!-- end -->")[0]
    )
    assert name == "cpu" or table in documents["study.md"]
    cells = re.search(rf"^\| {start} \| {family}[^|]*\| (.+) \|$", table, re.MULTILINE)[1].split(" | ")
    tasks, seeds, *averages = cells
    assert tasks == "12"
    for regime, cell in zip(("base", "ner", "tc", "naive", "tpl"), averages, strict=True):
        values = [
            100 * record["value"]
            for record in studies[name].records
            if record["protocol"] == protocol
            and record["regime"] == f"{start}/{regime}"
            and record["seed"] < int(seeds)
        ]
        assert len(values) == 12 * int(seeds)
        assert float(cell.split(" ± ")[0]) == pytest.approx(mean(values), abs=0.00501)


def test_differences_on_the_page_computed_otherwise(committed):
    documents, studies = committed
    marks = re.findall(r"<!-- points: (\w+) (\w+) (\S+) (\S+) -->([-+.\d]+) \[", documents["study.md"])
    assert len(marks) > 15
    for name, protocol, *variants, points in marks:
        values: dict = {variant: {} for variant in variants}
        for record in studies[name].records:
            if record["protocol"] == protocol and record["regime"] in values:
                values[record["regime"]][record["task"], record["seed"]] = 100 * record["value"]
        first, second = (values[variant] for variant in variants)
        assert first.keys() & second.keys()
        difference = mean(first[key] - second[key] for key in first.keys() & second.keys())
        assert float(points) == pytest.approx(difference, abs=0.00501)


@pytest.mark.slow
def test_the_report_is_made_from_the_committed_records(committed):
    documents, studies = committed
    for document in documents.values():
        assert fill(document, studies) == document
    shown = re.findall(r"\(([^()]+\.svg)\)", documents["study/appendix.md"])
    shown += [path.removeprefix("study/") for path in re.findall(r"\(([^()]+\.svg)\)", documents["study.md"])]
    assert {picture.name for picture in (script.DOCS / "study").glob("*.svg")} == {*shown}
    links = re.findall(r"\(study/appendix\.md#([\w-]+)\)", documents["study.md"])
    heads = re.findall(r"^#+ (.+)$", documents["study/appendix.md"], re.MULTILINE)
    assert {*links} <= {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
