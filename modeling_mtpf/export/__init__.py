"""Export for devices: ONNX graphs, int8 weights, and the runners that need no torch."""

from .export import Export, ExportError, export_onnx, read_manifest
from .web import add_page, find_npm

__all__ = ["Export", "ExportError", "add_page", "export_onnx", "find_npm", "read_manifest"]
