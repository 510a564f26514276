"""Lay out a step's rows of any length as tensors of few shapes.

Each family's rows are sorted and cut into segments of similar length, with little padding; segments of the
same length are joined to chunks, so that the trunk runs once over several families. On CPUs in bf16 oneDNN
compiles kernels for every new shape, so shapes come from a small set there.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..data.batches import CPU_PADDING, close_batches
from ..data.encoding import padded
from ..data.words import IGNORE
from .families.base import FamilyBatch


@dataclass(frozen=True)
class ChunkShape:
    """Which shapes chunks may have.

    Attributes:
        tokens: Largest number of tokens, padding included, in a chunk (a single row may have more).
        length_multiple: Rows are padded to a multiple of this, but not beyond ``max_length``.
        row_tokens: The rows of a segment times their length are a multiple of about this; 0 for any number
            of rows.
        max_length: Longest row that the encoder reads.
        padding: Above 0, lengths are not rounded to multiples: rows of all families, longest first, are
            padded to the same length until padding takes this many tokens.
    """

    tokens: int = 4096
    length_multiple: int = 16
    row_tokens: int = 512
    max_length: int = 512
    padding: int = 0

    def padded(self, lengths: np.ndarray) -> np.ndarray:
        """Return the padded lengths of all rows of a step, int64 ``(rows,)``."""
        if self.padding:
            padded = np.empty_like(lengths)
            for rows, (_, length) in close_batches(lengths, self.tokens, self.padding):
                padded[rows] = length
            return padded
        multiples = -(-lengths // self.length_multiple) * self.length_multiple
        return np.maximum(lengths, np.minimum(multiples, self.max_length))

    def rows(self, wanted: int, length: int) -> int:
        """Return how many rows of a length make a segment, of ``wanted`` that are left."""
        quantum = max(1, self.row_tokens // length)
        most = max(quantum, self.tokens // length // quantum * quantum)
        return min(-(-wanted // quantum) * quantum, most)


def chunk_shape(
    device: torch.device, max_length: int, tokens: int = 0, few_shapes: bool = True
) -> ChunkShape:
    """Return the shapes that suit a device; ``tokens`` 0 is its default chunk.

    On CPUs, ``few_shapes`` says whether a new shape costs more than padding, see `devices.wants_few_shapes`.
    """
    if device.type != "cpu":
        return ChunkShape(tokens or 65536, 32, 0, max_length)
    if few_shapes:
        return ChunkShape(tokens or 4096, 16, min(512, tokens or 512), max_length)
    return ChunkShape(tokens or 4096, 1, 0, max_length, CPU_PADDING)


@dataclass
class Chunk:
    """Rows that go through the trunk together.

    Attributes:
        inputs: ``input_ids`` and ``attention_mask``, int64 ``(rows, tokens)``.
        spans: Family → its first row and the one after its last.
        num_rows: Family → how many rows of its span are real; filling follows them.
        labels: Family → labels of its span, int64 ``(rows, tokens)``, for families that have any.
    """

    inputs: dict[str, torch.Tensor]
    spans: dict[str, tuple[int, int]]
    num_rows: dict[str, int]
    labels: dict[str, torch.Tensor]


@dataclass
class JointBatch:
    """One batch of every family, ready for the encoder.

    Attributes:
        chunks: The rows, in pieces.
        positions: Family → for each of its rows, its position in the order of the chunks.
        targets: Family → targets of its loss.
        batches: Family → the batch itself, for messages and counts.
    """

    chunks: list[Chunk]
    positions: dict[str, torch.Tensor]
    targets: dict[str, dict[str, torch.Tensor]]
    batches: dict[str, FamilyBatch] = field(default_factory=dict)

    def to(self, device: torch.device) -> "JointBatch":
        """Move all tensors to a device."""
        return _apply(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "JointBatch":
        """Pin all tensors, for copies that do not wait."""
        return _apply(self, lambda tensor: tensor.pin_memory())

    @property
    def num_tokens(self) -> int:
        """Tokens that the encoder computes, padding included."""
        return sum(chunk.inputs["input_ids"].numel() for chunk in self.chunks)

    @property
    def num_real_tokens(self) -> int:
        """Tokens without padding."""
        return sum(len(row) for batch in self.batches.values() for row in batch.rows)


def _apply(value: Any, function) -> Any:
    """Apply a function to every tensor in nested dictionaries, lists and chunks."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _apply(item, function) for key, item in value.items()}
    if isinstance(value, list):
        return [_apply(item, function) for item in value]
    if isinstance(value, (Chunk, JointBatch)):
        parts = {name: part for name, part in vars(value).items() if name != "batches"}
        return replace(value, **_apply(parts, function))
    return value


@dataclass
class _Segment:
    family: str
    rows: np.ndarray
    length: int
    size: int


def _segments(family: str, lengths: np.ndarray, padded: np.ndarray, shape: ChunkShape) -> list[_Segment]:
    """Cut a family's rows, longest first, into segments; shorter rows fill them, only the last has gaps."""
    order = np.argsort(-lengths, kind="stable")
    padded = padded[order]
    segments, start = [], 0
    while start < len(order):
        length = int(padded[start])
        size = shape.rows(int((padded[start:] == length).sum()), length)
        segments.append(_Segment(family, order[start : start + size], length, size))
        start += size
    return segments


def plan_chunks(batches: dict[str, FamilyBatch], shape: ChunkShape, pad_token_id: int) -> JointBatch:
    """Lay out a step's rows: one batch per family, in the order of the families."""
    lengths = [np.array([len(row) for row in batch.rows]) for batch in batches.values()]
    padded_lengths = np.split(shape.padded(np.concatenate(lengths)), np.cumsum([*map(len, lengths)])[:-1])
    parts = zip(batches, lengths, padded_lengths, strict=True)
    segments = [segment for part in parts for segment in _segments(*part, shape)]
    groups: list[list[_Segment]] = []
    for segment in sorted(segments, key=lambda s: -s.length):  # stable: families keep their order
        last = groups[-1] if groups else []
        fits = last and last[0].length == segment.length
        if fits and (sum(s.size for s in last) + segment.size) * segment.length <= shape.tokens:
            last.append(segment)
        else:
            groups.append([segment])
    for group in groups:
        group.sort(key=lambda s: list(batches).index(s.family))
    positions = {}
    for name in batches:
        order = [segment.rows for group in groups for segment in group if segment.family == name]
        positions[name] = torch.from_numpy(np.argsort(np.concatenate(order)))
    chunks = [_make_chunk(group, batches, pad_token_id) for group in groups]
    return JointBatch(chunks, positions, {name: batch.targets for name, batch in batches.items()}, batches)


def _make_chunk(group: list[_Segment], batches: dict[str, FamilyBatch], pad_token_id: int) -> Chunk:
    length = group[0].length
    ids = np.full((sum(segment.size for segment in group), length), pad_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    mask[:, 0] = 1  # filling rows, too: attention over nothing would be NaN
    spans: dict[str, tuple[int, int]] = {}
    num_rows: dict[str, int] = {}
    labels: dict[str, np.ndarray] = {}
    start = 0
    for segment in group:
        batch = batches[segment.family]
        for position, row in enumerate(segment.rows, start=start):
            tokens = batch.rows[row]
            ids[position, : len(tokens)] = tokens
            mask[position, : len(tokens)] = 1
        spans[segment.family] = (start, start + segment.size)
        num_rows[segment.family] = len(segment.rows)
        if batch.labels is not None:
            real = [batch.labels[row] for row in segment.rows]
            filling = [np.empty(0, dtype=np.int64)] * (segment.size - len(real))
            labels[segment.family] = padded(real + filling, length, IGNORE)
        start += segment.size
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    return Chunk(inputs, spans, num_rows, {name: torch.from_numpy(array) for name, array in labels.items()})
