"""What flows through a reduced model, the attention statistics that a reducer reads, and the map it answers with.

Every reducer only *chooses*: it returns a `TokenMap` of index tensors with static shapes. `reduce_tokens` is the one
place that moves tokens: one gather for what stays and one matrix product for what is merged, so no engine ever sees a
scatter (whose order would be undefined where several tokens merge into one).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vp_exporter.reducers import ops

LEAST_SIZE = 1e-6  # of a token


@dataclass(frozen=True)
class Stream:
    """The tokens between two blocks.

    Attributes:
        x: [B, N, D].
        prefix: P, prefix tokens in front.
        size: float32 [B, N], patches that each token stands for; None while every one stands for itself (or where the
            plan does not carry sizes).
        log_size: float32 [B, N], its logarithm, where attention is proportional.
        positions: int64 [B, n] or [1, n], places of the patch tokens in the original grid, as `ops.grid_codes`; None
            where no step asks.
        columns: of that grid.
        links: the graphs of the embedded patches that steps ask for, by `InnerStep.links`, as `TokenGraph` makes them.
        code_index: int64 [1, codes], the row of `links` by the place's code.
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
        """n, the patch tokens."""
        return self.x.shape[1] - self.prefix


@dataclass(frozen=True)
class AttentionStatistics:
    """Statistics of a block's attention, all float32; None where the step did not ask (`InnerStep.needs`).

    Attributes:
        class_attention: [B, N], the class token's attention, averaged over heads.
        keys: [B, N, d_h], summed over heads (every use is a cosine, which knows no scale).
        head_keys: [B, N, H, d_h], in the dtype of the model: what `keys` sums, for an operator that does so itself.
        value_norm: [B, N], Euclidean norm of the value over all heads.
        graph_score: [B, N], GTP's score of the whole attention map.
    """

    class_attention: Tensor | None = None
    keys: Tensor | None = None
    value_norm: Tensor | None = None
    graph_score: Tensor | None = None
    head_keys: Tensor | None = None


@dataclass(frozen=True)
class Merge:
    """Weighted means: source r joins output row `into[r]`.

    Attributes:
        source: int64 [B, R], rows of the entering sequence.
        into: int64 [B, R], rows of the output.
        source_weight: [B, R]; None takes the tokens' sizes.
        keep_weight: [B, K], of what stands in the output rows already. None takes their sizes: source_weight is then
            also the size that a source brings.
        source_size: [B, R], the size that each source brings where the mean is a plain one, of features that all
            weigh the same; there are no weights then.
    """

    source: Tensor
    into: Tensor
    source_weight: Tensor | None = None
    keep_weight: Tensor | None = None
    source_size: Tensor | None = None


@dataclass(frozen=True)
class Propagation:
    """Of what is dropped: output += mix @ x[source]. `source` int64 [B, R], `mix` float32 [B, K, R]."""

    source: Tensor
    mix: Tensor


@dataclass(frozen=True)
class Pool:
    """New tokens behind the kept ones: rows @ x[source].

    Attributes:
        source: int64 [B, R], rows of the entering sequence.
        rows: float32 [B, E, R], weights.
        members: float32 [B, E, R], 1 where a source is part of the new token: whose sizes add up.
        places: int64 [B, E], the entering rows whose grid positions the new tokens take.
    """

    source: Tensor
    rows: Tensor
    members: Tensor
    places: Tensor


@dataclass(frozen=True)
class TokenMap:
    """A reducer's answer: rows that stay (int64 [B, K], prefix included, in output order) and where others go.

    `extra` are new tokens [B, E, D] behind them that an operator has made already (`InnerStep.fused`): they have no
    sizes and no places.
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
    """Weighted means of kept rows and the sources that join them: a gather and one matrix product.

    The mean as a correction of the row that stays: x_j + sum_i w_i (x_i - x_j) / sum w. Only the R sources and their
    partners are touched, where weighting every kept row would be one more pass over the whole sequence.

    Args:
        x: [B, N, D].
        keep: int64 [B, K], rows that stay.
        source, into: int64 [B, R], rows that merge, and the output row that each joins.
        source_weight: [B, R]; None: 1.
        keep_weight: [B, K]; None: 1.

    Returns:
        Rows [B, K, D], and the weight of each [B, K].
    """
    member = ops.one_hot(into, keep.shape[1])
    weighted = member if source_weight is None else member * source_weight[:, None, :]
    mass = weighted.sum(-1) + (1.0 if keep_weight is None else keep_weight)
    share = weighted / mass[:, :, None]
    change = ops.take_rows(x, source) - ops.take_rows(x, ops.take(keep, into))
    return ops.take_rows(x, keep) + share.to(x.dtype) @ change, mass


# What can stand in for `merge_rows`: the operator vp::merge_rows.
MergeRows = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]


def reduce_tokens(stream: Stream, chosen: TokenMap, *, carry_size: bool, merge: MergeRows = merge_rows) -> Stream:
    """Carry out a map.

    Args:
        carry_size: compute the new tokens' sizes.
        merge: carries out its merges.
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
    """What leaves where the rows `x` [B, K + E, D] were gathered already and nothing merged into one of them."""
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
    """Sizes [B, K + E] of the kept rows and the new ones."""
    kept = ops.ones(keep) if size is None else size
    return torch.cat([kept, _size_of(stream, pool.members, pool.source)], dim=1)


def _merge(stream: Stream, keep: Tensor, size: Tensor | None, merge: Merge, run: MergeRows) -> tuple[Tensor, Tensor]:
    """The rows [B, K, D] and their sizes [B, K]."""
    if merge.source_size is not None:
        x, _ = run(stream.x, keep, merge.source, merge.into, None, None)
        brought = (ops.one_hot(merge.into, keep.shape[1]) @ merge.source_size[:, :, None]).squeeze(-1)
        # What a source brings may be below 0 (DiffRate's similarities are): no logarithm may fail for it.
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
    """What the tokens at `source` [B, R] add to each row's size: rows [B, K, R] times their sizes -> [B, K]."""
    if stream.size is None:
        return rows.sum(-1)
    return (rows @ ops.take(stream.size, source)[:, :, None]).squeeze(-1)


def _positions(stream: Stream, chosen: TokenMap) -> Tensor:
    assert stream.positions is not None
    rows = chosen.keep[:, stream.prefix :]
    if chosen.pool is not None:
        rows = torch.cat([rows, chosen.pool.places], dim=1)
    return ops.take_positions(stream.positions, rows - stream.prefix)
