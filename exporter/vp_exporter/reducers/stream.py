"""Data types of a reduced model: the token stream, the attention statistics for a reducer, and the map that it returns.

A reducer only *chooses*: it returns a `TokenMap` of index tensors with static shapes. Tokens are moved by
`reduce_tokens` alone: one gather for those that stay and one matrix product for those merged, so engines never see a
scatter (whose order would be undefined if several tokens merge into one).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vp_exporter.reducers import ops

LEAST_SIZE = 1e-6  # smallest token size


@dataclass(frozen=True)
class Stream:
    """Tokens between two blocks.

    Attributes:
        x: [B, N, D].
        prefix: P, number of prefix tokens.
        size: float32 [B, N], number of patches in each token; None while all are 1, or if sizes are not tracked.
        log_size: float32 [B, N], log of the sizes, for proportional attention.
        positions: int64 [B, n] or [1, n], positions of the patch tokens in the original grid, as `ops.grid_codes`; None
            if no step needs them.
        columns: Columns of that grid.
        links: Graphs of the embedded patches needed by steps, by `InnerStep.links`, as computed by `TokenGraph`.
        code_index: int64 [1, codes], row in `links` of each grid code.
    """

    x: Tensor
    prefix: int
    size: Tensor | None = None
    log_size: Tensor | None = None
    positions: Tensor | None = None
    columns: int = 0
    links: Mapping[tuple[str, int], Tensor] | None = None
    code_index: Tensor | None = None

    @property
    def patches(self) -> int:
        """n, number of patch tokens."""
        return self.x.shape[1] - self.prefix


@dataclass(frozen=True)
class AttentionStatistics:
    """Statistics of a block's attention, all float32; None if not requested (`InnerStep.needs`).

    Attributes:
        class_attention: [B, N], attention of the class token, mean over heads.
        keys: [B, N, d_h], summed over heads (only used in cosines, so the scale does not matter).
        head_keys: [B, N, H, d_h], in the dtype of the model: `keys` before the sum, for operators that do the sum.
        value_norm: [B, N], Euclidean norm of the value over all heads.
        graph_score: [B, N], GTP's score from the whole attention map.
    """

    class_attention: Tensor | None = None
    keys: Tensor | None = None
    value_norm: Tensor | None = None
    graph_score: Tensor | None = None
    head_keys: Tensor | None = None


@dataclass(frozen=True)
class Merge:
    """Weighted means: source r is merged into output row `into[r]`.

    Attributes:
        source: int64 [B, R], rows of the input sequence.
        into: int64 [B, R], rows of the output.
        source_weight: [B, R]; None for the token sizes.
        keep_weight: [B, K], weights of the output rows themselves. None for their sizes; source_weight is then also the
            size that a source contributes.
        source_size: [B, R], size that each source contributes if the mean is unweighted; the weights are then None.
    """

    source: Tensor
    into: Tensor
    source_weight: Tensor | None = None
    keep_weight: Tensor | None = None
    source_size: Tensor | None = None


@dataclass(frozen=True)
class Propagation:
    """Propagation of dropped tokens: output += mix @ x[source]. `source` int64 [B, R], `mix` float32 [B, K, R]."""

    source: Tensor
    mix: Tensor


@dataclass(frozen=True)
class Pool:
    """New tokens appended to the kept ones: rows @ x[source].

    Attributes:
        source: int64 [B, R], rows of the input sequence.
        rows: float32 [B, E, R], weights.
        members: float32 [B, E, R], 1 if a source is part of the new token; their sizes are summed.
        places: int64 [B, E], input rows whose grid positions the new tokens inherit.
    """

    source: Tensor
    rows: Tensor
    members: Tensor
    places: Tensor


@dataclass(frozen=True)
class TokenMap:
    """Result of a reducer: rows that stay (int64 [B, K], prefix included, in output order) and where others go.

    `extra` are appended tokens [B, E, D] that an operator has already computed (`InnerStep.fused`), without sizes or
    positions.
    """

    keep: Tensor
    merge: Merge | None = None
    propagation: Propagation | None = None
    pool: Pool | None = None
    extra: Tensor | None = None


def merge_rows(
    x: Tensor,
    keep: Tensor,
    source: Tensor,
    into: Tensor,
    source_weight: Tensor | None,
    keep_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Weighted means of kept rows and the sources merged into them: a gather and one matrix product.

    Computed as a correction of the kept row: x_j + sum_i w_i (x_i - x_j) / sum w. This touches only the R sources and
    their partners; weighting every kept row would take another pass over the whole sequence.

    Args:
        x: [B, N, D].
        keep: int64 [B, K], rows that stay.
        source, into: int64 [B, R], rows to merge, and the output row that each joins.
        source_weight: [B, R]; None for 1.
        keep_weight: [B, K]; None for 1.

    Returns:
        Rows [B, K, D], and the total weight of each [B, K].
    """
    member = ops.one_hot(into, keep.shape[1])
    weighted = member if source_weight is None else member * source_weight[:, None, :]
    mass = weighted.sum(-1) + (1.0 if keep_weight is None else keep_weight)
    share = weighted / mass[:, :, None]
    change = ops.take_rows(x, source) - ops.take_rows(x, ops.take(keep, into))
    return ops.take_rows(x, keep) + share.to(x.dtype) @ change, mass


# Signature of `merge_rows`, shared by the operator vp::merge_rows.
MergeRows = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]


def reduce_tokens(stream: Stream, chosen: TokenMap, *, carry_size: bool, merge: MergeRows = merge_rows) -> Stream:
    """Apply a map to the tokens.

    Args:
        carry_size: Track token sizes.
        merge: Implementation of merging.
    """
    size = None if stream.size is None else ops.take(stream.size, chosen.keep)
    if chosen.merge is None:
        x = ops.take_rows(stream.x, chosen.keep)
    else:
        x, size = _merge(stream, chosen.keep, size, chosen.merge, merge)
    if chosen.propagation is not None:
        propagation = chosen.propagation
        x = x + propagation.mix.to(x.dtype) @ ops.take_rows(stream.x, propagation.source)
        if carry_size:
            size = _size_of(stream, propagation.mix, propagation.source) + (1.0 if size is None else size)
    if chosen.pool is not None:
        pool = chosen.pool
        x = torch.cat([x, pool.rows.to(x.dtype) @ ops.take_rows(stream.x, pool.source)], dim=1)
        if carry_size:
            size = _with_pool(stream, chosen.keep, size, pool)
    return _moved(stream, x, size if carry_size else None, chosen)


def sizes_without_merge(stream: Stream, x: Tensor, chosen: TokenMap, *, carry_size: bool) -> Stream:
    """Output stream for rows `x` [B, K + E, D] that were already gathered, with nothing merged into a kept row."""
    size = None
    if carry_size:
        size = None if stream.size is None else ops.take(stream.size, chosen.keep)
        if chosen.pool is not None:
            size = _with_pool(stream, chosen.keep, size, chosen.pool)
    return _moved(stream, x, size, chosen)


def _moved(stream: Stream, x: Tensor, size: Tensor | None, chosen: TokenMap) -> Stream:
    positions = None if stream.positions is None else _positions(stream, chosen)
    return replace(stream, x=x, size=size, log_size=None, positions=positions)


def _with_pool(stream: Stream, keep: Tensor, size: Tensor | None, pool: Pool) -> Tensor:
    """Sizes [B, K + E] of the kept and the new rows."""
    kept = ops.ones(keep) if size is None else size
    return torch.cat([kept, _size_of(stream, pool.members, pool.source)], dim=1)


def _merge(stream: Stream, keep: Tensor, size: Tensor | None, merge: Merge, run: MergeRows) -> tuple[Tensor, Tensor]:
    """Merge rows; returns [B, K, D] and their sizes [B, K]."""
    if merge.source_size is not None:
        x, _ = run(stream.x, keep, merge.source, merge.into, None, None)
        brought = (ops.one_hot(merge.into, keep.shape[1]) @ merge.source_size[:, :, None]).squeeze(-1)
        # Contributions may be negative (DiffRate's similarities): clamp for the logarithm.
        return x, (brought + (1.0 if size is None else size)).clamp_min(LEAST_SIZE)
    weight = merge.source_weight
    if weight is None and stream.size is not None:
        weight = ops.take(stream.size, merge.source)
    own = size if merge.keep_weight is None else merge.keep_weight
    x, mass = run(stream.x, keep, merge.source, merge.into, weight, own)
    if merge.keep_weight is None:
        return x, mass
    joined = _size_of(stream, ops.one_hot(merge.into, keep.shape[1]), merge.source)
    return x, joined + (1.0 if size is None else size)


def _size_of(stream: Stream, rows: Tensor, source: Tensor) -> Tensor:
    """Sum the sizes of the tokens at `source` [B, R] by membership rows [B, K, R] -> [B, K]."""
    if stream.size is None:
        return rows.sum(-1)
    return (rows @ ops.take(stream.size, source)[:, :, None]).squeeze(-1)


def _positions(stream: Stream, chosen: TokenMap) -> Tensor:
    assert stream.positions is not None
    rows = chosen.keep[:, stream.prefix :]
    if chosen.pool is not None:
        rows = torch.cat([rows, chosen.pool.places], dim=1)
    return ops.take_positions(stream.positions, rows - stream.prefix)
