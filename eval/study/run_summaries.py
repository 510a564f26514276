"""Pre-finetuning runs as small records without local paths, that may be committed and compared."""

import json
from pathlib import Path
from typing import Any

from modeling_mtpf.data.sources import source_name
from modeling_mtpf.pretraining.run_record import FREE_KEYS, METRICS_FILE, RUN_FILE

WINDOW = 10
"""Logged lines that are averaged at the start and at the end of a run."""
CURVES = ("loss/ner", "loss/tc", "pseudo_label_accuracy/ner", "retrieval_accuracy/tc", "uniformity/tc")
DIAGNOSTICS = ("gradient_cosine/", "tail_cka/")


def summarize_run(folder: Path) -> dict[str, Any]:
    """Return what is kept of a finished run: recipe, data, movement, curves, diagnostics, sizes, seconds.

    Args:
        folder: Output folder of ``train/pretrain.py``.
    """
    record = json.loads((folder / RUN_FILE).read_text("utf-8"))
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text("utf-8").splitlines()]
    keys = sorted({key for line in lines for key in line if "/" in key})
    values = {key: [line[key] for line in lines if key in line] for key in keys}
    recipe = {key: value for key, value in record["recipe"].items() if key not in FREE_KEYS}
    return {
        "regime": record["regime"],
        "recipe": _without_paths(recipe),
        "data": record["data"],
        "versions": record["versions"],
        "hardware": record["hardware"],
        "started": record["started"],
        "seconds": record["seconds"],
        "resumed_at": record.get("resumed_at"),
        "moved": record["moved"],
        "sizes": _sizes(folder),
        "first": {key: _mean(value[:WINDOW]) for key, value in values.items()},
        "last": {key: _mean(value[-WINDOW:]) for key, value in values.items()},
        "steps": [line["step"] for line in lines],
        "curves": {key: values[key] for key in CURVES if key in values},
        "diagnostics": {key: values[key] for key in keys if key.startswith(DIAGNOSTICS)},
    }


def _without_paths(value: Any) -> Any:
    """Name files and folders by their last part."""
    if isinstance(value, dict):
        return {key: _without_paths(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_without_paths(own) for own in value]
    return source_name(value) if isinstance(value, str) and "/" in value else value


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of the weights of the backbone and of each adapter."""
    return {
        str(file.parent.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.glob("*/**/*model.safetensors"))
        if "checkpoints" not in file.parts
    }


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)


__all__ = ["WINDOW", "summarize_run"]
