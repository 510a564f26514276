"""Train LoRA and heads on cached trunk outputs, with early stopping on validation."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup

from ..data.batches import LENGTH_MULTIPLE, padded_length, row_batches
from ..devices import precision, wants_few_shapes
from ..errors import DataError
from ..model.adapters_mtpf import AdapterHead, LoraSettings, copy_lora, extend_lora
from ..model.modeling_mtpf import MtpfModel
from ..model.trunk_mtpf import TrunkOutput, run_layers, tail_views
from .fit_state import FitState
from .settings import FitSettings, LoraShape
from .trunk_cache import TrunkCache

Tail = Callable[[TrunkOutput], torch.Tensor]
"""Last hidden states ``(rows, tokens, hidden)`` in float32 from the trunk's output."""

POOL = 50
"""How many batches are sorted by length together: little padding, and still random batches."""


def app_parameters(model: MtpfModel, name: str) -> list[nn.Parameter]:
    """Return the parameters of an app or a bundle: LoRA and heads."""
    lora = [p for key, p in model.backbone.named_parameters() if f".{name}." in key]
    return [*lora, *(p for head in model.parts(name).values() for p in head.parameters())]


def add_app(
    model: MtpfModel, name: str, head: AdapterHead | None, start_from: str | None, shape: LoraShape
) -> None:
    """Put LoRA and head of a new app into the model; it starts from a loaded adapter's LoRA, or fresh.

    Where the shape has more layers, modules or a higher rank than that adapter, these start without effect.

    Raises:
        RecipeError: The shape has no room for all of that adapter.
        AdapterError: The encoder has no such layers or modules.
    """
    if start_from is None:
        r = shape.r or LoraSettings.r
        layers = shape.layers or LoraSettings.layers
        model.add_adapter(name, LoraSettings(r, 2 * r, layers, shape.targets), head)
        return
    model.adapter_depth(start_from)  # raises for an unknown adapter
    if shape == LoraShape():
        copy_lora(model.backbone, start_from, name)
    else:
        extend_lora(model.backbone, start_from, name, shape.layers, shape.r, shape.targets)
    if head is not None:
        model.heads[name] = head.to(model.device)


def shuffled_batches(
    lengths: np.ndarray,
    batch_size: int,
    max_length: int,
    generator: np.random.Generator,
    multiple: int = LENGTH_MULTIPLE,
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield rows and padded length, a ``multiple``, of batches without end.

    Each pass has every row once; a pass that does not fill its last batch takes rows of the next.
    """
    waiting = np.array([], dtype=np.int64)
    while True:
        while len(waiting) < batch_size:
            waiting = np.concatenate([waiting, generator.permutation(len(lengths))])
        whole = len(waiting) // batch_size * batch_size
        order, waiting = waiting[:whole], waiting[whole:]
        batches = []
        for start in range(0, whole, POOL * batch_size):
            pool = order[start : start + POOL * batch_size]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            batches += np.split(pool, len(pool) // batch_size)
        for index in generator.permutation(len(batches)):
            longest = int(lengths[batches[index]].max())
            yield batches[index], padded_length(longest, max_length, multiple)


def train_tail(
    model: MtpfModel,
    name: str,
    train: TrunkCache,
    loss_of: Callable[[torch.Tensor, np.ndarray], torch.Tensor],
    score: Callable[[], float],
    settings: FitSettings,
    groups: list[dict[str, Any]] | None = None,
    layers: list[nn.Module] | None = None,
    until: int | None = None,
) -> dict[str, Any]:
    """Train LoRA and head of an app, and restore the best state by validation.

    Args:
        model: The backbone with the app in it; no other parameter changes.
        name: The app.
        train: Training rows.
        loss_of: Loss from the last hidden states ``(rows, tokens, hidden)`` and the row numbers.
        score: Validation score of the app as it is, the higher the better.
        settings: Learning rate, steps, patience, ...
        groups: What to train instead, see `optimise`.
        layers: Layers to run on the trunk's outputs instead of the model's with the app's LoRA.
        until: See `optimise`.

    Returns:
        What `optimise` does.

    Raises:
        DataError: The loss is not finite.
    """
    tail = adapter_tail(model, name, settings, layers)
    losses = (loss_of(tail(trunk), rows) for trunk, rows in training_batches(train, settings))
    steps = settings.steps_for(len(train.encoded))
    return optimise(groups or app_parameters(model, name), losses, score, steps, settings, name, until)


def adapter_tail(
    model: MtpfModel, name: str, settings: FitSettings, layers: list[nn.Module] | None = None
) -> Tail:
    """Return the tail of a loaded adapter, or of other layers."""

    def tail(trunk: TrunkOutput) -> torch.Tensor:
        views = layers or tail_views(model.backbone, len(trunk.calls), name)
        with precision(model.device, settings.mixed_precision):
            return run_layers(model.backbone, trunk, views).float()

    return tail


def training_batches(
    train: TrunkCache, settings: FitSettings, stream: Sequence[int] = (2,), start: int = 0
) -> Iterator[tuple[TrunkOutput, np.ndarray]]:
    """Yield trunk outputs and row numbers of random batches without end, from the one numbered ``start`` on.

    ``stream`` extends the seed.
    """
    few_shapes = wants_few_shapes(train.model.device, settings.mixed_precision)
    generator = np.random.default_rng([settings.seed, *stream])
    batches = shuffled_batches(
        train.encoded.lengths,
        settings.batch_size,
        settings.max_length,
        generator,
        LENGTH_MULTIPLE if few_shapes else 1,
    )
    for rows, length in islice(batches, start, None):
        yield train.batch(rows, length), rows


def optimise(
    trained: list[nn.Parameter] | list[dict[str, Any]],
    losses: Iterator[torch.Tensor],
    score: Callable[[], float],
    steps: int,
    settings: FitSettings,
    name: str,
    until: int | None = None,
    state: FitState | None = None,
) -> dict[str, Any]:
    """Take a step for each loss, and restore the best state of the parameters by validation.

    Args:
        trained: What is trained, or groups of it as PyTorch's optimisers take them, each with its peak rate
            ``lr``; a loss may leave some out.
        losses: Each computed, when it is asked for, from the parameters as they are then.
        score: Validation score as it is now, the higher the better.
        steps: At most; fewer where ``settings.patience`` is exhausted.
        settings: Learning rate, evaluations, patience, ...
        name: For the progress bar.
        until: Take this many of the steps, and leave the last state; nothing is scored.
        state: Where the state is written at each evaluation; the losses of the steps that it tells of are
            not among ``losses``.

    Returns:
        Steps taken, step of the best state, and the scores of all evaluations.

    Raises:
        DataError: The loss is not finite.
    """
    groups: list[Any] = list(trained)
    if not isinstance(groups[0], dict):
        groups = [{"params": groups, "lr": settings.learning_rate}]
    parameters = [parameter for group in groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.requires_grad_(True)
    every = math.ceil(steps / settings.evaluations)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(0.1 * steps), steps)
    step, scores, best = _resume(state, parameters, optimizer, schedule)
    over = step > 0 and len(scores) - best["evaluation"] >= settings.patience
    taken = _take_steps(optimizer, schedule, losses, range(step + 1, 0 if over else steps + 1))
    with tqdm(taken, total=steps, initial=step, desc=name, disable=not settings.progress) as progress:
        for step in progress:
            if until is not None:
                if step == until:
                    break
                continue
            if step % every and step != steps:
                continue
            scores.append(score())
            progress.set_postfix(validation=f"{scores[-1]:.4f}")
            if scores[-1] > best["score"]:
                values = [parameter.detach().clone() for parameter in parameters]
                best = {"score": scores[-1], "step": step, "evaluation": len(scores), "state": values}
            if state:
                now = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
                now |= {"parameters": [p.data for p in parameters], "random": torch.get_rng_state()}
                state.write(step, scores=scores, best=best, **now)
            if len(scores) - best["evaluation"] >= settings.patience:
                break
    for parameter in parameters:
        parameter.grad = None
    if until is not None:
        return {"steps": until}
    _restore(parameters, best["state"])
    return {"steps": step, "best_step": best["step"], "validation_scores": [round(s, 4) for s in scores]}


def _resume(
    state: FitState | None, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, schedule: Any
) -> tuple[int, list[float], dict[str, Any]]:
    """Restore what a stopped training had; return steps taken, scores of evaluations, and the best state."""
    if state is None or state.step == 0:
        return 0, [], {"score": -math.inf}
    _restore(parameters, state.values["parameters"])
    optimizer.load_state_dict(state.values["optimizer"])
    schedule.load_state_dict(state.values["schedule"])
    torch.set_rng_state(state.values["random"])
    return state.step, state.values["scores"], state.values["best"]


def _restore(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)


def _take_steps(
    optimizer: torch.optim.Optimizer, schedule: Any, losses: Iterator[torch.Tensor], steps: range
) -> Iterator[int]:
    """Yield the number of each optimiser step once it is taken."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step, loss in zip(steps, losses, strict=False):
        if not torch.isfinite(loss):
            raise DataError(f"The loss at step {step} is not finite; lower the learning rate.")
        _set_gradients(parameters, loss)
        optimizer.step()
        schedule.step()
        yield step


def _set_gradients(parameters: list[nn.Parameter], loss: torch.Tensor) -> None:
    """Set the gradients, scaled to a norm of at most 1."""
    # Not backward(): it would fill the gradients of the frozen layers of the tail, too.
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    scale = torch.nn.utils.get_total_norm([g for g in gradients if g is not None]).clamp(min=1.0)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient / scale


@torch.no_grad()
def tail_outputs(
    tail: Tail, rows: TrunkCache, settings: FitSettings
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Yield row numbers and last hidden states ``(rows, tokens, hidden)`` of all rows."""
    lengths = rows.encoded.lengths
    for batch in row_batches(lengths, settings.max_length, rows.model.device, settings.mixed_precision):
        hidden = tail(rows.batch(batch.rows, batch.length))
        yield batch.rows[: batch.real], hidden[: batch.real]


def label_weights(counts: np.ndarray, kind: str) -> torch.Tensor | None:
    """Return the weight of each label in the loss, float32 ``(labels,)``, from its number of examples.

    ``None`` for the kind ``none``; ``balanced`` is scikit-learn's: total / (labels × count).
    """
    if kind == "none":
        return None
    present = counts > 0
    weights = np.where(present, counts.sum() / (present.sum() * np.maximum(counts, 1)), 0.0)
    return torch.tensor(weights, dtype=torch.float32)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Mean cross-entropy in float32; label -100 is ignored."""
    weights = None if weights is None else weights.to(logits.device)
    return nn.functional.cross_entropy(logits.float(), targets.to(logits.device), weight=weights)
