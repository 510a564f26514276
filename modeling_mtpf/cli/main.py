"""The command ``mtpf``: one module of this folder for each subcommand, and one row in `COMMANDS`.

A subcommand's module has ``run(arguments, prog) -> str | None``, which returns what is to be printed. Results
go to standard output, everything else to standard error. Exit status: 0, done; 2, a mistake that the message
explains; 130, interrupted; 143, a training run that was stopped after it had written a checkpoint.
"""

import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module

from ..errors import MtpfError, require_extra
from ..settings import nearest
from ..version import __version__

COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "label": ("label every word of a text source with the cluster of its teacher vector", ("train",)),
    "pretrain": ("pre-finetune one encoder for all families, from a recipe", ("train",)),
    "adapt": ("fit one app to a frozen backbone", ("train", "eval")),
    "compose": ("make one bundle of apps: one LoRA, one pass for all", ("train", "eval")),
    "benchmark": ("evaluate a backbone and its adapters on the task list", ("train", "eval")),
    "predict": ("apply apps to texts, one line of JSON a text", ()),
    "serve": ("answer HTTP requests for apps that come and go", ("serve",)),
    "export": ("write ONNX graphs and apps for devices, or add apps to them", ()),
    "apply-delta": ("write the whole model of a standalone app", ()),
    "push": ("publish a backbone or an adapter as one commit", ()),
    "pull": ("fetch a repo, verify every hash, and print its folder", ()),
    "inspect": ("describe a folder or repo, and report what is unexpected in it", ()),
}
"""Subcommand → what it does, and the optional dependencies that it needs."""

EXTRAS = {
    "train": ("accelerate", "datasets", "sklearn", "yaml", "tqdm", "matplotlib", "syntok", "threadpoolctl"),
    "eval": ("evaluate", "seqeval", "sklearn", "scipy", "matplotlib", "tqdm", "threadpoolctl"),
    "serve": ("fastapi", "uvicorn", "httptools", "prometheus_client"),
}
"""Extra → its modules."""

ENVIRONMENT = {
    getattr(errno, name)
    for name in "EACCES EDQUOT EFBIG EIO EISDIR ENAMETOOLONG ENOSPC ENOTDIR EPERM EROFS".split()
    if hasattr(errno, name)
}
"""Errors of the system that are not ours: a full disk, a folder that must not be written, a long name."""

HELP = """\
usage: mtpf COMMAND ...

One small encoder for many text apps: train, adapt, apply, publish.

commands:
{commands}

examples:
  mtpf pretrain laptop --families.ner.data labels --families.tc.pairs PAIRS --output_dir runs/mine
  mtpf adapt --family tc --data intents.csv --backbone runs/mine/backbone --output_dir apps/intent
  mtpf predict --adapter ada/notes-entities --adapter ada/notes-intent notes.txt > results.jsonl

mtpf COMMAND --help describes a command. The Hub token is that of `hf auth login` or the variable HF_TOKEN."""


def run_command(arguments: Sequence[str]) -> str | None:
    """Run the command that the first argument names; return what is to be printed.

    Raises:
        MtpfError: A mistake of the user.
    """
    if not arguments:
        raise MtpfError(f"Name a command: {', '.join(COMMANDS)}; mtpf --help describes them.")
    name, *rest = arguments
    if name in ("-h", "--help"):
        return HELP.format(commands="\n".join(f"  {key:<11} {text}" for key, (text, _) in COMMANDS.items()))
    if name == "--version":
        return f"mtpf {__version__}"
    if name not in COMMANDS:
        hint = nearest(name, list(COMMANDS))
        raise MtpfError(f"Unknown command {name!r}; {hint}known: {', '.join(COMMANDS)}.")
    prepare(name)
    logging.getLogger("modeling_mtpf").setLevel(logging.INFO)
    return import_module(f".{name.replace('-', '_')}", __package__).run(rest, f"mtpf {name}")


def prepare(name: str) -> None:
    """Check a command's extras, and set what its libraries read from the environment when imported."""
    extras = COMMANDS[name][1]
    require_extra(",".join(extras), *(module for extra in extras for module in EXTRAS[extra]))
    # Few batch shapes occur; oneDNN keeps a compiled kernel for each. To be set before torch is imported.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096" if name == "pretrain" else "512")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Files open in a moment; the bars that matter are ours.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if extras:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers obeys it, too


def exit_status(action: Callable[[], str | None]) -> int:
    """Carry out a command and return its exit status; a user's mistake ends in one sentence."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that is not UTF-8 is not a reason to fail
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    try:
        if (result := action()) is not None:
            print(result)  # noqa: T201
        sys.stdout.flush()
    except MtpfError as error:
        status = getattr(error, "exit_status", 2)
        # A run that was stopped in order is not an error.
        sys.stderr.write(f"error: {error}\n" if status == 2 else f"{error}\n")
        return status
    except SystemExit as stop:  # argparse has printed its help
        if stop.code:
            raise
        return exit_status(lambda: None)  # for what is not written yet
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `mtpf inspect ... | head` closes the pipe early
        _close_output()
    except OSError as error:
        if error.errno not in ENVIRONMENT:
            raise
        if error.filename is None:
            _close_output()
        sys.stderr.write(f"error: {error.filename or 'The output'} cannot be used: {error.strerror}.\n")
        return 2
    return 0


def _close_output() -> None:
    """Let Python's last attempt to write, when it ends, succeed."""
    with suppress(OSError, ValueError):  # not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    return exit_status(lambda: run_command(sys.argv[1:] if arguments is None else arguments))
