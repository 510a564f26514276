"""Adding an app to a running model, with all checks and its head, against PEFT's loading of the folder."""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from eval.speed import clock

CONTESTANTS = {"mtpf": 99, "peft": 99}
APPS = 12


def measure(contestant: str, options: dict) -> dict[str, float]:
    """Add apps one after the other; the first, which meets plain linear layers, is reported separately."""
    import torch

    from eval.speed.app_inputs import add_app, wrapped_model

    torch.set_num_threads(options["threads"])
    with tempfile.TemporaryDirectory() as work:
        source = wrapped_model()
        add_app(source, "app-0", "token-classification")
        folder = source.save_adapter(Path(work) / "app", "app-0")
        return (_ours if contestant == "mtpf" else _peft)(folder)


def _ours(folder: Path) -> dict[str, float]:
    import torch

    from eval.speed.app_inputs import wrapped_model

    model = wrapped_model()
    inputs = {"input_ids": torch.arange(1000, 1032)[None]}
    times, removals, same = [], [], True
    before: Any = None
    for number in range(APPS):
        started = clock.seconds()
        model.load_adapter(folder, adapter_name=f"app-{number}")
        times.append(1000 * (clock.seconds() - started))
        with torch.inference_mode():
            states = model.encode_adapters(["app-0"], **inputs)["app-0"]
            same &= before is None or torch.equal(states, before)
        before = states
    started = clock.seconds()
    model.load_adapter(folder, adapter_name="app-1", replace=True)
    swapped = 1000 * (clock.seconds() - started)
    for number in range(1, APPS):
        started = clock.seconds()
        model.delete_adapter(f"app-{number}")
        removals.append(1000 * (clock.seconds() - started))
        with torch.inference_mode():
            same &= torch.equal(model.encode_adapters(["app-0"], **inputs)["app-0"], before)
    return {
        "first_ms": round(times[0], 2),  # hashes the backbone
        "add_ms": round(statistics.median(times[1:]), 2),
        "slowest_add_ms": round(max(times[1:]), 2),
        "replace_ms": round(swapped, 2),
        "remove_ms": round(statistics.median(removals), 2),
        "others_bit_equal": float(same),
    }


def _peft(folder: Path) -> dict[str, float]:
    from peft import PeftModel
    from transformers import AutoModel

    from modeling_mtpf.data.packaged_encoder import packaged_encoder

    encoder = AutoModel.from_pretrained(str(packaged_encoder())).eval()
    started = clock.seconds()
    model = PeftModel.from_pretrained(encoder, str(folder), adapter_name="app-0")
    times = [1000 * (clock.seconds() - started)]
    for number in range(1, APPS):
        started = clock.seconds()
        model.load_adapter(str(folder), adapter_name=f"app-{number}")
        times.append(1000 * (clock.seconds() - started))
    return {
        "first_ms": round(times[0], 2),
        "add_ms": round(statistics.median(times[1:]), 2),
        "slowest_add_ms": round(max(times[1:]), 2),
    }


def compare(medians: dict) -> dict[str, tuple[float, str, float]]:
    """Milliseconds, and whether another app's hidden states stayed bit for bit."""
    ours = medians["mtpf"]
    ratio = ours["add_ms"] / medians["peft"]["add_ms"]
    return {
        "adding an app, ms": (ours["add_ms"], "<=", 50),
        "replacing an app, ms": (ours["replace_ms"], "<=", 50),
        "others' outputs bit-unchanged": (ours["others_bit_equal"], ">=", 1),
        "adding an app over PEFT's loading, which checks nothing": (ratio, "<=", 1.0),
    }
