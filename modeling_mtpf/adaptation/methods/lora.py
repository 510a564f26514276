"""Fit an app by LoRA: the family's or a fresh one, and a linear head on every word or on the mean vector."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from torch import nn
from transformers import PreTrainedTokenizerBase

from ...data.app_data import AppData
from ...data.encoding import EncodedRows, encode_rows
from ...data.words import IGNORE
from ...model.adapters_mtpf import AdapterHead
from ...model.modeling_mtpf import MtpfModel, mean_pool
from ..calibration import HeldOut
from ..scoring import score_probabilities
from ..settings import FitResult, FitSettings
from ..tagged_texts import TaggedTexts
from ..tail_training import add_app, cross_entropy, label_weights, tail_outputs, train_tail
from ..trunk_cache import TrunkCache
from .registry import register_method

Outputs = Iterable[tuple[np.ndarray, torch.Tensor]]
"""Row numbers and logits, batch by batch."""


# Two classes of what differs between the families: ``metric`` is the validation score by which states and
# seeds are compared, ``counts`` the training examples of each label, ``notes`` what to record; ``logits``
# applies the head to last hidden states ``(rows, tokens, hidden)``, ``read`` collects those of validation,
# which ``scores`` and ``held_out`` take.


class _WordLabels:
    """NER: a label on the first sub-word of each word."""

    kind, metric = "token-classification", "entity_f1"
    notes: dict[str, int] = {}

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: AppData, max_length: int):
        self._train, self._validation = (
            TaggedTexts(tokenizer, split, data.labels, max_length) for split in (data.train, data.validation)
        )
        self.train, self.validation = self._train.encoded, self._validation.encoded
        self.targets = self._train.batch_targets
        labelled = np.concatenate([target[target != IGNORE] for target in self._train.targets])
        self.counts = np.bincount(labelled, minlength=len(data.labels))
        self.read, self.scores = self._validation.read, self._validation.score
        self.held_out = self._validation.held_out

    def logits(self, head: nn.Module, hidden: torch.Tensor, encoded: EncodedRows, rows: np.ndarray):
        return head(hidden)


class _TextLabels:
    """TC: a label on the mean of a text's token vectors."""

    kind, metric = "text-classification", "accuracy"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: AppData, max_length: int):
        self.train, self.validation = (
            encode_rows(tokenizer, split.inputs, max_length) for split in (data.train, data.validation)
        )
        self._data = data
        index = {label: number for number, label in enumerate(data.labels)}
        self._rows = np.array([index[label] for label in data.train.labels])
        self.notes = {"texts_cut_off_in_train": sum(self.train.cut)}
        self.counts = np.bincount(self._rows, minlength=len(index))

    def logits(self, head: nn.Module, hidden: torch.Tensor, encoded: EncodedRows, rows: np.ndarray):
        mask = encoded.inputs(rows, hidden.shape[1])["attention_mask"]
        return head(mean_pool(hidden, mask.to(hidden.device)))

    def targets(self, rows: np.ndarray, length: int) -> torch.Tensor:
        return torch.from_numpy(self._rows[rows])

    def read(self, outputs: Outputs) -> np.ndarray:
        logits = np.zeros((len(self._data.validation), len(self._data.labels)), dtype=np.float32)
        for rows, values in outputs:
            logits[rows] = values.cpu().numpy()
        return logits

    def scores(self, logits: np.ndarray) -> dict[str, Any]:
        return score_probabilities(self._data.validation, softmax(logits, axis=1), self._data.labels)

    def held_out(self, logits: np.ndarray) -> HeldOut:
        index = {label: number for number, label in enumerate(self._data.labels)}
        return HeldOut(logits, np.array([index.get(label, IGNORE) for label in self._data.validation.labels]))


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
    labels = _LABELS[data.family](tokenizer, data, settings.max_length)
    head = AdapterHead(labels.kind, data.labels, model.config.hidden_size, settings.max_length)
    add_app(model, name, head, start_from, settings.lora)
    model.eval()  # the frozen trunk must not drop anything
    depth = model.adapter_depth(name)
    train, validation = (
        TrunkCache(model, rows, depth, settings) for rows in (labels.train, labels.validation)
    )
    weights = label_weights(labels.counts, settings.class_weights)

    def loss_of(hidden: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        logits = labels.logits(model.heads[name], hidden, train.encoded, rows).flatten(0, -2)
        return cross_entropy(logits, labels.targets(rows, hidden.shape[1]).flatten(), weights)

    @torch.no_grad()
    def validated() -> Any:
        outputs = (
            (rows, labels.logits(model.heads[name], hidden, validation.encoded, rows))
            for rows, hidden in tail_outputs(model, name, validation, settings)
        )
        return labels.read(outputs)

    details = train_tail(
        model, name, train, loss_of, lambda: labels.scores(validated())[labels.metric], settings
    )
    final = validated()
    scores = labels.scores(final)
    return FitResult(scores[labels.metric], scores, {**details, **labels.notes}, labels.held_out(final))
