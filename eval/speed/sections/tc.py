"""Contrastive training against the trainer of sentence-transformers, batch 64, one source a batch."""

import tempfile

CONTESTANTS = {"mtpf": 99, "peer_float32": 99, "peer_bf16": 99}


def measure(contestant: str, options: dict) -> dict[str, float]:
    """Train on one batch of every source, several times; the last pass counts."""
    import torch

    from eval.speed.inputs import PAIRS_PER_BATCH, last_pass, our_run, peer_arguments, read_pairs, step_marks

    sources = read_pairs(options["pairs"])
    if contestant == "mtpf":
        return our_run(options, regime="tc", steps=len(sources))

    torch.set_num_threads(options["threads"])
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from modeling_mtpf.data.packaged_encoder import packaged_encoder

    marks, callback = step_marks()
    model = SentenceTransformer(str(packaged_encoder()), device="cpu")
    data = {
        name: Dataset.from_dict({"anchor": [a for a, _ in rows], "positive": [p for _, p in rows]})
        for name, rows in sources.items()
    }
    with tempfile.TemporaryDirectory() as work:
        bf16 = contestant == "peer_bf16"
        arguments = peer_arguments(SentenceTransformerTrainingArguments, work, PAIRS_PER_BATCH, bf16)
        loss = MultipleNegativesRankingLoss(model)
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=data, loss=loss, callbacks=[callback]
        )
        trainer.train()
    seconds = last_pass(marks)
    return {
        "seconds": round(seconds, 3),
        "pairs_per_second": round(len(sources) * PAIRS_PER_BATCH / seconds, 2),
        "seconds_per_step": round(seconds / len(sources), 4),
    }


def compare(medians: dict) -> dict[str, tuple[float, str, float]]:
    """Pairs per second over those of the peer."""
    ours, key = medians["mtpf"]["pairs_per_second"], "pairs_per_second"
    return {
        "pairs per second over the peer's default": (ours / medians["peer_float32"][key], ">=", 3.0),
        "pairs per second over the peer in bf16": (ours / medians["peer_bf16"][key], ">=", 1.3),
    }
