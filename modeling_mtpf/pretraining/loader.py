"""Prepare the batches of a run ahead of time: each is a pure function of its number."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ..errors import MtpfError
from .chunks import ChunkShape, JointBatch, plan_chunks
from .families.base import Family


class Batches:
    """Batch number → the joint batch of this process; ``parts`` are the batches per optimiser step."""

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
        """Return a batch; an error in its data names step, family, source and, if known, the row."""
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
    """Yield the batches ``first`` to ``last - 1`` on the device; a thread prepares ``prefetch`` ahead."""
    if prefetch == 0:
        yield from (batches[number].to(device) for number in range(first, last))
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
