"""The demo: a pre-finetuning run on the generated corpus, and two small apps at the end."""

from modeling_mtpf.pretraining.recipe import load_recipe
from modeling_mtpf.pretraining.run import open_run
from train.demo.apps import add_demo_data, show_apps


def run_demo(arguments: list[str]) -> None:
    """Carry out the run that the arguments describe, with the demo's data, and print what its apps give."""
    recipe = load_recipe(arguments, "train/pretrain.py")
    with open_run(recipe) as run:
        if run.finished:
            print(f"{run.folder} holds the finished run; there is nothing to resume.")
            return
        add_demo_data(recipe, run.folder, run.accelerator)
        trained = run.carry_out()
        if trained is not None and recipe.regime == "tpl":
            print(show_apps(run.folder, *trained, start=recipe.backbone))
