"""Reference implementation of BAT's step, image by image and token by token, following docs/reducers.md (bat)."""

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
    """Reference for `vp::density_merge`, computed in fp32, or in fp64 if x is fp64.

    Args:
        x: [B, N, D].
        scores: [B, N], attention of the class token, prefix columns included.
        size: [B, N], or None for 1 everywhere.
        tokens_out: Number of output tokens, prefix included.
        clusters: Number of tokens that replace the inattentive ones.
        pairs: Merges among attentive tokens.
        prefix: Number of leading tokens that are left alone.
        weights: Weight means by "attention" or "size".

    Returns:
        x' [B, tokens_out, D], dtype of x; size' [B, tokens_out], float32 (fp64 if x is fp64).
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    images = []
    for image in range(x.shape[0]):
        own = torch.ones(x.shape[1], dtype=exact) if size is None else size[image].to(exact)
        c = scores[image].to(exact)
        weight = (c if weights == "attention" else own).clone()
        weight[weight < SMALLEST_WEIGHT] = SMALLEST_WEIGHT
        rows = x[image].to(exact)  # [N, D]
        made = groups(rows, c, tokens_out, clusters, pairs, prefix)
        merged = torch.stack([_mean(rows[group], weight[group]) for group in made])
        images.append((merged, torch.stack([own[group].sum() for group in made])))
    return torch.stack([merged for merged, _ in images]).to(x.dtype), torch.stack([sizes for _, sizes in images])


def groups(x: Tensor, c: Tensor, tokens_out: int, clusters: int, pairs: int, prefix: int) -> list[list[int]]:
    """Indices into x [N, D] that form each output row, in output order, given scores c [N]."""
    patches = list(range(prefix, x.shape[0]))
    n_attentive = tokens_out - prefix - clusters + pairs
    order = descending(c[prefix:])
    attentive = sorted(patches[place] for place in order[:n_attentive])
    inattentive = sorted(patches[place] for place in order[n_attentive:])
    return [[row] for row in range(prefix)] + pair(x, attentive, pairs) + cluster(x, inattentive, clusters)


def _mean(rows: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of rows [M, D] with weight [M]: [D]. A single row is returned unchanged."""
    return rows[0] if len(rows) == 1 else (rows * weight[:, None]).sum(dim=0) / weight.sum()


def descending(values: Tensor) -> list[int]:
    """Positions of values [n] in descending order; ties to the lowest position, NaN first."""
    order: list[int] = torch.sort(values, descending=True, stable=True).indices.tolist()
    return order


def pair(x: Tensor, attentive: list[int], pairs: int) -> list[list[int]]:
    """Merge the most similar pairs of attentive rows of x [N, D]; returns the rows of each output token."""
    if pairs == 0:
        return [[row] for row in attentive]
    even, odd = attentive[::2], attentive[1::2]
    unit = x / x.square().sum(dim=1).sqrt().clamp_min(1e-12)[:, None]
    score, partner = [], []
    for a in even:
        cosines = (unit[odd] * unit[a]).sum(dim=1)  # [n_odd]
        place = descending(cosines)[0]
        score.append(float(cosines[place]))
        partner.append(place)
    ranked = descending(torch.tensor(score, dtype=torch.float64))
    taken: set[int] = set()
    firsts: list[int] = []
    thirds: list[int] = []
    for a in ranked:  # the first token to claim a partner is paired with it
        (thirds if partner[a] in taken else firsts).append(a)
        taken.add(partner[a])
    merged = (firsts + thirds)[:pairs]
    joined = [[row] for row in odd]
    for a in merged:
        joined[partner[a]].append(even[a])
    return [[row] for a, row in enumerate(even) if a not in merged] + joined


def cluster(x: Tensor, inattentive: list[int], clusters: int) -> list[list[int]]:
    """Cluster the inattentive rows of x [N, D] by density peaks; the rows of each cluster, centres ascending."""
    if not inattentive:
        return []
    t = x[inattentive]  # [n_i, D]
    n, width = t.shape
    squared = torch.stack([(t - t[i]).square().sum(dim=1) for i in range(n)])  # [n_i, n_i]
    log_density = -squared.sum(dim=1) / (n * width)
    peak = torch.empty(n, dtype=t.dtype)
    for i in range(n):
        denser = (log_density > log_density[i]) | ((log_density == log_density[i]) & (torch.arange(n) < i))
        delta = squared[i][denser].min() if bool(denser.any()) else squared[i].max()
        peak[i] = log_density[i] + delta.sqrt().log()
    centres = sorted(descending(peak)[:clusters])
    members: list[list[int]] = [[] for _ in centres]
    for i in range(n):
        to_centre = -squared[i][centres]  # [K]
        label = centres.index(i) if i in centres else descending(to_centre)[0]
        members[label].append(inattentive[i])
    return members
