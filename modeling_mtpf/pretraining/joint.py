"""The joint step: rows of all families through one trunk, each family's rows through its own tail, one loss.

One forward covers all families, so that one backward fills all gradients and distributed training needs no
flag. The backbone receives the sum of the families' gradients, the task-primary LoRA of a family its own
only.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..modeling_mtpf import MtpfModel
from ..trunk_mtpf import run_tail, run_trunk
from .families import Family, FamilyBatch

REGIMES = ("base", "naive", "tpl")
"""Regimes besides those named like a family: nothing trained; all families without TPL; all with TPL."""


@dataclass
class JointOutput:
    """Result of one joint forward.

    Attributes:
        loss: The weighted sum over families, a scalar with gradient.
        losses: Unweighted loss of each family, with gradient.
        metrics: Per family, detached scalars.
    """

    loss: torch.Tensor
    losses: dict[str, torch.Tensor]
    metrics: dict[str, dict[str, torch.Tensor]]


class JointModel(nn.Module):
    """The backbone with all families' objectives: what the optimiser and DDP see.

    Args:
        model: The backbone. With ``task_primary`` a fresh LoRA per family is added to it.
        families: The families to train, prepared.
        task_primary: Whether each family gets a LoRA of its own (regime ``tpl``).

    Example:
        >>> joint = JointModel(model, [ner, tc], task_primary=True)  # doctest: +SKIP
        >>> joint({"ner": ner.batch(0), "tc": tc.batch(0)}).loss.backward()  # doctest: +SKIP
    """

    def __init__(self, model: MtpfModel, families: list[Family], task_primary: bool):
        super().__init__()
        self.model = model
        self.weights = {family.name: family.settings.weight for family in families}
        hidden = model.config.hidden_size
        self.objectives = nn.ModuleDict({family.name: family.objective(hidden) for family in families})
        self.adapters: dict[str, str | None] = dict.fromkeys(self.weights)
        for family in families if task_primary else []:
            model.add_adapter(family.name, family.settings.lora)
            self.adapters[family.name] = family.name
        self.depth = max((model.adapter_depth(name) for name in model.adapters), default=1)
        pooler = getattr(model.backbone, "pooler", None)
        if pooler is not None:  # no family uses it; a parameter without gradient would stop DDP
            pooler.requires_grad_(False)

    def forward(self, batches: dict[str, FamilyBatch]) -> JointOutput:
        """Run one joint step's forward on a batch of each family."""
        inputs, spans = join_batches(batches, self.model.config.pad_token_id or 0)
        trunk = run_trunk(self.model.backbone, self.depth, **inputs)
        losses: dict[str, torch.Tensor] = {}
        metrics: dict[str, dict[str, torch.Tensor]] = {}
        for name, (start, stop) in spans.items():
            hidden = run_tail(self.model.backbone, trunk.rows(start, stop), self.adapters[name])
            length = batches[name].inputs["input_ids"].shape[1]
            mask = batches[name].inputs["attention_mask"]
            losses[name], metrics[name] = self.objectives[name](
                hidden[:, :length], mask, batches[name].targets
            )
        loss = torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()
        return JointOutput(loss, losses, metrics)


def join_batches(
    batches: dict[str, FamilyBatch], pad_token_id: int
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, int]]]:
    """Put the families' rows below each other, padded to the longest.

    Returns:
        The encoder inputs, each ``(all rows, tokens)``, and for each family its first row and the one after
        its last.
    """
    length = max(batch.inputs["input_ids"].shape[1] for batch in batches.values())
    columns: dict[str, list[torch.Tensor]] = {}
    spans: dict[str, tuple[int, int]] = {}
    start = 0
    for name, batch in batches.items():
        rows, own = batch.inputs["input_ids"].shape
        for key, value in batch.inputs.items():
            fill = pad_token_id if key == "input_ids" else 0
            columns.setdefault(key, []).append(nn.functional.pad(value, (0, length - own), value=fill))
        spans[name] = (start, start + rows)
        start += rows
    return {key: torch.cat(values) for key, values in columns.items()}, spans


def parameter_groups(
    joint: JointModel, learning_rate: float, adapter_learning_rate: float, weight_decay: float
):
    """Group all trainable parameters by name: backbone and new parameters, with and without weight decay.

    LoRA and heads start from nothing and learn ten times faster (our assumption). Biases and norms have no
    weight decay, nor has LoRA. Grouping by name, once, keeps every adapter in the optimiser: grouping by
    ``requires_grad`` after an adapter switch would lose all but one (peft#1303).
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in joint.named_parameters():
        if parameter.requires_grad:
            fresh = "lora_" in name or name.startswith("objectives.")
            groups.setdefault((fresh, parameter.dim() > 1 and not fresh), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": adapter_learning_rate if fresh else learning_rate,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (fresh, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def families_of_regime(regime: str, families: list[str]) -> list[str]:
    """Return the families that a regime trains, or raise for an unknown regime.

    Example:
        >>> families_of_regime("ner", ["ner", "tc"]), families_of_regime("tpl", ["ner", "tc"])
        (['ner'], ['ner', 'tc'])
    """
    if regime == "base":
        return []
    return list(families) if regime in REGIMES else [regime]


__all__ = [
    "REGIMES",
    "JointModel",
    "JointOutput",
    "families_of_regime",
    "join_batches",
    "parameter_groups",
]
