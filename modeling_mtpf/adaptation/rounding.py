"""Round an app to the type in which it is stored."""

import logging
from collections.abc import Iterable

import torch

from .settings import FitSettings

logger = logging.getLogger(__name__)

MAX_ERROR = 1e-3
"""Largest error of a rounded tensor, as the norm of the change over its norm; float16 makes about 2e-4."""


@torch.no_grad()
def round_to_stored(tensors: Iterable[torch.Tensor], settings: FitSettings) -> torch.dtype:
    """Round tensors, in place, to the values in which they will be stored, and return the type.

    It is float16 if the settings ask for it and it holds all tensors well (it ends at 65,504 and is coarse
    near 6e-8), else float32.
    """
    tensors = list(tensors)
    if settings.stored_dtype == "float32":
        return torch.float32
    for value in tensors:
        value = value.float()
        error, norm = (value.half().float() - value).norm(), value.norm()
        if not error <= MAX_ERROR * norm:
            logger.warning("The app is stored in float32: float16 cannot hold its numbers.")
            return torch.float32
    for value in tensors:
        value.copy_(value.half())
    return torch.float16
