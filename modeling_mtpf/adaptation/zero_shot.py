"""An app from the names of its labels alone: no training text is needed, and none was seen."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.app_data import Examples, clean_labels
from ..data.app_sources import Reading, read_one_split
from ..data.backbones import open_backbone
from ..data.label_sets import are_sets
from ..data.sources import Source
from ..errors import RecipeError
from ..model.adapters_mtpf import AdapterHead, check_adapter_name
from ..model.configuration_mtpf import max_tokens
from ..model.predict_mtpf import text_tokenizer
from ..model.sources_mtpf import is_hub_id
from .app import FittedApp, new_folder, save_app
from .scoring import score_app
from .settings import LoraShape
from .tail_training import add_app, app_parameters
from .text_vectors import embed_texts

logger = logging.getLogger(__name__)

SHARPNESS = 20.0
"""By which cosines become logits, as sentence-transformers' losses have it."""


def zero_shot_app(
    labels: Sequence[str],
    *,
    descriptions: Sequence[str] | None = None,
    backbone: str = "packaged",
    backbone_revision: str | None = None,
    output_dir: str | Path | None = None,
    name: str | None = None,
    test: Source | None = None,
    max_length: int = 128,
    columns: Mapping[str, str] | None = None,
    encoding: str | None = None,
) -> FittedApp:
    """Make a text app whose label weights are the vectors of the labels' names, or of descriptions of them.

    Its scores are not calibrated, and it cannot say what is out of scope.

    Args:
        labels: At least two.
        descriptions: What is embedded in place of each name, ``_`` and ``-`` of which are read as spaces.
        backbone: ``packaged``, a folder or a Hub id.
        backbone_revision: Commit of its repo.
        output_dir: New folder for the app; by default nothing is saved.
        name: Adapter name; by default that of the folder, or ``app``.
        test: Texts with labels, to score it.
        max_length: Longest input in tokens.
        columns: Of the test set, see `load_app_data`.
        encoding: Of the test set.

    Raises:
        MtpfError: A mistake in the labels, or the backbone cannot be loaded.

    Example:
        >>> zero_shot_app(["billing", "delivery"], output_dir="apps/topic")  # doctest: +SKIP
    """
    started, labels = time.time(), list(labels)
    texts = (
        list(descriptions)
        if descriptions
        else [label.replace("_", " ").replace("-", " ") for label in labels]
    )
    if len(labels) < 2 or len(set(labels)) < len(labels) or len(texts) != len(labels):
        raise RecipeError(
            "A zero-shot app needs at least two different labels, and a description for each or none."
        )
    folder = new_folder(output_dir)
    name = name or (folder.name if folder else "app")
    check_adapter_name(name)
    examples, notes = None, dict[str, Any]()
    if test is None and (columns or encoding):
        raise RecipeError("columns and encoding say how --test is read; give it, or leave them out.")
    if test is not None:
        rows = read_one_split(test, "test", "tc", Reading(labels, columns or {}, encoding))
        clean_labels([rows])
        if are_sets(rows.labels):
            raise RecipeError("A zero-shot app gives a text one label, but the texts of --test have lists.")
        examples = Examples(rows.inputs, rows.labels)
        if unknown := sorted(set(rows.labels) - set(labels)):
            missed = "The test split has %d labels %s that are not in --labels; they count as missed."
            count = sum(label in unknown for label in rows.labels)
            notes["test_labels_not_in_app"] = {"labels": unknown, "count": count}
            logger.warning(missed, count, unknown[:5])
    model, tokenizer = open_backbone(backbone, backbone_revision)
    if not 4 <= max_length <= (limit := max_tokens(model.config.encoder_config)):
        raise RecipeError(f"max_length is {max_length}; this encoder reads 4 to {limit} tokens.")
    vectors = torch.from_numpy(embed_texts(model, tokenizer, texts, None, max_length=max_length))
    norms = vectors.norm(dim=1, keepdim=True)
    head = AdapterHead("text-classification", labels, model.config.hidden_size, max_length)
    with torch.no_grad():
        head.weight.copy_(vectors / norms * (SHARPNESS / norms.mean()))
        head.bias.zero_()
        add_app(model, name, head, None, LoraShape(layers=1, r=1))
        for parameter in app_parameters(model, name):
            parameter.requires_grad_(False).copy_(parameter.half())
    fitted: Any = model.heads[name]
    fitted.tokenizer_sha256 = text_tokenizer(model, tokenizer).sha256
    scores = score_app(model, tokenizer, name, examples) if examples else {}
    record: dict[str, Any] = {
        "family": "tc",
        "method": "zero_shot",
        "start": "fresh",
        "training_data": f"no training texts, {len(labels)} label names alone; scores are not calibrated",
        "protocol": "accuracy, macro F1, and the mean of each label's average precision"
        if examples
        else "not scored",
        "data": {"descriptions": dict(zip(labels, texts, strict=True)), **notes},
        "seeds": {},
        "types": {},
        "metrics": {key: round(v, 4) for key, v in scores.items() if isinstance(v, (int, float))},
        "stored_dtype": "float16",
        "seconds": round(time.time() - started, 1),
    }
    if folder is not None:
        named = is_hub_id(backbone) and not Path(backbone).exists()
        source: dict[str, Any] = {
            "backbone_id": backbone if named else None,
            "backbone_revision": backbone_revision,
        }
        save_app(folder, model, name, dtype=torch.float16, task=record, **source)
    return FittedApp(name, model, record["metrics"], record, folder)
