"""Compare this project's NER data path and metric with transformers' own recipe: full fine-tuning, one set.

    python eval/checks/ner_against_trainer.py --data DIR/ner/hwu64 --rows 2000 --seeds 0,1,2 \
        --output check-ner.json

One path is transformers' Trainer with its label alignment and collator, scored by seqeval; the other
encodes, aligns, batches, trains and scores with this package. Both start from the same weights, head
included, and train all of them with AdamW under the same linear schedule. Only order and grouping of the rows
differ.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from seqeval.metrics import f1_score
from seqeval.scheme import IOB2
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from modeling_mtpf import MtpfForTokenClassification
from modeling_mtpf.adaptation.tail_training import cross_entropy, shuffled_batches
from modeling_mtpf.data.app_data import AppData, load_app_data
from modeling_mtpf.data.batches import row_batches
from modeling_mtpf.data.encoding import encode_rows, padded
from modeling_mtpf.data.packaged_encoder import resolve_encoder
from modeling_mtpf.data.words import IGNORE, align_labels, first_subwords, load_word_tokenizer
from modeling_mtpf.errors import MtpfError
from modeling_mtpf.evaluation.records import PACKAGES, today
from modeling_mtpf.metrics import entity_scores
from modeling_mtpf.settings import read_settings
from modeling_mtpf.version import versions


@dataclass(kw_only=True)
class Arguments:
    """What is compared.

    Attributes:
        data: Folder with train, validation and test.
        output: JSON file of the scores.
        backbone: ``packaged``, a folder or a Hub id.
        rows: Training rows that are used.
        epochs: Passes over them.
        batch_size: Rows per step.
        learning_rate: Peak learning rate.
        max_length: Longest row in tokens.
        seeds: Separated by commas.
        threads: CPU threads.
    """

    data: str
    output: str
    backbone: str = "packaged"
    rows: int = 2000
    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 1e-4
    max_length: int = 64
    seeds: str = "0"
    threads: int = 2


def with_trainer(folder: str, start: Path, data: AppData, arguments: Arguments, seed: int) -> float:
    """Transformers' token-classification recipe; return the strict F1 on the test set."""
    tokenizer = load_word_tokenizer(folder)

    def encode(batch: dict) -> dict:
        encoding = tokenizer(
            batch["tokens"], is_split_into_words=True, truncation=True, max_length=arguments.max_length
        )
        encoding["labels"] = []
        for row, tags in enumerate(batch["tags"]):
            labels, before = [], None
            for word in encoding.word_ids(row):
                labels.append(-100 if word is None or word == before else data.labels.index(tags[word]))
                before = word
            encoding["labels"].append(labels)
        return encoding

    def score(prediction) -> dict[str, float]:
        gold, predicted = [], []
        for row, labels in zip(prediction.predictions.argmax(-1), prediction.label_ids, strict=True):
            scored = labels != -100
            gold.append([data.labels[i] for i in labels[scored]])
            predicted.append([data.labels[i] for i in row[scored]])
        return {"f1": f1_score(gold, predicted, mode="strict", scheme=IOB2, zero_division=0)}

    splits = {}
    for name, split in (("train", data.train), ("test", data.test)):
        rows = datasets.Dataset.from_dict({"tokens": split.inputs, "tags": split.labels})  # type: ignore
        splits[name] = rows.map(encode, batched=True, remove_columns=["tokens", "tags"])
    with tempfile.TemporaryDirectory() as work:
        settings = TrainingArguments(
            work,
            learning_rate=arguments.learning_rate,
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=64,
            seed=seed,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            AutoModelForTokenClassification.from_pretrained(start),
            settings,
            train_dataset=splits["train"],
            eval_dataset=splits["test"],
            data_collator=DataCollatorForTokenClassification(tokenizer),
            compute_metrics=score,
        )
        trainer.train()
        return trainer.evaluate()["eval_f1"]


def with_package(folder: str, start: Path, data: AppData, arguments: Arguments, seed: int) -> float:
    """The same training with this package's encoding, alignment, batches and metric."""
    tokenizer = load_word_tokenizer(folder)
    model = MtpfForTokenClassification.from_pretrained(start)
    encoded = encode_rows(tokenizer, data.train.inputs, arguments.max_length)
    targets = [
        align_labels(word_ids, [data.labels.index(tag) for tag in tags])[0]
        for word_ids, tags in zip(encoded.word_ids, data.train.labels, strict=True)
    ]
    set_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.0)
    steps = arguments.epochs * -(-len(encoded) // arguments.batch_size)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    order = shuffled_batches(
        encoded.lengths, arguments.batch_size, arguments.max_length, np.random.default_rng(seed)
    )
    model.train()
    for _ in range(steps):
        rows, length = next(order)
        wanted = torch.from_numpy(padded([targets[row] for row in rows], length, IGNORE))
        logits = model(**encoded.inputs(rows, length)).logits
        optimizer.zero_grad()
        cross_entropy(logits.flatten(0, 1), wanted.flatten(), None).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    test = data.test
    assert test is not None
    encoded = encode_rows(tokenizer, test.inputs, arguments.max_length)
    predicted: list[list[str]] = [[] for _ in test.inputs]
    with torch.inference_mode():
        for batch in row_batches(encoded.lengths, arguments.max_length, model.device):
            best = model(**encoded.inputs(batch.rows, batch.length)).logits.argmax(-1).numpy()
            for position, row in enumerate(batch.rows[: batch.real]):
                predicted[row] = ["O"] * len(test.inputs[row])  # of words that are cut off
                for token in np.flatnonzero(first_subwords(encoded.word_ids[row])):
                    predicted[row][encoded.word_ids[row][token]] = data.labels[best[position][token]]
    return entity_scores(test.labels, predicted)["entity_f1"]


def run(arguments: Arguments) -> None:
    """Train both ways with every seed; print and write the scores."""
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    data = load_app_data(arguments.data, "ner")
    data.train = data.train.take(range(min(arguments.rows, len(data.train))))
    folder = resolve_encoder(arguments.backbone)
    scores: dict[str, list[float]] = {"trainer": [], "package": []}
    config = {key: value for key, value in vars(arguments).items() if key not in ("data", "output")}
    record = {
        "task": Path(arguments.data).name,
        "config": config,
        "versions": versions(*PACKAGES),
        "date": today(),
    }
    for seed in (int(part) for part in arguments.seeds.split(",")):
        with tempfile.TemporaryDirectory() as work:
            set_seed(seed)
            start = AutoModelForTokenClassification.from_pretrained(folder, num_labels=len(data.labels))
            start.save_pretrained(work)
            for name, train in (("trainer", with_trainer), ("package", with_package)):
                scores[name].append(round(train(folder, Path(work), data, arguments, seed), 6))
        last = ", ".join(f"{name} {values[-1]:.4f}" for name, values in scores.items())
        print(f"seed {seed}: {last}", flush=True)
        Path(arguments.output).write_text(json.dumps({**record, "scores": scores}, indent=1) + "\n", "utf-8")
    for name, values in scores.items():
        print(f"{name}: mean {np.mean(values):.4f}, sd {np.std(values):.4f}")


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; a user's mistake ends in one sentence and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    described = {"prog": "ner_against_trainer.py", "description": __doc__, "examples": "  see above"}
    try:
        run(read_settings(Arguments, arguments, **described))
    except MtpfError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
