"""NER by LoRA: a LoRA that starts from the family's (or fresh), and a fresh linear head on every word."""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ...data.app_data import AppData
from ...data.batches import row_batches
from ...data.encoding import EncodedRows, encode_rows, padded
from ...data.words import IGNORE, first_subwords
from ...metrics import entity_scores
from ...model.adapters_mtpf import AdapterHead
from ...model.modeling_mtpf import MtpfModel
from ..settings import FitResult, FitSettings
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


@register_method("ner", "lora")
def fit_token_lora(
    model: MtpfModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    data: AppData,
    start_from: str | None,
    settings: FitSettings,
) -> FitResult:
    """Fit a NER app and leave it loaded in the model under ``name``; see `methods.FitMethod`."""
    torch.manual_seed(settings.seed)
    head = AdapterHead("token-classification", data.labels, model.config.hidden_size, settings.max_length)
    add_app(model, name, head, start_from)
    model.eval()  # the frozen trunk must not drop anything
    train, validation = (
        _rows(model, tokenizer, name, split.inputs, settings) for split in (data.train, data.validation)
    )
    index = {label: number for number, label in enumerate(data.labels)}
    targets, cut = _targets(train.encoded, [[index[tag] for tag in row] for row in data.train.labels])
    counts = np.bincount(np.concatenate([t[t != IGNORE] for t in targets]), minlength=len(data.labels))
    weights = label_weights(counts, settings.class_weights)

    def loss_of(hidden: torch.Tensor, rows: np.ndarray, length: int) -> torch.Tensor:
        wanted = torch.from_numpy(padded([targets[row] for row in rows], length, IGNORE))
        return cross_entropy(model.heads[name](hidden).flatten(0, 1), wanted.flatten(), weights)

    @torch.no_grad()
    def scores() -> dict[str, Any]:
        tags: list[list[str]] = [[] for _ in data.validation.inputs]
        for rows, hidden, _ in tail_outputs(model, name, validation, settings):
            best = model.heads[name](hidden).argmax(-1).cpu().numpy()
            for row, own in zip(rows, best, strict=True):
                encoded, words = validation.encoded, len(data.validation.inputs[row])
                tags[row] = word_tags(own, encoded.word_ids[row], words, encoded.cut[row], data.labels)
        return entity_scores(data.validation.labels, tags)

    details = train_lora(model, name, train, loss_of, lambda: scores()["entity_f1"], settings)
    final = scores()
    return FitResult(final["entity_f1"], final, {**details, "words_cut_off_in_train": cut})


def _rows(model, tokenizer, name, sentences: list[list[str]], settings: FitSettings) -> TailRows:
    encoded = encode_rows(tokenizer, sentences, settings.max_length)
    cache = TrunkCache(
        model,
        encoded,
        model.adapter_depth(name),
        settings.max_length,
        settings.mixed_precision,
        settings.cache_gb * 1e9,
        settings.progress,
    )
    return TailRows(cache, encoded)


def _targets(encoded: EncodedRows, labels: list[list[int]]) -> tuple[list[np.ndarray], int]:
    """Put each word's label on its first sub-word; also count the words beyond the cut."""
    targets, beyond = [], 0
    for word_ids, own, cut in zip(encoded.word_ids, labels, encoded.cut, strict=True):
        first = np.nonzero(first_subwords(word_ids[None])[0])[0]
        target = np.full(len(word_ids), IGNORE, dtype=np.int64)
        target[first] = np.asarray(own, dtype=np.int64)[word_ids[first]]
        targets.append(target)
        beyond += len(own) - 1 - int(word_ids.max(initial=-1)) if cut else 0
    return targets, beyond


def word_tags(best: np.ndarray, word_ids: np.ndarray, words: int, cut: bool, labels: list[str]) -> list[str]:
    """Return the tag of each word from its first sub-word, ending where the sentence was cut off.

    A word that the tokenizer maps to nothing gets ``O``.

    Args:
        best: Index of the best label of each token ``(tokens,)``, perhaps padded.
        word_ids: Word of each token ``(tokens,)``, -1 for special tokens.
        words: Number of words of the sentence.
        cut: Whether the sentence was cut off.
        labels: In the order of the indices.
    """
    found = {int(word_ids[i]): labels[best[i]] for i in np.nonzero(first_subwords(word_ids[None])[0])[0]}
    seen = max(found, default=-1) + 1 if cut else words
    return [found.get(word, "O") for word in range(seen)]


@torch.inference_mode()
def tag_words(
    model: MtpfModel, tokenizer: PreTrainedTokenizerBase, name: str, sentences: list[list[str]]
) -> list[list[str]]:
    """Tag split sentences with a NER app, in float32.

    Returns:
        One tag per word; fewer where the sentence was cut off at the app's maximal length.
    """
    head: Any = model.heads[name]
    model.eval()
    encoded = encode_rows(tokenizer, sentences, head.max_length)
    tags: list[list[str]] = [[] for _ in sentences]
    for batch in row_batches(encoded.lengths, head.max_length, model.device):
        inputs = encoded.inputs(batch.rows, batch.length)
        inputs = {key: value.to(model.device) for key, value in inputs.items()}
        best = head(model.encode_adapters([name], **inputs)[name]).argmax(-1).cpu().numpy()
        for position, row in enumerate(batch.rows[: batch.real]):
            words, cut = len(sentences[row]), encoded.cut[row]
            tags[row] = word_tags(best[position], encoded.word_ids[row], words, cut, head.labels)
    return tags


__all__ = ["fit_token_lora", "tag_words", "word_tags"]
