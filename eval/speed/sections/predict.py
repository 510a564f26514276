"""Texts per second of ``mtpf predict`` against transformers' pipelines, with the same app, on real texts.

``--text`` names a folder of classification sets (``NAME/test.parquet``): some texts of each, in turn. Both
pipelines are those of the task class with the app loaded: at their default of one text at a time, and with
``batch_size=32``. ``stock`` is a plain loop over the stock encoder with the app's LoRA merged into it and its
head, in batches of 32 texts of similar length, with its best labels and no words. ``bf16`` has such weights.
Texts beyond 256 sub-words are read whole in windows by ours and by the NER pipeline
(``stride``); the TC pipeline cuts them off. Loading is not timed.
"""

import io
import json

from eval.speed import clock

WHO = ("mtpf", "mtpf_bf16", "pipeline", "pipeline_32", "stock", "stock_bf16")
CONTESTANTS = {f"{who}_{kind}": 99 for kind in ("ner", "tc") for who in WHO}
KINDS = {"ner": "token-classification", "tc": "text-classification"}
PAIRS = (
    ("mtpf", "pipeline", "over the pipeline at its default", 3.0),
    ("mtpf", "pipeline_32", "over the pipeline at batch_size=32", 2.5),
    ("mtpf", "stock", "over the stock encoder merged and sorted", 1.6),
    ("mtpf_bf16", "stock", "in bf16 over the stock encoder merged and sorted", 2.4),
    ("mtpf_bf16", "stock_bf16", "over the stock encoder merged and sorted, both in bf16", 1.6),
)
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
    if who.startswith("pipeline"):
        run = _pipeline(model, family, 32 if who.endswith("32") else None)
    else:
        dtype = torch.bfloat16 if who.endswith("bf16") else torch.float32
        run = _ours(model.to(dtype)) if who.startswith("mtpf") else _stock(model, family, dtype)
    messages = [text for text in texts if len(text.split()) <= SHORT]
    run(texts[:20])
    found: dict[str, float] = {"texts": len(texts), "messages": len(messages)}
    for name, part in (("texts", texts), ("messages", messages)):
        started = clock.seconds()
        run(part)
        found[f"{name}_per_second"] = round(len(part) / (clock.seconds() - started), 2)
    return found


def _ours(model):
    """As the command does it: a stream and lines of JSON."""

    def run(texts: list[str]) -> None:
        out = io.StringIO()
        for text, row in zip(texts, model.predict_stream(iter(texts), ["app-0"]), strict=True):
            out.write(json.dumps({"text": text, "results": row}, ensure_ascii=False) + "\n")

    return run


def _stock(model, family: str, dtype):
    import copy
    import tempfile

    import torch
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    from modeling_mtpf.data.packaged_encoder import packaged_encoder

    folder = str(packaged_encoder())
    tokenizer, head = AutoTokenizer.from_pretrained(folder), copy.deepcopy(model.heads["app-0"]).to(dtype)
    with tempfile.TemporaryDirectory() as work:
        app = str(model.save_adapter(work, "app-0"))
        lora = PeftModel.from_pretrained(AutoModel.from_pretrained(folder), app)
        encoder = lora.merge_and_unload().to(dtype).eval()

    @torch.inference_mode()
    def run(texts: list[str]) -> list[list[int]]:
        encoded = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        order = sorted(range(len(texts)), key=lambda row: len(encoded[row]))
        found: list[list[int]] = [[] for _ in texts]
        for start in range(0, len(order), 32):
            rows = order[start : start + 32]
            inputs = tokenizer.pad({"input_ids": [encoded[row] for row in rows]}, return_tensors="pt")
            hidden, mask = encoder(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
            if family == "tc":
                hidden = ((hidden * mask).sum(1) / mask.sum(1)).to(dtype)[:, None]
            for row, labels in zip(rows, head(hidden).float().softmax(-1).argmax(-1).tolist(), strict=True):
                found[row] = labels[: len(encoded[row])]
        return found

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
        for who, peer, label, limit in PAIRS:
            for part in ("texts", "messages"):
                name = f"{part}_per_second"
                rate = medians[f"{who}_{family}"][name] / medians[f"{peer}_{family}"][name]
                found[f"{family}, {part}, {label}"] = (rate, ">=", limit)
    return found
