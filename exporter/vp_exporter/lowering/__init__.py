"""Lower a ReducedViT to an exported program or to ONNX."""

from vp_exporter.lowering.onnx import lower_onnx, plugin_nodes
from vp_exporter.lowering.program import export_program
from vp_exporter.lowering.signature import signature

__all__ = ["export_program", "lower_onnx", "plugin_nodes", "signature"]
