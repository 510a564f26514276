"""Fit an app by LoRA: the family's or a fresh one, and a linear head on every word or on the mean vector."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ...data.app_data import AppData
from ...data.encoding import EncodedRows, encode_rows, padded
from ...data.words import IGNORE, align_labels
from ...metrics import entity_scores
from ...model.adapters_mtpf import AdapterHead
from ...model.modeling_mtpf import MtpfModel, mean_pool
from ..scoring import read_tags, score_probabilities
from ..settings import FitResult, FitSettings
from ..tail_training import add_app, cross_entropy, label_weights, tail_outputs, train_tail
from ..trunk_cache import TrunkCache
from .registry import register_method

Outputs = Iterable[tuple[np.ndarray, torch.Tensor]]
"""Row numbers and logits, batch by batch."""


# Two classes of what differs between the families: ``metric`` is the validation score by which states and
# seeds are compared, ``cut`` the number of training words or texts that were cut off, ``counts`` the examples
# of each label; ``logits`` applies the head to last hidden states ``(rows, tokens, hidden)``.


class _WordLabels:
    """NER: a label on the first sub-word of each word."""

    kind, metric = "token-classification", "entity_f1"

    def __init__(self, data: AppData, train: EncodedRows):
        self.labels, self.validation = data.labels, data.validation
        index = {label: number for number, label in enumerate(data.labels)}
        self.rows: list[np.ndarray] = []
        beyond = 0
        for word_ids, tags, cut in zip(train.word_ids, data.train.labels, train.cut, strict=True):
            self.rows.append(align_labels(word_ids, [index[tag] for tag in tags])[0])
            beyond += len(tags) - 1 - int(word_ids.max(initial=-1)) if cut else 0
        self.cut = {"words_cut_off_in_train": beyond}
        labelled = np.concatenate([target[target != IGNORE] for target in self.rows])
        self.counts = np.bincount(labelled, minlength=len(index))

    def logits(self, head: nn.Module, hidden: torch.Tensor, encoded: EncodedRows, rows: np.ndarray):
        return head(hidden)

    def targets(self, rows: np.ndarray, length: int) -> torch.Tensor:
        return torch.from_numpy(padded([self.rows[row] for row in rows], length, IGNORE))

    def scores(self, outputs: Outputs, encoded: EncodedRows) -> dict[str, Any]:
        tags = read_tags(outputs, encoded, self.validation.inputs, self.labels)
        return entity_scores(self.validation.labels, tags)


class _TextLabels:
    """TC: a label on the mean of a text's token vectors."""

    kind, metric = "text-classification", "accuracy"

    def __init__(self, data: AppData, train: EncodedRows):
        self.labels, self.validation = data.labels, data.validation
        index = {label: number for number, label in enumerate(data.labels)}
        self.rows = np.array([index[label] for label in data.train.labels])
        self.cut = {"texts_cut_off_in_train": sum(train.cut)}
        self.counts = np.bincount(self.rows, minlength=len(index))

    def logits(self, head: nn.Module, hidden: torch.Tensor, encoded: EncodedRows, rows: np.ndarray):
        mask = encoded.inputs(rows, hidden.shape[1])["attention_mask"]
        return head(mean_pool(hidden, mask.to(hidden.device)))

    def targets(self, rows: np.ndarray, length: int) -> torch.Tensor:
        return torch.from_numpy(self.rows[rows])

    def scores(self, outputs: Outputs, encoded: EncodedRows) -> dict[str, Any]:
        probabilities = np.zeros((len(self.validation), len(self.labels)), dtype=np.float32)
        for rows, logits in outputs:
            probabilities[rows] = logits.softmax(-1).cpu().numpy()
        return score_probabilities(self.validation, probabilities, self.labels)


_LABELS: dict[str, type[_WordLabels] | type[_TextLabels]] = {"ner": _WordLabels, "tc": _TextLabels}


@register_method("ner", "lora")
@register_method("tc", "lora")
def fit_lora(
    model: MtpfModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    data: AppData,
    start_from: str | None,
    settings: FitSettings,
) -> FitResult:
    """Fit an app by LoRA and leave it in the model under ``name``; see `registry.FitMethod`."""
    torch.manual_seed(settings.seed)
    family = _LABELS[data.family]
    head = AdapterHead(family.kind, data.labels, model.config.hidden_size, settings.max_length)
    add_app(model, name, head, start_from)
    model.eval()  # the frozen trunk must not drop anything
    train, validation = (
        TrunkCache(
            model,
            encode_rows(tokenizer, split.inputs, settings.max_length),
            model.adapter_depth(name),
            settings,
        )
        for split in (data.train, data.validation)
    )
    labels = family(data, train.encoded)
    weights = label_weights(labels.counts, settings.class_weights)

    def loss_of(hidden: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        logits = labels.logits(model.heads[name], hidden, train.encoded, rows).flatten(0, -2)
        return cross_entropy(logits, labels.targets(rows, hidden.shape[1]).flatten(), weights)

    def scores() -> dict[str, Any]:
        outputs = (
            (rows, labels.logits(model.heads[name], hidden, validation.encoded, rows))
            for rows, hidden in tail_outputs(model, name, validation, settings)
        )
        with torch.no_grad():
            return labels.scores(outputs, validation.encoded)

    details = train_tail(model, name, train, loss_of, lambda: scores()[labels.metric], settings)
    final = scores()
    return FitResult(final[labels.metric], final, {**details, **labels.cut})
