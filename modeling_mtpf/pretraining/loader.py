"""Prepare the batches of a run ahead of time, in the order of its steps.

A batch is a pure function of its number: a thread may prepare it ahead, and a resumed run starts in the
middle.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ..errors import MtpfError
from .chunks import ChunkShape, JointBatch, plan_chunks
from .families.base import Family


class Batches:
    """Batch number → the joint batch of this process.

    Args:
        families: The families, prepared.
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

    def __getitem__(self, number: int) -> JointBatch:
        """Return a batch.

        Raises:
            MtpfError: Its data is broken; the message names step, family, source and, if known, the row.
        """
        batches = {}
        for family in self.families:
            try:
                batches[family.name] = family.batch(number, self.rank, self.world_size)
            except MtpfError as error:
                step = number // self.parts + 1
                raise type(error)(f"Step {step}, family {family.name!r}: {error}") from error
        return plan_chunks(batches, self.shape, self.pad_token_id)


def load_batches(
    batches: Batches, first: int, last: int, prefetch: int, device: torch.device
) -> Iterator[JointBatch]:
    """Yield the batches ``first`` to ``last - 1``, on the device.

    Args:
        batches: Where they come from.
        first: Number of the first batch.
        last: One more than the number of the last.
        prefetch: How many batches a thread prepares ahead; 0 for none.
        device: Where the tensors go.

    Raises:
        MtpfError: The data of a batch is broken.
    """
    if prefetch == 0:
        for number in range(first, last):
            yield batches[number].to(device)
        return
    # A thread, not processes: rows are tokenized already, and a fork of a process that runs Arrow's threads
    # may hang.
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        ahead: deque[Future[JointBatch]] = deque()
        try:
            for number in range(first, last):
                ahead.append(pool.submit(_prepare, batches, number, device.type == "cuda"))
                if len(ahead) > prefetch:
                    yield ahead.popleft().result().to(device)
            while ahead:
                yield ahead.popleft().result().to(device)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _prepare(batches: Batches, number: int, pin: bool) -> JointBatch:
    batch = batches[number]
    return batch.pin_memory() if pin else batch
