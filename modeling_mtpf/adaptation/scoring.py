"""What an app predicts for words and texts, and how well."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..data.app_data import Examples
from ..data.batches import row_batches
from ..data.encoding import EncodedRows, encode_rows
from ..data.words import first_subwords
from ..metrics import entity_scores, text_scores
from ..model.modeling_mtpf import MtpfModel
from .text_vectors import embed_texts


@torch.inference_mode()
def score_app(
    model: MtpfModel, tokenizer: PreTrainedTokenizerBase, name: str, examples: Examples
) -> dict[str, Any]:
    """Score an app of the model in float32, on inputs cut at its maximal length."""
    head: Any = model.heads[name]
    if head.kind == "token-classification":
        return entity_scores(examples.labels, tag_words(model, tokenizer, name, examples.inputs))
    vectors = embed_texts(model, tokenizer, examples.inputs, name, max_length=head.max_length)
    logits = head(torch.from_numpy(vectors).to(head.weight.device))
    return score_probabilities(examples, logits.softmax(-1).cpu().numpy(), head.labels)


def score_probabilities(examples: Examples, probabilities: np.ndarray, labels: list[str]) -> dict[str, float]:
    """Score each text's probabilities ``(texts, labels)``; the most probable label is the prediction."""
    predicted = [labels[column] for column in probabilities.argmax(1)]
    return text_scores(examples.labels, predicted, probabilities, labels)


@torch.inference_mode()
def tag_words(
    model: MtpfModel, tokenizer: PreTrainedTokenizerBase, name: str, sentences: list[list[str]]
) -> list[list[str]]:
    """Tag split sentences in float32: one tag per word, fewer where the app's maximal length cut one off."""
    head: Any = model.heads[name]
    model.eval()
    encoded = encode_rows(tokenizer, sentences, head.max_length)

    def outputs() -> Iterable[tuple[np.ndarray, torch.Tensor]]:
        for batch in row_batches(encoded.lengths, head.max_length, model.device):
            inputs = {key: v.to(model.device) for key, v in encoded.inputs(batch.rows, batch.length).items()}
            logits = head(model.encode_adapters([name], **inputs)[name])
            yield batch.rows[: batch.real], logits[: batch.real]

    return read_tags(outputs(), encoded, sentences, head.labels)


def read_tags(
    outputs: Iterable[tuple[np.ndarray, torch.Tensor]],
    encoded: EncodedRows,
    sentences: list[list[str]],
    labels: list[str],
) -> list[list[str]]:
    """Return each sentence's tags from batches of row numbers and logits ``(rows, tokens, labels)``."""
    tags: list[list[str]] = [[] for _ in sentences]
    for rows, logits in outputs:
        for row, best in zip(rows, logits.argmax(-1).cpu().numpy(), strict=True):
            words = len(sentences[row])
            tags[row] = word_tags(best, encoded.word_ids[row], words, encoded.cut[row], labels)
    return tags


def word_tags(best: np.ndarray, word_ids: np.ndarray, words: int, cut: bool, labels: list[str]) -> list[str]:
    """Return the tag of each of the words from its first sub-word, ending where the sentence was cut off.

    ``best`` holds the index of each token's best label, ``word_ids`` its word (-1 for special tokens), both
    ``(tokens,)``. A word that the tokenizer maps to nothing gets ``O``.
    """
    tags = {int(word_ids[i]): labels[best[i]] for i in np.nonzero(first_subwords(word_ids[None])[0])[0]}
    seen = max(tags, default=-1) + 1 if cut else words
    return [tags.get(word, "O") for word in range(seen)]
