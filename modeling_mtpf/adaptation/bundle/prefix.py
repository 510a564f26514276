"""PEML (arXiv 2605.14055): a shared LoRA and a key/value prefix, whose network may be searched (PrefixNAS).

No code of the paper is public. Its search space, lengths and schedules are our assumptions: `CANDIDATES`, a
search as long as the fit, and the rate of the architecture weights.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ...model.prefix_mtpf import Prefix, Prefixes
from ..tail_training import optimise
from .joint import PlainLora, fit_joint
from .low_rank import LowRank, Matrices, depth_of
from .registry import BundleFit, Job, JobPart, register_bundle_method
from .training import FromLabels, bundle_tail, fresh_heads, objective_of, train_bundle

METHODS = ("peml", "prefix")
ACTIVATIONS = {"tanh": nn.Tanh, "gelu": nn.GELU}
TABLE_STD = 0.3
"""Of a table at the start: about what the networks give. An assumption, as the three below."""
CHOICE_RATE = 0.01
"""Learning rate of the architecture weights."""
HELD_OUT, EVERY = 0.1, 2
"""Share of the training rows from which the architecture weights learn, and at which steps."""


class Candidate(NamedTuple):
    """A way of making a prefix: ``table``, or a network with the activation ``tanh`` or ``gelu``."""

    kind: str
    width: int
    length: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.width}x{self.length}" if self.width else f"{self.kind}x{self.length}"


CANDIDATES = [
    Candidate(kind, width, length)
    for kind, width in (("table", 0), ("tanh", 64), ("tanh", 128), ("gelu", 128))
    for length in (4, 8, 16)
]


class PrefixNetwork(nn.Module):
    """P = N(E): E ``(length, width)`` is learnt, N is linear, activation, linear; a table is P itself."""

    def __init__(self, candidate: Candidate, shape: tuple[int, ...]):
        super().__init__()
        self.shape, size = (candidate.length, *shape), int(np.prod(shape))
        width = candidate.width or size
        std = 1.0 if candidate.width else TABLE_STD
        self.start = nn.Parameter(torch.randn(candidate.length, width) * std)
        self.network = nn.Sequential()
        if candidate.width:
            activation = ACTIVATIONS[candidate.kind]()
            self.network.extend([nn.Linear(width, width), activation, nn.Linear(width, size)])

    def forward(self) -> torch.Tensor:
        """Return keys and values ``(layers, 2, heads, length, width of a head)``."""
        return self.network(self.start).view(self.shape).permute(1, 2, 3, 0, 4)


class PrefixedLora(PlainLora):
    """A LoRA with a prefix in the same layers: that of one network, or a mixture of several.

    The mixture is the sum of the candidates' prefixes, weighted by softmax(a). They differ in length: a slot
    that only some candidates have is their weighted mean, and counts in the attention as much as these
    weigh, w, by log w in its score. With all weight on one candidate the mixture is that candidate's prefix.

    Attributes:
        choice: The logits a of the architecture weights ``(candidates,)``, not among the ``parameters``.
    """

    def __init__(self, job: Job, candidates: list[Candidate]):
        super().__init__(job)
        config: Any = job.model.config.encoder_config
        depth, total = depth_of(job.model.backbone, self.matrices(None)), config.num_hidden_layers
        heads = config.num_attention_heads
        self._layers = range(total - depth, total)
        shape = (depth, 2, heads, config.hidden_size // heads)
        self._lengths = [candidate.length for candidate in candidates]
        networks = nn.ModuleList(PrefixNetwork(candidate, shape) for candidate in candidates)
        self._networks = networks.to(job.model.device)
        self.choice = nn.Parameter(torch.zeros(len(candidates), device=job.model.device))
        self.parameters += self._networks.parameters()

    @property
    def network_parameters(self) -> int:
        """Numbers that are trained to make the prefix."""
        return sum(parameter.numel() for parameter in self._networks.parameters())

    def prefixes(self) -> Prefixes:
        """Return the prefix as it is now, with gradients to networks and choice."""
        made, bias = [network() for network in self._networks], None
        slots = made[0]
        if len(made) > 1:
            longest = max(self._lengths)
            padded = [
                nn.functional.pad(each, (0, 0, 0, longest - length))
                for each, length in zip(made, self._lengths, strict=True)
            ]
            lengths = torch.tensor(self._lengths, device=self.choice.device)
            has = torch.arange(longest, device=self.choice.device) < lengths[:, None]
            weights = self.choice.softmax(0)[:, None] * has
            bias = weights.sum(0).log()
            shares = weights / weights.sum(0)  # (candidates, slots)
            slots = torch.einsum("cs,cl...sd->l...sd", shares, torch.stack(padded))
        pairs = zip(self._layers, slots, strict=True)
        return {number: Prefix(pair[0], pair[1], bias) for number, pair in pairs}


class PrefixAlone(PrefixedLora):
    """A prefix that is trained alone; the LoRA is that of the adapter it starts from, or without effect."""

    def __init__(self, job: Job, candidates: list[Candidate]):
        super().__init__(job, candidates)
        self.parameters = list(self._networks.parameters())
        kept = None if job.start else 1
        self._fixed = {
            path: LowRank(pair.down[:kept].detach(), pair.up[:, :kept].detach())  # B of a fresh one is zero
            for path, pair in super().matrices(None).items()
        }

    def matrices(self, part: str | None) -> Matrices:
        """Return the LoRA, which is not trained."""
        return getattr(self, "_fixed", None) or super().matrices(part)


def search(job: Job, kind: type[PrefixedLora]) -> tuple[Candidate, dict[str, Any]]:
    """Train the mixture of all candidates and its weights a; return the best, and what the search took.

    First order: LoRA, heads and networks learn from 90 % of the training rows, and after every second of
    their steps a takes one on the others.
    """
    started, settings = time.time(), job.settings
    torch.manual_seed(settings.seed)
    mixture, heads = kind(job, CANDIDATES), fresh_heads(job)
    depth = depth_of(job.model.backbone, mixture.matrices(None))
    if ("search", depth) not in job.cache:
        halves = zip(*(_split(part) for part in job.parts), strict=True)
        job.cache["search", depth] = [FromLabels(replace(job, parts=list(half)), depth) for half in halves]
    most, held_out = job.cache["search", depth]
    tail, steps = bundle_tail(job.model, mixture, settings), most.steps
    optimizer = torch.optim.Adam([mixture.choice], lr=CHOICE_RATE)
    choosing = held_out.losses(tail, heads, settings)

    def losses() -> Iterator[torch.Tensor]:
        for number, loss in enumerate(most.losses(tail, heads, settings), 1):
            yield loss  # whoever asks for the next one has taken its step
            if number % EVERY == 0:
                (mixture.choice.grad,) = torch.autograd.grad(next(choosing), [mixture.choice])
                optimizer.step()

    trained = [*mixture.parameters, *(p for head in heads.values() for p in head.parameters())]
    optimise(trained, losses(), lambda: 0.0, steps, settings, f"{job.name}: search", until=steps)
    weights = mixture.choice.detach().softmax(0).tolist()
    cost = {"search_steps": steps, "search_seconds": round(time.time() - started, 1)}
    named = {str(candidate): round(w, 4) for candidate, w in zip(CANDIDATES, weights, strict=True)}
    return CANDIDATES[int(np.argmax(weights))], {"search": cost, "architecture_weights": named}


def _split(part: JobPart) -> tuple[JobPart, JobPart]:
    """Return a part with 90 % of its training rows, and with the others."""
    data: Any = part.data
    order = np.random.default_rng(6).permutation(len(data.train))
    count = max(1, round(HELD_OUT * len(order)))
    held_out = data.train.take(order[:count])
    most = data.train.take(order[count:]) if len(order) > count else held_out
    none = held_out.take([])  # the search scores nothing
    return (
        replace(part, data=replace(data, train=most, validation=none)),
        replace(part, data=replace(data, train=held_out, validation=none)),
    )


def _fit(job: Job, kind: type[PrefixedLora]) -> BundleFit:
    settings = job.settings
    record: dict[str, Any] = {}
    candidate = Candidate("tanh", settings.prefix_width, settings.prefix_length)
    if settings.prefix == "searched":
        candidate, record = search(job, kind)
    elif settings.prefix == "random":
        candidate = CANDIDATES[np.random.default_rng([settings.seed, 6]).integers(len(CANDIDATES))]
    torch.manual_seed(settings.seed)
    heads = fresh_heads(job)
    lora = kind(job, [candidate])
    fit = train_bundle(job, lora, heads, objective_of(job, lora))
    about = {"length": candidate.length, "network_parameters": lora.network_parameters}
    fit.composition |= {"prefix": {"kind": settings.prefix, "network": str(candidate), **about}, **record}
    return fit


@register_bundle_method("peml", needs="data")
def fit_peml(job: Job) -> BundleFit:
    """Train one LoRA, a prefix and all heads; ``prefix`` of the settings says how the prefix is made."""
    if job.settings.prefix != "none":
        return _fit(job, PrefixedLora)
    fit = fit_joint(job)
    fit.composition |= {"prefix": {"kind": "none"}}
    return fit


@register_bundle_method("prefix", needs="data")
def fit_prefix(job: Job) -> BundleFit:
    """Train a prefix and all heads, and no LoRA."""
    return _fit(job, PrefixAlone)
