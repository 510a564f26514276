"""Write the folders of a finished run: the backbone and one adapter per family, each with its card."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hub_cards import adapter_card, backbone_card, training_summary

from ..hub.files import TRAINING_FILE
from ..model.adapter_files_mtpf import ADAPTER_CONFIG_FILE, TASK_FILE
from ..model.adapters_mtpf import count_parameters
from ..model.modeling_mtpf import MtpfModel


def save_run(folder: Path, model: MtpfModel, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any]):
    """Write ``backbone/`` and ``adapters/<family>/`` below the run's folder."""
    backbone = folder / "backbone"
    model.save_pretrained(backbone)
    tokenizer.save_pretrained(backbone)
    training = training_summary(record, model.adapters)
    (backbone / TRAINING_FILE).write_text(json.dumps(training, indent=2, ensure_ascii=False) + "\n", "utf-8")
    backbone_card(training).save(backbone / "README.md")
    for name in model.adapters:
        final = record["last"].items()
        metrics = {key.split("/")[0]: value for key, value in final if key.endswith(f"/{name}")}
        facts = {"family": name, "metrics": metrics, "training_data": record["data"].get(name)}
        target = model.save_adapter(folder / "adapters" / name, name, task=facts)
        files = [(target / file).read_text("utf-8") for file in (TASK_FILE, ADAPTER_CONFIG_FILE)]
        task, config = map(json.loads, files)
        size = count_parameters(model.backbone, name)
        adapter_card(task, config, num_parameters=size).save(target / "README.md")
