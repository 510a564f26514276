"""The contrastive loss of the text-classification family."""

import torch
from torch import nn


def info_nce(
    anchors: torch.Tensor, positives: torch.Tensor, temperature: float = 0.05, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE with in-batch negatives on cosine similarities (arXiv 1807.03748; arXiv 2510.07566, section 3).

    Args:
        anchors: ``(batch, hidden)``.
        positives: ``(batch, hidden)``; row ``i`` belongs to anchor ``i``, all other rows are its negatives.
        temperature: Divides the similarities (our assumption: 0.05).
        symmetric: Also find the anchor of each positive, and average both directions.

    Returns:
        The mean loss, a float32 scalar, and the share of anchors whose own positive is the most similar one.

    Example:
        >>> vectors = torch.eye(3)
        >>> loss, accuracy = info_nce(vectors, vectors)
        >>> round(loss.item(), 4), accuracy.item()
        (0.0, 1.0)
    """
    # float32 throughout: bf16 similarities divided by 0.05 are off by several per cent.
    with torch.autocast(anchors.device.type, enabled=False):
        a = nn.functional.normalize(anchors.float(), dim=-1)
        p = nn.functional.normalize(positives.float(), dim=-1)
        similarity = a @ p.T / temperature
        target = torch.arange(len(a), device=a.device)
        loss = nn.functional.cross_entropy(similarity, target)
        if symmetric:
            loss = (loss + nn.functional.cross_entropy(similarity.T, target)) / 2
    accuracy = (similarity.detach().argmax(1) == target).float().mean()
    return loss, accuracy


__all__ = ["info_nce"]
