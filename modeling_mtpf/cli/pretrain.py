"""``mtpf pretrain``: pre-finetune one encoder for all families, from a recipe."""

from ..pretraining.recipe import load_recipe
from ..pretraining.run import pretrain


def run(arguments: list[str], prog: str) -> None:
    """Carry out one run."""
    pretrain(load_recipe(arguments, prog))
