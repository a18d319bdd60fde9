"""Reference implementations of vp::select and vp::select_fuse in plain torch; also their CPU implementations."""

from __future__ import annotations

import torch
from torch import Tensor


def select_reference(scores: Tensor, k: int, by_score: bool = False) -> Tensor:
    """The k highest scores: ties to the lowest index, NaN ranks highest.

    Args:
        scores: float32 [B, n].
        k: 0 .. n.
        by_score: Order by descending score instead of by ascending index.

    Returns:
        int64 [B, k].
    """
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]  # [B, k]
    return order.contiguous() if by_score else order.sort(dim=1).values


def select_fuse_reference(scores: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest scores, and the score-weighted sum of the other rows.

    Args:
        scores: float32 [B, n].
        x: [B, N, D]; the scores belong to its last n rows.
        k: 0 .. n.

    Returns:
        index int64 [B, k], ascending; fused [B, 1, D], fp32 (fp64 if x is fp64).
    """
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices  # [B, n]
    rest = order[:, k:].sort(dim=1).values  # [B, n - k]
    rows = x if x.dtype == torch.float64 else x.float()
    shift = x.shape[1] - scores.shape[1]
    others = rows.gather(1, (rest + shift)[:, :, None].expand(-1, -1, x.shape[2]))  # [B, n - k, D]
    weights = scores.gather(1, rest).to(rows.dtype)  # [B, n - k]
    return order[:, :k].sort(dim=1).values, (weights[:, :, None] * others).sum(dim=1, keepdim=True)
