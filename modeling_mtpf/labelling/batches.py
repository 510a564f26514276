"""Batches of rows of similar length, in a bounded set of shapes."""

from collections.abc import Iterator, Sequence

import numpy as np

LENGTH_MULTIPLE = 16
"""Rows are padded to a multiple of this where each new shape costs a compiled kernel: bf16 on CPU."""


def padded_length(length: int, limit: int, multiple: int = LENGTH_MULTIPLE) -> int:
    """Round a length up to a multiple, but not beyond ``limit``."""
    return min(-(-length // multiple) * multiple, limit)


def rows_of_length(length: int, tokens: int) -> int:
    """How many rows of a length make up a batch of about so many tokens; a multiple of 4 where it can be.

    Example:
        >>> rows_of_length(48, tokens=4096)
        84
    """
    rows = max(1, tokens // length)
    return rows // 4 * 4 or rows


def length_sorted_batches(
    lengths: Sequence[int] | np.ndarray, tokens: int, limit: int, multiple: int = LENGTH_MULTIPLE
) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Yield the rows of each batch, longest first, and the batch's shape ``(rows, padded length)``.

    The shape is a function of the longest row alone, so no more shapes occur than there are padded lengths.
    Only the last batch may have fewer rows than its shape: the caller fills it up where that matters.

    Example:
        >>> [(rows.tolist(), shape) for rows, shape in length_sorted_batches([5, 40, 7], 48, limit=128)]
        [([1], (1, 48)), ([2, 0], (3, 16))]
        >>> [shape for _, shape in length_sorted_batches([5, 40, 7], 48, limit=128, multiple=1)]
        [(1, 40), (4, 7)]
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        length = padded_length(int(lengths[order[start]]), limit, multiple)
        rows = rows_of_length(length, tokens)
        yield order[start : start + rows], (rows, length)
        start += rows


__all__ = ["LENGTH_MULTIPLE", "length_sorted_batches", "padded_length", "rows_of_length"]
