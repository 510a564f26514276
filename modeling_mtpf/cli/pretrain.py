"""``mtpf pretrain``: pre-finetune one encoder for all families, from a recipe."""

from ..errors import RecipeError
from ..pretraining.recipe import known_recipes, load_recipe
from ..pretraining.run import pretrain


def run(arguments: list[str], prog: str) -> None:
    """Carry out one run."""
    recipe = load_recipe(arguments, prog)
    if not recipe.families:
        raise RecipeError(
            f"There is nothing to train on; name a recipe ({', '.join(known_recipes())}, or a YAML file), or data: "
            "--families.ner.data LABELS, --families.tc.pairs PAIRS. The demo is `make pretrain` in the repository."
        )
    pretrain(recipe)
