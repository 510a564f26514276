"""Int8 graphs: 8-bit weights and tables, and activations that are rounded to 8 bits while the graph runs.

The choices were measured (docs/log.md, 2026-11-28). Each token has a scale of its own, so that a text's
result does not depend on the texts next to it, and one large value does not take the precision from all
others. Weights are signed, which processors with 8-bit dot products multiply fastest, and use 7 of the 8
bits, since on other processors sums of two products overflow 16 bits. Rows of the embedding tables have a
scale each.
"""

from pathlib import Path
from typing import Any

import numpy as np

from .graphs import IR_VERSION, TAIL_FILE, TRUNK_FILE

SMALLEST_TABLE = 65_536
"""Tables with fewer values stay in float32: they hardly count in the file's size."""
WEIGHT_LIMIT, ACTIVATION_LIMIT, ZERO = 63, 127, 128
"""Largest rounded weight and activation, and what stands for an activation of zero."""


def quantize_export(folder: Path) -> dict[str, str]:
    """Replace both graphs of an export by int8 ones; return what was done, for the manifest."""
    for name in (TRUNK_FILE, TAIL_FILE):
        quantize_products(folder / name)
        quantize_tables(folder / name)
    return {
        "activations": "uint8, a scale for each token",
        "weights": "int8 of 7 bits, a scale for each column",
        "tables": "int8, a scale for each row",
    }


def quantize_products(file: Path) -> None:
    """Multiply by constant matrices in 8 bits, in place; attention and LoRA stay in float32.

    onnxruntime's quantizer has one scale for all activations of a batch.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(file)
    tables = {table.name: table for table in model.graph.initializer}
    nodes: list[Any] = []
    rounded: set[str] = set()

    def constant(name: str, array: Any) -> None:
        tables[name] = numpy_helper.from_array(np.asarray(array), name)

    def add(operator: str, inputs: list[str], output: str, **options: Any) -> None:
        nodes.append(helper.make_node(operator, inputs, [output], **options))

    constant("int8.step", np.float32(1 / ACTIVATION_LIMIT))
    constant("int8.zero", np.uint8(ZERO))
    constant("int8.axis", [-1])
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in tables:
            nodes.append(node)
            continue
        (source, matrix), out = node.input, node.output[0]
        if source not in rounded:  # query, key and value have the same
            rounded.add(source)
            add("Abs", [source], f"{source}.size")
            add("ReduceMax", [f"{source}.size", "int8.axis"], f"{source}.scale")
            # 0 / 0 of a token of zeros becomes some integer, which the scale of 0 makes 0 in the end.
            add("Div", [source, f"{source}.scale"], f"{source}.scaled")
            add("QuantizeLinear", [f"{source}.scaled", "int8.step", "int8.zero"], f"{source}.rounded")
        if f"{matrix}.rounded" not in tables:
            values = numpy_helper.to_array(tables[matrix])
            scale = np.abs(values).max(0) / WEIGHT_LIMIT
            scale[scale == 0] = 1
            constant(f"{matrix}.rounded", np.round(values / scale).astype(np.int8))
            constant(f"{matrix}.scale", (scale / ACTIVATION_LIMIT).astype(np.float32))
        add("MatMulInteger", [f"{source}.rounded", f"{matrix}.rounded", "int8.zero"], f"{out}.sum")
        add("Cast", [f"{out}.sum"], f"{out}.cast", to=TensorProto.FLOAT)
        add("Mul", [f"{out}.cast", f"{matrix}.scale"], f"{out}.columns")
        add("Mul", [f"{out}.columns", f"{source}.scale"], out)
    _save(model, nodes, tables, file)


def quantize_tables(file: Path) -> None:
    """Store embedding tables in 8 bits with a scale for each row, in place.

    onnxruntime's quantizer has one scale for a whole table, which costs quality.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(file)
    graph = model.graph
    tables = {table.name: table for table in graph.initializer}
    nodes = []
    for node in graph.node:
        name = node.input[0] if node.op_type == "Gather" else ""
        if name not in tables or tables[name].data_type != TensorProto.FLOAT or _axis(node) != 0:
            nodes.append(node)
            continue
        values = numpy_helper.to_array(tables[name])
        if values.ndim != 2 or values.size < SMALLEST_TABLE:
            nodes.append(node)
            continue
        scale = np.abs(values).max(1, keepdims=True) / 127
        scale[scale == 0] = 1
        rounded = np.round(values / scale).astype(np.int8)
        for suffix, array in (("rounded", rounded), ("scale", scale.astype(np.float32))):
            if f"{name}.{suffix}" not in tables:
                tables[f"{name}.{suffix}"] = numpy_helper.from_array(array, f"{name}.{suffix}")
        ids, out = node.input[1], node.output[0]
        nodes += [
            helper.make_node("Gather", [f"{name}.rounded", ids], [f"{out}.rounded"]),
            helper.make_node("Gather", [f"{name}.scale", ids], [f"{out}.scale"]),
            helper.make_node("Cast", [f"{out}.rounded"], [f"{out}.cast"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{out}.cast", f"{out}.scale"], [out]),
        ]
    _save(model, nodes, tables, file)


def _save(model: Any, nodes: list[Any], tables: dict[str, Any], file: Path) -> None:
    """Write a model with these nodes, and those tables that they use."""
    import onnx

    graph, used = model.graph, {name for node in nodes for name in node.input}
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(table for name, table in tables.items() if name in used)
    model.ir_version = IR_VERSION
    onnx.checker.check_model(model)
    onnx.save(model, str(file))


def _axis(node: Any) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
