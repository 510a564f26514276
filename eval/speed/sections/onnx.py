"""Two apps over one text: plain passes in torch, the shared trunk, exported graphs, and plain int8 passes.

CPU milliseconds, which are those of the clock with one thread on an idle machine.
"""

import statistics
import tempfile
import time
from pathlib import Path

CONTESTANTS = {"torch_passes": 99, "torch_trunk": 99, "onnx_float32": 99, "onnx_int8": 99, "stock_int8": 99}
SHAPES = {"1x32": (1, 32), "1x128": (1, 128), "16x32": (16, 32)}
APPS = ("first-app", "second-app")
LABELS = 9
SECONDS = 1.5
"""How long each shape is repeated, at least."""


def measure(contestant: str, options: dict) -> dict[str, float]:
    """Return median milliseconds for each shape: full rows of random tokens, two apps, logits of each."""
    import torch

    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as work:
        model = _model_with_apps(Path(work))
        if contestant == "stock_int8":
            run = _stock(model, Path(work), options["threads"])
        elif contestant.startswith("onnx"):
            run = _onnx(Path(work), contestant, options["threads"])
        else:
            run = _torch(model, contestant)
        return {name: round(_milliseconds(run, *shape), 3) for name, shape in SHAPES.items()}


def _model_with_apps(work: Path):
    """Load the packaged encoder with two apps of random weights, and save them."""
    import torch

    from modeling_mtpf import AdapterHead, LoraSettings, MtpfModel
    from modeling_mtpf.data.packaged_encoder import packaged_encoder

    model = MtpfModel.from_pretrained(packaged_encoder(), dtype=torch.float32).eval()
    for name in APPS:
        model.add_adapter(name, LoraSettings())
        model.heads[name] = AdapterHead(
            "token-classification", [f"l{i}" for i in range(LABELS)], model.config.hidden_size
        )
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if f".{name}." in key:
                    parameter.normal_(0, 0.02)
        model.save_adapter(work / name, name)
    return model


def _torch(model, contestant: str):
    import torch

    @torch.inference_mode()
    def passes(ids, mask) -> None:
        for name in APPS:
            with model.use_adapter(name):
                model.heads[name](model(input_ids=ids, attention_mask=mask)[0])

    @torch.inference_mode()
    def trunk(ids, mask) -> None:
        for name, states in model.encode_adapters(list(APPS), input_ids=ids, attention_mask=mask).items():
            model.heads[name](states)

    return passes if contestant == "torch_passes" else trunk


def _onnx(work: Path, contestant: str, threads: int):
    from modeling_mtpf.export import export_onnx
    from modeling_mtpf.export.runner import Runner

    int8 = contestant == "onnx_int8"
    export_onnx("packaged", [work / name for name in APPS], work / "export", int8=int8)
    runner = Runner(work / "export", threads)

    def graphs(ids, mask) -> None:
        ids, mask = ids.numpy(), mask.numpy()
        hidden = runner.trunk.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        for name in APPS:
            inputs = {"hidden_states": hidden, "attention_mask": mask, **runner.apps[name]["inputs"]}
            runner.tail.run(["logits"], inputs)

    return graphs


def _stock(model, work: Path, threads: int):
    """The whole encoder for each app, as with merged LoRA, quantized by onnxruntime's defaults."""
    import onnxruntime
    import torch
    from onnxruntime.quantization import quantize_dynamic
    from transformers import AutoModel

    from modeling_mtpf.data.packaged_encoder import packaged_encoder
    from modeling_mtpf.export.graphs import export_graph

    class Stock(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = AutoModel.from_pretrained(packaged_encoder())

        def forward(self, ids, mask):
            return self.encoder(input_ids=ids, attention_mask=mask)[0]

    sizes, names = {0: "batch", 1: "tokens"}, ["input_ids", "attention_mask"]
    whole, plain = work / "whole.onnx", work / "plain.onnx"
    ones = torch.ones(2, 7, dtype=torch.int64)
    export_graph(Stock(), (ones, ones), (sizes, sizes), names, ["states"], plain)
    quantize_dynamic(plain, whole)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(whole, settings, providers=["CPUExecutionProvider"])
    heads = [model.heads[name].weight.detach().numpy().T for name in APPS]

    def passes(ids, mask) -> None:
        for head in heads:
            feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
            session.run(None, feed)[0] @ head

    return passes


def _milliseconds(run, rows: int, tokens: int) -> float:
    import torch

    ids = torch.randint(1000, 20_000, (rows, tokens))
    mask = torch.ones_like(ids)
    for _ in range(3):
        run(ids, mask)
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < 7:
        started = time.process_time()
        run(ids, mask)
        times.append(time.process_time() - started)
    return 1000 * statistics.median(times)


def compare(medians: dict) -> dict[str, tuple[float, str, float]]:
    """Exported graphs over plain passes in torch, and int8 over plain int8 passes."""
    plain = medians["torch_passes"]
    ratios = {"onnx_int8": 0.14, "onnx_float32": 1.0, "torch_trunk": 1.0}
    stock = medians["onnx_int8"]["1x32"] / medians["stock_int8"]["1x32"]
    return {"onnx_int8 over two stock int8 passes, 1x32": (stock, "<=", 0.62)} | {
        f"{contestant} over two torch passes, {shape}": (
            medians[contestant][shape] / plain[shape],
            "<=",
            limit if shape == "1x32" else 1.0,
        )
        for contestant, limit in ratios.items()
        for shape in SHAPES
    }
