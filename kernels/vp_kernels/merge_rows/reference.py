"""Reference implementation of vp::merge_rows in plain torch, row by row; and the gradients of the operator."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_rows_reference(
    x: Tensor,
    keep: Tensor,
    source: Tensor,
    into: Tensor,
    source_weight: Tensor | None = None,
    keep_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted mean of each kept row and the rows merged into it.

    Args:
        x: [B, N, D]. Computed in fp64 if fp64 (ground truth for fp32), else in fp32.
        keep: int64 [B, K], rows of x.
        source: int64 [B, R], rows of x.
        into: int64 [B, R], output row that each source joins.
        source_weight: [B, R]; None for 1 each. Sources of weight 0 are ignored, even if they hold NaN.
        keep_weight: [B, K]; None for 1 each.

    Returns:
        merged: [B, K, D], dtype of x. A row without sources is copied.
        mass: [B, K], fp32 (fp64 for fp64 x).
    """
    wide = x if x.dtype == torch.float64 else x.float()
    merged = torch.empty(x.shape[0], keep.shape[1], x.shape[2], dtype=wide.dtype)
    mass = torch.empty(x.shape[0], keep.shape[1], dtype=wide.dtype)
    for b in range(x.shape[0]):
        weights = [1.0] * source.shape[1] if source_weight is None else source_weight[b].tolist()
        rows, places = source[b].tolist(), into[b].tolist()
        for j in range(keep.shape[1]):
            row = wide[b, keep[b, j]]  # [D]
            own = 1.0 if keep_weight is None else float(keep_weight[b, j])
            joining = [i for i in range(len(rows)) if places[i] == j and weights[i] != 0]
            mass[b, j] = own + sum(weights[i] for i in joining)
            merged[b, j] = row
            if joining:
                total = own * row + sum(weights[i] * wide[b, rows[i]] for i in joining)
                merged[b, j] = total / mass[b, j]
    return merged.to(x.dtype), mass


def merge_rows_gradients(
    x: Tensor,
    keep: Tensor,
    source: Tensor,
    into: Tensor,
    source_weight: Tensor | None,
    keep_weight: Tensor | None,
    grad_merged: Tensor | None,
    grad_mass: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `merge_rows` in x, source_weight and keep_weight.

    Written out rather than left to autograd, so that it can be traced (torch.compile). Sums over rows are matrix
    products rather than scatters, whose order would vary on a GPU.

    Args:
        x, keep, source, into, source_weight, keep_weight: as for `merge_rows_reference`.
        grad_merged: [B, K, D]; None is zero.
        grad_mass: [B, K]; None is zero.

    Returns:
        [B, N, D] in x's dtype, [B, R] and [B, K] in fp32 (fp64 for fp64 x).
    """
    wide = x if x.dtype == torch.float64 else x.float()
    kept = _rows(wide, keep)  # [B, K, D]
    arriving = _rows(wide, source)  # [B, R, D]
    weight = wide.new_ones(source.shape) if source_weight is None else source_weight.to(wide.dtype)
    own = wide.new_ones(keep.shape) if keep_weight is None else keep_weight.to(wide.dtype)
    place = torch.arange(keep.shape[1], device=x.device)
    member = (into[:, None, :] == place[None, :, None]).to(wide.dtype)  # [B, K, R]
    mass = own + (member * weight[:, None, :]).sum(dim=2)  # [B, K]
    joined = ((member != 0) & (weight != 0)[:, None, :]).any(dim=2)  # rows with at least one source
    per_mass = torch.where(joined, 1.0 / torch.where(joined, mass, torch.ones_like(mass)), torch.zeros_like(mass))
    share = member * weight[:, None, :] * per_mass[:, :, None]  # [B, K, R]: d merged_j / d x_source_r
    left = 1.0 - share.sum(dim=2)  # [B, K]: d merged_j / d x_keep_j
    merged = left[:, :, None] * kept + share @ arriving
    grad = torch.zeros_like(kept) if grad_merged is None else grad_merged.to(wide.dtype)
    column = torch.arange(x.shape[1], device=x.device)
    move = (keep[:, :, None] == column).to(wide.dtype) * left[:, :, None]
    move = move + share @ (source[:, :, None] == column).to(wide.dtype)  # [B, K, N]
    grad_x = move.transpose(1, 2) @ grad
    # d merged_j / d weight = (row - merged_j) / mass_j, for the kept row and its sources.
    on_mass = torch.zeros_like(mass) if grad_mass is None else grad_mass.to(wide.dtype)
    grad_own = (grad * (kept - merged)).sum(dim=2) * per_mass + on_mass
    aimed = grad * per_mass[:, :, None]
    grad_weight = (_rows(aimed, into) * (arriving - _rows(merged, into))).sum(dim=2) + on_mass.gather(1, into)
    return grad_x.to(x.dtype), grad_weight, grad_own


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows of x [B, N, D] at index [B, K]: [B, K, D]."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
