"""Prepare the batches of a run ahead of time: each is a pure function of its number."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ..errors import MtpfError
from .chunks import ChunkShape, JointBatch, plan_chunks
from .distributed import num_processes, process_index
from .families.base import Family


def joint_batch(
    number: int, families: list[Family], shape: ChunkShape, pad_token_id: int, parts: int = 1
) -> JointBatch:
    """Return this process's part of a batch; ``parts`` are the batches per optimiser step.

    An error in its data names step, family, source and, if known, the row.
    """
    batches = {}
    for family in families:
        try:
            batches[family.name] = family.batch(number, process_index(), num_processes())
        except MtpfError as error:
            raise type(error)(f"Step {number // parts + 1}, family {family.name!r}: {error}") from error
    return plan_chunks(batches, shape, pad_token_id)


def load_batches(
    batch: Callable[[int], JointBatch], first: int, last: int, prefetch: int, device: torch.device
) -> Iterator[JointBatch]:
    """Yield the batches ``first`` to ``last - 1`` on the device; a thread prepares ``prefetch`` ahead."""
    if prefetch == 0:
        yield from (batch(number).to(device) for number in range(first, last))
        return

    def prepare(number: int) -> JointBatch:
        return batch(number).pin_memory() if device.type == "cuda" else batch(number)

    # A thread, not processes: rows are tokenized already, and a fork of a process that runs Arrow's threads
    # may hang.
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        ahead: deque[Future[JointBatch]] = deque()
        try:
            for number in range(first, last):
                ahead.append(pool.submit(prepare, number))
                if len(ahead) > prefetch:
                    yield ahead.popleft().result().to(device)
            while ahead:
                yield ahead.popleft().result().to(device)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
