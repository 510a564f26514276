"""From a user's data to one small adapter folder: read, fit with every seed, keep the best, save."""

import logging
import math
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hub_cards import adapter_card

from ..data.app_data import FAMILIES, AppData, Examples, check_app_data, load_app_data
from ..data.backbones import open_backbone
from ..errors import AdapterError, MtpfError, RecipeError
from ..metrics import entity_scores
from ..model.adapter_files_mtpf import ADAPTER_CONFIG_FILE, backbone_sha256, read_task
from ..model.adapters_mtpf import count_parameters, validate_adapter_name
from ..model.configuration_mtpf import max_tokens
from ..model.modeling_mtpf import MtpfModel
from ..model.sources_mtpf import is_hub_id
from ..settings import nearest
from .methods import text_lora, text_probe, token_lora  # noqa: F401  they register themselves
from .methods.registry import method_named
from .methods.text_lora import score_texts
from .methods.token_lora import tag_words
from .settings import FitResult, FitSettings
from .storage import stored_dtype

logger = logging.getLogger(__name__)

START = "family-start"
"""Name in memory of the adapter that an app starts from."""

_NOTES = ("empty_rows_skipped", "comment_lines_skipped", "labels_not_in_train", "labels_without_example")
"""What the summary says of the data, where there is any of it."""

PROTOCOLS = {
    "ner": "strict F1 over whole entities (IOB2, seqeval) at word level; words that are cut off count as O",
    "tc": "accuracy, macro F1, and the mean of each label's average precision",
}


@dataclass
class FittedApp:
    """A fitted app.

    Attributes:
        name: Its adapter name in the model.
        model: The backbone with the app loaded; ``model.predict(texts, adapters=[app.name])`` applies it.
        metrics: Test metrics where there is a test set, and validation metrics as ``validation_…``.
        record: Everything that ``task.json`` holds of how it was fitted.
        folder: Where it was saved, if it was.
    """

    name: str
    model: MtpfModel
    metrics: dict[str, float]
    record: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None


def fit_app(
    data: str | Path | AppData,
    family: str,
    *,
    backbone: str | tuple[MtpfModel, PreTrainedTokenizerBase] = "packaged",
    adapter: str | Path | None = None,
    output_dir: str | Path | None = None,
    name: str | None = None,
    method: str = "auto",
    seeds: int = 1,
    settings: FitSettings | None = None,
    backbone_revision: str | None = None,
    adapter_revision: str | None = None,
    **data_options: Any,
) -> FittedApp:
    """Fit one app on the frozen backbone, and save it as an adapter folder.

    Args:
        data: A source (see `load_app_data`), or data that is read already.
        family: ``ner`` or ``tc``.
        backbone: ``packaged``, a folder or a Hub id; or a model and its tokenizer, to fit several apps.
        adapter: Folder or Hub id of the family's LoRA that the app starts from; by default a fresh one.
        output_dir: New folder for the app; by default nothing is saved.
        name: Adapter name; by default that of the folder, or ``app``.
        method: A way of fitting: ``lora``, for ``tc`` also ``probe``; ``auto`` is LoRA for NER and the probe
            for TC.
        seeds: How many seeds are tried from ``settings.seed`` on; the best by validation is kept.
        settings: See `FitSettings`.
        backbone_revision: Commit of the backbone's repo.
        adapter_revision: Commit of the adapter's repo.
        **data_options: Only with a source: ``validation``, ``test``, ``labels``, ``scheme``,
            ``train_fraction``, ``validation_fraction``: see `load_app_data`.

    Raises:
        MtpfError: A mistake in the data or the settings.
        AdapterError: The adapter does not fit the backbone, or the name is not allowed.

    Example:
        >>> app = fit_app("intents.csv", "tc", output_dir="apps/intent")  # doctest: +SKIP
        >>> app.model.predict(["Lunch at 1?"], adapters=[app.name])  # doctest: +SKIP
    """
    started = time.time()
    settings = settings or FitSettings()
    if family not in FAMILIES:
        raise RecipeError(f"Unknown family {family!r}; {nearest(family, list(FAMILIES))}choose ner or tc.")
    method, fit = method_named(family, method)
    _check_seeds(seeds, settings, method)
    folder = _new_folder(output_dir)
    data = _data_of(data, family, settings.seed, data_options)
    model, tokenizer = open_backbone(backbone, backbone_revision) if isinstance(backbone, str) else backbone
    limit = max_tokens(model.config.encoder_config)
    if settings.max_length > limit:
        raise RecipeError(f"max_length is {settings.max_length}; this encoder reads 4 to {limit} tokens.")
    name = name or (folder.name if folder else "app")
    validate_adapter_name(model.backbone, name)
    digest = backbone_sha256(model.backbone)
    start = model.load_adapter(adapter, START, adapter_revision) if adapter is not None else None
    try:
        results = _fit_seeds(model, tokenizer, name, data, start, settings, seeds, fit)
    finally:
        if start is not None:
            model.delete_adapter(START)
    if backbone_sha256(model.backbone) != digest:
        raise RuntimeError("The frozen backbone has changed while an app was fitted: this is a bug.")
    test = score_app(model, tokenizer, name, data.test) if data.test else None
    record = _record(data, method, settings, results, _start_name(adapter), test)
    dtype = stored_dtype((value for _, value in _app_parameters(model, name)), settings)
    record["stored_dtype"] = str(dtype).removeprefix("torch.")
    record["seconds"] = round(time.time() - started, 1)
    if folder is not None:
        _save(folder, model, name, record, _hub_id(backbone), backbone_revision, dtype)
    return FittedApp(name, model, record["metrics"], record, folder)


def _check_seeds(seeds: int, settings: FitSettings, method: str) -> None:
    if seeds < 1 or settings.seed + seeds > 2**31:
        raise RecipeError(f"seeds is {seeds}; it must be at least 1, and all seeds below 2^31.")
    if seeds > 1 and method == "probe":
        raise RecipeError("A probe is the same for every seed; leave seeds at 1, or choose the method lora.")


def _data_of(data: str | Path | AppData, family: str, seed: int, options: dict[str, Any]) -> AppData:
    """Read a source with its options, or check data that is read already."""
    if not isinstance(data, AppData):
        return load_app_data(data, family, seed=seed, **options)
    given = [key for key, value in options.items() if value is not None]
    if given:
        raise RecipeError(f"{given[0]} is an option of reading data, but the data is read already.")
    if data.family != family:
        raise RecipeError(f"The data is of the family {data.family!r}, not {family!r}.")
    check_app_data(data)
    return data


def score_app(
    model: MtpfModel, tokenizer: PreTrainedTokenizerBase, name: str, examples: Examples
) -> dict[str, Any]:
    """Score an app of the model in float32, on inputs cut at its maximal length."""
    if model.heads[name].kind == "token-classification":
        return entity_scores(examples.labels, tag_words(model, tokenizer, name, examples.inputs))
    return score_texts(model, tokenizer, name, examples)


def _fit_seeds(model, tokenizer, name, data, start, settings, seeds: int, fit) -> dict[int, FitResult]:
    """Fit with each seed; the app of the best one by validation stays in the model."""
    results: dict[int, FitResult] = {}
    kept: dict[str, torch.Tensor] = {}
    highest = -math.inf
    for seed in range(settings.seed, settings.seed + seeds):
        if name in model.adapters:
            model.delete_adapter(name)
        try:
            own = FitSettings(**{**vars(settings), "seed": seed})
            results[seed] = fit(model, tokenizer, name, data, start, own)
        except Exception:
            if name in model.adapters:
                model.delete_adapter(name)
            raise
        if results[seed].score > highest:
            highest = results[seed].score
            kept = {key: value.detach().clone() for key, value in _app_parameters(model, name)}
    dtype = stored_dtype(kept.values(), settings)
    for key, value in _app_parameters(model, name):
        value.data.copy_(kept[key].to(dtype))  # rounded now: what is scored next is what is saved
        value.requires_grad_(False)
    return results


def _app_parameters(model: MtpfModel, name: str) -> list[tuple[str, torch.nn.Parameter]]:
    lora = [(key, p) for key, p in model.backbone.named_parameters() if f".{name}." in key]
    return lora + [(f"head.{key}", p) for key, p in model.heads[name].named_parameters()]


def _flat(scores: dict[str, Any]) -> dict[str, float]:
    """Numbers only, rounded; scores by type stay in the record."""
    return {key: round(value, 4) for key, value in scores.items() if isinstance(value, (int, float))}


def _types(scores: dict[str, Any]) -> dict[str, dict[str, float]]:
    """F1 and number of gold entities of each type; empty for TC."""
    return {
        kind: {"f1": round(own["f1"], 4), "support": own["support"]}
        for kind, own in scores.get("types", {}).items()
    }


def _record(
    data: AppData, method: str, settings: FitSettings, results: dict[int, FitResult], start: str, test: Any
) -> dict[str, Any]:
    source = data.notes.get("source", "data in memory")
    best = max(results, key=lambda seed: results[seed].score)
    validation = results[best].validation
    return {
        "family": data.family,
        "method": method,
        "start": start,
        "training_data": f"{source}, {len(data.train):,} training examples",
        "protocol": PROTOCOLS[data.family] + ("" if data.test else "; no test set, validation only"),
        "data": data.notes,
        "settings": {key: value for key, value in vars(settings).items() if key != "progress"},
        "seeds": {
            str(seed): {"validation_score": round(result.score, 4), **result.details}
            for seed, result in results.items()
        },
        "seed": best,
        "metrics": {
            **_flat(test or {}),
            **{f"validation_{key}": value for key, value in _flat(validation).items()},
        },
        "types": _types(test or validation),
    }


def _start_name(adapter: str | Path | None) -> str:
    """Say what the app started from, without a local path."""
    if adapter is None:
        return "fresh"
    path = Path(adapter)
    if not path.is_dir():
        return str(adapter)
    try:
        return read_task(path).get("name", path.name)
    except AdapterError:
        return path.name


def _hub_id(backbone: Any) -> str | None:
    named = isinstance(backbone, str) and is_hub_id(backbone) and not Path(backbone).exists()
    return backbone if named else None


def _new_folder(output_dir: str | Path | None) -> Path | None:
    if output_dir is None:
        return None
    folder = Path(output_dir).resolve()  # of "." there is no name, and nothing beside it
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise MtpfError(f"{output_dir} exists already; choose another --output_dir or remove it.")
    if folder == Path.cwd():
        raise MtpfError(f"{output_dir} is the current folder, which cannot be replaced; name a new one.")
    parent = next(own for own in folder.parents if own.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise MtpfError(f"Nothing can be written to {parent}; choose another --output_dir.")
    return folder


def _save(
    folder: Path, model: MtpfModel, name: str, record: dict, backbone_id, revision, dtype: torch.dtype
) -> None:
    """Write the folder beside its place, then move it there in one go."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        model.save_adapter(
            temporary,
            name,
            backbone_id=backbone_id,
            backbone_revision=revision,
            dtype=dtype,
            task=record,
        )
        task = read_task(temporary)
        config = model.backbone.peft_config[name].to_dict()
        config["target_modules"] = sorted(config["target_modules"])
        size = count_parameters(model.backbone, name)
        adapter_card(task, config, num_parameters=size).save(temporary / "README.md")
        if folder.is_dir():
            folder.rmdir()  # it is empty
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        raise RuntimeError(f"{folder} was not written: this is a bug.")


def summary(app: FittedApp) -> str:
    """Return what a user wants to see at the end: scores, seeds, what was skipped, the folder."""
    lines = [f"App {app.name!r}, {app.record['method']} on {app.record['training_data']}", ""]
    lines += [f"  {key:<32} {value:.4f}" for key, value in app.metrics.items() if isinstance(value, float)]
    for kind, own in app.record["types"].items():
        lines.append(f"  F1 of {kind:<26} {own['f1']:.4f}  ({own['support']} entities)")
    scores = [f"{seed}: {own['validation_score']:.4f}" for seed, own in app.record["seeds"].items()]
    if len(scores) > 1:
        lines.append(f"  validation by seed: {', '.join(scores)}; kept: {app.record['seed']}")
    for note in _NOTES:
        if note in app.record["data"]:
            lines.append(f"  {note.replace('_', ' ')}: {app.record['data'][note]}")
    if app.folder is not None:
        size = sum(file.stat().st_size for file in app.folder.iterdir())
        lines += ["", f"{app.folder}  ({size / 1e6:.2f} MB, {app.record['seconds']:.0f} s)"]
    return "\n".join(lines)


__all__ = ["FittedApp", "fit_app", "score_app", "summary"]
