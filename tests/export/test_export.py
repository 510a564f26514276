"""Export to ONNX: graphs and runner against torch, apps as data, and what is refused."""

import contextlib
import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ARCHITECTURES,
    BYTE_LEVEL,
    SENTENCES,
    assert_close,
    encoder_config,
    make_tokenizer,
    randomize,
)
from transformers import AutoModel, PreTrainedTokenizerFast

from eval.checks import export_quality
from modeling_mtpf import AdapterError, AdapterHead, LoraSettings, MtpfModel
from modeling_mtpf.adaptation.scoring import score_app
from modeling_mtpf.cli.main import main
from modeling_mtpf.data.app_data import Examples
from modeling_mtpf.errors import DataError, MissingExtraError
from modeling_mtpf.export import ExportError, export, export_onnx, read_manifest, runner
from modeling_mtpf.export.graphs import TailShape, tail_modules
from modeling_mtpf.export.int8 import quantize_products, quantize_tables
from modeling_mtpf.model.hub_cache_mtpf import sha256_of
from modeling_mtpf.model.predict_mtpf import load_tokenizer
from modeling_mtpf.model.results_mtpf import TagScheme
from modeling_mtpf.model.schemas_mtpf import MULTI_LABEL
from modeling_mtpf.model.scope_mtpf import Scope

onnxruntime = pytest.importorskip("onnxruntime")

AWKWARD = [
    *SENTENCES,
    "",
    " \t\n ",
    "Ada\tLovelace\r\nmet  her",
    "e\u0301te\u0301 👩‍👩‍👧 שלום עולם مرحبا 東京タワー",
    "Ada🙂 in London→5pm❤️, #Monday🇵🇹 5\ufe0f\u20e3",
    "\ud800 lonely surrogate".encode("utf-8", "replace").decode(),
    "x" * 400,
    "Ada Lovelace met Charles Babbage in London on Monday. " * 40,
]


def runner_of(folder: Path):
    """Import the runner of an export."""
    spec = importlib.util.spec_from_file_location("exported_runner", folder / "runner.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_app(
    root: Path, backbone: Path, name: str, settings: LoraSettings, kind="text-classification", **head
) -> Path:
    """Save an app with random LoRA and head."""
    model = MtpfModel.from_pretrained(backbone).eval()
    model.add_adapter(name, settings)
    randomize(model, len(name), within=f".{name}.")
    torch.manual_seed(0)
    model.heads[name] = AdapterHead(kind, ["O", "B-PER", "I-PER"], model.config.hidden_size, **head)
    model.save_adapter(root / name, name)
    return root / name


def torch_model(backbone: Path, *apps: Path) -> MtpfModel:
    model = MtpfModel.from_pretrained(backbone).eval()
    for app in apps:
        model.load_adapter(app)
    return model


def difference(folder: Path, model: MtpfModel, name: str, rows: int, tokens: int) -> tuple[float, float]:
    """Compare the graphs with torch in float64: largest difference on real tokens, and what rounding explains.

    Large random weights make some tokens ill-conditioned, differently for every kernel and processor, so that
    no fixed number fits: torch's own float32 is off by 1e-7 here and by 5e-4 there. The unit is what these
    inputs do when each weight changes by up to a float32 epsilon; errors of 3.3 units were seen.
    """
    runner = runner_of(folder).Runner(folder, threads=1)
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(5, 60, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, max(1, tokens - 3 * row) :] = 0
    inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    hidden = runner.trunk.run(None, inputs)[0]
    inputs = {"hidden_states": hidden, "attention_mask": mask.numpy(), **runner.apps[name]["inputs"]}
    result = torch.from_numpy(runner.tail.run(["last_hidden_state"], inputs)[0])

    def states(model: MtpfModel) -> torch.Tensor:
        return model.encode_adapters([name], input_ids=ids, attention_mask=mask)[name][mask.bool()]

    exact = copy.deepcopy(model).double().requires_grad_(False)
    moved = []
    for _ in range(8):
        changed = copy.deepcopy(exact)
        for weight in changed.parameters():
            noise = torch.rand(weight.shape, generator=generator, dtype=weight.dtype) * 2 - 1
            weight.mul_(1 + torch.finfo(torch.float32).eps * noise)
        moved.append((states(changed) - states(exact)).abs().max().item())
    return (result[mask.bool()] - states(exact)).abs().max().item(), 10 * max(moved)


@pytest.fixture(scope="module")
def exported(folders, tmp_path_factory) -> Path:
    """A float32 export with two apps."""
    folder = tmp_path_factory.mktemp("export") / "phone"
    export_onnx(folders / "backbone", [folders / "entities", folders / "intent"], folder)
    return folder


@pytest.fixture
def same_graphs(exported, monkeypatch):
    """Take the existing float32 graphs: writing them again takes many seconds."""
    for name in ("trunk", "tail"):
        file = exported / f"{name}.onnx"
        monkeypatch.setattr(
            f"modeling_mtpf.export.export.export_{name}",
            lambda encoder, shape, to, file=file: shutil.copy(file, to),
        )


@pytest.fixture
def copied(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copied"))


# ---------------------------------------------------------------------------------------- equal to torch


@pytest.mark.parametrize("rows, tokens", [(1, 1), (1, 7), (3, 20), (2, 128)])
def test_graphs_give_the_hidden_states_of_torch(exported, folders, rows, tokens):
    model = torch_model(folders / "backbone", folders / "entities", folders / "intent")
    for name in ("entities", "intent"):
        error, rounding = difference(exported, model, name, rows, tokens)
        assert error < rounding


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "bert"])
def test_every_architecture_is_exported(architecture, tmp_path):
    # ModernBERT's tail needs a layer with local and one with global attention.
    layers = 4 if architecture == "modernbert" else 2
    size = {"n_layers" if architecture == "distilbert" else "num_hidden_layers": layers}
    tokenizer = make_tokenizer(architecture in BYTE_LEVEL)
    encoder = AutoModel.from_config(encoder_config(architecture, len(tokenizer), **size))
    randomize(encoder)
    encoder.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    app = make_app(tmp_path, tmp_path / "encoder", "intent", LoraSettings(r=4, layers=layers // 2))
    tags = make_app(
        tmp_path, tmp_path / "encoder", "tags", LoraSettings(r=4, layers=1), "token-classification"
    )
    export_onnx(tmp_path / "encoder", [app, tags], tmp_path / "phone", layers=layers // 2)
    model = torch_model(tmp_path / "encoder", app, tags)
    for rows, tokens in ((1, 1), (3, 40)):
        error, rounding = difference(tmp_path / "phone", model, "intent", rows, tokens)
        assert error < rounding
    runner = runner_of(tmp_path / "phone").Runner(tmp_path / "phone")
    texts = [*AWKWARD, "\tAda", "\u00a0Ada met Noor"]
    assert_close(runner.predict(texts, ["intent", "tags"]), model.predict(texts, ["intent", "tags"]))


def test_runner_without_torch_gives_what_predict_gives(exported, folders, tmp_path, fresh_process):
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(AWKWARD))
    results = fresh_process(f"""
import json, sys
for name in ("torch", "transformers", "peft", "safetensors", "modeling_mtpf"):
    sys.modules[name] = None
sys.path.insert(0, {str(exported)!r})
from runner import Runner
texts = json.load(open({str(texts)!r}))
print(json.dumps(Runner({str(exported)!r}).predict(texts, ["entities", "intent"], batch_size=3)))
""")
    model = torch_model(folders / "backbone", folders / "entities", folders / "intent")
    expected = model.predict(AWKWARD, ["entities", "intent"])
    assert sum(map(len, expected["entities"])) > 20
    assert_close(results, expected)


def test_the_runner_gives_the_labels_of_a_multi_label_app(copied, folders, tmp_path):
    app = make_app(tmp_path, folders / "backbone", "moods", LoraSettings(r=2), problem_type=MULTI_LABEL)
    model = torch_model(folders / "backbone", app)
    head = model.heads["moods"]
    for label, name in enumerate(head.labels):  # so that each label is given to some texts, none just so
        rows = model.predict(AWKWARD, ["moods"], top_k=None, threshold=0)["moods"]
        scores = np.unique([row["score"] for result in rows for row in result if row["label"] == name])
        score = scores[np.diff(scores).argmax() :][:2].mean()
        head.bias.data[label] -= float(np.log(score / (1 - score)))
    export_onnx(folders / "backbone", [model.save_adapter(tmp_path / "centred", "moods")], copied)
    results = runner_of(copied).Runner(copied).predict(AWKWARD, ["moods"])
    assert_close(results, model.predict(AWKWARD, ["moods"]))
    assert len({len(rows) for rows in results["moods"]}) > 1


def test_the_runner_says_what_is_in_scope_as_predict_does(copied, folders, tmp_path):
    app = make_app(tmp_path, folders / "backbone", "topics", LoraSettings(r=2))
    model = torch_model(folders / "backbone", app, folders / "entities")
    generator = np.random.default_rng(0)
    arrays = [generator.normal(size=shape) for shape in ((3, 2), (3, 2), (2, 2))]
    scope = Scope(*arrays, np.zeros(())).rounded()
    model.heads["topics"].scope = scope
    texts, taken = [*AWKWARD, *(" ".join(text.split()[:2]) for text in AWKWARD)], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Scope, "contains", lambda self, logits: bool(taken.append(self.scores(logits[None])[0]))
        )
        model.predict(texts, ["topics"], in_scope=True)
    ordered = np.unique(taken)  # a threshold that no text meets just so
    gap = len(ordered) // 4 + np.diff(ordered)[len(ordered) // 4 : -len(ordered) // 4].argmax()
    scope.threshold = np.asarray(ordered[gap : gap + 2].mean(), np.float32)
    export_onnx(folders / "backbone", [model.save_adapter(tmp_path / "scoped", "topics")], copied)
    run = runner_of(copied).Runner(copied)
    results = run.predict(texts, ["topics", "entities"], in_scope=True)
    expected = model.predict(texts, ["topics", "entities"], in_scope=True)
    assert [row.pop("in_scope") for row in results["topics"]] == [
        row.pop("in_scope") for row in expected["topics"]
    ]
    assert_close(results, expected)
    with pytest.raises(
        run.predict.__globals__["RunnerError"], match="App 'intent' cannot say what is out of"
    ):
        run.predict(["Ada"], ["intent"], in_scope=True)


def test_the_runner_decodes_tags_as_predict_does():
    generator = np.random.default_rng(0)
    labels = ["I-LOC", "B-PER", "O", "B-LOC", "I-PER", "I-ORG"]
    for words in [*range(1, 9)] * 30:
        scores = generator.normal(size=(words, len(labels))).astype(np.float32)
        assert runner._decode(scores, labels) == TagScheme(labels).decode(scores).tolist()


def test_runner_reads_lines_and_writes_json(exported, folders, fresh_process):
    results = fresh_process(f"""
import io, json, runpy, sys
sys.stdin = io.TextIOWrapper(io.BytesIO("Ada Lovelace met Babbage\\ncafé 東京\\n".encode()))
sys.argv = ["runner.py", "--app", "entities", "--app", "intent"]
runpy.run_path({str(exported / "runner.py")!r}, run_name="__main__")
""")
    model = torch_model(folders / "backbone", folders / "entities", folders / "intent")
    expected = model.predict(["café 東京"], ["entities", "intent"])
    assert_close({name: [result] for name, result in results.items()}, expected)


def test_threads_share_a_runner(exported):
    runner = runner_of(exported).Runner(exported, threads=1)
    alone = {name: runner.predict(AWKWARD, [name]) for name in ("entities", "intent")}
    results: dict[int, dict] = {}

    def work(number: int) -> None:
        results[number] = runner.predict(AWKWARD, [("entities", "intent")[number % 2]])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert results == {number: alone[("entities", "intent")[number % 2]] for number in range(16)}


def test_runner_is_short_and_needs_three_packages(exported):
    lines = (exported / "runner.py").read_text("utf-8").splitlines()
    assert len(lines) <= 305
    imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported - sys.stdlib_module_names == {"numpy", "onnxruntime", "tokenizers"}


def test_files_hold_no_paths_of_this_machine(exported):
    for file in exported.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert b"site-packages" not in data and str(Path.cwd()).encode() not in data, file


# -------------------------------------------------------------------------------------------------- int8


def test_int8_is_close_small_and_the_same_in_any_batch(exported, folders, tmp_path, same_graphs):
    small = tmp_path / "phone"
    apps = [folders / "entities", folders / "intent"]
    export_onnx(folders / "backbone", apps, small, int8=True)
    manifest = read_manifest(small)
    assert manifest["quantization"]["activations"] == "uint8, a scale for each token"
    results = [runner_of(f).Runner(f).predict(AWKWARD, ["intent"])["intent"] for f in (exported, small)]
    assert sum(a["label"] == b["label"] for a, b in zip(*results, strict=True)) >= 0.75 * len(AWKWARD)
    model = torch_model(folders / "backbone", folders / "entities")
    # Hidden states are of size 1; random weights round worse than trained ones.
    error, rounding = difference(small, model, "entities", 3, 20)
    assert rounding < error < 0.5
    sizes = [next(f.glob("apps/entities-*")).stat().st_size for f in (small, exported)]
    assert sizes[0] < 0.7 * sizes[1]
    trunk = onnxruntime.InferenceSession(small / "trunk.onnx", providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(5, 50, (8, 9))
    mask = np.ones_like(ids)
    together = trunk.run(None, {"input_ids": ids, "attention_mask": mask})[0]
    for row in range(len(ids)):
        alone = trunk.run(None, {"input_ids": ids[row : row + 1], "attention_mask": mask[:1]})[0]
        assert np.abs(alone[0] - together[row]).max() < 1e-5


@pytest.mark.parametrize("shape", [(7, 48), (2, 5, 48)], ids=["matrix", "batch"])
def test_products_are_rounded_token_by_token(tmp_path, shape):
    onnx = pytest.importorskip("onnx")
    chance = np.random.default_rng(0)
    weights = (chance.normal(size=(48, 20)) * np.geomspace(1e-3, 1e3, 20)).astype(np.float32)
    weights[:, 3] = 0
    inputs = chance.normal(size=shape).astype(np.float32)
    inputs *= np.geomspace(1e-4, 1e4, shape[-2], dtype=np.float32)[:, None]
    inputs[..., 1, :] = 0
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("MatMul", ["x", "w"], ["z"])],
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(name, kind, (*shape[:-1], 20)) for name in "yz"],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    file = tmp_path / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), file)
    quantize_products(file)
    used = [node.op_type for node in onnx.load(file).graph.node]
    assert used.count("QuantizeLinear") == 1 and used.count("MatMulInteger") == 2
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    y, z = session.run(None, {"x": inputs})
    # The same in float64: weights in 7 bits by column, inputs in 8 bits by row.
    by_column = np.abs(weights).max(0, initial=1e-30).astype(float) / 63
    by_row = np.abs(inputs).max(-1, keepdims=True, initial=1e-30).astype(float) / 127
    rounded = np.round(inputs / by_row) @ np.round(weights / by_column)
    np.testing.assert_allclose(y, rounded * by_row * by_column, rtol=2e-2, atol=0)
    np.testing.assert_array_equal(y, z)
    exact = inputs.astype(float) @ weights
    assert np.linalg.norm(y - exact) < 0.02 * np.linalg.norm(exact)


@pytest.mark.parametrize("name", ["entities", "intent"])
def test_the_check_of_quality_scores_an_export_as_the_model(exported, folders, name):
    model = torch_model(folders / "backbone", folders / name)
    labels = model.heads[name].labels
    texts = SENTENCES[:6]
    if name == "entities":
        inputs: list = [text.split() for text in texts]
        examples = Examples(inputs, [[labels[0], *["O"] * (len(words) - 1)] for words in inputs])
    else:
        examples = Examples(texts, [labels[number % len(labels)] for number in range(len(texts))])
    tokenizer = load_tokenizer(model)
    expected = score_app(model, tokenizer, name, examples)
    found = score_app(export_quality.ExportedModel(exported, 1), tokenizer, name, examples)
    metric = export_quality.METRICS["ner" if name == "entities" else "tc"]
    assert found[metric] == pytest.approx(expected[metric])
    assert export_quality.agreement(export_quality.ExportedModel(exported, 1), name, examples.inputs) == 1


def test_tables_are_rounded_row_by_row(tmp_path):
    onnx = pytest.importorskip("onnx")
    table = np.random.default_rng(0).normal(size=(2000, 40)).astype(np.float32)
    table *= np.geomspace(1e-3, 1e3, 2000, dtype=np.float32)[:, None]
    table[7] = 0
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["rows"])],
        "g",
        [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("rows", onnx.TensorProto.FLOAT, ["n", 40])],
        [onnx.numpy_helper.from_array(table, "table")],
    )
    file = tmp_path / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), file)
    before = file.stat().st_size
    quantize_tables(file)
    assert file.stat().st_size < 0.4 * before
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    rows = session.run(None, {"ids": np.arange(2000)})[0]
    limit = np.abs(table).max(1, keepdims=True) / 254 * 1.01
    assert (np.abs(rows - table) <= limit).all()


# --------------------------------------------------------------------------------------------- more apps


def test_adding_an_app_changes_no_other(copied, folders, tmp_path, capsys):
    before = {file: file.read_bytes() for file in copied.rglob("*.*") if file.name != "export.json"}
    runner = runner_of(copied)
    outputs = runner.Runner(copied).predict(AWKWARD, ["entities", "intent"])
    # Another rank, one layer instead of two.
    app = make_app(tmp_path, folders / "backbone", "small", LoraSettings(r=2, layers=1))
    arguments = [str(folders / "backbone"), "--adapter", str(app), "--output", str(copied)]
    assert main(["export", *arguments]) == 0
    assert "apps/small-" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in before} == before
    assert runner.Runner(copied).predict(AWKWARD, ["entities", "intent"]) == outputs
    model = torch_model(folders / "backbone", app)
    assert_close(runner.Runner(copied).predict(AWKWARD, ["small"]), model.predict(AWKWARD, ["small"]))


@pytest.mark.parametrize("exists", [True, False], ids=["adding", "new"])
def test_two_exports_at_a_time_leave_both_apps(exists, exported, folders, same_graphs, tmp_path, monkeypatch):
    folder = tmp_path / "phone"
    if exists:
        export_onnx(folders / "backbone", [], folder)
    met, errors = threading.Barrier(2), []
    read_app = export._read_app

    def read(*arguments):  # both have come this far, unless one waits for the other
        with contextlib.suppress(threading.BrokenBarrierError):
            met.wait(timeout=0.3)
        return read_app(*arguments)

    def add(name):
        try:
            export_onnx(folders / "backbone", [folders / name], folder)
        except Exception as error:
            errors.append(error)

    monkeypatch.setattr(export, "_read_app", read)
    threads = [threading.Thread(target=add, args=(name,)) for name in ("entities", "intent")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert runner_of(folder).Runner(folder, threads=1).apps.keys() == {"entities", "intent"}


def test_a_replacement_that_fails_leaves_the_export_whole(copied, folders, monkeypatch):
    runner = runner_of(copied)
    before = runner.Runner(copied).predict(AWKWARD, ["intent"])

    def full_disk(path, data, write=export.write_bytes):
        if path.name == "export.json":
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(export, "write_bytes", full_disk)
    with pytest.raises(DataError, match="cannot be written.*No space left"):
        export_onnx(folders / "backbone", [f"intent={folders / 'entities'}"], copied)
    assert runner.Runner(copied).predict(AWKWARD, ["intent"]) == before
    monkeypatch.undo()
    export_onnx(folders / "backbone", [f"intent={folders / 'entities'}"], copied)
    after = runner.Runner(copied).predict(AWKWARD, ["intent", "entities"])
    assert after["intent"] == after["entities"]


def test_what_a_runner_may_be_reading_stays_until_the_next_replacement(copied, folders):
    """A runner that has read the manifest opens the files that it names."""
    runner, manifest = runner_of(copied), (copied / "export.json").read_bytes()
    before, files = runner.Runner(copied).predict(AWKWARD, ["intent"]), set(copied.rglob("*.safetensors"))
    replaced = export_onnx(
        folders / "backbone", [f"intent={folders / 'entities'}", folders / "entities"], copied
    )
    assert [line.split()[-1] for line in sorted(str(replaced).splitlines()[-2:])] == ["unchanged", "replaced"]
    second = (copied / "export.json").read_bytes()
    assert files < set(copied.rglob("*.safetensors"))
    (copied / "export.json").write_bytes(manifest)
    assert runner.Runner(copied).predict(AWKWARD, ["intent"]) == before
    (copied / "export.json").write_bytes(second)
    export_onnx(folders / "backbone", [f"other={folders / 'entities'}"], copied)
    assert not files <= set(copied.rglob("*.safetensors"))


def test_a_line_of_the_runner_is_one_text(exported):
    text = "Ada\x0cmet\u2028Noor\nHi\r\n"
    command = [sys.executable, str(exported / "runner.py"), "--app", "intent"]
    done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=120)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2


def test_adapter_can_get_another_name(copied, folders):
    export_onnx(folders / "backbone", [f"second={folders / 'intent'}"], copied)
    results = runner_of(copied).Runner(copied).predict(AWKWARD, ["intent", "second"])
    assert results["second"] == results["intent"]


def test_apps_that_do_not_fit_the_tail_are_refused(copied, folders, tmp_path):
    before = (copied / "export.json").read_bytes()
    deep = make_app(tmp_path, folders / "backbone", "deep", LoraSettings(r=2, layers=3))
    with pytest.raises(ExportError, match="last 3 layers, but the tail of .* holds 2.*--layers 3"):
        export_onnx(folders / "backbone", [deep], copied)
    settings = LoraSettings(r=2, targets=["attention.self.value"])
    other = make_app(tmp_path, folders / "backbone", "other", settings)
    with pytest.raises(ExportError, match="'attention.self.value', which the tail"):
        export_onnx(folders / "backbone", [other], copied)
    with pytest.raises(AdapterError, match="has no head"):
        export_onnx(folders / "backbone", [folders / "ner"], copied)
    with pytest.raises(ExportError, match="Two adapters are named 'intent'"):
        export_onnx(folders / "backbone", [folders / "intent", folders / "intent"], copied)
    assert (copied / "export.json").read_bytes() == before


def test_tail_holds_what_the_apps_need(folders, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("modeling_mtpf.export.export._create", lambda *arguments: made.append(arguments[2]))
    monkeypatch.setattr("modeling_mtpf.export.export.read_manifest", lambda folder: {})
    deep = make_app(tmp_path, folders / "backbone", "deep", LoraSettings(layers=3, targets=["output.dense"]))
    export_onnx(folders / "backbone", [deep], tmp_path / "phone")
    export_onnx(folders / "backbone", [], tmp_path / "phone", layers=4)
    assert [shape.layers for shape in made] == [3, 4]
    model = MtpfModel.from_pretrained(folders / "backbone")
    assert len(tail_modules(model.backbone, made[0])) == 3 * 4
    assert "output.dense" in made[0].targets
    with pytest.raises(ExportError, match="--layers is 2; these apps need at least 3"):
        export_onnx(folders / "backbone", [deep], tmp_path / "phone", layers=2)


# ------------------------------------------------------------------------------------------- what is refused


def test_damaged_graph_is_refused(copied):
    runner, file = runner_of(copied), copied / "trunk.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(runner.RunnerError, match="trunk.onnx' is missing or not the file that was exported"):
        runner.Runner(copied)
    file.write_bytes(data[: len(data) // 2])  # and with a matching hash:
    manifest = read_manifest(copied)
    manifest["files"]["trunk.onnx"]["sha256"] = sha256_of(file)
    (copied / "export.json").write_text(json.dumps(manifest))
    with pytest.raises(runner.RunnerError, match="onnxruntime cannot read"):
        runner.Runner(copied)


def test_old_onnxruntime_is_refused(exported, monkeypatch):
    runner = runner_of(exported)
    monkeypatch.setattr(onnxruntime, "__version__", "1.9.2")
    with pytest.raises(runner.RunnerError, match=r"onnxruntime is 1\.9\.2; install 1\.\d+ or newer"):
        runner.Runner(exported)


@pytest.mark.parametrize("text", [None, b"bytes", 3])
def test_runner_refuses_a_text_that_is_not_a_string_and_stays_usable(exported, text):
    runner = runner_of(exported)
    loaded = runner.Runner(exported)
    with pytest.raises(runner.RunnerError, match="Text 1 is .*, not a string"):
        loaded.predict(["Hi", text], ["intent"])
    with pytest.raises(runner.RunnerError, match="no app 'date'; this export has: entities, intent"):
        loaded.predict(["Hi"], ["date"])
    assert len(loaded.predict("Hi", ["intent"])["intent"]) == 1
    assert loaded.predict([], ["intent"]) == {"intent": []}


def test_runner_refuses_a_folder_that_is_not_an_export(exported, tmp_path):
    runner = runner_of(exported)
    for content in (None, "{", "[]", "{}"):
        if content is not None:
            (tmp_path / "export.json").write_text(content)
        with pytest.raises(runner.RunnerError, match="is not a folder of mtpf export"):
            runner.Runner(tmp_path)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_other_settings_and_tokenizers_are_refused(copied, backbone, file, recorded):
    stored = json.loads((backbone / file).read_text())
    stored["normalizer" if file == "tokenizer.json" else "layer_norm_eps"] = None if "t" == file[0] else 0.5
    (backbone / file).write_text(json.dumps(stored))
    if not recorded:  # as older versions
        manifest = json.loads((copied / "export.json").read_text())
        del manifest["backbone"]["config"]
        (copied / "export.json").write_text(json.dumps(manifest))
    if file == "config.json" and not recorded:
        export_onnx(backbone, [], copied)
        return
    with pytest.raises(ExportError, match="another backbone: .*(tokenizer|'layer_norm_eps')"):
        export_onnx(backbone, [], copied)


def test_the_runner_refuses_scores_that_are_not_numbers(exported):
    loaded = runner_of(exported).Runner(exported, threads=1)
    for app in loaded.apps.values():
        app["inputs"]["head.weight"] = app["inputs"]["head.weight"] * np.float32(1e38)
    with pytest.raises(Exception, match="'intent' gives scores that are not finite numbers"):
        loaded.predict(["Call Ada"], ["intent"])


def test_another_backbone_is_refused(copied, folders, encoders, tmp_path, capsys):
    model = MtpfModel.from_pretrained(folders / "backbone")
    with torch.no_grad():
        next(model.backbone.parameters()).mul_(1.001)
    model.save_pretrained(tmp_path / "moved")
    PreTrainedTokenizerFast.from_pretrained(encoders["bert"]).save_pretrained(tmp_path / "moved")
    with pytest.raises(ExportError, match="is an export of another backbone"):
        export_onnx(tmp_path / "moved", [], copied)
    with pytest.raises(AdapterError, match="was trained on another backbone"):
        export_onnx(tmp_path / "moved", [folders / "intent"], tmp_path / "new")
    assert not (tmp_path / "new").exists()
    arguments = ["export", str(folders / "backbone"), "--output", str(copied), "--int8"]
    assert main(arguments) == 2
    assert "is an export in float32" in capsys.readouterr().err


def test_foreign_folders_are_left_alone(folders, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for output in ("mine", "mine/letter.txt"):
        assert main(["export", str(folders / "backbone"), "--output", str(tmp_path / output)]) == 2
        assert "exists and is not an export" in capsys.readouterr().err
    (tmp_path / "mine" / "export.json").write_text('{"format_version": 1}')
    assert main(["export", str(folders / "backbone"), "--output", str(tmp_path / "mine")]) == 2
    error = capsys.readouterr().err
    assert "export.json is damaged" in error and len(error.splitlines()) == 1
    assert main(["export", str(tmp_path / "nothing"), "--output", str(tmp_path / "new")]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_failure_leaves_nothing_behind(folders, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("modeling_mtpf.export.export.export_trunk", lambda *arguments: None)
    monkeypatch.setattr("modeling_mtpf.export.export.export_tail", fail)
    with pytest.raises(DataError, match="cannot be written: disk full"):
        export_onnx(folders / "backbone", [folders / "intent"], tmp_path / "phone")
    assert os.listdir(tmp_path) == [".phone.lock"]


def test_missing_extra_is_one_sentence(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mtpf\[onnx\]'"):
        export_onnx(folders / "backbone", [], tmp_path / "phone")
    assert main(["export", str(folders / "backbone"), "--output", str(tmp_path / "phone")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_tail_modules_are_those_of_the_last_layers(folders):
    model = MtpfModel.from_pretrained(folders / "backbone")
    results = tail_modules(model.backbone, TailShape(2, ("attention.self.query", "output.dense")))
    assert results == [
        f"encoder.layer.{layer}.{target}"
        for layer in (2, 3)
        for target in ("attention.self.query", "output.dense")
    ]
