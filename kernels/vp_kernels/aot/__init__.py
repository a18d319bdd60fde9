"""Kernels compiled ahead of time: `python -m vp_kernels.aot` writes a folder, `check_index` holds it to its index."""

from vp_kernels.aot.check import check_index

__all__ = ["check_index"]
