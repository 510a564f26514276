"""LoRA as tensors that anything may compute: methods of bundles train through it, and fold into it."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from ...model.adapter_files_mtpf import AdapterFiles, install_adapter
from ...model.adapters_mtpf import AdapterHead, LoraSettings, lora_config, named_heads
from ...model.configuration_mtpf import encoder_layout
from ...model.modeling_mtpf import MtpfModel
from ...model.prefix_mtpf import PREFIXES, Prefixes
from ...model.trunk_mtpf import (
    Encoder,
    TrunkOutput,
    adapter_modules,
    adapter_view,
    encoder_layers,
    run_layers,
    shallow_view,
    with_prefixes,
)


class LowRank(NamedTuple):
    """What is added to a linear module: ``x A^T B^T + bias``; the scale is in ``B``.

    ``down`` is A ``(rank, in)``, ``up`` B ``(out, rank)``, ``bias`` ``(out,)``.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None = None


Matrices = dict[str, LowRank]
"""By the path of the linear module in the stock encoder."""


class _Added(nn.Module):
    def __init__(self, base: nn.Module, added: LowRank):
        super().__init__()
        self.base, self.added = base, added

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + linear(linear(x, self.added.down), self.added.up, self.added.bias)


def run_with(
    encoder: Encoder, trunk: TrunkOutput, matrices: Matrices, prefixes: Prefixes | None = None
) -> torch.Tensor:
    """Run the last layers with a LoRA and maybe a prefix; return hidden states ``(batch, tokens, hidden)``.

    Gradients reach the matrices and the prefix. No loaded adapter acts, and nothing in the encoder changes.
    """
    prefix, layers = encoder_layout(encoder.config.model_type).layers, list(encoder_layers(encoder))
    first = len(layers) - len(trunk.calls)
    views = [
        _with_added(adapter_view(layer, None), f"{prefix}.{number}", matrices)
        for number, layer in enumerate(layers[first:], first)
    ]
    return run_layers(encoder, trunk, with_prefixes(encoder, views, prefixes or {}, first))


def _with_added(module: nn.Module, path: str, matrices: Matrices) -> nn.Module:
    if path in matrices:
        return _Added(module, matrices[path])
    children = {
        name: None if child is None else _with_added(child, f"{path}.{name}", matrices)
        for name, child in module._modules.items()
    }
    if all(children[name] is child for name, child in module._modules.items()):
        return module
    view = shallow_view(module)
    view.__dict__["_modules"] = children
    return view


def depth_of(encoder: Encoder, paths: Iterable[str]) -> int:
    """Return how many of the last layers modules are in."""
    prefix = encoder_layout(encoder.config.model_type).layers + "."
    return len(encoder_layers(encoder)) - min(int(path.removeprefix(prefix).split(".")[0]) for path in paths)


def lora_matrices(encoder: Encoder, name: str) -> Matrices:
    """Return the LoRA of a loaded adapter in float32; B holds its scale."""
    return {
        path: LowRank(
            module.lora_A[name].weight.detach().float(),
            module.lora_B[name].weight.detach().float() * module.scaling[name],
        )
        for path, module in adapter_modules(encoder, name)
    }


def truncated(matrices: Matrices, rank: int) -> Matrices:
    """Return the best approximation of at most a rank, by SVD of the exact product B A; biases stay."""
    return {path: low_rank(down, up, rank)._replace(bias=bias) for path, (down, up, bias) in matrices.items()}


def copied(matrices: Matrices) -> Matrices:
    """Return a copy that shares no memory with what it was computed from."""
    return {
        path: LowRank(down.clone(), up.clone(), None if bias is None else bias.clone())
        for path, (down, up, bias) in matrices.items()
    }


def low_rank(down: torch.Tensor, up: torch.Tensor, rank: int) -> LowRank:
    """Return the best approximation of B A of at most a rank; the singular values are shared by both."""
    if len(down) <= rank:
        return LowRank(down, up)
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T)
    scale = values[:rank].sqrt()
    new_down, new_up = scale[:, None] * (right[:rank] @ q_down.T), q_up @ left[:, :rank] * scale
    return LowRank(new_down.to(down.dtype).contiguous(), new_up.to(up.dtype).contiguous())


def install(
    model: MtpfModel,
    name: str,
    matrices: Matrices,
    heads: AdapterHead | dict[str, AdapterHead],
    prefixes: Prefixes | None = None,
) -> None:
    """Put an app or a bundle into the model: a stock LoRA of scale 1, of the rank that each module needs."""
    encoder: Any = model.backbone
    ranks = {path: len(pair.down) for path, pair in sorted(matrices.items())}
    rank = max(ranks.values())
    config = lora_config(encoder, LoraSettings(rank, rank, depth_of(encoder, ranks)))
    config.target_modules = sorted(ranks)
    if len(set(ranks.values())) > 1:
        config.rank_pattern, config.alpha_pattern = dict(ranks), dict(ranks)
    setattr(config, PREFIXES, prefixes or {})
    lora: dict[str, torch.Tensor] = {}
    for path, pair in matrices.items():
        lora |= {f"{path}.lora_A.weight": pair.down.detach(), f"{path}.lora_B.weight": pair.up.detach()}
    install_adapter(encoder, AdapterFiles(name, config, lora))
    model.heads.update({key: head.eval() for key, head in named_heads(name, heads).items()})
