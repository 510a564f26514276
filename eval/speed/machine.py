"""What the machine is: its processor, and what matrix products reach on it."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "asimddp",
    "i8mm",
)
SIZE, REPEATS = 1024, 12


def describe(threads: int) -> dict[str, Any]:
    """Return the processor, its cores and features, and the peaks of matrix products in 10^9 operations/s.

    A multiplication with its addition counts as two; each peak is the best of `REPEATS` products of square
    matrices of `SIZE` rows, by CPU time with one thread and by the clock with more.
    """
    import torch

    torch.set_num_threads(threads)
    facts = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in facts)}
    flags = found.get("flags", found.get("Features", "")).split()
    family = f"family {found['cpu family']}, model {found['model']}" if "cpu family" in found else ""
    return {
        "processor": found.get("model name", platform.processor() or platform.machine()),
        "kind": family,
        "cores": os.cpu_count(),
        "features": [name for name in FEATURES if name in flags],
        "peaks": {name: _peak(*product) for name, product in _products(torch).items()},
    }


def _products(torch: Any) -> dict[str, tuple[Callable, Any, Any]]:
    numbers, whole = torch.randn(SIZE, SIZE), torch.randint(-100, 100, (SIZE, SIZE), dtype=torch.int8)
    half = numbers.bfloat16()
    return {
        "float32": (torch.mm, numbers, numbers),
        "bf16": (torch.mm, half, half),
        "int8": (torch._int_mm, whole, whole),
    }


def _peak(multiply: Callable, one: Any, other: Any) -> float | None:
    from eval.speed import clock

    try:
        multiply(one, other)
    except RuntimeError:  # this build of torch has no such product
        return None
    best = float("inf")
    deadline = time.perf_counter() + 5  # bf16 may be fifty times as slow as float32
    for _ in range(REPEATS):
        started = clock.seconds()
        multiply(one, other)
        best = min(best, clock.seconds() - started)
        if time.perf_counter() > deadline:
            break
    return round(2 * SIZE**3 / best / 1e9, 1)
