"""Model cards of backbones and adapters: two templates, and the functions that fill them.

A card is written twice: into the folder of a run, without ids, and again when its repo is pushed, so that its
examples run unchanged. What the second card needs of the run is in ``training.json``, without local paths.
"""

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_mtpf.model.gate_mtpf import printable
from modeling_mtpf.model.sources_mtpf import is_hub_id

from .records import CardError, Family, Result, Task, Training, checked

__all__ = ["CardError", "adapter_card", "backbone_card", "how_made", "training_summary"]

TEMPLATES = Path(__file__).parent
PAPER = "https://arxiv.org/abs/2510.07566"
PACKAGED_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
EXAMPLE = "Remind me to call Nadia Brandt in Lisbon tomorrow at 5pm"
ASSUMED = {
    "learning_rate": "peak learning rate of the backbone",
    "adapter_learning_rate": "peak learning rate of LoRA and heads",
    "weight_decay": "weight decay",
    "warmup": "share of warm-up steps",
    "steps": "steps",
    "seed": "seed",
}
"""Recipe keys whose values are ours, not the paper's; every backbone card lists them."""
ASSUMED_BY_FAMILY = {
    "weight": "weight λ of the loss",
    "batch_size": "batch size",
    "max_length": "longest input in sub-words",
    "temperature": "temperature of InfoNCE",
    "symmetric": "InfoNCE in both directions",
    "teacher_layer": "layer of the teacher that is clustered",
}
"""Likewise, keys of a family."""
PROTOCOLS = {
    "entity_f1": "entity_f1 is strict F1 over whole entities (IOB2), on the test set",
    "accuracy": "accuracy is the share of texts with the right label, on the test set",
}
"""What the metrics of this project mean, for an adapter that does not say it itself."""
SIZES = ("sentences", "pairs", "examples", "rows", "words_seen")
"""What the record of a data source counts."""
METRIC_IDS = {"accuracy": "accuracy", "entity_f1": "f1", "f1": "f1", "macro_f1": "f1"}
"""Our metric → the Hub's id of it, where it has one."""


def training_summary(record: dict[str, Any], adapters: list[str]) -> dict[str, Any]:
    """Return what the card of a backbone tells of its run (``run.json``), without any local path."""
    recipe = record["recipe"]
    return {
        "regime": record["regime"],
        "start": "packaged" if recipe["backbone"] == "packaged" else _not_local(recipe["backbone"]),
        "start_revision": recipe.get("revision"),
        "families": _family_rows(record),
        "datasets": _hub_datasets(recipe),
        "adapters": adapters,
        "assumptions": _assumptions(record),
        "versions": record["versions"],
    }


@dataclass(frozen=True)
class CardFacts:
    """What every card says of its repo.

    Attributes:
        repo_id: The repo; ``None`` for the card of a run that is not published yet.
        branch: The branch that the examples load; a card cannot name the commit that it is part of.
        license: License id.
        language: Language codes.
        datasets: Hub ids of the training data, instead of those that the records name.
    """

    repo_id: str | None = None
    branch: str = "main"
    license: str = "apache-2.0"
    language: str | list[str] = "en"
    datasets: list[str] | None = None

    def fill(
        self, template: str, name: str, scores: Iterable[tuple], metadata: dict[str, Any], /, **values: Any
    ) -> ModelCard:
        """Fill a template with ``values``, and the block that the Hub reads with ``metadata``.

        ``name`` is the model's where there is no repo; ``scores`` hold task, id and name of the data, metric
        and value.
        """
        evaluations = [
            EvalResult(
                task_type=task,
                dataset_type=data_id,
                dataset_name=data_name,
                metric_type=METRIC_IDS.get(metric.split("/")[-1], metric),
                metric_name=metric,
                metric_value=value,
            )
            for task, data_id, data_name, metric, value in scores
        ]
        data = ModelCardData(
            language=self.language,
            license=self.license,
            metrics=sorted({result.metric_type for result in evaluations}) or None,
            eval_results=evaluations or None,
            model_name=(self.repo_id or name).split("/")[-1] if evaluations else None,
            **metadata,
        )
        return ModelCard.from_template(
            data,
            template_path=str(TEMPLATES / template),
            repo_id=self.repo_id or "<this repo>",
            branch=self.branch,
            languages=", ".join([self.language] if isinstance(self.language, str) else self.language),
            license_id=self.license,
            paper=PAPER,
            plain=plain_text,
            code=code_span,
            **values,
        )


def plain_text(value: Any) -> str:
    r"""Return a value as one line of Markdown that shows what it is, whatever it holds.

    Example:
        >>> plain_text("# <b>bold</b> | a\n[link](x)")
        '\\# \\<b\\>bold\\</b\\> \\| a \\[link\\](x)'
    """
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", _one_line(value))


def code_span(value: Any) -> str:
    """Return a value between as many backticks as show it as it is, in a table as well.

    Example:
        >>> code_span("a`b"), code_span("B-PER")
        ('`` a`b ``', '`B-PER`')
    """
    text = _one_line(value).replace("|", "\\|")
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{text}{ticks}" if len(ticks) == 1 else f"{ticks} {text} {ticks}"


def _one_line(value: Any) -> str:
    return " ".join(printable(str(value)).split())


def backbone_card(
    training: dict[str, Any] | None,
    *,
    config: dict[str, Any] | None = None,
    num_parameters: int | None = None,
    hashes: dict[str, str] | None = None,
    results: list[dict[str, Any]] | None = None,
    **facts: Any,
) -> ModelCard:
    """Fill the card of a backbone.

    Args:
        training: As `training_summary` returns it; ``None`` for an encoder that this project did not train.
        config: The backbone's ``config.json``.
        num_parameters: Number of values in the encoder.
        hashes: sha256 of the weights and of the remote code, by file name.
        results: Evaluation records with ``task``, ``metric``, ``value`` and more.
        **facts: The attributes of `CardFacts`.

    Raises:
        CardError: A record is malformed, or the regimes of ``training`` and ``config`` differ.
    """
    card, config = CardFacts(**facts), config or {}
    training = {} if training is None else dict(checked(Training, training, "training.json"))
    families = [
        checked(Family, row, f"family {number} of training.json")
        for number, row in enumerate(training.get("families") or [], 1)
    ]
    if any(len(row) != 2 for row in training.get("assumptions") or []):
        raise CardError("'assumptions' of training.json must be pairs of meaning and value.")
    recorded = (config.get("mtpf") or {}).get("regime")
    regime = training.get("regime") or recorded or "base"
    if recorded and regime != recorded:
        runs = f"training.json tells of the regime {regime!r}, config.json of {recorded!r}"
        raise CardError(f"{runs}; they belong to different runs.")
    start = training.get("start")
    base_model = PACKAGED_ENCODER if start == "packaged" else start
    tags = ["mtpf", "multi-task", "lora", "sentence-similarity", "feature-extraction", f"regime:{regime}"]
    rows = [checked(Result, row, f"result {number}") for number, row in enumerate(results or [], 1)]
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "base_model": base_model,
        "datasets": card.datasets or training.get("datasets") or None,
        "tags": tags,
        **({"base_model_relation": "finetune"} if base_model else {}),
    }
    return card.fill(
        "backbone.md",
        "mtpf",
        [(_kind(row), row["task"], row["task"], row["metric"], row["value"]) for row in rows],
        metadata,
        regime=regime,
        start=code_span(base_model) if base_model else "an encoder that it does not name",
        is_packaged=start == "packaged",
        families=families,
        adapters=training.get("adapters") or [],
        assumptions=training.get("assumptions") or [],
        versions=training.get("versions") or {},
        config=config,
        num_parameters=f"{num_parameters:,}" if num_parameters else None,
        hashes=hashes or {},
        results=rows,
    )


def adapter_card(
    task: dict[str, Any],
    config: dict[str, Any],
    *,
    num_parameters: int | None = None,
    num_bytes: int | None = None,
    **facts: Any,
) -> ModelCard:
    """Fill the card of an adapter: the task-primary LoRA of a family, an app, a bundle, or a standalone app.

    Args:
        task: The adapter's ``task.json``, backbone id and revision included when the repo is pushed. Besides
            what ``save_adapter`` writes it may hold ``protocol``, ``dataset`` (a Hub id) and ``examples``.
        config: The adapter's ``adapter_config.json``; a standalone app has none.
        num_parameters: Number of LoRA parameters, or of the changed values of a standalone app.
        num_bytes: Size of the weights, with the head.
        **facts: The attributes of `CardFacts`.

    Raises:
        CardError: ``task`` is malformed.
    """
    card, task = CardFacts(**facts), dict(checked(Task, task, "task.json"))
    backbone = task.get("backbone") or {}
    is_bundle = task["kind"] == "bundle"
    parts = task.get("parts") or [] if is_bundle else [task] if task.get("labels") else []
    is_app = bool(parts)
    metrics = dict(_numbers(task.get("metrics") or {}))
    measured = sorted({key.split("/")[-1] for key in metrics})
    if (dataset := task.get("dataset")) and not is_hub_id(dataset, bare=True):
        raise CardError(
            f"'dataset' of task.json is {dataset!r}, not a Hub id; name other data in 'training_data'."
        )
    datasets = card.datasets or ([dataset] if dataset else [])
    training_data = _describe(task.get("training_data"))
    examples = task.get("examples") or [EXAMPLE]
    pipeline = task["kind"] if is_app and not is_bundle else "feature-extraction"
    name = task.get("name", "app")
    slug = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-") or "app"
    data_id, data_name = (datasets[0], datasets[0]) if datasets else (slug, training_data)
    family = [task["family"]] if task.get("family") else []
    delta = task.get("delta") or {}
    kind = "bundle" if is_bundle else "standalone" if delta else "app" if is_app else "task-primary-lora"
    kinds = {part.get("name"): part["kind"] for part in parts}
    tags = ["mtpf", *([] if delta else ["lora"]), *family, kind]
    metadata = {
        "library_name": "mtpf" if delta else "transformers" if task.get("prefix") else "peft",
        "pipeline_tag": pipeline,
        "base_model": backbone.get("id"),
        "datasets": datasets or None,
        "tags": tags,
        **({"base_model_relation": "adapter"} if backbone.get("id") else {}),
        **({"widget": [{"text": text} for text in examples]} if is_app else {}),
    }
    targets = config.get("target_modules") or []
    return card.fill(
        "delta.md" if delta else "adapter.md",
        task.get("name", "mtpf"),
        [
            (kinds.get(key.split("/")[0], pipeline), data_id, data_name, key, value)
            for key, value in metrics.items()
            if is_app and not key.endswith("divergence")  # from its apps: no quality on a task
        ],
        metadata,
        backbone_id=backbone.get("id") or "<the backbone>",
        backbone_revision=backbone.get("revision") or "<its commit>",
        backbone_sha256=backbone.get("sha256"),
        name=name,
        family=task.get("family"),
        kind=task["kind"],
        is_app=is_app,
        is_bundle=is_bundle,
        prefix=(task.get("prefix") or {}).get("length"),
        num_tokens=len(delta.get("tokens", ())),
        parts=parts,
        is_multi_label=bool(task.get("problem_type")),
        labels=task.get("labels") or [],
        max_length=min([part.get("max_length", 128) for part in parts], default=128),
        lora=config,
        layers=len({match[1] for match in (re.search(r"\.(\d+)\.", f".{t}.") for t in targets) if match}),
        num_modules=len(targets),
        num_parameters=f"{num_parameters:,}" if num_parameters else None,
        num_bytes=f"{num_bytes:,}" if num_bytes else None,
        training_data=training_data,
        made=how_made(task.get("composition")),
        metrics=metrics,
        calibration=dict(_numbers(task.get("calibration") or {})),
        protocol=task.get("protocol") or "; ".join(PROTOCOLS[key] for key in measured if key in PROTOCOLS),
        example=json.dumps(examples[0], ensure_ascii=False),  # a string of Python, whatever is in it
    )


def how_made(composition: dict[str, Any] | None) -> str:
    """Return how the LoRA of a bundle was made, in a line, from ``composition`` of its ``task.json``.

    Example:
        >>> how_made({"method": "lc++", "loss": "distil", "steps": 30, "weights": {"intent": 0.5}, "rank": 9})
        'lc++; loss distil; 30 steps; weights intent 0.5; rank 9'
    """
    made = composition or {}
    texts, weights = (made[key] if isinstance(made.get(key), dict) else {} for key in ("texts", "weights"))
    told = {
        "{}": made.get("method"),
        "loss {}": made.get("loss"),
        "{} steps": made.get("steps"),
        "{} texts": texts.get("texts"),
        "weights {}": ", ".join(f"{part} {weight:.4g}" for part, weight in _numbers(weights)),
        "rank {}": made.get("rank"),
    }
    return "; ".join(form.format(value) for form, value in told.items() if value)


def _kind(result: Result) -> str:
    return "token-classification" if result.get("family") == "ner" else "text-classification"


def _assumptions(record: dict[str, Any]) -> list[list[Any]]:
    recipe = record["recipe"]
    rows = [[meaning, recipe[key]] for key, meaning in ASSUMED.items()]
    for name in record["data"]:
        settings = recipe["families"][name]
        rows += [
            [f"{name}: {text}", settings[key]] for key, text in ASSUMED_BY_FAMILY.items() if key in settings
        ]
        if "dropout" in (settings.get("lora") or {}):
            rows.append([f"{name}: dropout on the input of LoRA", settings["lora"]["dropout"]])
    return rows


def _family_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, description in record["data"].items():
        settings = record["recipe"]["families"][name]
        row = {key: settings.get(key) for key in ("batch_size", "max_length", "weight", "lora")}
        losses = {when: record[when][f"loss/{name}"] for when in ("first", "last")}
        rows.append({"name": name, **losses, **row, "data": ", ".join(_sources(description))})
    return rows


def _sources(description: dict[str, Any]) -> list[str]:
    names = [description["source"]] if "source" in description else list(description)
    return [str(name) if _not_local(str(name)) else Path(str(name)).stem for name in names]


def _hub_datasets(recipe: dict[str, Any]) -> list[str]:
    sources = [
        str(source)
        for settings in recipe["families"].values()
        for source in (settings.get("text"), settings.get("data"), *(settings.get("pairs") or []))
        if source
    ]
    return sorted({source for source in sources if _not_local(source) and "/" in source})


def _not_local(name: str) -> str | None:
    """Return the Hub id that a recipe named, ``None`` where a run took the folder or file of that name."""
    return name if is_hub_id(name, bare=True) and not os.path.exists(name) else None


def _numbers(metrics: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    numbers: list[tuple[str, float]] = []
    for key, value in sorted(metrics.items()):
        if isinstance(value, dict):
            numbers += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise CardError(f"The metric {prefix + key!r} is {value}; leave it out, or measure it again.")
            numbers.append((prefix + key, value))
    return numbers


def _describe(data: Any) -> str:
    if isinstance(data, dict) and data:
        sizes = {key: data[key] for key in SIZES if isinstance(data.get(key), int)}
        about = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in sizes.items())
        named = ", ".join(_sources(data))
        return f"{named} ({about})" if about else named
    return str(data) if data else "not recorded"
