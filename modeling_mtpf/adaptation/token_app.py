"""NER apps: a LoRA that starts from the family's, and a fresh linear head; the backbone stays frozen."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from ..adapters_mtpf import AdapterHead, LoraSettings, copy_lora
from ..data.words import IGNORE, align_labels, encode_words, first_subwords
from ..errors import DataError
from ..modeling_mtpf import MtpfModel
from ..trunk_mtpf import run_tail, run_trunk


@dataclass
class TokenAppSettings:
    """How a NER app is fitted.

    Attributes:
        epochs: Passes over the training data.
        batch_size: Sentences per step.
        learning_rate: Peak learning rate of LoRA and head.
        max_length: Longest sentence in sub-words.
        lora: Shape of the LoRA where it does not start from a family's.
        seed: Seed of the head and of the order.
    """

    epochs: int = 10
    batch_size: int = 16
    learning_rate: float = 2e-3
    max_length: int = 128
    lora: LoraSettings | None = None
    seed: int = 0


def find_labels(tags: list[list[str]]) -> list[str]:
    """Return the labels in order of first appearance.

    Raises:
        DataError: There is no label but ``O``, or a tag is not IOB2.
    """
    labels = list(dict.fromkeys(tag for row in tags for tag in row))
    for label in labels:
        if label != "O" and label[:2] not in ("B-", "I-"):
            raise DataError(f"Tag {label!r} is not IOB2; use O, B-<type> and I-<type>.")
    if not set(labels) - {"O"}:
        raise DataError("The training data has no entity label; check the column ner_tags.")
    return labels if "O" in labels else ["O", *labels]


def fit_token_app(
    model: MtpfModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    tokens: list[list[str]],
    tags: list[list[str]],
    *,
    start_from: str | None = None,
    settings: TokenAppSettings | None = None,
) -> float:
    """Fit a NER app and leave it loaded in the model under ``name``.

    Args:
        model: The backbone; its weights do not change.
        tokenizer: The backbone's tokenizer, made for split words.
        name: Name of the new adapter.
        tokens: Words of each sentence.
        tags: IOB2 tags of each sentence.
        start_from: A loaded adapter whose LoRA the app starts from, usually the family's; or a fresh one.
        settings: Training settings.

    Returns:
        The mean training loss of the last epoch.
    """
    settings = settings or TokenAppSettings()
    for row, (words, own) in enumerate(zip(tokens, tags, strict=True), start=1):
        if len(words) != len(own):
            raise DataError(f"Row {row} has {len(words)} tokens but {len(own)} tags.")
    labels = find_labels(tags)
    ids = [[labels.index(tag) for tag in row] for row in tags]
    torch.manual_seed(settings.seed)
    head = AdapterHead("token-classification", labels, model.config.hidden_size, settings.max_length)
    if start_from is None:
        model.add_adapter(name, settings.lora, head)
    else:
        model.adapter_depth(start_from)  # raises for an unknown adapter
        copy_lora(model.backbone, start_from, name)
        model.heads[name] = head.to(model.device)

    parameters = [p for key, p in model.backbone.named_parameters() if f".{name}." in key]
    parameters += model.heads[name].parameters()
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.01)
    steps = settings.epochs * -(-len(tokens) // settings.batch_size)
    schedule = get_linear_schedule_with_warmup(optimizer, int(0.1 * steps), steps)
    order = np.random.default_rng(settings.seed)
    depth = model.adapter_depth(name)
    model.eval()  # the frozen trunk must not drop anything; LoRA dropout is 0 by default
    losses: list[float] = []
    for _ in range(settings.epochs):
        losses = []
        for rows in np.array_split(order.permutation(len(tokens)), -(-len(tokens) // settings.batch_size)):
            inputs, word_ids = encode_words(tokenizer, [tokens[i] for i in rows], settings.max_length)
            targets, _ = align_labels(word_ids, [ids[i] for i in rows])
            with torch.no_grad():
                trunk = run_trunk(model.backbone, depth, **{k: v.to(model.device) for k, v in inputs.items()})
            hidden = run_tail(model.backbone, trunk, name)
            logits = model.heads[name](hidden).flatten(0, 1)
            loss = nn.functional.cross_entropy(
                logits, targets.to(model.device).flatten(), ignore_index=IGNORE
            )
            # Not backward(): it would fill the gradients of the frozen layers of the tail, too.
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    optimizer.zero_grad()
    model.heads[name].eval()
    return float(np.mean(losses))


@torch.inference_mode()
def tag_words(
    model: MtpfModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    tokens: list[list[str]],
    batch_size: int = 32,
) -> list[list[str]]:
    """Return one tag per word; a word that is cut off gets ``O``, so an entity there counts as missed."""
    head: Any = model.heads[name]
    model.eval()
    tags: list[list[str]] = []
    for start in range(0, len(tokens), batch_size):
        batch = tokens[start : start + batch_size]
        inputs, word_ids = encode_words(tokenizer, batch, head.max_length)
        inputs = {key: value.to(model.device) for key, value in inputs.items()}
        best = head(model.encode_adapters([name], **inputs)[name]).argmax(-1).cpu().numpy()
        first = first_subwords(word_ids)
        for row, words in enumerate(batch):
            own = ["O"] * len(words)
            for column in np.nonzero(first[row])[0]:
                own[word_ids[row, column]] = head.labels[best[row, column]]
            tags.append(own)
    return tags


__all__ = ["TokenAppSettings", "find_labels", "fit_token_app", "tag_words"]
