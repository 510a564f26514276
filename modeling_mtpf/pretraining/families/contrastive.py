"""The contrastive loss of the text-classification family."""

import torch
from torch import nn

from ..distributed import gather_rows, process_index


def info_nce(
    anchors: torch.Tensor,
    positives: torch.Tensor,
    temperature: float | torch.Tensor = 0.05,
    symmetric: bool = False,
    negatives: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE with in-batch negatives on cosine similarities (arXiv 1807.03748; arXiv 2510.07566, section 3).

    With several processes, the texts of all of them are negatives, and the mean of the processes' losses is
    the loss of the joined batch.

    Args:
        anchors: ``(batch, hidden)``.
        positives: ``(batch, hidden)``; row ``i`` belongs to anchor ``i``, all other rows are its negatives.
        temperature: Divides the similarities (our assumption: 0.05).
        symmetric: Also find the anchor of each positive, and average both directions.
        negatives: Further negatives of every anchor, ``(any number, hidden)``.

    Returns:
        The mean loss over this process's anchors, a float32 scalar, and the share of them whose own positive
        is the most similar text.

    Example:
        >>> vectors = torch.eye(3)
        >>> loss, accuracy = info_nce(vectors, vectors)
        >>> round(loss.item(), 4), accuracy.item()
        (0.0, 1.0)
    """
    # float32 or more throughout: bf16 similarities divided by 0.05 are off by several per cent.
    with torch.autocast(anchors.device.type, enabled=False):
        a, p = (nn.functional.normalize(_at_least_float32(x), dim=-1) for x in (anchors, positives))
        candidates = gather_rows(p)
        if negatives is not None:
            n = nn.functional.normalize(_at_least_float32(negatives), dim=-1)
            candidates = torch.cat([candidates, gather_rows(n)])
        target = torch.arange(len(a), device=a.device) + process_index() * len(a)
        similarity = a @ candidates.T / temperature
        loss = nn.functional.cross_entropy(similarity, target)
        if symmetric:
            loss = (loss + nn.functional.cross_entropy(p @ gather_rows(a).T / temperature, target)) / 2
    accuracy = (similarity.detach().argmax(1) == target).float().mean()
    return loss, accuracy


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
