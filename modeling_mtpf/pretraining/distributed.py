"""Exchange between processes: with DDP, the mean of their losses must be the loss of the joined batch."""

import torch
from torch import distributed


def num_processes() -> int:
    """Return the number of processes that train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def process_index() -> int:
    """Return the number of this process."""
    return distributed.get_rank() if num_processes() > 1 else 0


def wait_for_all() -> None:
    """Wait until every process gets here."""
    if num_processes() > 1:
        distributed.barrier()


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Join all processes' rows ``(rows, ...)`` in the order of the processes.

    The gradient of a row is the sum over all processes' losses, which with DDP's mean is that of the joined
    batch; a plain ``all_gather`` would drop that of the others.
    """
    return rows if num_processes() == 1 else _GatherRows.apply(rows)


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
