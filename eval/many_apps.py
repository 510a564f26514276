"""Run the study of one adapter for many apps, and make its report from the raw records.

    python eval/many_apps.py run
    python eval/many_apps.py run --seeds 0 --only apps shared --threads 1
    python eval/many_apps.py run --groups twenty --backbone tpl=runs/small/backbone
    python eval/many_apps.py report

``run`` computes the records of the plan that eval/results/many_apps.json does not have yet, a method at a
time; the same command resumes after a stop. ``report`` fills in the tables and the picture of
docs/many_apps.md.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from modeling_mtpf.errors import exit_without_extra

exit_without_extra("train", "datasets", "sklearn", "yaml", "tqdm")
exit_without_extra("eval", "evaluate", "seqeval", "scipy", "matplotlib")

import numpy as np
import torch

from eval.checks.calibration import small
from eval.many_apps_report import write_report
from eval.studies import METRICS, add_groups, add_missing, milliseconds, name_of, read_plan, study
from modeling_mtpf.adaptation import FitSettings, fit_app
from modeling_mtpf.adaptation.bundle import BundleSettings, Part, fit_bundle
from modeling_mtpf.adaptation.bundle.low_rank import LowRank, depth_of, install, lora_matrices
from modeling_mtpf.adaptation.bundle.registry import Job, JobPart, bundle_method
from modeling_mtpf.adaptation.bundle.rivals import RIVALS
from modeling_mtpf.adaptation.bundle.training import Fixed, FromLabels, bundle_tail, fresh_heads
from modeling_mtpf.adaptation.scoring import score_app
from modeling_mtpf.adaptation.settings import LoraShape
from modeling_mtpf.adaptation.tail_training import optimise
from modeling_mtpf.adaptation.trunk_cache import TrainedTrunk
from modeling_mtpf.data.app_data import AppData
from modeling_mtpf.data.backbones import open_backbone
from modeling_mtpf.devices import precision
from modeling_mtpf.evaluation.records import PACKAGES, today
from modeling_mtpf.evaluation.tasks import load_task, select_tasks
from modeling_mtpf.model.adapter_files_mtpf import backbone_sha256
from modeling_mtpf.model.adapters_mtpf import LoraSettings, count_parameters, lora_targets
from modeling_mtpf.model.delta_mtpf import own_model
from modeling_mtpf.model.trunk_mtpf import TrunkOutput, encoder_layers, run_layers
from modeling_mtpf.version import versions

ROOT = Path(__file__).parents[1]
PLAN, RECORDS = ROOT / "eval" / "many_apps.yaml", ROOT / "eval" / "results" / "many_apps.json"
CONFLICT_BATCHES = 8
"""Batches in each of the two gradients of a part that are compared with the others'."""


class Fitted(NamedTuple):
    """What a method gives: model and tokenizer, names by part, stored bytes, numbers, and what it tells."""

    opened: Any
    names: dict[str, str]
    bytes: int
    trained: int
    details: dict[str, Any]


@dataclass
class Unit:
    """A group of apps with a seed on a backbone, and what all methods have in common there.

    Attributes:
        plan: Read from YAML.
        backbone: Name of the backbone in the records.
        opened: Model and tokenizer.
        group: Name of the group.
        seed: Of the draw of rows and of every fit.
        data: Folder of the data; by default that of ``MTPF_DATA``.
    """

    plan: dict[str, Any]
    backbone: str
    opened: Any
    group: str
    seed: int
    data: str | None

    @cached_property
    def rows(self) -> dict[str, AppData]:
        """The rows of each app."""
        tasks = {
            name: select_tasks(name, set(METRICS))[0] for name in self.plan["groups"][self.group]["apps"]
        }
        return {
            name_of(name): small(load_task(task, self.data), self.plan["rows"], self.seed)
            for name, task in tasks.items()
        }

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What must be equal in all records of a backbone."""
        identity = {"name": self.backbone, "sha256": backbone_sha256(self.opened[0].backbone)}
        shared = {key: self.plan[key] for key in ("rows", "steps", "settings")}
        return {"backbone": identity, **shared, "shared_rank": self.plan["groups"][self.group]["rank"]}

    def spec(self, method: str) -> dict[str, Any]:
        """Return what the plan says of a method."""
        return self.plan["methods"][method]

    def keys(self, group: str, method: str) -> list[dict[str, Any]]:
        """Return the beginnings of the records of a method, an app each."""
        return [
            {
                "regime": f"{self.backbone}/{group}/{method}",
                "seed": self.seed,
                "task": name.partition("/")[2],
                "family": name.partition("/")[0],
                "protocol": name.partition("/")[0],
            }
            for name in self.plan["groups"][group]["apps"]
        ]

    def run(self, group: str, method: str) -> Iterator[dict[str, Any]]:
        """Fit all apps by a method, and yield the record of each."""
        spec, before = self.spec(method), set(self.opened[0].adapters)
        started = time.process_time()
        with tempfile.TemporaryDirectory() as work:
            try:
                fitted = self.fit(spec, Path(work))
                seconds = time.process_time() - started
                names = list(fitted.names.values())
                cost = {
                    "bytes": fitted.bytes,
                    "tails": len({name.partition("/")[0] for name in names}),
                    "trained_parameters": fitted.trained,
                    "cpu_seconds": round(seconds, 1),
                    "cpu_ms_a_text": milliseconds(fitted.opened, self.texts, names),
                }
                scores = self.scores(fitted)
                cosines = self.conflict(fitted) if spec.get("conflict") else {}
            finally:
                model = self.opened[0]
                model.delete_adapter([name for name in model.adapters if name not in before])
        for (part, data), key in zip(self.rows.items(), self.keys(group, method), strict=True):
            metric = METRICS[key["family"]]
            facts = {"method": spec, "cost": cost, "data": data.notes["fingerprint"], **fitted.details}
            yield {
                **key,
                "metric": metric,
                "value": round(scores[part][metric], 6),
                "scores": {name: round(v, 6) for name, v in scores[part].items() if isinstance(v, float)},
                "n_train": len(data.train),
                "n_test": len(data.test or ()),
                "config": {**self.facts, **facts, **({"cosines": cosines[part]} if cosines else {})},
                "versions": versions(*PACKAGES),
                "date": today(),
            }

    def scores(self, fitted: Fitted) -> dict[str, dict[str, Any]]:
        """Score each app on its test rows."""
        tests: dict[str, Any] = {part: data.test for part, data in self.rows.items()}
        model, tokenizer = fitted.opened
        return {part: score_app(model, tokenizer, name, tests[part]) for part, name in fitted.names.items()}

    @property
    def texts(self) -> list[str]:
        """Texts that are predicted one by one to time a prediction."""
        data = next(data for data in self.rows.values() if data.family == "tc")
        return data.test.inputs if data.test else []

    def fit(self, spec: dict[str, Any], work: Path) -> Fitted:
        """Fit all apps, together or each alone."""
        if spec.get("encoder"):
            return self.full_fine_tuning(spec["learning_rate"])
        model, rank = self.opened[0], self.rank(spec)
        shared = {
            **self.plan["settings"],
            **spec.get("settings", {}),
            "seed": self.seed,
            "lora": LoraShape(r=rank),
        }
        if "method" in spec:
            parts = [Part(name, data.family, data) for name, data in self.rows.items()]
            settings = BundleSettings(steps=self.plan["steps"] * len(parts), **shared)
            bundle = fit_bundle(parts, spec["method"], self.opened, work / "all", settings=settings)
            names, made = bundle.adapters, bundle.record["composition"]
            details = {key: made[key] for key in ("prefix", "search", "architecture_weights") if key in made}
            trained = made.get("trained_parameters")
        else:
            details, trained = {}, None
            names = {name: f"alone-{name}" for name in self.rows}
            for name, data in self.rows.items():
                options: dict[str, Any] = {"method": "lora", "name": names[name]}
                options["settings"] = FitSettings(steps=self.plan["steps"], refit=False, **shared)
                fit_app(data, data.family, backbone=self.opened, output_dir=work / name, **options)
        size = sum(file.stat().st_size for file in work.rglob("*.safetensors"))
        loras = {name.partition("/")[0] for name in names.values()}
        count = trained or sum(count_parameters(model.backbone, name) for name in loras)
        return Fitted(self.opened, names, size, count, {"rank": rank, **details})

    def rank(self, spec: dict[str, Any]) -> int:
        """Return the rank of each LoRA by which a method has its budget."""
        rank, count = self.plan["groups"][self.group]["rank"], len(self.rows)
        one_tail = "method" in spec and not bundle_method(spec["method"]).apart
        if spec["budget"] == "trained":
            return self.trained_rank(spec["method"], rank)
        together = {"one": rank, "quarter": rank * count // 4, "all": rank * count}[spec["budget"]]
        return (together if one_tail else together // count) - spec.get("less", 0)

    def trained_rank(self, method: str, rank: int) -> int:
        """Return the largest rank of a method that trains no more numbers than one LoRA of ``rank`` has."""
        model = self.opened[0]
        layers = (
            FitSettings(size=self.plan["settings"]["size"]).shape(len(encoder_layers(model.backbone))).layers
        )
        paths = lora_targets(model.backbone, LoraSettings(layers=layers or 2))
        shapes = [tuple(model.backbone.get_submodule(path).weight.shape) for path in paths]

        def count(candidate: int) -> int:
            with torch.device("meta"):
                made = [RIVALS[method](out, into, candidate, len(self.rows)) for out, into in shapes]
            return sum(parameter.numel() for lora in made for parameter in lora.parameters())

        most = sum(rank * sum(shape) for shape in shapes)
        return next(candidate for candidate in range(4 * rank, 0, -1) if count(candidate) <= most)

    def job(self, model: Any, settings: BundleSettings) -> Job:
        """Return all apps as the parts of a bundle."""
        parts = [JobPart(name, data.family, None, data) for name, data in self.rows.items()]
        return Job(model, self.opened[1], parts, [], None, settings, "all", rounds=True)

    def full_fine_tuning(self, learning_rate: float) -> Fitted:
        """Train a copy of the encoder and a head an app; the copy has a LoRA without effect, to predict."""
        steps = self.plan["steps"] * len(self.rows)
        settings = BundleSettings(seed=self.seed, steps=steps, **self.plan["settings"])
        model = own_model(self.opened[0], share=False).eval()
        torch.manual_seed(self.seed)
        job, layers = self.job(model, settings), list(encoder_layers(model.backbone))
        heads = fresh_heads(job)
        objective = FromLabels(job, len(layers), TrainedTrunk)

        def tail(trunk: TrunkOutput, part: str | None) -> torch.Tensor:
            with precision(model.device, settings.mixed_precision):
                return run_layers(model.backbone, trunk, layers).float()

        def score() -> float:
            return float(np.mean([part.score for part in objective.validate(tail, heads).values()]))

        named = model.backbone.named_parameters()
        encoder = [parameter for key, parameter in named if not key.startswith("pooler.")]
        of_heads = [parameter for head in heads.values() for parameter in head.parameters()]
        groups: list[dict[str, Any]] = [
            {"params": encoder, "lr": learning_rate},
            {"params": of_heads, "lr": settings.learning_rate},
        ]
        optimise(groups, objective.losses(tail, heads, settings), score, steps, settings, "full")
        model.requires_grad_(False)
        path = lora_targets(model.backbone, LoraSettings(layers=1))[0]
        out, into = model.backbone.get_submodule(path).weight.shape
        install(model, "all", {path: LowRank(torch.zeros(1, into), torch.zeros(out, 1))}, heads)
        size = 2 * sum(parameter.numel() for parameter in (*encoder, *of_heads))
        names = {part: f"all/{part}" for part in self.rows}
        return Fitted((model, self.opened[1]), names, size, sum(p.numel() for p in encoder), {})

    def conflict(self, fitted: Fitted) -> dict[str, dict[str, float]]:
        """Return the cosines between the parts' gradients of a shared LoRA, as it is after training.

        Each part has two gradients, of other batches; ``itself`` is the cosine between these, which noise
        alone keeps from 1.
        """
        model, settings = fitted.opened[0], BundleSettings(seed=self.seed, **self.plan["settings"])
        matrices = {
            path: LowRank(pair.down.clone().requires_grad_(), pair.up.clone().requires_grad_())
            for path, pair in lora_matrices(model.backbone, "all").items()
        }
        tensors = [tensor for pair in matrices.values() for tensor in (pair.down, pair.up)]
        job, depth = self.job(model, settings), depth_of(model.backbone, matrices)
        tail = bundle_tail(model, Fixed(matrices), settings)
        heads = {part: model.heads[name] for part, name in fitted.names.items()}
        gradients: dict[str, list[torch.Tensor]] = {}
        for part in job.parts:
            losses = FromLabels(replace(job, parts=[part]), depth).losses(tail, heads, settings)
            for _ in range(2):
                each = [torch.autograd.grad(loss, tensors) for loss in islice(losses, CONFLICT_BATCHES)]
                total = torch.cat([sum(of_one).flatten() for of_one in zip(*each, strict=True)])  # type: ignore
                gradients.setdefault(part.name, []).append(total / total.norm())
        return {
            part: {
                "itself" if part == other else other: round(float(first @ second), 4)
                for other, (_, second) in gradients.items()
            }
            for part, (first, _) in gradients.items()
        }


def run(options: argparse.Namespace) -> None:
    """Compute all records of the plan that are not there."""
    plan, methods = read_plan(options)
    for named in options.backbone:
        name, _, source = named.rpartition("=")
        opened = open_backbone(source)
        for group in options.groups:
            for seed in options.seeds or plan["seeds"]:
                unit = Unit(plan, name or source, opened, group, seed, options.data)
                for method in methods:
                    facts = {**unit.facts, "method": unit.spec(method)}
                    run_method = partial(unit.run, group, method)
                    add_missing(options.records, unit.keys(group, method), facts, run_method)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    options = partial(add_groups, group="eight")
    return study(str(__doc__), run, write_report, (PLAN, RECORDS), options, arguments)


if __name__ == "__main__":
    sys.exit(main())
