"""Time that a contestant has taken, for ratios that other work on the machine cannot decide."""

import time


def seconds() -> float:
    """Return CPU seconds of the process where torch has one thread, else seconds of the clock."""
    import torch

    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
