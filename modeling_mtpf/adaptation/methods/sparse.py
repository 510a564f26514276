"""Sparse fine-tuning: train the weight matrices to which an app's loss is most sensitive, and nothing else.

After token-driven sparse fine-tuning (arXiv 2508.08635), of which no code is public. A matrix is scored by
the dispersion of its gradient's magnitudes and by the gradient's norm.
"""

import copy
import re
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ...data.app_data import AppData
from ...data.batches import LENGTH_MULTIPLE
from ...devices import precision, wants_few_shapes
from ...errors import RecipeError
from ...model.adapters_mtpf import AdapterHead, LoraSettings, import_peft, inject_lora, lora_targets
from ...model.modeling_mtpf import MtpfModel
from ...model.trunk_mtpf import encoder_layers, lora_modules, run_layers
from ..settings import FitResult, FitSettings
from ..tail_training import shuffled_batches
from ..text_vectors import embed_texts
from .lora import TailFit, labels_of
from .probe import choose_probe, fill_head
from .registry import register_method

Weights = dict[str, nn.Parameter]
"""Path of a linear module inside the encoder → its matrix."""


@register_method("ner", "sparse", unused=["refit", "size", "lora.targets", "sparse.head_learning_rate"])
@register_method("tc", "sparse", unused=["refit", "size", "lora.targets"])
def fit_sparse(
    model: MtpfModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    data: AppData,
    start_from: str | None,
    settings: FitSettings,
) -> FitResult:
    """Fit an app by training matrices of the last layers whole, then store their change as a LoRA.

    The LoRA is the best approximation of that change by its rank; the validation score before this step is in
    the details. See `registry.FitMethod`.
    """
    torch.manual_seed(settings.seed)
    model.eval()
    labels = labels_of(tokenizer, data, settings.max_length)
    head, rate = start_head(model, tokenizer, labels, data, start_from, settings)
    depth = settings.lora.layers or LoraSettings.layers
    depth = max(depth, model.adapter_depth(start_from) if start_from else 1)
    paths = lora_targets(model.backbone, LoraSettings(layers=depth, targets=["all"]))
    layers = _dense_layers(model, depth, start_from)
    fit = TailFit(model, name, head, labels, depth, settings)
    weights = weights_of(layers, paths)
    chosen, details = choose_weights(model, fit, layers, weights, settings)
    groups = [
        {"params": [weights[path] for path in chosen], "lr": settings.sparse.learning_rate},
        {"params": list(head.parameters()), "lr": rate},
    ]
    details |= fit.fit(groups, layers)
    dense = fit.result({}, layers).score
    changes = {
        path: (weights[path] - base.weight).detach()
        for path, base in _base_layers(model, paths).items()
        if path in chosen or not torch.equal(weights[path], base.weight)
    }
    rank = settings.lora.r or LoraSettings.r
    details |= {"rank": rank, "validation_before_svd": round(dense, 4)}
    details["change_kept"] = round(_install(model, name, changes, rank), 4)
    model.heads[name] = head
    return fit.result(details)


def start_head(
    model: MtpfModel, tokenizer: Any, labels: Any, data: AppData, adapter: str | None, settings: FitSettings
) -> tuple[AdapterHead, float | None]:
    """Return a head and its learning rate: where a text has one label, it starts from a probe."""
    shape = model.config.hidden_size, settings.max_length, labels.problem_type
    head = AdapterHead(labels.kind, data.labels, *shape).to(model.device)
    if data.family != "tc" or data.multi_label:
        return head, settings.learning_rate
    shared = {key: getattr(settings, key) for key in ("max_length", "mixed_precision", "progress")}
    splits = data.train, data.validation
    train, validation = (embed_texts(model, tokenizer, s.inputs, adapter, **shared) for s in splits)
    options = settings.class_weights, settings.seed
    probe, _ = choose_probe(train, data.train.labels, validation, data.validation.labels, *options)
    fill_head(head, probe)
    return head, settings.sparse.head_learning_rate


def choose_weights(
    model: MtpfModel, fit: TailFit, layers: list[nn.Module], weights: Weights, settings: FitSettings
) -> tuple[list[str], dict[str, Any]]:
    """Return the paths of the matrices to train, and what to record of the choice.

    They are taken in the order of `SparseSettings.choice`; one that exceeds what is left of the budget is
    passed over.

    Raises:
        RecipeError: The budget has no room for any.
    """
    sparse, paths = settings.sparse, list(weights)
    scores: dict[str, float] = {}
    if sparse.choice in ("score", "worst"):
        scores = weight_scores(model, fit, layers, weights, settings)
        order = sorted(paths, key=lambda path: scores[path], reverse=sparse.choice == "score")
    elif sparse.choice == "random":
        order = [paths[i] for i in np.random.default_rng([settings.seed, 4]).permutation(len(paths))]
    else:
        order = sorted(paths, key=lambda path: -int(re.search(r"\d+", path)[0]))  # type: ignore[index]
    size = sum(p.numel() for key, p in model.backbone.named_parameters() if ".lora_" not in key)
    left, chosen = sparse.budget * size, []
    for path in order:
        if weights[path].numel() <= left:
            left -= weights[path].numel()
            chosen.append(path)
    if not chosen:
        least = min(weight.numel() for weight in weights.values()) / size
        raise RecipeError(
            f"sparse.budget is {sparse.budget:g} of this encoder, but its smallest matrix is {least:.4f} of "
            "it; raise it."
        )
    trained = sum(weights[path].numel() for path in chosen)
    details: dict[str, Any] = {"trained": sorted(chosen), "trained_share": round(trained / size, 4)}
    return chosen, details | {"weight_scores": {path: round(scores[path], 4) for path in scores}}


def weight_scores(
    model: MtpfModel, fit: TailFit, layers: list[nn.Module], weights: Weights, settings: FitSettings
) -> dict[str, float]:
    """Return the sensitivity of each matrix: S = D / max D + beta · G / max G.

    Over some batches, |g| the mean magnitude of the gradient of each entry: D = var |g| / mean |g| over the
    entries, and G the mean of the gradient's norm, divided by the square root of the number of entries.
    """
    sizes = torch.zeros(2, len(weights))
    magnitudes = {path: torch.zeros_like(weight) for path, weight in weights.items()}
    few = wants_few_shapes(model.device, settings.mixed_precision)
    batches = shuffled_batches(
        fit.train.encoded.lengths,
        settings.batch_size,
        settings.max_length,
        np.random.default_rng([settings.seed, 3]),
        LENGTH_MULTIPLE if few else 1,
    )
    for weight in weights.values():
        weight.requires_grad_(True)
    for (rows, length), _ in zip(batches, range(settings.sparse.score_batches), strict=False):
        trunk = fit.train.batch(rows, length)
        with precision(model.device, settings.mixed_precision):
            hidden = run_layers(model.backbone, trunk, layers)
        gradients = torch.autograd.grad(fit.loss_of(hidden.float(), rows), list(weights.values()))
        for number, (path, gradient) in enumerate(zip(weights, gradients, strict=True)):
            magnitudes[path] += gradient.abs()
            sizes[1, number] += gradient.norm().cpu() / gradient.numel() ** 0.5
    for weight in weights.values():
        weight.requires_grad_(False)
    for number, value in enumerate(magnitudes.values()):
        sizes[0, number] = (value.var() / value.mean().clamp(min=1e-30)).cpu()
    dispersion, norm = sizes / sizes.amax(1, keepdim=True).clamp(min=1e-30)
    return dict(zip(weights, (dispersion + settings.sparse.beta * norm).tolist(), strict=True))


def weights_of(layers: list[nn.Module], paths: list[str]) -> Weights:
    """Return the matrices at these paths of the encoder, of which ``layers`` are the last ones."""
    numbers = sorted({int(re.search(r"\d+", path)[0]) for path in paths})  # type: ignore[index]
    found: Weights = {}
    for path in paths:
        number, inner = re.search(r"(\d+)\.(.+)", path).groups()  # type: ignore[union-attr]
        module: Any = layers[int(number) - numbers[0]].get_submodule(inner)
        found[path] = module.weight
    return found


def _dense_layers(model: MtpfModel, depth: int, start: str | None) -> list[nn.Module]:
    """Return copies of the last layers without LoRA; that of ``start`` is added to their matrices."""
    layers = []
    for layer in list(encoder_layers(model.backbone))[-depth:]:
        loras = [p for path, module in lora_modules(layer) for p in module.parameters() if "lora" in path]
        layer = copy.deepcopy(layer, {id(p): p for p in loras})
        for path, module in list(lora_modules(layer)):
            base = module.get_base_layer()
            if start in module.lora_A:
                base.weight.data += module.get_delta_weight(start).detach()
            parent, _, child = path.rpartition(".")
            setattr(layer.get_submodule(parent), child, base)
        layers.append(layer.eval().requires_grad_(False))
    return layers


def _base_layers(model: MtpfModel, paths: list[str]) -> dict[str, Any]:
    modules = {path: model.backbone.get_submodule(path) for path in paths}
    return {path: getattr(module, "base_layer", module) for path, module in modules.items()}


def _install(model: MtpfModel, name: str, changes: dict[str, torch.Tensor], rank: int) -> float:
    """Put changes of matrices into the model as a LoRA; return the share of their squares that it holds."""
    config = import_peft().LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(changes), task_type="FEATURE_EXTRACTION"
    )
    inject_lora(model.backbone, name, config, trainable=True)
    kept = total = 0.0
    for path, module in lora_modules(model.backbone):
        if name not in module.lora_A:
            continue
        left, size, right = torch.linalg.svd(changes[path].float(), full_matrices=False)
        kept, total = kept + float((size[:rank] ** 2).sum()), total + float((size**2).sum())
        root = size[:rank].sqrt()
        with torch.no_grad():
            for part, value in (
                (module.lora_A, root[:, None] * right[:rank]),
                (module.lora_B, left[:, :rank] * root),
            ):
                part[name].weight.zero_()  # a matrix may have fewer rows than the rank
                part[name].weight[: value.shape[0], : value.shape[1]].copy_(value)
    return kept / total if total else 1.0
