"""The TC family: pull the two texts of a pair together, push the rest of the batch away."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from ...data.sources import expand_pair_sources
from ...errors import RecipeError
from ...model.modeling_mtpf import mean_pool
from .base import Family, FamilyBatch, FamilySettings, Objective, RunContext, register_family
from .contrastive import info_nce, similarity_drift, vector_drift
from .pairs import MappedPairs, PairSource, StreamedPairs
from .sampling import SourceSampler, distinct_rows


@dataclass
class TcSettings(FamilySettings):
    """Settings of the TC family.

    Attributes:
        pairs: Sources with columns ``anchor`` and ``positive`` (or just two columns, in that order), and
            optionally hard negatives (``negative``, ``negative_1``, …): files, folders (one source per file)
            or Hub ids ``owner/name:configuration@revision``.
        temperature: Temperature of the similarities.
        learn_temperature: Learn the temperature, starting from ``temperature`` and not below 0.01.
        symmetric: Also find the anchor of each positive.
        contrastive_weight: Factor of InfoNCE within the family's loss.
        keep_similarities: Factor of a term that keeps the texts' similarities within a batch close to those
            before training; for a start that is good at sentences already, e.g. 1.0 with a contrastive_weight
            of 0.3 (self-distillation; one forward pass more).
        keep_vectors: Factor of a term that keeps the texts' vectors close to those before training.
        source_temperature: Flattens the sizes by which sources are drawn; 1 is by size.
        source_cap: Rows beyond which a source counts no more (0: no cap).
        streaming: Read Hub sources block by block while training, instead of downloading them first.
        block_rows: Rows of a streamed source that are shuffled among themselves.
    """

    pairs: list[str] = field(default_factory=list)
    temperature: float = 0.05
    learn_temperature: bool = False
    symmetric: bool = False
    contrastive_weight: float = 1.0
    keep_similarities: float = 0.0
    keep_vectors: float = 0.0
    source_temperature: float = 1.0
    source_cap: int = 0
    streaming: bool = False
    block_rows: int = 50_000


class ContrastiveObjective(Objective):
    """InfoNCE on mean-pooled texts: rows are all anchors, then their positives, then hard negatives."""

    MIN_TEMPERATURE = 0.01
    """Floor of a learnt temperature, as in CLIP (arXiv 2103.00020, section 2.5)."""

    def __init__(self, settings: TcSettings):
        super().__init__()
        self.settings = settings
        self.needs_start = bool(settings.keep_similarities or settings.keep_vectors)
        start = torch.tensor([math.log(settings.temperature)])  # FSDP takes no scalars
        self.log_temperature = nn.Parameter(start) if settings.learn_temperature else None

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Return one vector per text: the mean over its tokens, ``(rows, hidden)``."""
        kind = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
        return mean_pool(hidden_states.to(kind), attention_mask)

    def loss(
        self, rows: torch.Tensor, targets: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss, in-batch retrieval accuracy, and alignment and uniformity of the vectors.

        Alignment is the mean squared distance of unit vectors of a pair, uniformity the log of the mean
        Gaussian potential of different texts (arXiv 2005.10242); uniformity near 0 is collapse.
        """
        texts = int(targets["texts_per_row"]) if "texts_per_row" in targets else 2
        anchors, positives, *negatives = rows.chunk(texts)
        settings = self.settings
        temperature: float | torch.Tensor = settings.temperature
        if self.log_temperature is not None:
            with torch.no_grad():  # the parameter itself: the gradient of a clamp would be 0 below the floor
                self.log_temperature.clamp_(min=math.log(self.MIN_TEMPERATURE))
            temperature = self.log_temperature.exp().squeeze(0)
        more = torch.cat(negatives) if negatives else None
        contrast, accuracy = info_nce(anchors, positives, temperature, settings.symmetric, more)
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            a, p = (nn.functional.normalize(x.detach().float(), dim=-1) for x in (anchors, positives))
            alignment = (a - p).pow(2).sum(-1).mean()
            some = a[:512]  # the number of distances grows with the square
            uniformity = (
                torch.pdist(some).pow(2).mul(-2).exp().mean().log() if len(some) > 1 else alignment * 0
            )
        metrics = {"retrieval_accuracy": accuracy, "alignment": alignment, "uniformity": uniformity}
        loss = settings.contrastive_weight * contrast
        if self.needs_start:
            similarities = similarity_drift(rows, targets["start"], settings.temperature)
            vectors = vector_drift(rows, targets["start"])
            loss = loss + settings.keep_similarities * similarities + settings.keep_vectors * vectors
            drifts = {"contrast": contrast, "similarity_drift": similarities, "vector_drift": vectors}
            metrics |= {name: value.detach() for name, value in drifts.items()}
        if isinstance(temperature, torch.Tensor):
            metrics["temperature"] = temperature.detach()
        return loss, metrics


@register_family("tc")
class TcFamily(Family):
    """Pre-finetuning for text classification on text pairs."""

    settings_class = TcSettings

    def prepare(self, context: RunContext) -> None:
        """Open and tokenize all pair sources."""
        settings: TcSettings = self.settings
        if settings.batch_size < 2 or settings.temperature <= 0 or settings.source_cap < 0:
            raise RecipeError(
                "families.tc needs a batch_size of at least 2 (other rows are the negatives), a temperature "
                "above 0, and a source_cap that is not negative."
            )
        for name in ("contrastive_weight", "keep_similarities", "keep_vectors"):
            if getattr(settings, name) < 0:
                raise RecipeError(f"families.tc.{name} is {getattr(settings, name)}; it must be at least 0.")
        if settings.source_temperature < 0.1:
            raise RecipeError(
                f"families.tc.source_temperature is {settings.source_temperature}; it must be at least 0.1."
            )
        self.sources: list[PairSource] = []
        with PartialState().main_process_first():  # it fills the cache of tables that the others read
            for name, source in expand_pair_sources(settings.pairs).items():
                rows = name, source, context.tokenizer, settings.max_length, settings.batch_size
                if settings.streaming:
                    self.sources.append(StreamedPairs(*rows, settings.block_rows, settings.source_cap))
                else:
                    self.sources.append(MappedPairs(*rows))
        self.seed = context.seed
        sizes = [source.num_rows for source in self.sources]
        cap = settings.source_cap or None
        self.chooser = SourceSampler(sizes, settings.source_temperature, cap, context.seed)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> FamilyBatch:
        """Return anchors, positives and hard negatives of one source; no text comes twice."""
        index, turn = self.chooser.choose(step)
        source = self.sources[index]
        table, drawn = source.draw(turn, self.settings.batch_size, (self.seed, index))
        rows = distinct_rows(drawn, table.num_rows, table.keys, (self.seed, index), step, source.name)
        shared = self.share(rows, rank, world_size)
        columns = table.texts(shared)
        return FamilyBatch(
            rows=[row for column in columns for row in column],
            targets={"texts_per_row": torch.tensor(len(columns))},
            source=source.name,
            row_numbers=table.numbers(shared) * len(columns),
            counts=source.counts(turn, self.settings.batch_size) if rank == 0 else {},
        )

    def objective(self, hidden_size: int) -> ContrastiveObjective:
        """Build the loss; its only parameter is a learnt temperature."""
        return ContrastiveObjective(self.settings)

    def describe(self) -> dict[str, Any]:
        """Return each source with its size, its share of the batches and its fingerprint."""
        return {
            source.name: {**source.describe(), "share": round(float(share), 4)}
            for source, share in zip(self.sources, self.chooser.shares, strict=True)
        }
