"""Standalone apps: sparse fine-tuning of a whole encoder, with new tokens for the texts of the app."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.app_data import AppData
from ..data.spans import text_and_spans
from ..model.adapters_mtpf import LoraSettings, lora_targets
from ..model.backbone_identity_mtpf import backbone_state_dict
from ..model.delta_mtpf import add_tokens, embedding_key, finish, own_model, set_tensor
from ..model.modeling_mtpf import MtpfModel
from ..model.trunk_mtpf import encoder_layers
from .calibration import calibrate
from .methods.lora import TailFit, labels_of
from .methods.sparse import choose_weights, start_head, weights_of
from .rounding import round_to_stored
from .settings import FitResult, FitSettings
from .tokens import Patterns, mine_tokens
from .trunk_cache import TrainedTrunk, TrunkCache


@dataclass
class Standalone:
    """A fitted standalone app: model, tokenizer, scores, what was mined, and the type to store."""

    model: MtpfModel
    tokenizer: PreTrainedTokenizerBase
    result: FitResult
    patterns: Patterns | None
    dtype: torch.dtype


def fit_standalone(
    base: MtpfModel, tokenizer: PreTrainedTokenizerBase, name: str, data: AppData, settings: FitSettings
) -> Standalone:
    """Fit an app with an encoder of its own that differs from the backbone as little as the budget says.

    Args:
        base: The backbone, which stays as it is.
        tokenizer: The backbone's.
        name: Of the app.
        data: Of the app.
        settings: ``sparse`` says what is trained: the best matrices of all layers, or of the last
            ``lora.layers``, and the vectors of new tokens; with a budget of 1 and all layers everything.
    """
    torch.manual_seed(settings.seed)
    model, sparse = own_model(base, share=False).eval().requires_grad_(False), settings.sparse
    encoder, patterns, old = model.backbone, None, tokenizer
    if sparse.vocabulary:
        patterns = mine_tokens(_texts(data), old, sparse.vocabulary, data.family == "ner", settings.seed)
    tokens = patterns.tokens if patterns else []
    details: dict[str, Any] = {"tokens": len(tokens)}
    if tokens:
        tokenizer = add_tokens(old, tokens)
        new_rows = _grow(encoder, old, tokenizer, tokens)
    labels = labels_of(tokenizer, data, settings.max_length)
    head, rate = start_head(model, tokenizer, labels, data, None, settings)
    layers = list(encoder_layers(encoder))
    depth = settings.lora.layers or len(layers)
    paths = lora_targets(encoder, LoraSettings(layers=depth, targets=["all"]))  # raises for too many layers
    everything = sparse.budget == 1 and settings.lora.layers is None
    upper, rows = layers[-depth:], TrainedTrunk if tokens or everything else TrunkCache
    if not rows.trained:  # what is below the matrices that compete is frozen, and computed once
        layers = upper
    fit = TailFit(model, name, head, labels, len(layers), settings, rows)
    if everything:
        trained = [p for key, p in encoder.named_parameters() if not key.startswith("pooler.")]
    else:
        weights = weights_of(upper, paths)
        chosen, chosen_details = choose_weights(model, fit, layers, weights, settings)
        details |= chosen_details
        trained = [weights[path] for path in chosen]
        lowest = min(int(re.search(r"\d+", path)[0]) for path in chosen)  # type: ignore[index]
        frozen = lowest - (len(encoder_layers(encoder)) - len(layers))
        if frozen and not tokens:  # so is what is below the lowest one that is trained
            layers = layers[frozen:]
            fit = TailFit(model, name, head, labels, len(layers), settings)
    with ExitStack() as stack:
        if tokens and not everything:
            trained.append(stack.enter_context(_rows_apart(encoder.get_input_embeddings(), new_rows)))
        heads = {"params": list(head.parameters()), "lr": rate}
        details |= fit.fit([{"params": trained, "lr": sparse.learning_rate}, heads], layers)
    for parameter in trained:
        parameter.requires_grad_(False)
    result = fit.result(details, layers)
    if result.held_out is not None:
        result.calibration = calibrate(head, result.held_out)
    dtype = _round(base, model, head, settings)
    finish(model, name, head, tokenizer)
    return Standalone(model, tokenizer, result, patterns, dtype)


def _texts(data: AppData) -> Iterator[str]:
    """Yield the training texts of an app."""
    for inputs, labels in zip(data.train.inputs, data.train.labels, strict=True):
        yield text_and_spans(inputs, labels)[0] if data.family == "ner" else inputs


def _grow(encoder: Any, old: Any, tokenizer: Any, tokens: list[str]) -> slice:
    """Give new tokens rows of the embedding that start as the mean of their pieces; return these rows."""
    first, key = tokenizer.convert_tokens_to_ids(tokens[0]), embedding_key(encoder)
    weight = encoder.get_input_embeddings().weight
    rows = slice(first, first + len(tokens))
    grown = weight.new_zeros(max(len(weight), rows.stop), weight.shape[1])
    grown[: len(weight)] = weight
    for number, token in enumerate(tokens):
        pieces = old(token, add_special_tokens=False)["input_ids"]
        grown[first + number] = weight[pieces].mean(0)
    set_tensor(encoder, key, grown)
    return rows


@contextmanager
def _rows_apart(embedding: Any, rows: slice) -> Iterator[nn.Parameter]:
    """Let an embedding take these rows from a parameter of their own, so that only they get gradients."""
    vectors = nn.Parameter(embedding.weight[rows].clone())

    def replaced(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        ids = inputs[0]
        new = (ids >= rows.start) & (ids < rows.stop)
        return output.masked_scatter(new.unsqueeze(-1), vectors[ids[new] - rows.start])

    hook = embedding.register_forward_hook(replaced)
    try:
        yield vectors
    finally:
        hook.remove()
        embedding.weight.data[rows] = vectors.data


def _round(base: MtpfModel, model: MtpfModel, head: nn.Module, settings: FitSettings) -> torch.dtype:
    """Round what has changed to the values in which it will be stored; return their type."""
    before = backbone_state_dict(base.backbone)
    changed = []
    for key, value in backbone_state_dict(model.backbone).items():
        old = before[key]
        if not torch.equal(value[: len(old)] if value.dim() else value, old):
            changed.append(value)
        elif value.shape != old.shape:
            changed.append(value[len(old) :])
    return round_to_stored([*changed, *head.parameters()], settings)
