"""Mean-pooled vectors of texts."""

from collections.abc import Sequence

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.batches import row_batches
from ..data.encoding import encode_rows
from ..devices import precision
from ..model.modeling_mtpf import MtpfModel, mean_pool


@torch.inference_mode()
def embed_texts(
    model: MtpfModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    adapter: str | None,
    *,
    max_length: int = 128,
    mixed_precision: str = "float32",
    progress: bool = False,
) -> np.ndarray:
    """Return mean-pooled text vectors, float32 ``(texts, hidden)``.

    Puts the model into eval mode, and cuts texts at ``max_length`` tokens. ``adapter`` names a loaded one, or
    is ``None`` for the bare backbone; for ``mixed_precision`` see `devices.precision`.
    """
    model.eval()
    vectors = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    encoded = encode_rows(tokenizer, texts, max_length)
    batches = row_batches(encoded.lengths, max_length, model.device, mixed_precision)
    with precision(model.device, mixed_precision):
        for batch in tqdm(batches, desc="embed", disable=not progress or len(batches) < 50):
            inputs = {key: v.to(model.device) for key, v in encoded.inputs(batch.rows, batch.length).items()}
            hidden = model.encode_adapters([adapter], **inputs)[adapter]
            pooled = mean_pool(hidden.float(), inputs["attention_mask"]).float().cpu().numpy()
            vectors[batch.rows[: batch.real]] = pooled[: batch.real]
    return vectors
