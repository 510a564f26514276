"""Fit an app: read the data, fit with every seed, keep the best, save one small adapter folder."""

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hub_cards import adapter_card

from ..data.app_data import FAMILIES, AppData, check_app_data, load_app_data
from ..data.backbones import open_backbone
from ..data.columns import values_of
from ..data.sources import Source
from ..data.words import IGNORE
from ..errors import AdapterError, DataError, MtpfError, RecipeError, first_line
from ..model.adapter_files_mtpf import (
    AdapterFiles,
    backbone_sha256,
    find_adapter,
    install_adapter,
    lora_state_dict,
    read_task,
    stock_key,
)
from ..model.adapters_mtpf import check_adapter_name, count_parameters, validate_adapter_name
from ..model.configuration_mtpf import max_tokens
from ..model.delta_mtpf import PATTERNS_FILE, delta_parameters, write_delta
from ..model.modeling_mtpf import MtpfModel
from ..model.predict_mtpf import text_tokenizer
from ..model.scope_mtpf import Scope
from ..model.sources_mtpf import is_hub_id
from ..settings import nearest
from .calibration import calibrate
from .methods import auto, lora, probe, sparse  # noqa: F401  they register themselves
from .methods.registry import check_used, method_named, uses
from .rounding import round_to_stored
from .scope import IN_SCOPE, MAX_TEXTS, fit_scope
from .scoring import score_app
from .settings import FitResult, FitSettings
from .standalone import Standalone, fit_standalone
from .tail_training import app_parameters
from .text_vectors import embed_texts

_START = "family-start"
"""Name in memory of the adapter that an app starts from."""

_NOT_SHOWN = ("source", "validation_source", "test_source", "scheme", "examples", "fingerprint")
"""Notes on the data that are no counts; the summary shows the others."""

_SCORED_BY = {
    "ner": "strict F1 over the entities that predict delivers: type and both borders right (seqeval, IOB2)",
    "tc": "accuracy, macro F1, and the mean of each label's average precision",
    "sets": "micro and macro F1 of all labels that predict delivers, and the mean of each label's average "
    "precision",
}


@dataclass(repr=False)
class FittedApp:
    """A fitted app; printed, it shows scores, seeds, what was skipped, and its folder.

    Attributes:
        name: Its adapter name in the model.
        model: The backbone with the app loaded.
        metrics: Test metrics if there is a test set, and validation metrics as ``validation_…``.
        record: How it was fitted, as ``task.json`` holds it.
        folder: Where it was saved, if it was.
    """

    name: str
    model: MtpfModel
    metrics: dict[str, float]
    record: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def __repr__(self) -> str:
        scores = ", ".join(f"{key} {value:.3f}" for key, value in self.metrics.items())
        return f"FittedApp({self.name!r}, {self.record.get('method')}, {scores}, folder={self.folder})"

    def __str__(self) -> str:
        lines = [f"App {self.name!r}, {self.record['method']} on {self.record['training_data']}", ""]
        lines += [
            f"  {key:<32} {value:.4f}" for key, value in self.metrics.items() if isinstance(value, float)
        ]
        for kind, scores in self.record["types"].items():
            lines.append(f"  F1 of {kind:<26} {scores['f1']:.4f}  ({scores['support']} entities)")
        seeds = self.record["seeds"]
        if len(seeds) > 1:
            by_seed = ", ".join(f"{seed}: {fit['validation_score']:.4f}" for seed, fit in seeds.items())
            lines.append(f"  validation by seed: {by_seed}; kept: {self.record['seed']}")
        if calibration := self.record.get("calibration"):
            text = "threshold on held-out rows        {threshold:.4f}, which is the score 0.5"
            if "ece_after" in calibration:
                text = "calibration error when held out   {ece_before:.4f} -> {ece_after:.4f}"
            lines.append(f"  {text.format(**calibration)}  (temperature {calibration['temperature']:.2f})")
            if share := calibration.get("in_scope"):
                lines.append(f"  held-out texts in scope           {share:.4f}  (of predict with in_scope)")
        notes = self.record["data"]
        lines += [f"  {note.replace('_', ' ')}: {notes[note]}" for note in notes if note not in _NOT_SHOWN]
        if self.folder is not None:
            size = sum(file.stat().st_size for file in self.folder.iterdir())
            lines += ["", f"{self.folder}  ({size / 1e6:.2f} MB, {self.record['seconds']:.0f} s)"]
        return "\n".join(lines)


def fit_app(
    data: Source | AppData | tuple[Sequence, Sequence],
    family: str | Sequence | None = None,
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
    any_family: bool = False,
    standalone: bool = False,
    **data_options: Any,
) -> FittedApp:
    """Fit one app on the frozen backbone, and save it as an adapter folder.

    Args:
        data: A path, a Hub id or a table in memory (see `load_app_data`), or data that is read already; or
            texts, with their labels as a second argument or in a pair: a label or a list of labels each, or
            of NER a list of spans, or words with a list of tags.
        family: ``ner`` or ``tc``; found by itself for texts with labels.
        backbone: ``packaged``, a folder or a Hub id; or a model and its tokenizer, to fit several apps.
        adapter: Folder or Hub id of the family's LoRA to start from; by default a fresh one.
        output_dir: New folder for the app; by default nothing is saved.
        name: Adapter name; by default that of the folder, or ``app``.
        method: ``lora`` or ``sparse``, for ``tc`` also ``probe``; ``auto`` is LoRA for NER, and the
            better one of LoRA and probe by validation for TC.
        seeds: Number of seeds to try, from ``settings.seed`` on; the best by validation is kept.
        settings: See `FitSettings`.
        backbone_revision: Commit of the backbone's repo.
        adapter_revision: Commit of the adapter's repo.
        any_family: Start from an adapter of another family, too, as studies do.
        standalone: With the method ``sparse``: an encoder of its own for this app, saved as what differs from
            the backbone. It shares no trunk; ``model`` of the result is its own.
        **data_options: Options of `load_app_data`, with a source only.

    Raises:
        MtpfError: A mistake in the data or the settings.
        AdapterError: The adapter does not fit the backbone, or the name is not allowed.

    Example:
        >>> app = fit_app("intents.csv", "tc", output_dir="apps/intent")  # doctest: +SKIP
        >>> app = fit_app(["Lunch at 1?", "Wake me at 7"] * 20, ["meal", "alarm"] * 20)  # doctest: +SKIP
        >>> app.model.predict(["Lunch at 1?"], adapters=[app.name])  # doctest: +SKIP
    """
    started = time.time()
    data, family = _with_family(data, family)
    method, fit = method_named(family, method)
    settings = settings or FitSettings()
    if seeds < 1 or settings.seed + seeds > 2**31:
        raise RecipeError(f"seeds is {seeds}; it must be at least 1, and all seeds below 2^31.")
    if seeds > 1 and method == "probe":
        raise RecipeError("A probe is the same for every seed; leave seeds at 1, or choose the method lora.")
    if standalone and (method != "sparse" or adapter is not None):
        raise RecipeError(
            "A standalone app is fitted by the method sparse, without an adapter to start from."
        )
    check_used(family, method, settings, standalone)
    settings = settings.for_family(family, started=adapter is not None)
    unused: dict[str, Any] = {
        key: None for key in ("size", "refit", "learning_rate") if not uses(family, method, key)
    }
    settings = replace(settings, **unused)
    folder = new_folder(output_dir)
    name = name or (folder.name if folder else "app")
    check_adapter_name(name)  # before the data is read
    data = data_of(data, family, settings.seed, data_options)
    model, tokenizer = open_backbone(backbone, backbone_revision) if isinstance(backbone, str) else backbone
    limit = max_tokens(model.config.encoder_config)
    if settings.max_length > limit:
        raise RecipeError(f"max_length is {settings.max_length}; this encoder reads 4 to {limit} tokens.")
    validate_adapter_name(model.backbone, name)
    digest = backbone_sha256(model.backbone)
    start, start_name = None, "fresh"
    if adapter is not None:
        start_folder, start_name = find_start(adapter, adapter_revision, None if any_family else family)
        start = model.load_adapter(start_folder, _START, activate=False)
    base = model
    try:
        if standalone:
            results, best = _fit_standalone(model, tokenizer, name, data, settings, seeds)
            model, tokenizer, dtype = best.model, best.tokenizer, best.dtype
        else:
            results, dtype = _fit_seeds(model, tokenizer, name, data, start, settings, seeds, fit)
    finally:
        if start is not None:
            model.delete_adapter(_START)
    if backbone_sha256(base.backbone) != digest:
        raise RuntimeError("The frozen backbone has changed while an app was fitted: this is a bug.")
    head: Any = model.heads[name]
    head.tokenizer_sha256 = text_tokenizer(model, tokenizer).sha256
    test = score_app(model, tokenizer, name, data.test) if data.test else None
    record = _record(data, method, settings, results, start_name, test)
    record["stored_dtype"] = str(dtype).removeprefix("torch.")
    record["seconds"] = round(time.time() - started, 1)
    if folder is not None:
        named = isinstance(backbone, str) and is_hub_id(backbone) and not Path(backbone).exists()
        source = {"backbone_id": backbone if named else None, "backbone_revision": backbone_revision}
        write = partial(_write_standalone, base, best) if standalone else write_app
        save_app(folder, model, name, write, dtype=dtype, task=record, **source)
    return FittedApp(name, model, record["metrics"], record, folder)


def _with_family(data: Any, family: Any) -> tuple[Any, str]:
    """Return the data, of texts with labels as rows, and its family, which these tell."""
    if family is not None and not isinstance(family, str):
        data, family = (data, family), None
    if isinstance(data, tuple) and len(data) == 2:
        data, family = _rows_of(*data, family)
    if family is None:
        raise RecipeError("Give the family, ner or tc, or a label for each text: fit_app(texts, labels).")
    if family not in FAMILIES:
        hint = nearest(str(family), list(FAMILIES))
        raise RecipeError(f"Unknown family {family!r}; {hint}choose ner or tc.")
    return data, family


def _rows_of(texts: Any, labels: Any, family: str | None) -> tuple[list[dict[str, Any]], str]:
    """Return texts with their labels as rows, and their family, which the labels tell unless it is given."""
    inputs, targets = values_of(texts, "texts"), values_of(labels, "labels")
    if not inputs or len(inputs) != len(targets):
        raise DataError(
            f"There are {len(inputs):,} texts but {len(targets):,} labels; give one for each text."
        )
    first = next((target[0] for target in targets if isinstance(target, list) and target), "")
    words = isinstance(inputs[0], list)
    if isinstance(first, (bool, int, float)) and not words and family != "ner":
        raise DataError(
            "The labels of a text are numbers; give a list of their names for each text, as ['joy', 'awe']."
        )
    family = family or ("ner" if words or not isinstance(first, str) else "tc")
    keys = ("text", "label") if family == "tc" else ("tokens", "ner_tags") if words else ("text", "spans")
    return [dict(zip(keys, pair, strict=True)) for pair in zip(inputs, targets, strict=True)], family


def data_of(data: Source | AppData, family: str, seed: int, options: dict[str, Any]) -> AppData:
    """Read a source with its options, or check data in memory."""
    if not isinstance(data, AppData):
        return load_app_data(data, family, seed=seed, **options)
    if used := [key for key, value in options.items() if value is not None]:
        raise RecipeError(f"{used[0]} is an option of reading data, but the data is read already.")
    if data.family != family:
        raise RecipeError(f"The data is of the family {data.family!r}, not {family!r}.")
    check_app_data(data)
    return data


def _fit_seeds(
    model, tokenizer, name, data, start, settings, seeds: int, fit
) -> tuple[dict[int, FitResult], torch.dtype]:
    """Fit with each seed; the app of the best one by validation stays in the model, rounded."""
    results: dict[int, FitResult] = {}
    best: Any = None
    for seed in range(settings.seed, settings.seed + seeds):
        if name in model.adapters:
            model.delete_adapter(name)
        try:
            results[seed] = fit(model, tokenizer, name, data, start, replace(settings, seed=seed))
        except Exception:
            if name in model.adapters:
                model.delete_adapter(name)
            raise
        if seed == _best_seed(results):
            weights = lora_state_dict(model.backbone, name).items()
            lora = {stock_key(key): weight.clone() for key, weight in weights}
            best = AdapterFiles(name, model.backbone.peft_config[name], lora, heads=model.parts(name))
    if seed != _best_seed(results):  # the method may have another shape for each
        model.delete_adapter(name)
        install_adapter(model.backbone, best)
        model.heads.update(best.heads)
    chosen, threshold = results[_best_seed(results)], None
    if chosen.held_out is not None:
        chosen.calibration = calibrate(model.heads[name], chosen.held_out)
    if chosen.refit is not None:
        # What validation tells is of the app that has not seen it, and is kept.
        first = _scope(model, tokenizer, name, data, chosen, settings)
        threshold = None if first is None else first.threshold
        model.delete_adapter(name)
        chosen.refit()
        chosen.details["refitted_with_validation"] = True
        if chosen.held_out is not None:
            calibrate(model.heads[name], chosen.held_out)
    for parameter in app_parameters(model, name):
        parameter.requires_grad_(False)
    dtype = round_to_stored(app_parameters(model, name), settings)  # before the test scores
    model.heads[name].scope = _scope(model, tokenizer, name, data, chosen, settings, threshold)
    return results, dtype


def _fit_standalone(
    base, tokenizer, name, data, settings, seeds: int
) -> tuple[dict[int, FitResult], Standalone]:
    """Fit with each seed; return all results and the best app by validation."""
    results: dict[int, FitResult] = {}
    best: Any = None
    for seed in range(settings.seed, settings.seed + seeds):
        app = fit_standalone(base, tokenizer, name, data, replace(settings, seed=seed))
        results[seed] = app.result
        best = app if seed == _best_seed(results) else best
    return results, best


def _scope(
    model, tokenizer, name, data, result: Any, settings: FitSettings, threshold: Any = None
) -> Scope | None:
    """Fit what tells texts out of scope, from vectors that the method had or from some training texts.

    The threshold is that of the held-out texts, unless it is given.
    """
    if not result.held_out or data.family != "tc" or data.multi_label:
        return None
    fitted = result.vectors
    if fitted is None:
        size = min(len(data.train), MAX_TEXTS)
        rows = np.random.default_rng(settings.seed).permutation(len(data.train))[:size]
        some = data.train.take(rows)
        options: dict[str, Any] = {"mixed_precision": settings.mixed_precision}
        options["max_length"] = settings.max_length
        fitted = embed_texts(model, tokenizer, some.inputs, name, **options), some.labels
    index = {label: number for number, label in enumerate(data.labels)}
    targets = np.array([index.get(label, IGNORE) for label in fitted[1]])
    vectors, known = fitted[0][targets >= 0], targets[targets >= 0]
    if len(set(known)) < 2:
        return None  # nothing to tell apart
    scores = result.held_out.of_labels(data.labels) / result.calibration["temperature"]
    result.calibration["in_scope"] = IN_SCOPE
    scope = fit_scope(model.heads[name], vectors, known, scores)
    if threshold is not None:
        scope.threshold = threshold
    return scope


def _best_seed(results: dict[int, FitResult]) -> int:
    return max(results, key=lambda seed: results[seed].score)


def _record(data: AppData, method: str, settings: FitSettings, results, start: str, test) -> dict[str, Any]:
    source = data.notes.get("source", "data in memory")
    best = _best_seed(results)
    validation = results[best].validation
    named = {**(test or {}), **{f"validation_{key}": value for key, value in validation.items()}}
    types = (test or validation).get("types", {})
    refitted = results[best].details.get("refitted_with_validation")
    fitted = len(data.train) + (len(data.validation) if refitted else 0)
    return {
        "family": data.family,
        "method": results[best].details.get("method", method),
        "start": start,
        "training_data": f"{source}, {fitted:,} training examples",
        "protocol": _SCORED_BY["sets" if data.multi_label else data.family]
        + ("" if data.test else "; no test set, validation only"),
        "data": data.notes,
        "settings": {key: value for key, value in asdict(settings).items() if key != "progress"},
        "seeds": {
            str(seed): {"validation_score": round(result.score, 4), **result.details}
            for seed, result in results.items()
        },
        "seed": best,
        "calibration": results[best].calibration,
        "metrics": {key: round(v, 4) for key, v in named.items() if isinstance(v, (int, float))},
        "types": {
            kind: {"f1": round(of_kind["f1"], 4), "support": of_kind["support"]}
            for kind, of_kind in types.items()
        },
    }


def find_start(adapter: str | Path, revision: str | None, family: str | None) -> tuple[Path, str]:
    """Return folder and name, without a local path, of the adapter of a family that the app starts from."""
    folder, task = find_adapter(adapter, revision), {}
    with suppress(AdapterError):  # a stock PEFT adapter has no task
        task = read_task(folder)
    if family is not None and task.get("family", family) != family:
        raise RecipeError(
            f"The adapter {adapter} is of the family {task['family']!r}, the app of {family!r}; "
            f"start from the LoRA of {family!r}, or without --adapter from a fresh one."
        )
    if task.get("prefix"):
        raise RecipeError(
            f"The adapter {adapter} has a prefix, which what starts from it or is composed of it would lose; "
            "name an adapter without one."
        )
    return folder, task.get("name", folder.name) if Path(adapter).is_dir() else str(adapter)


def new_folder(output_dir: str | Path | None) -> Path | None:
    """Return the full path of a folder that can be made; raise `MtpfError` for one that cannot."""
    if output_dir is None:
        return None
    try:
        folder = Path(output_dir).resolve()  # "." has no name, and no folder next to it can be written
        taken = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    except (OSError, ValueError) as error:  # a name that is too long, or holds NUL
        raise MtpfError(f"{str(output_dir)!r} cannot be a folder: {first_line(error)}.") from error
    if taken:
        raise MtpfError(f"{output_dir} exists already; choose another --output_dir or remove it.")
    if folder == Path.cwd():
        raise MtpfError(f"{output_dir} is the current folder, which cannot be replaced; name a new one.")
    parent = next(ancestor for ancestor in folder.parents if ancestor.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise MtpfError(f"Nothing can be written to {parent}; choose another --output_dir.")
    return folder


def save_app(
    folder: Path, model: MtpfModel, name: str, write: Callable[..., None] | None = None, **options: Any
) -> None:
    """Write adapter and card next to the folder, then rename; where that fails, save them elsewhere.

    Raises:
        MtpfError: The app is not in the folder; the message says where it is.
    """
    write = write or write_app
    temporary = folder.with_name(f".{folder.name[:50]}.{os.getpid()}.tmp")
    try:
        write(temporary, model, name, options)
    except (OSError, MtpfError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        reason = f"{folder} cannot be written: {getattr(cause, 'strerror', None) or first_line(cause)}"
        try:
            rescued = Path(tempfile.mkdtemp(prefix="mtpf-")) / name
            write(rescued, model, name, options)
        except (OSError, MtpfError) as second:
            raise MtpfError(f"{reason}. {first_line(second)}; the fitted app is lost.") from error
        raise MtpfError(f"{reason}. The fitted app is in {rescued} instead; move it.") from error
    try:
        if folder.is_dir() and os.name == "nt":
            folder.rmdir()  # it is empty; elsewhere an empty folder is replaced
        temporary.rename(folder)
    except OSError as error:
        names = (folder.with_name(f"{folder.name[:200]}-{number}") for number in itertools.count(2))
        other = next(path for path in names if not path.exists())
        temporary.rename(other)
        raise MtpfError(
            f"{folder} appeared while the app was fitted and is not replaced; the fitted app is in {other}."
        ) from error


def write_app(folder: Path, model: MtpfModel, name: str, options: dict[str, Any]) -> None:
    """Write an adapter folder with its card; the options are those of `MtpfModel.save_adapter`."""
    model.save_adapter(folder, name, **options)
    config = model.backbone.peft_config[name].to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    size = count_parameters(model.backbone, name)
    adapter_card(read_task(folder), config, num_parameters=size).save(folder / "README.md")


def _write_standalone(
    base: MtpfModel, app: Standalone, folder: Path, model: MtpfModel, name: str, options: dict[str, Any]
) -> None:
    tokens = app.patterns.tokens if app.patterns else []
    write_delta(folder, base, model, name, tokens, **options)
    if app.patterns is not None:
        (folder / PATTERNS_FILE).write_text(app.patterns.page(), "utf-8")
    sizes = {
        "num_parameters": delta_parameters(folder),
        "num_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }
    adapter_card(read_task(folder), {}, **sizes).save(folder / "README.md")
