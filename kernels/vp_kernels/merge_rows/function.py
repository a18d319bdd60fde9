"""ONNX form of vp::MergeRows: the node and its function body in standard operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vp_kernels.function_body import Body, Value, node, variants

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = {"source_weight": "SourceWeight", "keep_weight": "KeepWeight"}
TYPES = variants("MergeRows", *WEIGHTS.values())


def merge_rows_node(
    x: Tensor,
    keep: Tensor,
    source: Tensor,
    into: Tensor,
    source_weight: Tensor | None = None,
    keep_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Emit the node of `merge_rows` while torch.onnx.export traces. Arguments as for `merge_rows`.

    Returns:
        merged: [B, K, D], dtype of x.
        mass: float32 [B, K].
    """
    import torch

    op_type, inputs = "MergeRows", [x, keep, source, into]
    if source_weight is not None:
        op_type += "SourceWeight"
        inputs.append(source_weight)
    if keep_weight is not None:
        op_type += "KeepWeight"
        inputs.append(keep_weight)
    batch, rows = x.shape[0], keep.shape[1]
    outputs = [(x.dtype, (batch, rows, x.shape[2])), (torch.float32, (batch, rows))]
    merged, mass = node(op_type, inputs, outputs, rows=rows)
    return merged, mass


def body(op_type: str) -> Body:
    """Function body of one operator type."""
    weights = [name for name, suffix in WEIGHTS.items() if suffix in op_type]
    f = Body(op_type, ["x", "keep", "source", "into", *weights], {"rows": int})
    x, keep, source, into, *rest = f.inputs()
    given = dict(zip(weights, rest, strict=True))
    weight = given.get("source_weight")
    own, rows = given.get("keep_weight"), f.attribute("rows")
    merged, mass, _ = merge(f, x, keep, source, into, rows, weight, own, zeros=weight is not None)
    return f.outputs(merged=f.CastLike(merged, x), mass=mass)


def merge(
    f: Body,
    x: Value,
    keep: Value,
    source: Value,
    into: Value,
    count: Value,
    source_weight: Value | None = None,
    keep_weight: Value | None = None,
    *,
    zeros: bool = False,
) -> tuple[Value, Value, Value]:
    """Weighted means of the kept rows and their sources, by one small matrix product and no scatter.

    Args:
        count: K, the length of keep, as an int64 [1].
        source_weight: float32 [B, R].
        zeros: Weights may be 0; such a source is ignored, even if it holds NaN.

    Returns:
        merged: float32 [B, K, D].
        mass: float32 [B, K].
        member: float32 [B, K, R], 1 where source r merges into row k.
    """
    kept = f.rows(x, keep)
    change = f.float(f.rows(x, source)) - f.float(f.rows(kept, into))  # [B, R, D]
    member = one_hot(f, into, count)
    weighted = member if source_weight is None else member * f.Unsqueeze(source_weight, 1)
    mass = f.sum(weighted, 2) + (1.0 if keep_weight is None else keep_weight)
    # Share of each source in its own row, [B, R], rather than in every row: avoids 0 / 0 for a row of weight 0 without
    # sources.
    share = f.Div(1.0 if source_weight is None else source_weight, f.take(mass, into))
    change = change * f.Unsqueeze(share, 2)
    if zeros:
        change = f.Where(f.Unsqueeze(f.Equal(source_weight, 0.0), 2), 0.0, change)
    return f.float(kept) + f.MatMul(member, change), mass, member


def one_hot(f: Body, index: Value, count: Value) -> Value:
    """member[b, j, r] = 1 where index[b, r] = j: int64 [B, R] -> float32 [B, count, R]."""
    return f.OneHot(index, count, [0.0, 1.0], axis=1)
