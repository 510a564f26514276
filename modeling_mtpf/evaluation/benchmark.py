"""The benchmark: tasks × protocols × seeds of one regime, resumable, on several processes."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..adaptation import FitSettings, fit_app
from ..adaptation.methods.probe import choose_probe
from ..adaptation.text_vectors import embed_texts
from ..data.app_data import AppData
from ..data.backbones import open_backbone
from ..devices import PRECISIONS, available_cores, uses_bf16
from ..errors import DataError, RecipeError
from ..model.adapter_files_mtpf import backbone_sha256
from ..settings import COMMAS, nearest
from ..version import versions
from .few_shot import SEED, few_shot, probe_scores
from .records import (
    PACKAGES,
    adapter_sha256,
    add_record,
    config_value,
    public_name,
    read_records,
    record_key,
    today,
    tokenizer_sha256,
)
from .tasks import Task, all_tasks, check_task, load_task, select_tasks
from .vector_cache import StoredVectors

FAMILY_OF = {"ner": "ner", "ner10": "ner", "mteb": "tc", "full": "tc"}
"""Protocol → family."""

QUICK_ROWS = 200
"""Rows of each split in a smoke run (``--quick``)."""

SEED_FACTS = ("backbone.sha256", "adapter.sha256")
"""Facts that differ between seeds if each seed has its own backbone."""

LEAST_ROWS = 10
"""Smallest limit of rows and steps: a tenth of the rows must not be empty."""


@dataclass(kw_only=True)
class BenchmarkSettings:
    """What is evaluated, and where the records go.

    Attributes:
        backbone: ``packaged``, a folder or a Hub id, a stock encoder included.
        backbone_revision: Commit of its repo.
        adapter_ner: Folder or Hub id of the NER LoRA that NER apps start from; fresh ones by default.
        adapter_ner_revision: Commit of its repo.
        adapter_tc: Folder or Hub id of the TC LoRA that text vectors are made with; none by default.
        adapter_tc_revision: Commit of its repo.
        regime: Name under which the records are compared, e.g. base, naive, tpl.
        tasks: Names separated by commas, or ``all``.
        protocols: Of ``ner`` (all data), ``ner10`` (a tenth), ``mteb`` (few-shot), ``full`` (probe on all of
            train), separated by commas.
        seeds: Separated by commas. For ``mteb`` seed 0 is MTEB's own; ``full`` is the same for every seed
            and computed for the first only.
        output: JSON file of records; existing records are not computed again.
        data: Folder ``<family>/<task>/<split>.parquet``; by default that of the variable MTPF_DATA.
        cache_dir: Folder for text vectors, which all protocols share; by default they are not stored.
        max_length: Longest text in tokens for text vectors (MTEB's of all-MiniLM-L6-v2 is 256).
        normalize: Scale text vectors of ``mteb`` to length 1, as sentence-transformers encoders do.
        mixed_precision: ``auto`` (bf16 where the device is fast at it), ``bf16`` or ``float32``.
        ner_rows: Most rows of train that NER apps are fitted on, with a quarter as many of validation, drawn
            by the seed; ``ner10`` takes a tenth of them. By default all.
        ner_steps: Steps of each NER fit, without early stopping; by default as `mtpf adapt` has it.
        test_rows: Most rows of each test set, the same for every seed. By default all.
        backbone_per_seed: The seeds are those of pre-finetuning runs, and each has its own backbone: the
            records of other seeds may come from another one.
        workers: Number of processes (0: one a core). The cores are divided among them.
        quick: A smoke run: few rows and steps; its numbers mean nothing.
    """

    backbone: str = "packaged"
    backbone_revision: str | None = None
    adapter_ner: str | None = None
    adapter_ner_revision: str | None = None
    adapter_tc: str | None = None
    adapter_tc_revision: str | None = None
    regime: str
    tasks: str = field(default="all", metadata=COMMAS)
    protocols: str = field(default="ner,ner10,mteb,full", metadata=COMMAS)
    seeds: str = field(default="0", metadata=COMMAS)
    output: str
    data: str | None = None
    cache_dir: str | None = None
    max_length: int = 256
    normalize: bool = True
    mixed_precision: str = "auto"
    ner_rows: int | None = None
    ner_steps: int | None = None
    test_rows: int | None = None
    backbone_per_seed: bool = False
    workers: int = 0
    quick: bool = False

    def __post_init__(self):
        if self.mixed_precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise RecipeError(f"mixed_precision is {self.mixed_precision!r}; choose one of: {known}.")
        if self.workers < 0 or self.max_length < 4:
            raise RecipeError("workers must be at least 0, and max_length at least 4.")
        for name in ("ner_rows", "ner_steps", "test_rows"):
            value = getattr(self, name)
            if value is not None and value < LEAST_ROWS:
                raise RecipeError(f"{name} is {value}; it must be at least {LEAST_ROWS}.")

    def protocol_names(self) -> list[str]:
        """The chosen protocols."""
        names = [part.strip() for part in self.protocols.split(",")]
        for name in (name for name in names if name not in FAMILY_OF):
            known = ", ".join(FAMILY_OF)
            raise RecipeError(f"Unknown protocol {name!r}; {nearest(name, list(FAMILY_OF))}known: {known}.")
        return names

    def seed_numbers(self) -> list[int]:
        """The chosen seeds."""
        try:
            seeds = list(dict.fromkeys(int(part) for part in str(self.seeds).split(",")))
        except ValueError:
            raise RecipeError(f"seeds is {self.seeds!r}; give numbers separated by commas.") from None
        if min(seeds) < 0:
            raise RecipeError(f"seeds is {self.seeds!r}; a seed is at least 0.")
        return seeds


@dataclass(frozen=True)
class Unit:
    """What one process computes at a time: one NER fit, or all text protocols and seeds of a task."""

    task: Task
    jobs: tuple[tuple[str, int], ...]
    """Protocols and seeds."""
    fingerprint: str | None = None
    """Of the data behind the existing records of this task, if there are any."""


def plan(settings: BenchmarkSettings, records: list[dict[str, Any]]) -> list[Unit]:
    """Return the missing units: text tasks whole (their protocols share vectors), NER fits one by one."""
    protocols, seeds = settings.protocol_names(), settings.seed_numbers()
    done = {record_key(record) for record in records}
    # All regimes are compared on the same data.
    fingerprints = {record_key(record)[2]: record["config"].get("data") for record in records}
    units = []
    for task in select_tasks(settings.tasks, {FAMILY_OF[name] for name in protocols}):
        jobs = [
            (protocol, seed)
            for protocol in protocols
            if FAMILY_OF[protocol] == task.family
            for seed in (seeds[:1] if protocol == "full" else seeds)
            if (settings.regime, seed, task.key, protocol) not in done
        ]
        groups = [tuple(jobs)] if task.family == "tc" else [(job,) for job in jobs]
        units += [Unit(task, group, fingerprints.get(task.key)) for group in groups if group]
    return units


class Bench:
    """A loaded backbone that evaluates units; each process has one."""

    def __init__(self, settings: BenchmarkSettings):
        self.settings = settings
        self.model, self.tokenizer = open_backbone(settings.backbone, settings.backbone_revision)
        self.sha256 = backbone_sha256(self.model.backbone)
        self.precision = "bf16" if uses_bf16(self.model.device, settings.mixed_precision) else "float32"
        self.tokenizer_sha256 = tokenizer_sha256(self.tokenizer)
        self.adapters = {"ner": settings.adapter_ner, "tc": settings.adapter_tc}
        self.revisions = {"ner": settings.adapter_ner_revision, "tc": settings.adapter_tc_revision}
        self.hashes = {
            family: adapter_sha256(name, self.revisions[family]) for family, name in self.adapters.items()
        }
        if settings.adapter_tc is not None:
            self.model.load_adapter(
                settings.adapter_tc, "bench-tc", settings.adapter_tc_revision, activate=False
            )
        self.configs = {protocol: self._config(protocol) for protocol in settings.protocol_names()}

    def _config(self, protocol: str) -> dict[str, Any]:
        """Everything except task, data and seed that decides a protocol's values, as records have it."""
        settings, family = self.settings, FAMILY_OF[protocol]
        config = {
            "backbone": {"name": public_name(settings.backbone), "sha256": self.sha256},
            "tokenizer": {"sha256": self.tokenizer_sha256},
            "adapter": {"name": public_name(self.adapters[family]), "sha256": self.hashes[family]},
            "precision": self.precision,
            "quick": settings.quick,
            "test_rows": settings.test_rows,
            "max_length": settings.max_length if family == "tc" else None,
            "ner_rows": settings.ner_rows if family == "ner" else None,
        }
        if protocol == "mteb":
            config["normalize"] = settings.normalize
        if family == "ner":
            chosen = asdict(self._fit_settings(0)).items()
            config["settings"] = {key: value for key, value in chosen if key not in ("seed", "progress")}
        return config

    def _fit_settings(self, seed: int) -> FitSettings:
        steps = 20 if self.settings.quick else self.settings.ner_steps
        fixed: dict[str, Any] = {"steps": steps, "evaluations": 1} if steps else {}
        # Also without an adapter an app has the shape of one: the adapters are compared, not the shapes.
        fixed |= {"size": "tpl", "refit": False, "mixed_precision": self.settings.mixed_precision}
        started = self.adapters["ner"] is not None
        return FitSettings(seed=seed, **fixed).for_family("ner", started=started)

    def run(self, unit: Unit) -> Iterator[dict[str, Any]]:
        """Evaluate one unit; each record is in the output file before the next one is computed."""
        for record in self._evaluate(unit):
            add_record(self.settings.output, record, self.check_same)
            yield record

    def check_same(self, records: list[dict[str, Any]]) -> None:
        """Raise `DataError` with the first fact in which existing records of this regime differ."""
        settings = self.settings
        samples = {task.name: task.samples_per_label for task in all_tasks() if task.family == "tc"}
        for record in (record for record in records if record["regime"] == settings.regime):
            # A protocol that this run does not have was at least measured on the same backbone.
            wanted = _facts(self.configs.get(record["protocol"], {"backbone": {"sha256": self.sha256}}))
            if record["protocol"] == "mteb" and "mteb" in self.configs:
                wanted["samples_per_label"] = samples[record["task"]]
            if settings.backbone_per_seed and record["seed"] not in settings.seed_numbers():
                wanted = {key: value for key, value in wanted.items() if key not in SEED_FACTS}
            for path, value in wanted.items():
                recorded = config_value(record, path)
                if recorded != value:
                    raise DataError(
                        f"{settings.output} has records of regime {settings.regime!r} and protocol "
                        f"{record['protocol']} with another {path}: {recorded}, not {value}; choose another "
                        "--output or --regime."
                    )

    def _evaluate(self, unit: Unit) -> Iterator[dict[str, Any]]:
        if unit.task.family == "ner":
            for protocol, seed in unit.jobs:
                yield self._ner(unit, protocol, seed)
            return
        data = self._load(unit, unit.jobs[0][0], 0)
        assert data.test is not None
        pool = self._vectors(data.train.inputs + data.validation.inputs)
        test = self._vectors(data.test.inputs)
        for protocol, seed in unit.jobs:
            run = self._mteb if protocol == "mteb" else self._full
            yield run(unit.task, data, pool, test, seed)

    def _load(self, unit: Unit, protocol: str, seed: int) -> AppData:
        fraction = 0.1 if protocol == "ner10" else 1.0
        data = load_task(unit.task, self.settings.data, train_fraction=fraction, seed=seed)
        if data.test is None:
            raise DataError(f"Task {unit.task.key} has no test split.")
        if unit.fingerprint not in (None, data.notes["fingerprint"]):
            raise DataError(
                f"{self.settings.output} has records of {unit.task.key} on other data (fingerprint "
                f"{unit.fingerprint}, not {data.notes['fingerprint']}); choose another --output."
            )
        for name, (most, draw) in self._limits(protocol, seed).items():
            split = getattr(data, name)
            if most is not None and most < len(split):
                # A random draw, because some sets are sorted by label.
                rows = np.random.default_rng(draw).permutation(len(split))[:most]
                setattr(data, name, split.take(np.sort(rows)))
        return data

    def _limits(self, protocol: str, seed: int) -> dict[str, tuple[int | None, int]]:
        """Split → most rows used of it, and the seed of their draw."""
        if self.settings.quick:
            return dict.fromkeys(("train", "validation", "test"), (QUICK_ROWS, 0))
        limits: dict[str, tuple[int | None, int]] = {"test": (self.settings.test_rows, 0)}
        if FAMILY_OF[protocol] == "ner" and self.settings.ner_rows is not None:
            limits["train"] = self.settings.ner_rows // (10 if protocol == "ner10" else 1), seed
            limits["validation"] = self.settings.ner_rows // 4, seed
        return limits

    def _vectors(self, texts: list[str]) -> StoredVectors:
        identity = {
            "backbone": self.sha256,
            "tokenizer": self.tokenizer_sha256,
            "adapter": self.hashes["tc"],
            "max_length": self.settings.max_length,
            "precision": self.precision,
        }
        embed = partial(
            embed_texts,
            self.model,
            self.tokenizer,
            adapter="bench-tc" if self.adapters["tc"] else None,
            max_length=self.settings.max_length,
            mixed_precision=self.precision,
        )
        folder = Path(self.settings.cache_dir) if self.settings.cache_dir else None
        return StoredVectors(folder, identity, texts, self.model.config.hidden_size, embed)

    def _mteb(self, task: Task, data, pool: StoredVectors, test: StoredVectors, seed: int) -> dict[str, Any]:
        scale = _unit_length if self.settings.normalize else np.asarray
        labels = data.train.labels + data.validation.labels
        samples = task.samples_per_label, SEED + seed
        draws = few_shot(
            lambda rows: scale(pool.rows(rows)), labels, scale(test.rows()), data.test.labels, *samples
        )
        mean = {key: round(float(np.mean([draw[key] for draw in draws])), 6) for key in draws[0]}
        config = {
            "samples_per_label": task.samples_per_label,
            "draws": [round(draw["accuracy"], 6) for draw in draws],
        }
        return self._record(task, "mteb", seed, "accuracy", mean, len(labels), data, config)

    def _full(self, task: Task, data, pool: StoredVectors, test: StoredVectors, seed: int) -> dict[str, Any]:
        train, validation = np.split(pool.rows(), [len(data.train)])
        probe, chosen = choose_probe(train, data.train.labels, validation, data.validation.labels)
        scores = probe_scores(probe, test.rows(), data.test.labels)
        config = {"C": probe.C, "validation_accuracy_by_C": chosen.details}
        return self._record(task, "full", seed, "accuracy", scores, len(data.train), data, config)

    def _ner(self, unit: Unit, protocol: str, seed: int) -> dict[str, Any]:
        data = self._load(unit, protocol, seed)
        app = fit_app(
            data,
            "ner",
            backbone=(self.model, self.tokenizer),
            adapter=self.adapters["ner"],
            adapter_revision=self.revisions["ner"],
            any_family=True,  # the study swaps the families' adapters
            name="bench-ner",
            settings=self._fit_settings(seed),
        )
        self.model.delete_adapter("bench-ner")
        record = app.record
        config = {key: record[key] for key in ("settings", "types")} | {"fit": record["seeds"][str(seed)]}
        n_train = len(data.train)
        return self._record(unit.task, protocol, seed, "entity_f1", app.metrics, n_train, data, config)

    def _record(
        self, task: Task, protocol: str, seed: int, metric: str, scores, n_train: int, data, config
    ) -> dict[str, Any]:
        return {
            "regime": self.settings.regime,
            "seed": seed,
            "task": task.name,
            "family": task.family,
            "protocol": protocol,
            "metric": metric,
            "value": round(scores[metric], 6),
            "scores": {key: round(value, 6) for key, value in scores.items() if value is not None},
            "n_train": n_train,
            "n_test": len(data.test),
            "config": {**self.configs[protocol], **config, "data": data.notes.get("fingerprint")},
            "versions": versions(*PACKAGES),
            "date": today(),
        }


def _facts(config: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Flatten a config to dotted path → value, without names: two may stand for the same backbone."""
    facts: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            facts |= _facts(value, f"{path}{key}.")
        elif key != "name":
            facts[path + key] = value
    return facts


def _unit_length(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


_BENCH: Bench
"""That of a worker process."""


def _start_worker(settings: BenchmarkSettings, threads: int) -> None:
    global _BENCH
    torch.set_num_threads(threads)
    _BENCH = Bench(settings)


def _run_unit(unit: Unit) -> list[dict[str, Any]]:
    return list(_BENCH.run(unit))


def run_benchmark(settings: BenchmarkSettings, report=lambda record: None) -> list[dict[str, Any]]:
    """Compute all records that are missing from the output file, saving each as soon as it is done.

    On failure, no new unit starts; running ones finish and are saved.

    Args:
        settings: See `BenchmarkSettings`.
        report: Called with every new record.

    Returns:
        All records of the file.

    Raises:
        MtpfError: A mistake in settings or data, if possible before anything is computed.
    """
    records = read_records(settings.output)
    units = plan(settings, records)
    for unit in units:
        check_task(unit.task, settings.data)
    bench = Bench(settings)  # before any process starts, so that a wrong id is reported at once
    bench.check_same(records)
    cores = available_cores()
    workers = min(settings.workers or cores, len(units))
    if workers <= 1:
        torch.set_num_threads(cores)
        for record in chain.from_iterable(map(bench.run, units)):
            report(record)
        return read_records(settings.output)
    del bench
    context = multiprocessing.get_context("spawn")
    arguments = (settings, max(cores // workers, 1))
    with ProcessPoolExecutor(workers, context, _start_worker, arguments) as pool:
        try:
            for future in as_completed([pool.submit(_run_unit, unit) for unit in units]):
                for record in future.result():
                    report(record)
        finally:
            pool.shutdown(cancel_futures=True)
    return read_records(settings.output)
