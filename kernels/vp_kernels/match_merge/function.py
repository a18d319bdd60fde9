"""ONNX form of vp::MatchMerge: the node and its function body in standard operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vp_kernels.function_body import Body, Value, node, variants
from vp_kernels.merge_rows.function import merge
from vp_kernels.select.function import split

if TYPE_CHECKING:
    from torch import Tensor

# Size: tokens have sizes. Scores: images whose scores vary by tau or more are pruned instead of merged.
TYPES = variants("MatchMerge", "Size", "Scores")


def match_merge_node(
    x: Tensor,
    metric: Tensor,
    size: Tensor | None,
    r: int,
    prefix: int,
    scores: Tensor | None = None,
    tau: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Emit the node of `match_merge` while torch.onnx.export traces. Arguments as for `match_merge`.

    Returns:
        x': [B, N - r, D], dtype of x.
        size': float32 [B, N - r].
    """
    import torch

    op_type, inputs = "MatchMerge", [x, metric if metric.ndim == 4 else metric.unsqueeze(2)]
    attributes: dict[str, float] = {"tokens": x.shape[1], "r": r, "prefix": prefix}
    if size is not None:
        op_type += "Size"
        inputs.append(size)
    if scores is not None:
        op_type += "Scores"
        inputs.append(scores)
        attributes["tau"] = float(tau)
    shape = (x.shape[0], x.shape[1] - r)
    merged, mass = node(op_type, inputs, [(x.dtype, (*shape, x.shape[2])), (torch.float32, shape)], **attributes)
    return merged, mass


def body(op_type: str) -> Body:
    """Function body of one operator type."""
    names = ["x", "metric"] + [name for name in ("size", "scores") if name.capitalize() in op_type]
    attributes: dict[str, type] = {"tokens": int, "r": int, "prefix": int}
    if "Scores" in op_type:
        attributes["tau"] = float
    f = Body(op_type, names, attributes)
    given = dict(zip(names, f.inputs(), strict=True))
    x, size = given["x"], given.get("size")
    tokens, r, prefix = f.attribute("tokens"), f.attribute("r"), f.attribute("prefix")

    # Positions in the sequence: A are the even ones after the prefix, B the odd ones.
    odd = prefix % 2
    first_a, first_b = prefix + odd, prefix + 1 - odd
    count_a, rows_b = (tokens - first_a + 1) / 2, f.range(first_b, tokens, 2)
    metric = unit(f, f.sum(f.float(given["metric"]), 2))  # [B, N, d]
    score, partner = nearest(f, f.slice(metric, 1, first_a, tokens, 2), f.slice(metric, 1, first_b, tokens, 2))
    order = f.top(score, count_a)[1]
    rest = split(f, order, count_a, r)[1]
    keep = frame(f, rest * 2, prefix, first_a, count_a - r, rows_b, (tokens - first_b + 1) / 2)
    best = f.slice(order, 1, 0, r)
    source = best * 2 + first_a
    into = f.take(partner, best) + (prefix + count_a - r)

    weight = None if size is None else f.take(size, source)
    if "Scores" in op_type:
        scores, n = given["scores"], tokens - prefix
        pools = f.Less(variance(f, scores, n), f.attribute("tau"))  # [B, 1]
        stay = n - r
        kept = f.top(scores, stay)[1]
        # Both policies have index lists of one shape: a pruned image takes its own rows and merges with weight 0.
        keep = f.Where(pools, keep, frame(f, kept, prefix, prefix, stay))
        ones = f.float(f.GreaterOrEqual(source, 0)) if weight is None else weight
        weight = f.float(pools) * ones
    own = None if size is None else f.take(size, keep)
    merged, mass, _ = merge(f, x, keep, source, into, tokens - r, weight, own, zeros="Scores" in op_type)
    return f.outputs(merged=f.CastLike(merged, x), mass=mass)


def unit(f: Body, x: Value) -> Value:
    """Normalise the rows of [B, N, d] to length 1, in float32; zero rows stay zero."""
    # Not LpNormalization: ONNX Runtime has no kernel for its opset 22 before 1.25.
    return x / f.Sqrt(f.Max(f.sum(x * x, 2, keep=True), 1e-24))


def nearest(f: Body, a: Value, b: Value) -> tuple[Value, Value]:
    """Highest product of each row of a [B, I, d] with a row of b [B, J, d], and the lowest such j: [B, I] each."""
    product = f.MatMul(a, f.Transpose(b, perm=[0, 2, 1]))
    return f.ReduceMax(product, 2, keepdims=0), f.ArgMax(product, axis=2, keepdims=0)


def frame(
    f: Body,
    index: Value,
    prefix: Value,
    shift: Value | int,
    count: Value,
    after: Value | None = None,
    count_after: Value | int = 0,
) -> Value:
    """Row indices 0 .. prefix - 1, then index + shift, then `after`: int64 [B, prefix + count + count_after].

    Pads with zeros and adds a constant row, so that the constants need not be expanded to the batch.

    Args:
        index: int64 [B, count].
        after: int64 [count_after].
    """
    parts = [f.range(0, prefix), f.Expand(shift, count)]
    if after is not None:
        parts.append(after)
    return f.Pad(index, f.Concat(0, prefix, 0, count_after, axis=0)) + f.Concat(*parts, axis=0)


def variance(f: Body, scores: Value, n: Value) -> Value:
    """Unbiased variance of scores / sum(scores), 0 for a single score: [B, n] -> [B, 1]."""
    share = scores / f.sum(scores, 1, keep=True)
    centred = share - f.ReduceMean(share, 1, keepdims=1)
    return f.sum(centred * centred, 1, keep=True) / f.float(f.Max(n - 1, 1))
