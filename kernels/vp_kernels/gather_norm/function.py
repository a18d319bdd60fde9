"""ONNX form of vp::GatherNorm: the node and its function body in standard operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vp_kernels.function_body import Body, Ref, Value, node, variants

if TYPE_CHECKING:
    from torch import Tensor

# Image: index is [B, K], per image. Residual: rows of a second tensor are added. Extra: rows are appended.
TYPES = variants("GatherNorm", "Image", "Residual", "Extra")


def gather_norm_node(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Emit the node of `gather_norm` while torch.onnx.export traces. Arguments as for `gather_norm`.

    Returns:
        kept, normed: [B, K + E, D], dtype of x.
    """
    op_type = "GatherNorm" + "Image" * (index.ndim == 2)
    inputs = [x, index, weight, bias]
    rows = index.shape[-1]
    if residual is not None:
        op_type += "Residual"
        inputs.append(residual)
    if extra is not None:
        op_type += "Extra"
        inputs.append(extra)
        rows += extra.shape[1]
    shape = (x.shape[0], rows, x.shape[2])
    kept, normed = node(op_type, inputs, [(x.dtype, shape)] * 2, eps=eps)
    return kept, normed


def body(op_type: str) -> Body:
    """Function body of one operator type."""
    names = ["x", "index", "weight", "bias"]
    names += [name for name, suffix in (("residual", "Residual"), ("extra", "Extra")) if suffix in op_type]
    f = Body(op_type, names, {"eps": float})
    given = dict(zip(names, f.inputs(), strict=True))
    x = given["x"]

    def chosen(source: str) -> Value:
        if "Image" in op_type:
            return f.rows(given[source], given["index"])
        return f.Gather(given[source], given["index"], axis=1)

    kept = chosen("x")
    if "Residual" in op_type:
        total = f.float(kept) + f.float(chosen("residual"))
        if "Extra" in op_type:
            total = f.Concat(total, f.float(given["extra"]), axis=1)
        kept = f.CastLike(total, x)
    else:
        if "Extra" in op_type:
            kept = f.Concat(kept, given["extra"], axis=1)
        total = f.float(kept)
    # In fp32 throughout: statistics of the unrounded sum, one rounding of the result.
    normed = f.LayerNormalization(total, f.float(given["weight"]), f.float(given["bias"]), axis=-1, epsilon=Ref("eps"))
    return f.outputs(kept=kept, normed=f.CastLike(normed, x))
