"""Diagnostics of a joint run: do the families pull the backbone apart, and how far did each part move?"""

from collections import defaultdict

import torch
from torch import nn

from ..configuration_mtpf import encoder_layout
from .families import FamilyBatch
from .joint import JointModel


def gradient_cosine(joint: JointModel, batches: dict[str, FamilyBatch]) -> dict[str, float]:
    """Cosine between the two families' gradients on each backbone layer, and on the whole backbone.

    Negative values are conflict. Costs one forward and one backward per family. It runs without dropout and
    leaves gradients, random numbers and modes as they were: a run is the same with and without it.

    Returns:
        ``{"embeddings": …, "layer_0": …, …, "all": …}``; empty unless exactly two families are trained.
    """
    if len(batches) != 2:
        return {}
    model = joint.model
    named = [(n, p) for n, p in model.backbone.named_parameters() if p.requires_grad and ".lora_" not in n]
    training = [module for module in joint.modules() if module.training]
    joint.eval()
    output = joint(batches)
    for module in training:
        module.training = True
    first, second = (
        torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
        for loss in output.losses.values()
    )
    prefix = encoder_layout(model.config.encoder_config.model_type).layers + "."
    dots: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    for (name, _), a, b in zip(named, first, second, strict=True):
        if a is None or b is None:
            continue
        a, b = a.double().cpu(), b.double().cpu()
        products = torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()])
        group = (
            f"layer_{name.removeprefix(prefix).split('.')[0]}" if name.startswith(prefix) else "embeddings"
        )
        dots[group] += products
        dots["all"] += products
    return {group: float(ab / (aa * bb).sqrt().clamp(min=1e-30)) for group, (ab, aa, bb) in dots.items()}


@torch.no_grad()
def adapter_movement(joint: JointModel) -> dict[str, float]:
    """How far each task-primary LoRA has come: norm of its update over the norm of the adapted weights."""
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
    """Norm of the change of the backbone's weights over their norm before."""
    change = norm = 0.0
    for name, parameter in encoder.named_parameters():
        old = before.get(name.replace(".base_layer.", "."))
        if old is not None:
            change += float((parameter.detach().float() - old.float()).norm() ** 2)
            norm += float(old.float().norm() ** 2)
    return (change / norm) ** 0.5


__all__ = ["adapter_movement", "backbone_movement", "gradient_cosine"]
