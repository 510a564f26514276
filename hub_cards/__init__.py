"""Model cards of backbones and adapters: two templates, and the functions that fill them."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TEMPLATES = Path(__file__).parent
ASSUMED = {
    "learning_rate": "peak learning rate of the backbone",
    "adapter_learning_rate": "peak learning rate of LoRA and heads",
    "weight_decay": "weight decay",
    "warmup": "share of warm-up steps",
    "steps": "steps",
    "seed": "seed",
}
"""Recipe keys whose values are ours, not the paper's; every backbone card lists them."""


def backbone_card(record: dict[str, Any], adapters: list[str]) -> ModelCard:
    """Fill the card of a backbone from the record of its run (``run.json``)."""
    recipe = record["recipe"]
    data = ModelCardData(
        language="en",
        library_name="transformers",
        pipeline_tag="feature-extraction",
        license="apache-2.0",
        tags=["mtpf", "multi-task", "lora", record["regime"]],
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "backbone.md"),
        regime=record["regime"],
        start=recipe["backbone"],
        families=_family_rows(record),
        adapters=adapters,
        assumptions=[(meaning, recipe[key]) for key, meaning in ASSUMED.items()],
        versions=record["versions"],
    )


def adapter_card(name: str, record: dict[str, Any], num_parameters: int) -> ModelCard:
    """Fill the card of a family's task-primary LoRA."""
    lora = record["recipe"]["families"][name]["lora"]
    data = ModelCardData(
        language="en", library_name="peft", license="apache-2.0", tags=["mtpf", "lora", name]
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "adapter.md"),
        name=name,
        lora=lora,
        num_parameters=f"{num_parameters:,}",
        family=next(row for row in _family_rows(record) if row["name"] == name),
    )


def _family_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, description in record["data"].items():
        settings = record["recipe"]["families"][name]
        rows.append(
            {
                "name": name,
                "first": record["first"][f"loss/{name}"],
                "last": record["last"][f"loss/{name}"],
                "batch_size": settings["batch_size"],
                "max_length": settings["max_length"],
                "weight": settings["weight"],
                "data": ", ".join(_sources(description)),
            }
        )
    return rows


def _sources(description: dict[str, Any]) -> list[str]:
    if "source" in description:
        return [str(description["source"])]
    return list(description)


__all__ = ["adapter_card", "backbone_card"]
