"""Make a bundle: read data and apps, fit with every seed, keep the best, save it as adapter folders."""

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...data.app_data import FAMILIES
from ...data.backbones import open_backbone
from ...data.sources import TextStream
from ...errors import AdapterError, DataError, RecipeError
from ...model.adapters_mtpf import check_adapter_name, validate_adapter_name
from ...model.backbone_identity_mtpf import backbone_sha256
from ...model.configuration_mtpf import max_tokens
from ...model.modeling_mtpf import MtpfModel
from ...model.predict_mtpf import text_tokenizer
from ...model.schemas_mtpf import KINDS, read_task
from ...model.sources_mtpf import is_hub_id, split_revision
from ...settings import nearest
from ...version import versions
from ..app import data_of, find_start, new_folder, save_app, write_app
from ..calibration import calibrate
from ..fit_state import FitStates
from ..rounding import round_to_stored
from ..scoring import score_app
from . import composition, joint, prefix, rivals  # noqa: F401  they register themselves
from .low_rank import depth_of, install, lora_matrices
from .registry import BundleFit, BundleMethod, Job, JobPart, bundle_method
from .settings import BundleSettings, Part
from .training import Fixed, FromLabels, bundle_tail

_START, _APP = "family-start", "app-of-part-{}"
"""Names in memory of what a bundle is made from."""
MAX_WEIGHT = 1000


@dataclass(repr=False)
class FittedBundle:
    """A fitted bundle; printed, it shows each part's scores, the seeds, and the folder.

    Attributes:
        name: Its adapter name in the model.
        adapters: By part: the name that `MtpfModel.predict` knows it by; ``name/part`` in a bundle, and
            ``name-part`` where each part is an app.
        model: The backbone with the bundle loaded, if its method gives one that can be stored.
        metrics: By part: test metrics if there is a test set, validation metrics as ``validation_…``.
        record: How it was made, as ``task.json`` holds it.
        folder: Where it was saved, if it was.
    """

    name: str
    adapters: dict[str, str]
    model: MtpfModel
    metrics: dict[str, dict[str, float]]
    record: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def __repr__(self) -> str:
        method, parts = self.record["composition"]["method"], ", ".join(self.metrics)
        return f"FittedBundle({self.name!r}, {method}, {parts}, folder={self.folder})"

    def __str__(self) -> str:
        made = self.record["composition"]
        how = f"{made['method']}, {made['steps']} steps" + (f" from {made['loss']}" if made["loss"] else "")
        lines = [f"Bundle {self.name!r}, {how}"]
        for part in self.record["parts"]:
            lines += ["", f"  {part['name']} ({part['family']}), {part['source']}"]
            lines += [f"    {key:<32} {value:.4f}" for key, value in self.metrics[part["name"]].items()]
        seeds = self.record["seeds"]
        if len(seeds) > 1:
            scores = ", ".join(f"{seed}: {fit['validation_score']:.4f}" for seed, fit in seeds.items())
            lines.append(f"  validation by seed: {scores}; kept: {made['seed']}")
        if self.folder is not None:
            size = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
            lines += ["", f"{self.folder}  ({size / 1e6:.2f} MB, {self.record['seconds']:.0f} s)"]
        return "\n".join(lines)


def fit_bundle(
    parts: Sequence[Part],
    method: str,
    backbone: str | tuple[MtpfModel, PreTrainedTokenizerBase] = "packaged",
    output_dir: str | Path | None = None,
    texts: str | Path | Iterable[str] | None = None,
    *,
    adapter: str | Path | None = None,
    name: str | None = None,
    seeds: int = 1,
    settings: BundleSettings | None = None,
    backbone_revision: str | None = None,
    adapter_revision: str | None = None,
) -> FittedBundle:
    """Make one bundle of several apps on the frozen backbone, and save it as an adapter folder.

    Args:
        parts: The apps, of any families and label sets.
        method: Trains from the parts' data (``joint``, ``shared``, ``mtl-lora``, ``multilora``, ``poly``,
            ``c-poly``, ``moe-lora``, ``peml``, ``prefix``; see docs/many_apps.md) or composes their apps
            (docs/compose.md).
        backbone: ``packaged``, a folder or a Hub id; or a model and its tokenizer.
        output_dir: New folder for the bundle; by default nothing is saved. Methods that give each part a LoRA
            write an app for each into it, named by its part. A stopped fit with the same arguments resumes.
        texts: Unlabelled texts to learn the apps' results on: strings, a file, a folder or a Hub id.
        adapter: Folder or Hub id of a family's LoRA from which joint training starts; by default a fresh one.
        name: Adapter name; by default that of the folder, or ``bundle``.
        seeds: Number of seeds to try, from ``settings.seed`` on; the best by validation is kept.
        settings: See `BundleSettings`.
        backbone_revision: Commit of the backbone's repo.
        adapter_revision: Commit of the adapter's repo.

    Raises:
        MtpfError: A mistake in the parts, the data or the settings.
        AdapterError: An app does not fit the backbone, has no head, or the name is not allowed.

    Example:
        >>> parts = [Part("entities", "ner", "messages.conll"), Part("intent", "tc", "intents.csv")]
        >>> both = fit_bundle(parts, "joint", output_dir="apps/both")  # doctest: +SKIP
        >>> both.model.predict(["Call Ada at 5pm"], adapters=["both/intent"])  # doctest: +SKIP
    """
    started, how = time.time(), bundle_method(method)
    settings = settings or BundleSettings()
    _check_parts(parts, method, how)
    _check_settings(method, settings, seeds, parts, texts, output_dir is not None)
    folder = new_folder(output_dir)
    name = name or (folder.name if folder else "bundle")
    check_adapter_name(name)
    adapters = {part.name: f"{name}-{part.name}" if how.apart else f"{name}/{part.name}" for part in parts}
    read, rows = [_read_part(part, settings) for part in parts], _texts(texts, settings)
    model, tokenizer = open_backbone(backbone, backbone_revision) if isinstance(backbone, str) else backbone
    for loaded_as in adapters.values() if how.apart else [name]:
        validate_adapter_name(model.backbone, loaded_as)
    digest, loaded = backbone_sha256(model.backbone), set(model.adapters)
    turns = how.needs == "data" and method != "joint"
    job = Job(model.eval(), tokenizer, read, rows, None, settings, name, how.apart, turns)
    start_name = "fresh"
    try:
        if adapter is not None:
            start_folder, start_name = find_start(adapter, adapter_revision, None)
            job.start = model.load_adapter(start_folder, _START, activate=False)
        if how.needs == "apps":
            for number, part in enumerate(parts):
                _load_app(model, part, read[number], _APP.format(number))
        family = "tc" if all(part.family == "tc" for part in read) else "ner"
        job.settings = replace(job.settings.for_family(family, started=adapter is not None), refit=None)
        job.settings = _within_limits(job)
        if folder is not None:
            job.states = FitStates(folder, _identity(job, method, digest))
        fits = _fit_seeds(job, how, seeds)
    finally:
        model.delete_adapter([extra for extra in model.adapters if extra not in loaded])
    if backbone_sha256(model.backbone) != digest:
        raise RuntimeError("The frozen backbone has changed while a bundle was fitted: this is a bug.")
    best = max(fits, key=lambda seed: fits[seed].score)
    job.settings = replace(job.settings, seed=best)
    dtype, calibrations = _round(job, fits[best])
    if how.stored:
        _install(job, fits[best], adapters)
    record = _record(job, method, fits, start_name, calibrations, adapters if how.stored else {})
    record |= {"stored_dtype": str(dtype).removeprefix("torch."), "seconds": round(time.time() - started, 1)}
    if folder is not None:
        named = isinstance(backbone, str) and is_hub_id(backbone) and not Path(backbone).exists()
        source: dict[str, Any] = {
            "backbone_id": backbone if named else None,
            "backbone_revision": backbone_revision,
        }
        write = partial(_write_apps, adapters) if how.apart else None
        save_app(folder, model, name, write, dtype=dtype, task=record, **source)
    if job.states is not None:
        job.states.remove()
    metrics = {part["name"]: part["metrics"] for part in record["parts"]}
    return FittedBundle(name, adapters, model, metrics, record, folder)


def unused_settings(
    method: str, settings: BundleSettings, parts: Sequence[Part], texts: Any
) -> dict[str, str]:
    """Return the settings that a fit does not read, each with the reason, to follow the setting's name."""
    how, labelled = bundle_method(method), all(part.data is not None for part in parts)
    trains = how.trains or settings.heads == "retrained"
    of_labels = {"temperature", "class_weights"}
    of_training = {"steps", "evaluations", "patience", "learning_rate", "batch_size"}
    reasons: list[tuple[bool, str, set[str]]] = [
        (how.needs == "apps", "", {"refit", "sparse", "size", "lora"}),
        (how.needs == "data", "", {"refit", "sparse", "heads", "text_column", "max_texts"}),
        (method not in prefix.METHODS, "", {"prefix", "prefix_length", "prefix_width"}),
        (method == "prefix", "", {"lora.r", "lora.targets"}),  # of a LoRA without effect
        (not trains, " where nothing is trained", of_training | of_labels),
        (
            not settings.learns_from_labels(labelled, bool(texts)),
            " where it learns from the apps' results",
            of_labels,
        ),
        (not texts, " without texts", {"text_column", "max_texts"}),
        (not isinstance(texts, (str, Path)), " of texts in memory", {"text_column"}),
        (not (trains or texts or labelled), " without texts, or data of all parts", {"loss"}),
    ]
    return {name: why for holds, why, names in reversed(reasons) if holds for name in names}


def _check_settings(
    method: str, settings: BundleSettings, seeds: int, parts: Sequence[Part], texts: Any, saved: bool
) -> None:
    """Refuse what the method does not use."""
    how, unused = bundle_method(method), unused_settings(method, settings, parts, texts)
    unlabelled = [part.name for part in parts if part.data is None]
    if how.needs == "apps" and settings.loss == "labels" and (unlabelled or texts):
        what = f"the part {unlabelled[0]!r} has none" if unlabelled else "leave out texts"
        raise RecipeError(f"The loss labels learns from data of all parts; {what}, or leave out the loss.")
    for key in settings.changed():
        if (name := key if key in unused else key.partition(".")[0]) in unused:
            raise RecipeError(f"The method {method} does not use {key}{unused[name]}; leave it out.")
    if method == "prefix" and settings.prefix == "none":
        raise RecipeError("The method prefix trains nothing else; leave out prefix: none.")
    if how.needs == "data" and (texts or settings.loss == "distil"):
        raise RecipeError(f"The method {method} trains from labels; leave out texts and the loss distil.")
    if seeds < 1 or settings.seed + seeds > 2**31:
        raise RecipeError(f"seeds is {seeds}; it must be at least 1, and all seeds below 2^31.")
    if seeds > 1 and not (how.trains or settings.heads == "retrained"):
        if not how.random:
            raise RecipeError(f"The method {method} makes the same bundle with every seed; leave seeds at 1.")
        if not texts and unlabelled:
            raise RecipeError("Seeds are compared on texts, or data of all parts; give some, or one seed.")
    if saved and not how.stored:
        raise RecipeError(f"A bundle made by {method} cannot be stored as a LoRA; leave out output_dir.")


def _fit_seeds(job: Job, how: BundleMethod, seeds: int) -> dict[int, BundleFit]:
    """Fit with each seed."""
    settings, fits = job.settings, {}
    for seed in range(settings.seed, settings.seed + seeds):
        job.settings = replace(settings, seed=seed)
        if job.states is not None:
            job.states.start(seed)
        fits[seed] = how.fit(job)
    return fits


def _identity(job: Job, method: str, backbone: str) -> str:
    """Return a digest of all that a fit depends on."""
    free = "progress", "cache_gb"
    settings = {key: value for key, value in asdict(job.settings).items() if key not in free}
    facts: list[Any] = [versions("torch"), method, backbone, settings, job.texts]
    for part in job.parts:
        splits = [part.data.train, part.data.validation] if part.data is not None else []
        rows = [[split.inputs, split.labels] for split in splits]
        facts.append([part.name, part.family, part.weight, part.data and part.data.labels, rows])
    digest = hashlib.sha256(json.dumps(facts).encode())
    for name in filter(None, [job.start, *(part.app for part in job.parts)]):
        heads = [tensor for head in job.model.parts(name).values() for tensor in head.parameters()]
        pairs = lora_matrices(job.model.backbone, name).values()
        for tensor in [*heads, *(tensor for pair in pairs for tensor in (pair.down, pair.up))]:
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _install(job: Job, fit: BundleFit, adapters: dict[str, str]) -> None:
    """Put the bundle, or the app of each part, into the model."""
    if not fit.apart:
        install(job.model, job.name, fit.matrices, fit.heads, fit.prefixes)
    for part, matrices in fit.apart.items():
        install(job.model, adapters[part], matrices, fit.heads[part])


def _write_apps(
    adapters: dict[str, str], folder: Path, model: MtpfModel, name: str, options: dict[str, Any]
) -> None:
    """Write the app of each part into a folder named by the part."""
    record, shared = options["task"], ("start", "settings", "seeds", "seed", "stored_dtype", "seconds")
    made = {**record["composition"], "parts": list(adapters)}
    for part in record["parts"]:
        task = {
            **{key: record[key] for key in shared},
            **{key: part[key] for key in ("family", "metrics", "calibration") if key in part},
            "method": made["method"],
            "training_data": part["source"],
            "composition": made,
        }
        write_app(folder / part["name"], model, adapters[part["name"]], {**options, "task": task})


def _check_parts(parts: Sequence[Part], method: str, how: BundleMethod) -> None:
    """Refuse parts that cannot make a bundle by this method."""
    names = [part.name for part in parts]
    if not parts:
        raise RecipeError("A bundle needs at least one part.")
    for part in parts:
        check_adapter_name(part.name, "Part")
        if names.count(part.name) > 1:
            raise RecipeError(f"Two parts are named {part.name!r}; give one another name.")
        if part.family not in (None, *FAMILIES):
            hint = nearest(str(part.family), list(FAMILIES))
            raise RecipeError(f"Unknown family {part.family!r} of {part.name!r}; {hint}choose ner or tc.")
        if part.weight is not None and (
            not isinstance(part.weight, (int, float)) or not abs(part.weight) <= MAX_WEIGHT
        ):
            raise RecipeError(
                f"The weight of the part {part.name!r} is {part.weight!r}; it must be a number from "
                f"-{MAX_WEIGHT} to {MAX_WEIGHT}."
            )
        if how.needs == "data" and (part.data is None or part.family is None):
            what = "data" if part.data is None else "family"
            raise RecipeError(f"The part {part.name!r} has no {what}, which the method {method} trains from.")
        if how.needs == "apps" and part.adapter is None:
            raise RecipeError(f"The part {part.name!r} has no adapter, which the method {method} composes.")


def _read_part(part: Part, settings: BundleSettings) -> JobPart:
    """Read the data of a part, if it has some."""
    if part.data is None:
        return JobPart(part.name, part.family or "", part.weight)
    family = part.family or getattr(part.data, "family", None)
    if family is None and part.adapter is not None:
        kind = read_task(_find_app(part)[0]).get("kind")
        family = {KINDS[1]: "ner", KINDS[2]: "tc"}.get(str(kind))
    if family is None:
        raise RecipeError(f"The part {part.name!r} has data but no family; say ner or tc.")
    return JobPart(part.name, family, part.weight, data_of(part.data, family, settings.seed, {}))


def _find_app(part: Part) -> tuple[Path, str]:
    """Return the folder of a part's app, and its name, or its Hub id and revision."""
    source, revision = split_revision(str(part.adapter))
    folder, name = find_start(source, revision, None)
    return folder, f"{name}@{revision}" if revision else name


def _load_app(model: MtpfModel, part: Part, read: JobPart, name: str) -> None:
    """Load the app of a part, and bring its data to the app's labels."""
    folder, read.source = _find_app(part)
    model.load_adapter(folder, name, activate=False)
    if name not in (heads := model.parts(name)):
        what = "is a bundle; name the apps it was made of" if heads else "has no head: it is a family's LoRA"
        raise AdapterError(f"{part.adapter}, the part {part.name!r}, {what}.")
    head = heads[name]
    family = "ner" if head.kind == "token-classification" else "tc"
    if read.family not in ("", family):
        raise RecipeError(f"The app {part.adapter} is of the family {family!r}, not {read.family!r}.")
    read.app, read.family = name, family
    if read.data is not None:
        if unknown := [label for label in read.data.labels if label not in head.labels]:
            raise RecipeError(
                f"The data of the part {part.name!r} has the label {unknown[0]!r}, which its app lacks."
            )
        if read.data.multi_label != bool(head.problem_type):
            raise RecipeError(
                f"The data of the part {part.name!r} and its app differ in whether a text has several labels."
            )
        read.data = replace(read.data, labels=head.labels)


def _within_limits(job: Job) -> BundleSettings:
    """Return the settings with the longest input of all parts, of apps by default what all of them read."""
    settings = job.settings
    heads: Any = job.model.heads
    limits = {part.name: heads[part.app].max_length for part in job.parts if part.app}
    most, what = max_tokens(job.model.config.encoder_config), "this encoder"
    if limits:
        most, name = min((limit, name) for name, limit in limits.items())
        what = f"the app of the part {name!r}"
        if settings.max_length == BundleSettings.max_length:
            settings = replace(settings, max_length=most)
    if settings.max_length > most:
        raise RecipeError(f"max_length is {settings.max_length}; {what} reads 4 to {most} tokens.")
    return settings


def _round(job: Job, fit: BundleFit) -> tuple[torch.dtype, dict[str, dict[str, float]]]:
    """Calibrate the heads and round all to the type in which it is stored; return that, and calibrations."""
    digest, calibrations = text_tokenizer(job.model, job.tokenizer).sha256, {}
    for part, head in fit.heads.items():
        head.requires_grad_(False).tokenizer_sha256 = digest
        if part in fit.validation and (held_out := fit.validation[part].held_out) is not None:
            calibrations[part] = calibrate(head, held_out)
    pairs = [tensor for lora in fit.loras for pair in lora.values() for tensor in (pair.down, pair.up)]
    values = [p.data for head in fit.heads.values() for p in head.parameters()]
    values += [tensor for slots in fit.prefixes.values() for tensor in (slots.key, slots.value)]
    return round_to_stored([*pairs, *values], job.settings), calibrations


def _test_scores(job: Job, fit: BundleFit, adapters: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Score the parts that have a test set: what the model predicts, or else what the tensors give."""
    tests = {part.name: part for part in job.parts if part.data is not None and part.data.test}
    if adapters:
        return {
            name: score_app(job.model, job.tokenizer, adapters[name], part.data.test)  # type: ignore
            for name, part in tests.items()
        }
    if not tests:
        return {}
    parts = [replace(p, data=replace(p.data, validation=p.data.test)) for p in tests.values()]  # type: ignore
    tested = FromLabels(replace(job, parts=parts), depth_of(job.model.backbone, fit.matrices))
    scores = tested.validate(bundle_tail(job.model, Fixed(fit.matrices), job.settings), fit.heads)
    return {name: found.metrics for name, found in scores.items()}


def _texts(texts: str | Path | Iterable[str] | None, settings: BundleSettings) -> list[str]:
    """Return the first unlabelled texts, from a source or as they are given."""
    if isinstance(texts, (str, Path)):
        stream = TextStream(texts, settings.text_column, option="--text_column")
        texts = (row.text for row in stream if row.text)
    read = list(islice(texts or (), settings.max_texts))
    for number, text in enumerate(read, 1):
        if not isinstance(text, str):
            raise DataError(
                f"Text {number} is {str(text)[:40]!r} of the type {type(text).__name__}, not a string."
            )
    return read


def _record(
    job: Job,
    method: str,
    fits: dict[int, BundleFit],
    start: str,
    calibrations: dict,
    adapters: dict[str, str],
) -> dict[str, Any]:
    """Return what ``task.json`` tells of the bundle."""
    settings, best = job.settings, fits[job.settings.seed]
    tested, parts = _test_scores(job, best, adapters), []
    for part in job.parts:
        found = best.validation[part.name].metrics if best.validation else {}
        named = tested.get(part.name, {}) | {f"validation_{key}": value for key, value in found.items()}
        source = part.source
        if part.data is not None:
            data = f"{part.data.notes.get('source', 'data in memory')}, {len(part.data.train):,} examples"
            source = f"{source} with {data}" if source else data
        metrics = {key: round(v, 4) for key, v in named.items() if isinstance(v, (int, float))}
        about = {"name": part.name, "family": part.family, "source": source, "metrics": metrics}
        parts.append(about | ({"calibration": calibrations[part.name]} if part.name in calibrations else {}))
    given = {part.name: part.weight for part in job.parts if part.weight is not None}
    return {
        "composition": {
            "method": method,
            "loss": None,
            "weights": given or None,
            "rank": max(len(pair.down) for lora in best.loras for pair in lora.values()),
            "steps": best.details["steps"],
            "learning_rate": settings.learning_rate if best.details["steps"] else None,
            "seed": settings.seed,
            **best.composition,
        },
        "parts": parts,
        "start": start,
        "training_data": "; ".join(f"{part['name']}: {part['source']}" for part in parts),
        "metrics": {f"{p['name']}/{key}": v for p in parts for key, v in p["metrics"].items()},
        "settings": {key: value for key, value in asdict(settings).items() if key != "progress"},
        "seeds": {
            str(seed): {"validation_score": round(fit.score, 4), **fit.details} for seed, fit in fits.items()
        },
        "seed": settings.seed,
    }
