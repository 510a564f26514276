"""Gradient caching: a batch of 1,024 pairs against batches of 64 over the same pairs."""

CONTESTANTS = {"batch_64": 1, "cached_1024": 1}
SOURCES = 1


def measure(contestant: str, options: dict) -> dict[str, float]:
    """Train on some sources several times; the last pass counts."""
    from eval.speed.inputs import our_run

    if contestant == "cached_1024":
        # About the tokens of 64 of these pairs: a chunk holds no more than the small batch.
        return our_run(options, regime="tc", steps=SOURCES, pairs=1024, cache=True, chunk_tokens=2048)
    return our_run(options, regime="tc", steps=16 * SOURCES, pairs=64, batches_per_source=16)


def compare(medians: dict) -> dict[str, tuple[float, str, float]]:
    """Memory of the whole process, and time per pair."""
    small, large = medians["batch_64"], medians["cached_1024"]
    above = (large["peak_mb"] - large["before_mb"]) / (small["peak_mb"] - small["before_mb"])
    time = small["pairs_per_second"] / large["pairs_per_second"]
    return {
        "memory above that before training, cached 1,024 over batch 64": (above, "<=", 1.25),
        "peak memory of cached 1,024 over batch 64": (large["peak_mb"] / small["peak_mb"], "<=", 1.25),
        "time per pair of cached 1,024 over batch 64": (time, "<=", 1.45),
    }
