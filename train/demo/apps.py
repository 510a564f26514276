"""The embedded demo around a run: its data, and two small apps at the end."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

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


def show_apps(folder: Path, model: MtpfModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Fit a NER and a TC app on the demo's app data, save them, and return their scores and a prediction."""
    from modeling_mtpf.adaptation import (  # here: scoring apps needs the extra eval, training does not
        FitSettings,
        fit_app,
    )

    metrics = {}
    for name, family in (("entities", "ner"), ("intent", "tc")):
        app = fit_app(
            folder / "data" / f"{family}_app",
            family,
            backbone=(model, tokenizer),
            adapter=folder / "adapters" / family,
            output_dir=folder / "apps" / name,
            settings=FitSettings(steps=150, evaluations=5),  # the demo is to take minutes
        )
        metrics[name] = app.metrics
    f1, accuracy = metrics["entities"]["entity_f1"], metrics["intent"]["accuracy"]
    prediction = model.predict([SAMPLE], adapters=["entities", "intent"], tokenizer=tokenizer)
    spans = ", ".join(f"{s['word']} = {s['entity_group']}" for s in prediction["entities"][0]) or "none"
    intent = prediction["intent"][0]
    return "\n".join(
        [
            "",
            "Two apps, fitted on the frozen backbone (synthetic test data, to show the machinery only):",
            f"  entities (NER, strict F1 {f1:.2f})       {folder / 'apps' / 'entities'}",
            f"  intent   (TC, accuracy {accuracy:.2f})   {folder / 'apps' / 'intent'}",
            "",
            f'"{SAMPLE}"',
            f"  entities: {spans}",
            f"  intent:   {intent['label']} ({intent['score']:.0%})",
        ]
    )
