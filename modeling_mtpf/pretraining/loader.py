"""Batches of a run in the order of its steps, prepared ahead of time.

A batch is a pure function of its number, so PyTorch's data loader may prepare it in any number of worker
processes and a resumed run starts in the middle.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError, MtpfError
from .chunks import ChunkShape, JointBatch, plan_chunks
from .families import Family


class Batches(Dataset):
    """Batch number → the joint batch of this process.

    Args:
        families: Prepared families.
        shape: Allowed shapes of chunks.
        pad_token_id: Fills ids.
        rank: Number of this process.
        world_size: Number of processes.
        parts: Batches per optimiser step, to name the step in messages.
    """

    def __init__(
        self,
        families: list[Family],
        shape: ChunkShape,
        pad_token_id: int,
        rank: int = 0,
        world_size: int = 1,
        parts: int = 1,
    ):
        self.families, self.shape, self.pad_token_id = families, shape, pad_token_id
        self.rank, self.world_size, self.parts = rank, world_size, parts

    def __getitem__(self, number: int) -> JointBatch | MtpfError:
        """Return the batch, or what is wrong with its data: errors do not cross processes unharmed."""
        batches = {}
        for family in self.families:
            try:
                batches[family.name] = family.batch(number, self.rank, self.world_size)
            except MtpfError as error:
                return type(error)(f"Step {number // self.parts + 1}, family {family.name!r}: {error}")
        return plan_chunks(batches, self.shape, self.pad_token_id)


def load_batches(
    batches: Batches, first: int, last: int, workers: int, device: torch.device
) -> Iterator[JointBatch]:
    """Yield the batches ``first`` to ``last - 1``, on the device.

    Args:
        batches: Where they come from.
        first: Number of the first batch.
        last: One more than the number of the last.
        workers: Processes that prepare batches ahead; 0 for this one.
        device: Where the tensors go.

    Raises:
        MtpfError: The data of a batch is broken.
    """
    loader = DataLoader(
        batches,
        sampler=range(first, last),
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        # Without one, the loader draws from the generator of the run: a resumed run draws once more.
        generator=torch.Generator(),
    )
    try:
        for batch in loader:
            if isinstance(batch, MtpfError):
                raise batch
            yield batch.to(device)
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            first_line = str(error).splitlines()[0]
            raise DataError(f"A process that prepares batches broke off: {first_line}") from error
        raise


def _unchanged(batch):
    return batch


__all__ = ["Batches", "load_batches"]
