"""Processes that fork after loading: servers that preload a model, and ``multiprocessing`` with ``fork``."""

import ctypes
import os
import re
import threading
from contextlib import suppress

import torch

_SOFT = 1
"""``omp_pause_soft``: threads end, settings stay."""


def held_at_fork() -> threading.RLock:  # type: ignore[valid-type]
    """Return a lock that no other thread holds while the process forks.

    So a child finds the lock free, and what it guards as it is between two changes.
    """
    lock = threading.RLock()
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock


def _end_openmp_threads() -> None:
    """End the forking thread's OpenMP workers; its next parallel operation starts others.

    A child gets the list of the workers but not the workers. With GNU's OpenMP, that of torch on Linux, its
    first parallel operation would wait for them for ever. Other implementations look after this themselves.
    """
    with suppress(OSError, AttributeError):  # not Linux, or a libgomp of before 2019
        with open("/proc/self/maps") as maps:
            libraries = set(re.findall(r"/\S*/libgomp\S*", maps.read()))
        for library in libraries:
            ctypes.CDLL(library).omp_pause_resource_all(_SOFT)


def _renew_threads() -> None:
    """Let a child make torch's other pool before its threads race for it, and tokenize without a pool."""
    torch.set_num_threads(torch.get_num_threads())
    # A pool of tokenizers asked for by name would wait for threads that the child lacks; by default it knows.
    if os.environ.get("TOKENIZERS_PARALLELISM"):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_end_openmp_threads, after_in_child=_renew_threads)
