"""A joint step against a step of each family in a plain loop, all in the precision that `auto` chooses."""

import time

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
    from transformers import AutoModel, AutoTokenizer

    from eval.speed.inputs import (
        CLUSTERS,
        MAX_LENGTH,
        PASSES,
        SENTENCES_PER_BATCH,
        labels_of,
        last_pass,
        read_sentences,
    )
    from modeling_mtpf.data.packaged_encoder import packaged_encoder
    from modeling_mtpf.model.modeling_mtpf import mean_pool
    from modeling_mtpf.pretraining.setup import fast_bf16

    torch.set_num_threads(options["threads"])
    folder = str(packaged_encoder())
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).train()
    model.pooler = None
    head = nn.Linear(model.config.hidden_size, CLUSTERS)
    parameters = [*model.parameters(), *(head.parameters() if family == "ner" else ())]
    optimizer = torch.optim.AdamW(parameters, lr=5e-5, fused=True)
    sentences = read_sentences(options["text"], len(sources) * SENTENCES_PER_BATCH)

    def encode(texts, split: bool):
        return tokenizer(
            texts,
            is_split_into_words=split,
            truncation=True,
            max_length=MAX_LENGTH,
            padding=True,
            return_tensors="pt",
        )

    def ner_loss(step: int) -> torch.Tensor:
        words = sentences[step * SENTENCES_PER_BATCH : (step + 1) * SENTENCES_PER_BATCH]
        inputs = encode(words, True)
        labels = torch.full(inputs["input_ids"].shape, -100)
        for row, sentence in enumerate(words):
            word_ids, numbers = inputs.word_ids(row), labels_of(sentence)
            for token, word in enumerate(word_ids):
                if word is not None and word != word_ids[token - 1]:
                    labels[row, token] = numbers[word]
        logits = head(model(**inputs)[0])
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    def tc_loss(step: int) -> torch.Tensor:
        rows = list(sources.values())[step]
        vectors = []
        for side in range(2):
            inputs = encode([row[side] for row in rows], False)
            vectors.append(mean_pool(model(**inputs)[0].float(), inputs["attention_mask"]))
        a, p = (nn.functional.normalize(v, dim=-1) for v in vectors)
        return nn.functional.cross_entropy(a @ p.T / 0.05, torch.arange(len(a)))

    marks: list[float] = []
    for step in [*range(len(sources))] * PASSES:
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16(torch.device("cpu"))):
            loss = ner_loss(step) if family == "ner" else tc_loss(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(time.perf_counter())
    seconds = last_pass(marks)
    return {"seconds": round(seconds, 3), "seconds_per_step": round(seconds / len(sources), 4)}


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
