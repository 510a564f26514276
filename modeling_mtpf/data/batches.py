"""Batches of rows of similar length: in a small set of shapes, or with hardly any padding."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..devices import wants_few_shapes

LENGTH_MULTIPLE = 16
"""Rows of few shapes are padded to a multiple of this. bf16 on CPU compiles a kernel for each new shape."""

CPU_TOKENS, GPU_TOKENS = 2048, 65536
"""Tokens of a forward pass. On a CPU more are not faster, and their states leave holes in the memory."""

CPU_PADDING = 48
"""Tokens of padding that take a CPU as long as beginning a batch (docs/log.md, 2026-11-26)."""


class RowBatch(NamedTuple):
    """Rows to compute together, padded to ``length`` tokens; only the first ``real`` of them count."""

    rows: np.ndarray
    length: int
    real: int


def row_batches(
    lengths: Sequence[int] | np.ndarray,
    limit: int,
    device: torch.device,
    precision: str = "float32",
    tokens: int = 0,
) -> list[RowBatch]:
    """Cut rows, longest first, into the batches that this device computes fastest.

    For bf16 on CPU the batches have few shapes, else hardly any padding.

    Args:
        lengths: Tokens of each row.
        limit: Longest padded length.
        device: Computes the batches.
        precision: As in `devices.precision`.
        tokens: Approximate number of tokens in a batch; 0 for `CPU_TOKENS` or `GPU_TOKENS`.

    Example:
        >>> [(b.rows.tolist(), b.length) for b in row_batches([3, 20, 4, 5], 64, torch.device("cpu"))]
        [([1, 3, 2, 0], 20)]
    """
    tokens = tokens or (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS)
    if not wants_few_shapes(device, precision):
        padding = CPU_PADDING if device.type == "cpu" else tokens // 16
        return [RowBatch(r, length, len(r)) for r, (_, length) in close_batches(lengths, tokens, padding)]
    batches = []
    for rows, (size, length) in length_sorted_batches(lengths, tokens, limit):
        fill = np.full(size - len(rows), rows[-1])
        batches.append(RowBatch(np.concatenate([rows, fill]), length, len(rows)))
    return batches


def padded_length(length: int, limit: int, multiple: int = LENGTH_MULTIPLE) -> int:
    """Round a length up to a multiple, but not beyond ``limit``."""
    return min(-(-length // multiple) * multiple, limit)


def rows_of_length(length: int, tokens: int) -> int:
    """Return how many rows of a length hold about ``tokens`` tokens; a multiple of 4 if possible."""
    rows = max(1, tokens // length)
    return rows // 4 * 4 or rows


def length_sorted_batches(
    lengths: Sequence[int] | np.ndarray, tokens: int, limit: int
) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Yield the rows of each batch, longest first, and the batch's shape ``(rows, padded length)``.

    The longest row decides the shape, so there are few. Only the last batch may have fewer rows than its
    shape: the caller fills it up.

    Example:
        >>> [(rows.tolist(), shape) for rows, shape in length_sorted_batches([5, 40, 7], 48, limit=128)]
        [([1], (1, 48)), ([2, 0], (3, 16))]
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        length = padded_length(max(1, int(lengths[order[start]])), limit)
        rows = rows_of_length(length, tokens)
        yield order[start : start + rows], (rows, length)
        start += rows


def close_batches(
    lengths: Sequence[int] | np.ndarray, tokens: int, padding: int
) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Yield batches as `length_sorted_batches` does, of any shape, with at most ``padding`` padded tokens.

    A batch of more than one row has at most ``tokens`` tokens.

    Example:
        >>> [(rows.tolist(), shape) for rows, shape in close_batches([5, 9, 7, 5], 48, padding=2)]
        [([1, 2], (2, 9)), ([0, 3], (2, 5))]
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    ordered = np.asarray(lengths)[order]
    start = 0
    while start < len(order):
        length = max(1, int(ordered[start]))
        end = start + max(1, tokens // length)
        padded = np.cumsum(length - ordered[start:end])
        end = start + int(np.searchsorted(padded, padding, side="right"))
        yield order[start:end], (end - start, length)
        start = end
