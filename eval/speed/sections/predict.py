"""Texts per second of ``mtpf predict`` against transformers' pipelines, with the same app, on real texts.

``--text`` names a folder of classification sets (``NAME/test.parquet``): some texts of each, in turn. Both
peers are the pipeline of the task class with the app loaded: at its default of one text at a time, and with
``batch_size=32``. Texts beyond 256 sub-words are read whole in windows by ours and by the NER pipeline
(``stride``); the TC pipeline cuts them off. Loading is not timed.
"""

import io
import json
import time

CONTESTANTS = {f"{who}_{kind}": 99 for kind in ("ner", "tc") for who in ("mtpf", "pipeline", "pipeline_32")}
KINDS = {"ner": "token-classification", "tc": "text-classification"}
MAX_LENGTH = 256
SHORT = 32
"""Words of the texts that are counted as messages."""


def measure(contestant: str, options: dict) -> dict[str, float]:
    """Predict all texts, and the short ones by themselves."""
    import torch

    from eval.speed.app_inputs import add_app, mixed_texts, wrapped_model

    torch.set_num_threads(options["threads"])
    texts = mixed_texts(options["text"])
    who, _, family = contestant.rpartition("_")
    model = wrapped_model()
    add_app(model, "app-0", KINDS[family], 0, texts[:64])
    run = _ours(model) if who == "mtpf" else _pipeline(model, family, 32 if who.endswith("32") else None)
    messages = [text for text in texts if len(text.split()) <= SHORT]
    run(texts[:20])
    found: dict[str, float] = {"texts": len(texts), "messages": len(messages)}
    for name, part in (("texts", texts), ("messages", messages)):
        started = time.perf_counter()
        run(part)
        found[f"{name}_per_second"] = round(len(part) / (time.perf_counter() - started), 2)
    return found


def _ours(model):
    """As the command does it: a stream and lines of JSON."""

    def run(texts: list[str]) -> None:
        out = io.StringIO()
        for text, row in zip(texts, model.predict_stream(iter(texts), ["app-0"]), strict=True):
            out.write(json.dumps({"text": text, "results": row}, ensure_ascii=False) + "\n")

    return run


def _pipeline(model, family: str, batch_size: int | None):
    import tempfile

    from transformers import AutoTokenizer, pipeline

    from modeling_mtpf import MtpfForSequenceClassification, MtpfForTokenClassification
    from modeling_mtpf.data.packaged_encoder import packaged_encoder

    folder = str(packaged_encoder())
    kind = MtpfForTokenClassification if family == "ner" else MtpfForSequenceClassification
    task_model = kind.from_pretrained(folder).eval()
    with tempfile.TemporaryDirectory() as work:
        task_model.load_adapter(model.save_adapter(work, "app-0"))
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=MAX_LENGTH)
    batch = {} if batch_size is None else {"batch_size": batch_size}
    if family == "ner":
        options = {"aggregation_strategy": "simple", "stride": MAX_LENGTH // 4, **batch}
    else:
        options = {"truncation": True, "max_length": MAX_LENGTH, **batch}
    pipe = pipeline(KINDS[family], model=task_model, tokenizer=tokenizer, device="cpu")  # type: ignore
    return lambda texts: pipe(texts, **options)


def compare(medians: dict) -> dict[str, tuple[float, str, float]]:
    """Rates of ours over those of the pipeline."""
    found = {}
    for family in KINDS:
        ours = medians[f"mtpf_{family}"]
        for who, label in (("pipeline", "its default"), ("pipeline_32", "batch_size=32")):
            for part in ("texts", "messages"):
                rate = ours[f"{part}_per_second"] / medians[f"{who}_{family}"][f"{part}_per_second"]
                found[f"{family}, {part}, over the pipeline at {label}"] = (rate, ">=", 3.0)
    return found
