"""The NER family: predict each word's cluster id from a frozen teacher (arXiv 2510.07566, section 3)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn

from ...data.packaged_encoder import PACKAGED
from ...data.sources import fingerprint, open_source, source_name
from ...data.tokens import list_arrays, tokenize_labelled_words
from ...data.words import IGNORE
from ...errors import DataError, RecipeError
from ...labelling.label import LABEL_COLUMNS, label_corpus
from ...labelling.settings import PseudoLabelSettings
from ..distributed import mean_over_processes, num_processes
from .base import Family, FamilyBatch, FamilySettings, Objective, RunContext, register_family
from .sampling import EpochSampler


@dataclass
class NerSettings(FamilySettings):
    """Settings of the NER family.

    Attributes:
        data: Folder of pseudo-labelled shards (columns ``words`` and ``clusters``); without it, ``text``.
        text: A source of raw text (column ``text``), which is labelled before training.
        teacher: Encoder that labels ``text``: ``packaged``, a folder or a Hub id.
        teacher_revision: Commit of the teacher's repo.
        teacher_layer: Hidden state that is clustered; -1 is the last.
        clusters: Number of clusters K.
        max_texts: Number of texts of the source to use (0: all).
    """

    data: str | None = None
    text: str | None = None
    teacher: str = PACKAGED
    teacher_revision: str | None = None
    teacher_layer: int = -1
    clusters: int = 200
    max_texts: int = 0


class ClusterObjective(Objective):
    """One linear layer on the first sub-word of each word, cross-entropy over the cluster ids."""

    def __init__(self, hidden_size: int, num_clusters: int):
        super().__init__()
        self.head = nn.Linear(hidden_size, num_clusters)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any, labels: Any) -> torch.Tensor:
        """Return per row the summed cross-entropy of its labelled words and how many are predicted right."""
        # Over all positions, not only the labelled ones: their number changes with every batch, and in bf16
        # on CPU each new shape costs more than it saves.
        logits = self.head(hidden_states)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
        )
        right = (logits.detach().argmax(-1) == labels) & (labels != IGNORE)
        return torch.stack([losses.view(labels.shape).sum(1), right.sum(1).to(losses.dtype)], 1)

    def loss(
        self, rows: torch.Tensor, targets: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the mean cross-entropy over labelled words, and the share of words predicted right.

        Each process divides by the mean number of words of all of them.
        """
        words = mean_over_processes(targets["labelled_words"].to(rows.dtype))
        # A batch without words costs nothing; its mean would be NaN.
        summed, right = rows.sum(0) / words.clamp(min=1 / num_processes())
        return summed, {"pseudo_label_accuracy": right.detach()}


@register_family("ner")
class NerFamily(Family):
    """Pre-finetuning for named-entity recognition on pseudo-labelled words."""

    settings_class = NerSettings

    def prepare(self, context: RunContext) -> None:
        """Open the labelled shards; label the raw text first if the settings name one."""
        settings, state = self.settings, PartialState()
        folder = settings.data
        if folder is None:
            if settings.text is None:
                raise RecipeError("The family 'ner' needs data: set families.ner.data or families.ner.text.")
            folder = str(context.work_dir / "pseudo_labels")
            if state.is_main_process:
                labelling = PseudoLabelSettings(
                    teacher=settings.teacher,
                    revision=settings.teacher_revision,
                    layer=str(settings.teacher_layer),
                    clusters=str(settings.clusters),
                    max_texts=settings.max_texts,
                    seed=context.seed,
                )
                label_corpus(settings.text, labelling, Path(folder))
            state.wait_for_everyone()
        with state.main_process_first():  # it fills the cache of tokenized tables, the others read it
            rows = open_source(folder, LABEL_COLUMNS)
            self._check_rows(rows, folder)
            self.num_clusters = 1 + (pc.max(pc.list_flatten(rows.data.column("clusters"))).as_py() or 0)
            if self.num_clusters < 2:
                raise DataError(f"{folder} holds no cluster labels; label the text with mtpf label.")
            table = tokenize_labelled_words(
                rows, context.tokenizer, settings.max_length, "words", "clusters", source_name(folder)
            )
        self.table = table.with_format("arrow")
        self.fingerprint = fingerprint(folder, rows)
        self.sampler = EpochSampler(len(table), settings.batch_size, context.seed)

    def _check_rows(self, rows: Dataset, folder: str) -> None:
        """Refuse rows whose words and clusters do not belong together, before the first step."""
        words, clusters = (rows.data.column(column) for column in ("words", "clusters"))
        lengths = pc.list_value_length(words), pc.list_value_length(clusters)
        unequal = pc.not_equal(*lengths).to_numpy()
        if unequal.any():
            row = int(unequal.argmax())
            sizes = " words but ".join(str(length[row]) for length in lengths)
            raise DataError(f"{folder}, row {row + 1} has {sizes} clusters; label the text again.")
        flat = pc.list_flatten(clusters)
        if flat.null_count or pc.list_flatten(words).null_count:
            raise DataError(f"{folder} has words or clusters that are null; label the text again.")
        wrong = pc.and_(pc.less(flat, 0), pc.not_equal(flat, IGNORE))
        if pc.any(wrong).as_py():
            raise DataError(f"{folder} has negative cluster ids; only {IGNORE} (ignore) may be below 0.")

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> FamilyBatch:
        """Return sentences with the cluster id on the first sub-word of each word."""
        numbers = self.share(self.sampler.rows(step), rank, world_size)
        rows = self.table[numbers]
        labels = list_arrays(rows.column("labels"))
        return FamilyBatch(
            rows=list_arrays(rows.column("ids")),
            labels=labels,
            targets={"labelled_words": torch.tensor(sum(int((row != IGNORE).sum()) for row in labels))},
            source=source_name(self.settings.data or self.settings.text),
            row_numbers=[number + 1 for number in numbers],
            counts={
                "words_seen": pc.sum(rows.column("words")).as_py(),
                "words_cut_off": pc.sum(rows.column("lost")).as_py(),
            },
        )

    def objective(self, hidden_size: int) -> ClusterObjective:
        """Build the cluster head; it is thrown away after training."""
        return ClusterObjective(hidden_size, self.num_clusters)

    def describe(self) -> dict[str, Any]:
        """Return the source, its fingerprint and its size."""
        return {
            "source": source_name(self.settings.data or self.settings.text),
            "fingerprint": self.fingerprint,
            "sentences": len(self.table),
            "clusters": self.num_clusters,
        }
