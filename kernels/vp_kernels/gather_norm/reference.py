"""Reference implementation of vp::gather_norm in plain torch; also its CPU implementation."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_norm_reference(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather rows and apply LayerNorm, in fp32 (fp64 if x is fp64).

    Args:
        x: [B, N, D].
        index: int64 [K] or [B, K]; outside 0 .. N - 1 the row is NaN.
        weight, bias: [D].
        eps: Added to the variance.
        residual: [B, N, D], added to x first.
        extra: [B, E, D], appended after the gathered rows.

    Returns:
        kept [B, K + E, D] and normed [B, K + E, D], fp32 or fp64.
    """
    rows = gather(x, index, residual, extra)  # [B, K + E, D]
    centred = rows - rows.mean(dim=2, keepdim=True)
    variance = centred.square().mean(dim=2, keepdim=True)  # [B, K + E, 1]
    normed = centred / (variance + eps).sqrt() * weight.to(rows.dtype) + bias.to(rows.dtype)
    return rows, normed


def gather(x: Tensor, index: Tensor, residual: Tensor | None, extra: Tensor | None) -> Tensor:
    """cat(x[index] + residual[index], extra), unrounded: fp32 or fp64 [B, K + E, D]. Arguments as above."""
    summed = wide(x) if residual is None else wide(x) + wide(residual)  # [B, N, D]
    batch, tokens, width = x.shape
    where = index.expand(batch, -1)  # [B, K]
    inside = (where >= 0) & (where < tokens)
    there = where.clamp(0, tokens - 1)[:, :, None].expand(-1, -1, width)
    rows = summed.gather(1, there).masked_fill(~inside[:, :, None], float("nan"))  # [B, K, D]
    return rows if extra is None else torch.cat([rows, wide(extra)], dim=1)


def wide(value: Tensor) -> Tensor:
    """Cast to fp32, or keep fp64."""
    return value if value.dtype == torch.float64 else value.float()
