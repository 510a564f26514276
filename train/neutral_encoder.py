"""Undo the sentence tuning of a BERT encoder: fresh top layers, then masked-language modelling on raw text.

The packaged encoder is tuned for sentence vectors, so that pre-finetuning for text classification has little
to add to it. The paper starts from encoders that have seen no task. This makes one of the same architecture,
as far as a short run allows: neutral between the families, not as good as one of long pre-training.

    python train/neutral_encoder.py --text wikipedia.parquet --steps 600 --output_dir neutral

The same command resumes a stopped run.
"""

import argparse
import json
import shutil
import sys
from itertools import chain, islice
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from modeling_mtpf.data.packaged_encoder import resolve_encoder
from modeling_mtpf.data.sources import fingerprint, open_source
from modeling_mtpf.errors import MtpfError, RecipeError
from modeling_mtpf.settings import ScriptParser, check_same_arguments

FACTS = "arguments.json"
DECISIVE = ("text", "encoder", "fresh_layers", "steps", "batch_size", "length", "learning_rate", "seed")
"""Arguments that must be the same when a run is resumed."""


class MaskedTrainer(Trainer):
    """Computes the vocabulary's logits at masked positions only: a seventh of them all."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the mean cross-entropy over the masked positions."""
        labels = inputs.pop("labels")
        masked = labels != -100
        logits = model.cls(model.bert(**inputs).last_hidden_state[masked])
        loss = nn.functional.cross_entropy(logits, labels[masked])
        return (loss, {"logits": logits}) if return_outputs else loss


def fresh_top(encoder: str, layers: int) -> BertForMaskedLM:
    """Load an encoder without dropout, with ``layers`` fresh layers at the top and a fresh head.

    Raises:
        RecipeError: It is not a BERT, or has fewer layers.
    """
    config = AutoConfig.from_pretrained(encoder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    if config.model_type != "bert":
        raise RecipeError(
            f"{encoder} is a {config.model_type}; this script knows BERT encoders only: choose one with "
            "--encoder."
        )
    if not 0 <= layers <= config.num_hidden_layers:
        raise RecipeError(f"--fresh_layers is {layers}; the encoder has {config.num_hidden_layers} layers.")
    model = BertForMaskedLM.from_pretrained(encoder, config=config, dtype=torch.float32)
    for layer in model.bert.encoder.layer[config.num_hidden_layers - layers :]:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
    return model


def blocks(tokenizer, source, length: int, count: int) -> Dataset:
    """Return ``count`` blocks of sub-words without padding, from the start of a source's texts.

    Raises:
        RecipeError: The source is too small.
    """

    def pieces():
        for start in range(0, len(source), 1000):
            yield from tokenizer(source[start : start + 1000]["text"], add_special_tokens=False)["input_ids"]

    inside, need = length - 2, count * (length - 2)
    stream = list(islice(chain.from_iterable(pieces()), need))
    if len(stream) < need:
        raise RecipeError(
            f"The text has {len(stream)} sub-words; these steps need {need}: give more text, or lower "
            "--steps, --batch_size or --length."
        )
    first, last = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    rows = [first + stream[start : start + inside] + last for start in range(0, need, inside)]
    return Dataset.from_dict({"input_ids": rows})


def last_checkpoint(arguments: argparse.Namespace, folder: Path) -> str | None:
    """Return the checkpoint to resume from, if there is one, and save the arguments for the next time.

    Raises:
        RecipeError: It was written with other arguments.
    """
    facts = {key: str(getattr(arguments, key)) for key in DECISIVE}
    if (folder / FACTS).is_file():
        check_same_arguments(facts, json.loads((folder / FACTS).read_text("utf-8")), folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS).write_text(json.dumps(facts), "utf-8")
    return get_last_checkpoint(str(folder))


def train(arguments: argparse.Namespace) -> dict:
    """Train, save the encoder without its head, and return the record."""
    set_seed(arguments.seed)
    encoder = resolve_encoder(arguments.encoder)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = fresh_top(encoder, arguments.fresh_layers)
    source = open_source(arguments.text, {"text": "text"})
    data = blocks(tokenizer, source, arguments.length, arguments.steps * arguments.batch_size)
    checkpoints = arguments.output_dir / "_checkpoints"
    options = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=arguments.steps // 20,
        weight_decay=0.01,
        logging_steps=25,
        save_steps=200,
        save_total_limit=1,
        report_to=[],
        seed=arguments.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    trainer = MaskedTrainer(
        model=model,
        args=options,
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, seed=arguments.seed),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(arguments, checkpoints))
    # With the encoder's dropout, and its pooler: transformers makes up another one at each loading.
    trained = AutoModel.from_pretrained(encoder, dtype=torch.float32)
    trained.load_state_dict(model.bert.state_dict(), strict=False)
    trained.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return {
        **{key: getattr(arguments, key) for key in DECISIVE if key != "text"},
        "text": fingerprint(arguments.text, source),
        "losses": [
            {"step": line["step"], "loss": line["loss"]}
            for line in trainer.state.log_history
            if "loss" in line
        ],
    }


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--text", required=True, help="source of raw text, column text")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--encoder", default="packaged", help="packaged, a folder or a Hub id")
    parser.add_argument("--fresh_layers", type=int, default=2, help="layers at the top to initialise again")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="sub-words per block")
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args(arguments)
    try:
        record = train(parsed)
    except MtpfError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (parsed.output_dir / "neutral.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
