"""The plan of a study: its stages, its runs, and whether a finished run is the planned one."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modeling_mtpf.errors import RecipeError
from modeling_mtpf.evaluation.benchmark import FAMILY_OF
from modeling_mtpf.evaluation.records import record_key
from modeling_mtpf.pretraining.run_record import FREE_KEYS, RUN_FILE

PLAN_COPY = "plan.yaml"
"""In the folder of a study: the plan that it was last run with."""


@dataclass(frozen=True)
class Job:
    """One variant with one seed: pre-finetuning, then the benchmark of the result.

    Attributes:
        variant: Name of its records, ``start/regime…``.
        seed: Of pre-finetuning and of the benchmark's draws.
        recipe: Settings of pre-finetuning.
        benchmark: Settings of the benchmark.
        of: Variant whose run is measured; the job's own variant, unless it trains nothing itself.
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
    def run_name(self) -> str:
        """The `name` of the job that trains what this one measures."""
        return f"{self.of}-{self.seed}".replace("/", "-")

    @property
    def trains(self) -> bool:
        """Whether a trained run is measured, not the starting encoder."""
        return self.recipe["regime"] != "base"

    @property
    def tasks(self) -> list[str]:
        """Tasks of the families that the benchmark's protocols measure."""
        families = {FAMILY_OF[protocol] for protocol in self.benchmark["protocols"].split(",")}
        return [task for task in self.benchmark["tasks"] if task.split("/")[0] in families]

    def folder(self, work: Path) -> Path:
        """Output folder of the run."""
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
        for path, planned, used in _differences(self.recipe, recorded):
            raise RecipeError(
                f"{file.parent} was made with {path} = {used!r}, the plan has {planned!r}; remove the "
                "folder, or choose another --work."
            )
        return True

    def is_measured(self, records: list[dict[str, Any]]) -> bool:
        """Whether all records of the benchmark are there."""
        done = {record_key(record) for record in records}
        return all(
            (self.variant, self.seed, task, protocol) in done
            for task in self.tasks
            for protocol in self.benchmark["protocols"].split(",")
            if FAMILY_OF[protocol] == task.split("/")[0]
        )


def _differences(planned: Any, used: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield path, planned and recorded value of every setting of a plan that a run was not made with."""
    if isinstance(planned, dict) and isinstance(used, dict):
        for key in planned.keys() - FREE_KEYS:
            yield from _differences(planned[key], used.get(key), f"{path}.{key}" if path else key)
    elif isinstance(planned, dict) or isinstance(used, dict) or _plain(planned) != _plain(used):
        yield path, planned, used


def _plain(value: Any) -> Any:
    """A folder that was moved is the same folder."""
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return Path(value).name if isinstance(value, str) else value


def read_plan(path: Path, work: Path, data: str) -> dict[str, Any]:
    """Read a plan and fill in the folders.

    Raises:
        RecipeError: A folder's name contains a space, at which commands are split; or the plan has no name.
    """
    for folder in (str(work), data):
        if len(folder.split()) != 1:
            raise RecipeError(f"The folder {folder!r} has a space in its name; choose another one.")
    text = path.read_text("utf-8").replace("{work}", str(work)).replace("{data}", data)
    plan = yaml.safe_load(text)
    if "name" not in plan:
        raise RecipeError(f"{path} has no key 'name', under which its records are stored.")
    return plan


def save_plan(path: Path, work: Path) -> None:
    """Copy the plan into the folder of the study; variants and stages may be added to it later.

    Raises:
        RecipeError: The folder belongs to a plan of another name, or one of its stages had another command.
    """
    copy, text = work / PLAN_COPY, path.read_text("utf-8")
    if copy.is_file():
        now, then = yaml.safe_load(text), yaml.safe_load(copy.read_text("utf-8"))
        if now["name"] != then["name"]:
            raise RecipeError(
                f"{work} is of the plan {then['name']!r}, not {now['name']!r}; choose another --work."
            )
        for name in now["stages"].keys() & then["stages"].keys():
            made = Path(then["stages"][name]["done"].replace("{work}", str(work))).exists()
            if made and now["stages"][name] != then["stages"][name]:
                raise RecipeError(
                    f"The stage {name!r} of {work} was made with another command than the plan has now; "
                    "remove its output, or choose another --work."
                )
    work.mkdir(parents=True, exist_ok=True)
    copy.write_text(text, "utf-8")


def plan_name(work: Path) -> str:
    """Return the name of the plan that a folder belongs to.

    Raises:
        RecipeError: It is not the folder of a study.
    """
    if not (work / PLAN_COPY).is_file():
        raise RecipeError(f"{work} is not the folder of a study: it has no {PLAN_COPY}.")
    return yaml.safe_load((work / PLAN_COPY).read_text("utf-8"))["name"]


def read_jobs(plan: dict[str, Any]) -> list[Job]:
    """Return all jobs, seed by seed; a variant with ``after: N`` follows the jobs of seed N."""
    jobs = []
    for name, variant in plan["variants"].items():
        recipe = _merged(plan["recipe"], variant.get("recipe", {}))
        recipe |= {"backbone": plan["starts"][variant["start"]], "regime": variant["regime"]}
        families = recipe["families"]
        if variant["regime"] in families:
            recipe["families"] = {variant["regime"]: families[variant["regime"]]}
        elif variant["regime"] == "base":
            recipe["families"] = {}
        with_lora = list(families) if variant["regime"] == "tpl" else []
        adapters = variant.get("adapters", {family: family for family in with_lora})
        benchmark = plan["benchmark"] | variant.get("benchmark", {})
        for seed in variant.get("seeds", plan["seeds"]):
            settings = {**recipe, "seed": seed}
            jobs.append(Job(name, seed, settings, benchmark, variant.get("of", name), adapters))
    return sorted(jobs, key=lambda job: job.seed + plan["variants"][job.variant].get("after", 0))


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay one tree of settings over another."""
    both = dict(base)
    for key, value in over.items():
        both[key] = _merged(base[key], value) if isinstance(base.get(key), dict) else value
    return both


def needed_stages(stages: dict[str, dict[str, str]], recipe: dict[str, Any], work: Path) -> list[str]:
    """Return the stages whose folders a recipe names or that its families need, and those that these need.

    They come in the plan's order, in which a stage follows those that it needs.
    """
    texts, needed = [json.dumps(recipe)], []
    for name, stage in reversed(stages.items()):
        named = any(f"{work / name}{end}" in text for text in texts for end in '"/ .')
        if named or stage.get("needed_by") in recipe["families"]:
            texts.append(stage["command"] + " ")
            needed.append(name)
    return needed[::-1]
