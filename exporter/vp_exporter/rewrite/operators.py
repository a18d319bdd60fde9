"""The vp operators as a reduced model calls them: a node of domain `vp` in an ONNX export, torch's own op otherwise.

One line each, so that `fused_block.py` and the reducers read the same in every lowering. vp_kernels is imported inside:
a model in the portable form never loads it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Importance = Literal["none", "class", "mean"]


def attention(qkv: Tensor, key_bias: Tensor | None, importance: Importance) -> tuple[Tensor, Tensor | None]:
    """qkv [B, N, 3, H, d] -> [B, N, H * d], and the importance float32 [B, N] that was asked for."""
    if torch.onnx.is_in_onnx_export():
        from vp_kernels.attention.function import attention_node

        return attention_node(qkv, key_bias, importance)
    from vp_kernels.attention.op import attention as operator

    return operator(qkv, key_bias, importance)


def gather_norm(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The rows of x (+ residual) at index, then extra; and their LayerNorm."""
    if torch.onnx.is_in_onnx_export():
        from vp_kernels.gather_norm.function import gather_norm_node

        return gather_norm_node(x, index, weight, bias, eps, residual, extra)
    from vp_kernels.gather_norm.op import gather_norm as operator

    return operator(x, index, weight, bias, eps, residual, extra)


def select(scores: Tensor, k: int) -> Tensor:
    """scores float32 [B, n] -> the k highest, int64 [B, k], ascending."""
    if torch.onnx.is_in_onnx_export():
        from vp_kernels.select.function import select_node

        return select_node(scores, k)
    from vp_kernels.select.op import select as operator

    return operator(scores, k)


def select_fuse(scores: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same, and the sum of the others' rows weighted by their scores, [B, 1, D]."""
    if torch.onnx.is_in_onnx_export():
        from vp_kernels.select.function import select_fuse_node

        return select_fuse_node(scores, x, k)
    from vp_kernels.select.op import select_fuse as operator

    return operator(scores, x, k)


def merge_rows(
    x: Tensor,
    keep: Tensor,
    source: Tensor,
    into: Tensor,
    source_weight: Tensor | None,
    keep_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Weighted means [B, K, D] of kept rows and the sources that join them, and their weights [B, K]."""
    if torch.onnx.is_in_onnx_export():
        from vp_kernels.merge_rows.function import merge_rows_node

        return merge_rows_node(x, keep, source, into, source_weight, keep_weight)
    from vp_kernels.merge_rows.op import merge_rows as operator

    return operator(x, keep, source, into, source_weight, keep_weight)


def match_merge(
    x: Tensor,
    metric: Tensor,
    size: Tensor | None,
    r: int,
    prefix: int,
    scores: Tensor | None = None,
    tau: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching and merge: [B, N - r, D] and sizes; with scores, PPT's choice between two policies."""
    if torch.onnx.is_in_onnx_export():
        from vp_kernels.match_merge.function import match_merge_node

        return match_merge_node(x, metric, size, r, prefix, scores, tau)
    from vp_kernels.match_merge.op import match_merge as operator

    return operator(x, metric, size, r, prefix, scores, tau)


def density_merge(
    x: Tensor,
    scores: Tensor,
    size: Tensor | None,
    tokens_out: int,
    clusters: int,
    pairs: int,
    prefix: int,
    weights: str,
) -> tuple[Tensor, Tensor]:
    """BAT's step: [B, tokens_out, D] and sizes."""
    if torch.onnx.is_in_onnx_export():
        from vp_kernels.density_merge.function import density_merge_node

        return density_merge_node(x, scores, size, tokens_out, clusters, pairs, prefix, weights)
    from vp_kernels.density_merge.op import density_merge as operator

    return operator(x, scores, size, tokens_out, clusters, pairs, prefix, weights)
