"""Outputs of the frozen trunk, computed once per row while an app is fitted: training costs only the tail."""

from dataclasses import replace

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.batches import row_batches
from ..data.encoding import EncodedRows
from ..devices import precision, uses_bf16
from ..model.modeling_mtpf import MtpfModel
from ..model.trunk_mtpf import TrunkOutput, encoder_layers, run_trunk
from .settings import FitSettings


class TrunkCache:
    """Trunk outputs of tokenized rows.

    Args:
        model: The backbone, in eval mode; its trunk must not change afterwards.
        encoded: The rows.
        depth: Layers above the trunk.
        settings: In bf16 the cache is bf16, too; rows beyond ``cache_gb`` are computed at each use.
    """

    trained = False

    def __init__(self, model: MtpfModel, encoded: EncodedRows, depth: int, settings: FitSettings):
        self.model, self.encoded, self.depth = model, encoded, depth
        self.mixed_precision = settings.mixed_precision
        dtype = torch.bfloat16 if uses_bf16(model.device, self.mixed_precision) else torch.float32
        self._outputs: list[torch.Tensor | None] = [None] * len(encoded)
        lengths = encoded.lengths
        size = model.config.hidden_size * dtype.itemsize
        rows = np.nonzero(np.cumsum(lengths) * size <= settings.cache_gb * 1e9)[0]
        batches = row_batches(lengths[rows], settings.max_length, model.device, self.mixed_precision)
        for batch in tqdm(batches, desc="trunk", disable=not settings.progress, leave=False):
            cached = rows[batch.rows]
            hidden = self._compute(cached, batch.length).hidden_states.to(dtype)
            for position, row in enumerate(cached[: batch.real]):
                self._outputs[row] = hidden[position, : lengths[row]].clone()

    def _compute(self, rows: np.ndarray, length: int, depth: int | None = None) -> TrunkOutput:
        inputs = {key: v.to(self.model.device) for key, v in self.encoded.inputs(rows, length).items()}
        gradients = torch.set_grad_enabled(self.trained and torch.is_grad_enabled())
        with gradients, precision(self.model.device, self.mixed_precision):
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


class TrainedTrunk(TrunkCache):
    """The same for a trunk that is trained: computed at each use, with gradients."""

    trained = True

    def __init__(self, model: MtpfModel, encoded: EncodedRows, depth: int, settings: FitSettings):
        super().__init__(model, encoded, depth, replace(settings, cache_gb=0.0))
