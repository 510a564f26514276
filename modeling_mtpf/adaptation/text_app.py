"""TC apps: logistic regression on the mean-pooled vectors of the frozen backbone with the family's LoRA."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from transformers import PreTrainedTokenizerBase

from ..adapters_mtpf import AdapterHead, copy_lora
from ..data.words import encode_texts
from ..errors import DataError
from ..modeling_mtpf import MtpfModel, mean_pool


@torch.inference_mode()
def embed_texts(
    model: MtpfModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    adapter: str | None,
    *,
    max_length: int = 128,
    batch_size: int = 64,
) -> np.ndarray:
    """Return mean-pooled text vectors, float32 ``(texts, hidden)``, computed in order of length."""
    model.eval()
    vectors = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    order = np.argsort([len(text) for text in texts], kind="stable")
    for start in range(0, len(texts), batch_size):
        rows = order[start : start + batch_size]
        inputs = encode_texts(tokenizer, [texts[i] for i in rows], max_length)
        inputs = {key: value.to(model.device) for key, value in inputs.items()}
        hidden = model.encode_adapters([adapter], **inputs)[adapter]
        vectors[rows] = mean_pool(hidden.float(), inputs["attention_mask"]).cpu().numpy()
    return vectors


def fit_text_app(
    model: MtpfModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    texts: list[str],
    labels: list[str],
    *,
    start_from: str,
    max_length: int = 128,
) -> None:
    """Fit a linear probe and leave the app loaded in the model under ``name``.

    Args:
        model: The backbone; its weights do not change.
        tokenizer: The backbone's tokenizer.
        name: Name of the new adapter.
        texts: Training texts.
        labels: Their labels.
        start_from: A loaded adapter whose LoRA the app uses as it is, usually the family's.
        max_length: Longest text in sub-words.

    Raises:
        DataError: Fewer than two labels.
    """
    names = list(dict.fromkeys(labels))
    if len(names) < 2:
        raise DataError(f"A text app needs at least two labels; the training data has {names}.")
    model.adapter_depth(start_from)  # raises for an unknown adapter
    vectors = embed_texts(model, tokenizer, texts, start_from, max_length=max_length)
    targets = np.array([names.index(label) for label in labels])
    probe = LogisticRegression(max_iter=1000).fit(vectors, targets)
    head = AdapterHead("text-classification", names, model.config.hidden_size, max_length)
    with torch.no_grad():
        weight, bias = torch.from_numpy(probe.coef_), torch.from_numpy(probe.intercept_)
        if len(names) == 2:  # scikit-learn keeps one row, the log-odds of the second class
            weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    copy_lora(model.backbone, start_from, name)
    model.heads[name] = head.to(model.device).eval()


__all__ = ["embed_texts", "fit_text_app"]
