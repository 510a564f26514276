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
from ...data.label_sets import label_matrix
from ...data.words import IGNORE
from ...model.adapters_mtpf import AdapterHead
from ...model.modeling_mtpf import MtpfModel, mean_pool
from ...model.schemas_mtpf import MULTI_LABEL
from ..calibration import HeldOut
from ..scoring import score_probabilities
from ..settings import FitResult, FitSettings
from ..tagged_texts import TaggedTexts
from ..tail_training import adapter_tail, add_app, cross_entropy, label_weights, tail_outputs, train_tail
from ..trunk_cache import TrunkCache
from .registry import register_method

Outputs = Iterable[tuple[np.ndarray, torch.Tensor]]
"""Row numbers and logits, batch by batch."""


# Classes of what differs between the families: ``metric`` is the validation score by which states and seeds
# are compared, ``weights`` those of the labels in the ``loss``, ``notes`` what to record; ``logits`` applies
# the head to last hidden states ``(rows, tokens, hidden)``, ``read`` collects those of validation, which
# ``scores`` and ``held_out`` take.


class _WordLabels:
    """NER: a label on the first sub-word of each word."""

    kind, metric = "token-classification", "entity_f1"
    problem_type: str | None = None
    notes: dict[str, int] = {}

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: AppData, max_length: int):
        self._train, self._validation = (
            TaggedTexts(tokenizer, split, data.labels, max_length) for split in (data.train, data.validation)
        )
        self.train, self.validation = self._train.encoded, self._validation.encoded
        self.targets = self._train.batch_targets
        labelled = np.concatenate([target[target != IGNORE] for target in self._train.targets])
        self._counts = np.bincount(labelled, minlength=len(data.labels))
        self.read, self.scores = self._validation.read, self._validation.score
        self.held_out = self._validation.held_out

    def weights(self, kind: str) -> torch.Tensor | None:
        return label_weights(self._counts, kind)

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        return cross_entropy(logits.flatten(0, -2), targets.flatten(), weights)

    def logits(self, head: nn.Module, hidden: torch.Tensor, encoded: EncodedRows, rows: np.ndarray):
        return head(hidden)


class _TextLabels:
    """TC: a label on the mean of a text's token vectors."""

    kind, metric = "text-classification", "accuracy"
    problem_type: str | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: AppData, max_length: int):
        self._encode(tokenizer, data, max_length)
        index = {label: number for number, label in enumerate(data.labels)}
        self._rows = np.array([index[label] for label in data.train.labels])
        self._counts = np.bincount(self._rows, minlength=len(index))

    def _encode(self, tokenizer: PreTrainedTokenizerBase, data: AppData, max_length: int) -> None:
        self.train, self.validation = (
            encode_rows(tokenizer, split.inputs, max_length) for split in (data.train, data.validation)
        )
        self._data = data
        self.notes = {"texts_cut_off_in_train": sum(self.train.cut)}

    def weights(self, kind: str) -> torch.Tensor | None:
        return label_weights(self._counts, kind)

    def logits(self, head: nn.Module, hidden: torch.Tensor, encoded: EncodedRows, rows: np.ndarray):
        mask = encoded.inputs(rows, hidden.shape[1])["attention_mask"]
        return head(mean_pool(hidden, mask.to(hidden.device)))

    def targets(self, rows: np.ndarray, length: int) -> torch.Tensor:
        return torch.from_numpy(self._rows[rows])

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        return cross_entropy(logits, targets, weights)

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


class _LabelSets(_TextLabels):
    """TC with any number of labels a text."""

    metric, problem_type = "average_precision", MULTI_LABEL

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: AppData, max_length: int):
        self._encode(tokenizer, data, max_length)
        self._rows = label_matrix(data.train.labels, data.labels)

    def weights(self, kind: str) -> torch.Tensor | None:
        counts = self._rows.sum(0)
        if kind == "none":
            return None
        return torch.from_numpy((len(self._rows) - counts) / np.maximum(counts, 1)).float()

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        weights = None if weights is None else weights.to(logits.device)
        targets = targets.to(logits.device, torch.float32)
        return nn.functional.binary_cross_entropy_with_logits(logits.float(), targets, pos_weight=weights)

    def scores(self, logits: np.ndarray) -> dict[str, Any]:
        return self.held_out(logits).set_scores()

    def held_out(self, logits: np.ndarray) -> HeldOut:
        return HeldOut(logits, label_matrix(self._data.validation.labels, self._data.labels))


def labels_of(data: AppData) -> type[_WordLabels] | type[_TextLabels]:
    """Return the class of the labels of an app's data."""
    if data.family == "ner":
        return _WordLabels
    return _LabelSets if data.multi_label else _TextLabels


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
    labels = labels_of(data)(tokenizer, data, settings.max_length)
    options = model.config.hidden_size, settings.max_length, labels.problem_type
    head = AdapterHead(labels.kind, data.labels, *options)
    add_app(model, name, head, start_from, settings.lora)
    model.eval()  # the frozen trunk must not drop anything
    depth = model.adapter_depth(name)
    train, validation = (
        TrunkCache(model, rows, depth, settings) for rows in (labels.train, labels.validation)
    )
    weights, tail = labels.weights(settings.class_weights), adapter_tail(model, name, settings)

    def loss_of(hidden: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        logits = labels.logits(model.heads[name], hidden, train.encoded, rows)
        return labels.loss(logits, labels.targets(rows, hidden.shape[1]), weights)

    @torch.no_grad()
    def validated() -> Any:
        outputs = (
            (rows, labels.logits(model.heads[name], hidden, validation.encoded, rows))
            for rows, hidden in tail_outputs(tail, validation, settings)
        )
        return labels.read(outputs)

    details = train_tail(
        model, name, train, loss_of, lambda: labels.scores(validated())[labels.metric], settings
    )
    final = validated()
    scores = labels.scores(final)
    return FitResult(scores[labels.metric], scores, {**details, **labels.notes}, labels.held_out(final))
