"""Int8 graphs: 8-bit weights, and activations that are rounded to 8 bits while the graph runs.

The choices were measured (docs/log.md, 2026-11-26): weights are unsigned with a scale for each column, since
products of unsigned activations with signed 8-bit weights overflow 16 bits on processors with AVX2 alone.
Rows of the embedding tables have a scale each.
"""

import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MtpfError, require_extra
from .graphs import IR_VERSION, TAIL_FILE, TRUNK_FILE, quietly

SMALLEST_TABLE = 65_536
"""Tables with fewer values stay in float32: they hardly count in the file's size."""
CALIBRATION_TEXTS, CALIBRATION_TOKENS = 128, 128


def quantize_export(
    folder: Path, tokenizer: Any, calibration: str | os.PathLike | None, apps: list[dict[str, np.ndarray]]
) -> dict[str, Any]:
    """Replace both graphs of an export by int8 ones.

    The ranges of the activations are measured on the raw text ``calibration`` with the apps' tensors and then
    fixed; without it each run measures its own. Returns what was done, for the manifest.

    Raises:
        MtpfError: There is no text or no app to calibrate with.
    """
    feeds: dict[str, list[dict[str, np.ndarray]]] = {}
    if calibration is not None:
        if not apps:
            raise MtpfError("--calibration measures the tail with apps; name at least one with --adapter.")
        feeds = _calibration_feeds(folder, tokenizer, calibration, apps)
    for name in (TRUNK_FILE, TAIL_FILE):
        with quietly():
            if calibration is None:
                _dynamic(folder / name)
            else:
                _static(folder / name, feeds[name])
        quantize_tables(folder / name)
    return {
        "activations": "static" if calibration is not None else "dynamic",
        "weights": "uint8, a scale for each column",
        "tables": "int8, a scale for each row",
    }


def _dynamic(file: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        file,
        file,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QUInt8,
        extra_options={"MatMulConstBOnly": True},  # neither attention nor LoRA
    )


def _static(file: Path, feeds: list[dict[str, np.ndarray]]) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Feeds(CalibrationDataReader):
        rest = iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rest, None)

    quantize_static(
        file,
        file,
        Feeds(),
        quant_format=QuantFormat.QOperator,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=True,  # weights are signed here, see above
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={"MatMulConstBOnly": True},
    )


def check_calibration(source: str | os.PathLike) -> None:
    """Raise `DataError` unless the raw text for the calibration exists."""
    require_extra("train", "datasets", "pyarrow")
    from ..data.sources import TextStream

    TextStream(str(source))


def _calibration_feeds(
    folder: Path, tokenizer: Any, source: str | os.PathLike, apps: list[dict[str, np.ndarray]]
) -> dict[str, list[dict[str, np.ndarray]]]:
    """Run the float32 trunk over some texts; return the inputs of trunk and tail, for each app in turn."""
    require_extra("train", "datasets", "pyarrow")
    import onnxruntime

    from ..data.sources import TextStream

    texts = [row.text for row in islice(TextStream(str(source)), 20 * CALIBRATION_TEXTS) if row.text]
    texts = texts[:: max(1, len(texts) // CALIBRATION_TEXTS)][:CALIBRATION_TEXTS]
    if not texts:
        raise MtpfError(f"{source} has no text to calibrate with; it needs a column 'text'.")
    trunk = onnxruntime.InferenceSession(folder / TRUNK_FILE, providers=["CPUExecutionProvider"])
    feeds: dict[str, list] = {TRUNK_FILE: [], TAIL_FILE: []}
    for number, text in enumerate(texts):
        encoded = tokenizer([text], truncation=True, max_length=CALIBRATION_TOKENS, return_tensors="np")
        inputs = {name: encoded[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
        feeds[TRUNK_FILE].append(inputs)
        hidden = trunk.run(None, inputs)[0]
        feeds[TAIL_FILE].append(
            {"hidden_states": hidden, "attention_mask": inputs["attention_mask"], **apps[number % len(apps)]}
        )
    return feeds


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
    used = {name for node in nodes for name in node.input}
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(table for name, table in tables.items() if name in used)
    model.ir_version = IR_VERSION
    onnx.checker.check_model(model)
    onnx.save(model, str(file))


def _axis(node: Any) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
