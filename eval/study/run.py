"""Run the study of eval/study/gpu.yaml or eval/study/cpu.yaml, and make its report from the raw records.

    python eval/study/run.py run --work runs/study-cpu --workers 2
    python eval/study/run.py report --work runs/study-cpu
    python eval/study/run.py rerun --work runs/study-cpu --workers 2 --count 3
    python eval/study/run.py release --work runs/study-cpu me/my-encoder

``run`` does what is not done yet: for each variant and seed the teacher, labels and starting encoder that it
needs, then pre-finetuning, then the benchmark. The same command goes on after a stop. ``--only neutral/tpl``
does the variants whose names begin so. The plan is the one for GPUs where there is one, else the small one
for CPUs; ``--plan`` names another. ``report`` takes the records of a folder into eval/results and makes all
tables and pictures of docs/study.md anew; without ``--work`` from the records that are there. ``rerun`` draws
some records, computes them again from what ``run`` has left in the folder, and compares. ``release``
publishes a variant's backbone and adapters with complete cards.
"""

import argparse
import heapq
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from modeling_mtpf.errors import MtpfError, exit_without_extra

exit_without_extra("train", "datasets", "sklearn", "yaml", "tqdm")
exit_without_extra("eval", "evaluate", "seqeval", "scipy", "matplotlib")

import numpy as np
import torch
import yaml

from eval.study.pictures import draw_pictures
from eval.study.plan import Job, jobs, keep_plan, needed_stages, plan_of, read_plan
from eval.study.records import add_run, read_study
from eval.study.run_summaries import summarize_run
from eval.study.tables import fill
from modeling_mtpf.devices import available_cores
from modeling_mtpf.errors import RecipeError
from modeling_mtpf.evaluation.records import locked, read_records, write_records
from modeling_mtpf.evaluation.tasks import DATA_VARIABLE
from modeling_mtpf.hub import pull, push_adapter, push_backbone

ROOT = Path(__file__).parents[2]
PLANS = {name: ROOT / "eval" / "study" / f"{name}.yaml" for name in ("gpu", "cpu")}
RESULTS = ROOT / "eval" / "results"
DOCUMENT = ROOT / "docs" / "study.md"
RECORDS, RUNS, OVERLAP = "study.json", "study-runs.json", "study-overlap.json"
"""Names in the folder of a study; in ``RESULTS`` the plan's name follows ``study``."""


@contextmanager
def on_cores(cores: list[int]) -> Iterator[None]:
    """Pin this thread, and the processes that it starts, to some cores; leave it as it is if none are named.

    A ``preexec_fn`` would do so in the child, but can hang in a process with threads, and a stop with it.
    """
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Slots:
    """So many commands may run at a time; a slot that gets free goes to the first of those that wait."""

    def __init__(self, number: int):
        self.free = list(range(number))[::-1]
        self.waiting: list[tuple[float, int]] = []
        self.changed, self.stopped = threading.Condition(), False

    @contextmanager
    def take(self, place: float) -> Iterator[int]:
        """Wait for a slot, and hold it; the lowest ``place`` comes first.

        Raises:
            MtpfError: All was stopped in the meantime.
        """
        own = (place, threading.get_ident())
        with self.changed:
            heapq.heappush(self.waiting, own)
            self.changed.wait_for(lambda: self.stopped or (self.free and self.waiting[0] == own))
            if self.stopped:
                raise MtpfError("stopped")
            heapq.heappop(self.waiting)
            slot = self.free.pop()
            self.changed.notify_all()
        try:
            yield slot
        finally:
            with self.changed:
                self.free.append(slot)
                self.changed.notify_all()

    def stop(self) -> None:
        """Give no slot away any more."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()


class Runner:
    """Runs commands, each on cores of its own, with a log file for each.

    Args:
        plan: See `study_plan.read_plan`.
        work: Folder of everything that is made.
        data: Folder of the data.
        workers: Commands at a time.

    Attributes:
        grace: Seconds that commands have to end after a stop.
    """

    grace = 60.0

    def __init__(self, plan: dict[str, Any], work: Path, data: str, workers: int):
        self.stages = plan["stages"]
        self.work, self.data, cores = work, data, available_cores()
        self.threads = max(cores // workers, 1)
        self.slots = Slots(workers)
        self.running: set[subprocess.Popen] = set()
        self.starting = threading.Lock()
        self.failed: dict[Path, str] = {}
        self.locks: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)
        self.places: dict[Path, float] = {}
        (work / "logs").mkdir(parents=True, exist_ok=True)

    def command(self, name: str, arguments: list[str], place: float = 0, all_cores: bool = False) -> None:
        """Run a script of this project when it is its turn; a slot is taken for as long.

        Raises:
            MtpfError: It failed; the log is named.
        """
        log = self.work / "logs" / f"{name}.log"
        with self.slots.take(place) as slot:
            pinned = sorted(getattr(os, "sched_getaffinity", lambda _: ())(0))
            own = pinned if all_cores else pinned[slot * self.threads : (slot + 1) * self.threads]
            threads = available_cores() if all_cores else self.threads
            environment = os.environ | {"OMP_NUM_THREADS": str(threads), DATA_VARIABLE: self.data}
            print(f"{name}: {arguments[0]} on {f'cores {own}' if own else 'all cores'}", flush=True)
            with log.open("a") as output:
                with self.starting:  # a stop finds what was started, and what was not is never started
                    if self.slots.stopped:
                        raise MtpfError("stopped")
                    with on_cores(own):
                        process = subprocess.Popen(
                            [sys.executable, *arguments],
                            stdout=output,
                            stderr=subprocess.STDOUT,
                            env=environment,
                            cwd=ROOT,
                        )
                    self.running.add(process)
                status = process.wait()
                self.running.discard(process)
        if status:
            raise MtpfError(f"{name} ended with status {status}; see {log}.")

    def stop(self) -> None:
        """Ask all commands that run to end, and after a while make them.

        Pre-finetuning writes a checkpoint first.
        """
        with self.starting:
            self.slots.stop()
            running = list(self.running)
            for process in running:
                process.terminate()
        end = time.monotonic() + self.grace
        for process in running:
            try:
                process.wait(max(end - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()

    @contextmanager
    def together(self, threads: int) -> Iterator[ThreadPoolExecutor]:
        """Give a pool of threads for calls of `command`; what ends the block ends the commands, too."""
        with ThreadPoolExecutor(threads) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()
                raise

    def make(self, folder: Path, done: Callable[[], bool], command: Callable[[], None]) -> None:
        """Make a folder, if it is not there; others that need it wait, and share a failure."""
        with self.locks[folder], locked(folder):
            if folder in self.failed:
                raise MtpfError(self.failed[folder])
            if not done():
                try:
                    command()
                except MtpfError as error:
                    self.failed[folder] = str(error)
                    raise

    def stage(self, name: str) -> None:
        """Make something ready."""
        stage, folder = self.stages[name], self.work / name
        place, all_cores = self.places.get(folder, -1), stage.get("cores") == "all"
        self.make(
            folder,
            Path(stage["done"]).is_file,
            lambda: self.command(name, stage["command"].split(), place, all_cores),
        )

    def queue(self, planned: list[Job]) -> None:
        """Note the order: a run or a stage comes as early as the first job that needs it."""
        for place, job in enumerate(planned):
            for name in needed_stages(self.stages, job.recipe, self.work):
                self.places.setdefault(self.work / name, place - 0.5)
            self.places.setdefault(job.folder(self.work), place)

    def job(self, job: Job, place: int) -> None:
        """Train and measure one variant with one seed; of what is ready the lowest ``place`` comes first."""
        for stage in needed_stages(self.stages, job.recipe, self.work):
            self.stage(stage)
        folder = job.folder(self.work)
        if job.trains:
            self.make(
                folder,
                lambda: job.is_trained(self.work),
                lambda: self.command(
                    job.name, ["train/pretrain.py", str(self.write_recipe(job))], self.places[folder]
                ),
            )
            if job.of == job.variant:
                add_run(self.work / RUNS, job.variant, summarize_run(folder))
        if job.missing(read_records(self.work / RECORDS)):
            self.command(f"{job.name}-benchmark", ["eval/benchmark.py", *self.benchmark(job)], place)
        print(f"{job.name}: done", flush=True)

    def write_recipe(self, job: Job) -> Path:
        """Write the recipe of a run that goes on where it was stopped."""
        file = self.work / "recipes" / f"{job.name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        own = {"output_dir": str(job.folder(self.work)), "resume": "auto", "threads": self.threads}
        file.write_text(yaml.safe_dump({**job.recipe, **own}, sort_keys=False), "utf-8")
        return file

    def benchmark(self, job: Job, **other: Any) -> list[str]:
        """Arguments of eval/benchmark.py."""
        folder = job.folder(self.work)
        chosen = {
            **job.benchmark,
            "tasks": ",".join(job.tasks),
            "regime": job.variant,
            "seeds": job.seed,
            "backbone": folder / "backbone" if job.trains else job.recipe["backbone"],
            "backbone_per_seed": str(job.trains).lower(),
            "output": self.work / RECORDS,
            "workers": 1,
            **{f"adapter_{family}": folder / "adapters" / own for family, own in job.adapters.items()},
            **other,
        }
        return [part for key, value in chosen.items() for part in (f"--{key}", str(value))]


def open_plan(given: argparse.Namespace) -> tuple[list[Job], Runner]:
    """Read the plan; return its jobs and what runs them."""
    work, data = given.work.resolve(), given.data or os.environ.get(DATA_VARIABLE)
    if not data:
        raise RecipeError(f"Name the data by --data or the variable {DATA_VARIABLE}.")
    data = str(Path(data).resolve())
    plan = read_plan(given.plan, work, data)
    runner = Runner(plan, work, data, given.workers)
    keep_plan(given.plan, work)
    return jobs(plan), runner


def run(given: argparse.Namespace) -> None:
    """Do everything of the plan that is not done; a job that fails takes no other with it."""
    planned, runner = open_plan(given)
    chosen = [job for job in planned if any(job.variant.startswith(own) for own in given.only)]
    if not chosen:
        names = ", ".join(dict.fromkeys(job.variant for job in planned))
        raise RecipeError(f"No variant's name begins with {' or '.join(given.only)}; there are: {names}.")
    runner.queue(chosen)
    failed: list[str] = []
    with runner.together(len(chosen)) as pool:  # most wait: for a slot, or for what they need
        for future in as_completed([pool.submit(runner.job, job, i) for i, job in enumerate(chosen)]):
            if isinstance(error := future.exception(), MtpfError):
                failed.append(str(error))
                print(f"error: {error}", file=sys.stderr, flush=True)
            elif error is not None:
                raise error
    if failed:
        raise MtpfError(f"{len(failed)} of {len(chosen)} jobs failed, the first: {failed[0]}")
    if "overlap" in runner.stages and given.only == [""]:
        runner.stage("overlap")


def rerun(given: argparse.Namespace) -> None:
    """Compute some records again, from the same backbones and with the same settings, and print both values.

    The other records of the run stand beside the new one, and the benchmark refuses to add to records that
    were made with something else.

    Raises:
        MtpfError: A few-shot value is another one: it depends on nothing but vectors and draws.
    """
    planned, runner = open_plan(given)
    found = {(job.variant, job.seed): job for job in planned}
    records = read_records(runner.work / RECORDS)
    known = [own for own in records if (own["regime"], own["seed"]) in found]
    drawn = np.random.default_rng(given.seed).permutation(len(known))[: given.count]

    def compute(record: dict[str, Any]) -> tuple[str, dict[str, Any], float]:
        job = found[record["regime"], record["seed"]]
        name = f"rerun-{job.name}-{record['task']}-{record['protocol']}"
        output = runner.work / "rerun" / f"{name}.json"
        beside = [own for own in records if own["regime"] == job.variant and own != record]
        write_records(output, beside)
        chosen = {"tasks": f"{record['family']}/{record['task']}", "protocols": record["protocol"]}
        runner.command(name, ["eval/benchmark.py", *runner.benchmark(job, output=output, **chosen)])
        return name, record, next(own for own in read_records(output) if own not in beside)["value"]

    differing = []
    with runner.together(given.workers) as pool:
        for name, record, value in pool.map(compute, (known[index] for index in drawn)):
            difference = value - record["value"]
            print(f"{name}: recorded {record['value']:.6f}, now {value:.6f}, {difference:+.6f}")
            if record["family"] == "tc" and difference:
                differing.append(name)
    if differing:
        raise MtpfError(f"Not the recorded value: {', '.join(differing)}.")


def release(given: argparse.Namespace) -> None:
    """Publish the backbone of a variant, and one adapter a family, and fetch them again."""
    planned, runner = open_plan(given)
    wanted = (given.variant, given.seed)
    job = next((own for own in planned if (own.variant, own.seed) == wanted), None)
    if job is None or not (job.trains and job.is_trained(runner.work)):
        raise RecipeError(f"{given.variant} with seed {given.seed} is no finished run of {runner.work}.")
    folder = job.folder(runner.work)
    records = read_records(runner.work / RECORDS)
    own = [record for record in records if (record["regime"], record["seed"]) == wanted]
    sha = str(push_backbone(folder / "backbone", given.repo, results=own))
    print(f"{given.repo}@{sha}: {pull(given.repo, sha)}")
    for family in job.adapters:
        repo = f"{given.repo}-{family}"
        pushed = push_adapter(
            folder / "adapters" / family, repo, backbone_id=given.repo, backbone_revision=sha
        )
        print(f"{repo}@{pushed}: {pull(repo, str(pushed))}")


def recorded(name: str) -> list[Path]:
    """Where the records of a plan of this name are kept: measurements, runs, overlap."""
    return [RESULTS / file.replace("study", f"study-{name}") for file in (RECORDS, RUNS, OVERLAP)]


def report(given: argparse.Namespace) -> None:
    """Make all tables and pictures of the report anew."""
    if given.work:
        name = plan_of(given.work)
        if name not in PLANS:
            raise RecipeError(f"{given.work} is of the plan {name!r}; the report has: {', '.join(PLANS)}.")
        for file, kept in zip((RECORDS, RUNS, OVERLAP), recorded(name), strict=True):
            if (given.work / file).is_file():
                shutil.copyfile(given.work / file, kept)
    studies = {name: read_study(*recorded(name)) for name in PLANS}
    DOCUMENT.write_text(fill(DOCUMENT.read_text("utf-8"), studies), "utf-8")
    for name, study in studies.items():
        for picture in draw_pictures(study, DOCUMENT.parent / "study", name):
            print(picture)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    device = "gpu" if torch.cuda.is_available() else "cpu"
    names = ("run", "rerun", "release", "report")
    train, again, out, tables = (commands.add_parser(name) for name in names)
    for command, function in zip((train, again, out, tables), (run, rerun, release, report), strict=True):
        command.set_defaults(run=function)
        needed = command is not tables
        command.add_argument(
            "--work", type=Path, required=needed, help="folder of models, labels and records"
        )
    for command in (train, again, out):
        command.add_argument("--data", help=f"folder of the data; by default that of {DATA_VARIABLE}")
        command.add_argument("--workers", type=int, default=1, help="commands at a time, each on its cores")
        command.add_argument("--plan", type=Path, default=PLANS[device], help="of the study")
    train.add_argument("--only", nargs="+", default=[""], help="beginnings of the names of variants")
    again.add_argument("--count", type=int, default=3, help="how many records")
    again.add_argument("--seed", type=int, default=0, help="of the draw")
    out.add_argument("repo", help="owner/name of the backbone; adapters get the family's name behind it")
    out.add_argument("--variant", default="neutral/tpl")
    out.add_argument("--seed", type=int, default=0)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    given = build_parser().parse_args(arguments)
    try:
        given.run(given)
    except MtpfError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; the same command goes on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what runs is stopped, too
    sys.exit(main())
