"""Token classification against the Trainer of transformers, batch 32, 200 labels."""

import tempfile
import time

CONTESTANTS = {"mtpf": 99, "peer_float32": 99, "peer_bf16": 99}
STEPS = 12


def measure(contestant: str, options: dict) -> dict[str, float]:
    """Train on the same sentences several times; the last pass counts."""
    import torch

    from eval.speed.inputs import (
        CLUSTERS,
        MAX_LENGTH,
        SENTENCES_PER_BATCH,
        labels_of,
        last_pass,
        our_run,
        peer_arguments,
        read_sentences,
        step_marks,
    )

    if contestant == "mtpf":
        return our_run(options, regime="ner", steps=STEPS)

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
    started = time.perf_counter()
    encoding = tokenizer(sentences, is_split_into_words=True, truncation=True, max_length=MAX_LENGTH)
    aligned = []
    for row, words in enumerate(sentences):
        labels, word_ids = labels_of(words), encoding.word_ids(row)
        before = [None, *word_ids[:-1]]
        aligned.append(
            [-100 if w is None or w == last else labels[w] for w, last in zip(word_ids, before, strict=True)]
        )
    data = Dataset.from_dict(
        {"input_ids": encoding["input_ids"], "attention_mask": encoding["attention_mask"], "labels": aligned}
    )
    prepared = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as work:
        bf16 = contestant == "peer_bf16"
        arguments = peer_arguments(TrainingArguments, work, SENTENCES_PER_BATCH, bf16)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=DataCollatorForTokenClassification(tokenizer),
            callbacks=[callback],
        )
        trainer.train()
    seconds = last_pass(marks) + prepared
    return {
        "seconds": round(seconds, 3),
        "sentences_per_second": round(STEPS * SENTENCES_PER_BATCH / seconds, 2),
        "seconds_per_step": round(seconds / STEPS, 4),
    }


def compare(medians: dict) -> dict[str, tuple[float, str, float]]:
    """Sentences per second over those of the peer."""
    ours, key = medians["mtpf"]["sentences_per_second"], "sentences_per_second"
    return {
        "sentences per second over the peer's default": (ours / medians["peer_float32"][key], ">=", 2.5),
        "sentences per second over the peer in bf16": (ours / medians["peer_bf16"][key], ">=", 1.2),
    }
