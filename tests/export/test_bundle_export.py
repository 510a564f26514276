"""Bundles in exports: the tail's graph stays as it is, and the runner takes the parts' columns of the logits."""

import json
import shutil

import pytest
import torch
from conftest import LABELS, assert_close, randomize
from test_export import AWKWARD, main, runner_of

from modeling_mtpf import AdapterHead, LoraSettings, MtpfModel
from modeling_mtpf.export import ExportError, export_onnx, read_manifest
from modeling_mtpf.model.schemas_mtpf import MULTI_LABEL

NAMES = ["both", "both/words", "intent", "moods"]


@pytest.fixture(scope="module")
def bundle(folders, tmp_path_factory):
    """Folder of a bundle with parts of all three kinds."""
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    heads = {
        "words": AdapterHead(*LABELS["entities"], 32, 40),
        "goal": AdapterHead(*LABELS["intent"], 32, 30),
    }
    heads["moods"] = AdapterHead("text-classification", ["glad", "calm"], 32, 50, MULTI_LABEL)
    for seed, head in enumerate(heads.values()):
        torch.manual_seed(seed)
        torch.nn.init.normal_(head.weight, 0, 3)
    model.add_adapter("both", LoraSettings(r=5, alpha=5), heads)
    randomize(model, 3, within=".both.")
    return model.save_adapter(tmp_path_factory.mktemp("bundles") / "both", "both")


@pytest.fixture(scope="module")
def exported(folders, bundle, tmp_path_factory):
    """An export with a bundle and a plain app."""
    folder = tmp_path_factory.mktemp("export") / "phone"
    export_onnx(folders / "backbone", [bundle, folders / "intent"], folder)
    return folder


def test_the_runner_gives_what_predict_gives(folders, bundle, exported, capsys, monkeypatch):
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    for app in (bundle, folders / "intent"):
        model.load_adapter(app)
    expected = model.predict(AWKWARD, NAMES)
    assert any(row["words"] for row in expected["both"]) and any(expected["moods"])
    module = runner_of(exported)
    runner = module.Runner(exported, threads=1)
    assert_close(runner.predict(AWKWARD, NAMES), expected, 1e-4)
    names = ["both/words", "both/goal", "both/moods"]
    assert_close(runner.predict(AWKWARD, names), model.predict(AWKWARD, names), 1e-4)  # each kind by itself
    labels = [row["score"] for row in runner.predict(AWKWARD, ["intent", "goal"])["goal"]]
    assert labels == pytest.approx([row["goal"]["score"] for row in expected["both"]], abs=1e-4)
    assert list(runner.predict(["Hi"], ["both"])["both"][0]) == ["words", "goal", "moods"]
    assert read_manifest(exported)["apps"]["both"]["kind"] == "bundle"
    calls, tail = [], runner.tail
    runner.tail = type("Tail", (), {"run": lambda self, *args: calls.append(args) or tail.run(*args)})()
    runner.predict(["Hi"], ["both/goal", "moods", "both", "intent"])
    assert len(calls) == 2  # one tail for all parts
    for name in ("nothing", "both/nothing", "both/"):
        with pytest.raises(
            module.RunnerError, match="There is no app .*; this export has: both, intent, both/wo"
        ):
            runner.predict(["Hi"], [name])


def test_a_part_that_several_bundles_have_is_named_in_full(folders, bundle, exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "phone")
    export_onnx(folders / "backbone", [f"second={bundle}"], folder)
    module = runner_of(folder)
    runner = module.Runner(folder, threads=1)
    with pytest.raises(module.RunnerError, match="Several bundles have a part 'goal'"):
        runner.predict(["Hi"], ["goal"])
    first, second = (runner.predict(["Hi"], [name])[name] for name in ("both/goal", "second/goal"))
    assert first == second


def test_a_bundle_is_not_added_to_an_export_with_another_runner(folders, bundle, exported, tmp_path, capsys):
    folder = shutil.copytree(exported, tmp_path / "phone")
    manifest = json.loads((folder / "export.json").read_text())
    manifest["files"]["runner.py"]["sha256"] = "0" * 64
    (folder / "export.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ExportError, match="has the runner of another version of mtpf, .* the bundle 'both'; export"
    ):
        export_onnx(folders / "backbone", [bundle], folder)
    assert (
        main(
            [
                "export",
                str(folders / "backbone"),
                "--adapter",
                str(folders / "intent"),
                "--output",
                str(folder),
            ]
        )
        == 0
    )
