"""BAT's step in batched torch operations, used on a CPU or without triton."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_WEIGHT = 1e-12


def density_merge(
    x: Tensor,
    scores: Tensor,
    size: Tensor | None,
    tokens_out: int,
    clusters: int,
    pairs: int,
    prefix: int,
    weights: str = "attention",
) -> tuple[Tensor, Tensor]:
    """Batched `reference.density_merge`; returns x' [B, tokens_out, D], dtype of x; size' float32 [B, tokens_out]."""
    batch, tokens, _ = x.shape
    features = x.float()
    own = scores.new_ones(batch, tokens) if size is None else size
    weight = (scores if weights == "attention" else own).clamp_min(SMALLEST_WEIGHT)
    n_attentive = tokens_out - prefix - clusters + pairs
    order = _ranking(scores[:, prefix:]) + prefix
    attentive, rest = order[:, :n_attentive].sort(dim=1).values, order[:, n_attentive:].sort(dim=1).values

    front = torch.arange(prefix, device=x.device).expand(batch, prefix)
    if pairs:
        source, single, odd, partner = _pair(features, attentive, pairs)
        keep = torch.cat([front, single, odd], dim=1)  # [B, K]
        into = partner + (prefix + single.shape[1])  # [B, R]
    else:
        source = into = attentive[:, :0]
        keep = torch.cat([front, attentive], dim=1)
    # Whether row `source[r]` merges into output row k, and its share of the mean: [B, K, R]
    member = torch.arange(keep.shape[1], device=x.device)[None, :, None] == into[:, None, :]
    source_weight = member * _take(weight, source)[:, None, :]
    mass = _take(weight, keep) + source_weight.sum(dim=2)  # [B, K]
    kept = _take_rows(x, keep)
    # Unmerged rows are copied exactly; only merge targets are computed.
    mixed = (
        kept.float() * (_take(weight, keep) / mass)[:, :, None]
        + (source_weight / mass[:, :, None]) @ _take_rows(x, source).float()
    ).to(x.dtype)
    kept = torch.where(member.any(dim=2)[:, :, None], mixed, kept)
    kept_size = _take(own, keep) + (member * _take(own, source)[:, None, :]).sum(dim=2)
    if not clusters:
        return kept, kept_size

    label = _cluster(_take_rows(features, rest), clusters)  # [B, n_i]
    member = torch.arange(clusters, device=x.device)[None, :, None] == label[:, None, :]  # [B, clusters, n_i]
    share = member * _take(weight, rest)[:, None, :]
    share = share / share.sum(dim=2, keepdim=True)
    pooled = (share @ _take_rows(x, rest).float()).to(x.dtype)
    pooled_size = (member * _take(own, rest)[:, None, :]).sum(dim=2)
    return torch.cat([kept, pooled], dim=1), torch.cat([kept_size, pooled_size], dim=1)


def _ranking(values: Tensor) -> Tensor:
    """int64 [B, n]: positions in descending order of value, ties to the lowest."""
    return torch.sort(values, dim=1, descending=True, stable=True).indices


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Gather values [B, N] at index int64 [B, K]: [B, K]."""
    return torch.gather(values, 1, index)


def _take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows of x [B, N, D] at index int64 [B, K]: [B, K, D]."""
    return torch.gather(x, 1, index[:, :, None].expand(-1, -1, x.shape[2]))


def _ahead(values: Tensor) -> Tensor:
    """bool [B, n, n]: whether j comes before i in descending order, ties to the lowest position."""
    place = torch.arange(values.shape[1], device=values.device)
    higher = values[:, None, :] > values[:, :, None]
    return higher | ((values[:, None, :] == values[:, :, None]) & (place[None, :] < place[:, None]))


def _pair(features: Tensor, attentive: Tensor, pairs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pair attentive rows [B, n_a]: positions that merge [B, R], stay single, are odd; odd positions merged into."""
    even, odd = attentive[:, ::2], attentive[:, 1::2]
    unit = torch.nn.functional.normalize(features, dim=2)
    cosines = _take_rows(unit, even) @ _take_rows(unit, odd).transpose(1, 2)
    score, partner = cosines.amax(dim=2), cosines.argmax(dim=2)  # argmax, unlike max, returns the lowest index on ties
    beaten = (_ahead(score) & (partner[:, :, None] == partner[:, None, :])).any(dim=2)
    order = _ranking(score - 4.0 * beaten.float())  # cosines differ by at most 2: beaten tokens rank last
    merged = order[:, :pairs].sort(dim=1).values
    single = order[:, pairs:].sort(dim=1).values
    return _take(even, merged), _take(even, single), odd, _take(partner, merged)


def _cluster(t: Tensor, clusters: int) -> Tensor:
    """Density-peak clustering of t, float32 [B, n_i, D]: labels, int64 [B, n_i]; clusters by ascending centre."""
    n, width = t.shape[1], t.shape[2]
    # By differences rather than a matrix product, so that equal tokens are exactly 0 apart.
    squared = torch.cdist(t, t, compute_mode="donot_use_mm_for_euclid_dist").square()  # [B, n_i, n_i]
    log_density = squared.sum(dim=2) / -(n * width)
    infinite = squared.new_full((), float("inf"))
    nearest = torch.where(_ahead(log_density), squared, infinite).amin(dim=2)
    apart = torch.where(nearest < infinite, nearest, squared.amax(dim=2))
    centres = _ranking(log_density + apart.sqrt().log())[:, :clusters].sort(dim=1).values  # [B, K]
    label = (-_take_rows(squared, centres)).argmax(dim=1)  # [B, n_i]: distances are symmetric
    own = centres[:, :, None] == torch.arange(n, device=t.device)[None, None, :]  # [B, K, n_i]
    return torch.where(own.any(dim=1), own.float().argmax(dim=1), label)
