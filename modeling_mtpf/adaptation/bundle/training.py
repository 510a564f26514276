"""Train a bundle on cached trunk outputs: from the labels of its parts, or from the results of its apps."""

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from ...devices import precision
from ...model.adapters_mtpf import AdapterHead
from ...model.modeling_mtpf import MtpfModel
from ...model.prefix_mtpf import Prefix, Prefixes
from ...model.trunk_mtpf import TrunkOutput
from ..methods.lora import label_kind, labels_of
from ..tail_training import optimise, tail_outputs, training_batches
from ..trunk_cache import TrunkCache
from .distillation import FromApps
from .low_rank import Matrices, copied, depth_of, run_with, truncated
from .registry import BundleFit, BundleTail, Job, JobPart, Objective, Parametrisation, Validation
from .settings import BundleSettings


class FromLabels:
    """A step is one part's batch, drawn by size; parts need not share texts.

    With ``job.rounds`` as many steps as there are parts are drawn at once, each part as often as its share
    says, rounded up or down at random: parts of one size take turns, in random order.

    Args:
        job: Its parts have data.
        depth: Layers above the trunk.
        rows: Class of the trunk's outputs.
    """

    def __init__(self, job: Job, depth: int, rows: type[TrunkCache] = TrunkCache):
        settings = job.settings
        self._parts, self._settings, self._rounds = job.parts, settings, job.rounds
        self._labels: dict[str, Any] = {}
        self._rows: dict[str, tuple[TrunkCache, TrunkCache]] = {}
        cached = replace(settings, cache_gb=settings.cache_gb / (2 * len(job.parts)))
        for part in job.parts:
            assert part.data is not None
            labels = labels_of(job.tokenizer, part.data, settings.max_length)
            self._labels[part.name] = labels
            train, validation = (
                rows(job.model, encoded, depth, cached) for encoded in (labels.train, labels.validation)
            )
            self._rows[part.name] = train, validation
        sizes = {name: len(train.encoded) for name, (train, _) in self._rows.items()}
        self.record = {"loss": "labels"}
        self.steps = settings.steps or sum(settings.steps_for(size) for size in sizes.values())
        shares = np.array(list(sizes.values())) ** (1 / settings.temperature)
        self._shares = shares / shares.sum()

    def losses(
        self, tail: BundleTail, heads: dict[str, AdapterHead], settings: BundleSettings, start: int = 0
    ) -> Iterator[torch.Tensor]:
        """Yield a part's loss, times its weight, for each step after the first ``start`` ones."""
        order = self._order(np.random.default_rng([settings.seed, 3]))
        taken = Counter(islice(order, start))
        streams = [
            self._losses(part, number, tail, heads[part.name], settings, taken[number])
            for number, part in enumerate(self._parts)
        ]
        for number in order:
            yield next(streams[number])

    def _order(self, chance: np.random.Generator) -> Iterator[int]:
        """Yield the number of each step's part."""
        count = len(self._shares)
        while not self._rounds:
            yield int(chance.choice(count, p=self._shares))
        while True:  # systematic sampling
            points = (chance.random() + np.arange(count)) / count
            drawn = np.searchsorted(np.cumsum(self._shares), points, side="right").clip(max=count - 1)
            yield from chance.permutation(drawn).tolist()

    def _losses(
        self,
        part: JobPart,
        number: int,
        tail: BundleTail,
        head: AdapterHead,
        settings: BundleSettings,
        start: int,
    ) -> Iterator[torch.Tensor]:
        labels, (train, _) = self._labels[part.name], self._rows[part.name]
        weights = labels.weights(settings.class_weights)
        for trunk, rows in training_batches(train, settings, (2, number), start):
            hidden = tail(trunk, part.name)
            logits = labels.logits(head, hidden, train.encoded, rows)
            loss = labels.loss(logits, labels.targets(rows, hidden.shape[1]), weights)
            yield loss * (1.0 if part.weight is None else part.weight)

    @torch.no_grad()
    def validate(self, tail: BundleTail, heads: dict[str, AdapterHead]) -> dict[str, Validation]:
        """Score each part by its family's metric."""
        validated = {}
        for name, (_, rows) in self._rows.items():
            labels = self._labels[name]
            outputs = (
                (numbers, labels.logits(heads[name], hidden, rows.encoded, numbers))
                for numbers, hidden in tail_outputs(partial(tail, part=name), rows, self._settings)
            )
            found = labels.read(outputs)
            scores = labels.scores(found)
            validated[name] = Validation(scores[labels.metric], scores, labels.held_out(found))
        return validated


def fresh_heads(job: Job) -> dict[str, AdapterHead]:
    """Return new heads for the labels of the parts' data."""
    heads = {}
    for part in job.parts:
        assert part.data is not None
        kind = label_kind(part.data)
        options = job.model.config.hidden_size, job.settings.max_length, kind.problem_type
        heads[part.name] = AdapterHead(kind.kind, part.data.labels, *options).to(job.model.device)
    return heads


def app_heads(job: Job) -> dict[str, AdapterHead]:
    """Return copies of the apps' heads, for inputs of the bundle's length."""
    apps: Any = job.model.heads
    heads = {part.name: copy.deepcopy(apps[part.app]) for part in job.parts}
    for head in heads.values():
        head.scope = None  # it is that of the app's own LoRA
        head.max_length = job.settings.max_length
    return heads


def bundle_tail(model: MtpfModel, parametrisation: Parametrisation, settings: BundleSettings) -> BundleTail:
    """Return the tail with the LoRA that a parametrisation gives at the time of each call."""

    def tail(trunk: TrunkOutput, part: str | None) -> torch.Tensor:
        with precision(model.device, settings.mixed_precision):
            slots = _prefixes_of(parametrisation)
            return run_with(model.backbone, trunk, parametrisation.matrices(part), slots).float()

    return tail


def _prefixes_of(parametrisation: Parametrisation) -> Prefixes:
    return parametrisation.prefixes() if hasattr(parametrisation, "prefixes") else {}


def train_bundle(
    job: Job,
    parametrisation: Parametrisation,
    heads: dict[str, AdapterHead],
    objective: Objective | None,
    train_heads: bool = True,
) -> BundleFit:
    """Train a parametrisation and the heads, if there is something to train; restore the best state.

    Early stopping is by the mean of the parts' validation scores. Without an objective nothing is trained.
    """
    settings = job.settings
    tail = bundle_tail(job.model, parametrisation, settings)
    trained = list(parametrisation.parameters)
    for head in heads.values():
        trained += head.requires_grad_(train_heads).parameters() if train_heads else ()

    def validated(tail: BundleTail) -> dict[str, Validation]:
        return objective.validate(tail, heads) if objective is not None else {}

    def score() -> float:
        return float(np.mean([part.score for part in validated(tail).values()]))

    details: dict[str, Any] = {"steps": 0}
    if trained and objective is not None:
        state = job.states.next() if job.states else None
        losses = objective.losses(tail, heads, settings, state.step if state else 0)
        details = optimise(trained, losses, score, objective.steps, settings, job.name, state=state)
    for parameter in trained:
        parameter.requires_grad_(False)
    fixed = _folded(job, parametrisation)
    scored = validated(bundle_tail(job.model, fixed, settings))
    if not train_heads:  # which then stay as they are
        scored = {part: validation._replace(held_out=None) for part, validation in scored.items()}
    learned = objective.record if trained and objective is not None else {}
    return BundleFit(fixed.matrices(None), heads, scored, details, dict(learned), fixed.apart, fixed.slots)


@torch.no_grad()
def _folded(job: Job, parametrisation: Parametrisation) -> "Fixed":
    """Return the LoRA as it is now, of all parts or of each, and the prefix."""

    def folded(part: str | None) -> Matrices:
        matrices = parametrisation.matrices(part)
        return copied(truncated(matrices, rank) if (rank := job.settings.rank) is not None else matrices)

    if job.apart:
        return Fixed({}, {part.name: folded(part.name) for part in job.parts})
    slots = _prefixes_of(parametrisation).items()
    copies = {number: Prefix(slot.key.clone(), slot.value.clone()) for number, slot in slots}
    return Fixed(folded(None), slots=copies)


class Fixed:
    """A LoRA, or one of each part, and maybe a prefix, that is not trained."""

    def __init__(
        self, matrices: Matrices, apart: dict[str, Matrices] | None = None, slots: Prefixes | None = None
    ):
        self.parameters: list[nn.Parameter] = []
        self._matrices, self.apart, self.slots = matrices, apart or {}, slots or {}

    def prefixes(self) -> Prefixes:
        """Return the prefix."""
        return self.slots

    def matrices(self, part: str | None) -> Matrices:
        """Return the LoRA of a part."""
        return self.apart.get(part or "", self._matrices)


def objective_of(job: Job, parametrisation: Parametrisation) -> Objective:
    """Return what a bundle learns from, for the layers that a parametrisation touches.

    Labels where all parts have data and no texts are given; else the results of the apps, by default on the
    texts of the data.
    """
    depth = depth_of(job.model.backbone, parametrisation.matrices(None))
    labelled = all(part.data is not None for part in job.parts)
    kind = FromLabels if job.settings.learns_from_labels(labelled, bool(job.texts)) else FromApps
    if (kind, depth) not in job.cache:
        job.cache[kind, depth] = kind(job, depth)
    return job.cache[kind, depth]
