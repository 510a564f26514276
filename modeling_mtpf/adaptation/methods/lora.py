"""Fit an app by LoRA: the family's or a fresh one, and a linear head on every word or on the mean vector."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from torch import nn
from transformers import PreTrainedTokenizerBase

from ...data.app_data import AppData, Examples
from ...data.encoding import EncodedRows, encode_rows
from ...data.label_sets import label_matrix
from ...data.words import IGNORE
from ...model.adapters_mtpf import AdapterHead
from ...model.modeling_mtpf import MtpfModel, mean_pool
from ...model.schemas_mtpf import MULTI_LABEL
from ...model.trunk_mtpf import encoder_layers
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


def label_kind(data: AppData) -> type[_WordLabels] | type[_TextLabels]:
    """Return the class of the labels of an app's data."""
    if data.family == "ner":
        return _WordLabels
    return _LabelSets if data.multi_label else _TextLabels


def labels_of(tokenizer: PreTrainedTokenizerBase, data: AppData, max_length: int) -> Any:
    """Return rows and labels of an app: `_WordLabels`, `_TextLabels` or `_LabelSets`."""
    return label_kind(data)(tokenizer, data, max_length)


class TailFit:
    """Fits what is above a trunk, and scores it on validation.

    Args:
        model: In eval mode: the frozen trunk must not drop anything.
        name: The app.
        head: Of the app.
        labels: From `labels_of`.
        rows: Class of the trunk's outputs.
        depth: Layers above the trunk.
        settings: Of the fit.
    """

    def __init__(
        self,
        model: MtpfModel,
        name: str,
        head: AdapterHead,
        labels: Any,
        depth: int,
        settings: FitSettings,
        rows: type[TrunkCache] = TrunkCache,
    ):
        self._model, self._name, self._head, self._labels = model, name, head, labels
        self._settings = settings
        self.train, self._validation = (
            rows(model, encoded, depth, settings) for encoded in (labels.train, labels.validation)
        )
        self._weights = labels.weights(settings.class_weights)

    def loss_of(self, hidden: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """Return the loss of last hidden states ``(rows, tokens, hidden)`` of training rows."""
        logits = self._labels.logits(self._head, hidden, self.train.encoded, rows)
        return self._labels.loss(logits, self._labels.targets(rows, hidden.shape[1]), self._weights)

    @torch.no_grad()
    def _validated(self, layers: list[nn.Module] | None) -> Any:
        tail = adapter_tail(self._model, self._name, self._settings, layers)
        outputs = (
            (rows, self._labels.logits(self._head, hidden, self._validation.encoded, rows))
            for rows, hidden in tail_outputs(tail, self._validation, self._settings)
        )
        return self._labels.read(outputs)

    def fit(
        self,
        groups: list | None = None,
        layers: list[nn.Module] | None = None,
        until: int | None = None,
    ) -> dict[str, Any]:
        """Train and return what `train_tail` does; see its arguments."""

        def score() -> float:
            return self._labels.scores(self._validated(layers))[self._labels.metric]

        steps = train_tail(
            self._model, self._name, self.train, self.loss_of, score, self._settings, groups, layers, until
        )
        self._head.eval()
        return steps

    def result(self, details: dict[str, Any], layers: list[nn.Module] | None = None) -> FitResult:
        """Return the scores of the app as it is."""
        final = self._validated(layers)
        scores = self._labels.scores(final)
        details = {**details, **self._labels.notes}
        return FitResult(scores[self._labels.metric], scores, details, self._labels.held_out(final))


@register_method("ner", "lora", unused=["sparse"])
@register_method("tc", "lora", unused=["sparse"])
def fit_lora(
    model: MtpfModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    data: AppData,
    start_from: str | None,
    settings: FitSettings,
) -> FitResult:
    """Fit an app by LoRA and leave it in the model under ``name``; see `registry.FitMethod`."""
    fit = _start(model, tokenizer, name, data, start_from, settings)
    result = fit.result(fit.fit())
    if settings.refit:
        steps, best = settings.steps_for(len(fit.train.encoded)), result.details["best_step"]
        result.refit = partial(
            _refit, partial(_start, model, tokenizer, name), data, start_from, settings, steps, best
        )
    return result


def _refit(
    start: Callable, data: AppData, start_from: str | None, settings: FitSettings, steps: int, best: int
) -> None:
    """Fit on train and validation, for as many passes over both as the ``best`` of ``steps`` was on train."""
    more = data.validation
    if data.family == "tc" and not data.multi_label:  # a label that train lacks has no number
        more = more.take([row for row, label in enumerate(more.labels) if label in data.labels])
    both = [*data.train.inputs, *more.inputs], [*data.train.labels, *more.labels]
    longer = 1 + len(more) / len(data.train)
    again = replace(data, train=Examples(*both), validation=data.validation.take([]))
    settings = replace(settings, steps=round(steps * longer))
    start(again, start_from, settings).fit(until=round(best * longer))


def _start(
    model: MtpfModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    data: AppData,
    start_from: str | None,
    settings: FitSettings,
) -> TailFit:
    """Put a LoRA and a head that have learned nothing into the model."""
    torch.manual_seed(settings.seed)
    labels = labels_of(tokenizer, data, settings.max_length)
    options = model.config.hidden_size, settings.max_length, labels.problem_type
    head = AdapterHead(labels.kind, data.labels, *options)
    shape = settings.shape(len(encoder_layers(model.backbone)), started=start_from is not None)
    add_app(model, name, head, start_from, shape)
    model.eval()
    return TailFit(model, name, head, labels, model.adapter_depth(name), settings)
