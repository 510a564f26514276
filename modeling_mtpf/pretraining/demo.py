"""The embedded demo around a run: its data, and two small apps at the end."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ..adaptation.text_app import embed_texts, fit_text_app
from ..adaptation.token_app import TokenAppSettings, fit_token_app, tag_words
from ..data.demo import write_demo
from ..data.sources import open_source
from ..evaluation.entities import entity_f1
from ..modeling_mtpf import MtpfModel
from .recipe import Recipe

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
    entities = {split: _rows(folder, "ner_app", split) for split in ("train", "test")}
    intents = {split: _rows(folder, "tc_app", split) for split in ("train", "test")}
    train = entities["train"]
    fit_token_app(
        model,
        tokenizer,
        "entities",
        train["tokens"],
        train["ner_tags"],
        start_from="ner",
        settings=TokenAppSettings(epochs=4),
    )
    f1 = entity_f1(
        entities["test"]["ner_tags"], tag_words(model, tokenizer, "entities", entities["test"]["tokens"])
    )
    fit_text_app(
        model, tokenizer, "intent", intents["train"]["text"], intents["train"]["label"], start_from="tc"
    )
    head: Any = model.heads["intent"]
    vectors = torch.from_numpy(embed_texts(model, tokenizer, intents["test"]["text"], "intent"))
    with torch.no_grad():
        best = head(vectors).argmax(-1).tolist()
    found = [head.labels[i] for i in best]
    accuracy = sum(a == b for a, b in zip(found, intents["test"]["label"], strict=True)) / len(found)
    for name, family, metrics in (
        ("entities", "ner", {"entity_f1": f1}),
        ("intent", "tc", {"accuracy": accuracy}),
    ):
        data = "embedded synthetic demo data"
        model.save_adapter(
            folder / "apps" / name, name, task={"family": family, "metrics": metrics, "training_data": data}
        )
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


def _rows(folder: Path, app: str, split: str) -> dict[str, list]:
    columns = (
        {"tokens": "words", "ner_tags": "words"} if app == "ner_app" else {"text": "text", "label": "text"}
    )
    return open_source(folder / "data" / app / f"{split}.jsonl", columns)[:]


__all__ = ["add_demo_data", "show_apps"]
