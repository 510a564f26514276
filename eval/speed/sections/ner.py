"""Token classification against the Trainer of transformers, batch 32, 200 labels, also grouped by length."""

import tempfile

from eval.speed import clock

CONTESTANTS = {"mtpf": 99, "peer_float32": 99, "peer_bf16": 99, "peer_bf16_grouped": 99}
STEPS = 12


def measure(contestant: str, options: dict) -> dict[str, float]:
    """Train on the same sentences several times; the last pass counts."""
    from eval.speed.inputs import SENTENCES_PER_BATCH, our_run

    if contestant == "mtpf":
        return our_run(options, regime="ner", steps=STEPS)
    seconds = _peer_seconds(options, "bf16" in contestant, contestant.endswith("grouped"))
    return {
        "seconds": round(seconds, 3),
        "sentences_per_second": round(STEPS * SENTENCES_PER_BATCH / seconds, 2),
        "seconds_per_step": round(seconds / STEPS, 4),
    }


def _peer_seconds(options: dict, bf16: bool, grouped: bool) -> float:
    """Train by transformers' recipe; return the seconds of tokenizing and of the last pass."""
    import torch

    from eval.speed.inputs import (
        CLUSTERS,
        MAX_LENGTH,
        SENTENCES_PER_BATCH,
        last_pass,
        peer_arguments,
        peer_labels,
        read_sentences,
        step_marks,
    )

    torch.set_num_threads(options["threads"])
    from datasets import Dataset
    from transformers import (
        AutoModelForTokenClassification,
        AutoTokenizer,
        DataCollatorForTokenClassification,
        Trainer,
        TrainingArguments,
    )

    from modeling_mtpf.data.packaged_encoder import packaged_encoder

    marks, callback = step_marks()
    folder = str(packaged_encoder())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForTokenClassification.from_pretrained(folder, num_labels=CLUSTERS)
    sentences = read_sentences(options["text"], STEPS * SENTENCES_PER_BATCH)
    started = clock.seconds()
    encoding = tokenizer(sentences, is_split_into_words=True, truncation=True, max_length=MAX_LENGTH)
    aligned = [peer_labels(encoding.word_ids(row), words) for row, words in enumerate(sentences)]
    data = Dataset.from_dict(
        {"input_ids": encoding["input_ids"], "attention_mask": encoding["attention_mask"], "labels": aligned}
    )
    prepared = clock.seconds() - started
    with tempfile.TemporaryDirectory() as work:
        arguments = peer_arguments(TrainingArguments, work, SENTENCES_PER_BATCH, bf16)
        arguments.train_sampling_strategy = "group_by_length" if grouped else "random"
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=DataCollatorForTokenClassification(tokenizer),
            callbacks=[callback],
        )
        trainer.train()
    return last_pass(marks) + prepared


def compare(medians: dict) -> dict[str, tuple[float, str, float]]:
    """Sentences per second over those of the peer."""
    ours, key = medians["mtpf"]["sentences_per_second"], "sentences_per_second"
    return {
        "sentences per second over the peer's default": (ours / medians["peer_float32"][key], ">=", 2.5),
        "sentences per second over the peer in bf16": (ours / medians["peer_bf16"][key], ">=", 1.2),
        "sentences per second over the peer in bf16, grouped by length": (
            ours / medians["peer_bf16_grouped"][key],
            ">=",
            1.25,
        ),
    }
