"""Models with apps of random weights, and real texts, for the sections about prediction."""

from pathlib import Path
from typing import Any

TEXTS_PER_SET = 8
ENTITY_SHARE = 0.1
"""Share of words that the random NER app tags as entities."""


def wrapped_model(layers: int = 6) -> Any:
    """Return the packaged encoder, or a random one of the same width with more layers, in eval mode."""
    import torch
    from transformers import AutoConfig

    from modeling_mtpf import MtpfConfig, MtpfModel
    from modeling_mtpf.data.packaged_encoder import packaged_encoder

    folder = str(packaged_encoder())
    if layers == 6:
        return MtpfModel.from_pretrained(folder).eval()
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = layers
    return MtpfModel(MtpfConfig(encoder_config=config)).eval()


def add_app(model: Any, name: str, kind: str, seed: int = 0, texts: list[str] | None = None) -> None:
    """Add an app with random weights, not for training; a NER app finds a plausible number of entities."""
    import torch

    from modeling_mtpf import AdapterHead

    torch.manual_seed(seed)
    model.add_adapter(name)
    labels = [str(number) for number in range(10)]
    if kind == "token-classification":
        labels = ["O", *(f"{prefix}-{group}" for group in ("PER", "LOC", "ORG", "DATE") for prefix in "BI")]
    head = model.heads[name] = AdapterHead(kind, labels, model.config.hidden_size, 256).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.normal_(0, 0.02)
                parameter.requires_grad_(False)
        head.weight.normal_(0, 0.2)
        if texts and kind == "token-classification":
            from modeling_mtpf.model.predict_mtpf import load_tokenizer

            inputs = load_tokenizer(model)(texts, padding=True, truncation=True, return_tensors="pt")
            states = model.encode_adapters([name], **inputs)[name][inputs["attention_mask"].bool()]
            logits = head(states)
            head.bias[0] += torch.quantile(logits[:, 1:].amax(-1) - logits[:, 0], 1 - ENTITY_SHARE)


def mixed_texts(folder: str, per_set: int = TEXTS_PER_SET) -> list[str]:
    """Return some texts of the test part of every set in a folder, in turn, so that lengths are mixed.

    Args:
        folder: Of folders with ``test.parquet``, which has a column ``text``.
        per_set: Texts of each.
    """
    from modeling_mtpf.data.sources import open_source

    columns = []
    for file in sorted(Path(folder).glob("*/test.parquet")):
        rows = open_source(str(file), {"text": "text"}).shuffle(seed=0)
        columns.append([row["text"] for row, _ in zip(rows, range(per_set), strict=False)])
    if not columns:
        raise SystemExit(f"error: {folder} has no folders with test.parquet; give --text .../tc")
    return [text for row in zip(*columns, strict=True) for text in row]
