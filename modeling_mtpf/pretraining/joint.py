"""The joint step: rows of all families through one trunk, each family's rows through its own tail, one loss.

One forward covers all families, so that one backward fills all gradients and distributed training needs no
flag. The backbone receives the sum of the families' gradients, the task-primary LoRA of a family only its
own.

**Gradient caching.** A contrastive batch should be large, and its loss needs the vectors of the whole batch,
but not the activations. With ``recompute`` each chunk of rows runs under PyTorch's activation checkpointing:
only what the losses need of each row is kept; the loss over all rows gives the gradient of each; in the
backward pass one chunk after the other is computed again, with the same dropout, and its activations are
freed. That is the gradient cache of arXiv 2101.06983, exact, inside one ordinary backward, so that DDP,
gradient accumulation and losses of several families need nothing special.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..model.modeling_mtpf import MtpfModel
from ..model.trunk_mtpf import encoder_layers, run_tail, run_trunk
from .chunks import Chunk, JointBatch
from .families.base import Family

REGIMES = ("base", "naive", "tpl")
"""Regimes besides those named like a family: nothing trained; all families without TPL; all with TPL."""


@dataclass
class JointOutput:
    """Result of one joint forward.

    Attributes:
        loss: The weighted sum over families, a scalar with gradient.
        losses: Unweighted loss of each family, with gradient.
        metrics: Per family, detached scalars.
        rows: Per family what the loss saw of each row, detached ``(rows, features)``.
    """

    loss: torch.Tensor
    losses: dict[str, torch.Tensor]
    metrics: dict[str, dict[str, torch.Tensor]]
    rows: dict[str, torch.Tensor]


class JointModel(nn.Module):
    """The backbone with all families' objectives: what the optimiser and DDP see.

    Args:
        model: The backbone. With ``task_primary`` a fresh LoRA per family is added to it.
        families: The families to train, prepared.
        task_primary: Whether each family gets a LoRA of its own (regime ``tpl``).
        recompute: Hold the activations of one chunk at a time (gradient caching), at the price of a second
            forward.

    Example:
        >>> joint = JointModel(model, [ner, tc], task_primary=True)  # doctest: +SKIP
        >>> batches = {"ner": ner.batch(0), "tc": tc.batch(0)}  # doctest: +SKIP
        >>> joint(plan_chunks(batches, ChunkShape(), pad_token_id=0)).loss.backward()  # doctest: +SKIP
    """

    def __init__(self, model: MtpfModel, families: list[Family], task_primary: bool, recompute: bool = False):
        super().__init__()
        self.model = model
        self.recompute = recompute
        self.weights = {family.name: family.settings.weight for family in families}
        hidden = model.config.hidden_size
        self.objectives = nn.ModuleDict({family.name: family.objective(hidden) for family in families})
        self.start: Any = None
        if any(objective.needs_start for objective in self.objectives.values()):
            # In a tuple it is not a submodule: not trained, saved, sharded or put into training mode.
            self.start = (copy.deepcopy(model.backbone).eval().requires_grad_(False),)
        self.adapters: dict[str, str | None] = dict.fromkeys(self.weights)
        for family in families if task_primary else []:
            model.add_adapter(family.name, family.settings.lora)
            self.adapters[family.name] = family.name
        self.depth = max((model.adapter_depth(name) for name in model.adapters), default=1)
        pooler = getattr(model.backbone, "pooler", None)
        if pooler is not None:  # no family uses it; a parameter without gradient would stop DDP
            pooler.requires_grad_(False)

    def forward(self, batch: JointBatch) -> JointOutput:
        """Run one joint step's forward on a batch of each family."""
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in batch.positions}
        starts: dict[str, list[torch.Tensor]] = {name: [] for name in batch.positions}
        words, token_positions = self._look_up(batch)
        for number, (chunk, position) in enumerate(zip(batch.chunks, token_positions, strict=True), start=1):
            # The last chunk is the first in the backward pass, when nothing else is held: once is enough.
            if self.recompute and torch.is_grad_enabled() and number < len(batch.chunks):
                chunk_rows = checkpoint(self._chunk_rows, chunk, words, position, use_reentrant=False)
            else:
                chunk_rows = self._chunk_rows(chunk, words, position)
            for name, rows in chunk_rows.items():
                parts[name].append(rows)
            for name, rows in self._start_rows(chunk, words).items():
                starts[name].append(rows)
        losses: dict[str, torch.Tensor] = {}
        metrics: dict[str, dict[str, torch.Tensor]] = {}
        seen: dict[str, torch.Tensor] = {}
        for name, positions in batch.positions.items():
            rows = torch.cat(parts[name])[positions]
            objective: Any = self.objectives[name]
            targets = batch.targets[name]
            if starts[name]:
                targets = {**targets, "start": torch.cat(starts[name])[positions]}
            losses[name], metrics[name] = objective.loss(rows, targets)
            seen[name] = rows.detach()
        loss = torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()
        return JointOutput(loss, losses, metrics, seen)

    def compile_trunk(self, backend: str = "inductor") -> None:
        """Compile the layers below the tails, for any batch size and length.

        The tails run as views made for each call, which a compiler would take for new modules.
        """
        for layer in encoder_layers(self.model.backbone)[: -self.depth]:
            layer.compile(dynamic=True, backend=backend)

    def _look_up(self, batch: JointBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Embed each different token of the batch once.

        The gradient of a lookup is as large as the whole embedding matrix, mostly zeros: 47 MB for BERT's
        vocabulary, for every chunk, which costs as much as several hundred tokens.

        Returns:
            Vectors ``(different tokens, embedding)``, and for each chunk its tokens' rows in them.
        """
        ids = torch.cat([chunk.inputs["input_ids"].flatten() for chunk in batch.chunks])
        different, positions = torch.unique(ids, return_inverse=True)
        shapes = [chunk.inputs["input_ids"].shape for chunk in batch.chunks]
        parts = positions.split([shape.numel() for shape in shapes])
        words = self.model.get_input_embeddings()(different)
        return words, [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _chunk_rows(
        self, chunk: Chunk, words: torch.Tensor, positions: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Run one chunk: trunk once, each family's tail, and what its loss needs of each row."""
        mask = chunk.inputs["attention_mask"]
        trunk = run_trunk(
            self.model.backbone, self.depth, inputs_embeds=words[positions], attention_mask=mask
        )
        results = {}
        for name, (start, stop) in chunk.spans.items():
            hidden = run_tail(self.model.backbone, trunk.rows(start, stop), self.adapters[name])
            rows = self.objectives[name](hidden, mask[start:stop], chunk.labels.get(name))
            results[name] = rows[: chunk.num_rows[name]]
        return results

    @torch.no_grad()
    def _start_rows(self, chunk: Chunk, words: torch.Tensor) -> dict[str, torch.Tensor]:
        """Reduce the rows of a chunk as the encoder before training gives them, for losses that need it."""
        rows: dict[str, torch.Tensor] = {}
        for name, (start, stop) in chunk.spans.items():
            objective: Any = self.objectives[name]
            if objective.needs_start:
                inputs = {key: value[start:stop] for key, value in chunk.inputs.items()}
                hidden = self.start[0].to(words.device, words.dtype)(**inputs)[0]
                reduced = objective(hidden, inputs["attention_mask"], chunk.labels.get(name))
                rows[name] = reduced[: chunk.num_rows[name]]
        return rows


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
