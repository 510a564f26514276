"""TC by LoRA: a LoRA that starts from the family's (or fresh), and a linear head on the mean vector."""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ...data.app_data import AppData, Examples
from ...data.encoding import encode_rows
from ...metrics import text_scores
from ...model.adapters_mtpf import AdapterHead
from ...model.modeling_mtpf import MtpfModel, mean_pool
from ..settings import FitResult, FitSettings
from ..text_vectors import embed_texts
from ..trunk_cache import TrunkCache
from .lora import (
    TailRows,
    add_app,
    cross_entropy,
    label_weights,
    tail_outputs,
    train_lora,
)
from .registry import register_method


@register_method("tc", "lora")
def fit_text_lora(
    model: MtpfModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    data: AppData,
    start_from: str | None,
    settings: FitSettings,
) -> FitResult:
    """Fit a TC app by LoRA and leave it loaded in the model under ``name``; see `methods.FitMethod`."""
    torch.manual_seed(settings.seed)
    head = AdapterHead("text-classification", data.labels, model.config.hidden_size, settings.max_length)
    add_app(model, name, head, start_from)
    model.eval()  # the frozen trunk must not drop anything
    splits = {}
    for key, split in (("train", data.train), ("validation", data.validation)):
        encoded = encode_rows(tokenizer, split.inputs, settings.max_length)
        cache = TrunkCache(
            model,
            encoded,
            model.adapter_depth(name),
            settings.max_length,
            settings.mixed_precision,
            settings.cache_gb * 1e9,
            settings.progress,
        )
        splits[key] = TailRows(cache, encoded)
    index = {label: number for number, label in enumerate(data.labels)}
    targets = np.array([index[label] for label in data.train.labels])
    weights = label_weights(np.bincount(targets, minlength=len(index)), settings.class_weights)

    def logits(key: str, hidden: torch.Tensor, rows: np.ndarray, length: int) -> torch.Tensor:
        mask = splits[key].encoded.inputs(rows, length)["attention_mask"].to(hidden.device)
        return model.heads[name](mean_pool(hidden, mask))

    def loss_of(hidden: torch.Tensor, rows: np.ndarray, length: int) -> torch.Tensor:
        return cross_entropy(logits("train", hidden, rows, length), torch.from_numpy(targets[rows]), weights)

    @torch.no_grad()
    def scores() -> dict[str, float]:
        found = np.zeros((len(data.validation), len(index)), dtype=np.float32)
        for rows, hidden, length in tail_outputs(model, name, splits["validation"], settings):
            found[rows] = logits("validation", hidden, rows, length).softmax(-1).cpu().numpy()
        return _scores(data.validation, found, data.labels)

    details = train_lora(model, name, splits["train"], loss_of, lambda: scores()["accuracy"], settings)
    final = scores()
    cut = sum(splits["train"].encoded.cut)
    return FitResult(final["accuracy"], final, {**details, "texts_cut_off_in_train": cut})


def _scores(examples: Examples, probabilities: np.ndarray, labels: list[str]) -> dict[str, float]:
    predicted = [labels[column] for column in probabilities.argmax(1)]
    return text_scores(examples.labels, predicted, probabilities, labels)


@torch.inference_mode()
def score_texts(
    model: MtpfModel, tokenizer: PreTrainedTokenizerBase, name: str, examples: Examples
) -> dict[str, float]:
    """Score a TC app of the model, in float32."""
    head: Any = model.heads[name]
    vectors = embed_texts(model, tokenizer, examples.inputs, name, max_length=head.max_length)
    logits = head(torch.from_numpy(vectors).to(head.weight.device))
    return _scores(examples, logits.softmax(-1).cpu().numpy(), head.labels)


__all__ = ["fit_text_lora", "score_texts"]
