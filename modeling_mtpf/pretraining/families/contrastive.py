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


def similarity_drift(vectors: torch.Tensor, start: torch.Tensor, temperature: float = 0.05) -> torch.Tensor:
    """Measure how far the cosine similarities within a batch are from those before training.

    For each text, the Kullback-Leibler divergence from its similarities to all other texts of the batch
    before training to those now, both as distributions (softmax over the other texts). Texts of all
    processes take part; the mean of the processes' results is the result of the joined batch.

    Args:
        vectors: ``(texts, hidden)``, with gradient.
        start: Vectors of the same texts from the encoder before training.
        temperature: Divides the similarities.

    Returns:
        The mean over this process's texts, a float32 scalar.

    Example:
        >>> vectors = torch.randn(4, 8)
        >>> round(similarity_drift(2 * vectors, vectors).item(), 4)
        0.0
    """
    with torch.autocast(vectors.device.type, enabled=False):
        now, before = (
            _log_similarities(_at_least_float32(x), temperature) for x in (vectors, start.detach())
        )
        return nn.functional.kl_div(now, before, reduction="batchmean", log_target=True)


def _log_similarities(vectors: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return for each text the log of its distribution over all other texts ``(texts, all texts - 1)``."""
    units = nn.functional.normalize(vectors, dim=-1)
    everyone = gather_rows(units)
    others = torch.ones(len(units), len(everyone), dtype=torch.bool, device=units.device)
    others[:, process_index() * len(units) :].fill_diagonal_(False)
    similarity = units @ everyone.T / temperature
    return similarity[others].view(len(units), -1).log_softmax(-1)


def vector_drift(vectors: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Return the mean of one minus the cosine between each text's vector now and before training.

    Example:
        >>> vectors = torch.eye(3)
        >>> vector_drift(vectors, -vectors).item()
        2.0
    """
    with torch.autocast(vectors.device.type, enabled=False):
        cosine = nn.functional.cosine_similarity(
            _at_least_float32(vectors), _at_least_float32(start.detach())
        )
        return (1 - cosine).mean()


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
