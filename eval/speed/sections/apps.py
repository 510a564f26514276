"""k apps on one text: trunk once and k tails, next to k separate passes, interleaved."""

from eval.speed import clock

CONTESTANTS = {"6_layers_32_tokens": 99, "6_layers_128_tokens": 99, "12_layers_32_tokens": 99}
COUNTS = (2, 4, 8)
REPEATS = 7
LIMITS = {2: 0.687, 4: 0.520, 8: 0.437}


def measure(contestant: str, options: dict) -> dict[str, float]:
    """Time all ways in turn, so that what else the machine does meets them alike; medians count."""
    import torch

    from eval.speed.app_inputs import add_app, wrapped_model

    torch.set_num_threads(options["threads"])
    layers, tokens = (int(part) for part in contestant.split("_")[:3:2])
    model = wrapped_model(layers)
    names = [f"app-{number}" for number in range(max(COUNTS))]
    for seed, name in enumerate(names):
        add_app(model, name, "text-classification", seed)
    ids = torch.randint(1000, 20000, (1, tokens), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def separate(count: int) -> None:
        for name in names[:count]:
            with model.use_adapter(name):
                model(**inputs)

    def shared(count: int) -> None:
        model.encode_adapters(names[:count], **inputs)

    ways = [("separate", separate), ("shared", shared)]
    times: dict[str, list[float]] = {}
    with torch.inference_mode():
        for _ in range(REPEATS):
            for count in COUNTS:
                for way, run in ways:
                    started = clock.seconds()
                    run(count)
                    times.setdefault(f"{way} {count}", []).append(1000 * (clock.seconds() - started))
    found = {key: sorted(values)[len(values) // 2] for key, values in times.items()}
    for count in COUNTS:
        found[f"ratio {count}"] = found[f"shared {count}"] / found[f"separate {count}"]
    return {key: round(value, 4) for key, value in found.items()}


def compare(medians: dict) -> dict[str, tuple[float, str, float]]:
    """Ratios to separate passes with ``use_adapter``."""
    found = {}
    for tokens in (32, 128):
        numbers = medians[f"6_layers_{tokens}_tokens"]
        for count, limit in LIMITS.items():
            found[f"{count} apps, {tokens} tokens"] = (numbers[f"ratio {count}"], "<=", limit)
    found["8 apps, 12 layers, 32 tokens"] = (medians["12_layers_32_tokens"]["ratio 8"], "<=", 0.30)
    return found
