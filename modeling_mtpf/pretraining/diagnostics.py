"""Diagnostics of a joint run: whether the families pull the backbone apart, and how far each part moved."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..model.configuration_mtpf import encoder_layout
from ..model.trunk_mtpf import adapter_view, encoder_layers, run_trunk
from .chunks import ChunkShape, JointBatch, plan_chunks
from .joint import JointModel


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True


def gradient_cosine(joint: JointModel, batch: JointBatch, shape: ChunkShape) -> dict[str, float]:
    """Return the cosine between the two families' gradients; negative values are conflict.

    Costs about one step. It runs without dropout and leaves gradients, random numbers and modes as they were.

    Returns:
        ``{"embeddings": …, "layer_0": …, …, "all": …}``; empty unless exactly two families are trained.
    """
    if len(batch.batches) != 2:
        return {}
    model = joint.model
    named = [(n, p) for n, p in model.backbone.named_parameters() if p.requires_grad and ".lora_" not in n]
    device, gradients = next(model.parameters()).device, []
    with _without_dropout(joint):
        for name, rows in batch.batches.items():
            alone = plan_chunks({name: rows}, shape, model.config.pad_token_id or 0).to(device)
            loss = joint(alone).losses[name]
            gradients.append(torch.autograd.grad(loss, [p for _, p in named], allow_unused=True))
    prefix = encoder_layout(model.config.encoder_config.model_type).layers + "."
    dots: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    for (name, _), a, b in zip(named, *gradients, strict=True):
        if a is None or b is None:
            continue
        products = torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]).double().cpu()
        layer = name.removeprefix(prefix).split(".")[0]
        for group in (f"layer_{layer}" if name.startswith(prefix) else "embeddings", "all"):
            dots[group] += products
    return {group: float(ab / (aa * bb).sqrt().clamp(min=1e-30)) for group, (ab, aa, bb) in dots.items()}


@torch.no_grad()
def tail_similarity(joint: JointModel, batch: JointBatch) -> dict[str, float]:
    """Return the linear CKA (arXiv 1905.00414) of two families' states of the same tokens, per tail layer.

    1 means that the families' LoRA leave the tails alike. Costs about a forward of the batch: with fewer
    tokens than features CKA would be high by itself.

    Returns:
        ``{"layer_4": …, "layer_5": …}``; empty unless two families have a LoRA.
    """
    adapters = [name for name in joint.adapters.values() if name][:2]
    if len(adapters) < 2:
        return {}
    encoder = joint.model.backbone
    first = len(encoder_layers(encoder)) - joint.depth
    states: dict[tuple[int, str], list[torch.Tensor]] = defaultdict(list)
    with _without_dropout(joint):
        for chunk in batch.chunks:
            real = chunk.inputs["attention_mask"].bool()
            trunk = run_trunk(encoder, joint.depth, **chunk.inputs)
            for adapter in adapters:
                hidden = trunk.hidden_states
                for layer, (args, kwargs) in enumerate(trunk.calls, start=first):
                    view = adapter_view(encoder_layers(encoder)[layer], adapter)
                    hidden = view(hidden, *args, **kwargs)
                    states[layer, adapter].append(hidden[real].float())
    return {
        f"layer_{layer}": linear_cka(*(torch.cat(states[layer, adapter]) for adapter in adapters))
        for layer in range(first, first + joint.depth)
    }


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the linear centred kernel alignment of two sets of states, each ``(examples, features)``.

    Example:
        >>> x = torch.randn(100, 4)
        >>> round(linear_cka(x, 3 * x + 1), 4)
        1.0
    """
    with torch.autocast(x.device.type, enabled=False):
        x, y = x - x.mean(0), y - y.mean(0)
        return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()).clamp(min=1e-30))


@torch.no_grad()
def adapter_movement(joint: JointModel) -> dict[str, float]:
    """Return for each task-primary LoRA the norm of its update over the norm of the adapted weights."""
    movement = {}
    for name in joint.model.adapters:
        update = base = 0.0
        for module in joint.model.backbone.modules():
            if hasattr(module, "lora_A") and name in module.lora_A:
                update += float(module.get_delta_weight(name).float().norm() ** 2)
                base += float(module.get_base_layer().weight.float().norm() ** 2)
        movement[name] = (update / base) ** 0.5
    return movement


def backbone_movement(before: dict[str, torch.Tensor], encoder: nn.Module) -> float:
    """Return the norm of the change of the backbone's weights over their norm before."""
    change = norm = 0.0
    for name, parameter in encoder.named_parameters():
        old = before.get(name.replace(".base_layer.", "."))
        if old is not None:
            change += float((parameter.detach().float() - old.float()).norm() ** 2)
            norm += float(old.float().norm() ** 2)
    return (change / norm) ** 0.5
