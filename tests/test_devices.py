"""What is asked of the machine: memory given back, and no trouble where it cannot be."""

import ctypes
import sys

import numpy as np
import pytest

from modeling_mtpf import devices


def resident_megabytes() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back_to_the_system():
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("this C library has no malloc_trim")
    held = [np.ones(8_000) for _ in range(4_000)]  # 64 kB each: from the heap, not mapped one by one
    last = np.ones(8_000)  # above them, so that the heap does not shrink by itself
    before = resident_megabytes()
    del held
    devices.release_free_memory()
    assert resident_megabytes() < before - 200
    assert last.sum() == 8_000


@pytest.mark.parametrize("error", [OSError, TypeError, AttributeError])
def test_other_c_libraries_are_left_alone(monkeypatch, error):
    def broken(name):
        raise error("no such library")

    monkeypatch.setattr(ctypes, "CDLL", broken)
    devices.release_free_memory()
