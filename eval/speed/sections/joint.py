"""A joint step against a step of each family in a plain loop, all in the precision that `auto` chooses."""

from collections.abc import Callable
from functools import partial
from typing import Any

from eval.speed import clock

CONTESTANTS = {"mtpf": 99, "plain_ner": 99, "plain_tc": 99, "mtpf_ner": 99, "mtpf_tc": 99}


def measure(contestant: str, options: dict) -> dict[str, float]:
    """Train on 32 sentences and 64 pairs a step, several times over the same rows; the last pass counts."""
    from eval.speed.inputs import our_run, read_pairs

    sources = read_pairs(options["pairs"])
    if contestant.startswith("mtpf"):
        regime = {"mtpf": "tpl", "mtpf_ner": "ner", "mtpf_tc": "tc"}[contestant]
        return our_run(options, regime=regime, steps=len(sources))
    return _plain(contestant.removeprefix("plain_"), sources, options)


def _plain(family: str, sources: dict, options: dict) -> dict[str, float]:
    """One family in a loop over padded batches: forward, backward, clipping, fused AdamW."""
    import torch
    from torch import nn
    from transformers import AutoModel

    from eval.speed.inputs import CLUSTERS, PASSES, last_pass
    from modeling_mtpf.data.packaged_encoder import packaged_encoder
    from modeling_mtpf.devices import fast_bf16

    torch.set_num_threads(options["threads"])
    model = AutoModel.from_pretrained(str(packaged_encoder())).train()
    model.pooler = None
    head = nn.Linear(model.config.hidden_size, CLUSTERS)
    parameters = [*model.parameters(), *(head.parameters() if family == "ner" else ())]
    optimizer = torch.optim.AdamW(parameters, lr=5e-5, fused=True)
    loss_of = _ner_loss(model, head, len(sources), options) if family == "ner" else _tc_loss(model, sources)
    marks: list[float] = []
    for step in [*range(len(sources))] * PASSES:
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16(torch.device("cpu"))):
            loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(clock.seconds())
    seconds = last_pass(marks)
    return {"seconds": round(seconds, 3), "seconds_per_step": round(seconds / len(sources), 4)}


def _encoding() -> Callable:
    """Return a function that tokenizes and pads a batch of texts or split sentences."""
    from transformers import AutoTokenizer

    from eval.speed.inputs import MAX_LENGTH
    from modeling_mtpf.data.packaged_encoder import packaged_encoder

    tokenizer: Any = AutoTokenizer.from_pretrained(str(packaged_encoder()))
    return partial(tokenizer, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")


def _ner_loss(model: Any, head: Any, steps: int, options: dict) -> Callable[[int], Any]:
    """Return a function from a step to the cross-entropy of its sentences."""
    import torch

    from eval.speed.inputs import SENTENCES_PER_BATCH, peer_labels, read_sentences

    encode, sentences = _encoding(), read_sentences(options["text"], steps * SENTENCES_PER_BATCH)

    def loss(step: int) -> torch.Tensor:
        words = sentences[step * SENTENCES_PER_BATCH : (step + 1) * SENTENCES_PER_BATCH]
        inputs = encode(words, is_split_into_words=True)
        labels = torch.tensor([peer_labels(inputs.word_ids(row), part) for row, part in enumerate(words)])
        logits = head(model(**inputs)[0])
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    return loss


def _tc_loss(model: Any, sources: dict) -> Callable[[int], Any]:
    """Return a function from a step to the contrastive loss of its source's pairs."""
    import torch

    from modeling_mtpf.model.modeling_mtpf import mean_pool

    encode, batches = _encoding(), list(sources.values())

    def loss(step: int) -> torch.Tensor:
        vectors = []
        for texts in zip(*batches[step], strict=True):
            inputs = encode(list(texts))
            pooled = mean_pool(model(**inputs)[0].float(), inputs["attention_mask"])
            vectors.append(torch.nn.functional.normalize(pooled, dim=-1))
        a, p = vectors
        return torch.nn.functional.cross_entropy(a @ p.T / 0.05, torch.arange(len(a)))

    return loss


def compare(medians: dict) -> dict[str, tuple[float, str, float]]:
    """A joint step over the sum of the separate ones."""
    key = "seconds_per_step"
    both = medians["plain_ner"][key] + medians["plain_tc"][key]
    ours, every = medians["mtpf"], 50  # the default of diagnostics_every
    separate = medians["mtpf_ner"][key] + medians["mtpf_tc"][key]
    return {
        "a joint step over the sum of separate steps": (ours[key] / both, "<=", 0.85),
        "a joint step over our own separate steps": (ours[key] / separate, "<=", 1.0),
        "diagnostics over all steps": (ours["seconds_diagnostics"] / every / ours[key], "<=", 0.03),
    }
