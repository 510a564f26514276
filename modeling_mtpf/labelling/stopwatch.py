"""Seconds spent in named stages."""

import time
from collections import defaultdict


class Stopwatch:
    """Adds up the seconds of named stages; each lap ends one stage and begins the next."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Count the time since the last lap towards a stage."""
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now

    def __str__(self) -> str:
        total = sum(self.seconds.values()) or 1.0
        return ", ".join(f"{stage} {seconds / total:.1%}" for stage, seconds in self.seconds.items())
