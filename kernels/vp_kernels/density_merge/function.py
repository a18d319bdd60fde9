"""ONNX form of vp::DensityMerge: the node and its function body in standard operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vp_kernels.function_body import Body, Value, node, variants
from vp_kernels.match_merge.function import frame, nearest, unit
from vp_kernels.merge_rows.function import merge, one_hot
from vp_kernels.select.function import split

if TYPE_CHECKING:
    from torch import Tensor

# Clusters, Pairs: the count is not 0. Size: tokens have sizes. BySize: means are weighted by size (or 1), not by score.
ATTRIBUTES = ("tokens", "width", "tokens_out", "clusters", "pairs", "prefix")
TYPES = variants("DensityMerge", "Clusters", "Pairs", "Size", "BySize")


def density_merge_node(
    x: Tensor,
    scores: Tensor,
    size: Tensor | None,
    tokens_out: int,
    clusters: int,
    pairs: int,
    prefix: int,
    weights: str = "attention",
) -> tuple[Tensor, Tensor]:
    """Emit the node of `density_merge` while torch.onnx.export traces. Arguments as for `density_merge`.

    Returns:
        x': [B, tokens_out, D], dtype of x.
        size': float32 [B, tokens_out].
    """
    import torch

    parts = {"Clusters": clusters, "Pairs": pairs, "Size": size is not None, "BySize": weights == "size"}
    op_type = "DensityMerge" + "".join(name for name, there in parts.items() if there)
    inputs = [x, scores] if size is None else [x, scores, size]
    shape = (x.shape[0], tokens_out)
    outputs = [(x.dtype, (*shape, x.shape[2])), (torch.float32, shape)]
    counts = (x.shape[1], x.shape[2], tokens_out, clusters, pairs, prefix)
    merged, mass = node(op_type, inputs, outputs, **dict(zip(ATTRIBUTES, counts, strict=True)))
    return merged, mass


def body(op_type: str) -> Body:
    """Function body of one operator type."""
    by_size = op_type.endswith("BySize")
    has_size = "Size" in op_type.removesuffix("BySize")
    names = ["x", "scores"] + ["size"] * has_size
    f = Body(op_type, names, dict.fromkeys(ATTRIBUTES, int))
    given = dict(zip(names, f.inputs(), strict=True))
    x, scores, size = given["x"], given["scores"], given.get("size")
    tokens, _, tokens_out, clusters, pairs, prefix = (f.attribute(name) for name in ATTRIBUTES)
    n, attentive = tokens - prefix, tokens_out - prefix - clusters + pairs
    weight: Value | None = f.Max(scores, 1e-12)
    if by_size:
        weight = None if size is None else f.Max(size, 1e-12)

    order = f.top(f.slice(scores, 1, prefix, tokens), n)[1]
    best, rest = split(f, order, n, attentive)
    best, rest = best + prefix, rest + prefix
    if "Pairs" in op_type:
        rows, mass = _pairs(f, x, best, attentive, weight, size)
    else:
        keep = frame(f, best, prefix, 0, attentive)
        rows = f.float(f.rows(x, keep))
        mass = f.float(f.GreaterOrEqual(keep, 0)) if size is None else f.take(size, keep)
    if "Clusters" in op_type:
        pooled, members = _clusters(f, x, rest, n - attentive, weight)
        rows = f.Concat(rows, pooled, axis=1)
        mass = f.Concat(mass, _sizes(f, members, size, rest), axis=1)
    return f.outputs(merged=f.CastLike(rows, x), mass=mass)


def _pairs(
    f: Body, x: Value, rows: Value, count: Value, weight: Value | None, size: Value | None
) -> tuple[Value, Value]:
    """Merge the most similar pairs of attentive tokens.

    Args:
        rows: int64 [B, n_a], indices into x, ascending.
        count: n_a.

    Returns:
        float32 [B, P + n_a - pairs, D]: prefix, unmerged tokens at even positions, all tokens at odd positions.
        float32 [B, P + n_a - pairs], their sizes.
    """
    prefix, pairs = f.attribute("prefix"), f.attribute("pairs")
    a, b = f.slice(rows, 1, 0, count, 2), f.slice(rows, 1, 1, count, 2)
    count_a = (count + 1) / 2
    score, partner = nearest(f, unit(f, f.float(f.rows(x, a))), unit(f, f.float(f.rows(x, b))))
    # Among tokens with the same partner, the most similar one is paired.
    rivals = f.Equal(f.Unsqueeze(partner, 2), f.Unsqueeze(partner, 1))
    beaten = f.ReduceMax(f.float(f.And(rivals, _above(f, score, count_a))), 2, keepdims=0)
    order = f.top(score - beaten * 4.0, count_a)[1]  # cosines differ by at most 2: beaten tokens rank last
    source, single = f.slice(order, 1, 0, pairs), split(f, order, count_a, pairs)[1]
    keep = frame(f, f.Concat(f.take(a, single), b, axis=1), prefix, 0, count - pairs)
    into = f.take(partner, source) + (prefix + count_a - pairs)
    leaving = f.take(a, source)
    weights = (None, None) if weight is None else (f.take(weight, leaving), f.take(weight, keep))
    merged, mass, member = merge(f, x, keep, leaving, into, prefix + count - pairs, *weights)
    if weight is None:
        return merged, mass
    return merged, _sizes(f, member, size, leaving) + (1.0 if size is None else f.take(size, keep))


def _clusters(f: Body, x: Value, rows: Value, count: Value, weight: Value | None) -> tuple[Value, Value]:
    """Cluster the inattentive tokens by density peaks.

    Args:
        rows: int64 [B, n_i], indices into x, ascending.
        count: n_i.

    Returns:
        float32 [B, K, D], the weighted means of the clusters, and float32 [B, K, n_i], 1 for members.
    """
    clusters = f.attribute("clusters")
    t = f.float(f.rows(x, rows))
    squared = _squared_distances(f, t, count)
    distance = f.Sqrt(squared)
    # In logarithms: the density itself underflows for distant tokens.
    density = f.sum(squared, 2) / f.Neg(f.float(count * f.attribute("width")))
    least = f.ReduceMin(f.Where(_above(f, density, count), distance, 1e30), 2, keepdims=0)
    # No token is denser than the densest: its distance is its row's maximum rather than infinity.
    delta = f.Where(f.Less(least, 1e29), least, f.ReduceMax(distance, 2, keepdims=0))
    centres = f.ascending(f.top(density + f.Log(delta), clusters)[1], clusters)  # [B, K]
    to_centre = f.Transpose(f.rows(squared, centres), perm=[0, 2, 1])  # [B, K, n_i]: distances are symmetric
    belongs = one_hot(f, f.ArgMin(to_centre, axis=2, keepdims=0), clusters)  # [B, K, n_i]
    is_centre = one_hot(f, centres, count)  # [B, n_i, K]
    # A centre belongs to its own cluster, even at distance 0 from another centre.
    members = belongs * (1.0 - f.Unsqueeze(f.sum(is_centre, 2), 1)) + f.Transpose(is_centre, perm=[0, 2, 1])
    weighted = members if weight is None else members * f.Unsqueeze(f.take(weight, rows), 1)
    return f.MatMul(weighted / f.sum(weighted, 2, keep=True), t), members


def _squared_distances(f: Body, t: Value, count: Value) -> Value:
    """|t_i - t_j|^2 between rows: float32 [B, n, D] -> [B, n, n], symmetric, exactly 0 on the diagonal.

    Centred first: |t_i|^2 + |t_j|^2 - 2 t_i t_j cancels badly if tokens share a large mean, as in ViTs.
    """
    t = t - f.ReduceMean(t, 1, keepdims=1)
    length = f.sum(t * t, 2)
    product = f.MatMul(t, f.Transpose(t, perm=[0, 2, 1]))
    apart = f.Max(f.Unsqueeze(length, 2) + f.Unsqueeze(length, 1) - product * 2.0, 0.0)
    place = f.range(0, count)
    return apart * f.float(f.Not(f.Equal(f.Unsqueeze(place, 1), place)))


def _above(f: Body, score: Value, count: Value) -> Value:
    """Whether j ranks before i, ties to the lowest index: float32 [B, n] -> bool [B, n (i), n (j)]."""
    place = f.range(0, count)
    mine, theirs = f.Unsqueeze(score, 2), f.Unsqueeze(score, 1)
    tie = f.And(f.Equal(theirs, mine), f.Less(place, f.Unsqueeze(place, 1)))
    return f.Or(f.Greater(theirs, mine), tie)


def _sizes(f: Body, member: Value, size: Value | None, source: Value) -> Value:
    """Sum the sizes of the tokens at `source` [B, R] over each row's members: member [B, K, R] -> [B, K]."""
    if size is None:
        return f.sum(member, 2)
    return f.Squeeze(f.MatMul(member, f.Unsqueeze(f.take(size, source), 2)), 2)
