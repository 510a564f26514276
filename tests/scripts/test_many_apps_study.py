"""The study of one adapter for many apps: a small run on made-up data, resumed, and the report from records."""

import numpy as np
import pytest
import yaml
from datasets import Dataset
from scipy import stats

from eval import many_apps as script
from eval.many_apps_report import PAGE, TABLES, draw
from eval.studies import fill
from modeling_mtpf.adaptation.bundle.registry import BUNDLE_METHODS
from modeling_mtpf.adaptation.bundle.rivals import RIVALS
from modeling_mtpf.data.backbones import open_backbone
from modeling_mtpf.evaluation.records import read_records

PLAN = {
    "seeds": [0],
    "rows": {"train": 20, "validation": 5, "test": 6},
    "steps": 2,
    "settings": {"evaluations": 1, "size": "tpl", "learning_rate": 0.01},
    "groups": {"two": {"rank": 4, "apps": ["ner/snips", "tc/snips"]}},
    "methods": {
        "apps": {"budget": "all"},
        "apps-one": {"budget": "one"},
        "shared": {"method": "shared", "budget": "one", "conflict": True},
        "poly": {"method": "poly", "budget": "one"},
        "full": {"encoder": True, "learning_rate": 0.001},
    },
}


@pytest.fixture
def data(tmp_path):
    """Write two sets of made-up messages."""
    names = [f"{a}{b}" for a in "bcdfg" for b in ("an", "el", "io", "ur", "ym", "ost", "ax")]
    for split, some in (("train", names[:25]), ("validation", names[25:30]), ("test", names[30:])):
        texts = [f"call {x} now" if len(x) % 2 else f"play {x}" for x in some]
        tags = [["O", "B-person", "O"][: len(text.split())] for text in texts]
        tables = {
            "ner/snips": {"tokens": [text.split() for text in texts], "ner_tags": tags},
            "tc/snips": {"text": texts, "label": [text.split()[0] for text in texts]},
        }
        for key, table in tables.items():
            (tmp_path / "data" / key).mkdir(parents=True, exist_ok=True)
            Dataset.from_dict(table).to_parquet(tmp_path / "data" / key / f"{split}.parquet")
    return tmp_path / "data"


@pytest.mark.slow
def test_a_small_study_resumes(data, tmp_path, folders, capsys):
    plan, output = tmp_path / "plan.yaml", tmp_path / "records.json"
    plan.write_text(yaml.safe_dump(PLAN, sort_keys=False))
    options = ["run", "--plan", plan, "--records", output, "--data", data, "--groups", "two"]
    options += ["--backbone", f"tiny={folders / 'backbone'}", "--threads", "1"]

    def run(*more) -> tuple[int, str]:
        status = script.main([str(option) for option in (*options, *more)])
        return status, capsys.readouterr().err

    assert run("--only", "shared")[0] == 0
    first = output.read_text()
    assert run()[0] == 0
    assert all(line.strip(",") in output.read_text() for line in first.splitlines())
    found = {(r["regime"].rpartition("/")[2], r["family"]): r for r in read_records(output)}
    assert set(found) == {(method, family) for method in PLAN["methods"] for family in ("ner", "tc")}
    costs = {method: found[method, "ner"]["config"]["cost"] for method in PLAN["methods"]}
    assert {method: cost["tails"] for method, cost in costs.items()} == {
        **dict.fromkeys(("apps", "apps-one", "poly"), 2),
        **dict.fromkeys(("shared", "full"), 1),
    }
    assert abs(costs["apps-one"]["bytes"] / costs["shared"]["bytes"] - 1) < 0.3  # a tiny encoder: names weigh
    assert costs["apps"]["trained_parameters"] == 2 * costs["shared"]["trained_parameters"]
    assert costs["apps-one"]["trained_parameters"] == costs["shared"]["trained_parameters"]
    cosines = found["shared", "ner"]["config"]["cosines"]
    assert set(cosines) == {"itself", "tc-snips"} and all(-1.001 <= v <= 1.001 for v in cosines.values())
    assert str(tmp_path) not in output.read_text()
    before = output.stat().st_mtime_ns
    assert run()[0] == 0 and output.stat().st_mtime_ns == before
    plan.write_text(yaml.safe_dump({**PLAN, "steps": 3}, sort_keys=False))
    assert "has records of tiny/two/apps with other steps: 2, not 3" in run()[1]
    assert run("--only", "x")[1] == (
        "error: --only: the plan has no 'x'; it has: apps, apps-one, shared, poly, full.\n"
    )


def test_budgets_give_the_ranks_that_store_or_train_as_much(folders):
    """Of the committed plan: the numbers are counted from modules that are built."""
    plan = yaml.safe_load(script.PLAN.read_text("utf-8"))
    opened = open_backbone(str(folders / "backbone"))
    for group, (rank, count) in {"eight": (32, 8), "twenty": (40, 20)}.items():
        unit = script.Unit(plan, "tiny", opened, group, 0, None)
        unit.__dict__["rows"] = dict.fromkeys(plan["groups"][group]["apps"])
        assert len(unit.rows) == count == len(set(unit.rows)) and plan["groups"][group]["rank"] == rank
        ranks = {
            name: unit.rank(spec)
            for name, spec in plan["methods"].items()
            if "encoder" not in spec and spec.get("method") in (None, *BUNDLE_METHODS)
        }
        assert (
            ranks["apps"] == ranks["shared"] == rank and ranks["apps-one"] == ranks["poly"] == rank // count
        )
        assert 4 * ranks["apps-quarter"] == rank and ranks["shared-quarter"] == rank * count // 4
        for name, method in ((f"{method}-trained", method) for method in RIVALS if method != "multilora"):
            shapes = [(32, 32), (32, 32), (64, 32), (32, 64)]  # query, key and MLP of the tiny encoder

            def trained(r, shapes=shapes, method=method, count=count) -> int:
                made = [RIVALS[method](*shape, r, count) for shape in shapes]
                return sum(p.numel() for lora in made for p in lora.parameters())

            most = rank * sum(map(sum, shapes))
            assert trained(ranks[name]) <= most < trained(ranks[name] + 1)


def record(method: str, task: str, family: str, seed: int, value: float, mb: float, tails: int) -> dict:
    cost = {
        "bytes": 1e6 * mb,
        "tails": tails,
        "trained_parameters": 3e5,
        "cpu_seconds": 1.0,
        "cpu_ms_a_text": 2,
    }
    cosines = {"itself": 0.9, "ner-b" if family == "tc" else "tc-a": -0.1}
    return {
        "regime": f"packaged/eight/{method}",
        "seed": seed,
        "task": task,
        "family": family,
        "protocol": family,
        "metric": "accuracy",
        "value": value,
        "n_train": 10,
        "n_test": 10,
        "config": {"cost": cost, "rank": 4, **({"cosines": cosines} if method == "shared" else {})},
    }


def test_tables_of_made_up_records(tmp_path):
    values = {"apps": (0.7, 0.72), "apps-one": (0.5, 0.54), "shared": (0.6, 0.61), "poly": (0.4, 0.4)}
    stored = {"apps": (8, 2), "apps-one": (1, 2), "shared": (1, 1), "poly": (1, 2)}
    records = [
        record(method, task, family, seed, value + shift, *stored[method])
        for method, of_seed in values.items()
        for seed, value in enumerate(of_seed)
        for task, family, shift in (("a", "tc", 0.0), ("b", "ner", 0.1))
    ]
    text = "".join(f"<!-- many apps: {name} --><!-- end -->\n" for name in TABLES)
    filled = fill(text, "many apps", TABLES, records)
    assert fill(filled, "many apps", TABLES, records) == filled
    half = stats.t.ppf(0.975, 1) * np.std([55, 59], ddof=1) / 2**0.5
    assert f"| packaged/eight | `apps-one` | 57.00 ± {half:.2f} | 62.00 ± {half:.2f} | 52.00 ± " in filled
    assert "| packaged/eight | one tail in the bytes of `apps-one` | `shared` | +8.50 [" in filled
    assert "| packaged/eight | any in a quarter of the bytes of `apps` | `shared` | -10.50 [" in filled
    assert "| packaged/eight | `shared` | +0.900 | – | – | -0.100 | 100 % |" in filled
    draw(records, tmp_path / "picture.svg")
    assert "poly" in (tmp_path / "picture.svg").read_text()


def test_the_page_is_made_from_the_committed_records():
    records, page = read_records(script.RECORDS), (script.ROOT / "docs" / PAGE).read_text("utf-8")
    names = [line.split()[3] for line in page.splitlines() if line.startswith("<!-- many apps: ")]
    assert set(names) == set(TABLES)
    if records:
        assert fill(page, "many apps", TABLES, records) == page
