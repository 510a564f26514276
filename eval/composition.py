"""Run the study of apps that serve the same texts, and make its report from the raw records.

    python eval/composition.py run --work runs/composition
    python eval/composition.py run --work runs/composition --backbone tpl=runs/small/backbone --only joint
    python eval/composition.py report

``run`` computes the records of the plan that eval/results/composition.json does not have yet; the same
command resumes after a stop. Apps are fitted once and stay in the folder of the work. ``report`` fills in
the tables and the picture of docs/composition_results.md.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from modeling_mtpf.errors import exit_without_extra

exit_without_extra("train", "datasets", "sklearn", "yaml", "tqdm")
exit_without_extra("eval", "evaluate", "seqeval", "scipy", "matplotlib")


from eval.checks.calibration import small
from eval.composition_report import write_report
from eval.studies import METRICS, add_groups, add_missing, milliseconds, name_of, read_plan, study
from modeling_mtpf.adaptation import FitSettings, fit_app
from modeling_mtpf.adaptation.bundle import BundleSettings, Part, fit_bundle
from modeling_mtpf.adaptation.bundle.fit import unused_settings
from modeling_mtpf.adaptation.bundle.registry import bundle_method
from modeling_mtpf.adaptation.scoring import score_app
from modeling_mtpf.data.app_data import AppData
from modeling_mtpf.data.backbones import open_backbone
from modeling_mtpf.evaluation.composition import ComposedTask, load_composition, score_composition
from modeling_mtpf.evaluation.records import PACKAGES, today
from modeling_mtpf.evaluation.tasks import load_task, select_tasks
from modeling_mtpf.model.adapter_files_mtpf import backbone_sha256
from modeling_mtpf.version import versions

ROOT = Path(__file__).parents[1]
PLAN = ROOT / "eval" / "composition.yaml"
RECORDS = ROOT / "eval" / "results" / "composition.json"
BOTH = ("slots", "intents")


@dataclass
class Unit:
    """A task with a seed on a backbone, and what all methods have in common there.

    Attributes:
        plan: Read from YAML.
        backbone: Name of the backbone in the records.
        opened: Model and tokenizer.
        task: Name of the task.
        seed: Of the draw of rows and of every fit.
        work: Folder of the fitted apps.
        data: Folder of the data; by default that of ``MTPF_DATA``.
    """

    plan: dict[str, Any]
    backbone: str
    opened: Any
    task: str
    seed: int
    work: Path
    data: str | None

    @cached_property
    def composed(self) -> ComposedTask:
        """The rows of the task."""
        return load_composition(self.task, self.data, self.plan["rows"], self.seed)

    def part_data(self, part: str) -> Any:
        """Return the rows of ``slots``, of ``intents``, or of a further set ``tc/emotion``."""
        if part in BOTH:
            return getattr(self.composed, part)
        return small(load_task(select_tasks(part, set(METRICS))[0], self.data), self.plan["rows"], self.seed)

    def app(self, part: str, data: AppData) -> Path:
        """Return the folder of a plain app; fit it unless it is there."""
        settings = FitSettings(seed=self.seed, **self.plan["apps"])
        facts = [
            asdict(settings),
            self.plan["rows"],
            data.notes["fingerprint"],
            self.facts["backbone"]["sha256"],
        ]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
        folder = self.work / f"{self.backbone}-{self.task}-{self.seed}-{name_of(part)}-{digest}"
        if not folder.exists():
            options: dict[str, Any] = {"method": "lora", "settings": settings, "name": name_of(part)}
            fit_app(data, data.family, backbone=self.opened, output_dir=folder, **options)
            self.opened[0].delete_adapter(name_of(part))
        return folder

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What must be equal in all records of a backbone."""
        identity = {"name": self.backbone, "sha256": backbone_sha256(self.opened[0].backbone)}
        return {"backbone": identity, **{key: self.plan[key] for key in ("rows", "apps")}}

    def spec(self, method: str) -> dict[str, Any]:
        """Return what the plan says of a method, with all settings."""
        spec = self.plan["methods"][method]
        return {**spec, "settings": self.plan["bundles"] | spec.get("settings", {})} if spec else {}

    def keys(self, group: str, method: str) -> list[dict[str, Any]]:
        """Return the beginnings of the records of a method, a part each."""
        return [
            {
                "regime": f"{self.backbone}/{group}/{method}",
                "seed": self.seed,
                "task": self.task if part in BOTH else f"{self.task}+{name_of(part)}",
                "family": "ner" if part == "slots" else "tc" if part == "intents" else part.split("/")[0],
                "protocol": part if part in BOTH else "further",
            }
            for part in (*BOTH, *self.plan["groups"][group])
        ]

    def run(self, group: str, method: str) -> Iterator[dict[str, Any]]:
        """Fit what a method needs, and yield the record of each part."""
        spec, parts, model = self.spec(method), [*BOTH, *self.plan["groups"][group]], self.opened[0]
        data = {part: self.part_data(part) for part in parts}
        apps = {part: self.app(part, of_part) for part, of_part in data.items()}
        with tempfile.TemporaryDirectory() as temporary:
            started = time.process_time()
            folders, names, scores = self.make(spec, data, apps, Path(temporary))
            cost: dict[str, float] = {"cpu_seconds": round(time.process_time() - started, 1)}
            files = [file for folder in folders for file in folder.glob("*.safetensors")]
            for folder in folders:
                model.load_adapter(folder, folder.name, activate=False)
            if folders:
                cost["bytes"] = sum(file.stat().st_size for file in files)
        try:
            if folders:
                scores = self.scores(names, data)
                texts = data["intents"].test.inputs
                cost["cpu_ms_a_text"] = milliseconds(self.opened, texts, list(names.values()))
        finally:
            for folder in folders:
                model.delete_adapter(folder.name)
        for part, key in zip(parts, self.keys(group, method), strict=True):
            found, metric = scores[part], METRICS[key["family"]]
            yield {
                **key,
                "metric": metric,
                "value": round(found[metric], 6),
                "scores": {name: round(v, 6) for name, v in found.items() if isinstance(v, float)},
                "n_train": len(data[part].train),
                "n_test": len(data[part].test),
                "config": {**self.facts, "method": spec, "cost": cost, "data": self.composed.fingerprint},
                "versions": versions(*PACKAGES),
                "date": today(),
            }

    def scores(self, names: dict[str, str], data: dict[str, Any]) -> dict[str, dict[str, float]]:
        """Score each part by what is predicted for its test texts."""
        model, tokenizer = self.opened
        both = score_composition(model, tokenizer, self.composed, names["slots"], names["intents"])
        return {
            part: both if part in BOTH else score_app(model, tokenizer, name, data[part].test)
            for part, name in names.items()
        }

    def make(
        self, spec: dict[str, Any], data: dict[str, Any], apps: dict[str, Path], work: Path
    ) -> tuple[list[Path], dict[str, str], dict[str, dict[str, float]]]:
        """Return the adapter folders of a method, and the name that each part is predicted by.

        A method whose LoRA cannot be stored gives no folders, but the test scores of each part.
        """
        names = {part: name_of(part) for part in data}
        if "method" not in spec:
            for part, name in names.items():
                (work / name).symlink_to(apps[part].resolve())
            return [work / name for name in names.values()], names, {}
        stored = bundle_method(spec["method"]).stored
        # Without labels a method has the apps, and maybe texts, nothing else; next to texts, data is scored.
        texts = self.texts(spec.get("texts", "none"))
        known = {} if "texts" in spec and (stored or not texts) else data
        parts = {
            part: Part(name_of(part), of_part.family, known.get(part), str(apps[part]))
            for part, of_part in data.items()
        }
        bundles = (
            {f"only-{names[part]}": [part] for part in parts} if spec.get("each") else {"bundle": list(parts)}
        )
        settings = BundleSettings(seed=self.seed, **spec["settings"])
        unused = unused_settings(spec["method"], settings, list(parts.values()), texts)
        common = self.plan["bundles"].keys() & unused.keys()  # a method may train nothing
        settings = replace(settings, **{key: getattr(BundleSettings(), key) for key in common})
        scores: dict[str, dict[str, float]] = {}
        for bundle, of_bundle in bundles.items():
            chosen, folder = [parts[part] for part in of_bundle], work / bundle if stored else None
            fitted = fit_bundle(chosen, spec["method"], self.opened, folder, texts, settings=settings)
            if not stored:
                scores |= {part: fitted.metrics[names[part]] for part in of_bundle}
                continue
            self.opened[0].delete_adapter(bundle)
            names |= {part: f"{bundle}/{names[part]}" for part in of_bundle}
        return [work / bundle for bundle in bundles] if stored else [], names, scores

    def texts(self, of: str) -> list[str]:
        """Return training texts without labels, of this task or of the next one, or none."""
        if of == "none":
            return []
        if of == "own":
            return self.composed.intents.train.inputs
        names = self.plan["tasks"]
        following = names[(names.index(self.task) + 1) % len(names)]
        return load_composition(following, self.data, self.plan["rows"], self.seed).intents.train.inputs


def run(options: argparse.Namespace) -> None:
    """Compute all records of the plan that are not there."""
    plan, methods = read_plan(options)
    options.work.mkdir(parents=True, exist_ok=True)
    for named in options.backbone:
        name, _, source = named.rpartition("=")
        opened = open_backbone(source)
        for seed in options.seeds or plan["seeds"]:
            for task in plan["tasks"]:
                unit = Unit(plan, name or source, opened, task, seed, options.work, options.data)
                for group in options.groups:
                    for method in methods:
                        facts = {**unit.facts, "method": unit.spec(method)}
                        run_method = partial(unit.run, group, method)
                        add_missing(options.records, unit.keys(group, method), facts, run_method)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""

    def add_options(parser: argparse.ArgumentParser) -> None:
        add_groups(parser, "two")
        parser.add_argument("--work", type=Path, required=True, help="folder of the fitted apps")

    return study(str(__doc__), run, write_report, (PLAN, RECORDS), add_options, arguments)


if __name__ == "__main__":
    sys.exit(main())
