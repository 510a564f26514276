"""The TC family: pull the two texts of a pair together, push the rest of the batch away (SPEC 1.4)."""

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import nn

from ..data.sources import expand_pair_sources, fingerprint, open_source
from ..data.words import encode_texts
from ..errors import DataError, RecipeError
from ..modeling_mtpf import mean_pool
from .contrastive import info_nce
from .families import Family, FamilyBatch, FamilySettings, RunContext, register_family
from .sampling import EpochSampler, SourceSampler, distinct_rows

logger = logging.getLogger(__name__)


@dataclass
class TcSettings(FamilySettings):
    """Settings of the TC family.

    Attributes:
        pairs: Sources with columns ``anchor`` and ``positive``: files, folders (one source per file) or Hub
            ids.
        temperature: Temperature of the similarities.
        symmetric: Also find the anchor of each positive.
        source_temperature: Flattens the sizes by which sources are drawn; 1 is by size.
        source_cap: Rows beyond which a source counts no more (0: no cap).
    """

    pairs: list[str] = field(default_factory=list)
    temperature: float = 0.05
    symmetric: bool = False
    source_temperature: float = 1.0
    source_cap: int = 0


class ContrastiveObjective(nn.Module):
    """InfoNCE on mean-pooled texts. The first half of the rows are anchors, the second their positives."""

    def __init__(self, temperature: float, symmetric: bool):
        super().__init__()
        self.temperature, self.symmetric = temperature, symmetric

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, targets: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss, in-batch retrieval accuracy, and alignment and uniformity of the vectors.

        Alignment is the mean squared distance of unit vectors of a pair, uniformity the log of the mean
        Gaussian potential of different texts (arXiv 2005.10242); uniformity near 0 is collapse.
        """
        vectors = mean_pool(hidden_states.float(), attention_mask)
        anchors, positives = vectors.chunk(2)
        loss, accuracy = info_nce(anchors, positives, self.temperature, self.symmetric)
        with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
            a, p = (nn.functional.normalize(x.detach().float(), dim=-1) for x in (anchors, positives))
            alignment = (a - p).pow(2).sum(-1).mean()
            uniformity = torch.pdist(a).pow(2).mul(-2).exp().mean().log() if len(a) > 1 else alignment * 0
        return loss, {"retrieval_accuracy": accuracy, "alignment": alignment, "uniformity": uniformity}


@register_family("tc")
class TcFamily(Family):
    """Pre-finetuning for text classification on text pairs."""

    settings_class = TcSettings

    def prepare(self, context: RunContext) -> None:
        """Open all pair sources."""
        settings: TcSettings = self.settings
        if settings.batch_size < 2 or settings.temperature <= 0 or settings.source_temperature <= 0:
            raise RecipeError(
                "families.tc needs a batch_size of at least 2 (other rows are the negatives), and "
                "temperature and source_temperature above 0."
            )
        sources = expand_pair_sources(settings.pairs)
        self.names = list(sources)
        self.paths = list(sources.values())
        opened = [self._open(name, source) for name, source in sources.items()]
        self.sources = [source for source, _ in opened]
        self.num_empty = [empty for _, empty in opened]
        self.seed = context.seed
        self.tokenizer = context.tokenizer
        sizes = [len(source) for source in self.sources]
        self.chooser = SourceSampler(
            sizes, settings.source_temperature, settings.source_cap or None, context.seed
        )
        self.samplers = [
            EpochSampler(size, settings.batch_size, (context.seed, i)) for i, size in enumerate(sizes)
        ]

    def _open(self, name: str, source) -> tuple[Dataset, int]:
        """Open one source without its pairs that have an empty side, and count those."""
        dataset = open_source(source, {"anchor": "text", "positive": "text"})
        sides = [dataset.data.column(column) for column in ("anchor", "positive")]
        empty = np.zeros(len(dataset), dtype=bool)
        for side in sides:
            empty |= pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(side)), 0).to_numpy()
            if pc.count_distinct(side).as_py() < self.settings.batch_size:
                raise DataError(
                    f"The pair source {name!r} has too few distinct texts for a batch of "
                    f"{self.settings.batch_size}; lower families.tc.batch_size or leave the source out."
                )
        if empty.any():
            logger.warning("%s: %d pairs with an empty text are left out", name, empty.sum())
            dataset = dataset.select(np.flatnonzero(~empty))
        return dataset, int(empty.sum())

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> FamilyBatch:
        """Return anchors, then their positives, all of one source, without a text that occurs twice."""
        index, turn = self.chooser.choose(step)
        source = self.sources[index]

        def texts(row: int) -> tuple:
            pair = source[row]
            return pair["anchor"].strip().lower(), pair["positive"].strip().lower()

        drawn = self.samplers[index].rows(turn)
        rows = distinct_rows(drawn, len(source), texts, (self.seed, index), step, self.names[index])
        pairs = source[self.share(rows, rank, world_size)]
        texts_of_rows = [*pairs["anchor"], *pairs["positive"]]
        inputs = encode_texts(self.tokenizer, texts_of_rows, self.settings.max_length)
        return FamilyBatch(inputs, {"source": torch.tensor(index)})

    def objective(self, hidden_size: int) -> nn.Module:
        """Build the loss; it has no parameters."""
        return ContrastiveObjective(self.settings.temperature, self.settings.symmetric)

    def describe(self) -> dict[str, Any]:
        """Return each source with its size, its share of the batches and its fingerprint."""
        return {
            name: {
                "pairs": len(self.sources[i]),
                "empty_left_out": self.num_empty[i],
                "share": round(float(self.chooser.shares[i]), 4),
                "fingerprint": fingerprint(self.paths[i], self.sources[i]),
            }
            for i, name in enumerate(self.names)
        }


__all__ = ["ContrastiveObjective", "TcFamily", "TcSettings"]
