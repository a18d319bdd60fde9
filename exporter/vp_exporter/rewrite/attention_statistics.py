"""Statistics of a block's attention for its reducer, computed beside the fused attention and never from its map.

Scores need one row: softmax(q_class k^T) costs N * d multiply-accumulates, where the map costs N^2 * d and would take
the block off the fused path. All in fp32: matching under bf16 doubles the error of the whole model.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from vp_exporter.reducers import ops
from vp_exporter.reducers.base import InnerStep, Need
from vp_exporter.reducers.stream import AttentionStatistics


class CollectStatistics(nn.Module):
    """The statistics that `needs` names, from the heads of a block's attention.

    A module of its own so that the nodes it becomes carry its name in an exported graph.

    Args:
        needs: of the block's step.
        heads: H, of the attention.
    """

    def __init__(self, needs: frozenset[Need], heads: int) -> None:
        super().__init__()
        self.needs, self.heads = needs, heads

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, weights: Tensor | None = None
    ) -> AttentionStatistics:
        """Compute them.

        Args:
            q, k, v: [B, H, N, d], or "packed" [B, N, H * d], of which nothing is transposed.
            bias: float32 [1 or B, N], the key bias of that attention.
            weights: its map float32 [B, H, N, N], where the block computes it; "graph_score" needs it.
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
    """The class token's row of the attention, averaged over heads: [B, H, N, d] -> float32 [B, N]."""
    logits = (q[:, :, :1].float() * q.shape[3] ** -0.5) @ k.float().transpose(2, 3)  # [B, H, 1, N]
    if bias is not None:
        logits = logits + bias[:, None, None, :]
    return torch.softmax(logits, dim=-1).mean(dim=1).squeeze(1)


def class_attention_packed(q: Tensor, k: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """The same on [B, N, H * d]: the query is spread over H rows, row h holding head h alone, so that one product with
    all of k gives every head's logits."""
    width = q.shape[2] // heads
    own = torch.eye(heads, device=q.device).repeat_interleave(width, dim=1) * width**-0.5  # [H, H * d]
    logits = (q[:, :1].float() * own) @ k.float().transpose(1, 2)  # [B, H, N]
    if bias is not None:
        logits = logits + bias[:, None, :]
    return torch.softmax(logits, dim=-1).mean(dim=1)


def needs_map(step: InnerStep) -> bool:
    """Whether a step needs its block's whole attention map: it is computed once then, and not by a fused operator."""
    return "graph_score" in step.needs or step.theta < 1


def attention_map(q: Tensor, k: Tensor, bias: Tensor | None, theta: float = 1.0) -> Tensor:
    """The softmax of every head.

    Args:
        q, k: [B, H, N, d].
        bias: float32 [1 or B, N].
        theta: share of each head's map that stays (GTP, Xu et al., WACV 2024). Of its N^2 entries those below the
            int((1 - theta) N^2)-th lowest become 0; rows then add up to less than 1, as in the authors' code.

    Returns:
        float32 [B, H, N, N].
    """
    logits = (q.float() * q.shape[3] ** -0.5) @ k.float().transpose(2, 3)
    weights = torch.softmax(logits if bias is None else logits + bias[:, None, None, :], dim=-1)
    heads, tokens = q.shape[1], q.shape[2]
    lowest = int(tokens * tokens * (1 - theta))
    if lowest < 2:  # nothing is below the lowest of all
        return weights
    threshold = ops.nth_highest(weights.reshape(-1, heads, tokens * tokens), tokens * tokens - lowest + 1)
    return weights * (weights >= threshold[:, :, :, None]).float()


def graph_score(weights: Tensor) -> Tensor:
    """GTP's score: max over heads of a_jj times max over heads of sum_i a_ij.

    Args:
        weights: the attention map, float32 [B, H, N, N].

    Returns:
        float32 [B, N].
    """
    heads, tokens = weights.shape[1], weights.shape[2]
    diagonal = weights.reshape(-1, heads, tokens * tokens)[:, :, :: tokens + 1]
    return diagonal.amax(dim=1) * weights.sum(dim=2).amax(dim=1)
