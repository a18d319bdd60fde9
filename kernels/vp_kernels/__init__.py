"""Triton kernels for token reduction, each with a PyTorch reference.

    from vp_kernels import ops

    out, received = ops.attention(qkv, importance="class")

Importing this package imports neither torch nor triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vp_kernels.errors import KernelError

if TYPE_CHECKING:
    from vp_kernels import ops
    from vp_kernels.aot.check import check_index
    from vp_kernels.onnx import add_functions, function_names, inline

__all__ = ["KernelError", "add_functions", "check_index", "function_names", "inline", "ops"]

_LAZY = {
    "add_functions": "vp_kernels.onnx",
    "check_index": "vp_kernels.aot.check",
    "function_names": "vp_kernels.onnx",
    "inline": "vp_kernels.onnx",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("vp_kernels.ops")
    if name not in _LAZY:
        raise AttributeError(f"module 'vp_kernels' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
