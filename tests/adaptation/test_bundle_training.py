"""Bundles that are trained jointly or composed of apps."""

import json

import pytest
import torch

from modeling_mtpf import AdapterHead, LoraSettings, MtpfModel
from modeling_mtpf.adaptation import FitSettings, fit_app
from modeling_mtpf.adaptation.bundle import BundleSettings, Part, fit_bundle
from modeling_mtpf.adaptation.bundle import joint as joint_module
from modeling_mtpf.adaptation.bundle.low_rank import LowRank, install, lora_matrices, low_rank, run_with
from modeling_mtpf.adaptation.settings import LoraShape
from modeling_mtpf.cli.main import main
from modeling_mtpf.data.app_data import AppData, Examples
from modeling_mtpf.data.words import load_word_tokenizer
from modeling_mtpf.errors import MtpfError
from modeling_mtpf.model.trunk_mtpf import run_tail, run_trunk

NAMES, PLACES = ["Ada", "Noor", "Grace", "Alan"], ["London", "Paris", "Rome"]
TOKENS = [[name, "is", "in", place, "."] for name in NAMES for place in PLACES]
TEXTS = [" ".join(words) for words in TOKENS]
FLOAT = {"mixed_precision": "float32", "batch_size": 4}
LONG = BundleSettings(steps=450, evaluations=3, patience=9, learning_rate=3e-3, **FLOAT)
SHORT = BundleSettings(steps=150, evaluations=5, learning_rate=0.02, **FLOAT)


def ner_data(kind: str = "LOC") -> AppData:
    examples = Examples(TOKENS, [["B-PER", "O", "O", f"B-{kind}", "O"] for _ in TOKENS])
    return AppData("ner", ["O", "B-PER", f"B-{kind}"], examples, examples, examples)


def tc_data(labels: int = 2) -> AppData:
    examples = Examples(TEXTS, [f"label {i % labels}" for i in range(len(TEXTS))])
    return AppData("tc", list(dict.fromkeys(examples.labels)), examples, examples, examples)


def sets_data() -> AppData:
    examples = Examples(TEXTS, [["a", "b"][: i % 3] for i in range(len(TEXTS))])
    return AppData("tc", ["a", "b"], examples, examples, examples)


@pytest.fixture
def setting(load, encoders):
    return load("bert", {}), load_word_tokenizer(str(encoders["bert"]))


def parts(**more) -> list[Part]:
    return [
        Part("entities", "ner", ner_data()),
        Part("intent", "tc", tc_data()),
        Part("sets", "tc", sets_data()),
    ]


def test_joint_training_of_one_part_is_fitting_that_app(setting, tmp_path):
    """An independent reference: the same LoRA, head and scores as `fit_app`, with the scale inside B."""
    settings = {"steps": 12, "evaluations": 3, "stored_dtype": "float32", **FLOAT}
    alone = FitSettings(refit=False, **settings)
    app = fit_app(tc_data(), "tc", backbone=setting, name="app", method="lora", settings=alone)
    bundle = fit_bundle(
        [Part("intent", "tc", tc_data())], "joint", setting, name="both", settings=BundleSettings(**settings)
    )
    model = setting[0]
    expected, found = (lora_matrices(model.backbone, name) for name in ("app", "both"))
    assert expected.keys() == found.keys()
    for path, pair in expected.items():
        assert torch.allclose(pair.down, found[path].down, atol=1e-6)
        assert torch.allclose(pair.up, found[path].up, atol=1e-6)
    assert torch.allclose(model.heads["app"].weight, model.heads["both/intent"].weight, atol=1e-6)
    assert bundle.metrics["intent"] == pytest.approx(app.metrics, abs=1e-4)
    assert bundle.record["seeds"]["0"]["validation_scores"] == app.record["seeds"]["0"]["validation_scores"]


@pytest.mark.slow
def test_joint_training_learns_all_parts_and_leaves_the_rest_alone(setting, tmp_path, folders):
    model, tokenizer = setting
    model.add_adapter("other", LoraSettings(r=2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    bundle = fit_bundle(parts(), "joint", setting, tmp_path / "all", settings=LONG)
    after = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items()}
    assert all(torch.equal(after[key.replace(".base_layer", "")], value) for key, value in before.items())
    assert model.adapters == ["other", "all"] and list(bundle.metrics) == ["entities", "intent", "sets"]
    assert bundle.metrics["entities"]["entity_f1"] > 0.8 and bundle.metrics["intent"]["accuracy"] > 0.8
    assert bundle.metrics["sets"]["validation_average_precision"] > 0.8
    task = json.loads((tmp_path / "all" / "task.json").read_text())
    assert task["composition"]["method"] == "joint" and task["seeds"].keys() == {"0"}
    assert task["parts"][0]["calibration"] and task["metrics"]["intent/accuracy"] > 0.8
    again = MtpfModel.from_pretrained(model.config.name_or_path).eval()
    again.load_adapter(tmp_path / "all")
    expected = model.predict(TEXTS, ["all"], tokenizer=tokenizer)
    assert again.predict(TEXTS, ["all"]) == expected
    assert "3 apps on one LoRA" in (tmp_path / "all" / "README.md").read_text()


def test_parts_are_drawn_by_size_and_weigh_as_asked(setting, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        joint_module, "train_bundle", lambda job, lora, heads, objective: drawn.append(objective) or 1 / 0
    )
    small, large = tc_data(), tc_data()
    large.train = Examples(TEXTS * 9, large.train.labels * 9)
    two = [Part("small", "tc", small, weight=0.0), Part("large", "tc", large, weight=2.0)]
    for temperature, share in ((1.0, 0.1), (2.0, 0.25)):
        with pytest.raises(ZeroDivisionError):
            settings = BundleSettings(temperature=temperature, **FLOAT)
            fit_bundle(two, "joint", setting, settings=settings)
        objective = drawn.pop()
        assert objective._shares.tolist() == pytest.approx([share, 1 - share])
        assert objective.steps == 400 + 540
    heads = {part.name: AdapterHead("text-classification", ["label 0", "label 1"], 32) for part in two}
    tail = lambda trunk, part: run_tail(setting[0].backbone, trunk, None)  # noqa: E731
    losses = objective.losses(tail, heads, settings)
    found = [float(next(losses).detach()) for _ in range(40)]
    assert 2 <= sum(loss == 0 for loss in found) <= 20  # of the part with the weight 0


def test_a_joint_start_from_a_familys_lora(setting, load, tmp_path):
    tpl = load("bert", {"ner": LoraSettings(r=3)}).save_adapter(tmp_path / "ner", "ner")
    with torch.no_grad():
        fit_settings = BundleSettings(steps=1, learning_rate=0, lora=LoraShape(), **FLOAT)
    bundle = fit_bundle(parts(), "joint", setting, adapter=tpl, settings=fit_settings)
    setting[0].load_adapter(tpl, "tpl")
    found, expected = (lora_matrices(setting[0].backbone, name) for name in (bundle.name, "tpl"))
    for path, pair in expected.items():
        assert torch.allclose(found[path].up @ found[path].down, pair.up @ pair.down, atol=1e-2)


# ------------------------------------------------------------------------------------- LoRA as tensors


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert"])
def test_a_lora_of_tensors_runs_and_is_installed_as_the_adapter_it_is_of(load, batch, name):
    model, inputs = load(name, {"app": LoraSettings(r=3, layers=2), "more": LoraSettings(r=2)}), batch(name)
    matrices = lora_matrices(model.backbone, "app")
    narrow = min(matrices)
    matrices[narrow] = low_rank(*matrices[narrow][:2], 2)
    down, up = matrices[narrow][:2]
    matrices[narrow] = LowRank(torch.cat([down, torch.zeros_like(down)]), torch.cat([up, up], 1))  # rank 4
    install(model, "copy", matrices, {})
    with torch.no_grad():
        trunk = run_trunk(model.backbone, 2, **inputs)
        expected = run_tail(model.backbone, trunk, "copy")
        assert torch.allclose(run_with(model.backbone, trunk, matrices), expected, atol=1e-5)
        assert torch.allclose(model.encode_adapters(["copy"], **inputs)["copy"], expected, atol=1e-6)
    assert len(model.backbone.peft_config["copy"].rank_pattern) == len(matrices)


def test_truncation_is_the_best_approximation_of_the_product():
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(6, 9, generator=generator), torch.randn(7, 6, generator=generator)
    found = low_rank(down, up, 2)
    left, values, right = torch.linalg.svd((up @ down).double())
    expected = left[:, :2] * values[:2] @ right[:2]
    assert found.down.shape == (2, 9) and torch.allclose(
        (found.up @ found.down).double(), expected, atol=1e-4
    )
    assert low_rank(down, up, 6).down is down


# ------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p.clear(), "at least one part"),
        (lambda p: setattr(p[1], "name", "entities"), "Two parts are named 'entities'"),
        (lambda p: setattr(p[1], "name", "a/b"), "Part name 'a/b' is not allowed"),
        (lambda p: setattr(p[1], "family", "tk"), "Unknown family 'tk' of 'intent'; choose ner or tc"),
        (
            lambda p: setattr(p[1], "data", None),
            "The part 'intent' has no data, which the method joint trains",
        ),
        (lambda p: setattr(p[1], "family", None), "The part 'intent' has no family"),
        (lambda p: setattr(p[1], "family", "ner"), "The data is of the family 'tc', not 'ner'"),
    ],
)
def test_parts_that_make_no_bundle_are_refused(setting, change, message):
    given = parts()
    change(given)
    with pytest.raises(MtpfError, match=message) as error:
        fit_bundle(given, "joint", setting, settings=SHORT)
    assert "\n" not in str(error.value) and setting[0].adapters == []


@pytest.mark.parametrize(
    "method, settings, message",
    [
        ("joined", {}, "Unknown method 'joined' of making a bundle; did you mean 'joint'"),
        ("joint", {"temperature": 0.5}, "temperature is 0.5"),
        ("joint", {"rank": 0}, "rank is 0"),
        ("joint", {"loss": "x"}, "loss is 'x'; choose one of"),
        ("joint", {"max_length": 999}, "max_length is 999; this encoder reads 4 to"),
    ],
)
def test_methods_and_settings_that_are_unknown_are_refused(setting, method, settings, message):
    with pytest.raises(MtpfError, match=message):
        fit_bundle(parts(), method, setting, settings=BundleSettings(**FLOAT, **settings))


# -------------------------------------------------------------------------------------------- command


def test_the_command_trains_a_bundle(encoders, tmp_path, capsys):
    rows = [{"text": text, "label": f"label {n % 2}"} for n, text in enumerate(TEXTS * 2)]
    (tmp_path / "intents.jsonl").write_text("\n".join(map(json.dumps, rows)))
    yaml = tmp_path / "parts.yaml"
    row = f"{{name: NAME, family: tc, data: {tmp_path / 'intents.jsonl'}}}"
    yaml.write_text(f"- {row.replace('NAME', 'one')}\n- {row.replace('NAME', 'two')}\n")
    options = [
        "--bundle",
        str(yaml),
        "--backbone",
        str(encoders["bert"]),
        "--steps",
        "2",
        "--seeds",
        "2",
        "--threads",
        "1",
        "--progress",
        "false",
    ]
    assert main(["adapt", *options, "--output_dir", str(tmp_path / "both")]) == 0
    shown = capsys.readouterr().out
    assert "Bundle 'both', joint, 2 steps from labels" in shown and "one (tc), intents, 22 examples" in shown
    for more, message in (
        (["--data", "x"], "--data is not for a bundle"),
        (["--method", "lora"], "Unknown method 'lora' of making a bundle"),
        (["--method", "lc++"], "The method lc++ composes apps; use it with: mtpf compose"),
    ):
        assert main(["adapt", *options, "--output_dir", str(tmp_path / "other"), *more]) == 2
        assert message in capsys.readouterr().err
    for text, message in (
        ("a: [", "cannot be read as a YAML list of parts"),
        ("3", "must hold a YAML list of parts"),
        ("- {nam: x}", "Unknown key 'nam' in part 1 of .*; did you mean 'name'"),
        ("- {family: tc}", "Part 1 of .* has no name"),
        ("- {name: aa, weight: x}", "The weight of the part 'aa' is 'x'"),
    ):
        yaml.write_text(text)
        assert main(["adapt", *options, "--output_dir", str(tmp_path / "other")]) == 2
        error = capsys.readouterr().err
        assert __import__("re").search(message, error) and error.count("\n") == 1
    assert main(["adapt", "--family", "tc", "--output_dir", str(tmp_path / "other")]) == 2
    assert "--data is missing; give --family and --data, or --bundle." in capsys.readouterr().err
