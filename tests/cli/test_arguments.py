"""Arguments: the spellings that scripts of users rely on, near keys, lists, and what a light command imports."""

import json
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest

from modeling_mtpf.cli.adapt import AdaptSettings
from modeling_mtpf.cli.benchmark import ReportSettings
from modeling_mtpf.cli.export import ExportSettings
from modeling_mtpf.cli.label import LabelSettings
from modeling_mtpf.cli.main import COMMANDS, main
from modeling_mtpf.cli.predict import PredictSettings
from modeling_mtpf.cli.push import PushSettings
from modeling_mtpf.errors import RecipeError
from modeling_mtpf.evaluation.benchmark import BenchmarkSettings
from modeling_mtpf.pretraining.recipe import load_recipe
from modeling_mtpf.settings import read_settings
from train.pretrain import asks_for_demo

ROOT = Path(__file__).parents[2]

LABEL = "--text t --output_dir o"
ADAPT = "--family ner --data d --output_dir apps/entities"
BENCHMARK = "--regime tpl --output r.json"

OLD_SPELLINGS = [
    (LabelSettings, f"{LABEL} --layer -1,-7 --clusters 50,200", {"layer": "-1,-7", "clusters": "50,200"}),
    (LabelSettings, f"{LABEL} --layer=-1", {"layer": "-1", "clusters": "200"}),
    (LabelSettings, f"{LABEL} --layer 3 --clusters 200", {"layer": "3", "clusters": "200"}),
    (LabelSettings, f"{LABEL} --gold a b --keep_offsets", {"gold": ["a", "b"], "keep_offsets": True}),
    (LabelSettings, f"{LABEL} --normalize false --max_texts 6000", {"normalize": False, "max_texts": 6000}),
    (AdaptSettings, f"{ADAPT} --labels O,B-PER", {"labels": "O,B-PER", "name": "entities"}),
    (AdaptSettings, f"{ADAPT} --progress false --seeds 3", {"progress": False, "seeds": 3}),
    (AdaptSettings, f"{ADAPT} --train_fraction 0.1 --adapter a/b", {"train_fraction": 0.1, "adapter": "a/b"}),
    (AdaptSettings, f"{ADAPT} --adapter null --learning_rate 5e-4", {"adapter": None, "learning_rate": 5e-4}),
    (BenchmarkSettings, f"{BENCHMARK} --seeds 0,1,2 --quick", {"seeds": "0,1,2", "quick": True}),
    (BenchmarkSettings, f"{BENCHMARK} --tasks a,b --normalize false", {"tasks": "a,b", "normalize": False}),
    (BenchmarkSettings, f"{BENCHMARK} --seeds 1 --ner_rows 200", {"seeds": "1", "ner_rows": 200}),
    (ReportSettings, "--report a.json,b.json --output r.md", {"report": "a.json,b.json"}),
    (PredictSettings, "--adapter a --adapter b@1f -", {"adapter": ["a", "b@1f"], "files": ["-"]}),
    (
        ExportSettings,
        "b --adapter x=a --int8 --output o",
        {"adapter": ["x=a"], "int8": True, "backbone": "b"},
    ),
    (ExportSettings, "--int8 packaged --layers 2 --output o", {"backbone": "packaged", "layers": 2}),
    (PushSettings, "adapter --private f o/n", {"private": True, "folder": "f", "language": ["en"]}),
    (PushSettings, "backbone f o/n --language en de --dry_run", {"language": ["en", "de"], "dry_run": True}),
]

NEW_SPELLINGS = [
    (
        LabelSettings,
        f"{LABEL} --clusters 50 200 --keep-offsets",
        {"clusters": "50,200", "keep_offsets": True},
    ),
    (LabelSettings, f"{LABEL} --layer -1 -7", {"layer": "-1,-7"}),
    (LabelSettings, f"{LABEL} --gold a --gold b", {"gold": ["a", "b"]}),
    (AdaptSettings, f"{ADAPT} --labels O B-PER", {"labels": "O,B-PER"}),
    (AdaptSettings, f"{ADAPT} --train-fraction=0.1 --progress=false", {"train_fraction": 0.1}),
    (AdaptSettings, "--family tc --data d --output-dir apps/My_Intents!", {"name": "my_intents"}),
    (BenchmarkSettings, f"{BENCHMARK} --seeds 0 1 2 --tasks a b", {"seeds": "0,1,2", "tasks": "a,b"}),
]


def read(cls, arguments):
    return read_settings(cls, arguments, prog="mtpf x", description="", examples="")


@pytest.mark.parametrize("cls, line, expected", OLD_SPELLINGS + NEW_SPELLINGS)
def test_spellings(cls, line, expected):
    settings = read(cls, line.split())
    assert {name: getattr(settings, name) for name in expected} == expected


RECIPES = [
    "--families.ner.data labels --families.tc.pairs [a,b] --resume auto",
    "--families.ner.data labels --families.tc.pairs a b --resume=auto",
    "--families.ner.data labels --families.tc.pairs a --families.tc.pairs b --resume auto",
    "--families.ner.data=labels --families.tc.pairs a b --resume auto --demo false",
    "--resume auto --families.tc.pairs a b --families.ner.data labels --compile false",
]


@pytest.mark.parametrize("line", RECIPES)
def test_spellings_of_overrides(line):
    recipe = asdict(load_recipe(["laptop", *line.split()]))
    families = recipe["families"]
    assert (families["ner"]["data"], families["tc"]["pairs"], recipe["resume"]) == (
        "labels",
        ["a", "b"],
        "auto",
    )
    assert (families["ner"]["batch_size"], recipe["compile"], recipe["learning_rate"]) == (16, False, 5e-5)


def test_a_recipe_takes_dashes_flags_and_null():
    line = (
        "--families.tc.learn-temperature --gradient-cache --report_to null --families.ner.lora.targets null"
    )
    recipe = load_recipe(["laptop", *line.split()])
    assert recipe.families["tc"].learn_temperature and recipe.gradient_cache and recipe.report_to is None
    assert recipe.families["ner"].lora.targets is None


@pytest.mark.parametrize(
    "cls, line, message",
    [
        (AdaptSettings, "--fmaily ner", "Unknown argument --fmaily; did you mean '--family'"),
        (AdaptSettings, "--family ner", "required: --output_dir"),
        (AdaptSettings, f"{ADAPT} --seeds many", "seeds is 'many', but must be of type int"),
        (AdaptSettings, f"{ADAPT} --seeds 1.5", "seeds is '1.5', but must be of type int"),
        (AdaptSettings, f"{ADAPT} --progress maybe", "Unrecognized arguments: maybe"),
        (LabelSettings, f"{LABEL} --clusters", "--clusters: expected at least one argument"),
        (PredictSettings, "--adaptor a", "did you mean '--adapter'"),
    ],
)
def test_mistakes(cls, line, message):
    with pytest.raises(RecipeError) as error:
        read(cls, line.split())
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line, demo",
    [
        ("", True),
        ("--steps 2 --families.ner.max_texts 300", True),
        (str(ROOT / "train" / "demo" / "recipe.yaml"), True),
        ("laptop", False),
        ("--families.ner.data labels", False),
        ("--families.tc.pairs=a", False),
        ("--demo false --regime tc", False),
        ("--help", False),
    ],
)
def test_which_arguments_are_the_demo(line, demo):
    assert asks_for_demo(line.split()) == demo


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_examples(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: mtpf {command} ") and out.count(f"mtpf {command} ") >= 3


HEAVY = "torch transformers huggingface_hub datasets sklearn numpy peft accelerate yaml"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["predict", "--help"], ["push", "--help"], None]
)
def test_a_light_start(arguments):
    run = f"from modeling_mtpf.cli.main import main; assert main({arguments}) == 0" if arguments else ""
    code = f"import sys, json, modeling_mtpf\n{run}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not set(HEAVY.split()) & set(json.loads(done.stdout.splitlines()[-1]))


def test_output_that_is_not_utf8(tmp_path):
    code = (
        "from modeling_mtpf.cli.main import exit_status; import sys\n"
        "print(exit_status(lambda: 'loss 4 → 2'))\n"
        "from modeling_mtpf.errors import MtpfError\n"
        "def fail(): raise MtpfError('é →')\n"
        "sys.exit(exit_status(fail))"
    )
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "loss 4 \\u2192 2\n0\n",
        "error: \\xe9 \\u2192\n",
    )


@pytest.mark.slow
def test_the_wheel_has_recipes_cards_and_tasks_but_no_scripts(tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--quiet",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"modeling_mtpf/recipes/{file.name}" for file in (ROOT / "train" / "recipes").glob("*.yaml")}
    data = {"modeling_mtpf/py.typed", "modeling_mtpf/evaluation/tasks.json", "hub_cards/backbone.md"}
    assert recipes and recipes | data | {"hub_cards/adapter.md", "modeling_mtpf/cli/main.py"} <= names
    assert {name.split("/")[0] for name in names} == {"modeling_mtpf", "hub_cards", "mtpf-0.1.0.dist-info"}
