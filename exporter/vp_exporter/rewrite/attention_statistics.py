"""Attention statistics for reducers, computed alongside the fused attention rather than from the attention map.

Scores need one row: softmax(q_class k^T) takes N * d multiply-accumulates, against N^2 * d and the loss of the fused
kernel for the whole map. Computed in fp32: matching in bf16 doubles the error of the whole model.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from vp_exporter.reducers import ops
from vp_exporter.reducers.base import InnerStep, Need
from vp_exporter.reducers.stream import AttentionStatistics


class CollectStatistics(nn.Module):
    """Computes the statistics named in `needs` from the heads of a block's attention.

    A module, so that its nodes carry its name in an exported graph.

    Args:
        needs: Statistics that the block's step needs.
        heads: H, number of heads.
    """

    def __init__(self, needs: frozenset[Need], heads: int) -> None:
        super().__init__()
        self.needs, self.heads = needs, heads

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, weights: Tensor | None = None
    ) -> AttentionStatistics:
        """Compute the statistics.

        Args:
            q, k, v: [B, H, N, d], or "packed" [B, N, H * d], which avoids transposes.
            bias: float32 [1 or B, N], key bias of the attention.
            weights: Attention map float32 [B, H, N, N], if the block computes it; needed for "graph_score".
        """
        needs, heads = self.needs, self.heads
        packed = q.ndim == 3
        keys: Tensor | None = None
        norm: Tensor | None = None
        graph: Tensor | None = None
        row: Tensor | None = None
        if "class_attention" in needs and weights is not None:
            row = weights[:, :, 0].mean(dim=1)
        elif "class_attention" in needs:
            row = class_attention_packed(q, k, heads, bias) if packed else class_attention(q, k, bias)
        if "keys" in needs:
            per_head = k.reshape(-1, k.shape[1], heads, k.shape[2] // heads) if packed else k
            keys = per_head.float().sum(dim=2 if packed else 1)
        if "value_norm" in needs:
            norm = ops.norm(v if packed else v.transpose(1, 2).flatten(2))
        if "graph_score" in needs:
            assert weights is not None
            graph = graph_score(weights)
        return AttentionStatistics(row, keys, norm, graph)


def class_attention(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of the class token, mean over heads: [B, H, N, d] -> float32 [B, N]."""
    logits = (q[:, :, :1].float() * q.shape[3] ** -0.5) @ k.float().transpose(2, 3)  # [B, H, 1, N]
    if bias is not None:
        logits = logits + bias[:, None, None, :]
    return torch.softmax(logits, dim=-1).mean(dim=1).squeeze(1)


def class_attention_packed(q: Tensor, k: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """`class_attention` on packed heads, [B, N, H * d].

    Uses a block-diagonal query of H rows, with head h in row h: one product with k gives the logits of all heads.
    """
    width = q.shape[2] // heads
    own = torch.eye(heads, device=q.device).repeat_interleave(width, dim=1) * width**-0.5  # [H, H * d]
    logits = (q[:, :1].float() * own) @ k.float().transpose(1, 2)  # [B, H, N]
    if bias is not None:
        logits = logits + bias[:, None, :]
    return torch.softmax(logits, dim=-1).mean(dim=1)


def needs_map(step: InnerStep) -> bool:
    """Whether a step needs the whole attention map, which is then computed once, without a fused operator."""
    return "graph_score" in step.needs or step.theta < 1


def attention_map(q: Tensor, k: Tensor, bias: Tensor | None, theta: float = 1.0) -> Tensor:
    """Attention map of every head.

    Args:
        q, k: [B, H, N, d].
        bias: float32 [1 or B, N].
        theta: Share of each head's map that is kept (GTP, Xu et al., WACV 2024). Of its N^2 entries, those below the
            int((1 - theta) N^2)-th lowest become 0; rows then sum to less than 1, as in the authors' code.

    Returns:
        float32 [B, H, N, N].
    """
    logits = (q.float() * q.shape[3] ** -0.5) @ k.float().transpose(2, 3)
    weights = torch.softmax(logits if bias is None else logits + bias[:, None, None, :], dim=-1)
    heads, tokens = q.shape[1], q.shape[2]
    lowest = int(tokens * tokens * (1 - theta))
    if lowest < 2:  # no entry is below the lowest
        return weights
    threshold = ops.nth_highest(weights.reshape(-1, heads, tokens * tokens), tokens * tokens - lowest + 1)
    return weights * (weights >= threshold[:, :, :, None]).float()


def graph_score(weights: Tensor) -> Tensor:
    """GTP's score: max over heads of a_jj times max over heads of sum_i a_ij.

    Args:
        weights: Attention map, float32 [B, H, N, N].

    Returns:
        float32 [B, N].
    """
    heads, tokens = weights.shape[1], weights.shape[2]
    diagonal = weights.reshape(-1, heads, tokens * tokens)[:, :, :: tokens + 1]
    return diagonal.amax(dim=1) * weights.sum(dim=2).amax(dim=1)
