"""Packages that each command imports, as in vp_engines.extras; checked before its work, and listed by vp-doctor."""

from __future__ import annotations

MODEL = ("torch", "timm", "safetensors")  # extra "export"
EXPORT = (*MODEL, "onnx")  # likewise
ONNX_LOWERING = ("onnxscript",)  # likewise; used by torch.onnx
SEARCH = (*MODEL, "scipy")  # extra "search"
PICTURES = ("matplotlib",)  # extras "profile" and "search"
