"""Key/value prefixes: learnt slots in front of a text, which all its tokens see in the last layers.

Their keys and values stand before the text's own, after the projections and the rotary embedding, so that
positions do not shift; no mask and no sliding window hides them. A layer has a prefix in a *view* of it
(`trunk_mtpf.with_prefixes`): nothing in the model changes, and apps with and without one run side by side.
"""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface

from .configuration_mtpf import encoder_layout
from .errors_mtpf import AdapterError
from .gate_mtpf import read_header
from .schemas_mtpf import ADAPTER_CONFIG_FILE, PREFIX_TYPE, TASK_FILE

PREFIX_FILE = "prefix.safetensors"
PREFIXES = "_mtpf_prefixes"
"""Attribute of an adapter's config in memory: layer → its `Prefix`."""
STATE = "_mtpf_prefix"
"""Attribute of a view of an attention module: its `Prefix`, and the config of the original module."""
ATTENTION = f"{__name__}.attention"
"""Name of `prefix_attention` in transformers, another one in each copy of this code."""
_KEY = re.compile(r"(.+)\.(\d{1,4})\.prefix_(key|value)")


class Prefix(NamedTuple):
    """Slots in front of a text in one layer.

    Attributes:
        key: ``(heads, length, width of a head)``.
        value: Likewise.
        bias: What is added to the slots' scores ``(length,)``; only while slots are searched.
    """

    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None = None


Prefixes = dict[int, Prefix]
"""By the layer's number, the lowest is 0."""


def prefix_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the attention of a view's original with the prefix in front; see transformers' ``AttentionInterface``.

    Raises:
        AdapterError: It is neither eager nor sdpa, whose masks are tensors of scores.
    """  # noqa: E501
    prefix, config = module.__dict__[STATE]
    if config._attn_implementation not in ("eager", "sdpa"):
        raise AdapterError(
            f"An adapter with a prefix cannot use {config._attn_implementation}; load the backbone with "
            "attn_implementation='sdpa' or 'eager'."
        )
    rows, length = key.shape[0], prefix.key.shape[1]
    key = torch.cat([prefix.key.to(key).expand(rows, -1, -1, -1), key], 2)
    value = torch.cat([prefix.value.to(value).expand(rows, -1, -1, -1), value], 2)
    if attention_mask is not None:
        attention_mask = pad(attention_mask, (length, 0), value=attention_mask.dtype == torch.bool)
    if prefix.bias is not None:
        bias = pad(prefix.bias.to(query), (0, key.shape[2] - length))
        hidden = torch.finfo(bias.dtype).min
        if attention_mask is None:
            attention_mask = bias.expand(1, 1, query.shape[2], -1)
        elif attention_mask.dtype == torch.bool:
            attention_mask = torch.where(attention_mask, bias, hidden)
        else:
            attention_mask = attention_mask + bias
    eager = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
    attend = AttentionInterface().get_interface(config._attn_implementation, eager)
    return attend(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION, prefix_attention)


def prefixes_of(encoder: Any, name: str | None) -> Prefixes:
    """Return the prefixes of a loaded adapter, or none."""
    return getattr(getattr(encoder, "peft_config", {}).get(name), PREFIXES, {})


def prefix_tensors(encoder: Any, prefixes: Prefixes) -> dict[str, torch.Tensor]:
    """Return what is stored, and what an exported tail takes: ``<layer>.prefix_key`` and ``_value``."""
    layers = encoder_layout(encoder.config.model_type).layers
    return {
        f"{layers}.{number}.prefix_{part}": getattr(prefix, part)
        for number, prefix in sorted(prefixes.items())
        for part in ("key", "value")
    }


def as_prefixes(tensors: Mapping[str, torch.Tensor]) -> Prefixes:
    """Return the prefixes of the tensors that `check_prefix` accepts."""
    stems = {key.rpartition("_")[0] for key in tensors}
    return {
        int(stem.split(".")[-2]): Prefix(tensors[f"{stem}_key"], tensors[f"{stem}_value"]) for stem in stems
    }


def check_prefix(
    folder: Path, config: Mapping[str, Any], task: Mapping[str, Any], encoder: Any = None
) -> bool:
    """Say whether an adapter folder has a prefix, after comparing its files with each other.

    Args:
        folder: An adapter's.
        config: Its ``adapter_config.json``.
        task: Its ``task.json``.
        encoder: What it has to fit, where it is known.

    Raises:
        AdapterError: The prefix is missing, damaged, or of another backbone.
    """
    path, length = folder / PREFIX_FILE, (task.get("prefix") or {}).get("length")
    if (config.get("peft_type") == PREFIX_TYPE, path.exists()) != (length is not None,) * 2:
        raise AdapterError(
            f"{folder} is damaged: {ADAPTER_CONFIG_FILE}, {TASK_FILE} and {PREFIX_FILE} disagree about "
            "whether it has a prefix; fetch it again."
        )
    if length is None:
        return False
    shapes = {key: tensor.shape for key, tensor in read_header(path, AdapterError).tensors.items()}
    for key, shape in shapes.items():
        match = _KEY.fullmatch(key)
        other = f"{key.rpartition('_')[0]}_{'key' if key.endswith('value') else 'value'}"
        right = len(shape) == 3 and shape[1] == length and 0 not in shape
        if match is None or not right or shapes.get(other) != shape:
            raise AdapterError(
                f"{path} is damaged: {key[:80]!r} of shape {list(shape)} is not half of a prefix of {length} "
                "slots; fetch it again."
            )
        if encoder is not None:
            _check_fits(folder, key, match, shape, encoder)
    if not shapes:
        raise AdapterError(f"{path} is damaged: it holds no prefix; fetch it again.")
    return True


def _check_fits(folder: Path, key: str, match: re.Match[str], shape: tuple[int, ...], encoder: Any) -> None:
    heads = encoder.config.num_attention_heads
    expected, layers = (heads, encoder.config.hidden_size // heads), encoder_layout(encoder.config.model_type)
    if match[1] != layers.layers or not int(match[2]) < encoder.config.num_hidden_layers:
        raise AdapterError(
            f"Adapter {folder} does not fit: the backbone has no layer for its tensor {key!r}; load the "
            "backbone it was trained on."
        )
    if shape[::2] != expected:
        raise AdapterError(
            f"Adapter {folder} was trained on another backbone: {key!r} is made for {shape[0]} heads of "
            f"width {shape[2]}, this one has {heads} of {expected[1]}."
        )
