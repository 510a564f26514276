"""What the machine offers: cores, and whether bf16 is fast."""

import os

import torch


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


__all__ = ["available_cores", "fast_bf16"]
