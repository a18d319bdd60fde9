"""Ahead-of-time compilation: `python -m vp_kernels.aot` builds a folder of kernels, `check_index` verifies it."""

from vp_kernels.aot.check import check_index

__all__ = ["check_index"]
