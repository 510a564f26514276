"""Prefixes in exports: inputs of the tail of any length from 0, in all architectures, float32 and int8."""

import pytest
import torch
from conftest import ARCHITECTURES, assert_close
from test_export import AWKWARD, runner_of
from test_prefix import add_prefixed, random_prefixes, words_head

from modeling_mtpf import MtpfModel
from modeling_mtpf.adaptation.bundle.low_rank import LowRank, run_with
from modeling_mtpf.export import ExportError, export_onnx, read_manifest
from modeling_mtpf.export.graphs import TailShape, export_tail, tail_modules, tail_prefixes
from modeling_mtpf.model.prefix_mtpf import prefix_tensors
from modeling_mtpf.model.trunk_mtpf import run_trunk

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def slots(folders, tmp_path_factory):
    """Folder of an app with a prefix."""
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    add_prefixed(model, "slots", 3, words_head())
    return model.save_adapter(tmp_path_factory.mktemp("apps") / "slots", "slots")


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_tail_equals_torch_for_any_number_of_slots_from_0(load, batch, tmp_path, name):
    model = load(name, attn_implementation="eager").requires_grad_(False)
    encoder, target = model.backbone, "attn.Wqkv" if name == "modernbert" else None
    target = target or ("attention.q_lin" if name == "distilbert" else "attention.self.query")
    shape = TailShape(2, (target,), prefix=True)
    export_tail(encoder, shape, tmp_path / "tail.onnx")
    tail = onnxruntime.InferenceSession(tmp_path / "tail.onnx", providers=["CPUExecutionProvider"])
    assert sum(".prefix_" in value.name for value in tail.get_inputs()) == 4
    inputs = {key: value[:, :12] for key, value in batch(name).items()}
    real = inputs["attention_mask"].bool()
    trunk = run_trunk(encoder, 2, **inputs)
    generator = torch.Generator().manual_seed(0)
    matrices, feed = {}, {"hidden_states": trunk.hidden_states, "attention_mask": inputs["attention_mask"]}
    for path in tail_modules(encoder, shape):
        down, up = torch.randn(2, 32, generator=generator), torch.randn(3 * 32, 2, generator=generator)
        matrices[path] = LowRank(down, 0.1 * up[: encoder.get_submodule(path).out_features])
        feed |= {f"{path}.lora_A": matrices[path].down.T, f"{path}.lora_B": matrices[path].up.T}
    feed |= {"head.weight": torch.zeros(32, 1), "head.bias": torch.zeros(1)}
    for length in (0, 1, 5):
        prefixes = random_prefixes(length) if length else tail_prefixes(encoder, shape, 0)
        values = feed | prefix_tensors(encoder, prefixes)
        found = tail.run(["last_hidden_state"], {key: value.numpy() for key, value in values.items()})[0]
        expected = run_with(encoder, trunk, matrices, prefixes if length else None)
        assert torch.allclose(torch.from_numpy(found)[real], expected[real], atol=2e-3), length


def plain_inputs(folder):
    runner = runner_of(folder).Runner(folder, threads=1)
    return runner, [value.name for value in runner.tail.get_inputs()]


@pytest.mark.slow
def test_an_export_with_a_prefix_runs_apps_with_and_without_one(folders, slots, tmp_path):
    backbone = folders / "backbone"
    export_onnx(backbone, [slots], tmp_path / "phone")
    export_onnx(backbone, [folders / "intent"], tmp_path / "phone")  # added later
    assert read_manifest(tmp_path / "phone")["tail"]["prefix"] is True
    runner, names = plain_inputs(tmp_path / "phone")
    lengths = [v.shape[1] for key, v in runner.apps["intent"]["inputs"].items() if ".prefix_" in key]
    assert lengths == [0] * 4 and sum(".prefix_" in name for name in names) == 4
    model = MtpfModel.from_pretrained(backbone).eval()
    for app in (slots, folders / "intent"):
        model.load_adapter(app)
    assert_close(runner.predict(AWKWARD, ["slots", "intent"]), model.predict(AWKWARD, ["slots", "intent"]))


@pytest.mark.slow
def test_int8_and_an_export_without_prefixes(folders, slots, tmp_path):
    export_onnx(folders / "backbone", [slots, folders / "intent"], tmp_path / "phone", int8=True)
    runner, names = plain_inputs(tmp_path / "phone")
    assert sum(".prefix_" in name for name in names) == 4
    model = MtpfModel.from_pretrained(folders / "backbone").eval()
    model.load_adapter(slots)
    found, expected = (each.predict(AWKWARD, ["slots"])["slots"] for each in (runner, model))
    same = [
        [s["word"] for s in one] == [s["word"] for s in other]
        for one, other in zip(found, expected, strict=True)
    ]
    assert sum(same) >= len(AWKWARD) // 2
    export_onnx(folders / "backbone", [folders / "intent"], tmp_path / "without")
    assert "prefix" not in read_manifest(tmp_path / "without")["tail"]
    assert not any(".prefix_" in name for name in plain_inputs(tmp_path / "without")[1])
    with pytest.raises(
        ExportError, match="App 'slots' has a prefix, which the tail of .* cannot take"
    ) as error:
        export_onnx(folders / "backbone", [slots], tmp_path / "without")
    assert "\n" not in str(error.value)
