"""Operators on torch tensors: Triton kernels on a GPU, torch operations elsewhere (docs/kernels.md)."""

from vp_kernels.attention.op import attention
from vp_kernels.density_merge.op import density_merge
from vp_kernels.gather_norm.op import gather_norm
from vp_kernels.match_merge.op import match_merge
from vp_kernels.merge_rows.op import merge_rows
from vp_kernels.select.op import select, select_fuse

__all__ = ["attention", "density_merge", "gather_norm", "match_merge", "merge_rows", "select", "select_fuse"]
