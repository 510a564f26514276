"""Mining of new tokens: memory over the length of the stream, and time next to the training that it serves.

The stream is the sentences of a corpus, repeated as often as need be. Steps are those of a standalone app of
10,000 texts whose budget is a tenth; a whole fit takes `FitSettings.steps_for` of them.
"""

import itertools
import time
from collections.abc import Iterator

STREAMS = {"mining_10k": 10_000, "mining_100k": 100_000, "mining_1m": 1_000_000}
CONTESTANTS = {**dict.fromkeys(STREAMS, 1), "training": 1}
SENTENCES, STEPS = 20_000, 30


def measure(contestant: str, options: dict) -> dict[str, float]:
    """Mine one stream, or score matrices and train some steps; times are of CPU."""
    import torch

    from eval.speed.inputs import read_sentences
    from modeling_mtpf.adaptation.tokens import mine_tokens
    from modeling_mtpf.data.backbones import open_backbone

    torch.set_num_threads(options["threads"])
    sentences = [" ".join(words) for words in read_sentences(options["text"], SENTENCES)]
    model, tokenizer = open_backbone("packaged")
    if contestant == "training":
        return _training(model, tokenizer, sentences[:10_000])
    stream: Iterator[str] = itertools.islice(itertools.cycle(sentences), STREAMS[contestant])
    started = time.process_time()
    found = mine_tokens(stream, tokenizer, 0.1)
    return {"cpu_seconds": time.process_time() - started, "texts": found.texts, "tokens": len(found.tokens)}


def _training(model, tokenizer, texts: list[str]) -> dict[str, float]:
    """Return CPU seconds of the scores of all matrices, of a step, and the steps of a fit."""
    import torch

    from modeling_mtpf.adaptation.methods.lora import TailFit, labels_of
    from modeling_mtpf.adaptation.methods.sparse import choose_weights, weights_of
    from modeling_mtpf.adaptation.settings import FitSettings
    from modeling_mtpf.adaptation.tail_training import adapter_tail, optimise, training_batches
    from modeling_mtpf.adaptation.trunk_cache import TrainedTrunk
    from modeling_mtpf.data.app_data import load_app_data
    from modeling_mtpf.model.adapters_mtpf import AdapterHead, LoraSettings, lora_targets
    from modeling_mtpf.model.trunk_mtpf import encoder_layers

    rows = [{"text": text, "label": str(number % 20)} for number, text in enumerate(texts)]
    data = load_app_data(rows, "tc", validation=rows[:50])
    settings = FitSettings(mixed_precision="float32", learning_rate=1e-3)
    model.eval().requires_grad_(False)
    layers = list(encoder_layers(model.backbone))
    head = AdapterHead("text-classification", data.labels, model.config.hidden_size)
    fit = TailFit(
        model,
        "app",
        head,
        labels_of(tokenizer, data, settings.max_length),
        len(layers),
        settings,
        rows=TrainedTrunk,
    )
    weights = weights_of(
        layers, lora_targets(model.backbone, LoraSettings(layers=len(layers), targets=["all"]))
    )
    started = time.process_time()
    chosen, _ = choose_weights(model, fit, layers, weights, settings)
    scored = time.process_time()
    tail = adapter_tail(model, "app", settings, layers)
    losses = (fit.loss_of(tail(trunk), rows) for trunk, rows in training_batches(fit.train, settings))
    trained = [*(weights[path] for path in chosen), *head.parameters()]
    with torch.enable_grad():
        optimise(trained, losses, lambda: 0.0, STEPS, settings, "app", until=STEPS)
    return {
        "score_seconds": scored - started,
        "step_seconds": (time.process_time() - scored) / STEPS,
        "steps": settings.steps_for(len(texts)),
    }


def compare(medians: dict[str, dict[str, float]]) -> dict[str, tuple[float, str, float]]:
    """Return the judged ratios, each with its limit."""
    small, large, training = (medians[name] for name in ("mining_10k", "mining_1m", "training"))
    work = small["cpu_seconds"] + training["score_seconds"]
    return {
        "peak memory at 1M / at 10k texts": (large["peak_mb"] / small["peak_mb"], "<=", 1.10),
        "mining, ranking and scoring / training at 10k texts": (
            work / (training["step_seconds"] * training["steps"]),
            "<=",
            0.10,
        ),
    }
