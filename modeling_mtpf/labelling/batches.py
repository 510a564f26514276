"""Batches of rows of similar length: in a small set of shapes, or with hardly any padding."""

from collections.abc import Iterator, Sequence

import numpy as np

LENGTH_MULTIPLE = 16
"""Rows of few shapes are padded to a multiple of this. bf16 on CPU compiles a kernel for each new shape."""


def padded_length(length: int, limit: int) -> int:
    """Round a length up to a multiple of `LENGTH_MULTIPLE`, but not beyond ``limit``."""
    return min(-(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, limit)


def rows_of_length(length: int, tokens: int) -> int:
    """How many rows of a length make up a batch of about so many tokens; a multiple of 4 where it can be.

    Example:
        >>> rows_of_length(48, tokens=4096)
        84
    """
    rows = max(1, tokens // length)
    return rows // 4 * 4 or rows


def length_sorted_batches(
    lengths: Sequence[int] | np.ndarray, tokens: int, limit: int
) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Yield the rows of each batch, longest first, and the batch's shape ``(rows, padded length)``.

    The shape is a function of the longest row alone, so no more shapes occur than there are padded lengths.
    Only the last batch may have fewer rows than its shape: the caller fills it up.

    Example:
        >>> [(rows.tolist(), shape) for rows, shape in length_sorted_batches([5, 40, 7], 48, limit=128)]
        [([1], (1, 48)), ([2, 0], (3, 16))]
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        length = padded_length(int(lengths[order[start]]), limit)
        rows = rows_of_length(length, tokens)
        yield order[start : start + rows], (rows, length)
        start += rows


def close_batches(
    lengths: Sequence[int] | np.ndarray, tokens: int, padding: int
) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Yield batches like `length_sorted_batches`, of any shape and with hardly any padding.

    Args:
        lengths: Tokens of each row.
        tokens: A batch has at most so many, or one row.
        padding: A batch ends before it would hold more padding. So many tokens should take as long as
            beginning another batch.

    Example:
        >>> [(rows.tolist(), shape) for rows, shape in close_batches([5, 9, 7, 5], 48, padding=2)]
        [([1, 2], (2, 9)), ([0, 3], (2, 5))]
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    ordered = np.asarray(lengths)[order]
    start = 0
    while start < len(order):
        length = int(ordered[start])
        end = start + max(1, tokens // length)
        padded = np.cumsum(length - ordered[start:end])
        end = start + int(np.searchsorted(padded, padding, side="right"))
        yield order[start:end], (end - start, length)
        start = end


__all__ = ["LENGTH_MULTIPLE", "close_batches", "length_sorted_batches", "padded_length", "rows_of_length"]
