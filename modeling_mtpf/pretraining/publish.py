"""Write the folders of a finished run: the backbone and one adapter per family, each with its card."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hub_cards import adapter_card, backbone_card

from ..adapters_mtpf import count_parameters
from ..modeling_mtpf import MtpfModel


def save_run(
    folder: Path, model: MtpfModel, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any]
) -> None:
    """Write ``backbone/`` and ``adapters/<family>/`` below the run's folder."""
    backbone = folder / "backbone"
    model.save_pretrained(backbone)
    tokenizer.save_pretrained(backbone)
    backbone_card(record, model.adapters).save(backbone / "README.md")
    for name in model.adapters:
        target = model.save_adapter(
            folder / "adapters" / name,
            name,
            task={"family": name, "metrics": _final(record, name), "training_data": record["data"].get(name)},
        )
        adapter_card(name, record, count_parameters(model.backbone, name)).save(target / "README.md")


def _final(record: dict[str, Any], family: str) -> dict[str, float]:
    return {key.split("/")[0]: value for key, value in record["last"].items() if key.endswith(f"/{family}")}


__all__ = ["save_run"]
