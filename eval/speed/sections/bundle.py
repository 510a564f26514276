"""k apps on one text: the trunk and k tails, next to one tail with k heads, in CPU time.

``one`` is a LoRA of the usual rank, as joint training gives it, ``folded`` the k LoRAs and a correction of
rank 4 in one LoRA. What the number of layers alone predicts is ``theory``. ``predict`` is
`MtpfModel.predict`, from text to results, with a bundle of many apps, half of them NER, next to one NER app.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

CONTESTANTS = {
    "torch_6_layers": 99,
    "torch_12_layers": 99,
    "int8_6_layers": 99,
    "predict_6_layers": 99,
    "predict_12_layers": 99,
}
COUNTS = (2, 4, 8)
RANK, CORRECTION = 32, 4
TAIL_LAYERS, TOKENS, LABELS, REPEATS = 2, 32, 9, 31
LIMITS = {2: 0.85, 4: 0.70, 8: 0.55}
MANY, MANY_LIMIT = 20, 1.25
TEXT = (
    "remind me to call Nadia Brandt in Lisbon tomorrow at five about the tickets for the concert on Friday "
    "night and the hotel near the old town"
)


def measure(contestant: str, options: dict) -> dict[str, float]:
    """Return median CPU milliseconds of all ways, timed in turn, and ratios to k tails."""
    import torch

    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    kind, layers = contestant.split("_")[0], int(contestant.split("_")[1])
    ids = torch.randint(1000, 20_000, (1, TOKENS))
    makers = {"torch": _torch_ways, "int8": _int8_ways, "predict": _predict_ways}
    ways = makers[kind](layers, ids, options["threads"])
    times: dict[str, list[float]] = {}
    for repeat in range(REPEATS):
        for way, run in ways.items():
            started = time.process_time()
            run()
            if repeat > 2:  # the first ones compile kernels
                times.setdefault(way, []).append(1000 * (time.process_time() - started))
    medians = {way: sorted(values)[len(values) // 2] for way, values in times.items()}
    if kind == "predict":
        medians["many / one"] = medians[f"predict {MANY}"] / medians["predict 1"]
    for count in COUNTS if kind != "predict" else ():
        for way in ("one", "folded"):
            medians[f"{way} / tails {count}"] = medians[f"{way} {count}"] / medians[f"tails {count}"]
        medians[f"theory {count}"] = layers / (layers - TAIL_LAYERS + TAIL_LAYERS * count)
    return {key: round(value, 4) for key, value in medians.items()}


def _torch_ways(layers: int, ids: Any, threads: int) -> dict[str, Callable[[], None]]:
    import torch

    from eval.speed.app_inputs import wrapped_model
    from modeling_mtpf import AdapterHead, LoraSettings

    model = wrapped_model(layers)

    def add(name: str, rank: int, parts: list[str]) -> None:
        heads = {
            part: AdapterHead("token-classification", [f"l{i}" for i in range(LABELS)], 384) for part in parts
        }
        model.add_adapter(name, LoraSettings(rank, 2 * rank, TAIL_LAYERS), heads)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if f".{name}." in key:
                    parameter.normal_(0, 0.02)

    every = [f"part-{number}" for number in range(max(COUNTS))]
    for part in every:
        add(f"app-{part}", RANK, [part])
    for count in COUNTS:
        add(f"one-{count}", RANK, every[:count])
        add(f"folded-{count}", RANK * count + CORRECTION, every[:count])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @torch.inference_mode()
    def run(names: list[str]) -> None:
        for name, states in model.encode_adapters(names, **inputs).items():
            for head in model.parts(name).values():
                head(states)

    ways = {f"{way} {count}": [f"{way}-{count}"] for count in COUNTS for way in ("one", "folded")}
    ways |= {f"tails {count}": [f"app-{part}" for part in every[:count]] for count in COUNTS}
    return {way: partial(run, names) for way, names in ways.items()}


def _predict_ways(layers: int, ids: Any, threads: int) -> dict[str, Callable[[], None]]:
    """Apps of random weights; those of NER find an entity or two in the text."""
    from eval.speed.app_inputs import wrapped_model
    from modeling_mtpf import AdapterHead, LoraSettings
    from modeling_mtpf.data.backbones import open_backbone

    model, tokenizer = wrapped_model(layers), open_backbone("packaged")[1]

    def head(number: int) -> AdapterHead:
        if number % 2:
            return AdapterHead("text-classification", [f"l{i}" for i in range(LABELS)], 384)
        made = AdapterHead("token-classification", ["O", *(f"{b}-T{i}" for i in range(4) for b in "BI")], 384)
        made.bias.data[0] += 1.0
        return made

    for count in (1, MANY):
        parts = {f"part-{number}": head(number) for number in range(count)}
        model.add_adapter(f"bundle-{count}", LoraSettings(RANK, 2 * RANK, TAIL_LAYERS), parts)

    def run(name: str) -> None:
        model.predict([TEXT], adapters=[name], tokenizer=tokenizer)

    return {f"predict {count}": partial(run, f"bundle-{count}") for count in (1, MANY)}


def _int8_ways(layers: int, ids: Any, threads: int) -> dict[str, Callable[[], None]]:
    """Of one exported app's inputs: those of others, and of bundles, differ in their sizes only."""
    import tempfile
    from pathlib import Path

    import numpy as np

    from eval.speed.app_inputs import add_app, wrapped_model
    from modeling_mtpf.export import export_onnx
    from modeling_mtpf.export.runner import Runner

    with tempfile.TemporaryDirectory() as work:
        model = wrapped_model(layers)
        add_app(model, "app", "token-classification")
        model.save_adapter(Path(work) / "app", "app")
        export_onnx("packaged", [Path(work) / "app"], Path(work) / "export", int8=True)
        runner = Runner(Path(work) / "export", threads)
    app = runner.apps["app"]["inputs"]
    generator = np.random.default_rng(0)

    def sized(rank: int, labels: int) -> dict[str, Any]:
        shapes = {key: list(value.shape) for key, value in app.items()}
        for key, shape in shapes.items():
            if key.startswith("head."):
                shape[-1] = labels
            else:
                shape[1 if key.endswith("lora_A") else 0] = rank
        return {key: generator.normal(0, 0.02, shape).astype(np.float32) for key, shape in shapes.items()}

    ids = ids.numpy()
    mask = np.ones_like(ids)

    def run(tails: list[dict[str, Any]]) -> None:
        hidden = runner.trunk.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        for inputs in tails:
            runner.tail.run(["logits"], {"hidden_states": hidden, "attention_mask": mask, **inputs})

    ways = {f"tails {count}": [sized(RANK, LABELS) for _ in range(count)] for count in COUNTS}
    ways |= {f"one {count}": [sized(RANK, LABELS * count)] for count in COUNTS}
    ways |= {f"folded {count}": [sized(RANK * count + CORRECTION, LABELS * count)] for count in COUNTS}
    return {way: partial(run, tails) for way, tails in ways.items()}


def compare(medians: dict) -> dict[str, tuple[float, str, float]]:
    """One tail over k tails; with twelve layers the trunk weighs more."""
    found = {}
    for contestant, numbers in medians.items():
        if contestant.startswith("predict"):
            found[f"{MANY} apps of a bundle over one, {contestant}"] = (
                numbers["many / one"],
                "<=",
                MANY_LIMIT,
            )
            continue
        for count in COUNTS:
            for way in ("one", "folded"):
                theory = f"by layers alone {numbers[f'theory {count}']:.2f}"
                limit = LIMITS[count] if "6_layers" in contestant else 1.0
                ratio = numbers[f"{way} / tails {count}"]
                found[f"{way}, {count} apps, {contestant} ({theory})"] = (ratio, "<=", limit)
    return found
