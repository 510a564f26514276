"""Which backbone is in memory, and whether it is the one an adapter names.

Its identity is the hash of its weights, those settings of its config that change what it computes, and its
tokenizer. Adapters of older versions recorded the weights alone.
"""

import functools
import hashlib
import json
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from transformers import AutoConfig

from .errors_mtpf import AdapterError, MtpfError
from .gate_mtpf import shortened
from .hub_cache_mtpf import sha256_of
from .trunk_mtpf import Encoder, is_lora_layer, uncompiled

_SAME_RESULTS = re.compile(
    r"_.*|.*(dropout|_implementation|_token_id)|.*dropout_prob|(classifier|summary|sparse|initializer)_.*|"
    "architectures|auto_map|(torch_)?dtype|finetuning_task|id2label|label2id|num_labels|problem_type|"
    "transformers_version|output_.*|return_dict|use_cache|gradient_checkpointing|tie_word_embeddings|"
    "decoder_bias|deterministic_flash_attn|torchscript|mtpf"
)
"""Settings of an encoder that do not change its hidden states in evaluation."""

MAX_WEIGHT = 1e9
"""Far beyond any trained weight; products of larger ones are not finite in float32."""

_KNOWN: "weakref.WeakKeyDictionary[nn.Module, tuple[tuple, set[str]]]" = weakref.WeakKeyDictionary()
"""For each encoder the digests of its weights and the hashes that match them."""


def backbone_state_dict(encoder: Encoder) -> dict[str, torch.Tensor]:
    """Return the encoder's own weights under their stock names, whatever adapters are injected."""
    return dict(_stock_tensors(encoder, ""))


def _stock_tensors(module: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    # Not state_dict(): that visits every adapter, of which there may be hundreds.
    module = uncompiled(module)
    if is_lora_layer(module):
        module = module.get_base_layer()
    for name, value in [*module._parameters.items(), *module._buffers.items()]:
        if value is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, value.detach()
    for name, child in module._modules.items():
        if child is not None:
            yield from _stock_tensors(child, f"{prefix}{name}.")


def check_in_memory(encoder: Encoder) -> None:
    """Raise `MtpfError` for an encoder whose weights accelerate has offloaded."""
    if any(tensor.is_meta for tensor in backbone_state_dict(encoder).values()) and any(
        "_hf_hook" in module.__dict__ for module in encoder.modules()
    ):
        raise MtpfError(
            "Weights of the backbone are offloaded: they can be neither compared with an adapter's backbone "
            "nor saved. Load the backbone with a device_map without 'disk', or without device_map."
        )


def backbone_sha256(encoder: Encoder) -> str:
    """Return the sha256 of the ``model.safetensors`` that ``save_pretrained`` writes for this encoder.

    safetensors orders tensors by dtype and name, so equal weights give equal bytes; for a backbone in one
    file this is the hash that ``sha256sum`` and the Hub show. Takes about 0.1 s for 22M parameters.
    """
    return _tensors_sha256(backbone_state_dict(encoder))


def _tensors_sha256(tensors: dict[str, torch.Tensor]) -> str:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return hashlib.sha256(save(plain, metadata={"format": "pt"})).hexdigest()


def check_identity(folder: Path, encoder: Encoder, trained_on: dict[str, Any], source: Path | None) -> None:
    """Compare the weights in memory with those the adapter was trained on.

    Where the weights came from a file with the recorded hash, they are compared with that file: this takes a
    fraction of hashing them and also works for an encoder loaded in another dtype. The result is remembered
    together with sums over all rows of the weights, which take a fraction of either. Version counters would
    not do: a fused optimizer does not raise them.

    Raises:
        AdapterError: The weights differ.
    """
    expected = trained_on.get("sha256")
    if not expected:
        return
    digests = _weights_digests(encoder)
    known = _KNOWN.get(encoder)
    if known is not None and known[0] == digests and expected in known[1]:
        return
    if source is None or not _is_loaded_from(source, encoder, expected):
        dtype = str(encoder.dtype).removeprefix("torch.")
        actual = backbone_sha256(encoder) if trained_on.get("dtype") == dtype else None
        if actual != expected:
            raise AdapterError(_other_backbone(folder, trained_on, actual, dtype))
    hashes = known[1] if known is not None and known[0] == digests else set()
    _KNOWN[encoder] = digests, hashes | {expected}


def settings_of(encoder: Encoder) -> dict[str, Any]:
    """Return the settings of an encoder's config that change what it computes, as JSON."""
    values, defaults = encoder.config.to_dict(), _defaults(encoder.config.model_type)
    names = [name for name in values if not _SAME_RESULTS.fullmatch(name)]
    if encoder.config.model_type in ("roberta", "xlm-roberta"):  # they count positions from it
        names.append("pad_token_id")
    # Without defaults, and of what transformers does not know without what is off: versions differ in both.
    changed = {n: values[n] for n in names if (values[n] != defaults[n] if n in defaults else values[n])}
    return json.loads(json.dumps({**changed, "model_type": encoder.config.model_type}, default=str))


@functools.lru_cache(maxsize=8)
def _defaults(model_type: str) -> dict[str, Any]:
    return AutoConfig.for_model(model_type).to_dict()


def changed_setting(encoder: Encoder, recorded: dict[str, Any]) -> str | None:
    """Say which setting of an encoder differs from those that `settings_of` returned once, if any does."""
    present, defaults = settings_of(encoder), _defaults(encoder.config.model_type)
    for name in sorted(recorded.keys() | present.keys()):
        before, now = (values.get(name, defaults.get(name)) for values in (recorded, present))
        if before != now:
            return f"{name!r} in its config.json was {shortened(before)} and is {shortened(now)} here"
    return None


def check_settings(folder: Path, encoder: Encoder, trained_on: dict[str, Any]) -> None:
    """Raise `AdapterError` if a setting that changes results is not what the adapter was trained with."""
    recorded = trained_on.get("config")  # older versions recorded none
    if recorded is not None and (change := changed_setting(encoder, recorded)):
        raise AdapterError(
            f"Adapter {folder} was trained on another backbone: {change}; load "
            f"{trained_on.get('id') or 'the backbone it was trained on'}."
        )


def check_finite(path: Path, tensors: dict[str, torch.Tensor], error: type[MtpfError] = AdapterError) -> None:
    """Raise ``error`` for a tensor with NaN, infinite or huge numbers."""
    for key, value in tensors.items():
        if not value.is_floating_point() or not value.numel():
            continue
        low, high = value.detach().aminmax()  # it passes NaN on
        if not (low >= -MAX_WEIGHT and high <= MAX_WEIGHT):
            raise error(
                f"{path} is damaged: {key!r} holds numbers that are not finite or beyond {MAX_WEIGHT:g}; "
                "fetch it again."
            )


def _other_backbone(folder: Path, trained_on: dict[str, Any], actual: str | None, dtype: str) -> str:
    wanted = trained_on.get("id") or "the backbone it was trained on"
    wanted += f" at revision {trained_on['revision']}" if trained_on.get("revision") else ""
    loaded = f"loaded {actual[:12]}…" if actual else f"loaded in {dtype} from something else"
    return (
        f"Adapter {folder} was trained on another backbone (weights sha256 "
        f"{str(trained_on['sha256'])[:12]}…, {loaded}); load {wanted}."
    )


def _weights_digests(encoder: Encoder) -> tuple:
    """Digest every weight by its rows' sums; with one on the meta device the result equals no other."""
    weights = backbone_state_dict(encoder)
    if any(value.device.type == "meta" for value in weights.values()):
        return (object(),)
    return tuple((name, value.shape, value.dtype, bits_digest(value)) for name, value in weights.items())


def _is_loaded_from(source: Path, encoder: Encoder, sha256: str) -> bool:
    """Return whether a weights file has this hash and the encoder holds its tensors, in any dtype."""
    weights = backbone_state_dict(encoder)
    try:
        state = source.stat()
        same = _known_sha256(source, state.st_mtime_ns, state.st_size, state.st_ino) == sha256
        stored = load_file(source)  # maps the file: nothing is read twice
    except (OSError, SafetensorError):
        return False
    if not weights.keys() <= stored.keys():
        return False
    stored = {name: stored[name] for name in weights}
    # The file of a stock encoder may have other bytes than what save_pretrained writes of it.
    return (same or _tensors_sha256(stored) == sha256) and all(
        value.device.type != "meta" and torch.equal(value.cpu(), stored[key].to(value.dtype))
        for key, value in weights.items()
    )


def bits_digest(tensor: torch.Tensor) -> bytes:
    """Digest a tensor by the sums of its rows' bytes, read as integers of up to 64 bits, modulo 2^64.

    As fast as reading the memory. A change of one element changes the digest, and so does exchanging rows;
    exchanging numbers within a row does not.
    """
    flat = tensor.detach().contiguous().view(-1)
    size, offset = flat.element_size(), flat.storage_offset()
    wide = size < 8 and size * flat.numel() % 8 == 0 and size * offset % 8 == 0
    widths = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    numbers = flat.view(torch.int64 if wide else widths[size])
    rows = tensor.shape[0] if tensor.dim() > 1 and numbers.numel() % max(1, tensor.shape[0]) == 0 else 1
    numbers = numbers.reshape(max(1, rows), -1)
    if numbers.device.type != "cpu":
        return hashlib.sha256(numbers.sum(1, dtype=torch.int64).cpu().numpy().tobytes()).digest()
    # NumPy's sum takes one core and the time of reading; two threads of torch would wait for each other, a
    # hundred times over, on a machine that has other work.
    return hashlib.sha256(numbers.numpy().sum(1, dtype="int64").tobytes()).digest()


@functools.lru_cache(maxsize=8)
def _known_sha256(path: Path, *_state: int) -> str:
    return sha256_of(path)
