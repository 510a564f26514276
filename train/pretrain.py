"""Pre-finetune one encoder for all families: ``mtpf pretrain``, and without recipe and data the demo.

The demo (a few minutes on 2 cores), a recipe with overrides, resuming after an interruption, and several
processes on one machine:

    python train/pretrain.py
    python train/pretrain.py my.yaml --regime naive --steps 5000
    python train/pretrain.py my.yaml --resume auto
    torchrun --nproc_per_node 2 train/pretrain.py my.yaml

"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the demo is in the repository, not in the package

from modeling_mtpf.cli.main import exit_status, prepare, run_command

DEMO_RECIPE = Path(__file__).parent / "demo" / "recipe.yaml"
NOT_THE_DEMO = r"--families\.\w+\.(data|text|pairs)\b|--plugins\b|--demo(=|$)|-h$|--help$"


def asks_for_demo(arguments: list[str]) -> bool:
    """Whether the arguments name neither a recipe, other than the demo's, nor data."""
    if arguments and not arguments[0].startswith("-"):
        return Path(arguments[0]).resolve() == DEMO_RECIPE.resolve()
    return not any(re.match(NOT_THE_DEMO, argument) for argument in arguments)


def demo(arguments: list[str]) -> None:
    """Run the demo with its recipe and some overrides."""
    prepare("pretrain")
    from train.demo.run import run_demo

    named = bool(arguments) and not arguments[0].startswith("-")
    run_demo([str(DEMO_RECIPE), *arguments[named:]])


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if asks_for_demo(arguments):
        return exit_status(lambda: demo(arguments))
    return exit_status(lambda: run_command(["pretrain", *arguments]))


if __name__ == "__main__":
    sys.exit(main())
