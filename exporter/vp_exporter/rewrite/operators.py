"""vp operators for use in a reduced model: a node of domain `vp` during ONNX export, else the torch operator.

Lets `fused_block.py` and reducers use one name in every lowering. vp_kernels is imported on call, so portable models
never load it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Importance = Literal["none", "class", "mean"]


def attention(qkv: Tensor, key_bias: Tensor | None, importance: Importance) -> tuple[Tensor, Tensor | None]:
    """Attention on qkv [B, N, 3, H, d]: [B, N, H * d], and the requested importance, float32 [B, N]."""
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
    """Gather rows of x (+ residual) at index, append extra; also returns their LayerNorm."""
    if torch.onnx.is_in_onnx_export():
        from vp_kernels.gather_norm.function import gather_norm_node

        return gather_norm_node(x, index, weight, bias, eps, residual, extra)
    from vp_kernels.gather_norm.op import gather_norm as operator

    return operator(x, index, weight, bias, eps, residual, extra)


def select(scores: Tensor, k: int) -> Tensor:
    """Indices of the k highest of scores, float32 [B, n]: int64 [B, k], ascending."""
    if torch.onnx.is_in_onnx_export():
        from vp_kernels.select.function import select_node

        return select_node(scores, k)
    from vp_kernels.select.op import select as operator

    return operator(scores, k)


def select_fuse(scores: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`select`, and the sum of the other rows weighted by their scores, [B, 1, D]."""
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
    """Weighted means [B, K, D] of kept rows and the sources merged into them, and their total weights [B, K]."""
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
    """Bipartite soft matching and merge: [B, N - r, D] and sizes; with scores, prune or merge per image as in PPT."""
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
