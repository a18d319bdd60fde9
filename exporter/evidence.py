"""What a block's attention shows to a reducer, computed beside the fused attention and never from its map.

Scores need one row: softmax(q_class k^T) costs N * d multiply-accumulates, where the map costs N^2 * d and would take
the block off the fused path. All in fp32: matching under bf16 doubles the error of the whole model.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from vp_exporter.reducers import ops
from vp_exporter.reducers.base import Need
from vp_exporter.reducers.stream import Seen


class See(nn.Module):
    """What `needs` names, computed from the heads of a block's attention.

    A module of its own so that the nodes it becomes carry its name in an exported graph.

    Args:
        needs: of the block's step.
        heads: H, of the attention.
    """

    def __init__(self, needs: frozenset[Need], heads: int) -> None:
        super().__init__()
        self.needs, self.heads = needs, heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Seen:
        """Look.

        Args:
            q, k, v: [B, H, N, d], or "packed" [B, N, H * d], of which nothing is transposed.
            bias: float32 [1 or B, N], the key bias of that attention.
        """
        needs, heads = self.needs, self.heads
        packed = q.ndim == 3
        keys: Tensor | None = None
        norm: Tensor | None = None
        graph: Tensor | None = None
        row: Tensor | None = None
        if "class_attention" in needs:
            row = class_attention_packed(q, k, heads, bias) if packed else class_attention(q, k, bias)
        if "keys" in needs:
            per_head = k.reshape(-1, k.shape[1], heads, k.shape[2] // heads) if packed else k
            keys = per_head.float().sum(dim=2 if packed else 1)
        if "value_norm" in needs:
            norm = ops.norm(v if packed else v.transpose(1, 2).flatten(2))
        if "graph_score" in needs:
            graph = graph_score(_unpack(q, heads), _unpack(k, heads), bias)
        return Seen(row, keys, norm, graph)


def _unpack(x: Tensor, heads: int) -> Tensor:
    """[B, N, H * d] -> [B, H, N, d]."""
    return x if x.ndim == 4 else x.reshape(-1, x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)


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


def graph_score(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """GTP's score (Xu et al., WACV 2024): max over heads of a_jj times max over heads of sum_i a_ij.

    One head's map at a time: [B, N, N], never [B, H, N, N].

    Args:
        q, k: [B, H, N, d].

    Returns:
        float32 [B, N].
    """
    own: Tensor | None = None
    received: Tensor | None = None
    identity = torch.eye(q.shape[2], device=q.device)
    for head in range(q.shape[1]):
        logits = (q[:, head].float() * q.shape[3] ** -0.5) @ k[:, head].float().transpose(1, 2)
        weights = torch.softmax(logits if bias is None else logits + bias[:, None, :], dim=-1)
        diagonal, columns = (weights * identity).sum(dim=2), weights.sum(dim=1)
        own = diagonal if own is None else own.maximum(diagonal)
        received = columns if received is None else received.maximum(columns)
    assert own is not None
    assert received is not None
    return own * received
