"""Commands that depend on each other, run several at a time, each on its own cores and with its own log."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

from modeling_mtpf.devices import available_cores
from modeling_mtpf.errors import MtpfError

ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.2
GRACE_SECONDS = 60.0
"""Time that commands have to end after a stop: pre-finetuning writes a checkpoint first."""


@dataclass(frozen=True)
class Command:
    """One script of this project with its arguments.

    Attributes:
        name: Unique; the log file has the same name.
        arguments: For Python: the script and its arguments.
        needs: Names of the commands that must be done before.
        is_done: Tells whether there is nothing to do; may raise an `MtpfError`.
        after: Called when the command is done, now or already before.
        all_cores: Whether it may use all cores instead of its share.
    """

    name: str
    arguments: Sequence[str]
    needs: Sequence[str] = ()
    is_done: Callable[[], bool] = lambda: False
    after: Callable[[], None] = lambda: None
    all_cores: bool = False


def cores_each(workers: int) -> int:
    """Number of cores of each of some workers."""
    return max(available_cores() // workers, 1)


def run_commands(commands: Sequence[Command], workers: int, logs: Path, variables: dict[str, str]) -> None:
    """Run all commands that are not done; of those that may start the first in the list starts first.

    After a failure the commands that depend on it are not started, and all others are. A stop (``Ctrl-C``,
    SIGTERM) ends what runs.

    Args:
        commands: In the order in which they are wanted.
        workers: Number of commands at a time.
        logs: Folder of the log files.
        variables: Environment variables.

    Raises:
        MtpfError: Some commands failed; the first one and its log are named.
    """
    logs.mkdir(parents=True, exist_ok=True)
    order = {command.name: position for position, command in enumerate(commands)}
    sorter = TopologicalSorter({command.name: command.needs for command in commands})
    sorter.prepare()
    ready: list[int] = []
    free, failures = list(range(workers)), []
    running: dict[subprocess.Popen, tuple[Command, int]] = {}

    def fail(message: str) -> None:
        failures.append(message)
        print(f"error: {message}", file=sys.stderr, flush=True)

    def finish(command: Command, status: int = 0) -> None:
        if fault := _fault(command, status, logs):
            fail(fault)
            return
        sorter.done(command.name)
        print(f"{command.name}: done", flush=True)

    try:
        while True:
            ready = sorted([*ready, *(order[name] for name in sorter.get_ready())])
            if ready and free:
                command = commands[ready.pop(0)]
                try:
                    done = command.is_done()
                except MtpfError as error:
                    fail(str(error))
                    continue
                if done:
                    finish(command)
                else:
                    free.remove(slot := min(free))
                    running[_start(command, slot, cores_each(workers), logs, variables)] = command, slot
            elif running:
                for process in _wait_for_one(running):
                    command, slot = running.pop(process)
                    free.append(slot)
                    finish(command, process.returncode)
            else:
                break
    except BaseException:
        _stop(list(running))
        raise
    if failures:
        raise MtpfError(f"{len(failures)} of {len(commands)} commands failed, the first: {failures[0]}")


def _fault(command: Command, status: int, logs: Path) -> str | None:
    """Carry out what follows a command that has ended; return what went wrong, if anything."""
    if status:
        return f"{command.name} ended with status {status}; see {logs / command.name}.log."
    try:
        command.after()
    except MtpfError as error:  # other commands that run are still wanted
        return f"{command.name}: {error}"
    return None


def _wait_for_one(processes: Iterable[subprocess.Popen]) -> list[subprocess.Popen]:
    """Wait until at least one process has ended, and return those that have."""
    while not (ended := [process for process in processes if process.poll() is not None]):
        time.sleep(POLL_SECONDS)
    return ended


def _start(
    command: Command, slot: int, threads: int, logs: Path, variables: dict[str, str]
) -> subprocess.Popen:
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    cores = allowed if command.all_cores else allowed[slot * threads : (slot + 1) * threads]
    used = available_cores() if command.all_cores else threads
    print(f"{command.name}: {command.arguments[0]} on {used} cores {cores or ''}".rstrip(), flush=True)
    with (logs / f"{command.name}.log").open("a") as log, _pinned(cores):
        return subprocess.Popen(
            [sys.executable, *command.arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | variables | {"OMP_NUM_THREADS": str(used)},
            cwd=ROOT,
        )


@contextmanager
def _pinned(cores: list[int]) -> Iterator[None]:
    """Pin this thread, and the processes it starts, to some cores; do nothing if none are named.

    A ``preexec_fn`` would pin the child alone, but can hang in a process with threads.
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


def _stop(processes: list[subprocess.Popen]) -> None:
    """Ask processes to end, and kill those that have not ended after `GRACE_SECONDS`."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(end - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
