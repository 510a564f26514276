"""Standalone apps: sparse fine-tuning of a whole encoder, with new tokens for the texts of the app."""

import re
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
from .trunk_cache import TrainedTrunk


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
        settings: ``sparse`` says what is trained: the best matrices of all layers and the vectors of new
            tokens; with a budget of 1 everything.
    """
    torch.manual_seed(settings.seed)
    model, sparse = own_model(base, share=False).eval().requires_grad_(False), settings.sparse
    encoder, patterns = model.backbone, None
    if sparse.vocabulary:
        pairs = zip(data.train.inputs, data.train.labels, strict=True)
        texts = (text_and_spans(*pair)[0] if data.family == "ner" else pair[0] for pair in pairs)
        patterns = mine_tokens(texts, tokenizer, sparse.vocabulary, data.family == "ner", settings.seed)
    tokens = patterns.tokens if patterns else []
    before = len(encoder.get_input_embeddings().weight)
    if tokens:
        old, tokenizer = tokenizer, add_tokens(tokenizer, tokens)
        new_rows = _grow(encoder, old, tokenizer, tokens)
    labels = labels_of(tokenizer, data, settings.max_length)
    head, rate = start_head(model, tokenizer, labels, data, None, settings)
    layers = list(encoder_layers(encoder))
    everything = sparse.budget == 1
    trained_trunk = bool(tokens) or everything
    rows: dict[str, Any] = {"rows": TrainedTrunk} if trained_trunk else {}
    fit = TailFit(model, name, head, labels, len(layers), settings, **rows)
    details: dict[str, Any] = {"tokens": len(tokens), "rows_before": before}
    hook = None
    if everything:
        named = [(key, p) for key, p in encoder.named_parameters() if not key.startswith("pooler.")]
        trained = [p for _, p in named]
    else:
        paths = lora_targets(encoder, LoraSettings(layers=len(layers), targets=["all"]))
        weights = weights_of(layers, paths)
        chosen, chosen_details = choose_weights(model, fit, layers, weights, settings)
        details |= chosen_details
        trained = [weights[path] for path in chosen]
        if tokens:
            vectors = nn.Parameter(encoder.get_input_embeddings().weight[new_rows].clone())
            hook = encoder.get_input_embeddings().register_forward_hook(_with_rows(vectors, new_rows))
            trained.append(vectors)
        else:  # what is below the lowest one is frozen, and computed once
            lowest = min(int(re.search(r"\d+", path)[0]) for path in chosen)  # type: ignore[index]
            layers = layers[lowest:]
            fit = TailFit(model, name, head, labels, len(layers), settings)
    groups = [
        {"params": trained, "lr": sparse.learning_rate},
        {"params": list(head.parameters()), "lr": rate},
    ]
    try:
        details |= fit.fit(groups, layers)
    finally:
        if hook is not None:
            hook.remove()
    for parameter in trained:
        parameter.requires_grad_(False)
    if hook is not None:
        encoder.get_input_embeddings().weight.data[new_rows] = vectors.data
    result = fit.result(details, layers)
    if result.held_out is not None:
        result.calibration = calibrate(head, result.held_out)
    dtype = _round(base, model, head, settings)
    finish(model, name, head, tokenizer)
    return Standalone(model, tokenizer, result, patterns, dtype)


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


def _with_rows(vectors: nn.Parameter, rows: slice) -> Any:
    """Return a hook by which an embedding takes these rows from elsewhere: only they get gradients."""

    def replaced(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        ids = inputs[0]
        new = (ids >= rows.start) & (ids < rows.stop)
        return output.masked_scatter(new.unsqueeze(-1), vectors[ids[new] - rows.start])

    return replaced


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
