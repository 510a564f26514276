"""Prediction with several apps at once: windows, one trunk pass per batch, word labels, character spans."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer

from .adapters_mtpf import AdapterError
from .configuration_mtpf import max_tokens

WINDOW_OVERLAP = 0.25
"""Share of a window that the next one repeats, so that no word is seen only at a border."""


@dataclass
class _Window:
    """One tokenized piece of a text."""

    text: int  # index of the text
    row: int  # index of the piece in the tokenizer's output
    length: int  # sub-words, special tokens included


class Predictor:
    """Applies loaded apps to texts.

    Args:
        model: An `MtpfModel` with apps loaded.
        tokenizer: A fast tokenizer; by default the one beside the backbone's weights.
        token: Hub token, to read that one from a private repo.
    """

    def __init__(self, model: Any, tokenizer: Any = None, token: str | None = None):
        self.model = model
        self.tokenizer = tokenizer or load_tokenizer(model, token)

    def predict(self, texts: str | list[str], adapters: list[str], batch_size: int = 32) -> dict[str, list]:
        """Return one result per text for each adapter; see `MtpfModel.predict`."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        for position, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"Text {position} is {type(text).__name__}, not a string.")
        heads = {name: self._head(name) for name in adapters}
        results: dict[str, list] = {name: [] for name in adapters}
        if not texts or not adapters:
            return results
        limits = [head.max_length for head in heads.values()] + [max_tokens(self.model.config.encoder_config)]
        encoding, windows = self._tokenize(texts, min(limits))
        logits = self._logits(encoding, windows, heads, batch_size)
        for name, head in heads.items():
            by_text = defaultdict(list)
            for window, scores in zip(windows, logits[name], strict=True):
                by_text[window.text].append((window, scores))
            for position, text in enumerate(texts):
                if head.kind == "text-classification":
                    results[name].append(_text_label(by_text[position], head.labels))
                else:
                    results[name].append(_entities(by_text[position], encoding, text, head.labels))
        return results

    def _head(self, name: str) -> Any:
        self.model.adapter_depth(name)  # raises for an unknown adapter
        if name not in self.model.heads:
            raise AdapterError(
                f"Adapter {name!r} has no head: it is a family's LoRA, not an app; fit an app on it."
            )
        return self.model.heads[name]

    def _tokenize(self, texts: list[str], max_length: int) -> tuple[Any, list[_Window]]:
        encoding = self.tokenizer(
            texts,
            truncation=True,
            max_length=max_length,
            stride=int(max_length * WINDOW_OVERLAP),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        owners = encoding["overflow_to_sample_mapping"]
        return encoding, [_Window(t, row, len(encoding["input_ids"][row])) for row, t in enumerate(owners)]

    @torch.inference_mode()
    def _logits(self, encoding, windows: list[_Window], heads: dict, batch_size: int) -> dict[str, list]:
        """Run windows sorted by length: ``(tokens, labels)`` for each of a token app, else ``(labels,)``."""
        order = sorted(range(len(windows)), key=lambda i: windows[i].length)
        logits: dict[str, list] = {name: [None] * len(windows) for name in heads}
        keys = [key for key in self.tokenizer.model_input_names if key in encoding]
        training = [module for module in self.model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            for start in range(0, len(order), batch_size):
                chunk = order[start : start + batch_size]
                rows = [{key: encoding[key][windows[i].row] for key in keys} for i in chunk]
                batch = self.tokenizer.pad(rows, return_tensors="pt").to(self.model.device)
                states = self.model.encode_adapters(list(heads), **batch)
                for name, head in heads.items():
                    for row, i in enumerate(chunk):
                        tokens = states[name][row, : windows[i].length].to(head.weight.dtype)
                        if head.kind == "text-classification":
                            tokens = tokens.mean(0)
                        logits[name][i] = head(tokens).float().cpu()
        finally:
            for module in training:
                module.training = True
        return logits


def load_tokenizer(model: Any, token: str | None = None) -> Any:
    """Load the tokenizer from where the backbone came from, at the same revision and without remote code.

    It is kept with the model; the token is not.

    Raises:
        ValueError: Nobody knows where the backbone came from, or the tokenizer there cannot be read.
    """
    if "_mtpf_tokenizer" not in model.__dict__:
        source = model.config.name_or_path
        if not source:
            raise ValueError("The model was not loaded from a folder or repo; pass tokenizer=... to predict.")
        revision = getattr(model.config, "source_revision", None) or "main"
        try:
            model.__dict__["_mtpf_tokenizer"] = AutoTokenizer.from_pretrained(
                source, revision=revision, use_fast=True, trust_remote_code=False, token=token
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The tokenizer of {source} cannot be read; pass tokenizer=..., or for a private repo "
                f"token=..., to predict. {error}"
            ) from error
    return model.__dict__["_mtpf_tokenizer"]


def _text_label(pieces: list, labels: list[str]) -> dict[str, Any]:
    """Average the probabilities of a text's windows, weighted by their length."""
    weights = torch.tensor([window.length for window, _ in pieces], dtype=torch.float32)
    probabilities = torch.stack([scores.softmax(-1) for _, scores in pieces])
    mean = (probabilities * weights[:, None]).sum(0) / weights.sum()
    best = int(mean.argmax())
    return {"label": labels[best], "score": float(mean[best])}


def _entities(pieces: list, encoding: Any, text: str, labels: list[str]) -> list[dict[str, Any]]:
    """Label each word in the window that shows most of its surroundings, then join IOB2 spans."""
    # A window may begin or end inside a word: its borders come from all windows together, its label from a
    # window that has its first sub-word.
    borders: dict[int, tuple[int, int]] = {}
    seen: dict[int, list[tuple[int, int, torch.Tensor]]] = defaultdict(list)
    for window, scores in pieces:
        ids = encoding.word_ids(window.row)
        for token, word in enumerate(ids):
            if word is None:
                continue
            start, end = encoding["offset_mapping"][window.row][token]
            first, last = borders.get(word, (start, end))
            borders[word] = (min(first, start), max(last, end))
            if token == 0 or ids[token - 1] != word:
                seen[word].append((start, min(token, len(ids) - 1 - token), scores[token]))
    words = []
    for word, (first, last) in borders.items():
        whole = [entry for entry in seen[word] if entry[0] == first] or seen[word]
        if first < last:
            words.append((first, last, max(whole, key=lambda entry: entry[1])[2].softmax(-1)))
    spans: list[dict[str, Any]] = []
    for start, end, probabilities in sorted(words, key=lambda item: item[:2]):
        best = int(probabilities.argmax())
        prefix, _, group = labels[best].partition("-")
        if prefix not in ("B", "I"):
            spans.append({"entity_group": None})
            continue
        previous: dict[str, Any] = spans[-1] if spans else {"entity_group": None}
        if prefix == "I" and previous["entity_group"] == group:
            previous["end"] = end
            previous["scores"].append(float(probabilities[best]))
        else:
            spans.append(
                {"entity_group": group, "start": start, "end": end, "scores": [float(probabilities[best])]}
            )
    return [
        {
            "entity_group": span["entity_group"],
            "score": sum(span["scores"]) / len(span["scores"]),
            "word": text[span["start"] : span["end"]],
            "start": span["start"],
            "end": span["end"],
        }
        for span in spans
        if span["entity_group"] is not None
    ]


__all__ = ["Predictor", "load_tokenizer"]
