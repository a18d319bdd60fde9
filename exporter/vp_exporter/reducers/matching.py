"""Bipartite soft matching of the patch tokens (Bolya et al., ICLR 2023, section 3), used by ToMe and PPT."""

from __future__ import annotations

from torch import Tensor

from vp_exporter.reducers import ops
from vp_exporter.reducers.stream import Merge


def match(keys: Tensor, prefix: int, r: int, *, sort: bool = True) -> tuple[Tensor, Merge]:
    """Merge the r patch tokens of A that are most similar to a token of B.

    A are the patch tokens at even positions of the sequence, B those at odd positions, as in the paper for a class
    token at position 0. Ties go to the lowest index.

    Args:
        keys: float32 [B, N, d_h], metric of the similarity.
        prefix: P, number of leading tokens that are left alone.
        r: Tokens to merge, at most half of the patch tokens.
        sort: Order the rest of A by position; otherwise by descending similarity.

    Returns:
        The rows that stay, int64 [B, N - r] (prefix, rest of A, B ascending), and the merges.
    """
    tokens = keys.shape[1]
    first_a, first_b = prefix + prefix % 2, prefix + (prefix + 1) % 2
    b_rows = range(first_b, tokens, 2)
    metric = ops.unit(keys)
    score, partner = ops.best(metric[:, first_a::2] @ metric[:, first_b::2].transpose(1, 2))
    order = ops.ranking(score)
    source, rest = order[:, :r], order[:, r:]
    if sort:
        rest = ops.ascending(rest)
    keep = ops.frame(rest, prefix, b_rows, scale=2, shift=first_a)
    into = ops.take(partner, source) + (prefix + rest.shape[1])
    return keep, Merge(source * 2 + first_a, into)
