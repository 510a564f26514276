"""Outputs of the frozen trunk, computed once per row and kept while an app is fitted.

The trunk below the LoRA layers does not change, so neither do its outputs; training then costs only the tail.
"""

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.batches import row_batches
from ..data.encoding import EncodedRows
from ..devices import precision, uses_bf16
from ..model.modeling_mtpf import MtpfModel
from ..model.trunk_mtpf import TrunkOutput, encoder_layers, run_trunk


class TrunkCache:
    """Trunk outputs of tokenized rows.

    Args:
        model: The backbone, in eval mode; its trunk must not change afterwards.
        encoded: The rows.
        depth: Layers above the trunk.
        max_length: Longest padded row in tokens.
        mixed_precision: ``auto``, ``bf16`` or ``float32``; in bf16 the outputs are kept in bf16.
        limit: Bytes to keep; the trunk of further rows is computed at each use.
        progress: Show a progress bar.
    """

    def __init__(
        self,
        model: MtpfModel,
        encoded: EncodedRows,
        depth: int,
        max_length: int,
        mixed_precision: str = "auto",
        limit: float = 2e9,
        progress: bool = False,
    ):
        self.model, self.encoded, self.depth, self.mixed_precision = model, encoded, depth, mixed_precision
        dtype = torch.bfloat16 if uses_bf16(model.device, mixed_precision) else torch.float32
        self._outputs: list[torch.Tensor | None] = [None] * len(encoded)
        lengths = encoded.lengths
        size = model.config.hidden_size * dtype.itemsize
        rows = np.nonzero(np.cumsum(lengths) * size <= limit)[0]
        batches = row_batches(lengths[rows], max_length, model.device, mixed_precision)
        for batch in tqdm(batches, desc="trunk", disable=not progress, leave=False):
            cached = rows[batch.rows]
            hidden = self._compute(cached, batch.length).hidden_states.to(dtype)
            for position, row in enumerate(cached[: batch.real]):
                self._outputs[row] = hidden[position, : lengths[row]].clone()

    @torch.no_grad()
    def _compute(self, rows: np.ndarray, length: int, depth: int | None = None) -> TrunkOutput:
        inputs = self.encoded.inputs(rows, length)
        inputs = {key: value.to(self.model.device) for key, value in inputs.items()}
        with precision(self.model.device, self.mixed_precision):
            return run_trunk(self.model.backbone, depth or self.depth, **inputs)

    def batch(self, rows: np.ndarray, length: int) -> TrunkOutput:
        """Return the trunk's output for some rows, padded to ``length`` tokens; padding holds zeros."""
        outputs = [self._outputs[row] for row in rows]
        if any(value is None for value in outputs):
            return self._compute(rows, length)
        # Masks and position tables of the tail layers come from a trunk of embeddings alone, which is cheap.
        outline = self._compute(rows, length, depth=len(encoder_layers(self.model.backbone)))
        hidden = torch.zeros_like(outline.hidden_states, dtype=torch.float32)
        for position, value in enumerate(outputs):
            hidden[position, : len(value)] = value  # type: ignore[arg-type]
        return TrunkOutput(hidden, outline.calls[-self.depth :])
