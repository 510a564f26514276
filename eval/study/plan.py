"""The plan of a study: what is made ready, which runs there are, and whether one is the planned one."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modeling_mtpf.errors import RecipeError
from modeling_mtpf.evaluation.benchmark import PROTOCOLS
from modeling_mtpf.evaluation.records import record_key
from modeling_mtpf.pretraining.run_record import FREE_KEYS, RUN_FILE

PLAN_COPY = "plan.yaml"
"""In the folder of a study: the plan that it was last run with."""


@dataclass(frozen=True)
class Job:
    """One variant with one seed: pre-finetuning, then the benchmark of what it gave.

    Attributes:
        variant: Name under which the records stand, ``start/regime…``.
        seed: Of pre-finetuning and of the benchmark's draws.
        recipe: Settings of pre-finetuning.
        benchmark: Settings of the benchmark.
        of: Variant whose run is measured, where this one trains none of its own.
        adapters: Family of tasks → family whose LoRA is used for it.
    """

    variant: str
    seed: int
    recipe: dict[str, Any]
    benchmark: dict[str, Any]
    of: str
    adapters: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For logs and files."""
        return f"{self.variant}-{self.seed}".replace("/", "-")

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return self.recipe["regime"] != "base"

    @property
    def tasks(self) -> list[str]:
        """Those of the families that the benchmark's protocols measure."""
        families = {PROTOCOLS[protocol] for protocol in self.benchmark["protocols"].split(",")}
        return [task for task in self.benchmark["tasks"] if task.split("/")[0] in families]

    def folder(self, work: Path) -> Path:
        """Where the run is."""
        return work / "runs" / self.of.replace("/", "-") / f"seed-{self.seed}"

    def is_trained(self, work: Path) -> bool:
        """Whether the run is finished.

        Raises:
            RecipeError: It is, but with other settings than the plan's.
        """
        file = self.folder(work) / RUN_FILE
        if not file.is_file():
            return False
        recorded = json.loads(file.read_text("utf-8"))["recipe"]
        for path, planned, found in differences(self.recipe, recorded):
            raise RecipeError(
                f"{file.parent} was made with {path} = {found!r}, the plan has {planned!r}; remove the "
                "folder, or choose another --work."
            )
        return True

    def missing(self, records: list[dict[str, Any]]) -> bool:
        """Whether records of the benchmark are still to be made."""
        done = {record_key(record) for record in records}
        return any(
            (self.variant, self.seed, task, protocol) not in done
            for task in self.tasks
            for protocol in self.benchmark["protocols"].split(",")
            if PROTOCOLS[protocol] == task.split("/")[0]
        )


def differences(planned: Any, found: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield path, planned and recorded value of every setting of a plan that a run was not made with."""
    if isinstance(planned, dict) and isinstance(found, dict):
        for key in planned.keys() - FREE_KEYS:
            yield from differences(planned[key], found.get(key), f"{path}.{key}" if path else key)
    elif isinstance(planned, dict) or isinstance(found, dict) or _plain(planned) != _plain(found):
        yield path, planned, found


def _plain(value: Any) -> Any:
    """A folder that has moved is the same folder."""
    if isinstance(value, list):
        return [_plain(own) for own in value]
    return Path(value).name if isinstance(value, str) else value


def read_plan(path: Path, work: Path, data: str) -> dict[str, Any]:
    """Read a plan and fill in the folders.

    Raises:
        RecipeError: A folder's name has a space in it, at which commands are split; or the plan has no name.
    """
    for folder in (str(work), data):
        if len(folder.split()) != 1:
            raise RecipeError(f"The folder {folder!r} has a space in its name; choose another one.")
    text = path.read_text("utf-8").replace("{work}", str(work)).replace("{data}", data)
    plan = yaml.safe_load(text)
    if "name" not in plan:
        raise RecipeError(f"{path} has no key 'name', under which its records are kept.")
    return plan


def keep_plan(path: Path, work: Path) -> None:
    """Leave a copy of the plan in the folder of the study; other variants and stages may come later.

    Raises:
        RecipeError: What is there was made by a plan of another name, or by a stage that is now another.
    """
    kept, text = work / PLAN_COPY, path.read_text("utf-8")
    if kept.is_file():
        now, then = yaml.safe_load(text), yaml.safe_load(kept.read_text("utf-8"))
        if now["name"] != then["name"]:
            raise RecipeError(
                f"{work} is of the plan {then['name']!r}, not {now['name']!r}; choose another --work."
            )
        for name in now["stages"].keys() & then["stages"].keys():
            made = Path(then["stages"][name]["done"].replace("{work}", str(work))).exists()
            if made and now["stages"][name] != then["stages"][name]:
                raise RecipeError(
                    f"The stage {name!r} of {work} was made with another command than the plan has now; "
                    "remove what it made, or choose another --work."
                )
    kept.write_text(text, "utf-8")


def plan_of(work: Path) -> str:
    """Return the name of the plan that a folder was made by.

    Raises:
        RecipeError: It is not the folder of a study.
    """
    if not (work / PLAN_COPY).is_file():
        raise RecipeError(f"{work} is no folder of a study: it has no {PLAN_COPY}.")
    return yaml.safe_load((work / PLAN_COPY).read_text("utf-8"))["name"]


def jobs(plan: dict[str, Any]) -> list[Job]:
    """Return all jobs, seed by seed; a variant that is said to come ``after`` a seed follows its jobs."""
    found = []
    for name, variant in plan["variants"].items():
        recipe = merged(plan["recipe"], variant.get("recipe", {}))
        recipe |= {"backbone": plan["starts"][variant["start"]], "regime": variant["regime"]}
        families = recipe["families"]
        if variant["regime"] in families:
            recipe["families"] = {variant["regime"]: families[variant["regime"]]}
        elif variant["regime"] == "base":
            recipe["families"] = {}
        trained = [] if variant["regime"] != "tpl" else list(families)
        adapters = variant.get("adapters", {family: family for family in trained})
        benchmark = plan["benchmark"] | variant.get("benchmark", {})
        for seed in variant.get("seeds", plan["seeds"]):
            own = {**recipe, "seed": seed}
            found.append(Job(name, seed, own, benchmark, variant.get("of", name), adapters))
    return sorted(found, key=lambda job: job.seed + plan["variants"][job.variant].get("after", 0))


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay one tree of settings over another."""
    both = dict(base)
    for key, value in over.items():
        both[key] = merged(base[key], value) if isinstance(base.get(key), dict) else value
    return both


def needed_stages(stages: dict[str, dict[str, str]], recipe: dict[str, Any], work: Path) -> list[str]:
    """Return the stages whose folders a recipe names or that its families need, and those that these need.

    They come in the plan's order.
    """
    texts, found = [json.dumps(recipe)], []
    for name, stage in reversed(stages.items()):
        named = any(f"{work / name}{end}" in text for text in texts for end in '"/ .')
        if named or stage.get("needed_by") in recipe["families"]:
            texts.append(stage["command"] + " ")
            found.append(name)
    return found[::-1]


__all__ = [
    "PLAN_COPY",
    "Job",
    "differences",
    "jobs",
    "keep_plan",
    "merged",
    "needed_stages",
    "plan_of",
    "read_plan",
]
