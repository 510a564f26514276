"""The two ONNX graphs of a backbone: a trunk, and one tail whose LoRA and head are inputs, i.e. data.

The tail takes the trunk's hidden states and the attention mask; masks and rotary tables of the tail's layers
are computed again inside it, from the mask alone. So both graphs have the same inputs for every architecture,
and one tail serves every app.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..model.configuration_mtpf import encoder_layout
from ..model.prefix_mtpf import Prefix, Prefixes, prefix_tensors
from ..model.trunk_mtpf import (
    Encoder,
    TrunkOutput,
    encoder_layers,
    run_layers,
    run_trunk,
    shallow_view,
    tail_views,
    with_prefixes,
)

OPSET = 20
"""The first opset with Gelu as one operator; onnxruntime 1.17 and later read it."""
IR_VERSION = 9
"""The file format of that opset; a newer one would only shut out older runtimes."""

TRUNK_FILE, TAIL_FILE = "trunk.onnx", "tail.onnx"


@dataclass(frozen=True)
class TailShape:
    """What the tail holds: N last layers, the modules in each that take LoRA, sorted, and maybe prefixes."""

    layers: int
    targets: tuple[str, ...]
    prefix: bool = False


def tail_modules(encoder: Encoder, shape: TailShape) -> list[str]:
    """Return the stock paths of the modules that take LoRA; inputs are ``<path>.lora_A`` and ``.lora_B``."""
    layout, total = encoder_layout(encoder.config.model_type), len(encoder_layers(encoder))
    return [
        f"{layout.layers}.{index}.{target}"
        for index in range(total - shape.layers, total)
        for target in shape.targets
    ]


def tail_prefixes(encoder: Encoder, shape: TailShape, length: int) -> Prefixes:
    """Return zeros for each layer that takes a prefix; with a length of 0 the prefixes of an app without."""
    total, heads = len(encoder_layers(encoder)), encoder.config.num_attention_heads
    size = heads, length, encoder.config.hidden_size // heads
    layers = range(total - shape.layers, total) if shape.prefix else ()
    return {n: Prefix(torch.zeros(size), torch.zeros(size)) for n in layers}  # each an input of its own


class _Trunk(nn.Module):
    def __init__(self, encoder: Encoder, layers: int):
        super().__init__()
        self.encoder, self.layers = encoder, layers

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return run_trunk(
            self.encoder, self.layers, input_ids=input_ids, attention_mask=attention_mask
        ).hidden_states


class _WithLora(nn.Module):
    """A linear layer plus a LoRA that is an input: ``x W + b + (x A) B``, with the scale inside B."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.pair: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        assert self.pair is not None
        return self.base(inputs) + (inputs @ self.pair[0]) @ self.pair[1]


class _Tail(nn.Module):
    def __init__(self, encoder: Encoder, shape: TailShape):
        super().__init__()
        self.encoder, self.shape = _copy_of_containers(encoder), shape
        self.linears: list[_WithLora] = []  # a plain list: they are children of the encoder already
        for path in tail_modules(encoder, shape):
            parent, _, child = path.rpartition(".")
            holder = self.encoder.get_submodule(parent)
            self.linears.append(_WithLora(holder.get_submodule(child)))
            setattr(holder, child, self.linears[-1])

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        lora: list[tuple[torch.Tensor, torch.Tensor]],
        prefixes: list[tuple[torch.Tensor, torch.Tensor]],
        head: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for linear, pair in zip(self.linears, lora, strict=True):
            linear.pair = pair
        # A trunk of no layers computes the arguments of each layer. The result does not depend on its
        # embeddings, and the exporter drops them; only their width must be right.
        width = self.encoder.get_input_embeddings().weight.shape[1]
        calls = run_trunk(
            self.encoder,
            len(encoder_layers(self.encoder)),
            inputs_embeds=hidden_states[..., :width],
            attention_mask=attention_mask,
        ).calls
        first = len(calls) - self.shape.layers
        layers = tail_views(self.encoder, self.shape.layers, None)
        slots = {number: Prefix(*pair) for number, pair in enumerate(prefixes, first)}
        layers = with_prefixes(self.encoder, layers, slots, first)
        last = run_layers(self.encoder, TrunkOutput(hidden_states, calls[first:]), layers)
        return last, last @ head[0] + head[1]


def _copy_of_containers(module: nn.Module) -> Any:
    """Copy all module objects; parameters stay shared, so that the encoder itself is not changed."""
    view = shallow_view(module)
    view.__dict__["_modules"] = {
        name: None if child is None else _copy_of_containers(child) for name, child in module._modules.items()
    }
    return view


def export_trunk(encoder: Encoder, shape: TailShape, file: Path) -> None:
    """Write the trunk: ``input_ids``, ``attention_mask`` ``(batch, tokens)`` → ``hidden_states``.

    The encoder is in float32 and eval mode, without LoRA.
    """
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    export_graph(
        _Trunk(encoder, shape.layers),
        (torch.full_like(mask, 5), mask),
        ({0: "batch", 1: "tokens"}, {0: "batch", 1: "tokens"}),
        ["input_ids", "attention_mask"],
        ["hidden_states"],
        file,
    )


def export_tail(encoder: Encoder, shape: TailShape, file: Path) -> None:
    """Write the tail.

    Its inputs are ``hidden_states`` ``(batch, tokens, hidden)``, ``attention_mask`` ``(batch, tokens)``,
    for each module that takes LoRA ``<path>.lora_A`` ``(in, rank)`` and ``<path>.lora_B`` ``(rank, out)`` of
    any rank from 1, ``head.weight`` ``(hidden, labels)`` and ``head.bias`` ``(labels,)``, and where the shape
    says so ``<layer>.prefix_key`` and ``.prefix_value`` ``(heads, slots, width)``, slots from 0. Outputs are
    ``last_hidden_state`` ``(batch, tokens, hidden)`` and ``logits`` ``(batch, tokens, labels)``.
    """
    hidden = encoder.config.hidden_size
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    tail = _Tail(encoder, shape)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    shapes: list[tuple[dict, dict]] = []
    names: list[str] = []
    for number, (path, linear) in enumerate(zip(tail_modules(encoder, shape), tail.linears, strict=True)):
        base: Any = linear.base
        pairs.append((torch.zeros(base.in_features, 3), torch.zeros(3, base.out_features)))
        shapes.append(({1: f"rank_{number}"}, {0: f"rank_{number}"}))
        names += [f"{path}.lora_A", f"{path}.lora_B"]
    slots = tail_prefixes(encoder, shape, 3)
    names += prefix_tensors(encoder, slots)
    by_layer = [({1: f"slots_{number}"}, {1: f"slots_{number}"}) for number in slots]
    prefixes = [(slot.key, slot.value) for slot in slots.values()]
    export_graph(
        tail,
        (torch.zeros(2, 7, hidden), mask, pairs, prefixes, (torch.zeros(hidden, 4), torch.zeros(4))),
        (
            {0: "batch", 1: "tokens"},
            {0: "batch", 1: "tokens"},
            shapes,
            by_layer,
            ({1: "labels"}, {0: "labels"}),
        ),
        ["hidden_states", "attention_mask", *names, "head.weight", "head.bias"],
        ["last_hidden_state", "logits"],
        file,
    )


def export_graph(
    module: nn.Module, inputs: tuple, shapes: Any, names: list[str], outputs: list[str], file: Path
) -> None:
    """Write the graph of a module; ``shapes`` names the dimensions of ``inputs`` that may change."""
    import onnx

    with torch.no_grad(), quietly():
        program = torch.onnx.export(
            module.eval(),
            inputs,
            dynamo=True,
            dynamic_shapes=_symbols(shapes),
            input_names=names,
            output_names=outputs,
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    model.ir_version = IR_VERSION
    # The exporter notes the source line of every node, with the paths of this machine.
    for item in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del item.metadata_props[:]
    for initializer in model.graph.initializer:
        del initializer.metadata_props[:]
    del model.metadata_props[:], model.graph.metadata_props[:]
    model.producer_name, model.producer_version = "mtpf", ""
    onnx.checker.check_model(model)
    onnx.save(model, str(file))


def _symbols(shapes: Any) -> Any:
    """Replace names by symbols, the same for the same name."""
    made: dict[str, Any] = {}

    def symbol(name: str) -> Any:
        return made.setdefault(name, torch.export.Dim(name))

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: symbol(name) for key, name in value.items()}
        return type(value)(replaced(item) for item in value)

    return replaced(shapes)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep notes of torch's exporter, and onnxruntime's advice on the root logger, from the terminal."""
    loggers = [logging.getLogger(name) for name in (None, "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
