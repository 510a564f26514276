"""Compose apps that exist: one LoRA of theirs, merged without training or calibrated by a tiny correction.

All methods work on the exact product B A of each module. ``lc`` and ``lc++`` are Learnable Calibration
(arXiv 2507.16083), whose code is not public; what it leaves open is marked as our assumption.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import nn

from ...errors import RecipeError
from ...model.configuration_mtpf import encoder_layout
from .low_rank import LowRank, Matrices, lora_matrices, low_rank
from .registry import BundleFit, Job, register_bundle_method
from .training import Fixed, app_heads, bundle_tail, objective_of, train_bundle

CORRECTION_RANK, CORRECTION_SCALE = 4, 2.0
"""Of ``lc++``: the rank is the paper's, the scale our assumption."""
KEPT = 0.2
"""Share of entries that ``ties`` keeps (the paper's choice, arXiv 2306.01708)."""
DROPPED = 0.5
"""Share of entries that ``dare`` drops: our assumption; its paper (arXiv 2311.03099) drops up to 0.9."""
LORAHUB_BOUND, LORAHUB_PENALTY, LORAHUB_TRIALS = 1.5, 0.05, 40
"""Of the weights in ``lorahub`` (arXiv 2307.13269): largest one, L1 penalty; the number of trials is ours."""

Merge = Callable[[list[torch.Tensor], np.random.Generator], torch.Tensor]
"""One matrix of several of the same shape."""


def app_matrices(job: Job) -> list[Matrices]:
    """Return the LoRA of each part's app."""
    return [lora_matrices(job.model.backbone, str(part.app)) for part in job.parts]


def weighted(apps: list[Matrices], weights: list[float]) -> Matrices:
    """Return the exact weighted sum, of the rank of all together; an app adds nothing where it has none."""
    merged = {}
    for path in sorted({path for app in apps for path in app}):
        pairs = [(app[path], weight) for app, weight in zip(apps, weights, strict=True) if path in app]
        downs, ups = zip(*((pair.down, pair.up * weight) for pair, weight in pairs), strict=True)
        merged[path] = LowRank(torch.cat(downs), torch.cat(ups, 1))
    return merged


def _weights(job: Job, default: float | None) -> list[float]:
    """Return the parts' weights; refuse some where the method has its own."""
    given = [part.weight for part in job.parts]
    if default is not None and any(weight is not None for weight in given):
        raise RecipeError("This method has weights of its own; choose concat, lc or lc++, or leave them out.")
    return [weight if weight is not None else default or 1.0 for weight in given]


def _merged(job: Job, matrices: Matrices, **composition: Any) -> BundleFit:
    """Return a LoRA that is not trained, with the apps' heads as they are, or trained on it."""
    fixed, retrained = Fixed(matrices), job.settings.heads == "retrained"
    data = job.texts or all(part.data is not None for part in job.parts)
    objective = objective_of(job, fixed) if retrained or data else None
    fit = train_bundle(job, fixed, app_heads(job), objective, retrained)
    fit.composition |= composition
    return fit


@register_bundle_method("mean", needs="apps", trains=False, random=False)
def fit_mean(job: Job) -> BundleFit:
    """Average the apps' LoRAs."""
    return _merged(job, weighted(app_matrices(job), _weights(job, 1 / len(job.parts))))


@register_bundle_method("sum", needs="apps", trains=False, random=False)
def fit_sum(job: Job) -> BundleFit:
    """Add up the apps' LoRAs."""
    return _merged(job, weighted(app_matrices(job), _weights(job, 1.0)))


@register_bundle_method("concat", needs="apps", trains=False, random=False)
def fit_concat(job: Job) -> BundleFit:
    """Add up the apps' LoRAs with the parts' weights, as PEFT's ``cat`` does."""
    return _merged(job, weighted(app_matrices(job), _weights(job, None)))


def ties(updates: list[torch.Tensor], generator: np.random.Generator) -> torch.Tensor:
    """Keep each matrix's largest entries, elect a sign for each entry, average those that have it."""
    trimmed = []
    for update in updates:
        kept = max(1, round(KEPT * update.numel()))
        least = update.abs().flatten().kthvalue(update.numel() - kept + 1).values
        trimmed.append(torch.where(update.abs() >= least, update, 0))
    stacked = torch.stack(trimmed)
    elected = stacked.sum(0).sign()
    agree = (stacked.sign() == elected) & (stacked != 0)
    return (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)


def dare(updates: list[torch.Tensor], generator: np.random.Generator) -> torch.Tensor:
    """Drop random entries of each matrix, scale the rest up, and average."""
    masks = [torch.from_numpy(generator.random(tuple(update.shape)) >= DROPPED) for update in updates]
    kept = (u * mask.to(u) / (1 - DROPPED) for u, mask in zip(updates, masks, strict=True))
    return sum(kept, torch.zeros_like(updates[0])) / len(updates)


def _merge_products(job: Job, merge: Merge) -> BundleFit:
    """Merge the full products, and return their best approximation of the apps' ranks together."""
    _weights(job, 1.0)
    apps, generator = app_matrices(job), np.random.default_rng([job.settings.seed, 4])
    merged = {}
    for path, pair in weighted(apps, [1.0] * len(apps)).items():
        zero = torch.zeros(len(pair.up), pair.down.shape[1], device=pair.up.device)
        products = [app[path].up @ app[path].down if path in app else zero for app in apps]
        product = merge(products, generator)
        whole = LowRank(torch.eye(product.shape[1]).to(product), product)
        merged[path] = low_rank(whole.down, whole.up, len(pair.down))
    return _merged(job, merged)


@register_bundle_method("ties", needs="apps", trains=False, random=False)
def fit_ties(job: Job) -> BundleFit:
    """Merge by TIES (arXiv 2306.01708)."""
    return _merge_products(job, ties)


@register_bundle_method("dare", needs="apps", trains=False)
def fit_dare(job: Job) -> BundleFit:
    """Merge by DARE (arXiv 2311.03099)."""
    return _merge_products(job, dare)


@register_bundle_method("lorahub", needs="apps", trains=False, random=False)
def fit_lorahub(job: Job) -> BundleFit:
    """Search for the weights with the best validation score, without gradients (arXiv 2307.13269)."""
    _weights(job, 1.0)
    apps, heads = app_matrices(job), app_heads(job)
    objective = objective_of(job, Fixed(weighted(apps, [1.0] * len(apps))))

    def cost(weights: np.ndarray) -> float:
        fixed = Fixed(weighted(apps, weights.tolist()))
        found = objective.validate(bundle_tail(job.model, fixed, job.settings), heads)
        score = float(np.mean([part.score for part in found.values()]))
        return LORAHUB_PENALTY * float(np.abs(weights).mean()) - score

    start = np.full(len(apps), 1 / len(apps))
    bounds = [(-LORAHUB_BOUND, LORAHUB_BOUND)] * len(apps)
    options = {"maxfev": LORAHUB_TRIALS, "initial_simplex": _simplex(start)}
    with torch.no_grad():
        best = minimize(cost, start, method="Nelder-Mead", bounds=bounds, options=options).x
    names = [part.name for part in job.parts]
    weights = {name: round(float(w), 4) for name, w in zip(names, best, strict=True)}
    return _merged(job, weighted(apps, best.tolist()), weights=weights, **objective.record)


def _simplex(start: np.ndarray) -> np.ndarray:
    return np.concatenate([start[None], start + 0.5 * np.eye(len(start))])


class Calibrated:
    """The apps' LoRAs, weighted and fixed, with a correction that all layers of the tail share.

    For a module type, e.g. every query, ``lc++`` adds a low-rank matrix pair, zero at the start, and ``lc`` a
    vector to the output. The average is the paper's; so are the shared correction and the rank.
    """

    def __init__(self, job: Job, vector: bool = False):
        names, apps = [part.name for part in job.parts], app_matrices(job)
        given = [part.weight for part in job.parts]
        weights = [1 / len(given) if weight is None else weight for weight in given]
        self.weights = dict(zip(names, weights, strict=True))
        prefix = encoder_layout(job.model.config.encoder_config.model_type).layers + "."
        fixed = weighted(apps, weights)
        types = {path: path.removeprefix(prefix).partition(".")[2] for path in fixed}
        layers = {path.removeprefix(prefix).partition(".")[0] for path in fixed}
        self._sizes = {types[path]: (len(pair.up), pair.down.shape[1]) for path, pair in fixed.items()}
        self._fixed: dict[str, tuple[str, LowRank | None]] = {
            path: (kind, fixed.get(path))
            for kind in self._sizes
            for path in (f"{prefix}{layer}.{kind}" for layer in sorted(layers, key=int))
        }
        generator = torch.Generator().manual_seed(job.settings.seed)
        self._vector, device = vector, job.model.device
        self._pairs: dict[str, list[nn.Parameter]] = {}
        for kind, (out, into) in sorted(self._sizes.items()):
            if vector:
                self._pairs[kind] = [nn.Parameter(torch.zeros(out, device=device))]
                continue
            down = torch.empty(CORRECTION_RANK, into)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
            zero = torch.zeros(out, CORRECTION_RANK, device=device)
            self._pairs[kind] = [nn.Parameter(down.to(device)), nn.Parameter(zero)]
        self.parameters = [parameter for pair in self._pairs.values() for parameter in pair]

    def matrices(self, part: str | None) -> Matrices:
        """Return the fixed LoRAs and the correction as one LoRA of the rank of all, which is exact."""
        return {path: self._corrected(kind, fixed) for path, (kind, fixed) in self._fixed.items()}

    def _corrected(self, kind: str, fixed: LowRank | None) -> LowRank:
        if self._vector:
            (vector,) = self._pairs[kind]
            out, into = self._sizes[kind]
            fixed = fixed or LowRank(vector.new_zeros(1, into), vector.new_zeros(out, 1))
            return fixed._replace(bias=vector)
        down, up = self._pairs[kind]
        correction = LowRank(down, up * CORRECTION_SCALE)
        if fixed is None:
            return correction
        return LowRank(torch.cat([fixed.down, correction.down]), torch.cat([fixed.up, correction.up], 1))


def _calibrate(job: Job, vector: bool) -> BundleFit:
    torch.manual_seed(job.settings.seed)
    lora = Calibrated(job, vector)
    fit = train_bundle(job, lora, app_heads(job), objective_of(job, lora), job.settings.heads != "frozen")
    trained = sum(parameter.numel() for parameter in lora.parameters)
    fit.composition |= {"weights": lora.weights, "correction_parameters": trained}
    return fit


@register_bundle_method("lc++", needs="apps")
def fit_matrix_calibration(job: Job) -> BundleFit:
    """Average the apps' LoRAs and learn a low-rank correction, which folds exactly into a stock LoRA."""
    return _calibrate(job, vector=False)


@register_bundle_method("lc", needs="apps", stored=False)
def fit_vector_calibration(job: Job) -> BundleFit:
    """Average the apps' LoRAs and learn a vector; a LoRA cannot hold it, so this is for evaluation."""
    return _calibrate(job, vector=True)
