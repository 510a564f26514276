"""The command ``mtpf``: one module of this folder for each subcommand, and one row in `COMMANDS`.

A subcommand's module has ``run(arguments, prog) -> str | None``, which returns what is to be printed. Results
go to standard output, everything else to standard error. Exit status: 0, done; 2, a mistake that the message
explains; 130, interrupted; 143, a training run that was stopped after it had written a checkpoint.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from ..errors import MtpfError, require_extra
from ..settings import nearest
from ..version import __version__


@dataclass(frozen=True)
class Command:
    """A row of `COMMANDS`.

    Attributes:
        meaning: What it does, for ``mtpf --help``.
        extras: The optional dependencies that it needs.
    """

    meaning: str
    extras: tuple[str, ...] = ()


COMMANDS = {
    "label": Command("label every word of a text source with the cluster of its teacher vector", ("train",)),
    "pretrain": Command("pre-finetune one encoder for all families, from a recipe", ("train",)),
    "adapt": Command("fit one app to a frozen backbone", ("train", "eval")),
    "benchmark": Command("evaluate a backbone and its adapters on the task list", ("train", "eval")),
    "predict": Command("apply apps to texts, one line of JSON a text"),
    "export": Command("write ONNX graphs and apps for devices, or add apps to them"),
    "push": Command("publish a backbone or an adapter as one commit"),
    "pull": Command("fetch a repo, verify every hash, and print its folder"),
    "inspect": Command("describe a folder or repo, and report what is unexpected in it"),
}

EXTRAS = {
    "train": ("accelerate", "datasets", "sklearn", "yaml", "tqdm", "matplotlib", "syntok", "threadpoolctl"),
    "eval": ("evaluate", "seqeval", "sklearn", "scipy", "matplotlib", "tqdm", "threadpoolctl"),
}
"""Extra → its modules."""

EXAMPLES = """\
examples:
  mtpf pretrain laptop --families.ner.data labels --families.tc.pairs PAIRS --output_dir runs/mine
  mtpf adapt --family tc --data intents.csv --backbone runs/mine/backbone --output_dir apps/intent
  mtpf predict --adapter ada/notes-entities --adapter ada/notes-intent notes.txt > results.jsonl

mtpf COMMAND --help describes a command. The Hub token is that of `hf auth login` or the variable HF_TOKEN."""


def usage() -> str:
    """Return the help of ``mtpf``."""
    rows = "\n".join(f"  {name:<10} {command.meaning}" for name, command in COMMANDS.items())
    return (
        "usage: mtpf COMMAND ...\n\nOne small encoder for many text apps: train, adapt, apply, publish."
        f"\n\ncommands:\n{rows}\n\n{EXAMPLES}"
    )


def run_command(arguments: Sequence[str]) -> str | None:
    """Run the command that the first argument names; return what is to be printed.

    Raises:
        MtpfError: A mistake of the user.
    """
    if not arguments:
        raise MtpfError(f"Name a command: {', '.join(COMMANDS)}; mtpf --help describes them.")
    name, *rest = arguments
    if name in ("-h", "--help"):
        return usage()
    if name == "--version":
        return f"mtpf {__version__}"
    if name not in COMMANDS:
        raise MtpfError(
            f"Unknown command {name!r}; {nearest(name, list(COMMANDS))}known: {', '.join(COMMANDS)}."
        )
    prepare(name)
    logging.getLogger("modeling_mtpf").setLevel(logging.INFO)
    return import_module(f".{name}", __package__).run(rest, f"mtpf {name}")


def prepare(name: str) -> None:
    """Check a command's extras and set what its libraries read from the environment when they are imported.

    Raises:
        MissingExtraError: An optional dependency is missing; all the extras are named.
    """
    extras = COMMANDS[name].extras
    require_extra(",".join(extras), *(module for extra in extras for module in EXTRAS[extra]))
    # Few batch shapes occur; oneDNN keeps a compiled kernel for each. To be set before torch is imported.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096" if name == "pretrain" else "512")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def exit_status(action: Callable[[], str | None]) -> int:
    """Carry out a command and return its exit status; a user's mistake ends in one sentence."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a terminal that is not UTF-8 is not a reason to fail
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    try:
        result = action()
        if result is not None:
            print(result, flush=True)  # noqa: T201
    except MtpfError as error:
        sys.stderr.write(f"error: {error}\n")
        return getattr(error, "exit_status", 2)
    except SystemExit as stop:  # argparse has printed its help
        if stop.code:
            raise
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `mtpf inspect ... | head` closes the pipe early
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    return exit_status(lambda: run_command(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
