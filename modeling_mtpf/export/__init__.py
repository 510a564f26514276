"""Export for devices: ONNX graphs, int8 weights, and the runners that need no torch."""

from .export import Export, ExportError, export_onnx, read_manifest

__all__ = ["Export", "ExportError", "export_onnx", "read_manifest"]
