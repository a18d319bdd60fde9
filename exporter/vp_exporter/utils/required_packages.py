"""Which packages a command imports, as vp_engines.extras has them: asked before its work, and shown by vp-doctor."""

from __future__ import annotations

MODEL = ("torch", "timm", "safetensors")  # extra "export"
EXPORT = (*MODEL, "onnx")  # the same
ONNX_LOWERING = ("onnxscript",)  # the same; torch.onnx writes with it
SEARCH = (*MODEL, "scipy")  # extra "search"
PICTURES = ("matplotlib",)  # extras "profile" and "search"
