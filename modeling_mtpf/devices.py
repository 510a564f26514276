"""What the machine offers: cores, memory and a fast bf16."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("auto", "bf16", "float32")
"""Names that `precision` knows."""


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than float32 on this device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def available_cores() -> int:
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def release_free_memory() -> None:
    """Give freed memory back to the operating system, where its C library (glibc) can be asked to.

    Tensors of many sizes leave holes in the heap, and a long run would grow by them.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # other C libraries have no such function
        pass


@contextmanager
def precision(device: torch.device, name: str) -> Iterator[None]:
    """Compute in ``bf16``, ``float32``, or, with ``auto``, in bf16 where the device is fast at it."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bf16(device, name)):
        yield


def uses_bf16(device: torch.device, name: str) -> bool:
    """Whether `precision` of this name computes in bf16."""
    return name == "bf16" or (name == "auto" and fast_bf16(device))


def weights_dtype(device: torch.device, name: str) -> torch.dtype:
    """Return the type of weights that predict in ``bf16``, ``float32``, or, with ``auto``, the faster one."""
    return torch.bfloat16 if uses_bf16(device, name) else torch.float32


def wants_few_shapes(device: torch.device, name: str) -> bool:
    """Whether each new batch shape costs more than the padding that avoids it.

    For bf16 on CPU oneDNN compiles a kernel for every new shape and keeps it (docs/log.md, 2026-11-20).
    """
    return device.type == "cpu" and uses_bf16(device, name)
