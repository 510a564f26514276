"""The scripts, from arguments to folders: every regime, users' mistakes, plugins, several processes."""

import copy
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_mtpf import MtpfModel
from modeling_mtpf.data.words import load_word_tokenizer
from modeling_mtpf.pretraining.chunks import ChunkShape, plan_chunks
from modeling_mtpf.pretraining.families.base import RunContext
from modeling_mtpf.pretraining.families.tc import TcFamily, TcSettings
from modeling_mtpf.pretraining.joint import JointModel
from train import pretrain, pseudo_label

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path) -> Path:
    """Twenty texts and two pair sources."""
    folder = tmp_path / "data"
    (folder / "pairs").mkdir(parents=True)
    names = ["Ada", "Noor", "Charles", "Grace", "Alan"]
    places = ["London", "Paris", "Rome", "Oslo"]
    pairs = [(f"{name} is in {place}", f"where is {name}? {place}") for name in names for place in places]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": a}) for a, _ in pairs))
    for source, rows in (("facts", pairs), ("turned", [(b, a) for a, b in pairs])):
        lines = [json.dumps({"anchor": a, "positive": b}) for a, b in rows]
        (folder / "pairs" / f"{source}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def arguments(data, encoders, tmp_path):
    """Command-line arguments of a run of three steps on a small encoder."""

    def build(output="run", **overrides) -> list[str]:
        recipe = {
            "backbone": str(encoders["bert"]),
            "steps": 3,
            "threads": 1,
            "log_every": 2,
            "diagnostics_every": 3,
            "learning_rate": 1e-3,
            "output_dir": str(tmp_path / output),
            "mixed_precision": "float32",
            "families": {
                "ner": {
                    "text": str(data / "text.jsonl"),
                    "teacher": str(encoders["bert"]),
                    "clusters": 4,
                    "batch_size": 4,
                    "max_length": 32,
                },
                "tc": {"pairs": [str(data / "pairs")], "batch_size": 4, "max_length": 32},
            },
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(recipe))
        flat = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
        return [str(file), *flat]

    return build


@pytest.mark.parametrize("regime", ["base", "ner", "tc", "naive", "tpl"])
def test_every_regime_leaves_its_folders(arguments, tmp_path, encoders, regime):
    assert pretrain.main(arguments(regime=regime)) == 0
    run = tmp_path / "run"
    record = json.loads((run / "run.json").read_text())
    families = {"base": [], "ner": ["ner"], "tc": ["tc"]}.get(regime, ["ner", "tc"])
    assert record["regime"] == regime and list(record["data"]) == families
    assert record["versions"]["torch"] == version("torch") and record["recipe"]["warmup"] == 0.05
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == ([2, 3] if families else [])
    for family in families:
        assert record["last"][f"loss/{family}"] == lines[-1][f"loss/{family}"]
    assert ("gradient_cosine/all" in record["last"]) == (len(families) == 2)
    adapters = run / "adapters"
    assert sorted(p.name for p in adapters.glob("*")) == (["ner", "tc"] if regime == "tpl" else [])
    assert (run / "backbone" / "README.md").read_text().startswith("---\n")

    model = MtpfModel.from_pretrained(run / "backbone")
    assert model.config.regime == regime
    trained = load_file(run / "backbone" / "model.safetensors")
    start = load_file(encoders["bert"] / "model.safetensors")
    changed = any(not torch.equal(trained[key], value) for key, value in start.items())
    assert changed == (regime != "base") and (record["moved"]["backbone"] > 0) == changed
    for folder in adapters.glob("*"):
        assert model.load_adapter(folder) == folder.name
        assert json.loads((folder / "task.json").read_text())["family"] == folder.name
        assert (
            "344" not in (folder / "README.md").read_text()
            and "rank 32" in (folder / "README.md").read_text()
        )
        lora_b = [p for n, p in model.named_parameters() if f"lora_B.{folder.name}." in n]
        assert all(parameter.any() for parameter in lora_b)  # moved from zero


@pytest.mark.slow
def test_same_seed_same_weights_and_accumulation_counts_steps(arguments, tmp_path):
    for output in ("one", "two"):
        assert pretrain.main(arguments(output_dir=tmp_path / output, gradient_accumulation_steps=2)) == 0
    one, two = (load_file(tmp_path / output / "backbone" / "model.safetensors") for output in ("one", "two"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    lines = (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3]
    assert pretrain.main(arguments(output_dir=tmp_path / "three", seed=1, gradient_accumulation_steps=2)) == 0
    three = load_file(tmp_path / "three" / "backbone" / "model.safetensors")
    assert any(not torch.equal(value, three[key]) for key, value in one.items())


def test_accumulated_gradients_are_the_mean_of_different_parts(arguments, monkeypatch):
    """The gradient that reaches the optimiser, against two plain backward passes, without dropout."""
    seen = {}

    def keep(accelerator, parameters, max_norm):
        seen["found"] = [None if p.grad is None else p.grad.clone() for p in parameters]
        return torch.ones(())

    class Kept(JointModel):
        def __init__(self, model, families, *more):
            super().__init__(model, families, *more)
            for module in self.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            seen.update(joint=self, families=families, start=copy.deepcopy(self.state_dict()))

    monkeypatch.setattr("accelerate.Accelerator.clip_grad_norm_", keep)
    monkeypatch.setattr("modeling_mtpf.pretraining.run.JointModel", Kept)
    assert pretrain.main(arguments(steps=1, gradient_accumulation_steps=2, diagnostics_every=0)) == 0
    joint = seen["joint"].train()
    joint.load_state_dict(seen["start"])
    joint.zero_grad()
    for part in range(2):
        batches = {family.name: family.batch(part) for family in seen["families"]}
        (joint(plan_chunks(batches, ChunkShape(max_length=32), 0)).loss / 2).backward()
    expected = [p.grad for p in joint.parameters()]
    assert sum(g is not None for g in expected) > 40
    for found, wanted in zip(seen["found"], expected, strict=True):
        assert (found is None) == (wanted is None)
        if wanted is not None:
            assert (found - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6


def test_a_batch_of_pairs_has_no_text_twice_and_ranks_share_it(encoders, tmp_path):
    words = "ada noor london monday train gate late concert tickets buy remind tomorrow".split()
    rows = [
        {"anchor": words[i % 12], "positive": f"{words[i % 9]} {words[i % 7]} {words[i % 11]}"}
        for i in range(40)
    ]
    rows += rows  # every pair twice
    rows += [{"anchor": "  ", "positive": "x"}, {"anchor": "y", "positive": ""}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    family = TcFamily("tc", TcSettings(pairs=[str(tmp_path / "pairs.jsonl")], batch_size=6, max_length=32))
    tokenizer = load_word_tokenizer(str(encoders["bert"]))
    family.prepare(RunContext(tokenizer, seed=0, work_dir=tmp_path))
    assert family.describe()["pairs"]["empty_left_out"] == 2
    for step in range(20):
        ids = [row.tolist() for row in family.batch(step).rows]
        assert len(set(map(tuple, ids))) == len(ids) == 12
        halves = [family.batch(step, rank, 2).rows for rank in range(2)]
        assert sorted(row.tolist() for half in halves for row in half) == sorted(ids)
        anchors = [list(half[:3]) for half in halves]
        assert sorted(row.tolist() for half in anchors for row in half) == sorted(ids[:6])


def test_a_missing_extra_ends_in_one_sentence():
    code = "import sys; sys.modules['accelerate'] = None; from train.pretrain import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().endswith("install it with: pip install 'mtpf[train]'")


def test_labels_made_by_the_script_are_trained_on(arguments, data, encoders, tmp_path, capsys):
    labels = tmp_path / "labels"
    text = ["--text", str(data / "text.jsonl"), "--teacher", str(encoders["bert"]), "--layer", "2"]
    assert pseudo_label.main([*text, "--clusters", "5", "--output_dir", str(labels)]) == 0
    assert "in 5 clusters" in capsys.readouterr().out
    assert pretrain.main(arguments(**{"families.ner.data": labels, "regime": "ner"})) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["ner"]["clusters"] <= 5


PLUGIN = """
import numpy as np
import torch
from torch import nn
from modeling_mtpf.pretraining.families.base import Family, FamilyBatch, Objective, register_family


class ToyObjective(Objective):
    def __init__(self, hidden_size):
        super().__init__()
        self.head = nn.Linear(hidden_size, 1)

    def forward(self, hidden_states, attention_mask, labels):
        return self.head(hidden_states.float()[:, 0])

    def loss(self, rows, targets):
        return rows.pow(2).mean(), {"toy_accuracy": torch.zeros(())}


@register_family("toy")
class ToyFamily(Family):
    def prepare(self, context):
        self.tokenizer = context.tokenizer

    def batch(self, step, rank=0, world_size=1):
        return FamilyBatch([np.array(row) for row in self.tokenizer(["a b c"] * 4)["input_ids"]])

    def objective(self, hidden_size):
        return ToyObjective(hidden_size)
"""


@pytest.mark.slow
def test_a_third_family_comes_from_a_plugin(arguments, tmp_path):
    from modeling_mtpf.pretraining.families.base import FAMILY_CLASSES

    (tmp_path / "toy_family.py").write_text(PLUGIN)
    try:
        extra = {"plugins": str(tmp_path / "toy_family.py"), "families.toy.batch_size": 4}
        assert pretrain.main(arguments(**extra)) == 0
    finally:
        FAMILY_CLASSES.pop("toy", None)
    assert (tmp_path / "run" / "adapters" / "toy" / "adapter_model.safetensors").is_file()


MISTAKES = {
    "unknown key": ({"stepps": 3}, "Unknown argument --stepps; did you mean '--steps'?"),
    "unknown family": ({"families.qa.batch_size": 3}, "Unknown family 'qa'; known: ner, tc"),
    "unknown regime": ({"regime": "both"}, "Unknown regime 'both'; choose one of"),
    "too many layers": ({"families.ner.lora.layers": 9}, "lora.layers is 9, but this encoder has 4 layers"),
    "no such data": ({"families.tc.pairs": "./none.jsonl"}, "no file or folder"),
    "labels absent": ({"families.ner.data": "{data}/text.jsonl"}, "has no column 'words'; it has: text"),
    "malformed": ({"families.tc.pairs": "{data}/bad.jsonl"}, "bad.jsonl, line 2 is not valid JSON"),
    "empty": ({"families.ner.text": "{data}/empty.jsonl"}, "empty.jsonl is empty"),
    "no backbone": ({"backbone": "./missing"}, "'./missing' cannot be loaded"),
    "too few texts": ({"families.tc.batch_size": 64}, "too few distinct texts for a batch of 64"),
    "too long": (
        {"families.ner.max_length": 999},
        "max_length is 999, but this encoder reads at most 132 tokens",
    ),
    "one pair": ({"families.tc.batch_size": 1}, "batch_size of at least 2"),
    "tracker": ({"report_to": "nonsense"}, "accelerate refuses these settings"),
    "no teacher": ({"families.ner.teacher": "./missing"}, "The teacher './missing' cannot be loaded"),
    "negative cluster": ({"families.ner.data": "{data}/negative.jsonl"}, "negative cluster ids"),
    "unequal rows": ({"families.ner.data": "{data}/unequal.jsonl"}, "row 2 has 2 words but 1 clusters"),
    "too many clusters": ({"families.ner.clusters": 999}, "999 clusters need at least as many words"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_sentence(arguments, data, capsys, mistake):
    (data / "bad.jsonl").write_text('{"anchor": "a", "positive": "b"}\n{"anchor": \n')
    (data / "empty.jsonl").write_text("")
    (data / "negative.jsonl").write_text(
        '{"words": ["a"], "clusters": [-1]}\n{"words": ["a"], "clusters": [3]}\n'
    )
    rows = '{"words": ["a"], "clusters": [1]}\n{"words": ["a", "b"], "clusters": [2]}\n'
    (data / "unequal.jsonl").write_text(rows)
    overrides, message = MISTAKES[mistake]
    overrides = {key: str(value).format(data=data) for key, value in overrides.items()}
    assert pretrain.main(arguments(**overrides)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_a_used_output_folder_is_refused(arguments, capsys):
    assert pretrain.main(arguments()) == 0
    assert pretrain.main(arguments()) == 2
    assert "holds another run; choose another --output_dir or" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(arguments, tmp_path, capsys):
    # Step 1 moves the weights to infinity, step 2 sees it.
    assert pretrain.main(arguments(learning_rate=1e38, warmup=0, steps=5)) == 2
    error = capsys.readouterr().err
    assert "Step 2: the loss of family 'ner' is not finite in the whole batch of source 'text'" in error
    assert "There is no checkpoint yet." in error and not (tmp_path / "run" / "backbone").exists()


def test_help_names_the_commands(capsys):
    assert pretrain.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "torchrun --nproc_per_node 2" in text and "--gradient_accumulation_steps INT" in text


def launch(command: list[str], tmp_path: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1200, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_train_together(arguments, tmp_path):
    """DDP needs no flag: one forward covers all families, and every trained parameter gets a gradient."""
    torchrun = [sys.executable, *"-m torch.distributed.run --nproc_per_node 2 --master_port 29571".split()]
    launch([*torchrun, str(ROOT / "train" / "pretrain.py"), *arguments()], tmp_path)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(record["moved"]) == {"backbone", "ner", "tc"} and all(record["moved"].values())
    assert record["hardware"]["processes"] == 2


LOAD_DEMO = """
import json
from transformers import AutoModel
model = AutoModel.from_pretrained("{run}/backbone", trust_remote_code=True)
model.load_adapter("{run}/apps/entities")
model.load_adapter("{run}/apps/intent")
result = model.predict("Remind me to call Ada at 5pm", adapters=["entities", "intent"])
print(json.dumps([sorted(result), model.config.regime, result["intent"][0]["label"]]))
"""


@pytest.mark.slow
def test_the_demo_from_launch_to_prediction(tmp_path, fresh_process):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    shorter = ["--steps", "2", "--families.ner.max_texts", "300", "--output_dir", str(tmp_path / "demo")]
    output = launch([*launcher, str(ROOT / "train" / "pretrain.py"), *shorter], tmp_path)
    shown = "loss first → last", "adapters/ner", "MtpfModel.from_pretrained", "entities:", "intent:"
    assert all(expected in output for expected in shown), output
    names, regime, label = fresh_process(LOAD_DEMO.format(run=tmp_path / "demo"), package=False)
    assert (names, regime) == (["entities", "intent"], "tpl") and label
