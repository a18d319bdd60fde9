"""Reference implementation of vp::match_merge in plain torch, image by image and token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from vp_kernels.merge_rows.reference import merge_rows_reference

Map = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def match_merge_reference(
    x: Tensor,
    metric: Tensor,
    size: Tensor | None,
    r: int,
    prefix: int,
    scores: Tensor | None = None,
    tau: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Merge the r tokens with the most similar partner; with scores that vary, drop the r lowest instead.

    Args:
        x: [B, N, D]. Computed in fp64 if fp64 (ground truth for fp32), else in fp32.
        metric: [B, N, d], or [B, N, H, d], summed over H.
        size: [B, N]; None for 1 each.
        r: Number of tokens to merge, 1 .. (N - prefix) // 2.
        prefix: Number of leading tokens that are left alone.
        scores: [B, N - prefix] or None.
        tau: Prune an image if the variance of its scores, scaled to sum to 1, is at least tau.

    Returns:
        x': [B, N - r, D], dtype of x.
        size': [B, N - r], fp32 (fp64 for fp64 x).
    """
    keep, source, into, weight, own = match_reference(metric, size, r, prefix, scores, tau)
    return merge_rows_reference(x, keep, source, into, weight, own)


def match_reference(
    metric: Tensor, size: Tensor | None, r: int, prefix: int, scores: Tensor | None = None, tau: float = 0.0
) -> Map:
    """Index lists that `match_merge` applies.

    Returns:
        keep int64 [B, N - r], source and into int64 [B, r], source weights [B, r] (0 for a pruned image) and weights of
        the rows that stay [B, N - r].
    """
    wide = metric if metric.dtype == torch.float64 else metric.float()
    rows = wide.sum(dim=2) if wide.ndim == 4 else wide  # [B, N, d]
    batch, tokens = rows.shape[:2]
    weights = torch.ones(batch, tokens, dtype=rows.dtype) if size is None else size.to(rows.dtype)
    images = [_match_image(rows[b], r, prefix) for b in range(batch)]
    pruned = [scores is not None and _varies(scores[b].to(rows.dtype), tau) for b in range(batch)]
    for b in range(batch):
        if pruned[b]:
            assert scores is not None
            best = _descending(scores[b])[: tokens - prefix - r]
            images[b] = (list(range(prefix)) + [prefix + i for i in best], *images[b][1:])
    keep, source, into = (torch.tensor([image[part] for image in images]) for part in range(3))
    weight = weights.gather(1, source) * torch.tensor([[0.0 if each else 1.0] for each in pruned])
    return keep, source, into, weight, weights.gather(1, keep)


def _match_image(rows: Tensor, r: int, prefix: int) -> tuple[list[int], list[int], list[int]]:
    """keep, source and into of one image, given rows [N, d]."""
    patches = range(prefix, rows.shape[0])
    in_a, in_b = [i for i in patches if i % 2 == 0], [i for i in patches if i % 2 == 1]
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    similarity = unit[in_a] @ unit[in_b].T  # [n_A, n_B]
    partner = [_descending(line)[0] for line in similarity]
    score = torch.stack([line[p] for line, p in zip(similarity, partner, strict=True)])
    order = _descending(score)
    rest = sorted(order[r:])
    keep = list(range(prefix)) + [in_a[i] for i in rest] + in_b
    return keep, [in_a[i] for i in order[:r]], [prefix + len(rest) + partner[i] for i in order[:r]]


def _varies(scores: Tensor, tau: float) -> bool:
    """Whether the variance of scores [n], scaled to sum to 1, is at least tau or NaN."""
    share = scores / scores.sum()
    variance = ((share - share.mean()) ** 2).sum() / max(1, len(share) - 1)
    return not bool(variance < tau)


def _descending(values: Tensor) -> list[int]:
    """Indices of values [n] in descending order; ties by index, NaNs first and tied."""
    as_list = values.tolist()
    return sorted(
        range(len(as_list)),
        key=lambda i: (as_list[i] == as_list[i], -as_list[i] if as_list[i] == as_list[i] else 0.0, i),
    )
