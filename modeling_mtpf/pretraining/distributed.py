"""Exchange between processes, with gradients that fit DDP.

DDP averages the processes' gradients. A loss is right if the mean over processes is the loss of the joined
batch; the functions here make that so.
"""

import torch
from torch import distributed


def num_processes() -> int:
    """Return the number of processes that train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def process_index() -> int:
    """Return the number of this process."""
    return distributed.get_rank() if num_processes() > 1 else 0


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Join all processes' rows ``(rows, ...)`` in the order of the processes, with gradient.

    The gradient of a row is the sum over all processes' losses (a plain ``all_gather`` would drop that of the
    others), which with DDP's mean is exactly that of the joined batch.
    """
    if num_processes() == 1:
        return rows
    return _GatherRows.apply(rows)  # type: ignore[no-any-return]


class _GatherRows(torch.autograd.Function):
    """``all_gather`` whose backward sums; gloo has no reduce-scatter, so all is reduced and cut.

    torch.distributed.nn.functional.all_gather gives the same gradients, but is deprecated in torch 2.13.
    """

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        parts = [torch.empty_like(rows) for _ in range(num_processes())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[override]
        summed = gradient.contiguous().clone()
        distributed.all_reduce(summed)
        return summed.chunk(num_processes())[process_index()]


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """Return the mean of a tensor over all processes, without gradient."""
    if num_processes() == 1:
        return value
    total = value.detach().clone()
    distributed.all_reduce(total)
    return total / num_processes()
