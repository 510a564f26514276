"""Run the study of eval/study/gpu.yaml or eval/study/cpu.yaml, and make its report from the raw records.

    python eval/study/run.py run --work runs/study-cpu --workers 2
    python eval/study/run.py report --work runs/study-cpu
    python eval/study/run.py rerun --work runs/study-cpu --workers 2 --count 3
    python eval/study/run.py release --work runs/study-cpu me/my-encoder

``run`` does what is not done yet: for each variant and seed the teacher, labels and starting encoder that it
needs, then pre-finetuning, then the benchmark. The same command resumes after a stop. ``--only neutral/tpl``
does the variants whose names begin so. The plan is the one for GPUs if there is a GPU, else the small one for
CPUs; ``--plan`` names another. ``report`` copies the records of a folder into eval/results and fills in all
tables and pictures of docs/study.md and its appendix; without ``--work`` from the records that are there.
``rerun`` draws some records, computes them again from what ``run`` has left in the folder, and compares.
``release`` publishes a variant's backbone and adapters with complete cards.
"""

import argparse
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from modeling_mtpf.errors import MtpfError, exit_without_extra

exit_without_extra("train", "datasets", "sklearn", "yaml", "tqdm")
exit_without_extra("eval", "evaluate", "seqeval", "scipy", "matplotlib")

import numpy as np
import torch
import yaml
from filelock import Timeout

from eval.study.commands import ROOT, Command, cores_each, run_commands
from eval.study.pictures import draw_pictures
from eval.study.plan import Job, needed_stages, plan_name, read_jobs, read_plan, save_plan
from eval.study.records import add_run, read_study
from eval.study.summarize_runs import summarize_run
from eval.study.tables import fill
from modeling_mtpf.errors import RecipeError
from modeling_mtpf.evaluation.records import locked, read_records, write_records
from modeling_mtpf.evaluation.tasks import DATA_VARIABLE
from modeling_mtpf.hub import pull, push_adapter, push_backbone
from modeling_mtpf.settings import ScriptParser

PLANS = {name: ROOT / "eval" / "study" / f"{name}.yaml" for name in ("gpu", "cpu")}
RESULTS = ROOT / "eval" / "results"
DOCS = ROOT / "docs"
DOCUMENTS = ("study.md", "study/appendix.md")
"""Pages of the report in ``DOCS``; the pictures are next to the appendix."""
RECORDS, RUNS, OVERLAP = "study.json", "study-runs.json", "study-overlap.json"
"""Names in the folder of a study; in ``RESULTS`` the plan's name follows ``study``."""


@dataclass(frozen=True)
class Workplace:
    """The folder of a study, its plan, and how its commands are run.

    Attributes:
        work: Folder of models, labels and records.
        data: Folder of the data.
        workers: Number of commands at a time.
        stages: Of the plan: teacher, labels, starting encoder and so on.
        jobs: Of the plan.
    """

    work: Path
    data: str
    workers: int
    stages: dict[str, dict[str, str]]
    jobs: list[Job]

    @classmethod
    def open(cls, options: argparse.Namespace) -> "Workplace":
        """Read the plan and leave a copy of it in the folder."""
        work, data = options.work.resolve(), options.data or os.environ.get(DATA_VARIABLE)
        if not data:
            raise RecipeError(f"Name the data by --data or the variable {DATA_VARIABLE}.")
        plan = read_plan(options.plan, work, data := str(Path(data).resolve()))
        save_plan(options.plan, work)
        return cls(work, data, options.workers, plan["stages"], read_jobs(plan))

    def run(self, commands: list[Command]) -> None:
        """Run commands; see `run_commands`."""
        run_commands(commands, self.workers, self.work / "logs", {DATA_VARIABLE: self.data})

    def commands(self, jobs: list[Job]) -> list[Command]:
        """All commands of some jobs, job by job, each after the stages and runs that it needs."""
        commands: dict[str, Command] = {}
        for job in jobs:
            needs = needed_stages(self.stages, job.recipe, self.work)
            for name in needs:
                commands.setdefault(name, self.stage(name))
            if job.trains:
                train = self.train(job, needs)
                commands.setdefault(train.name, train)
                needs = [train.name]
            commands[f"{job.name}-benchmark"] = Command(
                f"{job.name}-benchmark",
                ["eval/benchmark.py", *self.benchmark(job)],
                needs,
                partial(self.is_measured, job),
            )
        return list(commands.values())

    def stage(self, name: str) -> Command:
        """The command of a stage."""
        stage = self.stages[name]
        needs = needed_stages(self.stages, {"command": stage["command"] + " ", "families": {}}, self.work)
        needs = [other for other in needs if other != name]  # its command names its own folder, too
        is_done, all_cores = Path(stage["done"]).is_file, stage.get("cores") == "all"
        return Command(name, stage["command"].split(), needs, is_done, all_cores=all_cores)

    def train(self, job: Job, needs: list[str]) -> Command:
        """The command that trains a job's run; its summary is added to the others when it is done."""
        folder = job.folder(self.work)
        file = self.work / "recipes" / f"{job.run_name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        local = {"output_dir": str(folder), "resume": "auto", "threads": cores_each(self.workers)}
        file.write_text(yaml.safe_dump({**job.recipe, **local}, sort_keys=False), "utf-8")
        return Command(
            job.run_name,
            ["train/pretrain.py", str(file)],
            needs,
            partial(job.is_trained, self.work),
            lambda: add_run(self.work / RUNS, job.of, summarize_run(folder)),
        )

    def is_measured(self, job: Job) -> bool:
        """Whether all records of a job are there."""
        return job.is_measured(read_records(self.work / RECORDS))

    def benchmark(self, job: Job, **other: Any) -> list[str]:
        """Arguments of eval/benchmark.py."""
        folder = job.folder(self.work)
        settings = {
            **job.benchmark,
            "tasks": ",".join(job.tasks),
            "regime": job.variant,
            "seeds": job.seed,
            "backbone": folder / "backbone" if job.trains else job.recipe["backbone"],
            "backbone_per_seed": str(job.trains).lower(),
            "output": self.work / RECORDS,
            "workers": 1,
            **{f"adapter_{family}": folder / "adapters" / name for family, name in job.adapters.items()},
            **other,
        }
        return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def run(options: argparse.Namespace) -> None:
    """Do everything of the plan that is not done."""
    workplace = Workplace.open(options)
    jobs = [job for job in workplace.jobs if job.variant.startswith(tuple(options.only))]
    if not jobs:
        names = ", ".join(dict.fromkeys(job.variant for job in workplace.jobs))
        raise RecipeError(f"No variant's name begins with {' or '.join(options.only)}; there are: {names}.")
    commands = workplace.commands(jobs)
    if "overlap" in workplace.stages and options.only == [""]:
        commands.append(workplace.stage("overlap"))
    try:
        with locked(workplace.work / "run", timeout=0):
            workplace.run(commands)
    except Timeout:
        raise RecipeError(f"Another run is at work in {workplace.work}; wait for it, or stop it.") from None


def rerun(options: argparse.Namespace) -> None:
    """Compute some records again, from the same backbones and with the same settings, and print both values.

    Each new record is added to the other records of its run, which the benchmark refuses if they were made
    with something else.

    Raises:
        MtpfError: A few-shot value differs: it depends on nothing but vectors and draws.
    """
    workplace = Workplace.open(options)
    jobs = {(job.variant, job.seed): job for job in workplace.jobs}
    records = [r for r in read_records(workplace.work / RECORDS) if (r["regime"], r["seed"]) in jobs]
    if not records:
        raise RecipeError(f"{workplace.work} has no records of its plan yet; compute them with: run.py run")
    drawn = np.random.default_rng(options.seed).permutation(len(records))[: options.count]
    values: dict[str, tuple[str, float, float]] = {}

    def recompute(record: dict[str, Any]) -> Command:
        job = jobs[record["regime"], record["seed"]]
        name = f"rerun-{job.name}-{record['task']}-{record['protocol']}"
        output = workplace.work / "rerun" / f"{name}.json"
        others = [r for r in records if r["regime"] == job.variant and r != record]
        write_records(output, others)
        task = {"tasks": f"{record['family']}/{record['task']}", "protocols": record["protocol"]}

        def compare() -> None:
            value = next(r for r in read_records(output) if r not in others)["value"]
            values[name] = record["family"], record["value"], value

        arguments = ["eval/benchmark.py", *workplace.benchmark(job, output=output, **task)]
        return Command(name, arguments, after=compare)

    workplace.run([recompute(records[index]) for index in drawn])
    for name, (_, before, now) in values.items():
        print(f"{name}: recorded {before:.6f}, now {now:.6f}, {now - before:+.6f}")
    differing = [name for name, (family, before, now) in values.items() if family == "tc" and before != now]
    if differing:
        raise MtpfError(f"Not the recorded value: {', '.join(differing)}.")


def release(options: argparse.Namespace) -> None:
    """Publish the backbone of a variant, and one adapter a family, and download them again."""
    workplace = Workplace.open(options)
    wanted = (options.variant, options.seed)
    job = next((job for job in workplace.jobs if (job.variant, job.seed) == wanted), None)
    if job is None or not (job.trains and job.is_trained(workplace.work)):
        raise RecipeError(
            f"{options.variant} with seed {options.seed} is not a finished run of {workplace.work}."
        )
    folder = job.folder(workplace.work)
    results = [r for r in read_records(workplace.work / RECORDS) if (r["regime"], r["seed"]) == wanted]
    sha = str(push_backbone(folder / "backbone", options.repo, results=results))
    print(f"{options.repo}@{sha}: {pull(options.repo, sha)}")
    for family in job.adapters:
        repo, adapter = f"{options.repo}-{family}", folder / "adapters" / family
        pushed = str(push_adapter(adapter, repo, backbone_id=options.repo, backbone_revision=sha))
        print(f"{repo}@{pushed}: {pull(repo, pushed)}")


def committed(name: str) -> list[Path]:
    """Files of the records of a plan of this name: measurements, runs, overlap."""
    return [RESULTS / file.replace("study", f"study-{name}") for file in (RECORDS, RUNS, OVERLAP)]


def report(options: argparse.Namespace) -> None:
    """Fill in all tables and pictures of the report."""
    if options.work:
        name = plan_name(options.work)
        if name not in PLANS:
            raise RecipeError(f"{options.work} is of the plan {name!r}; the report has: {', '.join(PLANS)}.")
        if not (options.work / RECORDS).is_file():
            raise RecipeError(f"{options.work} has no {RECORDS}; compute it with: run.py run")
        for file, copy in zip((RECORDS, RUNS, OVERLAP), committed(name), strict=True):
            if (options.work / file).is_file():
                shutil.copyfile(options.work / file, copy)
    studies = {name: read_study(*committed(name)) for name in PLANS}
    for document in (DOCS / name for name in DOCUMENTS):
        document.write_text(fill(document.read_text("utf-8"), studies), "utf-8")
    for name, study in studies.items():
        for picture in draw_pictures(study, DOCS / "study", name):
            print(picture)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = ScriptParser(description=__doc__)
    subparsers = parser.add_subparsers(required=True)
    commands = {}
    for function in (run, rerun, release, report):
        command = commands[function] = subparsers.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        needed = function is not report
        command.add_argument(
            "--work", type=Path, required=needed, help="folder of models, labels and records"
        )
        if needed:
            device = "gpu" if torch.cuda.is_available() else "cpu"
            command.add_argument("--data", help=f"folder of the data; by default that of {DATA_VARIABLE}")
            command.add_argument("--workers", type=int, default=1, help="number of commands at a time")
            command.add_argument("--plan", type=Path, default=PLANS[device], help="of the study")
    commands[run].add_argument("--only", nargs="+", default=[""], help="beginnings of the names of variants")
    commands[rerun].add_argument("--count", type=int, default=3, help="how many records")
    commands[rerun].add_argument("--seed", type=int, default=0, help="of the draw")
    commands[release].add_argument("repo", help="owner/name of the backbone; adapters are owner/name-family")
    commands[release].add_argument("--variant", default="neutral/tpl")
    commands[release].add_argument("--seed", type=int, default=0)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    options = build_parser().parse_args(arguments)
    try:
        options.function(options)
    except MtpfError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; run the same command again to resume.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # running commands are stopped, too
    sys.exit(main())
