"""Shared by the tests of vp::match_merge: inputs, and which images are free of near-ties."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.kernels.support import seeded

# If two similarities or variances are closer, their order may depend on the order of a sum.
MARGIN = 1e-5


def margins(metric: Tensor, r: int, prefix: int, scores: Tensor | None, tau: float) -> Tensor:
    """Margin of the closest decision of each image, in fp64: [B]; 0 for ties."""
    rows = metric.double().sum(2) if metric.ndim == 4 else metric.double()
    patches = torch.nn.functional.normalize(rows, dim=2)[:, prefix:]
    odd = prefix % 2
    similarity = patches[:, odd::2] @ patches[:, 1 - odd :: 2].transpose(1, 2)
    best, runner_up = _top_two(similarity)
    ranked = best.sort(dim=1, descending=True)
    chosen = ranked.indices[:, :r]
    found = (best - runner_up).gather(1, chosen).amin(1)  # for those that merge, the partner matters
    if best.shape[1] > r:
        found = torch.minimum(found, ranked.values[:, r - 1] - ranked.values[:, r])
    if scores is None:
        return found
    share = scores.double() / scores.double().sum(1, keepdim=True)
    variance = share.var(dim=1)
    by_score = share.sort(dim=1, descending=True).values
    kept = share.shape[1] - r
    pruned = (by_score[:, kept - 1] - by_score[:, kept]) / by_score[:, 0]
    found = torch.where(variance < tau, found, pruned)
    return torch.minimum(found, (variance - tau).abs() / tau)


def _top_two(similarity: Tensor) -> tuple[Tensor, Tensor]:
    if similarity.shape[2] < 2:
        return similarity[:, :, 0], torch.full_like(similarity[:, :, 0], -2.0)
    best, runner_up = similarity.topk(2, dim=2).values.unbind(2)
    return best, runner_up


def keys(batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Keys, [B, N, H, d], a view of qkv; or for heads = 0 [B, N, d], every second block of its columns."""
    qkv = seeded(batch, tokens, 3, max(heads, 1), width, dtype=dtype, seed=seed)
    return qkv[:, :, 1] if heads else qkv[:, :, 1, 0]


def peaked(batch: int, patches: int, seed: int = 0) -> tuple[Tensor, float]:
    """Scores [B, n], increasingly peaked from image to image, and a tau in the middle of their variances."""
    scores = torch.softmax(seeded(batch, patches, seed=seed) * torch.linspace(0.5, 3, batch)[:, None], dim=1)
    variance = (scores / scores.sum(1, keepdim=True)).var(dim=1) if patches > 1 else torch.zeros(batch)
    ordered = variance.sort().values
    return scores, float(ordered[batch // 2] + ordered[max(0, batch // 2 - 1)]) / (2 if batch > 1 else 1.5)


def sizes(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """float32 [B, N]: integers from 1 to 4."""
    return torch.randint(1, 5, (batch, tokens), generator=torch.Generator().manual_seed(seed)).float()


def few_directions(batch: int, tokens: int, width: int, seed: int = 0) -> Tensor:
    """Metric rows of few directions, whose similarities are exact in any arithmetic: many ties, no near-ties."""
    generator = torch.Generator().manual_seed(seed + tokens)
    quarter = torch.tensor([[1.0, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [2, 0, 0, 0], [0, 0, 0, 0]])
    table = torch.cat([quarter, torch.zeros(5, width - 4)], dim=1) if width > 4 else quarter[:, :width]
    scale = 2.0 ** torch.randint(-3, 4, (batch, tokens, 1), generator=generator)  # lengths are powers of two
    return table[torch.randint(5, (batch, tokens), generator=generator)] * scale
