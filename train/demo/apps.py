"""The embedded demo around a run: its data, and two small apps at the end."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from modeling_mtpf.data.app_data import load_app_data
from modeling_mtpf.model.modeling_mtpf import MtpfModel
from modeling_mtpf.pretraining.recipe import Recipe
from train.demo.corpus import write_demo

SAMPLE = "Remind me to call Nadia Brandt in Lisbon tomorrow at 5pm"


def add_demo_data(recipe: Recipe, folder: Path, accelerator: Accelerator) -> None:
    """Generate the synthetic corpus below the run's folder and let the recipe's families use it."""
    data = folder / "data"
    if accelerator.is_main_process:
        write_demo(data, seed=recipe.seed)
    accelerator.wait_for_everyone()
    families: dict[str, Any] = recipe.families
    if "ner" in families and not (families["ner"].data or families["ner"].text):
        families["ner"].text = str(data / "text.jsonl")
    if "tc" in families and not families["tc"].pairs:
        families["tc"].pairs = [str(data / "pairs")]


def show_apps(folder: Path, model: MtpfModel, tokenizer: PreTrainedTokenizerBase, start: str) -> str:
    """Fit a NER and a TC app before and after training, save the trained ones, and compare them.

    Args:
        folder: Output folder of the run.
        model: The trained backbone.
        tokenizer: Its tokenizer.
        start: The encoder that the run started from; there the apps get a fresh LoRA or none.

    Returns:
        A table of test scores, and a prediction of the two apps.
    """
    from modeling_mtpf.adaptation import (  # here: scoring apps needs the extra eval, training does not
        FitSettings,
        fit_app,
    )

    short = FitSettings(steps=150, evaluations=5, size="tpl")  # the demo is to take minutes
    methods = {"ner": ("lora", short), "tc": ("probe", None)}
    rows = []
    for name, family, metric in (("entities", "ner", "entity_f1"), ("intent", "tc", "accuracy")):
        data = load_app_data(folder / "data" / f"{family}_app", family)
        method, settings = methods[family]
        base = fit_app(data, family, backbone=start, settings=settings, method=method)
        app = fit_app(
            data,
            family,
            backbone=(model, tokenizer),
            adapter=folder / "adapters" / family,
            output_dir=folder / "apps" / name,
            settings=settings,
            method=method,
        )
        rows.append((name, len(data.test or ()), base.metrics[metric], app.metrics[metric]))
    prediction = model.predict([SAMPLE], adapters=["entities", "intent"], tokenizer=tokenizer)
    spans = ", ".join(f"{s['word']} = {s['entity_group']}" for s in prediction["entities"][0]) or "none"
    intent = prediction["intent"][0]
    measures = {"entities": "NER, strict F1", "intent": "TC, accuracy"}
    return "\n".join(
        [
            "",
            "Two apps, fitted on the encoder as it was (base) and on the trained backbone with its adapters.",
            "All texts are synthetic: this shows the machinery at work, not what the method is worth.",
            "",
            f"{'app':<26}{'test texts':>10}{'base':>8}{'trained':>9}",
            *(
                f"{f'{name} ({measures[name]})':<26}{texts:>10}{base:>8.3f}{trained:>9.3f}"
                for name, texts, base, trained in rows
            ),
            "",
            f"  {folder / 'apps' / 'entities'}",
            f"  {folder / 'apps' / 'intent'}",
            "",
            f'"{SAMPLE}"',
            f"  entities: {spans}",
            f"  intent:   {intent['label']} ({intent['score']:.0%})",
        ]
    )
